// Every numeric operation of the engine, as one table of functions. `scalar()` is the definition of each operation;
// other tables compute the same, faster, within the bounds that tests/test_ops.cpp states. Sizes are elements.
// All sums run in a fixed order that depends on the sizes alone: never on threads, nor on which neurons are skipped.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gguf.h"

namespace pi {

constexpr size_t QK = 32;         // elements of a quantised block
constexpr size_t TILE_ROWS = 16;  // rows (or columns) of a packed tile in the matrix-matrix path

// ggml's block layouts.
// Q8_0: x = d * q.
struct BlockQ8_0 {
    uint16_t d;
    int8_t q[QK];
};
// Q4_0: x = d * (q - 8); low nibbles are x[0..15], high nibbles x[16..31].
struct BlockQ4_0 {
    uint16_t d;
    uint8_t q[QK / 2];
};
static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4_0) == 18);

// A vector quantised for the dot product with Q8_0 and Q4_0 rows, block by block: x = d * q, sum = d * (sum of q).
template <class Float, class Byte>
struct AnyX8 {
    Float* d;    // [n / QK]
    Float* sum;  // [n / QK]
    Byte* q;     // [n]
};
using X8 = AnyX8<const float, const int8_t>;
using MutableX8 = AnyX8<float, int8_t>;
constexpr float X8_TINY = 1e-36f;  // blocks with no |x| from here on become 0: 127 / x would overflow

// The same for the matrix-matrix path; minus8 = -8 * (sum of q): what the zero point of Q4_0 takes off a product.
struct BatchX8 {
    float d;
    int32_t minus8;
    int8_t q[QK];
};

// One block of TILE8_ROWS rows (or columns) in the matrix-matrix path: w = d[j] * (q[k / 4][j][k % 4] - zero), with
// zero = 8 where the weights are those of Q4_0 rows and 128 elsewhere.
constexpr size_t TILE8_ROWS = 32;
struct Packed8 {
    float d[TILE8_ROWS];
    uint8_t q[QK / 4][TILE8_ROWS][4];
};
int zero_of_rows(Type type);
constexpr int ZERO_OF_COLUMNS = 128;

// What a weight row is multiplied with: both forms of one vector. x8 may be empty where no quantised row will be met.
struct Vector {
    const float* f;  // [n]
    X8 x8;
};

struct Ops {
    const char* name;

    // x (n) -> out; round to nearest, d = max|x| / 127; NaN or Inf in x gives NaN in d.
    void (*quantize_x8)(size_t n, const float* x, MutableX8 out);
    void (*quantize_batch8)(size_t n, const float* x, BatchX8* out);

    // out[i] = row_i . x for i < n_rows; row_i lies at `rows + i * stride` bytes. n: elements of a row.
    void (*matvec)(Type type, size_t n, const uint8_t* rows, size_t stride, size_t n_rows, Vector x, float* out);
    // The same for rows that are picked: out[i] = row_{ids[i]} . x; prefetches the rows that follow, and after the last
    // the first of those at `then + ids[i] * stride`, which are read next (NULL: nothing is).
    void (*matvec_picked)(Type type, size_t n, const uint8_t* rows, size_t stride, const uint32_t* ids, size_t n_ids,
                          const uint8_t* then, Vector x, float* out);

    // The same for all rows but the last of n_bundles bundles that follow one another, each of n_parts rows:
    // out[i * (n_parts - 1) + p] = row_p of bundle i . x. Prefetches the last rows, too, and what follows: add_rows of
    // the bundles before, with `next` here, may have begun with it.
    void (*matvec_bundles)(Type type, size_t n, const uint8_t* bundles, size_t n_parts, size_t n_bundles, Vector x,
                           float* out);

    // acc[j] += sum over i of h[i] * row_{ids[i]}[j], in the order of i, one fused multiply-add after the other (of
    // h * d and q in quantised rows). n: elements of a row, or of a part of one. Rows with h == 0 are skipped.
    // Prefetches the rows that follow or, where `next` is given, the bundles there, which matvec_bundles will be given:
    // the rows lie in the cache already.
    void (*add_rows)(Type type, size_t n, const uint8_t* rows, size_t stride, const uint32_t* ids, const float* h,
                     size_t n_ids, const uint8_t* next, float* acc);

