// What AVX-512 with VNNI and GFNI does better than AVX2. Compiled with those flags, alone, as ops_avx2.cpp is, and for
// the same reason: nothing here may run before avx512() has asked the processor.
#include "ops.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__) && defined(__GFNI__)

#include <immintrin.h>
#include <string.h>

#include "ops_rows.h"

#if !defined(__clang__)  // GCC 12 takes the undefined vectors in its own header for a fault
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace pi {
namespace {

constexpr size_t LANES = 16;

// ---- dot products: one row after the other, so that memory is read in its own order, which it serves fastest

constexpr size_t AHEAD_BYTES = 4096;  // of a stream
constexpr size_t EIGHT = 8;           // blocks in one step

// How many bytes ahead of a sequential read its lines are asked for: `near` into the first-level cache and, where it is
// not 0, `far` into the second. Intel reads at half its speed when the first level is asked for what lies beyond 4 KiB.
struct Distances {
    size_t near, far;
};
constexpr Distances INTEL = {2304, 4608}, OTHERS = {4608, 0};
Distances distances = OTHERS;  // written once, before any operation runs

// What is asked for while a row is read: as much from `near` on and, where it is not NULL, from `far` on.
struct Ahead {
    const uint8_t *near, *far;
};

// The same of what follows the row in memory.
Ahead following(const uint8_t* row) {
    return {beyond(row, distances.near), distances.far ? beyond(row, distances.far) : nullptr};
}

// The lines of 64 bytes that begin in [offset, offset + step), counted from a row's first byte.
[[gnu::always_inline]] inline void prefetch_lines(Ahead ahead, size_t offset, size_t step) {
    for (size_t line = (offset + 63) / 64 * 64; line < offset + step; line += 64) {
        prefetch_near(ahead.near, line);
        if (ahead.far) prefetch_far(ahead.far, line);
    }
}

// What follows, in its own order: so many bytes of it for each that is read, in units of 1 / 65536.
struct Stream {
    const uint8_t* next;
    size_t ratio;
};

[[gnu::always_inline]] inline void prefetch_lines(Stream stream, size_t offset, size_t step) {
    const size_t begin = offset * stream.ratio >> 16, end = (offset + step) * stream.ratio >> 16;
    for (size_t line = (begin + 63) / 64 * 64; line < end; line += 64) prefetch_near(stream.next, line);
}

template <size_t R>
struct LaterRows {
    const uint8_t* const* rows;
};

template <size_t R>
[[gnu::always_inline]] inline void prefetch_lines(LaterRows<R> later, size_t offset, size_t step) {
    prefetch<R>(later.rows, offset, step);
}

// What follows each of R rows, where far distances are. A step is shorter than a line.
template <size_t R>
struct Following {
    const uint8_t* const* rows;
    Distances ahead = distances;
};

template <size_t R>
[[gnu::always_inline]] inline void prefetch_lines(Following<R> following, size_t offset, size_t step) {
    const size_t line = (offset + step - 1) / 64 * 64;
    if (line < offset) return;
    PI_UNROLL for (size_t r = 0; r < R; r++) {
        prefetch_near(following.rows[r], following.ahead.near + line);
        prefetch_far(following.rows[r], following.ahead.far + line);
    }
}

__m512i load_64(const uint8_t* p) { return _mm512_loadu_si512(p); }

// Every W-th word of the 128 bytes from p on, up to the eighth, of which those beyond the end mean nothing.
template <int W>
__m128i pick_words(const uint8_t* p, int first) {
    const __m512i at =
        _mm512_add_epi16(_mm512_castsi128_si512(_mm_setr_epi16(0, W, 2 * W, 3 * W, 4 * W, 5 * W, 6 * W, 7 * W)),
                         _mm512_set1_epi16(short(first)));
    return _mm512_castsi512_si128(_mm512_permutex2var_epi16(load_64(p), at, load_64(p + 64)));
}

// Eight blocks' scales, and two blocks' weights as unsigned bytes, ZERO too large.
struct Q4_0Pair {
    static constexpr size_t BYTES = sizeof(BlockQ4_0);
    static constexpr float ZERO = 8;
    static __m256 scales(const uint8_t* blocks) { return _mm256_cvtph_ps(pick_words<BYTES / 2>(blocks, 0)); }
    static __m512i load(const uint8_t* first, const uint8_t* second) {
        const __m512i twice = _mm512_broadcast_i32x4(load_16(first + 2));
        const __m512i both = _mm512_mask_broadcast_i32x4(twice, 0xff00, load_16(second + 2));
        // products with matrices of bits: 16 low nibbles, then 16 high ones
        constexpr int64_t LOW = 0x0102040800000000, HIGH = 0x1020408000000000;
        return _mm512_gf2p8affine_epi64_epi8(both, _mm512_setr_epi64(LOW, LOW, HIGH, HIGH, LOW, LOW, HIGH, HIGH), 0);
    }
};

struct Q8_0Pair {
    static constexpr size_t BYTES = sizeof(BlockQ8_0);
    static constexpr float ZERO = 128;
    static __m256 scales(const uint8_t* blocks) {
        const __m128i first = pick_words<BYTES / 2>(blocks, 0), last = pick_words<BYTES / 2>(blocks + 128, 4);
        return _mm256_cvtph_ps(_mm_unpacklo_epi64(first, last));
    }
    static __m512i load(const uint8_t* first, const uint8_t* second) {
        const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + 2)));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + 2));
        return _mm512_xor_si512(_mm512_inserti64x4(low, high, 1), _mm512_set1_epi8(-128));
    }
};

