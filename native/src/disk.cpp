#include "disk.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pi {

namespace {

constexpr uint64_t PAGE = 4096;
constexpr uint64_t STREAM_BYTES = 1 << 20;  // of one read in sequence
constexpr uint64_t MERGE_BYTES =
    16 << 10;  // a gap that costs less than another read: both measured in benchmarks/LOG.md
constexpr uint64_t MOST_BYTES = 256 << 10;  // of a read of several neurons

// The cache keeps what was asked for most, by counters that forget: a use adds ONE, and after every AGE_STEPS tokens an
// eighth is taken off, so that they remember about WINDOW tokens. That is least-frequently-used with TinyLFU's ageing
// and admission (Einziger, Friedman, Manes 2017): who comes takes a place only from one that counts less, so that what
// passes once flushes nothing. Counters begin with what the calibration text says.
constexpr uint32_t ONE = 256, AGE_STEPS = 16, WINDOW = 128;

uint64_t page_up(uint64_t n) { return (n + PAGE - 1) / PAGE * PAGE; }
uint64_t page_down(uint64_t n) { return n / PAGE * PAGE; }

}  // namespace

#if defined(__linux__)

DiskTier::DiskTier(int fd, uint64_t data_offset, uint64_t file_bytes, uint32_t n_ff, const std::vector<Bundles>& layers,
                   const Table& table, const pi_disk_params& params, Ranges elsewhere)
    : n_ff_(n_ff),
      data_offset_(data_offset),
      n_transit_(params.n_transit),
      table_(table),
      elsewhere_(std::move(elsewhere)),
      reader_(Reader::open(fd, params.reader)) {
    if (sysconf(_SC_PAGESIZE) != PAGE) throw Error(PI_ERROR_UNSUPPORTED, "a limit of memory needs pages of 4096 bytes");
    uint64_t widest = 0, n_tables = 0, slots = 0, longest = 0;
    for (const Bundles& b : layers) {
        Layer& layer = layers_.emplace_back();
        layer.offset = b.offset;
        layer.stride = b.stride;
        layer.tail_begin = page_up(b.offset + b.n_resident * b.stride);
        uint64_t end = page_down(b.offset + n_ff * b.stride);
        layer.tail_bytes = end > layer.tail_begin ? end - layer.tail_begin : 0;
        if (layer.tail_bytes == 0) continue;
        layer.n_resident = static_cast<uint32_t>((layer.tail_begin - b.offset) / b.stride);
        layer.n_slots = std::min(params.n_slots, n_ff - b.n_resident);
        slots += (layer.n_slots + 1) * b.stride;
        longest = std::max(longest, layer.tail_bytes);
        widest = std::max(widest, b.stride);
        n_tables += 6 * uint64_t{n_ff} + 8 * layer.n_slots;
    }
    slots_bytes_ = page_up(slots + (n_transit_ + 1) * widest);
    shared_bytes_ = std::max(slots_bytes_, longest);
    landing_.n_bytes = std::min(n_transit_ * (page_up(widest) + PAGE), longest + 2 * MAX_CHUNKS * PAGE);
    for (Ahead& ahead : ahead_) ahead.landing.n_bytes = widest > 0 ? AHEAD * (page_up(widest) + PAGE) : 0;
    landing_bytes_ = landing_.n_bytes + ahead_[0].landing.n_bytes + ahead_[1].landing.n_bytes;
    if (holds_table()) rows_bytes_ = TABLE_ROWS * (page_up(table.row_bytes) + PAGE);
    tables_bytes_ =
        n_tables + (n_transit_ + 2 * AHEAD) * (sizeof(Miss) + sizeof(Read)) + 8 * (n_transit_ + params.n_slots);
    try {
        map_memory(file_bytes, layers);
        load(file_bytes);
    } catch (...) {
        reader_.reset();
        if (arena_) munmap(arena_, arena_bytes_);
        if (landing_memory_) munmap(landing_memory_, landing_bytes_);
        if (rows_landing_) munmap(rows_landing_, rows_bytes_);
        if (shared_ >= 0) close(shared_);
        throw;
    }
    misses_.reserve(n_transit_);
    landing_.reads.reserve(n_transit_);
    for (Ahead& ahead : ahead_) {
        ahead.misses.reserve(AHEAD);
        ahead.landing.reads.reserve(AHEAD);
    }
    candidates_.reserve(n_transit_);
    victims_.reserve(params.n_slots);
}

