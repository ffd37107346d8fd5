#include "measure.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "gguf.h"
#include "huge_pages.h"
#include "ops.h"
#include "reader.h"
#include "threads.h"

namespace pi {

namespace {

// 32 bytes, from any address.
typedef uint64_t Words __attribute__((vector_size(32), aligned(1), may_alias));

// Sums words in four chains: enough loads in flight for the memory. NEAR, FAR: bytes ahead that lines are asked for,
// into the first-level cache and the second (0: not).
template <size_t NEAR, size_t FAR>
[[gnu::always_inline]] inline uint64_t sum_words(const uint8_t* data, uint64_t n_bytes) {
    Words sums[4] = {};
    for (uint64_t i = 0; i + 128 <= n_bytes; i += 128) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(data) + i;
        for (uintptr_t line = at; line < at + 128; line += 64) {
            if (NEAR) __builtin_prefetch(reinterpret_cast<const void*>(line + NEAR), 0, 3);
            if (FAR) __builtin_prefetch(reinterpret_cast<const void*>(line + FAR), 0, 2);
        }
        const Words* words = reinterpret_cast<const Words*>(data + i);
        for (int j = 0; j < 4; j++) sums[j] += words[j];
    }
    Words sum = sums[0] + sums[1] + sums[2] + sums[3];
    return sum[0] + sum[1] + sum[2] + sum[3];
}

using Sum = uint64_t (*)(const uint8_t*, uint64_t);

template <size_t NEAR, size_t FAR>
uint64_t sum_plain(const uint8_t* data, uint64_t n_bytes) {
    return sum_words<NEAR, FAR>(data, n_bytes);
}

#if defined(__x86_64__)
// In registers of 32 bytes: with smaller ones a core is slower than what memory gives it.
template <size_t NEAR, size_t FAR>
[[gnu::target("avx2")]] uint64_t sum_wide(const uint8_t* data, uint64_t n_bytes) {
    return sum_words<NEAR, FAR>(data, n_bytes);
}

template <size_t NEAR, size_t FAR>
Sum choose_sum() {
    return __builtin_cpu_supports("avx2") ? sum_wide<NEAR, FAR> : sum_plain<NEAR, FAR>;
}
#else
template <size_t NEAR, size_t FAR>
Sum choose_sum() {
    return sum_plain<NEAR, FAR>;
}
#endif

// One row of each group of `stride`, at no fixed distance that hardware could foresee; another in each round, so that
// none is in a cache yet.
uint64_t picked_row(uint64_t p, uint32_t stride, uint64_t round) {
    return p * stride + ((p * 0x9e3779b97f4a7c15u >> 40) + round) % stride;
}

class Huge {
   public:
    explicit Huge(uint64_t n) : n_(n) {
        void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            throw Error(PI_ERROR_MEMORY, "cannot allocate " + std::to_string(n) + " bytes to measure memory");
        data = static_cast<uint8_t*>(p);
        use_huge_pages(data, n);
        std::memset(data, 0x3c, n);  // as Q4_0: scales near 1
    }
    ~Huge() { munmap(data, n_); }
    Huge(const Huge&) = delete;
    Huge& operator=(const Huge&) = delete;
    uint8_t* data;

   private:
    uint64_t n_;
};

// Bytes per second of n_items that read n_bytes in all: the median of `repeats` after one that warms up.
template <class Read>
double rate(Pool& pool, size_t n_items, uint64_t n_bytes, uint32_t repeats, const Read& read) {
    std::vector<double> rates;
    for (uint32_t r = 0; r <= repeats; r++) {
        auto start = std::chrono::steady_clock::now();
        pool.run(n_items, [&](size_t item, uint32_t) { read(item, r); });
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (r > 0) rates.push_back(static_cast<double>(n_bytes) / seconds);
    }
    std::nth_element(rates.begin(), rates.begin() + static_cast<std::ptrdiff_t>(rates.size() / 2), rates.end());
    return rates[rates.size() / 2];
}

constexpr uint64_t LINE = 128;  // bytes that are read at once
constexpr size_t ITEMS = 64;    // for each thread

}  // namespace

