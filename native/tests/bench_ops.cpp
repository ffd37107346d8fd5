// How fast the operations read weights: GB/s of one thread beside a plain read of the same buffer, and Gflop/s of the
// matrix-matrix tile. bench_ops [MiB [n [kernels]]]: the size of the matrix (default 512; larger than any cache),
// its row length, and the table (as in pi_session_params).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ops.h"

using namespace pi;

namespace {

constexpr int REPEATS = 7;
constexpr size_t HUGE_PAGE = size_t(1) << 21;

struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint8_t, Free>;

Buffer allocate(size_t n) {
    n = (n + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    Buffer buffer(static_cast<uint8_t*>(std::aligned_alloc(HUGE_PAGE, n)));
    if (!buffer) std::exit(1);
#if defined(__linux__)
    madvise(buffer.get(), n, MADV_HUGEPAGE);
#endif
    return buffer;
}

// Median seconds of the processor in REPEATS calls: other processes take its time, but not this measure of it.
double seconds(const std::function<void()>& work) {
    std::vector<double> times;
    for (int i = 0; i < REPEATS; i++) {
        const std::clock_t start = std::clock();
        work();
        times.push_back(double(std::clock() - start) / CLOCKS_PER_SEC);
    }
    std::nth_element(times.begin(), times.begin() + REPEATS / 2, times.end());
    return times[REPEATS / 2];
}

volatile uint64_t sink;

// Eight independent sums, so that only the loads cost.
void plain_read(const uint8_t* data, size_t n_bytes) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i + 64 <= n_bytes; i += 64) {
        uint64_t words[8];
        std::memcpy(words, data + i, 64);
        for (int w = 0; w < 8; w++) sums[w] += words[w];
    }
    for (uint64_t sum : sums) sink = sink + sum;
}

size_t row_size(Type type, size_t n) {
    if (type == Type::Q4_0) return n / QK * sizeof(BlockQ4_0);
    if (type == Type::Q8_0) return n / QK * sizeof(BlockQ8_0);
    return n * (type == Type::F32 ? 4 : 2);
}

// Every 16 bits are a small positive float16 (and half of a small float32): finite, and no denormals on the way.
void fill(uint8_t* data, size_t n_bytes) {
    std::minstd_rand random(1);
    for (size_t i = 0; i + 2 <= n_bytes; i += 2) {
        const uint16_t half = uint16_t(0x2000 + random() % 0x1000);
        std::memcpy(data + i, &half, 2);
    }
}

std::vector<uint32_t> pick(size_t n_rows, unsigned percent) {
    std::minstd_rand random(7);
    std::vector<uint32_t> ids;
    for (uint32_t i = 0; i < n_rows; i++) {
        if (random() % 100 < percent) ids.push_back(i);
    }
    return ids;
}

void line(const char* operation, const char* type, size_t bytes, double time, double ceiling) {
    const double speed = double(bytes) / time * 1e-9;
    std::printf("%-24s %-5s %8.1f GB/s %6.0f %%\n", operation, type, speed, 100 * speed / ceiling);
}

void bench_type(const Ops& ops, Type type, const char* name, const uint8_t* data, size_t n_bytes, size_t n,
                double ceiling) {
    const size_t stride = row_size(type, n), n_rows = n_bytes / stride;
    const std::vector<uint32_t> tenth = pick(n_rows, 10);
    std::vector<float> x(n, 0.5f), out(n_rows), acc(n, 0.0f), h(n_rows, 0.001f);
    std::vector<float> d(n / QK), sum(n / QK);
    std::vector<int8_t> q(n);
    ops.quantize_x8(n, x.data(), {d.data(), sum.data(), q.data()});
    const Vector v{x.data(), {d.data(), sum.data(), q.data()}};
    line("matvec", name, n_rows * stride, seconds([&] { ops.matvec(type, n, data, stride, n_rows, v, out.data()); }),
         ceiling);
    line("matvec_picked 10 %", name, tenth.size() * stride,
         seconds([&] { ops.matvec_picked(type, n, data, stride, tenth.data(), tenth.size(), nullptr, v, out.data()); }),
         ceiling);
    line("add_rows 10 %", name, tenth.size() * stride, seconds([&] {
             ops.add_rows(type, n, data, stride, tenth.data(), h.data(), tenth.size(), nullptr, acc.data());
         }),
         ceiling);
    // the same in the second-level cache: what the operation itself can do
    const size_t few = std::min(n_rows, (size_t(256) << 10) / stride), rounds = 1000;
    std::vector<uint32_t> all(few);
    for (uint32_t i = 0; i < few; i++) all[i] = i;
    line("matvec, in cache", name, few * stride * rounds, seconds([&] {
             for (size_t i = 0; i < rounds; i++) ops.matvec(type, n, data, stride, few, v, out.data());
         }),
         ceiling);
    line("add_rows, in cache", name, few * stride * rounds, seconds([&] {
             for (size_t i = 0; i < rounds; i++)
                 ops.add_rows(type, n, data, stride, all.data(), h.data(), few, nullptr, acc.data());
         }),
         ceiling);
}

