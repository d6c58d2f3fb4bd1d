// One multiprocessor: runs the blocks of a launch one after the other, the threads of a block as fibers that
// switch where a GPU thread would wait.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace r3d::emu {

struct Dim {
  unsigned x, y, z;
  constexpr Dim(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum class Schedule { lockstep, reversed, ahead };

struct Settings {
  Schedule schedule = Schedule::lockstep;
  unsigned seed = 1;               // of Schedule::ahead
  int multiprocessors = 2;         // what kernels are told; few, so that loops over the grid go round
  size_t shared_limit = 48 << 10;  // bytes of R3D_SHARED in a block, as nvcc's
  bool late_copies = false;        // cp.async lands when it is waited for, not at once
  // Faults, to see that tests notice them:
  int fewer_waited = 0;   // cp.async.wait_group leaves so many groups more under way
  int skip_barrier = -1;  // no thread waits at its block barrier of this number, from 0
};

inline Settings& settings() {
  static thread_local Settings value;
  return value;
}

// What runs beside the threads of a block: copies under way, say.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual void block_begins() = 0;
  virtual bool advance() = 0;  // called when no thread can go on; true if that may have changed
  virtual void block_ends() = 0;
};

class Machine {
 public:
  static constexpr int kWarp = 32;
  static constexpr int kWords = 4;  // what one lane can give in one exchange
  using Deposits = uint64_t (*)[kWords];

  static Machine& get() {
    static thread_local Machine machine;
    return machine;
  }

  // ---- seen by kernels
  // -------------------------------------------------------------------------------------------

  Dim thread_index() const { return threads_[current_]->index; }
  Dim block_index, block_size, grid_size;
  uint64_t block_serial = 0;  // a new number for every block of every launch
  int thread() const { return current_; }
  int lane() const { return current_ % kWarp; }
  int threads() const { return count_; }

  // Waits for something that another thread or an engine does; whoever does it calls progressed().
  template <class Ready>
  void wait_for(Ready ready) {
    wait(Wait::event, ready);
  }
  void progressed() { progress_ = true; }

  // Waits for all threads of the block that have not returned.
  void sync_block() {
    if (threads_[current_]->barriers++ == settings().skip_barrier) return;
    const unsigned generation = barrier_generation_;
    barrier_waiting_++;
    complete_barrier();
    wait(Wait::barrier, [&] { return barrier_generation_ != generation; });
  }

  // Gives n words and gets those of all lanes in the mask, once they all are there. The answer holds until
  // this lane's next exchange with the same mask.
  Deposits exchange(unsigned mask, const uint64_t* words, int n) {
    const unsigned self = 1u << lane();
    if (!(mask & self))
      throw std::runtime_error(where() + ": exchange with a mask that leaves out the calling lane");
    Exchange& e = warps_[current_ / kWarp].of(mask);
    const unsigned generation = e.generation;
    Deposits slot =
        e.slot[generation % 2];  // two: a fast lane may be at the next exchange while others read this one
    std::copy(words, words + n, slot[lane()]);
    e.arrived |= self;
    if (e.arrived == mask) {
      e.arrived = 0;
      e.generation++;
      progress_ = true;
    }
    wait(Wait::exchange, [&] { return e.generation != generation; });
    return slot;
  }

  // The memory of one R3D_SHARED: the same for all threads of the block. `site` tells the declarations apart.
  void* shared(const void* site, size_t size, size_t alignment) {
    for (const Shared& s : shared_)
      if (s.site == site) return arena_.get() + s.begin;
    alignment = std::max<size_t>(alignment, 16);
    const size_t begin = (shared_end_ + kWall + alignment - 1) / alignment * alignment;
    const size_t end = begin + size;
    shared_used_ += size;
    if (shared_used_ > settings().shared_limit || end + kWall > kArena)
      throw std::runtime_error(where() + ": the block wants " + std::to_string(shared_used_) +
                               " bytes of shared memory");
    shared_.push_back({site, begin, end});
    shared_end_ = end;
    unpoison(begin, end);
    return arena_.get() + begin;
  }

