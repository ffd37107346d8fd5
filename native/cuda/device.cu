// The card as the engine sees it: what it is, its memory, its speeds.
#include <cstdlib>
#include <vector>

#include "context.h"
#include "device.h"
#include "memory.h"
#include "session.h"

namespace pi::card {

namespace {

// ---- what is measured

// As measure.cpp picks, at no fixed distance; other rows each turn, which no cache holds yet.
__device__ __forceinline__ uint64_t picked_row(uint64_t p, uint32_t stride, uint32_t turn) {
    return p * stride + ((p * 0x9e3779b97f4a7c15u >> 40) + turn) % stride;
}

// Reads n_picked rows of n_pieces pieces. Each warp takes some pieces of a row at a time, so that rows of any length
// keep the whole card busy; what is read is summed so that it is needed.
__global__ void __launch_bounds__(256) read_rows(const uint8_t* rows, uint64_t n_picked, uint64_t n_pieces,
                                                 uint32_t stride, uint32_t turn, uint32_t* sink) {
    constexpr uint32_t AT_ONCE = 4, TAKEN = AT_ONCE * WARP;
    const uint32_t lane = threadIdx.x % WARP, n_warps = gridDim.x * (blockDim.x / WARP);
    const uint64_t per_row = (n_pieces + TAKEN - 1) / TAKEN;
    uint32_t sum = 0;
    for (uint64_t i = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; i < n_picked * per_row; i += n_warps) {
        const uint8_t* row = rows + picked_row(i / per_row, stride, turn) * n_pieces * PIECE_BYTES;
        const uint64_t p = i % per_row * TAKEN + lane;
        uint4 w[AT_ONCE];
#pragma unroll
        for (uint32_t k = 0; k < AT_ONCE; k++)
            w[k] = p + k * WARP < n_pieces ? load_weights(row + (p + k * WARP) * PIECE_BYTES) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (uint32_t k = 0; k < AT_ONCE; k++) sum ^= w[k].x ^ w[k].y ^ w[k].z ^ w[k].w;
    }
    if (sum == 0x5eed5eed) *sink = sum;
}

__global__ void copy_floats(const float* from, float* to, uint64_t n) {
    for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += uint64_t(gridDim.x) * blockDim.x)
        to[i] = from[i];
}

// Work on a stream, once: recorded, to be launched again and again.
class Recorded {
   public:
    template <class Work>
    Recorded(cudaStream_t stream, Work&& work) : graph_(record(stream, work)) {}
    ~Recorded() { cudaGraphExecDestroy(graph_); }
    Recorded(const Recorded&) = delete;
    Recorded& operator=(const Recorded&) = delete;
    void start(cudaStream_t stream) { check(cudaGraphLaunch(graph_, stream), "cannot start work"); }

   private:
    cudaGraphExec_t graph_;
};

// ---- the device

class CudaDevice final : public Device {
   public:
    explicit CudaDevice(const DeviceInfo& info, uint32_t n_processors)
        : info_(info), n_processors_(n_processors), upload_(stream_) {}

    DeviceInfo info() override {
        choose_card();
        size_t free = 0, total = 0;
        check(cudaMemGetInfo(&free, &total), "cannot ask for its memory");
        info_.total = total;
        info_.free = free;
        return info_;
    }

    uint64_t row_bytes(Type type, uint64_t n) const override { return card_row_bytes(type, n); }

    uint8_t* allocate(uint64_t n_bytes) override {
        memory_ = Memory(n_bytes, true);
        return memory_.data();
    }

    void store(uint8_t* to, Type type, uint64_t n, uint64_t n_rows, const uint8_t* rows) override {
        upload_.rows(to, type, n, n_rows, rows, pi::row_bytes(type, n));
        stream_.finish();
    }

    std::unique_ptr<DeviceSession> open(const Config& config, const Weights& weights, const pi_session_params& params,
                                        uint32_t lent, uint64_t room) override {
        upload_.release();  // the weights are there
        return open_session(config, weights, params, lent, room, n_processors_);
    }

    double read_rate(uint64_t buffer_bytes, uint64_t row_bytes, uint32_t stride_rows) override;
    double copy_rate() override;
    double launch_seconds() override;
    double merge_seconds(uint64_t n) override;

   private:
    template <class Work>
    double seconds_on_card(Work&& work);

    DeviceInfo info_;
    uint32_t n_processors_;
    Stream stream_;
    Upload upload_;
    Memory memory_;
};

// As the card's own clock has it.
template <class Work>
double CudaDevice::seconds_on_card(Work&& work) {
    Event begin, end;
    return median_seconds([&] {
        begin.record(stream_);
        work();
        end.record(stream_);
        end.wait();
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin, end), "cannot measure");
        return ms * 1e-3;
    });
}

