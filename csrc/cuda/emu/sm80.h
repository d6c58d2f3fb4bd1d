// The functions of ../ptx/sm80.cuh in plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda.h"
#include "ptx.h"

#define R3D_DYNAMIC_SHARED(name)                           \
  static const char name##_site = 0;                       \
  unsigned char* const name = static_cast<unsigned char*>( \
      ::r3d::emu::Machine::get().shared(&name##_site, ::r3d::emu::dynamic_bytes(), 128))

namespace r3d::emu {

inline size_t& dynamic_bytes() {
  static thread_local size_t bytes = 0;
  return bytes;
}

// The copies of the current block's threads that have not landed. With Settings::late_copies a copy reads and
// writes when it is waited for, otherwise at once: real ones do so at any time between.
class AsyncCopies {
 public:
  static AsyncCopies& get() {
    static thread_local AsyncCopies copies;
    return copies;
  }

  void copy(void* to, const void* from, int real) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (real && reinterpret_cast<uintptr_t>(from) % 16))
      throw std::runtime_error("cp.async of 16 bytes at an address that is no multiple of 16");
    if (real < 0 || real > 16) throw std::runtime_error("cp.async reads 0 to 16 bytes");
    const Copy made{to, from, real};
    if (settings().late_copies)
      thread().open.push_back(made);
    else
      land(made);
  }

  void commit() {
    Thread& t = thread();
    t.groups.push_back(std::move(t.open));
    t.open.clear();
  }

  void wait(int youngest) {
    Thread& t = thread();
    const size_t keep = size_t(youngest + settings().fewer_waited);
    while (t.groups.size() > keep) {
      for (const Copy& c : t.groups.front()) land(c);
      t.groups.erase(t.groups.begin());
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    int real;  // bytes; zeros behind them
  };
  struct Thread {
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
  };

  static void land(const Copy& c) {
    std::memset(c.to, 0, 16);
    if (c.real) std::memcpy(c.to, c.from, size_t(c.real));
  }

  Thread& thread() {
    const Machine& machine = Machine::get();
    if (block_ != machine.block_serial) {
      block_ = machine.block_serial;
      threads_.clear();
      threads_.resize(machine.threads());
    }
    return threads_[machine.thread()];
  }

  uint64_t block_ = 0;
  std::vector<Thread> threads_;
};

// Word lane%4 of row lane/4 of each of n matrices; `rows` lanes gave the addresses.
inline void load_matrices(uint32_t* d, const void* row, int n, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 && Machine::get().lane() < 8 * n)
    throw std::runtime_error("ldmatrix of a row whose address is no multiple of 16");
  const uint64_t word = reinterpret_cast<uint64_t>(row);
  auto all = Machine::get().exchange(~0u, &word, 1);
  const int lane = Machine::get().lane();
  for (int i = 0; i < n; i++) {
    auto address = [&](int r) { return reinterpret_cast<const char*>(all[8 * i + r][0]); };
    if (!transposed) {
      std::memcpy(&d[i], address(lane / 4) + lane % 4 * 4, 4);
    } else {
      uint16_t low, high;
      std::memcpy(&low, address(lane % 4 * 2) + lane / 4 * 2, 2);
      std::memcpy(&high, address(lane % 4 * 2 + 1) + lane / 4 * 2, 2);
      d[i] = uint32_t(high) << 16 | low;
    }
  }
}

// c += a * b as mma.sync does, with `width` numbers in a word and `widen(word, i)` giving the i-th.
template <int width, class Widen>
void multiply(float* c, const uint32_t* a, const uint32_t* b, Widen widen) {
  const uint64_t words[3] = {uint64_t(a[1]) << 32 | a[0], uint64_t(a[3]) << 32 | a[2],
                             uint64_t(b[1]) << 32 | b[0]};
  auto all = Machine::get().exchange(~0u, words, 3);
  const int g = Machine::get().lane() / 4, t = Machine::get().lane() % 4;
  float rows[2][8 * width], columns[2][8 * width];
  for (int lane = 0; lane < 4; lane++)
    for (int half = 0; half < 2; half++)  // the lower and the upper half of k
      for (int i = 0; i < width; i++) {
        const int k = half * 4 * width + lane * width + i;
        const uint64_t* of_row = all[g * 4 + lane];
        rows[0][k] = widen(uint32_t(of_row[half]), i);
        rows[1][k] = widen(uint32_t(of_row[half] >> 32), i);
        for (int j = 0; j < 2; j++)
          columns[j][k] = widen(uint32_t(all[(2 * t + j) * 4 + lane][2] >> (32 * half)), i);
      }
  using Two __attribute__((vector_size(16))) = double;  // a row's two sums
  Two sums[2] = {{c[0], c[1]}, {c[2], c[3]}};
  for (int k = 0; k < 8 * width; k++) {
    const Two right = {columns[0][k], columns[1][k]};
    for (int i = 0; i < 2; i++) sums[i] += Two{rows[i][k], rows[i][k]} * right;
  }
  for (int i = 0; i < 4; i++) c[i] = float(sums[i / 2][i % 2]);
}

inline const float* f16_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t bits = 0; bits < values.size(); bits++) values[bits] = cuda::f16_to_float(uint16_t(bits));
    return values;
  }();
  return table.data();
}

}  // namespace r3d::emu

namespace r3d::cuda {

inline void cp_async_16(void* to, const void* from, int real) {
  emu::AsyncCopies::get().copy(to, from, real);
}
inline void cp_async_commit() { emu::AsyncCopies::get().commit(); }
template <int N>
void cp_async_wait() {
  emu::AsyncCopies::get().wait(N);
}

inline void ldmatrix_x1(uint32_t (&d)[1], const void* row) { emu::load_matrices(d, row, 1, false); }
inline void ldmatrix_x2(uint32_t (&d)[2], const void* row) { emu::load_matrices(d, row, 2, false); }
inline void ldmatrix_x4(uint32_t (&d)[4], const void* row) { emu::load_matrices(d, row, 4, false); }
inline void ldmatrix_x2_trans(uint32_t (&d)[2], const void* row) { emu::load_matrices(d, row, 2, true); }
inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row) { emu::load_matrices(d, row, 4, true); }

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emu::multiply<2>(c, a, b, [](uint32_t word, int i) { return bf16_to_float(uint16_t(word >> (16 * i))); });
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  const float* table = emu::f16_table();
  emu::multiply<2>(c, a, b, [table](uint32_t word, int i) { return table[uint16_t(word >> (16 * i))]; });
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emu::multiply<1>(c, a, b, [](uint32_t word, int) {
    word &= ~0x1fffu;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  });
}

inline uint32_t round_tf32_bits(uint32_t bits) {
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;  // NaN
  if ((bits & 0x7f800000) == 0x7f800000) return bits;       // infinity
  return (bits + 0x1000) & ~0x1fffu;
}
inline float round_tf32(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = round_tf32_bits(bits);
  std::memcpy(&v, &bits, 4);
  return v;
}

template <class... Parameters, class... Arguments>
const char* launch_dynamic(void (*kernel)(Parameters...), dim3 grid, dim3 block, int bytes, void* stream,
                           const Arguments&... arguments) {
  (void)stream;
  if (bytes > 99 << 10) return "more dynamic shared memory than every supported GPU has";
  const size_t limit = emu::settings().shared_limit;
  emu::settings().shared_limit = emu::dynamic_bytes() = size_t(bytes);
  emu::launch(grid, block, [&] { kernel(arguments...); });
  emu::settings().shared_limit = limit;
  return launch_error();
}

}  // namespace r3d::cuda
