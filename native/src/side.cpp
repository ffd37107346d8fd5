// A side's buffers, and the steps that decoding and batches share.
#include "side.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace pi {

namespace {

const Ops& ops_or_throw(uint32_t which) {
    const Ops* ops = choose_ops(which);
    if (!ops) throw Error(PI_ERROR_UNSUPPORTED, "this processor cannot run the kernels " + std::to_string(which));
    return *ops;
}

}  // namespace

uint64_t max_rank(const Weights& weights) {
    uint64_t most = 0;
    for (const Layer& layer : weights.layers)
        if (layer.predictor) most = std::max(most, layer.predictor->out.n);
    return most;
}

NeuronBytes bytes_of(const Layer& layer, const NeuronCounts& n) {
    uint64_t up = layer.up.data ? layer.up.row_size() : 0;
    uint64_t asked = layer.predictor ? layer.predictor->out.row_size() + sizeof(float) : 0;
    // add_rows skips what is 0
    return {n.asked * asked, n.computed * layer.select.row_size(), n.active * up + n.fired * layer.down.row_size()};
}

Side::Side(const Config& config, const Weights& weights, DiskTier* disk, const pi_session_params& params)
    : config(config),
      weights(weights),
      ops(ops_or_throw(params.kernels)),
      n_ctx(params.n_ctx),
      counts(config.n_layer),
      disk(disk),
      pool_(params.n_threads),
      mode_(static_cast<pi_mode>(params.mode)),
      uncut_(params.uncut != 0),
      workers_(params.n_threads) {
    const Config& c = config;
    auto allocate = [this](auto& buffer, size_t n) {
        buffer.resize(n);
        scratch_bytes_ += buffer.bytes();
    };
    auto allocate_vector = [&](Activations& v, size_t n) {
        allocate(v.f, n);
        allocate(v.d, n / QK);
        allocate(v.sum, n / QK);
        allocate(v.q, n / QK * QK);
    };
    size_t n_kv_layers = 0;
    for (const Layer& layer : weights.layers) kv_layer_.push_back(layer.dense ? n_kv_layers++ : SIZE_MAX);
    keys_.resize(n_kv_layers * c.kv_dim() * n_ctx);
    values_.resize(n_kv_layers * c.kv_dim() * n_ctx);
    size_t rank = max_rank(weights), batch = std::min(BATCH, n_ctx);
    for (Worker& w : workers_) {
        allocate(w.asked, c.n_ff);
        allocate(w.active, c.n_ff);
        if (disk) allocate(w.places, c.n_ff);
        for (auto* buffer : {&w.logit, &w.pre, &w.a, &w.up}) allocate(*buffer, c.n_ff);
        allocate(w.scores, QUERIES * ld_scores());
        allocate(w.packed, PACKED_FLOATS);
        allocate(w.packed8, PACKED_BLOCKS);
        allocate(w.tile, BATCH * DOWN_COLUMNS);
    }
    allocate(cos_, batch * (c.rotary_dim / 2));
    allocate(sin_, batch * (c.rotary_dim / 2));
    allocate(hidden_, c.n_embd);
    allocate_vector(x_, std::max(c.n_embd, c.q_dim()));
    allocate_vector(rank_, rank);
    allocate(routes_, c.experts.n);
    allocate(q_, c.q_dim());
    allocate(k_, c.kv_dim());
    allocate(v_, c.kv_dim());
    allocate(partial_, MAX_CHUNKS * c.n_embd);
    allocate(position_row_, c.n_embd);
    if (disk) {
        allocate(chosen_, c.n_ff);
        allocate(chosen_pre_, c.n_ff);
        allocate_vector(ahead_x_, c.n_embd);
        allocate_vector(ahead_rank_, rank);
        allocate(ahead_logit_, c.n_ff);
        allocate(ahead_, c.n_ff);
    }
    allocate(b_hidden_, batch * c.n_embd);
    allocate(b_x_, batch * std::max(c.n_embd, c.q_dim()));
    allocate(b_q_, batch * c.q_dim());
    allocate(b_k_, batch * c.kv_dim());
    allocate(b_v_, batch * c.kv_dim());
    size_t together = c.experts.n > 0 ? PIECE : c.n_ff;  // neurons
    allocate(b_select_, batch * together);
    allocate(b_up_, batch * together);
    allocate(b_rank_, batch * rank);
    if (c.experts.n > 0) {
        allocate(b_routes_, batch * size_t{c.experts.n});
        allocate(members_, c.n_ff);
        allocate(takers_, batch);
        allocate(b_taken_, batch * c.n_embd);
        allocate(b_sum_, batch * c.n_embd);
        allocate(piece_rows_, size_t{3} * PIECE * c.n_embd * sizeof(float));
        allocate(piece_bias_, 2 * PIECE);
    }
    allocate(b_asked_, batch * size_t{c.n_ff});
    size_t longest = std::max<size_t>({c.n_embd, c.q_dim(), together, rank});
    allocate(b_q8_, batch * ((longest + QK - 1) / QK));
}

