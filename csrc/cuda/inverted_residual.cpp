// torch.ops.mbn.cuda_inverted_residual, and how much shared memory it would take.
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

  Layers(const Arguments& a, int64_t in, const std::vector<Tensor>& params, const std::vector<int64_t>& stages, const std::vector<double>& eps)
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
        layer.norm.weight = a.numbers("bn_weight", take(), outer);
        layer.norm.bias = a.numbers("bn_bias", take(), outer);
      }
      layer.norm.mean = a.numbers("running_mean", take(), outer);
      layer.norm.var = a.numbers("running_var", take(), outer);
      layer.norm.eps = float(eps[i]);
      layer.act = a.activation("act", stages[3 * i + 2]);
      if (is_depthwise) kernel = a.count("kernel", k);
      if (kernel == 0 || is_depthwise) channels = outer;
      out_channels = outer;
    }
    MBN_CHECK(next == params.size(), a.op(), ": params: expected ", next, " tensors, got ", params.size());
    MBN_CHECK(kernel != 0, a.op(), ": stages: expected a depthwise stage, got none");
  }
};

void inverted_residual(const Tensor& x, std::vector<Tensor> params, std::vector<int64_t> stages, std::vector<double> eps, int64_t stride,
                       std::vector<int64_t> corner, const OptionalTensor& residual, std::vector<int64_t> tile, const OptionalTensor& pooled, const Tensor& out) {
  const Arguments a("cuda_inverted_residual", x);
  MBN_CHECK(a.dtype() != ScalarType::Float, a.op(), ": x: expected Half or BFloat16, got Float");
  const Shape in = shape_of(a.op(), "x", x), made = shape_of(a.op(), "out", out);
  const Layers layers(a, in.channels, params, stages, eps);
  MBN_CHECK(has_block(layers.kernel, stride), a.op(), ": weight: expected a window of 3 or 5 at stride 1 or 2, got ", layers.kernel, " at ", stride);
  for (const int64_t channels : {in.channels, layers.channels, layers.out_channels}) {
    MBN_CHECK(channels > 0 && channels % a.vector() == 0, a.op(), ": x: expected channels in multiples of ", a.vector(), ", got ", channels);
  }
  MBN_CHECK(corner.size() == 2 && tile.size() == 2, a.op(), ": tile: expected [height, width] and a corner of [top, left]");
  InvertedResidual p{};
  p.map = {a.count("images", in.images),        a.count("channels", layers.channels),    a.count("height", in.height, 1),
           a.count("width", in.width, 1),       a.count("output height", made.height, 1), a.count("output width", made.width, 1),
           a.count("padding at the top", corner[0]), a.count("padding at the left", corner[1])};
  p.in_channels = int(in.channels);
  p.out_channels = int(layers.out_channels);
  p.x = a.activations("x", x, in);
  p.expand = layers.expand;
  p.depthwise = layers.depthwise;
  p.project = layers.project;
  p.tile_height = a.count("tile", tile[0], 1);
  p.tile_width = a.count("tile", tile[1], 1);
  const int64_t pixels = int64_t(p.tile_height) * p.tile_width;
  MBN_CHECK(pixels <= kMostPixels, a.op(), ": tile: expected at most ", kMostPixels, " pixels, got ", pixels);
  MBN_CHECK(p.project.weight == nullptr || p.out_channels <= most_out_channels(int(pixels)), a.op(), ": tile: expected at most ",
            most_out_channels(int(pixels)), " output channels with ", pixels, " pixels, got ", p.out_channels);
  p.tiles_down = divide_up(p.map.out_height, p.tile_height);
  p.tiles_across = divide_up(p.map.out_width, p.tile_width);
  const int64_t tiles = int64_t(p.tiles_down) * p.tiles_across;
  a.count("tiles", in.images * tiles);
  const Shape expected = {in.images, layers.out_channels, made.height, made.width};
  p.out = a.activations_out("out", out, expected);
  MBN_CHECK(!residual || p.project.weight != nullptr, a.op(), ": residual: expected a project stage with it, got none");
  p.residual = a.activations("residual", residual, expected);
  MBN_CHECK(!pooled || p.project.weight == nullptr, a.op(), ": pooled: expected no project stage with it, got one");
  p.pooled = a.numbers_out("pooled", pooled, in.images * tiles * layers.channels);
  p.factor = float(1.0 / (double(made.height) * double(made.width)));
  for (const Layer* layer : {&p.expand, &p.project}) {
    MBN_CHECK(reinterpret_cast<uintptr_t>(layer->weight) % 16 == 0, a.op(), ": weight: expected memory that begins at a multiple of 16 bytes");
  }
  const OnDevice device(x);
  if (a.dtype() == ScalarType::Half) return run_inverted_residual<float16>(p, layers.kernel, int(stride), device.stream());
  run_inverted_residual<bfloat16>(p, layers.kernel, int(stride), device.stream());
}

// Channels: of the input (0: nothing to expand), expanded, of the output (0: nothing to project).
int64_t shared_of(std::vector<int64_t> channels, int64_t kernel, int64_t stride, std::vector<int64_t> tile) {
  constexpr const char* op = "cuda_inverted_residual_shared";
  MBN_CHECK(has_block(kernel, stride), op, ": kernel: expected 3 or 5 at stride 1 or 2, got ", kernel, " at ", stride);
  MBN_CHECK(channels.size() == 3 && tile.size() == 2, op, ": channels: expected 3 numbers and a tile of 2");
  InvertedResidual p{};
  p.in_channels = int(channels[0]);
  p.out_channels = int(channels[2]);
  p.map.channels = int(channels[1]);
  static constexpr char given = 0;  // stands for weights that are there
  p.expand.weight = channels[0] ? &given : nullptr;
  p.project.weight = channels[2] ? &given : nullptr;
  p.tile_height = int(tile[0]);
  p.tile_width = int(tile[1]);
  return BlockMemory(p, int(kernel), int(stride)).end;
}

}  // namespace
}  // namespace mbn

STABLE_TORCH_LIBRARY_IMPL(mbn, MBN_DISPATCH_KEY, m) { m.impl("cuda_inverted_residual", TORCH_BOX(&mbn::inverted_residual)); }

// It takes no tensor whose device could choose a kernel.
STABLE_TORCH_LIBRARY_IMPL(mbn, CompositeExplicitAutograd, m) {
  m.impl("cuda_inverted_residual_shared", TORCH_BOX(&mbn::shared_of));
}
