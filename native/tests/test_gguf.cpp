// The reader's allocations, counted, and its typed lookups. What it accepts and refuses is tested together with the
// Python reader (tests/artifact/test_malformed.py). A plain executable: prints what failed; exit code 1 if anything
// did.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "gguf.h"

namespace {

size_t allocated = 0;  // bytes since it was last set to 0

}  // namespace

void* operator new(size_t n) {
    allocated += n;
    if (void* memory = std::malloc(n)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

using namespace pi;

int n_failures = 0;

void check(bool holds, const std::string& what) {
    if (!holds) std::printf("FAILED: %s\n", what.c_str());
    n_failures += !holds;
}

template <class T>
std::string bytes(T value) {
    std::string out(sizeof value, '\0');
    std::memcpy(out.data(), &value, sizeof value);
    return out;
}

std::string text(const std::string& value) { return bytes<uint64_t>(value.size()) + value; }

std::string pair(const std::string& key, ValueType type, const std::string& value) {
    return text(key) + bytes<uint32_t>(type) + value;
}

std::string header(uint64_t n_tensors, uint64_t n_kv, const std::string& rest) {
    std::string out = "GGUF" + bytes<uint32_t>(3) + bytes(n_tensors) + bytes(n_kv) + rest;
    out.resize((out.size() + 31) / 32 * 32);
    return out;
}

Gguf read(const std::string& file) {
    return read_gguf_memory(reinterpret_cast<const uint8_t*>(file.data()), file.size());
}

template <class F>
pi_status status_of(F&& f) {
    try {
        f();
        return PI_OK;
    } catch (const Error& error) {
        return error.status;
    }
}

// Whatever a count claims, it is refused before anything is allocated for it.
void test_huge_counts() {
    for (uint64_t n : {1ull << 31, (1ull << 32) - 1, 1ull << 62, 1ull << 63, ~0ull}) {
        auto array = [&](uint32_t type) { return pair("k", ARRAY, bytes(type) + bytes(n) + bytes(0ull)); };
        const std::string files[] = {
            header(n, 0, ""),
            header(0, n, ""),
            header(n, n, ""),
            header(0, 1, bytes(n) + "k"),
            header(0, 1, pair("k", STRING, bytes(n) + "v")),
            header(0, 1, array(STRING)),
            header(0, 1, array(UINT64)),
            header(0, 1, array(BOOL)),
            header(1, 0, bytes(n) + "t"),
            header(1, 0, text("t") + bytes<uint32_t>(2) + bytes(n) + bytes(n) + bytes(0) + bytes(0ull)),
        };
        for (size_t i = 0; i < std::size(files); ++i) {
            allocated = 0;
            pi_status status = status_of([&] { read(files[i]); });
            std::string what = "file " + std::to_string(i) + " with the count " + std::to_string(n);
            check(status == PI_ERROR_MALFORMED, what + " is malformed");
            check(allocated < 1 << 20, what + " allocates less than 1 MB");
        }
    }
}

// Counts at their limits in a file that does not hold them are refused as early.
void test_counts_beyond_the_file() {
    const std::string files[] = {
        header(MAX_TENSORS, MAX_KV, ""),
        header(0, 1, pair("k", STRING, bytes(MAX_STRING))),
        header(0, 1, pair("k", ARRAY, bytes<uint32_t>(STRING) + bytes(MAX_ARRAY))),
        header(0, 1, pair("k", ARRAY, bytes<uint32_t>(FLOAT64) + bytes(MAX_NUMBERS))),
    };
    for (const std::string& file : files) {
        allocated = 0;
        check(status_of([&] { read(file); }) != PI_OK, "a count beyond the file is refused");
        check(allocated < 1 << 20, "a count beyond the file allocates less than 1 MB");
    }
}

// Characters and numbers stay whole where the reader's window of 64 KiB ends.
void test_window() {
    for (size_t shift = 0; shift < 8; ++shift) {
        std::string value(shift, 'x');
        while (value.size() < 200000) value += "\xf0\x9f\x99\x82";  // a character of four bytes
        std::string numbers;
        for (uint32_t i = 0; i < MAX_NUMBERS; ++i) numbers += bytes(i);
        std::string file = header(0, 2,
                                  pair("text", STRING, text(value)) +
                                      pair("n", ARRAY, bytes<uint32_t>(UINT32) + bytes(MAX_NUMBERS) + numbers));
        Gguf gguf = read(file);
        const auto& found = gguf.numbers("n");
        bool same = found.size() == MAX_NUMBERS;
        for (size_t i = 0; same && i < found.size(); ++i) same = found[i] == static_cast<double>(i);
        check(same, "numbers across the window's end");
        check(status_of([&] { gguf.s("text"); }) == PI_ERROR_MISMATCH, "a long text is not kept");
        value[value.size() / 2 / 4 * 4 + shift] = 'x';  // a lead byte replaced: the rest of its character dangles
        check(status_of([&] { read(header(0, 1, pair("text", STRING, text(value)))); }) == PI_ERROR_MALFORMED,
              "broken UTF-8 far inside");
    }
}

void test_lookups() {
    Gguf gguf = read(header(0, 7,
                            pair("int", INT32, bytes<int32_t>(-5)) + pair("wide", INT64, bytes<int64_t>(1ll << 40)) +
                                pair("single", FLOAT32, bytes(0.5f)) + pair("double", FLOAT64, bytes(-0.25)) +
                                pair("text", STRING, text("llama")) + pair("bool", BOOL, bytes<uint8_t>(1)) +
                                pair("signed", ARRAY, bytes<uint32_t>(INT32) + bytes(2ull) + bytes(-1) + bytes(7))));
    check(gguf.u("wide") == 1ull << 40 && gguf.b("bool"), "integers");
    check(gguf.f("single") == 0.5 && gguf.f("double") == -0.25, "floats");
    check(gguf.s("text") == "llama" && gguf.has("text") && !gguf.has("none"), "texts");
    check(gguf.numbers("signed") == std::vector<double>{-1, 7}, "arrays");
    check(status_of([&] { gguf.u("int"); }) == PI_ERROR_MISMATCH, "a negative integer is no count");
    check(status_of([&] { gguf.u("single"); }) == PI_ERROR_MISMATCH, "a float is no count");
    check(status_of([&] { gguf.u("bool"); }) == PI_ERROR_MISMATCH, "a boolean is no count");
    check(status_of([&] { gguf.b("int"); }) == PI_ERROR_MISMATCH, "an integer is no boolean");
    check(status_of([&] { gguf.f("int"); }) == PI_ERROR_MISMATCH, "an integer is no float");
    check(status_of([&] { gguf.s("signed"); }) == PI_ERROR_MISMATCH, "an array is no text");
    check(status_of([&] { gguf.numbers("text"); }) == PI_ERROR_MISMATCH, "a text is no array");
    check(status_of([&] { gguf.u("none"); }) == PI_ERROR_MISMATCH, "a key that is not there");
}

void test_checked_arithmetic() {
    constexpr uint64_t MAX = ~0ull;
    check(checked_add(MAX - 1, 1, "") == MAX && checked_mul(MAX / 2, 2, "") == MAX - 1, "sums and products that fit");
    check(checked_align_up(0, 32, "") == 0 && checked_align_up(1, 32, "") == 32 && checked_align_up(32, 32, "") == 32,
          "alignment");
    check(status_of([] { checked_add(MAX, 1, ""); }) == PI_ERROR_MALFORMED, "a sum that wraps");
    check(status_of([] { checked_mul(1ull << 32, 1ull << 32, ""); }) == PI_ERROR_MALFORMED, "a product that wraps");
    check(status_of([] { checked_align_up(MAX - 3, 32, ""); }) == PI_ERROR_MALFORMED, "an alignment that wraps");
    check(row_bytes(Type::Q4_0, 64) == 36 && row_bytes(Type::Q8_0, 32) == 34 && row_bytes(Type::F16, 3) == 6, "rows");
    check(status_of([] { row_bytes(Type::Q4_0, 33); }) == PI_ERROR_MALFORMED, "a cut block");
    check(status_of([] { row_bytes(Type::F32, 1ull << 62); }) == PI_ERROR_MALFORMED, "a row that wraps");
}

}  // namespace

int main() {
    test_huge_counts();
    test_counts_beyond_the_file();
    test_window();
    test_lookups();
    test_checked_arithmetic();
    std::printf("test_gguf: %d failures\n", n_failures);
    return n_failures != 0;
}
