// Schemas and argument checks of every op, once for all devices. Uses torch's stable ABI only, so that one
// binary serves every supported torch. Kernels get pointers and structs from here, never tensors.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv3d.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/recycle.h"
#include "cpu/stem.h"
#include "cpu/tiles.h"
#include "cuda/conv3d_sm80.h"
#include "cuda/conv3d_sm90.h"
#include "cuda/conv3d_sm90_stem.h"
#include "cuda/pool.h"
#include "norm.h"

#ifdef R3D_WITH_CUDA
// Lives in libtorch_cuda, which a CPU build of torch does not have: weak, and only called with CUDA tensors.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace r3d {
namespace {

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

// The one place where the geometry of a convolution is judged.
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

DType dtype_of(const Tensor& t, const char* argument, bool half_allowed = false) {
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
    return torch::stable::from_blob(memory, shape, Ints{n, 1, d, h, w}, like.device(), like.scalar_type(),
                                    &cpu::give_back);
  }
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast3d);
}

// ---- convolution
// ---------------------------------------------------------------------------------------------------

Tensor conv3d_pack_cpu(Tensor weight, std::optional<Tensor> scale, ScalarType dtype) {
  R3D_CHECK(weight.dim() == 5, "weight: expected 5 dimensions [K, C, T, R, S], got shape ",
            text(sizes(weight)));
  R3D_CHECK(weight.numel() > 0, "weight: expected at least one element, got shape ", text(sizes(weight)));
  R3D_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
            "dtype: expected float32 or bfloat16, got ", name(dtype));
  const int64_t k = weight.size(0);
  const double* factors = nullptr;
  Tensor s = weight;
  if (scale) {
    R3D_CHECK(scale->scalar_type() == ScalarType::Double && scale->dim() == 1 && scale->size(0) == k &&
                  scale->is_cpu(),
              "scale: expected a float64 CPU tensor of shape [", k, "]");
    s = plain(*scale);
    factors = static_cast<const double*>(s.const_data_ptr());
  }
  const DType type = dtype == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
  cpu::Isa isa = cpu::active_isa();
  // Folded weights rounded to bfloat16 would be wrong by the same amount for every pixel, which nothing
  // averages out: they stay float32. vdpbf16ps gets weights that are bfloat16 already.
  if (scale && isa >= cpu::Isa::kAvx512Bf16) isa = cpu::Isa::kAvx512;
  const cpu::KernelTraits traits = cpu::kernel_traits(isa, type);
  const Dim3 kernel{weight.size(2), weight.size(3), weight.size(4)};
  const int64_t c = weight.size(1);
  Tensor packed = torch::stable::empty(Ints{cpu::packed_bytes(k, c, kernel, traits)}, ScalarType::Byte);
  // Multiplied in float64 while it is copied: no wide copy of the weights.
  auto pack = [&](const auto* w) {
    cpu::pack_weights(w, factors, k, c, kernel, traits, packed.mutable_data_ptr());
  };
  const ScalarType stored = weight.scalar_type();
  const bool as_it_is =
      stored == ScalarType::Float || stored == ScalarType::Double || stored == ScalarType::BFloat16;
  const Tensor w = plain(as_it_is ? weight : torch::stable::to(weight, ScalarType::Float));
  if (stored == ScalarType::Double)
    pack(static_cast<const double*>(w.const_data_ptr()));
  else if (stored == ScalarType::BFloat16)
    pack(static_cast<const uint16_t*>(w.const_data_ptr()));
  else
    pack(static_cast<const float*>(w.const_data_ptr()));
  return packed;
}

Tensor conv3d_bias_act_cpu(Tensor x, Tensor packed, Tensor bias, std::optional<Tensor> residual,
                           int64_t out_channels, Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                           std::string activation) {
  const Ints input = sizes(x);
  ConvArgs a{};
  a.activation = activation_of(activation);
  R3D_CHECK(input.size() == 5, "x: expected 5 dimensions [N, C, D, H, W], got shape ", text(input));
  a.g = geometry(input, out_channels, input[1], kernel_size, stride, padding, dilation, 1);
  a.dtype = dtype_of(x, "x");
  R3D_CHECK(bias.is_cpu() && bias.scalar_type() == ScalarType::Float && bias.dim() == 1 &&
                bias.size(0) == out_channels,
            "bias: expected a float32 CPU tensor of shape [", out_channels, "], got ",
            name(bias.scalar_type()), " of shape ", text(sizes(bias)));
  R3D_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 &&
                packed.is_contiguous(),
            "packed: expected the contiguous uint8 CPU tensor that conv3d_pack returned");
  const char* wrong = cpu::check_packed(packed.const_data_ptr(), packed.numel(), a.g, a.dtype);
  R3D_CHECK(!wrong, "packed: ", wrong ? wrong : "");
  const Tensor xl = channels_last(x), b = plain(bias);
  Tensor r = xl;
  if (residual) {
    check_same(*residual, "residual", x);
    check_residual_shape(sizes(*residual), output_shape(a.g));
    r = channels_last(*residual);
    a.residual = r.const_data_ptr();
  }
  Tensor y = empty_channels_last(output_shape(a.g), x);
  if (y.numel() == 0) return y;
  a.x = xl.const_data_ptr();
  a.weight = packed.const_data_ptr();
  a.bias = static_cast<const float*>(b.const_data_ptr());
  a.y = y.mutable_data_ptr();
  cpu::conv3d(a);
  return y;
}

