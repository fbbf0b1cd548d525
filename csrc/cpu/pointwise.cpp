// torch.ops.mbn.pointwise_forward and pointwise_backward on CPU tensors.
#include "binding.h"

namespace mbn {
namespace {

using namespace binding;

void check_weight(const char* op, const Tensor& weight, int64_t in_channels) {
  MBN_CHECK(weight.dim() >= 2 && weight.size(1) == in_channels, op, ": weight: expected size [out, ", in_channels, ", 1, 1], got ",
                  text_of(weight.sizes()));
}

void pointwise_forward(const Tensor& u_y, const OptionalTensor& u_scale, const OptionalTensor& u_shift, const OptionalTensor& u_gate,
                       int64_t u_act, const Tensor& weight, const Tensor& y, const OptionalTensor& mean, const OptionalTensor& var) {
  Call op("pointwise_forward");
  by_dtype(op, "u_y", u_y, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    const Shape in = shape_of(op, "u_y", u_y);
    check_weight(op, weight, in.channels);
    const Shape out = {in.images, weight.size(0), in.height, in.width};
    MBN_CHECK(mean.has_value() == var.has_value(), op, ": var: expected mean and var together, got one of them");
    PointwiseForward<S> p;
    p.images = in.images;
    p.pixels = in.pixels();
    p.in_channels = in.channels;
    p.out_channels = out.channels;
    p.u = value<S>(op, in, u_y, u_scale, u_shift, u_gate, u_act);
    p.weight = dense<S>(op, "weight", weight, out.channels * in.channels);
    p.y = activations_out<S>(op, "y", y, out);
    p.mean = dense_out<T>(op, "mean", mean, out.channels);
    p.var = dense_out<T>(op, "var", var, out.channels);
    kernels_for<S>().pointwise_forward(p);
  });
}

void pointwise_backward(const Tensor& g_dv, const OptionalTensor& g_y, const OptionalTensor& g_scale, const OptionalTensor& g_shift,
                        const OptionalTensor& g_gate, int64_t g_act, const OptionalTensor& g_q, const OptionalTensor& g_a,
                        const OptionalTensor& g_b, const OptionalTensor& g_c, const Tensor& u_y, const OptionalTensor& u_scale,
                        const OptionalTensor& u_shift, const OptionalTensor& u_gate, int64_t u_act, const Tensor& weight,
                        const OptionalTensor& residual, const OptionalTensor& mean, const OptionalTensor& rstd,
                        const OptionalTensor& du, const OptionalTensor& sums, const OptionalTensor& dweight) {
  Call op("pointwise_backward");
  by_dtype(op, "u_y", u_y, [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = Accumulate<S>;
    const Shape in = shape_of(op, "u_y", u_y);
    check_weight(op, weight, in.channels);
    const Shape out = {in.images, weight.size(0), in.height, in.width};
    MBN_CHECK(du.has_value() || !sums.has_value(), op, ": sums: expected du where sums are wanted, got no du");
    PointwiseBackward<S> p;
    p.images = in.images;
    p.pixels = in.pixels();
    p.in_channels = in.channels;
    p.out_channels = out.channels;
    p.g = gradient<S>(op, out, g_dv, g_y, g_scale, g_shift, g_gate, g_act, g_q, g_a, g_b, g_c);
    p.weight = dense<S>(op, "weight", weight, out.channels * in.channels);
    p.u = value<S>(op, in, u_y, u_scale, u_shift, u_gate, u_act);
    p.residual = activations<S>(op, "residual", residual, in);
    p.du = activations_out<S>(op, "du", du, in);
    p.sums = binding::sums<S>(op, in, u_gate.has_value(), mean, rstd, sums);
    p.dweight = dense_out<T>(op, "dweight", dweight, out.channels * in.channels);
    kernels_for<S>().pointwise_backward(p);
  });
}

}  // namespace
}  // namespace mbn

STABLE_TORCH_LIBRARY_IMPL(mbn, CPU, m) {
  m.impl("pointwise_forward", TORCH_BOX(&mbn::pointwise_forward));
  m.impl("pointwise_backward", TORCH_BOX(&mbn::pointwise_backward));
}
