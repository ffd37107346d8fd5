// The operations with AVX2, FMA and F16C. Compiled with -mavx2 -mfma -mf16c, alone: so it includes no header whose
// inline functions another file might share, and nothing here may run before avx2() has asked the processor.
#include "ops.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "ops_rows.h"

namespace pi {
namespace {

constexpr size_t LANES = 8;

// GCC turns chains of whole sums into trees, for which there are too few registers, where the loop around those is
// unrolled, too: so that one goes two by two.
#if defined(__clang__)
#define PI_UNROLL_2 _Pragma("unroll 2")
#else
#define PI_UNROLL_2 _Pragma("GCC unroll 2")
#endif

// (p0 + p1) + (p2 + p3) of each half.
__m256 sum_halves(__m256 v) {
    v = _mm256_hadd_ps(v, v);
    return _mm256_hadd_ps(v, v);
}

float low_half(__m256 v) { return _mm256_cvtss_f32(v); }
float high_half(__m256 v) { return _mm_cvtss_f32(_mm256_extractf128_ps(v, 1)); }

float sum(__m256 v) {
    v = sum_halves(v);
    return low_half(v) + high_half(v);
}

// Up to 7 floats, the rest 0.
__m256 load_tail(const float* x, size_t n) {
    float all[LANES] = {};
    memcpy(all, x, n * sizeof(float));
    return _mm256_loadu_ps(all);
}

void store_tail(float* x, size_t n, __m256 v) {
    float all[LANES];
    _mm256_storeu_ps(all, v);
    memcpy(x, all, n * sizeof(float));
}

// ---- rows of floats

struct F32 {
    static constexpr size_t BYTES = 4;
    static __m256 load(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};

struct F16 {
    static constexpr size_t BYTES = 2;
    static __m256 load(const uint8_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
};

// Up to 7 elements, the rest 0.
template <class Format>
__m256 load_tail(const uint8_t* p, size_t n) {
    uint8_t all[LANES * Format::BYTES] = {};
    memcpy(all, p, n * Format::BYTES);
    return Format::load(all);
}

// Dot products of R rows with one x. Two sums a row, for the even and the odd groups of 8.
template <class Format>
struct FloatRows {
    static constexpr size_t WIDE = 4;
    static size_t bytes(size_t n) { return n * Format::BYTES; }

    template <size_t R>
    static void dot(size_t n, const uint8_t* const* rows, const uint8_t* const* later, Vector x, float* out) {
        __m256 even[R], odd[R];
        prefetch_end<R>(later, bytes(n));
        PI_UNROLL for (size_t r = 0; r < R; r++) even[r] = odd[r] = _mm256_setzero_ps();
        size_t k = 0;
        for (; k + 2 * LANES <= n; k += 2 * LANES) {
            const __m256 x0 = _mm256_loadu_ps(x.f + k), x1 = _mm256_loadu_ps(x.f + k + LANES);
            prefetch<R>(later, k * Format::BYTES, 2 * LANES * Format::BYTES);
            PI_UNROLL for (size_t r = 0; r < R; r++) {
                const uint8_t* p = rows[r] + k * Format::BYTES;
                even[r] = _mm256_fmadd_ps(Format::load(p), x0, even[r]);
                odd[r] = _mm256_fmadd_ps(Format::load(p + LANES * Format::BYTES), x1, odd[r]);
            }
        }
        if (k + LANES <= n) {
            const __m256 x0 = _mm256_loadu_ps(x.f + k);
            prefetch_end<R>(later, bytes(n));
            PI_UNROLL for (size_t r = 0; r < R; r++) even[r] =
                _mm256_fmadd_ps(Format::load(rows[r] + k * Format::BYTES), x0, even[r]);
            k += LANES;
        }
        if (k < n) {
            const __m256 x1 = load_tail(x.f + k, n - k);
            PI_UNROLL for (size_t r = 0; r < R; r++) odd[r] =
                _mm256_fmadd_ps(load_tail<Format>(rows[r] + k * Format::BYTES, n - k), x1, odd[r]);
        }
        PI_UNROLL for (size_t r = 0; r < R; r++) out[r] = sum(_mm256_add_ps(even[r], odd[r]));
    }
};

// ---- rows of quantised blocks

__m256i load_32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Lane p of each half, all over that half.
template <size_t P>
__m256 spread(__m256 v) {
    return _mm256_permute_ps(v, P * 0x55);
}

__m256 spread(__m256 v, size_t p) {
    switch (p) {
        case 0:
            return spread<0>(v);
        case 1:
            return spread<1>(v);
        case 2:
            return spread<2>(v);
        default:
            return spread<3>(v);
    }
}

// Rows go in pairs, one in each half of a register: pair p is rows p and p + R / 2. The weights stay unsigned (0 ..
// 15); the 8 that they are too large by leaves at the end, through the sums of x.
struct Q4_0Rows {
    static constexpr size_t WIDE = 8;
    static size_t bytes(size_t n) { return n / QK * sizeof(BlockQ4_0); }

    template <size_t R>
    static __m256 scales(const uint8_t* const* rows, size_t offset) {
        if constexpr (R == LANES) return block_scales<R>(rows, offset);
        static_assert(R == LANES || R == 2);
        const float low = half_to_float(rows[0] + offset), high = half_to_float(rows[R - 1] + offset);
        return _mm256_setr_ps(low, 0, 0, 0, high, 0, 0, 0);
    }

    static __m256i pair_dot(const uint8_t* low_row, const uint8_t* high_row, __m256i x_low, __m256i x_high) {
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i w = _mm256_inserti128_si256(_mm256_castsi128_si256(load_16(low_row)), load_16(high_row), 1);
        const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(w, nibble), x_low);
        const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w, 4), nibble), x_high);
        return _mm256_madd_epi16(_mm256_add_epi16(low, high), _mm256_set1_epi16(1));  // |low + high| <= 4 * 15 * 127
    }

