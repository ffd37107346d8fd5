// Layers of which some neurons lie on disk (disk.h), in decoding. Chunks with cold neurons choose first; what they miss
// is read while the chunks without are computed as ever.
#include <algorithm>
#include <atomic>
#include <thread>

#include "side.h"

namespace pi {

namespace {

constexpr size_t AHEAD_ROWS = 512;  // of a predictor that one item asks when it looks ahead
constexpr int SPINS = 4000;         // before a thread that waits for another's reads offers its processor

}  // namespace

// Where every neuron is needed the layer is read whole.
void Side::ffn_from_disk(const Layer& layer, size_t il, Vector x, Vector rank) {
    bool picks = asks(layer) || layer.expert || (layer.apart && mode_ != PI_MODE_DENSE);
    if (picks) return fetch(layer, il, x, rank);
    stream_layer(il);
    ffn_chunks(layer, x, rank);
    disk->release(il);
}

void Side::stream_layer(size_t il) {
    lap(OTHER);
    disk->start_stream(il);
    disk->end_stream();
    lap(DISK);
}

// One parallel step, whose threads first choose together; two where the next layer's predictor is worth asking once
// this one's reads are under way. Where more is missing than there is room for, the layer is read whole in the end.
void Side::fetch(const Layer& layer, size_t il, Vector x, Vector rank) {
    Range own = own_chunks(layer), cold = own;
    while (layer.chunks[cold.begin + 1] <= disk->first_cold(il)) cold.begin++;
    size_t n_cold = cold.end - cold.begin;
    std::atomic<size_t> next{cold.begin}, chosen{0};
    std::atomic<int> fits{-1};  // not known yet
    auto choose_together = [&](Worker& w) {
        for (size_t c; (c = next.fetch_add(1)) < cold.end;) {
            choose(layer, c, x, rank, w);
            if (chosen.fetch_add(1) + 1 == n_cold) fits.store(request(layer, il, cold, w));
        }
    };
    auto compute_cold = [&](size_t chunk, Worker& w) {
        uint64_t begin = ticks();
        for (int spins = 0; fits.load() < 0; spins++)  // others have begun with what is missing: they will end
            if (spins > SPINS) std::this_thread::yield();
        if (fits.load() > 0) disk->bring(chunk - cold.begin);
        w.spent[DISK] += ticks() - begin;
        if (fits.load() > 0) fetched_chunk(layer, chunk, x, disk->places(il), w);
    };
    if (looks_ahead(il)) {
        parallel(PREDICTOR, n_cold, [&](size_t, uint32_t thread) { choose_together(workers_[thread]); });
        if (fits.load() > 0) look_ahead(il + 1);
    }
    auto order = deal(own.end - own.begin);
    parallel(UPDOWN, own.end - own.begin, [&](size_t item, uint32_t thread) {
        Worker& w = workers_[thread];
        size_t chunk = own.begin + order[item];
        choose_together(w);
        if (chunk < cold.begin)
            prefix_chunk(layer, chunk, x, rank, w);
        else
            compute_cold(chunk, w);
    });
    if (fits.load() > 0) return disk->finish();
    stream_layer(il);
    parallel(UPDOWN, n_cold, [&](size_t item, uint32_t thread) {
        fetched_chunk(layer, cold.begin + item, x, nullptr, workers_[thread]);
    });
    disk->release(il);
}

// Asks the disk for what these chunks have chosen; false where that is too much.
bool Side::request(const Layer& layer, size_t il, Range cold, Worker& w) {
    uint64_t begin = ticks();
    std::array<std::span<const uint32_t>, MAX_CHUNKS> chosen;
    for (size_t c = cold.begin; c < cold.end; c++) chosen[c - cold.begin] = {&chosen_[layer.chunks[c]], n_chosen_[c]};
    bool fits = disk->request(il, {chosen.data(), cold.end - cold.begin});
    w.spent[DISK] += ticks() - begin;
    return fits;
}

// Whether it pays to ask the layer after il before its turn. With experts it is not known yet whose turn it will be.
bool Side::looks_ahead(size_t il) const {
    if (il + 1 == config.n_layer) return false;
    const Layer& next = weights.layers[il + 1];
    bool both_here = weights.layers[il].dense && next.dense;  // the residual, and what normalises it
    return asks(next) && !next.expert && both_here && disk->pays_ahead(il + 1);
}

// While the layer before waits for the disk: asks layer il's predictor, with the residual as it is now, before that
// layer's FFN and this one's attention have changed it (in parallel blocks that layer's, too). What it lets through
// most surely is read behind the rest.
void Side::look_ahead(size_t il) {
    const Layer& layer = weights.layers[il];
    if (config.predictor_on_stream)
        std::copy_n(hidden_.data(), config.n_embd, ahead_x_.f.data());
    else
        normalise(layer.ffn_norm, hidden_.data(), ahead_x_.f.data());
    const Predictor& p = *layer.predictor;
    Vector rank = predictor_rank(p, quantised(ahead_x_, config.n_embd), ahead_rank_);
    uint32_t first = std::max(disk->first_cold(il), layer.always), n_ff = config.n_ff;
    parallel(PREDICTOR, ceil_div(n_ff - first, AHEAD_ROWS), [&](size_t item, uint32_t) {
        uint32_t lo = first + static_cast<uint32_t>(item * AHEAD_ROWS), at = lo - layer.always;
        size_t n = std::min<size_t>(AHEAD_ROWS, n_ff - lo);
        ops.matvec(p.out.type, p.out.n, p.out.row(at), p.out.stride, n, rank, &ahead_logit_[lo]);
        for (size_t i = 0; i < n; i++) ahead_logit_[lo + i] += p.bias[at + i];
    });
    size_t n = 0;
    for (uint32_t i = first; i < n_ff; i++)
        if (ahead_logit_[i] >= 0 && !disk->here(il, i)) ahead_[n++] = i;
    size_t most = std::min(n, AHEAD);
    std::nth_element(&ahead_[0], &ahead_[most], &ahead_[n], [&](uint32_t a, uint32_t b) {
        return ahead_logit_[a] != ahead_logit_[b] ? ahead_logit_[a] > ahead_logit_[b] : a < b;
    });
    std::sort(&ahead_[0], &ahead_[most]);
    disk->request_ahead(il, {&ahead_[0], most});
}

// ffn_chunk, of neurons that all lie in memory.
void Side::prefix_chunk(const Layer& layer, size_t chunk, Vector x, Vector rank, Worker& w) {
    const uint64_t& asked_for = layer.apart ? w.n.active : w.n.computed;
    uint64_t before = asked_for;
    ffn_chunk(layer, chunk, layer.chunks[chunk + 1], x, rank, w);
    w.n_prefix += asked_for - before;
}

// chosen_ of a chunk: what the predictor lets through, what fires where a matrix apart says so, or all candidates
void Side::choose(const Layer& layer, size_t chunk, Vector x, Vector rank, Worker& w) {
    uint32_t lo = layer.chunks[chunk], hi = layer.chunks[chunk + 1];
    if (lo == hi) {
        n_chosen_[chunk] = 0;
        return;
    }
    uint64_t begin = ticks();
    size_t n_asked = asks(layer) ? ask(layer, lo, hi, rank, w) : candidates(layer, lo, hi, w), n = 0;
    w.spent[PREDICTOR] += ticks() - begin;
    if (layer.apart) decide(layer, w.asked.data(), n_asked, x, w);
    for (size_t k = 0; k < n_asked; k++) {
        chosen_[lo + n] = w.asked[k];
        chosen_pre_[lo + n] = w.pre[k];
        n += !layer.apart || w.pre[k] != 0 || mode_ == PI_MODE_DENSE;
    }
    n_chosen_[chunk] = n;
}

// What ffn_chunk does, with neurons that are chosen and at hand. place: see Worker.
void Side::fetched_chunk(const Layer& layer, size_t chunk, Vector x, const uint32_t* place, Worker& w) {
    const uint32_t* ids = &chosen_[layer.chunks[chunk]];
    const float* pre = &chosen_pre_[layer.chunks[chunk]];
    size_t n = n_chosen_[chunk];
    w.place = place;
    if (!layer.apart) {
        decide(layer, ids, n, x, w);
        pre = w.pre.data();
    }
    float* sum = &partial_[chunk * config.n_embd];
    std::fill_n(sum, config.n_embd, 0.0f);
    finish_chunk(chunk, add_neurons(layer, ids, pre, n, x, sum, w), w);
    w.place = nullptr;
}

// Where the kernels find these neurons.
const uint32_t* Side::places(const uint32_t* ids, size_t n, Worker& w) const {
    if (!w.place) return ids;
    for (size_t i = 0; i < n; i++) w.places[i] = w.place[ids[i]];
    return w.places.data();
}

// Sessions of one model share what is read from disk: one call after the other.
std::unique_lock<std::mutex> Side::take_turn() const {
    return disk ? std::unique_lock(disk->in_use) : std::unique_lock<std::mutex>();
}

void Side::collect_disk_counts() {
    disk->check();
    DiskTier::Counts counts = disk->take_counts();
    stats.neurons_prefix += counts.from_prefix;
    stats.neurons_cache += counts.from_cache;
    stats.neurons_disk += counts.from_disk;
    stats.disk_reads += counts.reads;
    stats.disk_bytes += counts.bytes;
    stats.stream_bytes += counts.streamed;
    stats.neurons_ahead += counts.ahead;
    stats.neurons_ahead_asked += counts.ahead_asked;
}

}  // namespace pi
