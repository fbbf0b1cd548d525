// Every kernel for one storage type: MBN_STORAGE, which the including file defines.
#include "depthwise_backward.cuh"
#include "depthwise_forward.cuh"
#include "inverted_residual.cuh"
#include "launch.cuh"

namespace mbn {

// Calls f(window size, stride), both as integral constants.
template <int N>
struct Number {
  static constexpr int value = N;
};
template <int K, class F>
static void with_stride(int stride, const F& f) {
  stride == 1 ? f(Number<K>{}, Number<1>{}) : f(Number<K>{}, Number<2>{});
}
template <class F>
static void with_window(int kernel, int stride, const F& f) {
  kernel == 3 ? with_stride<3>(stride, f) : kernel == 5 ? with_stride<5>(stride, f) : with_stride<7>(stride, f);
}
#if !defined(MBN_NO_BLOCKS)
template <class F>
static void with_block(int kernel, int stride, const F& f) {
  if (kernel == 1) return f(Number<1>{}, Number<1>{});  // no window: a gate
  kernel == 3 ? with_stride<3>(stride, f) : with_stride<5>(stride, f);
}
#endif

// A block for each slice of channels of each group of units.
static Launch depthwise_launch(const Map& map, const Share& share, int vector, size_t shared, void* stream) {
  const int groups = divide_up(map.images, share.span) * share.parts;
  const int threads = divide_up(share.vectors * (vector / 2) * share.groups, kWarp) * kWarp;
  return {groups * share.slices, threads, shared, stream};
}

template <>
void run_depthwise_forward<MBN_STORAGE>(const DepthwiseForward& p, int kernel, int stride, void* stream) {
  with_window(kernel, stride, [&](auto k, auto s) {
    constexpr int K = decltype(k)::value, STRIDE = decltype(s)::value;
    const size_t shared = depthwise_forward_shared<MBN_STORAGE, K, STRIDE>(p.share);
    launch("depthwise_forward", &depthwise_forward<MBN_STORAGE, K, STRIDE>, p,
           depthwise_launch(p.map, p.share, kVector<MBN_STORAGE>, shared, stream));
  });
}

template <>
void run_depthwise_backward<MBN_STORAGE>(const DepthwiseBackward& p, int kernel, int stride, void* stream) {
  with_window(kernel, stride, [&](auto k, auto s) {
    constexpr int K = decltype(k)::value, STRIDE = decltype(s)::value;
    const size_t shared = BackwardMemory<MBN_STORAGE, K, STRIDE>(p).end;
    launch("depthwise_backward", &depthwise_backward<MBN_STORAGE, K, STRIDE>, p,
           depthwise_launch(p.map, p.share, kVector<MBN_STORAGE>, shared, stream));
  });
}

template <>
size_t depthwise_shared<MBN_STORAGE>(const Share& share, int kernel, int stride, bool backward) {
  DepthwiseBackward p{};
  p.share = share;
  static float some;
  p.g.of.y = p.dweight = &some;  // everything is read
  size_t bytes = 0;
  with_window(kernel, stride, [&](auto k, auto s) {
    constexpr int K = decltype(k)::value, STRIDE = decltype(s)::value;
    bytes = backward ? BackwardMemory<MBN_STORAGE, K, STRIDE>(p).end : depthwise_forward_shared<MBN_STORAGE, K, STRIDE>(share);
  });
  return bytes;
}

#if !defined(MBN_NO_BLOCKS)
template <>
void run_inverted_residual<MBN_STORAGE>(const InvertedResidual& p, int kernel, int stride, void* stream) {
  with_block(kernel, stride, [&](auto k, auto s) {
    constexpr int K = decltype(k)::value, STRIDE = decltype(s)::value;
    const size_t shared = size_t(BlockMemory(p, K, STRIDE).end);
    const int blocks = p.map.images * p.tiles_down * p.tiles_across;
    launch("inverted_residual", &inverted_residual<MBN_STORAGE, K, STRIDE>, p, {blocks, kBlockThreads, shared, stream});
  });
}
#endif

}  // namespace mbn
