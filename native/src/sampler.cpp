#include "sampler.h"

#include <algorithm>
#include <cmath>

#include "gguf.h"

namespace pi {

// xoshiro256**, seeded by splitmix64 (Blackman and Vigna, 2018): the state is explicit, the sequence the same
// everywhere.
void Sampler::seed(uint64_t seed) {
    for (uint64_t& s : state_) {
        uint64_t z = (seed += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        s = z ^ (z >> 31);
    }
}

double Sampler::uniform() {
    auto rotate = [](uint64_t x, int k) { return (x << k) | (x >> (64 - k)); };
    uint64_t result = rotate(state_[1] * 5, 7) * 9, t = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= t;
    state_[3] = rotate(state_[3], 45);
    return static_cast<double>(result >> 11) * 0x1.0p-53;
}

// Positive logits are divided, negative ones multiplied (CTRL, Keskar et al. 2019, section 4.1); each id once.
void Sampler::penalise(const pi_sampling& how, const int32_t* recent, size_t n_recent) {
    if (how.repeat_penalty == 1.0f) return;
    size_t begin = n_recent > how.repeat_last_n ? n_recent - how.repeat_last_n : 0;
    std::vector<int32_t> ids(recent + begin, recent + n_recent);
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    for (int32_t id : ids) {
        float& logit = candidates_[static_cast<size_t>(id)].logit;
        logit = logit > 0 ? logit / how.repeat_penalty : logit * how.repeat_penalty;
    }
}

// Sorts by falling logit, ties by id, and keeps the first k (all for 0).
void Sampler::keep_top_k(uint32_t k) {
    auto better = [](const Candidate& a, const Candidate& b) {
        return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
    };
    size_t n = k == 0 ? candidates_.size() : std::min<size_t>(k, candidates_.size());
    std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(n), candidates_.end(),
                      better);
    candidates_.resize(n);
}

// Keeps the shortest prefix of probability top_p, and what is at least min_p of the best.
void Sampler::keep_likely(float top_p, float min_p) {
    double sum = 0;
    for (const Candidate& c : candidates_) sum += std::exp(static_cast<double>(c.logit) - candidates_[0].logit);
    double before = 0;
    size_t n = 0;
    for (const Candidate& c : candidates_) {
        double p = std::exp(static_cast<double>(c.logit) - candidates_[0].logit);
        if (n > 0 && ((top_p < 1 && before >= top_p * sum) || p < min_p)) break;
        before += p;
        n++;
    }
    candidates_.resize(n);
}

int32_t Sampler::sample(const float* logits, uint32_t n_vocab, const pi_sampling& how, const int32_t* recent,
                        size_t n_recent) {
    candidates_.clear();
    for (uint32_t i = 0; i < n_vocab; i++) {
        if (!std::isfinite(logits[i]))
            throw Error(PI_ERROR_INTERNAL, "a logit is not a finite number: the weights or the input are damaged");
        candidates_.push_back({logits[i], static_cast<int32_t>(i)});
    }
    penalise(how, recent, n_recent);
    keep_top_k(how.temperature <= 0 ? 1 : how.top_k);
    if (how.temperature <= 0) return candidates_[0].id;
    keep_likely(how.top_p, how.min_p);
    weights_.clear();
    double sum = 0;
    for (const Candidate& c : candidates_) {
        sum += std::exp((static_cast<double>(c.logit) - candidates_[0].logit) / how.temperature);
        weights_.push_back(sum);
    }
    double drawn = uniform() * sum;
    size_t at = static_cast<size_t>(std::upper_bound(weights_.begin(), weights_.end(), drawn) - weights_.begin());
    return candidates_[std::min(at, candidates_.size() - 1)].id;
}

}  // namespace pi
