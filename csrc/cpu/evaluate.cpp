// torch.ops.mbn.evaluate on CPU tensors: blocks in evaluation, one behind the other in one call, up to a whole network. What goes from block to block stays in
// scratch.
//
// Parameters are packed once: weights in the layout that the kernels read, batch norm folded into them. The caller keeps the packed tensor from call to call.
// Its first bytes say of which parameters it was made, and where those have changed it is made anew.
#include <algorithm>
#include <memory>
#include <unordered_map>
#include <utility>

#include "evaluate_params.h"

namespace mbn {
namespace evaluation {
namespace {

// [pointwise], depthwise (+ squeeze-excite), [pointwise], or one of them, a dense convolution or a pool alone.
void check_block(const StageCode* codes, size_t count) {
  const bool expands = count > 1 && codes[0].conv == kPointwise && codes[1].conv == kDepthwise;
  const size_t middle = expands ? 1 : 0;
  const bool projects = codes[count - 1].conv == kPointwise && count == middle + (codes[middle].conv == kDepthwise ? 2 : 1);
  const bool alone = count == 1 && (codes[0].conv == kDense || codes[0].conv == kPool || codes[0].conv == kDepthwise) && !codes[0].gated();
  bool fits = projects || alone;
  for (size_t i = 0; i < count; ++i) fits = fits && (!codes[i].gated() || codes[i].conv == kDepthwise);
  MBN_CHECK(fits, op, ": stages: expected [pointwise], depthwise, [pointwise] or one of them, got another chain");
}

void slide(const StageCode& c, int64_t& height, int64_t& width) {
  const auto out_size = [](int64_t in, int64_t pads, int64_t kernel, int64_t dilation, int64_t stride) {
    const int64_t room = in + pads - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  };
  const int64_t h = out_size(height, c.pad_top + c.pad_bottom, c.kernel_h, c.dilation_h, c.stride_h);
  const int64_t w = out_size(width, c.pad_left + c.pad_right, c.kernel_w, c.dilation_w, c.stride_w);
  MBN_CHECK(h > 0 && w > 0, op, ": x: expected an image that the window fits in, got ", height, "x", width);
  height = h, width = w;
}

// The ring of rows that a depthwise convolution reads has offsets of 32 bits (evaluate_depthwise.h): no taps millions of pixels apart.
template <class S>
void check_ring(const Step<S>& p) {
  constexpr int64_t kChunkPixels = 28, kMostPixels = (int64_t{1} << 31) / 16;  // of 16 lanes at most
  const Window& w = p.window;
  const int64_t chunk = std::max<int64_t>(1, std::min(kChunkPixels / p.out_width, p.out_height));
  const int64_t rows = (w.kernel_h - 1) * w.dilation_h + 1 + (chunk - 1) * w.stride_h;
  const int64_t columns = std::max((p.out_width - 1) * w.stride_w + (w.kernel_w - 1) * w.dilation_w + 2, w.pad_left + p.width + 1);
  MBN_CHECK(rows < kMostPixels / columns, op, ": stages: expected a window that reads at most ", kMostPixels, " pixels, got ", rows, " x ", columns);
}

// The step of stages [first, first + count), for an input of this shape; behind a dense convolution it makes, it is part of that step.
template <class S>
Step<S> step_of(const Stage<S>* stages, size_t count, const Shape& in, bool residual) {
  Step<S> p = {};
  p.in_channels = p.channels = in.channels;
  p.height = in.height, p.width = in.width;
  int64_t channels = in.channels, height = in.height, width = in.width;
  for (size_t i = 0; i < count; ++i) {
    const Stage<S>& s = stages[i];
    if (s.code.conv == kPool) {
      p.kind = StepKind::pool;
      height = width = 1;
      continue;
    }
    MBN_CHECK(s.in == channels, op, ": weight: expected one for ", channels, " channels, got one for ", s.in);
    MBN_CHECK(s.code.conv != kDepthwise || s.out == s.in, op, ": weight: expected as many channels out as in of a depthwise stage, got ", s.out, " and ", s.in);
    channels = s.out;
    if (s.code.conv == kDense) {
      p.dense = s.folded();
      p.dense_window = s.code.window();
      p.dense_channels = in.channels, p.dense_height = height, p.dense_width = width;
      slide(s.code, height, width);
      p.in_channels = p.channels = channels;
      p.height = height, p.width = width;
    } else if (s.code.conv == kDepthwise) {
      p.window = s.code.window();
      p.depthwise = s.folded();
      p.channels = s.out;
      slide(s.code, height, width);
      if (s.code.gated()) p.squeeze = s.squeeze, p.reduce = s.folded_reduce(), p.restore = s.folded_restore();
    } else if (i + 1 == count) {
      p.project = s.folded();
      p.channels = s.in;
    } else {
      p.expand = s.folded();
    }
  }
  p.out_channels = channels;
  p.out_height = height, p.out_width = width;
  if (p.depthwise.weight) check_ring(p);
  p.residual = residual;
  const bool same = channels == in.channels && height == in.height && width == in.width;
  MBN_CHECK(!residual || (p.project.weight && same), op,
            ": blocks: expected a residual around a block that ends in a pointwise stage and keeps its input's size, got another");
  return p;
}

// A dense convolution makes the rows that the depthwise behind it reads just before it reads them.
template <class S>
bool joins(const Step<S>& dense, const Step<S>& next) {
  return dense.dense.weight && !dense.depthwise.weight && next.depthwise.weight && !next.expand.weight && !(next.residual && (next.squeeze > 0 || next.window.stride_h > 1 || next.window.stride_w > 1));
}

template <class S>
std::vector<Step<S>> steps_of(const std::vector<Stage<S>>& stages, const std::vector<BlockCode>& codes, Shape shape) {
  std::vector<Step<S>> steps;
  size_t first = 0;
  for (const BlockCode& code : codes) {
    MBN_CHECK(code.stages > 0 && size_t(code.stages) <= stages.size() - first, op, ": blocks: expected from 1 to ", stages.size() - first,
              " stages, got ", code.stages);
    std::vector<StageCode> own;
    for (size_t i = first; i < first + size_t(code.stages); ++i) own.push_back(stages[i].code);
    check_block(own.data(), own.size());
    Step<S> p = step_of(stages.data() + first, own.size(), shape, code.residual != 0);
    MBN_CHECK(!p.dense.weight || steps.empty(), op, ": stages: expected a dense convolution in the first block only, got one behind another");
    shape = {shape.images, p.out_channels, p.out_height, p.out_width};
    if (steps.size() == 1 && joins(steps[0], p)) {
      p.dense = steps[0].dense;
      p.dense_window = steps[0].dense_window;
      p.dense_channels = steps[0].dense_channels, p.dense_height = steps[0].dense_height, p.dense_width = steps[0].dense_width;
      steps[0] = p;
    } else {
      steps.push_back(p);
    }
    first += size_t(code.stages);
  }
  MBN_CHECK(first == stages.size(), op, ": blocks: expected ", stages.size(), " stages, got ", first);
  return steps;
}

// How many bytes the packed tensor holds.
int64_t evaluate_size(std::vector<Tensor> params, const Tensor& stages) {
  MBN_CHECK(!params.empty(), op, ": params: expected a weight, got no tensor");
  Places places = {nullptr, kOriginBytes};
  by_dtype(op, "weight", params[0], [&](auto tag) { stages_of<typename decltype(tag)::type>(stage_codes(stages), params, places); });
  return places.used;
}

// What the caller's tensors are to a network of these stages, whose numbers are packed.
template <class S>
void run(const Tensor& x, const std::vector<Stage<S>>& stages, const std::vector<BlockCode>& blocks, const Tensor& out) {
  const Shape in = shape_of(op, "x", x);
  MBN_CHECK(in.height > 0 && in.width > 0, op, ": x: expected a positive height and width, got ", in.height, "x", in.width);
  const std::vector<Step<S>> steps = steps_of(stages, blocks, in);
  const Step<S>& last = steps.back();
  Evaluate<S> p = {in.images, int64_t(steps.size()), steps.data()};
  Call call(op);
  if (steps[0].dense.weight) {
    check_kind(op, "x", x, kDtype<S>);  // any strides
    p.x = static_cast<const S*>(call.read(memory_of(op, "x", x, sizeof(S))));
    for (int i = 0; i < 4; ++i) p.x_strides[i] = x.strides()[size_t(i)];
  } else {
    p.x = activations<S>(call, "x", x, in);
    const int64_t strides[] = {in.channels * in.pixels(), 1, in.width * in.channels, in.channels};
    for (int i = 0; i < 4; ++i) p.x_strides[i] = strides[i];
  }
  p.out = activations_out<S>(call, "out", out, {in.images, last.out_channels, last.out_height, last.out_width});
  if (in.images > 0) kernels_for<S>().evaluation.evaluate(p);
}

char* packed_memory(const Tensor& packed) {
  check_kind(op, "packed", packed, ScalarType::Float);
  return static_cast<char*>(packed.mutable_data_ptr());
}
// Its memory and the output's, apart from each other and from the input's: before anything is written.
template <class S>
std::pair<Memory, Memory> check_written(const Tensor& x, const Tensor& packed, const Places& places, const Tensor& out) {
  const int64_t numbers = places.used / int64_t(sizeof(float));
  check_dense(op, "packed", packed, ScalarType::Float, numbers);
  check_kind(op, "out", out, kDtype<S>);
  const Memory written[] = {memory_of(op, "packed", packed, sizeof(float), numbers), memory_of(op, "out", out, sizeof(S))};
  Call call(op);
  call.read(memory_of(op, "x", x, sizeof(S)));
  call.write(written[0], packed);
  call.write(written[1], out);
  return {written[0], written[1]};
}

// What an evaluation is of, but for its input.
struct Chains {
  std::vector<StageCode> stages;
  std::vector<BlockCode> blocks;
  Tensor packed;
  std::vector<Tensor> params;  // none: what is packed is all there is
  Tensor numbers;              // float64, the stages' eps; of what is packed int64, their widths
};

void evaluate_chains(const Chains& chains, const Tensor& x, int64_t version, const Tensor& out) {
  const double* eps = dense<double>(op, "eps", chains.numbers, int64_t(chains.stages.size()));
  Places places = {packed_memory(chains.packed), kOriginBytes};
  by_dtype(op, "x", x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const std::vector<Stage<S>> described = stages_of<S>(chains.stages, chains.params, places);
    const auto [packed, written] = check_written<S>(x, chains.packed, places, out);
    steps_of(described, chains.blocks, shape_of(op, "x", x));  // refuses what does not fit before anything is written
    refresh(described, chains.params, eps, version, packed_memory(chains.packed), packed, written);
    run(x, described, chains.blocks, out);
  });
}

// The same of what is packed already, whatever has become of the parameters.
void evaluate_packed(const Chains& chains, const Tensor& x, const Tensor& out) {
  const std::vector<StageCode>& codes = chains.stages;
  const std::vector<Widths> all = codes_of<Widths>("widths", chains.numbers);
  MBN_CHECK(all.size() == codes.size(), op, ": widths: expected ", codes.size(), " stages, got ", all.size());
  Places places = {packed_memory(chains.packed), kOriginBytes};
  by_dtype(op, "x", x, [&](auto tag) {
    using S = typename decltype(tag)::type;
    std::vector<Stage<S>> described;
    for (size_t i = 0; i < codes.size(); ++i) {
      const Widths& w = all[i];
      const bool positive = codes[i].conv == kPool || (w.out > 0 && w.in > 0 && (w.squeeze > 0 || !codes[i].gated()));
      MBN_CHECK(positive && w.out <= kMostSize && w.in <= kMostSize && w.squeeze <= kMostSize, op, ": widths: expected positive ones, got others");
      described.push_back(stage_of<S>(codes[i], all[i], places));
    }
    check_written<S>(x, chains.packed, places, out);
    run(x, described, chains.blocks, out);
  });
}

Chains chains_of(std::vector<Tensor> params, const Tensor& stages, const Tensor& numbers, const Tensor& blocks, const Tensor& packed) {
  return {stage_codes(stages), codes_of<BlockCode>("blocks", blocks), packed, std::move(params), numbers};
}
void evaluate(const Tensor& x, std::vector<Tensor> params, const Tensor& stages, const Tensor& eps, const Tensor& blocks, int64_t version,
              const Tensor& packed, const Tensor& out) {
  evaluate_chains(chains_of(std::move(params), stages, eps, blocks, packed), x, version, out);
}

// ---- Held from call to call -------------------------------------------------------------------------------------------------------

// By number: handing hundreds of tensors over at each call takes as long as a small network's first layers. Never destroyed: at the end of a process tensors
// may outlive what frees them.
struct Held {
  std::mutex& mutex = fork_safe_mutex<Held>();
  std::unordered_map<int64_t, std::shared_ptr<const Chains>> chains;
  int64_t next = 1;
};
Held& held() {
  static Held& all = *new Held;
  return all;
}

int64_t evaluate_hold(std::vector<Tensor> params, const Tensor& stages, const Tensor& numbers, const Tensor& blocks, const Tensor& packed) {
  const auto chains = std::make_shared<const Chains>(chains_of(std::move(params), stages, numbers, blocks, packed));
  const std::lock_guard<std::mutex> lock(held().mutex);
  held().chains.emplace(held().next, chains);
  return held().next++;
}

void evaluate_held(const Tensor& x, int64_t number, int64_t version, const Tensor& out) {
  std::shared_ptr<const Chains> chains;
  {
    const std::lock_guard<std::mutex> lock(held().mutex);
    const auto found = held().chains.find(number);
    if (found != held().chains.end()) chains = found->second;
  }
  MBN_CHECK(chains != nullptr, op, ": held: expected the number of chains that are held, got ", number);
  chains->params.empty() ? evaluate_packed(*chains, x, out) : evaluate_chains(*chains, x, version, out);
}

void evaluate_release(int64_t number) {
  std::shared_ptr<const Chains> last;  // freed after the lock is
  const std::lock_guard<std::mutex> lock(held().mutex);
  const auto found = held().chains.find(number);
  if (found == held().chains.end()) return;
  last = std::move(found->second);
  held().chains.erase(found);
}

}  // namespace
}  // namespace evaluation
}  // namespace mbn

STABLE_TORCH_LIBRARY_IMPL(mbn, CPU, m) {
  m.impl("evaluate", TORCH_BOX(&mbn::evaluation::evaluate));
  m.impl("evaluate_size", TORCH_BOX(&mbn::evaluation::evaluate_size));
  m.impl("evaluate_hold", TORCH_BOX(&mbn::evaluation::evaluate_hold));
  m.impl("evaluate_held", TORCH_BOX(&mbn::evaluation::evaluate_held));
}
STABLE_TORCH_LIBRARY_IMPL(mbn, CompositeExplicitAutograd, m) { m.impl("evaluate_release", TORCH_BOX(&mbn::evaluation::evaluate_release)); }
