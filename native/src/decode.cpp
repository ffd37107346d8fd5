// One token through the sparse path. A layer's FFN is one parallel step: each item asks the predictor about its range
// of neurons, computes the deciding rows of those it lets through, then up and down of those that fire, and keeps its
// own partial sum. The ranges are fixed, so the sums are the same for any number of threads.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "side.h"

namespace pi {

namespace {

constexpr size_t ITEM_ROWS = 32;          // rows of a matrix that one item computes
constexpr size_t BLOCK_BYTES = 64 << 10;  // of neurons that are decided and then added together: in L2
constexpr size_t SUM_COLUMNS = 512;       // columns of the partial sums that one item adds, or logits that it caps

}  // namespace

void Side::start_clock() {
    std::fill_n(spent_, +N_PARTS, 0);
    mark_ = ticks();
}

// Counts the ticks since the last call.
void Side::lap(Part part) {
    uint64_t now = ticks();
    spent_[part] += now - mark_;
    mark_ = now;
}

// The parts of a token that took so many seconds.
void Side::collect_seconds(double seconds) {
    double* sums[N_PARTS] = {};
    sums[ATTENTION] = &stats.seconds_attention;
    sums[PREDICTOR] = &stats.seconds_predictor;
    sums[GATE] = &stats.seconds_gate;
    sums[UPDOWN] = &stats.seconds_updown;
    sums[HEAD] = &stats.seconds_head;
    sums[DISK] = &stats.seconds_disk;
    sums[CARD] = &stats.seconds_card;
    sums[OTHER] = &stats.seconds_other;
    sums[SYNC] = &stats.seconds_sync;
    double all = 0;
    for (uint64_t spent : spent_) all += static_cast<double>(spent);
    for (size_t p = 0; p < N_PARTS; p++)
        *sums[p] += static_cast<double>(std::exchange(spent_[p], 0)) / std::max(all, 1.0) * seconds;
}

Vector Side::quantised(Activations& x, size_t n) {
    if (n % QK != 0) return {x.f.data(), {}};
    ops.quantize_x8(n, x.f.data(), x.x8(0));
    return x.both();
}

// out (+)= rows . x + bias for each job, all in one parallel step
void Side::project(Part part, std::initializer_list<Job> jobs, Vector x) {
    size_t n_items = 0;
    for (const Job& job : jobs) n_items += ceil_div(job.linear->rows.n_rows, ITEM_ROWS);
    parallel(part, n_items, [&](size_t item, uint32_t) {
        const Job* job = jobs.begin();
        for (; item >= ceil_div(job->linear->rows.n_rows, ITEM_ROWS); job++)
            item -= ceil_div(job->linear->rows.n_rows, ITEM_ROWS);
        const Rows& rows = job->linear->rows;
        size_t begin = item * ITEM_ROWS, n = std::min<size_t>(ITEM_ROWS, rows.n_rows - begin);
        float sums[ITEM_ROWS];
        ops.matvec(rows.type, rows.n, rows.row(begin), rows.stride, n, x, sums);
        if (const float* bias = job->linear->bias)
            for (size_t i = 0; i < n; i++) sums[i] += bias[begin + i];
        float* out = job->out + begin;
        for (size_t i = 0; i < n; i++) out[i] = job->add ? out[i] + sums[i] : sums[i];
    });
}

// hidden += o . attention(norm(hidden))
void Side::attention_token(size_t il) {
    const Config& c = config;
    const Layer& layer = weights.layers[il];
    if (routes(layer, RoutedBy::LayerInput)) route(layer, hidden_.data());
    normalise(layer.attn_norm, hidden_.data(), x_.f.data());
    project(ATTENTION, {{&layer.q, q_.data()}, {&layer.k, k_.data()}, {&layer.v, v_.data()}}, quantised(x_, c.n_embd));
    parallel(ATTENTION, c.n_head_kv, [&](size_t head, uint32_t) {
        size_t at = head * c.head_dim;
        prepare_heads(layer, &k_[at], 1, 0);
        store_kv(il, static_cast<uint32_t>(head), pass_.position, &k_[at], &v_[at]);
    });
    bool by_head = c.head_dim % QK == 0 && !c.sub_norms;  // each head is quantised where it is computed
    parallel(ATTENTION, c.n_head, [&](size_t head, uint32_t thread) {
        size_t at = head * c.head_dim;
        prepare_heads(layer, &q_[at], 1, 0);
        attend(il, static_cast<uint32_t>(head), pass_.position + 1, &q_[at], &x_.f[at], workers_[thread]);
        if (by_head) ops.quantize_x8(c.head_dim, &x_.f[at], x_.x8(at));
    });
    if (c.sub_norms) unit_rms(c.q_dim(), x_.f.data());
    Vector x = by_head ? x_.both() : quantised(x_, c.q_dim());
    project(ATTENTION, {{&layer.o, hidden_.data(), true}}, x);
    for (const Linear* linear : {&layer.q, &layer.k, &layer.v, &layer.o})
        stats.bytes_attention += linear->rows.n_rows * linear->rows.row_size();
    stats.bytes_attention += 2 * sizeof(uint16_t) * c.kv_dim() * (pass_.position + 1);
}

void Side::prepare_token(const Layer& layer, const float* stream) {
    const Config& c = config;
    if (asks(layer) && c.predictor_on_stream) {
        std::copy_n(stream, c.n_embd, x_.f.data());
        ffn_rank_ = predictor_rank(*layer.predictor, quantised(x_, c.n_embd), rank_);
    }
    normalise(layer.ffn_norm, stream, x_.f.data());
    if (routes(layer, RoutedBy::FfnInput)) route(layer, x_.f.data());
    ffn_x_ = quantised(x_, c.n_embd);
    if (!asks(layer)) return;
    if (!c.predictor_on_stream) ffn_rank_ = predictor_rank(*layer.predictor, ffn_x_, rank_);
    const Rows& in = layer.predictor->in;
    stats.bytes_predictor += in.n_rows * in.row_size();
}

void Side::take_token(const Layer& layer, const float* x, const float* rank) {
    std::copy_n(x, config.n_embd, x_.f.data());
    ffn_x_ = quantised(x_, config.n_embd);
    if (!asks(layer)) return;
    size_t n = layer.predictor->out.n;
    std::copy_n(rank, n, rank_.f.data());
    ffn_rank_ = quantised(rank_, n);
}

// The predictor's hidden layer.
Vector Side::predictor_rank(const Predictor& predictor, Vector x, Activations& rank) {
    Linear in{predictor.in, nullptr};
    project(PREDICTOR, {{&in, rank.f.data()}}, x);
    size_t n = in.rows.n_rows;
    if (config.predictor_relu)
        for (size_t i = 0; i < n; i++) rank.f[i] = rank.f[i] <= 0 ? 0 : rank.f[i];
    return quantised(rank, n);
}

// The chunks whose neurons are on this side.
Side::Range Side::own_chunks(const Layer& layer) const {
    Range own{0, layer.chunks.size() - 1};
    while (own.begin < own.end && layer.chunks[own.begin] < layer.first) own.begin++;
    while (own.begin < own.end && layer.chunks[own.end] > layer.last) own.end--;
    return own;
}

// The numbers of n items, so that every thread's share of them begins with the lowest.
std::array<size_t, MAX_CHUNKS> Side::deal(size_t n) const {
    std::array<size_t, MAX_CHUNKS> dealt{};
    size_t n_threads = workers_.size();
    for (size_t round = 0, k = 0; k < n; round++)
        for (size_t t = 0; t < n_threads; t++) {
            size_t at = n * t / n_threads + round;
            if (at < n * (t + 1) / n_threads) dealt[at] = k++;
        }
    return dealt;
}

// partial_ = what each chunk of neurons adds
void Side::ffn_chunks(const Layer& layer, Vector x, Vector rank) {
    Range own = own_chunks(layer);
    bool backwards = mode_ == PI_MODE_DENSE;  // there the last chunks are the largest: they come first
    size_t n = own.end - own.begin;
    auto order = deal(n);
    auto chunk_at = [&](size_t item) { return backwards ? own.end - 1 - order[item] : own.begin + item; };
    parallel(UPDOWN, n, [&](size_t item, uint32_t thread) {
        size_t then = chunk_at(std::min(item + 1, n - 1));
        ffn_chunk(layer, chunk_at(item), layer.chunks[then], x, rank, workers_[thread]);
    });
}

// Of the candidates in [lo, hi) those whose deciding row is computed, ascending, in w.asked. A forecast that is no
// number (damaged weights) lets through: it may cost time, never the answer.
size_t Side::ask(const Layer& layer, uint32_t lo, uint32_t hi, Vector rank, Worker& w) {
    const Predictor& p = *layer.predictor;
    size_t n_candidates = candidates(layer, lo, hi, w), n = 0;
    while (n < n_candidates && w.asked[n] < layer.always) n++;
    size_t n_asked = n_candidates - n;
    uint32_t* rows = w.active.data();
    for (size_t k = 0; k < n_asked; k++) rows[k] = w.asked[n + k] - layer.always;
    matvec_at(p.out, rows, n_asked, !layer.expert, rank, w.logit.data());
    for (size_t k = 0; k < n_asked; k++) {
        w.asked[n] = rows[k] + layer.always;
        n += !(w.logit[k] + p.bias[rows[k]] < 0);
    }
    w.n.asked += n_asked;
    return n;
}

// out[k] = row ids[k] . x; in_order: the ids follow one another
void Side::matvec_at(const Rows& rows, const uint32_t* ids, size_t n, bool in_order, Vector x, float* out) const {
    if (n == 0) return;
    if (in_order)
        ops.matvec(rows.type, rows.n, rows.row(ids[0]), rows.stride, n, x, out);
    else
        ops.matvec_picked(rows.type, rows.n, rows.data, rows.stride, ids, n, nullptr, x, out);
}

// partial_[chunk] = sum over the chunk's neurons of activation(select . x) * (up . x) * down
// then: the neuron at which this thread likely goes on
void Side::ffn_chunk(const Layer& layer, size_t chunk, uint32_t then, Vector x, Vector rank, Worker& w) {
    uint32_t lo = layer.chunks[chunk], hi = layer.chunks[chunk + 1];
    auto fitting = [&](size_t bytes) {
        return std::bit_floor(std::max(static_cast<uint32_t>(bytes / layer.down.stride), 1u));
    };
    float* sum = &partial_[chunk * config.n_embd];
    std::fill_n(sum, config.n_embd, 0.0f);
    size_t n_active = 0;
    if (asks(layer)) {
        uint64_t begin = ticks();
        size_t n = ask(layer, lo, hi, rank, w);
        w.spent[PREDICTOR] += ticks() - begin;
        decide(layer, w.asked.data(), n, x, w);
        n_active = add_neurons(layer, w.asked.data(), w.pre.data(), n, x, sum, w);
    } else if (mode_ == PI_MODE_DENSE && !layer.apart && !layer.expert) {
        for (uint32_t i = lo, end, block = fitting(ops.bundle_bytes); i < hi; i = end) {
            end = std::min(i + block, hi);
            n_active += add_bundles(layer, i, end - i, end < hi ? end : then, x, sum, w);
        }
    } else {
        size_t n = candidates(layer, lo, hi, w), block = fitting(BLOCK_BYTES);
        decide(layer, w.asked.data(), n, x, w);
        for (size_t i = 0; i < n; i += block)
            n_active += add_neurons(layer, &w.asked[i], &w.pre[i], std::min<size_t>(block, n - i), x, sum, w);
    }
    finish_chunk(chunk, n_active, w);
}

void Side::finish_chunk(size_t chunk, size_t n_active, Worker& w) {
    chunk_fired_[chunk] = n_active > 0;
    squares_[chunk] = std::exchange(w.squares, 0.0);
}

// w.pre = activation(select . x) of these neurons
void Side::decide(const Layer& layer, const uint32_t* ids, size_t n, Vector x, Worker& w) {
    uint64_t begin = ticks();
    const Rows& select = layer.select;
    if (layer.apart) {  // no predictor: these are all candidates
        matvec_at(select, ids, n, !layer.expert, x, w.pre.data());
    } else {
        const uint8_t* then = layer.up.data ? layer.up.data : layer.down.data;
        const uint32_t* at = places(ids, n, w);
        ops.matvec_picked(select.type, select.n, select.data, select.stride, at, n, then, x, w.pre.data());
    }
    finish_deciding(layer, ids, n, w);
    w.spent[GATE] += ticks() - begin;
}

void Side::finish_deciding(const Layer& layer, const uint32_t* ids, size_t n, Worker& w) {
    if (layer.select_bias)
        for (size_t i = 0; i < n; i++) w.pre[i] += layer.select_bias[ids[i]];
    activate(layer, n, w.pre.data());
    for (size_t i = 0; layer.expert && i < n; i++) w.pre[i] *= routes_[layer.expert[ids[i]]];
    w.n.computed += n;
}

// sum += pre * (up . x) * down of those neurons whose pre is not 0, or of all in dense mode; how many these are
size_t Side::add_neurons(const Layer& layer, const uint32_t* ids, const float* pre, size_t n, Vector x, float* sum,
                         Worker& w) {
    const Rows& up = layer.up;
    size_t n_active = 0;
    for (size_t i = 0; i < n; i++) {
        w.active[n_active] = ids[i];
        w.a[n_active] = pre[i];
        n_active += pre[i] != 0 || mode_ == PI_MODE_DENSE;
    }
    if (up.data)
        ops.matvec_picked(up.type, up.n, up.data, up.stride, places(w.active.data(), n_active, w), n_active,
                          layer.down.data, x, w.up.data());
    add_down(layer, n_active, nullptr, sum, w);
    return n_active;
}

// The same for all of [lo, lo + n), read in the order in which they lie; after them those from `then` on.
size_t Side::add_bundles(const Layer& layer, uint32_t lo, size_t n, uint32_t then, Vector x, float* sum, Worker& w) {
    uint64_t begin = ticks();
    const Rows& select = layer.select;
    size_t n_rows = layer.up.data ? 2 : 1;
    ops.matvec_bundles(select.type, select.n, select.row(lo), n_rows + 1, n, x, w.logit.data());
    for (size_t i = 0; i < n; i++) {
        w.active[i] = lo + static_cast<uint32_t>(i);
        w.pre[i] = w.logit[i * n_rows];
        if (layer.up.data) w.up[i] = w.logit[i * n_rows + 1];
    }
    finish_deciding(layer, w.active.data(), n, w);
    std::copy_n(w.pre.data(), n, w.a.data());
    w.spent[GATE] += (ticks() - begin) / n_rows;
    add_down(layer, n, select.row(then), sum, w);
    return n;
}

// sum += w.a * w.up * down of the neurons w.active; next: see add_rows
void Side::add_down(const Layer& layer, size_t n, const uint8_t* next, float* sum, Worker& w) {
    const Rows& down = layer.down;
    float* h = w.a.data();
    if (layer.up.data) {
        if (layer.up_bias)
            for (size_t i = 0; i < n; i++) w.up[i] += layer.up_bias[w.active[i]];
        apply_up(n, w.a.data(), w.up.data());
        h = w.up.data();
    }
    w.n.active += n;
    for (size_t i = 0; i < n; i++) w.n.fired += h[i] != 0;
    if (config.sub_norms)
        for (size_t i = 0; i < n; i++) w.squares += double(h[i]) * h[i];
    ops.add_rows(down.type, down.n, down.data, down.stride, places(w.active.data(), n, w), h, n, next, sum);
}

// The chunks' partial sums, in the order of the chunks; over the norm of all h with sub_norms
void Side::sum_chunks(const Layer& layer, const Chain& chain) {
    const Config& c = config;
    size_t n_embd = c.n_embd;
    Range own = own_chunks(layer);
    double squares = std::accumulate(squares_ + own.begin, squares_ + own.end, 0.0);
    float scale = c.sub_norms ? static_cast<float>(1 / std::sqrt(squares / c.n_ff + c.norm_eps)) : 1.0f;
    parallel(UPDOWN, ceil_div(n_embd, SUM_COLUMNS), [&](size_t item, uint32_t) {
        size_t begin = item * SUM_COLUMNS, n = std::min(SUM_COLUMNS, n_embd - begin);
        float sums[SUM_COLUMNS];
        for (size_t i = 0; i < n; i++) sums[i] = chain.before ? chain.before[begin + i] : 0.0f;
        for (size_t chunk = own.begin; chunk < own.end; chunk++) {
            if (!chunk_fired_[chunk]) continue;
            const float* sum = &partial_[chunk * n_embd + begin];
            for (size_t i = 0; i < n; i++) sums[i] += scale * sum[i];
        }
        if (chain.out) {
            std::copy_n(sums, n, chain.out + begin);
            return;
        }
        const float* bias = layer.down_bias;
        for (size_t i = 0; i < n; i++) hidden_[begin + i] += sums[i] + (bias ? bias[begin + i] : 0.0f);
    });
}

void Side::add_sum(size_t il, const float* sum) {
    const float* bias = weights.layers[il].down_bias;
    size_t n = config.n_embd;
    parallel(UPDOWN, pass_.n, [&](size_t t, uint32_t) {
        float* out = stream() + t * n;
        for (size_t i = 0; i < n; i++) out[i] += sum[t * n + i] + (bias ? bias[i] : 0.0f);
    });
}

void Side::collect_counts(NeuronCounts& sum) {
    for (Worker& w : workers_) {
        sum += std::exchange(w.n, {});
        stats.neurons_prefix += std::exchange(w.n_prefix, 0);
    }
}

// logits = output . norm(hidden)
void Side::head_token(const float* hidden, float* logits) {
    normalise(weights.output_norm, hidden, x_.f.data());
    Linear head{weights.output, nullptr};
    project(HEAD, {{&head, logits}}, quantised(x_, config.n_embd));
}

// What is no finite number stays so: sampling refuses it.
void Side::cap(float* logits, size_t n) {
    float most = config.softcap;
    if (most == 0) return;
    parallel(HEAD, ceil_div(n, SUM_COLUMNS), [&](size_t item, uint32_t) {
        for (size_t i = item * SUM_COLUMNS; i < std::min(n, (item + 1) * SUM_COLUMNS); i++)
            if (std::isfinite(logits[i])) logits[i] = most * std::tanh(logits[i] / most);
    });
}

}  // namespace pi
