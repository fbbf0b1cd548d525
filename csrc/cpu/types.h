// What the CPU kernels take: plain structs, the same for every instruction set. No PyTorch header reaches the arithmetic.
//
// S is the storage type of activations and weights (float, double, bf16); Accumulate<S> is float, or double for double. Activations are dense
// channels-last: index ((n*height + h)*width + w)*channels + c. Per-channel vectors are Accumulate<S>.
#pragma once

#include <cstdint>

#include "../activation.h"

namespace mbn {

struct bf16 {
  uint16_t bits;
};

template <class S>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <>
struct AccumulateOf<const double> {
  using type = double;
};
template <class S>
using Accumulate = typename AccumulateOf<S>::type;

// A tensor that is not stored: value = act(scale[c]*y + shift[c]) * gate[n,c].
template <class S>
struct Value {
  using T = Accumulate<S>;
  const S* y = nullptr;
  const T* scale = nullptr;  // [C]; null, with shift: 1 and 0
  const T* shift = nullptr;  // [C]
  const T* gate = nullptr;   // [N, C]; null: 1
  Act act = Act::identity;
};

// The gradient of a stage's raw output y, not stored either (docs: design, "Backward, exactly"):
// dy = a[c]*((dv*gate[n,c] + q[n,c]) * act'(scale[c]*y + shift[c])) + b[c]*y + c[c].
template <class S>
struct Gradient {
  using T = Accumulate<S>;
  const S* dv = nullptr;
  Value<S> of;           // y may be null where act is identity and b is null
  const T* q = nullptr;  // [N, C]; null: 0
  const T* a = nullptr;  // [C]; null: 1
  const T* b = nullptr;  // [C]; null: b = c = 0
  const T* c = nullptr;  // [C]
};

// Sums over the gradient dv of a value, reduced in the pass that makes dv. With d = act'(scale*y + shift), x = (y - mean)*rstd:
// without a gate [2, C]: sum dv*d, sum dv*d*x over N, H, W;
// with a gate [5, N, C]: sum dv*act(n), dv*d, d, dv*d*x, d*x over H, W.
template <class S>
struct Sums {
  using T = Accumulate<S>;
  const T* mean = nullptr;  // [C]; null, with rstd: 0 and 1
  const T* rstd = nullptr;  // [C]
  T* out = nullptr;         // null: no sums are wanted
};

struct Window {  // a k x k depthwise window over an image
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
};

template <class S>
struct PointwiseForward {  // y = value(u) w^T
  using T = Accumulate<S>;
  int64_t images, pixels, in_channels, out_channels;  // pixels = height * width
  Value<S> u;
  const S* weight;  // [out, in]
  S* y;             // [images, pixels, out]
  T* mean;          // [out], null: no statistics
  T* var;           // [out], biased
};

template <class S>
struct PointwiseBackward {
  using T = Accumulate<S>;
  int64_t images, pixels, in_channels, out_channels;
  Gradient<S> g;      // of y, out_channels wide
  const S* weight;    // [out, in]
  Value<S> u;         // in_channels wide
  const S* residual;  // added to du; null: 0
  S* du;              // gradient of value(u) (+ residual); null: not wanted
  Sums<S> sums;       // over du, at u's stage
  T* dweight;         // [out, in]; null: not wanted
};

template <class S>
struct DepthwiseForward {
  using T = Accumulate<S>;
  int64_t images, channels, height, width, out_height, out_width;
  Window window;
  Value<S> u;
  const S* weight;  // [C, kernel_h, kernel_w]
  S* y;
  T* mean;
  T* var;
};

template <class S>
struct DepthwiseBackward {
  using T = Accumulate<S>;
  int64_t images, channels, height, width, out_height, out_width;
  Window window;
  Gradient<S> g;
  const S* weight;
  Value<S> u;
  const S* residual;
  S* du;
  Sums<S> sums;
  T* dweight;  // [C, kernel_h, kernel_w]
};

// A convolution in evaluation: act(weight * x + shift), its weight packed and scaled by what is folded into it (kernels.h, pack_*).
template <class S>
struct FoldedStage {
  const void* weight = nullptr;  // null: there is no such stage
  const Accumulate<S>* shift = nullptr;
  Act act = Act::identity;
};

// One step of a network in evaluation: a block [dense or expand] -> [depthwise (+ squeeze-excite)] -> [project] (+ residual), or the mean over the pixels.
// A dense convolution may be a step of its own, too.
enum class StepKind { block, pool };
template <class S>
struct Step {
  StepKind kind = StepKind::block;
  int64_t in_channels, channels, out_channels, height, width, out_height, out_width;  // channels: of the depthwise; the sizes are those around it
  Window window;
  FoldedStage<S> dense, expand, depthwise, project;
  Window dense_window;  // a dense convolution reads the image from outside, so it belongs to the first step
  int64_t dense_channels, dense_height, dense_width;
  int64_t squeeze = 0;  // width of the squeeze; 0: no squeeze-excite
  FoldedStage<S> reduce, restore;
  bool residual = false;
};

template <class S>
struct Evaluate {
  int64_t images, steps;
  const Step<S>* step;
  const S* x;
  int64_t x_strides[4];  // of images, channels, rows, columns
  S* out;                // channels-last
};

template <class S>
struct Pool {  // mean of value(u) over the pixels
  int64_t images, pixels, channels;
  Value<S> u;
  Accumulate<S>* pooled;  // [N, C]
};

template <class S>
struct Materialize {  // out = value(u) + residual
  int64_t images, pixels, channels;
  Value<S> u;
  const S* residual;  // null: 0
  S* out;
};

template <class S>
struct MaterializeGradient {  // out = dy + residual
  int64_t images, pixels, channels;
  Gradient<S> g;
  const S* residual;
  S* out;
};

template <class S>
struct Statistics {  // of a raw output that another library made
  using T = Accumulate<S>;
  int64_t rows, channels;  // rows: images * pixels
  const S* y;
  T* mean;
  T* var;  // biased
};

template <class S>
struct ReduceGradient {  // the sums of a gradient that arrives from outside, at the last stage
  int64_t images, pixels, channels;
  const S* dv;
  Value<S> u;
  Sums<S> sums;
};

}  // namespace mbn
