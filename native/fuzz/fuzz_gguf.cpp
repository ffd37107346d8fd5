// libFuzzer target: whatever the bytes, read_gguf_memory returns a header whose every number holds, or throws Error.
#include <cstdio>
#include <cstdlib>

#include "gguf.h"

namespace {

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "accepted a header where this does not hold: %s\n", what);
    std::abort();
}

// The typed lookups answer or throw MISMATCH.
void look_up(const pi::Gguf& gguf, const std::string& key) {
    auto quietly = [](auto&& look) {
        try {
            look();
        } catch (const pi::Error& error) {
            require(error.status == PI_ERROR_MISMATCH, "a lookup fails with MISMATCH");
        }
    };
    quietly([&] { gguf.u(key); });
    quietly([&] { gguf.b(key); });
    quietly([&] { gguf.f(key); });
    quietly([&] { gguf.s(key); });
    quietly([&] { gguf.numbers(key); });
}

void check(const pi::Gguf& gguf, size_t n) {
    uint64_t end = gguf.data_offset;
    for (const pi::Tensor& t : gguf.tensors) {
        uint64_t n_rows = t.ne[1] * t.ne[2] * t.ne[3];
        require(gguf.find(t.name) == &t, "a tensor is found by its name");
        require(t.offset >= end && t.offset <= n && t.n_bytes <= n - t.offset, "a tensor lies in the file, in order");
        require(t.n_bytes == n_rows * pi::row_bytes(t.type, t.ne[0]), "a tensor's bytes are its rows'");
        end = t.offset + t.n_bytes;
    }
    require(end == n, "the last tensor ends the file");
    for (const auto& pair : gguf.metadata) look_up(gguf, pair.first);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t n) {
    try {
        check(pi::read_gguf_memory(data, n), n);
    } catch (const pi::Error& error) {
        require(error.status >= PI_ERROR_TRUNCATED && error.status <= PI_ERROR_UNSUPPORTED,
                "a header's fault has its kind");
    }
    return 0;
}
