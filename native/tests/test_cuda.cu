// Every kernel of the CUDA part against the scalar operations: on a card (built by nvcc), or on the processor (built
// with the emulation). `test_cuda small` leaves out large sizes: for tools that slow a card down. A plain executable:
// prints what failed, and a line with the number of checks; exit code 1 if any failed.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "batch.h"
#include "check.h"
#include "memory.h"
#include "ops.h"

using namespace pi;
using namespace pi::card;

namespace {

bool small = false;

// Of what a token's kernels give, which sum as the scalar operations do, but in another order; and of tensor cores,
// which take float16: 11 bits of each factor.
constexpr double EXACT = 1e-10, IN_HALVES = 1e-6;

const Type TYPES[] = {Type::F32, Type::F16, Type::Q4_0, Type::Q8_0};
std::mt19937 random_bits(1);

float normal() {
    static std::normal_distribution<float> distribution;
    return distribution(random_bits);
}

std::vector<float> normals(size_t n, float scale = 1) {
    std::vector<float> x(n);
    for (float& v : x) v = normal() * scale;
    return x;
}

bool fits(Type type, size_t n) { return n % block_elements(type) == 0; }

// What lies on the card, between guard bytes that must stay as they are.
template <class T>
class OnCard {
   public:
    explicit OnCard(size_t n) : n_(n), memory_(2 * GUARD + align_up(n * sizeof(T), 16), true) {
        std::vector<uint8_t> bytes(memory_.bytes(), 0xa5);
        std::memset(bytes.data() + GUARD, 0, n * sizeof(T));
        check(cudaMemcpy(memory_.data(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "copy");
    }
    explicit OnCard(const std::vector<T>& values) : OnCard(values.size()) {
        check(cudaMemcpy(data(), values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), "copy");
    }
    T* data() const { return reinterpret_cast<T*>(memory_.data() + GUARD); }
    operator T*() const { return data(); }
    std::vector<T> read() const {
        std::vector<uint8_t> bytes(memory_.bytes());
        check(cudaMemcpy(bytes.data(), memory_.data(), bytes.size(), cudaMemcpyDeviceToHost), "copy");
        bool intact = true;
        for (size_t i = 0; i < GUARD; i++) intact &= bytes[i] == 0xa5;
        for (size_t i = GUARD + n_ * sizeof(T); i < bytes.size(); i++) intact &= bytes[i] == 0xa5;
        CHECK(intact, "guard bytes of %zu elements", n_);
        std::vector<T> values(n_);
        std::memcpy(values.data(), bytes.data() + GUARD, n_ * sizeof(T));
        return values;
    }

   private:
    static constexpr size_t GUARD = 256;
    size_t n_;
    Memory memory_;
};

template <class... P, class... A>
void run(void (*kernel)(P...), dim3 grid, uint32_t threads, uint32_t shared, A... args) {
    static Stream stream;
    check(launch(kernel, grid, threads, shared, stream, args...), "launch");
    stream.finish();
}

double nmse(const std::vector<float>& found, const std::vector<float>& expected) {
    double error = 0, power = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        if (!std::isfinite(found[i])) return INFINITY;
        error += (double(found[i]) - expected[i]) * (double(found[i]) - expected[i]);
        power += double(expected[i]) * expected[i];
    }
    return error == 0 ? 0 : error / std::max(power, 1e-30);
}

#define CHECK_CLOSE(found, expected, bound, ...)            \
    do {                                                    \
        const double far = nmse(found, expected);           \
        CHECK(far <= (bound), __VA_ARGS__);                 \
        if (far > (bound)) std::printf("  nmse %g\n", far); \
    } while (0)

// A matrix as in the file, and on the card.
struct Matrix {
    Type type;
    size_t n, n_rows;
    std::vector<uint8_t> bytes;
    OnCard<uint8_t> there;

    Matrix(Type type, size_t n, size_t n_rows)
        : type(type), n(n), n_rows(n_rows), bytes(row_bytes(type, n) * n_rows), there(packed()) {}
    const uint8_t* row(size_t i) const { return bytes.data() + i * row_bytes(type, n); }
    CardRows card() const { return {type, uint32_t(n), card_row_bytes(type, n), there.data()}; }

