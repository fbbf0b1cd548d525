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

// The larger and the smaller of a number and a bound; NaN stays NaN. csrc/cpu/vec.h adds the vectors: a comparison and a choice are two instructions.
template <class V>
struct Bound {
  MBN_MEMBER V below(V n, V least) { return n < least ? least : n; }
  MBN_MEMBER V above(V n, V most) { return n > most ? most : n; }
};
#if defined(__CUDA_ARCH__)
template <>
struct Bound<float> {
  MBN_MEMBER float below(float n, float least) {
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(n), "f"(least));
    return out;
  }
  MBN_MEMBER float above(float n, float most) {
    float out;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(n), "f"(most));
    return out;
  }
};
#endif
template <int Least, class V>
MBN_INLINE V at_least(V n) {
  return Bound<V>::below(n, V{} + Least);
}
template <int Most, class V>
MBN_INLINE V at_most(V n) {
  return Bound<V>::above(n, V{} + Most);
}

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
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == sizeof(float)) return __fdividef(1, 1 + Exponential<V>::of(-n));  // to 2 units of the last digit, without a branch
#endif
  return 1 / (1 + Exponential<V>::of(-n));
}

// clamp(n + 3, 0, 6) / 6, the gate of squeeze-excite and the slope of hard-swish.
template <class V>
MBN_INLINE V hard_logistic(V n) {
  return at_most<6>(at_least<0>(n + 3)) * ((V{} + 1) / 6);  // a division per element costs more than the rest of a kernel
}

template <Act A, class V>
MBN_INLINE V activate(V n) {
  if constexpr (A == Act::relu) return at_least<0>(n);
  if constexpr (A == Act::relu6) return at_most<6>(at_least<0>(n));
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

template <Act A>
struct ActTag {
  static constexpr Act act = A;
};

// Calls f(ActTag<act>{}): the one place where an activation chosen at run time becomes a template argument.
template <class F>
MBN_INLINE void with_act(Act act, const F& f) {
  switch (act) {
    case Act::identity: return f(ActTag<Act::identity>{});
    case Act::relu: return f(ActTag<Act::relu>{});
    case Act::relu6: return f(ActTag<Act::relu6>{});
    case Act::hardswish: return f(ActTag<Act::hardswish>{});
    case Act::silu: return f(ActTag<Act::silu>{});
    case Act::hardsigmoid: return f(ActTag<Act::hardsigmoid>{});
    case Act::sigmoid: return f(ActTag<Act::sigmoid>{});
  }
}

}  // namespace mbn
