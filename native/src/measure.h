// How fast this machine reads memory and files: what decode speed is held against.
#pragma once

#include <cstdint>

namespace pi {

// Bytes per second of plain reads in sequence by n_threads threads, the most that memory gives: of several ways to ask
// for what comes next the best, of each the median of `repeats`.
double measure_memory(uint32_t n_threads, uint64_t buffer_bytes, uint32_t repeats);

// The same as the engine's operations read weights: Q4_0 rows of row_bytes (a multiple of 18), all of them in sequence
// (stride_rows 1) or one in stride_rows, ascending.
double measure_rows(uint32_t n_threads, uint64_t buffer_bytes, uint64_t row_bytes, uint32_t stride_rows,
                    uint32_t repeats);

// Bytes per second of the disk tier's reader, past the page cache where that works: reads of read_bytes (whole blocks
// of 4096) at random places of the file, n_at_once of them and the next ones when all are done, for so many seconds.
double measure_file(int fd, uint64_t file_bytes, uint32_t read_bytes, uint32_t n_at_once, double seconds);

}  // namespace pi