// A kernel that reads the parameter itself. Args: conv, scale, weight_channels_last. refuses(a) says what the
// kernel cannot do, place(a, x) brings x into a layout that it reads, run(a) runs it.
template <class Args, class Refuses, class Place, class Run>
Tensor on_parameter(Args a, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                    const Tensor& bias, const std::optional<Tensor>& residual, const Ints& stride,
                    const Ints& padding, const Ints& dilation, const std::string& activation, Refuses refuses,
                    Place place, Run run) {
  const Ints input = sizes(x), w = sizes(weight);
  R3D_CHECK(w.size() == 5, "weight: expected 5 dimensions [K, C, T, R, S], got shape ", text(w));
  a.conv.activation = activation_of(activation);
  a.conv.g = geometry(input, w[0], w[1], {w[2], w[3], w[4]}, stride, padding, dilation, 1);
  a.conv.dtype = dtype_of(x, "x");
  check_same(weight, "weight", x);
  if (const std::string why_not = refuses(a); !why_not.empty()) fail(why_not);
  auto vector = [&](const Tensor& t, const char* argument) {
    R3D_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == w[0],
              argument, ": expected a float32 CPU tensor of shape [", w[0], "], got ", name(t.scalar_type()),
              " of shape ", text(sizes(t)));
    return plain(t);
  };
  a.weight_channels_last = !weight.is_contiguous() && is_channels_last(weight);
  const Tensor xp = place(a, x), wp = a.weight_channels_last ? weight : plain(weight);
  const Tensor b = vector(bias, "bias"), s = scale ? vector(*scale, "scale") : b;
  Tensor r = xp;
  if (residual) {
    check_same(*residual, "residual", x);
    check_residual_shape(sizes(*residual), output_shape(a.conv.g));
    r = channels_last(*residual);
    a.conv.residual = r.const_data_ptr();
  }
  Tensor y = empty_channels_last(output_shape(a.conv.g), x);
  if (y.numel() == 0) return y;
  a.conv.x = xp.const_data_ptr();
  a.conv.weight = wp.const_data_ptr();
  a.conv.bias = static_cast<const float*>(b.const_data_ptr());
  a.scale = scale ? static_cast<const float*>(s.const_data_ptr()) : nullptr;
  a.conv.y = y.mutable_data_ptr();
  run(a);
  return y;
}

constexpr auto kChannelsLast = [](const auto&, const Tensor& x) { return channels_last(x); };

// A tile that the caller asks for: outputs along depth, height and width.
cpu::WinogradTile tile_of(const Ints& tile) {
  R3D_CHECK(tile.size() == 3, "tile: expected 3 integers (depth, height, width), got ", tile.size());
  for (int64_t m : tile) R3D_CHECK(m >= 1 && m <= 4, "tile: expected integers 1 to 4, got ", text(tile));
  return {static_cast<int>(tile[0]), static_cast<int>(tile[1]), static_cast<int>(tile[2])};
}

Tensor conv3d_direct_cpu(Tensor x, Tensor weight, std::optional<Tensor> scale, Tensor bias,
                         std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation,
                         std::string activation, std::optional<Tensor> kept) {
  Tensor k = kept ? plain(*kept) : x;
  return on_parameter(
      cpu::DirectArgs{}, x, weight, scale, bias, residual, stride, padding, dilation, activation,
      [&](const cpu::DirectArgs& a) -> std::string {
        if (!kept) return "";
        if (!k.is_cpu() || k.scalar_type() != ScalarType::Byte || k.dim() != 1)
          return std::string("kept: expected a 1-dimensional uint8 CPU tensor, got ") +
                 name(k.scalar_type()) + " of shape " + text(sizes(k));
        const char* wrong = cpu::check_kept(k.const_data_ptr(), k.numel(), a);
        return wrong ? std::string("kept: ") + wrong : "";
      },
      kChannelsLast,
      [&](cpu::DirectArgs a) {
        a.kept = kept ? k.const_data_ptr() : nullptr;
        cpu::conv3d_direct(a);
      });
}

Tensor conv3d_keep_cpu(Tensor weight, Ints input, Ints stride, Ints padding, Ints dilation) {
  const Ints w = sizes(weight);
  R3D_CHECK(w.size() == 5, "weight: expected 5 dimensions [K, C, T, R, S], got shape ", text(w));
  cpu::DirectArgs a{};
  a.conv.g = geometry(input, w[0], w[1], {w[2], w[3], w[4]}, stride, padding, dilation, 1);
  a.conv.dtype = dtype_of(weight, "weight");
  a.weight_channels_last = !weight.is_contiguous() && is_channels_last(weight);
  const Tensor wp = a.weight_channels_last ? weight : plain(weight);
  a.conv.weight = wp.const_data_ptr();
  Tensor kept = torch::stable::empty(Ints{cpu::keep_weights(a, nullptr)}, ScalarType::Byte);
  if (kept.numel()) cpu::keep_weights(a, kept.mutable_data_ptr());
  return kept;
}

Tensor conv3d_tiles_cpu(Tensor x, Tensor weight, std::optional<Tensor> scale, Tensor bias,
                        std::optional<Tensor> residual, Ints stride, Ints padding, Ints dilation,
                        std::string activation, int64_t slices, Ints tile) {
  cpu::TilesArgs args{};
  args.tile = tile_of(tile);
  R3D_CHECK(slices >= 1 && slices <= 3, "slices: expected 1, 2 or 3, got ", slices);
  args.slices = static_cast<int>(slices);
  args.weight_dtype = dtype_of(weight, "weight");
  return on_parameter(
      args, x, weight, scale, bias, residual, stride, padding, dilation, activation,
      [](const cpu::TilesArgs& a) {
        const char* why_not = cpu::tiles_refuse(a);
        return std::string(why_not ? why_not : "");
      },
      kChannelsLast,
      [](const cpu::TilesArgs& a) { cpu::conv3d_tiles(a, cpu::active_isa() == cpu::Isa::kAmx); });
}

Tensor conv3d_winograd_cpu(Tensor x, Tensor weight, std::optional<Tensor> scale, Tensor bias,
                           std::optional<Tensor> residual, Ints stride, Ints padding, std::string activation,
                           Ints tile) {
  cpu::WinogradArgs args{};
  args.tile = tile_of(tile);
  const cpu::WinogradTile known = cpu::winograd_tile(args.tile.code());
  std::string tiles;
  for (const cpu::WinogradTile& t : cpu::kWinogradTiles)
    tiles += (tiles.empty() ? "" : ", ") + text({t.d, t.h, t.w});
  R3D_CHECK(known.d, "tile: expected one of ", tiles, ", got ", text(tile));
  return on_parameter(
      args, x, weight, scale, bias, residual, stride, padding, {1, 1, 1}, activation,
      [&](const cpu::WinogradArgs& a) {
        const char* why_not = cpu::winograd_refuses(a.tile, a.conv.g);
        return why_not ? "tile: " + text(tile) + ", kernel " +
                             text({a.conv.g.kernel.d, a.conv.g.kernel.h, a.conv.g.kernel.w}) + ", stride " +
                             text(stride) + ": " + why_not
                       : "";
      },
      kChannelsLast, [](const cpu::WinogradArgs& a) { cpu::conv3d_winograd(a); });
}

