// One conversation: what runs tokens through the model and keeps the logits of the last one.
#pragma once

#include "sampler.h"
#include "side.h"

namespace pi {

class Session : public Side {
   public:
    Session(const Model& model, const pi_session_params& params);

    void prefill(const int32_t* tokens, size_t n, float* logits_out);
    void decode(int32_t token, float* logits_out);
    void score(const int32_t* tokens, size_t n, float* logits_out, pi_layer_score* scores);
    void truncate(size_t n);

    size_t position = 0;
    bool has_logits = false;
    Buffer<float> logits;  // (n_vocab,) of the last token
    Sampler sampler;
    uint64_t scratch_bytes() const { return Side::scratch_bytes() + logits.bytes(); }
    uint64_t card_kv_bytes() const { return 0; }
    uint64_t card_scratch_bytes() const { return 0; }

   private:
    void check_tokens(const int32_t* tokens, size_t n) const;
    void run(const Pass& pass, const int32_t* tokens, float* logits_out, pi_layer_score* scores);
};

}  // namespace pi