double measure_memory(uint32_t n_threads, uint64_t buffer_bytes, uint32_t repeats) {
    Huge buffer(buffer_bytes);
    Pool pool(n_threads);
    uint64_t n_lines = buffer_bytes / LINE;
    size_t n_items = std::min<uint64_t>(n_lines, ITEMS * n_threads);
    std::atomic<uint64_t> sink{0};
    double best = 0;  // processors differ in how they like to be asked
    for (Sum sum : {choose_sum<0, 0>(), choose_sum<4096, 0>(), choose_sum<2304, 4608>()})
        best = std::max(best, rate(pool, n_items, n_lines * LINE, repeats, [&](size_t item, uint32_t) {
                            uint64_t begin = n_lines * item / n_items, end = n_lines * (item + 1) / n_items;
                            sink += sum(buffer.data + begin * LINE, (end - begin) * LINE);
                        }));
    return best;
}

double measure_rows(uint32_t n_threads, uint64_t buffer_bytes, uint64_t row_bytes, uint32_t stride_rows,
                    uint32_t repeats) {
    Huge buffer(buffer_bytes);
    Pool pool(n_threads);
    const Ops& ops = *choose_ops(0);
    size_t n = row_bytes / sizeof(BlockQ4_0) * QK, n_picked = buffer_bytes / row_bytes / stride_rows;
    const uint32_t n_rounds = std::min(stride_rows, repeats + 1);
    std::vector<uint32_t> ids;
    for (uint32_t round = 0; round < n_rounds; round++)
        for (size_t p = 0; p < n_picked; p++) ids.push_back(static_cast<uint32_t>(picked_row(p, stride_rows, round)));
    std::vector<float> x(n, 1.0f), d(n / QK), sum(n / QK), out(n_picked);
    std::vector<int8_t> q(n);
    ops.quantize_x8(n, x.data(), {d.data(), sum.data(), q.data()});
    const Vector vector{x.data(), {d.data(), sum.data(), q.data()}};
    size_t n_items = std::min<size_t>(n_picked, ITEMS * n_threads);
    return rate(pool, n_items, n_picked * row_bytes, repeats, [&](size_t item, uint32_t r) {
        size_t begin = n_picked * item / n_items, some = n_picked * (item + 1) / n_items - begin;
        const uint8_t* first = buffer.data + begin * row_bytes;
        if (stride_rows == 1)
            ops.matvec(Type::Q4_0, n, first, row_bytes, some, vector, &out[begin]);
        else
            ops.matvec_picked(Type::Q4_0, n, buffer.data, row_bytes, &ids[r % n_rounds * n_picked + begin], some,
                              nullptr, vector, &out[begin]);
    });
}

double measure_file(int fd, uint64_t file_bytes, uint32_t read_bytes, uint32_t n_at_once, double seconds) {
    std::unique_ptr<Reader> reader = Reader::open(fd, 0);
    uint64_t block = reader->block();
    if (read_bytes % block != 0)
        throw Error(PI_ERROR_ARGUMENT, "read_bytes: expected a multiple of " + std::to_string(block));
    Huge buffer(uint64_t{n_at_once} * read_bytes);
    std::vector<Read> reads(n_at_once);
    std::atomic<uint32_t> pending{0};
    uint64_t n_places = (file_bytes - read_bytes) / block + 1;
    std::mt19937_64 random(read_bytes);
    uint64_t n_bytes = 0;
    double spent = 0;
    for (auto start = std::chrono::steady_clock::now(); spent < seconds;) {
        for (uint32_t i = 0; i < n_at_once; i++)
            reads[i] = {random() % n_places * block, read_bytes, read_bytes, buffer.data + uint64_t{i} * read_bytes,
                        &pending};
        pending.store(n_at_once);
        reader->submit(reads.data(), n_at_once);
        reader->wait(pending);
        reader->check();
        n_bytes += uint64_t{n_at_once} * read_bytes;
        spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    return static_cast<double>(n_bytes) / spent;
}

}  // namespace pi