DiskTier::~DiskTier() {
    reader_.reset();
    munmap(arena_, arena_bytes_);
    if (landing_memory_) munmap(landing_memory_, landing_bytes_);
    if (rows_landing_) munmap(rows_landing_, rows_bytes_);
    close(shared_);
}

void DiskTier::map_memory(uint64_t file_bytes, const std::vector<Bundles>& layers) {
    auto map = [](void* at, uint64_t n, int flags, int fd) {
        void* p = mmap(at, n, PROT_READ | PROT_WRITE, flags, fd, 0);
        if (p == MAP_FAILED) throw Error(PI_ERROR_MEMORY, "cannot map " + std::to_string(n) + " bytes of memory");
        return static_cast<uint8_t*>(p);
    };
    constexpr int PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    arena_begin_ = page_down(data_offset_);
    uint64_t data_bytes = page_up(file_bytes) - arena_begin_;
    shared_ = memfd_create("powerinfer", MFD_CLOEXEC);
    if (shared_ < 0 || ftruncate(shared_, static_cast<off_t>(shared_bytes_)) != 0)
        throw Error(PI_ERROR_MEMORY, "cannot make shared memory of " + std::to_string(shared_bytes_) + " bytes");
    arena_bytes_ = data_bytes + std::max(shared_bytes_, PAGE);
    arena_ = map(nullptr, arena_bytes_, PRIVATE, -1);
    slots_ = arena_ + data_bytes;
    if (shared_bytes_ > 0) map(slots_, shared_bytes_, MAP_SHARED | MAP_FIXED, shared_);
    if (landing_bytes_ > 0) landing_memory_ = map(nullptr, landing_bytes_, PRIVATE, -1);
    landing_.memory = landing_memory_;
    ahead_[0].landing.memory = landing_memory_ + landing_.n_bytes;
    ahead_[1].landing.memory = ahead_[0].landing.memory + ahead_[0].landing.n_bytes;
    if (rows_bytes_ > 0) rows_landing_ = map(nullptr, rows_bytes_, PRIVATE, -1);
    weights_bytes_ = data_bytes;
    for (auto [begin, n_bytes] : holes()) weights_bytes_ -= n_bytes;
    uint8_t* at = slots_;
    for (size_t i = 0; i < layers_.size(); i++) {
        Layer& layer = layers_[i];
        layer.base = memory_of(layers[i].offset);
        if (layer.tail_bytes == 0) continue;
        map(memory_of(layer.tail_begin), layer.tail_bytes, MAP_SHARED | MAP_FIXED, shared_);
        auto place_from = [&](const uint8_t* p) {  // the first that begins there or later
            return static_cast<uint32_t>((static_cast<uint64_t>(p - layer.base) + layer.stride - 1) / layer.stride);
        };
        layer.first_slot = place_from(at);
        at += (layer.n_slots + 1) * layer.stride;
        layer.place.assign(n_ff_, NOWHERE);
        for (uint32_t n = 0; n < layer.n_resident; n++) layer.place[n] = n;
        layer.uses.assign(n_ff_, 0);
        layer.tenant.assign(layer.n_slots, NOWHERE);
        layer.used_at.assign(layer.n_slots, 0);
    }
    for (Layer& layer : layers_)
        if (layer.tail_bytes > 0)
            layer.first_transit =
                static_cast<uint32_t>((static_cast<uint64_t>(at - layer.base) + layer.stride - 1) / layer.stride);
}

