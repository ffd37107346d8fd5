// One side of a model, the processor's or the host device's: the weights that lie there, the KV cache and scratch of
// one conversation, threads, and the steps that a pass is made of. decode.cpp takes them for one token through the
// sparse path, batch.cpp for many through the matrix-matrix path.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "device.h"
#include "disk.h"
#include "huge_pages.h"
#include "model.h"
#include "numbers.h"
#include "threads.h"
#include "ticks.h"

namespace pi {

constexpr size_t BATCH = 256;  // tokens that go through the matrix-matrix path together, at most
static_assert(BATCH <= TABLE_ROWS);
constexpr size_t DOWN_COLUMNS = 64;     // columns of the down projection that one item of a batch computes
constexpr size_t PACKED_FLOATS = 8192;  // a packed tile: 512 elements of 16 rows, or 128 rows of 64 columns
constexpr size_t PACKED_BLOCKS = 16;    // the same in 8 bits: 512 elements of 32 rows or columns
constexpr size_t PIECE = 256;           // neurons of an expert that a batch computes together
constexpr size_t QUERIES = 32;          // tokens of a batch whose attention is computed together

// A buffer whose start is aligned to a cache line, a large one's to a huge page.
template <class T>
class Buffer {
   public:
    void resize(size_t n) {
        n_ = n;
        size_t align = bytes() < HUGE_PAGE ? 64 : HUGE_PAGE;
        memory_ = {static_cast<T*>(::operator new[]((n + 1) * sizeof(T), std::align_val_t(align))), Delete{align}};
        if (align == HUGE_PAGE) use_huge_pages(memory_.get(), bytes());
        std::fill_n(memory_.get(), n, T{});
    }
    T* data() { return memory_.get(); }
    const T* data() const { return memory_.get(); }
    T& operator[](size_t i) { return memory_.get()[i]; }
    const T& operator[](size_t i) const { return memory_.get()[i]; }
    size_t bytes() const { return n_ * sizeof(T); }

   private:
    struct Delete {
        size_t align = 64;
        void operator()(T* p) const { ::operator delete[](static_cast<void*>(p), std::align_val_t(align)); }
    };
    std::unique_ptr<T[], Delete> memory_;
    size_t n_ = 0;
};

// A vector and its quantised form.
struct Activations {
    Buffer<float> f;       // (n,)
    Buffer<float> d, sum;  // (n / 32,)
    Buffer<int8_t> q;      // (n,)

    MutableX8 x8(size_t begin) { return {&d[begin / QK], &sum[begin / QK], &q[begin]}; }
    Vector both() const { return {f.data(), {d.data(), sum.data(), q.data()}}; }
};

// Where the time of a token goes. DISK, CARD: waiting for them. OTHER is what one thread does alone; SYNC is waiting
// for other threads.
enum Part { ATTENTION, PREDICTOR, GATE, UPDOWN, HEAD, DISK, CARD, OTHER, SYNC, N_PARTS };

// Neurons and tokens of a batch that are computed together: a layer's from `first` on and all of the batch's, or a
// piece of an expert and the tokens that chose it. Rows and biases: of these neurons, in order.
struct Group {
    const Layer& layer;
    Rows select, up, down;
    const float *select_bias, *up_bias, *down_bias;
    uint32_t first = 0, expert = 0;
    const uint32_t *neurons = nullptr, *tokens = nullptr;  // NULL: all
    size_t neuron(size_t i) const { return neurons ? neurons[i] : first + i; }
    size_t token(size_t k) const { return tokens ? tokens[k] : k; }
};

// One thread's scratch.
struct Worker {
    Buffer<uint32_t> asked, active;   // (n_ff,) indices of neurons
    Buffer<uint32_t> places;          // (n_ff,) where these lie, with a disk tier
    Buffer<float> logit, pre, a, up;  // (n_ff,)
    Buffer<float> scores;             // (QUERIES, n_ctx, rounded up to whole tiles) attention
    Buffer<float> packed;             // (PACKED_FLOATS,)
    Buffer<Packed8> packed8;          // (PACKED_BLOCKS,)
    Buffer<float> tile;               // (BATCH, DOWN_COLUMNS)
    pi_layer_score counted;           // of one layer and batch
    double squares = 0;               // of the present chunk's h, where these are normalised
    const uint32_t* place = nullptr;  // of the present chunk's neurons; NULL: each lies in its own
    NeuronCounts n;                   // since the last collect_counts
    uint64_t n_prefix = 0;            // likewise, of layers with neurons on disk: those asked for in chunks without any
    uint64_t spent[N_PARTS] = {};     // ticks, likewise
};

// Bytes of weights that were read for neurons.
struct NeuronBytes {
    uint64_t predictor, gate, updown;
};
NeuronBytes bytes_of(const Layer& layer, const NeuronCounts& n);

uint64_t max_rank(const Weights& weights);  // of the predictors

// A sum over neurons that goes on where another left off.
struct Chain {
    const float* before = nullptr;  // (n, n_embd) NULL: zeros
    float* out = nullptr;           // (n, n_embd) may be `before`; NULL: stream += sum + down's bias
};

class Side {
   public:
    // disk: where neurons lie that are not in memory, or NULL
    Side(const Config& config, const Weights& weights, DiskTier* disk, const pi_session_params& params);

