// The disk tier by itself: what is asked for comes, whoever reads; a scan flushes nothing; a file that changes is an
// error and never a wait.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "disk.h"

namespace {

constexpr uint32_t N_FF = 400;
constexpr uint64_t STRIDE = 1234, DATA = 5000;  // nothing is aligned
constexpr uint32_t RESIDENT[] = {0, 30, 350, N_FF};
constexpr uint64_t TABLE_ROWS = 100, ROW = 333;
constexpr size_t N_LAYERS = std::size(RESIDENT);

int failed = 0;

void expect(bool ok, const char* what) {
    if (ok) return;
    std::printf("failed: %s\n", what);
    failed++;
}

struct File {
    std::vector<uint8_t> bytes;
    std::string path = "test_disk.tmp";
    int fd;
    std::vector<pi::Bundles> layers;
    pi::Table table{DATA + 40 + N_LAYERS * N_FF * STRIDE, TABLE_ROWS * ROW, ROW};

    File() : bytes(DATA + N_LAYERS * N_FF * STRIDE + TABLE_ROWS * ROW + 77) {
        for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(std::rand());
        fd = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
        expect(pwrite(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()), "the file is written");
        for (size_t i = 0; i < N_LAYERS; i++) layers.push_back({DATA + 40 + i * N_FF * STRIDE, STRIDE, RESIDENT[i]});
    }
    ~File() {
        close(fd);
        unlink(path.c_str());
    }
    pi::DiskTier open_tier(uint32_t reader, uint32_t n_slots, uint32_t n_transit) const {
        pi_disk_params params{sizeof(pi_disk_params), reader, n_slots, n_transit, N_LAYERS, nullptr};
        return pi::DiskTier(fd, DATA, bytes.size(), N_FF, layers, table, params);
    }
    const uint8_t* bundle(size_t il, uint32_t i) const { return &bytes[layers[il].offset + i * STRIDE]; }
};

using Ids = std::vector<uint32_t>;

// Asks for two chunks of neurons as decoding does, and compares what came; false where it was too much.
bool fetch(const File& file, pi::DiskTier& disk, size_t il, const Ids& first, const Ids& second) {
    std::span<const uint32_t> chunks[] = {first, second};
    if (!disk.request(il, chunks)) return false;
    const uint8_t* base = disk.data() + (file.layers[il].offset - DATA);
    bool same = true;
    for (size_t c = 0; c < 2; c++) {
        disk.bring(c);
        for (uint32_t i : chunks[c])
            same &= std::memcmp(base + disk.places(il)[i] * STRIDE, file.bundle(il, i), STRIDE) == 0;
    }
    disk.finish();
    expect(same, "neurons are those of the file");
    return true;
}

bool streams(const File& file, pi::DiskTier& disk, size_t il) {
    disk.start_stream(il);
    disk.end_stream();
    bool same = std::memcmp(disk.data() + (file.layers[il].offset - DATA), file.bundle(il, 0), N_FF * STRIDE) == 0;
    disk.release(il);
    return same;
}

void brings_what_is_asked_for(uint32_t reader) {
    File file;
    auto disk = file.open_tier(reader, 20, 60);
    expect(disk.holds(0) && disk.holds(1) && disk.holds(2) && !disk.holds(3), "three layers are on disk");
    for (uint32_t token = 0; token < 200; token++)
        for (size_t il = 0; il < 3; il++) {
            Ids ids[2];
            for (uint32_t i = 0; i < N_FF; i++)
                if (std::rand() % 400 < 40) ids[i >= 150].push_back(i);
            fetch(file, disk, il, ids[0], ids[1]);
            if (token % 50 == 7) expect(streams(file, disk, il), "a layer is streamed to its natural place");
        }
    int32_t rows[] = {0, 99, 42};
    disk.read_rows(rows, 3);
    for (size_t k = 0; k < 3; k++) {
        const uint8_t* expected = &file.bytes[file.table.offset + static_cast<uint64_t>(rows[k]) * ROW];
        expect(std::memcmp(disk.row(k), expected, ROW) == 0, "rows are those of the file");
    }
    auto counts = disk.take_counts();
    expect(counts.from_cache > 0 && counts.from_disk > 0 && counts.from_prefix > 0, "all three are used");
    expect(counts.reads < counts.from_disk, "neighbours are read together");
    expect(counts.bytes % 512 == 0, "reads are whole blocks");
}

void keeps_what_is_asked_for_often() {
    File file;
    auto disk = file.open_tier(0, 10, 100);
    Ids often;
    for (uint32_t i = 100; i < 110; i++) often.push_back(i);
    for (int token = 0; token < 20; token++) fetch(file, disk, 0, often, {});
    for (uint32_t i = 120; i < 400; i += 40) {  // a scan
        Ids scanned;
        for (uint32_t j = i; j < i + 40; j++) scanned.push_back(j);
        fetch(file, disk, 0, {}, scanned);
    }
    disk.take_counts();
    fetch(file, disk, 0, often, {});
    expect(disk.take_counts().from_cache == often.size(), "a scan flushes nothing");
    Ids other;
    for (uint32_t i = 200; i < 210; i++) other.push_back(i);
    for (int token = 0; token < 200; token++) fetch(file, disk, 0, other, {});
    disk.take_counts();
    fetch(file, disk, 0, other, {});
    expect(disk.take_counts().from_cache == other.size(), "it learns what is asked for now");
    expect(!fetch(file, disk, 0, {}, Ids(101, 300)), "more than there is room for is refused");
}

template <class F>
bool throws(F&& f, const char* text) {
    try {
        f();
    } catch (const pi::Error& error) {
        return std::strstr(error.what(), text) != nullptr;
    }
    return false;
}

void says_what_went_wrong(uint32_t reader) {
    {
        File file;
        auto disk = file.open_tier(reader, 10, 100);
        expect(ftruncate(file.fd, DATA + 100 * STRIDE) == 0, "the file is cut");
        expect(throws([&] { fetch(file, disk, 0, {}, {390}); }, "became shorter"), "a file cut short");
        expect(throws([&] { streams(file, disk, 1); }, "became shorter"), "the first failure remains");
    }
    {
        File file;
        auto disk = file.open_tier(reader, 10, 100);
        usleep(20000);  // a file's times are as coarse as the kernel's clock
        expect(pwrite(file.fd, "x", 1, DATA) == 1, "the file is written to");
        expect(throws([&] { disk.check(); }, "was changed"), "a changed file");
    }
}

}  // namespace

int main() {
    for (uint32_t reader : {0u, 2u}) {
        brings_what_is_asked_for(reader);
        says_what_went_wrong(reader);
    }
    keeps_what_is_asked_for_often();
    std::printf("test_disk: %d failed\n", failed);
    return failed != 0;
}