    // One row, or the part [begin, begin + n) of it (both multiples of QK for quantised types), as float.
    void (*dequantize)(Type type, size_t begin, size_t n, const uint8_t* row, float* out);

    // Matrix-matrix tile: c[t * ldc + j] (+)= sum over k < n_k of x[t * ldx + k] * packed[k * TILE_ROWS + j],
    // for t < n_t and j < TILE_ROWS; `accumulate` adds to c. Each (t, j) is summed over k in order: independent of n_t.
    void (*gemm_tile)(size_t n_t, size_t n_k, const float* x, size_t ldx, const float* packed, float* c, size_t ldc,
                      bool accumulate);
    // packed[k * TILE_ROWS + j] = row_j[k] for j < n_rows (the rest 0), k < n; row_j at rows + j * stride.
    void (*pack_rows)(Type type, size_t n, const uint8_t* rows, size_t stride, size_t n_rows, float* packed);

    // The same in 8 bits: c[t * ldc + j] (+)= sum over blocks b < n_b of d * x.d * (sum over k of q * x.q), x = block b
    // of token t at x[t * ldx + b]; the inner sum is exact, the outer one fused multiply-adds in the order of b.
    void (*gemm8)(int zero, size_t n_t, size_t n_b, const BatchX8* x, size_t ldx, const Packed8* packed, float* c,
                  size_t ldc, bool accumulate);
    // Elements [0, n) of n_rows <= TILE8_ROWS quantised rows, as they are; the rest of the tile has d = 0.
    void (*pack_rows8)(Type type, size_t n, const uint8_t* rows, size_t stride, size_t n_rows, Packed8* packed);
    // The transposed of n_rows quantised rows of TILE8_ROWS elements: row i is element i of every column. Scales along
    // the sum are not those of the rows, so values are rounded anew: d = max / 127 of a column's block. Rows from
    // n_rows on, to the end of a block, count as 0.
    void (*pack_columns8)(Type type, size_t n_rows, const uint8_t* rows, size_t stride, Packed8* packed);

    // out = x / sqrt(mean(x^2) + eps) * weight.   out may be x; weight may be NULL: all ones.
    void (*rms_norm)(size_t n, const float* x, const float* weight, float eps, float* out);
    // out = (x - mean) / sqrt(variance + eps) * weight + bias.   out may be x.
    void (*layer_norm)(size_t n, const float* x, const float* weight, const float* bias, float eps, float* out);
    // x[i] = exp(x[i] - max) / sum.
    void (*softmax)(size_t n, float* x);
    // Half-split rotation of one head: pairs (x[i], x[i + n/2]), i < n/2, by cos[i], sin[i].
    void (*rope)(size_t n, float* x, const float* cos, const float* sin);
    // a[i] = silu(a[i]) = a[i] / (1 + exp(-a[i])).
    void (*silu)(size_t n, float* a);

    // Attention over a float16 cache of n_pos rows, `stride` elements apart.
    // scores[p] = scale * (q . k_p)
    void (*attention_scores)(size_t head_dim, size_t n_pos, const float* q, const uint16_t* k, size_t stride,
                             float scale, float* scores);
    // out[j] = sum over p of weights[p] * v_p[j]
    void (*attention_mix)(size_t head_dim, size_t n_pos, const float* weights, const uint16_t* v, size_t stride,
                          float* out);
    // Round to nearest even.
    void (*to_f16)(size_t n, const float* x, uint16_t* out);

    size_t bundle_bytes;  // of bundles that one call of matvec_bundles is best given, and add_rows after it
};

const Ops& scalar();
const Ops* avx2();    // NULL where the processor (or the build) has no AVX2, FMA and F16C
const Ops* avx512();  // AVX2's, with some of AVX-512 (F, BW, DQ, VL, VNNI, GFNI) in their place; or NULL
const Ops* choose_ops(uint32_t which);  // 0: best; 1: scalar; 2: AVX2; 3: AVX-512; NULL where there is none

extern const Ops* const avx2_table;  // of ops_avx2.cpp; NULL where it is compiled without AVX2. Call avx2() instead.
extern Ops (*const with_avx512)(
    Ops, bool intel);  // of ops_avx512.cpp; NULL where it is compiled without. Call avx512() instead.

float f16_to_f32(uint16_t h);
uint16_t f32_to_f16(float f);

}  // namespace pi
