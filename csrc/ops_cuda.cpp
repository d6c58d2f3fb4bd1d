// The implementations for CUDA tensors, and how their kernels would run a geometry, which needs no GPU. A
// build without CUDA has that of the Hopper kernels only.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/conv3d_sm80.h"
#include "cuda/conv3d_sm90.h"
#include "cuda/conv3d_sm90_stem.h"
#include "cuda/pool.h"
#include "ops.h"

#include <map>
#include <mutex>
#include <utility>

namespace r3d {
namespace {

// ---- what the Hopper kernels would do

ConvGeometry sm90_geometry(const Ints& input, const Ints& weight, const Ints& stride, const Ints& padding,
                           const Ints& dilation) {
  R3D_CHECK(weight.size() == 5, "weight: expected 5 dimensions [K, C, T, R, S], got shape ", text(weight));
  return geometry(input, weight[0], weight[1], {weight[2], weight[3], weight[4]}, stride, padding, dilation,
                  1);
}

// What is neither is refused as float32 is.
DType kernel_dtype(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? DType::kBFloat16
         : dtype == ScalarType::Half   ? DType::kFloat16
                                       : DType::kFloat32;
}

// Why the kernel cannot run this, or nothing. Needs no GPU.
std::string conv3d_sm90_refuses(Ints input, Ints weight, Ints stride, Ints padding, Ints dilation,
                                ScalarType dtype) {
  const ConvGeometry g = sm90_geometry(input, weight, stride, padding, dilation);
  const char* why = cuda::conv3d_sm90_refuses(g, kernel_dtype(dtype));
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
  if (const char* why = cuda::conv3d_sm90_stem_refuses(g, kernel_dtype(dtype))) return why;
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

}  // namespace
}  // namespace r3d

STABLE_TORCH_LIBRARY_IMPL(r3d_kernels, CompositeExplicitAutograd, m) {
  m.impl("conv3d_sm90_refuses", TORCH_BOX(&r3d::conv3d_sm90_refuses));
  m.impl("conv3d_sm90_choice", TORCH_BOX(&r3d::conv3d_sm90_choice));
  m.impl("conv3d_sm90_stem_refuses", TORCH_BOX(&r3d::conv3d_sm90_stem_refuses));
  m.impl("conv3d_sm90_stem_layout", TORCH_BOX(&r3d::conv3d_sm90_stem_layout));
}

#ifdef R3D_WITH_CUDA
// Lives in libtorch_cuda, which a CPU build of torch does not have: weak, and only called with CUDA tensors.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace r3d {
namespace {

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

// ---- convolution for compute capability 8.0 and later

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

// ---- convolution on Hopper

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

// ---- counters of split sums, which every kernel leaves as zero as it has found them. To clear others in
// front of a kernel takes the GPU longer than a small layer's products.

constexpr int64_t kCounters = 1 << 13;  // of one stream: more than a split sum with one wave of tiles has
constexpr size_t kMostStreams = 256;

// Lent to what this thread calls until they are taken back, each counter once: a captured graph's own.
struct Lent {
  std::optional<Tensor> counters;
  int64_t used = 0;
};
thread_local Lent lent;

void conv3d_sm90_lend(std::optional<Tensor> counters) {
  if (counters)
    R3D_CHECK(counters->is_cuda() && counters->scalar_type() == ScalarType::Int && counters->dim() == 1 &&
                  counters->is_contiguous(),
              "counters: expected a contiguous int32 CUDA tensor of one dimension, got ",
              name(counters->scalar_type()), " of shape ", text(sizes(*counters)));
  lent = {counters, 0};
}

// Null where there are none: a kernel of a graph must not share counters with a kernel outside of it, which
// may run at the same time.
unsigned* zero_counters(const Tensor& x, int64_t count, void* stream) {
  if (lent.counters && lent.counters->get_device() == x.get_device()) {
    if (lent.used + count > lent.counters->numel()) return nullptr;
    lent.used += count;
    return static_cast<unsigned*>(lent.counters->mutable_data_ptr()) + lent.used - count;
  }
  if (count > kCounters || cuda::sm90_captures(stream)) return nullptr;
  static std::mutex mutex;
  using Kept = std::map<std::pair<int64_t, void*>, Tensor>;
  static Kept& kept = *new Kept;  // never freed: at the end of a process the driver may be gone
  const std::lock_guard lock(mutex);
  const auto key = std::make_pair(int64_t(x.get_device()), stream);
  auto found = kept.find(key);
  if (found == kept.end()) {
    if (kept.size() == kMostStreams) return nullptr;
    Tensor fresh = uninitialized({kCounters}, {1}, ScalarType::Int, x);
    if (cuda::sm90_clear(static_cast<unsigned*>(fresh.mutable_data_ptr()), kCounters, stream)) return nullptr;
    found = kept.emplace(key, fresh).first;
  }
  return static_cast<unsigned*>(found->second.mutable_data_ptr());
}

Tensor conv3d_sm90_cuda(Tensor x, Tensor weight, Tensor scale, Tensor bias, std::optional<Tensor> residual,
                        Ints stride, Ints padding, Ints dilation, std::string activation, int64_t tiles,
                        int64_t split) {
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
  void* stream = current_stream(x);
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
  unsigned* tickets = nullptr;
  if (plan.split > 1) {
    workspace = uninitialized({plan.workspace_bytes()}, {1}, ScalarType::Byte, x);
    scratch = workspace.mutable_data_ptr();
    tickets = zero_counters(x, plan.tickets, stream);
  }
  a.x = xl.const_data_ptr();
  a.weight = wl.const_data_ptr();
  a.bias = static_cast<const float*>(b.const_data_ptr());
  a.y = y.mutable_data_ptr();
  const cuda::Sm90Pitch pitch{rows_pitch(xl), rows_pitch(wl), rows_pitch(r), cuda::sm90_pitch(a.g.k)};
  const char* error = cuda::conv3d_sm90(a, pitch, static_cast<const float*>(s.const_data_ptr()), plan,
                                        scratch, tickets, stream);
  R3D_CHECK(!error, "r3d_kernels::conv3d_sm90: ", error ? error : "");
  return y;
}

// ---- pooling, head and batch norm

Tensor max_pool3d_cuda(Tensor x, Ints kernel_size, Ints stride, Ints padding) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  void* stream = current_stream(x);
  const auto p = prepare_max_pool3d(x, kernel_size, stride, padding);
  if (!p.y.numel()) return p.y;
  const char* error = cuda::max_pool3d(p.a, stream);
  R3D_CHECK(!error, "r3d_kernels::max_pool3d on shape ", text(sizes(x)), " kernel_size ", text(kernel_size),
            " stride ", text(stride), " padding ", text(padding), ": ", error ? error : "");
  return p.y;
}

Tensor avg_pool_linear_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  void* stream = current_stream(x);
  const auto p = prepare_avg_pool_linear(x, weight, bias);
  if (!p.y.numel()) return p.y;
  Tensor means = torch::stable::empty(Ints{p.a.n, p.a.c}, ScalarType::Float, std::nullopt, x.device());
  const char* error = cuda::avg_pool_linear(p.a, static_cast<float*>(means.mutable_data_ptr()), stream);
  R3D_CHECK(!error, "r3d_kernels::avg_pool_linear on shape ", text(sizes(x)), " with ", p.a.classes,
            " classes: ", error ? error : "");
  return p.y;
}

