// Errors, memory and copies: what the host side of the CUDA part is made of.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "device.h"
#include "numbers.h"
#include "rows.h"

namespace pi::card {

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next call would report it, too
    pi_status status = error == cudaErrorMemoryAllocation ? PI_ERROR_MEMORY : PI_ERROR_UNSUPPORTED;
    throw Error(status, std::string("the card: ") + what + ": " + cudaGetErrorString(error));
}

constexpr int FIRST = 0;  // the card that is used

// Each thread says so before it starts work there: other libraries may have chosen another.
inline void choose_card() { check(cudaSetDevice(FIRST), "cannot be chosen"); }

inline uint64_t card_row_bytes(Type type, uint64_t n) { return align_up(row_bytes(type, n), PIECE_BYTES); }

inline CardRows card_rows(const Rows& rows) {
    return {rows.type, static_cast<uint32_t>(rows.n), rows.stride, rows.data};
}

// Memory of the card, or of the processor where the card sees it, too.
class Memory {
   public:
    Memory() = default;
    Memory(uint64_t n, bool on_card) : n_(n), on_card_(on_card) {
        if (n == 0) return;
        if (on_card) {
            allocate_on_card();
        } else {
            check(cudaHostAlloc(&data_, n, cudaHostAllocMapped), "cannot allocate memory that it shares");
            std::memset(data_, 0, n);
        }
    }
    Memory(Memory&& other) noexcept { *this = std::move(other); }
    Memory& operator=(Memory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(n_, other.n_);
        std::swap(on_card_, other.on_card_);
        return *this;
    }
    ~Memory() {
        if (data_) on_card_ ? cudaFree(data_) : cudaFreeHost(data_);
    }
    template <class T = uint8_t>
    T* data() const {
        return static_cast<T*>(data_);
    }
    uint64_t bytes() const { return n_; }

   private:
    void allocate_on_card() {
        cudaError_t error = cudaMalloc(&data_, n_);
        if (error == cudaErrorMemoryAllocation) {
            size_t free = 0, total = 0;
            cudaGetLastError();
            cudaMemGetInfo(&free, &total);
            throw Error(PI_ERROR_MEMORY, "the card: expected room for " + std::to_string(n_) + " bytes, found " +
                                             std::to_string(free) + " free");
        }
        check(error, "cannot allocate memory");
    }

    void* data_ = nullptr;
    uint64_t n_ = 0;
    bool on_card_ = true;
};

// Places buffers in one piece of memory: once to learn its size (base: NULL), then in it.
struct Places {
    uint8_t* base = nullptr;
    uint64_t used = 0;
    template <class T>
    void place(T*& at, uint64_t n) {
        constexpr uint64_t ALIGNMENT = 256;
        at = base && n > 0 ? reinterpret_cast<T*>(base + used) : nullptr;
        used = align_up(used + n * sizeof(T), ALIGNMENT);
    }
};

class Stream {
   public:
    Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cannot create a stream"); }
    ~Stream() { cudaStreamDestroy(stream_); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    operator cudaStream_t() const { return stream_; }
    void finish() { check(cudaStreamSynchronize(stream_), "work failed"); }

   private:
    cudaStream_t stream_ = nullptr;
};

class Event {
   public:
    explicit Event(unsigned flags = 0) { check(cudaEventCreateWithFlags(&event_, flags), "cannot create an event"); }
    ~Event() { cudaEventDestroy(event_); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    operator cudaEvent_t() const { return event_; }
    void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "cannot record an event"); }
    void wait() { check(cudaEventSynchronize(event_), "work failed"); }

   private:
    cudaEvent_t event_ = nullptr;
};

// What `work` gives the stream, to be launched again and again. The stream is as before whatever it throws.
template <class Work>
cudaGraphExec_t record(cudaStream_t stream, Work&& work) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cannot record work");
    cudaGraph_t graph = nullptr;
    try {
        work();
    } catch (...) {
        cudaStreamEndCapture(stream, &graph);
        if (graph) cudaGraphDestroy(graph);
        cudaGetLastError();  // the recording's failure is no later call's
        throw;
    }
    check(cudaStreamEndCapture(stream, &graph), "cannot record work");
    cudaGraphExec_t ready = nullptr;
    cudaError_t error = cudaGraphInstantiate(&ready, graph, 0);
    cudaGraphDestroy(graph);
    check(error, "cannot prepare work");
    return ready;
}

