#include "session.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

namespace pi {

namespace {

// What of a model is on a device, opened for a session; NULL where nothing is.
std::unique_ptr<DeviceSession> open_there(const Model& model, const pi_session_params& params) {
    if (!model.device) return nullptr;
    uint32_t lent = 0;
    for (const Layer& layer : model.weights.layers) lent = std::max(lent, layer.last - layer.first);
    uint64_t taken = model.device_context + model.device_bytes + model.session_bytes,
             room = model.device_budget > 0 ? model.device_budget - std::min(taken, model.device_budget) : UINT64_MAX;
    return model.device->open(model.config, model.on_device, params, model.lend_from > 0 ? lent : 0, room);
}

}  // namespace

Session::Session(const Model& model, const pi_session_params& params)
    : Session(model.config, model.weights, model.disk.get(), params, model.on_device, open_there(model, params),
              model.lend_from) {
    if (!device_) return;
    model_ = &model;
    uint64_t sessions = model.session_bytes += card_kv_bytes() + card_scratch_bytes(),
             found = model.device_context + model.device_bytes + sessions;
    if (model.device_budget > 0 && found > model.device_budget)
        throw Error(PI_ERROR_MEMORY, "card: expected at most " + std::to_string(model.device_budget) +
                                         " bytes, found " + std::to_string(model.device_context) + " of context, " +
                                         std::to_string(model.device_bytes) + " of weights and " +
                                         std::to_string(sessions) + " of sessions");
}

Session::~Session() {
    if (model_) model_->session_bytes -= card_kv_bytes() + card_scratch_bytes();
}

Session::Session(const Config& config, const Weights& weights, DiskTier* disk, const pi_session_params& params,
                 const Weights& there, std::unique_ptr<DeviceSession> device, uint32_t lend_from)
    : Side(config, weights, disk, params),
      sampler(config.n_vocab),
      there_(there),
      device_(std::move(device)),
      lend_from_(lend_from) {
    logits.resize(config.n_vocab);
    sampler.seed(0);
}

void Session::check_tokens(const int32_t* tokens, size_t n) const {
    if (n > n_ctx - position)
        throw Error(PI_ERROR_ARGUMENT, "expected at most " + std::to_string(n_ctx - position) +
                                           " more tokens in a context of " + std::to_string(n_ctx) + ", found " +
                                           std::to_string(n));
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || static_cast<uint32_t>(tokens[i]) >= config.n_vocab)
            throw Error(PI_ERROR_ARGUMENT, "expected token ids from 0 to " + std::to_string(config.n_vocab - 1) +
                                               ", found " + std::to_string(tokens[i]));
}

void Session::truncate(size_t n) {
    if (n > position)
        throw Error(PI_ERROR_ARGUMENT,
                    "expected a position of at most " + std::to_string(position) + ", found " + std::to_string(n));
    position = n;
    has_logits = false;
}

void Session::decode(int32_t token, float* logits_out) {
    check_tokens(&token, 1);
    std::unique_lock<std::mutex> turn = take_turn();
    auto start = std::chrono::steady_clock::now();
    start_clock();
    run({position, 1, true, false}, &token, logits.data(), nullptr);
    has_logits = true;
    stats.n_decode++;
    stats.neurons_total += uint64_t{config.n_layer} * config.n_ff;
    if (weights.output.data) stats.bytes_head += weights.output.n_rows * weights.output.row_size();
    if (device_) count_reads_there();
    if (logits_out) std::memcpy(logits_out, logits.data(), logits.bytes());
    lap(OTHER);
    collect_seconds(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
}

void Session::prefill(const int32_t* tokens, size_t n, float* logits_out) {
    check_tokens(tokens, n);
    std::unique_lock<std::mutex> turn = take_turn();
    for (size_t done = 0; done < n; done += BATCH) {
        size_t m = std::min(BATCH, n - done);
        run({position, m, false, false}, tokens + done, done + m == n ? logits.data() : nullptr, nullptr);
    }
    has_logits = true;
    if (disk) disk->fill();  // streaming took some of the cache
    stats.n_prefill += n;
    if (logits_out) std::memcpy(logits_out, logits.data(), logits.bytes());
}

void Session::score(const int32_t* tokens, size_t n, float* logits_out, pi_layer_score* scores) {
    check_tokens(tokens, n);
    std::unique_lock<std::mutex> turn = take_turn();
    for (size_t done = 0; done < n; done += BATCH) {
        size_t m = std::min(BATCH, n - done);
        run({position, m, false, true}, tokens + done, logits_out + done * config.n_vocab, scores);
        for (size_t il = 0; scores && il < config.n_layer; il++) scores[il].n_tokens += m;
    }
    has_logits = false;
}

// logits_out: NULL where nobody asks. scores: NULL, or of each layer to add to.
void Session::run(const Pass& pass, const int32_t* tokens, float* logits_out, pi_layer_score* scores) {
    has_logits = false;
    begin(pass);
    if (device_)
        run_on_both(tokens, logits_out, scores);
    else
        run_here(tokens, logits_out, scores);
    position += pass.n;
    if (logits_out) cap(logits_out, (pass.selective ? pass.n : 1) * config.n_vocab);
}

void Session::run_here(const int32_t* tokens, float* logits_out, pi_layer_score* scores) {
    embed(tokens);
    add_positions();
    for (size_t il = 0; il < config.n_layer; il++) {
        if (!config.parallel) attention(il);
        prepare_ffn(il);
        ffn(il);
        if (config.parallel) attention(il);
        if (scores) count(scores + il);
        sum(il, {});
    }
    if (disk) collect_disk_counts();
    if (logits_out) head(logits_out);
}

const pi_stats& Session::read_stats() {
    for (size_t il = 0; il < config.n_layer; il++) {
        NeuronCounts n = std::exchange(counts[il], {});
        NeuronBytes bytes = bytes_of(weights.layers[il], n);
        stats.neurons_computed += n.computed;
        stats.neurons_active += n.fired;
        stats.bytes_predictor += bytes.predictor;
        stats.bytes_gate += bytes.gate;
        stats.bytes_updown += bytes.updown;
    }
    if (device_) read_stats_there();
    stats.bytes_decode =
        stats.bytes_attention + stats.bytes_predictor + stats.bytes_gate + stats.bytes_updown + stats.bytes_head;
    return stats;
}

void Session::reset_stats() {
    read_stats();
    stats = {};
}

}  // namespace pi