// Reads [begin, end) of the file, pages or up to its end, in large pieces; streaming_ counts them down.
void DiskTier::read_whole(uint64_t begin, uint64_t end, uint64_t file_bytes, uint8_t* to) {
    for (uint64_t at = begin; at < end; at += STREAM_BYTES) {
        uint64_t n = std::min(STREAM_BYTES, end - at), there = std::min(n, file_bytes - at);
        stream_.push_back({at, static_cast<uint32_t>(n), static_cast<uint32_t>(there), to + (at - begin), &streaming_});
    }
}

// What is not read: (begin, bytes) in the file's order, whole pages.
Ranges DiskTier::holes() const {
    Ranges found;
    for (const Layer& layer : layers_)
        if (layer.tail_bytes > 0) found.emplace_back(layer.tail_begin, layer.tail_bytes);
    auto add = [&](uint64_t begin, uint64_t end) {
        if (page_up(begin) < page_down(end)) found.emplace_back(page_up(begin), page_down(end) - page_up(begin));
    };
    add(table_.offset, table_.offset + table_.n_bytes);
    for (auto [begin, end] : elsewhere_) add(begin, end);
    std::ranges::sort(found);
    return found;
}

void DiskTier::load(uint64_t file_bytes) {
    auto read = [&](uint64_t begin, uint64_t end) {
        use_huge_pages(memory_of(begin), end - begin);
        read_whole(begin, end, file_bytes, memory_of(begin));
    };
    uint64_t at = arena_begin_;
    for (auto [begin, n_bytes] : holes()) {
        read(at, begin);
        at = begin + n_bytes;
    }
    read(at, page_up(file_bytes));
    streaming_.store(static_cast<uint32_t>(stream_.size()));
    reader_->submit(stream_.data(), stream_.size());
    reader_->wait(streaming_);
    stream_.clear();
    reader_->check();
}

void DiskTier::expect(size_t il, const float* frequency) {
    Layer& layer = layers_[il];
    for (size_t i = 0; i < layer.uses.size(); i++)
        layer.uses[i] = static_cast<uint16_t>(std::clamp(frequency[i], 0.0f, 1.0f) * (ONE * WINDOW));
}

void DiskTier::read_rows(const int32_t* ids, size_t n) {
    uint64_t block = reader_->block(), used = 0;
    std::vector<Read> reads;
    std::atomic<uint32_t> pending{static_cast<uint32_t>(n)};
    rows_.clear();
    for (size_t k = 0; k < n; k++) {
        uint64_t at = table_.offset + static_cast<uint64_t>(ids[k]) * table_.row_bytes, end = at + table_.row_bytes;
        uint64_t begin = at / block * block, n_bytes = (end + block - 1) / block * block - begin;
        reads.push_back({begin, static_cast<uint32_t>(n_bytes), static_cast<uint32_t>(end - begin),
                         rows_landing_ + used, &pending});
        rows_.push_back(rows_landing_ + used + (at - begin));
        used += n_bytes;
    }
    reader_->submit(reads.data(), n);
    reader_->wait(pending);
    counts_.reads += n;
    for (const Read& read : reads) counts_.bytes += read.n_bytes;
}

bool DiskTier::request(size_t il, std::span<const std::span<const uint32_t>> chunks) {
    Layer& layer = layers_[il];
    now_ = &layer;
    layer.step++;
    Counts found = count_uses(layer, chunks);
    find_ahead(il);
    if (misses_.size() > n_transit_ || !plan_reads(layer)) return false;
    admit(layer);
    cached_ = true;
    counts_.from_prefix += found.from_prefix;
    counts_.from_cache += found.from_cache;
    counts_.from_disk += misses_.size();
    layer.n_missed = static_cast<uint32_t>(misses_.size());
    submit(landing_, false);
    return true;
}

