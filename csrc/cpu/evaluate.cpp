// torch.ops.mbn.evaluate on CPU tensors: a whole block in evaluation.
//
// The block's parameters are packed once: weights in the layout that the kernels read, batch norm folded into a scale and a shift. The caller keeps the
// packed tensor from call to call. Its last numbers say of which parameters it was made, and where those have changed it is made anew.
#include <cmath>
#include <mutex>
#include <vector>

#include "binding.h"

namespace mbn {
namespace {

using namespace binding;

constexpr const char* op = "evaluate";

enum Conv : int64_t { kNone = 0, kPointwise = 1, kDepthwise = 2 };
// One stage as the operator's list of integers has it; mbn_kernels/backends/cpu.py writes it in the same order.
struct StageCode {
  int64_t conv, kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_bottom, pad_left, pad_right, dilation_h, dilation_w, affine, act,
      squeeze_act, gate_act;  // the last two -1: no squeeze-excite
  bool gated() const { return squeeze_act >= 0; }
};
constexpr size_t kStageInts = sizeof(StageCode) / sizeof(int64_t);

std::vector<StageCode> codes_of(const std::vector<int64_t>& stages) {
  MBN_CHECK(!stages.empty() && stages.size() % kStageInts == 0, op, ": stages: expected ", kStageInts, " integers a stage, got ", stages.size());
  std::vector<StageCode> codes(stages.size() / kStageInts);
  __builtin_memcpy(codes.data(), stages.data(), stages.size() * sizeof(int64_t));
  // [pointwise], depthwise (+ squeeze-excite), [pointwise], or one of them alone.
  const bool expands = codes.size() > 1 && codes[0].conv == kPointwise && codes[1].conv == kDepthwise;
  const size_t middle = expands ? 1 : 0;
  const bool projects = codes.back().conv == kPointwise && codes.size() == middle + (codes[middle].conv == kDepthwise ? 2 : 1);
  bool fits = projects || (codes.size() == 1 && codes[0].conv == kDepthwise && !codes[0].gated());
  for (size_t i = 0; i < codes.size(); ++i) fits = fits && (!codes[i].gated() || codes[i].conv == kDepthwise);
  MBN_CHECK(fits, op, ": stages: expected [pointwise], depthwise, [pointwise] or one of them, got another chain");
  for (const StageCode& s : codes) {
    MBN_CHECK(s.kernel_h > 0 && s.kernel_w > 0 && s.stride_h > 0 && s.stride_w > 0 && s.dilation_h > 0 && s.dilation_w > 0 && s.pad_top >= 0 &&
                  s.pad_bottom >= 0 && s.pad_left >= 0 && s.pad_right >= 0,
              op, ": stages: expected a positive window and no negative padding, got others");
  }
  return codes;
}

// ---- A stage's parameters and their places in the packed tensor -----------------------------------------------------------------

// Hands out parts of the packed tensor in order; without memory, it only counts them.
template <class T>
struct Places {
  T* memory;
  int64_t used = 0;
  T* take(int64_t count) {
    constexpr int64_t kAlign = 64 / sizeof(T);
    T* part = memory ? memory + used : nullptr;
    used += (count + kAlign - 1) / kAlign * kAlign;
    return part;
  }
};

template <class S>
struct Stage {
  using T = Accumulate<S>;
  StageCode code;
  int64_t out, in, taps, squeeze;  // channels, or channels in the squeeze; taps: of a depthwise window
  const Tensor *weight, *gamma, *beta, *mean, *var, *w1, *b1, *w2, *b2;  // null: not there
  T *weight_to, *scale_to, *shift_to, *w1_to, *b1_to, *w2_to, *b2_to;

