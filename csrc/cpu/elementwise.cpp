// torch.ops.mbn.pool, materialize, materialize_gradient, statistics and reduce_gradient on CPU tensors.
#include "binding.h"

namespace mbn {
namespace {

using namespace binding;

template <class P>
void set_shape(P& p, const Shape& shape) {
  p.images = shape.images;
  p.pixels = shape.pixels();
  p.channels = shape.channels;
}

void pool(const Tensor& u_y, const OptionalTensor& u_scale, const OptionalTensor& u_shift, const OptionalTensor& u_gate, int64_t u_act,
          const Tensor& pooled) {
  Call op("pool");
  by_dtype(op, "u_y", u_y, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Shape shape = shape_of(op, "u_y", u_y);
    Pool<S> p;
    set_shape(p, shape);
    p.u = value<S>(op, shape, u_y, u_scale, u_shift, u_gate, u_act);
    p.pooled = dense_out<Accumulate<S>>(op, "pooled", pooled, shape.images * shape.channels);
    kernels_for<S>().pool(p);
  });
}

void materialize(const Tensor& u_y, const OptionalTensor& u_scale, const OptionalTensor& u_shift, const OptionalTensor& u_gate,
                 int64_t u_act, const OptionalTensor& residual, const Tensor& out) {
  Call op("materialize");
  by_dtype(op, "u_y", u_y, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Shape shape = shape_of(op, "u_y", u_y);
    Materialize<S> p;
    set_shape(p, shape);
    p.u = value<S>(op, shape, u_y, u_scale, u_shift, u_gate, u_act);
    p.residual = activations<S>(op, "residual", residual, shape);
    p.out = activations_out<S>(op, "out", out, shape);
    kernels_for<S>().materialize(p);
  });
}

void materialize_gradient(const Tensor& g_dv, const OptionalTensor& g_y, const OptionalTensor& g_scale, const OptionalTensor& g_shift,
                          const OptionalTensor& g_gate, int64_t g_act, const OptionalTensor& g_q, const OptionalTensor& g_a,
                          const OptionalTensor& g_b, const OptionalTensor& g_c, const OptionalTensor& residual, const Tensor& out) {
  Call op("materialize_gradient");
  by_dtype(op, "g_dv", g_dv, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Shape shape = shape_of(op, "g_dv", g_dv);
    MaterializeGradient<S> p;
    set_shape(p, shape);
    p.g = gradient<S>(op, shape, g_dv, g_y, g_scale, g_shift, g_gate, g_act, g_q, g_a, g_b, g_c);
    p.residual = activations<S>(op, "residual", residual, shape);
    p.out = activations_out<S>(op, "out", out, shape);
    kernels_for<S>().materialize_gradient(p);
  });
}

void statistics(const Tensor& y, const Tensor& mean, const Tensor& var) {
  Call op("statistics");
  by_dtype(op, "y", y, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Shape shape = shape_of(op, "y", y);
    Statistics<S> p;
    p.rows = shape.images * shape.pixels();
    p.channels = shape.channels;
    p.y = activations<S>(op, "y", y, shape);
    p.mean = dense_out<Accumulate<S>>(op, "mean", mean, shape.channels);
    p.var = dense_out<Accumulate<S>>(op, "var", var, shape.channels);
    kernels_for<S>().statistics(p);
  });
}

void reduce_gradient(const Tensor& dv, const Tensor& u_y, const OptionalTensor& u_scale, const OptionalTensor& u_shift,
                     const OptionalTensor& u_gate, int64_t u_act, const OptionalTensor& mean, const OptionalTensor& rstd,
                     const Tensor& sums) {
  Call op("reduce_gradient");
  by_dtype(op, "u_y", u_y, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const Shape shape = shape_of(op, "u_y", u_y);
    ReduceGradient<S> p;
    set_shape(p, shape);
    p.dv = activations<S>(op, "dv", dv, shape);
    p.u = value<S>(op, shape, u_y, u_scale, u_shift, u_gate, u_act);
    p.sums = binding::sums<S>(op, shape, u_gate.has_value(), mean, rstd, OptionalTensor(sums));
    kernels_for<S>().reduce_gradient(p);
  });
}

}  // namespace
}  // namespace mbn

STABLE_TORCH_LIBRARY_IMPL(mbn, CPU, m) {
  m.impl("pool", TORCH_BOX(&mbn::pool));
  m.impl("materialize", TORCH_BOX(&mbn::materialize));
  m.impl("materialize_gradient", TORCH_BOX(&mbn::materialize_gradient));
  m.impl("statistics", TORCH_BOX(&mbn::statistics));
  m.impl("reduce_gradient", TORCH_BOX(&mbn::reduce_gradient));
}
