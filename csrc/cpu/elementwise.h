// The kernels without a convolution: pooling a value, writing a value or a gradient out, the statistics of an output that another library made, and the
// sums of a gradient that arrives from outside.
#pragma once

#include "sums.h"

namespace mbn {
namespace MBN_ISA {

// A task is (image, block of channel vectors, chunk of pixels), cut by shape alone. It runs through its pixels in tiles of a few kilobytes, each
// vector of channels in turn, so that per-channel numbers stay in registers and memory is still read in order.
struct PixelPlan {
  int64_t images, pixels, channels, lanes, vectors;
  int64_t tile_pixels, chunk_pixels, chunks, block_vectors, blocks;
  bool serial;
  int64_t tasks() const { return images * blocks * chunks; }
};

MBN_INLINE PixelPlan pixel_plan(int64_t images, int64_t pixels, int64_t channels, int lanes) {
  constexpr int64_t kTileVectors = 16, kWorthATask = 8192, kTasks = 64, kChunkPixels = 16, kBlockVectors = 8;
  PixelPlan p = {};
  p.images = images, p.pixels = pixels, p.channels = channels, p.lanes = lanes;
  p.vectors = ceil_div(channels, lanes);
  const int64_t work = images * pixels * p.vectors;
  const int64_t wanted = ceil_div(smaller(larger(work / kWorthATask, int64_t{1}), kTasks), larger(images, int64_t{1}));
  p.chunks = larger(smaller(wanted, pixels / kChunkPixels), int64_t{1});
  p.chunk_pixels = larger(ceil_div(pixels, p.chunks), int64_t{1});
  p.chunks = larger(ceil_div(pixels, p.chunk_pixels), int64_t{1});
  p.blocks = larger(smaller(ceil_div(wanted, p.chunks), p.vectors / kBlockVectors), int64_t{1});
  p.block_vectors = larger(ceil_div(p.vectors, p.blocks), int64_t{1});
  p.blocks = ceil_div(p.vectors, p.block_vectors);
  p.tile_pixels = smaller(larger(kTileVectors / p.block_vectors, int64_t{4}), int64_t{128});
  p.serial = work < 2 * kWorthATask;
  return p;
}

constexpr int64_t kGroupTiles = 16;
struct PixelTile {
  int64_t image, vector, local_vector, begin, pixels;  // begin: first pixel, counted over all images
  int count;                                           // channels in the vector
  bool ends_group;                                     // of kGroupTiles
};

// Runs begin(task), tile(tile) for each tile and vector, and end(task, image, first vector, vectors, chunk).
template <class Begin, class Tile, class End>
MBN_INLINE void for_pixels(const PixelPlan& p, const Begin& begin, const Tile& tile, const End& end) {
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t chunk = task % p.chunks, block = task / p.chunks % p.blocks, image = task / p.chunks / p.blocks;
      const int64_t v0 = block * p.block_vectors, v1 = smaller(v0 + p.block_vectors, p.vectors);
      const int64_t first_pixel = chunk * p.chunk_pixels, last_pixel = smaller(first_pixel + p.chunk_pixels, p.pixels);
      Scratch scratch;
      auto state = begin(scratch, v1 - v0);
      for (int64_t at = first_pixel; at < last_pixel; at += p.tile_pixels) {
        const int64_t pixels = smaller(p.tile_pixels, last_pixel - at);
        const bool ends_group = (at - first_pixel) / p.tile_pixels % kGroupTiles == kGroupTiles - 1;
        for (int64_t v = v0; v < v1; ++v) {
          tile(state, PixelTile{image, v, v - v0, image * p.pixels + at, pixels, int(smaller(p.lanes, p.channels - v * p.lanes)), ends_group});
        }
      }
      for (int64_t v = v0; v < v1; ++v) end(state, image * p.chunks + chunk, v, v - v0);
    }
  };
  if (p.serial) return run(int64_t{0}, p.tasks());
  parallel_tasks(p.tasks(), run);
}
template <class Tile>
MBN_INLINE void for_pixels(const PixelPlan& p, const Tile& tile) {
  for_pixels(
      p, [](Scratch&, int64_t) { return 0; }, [&](int, const PixelTile& t) { tile(t); }, [](int, int64_t, int64_t, int64_t) {});
}

