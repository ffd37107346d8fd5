#include "measure.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "gguf.h"
#include "threads.h"

namespace pi {

namespace {

// Sums 8-byte words in eight chains: enough loads in flight for the memory, with any compiler.
uint64_t sum_words(const uint8_t* data, uint64_t n_bytes) {
    uint64_t sums[8] = {};
    uint64_t i = 0;
    for (; i + 64 <= n_bytes; i += 64) {
        uint64_t words[8];
        std::memcpy(words, data + i, 64);
        for (int j = 0; j < 8; j++) sums[j] += words[j];
    }
    uint64_t sum = 0;
    for (uint64_t s : sums) sum += s;
    return sum;
}

class Huge {
   public:
    explicit Huge(uint64_t n) : n_(n) {
        void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            throw Error(PI_ERROR_MEMORY, "cannot allocate " + std::to_string(n) + " bytes to measure memory");
        data = static_cast<uint8_t*>(p);
        madvise(data, n, MADV_HUGEPAGE);
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
    std::atomic<uint64_t> sink{0};
    std::vector<double> rates;
    for (uint32_t r = 0; r <= repeats; r++) {  // the first warms up
        auto start = std::chrono::steady_clock::now();
        pool.run(n_items, [&](size_t item, uint32_t) {
            uint64_t sum = 0;
            for (uint64_t p = n_picked * item / n_items; p < n_picked * (item + 1) / n_items; p++) {
                uint64_t jitter =
                    stride_rows > 1 ? (p * 0x9e3779b97f4a7c15u >> 40) % stride_rows : 0;  // no fixed stride to foresee
                sum += sum_words(buffer.data + (p * stride_rows + jitter) * row_bytes, row_bytes);
            }
            sink += sum;
        });
        double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (r > 0) rates.push_back(static_cast<double>(n_picked * row_bytes) / seconds);
    }
    std::nth_element(rates.begin(), rates.begin() + static_cast<std::ptrdiff_t>(rates.size() / 2), rates.end());
    return rates[rates.size() / 2];
}

}  // namespace pi
