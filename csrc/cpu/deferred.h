// Deferred tensors as the kernels load them: the affine map, activation and gate of a Value and the gradient of a raw output, one vector
// of channels at a time.
#pragma once

#include "vec.h"

namespace mbn {
namespace MBN_ISA {

// Fetches the cache lines that a tile will be stored to while the tile is still being made: `width` numbers of each pixel.
template <class S>
MBN_INLINE void prefetch_tile(S* to, int64_t rows, int64_t columns, int64_t row_stride, int64_t pixel_stride, int64_t width = 1) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(to + r * row_stride + c * pixel_stride + i, 1);
    }
  }
}

// How many channels a vector holds, known to the compiler where it is a whole or half vector.
template <int N>
struct LanesTag {
  constexpr operator int() const { return N; }
};
template <class T, class F>
MBN_INLINE void with_lanes(int count, const F& f) {
  constexpr int L = kLanes<T>;
  if (count >= L) return f(LanesTag<L>{});
  if (count == L / 2) return f(LanesTag<L / 2>{});
  return f(count);
}

template <class T>
MBN_INLINE Vec<T> load_or(const T* p, int64_t offset, int count, T otherwise) {
  return p ? load(p + offset, count) : broadcast(otherwise);
}

// The per-channel numbers of a Value for the vector of channels that begins at c, in image n. `count` channels are real; the others load as zero.
template <class S>
struct ValueLanes {
  Vec<Accumulate<S>> scale, shift, gate;
};
template <class S>
MBN_INLINE ValueLanes<S> value_lanes(const Value<S>& u, int64_t n, int64_t channels, int64_t c, int count) {
  using T = Accumulate<S>;
  return {load_or<T>(u.scale, c, count, 1), load_or<T>(u.shift, c, count, 0), load_or<T>(u.gate, n * channels + c, count, 1)};
}
template <Act A, class S>
MBN_INLINE Vec<Accumulate<S>> value_of(const ValueLanes<S>& l, Vec<Accumulate<S>> y) {
  return activate<A>(l.scale * y + l.shift) * l.gate;
}

// The same for a Gradient.
template <class S>
struct GradientLanes {
  ValueLanes<S> of;
  Vec<Accumulate<S>> q, a, b, c;
  bool affine;  // b and c are given; without them b*y must not be formed: 0 * Inf is NaN
};
template <class S>
MBN_INLINE GradientLanes<S> gradient_lanes(const Gradient<S>& g, int64_t n, int64_t channels, int64_t c, int count) {
  using T = Accumulate<S>;
  return {value_lanes(g.of, n, channels, c, count), load_or<T>(g.q, n * channels + c, count, 0), load_or<T>(g.a, c, count, 1),
          load_or<T>(g.b, c, count, 0), load_or<T>(g.c, c, count, 0), g.b != nullptr};
}
// y is ignored (pass zero) where the activation is the identity and g.b is null.
template <Act A, class S>
MBN_INLINE Vec<Accumulate<S>> gradient_of(const GradientLanes<S>& l, Vec<Accumulate<S>> dv, Vec<Accumulate<S>> y) {
  const Vec<Accumulate<S>> h = (dv * l.of.gate + l.q) * activate_grad<A>(l.of.scale * y + l.of.shift);
  return l.affine ? l.a * h + l.b * y + l.c : l.a * h;
}

}  // namespace MBN_ISA
}  // namespace mbn