    template <size_t R>
    static void dot(size_t n, const uint8_t* const* rows, const uint8_t* const* later, Vector x, float* out) {
        constexpr size_t PAIRS = R / 2;
        prefetch_end<R>(later, bytes(n));
        __m256 acc[PAIRS], excess = _mm256_setzero_ps();
        PI_UNROLL for (size_t p = 0; p < PAIRS; p++) acc[p] = _mm256_setzero_ps();
        for (size_t b = 0; b < n / QK; b++) {
            const int8_t* xq = x.x8.q + b * QK;
            const size_t offset = b * sizeof(BlockQ4_0);
            prefetch<R>(later, offset, sizeof(BlockQ4_0));
            const __m256 d = scales<R>(rows, offset);
            const __m256 dd = _mm256_mul_ps(d, _mm256_set1_ps(x.x8.d[b]));
            excess = _mm256_fmadd_ps(d, _mm256_set1_ps(x.x8.sum[b]), excess);
            const __m256i x_low = _mm256_broadcastsi128_si256(load_16(xq));
            const __m256i x_high = _mm256_broadcastsi128_si256(load_16(xq + QK / 2));
            PI_UNROLL for (size_t p = 0; p < PAIRS; p++) {
                const __m256i whole = pair_dot(rows[p] + offset + 2, rows[p + PAIRS] + offset + 2, x_low, x_high);
                acc[p] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), spread(dd, p), acc[p]);
            }
        }
        float over[LANES];
        _mm256_storeu_ps(over, excess);
        PI_UNROLL for (size_t p = 0; p < PAIRS; p++) {
            const __m256 sums = sum_halves(acc[p]);
            out[p] = low_half(sums) - 8 * over[p];
            out[p + PAIRS] = high_half(sums) - 8 * over[p + 4];
        }
    }
};

struct Q8_0Rows {
    static constexpr size_t WIDE = 8;
    static size_t bytes(size_t n) { return n / QK * sizeof(BlockQ8_0); }

    template <size_t R>
    static void dot(size_t n, const uint8_t* const* rows, const uint8_t* const* later, Vector x, float* out) {
        prefetch_end<R>(later, bytes(n));
        __m256 acc[R];
        PI_UNROLL for (size_t r = 0; r < R; r++) acc[r] = _mm256_setzero_ps();
        for (size_t b = 0; b < n / QK; b++) {
            const size_t offset = b * sizeof(BlockQ8_0);
            prefetch<R>(later, offset, sizeof(BlockQ8_0));
            const __m256i xq = load_32(x.x8.q + b * QK);
            const __m256 d = _mm256_mul_ps(block_scales<R>(rows, offset), _mm256_set1_ps(x.x8.d[b]));
            const __m256 d_low = _mm256_permute2f128_ps(d, d, 0x00), d_high = _mm256_permute2f128_ps(d, d, 0x11);
            PI_UNROLL for (size_t r = 0; r < R; r++) {
                const __m256i w = load_32(rows[r] + offset + 2);
                // |w| * (x with w's sign); -128 as a weight is 128 unsigned, and 2 * 128 * 127 still fits 16 bits
                const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(xq, w));
                const __m256 whole = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                acc[r] = _mm256_fmadd_ps(whole, spread(r < 4 ? d_low : d_high, r % 4), acc[r]);
            }
        }
        PI_UNROLL for (size_t r = 0; r < R; r++) out[r] = sum(acc[r]);
    }
};

// ---- matvec

template <class Walk>
void dot_rows(Type type, size_t n, size_t n_rows, const Walk& walk, Vector x, float* out) {
    switch (type) {
        case Type::F32:
            return dot_rows<FloatRows<F32>>(n, n_rows, walk, x, out);
        case Type::F16:
            return dot_rows<FloatRows<F16>>(n, n_rows, walk, x, out);
        case Type::Q4_0:
            return dot_rows<Q4_0Rows>(n, n_rows, walk, x, out);
        case Type::Q8_0:
            return dot_rows<Q8_0Rows>(n, n_rows, walk, x, out);
        case Type::I32:
            return;  // never a matrix
    }
}

void matvec(Type type, size_t n, const uint8_t* rows, size_t stride, size_t n_rows, Vector x, float* out) {
    dot_rows(type, n, n_rows, AllRows{rows, stride}, x, out);
}

void matvec_picked(Type type, size_t n, const uint8_t* rows, size_t stride, const uint32_t* ids, size_t n_ids,
                   const uint8_t* then, Vector x, float* out) {
    dot_rows(type, n, n_ids, PickedRows{rows, stride, ids, n_ids, then}, x, out);
}

void matvec_bundles(Type type, size_t n, const uint8_t* bundles, size_t n_parts, size_t n_bundles, Vector x,
                    float* out) {
    dot_rows(type, n, n_bundles * (n_parts - 1), BundleRows{bundles, row_bytes(type, n), n_parts}, x, out);
}

// ---- sums of rows

// R rows at once: acc is read and written once for them all; the sums run in the order of the rows. Several vectors of
// acc in one step, as each is a chain of R multiply-adds that wait for one another. Own functions, for the registers'
// sake.
template <class Format>
struct AddFloats {
    static size_t bytes(size_t n) { return n * Format::BYTES; }

    template <size_t R>
    [[gnu::noinline]] static void add(size_t n, const uint8_t* const* rows, const uint8_t* const* later, const float* h,
                                      float* acc) {
        prefetch_end<R>(later, bytes(n));
        size_t j = 0;
        for (; j + 4 * LANES <= n; j += 4 * LANES) step<R, 4>(j, rows, later, h, acc);
        for (; j + LANES <= n; j += LANES) step<R, 1>(j, rows, later, h, acc);
        if (j == n) return;
        __m256 a = load_tail(acc + j, n - j);
        for (size_t r = 0; r < R; r++)
            a = _mm256_fmadd_ps(_mm256_set1_ps(h[r]), load_tail<Format>(rows[r] + j * Format::BYTES, n - j), a);
        store_tail(acc + j, n - j, a);
    }

