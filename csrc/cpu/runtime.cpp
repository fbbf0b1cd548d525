#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "poison.h"
#include "thrown.h"

namespace mbn {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
struct Block {
  std::unique_ptr<void, Free> memory;
  size_t size, used;
  char* data() const { return static_cast<char*>(memory.get()); }
  void cut(size_t to) {  // what was taken behind it is free again
    forbid(data() + to, used - to);
    used = to;
  }
};
struct Arena {
  std::vector<Block> blocks;
  size_t current = 0;
};
thread_local Arena arena;
// Whole huge pages: with small ones, looking pages up takes as long as streaming through them.
constexpr size_t kAlign = 64, kHugePage = size_t{2} << 20;

// Python's MemoryError, with words; they are made without asking for memory.
class NoScratch : public std::bad_alloc {
 public:
  explicit NoScratch(size_t bytes) { std::snprintf(text_, sizeof text_, "mbn_kernels: scratch: expected at most the free memory, got %zu bytes", bytes); }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[96];
};

}  // namespace

void run_parallel(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
  if (tasks <= 0) return;
  if (tasks == 1) return body(0, 1, context);
  Thrown thrown;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { thrown.by([&] { body(begin, end, context); }); });
  thrown.rethrow();
}

int64_t thread_count() { return int64_t(torch::stable::get_num_threads()); }

Scratch::Scratch()
    : mark_block_(arena.current), mark_used_(arena.blocks.empty() ? 0 : arena.blocks[arena.current].used) {}

Scratch::~Scratch() {
  for (size_t i = mark_block_ + 1; i < arena.blocks.size(); ++i) arena.blocks[i].cut(0);
  if (!arena.blocks.empty()) arena.blocks[mark_block_].cut(mark_used_);
  arena.current = mark_block_;
}

void* Scratch::bytes(size_t wanted) {
  const size_t count = (wanted + kFence + kAlign - 1) / kAlign * kAlign;
  while (arena.current < arena.blocks.size()) {
    Block& block = arena.blocks[arena.current];
    if (block.used + count <= block.size) {
      void* p = block.data() + block.used;
      block.used += count;
      allow(p, wanted);
      return p;
    }
    if (arena.current + 1 == arena.blocks.size()) break;
    arena.blocks[++arena.current].cut(0);
  }
  const size_t size = (count + kHugePage - 1) / kHugePage * kHugePage;
  void* p = std::aligned_alloc(kHugePage, size);
  if (p == nullptr) throw NoScratch(size);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(p, size, MADV_HUGEPAGE);  // advice: a failure changes nothing
#endif
  forbid(static_cast<char*>(p) + wanted, size - wanted);
  arena.blocks.push_back({std::unique_ptr<void, Free>(p), size, count});
  arena.current = arena.blocks.size() - 1;
  return p;
}

}  // namespace mbn
