// The disk tier: of each layer's bundles only the first lie in memory for good; the others stay in the file, are read
// when a token asks for them, and kept in a cache where they are asked for often.
//
// The kernels see one base and one stride a layer: neuron i is bundle i of
//
//     [ 0 .. n_resident ) memory   [ .. n_ff ) tail: no memory of its own      ...      [ slots ]  [ transit ]
//
// and a cold neuron that was read is the bundle of a slot (kept) or of a place in transit (for this step of this
// layer). Prompts and dense layers need every neuron: they read a layer's tail in sequence to its natural place. All
// tails are views of one shared memory, which is as long as the longest of them, and which the slots and the transit
// lie in, too: what a prompt overwrites is forgotten, and read again when it is asked for.
//
// While a layer waits, the next one is asked what it will want. That comes behind everything else, so that the disk has
// something to do during the next attention, and lands in a place of its own.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "model.h"
#include "reader.h"

namespace pi {

// One layer's bundles in the file; neurons from n_resident on are cold.
struct Bundles {
    uint64_t offset, stride;
    uint32_t n_resident;
};

// A matrix of which a token needs one row: it stays in the file, too. n_bytes 0: there is none.
struct Table {
    uint64_t offset = 0, n_bytes = 0, row_bytes = 0;
};

constexpr size_t TABLE_ROWS = 256;   // that are read together
constexpr uint32_t PAYS_AHEAD = 32;  // reads of a layer that take longer than asking for them ahead
constexpr size_t AHEAD = 64;  // neurons of a layer that are read before it asks for them: as many as are in flight

class DiskTier {
   public:
    // Reads everything but the tails, the table, and what lies elsewhere (begin, end), of the file's data,
    // [data_offset, file_bytes).
    DiskTier(int fd, uint64_t data_offset, uint64_t file_bytes, uint32_t n_ff, const std::vector<Bundles>& layers,
             const Table& table, const pi_disk_params& params, Ranges elsewhere = {});
    ~DiskTier();
    DiskTier(const DiskTier&) = delete;
    DiskTier& operator=(const DiskTier&) = delete;

    const uint8_t* data() const { return arena_ + (data_offset_ - arena_begin_); }
    void expect(size_t il, const float* frequency);  // (n_ff,) what the cache assumes before it has seen any token

    bool holds(size_t il) const { return layers_[il].tail_bytes > 0; }  // whether some of a layer's neurons are cold
    const uint32_t* places(size_t il) const { return layers_[il].place.data(); }

    // Sees to it that these neurons come: ids of each chunk, ascending. Their places hold until finish. False where
    // they are too many for the transit: then the layer has to be streamed.
    bool request(size_t il, std::span<const std::span<const uint32_t>> chunks);
    void bring(size_t chunk);  // waits until the chunk's neurons are in their places; from any thread, once a chunk
    void finish();

    bool pays_ahead(size_t il) const { return layers_[il].n_missed >= PAYS_AHEAD; }
    uint32_t first_cold(size_t il) const { return layers_[il].n_resident; }
    bool here(size_t il, uint32_t neuron) const { return layers_[il].place[neuron] != NOWHERE; }
    // Reads neurons that are not here, ascending and at most AHEAD, behind everything else: the layer may ask for them.
    void request_ahead(size_t il, std::span<const uint32_t> neurons);

    void fill();  // empty slots take those neurons that are asked for most

    void start_stream(size_t il);  // reads the tail to its natural place; nothing where it is on its way already
    void end_stream();             // waits for it
    void release(size_t il);       // the tail has been used

    bool holds_table() const { return table_.n_bytes > 0; }
    void read_rows(const int32_t* ids, size_t n);            // of the table, at most TABLE_ROWS
    const uint8_t* row(size_t k) const { return rows_[k]; }  // of ids[k]

    void check() { reader_->check(); }  // throws where a read failed or the file was changed

    struct Counts {
        uint64_t from_prefix = 0, from_cache = 0, from_disk = 0;  // neurons that were asked for
        uint64_t ahead = 0, ahead_asked = 0;          // neurons read ahead; those of them that were then asked for
        uint64_t reads = 0, bytes = 0, streamed = 0;  // bytes: of all reads but the streamed
    };
    Counts take_counts();

    std::mutex in_use;                                         // by one call at a time: sessions share the cache
    uint64_t weights_bytes() const { return weights_bytes_; }  // resident tensors, in whole pages
    uint64_t cache_bytes() const { return shared_bytes_; }
    uint64_t beside_bytes() const { return landing_bytes_ + tables_bytes_ + rows_bytes_; }

