// The backward of a pointwise convolution in one pass over its rows: input gradient, sums for the stage before, weight gradient.
#pragma once

#include "panels.h"
#include "sums.h"

namespace mbn {
namespace MBN_ISA {

template <class S>
struct InputTile {
  using T = Accumulate<S>;
  const T *left, *right;
  int64_t stride, depth, channels;
  const S* residual;
  const S* residual_end;
  S* du;
  int last;  // real channels of the last vector
};

template <class S, int R, int NV>
static __attribute__((noinline)) void input_tile(const InputTile<S>& t) {
  using T = Accumulate<S>;
  prefetch_tile(t.du, 1, R, 0, t.channels, NV * kLanes<T>);
  Tile<T, R, NV> acc = product<T, R, NV, NV * kLanes<T>>(t.left, t.stride, t.right, t.depth);
  if (t.residual) {
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      const S* residual = t.residual + r * t.channels;
      MBN_UNROLL
      for (int v = 0; v + 1 < NV; ++v) acc.at[r][v] += load(residual + v * kLanes<T>);
      acc.at[r][NV - 1] += load_within(residual + (NV - 1) * kLanes<T>, t.last, t.residual_end);
    }
  }
  MBN_UNROLL
  for (int r = 0; r < R; ++r) {
    S* du = t.du + r * t.channels;
    MBN_UNROLL
    for (int v = 0; v + 1 < NV; ++v) store(du + v * kLanes<T>, acc.at[r][v]);
    store(du + (NV - 1) * kLanes<T>, acc.at[r][NV - 1], t.last);
  }
}

// The sums of rows [begin, end) of du, which a tile has just stored, for one vector of channels: partial `to` of `partials`.
template <class S>
static void sum_rows(const PointwiseBackward<S>& p, int64_t begin, int64_t end, int64_t c, int count, Accumulate<S>* partials,
                     int64_t to) {
  using T = Accumulate<S>;
  const int64_t channels = p.in_channels;
  with_act(p.u.act, [&](auto act) {
    with_quantities(p.sums, p.u, [&](auto q) {
      const SumLanes<S> lanes = sum_lanes(p.u, p.sums, c, count);
      SumVectors<S, q.count> sum = {};
      const S* du = p.du + begin * channels + c;
      const S* y = p.u.y + begin * channels + c;
      // Not beyond the rows of this task, which others may be writing.
      const int64_t whole = whole_rows<T>(end - begin, c, channels, (end - begin) * channels);
      for (int64_t r = 0; r < whole; ++r) accumulate<act.act>(sum, lanes, load(du + r * channels), load(y + r * channels));
      for (int64_t r = whole; r < end - begin; ++r) {
        accumulate<act.act>(sum, lanes, load(du + r * channels, count), load(y + r * channels, count));
      }
      store_sums(sum, lanes, partials, to, channels, c, count);
    });
  });
}

// du of one block, and its sums.
template <class S>
static void input_block(const PointwiseBackward<S>& p, const Blocks& blocks, int64_t b, const LeftPanels<Accumulate<S>>& gradient,
                        const Accumulate<S>* weight, Accumulate<S>* partials, Ahead& ahead) {
  using T = Accumulate<S>;
  const int64_t in = p.in_channels, out = p.out_channels, begin = blocks.begin(b), end = blocks.begin(b + 1);
  const WideColumns<T> columns = wide_columns<T>(in);
  for (int64_t j = 0; j < columns.count; ++j) {
    const int vectors = columns.vectors(j), real = columns.last(j);
    const int64_t c = columns.begin(j);
    for_tiles(end - begin, tile_rows(vectors), [&](int64_t row, int height) {
      const int64_t offset = (begin + row) * in + c;
      const InputTile<S> tile = {gradient.data + row * kPanel<T>, weight + c * out, gradient.stride, out, in,
                                 p.residual ? p.residual + offset : nullptr,
                                 p.residual ? p.residual + p.images * p.pixels * in : nullptr, p.du + offset, real};
      prefetch_step(ahead);
      with_wide_tile(height, vectors, [&](auto t) { input_tile<S, t.rows, t.vectors>(tile); });
    });
    if (partials == nullptr) continue;
    for (int v = 0; v < vectors; ++v) {
      const int64_t cv = c + v * kLanes<T>;
      const int count = v + 1 < vectors ? kLanes<T> : real;
      if (p.u.gate == nullptr || blocks.parts > 0) {
        sum_rows(p, begin, end, cv, count, partials, b);
      } else {
        for_images(begin, end, p.pixels, [&](int64_t n, int64_t from, int64_t to) { sum_rows(p, from, to, cv, count, partials, n); });
      }
    }
  }
}

template <class T>
struct WeightTile {
  const T *left, *right;
  int64_t depth;
  T* sum;      // rows as wide as the panel
  bool first;  // nothing has been summed yet
};

template <class T, int R, int NV>
static __attribute__((noinline)) void weight_tile(const WeightTile<T>& t) {
  constexpr int step = NV * kLanes<T>;
  Tile<T, R, NV> acc = {};
  if (!t.first) {
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      MBN_UNROLL
      for (int v = 0; v < NV; ++v) acc.at[r][v] = load(t.sum + r * step + v * kLanes<T>);
    }
  }
  multiply<1, kPanel<T>, step>(acc, t.left, t.right, t.depth);
  MBN_UNROLL
  for (int r = 0; r < R; ++r) {
    MBN_UNROLL
    for (int v = 0; v < NV; ++v) store(t.sum + r * step + v * kLanes<T>, acc.at[r][v]);
  }
}

