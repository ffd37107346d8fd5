// The model's vocabulary: sizes, weights, and where a neuron's rows lie. Shapes in comments, fastest dimension last.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gguf.h"
#include "ops.h"

namespace pi {

// Ranges of neurons with a partial sum of their own, at most. Fixed: the order of sums must not depend on threads.
constexpr uint32_t MAX_CHUNKS = 24;
constexpr uint32_t MAX_EXPERTS = 512;

enum class NormKind { Rms, Layer };
enum class Activation { Relu, Relu2, FatRelu, DRelu, Silu };

// What the router sees: the stream before attention, or the normalised FFN input.
enum class RoutedBy { Nothing, LayerInput, FfnInput };

// Each neuron belongs to one of n experts, and n_used of these take part; n = 0: there are none.
struct Experts {
    uint32_t n = 0, n_used = 0;
    bool softmax = false;  // over the chosen ones' logits; else their sigmoids, made to sum to 1
    RoutedBy routed_by = RoutedBy::Nothing;
};

struct Config {
    uint32_t n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim, n_vocab, n_ctx;
    uint32_t rotary_dim;  // leading dimensions of a head that rotate; 0: none do
    float norm_eps;
    float rope_scale;  // multiplies cos and sin
    float softcap;     // logits are softcap * tanh(logits / softcap); 0: they stay
    NormKind norm;
    bool learned_positions;  // a row for each is added to the embedding
    bool parallel;           // the FFN reads the layer's input, as attention does
    bool qk_norm;            // each head's query and key are RMS-normalised after rotation
    bool sub_norms;          // attention's heads are, before the output matrix, and the neurons before down
    Activation activation;
    bool gated, tied;
    bool predictor_relu;       // between a predictor's two matrices
    bool predictor_on_stream;  // predictors read what the FFN's norm reads; else what it gives
    Experts experts;
    uint32_t q_dim() const { return n_head * head_dim; }
    uint32_t kv_dim() const { return n_head_kv * head_dim; }
    uint32_t n_rows() const { return gated ? 3 : 2; }  // rows of one neuron
};

// A matrix, or one row of every neuron's bundle: row i has n elements and lies at data + i * stride.
struct Rows {
    Type type = Type::F32;
    uint64_t n = 0, n_rows = 0, stride = 0;
    const uint8_t* data = nullptr;
    const uint8_t* row(uint64_t i) const { return data + i * stride; }
    uint64_t row_size() const { return row_bytes(type, n); }
};

struct Linear {
    Rows rows;                    // (out, in)
    const float* bias = nullptr;  // (out,)
};

struct Norm {
    const float* weight = nullptr;  // (n_embd,)
    const float* bias = nullptr;    // (n_embd,) LayerNorm only
};

struct Predictor {
    Rows in;            // (rank, n_embd)
    Rows out;           // (n_ff - always, rank)
    const float* bias;  // (n_ff - always,), the threshold taken off
};

struct Layer {
    Norm attn_norm, ffn_norm;
    Linear q, k, v, o;
    bool rotates = false;
    // The FFN, neurons in falling order of frequency. `select` decides: the gate row, or the up row of a plain FFN.
    Rows select;                         // (n_ff, n_embd)
    Rows up;                             // (n_ff, n_embd), gated only
    Rows down;                           // (n_ff, n_embd): transposed, a neuron's contribution to the output
    bool apart = false;                  // select is a matrix of its own; else it lies in the bundles
    const float* select_bias = nullptr;  // (n_ff,)
    const float* up_bias = nullptr;      // (n_ff,), gated only
    const float* down_bias = nullptr;    // (n_embd,)
    float threshold = 0;                 // of the activation
    Rows router;                         // (n_experts, n_embd)
    const int32_t* expert = nullptr;     // (n_ff,) each neuron's; NULL: there are none
    uint32_t always = 0;                 // neurons [0, always) are computed unasked
    std::optional<Predictor> predictor;
    std::vector<uint32_t> chunks;  // (n_chunks + 1): bounds of the ranges of neurons that are summed on their own
    // What lies on this side, where there are two (device.h): the dense block, neurons [first, last), whole chunks.
    // Rows of neurons begin with neuron 0 all the same.
    bool dense = true;
    uint32_t first = 0, last = 0;
};

struct Weights {
    Rows token_embd;                       // (n_vocab, n_embd)
    Rows position_embd;                    // (n_ctx, n_embd) learned positions
    const float* rope_inv_freq = nullptr;  // (rotary_dim / 2,)
    Norm output_norm;
    Rows output;  // (n_vocab, n_embd); token_embd where tied
    std::vector<Layer> layers;
};

class Device;
class DiskTier;
using Ranges = std::vector<std::pair<uint64_t, uint64_t>>;  // of a file

// Where the tensors of one side lie: as in the file, from `base` on, or on a device, each where it was put. NULL: the
// tensor is on the other side, or shapes are checked only.
struct Addresses {
    const uint8_t* base = nullptr;
    const Device* device = nullptr;
    std::map<const Tensor*, const uint8_t*> on_device{};
};

// Bounds of a layer's chunks: ranges of about equal expected work, multiples of QK. taking_part: the share of neurons
// whose deciding row is computed.
std::vector<uint32_t> chunk_bounds(const float* frequency, uint32_t n_ff, double taking_part);

class Model {
   public:
    // Reads and checks the header only: what pi_check does.
    explicit Model(const char* path);
    ~Model();
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    // Reads the tensor data into huge pages and binds `weights`. limits: NULL, or which neurons stay on disk; card:
    // NULL, or what lies on a device.
    void load(const pi_disk_params* limits = nullptr, const pi_card_params* card = nullptr);

