#include "reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#define PI_IO_URING 1
#else
#define PI_IO_URING 0
#endif

namespace pi {

namespace {

constexpr uint32_t IN_FLIGHT = 64;    // reads: from here on neither disk nor file system gain
constexpr uint32_t HARDLY_ANY = 4;    // of them: too few to be slowed by those that wait behind them
constexpr uint32_t N_READERS = 16;    // threads, where there is no io_uring
constexpr uint32_t MAX_BLOCK = 4096;  // alignment that is always enough

// Alignment of direct reads, 0 where the file system has none.
uint32_t direct_block([[maybe_unused]] int fd) {
#if defined(STATX_DIOALIGN)
    struct statx info;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 && (info.stx_mask & STATX_DIOALIGN)) {
        uint32_t block = std::max(info.stx_dio_offset_align, info.stx_dio_mem_align);
        return block == 0 || block > MAX_BLOCK ? 0 : std::max(block, 512u);
    }
#endif
    return MAX_BLOCK;
}

// The file again, for direct reads where they work; `block` is set to 0 where they do not.
int open_again(int fd, uint32_t& block) {
#if defined(__linux__)
    std::string path = "/proc/self/fd/" + std::to_string(fd);
#else
    std::string path = "/dev/fd/" + std::to_string(fd);
#endif
#if defined(O_DIRECT)
    if (block) {
        int direct = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
        if (direct >= 0) return direct;
    }
#endif
    block = 0;
    int cached = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (cached < 0) throw Error(PI_ERROR_IO, std::string("cannot be opened again: ") + std::strerror(errno));
    return cached;
}

}  // namespace

Reader::Reader(int fd, uint32_t block, bool direct) : fd_(fd), block_(block), direct_(direct), opened_(version()) {}

Reader::~Reader() { close(fd_); }

Reader::Version Reader::version() const {
    struct stat info;
    if (fstat(fd_, &info) != 0) return {};
    return {static_cast<uint64_t>(info.st_size), static_cast<uint64_t>(info.st_mtim.tv_sec),
            static_cast<uint64_t>(info.st_mtim.tv_nsec)};
}

void Reader::fail(pi_status status, const std::string& message) {
    std::lock_guard lock(failure_);
    if (!failed_.exchange(true)) status_ = status, message_ = message;
}

void Reader::check() {
    if (!failed() && version() != opened_) fail(PI_ERROR_IO, "the file was changed while it was in use");
    if (!failed()) return;
    std::lock_guard lock(failure_);
    throw Error(status_, message_);
}

void Reader::finish(Read& read, int64_t got) {
    uint64_t done = got > 0 ? static_cast<uint64_t>(got) : 0;
    if (got < 0 && got != -EINTR && got != -EAGAIN)
        fail(PI_ERROR_IO, std::string("cannot be read: ") + std::strerror(static_cast<int>(-got)));
    while (done < read.needed && !failed()) {  // what came short is asked for again
        done = done / block_ * block_;
        ssize_t more = pread(fd_, read.to + done, read.n_bytes - done, static_cast<off_t>(read.offset + done));
        if (more < 0 && errno == EINTR) continue;
        if (more < 0) fail(PI_ERROR_IO, std::string("cannot be read: ") + std::strerror(errno));
        if (more >= 0 && done + static_cast<uint64_t>(more) < read.needed && more < static_cast<ssize_t>(block_))
            fail(PI_ERROR_TRUNCATED, "the file became shorter while it was in use");
        done += static_cast<uint64_t>(std::max<ssize_t>(more, 0));
    }
#if defined(POSIX_FADV_DONTNEED)
    if (!direct_) posix_fadvise(fd_, static_cast<off_t>(read.offset), read.n_bytes, POSIX_FADV_DONTNEED);
#endif
    read.pending->fetch_sub(1, std::memory_order_release);
}

