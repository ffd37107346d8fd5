// One conversation on the card. The commands of a decoded token are collected; a sequence of them that was carried out
// before is one launch of its graph. Those of a batch are launched one by one: there the work outweighs the launches.
#include <atomic>
#include <compare>
#include <exception>
#include <map>
#include <vector>

#include "batch.h"
#include "memory.h"
#include "session.h"

namespace pi::card {

namespace {

constexpr uint32_t PIECE = 8192;        // neurons of a batch that are computed together: bounds the scratch
constexpr uint32_t MAX_SPLITS = 64;     // of the positions, in decode attention
constexpr uint32_t MAX_SHARES = 96;     // of the firing neurons, when their down rows are added
constexpr uint32_t MAX_HEAD_DIM = 256;  // what a warp holds of a head

// On the card, of the graphs of a layer's commands: an allowance, which benchmarks/gpu_budget.py checks.
constexpr uint64_t GRAPH_BYTES = 128u << 10;

uint64_t whole_pages(uint64_t n) { return align_up(n, DEVICE_PAGE); }

// A layer's neurons in a row: those that lie on the card, or those that the processor lent.
struct Neurons {
    CardRows select, up, down;
    const float *select_bias, *up_bias;
    uint32_t first, n;
};

class Session final : public DeviceSession {
   public:
    Session(const Config& config, const Weights& weights, const pi_session_params& params, uint32_t lent, uint64_t room,
            uint32_t n_processors);
    ~Session() override;

    void begin(const Pass& pass) override;
    void enter() override { give({Command::Enter}); }
    void embed(const int32_t* tokens) override;
    void attention(size_t il) override { give({Command::Attention, il}); }
    void prepare_ffn(size_t il) override { give({Command::PrepareFfn, il}); }
    void give_ffn_input(size_t il) override { give({Command::GiveFfnInput, il}); }
    void take_ffn_input(size_t il) override { give({Command::TakeFfnInput, il}); }
    void lend(size_t il, const Layer& home) override;
    void ffn(size_t il) override { give({Command::Ffn, summed_ = il}); }
    void give_sum() override { give({Command::GiveSum, summed_}); }
    void add_sum(size_t il) override { give({Command::AddSum, il}); }
    void add_inbox(size_t il) override { give({Command::AddInbox, il}); }
    void leave() override { give({Command::Leave}); }
    void head() override { give({Command::Head}); }
    void count(pi_layer_score* score) override { asked_scores_.emplace_back(summed_, score); }

    void start() override;
    uint64_t mark() override;
    void wait(uint64_t ticket) override;

    void take_counts(std::span<NeuronCounts> layers) override;
    uint64_t kv_bytes() const override { return whole_pages(cache_.bytes()); }
    uint64_t scratch_bytes() const override { return whole_pages(scratch_.bytes()) + graph_bytes(); }

   private:
    struct Command {
        enum What : uint32_t {
            Enter,
            Attention,
            PrepareFfn,
            GiveFfnInput,
            TakeFfnInput,
            Ffn,
            GiveSum,
            AddSum,
            AddInbox,
            Leave,
            Head,
            Mark
        };
        What what;
        size_t layer = 0;
        auto operator<=>(const Command&) const = default;
    };
    using Commands = std::vector<Command>;

    template <class Work>
    void guarded(Work&& work);
    void give(Command command);
    void flush();
    void make_room_for_logits();
    void carry_out(Command command);
    cudaGraphExec_t graph_of(const Commands& commands);
    template <class... P, class... A>
    void run(void (*kernel)(P...), dim3 grid, uint32_t threads, uint32_t shared, A... args);

    uint64_t graph_bytes() const { return whole_pages(config_.n_layer * GRAPH_BYTES); }
    void place_scratch(Places& places);
    void place_mailboxes(Places& places);
    uint32_t most_rank() const;

    void collect_scores();
    void attention_of(size_t il);
    void attend(const Heads& heads);
    void attend_many(const Heads& heads);
    Heads heads_of(size_t il) const;
    void normalise_stream(const Norm& norm, const float* stream, uint32_t n);
    void take_vectors(const float* from, uint32_t n, bool relu, const MutableVec& to);
    MutableVec for_tokens(MutableVec v, uint32_t n) const;
    void ffn_input_of(const Layer& layer);
    void rank_of(const Layer& layer);
    void take_rank(const Layer& layer, const float* from, bool relu);
    void give_input_of(const Layer& layer);
    void take_input_of(const Layer& layer);
    void neurons_of(size_t il);
    void decode_neurons(const Layer& layer, const Neurons& neurons, Counts* counts);
    uint32_t tiles_of(const Layer& layer) const;
    uint32_t n_parts(const Layer& layer) const;
    void batch_neurons(size_t il, const Neurons& neurons);
    void forecast(const Layer& layer, BatchNeurons& job);
    void add_vectors(const float* parts, uint32_t n_parts, const float* bias, float* out, bool add);
    void output_head();
    void multiply(const Halves& x, const Linear& linear, float* out, bool add);
    template <bool COLUMNS>
    void gemm_of(const GemmJob& job);
    void halve_vectors(const float* in, uint32_t n, uint32_t ld, Halves& out);
    void copy_vectors(const float* in, uint32_t ld_in, float* out, uint32_t ld_out, uint32_t n, uint32_t n_rows);
    void matvec_of(const MatvecJobs& jobs);