    // Columns [j, j + 8 V).
    template <size_t R, size_t V>
    [[gnu::always_inline]] static void step(size_t j, const uint8_t* const* rows, const uint8_t* const* later,
                                            const float* h, float* acc) {
        constexpr size_t BYTES = V * LANES * Format::BYTES;
        constexpr size_t PART = BYTES < 64 ? BYTES : 64;
        PI_UNROLL for (size_t line = 0; line < BYTES; line += 64) prefetch<R>(later, j * Format::BYTES + line, PART);
        __m256 a[V];
        PI_UNROLL for (size_t e = 0; e < V; e++) a[e] = _mm256_loadu_ps(acc + j + e * LANES);
        PI_UNROLL for (size_t r = 0; r < R; r++) {
            const __m256 hr = _mm256_broadcast_ss(h + r);
            PI_UNROLL for (size_t e = 0; e < V; e++) {
                const __m256 w = Format::load(rows[r] + (j + e * LANES) * Format::BYTES);
                a[e] = _mm256_fmadd_ps(hr, w, a[e]);
            }
        }
        PI_UNROLL for (size_t e = 0; e < V; e++) _mm256_storeu_ps(acc + j + e * LANES, a[e]);
    }
};

struct Q4_0Block {
    static constexpr size_t BYTES = sizeof(BlockQ4_0);
    static constexpr float UNIT = 0x1p-28f;  // what the unpacked 1 stands for
    // A nibble with its top bit flipped is q - 8 in two's complement; at the top of a dword, above zeros, it is 2^28 as
    // large, sign and all. (Fewer shifts than bringing it down: they and the conversions share ports.)
    static void unpack(const uint8_t* block, __m256 out[4]) {
        const __m256i first = _mm256_setr_epi8(-1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3,  //
                                               -1, -1, -1, 4, -1, -1, -1, 5, -1, -1, -1, 6, -1, -1, -1, 7);
        const __m256i last = _mm256_setr_epi8(-1, -1, -1, 8, -1, -1, -1, 9, -1, -1, -1, 10, -1, -1, -1, 11,  //
                                              -1, -1, -1, 12, -1, -1, -1, 13, -1, -1, -1, 14, -1, -1, -1, 15);
        const __m256i high = _mm256_set1_epi32(int32_t(0xf0000000));
        const __m256i flipped =
            _mm256_xor_si256(_mm256_broadcastsi128_si256(load_16(block + 2)), _mm256_set1_epi8(-0x78));
        const __m256i a = _mm256_shuffle_epi8(flipped, first), b = _mm256_shuffle_epi8(flipped, last);
        out[0] = _mm256_cvtepi32_ps(_mm256_slli_epi32(a, 4));
        out[1] = _mm256_cvtepi32_ps(_mm256_slli_epi32(b, 4));
        out[2] = _mm256_cvtepi32_ps(_mm256_and_si256(a, high));
        out[3] = _mm256_cvtepi32_ps(_mm256_and_si256(b, high));
    }
};

struct Q8_0Block {
    static constexpr size_t BYTES = sizeof(BlockQ8_0);
    static constexpr float UNIT = 1;
    static void unpack(const uint8_t* block, __m256 out[4]) {
        for (int e = 0; e < 4; e++) {
            const __m128i q = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(block + 2 + e * 8));
            out[e] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q));
        }
    }
};

template <class Block>
struct AddBlocks {
    static size_t bytes(size_t n) { return n / QK * Block::BYTES; }

    template <size_t R>
    [[gnu::noinline]] static void add(size_t n, const uint8_t* const* rows, const uint8_t* const* later, const float* h,
                                      float* acc) {
        // h * UNIT is exact but for |h| < 2^-98, so that the sums are those of h * d and q
        const __m256 some = R == LANES ? _mm256_loadu_ps(h) : load_tail(h, R);
        const __m256 weights = _mm256_mul_ps(some, _mm256_set1_ps(Block::UNIT));
        prefetch_end<R>(later, bytes(n));
        size_t j = 0;
        for (; j + 2 * QK <= n; j += 2 * QK) step<R, 2>(j, rows, later, weights, acc);
        if (j < n) step<R, 1>(j, rows, later, weights, acc);
    }

    // Columns [j, j + 32 N).
    template <size_t R, size_t N>
    [[gnu::always_inline]] static void step(size_t j, const uint8_t* const* rows, const uint8_t* const* later,
                                            __m256 weights, float* acc) {
        const size_t offset = j / QK * Block::BYTES;
        float hd[N][LANES];
        __m256 a[N * 4], w[4];
        PI_UNROLL for (size_t b = 0; b < N; b++) {
            prefetch<R>(later, offset + b * Block::BYTES, Block::BYTES);
            const __m256 d = block_scales<R>(rows, offset + b * Block::BYTES);
            _mm256_storeu_ps(hd[b], _mm256_mul_ps(weights, d));
        }
        PI_UNROLL for (size_t e = 0; e < N * 4; e++) a[e] = _mm256_loadu_ps(acc + j + e * LANES);
        PI_UNROLL for (size_t r = 0; r < R; r++) {
            PI_UNROLL for (size_t b = 0; b < N; b++) {
                const __m256 hr = _mm256_broadcast_ss(hd[b] + r);
                Block::unpack(rows[r] + offset + b * Block::BYTES, w);
                PI_UNROLL for (size_t e = 0; e < 4; e++) a[b * 4 + e] = _mm256_fmadd_ps(hr, w[e], a[b * 4 + e]);
            }
        }
        PI_UNROLL for (size_t e = 0; e < N * 4; e++) _mm256_storeu_ps(acc + j + e * LANES, a[e]);
    }
};

