#include "cuda_emulation.h"

#include <algorithm>
#include <mutex>
#include <random>

namespace emulation {

namespace {

constexpr size_t STACK_BYTES = 64 << 10, WARP = 32;

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "CUDA emulation: %s\n", what);
    std::abort();
}

// ---- fibers: a stack and the place where it stopped

extern "C" void pi_change_fiber(void** from, void* to);

#if defined(__x86_64__)
// Keeps what a call must keep on the old stack, and goes on with what the new one kept.
__asm__(
    ".text\n.globl pi_change_fiber\n.type pi_change_fiber,@function\npi_change_fiber:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nretq\n"
    ".size pi_change_fiber,.-pi_change_fiber\n");
#else
#error "the emulation of CUDA changes fibers on x86-64 only"
#endif

// One set of fibers after the other waits in the same place.
struct Barrier {
    size_t n_waiting = 0, n_turns = 0;
};

struct Fiber {
    std::unique_ptr<uint8_t[]> stack{new uint8_t[STACK_BYTES]};
    void* at = nullptr;
    Thread thread;
    bool done = false;
    const Barrier* barrier = nullptr;  // where it waits for the end of a turn
    size_t turn = 0;
    bool ready() const { return !done && !(barrier && barrier->n_turns == turn); }
};

struct Warp {
    Barrier barrier;
    uint64_t values[2][WARP];
    size_t turn[WARP];
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;  // kept from block to block
    std::vector<Warp> warps;
    Barrier barrier;
    size_t n_threads = 0, running = 0, n_changes = 0;
    int n_votes[2] = {};
    void* scheduler = nullptr;
    const std::function<void()>* kernel = nullptr;
    std::unique_ptr<uint8_t[]> shared;
    std::minstd_rand draws;
};
Machine machine;
std::recursive_mutex one_at_a_time;  // sessions of several threads share the machine

Fiber& fiber() { return *machine.fibers[machine.running]; }

void pause() { pi_change_fiber(&fiber().at, machine.scheduler); }

void wait(Barrier& barrier, size_t n) {
    size_t turn = barrier.n_turns;
    if (++barrier.n_waiting == n) {
        barrier.n_waiting = 0;
        barrier.n_turns++;
        machine.n_changes++;
    }
    if (barrier.n_turns != turn) return;
    fiber().barrier = &barrier;
    fiber().turn = turn;
    pause();
}

void start_fiber() {
    (*machine.kernel)();
    fiber().done = true;
    machine.n_changes++;
    pause();
    fail("a thread went on after its end");
}

void prepare(Fiber& f) {
    auto top = reinterpret_cast<uintptr_t>(f.stack.get() + STACK_BYTES) / 16 * 16;
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;  // where a call would have left its way back: keeps the stack aligned
    *--sp = reinterpret_cast<void*>(start_fiber);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f.at = sp;
    f.done = false;
    f.barrier = nullptr;
}

// In an order that changes from barrier to barrier, and in one block of eight some warps far ahead of others, so that a
// barrier that is missing is seen in the results.
void run_block() {
    constexpr size_t STRETCH = 16,
                     PATIENCE = 64 * STRETCH;  // rounds that the same warps sit out; in which nobody gets on
    size_t n = machine.n_threads;
    bool apart = machine.draws() % 8 == 0;
    for (size_t n_done = 0, stuck = 0, round = 0, left_out = 0; n_done < n; round++) {
        size_t before = machine.n_changes, first = machine.draws() % n;
        if (round % STRETCH == 0) left_out = apart ? machine.draws() : round / STRETCH % 2;
        n_done = 0;
        for (size_t i = 0; i < n; i++) {
            size_t t = (first + (left_out & 1 ? i : n - i)) % n;
            machine.running = t;
            if (fiber().ready() && !(left_out >> (1 + t / WARP % 24) & 1))
                pi_change_fiber(&machine.scheduler, fiber().at);
            n_done += fiber().done;
        }
        stuck = machine.n_changes == before ? stuck + 1 : 0;
        if (stuck == PATIENCE) fail("threads wait for one another forever");
    }
}

}  // namespace

Thread& current() { return fiber().thread; }
void wait_for_block() { wait(machine.barrier, machine.n_threads); }
void wait_for_warp() { wait(machine.warps[current().warp].barrier, WARP); }
void* dynamic_shared() { return machine.shared.get(); }

// Two sets of values in turn: nobody writes the next one before all have read the last.
uint64_t exchange(uint64_t value, unsigned from_lane) {
    unsigned lane = current().lane;
    Warp& warp = machine.warps[current().warp];
    uint64_t* values = warp.values[warp.turn[lane]++ % 2];
    values[lane] = value;
    wait_for_warp();
    return values[from_lane % WARP];
}