namespace {

// A few threads that wait for one read each.
class ThreadReader final : public Reader {
   public:
    ThreadReader(int fd, uint32_t block, bool direct) : Reader(fd, block, direct) {
        for (uint32_t i = 0; i < N_READERS; i++) threads_.emplace_back([this] { work(); });
    }
    ~ThreadReader() override {
        {
            std::lock_guard lock(mutex_);
            stop_ = true;
        }
        asked_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    void submit(Read* reads, size_t n, bool) override {  // in order: few are in flight
        {
            std::lock_guard lock(mutex_);
            for (size_t i = 0; i < n; i++) queue_.push_back(reads + i);
        }
        asked_.notify_all();
    }

    void wait(std::atomic<uint32_t>& pending) override {
        std::unique_lock lock(mutex_);
        done_.wait(lock, [&] { return pending.load(std::memory_order_acquire) == 0; });
    }

   private:
    void work() {
        std::unique_lock lock(mutex_);
        while (true) {
            asked_.wait(lock, [&] { return stop_ || !queue_.empty(); });
            if (queue_.empty()) return;
            Read* read = queue_.front();
            queue_.pop_front();
            lock.unlock();
            ssize_t got = pread(fd_, read->to, read->n_bytes, static_cast<off_t>(read->offset));
            finish(*read, got < 0 ? -errno : got);
            lock.lock();
            done_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable asked_, done_;
    std::deque<Read*> queue_;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

#if PI_IO_URING

// One ring, used by whichever thread holds its mutex.
class UringReader final : public Reader {
   public:
    UringReader(int fd, uint32_t block, bool direct, int ring, const io_uring_params& p)
        : Reader(fd, block, direct), ring_(ring) {
        rings_bytes_ = std::max<size_t>(p.sq_off.array + p.sq_entries * sizeof(uint32_t),
                                        p.cq_off.cqes + p.cq_entries * sizeof(io_uring_cqe));
        sqes_bytes_ = p.sq_entries * sizeof(io_uring_sqe);
        rings_ = static_cast<uint8_t*>(map(rings_bytes_, IORING_OFF_SQ_RING));
        sqes_ = static_cast<io_uring_sqe*>(map(sqes_bytes_, IORING_OFF_SQES));
        sq_tail_ = reinterpret_cast<uint32_t*>(rings_ + p.sq_off.tail);
        sq_mask_ = *reinterpret_cast<uint32_t*>(rings_ + p.sq_off.ring_mask);
        sq_array_ = reinterpret_cast<uint32_t*>(rings_ + p.sq_off.array);
        cq_head_ = reinterpret_cast<uint32_t*>(rings_ + p.cq_off.head);
        cq_tail_ = reinterpret_cast<uint32_t*>(rings_ + p.cq_off.tail);
        cq_mask_ = *reinterpret_cast<uint32_t*>(rings_ + p.cq_off.ring_mask);
        cqes_ = reinterpret_cast<io_uring_cqe*>(rings_ + p.cq_off.cqes);
    }

    // NULL where the kernel has no io_uring, too old a one, or a policy against it.
    static std::unique_ptr<Reader> open(int fd, uint32_t block, bool direct) {
        io_uring_params p{};
        int ring = static_cast<int>(syscall(SYS_io_uring_setup, IN_FLIGHT, &p));
        if (ring < 0) return nullptr;
        if (!(p.features & IORING_FEAT_SINGLE_MMAP) || !(p.features & IORING_FEAT_RW_CUR_POS)) {  // before 5.6
            close(ring);
            return nullptr;
        }
        return std::make_unique<UringReader>(fd, block, direct, ring, p);
    }

    ~UringReader() override {
        while (in_flight_ > 0) turn(1);
        munmap(sqes_, sqes_bytes_);
        munmap(rings_, rings_bytes_);
        close(ring_);
    }

    void submit(Read* reads, size_t n, bool behind) override {
        std::lock_guard lock(mutex_);
        for (size_t i = 0; i < n; i++) (behind ? behind_ : queue_).push_back(reads + i);
        turn(0);
    }

    void wait(std::atomic<uint32_t>& pending) override {
        do {
            if (mutex_.try_lock()) {                                // else another thread takes what is done
                turn(pending.load(std::memory_order_acquire) > 0);  // also keeps the others' reads going
                mutex_.unlock();
            } else if (pending.load(std::memory_order_acquire) > 0) {
                std::this_thread::yield();
            }
        } while (pending.load(std::memory_order_acquire) > 0);
    }

   private:
    void* map(size_t n, uint64_t offset) {
        void* p =
            mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_, static_cast<off_t>(offset));
        if (p == MAP_FAILED) throw Error(PI_ERROR_MEMORY, "cannot map the rings of io_uring");
        return p;
    }

    // Takes what is done, waits for at least `least` of what is in flight, and keeps reads going.
    void turn(uint32_t least) {
        take(least);
        if (behind_.empty() || !queue_.empty() || in_flight_ > HARDLY_ANY) return;
        queue_.swap(behind_);
        take(0);
    }

    // Starts what may be started, and takes what is done, at least `least` reads.
    void take(uint32_t least) {
        std::atomic_ref<uint32_t> sq_tail(*sq_tail_), cq_head(*cq_head_), cq_tail(*cq_tail_);
        uint32_t tail = sq_tail.load(std::memory_order_relaxed), n = 0;
        for (; in_flight_ < IN_FLIGHT && !queue_.empty(); in_flight_++, n++) {
            Read* read = queue_.front();
            queue_.pop_front();
            uint32_t at = (tail + n) & sq_mask_;
            io_uring_sqe& sqe = sqes_[at];
            sqe = io_uring_sqe{};
            sqe.opcode = IORING_OP_READ;
            sqe.fd = fd_;
            sqe.off = read->offset;
            sqe.addr = reinterpret_cast<uint64_t>(read->to);
            sqe.len = read->n_bytes;
            sqe.user_data = reinterpret_cast<uint64_t>(read);
            sq_array_[at] = at;
        }
        sq_tail.store(tail + n, std::memory_order_release);
        unsent_ += n;
        bool empty = cq_head.load(std::memory_order_relaxed) == cq_tail.load(std::memory_order_acquire);
        if (unsent_ > 0 || (least > 0 && empty)) {
            uint32_t flags = empty && least > 0 ? IORING_ENTER_GETEVENTS : 0;
            long sent = syscall(SYS_io_uring_enter, ring_, unsent_, flags ? least : 0, flags, nullptr, 0);
            if (sent > 0) unsent_ -= static_cast<uint32_t>(sent);  // on errors (interrupted, busy) it is tried again
        }
        uint32_t head = cq_head.load(std::memory_order_relaxed);
        for (uint32_t end = cq_tail.load(std::memory_order_acquire); head != end; head++) {
            const io_uring_cqe& cqe = cqes_[head & cq_mask_];
            in_flight_--;
            finish(*reinterpret_cast<Read*>(cqe.user_data), cqe.res);
        }
        cq_head.store(head, std::memory_order_release);
    }

    std::mutex mutex_;
    std::deque<Read*> queue_, behind_;
    int ring_;
    uint32_t in_flight_ = 0, unsent_ = 0;
    size_t rings_bytes_, sqes_bytes_;
    uint8_t* rings_;
    io_uring_sqe* sqes_;
    uint32_t *sq_tail_, *sq_array_, *cq_head_, *cq_tail_;
    uint32_t sq_mask_, cq_mask_;
    io_uring_cqe* cqes_;
};

#endif

}  // namespace

std::unique_ptr<Reader> Reader::open(int fd, uint32_t which) {
    uint32_t block = direct_block(fd);
    int again = open_again(fd, block);
    bool direct = block != 0;
    if (!direct) block = MAX_BLOCK;
    std::unique_ptr<Reader> reader;
#if PI_IO_URING
    if (which != 2) reader = UringReader::open(again, block, direct);
#endif
    if (!reader && which != 1) reader = std::make_unique<ThreadReader>(again, block, direct);
    if (!reader) {
        close(again);
        throw Error(PI_ERROR_UNSUPPORTED, "this system has no io_uring");
    }
    return reader;
}

}  // namespace pi