// The weights stay unsigned; what they are too large by leaves at the end, through the sums of x.
template <class Pair>
struct BlockRow {
    static constexpr bool ADDED_HERE = true;
    struct Sums {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        __m256 excess = _mm256_setzero_ps();
    };

    static size_t bytes(size_t n) { return n / QK * Pair::BYTES; }

    template <class Ahead>
    static float dot(size_t n, const uint8_t* row, Ahead ahead, Vector x) {
        const size_t n_blocks = n / QK;
        Sums sums;
        size_t b = 0;
        for (; b + EIGHT <= n_blocks; b += EIGHT) {
            prefetch_lines(ahead, b * Pair::BYTES, EIGHT * Pair::BYTES);
            add_eight(row + b * Pair::BYTES, x.x8.q + b * QK, _mm256_loadu_ps(x.x8.d + b),
                      _mm256_loadu_ps(x.x8.sum + b), sums);
        }
        float rest = 0;
        if (b < n_blocks) {
            prefetch_lines(ahead, b * Pair::BYTES, (n_blocks - b) * Pair::BYTES);
            rest = add_rest(n_blocks - b, row + b * Pair::BYTES, b, x.x8, sums);
        }
        const __m512 over = _mm512_zextps256_ps512(sums.excess), both = _mm512_add_ps(sums.even, sums.odd);
        return _mm512_reduce_add_ps(_mm512_fnmadd_ps(_mm512_set1_ps(Pair::ZERO), over, both)) - Pair::ZERO * rest;
    }

    [[gnu::always_inline]] static inline void add_eight(const uint8_t* blocks, const int8_t* q, __m256 d, __m256 sum,
                                                        Sums& sums) {
        const __m256 scales = Pair::scales(blocks);
        sums.excess = _mm256_fmadd_ps(scales, sum, sums.excess);
        const __m512 both = _mm512_castps256_ps512(_mm256_mul_ps(scales, d));
        PI_UNROLL for (size_t b = 0; b < EIGHT; b += 2) {
            const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            const __m512 spread = _mm512_permutexvar_ps(_mm512_add_epi32(half, _mm512_set1_epi32(int32_t(b))), both);
            const __m512i whole = _mm512_dpbusd_epi32(
                _mm512_setzero_si512(), Pair::load(blocks + b * Pair::BYTES, blocks + (b + 1) * Pair::BYTES),
                _mm512_loadu_si512(q + b * QK));
            __m512& to = b % 4 == 0 ? sums.even : sums.odd;
            to = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), spread, to);
        }
    }

    // Fewer than eight blocks, from the block `at` on; returns their excess.
    [[gnu::always_inline]] static inline float add_rest(size_t n_blocks, const uint8_t* blocks, size_t at, X8 x,
                                                        Sums& sums) {
        float excess = 0;
        for (size_t b = 0; b < n_blocks; b += 2, blocks += 2 * Pair::BYTES, at += 2) {
            const bool two = b + 1 < n_blocks;
            const uint8_t* second = two ? blocks + Pair::BYTES : blocks;  // met by zeros where there is none
            const __m512i q = _mm512_maskz_loadu_epi8(two ? ~uint64_t{0} : 0xffffffff, x.q + at * QK);
            const float d0 = half_to_float(blocks), d1 = two ? half_to_float(second) : 0;
            excess += d0 * x.sum[at];
            if (two) excess += d1 * x.sum[at + 1];
            const __m512 spread =
                _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(d0 * x.d[at]), _mm512_set1_ps(two ? d1 * x.d[at + 1] : 0));
            const __m512i whole = _mm512_dpbusd_epi32(_mm512_setzero_si512(), Pair::load(blocks, second), q);
            sums.even = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), spread, sums.even);
        }
        return excess;
    }
};

