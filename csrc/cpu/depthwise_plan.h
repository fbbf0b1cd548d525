// How the depthwise kernels cut their work: by shape alone, so that no result depends on the number of threads.
//
// A task is (group of images, block of channel vectors, strip of columns, band of rows). Within a band the kernel walks over chunks of a few
// output rows; the rows it needs sit in a ring in scratch, laid out [vector][row][column][lane], so that the inner loops read contiguously.
#pragma once

#include "deferred.h"

namespace mbn {
namespace MBN_ISA {

MBN_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

MBN_INLINE int64_t length(Range r) { return r.end - r.begin; }
MBN_INLINE Range clip(Range r, int64_t limit) {
  const int64_t begin = larger(smaller(r.begin, limit), int64_t{0});
  return {begin, larger(smaller(r.end, limit), begin)};
}
MBN_INLINE Range hull(Range a, Range b) {
  if (length(a) <= 0) return b;
  if (length(b) <= 0) return a;
  return {smaller(a.begin, b.begin), larger(a.end, b.end)};
}

struct Plan {
  int64_t images, channels, height, width, out_height, out_width;
  Window w;
  int64_t lanes, vectors, block_vectors, blocks;
  int64_t strip_columns, strips;  // in output columns
  int64_t chunk_rows, chunks;     // in output rows
  int64_t band_chunks, bands;
  int64_t groups;
  bool serial;

