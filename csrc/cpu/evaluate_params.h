// The parameters of an evaluation: what the operator's lists say of each stage, where its numbers lie in the packed tensor, and when they are packed anew.
#pragma once

#include <cmath>
#include <vector>

#include "binding.h"
#include "fork.h"
#include "runtime.h"

namespace mbn {
namespace evaluation {

using namespace binding;

constexpr const char* op = "evaluate";
constexpr int64_t kMostSize = int64_t{1} << 20;  // of a window or a width: far beyond any that makes sense, and no index overflows

enum Conv : int64_t { kNone = 0, kPointwise = 1, kDepthwise = 2, kDense = 3, kPool = 4 };
// One stage as the operator's list of integers has it; mbn_kernels/backends/cpu.py writes it in the same order.
struct StageCode {
  int64_t conv, kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w, normalized, affine, act,
      squeeze_act, gate_act;  // normalized: by running statistics, else there is a bias; the last two -1: no squeeze-excite
  bool gated() const { return squeeze_act >= 0; }
  Window window() const { return {kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_bottom, pad_left, pad_right}; }
};
// A block as the operator's list of integers has it.
struct BlockCode {
  int64_t stages, residual;
};

template <class Code>
std::vector<Code> codes_of(const char* name, const Tensor& numbers) {
  constexpr int64_t kInts = sizeof(Code) / sizeof(int64_t);
  const int64_t count = numbers.numel();
  MBN_CHECK(count > 0 && count % kInts == 0, op, ": ", name, ": expected ", kInts, " integers each, got ", count);
  check_dense(op, name, numbers, ScalarType::Long, count);
  std::vector<Code> codes(static_cast<size_t>(count / kInts));
  __builtin_memcpy(codes.data(), memory_of(op, name, numbers, sizeof(int64_t)).begin, size_t(count) * sizeof(int64_t));
  return codes;
}

inline std::vector<StageCode> stage_codes(const Tensor& stages) {
  const std::vector<StageCode> codes = codes_of<StageCode>("stages", stages);
  for (const StageCode& s : codes) {
    bool fits = s.conv >= kPointwise && s.conv <= kPool;
    for (const int64_t n : {s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w}) fits = fits && n > 0 && n <= kMostSize;
    for (const int64_t n : {s.pad_top, s.pad_bottom, s.pad_left, s.pad_right}) fits = fits && n >= 0 && n <= kMostSize;
    MBN_CHECK(fits, op, ": stages: expected a convolution, a positive window and no negative padding, got others");
  }
  return codes;
}

// ---- A stage's parameters and their places in the packed tensor -----------------------------------------------------------------

// Hands out parts of the packed tensor in order; without memory, it only counts them.
struct Places {
  char* memory;
  int64_t used = 0;
  template <class T>
  T* take(int64_t bytes) {
    T* part = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += (bytes + 63) / 64 * 64;
    return part;
  }
};

// A folded layer: where its weight and shift are packed.
template <class S>
struct Packed {
  void* weight;
  Accumulate<S>* shift;
  int64_t columns, shifts;  // channels, and how many numbers their shifts take
};

struct Parameters {
  const Tensor *weight, *gamma, *beta, *mean, *var, *bias, *w1, *b1, *w2, *b2;  // null: not there
};
template <class S>
struct Stage : Parameters {
  StageCode code;
  int64_t out, in, taps, squeeze;  // channels, or channels in the squeeze; taps: of a window
  Packed<S> own, reduce, restore;

