// Pointwise convolution as a matrix product over rows = images * pixels: the deferred operand is evaluated once per element into panels that
// stay in the second-level cache, statistics and sums are taken where a tile is written.
#pragma once

#include "deferred.h"
#include "gemm.h"
#include "statistics.h"
#include "sums.h"

namespace mbn {
namespace MBN_ISA {

// The panels of one block of rows. Its stride keeps the same tile of neighbouring panels out of each other's cache sets.
template <class T>
struct Panels {
  T* data;
  int64_t stride;
};
template <class T>
MBN_INLINE Panels<T> take_panels(Scratch& scratch, int64_t rows, int64_t channels) {
  const int64_t stride = rows * kPanel<T> + kPanel<T>;
  return {take<T>(scratch, panel_count<T>(channels) * stride), stride};
}

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

// Fills rows [begin, end) of a block's panels, `begin` being row `at` of the block: strip(to, row, rows, c, count) writes rows x one vector of
// channels. As many rows at a time as the first-level cache holds: memory is read in order, and the lanes are loaded once for all of them.
template <class T, class F>
MBN_INLINE void fill_panels(const Panels<T>& panels, int64_t at, int64_t begin, int64_t end, int64_t channels, const F& strip) {
  const int64_t strip_rows = larger<int64_t>(8, 4096 / larger<int64_t>(1, channels));
  for (int64_t row = begin; row < end; row += strip_rows) {
    const int64_t rows = smaller(strip_rows, end - row);
    T* to = panels.data + (at + row - begin) * kPanel<T>;
    for (int64_t c = 0; c < channels; c += kLanes<T>) {
      strip(to + c / kPanel<T> * panels.stride + c % kPanel<T>, row, rows, c, int(smaller<int64_t>(kLanes<T>, channels - c)));
    }
  }
}

template <class S>
static void value_panels(const Panels<Accumulate<S>>& panels, const Value<S>& u, int64_t begin, int64_t end, int64_t pixels,
                         int64_t channels) {
  using T = Accumulate<S>;
  if (u.scale == nullptr && u.gate == nullptr && u.act == Act::identity) {
    return fill_panels(panels, 0, begin, end, channels, [&](T* to, int64_t row, int64_t rows, int64_t c, int count) {
      const S* y = u.y + row * channels + c;
      const int64_t whole = whole_rows<T>(rows, row * channels + c, channels, end * channels);
      for (int64_t r = 0; r < whole; ++r) store(to + r * kPanel<T>, load(y + r * channels));
      for (int64_t r = whole; r < rows; ++r) store(to + r * kPanel<T>, load(y + r * channels, count));
    });
  }
  with_act(u.act, [&](auto act) {
    for_images(begin, end, u.gate ? pixels : end, [&](int64_t n, int64_t first, int64_t last) {
      fill_panels(panels, first - begin, first, last, channels, [&](T* to, int64_t row, int64_t rows, int64_t c, int count) {
        const ValueLanes<S> lanes = value_lanes(u, n, channels, c, count);
        const S* y = u.y + row * channels + c;
        const int64_t whole = whole_rows<T>(rows, row * channels + c, channels, end * channels);
        for (int64_t r = 0; r < whole; ++r) store(to + r * kPanel<T>, value_of<act.act>(lanes, load(y + r * channels)));
        for (int64_t r = whole; r < rows; ++r) {
          store(to + r * kPanel<T>, value_of<act.act>(lanes, load(y + r * channels, count)));
        }
      });
    });
  });
}

template <class S>
static void gradient_panels(const Panels<Accumulate<S>>& panels, const Gradient<S>& g, int64_t begin, int64_t end, int64_t pixels,
                            int64_t channels) {
  using T = Accumulate<S>;
  const bool reads_y = g.of.act != Act::identity || g.b != nullptr;
  with_act(g.of.act, [&](auto act) {
    for_images(begin, end, g.of.gate || g.q ? pixels : end, [&](int64_t n, int64_t first, int64_t last) {
      fill_panels(panels, first - begin, first, last, channels, [&](T* to, int64_t row, int64_t rows, int64_t c, int count) {
        const GradientLanes<S> lanes = gradient_lanes(g, n, channels, c, count);
        const S* dv = g.dv + row * channels + c;
        const S* y = g.of.y + row * channels + c;
        const int64_t whole = whole_rows<T>(rows, row * channels + c, channels, end * channels);
        const auto span = [&](int64_t from, int64_t until, int lanes_read) {
          if (reads_y) {
            for (int64_t r = from; r < until; ++r) {
              const Vec<T> v = load(dv + r * channels, lanes_read);
              store(to + r * kPanel<T>, gradient_of<act.act>(lanes, v, load(y + r * channels, lanes_read)));
            }
          } else {
            for (int64_t r = from; r < until; ++r) {
              store(to + r * kPanel<T>, gradient_of<act.act>(lanes, load(dv + r * channels, lanes_read), Vec<T>{}));
            }
          }
        };
        span(0, whole, kLanes<T>);
        span(whole, rows, count);
      });
    });
  });
}

// ---- Forward --------------------------------------------------------------------------------------------------------------------

// Mean and M2 of a block so far, for the channels of one panel.
template <class T>
struct BlockMoments {
  Vec<T> mean[kPanelVectors], m2[kPanelVectors];
};

// A tile's moments from its registers, merged with those of the `before` rows above it.
template <class S, int R, int NV>
MBN_INLINE void add_moments(BlockMoments<Accumulate<S>>& block, const Tile<Accumulate<S>, R, NV>& acc, int64_t before) {
  using T = Accumulate<S>;
  const T share = T(R) / T(before + R);
  MBN_UNROLL
  for (int v = 0; v < NV; ++v) {
    // Four chains of additions each: one would wait for itself.
    Vec<T> sum[4] = {}, square[4] = {};
    MBN_UNROLL
    for (int r = 0; r < R; ++r) sum[r % 4] += rounded_to<S>(acc.at[r][v]);
    const Vec<T> mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * (T(1) / R);
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<T> d = rounded_to<S>(acc.at[r][v]) - mean;
      square[r % 4] += d * d;
    }
    const Vec<T> m2 = (square[0] + square[1]) + (square[2] + square[3]);
    if (before == 0) {
      block.mean[v] = mean;
      block.m2[v] = m2;
    } else {
      const Vec<T> delta = mean - block.mean[v];
      block.mean[v] += delta * share;
      block.m2[v] += m2 + delta * delta * (T(before) * share);
    }
  }
}

template <class S>
struct ForwardTile {
  using T = Accumulate<S>;
  const T *left, *right;
  int64_t stride, depth, channels, before;
  S* y;  // the tile's first row and channel
  int last;  // real channels of the last vector
  BlockMoments<T>* moments;
};

template <class S, int R, int NV>
static __attribute__((noinline)) void forward_tile(const ForwardTile<S>& t) {
  using T = Accumulate<S>;
  const Tile<T, R, NV> acc = product<T, R, NV>(t.left, t.stride, t.right, t.depth);
  MBN_UNROLL
  for (int r = 0; r < R; ++r) {
    S* y = t.y + r * t.channels;
    if constexpr (NV == 2) store(y, acc.at[r][0]);
    store(y + (NV - 1) * kLanes<T>, acc.at[r][NV - 1], t.last);
  }
  if (t.moments) add_moments<S, R, NV>(*t.moments, acc, t.before);
}

template <class S>
static void pointwise_forward(const PointwiseForward<S>& p) {
  using T = Accumulate<S>;
  const int64_t in = p.in_channels, out = p.out_channels;
  const Blocks blocks = split_rows(p.images, p.pixels, false);
  Scratch scratch;
  const T* weight = pack_weight<true, S>(scratch, p.weight, out, in);
  T* moments = p.mean ? take<T>(scratch, blocks.count * 2 * out) : nullptr;

  parallel_tasks(blocks.count, [&](int64_t first, int64_t last) {
    Scratch local;
    const Panels<T> value = take_panels<T>(local, kBlockRows, in);
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = blocks.begin(b), rows = blocks.begin(b + 1) - begin;
      value_panels(value, p.u, begin, begin + rows, p.pixels, in);
      for (int64_t c = 0; c < out; c += kPanel<T>) {
        BlockMoments<T> block;
        const int vectors = panel_vectors<T>(out, c);
        const int real = int(smaller<int64_t>(kLanes<T>, out - c - (vectors - 1) * kLanes<T>));
        for_tiles(rows, [&](int64_t row, int height) {
          const ForwardTile<S> tile = {value.data + row * kPanel<T>, weight + c * in, value.stride, in, out, row,
                                       p.y + (begin + row) * out + c, real, moments ? &block : nullptr};
          with_tile(height, vectors, [&](auto t) { forward_tile<S, t.rows, t.vectors>(tile); });
        });
        if (moments == nullptr) continue;
        for (int v = 0; v < vectors; ++v) {
          store_moments<T>({block.mean[v], block.m2[v]}, moments, b, out, c + v * kLanes<T>,
                           v + 1 < vectors ? kLanes<T> : real);
        }
      }
    }
  });
  if (moments) {
    merge_moments(blocks.count, out, moments, [&](int64_t b) { return blocks.begin(b + 1) - blocks.begin(b); }, p.mean, p.var);
  }
}

