// The matrix product of the pointwise kernels: how rows are split, how operands are packed, and the register-tiled inner loop.
//
// Both operands live in panels of kPanel columns: element (row, c) of a matrix is at panels[c / kPanel][row][c % kPanel], so a panel
// is a dense [rows][kPanel] matrix. The same panels serve as the left operand (rows stride kPanel, steps 1), as the transposed left
// operand (rows 1, steps kPanel) and as the right operand (one vector load per step).
#pragma once

#include <utility>

#include "vec.h"

#if defined(__clang__)
#define MBN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MBN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace mbn {
namespace MBN_ISA {

constexpr int kPanelVectors = 2;
template <class T>
constexpr int kPanel = kPanelVectors * kLanes<T>;

// Rows of a register tile: rows * kPanelVectors accumulators, and what is left of the registers for the operands.
#if defined(__aarch64__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = MBN_VECTOR_BYTES == 64 ? 12 : 6;
#endif

template <class T>
MBN_INLINE int64_t panel_count(int64_t channels) {
  return ceil_div(channels, kPanel<T>);
}
// Vectors of the panel that begins at channel c.
template <class T>
MBN_INLINE int panel_vectors(int64_t channels, int64_t c) {
  return channels - c > kLanes<T> ? kPanelVectors : 1;
}

// ---- Splitting rows -------------------------------------------------------------------------------------------------------------

constexpr int64_t kBlockRows = 96;  // a block's panels stay in the second-level cache while every column panel passes over them
constexpr int64_t kMaxChunks = 64;

// The rows [0, images * pixels) as blocks, by shape alone: the number of threads changes no result. Aligned blocks hold part of one image
// or several whole images.
struct Blocks {
  int64_t groups, rows, parts, count;  // parts: blocks of one group of `rows` rows; 0: a block holds several groups

  int64_t begin(int64_t b) const {
    return parts > 0 ? b / parts * rows + b % parts * rows / parts : b * groups / count * rows;
  }
};

// A multiple of 4 where that leaves useful blocks: an even share for 2 or 4 threads.
MBN_INLINE int64_t even_count(int64_t count, int64_t most) {
  return larger<int64_t>(1, smaller(ceil_div(count, 4) * 4, most));
}
MBN_INLINE Blocks split_rows(int64_t images, int64_t pixels, bool aligned) {
  const int64_t rows = images * pixels;
  if (rows == 0) return {0, 0, 1, 0};
  if (!aligned) {
    const int64_t count = even_count(ceil_div(rows, kBlockRows), rows / 12);
    return {1, rows, count, count};
  }
  const int64_t parts = ceil_div(pixels, kBlockRows);
  if (parts > 1) return {images, pixels, parts, images * parts};
  return {images, pixels, 0, even_count(ceil_div(images, kBlockRows / pixels), images)};
}

// Tiles of nearly equal height: 49 rows are 10 + 10 + 10 + 10 + 9, not 4 * 12 + 1. Calls f(first row, rows).
template <class F>
MBN_INLINE void for_tiles(int64_t rows, const F& f) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = i * rows / tiles;
    f(begin, int((i + 1) * rows / tiles - begin));
  }
}

template <int R, int NV>
struct TileTag {
  static constexpr int rows = R, vectors = NV;
};
// Calls f(TileTag<rows, vectors>{}).
template <int NV, int R, class F>
MBN_INLINE void with_tile_rows(int rows, const F& f) {
  if constexpr (R > 1) {
    if (rows < R) return with_tile_rows<NV, R - 1>(rows, f);
  }
  f(TileTag<R, NV>{});
}
template <class F>
MBN_INLINE void with_tile(int rows, int vectors, const F& f) {
  if (vectors == 1) return with_tile_rows<1, kTileRows>(rows, f);
  with_tile_rows<2, kTileRows>(rows, f);
}

// ---- The inner loop -------------------------------------------------------------------------------------------------------------

template <class T, int R, int NV>
struct Tile {
  Vec<T> at[R][NV];
};

// acc[r][:] += sum over k of a[r * RowStep + k * KStep] * b[k][:], b a panel.
template <int RowStep, int KStep, class T, int R, int NV>
MBN_INLINE void multiply(Tile<T, R, NV>& acc, const T* a, const T* b, int64_t steps) {
  for (int64_t k = 0; k < steps; ++k) {
    Vec<T> right[NV];
    MBN_UNROLL
    for (int v = 0; v < NV; ++v) right[v] = load(b + v * kLanes<T>);
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<T> left = broadcast(a[r * RowStep]);
      MBN_UNROLL
      for (int v = 0; v < NV; ++v) acc.at[r][v] += left * right[v];
    }
    a += KStep;
    b += kPanel<T>;
  }
}