   private:
    static constexpr uint32_t NOWHERE = UINT32_MAX;
    struct Layer {
        uint64_t offset = 0, stride = 0;
        uint8_t* base = nullptr;  // of neuron 0
        uint32_t n_resident = 0;
        uint64_t tail_begin = 0, tail_bytes = 0;                  // in the file, whole pages
        uint32_t first_slot = 0, n_slots = 0, first_transit = 0;  // places
        uint32_t step = 0, n_missed = 0;                          // n_missed: of the last step
        std::vector<uint32_t> place;                              // (n_ff,) NOWHERE for what is on disk only
        std::vector<uint16_t> uses;                               // (n_ff,) how often each was asked for lately
        std::vector<uint32_t> tenant;                             // (n_slots,) neuron or NOWHERE
        std::vector<uint32_t> used_at;                            // (n_slots,) step
    };
    struct Miss {
        uint32_t neuron;
        const uint8_t* from;  // where in a landing; NULL: its read is not planned yet
    };
    // Memory where reads arrive, whole blocks.
    struct Landing {
        uint8_t* memory = nullptr;
        uint64_t n_bytes = 0, used = 0, spare = 0;  // spare: what the least that must be read leaves
        std::vector<Read> reads;
    };
    // What one layer is expected to ask for.
    struct Ahead {
        const Layer* layer = nullptr;  // NULL once it has asked
        std::vector<Miss> misses;
        Landing landing;
        std::atomic<uint32_t> pending{0};
    };

    void map_memory(uint64_t file_bytes, const std::vector<Bundles>& layers);
    void load(uint64_t file_bytes);
    Ranges holes() const;
    void read_whole(uint64_t begin, uint64_t end, uint64_t file_bytes, uint8_t* to);
    uint8_t* memory_of(uint64_t offset) const { return arena_ + (offset - arena_begin_); }
    Counts count_uses(Layer& layer, std::span<const std::span<const uint32_t>> chunks);
    void find_ahead(size_t il);
    bool plan_reads(const Layer& layer);
    bool make_room(const Layer& layer, std::span<const Miss> misses, Landing& landing) const;
    bool plan_reads(const Layer& layer, std::span<Miss> misses, Landing& landing, std::atomic<uint32_t>& pending) const;
    std::pair<uint64_t, uint64_t> blocks(const Layer& layer, const Miss& miss) const;
    void submit(Landing& landing, bool behind);
    void admit(Layer& layer);
    void fill(Layer& layer);
    void read_to_slots(Layer& layer, std::span<const uint32_t> neurons, const uint32_t* slots);
    void forget();

    uint32_t n_ff_;
    uint64_t data_offset_, arena_begin_ = 0, arena_bytes_ = 0, shared_bytes_ = 0, slots_bytes_ = 0;
    uint64_t weights_bytes_ = 0, landing_bytes_ = 0, tables_bytes_ = 0;
    uint32_t n_transit_;
    int shared_ = -1;
    uint8_t* arena_ = nullptr;           // the file's data, a page for a page; then the slots and the transit
    uint8_t* slots_ = nullptr;           // (shared_bytes_,)
    uint8_t* landing_memory_ = nullptr;  // (landing_bytes_,) of all landings
    std::vector<Layer> layers_;

    Table table_;
    Ranges elsewhere_;
    uint64_t rows_bytes_ = 0;
    uint8_t* rows_landing_ = nullptr;  // (rows_bytes_,)
    std::vector<const uint8_t*> rows_;

    // the present step
    Layer* now_ = nullptr;
    std::vector<Miss> misses_;
    std::array<size_t, MAX_CHUNKS + 1> first_miss_{};
    std::array<std::atomic<uint32_t>, MAX_CHUNKS> pending_{};
    Landing landing_;
    Ahead* foreseen_ = nullptr;                                        // what was read ahead for it
    std::array<Ahead, 2> ahead_;                                       // for layers of even and of odd number
    std::vector<std::pair<uint32_t, uint32_t>> candidates_, victims_;  // uses, and neuron or slot

    std::vector<Read> stream_;
    std::atomic<uint32_t> streaming_{0};
    Layer* streamed_ = nullptr;
    bool cached_ = false;  // whether slots hold anything
    bool filled_ = false;  // whether all have been filled since some were last lost
    Counts counts_;
    std::unique_ptr<Reader> reader_;  // last: ends before what it reads to
};

}  // namespace pi
