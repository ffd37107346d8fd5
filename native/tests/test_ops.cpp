// Every operation of every table against float64, the scalar table, or itself. A plain executable: prints what failed,
// and a line with the number of checks; exit code 1 if any failed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "ops.h"

using namespace pi;

namespace {

constexpr float NaN = std::numeric_limits<float>::quiet_NaN();
constexpr float Inf = std::numeric_limits<float>::infinity();
constexpr float DENORMAL = 0x1.8p-140f;

const std::vector<size_t> SIZES = {1, 7, 8, 9, 31, 32, 33, 64, 576, 4095, 4096, 4097};
const std::vector<Type> TYPES = {Type::F32, Type::F16, Type::Q4_0, Type::Q8_0};
const char* const TYPE_NAMES[] = {"f32", "f16", "q4_0", "", "", "", "", "", "q8_0"};

// An array that is aligned to its elements and to nothing more, between guard bytes that must stay as they are.
template <class T>
class Guarded {
   public:
    explicit Guarded(size_t n, size_t shift = sizeof(T)) : n_(n), start_(GUARD + shift) {
        bytes_.assign(start_ + n * sizeof(T) + GUARD, 0xa5);
    }
    T* data() { return reinterpret_cast<T*>(bytes_.data() + start_); }
    T& operator[](size_t i) { return data()[i]; }
    T* begin() { return data(); }
    T* end() { return data() + n_; }
    bool intact() const {
        const auto untouched = [](uint8_t byte) { return byte == 0xa5; };
        return std::all_of(bytes_.begin(), bytes_.begin() + long(start_), untouched) &&
               std::all_of(bytes_.end() - GUARD, bytes_.end(), untouched);
    }

