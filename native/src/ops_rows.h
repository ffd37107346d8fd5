// What the kernels of AVX2 and AVX-512 share: how they walk over rows. All of it is local to the file that includes it,
// since each is compiled for other processors.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "ops.h"

// Arrays of vectors stay in registers only where the loops over them are unrolled.
#if defined(__clang__)
#define PI_UNROLL _Pragma("unroll")
#else
#define PI_UNROLL _Pragma("GCC unroll 16")
#endif

namespace pi {
namespace {

float half_to_float(const uint8_t* p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    return _cvtsh_ss(bits);
}

__m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// The scales of one block in up to 8 rows, as float; lane r is row r's.
template <size_t R>
__m256 block_scales(const uint8_t* const* rows, size_t offset) {
    uint16_t d[8] = {};
    PI_UNROLL for (size_t r = 0; r < R; r++) memcpy(&d[r], rows[r] + offset, 2);
    const uint64_t low = d[0] | uint64_t(d[1]) << 16 | uint64_t(d[2]) << 32 | uint64_t(d[3]) << 48;
    const uint64_t high = d[4] | uint64_t(d[5]) << 16 | uint64_t(d[6]) << 32 | uint64_t(d[7]) << 48;
    return _mm256_cvtph_ps(_mm_set_epi64x(int64_t(high), int64_t(low)));
}

// ---- prefetching

// What lies n_bytes on, which may be beyond the end: only to be asked for.
inline const uint8_t* beyond(const uint8_t* p, size_t n_bytes) {
    return reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(p) + n_bytes);
}

// The line there, into the first-level cache, or the second.
[[gnu::always_inline]] inline void prefetch_near(const uint8_t* p, size_t n_bytes) {
    _mm_prefetch(reinterpret_cast<const char*>(beyond(p, n_bytes)), _MM_HINT_T0);
}
[[gnu::always_inline]] inline void prefetch_far(const uint8_t* p, size_t n_bytes) {
    _mm_prefetch(reinterpret_cast<const char*>(beyond(p, n_bytes)), _MM_HINT_T1);
}

// Rows are read R at a time, which no hardware prefetcher follows: so while R rows are worked on, the same part of R
// later ones is asked for, [offset, offset + step): every line of 64 bytes that begins there, counted from the row's
// first byte. (GCC takes a function that only prefetches for one that does nothing, and leaves out its calls, unless it
// is inlined before that.)
template <size_t R>
[[gnu::always_inline]] inline void prefetch(const uint8_t* const* later, size_t offset, size_t step) {
    const size_t line = (offset + step - 1) / 64 * 64;
    if (line < offset) return;
    PI_UNROLL for (size_t r = 0; r < R; r++) _mm_prefetch(reinterpret_cast<const char*>(later[r] + line), _MM_HINT_T1);
}

// The line of a row's last byte, which lies beyond those where the row does not start with a line.
template <size_t R>
[[gnu::always_inline]] inline void prefetch_end(const uint8_t* const* later, size_t row_bytes) {
    PI_UNROLL for (size_t r = 0; r < R; r++)
        _mm_prefetch(reinterpret_cast<const char*>(later[r] + row_bytes - 1), _MM_HINT_T1);
}

// How many rows later: 16 KiB or so, which is what a core reads in the time that memory takes to answer, and then some.
size_t rows_ahead(size_t group, size_t row_bytes) {
    constexpr size_t BYTES = 16 << 10, MOST = 8;
    const size_t groups = BYTES / (group * (row_bytes + 1));
    return group * (groups < 1 ? 1 : groups < MOST ? groups : MOST);
}

// ---- dot products

constexpr size_t GROUP = 8;  // rows in one pass over a sum

// Rows that follow one another. What lies beyond the last may be prefetched: it is what the thread reads next, and a
// prefetch of nothing is nothing.
struct AllRows {
    const uint8_t* rows;
    size_t stride;
    size_t last = SIZE_MAX / 2;  // row that is the last to prefetch

    const uint8_t* at(size_t i) const { return rows + i * stride; }
    const uint8_t* later(size_t i) const { return beyond(rows, (i < last ? i : last) * stride); }
};

// Rows that are picked, and where those that are read after them lie (ops.h).
struct PickedRows {
    const uint8_t* rows;
    size_t stride;
    const uint32_t* ids;
    size_t n_ids;
    const uint8_t* then;

