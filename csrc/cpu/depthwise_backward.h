// The backward pass of a depthwise convolution: the gradient of its input's value, the sums that the stage below needs of it, and the gradient of
// the weight, from one pass over the rows of the output's gradient and of the input's value.
#pragma once

#include "depthwise_rows.h"
#include "sums.h"

namespace mbn {
namespace MBN_ISA {

// How a row of the input's gradient is made from rows of the output's gradient.
enum class Transpose { convolve, spread, general };
MBN_INLINE Transpose transpose_of(const Window& w) {
  const bool compiled = (w.kernel_w == 3 || w.kernel_w == 5 || w.kernel_w == 7) && w.dilation_w == 1 && w.stride_w <= 2;
  return !compiled ? Transpose::general : w.stride_w == 1 ? Transpose::convolve : Transpose::spread;
}

// What a strip's row of the input's gradient reads of the output's gradient; columns outside of the image are zeros in the ring.
struct StripGradient {
  Range columns;  // of the input
  Range reads;    // of the output's gradient
  int64_t steps, before;  // Transpose::spread takes two columns a step; `before` is 1 where the first begins before the strip
};
MBN_INLINE StripGradient strip_gradient(const Plan& plan, int64_t strip, Transpose transpose) {
  const Window& w = plan.w;
  const Range columns = in_columns(plan, strip);
  const Range reads = reached_by(columns, w.kernel_w, w.stride_w, w.dilation_w, w.pad_left);
  if (length(columns) <= 0) return {columns, {0, 0}, 0, 0};
  if (transpose == Transpose::convolve) return {columns, reads, length(columns), 0};
  if (transpose == Transpose::general) return {columns, clip(reads, plan.out_width), length(columns), 0};
  const int64_t before = (columns.begin + w.pad_left) & 1, first = (columns.begin + w.pad_left - before) / 2;
  const int64_t steps = (length(columns) + before + 1) / 2;
  return {columns, {first - (w.kernel_w - 1) / 2, first + steps}, steps, before};
}

// The largest extents over all chunks and strips: what scratch has to hold.
struct BackwardExtents {
  int64_t gradient_rows, gradient_columns, value_rows, value_columns, tile_rows, tile_columns;
};

template <class S>
struct BackwardPlan {
  const DepthwiseBackward<S>& p;
  Plan plan;
  Transpose transpose;
  bool wants_du;

