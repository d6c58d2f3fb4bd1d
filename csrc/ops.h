// What the ops of all devices share: checks, which raise one sentence wherever a tensor lives, and tensors in
// the layouts that kernels read. Kernels get pointers and structs from the ops, never tensors. torch's stable
// ABI only, so that one binary serves every supported torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv3d.h"
#include "norm.h"

namespace r3d {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Errors carry the sentence only: the user's own stack says where.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream s;
  (s << ... << parts);
  throw std::runtime_error(s.str());
}
#define R3D_CHECK(condition, ...)        \
  do {                                   \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (false)

std::string text(const Ints& v);
Ints sizes(const Tensor& t);
const char* name(ScalarType t);

// Raises unless all that the sizes and strides reach is in memory: a storage may have been freed or shrunk
// under its tensors (`untyped_storage().resize_(0)`, as FSDP leaves parameters). `argument` is what a user
// calls the value.
void check_storage(const Tensor& t, const char* argument);
Dim3 triple(const Ints& v, const char* argument, int64_t least);
Activation activation_of(const std::string& s);
DType dtype_of(const Tensor& t, const char* argument, bool half_allowed = false);  // checks the storage too
void check_same(const Tensor& t, const char* argument, const Tensor& x);  // dtype, device and storage
void check_residual_shape(const Ints& residual, const Ints& expected);

// The one place where the geometry of a convolution is judged.
ConvGeometry geometry(const Ints& input, int64_t out_channels, int64_t channels_per_group,
                      const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
                      int64_t groups);
Ints output_shape(const ConvGeometry& g);

// The tensor itself where it lies so, else a copy.
Tensor channels_last(const Tensor& t);
Tensor plain(const Tensor& t);

bool is_channels_last(const Tensor& t);
Tensor empty_channels_last(const Ints& shape, const Tensor& like);

// Checks, output and arguments for any device; `keep` holds the tensors that the arguments point into.
template <class Args>
struct Prepared {
  Args a{};
  Tensor y;
  std::vector<Tensor> keep;
};

Prepared<PoolArgs> prepare_max_pool3d(const Tensor& x, const Ints& kernel_size, const Ints& stride,
                                      const Ints& padding);
Prepared<HeadArgs> prepare_avg_pool_linear(const Tensor& x, const Tensor& weight,
                                           const std::optional<Tensor>& bias);
Prepared<BnActArgs> prepare_bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                   const std::optional<Tensor>& residual, const std::string& activation);

}  // namespace r3d