void Side::begin(const Pass& pass) {
    pass_ = pass;
    set_angles();
}

void Side::embed(const int32_t* tokens) {
    const Rows& rows = weights.token_embd;
    bool on_disk = disk && disk->holds_table();
    if (on_disk) disk->read_rows(tokens, pass_.n);
    for (size_t t = 0; t < pass_.n; t++) {
        const uint8_t* row = on_disk ? disk->row(t) : rows.row(static_cast<uint64_t>(tokens[t]));
        ops.dequantize(rows.type, 0, rows.n, row, stream() + t * rows.n);
    }
}

void Side::add_positions() {
    if (!config.learned_positions) return;
    const Rows& rows = weights.position_embd;
    for (size_t t = 0; t < pass_.n; t++) {
        ops.dequantize(rows.type, 0, rows.n, rows.row(pass_.position + t), position_row_.data());
        for (size_t i = 0; i < rows.n; i++) stream()[t * rows.n + i] += position_row_[i];
    }
}

void Side::attention(size_t il) {
    if (pass_.decode)
        attention_token(il);
    else
        attention_batch(il);
}

void Side::prepare_ffn(size_t il) {
    const Layer& layer = weights.layers[il];
    if (pass_.decode)
        prepare_token(layer, hidden_.data());
    else
        prepare_batch(layer, b_hidden_.data());
}

void Side::take_ffn_input(size_t il, const float* x, const float* rank) {
    const Layer& layer = weights.layers[il];
    if (pass_.decode)
        take_token(layer, x, rank);
    else
        take_batch(layer, x, rank);
    if (routes(layer, RoutedBy::FfnInput)) choose_experts(il, x);
}

void Side::choose_experts(size_t il, const float* x) {
    if (pass_.decode)
        route(weights.layers[il], x);
    else
        route_batch(weights.layers[il], x, pass_.n);
}

void Side::ffn(size_t il) {
    const Layer& layer = weights.layers[il];
    if (!pass_.decode) {
        bring_neurons(il);
        ffn_batch(layer);
    } else if (disk && disk->holds(il)) {
        ffn_from_disk(layer, il, ffn_x_, ffn_rank_);
    } else {
        ffn_chunks(layer, ffn_x_, ffn_rank_);
    }
}

void Side::count(pi_layer_score* score) const {
    for (const Worker& w : workers_) {
        score->n_true += w.counted.n_true;
        score->n_predicted += w.counted.n_predicted;
        score->n_hit += w.counted.n_hit;
    }
}

void Side::sum(size_t il, const Chain& chain) {
    const Layer& layer = weights.layers[il];
    if (pass_.decode) {
        sum_chunks(layer, chain);
        collect_counts(counts[il]);
    } else {
        if (layer.expert)
            sum_experts(il, chain);
        else
            gemm_down(own_group(layer), pass_.n, chain);
        release_neurons(il);
    }
}