  void attach(Engine* engine) { engines_.push_back(engine); }
  unsigned random() { return next(); }

  // ---- seen by launches
  // ------------------------------------------------------------------------------------------

  void launch(Dim grid, Dim block, const std::function<void()>& body) {
    const uint64_t count = uint64_t(block.x) * block.y * block.z;
    if (count == 0 || count > 1024)
      throw std::runtime_error("a block has 1 to 1024 threads, not " + std::to_string(count));
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
      throw std::runtime_error("the grid has no blocks, or more than the hardware takes");
    if (running_) throw std::runtime_error("a kernel launches a kernel");
    while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
    count_ = int(count);
    body_ = &body;
    grid_size = grid;
    block_size = block;
    random_ = settings().seed;
    std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), uint64_t(0));
    if (settings().schedule == Schedule::reversed) std::reverse(order.begin(), order.end());
    if (settings().schedule == Schedule::ahead) shuffle(order);
    running_ = true;
    try {
      for (uint64_t b : order) {
        block_index = Dim(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
        run_block();
      }
    } catch (...) {
      running_ = false;
      throw;
    }
    running_ = false;
  }

 private:
  enum class Wait { none, barrier, exchange, event };

  struct Thread {
    Fiber fiber;
    Dim index;
    bool done;
    Wait wait;
    int barriers;  // that it has come to
  };

  struct Exchange {
    unsigned mask = 0, arrived = 0, generation = 0;
    uint64_t slot[2][kWarp][kWords];
  };

  struct Warp {
    std::vector<std::unique_ptr<Exchange>> exchanges;  // one a mask: parts of a warp may exchange apart
    Exchange& of(unsigned mask) {
      for (auto& e : exchanges)
        if (e->mask == mask) return *e;
      exchanges.push_back(std::make_unique<Exchange>());
      exchanges.back()->mask = mask;
      return *exchanges.back();
    }
  };

  struct Shared {
    const void* site;
    size_t begin, end;
  };

  static constexpr size_t kArena = size_t(256) << 10;
  static constexpr size_t kWall = 64;
  static constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type

  template <class Ready>
  void wait(Wait why, Ready ready) {
    const int self = current_;
    while (!ready()) {
      threads_[self]->wait = why;
      threads_[self]->fiber.leave(false);
    }
    if (threads_[self]->wait != Wait::none) {
      threads_[self]->wait = Wait::none;
      progress_ = true;
    }
  }

  void complete_barrier() {
    if (live_ > 0 && barrier_waiting_ == live_) {
      barrier_waiting_ = 0;
      barrier_generation_++;
      progress_ = true;
    }
  }

  static void entry() {
    Machine& m = get();
    const int self = m.current_;
    m.threads_[self]->fiber.arrived();
    try {
      (*m.body_)();
    } catch (...) {
      if (!m.error_) m.error_ = std::current_exception();
    }
    m.threads_[self]->done = true;
    m.live_--;
    m.progress_ = true;
    m.complete_barrier();  // a thread that has returned is waited for no longer
    m.threads_[self]->fiber.leave(true);
  }

  // Lets a thread run until it waits; true unless it stands at a block barrier or has returned.
  bool step(int thread) {
    current_ = thread;
    threads_[thread]->fiber.resume();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    return !threads_[thread]->done && threads_[thread]->wait != Wait::barrier;
  }

  void run_block() {
    for (int i = 0; i < count_; i++) {
      Thread& t = *threads_[i];
      t.index = Dim(i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y));
      t.done = false;
      t.wait = Wait::none;
      t.barriers = 0;
      t.fiber.prepare(entry);
    }
    block_serial++;
    live_ = count_;
    barrier_waiting_ = 0;
    warps_ = std::vector<Warp>((count_ + kWarp - 1) / kWarp);
    unpoison(0, kArena);
    std::memset(arena_.get(), kPoison, kArena);
    poison(0, kArena);
    shared_.clear();
    shared_end_ = shared_used_ = 0;

