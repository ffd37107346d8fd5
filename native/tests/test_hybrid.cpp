// A model on two sides, the host device in a card's place: the same bits for any division, the device set going before
// the processor begins and awaited after it is done, and a device that fails is an error and never a wait. make asan
// and make tsan run it, too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "session.h"

namespace {

constexpr uint32_t N_LAYER = 3, N_EMBD = 64, N_FF = 160, RANK = 16, ALWAYS = 10, N_VOCAB = 50, N_CTX = 300;

int failed = 0;

void expect(bool ok, const std::string& what) {
    if (ok) return;
    std::printf("failed: %s\n", what.c_str());
    failed++;
}

// parallel: the FFN reads what attention reads
pi::Config config(bool parallel) {
    pi::Config c{};
    c.n_layer = N_LAYER;
    c.n_embd = N_EMBD;
    c.n_ff = N_FF;
    c.n_head = 4;
    c.n_head_kv = 2;
    c.head_dim = 16;
    c.n_vocab = N_VOCAB;
    c.n_ctx = N_CTX;
    c.rotary_dim = 16;
    c.norm_eps = 1e-5f;
    c.rope_scale = 1;
    c.norm = pi::NormKind::Rms;
    c.activation = pi::Activation::Relu;
    c.gated = true;
    c.parallel = parallel;
    return c;
}

// Which share of a model a side has: all dense blocks or none, neurons [first, last), the head or not.
struct Share {
    bool dense, head;
    uint32_t first, last;
};
constexpr Share ALL{true, true, 0, N_FF};

// Random weights, the same for every share; what is not in the share is no number.
class Tensors {
   public:
    explicit Tensors(const Share& share) : share_(share) {
        weights.token_embd = matrix(N_VOCAB, N_EMBD, true);
        weights.rope_inv_freq = floats(8, true);
        for (uint32_t i = 0; i < N_LAYER; i++) weights.layers.push_back(layer());
        weights.output_norm = {floats(N_EMBD, share.head), nullptr};
        weights.output = matrix(N_VOCAB, N_EMBD, share.head);
        if (!share.head) weights.output.data = nullptr;
    }
    pi::Weights weights;

    // From now on the up rows of its neurons are numbers only while they are shown.
    void hide() {
        hidden_.assign(size_t{N_LAYER} * N_FF * N_EMBD, NAN);
        exchange_up();
    }
    void show(bool shown) {
        if (!hidden_.empty() && std::exchange(shown_, shown) != shown) exchange_up();
    }

   private:
    void exchange_up() {
        float* hidden = hidden_.data();
        for (const pi::Layer& layer : weights.layers)
            for (uint32_t i = layer.first; i < layer.last; i++, hidden += N_EMBD)
                std::swap_ranges(hidden, hidden + N_EMBD,
                                 reinterpret_cast<float*>(const_cast<uint8_t*>(layer.up.row(i))));
    }
    float* floats(size_t n, bool here, float scale = 1) {
        std::vector<float>& values = memory_.emplace_back(n);
        for (float& value : values) value = scale * normal_(random_);
        if (!here) std::ranges::fill(values, NAN);
        return values.data();
    }
    pi::Rows matrix(uint64_t n_rows, uint64_t n, bool here) {
        const float* data = floats(n_rows * n, here, 1 / std::sqrt(static_cast<float>(n)));
        return {pi::Type::F32, n, n_rows, n * sizeof(float), reinterpret_cast<const uint8_t*>(data)};
    }
    void spoil(const pi::Rows& rows, uint64_t begin, uint64_t end) {
        for (uint64_t i = begin; i < end; i++)
            std::fill_n(reinterpret_cast<float*>(const_cast<uint8_t*>(rows.row(i))), rows.n, NAN);
    }
    pi::Layer layer() {
        pi::Layer layer;
        layer.attn_norm = {floats(N_EMBD, share_.dense), nullptr};
        layer.ffn_norm = {floats(N_EMBD, share_.dense), nullptr};
        layer.q = {matrix(64, N_EMBD, share_.dense), nullptr};
        layer.k = {matrix(32, N_EMBD, share_.dense), nullptr};
        layer.v = {matrix(32, N_EMBD, share_.dense), nullptr};
        layer.o = {matrix(N_EMBD, 64, share_.dense), nullptr};
        layer.rotates = true;
        pi::Rows bundles = matrix(3 * N_FF, N_EMBD, true);
        spoil(bundles, 0, 3 * share_.first);
        spoil(bundles, 3 * share_.last, 3 * N_FF);
        pi::Rows* parts[] = {&layer.select, &layer.up, &layer.down};
        for (size_t k = 0; k < 3; k++) *parts[k] = {pi::Type::F32, N_EMBD, N_FF, 3 * bundles.stride, bundles.row(k)};
        layer.always = ALWAYS;
        layer.predictor = pi::Predictor{matrix(RANK, N_EMBD, share_.dense), matrix(N_FF - ALWAYS, RANK, true),
                                        floats(N_FF - ALWAYS, true, 0.3f)};
        layer.chunks = {0, 32, 64, 64, 128, N_FF};
        layer.dense = share_.dense;
        layer.first = share_.first;
        layer.last = share_.last;
        return layer;
    }