void DiskTier::request_ahead(size_t il, std::span<const uint32_t> neurons) {
    Ahead& ahead = ahead_[il % 2];
    reader_->wait(ahead.pending);  // where nobody asked for what it holds
    ahead.layer = &layers_[il];
    ahead.misses.clear();
    for (uint32_t i : neurons) ahead.misses.push_back({i, nullptr});
    if (!make_room(layers_[il], ahead.misses, ahead.landing) ||
        !plan_reads(layers_[il], ahead.misses, ahead.landing, ahead.pending)) {
        ahead.misses.clear();
        return;
    }
    counts_.ahead += neurons.size();
    submit(ahead.landing, true);
}

void DiskTier::submit(Landing& landing, bool behind) {
    counts_.reads += landing.reads.size();
    for (const Read& read : landing.reads) counts_.bytes += read.n_bytes;
    reader_->submit(landing.reads.data(), landing.reads.size(), behind);
}

// misses_ = what is not in memory
DiskTier::Counts DiskTier::count_uses(Layer& layer, std::span<const std::span<const uint32_t>> chunks) {
    Counts found;
    if (layer.step % AGE_STEPS == 0)
        for (uint16_t& uses : layer.uses) uses = static_cast<uint16_t>(uses - uses * AGE_STEPS / WINDOW);
    misses_.clear();
    for (size_t c = 0; c < chunks.size(); c++) {
        first_miss_[c] = misses_.size();
        for (uint32_t i : chunks[c]) {
            layer.uses[i] = static_cast<uint16_t>(std::min<uint32_t>(layer.uses[i] + ONE, UINT16_MAX));
            uint32_t place = layer.place[i];
            if (place < layer.n_resident) {
                found.from_prefix++;
            } else if (place != NOWHERE) {
                found.from_cache++;
                layer.used_at[place - layer.first_slot] = layer.step;
            } else {
                misses_.push_back({i, nullptr});
            }
        }
    }
    first_miss_[chunks.size()] = misses_.size();
    for (size_t c = chunks.size(); c < MAX_CHUNKS; c++) first_miss_[c + 1] = misses_.size();
    return found;
}

// Misses that were read ahead need no read.
void DiskTier::find_ahead(size_t il) {
    foreseen_ = &ahead_[il % 2];
    if (std::exchange(foreseen_->layer, nullptr) != &layers_[il]) {
        foreseen_ = nullptr;
        return;
    }
    auto ahead = foreseen_->misses.begin(), end = foreseen_->misses.end();
    for (Miss& miss : misses_) {
        while (ahead != end && ahead->neuron < miss.neuron) ahead++;
        if (ahead == end) return;
        if (ahead->neuron != miss.neuron) continue;
        miss.from = ahead->from;
        counts_.ahead_asked++;
    }
}

// landing_.reads = what the misses still need, a chunk after the other; false where it is too small
bool DiskTier::plan_reads(const Layer& layer) {
    if (!make_room(layer, misses_, landing_)) return false;
    for (size_t c = 0; c < MAX_CHUNKS; c++) {
        std::span<Miss> misses{&misses_[first_miss_[c]], first_miss_[c + 1] - first_miss_[c]};
        if (!plan_reads(layer, misses, landing_, pending_[c])) return false;
    }
    return true;
}

// An empty landing, and what it has beyond the blocks of these misses; false where it is too small.
bool DiskTier::make_room(const Layer& layer, std::span<const Miss> misses, Landing& landing) const {
    landing.reads.clear();
    landing.used = 0;
    landing.spare = landing.n_bytes;
    uint64_t last_end = 0;
    for (const Miss& miss : misses) {
        if (miss.from) continue;
        auto [begin, end] = blocks(layer, miss);
        begin = std::max(begin, std::min(end, last_end));
        if (landing.spare < end - begin) return false;
        landing.spare -= end - begin;
        last_end = end;
    }
    return true;
}

