// The thread pool, as the kernels see it. The host library (torch, or a test) installs its own.
#pragma once

#include <cstdint>

namespace r3d::cpu {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);

struct ThreadPool {
  void (*run)(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* context);
  int (*threads)();
};

// Runs serially until a pool is installed.
void set_thread_pool(const ThreadPool& pool);
const ThreadPool& thread_pool();

// Calls fn(begin, end) on disjoint ranges that cover [0, n). Which thread takes a range never changes a
// result: every output element is computed by one call, in one order.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& fn) {
  if (n <= 0) return;
  thread_pool().run(
      0, n, grain, [](int64_t b, int64_t e, void* ctx) { (*static_cast<F*>(ctx))(b, e); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

// Scratch memory of the calling thread: 64-byte aligned, kept and reused, grows to the largest request.
// Slots are independent of one another; a new request on a slot invalidates the previous one on it.
constexpr int kScratchSlots = 5;
void* scratch(int slot, int64_t bytes);

// Size of one core's second-level cache; 1 MiB where the system does not tell.
int64_t l2_bytes();

}  // namespace r3d::cpu
