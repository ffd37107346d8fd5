// What AVX-512 with VNNI does better than AVX2. Compiled with those flags, alone, as ops_avx2.cpp is, and for the same
// reason: nothing here may run before avx512() has asked the processor.
#include "ops.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)

#include <immintrin.h>
#include <string.h>

#include "ops_rows.h"

#if !defined(__clang__)  // GCC 12 takes the undefined vectors in its own header for a fault
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace pi {
namespace {

constexpr size_t LANES = 16;

// ---- rows: what reads memory faster than AVX2's; other types keep AVX2's

__m512i load_16x4(const uint8_t* const* rows, size_t offset) {
    __m512i w = _mm512_castsi128_si512(load_16(rows[0] + offset));
    w = _mm512_inserti32x4(w, load_16(rows[1] + offset), 1);
    w = _mm512_inserti32x4(w, load_16(rows[2] + offset), 2);
    return _mm512_inserti32x4(w, load_16(rows[3] + offset), 3);
}

// Rows go in fours, one in each quarter of a register. The weights stay unsigned (0 .. 15); the 8 that they are too
// large by leaves at the end, through the sums of x.
struct Q4_0Rows {
    static constexpr size_t WIDE = 8;
    static size_t bytes(size_t n) { return n / QK * sizeof(BlockQ4_0); }

    // R = 2: both rows twice.
    template <size_t R>
    static void dot(size_t n, const uint8_t* const* rows, const uint8_t* const* later, Vector x, float* out) {
        static_assert(R == 8 || R == 2);
        constexpr size_t FOURS = R == 8 ? 2 : 1;
        const uint8_t* all[8];
        for (size_t r = 0; r < 8; r++) all[r] = rows[r % R];
        __m512 acc[FOURS];
        __m256 excess = _mm256_setzero_ps();
        PI_UNROLL for (size_t f = 0; f < FOURS; f++) acc[f] = _mm512_setzero_ps();
        prefetch_end<R>(later, bytes(n));
        for (size_t b = 0; b < n / QK; b++) {
            const size_t offset = b * sizeof(BlockQ4_0);
            prefetch<R>(later, offset, sizeof(BlockQ4_0));
            const __m256 d = block_scales<FOURS * 4>(all, offset);
            const __m512 dd = _mm512_castps256_ps512(_mm256_mul_ps(d, _mm256_set1_ps(x.q8[b].d)));
            excess = _mm256_fmadd_ps(d, _mm256_set1_ps(x.q8[b].sum), excess);
            PI_UNROLL for (size_t f = 0; f < FOURS; f++) {
                const __m512i first = _mm512_set1_epi32(int32_t(f * 4));
                const __m512i quarter = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
                const __m512 spread = _mm512_permutexvar_ps(_mm512_add_epi32(quarter, first), dd);
                const __m512i whole = block_dot(load_16x4(all + f * 4, offset + 2), x.q8[b]);
                acc[f] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), spread, acc[f]);
            }
        }
        const __m256 sums = sum_quarters(acc[0], acc[FOURS - 1]);
        float every[8];
        _mm256_storeu_ps(every, _mm256_fnmadd_ps(_mm256_set1_ps(8), excess, sums));
        memcpy(out, every, R * sizeof(float));
    }

    static __m512i block_dot(__m512i w, const BlockX8& x) {
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i low = _mm512_broadcast_i32x4(load_16(x.q)), high = _mm512_broadcast_i32x4(load_16(x.q + QK / 2));
        const __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_and_si512(w, nibble), low);
        return _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble), high);
    }

    // Each quarter's (p0 + p1) + (p2 + p3), of a and then of b.
    static __m256 sum_quarters(__m512 a, __m512 b) {
        a = _mm512_add_ps(a, _mm512_permute_ps(a, 0xb1));
        b = _mm512_add_ps(b, _mm512_permute_ps(b, 0xb1));
        a = _mm512_add_ps(a, _mm512_permute_ps(a, 0x4e));
        b = _mm512_add_ps(b, _mm512_permute_ps(b, 0x4e));
        const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
        return _mm512_castps512_ps256(_mm512_permutex2var_ps(a, firsts, b));
    }
};

void matvec(Type type, size_t n, const uint8_t* rows, size_t stride, size_t n_rows, Vector x, float* out) {
    if (type != Type::Q4_0) return avx2_table->matvec(type, n, rows, stride, n_rows, x, out);
    dot_rows<Q4_0Rows>(n, n_rows, AllRows{rows, stride}, x, out);
}

