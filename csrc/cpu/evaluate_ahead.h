// Prefetching of weights: a network's do not fit the second-level cache, so those that are read next are asked for while this layer computes.
#pragma once

#include "vec.h"

namespace mbn {
namespace MBN_ISA {

// The weights that one member reads, in the order in which it does, and how far they have been asked for.
struct WeightsAhead {
  struct Weights {
    const char* begin;
    int64_t size, before;  // before: bytes of all earlier ones
  };
  Weights* list;
  int64_t count, read;     // read: which is being read
  int64_t asked, may_ask;  // bytes of all weights together: up to where they were, and may be, asked for
  int64_t in;              // which `asked` lies in
};

constexpr int64_t kAheadBytes = 320 << 10;

MBN_INLINE WeightsAhead make_ahead(Scratch& scratch, int64_t most) {
  WeightsAhead ahead = {};
  ahead.list = take<WeightsAhead::Weights>(scratch, most);
  return ahead;
}
MBN_INLINE void add_weights(WeightsAhead& ahead, const void* begin, int64_t size) {
  if (begin == nullptr || size <= 0) return;
  const int64_t before = ahead.count > 0 ? ahead.list[ahead.count - 1].before + ahead.list[ahead.count - 1].size : 0;
  ahead.list[ahead.count++] = {static_cast<const char*>(begin), size, before};
}
MBN_INLINE void start_again(WeightsAhead& ahead) { ahead.read = ahead.in = ahead.asked = ahead.may_ask = 0; }

// Before weights from `p` on are read.
static __attribute__((noinline)) void reading(WeightsAhead& ahead, const void* p) {
  const char* at = static_cast<const char*>(p);
  for (int64_t i = ahead.read; i < ahead.count; ++i) {
    const WeightsAhead::Weights& w = ahead.list[i];
    if (at < w.begin || at >= w.begin + w.size) continue;
    ahead.read = i;
    const int64_t position = w.before + (at - w.begin);
    ahead.asked = larger(ahead.asked, position);
    ahead.may_ask = position + kAheadBytes;
    return;
  }
}

// A part of the weights to ask for, line by line.
struct AheadLines {
  const char* at;
  int64_t count;
};
// Up to so many cache lines more.
MBN_INLINE AheadLines next_lines(WeightsAhead* ahead, int64_t most) {
  if (ahead == nullptr || ahead->asked >= ahead->may_ask) return {nullptr, 0};
  while (ahead->in < ahead->count && ahead->asked >= ahead->list[ahead->in].before + ahead->list[ahead->in].size) ++ahead->in;
  if (ahead->in == ahead->count) return {nullptr, 0};
  const WeightsAhead::Weights& w = ahead->list[ahead->in];
  const int64_t from = ahead->asked - w.before, lines = smaller(most, ceil_div(smaller(w.size, ahead->may_ask - w.before) - from, 64));
  ahead->asked = smaller(ahead->asked + lines * 64, w.before + w.size);
  return {w.begin + from, lines};
}

}  // namespace MBN_ISA
}  // namespace mbn
