// How fast this machine reads memory: what decode speed is held against.
#pragma once

#include <cstdint>

namespace pi {

// Bytes per second, the median of `repeats`: rows of row_bytes, one in `stride_rows`, ascending, by n_threads threads.
double measure_memory(uint32_t n_threads, uint64_t buffer_bytes, uint64_t row_bytes, uint32_t stride_rows,
                      uint32_t repeats);

}  // namespace pi
