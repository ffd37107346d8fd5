// A device for tests: memory of its own, and a thread that carries out commands beside the caller.
#include <cstring>
#include <vector>

#include "device.h"

namespace pi {

namespace {

class HostDevice : public Device {
   public:
    DeviceInfo info() override { return {"a thread in place of a card, for tests", 0, 0, 0}; }
    uint64_t row_bytes(Type type, uint64_t n) const override { return pi::row_bytes(type, n); }
    uint8_t* allocate(uint64_t n_bytes) override {
        memory_.resize(n_bytes);
        return memory_.data();
    }
    void store(uint8_t* to, Type type, uint64_t n, uint64_t n_rows, const uint8_t* rows) override {
        std::memcpy(to, rows, n_rows * row_bytes(type, n));
    }
    std::unique_ptr<DeviceSession> open(const Config&, const Weights&, const pi_session_params&, uint32_t) override {
        throw Error(PI_ERROR_UNSUPPORTED, "the host device opens no sessions yet");
    }
    double read_rate(uint64_t, uint64_t, uint32_t) override { return 1e9; }
    double copy_rate() override { return 1e9; }
    double launch_seconds() override { return 1e-6; }
    double merge_seconds(uint64_t) override { return 1e-5; }

   private:
    std::vector<uint8_t> memory_;
};

}  // namespace

std::unique_ptr<Device> host_device() { return std::make_unique<HostDevice>(); }

}  // namespace pi
