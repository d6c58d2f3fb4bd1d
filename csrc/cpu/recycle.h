// Memory for outputs. A network frees and asks for the same few large buffers at every call; the system
// allocator gives each of them fresh pages, which cost time (zeroing, page faults) and add up. Here they are
// handed on.
#pragma once

#include <cstdint>

namespace r3d::cpu {

constexpr int64_t kRecycledFrom = 1 << 20;  // bytes; smaller requests are the system's business

// At least `bytes` of memory, aligned to a page. Any thread may take and give back.
void* take(int64_t bytes);
void give_back(void* memory);

// What waits to be used again goes back to the system.
void release_free();

}  // namespace r3d::cpu
