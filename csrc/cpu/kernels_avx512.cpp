// x86-64-v4: AVX-512 F, BW, DQ, VL.
#if defined(__x86_64__)
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif

#define MBN_ISA avx512
#define MBN_VECTOR_BYTES 64
#include "kernel_table.h"

namespace mbn {
const AllKernels kAvx512Kernels = {"avx512", MBN_TABLE_OF(float), MBN_TABLE_OF(double), MBN_TABLE_OF(bf16), MBN_ISA::peak};
}  // namespace mbn

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