    const Config& config;
    const Weights& weights;
    const Ops& ops;
    size_t n_ctx;
    pi_stats stats{};                  // but for what `counts` says
    std::vector<NeuronCounts> counts;  // (n_layer,)
    uint64_t kv_bytes() const { return keys_.bytes() + values_.bytes(); }
    uint64_t scratch_bytes() const { return scratch_bytes_; }

    // ---- the steps of a pass
    void begin(const Pass& pass);
    float* stream() { return pass_.decode ? hidden_.data() : b_hidden_.data(); }  // (n, n_embd)
    void embed(const int32_t* tokens);
    void add_positions();  // learned ones, where the model has them
    void attention(size_t il);
    void prepare_ffn(size_t il);  // the FFN's input, and what its predictor makes of it, from the stream
    void take_ffn_input(size_t il, const float* x, const float* rank);  // the same from another side
    void choose_experts(size_t il, const float* x);  // of a layer here; x: (n, n_embd) what its router sees
    float* ffn_input() { return pass_.decode ? x_.f.data() : b_x_.data(); }       // (n, n_embd)
    float* ffn_rank() { return pass_.decode ? rank_.f.data() : b_rank_.data(); }  // (n, rank)
    void ffn(size_t il);                            // what the layer's neurons here hand on, and in decoding their sums
    void count(pi_layer_score* score) const;        // what the last ffn selected, in a selective pass
    void sum(size_t il, const Chain& chain);        // of what these neurons add
    void add_lent(const Layer& layer, float* sum);  // += what another side's neurons add; in batches, after `sum`
    void add_sum(size_t il, const float* sum);      // stream += sum + down's bias;   sum: (n, n_embd)
    void head(float* logits);  // output . norm(stream), of the last token or, in a selective pass, of all; uncut

    bool asks(const Layer& layer) const { return layer.predictor && mode_ != PI_MODE_DENSE && mode_ != PI_MODE_GATE; }
    // Whether the present pass asks the layer's predictor: what prepare_ffn makes of the FFN's input has a rank.
    bool asks_now(const Layer& layer) const { return asks(layer) && (pass_.decode || pass_.selective); }
    // Whether the layer's experts, which are here, are chosen by what the router sees there.
    bool routes(const Layer& layer, RoutedBy by) const { return layer.expert && config.experts.routed_by == by; }
    void bring_neurons(size_t il);  // from disk, in batches, to where they lie in memory
    void release_neurons(size_t il);

   protected:
    void cap(float* logits, size_t n);
    void start_clock();
    void lap(Part part);
    void collect_seconds(double seconds);
    void collect_disk_counts();
    std::unique_lock<std::mutex> take_turn() const;

    DiskTier* const disk;
    Pass pass_{};
    Pool pool_;

   private:
    void normalise(const Norm& norm, const float* x, float* out) const;
    void set_angles();
    void prepare_heads(const Layer& layer, float* x, uint32_t n_heads, size_t t);
    void unit_rms(size_t n, float* x) const;
    void store_kv(size_t il, uint32_t head, size_t pos, const float* k, const float* v);
    void attend(size_t il, uint32_t head, size_t n_pos, const float* q, float* out, Worker& w);
    void activate(const Layer& layer, size_t n, float* a) const;
    void apply_up(size_t n, const float* a, float* up) const;