void add_rows(Type type, size_t n, const uint8_t* rows, size_t stride, const uint32_t* ids, const float* h,
              size_t n_ids, const uint8_t* next, float* acc) {
    const PickedRows walk{rows, stride, ids, n_ids, nullptr};
    switch (type) {
        case Type::F32:
            return add_rows<AddFloats<F32>>(n, n_ids, walk, h, true, next, acc);
        case Type::F16:
            return add_rows<AddFloats<F16>>(n, n_ids, walk, h, true, next, acc);
        case Type::Q4_0:
            return add_rows<AddBlocks<Q4_0Block>>(n, n_ids, walk, h, true, next, acc);
        case Type::Q8_0:
            return add_rows<AddBlocks<Q8_0Block>>(n, n_ids, walk, h, true, next, acc);
        case Type::I32:
            return;  // never a matrix
    }
}

// ---- conversions

template <class Format>
void dequantize_floats(size_t n, const uint8_t* row, float* out) {
    size_t k = 0;
    for (; k + LANES <= n; k += LANES) _mm256_storeu_ps(out + k, Format::load(row + k * Format::BYTES));
    if (k < n) store_tail(out + k, n - k, load_tail<Format>(row + k * Format::BYTES, n - k));
}

template <class Block>
void dequantize_blocks(size_t n, const uint8_t* row, float* out) {
    for (size_t k = 0; k < n; k += QK, row += Block::BYTES) {
        const __m256 d = _mm256_set1_ps(half_to_float(row) * Block::UNIT);
        __m256 w[4];
        Block::unpack(row, w);
        for (size_t e = 0; e < 4; e++) _mm256_storeu_ps(out + k + e * LANES, _mm256_mul_ps(d, w[e]));
    }
}

void dequantize(Type type, size_t begin, size_t n, const uint8_t* row, float* out) {
    switch (type) {
        case Type::F32:
            return dequantize_floats<F32>(n, row + begin * F32::BYTES, out);
        case Type::F16:
            return dequantize_floats<F16>(n, row + begin * F16::BYTES, out);
        case Type::Q4_0:
            return dequantize_blocks<Q4_0Block>(n, row + begin / QK * sizeof(BlockQ4_0), out);
        case Type::Q8_0:
            return dequantize_blocks<Q8_0Block>(n, row + begin / QK * sizeof(BlockQ8_0), out);
        case Type::I32:
            return;  // never a matrix
    }
}

// max|x| as an integer: ordered as the floats are, with Inf and NaN above all.
__m256i max_bits(__m256i a, __m256i b) { return _mm256_max_epi32(a, b); }

float max_magnitude(const __m256 x[4]) {
    const __m256i bits = _mm256_set1_epi32(0x7fffffff);
    __m256i max = _mm256_setzero_si256();
    for (size_t e = 0; e < 4; e++) max = max_bits(max, _mm256_and_si256(_mm256_castps_si256(x[e]), bits));
    max = max_bits(max, _mm256_permute2x128_si256(max, max, 1));
    max = max_bits(max, _mm256_shuffle_epi32(max, 0x4e));
    max = max_bits(max, _mm256_shuffle_epi32(max, 0xb1));
    return _mm256_cvtss_f32(_mm256_castsi256_ps(max));
}

int sum_bytes(__m256i q) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(s);
}

struct Quantized {
    float d;
    int sum;  // of q
};

Quantized quantize_block(const float* x, int8_t* q) {
    __m256 v[4];
    for (size_t e = 0; e < 4; e++) v[e] = _mm256_loadu_ps(x + e * LANES);
    const float max = max_magnitude(v);
    const bool finite = max < INFINITY;
    const float inverse = finite && max >= X8_TINY ? 127 / max : 0;
    __m256i whole[4];
    for (size_t e = 0; e < 4; e++) {
        const __m256 scaled = _mm256_mul_ps(finite ? v[e] : _mm256_setzero_ps(), _mm256_set1_ps(inverse));
        whole[e] = _mm256_cvtps_epi32(scaled);
    }
    // packing works within halves, so that groups of four bytes come out as 0 2 4 6 | 1 3 5 7
    const __m256i first = _mm256_packs_epi32(whole[0], whole[1]), last = _mm256_packs_epi32(whole[2], whole[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, last), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), bytes);
    return {!finite ? NAN : inverse > 0 ? max / 127 : 0, sum_bytes(bytes)};
}

void quantize_x8(size_t n, const float* x, MutableX8 out) {
    for (size_t b = 0; b < n / QK; b++) {
        const auto [d, sum] = quantize_block(x + b * QK, out.q + b * QK);
        out.d[b] = d;
        out.sum[b] = d * float(sum);
    }
}

void quantize_batch8(size_t n, const float* x, BatchX8* out) {
    for (size_t b = 0; b < n / QK; b++) {
        const auto [d, sum] = quantize_block(x + b * QK, out[b].q);
        out[b].d = d;
        out[b].minus8 = -8 * sum;
    }
}

void to_f16(size_t n, const float* x, uint16_t* out) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), h);
    }
    for (; i < n; i++) out[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
}

// ---- matrix-matrix