    const uint8_t* at(size_t i) const { return rows + ids[i] * stride; }
    const uint8_t* later(size_t i) const {
        if (i < n_ids || !then) return at(i < n_ids ? i : n_ids - 1);
        const size_t row = ids[i - n_ids < n_ids ? i - n_ids : n_ids - 1];
        return beyond(then, row * stride);
    }

    // For row i, one of the first rows that are read after all these; NULL but for the last of these.
    const uint8_t* first_after(size_t i) const {
        if (!then || i + GROUP < n_ids) return nullptr;
        const size_t row = ids[n_ids < GROUP ? i : i + GROUP - n_ids];
        return beyond(then, row * stride);
    }
};

// All rows but the last of each bundle, in order.
struct BundleRows {
    const uint8_t* bundles;
    size_t row_bytes, n_parts;

    size_t offset(size_t i) const { return (i / (n_parts - 1) * n_parts + i % (n_parts - 1)) * row_bytes; }
    const uint8_t* at(size_t i) const { return bundles + offset(i); }
    const uint8_t* later(size_t i) const { return beyond(bundles, offset(i)); }
};

// Takes WIDE rows at a time and what is left in twos, an odd last row twice: each row's sums are the same either way.
template <class Rows, class Walk>
void dot_rows(size_t n, size_t n_rows, const Walk& walk, Vector x, float* out) {
    constexpr size_t WIDE = Rows::WIDE;
    const size_t ahead = rows_ahead(WIDE, Rows::bytes(n));
    const uint8_t *rows[WIDE], *later[WIDE];
    size_t i = 0;
    for (; i + WIDE <= n_rows; i += WIDE) {
        for (size_t r = 0; r < WIDE; r++) rows[r] = walk.at(i + r), later[r] = walk.later(i + r + ahead);
        Rows::template dot<WIDE>(n, rows, later, x, out + i);
    }
    for (; i < n_rows; i += 2) {
        float two[2];
        for (size_t r = 0; r < 2; r++) rows[r] = walk.at(i + r < n_rows ? i + r : i), later[r] = walk.later(i + r + 2);
        Rows::template dot<2>(n, rows, later, x, two);
        out[i] = two[0];
        if (i + 1 < n_rows) out[i + 1] = two[1];
    }
}

// ---- sums of rows

// The rows to add, without those that are skipped, a little ahead of the adding. Places are taken modulo SIZE.
struct Queue {
    static constexpr size_t SIZE = 128;  // at least twice what rows_ahead may say
    const uint8_t* rows[SIZE];
    float h[SIZE];
    size_t end = 0;

    void push(const uint8_t* row, float weight) {
        rows[end % SIZE] = row;
        h[end++ % SIZE] = weight;
    }
};

// The last rows, fewer than GROUP.
template <class Add>
void add_rest(size_t n, const uint8_t* const* rows, const float* h, size_t n_rows, float* acc) {
    const auto part = [&](auto add, size_t count) {
        for (; n_rows >= count; rows += count, h += count, n_rows -= count) add(n, rows, rows, h, acc);
    };
    part(Add::template add<4>, 4);
    part(Add::template add<2>, 2);
    part(Add::template add<1>, 1);
}

// acc += h[i] * row i of the walk, i < n_rows, but for those where h is 0 if they are to be skipped.
template <class Add, class Walk>
void add_rows(size_t n, size_t n_rows, const Walk& walk, const float* h, bool skip, const uint8_t* next, float* acc) {
    const size_t ahead = rows_ahead(GROUP, Add::bytes(n));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(next);
    Queue queue;
    const uint8_t* later[GROUP];
    for (size_t i = 0, at = 0;; at += GROUP) {
        for (; i < n_rows && queue.end < at + ahead + GROUP; i++) {
            if (!skip || h[i] != 0) queue.push(walk.at(i), h[i]);
        }
        const size_t place = at % Queue::SIZE;
        if (queue.end < at + GROUP) return add_rest<Add>(n, queue.rows + place, queue.h + place, queue.end - at, acc);
        for (size_t r = 0; r < GROUP; r++) {
            const size_t i = at + ahead + r;
            later[r] = i < queue.end ? queue.rows[i % Queue::SIZE] : walk.later(n_rows + i - queue.end);
            if (next) later[r] = reinterpret_cast<const uint8_t*>(begin + (at + r) * Add::bytes(n));
        }
        Add::template add<GROUP>(n, queue.rows + place, later, queue.h + place, acc);
    }
}

}  // namespace
}  // namespace pi
