#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "check.h"
#include "kernels.h"

namespace mbn {
namespace {

bool runs(const AllKernels& set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&set == &kAvx2Kernels) return avx2;
  if (&set == &kAvx512Kernels)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return &set == &kBaselineKernels;
}

const AllKernels* choose() {
#if defined(__x86_64__)
  const AllKernels* const sets[] = {&kAvx512Kernels, &kAvx2Kernels, &kBaselineKernels};
#else
  const AllKernels* const sets[] = {&kBaselineKernels};
#endif
  const char* forced = std::getenv("MBN_CPU_ISA");
  for (const AllKernels* set : sets) {
    if (forced != nullptr && *forced != '\0') {
      if (std::string(forced) != set->name) continue;
      MBN_CHECK(runs(*set), "MBN_CPU_ISA: this processor does not run ", forced);
      return set;
    }
    if (runs(*set)) return set;
  }
  fail("MBN_CPU_ISA: expected avx512, avx2 or baseline, got ", forced ? forced : "nothing");
}

std::string cpu_instruction_set() { return kernels().name; }

}  // namespace

const AllKernels& kernels() {
  static const AllKernels* chosen = choose();
  return *chosen;
}

}  // namespace mbn

// It takes no tensor whose device could choose a kernel.
STABLE_TORCH_LIBRARY_IMPL(mbn, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&mbn::cpu_instruction_set));
}