  int64_t depth() const { return code.conv == kDense ? taps * kernels_for<S>().evaluation.dense_channels(in) : in; }
  FoldedStage<S> folded() const { return {own.weight, own.shift, activation(op, "stages", code.act)}; }
  FoldedStage<S> folded_reduce() const { return {reduce.weight, reduce.shift, activation(op, "stages", code.squeeze_act)}; }
  FoldedStage<S> folded_restore() const { return {restore.weight, restore.shift, activation(op, "stages", code.gate_act)}; }
};

// How wide a stage is, and its squeeze-excite.
struct Widths {
  int64_t out, in, squeeze;
};

template <class S>
Packed<S> take_packed(Places& places, int64_t columns, int64_t weight_bytes) {
  const int64_t shifts = kernels_for<S>().evaluation.padded_channels(columns);
  void* weight = places.take<char>(weight_bytes);
  return {weight, places.take<Accumulate<S>>(shifts * int64_t(sizeof(Accumulate<S>))), columns, shifts};
}

// A stage of known widths, without its parameters.
template <class S>
Stage<S> stage_of(const StageCode& code, const Widths& widths, Places& places) {
  const auto& kernels = kernels_for<S>().evaluation;
  Stage<S> s = {};
  s.code = code;
  const double numbers = double(widths.out) * double(code.conv == kDepthwise ? 1 : widths.in) * double(code.kernel_h) * double(code.kernel_w);
  MBN_CHECK(code.conv == kPool || (widths.in > 0 && numbers < double(int64_t{1} << 40)), op,
            ": weight: expected at least one channel in and fewer than 2^40 numbers, got others");
  s.out = widths.out, s.in = widths.in, s.squeeze = widths.squeeze;
  s.taps = code.kernel_h * code.kernel_w;
  if (code.conv != kPool) {
    const bool depthwise = code.conv == kDepthwise;
    s.own = take_packed<S>(places, s.out, depthwise ? kernels.packed_depthwise_size(s.out, s.taps) : kernels.packed_pointwise_size(s.out, s.depth()));
  }
  if (code.gated()) {
    s.reduce = take_packed<S>(places, s.squeeze, kernels.packed_pointwise_size(s.squeeze, s.out));
    s.restore = take_packed<S>(places, s.out, kernels.packed_pointwise_size(s.out, s.squeeze));
  }
  return s;
}

template <class S>
std::vector<Stage<S>> stages_of(const std::vector<StageCode>& codes, const std::vector<Tensor>& params, Places& places) {
  size_t index = 0;
  const auto next = [&](const char* name) {
    MBN_CHECK(index < params.size(), op, ": params: expected ", name, " after ", params.size(), " tensors, got none");
    return &params[index++];
  };
  const auto rows = [](const char* name, const Tensor& t) {
    MBN_CHECK(t.dim() >= 2 && t.size(0) > 0, op, ": ", name, ": expected at least 2 dimensions and 1 row, got size ", text_of(t.sizes()));
    return t.size(0);
  };
  std::vector<Stage<S>> stages;
  for (const StageCode& code : codes) {
    Parameters s = {};
    Widths widths = {};
    if (code.conv != kPool) {
      s.weight = next("weight");
      widths.out = widths.in = rows("weight", *s.weight);
      if (code.conv != kDepthwise) widths.in = s.weight->size(1);
      if (code.affine) s.gamma = next("bn_weight"), s.beta = next("bn_bias");
      if (code.normalized) {
        s.mean = next("running_mean"), s.var = next("running_var");
      } else {
        s.bias = next("bias");
      }
    }
    if (code.gated()) {
      s.w1 = next("w1"), s.b1 = next("b1"), s.w2 = next("w2"), s.b2 = next("b2");
      widths.squeeze = rows("w1", *s.w1);
    }
    stages.push_back(stage_of<S>(code, widths, places));
    static_cast<Parameters&>(stages.back()) = s;
  }
  MBN_CHECK(index == params.size(), op, ": params: expected ", index, " tensors, got ", params.size());
  return stages;
}

// ---- Packing --------------------------------------------------------------------------------------------------------------------

inline float widened(float x) { return x; }
inline double widened(double x) { return x; }
inline float widened(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}
// A parameter of any dtype as numbers of type T.
template <class T>
std::vector<T> widen(const char* name, const Tensor& t, int64_t numel) {
  std::vector<T> to(static_cast<size_t>(numel));
  by_dtype(op, name, t, [&](auto tag) {
    using P = typename decltype(tag)::type;
    const P* from = dense<P>(op, name, t, numel);
    for (int64_t i = 0; i < numel; ++i) to[size_t(i)] = T(widened(from[i]));
  });
  return to;
}

// A dense convolution's weight [out][in][taps], of any strides, as [out][taps][in, padded with zeros].
template <class S>
std::vector<S> channels_together(const Tensor& weight, int64_t out, int64_t in, int64_t taps, int64_t padded) {
  MBN_CHECK(weight.dim() == 4 && weight.numel() == out * in * taps, op, ": weight: expected ", out * in * taps, " numbers of 4 dimensions, got size ",
            text_of(weight.sizes()));
  check_kind(op, "weight", weight, kDtype<S>);
  const S* from = reinterpret_cast<const S*>(memory_of(op, "weight", weight, sizeof(S)).begin);
  const auto strides = weight.strides();
  const int64_t width = weight.size(3);
  std::vector<S> to(static_cast<size_t>(out * taps * padded));
  for (int64_t o = 0; o < out; ++o) {
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t k = 0; k < taps; ++k) {
        to[size_t((o * taps + k) * padded + i)] = from[o * strides[0] + i * strides[1] + k / width * strides[2] + k % width * strides[3]];
      }
    }
  }
  return to;
}

