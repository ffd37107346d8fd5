// Finds the library that holds the CUDA part. The engine is built, installed and run without it.
#include <dlfcn.h>

#include <cstdlib>

#include "device.h"

namespace pi {

namespace {

constexpr const char* NAME = "libpowerinfer_cuda.so";

// Beside this library.
std::string path_of_library() {
    if (const char* path = std::getenv("POWERINFER_CUDA_LIB")) return path;
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(&pi_abi_version), &info);
    std::string self = info.dli_fname ? info.dli_fname : "";
    return self.substr(0, self.find_last_of('/') + 1) + NAME;
}

}  // namespace

std::unique_ptr<Device> cuda_device() {
    std::string path = path_of_library();
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // for good: its code may be in use until the end
    if (!library)
        throw Error(PI_ERROR_UNSUPPORTED, std::string("no CUDA part of the engine (make native CUDA=1): ") + dlerror());
    auto open = reinterpret_cast<Device* (*)(uint32_t)>(dlsym(library, "pi_cuda_device"));
    if (!open) throw Error(PI_ERROR_MISMATCH, path + ": expected the function pi_cuda_device, found none: rebuild it");
    return std::unique_ptr<Device>(open(PI_SHARED_HEADERS));
}

}  // namespace pi
