// Layers whose neurons belong to experts: a router gives a few of these a weight, and only their neurons take part.
#include <array>
#include <cmath>
#include <cstring>

#include "side.h"

namespace pi {

namespace {

// routes (n,): the router's logits in, each expert's weight out, 0 for those not chosen. Of equal ones the lower is.
void weigh(const Experts& experts, float* routes) {
    std::array<float, MAX_EXPERTS> weights{};
    std::array<bool, MAX_EXPERTS> chosen{};
    float largest = 0, sum = 0;
    for (uint32_t k = 0; k < experts.n_used; k++) {
        uint32_t best = experts.n;
        for (uint32_t e = 0; e < experts.n; e++)
            if (!chosen[e] && (best == experts.n || routes[e] > routes[best])) best = e;
        if (k == 0) largest = routes[best];
        chosen[best] = true;
        weights[best] = experts.softmax ? std::exp(routes[best] - largest) : 1 / (1 + std::exp(-routes[best]));
        sum += weights[best];
    }
    for (uint32_t e = 0; e < experts.n; e++) routes[e] = weights[e] / sum;
}

}  // namespace

// routes_ = the experts' weights for one token; x: what the router sees
void Side::route(const Layer& layer, const float* x) {
    Linear router{layer.router, nullptr};
    project(PREDICTOR, {{&router, routes_.data()}}, {x, {}});
    weigh(config.experts, routes_.data());
    stats.bytes_predictor += router.rows.n_rows * router.rows.row_size();
}

// The same for a batch; x: (n, n_embd)
void Side::route_batch(const Layer& layer, const float* x, size_t n) {
    gemm(layer.router, nullptr, x, n, b_routes_.data(), false);
    pool_.run(n, [&](size_t t, uint32_t) { weigh(config.experts, &b_routes_[t * config.experts.n]); });
}

// Neurons of [lo, hi) that take part, ascending, in w.asked: of the chosen experts, or all of them.
size_t Side::candidates(const Layer& layer, uint32_t lo, uint32_t hi, Worker& w) const {
    size_t n = 0;
    for (uint32_t i = lo; i < hi; i++) {
        w.asked[n] = i;
        n += !layer.expert || routes_[layer.expert[i]] != 0;
    }
    return n;
}

// What ffn_batch does, a piece of an expert after the other: its rows are brought together, and meet the tokens that
// chose it.
void Side::experts_batch(const Layer& layer) {
    const Config& c = config;
    size_t each = c.n_ff / c.experts.n, n = pass_.n;
    sort_members(layer);
    std::fill_n(b_sum_.data(), n * c.n_embd, 0.0f);
    for (uint32_t e = 0; e < c.experts.n; e++) {
        size_t n_takers = gather_tokens(e, n);
        for (size_t begin = 0; n_takers > 0 && begin < each; begin += PIECE) {
            const uint32_t* ids = &members_[e * each + begin];
            size_t m = std::min(PIECE, each - begin);
            Rows select = gather(layer.select, 0, ids, m), up = gather(layer.up, 1, ids, m);
            Group group{layer,
                        select,
                        up,
                        gather(layer.down, 2, ids, m),
                        gather(layer.select_bias, 0, ids, m),
                        gather(layer.up_bias, 1, ids, m),
                        nullptr,
                        0,
                        e,
                        ids,
                        takers_.data()};
            quantise_batch(b_taken_.data(), n_takers, c.n_embd);
            fire(group, b_taken_.data(), n_takers);
            gemm_down(group, n_takers, {b_sum_.data(), b_sum_.data()});
        }
    }
}

// What `sum` does; all neurons are on this side.
void Side::sum_experts(size_t il, const Chain& chain) {
    if (!chain.out) return add_sum(il, b_sum_.data());
    std::copy_n(b_sum_.data(), pass_.n * config.n_embd, chain.out);
}

// members_ = the layer's neurons, those of expert 0 first
void Side::sort_members(const Layer& layer) {
    const Config& c = config;
    std::array<uint32_t, MAX_EXPERTS> next;
    for (uint32_t e = 0; e < c.experts.n; e++) next[e] = e * (c.n_ff / c.experts.n);
    for (uint32_t i = 0; i < c.n_ff; i++) members_[next[layer.expert[i]]++] = i;
}

// takers_ = the tokens that chose an expert, b_taken_ their inputs; how many these are
size_t Side::gather_tokens(uint32_t expert, size_t n) {
    size_t n_takers = 0, n_embd = config.n_embd;
    for (size_t t = 0; t < n; t++) {
        if (b_routes_[t * config.experts.n + expert] == 0) continue;
        takers_[n_takers] = static_cast<uint32_t>(t);
        std::copy_n(&b_x_[t * n_embd], n_embd, &b_taken_[n_takers++ * n_embd]);
    }
    return n_takers;
}

// These rows, one after the other; nothing where there are none.
Rows Side::gather(const Rows& rows, size_t part, const uint32_t* ids, size_t n) {
    if (!rows.data) return rows;
    uint64_t size = rows.row_size();
    uint8_t* to = &piece_rows_[part * PIECE * rows.n * sizeof(float)];
    pool_.run(n, [&](size_t i, uint32_t) { std::memcpy(to + i * size, rows.row(ids[i]), size); });
    return {rows.type, rows.n, n, size, to};
}

const float* Side::gather(const float* bias, size_t part, const uint32_t* ids, size_t n) {
    if (!bias) return nullptr;
    float* to = &piece_bias_[part * PIECE];
    for (size_t i = 0; i < n; i++) to[i] = bias[ids[i]];
    return to;
}

}  // namespace pi
