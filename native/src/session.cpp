// A session's buffers, and the small steps that decoding and batches share.
#include "session.h"

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

uint64_t max_rank(const Model& model) {
    uint64_t most = 0;
    for (const Layer& layer : model.weights.layers)
        if (layer.predictor) most = std::max(most, layer.predictor->in.n_rows);
    return most;
}

}  // namespace

Session::Session(const Model& model, const pi_session_params& params)
    : model(model),
      ops(ops_or_throw(params.kernels)),
      n_ctx(params.n_ctx),
      sampler(model.config.n_vocab),
      mode_(static_cast<pi_mode>(params.mode)),
      uncut_(params.uncut != 0),
      pool_(params.n_threads),
      workers_(params.n_threads) {
    const Config& c = model.config;
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
    keys_.resize(size_t{c.n_layer} * c.kv_dim() * n_ctx);
    values_.resize(size_t{c.n_layer} * c.kv_dim() * n_ctx);
    size_t rank = max_rank(model), batch = std::min(BATCH, n_ctx);
    for (Worker& w : workers_) {
        allocate(w.asked, c.n_ff);
        allocate(w.active, c.n_ff);
        if (model.disk) allocate(w.places, c.n_ff);
        for (auto* buffer : {&w.logit, &w.pre, &w.a, &w.up}) allocate(*buffer, c.n_ff);
        allocate(w.scores, QUERIES * ld_scores());
        allocate(w.packed, PACKED_FLOATS);
        allocate(w.packed8, PACKED_BLOCKS);
        allocate(w.tile, BATCH * DOWN_COLUMNS);
    }
    allocate(cos_, batch * (c.rotary_dim / 2));
    allocate(sin_, batch * (c.rotary_dim / 2));
    allocate(hidden_, c.n_embd);
    if (c.parallel) {
        allocate(entry_, c.n_embd);
        allocate(b_entry_, batch * c.n_embd);
    }
    allocate_vector(x_, std::max(c.n_embd, c.q_dim()));
    allocate_vector(rank_, rank);
    allocate(routes_, c.experts.n);
    allocate(q_, c.q_dim());
    allocate(k_, c.kv_dim());
    allocate(v_, c.kv_dim());
    allocate(partial_, MAX_CHUNKS * c.n_embd);
    allocate(position_row_, c.n_embd);
    if (model.disk) {
        allocate(chosen_, c.n_ff);
        allocate(chosen_pre_, c.n_ff);
        allocate_vector(ahead_x_, c.n_embd);
        allocate_vector(ahead_rank_, rank);
        allocate(ahead_logit_, c.n_ff);
        allocate(ahead_, c.n_ff);
    }
    allocate(logits, c.n_vocab);
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
        allocate(piece_rows_, size_t{3} * PIECE * c.n_embd * sizeof(float));
        allocate(piece_bias_, 2 * PIECE);
    }
    allocate(b_asked_, batch * size_t{c.n_ff});
    size_t longest = std::max<size_t>({c.n_embd, c.q_dim(), together, rank});
    allocate(b_q8_, batch * ((longest + QK - 1) / QK));
    sampler.seed(0);
}

void Session::check_tokens(const int32_t* tokens, size_t n) const {
    if (n > n_ctx - position)
        throw Error(PI_ERROR_ARGUMENT, "expected at most " + std::to_string(n_ctx - position) +
                                           " more tokens in a context of " + std::to_string(n_ctx) + ", found " +
                                           std::to_string(n));
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || static_cast<uint32_t>(tokens[i]) >= model.config.n_vocab)
            throw Error(PI_ERROR_ARGUMENT, "expected token ids from 0 to " + std::to_string(model.config.n_vocab - 1) +
                                               ", found " + std::to_string(tokens[i]));
}

void Session::truncate(size_t n) {
    if (n > position)
        throw Error(PI_ERROR_ARGUMENT,
                    "expected a position of at most " + std::to_string(position) + ", found " + std::to_string(n));
    position = n;
    has_logits = false;
}

