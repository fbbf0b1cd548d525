// What the processor can do at most: multiplications and additions in registers, of as many chains as hide their latency.
#pragma once

#include "gemm.h"

namespace mbn {
namespace MBN_ISA {

// Runs `rounds` rounds; returns how many operations a round has.
static int64_t peak(int64_t rounds) {
  constexpr int kChains = 12;
  Vec<float> sums[kChains] = {}, a = broadcast(0.5f), b = broadcast(0.25f);
  keep_in_register(a);
  keep_in_register(b);
  for (int64_t i = 0; i < rounds; ++i) {
    MBN_UNROLL
    for (int j = 0; j < kChains; ++j) {
      sums[j] = sums[j] * a + b;
      keep_in_register(sums[j]);  // chains that are alike would be computed once
    }
  }
  MBN_UNROLL
  for (int j = 1; j < kChains; ++j) sums[0] += sums[j];
  volatile float used = sums[0][0];
  (void)used;
  return 2 * kChains * kLanes<float>;
}

}  // namespace MBN_ISA
}  // namespace mbn
