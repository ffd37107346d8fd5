// Rounding, and medians of what is measured: for the engine and its CUDA part.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>

namespace pi {

constexpr uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
constexpr uint64_t align_up(uint64_t n, uint64_t alignment) { return ceil_div(n, alignment) * alignment; }

// By the wall clock.
template <class Step>
double seconds_of(Step&& step) {
    auto start = std::chrono::steady_clock::now();
    step();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Of what `seconds` says of its runs, the first of which warms up.
template <class Seconds>
double median_seconds(Seconds&& seconds) {
    std::array<double, 9> found;
    seconds();
    for (double& s : found) s = seconds();
    std::ranges::sort(found);
    return found[found.size() / 2];
}

}  // namespace pi
