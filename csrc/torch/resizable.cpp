// Tensors over memory of ours whose storage can be resized (`torch.cat(..., out=y)`), as those of torch's own
// allocator can. torch's stable interface makes tensors over foreign memory of a fixed size only, so this is
// a library of its own, for the one torch that it was compiled against (r3d_kernels/_extension.py asks
// which); all else is in _C, for any.
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/version.h>

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int r3d_torch_minor() { return TORCH_VERSION_MAJOR * 100 + TORCH_VERSION_MINOR; }

// The tensor, or where there is none, nullptr, has `release` called for the memory. `dtype` is a ScalarType.
EXPORTED AtenTensorHandle r3d_tensor_over(void* memory, void (*release)(void*), int64_t dims,
                                          const int64_t* sizes, const int64_t* strides,
                                          int32_t dtype) noexcept {
  try {
    const auto count = static_cast<size_t>(dims);
    at::Tensor t = at::for_blob(memory, c10::IntArrayRef(sizes, count))
                       .strides(c10::IntArrayRef(strides, count))
                       .context(memory, release)
                       .resizeable_storage()
                       .allocator(c10::GetCPUAllocator())
                       .options(at::TensorOptions().dtype(static_cast<c10::ScalarType>(dtype)))
                       .make_tensor();
    return torch::aot_inductor::new_tensor_handle(std::move(t));
  } catch (...) {
    return nullptr;
  }
}