// A tile of left * right from zero; `left` points at the tile's first row in panel 0, `right` is one whole panel.
template <class T, int R, int NV>
MBN_INLINE Tile<T, R, NV> product(const T* left, int64_t panel_stride, const T* right, int64_t depth) {
  Tile<T, R, NV> acc = {};
  for (; depth > 0; depth -= kPanel<T>) {
    multiply<kPanel<T>, 1>(acc, left, right, smaller<int64_t>(depth, kPanel<T>));
    left += panel_stride;
    right += kPanel<T> * kPanel<T>;
  }
  return acc;
}

// ---- Packing weights ------------------------------------------------------------------------------------------------------------

template <class T>
struct LaneIndex;
template <>
struct LaneIndex<float> {
  typedef int32_t type __attribute__((vector_size(MBN_VECTOR_BYTES)));
};
template <>
struct LaneIndex<double> {
  typedef int64_t type __attribute__((vector_size(MBN_VECTOR_BYTES)));
};
// a[h], b[h], a[h+1], b[h+1], ... from h = Half * lanes / 2.
template <class T, int Half, int... I>
MBN_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int L = kLanes<T>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (Half * L / 2 + I / 2 + I % 2 * L)...);
#else
  return __builtin_shuffle(a, b, typename LaneIndex<T>::type{(Half * L / 2 + I / 2 + I % 2 * L)...});
#endif
}
// Transposes a square of vectors: interleaving the first half of the rows with the second, log2(lanes) times.
template <class T>
MBN_INLINE void transpose(Vec<T> (&m)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  constexpr auto lanes = std::make_integer_sequence<int, L>{};
  MBN_UNROLL
  for (int span = 1; span < L; span *= 2) {
    Vec<T> next[L];
    MBN_UNROLL
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<T, 0>(m[i], m[i + L / 2], lanes);
      next[2 * i + 1] = interleave<T, 1>(m[i], m[i + L / 2], lanes);
    }
    MBN_UNROLL
    for (int i = 0; i < L; ++i) m[i] = next[i];
  }
}

// Panel j of weight^T [in][out], where weight is [out][in].
template <class S>
static void pack_transposed_panel(Accumulate<S>* panel, const S* weight, int64_t out, int64_t in, int64_t j) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  for (int v = 0; v < kPanelVectors; ++v) {
    const int64_t c = j * kPanel<T> + v * L, real = smaller<int64_t>(L, out - c);
    if (real <= 0) break;
    for (int64_t k = 0; k < in; k += L) {
      const int steps = int(smaller<int64_t>(L, in - k));
      Vec<T> m[L];
      if (real == L && steps == L) {
        MBN_UNROLL
        for (int i = 0; i < L; ++i) m[i] = load(weight + (c + i) * in + k);
      } else {
        MBN_UNROLL
        for (int i = 0; i < L; ++i) m[i] = i < real ? load_within(weight + (c + i) * in + k, steps, weight + out * in) : Vec<T>{};
      }
      transpose<T>(m);
      T* to = panel + k * kPanel<T> + v * L;
      MBN_UNROLL
      for (int i = 0; i < L; ++i) {
        if (i < steps) store(to + i * kPanel<T>, m[i]);
      }
    }
  }
}
// Panel j of weight [out][in].
template <class S>
static void pack_panel(Accumulate<S>* panel, const S* weight, int64_t out, int64_t in, int64_t j) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  for (int v = 0; v < kPanelVectors; ++v) {
    const int64_t c = j * kPanel<T> + v * L;
    const int real = int(smaller<int64_t>(L, in - c));
    if (real <= 0) break;
    for (int64_t k = 0; k < out; ++k) {
      store(panel + k * kPanel<T> + v * L, load_within(weight + k * in + c, real, weight + out * in));
    }
  }
}

// weight (or its transpose) as the right operand of a product, in the caller's scratch memory.
template <bool Transposed, class S>
MBN_INLINE const Accumulate<S>* pack_weight(Scratch& scratch, const S* weight, int64_t out, int64_t in) {
  using T = Accumulate<S>;
  const int64_t depth = Transposed ? in : out, panels = panel_count<T>(Transposed ? out : in), size = depth * kPanel<T>;
  T* packed = take<T>(scratch, panels * size);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      if constexpr (Transposed) {
        pack_transposed_panel<S>(packed + j * size, weight, out, in, j);
      } else {
        pack_panel<S>(packed + j * size, weight, out, in, j);
      }
    }
  };
  // Waking the other threads costs more than packing a small weight.
  if (panels * size < 16384) {
    body(0, panels);
  } else {
    parallel_tasks(panels, body);
  }
  return packed;
}

}  // namespace MBN_ISA
}  // namespace mbn
