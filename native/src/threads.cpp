#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pi {

namespace {

constexpr int SPINS = 4000;  // about 50 us: longer than the serial work between two parallel pieces

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

}  // namespace

Pool::Pool(uint32_t n_threads) : n_threads_(n_threads) {
    for (uint32_t i = 1; i < n_threads; i++) threads_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
    stop_.store(true);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Pool::take_items(uint32_t thread) {
    for (size_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < n_items_;) call_(user_, item, thread);
}

void Pool::run_erased(size_t n_items, Call call, void* user) {
    if (n_threads_ == 1 || n_items <= 1) {
        for (size_t item = 0; item < n_items; item++) call(user, item, 0);
        return;
    }
    call_ = call;
    user_ = user;
    n_items_ = n_items;
    next_.store(0, std::memory_order_relaxed);
    running_.store(n_threads_ - 1, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    take_items(0);
    for (int spins = 0; running_.load(std::memory_order_acquire) != 0; spins++) {
        pause();
        if (spins > SPINS) std::this_thread::yield();  // a worker lost its processor to somebody else
    }
}

void Pool::work(uint32_t thread) {
    uint32_t seen = 0;
    while (true) {
        for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < SPINS; spins++) pause();
        generation_.wait(seen, std::memory_order_acquire);
        seen++;
        if (stop_.load()) return;
        take_items(thread);
        running_.fetch_sub(1, std::memory_order_release);
    }
}

}  // namespace pi
