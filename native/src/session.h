// One conversation: what runs tokens through the model and keeps the logits of the last one. Where some of the model
// lies on a device, hybrid.cpp says which side does what, and when.
#pragma once

#include "sampler.h"
#include "side.h"

namespace pi {

class Session : public Side {
   public:
    Session(const Model& model, const pi_session_params& params);
    // device: NULL, or what has the rest of the model, there. lend_from: tokens of a batch; 0: nothing is lent
    Session(const Config& config, const Weights& weights, DiskTier* disk, const pi_session_params& params,
            const Weights& there, std::unique_ptr<DeviceSession> device, uint32_t lend_from);
    ~Session();

    void prefill(const int32_t* tokens, size_t n, float* logits_out);
    void decode(int32_t token, float* logits_out);
    void score(const int32_t* tokens, size_t n, float* logits_out, pi_layer_score* scores);
    void truncate(size_t n);

    size_t position = 0;
    bool has_logits = false;
    Buffer<float> logits;  // (n_vocab,) of the last token
    Sampler sampler;
    const pi_stats& read_stats();
    void reset_stats();
    uint64_t scratch_bytes() const { return Side::scratch_bytes() + logits.bytes() + mailbox_bytes(); }
    uint64_t card_kv_bytes() const { return device_ ? device_->kv_bytes() : 0; }
    uint64_t card_scratch_bytes() const { return device_ ? device_->scratch_bytes() : 0; }

   private:
    void check_tokens(const int32_t* tokens, size_t n) const;
    void run(const Pass& pass, const int32_t* tokens, float* logits_out, pi_layer_score* scores);
    void run_here(const int32_t* tokens, float* logits_out, pi_layer_score* scores);

    // hybrid.cpp
    void run_on_both(const int32_t* tokens, float* logits_out, pi_layer_score* scores);
    void begin_on_both(const int32_t* tokens);
    void finish_on_both(float* logits_out);
    void layer_with_block_here(size_t il, pi_layer_score* score);
    void layer_with_block_there(size_t il, pi_layer_score* score);
    void route_by_stream(size_t il);
    void ffn_there(size_t il, bool lent);
    void send_stream();
    void bring_stream();
    void send_ffn_input(size_t il);
    void read_ffn_input(size_t il);
    bool lends(size_t il) const;
    void await(uint64_t ticket);
    void await_all();
    const float* await_sum(uint64_t ticket);
    void settle();
    void crossed(size_t n);
    void count_reads_there();
    void read_stats_there();

    uint64_t mailbox_bytes() const;

    const Model* model_ = nullptr;  // whose device counts this session's bytes
    const Weights& there_;
    std::unique_ptr<DeviceSession> device_;
    uint32_t lend_from_;
    bool away_ = false;                         // whether the stream is on the device
    std::vector<pi_layer_score> scores_there_;  // (n_layer,) of a selective pass
};

}  // namespace pi
