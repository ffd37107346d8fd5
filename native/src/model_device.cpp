// What of a model lies on a device: named, copied there from the file, bound, and left out of the processor's memory.
#include <algorithm>
#include <cstring>

#include "device.h"
#include "model.h"
#include "numbers.h"

namespace pi {

namespace {

constexpr uint64_t ALIGNMENT = 256;  // of each tensor on the device
constexpr uint64_t STAGING_BYTES = 16u << 20;

}  // namespace

void Model::check_division(const pi_card_params& card) const {
    if (config.sub_norms)
        throw Error(
            PI_ERROR_UNSUPPORTED,
            "a model that normalises its neurons' sum (powerinfer.sub_norms): this engine runs it without a card");
    if (card.n_layer != config.n_layer)
        throw Error(PI_ERROR_ARGUMENT, "card: expected " + std::to_string(config.n_layer) + " layers, found " +
                                           std::to_string(card.n_layer));
    std::vector<float> frequency(config.n_ff);
    for (uint32_t i = 0; i < config.n_layer; i++) {
        if (config.experts.n > 0 && card.n_neurons[i] > 0)
            throw Error(PI_ERROR_UNSUPPORTED,
                        "card: expected no neurons of experts, which stay with the processor, found " +
                            std::to_string(card.n_neurons[i]) + " of layer " + std::to_string(i));
        if (card.n_neurons[i] == 0) continue;
        const Tensor& t = *gguf_.find("blk." + std::to_string(i) + ".ffn_frequency.weight");
        read_range(t.offset, t.offset + t.n_bytes, reinterpret_cast<uint8_t*>(frequency.data()));
        std::vector<uint32_t> bounds = chunk_bounds(frequency.data(), config.n_ff, 1.0);
        if (std::ranges::find(bounds, card.n_neurons[i]) == bounds.end())
            throw Error(PI_ERROR_ARGUMENT, "card: expected a bound of layer " + std::to_string(i) +
                                               "'s chunks (pi_chunk_bounds), found " +
                                               std::to_string(card.n_neurons[i]) + " neurons");
    }
}

// Opens the device and copies there what is its own.
void Model::open_device(const pi_card_params& card) {
    check_division(card);
    device = card.device == PI_DEVICE_HOST ? host_device() : cuda_device();
    device_context = device->info().context;
    lend_from = config.experts.n > 0 ? 0 : card.lend_from;  // experts' neurons are not lent
    device_budget = card.budget;
    bool any_block = false;
    for (uint32_t i = 0; i < config.n_layer; i++) {
        if (card.dense[i]) share_block(i);
        if (card.n_neurons[i] > 0) share_neurons(i, card.n_neurons[i]);
        any_block |= card.dense[i] != 0;
    }
    if (card.head) {
        share_norm("output_norm");
        share_linear(config.tied ? "token_embd" : "output");
    }
    if (any_block && config.rotary_dim > 0) share("rope_inv_freq.weight", config.rotary_dim / 2, 1, false, true);
    for (Share& s : shares_) {
        s.device_offset = device_bytes;
        device_bytes +=
            align_up(checked_mul(s.n_rows, device->row_bytes(s.tensor->type, s.n), s.tensor->name), ALIGNMENT);
    }
    device_bytes = align_up(device_bytes, DEVICE_PAGE);
    if (device_budget > 0 && device_context + device_bytes > device_budget)
        throw Error(PI_ERROR_MEMORY, "card: expected at most " + std::to_string(device_budget) + " bytes, found " +
                                         std::to_string(device_context) + " of context and " +
                                         std::to_string(device_bytes) + " of weights");
    std::ranges::sort(shares_, {}, [](const Share& s) { return s.tensor->offset; });
    device_memory_ = device->allocate(device_bytes);
    for (const Share& s : shares_) store(s, device_memory_ + s.device_offset);
}

// The first n_rows rows of n elements. Biases and norms are one row.
void Model::share(const std::string& name, uint64_t n, uint64_t n_rows, bool moved, bool copied) {
    const Tensor* t = gguf_.find(name);
    if (t && n > 0 && n_rows > 0) shares_.push_back({t, n, n_rows, n_rows * row_bytes(t->type, n), 0, moved, copied});
}

void Model::share_norm(const std::string& name) {
    share(name + ".weight", config.n_embd, 1, true);
    share(name + ".bias", config.n_embd, 1, true);
}

void Model::share_linear(const std::string& name) {
    const Tensor& t = *gguf_.find(name + ".weight");
    share(name + ".weight", t.ne[0], t.ne[1], true);
    share(name + ".bias", t.ne[1], 1, true);
}

// Everything of a layer but its neurons and what chooses them.
void Model::share_block(uint32_t i) {
    std::string b = "blk." + std::to_string(i) + ".";
    share_norm(b + "attn_norm");
    for (const char* name : {"attn_q", "attn_k", "attn_v", "attn_output"}) share_linear(b + name);
    share_norm(b + "ffn_norm");
    share(b + "ffn_down.bias", config.n_embd, 1, true);
    if (modes_[i] == 2) share_linear(b + "predictor_in");
}

// The first n neurons of a layer, and what chooses them.
void Model::share_neurons(uint32_t i, uint32_t n) {
    std::string b = "blk." + std::to_string(i) + ".";
    const Tensor& bundles = *gguf_.find(b + "ffn_neurons.weight");
    share(b + "ffn_neurons.weight", config.n_embd, bundles.ne[1] * n, false);
    share(b + "ffn_gate.bias", n, 1, false);
    share(b + "ffn_up.bias", n, 1, false);
    if (modes_[i] == 1) return share(b + "ffn_select.weight", config.n_embd, n, false);
    uint64_t asked = n - std::min(n, always_[i]);
    share(b + "predictor_out.weight", gguf_.find(b + "predictor_out.weight")->ne[0], asked, false);
    share(b + "predictor_out.bias", asked, 1, false);
}

// Through a staging buffer of whole rows.
void Model::store(const Share& s, uint8_t* to) const {
    uint64_t row = row_bytes(s.tensor->type, s.n), stride = device->row_bytes(s.tensor->type, s.n);
    uint64_t together = std::max<uint64_t>(1, STAGING_BYTES / row);
    std::vector<uint8_t> staging(std::min(together, s.n_rows) * row);
    for (uint64_t done = 0; done < s.n_rows; done += together) {
        uint64_t n = std::min(together, s.n_rows - done), begin = s.tensor->offset + done * row;
        read_range(begin, begin + n * row, staging.data());
        device->store(to + done * stride, s.tensor->type, s.n, n, staging.data());
    }
}

Ranges Model::holes() const {
    Ranges found;
    for (const Share& s : shares_)
        if (!s.copied) found.emplace_back(s.tensor->offset, s.tensor->offset + s.file_bytes);
    return found;
}

// Binds the device's side, and tells each side's layers what is theirs.
void Model::divide(const pi_card_params& card) {
    Addresses side{.device = device.get()};
    for (const Share& s : shares_) side.on_device[s.tensor] = device_memory_ + s.device_offset;
    bind(side, on_device);
    for (uint32_t i = 0; i < config.n_layer; i++) {
        Layer &here = weights.layers[i], &there = on_device.layers[i];
        there.chunks = here.chunks;
        there.dense = card.dense[i] != 0;
        there.last = card.n_neurons[i];
        here.dense = !there.dense;
        here.first = there.last;
    }
}

}  // namespace pi