Tensor conv3d_stem_cpu(Tensor x, Tensor weight, std::optional<Tensor> scale, Tensor bias,
                       std::optional<Tensor> residual, Ints stride, Ints padding, std::string activation,
                       int64_t tile, int64_t row_tile) {
  R3D_CHECK(tile >= 1 && tile <= 8, "tile: expected 1, 2, 4, 6 or 8, got ", tile);
  R3D_CHECK(row_tile >= 1 && row_tile <= 4, "row_tile: expected 1, 2 or 4, got ", row_tile);
  cpu::StemArgs args{};
  args.tile = static_cast<int>(tile);
  args.row_tile = static_cast<int>(row_tile);
  return on_parameter(
      args, x, weight, scale, bias, residual, stride, padding, {1, 1, 1}, activation,
      [&](const cpu::StemArgs& a) {
        const char* why_not = cpu::stem_refuses(a.conv.g, a.tile, a.row_tile);
        return why_not
                   ? why_not + (": got weight " + text(sizes(weight)) + ", stride " + text(stride) +
                                ", tile " + std::to_string(tile) + ", row_tile " + std::to_string(row_tile))
                   : std::string();
      },
      // A clip is read where it lies: planes of one channel each, or pixels with their channels side by side.
      [](cpu::StemArgs& a, const Tensor& clip) {
        a.planes = clip.stride(4) == 1 || clip.size(4) == 1;
        const bool pixels = (clip.stride(1) == 1 || clip.size(1) == 1) && clip.stride(4) == clip.size(1);
        const Tensor placed = a.planes || pixels ? clip : channels_last(clip);
        a.x_n = placed.stride(0);
        a.x_c = placed.stride(1);
        a.x_d = placed.stride(2);
        a.x_h = placed.stride(3);
        return placed;
      },
      [](const cpu::StemArgs& a) { cpu::conv3d_stem(a); });
}

// ---- pooling and head
// ------------------------------------------------------------------------------------------------

// Checks, output and arguments for any device; `keep` holds the tensors that the arguments point into.
struct Pool {
  PoolArgs a{};
  Tensor y;
  std::vector<Tensor> keep;
};

Pool prepare_max_pool3d(const Tensor& x, const Ints& kernel_size, const Ints& stride, const Ints& padding) {
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
  Pool p{a, empty_channels_last({a.n, a.c, a.out.d, a.out.h, a.out.w}, x), {channels_last(x)}};
  if (p.y.numel() == 0) return p;
  p.a.x = p.keep[0].const_data_ptr();
  p.a.y = p.y.mutable_data_ptr();
  return p;
}

Tensor max_pool3d_cpu(Tensor x, Ints kernel_size, Ints stride, Ints padding) {
  const Pool p = prepare_max_pool3d(x, kernel_size, stride, padding);
  if (p.y.numel()) cpu::max_pool3d(p.a);
  return p.y;
}

struct Head {
  HeadArgs a{};
  Tensor y;
  std::vector<Tensor> keep;
};

Head prepare_avg_pool_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
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
  Head p{a,
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

Tensor avg_pool_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const Head p = prepare_avg_pool_linear(x, weight, bias);
  if (p.y.numel()) cpu::avg_pool_linear(p.a);
  return p.y;
}

// ---- batch-norm application
// ----------------------------------------------------------------------------------------

// Checks, output and arguments for any device; `keep` holds the tensors that the arguments point into.
struct BnAct {
  BnActArgs a{};
  Tensor y;
  std::vector<Tensor> keep;
};

BnAct prepare_bn_act(const Tensor& x, const Tensor& scale, const Tensor& shift,
                     const std::optional<Tensor>& residual, const std::string& activation) {
  R3D_CHECK(x.dim() == 5, "x: expected 5 dimensions [N, C, D, H, W], got shape ", text(sizes(x)));
  BnAct p{{}, empty_channels_last(sizes(x), x), {}};
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

Tensor bn_act_cpu(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual,
                  std::string activation) {
  BnAct p = prepare_bn_act(x, scale, shift, residual, activation);
  if (p.y.numel()) cpu::bn_act(p.a);
  return p.y;
}

#ifdef R3D_WITH_CUDA
Tensor bn_act_cuda(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual,
                   std::string activation) {
  R3D_CHECK(aoti_torch_get_current_cuda_stream, "x: a CUDA tensor, but this torch has no CUDA library");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  BnAct p = prepare_bn_act(x, scale, shift, residual, activation);
  if (!p.y.numel()) return p.y;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
  const char* error = cuda::bn_act(p.a, stream);
  R3D_CHECK(!error, "r3d_kernels::bn_act on shape ", text(sizes(x)), ": ", error ? error : "");
  return p.y;
}
#endif

#ifdef R3D_WITH_CUDA
// ---- CUDA: the convolution for compute capability 8.0 and later, pooling and head
// ---------------------------------------------------------------------------------------------------

void* current_stream(const Tensor& x) {
  R3D_CHECK(aoti_torch_get_current_cuda_stream, "x: a CUDA tensor, but this torch has no CUDA library");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
  return stream;
}

// "n2c64d8h28w28k128 kernel [3, 3, 3] ...": what an error of the device is reported with.
std::string geometry_text(const ConvGeometry& g) {
  std::ostringstream s;
  s << 'n' << g.n << 'c' << g.c << 'd' << g.in.d << 'h' << g.in.h << 'w' << g.in.w << 'k' << g.k;
  const struct {
    const char* name;
    Dim3 value;
  } parts[] = {{"kernel", g.kernel}, {"stride", g.stride}, {"padding", g.padding}, {"dilation", g.dilation}};
  for (const auto& p : parts) s << ' ' << p.name << ' ' << text({p.value.d, p.value.h, p.value.w});
  return s.str();
}

void check_sm80(const ConvGeometry& g, DType dtype) {
  const char* why_not = cuda::sm80::refuses(g, dtype);
  R3D_CHECK(!why_not, "kernel_size: ", geometry_text(g), ": ", why_not ? why_not : "");
}

// Sizes that need no input: what packing depends on.
ConvGeometry packing_geometry(const Ints& weight, const Ints& stride, const Ints& dilation) {
  R3D_CHECK(weight.size() == 5, "weight: expected 5 dimensions [K, C, T, R, S], got shape ", text(weight));
  for (int64_t size : weight)
    R3D_CHECK(size > 0, "weight: expected at least one element, got shape ", text(weight));
  ConvGeometry g{};
  g.k = weight[0];
  g.c = weight[1];
  g.kernel = {weight[2], weight[3], weight[4]};
  g.stride = triple(stride, "stride", 1);
  g.dilation = triple(dilation, "dilation", 1);
  return g;
}

Tensor conv3d_sm80_pack_cuda(Tensor weight, ScalarType dtype, Ints stride, Ints dilation) {
  const ConvGeometry g = packing_geometry(sizes(weight), stride, dilation);
  R3D_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
            "dtype: expected float32, bfloat16 or float16, got ", name(dtype));
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device());
  void* stream = current_stream(weight);
  const Tensor w = plain(
      weight.scalar_type() == ScalarType::Double ? torch::stable::to(weight, ScalarType::Float) : weight);
  const DType from = dtype_of(w, "weight", true);
  Tensor packed = torch::stable::empty(Ints{1}, dtype, std::nullopt, weight.device());
  const DType to = dtype_of(packed, "dtype", true);
  check_sm80(g, to);
  packed = torch::stable::empty(Ints{g.k, cuda::sm80::layout_of(g, to).row_elements}, dtype, std::nullopt,
                                weight.device());
  const char* error = cuda::sm80::pack(g, from, w.const_data_ptr(), to, packed.mutable_data_ptr(), stream);
  R3D_CHECK(!error, "r3d_kernels::conv3d_sm80_pack on weight ", text(sizes(weight)), ": ",
            error ? error : "");
  return packed;
}

