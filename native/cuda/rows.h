// Rows of weights as they lie on the card: each starts at 16 bytes, and those of Q8_0 and Q4_0 have all their quants
// first, then their scales, so that a warp's 16-byte loads lie side by side. What a row takes is what it takes in the
// file, rounded up. What is beyond the last element is 0.
#pragma once

#include "cuda_api.h"
#include "model.h"

namespace pi::card {

constexpr uint32_t WARP = 32;
constexpr uint32_t ALL = 0xffffffffu;  // lanes
constexpr uint32_t PIECE_BYTES = 16;   // what a lane loads in one go

// pi::Rows, for kernels.
struct CardRows {
    Type type = Type::F32;
    uint32_t n = 0;
    uint64_t stride = 0;
    const uint8_t* data = nullptr;
    __device__ __forceinline__ const uint8_t* row(uint64_t i) const { return data + i * stride; }
};

// 32 elements of a vector, quantised as Ops::quantize_x8 does.
struct X8Block {
    float d;
    int32_t sum;  // of q
};

// A vector in both forms that rows meet. Room and zeros up to a multiple of 32 elements.
template <class Float, class Byte, class Block>
struct AnyVec {
    Float* f;
    Byte* q;
    Block* blocks;
};
using Vec = AnyVec<const float, const int8_t, const X8Block>;
using MutableVec = AnyVec<float, int8_t, X8Block>;

// Elements in a piece of a row.
template <Type T>
constexpr uint32_t PER_PIECE = T == Type::F32    ? 4
                               : T == Type::F16  ? 8
                               : T == Type::Q8_0 ? 16
                                                 : 32;

// f(the type as a constant), once for each type a row may have.
#define PI_FOR_TYPE(type, f) \
    switch (type) {          \
        case Type::F32:      \
            f(Type::F32);    \
            break;           \
        case Type::F16:      \
            f(Type::F16);    \
            break;           \
        case Type::Q8_0:     \
            f(Type::Q8_0);   \
            break;           \
        default:             \
            f(Type::Q4_0);   \
            break;           \
    }

__device__ __forceinline__ float low_half(unsigned two) {
    const uint16_t bits = uint16_t(two);
    __half h;
    memcpy(&h, &bits, 2);
    return __half2float(h);
}
__device__ __forceinline__ float high_half(unsigned two) { return low_half(two >> 16); }

__device__ __forceinline__ float as_float(unsigned bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Weights are read once: they pass through the caches without driving the vectors out.
__device__ __forceinline__ uint4 load_weights(const uint8_t* p) { return __ldcs(reinterpret_cast<const uint4*>(p)); }

template <Type T>
constexpr bool HAS_SCALES = T == Type::Q8_0 || T == Type::Q4_0;

// The scale of piece p of a row of n elements, as it lies there.
template <Type T>
__device__ __forceinline__ __half half_scale_of(const uint8_t* row, uint32_t n, uint32_t p) {
    const auto* scales = reinterpret_cast<const __half*>(row + (T == Type::Q8_0 ? n : n / 2));
    return __ldg(scales + (T == Type::Q8_0 ? p / 2 : p));
}

template <Type T>
__device__ __forceinline__ float scale_of(const uint8_t* row, uint32_t n, uint32_t p) {
    if constexpr (HAS_SCALES<T>) return __half2float(half_scale_of<T>(row, n, p));
    return 1.0f;
}

// Quants of a word, 4 of Q4_0's nibbles each in a byte: elements k and k + 16 of a block are in one byte.
__device__ __forceinline__ int low_nibbles(unsigned word) { return int(word & 0x0f0f0f0fu); }
__device__ __forceinline__ int high_nibbles(unsigned word) { return int(word >> 4 & 0x0f0f0f0fu); }

// Piece p of a row . the same elements of x.   d: its scale
template <Type T>
__device__ __forceinline__ float dot_piece(uint4 w, float d, uint32_t p, const Vec& x) {
    if constexpr (T == Type::F32) {
        const float4 a = __ldg(reinterpret_cast<const float4*>(x.f) + p);
        return as_float(w.x) * a.x + as_float(w.y) * a.y + as_float(w.z) * a.z + as_float(w.w) * a.w;
    } else if constexpr (T == Type::F16) {
        const float4 a = __ldg(reinterpret_cast<const float4*>(x.f) + 2 * p);
        const float4 b = __ldg(reinterpret_cast<const float4*>(x.f) + 2 * p + 1);
        return low_half(w.x) * a.x + high_half(w.x) * a.y + low_half(w.y) * a.z + high_half(w.y) * a.w +
               low_half(w.z) * b.x + high_half(w.z) * b.y + low_half(w.w) * b.z + high_half(w.w) * b.w;
    } else if constexpr (T == Type::Q8_0) {
        const uint4 q = __ldg(reinterpret_cast<const uint4*>(x.q) + p);
        int sum = __dp4a(int(w.x), int(q.x), 0);
        sum = __dp4a(int(w.y), int(q.y), sum);
        sum = __dp4a(int(w.z), int(q.z), sum);
        sum = __dp4a(int(w.w), int(q.w), sum);
        return d * __ldg(&x.blocks[p / 2].d) * float(sum);
    } else {
        const uint4 lo = __ldg(reinterpret_cast<const uint4*>(x.q) + 2 * p);
        const uint4 hi = __ldg(reinterpret_cast<const uint4*>(x.q) + 2 * p + 1);
        const float2 block = __ldg(reinterpret_cast<const float2*>(x.blocks) + p);
        int x_sum;
        memcpy(&x_sum, &block.y, 4);
        int sum = -8 * x_sum;
        sum = __dp4a(low_nibbles(w.x), int(lo.x), __dp4a(high_nibbles(w.x), int(hi.x), sum));
        sum = __dp4a(low_nibbles(w.y), int(lo.y), __dp4a(high_nibbles(w.y), int(hi.y), sum));
        sum = __dp4a(low_nibbles(w.z), int(lo.z), __dp4a(high_nibbles(w.z), int(hi.z), sum));
        sum = __dp4a(low_nibbles(w.w), int(lo.w), __dp4a(high_nibbles(w.w), int(hi.w), sum));
        return d * block.x * float(sum);
    }
}

// Pieces of a row: whole ones, and a last one that zeros fill up.
template <Type T>
__host__ __device__ __forceinline__ uint32_t pieces_of(uint32_t n) {
    return (n + PER_PIECE<T> - 1) / PER_PIECE<T>;
}
inline uint32_t pieces_of(Type type, uint32_t n) {
    return type == Type::F32    ? pieces_of<Type::F32>(n)
           : type == Type::F16  ? pieces_of<Type::F16>(n)
           : type == Type::Q8_0 ? pieces_of<Type::Q8_0>(n)
                                : pieces_of<Type::Q4_0>(n);
}

// A byte as a float: one of 2^23 + byte, less the zero point. Conversions run at a fraction of this rate.
__device__ __forceinline__ float unsigned_byte(unsigned byte, float zero) {
    return as_float(0x4b000000u | byte) - (8388608.0f + zero);
}

// The elements of a piece, before their scale.
template <Type T>
__device__ __forceinline__ void expand_piece(uint4 w, float* out) {
    const unsigned words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (T == Type::F32) {
            out[i] = as_float(words[i]);
        } else if constexpr (T == Type::F16) {
            out[2 * i] = low_half(words[i]);
            out[2 * i + 1] = high_half(words[i]);
        } else {
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const unsigned byte = words[i] >> 8 * b & 255;
                if constexpr (T == Type::Q8_0) {
                    out[4 * i + b] = unsigned_byte(byte ^ 128, 128);
                } else {
                    out[4 * i + b] = unsigned_byte(byte & 15, 8);
                    out[4 * i + b + 16] = unsigned_byte(byte >> 4, 8);
                }
            }
        }
    }
}