    // decode.cpp
    struct Job {
        const Linear* linear;
        float* out;
        bool add = false;  // to what out holds
    };
    Vector quantised(Activations& x, size_t n);
    void project(Part part, std::initializer_list<Job> jobs, Vector x);
    void attention_token(size_t il);
    void prepare_token(const Layer& layer, const float* stream);
    void take_token(const Layer& layer, const float* x, const float* rank);
    Vector predictor_rank(const Predictor& predictor, Vector x, Activations& rank);
    struct Range {
        size_t begin, end;
    };
    Range own_chunks(const Layer& layer) const;
    std::array<size_t, MAX_CHUNKS> deal(size_t n) const;
    void ffn_chunks(const Layer& layer, Vector x, Vector rank);
    void ffn_chunk(const Layer& layer, size_t chunk, uint32_t then, Vector x, Vector rank, Worker& w);
    void ffn_from_disk(const Layer& layer, size_t il, Vector x, Vector rank);
    void fetch(const Layer& layer, size_t il, Vector x, Vector rank);
    bool request(const Layer& layer, size_t il, Range cold, Worker& w);
    void stream_layer(size_t il);
    bool looks_ahead(size_t il) const;
    void look_ahead(size_t il);
    void prefix_chunk(const Layer& layer, size_t chunk, Vector x, Vector rank, Worker& w);
    void choose(const Layer& layer, size_t chunk, Vector x, Vector rank, Worker& w);
    void fetched_chunk(const Layer& layer, size_t chunk, Vector x, const uint32_t* place, Worker& w);
    const uint32_t* places(const uint32_t* ids, size_t n, Worker& w) const;
    void finish_chunk(size_t chunk, size_t n_active, Worker& w);
    void decide(const Layer& layer, const uint32_t* ids, size_t n, Vector x, Worker& w);
    void finish_deciding(const Layer& layer, const uint32_t* ids, size_t n, Worker& w);
    size_t add_neurons(const Layer& layer, const uint32_t* ids, const float* pre, size_t n, Vector x, float* sum,
                       Worker& w);
    size_t add_bundles(const Layer& layer, uint32_t lo, size_t n, uint32_t then, Vector x, float* sum, Worker& w);
    void add_down(const Layer& layer, size_t n, const uint8_t* next, float* sum, Worker& w);
    template <class Task>
    void parallel(Part part, size_t n_items, Task&& task);
    size_t ask(const Layer& layer, uint32_t lo, uint32_t hi, Vector rank, Worker& w);
    void matvec_at(const Rows& rows, const uint32_t* ids, size_t n, bool in_order, Vector x, float* out) const;
    void sum_chunks(const Layer& layer, const Chain& chain);
    void collect_counts(NeuronCounts& sum);
    void head_token(const float* hidden, float* logits);

    // experts.cpp
    void route(const Layer& layer, const float* x);
    void route_batch(const Layer& layer, const float* x, size_t n);
    size_t candidates(const Layer& layer, uint32_t lo, uint32_t hi, Worker& w) const;
    void experts_batch(const Layer& layer);
    void sum_experts(size_t il, const Chain& chain);
    void sort_members(const Layer& layer);
    size_t gather_tokens(uint32_t expert, size_t n);
    Rows gather(const Rows& rows, size_t part, const uint32_t* ids, size_t n);
    const float* gather(const float* bias, size_t part, const uint32_t* ids, size_t n);

    // batch.cpp
    void normalise_batch(const Norm& norm, const float* stream);
    void quantise_token(const float* x, size_t len, size_t t);
    void quantise_batch(const float* x, size_t n, size_t len);
    void attention_batch(size_t il);
    void attend_queries(size_t il, uint32_t head, size_t first, size_t n, Worker& w);
    void score_queries(size_t il, uint32_t head, size_t first, size_t n, Worker& w);
    void mix_queries(size_t il, uint32_t head, size_t first, size_t n, Worker& w);
    void prepare_batch(const Layer& layer, const float* stream);
    void take_batch(const Layer& layer, const float* x, const float* rank);
    void ffn_batch(const Layer& layer);
    Group own_group(const Layer& layer) const;
    void head_batch(float* logits);
    void fire(const Group& group, const float* x, size_t n);
    void activate_token(const Group& group, size_t k, pi_layer_score* score);
    void predictor_rank_batch(const Predictor& predictor, const float* x);
    void predict_batch(const Layer& layer);
    void gemm(const Rows& rows, const float* bias, const float* x, size_t n, float* out, bool add);
    void tile_of_rows(const Rows& rows, size_t begin, size_t m, const float* x, size_t n, Worker& w);
    void tile_of_rows8(const Rows& rows, size_t begin, size_t m, size_t n, Worker& w);
    void gemm_down(const Group& group, size_t n, const Chain& chain);
    void tile_of_columns(const Rows& rows, size_t begin, size_t m, const float* x, size_t ldx, size_t n, Worker& w);
    void tile_of_columns8(const Rows& rows, size_t begin, size_t n, Worker& w);

