// The Hopper convolution on the emulator, its rules and the planted bugs, for Python: pointers come as
// integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../../csrc/cuda/conv3d_sm90.cu"
#include "../../csrc/cuda/conv3d_sm90_stem.cu"
#include "planted_sm90.h"

namespace py = pybind11;
using namespace r3d;
using namespace r3d::cuda;

// n, c, in, k, kernel, stride, padding, dilation
static ConvGeometry geometry(const std::array<int64_t, 18>& v) {
  ConvGeometry g{};
  g.n = v[0], g.c = v[1];
  const auto triple = [&](int i) { return Dim3{v[i], v[i + 1], v[i + 2]}; };
  g.in = triple(2);
  g.k = v[5];
  g.kernel = triple(6), g.stride = triple(9), g.padding = triple(12), g.dilation = triple(15);
  g.out = {conv_out_size(g.in.d, g.kernel.d, g.stride.d, g.padding.d, g.dilation.d),
           conv_out_size(g.in.h, g.kernel.h, g.stride.h, g.padding.h, g.dilation.h),
           conv_out_size(g.in.w, g.kernel.w, g.stride.w, g.padding.w, g.dilation.w)};
  return g;
}

static py::dict described(const Sm90Plan& p) {
  py::dict d;
  d["tile"] = p.tile, d["split"] = p.split, d["rows"] = p.rows, d["pixel_tiles"] = p.pixel_tiles;
  d["channel_tiles"] = p.channel_tiles, d["steps"] = p.steps, d["grid"] = p.grid, d["cycles"] = p.cycles;
  d["workspace_bytes"] = p.workspace_bytes(), d["tickets"] = p.tickets;
  return d;
}

static void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

template <class T>
static T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

