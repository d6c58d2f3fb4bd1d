// Every op's schema, the checks that ops share, and the ops of no device. What runs on tensors is registered
// where it is defined: ops_cpu.cpp and ops_cuda.cpp.
#include "ops.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/recycle.h"

namespace r3d {
namespace {

// csrc/torch/resizable.cpp, where it was compiled against the torch that runs
using TensorOver = AtenTensorHandle (*)(void* memory, void (*release)(void*), int64_t dims,
                                        const int64_t* sizes, const int64_t* strides, int32_t dtype);
std::atomic<TensorOver> g_tensor_over{nullptr};

Dim3 output_size(const Dim3& in, const Dim3& kernel, const Dim3& stride, const Dim3& padding,
                 const Dim3& dilation) {
  const Dim3 out{conv_out_size(in.d, kernel.d, stride.d, padding.d, dilation.d),
                 conv_out_size(in.h, kernel.h, stride.h, padding.h, dilation.h),
                 conv_out_size(in.w, kernel.w, stride.w, padding.w, dilation.w)};
  auto fits = [](int64_t i, int64_t k, int64_t p, int64_t l) { return i + 2 * p >= l * (k - 1) + 1; };
  R3D_CHECK(fits(in.d, kernel.d, padding.d, dilation.d) && fits(in.h, kernel.h, padding.h, dilation.h) &&
                fits(in.w, kernel.w, padding.w, dilation.w),
            "kernel_size: the kernel does not fit: input ", text({in.d, in.h, in.w}), " with padding ",
            text({padding.d, padding.h, padding.w}), " is smaller than kernel ",
            text({kernel.d, kernel.h, kernel.w}), " with dilation ",
            text({dilation.d, dilation.h, dilation.w}));
  return out;
}

}  // namespace

std::string text(const Ints& v) {
  std::ostringstream s;
  s << '[';
  for (size_t i = 0; i < v.size(); ++i) s << (i ? ", " : "") << v[i];
  s << ']';
  return s.str();
}

Ints sizes(const Tensor& t) {
  Ints v(static_cast<size_t>(t.dim()));
  for (size_t i = 0; i < v.size(); ++i) v[i] = t.size(static_cast<int64_t>(i));
  return v;
}

const char* name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "another dtype";
  }
}

Dim3 triple(const Ints& v, const char* argument, int64_t least) {
  R3D_CHECK(v.size() == 3, argument, ": expected 3 integers (depth, height, width), got ", v.size());
  for (int64_t i : v) R3D_CHECK(i >= least, argument, ": expected integers >= ", least, ", got ", text(v));
  return {v[0], v[1], v[2]};
}

Activation activation_of(const std::string& s) {
  R3D_CHECK(s == "relu" || s == "none", "activation: expected 'relu' or 'none', got '", s, "'");
  return s == "relu" ? Activation::kRelu : Activation::kNone;
}

ConvGeometry geometry(const Ints& input, int64_t out_channels, int64_t channels_per_group,
                      const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
                      int64_t groups) {
  R3D_CHECK(input.size() == 5, "x: expected 5 dimensions [N, C, D, H, W], got shape ", text(input));
  ConvGeometry g{};
  g.n = input[0];
  g.c = input[1];
  g.in = {input[2], input[3], input[4]};
  g.k = out_channels;
  g.kernel = triple(kernel_size, "kernel_size", 1);
  g.stride = triple(stride, "stride", 1);
  g.padding = triple(padding, "padding", 0);
  g.dilation = triple(dilation, "dilation", 1);
  R3D_CHECK(groups >= 1, "groups: expected an integer >= 1, got ", groups);
  R3D_CHECK(out_channels >= 1, "weight: expected at least 1 output channel, got ", out_channels);
  R3D_CHECK(g.c % groups == 0 && out_channels % groups == 0, "groups: expected a divisor of the ", g.c,
            " input and ", out_channels, " output channels, got ", groups);
  R3D_CHECK(g.c == channels_per_group * groups, "x: expected ", channels_per_group * groups,
            " channels (weight has ", channels_per_group, " a group, groups=", groups, "), got ", g.c,
            " in shape ", text(input));
  R3D_CHECK(g.c >= 1 && g.in.d >= 1 && g.in.h >= 1 && g.in.w >= 1,
            "x: only the batch may be empty, got shape ", text(input));
  g.out = output_size(g.in, g.kernel, g.stride, g.padding, g.dilation);
  return g;
}