// out: (n, n_embd), of tokens at `position` and after it
void Session::embed(const int32_t* tokens, size_t n, float* out) {
    const Rows& rows = model.weights.token_embd;
    bool on_disk = model.disk && model.disk->holds_table();
    if (on_disk) model.disk->read_rows(tokens, n);
    for (size_t t = 0; t < n; t++, out += rows.n) {
        const uint8_t* row = on_disk ? model.disk->row(t) : rows.row(static_cast<uint64_t>(tokens[t]));
        ops.dequantize(rows.type, 0, rows.n, row, out);
        if (!model.config.learned_positions) continue;
        const Rows& positions = model.weights.position_embd;
        ops.dequantize(positions.type, 0, positions.n, positions.row(position + t), position_row_.data());
        for (size_t i = 0; i < positions.n; i++) out[i] += position_row_[i];
    }
}

void Session::normalise(const Norm& norm, const float* x, float* out) const {
    const Config& c = model.config;
    if (c.norm == NormKind::Rms)
        ops.rms_norm(c.n_embd, x, norm.weight, c.norm_eps, out);
    else
        ops.layer_norm(c.n_embd, x, norm.weight, norm.bias, c.norm_eps, out);
}

// cos and sin of row t for the position pos + t: (n, rotary_dim / 2)
void Session::set_angles(size_t pos, size_t n) {
    size_t half = model.config.rotary_dim / 2;
    for (size_t t = 0; t < n; t++)
        for (size_t i = 0; i < half; i++) {
            float angle = static_cast<float>(pos + t) * model.weights.rope_inv_freq[i];
            cos_[t * half + i] = std::cos(angle) * model.config.rope_scale;
            sin_[t * half + i] = std::sin(angle) * model.config.rope_scale;
        }
}

// Queries or keys of token t as attention takes them: rotated, then normalised, where the layer does so.
void Session::prepare_heads(const Layer& layer, float* x, uint32_t n_heads, size_t t) {
    const Config& c = model.config;
    size_t half = c.rotary_dim / 2;
    for (uint32_t h = 0; h < n_heads; h++, x += c.head_dim) {
        if (layer.rotates) ops.rope(c.rotary_dim, x, &cos_[t * half], &sin_[t * half]);
        if (c.qk_norm) unit_rms(c.head_dim, x);
    }
}

void Session::unit_rms(size_t n, float* x) const { ops.rms_norm(n, x, nullptr, model.config.norm_eps, x); }

void Session::store_kv(size_t il, uint32_t head, size_t pos, const float* k, const float* v) {
    ops.to_f16(model.config.head_dim, k, key(il, head, pos));
    ops.to_f16(model.config.head_dim, v, value(il, head, pos));
}

// out = softmax(q . K / sqrt(head_dim)) . V over the first n_pos positions; q, out: (head_dim,)
void Session::attend(size_t il, uint32_t head, size_t n_pos, const float* q, float* out, Worker& w) {
    const Config& c = model.config;
    uint32_t kv = head / (c.n_head / c.n_head_kv);
    float scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    ops.attention_scores(c.head_dim, n_pos, q, key(il, kv, 0), c.head_dim, scale, w.scores.data());
    ops.softmax(n_pos, w.scores.data());
    ops.attention_mix(c.head_dim, n_pos, w.scores.data(), value(il, kv, 0), c.head_dim, out);
}

// a[i] = activation(pre[i]) in place; what must not fire becomes exactly 0, what is not a number stays so.
void Session::activate(const Layer& layer, size_t n, float* a) const {
    float t = layer.threshold;
    switch (model.config.activation) {
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
    if (t > 0 && !uncut_ && model.config.activation != Activation::FatRelu)
        for (size_t i = 0; i < n; i++) a[i] = std::fabs(a[i]) < t ? 0 : a[i];
}

// h[i] = a[i] * up[i], with up cut below 0 for drelu.
void Session::apply_up(size_t n, const float* a, float* up) const {
    bool cut = model.config.activation == Activation::DRelu;
    for (size_t i = 0; i < n; i++) up[i] = a[i] * (cut && up[i] <= 0 ? 0 : up[i]);
}

}  // namespace pi
