// The functions of csrc/cuda/gpu.cuh for an ordinary C++ compiler: the very kernels run on the CPU, one block after the other, its threads as fibers.
//
// A fiber runs until it has to wait for others, at a barrier or with its warp. Shared memory holds NaN at first, so that what is read before it is
// written shows. What a GPU may order one way or the other, a run does in one of two: threads in ascending order, copies as late as they may be; or
// threads in descending order, copies at once. `skipped_file` and `skipped_line` name a barrier or a wait that is left out: a test does so to show
// that it would be missed.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "types.h"

#define MBN_DEVICE static inline
#define MBN_DEVICE_MEMBER inline
#define MBN_KERNEL(threads, blocks) static void
#define MBN_BARRIER() ::mbn::host::barrier(__FILE__, __LINE__)
#define MBN_WAIT_COPIES(pending) ::mbn::wait_copies_at<pending>(__FILE__, __LINE__)

namespace mbn {

constexpr int kWarp = 32;

namespace host {

struct Copy {
  void* to;
  const void* from;
  bool wanted;
  void run() const { wanted ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); }
};

enum class State { runs, at_barrier, at_warp, ended };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::ended;
  std::vector<std::vector<Copy>> groups;  // of copies that are on their way; the last is not committed
};

// What the lanes of a warp show each other.
struct Warp {
  const void* rows[kWarp];
  uint32_t words[kWarp][6];
};

constexpr size_t kStack = 256 * 1024;

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline const std::function<void()>* body;
inline int thread, block;
inline char* shared;
inline bool descending, skipped;
inline std::string skipped_file;
inline int skipped_line = 0;
inline long launches = 0;

inline void wait_as(State state) {
  Fiber& own = fibers[thread];
  own.state = state;
  swapcontext(&own.context, &scheduler);
}

inline bool skips(const char* file, int line) {
  if (line != skipped_line) return false;
  const std::string name(file);
  if (name.size() < skipped_file.size() || name.compare(name.size() - skipped_file.size(), std::string::npos, skipped_file) != 0) return false;
  return skipped = true;
}

inline void barrier(const char* file, int line) {
  if (!skips(file, line)) wait_as(State::at_barrier);
}
inline void warp_barrier() { wait_as(State::at_warp); }

inline void enter() {
  (*body)();
  fibers[thread].groups.assign(1, {});  // copies that nobody waited for have no effect
  fibers[thread].state = State::ended;
  swapcontext(&fibers[thread].context, &scheduler);
}

// Whether all of a warp, or of a block, have come as far as that; then they may go on.
inline bool release(int first, int end, State from) {
  for (int t = first; t < end; ++t) {
    if (fibers[t].state != from) return false;
  }
  for (int t = first; t < end; ++t) fibers[t].state = State::runs;
  return true;
}

// A warp as far as it comes without the others: so that what they have not done yet is missing if it should have waited.
inline void run_warp(int first, int end) {
  do {
    for (int i = first; i < end; ++i) {
      thread = descending ? first + end - 1 - i : i;
      if (fibers[thread].state == State::runs) swapcontext(&scheduler, &fibers[thread].context);
    }
  } while (release(first, end, State::at_warp));
}

inline void run_block(int index, int threads) {
  block = index;
  for (int t = 0; t < threads; ++t) {
    Fiber& f = fibers[t];
    f.groups.assign(1, {});
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
    f.state = State::runs;
  }
  do {
    for (int w = 0; w < threads; w += kWarp) {
      const int first = descending ? threads - kWarp - w : w;
      run_warp(first, first + kWarp);
    }
  } while (release(0, threads, State::at_barrier));
  for (int t = 0; t < threads; ++t) {
    if (fibers[t].state != State::ended) throw std::runtime_error("a barrier was not reached by all threads of block " + std::to_string(index));
  }
}

