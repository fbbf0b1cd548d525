// The inner loops of the depthwise kernels: a tile of a few columns and rows of one vector of channels, from rows in scratch. Compiled per number
// type and window width; rows come as a list of taps, so that any height, vertical stride, dilation or edge costs only the taps that exist.
#pragma once

#include "depthwise_plan.h"

namespace mbn {
namespace MBN_ISA {

// A row of scratch and the row of weights that it meets, as offsets: the same taps serve every vector of a block.
struct Tap {
  int64_t row, weight;
};

// The rows of a chunk, for a tile of B columns and all its rows. Tiles are [row][column][lane].
struct TileRows {
  const Tap* taps;        // [rows][kernel_h]
  const int64_t* counts;  // [rows]: taps that exist
  int64_t rows, kernel_h;
  const int64_t* columns;  // [columns][kernel_w]: offset from the row's begin, or -1; only the general form reads it
  int64_t kernel_w;
};

template <class T>
using TileKernel = void (*)(const TileRows&, const T* rows, const T* weights, int64_t column, T* tile);

// Windows of a compiled width and horizontal stride.
template <class T, int KW, int SX, int B>
static void convolve_tile(const TileRows& work, const T* rows, const T* weights, int64_t column, T* tile) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < work.rows; ++r, tile += B * L) {
    Vec<T> sum[B] = {};
    const Tap* tap = work.taps + r * work.kernel_h;
    for (const Tap* end = tap + work.counts[r]; tap != end; ++tap) {
      const T* x = rows + tap->row + column * SX * L;
      Vec<T> w[KW];
#pragma GCC unroll 8
      for (int k = 0; k < KW; ++k) w[k] = load(weights + tap->weight + k * L);
#pragma GCC unroll 32
      for (int j = 0; j < (B - 1) * SX + KW; ++j) {
        Vec<T> xj = load(x + j * L);
        keep_in_register(xj);
#pragma GCC unroll 8
        for (int k = 0; k < KW; ++k) {
          if (j >= k && (j - k) % SX == 0 && (j - k) / SX < B) sum[(j - k) / SX] += xj * w[k];
        }
      }
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) store(tile + b * L, sum[b]);
  }
}

// The transpose at stride 2: from B columns of the gradient, 2*B columns of the input's gradient, each from the taps of its parity only.
// Column 2*i + r takes weights k = r, r+2, ... from gradient column i - k/2; column 0 of the row is gradient column -(KW-1)/2.
template <class T, int KW, int B>
static void spread_tile(const TileRows& work, const T* rows, const T* weights, int64_t column, T* tile) {
  constexpr int L = kLanes<T>, kBefore = (KW - 1) / 2;
  for (int64_t r = 0; r < work.rows; ++r, tile += 2 * B * L) {
    Vec<T> sum[2 * B] = {};
    const Tap* tap = work.taps + r * work.kernel_h;
    for (const Tap* end = tap + work.counts[r]; tap != end; ++tap) {
      const T* x = rows + tap->row + column * L;
      Vec<T> w[KW];
#pragma GCC unroll 8
      for (int k = 0; k < KW; ++k) w[k] = load(weights + tap->weight + k * L);
#pragma GCC unroll 32
      for (int j = 0; j < B + kBefore; ++j) {
        Vec<T> xj = load(x + j * L);
        keep_in_register(xj);
#pragma GCC unroll 8
        for (int k = 0; k < KW; ++k) {
          const int i = j - kBefore + k / 2;
          if (i >= 0 && i < B) sum[2 * i + k % 2] += xj * w[k];
        }
      }
    }
#pragma GCC unroll 16
    for (int b = 0; b < 2 * B; ++b) store(tile + b * L, sum[b]);
  }
}

// Any window and its transpose: where each column reads is looked up.
template <class T, int B>
static void general_tile(const TileRows& work, const T* rows, const T* weights, int64_t column, T* tile) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < work.rows; ++r, tile += B * L) {
    Vec<T> sum[B] = {};
    const Tap* tap = work.taps + r * work.kernel_h;
    for (const Tap* end = tap + work.counts[r]; tap != end; ++tap) {
      for (int64_t k = 0; k < work.kernel_w; ++k) {
        const Vec<T> w = load(weights + tap->weight + k * L);
        for (int b = 0; b < B; ++b) {
          const int64_t at = work.columns[(column + b) * work.kernel_w + k];
          if (at >= 0) sum[b] += load(rows + tap->row + at) * w;
        }
      }
    }
    for (int b = 0; b < B; ++b) store(tile + b * L, sum[b]);
  }
}

// The kernels for one window: at[B] makes a tile from B columns, `width` outputs for each of them.
constexpr int kTileColumns = 8;
template <class T>
struct TileKernels {
  TileKernel<T> at[kTileColumns + 1];
  int64_t most, width;
};
template <class T, int KW, int SX>
MBN_INLINE TileKernels<T> convolve_kernels() {
  return {{nullptr, convolve_tile<T, KW, SX, 1>, convolve_tile<T, KW, SX, 2>, convolve_tile<T, KW, SX, 3>, convolve_tile<T, KW, SX, 4>,
           convolve_tile<T, KW, SX, 5>, convolve_tile<T, KW, SX, 6>, convolve_tile<T, KW, SX, 7>, convolve_tile<T, KW, SX, 8>},
          8,
          1};
}
template <class T, int KW>
MBN_INLINE TileKernels<T> spread_kernels() {
  return {{nullptr, spread_tile<T, KW, 1>, spread_tile<T, KW, 2>, spread_tile<T, KW, 3>, spread_tile<T, KW, 4>}, 4, 2};
}
template <class T>
MBN_INLINE TileKernels<T> general_kernels() {
  return {{nullptr, general_tile<T, 1>, general_tile<T, 2>, general_tile<T, 3>, general_tile<T, 4>}, 4, 1};
}

