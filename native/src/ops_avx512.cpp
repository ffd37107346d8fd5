// What AVX-512 with VNNI does better than AVX2. Compiled with those flags, alone, as ops_avx2.cpp is, and for the same
// reason: nothing here may run before avx512() has asked the processor.
#include "ops.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)

#include <immintrin.h>
#include <string.h>

#if !defined(__clang__)  // GCC 12 takes the undefined vectors in its own header for a fault
#pragma GCC diagnostic ignored "-Wuninitialized"
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

// 32 quantised elements as bytes.
struct Q4_0Block {
    static __m256i bytes(const uint8_t* block) {
        const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 2));
        const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(q), _mm_srli_epi16(q, 4), 1);
        return _mm256_sub_epi8(_mm256_and_si256(both, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
    }
};
struct Q8_0Block {
    static __m256i bytes(const uint8_t* block) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 2));
    }
};

// The line `bytes` on, which may be beyond the end.
[[gnu::always_inline]] inline void prefetch_far(const uint8_t* p, size_t bytes) {
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + bytes), _MM_HINT_T1);
}

// values[i] = row i, i < n, of 32 elements; the largest magnitudes of each column as integers, Inf and NaN above all.
template <class Block>
void unpack_block(size_t n, const uint8_t* rows, size_t stride, float values[QK][QK], __m512i max[VECTORS]) {
    PI_UNROLL for (size_t v = 0; v < VECTORS; v++) max[v] = _mm512_setzero_si512();
    for (size_t i = 0; i < n; i++, rows += stride) {
        prefetch_far(rows, 24 * stride);
        uint16_t half;
        memcpy(&half, rows, 2);
        const __m512 d = _mm512_set1_ps(_cvtsh_ss(half));
        const __m256i bytes = Block::bytes(rows);
        const __m128i part[VECTORS] = {_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)};
        PI_UNROLL for (size_t v = 0; v < VECTORS; v++) {
            const __m512 w = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part[v])));
            const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(w), _mm512_set1_epi32(0x7fffffff));
            max[v] = _mm512_max_epi32(max[v], magnitude);
            _mm512_storeu_ps(values[i] + v * LANES, w);
        }
    }
    memset(values[n], 0, (QK - n) * sizeof(values[0]));
}

// Four rows of 16 columns as bytes, a column's four side by side, + 128.
__m512i pack_four(const float* values, __m512 inverse) {
    const __m512i by_column = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13,  //
                                                                   2, 6, 10, 14, 3, 7, 11, 15));
    __m512i q[4];
    PI_UNROLL for (size_t i = 0; i < 4; i++) q[i] =
        _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values + i * QK), inverse));
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    return _mm512_xor_si512(_mm512_shuffle_epi8(bytes, by_column), _mm512_set1_epi8(-128));
}

// One block of 16 columns from j on.
void pack_rounded(const float values[QK][QK], __m512i max_bits, size_t j, Packed8& packed) {
    const __m512 max = _mm512_castsi512_ps(max_bits), limit = _mm512_set1_ps(127);
    const __mmask16 finite = _mm512_cmp_ps_mask(max, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    const __mmask16 some = _mm512_cmp_ps_mask(max, _mm512_set1_ps(X8_TINY), _CMP_GE_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(finite & some, limit, max);
    const __m512 d = _mm512_maskz_div_ps(some, max, limit);
    _mm512_storeu_ps(packed.d + j, _mm512_mask_blend_ps(finite, _mm512_set1_ps(__builtin_nanf("")), d));
    for (size_t k = 0; k < QK / 4; k++) _mm512_storeu_si512(packed.q[k][j], pack_four(values[k * 4] + j, inverse));
}

template <class Block>
void pack_columns(size_t n_rows, const uint8_t* rows, size_t stride, Packed8* packed) {
    for (size_t i = 0; i < n_rows; i += QK, packed++) {
        float values[QK][QK];
        __m512i max[VECTORS];
        unpack_block<Block>(n_rows - i < QK ? n_rows - i : QK, rows + i * stride, stride, values, max);
        for (size_t v = 0; v < VECTORS; v++) pack_rounded(values, max[v], v * LANES, *packed);
    }
}

void pack_columns8(Type type, size_t n_rows, const uint8_t* rows, size_t stride, Packed8* packed) {
    if (type == Type::Q4_0) return pack_columns<Q4_0Block>(n_rows, rows, stride, packed);
    pack_columns<Q8_0Block>(n_rows, rows, stride, packed);
}

Ops override_some(Ops table) {
    table.name = "avx512";
    table.gemm_tile = gemm_tile;
    table.gemm8 = gemm8;
    table.pack_columns8 = pack_columns8;
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
