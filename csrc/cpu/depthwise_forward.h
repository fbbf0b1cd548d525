// Depthwise convolution of a deferred tensor, with the batch statistics of its output.
#pragma once

#include "depthwise_rows.h"
#include "statistics.h"

namespace mbn {
namespace MBN_ISA {

// Stores one vector of a tile [pixels][lane] to the rows of y; the tile becomes what was stored. Returns the sum over the tile.
template <class S, class Count>
MBN_INLINE Vec<Accumulate<S>> store_tile(Accumulate<S>* tile, S* y, int64_t rows, int64_t columns, int64_t row_stride,
                                         int64_t pixel_stride, Count count) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  Vec<T> sum = {};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c, tile += L) {
      const Vec<T> v = load(tile);
      S* to = y + r * row_stride + c * pixel_stride;
      store(to, v, count);
      if constexpr (sizeof(S) != sizeof(T)) {
        const Vec<T> kept = rounded_to<S>(v);
        store(tile, kept);
        sum += kept;
      } else {
        sum += v;
      }
    }
  }
  return sum;
}

template <class S>
void depthwise_forward(const DepthwiseForward<S>& p) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  const Window& w = p.window;
  const Plan plan = plan_of(p, L, false);
  const auto convolve = with_width(w, [](auto width) { return &convolve_row<T, width.kernel, width.stride>; });

  Scratch scratch;
  const int64_t tiles_per_image = plan.strips * plan.chunks, tiles = p.images * tiles_per_image;
  T* partials = p.mean ? take<T>(scratch, tiles * 2 * p.channels) : nullptr;

  for_tasks(plan, [&](int64_t first, int64_t last) {
    Scratch local;
    const int64_t taps = w.kernel_h * w.kernel_w;
    const int64_t slots = (plan.chunk_rows - 1) * w.stride_h + (w.kernel_h - 1) * w.dilation_h + 1;
    const int64_t width = (plan.strip_columns - 1) * w.stride_w + (w.kernel_w - 1) * w.dilation_w + 1;
    Ring<T> ring = make_ring<T>(local, plan.block_vectors, slots, width);
    T* weights = take<T>(local, plan.block_vectors * taps * L);
    T* tile = take<T>(local, plan.chunk_rows * plan.strip_columns * L);
    Tap* row_taps = take<Tap>(local, plan.chunk_rows * w.kernel_h);
    int64_t* row_count = take<int64_t>(local, plan.chunk_rows);

    for (int64_t index = first; index < last; ++index) {
      const Task task = task_of(plan, index);
      const Range columns = out_columns(plan, task.strip);
      ring.columns = read_by(columns, w.kernel_w, w.stride_w, w.dilation_w, w.pad_left);
      pack_weights(plan, p.weight, task.vectors, false, weights);
      for (int64_t n = task.images.begin; n < task.images.end; ++n) {
        ring.next = 0;
        const Range chunks = clip({task.band * plan.band_chunks, (task.band + 1) * plan.band_chunks}, plan.chunks);
        for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
          const Range rows = out_rows(plan, chunk);
          load_value_rows(ring, clip(read_by(rows, w.kernel_h, w.stride_h, w.dilation_h, w.pad_top), p.height), task.vectors,
                          plan, p.u, n);
          for (int64_t r = 0; r < length(rows); ++r) {
            Tap* tap = row_taps + r * w.kernel_h;
            row_count[r] = 0;
            for (int64_t k = 0; k < w.kernel_h; ++k) {
              const int64_t row = (rows.begin + r) * w.stride_h - w.pad_top + k * w.dilation_h;
              if (row >= 0 && row < p.height) tap[row_count[r]++] = {ring_offset(ring, row), k * w.kernel_w * L};
            }
          }
          const int64_t pixels = length(rows) * length(columns);
          const int64_t number = n * tiles_per_image + task.strip * plan.chunks + chunk;
          for (int64_t v = task.vectors.begin; v < task.vectors.end; ++v) {
            const int64_t local_v = v - task.vectors.begin;
            for (int64_t r = 0; r < length(rows); ++r) {
              convolve({ring.data + local_v * ring.vector_stride, weights + local_v * taps * L, row_taps + r * w.kernel_h,
                        row_count[r], w.kernel_w, w.stride_w, w.dilation_w},
                       tile + r * length(columns) * L, length(columns));
            }
            with_lanes<T>(lane_count(plan, v), [&](auto count) {
              S* y = p.y + ((n * p.out_height + rows.begin) * p.out_width + columns.begin) * p.channels + v * L;
              const Vec<T> sum = store_tile<S>(tile, y, length(rows), length(columns), p.out_width * p.channels, p.channels, count);
              if (partials) {
                store_moments(moments_about<T>(sum / T(pixels), tile, pixels, L), partials, number, p.channels, v * L, count);
              }
            });
          }
        }
      }
    }
  });
  if (p.mean == nullptr) return;
  merge_moments<T>(
      tiles, p.channels, partials,
      [&](int64_t tile) {
        const int64_t within = tile % tiles_per_image;
        return length(out_rows(plan, within % plan.chunks)) * length(out_columns(plan, within / plan.chunks));
      },
      p.mean, p.var);
}

}  // namespace MBN_ISA
}  // namespace mbn