// Reads of the misses' blocks, those that lie close together in one; pending: how many.
bool DiskTier::plan_reads(const Layer& layer, std::span<Miss> misses, Landing& landing,
                          std::atomic<uint32_t>& pending) const {
    size_t first_read = landing.reads.size();
    for (Miss& miss : misses) {
        if (miss.from) continue;
        auto [begin, end] = blocks(layer, miss);
        Read* last = landing.reads.size() > first_read ? &landing.reads.back() : nullptr;
        uint64_t last_end = last ? last->offset + last->n_bytes : 0;
        uint64_t gap = begin > last_end ? begin - last_end : 0;
        if (last && gap <= std::min(MERGE_BYTES, landing.spare) && end - last->offset <= MOST_BYTES) {
            landing.spare -= gap;
            landing.used += end - last_end;
        } else if (landing.used + end - begin > landing.n_bytes) {
            return false;
        } else {
            last = &landing.reads.emplace_back(Read{begin, 0, 0, landing.memory + landing.used, &pending});
            landing.used += end - begin;
        }
        uint64_t wanted_end = layer.offset + (miss.neuron + 1) * layer.stride;
        last->n_bytes = static_cast<uint32_t>(end - last->offset);
        last->needed = static_cast<uint32_t>(wanted_end - last->offset);
        miss.from = last->to + (wanted_end - layer.stride - last->offset);
    }
    pending.store(static_cast<uint32_t>(landing.reads.size() - first_read), std::memory_order_relaxed);
    return true;
}

// Begin and end of what is read of the file for this neuron.
std::pair<uint64_t, uint64_t> DiskTier::blocks(const Layer& layer, const Miss& miss) const {
    uint64_t block = reader_->block(), begin = layer.offset + miss.neuron * layer.stride;
    return {begin / block * block, (begin + layer.stride + block - 1) / block * block};
}