// ---- activations in rows: channels innermost, pixels one after the other at whole multiples of 16 bytes,
// which is what TMA and cp.async read. What lies between the channels of one pixel and the next is nobody's.

// Elements from a pixel of t [N, C, D, H, W] to the next where it lies so, else 0.
int64_t rows_pitch(const Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 || (t.size(1) > 1 && t.stride(1) != 1)) return 0;
  const int64_t unit = 16 / static_cast<int64_t>(t.element_size());
  int64_t pixels = 1, pitch = (t.size(1) + unit - 1) / unit * unit;  // of a single pixel
  for (int64_t axis : {4, 3, 2, 0}) {
    if (t.size(axis) == 1) continue;
    if (pixels == 1) pitch = t.stride(axis);
    if (t.stride(axis) != pitch * pixels) return 0;
    pixels *= t.size(axis);
  }
  return pitch % unit == 0 && pitch >= t.size(1) ? pitch : 0;
}

// torch::stable::empty looks its operator up by name at every call.
Tensor uninitialized(const Ints& shape, const Ints& strides, ScalarType dtype, const Tensor& like) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               device_type, like.get_device(), &made));
  return Tensor(made);
}

// [N, C, D, H, W] at the smallest pitch.
Tensor empty_rows(const Ints& shape, const Tensor& like) {
  const int64_t unit = 16 / static_cast<int64_t>(like.element_size());
  Ints wide = shape;
  wide[1] = (shape[1] + unit - 1) / unit * unit;
  if (like.is_cuda() && wide[1] == shape[1]) {
    const int64_t w = shape[1], h = shape[4] * w, d = shape[3] * h, n = shape[2] * d;
    return uninitialized(shape, {n, 1, d, h, w}, like.scalar_type(), like);
  }
  Tensor rows = empty_channels_last(wide, like);
  return wide[1] == shape[1] ? rows : torch::stable::narrow(rows, 1, 0, shape[1]);
}

// t itself where it lies in rows, else a copy. `op` asks for it.
Tensor in_rows(const Tensor& t, DType dtype, void* stream, const char* op) {
  if (t.numel() == 0 || rows_pitch(t)) return t;
  Tensor rows = empty_rows(sizes(t), t);
  const cuda::sm80::Rows copy{t.size(0),
                              t.size(1),
                              {t.size(2), t.size(3), t.size(4)},
                              {t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.stride(4)},
                              t.const_data_ptr(),
                              0,
                              t.size(4),
                              cuda::sm80::pitch_of(t.size(1), dtype),
                              rows.mutable_data_ptr()};
  const char* error = cuda::sm80::to_rows(copy, dtype, stream);
  R3D_CHECK(!error, "r3d_kernels::", op, ": copying a tensor of shape ", text(sizes(t)), ": ",
            error ? error : "");
  return rows;
}

// The code of csrc/cuda/conv3d_sm80.h for what a clip is made of.
int clip_source(const Tensor& x, const char* argument) {
  return x.scalar_type() == ScalarType::Byte ? 3 : static_cast<int>(dtype_of(x, argument, true));
}

// One number a channel of x, float32; null where there are none.
const float* clip_vector(const std::optional<Tensor>& t, const char* argument, const Tensor& x) {
  if (!t) return nullptr;
  R3D_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 1 && t->size(0) == x.size(1) &&
                t->is_contiguous() && t->is_cuda() && t->get_device() == x.get_device(),
            argument, ": expected a contiguous float32 tensor of shape [", x.size(1),
            "] on the device of x, got ", name(t->scalar_type()), " of shape ", text(sizes(*t)));
  return static_cast<const float*>(t->const_data_ptr());
}

