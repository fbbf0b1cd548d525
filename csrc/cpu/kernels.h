// The table of CPU kernels: one per instruction set, chosen once at run time.
#pragma once

#include "types.h"

namespace mbn {

// Evaluation, and weights as it reads them: how many bytes they take, and their packing. pointwise [out][depth], depthwise [channels][taps]; scale [out] is
// multiplied in, null: 1; pack_wide takes numbers that are not of type S.
template <class S>
struct Evaluation {
  void (*evaluate)(const Evaluate<S>&);
  int64_t (*packed_pointwise_size)(int64_t out, int64_t depth);
  int64_t (*packed_depthwise_size)(int64_t channels, int64_t taps);
  void (*pack_pointwise)(const S* weight, int64_t out, int64_t depth, const Accumulate<S>* scale, void* to);
  void (*pack_depthwise)(const S* weight, int64_t channels, int64_t taps, const Accumulate<S>* scale, void* to);
  void (*pack_wide)(const Accumulate<S>* weight, int64_t out, int64_t depth, void* to);
  int64_t (*padded_channels)(int64_t channels);  // of a shift
  int64_t (*dense_channels)(int64_t channels);   // of a dense convolution's input, at each tap
};

template <class S>
struct Kernels {
  void (*pointwise_forward)(const PointwiseForward<S>&);
  void (*pointwise_backward)(const PointwiseBackward<S>&);
  void (*depthwise_forward)(const DepthwiseForward<S>&);
  void (*depthwise_backward)(const DepthwiseBackward<S>&);
  void (*pool)(const Pool<S>&);
  void (*materialize)(const Materialize<S>&);
  void (*materialize_gradient)(const MaterializeGradient<S>&);
  void (*reduce_gradient)(const ReduceGradient<S>&);
  void (*statistics)(const Statistics<S>&);
  Evaluation<S> evaluation;
};

struct AllKernels {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<bf16> b16;
  int64_t (*peak)(int64_t rounds);
};

extern const AllKernels kAvx512Kernels, kAvx2Kernels, kBaselineKernels;
// With products of bfloat16; all else is kAvx512Kernels'.
extern const Evaluation<bf16> kAvx512Bf16Evaluation;

// The best set that this processor runs; MBN_CPU_ISA=avx512_bf16|avx512|avx2|baseline forces one, and is an error where the processor lacks it.
const AllKernels& kernels();

template <class S>
const Kernels<S>& kernels_for();
template <>
inline const Kernels<float>& kernels_for<float>() { return kernels().f32; }
template <>
inline const Kernels<double>& kernels_for<double>() { return kernels().f64; }
template <>
inline const Kernels<bf16>& kernels_for<bf16>() { return kernels().b16; }

}  // namespace mbn
