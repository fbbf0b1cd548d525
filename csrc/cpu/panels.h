// The operands of a pointwise product: deferred tensors, evaluated once per element on their way into panels.
#pragma once

#include "deferred.h"
#include "gemm.h"

namespace mbn {
namespace MBN_ISA {

// Where a vector of channels begins in a block's first row, and how far rows are apart.
template <class T>
struct Place {
  T* at;
  int64_t step;
};

// A block of rows as the left operand, in panels of kPanel columns. The stride keeps the same tile of neighbouring panels out of each other's
// cache sets.
template <class T>
struct LeftPanels {
  using Number = T;
  T* data;
  int64_t stride;
  Place<T> place(int64_t c) const { return {data + c / kPanel<T> * stride + c % kPanel<T>, kPanel<T>}; }
};
template <class T>
MBN_INLINE LeftPanels<T> take_left(Scratch& scratch, int64_t rows, int64_t channels) {
  const int64_t stride = rows * kPanel<T> + kPanel<T>;
  return {take<T>(scratch, panel_count<T>(channels) * stride), stride};
}

// A block of `depth` rows as the right operand, in wide columns.
template <class T>
struct RightPanels {
  using Number = T;
  T* data;
  WideColumns<T> columns;
  int64_t depth;
  Place<T> place(int64_t c) const {
    const int64_t j = columns.panel_of(c / kLanes<T>), begin = columns.begin(j);
    return {data + begin * depth + c - begin, columns.step(j)};
  }
};

// Calls f(image, first row, last row) for the parts of [begin, end) that lie in one image.
template <class F>
MBN_INLINE void for_images(int64_t begin, int64_t end, int64_t pixels, const F& f) {
  for (int64_t row = begin; row < end;) {
    const int64_t n = row / pixels, last = smaller(end, (n + 1) * pixels);
    f(n, row, last);
    row = last;
  }
}

// Of the rows that begin at element `offset` of an array of `size`, `channels` apart: how many can be read a whole vector at a time.
template <class T>
MBN_INLINE int64_t whole_rows(int64_t rows, int64_t offset, int64_t channels, int64_t size) {
  const int64_t room = size - offset - kLanes<T>;
  return room < 0 ? 0 : smaller(rows, room / channels + 1);
}

// Fills rows [begin, end) of a block's panels, `begin` being row `at` of the block: strip(to, step, row, rows, c, count) writes rows x one vector of
// channels. As many rows at a time as the first-level cache holds: memory is read in order, and the lanes are loaded once for all of them.
template <class Panels, class F>
MBN_INLINE void fill_panels(const Panels& panels, int64_t at, int64_t begin, int64_t end, int64_t channels, const F& strip) {
  using T = typename Panels::Number;
  const int64_t strip_rows = larger<int64_t>(8, 4096 / larger<int64_t>(1, channels));
  for (int64_t row = begin; row < end; row += strip_rows) {
    const int64_t rows = smaller(strip_rows, end - row);
    for (int64_t c = 0; c < channels; c += kLanes<T>) {
      const Place<T> place = panels.place(c);
      strip(place.at + (at + row - begin) * place.step, place.step, row, rows, c, int(smaller<int64_t>(kLanes<T>, channels - c)));
    }
  }
}

template <class S, class Panels>
static void value_panels(const Panels& panels, const Value<S>& u, int64_t begin, int64_t end, int64_t pixels,
                         int64_t channels) {
  using T = Accumulate<S>;
  if (u.scale == nullptr && u.gate == nullptr && u.act == Act::identity) {
    return fill_panels(panels, 0, begin, end, channels, [&](T* to, int64_t step, int64_t row, int64_t rows, int64_t c, int count) {
      const S* y = u.y + row * channels + c;
      const int64_t whole = whole_rows<T>(rows, row * channels + c, channels, end * channels);
      for (int64_t r = 0; r < whole; ++r) store(to + r * step, load(y + r * channels));
      for (int64_t r = whole; r < rows; ++r) store(to + r * step, load(y + r * channels, count));
    });
  }
  with_act(u.act, [&](auto act) {
    for_images(begin, end, u.gate ? pixels : end, [&](int64_t n, int64_t first, int64_t last) {
      fill_panels(panels, first - begin, first, last, channels, [&](T* to, int64_t step, int64_t row, int64_t rows, int64_t c, int count) {
        const ValueLanes<S> lanes = value_lanes(u, n, channels, c, count);
        const S* y = u.y + row * channels + c;
        const int64_t whole = whole_rows<T>(rows, row * channels + c, channels, end * channels);
        for (int64_t r = 0; r < whole; ++r) store(to + r * step, value_of<act.act>(lanes, load(y + r * channels)));
        for (int64_t r = whole; r < rows; ++r) {
          store(to + r * step, value_of<act.act>(lanes, load(y + r * channels, count)));
        }
      });
    });
  });
}

template <class S>
MBN_INLINE bool reads_output(const Gradient<S>& g) {
  return g.of.act != Act::identity || g.b != nullptr;
}

template <class S>
static void gradient_panels(const LeftPanels<Accumulate<S>>& panels, const Gradient<S>& g, int64_t begin, int64_t end, int64_t pixels,
                            int64_t channels) {
  using T = Accumulate<S>;
  const bool reads_y = reads_output(g);
  with_act(g.of.act, [&](auto act) {
    for_images(begin, end, g.of.gate || g.q ? pixels : end, [&](int64_t n, int64_t first, int64_t last) {
      fill_panels(panels, first - begin, first, last, channels, [&](T* to, int64_t step, int64_t row, int64_t rows, int64_t c, int count) {
        const GradientLanes<S> lanes = gradient_lanes(g, n, channels, c, count);
        const S* dv = g.dv + row * channels + c;
        const S* y = g.of.y + row * channels + c;
        const int64_t whole = whole_rows<T>(rows, row * channels + c, channels, end * channels);
        const auto span = [&](int64_t from, int64_t until, int lanes_read) {
          if (reads_y) {
            for (int64_t r = from; r < until; ++r) {
              const Vec<T> v = load(dv + r * channels, lanes_read);
              store(to + r * step, gradient_of<act.act>(lanes, v, load(y + r * channels, lanes_read)));
            }
          } else {
            for (int64_t r = from; r < until; ++r) {
              store(to + r * step, gradient_of<act.act>(lanes, load(dv + r * channels, lanes_read), Vec<T>{}));
            }
          }
        };
        span(0, whole, kLanes<T>);
        span(whole, rows, count);
      });
    });
  });
}

}  // namespace MBN_ISA
}  // namespace mbn
