#include <torch/csrc/stable/library.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <string>

#include "check.h"
#include "kernels.h"
#include "team.h"

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

// The most float32 operations a second, in thousands of millions, that all threads reach in about so many seconds.
double cpu_peak(double seconds) {
  MBN_CHECK(seconds > 0 && seconds < 60, "cpu_peak: seconds: expected more than 0 and less than 60, got ", seconds);
  struct Call {
    double seconds;
    std::atomic<double> total;
  } call = {seconds, {0.0}};
  run_team(
      [](const Member& member, void* given) {
        Call& c = *static_cast<Call*>(given);
        constexpr int64_t kRounds = 20000;
        using Clock = std::chrono::steady_clock;
        double best = 0;
        meet(member);
        for (const auto begin = Clock::now(); std::chrono::duration<double>(Clock::now() - begin).count() < c.seconds;) {
          const auto start = Clock::now();
          const int64_t operations = kernels().peak(kRounds) * kRounds;
          const double rate = double(operations) / std::chrono::duration<double>(Clock::now() - start).count();
          if (rate > best) best = rate;
        }
        double total = c.total.load();
        while (!c.total.compare_exchange_weak(total, total + best)) continue;
      },
      &call);
  return call.total.load() * 1e-9;
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
  m.impl("cpu_peak", TORCH_BOX(&mbn::cpu_peak));
  m.impl("cpu_instruction_set", TORCH_BOX(&mbn::cpu_instruction_set));
}
