#include "recycle.h"

#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace r3d::cpu {
namespace {

constexpr int64_t kPage = 4096;
constexpr int kFree = 8;                           // blocks that wait to be used again
constexpr int64_t kMostFree = int64_t{256} << 20;  // bytes of them

struct Block {
  void* at;
  int64_t bytes;
};

Block g_free[kFree];  // the oldest first
int g_free_count = 0;
int64_t g_free_bytes = 0;
std::atomic_flag g_busy = ATOMIC_FLAG_INIT;

// Never waits for long: after a fork the thread that holds the lock may not exist any more. Who does not get
// it goes to the system.
class Lock {
 public:
  Lock() {
    for (int i = 0; i < 10000 && !held_; ++i) held_ = !g_busy.test_and_set(std::memory_order_acquire);
  }
  ~Lock() {
    if (held_) g_busy.clear(std::memory_order_release);
  }
  explicit operator bool() const { return held_; }

 private:
  bool held_ = false;
};

// A page before the memory says how large it is, so that it can be freed without a list.
void* from_system(int64_t bytes) {
  const int64_t whole = (bytes + kPage - 1) / kPage * kPage + kPage;
#if defined(__linux__)
  void* p =
      mmap(nullptr, static_cast<size_t>(whole), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
#else
  void* p = std::aligned_alloc(kPage, static_cast<size_t>(whole));
  if (!p) throw std::bad_alloc();
#endif
  *static_cast<int64_t*>(p) = whole;
  return static_cast<char*>(p) + kPage;
}

void to_system(void* memory) {
  void* p = static_cast<char*>(memory) - kPage;
#if defined(__linux__)
  munmap(p, static_cast<size_t>(*static_cast<int64_t*>(p)));
#else
  std::free(p);
#endif
}

int64_t size_of(void* memory) {
  return *reinterpret_cast<int64_t*>(static_cast<char*>(memory) - kPage) - kPage;
}

Block remove_free(int i) {
  const Block b = g_free[i];
  for (int j = i; j + 1 < g_free_count; ++j) g_free[j] = g_free[j + 1];
  --g_free_count;
  g_free_bytes -= b.bytes;
  return b;
}

}  // namespace

void* take(int64_t bytes) {
  if (const Lock lock{}) {
    // The smallest that fits and is at most four times as large: half the sides, twice the channels.
    int best = -1;
    for (int i = 0; i < g_free_count; ++i)
      if (g_free[i].bytes >= bytes && g_free[i].bytes / 4 <= bytes &&
          (best < 0 || g_free[i].bytes <= g_free[best].bytes))
        best = i;
    if (best >= 0) return remove_free(best).at;
  }
  return from_system(bytes);
}

void give_back(void* memory) {
  Block out[kFree + 1];
  int count = 0;
  {
    const Lock lock;
    const int64_t bytes = size_of(memory);
    if (lock && bytes <= kMostFree) {
      while (g_free_count == kFree || g_free_bytes + bytes > kMostFree) out[count++] = remove_free(0);
      g_free[g_free_count++] = {memory, bytes};
      g_free_bytes += bytes;
    } else {
      out[count++] = {memory, bytes};
    }
  }
  for (int i = 0; i < count; ++i) to_system(out[i].at);
}

void release_free() {
  Block out[kFree];
  int count = 0;
  if (const Lock lock{})
    while (g_free_count) out[count++] = remove_free(0);
  for (int i = 0; i < count; ++i) to_system(out[i].at);
}

}  // namespace r3d::cpu
