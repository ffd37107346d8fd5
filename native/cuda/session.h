// One conversation on the card.
#pragma once

#include "device.h"

namespace pi::card {

// lent: the most neurons of a layer that are lent; n_processors: of the card
std::unique_ptr<DeviceSession> open_session(const Config& config, const Weights& weights,
                                            const pi_session_params& params, uint32_t lent, uint64_t room,
                                            uint32_t n_processors);

}  // namespace pi::card