   private:
    std::vector<uint8_t> packed() {
        std::vector<uint8_t> out(card_row_bytes(type, n) * n_rows);
        for (size_t i = 0; i < n_rows; i++) {
            uint8_t* row = bytes.data() + i * row_bytes(type, n);
            for (size_t k = 0; k < n; k += block_elements(type))
                fill(row + k / block_elements(type) * block_bytes(type));
            repack_row(type, n, row, out.data() + i * card_row_bytes(type, n));
        }
        return out;
    }
    void fill(uint8_t* block) const {
        const float v = normal();
        const uint16_t half = f32_to_f16(type == Type::F16 ? v : v / 8);
        if (type == Type::F32) return void(std::memcpy(block, &v, 4));
        std::memcpy(block, &half, 2);
        for (size_t b = 2; b < block_bytes(type); b++) block[b] = uint8_t(random_bits());
    }
};

// A vector in both forms, on the card and here.
struct CardVector {
    size_t n, ld;
    std::vector<float> here;
    OnCard<float> f;
    OnCard<int8_t> q;
    OnCard<X8Block> blocks;
    std::vector<float> d, sum;
    std::vector<int8_t> q8;

    explicit CardVector(const std::vector<float>& values)
        : n(values.size()),
          ld(align_up(n, WARP)),
          here(values),
          f(ld),
          q(ld),
          blocks(ld / WARP),
          d(n % QK ? 0 : n / QK),
          sum(d.size()),
          q8(d.size() * QK) {
        OnCard<float> in(values);
        run(take, dim3(uint32_t((ld + THREADS - 1) / THREADS)), THREADS, 0,
            TakeJob{in, uint32_t(n), false, writing(), uint32_t(ld)});
        if (n % QK == 0) scalar().quantize_x8(n, here.data(), {d.data(), sum.data(), q8.data()});
    }
    MutableVec writing() const { return {f, q, blocks}; }
    Vec reading() const { return {f, q, blocks}; }
    Vector both() const { return {here.data(), {d.data(), sum.data(), q8.data()}}; }
};

std::vector<size_t> sizes() {
    if (small) return {1, 7, 32, 96, 576};
    return {1, 7, 31, 32, 33, 64, 96, 576, 1000, 4096, 4097};
}

// ---- vectors

void test_vectors() {
    for (size_t n : sizes()) {
        std::vector<float> x = normals(n, 3), weight = normals(n), bias = normals(n);
        CardVector v(x);
        std::vector<float> f = v.f.read();
        std::vector<int8_t> q = v.q.read();
        std::vector<X8Block> blocks = v.blocks.read();
        for (size_t i = 0; i < v.ld; i++) CHECK(f[i] == (i < n ? x[i] : 0), "copy of %zu at %zu", n, i);
        for (size_t i = 0; i < v.q8.size(); i++) CHECK(q[i] == v.q8[i], "quantised %zu at %zu", n, i);
        for (size_t b = 0; b < v.d.size(); b++)
            CHECK(blocks[b].d == v.d[b] && blocks[b].d * float(blocks[b].sum) == v.sum[b], "block %zu of %zu", b, n);
        const OnCard<float> in(x), w(weight), b(bias);
        for (Norming norming : {Norming::Rms, Norming::Layer}) {
            std::vector<float> expected(n);
            if (norming == Norming::Rms)
                scalar().rms_norm(n, x.data(), weight.data(), 1e-5f, expected.data());
            else
                scalar().layer_norm(n, x.data(), weight.data(), bias.data(), 1e-5f, expected.data());
            run(normalise, 1, std::min<uint32_t>(1024, uint32_t(v.ld)), 0,
                NormJob{in, uint32_t(n), norming, 1e-5f, w, norming == Norming::Layer ? b.data() : nullptr, v.writing(),
                        uint32_t(v.ld)});
            std::vector<float> found = v.f.read();
            for (size_t i = n; i < v.ld; i++) CHECK(found[i] == 0, "zeros behind a norm of %zu", n);
            found.resize(n);
            CHECK_CLOSE(found, expected, EXACT, "norm %d of %zu", int(norming), n);
        }
    }
    const std::vector<float> two = normals(2 * 300);
    const OnCard<float> in(two), taken(2 * 320);
    run(take, dim3(2, 2), THREADS, 0, TakeJob{in, 300, true, {taken, nullptr, nullptr}, 320});
    const std::vector<float> found = taken.read();
    for (size_t i = 0; i < found.size(); i++)
        CHECK(found[i] == (i % 320 < 300 ? std::max(0.0f, two[i / 320 * 300 + i % 320]) : 0), "taken at %zu", i);
    std::vector<float> x = normals(64);
    x[3] = NAN;
    CardVector broken(x);
    CHECK(std::isnan(broken.blocks.read()[0].d) && !std::isnan(broken.blocks.read()[1].d), "a block with NaN");
}

void test_matvec() {
    for (Type type : TYPES)
        for (size_t n : sizes()) {
            if (!fits(type, n)) continue;
            const size_t heights[] = {9, 1, 4};
            CardVector x(normals(n));
            MatvecJobs jobs{{}, x.reading(), true};
            std::vector<Matrix> matrices;
            std::vector<OnCard<float>> biases, outs;
            std::vector<std::vector<float>> expected;
            for (int j = 0; j < 3; j++) {
                const std::vector<float> bias = normals(heights[j]), before = normals(heights[j]);
                matrices.emplace_back(type, n, heights[j]);
                biases.emplace_back(bias);
                outs.emplace_back(before);
                std::vector<float> dots(heights[j]);
                scalar().matvec(type, n, matrices[j].row(0), row_bytes(type, n), heights[j], x.both(), dots.data());
                for (size_t i = 0; i < heights[j]; i++) dots[i] += before[i] + (j == 1 ? 0 : bias[i]);
                expected.push_back(dots);
                jobs.job[j] = {matrices[j].card(), uint32_t(heights[j]), j == 1 ? nullptr : biases[j].data(), outs[j]};
            }
            run(matvec, 4, 128, 0, jobs);
            for (int j = 0; j < 3; j++)
                CHECK_CLOSE(outs[j].read(), expected[j], EXACT, "matvec %s of %zu, job %d", type_name(type), n, j);
        }
}

void test_embed() {
    for (Type type : TYPES)
        for (size_t n : sizes()) {
            if (!fits(type, n)) continue;
            const Matrix table(type, n, 5);
            const OnCard<float> out(3 * n);
            std::vector<float> expected(3 * n);
            Tokens tokens{{4, 0, 2}};
            for (int t = 0; t < 3; t++) scalar().dequantize(type, 0, n, table.row(tokens.id[t]), &expected[t * n]);
            run(embed_rows, 3, THREADS, 0, table.card(), tokens, out.data());
            CHECK(out.read() == expected, "embed %s of %zu", type_name(type), n);
        }
}

void test_sums() {
    const size_t n = 300, n_parts = 19;
    const std::vector<float> parts = normals(n * n_parts), bias = normals(100), before = normals(n);
    std::vector<float> expected = before;
    for (size_t i = 0; i < n; i++) {
        for (size_t p = 0; p < n_parts; p++) expected[i] += parts[p * n + i];
        expected[i] += bias[i % 100];
    }
    const OnCard<float> in(parts), b(bias);
    for (uint32_t groups : {1u, WARPS}) {
        const OnCard<float> out(before);
        run(groups == 1 ? add_up<1> : add_up<WARPS>, (uint32_t(n) * groups + 255) / 256, 256, 0, in.data(),
            uint32_t(n_parts), uint32_t(n), b.data(), 100u, out.data(), true);
        CHECK_CLOSE(out.read(), expected, EXACT, "sum of parts by %u groups", groups);
    }
    const OnCard<float> copied(4 * 40);
    run(copy_rows, 1, 256, 0, in.data(), 50u, copied.data(), 40u, 30u, 4u);
    const std::vector<float> found = copied.read();
    for (size_t i = 0; i < found.size(); i++)
        CHECK(found[i] == (i % 40 < 30 ? parts[i / 40 * 50 + i % 40] : 0), "copied rows at %zu", i);
}

// ---- attention

struct HeadCase {
    uint32_t head_dim, n_head, n_head_kv, rotary_dim;
    bool normed;
    uint32_t before, n_tokens;
};

// What attention computes, by the scalar operations; the cache of the tokens before is drawn.
struct Attention {
    HeadCase c;
    uint32_t n_ctx, ld, n_pos;
    std::vector<float> q, k, v, cos, sin, out;
    std::vector<uint16_t> keys, values;  // (n_head_kv, n_ctx, head_dim)

