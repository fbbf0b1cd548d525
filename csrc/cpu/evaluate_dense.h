// A dense convolution in evaluation: the stem. Rows of the input are copied to lines, channels together and zero outside of the image, and multiplied from there.
#pragma once

#include "depthwise_plan.h"
#include "evaluate_products.h"

namespace mbn {
namespace MBN_ISA {

// An image of any strides, as it comes from outside.
template <class S>
struct Image {
  const S* data;
  int64_t channels, rows, columns;  // strides
};

template <class S>
struct Dense {
  using M = Map<S>;
  const Window& w;
  Layer<S> layer;
  int64_t channels, padded, height, width, out_width;  // padded: channels of a line, whole pairs
  int64_t line, span;
  int64_t runs, run;  // a window is so many runs of so many numbers that lie side by side
};
// Channels of a line: whole pairs.
template <class S>
int64_t dense_channels(int64_t channels) {
  return ceil_div(channels, kPair<Map<S>>) * kPair<Map<S>>;
}
template <class S>
MBN_INLINE Dense<S> dense_of(const Window& w, const FoldedStage<S>& stage, int64_t in_channels, int64_t out_channels, int64_t height, int64_t width,
                             int64_t out_width) {
  const int64_t padded = dense_channels<S>(in_channels);
  Dense<S> d = {w, layer_of<S>(stage, w.kernel_h * w.kernel_w * padded, out_channels), in_channels, padded, height, width, out_width};
  d.line = ((out_width - 1) * w.stride_w + (w.kernel_w - 1) * w.dilation_w + 1) * padded;
  d.span = (w.kernel_h - 1) * w.dilation_h + 1;
  d.runs = w.dilation_w == 1 ? w.kernel_h : w.kernel_h * w.kernel_w;
  d.run = (w.dilation_w == 1 ? w.kernel_w : 1) * padded;
  return d;
}

// Lines of an image, each made once as rows go down.
template <class S>
struct Lines {
  Map<S>* data;
  const Map<S>** runs;
  int64_t next;  // the first row of the padded image that has not come
};
template <class S>
MBN_INLINE Lines<S> take_lines(const Dense<S>& d, Scratch& scratch) {
  return {take<Map<S>>(scratch, d.span * d.line), take<const Map<S>*>(scratch, d.runs), 0};
}

// A number of type S as one of a map.
template <class S>
MBN_INLINE void put_number(Map<S>* to, S number) {
  if constexpr (sizeof(S) == sizeof *to) {
    __builtin_memcpy(static_cast<void*>(to), &number, sizeof number);
  } else {
    const uint32_t bits = uint32_t(number.bits) << 16;
    __builtin_memcpy(static_cast<void*>(to), &bits, sizeof bits);
  }
}

template <class S>
static void make_line(const Dense<S>& d, const Image<S>& image, int64_t row, Map<S>* line) {
  using M = Map<S>;
  const int64_t left = d.w.pad_left, width = larger<int64_t>(0, smaller(d.width, d.line / d.padded - left));
  const auto clear = [](M* from, const M* to) { __builtin_memset(static_cast<void*>(from), 0, size_t(to - from) * sizeof(M)); };
  if (row < 0 || row >= d.height) return clear(line, line + d.line);
  const S* from = image.data + row * image.rows;
  M *to = line + left * d.padded, *end = to + width * d.padded;
  clear(line, to);
  clear(end, line + d.line);
  if (sizeof(S) == sizeof(M) && image.channels == 1 && image.columns == d.channels && d.padded == d.channels) {
    __builtin_memcpy(static_cast<void*>(to), from, size_t(width * d.channels) * sizeof(M));
    return;
  }
  if constexpr (kPair<M> == 2) {
    if (d.channels == 3) {  // three numbers and a zero in one piece
      for (int64_t c = 0; c < width; ++c) {
        const S* pixel = from + c * image.columns;
        const uint64_t bits = pixel[0].bits | uint64_t(pixel[image.channels].bits) << 16 | uint64_t(pixel[2 * image.channels].bits) << 32;
        __builtin_memcpy(static_cast<void*>(to + c * 4), &bits, sizeof bits);
      }
      return;
    }
  }
  const auto pixels = [&](auto count) {
    for (int64_t c = 0; c < width; ++c) {
      for (int i = 0; i < count; ++i) put_number<S>(to + c * d.padded + i, from[i * image.channels + c * image.columns]);
    }
  };
  if (d.padded > d.channels) clear(to, end);
  if (d.channels == 3) return pixels(LanesTag<3>{});
  pixels(int(d.channels));
}

// Vectors [first, first + vectors) of columns, in one panel, of row y of the output: vectors `vector_step` apart, pixels Step.
template <int Step, class S, class To>
static void dense_row(const Dense<S>& d, const Image<S>& image, Lines<S>& lines, int64_t y, int64_t first, int vectors, To* to, int64_t vector_step) {
  using M = Map<S>;
  constexpr int64_t L = kLanes<Accumulate<S>>;
  const Window& w = d.w;
  const int64_t top = y * w.stride_h;  // in the padded image
  for (lines.next = larger(lines.next, top); lines.next < top + d.span; ++lines.next) {
    make_line(d, image, lines.next - w.pad_top, lines.data + lines.next % d.span * d.line);
  }
  const int64_t across = d.runs / w.kernel_h;
  for (int64_t i = 0; i < d.runs; ++i) {
    lines.runs[i] = lines.data + (top + i / across * w.dilation_h) % d.span * d.line + i % across * w.dilation_w * d.padded;
  }
  const int64_t panel = first / kPanelVectors, within = first % kPanelVectors, step = w.stride_w * d.padded;
  const M* weight = d.layer.weight + panel * weight_panel_size<M>(d.layer.depth) + within * L * kPair<M>;
  DenseTile<M, To> tile = {lines.runs, 0, step, d.runs, d.run / kPair<M>,
                           {nullptr, 0, 0, weight, 0, d.layer.shift + first * L, d.layer.act, to, vector_step, kEvenRows<Step>.at, nullptr, nullptr}};
  const auto at = [&](int64_t column) {
    tile.at = column * step;
    tile.product.to = to + column * Step;
  };
  if (d.out_width < kDenseRows) {
    for (int64_t c = 0; c < d.out_width; ++c) at(c), dense_rows_of<M, To, 1>(tile, vectors);
  } else {
    // The last tile makes some pixels again.
    for (int64_t c = 0; c < d.out_width; c += kDenseRows) at(smaller<int64_t>(c, d.out_width - kDenseRows)), dense_rows_of<M, To, kDenseRows>(tile, vectors);
  }
  if (!finishes_later(d.layer.act)) return;
  for (int64_t c = 0; c < d.out_width; ++c) {
    at(c);
    finish_rows(tile.product, 1, vectors, static_cast<const To*>(nullptr));
  }
}

}  // namespace MBN_ISA
}  // namespace mbn
