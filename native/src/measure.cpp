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
#include "reader.h"
#include "threads.h"

namespace pi {

namespace {

// 32 bytes as the compiler's widest registers take them, from any address.
typedef uint64_t Words __attribute__((vector_size(32), aligned(1), may_alias));

// Sums words in four chains: enough loads in flight for the memory. `ahead` and `then` are read next: the lines of
// `ahead`, and after the first `left` bytes those of `then`, are asked for as this row's are summed. NULL: none.
uint64_t sum_words(const uint8_t* data, uint64_t n_bytes, const uint8_t* ahead, const uint8_t* then, uint64_t left) {
    Words sums[4] = {};
    for (uint64_t i = 0; i + 128 <= n_bytes; i += 128) {
        if (ahead) {
            const uint8_t* line = i < left ? ahead + i : then + (i - left);
            __builtin_prefetch(line);
            __builtin_prefetch(line + 64);
        }
        const Words* words = reinterpret_cast<const Words*>(data + i);
        for (int j = 0; j < 4; j++) sums[j] += words[j];
    }
    Words sum = sums[0] + sums[1] + sums[2] + sums[3];
    return sum[0] + sum[1] + sum[2] + sum[3];
}

// One row of each group of `stride`, at no fixed distance that hardware could foresee.
uint64_t picked_row(uint64_t p, uint32_t stride) { return p * stride + (p * 0x9e3779b97f4a7c15u >> 40) % stride; }

constexpr uint64_t AHEAD_BYTES = 2048;  // along the picked rows: hardware does not foresee where the next one lies

class Huge {
   public:
    explicit Huge(uint64_t n) : n_(n) {
        void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            throw Error(PI_ERROR_MEMORY, "cannot allocate " + std::to_string(n) + " bytes to measure memory");
        data = static_cast<uint8_t*>(p);
        use_huge_pages(data, n);
        std::memset(data, 1, n);
    }
    ~Huge() { munmap(data, n_); }
    Huge(const Huge&) = delete;
    Huge& operator=(const Huge&) = delete;
    uint8_t* data;

   private:
    uint64_t n_;
};

}  // namespace

double measure_memory(uint32_t n_threads, uint64_t buffer_bytes, uint64_t row_bytes, uint32_t stride_rows,
                      uint32_t repeats) {
    Huge buffer(buffer_bytes);
    Pool pool(n_threads);
    uint64_t n_rows = buffer_bytes / row_bytes, n_picked = n_rows / stride_rows;
    uint64_t n_items = std::min<uint64_t>(n_picked, 64 * n_threads);
    uint64_t rows_ahead = AHEAD_BYTES / row_bytes, bytes_ahead = AHEAD_BYTES % row_bytes;
    auto at = [&](uint64_t p) { return buffer.data + row_bytes * picked_row(std::min(p, n_picked - 1), stride_rows); };
    std::atomic<uint64_t> sink{0};
    std::vector<double> rates;
    for (uint32_t r = 0; r <= repeats; r++) {  // the first warms up
        auto start = std::chrono::steady_clock::now();
        pool.run(n_items, [&](size_t item, uint32_t) {
            uint64_t sum = 0, begin = n_picked * item / n_items, end = n_picked * (item + 1) / n_items;
            for (uint64_t p = begin; p < end; p++) {
                const uint8_t* ahead = stride_rows > 1 ? at(p + rows_ahead) + bytes_ahead : nullptr;
                sum += sum_words(at(p), row_bytes, ahead, at(p + rows_ahead + 1), row_bytes - bytes_ahead);
            }
            sink += sum;
        });
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (r > 0) rates.push_back(static_cast<double>(n_picked * row_bytes) / seconds);
    }
    std::nth_element(rates.begin(), rates.begin() + static_cast<std::ptrdiff_t>(rates.size() / 2), rates.end());
    return rates[rates.size() / 2];
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
