// Reads of a file, many in flight, past the page cache where the file system allows. Linux' io_uring by its system
// calls (the library for it, liburing, does not come with pip), or a small pool of threads where the kernel has none.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "gguf.h"

namespace pi {

struct Read {
    uint64_t offset = 0;  // in the file; this, n_bytes and `to` are multiples of Reader::block()
    uint32_t n_bytes = 0;
    uint32_t needed = 0;  // of n_bytes: those that the file must have
    uint8_t* to = nullptr;
    std::atomic<uint32_t>* pending = nullptr;  // counted down when it is done, or has failed
};

class Reader {
   public:
    // which: 0 the best, 1 io_uring, 2 threads. Opens the file of `fd` anew. Errors: UNSUPPORTED, IO.
    static std::unique_ptr<Reader> open(int fd, uint32_t which);
    virtual ~Reader();
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    // They stay where they are until they are done. behind: they begin when hardly any others are in flight.
    virtual void submit(Read* reads, size_t n, bool behind = false) = 0;
    virtual void wait(std::atomic<uint32_t>& pending) = 0;  // until 0; from any thread
    uint32_t block() const { return block_; }               // what reads are aligned to
    bool failed() const { return failed_.load(); }
    void check();  // Throws what failed first, or CHANGED where the file is no longer what it was when it was opened.

   protected:
    Reader(int fd, uint32_t block, bool direct);
    void finish(Read& read, int64_t got);  // got: bytes, or minus an errno

    int fd_;

   private:
    void fail(pi_status status, const std::string& message);

    struct Version {
        uint64_t size = 0, seconds = 0, nanoseconds = 0;
        bool operator==(const Version&) const = default;
    };
    Version version() const;

    uint32_t block_;
    bool direct_;
    Version opened_;
    std::atomic<bool> failed_{false};
    std::mutex failure_;
    pi_status status_ = PI_OK;
    std::string message_;
};

}  // namespace pi
