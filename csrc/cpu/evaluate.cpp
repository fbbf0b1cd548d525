// torch.ops.mbn.evaluate on CPU tensors: blocks in evaluation, one behind the other in one call. What goes from block to block stays in scratch.
//
// The blocks' parameters are packed once: weights in the layout that the kernels read, batch norm folded into a scale and a shift. The caller keeps the
// packed tensor from call to call. Its last numbers say of which parameters it was made, and where those have changed it is made anew.
#include <cmath>
#include <mutex>
#include <vector>

#include "binding.h"
#include "runtime.h"

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
// A block as the operator's list of integers has it.
struct BlockCode {
  int64_t stages, residual;
};

template <class Code>
std::vector<Code> codes_of(const char* name, const std::vector<int64_t>& numbers) {
  constexpr size_t kInts = sizeof(Code) / sizeof(int64_t);
  MBN_CHECK(!numbers.empty() && numbers.size() % kInts == 0, op, ": ", name, ": expected ", kInts, " integers each, got ", numbers.size());
  std::vector<Code> codes(numbers.size() / kInts);
  __builtin_memcpy(codes.data(), numbers.data(), numbers.size() * sizeof(int64_t));
  return codes;
}

// [pointwise], depthwise (+ squeeze-excite), [pointwise], or one of them alone.
void check_block(const StageCode* codes, size_t count) {
  const bool expands = count > 1 && codes[0].conv == kPointwise && codes[1].conv == kDepthwise;
  const size_t middle = expands ? 1 : 0;
  const bool projects = codes[count - 1].conv == kPointwise && count == middle + (codes[middle].conv == kDepthwise ? 2 : 1);
  bool fits = projects || (count == 1 && codes[0].conv == kDepthwise && !codes[0].gated());
  for (size_t i = 0; i < count; ++i) fits = fits && (!codes[i].gated() || codes[i].conv == kDepthwise);
  MBN_CHECK(fits, op, ": stages: expected [pointwise], depthwise, [pointwise] or one of them, got another chain");
}

std::vector<StageCode> stage_codes(const std::vector<int64_t>& stages) {
  const std::vector<StageCode> codes = codes_of<StageCode>("stages", stages);
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

// The block of stages [first, first + count), less its tensors, for an input of this shape.
template <class S>
Evaluate<S> block_of(const Stage<S>* stages, size_t count, const Shape& in) {
  Evaluate<S> p;
  p.images = in.images;
  p.in_channels = p.channels = in.channels;
  p.height = p.out_height = in.height;
  p.width = p.out_width = in.width;
  p.window = {};
  p.x = p.residual = nullptr;
  p.out = nullptr;
  int64_t channels = in.channels;
  for (size_t i = 0; i < count; ++i) {
    const Stage<S>& s = stages[i];
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
    } else if (i + 1 == count) {
      p.project = s.folded();
      p.channels = s.in;
    } else {
      p.expand = s.folded();
    }
  }
  p.out_channels = channels;
  return p;
}

template <class S>
std::vector<Evaluate<S>> blocks_of(const std::vector<Stage<S>>& stages, const std::vector<BlockCode>& codes, Shape shape) {
  std::vector<Evaluate<S>> blocks;
  size_t first = 0;
  for (const BlockCode& code : codes) {
    MBN_CHECK(code.stages > 0 && size_t(code.stages) <= stages.size() - first, op, ": blocks: expected from 1 to ", stages.size() - first,
              " stages, got ", code.stages);
    std::vector<StageCode> own;
    for (size_t i = first; i < first + size_t(code.stages); ++i) own.push_back(stages[i].code);
    check_block(own.data(), own.size());
    Evaluate<S> p = block_of(stages.data() + first, own.size(), shape);
    const bool same = p.out_channels == shape.channels && p.out_height == shape.height && p.out_width == shape.width;
    MBN_CHECK(!code.residual || (p.project.weight && same), op,
              ": blocks: expected a residual around a block that ends in a pointwise stage and keeps its input's size, got another");
    shape = {shape.images, p.out_channels, p.out_height, p.out_width};
    blocks.push_back(p);
    first += size_t(code.stages);
  }
  MBN_CHECK(first == stages.size(), op, ": blocks: expected ", stages.size(), " stages, got ", first);
  return blocks;
}

