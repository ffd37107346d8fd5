// Many tokens through the matrix-matrix path: weights are packed tile by tile and met with up to BATCH tokens, those of
// Q4_0 and Q8_0 as 8-bit integers, others as floats. Every token's sums run in an order of their own: the same results
// however a prompt is cut into batches.
#include <cmath>
#include <cstring>

#include "session.h"

namespace pi {

namespace {

constexpr size_t PACK_ROWS_K = PACKED_FLOATS / TILE_ROWS;        // elements of a row packed at a time
constexpr size_t PACK_COLUMNS_K = PACKED_FLOATS / DOWN_COLUMNS;  // elements of a column packed at a time
constexpr size_t PACK8_K = PACKED_BLOCKS * QK;                   // the same in 8 bits

bool in_blocks(const Rows& rows) { return rows.type == Type::Q4_0 || rows.type == Type::Q8_0; }

}  // namespace

void Session::prefill(const int32_t* tokens, size_t n, float* logits_out) {
    check_tokens(tokens, n);
    std::unique_lock<std::mutex> turn = take_turn();
    for (size_t done = 0; done < n; done += BATCH) {
        size_t m = std::min(BATCH, n - done);
        forward_batch(tokens + done, m, false, nullptr);
        if (done + m == n) output_head(&b_hidden_[(m - 1) * model.config.n_embd]);
    }
    if (model.disk) model.disk->fill();  // streaming took some of the cache
    stats.n_prefill += n;
    if (logits_out && n > 0) std::memcpy(logits_out, logits.data(), logits.bytes());
}

void Session::score(const int32_t* tokens, size_t n, float* logits_out, pi_layer_score* scores) {
    check_tokens(tokens, n);
    std::unique_lock<std::mutex> turn = take_turn();
    const Config& c = model.config;
    for (size_t done = 0; done < n; done += BATCH) {
        size_t m = std::min(BATCH, n - done);
        forward_batch(tokens + done, m, true, scores);
        normalise_batch(model.weights.output_norm, b_hidden_.data(), m);
        gemm(model.weights.output, nullptr, b_x_.data(), m, logits_out + done * c.n_vocab, false);
        cap(logits_out + done * c.n_vocab, m * c.n_vocab);
    }
    has_logits = false;
}

void Session::forward_batch(const int32_t* tokens, size_t n, bool selective, pi_layer_score* scores) {
    const Config& c = model.config;
    embed(tokens, n, b_hidden_.data());
    set_angles(position, n);
    for (size_t il = 0; il < c.n_layer; il++) {
        const Layer& layer = model.weights.layers[il];
        if (c.experts.routed_by == RoutedBy::LayerInput) route_batch(layer, b_hidden_.data(), n);
        normalise_batch(layer.attn_norm, b_hidden_.data(), n);
        if (c.parallel) std::copy_n(b_hidden_.data(), n * c.n_embd, b_entry_.data());
        attention_batch(layer, il, n);
        if (model.disk) {
            model.disk->start_stream(il);
            model.disk->end_stream();
        }
        ffn_batch(layer, c.parallel ? b_entry_.data() : b_hidden_.data(), n, selective, scores ? scores + il : nullptr);
        if (model.disk) stream_on(il);
    }
    if (model.disk) collect_disk_counts();
    position += n;
}

// Layer il has been computed: the next one's neurons may come.
void Session::stream_on(size_t il) {
    model.disk->release(il);
    if (il + 1 < model.config.n_layer) model.disk->start_stream(il + 1);
}

// b_x_ = the normalised stream (n, n_embd), in both forms
void Session::normalise_batch(const Norm& norm, const float* stream, size_t n) {
    size_t n_embd = model.config.n_embd;
    pool_.run(n, [&](size_t t, uint32_t) {
        normalise(norm, stream + t * n_embd, &b_x_[t * n_embd]);
        quantise_token(&b_x_[t * n_embd], n_embd, t);
    });
}

// Row t of b_q8_ = x (len)
void Session::quantise_token(const float* x, size_t len, size_t t) {
    BatchX8* out = &b_q8_[t * ceil_div(len, QK)];
    size_t whole = len / QK * QK;
    ops.quantize_batch8(whole, x, out);
    if (whole == len) return;
    float rest[QK] = {};
    std::copy(x + whole, x + len, rest);
    ops.quantize_batch8(QK, rest, out + whole / QK);
}

void Session::quantise_batch(const float* x, size_t n, size_t len) {
    pool_.run(n, [&](size_t t, uint32_t) { quantise_token(x + t * len, len, t); });
}

void Session::attention_batch(const Layer& layer, size_t il, size_t n) {
    const Config& c = model.config;
    gemm(layer.q.rows, layer.q.bias, b_x_.data(), n, b_q_.data(), false);
    gemm(layer.k.rows, layer.k.bias, b_x_.data(), n, b_k_.data(), false);
    gemm(layer.v.rows, layer.v.bias, b_x_.data(), n, b_v_.data(), false);
    pool_.run(n, [&](size_t t, uint32_t) {
        prepare_heads(layer, &b_q_[t * c.q_dim()], c.n_head, t);
        prepare_heads(layer, &b_k_[t * c.kv_dim()], c.n_head_kv, t);
        for (uint32_t head = 0; head < c.n_head_kv; head++) {
            size_t at = t * c.kv_dim() + head * c.head_dim;
            store_kv(il, head, position + t, &b_k_[at], &b_v_[at]);
        }
    });
    pool_.run(ceil_div(n, QUERIES) * c.n_head, [&](size_t item, uint32_t thread) {
        size_t first = item / c.n_head * QUERIES;
        attend_queries(il, static_cast<uint32_t>(item % c.n_head), first, std::min(QUERIES, n - first),
                       workers_[thread]);
    });
    if (c.sub_norms) pool_.run(n, [&](size_t t, uint32_t) { unit_rms(c.q_dim(), &b_x_[t * c.q_dim()]); });
    quantise_batch(b_x_.data(), n, c.q_dim());
    gemm(layer.o.rows, layer.o.bias, b_x_.data(), n, b_hidden_.data(), true);
}

// b_x_ = attention of one head for the batch's tokens [first, first + n)
void Session::attend_queries(size_t il, uint32_t head, size_t first, size_t n, Worker& w) {
    float scale = 1.0f / std::sqrt(static_cast<float>(model.config.head_dim));
    size_t n_all = position + first + n;
    score_queries(il, head, first, n, w);
    for (size_t t = 0; t < n; t++) {
        float* scores = &w.scores[t * ld_scores()];
        size_t n_pos = position + first + t + 1;
        for (size_t p = 0; p < n_pos; p++) scores[p] *= scale;
        ops.softmax(n_pos, scores);
        std::fill(scores + n_pos, scores + n_all, 0.0f);  // what comes later
    }
    mix_queries(il, head, first, n, w);
}

// w.scores[t][p] = q_t . k_p, a tile of positions after the other
void Session::score_queries(size_t il, uint32_t head, size_t first, size_t n, Worker& w) {
    const Config& c = model.config;
    uint32_t kv = head / (c.n_head / c.n_head_kv);
    size_t n_pos = position + first + n, stride = c.head_dim * sizeof(uint16_t);
    const float* q = &b_q_[first * c.q_dim() + head * c.head_dim];
    for (size_t p = 0; p < n_pos; p += TILE_ROWS) {
        size_t m = std::min(TILE_ROWS, n_pos - p);
        for (size_t k = 0; k < c.head_dim; k += PACK_ROWS_K) {
            size_t n_k = std::min<size_t>(PACK_ROWS_K, c.head_dim - k);
            auto keys = reinterpret_cast<const uint8_t*>(key(il, kv, p) + k);
            ops.pack_rows(Type::F16, n_k, keys, stride, m, w.packed.data());
            ops.gemm_tile(n, n_k, q + k, c.q_dim(), w.packed.data(), &w.scores[p], ld_scores(), k > 0);
        }
    }
}

// b_x_[t] = sum over p of w.scores[t][p] * v_p
void Session::mix_queries(size_t il, uint32_t head, size_t first, size_t n, Worker& w) {
    const Config& c = model.config;
    uint32_t kv = head / (c.n_head / c.n_head_kv);
    Rows values;
    values.type = Type::F16;
    values.n = c.head_dim;
    values.n_rows = position + first + n;
    values.stride = c.head_dim * sizeof(uint16_t);
    values.data = reinterpret_cast<const uint8_t*>(value(il, kv, 0));
    for (size_t begin = 0; begin < c.head_dim; begin += DOWN_COLUMNS) {
        size_t m = std::min<size_t>(DOWN_COLUMNS, c.head_dim - begin);
        tile_of_columns(values, begin, m, w.scores.data(), ld_scores(), n, w);
        for (size_t t = 0; t < n; t++)
            std::copy_n(&w.tile[t * DOWN_COLUMNS], m, &b_x_[(first + t) * c.q_dim() + head * c.head_dim + begin]);
    }
}

// hidden[t] += ffn(normalised stream[t]);   stream: (n, n_embd)
void Session::ffn_batch(const Layer& layer, const float* stream, size_t n, bool selective, pi_layer_score* score) {
    bool asked = selective && asks(layer), on_stream = model.config.predictor_on_stream;
    size_t n_embd = model.config.n_embd;
    if (asked && on_stream) {
        quantise_batch(stream, n, n_embd);
        predict_batch(layer, stream, n);
    }
    normalise_batch(layer.ffn_norm, stream, n);
    if (asked && !on_stream) {
        predict_batch(layer, b_x_.data(), n);
        quantise_batch(b_x_.data(), n, n_embd);
    }
    if (model.config.experts.routed_by == RoutedBy::FfnInput) route_batch(layer, b_x_.data(), n);
    for (Worker& w : workers_) w.counted = {};
    if (layer.expert)
        experts_batch(layer, n, selective);
    else
        meet({layer, layer.select, layer.up, layer.down, layer.select_bias, layer.up_bias, layer.down_bias},
             b_x_.data(), n, selective);
    if (!score) return;
    score->n_tokens += n;
    for (const Worker& w : workers_) {
        score->n_true += w.counted.n_true;
        score->n_predicted += w.counted.n_predicted;
        score->n_hit += w.counted.n_hit;
    }
}

// hidden of the group's tokens += what its neurons add;   x: (n, n_embd), b_q8_ its blocks
void Session::meet(const Group& group, const float* x, size_t n, bool selective) {
    gemm(group.select, group.select_bias, x, n, b_select_.data(), false);
    if (group.up.data) gemm(group.up, group.up_bias, x, n, b_up_.data(), false);
    pool_.run(n, [&](size_t k, uint32_t thread) {
        activate_token(group, k, selective ? &workers_[thread].counted : nullptr);
    });
    gemm_down(group, group.up.data ? b_up_.data() : b_select_.data(), n);
}

// What the neurons of the group's token k hand on: 0 where they do not fire, or where the predictor was asked and holds
// them back. score: NULL, or what to count.
void Session::activate_token(const Group& group, size_t k, pi_layer_score* score) {
    const Layer& layer = group.layer;
    size_t n = group.select.n_rows, token = group.token(k);
    float *a = &b_select_[k * n], *h = a;
    activate(layer, n, a);
    float weight = layer.expert ? b_routes_[token * model.config.experts.n + group.expert] : 1;
    for (size_t i = 0; layer.expert && i < n; i++) a[i] *= weight;
    if (group.up.data) {
        h = &b_up_[k * n];
        apply_up(n, a, h);
    }
    if (score) {
        const float* forecast = asks(layer) ? &b_asked_[token * (model.config.n_ff - layer.always)] : nullptr;
        for (size_t i = 0; i < n; i++) {
            size_t neuron = group.neuron(i);
            bool fires = h[i] != 0;
            bool predicted = forecast ? neuron < layer.always || !(forecast[neuron - layer.always] < 0) : a[i] != 0;
            score->n_true += fires;
            score->n_predicted += predicted;
            score->n_hit += fires && predicted;
            if (forecast && !predicted) h[i] = 0;
        }
    }
    if (model.config.sub_norms) unit_rms(n, h);
    if (in_blocks(group.down)) quantise_token(h, n, k);
}

// b_asked_[t][i] < 0 where the predictor holds neuron always + i of token t back; x: (n, n_embd), b_q8_ its blocks,
// which are others in the end
void Session::predict_batch(const Layer& layer, const float* x, size_t n) {
    const Predictor& p = *layer.predictor;
    size_t rank = p.in.n_rows;
    gemm(p.in, nullptr, x, n, b_rank_.data(), false);
    pool_.run(n, [&](size_t t, uint32_t) {
        float* r = &b_rank_[t * rank];
        for (size_t i = 0; model.config.predictor_relu && i < rank; i++) r[i] = r[i] <= 0 ? 0 : r[i];
        quantise_token(r, rank, t);
    });
    gemm(p.out, p.bias, b_rank_.data(), n, b_asked_.data(), false);
}

// out[t] (+)= rows . x[t] + bias;   x: (n, rows.n), b_q8_ its blocks; out: (n, rows.n_rows)
void Session::gemm(const Rows& rows, const float* bias, const float* x, size_t n, float* out, bool add) {
    size_t height = in_blocks(rows) ? TILE8_ROWS : TILE_ROWS;
    pool_.run(ceil_div(rows.n_rows, height), [&](size_t item, uint32_t thread) {
        Worker& w = workers_[thread];
        size_t begin = item * height, m = std::min<size_t>(height, rows.n_rows - begin);
        if (in_blocks(rows))
            tile_of_rows8(rows, begin, m, n, w);
        else
            tile_of_rows(rows, begin, m, x, n, w);
        for (size_t t = 0; t < n; t++) {
            float* to = out + t * rows.n_rows + begin;
            const float* from = &w.tile[t * height];
            for (size_t j = 0; j < m; j++) to[j] = (add ? to[j] : 0.0f) + (from[j] + (bias ? bias[begin + j] : 0.0f));
        }
    });
}

// w.tile[t][j] = row_{begin + j} . x[t], j < m
void Session::tile_of_rows(const Rows& rows, size_t begin, size_t m, const float* x, size_t n, Worker& w) {
    for (size_t k = 0; k < rows.n; k += PACK_ROWS_K) {
        size_t n_k = std::min<size_t>(PACK_ROWS_K, rows.n - k);
        ops.pack_rows(rows.type, n_k, rows.row(begin) + row_bytes(rows.type, k), rows.stride, m, w.packed.data());
        ops.gemm_tile(n, n_k, x + k, rows.n, w.packed.data(), w.tile.data(), TILE_ROWS, k > 0);
    }
}

// The same with x in b_q8_
void Session::tile_of_rows8(const Rows& rows, size_t begin, size_t m, size_t n, Worker& w) {
    for (size_t k = 0; k < rows.n; k += PACK8_K) {
        size_t n_k = std::min<size_t>(PACK8_K, rows.n - k);
        ops.pack_rows8(rows.type, n_k, rows.row(begin) + row_bytes(rows.type, k), rows.stride, m, w.packed8.data());
        ops.gemm8(zero_of_rows(rows.type), n, n_k / QK, &b_q8_[k / QK], rows.n / QK, w.packed8.data(), w.tile.data(),
                  TILE8_ROWS, k > 0);
    }
}

// hidden of token k += sum over the group's neurons i of h[k][i] * down_i + bias;   h: (n, n neurons), b_q8_ its blocks
void Session::gemm_down(const Group& group, const float* h, size_t n) {
    const Rows& down = group.down;
    size_t width = in_blocks(down) ? TILE8_ROWS : DOWN_COLUMNS;
    pool_.run(ceil_div(down.n, width), [&](size_t item, uint32_t thread) {
        Worker& w = workers_[thread];
        size_t begin = item * width, m = std::min<size_t>(width, down.n - begin);
        if (in_blocks(down))
            tile_of_columns8(down, begin, n, w);
        else
            tile_of_columns(down, begin, m, h, down.n_rows, n, w);
        for (size_t k = 0; k < n; k++)
            for (size_t j = 0; j < m; j++)
                b_hidden_[group.token(k) * down.n + begin + j] +=
                    w.tile[k * width + j] + (group.down_bias ? group.down_bias[begin + j] : 0.0f);
    });
}

// w.tile[t][j] = sum over rows i of x[t][i] * row_i[begin + j], j < m
void Session::tile_of_columns(const Rows& rows, size_t begin, size_t m, const float* x, size_t ldx, size_t n,
                              Worker& w) {
    size_t n_tiles = ceil_div(m, TILE_ROWS);
    float row[DOWN_COLUMNS] = {};
    for (size_t k = 0; k < rows.n_rows; k += PACK_COLUMNS_K) {
        size_t n_k = std::min<size_t>(PACK_COLUMNS_K, rows.n_rows - k);
        for (size_t i = 0; i < n_k; i++) {
            ops.dequantize(rows.type, begin, m, rows.row(k + i), row);
            for (size_t tile = 0; tile < n_tiles; tile++)
                std::memcpy(&w.packed[(tile * PACK_COLUMNS_K + i) * TILE_ROWS], row + tile * TILE_ROWS,
                            TILE_ROWS * sizeof(float));
        }
        for (size_t tile = 0; tile < n_tiles; tile++)
            ops.gemm_tile(n, n_k, x + k, ldx, &w.packed[tile * PACK_COLUMNS_K * TILE_ROWS], &w.tile[tile * TILE_ROWS],
                          DOWN_COLUMNS, k > 0);
    }
}

// The same with x in b_q8_, for TILE8_ROWS columns
void Session::tile_of_columns8(const Rows& rows, size_t begin, size_t n, Worker& w) {
    for (size_t k = 0; k < rows.n_rows; k += PACK8_K) {
        size_t n_k = std::min<size_t>(PACK8_K, rows.n_rows - k);
        ops.pack_columns8(rows.type, n_k, rows.row(k) + row_bytes(rows.type, begin), rows.stride, w.packed8.data());
        ops.gemm8(ZERO_OF_COLUMNS, n, ceil_div(n_k, QK), &b_q8_[k / QK], ceil_div(rows.n_rows, QK), w.packed8.data(),
                  w.tile.data(), TILE8_ROWS, k > 0);
    }
}

}  // namespace pi