// R rows of x against one packed tile: 2 R sums in registers, each a chain over k.
template <size_t R>
void gemm_rows(size_t n_k, const float* x, size_t ldx, const float* packed, float* c, size_t ldc, bool accumulate) {
    __m256 low[R], high[R];
    PI_UNROLL for (size_t r = 0; r < R; r++) {
        low[r] = accumulate ? _mm256_loadu_ps(c + r * ldc) : _mm256_setzero_ps();
        high[r] = accumulate ? _mm256_loadu_ps(c + r * ldc + LANES) : _mm256_setzero_ps();
    }
    for (size_t k = 0; k < n_k; k++) {
        const __m256 w0 = _mm256_loadu_ps(packed + k * TILE_ROWS), w1 = _mm256_loadu_ps(packed + k * TILE_ROWS + LANES);
        PI_UNROLL for (size_t r = 0; r < R; r++) {
            const __m256 xr = _mm256_broadcast_ss(x + r * ldx + k);
            low[r] = _mm256_fmadd_ps(xr, w0, low[r]);
            high[r] = _mm256_fmadd_ps(xr, w1, high[r]);
        }
    }
    PI_UNROLL for (size_t r = 0; r < R; r++) {
        _mm256_storeu_ps(c + r * ldc, low[r]);
        _mm256_storeu_ps(c + r * ldc + LANES, high[r]);
    }
}

void gemm_tile(size_t n_t, size_t n_k, const float* x, size_t ldx, const float* packed, float* c, size_t ldc,
               bool accumulate) {
    size_t t = 0;
    for (; t + 6 <= n_t; t += 6) gemm_rows<6>(n_k, x + t * ldx, ldx, packed, c + t * ldc, ldc, accumulate);
    x += t * ldx;
    c += t * ldc;
    switch (n_t - t) {
        case 1:
            return gemm_rows<1>(n_k, x, ldx, packed, c, ldc, accumulate);
        case 2:
            return gemm_rows<2>(n_k, x, ldx, packed, c, ldc, accumulate);
        case 3:
            return gemm_rows<3>(n_k, x, ldx, packed, c, ldc, accumulate);
        case 4:
            return gemm_rows<4>(n_k, x, ldx, packed, c, ldc, accumulate);
        case 5:
            return gemm_rows<5>(n_k, x, ldx, packed, c, ldc, accumulate);
    }
}

// An 8 x 8 transpose: out + r * TILE_ROWS gets column r.
void transpose(const __m256 in[LANES], float* out) {
    __m256 pair[LANES], four[LANES];
    for (size_t i = 0; i < LANES; i += 2) {
        pair[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
    }
    for (size_t i = 0; i < LANES; i += 4) {
        four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (size_t i = 0; i < 4; i++) {
        _mm256_storeu_ps(out + i * TILE_ROWS, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * TILE_ROWS, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
}

// Columns [k, k + n) of the tile, n <= QK, from rows as floats.
void pack_columns(const float rows[TILE_ROWS][QK], size_t n, float* packed) {
    size_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        for (size_t j = 0; j < TILE_ROWS; j += LANES) {
            __m256 in[LANES];
            for (size_t r = 0; r < LANES; r++) in[r] = _mm256_loadu_ps(&rows[j + r][k]);
            transpose(in, packed + k * TILE_ROWS + j);
        }
    }
    for (; k < n; k++) {
        for (size_t j = 0; j < TILE_ROWS; j++) packed[k * TILE_ROWS + j] = rows[j][k];
    }
}

void pack_rows(Type type, size_t n, const uint8_t* rows, size_t stride, size_t n_rows, float* packed) {
    float columns[TILE_ROWS][QK] = {};
    for (size_t k = 0; k < n; k += QK) {
        const size_t count = n - k < QK ? n - k : QK;
        for (size_t j = 0; j < n_rows; j++) dequantize(type, k, count, rows + j * stride, columns[j]);
        pack_columns(columns, count, packed + k * TILE_ROWS);
    }
}

// ---- matrix-matrix in 8 bits

// Sums of R tokens and ROWS rows, 8 to a vector, over one block.
constexpr size_t GEMM8_VECTORS = 2, GEMM8_ROWS = GEMM8_VECTORS * LANES, GEMM8_TOKENS = 4;

__m256i broadcast_4(const int8_t* q) {
    int32_t four;
    memcpy(&four, q, 4);
    return _mm256_set1_epi32(four);
}

// Weights of 4 bits stay below 16: eight products of two fit 16 bits (8 * 2 * 15 * 127 < 2^15).
struct Nibbles {
    template <size_t R>
    static void sum(const uint8_t (*q)[TILE8_ROWS][4], const BatchX8* x, size_t ldx, __m256i whole[R][GEMM8_VECTORS]) {
        PI_UNROLL for (size_t r = 0; r < R; r++) whole[r][0] = whole[r][1] = _mm256_setzero_si256();
        PI_UNROLL_2 for (size_t k = 0; k < QK / 4; k++) {
            const __m256i w0 = load_32(q[k][0]), w1 = load_32(q[k][LANES]);
            PI_UNROLL for (size_t r = 0; r < R; r++) {
                const __m256i xk = broadcast_4(x[r * ldx].q + k * 4);
                whole[r][0] = _mm256_add_epi16(whole[r][0], _mm256_maddubs_epi16(w0, xk));
                whole[r][1] = _mm256_add_epi16(whole[r][1], _mm256_maddubs_epi16(w1, xk));
            }
        }
        const __m256i one = _mm256_set1_epi16(1);
        PI_UNROLL for (size_t r = 0; r < R; r++) {
            const __m256i minus = _mm256_set1_epi32(x[r * ldx].minus8);
            PI_UNROLL for (size_t v = 0; v < GEMM8_VECTORS; v++) whole[r][v] =
                _mm256_add_epi32(_mm256_madd_epi16(whole[r][v], one), minus);
        }
    }
};

// |w| * (x with w's sign): two products fit 16 bits (2 * 128 * 127 < 2^15).
struct Bytes {
    template <size_t R>
    static void sum(const uint8_t (*q)[TILE8_ROWS][4], const BatchX8* x, size_t ldx, __m256i whole[R][GEMM8_VECTORS]) {
        const __m256i zero = _mm256_set1_epi8(-128), one = _mm256_set1_epi16(1);
        PI_UNROLL for (size_t r = 0; r < R; r++) whole[r][0] = whole[r][1] = _mm256_setzero_si256();
        PI_UNROLL_2 for (size_t k = 0; k < QK / 4; k++) {
            const __m256i w0 = _mm256_xor_si256(load_32(q[k][0]), zero);
            const __m256i w1 = _mm256_xor_si256(load_32(q[k][LANES]), zero);
            const __m256i size0 = _mm256_abs_epi8(w0), size1 = _mm256_abs_epi8(w1);
            PI_UNROLL for (size_t r = 0; r < R; r++) {
                const __m256i xk = broadcast_4(x[r * ldx].q + k * 4);
                const __m256i p0 = _mm256_maddubs_epi16(size0, _mm256_sign_epi8(xk, w0));
                const __m256i p1 = _mm256_maddubs_epi16(size1, _mm256_sign_epi8(xk, w1));
                whole[r][0] = _mm256_add_epi32(whole[r][0], _mm256_madd_epi16(p0, one));
                whole[r][1] = _mm256_add_epi32(whole[r][1], _mm256_madd_epi16(p1, one));
            }
        }
    }
};

// R tokens against GEMM8_ROWS rows from row j on; the sums stay in c, as there are not enough registers.
template <class Products, size_t R>
void gemm8_rows(size_t n_b, const BatchX8* x, size_t ldx, const Packed8* packed, size_t j, float* c, size_t ldc) {
    for (size_t b = 0; b < n_b; b++) {
        __m256i whole[R][GEMM8_VECTORS];
        Products::template sum<R>(reinterpret_cast<const uint8_t (*)[TILE8_ROWS][4]>(packed[b].q[0][j]), x + b, ldx,
                                  whole);
        PI_UNROLL for (size_t v = 0; v < GEMM8_VECTORS; v++) {
            const __m256 d = _mm256_loadu_ps(packed[b].d + j + v * LANES);
            PI_UNROLL for (size_t r = 0; r < R; r++) {
                const __m256 dd = _mm256_mul_ps(d, _mm256_broadcast_ss(&x[r * ldx + b].d));
                float* to = c + r * ldc + v * LANES;
                _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[r][v]), dd, _mm256_loadu_ps(to)));
            }
        }
    }
}

