#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "check.h"
#include "kernels.h"

namespace mbn {
namespace {

#if defined(__x86_64__)
const AllKernels& avx512_bf16() {
  static const AllKernels set = [] {
    AllKernels all = kAvx512Kernels;
    all.name = "avx512_bf16";
    all.b16.evaluation = kAvx512Bf16Evaluation;
    return all;
  }();
  return set;
}

bool runs(const AllKernels& set) {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (&set == &kAvx2Kernels) return avx2;
  if (&set == &kAvx512Kernels) return avx512;
  if (&set == &avx512_bf16()) return avx512 && __builtin_cpu_supports("avx512bf16");
  return &set == &kBaselineKernels;
}
#else
bool runs(const AllKernels& set) { return &set == &kBaselineKernels; }
#endif

const AllKernels* choose() {
#if defined(__x86_64__)
  const AllKernels* const sets[] = {&avx512_bf16(), &kAvx512Kernels, &kAvx2Kernels, &kBaselineKernels};
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
  fail("MBN_CPU_ISA: expected avx512_bf16, avx512, avx2 or baseline, got ", forced ? forced : "nothing");
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