inline void run(int blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  ++launches;
  if (threads % kWarp != 0) throw std::runtime_error("a block has whole warps: got " + std::to_string(threads) + " threads");
  while (int(fibers.size()) < threads) {
    fibers.emplace_back();
    fibers.back().stack.reset(new char[kStack]);
  }
  warps.resize((threads + kWarp - 1) / kWarp);
  body = &kernel;
  for (int i = 0; i < blocks; ++i) {
    // malloc's own, exactly as large as asked for, so that AddressSanitizer sees what lies beyond
    const std::unique_ptr<char, decltype(&std::free)> memory(static_cast<char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16)), &std::free);
    std::memset(memory.get(), 0xff, shared_bytes);
    shared = memory.get();
    run_block(i, threads);
  }
}

inline Warp& warp() { return warps[thread / kWarp]; }

}  // namespace host

MBN_DEVICE char* shared_memory() { return host::shared; }
MBN_DEVICE int thread_index() { return host::thread; }
MBN_DEVICE int block_index() { return host::block; }

MBN_DEVICE void copy_async(void* to, const void* from, bool wanted) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) throw std::runtime_error("copy_async: not aligned");
  const host::Copy copy = {to, from, wanted};
  if (host::descending) return copy.run();
  host::fibers[host::thread].groups.back().push_back(copy);
}
MBN_DEVICE void commit_copies() { host::fibers[host::thread].groups.emplace_back(); }
template <int Pending>
MBN_DEVICE void wait_copies_at(const char* file, int line) {
  if (host::skips(file, line)) return;
  auto& groups = host::fibers[host::thread].groups;
  while (int(groups.size()) - 1 > Pending) {
    for (const host::Copy& copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}

template <class S>
MBN_DEVICE uint32_t pack(Pair v);
template <class S>
MBN_DEVICE Pair unpack(uint32_t word);

MBN_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  host::Warp& warp = host::warp();
  const int lane = host::thread % kWarp;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) throw std::runtime_error("load_matrices: a row is not aligned");
  warp.rows[lane] = row;
  host::warp_barrier();
  for (int m = 0; m < 4; ++m) std::memcpy(&out[m], static_cast<const char*>(warp.rows[8 * m + lane / 4]) + 4 * (lane % 4), 4);
  host::warp_barrier();
}

MBN_DEVICE float sum_of_warp(float v) {
  host::Warp& warp = host::warp();
  const int lane = host::thread % kWarp;
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    std::memcpy(&warp.words[lane][0], &v, 4);
    host::warp_barrier();
    float other;
    std::memcpy(&other, &warp.words[lane ^ apart][0], 4);
    v += other;
    host::warp_barrier();
  }
  return v;
}

template <class S>
MBN_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::Warp& warp = host::warp();
  const int lane = host::thread % kWarp, g = lane / 4, t = lane % 4;
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(warp.words[lane], own, sizeof own);
  host::warp_barrier();
  for (int k = 0; k < 8; ++k) {  // pairs of the inner dimension: that of word k / 4, lane k % 4
    for (int half = 0; half < 2; ++half) {
      const Pair left = unpack<S>(warp.words[4 * g + k % 4][2 * (k / 4) + half]);
      for (int n = 0; n < 2; ++n) {
        const Pair right = unpack<S>(warp.words[4 * (2 * t + n) + k % 4][4 + k / 4]);
        sum[2 * half + n] += left.a * right.a + left.b * right.b;
      }
    }
  }
  host::warp_barrier();
}

MBN_DEVICE uint32_t bfloat16_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (v != v) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
MBN_DEVICE uint32_t float16_bits(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
template <>
inline uint32_t pack<bfloat16>(Pair v) {
  return bfloat16_bits(v.a) | bfloat16_bits(v.b) << 16;
}
template <>
inline uint32_t pack<float16>(Pair v) {
  return float16_bits(v.a) | float16_bits(v.b) << 16;
}
MBN_DEVICE float reciprocal_root(float v) { return 1 / std::sqrt(v); }
MBN_DEVICE Pair unpack_float16(uint32_t word) {
  _Float16 v[2];
  std::memcpy(v, &word, 4);
  return {float(v[0]), float(v[1])};
}

}  // namespace mbn
