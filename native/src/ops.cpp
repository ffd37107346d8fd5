// The scalar operations: the definition of each, written to be read. And the choice of a table.
#include "ops.h"

#include <math.h>
#include <string.h>

#include <bit>
#include <cassert>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pi {

// IEEE 754 binary16 to binary32; exact. Signalling NaNs become quiet, as the processor's conversion does.
float f16_to_f32(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16;
    const uint32_t magnitude = h & 0x7fff;
    if (magnitude > 0x7c00) return std::bit_cast<float>(sign | 0x7fc00000 | magnitude << 13);
    if (magnitude == 0x7c00) return std::bit_cast<float>(sign | 0x7f800000);
    if (magnitude >= 0x0400) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000));
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(float(magnitude) * 0x1p-24f));  // denormal
}

// IEEE 754 binary32 to binary16, to nearest, ties to even.
uint16_t f32_to_f16(float f) {
    const uint32_t bits = std::bit_cast<uint32_t>(f);
    const uint32_t sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to Inf
    if (magnitude < 0x38800000) {  // below 2^-14: floats in [0.5, 1) are 2^-24 apart, as these are
        const float rounded = std::bit_cast<float>(magnitude) + 0.5f;
        return uint16_t(sign | (std::bit_cast<uint32_t>(rounded) - 0x3f000000));
    }
    magnitude += 0x0fff + (magnitude >> 13 & 1);
    return uint16_t(sign | (magnitude - 0x38000000) >> 13);
}

int zero_of_rows(Type type) { return type == Type::Q4_0 ? 8 : 128; }

