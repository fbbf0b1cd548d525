// Batch statistics: (mean, M2) of one tile of a stored tensor, and the merge of all tiles' by Chan's rule in a fixed order.
#pragma once

#include "vec.h"

namespace mbn {
namespace MBN_ISA {

// Sums of one vector of channels over the rows of a tile, about an estimate of the mean that is itself the mean of the first rows. So near to the mean
// the difference of the two sums loses nothing: n0 of n rows keep M2 above n0/n of the squares. The tile holds values as stored (see rounded_to).
template <class T>
struct Moments {
  Vec<T> about, sum, square;
};

// kLanes<double> numbers of type T.
template <class T>
struct WidenedOf {
  typedef T type __attribute__((vector_size(kLanes<double> * sizeof(T))));
};
template <class T>
MBN_INLINE Vec<double> load_widened(const T* p) {
  typename WidenedOf<T>::type v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vec<double>);
}
template <class T>
MBN_INLINE void store_narrowed(T* p, Vec<double> v) {
  const auto narrow = __builtin_convertvector(v, typename WidenedOf<T>::type);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
MBN_INLINE void store_narrowed(float* p, double v) { *p = float(v); }
MBN_INLINE void store_narrowed(double* p, double v) { *p = v; }

// Runs f(c, load) for [begin, end): a vector of channels from c on, load(p) being Vec<double>, and one by one at the end, load(p) being double.
template <class F>
MBN_INLINE void for_double_lanes(int64_t begin, int64_t end, const F& f) {
  int64_t c = begin;
  for (; c + kLanes<double> <= end; c += kLanes<double>) f(c, [](const auto* p) { return load_widened(p); });
  for (; c < end; ++c) f(c, [](const auto* p) { return double(*p); });
}

// The tile's mean and M2 for `count` real channels. In double: rounded, the means of a thousand tiles would blur a variance far below their square.
template <class T>
MBN_INLINE void store_moments(const Moments<T>& moments, int64_t rows, double* mean_to, double* m2_to, int count) {
  T about[kLanes<T>], sum[kLanes<T>], square[kLanes<T>];
  store(about, moments.about);
  store(sum, moments.sum);
  store(square, moments.square);
  double mean[kLanes<T>], m2[kLanes<T>];
  for (int i = 0; i < kLanes<T>; i += kLanes<double>) {
    const Vec<double> d = load_widened(sum + i) * (1.0 / double(rows));
    const Vec<double> squares = load_widened(square + i) - load_widened(sum + i) * d;
    store(mean + i, load_widened(about + i) + d);
    store(m2 + i, squares < 0 ? Vec<double>{} : squares);
  }
  __builtin_memcpy(mean_to, mean, size_t(count) * sizeof(double));
  __builtin_memcpy(m2_to, m2, size_t(count) * sizeof(double));
}

// Runs f(begin, end) over parts of [0, channels) where each channel costs `work`; small jobs stay on this thread.
template <class F>
MBN_INLINE void parallel_channels(int64_t channels, int64_t work, const F& f) {
  constexpr int64_t kBlock = 32, kWorthAThread = 32768;
  if (channels * work < kWorthAThread) return f(int64_t{0}, channels);
  parallel_tasks(ceil_div(channels, kBlock), [&](int64_t begin, int64_t end) {
    f(begin * kBlock, smaller(end * kBlock, channels));
  });
}

// mean and biased variance per channel from partials [tiles][mean, M2][channels]; count(tile) says how many rows a tile had.
template <class T, class Count>
MBN_INLINE void merge_moments(int64_t tiles, int64_t channels, const double* partials, const Count& count, T* mean, T* var) {
  Scratch scratch;
  double* rows = take<double>(scratch, tiles);
  double total = 0;
  for (int64_t t = 0; t < tiles; ++t) total += rows[t] = double(count(t));
  const double share = 1 / total;
  parallel_channels(channels, 2 * tiles, [&](int64_t begin, int64_t end) {
    for_double_lanes(begin, end, [&](int64_t c, const auto& load_lanes) {
      const double* p = partials + c;
      decltype(load_lanes(p)) m = {}, q = {};
      for (int64_t t = 0; t < tiles; ++t) m += rows[t] * load_lanes(p + t * 2 * channels);
      m *= share;
      for (int64_t t = 0; t < tiles; ++t) {
        const auto d = load_lanes(p + t * 2 * channels) - m;
        q += load_lanes(p + t * 2 * channels + channels) + rows[t] * d * d;
      }
      store_narrowed(mean + c, m);
      if (var) store_narrowed(var + c, q * share);
    });
  });
}

}  // namespace MBN_ISA
}  // namespace mbn
