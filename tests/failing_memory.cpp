// For LD_PRELOAD: memory that one library asks for is refused where a test says so. Its own requests are known by the address they return to.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {
std::atomic<uintptr_t> first{0}, last{0};
std::atomic<long> asked{0}, refused_at{-1};
std::atomic<bool> large_only{false};

// Whether the call that returns to `address` is the one to refuse.
bool refuses(void* address, bool large) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  return at >= first && at < last && (large || !large_only) && asked++ == refused_at;
}
}  // namespace

// From now on, requests from code in [begin, end) are counted, all or those for scratch and buffers, and the n-th of them, from 0, fails.
extern "C" void refuse(uintptr_t begin, uintptr_t end, bool large, long n) {
  asked = 0, refused_at = n, large_only = large, first = begin, last = end;
}
extern "C" long requests() { return asked; }

extern "C" void* aligned_alloc(size_t alignment, size_t size) {
  static const auto next = reinterpret_cast<void* (*)(size_t, size_t)>(dlsym(RTLD_NEXT, "aligned_alloc"));
  return refuses(__builtin_return_address(0), true) ? nullptr : next(alignment, size);
}
void* operator new(size_t size) {
  void* memory = refuses(__builtin_return_address(0), false) ? nullptr : std::malloc(size > 0 ? size : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t size, std::align_val_t alignment) {
  static const auto next = reinterpret_cast<void* (*)(size_t, size_t)>(dlsym(RTLD_NEXT, "aligned_alloc"));
  const size_t step = size_t(alignment);
  void* memory = refuses(__builtin_return_address(0), false) ? nullptr : next(step, (size + step - 1) / step * step);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