namespace {

float load_f32(const uint8_t* row, size_t k) {
    float value;
    memcpy(&value, row + k * 4, 4);
    return value;
}

float load_f16(const uint8_t* p) {
    uint16_t value;
    memcpy(&value, p, 2);
    return f16_to_f32(value);
}

// A quantised weight before it is scaled, 0 <= k < QK.
int nibble(const uint8_t* block, size_t k) {
    const uint8_t byte = block[2 + k % 16];
    return (k < 16 ? byte & 15 : byte >> 4) - 8;
}
int byte(const uint8_t* block, size_t k) { return int8_t(block[2 + k]); }

// The scale of element k and the number it scales; floats have the scale 1.
struct Scaled {
    float d, q;
};

Scaled element(Type type, const uint8_t* row, size_t k) {
    if (type == Type::F32) return {1.0f, load_f32(row, k)};
    if (type == Type::F16) return {1.0f, load_f16(row + k * 2)};
    const bool q4 = type == Type::Q4_0;
    assert(q4 || type == Type::Q8_0);
    const uint8_t* block = row + k / QK * (q4 ? sizeof(BlockQ4_0) : sizeof(BlockQ8_0));
    return {load_f16(block), float(q4 ? nibble(block, k % QK) : byte(block, k % QK))};
}

struct Quantized {
    float d;
    int sum;  // of q
};

Quantized quantize_block(const float* x, int8_t* q) {
    float max = 0;
    bool finite = true;
    for (size_t k = 0; k < QK; k++) {
        finite = finite && isfinite(x[k]);
        max = fabsf(x[k]) > max ? fabsf(x[k]) : max;
    }
    const float inverse = finite && max >= X8_TINY ? 127 / max : 0;
    int sum = 0;
    for (size_t k = 0; k < QK; k++) {
        q[k] = finite ? int8_t(lrintf(x[k] * inverse)) : int8_t(0);
        sum += q[k];
    }
    return {!finite ? NAN : inverse > 0 ? max / 127 : 0, sum};
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

float dot_quantized(Type type, size_t n, const uint8_t* row, X8 x) {
    const bool q4 = type == Type::Q4_0;
    float total = 0;
    for (size_t b = 0; b < n / QK; b++, row += q4 ? sizeof(BlockQ4_0) : sizeof(BlockQ8_0)) {
        int sum = 0;
        for (size_t k = 0; k < QK; k++) sum += (q4 ? nibble(row, k) : byte(row, k)) * x.q[b * QK + k];
        total += load_f16(row) * x.d[b] * float(sum);
    }
    return total;
}

float dot(Type type, size_t n, const uint8_t* row, Vector x) {
    if (type == Type::Q4_0 || type == Type::Q8_0) return dot_quantized(type, n, row, x.x8);
    float sum = 0;
    for (size_t k = 0; k < n; k++) sum += element(type, row, k).q * x.f[k];
    return sum;
}

void matvec(Type type, size_t n, const uint8_t* rows, size_t stride, size_t n_rows, Vector x, float* out) {
    for (size_t i = 0; i < n_rows; i++) out[i] = dot(type, n, rows + i * stride, x);
}

void matvec_picked(Type type, size_t n, const uint8_t* rows, size_t stride, const uint32_t* ids, size_t n_ids,
                   const uint8_t*, Vector x, float* out) {
    for (size_t i = 0; i < n_ids; i++) out[i] = dot(type, n, rows + ids[i] * stride, x);
}

void matvec_bundles(Type type, size_t n, const uint8_t* bundles, size_t n_parts, size_t n_bundles, Vector x,
                    float* out) {
    const size_t row = row_bytes(type, n);
    for (size_t i = 0; i < n_bundles; i++, bundles += n_parts * row)
        for (size_t p = 0; p + 1 < n_parts; p++) *out++ = dot(type, n, bundles + p * row, x);
}

void add_row(Type type, size_t n, const uint8_t* row, float h, float* acc) {
    for (size_t j = 0; j < n; j++) {
        const Scaled w = element(type, row, j);
        acc[j] = fmaf(h * w.d, w.q, acc[j]);
    }
}

void add_rows(Type type, size_t n, const uint8_t* rows, size_t stride, const uint32_t* ids, const float* h,
              size_t n_ids, const uint8_t*, float* acc) {
    for (size_t i = 0; i < n_ids; i++) {
        if (h[i] != 0) add_row(type, n, rows + ids[i] * stride, h[i], acc);
    }
}

void dequantize(Type type, size_t begin, size_t n, const uint8_t* row, float* out) {
    for (size_t k = 0; k < n; k++) {
        const Scaled w = element(type, row, begin + k);
        out[k] = w.d * w.q;  // exact: 11 bits of d times 8 of q
    }
}

void gemm_tile(size_t n_t, size_t n_k, const float* x, size_t ldx, const float* packed, float* c, size_t ldc,
               bool accumulate) {
    for (size_t t = 0; t < n_t; t++) {
        for (size_t j = 0; j < TILE_ROWS; j++) {
            float sum = accumulate ? c[t * ldc + j] : 0;
            for (size_t k = 0; k < n_k; k++) sum = fmaf(x[t * ldx + k], packed[k * TILE_ROWS + j], sum);
            c[t * ldc + j] = sum;
        }
    }
}

void pack_rows(Type type, size_t n, const uint8_t* rows, size_t stride, size_t n_rows, float* packed) {
    for (size_t j = 0; j < TILE_ROWS; j++) {
        for (size_t k = 0; k < n; k++) {
            const Scaled w = j < n_rows ? element(type, rows + j * stride, k) : Scaled{0, 0};
            packed[k * TILE_ROWS + j] = w.d * w.q;
        }
    }
}

void gemm8(int zero, size_t n_t, size_t n_b, const BatchX8* x, size_t ldx, const Packed8* packed, float* c, size_t ldc,
           bool accumulate) {
    for (size_t t = 0; t < n_t; t++) {
        for (size_t j = 0; j < TILE8_ROWS; j++) {
            float sum = accumulate ? c[t * ldc + j] : 0;
            for (size_t b = 0; b < n_b; b++) {
                const BatchX8& xb = x[t * ldx + b];
                int whole = 0;
                for (size_t k = 0; k < QK; k++) whole += (packed[b].q[k / 4][j][k % 4] - zero) * xb.q[k];
                sum = fmaf(float(whole), packed[b].d[j] * xb.d, sum);
            }
            c[t * ldc + j] = sum;
        }
    }
}

void pack_rows8(Type type, size_t n, const uint8_t* rows, size_t stride, size_t n_rows, Packed8* packed) {
    const int zero = zero_of_rows(type);
    for (size_t k = 0; k < n; k++) {
        Packed8& block = packed[k / QK];
        for (size_t j = 0; j < TILE8_ROWS; j++) {
            const Scaled w = j < n_rows ? element(type, rows + j * stride, k) : Scaled{0, 0};
            block.d[j] = w.d;
            block.q[k % QK / 4][j][k % 4] = uint8_t(int(w.q) + zero);
        }
    }
}

// Elements [0, QK) of one column, of which the first n are w.
void pack_column8(size_t n, const float* w, size_t j, Packed8& packed) {
    float values[QK] = {};
    for (size_t k = 0; k < n; k++) values[k] = w[k];
    int8_t q[QK];
    packed.d[j] = quantize_block(values, q).d;
    for (size_t k = 0; k < QK; k++) packed.q[k / 4][j][k % 4] = uint8_t(q[k] + ZERO_OF_COLUMNS);
}

void pack_columns8(Type type, size_t n_rows, const uint8_t* rows, size_t stride, Packed8* packed) {
    for (size_t i = 0; i < n_rows; i += QK, packed++) {
        const size_t n = n_rows - i < QK ? n_rows - i : QK;
        for (size_t j = 0; j < TILE8_ROWS; j++) {
            float column[QK];
            for (size_t k = 0; k < n; k++) {
                const Scaled w = element(type, rows + (i + k) * stride, j);
                column[k] = w.d * w.q;
            }
            pack_column8(n, column, j, *packed);
        }
    }
}

void rms_norm(size_t n, const float* x, const float* weight, float eps, float* out) {
    double squares = 0;
    for (size_t i = 0; i < n; i++) squares += double(x[i]) * x[i];
    const float scale = float(1 / sqrt(squares / double(n) + eps));
    for (size_t i = 0; i < n; i++) out[i] = x[i] * scale * (weight ? weight[i] : 1);
}

void layer_norm(size_t n, const float* x, const float* weight, const float* bias, float eps, float* out) {
    double sum = 0, squares = 0;
    for (size_t i = 0; i < n; i++) sum += x[i];
    const float mean = float(sum / double(n));
    for (size_t i = 0; i < n; i++) squares += double(x[i] - mean) * (x[i] - mean);
    const float scale = float(1 / sqrt(squares / double(n) + eps));
    for (size_t i = 0; i < n; i++) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

void softmax(size_t n, float* x) {
    float max = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) max = x[i] > max ? x[i] : max;
    for (size_t i = 0; i < n; i++) sum += x[i] = expf(x[i] - max);
    for (size_t i = 0; i < n; i++) x[i] /= sum;
}

void rope(size_t n, float* x, const float* cos, const float* sin) {
    for (size_t i = 0; i < n / 2; i++) {
        const float a = x[i], b = x[i + n / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + n / 2] = a * sin[i] + b * cos[i];
    }
}

void silu(size_t n, float* a) {
    for (size_t i = 0; i < n; i++) a[i] /= 1 + expf(-a[i]);
}

void attention_scores(size_t head_dim, size_t n_pos, const float* q, const uint16_t* k, size_t stride, float scale,
                      float* scores) {
    for (size_t p = 0; p < n_pos; p++, k += stride) {
        float sum = 0;
        for (size_t j = 0; j < head_dim; j++) sum += q[j] * f16_to_f32(k[j]);
        scores[p] = scale * sum;
    }
}

void attention_mix(size_t head_dim, size_t n_pos, const float* weights, const uint16_t* v, size_t stride, float* out) {
    for (size_t j = 0; j < head_dim; j++) out[j] = 0;
    for (size_t p = 0; p < n_pos; p++, v += stride) {
        for (size_t j = 0; j < head_dim; j++) out[j] = fmaf(weights[p], f16_to_f32(v[j]), out[j]);
    }
}

void to_f16(size_t n, const float* x, uint16_t* out) {
    for (size_t i = 0; i < n; i++) out[i] = f32_to_f16(x[i]);
}

constexpr Ops scalar_table = {
    "scalar",         quantize_x8,   quantize_batch8, matvec,    matvec_picked, matvec_bundles,
    add_rows,         dequantize,    gemm_tile,       pack_rows, gemm8,         pack_rows8,
    pack_columns8,    rms_norm,      layer_norm,      softmax,   rope,          silu,
    attention_scores, attention_mix, to_f16,          64 << 10};

bool has_avx2() {
#if defined(__x86_64__)
    unsigned a, b, c = 0, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // these ask the system, too
#else
    return false;
#endif
}

bool is_intel() {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
#else
    return false;
#endif
}

}  // namespace

const Ops& scalar() { return scalar_table; }

const Ops* avx2() {
    static const bool supported = has_avx2();
    return supported ? avx2_table : nullptr;
}

const Ops* avx512() {
    static const bool supported = with_avx512 && avx2() && has_avx512();
    static const Ops table = supported ? with_avx512(*avx2_table, is_intel()) : scalar_table;
    return supported ? &table : nullptr;
}

const Ops* choose_ops(uint32_t which) {
    switch (which) {
        case 0:
            return avx512() ? avx512() : avx2() ? avx2() : &scalar_table;
        case 1:
            return &scalar_table;
        case 2:
            return avx2();
        case 3:
            return avx512();
    }
    return nullptr;
}

}  // namespace pi
