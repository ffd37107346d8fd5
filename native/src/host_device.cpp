// A device for tests: memory of its own, and a thread that carries out commands beside the caller, with the same code
// as the processor's. They wait for start(), as a card's do.
#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include "measure.h"
#include "side.h"

namespace pi {

namespace {

// A thread that carries out commands in order.
class Commands {
   public:
    explicit Commands(uint64_t fails_at) : fails_at_(fails_at), thread_([this] { work(); }) {}
    ~Commands() {
        {
            std::lock_guard lock(mutex_);
            stop_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }

    void add(std::function<void()> command) {
        std::lock_guard lock(mutex_);
        waiting_.push_back(std::move(command));
        given_++;
    }
    uint64_t given() const { return given_; }

    void start() {
        {
            std::lock_guard lock(mutex_);
            started_ = given_;
        }
        changed_.notify_all();
    }

    void wait(uint64_t ticket) {
        start();
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return done_ >= ticket; });
        if (failed_) std::rethrow_exception(failed_);
    }

   private:
    void work() {
        std::unique_lock lock(mutex_);
        while (true) {
            changed_.wait(lock, [&] { return stop_ || done_ < started_; });
            if (stop_) return;
            auto command = std::move(waiting_.front());
            waiting_.pop_front();
            if (!failed_) carry_out(command, lock);
            done_++;
            changed_.notify_all();
        }
    }

    void carry_out(const std::function<void()>& command, std::unique_lock<std::mutex>& lock) {
        lock.unlock();
        std::exception_ptr error;
        try {
            if (done_ + 1 == fails_at_) throw Error(PI_ERROR_INTERNAL, "the host device fails, as it was told to");
            command();
        } catch (...) {
            error = std::current_exception();
        }
        lock.lock();
        failed_ = error;
    }

    const uint64_t fails_at_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> waiting_;
    uint64_t given_ = 0, started_ = 0, done_ = 0;
    std::exception_ptr failed_;
    bool stop_ = false;
    std::thread thread_;  // last: the others are there before it
};

pi_session_params with_one_thread(pi_session_params params) {
    params.n_threads = 1;
    return params;
}

class HostSession : public DeviceSession {
   public:
    HostSession(const Config& config, const Weights& weights, const pi_session_params& params, uint64_t fails_at)
        : side_(config, weights, nullptr, with_one_thread(params)), commands_(fails_at) {
        size_t batch = std::min<size_t>(BATCH, params.n_ctx), x = batch * config.n_embd,
               rank = batch * max_rank(weights);
        for (auto [buffer, n] : {std::pair{&in_x_, x}, {&in_rank_, rank}, {&out_x_, x}, {&out_rank_, rank}})
            buffer->resize(n);
        sum_.resize(x);
        out_sum_.resize(x);
        logits_.resize(config.n_vocab);
        inbox = {in_x_.data(), in_rank_.data(), nullptr, nullptr};
        outbox = {out_x_.data(), out_rank_.data(), out_sum_.data(), logits_.data()};
    }

    void begin(const Pass& pass) override {
        pass_ = pass;
        commands_.add([this, pass] { side_.begin(pass); });
    }
    void enter() override {
        commands_.add([this, n = n_stream()] { std::copy_n(inbox.x, n, side_.stream()); });
    }
    void embed(const int32_t* tokens) override {
        commands_.add([this, tokens] { side_.embed(tokens); });
    }
    void attention(size_t il) override {
        commands_.add([this, il] { side_.attention(il); });
    }
    void prepare_ffn(size_t il) override {
        commands_.add([this, il] { side_.prepare_ffn(il); });
    }
    void give_ffn_input(size_t il) override {
        commands_.add([this, il, pass = pass_, n = n_stream()] {
            const Layer& layer = side_.weights.layers[il];
            std::copy_n(side_.ffn_input(), n, outbox.x);
            if (side_.asks_now(layer)) std::copy_n(side_.ffn_rank(), pass.n * layer.predictor->out.n, outbox.rank);
        });
    }
    void take_ffn_input(size_t il) override {
        commands_.add([this, il] { side_.take_ffn_input(il, inbox.x, inbox.rank); });
    }
    void lend(size_t, const Layer& home) override {
        commands_.add([this, lent = &home] { lent_ = lent; });
    }
    void ffn(size_t il) override {
        commands_.add([this, il] {
            side_.ffn(il);
            side_.sum(il, {nullptr, sum_.data()});
            if (lent_) side_.add_lent(*std::exchange(lent_, nullptr), sum_.data());
        });
    }
    void give_sum() override {
        commands_.add([this, n = n_stream()] { std::copy_n(sum_.data(), n, outbox.sum); });
    }
    void add_sum(size_t il) override {
        commands_.add([this, il] { side_.add_sum(il, sum_.data()); });
    }
    void add_inbox(size_t il) override {
        commands_.add([this, il] { side_.add_sum(il, inbox.x); });
    }
    void leave() override {
        commands_.add([this, n = n_stream()] { std::copy_n(side_.stream(), n, outbox.x); });
    }
    void head() override {
        commands_.add([this, n = (pass_.selective ? pass_.n : 1) * side_.config.n_vocab] {
            if (logits_.bytes() < n * sizeof(float)) logits_.resize(n);
            outbox.logits = logits_.data();
            side_.head(outbox.logits);
        });
    }
    void count(pi_layer_score* score) override {
        commands_.add([this, score] { side_.count(score); });
    }

