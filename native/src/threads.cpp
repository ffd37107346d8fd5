#include "threads.h"

#include <exception>
#include <string>
#include <utility>

#include "gguf.h"
#include "ticks.h"

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

Pool::Pool(uint32_t n_threads) : n_threads_(n_threads), shares_(new Share[n_threads]) {
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

// Does one item of a share; false where none is left.
bool Pool::take_item(Share& from, uint32_t thread) {
    uint64_t ticket = from.ticket.fetch_add(1, std::memory_order_acq_rel);
    size_t item = ticket & MASK, end = ticket >> ITEM_BITS;
    if (item >= end) return false;
    uint64_t begin = ticks();
    call_(user_, item, thread);
    shares_[thread].busy += ticks() - begin;
    done_.fetch_add(1, std::memory_order_release);
    return true;
}

// Does items until none is left: its own share, then the others'.
void Pool::take_items(uint32_t thread) {
    for (uint32_t i = 0; i < n_threads_; i++) {
        Share& from = shares_[(thread + i) % n_threads_];
        while (take_item(from, thread)) {
        }
    }
}

uint64_t Pool::take_busy() {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < n_threads_; i++) sum += std::exchange(shares_[i].busy, 0);
    return sum / n_threads_;
}

void Pool::run_erased(size_t n_items, Call call, void* user) {
    if (n_threads_ == 1 || n_items <= 1 || n_items > MAX_ITEMS) {
        uint64_t begin = ticks();
        for (size_t item = 0; item < n_items; item++) call(user, item, 0);
        shares_[0].busy += ticks() - begin;
        return;
    }
    call_ = call;
    user_ = user;
    done_.store(0, std::memory_order_relaxed);
    for (uint32_t i = 0; i < n_threads_; i++) {
        uint64_t begin = n_items * i / n_threads_, end = n_items * (i + 1) / n_threads_;
        shares_[i].ticket.store(end << ITEM_BITS | begin, std::memory_order_release);
    }
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    take_items(0);
    for (int spins = 0; done_.load(std::memory_order_acquire) != n_items; spins++) {
        pause();
        if (spins > SPINS) std::this_thread::yield();  // a worker lost its processor to somebody else
    }
}

void Pool::work(uint32_t thread) {
    uint32_t seen = 0;
    while (true) {
        auto idle = [&] { return generation_.load(std::memory_order_acquire) == seen; };
        for (int spins = 0; idle() && spins < SPINS; spins++) pause();
        while (idle() && awake_.load(std::memory_order_relaxed)) std::this_thread::yield();
        generation_.wait(seen, std::memory_order_acquire);
        seen = generation_.load(std::memory_order_acquire);
        if (stop_.load()) return;
        take_items(thread);
    }
}

}  // namespace pi