struct F16Row {
    static constexpr bool ADDED_HERE = false;
    static size_t bytes(size_t n) { return n * 2; }
    template <class Ahead>
    static float dot(size_t n, const uint8_t* row, Ahead ahead, Vector x) {
        __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        size_t k = 0;
        for (; k + 4 * LANES <= n; k += 4 * LANES) {
            prefetch_lines(ahead, k * 2, 4 * LANES * 2);
            PI_UNROLL for (size_t e = 0; e < 4; e++) {
                const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + (k + e * LANES) * 2));
                sums[e] = _mm512_fmadd_ps(_mm512_cvtph_ps(half), _mm512_loadu_ps(x.f + k + e * LANES), sums[e]);
            }
        }
        for (; k < n; k += LANES) {
            const __mmask16 there = n - k < LANES ? __mmask16((1u << (n - k)) - 1) : __mmask16(0xffff);
            const __m256i half = _mm256_maskz_loadu_epi16(there, row + k * 2);
            sums[0] = _mm512_fmadd_ps(_mm512_cvtph_ps(half), _mm512_maskz_loadu_ps(there, x.f + k), sums[0]);
        }
        return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
    }
};

template <class Row>
void dot_each(size_t n, size_t n_rows, const AllRows& walk, Vector x, float* out) {
    for (size_t i = 0; i < n_rows; i++) out[i] = Row::dot(n, walk.at(i), following(walk.at(i)), x);
}

template <class Row>
void dot_each(size_t n, size_t n_rows, const PickedRows& walk, Vector x, float* out) {
    const size_t n_ahead = AHEAD_BYTES / (Row::bytes(n) + 1) + 1;
    for (size_t i = 0; i < n_rows; i++)
        out[i] = Row::dot(n, walk.at(i), Ahead{walk.later(i + n_ahead), walk.first_after(i)}, x);
}

// Each row asks for what follows it; or, without far distances, all ask for a stream: as much meanwhile as these
// bundles are, from AHEAD_BYTES behind their begin on. Where the type's last rows are added here, which takes as long,
// it is half of it, what follows the half that add_bundled asked for before.
template <class Row>
void dot_each(size_t n, size_t n_rows, const BundleRows& walk, Vector x, float* out) {
    const size_t n_read = walk.n_parts - 1, all = n_rows / n_read * walk.n_parts * walk.row_bytes;
    const size_t times = Row::ADDED_HERE ? 2 : 1, early = Row::ADDED_HERE ? all / 2 : 0;
    const size_t ratio = (walk.n_parts << 16) / (times * n_read);
    for (size_t i = 0; i < n_rows; i++) {
        const uint8_t* row = walk.at(i);
        if (distances.far) {
            out[i] = Row::dot(n, row, following(row), x);
            continue;
        }
        const size_t asked = early + i * walk.row_bytes * walk.n_parts / (times * n_read);
        out[i] = Row::dot(n, row, Stream{beyond(walk.bundles, AHEAD_BYTES + asked), ratio}, x);
    }
}

// Whether the type has a kernel here; else AVX2's does it.
template <class Walk>
bool dot_each(Type type, size_t n, size_t n_rows, const Walk& walk, Vector x, float* out) {
    switch (type) {
        case Type::F16:
            dot_each<F16Row>(n, n_rows, walk, x, out);
            return true;
        case Type::Q4_0:
            dot_each<BlockRow<Q4_0Pair>>(n, n_rows, walk, x, out);
            return true;
        case Type::Q8_0:
            dot_each<BlockRow<Q8_0Pair>>(n, n_rows, walk, x, out);
            return true;
        default:
            return false;
    }
}

void matvec(Type type, size_t n, const uint8_t* rows, size_t stride, size_t n_rows, Vector x, float* out) {
    if (!dot_each(type, n, n_rows, AllRows{rows, stride}, x, out))
        avx2_table->matvec(type, n, rows, stride, n_rows, x, out);
}

void matvec_picked(Type type, size_t n, const uint8_t* rows, size_t stride, const uint32_t* ids, size_t n_ids,
                   const uint8_t* then, Vector x, float* out) {
    if (!dot_each(type, n, n_ids, PickedRows{rows, stride, ids, n_ids, then}, x, out))
        avx2_table->matvec_picked(type, n, rows, stride, ids, n_ids, then, x, out);
}

