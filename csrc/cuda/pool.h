// Max-pooling and the classifier's head over channels-last tensors, on the GPU.
#pragma once

#include "../conv3d.h"

namespace r3d::cuda {

// Enqueue on `stream` (a cudaStream_t) of the current device; null, or what went wrong.
const char* max_pool3d(const PoolArgs& args, void* stream);
// `means` is scratch for [N, C] floats.
const char* avg_pool_linear(const HeadArgs& args, float* means, void* stream);

}  // namespace r3d::cuda