    explicit Attention(const HeadCase& c)
        : c(c), n_ctx(c.before + c.n_tokens + 3), ld(uint32_t(align_up(c.head_dim, 8))), n_pos(c.before + c.n_tokens) {
        q = normals(c.n_tokens * c.n_head * c.head_dim);
        k = normals(c.n_tokens * c.n_head_kv * c.head_dim);
        v = normals(k.size());
        for (size_t i = 0; i < size_t(c.n_tokens) * (c.rotary_dim / 2); i++) {
            cos.push_back(std::cos(float(i)));
            sin.push_back(std::sin(float(i)));
        }
        const std::vector<float> drawn = normals(c.n_head_kv * n_ctx * c.head_dim);
        keys.resize(drawn.size());
        values.resize(drawn.size());
        scalar().to_f16(drawn.size(), drawn.data(), keys.data());
        scalar().to_f16(drawn.size(), normals(drawn.size()).data(), values.data());
    }

    std::vector<__half> on_card(const std::vector<uint16_t>& cache) const {
        std::vector<__half> padded(size_t(c.n_head_kv) * n_ctx * ld);
        std::memset(static_cast<void*>(padded.data()), 0, padded.size() * sizeof(__half));
        for (size_t i = 0; i < size_t(c.n_head_kv) * n_ctx; i++)
            std::memcpy(static_cast<void*>(&padded[i * ld]), &cache[i * c.head_dim], c.head_dim * 2);
        return padded;
    }