void matvec_bundles(Type type, size_t n, const uint8_t* bundles, size_t n_parts, size_t n_bundles, Vector x,
                    float* out) {
    if (!dot_each(type, n, n_bundles * (n_parts - 1), BundleRows{bundles, row_bytes(type, n), n_parts}, x, out))
        avx2_table->matvec_bundles(type, n, bundles, n_parts, n_bundles, x, out);
}

// ---- sums of rows

// 16-bit words of the 128 bytes from p on, those that `at` names.
__m128i words_at(const uint8_t* p, __m128i at) {
    return _mm512_castsi512_si128(_mm512_permutex2var_epi16(load_64(p), _mm512_zextsi128_si512(at), load_64(p + 64)));
}

struct Q4_0Block {
    static constexpr size_t BYTES = sizeof(BlockQ4_0);
    // the scales of eight blocks
    static __m128i scales(const uint8_t* blocks) {
        return words_at(blocks, _mm_setr_epi16(0, 9, 18, 27, 36, 45, 54, 63));
    }
    static void unpack(const uint8_t* block, __m512 out[2]) {
        const __m512 value = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        const __m512i q = _mm512_cvtepu8_epi32(load_16(block + 2));
        out[0] = _mm512_permutexvar_ps(q, value);  // looks at the low four bits alone
        out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), value);
    }
};

struct Q8_0Block {
    static constexpr size_t BYTES = sizeof(BlockQ8_0);
    static __m128i scales(const uint8_t* blocks) {
        const __m128i at = _mm_setr_epi16(0, 17, 34, 51, 0, 0, 0, 0);
        return _mm_unpacklo_epi64(words_at(blocks, at), words_at(blocks + 4 * BYTES, at));
    }
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
        prefetch_end<R>(later, bytes(n));
        add_ahead<R>(n, rows, LaterRows<R>{later}, h, acc);
    }

    // The same with something else to ask for.
    template <size_t R, class Ahead>
    [[gnu::noinline]] static void add_beside(size_t n, const uint8_t* const* rows, Ahead ahead, const float* h,
                                             float* acc) {
        add_ahead<R>(n, rows, ahead, h, acc);
    }

    template <size_t R, class Ahead>
    [[gnu::always_inline]] static void add_ahead(size_t n, const uint8_t* const* rows, Ahead later, const float* h,
                                                 float* acc) {
        float hd[R][EIGHT];  // h times the scales of eight blocks
        size_t j = 0;
        for (; j + EIGHT * QK <= n; j += EIGHT * QK) {
            PI_UNROLL for (size_t r = 0; r < R; r++) {
                const __m256 d = _mm256_cvtph_ps(Block::scales(rows[r] + bytes(j)));
                _mm256_storeu_ps(hd[r], _mm256_mul_ps(_mm256_set1_ps(h[r]), d));
            }
            for (size_t b = 0; b < EIGHT; b += 2) step<R, 2>(j + b * QK, rows, later, hd, b, acc);
        }
        for (; j < n; j += QK) {
            PI_UNROLL for (size_t r = 0; r < R; r++) {
                uint16_t d;
                memcpy(&d, rows[r] + bytes(j), sizeof(d));
                hd[r][0] = h[r] * _cvtsh_ss(d);
            }
            step<R, 1>(j, rows, later, hd, 0, acc);
        }
    }

    // Columns [j, j + 32 N), whose scales begin at hd[.][first].
    template <size_t R, size_t N, class Ahead>
    [[gnu::always_inline]] static void step(size_t j, const uint8_t* const* rows, Ahead later,
                                            const float (&hd)[R][EIGHT], size_t first, float* acc) {
        __m512 a[N][2], w[2];
        PI_UNROLL for (size_t b = 0; b < N; b++) {
            prefetch_lines(later, bytes(j) + b * Block::BYTES, Block::BYTES);
            PI_UNROLL for (size_t e = 0; e < 2; e++) a[b][e] = _mm512_loadu_ps(acc + j + b * QK + e * LANES);
        }
        PI_UNROLL for (size_t r = 0; r < R; r++) {
            PI_UNROLL for (size_t b = 0; b < N; b++) {
                Block::unpack(rows[r] + bytes(j) + b * Block::BYTES, w);
                const __m512 hr = _mm512_set1_ps(hd[r][first + b]);
                PI_UNROLL for (size_t e = 0; e < 2; e++) a[b][e] = _mm512_fmadd_ps(hr, w[e], a[b][e]);
            }
        }
        PI_UNROLL for (size_t b = 0; b < N; b++) {
            PI_UNROLL for (size_t e = 0; e < 2; e++) _mm512_storeu_ps(acc + j + b * QK + e * LANES, a[b][e]);
        }
    }
};