// ---- sums in a warp, the same in every lane

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (uint32_t with = WARP / 2; with > 0; with /= 2) x += __shfl_xor_sync(ALL, x, with);
    return x;
}

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
    for (uint32_t with = WARP / 2; with > 0; with /= 2) x += __shfl_xor_sync(ALL, x, with);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (uint32_t with = WARP / 2; with > 0; with /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, with));
    return x;
}

// row . x, by a whole warp. Four pieces a lane are on their way at a time: memory answers late.
template <Type T>
__device__ __forceinline__ float dot_row(const uint8_t* row, uint32_t n, const Vec& x, uint32_t lane) {
    constexpr uint32_t AT_ONCE = 4;
    const uint32_t n_pieces = pieces_of<T>(n);
    float sum = 0;
    uint32_t p = lane;
    for (; p + (AT_ONCE - 1) * WARP < n_pieces; p += AT_ONCE * WARP) {
        uint4 w[AT_ONCE];
        float d[AT_ONCE];
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) {
            w[i] = load_weights(row + (p + i * WARP) * PIECE_BYTES);
            d[i] = scale_of<T>(row, n, p + i * WARP);
        }
#pragma unroll
        for (uint32_t i = 0; i < AT_ONCE; i++) sum += dot_piece<T>(w[i], d[i], p + i * WARP, x);
    }
    for (; p < n_pieces; p += WARP)
        sum += dot_piece<T>(load_weights(row + p * PIECE_BYTES), scale_of<T>(row, n, p), p, x);
    return warp_sum(sum);
}

__device__ __forceinline__ float dot_row(const CardRows& rows, uint64_t i, const Vec& x, uint32_t lane) {
    float sum = 0;
#define PI_DOT(T) sum = dot_row<T>(rows.row(i), rows.n, x, lane)
    PI_FOR_TYPE(rows.type, PI_DOT)
#undef PI_DOT
    return sum;
}

// ---- vectors

// Writes elements e of a vector, one a lane, e % 32 = lane, in both forms. Only by whole warps.
__device__ __forceinline__ void put(const MutableVec& out, uint32_t e, float value) {
    out.f[e] = value;
    if (!out.q) return;
    const float most = warp_max(fabsf(value));
    const bool finite = __ballot_sync(ALL, isfinite(value)) == ALL;
    const float inverse = finite && most >= X8_TINY ? 127 / most : 0;
    const int q = finite ? int(rintf(value * inverse)) : 0;
    const int sum = warp_sum(q);
    out.q[e] = int8_t(q);
    if (e % WARP == 0) out.blocks[e / WARP] = {finite ? (inverse > 0 ? most / 127 : 0.0f) : nanf(""), sum};
}

// The block's threads' values summed in a fixed order; the same for every thread. At most 1024 threads.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[WARP];
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = warp_sum(x);
    __syncthreads();  // sums may still be read
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < blockDim.x / WARP ? sums[lane] : 0.0f);
}

__device__ __forceinline__ float block_max(float x) {
    __shared__ float most[WARP];
    const uint32_t lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) most[warp] = x;
    __syncthreads();
    return warp_max(lane < blockDim.x / WARP ? most[lane] : -INFINITY);
}

}  // namespace pi::card