template <class Products>
void gemm8_tokens(size_t n_t, size_t n_b, const BatchX8* x, size_t ldx, const Packed8* packed, float* c, size_t ldc) {
    for (size_t j = 0; j < TILE8_ROWS; j += GEMM8_ROWS) {
        size_t t = 0;
        for (; t + GEMM8_TOKENS <= n_t; t += GEMM8_TOKENS)
            gemm8_rows<Products, GEMM8_TOKENS>(n_b, x + t * ldx, ldx, packed, j, c + t * ldc + j, ldc);
        for (; t < n_t; t++) gemm8_rows<Products, 1>(n_b, x + t * ldx, ldx, packed, j, c + t * ldc + j, ldc);
    }
}

void gemm8(int zero, size_t n_t, size_t n_b, const BatchX8* x, size_t ldx, const Packed8* packed, float* c, size_t ldc,
           bool accumulate) {
    for (size_t t = 0; t < n_t && !accumulate; t++) memset(c + t * ldc, 0, TILE8_ROWS * sizeof(float));
    if (zero == 8) return gemm8_tokens<Nibbles>(n_t, n_b, x, ldx, packed, c, ldc);
    gemm8_tokens<Bytes>(n_t, n_b, x, ldx, packed, c, ldc);
}

// Four words of 4 bytes from each of 8 rows, from `from` on: out[w] is word w of every row.
[[gnu::always_inline]] inline void transpose_words(const uint8_t* const rows[LANES], size_t from, __m256i out[4]) {
    __m256i row[4], pair[4];
    PI_UNROLL for (size_t r = 0; r < 4; r++) row[r] =
        _mm256_inserti128_si256(_mm256_castsi128_si256(load_16(rows[r] + from)), load_16(rows[r + 4] + from), 1);
    PI_UNROLL for (size_t r = 0; r < 4; r += 2) {
        pair[r] = _mm256_unpacklo_epi32(row[r], row[r + 1]);
        pair[r + 1] = _mm256_unpackhi_epi32(row[r], row[r + 1]);
    }
    out[0] = _mm256_unpacklo_epi64(pair[0], pair[2]);
    out[1] = _mm256_unpackhi_epi64(pair[0], pair[2]);
    out[2] = _mm256_unpacklo_epi64(pair[1], pair[3]);
    out[3] = _mm256_unpackhi_epi64(pair[1], pair[3]);
}

void store_32(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// Rows [j, j + 8) of one block.
void pack_nibbles(const uint8_t* const rows[LANES], size_t j, Packed8& packed) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i words[4];
    transpose_words(rows, 2, words);
    PI_UNROLL for (size_t w = 0; w < 4; w++) {
        store_32(packed.q[w][j], _mm256_and_si256(words[w], nibble));
        store_32(packed.q[w + 4][j], _mm256_and_si256(_mm256_srli_epi16(words[w], 4), nibble));
    }
}

void pack_bytes(const uint8_t* const rows[LANES], size_t j, Packed8& packed) {
    const __m256i zero = _mm256_set1_epi8(-128);
    PI_UNROLL for (size_t half = 0; half < 2; half++) {
        __m256i words[4];
        transpose_words(rows, 2 + half * 16, words);
        PI_UNROLL for (size_t w = 0; w < 4; w++) store_32(packed.q[half * 4 + w][j], _mm256_xor_si256(words[w], zero));
    }
}