// The last rows of bundles that dot_each has been through. Asks for half as much from AHEAD_BYTES behind `next` on:
// dot_each, which goes on there, asks for the other half.
template <class Add>
void add_bundled(size_t n, size_t n_rows, const PickedRows& walk, const float* h, const uint8_t* next, float* acc) {
    const uint8_t* later = beyond(next, AHEAD_BYTES);
    const uint8_t* rows[GROUP];
    float weights[GROUP];
    size_t n_group = 0, asked = 0;  // asked: rows in whose turn their share was asked for
    for (size_t i = 0; i < n_rows; i++) {
        if (h[i] == 0) continue;
        rows[n_group] = walk.at(i);
        weights[n_group++] = h[i];
        if (n_group < GROUP) continue;
        const size_t share = (i + 1 - asked) * walk.stride / 2;
        Add::template add_beside<GROUP>(n, rows, Stream{later, (share << 16) / Add::bytes(n)}, weights, acc);
        later = beyond(later, share);
        asked = i + 1;
        n_group = 0;
    }
    prefetch_lines(Stream{later, walk.stride << 15}, 0, n_rows - asked);
    add_rest<Add>(n, rows, weights, n_group, acc);
}

// The same where each row asks for what follows it, those that are not added, too.
template <class Add>
void add_in_order(size_t n, size_t n_rows, const PickedRows& walk, const float* h, float* acc) {
    const uint8_t* rows[2];
    float weights[2];
    size_t n_group = 0;
    for (size_t i = 0; i < n_rows; i++) {
        const uint8_t* row = walk.at(i);
        if (h[i] == 0) {
            prefetch_lines(following(row), 0, Add::bytes(n));
            continue;
        }
        rows[n_group] = row;
        weights[n_group++] = h[i];
        if (n_group < 2) continue;
        Add::template add_beside<2>(n, rows, Following<2>{rows}, weights, acc);
        n_group = 0;
    }
    if (n_group == 1) Add::template add_beside<1>(n, rows, Following<1>{rows}, weights, acc);
}

template <class Add>
void add_some(size_t n, size_t n_rows, const PickedRows& walk, const float* h, const uint8_t* next, float* acc) {
    if (next && distances.far)
        add_in_order<Add>(n, n_rows, walk, h, acc);
    else if (next)
        add_bundled<Add>(n, n_rows, walk, h, next, acc);
    else
        add_rows<Add>(n, n_rows, walk, h, true, nullptr, acc);
}

void add_rows(Type type, size_t n, const uint8_t* rows, size_t stride, const uint32_t* ids, const float* h,
              size_t n_ids, const uint8_t* next, float* acc) {
    const PickedRows walk{rows, stride, ids, n_ids, nullptr};
    switch (type) {
        case Type::Q4_0:
            return add_some<AddBlocks<Q4_0Block>>(n, n_ids, walk, h, next, acc);
        case Type::Q8_0:
            return add_some<AddBlocks<Q8_0Block>>(n, n_ids, walk, h, next, acc);
        default:
            return avx2_table->add_rows(type, n, rows, stride, ids, h, n_ids, next, acc);
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

// values[i] = row i, i < n, of 32 elements; the largest magnitudes of each column as integers, Inf and NaN above all.
template <class Block>
void unpack_block(size_t n, const uint8_t* rows, size_t stride, float values[QK][QK], __m512i max[VECTORS]) {
    PI_UNROLL for (size_t v = 0; v < VECTORS; v++) max[v] = _mm512_setzero_si512();
    for (size_t i = 0; i < n; i++, rows += stride) {
        prefetch_far(rows, 24 * stride);
        uint16_t half;
        memcpy(&half, rows, 2);
        const __m512 d = _mm512_set1_ps(_cvtsh_ss(half));
        __m512 whole[VECTORS];
        Block::unpack(rows, whole);
        PI_UNROLL for (size_t v = 0; v < VECTORS; v++) {
            const __m512 w = _mm512_mul_ps(d, whole[v]);
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

Ops override_some(Ops table, bool intel) {
    distances = intel ? INTEL : OTHERS;
    table.name = "avx512";
    if (intel) table.bundle_bytes = 16 << 10;
    table.matvec = matvec;
    table.matvec_picked = matvec_picked;
    table.matvec_bundles = matvec_bundles;
    table.add_rows = add_rows;
    table.gemm_tile = gemm_tile;
    table.gemm8 = gemm8;
    table.pack_columns8 = pack_columns8;
    return table;
}

}  // namespace

Ops (*const with_avx512)(Ops, bool) = override_some;

}  // namespace pi

#else

namespace pi {
Ops (*const with_avx512)(Ops, bool) = nullptr;
}

#endif
