// CUDA's language and runtime, or in tests their emulation on the processor (tests/cuda_emulation.h).
#pragma once

#if !defined(__CUDACC__)
#include "cuda_emulation.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <tuple>
#include <utility>

namespace pi::card {

// kernel<<<grid, block, shared, stream>>>(args...), in a form that other compilers read, too.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A... args) {
    std::tuple<P...> values(args...);
    return std::apply(
        [&](P&... value) {
            void* pointers[] = {&value...};
            return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared, stream);
        },
        values);
}

__device__ __forceinline__ void* dynamic_shared() {
    extern __shared__ __align__(128) uint4 memory[];
    return memory;
}

}  // namespace pi::card
#endif