// x is of the dtype of packed, or a clip that becomes so.
Tensor sm80(const Tensor& x, const cuda::sm80::ClipSource& clip, const Tensor& packed,
            const std::optional<Tensor>& scale, const Tensor& bias, const std::optional<Tensor>& residual,
            int64_t out_channels, const Ints& kernel_size, const Ints& stride, const Ints& padding,
            const Ints& dilation, const std::string& activation, int64_t tile) {
  const Ints input = sizes(x);
  R3D_CHECK(input.size() == 5, "x: expected 5 dimensions [N, C, D, H, W], got shape ", text(input));
  R3D_CHECK(tile >= -1 && tile < 3, "tile: expected -1 (the predicted one) to 2, got ", tile);
  cuda::sm80::Call call{};
  call.clip = clip;
  ConvArgs& a = call.conv;
  a.activation = activation_of(activation);
  a.g = geometry(input, out_channels, input[1], kernel_size, stride, padding, dilation, 1);
  a.dtype = clip.from < 0 ? dtype_of(x, "x", true) : dtype_of(packed, "packed", true);
  check_sm80(a.g, a.dtype);
  const Ints expected{a.g.k, cuda::sm80::layout_of(a.g, a.dtype).row_elements};
  if (clip.from < 0) check_same(packed, "packed", x);
  R3D_CHECK(packed.is_cuda() && packed.get_device() == x.get_device(),
            "packed: expected a tensor on the device of x");
  R3D_CHECK(sizes(packed) == expected && packed.is_contiguous(),
            "packed: expected the tensor that conv3d_sm80_pack returned for this geometry, of shape ",
            text(expected), ", got ", text(sizes(packed)));
  const auto vector = [&](const Tensor& t, const char* argument) {
    R3D_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == out_channels &&
                  t.is_contiguous(),
              argument, ": expected a contiguous float32 tensor of shape [", out_channels, "], got ",
              name(t.scalar_type()), " of shape ", text(sizes(t)));
    R3D_CHECK(t.is_cuda() && t.get_device() == x.get_device(), argument,
              ": expected a tensor on the device of x");
    return static_cast<const float*>(t.const_data_ptr());
  };
  a.bias = vector(bias, "bias");
  call.scale = scale ? vector(*scale, "scale") : nullptr;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  void* stream = current_stream(x);
  Tensor r = x;
  if (residual) {
    check_same(*residual, "residual", packed);
    check_residual_shape(sizes(*residual), output_shape(a.g));
  }
  Tensor y = empty_rows(output_shape(a.g), packed);
  if (y.numel() == 0) return y;
  if (residual) {
    r = in_rows(*residual, a.dtype, stream, "conv3d_sm80");
    a.residual = r.const_data_ptr();
    call.residual_pitch = rows_pitch(r);
  }
  call.y_pitch = cuda::sm80::pitch_of(a.g.k, a.dtype);
  a.x = x.const_data_ptr();
  call.x = {x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
  a.weight = packed.const_data_ptr();
  a.y = y.mutable_data_ptr();
  call.multiprocessors = cuda::sm80::device_multiprocessors();
  R3D_CHECK(call.multiprocessors > 0, "x: the CUDA runtime finds no device ", x.get_device());
  call.choice = cuda::sm80::choose(a.g, a.dtype, call.multiprocessors, static_cast<int>(tile));
  R3D_CHECK(call.choice.splits > 0, "tile: ", tile, " has no room for the offsets of kernel ",
            text(kernel_size));
  const int64_t bytes = cuda::sm80::workspace_bytes(call);
  Tensor scratch = y;  // torch's allocator keeps it for this stream, in a graph capture too
  if (bytes) scratch = torch::stable::empty(Ints{bytes}, ScalarType::Byte, std::nullopt, x.device());
  const char* error = cuda::sm80::run(call, bytes ? scratch.mutable_data_ptr() : nullptr, stream);
  R3D_CHECK(!error, "r3d_kernels::conv3d_sm80 on ", geometry_text(a.g), ' ', name(y.scalar_type()), ": ",
            error ? error : "");
  return y;
}

Tensor conv3d_sm80_cuda(Tensor x, Tensor packed, std::optional<Tensor> scale, Tensor bias,
                        std::optional<Tensor> residual, int64_t out_channels, Ints kernel_size, Ints stride,
                        Ints padding, Ints dilation, std::string activation, int64_t tile) {
  return sm80(x, {}, packed, scale, bias, residual, out_channels, kernel_size, stride, padding, dilation,
              activation, tile);
}

// The same of a clip as a decoder leaves it: of x * clip_scale[c] + clip_shift[c], in the dtype of packed.
Tensor conv3d_sm80_clip_cuda(Tensor x, std::optional<Tensor> clip_scale, std::optional<Tensor> clip_shift,
                             Tensor packed, std::optional<Tensor> scale, Tensor bias, int64_t out_channels,
                             Ints kernel_size, Ints stride, Ints padding, Ints dilation,
                             std::string activation, int64_t tile) {
  R3D_CHECK(x.dim() == 5, "x: expected 5 dimensions [N, C, D, H, W], got shape ", text(sizes(x)));
  const cuda::sm80::ClipSource clip{clip_source(x, "x"), clip_vector(clip_scale, "clip_scale", x),
                                    clip_vector(clip_shift, "clip_shift", x)};
  return sm80(x, clip, packed, scale, bias, std::nullopt, out_channels, kernel_size, stride, padding,
              dilation, activation, tile);
}

Tensor max_pool3d_cuda(Tensor x, Ints kernel_size, Ints stride, Ints padding) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  void* stream = current_stream(x);
  const Pool p = prepare_max_pool3d(x, kernel_size, stride, padding);
  if (!p.y.numel()) return p.y;
  const char* error = cuda::max_pool3d(p.a, stream);
  R3D_CHECK(!error, "r3d_kernels::max_pool3d on shape ", text(sizes(x)), " kernel_size ", text(kernel_size),
            " stride ", text(stride), " padding ", text(padding), ": ", error ? error : "");
  return p.y;
}

Tensor avg_pool_linear_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  void* stream = current_stream(x);
  const Head p = prepare_avg_pool_linear(x, weight, bias);
  if (!p.y.numel()) return p.y;
  Tensor means = torch::stable::empty(Ints{p.a.n, p.a.c}, ScalarType::Float, std::nullopt, x.device());
  const char* error = cuda::avg_pool_linear(p.a, static_cast<float*>(means.mutable_data_ptr()), stream);
  R3D_CHECK(!error, "r3d_kernels::avg_pool_linear on shape ", text(sizes(x)), " with ", p.a.classes,
            " classes: ", error ? error : "");
  return p.y;
}

// [N, C, D, H, W] of any layout and dtype, uint8 too, to channels-last `dtype`: x * scale[c] + shift[c].
Tensor clip_channels_last_cuda(Tensor x, std::optional<Tensor> scale, std::optional<Tensor> shift,
                               ScalarType dtype) {
  R3D_CHECK(x.dim() == 5, "x: expected 5 dimensions [N, C, D, H, W], got shape ", text(sizes(x)));
  R3D_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
            "dtype: expected float32, bfloat16 or float16, got ", name(dtype));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  void* stream = current_stream(x);
  cuda::sm80::ClipArgs a{};
  a.scale = clip_vector(scale, "scale", x);
  a.shift = clip_vector(shift, "shift", x);
  a.from = clip_source(x, "x");
  Tensor y = torch::stable::empty(sizes(x), dtype, std::nullopt, x.device(), std::nullopt,
                                  MemoryFormat::ChannelsLast3d);
  if (!y.numel()) return y;
  a.to = dtype_of(y, "dtype", true);
  a.rows = {x.size(0),
            x.size(1),
            {x.size(2), x.size(3), x.size(4)},
            {x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)},
            x.const_data_ptr(),
            0,
            x.size(4),
            x.size(1),
            y.mutable_data_ptr()};
  const char* error = cuda::sm80::clip(a, stream);
  R3D_CHECK(!error, "r3d_kernels::clip_channels_last on shape ", text(sizes(x)), ": ", error ? error : "");
  return y;
}