  Range gradient_rows(int64_t chunk) const {
    const Window& w = plan.w;
    Range rows = {0, 0};
    if (wants_du) {
      rows = clip(reached_by(in_rows(plan, chunk), w.kernel_h, w.stride_h, w.dilation_h, w.pad_top), plan.out_height);
    }
    return p.dweight ? hull(rows, out_rows(plan, chunk)) : rows;
  }
  Range gradient_columns(int64_t strip) const {
    const Range columns = wants_du ? strip_gradient(plan, strip, transpose).reads : Range{0, 0};
    return p.dweight ? hull(columns, out_columns(plan, strip)) : columns;
  }
  Range value_rows(int64_t chunk) const {
    const Window& w = plan.w;
    if (!p.dweight) return {0, 0};
    return clip(read_by(out_rows(plan, chunk), w.kernel_h, w.stride_h, w.dilation_h, w.pad_top), plan.height);
  }
  Range value_columns(int64_t strip) const {
    const Window& w = plan.w;
    if (!p.dweight) return {0, 0};
    return read_by(out_columns(plan, strip), w.kernel_w, w.stride_w, w.dilation_w, w.pad_left);
  }
  BackwardExtents extents() const {
    BackwardExtents e = {};
    for (int64_t i = 0; i < plan.chunks; ++i) {
      e.gradient_rows = larger(e.gradient_rows, length(gradient_rows(i)));
      e.value_rows = larger(e.value_rows, length(value_rows(i)));
      e.tile_rows = larger(e.tile_rows, length(in_rows(plan, i)));
    }
    for (int64_t i = 0; i < plan.strips; ++i) {
      e.gradient_columns = larger(e.gradient_columns, length(gradient_columns(i)));
      e.value_columns = larger(e.value_columns, length(value_columns(i)));
      e.tile_columns = larger(e.tile_columns, length(in_columns(plan, i)));
    }
    return e;
  }
};

// A tile of the input's gradient, [row][column][lane] with row_stride from row to row, and where it goes.
template <class T>
struct GradientTile {
  const T* data;
  int64_t row_stride, rows, columns;
  int64_t image, row, column;
  bool streamed;
};

// Adds the residual, stores, and adds the tile's sums to `into` [Q][lane]: one chain of additions over all of an image would lose digits.
template <class S, Act A, int Q, class Count>
static void store_input_gradient(const DepthwiseBackward<S>& p, const GradientTile<Accumulate<S>>& t, int64_t c, Count count,
                                 Accumulate<S>* into) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  const SumLanes<S> lanes = sum_lanes(p.u, p.sums, c, count);
  SumVectors<S, Q> sum = {};
  const int64_t stride = p.channels;
  for (int64_t r = 0; r < t.rows; ++r) {
    const T* from = t.data + r * t.row_stride;
    const int64_t at = ((t.image * p.height + t.row + r) * p.width + t.column) * stride + c;
    const S *residual = p.residual ? p.residual + at : nullptr, *y = p.u.y + at;
    S* du = p.du ? p.du + at : nullptr;
    for (int64_t i = 0; i < t.columns; ++i) {
      Vec<T> dv = load(from + i * L);
      if (residual) dv += load(residual + i * stride, count);
      if (du) store_or_stream(du + i * stride, dv, count, t.streamed);
      if constexpr (Q > 0) accumulate<A>(sum, lanes, rounded_to<S>(dv), load(y + i * stride, count));
    }
  }
  for (int q = 0; q < Q; ++q) store(into + q * L, load(into + q * L) + sum.at[q]);
}
template <class S>
using StoreInputGradient = void (*)(const DepthwiseBackward<S>&, const GradientTile<Accumulate<S>>&, int64_t, int, Accumulate<S>*);
template <class S, Act A, int Q>
static void store_input_gradient_lanes(const DepthwiseBackward<S>& p, const GradientTile<Accumulate<S>>& t, int64_t c, int count,
                                       Accumulate<S>* into) {
  with_lanes<Accumulate<S>>(count, [&](auto n) { store_input_gradient<S, A, Q>(p, t, c, n, into); });
}
template <class S>
MBN_INLINE StoreInputGradient<S> store_input_gradient_for(const DepthwiseBackward<S>& p) {
  StoreInputGradient<S> chosen = nullptr;
  with_quantities(p.sums, p.u, [&](auto quantities) {
    constexpr int kQ = decltype(quantities)::count;
    if constexpr (kQ == 0) {
      chosen = &store_input_gradient_lanes<S, Act::identity, 0>;
    } else {
      with_act(p.u.act, [&](auto act) { chosen = &store_input_gradient_lanes<S, decltype(act)::act, kQ>; });
    }
  });
  return chosen;
}

// Where each column of a strip of the input's gradient reads, for Transpose::general.
MBN_INLINE void fill_column_taps(const Plan& plan, const StripGradient& strip, int64_t gradient_begin, int64_t* taps) {
  const Window& w = plan.w;
  for (int64_t i = 0; i < length(strip.columns); ++i) {
    for (int64_t k = 0; k < w.kernel_w; ++k) {
      const int64_t place = strip.columns.begin + i + w.pad_left - k * w.dilation_w;
      const bool read = place >= 0 && place % w.stride_w == 0 && place / w.stride_w < plan.out_width;
      taps[i * w.kernel_w + k] = read ? (place / w.stride_w - gradient_begin) * plan.lanes : -1;
    }
  }
}

template <class T>
MBN_INLINE void clear(T* p, int64_t count) {
  __builtin_memset(p, 0, size_t(count) * sizeof(T));
}

// [C, kernel_h * kernel_w] from partials [tiles][kernel_h * kernel_w][C].
template <class T>
MBN_INLINE void merge_weight_gradient(int64_t tiles, int64_t channels, int64_t taps, const T* partials, T* out) {
  parallel_channels(channels, tiles * taps, [&](int64_t begin, int64_t end) {
    constexpr int64_t kStrip = 32;
    for (int64_t c = begin; c < end; c += kStrip) {
      const int64_t n = smaller(kStrip, end - c);
      for (int64_t q = 0; q < taps; ++q) {
        double sum[kStrip] = {};
        for (int64_t t = 0; t < tiles; ++t) {
          const T* from = partials + (t * taps + q) * channels + c;
          for (int64_t i = 0; i < n; ++i) sum[i] += double(from[i]);
        }
        for (int64_t i = 0; i < n; ++i) out[(c + i) * taps + q] = T(sum[i]);
      }
    }
  });
}

template <class S>
void depthwise_backward(const DepthwiseBackward<S>& p) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  const Window& w = p.window;
  const BackwardPlan<S> b = {p, plan_of(p, L, true), transpose_of(w), p.du != nullptr || p.sums.out != nullptr};
  const Plan& plan = b.plan;
  const BackwardExtents extents = b.extents();
  const int64_t taps = w.kernel_h * w.kernel_w, quantities = quantities_of(p.sums, p.u);