Ints output_shape(const ConvGeometry& g) { return {g.n, g.k, g.out.d, g.out.h, g.out.w}; }

void check_residual_shape(const Ints& residual, const Ints& expected) {
  R3D_CHECK(residual == expected, "residual: expected the output's shape ", text(expected), ", got ",
            text(residual));
}

void check_storage(const Tensor& t, const char* argument) {
  int64_t span = 1;  // elements from the first to the last one
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return;
    span += (t.size(d) - 1) * t.stride(d);
  }
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  R3D_CHECK((t.storage_offset() + span) * static_cast<int64_t>(t.element_size()) <= bytes, argument,
            ": expected a tensor whose data is in memory, got shape ", text(sizes(t)), " over a storage of ",
            bytes, " bytes (freed or resized)");
}

DType dtype_of(const Tensor& t, const char* argument, bool half_allowed) {
  check_storage(t, argument);
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      if (half_allowed) return DType::kFloat16;
      [[fallthrough]];
    default:
      R3D_CHECK(false, argument, ": expected float32",
                half_allowed ? ", bfloat16 or float16" : " or bfloat16", ", got ", name(t.scalar_type()));
  }
  return DType::kFloat32;
}

void check_same(const Tensor& t, const char* argument, const Tensor& x) {
  check_storage(t, argument);
  R3D_CHECK(t.scalar_type() == x.scalar_type(), argument, ": expected the dtype of x, ",
            name(x.scalar_type()), ", got ", name(t.scalar_type()));
  R3D_CHECK(t.is_cpu() == x.is_cpu() && t.is_cuda() == x.is_cuda() && t.get_device() == x.get_device(),
            argument, ": expected a tensor on the device of x");
}

bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (int dim : {1, 4, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

Tensor channels_last(const Tensor& t) {
  if (t.numel() == 0 || is_channels_last(t)) return t;
  return torch::stable::contiguous(t, MemoryFormat::ChannelsLast3d);
}

Tensor plain(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor empty_channels_last(const Ints& shape, const Tensor& like) {
  int64_t bytes = static_cast<int64_t>(like.element_size());
  for (int64_t i : shape) bytes *= i;
  if (like.is_cpu() && bytes >= cpu::kRecycledFrom) {
    const int64_t w = shape[1], h = shape[4] * w, d = shape[3] * h, n = shape[2] * d;
    void* memory = cpu::take(bytes);
    if (const TensorOver over = g_tensor_over.load(std::memory_order_acquire)) {
      const Ints strides{n, 1, d, h, w};
      const auto y = over(memory, &cpu::give_back, 5, shape.data(), strides.data(),
                          static_cast<int32_t>(like.scalar_type()));
      R3D_CHECK(y != nullptr, "no tensor of shape ", text(shape), " could be made");
      return Tensor(y);
    }
    return torch::stable::from_blob(memory, shape, Ints{n, 1, d, h, w}, like.device(), like.scalar_type(),
                                    &cpu::give_back);
  }
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast3d);
}

// ---- pooling, head and batch norm

Prepared<PoolArgs> prepare_max_pool3d(const Tensor& x, const Ints& kernel_size, const Ints& stride,
                                      const Ints& padding) {
  R3D_CHECK(x.dim() == 5, "x: expected 5 dimensions [N, C, D, H, W], got shape ", text(sizes(x)));
  PoolArgs a{};
  a.dtype = dtype_of(x, "x", x.is_cuda());
  a.n = x.size(0);
  a.c = x.size(1);
  a.in = {x.size(2), x.size(3), x.size(4)};
  a.kernel = triple(kernel_size, "kernel_size", 1);
  a.stride = triple(stride, "stride", 1);
  a.padding = triple(padding, "padding", 0);
  R3D_CHECK(2 * a.padding.d <= a.kernel.d && 2 * a.padding.h <= a.kernel.h && 2 * a.padding.w <= a.kernel.w,
            "padding: expected at most half of kernel_size ", text(kernel_size), ", got ", text(padding));
  a.out = output_size(a.in, a.kernel, a.stride, a.padding, {1, 1, 1});
  Prepared<PoolArgs> p{a, empty_channels_last({a.n, a.c, a.out.d, a.out.h, a.out.w}, x), {channels_last(x)}};
  if (p.y.numel() == 0) return p;
  p.a.x = p.keep[0].const_data_ptr();
  p.a.y = p.y.mutable_data_ptr();
  return p;
}

Prepared<HeadArgs> prepare_avg_pool_linear(const Tensor& x, const Tensor& weight,
                                           const std::optional<Tensor>& bias) {
  R3D_CHECK(x.dim() == 5, "x: expected 5 dimensions [N, C, D, H, W], got shape ", text(sizes(x)));
  R3D_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), "weight: expected shape [classes, ", x.size(1),
            "], got ", text(sizes(weight)));
  HeadArgs a{};
  a.dtype = dtype_of(x, "x", x.is_cuda());
  check_same(weight, "weight", x);
  a.n = x.size(0);
  a.c = x.size(1);
  a.pixels = x.size(2) * x.size(3) * x.size(4);
  a.classes = weight.size(0);
  R3D_CHECK(a.pixels > 0 && a.c > 0, "x: only the batch may be empty, got shape ", text(sizes(x)));
  Prepared<HeadArgs> p{a,
                       torch::stable::empty(Ints{a.n, a.classes}, x.scalar_type(), std::nullopt, x.device()),
                       {channels_last(x), plain(weight)}};
  if (bias) {
    R3D_CHECK(bias->dim() == 1 && bias->size(0) == a.classes, "bias: expected shape [", a.classes, "], got ",
              text(sizes(*bias)));
    check_same(*bias, "bias", x);
    p.keep.push_back(plain(*bias));
    p.a.bias = p.keep.back().const_data_ptr();
  }
  if (p.y.numel() == 0) return p;
  p.a.x = p.keep[0].const_data_ptr();
  p.a.weight = p.keep[1].const_data_ptr();
  p.a.y = p.y.mutable_data_ptr();
  return p;
}

Prepared<BnActArgs> prepare_bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                   const std::optional<Tensor>& residual, const std::string& activation) {
  R3D_CHECK(x.dim() == 5, "x: expected 5 dimensions [N, C, D, H, W], got shape ", text(sizes(x)));
  Prepared<BnActArgs> p{{}, empty_channels_last(sizes(x), x), {}};
  p.a.dtype = dtype_of(x, "x", x.is_cuda());
  p.a.channels = x.size(1);
  p.a.rows = p.a.channels ? x.numel() / p.a.channels : 0;
  p.a.activation = activation_of(activation);
  auto vector = [&](const Tensor& t, const char* argument) {
    R3D_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == p.a.channels, argument,
              ": expected a float32 tensor of shape [", p.a.channels, "], got ", name(t.scalar_type()),
              " of shape ", text(sizes(t)));
    R3D_CHECK(t.is_cuda() == x.is_cuda() && t.get_device() == x.get_device(), argument,
              ": expected a tensor on the device of x");
    check_storage(t, argument);
    p.keep.push_back(plain(t));
    return static_cast<const float*>(p.keep.back().const_data_ptr());
  };
  p.a.scale = vector(scale, "scale");
  p.a.shift = vector(shift, "shift");
  p.keep.push_back(channels_last(x));
  p.a.x = p.keep.back().const_data_ptr();
  if (residual) {
    check_same(*residual, "residual", x);
    check_residual_shape(sizes(*residual), sizes(x));
    p.keep.push_back(channels_last(*residual));
    p.a.residual = p.keep.back().const_data_ptr();
  }
  p.a.y = p.y.numel() ? p.y.mutable_data_ptr() : nullptr;
  return p;
}