void pack_rows8(Type type, size_t n, const uint8_t* rows, size_t stride, size_t n_rows, Packed8* packed) {
    const bool q4 = type == Type::Q4_0;
    const size_t step = q4 ? sizeof(BlockQ4_0) : sizeof(BlockQ8_0);
    static const uint8_t none[sizeof(BlockQ8_0)] = {};
    for (size_t j = 0; j < TILE8_ROWS; j += LANES) {
        const uint8_t* row[LANES];
        for (size_t r = 0; r < LANES; r++) row[r] = j + r < n_rows ? rows + (j + r) * stride : none;
        for (size_t b = 0; b < n / QK; b++) {
            _mm256_storeu_ps(packed[b].d + j, block_scales<LANES>(row, 0));
            q4 ? pack_nibbles(row, j, packed[b]) : pack_bytes(row, j, packed[b]);
            for (size_t r = 0; r < LANES; r++) {
                prefetch_far(row[r], n / QK * step);  // the next call's part of the row, as a rule
                row[r] += row[r] == none ? 0 : step;
            }
        }
    }
}

// values[i] = row i, i < n, of 32 elements; returns the largest magnitudes of each column as integers, in 4 vectors.
template <class Block>
void unpack_block(size_t n, const uint8_t* rows, size_t stride, float values[QK][QK], __m256i max[4]) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (size_t e = 0; e < 4; e++) max[e] = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i++, rows += stride) {
        prefetch_far(rows, 24 * stride);
        const __m256 d = _mm256_set1_ps(half_to_float(rows) * Block::UNIT);
        __m256 w[4];
        Block::unpack(rows, w);
        PI_UNROLL for (size_t e = 0; e < 4; e++) {
            w[e] = _mm256_mul_ps(d, w[e]);
            max[e] = max_bits(max[e], _mm256_and_si256(_mm256_castps_si256(w[e]), magnitude));
            _mm256_storeu_ps(values[i] + e * LANES, w[e]);
        }
    }
    memset(values[n], 0, (QK - n) * sizeof(values[0]));
}

// Four rows of 8 columns as bytes, a column's four side by side, + 128.
__m256i pack_four(const float values[4][QK], __m256 inverse) {
    const __m256i by_column = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13,  //
                                                                        2, 6, 10, 14, 3, 7, 11, 15));
    __m256i q[4];
    PI_UNROLL for (size_t i = 0; i < 4; i++) q[i] =
        _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values[i]), inverse));
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_xor_si256(_mm256_shuffle_epi8(bytes, by_column), _mm256_set1_epi8(-128));
}

// One block of 8 columns from j on.
void pack_rounded(const float values[QK][QK], __m256i max_bits, size_t j, Packed8& packed) {
    const __m256 max = _mm256_castsi256_ps(max_bits), limit = _mm256_set1_ps(127);
    const __m256 finite = _mm256_cmp_ps(max, _mm256_set1_ps(INFINITY), _CMP_LT_OQ);
    const __m256 some = _mm256_cmp_ps(max, _mm256_set1_ps(X8_TINY), _CMP_GE_OQ);
    const __m256 inverse = _mm256_and_ps(_mm256_and_ps(finite, some), _mm256_div_ps(limit, max));
    const __m256 d = _mm256_and_ps(some, _mm256_div_ps(max, limit));
    _mm256_storeu_ps(packed.d + j, _mm256_blendv_ps(_mm256_set1_ps(NAN), d, finite));
    for (size_t k = 0; k < QK / 4; k++)
        store_32(packed.q[k][j], pack_four(reinterpret_cast<const float (*)[QK]>(values[k * 4] + j), inverse));
}

template <class Block>
void pack_columns(size_t n_rows, const uint8_t* rows, size_t stride, Packed8* packed) {
    for (size_t i = 0; i < n_rows; i += QK, packed++) {
        float values[QK][QK];
        __m256i max[4];
        unpack_block<Block>(n_rows - i < QK ? n_rows - i : QK, rows + i * stride, stride, values, max);
        for (size_t e = 0; e < 4; e++) pack_rounded(values, max[e], e * LANES, *packed);
    }
}

void pack_columns8(Type type, size_t n_rows, const uint8_t* rows, size_t stride, Packed8* packed) {
    if (type == Type::Q4_0) return pack_columns<Q4_0Block>(n_rows, rows, stride, packed);
    pack_columns<Q8_0Block>(n_rows, rows, stride, packed);
}

// ---- norms, softmax, rotation, activation

// The sum over i < n of what term(x[i..], acc) adds to acc, 8 at a time.
template <class Term>
float sum_terms(size_t n, const float* x, Term term) {
    __m256 acc[4];
    for (__m256& a : acc) a = _mm256_setzero_ps();
    size_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        for (size_t e = 0; e < 4; e++) acc[e] = term(_mm256_loadu_ps(x + i + e * LANES), acc[e]);
    }
    for (size_t e = 0; i + LANES <= n; i += LANES, e++) acc[e] = term(_mm256_loadu_ps(x + i), acc[e]);
    float tail = 0;
    if (i < n) {
        float lanes[LANES];
        _mm256_storeu_ps(lanes, term(load_tail(x + i, n - i), _mm256_setzero_ps()));
        for (size_t l = 0; l < n - i; l++) tail += lanes[l];
    }
    return sum(_mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3]))) + tail;
}

float sum_squares(size_t n, const float* x, float mean) {
    const __m256 m = _mm256_set1_ps(mean);
    return sum_terms(n, x, [m](__m256 v, __m256 acc) {
        const __m256 centred = _mm256_sub_ps(v, m);
        return _mm256_fmadd_ps(centred, centred, acc);
    });
}

// out[i] = change(x[i], i), 8 at a time; change sees zeros beyond the end.
template <class Change>
void map(size_t n, const float* x, float* out, Change change) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) _mm256_storeu_ps(out + i, change(_mm256_loadu_ps(x + i), i, LANES));
    if (i < n) store_tail(out + i, n - i, change(load_tail(x + i, n - i), i, n - i));
}

