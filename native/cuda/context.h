// What the card's memory is used for, as its driver's monitor (NVML) has it: opened where it is there, not linked.
#pragma once

#include <dlfcn.h>

#include <optional>

#include "memory.h"

namespace pi::card {

class Monitor {
   public:
    explicit Monitor(const char* bus_id) : library_(dlopen("libnvidia-ml.so.1", RTLD_NOW)) {
        auto init = function<int()>("nvmlInit_v2");
        auto find = function<int(const char*, void**)>("nvmlDeviceGetHandleByPciBusId_v2");
        if (!init || !find || init() != 0) return;
        if (find(bus_id, &card_) != 0) card_ = nullptr;
    }
    ~Monitor() {
        if (auto shutdown = function<int()>("nvmlShutdown")) shutdown();
        if (library_) dlclose(library_);
    }
    Monitor(const Monitor&) = delete;
    Monitor& operator=(const Monitor&) = delete;

    // Bytes in use, by whomever; none where it cannot say.
    std::optional<uint64_t> used() const {
        struct {
            unsigned long long total, free, used;
        } memory{};
        auto ask = function<int(void*, void*)>("nvmlDeviceGetMemoryInfo");
        if (!card_ || !ask || ask(card_, &memory) != 0) return std::nullopt;
        return memory.used;
    }

   private:
    template <class F>
    F* function(const char* name) const {
        return library_ ? reinterpret_cast<F*>(dlsym(library_, name)) : nullptr;
    }

    void* library_;
    void* card_ = nullptr;
};

// Makes the card's context; what that took, or an estimate.
class CardContext {
   public:
    explicit CardContext(int card) {
        char bus_id[32] = "";
        check(cudaDeviceGetPCIBusId(bus_id, sizeof(bus_id), card), "cannot be asked for");
        Monitor monitor(bus_id);
        auto before = monitor.used();
        check(cudaFree(nullptr), "cannot make a context");
        auto after = monitor.used();
        constexpr uint64_t LEAST = 64u << 20, MOST = 1u << 30;  // beyond these another program's memory came or went
        measured_ = before && after && *after >= *before + LEAST && *after <= *before + MOST;
        if (measured_) bytes_ = *after - *before;
    }
    uint64_t bytes() const { return bytes_; }
    bool measured() const { return measured_; }

   private:
    uint64_t bytes_ = 512u << 20;  // what a context takes at most on today's cards
    bool measured_ = false;
};

}  // namespace pi::card
