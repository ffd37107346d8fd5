// CUDA on the processor, for tests: what native/cuda uses of the language and of the runtime. The threads of a block
// are fibers that change where they wait for one another, blocks run one after the other, and a stream is the caller.
// Stricter than a card: a barrier that some threads of a block never reach ends the program, and a kernel fails that is
// started by a thread that has chosen no card.
#pragma once

#include <math.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

// ---- types

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct __half {
    uint16_t bits;
};
inline float __half2float(__half h) { return pi::f16_to_f32(h.bits); }
inline __half __float2half_rn(float f) { return {pi::f32_to_f16(f)}; }

namespace emulation {

// ---- the threads of a block

struct Thread {
    dim3 thread, block, block_dim, grid_dim;
    unsigned warp, lane;
};
Thread& current();
void wait_for_block();
void wait_for_warp();
uint64_t exchange(uint64_t value, unsigned from_lane);  // among the lanes of a warp
unsigned ballot(bool vote);
int count_in_block(bool vote);
void* dynamic_shared();
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);

}  // namespace emulation

#define threadIdx (::emulation::current().thread)
#define blockIdx (::emulation::current().block)
#define blockDim (::emulation::current().block_dim)
#define gridDim (::emulation::current().grid_dim)

inline void __syncthreads() { emulation::wait_for_block(); }
inline int __syncthreads_count(int vote) { return emulation::count_in_block(vote != 0); }
inline void __syncwarp() { emulation::wait_for_warp(); }
inline unsigned __ballot_sync(unsigned, int vote) { return emulation::ballot(vote != 0); }
template <class T>
T __shfl_sync(unsigned, T value, unsigned from) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = emulation::exchange(bits, from);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned with) {
    return __shfl_sync(mask, value, emulation::current().lane ^ with);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
    unsigned lane = emulation::current().lane;
    return __shfl_sync(mask, value, lane < by ? lane : lane - by);
}
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += int8_t(unsigned(a) >> 8 * i) * int8_t(unsigned(b) >> 8 * i);
    return c;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline void __threadfence() {}
inline void __threadfence_system() {}
template <class T>
T atomicAdd(T* p, T value) {
    return std::exchange(*p, *p + value);
}
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

// ---- tensor cores: a warp's first lane holds and computes the fragments

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
    float at[16][16];
};
template <class F>
void in_first_lane(F&& f) {
    emulation::wait_for_warp();
    if (emulation::current().lane == 0) f();
    emulation::wait_for_warp();
}
template <class Fragment>
void fill_fragment(Fragment& a, float value) {
    for (auto& row : a.at)
        for (float& x : row) x = value;
}
inline float number(float x) { return x; }
inline float number(__half x) { return __half2float(x); }
template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& a, const T* p, unsigned ld) {
    in_first_lane([&] {
        for (unsigned i = 0; i < 16; i++)
            for (unsigned j = 0; j < 16; j++)
                a.at[i][j] = number(p[std::is_same_v<Layout, col_major> ? j * ld + i : i * ld + j]);
    });
}
template <class Fragment>
void load_matrix_sync(Fragment& a, const float* p, unsigned ld, layout_t) {
    in_first_lane([&] {
        for (unsigned i = 0; i < 16; i++) std::memcpy(a.at[i], p + i * ld, sizeof(a.at[i]));
    });
}
template <class Fragment>
void store_matrix_sync(float* p, const Fragment& a, unsigned ld, layout_t) {
    in_first_lane([&] {
        for (unsigned i = 0; i < 16; i++) std::memcpy(p + i * ld, a.at[i], sizeof(a.at[i]));
    });
}
template <class C, class A, class B>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
    in_first_lane([&] {
        C sum = c;
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 16; k++)
                for (int j = 0; j < 16; j++) sum.at[i][j] += a.at[i][k] * b.at[k][j];
        d = sum;
    });
}

}  // namespace nvcuda::wmma

// ---- the runtime

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorLaunchFailure = 719
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
constexpr unsigned cudaStreamNonBlocking = 1, cudaHostAllocMapped = 2, cudaEventDisableTiming = 2;
constexpr unsigned cudaHostAllocDefault = 0;

namespace emulation {

struct Stream;
struct Event {
    std::chrono::steady_clock::time_point at;
};
using Graph = std::vector<std::function<void()>>;
void enqueue(Stream* stream, std::function<void()> work);
bool card_chosen();  // by this thread

}  // namespace emulation

using cudaStream_t = emulation::Stream*;
using cudaEvent_t = emulation::Event*;
using cudaGraph_t = emulation::Graph*;
using cudaGraphExec_t = emulation::Graph*;
struct cudaDeviceProp {
    char name[256];
    int multiProcessorCount, major, minor;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* n);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device);
cudaError_t cudaDeviceGetPCIBusId(char* out, int n, int device);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaMalloc(void** out, size_t n);
cudaError_t cudaFree(void* p);
cudaError_t cudaHostAlloc(void** out, size_t n, unsigned flags);
cudaError_t cudaFreeHost(void* p);
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to);
cudaError_t cudaEventDestroy(cudaEvent_t event);

namespace pi::card {

// As cuda_api.h has it for a card.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A... args) {
    if (!emulation::card_chosen()) return cudaErrorInvalidResourceHandle;
    emulation::enqueue(stream, [=, values = std::tuple<P...>(args...)] {
        emulation::run(grid, block, shared, [&] { std::apply(kernel, values); });
    });
    return cudaSuccess;
}

inline void* dynamic_shared() { return emulation::dynamic_shared(); }

}  // namespace pi::card