    uint16_t* key(size_t il, uint32_t head, size_t pos) { return &keys_[kv_index(il, head, pos)]; }
    uint16_t* value(size_t il, uint32_t head, size_t pos) { return &values_[kv_index(il, head, pos)]; }
    size_t ld_scores() const { return (n_ctx + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; }
    size_t kv_index(size_t il, uint32_t head, size_t pos) const {
        return ((kv_layer_[il] * config.n_head_kv + head) * n_ctx + pos) * config.head_dim;
    }

    pi_mode mode_;
    bool uncut_;
    std::vector<Worker> workers_;
    std::vector<size_t> kv_layer_;    // (n_layer,) where among those whose attention is computed here
    Buffer<uint16_t> keys_, values_;  // (layers of these, n_head_kv, n_ctx, head_dim) float16
    Buffer<float> cos_, sin_;         // (min(BATCH, n_ctx), rotary_dim / 2)
    Buffer<float> hidden_;            // (n_embd,) the residual stream
    Activations x_;                   // (max(n_embd, q_dim),) a normalised input, or what attention gave
    Activations rank_;                // (max rank,) the predictor's hidden layer
    Buffer<float> routes_;            // (n_experts,) the weight of each, 0: not chosen
    Buffer<float> q_, k_, v_;         // (q_dim,) (kv_dim,) (kv_dim,)
    Vector ffn_x_{}, ffn_rank_{};     // both forms of x_ and rank_, as the FFN reads them
    Buffer<float> partial_;           // (n_chunks, n_embd) each chunk's share of the FFN
    bool chunk_fired_[MAX_CHUNKS] = {};
    double squares_[MAX_CHUNKS] = {};  // of each chunk's h, where these are normalised
    Buffer<float> position_row_;       // (n_embd,) with learned positions
    // with a disk tier
    Buffer<uint32_t> chosen_;   // (n_ff,) neurons that a layer computes, each chunk's from its first place on
    Buffer<float> chosen_pre_;  // (n_ff,) what their deciding rows gave, where these were computed already
    std::array<size_t, MAX_CHUNKS> n_chosen_{};
    Activations ahead_x_;        // (n_embd,) what the next layer's FFN would read if it came now
    Activations ahead_rank_;     // (max rank,) what its predictor's hidden layer makes of that
    Buffer<float> ahead_logit_;  // (n_ff,) what its predictor says of its cold neurons
    Buffer<uint32_t> ahead_;     // (n_ff,) those that may be worth a read
    // batch.cpp: (min(BATCH, n_ctx), .) each
    Buffer<float> b_hidden_, b_x_, b_q_, b_k_, b_v_, b_select_, b_up_, b_rank_, b_asked_, b_routes_;
    // with experts: a layer's neurons by expert, (n_ff,); those that chose the present one, (batch,), and their inputs,
    // (batch, n_embd); the rows of a piece of it, (3, PIECE) of at most n_embd floats, and their biases, (2, PIECE);
    // what all of them add, (batch, n_embd)
    Buffer<uint32_t> members_, takers_;
    Buffer<float> b_taken_, piece_bias_, b_sum_;
    Buffer<uint8_t> piece_rows_;
    Buffer<BatchX8> b_q8_;  // what a quantised matrix is multiplied with, in blocks: the last one filled up with zeros
    uint64_t scratch_bytes_ = 0;
    uint64_t spent_[N_PARTS] = {}, mark_ = 0;  // ticks of the present token, by part; when they were last counted
};

// One parallel step of decoding, whose items' time counts as `part` (or as what they noted themselves), and the
// threads' waiting as SYNC.
template <class Task>
void Side::parallel(Part part, size_t n_items, Task&& task) {
    lap(OTHER);
    pool_.run(n_items, task);
    lap(SYNC);
    uint64_t busy = std::min(pool_.take_busy(), spent_[SYNC]);
    spent_[SYNC] -= busy;
    for (Worker& w : workers_) {
        for (size_t p = 0; p < N_PARTS; p++) {
            uint64_t noted = std::min(std::exchange(w.spent[p], 0) / workers_.size(), busy);
            spent_[p] += noted;
            busy -= noted;
        }
    }
    spent_[part] += busy;
}

}  // namespace pi
