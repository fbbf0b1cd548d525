// torch.ops.mbn.depthwise_forward and depthwise_backward on CPU tensors.
#include "binding.h"

namespace mbn {
namespace {

using namespace binding;
using torch::headeronly::IntHeaderOnlyArrayRef;

// Far beyond any window that makes sense, and small enough that no index below overflows.
constexpr int64_t kLargestStep = int64_t{1} << 20;

Window window_of(const char* op, const Tensor& weight, const Shape& in, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  const auto check = [&](const char* name, const std::vector<int64_t>& numbers, size_t count, int64_t smallest) {
    bool fits = numbers.size() == count;
    for (const int64_t n : numbers) fits = fits && n >= smallest && n <= kLargestStep;
    MBN_CHECK(fits, op, ": ", name, ": expected ", count, " numbers from ", smallest, " to ", kLargestStep, ", got ", text_of(numbers));
  };
  check("stride", stride, 2, 1);
  check("padding", padding, 4, 0);
  check("dilation", dilation, 2, 1);
  MBN_CHECK(weight.dim() == 4 && weight.size(0) == in.channels && weight.size(1) == 1 && weight.size(2) > 0 &&
                      weight.size(2) <= kLargestStep && weight.size(3) > 0 && weight.size(3) <= kLargestStep,
                  op, ": weight: expected size [", in.channels, ", 1, kernel height, kernel width], got ", text_of(weight.sizes()));
  return {weight.size(2), weight.size(3), stride[0],  stride[1],  dilation[0],
          dilation[1],    padding[0],     padding[1], padding[2], padding[3]};
}

int64_t output_size(const char* op, const char* what, int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t before,
                    int64_t after) {
  const int64_t room = size + before + after - (kernel - 1) * dilation - 1;
  MBN_CHECK(room >= 0, op, ": u_y: expected a padded ", what, " of at least ", (kernel - 1) * dilation + 1, ", got ",
                  size + before + after);
  return room / stride + 1;
}

Shape output_shape(const char* op, const Shape& in, const Window& w) {
  return {in.images, in.channels,
          output_size(op, "height", in.height, w.kernel_h, w.stride_h, w.dilation_h, w.pad_top, w.pad_bottom),
          output_size(op, "width", in.width, w.kernel_w, w.stride_w, w.dilation_w, w.pad_left, w.pad_right)};
}

template <class P>
void set_shape(P& p, const Shape& in, const Shape& out, const Window& window) {
  p.images = in.images;
  p.channels = in.channels;
  p.height = in.height;
  p.width = in.width;
  p.out_height = out.height;
  p.out_width = out.width;
  p.window = window;
}

void depthwise_forward(const Tensor& u_y, const OptionalTensor& u_scale, const OptionalTensor& u_shift, const OptionalTensor& u_gate,
                       int64_t u_act, const Tensor& weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
                       std::vector<int64_t> dilation, const Tensor& y, const OptionalTensor& mean, const OptionalTensor& var) {
  Call op("depthwise_forward");
  by_dtype(op, "u_y", u_y, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    const Shape in = shape_of(op, "u_y", u_y);
    const Window window = window_of(op, weight, in, stride, padding, dilation);
    const Shape out = output_shape(op, in, window);
    MBN_CHECK(mean.has_value() == var.has_value(), op, ": var: expected mean and var together, got one of them");
    DepthwiseForward<S> p;
    set_shape(p, in, out, window);
    p.u = value<S>(op, in, u_y, u_scale, u_shift, u_gate, u_act);
    p.weight = dense<S>(op, "weight", weight, in.channels * window.kernel_h * window.kernel_w);
    p.y = activations_out<S>(op, "y", y, out);
    p.mean = dense_out<T>(op, "mean", mean, in.channels);
    p.var = dense_out<T>(op, "var", var, in.channels);
    kernels_for<S>().depthwise_forward(p);
  });
}

void depthwise_backward(const Tensor& g_dv, const OptionalTensor& g_y, const OptionalTensor& g_scale, const OptionalTensor& g_shift,
                        const OptionalTensor& g_gate, int64_t g_act, const OptionalTensor& g_q, const OptionalTensor& g_a,
                        const OptionalTensor& g_b, const OptionalTensor& g_c, const Tensor& u_y, const OptionalTensor& u_scale,
                        const OptionalTensor& u_shift, const OptionalTensor& u_gate, int64_t u_act, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, const Tensor& weight,
                        const OptionalTensor& residual, const OptionalTensor& mean, const OptionalTensor& rstd,
                        const OptionalTensor& du, const OptionalTensor& sums, const OptionalTensor& dweight) {
  Call op("depthwise_backward");
  by_dtype(op, "u_y", u_y, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    const Shape in = shape_of(op, "u_y", u_y);
    const Window window = window_of(op, weight, in, stride, padding, dilation);
    const Shape out = output_shape(op, in, window);
    const int64_t weights = in.channels * window.kernel_h * window.kernel_w;
    MBN_CHECK(du.has_value() || !sums.has_value(), op, ": sums: expected du where sums are wanted, got no du");
    DepthwiseBackward<S> p;
    set_shape(p, in, out, window);
    p.g = gradient<S>(op, out, g_dv, g_y, g_scale, g_shift, g_gate, g_act, g_q, g_a, g_b, g_c);
    p.weight = dense<S>(op, "weight", weight, weights);
    p.u = value<S>(op, in, u_y, u_scale, u_shift, u_gate, u_act);
    p.residual = activations<S>(op, "residual", residual, in);
    p.du = activations_out<S>(op, "du", du, in);
    p.sums = binding::sums<S>(op, in, u_gate.has_value(), mean, rstd, sums);
    p.dweight = dense_out<T>(op, "dweight", dweight, weights);
    kernels_for<S>().depthwise_backward(p);
  });
}

}  // namespace
}  // namespace mbn

STABLE_TORCH_LIBRARY_IMPL(mbn, CPU, m) {
  m.impl("depthwise_forward", TORCH_BOX(&mbn::depthwise_forward));
  m.impl("depthwise_backward", TORCH_BOX(&mbn::depthwise_backward));
}
