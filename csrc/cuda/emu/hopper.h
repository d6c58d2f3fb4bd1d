// The functions of ../ptx/hopper.cuh in plain C++: barriers in shared memory, TMA, wgmma, named barriers.
//
// What the hardware does by itself may happen at once or as late as it is allowed to: emu::timing() says
// which, and tests run all four combinations. Late copies land only when no thread of the block can go on;
// late products read their operands only when their thread waits for them. What was written to shared memory
// and not fenced is NaN to TMA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda.h"
#include "ptx.h"

#define __grid_constant__

namespace r3d::emu {

struct Timing {
  bool late_copies = false, late_products = false;
};

inline Timing& timing() {
  static thread_local Timing value;
  return value;
}

// What a CUtensorMap says; filled by ../tensor_map.h. The innermost axis comes first, strides are bytes.
struct TensorMap {
  bool im2col;
  int rank;
  char* base;
  int64_t size[5], stride[5];
  int box[5];  // im2col: channels, pixels
  int lower[3], upper[3], step[3];
};

class Hopper : public Engine {
 public:
  static Hopper& get() {
    static thread_local Hopper* made = [] {
      static thread_local Hopper hopper;
      Machine::get().attach(&hopper);
      return &hopper;
    }();
    return *made;
  }

  // ---- the block's shared memory

  size_t dynamic_bytes = 0;  // of the launch

  char* dynamic_shared() {
    static const char site = 0;
    if (!base_) {
      base_ = static_cast<char*>(Machine::get().shared(&site, dynamic_bytes, 1024));
      unfenced_.assign((dynamic_bytes + 15) / 16, -1);
    }
    return base_;
  }

  static constexpr uint64_t kSwizzled = uint64_t(1) << 62;