// One more piece of work is done, where the processor sees it.
[[maybe_unused]] static __global__ void signal(uint64_t* n_done, volatile uint64_t* seen) {
    if (threadIdx.x != 0) return;
    __threadfence_system();
    *seen = ++*n_done;
}

// Looks for the signal, without any call that would wait for the whole card.
inline void wait_for_signal(const volatile uint64_t* seen, uint64_t n_done, cudaStream_t stream) {
    constexpr int LOOKS = 10000;  // between questions whether work failed
    for (int look = 1; *seen < n_done; look++) {
        if (look % LOOKS != 0) continue;
        cudaError_t state = cudaStreamQuery(stream);
        if (state != cudaErrorNotReady) check(state, "work failed");
        if (state == cudaSuccess && *seen < n_done)
            throw Error(PI_ERROR_INTERNAL, "the card: expected a signal of finished work, found none");
    }
    std::atomic_thread_fence(std::memory_order_acquire);
}

// A row's blocks, each a scale and QUANTS bytes: all quants, then all scales.
template <uint64_t QUANTS>
void repack_blocks(uint64_t n_blocks, const uint8_t* from, uint8_t* to) {
    constexpr uint64_t SCALE = sizeof(uint16_t);
    uint8_t* scales = to + n_blocks * QUANTS;
    for (uint64_t b = 0; b < n_blocks; b++, from += SCALE + QUANTS) {
        std::memcpy(scales + b * SCALE, from, SCALE);
        std::memcpy(to + b * QUANTS, from + SCALE, QUANTS);
    }
}

// A row of the file in the card's order: quants, then scales, then zeros.
inline void repack_row(Type type, uint64_t n, const uint8_t* from, uint8_t* to) {
    const uint64_t used = row_bytes(type, n);
    std::memset(to + used, 0, align_up(used, PIECE_BYTES) - used);
    if (type == Type::Q4_0)
        repack_blocks<QK / 2>(n / QK, from, to);
    else if (type == Type::Q8_0)
        repack_blocks<QK>(n / QK, from, to);
    else
        std::memcpy(to, from, used);
}

// Brings rows to the card, through two pinned buffers in turn: one is filled while the other is on its way.
class Upload {
   public:
    explicit Upload(cudaStream_t stream) : stream_(stream) {}

    // Rows `stride` bytes apart to `to`, one after the other. They may change when it returns.
    void rows(uint8_t* to, Type type, uint64_t n, uint64_t n_rows, const uint8_t* from, uint64_t stride) {
        uint64_t row = card_row_bytes(type, n), together = std::max<uint64_t>(1, STAGING_BYTES / row);
        for (uint64_t done = 0; done < n_rows; done += together) {
            uint64_t m = std::min(together, n_rows - done);
            Turn& turn = next(m * row);
            for (uint64_t i = 0; i < m; i++)
                repack_row(type, n, from + (done + i) * stride, turn.staging.data() + i * row);
            check(cudaMemcpyAsync(to + done * row, turn.staging.data(), m * row, cudaMemcpyHostToDevice, stream_),
                  "cannot copy");
            turn.copied.record(stream_);
        }
    }

    // Gives the buffers back, once nothing is on its way.
    void release() {
        for (Turn& turn : turns_) {
            turn.copied.wait();
            turn.staging = {};
        }
    }

   private:
    static constexpr uint64_t STAGING_BYTES = DEVICE_STAGING / 2;
    struct Turn {
        Memory staging;
        Event copied{cudaEventDisableTiming};
    };

    Turn& next(uint64_t n_bytes) {
        Turn& turn = turns_[n_turns_++ % 2];
        turn.copied.wait();
        if (turn.staging.bytes() < n_bytes) turn.staging = Memory(std::max(n_bytes, STAGING_BYTES), false);
        return turn;
    }

    cudaStream_t stream_;
    Turn turns_[2];
    size_t n_turns_ = 0;
};

}  // namespace pi::card
