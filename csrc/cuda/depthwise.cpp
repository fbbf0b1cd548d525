// torch.ops.mbn.cuda_depthwise_forward and cuda_depthwise_backward.
#include "binding.h"

namespace mbn {
namespace {

using namespace binding;

// Of the input and output shapes, a [C, 1, k, k] weight, and [top, left] of the padding.
Map map_of(const Arguments& a, const Shape& in, const Shape& out, const Tensor& weight, int64_t stride, const std::vector<int64_t>& corner) {
  MBN_CHECK(in.channels > 0 && in.channels % a.vector() == 0, a.op(), ": u_y: expected channels in a multiple of ", a.vector(), ", got ", in.channels);
  MBN_CHECK(weight.dim() == 4 && weight.size(0) == in.channels && weight.size(1) == 1 && weight.size(2) == weight.size(3) &&
                has_window(weight.size(2), stride),
            a.op(), ": weight: expected size [", in.channels, ", 1, k, k] with k of 3, 5 or 7 and stride 1 or 2, got ", text_of(weight.sizes()),
            " and ", stride);
  MBN_CHECK(corner.size() == 2, a.op(), ": corner: expected [top, left], got ", corner.size(), " numbers");
  MBN_CHECK(in.images == out.images && in.channels == out.channels, a.op(), ": y: expected ", in.images, " images of ", in.channels,
            " channels, got ", out.images, " of ", out.channels);
  return {a.count("images", in.images),          a.count("channels", in.channels),      a.count("height", in.height, 1),
          a.count("width", in.width, 1),         a.count("output height", out.height, 1), a.count("output width", out.width, 1),
          a.count("padding at the top", corner[0]), a.count("padding at the left", corner[1])};
}

// [vectors, groups, strip, parts, run, span], as config.py of the backend makes them. `steps` of rows and `columns` are to be covered, `columns_each`
// by a thread.
Share share_of(const Arguments& a, const Map& map, const std::vector<int64_t>& given, int steps, int columns, int columns_each) {
  MBN_CHECK(given.size() == 6, a.op(), ": share: expected 6 numbers, got ", given.size());
  Share share;
  share.vectors = a.count("vectors", given[0], 1);
  share.groups = a.count("groups", given[1], 1);
  share.strip = a.count("strip", given[2], 1);
  share.parts = a.count("parts", given[3], 1);
  share.run = a.count("run", given[4]);
  share.span = a.count("span", given[5], 1);
  const int64_t threads = int64_t(share.vectors) * (a.vector() / 2) * share.groups;
  MBN_CHECK(threads <= kMostThreads, a.op(), ": share: expected at most ", kMostThreads, " threads, got ", threads);
  share.slices = divide_up(map.channels, share.vectors * a.vector());
  share.strips = divide_up(steps, share.strip);
  share.tiles = divide_up(columns, share.groups * columns_each);
  MBN_CHECK(int64_t(share.run) * share.parts >= int64_t(share.strips) * share.tiles, a.op(), ": share: expected parts * run of at least ",
            int64_t(share.strips) * share.tiles, ", got ", int64_t(share.run) * share.parts);
  return share;
}

int64_t group_count(const Map& map, const Share& share) { return int64_t(divide_up(map.images, share.span)) * share.parts; }

void depthwise_forward(const Tensor& u_y, const OptionalTensor& u_scale, const OptionalTensor& u_shift, const OptionalTensor& u_gate, int64_t u_act,
                       const Tensor& weight, int64_t stride, std::vector<int64_t> corner, const OptionalTensor& counts, const OptionalTensor& moments,
                       const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                       double eps, int64_t act, const OptionalTensor& residual, const OptionalTensor& pooled, std::vector<int64_t> share,
                       const Tensor& y) {
  const Arguments a("cuda_depthwise_forward", "u_y", u_y);
  const Shape in = shape_of(a.op(), "u_y", u_y), out = shape_of(a.op(), "y", y);
  DepthwiseForward p;
  p.map = map_of(a, in, out, weight, stride, corner);
  const int kernel = int(weight.size(2));
  p.share = share_of(a, p.map, share, p.map.out_height, p.map.out_width, kForwardColumns);
  p.u = a.value("u_y", in, u_y, u_scale, u_shift, u_gate, u_act);
  p.weight = a.weight("weight", weight, in.channels * kernel * kernel);
  p.y = a.activations_out("y", y, out);
  a.together("moments", counts, moments);
  a.together("var", mean, var);
  p.counts = a.numbers_out("counts", counts, group_count(p.map, p.share));
  p.moments = a.numbers_out("moments", moments, group_count(p.map, p.share) * 3 * in.channels);
  p.norm = {a.parameter("mean", mean, in.channels), a.parameter("var", var, in.channels), a.parameter("bn_weight", bn_weight, in.channels),
            a.parameter("bn_bias", bn_bias, in.channels), float(eps)};
  p.act = a.activation("act", act);
  p.residual = a.activations("residual", residual, out);
  p.pooled = a.numbers_out("pooled", pooled, in.images * p.share.parts * in.channels);
  p.factor = float(1.0 / (double(out.height) * double(out.width)));
  const OnDevice device(u_y);
  by_dtype(a, [&](auto tag) { run_depthwise_forward<typename decltype(tag)::type>(p, kernel, int(stride), device.stream()); });
}

void depthwise_backward(const Tensor& g_dv, const OptionalTensor& g_y, const OptionalTensor& g_scale, const OptionalTensor& g_shift,
                        const OptionalTensor& g_gate, int64_t g_act, const OptionalTensor& g_q, const OptionalTensor& g_a, const OptionalTensor& g_b,
                        const OptionalTensor& g_c, const Tensor& u_y, const OptionalTensor& u_scale, const OptionalTensor& u_shift,
                        const OptionalTensor& u_gate, int64_t u_act, int64_t stride, std::vector<int64_t> corner, std::vector<int64_t> share,
                        const Tensor& weight, const OptionalTensor& residual, const OptionalTensor& mean, const OptionalTensor& rstd,
                        const OptionalTensor& du, const OptionalTensor& sums, const OptionalTensor& dweight) {
  const Arguments a("cuda_depthwise_backward", "u_y", u_y);
  const Shape in = shape_of(a.op(), "u_y", u_y), out = shape_of(a.op(), "g_dv", g_dv);
  DepthwiseBackward p;
  p.map = map_of(a, in, out, weight, stride, corner);
  const int kernel = int(weight.size(2)), step = int(stride), columns_each = backward_columns(kernel, step);
  const auto steps = [&](int size, int before) { return divide_up(size + before, step) - before / step; };
  p.share = share_of(a, p.map, share, steps(p.map.height, p.map.top), steps(p.map.width, p.map.left), columns_each);
  p.g = a.gradient(out, g_dv, g_y, g_scale, g_shift, g_gate, g_act, g_q, g_a, g_b, g_c);
  p.u = a.value("u_y", in, u_y, u_scale, u_shift, u_gate, u_act);
  p.weight = a.weight("weight", weight, in.channels * kernel * kernel);
  p.residual = a.activations("residual", residual, in);
  a.together("rstd", mean, rstd);
  p.mean = a.numbers("mean", mean, in.channels);
  p.rstd = a.numbers("rstd", rstd, in.channels);
  p.du = a.activations_out("du", du, in);
  MBN_CHECK(du.has_value() || !sums.has_value(), a.op(), ": du: expected a tensor where sums are wanted, got none");
  const int64_t count = group_count(p.map, p.share);
  p.sums = a.numbers_out("sums", sums, u_gate ? 5 * in.images * p.share.parts * in.channels : 2 * count * in.channels);
  p.dweight = a.numbers_out("dweight", dweight, count * in.channels * kernel * kernel);
  const OnDevice device(u_y);
  by_dtype(a, [&](auto tag) { run_depthwise_backward<typename decltype(tag)::type>(p, kernel, step, device.stream()); });
}

int64_t shared_of(int64_t itemsize, int64_t kernel, int64_t stride, int64_t vectors, int64_t groups, bool backward) {
  constexpr const char* op = "cuda_depthwise_shared";
  MBN_CHECK(has_window(kernel, stride), op, ": kernel: expected 3, 5 or 7 at stride 1 or 2, got ", kernel, " at ", stride);
  MBN_CHECK(itemsize == 2 || itemsize == 4, op, ": itemsize: expected 2 or 4, got ", itemsize);
  MBN_CHECK(vectors > 0 && groups > 0 && vectors * groups <= kMostThreads, op, ": vectors: expected a block of at most ", kMostThreads, " threads");
  Share share{};
  share.vectors = int(vectors);
  share.groups = int(groups);
  const auto of = itemsize == 4 ? &depthwise_shared<float> : &depthwise_shared<bfloat16>;
  return int64_t(of(share, int(kernel), int(stride), backward));
}

}  // namespace
}  // namespace mbn

STABLE_TORCH_LIBRARY_IMPL(mbn, MBN_DISPATCH_KEY, m) {
  m.impl("cuda_depthwise_forward", TORCH_BOX(&mbn::depthwise_forward));
  m.impl("cuda_depthwise_backward", TORCH_BOX(&mbn::depthwise_backward));
}

// They take no tensor whose device could choose a kernel.
STABLE_TORCH_LIBRARY_IMPL(mbn, CompositeExplicitAutograd, m) {
  m.impl("cuda_missing", TORCH_BOX(&mbn::missing));
  m.impl("cuda_depthwise_shared", TORCH_BOX(&mbn::shared_of));
}
