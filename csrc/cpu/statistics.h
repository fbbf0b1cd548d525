// Batch statistics: (mean, M2) of one tile of a stored tensor, and the merge of all tiles' by Chan's rule in a fixed order.
#pragma once

#include "vec.h"

namespace mbn {
namespace MBN_ISA {

// The moments of one vector of channels over the rows of a tile; the tile holds values as stored (see rounded_to).
template <class T>
struct Moments {
  Vec<T> mean, m2;
};

// The second pass: `about` is the mean as the first pass found it. Its rounding error is corrected by the sum of the deviations.
template <class T>
MBN_INLINE Moments<T> moments_about(Vec<T> about, const T* tile, int64_t rows, int64_t stride) {
  Vec<T> d0 = {}, d1 = {}, q0 = {}, q1 = {};
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    const Vec<T> a = load(tile + r * stride) - about, b = load(tile + (r + 1) * stride) - about;
    d0 += a;
    d1 += b;
    q0 += a * a;
    q1 += b * b;
  }
  if (r < rows) {
    const Vec<T> a = load(tile + r * stride) - about;
    d0 += a;
    q0 += a * a;
  }
  d0 += d1;
  const Vec<T> correction = d0 / T(rows);
  const Vec<T> m2 = (q0 + q1) - d0 * correction;
  return {about + correction, m2 < 0 ? Vec<T>{} : m2};
}

// Both passes over tile[row*stride + lane], rows > 0.
template <class T>
MBN_INLINE Moments<T> moments_of(const T* tile, int64_t rows, int64_t stride) {
  Vec<T> s0 = {}, s1 = {};
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    s0 += load(tile + r * stride);
    s1 += load(tile + (r + 1) * stride);
  }
  if (r < rows) s0 += load(tile + r * stride);
  return moments_about<T>((s0 + s1) / T(rows), tile, rows, stride);
}

// The same in one pass, about an estimate of the mean that is itself the mean of n0 of the n values: the cancellation in `finish` then costs at most
// n/n0 units of rounding.
template <class T>
struct ShiftedMoments {
  Vec<T> shift, sum, square;
};
template <class T>
MBN_INLINE Moments<T> finish(const ShiftedMoments<T>& m, T rows) {
  const Vec<T> offset = m.sum / rows, m2 = m.square - m.sum * offset;
  return {m.shift + offset, m2 < 0 ? Vec<T>{} : m2};
}

// Partials are [tiles][2][channels]; this writes those of one tile for the channels that begin at c, `count` of them real.
template <class T>
MBN_INLINE void store_moments(const Moments<T>& m, T* partials, int64_t tile, int64_t channels, int64_t c, int count) {
  T* p = partials + tile * 2 * channels + c;
  store(p, m.mean, count);
  store(p + channels, m.m2, count);
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

// mean and biased variance per channel from the partials of all tiles; count(tile) says how many rows a tile had. In double: thousands of
// tiles merged in float would lose the digits that the tiles have kept. Partials are float or double, whatever T is.
template <class Partial, class T, class Count>
MBN_INLINE void merge_moments(int64_t tiles, int64_t channels, const Partial* partials, const Count& count, T* mean, T* var) {
  Scratch scratch;
  double* rows = take<double>(scratch, tiles);
  double total = 0;
  for (int64_t t = 0; t < tiles; ++t) total += rows[t] = double(count(t));
  const double share = 1 / total;
  parallel_channels(channels, 2 * tiles, [&](int64_t begin, int64_t end) {
    for_double_lanes(begin, end, [&](int64_t c, const auto& load_lanes) {
      const Partial* p = partials + c;
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
