// One pool of threads for the life of a session. Items are handed out as threads become free; results must not depend
// on which thread took an item. A thread that has no processor holds nobody up: the others take its items.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
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

   private:
    using Call = void (*)(void*, size_t, uint32_t);
    void run_erased(size_t n_items, Call call, void* user);
    void work(uint32_t thread);
    void stop();
    bool take_item(uint32_t thread);

    uint32_t n_threads_;
    Call call_ = nullptr;
    void* user_ = nullptr;
    alignas(64) std::atomic<uint64_t> ticket_{0};  // number of items, next item
    alignas(64) std::atomic<size_t> done_{0};      // items of this generation that are finished
    alignas(64) std::atomic<uint32_t> generation_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> threads_;
};

}  // namespace pi