// ---- Backward -------------------------------------------------------------------------------------------------------------------

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
  Tile<T, R, NV> acc = product<T, R, NV>(t.left, t.stride, t.right, t.depth);
  if (t.residual) {
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      const S* residual = t.residual + r * t.channels;
      if constexpr (NV == 2) acc.at[r][0] += load(residual);
      acc.at[r][NV - 1] += load_within(residual + (NV - 1) * kLanes<T>, t.last, t.residual_end);
    }
  }
  MBN_UNROLL
  for (int r = 0; r < R; ++r) {
    S* du = t.du + r * t.channels;
    if constexpr (NV == 2) store(du, acc.at[r][0]);
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
static void input_block(const PointwiseBackward<S>& p, const Blocks& blocks, int64_t b, const Panels<Accumulate<S>>& gradient,
                        const Accumulate<S>* weight, Accumulate<S>* partials) {
  using T = Accumulate<S>;
  const int64_t in = p.in_channels, out = p.out_channels, begin = blocks.begin(b), end = blocks.begin(b + 1);
  for (int64_t c = 0; c < in; c += kPanel<T>) {
    const int vectors = panel_vectors<T>(in, c);
    const int real = int(smaller<int64_t>(kLanes<T>, in - c - (vectors - 1) * kLanes<T>));
    for_tiles(end - begin, [&](int64_t row, int height) {
      const int64_t offset = (begin + row) * in + c;
      const InputTile<S> tile = {gradient.data + row * kPanel<T>, weight + c * out, gradient.stride, out, in,
                                 p.residual ? p.residual + offset : nullptr,
                                 p.residual ? p.residual + p.images * p.pixels * in : nullptr,
                                 p.du + offset, real};
      with_tile(height, vectors, [&](auto t) { input_tile<S, t.rows, t.vectors>(tile); });
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
  T* sum;     // rows of kPanel numbers
  bool first;  // nothing has been summed yet
};

template <class T, int R, int NV>
static __attribute__((noinline)) void weight_tile(const WeightTile<T>& t) {
  Tile<T, R, NV> acc = {};
  if (!t.first) {
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      MBN_UNROLL
      for (int v = 0; v < NV; ++v) acc.at[r][v] = load(t.sum + r * kPanel<T> + v * kLanes<T>);
    }
  }
  multiply<1, kPanel<T>>(acc, t.left, t.right, t.depth);
  MBN_UNROLL
  for (int r = 0; r < R; ++r) {
    MBN_UNROLL
    for (int v = 0; v < NV; ++v) store(t.sum + r * kPanel<T> + v * kLanes<T>, acc.at[r][v]);
  }
}

// sum [panels of in][out][kPanel] += gradient^T value over the rows of a block.
template <class T>
static void weight_block(const Panels<T>& gradient, const Panels<T>& value, int64_t rows, int64_t in, int64_t out, T* sum,
                         bool first) {
  for (int64_t o = 0; o < out; o += kPanel<T>) {
    for (int64_t c = 0; c < in; c += kPanel<T>) {
      for_tiles(smaller<int64_t>(kPanel<T>, out - o), [&](int64_t row, int height) {
        const WeightTile<T> tile = {gradient.data + o / kPanel<T> * gradient.stride + row, value.data + c / kPanel<T> * value.stride,
                                    rows, sum + c * out + (o + row) * kPanel<T>, first};
        with_tile(height, panel_vectors<T>(in, c), [&](auto t) { weight_tile<T, t.rows, t.vectors>(tile); });
      });
    }
  }
}

// dweight [out][in] from the chunks' sums, in the chunks' order.
template <class T>
static void merge_weight(int64_t chunks, int64_t in, int64_t out, const T* partials, int64_t size, T* dweight) {
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t c = 0; c < in; c += kPanel<T>) {
      const int vectors = panel_vectors<T>(in, c);
      const int real = int(smaller<int64_t>(kLanes<T>, in - c - (vectors - 1) * kLanes<T>));
      for (int64_t o = begin; o < end; ++o) {
        for (int v = 0; v < vectors; ++v) {
          const T* from = partials + c * out + o * kPanel<T> + v * kLanes<T>;
          Vec<T> sum = {};
          for (int64_t i = 0; i < chunks; ++i) sum += load(from + i * size);
          store(dweight + o * in + c + v * kLanes<T>, sum, v + 1 < vectors ? kLanes<T> : real);
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
  const Blocks blocks = split_rows(p.images, p.pixels, quantities == 5);
  // A chunk is what one task takes: with dweight, blocks whose products it sums in a buffer of its own.
  const int64_t size = panel_count<T>(in) * kPanel<T> * out;
  int64_t chunks = smaller(blocks.count, kMaxChunks);
  if (p.dweight) {
    const int64_t by_rows = p.images * p.pixels / 192, by_memory = (int64_t{4} << 20) / larger<int64_t>(1, size);
    chunks = smaller(chunks, larger<int64_t>(1, smaller(by_rows, larger<int64_t>(8, by_memory))));
  }
  Scratch scratch;
  const T* weight = p.du ? pack_weight<false, S>(scratch, p.weight, out, in) : nullptr;
  const int64_t tiles = quantities == 5 ? p.images * larger<int64_t>(1, blocks.parts) : blocks.count;
  T* partials = quantities ? take<T>(scratch, tiles * quantities * in) : nullptr;
  T* weight_sums = p.dweight ? take<T>(scratch, chunks * size) : nullptr;

  parallel_tasks(chunks, [&](int64_t first, int64_t last) {
    Scratch local;
    const Panels<T> gradient = take_panels<T>(local, kBlockRows, out);
    const Panels<T> value = take_panels<T>(local, p.dweight ? kBlockRows : 0, in);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t from = chunk * blocks.count / chunks, to = (chunk + 1) * blocks.count / chunks;
      for (int64_t b = from; b < to; ++b) {
        const int64_t begin = blocks.begin(b), end = blocks.begin(b + 1);
        gradient_panels(gradient, p.g, begin, end, p.pixels, out);
        if (p.du) input_block(p, blocks, b, gradient, weight, partials);
        if (p.dweight == nullptr) continue;
        value_panels(value, p.u, begin, end, p.pixels, in);
        weight_block(gradient, value, end - begin, in, out, weight_sums + chunk * size, b == from);
      }
    }
  });
  if (quantities) {
    const int64_t groups = quantities == 5 ? p.images : 1;
    merge_sums(groups, groups ? tiles / groups : 0, quantities, in, partials, p.sums.out);
  }
  if (p.dweight) merge_weight(chunks, in, out, weight_sums, size, p.dweight);
}

}  // namespace MBN_ISA
}  // namespace mbn