template <class T>
void pack_shift(const std::vector<T>& from, int64_t padded, T* to) {
  for (int64_t c = 0; c < padded; ++c) to[c] = c < int64_t(from.size()) ? from[size_t(c)] : T(0);
}

// A layer of squeeze-excite: a weight of any dtype, kept in S as the maps are.
template <class S>
void pack_gate_layer(const char* name, const Tensor& weight, const char* bias_name, const Tensor& bias, int64_t out, int64_t in, const Packed<S>& to) {
  using T = Accumulate<S>;
  const std::vector<T> numbers = widen<T>(name, weight, out * in);
  kernels_for<S>().evaluation.pack_wide(numbers.data(), out, in, to.weight);
  pack_shift(widen<T>(bias_name, bias, out), to.shifts, to.shift);
}

// scale = gamma / sqrt(var + eps) goes into the weight, shift = beta - mean * scale.
template <class S>
void pack(const Stage<S>& s, double eps) {
  using T = Accumulate<S>;
  const auto& kernels = kernels_for<S>().evaluation;
  std::vector<T> scale, shift;
  if (s.bias) {
    shift = widen<T>("bias", *s.bias, s.out);
  } else if (s.weight) {
    scale = widen<T>("running_var", *s.var, s.out);
    shift = widen<T>("running_mean", *s.mean, s.out);
    const std::vector<T> gamma = s.gamma ? widen<T>("bn_weight", *s.gamma, s.out) : std::vector<T>(size_t(s.out), T(1));
    const std::vector<T> beta = s.gamma ? widen<T>("bn_bias", *s.beta, s.out) : std::vector<T>(size_t(s.out), T(0));
    for (size_t c = 0; c < size_t(s.out); ++c) {
      scale[c] = gamma[c] / std::sqrt(scale[c] + T(eps));
      shift[c] = beta[c] - shift[c] * scale[c];
    }
  }
  const T* factors = scale.empty() ? nullptr : scale.data();
  if (s.code.conv == kPointwise) kernels.pack_pointwise(dense<S>(op, "weight", *s.weight, s.out * s.in), s.out, s.in, factors, s.own.weight);
  if (s.code.conv == kDepthwise) kernels.pack_depthwise(dense<S>(op, "weight", *s.weight, s.out * s.taps), s.out, s.taps, factors, s.own.weight);
  if (s.code.conv == kDense) {
    const std::vector<S> weight = channels_together<S>(*s.weight, s.out, s.in, s.taps, s.depth() / s.taps);
    kernels.pack_pointwise(weight.data(), s.out, s.depth(), factors, s.own.weight);
  }
  if (s.weight) pack_shift(shift, s.own.shifts, s.own.shift);
  if (!s.code.gated()) return;
  pack_gate_layer<S>("w1", *s.w1, "b1", *s.b1, s.squeeze, s.out, s.reduce);
  pack_gate_layer<S>("w2", *s.w2, "b2", *s.b2, s.out, s.squeeze, s.restore);
}

// ---- Which parameters a packed tensor was made of -------------------------------------------------------------------------------

