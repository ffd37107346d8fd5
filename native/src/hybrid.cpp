// One pass over two sides (device.h): for each layer, where the stream is, what crosses, and who begins when. The
// device is always set going before the processor begins its own share. In parallel blocks the FFN comes before
// attention on either side: its input waits for nothing.
#include <cstring>

#include "session.h"

namespace pi {

namespace {

bool has_neurons(const Layer& layer) { return layer.first < layer.last; }

}  // namespace

void Session::run_on_both(const int32_t* tokens, float* logits_out, pi_layer_score* scores) {
    try {
        begin_on_both(tokens);
        for (size_t il = 0; il < config.n_layer; il++) {
            pi_layer_score* score = scores ? scores + il : nullptr;
            if (weights.layers[il].dense)
                layer_with_block_here(il, score);
            else
                layer_with_block_there(il, score);
        }
        if (disk) collect_disk_counts();
        finish_on_both(logits_out);
        pool_.stay_awake(false);
    } catch (...) {
        pool_.stay_awake(false);
        settle();
        throw;
    }
    for (size_t il = 0; scores && il < config.n_layer; il++) {
        scores[il].n_true += scores_there_[il].n_true;
        scores[il].n_predicted += scores_there_[il].n_predicted;
        scores[il].n_hit += scores_there_[il].n_hit;
    }
}

// After a failure: no command is left that could touch what the next pass uses.
void Session::settle() {
    try {
        await_all();
    } catch (const std::exception&) {  // known already
    }
}

void Session::begin_on_both(const int32_t* tokens) {
    away_ = false;
    scores_there_.assign(config.n_layer, {});
    pool_.stay_awake(pass_.decode);
    device_->begin(pass_);
    if (weights.token_embd.data) {
        embed(tokens);
    } else {
        device_->embed(tokens);
        away_ = true;
        if (config.learned_positions) bring_stream();
    }
    if (!away_) add_positions();
}

// The FFN's input crosses, and one sum comes back; nothing where the device has no neurons.
void Session::layer_with_block_here(size_t il, pi_layer_score* score) {
    bool lent = lends(il), both = lent || has_neurons(there_.layers[il]);
    bring_stream();
    if (!config.parallel) attention(il);
    prepare_ffn(il);
    uint64_t ticket = 0;
    if (both) {
        send_ffn_input(il);
        ffn_there(il, lent);
        device_->give_sum();
        ticket = device_->mark();
        device_->start();
    }
    if (!lent) {
        ffn(il);
        if (score) count(score);
    }
    if (config.parallel) attention(il);
    const float* before = both ? await_sum(ticket) : nullptr;
    if (!lent) return sum(il, {before, nullptr});
    add_sum(il, before);
    release_neurons(il);
}

// Nothing crosses where the device has all neurons; else the FFN's input comes, one sum with it, and their sum goes
// back.
void Session::layer_with_block_there(size_t il, pi_layer_score* score) {
    bool lent = lends(il), both = has_neurons(there_.layers[il]);
    if (routes(weights.layers[il], RoutedBy::LayerInput)) route_by_stream(il);
    send_stream();
    if (!config.parallel) device_->attention(il);
    device_->prepare_ffn(il);
    if (lent || !has_neurons(weights.layers[il])) {
        ffn_there(il, lent);
        if (config.parallel) device_->attention(il);
        device_->add_sum(il);
        if (lent && disk) {  // what was lent makes room for the next
            await_all();
            release_neurons(il);
        }
        return;
    }
    device_->give_ffn_input(il);
    uint64_t input = device_->mark(), ticket = 0;
    if (both) {
        ffn_there(il, false);
        device_->give_sum();
        ticket = device_->mark();
    }
    if (config.parallel) device_->attention(il);
    device_->start();
    await(input);
    read_ffn_input(il);
    ffn(il);
    if (score) count(score);
    const float* before = both ? await_sum(ticket) : nullptr;
    sum(il, {before, device_->inbox.x});
    crossed(config.n_embd);
    device_->add_inbox(il);
}

// The router, which is here, sees the stream before attention changes it there.
void Session::route_by_stream(size_t il) {
    if (!away_) return choose_experts(il, stream());
    device_->leave();
    await_all();
    choose_experts(il, device_->outbox.x);
    crossed(config.n_embd);
}

void Session::ffn_there(size_t il, bool lent) {
    if (lent) {
        bring_neurons(il);
        device_->lend(il, weights.layers[il]);
    }
    device_->ffn(il);
    if (pass_.selective) device_->count(&scores_there_[il]);
}

// Whether the device computes the layer's neurons that lie here, too: in prompts that are long enough to pay for it.
bool Session::lends(size_t il) const {
    return lend_from_ > 0 && pass_.n >= lend_from_ && !pass_.decode && !pass_.selective &&
           has_neurons(weights.layers[il]);
}

void Session::finish_on_both(float* logits_out) {
    if (!logits_out) return await_all();
    if (!there_.output.data) {
        bring_stream();
        return head(logits_out);
    }
    send_stream();
    device_->head();
    await_all();
    size_t n = (pass_.selective ? pass_.n : 1) * config.n_vocab;
    std::copy_n(device_->outbox.logits, n, logits_out);
    crossed(config.n_vocab);
}

// ---- what crosses. The inbox may be written: whenever the processor has something for it, it has waited for a command
// behind the one that read the inbox last.

void Session::send_stream() {
    if (away_) return;
    std::copy_n(stream(), pass_.n * config.n_embd, device_->inbox.x);
    crossed(config.n_embd);
    device_->enter();
    away_ = true;
}

void Session::bring_stream() {
    if (!away_) return;
    device_->leave();
    await_all();
    std::copy_n(device_->outbox.x, pass_.n * config.n_embd, stream());
    crossed(config.n_embd);
    away_ = false;
}

void Session::send_ffn_input(size_t il) {
    const Layer& layer = weights.layers[il];
    std::copy_n(ffn_input(), pass_.n * config.n_embd, device_->inbox.x);
    crossed(config.n_embd);
    if (asks_now(layer)) {
        std::copy_n(ffn_rank(), pass_.n * layer.predictor->out.n, device_->inbox.rank);
        crossed(layer.predictor->out.n);
    }
    device_->take_ffn_input(il);
}

void Session::read_ffn_input(size_t il) {
    const Layer& layer = weights.layers[il];
    take_ffn_input(il, device_->outbox.x, device_->outbox.rank);
    crossed(config.n_embd);
    if (asks_now(layer)) crossed(layer.predictor->out.n);
}

void Session::await(uint64_t ticket) {
    lap(OTHER);
    device_->wait(ticket);
    lap(CARD);
    stats.card_waits += pass_.decode;
}

void Session::await_all() { await(device_->mark()); }

const float* Session::await_sum(uint64_t ticket) {
    await(ticket);
    crossed(config.n_embd);
    return device_->outbox.sum;
}

// A vector of n floats.
void Session::crossed(size_t n) {
    if (!pass_.decode) return;
    stats.card_transfers++;
    stats.card_bytes += n * sizeof(float);
}

// Of one token, but for its neurons.
void Session::count_reads_there() {
    for (const Layer& layer : there_.layers) {
        if (!layer.dense) continue;
        for (const Linear* linear : {&layer.q, &layer.k, &layer.v, &layer.o})
            stats.card_read_bytes += linear->rows.n_rows * linear->rows.row_size();
        stats.card_read_bytes += 2 * sizeof(uint16_t) * config.kv_dim() * (pass_.position + 1);
        if (asks(layer)) stats.card_read_bytes += layer.predictor->in.n_rows * layer.predictor->in.row_size();
    }
    if (there_.output.data) stats.card_read_bytes += there_.output.n_rows * there_.output.row_size();
}

void Session::read_stats_there() {
    std::vector<NeuronCounts> counts_there(config.n_layer);
    device_->take_counts(counts_there);
    for (size_t il = 0; il < config.n_layer; il++) {
        const NeuronCounts& n = counts_there[il];
        NeuronBytes bytes = bytes_of(there_.layers[il], n);
        stats.neurons_computed += n.computed;
        stats.neurons_active += n.fired;
        stats.card_neurons += n.computed;
        stats.card_neurons_fired += n.fired;
        stats.card_read_bytes += bytes.predictor + bytes.gate + bytes.updown;
    }
}

uint64_t Session::mailbox_bytes() const {
    if (!device_) return 0;
    return sizeof(float) * (std::min(BATCH, n_ctx) * (3 * config.n_embd + 2 * max_rank(weights)) + config.n_vocab) +
           (lend_from_ > 0 ? DEVICE_STAGING : 0);
}

}  // namespace pi
