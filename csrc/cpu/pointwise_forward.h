// Pointwise convolution as a matrix product over rows = images * pixels: the deferred operand is evaluated once per element into panels that
// stay in the second-level cache, statistics and sums are taken where a tile is written.
#pragma once

#include "panels.h"
#include "statistics.h"

namespace mbn {
namespace MBN_ISA {

// Sums over a block of the deviations from `about`, the mean of its first tile, for the channels of one panel. So near to the mean a difference
// of the two sums loses nothing: the first tile alone keeps M2 above a tenth of the squares.
template <class T>
struct BlockMoments {
  Vec<T> about[kWideVectors], sum[kWideVectors], square[kWideVectors];
};

// Adds a tile from its registers.
template <class S, int R, int NV>
MBN_INLINE void add_moments(BlockMoments<Accumulate<S>>& block, const Tile<Accumulate<S>, R, NV>& acc, bool first) {
  using T = Accumulate<S>;
  MBN_UNROLL
  for (int v = 0; v < NV; ++v) {
    // Four chains of additions each: one would wait for itself.
    Vec<T> sum[4] = {}, square[4] = {};
    if (first) {
      MBN_UNROLL
      for (int r = 0; r < R; ++r) sum[r % 4] += rounded_to<S>(acc.at[r][v]);
      block.about[v] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * (T(1) / R);
      block.sum[v] = block.square[v] = sum[0] = sum[1] = sum[2] = sum[3] = Vec<T>{};
    }
    const Vec<T> about = block.about[v];
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<T> d = rounded_to<S>(acc.at[r][v]) - about;
      sum[r % 4] += d;
      square[r % 4] += d * d;
    }
    block.sum[v] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    block.square[v] += (square[0] + square[1]) + (square[2] + square[3]);
  }
}

// One vector's mean and M2 over the block's rows, in double: rounded, the means of a thousand blocks would blur a variance far below their square.
template <class T>
MBN_INLINE void store_moments(const BlockMoments<T>& block, int v, int64_t rows, double* mean_to, double* m2_to, int count) {
  T about[kLanes<T>], sum[kLanes<T>], square[kLanes<T>];
  store(about, block.about[v]);
  store(sum, block.sum[v]);
  store(square, block.square[v]);
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

template <class S>
struct ForwardTile {
  using T = Accumulate<S>;
  const T *left, *right;
  int64_t stride, depth, channels;
  S* y;  // the tile's first row and channel
  int last;  // real channels of the last vector
  BlockMoments<T>* moments;  // null: not wanted
  bool first;                // of its block and panel
};

template <class S, int R, int NV>
static __attribute__((noinline)) void forward_tile(const ForwardTile<S>& t) {
  using T = Accumulate<S>;
  const Tile<T, R, NV> acc = product<T, R, NV, NV * kLanes<T>>(t.left, t.stride, t.right, t.depth);
  MBN_UNROLL
  for (int r = 0; r < R; ++r) {
    S* y = t.y + r * t.channels;
    MBN_UNROLL
    for (int v = 0; v + 1 < NV; ++v) store(y + v * kLanes<T>, acc.at[r][v]);
    store(y + (NV - 1) * kLanes<T>, acc.at[r][NV - 1], t.last);
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
        BlockMoments<T> block;
        const int vectors = columns.vectors(j), real = columns.last(j);
        const int64_t c = columns.begin(j);
        for_tiles(rows, tile_rows(vectors), [&](int64_t row, int height) {
          const ForwardTile<S> tile = {value.data + row * kPanel<T>, weight + c * in, value.stride, in, out,
                                       p.y + (begin + row) * out + c, real, moments ? &block : nullptr, row == 0};
          prefetch_step(ahead);
          with_wide_tile(height, vectors, [&](auto t) { forward_tile<S, t.rows, t.vectors>(tile); });
        });
        if (moments == nullptr) continue;
        for (int v = 0; v < vectors; ++v) {
          double* to = moments + b * 2 * out + c + v * kLanes<T>;
          store_moments(block, v, rows, to, to + out, v + 1 < vectors ? kLanes<T> : real);
        }
      }
    }
  });
  if (moments) {
    merge_moments(blocks.count, out, moments, [&](int64_t b) { return blocks.begin(b + 1) - blocks.begin(b); }, p.mean, p.var);
  }
}

}  // namespace MBN_ISA
}  // namespace mbn
