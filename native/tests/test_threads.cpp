// The pool runs every item once, for any number of items and threads, also when jobs follow each other at once.
#include <atomic>
#include <cstdio>
#include <vector>

#include "threads.h"

int main() {
    int failed = 0;
    for (uint32_t n_threads : {1u, 2u, 3u, 8u}) {
        pi::Pool pool(n_threads);
        for (size_t job = 0; job < 3000; job++) {
            pool.stay_awake(job % 100 < 50);
            size_t n_items = job % 37;
            std::vector<std::atomic<uint32_t>> runs(n_items);
            std::atomic<bool> known_thread{true};
            pool.run(n_items, [&](size_t item, uint32_t thread) {
                runs[item].fetch_add(1, std::memory_order_relaxed);
                if (thread >= n_threads) known_thread = false;
            });
            for (auto& n : runs) failed += n.load() != 1;
            failed += !known_thread;
        }
    }
    std::printf("test_threads: %d failed\n", failed);
    return failed != 0;
}