void bench_gemm(const Ops& ops) {
    constexpr size_t N_T = 48, N_K = 256, ROUNDS = 2000;
    std::vector<float> x(N_T * N_K, 0.5f), packed(N_K * TILE_ROWS, 0.5f), c(N_T * TILE_ROWS);
    const double time = seconds([&] {
        for (size_t i = 0; i < ROUNDS; i++)
            ops.gemm_tile(N_T, N_K, x.data(), N_K, packed.data(), c.data(), TILE_ROWS, false);
    });
    std::printf("%-24s %-5s %8.1f Gflop/s\n", "gemm_tile 48 x 16 x 256", "f32",
                2e-9 * double(N_T * N_K * TILE_ROWS * ROUNDS) / time);
}

// A tile of rows in 8 bits: the product with all tokens, and what packing it costs beside that.
void bench_gemm8(const Ops& ops, const uint8_t* data) {
    constexpr size_t N_T = 120, N_K = 512, ROUNDS = 300;
    const size_t n_b = N_K / QK;
    std::vector<float> x(N_K, 0.5f), c(N_T * TILE8_ROWS);
    std::vector<BatchX8> x8(N_T * n_b);
    for (size_t t = 0; t < N_T; t++) ops.quantize_batch8(N_K, x.data(), &x8[t * n_b]);
    std::vector<Packed8> packed(n_b);
    const auto show = [](const char* what, const char* type, double products, double time) {
        std::printf("%-24s %-5s %8.1f Gop/s\n", what, type, 2e-9 * products * double(N_K * TILE8_ROWS * ROUNDS) / time);
    };
    for (Type type : {Type::Q4_0, Type::Q8_0}) {
        const char* name = type == Type::Q4_0 ? "q4_0" : "q8_0";
        const double packing = seconds([&] {
            for (size_t i = 0; i < ROUNDS; i++)
                ops.pack_rows8(type, N_K, data, row_size(type, N_K), TILE8_ROWS, packed.data());
        });
        show("pack_rows8 32 x 512", name, 0.5, packing);  // elements, not products
        show("gemm8 120 x 32 x 512", name, N_T, seconds([&] {
                 for (size_t i = 0; i < ROUNDS; i++)
                     ops.gemm8(zero_of_rows(type), N_T, n_b, x8.data(), n_b, packed.data(), c.data(), TILE8_ROWS,
                               false);
             }));
        show("pack_columns8 512 x 32", name, 0.5, seconds([&] {
                 for (size_t i = 0; i < ROUNDS; i++)
                     ops.pack_columns8(type, N_K, data, row_size(type, TILE8_ROWS), packed.data());
             }));
    }
}

}  // namespace

int main(int argc, char** argv) {
    const size_t n_bytes = size_t(argc > 1 ? std::atoi(argv[1]) : 512) << 20;
    const size_t n = size_t(argc > 2 ? std::atoi(argv[2]) : 4096) / QK * QK;
    if (n_bytes == 0 || n == 0) return std::printf("usage: bench_ops [MiB [n [kernels]]]\n"), 2;
    const Ops* chosen = choose_ops(argc > 3 ? uint32_t(std::atoi(argv[3])) : 0);
    if (!chosen) return std::printf("this processor has no such kernels\n"), 1;
    const Ops& ops = *chosen;
    const Buffer data = allocate(n_bytes);
    fill(data.get(), n_bytes);
    const double ceiling = double(n_bytes) / seconds([&] { plain_read(data.get(), n_bytes); }) * 1e-9;
    std::printf("%s, rows of %zu, %zu MiB, one thread, median of %d\n", ops.name, n, n_bytes >> 20, REPEATS);
    line("plain read", "", n_bytes, double(n_bytes) / ceiling * 1e-9, ceiling);
    bench_type(ops, Type::Q4_0, "q4_0", data.get(), n_bytes, n, ceiling);
    bench_type(ops, Type::Q8_0, "q8_0", data.get(), n_bytes, n, ceiling);
    bench_type(ops, Type::F16, "f16", data.get(), n_bytes, n, ceiling);
    bench_type(ops, Type::F32, "f32", data.get(), n_bytes, n, ceiling);
    bench_gemm(ops);
    bench_gemm8(ops, data.get());
}