// Shapes for the fakes, and why a geometry does not run: "" where it does.
int64_t conv3d_sm80_row(Ints weight, ScalarType dtype, Ints stride, Ints dilation) {
  return cuda::sm80::layout_of(packing_geometry(weight, stride, dilation),
                               dtype == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16)
      .row_elements;
}
std::string conv3d_sm80_refuses(Ints input, Ints weight, ScalarType dtype, Ints stride, Ints padding,
                                Ints dilation) {
  const ConvGeometry g =
      geometry(input, weight[0], weight[1], {weight[2], weight[3], weight[4]}, stride, padding, dilation, 1);
  const char* why_not =
      cuda::sm80::refuses(g, dtype == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16);
  return why_not ? why_not : "";
}

// [tile, splits, predicted cycles] of all tiles or of one; empty where none can run.
Ints conv3d_sm80_choice(Ints input, Ints weight, ScalarType dtype, Ints stride, Ints padding, Ints dilation,
                        int64_t multiprocessors, int64_t tile) {
  const ConvGeometry g =
      geometry(input, weight[0], weight[1], {weight[2], weight[3], weight[4]}, stride, padding, dilation, 1);
  const cuda::sm80::Choice c =
      cuda::sm80::choose(g, dtype == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16,
                         static_cast<int>(multiprocessors), static_cast<int>(tile));
  return c.splits ? Ints{c.tile, c.splits, static_cast<int64_t>(c.cycles)} : Ints{};
}
#endif

// ---- what the package knows of itself
// ------------------------------------------------------------------------------

// A number that changes when the bytes of the tensors change. Version counters miss writes through `.data`;
// this sees them: tensors up to 16 KiB are read whole, larger ones at 256 places spread evenly, or whole when
// `full`.
int64_t fingerprint_cpu(std::vector<Tensor> tensors, bool full) {
  uint64_t hash = 0x9e3779b97f4a7c15ull;
  auto mix = [&hash](uint64_t v) {
    hash ^= v;
    hash *= 0xff51afd7ed558ccdull;
    hash ^= hash >> 32;
  };
  for (const Tensor& t : tensors) {
    if (!t.is_cpu() || t.numel() == 0) continue;
    const auto* p = static_cast<const unsigned char*>(t.const_data_ptr());
    // one past the last byte that the strides reach (a view may be sparse: what lies between is read too,
    // harmlessly)
    int64_t span = 1;
    for (int64_t d = 0; d < t.dim(); ++d) span += (t.size(d) - 1) * t.stride(d);
    const int64_t bytes = span * static_cast<int64_t>(t.element_size()), words = bytes / 8;
    const int64_t step = full || bytes <= 16384 ? 1 : words / 256;
    uint64_t v = 0;
    for (int64_t i = 0; i < words; i += step) {
      std::memcpy(&v, p + 8 * i, 8);
      mix(v);
    }
    v = 0;
    std::memcpy(&v, p + 8 * words, static_cast<size_t>(bytes - 8 * words));
    mix(v);
    if (words) {
      std::memcpy(&v, p + bytes - 8, 8);
      mix(v);
    }
  }
  return static_cast<int64_t>(hash);
}

#define R3D_STRING_(x) #x
#define R3D_STRING(x) R3D_STRING_(x)
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

void run_on_torch_threads(int64_t begin, int64_t end, int64_t grain, cpu::RangeFn fn, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, fn, context));
}
int torch_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

const bool g_pool_installed = [] {
  cpu::set_thread_pool({run_on_torch_threads, torch_threads});
  return true;
}();

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
  m.def("fingerprint(Tensor[] tensors, bool full) -> int");
  m.def("describe() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(r3d_kernels, CPU, m) {
  m.impl("conv3d_pack", TORCH_BOX(&r3d::conv3d_pack_cpu));
  m.impl("conv3d_bias_act", TORCH_BOX(&r3d::conv3d_bias_act_cpu));
  m.impl("conv3d_tiles", TORCH_BOX(&r3d::conv3d_tiles_cpu));
  m.impl("conv3d_winograd", TORCH_BOX(&r3d::conv3d_winograd_cpu));
  m.impl("conv3d_direct", TORCH_BOX(&r3d::conv3d_direct_cpu));
  m.impl("conv3d_keep", TORCH_BOX(&r3d::conv3d_keep_cpu));
  m.impl("conv3d_stem", TORCH_BOX(&r3d::conv3d_stem_cpu));
  m.impl("max_pool3d", TORCH_BOX(&r3d::max_pool3d_cpu));
  m.impl("avg_pool_linear", TORCH_BOX(&r3d::avg_pool_linear_cpu));
  m.impl("bn_act", TORCH_BOX(&r3d::bn_act_cpu));
  m.impl("fingerprint", TORCH_BOX(&r3d::fingerprint_cpu));
}

#ifdef R3D_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(r3d_kernels, CUDA, m) { m.impl("bn_act", TORCH_BOX(&r3d::bn_act_cuda)); }
#endif

STABLE_TORCH_LIBRARY_IMPL(r3d_kernels, CompositeExplicitAutograd, m) {
  m.impl("conv3d_check", TORCH_BOX(&r3d::conv3d_check));
  m.impl("describe", TORCH_BOX(&r3d::describe));
}

#ifdef R3D_WITH_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(r3d_kernels, m) {
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
}