// Runs f(kernel, first column, columns) over [0, columns), in tiles of two sizes that differ by one: no narrow tile is left over.
template <class T, class F>
MBN_INLINE void for_tiles(const TileKernels<T>& kernels, int64_t columns, const F& f) {
  if (columns <= 0) return;
  const int64_t tiles = ceil_div(columns, kernels.most), size = columns / tiles, wider = columns - size * tiles;
  int64_t begin = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t n = size + (i < wider);
    f(kernels.at[n], begin, n);
    begin += n;
  }
}

// What the weight's gradient reads: for each row of the gradient its scratch row, and the value row under each row of the window.
template <class T>
struct WeightWork {
  const T* gradients;
  const T* values;
  const int64_t* gradient_rows;  // [rows]
  const int64_t* value_rows;     // [rows][kernel_h]
  int64_t rows, columns, kernel_h, kernel, stride, dilation;
};

// into[kh][k] += sum over rows and columns, for the NH rows of the window that begin at kh. The sum stays in registers.
template <class T, int KW, int SX, int NH>
MBN_INLINE void weight_gradient_of(const WeightWork<T>& work, int64_t kh, T* into) {
  constexpr int L = kLanes<T>, B = 4;
  Vec<T> sum[NH][KW] = {};
  for (int64_t r = 0; r < work.rows; ++r) {
    const T* d = work.gradients + work.gradient_rows[r];
    const T* x[NH];
#pragma GCC unroll 8
    for (int h = 0; h < NH; ++h) x[h] = work.values + work.value_rows[r * work.kernel_h + kh + h];
    int64_t column = 0;
    for (; column + B <= work.columns; column += B) {
      Vec<T> dj[B];
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) dj[b] = load(d + (column + b) * L);
#pragma GCC unroll 8
      for (int h = 0; h < NH; ++h) {
#pragma GCC unroll 32
        for (int j = 0; j < (B - 1) * SX + KW; ++j) {
          const Vec<T> xj = load(x[h] + (column * SX + j) * L);
#pragma GCC unroll 8
          for (int k = 0; k < KW; ++k) {
            if (j >= k && (j - k) % SX == 0 && (j - k) / SX < B) sum[h][k] += xj * dj[(j - k) / SX];
          }
        }
      }
    }
    for (; column < work.columns; ++column) {
      const Vec<T> dj = load(d + column * L);
#pragma GCC unroll 8
      for (int h = 0; h < NH; ++h) {
#pragma GCC unroll 8
        for (int k = 0; k < KW; ++k) sum[h][k] += load(x[h] + (column * SX + k) * L) * dj;
      }
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < NH; ++h) {
#pragma GCC unroll 8
    for (int k = 0; k < KW; ++k) {
      T* to = into + ((kh + h) * KW + k) * L;
      store(to, load(to) + sum[h][k]);
    }
  }
}

template <class T, int KW, int SX>
static void weight_gradient(const WeightWork<T>& work, T* into) {
  constexpr int L = kLanes<T>;
  if constexpr (KW == 0) {
    for (int64_t kh = 0; kh < work.kernel_h; ++kh) {
      for (int64_t k = 0; k < work.kernel; ++k) {
        Vec<T> sum = {};
        for (int64_t r = 0; r < work.rows; ++r) {
          const T* d = work.gradients + work.gradient_rows[r];
          const T* x = work.values + work.value_rows[r * work.kernel_h + kh] + k * work.dilation * L;
          for (int64_t c = 0; c < work.columns; ++c) sum += load(d + c * L) * load(x + c * work.stride * L);
        }
        T* to = into + (kh * work.kernel + k) * L;
        store(to, load(to) + sum);
      }
    }
  } else {
    // As many accumulators as registers hold beside four columns of the gradient; each chain needs company, as an addition takes four cycles.
    constexpr int kRegisters = MBN_VECTOR_BYTES == 64 ? 32 : 16, kFit = (kRegisters - 6) / KW;
    constexpr int NH = kFit < 1 ? 1 : kFit < KW ? kFit : KW;
    int64_t kh = 0;
    for (; kh + NH <= work.kernel_h; kh += NH) weight_gradient_of<T, KW, SX, NH>(work, kh, into);
    for (; kh < work.kernel_h; ++kh) weight_gradient_of<T, KW, SX, 1>(work, kh, into);
  }
}

// The compiled form for a window, chosen once per call.
template <int KW, int SX>
struct WidthTag {
  static constexpr int kernel = KW, stride = SX;
};
template <class F>
MBN_INLINE auto with_width(const Window& w, const F& f) {
  if (w.dilation_w == 1 && w.stride_w == 1) {
    if (w.kernel_w == 3) return f(WidthTag<3, 1>{});
    if (w.kernel_w == 5) return f(WidthTag<5, 1>{});
    if (w.kernel_w == 7) return f(WidthTag<7, 1>{});
  }
  if (w.dilation_w == 1 && w.stride_w == 2) {
    if (w.kernel_w == 3) return f(WidthTag<3, 2>{});
    if (w.kernel_w == 5) return f(WidthTag<5, 2>{});
    if (w.kernel_w == 7) return f(WidthTag<7, 2>{});
  }
  return f(WidthTag<0, 0>{});
}

}  // namespace MBN_ISA
}  // namespace mbn
