#include "session.h"

#include <chrono>
#include <cstring>

namespace pi {

Session::Session(const Model& model, const pi_session_params& params)
    : Side(model.config, model.weights, model.disk.get(), params), sampler(model.config.n_vocab) {
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
    stats.bytes_head += weights.output.n_rows * weights.output.row_size();
    stats.bytes_decode =
        stats.bytes_attention + stats.bytes_predictor + stats.bytes_gate + stats.bytes_updown + stats.bytes_head;
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
    }
    has_logits = false;
}

// logits_out: NULL where nobody asks. scores: NULL, or of each layer to add to.
void Session::run(const Pass& pass, const int32_t* tokens, float* logits_out, pi_layer_score* scores) {
    begin(pass);
    embed(tokens);
    add_positions();
    for (size_t il = 0; il < config.n_layer; il++) {
        attention(il);
        prepare_ffn(il);
        ffn(il);
        if (scores) scores[il].n_tokens += pass.n;
        if (scores) count(scores + il);
        sum(il, {});
    }
    if (disk) collect_disk_counts();
    position += pass.n;
    if (logits_out) head(logits_out);
    if (logits_out) cap(logits_out, (pass.selective ? pass.n : 1) * config.n_vocab);
}

}  // namespace pi
