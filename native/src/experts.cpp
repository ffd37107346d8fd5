// Layers whose neurons belong to experts: a router gives a few of these a weight, and only their neurons take part.
#include <array>
#include <cmath>

#include "session.h"

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
void Session::route(const Layer& layer, const float* x) {
    Linear router{layer.router, nullptr};
    project(PREDICTOR, {{&router, routes_.data()}}, {x, {}});
    weigh(model.config.experts, routes_.data());
    stats.bytes_predictor += router.rows.n_rows * router.rows.row_size();
}

// The same for a batch; x: (n, n_embd)
void Session::route_batch(const Layer& layer, const float* x, size_t n) {
    gemm(layer.router, nullptr, x, n, b_routes_.data(), false);
    pool_.run(n, [&](size_t t, uint32_t) { weigh(model.config.experts, &b_routes_[t * model.config.experts.n]); });
}

// Neurons of [lo, hi) that take part, ascending, in w.asked: of the chosen experts, or all of them.
size_t Session::candidates(const Layer& layer, uint32_t lo, uint32_t hi, Worker& w) const {
    size_t n = 0;
    for (uint32_t i = lo; i < hi; i++) {
        w.asked[n] = i;
        n += !layer.expert || routes_[layer.expert[i]] != 0;
    }
    return n;
}

}  // namespace pi
