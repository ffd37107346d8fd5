#include "../cuda/session.cu"