// Gives every miss a place: a slot of one that was asked for less and is not needed now, or one in transit.
void DiskTier::admit(Layer& layer) {
    victims_.clear();
    candidates_.clear();
    for (uint32_t s = 0; s < layer.n_slots; s++) {
        uint32_t tenant = layer.tenant[s];
        if (tenant == NOWHERE)
            victims_.emplace_back(0, s);
        else if (layer.used_at[s] != layer.step)
            victims_.emplace_back(layer.uses[tenant], s);
    }
    for (uint32_t m = 0; m < misses_.size(); m++) {
        candidates_.emplace_back(layer.uses[misses_[m].neuron], m);
        layer.place[misses_[m].neuron] = layer.first_transit + m;
    }
    size_t n = std::min(victims_.size(), candidates_.size());
    std::ranges::partial_sort(victims_, victims_.begin() + static_cast<std::ptrdiff_t>(n));
    std::ranges::partial_sort(candidates_, candidates_.begin() + static_cast<std::ptrdiff_t>(n), [](auto& a, auto& b) {
        return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    for (size_t i = 0; i < n && candidates_[i].first > victims_[i].first; i++) {
        uint32_t neuron = misses_[candidates_[i].second].neuron, slot = victims_[i].second;
        if (layer.tenant[slot] != NOWHERE) layer.place[layer.tenant[slot]] = NOWHERE;
        layer.tenant[slot] = neuron;
        layer.used_at[slot] = layer.step;
        layer.place[neuron] = layer.first_slot + slot;
    }
}

void DiskTier::fill() {
    if (filled_) return;
    filled_ = cached_ = true;
    for (Layer& layer : layers_)
        if (layer.tail_bytes > 0) fill(layer);
    misses_.clear();
    reader_->check();
}

void DiskTier::fill(Layer& layer) {
    std::vector<uint32_t> slots, neurons;
    for (uint32_t s = 0; s < layer.n_slots; s++)
        if (layer.tenant[s] == NOWHERE) slots.push_back(s);
    for (uint32_t i = layer.n_resident; i < n_ff_; i++)
        if (layer.place[i] == NOWHERE) neurons.push_back(i);
    std::ranges::stable_sort(neurons, [&](uint32_t a, uint32_t b) { return layer.uses[a] > layer.uses[b]; });
    neurons.resize(std::min(neurons.size(), slots.size()));
    std::ranges::sort(neurons);
    for (size_t begin = 0; begin < neurons.size(); begin += n_transit_) {
        size_t n = std::min<size_t>(n_transit_, neurons.size() - begin);
        read_to_slots(layer, {&neurons[begin], n}, &slots[begin]);
    }
}

// neurons: ascending, no more than may be in transit
void DiskTier::read_to_slots(Layer& layer, std::span<const uint32_t> neurons, const uint32_t* slots) {
    misses_.clear();
    for (uint32_t i : neurons) misses_.push_back({i, nullptr});
    first_miss_.fill(misses_.size());
    first_miss_[0] = 0;
    if (!plan_reads(layer)) return;
    for (const Read& read : landing_.reads) counts_.streamed += read.n_bytes;
    reader_->submit(landing_.reads.data(), landing_.reads.size());
    reader_->wait(pending_[0]);
    for (size_t m = 0; m < misses_.size(); m++) {
        uint32_t place = layer.first_slot + slots[m];
        std::memcpy(layer.base + place * layer.stride, misses_[m].from, layer.stride);
        layer.tenant[slots[m]] = neurons[m];
        layer.place[neurons[m]] = place;
    }
}

void DiskTier::bring(size_t chunk) {
    reader_->wait(pending_[chunk]);
    if (foreseen_) reader_->wait(foreseen_->pending);
    for (size_t m = first_miss_[chunk]; m < first_miss_[chunk + 1]; m++)
        std::memcpy(now_->base + now_->place[misses_[m].neuron] * now_->stride, misses_[m].from, now_->stride);
}

void DiskTier::finish() {
    for (const Miss& m : misses_)
        if (now_->place[m.neuron] >= now_->first_transit) now_->place[m.neuron] = NOWHERE;
    misses_.clear();
    reader_->check();
}

// The shared memory is about to be overwritten.
void DiskTier::forget() {
    if (!cached_) return;
    cached_ = filled_ = false;
    uint64_t longest = 0;
    for (const Layer& layer : layers_) longest = std::max(longest, layer.tail_bytes);
    for (Layer& layer : layers_)
        for (uint32_t s = 0; s < layer.n_slots; s++) {
            bool lost = layer.base + (layer.first_slot + s) * layer.stride < slots_ + longest;
            if (!lost || layer.tenant[s] == NOWHERE) continue;
            layer.place[layer.tenant[s]] = NOWHERE;
            layer.tenant[s] = NOWHERE;
        }
    madvise(slots_, shared_bytes_, MADV_DONTNEED);  // this view only: a page counts once in the process's memory
}

void DiskTier::start_stream(size_t il) {
    Layer& layer = layers_[il];
    if (layer.tail_bytes == 0 || streamed_ == &layer) return;
    forget();
    streamed_ = &layer;
    stream_.clear();
    uint64_t end = layer.tail_begin + layer.tail_bytes;
    read_whole(layer.tail_begin, end, end, memory_of(layer.tail_begin));
    streaming_.store(static_cast<uint32_t>(stream_.size()));
    counts_.streamed += layer.tail_bytes;
    reader_->submit(stream_.data(), stream_.size());
}

void DiskTier::end_stream() {
    reader_->wait(streaming_);
    reader_->check();
}

void DiskTier::release(size_t il) {
    const Layer& layer = layers_[il];
    streamed_ = nullptr;
    if (layer.tail_bytes > 0) madvise(memory_of(layer.tail_begin), layer.tail_bytes, MADV_DONTNEED);
}

#else

DiskTier::DiskTier(int, uint64_t, uint64_t, uint32_t, const std::vector<Bundles>&, const Table&, const pi_disk_params&,
                   Ranges) {
    throw Error(PI_ERROR_UNSUPPORTED, "a limit of memory needs Linux");
}

#endif

DiskTier::Counts DiskTier::take_counts() { return std::exchange(counts_, {}); }

}  // namespace pi