// Sums over tiles, [sum of the group so far, sum of the groups] for each: one chain of a thousand additions would lose digits.
template <class T>
MBN_INLINE void add_tile(T* sums, int64_t i, Vec<T> v, bool ends_group) {
  T* at = sums + i * 2 * kLanes<T>;
  Vec<T> sum = load(at) + v;
  if (ends_group) {
    store(at + kLanes<T>, load(at + kLanes<T>) + sum);
    sum = Vec<T>{};
  }
  store(at, sum);
}
template <class T>
MBN_INLINE Vec<T> tiles_sum(const T* sums, int64_t i) {
  return load(sums + i * 2 * kLanes<T>) + load(sums + (i * 2 + 1) * kLanes<T>);
}

template <class T>
MBN_INLINE T* cleared(Scratch& scratch, int64_t count) {
  T* p = take<T>(scratch, count);
  __builtin_memset(p, 0, size_t(count) * sizeof(T));
  return p;
}

template <class S>
void pool(const Pool<S>& p) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  const PixelPlan plan = pixel_plan(p.images, p.pixels, p.channels, L);
  Scratch scratch;
  T* partials = take<T>(scratch, p.images * plan.chunks * p.channels);
  with_act(p.u.act, [&](auto act) {
    for_pixels(
        plan, [&](Scratch& s, int64_t vectors) { return cleared<T>(s, vectors * 2 * L); },
        [&](T* sums, const PixelTile& t) {
          with_lanes<T>(t.count, [&](auto count) {
            const ValueLanes<S> lanes = value_lanes(p.u, t.image, p.channels, t.vector * L, count);
            const S* y = p.u.y + t.begin * p.channels + t.vector * L;
            Vec<T> even = {}, odd = {};
            int64_t i = 0;
            for (; i + 2 <= t.pixels; i += 2) {
              even += value_of<decltype(act)::act>(lanes, load(y + i * p.channels, count));
              odd += value_of<decltype(act)::act>(lanes, load(y + (i + 1) * p.channels, count));
            }
            if (i < t.pixels) even += value_of<decltype(act)::act>(lanes, load(y + i * p.channels, count));
            add_tile<T>(sums, t.local_vector, even + odd, t.ends_group);
          });
        },
        [&](T* sums, int64_t chunk, int64_t v, int64_t local) {
          store(partials + chunk * p.channels + v * L, tiles_sum<T>(sums, local), int(smaller(int64_t{L}, p.channels - v * L)));
        });
  });
  merge_sums<T>(p.images, plan.chunks, 1, p.channels, partials, p.pooled);
  for (int64_t i = 0; i < p.images * p.channels; ++i) p.pooled[i] /= T(p.pixels);
}

template <class S>
void materialize(const Materialize<S>& p) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  with_act(p.u.act, [&](auto act) {
    for_pixels(pixel_plan(p.images, p.pixels, p.channels, L), [&](const PixelTile& t) {
      with_lanes<T>(t.count, [&](auto count) {
        const ValueLanes<S> lanes = value_lanes(p.u, t.image, p.channels, t.vector * L, count);
        const int64_t at = t.begin * p.channels + t.vector * L;
        for (int64_t i = 0; i < t.pixels; ++i) {
          const int64_t j = at + i * p.channels;
          Vec<T> value = value_of<decltype(act)::act>(lanes, load(p.u.y + j, count));
          if (p.residual) value += load(p.residual + j, count);
          store(p.out + j, value, count);
        }
      });
    });
  });
}

template <class S>
void materialize_gradient(const MaterializeGradient<S>& p) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  with_act(p.g.of.act, [&](auto act) {
    for_pixels(pixel_plan(p.images, p.pixels, p.channels, L), [&](const PixelTile& t) {
      with_lanes<T>(t.count, [&](auto count) {
        const GradientLanes<S> lanes = gradient_lanes(p.g, t.image, p.channels, t.vector * L, count);
        const int64_t at = t.begin * p.channels + t.vector * L;
        for (int64_t i = 0; i < t.pixels; ++i) {
          const int64_t j = at + i * p.channels;
          const Vec<T> y = p.g.of.y ? load(p.g.of.y + j, count) : Vec<T>{};
          Vec<T> dy = gradient_of<decltype(act)::act>(lanes, load(p.g.dv + j, count), y);
          if (p.residual) dy += load(p.residual + j, count);
          store(p.out + j, dy, count);
        }
      });
    });
  });
}

