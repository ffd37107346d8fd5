// The artifact's container: a bounds-checked reader of GGUF version 3. Reads the header only; every number from the
// file goes through checked arithmetic and is validated before anything is allocated for it.
// Limits and rules are those of powerinfer_tools/checkpoint/gguf_file.py (strict), tested equal.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "powerinfer.h"

namespace pi {

// Carries a status across the engine; turned into a pi_status at the C interface.
struct Error : std::runtime_error {
    Error(pi_status status, const std::string& message) : std::runtime_error(message), status(status) {}
    pi_status status;
};

// ggml's ids.
enum class Type : uint32_t { F32 = 0, F16 = 1, Q4_0 = 2, Q8_0 = 8, I32 = 26 };
const char* type_name(Type type);
uint64_t block_elements(Type type);  // 32 for Q8_0 and Q4_0, else 1
uint64_t block_bytes(Type type);
// Bytes of n elements; throws MALFORMED where n is no multiple of the block or the product overflows.
uint64_t row_bytes(Type type, uint64_t n);

struct Tensor {
    std::string name;
    Type type;
    uint32_t n_dims;
    uint64_t ne[4];     // fastest first, 1 beyond n_dims
    uint64_t offset;    // from the start of the file
    uint64_t n_bytes;
};

// Values of the metadata, by kind. Strings and arrays of strings stay in the file (only their place is kept):
// the engine needs none of their texts but a few short ones.
struct Value {
    uint32_t type;              // GGUF value type id
    uint32_t element_type;      // of arrays
    uint64_t n;                 // elements of an array, bytes of a string
    uint64_t bits;              // scalars, as stored (sign- or zero-extended; float32 and float64 as bits)
    std::string text;           // strings of at most 4096 bytes
    std::vector<double> numbers;  // arrays of numbers of at most 65536 elements
};

struct Gguf {
    std::unordered_map<std::string, Value> metadata;
    std::vector<Tensor> tensors;               // in file order
    std::unordered_map<std::string, size_t> tensor_index;
    uint64_t file_bytes = 0;
    uint64_t data_offset = 0;

    // Throw MISMATCH naming key or tensor, what was expected and what was found.
    uint64_t u(const std::string& key) const;   // unsigned integer of any width
    double f(const std::string& key) const;     // float32 or float64
    std::string_view s(const std::string& key) const;
    const std::vector<double>& numbers(const std::string& key) const;
    bool has(const std::string& key) const;
    const Tensor* find(const std::string& name) const;  // NULL where there is none
};

// Reads through a callback so that files, memory and the fuzzer share one parser.
// read(user, offset, n, out): fills n bytes; the parser never asks beyond file_bytes.
struct Source {
    void* user;
    uint64_t n_bytes;
    void (*read)(void* user, uint64_t offset, size_t n, void* out);
};

Gguf read_gguf(const Source& source);                 // throws Error
Gguf read_gguf_file(const char* path, int* fd_out);   // opens; the caller closes *fd_out
Gguf read_gguf_memory(const uint8_t* data, size_t n);

}  // namespace pi