   private:
    static constexpr size_t GUARD = 64;
    size_t n_, start_;
    std::vector<uint8_t> bytes_;
};

std::mt19937 random_bits(1);

float normal() {
    static std::normal_distribution<float> distribution;
    return distribution(random_bits);
}

Guarded<float> normals(size_t n) {
    Guarded<float> x(n);
    for (float& v : x) v = normal();
    return x;
}

bool quantised(Type type) { return type == Type::Q4_0 || type == Type::Q8_0; }
bool fits(Type type, size_t n) { return !quantised(type) || n % QK == 0; }
size_t block_size(Type type) { return type == Type::Q4_0 ? sizeof(BlockQ4_0) : sizeof(BlockQ8_0); }
size_t bytes_of(Type type, size_t n) {
    return quantised(type) ? n / QK * block_size(type) : n * (type == Type::F32 ? 4 : 2);
}

double from_f16(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const double sign = h & 0x8000 ? -1 : 1;
    if (exponent == 31) return fraction ? double(NaN) : sign * double(Inf);
    return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

bool same_bits(const float* a, const float* b, size_t n) { return n == 0 || std::memcmp(a, b, n * sizeof(float)) == 0; }

// A matrix with rows further apart than they are long, at an odd address, and what it means in float64.
struct Matrix {
    Type type;
    size_t n, n_rows, stride;
    Guarded<uint8_t> bytes;
    std::vector<double> values;  // [n_rows, n]

    Matrix(Type type, size_t n, size_t n_rows, size_t gap = 5)
        : type(type), n(n), n_rows(n_rows), stride(bytes_of(type, n) + gap), bytes(stride * n_rows, 1) {
        for (size_t i = 0; i < n_rows; i++) {
            for (size_t k = 0; k < n; k += quantised(type) ? QK : 1) fill(row(i), k);
        }
        decode();
    }
    uint8_t* row(size_t i) { return bytes.data() + i * stride; }
    const double* value(size_t i) const { return values.data() + i * n; }

    void fill(uint8_t* row, size_t k) {
        if (type == Type::F32) {
            const float v = normal();
            std::memcpy(row + k * 4, &v, 4);
        } else {
            const uint16_t half = f32_to_f16(normal());
            uint8_t* at = row + (quantised(type) ? k / QK * block_size(type) : k * 2);
            std::memcpy(at, &half, 2);
            for (size_t b = 2; quantised(type) && b < block_size(type); b++) at[b] = uint8_t(random_bits());
        }
    }

    void decode() {
        values.clear();
        for (size_t i = 0; i < n_rows; i++) {
            for (size_t k = 0; k < n; k++) values.push_back(element(row(i), k));
        }
    }

    double element(const uint8_t* row, size_t k) const {
        float single;
        uint16_t half;
        if (type == Type::F32) return std::memcpy(&single, row + k * 4, 4), double(single);
        if (type == Type::F16) return std::memcpy(&half, row + k * 2, 2), from_f16(half);
        const uint8_t* block = row + k / QK * block_size(type);
        const size_t e = k % QK;
        std::memcpy(&half, block, 2);
        if (type == Type::Q8_0) return from_f16(half) * int8_t(block[2 + e]);
        return from_f16(half) * ((e < 16 ? block[2 + e] & 15 : block[2 + e - 16] >> 4) - 8);
    }
};

// A vector quantised in blocks.
struct Blocks {
    Guarded<float> d, sum;
    Guarded<int8_t> q;

    explicit Blocks(size_t n) : d(n / QK), sum(n / QK), q(n / QK * QK) {}
    Blocks(const Ops& ops, size_t n, const float* x) : Blocks(n) { ops.quantize_x8(n / QK * QK, x, out()); }
    MutableX8 out() { return {d.data(), sum.data(), q.data()}; }
    X8 in() { return {d.data(), sum.data(), q.data()}; }
    bool intact() { return d.intact() && sum.intact() && q.intact(); }
};

// x in both forms, and what the rows of a type are multiplied with, in float64.
struct Input {
    Guarded<float> x;
    Blocks blocks;

    explicit Input(Guarded<float> values, size_t n) : x(std::move(values)), blocks(scalar(), n, x.data()) {}
    explicit Input(size_t n) : Input(normals(n), n) {}
    // Only the form that the type needs: the other may be NULL.
    Vector vector(Type type) { return quantised(type) ? Vector{nullptr, blocks.in()} : Vector{x.data(), {}}; }
    double value(Type type, size_t k) {
        return quantised(type) ? double(blocks.d[k / QK]) * blocks.q[k] : double(x[k]);
    }
};

// Squared errors are held against the sum of the squared terms, not against the sum, which may cancel by chance.
// 1e-10 is a thousandth of the usual bound on NMSE and still ten times what 4097 roundings in a row can be expected to
// make.
constexpr double BOUND = 1e-10;

struct Exact {
    double sum = 0, squares = 0;
    void add(double term) { sum += term, squares += term * term; }
    bool near(float got) const { return (got - sum) * (got - sum) <= BOUND * squares; }
};

// ---- conversions

void test_f16() {
    for (uint32_t h = 0; h < 65536; h++) {
        const double exact = from_f16(uint16_t(h));
        const float got = f16_to_f32(uint16_t(h));
        CHECK(std::isnan(exact) ? std::isnan(got) : got == exact, "half %04x", h);
        const uint16_t back = f32_to_f16(got);
        CHECK(std::isnan(exact) ? (back & 0x7c00) == 0x7c00 && (back & 0x3ff) : back == h, "half %04x", h);
        if (h >= 0x7c00) continue;
        // half way to the next: to even; a little off: to the nearest. The next after the largest is Inf.
        const float next = h == 0x7bff ? 65536.0f : f16_to_f32(uint16_t(h + 1));
        const float middle = (got + next) / 2;
        CHECK(f32_to_f16(middle) == h + (h & 1), "half way above %04x", h);
        CHECK(f32_to_f16(std::nextafter(middle, 0.0f)) == h, "below half way above %04x", h);
        CHECK(f32_to_f16(-std::nextafter(middle, Inf)) == (0x8000 | (h + 1)), "beyond half way above %04x", h);
    }
}

void test_to_f16(const Ops& ops) {
    for (size_t n : SIZES) {
        Guarded<float> x(n);
        for (float& v : x) {
            const uint32_t bits = uint32_t(random_bits());
            std::memcpy(&v, &bits, 4);
        }
        Guarded<uint16_t> out(n);
        ops.to_f16(n, x.data(), out.data());
        bool equal = true;
        for (size_t i = 0; i < n; i++) equal = equal && out[i] == f32_to_f16(x[i]);
        CHECK(equal && out.intact(), "%s n %zu", ops.name, n);
    }
}

void test_dequantize(const Ops& ops, Type type) {
    for (size_t n : SIZES) {
        if (!fits(type, n)) continue;
        Matrix m(type, n, 1);
        for (size_t begin : {size_t(0), n / 2 / QK * QK}) {
            Guarded<float> out(n - begin);
            ops.dequantize(type, begin, n - begin, m.row(0), out.data());
            bool equal = true;
            for (size_t k = begin; k < n; k++) equal = equal && out[k - begin] == m.values[k];
            CHECK(equal && out.intact(), "%s %s n %zu from %zu", ops.name, TYPE_NAMES[int(type)], n, begin);
        }
    }
}

void check_quantised(const Ops& ops, size_t n, Guarded<float> x, const char* what) {
    Blocks out(ops, n, x.data()), expected(scalar(), n, x.data());
    CHECK(out.intact(), "%s %s", ops.name, what);
    for (size_t b = 0; b < n / QK; b++) {
        const float* in = x.data() + b * QK;
        float max = 0;
        int sum = 0;
        bool near = true;
        for (size_t k = 0; k < QK; k++) {
            max = std::max(max, std::fabs(in[k]));
            sum += out.q[b * QK + k];
            // half a step, and the rounding of the step itself; X8_TINY for blocks that count as 0
            near = near && std::fabs(double(out.d[b]) * out.q[b * QK + k] - in[k]) <= out.d[b] * 0.5001 + X8_TINY;
        }
        CHECK(near && out.sum[b] == out.d[b] * float(sum), "%s %s block %zu", ops.name, what, b);
        CHECK(out.d[b] == (max >= X8_TINY ? max / 127 : 0), "%s %s block %zu", ops.name, what, b);
        CHECK(std::memcmp(&out.q[b * QK], &expected.q[b * QK], QK) == 0 && same_bits(&out.d[b], &expected.d[b], 1),
              "%s %s block %zu", ops.name, what, b);
    }
}

void test_quantize(const Ops& ops) {
    for (size_t n : {32, 64, 576, 4096}) check_quantised(ops, n, normals(n), "normal");
    for (float v : {0.0f, -0.0f, DENORMAL, 1e-37f, 2e-36f, 1.0f, -3e38f}) {
        Guarded<float> x(QK);
        for (size_t k = 0; k < QK; k++) x[k] = v * (float(k) / 31);
        check_quantised(ops, QK, std::move(x), "ramp");
    }
    for (float bad : {NaN, -NaN, Inf, -Inf}) {
        for (size_t at : {32, 39, 40, 63}) {
            Guarded<float> x = normals(96);
            x[at] = bad;
            Blocks out(ops, 96, x.data());
            CHECK(std::isnan(out.d[1]) && std::isnan(out.sum[1]), "%s %g at %zu", ops.name, double(bad), at);
            CHECK(std::all_of(&out.q[QK], &out.q[QK] + QK, [](int8_t q) { return q == 0; }), "%s", ops.name);
            CHECK(std::isfinite(out.d[0]) && std::isfinite(out.d[2]) && out.intact(), "%s", ops.name);
        }
    }
}

// ---- matvec

void test_matvec(const Ops& ops, Type type) {
    for (size_t n : SIZES) {
        if (!fits(type, n)) continue;
        Input in(n);
        for (size_t n_rows : {0, 1, 2, 3, 4, 5, 7, 8, 9, 17}) {
            Matrix m(type, n, n_rows);
            Guarded<float> out(n_rows);
            ops.matvec(type, n, m.bytes.data(), m.stride, n_rows, in.vector(type), out.data());
            bool near = true, alone = true;
            for (size_t i = 0; i < n_rows; i++) {
                Exact exact;
                for (size_t k = 0; k < n; k++) exact.add(m.value(i)[k] * in.value(type, k));
                near = near && exact.near(out[i]);
                float single;
                ops.matvec(type, n, m.row(i), m.stride, 1, in.vector(type), &single);
                alone = alone && same_bits(&single, &out[i], 1);
            }
            CHECK(near && out.intact(), "%s %s n %zu rows %zu", ops.name, TYPE_NAMES[int(type)], n, n_rows);
            CHECK(alone, "%s %s n %zu rows %zu: a row's sum depends on its place", ops.name, TYPE_NAMES[int(type)], n,
                  n_rows);
        }
    }
}

void test_picked(const Ops& ops, Type type) {
    constexpr size_t N_ROWS = 40;
    for (size_t n : SIZES) {
        if (!fits(type, n)) continue;
        Matrix m(type, n, N_ROWS);
        Input in(n);
        Guarded<float> all(N_ROWS);
        ops.matvec(type, n, m.bytes.data(), m.stride, N_ROWS, in.vector(type), all.data());
        for (uint32_t share : {0, 1, 3, 20, 100}) {  // percent that is picked
            std::vector<uint32_t> ids;
            for (uint32_t i = 0; i < N_ROWS; i++) {
                if (share == 1 ? i == 7 : random_bits() % 100 < share) ids.push_back(i);
            }
            Guarded<float> out(ids.size());
            ops.matvec_picked(type, n, m.bytes.data(), m.stride, ids.data(), ids.size(), nullptr, in.vector(type),
                              out.data());
            bool equal = true;
            for (size_t i = 0; i < ids.size(); i++) equal = equal && same_bits(&out[i], &all[ids[i]], 1);
            CHECK(equal && out.intact(), "%s %s n %zu picked %zu", ops.name, TYPE_NAMES[int(type)], n, ids.size());
        }
    }
}

// What rounding x to 8 bits costs: steps of max / 127, so d^2 / 12 a value; for normal x that is 2e-5 of its square.
void test_quantised_input(const Ops& ops) {
    constexpr size_t N = 4096, N_ROWS = 64;
    for (Type type : {Type::Q4_0, Type::Q8_0}) {
        Matrix m(type, N, N_ROWS);
        Input in(N);
        Guarded<float> out(N_ROWS);
        ops.matvec(type, N, m.bytes.data(), m.stride, N_ROWS, in.vector(type), out.data());
        double error = 0, square = 0;
        for (size_t i = 0; i < N_ROWS; i++) {
            double exact = 0;
            for (size_t k = 0; k < N; k++) exact += m.value(i)[k] * in.x[k];
            error += (out[i] - exact) * (out[i] - exact);
            square += exact * exact;
        }
        CHECK(error <= 1e-4 * square, "%s %s: NMSE %g", ops.name, TYPE_NAMES[int(type)], error / square);
    }
}

// A number that is not finite, in x or in one row.
void test_matvec_bundles(const Ops& ops, Type type) {
    for (size_t n : SIZES) {
        if (!fits(type, n)) continue;
        Input in(n);
        for (size_t n_parts : {2, 3}) {
            for (size_t n_bundles : {0, 1, 3, 4, 9}) {
                Guarded<uint8_t> bundles(n_bundles * n_parts * bytes_of(type, n));
                Matrix m(type, n, n_bundles * n_parts);
                for (size_t i = 0; i < n_bundles * n_parts; i++)
                    std::memcpy(&bundles[i * bytes_of(type, n)], m.row(i), bytes_of(type, n));
                Guarded<float> out(n_bundles * (n_parts - 1));
                ops.matvec_bundles(type, n, bundles.data(), n_parts, n_bundles, in.vector(type), out.data());
                bool same = true;
                for (size_t i = 0; i < n_bundles * (n_parts - 1); i++) {
                    float alone;
                    size_t row = i / (n_parts - 1) * n_parts + i % (n_parts - 1);
                    ops.matvec(type, n, m.row(row), m.stride, 1, in.vector(type), &alone);
                    same = same && same_bits(&alone, &out[i], 1);
                }
                CHECK(same && out.intact(), "%s %s n %zu parts %zu bundles %zu", ops.name, TYPE_NAMES[int(type)], n,
                      n_parts, n_bundles);
            }
        }
    }
}

void test_matvec_not_finite(const Ops& ops, Type type) {
    constexpr size_t N_ROWS = 11;
    for (size_t n : {32, 64, 96, 4096}) {
        for (size_t at : {size_t(0), size_t(31), n / 2, n - 1}) {
            for (float bad : {NaN, Inf}) {
                Matrix m(type, n, N_ROWS);
                Guarded<float> x = normals(n), out(N_ROWS);
                x[at] = bad;
                Input broken(std::move(x), n), whole(n);
                ops.matvec(type, n, m.bytes.data(), m.stride, N_ROWS, broken.vector(type), out.data());
                CHECK(std::none_of(out.begin(), out.end(), [](float v) { return std::isfinite(v); }), "%s %s", ops.name,
                      TYPE_NAMES[int(type)]);
                const uint32_t bits = bad == Inf ? 0x7c00 : 0x7e00;  // as float16; as float32 its upper half is larger
                const uint32_t single = bad == Inf ? 0x7f800000 : 0x7fc00000;
                const size_t place = quantised(type) ? at / QK * block_size(type) : bytes_of(type, at);
                std::memcpy(m.row(5) + place, type == Type::F32 ? &single : &bits, type == Type::F32 ? 4 : 2);
                ops.matvec(type, n, m.bytes.data(), m.stride, N_ROWS, whole.vector(type), out.data());
                for (size_t i = 0; i < N_ROWS; i++)
                    CHECK(std::isfinite(out[i]) == (i != 5), "%s %s row %zu", ops.name, TYPE_NAMES[int(type)], i);
            }
        }
    }
}

void test_denormals(const Ops& ops) {
    Guarded<float> weights(9), x(9), out(1);
    for (size_t k = 0; k < 9; k++) weights[k] = 1, x[k] = DENORMAL;
    ops.matvec(Type::F32, 9, reinterpret_cast<uint8_t*>(weights.data()), 36, 1, {x.data(), {}}, out.data());
    CHECK(out[0] == 9 * DENORMAL, "%s: denormals are flushed", ops.name);
    const uint16_t smallest[] = {1, 1, 1};
    ops.dequantize(Type::F16, 0, 3, reinterpret_cast<const uint8_t*>(smallest), out.data());
    CHECK(out[0] == 0x1p-24f, "%s", ops.name);
}

// ---- add_rows

void test_add_rows(const Ops& ops, Type type) {
    for (size_t n : SIZES) {
        if (!fits(type, n)) continue;
        Matrix m(type, n, 40);
        for (size_t n_ids : {0, 1, 2, 3, 5, 8, 9, 23, 40}) {
            std::vector<uint32_t> ids;
            std::vector<float> h;
            for (size_t i = 0; i < n_ids; i++) {
                ids.push_back(uint32_t(random_bits() % 40));
                h.push_back(i % 3 == 1 ? (i % 2 ? 0.0f : -0.0f) : normal());
            }
            Guarded<float> acc = normals(n), before = acc, expected = acc;
            ops.add_rows(type, n, m.bytes.data(), m.stride, ids.data(), h.data(), n_ids, nullptr, acc.data());
            scalar().add_rows(type, n, m.bytes.data(), m.stride, ids.data(), h.data(), n_ids, nullptr, expected.data());
            bool near = true;
            for (size_t j = 0; j < n; j++) {
                Exact exact;
                exact.add(before[j]);
                for (size_t i = 0; i < n_ids; i++) exact.add(double(h[i]) * m.value(ids[i])[j]);
                near = near && exact.near(acc[j]);
            }
            CHECK(near && acc.intact(), "%s %s n %zu ids %zu", ops.name, TYPE_NAMES[int(type)], n, n_ids);
            CHECK(same_bits(acc.data(), expected.data(), n), "%s %s n %zu ids %zu: not the scalar's bits", ops.name,
                  TYPE_NAMES[int(type)], n, n_ids);
            Guarded<float> beside = before;  // while what comes next is prefetched
            ops.add_rows(type, n, m.bytes.data(), m.stride, ids.data(), h.data(), n_ids, m.row(0), beside.data());
            CHECK(same_bits(beside.data(), acc.data(), n) && beside.intact(), "%s %s n %zu ids %zu: next", ops.name,
                  TYPE_NAMES[int(type)], n, n_ids);
        }
    }
}

// Skipping rows with h == 0, or the columns in parts, changes no bit.
void test_add_rows_skips(const Ops& ops, Type type) {
    constexpr size_t N = 96;
    Matrix m(type, N, 30);
    std::vector<uint32_t> ids, kept_ids;
    std::vector<float> h, kept;
    for (uint32_t i = 0; i < 30; i++) {
        ids.push_back(i);
        h.push_back(random_bits() % 2 ? normal() : 0.0f);
        if (h.back() != 0) kept_ids.push_back(i), kept.push_back(h.back());
    }
    Guarded<float> with = normals(N), without = with, parts = with;
    ops.add_rows(type, N, m.bytes.data(), m.stride, ids.data(), h.data(), 30, nullptr, with.data());
    ops.add_rows(type, N, m.bytes.data(), m.stride, kept_ids.data(), kept.data(), kept.size(), nullptr, without.data());
    CHECK(same_bits(with.data(), without.data(), N), "%s %s", ops.name, TYPE_NAMES[int(type)]);
    for (size_t begin : {0, 64}) {
        const size_t count = begin == 0 ? 64 : 32;
        ops.add_rows(type, count, m.bytes.data() + bytes_of(type, begin), m.stride, ids.data(), h.data(), 30, nullptr,
                     parts.data() + begin);
    }
    CHECK(same_bits(with.data(), parts.data(), N), "%s %s", ops.name, TYPE_NAMES[int(type)]);

    // a row that is skipped is not even looked at: -0 stays -0, and what is not finite in it stays there
    std::fill(m.bytes.begin(), m.bytes.end(), uint8_t(0xff));
    Guarded<float> acc(N), before(N);
    for (size_t j = 0; j < N; j++) acc[j] = before[j] = j % 2 ? -0.0f : NaN;
    const std::vector<float> zeros(30, -0.0f);
    ops.add_rows(type, N, m.bytes.data(), m.stride, ids.data(), zeros.data(), 30, nullptr, acc.data());
    CHECK(same_bits(acc.data(), before.data(), N), "%s %s", ops.name, TYPE_NAMES[int(type)]);

    Matrix finite(type, N, 3);
    const uint32_t rows[] = {0, 1, 2};
    const float broken[] = {1, NaN, 1};
    Guarded<float> sums = normals(N);
    ops.add_rows(type, N, finite.bytes.data(), finite.stride, rows, broken, 3, nullptr, sums.data());
    CHECK(std::all_of(sums.begin(), sums.end(), [](float v) { return std::isnan(v); }), "%s %s", ops.name,
          TYPE_NAMES[int(type)]);
}

// ---- matrix-matrix

void test_gemm(const Ops& ops) {
    for (size_t n_k : SIZES) {
        for (size_t n_t : {0, 1, 2, 5, 6, 7, 12, 17}) {
            const size_t ldx = n_k + 3, ldc = TILE_ROWS + 5;
            Guarded<float> x = normals(n_t * ldx), packed = normals(n_k * TILE_ROWS), c = normals(n_t * ldc);
            for (bool accumulate : {false, true}) {
                Guarded<float> got = c;
                ops.gemm_tile(n_t, n_k, x.data(), ldx, packed.data(), got.data(), ldc, accumulate);
                bool near = true, alone = true, gaps = true, split = true;
                for (size_t t = 0; t < n_t; t++) {
                    Guarded<float> row(TILE_ROWS), halves(TILE_ROWS);
                    std::copy_n(&c[t * ldc], TILE_ROWS, row.data());
                    std::copy_n(&c[t * ldc], TILE_ROWS, halves.data());
                    const float* xt = x.data() + t * ldx;
                    const size_t half = n_k / 2;
                    ops.gemm_tile(1, n_k, xt, ldx, packed.data(), row.data(), TILE_ROWS, accumulate);
                    ops.gemm_tile(1, half, xt, ldx, packed.data(), halves.data(), TILE_ROWS, accumulate);
                    ops.gemm_tile(1, n_k - half, xt + half, ldx, packed.data() + half * TILE_ROWS, halves.data(),
                                  TILE_ROWS, true);
                    alone = alone && same_bits(row.data(), &got[t * ldc], TILE_ROWS);
                    split = split && same_bits(halves.data(), &got[t * ldc], TILE_ROWS);
                    gaps = gaps && same_bits(&got[t * ldc + TILE_ROWS], &c[t * ldc + TILE_ROWS], ldc - TILE_ROWS);
                    for (size_t j = 0; j < TILE_ROWS; j++) {
                        Exact exact;
                        if (accumulate) exact.add(c[t * ldc + j]);
                        for (size_t k = 0; k < n_k; k++) exact.add(double(xt[k]) * packed[k * TILE_ROWS + j]);
                        near = near && exact.near(got[t * ldc + j]);
                    }
                }
                CHECK(near && gaps && got.intact(), "%s n_k %zu n_t %zu", ops.name, n_k, n_t);
                CHECK(alone && split, "%s n_k %zu n_t %zu: sums depend on n_t or on how k is cut", ops.name, n_k, n_t);
                Guarded<float> expected = c;
                scalar().gemm_tile(n_t, n_k, x.data(), ldx, packed.data(), expected.data(), ldc, accumulate);
                CHECK(same_bits(got.data(), expected.data(), n_t * ldc), "%s n_k %zu n_t %zu: not the scalar's bits",
                      ops.name, n_k, n_t);
            }
        }
    }
    Guarded<float> x = normals(7 * 16), packed = normals(16 * TILE_ROWS), c(7 * TILE_ROWS);
    x[3 * 16 + 15] = NaN;
    ops.gemm_tile(7, 16, x.data(), 16, packed.data(), c.data(), TILE_ROWS, false);
    for (size_t i = 0; i < 7 * TILE_ROWS; i++)
        CHECK(std::isnan(c[i]) == (i / TILE_ROWS == 3), "%s: NaN in row 3, c[%zu] = %g", ops.name, i, double(c[i]));
}

void test_pack(const Ops& ops, Type type) {
    for (size_t n : SIZES) {
        if (!fits(type, n)) continue;
        for (size_t n_rows : {1, 7, 8, 9, 16}) {
            Matrix m(type, n, n_rows);
            Guarded<float> packed(n * TILE_ROWS);
            ops.pack_rows(type, n, m.bytes.data(), m.stride, n_rows, packed.data());
            bool equal = true;
            for (size_t k = 0; k < n; k++) {
                for (size_t j = 0; j < TILE_ROWS; j++)
                    equal = equal && packed[k * TILE_ROWS + j] == (j < n_rows ? m.value(j)[k] : 0);
            }
            CHECK(equal && packed.intact(), "%s %s n %zu rows %zu", ops.name, TYPE_NAMES[int(type)], n, n_rows);
        }
    }
}

// ---- matrix-matrix in 8 bits

void test_quantize_batch(const Ops& ops) {
    constexpr size_t N = 96;
    for (float bad : {0.0f, NaN, Inf}) {
        Guarded<float> x = normals(N);
        x[40] = bad;
        Guarded<BatchX8> out(N / QK, 4);
        Blocks expected(scalar(), N, x.data());
        ops.quantize_batch8(N, x.data(), out.data());
        for (size_t b = 0; b < N / QK; b++) {
            int sum = 0;
            for (size_t k = 0; k < QK; k++) sum += expected.q[b * QK + k];
            const bool same = std::memcmp(out[b].q, &expected.q[b * QK], QK) == 0 && out[b].minus8 == -8 * sum;
            CHECK(same && std::memcmp(&out[b].d, &expected.d[b], 4) == 0, "%s block %zu", ops.name, b);
        }
        CHECK(out.intact(), "%s", ops.name);
    }
}

double packed_value(const Packed8& block, int zero, size_t j, size_t k) {
    return double(block.d[j]) * (block.q[k / 4][j][k % 4] - zero);
}

void test_pack_rows8(const Ops& ops, Type type) {
    for (size_t n : SIZES) {
        if (!fits(type, n)) continue;
        for (size_t n_rows : {1, 7, 8, 9, 31, 32}) {
            Matrix m(type, n, n_rows);
            Guarded<Packed8> packed(n / QK, 4);
            ops.pack_rows8(type, n, m.bytes.data(), m.stride, n_rows, packed.data());
            bool equal = true;
            for (size_t j = 0; j < TILE8_ROWS; j++) {
                for (size_t k = 0; k < n; k++)
                    equal = equal && packed_value(packed[k / QK], zero_of_rows(type), j, k % QK) ==
                                         (j < n_rows ? m.value(j)[k] : 0);
            }
            CHECK(equal && packed.intact(), "%s %s n %zu rows %zu", ops.name, TYPE_NAMES[int(type)], n, n_rows);
        }
    }
}

void test_pack_columns8(const Ops& ops, Type type) {
    for (size_t n_rows : {1, 31, 32, 33, 64, 333}) {
        Matrix m(type, TILE8_ROWS, n_rows);
        for (size_t b = 0; b < 2 && n_rows > 32; b++) {  // a column's block of zeros, and one that is as good as zero
            const uint16_t half = uint16_t(b);
            for (size_t i = 32 * b; i < std::min(n_rows, 32 * (b + 1)); i++) std::memcpy(m.row(i), &half, 2);
        }
        m.decode();
        const size_t n_b = (n_rows + QK - 1) / QK;
        Guarded<Packed8> packed(n_b, 4), expected(n_b, 4);
        ops.pack_columns8(type, n_rows, m.bytes.data(), m.stride, packed.data());
        scalar().pack_columns8(type, n_rows, m.bytes.data(), m.stride, expected.data());
        bool near = true;
        for (size_t j = 0; j < TILE8_ROWS; j++) {
            for (size_t k = 0; k < n_b * QK; k++) {
                const double exact = k < n_rows ? m.value(k)[j] : 0;
                const Packed8& block = packed[k / QK];
                near =
                    near && std::fabs(packed_value(block, ZERO_OF_COLUMNS, j, k % QK) - exact) <= 0.5001 * block.d[j];
            }
        }
        CHECK(near && packed.intact(), "%s %s rows %zu", ops.name, TYPE_NAMES[int(type)], n_rows);
        CHECK(std::memcmp(packed.data(), expected.data(), n_b * sizeof(Packed8)) == 0, "%s %s rows %zu", ops.name,
              TYPE_NAMES[int(type)], n_rows);
    }
    Matrix m(type, TILE8_ROWS, 70);
    const uint16_t bad[] = {0x7c00, 0x7e00};  // Inf and NaN as float16
    for (uint16_t half : bad) {
        std::memcpy(m.row(40), &half, 2);
        Guarded<Packed8> packed(3, 4);
        ops.pack_columns8(type, 70, m.bytes.data(), m.stride, packed.data());
        for (size_t b = 0; b < 3; b++) {
            for (float d : packed[b].d) CHECK(std::isnan(d) == (b == 1), "%s block %zu", ops.name, b);
        }
    }
}

Guarded<Packed8> random_tile(size_t n_b, int zero) {
    Guarded<Packed8> packed(n_b, 4);
    for (Packed8& block : packed) {
        for (float& d : block.d) d = normal();
        for (size_t k = 0; k < QK; k++) {
            for (size_t j = 0; j < TILE8_ROWS; j++) {
                // one block has the largest products that there are
                const int q = int(random_bits() % (2 * unsigned(zero))), extreme = zero == 8 ? 15 : 0;
                block.q[k / 4][j][k % 4] = uint8_t(&block == packed.data() ? extreme : q);
            }
        }
    }
    return packed;
}

void test_gemm8(const Ops& ops, int zero) {
    for (size_t n_b : {0, 1, 2, 5, 16}) {
        for (size_t n_t : {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 17}) {
            const size_t ldx = n_b + 1, ldc = TILE8_ROWS + 5;
            Guarded<Packed8> packed = random_tile(n_b, zero);
            Guarded<BatchX8> x(n_t * ldx, 4);
            for (size_t t = 0; t < n_t; t++) {
                Guarded<float> values = normals(n_b * QK);
                for (size_t k = 0; k < std::min(n_b, size_t(1)) * QK; k++) values[k] = t % 2 ? -1.0f : 1.0f;
                scalar().quantize_batch8(n_b * QK, values.data(), x.data() + t * ldx);
            }
            Guarded<float> c = normals(n_t * ldc);
            for (bool accumulate : {false, true}) {
                Guarded<float> got = c, expected = c, halves = c;
                ops.gemm8(zero, n_t, n_b, x.data(), ldx, packed.data(), got.data(), ldc, accumulate);
                scalar().gemm8(zero, n_t, n_b, x.data(), ldx, packed.data(), expected.data(), ldc, accumulate);
                CHECK(same_bits(got.data(), expected.data(), n_t * ldc) && got.intact(),
                      "%s zero %d blocks %zu n_t %zu: not the scalar's bits", ops.name, zero, n_b, n_t);
                const size_t half = n_b / 2;
                ops.gemm8(zero, n_t, half, x.data(), ldx, packed.data(), halves.data(), ldc, accumulate);
                ops.gemm8(zero, n_t, n_b - half, x.data() + half, ldx, packed.data() + half, halves.data(), ldc, true);
                CHECK(same_bits(got.data(), halves.data(), n_t * ldc), "%s zero %d blocks %zu n_t %zu in halves",
                      ops.name, zero, n_b, n_t);
            }
        }
    }
}

// The scalar definition against float64: c = the product of what the blocks stand for.
void test_gemm8_means(Type type) {
    constexpr size_t N = 256, N_T = 3;
    Matrix m(type, N, TILE8_ROWS);
    std::vector<Packed8> packed(N / QK);
    scalar().pack_rows8(type, N, m.bytes.data(), m.stride, TILE8_ROWS, packed.data());
    Guarded<float> x = normals(N_T * N), c(N_T * TILE8_ROWS);
    std::vector<BatchX8> x8(N_T * N / QK);
    scalar().quantize_batch8(N_T * N, x.data(), x8.data());
    scalar().gemm8(zero_of_rows(type), N_T, N / QK, x8.data(), N / QK, packed.data(), c.data(), TILE8_ROWS, false);
    for (size_t t = 0; t < N_T; t++) {
        for (size_t j = 0; j < TILE8_ROWS; j++) {
            Exact exact;
            for (size_t k = 0; k < N; k++) {
                const BatchX8& block = x8[(t * N + k) / QK];
                exact.add(double(block.d) * block.q[k % QK] * m.value(j)[k]);
            }
            CHECK(exact.near(c[t * TILE8_ROWS + j]), "%s token %zu row %zu", TYPE_NAMES[int(type)], t, j);
        }
    }
}

// ---- norms, softmax, rotation, activation

bool all_nan(Guarded<float>& x) {
    return std::all_of(x.begin(), x.end(), [](float v) { return std::isnan(v); });
}

// Each value is a handful of roundings away from the exact one: 1e-6 of it, and of the terms that it is made of.
bool near(float got, double exact, double terms = 0, double bound = 1e-6) {
    return std::fabs(got - exact) <= bound * (std::fabs(exact) + terms) + 0x1p-149;
}

void test_norms(const Ops& ops) {
    constexpr float EPS = 1e-5f;
    for (size_t n : SIZES) {
        Guarded<float> x = normals(n), weight = normals(n), bias = normals(n), rms(n), layer(n);
        for (float& v : x) v += 3;
        double squares = 0, sum = 0, spread = 0;
        for (float v : x) squares += double(v) * v, sum += v;
        const double mean = sum / double(n);
        for (float v : x) spread += (v - mean) * (v - mean);
        const double rms_scale = 1 / std::sqrt(squares / double(n) + EPS);
        const double layer_scale = 1 / std::sqrt(spread / double(n) + EPS);
        ops.rms_norm(n, x.data(), weight.data(), EPS, rms.data());
        ops.layer_norm(n, x.data(), weight.data(), bias.data(), EPS, layer.data());
        bool rms_near = true, layer_near = true;
        for (size_t i = 0; i < n; i++) {
            const double normal = (x[i] - mean) * layer_scale;
            // the mean's own rounding is that of a number of size 3, scaled
            const double terms = std::fabs(weight[i]) * (std::fabs(normal) + 3 * layer_scale) + std::fabs(bias[i]);
            rms_near = rms_near && near(rms[i], x[i] * rms_scale * weight[i]);
            layer_near = layer_near && near(layer[i], normal * weight[i] + bias[i], terms);
        }
        CHECK(rms_near && rms.intact(), "%s n %zu", ops.name, n);
        CHECK(layer_near && layer.intact(), "%s n %zu", ops.name, n);
        Guarded<float> unit = x, by_ones = x, ones = x;
        for (float& v : ones) v = 1;
        ops.rms_norm(n, x.data(), nullptr, EPS, unit.data());
        ops.rms_norm(n, x.data(), ones.data(), EPS, by_ones.data());
        CHECK(same_bits(unit.data(), by_ones.data(), n) && unit.intact(), "%s n %zu without weights", ops.name, n);
        Guarded<float> rms_in_place = x, layer_in_place = x;
        ops.rms_norm(n, rms_in_place.data(), weight.data(), EPS, rms_in_place.data());
        ops.layer_norm(n, layer_in_place.data(), weight.data(), bias.data(), EPS, layer_in_place.data());
        CHECK(same_bits(rms_in_place.data(), rms.data(), n), "%s n %zu in place", ops.name, n);
        CHECK(same_bits(layer_in_place.data(), layer.data(), n), "%s n %zu in place", ops.name, n);
        x[n - 1] = NaN;
        ops.rms_norm(n, x.data(), weight.data(), EPS, rms.data());
        ops.layer_norm(n, x.data(), weight.data(), bias.data(), EPS, layer.data());
        CHECK(all_nan(rms) && all_nan(layer), "%s n %zu", ops.name, n);
    }
}

void test_softmax(const Ops& ops) {
    for (size_t n : SIZES) {
        Guarded<float> x = normals(n);
        for (float& v : x) v = v * 20 + 1000;
        if (n > 8) x[3] = -Inf, x[8] = x[7] - 95;
        double max = -Inf, sum = 0;
        for (float v : x) max = std::max(max, double(v));
        for (float v : x) sum += std::exp(v - max);
        Guarded<float> out = x;
        ops.softmax(n, out.data());
        bool close = true;
        for (size_t i = 0; i < n; i++) close = close && near(out[i], std::exp(x[i] - max) / sum, 1e-38);
        CHECK(close && out.intact(), "%s n %zu", ops.name, n);
        CHECK(n <= 8 || out[3] == 0, "%s n %zu: exp(-Inf) = %g", ops.name, n, double(out[3]));
        for (size_t at : {size_t(0), n / 2, n - 1}) {
            Guarded<float> broken = x;
            broken[at] = NaN;
            ops.softmax(n, broken.data());
            CHECK(all_nan(broken), "%s n %zu NaN at %zu", ops.name, n, at);
        }
    }
}

void test_silu(const Ops& ops) {
    for (size_t n : SIZES) {
        Guarded<float> x(n);
        for (size_t i = 0; i < n; i++) x[i] = normal() * (i % 2 ? 2.0f : 40.0f);
        if (n > 8) x[1] = 0, x[2] = DENORMAL, x[3] = 200, x[4] = -200, x[5] = Inf, x[6] = NaN, x[7] = -87.9f;
        Guarded<float> out = x;
        ops.silu(n, out.data());
        for (size_t i = 0; i < n; i++) {
            // three roundings of 2^-24, that of exp among them; where exp(-x) overflows the result is -0, 1e-36 off at
            // most
            const double exact = std::isinf(x[i]) ? double(x[i]) : x[i] / (1 + std::exp(-double(x[i])));
            CHECK(std::isfinite(exact) ? near(out[i], exact, 1e-29, 2e-7)
                  : std::isnan(exact)  ? std::isnan(out[i])
                                       : out[i] > 0,
                  "%s silu(%g) = %g", ops.name, double(x[i]), double(out[i]));
        }
        CHECK(out.intact(), "%s n %zu", ops.name, n);
    }
}

void test_rope(const Ops& ops) {
    for (size_t n : {2, 8, 14, 16, 18, 40, 64, 128}) {
        Guarded<float> x = normals(n), cos(n / 2), sin(n / 2), out = x;
        for (size_t i = 0; i < n / 2; i++) cos[i] = std::cos(float(i)), sin[i] = std::sin(float(i));
        ops.rope(n, out.data(), cos.data(), sin.data());
        bool close = out.intact();
        for (size_t i = 0; i < n / 2; i++) {
            const double a = x[i], b = x[i + n / 2];
            close = close && near(out[i], a * cos[i] - b * sin[i], std::fabs(a) + std::fabs(b)) &&
                    near(out[i + n / 2], a * sin[i] + b * cos[i], std::fabs(a) + std::fabs(b));
        }
        CHECK(close, "%s n %zu", ops.name, n);
        x[n - 1] = NaN;
        ops.rope(n, x.data(), cos.data(), sin.data());
        for (size_t i = 0; i < n; i++)
            CHECK(std::isnan(x[i]) == (i == n - 1 || i == n / 2 - 1), "%s n %zu i %zu", ops.name, n, i);
    }
}

// ---- attention

void test_attention(const Ops& ops) {
    for (size_t dim : {1, 7, 8, 40, 64, 80, 128}) {
        for (size_t n_pos : {1, 2, 7, 8, 9, 33}) {
            const size_t stride = dim + 3;
            Guarded<float> q = normals(dim), weights = normals(n_pos), scores(n_pos), mix(dim);
            Guarded<uint16_t> cache(n_pos * stride);
            for (uint16_t& v : cache) v = f32_to_f16(normal());
            ops.attention_scores(dim, n_pos, q.data(), cache.data(), stride, 0.25f, scores.data());
            ops.attention_mix(dim, n_pos, weights.data(), cache.data(), stride, mix.data());
            bool close = scores.intact() && mix.intact();
            std::vector<Exact> columns(dim);
            for (size_t p = 0; p < n_pos; p++) {
                Exact score;
                for (size_t j = 0; j < dim; j++) {
                    score.add(0.25 * q[j] * from_f16(cache[p * stride + j]));
                    columns[j].add(weights[p] * from_f16(cache[p * stride + j]));
                }
                close = close && score.near(scores[p]);
            }
            for (size_t j = 0; j < dim; j++) close = close && columns[j].near(mix[j]);
            CHECK(close, "%s dim %zu positions %zu", ops.name, dim, n_pos);
            weights[n_pos - 1] = NaN;
            q[dim - 1] = NaN;
            ops.attention_scores(dim, n_pos, q.data(), cache.data(), stride, 0.25f, scores.data());
            ops.attention_mix(dim, n_pos, weights.data(), cache.data(), stride, mix.data());
            CHECK(all_nan(scores) && all_nan(mix), "%s dim %zu positions %zu", ops.name, dim, n_pos);
        }
    }
}

void test_choice() {
    CHECK(choose_ops(1) == &scalar() && choose_ops(2) == avx2() && choose_ops(3) == avx512(), "choose_ops");
    CHECK(choose_ops(4) == nullptr, "choose_ops");
    CHECK(choose_ops(0) == (avx512() ? avx512() : avx2() ? avx2() : &scalar()), "the best is not chosen");
}

void test_table(const Ops& ops) {
    test_to_f16(ops);
    test_quantize(ops);
    test_quantised_input(ops);
    test_denormals(ops);
    for (Type type : TYPES) {
        test_dequantize(ops, type);
        test_matvec(ops, type);
        test_picked(ops, type);
        test_matvec_bundles(ops, type);
        test_matvec_not_finite(ops, type);
        test_add_rows(ops, type);
        test_add_rows_skips(ops, type);
        test_pack(ops, type);
    }
    test_gemm(ops);
    test_quantize_batch(ops);
    for (Type type : {Type::Q4_0, Type::Q8_0}) {
        test_pack_rows8(ops, type);
        test_pack_columns8(ops, type);
    }
    for (int zero : {8, 128}) test_gemm8(ops, zero);
    test_norms(ops);
    test_softmax(ops);
    test_silu(ops);
    test_rope(ops);
    test_attention(ops);
}

}  // namespace

int main() {
    test_f16();
    test_choice();
    for (Type type : {Type::Q4_0, Type::Q8_0}) test_gemm8_means(type);
    test_table(scalar());
    if (avx2()) test_table(*avx2());
    // both ways of asking memory, on whichever processor
    for (bool intel : {false, true}) {
        if (avx512()) test_table(with_avx512(*avx2_table, intel));
    }
    std::printf("test_ops: scalar%s%s: %zu checks, %zu failed\n", avx2() ? ", avx2" : "", avx512() ? ", avx512" : "",
                n_checks, n_failures);
    return n_failures ? 1 : 0;
}