// Of blocks of rows that stay in the first-level cache, each about an estimate from its first rows.
template <class S>
void statistics(const Statistics<S>& p) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  constexpr int64_t kRows = 256, kFirstRows = 16, kWorthATask = 8192;
  const int64_t blocks = ceil_div(p.rows, kRows), channels = p.channels;
  const auto rows_of = [&](int64_t b) { return smaller(kRows, p.rows - b * kRows); };
  Scratch scratch;
  double* moments = take<double>(scratch, blocks * 2 * channels);
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t rows = rows_of(b), first_rows = smaller(rows, kFirstRows);
      for (int64_t c = 0; c < channels; c += L) {
        with_lanes<T>(int(smaller(int64_t{L}, channels - c)), [&](auto count) {
          const S* y = p.y + b * kRows * channels + c;
          Vec<T> about = {}, sum[4] = {}, square[4] = {};  // four chains of additions: one would wait for itself
          for (int64_t r = 0; r < first_rows; ++r) about += load(y + r * channels, count);
          about *= T(1) / T(first_rows);
          const auto add = [&](int64_t r, int chain) {
            const Vec<T> d = load(y + r * channels, count) - about;
            sum[chain] += d;
            square[chain] += d * d;
          };
          int64_t r = 0;
          for (; r + 4 <= rows; r += 4) add(r, 0), add(r + 1, 1), add(r + 2, 2), add(r + 3, 3);
          for (; r < rows; ++r) add(r, 0);
          const Moments<T> found = {about, (sum[0] + sum[1]) + (sum[2] + sum[3]), (square[0] + square[1]) + (square[2] + square[3])};
          double* to = moments + b * 2 * channels + c;
          store_moments(found, rows, to, to + channels, count);
        });
      }
    }
  };
  if (p.rows * ceil_div(channels, int64_t{L}) < 2 * kWorthATask) {
    run(int64_t{0}, blocks);
  } else {
    parallel_tasks(blocks, run);
  }
  merge_moments(blocks, channels, moments, rows_of, p.mean, p.var);
}

template <class S, int Q>
MBN_INLINE void reduce_gradient_of(const ReduceGradient<S>& p) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  const PixelPlan plan = pixel_plan(p.images, p.pixels, p.channels, L);
  Scratch scratch;
  T* partials = take<T>(scratch, p.images * plan.chunks * Q * p.channels);
  with_act(p.u.act, [&](auto act) {
    for_pixels(
        plan, [&](Scratch& s, int64_t vectors) { return cleared<T>(s, vectors * Q * 2 * L); },
        [&](T* sums, const PixelTile& t) {
          with_lanes<T>(t.count, [&](auto count) {
            const SumLanes<S> lanes = sum_lanes(p.u, p.sums, t.vector * L, count);
            const int64_t at = t.begin * p.channels + t.vector * L;
            SumVectors<S, Q> sum = {};
            for (int64_t i = 0; i < t.pixels; ++i) {
              const int64_t j = at + i * p.channels;
              accumulate<decltype(act)::act>(sum, lanes, load(p.dv + j, count), load(p.u.y + j, count));
            }
            for (int q = 0; q < Q; ++q) add_tile<T>(sums, t.local_vector * Q + q, sum.at[q], t.ends_group);
          });
        },
        [&](T* sums, int64_t chunk, int64_t v, int64_t local) {
          const int count = int(smaller(int64_t{L}, p.channels - v * L));
          SumVectors<S, Q> sum;
          for (int q = 0; q < Q; ++q) sum.at[q] = tiles_sum<T>(sums, local * Q + q);
          store_sums(sum, sum_lanes(p.u, p.sums, v * L, count), partials, chunk, p.channels, v * L, count);
        });
  });
  const bool gated = Q == 5;
  merge_sums<T>(gated ? p.images : 1, gated ? plan.chunks : p.images * plan.chunks, Q, p.channels, partials, p.sums.out);
}

template <class S>
void reduce_gradient(const ReduceGradient<S>& p) {
  if (quantities_of(p.sums, p.u) == 2) return reduce_gradient_of<S, 2>(p);
  if (quantities_of(p.sums, p.u) == 5) return reduce_gradient_of<S, 5>(p);
}

}  // namespace MBN_ISA
}  // namespace mbn