  // Start address, leading offset (unused), 1024 bytes from eight rows to the next, 128-byte swizzle.
  uint64_t descriptor(const void* p) const {
    const uint64_t offset = offset_of(p);
    if (offset % 16) fail("a matrix descriptor wants an address of a multiple of 16 bytes");
    return (offset >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(64) << 32 | kSwizzled;
  }

  // No swizzle: pieces of eight rows of 16 bytes at two distances.
  uint64_t plain_descriptor(const void* p, int along, int across) const {
    const uint64_t offset = offset_of(p);
    if (offset % 16 || along % 16 || across % 16)
      fail("a matrix descriptor wants an address and distances of multiples of 16 bytes");
    return (offset >> 4 & 0x3fff) | uint64_t(along >> 4) << 16 | uint64_t(across >> 4) << 32;
  }

  // ---- mbarrier

  void init(uint64_t* bar, int count) {
    *bar = kStamp ^ reinterpret_cast<uintptr_t>(bar);
    barriers_[bar] = {count, count, 0, 0};
  }

  void arrive(uint64_t* bar, int64_t expected_bytes) {
    Barrier& b = at(bar);
    if (b.pending == 0) fail("more arrivals at an mbarrier than it was made for");
    b.bytes += expected_bytes;
    b.pending--;
    complete(b);
  }

  void wait(uint64_t* bar, int parity) {
    at(bar);
    Machine::get().wait_for([&] { return int(at(bar).phase & 1) != parity; });
  }

  // ---- kernels in front of this one, which may not have ended when it begins

  void wait_for_earlier() { waited_[Machine::get().thread()] = true; }

  void check_waited() const {
    if (!waited_[Machine::get().thread()]) fail("global memory is used before wait_for_earlier");
  }

  // ---- copies

  void load(void* to, const TensorMap& map, uint64_t* bar, std::vector<int> at, std::vector<int> offsets) {
    check_waited();
    if (offset_of(to) % 128) fail("TMA wants a shared address of a multiple of 128 bytes");
    this->at(bar);
    int64_t bytes = 2;
    for (int i = 0; i < (map.im2col ? 2 : map.rank); i++) bytes *= map.box[i];
    start_copy({Machine::get().thread(), false, [=, this_ = this] {
                  if (map.im2col)
                    this_->im2col(static_cast<char*>(to), map, at, offsets);
                  else
                    this_->tiled(static_cast<char*>(to), map, at, false);
                  Barrier& b = this_->at(bar);
                  b.bytes -= bytes;
                  this_->complete(b);
                }});
  }

  void load_run(void* to, const void* from, int bytes, uint64_t* bar) {
    check_waited();
    const size_t start = offset_of(to);
    if (start % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || bytes <= 0)
      fail("a bulk copy wants addresses and a size of multiples of 16 bytes");
    if (start + bytes > dynamic_bytes) fail("TMA writes past the block's shared memory");
    this->at(bar);
    start_copy({Machine::get().thread(), false, [=, this_ = this] {
                  std::memcpy(to, from, size_t(bytes));
                  std::fill_n(this_->unfenced_.begin() + start / 16, bytes / 16, -1);
                  Barrier& b = this_->at(bar);
                  b.bytes -= bytes;
                  this_->complete(b);
                  Machine::get().progressed();
                }});
  }

  void store(const TensorMap& map, const void* from, std::vector<int> at) {
    check_waited();
    if (offset_of(from) % 128) fail("TMA wants a shared address of a multiple of 128 bytes");
    start_copy({Machine::get().thread(), true, [=, this_ = this] {
                  this_->tiled(static_cast<char*>(const_cast<void*>(from)), map, at, true);
                }});
  }

  // Until the stores of this thread have read shared memory.
  void wait_for_stores() {
    const int self = Machine::get().thread();
    Machine::get().wait_for([&] {
      for (const Copy& c : copies_)
        if (c.store && c.thread == self) return false;
      return true;
    });
  }

  // A write by a thread; TMA sees it after that thread's fence.
  void wrote(void* sixteen_bytes) {
    const size_t i = offset_of(sixteen_bytes) / 16;
    unfenced_[i] = Machine::get().thread();
  }

  void fence() {
    const int self = Machine::get().thread();
    for (int& thread : unfenced_)
      if (thread == self) thread = -1;
  }

  // ---- wgmma

  struct Product {
    std::function<void()> run;
    int group;
  };

  void fence_products() { products().fenced = true; }

  void product(std::function<void()> run) {
    Products& p = products();
    if (!p.fenced) fail("wgmma without wgmma_fence before it");
    if (timing().late_products)
      p.queue.push_back({std::move(run), p.groups});
    else
      run();
  }

  void commit_products() {
    products().groups++;
    products().fenced = false;
  }

  void wait_for_products(int left) {
    Products& p = products();
    size_t done = 0;
    while (done < p.queue.size() && p.queue[done].group < p.groups - left) p.queue[done++].run();
    p.queue.erase(p.queue.begin(), p.queue.begin() + done);
  }

  // Element k of row r of an operand: K-major, rows of 128 bytes, eight rows 1024 bytes from the next eight.
  // The swizzle is one of addresses, as TMA's is: bits 4 to 6 are flipped by bits 7 to 9. Without it, rows of
  // 16 bytes, and both distances from the descriptor.
  void row(uint64_t descriptor, int r, const float* table, float (&out)[16]) const {
    const size_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
    const bool swizzle = descriptor & kSwizzled;
    const size_t along = swizzle ? 16 : (descriptor >> 16 & 0x3fff) << 4;
    const size_t at = start + r / 8 * eight_rows + r % 8 * (swizzle ? 128 : 16);
    for (int half = 0; half < 2; half++) {
      uint16_t bits[8];
      const size_t here = at + half * along;
      if (here + 16 > dynamic_bytes) fail("wgmma reads past the block's shared memory");
      std::memcpy(bits, base_ + (swizzle ? swizzled(here) : here), 16);
      for (int i = 0; i < 8; i++) out[8 * half + i] = table[bits[i]];
    }
  }

  // The 32 bytes of each of an operand's rows one after the other: no operand of a kernel may end behind its
  // block's shared memory, even where its rows overlap, or tools that watch the GPU would tell of it.
  void check_operand(uint64_t descriptor, int rows) const {
    if (((descriptor & 0x3fff) << 4) + size_t(rows) * 32 > dynamic_bytes)
      fail("an operand of wgmma ends behind the block's shared memory");
  }

  // ---- named barriers

  void named_barrier(int id, int count) {
    if (id < 1 || id > 15 || count % 32) fail("a named barrier has a number from 1 to 15 and whole warps");
    met_[0][Machine::get().thread()]++;
    Named& b = named_[id];
    const unsigned generation = b.generation;
    if (++b.arrived == count) {
      b.arrived = 0;
      b.generation++;
      Machine::get().progressed();
    }
    Machine::get().wait_for([&] { return b.generation != generation; });
  }

  // ---- between blocks: they run one after the other, so the order is checked and not tried

  void warp_barrier() {
    met_[1][Machine::get().thread()]++;
    __syncwarp();
  }

  // A ticket has a barrier before it and one behind it, of all that it speaks for.
  void take_ticket(int threads) {
    check_waited();
    const int self = Machine::get().thread(), first = self / threads * threads;
    const std::vector<int>& met = met_[threads == 32];
    std::vector<int>& ticket = ticket_[threads == 32];
    int latest = -2;
    for (int i = first; i < first + threads; i++) {
      if (met[i] < met[self]) fail("a ticket is taken before all threads that it speaks for have met");
      latest = std::max(latest, ticket[i]);
    }
    const bool between = met[self] == latest ? ticket[self] < latest : met[self] >= latest + 2;
    if (met[self] == 0 || !between) fail("a ticket is taken before all threads that it speaks for have met");
    ticket[self] = met[self];
  }

  // ---- seen by the machine

  void block_begins() override {
    barriers_.clear();
    copies_.clear();
    products_.assign(1024, {});
    for (std::vector<int>& met : met_) met.assign(1024, 0);
    for (std::vector<int>& ticket : ticket_) ticket.assign(1024, -2);
    waited_.assign(1024, false);
    for (Named& b : named_) b = {};
    base_ = nullptr;
  }

  bool advance() override {
    if (copies_.empty()) return false;
    const Schedule s = settings().schedule;
    const size_t i = s == Schedule::lockstep   ? 0
                     : s == Schedule::reversed ? copies_.size() - 1
                                               : Machine::get().random() % copies_.size();
    const Copy c = copies_[i];
    copies_.erase(copies_.begin() + i);
    c.run();
    return true;
  }

  void block_ends() override {
    for (const Copy& c : copies_)
      if (!c.store) fail("a block ends with a copy into its shared memory under way");
    while (advance()) continue;
    for (const Products& p : products_)
      if (!p.queue.empty()) fail("a thread ends with a product under way");
  }

 private:
  static constexpr uint64_t kStamp = 0x6d62617272696572;

  struct Barrier {
    int count, pending;
    int64_t bytes;
    unsigned phase;
  };
  struct Copy {
    int thread;
    bool store;
    std::function<void()> run;
  };
  struct Products {
    std::vector<Product> queue;
    int groups = 0;
    bool fenced = false;
  };
  struct Named {
    int arrived = 0;
    unsigned generation = 0;
  };

  [[noreturn]] static void fail(const char* what) { throw std::runtime_error(what); }

  size_t offset_of(const void* p) const {
    const char* c = static_cast<const char*>(p);
    if (!base_ || c < base_ || c >= base_ + dynamic_bytes)
      fail("not an address of the block's shared memory");
    return size_t(c - base_);
  }

  static size_t swizzled(size_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

  Barrier& at(uint64_t* bar) {
    const auto found = barriers_.find(bar);
    if (found == barriers_.end()) fail("an mbarrier is used before mbarrier_init");
    if (*bar != (kStamp ^ reinterpret_cast<uintptr_t>(bar))) fail("an mbarrier was overwritten");
    return found->second;
  }

  void complete(Barrier& b) {
    if (b.pending || b.bytes) return;
    b.phase++;
    b.pending = b.count;
    Machine::get().progressed();
  }

  Products& products() { return products_[Machine::get().thread()]; }

  void start_copy(Copy copy) {
    if (timing().late_copies)
      copies_.push_back(std::move(copy));
    else
      copy.run();
  }

  // `elements` neighbours in global memory, the first `valid` of them there, to or from one row in shared
  // memory.
  void row(char* shared, char* global, int elements, int64_t valid, bool store) {
    const size_t start = offset_of(shared);
    if (start + elements * 2 > dynamic_bytes) fail("TMA writes past the block's shared memory");
    for (int i = 0; i < elements; i += 8) {
      char* s = base_ + swizzled(start + i * 2);
      const int64_t here = std::max<int64_t>(0, std::min<int64_t>(8, valid - i)) * 2;
      if (store) {  // whole 16 bytes, past the last element too
        const bool unseen = unfenced_[size_t(s - base_) / 16] >= 0;
        if (here && unseen) std::memset(global + i * 2, 0xff, 16);
        if (here && !unseen) std::memcpy(global + i * 2, s, 16);
      } else {
        unfenced_[size_t(s - base_) / 16] = -1;
        std::memset(s, 0, 16);
        if (here) std::memcpy(s, global + i * 2, here);
      }
    }
  }

  void tiled(char* shared, const TensorMap& m, const std::vector<int>& at, bool store) {
    int64_t rows = 1;
    for (int i = 1; i < m.rank; i++) rows *= m.box[i];
    for (int64_t r = 0; r < rows; r++) {
      bool inside = at[0] >= 0;
      int64_t offset = at[0] * m.stride[0], rest = r;
      for (int i = 1; i < m.rank; i++) {
        const int64_t x = at[i] + rest % m.box[i];
        rest /= m.box[i];
        inside &= x >= 0 && x < m.size[i];
        offset += x * m.stride[i];
      }
      row(shared + r * 128, m.base + (inside ? offset : 0), m.box[0], inside ? m.size[0] - at[0] : 0, store);
    }
    Machine::get().progressed();
  }

  // Walks the pixels of the box from `at` on: along W, then H, then D, then the samples.
  void im2col(char* shared, const TensorMap& m, const std::vector<int>& at, const std::vector<int>& offsets) {
    int64_t p[3] = {at[1], at[2], at[3]}, n = at[4];
    for (int r = 0; r < m.box[1]; r++) {
      bool inside = n >= 0 && n < m.size[4];
      int64_t offset = at[0] * m.stride[0] + n * m.stride[4];
      for (int i = 0; i < 3; i++) {
        const int64_t x = p[i] + offsets[i];
        inside &= x >= 0 && x < m.size[1 + i];
        offset += x * m.stride[1 + i];
      }
      row(shared + r * 128, m.base + (inside ? offset : 0), m.box[0], inside ? m.size[0] - at[0] : 0, false);
      for (int i = 0; i < 3; i++) {
        p[i] += m.step[i];
        if (p[i] < m.size[1 + i] + m.upper[i]) break;
        p[i] = m.lower[i];
        if (i == 2) n++;
      }
    }
  }

  char* base_ = nullptr;
  std::map<uint64_t*, Barrier> barriers_;
  std::vector<Copy> copies_;
  std::vector<Products> products_;
  std::vector<bool> waited_;
  std::vector<int> met_[2];     // named barriers, and barriers of its warp, that a thread has come to
  std::vector<int> ticket_[2];  // how many it had come to when it took its last ticket between such
  std::vector<int>
      unfenced_;  // for each 16 bytes of shared memory: the thread whose write is not fenced, or -1
  Named named_[16];
};

// The value of every 16-bit pattern.
template <class T>
const float* values() {
  static const std::vector<float> table = [] {
    std::vector<float> t(1 << 16);
    for (int i = 0; i < 1 << 16; i++) t[i] = T::load(uint16_t(i));
    return t;
  }();
  return table.data();
}

// As on the GPU: more than 48 KiB of shared memory only where the launch asks for it.
inline void launch_with_shared(Dim grid, Dim block, size_t bytes, const std::function<void()>& body) {
  Hopper::get().dynamic_bytes = bytes;
  const size_t before = settings().shared_limit;
  settings().shared_limit = size_t(227) << 10;
  launch(grid, block, body);
  settings().shared_limit = before;
}

}  // namespace r3d::emu

#define R3D_DYNAMIC_SHARED(name) char* name = ::r3d::emu::Hopper::get().dynamic_shared()

#define R3D_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), ::r3d::emu::launch_with_shared((grid), (block), (bytes), [&] { (kernel)(__VA_ARGS__); }))

namespace r3d::cuda::hopper {

inline void require_swizzle_alignment(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 1024)
    throw std::runtime_error("shared memory does not begin at 1024 bytes");
}
inline void wait_for_earlier() { emu::Hopper::get().wait_for_earlier(); }
inline void let_next_begin() {}
inline bool elect_one() { return emu::Machine::get().lane() == 0; }

template <int N>
void take_registers() {}
template <int N>
void give_registers() {}

inline void mbarrier_init(uint64_t* bar, int count) { emu::Hopper::get().init(bar, count); }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* bar) { emu::Hopper::get().arrive(bar, 0); }
inline void mbarrier_arrive_expect(uint64_t* bar, int bytes) { emu::Hopper::get().arrive(bar, bytes); }
inline void mbarrier_wait(uint64_t* bar, int parity) { emu::Hopper::get().wait(bar, parity); }

inline void prefetch(const void*) {}
inline void load_tile(void* to, const void* map, uint64_t* bar, int c0, int c1) {
  emu::Hopper::get().load(to, *static_cast<const emu::TensorMap*>(map), bar, {c0, c1}, {});
}
inline void load_tile(void* to, const void* map, uint64_t* bar, int c0, int c1, int c2) {
  emu::Hopper::get().load(to, *static_cast<const emu::TensorMap*>(map), bar, {c0, c1, c2}, {});
}
inline void load_im2col(void* to, const void* map, uint64_t* bar, int c, int w, int h, int d, int n,
                        int off_w, int off_h, int off_d) {
  emu::Hopper::get().load(to, *static_cast<const emu::TensorMap*>(map), bar, {c, w, h, d, n},
                          {off_w, off_h, off_d});
}
inline void store_tile(const void* map, const void* from, int c0, int c1) {
  emu::Hopper::get().store(*static_cast<const emu::TensorMap*>(map), from, {c0, c1});
}
inline void store_tile(const void* map, const void* from, int c0, int c1, int c2) {
  emu::Hopper::get().store(*static_cast<const emu::TensorMap*>(map), from, {c0, c1, c2});
}
inline void load_run(void* to, const void* from, int bytes, uint64_t* bar) {
  emu::Hopper::get().load_run(to, from, bytes, bar);
}
inline void commit_stores() {}
inline void wait_for_stores() { emu::Hopper::get().wait_for_stores(); }
inline void fence_for_copies() { emu::Hopper::get().fence(); }

inline void named_barrier(int id, int threads) { emu::Hopper::get().named_barrier(id, threads); }

inline void warp_barrier() { emu::Hopper::get().warp_barrier(); }

template <int kThreads>
unsigned take_ticket(unsigned* counter) {
  emu::Hopper::get().take_ticket(kThreads);
  return (*counter)++;
}

inline uint64_t descriptor(const void* p) { return emu::Hopper::get().descriptor(p); }
inline uint64_t plain_descriptor(const void* p, int along, int across) {
  return emu::Hopper::get().plain_descriptor(p, along, across);
}
inline uint64_t plus(uint64_t descriptor, int bytes) { return descriptor + uint64_t(bytes >> 4); }
inline void wgmma_fence() { emu::Hopper::get().fence_products(); }
inline void wgmma_commit() { emu::Hopper::get().commit_products(); }
template <int N>
void wgmma_wait() {
  emu::Hopper::get().wait_for_products(N);
  __syncwarp();  // a warp's instruction: no lane goes on before the others
}

template <int N>
void settle(float (&)[N]) {}

// acc[64, N] of a warpgroup += A[64, 16] * B[N, 16]^T. Thread t has rows t/32*16 + t%32/4 (+ 8) and two
// columns of every eight.
template <class T, int N>
void wgmma(float (&acc)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  const int t = emu::Machine::get().thread() % 128;
  float* d = acc;
  emu::Hopper::get().check_operand(a, 64);
  emu::Hopper::get().check_operand(b, N);
  emu::Hopper::get().product([=] {
    const emu::Hopper& hopper = emu::Hopper::get();
    const float* table = emu::values<T>();
    float rows[2][16], columns[2][16];
    for (int i = 0; i < 2; i++) hopper.row(a, t / 32 * 16 + t % 32 / 4 + 8 * i, table, rows[i]);
    // A thread's four sums of eight columns are those of a vector: most of a test's time is spent here.
    using Four __attribute__((vector_size(16))) = float;
    Four left[16];
    for (int k = 0; k < 16; k++) left[k] = Four{rows[0][k], rows[0][k], rows[1][k], rows[1][k]};
    for (int j = 0; j < N / 8; j++) {
      for (int e = 0; e < 2; e++) hopper.row(b, j * 8 + t % 4 * 2 + e, table, columns[e]);
      Four sums = {};
      for (int k = 0; k < 16; k++)
        sums += left[k] * Four{columns[0][k], columns[1][k], columns[0][k], columns[1][k]};
      for (int i = 0; i < 4; i++) d[j * 4 + i] = accumulate ? d[j * 4 + i] + sums[i] : sums[i];
    }
  });
}

// Four 8 x 8 matrices of two-byte elements whose rows lie where lanes 8 * m to 8 * m + 7 say, transposed:
// lane l gets of matrix m elements l/4 of its rows l%4*2 and l%4*2 + 1.
inline void load_transposed(uint32_t (&r)[4], const void* row) {
  emu::Machine& machine = emu::Machine::get();
  const uint64_t word = reinterpret_cast<uintptr_t>(row);
  const auto all = machine.exchange(~0u, &word, 1);
  const int lane = machine.lane();
  for (int m = 0; m < 4; m++) {
    uint16_t pair[2];
    for (int e = 0; e < 2; e++)
      std::memcpy(&pair[e], reinterpret_cast<const char*>(all[m * 8 + lane % 4 * 2 + e][0]) + lane / 4 * 2,
                  2);
    r[m] = uint32_t(pair[1]) << 16 | pair[0];
  }
}

// The way back.
inline void store_transposed(void* row, const uint32_t (&r)[4]) {
  emu::Machine& machine = emu::Machine::get();
  const uint64_t words[2] = {uint64_t(r[1]) << 32 | r[0], uint64_t(r[3]) << 32 | r[2]};
  const auto all = machine.exchange(~0u, words, 2);
  const int lane = machine.lane(), m = lane / 8, i = lane % 8;
  uint16_t out[8];
  for (int c = 0; c < 8; c++) out[c] = uint16_t(all[c * 4 + i / 2][m / 2] >> (m % 2 * 32 + i % 2 * 16));
  std::memcpy(row, out, 16);
  emu::Hopper::get().wrote(row);
}

}  // namespace r3d::cuda::hopper

namespace r3d::cuda {

struct Devices {};

template <class Kernel>
const char* prepare(Devices&, Kernel, int) {
  return nullptr;
}

inline bool captures(void*) { return false; }

inline const char* clear(void* p, size_t bytes, void*) {
  std::memset(p, 0, bytes);
  return nullptr;
}

}  // namespace r3d::cuda