Tensor bn_act_cuda(Tensor x, Tensor scale, Tensor shift, std::optional<Tensor> residual,
                   std::string activation) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const auto p = prepare_bn_act(x, scale, shift, residual, activation);
  if (!p.y.numel()) return p.y;
  void* stream = current_stream(x);
  const char* error = cuda::bn_act(p.a, stream);
  R3D_CHECK(!error, "r3d_kernels::bn_act on shape ", text(sizes(x)), ": ", error ? error : "");
  return p.y;
}

}  // namespace
}  // namespace r3d

STABLE_TORCH_LIBRARY_IMPL(r3d_kernels, CUDA, m) {
  m.impl("conv3d_sm80_pack", TORCH_BOX(&r3d::conv3d_sm80_pack_cuda));
  m.impl("conv3d_sm80", TORCH_BOX(&r3d::conv3d_sm80_cuda));
  m.impl("conv3d_sm80_clip", TORCH_BOX(&r3d::conv3d_sm80_clip_cuda));
  m.impl("clip_channels_last", TORCH_BOX(&r3d::clip_channels_last_cuda));
  m.impl("max_pool3d", TORCH_BOX(&r3d::max_pool3d_cuda));
  m.impl("avg_pool_linear", TORCH_BOX(&r3d::avg_pool_linear_cuda));
  m.impl("conv3d_sm90", TORCH_BOX(&r3d::conv3d_sm90_cuda));
  m.impl("conv3d_sm90_stem", TORCH_BOX(&r3d::conv3d_sm90_stem_cuda));
  m.impl("bn_act", TORCH_BOX(&r3d::bn_act_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(r3d_kernels, CompositeExplicitAutograd, m) {
  m.impl("conv3d_sm90_lend", TORCH_BOX(&r3d::conv3d_sm90_lend));
  m.impl("conv3d_sm80_row", TORCH_BOX(&r3d::conv3d_sm80_row));
  m.impl("conv3d_sm80_refuses", TORCH_BOX(&r3d::conv3d_sm80_refuses));
  m.impl("conv3d_sm80_choice", TORCH_BOX(&r3d::conv3d_sm80_choice));
}
#endif