  int64_t tasks() const { return groups * blocks * strips * bands; }
};

struct Task {
  Range images, vectors;
  int64_t strip, band, partial;  // partial: the number of this task among those that share its channels
};

MBN_INLINE Task task_of(const Plan& p, int64_t index) {
  const int64_t band = index % p.bands;
  index /= p.bands;
  const int64_t strip = index % p.strips;
  index /= p.strips;
  const int64_t block = index % p.blocks, group = index / p.blocks;
  return {share(p.images, group, p.groups), share(p.vectors, block, p.blocks), strip, band,
          (group * p.strips + strip) * p.bands + band};
}

// Chunk i owns output rows and, in the backward pass, the input rows at the same place. The same for strips of columns.
MBN_INLINE Range out_rows(const Plan& p, int64_t chunk) {
  return clip({chunk * p.chunk_rows, (chunk + 1) * p.chunk_rows}, p.out_height);
}
MBN_INLINE Range in_rows(const Plan& p, int64_t chunk) {
  const int64_t rows = p.chunk_rows * p.w.stride_h;
  return clip({chunk * rows, (chunk + 1) * rows}, p.height);
}
MBN_INLINE Range out_columns(const Plan& p, int64_t strip) {
  return clip({strip * p.strip_columns, (strip + 1) * p.strip_columns}, p.out_width);
}
MBN_INLINE Range in_columns(const Plan& p, int64_t strip) {
  const int64_t columns = p.strip_columns * p.w.stride_w;
  return clip({strip * columns, (strip + 1) * columns}, p.width);
}

// Rows, or columns, of the input that outputs r read; and of the output that inputs r reach. Not clipped.
MBN_INLINE Range read_by(Range r, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
  if (length(r) <= 0) return {0, 0};
  return {r.begin * stride - pad, (r.end - 1) * stride - pad + (kernel - 1) * dilation + 1};
}
MBN_INLINE Range reached_by(Range r, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
  if (length(r) <= 0) return {0, 0};
  return {floor_div(r.begin + pad - (kernel - 1) * dilation + stride - 1, stride), floor_div(r.end - 1 + pad, stride) + 1};
}

template <class P>
MBN_INLINE Plan plan_of(const P& p, int lanes, bool backward) {
  constexpr int64_t kStrip = 128, kChunkPixels = 224, kBlockVectors = 6, kWorthATask = 32768, kTasks = 64;
  Plan plan = {};
  plan.images = p.images, plan.channels = p.channels;
  plan.height = p.height, plan.width = p.width, plan.out_height = p.out_height, plan.out_width = p.out_width;
  plan.w = p.window;
  plan.lanes = lanes;
  plan.vectors = ceil_div(p.channels, lanes);
  plan.blocks = ceil_div(plan.vectors, kBlockVectors);
  plan.block_vectors = ceil_div(plan.vectors, larger(plan.blocks, int64_t{1}));

  // The extent in output steps: in the backward pass inputs beyond the last output's place have to be written too.
  const int64_t columns = backward ? larger(p.out_width, ceil_div(p.width, p.window.stride_w)) : p.out_width;
  const int64_t rows = backward ? larger(p.out_height, ceil_div(p.height, p.window.stride_h)) : p.out_height;
  plan.strips = larger(ceil_div(columns, kStrip), int64_t{1});
  plan.strip_columns = larger(ceil_div(columns, plan.strips), int64_t{1});
  plan.chunks = larger(ceil_div(rows, larger(kChunkPixels / plan.strip_columns, int64_t{1})), int64_t{1});
  plan.chunk_rows = larger(ceil_div(rows, plan.chunks), int64_t{1});
  plan.chunks = larger(ceil_div(rows, plan.chunk_rows), int64_t{1});

  const int64_t cost = (backward ? 2 : 1) * p.window.kernel_h * p.window.kernel_w + (backward ? 24 : 12);
  const int64_t work = p.images * plan.vectors * rows * columns * cost;
  const int64_t wanted = smaller(larger(work / kWorthATask, int64_t{1}), kTasks);
  const int64_t cut = larger(plan.blocks * plan.strips, int64_t{1});
  plan.groups = smaller(p.images, ceil_div(wanted, cut));
  plan.bands = smaller(plan.chunks, ceil_div(wanted, cut * larger(plan.groups, int64_t{1})));
  plan.band_chunks = ceil_div(plan.chunks, plan.bands);
  plan.bands = ceil_div(plan.chunks, plan.band_chunks);
  plan.serial = work < 2 * kWorthATask;
  return plan;
}

template <class F>
MBN_INLINE void for_tasks(const Plan& plan, const F& f) {
  const auto run = [&](int64_t begin, int64_t end) { f(begin, end); };
  if (plan.serial) return run(int64_t{0}, plan.tasks());
  parallel_tasks(plan.tasks(), run);
}

// Rows of a strip, for every vector of a block; `columns` are the image's columns that a row holds, zero where outside of the image.
template <class T>
struct Ring {
  T* data;
  int64_t slots, row_stride, vector_stride;
  Range columns;
  int64_t next;  // the first row that was not loaded yet
};

template <class T>
MBN_INLINE int64_t ring_row_stride(int64_t columns) {  // an odd number of vectors: rows must not share cache sets
  return (columns | 1) * kLanes<T>;
}
// The slot after the last one exists too, and is zero.
template <class T>
MBN_INLINE Ring<T> make_ring(Scratch& scratch, int64_t vectors, int64_t rows, int64_t columns) {
  const int64_t slots = larger(rows, int64_t{1});
  const int64_t row = ring_row_stride<T>(columns), vector = ((slots + 1) * row / kLanes<T> | 1) * kLanes<T>;
  T* data = take<T>(scratch, vectors * vector);
  for (int64_t v = 0; v < vectors; ++v) __builtin_memset(data + v * vector + slots * row, 0, size_t(row) * sizeof(T));
  return {data, slots, row, vector, {0, 0}, 0};
}
template <class T>
MBN_INLINE int64_t ring_offset(const Ring<T>& ring, int64_t row) {
  return (row % ring.slots) * ring.row_stride;
}

MBN_INLINE int lane_count(const Plan& p, int64_t vector) { return int(smaller(p.lanes, p.channels - vector * p.lanes)); }

// Memory is walked in runs of this many pixels, all vectors of a block for each run: whole pixels one after another is what hardware
// prefetches well, and per-channel numbers are still loaded once per run.
constexpr int64_t kRunPixels = 8;
constexpr int64_t kAheadPixels = 64;  // fetched to the second level: hardware loses a stream that leaps over the other blocks' channels

// Brings rows [rows.begin, rows.end) of image n into the ring: fill(vector, source pixel, pixels, destination) writes a run of one row.
template <class T, class Fill>
MBN_INLINE void load_rows(Ring<T>& ring, Range rows, Range vectors, int64_t n, int64_t height, int64_t width, const Fill& fill) {
  constexpr int L = kLanes<T>;
  const Range inside = clip(ring.columns, width);
  const int64_t before = smaller(inside.begin - ring.columns.begin, length(ring.columns));
  for (int64_t row = larger(ring.next, rows.begin); row < rows.end; ++row) {
    T* to = ring.data + ring_offset(ring, row);
    const int64_t pixel = (n * height + row) * width;
    for (int64_t v = 0; v < length(vectors); ++v) {
      for (int64_t c = 0; c < before; ++c) store(to + v * ring.vector_stride + c * L, Vec<T>{});
      for (int64_t c = before + length(inside); c < length(ring.columns); ++c) store(to + v * ring.vector_stride + c * L, Vec<T>{});
    }
    for (int64_t c = inside.begin; c < inside.end; c += kRunPixels) {
      const int64_t run = smaller(kRunPixels, inside.end - c);
      for (int64_t v = 0; v < length(vectors); ++v) {
        fill(vectors.begin + v, pixel + c, run, to + v * ring.vector_stride + (c - ring.columns.begin) * L);
      }
    }
  }
  ring.next = larger(ring.next, rows.end);
}

template <class S>
static void load_value_rows(Ring<Accumulate<S>>& ring, Range rows, Range vectors, const Plan& p, const Value<S>& u, int64_t n) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  with_act(u.act, [&](auto act) {
    load_rows(ring, rows, vectors, n, p.height, p.width, [&](int64_t v, int64_t pixel, int64_t pixels, T* to) {
      with_lanes<T>(lane_count(p, v), [&](auto count) {
        const ValueLanes<S> lanes = value_lanes(u, n, p.channels, v * L, count);
        const S* from = u.y + pixel * p.channels + v * L;
        const int64_t stride = p.channels;
        for (int64_t i = 0; i < pixels; ++i, from += stride) {
          __builtin_prefetch(from + kAheadPixels * stride, 0, 2);
          store(to + i * L, value_of<decltype(act)::act>(lanes, load(from, count)));
        }
      });
    });
  });
}

template <class S>
static void load_gradient_rows(Ring<Accumulate<S>>& ring, Range rows, Range vectors, const Plan& p, const Gradient<S>& g, int64_t n) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  with_act(g.of.act, [&](auto act) {
    load_rows(ring, rows, vectors, n, p.out_height, p.out_width, [&](int64_t v, int64_t pixel, int64_t pixels, T* to) {
      with_lanes<T>(lane_count(p, v), [&](auto count) {
        const GradientLanes<S> lanes = gradient_lanes(g, n, p.channels, v * L, count);
        const int64_t stride = p.channels, at = pixel * stride + v * L;
        const S *from = g.dv + at, *raw = g.of.y ? g.of.y + at : nullptr;
        for (int64_t i = 0; i < pixels; ++i) {
          __builtin_prefetch(from + (i + kAheadPixels) * stride, 0, 2);
          if (raw) __builtin_prefetch(raw + (i + kAheadPixels) * stride, 0, 2);
          const Vec<T> dv = load(from + i * stride, count), y = raw ? load(raw + i * stride, count) : Vec<T>{};
          store(to + i * L, gradient_of<decltype(act)::act>(lanes, dv, y));
        }
      });
    });
  });
}

// Weights [C, kernel_h, kernel_w] of a block as [vector][kernel_h][kernel_w][lane], mirrored in kernel_w on demand.
template <class S>
static void pack_weights(const Plan& p, const S* weight, Range vectors, bool mirrored, Accumulate<S>* to) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  const int64_t kh = p.w.kernel_h, kw = p.w.kernel_w, taps = kh * kw;
  for (int64_t v = vectors.begin; v < vectors.end; ++v, to += taps * L) {
    const int count = lane_count(p, v);
    for (int64_t q = 0; q < taps; ++q) {
      const int64_t at = mirrored ? q / kw * kw + (kw - 1 - q % kw) : q;
      S lanes[L] = {};
      for (int i = 0; i < count; ++i) lanes[i] = weight[(v * L + i) * taps + q];
      store(to + at * L, load(lanes));
    }
  }
}

}  // namespace MBN_ISA
}  // namespace mbn