double CudaDevice::read_rate(uint64_t buffer_bytes, uint64_t row_bytes, uint32_t stride_rows) {
    Memory buffer(buffer_bytes, true), sink(sizeof(uint32_t), true);
    const uint64_t n_picked = buffer_bytes / row_bytes / stride_rows;
    check(cudaMemsetAsync(buffer.data(), 1, buffer_bytes, stream_), "cannot clear memory");
    uint32_t turn = 0;
    constexpr uint32_t BLOCKS = 8;  // of a processor: more warps than any holds, or as many
    double seconds = seconds_on_card([&] {
        check(launch(read_rows, n_processors_ * BLOCKS, 256, 0, stream_, buffer.data(), n_picked,
                     row_bytes / PIECE_BYTES, stride_rows, turn++, sink.data<uint32_t>()),
              "cannot start work");
    });
    return static_cast<double>(n_picked * row_bytes) / seconds;
}

// As neurons are lent: rows of the processor's memory, through pinned buffers. Q4_0 takes longest to bring in order.
double CudaDevice::copy_rate() {
    constexpr uint64_t N = 4096, N_ROWS = 32768;
    const uint64_t row = pi::row_bytes(Type::Q4_0, N);
    Memory to(row * N_ROWS, true);
    std::vector<uint8_t> from(row * N_ROWS, 1);
    double seconds = median_seconds([&] {
        return seconds_of([&] {
            upload_.rows(to.data(), Type::Q4_0, N, N_ROWS, from.data(), row);
            stream_.finish();
        });
    });
    return static_cast<double>(row * N_ROWS) / seconds;
}

double CudaDevice::launch_seconds() {
    constexpr int STEPS = 100;
    Memory count(sizeof(uint64_t), true);
    check(cudaMemsetAsync(count.data(), 0, sizeof(uint64_t), stream_), "cannot clear memory");
    Recorded steps(stream_, [&] {
        for (int i = 0; i < STEPS; i++)
            check(launch(copy_floats, 1, WARP, 0, stream_, count.data<float>(), count.data<float>() + 1, 1),
                  "cannot start work");
    });
    return seconds_on_card([&] { steps.start(stream_); }) / STEPS;
}

double CudaDevice::merge_seconds(uint64_t n) {
    Memory shared(2 * n * sizeof(float) + sizeof(uint64_t), false), x(n * sizeof(float), true);
    Memory count(sizeof(uint64_t), true);
    check(cudaMemsetAsync(count.data(), 0, sizeof(uint64_t), stream_), "cannot clear memory");
    volatile uint64_t* seen = shared.data<uint64_t>();
    auto* there = reinterpret_cast<float*>(shared.data<uint64_t>() + 1);
    const auto blocks = static_cast<uint32_t>((n + 255) / 256);
    Recorded merge(stream_, [&] {
        check(launch(copy_floats, blocks, 256, 0, stream_, there, x.data<float>(), n), "cannot start work");
        check(launch(copy_floats, blocks, 256, 0, stream_, x.data<float>(), there + n, n), "cannot start work");
        check(launch(signal, 1, WARP, 0, stream_, count.data<uint64_t>(), seen), "cannot start work");
    });
    uint64_t n_told = 0;
    return median_seconds([&] {
        constexpr int REPEATS = 20;
        return seconds_of([&] {
                   for (int r = 0; r < REPEATS; r++) {
                       merge.start(stream_);
                       wait_for_signal(seen, ++n_told, stream_);
                   }
               }) /
               REPEATS;
    });
}

}  // namespace

// The driver answers, a card is there, and its context is made: what that takes is measured before and after.
Device* open_device() {
    setenv("CUDA_MODULE_LOADING", "EAGER", 0);  // kernels come with the context, and count as it does
    int n_cards = 0;
    cudaError_t error = cudaGetDeviceCount(&n_cards);
    if (error == cudaErrorInsufficientDriver)
        throw Error(PI_ERROR_UNSUPPORTED, "no driver of a card, or one older than this engine's CUDA part needs");
    if (error == cudaErrorNoDevice || (error == cudaSuccess && n_cards == 0))
        throw Error(PI_ERROR_UNSUPPORTED, "expected a card that runs CUDA, found none");
    check(error, "cannot be asked for");
    choose_card();
    static const CardContext context(FIRST);  // the context is made once, for all models of this program
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, FIRST), "cannot be asked for");
    DeviceInfo info{.name = properties.name, .context = context.bytes()};
    if (!context.measured()) info.name += " (context estimated)";
    return new CudaDevice(info, static_cast<uint32_t>(properties.multiProcessorCount));
}

}  // namespace pi::card

extern "C" PI_API pi::Device* pi_cuda_device(uint32_t shared_headers) {
    if (shared_headers != PI_SHARED_HEADERS)
        throw pi::Error(PI_ERROR_MISMATCH,
                        "the CUDA part was made of other sources than the engine: rebuild it (make native CUDA=1)");
    return pi::card::open_device();
}
