// The CUDA part as nvcc built it, loaded by the engine's own library: nothing that it needs is missing, both were made
// of the same sources, and where no card is to be seen that is one clear line. Cards are hidden: it is the same
// everywhere.
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "powerinfer.h"

int main() {
    setenv("CUDA_VISIBLE_DEVICES", "", 1);
    unsetenv("POWERINFER_CUDA_LIB");
    pi_card_info info{};
    info.struct_size = sizeof(info);
    const pi_status status = pi_card_describe(PI_DEVICE_CUDA, &info);
    const std::string_view line = status == PI_OK ? info.name : pi_last_error();
    std::printf("test_cuda_library: status %d: %s\n", status, line.data());
    return status != PI_ERROR_UNSUPPORTED ||
           (line != "no driver of a card, or one older than this engine's CUDA part needs" &&
            line != "expected a card that runs CUDA, found none");
}