STABLE_TORCH_LIBRARY_IMPL(r3d_kernels, CUDA, m) {
  m.impl("conv3d_sm80_pack", TORCH_BOX(&r3d::conv3d_sm80_pack_cuda));
  m.impl("conv3d_sm80", TORCH_BOX(&r3d::conv3d_sm80_cuda));
  m.impl("conv3d_sm80_clip", TORCH_BOX(&r3d::conv3d_sm80_clip_cuda));
  m.impl("clip_channels_last", TORCH_BOX(&r3d::clip_channels_last_cuda));
  m.impl("max_pool3d", TORCH_BOX(&r3d::max_pool3d_cuda));
  m.impl("avg_pool_linear", TORCH_BOX(&r3d::avg_pool_linear_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(r3d_kernels, CompositeExplicitAutograd, m) {
  m.impl("conv3d_sm80_row", TORCH_BOX(&r3d::conv3d_sm80_row));
  m.impl("conv3d_sm80_refuses", TORCH_BOX(&r3d::conv3d_sm80_refuses));
  m.impl("conv3d_sm80_choice", TORCH_BOX(&r3d::conv3d_sm80_choice));
}
#endif

// ---- convolution on Hopper

namespace r3d {
namespace {

ConvGeometry sm90_geometry(const Ints& input, const Ints& weight, const Ints& stride, const Ints& padding,
                           const Ints& dilation) {
  R3D_CHECK(weight.size() == 5, "weight: expected 5 dimensions [K, C, T, R, S], got shape ", text(weight));
  return geometry(input, weight[0], weight[1], {weight[2], weight[3], weight[4]}, stride, padding, dilation,
                  1);
}

// Why the kernel cannot run this, or nothing. Needs no GPU.
std::string conv3d_sm90_refuses(Ints input, Ints weight, Ints stride, Ints padding, Ints dilation,
                                ScalarType dtype) {
  const ConvGeometry g = sm90_geometry(input, weight, stride, padding, dilation);
  const DType type = dtype == ScalarType::BFloat16 ? DType::kBFloat16
                     : dtype == ScalarType::Half   ? DType::kFloat16
                                                   : DType::kFloat32;
  const char* why = cuda::conv3d_sm90_refuses(g, type);
  return why ? why : "";
}

// [tile, split, estimated clocks] of the best among `tiles`, or nothing where none of them fits. Needs no
// GPU.
Ints conv3d_sm90_choice(Ints input, Ints weight, Ints stride, Ints padding, Ints dilation,
                        int64_t multiprocessors, int64_t tiles) {
  R3D_CHECK(multiprocessors > 0, "multiprocessors: expected an integer > 0, got ", multiprocessors);
  const ConvGeometry g = sm90_geometry(input, weight, stride, padding, dilation);
  const cuda::Sm90Plan p = cuda::sm90_plan(g, int(multiprocessors), unsigned(tiles));
  return p.tile < 0 ? Ints{} : Ints{p.tile, p.split, p.cycles};
}

// The same of the kernel for few channels.
std::string conv3d_sm90_stem_refuses(Ints input, Ints weight, Ints stride, Ints padding, Ints dilation,
                                     ScalarType dtype, int64_t pool_frames) {
  const ConvGeometry g = sm90_geometry(input, weight, stride, padding, dilation);
  const DType type = dtype == ScalarType::BFloat16 ? DType::kBFloat16
                     : dtype == ScalarType::Half   ? DType::kFloat16
                                                   : DType::kFloat32;
  if (const char* why = cuda::conv3d_sm90_stem_refuses(g, type)) return why;
  return cuda::stem_plan(g, 1, -1, int(pool_frames)).stages
             ? ""
             : "rows of this length leave no room in shared memory";
}

// [slots of a pixel, filter rows in them, such groups of rows, units of a window]: how weights are packed.
Ints conv3d_sm90_stem_layout(Ints weight, Ints stride) {
  R3D_CHECK(weight.size() == 5, "weight: expected 5 dimensions [K, C, T, R, S], got shape ", text(weight));
  const Dim3 step = triple(stride, "stride", 1);
  R3D_CHECK(8 % step.w == 0 && weight[1] >= 1 && weight[1] * step.w <= 8,
            "weight: expected channels that fill 8 / stride at most, got shape ", text(weight));
  const cuda::StemLayout l = cuda::stem_packing(weight[1], {weight[2], weight[3], weight[4]}, step);
  return {l.slots, l.group, l.row_groups, l.units};
}

#ifdef R3D_WITH_CUDA
// x: of the dtype of packed, or a clip as a decoder leaves it, which is x * clip_scale[c] + clip_shift[c].
Tensor conv3d_sm90_stem_cuda(Tensor x, std::optional<Tensor> clip_scale, std::optional<Tensor> clip_shift,
                             Tensor packed, Tensor scale, Tensor bias, int64_t out_channels, Ints kernel_size,
                             Ints stride, Ints padding, std::string activation, int64_t kind,
                             int64_t pool_frames) {
  R3D_CHECK(aoti_torch_get_current_cuda_stream, "x: a CUDA tensor, but this torch has no CUDA library");
  R3D_CHECK(x.dim() == 5, "x: expected 5 dimensions [N, C, D, H, W], got shape ", text(sizes(x)));
  R3D_CHECK(kind >= -1 && kind < cuda::kStemKinds, "kind: expected -1 (any) to ", cuda::kStemKinds - 1,
            ", got ", kind);
  R3D_CHECK(pool_frames == 0 || pool_frames == 1 || pool_frames == 3,
            "pool_frames: expected 0 (none), 1 or 3, got ", pool_frames);
  ConvArgs a{};
  a.g = geometry(sizes(x), out_channels, x.size(1), kernel_size, stride, padding, {1, 1, 1}, 1);
  a.dtype = dtype_of(packed, "packed", true);
  a.activation = activation_of(activation);
  if (const char* why = cuda::conv3d_sm90_stem_refuses(a.g, a.dtype))
    fail("r3d_kernels::conv3d_sm90_stem ", why, ": ", geometry_text(a.g));
  R3D_CHECK(packed.is_cuda() && packed.get_device() == x.get_device(),
            "packed: expected a tensor on the device of x");
  const cuda::StemLayout l = cuda::stem_layout(a.g);
  R3D_CHECK(packed.is_contiguous() && packed.numel() == l.weight_elements(a.g),
            "packed: expected the weights packed for this geometry, of ", l.weight_elements(a.g),
            " elements, got shape ", text(sizes(packed)));
  const auto vector = [&](const Tensor& t, const char* argument) {
    R3D_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == a.g.k && t.is_cuda() &&
                  t.get_device() == x.get_device() && t.is_contiguous(),
              argument, ": expected a contiguous float32 tensor of shape [", a.g.k,
              "] on the device of x, got ", name(t.scalar_type()), " of shape ", text(sizes(t)));
    return static_cast<const float*>(t.const_data_ptr());
  };
  const float* factors = vector(scale, "scale");
  a.bias = vector(bias, "bias");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const Dim3 out = cuda::stem_pooled(a.g.out, int(pool_frames));
  Tensor y = empty_rows({a.g.n, a.g.k, out.d, out.h, out.w}, packed);
  if (y.numel() == 0) return y;
  const int sms = cuda::sm80::device_multiprocessors();
  R3D_CHECK(sms > 0, "x: the CUDA runtime finds no device ", x.get_device());
  const cuda::StemPlan plan = cuda::stem_plan(a.g, sms, int(kind), int(pool_frames));
  R3D_CHECK(plan.stages, "kind: ", kind, " leaves no room in shared memory: ", geometry_text(a.g));
  Tensor workspace = uninitialized({plan.workspace_bytes()}, {1}, ScalarType::Byte, x);
  a.weight = packed.const_data_ptr();
  a.y = y.mutable_data_ptr();
  const cuda::StemSource source{x.const_data_ptr(),
                                x.stride(0),
                                x.stride(1),
                                x.stride(2),
                                x.stride(3),
                                x.stride(4),
                                clip_source(x, "x"),
                                clip_vector(clip_scale, "clip_scale", x),
                                clip_vector(clip_shift, "clip_shift", x)};
  const char* error =
      cuda::conv3d_sm90_stem(a, source, factors, plan, workspace.mutable_data_ptr(), current_stream(x));
  R3D_CHECK(!error, "r3d_kernels::conv3d_sm90_stem on ", geometry_text(a.g), ": ", error ? error : "");
  return y;
}

Tensor conv3d_sm90_cuda(Tensor x, Tensor weight, Tensor scale, Tensor bias, std::optional<Tensor> residual,
                        Ints stride, Ints padding, Ints dilation, std::string activation, int64_t tiles,
                        int64_t split) {
  R3D_CHECK(aoti_torch_get_current_cuda_stream, "x: a CUDA tensor, but this torch has no CUDA library");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  ConvArgs a{};
  a.g = sm90_geometry(sizes(x), sizes(weight), stride, padding, dilation);
  a.dtype = dtype_of(x, "x", true);
  a.activation = activation_of(activation);
  if (const char* why = cuda::conv3d_sm90_refuses(a.g, a.dtype))
    fail("r3d_kernels::conv3d_sm90 ", why, ": x ", text(sizes(x)), ", weight ", text(sizes(weight)));
  check_same(weight, "weight", x);
  const auto vector = [&](const Tensor& t, const char* argument) {
    R3D_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == a.g.k && t.is_cuda() &&
                  t.get_device() == x.get_device(),
              argument, ": expected a float32 tensor of shape [", a.g.k, "] on the device of x, got ",
              name(t.scalar_type()), " of shape ", text(sizes(t)));
    return plain(t);
  };
  const Tensor s = vector(scale, "scale"), b = vector(bias, "bias");
  if (residual) {
    check_same(*residual, "residual", x);
    check_residual_shape(sizes(*residual), output_shape(a.g));
  }
  Tensor y = empty_rows(output_shape(a.g), x);
  if (y.numel() == 0) return y;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
  const Tensor xl = in_rows(x, a.dtype, stream, "conv3d_sm90"),
               wl = in_rows(weight, a.dtype, stream, "conv3d_sm90");
  const Tensor r = residual ? in_rows(*residual, a.dtype, stream, "conv3d_sm90") : xl;
  if (residual) a.residual = r.const_data_ptr();
  R3D_CHECK(cuda::sm80::device_multiprocessors() > 0, "x: the CUDA runtime finds no device ", x.get_device());
  const cuda::Sm90Plan plan = cuda::conv3d_sm90_plan(a.g, unsigned(tiles), int(split));
  R3D_CHECK(plan.tile >= 0, "tiles: none of those asked for can run x ", text(sizes(x)), ", weight ",
            text(sizes(weight)));
  Tensor workspace = y;
  void* scratch = nullptr;
  if (plan.split > 1) {
    workspace = uninitialized({plan.workspace_bytes()}, {1}, ScalarType::Byte, x);
    scratch = workspace.mutable_data_ptr();
  }
  a.x = xl.const_data_ptr();
  a.weight = wl.const_data_ptr();
  a.bias = static_cast<const float*>(b.const_data_ptr());
  a.y = y.mutable_data_ptr();
  const cuda::Sm90Pitch pitch{rows_pitch(xl), rows_pitch(wl), rows_pitch(r), cuda::sm90_pitch(a.g.k)};
  const char* error =
      cuda::conv3d_sm90(a, pitch, static_cast<const float*>(s.const_data_ptr()), plan, scratch, stream);
  R3D_CHECK(!error, "r3d_kernels::conv3d_sm90: ", error ? error : "");
  return y;
}
#endif

}  // namespace
}  // namespace r3d

STABLE_TORCH_LIBRARY_FRAGMENT(r3d_kernels, m) {
  // tiles: bits of the tiles to choose from, for tests; split: parts of the sum, 0 for any
  m.def(
      "conv3d_sm90(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor? residual, int[] stride, int[] "
      "padding, int[] dilation, str activation, int tiles=-1, int split=0) -> Tensor");
  m.def(
      "conv3d_sm90_refuses(int[] input, int[] weight, int[] stride, int[] padding, int[] dilation, "
      "ScalarType "
      "dtype) -> str");
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

STABLE_TORCH_LIBRARY_IMPL(r3d_kernels, CompositeExplicitAutograd, m) {
  m.impl("conv3d_sm90_refuses", TORCH_BOX(&r3d::conv3d_sm90_refuses));
  m.impl("conv3d_sm90_choice", TORCH_BOX(&r3d::conv3d_sm90_choice));
  m.impl("conv3d_sm90_stem_refuses", TORCH_BOX(&r3d::conv3d_sm90_stem_refuses));
  m.impl("conv3d_sm90_stem_layout", TORCH_BOX(&r3d::conv3d_sm90_stem_layout));
}

#ifdef R3D_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(r3d_kernels, CUDA, m) {
  m.impl("conv3d_sm90", TORCH_BOX(&r3d::conv3d_sm90_cuda));
  m.impl("conv3d_sm90_stem", TORCH_BOX(&r3d::conv3d_sm90_stem_cuda));
}
#endif