// sum += gradient^T value over the rows of a block: [out] rows of each of value's panels.
template <class T>
static void weight_block(const LeftPanels<T>& gradient, const RightPanels<T>& value, int64_t out, T* sum, bool first, Ahead& ahead) {
  const WideColumns<T>& columns = value.columns;
  for (int64_t o = 0; o < out; o += kPanel<T>) {
    for (int64_t j = 0; j < columns.count; ++j) {
      const int vectors = columns.vectors(j);
      const int64_t c = columns.begin(j), step = columns.step(j);
      for_tiles(smaller<int64_t>(kPanel<T>, out - o), tile_rows(vectors), [&](int64_t row, int height) {
        const WeightTile<T> tile = {gradient.data + o / kPanel<T> * gradient.stride + row, value.data + c * value.depth, value.depth,
                                    sum + c * out + (o + row) * step, first};
        prefetch_step(ahead);
        with_wide_tile(height, vectors, [&](auto t) { weight_tile<T, t.rows, t.vectors>(tile); });
      });
    }
  }
}

// dweight [out][in] from the chunks' sums, in the chunks' order.
template <class T>
static void merge_weight(int64_t chunks, const WideColumns<T>& columns, int64_t out, const T* partials, int64_t size, T* dweight) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t j = 0; j < columns.count; ++j) {
      const int vectors = columns.vectors(j), real = columns.last(j);
      const int64_t c = columns.begin(j), step = columns.step(j);
      for (int64_t o = begin; o < end; ++o) {
        for (int v = 0; v < vectors; ++v) {
          const T* from = partials + c * out + o * step + v * kLanes<T>;
          Vec<T> sum = {};
          for (int64_t i = 0; i < chunks; ++i) sum += load(from + i * size);
          store(dweight + o * columns.channels + c + v * kLanes<T>, sum, v + 1 < vectors ? kLanes<T> : real);
        }
      }
    }
  };
  if (chunks * size < 32768) {
    body(0, out);
  } else {
    parallel_tasks(out, body);
  }
}

template <class S>
static void pointwise_backward(const PointwiseBackward<S>& p) {
  using T = Accumulate<S>;
  const int64_t in = p.in_channels, out = p.out_channels;
  const int quantities = quantities_of(p.sums, p.u);
  // Products for dweight are as deep as a block has rows: short ones would spend their time on loading and storing sums.
  const Blocks blocks = split_rows(p.images, p.pixels, quantities == 5, p.dweight ? kBlockRows / 4 : kTileRows);
  // A chunk is what one task takes: with dweight, blocks whose products it sums in a buffer of its own.
  const WideColumns<T> columns = wide_columns<T>(in);
  const int64_t size = columns.size() * out;
  int64_t chunks = smaller(blocks.count, kMaxChunks);
  if (p.dweight) {
    const int64_t by_rows = larger<int64_t>(2, p.images * p.pixels / (2 * kBlockRows));
    const int64_t by_memory = larger<int64_t>(8, (int64_t{4} << 20) / larger<int64_t>(1, size));
    chunks = even_count(smaller(chunks, smaller(by_rows, by_memory)), blocks.count);
  }
  Scratch scratch;
  const T* weight = p.du ? pack_weight<false, S>(scratch, p.weight, out, in, columns) : nullptr;
  const int64_t tiles = quantities == 5 ? p.images * larger<int64_t>(1, blocks.parts) : blocks.count;
  T* partials = quantities ? take<T>(scratch, tiles * quantities * in) : nullptr;
  T* weight_sums = p.dweight ? take<T>(scratch, chunks * size) : nullptr;

  parallel_tasks(chunks, [&](int64_t first, int64_t last) {
    Scratch local;
    const LeftPanels<T> gradient = take_left<T>(local, kBlockRows, out);
    RightPanels<T> value = {p.dweight ? take<T>(local, kBlockRows * columns.size()) : nullptr, columns, 0};
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t from = chunk * blocks.count / chunks, to = (chunk + 1) * blocks.count / chunks;
      for (int64_t b = from; b < to; ++b) {
        const int64_t begin = blocks.begin(b), end = blocks.begin(b + 1);
        gradient_panels(gradient, p.g, begin, end, p.pixels, out);
        value.depth = end - begin;
        if (p.dweight) value_panels(value, p.u, begin, end, p.pixels, in);
        Ahead ahead = {};
        const int64_t next = b + 1 < to ? blocks.begin(b + 2) : 0, row_tiles = ceil_div(end - begin, kTileRows);
        const int64_t steps = columns.count * ((p.du ? row_tiles : 0) + (p.dweight ? ceil_div(out, kTileRows) : 0));
        prefetch_rows(ahead.ranges[0], p.g.dv, end, next, out, steps);
        prefetch_rows(ahead.ranges[1], reads_output(p.g) ? p.g.of.y : nullptr, end, next, out, steps);
        prefetch_rows(ahead.ranges[2], p.dweight || quantities ? p.u.y : nullptr, end, next, in, steps);
        if (p.du) input_block(p, blocks, b, gradient, weight, partials, ahead);
        if (p.dweight) weight_block(gradient, value, out, weight_sums + chunk * size, b == from, ahead);
      }
    }
  });
  if (quantities) {
    const int64_t groups = quantities == 5 ? p.images : 1;
    merge_sums(groups, groups ? tiles / groups : 0, quantities, in, partials, p.sums.out);
  }
  if (p.dweight) merge_weight(chunks, columns, out, weight_sums, size, p.dweight);
}

}  // namespace MBN_ISA
}  // namespace mbn
