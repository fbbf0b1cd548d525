// torch.ops.mbn.evaluate on CPU tensors: a whole block in evaluation.
#include <cmath>
#include <deque>
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
};
constexpr int64_t kStageInts = sizeof(StageCode) / sizeof(int64_t);

// Hands out the parameters in order, as accumulation-type arrays: in place where they are of that type, else converted into a copy.
template <class S>
class Parameters {
 public:
  using T = Accumulate<S>;
  explicit Parameters(const std::vector<Tensor>& tensors) : tensors_(tensors) {}

  const Tensor& peek() const {
    MBN_CHECK(index_ < tensors_.size(), op, ": params: expected more tensors, got ", tensors_.size());
    return tensors_[index_];
  }
  const Tensor& next() {
    const Tensor& t = peek();
    ++index_;
    return t;
  }
  const T* next_as(const char* name, int64_t numel) {
    const Tensor& t = next();
    if (t.scalar_type() == kDtype<T>) return dense<T>(op, name, t, numel);
    copies_.emplace_back(size_t(numel));
    T* to = copies_.back().data();
    by_dtype(op, name, t, [&](auto tag) {
      using P = typename decltype(tag)::type;
      const P* from = dense<P>(op, name, t, numel);
      for (int64_t i = 0; i < numel; ++i) to[i] = widened(from[i]);
    });
    return to;
  }
  T* scratch(int64_t numel) {
    copies_.emplace_back(size_t(numel));
    return copies_.back().data();
  }
  bool at_end() const { return index_ == tensors_.size(); }

 private:
  static T widened(float x) { return T(x); }
  static T widened(double x) { return T(x); }
  static T widened(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, sizeof y);
    return T(y);
  }
  const std::vector<Tensor>& tensors_;
  size_t index_ = 0;
  std::deque<std::vector<T>> copies_;
};

// The stage's weight and its folded batch norm: scale = gamma / sqrt(var + eps), shift = beta - mean * scale.
template <class S>
FoldedStage<S> fold(Parameters<S>& params, const StageCode& stage, double eps, int64_t weight_numel, int64_t channels) {
  using T = Accumulate<S>;
  FoldedStage<S> folded;
  folded.act = activation(op, "stages", stage.act);
  folded.weight = dense<S>(op, "weight", params.next(), weight_numel);
  const T* gamma = stage.affine ? params.next_as("bn_weight", channels) : nullptr;
  const T* beta = stage.affine ? params.next_as("bn_bias", channels) : nullptr;
  const T* mean = params.next_as("running_mean", channels);
  const T* var = params.next_as("running_var", channels);
  T *scale = params.scratch(channels), *shift = params.scratch(channels);
  for (int64_t c = 0; c < channels; ++c) {
    scale[c] = (gamma ? gamma[c] : T(1)) / std::sqrt(var[c] + T(eps));
    shift[c] = (beta ? beta[c] : T(0)) - mean[c] * scale[c];
  }
  folded.scale = scale;
  folded.shift = shift;
  return folded;
}

int64_t out_size(int64_t in, int64_t pads, int64_t kernel, int64_t dilation, int64_t stride) {
  return (in + pads - dilation * (kernel - 1) - 1) / stride + 1;
}

