// One pool of threads for the life of a session. Every thread has a contiguous share of a job's items, so that it reads
// memory in sequence, and takes from the others' shares when its own is empty: a thread that has no processor holds
// nobody up. Results must not depend on which thread took an item.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace pi {

class Pool {
   public:
    explicit Pool(uint32_t n_threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    uint32_t n_threads() const { return n_threads_; }

    // task(item, thread) for every item < n_items, on all threads, the caller's included; returns when all are done.
    template <class Task>
    void run(size_t n_items, Task&& task) {
        using T = std::remove_reference_t<Task>;
        auto call = [](void* user, size_t item, uint32_t thread) { (*static_cast<T*>(user))(item, thread); };
        run_erased(n_items, call, &task);
    }

    // While on, threads do not sleep between jobs: where the caller waits for something else, and then needs them at
    // once. Waking takes longer than a layer's share (measured: more than 0.2 ms on a virtual machine).
    void stay_awake(bool on) { awake_.store(on, std::memory_order_relaxed); }

    // Ticks spent on items since the last call, the mean over all threads.
    uint64_t take_busy();

   private:
    using Call = void (*)(void*, size_t item, uint32_t thread);
    struct alignas(64) Share {
        std::atomic<uint64_t> ticket{0};  // end of the share, next item
        uint64_t busy = 0;                // ticks that the share's thread spent on items
    };
    void run_erased(size_t n_items, Call call, void* user);
    void work(uint32_t thread);
    void stop();
    void take_items(uint32_t thread);
    bool take_item(Share& from, uint32_t thread);

    uint32_t n_threads_;
    Call call_ = nullptr;
    void* user_ = nullptr;
    std::unique_ptr<Share[]> shares_;
    alignas(64) std::atomic<size_t> done_{0};  // items of this generation that are finished
    alignas(64) std::atomic<uint32_t> generation_{0};
    std::atomic<bool> stop_{false}, awake_{false};
    std::vector<std::thread> threads_;
};

}  // namespace pi
