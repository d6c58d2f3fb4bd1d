#include "parallel.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace r3d::cpu {
namespace {

void run_serially(int64_t begin, int64_t end, int64_t, RangeFn fn, void* context) { fn(begin, end, context); }
int one_thread() { return 1; }

ThreadPool g_pool{run_serially, one_thread};

constexpr int64_t kPage = 4096, kHuge = int64_t{2} << 20;

int64_t rounded(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

// Straight from the system, to which it goes back whole: an allocator would keep what a slot has outgrown.
void* map(int64_t bytes) {
  const size_t whole = static_cast<size_t>(bytes + (bytes < kHuge / 2 ? 0 : kHuge));
  void* p = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  if (bytes < kHuge / 2) return p;
  // Transforms touch a page for each few cache lines: large pages keep them within reach of the first TLB. As
  // many as are at least half full; the rest has small ones.
  char* start = static_cast<char*>(p);
  char* at = start + (kHuge - reinterpret_cast<uintptr_t>(p) % kHuge) % kHuge;
  if (at > start) munmap(start, static_cast<size_t>(at - start));
  if (start + kHuge > at) munmap(at + bytes, static_cast<size_t>(start + kHuge - at));
#if defined(MADV_HUGEPAGE)
  madvise(at, static_cast<size_t>((bytes + kHuge / 2) / kHuge * kHuge), MADV_HUGEPAGE);
#endif
  return at;
}

int64_t mapped_bytes(int64_t bytes) {
  const int64_t huge = bytes < kHuge / 2 ? 0 : (bytes + kHuge / 2) / kHuge * kHuge;
  return huge > bytes ? huge : rounded(bytes, kPage);
}

struct Arena {
  void* data[kScratchSlots] = {};
  int64_t bytes[kScratchSlots] = {};
  void release(int slot) {
    if (data[slot]) munmap(data[slot], static_cast<size_t>(bytes[slot]));
    data[slot] = nullptr;
    bytes[slot] = 0;
  }
  ~Arena() {
    for (int slot = 0; slot < kScratchSlots; ++slot) release(slot);
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
    arena.release(slot);
    const int64_t want = mapped_bytes(bytes);
    arena.data[slot] = map(want);
    arena.bytes[slot] = want;
  }
  return arena.data[slot];
}

}  // namespace r3d::cpu
