// The implementations for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/stem.h"
#include "cpu/tiles.h"
#include "ops.h"

namespace r3d {
namespace {

// ---- convolution

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
    check_storage(t, argument);
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

// ---- pooling, head and batch norm

Tensor max_pool3d_cpu(Tensor x, Ints kernel_size, Ints stride, Ints padding) {
  const auto p = prepare_max_pool3d(x, kernel_size, stride, padding);
  if (p.y.numel()) cpu::max_pool3d(p.a);
  return p.y;
}

Tensor avg_pool_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const auto p = prepare_avg_pool_linear(x, weight, bias);
  if (p.y.numel()) cpu::avg_pool_linear(p.a);
  return p.y;
}

Tensor bn_act_cpu(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual,
                  std::string activation) {
  const auto p = prepare_bn_act(x, scale, shift, residual, activation);
  if (p.y.numel()) cpu::bn_act(p.a);
  return p.y;
}

// ---- threads

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
}