    void start() override { commands_.start(); }
    uint64_t mark() override { return commands_.given(); }
    void wait(uint64_t ticket) override { commands_.wait(ticket); }

    void take_counts(std::span<NeuronCounts> layers) override {
        for (size_t il = 0; il < layers.size(); il++) layers[il] += std::exchange(side_.counts[il], {});
    }
    uint64_t kv_bytes() const override { return side_.kv_bytes(); }
    uint64_t scratch_bytes() const override { return side_.scratch_bytes() + sum_.bytes(); }

   private:
    size_t n_stream() const { return pass_.n * side_.config.n_embd; }

    Side side_;
    Pass pass_{};  // as the caller sees it
    const Layer* lent_ = nullptr;
    Buffer<float> in_x_, in_rank_, out_x_, out_rank_, out_sum_, sum_, logits_;
    Commands commands_;  // last: ends before what it works on
};

constexpr uint32_t REPEATS = 9, LAUNCHES = 1000;
constexpr uint64_t COPY_BYTES = 32u << 20;

class HostDevice : public Device {
   public:
    explicit HostDevice(uint64_t fails_at) : fails_at_(fails_at) {}
    DeviceInfo info() override { return {"a thread in place of a card, for tests", 0, 0, 0}; }
    uint64_t row_bytes(Type type, uint64_t n) const override { return pi::row_bytes(type, n); }
    uint8_t* allocate(uint64_t n_bytes) override {
        memory_.resize(n_bytes);
        return memory_.data();
    }
    void store(uint8_t* to, Type type, uint64_t n, uint64_t n_rows, const uint8_t* rows) override {
        std::memcpy(to, rows, n_rows * row_bytes(type, n));
    }
    std::unique_ptr<DeviceSession> open(const Config& config, const Weights& weights, const pi_session_params& params,
                                        uint32_t, uint64_t) override {
        return std::make_unique<HostSession>(config, weights, params, fails_at_);
    }
    double read_rate(uint64_t buffer_bytes, uint64_t row_bytes, uint32_t stride_rows) override {
        uint64_t row = stride_rows == 1 ? 128 * sizeof(BlockQ4_0) : align_up(row_bytes, sizeof(BlockQ4_0));
        return measure_rows(1, buffer_bytes, row, stride_rows, REPEATS);
    }
    double copy_rate() override {
        Buffer<uint8_t> from, to;
        from.resize(COPY_BYTES);
        to.resize(COPY_BYTES);
        double seconds =
            median_seconds([&] { return seconds_of([&] { std::memcpy(to.data(), from.data(), COPY_BYTES); }); });
        return static_cast<double>(COPY_BYTES) / seconds;
    }
    double launch_seconds() override {
        Commands commands(0);
        return median_seconds([&] {
                   return seconds_of([&] {
                       for (uint32_t i = 0; i < LAUNCHES; i++) commands.add([] {});
                       commands.wait(commands.given());
                   });
               }) /
               LAUNCHES;
    }
    double merge_seconds(uint64_t n) override {
        Commands commands(0);
        Buffer<float> sent, there, back;
        for (auto* buffer : {&sent, &there, &back}) buffer->resize(n);
        return median_seconds([&] {
            return seconds_of([&] {
                commands.add([&] { std::copy_n(sent.data(), n, there.data()); });
                commands.add([&] { std::copy_n(there.data(), n, back.data()); });
                commands.wait(commands.given());
            });
        });
    }

   private:
    uint64_t fails_at_;
    Buffer<uint8_t> memory_;
};

}  // namespace

std::unique_ptr<Device> host_device(uint64_t fails_at) { return std::make_unique<HostDevice>(fails_at); }

}  // namespace pi
