// The emulated kernels for compute capability 8.0 and the pool and head kernels, for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../../csrc/cuda/conv3d_sm80.cu"
#include "../../csrc/cuda/conv3d_sm80_pack.cu"
#include "../../csrc/cuda/pool.cu"
#include "planted_sm80.h"

namespace py = pybind11;
namespace sm80 = r3d::cuda::sm80;
using Ints = std::vector<int64_t>;

static void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

template <class T>
static T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

static r3d::Dim3 three(const Ints& v, int at = 0) { return {v[at], v[at + 1], v[at + 2]}; }

// [n, c, d, h, w, k], kernel, stride, padding, dilation
static r3d::ConvGeometry geometry(const Ints& sizes, const Ints& kernel, const Ints& stride,
                                  const Ints& padding, const Ints& dilation) {
  r3d::ConvGeometry g{sizes[0],      sizes[1],       three(sizes, 2), sizes[5], three(kernel),
                      three(stride), three(padding), three(dilation), {}};
  auto out = [](int64_t i, int64_t f, int64_t s, int64_t p, int64_t l) {
    return r3d::conv_out_size(i, f, s, p, l);
  };
  g.out = {out(g.in.d, g.kernel.d, g.stride.d, g.padding.d, g.dilation.d),
           out(g.in.h, g.kernel.h, g.stride.h, g.padding.h, g.dilation.h),
           out(g.in.w, g.kernel.w, g.stride.w, g.padding.w, g.dilation.w)};
  return g;
}

