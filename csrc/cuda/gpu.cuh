// What kernels ask of a GPU, a few functions each with one instruction behind it: with csrc/activation.h the only file that knows PTX.
//
// On a machine without a GPU the tests compile the kernels with an ordinary C++ compiler; there tests/cuda_host/gpu_on_host.h has the same
// functions, and runs a block's threads one after the other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activation.h"
#include "types.h"

#if !defined(__CUDACC__)
#include <gpu_on_host.h>
#else

#include <cuda_fp16.h>

#define MBN_DEVICE static __device__ __forceinline__
#define MBN_DEVICE_MEMBER __device__ __forceinline__
#define MBN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// A barrier for a block, and a wait for the copies that this thread has started, but for the last `pending` groups of them; other threads see
// them after the next barrier. Macros, so that a test can leave out the one at a given line.
#define MBN_BARRIER() __syncthreads()
#define MBN_WAIT_COPIES(pending) ::mbn::wait_copies<pending>()

namespace mbn {

constexpr int kWarp = 32;

// The block's shared memory; its size is given at the launch.
MBN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

MBN_DEVICE int thread_index() { return int(threadIdx.x); }
MBN_DEVICE int block_index() { return int(blockIdx.x); }

// 16 bytes from global to shared memory, 16 zeros if not `wanted`, without waiting. A thread's copies since its last
// commit_copies() are one group.
MBN_DEVICE void copy_async(void* to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "r"(wanted ? 16 : 0)
               : "memory");
}
MBN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
MBN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8 and gets elements 2 * (l % 4) and the next of
// row l / 4 of each.
MBN_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// sum += a b by a whole warp: a is 16x16, b 16x8, sum 16x8. With g = lane / 4 and t = lane % 4, each register two neighbours k, k + 1:
//   a: (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8)    b: (2t, g) (2t + 8, g)    sum: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
template <class S>
MBN_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply<bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<float16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The sum over a warp, the same in all of its lanes.
MBN_DEVICE float sum_of_warp(float v) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) v += __shfl_xor_sync(0xffffffffu, v, apart);
  return v;
}

// Two 16-bit numbers in a word, the first in the low half, rounded to nearest even.
template <class S>
MBN_DEVICE uint32_t pack(Pair v);
template <>
__device__ __forceinline__ uint32_t pack<bfloat16>(Pair v) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(v.b), "f"(v.a));
  return out;
}
template <>
__device__ __forceinline__ uint32_t pack<float16>(Pair v) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(v.b), "f"(v.a));
  return out;
}

MBN_DEVICE float reciprocal_root(float v) { return rsqrtf(v); }

MBN_DEVICE Pair unpack_float16(uint32_t word) {
  const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&word));
  return {v.x, v.y};
}

}  // namespace mbn
#endif

namespace mbn {

template <class S>
MBN_DEVICE Pair unpack(uint32_t word) {
  if constexpr (sizeof(S) == 2 && S::kBrain) {
    return {float_of_bits(word << 16), float_of_bits(word & 0xffff0000u)};
  } else {
    return unpack_float16(word);
  }
}

template <class S>
MBN_DEVICE float to_float(S v) {
  if constexpr (sizeof(S) == 2) {
    return unpack<S>(v.bits).a;
  } else {
    return v;
  }
}

// Two neighbouring channels, the unit of every thread's work; `at` is even.
template <class S>
MBN_DEVICE Pair load_pair(const S* p, int64_t at) {
  if constexpr (sizeof(S) == 2) {
    return unpack<S>(*reinterpret_cast<const uint32_t*>(p + at));
  } else {
    return *reinterpret_cast<const Pair*>(p + at);
  }
}
// Stores and returns what is stored, as rounded.
template <class S>
MBN_DEVICE Pair store_pair(S* p, int64_t at, Pair v) {
  if constexpr (sizeof(S) == 2) {
    const uint32_t word = pack<S>(v);
    *reinterpret_cast<uint32_t*>(p + at) = word;
    return unpack<S>(word);
  } else {
    *reinterpret_cast<Pair*>(p + at) = v;
    return v;
  }
}

// Two of a per-channel vector; `otherwise` where there is none.
MBN_DEVICE Pair vector_pair(const float* p, int64_t at, float otherwise) {
  return p == nullptr ? Pair{otherwise, otherwise} : Pair{p[at], p[at + 1]};  // a parameter may begin anywhere
}

MBN_DEVICE Pair multiply_add(Pair a, Pair b, Pair c) { return {fmaf(a.a, b.a, c.a), fmaf(a.b, b.b, c.b)}; }

template <int N>
MBN_DEVICE void activate_all(Pair (&v)[N], int act) {
  with_act(static_cast<Act>(act), [&](auto tag) {  // one branch around many numbers
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = {activate<decltype(tag)::act>(v[i].a), activate<decltype(tag)::act>(v[i].b)};
  });
}

template <class S>
MBN_DEVICE float parameter(const Parameter& p, int64_t at) {
  return p.wide ? static_cast<const float*>(p.numbers)[at] : to_float(static_cast<const S*>(p.numbers)[at]);
}
template <class S>
MBN_DEVICE Pair parameter_pair(const Parameter& p, int64_t at, float otherwise) {
  if (p.numbers == nullptr) return {otherwise, otherwise};
  return {parameter<S>(p, at), parameter<S>(p, at + 1)};
}

// Batch norm by running statistics as a factor and a summand.
template <class S>
MBN_DEVICE void fold(const RunningNorm& norm, int channel, Pair& scale, Pair& shift) {
  const Pair var = parameter_pair<S>(norm.var, channel, 1), mean = parameter_pair<S>(norm.mean, channel, 0);
  const Pair weight = parameter_pair<S>(norm.weight, channel, 1), bias = parameter_pair<S>(norm.bias, channel, 0);
  scale = {weight.a * reciprocal_root(var.a + norm.eps), weight.b * reciprocal_root(var.b + norm.eps)};
  shift = {bias.a - mean.a * scale.a, bias.b - mean.b * scale.b};
}

}  // namespace mbn
