// torch.ops.mbn.cpu_buffer: large activations in memory that earlier ones have left.
//
// An allocator that asks the system for every large tensor pays for its pages each time: the kernel's zeroing of 51 MB costs ten times what
// filling them does. A training step wants the same sizes again and again, so freed blocks are kept for the next request of about their size.
// What is kept is bounded: blocks in use and kept together stay within a quarter above the most that has been in use at once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#include "check.h"

namespace mbn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kHugePage = size_t{2} << 20;

class Buffers {
 public:
  void* take(size_t bytes) {
    const size_t size = rounded(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    void* data = reuse(size);
    if (data == nullptr) {
      in_use_ += size;
      if (in_use_ > most_in_use_) most_in_use_ = in_use_;
      trim(most_in_use_ + most_in_use_ / 4);
      data = allocate(size);
      if (data == nullptr) {  // what is kept may be what is missing
        trim(0);
        data = allocate(size);
      }
      if (data == nullptr) in_use_ -= size;
      MBN_CHECK(data != nullptr, "cpu_buffer: size: expected at most the free memory, got ", bytes, " bytes");
      sizes_[data] = size;
    }
    return data;
  }

  void give_back(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t size = sizes_.at(data);
    in_use_ -= size;
    kept_bytes_ += size;
    kept_[size].push_back({data, clock_++});
  }

  void trim_all() {
    const std::lock_guard<std::mutex> lock(mutex_);
    trim(0);
    most_in_use_ = in_use_;
  }

  int64_t kept_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return int64_t(kept_bytes_);
  }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Kept {
    void* data;
    uint64_t since;
  };

  // Eight sizes for each power of two: sizes that differ a little share blocks, and no more than an eighth is lost.
  static size_t rounded(size_t bytes) {
    size_t step = size_t{1} << 16;
    while (step * 16 <= bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  // The block that was given back last: the caches may still hold it.
  void* reuse(size_t size) {
    const auto found = kept_.lower_bound(size);
    if (found == kept_.end() || found->first > size + size / 4) return nullptr;
    void* data = found->second.back().data;
    in_use_ += found->first;
    if (in_use_ > most_in_use_) most_in_use_ = in_use_;
    kept_bytes_ -= found->first;
    found->second.pop_back();
    if (found->second.empty()) kept_.erase(found);
    return data;
  }

  static void* allocate(size_t size) {
    void* data = std::aligned_alloc(size < kHugePage ? 64 : kHugePage, size < kHugePage ? size : (size + kHugePage - 1) / kHugePage * kHugePage);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (data != nullptr && size >= kHugePage) madvise(data, size / kHugePage * kHugePage, MADV_HUGEPAGE);  // advice: a failure changes nothing
#endif
    return data;
  }

  // Frees the blocks that were kept longest, until at most `limit` bytes are in use or kept.
  void trim(size_t limit) {
    while (kept_bytes_ > 0 && in_use_ + kept_bytes_ > limit) {
      auto oldest = kept_.begin();
      for (auto it = kept_.begin(); it != kept_.end(); ++it) {
        if (it->second.front().since < oldest->second.front().since) oldest = it;
      }
      void* data = oldest->second.front().data;
      kept_bytes_ -= oldest->first;
      oldest->second.erase(oldest->second.begin());
      if (oldest->second.empty()) kept_.erase(oldest);
      sizes_.erase(data);
      std::free(data);
    }
  }

  std::mutex mutex_;
  std::map<size_t, std::vector<Kept>> kept_;  // by size, each list in the order in which the blocks came back
  std::unordered_map<void*, size_t> sizes_;   // of every block, in use or kept
  size_t in_use_ = 0, kept_bytes_ = 0, most_in_use_ = 0;
  uint64_t clock_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Buffers& buffers() {
  static Buffers* all = [] {
    auto* made = new Buffers;
#if defined(__linux__)
    // A child must not inherit the lock from a thread that it does not have.
    pthread_atfork([] { buffers().mutex().lock(); }, [] { buffers().mutex().unlock(); }, [] { buffers().mutex().unlock(); });
#endif
    return made;
  }();
  return *all;
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

void cpu_empty_cache() { buffers().trim_all(); }
int64_t cpu_cached_bytes() { return buffers().kept_bytes(); }

}  // namespace
}  // namespace mbn

// They take no tensor whose device could choose a kernel.
STABLE_TORCH_LIBRARY_IMPL(mbn, CompositeExplicitAutograd, m) {
  m.impl("cpu_buffer", TORCH_BOX(&mbn::cpu_buffer));
  m.impl("cpu_empty_cache", TORCH_BOX(&mbn::cpu_empty_cache));
  m.impl("cpu_cached_bytes", TORCH_BOX(&mbn::cpu_cached_bytes));
}
