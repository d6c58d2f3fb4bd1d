// A second stack on the same host thread, and the switch to it and back.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace r3d::emu {

#if defined(__x86_64__)
// Saves the registers that a call must keep on the current stack, and goes on where `to` was saved. glibc's
// swapcontext does the same with a system call each time, some fifty times slower.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save: rdi*/, void* /*to: rsi*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

class Fiber {
 public:
  Fiber() {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    size_ = kStack + page;
    void* memory =
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
    mprotect(base_, page, PROT_NONE);  // a stack overflow ends in a fault, not in another thread's variables
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { munmap(base_, size_); }

  // The next resume() calls entry(), which must end in a leave() that is never resumed.
  void prepare(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(base_ + size_ - kStack,
                                  kStack);  // an abandoned run leaves its frames poisoned
    fake_ = nullptr;
#endif
#if defined(__x86_64__)
    void** top =
        reinterpret_cast<void**>(base_ + size_) - 1;  // 16-byte alignment at the entry, as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    here_ = top;
#else
    getcontext(&here_);
    here_.uc_stack.ss_sp = base_ + size_ - kStack;
    here_.uc_stack.ss_size = kStack;
    here_.uc_link = nullptr;
    makecontext(&here_, entry, 0);
#endif
  }

  // Called from the host's stack: runs the fiber until it leaves.
  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* host_fake = nullptr;
    __sanitizer_start_switch_fiber(&host_fake, base_ + size_ - kStack, kStack);
#endif
#if defined(__x86_64__)
    switch_stack(&host_, here_);
#else
    swapcontext(&host_, &here_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(host_fake, nullptr, nullptr);
#endif
  }

  // Called on the fiber's stack: back to resume(). `last` frees what the sanitizer keeps for this run.
  void leave(bool last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_, host_bottom_, host_size_);
#else
    (void)last;
#endif
#if defined(__x86_64__)
    switch_stack(&here_, host_);
#else
    swapcontext(&here_, &host_);
#endif
    arrived();
  }

  // First thing on the fiber's stack after every switch to it.
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, &host_bottom_, &host_size_);
#endif
  }

 private:
  static constexpr size_t kStack = size_t(256) << 10;
  char* base_;
  size_t size_;
#if defined(__x86_64__)
  void* here_ = nullptr;
  void* host_ = nullptr;
#else
  ucontext_t here_, host_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_ = nullptr;
  const void* host_bottom_ = nullptr;
  size_t host_size_ = 0;
#endif
};

}  // namespace r3d::emu
