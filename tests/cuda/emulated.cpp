// The emulated kernels for Python: pointers come as integers, so that a test can misalign them.
#include <pybind11/pybind11.h>

#include "../../csrc/cuda/bn_act.cu"
#include "../../csrc/cuda/element.cuh"
#include "planted.h"

namespace py = pybind11;

static void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

template <class T>
static T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def(
      "configure",
      [](int schedule, unsigned seed, int multiprocessors) {
        r3d::emu::settings().schedule = r3d::emu::Schedule(schedule);
        r3d::emu::settings().seed = seed;
        r3d::emu::settings().multiprocessors = multiprocessors;
      },
      py::arg("schedule"), py::arg("seed") = 1, py::arg("multiprocessors") = 2);
  m.def("bn_act", [](int64_t rows, int64_t channels, int dtype, int activation, uintptr_t x, uintptr_t scale,
                     uintptr_t shift, uintptr_t residual, uintptr_t y) {
    const r3d::BnActArgs args{rows,
                              channels,
                              r3d::DType(dtype),
                              r3d::Activation(activation),
                              pointer<void>(x),
                              pointer<float>(scale),
                              pointer<float>(shift),
                              pointer<void>(residual),
                              pointer<void>(y)};
    check(r3d::cuda::bn_act(args, nullptr));
  });
  m.def("planted", [](const std::string& name, uintptr_t data, int blocks) {
    check(planted::run(name.c_str(), pointer<float>(data), blocks));
  });
  // Conversions over arrays of n: what the twins of the PTX functions do, for all bit patterns.
  m.def("round", [](const std::string& type, uintptr_t in, uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      const float v = pointer<float>(in)[i];
      pointer<uint16_t>(out)[i] =
          uint16_t(type == "bf16" ? r3d::cuda::pack_bf16x2(v, 0) : r3d::cuda::pack_f16x2(v, 0));
    }
  });
  m.def("widen", [](const std::string& type, uintptr_t in, uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      const uint16_t v = pointer<uint16_t>(in)[i];
      pointer<float>(out)[i] = type == "bf16" ? r3d::cuda::bf16_to_float(v) : r3d::cuda::f16_to_float(v);
    }
  });
}
