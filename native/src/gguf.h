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

constexpr uint64_t MAX_KV = 65536;
constexpr uint64_t MAX_TENSORS = 65536;
constexpr uint64_t MAX_KEY = 255;              // bytes
constexpr uint64_t MAX_NAME = 63;              // bytes
constexpr uint64_t MAX_STRING = 64ull << 20;   // bytes
constexpr uint64_t MAX_ARRAY = 1ull << 24;     // elements
constexpr uint64_t MAX_HEADER = 256ull << 20;  // bytes
constexpr uint64_t MAX_DIMS = 4;
constexpr uint64_t MAX_ELEMENTS = (1ull << 40) - 1;  // of a tensor
constexpr uint64_t MIN_ALIGNMENT = 8, MAX_ALIGNMENT = 4096, DEFAULT_ALIGNMENT = 32;

// Carries a status across the engine; turned into a pi_status at the C interface.
struct PI_API Error : std::runtime_error {
    Error(pi_status status, const std::string& message) : std::runtime_error(message), status(status) {}
    pi_status status;
};

// The only arithmetic on numbers from a file; throws MALFORMED, naming `what`, where 64 bits are too few.
uint64_t checked_add(uint64_t a, uint64_t b, std::string_view what);
uint64_t checked_mul(uint64_t a, uint64_t b, std::string_view what);
uint64_t checked_align_up(uint64_t n, uint64_t alignment, std::string_view what);  // alignment: a power of two

// ggml's ids.
enum class Type : uint32_t { F32 = 0, F16 = 1, Q4_0 = 2, Q8_0 = 8, I32 = 26 };
const char* type_name(Type type);
uint64_t block_elements(Type type);  // 32 for Q8_0 and Q4_0, else 1
uint64_t block_bytes(Type type);
// Bytes of n elements; throws MALFORMED where n is no multiple of the block or the product overflows.
uint64_t row_bytes(Type type, uint64_t n);

struct Tensor {
    std::string name;
    Type type = Type::F32;
    uint32_t n_dims = 0;
    uint64_t ne[4] = {1, 1, 1, 1};  // fastest first, 1 beyond n_dims
    uint64_t offset = 0;            // from the start of the file
    uint64_t n_bytes = 0;
};

// GGUF's value types that the reader treats apart; 0 to 12 but STRING and ARRAY are scalars.
enum ValueType : uint32_t {
    UINT32 = 4,
    INT32 = 5,
    FLOAT32 = 6,
    BOOL = 7,
    STRING = 8,
    ARRAY = 9,
    UINT64 = 10,
    INT64 = 11,
    FLOAT64 = 12
};

// Values of the metadata, by kind. Long strings and arrays of strings stay in the file: the engine needs none of
// their texts but a few short ones.
struct Value {
    uint32_t type = 0;            // GGUF value type id
    uint32_t element_type = 0;    // of arrays
    uint64_t n = 0;               // elements of an array, bytes of a string
    uint64_t bits = 0;            // scalars, as stored (sign- or zero-extended; float32 and float64 as bits)
    std::string text;             // strings of at most MAX_TEXT bytes
    std::vector<double> numbers;  // arrays of at most MAX_NUMBERS 32- or 64-bit numbers
};
constexpr uint64_t MAX_TEXT = 4096, MAX_NUMBERS = 65536;

struct Gguf {
    std::unordered_map<std::string, Value> metadata;
    std::vector<Tensor> tensors;  // in file order
    std::unordered_map<std::string, size_t> tensor_index;
    uint64_t file_bytes = 0;
    uint64_t data_offset = 0;

    // Throw MISMATCH naming key or tensor, what was expected and what was found.
    uint64_t u(const std::string& key) const;  // integer of any width that is not negative
    bool b(const std::string& key) const;      // boolean
    double f(const std::string& key) const;    // float32 or float64
    std::string_view s(const std::string& key) const;
    const std::vector<double>& numbers(const std::string& key) const;
    bool has(const std::string& key) const;
    const Tensor* find(const std::string& name) const;  // NULL where there is none
};

// Reads through a callback so that files, memory and the fuzzer share one parser.
// read(user, offset, n, out): fills n bytes or throws; the parser never asks beyond n_bytes. Messages name no file:
// the caller knows it.
struct Source {
    void* user;
    uint64_t n_bytes;
    void (*read)(void* user, uint64_t offset, size_t n, void* out);
};

Gguf read_gguf(const Source& source);                // throws Error
Gguf read_gguf_file(const char* path, int* fd_out);  // the caller closes *fd_out
Gguf read_gguf_memory(const uint8_t* data, size_t n);

}  // namespace pi
