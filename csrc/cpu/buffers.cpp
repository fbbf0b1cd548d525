// torch.ops.mbn.cpu_buffer: large activations in memory that earlier ones have left.
//
// An allocator that asks the system for every large tensor pays for its pages each time: the kernel's zeroing of 51 MB costs ten times what
// filling them does. So tensors are cut out of large chunks, at the lowest address where there is room, and what comes back joins its free neighbours:
// whatever sizes a training step wants, it stays within little more than the most that was in use at once. Before the system is asked for another
// chunk, what is free is given back to it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "check.h"
#include "fork.h"
#include "poison.h"

namespace mbn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kHugePage = size_t{2} << 20, kChunk = size_t{256} << 20;
constexpr size_t kStep = 4096;  // sizes are multiples of it

size_t rounded(size_t bytes, size_t step) { return (bytes + step - 1) / step * step; }

// Memory may run out at each step that asks for some; then nothing has changed, and what comes back never asks.
class Buffers {
 public:
  void* take(size_t bytes) {
    const size_t size = rounded(bytes, kStep);
    const std::lock_guard<std::mutex> lock(mutex_);
    char* data = reuse(size);
    if (data == nullptr && grow(size)) data = reuse(size);
    MBN_CHECK(data != nullptr, "cpu_buffer: size: expected at most the free memory, got ", bytes, " bytes");
    allow(data, bytes);
    return data;
  }

  void give_back(void* from) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto node = used_.extract(static_cast<char*>(from));
    forbid(from, node.mapped().size);
    node.mapped().touched = node.mapped().size;
    const auto own = free_.insert(std::move(node)).position, next = std::next(own);
    if (next != free_.end()) join(own, next);
    if (own != free_.begin()) join(std::prev(own), own);
  }

  void release_all() {
    const std::lock_guard<std::mutex> lock(mutex_);
    release();
  }

  // Of what is free, the bytes that the system has given memory to.
  int64_t kept_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t kept = 0;
    for (const auto& range : free_) kept += range.second.touched;
    return int64_t(kept);
  }

 private:
  // The first bytes of it have been in use since the system last got them back.
  struct Range {
    size_t size, touched;
  };
  using Ranges = std::map<char*, Range>;  // by address

  void join(Ranges::iterator range, Ranges::iterator next) {
    if (range->first + range->second.size != next->first || chunks_.count(next->first) > 0) return;
    range->second.size += next->second.size;
    range->second.touched += next->second.touched;
    free_.erase(next);
  }

  // From a free range that is large enough: the one with the most memory for it already, the lowest of those. Null: there is none.
  char* reuse(size_t size) {
    auto best = free_.end();
    for (auto range = free_.begin(); range != free_.end(); ++range) {
      if (range->second.size < size) continue;
      if (best == free_.end() || range->second.touched > best->second.touched) best = range;
      if (best->second.touched >= size) break;
    }
    if (best == free_.end()) return nullptr;
    char* data = best->first;
    auto& [all, touched] = best->second;
    if (all > size) free_.emplace_hint(std::next(best), data + size, Range{all - size, touched > size ? touched - size : 0});
    all = size;
    used_.insert(free_.extract(best));
    return data;
  }

  bool grow(size_t size) {
    release();
    size = rounded(size, kHugePage);
    size_t chunk = size < kChunk ? kChunk : size;
    std::unique_ptr<char, decltype(&std::free)> data(static_cast<char*>(std::aligned_alloc(kHugePage, chunk)), &std::free);
    if (data == nullptr && chunk > size) data.reset(static_cast<char*>(std::aligned_alloc(kHugePage, chunk = size)));
    if (data == nullptr) return false;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(data.get(), chunk, MADV_HUGEPAGE);  // advice: a failure changes nothing
#endif
    Ranges fresh;
    fresh[data.get()] = {chunk, 0};
    chunks_[data.get()] = chunk;
    free_.merge(fresh);
    forbid(data.release(), chunk);
    return true;
  }

  // Gives the system back what is free: whole chunks, and the pages between what is in use.
  void release() {
    for (auto range = free_.begin(); range != free_.end();) {
      const auto chunk = chunks_.find(range->first);
      if (chunk != chunks_.end() && chunk->second == range->second.size) {
        std::free(chunk->first);
        chunks_.erase(chunk);
        range = free_.erase(range);
        continue;
      }
#if defined(__linux__)
      const size_t page = size_t(sysconf(_SC_PAGESIZE)), begin = size_t(range->first), end = begin + range->second.size;
      const size_t first = rounded(begin, page), last = end / page * page;
      if (range->second.touched > 0 && first < last && madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED) == 0) range->second.touched = 0;
#endif
      ++range;
    }
  }

  std::mutex& mutex_ = fork_safe_mutex<Buffers>();
  std::map<char*, size_t> chunks_;
  Ranges free_, used_;
};

// Never destroyed: tensors may outlive every static object.
Buffers& buffers() {
  static Buffers& all = *new Buffers;
  return all;
}

int64_t item_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return 4;
    case ScalarType::Double: return 8;
    case ScalarType::BFloat16: return 2;
    default: fail("cpu_buffer: dtype: expected Float, Double or BFloat16, got ", torch::headeronly::toString(dtype));
  }
}

Tensor cpu_buffer(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype) {
  int64_t bytes = item_bytes(dtype);
  for (const int64_t size : {n, c, h, w}) {
    MBN_CHECK(size > 0 && !__builtin_mul_overflow(bytes, size, &bytes), "cpu_buffer: size: expected positive sizes that fit in memory, got ", n,
              ", ", c, ", ", h, ", ", w);
  }
  const int64_t sizes[] = {n, c, h, w}, strides[] = {c * h * w, 1, w * c, c};
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
  return torch::stable::from_blob(buffers().take(size_t(bytes)), Sizes(sizes, 4), Sizes(strides, 4),
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  +[](void* data) { buffers().give_back(data); });
}

void cpu_empty_cache() { buffers().release_all(); }
int64_t cpu_cached_bytes() { return buffers().kept_bytes(); }

}  // namespace
}  // namespace mbn

// They take no tensor whose device could choose a kernel.
STABLE_TORCH_LIBRARY_IMPL(mbn, CompositeExplicitAutograd, m) {
  m.impl("cpu_buffer", TORCH_BOX(&mbn::cpu_buffer));
  m.impl("cpu_empty_cache", TORCH_BOX(&mbn::cpu_empty_cache));
  m.impl("cpu_cached_bytes", TORCH_BOX(&mbn::cpu_cached_bytes));
}