    for (Engine* e : engines_) e->block_begins();

    std::vector<int> order(count_);
    std::iota(order.begin(), order.end(), 0);
    if (settings().schedule == Schedule::reversed) std::reverse(order.begin(), order.end());
    int idle = 0;
    while (live_ > 0) {
      progress_ = false;
      if (settings().schedule == Schedule::ahead)
        run_warp_ahead();
      else
        for (int t : order)
          if (!threads_[t]->done) step(t);
      // A warp picked at random may have nothing to do: only many such picks in a row mean that none has.
      idle = progress_ ? 0 : idle + 1;
      if (idle > (settings().schedule == Schedule::ahead ? 8 * int(warps_.size()) : 1)) {
        bool more = false;
        for (Engine* e : engines_) more |= e->advance();
        if (more)
          idle = 0;
        else if (idle > 64 * int(warps_.size()) || settings().schedule != Schedule::ahead)
          deadlock();
      }
    }
    for (Engine* e : engines_) e->block_ends();
    check_walls();
  }

  void run_warp_ahead() {
    const int warp = int(next() % warps_.size());
    std::vector<int> lanes;
    for (int t = warp * kWarp; t < std::min(count_, (warp + 1) * kWarp); t++) lanes.push_back(t);
    shuffle(lanes);
    for (bool more = true; more;) {
      more = false;
      const bool before = std::exchange(progress_, false);
      for (int t : lanes)
        if (!threads_[t]->done) more |= step(t);
      more &= progress_;  // the whole warp waits for other warps
      progress_ |= before;
    }
  }

  [[noreturn]] void deadlock() {
    int at[4] = {};
    for (int i = 0; i < count_; i++)
      if (!threads_[i]->done) at[int(threads_[i]->wait)]++;
    const int events = at[int(Wait::event)];
    throw std::runtime_error(where() + ": deadlock, " + std::to_string(at[int(Wait::barrier)]) +
                             " threads at a block barrier, " + std::to_string(at[int(Wait::exchange)]) +
                             " at a warp exchange, " +
                             (events ? std::to_string(events) + " waiting for an event, " : "") +
                             std::to_string(count_ - live_) + " returned");
  }

  // Outside the arrays every byte must still be poison.
  void check_walls() {
    unpoison(0, kArena);
    size_t at = 0;
    for (size_t i = 0; i <= shared_.size(); i++) {
      const size_t end =
          i < shared_.size() ? shared_[i].begin : std::min(kArena, shared_end_ + (size_t(4) << 10));
      for (; at < end; at++)
        if (static_cast<unsigned char>(arena_[at]) != kPoison)
          throw std::runtime_error(where() + ": write outside of a shared array");
      if (i < shared_.size()) at = shared_[i].end;
    }
  }

  void poison(size_t begin, size_t end) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(arena_.get() + begin, end - begin);
#else
    (void)begin, (void)end;
#endif
  }

  void unpoison(size_t begin, size_t end) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(arena_.get() + begin, end - begin);
#else
    (void)begin, (void)end;
#endif
  }

  unsigned next() {
    random_ = random_ * 1664525u + 1013904223u;
    return random_ >> 8;
  }

  template <class T>
  void shuffle(std::vector<T>& v) {
    for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[next() % i]);
  }

  std::string where() const {
    return "block (" + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + ", " +
           std::to_string(block_index.z) + ")";
  }

  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(1024)); }
  };
  std::unique_ptr<char[], Free> arena_{static_cast<char*>(::operator new(kArena, std::align_val_t(1024)))};

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<Shared> shared_;
  std::vector<Engine*> engines_;
  size_t shared_end_ = 0, shared_used_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  int count_ = 0, live_ = 0, current_ = 0, barrier_waiting_ = 0;
  unsigned barrier_generation_ = 0, random_ = 1;
  bool progress_ = false, running_ = false;
};

}  // namespace r3d::emu
