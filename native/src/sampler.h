// Draws a token from logits: repeat penalty, top-k, top-p, min-p, temperature, in this order (llama.cpp's).
#pragma once

#include <cstdint>
#include <vector>

#include "powerinfer.h"

namespace pi {

class Sampler {
   public:
    explicit Sampler(uint32_t n_vocab) { candidates_.reserve(n_vocab); }
    void seed(uint64_t seed);
    int32_t sample(const float* logits, uint32_t n_vocab, const pi_sampling& how, const int32_t* recent,
                   size_t n_recent);

   private:
    struct Candidate {
        float logit;
        int32_t id;
    };
    void penalise(const pi_sampling& how, const int32_t* recent, size_t n_recent);
    void keep_top_k(uint32_t k);
    void keep_likely(float top_p, float min_p);
    double uniform();  // [0, 1)

    std::vector<Candidate> candidates_;
    std::vector<double> weights_;
    uint64_t state_[4] = {1, 2, 3, 4};
};

}  // namespace pi