// Images [begin, end) through all blocks.
template <class S>
void run_blocks(std::vector<Evaluate<S>> blocks, const std::vector<BlockCode>& codes, const S* x, S* out, int64_t begin, int64_t end) {
  Scratch scratch;
  int64_t largest = 0;
  for (size_t i = 0; i + 1 < blocks.size(); ++i) {
    const Evaluate<S>& p = blocks[i];
    const int64_t size = p.out_channels * p.out_height * p.out_width;
    largest = size > largest ? size : largest;
  }
  S* between[2];
  for (S*& buffer : between) buffer = static_cast<S*>(scratch.bytes(size_t(largest * (end - begin)) * sizeof(S)));
  const S* from = x + begin * blocks[0].in_channels * blocks[0].height * blocks[0].width;
  for (size_t i = 0; i < blocks.size(); ++i) {
    Evaluate<S>& p = blocks[i];
    p.images = end - begin;
    p.x = from;
    p.residual = codes[i].residual ? from : nullptr;
    p.out = i + 1 < blocks.size() ? between[i % 2] : out + begin * p.out_channels * p.out_height * p.out_width;
    kernels_for<S>().evaluate(p);
    from = p.out;
  }
}

// How many numbers the packed tensor holds.
int64_t evaluate_size(std::vector<Tensor> params, std::vector<int64_t> stages) {
  MBN_CHECK(!params.empty(), op, ": params: expected a weight, got no tensor");
  int64_t size = 0;
  by_dtype(op, "weight", params[0], [&](auto tag) {
    using S = typename decltype(tag)::type;
    Places<Accumulate<S>> places = {nullptr};
    stages_of<S>(stage_codes(stages), params, places);
    size = places.used + kOriginNumbers<Accumulate<S>>;
  });
  return size;
}

void evaluate(const Tensor& x, std::vector<Tensor> params, std::vector<int64_t> stages, std::vector<double> eps, std::vector<int64_t> blocks,
              int64_t version, const Tensor& packed, const Tensor& out) {
  const std::vector<StageCode> codes = stage_codes(stages);
  const std::vector<BlockCode> block_codes = codes_of<BlockCode>("blocks", blocks);
  MBN_CHECK(eps.size() == codes.size(), op, ": eps: expected ", codes.size(), " numbers, got ", eps.size());
  by_dtype(op, "x", x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    const Shape in = shape_of(op, "x", x);
    Places<T> places = {static_cast<T*>(packed.mutable_data_ptr())};
    const std::vector<Stage<S>> described = stages_of<S>(codes, params, places);
    T* last = dense_out<T>(op, "packed", packed, places.used + kOriginNumbers<T>) + places.used;
    const std::vector<Evaluate<S>> all = blocks_of(described, block_codes, in);
    const S* from = activations<S>(op, "x", x, in);
    S* to = activations_out<S>(op, "out", out, {in.images, all.back().out_channels, all.back().out_height, all.back().out_width});
    refresh(described, params, eps, version, last);
    // Threads share the images of a batch, each taking one at a time through all blocks: what it hands on stays in its cache. With fewer images they
    // share the work within a block. The results are the same bits.
    const int64_t threads = thread_count();
    if (all.size() > 1 && in.images > 1 && (in.images >= 4 * threads || in.images % threads == 0)) {
      struct Context {
        const std::vector<Evaluate<S>>& all;
        const std::vector<BlockCode>& codes;
        const S* from;
        S* to;
      } context = {all, block_codes, from, to};
      const auto body = [](int64_t begin, int64_t end, void* given) {
        const Context& c = *static_cast<Context*>(given);
        for (int64_t n = begin; n < end; ++n) run_blocks(c.all, c.codes, c.from, c.to, n, n + 1);
      };
      return run_parallel(in.images, body, &context);
    }
    run_blocks(all, block_codes, from, to, 0, in.images);
  });
}

}  // namespace
}  // namespace mbn

STABLE_TORCH_LIBRARY_IMPL(mbn, CPU, m) {
  m.impl("evaluate", TORCH_BOX(&mbn::evaluate));
  m.impl("evaluate_size", TORCH_BOX(&mbn::evaluate_size));
}