    Share share_;
    std::mt19937 random_{1};
    std::normal_distribution<float> normal_;
    std::deque<std::vector<float>> memory_;
    std::vector<float> hidden_;
    bool shown_ = false;
};

pi_session_params params(uint32_t n_threads) {
    return {sizeof(pi_session_params), N_CTX, n_threads, PI_MODE_AUTO, 0, 0};
}

// Passes on what it is told, and keeps the names of the commands. What `here` hides is shown from when a layer's sum
// has been asked for and the device set going until the sum is awaited.
class Recorder : public pi::DeviceSession {
   public:
    Recorder(std::unique_ptr<pi::DeviceSession> inner, std::string* told, Tensors* here)
        : inner_(std::move(inner)), told_(told), here_(here) {
        inbox = inner_->inbox;
        outbox = inner_->outbox;
    }
    void begin(const pi::Pass& pass) override { tell("begin"), inner_->begin(pass); }
    void enter() override { tell("enter"), inner_->enter(); }
    void embed(const int32_t* tokens) override { tell("embed"), inner_->embed(tokens); }
    void attention(size_t il) override { tell("attention"), inner_->attention(il); }
    void prepare_ffn(size_t il) override { tell("prepare_ffn"), inner_->prepare_ffn(il); }
    void give_ffn_input(size_t il) override { tell("give_ffn_input"), inner_->give_ffn_input(il); }
    void take_ffn_input(size_t il) override { tell("take_ffn_input"), inner_->take_ffn_input(il); }
    void lend(size_t il, const pi::Layer& home) override { tell("lend"), inner_->lend(il, home); }
    void ffn(size_t il) override { tell("ffn"), inner_->ffn(il); }
    void give_sum() override {
        tell("give_sum"), inner_->give_sum();
        sum_ = inner_->mark();
    }
    void add_sum(size_t il) override { tell("add_sum"), inner_->add_sum(il); }
    void add_inbox(size_t il) override { tell("add_inbox"), inner_->add_inbox(il); }
    void leave() override { tell("leave"), inner_->leave(); }
    void head() override { tell("head"), inner_->head(); }
    void count(pi_layer_score* score) override { tell("count"), inner_->count(score); }
    void start() override {
        tell("start"), inner_->start();
        if (sum_ != NONE) here_->show(true);
    }
    uint64_t mark() override { return inner_->mark(); }
    void wait(uint64_t ticket) override {
        tell("wait");
        if (ticket >= sum_) {
            here_->show(false);
            sum_ = NONE;
        }
        inner_->wait(ticket);
        outbox = inner_->outbox;
    }
    void take_counts(std::span<pi::NeuronCounts> layers) override { inner_->take_counts(layers); }
    uint64_t kv_bytes() const override { return inner_->kv_bytes(); }
    uint64_t scratch_bytes() const override { return inner_->scratch_bytes(); }

