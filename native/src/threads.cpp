#include "threads.h"

#include <exception>
#include <string>

#include "gguf.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pi {

namespace {

constexpr int SPINS = 4000;  // about 50 us: longer than the serial work between two parallel pieces

// A ticket holds all that a thread must know to own an item: while it does, the job cannot end, so that what the job
// points to stays valid.
constexpr uint64_t ITEM_BITS = 20, MASK = (1u << ITEM_BITS) - 1;
constexpr size_t MAX_ITEMS = MASK - 512;  // each of 256 threads may ask in vain twice: once more where it came late

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

}  // namespace

Pool::Pool(uint32_t n_threads) : n_threads_(n_threads) {
    try {
        for (uint32_t i = 1; i < n_threads; i++) threads_.emplace_back([this, i] { work(i); });
    } catch (const std::exception&) {
        stop();
        throw Error(PI_ERROR_MEMORY, "cannot start " + std::to_string(n_threads) + " threads");
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    stop_.store(true);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (auto& thread : threads_) thread.join();
}

// Does one item of the present job; false where none is left.
bool Pool::take_item(uint32_t thread) {
    uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
    size_t item = ticket & MASK, n_items = ticket >> ITEM_BITS;
    if (item >= n_items) return false;
    call_(user_, item, thread);
    done_.fetch_add(1, std::memory_order_release);
    return true;
}

void Pool::run_erased(size_t n_items, Call call, void* user) {
    if (n_threads_ == 1 || n_items <= 1 || n_items > MAX_ITEMS) {
        for (size_t item = 0; item < n_items; item++) call(user, item, 0);
        return;
    }
    call_ = call;
    user_ = user;
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(uint64_t{n_items} << ITEM_BITS, std::memory_order_release);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    while (take_item(0)) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) != n_items; spins++) {
        pause();
        if (spins > SPINS) std::this_thread::yield();  // a worker lost its processor to somebody else
    }
}

void Pool::work(uint32_t thread) {
    uint32_t seen = 0;
    while (true) {
        for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < SPINS; spins++) pause();
        generation_.wait(seen, std::memory_order_acquire);
        seen = generation_.load(std::memory_order_acquire);
        if (stop_.load()) return;
        while (take_item(thread)) {
        }
    }
}

}  // namespace pi
