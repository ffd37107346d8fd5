// A second processor with memory of its own, which computes a share of the model: a graphics card (native/cuda), or,
// for tests, a thread with an arena of its own (host_device.cpp).
//
// On it lie what a Card says: the output head, dense blocks (a layer's norms, attention with its KV cache,
// predictor_in and down's bias), and of each layer the first neurons with all that chooses them. A layer's neurons may
// be on both sides, those of experts and their router only on the processor's, and its dense block on either. Both
// sides compute their share of the FFN at the same time:
//
//   dense block on the device                          dense block on the processor
//     device: attention, prepare_ffn, give_ffn_input     processor: attention, FFN input into the inbox
//             ffn, give_sum                               device: take_ffn_input, ffn, give_sum
//     processor: its neurons, from the outbox             processor: its neurons
//                continues the outbox's sum into the inbox           continues the outbox's sum: the merge
//     device: add_inbox: the merge
//
// In parallel blocks the FFN does not wait for attention, which follows it on the side that has it.
//
// Sums are chains in the order of the neurons, the device's first: the same however the neurons are divided. Where one
// side has all of them, nothing crosses.
//
// Commands are carried out in the order given, beside the caller. None fails at once, but begin() where there is no
// room for this pass: errors come out of wait(), of every one from then on, and what is left is dropped.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "model.h"

namespace pi {

// Memory of a card is mapped in pages of so many bytes: what is allocated takes whole ones.
constexpr uint64_t DEVICE_PAGE = 2u << 20;

// Of the processor's memory, through which a session brings the neurons that are lent.
constexpr uint64_t DEVICE_STAGING = 8u << 20;

// One run of tokens through all layers.
struct Pass {
    size_t position;  // of the first token
    size_t n;         // tokens: 1 for decoding, else at most BATCH
    bool decode;      // the sparse path; else the matrix-matrix path
    bool selective;   // batch only: neurons that the mode leaves out add nothing, and selections are counted
};

// What crosses, in memory that both sides see: (n, .) each, for the n tokens of a pass.
struct Mailbox {
    float* x = nullptr;       // (n, n_embd) the residual stream, an FFN input, or a merged sum
    float* rank = nullptr;    // (n, max rank) the predictor's hidden layer, beside an FFN input that is chosen by it
    float* sum = nullptr;     // (n, n_embd) outbox only: what the device's neurons add, without down's bias
    float* logits = nullptr;  // (n, n_vocab) outbox only; n = 1 but in a selective pass
};

// Neurons of a layer on one side, over the tokens that were decoded.
struct NeuronCounts {
    uint64_t computed = 0;  // whose deciding row was
    uint64_t active = 0;    // whose activation is not 0: up was computed
    uint64_t fired = 0;     // whose h is not 0: down was added
    uint64_t asked = 0;     // about which the predictor was
    NeuronCounts& operator+=(const NeuronCounts& other) {
        computed += other.computed;
        active += other.active;
        fired += other.fired;
        asked += other.asked;
        return *this;
    }
};

// One conversation on the device: KV cache of its layers, scratch, the two mailboxes.
class DeviceSession {
   public:
    virtual ~DeviceSession() = default;

    Mailbox inbox, outbox;  // the processor writes the one and reads the other

    // ---- commands
    virtual void begin(const Pass& pass) = 0;
    virtual void enter() = 0;  // stream = inbox.x
    // stream = rows of the output matrix, where that lies here and is the embedding, too; learned positions are not
    // added. The tokens stay there until the next wait().
    virtual void embed(const int32_t* tokens) = 0;
    // stream += attention(norm(stream)). Where blocks are parallel, it comes between ffn and add_sum or add_inbox.
    virtual void attention(size_t il) = 0;
    virtual void prepare_ffn(size_t il) = 0;     // x = norm(stream); rank, if asked
    virtual void give_ffn_input(size_t il) = 0;  // outbox.x, .rank = x, rank
    virtual void take_ffn_input(size_t il) = 0;  // x, rank = inbox.x, .rank
    // The rest of the layer's neurons, as they lie in the processor's memory: this pass's ffn(il) computes them, too.
    // In batches that are not selective. They stay there until the next wait().
    virtual void lend(size_t il, const Layer& home) = 0;
    virtual void ffn(size_t il) = 0;        // sum = what the neurons here add
    virtual void give_sum() = 0;            // outbox.sum = sum
    virtual void add_sum(size_t il) = 0;    // stream += sum + down's bias
    virtual void add_inbox(size_t il) = 0;  // stream += inbox.x + down's bias
    virtual void leave() = 0;               // outbox.x = stream
    virtual void head() = 0;                // outbox.logits = output . norm(stream), of the last token or of all, uncut
    // What the last ffn selected, in a selective batch, is added to *score, which nobody touches until a wait() for the
    // last mark().
    virtual void count(pi_layer_score* score) = 0;

    // ---- in between
    virtual void start() = 0;     // sets the commands given so far going
    virtual uint64_t mark() = 0;  // a ticket for all commands given so far
    // Waits until the ticket's commands are done, and starts them if need be. Throws what went wrong with any.
    virtual void wait(uint64_t ticket) = 0;

    virtual void take_counts(
        std::span<NeuronCounts> layers) = 0;     // added to each; since the last call, when all is done
    virtual uint64_t kv_bytes() const = 0;       // on the device, with what its pages leave empty
    virtual uint64_t scratch_bytes() const = 0;  // likewise, of all else
};

// What the device offers, in bytes of its memory. context: what it takes before anything is stored on it.
struct DeviceInfo {
    std::string name;
    uint64_t total = 0, free = 0, context = 0;
};

class Device {
   public:
    virtual ~Device() = default;
    virtual DeviceInfo info() = 0;

    // ---- weights, which lie there as `Rows` with a stride of their own
    virtual uint64_t row_bytes(Type type, uint64_t n) const = 0;  // that a row of n elements takes there
    virtual uint8_t* allocate(uint64_t n_bytes) = 0;              // once; throws where there is no room
    // Copies rows, which lie row_bytes(type, n) of gguf.h apart, to `to` (an address there), row after row.
    virtual void store(uint8_t* to, Type type, uint64_t n, uint64_t n_rows, const uint8_t* rows) = 0;

    // weights: of addresses there; NULL or no rows where something is not. lent: the most neurons that are lent, 0:
    // none. room: bytes that the session may take there; a card's takes none where it needs more
    virtual std::unique_ptr<DeviceSession> open(const Config& config, const Weights& weights,
                                                const pi_session_params& params, uint32_t lent, uint64_t room) = 0;

    // ---- measurements, each the median of several
    virtual double read_rate(uint64_t buffer_bytes, uint64_t row_bytes, uint32_t stride_rows) = 0;  // bytes per second
    virtual double copy_rate() = 0;                // bytes per second, from the processor's memory to there
    virtual double launch_seconds() = 0;           // of one small step behind another
    virtual double merge_seconds(uint64_t n) = 0;  // n floats there, one step, n floats back and seen
};

// The host device: for tests. fails_at: which command of a session fails, from 1 on; 0: none does
std::unique_ptr<Device> host_device(uint64_t fails_at = 0);
// The card, through the library that holds the CUDA part, which lies beside this one; throws where there is none.
std::unique_ptr<Device> cuda_device();

}  // namespace pi
