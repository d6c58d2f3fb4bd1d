#include "parallel.h"

#include <sys/mman.h>
#include <unistd.h>

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

int64_t l2_bytes() {
  static const int64_t bytes = [] {
    const long v = sysconf(_SC_LEVEL2_CACHE_SIZE);
    // caches that several cores share are reported whole
    return v<(256 << 10) ? int64_t{1} << 20 : v>(4 << 20) ? int64_t{4} << 20 : static_cast<int64_t>(v);
  }();
  return bytes;
}

void* scratch(int slot, int64_t bytes) {
  static thread_local Arena arena;
  if (arena.bytes[slot] < bytes) {
    // Transforms touch a page for each few cache lines: large pages keep them within reach of the first TLB.
    constexpr int64_t kHuge = int64_t{2} << 20;
    const int64_t page = bytes >= kHuge / 4 ? kHuge : 4096, want = (bytes + page - 1) / page * page;
    std::free(arena.data[slot]);
    arena.bytes[slot] = 0;
    arena.data[slot] = std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(want));
    if (!arena.data[slot]) throw std::bad_alloc();
#if defined(__linux__)
    if (page == kHuge) madvise(arena.data[slot], static_cast<size_t>(want), MADV_HUGEPAGE);
#endif
    arena.bytes[slot] = want;
  }
  return arena.data[slot];
}

}  // namespace r3d::cpu
