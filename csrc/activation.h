// Every activation of the family and its derivative, written once for scalars, CPU vectors and CUDA threads.
//
// V is float, double, or a GCC/Clang vector of them; all operators are per lane. NaN passes through as it does in PyTorch, and at a
// kink (0, 6, -3, 3) the derivative is the subgradient that PyTorch gives.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MBN_INLINE static __host__ __device__ __forceinline__
#define MBN_MEMBER static __host__ __device__ __forceinline__
#else
// Internal linkage and forced inlining: the same template is compiled for several instruction sets in one library, so no
// out-of-line copy may ever be shared between them.
#define MBN_INLINE static inline __attribute__((always_inline))
#define MBN_MEMBER static inline __attribute__((always_inline))
#endif

namespace mbn {

// The values are part of the operators' schemas: mbn_kernels/activations.py holds the same table.
enum class Act : int { identity = 0, relu = 1, relu6 = 2, hardswish = 3, silu = 4, hardsigmoid = 5, sigmoid = 6 };
constexpr int kActCount = 7;

// e^x; csrc/cpu/vec.h adds the vectors.
template <class V>
struct Exponential;
template <>
struct Exponential<float> {
  MBN_MEMBER float of(float x) { return expf(x); }
};
template <>
struct Exponential<double> {
  MBN_MEMBER double of(double x) { return exp(x); }
};

template <class V>
MBN_INLINE V logistic(V n) {
  return 1 / (1 + Exponential<V>::of(-n));
}

// clamp(n + 3, 0, 6) / 6, the gate of squeeze-excite and the slope of hard-swish.
template <class V>
MBN_INLINE V hard_logistic(V n) {
  V t = n + 3;
  t = t < 0 ? V{} : t;
  t = t > 6 ? V{} + 6 : t;
  return t * ((V{} + 1) / 6);  // a division per element costs more than the rest of a kernel
}

template <Act A, class V>
MBN_INLINE V activate(V n) {
  if constexpr (A == Act::relu) return n < 0 ? V{} : n;
  if constexpr (A == Act::relu6) {
    V t = n < 0 ? V{} : n;
    return t > 6 ? V{} + 6 : t;
  }
  if constexpr (A == Act::hardswish) return n * hard_logistic(n);
  if constexpr (A == Act::silu) return n * logistic(n);
  if constexpr (A == Act::hardsigmoid) return hard_logistic(n);
  if constexpr (A == Act::sigmoid) return logistic(n);
  return n;
}

template <Act A, class V>
MBN_INLINE V activate_grad(V n) {
  const V zero = V{}, one = V{} + 1;
  if constexpr (A == Act::relu) return n <= 0 ? zero : one;
  if constexpr (A == Act::relu6) {
    V t = n <= 0 ? zero : one;
    return n >= 6 ? zero : t;
  }
  if constexpr (A == Act::hardswish) {
    V t = n * (one / 3) + one / 2;
    t = n <= -3 ? zero : t;
    return n >= 3 ? one : t;
  }
  if constexpr (A == Act::silu) {
    const V s = logistic(n);
    return s * (1 + n * (1 - s));
  }
  if constexpr (A == Act::hardsigmoid) {
    V t = n > -3 ? one / 6 : zero;
    return n < 3 ? t : zero;
  }
  if constexpr (A == Act::sigmoid) {
    const V s = logistic(n);
    return s * (1 - s);
  }
  return one;
}

}  // namespace mbn
