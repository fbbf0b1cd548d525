// Pointwise convolution as a matrix product over rows = images * pixels: the deferred operand is evaluated once per element into panels that
// stay in the second-level cache, statistics and sums are taken where a tile is written.
#pragma once

#include "panels.h"
#include "statistics.h"

namespace mbn {
namespace MBN_ISA {

// Of the vectors of one panel, over a block of rows.
template <class T>
struct PanelMoments {
  Moments<T> at[kWideVectors];
};

// Adds a tile from its registers.
template <class S, int R, int NV>
MBN_INLINE void add_moments(PanelMoments<Accumulate<S>>& panel, const Tile<Accumulate<S>, R, NV>& acc, bool first) {
  using T = Accumulate<S>;
  MBN_UNROLL
  for (int v = 0; v < NV; ++v) {
    Moments<T>& m = panel.at[v];
    // Four chains of additions each: one would wait for itself.
    Vec<T> sum[4] = {}, square[4] = {};
    if (first) {
      MBN_UNROLL
      for (int r = 0; r < R; ++r) sum[r % 4] += rounded_to<S>(acc.at[r][v]);
      m.about = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * (T(1) / R);
      m.sum = m.square = sum[0] = sum[1] = sum[2] = sum[3] = Vec<T>{};
    }
    const Vec<T> about = m.about;
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<T> d = rounded_to<S>(acc.at[r][v]) - about;
      sum[r % 4] += d;
      square[r % 4] += d * d;
    }
    m.sum += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    m.square += (square[0] + square[1]) + (square[2] + square[3]);
  }
}

template <class S>
struct ForwardTile {
  using T = Accumulate<S>;
  const T *left, *right;
  int64_t stride, depth, channels;
  S* y;  // the tile's first row and channel
  int last;  // real channels of the last vector
  PanelMoments<T>* moments;  // null: not wanted
  bool first;                // of its block and panel
  bool streamed;
};

template <class S, int R, int NV>
static __attribute__((noinline)) void forward_tile(const ForwardTile<S>& t) {
  using T = Accumulate<S>;
  if (!t.streamed) prefetch_tile(t.y, 1, R, 0, t.channels, NV * kLanes<T>);
  const Tile<T, R, NV> acc = product<T, R, NV, NV * kLanes<T>>(t.left, t.stride, t.right, t.depth);
  MBN_UNROLL
  for (int r = 0; r < R; ++r) {
    S* y = t.y + r * t.channels;
    MBN_UNROLL
    for (int v = 0; v + 1 < NV; ++v) store_or_stream(y + v * kLanes<T>, acc.at[r][v], LanesTag<kLanes<T>>{}, t.streamed);
    store_or_stream(y + (NV - 1) * kLanes<T>, acc.at[r][NV - 1], t.last, t.streamed);
  }
  if (t.moments) add_moments<S, R, NV>(*t.moments, acc, t.first);
}

template <class S>
static void pointwise_forward(const PointwiseForward<S>& p) {
  using T = Accumulate<S>;
  const int64_t in = p.in_channels, out = p.out_channels;
  const Blocks blocks = split_rows(p.images, p.pixels, false, kTileRows);
  const WideColumns<T> columns = wide_columns<T>(out);
  Scratch scratch;
  const T* weight = pack_weight<true, S>(scratch, p.weight, out, in, columns);
  const bool streamed = streams(p.y, out, p.images * p.pixels * out);
  double* moments = p.mean ? take<double>(scratch, blocks.count * 2 * out) : nullptr;

  parallel_tasks(blocks.count, [&](int64_t first, int64_t last) {
    Scratch local;
    const LeftPanels<T> value = take_left<T>(local, kBlockRows, in);
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = blocks.begin(b), rows = blocks.begin(b + 1) - begin;
      value_panels(value, p.u, begin, begin + rows, p.pixels, in);
      Ahead ahead = {};
      prefetch_rows(ahead.ranges[0], p.u.y, begin + rows, b + 1 < last ? blocks.begin(b + 2) : 0, in,
                    columns.count * ceil_div(rows, kTileRows));
      for (int64_t j = 0; j < columns.count; ++j) {
        PanelMoments<T> panel;
        const int vectors = columns.vectors(j), real = columns.last(j);
        const int64_t c = columns.begin(j);
        for_tiles(rows, tile_rows(vectors), [&](int64_t row, int height) {
          const ForwardTile<S> tile = {value.data + row * kPanel<T>, weight + c * in, value.stride, in, out,
                                       p.y + (begin + row) * out + c, real, moments ? &panel : nullptr, row == 0, streamed};
          prefetch_step(ahead);
          with_wide_tile(height, vectors, [&](auto t) { forward_tile<S, t.rows, t.vectors>(tile); });
        });
        if (moments == nullptr) continue;
        for (int v = 0; v < vectors; ++v) {
          double* to = moments + b * 2 * out + c + v * kLanes<T>;
          store_moments(panel.at[v], rows, to, to + out, v + 1 < vectors ? kLanes<T> : real);
        }
      }
    }
    if (streamed) end_streams();
  });
  if (moments) {
    merge_moments(blocks.count, out, moments, [&](int64_t b) { return blocks.begin(b + 1) - blocks.begin(b); }, p.mean, p.var);
  }
}

}  // namespace MBN_ISA
}  // namespace mbn
