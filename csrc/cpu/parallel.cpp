#include "parallel.h"

#include <cstdlib>
#include <new>

namespace r3d::cpu {
namespace {

void run_serially(int64_t begin, int64_t end, int64_t, RangeFn fn, void* context) { fn(begin, end, context); }
int one_thread() { return 1; }

ThreadPool g_pool{run_serially, one_thread};

struct Arena {
  void* data[kScratchSlots] = {};
  int64_t bytes[kScratchSlots] = {};
  ~Arena() {
    for (void* p : data) std::free(p);
  }
};

}  // namespace

void set_thread_pool(const ThreadPool& pool) { g_pool = pool; }
const ThreadPool& thread_pool() { return g_pool; }

void* scratch(int slot, int64_t bytes) {
  static thread_local Arena arena;
  if (arena.bytes[slot] < bytes) {
    const int64_t want = (bytes + 4095) / 4096 * 4096;
    std::free(arena.data[slot]);
    arena.bytes[slot] = 0;
    arena.data[slot] = std::aligned_alloc(64, static_cast<size_t>(want));
    if (!arena.data[slot]) throw std::bad_alloc();
    arena.bytes[slot] = want;
  }
  return arena.data[slot];
}

}  // namespace r3d::cpu
