// Many tokens through the matrix-matrix path: weights are dequantised tile by tile and met with up to BATCH tokens.
// Every token's sums run in an order of their own: the same results however a prompt is cut into batches.
#include <cstring>

#include "session.h"

namespace pi {

namespace {

constexpr size_t PACK_ROWS_K = PACKED_FLOATS / TILE_ROWS;     // elements of a row packed at a time
constexpr size_t PACK_DOWN_K = PACKED_FLOATS / DOWN_COLUMNS;  // neurons packed at a time

}  // namespace

void Session::prefill(const int32_t* tokens, size_t n, float* logits_out) {
    check_tokens(tokens, n);
    for (size_t done = 0; done < n; done += BATCH) {
        size_t m = std::min(BATCH, n - done);
        forward_batch(tokens + done, m, false, nullptr);
        if (done + m == n) output_head(&b_hidden_[(m - 1) * model.config.n_embd]);
    }
    stats.n_prefill += n;
    if (logits_out && n > 0) std::memcpy(logits_out, logits.data(), logits.bytes());
}

void Session::score(const int32_t* tokens, size_t n, float* logits_out, pi_layer_score* scores) {
    check_tokens(tokens, n);
    const Config& c = model.config;
    for (size_t done = 0; done < n; done += BATCH) {
        size_t m = std::min(BATCH, n - done);
        forward_batch(tokens + done, m, true, scores);
        for (size_t t = 0; t < m; t++)
            normalise(model.weights.output_norm, &b_hidden_[t * c.n_embd], &b_x_[t * c.n_embd]);
        gemm(model.weights.output, nullptr, b_x_.data(), m, logits_out + done * c.n_vocab, false);
    }
    has_logits = false;
}

void Session::forward_batch(const int32_t* tokens, size_t n, bool selective, pi_layer_score* scores) {
    const Config& c = model.config;
    for (size_t t = 0; t < n; t++) embed(tokens[t], position + t, &b_hidden_[t * c.n_embd]);
    set_angles(position, n);
    for (size_t il = 0; il < c.n_layer; il++) {
        const Layer& layer = model.weights.layers[il];
        for (size_t t = 0; t < n; t++) normalise(layer.attn_norm, &b_hidden_[t * c.n_embd], &b_x_[t * c.n_embd]);
        attention_batch(layer, il, n);
        for (size_t t = 0; t < n; t++) normalise(layer.ffn_norm, &b_hidden_[t * c.n_embd], &b_x_[t * c.n_embd]);
        ffn_batch(layer, n, selective, scores ? scores + il : nullptr);
    }
    position += n;
}

void Session::attention_batch(const Layer& layer, size_t il, size_t n) {
    const Config& c = model.config;
    gemm(layer.q.rows, layer.q.bias, b_x_.data(), n, b_q_.data(), false);
    gemm(layer.k.rows, layer.k.bias, b_x_.data(), n, b_k_.data(), false);
    gemm(layer.v.rows, layer.v.bias, b_x_.data(), n, b_v_.data(), false);
    for (size_t t = 0; t < n; t++) {
        rotate(&b_q_[t * c.q_dim()], c.n_head, t);
        rotate(&b_k_[t * c.kv_dim()], c.n_head_kv, t);
        store_kv(il, position + t, &b_k_[t * c.kv_dim()], &b_v_[t * c.kv_dim()]);
    }
    pool_.run(n * c.n_head, [&](size_t item, uint32_t thread) {
        size_t t = item / c.n_head, head = item % c.n_head, at = t * c.q_dim() + head * c.head_dim;
        attend(il, static_cast<uint32_t>(head), position + t + 1, &b_q_[at], &b_x_[at], workers_[thread]);
    });
    gemm(layer.o.rows, layer.o.bias, b_x_.data(), n, b_hidden_.data(), true);
}

void Session::ffn_batch(const Layer& layer, size_t n, bool selective, pi_layer_score* score) {
    const Config& c = model.config;
    bool asked = selective && asks(layer);
    if (asked) predict_batch(layer, n);
    gemm(layer.select, layer.select_bias, b_x_.data(), n, b_select_.data(), false);
    if (layer.up.data) gemm(layer.up, layer.up_bias, b_x_.data(), n, b_up_.data(), false);
    for (size_t t = 0; t < n; t++) {
        float* a = &b_select_[t * c.n_ff];
        float* h = a;
        activate(layer, c.n_ff, a);
        if (layer.up.data) {
            h = &b_up_[t * c.n_ff];
            apply_up(c.n_ff, a, h);
        }
        uint64_t n_true = 0, n_predicted = 0, n_hit = 0;
        for (size_t i = 0; i < c.n_ff; i++) {
            bool fires = h[i] != 0;
            bool predicted = asked ? i < layer.always || !(b_asked_[t * c.n_ff + i] < 0) : a[i] != 0;
            n_true += fires;
            n_predicted += predicted;
            n_hit += fires && predicted;
            if (asked && !predicted) h[i] = 0;
        }
        if (!score) continue;
        score->n_tokens++;
        score->n_true += n_true;
        score->n_predicted += n_predicted;
        score->n_hit += n_hit;
    }
    gemm_down(layer, layer.up.data ? b_up_.data() : b_select_.data(), n);
}

// b_asked_[t][i] < 0 where the predictor holds neuron i of token t back
void Session::predict_batch(const Layer& layer, size_t n) {
    const Predictor& p = *layer.predictor;
    gemm(p.in, nullptr, b_x_.data(), n, b_rank_.data(), false);
    if (model.config.predictor_relu)
        for (size_t i = 0; i < n * p.in.n_rows; i++) b_rank_[i] = b_rank_[i] <= 0 ? 0 : b_rank_[i];
    gemm(p.out, p.bias, b_rank_.data(), n, b_up_.data(), false);
    for (size_t t = 0; t < n; t++)
        std::memcpy(&b_asked_[t * model.config.n_ff + layer.always], &b_up_[t * p.out.n_rows],
                    p.out.n_rows * sizeof(float));
}

// out[t] (+)= rows . x[t] + bias;   x: (n, rows.n), out: (n, rows.n_rows)
void Session::gemm(const Rows& rows, const float* bias, const float* x, size_t n, float* out, bool add) {
    size_t n_items = (rows.n_rows + TILE_ROWS - 1) / TILE_ROWS;
    pool_.run(n_items, [&](size_t item, uint32_t thread) {
        Worker& w = workers_[thread];
        size_t begin = item * TILE_ROWS, m = std::min<size_t>(TILE_ROWS, rows.n_rows - begin);
        for (size_t k = 0; k < rows.n; k += PACK_ROWS_K) {
            size_t n_k = std::min<size_t>(PACK_ROWS_K, rows.n - k);
            ops.pack_rows(rows.type, n_k, rows.row(begin) + row_bytes(rows.type, k), rows.stride, m, w.packed.data());
            ops.gemm_tile(n, n_k, x + k, rows.n, w.packed.data(), w.tile.data(), TILE_ROWS, k > 0);
        }
        for (size_t t = 0; t < n; t++) {
            float* to = out + t * rows.n_rows + begin;
            const float* from = &w.tile[t * TILE_ROWS];
            for (size_t j = 0; j < m; j++) to[j] = (add ? to[j] : 0.0f) + (from[j] + (bias ? bias[begin + j] : 0.0f));
        }
    });
}

// hidden[t] += sum over neurons i of h[t][i] * down_i + bias;   h: (n, n_ff)
void Session::gemm_down(const Layer& layer, const float* h, size_t n) {
    const Rows& down = layer.down;
    size_t n_items = (down.n + DOWN_COLUMNS - 1) / DOWN_COLUMNS;
    pool_.run(n_items, [&](size_t item, uint32_t thread) {
        Worker& w = workers_[thread];
        size_t begin = item * DOWN_COLUMNS, m = std::min<size_t>(DOWN_COLUMNS, down.n - begin);
        size_t n_tiles = (m + TILE_ROWS - 1) / TILE_ROWS;
        float row[DOWN_COLUMNS] = {};
        for (size_t k = 0; k < down.n_rows; k += PACK_DOWN_K) {
            size_t n_k = std::min<size_t>(PACK_DOWN_K, down.n_rows - k);
            for (size_t i = 0; i < n_k; i++) {
                ops.dequantize(down.type, begin, m, down.row(k + i), row);
                for (size_t tile = 0; tile < n_tiles; tile++)
                    std::memcpy(&w.packed[(tile * PACK_DOWN_K + i) * TILE_ROWS], row + tile * TILE_ROWS,
                                TILE_ROWS * sizeof(float));
            }
            for (size_t tile = 0; tile < n_tiles; tile++)
                ops.gemm_tile(n, n_k, h + k, down.n_rows, &w.packed[tile * PACK_DOWN_K * TILE_ROWS],
                              &w.tile[tile * TILE_ROWS], DOWN_COLUMNS, k > 0);
        }
        for (size_t t = 0; t < n; t++)
            for (size_t j = 0; j < m; j++)
                b_hidden_[t * down.n + begin + j] +=
                    w.tile[t * DOWN_COLUMNS + j] + (layer.down_bias ? layer.down_bias[begin + j] : 0.0f);
    });
}

}  // namespace pi