__m256 load_some(const float* x, size_t n) { return n == LANES ? _mm256_loadu_ps(x) : load_tail(x, n); }

void rms_norm(size_t n, const float* x, const float* weight, float eps, float* out) {
    const __m256 scale = _mm256_set1_ps(1 / sqrtf(sum_squares(n, x, 0) / float(n) + eps));
    map(n, x, out, [=](__m256 v, size_t i, size_t count) {
        const __m256 normal = _mm256_mul_ps(v, scale);
        return weight ? _mm256_mul_ps(normal, load_some(weight + i, count)) : normal;
    });
}

void layer_norm(size_t n, const float* x, const float* weight, const float* bias, float eps, float* out) {
    const float mean = sum_terms(n, x, [](__m256 v, __m256 acc) { return _mm256_add_ps(v, acc); }) / float(n);
    const __m256 scale = _mm256_set1_ps(1 / sqrtf(sum_squares(n, x, mean) / float(n) + eps));
    const __m256 centre = _mm256_set1_ps(mean);
    map(n, x, out, [=](__m256 v, size_t i, size_t count) {
        const __m256 normal = _mm256_mul_ps(_mm256_sub_ps(v, centre), scale);
        return _mm256_fmadd_ps(normal, load_some(weight + i, count), load_some(bias + i, count));
    });
}

// exp(x) = 2^m exp(r), |r| <= ln(2) / 2, exp(r) by its Taylor series to r^7 / 7! (the rest is below 2^-27). 2^m goes in
// as two factors, so that results may be denormal. NaN stays NaN: min and max return their second operand then.
__m256 exp(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-104), _mm256_min_ps(_mm256_set1_ps(89), x));
    const __m256 m = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m256 r = _mm256_fnmadd_ps(m, _mm256_set1_ps(0x1.62ep-1f), x);  // ln(2) = 12 bits and the rest: the first
    r = _mm256_fnmadd_ps(m, _mm256_set1_ps(0x1.0bfbe8p-15f), r);     // product is exact
    constexpr float series[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    for (const float c : series) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    const __m256i whole = _mm256_cvtps_epi32(m), half = _mm256_srai_epi32(whole, 1);
    const auto power = [](__m256i e) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(p, power(half)), power(_mm256_sub_epi32(whole, half)));
}

// The largest of x, which may pass over NaN.
float largest(size_t n, const float* x) {
    float lanes[LANES], max = -INFINITY;
    __m256 all = _mm256_set1_ps(max);
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) all = _mm256_max_ps(_mm256_loadu_ps(x + i), all);
    _mm256_storeu_ps(lanes, all);
    for (const float v : lanes) max = v > max ? v : max;
    for (; i < n; i++) max = x[i] > max ? x[i] : max;
    return max;
}

void softmax(size_t n, float* x) {
    const __m256 shift = _mm256_set1_ps(largest(n, x));
    map(n, x, x, [=](__m256 v, size_t, size_t) { return exp(_mm256_sub_ps(v, shift)); });
    const __m256 total = _mm256_set1_ps(sum_terms(n, x, [](__m256 v, __m256 acc) { return _mm256_add_ps(v, acc); }));
    map(n, x, x, [=](__m256 v, size_t, size_t) { return _mm256_div_ps(v, total); });
}

void silu(size_t n, float* a) {
    const __m256 one = _mm256_set1_ps(1);
    map(n, a, a, [=](__m256 v, size_t, size_t) {
        return _mm256_div_ps(v, _mm256_add_ps(one, exp(_mm256_sub_ps(_mm256_setzero_ps(), v))));
    });
}

void rope(size_t n, float* x, const float* cos, const float* sin) {
    const size_t half = n / 2;
    float* y = x + half;
    for (size_t i = 0; i < half; i += LANES) {
        const size_t count = half - i < LANES ? half - i : LANES;
        const __m256 a = load_some(x + i, count), b = load_some(y + i, count);
        const __m256 c = load_some(cos + i, count), s = load_some(sin + i, count);
        store_tail(x + i, count, _mm256_sub_ps(_mm256_mul_ps(a, c), _mm256_mul_ps(b, s)));
        store_tail(y + i, count, _mm256_add_ps(_mm256_mul_ps(a, s), _mm256_mul_ps(b, c)));
    }
}

// ---- attention: the cache is a matrix of float16 rows

AllRows cache_rows(const uint16_t* cache, size_t stride, size_t n_pos) {
    return {reinterpret_cast<const uint8_t*>(cache), stride * sizeof(uint16_t), n_pos - 1};
}

void attention_scores(size_t head_dim, size_t n_pos, const float* q, const uint16_t* k, size_t stride, float scale,
                      float* scores) {
    dot_rows<FloatRows<F16>>(head_dim, n_pos, cache_rows(k, stride, n_pos), {q, {}}, scores);
    for (size_t p = 0; p < n_pos; p++) scores[p] *= scale;
}

void attention_mix(size_t head_dim, size_t n_pos, const float* weights, const uint16_t* v, size_t stride, float* out) {
    for (size_t j = 0; j < head_dim; j++) out[j] = 0;
    add_rows<AddFloats<F16>>(head_dim, n_pos, cache_rows(v, stride, n_pos), weights, false, nullptr, out);
}

constexpr Ops table = {"avx2",           quantize_x8,   quantize_batch8, matvec,    matvec_picked, matvec_bundles,
                       add_rows,         dequantize,    gemm_tile,       pack_rows, gemm8,         pack_rows8,
                       pack_columns8,    rms_norm,      layer_norm,      softmax,   rope,          silu,
                       attention_scores, attention_mix, to_f16,          64 << 10};

}  // namespace

const Ops* const avx2_table = &table;

}  // namespace pi

#else

namespace pi {
const Ops* const avx2_table = nullptr;
}

#endif
