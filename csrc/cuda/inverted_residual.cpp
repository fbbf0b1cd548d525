// torch.ops.mbn.cuda_inverted_residual and cuda_gated_project, and how much shared memory they would take.
#include <initializer_list>

#include "binding.h"
#include "inverted_residual_memory.h"

namespace mbn {
namespace {

using namespace binding;

// The layers of a block in the order of a chain: of each stage whether it is depthwise, whether its norm is affine, and its activation; its
// parameters are the weight, the norm's weight and bias if affine, its running mean and variance.
struct Layers {
  Layer expand{}, depthwise{}, project{};
  int64_t in_channels, channels, out_channels;
  int kernel = 0;

  Layers(const Arguments& a, int64_t in, const std::vector<Tensor>& params, const std::vector<int64_t>& stages, const std::vector<double>& eps,
         bool whole = true)
      : in_channels(in), channels(in), out_channels(in) {
    MBN_CHECK(stages.size() == 3 * eps.size(), a.op(), ": stages: expected ", 3 * eps.size(), " numbers, got ", stages.size());
    size_t next = 0;
    const auto take = [&]() -> const Tensor& {
      MBN_CHECK(next < params.size(), a.op(), ": params: expected more than ", params.size(), " tensors");
      return params[next++];
    };
    for (size_t i = 0; i < eps.size(); ++i) {
      const bool is_depthwise = stages[3 * i] != 0, affine = stages[3 * i + 1] != 0;
      const Tensor& weight = take();
      MBN_CHECK(weight.dim() == 4, a.op(), ": weight: expected 4 dimensions, got ", weight.dim());
      const int64_t inner = out_channels, outer = weight.size(0), k = weight.size(2);
      MBN_CHECK(is_depthwise ? kernel == 0 && outer == inner && weight.size(1) == 1 && weight.size(3) == k
                             : weight.size(1) == inner && k == 1 && weight.size(3) == 1 && (kernel == 0 ? i == 0 : project.weight == nullptr),
                a.op(), ": stages: expected at most one pointwise, one depthwise and one pointwise that fit each other, got a weight of size ",
                text_of(weight.sizes()), " at stage ", i);
      Layer& layer = is_depthwise ? depthwise : kernel == 0 ? expand : project;
      layer.weight = a.weight("weight", weight, outer * (is_depthwise ? k * k : inner));
      if (affine) {
        layer.norm.weight = a.parameter("bn_weight", take(), outer);
        layer.norm.bias = a.parameter("bn_bias", take(), outer);
      }
      layer.norm.mean = a.parameter("running_mean", take(), outer);
      layer.norm.var = a.parameter("running_var", take(), outer);
      layer.norm.eps = float(eps[i]);
      layer.act = a.activation("act", stages[3 * i + 2]);
      if (is_depthwise) kernel = a.count("kernel", k);
      if (kernel == 0 || is_depthwise) channels = outer;
      out_channels = outer;
    }
    MBN_CHECK(next == params.size(), a.op(), ": params: expected ", next, " tensors, got ", params.size());
    MBN_CHECK((kernel != 0) == whole, a.op(), ": stages: expected ", whole ? "a" : "no", " depthwise stage");
  }
};

void check_channels(const Arguments& a, std::initializer_list<int64_t> all) {
  MBN_CHECK(a.dtype() != ScalarType::Float, a.op(), ": x: expected Half or BFloat16, got Float");
  for (const int64_t channels : all) {
    MBN_CHECK(channels > 0 && channels % a.vector() == 0, a.op(), ": x: expected channels in multiples of ", a.vector(), ", got ", channels);
  }
}

// The maps and the tile; the layers are there already.
void set_sizes(InvertedResidual& p, const Arguments& a, const Shape& in, const Shape& out, int64_t channels, int64_t out_channels,
               const std::vector<int64_t>& corner, const std::vector<int64_t>& tile) {
  MBN_CHECK(corner.size() == 2 && tile.size() == 2, a.op(), ": tile: expected [height, width] and a corner of [top, left]");
  p.map = {a.count("images", in.images),          a.count("channels", channels),          a.count("height", in.height, 1),
           a.count("width", in.width, 1),         a.count("output height", out.height, 1), a.count("output width", out.width, 1),
           a.count("padding at the top", corner[0]), a.count("padding at the left", corner[1])};
  p.in_channels = a.count("channels", in.channels);
  p.out_channels = a.count("output channels", out_channels);
  p.tile_height = a.count("tile", tile[0], 1);
  p.tile_width = a.count("tile", tile[1], 1);
  const int64_t pixels = int64_t(p.tile_height) * p.tile_width;
  MBN_CHECK(pixels <= kMostPixels, a.op(), ": tile: expected at most ", kMostPixels, " pixels, got ", pixels);
  MBN_CHECK(p.project.weight == nullptr || p.out_channels <= most_out_channels(int(pixels)), a.op(), ": tile: expected at most ",
            most_out_channels(int(pixels)), " output channels with ", pixels, " pixels, got ", p.out_channels);
  p.tiles_down = divide_up(p.map.out_height, p.tile_height);
  p.tiles_across = divide_up(p.map.out_width, p.tile_width);
  a.count("tiles", in.images * p.tiles_down * p.tiles_across);
  for (const Layer* layer : {&p.expand, &p.project}) {
    MBN_CHECK(reinterpret_cast<uintptr_t>(layer->weight) % 16 == 0, a.op(), ": weight: expected memory that begins at a multiple of 16 bytes");
  }
}

void run(const Arguments& a, const Tensor& x, const InvertedResidual& p, int kernel, int stride) {
  const OnDevice device(x);
  if (a.dtype() == ScalarType::Half) return run_inverted_residual<float16>(p, kernel, stride, device.stream());
  run_inverted_residual<bfloat16>(p, kernel, stride, device.stream());
}

void inverted_residual(const Tensor& x, std::vector<Tensor> params, std::vector<int64_t> stages, std::vector<double> eps, int64_t stride,
                       std::vector<int64_t> corner, const OptionalTensor& residual, std::vector<int64_t> tile, const OptionalTensor& pooled,
                       const Tensor& out) {
  const Arguments a("cuda_inverted_residual", "x", x);
  const Shape in = shape_of(a.op(), "x", x), made = shape_of(a.op(), "out", out);
  const Layers layers(a, in.channels, params, stages, eps);
  MBN_CHECK(has_block(layers.kernel, stride), a.op(), ": weight: expected a window of 3 or 5 at stride 1 or 2, got ", layers.kernel, " at ", stride);
  check_channels(a, {in.channels, layers.channels, layers.out_channels});
  InvertedResidual p{};
  p.expand = layers.expand;
  p.depthwise = layers.depthwise;
  p.project = layers.project;
  set_sizes(p, a, in, made, layers.channels, layers.out_channels, corner, tile);
  const Shape expected = {in.images, layers.out_channels, made.height, made.width};
  p.x = a.activations("x", x, in);
  p.out = a.activations_out("out", out, expected);
  MBN_CHECK(!residual || p.project.weight != nullptr, a.op(), ": residual: expected a project stage with it, got none");
  p.residual = a.activations("residual", residual, expected);
  MBN_CHECK(!pooled || p.project.weight == nullptr, a.op(), ": pooled: expected no project stage with it, got one");
  p.pooled = a.numbers_out("pooled", pooled, in.images * p.tiles_down * p.tiles_across * layers.channels);
  p.factor = float(1.0 / (double(made.height) * double(made.width)));
  run(a, x, p, layers.kernel, int(stride));
}

// Squeeze-excite's gate, from the parts of a mean, on x, and a project stage behind it.
void gated_project(const Tensor& x, const Tensor& pooled, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, int64_t act,
                   int64_t gate_act, std::vector<Tensor> params, std::vector<int64_t> stage, double eps, const OptionalTensor& residual,
                   std::vector<int64_t> tile, const Tensor& out) {
  const Arguments a("cuda_gated_project", "x", x);
  const Shape in = shape_of(a.op(), "x", x);
  const Layers layers(a, in.channels, params, stage, {eps}, false);
  check_channels(a, {in.channels, layers.out_channels});
  InvertedResidual p{};
  p.project = layers.expand;  // the first pointwise stage
  const Shape expected = {in.images, layers.out_channels, in.height, in.width};
  set_sizes(p, a, in, expected, in.channels, layers.out_channels, {0, 0}, tile);
  p.x = a.activations("x", x, in);
  p.out = a.activations_out("out", out, expected);
  p.residual = a.activations("residual", residual, expected);
  MBN_CHECK(pooled.dim() == 3 && w1.dim() >= 2, a.op(), ": pooled: expected [N, parts, C] and w1 of [hidden, C]");
  Squeeze& s = p.squeeze;
  s.parts = a.count("parts", pooled.size(1), 1);
  s.hidden = a.count("hidden", w1.size(0), 1);
  s.pooled = a.numbers("pooled", pooled, in.images * s.parts * in.channels);
  s.w1 = a.parameter("w1", w1, in.channels * s.hidden);
  s.b1 = a.parameter("b1", b1, s.hidden);
  s.w2 = a.parameter("w2", w2, in.channels * s.hidden);
  s.b2 = a.parameter("b2", b2, in.channels);
  s.act = a.activation("act", act);
  s.gate_act = a.activation("gate_act", gate_act);
  run(a, x, p, 1, 1);
}

// Channels: of the input (0: nothing to expand), expanded, of the output (0: nothing to project). With a `hidden` width, of gated_project.
int64_t shared_of(std::vector<int64_t> channels, int64_t kernel, int64_t stride, std::vector<int64_t> tile, int64_t hidden) {
  constexpr const char* op = "cuda_inverted_residual_shared";
  MBN_CHECK(hidden > 0 || has_block(kernel, stride), op, ": kernel: expected 3 or 5 at stride 1 or 2, got ", kernel, " at ", stride);
  MBN_CHECK(channels.size() == 3 && tile.size() == 2, op, ": channels: expected 3 numbers and a tile of 2");
  InvertedResidual p{};
  p.in_channels = int(channels[0]);
  p.out_channels = int(channels[2]);
  p.map.channels = int(channels[1]);
  p.squeeze.hidden = int(hidden);
  static constexpr char given = 0;  // stands for weights that are there
  p.expand.weight = channels[0] ? &given : nullptr;
  p.project.weight = channels[2] ? &given : nullptr;
  p.tile_height = int(tile[0]);
  p.tile_width = int(tile[1]);
  return BlockMemory(p, int(kernel), int(stride)).end;
}

}  // namespace
}  // namespace mbn

STABLE_TORCH_LIBRARY_IMPL(mbn, MBN_DISPATCH_KEY, m) {
  m.impl("cuda_inverted_residual", TORCH_BOX(&mbn::inverted_residual));
  m.impl("cuda_gated_project", TORCH_BOX(&mbn::gated_project));
}

// It takes no tensor whose device could choose a kernel.
STABLE_TORCH_LIBRARY_IMPL(mbn, CompositeExplicitAutograd, m) {
  m.impl("cuda_inverted_residual_shared", TORCH_BOX(&mbn::shared_of));
}