// ---- ops of no device

namespace {

// int[] input shape, weight shape, ... -> output shape. An empty residual shape means none.
Ints conv3d_check(Ints input, Ints weight, Ints stride, Ints padding, Ints dilation, int64_t groups,
                  Ints residual, std::string activation) {
  R3D_CHECK(weight.size() == 5, "weight: expected 5 dimensions [K, C/groups, T, R, S], got shape ",
            text(weight));
  activation_of(activation);
  const ConvGeometry g = geometry(input, weight[0], weight[1], {weight[2], weight[3], weight[4]}, stride,
                                  padding, dilation, groups);
  if (!residual.empty()) check_residual_shape(residual, output_shape(g));
  return output_shape(g);
}

// ---- fingerprint

// Four chains, since one multiplication has to wait for the one before.
class Hash {
 public:
  void add(uint64_t v) {
    uint64_t& lane = lane_[next_++ & 3];
    lane = step(lane ^ v);
  }
  void add(const unsigned char* p, int64_t bytes) {
    int64_t i = 0;
    uint64_t v[4];
    for (; i + 32 <= bytes; i += 32) {
      std::memcpy(v, p + i, 32);
      for (int j = 0; j < 4; ++j) lane_[j] = step(lane_[j] ^ v[j]);
    }
    for (; i < bytes; i += 8) {
      v[0] = 0;
      std::memcpy(v, p + i, static_cast<size_t>(std::min<int64_t>(8, bytes - i)));
      lane_[i / 8 & 3] = step(lane_[i / 8 & 3] ^ v[0]);
    }
  }
  uint64_t value() const {
    uint64_t h = 0;
    for (uint64_t lane : lane_) h = step(h ^ lane) ^ (h >> 29);
    return h;
  }

 private:
  static uint64_t step(uint64_t h) {
    h *= 0xff51afd7ed558ccdull;  // odd: two different values stay different
    return h ^ (h >> 32);
  }
  uint64_t lane_[4] = {0x9e3779b97f4a7c15ull, 0xbf58476d1ce4e5b9ull, 0x94d049bb133111ebull,
                       0x2545f4914f6cdd1dull};
  unsigned next_ = 0;
};

// 32 bytes in each of 256 blocks, at a place in its block that is as good as random: a fixed step would meet
// the same channel in every block of a weight whose sizes are powers of two.
void add_samples(Hash& hash, const unsigned char* p, int64_t bytes) {
  constexpr int64_t kBlocks = 256, kSample = 32;
  const int64_t places = bytes / kSample;
  if (places <= 2 * kBlocks) return hash.add(p, bytes);
  for (int64_t i = 0; i < kBlocks; ++i) {
    const int64_t begin = places * i / kBlocks, count = places * (i + 1) / kBlocks - begin;
    uint64_t random = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15ull;
    random = (random ^ (random >> 30)) * 0xbf58476d1ce4e5b9ull;
    random >>= 40;  // 24 bits of it: a multiplication in place of a division
    hash.add(p + kSample * (begin + (static_cast<int64_t>(random) * count >> 24)), kSample);
  }
  hash.add(p + bytes - kSample, kSample);
}

// A number that changes when what kernels derive from the tensors may have: where and how they lie in memory,
// and on a CPU the contents, which version counters do not follow through `.data`. The first one is a weight:
// most kernels read it where it lies, and nothing of it has to be watched then. Raises where a storage was
// freed.
int64_t fingerprint(std::vector<Tensor> tensors, int64_t contents) {
  Hash hash;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const bool readable = t.is_cpu();
    int64_t span = t.numel() ? 1 : 0;
    hash.add(static_cast<uint64_t>(t.scalar_type()) << 8 | static_cast<uint64_t>(t.dim()));
    for (int64_t d = 0; d < t.dim(); ++d) {
      hash.add(static_cast<uint64_t>(t.size(d)));
      hash.add(static_cast<uint64_t>(t.stride(d)));
      if (t.numel()) span += (t.size(d) - 1) * t.stride(d);
    }
    if (!span) continue;
    if (readable) check_storage(t, i ? "a parameter or statistic" : "weight");
    const auto* p = static_cast<const unsigned char*>(t.const_data_ptr());
    hash.add(reinterpret_cast<uint64_t>(p));
    if (!readable) continue;
    // Up to the last byte that the strides reach; what lies between them is read too, harmlessly.
    const int64_t bytes = span * static_cast<int64_t>(t.element_size());
    if (i || contents == 2)
      hash.add(p, bytes);
    else if (contents == 1)
      add_samples(hash, p, bytes);
  }
  return static_cast<int64_t>(hash.value());
}

