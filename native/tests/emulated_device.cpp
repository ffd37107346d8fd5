#include "../cuda/device.cu"