template <class S>
void set_depthwise(Evaluate<S>& p, Parameters<S>& params, const StageCode& s, double eps) {
  MBN_CHECK(s.kernel_h > 0 && s.kernel_w > 0 && s.stride_h > 0 && s.stride_w > 0 && s.dilation_h > 0 && s.dilation_w > 0 &&
                      s.pad_top >= 0 && s.pad_bottom >= 0 && s.pad_left >= 0 && s.pad_right >= 0,
                  op, ": stages: expected a positive window and no negative padding, got others");
  p.window = {s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.dilation_h, s.dilation_w, s.pad_top, s.pad_bottom, s.pad_left, s.pad_right};
  p.depthwise = fold(params, s, eps, p.channels * s.kernel_h * s.kernel_w, p.channels);
  p.out_height = out_size(p.height, s.pad_top + s.pad_bottom, s.kernel_h, s.dilation_h, s.stride_h);
  p.out_width = out_size(p.width, s.pad_left + s.pad_right, s.kernel_w, s.dilation_w, s.stride_w);
  MBN_CHECK(p.out_height > 0 && p.out_width > 0, op, ": x: expected an image that the window fits in, got ", p.height, "x", p.width);
  if (s.squeeze_act < 0) return;
  p.squeeze = params.peek().dim() > 0 ? params.peek().size(0) : 0;
  MBN_CHECK(p.squeeze > 0, op, ": w1: expected at least one row, got none");
  p.w1 = params.next_as("w1", p.squeeze * p.channels);
  p.b1 = params.next_as("b1", p.squeeze);
  p.w2 = params.next_as("w2", p.channels * p.squeeze);
  p.b2 = params.next_as("b2", p.channels);
  p.squeeze_act = activation(op, "stages", s.squeeze_act);
  p.gate_act = activation(op, "stages", s.gate_act);
}

void evaluate(const Tensor& x, std::vector<Tensor> params, std::vector<int64_t> stages, std::vector<double> eps, bool residual,
              const Tensor& out) {
  const size_t count = eps.size();
  MBN_CHECK(count > 0 && stages.size() == count * kStageInts, op, ": stages: expected ", kStageInts, " integers a stage, got ",
                  stages.size(), " for ", count, " stages");
  std::vector<StageCode> codes(count);
  __builtin_memcpy(codes.data(), stages.data(), stages.size() * sizeof(int64_t));
  by_dtype(op, "x", x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Shape in = shape_of(op, "x", x);
    Parameters<S> given(params);
    Evaluate<S> p;
    p.images = in.images;
    p.in_channels = p.channels = p.out_channels = in.channels;
    p.height = p.out_height = in.height;
    p.width = p.out_width = in.width;
    p.window = {};
    p.x = activations<S>(op, "x", x, in);
    size_t i = 0;
    const auto out_channels = [&] { return given.peek().dim() > 0 ? given.peek().size(0) : int64_t{0}; };
    if (codes[i].conv == kPointwise && i + 1 < count && codes[i + 1].conv == kDepthwise) {
      p.channels = out_channels();
      p.expand = fold(given, codes[i], eps[i], p.channels * p.in_channels, p.channels);
      ++i;
    }
    if (codes[i].conv == kDepthwise) {
      set_depthwise(p, given, codes[i], eps[i]);
      ++i;
    }
    p.out_channels = p.channels;
    if (i < count && codes[i].conv == kPointwise && codes[i].squeeze_act < 0) {
      p.out_channels = out_channels();
      p.project = fold(given, codes[i], eps[i], p.out_channels * p.channels, p.out_channels);
      ++i;
    }
    MBN_CHECK(i == count && given.at_end() && codes[0].conv != kNone && (!p.expand.weight || codes[0].squeeze_act < 0) &&
                        (p.project.weight || (!p.squeeze && !p.expand.weight)),
                    op, ": stages: expected [pointwise], depthwise, [pointwise] or one of them, got another chain");
    const Shape result = {in.images, p.out_channels, p.out_height, p.out_width};
    p.out = activations_out<S>(op, "out", out, result);
    p.residual = residual ? activations<S>(op, "residual", x, result) : nullptr;
    MBN_CHECK(!residual || p.project.weight, op, ": residual: expected a chain that ends in a pointwise stage, got a depthwise");
    kernels_for<S>().evaluate(p);
  });
}

}  // namespace
}  // namespace mbn

STABLE_TORCH_LIBRARY_IMPL(mbn, CPU, m) { m.impl("evaluate", TORCH_BOX(&mbn::evaluate)); }