    bool asks(const Layer& layer) const;
    bool asks_now(const Layer& layer) const { return asks(layer) && (pass_.decode || pass_.selective); }
    Activating activating(const Layer& layer) const;
    const Layer& layer(size_t il) const { return weights_.layers[il]; }
    uint32_t n_tokens() const { return static_cast<uint32_t>(pass_.n); }

    const Config& config_;
    const Weights& weights_;
    const pi_mode mode_;
    const bool uncut_;
    const uint32_t n_ctx_, batch_, lent_, n_processors_;
    uint32_t group_ = 1, n_splits_ = 1;  // queries of a block in decode attention, and splits of the positions
    Stream stream_;
    Upload upload_{stream_};
    Memory cache_, scratch_, shared_, many_logits_;
    std::vector<uint32_t> cache_slots_;  // of each layer, which of the cached ones it is
    uint32_t head_ld_;                   // head_dim, rounded up to whole pieces

    Pass pass_{};
    Commands pending_;
    std::map<Commands, cudaGraphExec_t> graphs_;
    uint64_t n_marks_ = 0;
    volatile uint64_t* seen_ = nullptr;  // tickets that are done
    float* one_logits_ = nullptr;
    std::exception_ptr failed_;
    std::vector<std::pair<size_t, pi_layer_score*>> asked_scores_;
    Neurons visitors_{};          // what was lent for the next ffn
    size_t summed_ = 0;           // the layer of the last ffn
    uint32_t n_batch_parts_ = 0;  // of the present sum