void matvec_picked(Type type, size_t n, const uint8_t* rows, size_t stride, const uint32_t* ids, size_t n_ids,
                   const uint8_t* then, Vector x, float* out) {
    if (type != Type::Q4_0) return avx2_table->matvec_picked(type, n, rows, stride, ids, n_ids, then, x, out);
    dot_rows<Q4_0Rows>(n, n_ids, PickedRows{rows, stride, ids, n_ids, then}, x, out);
}

struct Q4_0Block {
    static constexpr size_t BYTES = sizeof(BlockQ4_0);
    static void unpack(const uint8_t* block, __m512 out[2]) {
        const __m512 value = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        const __m512i q = _mm512_cvtepu8_epi32(load_16(block + 2));
        out[0] = _mm512_permutexvar_ps(q, value);  // looks at the low four bits alone
        out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), value);
    }
};

struct Q8_0Block {
    static constexpr size_t BYTES = sizeof(BlockQ8_0);
    static void unpack(const uint8_t* block, __m512 out[2]) {
        out[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16(block + 2)));
        out[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16(block + 2 + LANES)));
    }
};

// As AVX2's: R rows at once, acc read and written once for them all, the sums in the order of the rows.
template <class Block>
struct AddBlocks {
    static size_t bytes(size_t n) { return n / QK * Block::BYTES; }

    template <size_t R>
    [[gnu::noinline]] static void add(size_t n, const uint8_t* const* rows, const uint8_t* const* later, const float* h,
                                      float* acc) {
        float some[8] = {};
        memcpy(some, h, R * sizeof(float));
        const __m256 weights = _mm256_loadu_ps(some);
        prefetch_end<R>(later, bytes(n));
        size_t j = 0;
        for (; j + 2 * QK <= n; j += 2 * QK) step<R, 2>(j, rows, later, weights, acc);
        for (; j < n; j += QK) step<R, 1>(j, rows, later, weights, acc);
    }

    // Columns [j, j + 32 N).
    template <size_t R, size_t N>
    [[gnu::always_inline]] static void step(size_t j, const uint8_t* const* rows, const uint8_t* const* later,
                                            __m256 weights, float* acc) {
        const size_t offset = j / QK * Block::BYTES;
        float hd[N][8];
        __m512 a[N][2], w[2];
        PI_UNROLL for (size_t b = 0; b < N; b++) {
            prefetch<R>(later, offset + b * Block::BYTES, Block::BYTES);
            _mm256_storeu_ps(hd[b], _mm256_mul_ps(weights, block_scales<R>(rows, offset + b * Block::BYTES)));
            PI_UNROLL for (size_t e = 0; e < 2; e++) a[b][e] = _mm512_loadu_ps(acc + j + b * QK + e * LANES);
        }
        PI_UNROLL for (size_t r = 0; r < R; r++) {
            PI_UNROLL for (size_t b = 0; b < N; b++) {
                Block::unpack(rows[r] + offset + b * Block::BYTES, w);
                const __m512 hr = _mm512_set1_ps(hd[b][r]);
                PI_UNROLL for (size_t e = 0; e < 2; e++) a[b][e] = _mm512_fmadd_ps(hr, w[e], a[b][e]);
            }
        }
        PI_UNROLL for (size_t b = 0; b < N; b++) {
            PI_UNROLL for (size_t e = 0; e < 2; e++) _mm512_storeu_ps(acc + j + b * QK + e * LANES, a[b][e]);
        }
    }
};

void add_rows(Type type, size_t n, const uint8_t* rows, size_t stride, const uint32_t* ids, const float* h,
              size_t n_ids, const uint8_t* then, float* acc) {
    const PickedRows walk{rows, stride, ids, n_ids, then};
    switch (type) {
        case Type::Q4_0:
            return add_rows<AddBlocks<Q4_0Block>>(n, n_ids, walk, h, true, acc);
        case Type::Q8_0:
            return add_rows<AddBlocks<Q8_0Block>>(n, n_ids, walk, h, true, acc);
        default:
            return avx2_table->add_rows(type, n, rows, stride, ids, h, n_ids, then, acc);
    }
}

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
    table.matvec = matvec;
    table.matvec_picked = matvec_picked;
    table.add_rows = add_rows;
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
