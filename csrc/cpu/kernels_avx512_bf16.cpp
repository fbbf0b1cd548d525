// AVX-512 with products of bfloat16: what evaluates bfloat16 there.
#if defined(__x86_64__)
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")
#endif

#define MBN_ISA avx512_bf16
#define MBN_BF16_PRODUCTS
#define MBN_VECTOR_BYTES 64
#include "kernel_table.h"

namespace mbn {
const Evaluation<bf16> kAvx512Bf16Evaluation = MBN_EVALUATION_OF(bf16);
}  // namespace mbn

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
