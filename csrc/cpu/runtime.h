// What the kernels ask of their surroundings: threads and scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mbn {

// Calls body(begin, end, context) over a partition of [0, tasks) on PyTorch's threads. Throws what the first of them throws, once all have ended.
void run_parallel(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context);

// How many threads run_parallel uses. It may choose who does the work, never what is computed.
int64_t thread_count();

// Scratch memory of the calling thread, 64-byte aligned, kept between calls. Everything taken after a Scratch was made is free again when it ends.
// bytes() throws a std::bad_alloc where the system has no more memory.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* bytes(size_t count);

 private:
  size_t mark_block_, mark_used_;
};

}  // namespace mbn