static py::dict described(const ConvGeometry& g, const StemPlan& p) {
  const StemLayout l = stem_layout(g);
  py::dict d;
  d["kind"] = p.kind, d["stages"] = p.stages, d["slice_rows"] = p.slice_rows, d["tiles"] = p.tiles;
  d["shared_bytes"] = p.shared_bytes, d["units"] = p.units, d["cycles"] = p.cycles;
  d["pieces_bytes"] = p.pool.units() * kStemUnit;
  d["layout"] = py::make_tuple(l.slots, l.group, l.row_groups, l.units, l.phases, l.rows, l.pitch);
  return d;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def(
      "configure",
      [](int schedule, unsigned seed, bool late_copies, bool late_products, int multiprocessors) {
        emu::settings().schedule = emu::Schedule(schedule);
        emu::settings().seed = seed;
        emu::settings().multiprocessors = multiprocessors;
        emu::timing() = {late_copies, late_products};
      },
      py::arg("schedule") = 0, py::arg("seed") = 1, py::arg("late_copies") = false,
      py::arg("late_products") = false, py::arg("multiprocessors") = 2);
  // `tile` -1: the plan's own choice; pitches of x, weight, residual and y, 0 where the channels are side by
  // side
  m.def(
      "conv3d",
      [](std::array<int64_t, 18> v, int dtype, bool relu, std::array<uintptr_t, 6> p, int tile, int split,
         std::array<int64_t, 4> pitch, uintptr_t tickets) {
        ConvArgs a{};
        a.g = geometry(v);
        a.dtype = DType(dtype);
        a.activation = relu ? Activation::kRelu : Activation::kNone;
        a.x = pointer<void>(p[0]);
        a.weight = pointer<void>(p[1]);
        a.bias = pointer<float>(p[3]);
        a.residual = pointer<void>(p[4]);
        a.y = pointer<void>(p[5]);
        const Sm90Plan plan =
            tile < 0 ? conv3d_sm90_plan(a.g) : sm90_plan_for(a.g, tile, split, multiprocessors());
        std::vector<float> workspace(size_t(plan.workspace_bytes()) / 4, NAN);
        const auto or_dense = [&](int i, int64_t channels) { return pitch[i] ? pitch[i] : channels; };
        const Sm90Pitch all{or_dense(0, a.g.c), or_dense(1, a.g.c), or_dense(2, a.g.k), or_dense(3, a.g.k)};
        check(conv3d_sm90(a, all, pointer<float>(p[2]), plan, workspace.data(), pointer<unsigned>(tickets),
                          nullptr));
        return described(plan);
      },
      py::arg("geometry"), py::arg("dtype"), py::arg("relu"), py::arg("pointers"), py::arg("tile"),
      py::arg("split"), py::arg("pitch") = std::array<int64_t, 4>{}, py::arg("tickets") = 0);
  // pointers: x, packed weights, scale, bias, y, the clip's scale and shift; `kind` -1: the plan's own choice
  m.def("stem", [](std::array<int64_t, 18> v, int dtype, bool relu, std::array<uintptr_t, 7> p,
                   std::array<int64_t, 5> strides, int from, int kind, int pool_frames) {
    ConvArgs a{};
    a.g = geometry(v);
    a.dtype = DType(dtype);
    a.activation = relu ? Activation::kRelu : Activation::kNone;
    a.weight = pointer<void>(p[1]);
    a.bias = pointer<float>(p[3]);
    a.y = pointer<void>(p[4]);
    const StemSource source{pointer<void>(p[0]), strides[0], strides[1], strides[2],
                            strides[3],          strides[4], from,       pointer<float>(p[5]),
                            pointer<float>(p[6])};
    const StemPlan plan = stem_plan(a.g, multiprocessors(), kind, pool_frames);
    std::vector<uint4> workspace(size_t(plan.workspace_bytes() / kStemUnit),
                                 uint4{~0u, ~0u, ~0u, ~0u});  // NaN
    check(conv3d_sm90_stem(a, source, pointer<float>(p[2]), plan, workspace.data(), nullptr));
    return described(a.g, plan);
  });
  m.def(
      "stem_plan",
      [](std::array<int64_t, 18> v, int multiprocessors, int kind, int pool_frames) {
        const ConvGeometry g = geometry(v);
        return described(g, stem_plan(g, multiprocessors, kind, pool_frames));
      },
      py::arg("geometry"), py::arg("multiprocessors"), py::arg("kind"), py::arg("pool_frames") = 0);
  m.def("stem_refuses", [](std::array<int64_t, 18> v, int dtype) {
    const char* why = conv3d_sm90_stem_refuses(geometry(v), DType(dtype));
    return std::string(why ? why : "");
  });
  m.def("refuses", [](std::array<int64_t, 18> v, int dtype) {
    const char* why = conv3d_sm90_refuses(geometry(v), DType(dtype));
    return std::string(why ? why : "");
  });
  m.def("plan", [](std::array<int64_t, 18> v, int multiprocessors) {
    return described(sm90_plan(geometry(v), multiprocessors));
  });
  // What the call itself uses, for as many multiprocessors as were configured.
  m.def("remembered_plan", [](std::array<int64_t, 18> v, unsigned tiles, int split) {
    return described(conv3d_sm90_plan(geometry(v), tiles, split));
  });
  m.def("chosen_plan", [](std::array<int64_t, 18> v, unsigned tiles, int split) {
    return described(sm90_plan(geometry(v), multiprocessors(), tiles, split));
  });
  m.def("plan_for", [](std::array<int64_t, 18> v, int tile, int split, int multiprocessors) {
    return described(sm90_plan_for(geometry(v), tile, split, multiprocessors));
  });
  m.def("tiles", [] {
    py::list tiles;
    for (const Sm90Tile& t : kSm90Tiles) {
      const Sm90Layout l = sm90_layout(t);
      py::dict d;
      d["pixels"] = t.pixels, d["channels"] = t.channels, d["taps"] = t.taps, d["stages"] = l.stages;
      d["weight_stages"] = l.weight_stages;
      d["shared_bytes"] = l.shared_bytes, d["stage_bytes"] = l.stage_bytes,
      d["step_cycles"] = sm90_step_cycles(t, {t.pixels, t.channels * t.taps, 0}, 1, 1);
      tiles.append(d);
    }
    return tiles;
  });
  m.def("place", [](int index, int pixel_tiles, int channel_tiles, int split) {
    const Sm90Place p = sm90_place(index, pixel_tiles, channel_tiles, split);
    return py::make_tuple(p.pixel, p.channel, p.part);
  });
  m.def("planted", [](int bug, std::array<uintptr_t, 4> p, uintptr_t flags) {
    check(planted_sm90::run(bug, pointer<void>(p[0]), pointer<void>(p[1]), pointer<void>(p[2]),
                            pointer<void>(p[3]), pointer<float>(flags)));
  });
  m.def("bugs", [] { return int(planted_sm90::kBugs); });
}
