// What AVX-512 with VNNI does better than AVX2. Compiled with those flags, alone, as ops_avx2.cpp is, and for the same
// reason: nothing here may run before avx512() has asked the processor.
#include "ops.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)

#include <immintrin.h>
#include <string.h>

#if !defined(__clang__)  // GCC 12 takes the undefined vectors in its own header for a fault
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace pi {
namespace {

constexpr size_t LANES = 16;

// Arrays of vectors stay in registers only where the loops over them are unrolled.
#if defined(__clang__)
#define PI_UNROLL _Pragma("unroll")
#else
#define PI_UNROLL _Pragma("GCC unroll 16")
#endif

// ---- matrix-matrix

// R rows of x against one packed tile, a vector wide: R sums in registers, each a chain over k.
template <size_t R>
void gemm_rows(size_t n_k, const float* x, size_t ldx, const float* packed, float* c, size_t ldc, bool accumulate) {
    static_assert(TILE_ROWS == LANES);
    __m512 sum[R];
    PI_UNROLL for (size_t r = 0; r < R; r++) sum[r] = accumulate ? _mm512_loadu_ps(c + r * ldc) : _mm512_setzero_ps();
    for (size_t k = 0; k < n_k; k++) {
        const __m512 w = _mm512_loadu_ps(packed + k * LANES);
        PI_UNROLL for (size_t r = 0; r < R; r++) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * ldx + k]), w, sum[r]);
    }
    PI_UNROLL for (size_t r = 0; r < R; r++) _mm512_storeu_ps(c + r * ldc, sum[r]);
}

void gemm_tile(size_t n_t, size_t n_k, const float* x, size_t ldx, const float* packed, float* c, size_t ldc,
               bool accumulate) {
    const auto part = [&](auto rows, size_t count) {
        for (; n_t >= count; n_t -= count, x += count * ldx, c += count * ldc)
            rows(n_k, x, ldx, packed, c, ldc, accumulate);
    };
    part(gemm_rows<12>, 12);
    part(gemm_rows<4>, 4);
    part(gemm_rows<1>, 1);
}

// ---- matrix-matrix in 8 bits

constexpr size_t VECTORS = TILE8_ROWS / LANES;

// R tokens against a tile: the sums of whole numbers and those over blocks both stay in registers.
template <int ZERO, size_t R>
void gemm8_tokens(size_t n_b, const BatchX8* x, size_t ldx, const Packed8* packed, float* c, size_t ldc,
                  bool accumulate) {
    __m512 sum[R][VECTORS];
    PI_UNROLL for (size_t r = 0; r < R; r++) {
        PI_UNROLL for (size_t v = 0; v < VECTORS; v++) sum[r][v] =
            accumulate ? _mm512_loadu_ps(c + r * ldc + v * LANES) : _mm512_setzero_ps();
    }
    for (size_t b = 0; b < n_b; b++, x++, packed++) {
        __m512i whole[R][VECTORS];
        PI_UNROLL for (size_t r = 0; r < R; r++) {
            const __m512i minus8 = _mm512_set1_epi32(x[r * ldx].minus8);
            const __m512i minus = ZERO == 8 ? minus8 : _mm512_slli_epi32(minus8, 4);
            PI_UNROLL for (size_t v = 0; v < VECTORS; v++) whole[r][v] = minus;
        }
        PI_UNROLL for (size_t k = 0; k < QK / 4; k++) {
            __m512i w[VECTORS];
            PI_UNROLL for (size_t v = 0; v < VECTORS; v++) w[v] = _mm512_loadu_si512(packed->q[k][v * LANES]);
            PI_UNROLL for (size_t r = 0; r < R; r++) {
                int32_t four;
                memcpy(&four, x[r * ldx].q + k * 4, 4);
                const __m512i xk = _mm512_set1_epi32(four);
                PI_UNROLL for (size_t v = 0; v < VECTORS; v++) whole[r][v] = _mm512_dpbusd_epi32(whole[r][v], w[v], xk);
            }
        }
        PI_UNROLL for (size_t v = 0; v < VECTORS; v++) {
            const __m512 d = _mm512_loadu_ps(packed->d + v * LANES);
            PI_UNROLL for (size_t r = 0; r < R; r++) {
                const __m512 dd = _mm512_mul_ps(d, _mm512_set1_ps(x[r * ldx].d));
                sum[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r][v]), dd, sum[r][v]);
            }
        }
    }
    PI_UNROLL for (size_t r = 0; r < R; r++) {
        PI_UNROLL for (size_t v = 0; v < VECTORS; v++) _mm512_storeu_ps(c + r * ldc + v * LANES, sum[r][v]);
    }
}

template <int ZERO>
void gemm8_all(size_t n_t, size_t n_b, const BatchX8* x, size_t ldx, const Packed8* packed, float* c, size_t ldc,
               bool accumulate) {
    const auto part = [&](auto tokens, size_t count) {
        for (; n_t >= count; n_t -= count, x += count * ldx, c += count * ldc)
            tokens(n_b, x, ldx, packed, c, ldc, accumulate);
    };
    part(gemm8_tokens<ZERO, 6>, 6);
    part(gemm8_tokens<ZERO, 4>, 4);
    part(gemm8_tokens<ZERO, 2>, 2);
    part(gemm8_tokens<ZERO, 1>, 1);
}

void gemm8(int zero, size_t n_t, size_t n_b, const BatchX8* x, size_t ldx, const Packed8* packed, float* c, size_t ldc,
           bool accumulate) {
    if (zero == 8) return gemm8_all<8>(n_t, n_b, x, ldx, packed, c, ldc, accumulate);
    gemm8_all<128>(n_t, n_b, x, ldx, packed, c, ldc, accumulate);
}

Ops override_some(Ops table) {
    table.name = "avx512";
    table.gemm_tile = gemm_tile;
    table.gemm8 = gemm8;
    return table;
}

}  // namespace

Ops (*const with_avx512)(Ops) = override_some;

}  // namespace pi

#else

namespace pi {
Ops (*const with_avx512)(Ops) = nullptr;
}

#endif