#ifndef R3D_BUILD_TORCH
#define R3D_BUILD_TORCH "unknown"
#endif
#ifndef R3D_BUILD_CUDA
#define R3D_BUILD_CUDA ""
#endif
#ifndef R3D_BUILD_ARCHS
#define R3D_BUILD_ARCHS ""
#endif

// "key=value" lines
std::string describe() {
  std::ostringstream s;
  s << "isa=" << cpu::isa_name(cpu::active_isa()) << "\nbest_isa=" << cpu::isa_name(cpu::best_isa())
    << "\ncompiler=" << __VERSION__ << "\ntorch=" << R3D_BUILD_TORCH << "\ncuda=" << R3D_BUILD_CUDA
    << "\narchs=" << R3D_BUILD_ARCHS
#ifdef R3D_WITH_CUDA
    << "\ncuda_compiled=1"
#else
    << "\ncuda_compiled=0"
#endif
    << "\nthreads=" << torch::stable::get_num_threads();
  return s.str();
}

}  // namespace
}  // namespace r3d

STABLE_TORCH_LIBRARY(r3d_kernels, m) {
  m.def("conv3d_pack(Tensor weight, Tensor? scale, ScalarType dtype) -> Tensor");
  m.def(
      "conv3d_bias_act(Tensor x, Tensor packed, Tensor bias, Tensor? residual, int out_channels, int[] "
      "kernel_size, "
      "int[] stride, int[] padding, int[] dilation, str activation) -> Tensor");
  m.def(
      "conv3d_tiles(Tensor x, Tensor weight, Tensor? scale, Tensor bias, Tensor? residual, int[] stride, "
      "int[] "
      "padding, int[] dilation, str activation, int slices, int[] tile) -> Tensor");
  m.def(
      "conv3d_winograd(Tensor x, Tensor weight, Tensor? scale, Tensor bias, Tensor? residual, int[] stride, "
      "int[] padding, str activation, int[] tile) -> Tensor");
  m.def(
      "conv3d_direct(Tensor x, Tensor weight, Tensor? scale, Tensor bias, Tensor? residual, int[] stride, "
      "int[] padding, int[] dilation, str activation, Tensor? kept=None) -> Tensor");
  m.def("conv3d_keep(Tensor weight, int[] in_shape, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "conv3d_stem(Tensor x, Tensor weight, Tensor? scale, Tensor bias, Tensor? residual, int[] stride, "
      "int[] padding, str activation, int tile, int row_tile=1) -> Tensor");
  m.def("max_pool3d(Tensor x, int[] kernel_size, int[] stride, int[] padding) -> Tensor");
  m.def("avg_pool_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("bn_act(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str activation) -> Tensor");
  m.def(
      "conv3d_check(int[] input, int[] weight, int[] stride, int[] padding, int[] dilation, int groups, "
      "int[] residual, str activation) -> int[]");
  // contents: what of the first tensor, a weight, is read: 0 nothing, 1 samples, 2 all
  m.def("fingerprint(Tensor[] tensors, int contents) -> int");
  m.def("describe() -> str");
  m.def("release_free_outputs() -> ()");
#ifdef R3D_WITH_CUDA
  m.def("conv3d_sm80_pack(Tensor weight, ScalarType dtype, int[] stride, int[] dilation) -> Tensor");
  m.def(
      "conv3d_sm80(Tensor x, Tensor packed, Tensor? scale, Tensor bias, Tensor? residual, int out_channels, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, str activation, int tile=-1) -> "
      "Tensor");
  m.def(
      "conv3d_sm80_clip(Tensor x, Tensor? clip_scale, Tensor? clip_shift, Tensor packed, Tensor? scale, "
      "Tensor bias, int out_channels, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "str activation, int tile=-1) -> Tensor");
  m.def("clip_channels_last(Tensor x, Tensor? scale, Tensor? shift, ScalarType dtype) -> Tensor");
  m.def("conv3d_sm80_row(int[] weight, ScalarType dtype, int[] stride, int[] dilation) -> int");
  m.def(
      "conv3d_sm80_refuses(int[] input, int[] weight, ScalarType dtype, int[] stride, int[] padding, int[] "
      "dilation) -> str");
  m.def(
      "conv3d_sm80_choice(int[] input, int[] weight, ScalarType dtype, int[] stride, int[] padding, int[] "
      "dilation, int multiprocessors, int tile=-1) -> int[]");
  m.def("conv3d_sm90_lend(Tensor? counters) -> ()");
#endif
  // tiles: bits of the tiles to choose from, for tests; split: parts of the sum, 0 for any
  m.def(
      "conv3d_sm90(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor? residual, int[] stride, int[] "
      "padding, int[] dilation, str activation, int tiles=-1, int split=0) -> Tensor");
  m.def(
      "conv3d_sm90_refuses(int[] input, int[] weight, int[] stride, int[] padding, int[] dilation, "
      "ScalarType dtype) -> str");
  m.def(
      "conv3d_sm90_choice(int[] input, int[] weight, int[] stride, int[] padding, int[] dilation, int "
      "multiprocessors, int tiles=-1) -> int[]");
  // kind: which width of tile, for tests; pool_frames: of the windows of a max-pool behind it, 0 for none
  m.def(
      "conv3d_sm90_stem(Tensor x, Tensor? clip_scale, Tensor? clip_shift, Tensor packed, Tensor scale, "
      "Tensor bias, int out_channels, int[] kernel_size, int[] stride, int[] padding, str activation, int "
      "kind=-1, int pool_frames=0) -> Tensor");
  m.def(
      "conv3d_sm90_stem_refuses(int[] input, int[] weight, int[] stride, int[] padding, int[] dilation, "
      "ScalarType dtype, int pool_frames=0) -> str");
  m.def("conv3d_sm90_stem_layout(int[] weight, int[] stride) -> int[]");
}

// Large outputs are tensors made by this function from now on.
extern "C" __attribute__((visibility("default"))) void r3d_make_tensors_by(void* tensor_over) {
  r3d::g_tensor_over.store(reinterpret_cast<r3d::TensorOver>(tensor_over), std::memory_order_release);
}

STABLE_TORCH_LIBRARY_IMPL(r3d_kernels, CompositeExplicitAutograd, m) {
  m.impl("conv3d_check", TORCH_BOX(&r3d::conv3d_check));
  m.impl("describe", TORCH_BOX(&r3d::describe));
  m.impl("release_free_outputs", TORCH_BOX(&r3d::cpu::release_free));
  m.impl("fingerprint", TORCH_BOX(&r3d::fingerprint));
}