    Config config{};
    Weights weights;
    uint64_t weight_bytes = 0;
    std::unique_ptr<DiskTier> disk;  // NULL where all is in memory
    // With a card, else NULL, empty and 0.
    std::unique_ptr<Device> device;
    Weights on_device;
    uint64_t device_bytes = 0;                       // of the weights there
    uint64_t device_context = 0;                     // bytes that it takes before anything is stored
    uint64_t device_budget = 0;                      // 0: none
    mutable std::atomic<uint64_t> session_bytes{0};  // there, of open sessions
    uint32_t lend_from = 0;                          // tokens of a batch that is worth lending neurons for; 0: none is

    // (begin, end) of what is not read into the processor's memory, in the file's order.
    Ranges holes() const;

   private:
    void read_config();
    void read_structure();
    void read_rope(const std::string& arch);
    void read_experts();
    void bind(const Addresses& side, Weights& out);
    void bind_layer(uint32_t i, const Addresses& side, Layer& layer);
    void read_all();
    void open_disk(const pi_disk_params& limits, const pi_card_params* card);
    void read_to_arena(uint64_t begin, uint64_t end);
    void read_range(uint64_t begin, uint64_t end, uint8_t* to) const;

    // model_device.cpp. What lies on the device, of one tensor: its first rows, all of them but where neurons are
    // divided. moved: the whole tensor, which the processor has no use for.
    struct Share {
        const Tensor* tensor;
        uint64_t n, n_rows, file_bytes, device_offset;
        bool moved, copied;  // copied: it lies in the processor's memory, too
    };
    void open_device(const pi_card_params& card);
    void check_division(const pi_card_params& card) const;
    void share(const std::string& name, uint64_t n, uint64_t n_rows, bool moved, bool copied = false);
    void share_norm(const std::string& name);
    void share_linear(const std::string& name);
    void share_block(uint32_t i);
    void share_neurons(uint32_t i, uint32_t n);
    void store(const Share& share, uint8_t* to) const;
    void divide(const pi_card_params& card);
    void check_orders(const uint8_t* base) const;
    void check_experts(const uint8_t* base) const;

    const uint8_t* at(const Tensor& t, const Addresses& side) const;
    Rows matrix(const std::string& name, const Addresses& side, uint64_t n, uint64_t n_rows,
                const char* types = "F32, F16, Q8_0 or Q4_0") const;
    const float* vector(const std::string& name, const Addresses& side, uint64_t n, bool required) const;
    Norm norm(const std::string& name, const Addresses& side) const;
    Linear linear(const std::string& name, const Addresses& side, uint64_t n, uint64_t n_rows) const;
    const Tensor& expect(const std::string& name, std::initializer_list<uint64_t> ne, const char* types) const;

    Gguf gguf_;
    int fd_ = -1;
    uint8_t* arena_ = nullptr;
    uint64_t arena_bytes_ = 0;
    std::vector<int> modes_;
    std::vector<uint32_t> always_;
    std::vector<float> thresholds_;
    std::vector<bool> rotary_;
    std::vector<Share> shares_;  // by offset in the file
    uint8_t* device_memory_ = nullptr;
    mutable std::vector<bool> bound_;  // tensors that the model uses; others in the file are an error
};

}  // namespace pi