    // Scratch, on the card.
    PassState* state_;
    uint64_t* n_done_;   // tickets
    float *cos_, *sin_;  // (batch, rotary_dim / 2)
    float* residual_;    // (batch, n_embd) the stream
    // (batch, ld_) a normalised input, what attention gave, the predictor's hidden layer
    MutableVec x_, heads_, rank_;
    uint32_t x_ld_, heads_ld_, rank_ld_;
    float *q_, *k_, *v_;       // (batch, q_dim) (batch, kv_dim) (batch, kv_dim)
    float* raw_rank_;          // (batch, max rank)
    float* head_parts_;        // (n_head, n_splits, head_ld + 2)
    uint32_t *ids_, *starts_;  // (n neurons,) (n_segments + 1,)
    Tally* tallies_;           // (n_segments,)
    uint32_t* n_ended_;        // blocks
    float* h_;                 // (n neurons,)
    Counts* counts_;           // (n_layer,)
    ScoreCounts* scores_;      // (n_layer,)
    float* parts_;             // (n_shares, n_embd), or (batch, n_embd): they make up the sum
    float* logits_;            // (n_vocab,)
    Halves x_half_, rank_half_, h_half_;
    float *select_, *up_, *forecast_;  // (batch, piece)
    uint8_t *visit_select_, *visit_up_, *visit_down_;
    float *visit_select_bias_, *visit_up_bias_;
};

Vec read(const MutableVec& v) { return {v.f, v.q, v.blocks}; }

CardRows from_row(const CardRows& rows, uint64_t i) {
    return {rows.type, rows.n, rows.stride, rows.data + i * rows.stride};
}

uint32_t ceil_div(uint64_t a, uint64_t b) { return static_cast<uint32_t>(pi::ceil_div(a, b)); }
uint32_t up_to_warps(uint64_t n) { return static_cast<uint32_t>(align_up(n, WARP)); }

// ---- opening

Session::Session(const Config& config, const Weights& weights, const pi_session_params& params, uint32_t lent,
                 uint64_t room, uint32_t n_processors)
    : config_(config),
      weights_(weights),
      mode_(static_cast<pi_mode>(params.mode)),
      uncut_(params.uncut != 0),
      n_ctx_(params.n_ctx),
      batch_(std::min(MAX_TOKENS, params.n_ctx)),
      lent_(lent),
      n_processors_(n_processors),
      head_ld_(static_cast<uint32_t>(align_up(config.head_dim, 8))) {
    if (config.head_dim > MAX_HEAD_DIM)
        throw Error(PI_ERROR_UNSUPPORTED, "the card: expected heads of at most " + std::to_string(MAX_HEAD_DIM) +
                                              " dimensions, found " + std::to_string(config.head_dim));
    if (config.n_ff > MAX_SEGMENTS * WARPS * MAX_PER_WARP)
        throw Error(PI_ERROR_UNSUPPORTED, "the card: expected at most " +
                                              std::to_string(MAX_SEGMENTS * WARPS * MAX_PER_WARP) +
                                              " neurons in a layer, found " + std::to_string(config.n_ff));
    uint32_t n_cached = 0;
    for (const Layer& layer : weights.layers) cache_slots_.push_back(layer.dense ? n_cached++ : 0);
    const uint64_t n_cache = uint64_t{n_cached} * 2 * config.n_head_kv * n_ctx_ * head_ld_ * sizeof(__half);
    const uint32_t sharing = config.n_head / config.n_head_kv;
    group_ = sharing >= 3 ? 4 : sharing;
    const uint32_t n_blocks = config.n_head_kv * ceil_div(sharing, group_);
    n_splits_ = std::clamp(ceil_div(4 * n_processors, n_blocks), 1u, std::min(MAX_SPLITS, ceil_div(n_ctx_, MIN_SPAN)));
    Places measured;
    place_scratch(measured);
    const uint64_t needed = whole_pages(n_cache) + whole_pages(measured.used) + graph_bytes();
    if (needed > room)
        throw Error(PI_ERROR_MEMORY, "card: expected at most " + std::to_string(room) + " bytes for a session, found " +
                                         std::to_string(needed));
    cache_ = Memory(n_cache, true);
    scratch_ = Memory(measured.used, true);
    check(cudaMemsetAsync(scratch_.data(), 0, scratch_.bytes(), stream_), "cannot clear memory");
    Places placed{scratch_.data()};
    place_scratch(placed);
    Places mailboxes;
    place_mailboxes(mailboxes);
    shared_ = Memory(mailboxes.used, false);
    mailboxes = {shared_.data()};
    place_mailboxes(mailboxes);
    stream_.finish();
}

Session::~Session() {
    cudaStreamSynchronize(stream_);
    for (auto& [commands, graph] : graphs_) cudaGraphExecDestroy(graph);
}

uint32_t Session::most_rank() const {
    uint64_t most = 0;
    for (const Layer& layer : weights_.layers)
        if (layer.predictor) most = std::max(most, layer.predictor->in.n_rows);
    return static_cast<uint32_t>(most);
}

// What the session needs beside the cache. Where nothing of a kind lies on the card, there is no room for it.
void Session::place_scratch(Places& at) {
    const Config& c = config_;
    uint32_t n_here = 0, rank = most_rank();
    uint64_t row = 0;
    bool any_block = false;
    for (const Layer& layer : weights_.layers) {
        n_here = std::max(n_here, layer.last);
        any_block |= layer.dense;
        for (const Rows* rows : {&layer.select, &layer.up, &layer.down})
            if (rows->n > 0) row = std::max(row, card_row_bytes(rows->type, rows->n));
    }
    x_ld_ = up_to_warps(c.n_embd);
    heads_ld_ = up_to_warps(c.q_dim());
    rank_ld_ = up_to_warps(rank);
    auto vectors = [&](MutableVec& v, uint64_t ld, uint64_t n) {
        at.place(v.f, n * ld);
        at.place(v.q, ld);
        at.place(v.blocks, ld / WARP);
    };
    auto halves = [&](Halves& h, uint64_t ld) {
        at.place(h.x, batch_ * ld);
        at.place(h.back, ld > 0 ? batch_ : 0);
    };
    uint64_t b = batch_, if_block = any_block ? b : 0;
    at.place(state_, 1);
    at.place(n_done_, 1);
    at.place(residual_, b * c.n_embd);
    vectors(x_, x_ld_, b);
    vectors(rank_, rank_ld_, b);
    at.place(cos_, if_block * (c.rotary_dim / 2));
    at.place(sin_, if_block * (c.rotary_dim / 2));
    vectors(heads_, any_block ? heads_ld_ : 0, b);
    at.place(q_, if_block * c.q_dim());
    at.place(k_, if_block * c.kv_dim());
    at.place(v_, if_block * c.kv_dim());
    at.place(head_parts_, any_block ? uint64_t{c.n_head} * n_splits_ * (head_ld_ + 2) : 0);
    at.place(raw_rank_, if_block * rank);
    at.place(ids_, n_here);
    at.place(h_, n_here);
    at.place(starts_, n_here > 0 ? MAX_SEGMENTS + 1 : 0);
    at.place(tallies_, n_here > 0 ? MAX_SEGMENTS : 0);
    at.place(n_ended_, 1);
    at.place(counts_, c.n_layer);
    at.place(scores_, c.n_layer);
    at.place(parts_, std::max<uint64_t>(b, MAX_SHARES) * c.n_embd);
    at.place(logits_, weights_.output.data ? c.n_vocab : 0);
    halves(x_half_, std::max(x_ld_, any_block ? heads_ld_ : 0));
    halves(rank_half_, rank_ld_);
    uint64_t piece = up_to_warps(std::min(PIECE, std::max(n_here, lent_)));
    halves(h_half_, piece);
    at.place(select_, b * piece);
    at.place(up_, c.gated ? b * piece : 0);
    at.place(forecast_, rank > 0 ? b * piece : 0);
    at.place(visit_select_, lent_ * row);
    at.place(visit_up_, c.gated ? lent_ * row : 0);
    at.place(visit_down_, lent_ * row);
    at.place(visit_select_bias_, lent_);
    at.place(visit_up_bias_, lent_);
}

// In the processor's memory, which the card sees.
void Session::place_mailboxes(Places& at) {
    uint64_t b = batch_;
    uint64_t* seen = nullptr;
    at.place(seen, 1);
    seen_ = seen;
    for (Mailbox* box : {&inbox, &outbox}) {
        at.place(box->x, b * config_.n_embd);
        at.place(box->rank, b * most_rank());
    }
    at.place(outbox.sum, b * config_.n_embd);
    at.place(one_logits_, weights_.output.data ? config_.n_vocab : 0);
    outbox.logits = one_logits_;
}

// ---- commands

// After a failure all that follows is dropped: wait() says what it was.
template <class Work>
void Session::guarded(Work&& work) {
    if (failed_) return;
    try {
        work();
    } catch (...) {
        failed_ = std::current_exception();
        pending_.clear();
    }
}

template <class... P, class... A>
void Session::run(void (*kernel)(P...), dim3 grid, uint32_t threads, uint32_t shared, A... args) {
    check(launch(kernel, grid, threads, shared, stream_, args...), "cannot start work");
}

void Session::give(Command command) {
    if (pass_.decode)
        pending_.push_back(command);
    else
        guarded([&] { carry_out(command); });
}

void Session::flush() {
    if (pending_.empty()) return;
    guarded([&] { check(cudaGraphLaunch(graph_of(pending_), stream_), "cannot start work"); });
    pending_.clear();
}

// What kernels must know of a pass they read in the card's memory, so that a graph serves all passes.
cudaGraphExec_t Session::graph_of(const Commands& commands) {
    auto found = graphs_.find(commands);
    if (found != graphs_.end()) return found->second;
    return graphs_[commands] = record(stream_, [&] {
               for (Command command : commands) carry_out(command);
           });
}

void Session::carry_out(Command command) {
    const Config& c = config_;
    const Layer& l = layer(command.layer);
    switch (command.what) {
        case Command::Enter:
            return copy_vectors(inbox.x, c.n_embd, residual_, c.n_embd, c.n_embd, n_tokens());
        case Command::Leave:
            return copy_vectors(residual_, c.n_embd, outbox.x, c.n_embd, c.n_embd, n_tokens());
        case Command::Attention:
            return attention_of(command.layer);
        case Command::PrepareFfn:
            return ffn_input_of(l);
        case Command::GiveFfnInput:
            return give_input_of(l);
        case Command::TakeFfnInput:
            return take_input_of(l);
        case Command::Ffn:
            return neurons_of(command.layer);
        case Command::GiveSum:
            return add_vectors(parts_, n_parts(l), nullptr, outbox.sum, false);
        case Command::AddSum:
            return add_vectors(parts_, n_parts(l), l.down_bias, residual_, true);
        case Command::AddInbox:
            return add_vectors(inbox.x, 1, l.down_bias, residual_, true);
        case Command::Head:
            return output_head();
        case Command::Mark:
            return run(signal, 1, WARP, 0, n_done_, seen_);
    }
}

void Session::begin(const Pass& pass) {
    guarded(choose_card);
    flush();
    pass_ = pass;
    visitors_ = {};
    guarded([&] {
        const uint32_t half = weights_.rope_inv_freq ? config_.rotary_dim / 2 : 0;
        run(begin_pass, ceil_div(std::max<uint64_t>(1, pass.n * half), THREADS), THREADS, 0, state_,
            static_cast<uint32_t>(pass.position), n_tokens(), half, weights_.rope_inv_freq, config_.rope_scale, cos_,
            sin_);
    });
    make_room_for_logits();
    outbox.logits = pass.selective ? many_logits_.data<float>() : one_logits_;
}

// Of all tokens of a selective pass. Where there is none, this pass cannot be, but others can.
void Session::make_room_for_logits() {
    const uint64_t n = pass_.selective && weights_.output.data ? pass_.n * config_.n_vocab * sizeof(float) : 0;
    if (failed_ || n <= many_logits_.bytes()) return;
    stream_.finish();
    many_logits_ = Memory(n, false);
}

void Session::embed(const int32_t* tokens) {
    flush();
    guarded([&] {
        Tokens ids{};
        std::copy_n(tokens, pass_.n, ids.id);
        run(embed_rows, n_tokens(), THREADS, 0, card_rows(weights_.output), ids, residual_);
    });
}

void Session::start() { flush(); }

uint64_t Session::mark() {
    give({Command::Mark});
    return ++n_marks_;
}

void Session::wait(uint64_t ticket) {
    flush();
    guarded([&] {
        wait_for_signal(seen_, ticket, stream_);
        if (ticket == n_marks_) collect_scores();  // they are copied behind all that was given
    });
    if (failed_) std::rethrow_exception(failed_);
}

void Session::collect_scores() {
    if (asked_scores_.empty()) return;
    std::vector<ScoreCounts> counts(config_.n_layer);
    check(cudaMemcpyAsync(counts.data(), scores_, counts.size() * sizeof(ScoreCounts), cudaMemcpyDeviceToHost, stream_),
          "cannot copy");
    stream_.finish();
    for (auto [il, score] : asked_scores_) {
        score->n_true += counts[il].n_true;
        score->n_predicted += counts[il].n_predicted;
        score->n_hit += counts[il].n_hit;
    }
    asked_scores_.clear();
}

void Session::take_counts(std::span<NeuronCounts> layers) {
    std::vector<Counts> counts(layers.size());
    const uint64_t n_bytes = counts.size() * sizeof(Counts);
    check(cudaMemcpyAsync(counts.data(), counts_, n_bytes, cudaMemcpyDeviceToHost, stream_), "cannot copy");
    check(cudaMemsetAsync(counts_, 0, n_bytes, stream_), "cannot clear memory");
    stream_.finish();
    for (size_t il = 0; il < layers.size(); il++)
        layers[il] += {counts[il].computed, counts[il].active, counts[il].fired, counts[il].asked};
}

// ---- small steps

bool Session::asks(const Layer& layer) const {
    return layer.predictor && mode_ != PI_MODE_DENSE && mode_ != PI_MODE_GATE;
}

Activating Session::activating(const Layer& layer) const {
    return {config_.activation, layer.threshold, layer.threshold > 0 && !uncut_};
}

void Session::copy_vectors(const float* in, uint32_t ld_in, float* out, uint32_t ld_out, uint32_t n, uint32_t n_rows) {
    run(copy_rows, ceil_div(uint64_t{n} * n_rows, THREADS), THREADS, 0, in, ld_in, out, ld_out, n, n_rows);
}

// out (+)= the parts, each of a vector for every token, + bias
void Session::add_vectors(const float* parts, uint32_t n_parts, const float* bias, float* out, bool add) {
    const uint32_t n = n_tokens() * config_.n_embd;
    const uint32_t groups = n_parts > 1 ? WARPS : 1;
    run(groups > 1 ? add_up<WARPS> : add_up<1>, ceil_div(n * groups, THREADS), THREADS, 0, parts, n_parts, n, bias,
        config_.n_embd, out, add);
}

// x = norm(stream of n tokens).   A block a token: for one, as many threads as there is work for.
void Session::normalise_stream(const Norm& norm, const float* stream, uint32_t n) {
    const Norming norming = config_.norm == NormKind::Rms ? Norming::Rms : Norming::Layer;
    const uint32_t n_threads = n == 1 ? std::min(1024u, x_ld_) : THREADS;
    run(normalise, n, n_threads, 0,
        NormJob{stream, config_.n_embd, norming, config_.norm_eps, norm.weight, norm.bias, for_tokens(x_, n), x_ld_});
}

// to = what lies at `from`: (n_tokens, n)
void Session::take_vectors(const float* from, uint32_t n, bool relu, const MutableVec& to) {
    const auto ld = up_to_warps(n);
    run(take, dim3(ceil_div(ld, THREADS), n_tokens()), THREADS, 0,
        TakeJob{from, n, relu, for_tokens(to, n_tokens()), ld});
}

// Batches meet matrices in float16 only.
MutableVec Session::for_tokens(MutableVec v, uint32_t n) const {
    if (!pass_.decode && n > 1) v.q = nullptr;
    return v;
}

void Session::halve_vectors(const float* in, uint32_t n, uint32_t ld, Halves& out) {
    out.ld = up_to_warps(n);
    run(halve, n_tokens(), THREADS, 0, in, n, ld, out);
}

void Session::matvec_of(const MatvecJobs& jobs) {
    constexpr uint32_t ROWS = 4;  // of a block, a warp each
    uint32_t n_rows = 0;
    for (const MatvecJob& job : jobs.job) n_rows += job.n_rows;
    run(matvec, ceil_div(n_rows, ROWS), ROWS * WARP, 0, jobs);
}

MatvecJob job_of(const Linear& linear, float* out) {
    return {card_rows(linear.rows), static_cast<uint32_t>(linear.rows.n_rows), linear.bias, out};
}

template <bool COLUMNS>
void Session::gemm_of(const GemmJob& job) {
    const uint32_t n_out = COLUMNS ? job.rows.n : job.n_rows;
    const dim3 grid(ceil_div(n_out, TILE_OUT), ceil_div(job.n_tokens, TILE_TOKENS));
#define PI_GEMM(T) run(gemm<T, COLUMNS>, grid, THREADS, GEMM_BYTES, job)
    PI_FOR_TYPE(job.rows.type, PI_GEMM)
#undef PI_GEMM
}

// out (+)= rows . x + bias, for all tokens
void Session::multiply(const Halves& x, const Linear& linear, float* out, bool add) {
    const auto n_rows = static_cast<uint32_t>(linear.rows.n_rows);
    gemm_of<false>({card_rows(linear.rows), n_rows, x, n_tokens(), linear.bias, out, n_rows, add});
}

// ---- attention

Heads Session::heads_of(size_t il) const {
    const Config& c = config_;
    const uint64_t half = uint64_t{c.n_head_kv} * n_ctx_ * head_ld_;  // of a layer's cache: keys, then values
    __half* keys = cache_.data<__half>() + cache_slots_[il] * 2 * half;
    return {c.n_head,  c.n_head_kv, c.head_dim, head_ld_, n_ctx_, layer(il).rotates ? c.rotary_dim : 0,
            c.qk_norm, c.norm_eps,  cos_,       sin_,     keys,   keys + half,
            state_};
}

// residual += o . attention(norm(residual))
void Session::attention_of(size_t il) {
    const Config& c = config_;
    const Layer& l = layer(il);
    const Heads heads = heads_of(il);
    normalise_stream(l.attn_norm, residual_, n_tokens());
    if (pass_.decode) {
        matvec_of({{job_of(l.q, q_), job_of(l.k, k_), job_of(l.v, v_)}, read(x_), false});
    } else {
        halve_vectors(x_.f, c.n_embd, x_ld_, x_half_);
        multiply(x_half_, l.q, q_, false);
        multiply(x_half_, l.k, k_, false);
        multiply(x_half_, l.v, v_, false);
    }
    constexpr uint32_t HEADS = 4;  // of a block, a warp each
    run(prepare_heads, dim3(ceil_div(c.n_head + c.n_head_kv, HEADS), n_tokens()), HEADS * WARP, 0, heads, q_, k_, v_);
    if (pass_.decode) {
        attend(heads);
        matvec_of({{job_of(l.o, residual_)}, read(heads_), true});
    } else {
        attend_many(heads);
        halve_vectors(heads_.f, c.q_dim(), c.q_dim(), x_half_);
        multiply(x_half_, l.o, residual_, true);
    }
}

void Session::attend(const Heads& heads) {
    const uint32_t sharing = heads.n_head / heads.n_head_kv;
    const dim3 grid(n_splits_, heads.n_head_kv * ceil_div(sharing, group_));
    auto kernel = group_ == 1 ? attend_part<1> : group_ == 2 ? attend_part<2> : attend_part<4>;
    run(kernel, grid, ATTENTION_WARPS * WARP, 0, heads, q_, n_splits_, head_parts_);
    constexpr uint32_t ELEMENTS = 128;
    run(merge_parts, ceil_div(config_.q_dim(), ELEMENTS), ELEMENTS, 0, heads, n_splits_, head_parts_, heads_);
}

// Long heads leave room for fewer queries in a block's shared memory.
void Session::attend_many(const Heads& heads) {
    constexpr uint32_t MANY = 32, FEW = 16, LONG = 128;
    const bool few = heads.head_dim > LONG;
    const dim3 grid(ceil_div(n_tokens(), few ? FEW : MANY), heads.n_head);
    const uint32_t bytes = few ? AttendLayout<FEW>(heads.head_dim).bytes() : AttendLayout<MANY>(heads.head_dim).bytes();
    run(few ? attend_batch<FEW> : attend_batch<MANY>, grid, BATCH_THREADS, bytes, heads, q_, n_tokens(), heads_.f);
}

// ---- the FFN

// x = norm(stream); rank, where the predictor is asked
void Session::ffn_input_of(const Layer& l) {
    if (asks_now(l) && config_.predictor_on_stream) {
        take_vectors(residual_, config_.n_embd, false, x_);
        rank_of(l);
    }
    normalise_stream(l.ffn_norm, residual_, n_tokens());
    if (asks_now(l) && !config_.predictor_on_stream) rank_of(l);
}

// rank = the predictor's hidden layer, of what x is
void Session::rank_of(const Layer& l) {
    const Linear in{l.predictor->in, nullptr};
    if (pass_.decode) {
        matvec_of({{job_of(in, raw_rank_)}, read(x_), false});
    } else {
        halve_vectors(x_.f, config_.n_embd, x_ld_, x_half_);
        multiply(x_half_, in, raw_rank_, false);
    }
    take_rank(l, raw_rank_, config_.predictor_relu);
}

// rank = what lies at `from`: (n_tokens, rank)
void Session::take_rank(const Layer& l, const float* from, bool relu) {
    take_vectors(from, static_cast<uint32_t>(l.predictor->in.n_rows), relu, rank_);
}

void Session::give_input_of(const Layer& l) {
    copy_vectors(x_.f, x_ld_, outbox.x, config_.n_embd, config_.n_embd, n_tokens());
    if (!asks_now(l)) return;
    const auto n = static_cast<uint32_t>(l.predictor->in.n_rows);
    copy_vectors(rank_.f, up_to_warps(n), outbox.rank, n, n, n_tokens());
}

void Session::take_input_of(const Layer& l) {
    take_vectors(inbox.x, config_.n_embd, false, x_);
    if (asks_now(l)) take_rank(l, inbox.rank, false);
}

// The neurons that the processor has come to the visiting buffers, in the card's form.
void Session::lend(size_t, const Layer& home) {
    guarded([&] {
        const uint32_t first = home.first, n = home.last - home.first;
        auto bring = [&](const Rows& rows, uint8_t* to) -> CardRows {
            if (!rows.data) return {};
            upload_.rows(to, rows.type, rows.n, n, rows.row(first), rows.stride);
            return {rows.type, static_cast<uint32_t>(rows.n), card_row_bytes(rows.type, rows.n), to};
        };
        auto bring_bias = [&](const float* bias, float* to) -> const float* {
            if (!bias) return nullptr;
            const uint64_t n_bytes = n * sizeof(float);
            upload_.rows(reinterpret_cast<uint8_t*>(to), Type::F32, n, 1,
                         reinterpret_cast<const uint8_t*>(bias + first), n_bytes);
            return to;
        };
        visitors_ = {bring(home.select, visit_select_),
                     bring(home.up, visit_up_),
                     bring(home.down, visit_down_),
                     bring_bias(home.select_bias, visit_select_bias_),
                     bring_bias(home.up_bias, visit_up_bias_),
                     first,
                     n};
    });
}

// parts = what the layer's neurons here add, and those that visit
void Session::neurons_of(size_t il) {
    const Layer& l = layer(il);
    const Neurons own{card_rows(l.select), card_rows(l.up), card_rows(l.down), l.select_bias, l.up_bias, 0, l.last};
    if (pass_.decode) return decode_neurons(l, own, counts_ + il);
    if (pass_.selective) check(cudaMemsetAsync(scores_ + il, 0, sizeof(ScoreCounts), stream_), "cannot clear memory");
    n_batch_parts_ = 0;
    halve_vectors(x_.f, config_.n_embd, x_ld_, x_half_);
    if (asks_now(l))
        halve_vectors(rank_.f, static_cast<uint32_t>(l.predictor->in.n_rows), up_to_warps(l.predictor->in.n_rows),
                      rank_half_);
    batch_neurons(il, own);
    batch_neurons(il, std::exchange(visitors_, {}));
}

// Blocks that add_down has for a layer's columns, and into how many parts it divides the firing neurons: two blocks a
// processor, more only make more to add up.
uint32_t Session::tiles_of(const Layer& l) const {
    return ceil_div(pieces_of(l.down.type, static_cast<uint32_t>(l.down.n)), WARP);
}

// Of the layer's sum. In a decoded pass a property of the layer: graphs hold it.
uint32_t Session::n_parts(const Layer& l) const {
    if (!pass_.decode) return n_batch_parts_;
    return l.last == 0 ? 0 : std::clamp(ceil_div(2 * n_processors_, tiles_of(l)), 1u, MAX_SHARES);
}

void Session::decode_neurons(const Layer& l, const Neurons& own, Counts* counts) {
    if (own.n == 0) return;
    const uint32_t per_warp = ceil_div(own.n, uint64_t{WARPS} * MAX_SEGMENTS), segment = per_warp * WARPS;
    const uint32_t n_segments = ceil_div(own.n, segment);
    CardRows predictor;
    const float* predictor_bias = nullptr;
    if (asks(l)) predictor = card_rows(l.predictor->out), predictor_bias = l.predictor->bias;
    const Choosing choosing{own.select,    own.up,
                            predictor,     own.select_bias,
                            own.up_bias,   predictor_bias,
                            own.n,         l.always,
                            asks(l),       mode_ == PI_MODE_DENSE,
                            activating(l), read(x_),
                            read(rank_),   per_warp,
                            ids_,          h_,
                            tallies_,      n_ended_,
                            starts_,       counts};
    run(choose_neurons, n_segments, THREADS, 0, choosing);
    const Adding adding{own.down, n_segments, segment, ids_, starts_, h_, parts_};
#define PI_ADD(T) run(add_down<T>, dim3(tiles_of(l), n_parts(l)), THREADS, adding_bytes<T>(n_segments), adding)
    PI_FOR_TYPE(own.down.type, PI_ADD)
#undef PI_ADD
}

// parts (+)= what these neurons add for each token, a piece of them after the other
void Session::batch_neurons(size_t il, const Neurons& neurons) {
    const uint32_t n_embd = config_.n_embd;
    for (uint32_t begin = 0; begin < neurons.n; begin += PIECE) {
        const uint32_t n = std::min(PIECE, neurons.n - begin);
        auto multiplied = [&](const CardRows& rows, const float* bias, float* out) {
            gemm_of<false>(
                {from_row(rows, begin), n, x_half_, n_tokens(), bias ? bias + begin : nullptr, out, n, false});
        };
        multiplied(neurons.select, neurons.select_bias, select_);
        if (neurons.up.data) multiplied(neurons.up, neurons.up_bias, up_);
        BatchNeurons job{select_,
                         neurons.up.data ? up_ : nullptr,
                         nullptr,
                         n,
                         neurons.first + begin,
                         0,
                         0,
                         activating(layer(il)),
                         pass_.selective,
                         scores_ + il,
                         h_half_};
        if (asks_now(layer(il))) forecast(layer(il), job);
        job.out.ld = h_half_.ld = up_to_warps(n);
        run(fire_neurons, n_tokens(), THREADS, 0, job);
        gemm_of<true>(
            {from_row(neurons.down, begin), n, h_half_, n_tokens(), nullptr, parts_, n_embd, n_batch_parts_ > 0});
        n_batch_parts_ = 1;
    }
}

// What the predictor says of a piece's neurons.
void Session::forecast(const Layer& l, BatchNeurons& job) {
    job.forecast = forecast_;
    job.asked_from = std::max(l.always, job.first);
    const uint32_t end = job.first + job.n;
    if (job.asked_from >= end) return;
    job.ld_forecast = end - job.asked_from;
    const uint32_t begin = job.asked_from - l.always;
    gemm_of<false>({from_row(card_rows(l.predictor->out), begin), job.ld_forecast, rank_half_, n_tokens(),
                    l.predictor->bias + begin, forecast_, job.ld_forecast, false});
}

// ---- the head

void Session::output_head() {
    const Config& c = config_;
    const Linear output{weights_.output, nullptr};
    if (pass_.selective) {
        normalise_stream(weights_.output_norm, residual_, n_tokens());
        halve_vectors(x_.f, c.n_embd, x_ld_, x_half_);
        return multiply(x_half_, output, outbox.logits, false);
    }
    normalise_stream(weights_.output_norm, residual_ + (pass_.n - 1) * c.n_embd, 1);
    matvec_of({{job_of(output, logits_)}, read(x_), false});
    copy_vectors(logits_, c.n_vocab, outbox.logits, c.n_vocab, c.n_vocab, 1);
}

}  // namespace

std::unique_ptr<DeviceSession> open_session(const Config& config, const Weights& weights,
                                            const pi_session_params& params, uint32_t lent, uint64_t room,
                                            uint32_t n_processors) {
    choose_card();
    return std::make_unique<Session>(config, weights, params, lent, room, n_processors);
}

}  // namespace pi::card
