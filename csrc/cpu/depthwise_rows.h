// The inner loops of the depthwise kernels: one output row of one vector of channels, from rows in scratch. Compiled per number type and window
// width; rows come as a list of taps, so that any height, vertical stride, dilation or edge costs only the taps that exist.
#pragma once

#include "depthwise_plan.h"

namespace mbn {
namespace MBN_ISA {

// A row of scratch and the row of weights that it meets, as offsets: the same taps serve every vector of a block.
struct Tap {
  int64_t row, weight;
};

template <class T>
struct RowWork {
  const T* rows;
  const T* weights;
  const Tap* taps;
  int64_t count;
  int64_t kernel, stride, dilation;  // across columns; only the general form reads them
};

// KW = 0: any width, stride and dilation.
template <class T, int KW, int SX, int B>
MBN_INLINE void convolve_block(const RowWork<T>& work, int64_t column, T* out) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[B] = {};
  for (int64_t t = 0; t < work.count; ++t) {
    const T* w = work.weights + work.taps[t].weight;
    if constexpr (KW == 0) {
      const T* x = work.rows + work.taps[t].row + column * work.stride * L;
      for (int64_t k = 0; k < work.kernel; ++k) {
        const Vec<T> wk = load(w + k * L);
        const T* xk = x + k * work.dilation * L;
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) sum[b] += load(xk + b * work.stride * L) * wk;
      }
    } else {
      const T* x = work.rows + work.taps[t].row + column * SX * L;
      Vec<T> wk[KW];
#pragma GCC unroll 8
      for (int k = 0; k < KW; ++k) wk[k] = load(w + k * L);
#pragma GCC unroll 32
      for (int j = 0; j < (B - 1) * SX + KW; ++j) {
        const Vec<T> xj = load(x + j * L);
#pragma GCC unroll 8
        for (int k = 0; k < KW; ++k) {
          if (j >= k && (j - k) % SX == 0 && (j - k) / SX < B) sum[(j - k) / SX] += xj * wk[k];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) store(out + b * L, sum[b]);
}

// Blocks of B columns over [begin, end), a multiple of B. Not inlined: every B is compiled once.
template <class T, int KW, int SX, int B>
static __attribute__((noinline)) void convolve_blocks(const RowWork<T>& work, T* out, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; column += B) convolve_block<T, KW, SX, B>(work, column, out + column * kLanes<T>);
}

template <int B, class F>
MBN_INLINE void with_block(int64_t n, const F& f) {  // f(LanesTag<n>{}) for 1 <= n <= B
  if constexpr (B > 1) {
    if (n < B) return with_block<B - 1>(n, f);
  }
  return f(LanesTag<B>{});
}

// out[column] for `columns` outputs, in blocks of two sizes that differ by one, so that no narrow block is left over.
template <class T, int KW, int SX>
static void convolve_row(const RowWork<T>& work, T* out, int64_t columns) {
  constexpr int kBlock = KW == 0 ? 4 : 8;
  if (columns <= 0) return;
  const int64_t blocks = ceil_div(columns, kBlock), size = columns / blocks, larger_blocks = columns - size * blocks;
  const int64_t split = larger_blocks * (size + 1);
  if (split > 0) {
    with_block<kBlock>(size + 1, [&](auto n) { convolve_blocks<T, KW, SX, n>(work, out, 0, split); });
  }
  with_block<kBlock>(size, [&](auto n) { convolve_blocks<T, KW, SX, n>(work, out, split, columns); });
}

// The transpose at stride 2: from a block of B columns of the gradient, 2*B columns of the input's gradient, each from the taps of its parity
// only. Output column 2*i + r takes weights k = r, r+2, ... from gradient column i - k/2; column 0 of the row is gradient column -(KW-1)/2.
template <class T, int KW, int B>
MBN_INLINE void spread_block(const RowWork<T>& work, int64_t column, T* out) {
  constexpr int L = kLanes<T>, kBefore = (KW - 1) / 2;
  Vec<T> sum[2 * B] = {};
  for (int64_t t = 0; t < work.count; ++t) {
    const T* w = work.weights + work.taps[t].weight;
    const T* x = work.rows + work.taps[t].row + column * L;
    Vec<T> wk[KW];
#pragma GCC unroll 8
    for (int k = 0; k < KW; ++k) wk[k] = load(w + k * L);
#pragma GCC unroll 32
    for (int j = 0; j < B + kBefore; ++j) {
      const Vec<T> xj = load(x + j * L);
#pragma GCC unroll 8
      for (int k = 0; k < KW; ++k) {
        const int i = j - kBefore + k / 2;
        if (i >= 0 && i < B) sum[2 * i + k % 2] += xj * wk[k];
      }
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < 2 * B; ++b) store(out + b * L, sum[b]);
}
template <class T, int KW>
static void spread_row(const RowWork<T>& work, T* out, int64_t pairs) {
  constexpr int L = kLanes<T>, kBlock = 4;
  int64_t column = 0;
  for (; column + kBlock <= pairs; column += kBlock) spread_block<T, KW, kBlock>(work, column, out + 2 * column * L);
  if (column < pairs) {
    with_block<kBlock - 1>(pairs - column, [&](auto rest) { spread_block<T, KW, rest>(work, column, out + 2 * column * L); });
  }
}

// The transpose of any window: adds each gradient column to the input columns that it reached. Column i of the row is the gradient column
// `first` + i, column 0 of `out` the input column `origin`.
template <class T>
static void scatter_row(const RowWork<T>& work, T* out, Range outputs, int64_t pad, Range reached, int64_t first) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < length(outputs); ++i) store(out + i * L, Vec<T>{});
  for (int64_t t = 0; t < work.count; ++t) {
    const T* x = work.rows + work.taps[t].row;
    for (int64_t k = 0; k < work.kernel; ++k) {
      const Vec<T> w = load(work.weights + work.taps[t].weight + k * L);
      for (int64_t c = reached.begin; c < reached.end; ++c) {
        const int64_t to = c * work.stride - pad + k * work.dilation;
        if (to < outputs.begin || to >= outputs.end) continue;
        T* o = out + (to - outputs.begin) * L;
        store(o, load(o) + load(x + (c - first) * L) * w);
      }
    }
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
