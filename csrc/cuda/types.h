// What the CUDA kernels take: plain structs, filled by the bindings, which know tensors, and read by the kernels, which know none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MBN_BOTH __host__ __device__ __forceinline__
#else
#define MBN_BOTH inline
#endif

namespace mbn {

enum class Storage : int { float32, float16, bfloat16 };

struct bfloat16 {
  static constexpr bool kBrain = true;
  uint16_t bits;
};
struct float16 {
  static constexpr bool kBrain = false;
  uint16_t bits;
};

// Two neighbouring channels.
struct alignas(8) Pair {
  float a, b;
};

MBN_BOTH float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
#endif
}

MBN_BOTH constexpr int divide_up(int n, int d) { return (n + d - 1) / d; }

// act(scale*y + shift) * gate; null pointers stand for 1, 0 and no gate. Activations are channels-last, in the storage type; per-channel
// numbers [C] and the gate [N, C] are float.
struct Value {
  const void* y;
  const float *scale, *shift, *gate;
  int act;
};

// a*((dv*gate + q)*act'(scale*y + shift)) + b*y + c, likewise; the value is the one whose gradient dv is.
struct Gradient {
  const void* dv;
  Value of;
  const float *q, *a, *b, *c;
};

// Numbers of the caller's, float or of the storage type.
struct Parameter {
  const void* numbers;
  bool wide;
};

// A batch norm by running statistics.
struct RunningNorm {
  Parameter mean, var, weight, bias;  // weight and bias may be null
  float eps;
};

// A square window with one stride both ways; only what is padded at the top and at the left matters, the rest is in the output's size.
struct Map {
  int images, channels, height, width, out_height, out_width, top, left;
};

// How a depthwise kernel's work is shared among blocks of threads. A *unit* is `strip` steps of rows by a tile of `groups` groups of columns, of
// one image; an image has `strips` * `tiles` of them. A block takes one slice of the channels, `vectors` vectors of 16 bytes, and the same
// part, `run` units, of `span` images one after the other (launch.py, Groups).
struct Share {
  int vectors, slices, groups, strip, strips, tiles;
  int parts, run, span;
};

struct DepthwiseForward {
  Map map;
  Share share;
  Value u;
  const void* weight;  // [C, k, k]
  void* y;
  // In training, of each of the `count` groups of units: how many values, and of each channel a number near the mean, what the mean differs from
  // it, and the sum of squared deviations: [count], [count, 3, C].
  float *counts, *moments;
  // In evaluation, where norm.var is given: y = act(norm(y)) + residual, and with `pooled` sums * factor of y over each part of an image:
  // [N, parts, C].
  RunningNorm norm;
  int act;
  const void* residual;
  float* pooled;
  float factor;
};

struct DepthwiseBackward {
  Map map;
  Share share;
  Gradient g;
  Value u;
  const float *mean, *rstd;  // of the stage that made u; null where it has no norm
  const void* weight;
  const void* residual;
  void* du;        // may be null
  float* sums;     // may be null: [count, 2, C], or with u.gate [N, parts, 5, C]
  float* dweight;  // may be null: [count, C, k, k]
};

// A convolution, its batch norm by running statistics and its activation.
struct Layer {
  const void* weight;
  RunningNorm norm;
  int act;
};

// Squeeze-excite: gate_act(w2 act(w1 mean + b1) + b2), with the mean over an image in parts: [N, parts, E].
struct Squeeze {
  const float* pooled;
  int parts, hidden;
  Parameter w1, b1, w2, b2;
  int act, gate_act;
};

// Expand, depthwise and project of a whole block, in evaluation. Without expand.weight the expanded tensor is x itself; without project.weight the
// output is what the depthwise stage makes, [N, E, OH, OW], and with `pooled` its sums * factor over each tile: [N, tiles, E]. With squeeze.pooled
// there is no depthwise stage: x, gated, is projected.
struct InvertedResidual {
  Map map;  // of the depthwise convolution: map.channels is E
  int in_channels, out_channels;
  const void* x;
  Layer expand, depthwise, project;
  Squeeze squeeze;
  const void* residual;  // added to what is projected
  int tile_height, tile_width, tiles_down, tiles_across;  // of output pixels
  void* out;
  float* pooled;
  float factor;
};

// Where and how large.
struct Launch {
  int blocks, threads;
  size_t shared;
  void* stream;
};

}  // namespace mbn