    void compute() {
        auto prepare = [&](float* x, size_t t) {
            const size_t half = c.rotary_dim / 2;
            if (c.rotary_dim > 0) scalar().rope(c.rotary_dim, x, &cos[t * half], &sin[t * half]);
            if (c.normed) scalar().rms_norm(c.head_dim, x, nullptr, 1e-5f, x);
        };
        out.resize(q.size());
        for (size_t t = 0; t < c.n_tokens; t++) {
            for (size_t h = 0; h < c.n_head_kv; h++) {
                float* key = &k[(t * c.n_head_kv + h) * c.head_dim];
                prepare(key, t);
                const size_t at = (h * n_ctx + c.before + t) * c.head_dim;
                scalar().to_f16(c.head_dim, key, &keys[at]);
                scalar().to_f16(c.head_dim, &v[(t * c.n_head_kv + h) * c.head_dim], &values[at]);
            }
            for (size_t h = 0; h < c.n_head; h++) {
                float* query = &q[(t * c.n_head + h) * c.head_dim];
                prepare(query, t);
                const size_t n = c.before + t + 1, at = h / (c.n_head / c.n_head_kv) * n_ctx * c.head_dim;
                std::vector<float> scores(n);
                scalar().attention_scores(c.head_dim, n, query, &keys[at], c.head_dim, 1 / std::sqrt(float(c.head_dim)),
                                          scores.data());
                scalar().softmax(n, scores.data());
                scalar().attention_mix(c.head_dim, n, scores.data(), &values[at], c.head_dim,
                                       &out[(t * c.n_head + h) * c.head_dim]);
            }
        }
    }
};

void attend_decoding(const Heads& heads, const Attention& a, const float* q, uint32_t n_splits) {
    const uint32_t sharing = heads.n_head / heads.n_head_kv, group = sharing >= 3 ? 4 : sharing;
    const OnCard<float> parts(heads.n_head * n_splits * (heads.ld + 2));
    const CardVector out(std::vector<float>(heads.n_head * heads.head_dim, 7.0f));
    const dim3 grid(n_splits, heads.n_head_kv * ((sharing + group - 1) / group));
    run(group == 1   ? attend_part<1>
        : group == 2 ? attend_part<2>
                     : attend_part<4>,
        grid, ATTENTION_WARPS * WARP, 0, heads, q, n_splits, parts.data());
    run(merge_parts, uint32_t((out.ld + 127) / 128), 128, 0, heads, n_splits, parts.data(), out.writing());
    std::vector<float> found = out.f.read();
    parts.read();
    for (size_t i = out.n; i < out.ld; i++) CHECK(found[i] == 0, "zeros behind heads");
    found.resize(out.n);
    CHECK_CLOSE(found, a.out, EXACT, "attention of heads of %u, %u to %u, %u positions, %u splits", heads.head_dim,
                heads.n_head, heads.n_head_kv, a.n_pos, n_splits);
}

void test_attention(const HeadCase& c) {
    Attention a(c);
    const OnCard<float> q(a.q), k(a.k), v(a.v), cos(a.cos), sin(a.sin), out(a.q.size());
    const OnCard<__half> keys(a.on_card(a.keys)), values(a.on_card(a.values));
    const OnCard<PassState> state(std::vector<PassState>{{c.before}});
    const Heads heads{c.n_head, c.n_head_kv, c.head_dim, a.ld, a.n_ctx, c.rotary_dim, c.normed,
                      1e-5f,    cos,         sin,        keys, values,  state};
    run(prepare_heads, dim3((c.n_head + c.n_head_kv + 3) / 4, c.n_tokens), 128, 0, heads, q.data(), k.data(), v.data());
    a.compute();
    CHECK_CLOSE(q.read(), a.q, EXACT, "queries of heads of %u", c.head_dim);
    auto floats = [](const std::vector<__half>& halves) {
        std::vector<float> out(halves.size());
        for (size_t i = 0; i < out.size(); i++) out[i] = __half2float(halves[i]);
        return out;
    };
    // A float16 may come out next to the expected one.
    CHECK_CLOSE(floats(keys.read()), floats(a.on_card(a.keys)), 1e-8, "keys of heads of %u", c.head_dim);
    CHECK_CLOSE(floats(values.read()), floats(a.on_card(a.values)), 0.0, "values of heads of %u", c.head_dim);
    if (c.n_tokens == 1) {
        for (uint32_t n_splits : {1u, 3u, 16u}) attend_decoding(heads, a, q, n_splits);
    } else {
        const uint32_t queries = c.head_dim > 128 ? 16 : 32;
        const uint32_t bytes =
            queries == 16 ? AttendLayout<16>(c.head_dim).bytes() : AttendLayout<32>(c.head_dim).bytes();
        CHECK(bytes <= 48 << 10, "shared memory for heads of %u", c.head_dim);
        run(queries == 16 ? attend_batch<16> : attend_batch<32>, dim3((c.n_tokens + queries - 1) / queries, c.n_head),
            BATCH_THREADS, bytes, heads, q.data(), c.n_tokens, out.data());
        CHECK_CLOSE(out.read(), a.out, IN_HALVES, "attention of %u tokens, heads of %u, %u before", c.n_tokens,
                    c.head_dim, c.before);
    }
}

void test_attention() {
    for (uint32_t before : {0u, 1u, 62u, 63u, 64u, 200u}) test_attention({64, 2, 1, 64, false, before, 1});
    for (uint32_t dim : {2u, 8u, 20u, 80u, 96u, 128u, 256u}) test_attention({dim, 4, 4, dim / 4 * 2, false, 70, 1});
    for (uint32_t sharing : {1u, 3u, 5u, 9u}) test_attention({32, 2 * sharing, 2, 0, true, 150, 1});
    for (uint32_t n : {2u, 31u, 33u}) test_attention({32, 4, 2, 16, true, n, n});
    for (uint32_t dim : {6u, 40u, 128u, 136u, 256u}) test_attention({dim, 2, 1, 0, false, 5, 17});
    if (small) return;
    test_attention({64, 8, 2, 64, false, 3000, 1});
    test_attention({64, 4, 2, 64, false, 100, 256});
}

// ---- the FFN

struct NeuronCase {
    Type type;
    uint32_t n_embd, n, rank, always;  // rank: 0 where no predictor is asked
    bool gated, dense, biased;
    Activation activation;
    float threshold;
};

float activated(const NeuronCase& c, float a) {
    if (c.activation == Activation::Silu) scalar().silu(1, &a);
    if (c.activation == Activation::FatRelu) return a <= c.threshold ? 0 : a;
    if (c.activation != Activation::Silu) a = a <= 0 ? 0 : a;
    if (c.activation == Activation::Relu2) a *= a;
    return std::fabs(a) < c.threshold ? 0 : a;
}

void test_neurons(const NeuronCase& c) {
    const Matrix select(c.type, c.n_embd, c.n), up(c.type, c.n_embd, c.gated ? c.n : 0), down(c.type, c.n_embd, c.n);
    const Matrix predictor(Type::F16, std::max(c.rank, 1u), c.n - c.always);
    const CardVector x(normals(c.n_embd, 0.1f)), rank(normals(std::max(c.rank, 1u)));
    const std::vector<float> select_bias = normals(c.n), up_bias = normals(c.n), asked_bias = normals(c.n - c.always);
    const OnCard<float> card_select_bias(select_bias), card_up_bias(up_bias), card_asked_bias(asked_bias), h(c.n);
    const uint32_t per_warp = c.n > 500 ? 3 : 1, segment = per_warp * WARPS, n_segments = (c.n + segment - 1) / segment;
    const OnCard<uint32_t> ids(c.n), n_ended(1), starts(n_segments + 1);
    const OnCard<Tally> tallies(n_segments);
    const OnCard<Counts> counts(1);
    run(choose_neurons, n_segments, THREADS, 0,
        Choosing{select.card(),
                 c.gated ? up.card() : CardRows{},
                 predictor.card(),
                 c.biased ? card_select_bias.data() : nullptr,
                 c.biased ? card_up_bias.data() : nullptr,
                 card_asked_bias,
                 c.n,
                 c.always,
                 c.rank > 0,
                 c.dense,
                 {c.activation, c.threshold, c.threshold > 0},
                 x.reading(),
                 rank.reading(),
                 per_warp,
                 ids,
                 h,
                 tallies,
                 n_ended,
                 starts,
                 counts});

    const Ops& ops = scalar();
    Counts expected_counts{};
    std::vector<float> expected(c.n_embd);
    for (uint32_t i = 0; i < c.n; i++) {
        float forecast, a, u;
        if (c.rank > 0 && i >= c.always) {
            expected_counts.asked++;
            ops.matvec(Type::F16, c.rank, predictor.row(i - c.always), 0, 1, rank.both(), &forecast);
            if (forecast + asked_bias[i - c.always] < 0) continue;
        }
        expected_counts.computed++;
        ops.matvec(c.type, c.n_embd, select.row(i), 0, 1, x.both(), &a);
        a = activated(c, a + (c.biased ? select_bias[i] : 0));
        if (a == 0 && !c.dense) continue;
        expected_counts.active++;
        if (c.gated) {
            ops.matvec(c.type, c.n_embd, up.row(i), 0, 1, x.both(), &u);
            u += c.biased ? up_bias[i] : 0;
            a *= c.activation == Activation::DRelu && u <= 0 ? 0 : u;
        }
        expected_counts.fired += a != 0;
        const uint32_t first = 0;
        ops.add_rows(c.type, c.n_embd, down.row(i), 0, &first, &a, 1, nullptr, expected.data());
    }
    const Counts found = counts.read()[0];
    CHECK(found.computed == expected_counts.computed && found.active == expected_counts.active &&
              found.fired == expected_counts.fired && found.asked == expected_counts.asked,
          "counts of %u neurons: %llu %llu %llu %llu", c.n, found.computed, found.active, found.fired, found.asked);
    ids.read(), h.read(), tallies.read();
    CHECK(n_ended.read()[0] == 0 && starts.read()[n_segments] == expected_counts.fired, "segments of %u neurons", c.n);

    const uint32_t n_tiles = (pieces_of(c.type, c.n_embd) + WARP - 1) / WARP;
    for (uint32_t n_parts : {1u, 5u}) {
        const OnCard<float> parts(n_parts * c.n_embd), sum(c.n_embd);
        const Adding adding{down.card(), n_segments, segment, ids, starts, h, parts};
#define PI_ADD(T) run(add_down<T>, dim3(n_tiles, n_parts), THREADS, adding_bytes<T>(n_segments), adding)
        PI_FOR_TYPE(c.type, PI_ADD)
#undef PI_ADD
        run(add_up<1>, (c.n_embd + 255) / 256, 256, 0, parts.data(), n_parts, c.n_embd, nullptr, 1u, sum.data(), false);
        parts.read();
        CHECK_CLOSE(sum.read(), expected, EXACT, "%u neurons of %s, %u embd, rank %u, activation %d, in %u parts", c.n,
                    type_name(c.type), c.n_embd, c.rank, int(c.activation), n_parts);
    }
}

void test_neurons() {
    const Activation all[] = {Activation::Relu, Activation::Relu2, Activation::FatRelu, Activation::DRelu,
                              Activation::Silu};
    for (Type type : TYPES) {
        for (Activation activation : all)
            test_neurons({type, 64, 75, 0, 0, true, false, true, activation,
                          activation == Activation::Silu || activation == Activation::FatRelu ? 0.2f : 0.0f});
        test_neurons({type, 96, 32, 16, 8, false, false, false, Activation::Relu, 0});
        test_neurons({type, 544, 130, 24, 5, true, false, false, Activation::Relu, 0});
        test_neurons({type, 1056, 64, 0, 0, true, true, true, Activation::Silu, 0});
        if (!small) test_neurons({type, 1056, 1000, 64, 100, true, false, true, Activation::Relu, 0});
    }
    test_neurons({Type::F32, 33, 9, 7, 2, true, false, true, Activation::Relu, 0});
    test_neurons({Type::F16, 100, 1, 0, 0, false, true, true, Activation::Relu, 0});
}

// ---- batches

struct CardHalves {
    uint32_t n, n_tokens;
    OnCard<float> in;
    OnCard<__half> x;
    OnCard<float> back;
    Halves halves;
    CardHalves(const std::vector<float>& values, uint32_t n)
        : n(n),
          n_tokens(uint32_t(values.size() / n)),
          in(values),
          x(n_tokens * align_up(n, WARP)),
          back(n_tokens),
          halves{x, back, uint32_t(align_up(n, WARP))} {
        run(halve, n_tokens, THREADS, 0, in.data(), n, n, halves);
    }
};

void test_halves() {
    std::vector<float> values = normals(5 * 70);
    for (size_t i = 0; i < values.size(); i++) values[i] *= std::pow(10.0f, float(i / 70) * 5 - 9);  // 1e-9 to 1e11
    for (size_t i = 0; i < 70; i++) values[70 + i] = 0;
    const CardHalves h(values, 70);
    const std::vector<__half> x = h.x.read();
    const std::vector<float> back = h.back.read();
    for (size_t t = 0; t < 5; t++) {
        std::vector<float> found, expected;
        for (size_t i = 0; i < 70; i++) {
            found.push_back(__half2float(x[t * 96 + i]) * back[t]);
            expected.push_back(values[t * 70 + i]);
        }
        CHECK_CLOSE(found, expected, 1e-7, "float16 of token %zu", t);
        for (size_t i = 70; i < 96; i++) CHECK(__half2float(x[t * 96 + i]) == 0, "zeros behind float16");
    }
}

// rows: (n_rows, n) met by n_tokens vectors; columns: the rows are added with the vectors as weights.
void test_gemm(Type type, uint32_t n, uint32_t n_rows, uint32_t n_tokens, bool columns, float scale) {
    const Matrix w(type, n, n_rows);
    const uint32_t n_in = columns ? n_rows : n, n_out = columns ? n : n_rows;
    const std::vector<float> x = normals(size_t(n_tokens) * n_in, scale), bias = normals(n_out);
    std::vector<float> expected(size_t(n_tokens) * n_out), row(n);
    for (uint32_t i = 0; i < n_rows; i++) {
        scalar().dequantize(type, 0, n, w.row(i), row.data());
        for (uint32_t t = 0; t < n_tokens; t++)
            for (uint32_t k = 0; k < n; k++)
                if (columns)
                    expected[t * n_out + k] += x[t * n_in + i] * row[k];
                else
                    expected[t * n_out + i] += x[t * n_in + k] * row[k];
    }
    const CardHalves h(x, n_in);
    const OnCard<float> card_bias(bias), out(expected.size());
    const dim3 grid((n_out + TILE_OUT - 1) / TILE_OUT, (n_tokens + TILE_TOKENS - 1) / TILE_TOKENS);
    for (bool add : {false, true}) {
        const GemmJob job{w.card(), n_rows, h.halves, n_tokens, add ? card_bias.data() : nullptr, out, n_out, add};
#define PI_GEMM(T) \
    columns ? run(gemm<T, true>, grid, THREADS, GEMM_BYTES, job) : run(gemm<T, false>, grid, THREADS, GEMM_BYTES, job)
        PI_FOR_TYPE(type, PI_GEMM)
#undef PI_GEMM
        if (add)
            for (size_t i = 0; i < expected.size(); i++) expected[i] += expected[i] + bias[i % n_out];
        CHECK_CLOSE(out.read(), expected, IN_HALVES, "%u tokens, %s of %u by %u, columns %d, scale %g", n_tokens,
                    type_name(type), n, n_rows, columns, double(scale));
    }
}

void test_gemm() {
    for (Type type : TYPES)
        for (bool columns : {false, true}) {
            test_gemm(type, 64, 32, 2, columns, 1);
            test_gemm(type, 160, 130, 65, columns, 1e6f);
            test_gemm(type, 32, 5, 33, columns, 1e-6f);
            if (!small) test_gemm(type, 576, 300, 256, columns, 1);
        }
    for (bool columns : {false, true}) {
        test_gemm(Type::F32, 37, 3, 3, columns, 1);
        test_gemm(Type::F16, 13, 41, 3, columns, 1);
        test_gemm(Type::F16, 1, 1, 1, columns, 1);
    }
}

void test_firing(bool gated, bool forecast) {
    const uint32_t n = 50, n_tokens = 3, first = 8, always = 12;
    const std::vector<float> select = normals(n * n_tokens), up = normals(n * n_tokens),
                             asked = normals((n + first - always) * n_tokens);
    const OnCard<float> card_select(select), card_up(up), card_asked(asked), back(n_tokens);
    const OnCard<__half> x(n_tokens * 64);
    const OnCard<ScoreCounts> counts(1);
    const Activating relu{Activation::Relu, 0, false};
    run(fire_neurons, n_tokens, THREADS, 0,
        BatchNeurons{card_select,
                     gated ? card_up.data() : nullptr,
                     forecast ? card_asked.data() : nullptr,
                     n,
                     first,
                     always,
                     n + first - always,
                     relu,
                     true,
                     counts,
                     {x, back, 64}});
    ScoreCounts expected{};
    std::vector<float> h;
    for (uint32_t t = 0; t < n_tokens; t++)
        for (uint32_t i = 0; i < n; i++) {
            const float a = std::max(select[t * n + i], 0.0f), value = gated ? a * up[t * n + i] : a;
            const bool predicted =
                !forecast ? a != 0 : first + i < always || asked[t * (n + first - always) + first + i - always] >= 0;
            expected.n_true += value != 0;
            expected.n_predicted += predicted;
            expected.n_hit += value != 0 && predicted;
            h.push_back(predicted ? value : 0);
        }
    const std::vector<__half> halves = x.read();
    const std::vector<float> scales = back.read();
    std::vector<float> found;
    for (uint32_t i = 0; i < n * n_tokens; i++)
        found.push_back(__half2float(halves[i / n * 64 + i % n]) * scales[i / n]);
    CHECK_CLOSE(found, h, 1e-6, "what fires of a batch, gated %d, forecast %d", gated, forecast);
    const ScoreCounts c = counts.read()[0];
    CHECK(c.n_true == expected.n_true && c.n_predicted == expected.n_predicted && c.n_hit == expected.n_hit,
          "counts of a batch: %llu %llu %llu", c.n_true, c.n_predicted, c.n_hit);
}

void test_begin() {
    const OnCard<PassState> state(1);
    const OnCard<float> inv_freq(std::vector<float>{1.0f, 0.1f, 0.001f}), cos(6), sin(6);
    run(begin_pass, 1, 256, 0, state.data(), 1000u, 2u, 3u, inv_freq.data(), 0.5f, cos.data(), sin.data());
    CHECK(state.read()[0].position == 1000, "position");
    const float freq[] = {1.0f, 0.1f, 0.001f};
    std::vector<float> expected_cos, expected_sin;
    for (int i = 0; i < 6; i++) {
        const float angle = float(1000 + i / 3) * freq[i % 3];
        expected_cos.push_back(std::cos(angle) * 0.5f);
        expected_sin.push_back(std::sin(angle) * 0.5f);
    }
    CHECK_CLOSE(cos.read(), expected_cos, EXACT, "cos");
    CHECK_CLOSE(sin.read(), expected_sin, EXACT, "sin");
}

}  // namespace

int main(int argc, char** argv) {
    small = argc > 1 && std::strcmp(argv[1], "small") == 0;
    try {
        choose_card();
        test_vectors();
        test_matvec();
        test_embed();
        test_sums();
        test_begin();
        test_attention();
        test_neurons();
        test_halves();
        test_gemm();
        for (bool gated : {false, true})
            for (bool forecast : {false, true}) test_firing(gated, forecast);
    } catch (const Error& error) {
        std::printf("%s\n", error.what());
        return 1;
    }
    std::printf("%zu checks, %zu failed\n", n_checks, n_failures);
    return n_failures ? 1 : 0;
}