  FoldedStage<S> folded() const { return {weight_to, scale_to, shift_to, activation(op, "stages", code.act)}; }
};

template <class S>
std::vector<Stage<S>> stages_of(const std::vector<StageCode>& codes, const std::vector<Tensor>& params, Places<Accumulate<S>>& places) {
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
    Stage<S> s = {};
    s.code = code;
    s.weight = next("weight");
    s.out = s.in = rows("weight", *s.weight);
    s.taps = code.kernel_h * code.kernel_w;
    if (code.conv == kPointwise) s.in = s.weight->size(1);
    if (code.affine) s.gamma = next("bn_weight"), s.beta = next("bn_bias");
    s.mean = next("running_mean"), s.var = next("running_var");
    const auto& kernels = kernels_for<S>();
    s.weight_to = places.take(code.conv == kPointwise ? kernels.packed_pointwise_size(s.out, s.in) : kernels.packed_depthwise_size(s.out, s.taps));
    s.scale_to = places.take(s.out), s.shift_to = places.take(s.out);
    if (code.gated()) {
      s.w1 = next("w1"), s.b1 = next("b1"), s.w2 = next("w2"), s.b2 = next("b2");
      s.squeeze = rows("w1", *s.w1);
      s.w1_to = places.take(s.squeeze * s.out), s.b1_to = places.take(s.squeeze);
      s.w2_to = places.take(s.out * s.squeeze), s.b2_to = places.take(s.out);
    }
    stages.push_back(s);
  }
  MBN_CHECK(index == params.size(), op, ": params: expected ", index, " tensors, got ", params.size());
  return stages;
}

float widened(float x) { return x; }
double widened(double x) { return x; }
float widened(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}
// A parameter of any dtype as numbers of type T.
template <class T>
void widen(const char* name, const Tensor& t, int64_t numel, T* to) {
  by_dtype(op, name, t, [&](auto tag) {
    using P = typename decltype(tag)::type;
    const P* from = dense<P>(op, name, t, numel);
    for (int64_t i = 0; i < numel; ++i) to[i] = T(widened(from[i]));
  });
}

// scale = gamma / sqrt(var + eps), shift = beta - mean * scale.
template <class S>
void pack(const Stage<S>& s, double eps) {
  using T = Accumulate<S>;
  const auto& kernels = kernels_for<S>();
  if (s.code.conv == kPointwise) {
    kernels.pack_pointwise(dense<S>(op, "weight", *s.weight, s.out * s.in), s.out, s.in, s.weight_to);
  } else {
    kernels.pack_depthwise(dense<S>(op, "weight", *s.weight, s.out * s.taps), s.out, s.taps, s.weight_to);
  }
  std::vector<T> mean(size_t(s.out)), gamma(size_t(s.out), T(1)), beta(size_t(s.out), T(0)), var(size_t(s.out));
  widen("running_mean", *s.mean, s.out, mean.data());
  widen("running_var", *s.var, s.out, var.data());
  if (s.gamma) {
    widen("bn_weight", *s.gamma, s.out, gamma.data());
    widen("bn_bias", *s.beta, s.out, beta.data());
  }
  for (size_t c = 0; c < size_t(s.out); ++c) {
    s.scale_to[c] = gamma[c] / std::sqrt(var[c] + T(eps));
    s.shift_to[c] = beta[c] - mean[c] * s.scale_to[c];
  }
  if (!s.code.gated()) return;
  widen("w1", *s.w1, s.squeeze * s.out, s.w1_to);
  widen("b1", *s.b1, s.squeeze, s.b1_to);
  widen("w2", *s.w2, s.out * s.squeeze, s.w2_to);
  widen("b2", *s.b2, s.out, s.b2_to);
}

// ---- Which parameters a packed tensor was made of -------------------------------------------------------------------------------

struct Origin {
  uint64_t places, contents;
  int64_t version;
  bool operator==(const Origin& o) const { return places == o.places && contents == o.contents && version == o.version; }
};

uint64_t mixed(uint64_t h, uint64_t x) { return (h ^ x) * 0x9e3779b97f4a7c15ull + (h >> 29); }

// All of a short array, and some of a long one: whoever changes a parameter without its version counter (through .data) changes all of it as a rule.
uint64_t sampled(uint64_t h, const void* data, int64_t bytes) {
  constexpr int64_t kWords = 1024, kSamples = 64, kChains = 8;
  const char* from = static_cast<const char*>(data);
  const int64_t words = bytes / 8, count = words <= kWords ? words : kSamples;
  uint64_t chains[kChains] = {};
  for (int64_t i = 0; i < count; ++i) {
    uint64_t word;
    __builtin_memcpy(&word, from + (count == words ? i : i * (words - 1) / (kSamples - 1)) * 8, 8);
    chains[i % kChains] = (chains[i % kChains] ^ word) * 0x9e3779b97f4a7c15ull;
  }
  uint64_t tail = 0;
  __builtin_memcpy(&tail, from + words * 8, size_t(bytes - words * 8));
  for (const uint64_t chain : chains) h = mixed(h, chain);
  return mixed(h, tail);
}

Origin origin_of(const std::vector<Tensor>& params, const std::vector<double>& eps, int64_t version) {
  Origin origin = {1, 0, version};
  for (const Tensor& t : params) {
    by_dtype(op, "params", t, [&](auto tag) {
      using P = typename decltype(tag)::type;
      const int64_t numel = t.numel();
      const P* data = dense<P>(op, "params", t, numel);
      origin.places = mixed(mixed(origin.places, uint64_t(reinterpret_cast<uintptr_t>(data))), uint64_t(numel));
      if (numel > 0) origin.contents = sampled(origin.contents, data, numel * int64_t(sizeof(P)));
    });
  }
  origin.contents = sampled(origin.contents, eps.data(), int64_t(eps.size() * sizeof(double)));
  origin.places |= 1;  // never that of fresh memory, which the caller has filled with zeros
  return origin;
}

template <class T>
constexpr int64_t kOriginNumbers = 64 / sizeof(T);

template <class S>
void refresh(const std::vector<Stage<S>>& stages, const std::vector<Tensor>& params, const std::vector<double>& eps, int64_t version,
             Accumulate<S>* last) {
  static std::mutex mutex;
  const Origin origin = origin_of(params, eps, version);
  Origin found;
  const std::lock_guard<std::mutex> lock(mutex);
  __builtin_memcpy(&found, last, sizeof found);
  if (version >= 0 && found == origin) return;
  for (size_t i = 0; i < stages.size(); ++i) pack(stages[i], eps[i]);
  __builtin_memcpy(last, &origin, sizeof origin);
}

// ---- The operators --------------------------------------------------------------------------------------------------------------

int64_t out_size(int64_t in, int64_t pads, int64_t kernel, int64_t dilation, int64_t stride) {
  return (in + pads - dilation * (kernel - 1) - 1) / stride + 1;
}

template <class S>
Evaluate<S> block_of(const std::vector<Stage<S>>& stages, const Shape& in) {
  Evaluate<S> p;
  p.images = in.images;
  p.in_channels = p.channels = p.out_channels = in.channels;
  p.height = p.out_height = in.height;
  p.width = p.out_width = in.width;
  p.window = {};
  int64_t channels = in.channels;
  for (const Stage<S>& s : stages) {
    MBN_CHECK(s.in == channels, op, ": weight: expected one for ", channels, " channels, got size ", text_of(s.weight->sizes()));
    channels = s.out;
    if (s.code.conv == kDepthwise) {
      const StageCode& c = s.code;
      p.window = {c.kernel_h, c.kernel_w, c.stride_h, c.stride_w, c.dilation_h, c.dilation_w, c.pad_top, c.pad_bottom, c.pad_left, c.pad_right};
      p.depthwise = s.folded();
      p.channels = s.out;
      p.out_height = out_size(p.height, c.pad_top + c.pad_bottom, c.kernel_h, c.dilation_h, c.stride_h);
      p.out_width = out_size(p.width, c.pad_left + c.pad_right, c.kernel_w, c.dilation_w, c.stride_w);
      MBN_CHECK(p.out_height > 0 && p.out_width > 0, op, ": x: expected an image that the window fits in, got ", p.height, "x", p.width);
      if (c.gated()) {
        p.squeeze = s.squeeze;
        p.w1 = s.w1_to, p.b1 = s.b1_to, p.w2 = s.w2_to, p.b2 = s.b2_to;
        p.squeeze_act = activation(op, "stages", c.squeeze_act);
        p.gate_act = activation(op, "stages", c.gate_act);
      }
    } else if (&s == &stages.back()) {
      p.project = s.folded();
      p.channels = s.in;
    } else {
      p.expand = s.folded();
    }
  }
  p.out_channels = channels;
  return p;
}

// How many numbers the packed tensor holds.
int64_t evaluate_size(std::vector<Tensor> params, std::vector<int64_t> stages) {
  MBN_CHECK(!params.empty(), op, ": params: expected a weight, got no tensor");
  int64_t size = 0;
  by_dtype(op, "weight", params[0], [&](auto tag) {
    using S = typename decltype(tag)::type;
    Places<Accumulate<S>> places = {nullptr};
    stages_of<S>(codes_of(stages), params, places);
    size = places.used + kOriginNumbers<Accumulate<S>>;
  });
  return size;
}

void evaluate(const Tensor& x, std::vector<Tensor> params, std::vector<int64_t> stages, std::vector<double> eps, bool residual, int64_t version,
              const Tensor& packed, const Tensor& out) {
  const std::vector<StageCode> codes = codes_of(stages);
  MBN_CHECK(eps.size() == codes.size(), op, ": eps: expected ", codes.size(), " numbers, got ", eps.size());
  by_dtype(op, "x", x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    const Shape in = shape_of(op, "x", x);
    Places<T> places = {static_cast<T*>(packed.mutable_data_ptr())};
    const std::vector<Stage<S>> described = stages_of<S>(codes, params, places);
    T* last = dense_out<T>(op, "packed", packed, places.used + kOriginNumbers<T>) + places.used;
    Evaluate<S> p = block_of(described, in);
    const Shape result = {in.images, p.out_channels, p.out_height, p.out_width};
    p.x = activations<S>(op, "x", x, in);
    p.out = activations_out<S>(op, "out", out, result);
    p.residual = residual ? activations<S>(op, "residual", x, result) : nullptr;
    MBN_CHECK(!residual || p.project.weight, op, ": residual: expected a chain that ends in a pointwise stage, got a depthwise");
    refresh(described, params, eps, version, last);
    kernels_for<S>().evaluate(p);
  });
}

}  // namespace
}  // namespace mbn

STABLE_TORCH_LIBRARY_IMPL(mbn, CPU, m) {
  m.impl("evaluate", TORCH_BOX(&mbn::evaluate));
  m.impl("evaluate_size", TORCH_BOX(&mbn::evaluate_size));
}