void Side::head(float* logits) {
    if (pass_.decode)
        head_token(hidden_.data(), logits);
    else if (pass_.selective)
        head_batch(logits);
    else
        head_token(&b_hidden_[(pass_.n - 1) * config.n_embd], logits);
}

void Side::normalise(const Norm& norm, const float* x, float* out) const {
    const Config& c = config;
    if (c.norm == NormKind::Rms)
        ops.rms_norm(c.n_embd, x, norm.weight, c.norm_eps, out);
    else
        ops.layer_norm(c.n_embd, x, norm.weight, norm.bias, c.norm_eps, out);
}

// cos and sin of row t for the pass's token t: (n, rotary_dim / 2)
void Side::set_angles() {
    size_t half = weights.rope_inv_freq ? config.rotary_dim / 2 : 0;  // NULL: no attention on this side
    for (size_t t = 0; t < pass_.n; t++)
        for (size_t i = 0; i < half; i++) {
            float angle = static_cast<float>(pass_.position + t) * weights.rope_inv_freq[i];
            cos_[t * half + i] = std::cos(angle) * config.rope_scale;
            sin_[t * half + i] = std::sin(angle) * config.rope_scale;
        }
}

// Queries or keys of token t as attention takes them: rotated, then normalised, where the layer does so.
void Side::prepare_heads(const Layer& layer, float* x, uint32_t n_heads, size_t t) {
    const Config& c = config;
    size_t half = c.rotary_dim / 2;
    for (uint32_t h = 0; h < n_heads; h++, x += c.head_dim) {
        if (layer.rotates) ops.rope(c.rotary_dim, x, &cos_[t * half], &sin_[t * half]);
        if (c.qk_norm) unit_rms(c.head_dim, x);
    }
}

void Side::unit_rms(size_t n, float* x) const { ops.rms_norm(n, x, nullptr, config.norm_eps, x); }

void Side::store_kv(size_t il, uint32_t head, size_t pos, const float* k, const float* v) {
    ops.to_f16(config.head_dim, k, key(il, head, pos));
    ops.to_f16(config.head_dim, v, value(il, head, pos));
}

// out = softmax(q . K / sqrt(head_dim)) . V over the first n_pos positions; q, out: (head_dim,)
void Side::attend(size_t il, uint32_t head, size_t n_pos, const float* q, float* out, Worker& w) {
    const Config& c = config;
    uint32_t kv = head / (c.n_head / c.n_head_kv);
    float scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    ops.attention_scores(c.head_dim, n_pos, q, key(il, kv, 0), c.head_dim, scale, w.scores.data());
    ops.softmax(n_pos, w.scores.data());
    ops.attention_mix(c.head_dim, n_pos, w.scores.data(), value(il, kv, 0), c.head_dim, out);
}

// a[i] = activation(pre[i]) in place; what must not fire becomes exactly 0, what is not a number stays so.
void Side::activate(const Layer& layer, size_t n, float* a) const {
    float t = layer.threshold;
    switch (config.activation) {
        case Activation::Relu:
        case Activation::DRelu:
            for (size_t i = 0; i < n; i++) a[i] = a[i] <= 0 ? 0 : a[i];
            break;
        case Activation::Relu2:
            for (size_t i = 0; i < n; i++) a[i] = a[i] <= 0 ? 0 : a[i] * a[i];
            break;
        case Activation::FatRelu:
            for (size_t i = 0; i < n; i++) a[i] = a[i] <= t ? 0 : a[i];
            break;
        case Activation::Silu:
            ops.silu(n, a);
            break;
    }
    if (t > 0 && !uncut_ && config.activation != Activation::FatRelu)
        for (size_t i = 0; i < n; i++) a[i] = std::fabs(a[i]) < t ? 0 : a[i];
}

// h[i] = a[i] * up[i], with up cut below 0 for drelu.
void Side::apply_up(size_t n, const float* a, float* up) const {
    bool cut = config.activation == Activation::DRelu;
    for (size_t i = 0; i < n; i++) up[i] = a[i] * (cut && up[i] <= 0 ? 0 : up[i]);
}

}  // namespace pi
