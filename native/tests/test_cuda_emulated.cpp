#include "test_cuda.cu"
