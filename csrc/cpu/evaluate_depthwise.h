// The depthwise part of a block in evaluation: rows of the expanded map come into a ring, a unit of one or two vectors of channels at a time, and leave convolved
// and activated. The ring is [vector][row][column][lane].
#pragma once

#include "depthwise_rows.h"
#include "evaluate_dense.h"

namespace mbn {
namespace MBN_ISA {

// One row of outputs of one vector of channels.
template <class T, class To>
struct ConvolvedRow {
  const T *rows, *weights;
  const Tap* taps;
  int64_t count, kernel, stride, dilation;  // across columns; only the general form reads the last three
  Vec<T> shift;
  To* to;
  Vec<T>* sum;  // of what is written, added; null: not wanted
};

template <class T, class To, int KW, int SX, int B, Act A>
static __attribute__((noinline)) void convolve_columns(const ConvolvedRow<T, To>& work, int64_t column) {
  constexpr int P = kPanel<T>, L = kLanes<T>;
  Vec<T> sum[B];
  MBN_UNROLL
  for (int b = 0; b < B; ++b) sum[b] = Vec<T>{};
  for (int64_t t = 0; t < work.count; ++t) {
    const T* x = work.rows + work.taps[t].row + column * SX * L;
    Vec<T> w[KW];
    MBN_UNROLL
    for (int k = 0; k < KW; ++k) w[k] = load(work.weights + work.taps[t].weight + k * L);
#pragma GCC unroll 32
    for (int j = 0; j < (B - 1) * SX + KW; ++j) {
      Vec<T> xj = load(x + j * L);
      keep_in_register(xj);
      MBN_UNROLL
      for (int k = 0; k < KW; ++k) {
        if (j >= k && (j - k) % SX == 0 && (j - k) / SX < B) sum[(j - k) / SX] += xj * w[k];
      }
    }
  }
  To* to = work.to + column * P;
  const Vec<T> shift = work.shift;
  MBN_UNROLL
  for (int b = 0; b < B; ++b) {
    sum[b] = activate<A>(sum[b] + shift);
    store(to + b * P, sum[b]);
  }
  if (work.sum == nullptr) return;
  Vec<T> all = *work.sum;
  MBN_UNROLL
  for (int b = 0; b < B; ++b) all += sum[b];
  *work.sum = all;
}

// Any window, one column.
template <class T, class To, Act A>
static void convolve_column(const ConvolvedRow<T, To>& work, int64_t column) {
  constexpr int P = kPanel<T>, L = kLanes<T>;
  Vec<T> sum = {};
  for (int64_t t = 0; t < work.count; ++t) {
    const T* x = work.rows + work.taps[t].row + column * work.stride * L;
    for (int64_t k = 0; k < work.kernel; ++k) sum += load(x + k * work.dilation * L) * load(work.weights + work.taps[t].weight + k * L);
  }
  sum = activate<A>(sum + work.shift);
  store(work.to + column * P, sum);
  if (work.sum) *work.sum += sum;
}

constexpr int kRowColumns = 7;  // the sides of maps are multiples of 7 as a rule
template <class T, class To>
struct RowKernels {
  void (*at[kRowColumns + 1])(const ConvolvedRow<T, To>&, int64_t);
  int most;
};
template <class T, class To, int KW, int SX, Act A>
MBN_INLINE RowKernels<T, To> row_kernels() {
  if constexpr (KW == 0) {
    return {{nullptr, convolve_column<T, To, A>}, 1};
  } else {
    return {{nullptr, convolve_columns<T, To, KW, SX, 1, A>, convolve_columns<T, To, KW, SX, 2, A>,
             convolve_columns<T, To, KW, SX, 3, A>, convolve_columns<T, To, KW, SX, 4, A>, convolve_columns<T, To, KW, SX, 5, A>,
             convolve_columns<T, To, KW, SX, 6, A>, convolve_columns<T, To, KW, SX, 7, A>},
            kRowColumns};
  }
}
template <class T, class To>
MBN_INLINE RowKernels<T, To> row_kernels_of(const Window& w, Act act) {
  RowKernels<T, To> kernels;
  with_width(w, [&](auto width) {
    with_act(act_of_tile(act), [&](auto tag) {
      constexpr Act A = decltype(tag)::act;
      if constexpr (!finishes_later(A)) kernels = row_kernels<T, To, width.kernel, width.stride, A>();
    });
  });
  return kernels;
}

// The depthwise convolution of a block's images, row after row: each input row is made once.
template <class S>
struct Depthwise {
  using T = Accumulate<S>;
  using M = Map<S>;
  const Step<S>& p;
  Layer<S> expand;  // no weight: the input's rows are copied, or a dense convolution makes them
  const T *weight, *shift;
  Act act;
  RowKernels<T, M> kernels;
  int64_t span, slots, columns, chunk;  // rows of a window, rows and columns of the ring, output rows made at a time
  int64_t vectors, unit, units;         // of channels; vectors of a unit
  int64_t vector_size() const { return slots * columns * kLanes<T>; }
};

template <class S>
MBN_INLINE Depthwise<S> depthwise_of(const Step<S>& p) {
  using T = Accumulate<S>;
  const Window& w = p.window;
  Depthwise<S> d = {p, layer_of<S>(p.expand, p.in_channels, p.channels), static_cast<const T*>(p.depthwise.weight), p.depthwise.shift,
                    p.depthwise.act, row_kernels_of<T, Map<S>>(w, p.depthwise.act)};
  // Rows enough for tiles of full height; two vectors where their ring stays in the first-level cache.
  constexpr int64_t kChunkPixels = 28, kRingBytes = 26 << 10;
  d.span = (w.kernel_h - 1) * w.dilation_h + 1;
  d.chunk = larger<int64_t>(1, smaller(kChunkPixels / larger<int64_t>(1, p.out_width), p.out_height));
  d.slots = d.span + (d.chunk - 1) * w.stride_h;
  d.columns = larger((p.out_width - 1) * w.stride_w + (w.kernel_w - 1) * w.dilation_w + 1, w.pad_left + p.width) | 1;
  d.vectors = ceil_div(p.channels, kLanes<T>);
  d.unit = kPanelVectors * d.vector_size() * int64_t(sizeof(T)) <= kRingBytes ? kPanelVectors : 1;
  d.units = ceil_div(d.vectors, d.unit);
  return d;
}

// Where the rows of one image come from: a map, or an image from outside through a dense convolution.
template <class S>
struct Source {
  Rows<const Map<S>> map;
  Image<S> image;
  Map<S>* kept;  // of a dense convolution's rows, the last kept_rows: [row % kept_rows], as a map; null: nobody reads them again
  int64_t kept_rows;
};

// The rows of one unit of one image.
template <class S>
struct UnitRing {
  Accumulate<S>* data;
  int64_t next;  // the first row that has not come yet
  Lines<S> lines;
};
template <class S>
MBN_INLINE Dense<S> dense_before(const Step<S>& p) {
  return dense_of<S>(p.dense_window, p.dense, p.dense_channels, p.channels, p.dense_height, p.dense_width, p.width);
}
template <class S>
MBN_INLINE UnitRing<S> take_ring(const Depthwise<S>& d, Scratch& scratch) {
  UnitRing<S> ring = {take<Accumulate<S>>(scratch, d.unit * d.vector_size()), 0, {}};
  if (d.p.dense.weight) ring.lines = take_lines(dense_before(d.p), scratch);
  return ring;
}
// Before the first row: the columns outside of the image are zero, and no row ever overwrites them.
template <class S>
MBN_INLINE void begin_ring(const Depthwise<S>& d, UnitRing<S>& ring, int64_t first_out_row) {
  constexpr int64_t L = kLanes<Accumulate<S>>;
  const int64_t left = d.p.window.pad_left, right = left + d.p.width;
  for (int64_t slot = 0; slot < d.unit * d.slots; ++slot) {
    Accumulate<S>* row = ring.data + slot * d.columns * L;
    __builtin_memset(row, 0, size_t(left * L) * sizeof *row);
    __builtin_memset(row + right * L, 0, size_t((d.columns - right) * L) * sizeof *row);
  }
  ring.next = larger<int64_t>(0, first_out_row * d.p.window.stride_h - d.p.window.pad_top);
  ring.lines.next = 0;
}

template <class S>
static void bring_dense_rows(const Depthwise<S>& d, const Source<S>& from, int64_t vector, int vectors, int64_t begin, int64_t end, UnitRing<S>& ring) {
  using T = Accumulate<S>;
  constexpr int64_t P = kPanel<T>, L = kLanes<T>;
  const Dense<S> dense = dense_before(d.p);
  for (int64_t row = begin; row < end; ++row) {
    T* to = ring.data + (row % d.slots * d.columns + d.p.window.pad_left) * L;
    dense_row<int(L)>(dense, from.image, ring.lines, row, vector, vectors, to, d.vector_size());
    if (from.kept == nullptr) continue;
    const int64_t pixels = from.kept_rows * d.p.width;
    for (int v = 0; v < vectors; ++v) {
      Map<S>* kept = from.kept + (vector + v) / kPanelVectors * pixels * P + row % from.kept_rows * d.p.width * P + (vector + v) % kPanelVectors * L;
      for (int64_t c = 0; c < d.p.width; ++c) store(kept + c * P, load(to + v * d.vector_size() + c * L));
    }
  }
}

// Input rows [begin, end) of an image.
template <class S>
static void bring_rows(const Depthwise<S>& d, const Source<S>& from, int64_t vector, int vectors, int64_t begin, int64_t end, UnitRing<S>& ring) {
  using T = Accumulate<S>;
  using M = Map<S>;
  constexpr int64_t L = kLanes<T>;
  if (d.p.dense.weight) return bring_dense_rows(d, from, vector, vectors, begin, end, ring);
  const int64_t width = d.p.width, step = from.map.step, panel = vector / kPanelVectors, within = vector % kPanelVectors * L;
  const auto place_of = [&](int64_t row, int64_t column) { return int32_t(((row % d.slots) * d.columns + d.p.window.pad_left + column) * L); };
  if (d.expand.weight == nullptr) {
    for (int64_t row = begin; row < end; ++row) {
      const M* x = from.map.data + panel * from.map.panel + row * width * step + within;
      T* to = ring.data + place_of(row, 0);
      for (int64_t c = 0; c < width; ++c) {
        for (int v = 0; v < vectors; ++v) {
          __builtin_prefetch(x + (width + c) * step + v * L, 0, 2);  // the next row's
          store(to + c * L + v * d.vector_size(), load(x + c * step + v * L));
        }
      }
    }
    return;
  }
  ProductTile<M, T> tile = {nullptr,
                            from.map.panel,
                            step,
                            d.expand.weight + panel * weight_panel_size<M>(d.expand.depth) + within * kPair<M>,
                            steps_of<M>(d.expand.depth),
                            d.expand.shift + vector * L,
                            d.expand.act,
                            ring.data,
                            d.vector_size(),
                            nullptr,
                            nullptr,
                            nullptr};
  const int halves = halves_of<T>(d.expand.columns, vector, vectors);
  int64_t row = begin, column = 0;
  for_tiles((end - begin) * width, [&](int64_t pixel, int rows) {
    tile.left = from.map.data + (begin * width + pixel) * step;
    int32_t places[kTileRows];
    if (column + rows <= width) {
      tile.to = ring.data + place_of(row, column);
      tile.places = kEvenRows<int(L)>.at;
      column += rows;
    } else {
      tile.to = ring.data;
      tile.places = places;
      for (int r = 0; r < rows; ++r, ++column) {
        if (column == width) ++row, column = 0;
        places[r] = place_of(row, column);
      }
    }
    if (column == width) ++row, column = 0;
    finished_product<M, T>(tile, rows, halves);
  });
}

// Output rows [begin, end) of a unit; the ring goes on from the rows before. to: row `begin` of the output, from the first panel on.
template <class S>
static void convolve_rows(const Depthwise<S>& d, const Source<S>& from, int64_t unit, int64_t begin, int64_t end, UnitRing<S>& ring, Rows<Map<S>> to,
                          Accumulate<S>* sums) {
  using T = Accumulate<S>;
  using M = Map<S>;
  constexpr int64_t P = kPanel<T>, L = kLanes<T>;
  constexpr int64_t kMostTaps = 64;
  const Window& w = d.p.window;
  const int64_t taps = w.kernel_h * w.kernel_w, width = d.p.out_width, first = unit * d.unit;
  const int vectors = int(smaller(d.unit, d.vectors - first));
  const bool later = finishes_later(d.act);
  const int64_t tiles = ceil_div(width, d.kernels.most), columns = width / tiles, wider = width - columns * tiles;
  Vec<T> total[kPanelVectors] = {};
  Scratch scratch;
  Tap few[kMostTaps];
  Tap* row_taps = w.kernel_h <= kMostTaps ? few : take<Tap>(scratch, w.kernel_h);
  for (int64_t chunk = begin; chunk < end; chunk += d.chunk) {
    const int64_t chunk_end = smaller(chunk + d.chunk, end);
    const int64_t last = smaller(d.p.height, (chunk_end - 1) * w.stride_h - w.pad_top + d.span);
    ring.next = larger(ring.next, chunk * w.stride_h - w.pad_top);
    if (ring.next < last) bring_rows(d, from, first, vectors, ring.next, last, ring), ring.next = last;
    for (int64_t row = chunk; row < chunk_end; ++row) {
      int64_t count = 0;
      for (int64_t k = 0; k < w.kernel_h; ++k) {
        const int64_t in = row * w.stride_h - w.pad_top + k * w.dilation_h;
        if (in >= 0 && in < d.p.height) row_taps[count++] = {in % d.slots * d.columns * L, k * w.kernel_w * L};
      }
      for (int v = 0; v < vectors; ++v) {
        const int64_t c = (first + v) * L;
        M* out = to.data + c / P * to.panel + (row - begin) * width * P + c % P;
        Vec<T> row_sum = {};
        const ConvolvedRow<T, M> work = {ring.data + v * d.vector_size(), d.weight + c * taps, row_taps, count, w.kernel_w, w.stride_w, w.dilation_w,
                                         load(d.shift + c), out,
                                         sums && !later ? &row_sum : nullptr};
        for (int64_t i = 0, column = 0; i < tiles; ++i) {
          const int64_t n = columns + (i < wider);
          d.kernels.at[n](work, column);
          column += n;
        }
        if (later) {
          with_act(d.act, [&](auto act) {
            for (int64_t i = 0; i < width; ++i) {
              const Vec<T> z = activate<decltype(act)::act>(load(out + i * P));
              row_sum += z;
              store(out + i * P, z);
            }
          });
        }
        total[v] += row_sum;
      }
    }
  }
  if (first + vectors == d.vectors) clear_odd_lane(to, d.p.channels, 0, (end - begin) * width);
  if (sums == nullptr) return;
  for (int v = 0; v < vectors; ++v) store(sums + (first + v) * L, total[v]);
}

}  // namespace MBN_ISA
}  // namespace mbn
