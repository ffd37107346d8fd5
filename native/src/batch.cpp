// Many tokens through the matrix-matrix path: weights are packed tile by tile and met with up to BATCH tokens, those of
// Q4_0 and Q8_0 as 8-bit integers, others as floats. Every token's sums run in an order of their own: the same results
// however a prompt is cut into batches.
#include <cmath>
#include <cstring>

#include "side.h"

namespace pi {

namespace {

constexpr size_t PACK_ROWS_K = PACKED_FLOATS / TILE_ROWS;        // elements of a row packed at a time
constexpr size_t PACK_COLUMNS_K = PACKED_FLOATS / DOWN_COLUMNS;  // elements of a column packed at a time
constexpr size_t PACK8_K = PACKED_BLOCKS * QK;                   // the same in 8 bits

bool in_blocks(const Rows& rows) { return rows.type == Type::Q4_0 || rows.type == Type::Q8_0; }

Rows part(Rows rows, uint32_t begin, uint32_t end) {
    rows.n_rows = end - begin;
    if (rows.data) rows.data = rows.row(begin);
    return rows;
}

// The first neuron here that the predictor is asked about.
uint32_t first_asked(const Layer& layer) { return std::clamp(layer.always, layer.first, layer.last); }

}  // namespace

// Layer il's neurons come to where they lie in memory.
void Side::bring_neurons(size_t il) {
    if (!disk) return;
    disk->start_stream(il);
    disk->end_stream();
}

// Layer il has been computed: the next one's neurons may come.
void Side::release_neurons(size_t il) {
    if (!disk) return;
    disk->release(il);
    if (il + 1 < config.n_layer) disk->start_stream(il + 1);
}

// b_x_ = the normalised stream (n, n_embd), in both forms
void Side::normalise_batch(const Norm& norm, const float* stream) {
    size_t n_embd = config.n_embd;
    pool_.run(pass_.n, [&](size_t t, uint32_t) {
        normalise(norm, stream + t * n_embd, &b_x_[t * n_embd]);
        quantise_token(&b_x_[t * n_embd], n_embd, t);
    });
}

// Row t of b_q8_ = x (len)
void Side::quantise_token(const float* x, size_t len, size_t t) {
    BatchX8* out = &b_q8_[t * ceil_div(len, QK)];
    size_t whole = len / QK * QK;
    ops.quantize_batch8(whole, x, out);
    if (whole == len) return;
    float rest[QK] = {};
    std::copy(x + whole, x + len, rest);
    ops.quantize_batch8(QK, rest, out + whole / QK);
}

void Side::quantise_batch(const float* x, size_t n, size_t len) {
    pool_.run(n, [&](size_t t, uint32_t) { quantise_token(x + t * len, len, t); });
}

// hidden[t] += o . attention(norm(hidden[t]))
void Side::attention_batch(size_t il) {
    const Config& c = config;
    const Layer& layer = weights.layers[il];
    size_t n = pass_.n;
    if (routes(layer, RoutedBy::LayerInput)) route_batch(layer, b_hidden_.data(), n);
    normalise_batch(layer.attn_norm, b_hidden_.data());
    gemm(layer.q.rows, layer.q.bias, b_x_.data(), n, b_q_.data(), false);
    gemm(layer.k.rows, layer.k.bias, b_x_.data(), n, b_k_.data(), false);
    gemm(layer.v.rows, layer.v.bias, b_x_.data(), n, b_v_.data(), false);
    pool_.run(n, [&](size_t t, uint32_t) {
        prepare_heads(layer, &b_q_[t * c.q_dim()], c.n_head, t);
        prepare_heads(layer, &b_k_[t * c.kv_dim()], c.n_head_kv, t);
        for (uint32_t head = 0; head < c.n_head_kv; head++) {
            size_t at = t * c.kv_dim() + head * c.head_dim;
            store_kv(il, head, pass_.position + t, &b_k_[at], &b_v_[at]);
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
void Side::attend_queries(size_t il, uint32_t head, size_t first, size_t n, Worker& w) {
    float scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim));
    size_t n_all = pass_.position + first + n;
    score_queries(il, head, first, n, w);
    for (size_t t = 0; t < n; t++) {
        float* scores = &w.scores[t * ld_scores()];
        size_t n_pos = pass_.position + first + t + 1;
        for (size_t p = 0; p < n_pos; p++) scores[p] *= scale;
        ops.softmax(n_pos, scores);
        std::fill(scores + n_pos, scores + n_all, 0.0f);  // what comes later
    }
    mix_queries(il, head, first, n, w);
}

// w.scores[t][p] = q_t . k_p, a tile of positions after the other
void Side::score_queries(size_t il, uint32_t head, size_t first, size_t n, Worker& w) {
    const Config& c = config;
    uint32_t kv = head / (c.n_head / c.n_head_kv);
    size_t n_pos = pass_.position + first + n, stride = c.head_dim * sizeof(uint16_t);
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
void Side::mix_queries(size_t il, uint32_t head, size_t first, size_t n, Worker& w) {
    const Config& c = config;
    uint32_t kv = head / (c.n_head / c.n_head_kv);
    Rows values;
    values.type = Type::F16;
    values.n = c.head_dim;
    values.n_rows = pass_.position + first + n;
    values.stride = c.head_dim * sizeof(uint16_t);
    values.data = reinterpret_cast<const uint8_t*>(value(il, kv, 0));
    for (size_t begin = 0; begin < c.head_dim; begin += DOWN_COLUMNS) {
        size_t m = std::min<size_t>(DOWN_COLUMNS, c.head_dim - begin);
        std::fill_n(w.tile.data(), n * DOWN_COLUMNS, 0.0f);
        tile_of_columns(values, begin, m, w.scores.data(), ld_scores(), n, w);
        for (size_t t = 0; t < n; t++)
            std::copy_n(&w.tile[t * DOWN_COLUMNS], m, &b_x_[(first + t) * c.q_dim() + head * c.head_dim + begin]);
    }
}

// stream: (n, n_embd)
void Side::prepare_batch(const Layer& layer, const float* stream) {
    bool on_stream = config.predictor_on_stream;
    if (asks_now(layer) && on_stream) {
        quantise_batch(stream, pass_.n, config.n_embd);
        predictor_rank_batch(*layer.predictor, stream);
    }
    normalise_batch(layer.ffn_norm, stream);
    if (asks_now(layer) && !on_stream) predictor_rank_batch(*layer.predictor, b_x_.data());
    if (routes(layer, RoutedBy::FfnInput)) route_batch(layer, b_x_.data(), pass_.n);
}

void Side::take_batch(const Layer& layer, const float* x, const float* rank) {
    std::copy_n(x, pass_.n * config.n_embd, b_x_.data());
    quantise_batch(b_x_.data(), pass_.n, config.n_embd);
    if (asks_now(layer)) std::copy_n(rank, pass_.n * layer.predictor->out.n, b_rank_.data());
}

// What the layer's neurons here hand on; with experts b_sum_, what they add.
void Side::ffn_batch(const Layer& layer) {
    if (asks_now(layer)) {
        predict_batch(layer);
        quantise_batch(b_x_.data(), pass_.n, config.n_embd);
    }
    for (Worker& w : workers_) w.counted = {};
    if (layer.expert)
        experts_batch(layer);
    else
        fire(own_group(layer), b_x_.data(), pass_.n);
}

Group Side::own_group(const Layer& layer) const {
    auto rows = [&](const Rows& all) { return part(all, layer.first, layer.last); };
    auto bias = [&](const float* all) { return all ? all + layer.first : nullptr; };
    return {layer,
            rows(layer.select),
            rows(layer.up),
            rows(layer.down),
            bias(layer.select_bias),
            bias(layer.up_bias),
            layer.down_bias,
            layer.first};
}

// b_up_ or b_select_ = what the group's neurons hand on;   x: (n, n_embd), b_q8_ its blocks
void Side::fire(const Group& group, const float* x, size_t n) {
    gemm(group.select, group.select_bias, x, n, b_select_.data(), false);
    if (group.up.data) gemm(group.up, group.up_bias, x, n, b_up_.data(), false);
    pool_.run(n, [&](size_t k, uint32_t thread) {
        activate_token(group, k, pass_.selective ? &workers_[thread].counted : nullptr);
    });
}

// What the neurons of the group's token k hand on: 0 where they do not fire, or where the predictor was asked and holds
// them back. score: NULL, or what to count.
void Side::activate_token(const Group& group, size_t k, pi_layer_score* score) {
    const Layer& layer = group.layer;
    size_t n = group.select.n_rows, token = group.token(k);
    float *a = &b_select_[k * n], *h = a;
    activate(layer, n, a);
    float weight = layer.expert ? b_routes_[token * config.experts.n + group.expert] : 1;
    for (size_t i = 0; layer.expert && i < n; i++) a[i] *= weight;
    if (group.up.data) {
        h = &b_up_[k * n];
        apply_up(n, a, h);
    }
    if (score) {
        uint32_t asked = first_asked(layer);
        const float* forecast = asks(layer) ? &b_asked_[token * (layer.last - asked)] : nullptr;
        for (size_t i = 0; i < n; i++) {
            size_t neuron = group.neuron(i);
            bool fires = h[i] != 0;
            bool predicted = forecast ? neuron < asked || !(forecast[neuron - asked] < 0) : a[i] != 0;
            score->n_true += fires;
            score->n_predicted += predicted;
            score->n_hit += fires && predicted;
            if (forecast && !predicted) h[i] = 0;
        }
    }
    if (config.sub_norms) unit_rms(n, h);
}

// b_rank_ = the predictor's hidden layer;   x: (n, n_embd), b_q8_ its blocks
void Side::predictor_rank_batch(const Predictor& predictor, const float* x) {
    size_t rank = predictor.in.n_rows;
    gemm(predictor.in, nullptr, x, pass_.n, b_rank_.data(), false);
    pool_.run(pass_.n, [&](size_t t, uint32_t) {
        float* r = &b_rank_[t * rank];
        for (size_t i = 0; config.predictor_relu && i < rank; i++) r[i] = r[i] <= 0 ? 0 : r[i];
    });
}

// b_asked_[t][i] < 0 where the predictor holds back neuron first_asked + i of token t; b_q8_ is another then
void Side::predict_batch(const Layer& layer) {
    if (layer.last <= layer.always) return;  // nobody here is asked about
    const Predictor& p = *layer.predictor;
    uint32_t begin = first_asked(layer) - layer.always, end = layer.last - layer.always;
    quantise_batch(b_rank_.data(), pass_.n, p.out.n);
    gemm(part(p.out, begin, end), p.bias + begin, b_rank_.data(), pass_.n, b_asked_.data(), false);
}

// out[t] (+)= rows . x[t] + bias;   x: (n, rows.n), b_q8_ its blocks; out: (n, rows.n_rows)
void Side::gemm(const Rows& rows, const float* bias, const float* x, size_t n, float* out, bool add) {
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
void Side::tile_of_rows(const Rows& rows, size_t begin, size_t m, const float* x, size_t n, Worker& w) {
    for (size_t k = 0; k < rows.n; k += PACK_ROWS_K) {
        size_t n_k = std::min<size_t>(PACK_ROWS_K, rows.n - k);
        ops.pack_rows(rows.type, n_k, rows.row(begin) + row_bytes(rows.type, k), rows.stride, m, w.packed.data());
        ops.gemm_tile(n, n_k, x + k, rows.n, w.packed.data(), w.tile.data(), TILE_ROWS, k > 0);
    }
}

// The same with x in b_q8_
void Side::tile_of_rows8(const Rows& rows, size_t begin, size_t m, size_t n, Worker& w) {
    for (size_t k = 0; k < rows.n; k += PACK8_K) {
        size_t n_k = std::min<size_t>(PACK8_K, rows.n - k);
        ops.pack_rows8(rows.type, n_k, rows.row(begin) + row_bytes(rows.type, k), rows.stride, m, w.packed8.data());
        ops.gemm8(zero_of_rows(rows.type), n, n_k / QK, &b_q8_[k / QK], rows.n / QK, w.packed8.data(), w.tile.data(),
                  TILE8_ROWS, k > 0);
    }
}

// The sum over the group's neurons i of h[k][i] * down_i for each token k;   h as `fire` left it
void Side::gemm_down(const Group& group, size_t n, const Chain& chain) {
    const Rows& down = group.down;
    const float *h = group.up.data ? b_up_.data() : b_select_.data(), *bias = group.down_bias;
    size_t width = in_blocks(down) ? TILE8_ROWS : DOWN_COLUMNS;
    if (in_blocks(down)) quantise_batch(h, n, down.n_rows);
    pool_.run(ceil_div(down.n, width), [&](size_t item, uint32_t thread) {
        Worker& w = workers_[thread];
        size_t begin = item * width, m = std::min<size_t>(width, down.n - begin);
        for (size_t k = 0; k < n; k++) {
            std::fill_n(&w.tile[k * width], width, 0.0f);
            if (chain.before) std::copy_n(&chain.before[group.token(k) * down.n + begin], m, &w.tile[k * width]);
        }
        if (in_blocks(down))
            tile_of_columns8(down, begin, n, w);
        else
            tile_of_columns(down, begin, m, h, down.n_rows, n, w);
        for (size_t k = 0; k < n; k++) {
            const float* sum = &w.tile[k * width];
            float* out = (chain.out ? chain.out : b_hidden_.data()) + group.token(k) * down.n + begin;
            for (size_t j = 0; j < m; j++)
                out[j] = chain.out ? sum[j] : out[j] + (sum[j] + (bias ? bias[begin + j] : 0.0f));
        }
    });
}

// += what another side's neurons add, in batches; their rows lie here for now
void Side::add_lent(const Layer& layer, float* sum) {
    quantise_batch(b_x_.data(), pass_.n, config.n_embd);
    ffn_batch(layer);
    gemm_down(own_group(layer), pass_.n, {sum, sum});
}

// w.tile[t][j] += sum over rows i of x[t][i] * row_i[begin + j], j < m
void Side::tile_of_columns(const Rows& rows, size_t begin, size_t m, const float* x, size_t ldx, size_t n, Worker& w) {
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
                          DOWN_COLUMNS, true);
    }
}

// The same with x in b_q8_, for TILE8_ROWS columns
void Side::tile_of_columns8(const Rows& rows, size_t begin, size_t n, Worker& w) {
    for (size_t k = 0; k < rows.n_rows; k += PACK8_K) {
        size_t n_k = std::min<size_t>(PACK8_K, rows.n_rows - k);
        ops.pack_columns8(rows.type, n_k, rows.row(k) + row_bytes(rows.type, begin), rows.stride, w.packed8.data());
        ops.gemm8(ZERO_OF_COLUMNS, n, ceil_div(n_k, QK), &b_q8_[k / QK], ceil_div(rows.n_rows, QK), w.packed8.data(),
                  w.tile.data(), TILE8_ROWS, true);
    }
}

void Side::head_batch(float* logits) {
    normalise_batch(weights.output_norm, b_hidden_.data());
    gemm(weights.output, nullptr, b_x_.data(), pass_.n, logits, false);
}

}  // namespace pi
