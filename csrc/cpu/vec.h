// Vectors of MBN_VECTOR_BYTES, as GCC/Clang vector types: one portable source, compiled once per instruction set (kernels_<isa>.cpp).
//
// Nothing here, or in any header included after it, may call an inline function of the standard library: its out-of-line copy would be
// compiled for this instruction set and shared with code that runs on machines without it.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "runtime.h"
#include "team.h"
#include "types.h"

namespace mbn {
namespace MBN_ISA {

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(MBN_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = MBN_VECTOR_BYTES / int(sizeof(T));

typedef uint32_t U32 __attribute__((vector_size(MBN_VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(MBN_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(MBN_VECTOR_BYTES / 2)));

template <class T>
MBN_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
MBN_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}
MBN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
MBN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // unlike x + 0 this is x for -0 too, and so costs nothing
}

// Keeps v in a register: left to itself GCC reads an operand of several multiplications from memory for each, and loads become the limit.
template <class V>
MBN_INLINE void keep_in_register(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#else
  (void)v;
#endif
}

// Loads kLanes<T> numbers of storage type S as T.
MBN_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
MBN_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
MBN_INLINE Vec<float> load(const bf16* p) {
  U16 h;
  __builtin_memcpy(&h, p, sizeof h);
  return (Vec<float>)(__builtin_convertvector(h, U32) << 16);
}

MBN_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
MBN_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
MBN_INLINE void store(bf16* p, Vec<float> v) {  // round to nearest even; NaN stays NaN
#if defined(MBN_BF16_PRODUCTS)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &rounded, sizeof rounded);
#else
  const U32 x = (U32)v;
  const U32 rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
  const U32 quiet_nan = U32{} + 0x7fc0;
  const U16 h = __builtin_convertvector(v != v ? quiet_nan : rounded, U16);
  __builtin_memcpy(p, &h, sizeof h);
#endif
}

// n < 2 * N numbers, in pieces of N, N/2, ...: channel counts are multiples of 8 as a rule, and then this is one move.
template <int N, class S>
MBN_INLINE void copy_some(S* to, const S* from, int n) {
  if constexpr (N > 0) {
    if (n & N) {
      __builtin_memcpy(to, from, N * sizeof(S));
      to += N;
      from += N;
    }
    copy_some<N / 2>(to, from, n);
  }
}

// Fewer than kLanes numbers. Not inlined: dozens of loops have this as their rare case.
template <class S>
static __attribute__((noinline)) Vec<Accumulate<S>> load_some(const S* p, int n) {
  constexpr int L = kLanes<Accumulate<S>>;
  S padded[L];
  __builtin_memset(padded, 0, sizeof padded);
  copy_some<L / 2>(padded, p, n);
  return load(padded);
}
template <class S>
static __attribute__((noinline)) void store_some(S* p, Vec<Accumulate<S>> v, int n) {
  constexpr int L = kLanes<Accumulate<S>>;
  S padded[L];
  store(padded, v);
  copy_some<L / 2>(p, padded, n);
}

// The first n numbers, the other lanes zero. Half a vector is the usual tail: channels come in eights.
template <class S>
MBN_INLINE Vec<Accumulate<S>> load(const S* p, int n) {
  constexpr int L = kLanes<Accumulate<S>>;
  if (n >= L) return load(p);
  if (n != L / 2) return load_some(p, n);
  S padded[L];
  __builtin_memcpy(padded, p, sizeof padded / 2);
  __builtin_memset(padded + L / 2, 0, sizeof padded / 2);
  return load(padded);
}
template <class S>
MBN_INLINE void store(S* p, Vec<Accumulate<S>> v, int n) {
  constexpr int L = kLanes<Accumulate<S>>;
  if (n >= L) return store(p, v);
  if (n != L / 2) return store_some(p, v, n);
  S padded[L];
  store(padded, v);
  __builtin_memcpy(p, padded, sizeof padded / 2);
}

// The first n numbers, the other lanes anything: reads on where the array goes on until `end`, for a vector pieced together in memory stalls.
template <class S>
MBN_INLINE Vec<Accumulate<S>> load_within(const S* p, int n, const S* end) {
  return end - p >= kLanes<Accumulate<S>> ? load(p) : load(p, n);
}

// Stores past the caches, a whole cache line at a time: a map that the caches cannot hold need not be read before it is overwritten.
#if defined(__x86_64__) && MBN_VECTOR_BYTES == 64
template <class S>
constexpr bool kStreams = sizeof(S) == sizeof(Accumulate<S>);
template <class T>
MBN_INLINE void stream(T* p, Vec<T> v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Vec<T>*>(p));
#else
  if constexpr (sizeof(T) == sizeof(float)) __builtin_ia32_movntps512(reinterpret_cast<float*>(p), (Vec<float>)v);
  if constexpr (sizeof(T) == sizeof(double)) __builtin_ia32_movntpd512(reinterpret_cast<double*>(p), (Vec<double>)v);
#endif
}
MBN_INLINE void end_streams() { __builtin_ia32_sfence(); }  // before other threads may read what was stored
#else
template <class S>
constexpr bool kStreams = false;
MBN_INLINE void end_streams() {}
#endif

// Whether to stream a map of `size` numbers whose pixels are `channels` wide. Caches of several megabytes a core are usual; what is larger is gone from
// them before it is read.
constexpr int64_t kStreamBytes = int64_t{8} << 20;
template <class S>
MBN_INLINE bool streams(const S* map, int64_t channels, int64_t size) {
  return kStreams<S> && size * int64_t(sizeof(S)) >= kStreamBytes && channels % kLanes<Accumulate<S>> == 0 && reinterpret_cast<uintptr_t>(map) % 64 == 0;
}
template <class S, class Count>
MBN_INLINE void store_or_stream(S* p, Vec<Accumulate<S>> v, Count count, bool streamed) {
  if constexpr (kStreams<S>) {
    if (streamed) return stream(p, v);
  }
  store(p, v, count);
}

// What a number becomes when it is stored as S and read again: statistics are those of the stored tensor.
template <class S>
MBN_INLINE Vec<Accumulate<S>> rounded_to(Vec<Accumulate<S>> v) {
  if constexpr (sizeof(S) == sizeof(Accumulate<S>)) return v;
  S kept[kLanes<Accumulate<S>>];
  store(kept, v);
  return load(kept);
}

// The larger and the smaller of two numbers, and n where it is NaN. GCC makes a comparison and a choice of `n < bound ? bound : n`, and on some processors a
// comparison takes the place of a multiplication, where these take none.
#if defined(__x86_64__) && MBN_VECTOR_BYTES == 64
// By a mask of all lanes: without one, GCC 12 warns of its own header.
MBN_INLINE Vec<float> larger_of(Vec<float> n, Vec<float> bound) { return _mm512_mask_max_ps(n, __mmask16(-1), bound, n); }
MBN_INLINE Vec<double> larger_of(Vec<double> n, Vec<double> bound) { return _mm512_mask_max_pd(n, __mmask8(-1), bound, n); }
MBN_INLINE Vec<float> smaller_of(Vec<float> n, Vec<float> bound) { return _mm512_mask_min_ps(n, __mmask16(-1), bound, n); }
MBN_INLINE Vec<double> smaller_of(Vec<double> n, Vec<double> bound) { return _mm512_mask_min_pd(n, __mmask8(-1), bound, n); }
#elif defined(__x86_64__)
#if MBN_VECTOR_BYTES == 32
#define MBN_OF_VECTORS(name) _mm256_##name
#else
#define MBN_OF_VECTORS(name) _mm_##name
#endif
MBN_INLINE Vec<float> larger_of(Vec<float> n, Vec<float> bound) { return MBN_OF_VECTORS(max_ps)(bound, n); }
MBN_INLINE Vec<double> larger_of(Vec<double> n, Vec<double> bound) { return MBN_OF_VECTORS(max_pd)(bound, n); }
MBN_INLINE Vec<float> smaller_of(Vec<float> n, Vec<float> bound) { return MBN_OF_VECTORS(min_ps)(bound, n); }
MBN_INLINE Vec<double> smaller_of(Vec<double> n, Vec<double> bound) { return MBN_OF_VECTORS(min_pd)(bound, n); }
#undef MBN_OF_VECTORS
#else
template <class V>
MBN_INLINE V larger_of(V n, V bound) {
  return n < bound ? bound : n;
}
template <class V>
MBN_INLINE V smaller_of(V n, V bound) {
  return n > bound ? bound : n;
}
#endif

// e^x: 2^round(x/ln 2) times a polynomial on |r| <= ln2/2; within 2 units in the last place, 0 and infinity where float overflows.
MBN_INLINE Vec<float> exponential(Vec<float> x) {
  const Vec<float> t = smaller_of(larger_of(x, broadcast(-104.0f)), broadcast(89.0f));
  const Vec<float> shifted = t * 1.44269504f + 12582912.0f;  // adding 1.5*2^23 rounds to an integer, held in the low mantissa bits
  const Vec<float> k = shifted - 12582912.0f;
  const Vec<float> r = (t - k * 0.693145752f) - k * 1.42860677e-6f;
  Vec<float> p = broadcast(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // Two factors, so that neither exponent leaves its range: subnormal results and infinity come out by multiplication.
  const I32 n = __builtin_convertvector(k, I32);
  const I32 half = n >> 1;
  const Vec<float> y = p * (Vec<float>)((half + 127) << 23) * (Vec<float>)((n - half + 127) << 23);
  return x != x ? x : y;
}
MBN_INLINE Vec<double> exponential(Vec<double> x) {
  Vec<double> y = x;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

// Runs f(begin, end) over a partition of [0, tasks).
template <class F>
MBN_INLINE void parallel_tasks(int64_t tasks, const F& f) {
  run_parallel(
      tasks, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Runs f(member) in every member of a team.
template <class F>
MBN_INLINE void in_team(const F& f) {
  run_team([](const Member& member, void* context) { (*static_cast<const F*>(context))(member); }, const_cast<void*>(static_cast<const void*>(&f)));
}

// Calls f(piece) for the pieces that fall to this member.
template <class F>
MBN_INLINE void share_pieces(const Member& member, int64_t pieces, const F& f) {
  if (member.size == 1) {
    for (int64_t i = 0; i < pieces; ++i) f(i);
  } else {
    for (int64_t i; (i = take_piece(member, pieces)) >= 0;) f(i);
  }
}

template <class T>
MBN_INLINE T* take(Scratch& scratch, int64_t count) {
  return static_cast<T*>(scratch.bytes(size_t(count) * sizeof(T)));
}

}  // namespace MBN_ISA
}  // namespace mbn

// The activations of activation.h on vectors.
namespace mbn {
template <>
struct Exponential<MBN_ISA::Vec<float>> {
  using V = MBN_ISA::Vec<float>;
  MBN_MEMBER V of(V x) { return MBN_ISA::exponential(x); }
};
template <>
struct Exponential<MBN_ISA::Vec<double>> {
  using V = MBN_ISA::Vec<double>;
  MBN_MEMBER V of(V x) { return MBN_ISA::exponential(x); }
};
template <>
struct Bound<MBN_ISA::Vec<float>> {
  using V = MBN_ISA::Vec<float>;
  MBN_MEMBER V below(V n, V least) { return MBN_ISA::larger_of(n, least); }
  MBN_MEMBER V above(V n, V most) { return MBN_ISA::smaller_of(n, most); }
};
template <>
struct Bound<MBN_ISA::Vec<double>> {
  using V = MBN_ISA::Vec<double>;
  MBN_MEMBER V below(V n, V least) { return MBN_ISA::larger_of(n, least); }
  MBN_MEMBER V above(V n, V most) { return MBN_ISA::smaller_of(n, most); }
};
}  // namespace mbn