static py::dict layout(const r3d::ConvGeometry& g, r3d::DType t) {
  const sm80::Layout l = sm80::layout_of(g, t);
  py::dict d;
  d["rows"] = l.rows;
  d["pixel"] = l.pixel;
  d["tap"] = l.tap;
  d["steps"] = l.steps;
  d["row_elements"] = l.row_elements;
  const char* why_not = sm80::refuses(g, t);
  d["refuses"] = why_not ? py::object(py::str(why_not)) : py::object(py::none());
  return d;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def(
      "configure",
      [](int schedule, unsigned seed, bool late_copies, int fewer_waited, int skip_barrier,
         int multiprocessors) {
        r3d::emu::Settings& s = r3d::emu::settings();
        s.schedule = r3d::emu::Schedule(schedule);
        s.seed = seed;
        s.late_copies = late_copies;
        s.fewer_waited = fewer_waited;
        s.skip_barrier = skip_barrier;
        s.multiprocessors = multiprocessors;
      },
      py::arg("schedule") = 0, py::arg("seed") = 1, py::arg("late_copies") = false,
      py::arg("fewer_waited") = 0, py::arg("skip_barrier") = -1, py::arg("multiprocessors") = 2);
  m.def("gemm", [](uintptr_t a, uintptr_t b, uintptr_t c, int k) {
    const int bytes = 2 * 64 * 40 * 2 + 2 * 32 * 72 * 2;
    check(r3d::cuda::launch_dynamic(planted::gemm, dim3(1), dim3(128), bytes, nullptr,
                                    pointer<const uint16_t>(a), pointer<const uint16_t>(b), pointer<float>(c),
                                    k));
  });
  m.def("load_matrices", [](uintptr_t from, uintptr_t words, const std::string& kernel) {
    const auto run = kernel == "load_matrices"     ? planted::load_matrices
                     : kernel == "misaligned_copy" ? planted::misaligned_copy
                     : kernel == "partial_copies"  ? planted::partial_copies
                                                   : planted::misaligned_matrix;
    check(r3d::cuda::launch_dynamic(run, dim3(1), dim3(32), 1024, nullptr, pointer<const uint16_t>(from),
                                    pointer<uint32_t>(words)));
  });
  m.def("product", [](int kind, uintptr_t a, uintptr_t b, uintptr_t c) {
    const auto run = kind == 0 ? planted::product<0> : kind == 1 ? planted::product<1> : planted::product<2>;
    check(r3d::cuda::launch_dynamic(run, dim3(1), dim3(32), 0, nullptr, pointer<const uint32_t>(a),
                                    pointer<const uint32_t>(b), pointer<float>(c)));
  });
  m.def("round_tf32", [](uintptr_t in, uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; i++) pointer<float>(out)[i] = r3d::cuda::round_tf32(pointer<float>(in)[i]);
  });

  m.def("layout", [](const Ints& sizes, const Ints& kernel, const Ints& stride, const Ints& padding,
                     const Ints& dilation, int dtype) {
    return layout(geometry(sizes, kernel, stride, padding, dilation), r3d::DType(dtype));
  });
  m.def("choose", [](const Ints& sizes, const Ints& kernel, const Ints& stride, const Ints& padding,
                     const Ints& dilation, int dtype, int multiprocessors) {
    const sm80::Choice c =
        sm80::choose(geometry(sizes, kernel, stride, padding, dilation), r3d::DType(dtype), multiprocessors);
    return std::make_pair(c.tile, c.splits);
  });
  m.def("pack", [](const Ints& sizes, const Ints& kernel, const Ints& stride, const Ints& padding,
                   const Ints& dilation, int from, uintptr_t weight, int to, uintptr_t packed) {
    check(sm80::pack(geometry(sizes, kernel, stride, padding, dilation), r3d::DType(from),
                     pointer<void>(weight), r3d::DType(to), pointer<void>(packed), nullptr));
  });
  // Tile and splits below 0: the plan's own. Pitches of residual and y: 0 where the channels lie side by
  // side. The workspace is filled with NaN before, and is exactly as large as asked.
  m.def(
      "conv3d",
      [](const Ints& sizes, const Ints& kernel, const Ints& stride, const Ints& padding, const Ints& dilation,
         int dtype, int relu, uintptr_t x, const Ints& x_strides, uintptr_t packed, uintptr_t scale,
         uintptr_t bias, uintptr_t residual, uintptr_t y, int tile, int splits, int from,
         uintptr_t clip_scale, uintptr_t clip_shift, int64_t residual_pitch, int64_t y_pitch) {
        sm80::Call call{};
        call.conv.g = geometry(sizes, kernel, stride, padding, dilation);
        call.conv.dtype = r3d::DType(dtype);
        call.conv.activation = r3d::Activation(relu);
        call.conv.x = pointer<void>(x);
        call.conv.weight = pointer<void>(packed);
        call.conv.bias = pointer<float>(bias);
        call.conv.residual = pointer<void>(residual);
        call.conv.y = pointer<void>(y);
        call.x = {x_strides[0], x_strides[1], x_strides[2], x_strides[3], x_strides[4]};
        call.residual_pitch = residual_pitch ? residual_pitch : call.conv.g.k;
        call.y_pitch = y_pitch ? y_pitch : call.conv.g.k;
        call.scale = pointer<float>(scale);
        call.clip = {from, pointer<float>(clip_scale), pointer<float>(clip_shift)};
        call.multiprocessors = r3d::cuda::multiprocessors();
        call.choice = sm80::choose(call.conv.g, call.conv.dtype, call.multiprocessors);
        if (tile >= 0) call.choice = {tile, splits};
        const int64_t bytes = sm80::workspace_bytes(call);
        struct Free {
          void operator()(char* p) const { ::operator delete(p, std::align_val_t(256)); }
        };
        std::unique_ptr<char[], Free> scratch(
            static_cast<char*>(::operator new(size_t(bytes), std::align_val_t(256))));
        std::memset(scratch.get(), 0xff, size_t(bytes));
        check(sm80::run(call, scratch.get(), nullptr));
        return bytes;
      },
      py::arg("sizes"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("dtype"), py::arg("relu"), py::arg("x"), py::arg("x_strides"), py::arg("packed"),
      py::arg("scale"), py::arg("bias"), py::arg("residual"), py::arg("y"), py::arg("tile"),
      py::arg("splits"), py::arg("clip_from") = -1, py::arg("clip_scale") = 0, py::arg("clip_shift") = 0,
      py::arg("residual_pitch") = 0, py::arg("y_pitch") = 0);
  // sizes [n, c, d, h, w], of x; from: 0 float32, 1 bfloat16, 2 float16, 3 uint8
  m.def("clip", [](const Ints& sizes, uintptr_t x, const Ints& s, int from, int to, uintptr_t scale,
                   uintptr_t shift, int64_t left, int64_t width, int64_t pixel, uintptr_t y) {
    check(sm80::clip({{sizes[0],
                       sizes[1],
                       three(sizes, 2),
                       {s[0], s[1], s[2], s[3], s[4]},
                       pointer<void>(x),
                       left,
                       width,
                       pixel,
                       pointer<void>(y)},
                      from,
                      r3d::DType(to),
                      pointer<float>(scale),
                      pointer<float>(shift)},
                     nullptr));
  });
  // sizes [n, c, d, h, w]
  m.def("max_pool3d", [](const Ints& sizes, const Ints& kernel, const Ints& stride, const Ints& padding,
                         int dtype, uintptr_t x, uintptr_t y) {
    Ints with_k = sizes;
    with_k.push_back(1);
    const r3d::ConvGeometry g = geometry(with_k, kernel, stride, padding, {1, 1, 1});
    check(r3d::cuda::max_pool3d({g.n, g.c, g.in, g.kernel, g.stride, g.padding, g.out, r3d::DType(dtype),
                                 pointer<void>(x), pointer<void>(y)},
                                nullptr));
  });
  m.def("avg_pool_linear", [](int64_t n, int64_t c, int64_t pixels, int64_t classes, int dtype, uintptr_t x,
                              uintptr_t weight, uintptr_t bias, uintptr_t y) {
    std::vector<float> means(size_t(n * c));
    check(r3d::cuda::avg_pool_linear({n, c, pixels, classes, r3d::DType(dtype), pointer<void>(x),
                                      pointer<void>(weight), pointer<void>(bias), pointer<void>(y)},
                                     means.data(), nullptr));
  });
}