struct Origin {
  uint64_t places, contents;
  int64_t version;
  bool operator==(const Origin& o) const { return places == o.places && contents == o.contents && version == o.version; }
};
constexpr int64_t kOriginBytes = 64;  // the packed tensor's first

inline uint64_t mixed(uint64_t h, uint64_t x) { return (h ^ x) * 0x9e3779b97f4a7c15ull + (h >> 29); }

// All of a short array, and some of a long one: whoever changes a parameter without its version counter (through .data) changes all of it as a rule.
inline uint64_t sampled(uint64_t h, const void* data, int64_t bytes) {
  constexpr int64_t kWords = 1024, kSamples = 16, kChains = 8;
  const char* from = static_cast<const char*>(data);
  const int64_t words = bytes / 8, count = words <= kWords ? words : kSamples;
  uint64_t chains[kChains] = {};
  const auto add = [&](int64_t chain, int64_t at) {
    uint64_t word;
    __builtin_memcpy(&word, from + at * 8, 8);
    chains[chain] = (chains[chain] ^ word) * 0x9e3779b97f4a7c15ull;
  };
  int64_t i = 0;
  for (; count == words && i + kChains <= count; i += kChains) {
    for (int64_t chain = 0; chain < kChains; ++chain) add(chain, i + chain);
  }
  for (; i < count; ++i) add(i % kChains, count == words ? i : i * (words - 1) / (kSamples - 1));
  uint64_t tail = 0;
  __builtin_memcpy(&tail, from + words * 8, size_t(bytes - words * 8));
  for (const uint64_t chain : chains) h = mixed(h, chain);
  return mixed(h, tail);
}

// A parameter's memory, of which each number is one: contiguous, or a convolution's weight in channels-last order.
template <class T>
Memory dense_in_any_order(const Tensor& t, int64_t numel) {
  static constexpr int kChannelsLast[] = {0, 2, 3, 1};
  if (t.dim() == 4 && dense_in_order(t, kChannelsLast, 4)) {
    check_kind(op, "params", t, kDtype<T>);
  } else {
    check_dense(op, "params", t, kDtype<T>, numel);
  }
  return memory_of(op, "params", t, sizeof(T), numel);
}

// Neither what is packed nor the output may lie in a parameter.
inline Origin origin_of(const std::vector<Tensor>& params, const double* eps, size_t stages, int64_t version, const Memory& packed, const Memory& out) {
  Origin origin = {1, 0, version};
  for (const Tensor& t : params) {
    by_dtype(op, "params", t, [&](auto tag) {
      using P = typename decltype(tag)::type;
      const int64_t numel = t.numel();
      const Memory memory = dense_in_any_order<P>(t, numel);
      for (const Memory& written : {packed, out}) {
        MBN_CHECK(!memory.overlaps(written), op, ": ", written.name, ": expected memory of its own, got some that is also a parameter's");
      }
      origin.places = mixed(mixed(origin.places, uint64_t(reinterpret_cast<uintptr_t>(memory.begin))), uint64_t(numel));
      if (numel > 0) origin.contents = sampled(origin.contents, memory.begin, numel * int64_t(sizeof(P)));
    });
  }
  origin.contents = sampled(origin.contents, eps, int64_t(stages * sizeof(double)));
  origin.places |= 1;  // never that of fresh memory, whose first bytes the caller has filled with zeros
  return origin;
}

struct Packing;  // whose mutex it holds while it packs

template <class S>
void refresh(const std::vector<Stage<S>>& stages, const std::vector<Tensor>& params, const double* eps, int64_t version, char* first, const Memory& packed,
             const Memory& out) {
  const Origin origin = origin_of(params, eps, stages.size(), version, packed, out);
  Origin found;
  const std::lock_guard<std::mutex> lock(fork_safe_mutex<Packing>());
  __builtin_memcpy(&found, first, sizeof found);
  if (version >= 0 && found == origin) return;
  __builtin_memset(first, 0, sizeof origin);  // of no parameters, should memory run out on the way
  for (size_t i = 0; i < stages.size(); ++i) pack(stages[i], eps[i]);
  __builtin_memcpy(first, &origin, sizeof origin);
}

}  // namespace evaluation
}  // namespace mbn