unsigned ballot(bool vote) {
    unsigned votes = 0, lane = current().lane;
    Warp& warp = machine.warps[current().warp];
    uint64_t* values = warp.values[warp.turn[lane]++ % 2];
    values[lane] = vote;
    wait_for_warp();
    for (unsigned i = 0; i < WARP; i++) votes |= unsigned(values[i] != 0) << i;
    return votes;
}

int count_in_block(bool vote) {
    if (machine.barrier.n_waiting == 0) machine.n_votes[machine.barrier.n_turns % 2] = 0;
    int& n = machine.n_votes[machine.barrier.n_turns % 2];
    n += vote;
    wait_for_block();
    return n;
}

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
    std::lock_guard lock(one_at_a_time);
    machine.n_threads = size_t{block.x} * block.y * block.z;
    if (machine.n_threads == 0 || machine.n_threads > 1024 || machine.n_threads % WARP != 0 || block.y * block.z != 1)
        fail("a block of no whole warps, or of more than 1024 threads");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
        fail("an empty grid, or too large");
    if (shared > (48 << 10)) fail("more than 48 KiB of shared memory");
    while (machine.fibers.size() < machine.n_threads) machine.fibers.push_back(std::make_unique<Fiber>());
    machine.warps.resize(machine.n_threads / WARP);
    machine.kernel = &kernel;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                machine.shared.reset(new uint8_t[shared]);        // as large as asked for, so that ASan sees its end
                std::memset(machine.shared.get(), 0xff, shared);  // NaN
                machine.barrier = {};
                for (Warp& w : machine.warps) w = {};
                for (size_t t = 0; t < machine.n_threads; t++) {
                    Fiber& f = *machine.fibers[t];
                    prepare(f);
                    f.thread = {dim3(unsigned(t)), dim3(x, y, z), block, grid, unsigned(t / WARP), unsigned(t % WARP)};
                }
                run_block();
            }
}

// ---- the runtime: a stream carries out at once, or collects for a graph

struct Stream {
    Graph* collecting = nullptr;
};

void enqueue(Stream* stream, std::function<void()> work) {
    if (stream && stream->collecting)
        stream->collecting->push_back(std::move(work));
    else
        work();
}

namespace {

std::mutex allocations;
std::map<void*, size_t> allocated;
size_t n_allocated = 0;
thread_local int chosen = -1;  // as if another library used another card in each thread

// Of which each allocation has its own.
size_t whole_pages(size_t n) {
    constexpr size_t PAGE = 2 << 20;
    return (n + PAGE - 1) / PAGE * PAGE;
}

size_t card_bytes() {
    const char* bytes = std::getenv("CUDA_EMULATION_BYTES");
    return bytes ? std::strtoull(bytes, nullptr, 10) : size_t{1} << 30;
}

}  // namespace

bool card_chosen() { return chosen == 0; }

}  // namespace emulation

using namespace emulation;

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "another error";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) {
    if (std::getenv("CUDA_EMULATION_NO_DRIVER")) return cudaErrorInsufficientDriver;
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    *n = visible && !*visible ? 0 : 1;
    return *n ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int device) {
    chosen = device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int) {
    *out = {"a card, emulated", 4, 9, 0};
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* out, int, int) {
    *out = 0;
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    std::lock_guard lock(allocations);
    *total = card_bytes();
    *free = *total - std::min(*total, n_allocated);
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** out, size_t n) {
    std::lock_guard lock(allocations);
    if (whole_pages(n) + n_allocated > card_bytes()) return cudaErrorMemoryAllocation;
    *out = ::operator new(n, std::align_val_t(256));
    std::memset(*out, 0xff, n);  // NaN
    allocated[*out] = whole_pages(n);
    n_allocated += whole_pages(n);
    return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
    std::lock_guard lock(allocations);
    if (!p) return cudaSuccess;
    auto found = allocated.find(p);
    if (found == allocated.end()) return cudaErrorInvalidValue;
    n_allocated -= found->second;
    allocated.erase(found);
    ::operator delete(p, std::align_val_t(256));
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** out, size_t n, unsigned) {
    *out = ::operator new(n, std::align_val_t(256));
    std::memset(*out, 0xff, n);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
    ::operator delete(p, std::align_val_t(256));
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t stream) {
    enqueue(stream, [=] {
        if (n > 0) std::memset(p, value, n);
    });
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t stream) {
    enqueue(stream, [=] {
        if (n > 0) std::memcpy(to, from, n);
    });
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
    if (n > 0) std::memcpy(to, from, n);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned) {
    *out = new Stream;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    stream->collecting = new Graph;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out) {
    *out = std::exchange(stream->collecting, nullptr);
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
    *out = new Graph(*graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    for (const auto& work : *graph) work();
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
    *out = new Event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
    event->at = std::chrono::steady_clock::now();
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = std::max(1e-6f, std::chrono::duration<float, std::milli>(to->at - from->at).count());
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