   private:
    void tell(const std::string& what) { *told_ += what + " "; }
    static constexpr uint64_t NONE = UINT64_MAX;
    std::unique_ptr<pi::DeviceSession> inner_;
    std::string* told_;
    Tensors* here_;
    uint64_t sum_ = NONE;  // the ticket of a layer's sum that has not been awaited
};

// The processor's share, and a session over it and what the device has.
struct Divided {
    Divided(const Share& there, uint32_t n_threads, bool parallel = false, uint32_t lend_from = 0,
            uint64_t fails_at = 0)
        : sizes(config(parallel)),
          here({!there.dense, !there.head, there.last, N_FF}),
          card(there),
          device(pi::host_device(fails_at)),
          session(sizes, here.weights, nullptr, params(n_threads), card.weights,
                  std::make_unique<Recorder>(device->open(sizes, card.weights, params(n_threads), N_FF, UINT64_MAX),
                                             &told, &here),
                  lend_from) {}
    pi::Config sizes;
    std::string told;
    Tensors here, card;
    std::unique_ptr<pi::Device> device;
    pi::Session session;
};

std::vector<int32_t> tokens(size_t n) {
    std::vector<int32_t> ids(n);
    for (size_t i = 0; i < n; i++) ids[i] = static_cast<int32_t>(i * 7 % N_VOCAB);
    return ids;
}

// All logits: of a prompt of two batches, of tokens one by one, of scoring; and what scoring counted.
std::vector<float> run(pi::Session& session) {
    std::vector<float> all, out(40 * N_VOCAB);
    auto keep = [&](size_t n) { all.insert(all.end(), out.begin(), out.begin() + static_cast<std::ptrdiff_t>(n)); };
    session.prefill(tokens(270).data(), 270, out.data());
    keep(N_VOCAB);
    for (int32_t token : tokens(5)) {
        session.decode(token, out.data());
        keep(N_VOCAB);
    }
    session.truncate(4);
    pi_layer_score scores[N_LAYER] = {};
    session.score(tokens(40).data(), 40, out.data(), scores);
    keep(out.size());
    for (const pi_layer_score& s : scores)
        for (uint64_t n : {s.n_tokens, s.n_true, s.n_predicted, s.n_hit}) all.push_back(static_cast<float>(n));
    return all;
}

std::vector<float> run_unsplit(bool parallel) {
    pi::Config sizes = config(parallel);
    Tensors whole(ALL);
    pi::Weights nothing;
    pi::Session unsplit(sizes, whole.weights, nullptr, params(1), nothing, nullptr, 0);
    return run(unsplit);
}

void test_same_bits(bool parallel) {
    const std::vector<float> expected = run_unsplit(parallel);
    expect(std::isfinite(expected[0]), "the model gives numbers");
    for (bool dense : {false, true})
        for (bool head : {false, true})
            for (uint32_t n : {0u, 32u, 64u, 128u, N_FF})
                for (uint32_t lend_from : {0u, 256u}) {
                    Divided divided({dense, head, 0, n}, 1 + n % 3, parallel, lend_from);
                    expect(run(divided.session) == expected, "a division gives the same bits");
                }
}

void test_the_device_is_set_going_first() {
    auto of_one_layer = [](const Share& there, bool parallel = false) {
        Divided divided(there, 1, parallel);
        divided.session.decode(1, nullptr);
        return divided.told;
    };
    std::string here = "take_ffn_input ffn give_sum start wait ";
    expect(of_one_layer({false, false, 0, 64}) == "begin " + here + here + here, "the processor has the dense blocks");
    std::string there = "attention prepare_ffn give_ffn_input ffn give_sum start wait wait add_inbox ";
    expect(of_one_layer({true, false, 0, 64}) == "begin enter " + there + there + there + "leave wait ",
           "the device has the dense blocks");
    std::string alone = "attention prepare_ffn ffn add_sum ";
    expect(of_one_layer(ALL) == "begin enter " + alone + alone + alone + "head wait ", "the device has all");
    there = "prepare_ffn give_ffn_input ffn give_sum attention start wait wait add_inbox ";
    expect(of_one_layer({true, false, 0, 64}, true) == "begin enter " + there + there + there + "leave wait ",
           "in parallel blocks the FFN's input does not wait for attention");
}

// The processor's neurons can be computed only while the device has been set going for the layer's sum, which is not
// yet awaited: before and after, they give other logits.
void test_both_compute_at_the_same_time(bool parallel) {
    const std::vector<float> expected = run_unsplit(parallel);
    for (bool dense : {false, true}) {
        Divided divided({dense, false, 0, 64}, 2, parallel);
        divided.here.hide();
        expect(run(divided.session) == expected, std::string("both sides compute at the same time, the block ") +
                                                     (dense ? "on the device" : "on the processor") +
                                                     (parallel ? ", parallel" : ""));
    }
}

// Whichever command fails: one error, again at every call after it, and the session ends.
void test_failure() {
    for (uint64_t fails_at = 1; fails_at < 45; fails_at += 2) {
        Divided divided({true, true, 0, 64}, 2, false, 0, fails_at);
        size_t n = 0;
        std::string message;
        for (int32_t token : tokens(3)) try {
                divided.session.decode(token, nullptr);
                expect(n == 0, "what failed once fails again");
            } catch (const pi::Error& e) {
                n++;
                message = e.what();
            }
        expect(n > 0 && message == "the host device fails, as it was told to", "a failure is one clear error");
        expect(!divided.session.has_logits, "what failed has no logits");
    }
}

}  // namespace

int main() {
    for (bool parallel : {false, true}) {
        test_same_bits(parallel);
        test_both_compute_at_the_same_time(parallel);
    }
    test_the_device_is_set_going_first();
    test_failure();
    std::printf("test_hybrid: %d failed\n", failed);
    return failed != 0;
}