  TileKernels<T> kernels;
  void (*weight_kernel)(const WeightWork<T>&, T*) = nullptr;
  with_width(w, [&](auto width) {
    constexpr int kKernel = width.kernel, kStride = width.stride;
    weight_kernel = &weight_gradient<T, kKernel, kStride>;
    if constexpr (kStride == 0) kernels = general_kernels<T>();
    if constexpr (kStride == 1) kernels = convolve_kernels<T, kKernel, 1>();
    if constexpr (kStride == 2) kernels = spread_kernels<T, kKernel>();
  });
  const StoreInputGradient<S> store_du = store_input_gradient_for(p);

  const bool streamed = p.du != nullptr && streams(p.du, p.channels, p.images * p.height * p.width * p.channels);
  Scratch scratch;
  const int64_t sum_tiles = plan.strips * plan.bands;  // per image
  const int64_t weight_tiles = plan.groups * plan.strips * plan.bands;
  T* sum_partials = take<T>(scratch, p.images * sum_tiles * quantities * p.channels);
  T* weight_partials = p.dweight ? take<T>(scratch, weight_tiles * taps * p.channels) : nullptr;

  for_tasks(plan, [&](int64_t first, int64_t last) {
    Scratch local;
    Ring<T> gradients = make_ring<T>(local, plan.block_vectors, extents.gradient_rows, extents.gradient_columns);
    Ring<T> values = make_ring<T>(local, plan.block_vectors, extents.value_rows, extents.value_columns);
    T* tile = take<T>(local, extents.tile_rows * kTileColumns * L);
    T* weights = take<T>(local, plan.block_vectors * taps * L);
    T* dweight = take<T>(local, plan.block_vectors * taps * L);
    T* sums = take<T>(local, plan.block_vectors * quantities * L);
    Tap* row_taps = take<Tap>(local, extents.tile_rows * w.kernel_h);
    int64_t* row_counts = take<int64_t>(local, extents.tile_rows);
    int64_t* column_taps = take<int64_t>(local, extents.tile_columns * w.kernel_w);
    int64_t* gradient_at = take<int64_t>(local, plan.chunk_rows);
    int64_t* value_at = take<int64_t>(local, plan.chunk_rows * w.kernel_h);

    for (int64_t index = first; index < last; ++index) {
      const Task task = task_of(plan, index);
      const Range out = out_columns(plan, task.strip);
      const StripGradient strip = strip_gradient(plan, task.strip, b.transpose);
      gradients.columns = b.gradient_columns(task.strip);
      values.columns = b.value_columns(task.strip);
      fill_column_taps(plan, strip, gradients.columns.begin, column_taps);
      pack_weights(plan, p.weight, task.vectors, b.transpose == Transpose::convolve, weights);
      if (p.dweight) clear(dweight, length(task.vectors) * taps * L);

      for (int64_t n = task.images.begin; n < task.images.end; ++n) {
        gradients.next = values.next = 0;
        clear(sums, length(task.vectors) * quantities * L);
        const Range chunks = clip({task.band * plan.band_chunks, (task.band + 1) * plan.band_chunks}, plan.chunks);
        for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
          load_gradient_rows(gradients, b.gradient_rows(chunk), task.vectors, plan, p.g, n);
          if (p.dweight) load_value_rows(values, b.value_rows(chunk), task.vectors, plan, p.u, n);

          const Range rows = b.wants_du ? in_rows(plan, chunk) : Range{0, 0};
          for (int64_t r = 0; r < length(rows); ++r) {
            row_counts[r] = 0;
            for (int64_t k = 0; k < w.kernel_h; ++k) {
              const int64_t place = rows.begin + r + w.pad_top - k * w.dilation_h;
              if (place < 0 || place % w.stride_h != 0 || place / w.stride_h >= p.out_height) continue;
              row_taps[r * w.kernel_h + row_counts[r]++] = {ring_offset(gradients, place / w.stride_h), k * w.kernel_w * L};
            }
          }
          const Range weight_rows = p.dweight ? out_rows(plan, chunk) : Range{0, 0};
          for (int64_t r = 0; r < length(weight_rows); ++r) {
            gradient_at[r] = ring_offset(gradients, weight_rows.begin + r);
            for (int64_t k = 0; k < w.kernel_h; ++k) {
              const int64_t row = (weight_rows.begin + r) * w.stride_h - w.pad_top + k * w.dilation_h;
              const bool inside = row >= 0 && row < p.height;
              value_at[r * w.kernel_h + k] = inside ? ring_offset(values, row) : values.slots * values.row_stride;
            }
          }

          for (int64_t v = 0; length(weight_rows) > 0 && length(out) > 0 && v < length(task.vectors); ++v) {
            weight_kernel({gradients.data + v * gradients.vector_stride + (out.begin - gradients.columns.begin) * L,
                           values.data + v * values.vector_stride, gradient_at, value_at, length(weight_rows), length(out), w.kernel_h,
                           w.kernel_w, w.stride_w, w.dilation_w},
                          dweight + v * taps * L);
          }
          if (length(rows) <= 0) continue;
          const TileRows work = {row_taps, row_counts, length(rows), w.kernel_h, column_taps, w.kernel_w};
          const int64_t reads = b.transpose == Transpose::general ? 0 : strip.reads.begin - gradients.columns.begin;
          for_tiles(kernels, strip.steps, [&](TileKernel<T> kernel, int64_t step, int64_t count) {
            const int64_t place = strip.columns.begin - strip.before + step * kernels.width;
            const Range columns = {larger(place, strip.columns.begin), smaller(place + count * kernels.width, strip.columns.end)};
            const GradientTile<T> made = {tile + (columns.begin - place) * L, count * kernels.width * L, length(rows), length(columns),
                                          n, rows.begin, columns.begin, streamed};
            for (int64_t v = 0; v < length(task.vectors); ++v) {
              const int64_t at = ((n * p.height + rows.begin) * p.width + columns.begin) * p.channels + (task.vectors.begin + v) * L;
              if (p.du && !streamed) prefetch_tile(p.du + at, length(rows), length(columns), p.width * p.channels, p.channels);
              kernel(work, gradients.data + v * gradients.vector_stride + reads * L, weights + v * taps * L, step, tile);
              const int64_t vector = task.vectors.begin + v;
              store_du(p, made, vector * L, lane_count(plan, vector), sums + v * quantities * L);
            }
          });
        }
        const int64_t number = n * sum_tiles + task.strip * plan.bands + task.band;
        for (int64_t v = task.vectors.begin; v < task.vectors.end; ++v) {
          const int count = lane_count(plan, v);
          const Vec<T> rstd = load_or<T>(p.sums.rstd, v * L, count, 1);
          for (int64_t q = 0; q < quantities; ++q) {
            const bool scaled = quantities == 2 ? q == 1 : q >= 3;
            const Vec<T> sum = load(sums + ((v - task.vectors.begin) * quantities + q) * L);
            store(sum_partials + (number * quantities + q) * p.channels + v * L, scaled ? sum * rstd : sum, count);
          }
        }
      }
      if (p.dweight == nullptr) continue;
      for (int64_t v = task.vectors.begin; v < task.vectors.end; ++v) {
        for (int64_t q = 0; q < taps; ++q) {
          store(weight_partials + (task.partial * taps + q) * p.channels + v * L,
                load(dweight + ((v - task.vectors.begin) * taps + q) * L), lane_count(plan, v));
        }
      }
    }
    if (streamed) end_streams();
  });
  if (quantities == 2) merge_sums<T>(1, p.images * sum_tiles, 2, p.channels, sum_partials, p.sums.out);
  if (quantities == 5) merge_sums<T>(p.images, sum_tiles, 5, p.channels, sum_partials, p.sums.out);
  if (p.dweight) merge_weight_gradient<T>(weight_tiles, p.channels, taps, weight_partials, p.dweight);
}

}  // namespace MBN_ISA
}  // namespace mbn
