// Depthwise convolution of a deferred tensor, with the batch statistics of its output.
#pragma once

#include "depthwise_rows.h"
#include "statistics.h"

namespace mbn {
namespace MBN_ISA {

// Stores a tile [row][column][lane] to y and adds what was stored to the moments; the first tile of a chunk chooses what they are about.
template <class S, class Count>
static void store_output(const Accumulate<S>* tile, S* y, int64_t rows, int64_t columns, int64_t row_stride, int64_t pixel_stride,
                         Count count, Moments<Accumulate<S>>* moments, bool first, bool streamed) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  if (moments == nullptr) {
    for (int64_t r = 0; r < rows; ++r, y += row_stride) {
      for (int64_t c = 0; c < columns; ++c, tile += L) store_or_stream(y + c * pixel_stride, load(tile), count, streamed);
    }
    return;
  }
  Moments<T> m = *moments;
  if (first) {
    Vec<T> sum = {};
    for (int64_t i = 0; i < rows * columns; ++i) sum += rounded_to<S>(load(tile + i * L));
    m.about = sum / T(rows * columns);
    m.sum = m.square = Vec<T>{};
  }
  Vec<T> sum = {}, square = {};  // a second chain: an addition takes four cycles
  for (int64_t r = 0; r < rows; ++r, y += row_stride) {
    int64_t c = 0;
    for (; c + 2 <= columns; c += 2, tile += 2 * L) {
      const Vec<T> v0 = load(tile), v1 = load(tile + L);
      store_or_stream(y + c * pixel_stride, v0, count, streamed);
      store_or_stream(y + (c + 1) * pixel_stride, v1, count, streamed);
      const Vec<T> d0 = rounded_to<S>(v0) - m.about, d1 = rounded_to<S>(v1) - m.about;
      m.sum += d0;
      sum += d1;
      m.square += d0 * d0;
      square += d1 * d1;
    }
    if (c < columns) {
      const Vec<T> v = load(tile), d = rounded_to<S>(v) - m.about;
      store_or_stream(y + c * pixel_stride, v, count, streamed);
      m.sum += d;
      m.square += d * d;
      tile += L;
    }
  }
  m.sum += sum;
  m.square += square;
  *moments = m;
}

template <class S>
void depthwise_forward(const DepthwiseForward<S>& p) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  const Window& w = p.window;
  const Plan plan = plan_of(p, L, false);
  const TileKernels<T> kernels = with_width(w, [](auto width) {
    if constexpr (width.kernel > 0) return convolve_kernels<T, width.kernel, width.stride>();
    return general_kernels<T>();
  });

  Scratch scratch;
  const int64_t tiles_per_image = plan.strips * plan.chunks, tiles = p.images * tiles_per_image;
  const bool streamed = streams(p.y, p.channels, p.images * p.out_height * p.out_width * p.channels);
  double* partials = p.mean ? take<double>(scratch, tiles * 2 * p.channels) : nullptr;

  for_tasks(plan, [&](int64_t first, int64_t last) {
    Scratch local;
    const int64_t taps = w.kernel_h * w.kernel_w;
    const int64_t slots = (plan.chunk_rows - 1) * w.stride_h + (w.kernel_h - 1) * w.dilation_h + 1;
    const int64_t width = (plan.strip_columns - 1) * w.stride_w + (w.kernel_w - 1) * w.dilation_w + 1;
    Ring<T> ring = make_ring<T>(local, plan.block_vectors, slots, width);
    T* weights = take<T>(local, plan.block_vectors * taps * L);
    T* tile = take<T>(local, plan.chunk_rows * kTileColumns * L);
    auto* moments = take<Moments<T>>(local, plan.block_vectors);
    Tap* row_taps = take<Tap>(local, plan.chunk_rows * w.kernel_h);
    int64_t* row_counts = take<int64_t>(local, plan.chunk_rows);
    int64_t* column_taps = take<int64_t>(local, plan.strip_columns * w.kernel_w);
    for (int64_t i = 0; i < plan.strip_columns * w.kernel_w; ++i) {
      column_taps[i] = (i / w.kernel_w * w.stride_w + i % w.kernel_w * w.dilation_w) * L;
    }

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
            row_counts[r] = 0;
            for (int64_t k = 0; k < w.kernel_h; ++k) {
              const int64_t row = (rows.begin + r) * w.stride_h - w.pad_top + k * w.dilation_h;
              if (row < 0 || row >= p.height) continue;
              row_taps[r * w.kernel_h + row_counts[r]++] = {ring_offset(ring, row), k * w.kernel_w * L};
            }
          }
          const TileRows work = {row_taps, row_counts, length(rows), w.kernel_h, column_taps, w.kernel_w};
          for_tiles(kernels, length(columns), [&](TileKernel<T> kernel, int64_t column, int64_t count) {
            const int64_t at = ((n * p.out_height + rows.begin) * p.out_width + columns.begin + column) * p.channels;
            for (int64_t v = 0; v < length(task.vectors); ++v) {
              S* y = p.y + at + (task.vectors.begin + v) * L;
              if (!streamed) prefetch_tile(y, length(rows), count, p.out_width * p.channels, p.channels);
              kernel(work, ring.data + v * ring.vector_stride, weights + v * taps * L, column, tile);
              with_lanes<T>(lane_count(plan, task.vectors.begin + v), [&](auto lanes) {
                store_output<S>(tile, y, length(rows), count, p.out_width * p.channels, p.channels, lanes,
                                partials ? moments + v : nullptr, column == 0, streamed);
              });
            }
          });
          const int64_t number = n * tiles_per_image + task.strip * plan.chunks + chunk;
          for (int64_t v = 0; partials && v < length(task.vectors); ++v) {
            const int64_t vector = task.vectors.begin + v;
            double* to = partials + number * 2 * p.channels + vector * L;
            store_moments(moments[v], length(rows) * length(columns), to, to + p.channels, lane_count(plan, vector));
          }
        }
      }
    }
    if (streamed) end_streams();
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
