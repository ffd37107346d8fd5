// Binds an artifact's tensors by name, type and shape (powerinfer_tools/artifact/layout.py is the table of them).
#include "model.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "device.h"
#include "disk.h"
#include "huge_pages.h"

namespace pi {

namespace {

constexpr uint64_t MAX_SIZE = 1u << 24;  // any size of the model
constexpr uint32_t VERSION = 2;
constexpr const char* INV_FREQ = "rope_inv_freq.weight";

uint32_t size_of(const Gguf& gguf, const std::string& key, uint64_t limit = MAX_SIZE) {
    uint64_t value = gguf.u(key);
    if (value < 1 || value > limit)
        throw Error(PI_ERROR_MALFORMED,
                    key + ": expected 1 to " + std::to_string(limit) + ", found " + std::to_string(value));
    return static_cast<uint32_t>(value);
}

float positive(const Gguf& gguf, const std::string& key) {
    double value = gguf.f(key);
    if (!(value > 0 && std::isfinite(value)))
        throw Error(PI_ERROR_MALFORMED, key + ": expected a finite number above 0, found " + std::to_string(value));
    return static_cast<float>(value);
}

float not_negative(const Gguf& gguf, const std::string& key) {
    double value = gguf.f(key);
    if (!(value >= 0 && std::isfinite(value)))
        throw Error(PI_ERROR_MALFORMED,
                    key + ": expected a finite number of at least 0, found " + std::to_string(value));
    return static_cast<float>(value);
}

// The model's family: it names keys and decides nothing.
std::string family_of(const Gguf& gguf) {
    auto arch = std::string(gguf.s("general.architecture"));
    bool known = arch.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_.-") == std::string::npos;
    if (arch.empty() || arch.size() > 64 || !known)
        throw Error(PI_ERROR_MALFORMED, "general.architecture: expected a short name in lower case, found another");
    return arch;
}

void check_version(const Gguf& gguf) {
    uint32_t version = size_of(gguf, "powerinfer.version", UINT32_MAX);
    if (version == VERSION) return;
    throw Error(PI_ERROR_UNSUPPORTED, "powerinfer.version: this engine reads " + std::to_string(VERSION) + ", found " +
                                          std::to_string(version) + (version < VERSION ? ": build it again" : ""));
}

const std::vector<double>& per_layer(const Gguf& gguf, const std::string& key, uint32_t n_layer) {
    const auto& values = gguf.numbers(key);
    if (values.size() != n_layer)
        throw Error(PI_ERROR_MISMATCH,
                    key + ": expected " + std::to_string(n_layer) + " values, found " + std::to_string(values.size()));
    return values;
}

// Whether the key says the first of two.
bool one_of(const Gguf& gguf, const std::string& key, const char* first, const char* second) {
    std::string_view found = gguf.s(key);
    if (found != first && found != second)
        throw Error(PI_ERROR_UNSUPPORTED,
                    key + ": expected " + first + " or " + second + ", found " + std::string(found));
    return found == first;
}

Activation parse_activation(std::string_view name) {
    if (name == "relu") return Activation::Relu;
    if (name == "relu2") return Activation::Relu2;
    if (name == "fatrelu") return Activation::FatRelu;
    if (name == "drelu") return Activation::DRelu;
    if (name == "silu") return Activation::Silu;
    throw Error(PI_ERROR_UNSUPPORTED,
                "powerinfer.activation: expected relu, relu2, fatrelu, drelu or silu, found " + std::string(name));
}

constexpr uintptr_t PAGE = 4096;

uint8_t* page_down(uint8_t* p) { return p - reinterpret_cast<uintptr_t>(p) % PAGE; }
uint8_t* page_up(uint8_t* p) { return page_down(p + PAGE - 1); }

// Whole pages that nobody may read: what they would hold lies on a device.
void forbid(const uint8_t* begin, const uint8_t* end) {
    uint8_t *first = page_up(const_cast<uint8_t*>(begin)), *last = page_down(const_cast<uint8_t*>(end));
    if (first < last) mprotect(first, static_cast<size_t>(last - first), PROT_NONE);
}

// Of the same, what shares a page with something else: whoever reads it finds no number.
void spoil_edges(uint8_t* begin, uint8_t* end) {
    uint8_t *first = std::min(page_up(begin), end), *last = std::max(page_down(end), first);
    std::fill(begin, first, uint8_t{0xff});
    std::fill(last, end, uint8_t{0xff});
}

std::string shape_text(const Tensor& t) {
    std::string text = "[";
    for (uint32_t i = 0; i < t.n_dims; i++) text += (i ? ", " : "") + std::to_string(t.ne[i]);
    return text + "]";
}

}  // namespace

std::vector<uint32_t> chunk_bounds(const float* frequency, uint32_t n_ff, double taking_part) {
    uint32_t n = std::min(MAX_CHUNKS, n_ff);
    std::vector<double> work(n_ff + 1, 0.0);  // one for the deciding row, more where the neuron fires
    for (uint32_t i = 0; i < n_ff; i++) {
        double share = frequency[i] >= 0 && frequency[i] <= 1 ? frequency[i] : 1.0;
        work[i + 1] = work[i] + taking_part + 4.0 * share;
    }
    std::vector<uint32_t> bounds(n + 1, 0);
    for (uint32_t c = 1; c < n; c++) {
        auto at = std::lower_bound(work.begin(), work.end(), work[n_ff] * c / n) - work.begin();
        auto whole = static_cast<uint32_t>((at + QK / 2) / QK * QK);
        bounds[c] = std::clamp<uint32_t>(whole, bounds[c - 1], n_ff);
    }
    bounds[n] = n_ff;
    return bounds;
}

Model::Model(const char* path) {
    gguf_ = read_gguf_file(path, &fd_);
    try {
        read_config();
        bind({}, weights);
    } catch (...) {
        close(fd_);
        throw;
    }
}

Model::~Model() {
    if (fd_ >= 0) close(fd_);
    if (arena_) munmap(arena_, arena_bytes_);
}

void Model::read_config() {
    std::string arch = family_of(gguf_);
    check_version(gguf_);
    Config& c = config;
    c.n_layer = size_of(gguf_, arch + ".block_count", 4096);
    c.n_embd = size_of(gguf_, arch + ".embedding_length");
    c.n_ff = size_of(gguf_, arch + ".feed_forward_length");
    c.n_head = size_of(gguf_, arch + ".attention.head_count", 65536);
    c.n_head_kv = size_of(gguf_, arch + ".attention.head_count_kv", 65536);
    c.head_dim = size_of(gguf_, arch + ".attention.key_length", 65536);
    c.n_vocab = size_of(gguf_, arch + ".vocab_size");
    c.n_ctx = size_of(gguf_, arch + ".context_length", 1u << 26);
    if (c.n_head % c.n_head_kv != 0)
        throw Error(PI_ERROR_MALFORMED, arch + ".attention.head_count_kv: " + std::to_string(c.n_head_kv) +
                                            " does not divide head_count " + std::to_string(c.n_head));
    read_structure();
    c.norm_eps = positive(gguf_, arch + (c.norm == NormKind::Rms ? ".attention.layer_norm_rms_epsilon"
                                                                 : ".attention.layer_norm_epsilon"));
    c.activation = parse_activation(gguf_.s("powerinfer.activation"));
    c.gated = gguf_.b("powerinfer.gated");
    c.tied = gguf_.b("powerinfer.tied");
    c.predictor_relu = gguf_.b("powerinfer.predictor_relu");
    c.predictor_on_stream = one_of(gguf_, "powerinfer.predictor_input", "stream", "ffn_input");
    if (gguf_.has("powerinfer.experts.n")) read_experts();
    if (c.activation == Activation::DRelu && !c.gated)
        throw Error(PI_ERROR_MALFORMED, "powerinfer.activation: drelu needs a gated FFN");
    read_rope(arch);
    for (double mode : per_layer(gguf_, "powerinfer.ffn_mode", c.n_layer)) {
        if (mode != 1 && mode != 2)
            throw Error(PI_ERROR_MALFORMED, "powerinfer.ffn_mode: expected 1 or 2, found " + std::to_string(mode));
        modes_.push_back(static_cast<int>(mode));
    }
    for (double always : per_layer(gguf_, "powerinfer.always", c.n_layer)) {
        if (!(always >= 0 && always < c.n_ff))
            throw Error(PI_ERROR_MALFORMED, "powerinfer.always: expected 0 to " + std::to_string(c.n_ff - 1) +
                                                ", found " + std::to_string(always));
        always_.push_back(static_cast<uint32_t>(always));
    }
    for (double t : per_layer(gguf_, "powerinfer.activation_threshold", c.n_layer)) {
        if (!(t >= 0 && std::isfinite(t)))
            throw Error(PI_ERROR_MALFORMED, "powerinfer.activation_threshold: expected a finite number of at least 0");
        thresholds_.push_back(static_cast<float>(t));
    }
}

void Model::read_experts() {
    const std::string b = "powerinfer.experts.";
    Experts& experts = config.experts;
    experts.n = size_of(gguf_, b + "n", MAX_EXPERTS);
    experts.n_used = size_of(gguf_, b + "n_used", experts.n);
    if (config.n_ff % experts.n != 0)
        throw Error(PI_ERROR_MALFORMED, b + "n: expected a divisor of " + std::to_string(config.n_ff) + ", found " +
                                            std::to_string(experts.n));
    if (config.sub_norms)
        throw Error(PI_ERROR_UNSUPPORTED, "powerinfer.sub_norms: expected false beside experts, found true");
    if (config.parallel)
        throw Error(PI_ERROR_UNSUPPORTED, "powerinfer.parallel: expected false beside experts, found true");
    experts.softmax = one_of(gguf_, b + "gating", "softmax", "sigmoid");
    bool early = one_of(gguf_, b + "routed_by", "layer_input", "ffn_input");
    experts.routed_by = early ? RoutedBy::LayerInput : RoutedBy::FfnInput;
}

void Model::read_structure() {
    Config& c = config;
    c.norm = one_of(gguf_, "powerinfer.norm", "rms", "layer") ? NormKind::Rms : NormKind::Layer;
    c.learned_positions = gguf_.b("powerinfer.learned_positions");
    c.parallel = gguf_.b("powerinfer.parallel");
    c.qk_norm = gguf_.b("powerinfer.qk_norm");
    c.sub_norms = gguf_.b("powerinfer.sub_norms");
    c.softcap = not_negative(gguf_, "powerinfer.logit_softcap");
}

void Model::read_rope(const std::string& arch) {
    Config& c = config;
    rotary_.assign(c.n_layer, false);
    if (!gguf_.has("powerinfer.rotary") && !gguf_.find(INV_FREQ)) return;
    const auto& rotary = per_layer(gguf_, "powerinfer.rotary", c.n_layer);
    for (uint32_t i = 0; i < c.n_layer; i++) {
        if (rotary[i] != 0 && rotary[i] != 1)
            throw Error(PI_ERROR_MALFORMED, "powerinfer.rotary: expected 0 or 1, found " + std::to_string(rotary[i]));
        rotary_[i] = rotary[i] != 0;
    }
    c.rope_scale = positive(gguf_, "powerinfer.rope_scale");
    c.rotary_dim = size_of(gguf_, arch + ".rope.dimension_count", 65536);
    if (c.rotary_dim % 2 != 0 || c.rotary_dim > c.head_dim)
        throw Error(PI_ERROR_MALFORMED, arch + ".rope.dimension_count: expected an even number up to " +
                                            std::to_string(c.head_dim) + ", found " + std::to_string(c.rotary_dim));
}

const Tensor& Model::expect(const std::string& name, std::initializer_list<uint64_t> ne, const char* types) const {
    const Tensor* t = gguf_.find(name);
    std::string shape = "[";
    for (uint64_t d : ne) shape += (shape.size() > 1 ? ", " : "") + std::to_string(d);
    shape += "]";
    if (!t) throw Error(PI_ERROR_MISMATCH, name + ": expected " + types + " " + shape + ", found no such tensor");
    bool same = t->n_dims == ne.size() && std::equal(ne.begin(), ne.end(), t->ne);
    bool typed = std::strstr(types, type_name(t->type)) != nullptr;
    if (!same || !typed)
        throw Error(PI_ERROR_MISMATCH, name + ": expected " + types + " " + shape + ", found " + type_name(t->type) +
                                           " " + shape_text(*t));
    bound_[static_cast<size_t>(t - gguf_.tensors.data())] = true;
    return *t;
}

// The tensor's first row on this side, NULL where it is on the other. Where a layer's neurons are divided, that of
// neuron 0 on either.
const uint8_t* Model::at(const Tensor& t, const Addresses& side) const {
    if (side.device) {
        auto found = side.on_device.find(&t);
        return found == side.on_device.end() ? nullptr : found->second;
    }
    bool moved = std::ranges::any_of(shares_, [&](const Share& s) { return s.tensor == &t && s.moved; });
    return side.base && !moved ? side.base + (t.offset - gguf_.data_offset) : nullptr;
}

Rows Model::matrix(const std::string& name, const Addresses& side, uint64_t n, uint64_t n_rows,
                   const char* types) const {
    const Tensor& t = expect(name + ".weight", {n, n_rows}, types);
    return {t.type, n, n_rows, side.device ? side.device->row_bytes(t.type, n) : row_bytes(t.type, n), at(t, side)};
}

const float* Model::vector(const std::string& name, const Addresses& side, uint64_t n, bool required) const {
    if (!required && !gguf_.find(name)) return nullptr;
    return reinterpret_cast<const float*>(at(expect(name, {n}, "F32"), side));
}

Norm Model::norm(const std::string& name, const Addresses& side) const {
    bool biased = config.norm == NormKind::Layer;
    return {vector(name + ".weight", side, config.n_embd, true),
            biased ? vector(name + ".bias", side, config.n_embd, true) : nullptr};
}

Linear Model::linear(const std::string& name, const Addresses& side, uint64_t n, uint64_t n_rows) const {
    return {matrix(name, side, n, n_rows), vector(name + ".bias", side, n_rows, false)};
}

void Model::bind(const Addresses& side, Weights& out) {
    const Config& c = config;
    bound_.assign(gguf_.tensors.size(), false);
    out.token_embd = matrix("token_embd", side, c.n_embd, c.n_vocab);
    if (c.learned_positions) out.position_embd = matrix("position_embd", side, c.n_embd, c.n_ctx);
    if (c.rotary_dim > 0) out.rope_inv_freq = vector(INV_FREQ, side, c.rotary_dim / 2, true);
    out.layers.assign(c.n_layer, Layer{});
    for (uint32_t i = 0; i < c.n_layer; i++) bind_layer(i, side, out.layers[i]);
    out.output_norm = norm("output_norm", side);
    out.output = c.tied ? out.token_embd : matrix("output", side, c.n_embd, c.n_vocab);
    auto unbound = std::find(bound_.begin(), bound_.end(), false);
    if (unbound != bound_.end())
        throw Error(PI_ERROR_MISMATCH, gguf_.tensors[static_cast<size_t>(unbound - bound_.begin())].name +
                                           ": expected no such tensor, found one");
}

void Model::bind_layer(uint32_t i, const Addresses& side, Layer& layer) {
    const Config& c = config;
    std::string b = "blk." + std::to_string(i) + ".";
    layer.attn_norm = norm(b + "attn_norm", side);
    layer.q = linear(b + "attn_q", side, c.n_embd, c.q_dim());
    layer.k = linear(b + "attn_k", side, c.n_embd, c.kv_dim());
    layer.v = linear(b + "attn_v", side, c.n_embd, c.kv_dim());
    layer.o = linear(b + "attn_output", side, c.q_dim(), c.n_embd);
    layer.rotates = rotary_[i];
    layer.ffn_norm = norm(b + "ffn_norm", side);

    bool apart = modes_[i] == 1;
    uint64_t rows = c.n_rows() - (apart ? 1 : 0);
    const Tensor& t = expect(b + "ffn_neurons.weight", {c.n_embd, rows, c.n_ff}, "F32, F16, Q8_0 or Q4_0");
    uint64_t size = side.device ? side.device->row_bytes(t.type, c.n_embd) : row_bytes(t.type, c.n_embd);
    const uint8_t* bundles = at(t, side);
    auto part = [&](uint64_t k) {
        return Rows{t.type, c.n_embd, c.n_ff, size * rows, bundles ? bundles + k * size : nullptr};
    };
    layer.apart = apart;
    layer.select = apart ? matrix(b + "ffn_select", side, c.n_embd, c.n_ff) : part(0);
    if (c.gated) layer.up = part(apart ? 0 : 1);
    layer.down = part(rows - 1);
    const float* up_bias = vector(b + "ffn_up.bias", side, c.n_ff, false);
    layer.select_bias = c.gated ? vector(b + "ffn_gate.bias", side, c.n_ff, false) : up_bias;
    layer.up_bias = c.gated ? up_bias : nullptr;
    layer.down_bias = vector(b + "ffn_down.bias", side, c.n_embd, false);
    layer.threshold = thresholds_[i];
    layer.always = apart ? 0 : always_[i];
    layer.last = c.n_ff;

    expect(b + "ffn_order.weight", {c.n_ff}, "I32");
    const float* frequency = vector(b + "ffn_frequency.weight", side, c.n_ff, true);
    const Experts& experts = c.experts;
    if (experts.n > 0) {
        layer.router = matrix(b + "ffn_router", side, c.n_embd, experts.n, "F32");
        const Tensor& expert = expect(b + "ffn_expert.weight", {c.n_ff}, "I32");
        layer.expert = reinterpret_cast<const int32_t*>(at(expert, side));
    }
    double decided = experts.n > 0 ? static_cast<double>(experts.n_used) / experts.n : 1.0;
    if (frequency) layer.chunks = chunk_bounds(frequency, c.n_ff, decided);
    if (apart) return;
    const Tensor* in = gguf_.find(b + "predictor_in.weight");
    uint64_t rank = in && in->n_dims == 2 ? in->ne[1] : 0;
    uint64_t asked = c.n_ff - layer.always;
    layer.predictor =
        Predictor{matrix(b + "predictor_in", side, c.n_embd, rank), matrix(b + "predictor_out", side, rank, asked),
                  vector(b + "predictor_out.bias", side, asked, true)};
}

// Every stored order must be a permutation: anything else means damaged data.
void Model::check_orders(const uint8_t* base) const {
    std::vector<bool> seen(config.n_ff);
    for (uint32_t i = 0; i < config.n_layer; i++) {
        std::string name = "blk." + std::to_string(i) + ".ffn_order.weight";
        const Tensor* t = gguf_.find(name);
        const uint8_t* data = base + (t->offset - gguf_.data_offset);
        std::fill(seen.begin(), seen.end(), false);
        for (uint32_t j = 0; j < config.n_ff; j++) {
            int32_t index;
            std::memcpy(&index, data + 4ull * j, 4);
            if (index < 0 || static_cast<uint32_t>(index) >= config.n_ff || seen[index])
                throw Error(PI_ERROR_MALFORMED, name + ": expected a permutation of 0 to " +
                                                    std::to_string(config.n_ff - 1) + ", found " +
                                                    std::to_string(index) + " at " + std::to_string(j));
            seen[index] = true;
        }
    }
}

// The expert of every stored neuron must be the one that the checkpoint has it in.
void Model::check_experts(const uint8_t* base) const {
    uint32_t each = config.n_ff / config.experts.n;
    for (uint32_t i = 0; i < config.n_layer; i++) {
        std::string b = "blk." + std::to_string(i) + ".ffn_", name = b + "expert.weight";
        auto at = [&](const std::string& tensor, uint32_t j) {
            int32_t value;
            std::memcpy(&value, base + (gguf_.find(tensor)->offset - gguf_.data_offset) + 4ull * j, 4);
            return value;
        };
        for (uint32_t j = 0; j < config.n_ff; j++) {
            auto expected = static_cast<int32_t>(static_cast<uint32_t>(at(b + "order.weight", j)) / each);
            if (int32_t found = at(name, j); found != expected)
                throw Error(PI_ERROR_MALFORMED, name + ": expected expert " + std::to_string(expected) + ", found " +
                                                    std::to_string(found) + " at " + std::to_string(j));
        }
    }
}

void Model::load(const pi_disk_params* limits, const pi_card_params* card) {
    if (card) open_device(*card);
    if (limits)
        open_disk(*limits, card);
    else
        read_all();
    for (const Tensor& t : gguf_.tensors) weight_bytes += t.n_bytes;
    const uint8_t* base = disk ? disk->data() : arena_;
    for (auto [begin, end] : holes()) forbid(base + (begin - gguf_.data_offset), base + (end - gguf_.data_offset));
    check_orders(base);
    if (config.experts.n > 0) check_experts(base);
    bind({.base = base}, weights);
    for (uint32_t i = 0; i < config.rotary_dim / 2; i++)
        if (!std::isfinite(weights.rope_inv_freq[i]))
            throw Error(PI_ERROR_MALFORMED, std::string(INV_FREQ) + ": expected finite numbers, found another");
    if (card) divide(*card);
    close(fd_);
    fd_ = -1;
    if (!disk) return;
    for (uint32_t i = 0; i < config.n_layer; i++)
        disk->expect(i,
                     vector("blk." + std::to_string(i) + ".ffn_frequency.weight", {.base = base}, config.n_ff, true));
}

void Model::open_disk(const pi_disk_params& limits, const pi_card_params* card) {
    if (limits.n_layer != config.n_layer)
        throw Error(PI_ERROR_ARGUMENT, "n_resident: expected " + std::to_string(config.n_layer) + " layers, found " +
                                           std::to_string(limits.n_layer));
    std::vector<Bundles> layers;
    for (uint32_t i = 0; i < config.n_layer; i++) {
        const Tensor& t = *gguf_.find("blk." + std::to_string(i) + ".ffn_neurons.weight");
        uint32_t least = card ? card->n_neurons[i] : 0;
        if (limits.n_resident[i] < least || limits.n_resident[i] > config.n_ff)
            throw Error(PI_ERROR_ARGUMENT, "n_resident: expected " + std::to_string(least) + " to " +
                                               std::to_string(config.n_ff) + ", found " +
                                               std::to_string(limits.n_resident[i]));
        layers.push_back({t.offset, t.n_bytes / config.n_ff, limits.n_resident[i]});
    }
    Table table;
    if (!config.tied) {  // else it is the output head, too
        const Tensor& t = *gguf_.find("token_embd.weight");
        table = {t.offset, t.n_bytes, t.n_bytes / config.n_vocab};
    }
    disk = std::make_unique<DiskTier>(fd_, gguf_.data_offset, gguf_.file_bytes, config.n_ff, layers, table, limits,
                                      holes());
}

void Model::read_all() {
    uint64_t n = gguf_.file_bytes - gguf_.data_offset;
    arena_bytes_ = (n + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE + HUGE_PAGE;
    void* memory = mmap(nullptr, arena_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        throw Error(PI_ERROR_MEMORY, "cannot allocate " + std::to_string(arena_bytes_) + " bytes for the weights");
    arena_ = static_cast<uint8_t*>(memory);
    uint64_t at = gguf_.data_offset;
    for (auto [begin, end] : holes()) {
        read_to_arena(at, begin);
        spoil_edges(arena_ + (begin - gguf_.data_offset), arena_ + (end - gguf_.data_offset));
        at = end;
    }
    read_to_arena(at, gguf_.file_bytes);
    mprotect(arena_, arena_bytes_, PROT_READ);
}

void Model::read_to_arena(uint64_t begin, uint64_t end) {
    uint8_t* to = arena_ + (begin - gguf_.data_offset);
    use_huge_pages(page_down(to), static_cast<size_t>(page_up(to + (end - begin)) - page_down(to)));
    read_range(begin, end, to);
}

// [begin, end) of the file
void Model::read_range(uint64_t begin, uint64_t end, uint8_t* to) const {
    for (uint64_t at = begin; at < end;) {
        ssize_t got = pread(fd_, to + (at - begin), std::min<uint64_t>(end - at, 64u << 20), static_cast<off_t>(at));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw Error(PI_ERROR_IO, std::string("cannot read the tensor data: ") + std::strerror(errno));
        if (got == 0) throw Error(PI_ERROR_TRUNCATED, "the file became shorter while it was read");
        at += static_cast<uint64_t>(got);
    }
}

}  // namespace pi
