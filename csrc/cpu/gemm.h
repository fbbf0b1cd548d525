// The matrix product of the pointwise kernels: how rows are split, how operands are packed, and the register-tiled inner loop.
//
// Operands live in panels of a few vectors of columns, each panel a dense [rows][columns] matrix. Panels of kPanel columns serve as the left
// operand (rows kPanel apart, steps 1), as the transposed left operand (rows 1, steps kPanel) and as the right operand (one row per step).
// WideColumns are for right operands alone: a tile of 9 x 3 vectors loads a quarter less per multiplication than one of 12 x 2.
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

// Rows of a register tile of up to 2 and of 3 vectors: rows * vectors accumulators, and what is left of the registers for the operands.
#if defined(__aarch64__)
constexpr int kTileRows = 12, kWideRows = 8;
#else
constexpr int kTileRows = MBN_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kWideRows = MBN_VECTOR_BYTES == 64 ? 9 : MBN_VECTOR_BYTES == 32 ? 4 : 0;
#endif

template <class T>
MBN_INLINE int64_t panel_count(int64_t channels) {
  return ceil_div(channels, kPanel<T>);
}
constexpr int kWideVectors = kWideRows > 0 ? 3 : 2;
constexpr int tile_rows(int vectors) { return vectors == 3 ? kWideRows : kTileRows; }

// Vectors of the panel that begins at channel c.
template <class T>
MBN_INLINE int panel_vectors(int64_t channels, int64_t c) {
  return channels - c > kLanes<T> ? kPanelVectors : 1;
}

// Columns in panels of 3 vectors, and of 2 or 1 at the end; panel j is a dense [depth][vectors(j)] matrix at begin(j) * depth.
template <class T>
struct WideColumns {
  int64_t channels, wide, count;  // wide: panels of kWideVectors

  int64_t begin(int64_t j) const { return (j < wide ? j * kWideVectors : wide * kWideVectors + (j - wide) * 2) * kLanes<T>; }
  int vectors(int64_t j) const {
    const int64_t left = ceil_div(channels - begin(j), kLanes<T>);
    return j < wide ? kWideVectors : int(smaller<int64_t>(left, 2));
  }
  // Real channels of the last vector.
  int last(int64_t j) const { return int(smaller<int64_t>(kLanes<T>, channels - begin(j) - (vectors(j) - 1) * kLanes<T>)); }
  int64_t step(int64_t j) const { return vectors(j) * kLanes<T>; }
  // The panel of a vector of channels.
  int64_t panel_of(int64_t vector) const {
    return vector < wide * kWideVectors ? vector / kWideVectors : wide + (vector - wide * kWideVectors) / 2;
  }
  int64_t size() const { return ceil_div(channels, kLanes<T>) * kLanes<T>; }
};
template <class T>
MBN_INLINE WideColumns<T> wide_columns(int64_t channels) {
  const int64_t vectors = ceil_div(channels, kLanes<T>);
  // 4 vectors are better 2 + 2 than 3 + 1.
  int64_t wide = vectors / kWideVectors;
  if (kWideVectors == 3 && vectors % 3 == 1 && wide > 0) --wide;
  return {channels, wide, wide + ceil_div(vectors - wide * kWideVectors, 2)};
}

// ---- Splitting rows -------------------------------------------------------------------------------------------------------------

constexpr int64_t kBlockRows = 100;  // a block's panels stay in the second-level cache while every column panel passes over them
constexpr int64_t kMaxChunks = 64;

// The rows [0, images * pixels) as blocks, by shape alone: the number of threads changes no result. Aligned blocks hold part of one image
// or several whole images.
struct Blocks {
  int64_t groups, rows, parts, count;  // parts: blocks of one group of `rows` rows; 0: a block holds several groups

  int64_t begin(int64_t b) const {
    return parts > 0 ? b / parts * rows + b % parts * rows / parts : b * groups / count * rows;
  }
};

// A multiple of 4 where `most` allows it: an even share for 2 or 4 threads.
MBN_INLINE int64_t even_count(int64_t count, int64_t most) {
  return larger(count, smaller(ceil_div(count, 4) * 4, most));
}
// Blocks of at least `least` rows where the shape has as many.
MBN_INLINE Blocks split_rows(int64_t images, int64_t pixels, bool aligned, int64_t least) {
  const int64_t rows = images * pixels;
  if (rows == 0) return {0, 0, 1, 0};
  if (!aligned) {
    const int64_t count = even_count(ceil_div(rows, kBlockRows), rows / least);
    return {1, rows, count, count};
  }
  const int64_t parts = ceil_div(pixels, kBlockRows);
  if (parts > 1) return {images, pixels, parts, images * parts};
  return {images, pixels, 0, even_count(ceil_div(images, kBlockRows / pixels), images)};
}

// Tiles of nearly equal height: 49 rows are 10 + 10 + 10 + 10 + 9, not 4 * 12 + 1. Calls f(first row, rows).
template <class F>
MBN_INLINE void for_tiles(int64_t rows, int most, const F& f) {
  const int tiles = (int(rows) + most - 1) / most, height = int(rows) / larger(1, tiles), higher = int(rows) - height * tiles;
  int64_t row = 0;
  for (int i = 0; i < tiles; ++i) {
    const int tile = height + (i < higher);
    f(row, tile);
    row += tile;
  }
}

template <class F>
MBN_INLINE void for_tiles(int64_t rows, const F& f) {
  for_tiles(rows, kTileRows, f);
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
template <class F>
MBN_INLINE void with_wide_tile(int rows, int vectors, const F& f) {
  if constexpr (kWideVectors == 3) {
    if (vectors == 3) return with_tile_rows<3, kWideRows>(rows, f);
  }
  with_tile(rows, vectors, f);
}

// ---- The inner loop -------------------------------------------------------------------------------------------------------------

template <class T, int R, int NV>
struct Tile {
  Vec<T> at[R][NV];
};

// acc[r][:] += sum over k of a[r * RowStep + k * KStep] * b[k * RightStep + :].
template <int RowStep, int KStep, int RightStep, class T, int R, int NV>
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
    b += RightStep;
  }
}

// A tile of left * right from zero; `left` points at the tile's first row in panel 0, `right` is one whole panel.
template <class T, int R, int NV, int RightStep = kPanel<T>>
MBN_INLINE Tile<T, R, NV> product(const T* left, int64_t panel_stride, const T* right, int64_t depth) {
  // In parts of 256 steps: one chain of a thousand additions loses digits that shorter ones keep.
  constexpr int64_t kPart = 256;
  Tile<T, R, NV> total = {};
  for (bool first = true;; first = false) {
    Tile<T, R, NV> acc = {};
    const int64_t rest = depth - kPart;
    for (; depth > 0 && depth > rest; depth -= kPanel<T>) {
      multiply<kPanel<T>, 1, RightStep>(acc, left, right, smaller<int64_t>(depth, kPanel<T>));
      left += panel_stride;
      right += kPanel<T> * RightStep;
    }
    if (first && depth <= 0) return acc;
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      MBN_UNROLL
      for (int v = 0; v < NV; ++v) total.at[r][v] += acc.at[r][v];
    }
    if (depth <= 0) return total;
  }
}

// ---- Prefetching ----------------------------------------------------------------------------------------------------------------

// Asks for what the next block will read while this one computes: each call of step() a share of up to three arrays.
struct Ahead {
  struct Range {
    const char *at, *end;
    int64_t share;
  } ranges[3];
};
MBN_INLINE void prefetch_step(Ahead& ahead) {
  for (auto& range : ahead.ranges) {
    const char* until = smaller(range.end, range.at + range.share);
    for (; range.at < until; range.at += 64) __builtin_prefetch(range.at, 0, 2);
  }
}
template <class S>
MBN_INLINE void prefetch_rows(Ahead::Range& range, const S* array, int64_t begin, int64_t end, int64_t channels, int64_t steps) {
  if (array == nullptr || begin >= end) {
    range = {nullptr, nullptr, 0};
    return;
  }
  const char *at = reinterpret_cast<const char*>(array + begin * channels), *last = reinterpret_cast<const char*>(array + end * channels);
  range = {at, last, ceil_div(last - at, 64 * larger<int64_t>(1, steps)) * 64};
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
// Lane i of the result is lane P::at(i) of a and b put end to end.
template <class P, class T, int... I>
MBN_INLINE Vec<T> permute(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, P::at(I)...);
#else
  return __builtin_shuffle(a, b, typename LaneIndex<T>::type{P::at(I)...});
#endif
}
// Both permutations below stay within what one instruction does, which an arbitrary one does not.
// In each 16 bytes: units of Unit lanes, from a and b by turns, of the lower or upper half.
template <int L, int Quarter, int Unit, int Upper>
struct Zip {
  static constexpr int at(int i) {
    const int unit = i % Quarter / Unit, from = unit / 2 * Unit + i % Unit + Upper * Quarter / 2;
    return unit % 2 * L + i / Quarter * Quarter + from;
  }
};
// Every Stride-th group of 16 bytes: of a in the lower half of the result, of b in the upper.
template <int L, int Quarter, int First, int Stride>
struct Pick {
  static constexpr int at(int i) {
    const int groups = L / Quarter, group = i / Quarter, half = groups / 2;
    return group / half * L + (First + group % half * Stride) * Quarter + i % Quarter;
  }
};

// Transposes a square of vectors.
template <class T>
MBN_INLINE void transpose(Vec<T> (&m)[kLanes<T>]) {
  constexpr int L = kLanes<T>, Q = 16 / sizeof(T), G = L / Q;
  constexpr auto lanes = std::make_integer_sequence<int, L>{};
  // s[g][j], group l: rows g*Q.. of column l*Q + j.
  Vec<T> s[G][Q];
  MBN_UNROLL
  for (int g = 0; g < G; ++g) {
    const Vec<T>* r = m + g * Q;
    if constexpr (Q == 2) {
      s[g][0] = permute<Zip<L, Q, 1, 0>, T>(r[0], r[1], lanes);
      s[g][1] = permute<Zip<L, Q, 1, 1>, T>(r[0], r[1], lanes);
    } else {
      const Vec<T> low01 = permute<Zip<L, Q, 1, 0>, T>(r[0], r[1], lanes), high01 = permute<Zip<L, Q, 1, 1>, T>(r[0], r[1], lanes);
      const Vec<T> low23 = permute<Zip<L, Q, 1, 0>, T>(r[2], r[3], lanes), high23 = permute<Zip<L, Q, 1, 1>, T>(r[2], r[3], lanes);
      s[g][0] = permute<Zip<L, Q, 2, 0>, T>(low01, low23, lanes);
      s[g][1] = permute<Zip<L, Q, 2, 1>, T>(low01, low23, lanes);
      s[g][2] = permute<Zip<L, Q, 2, 0>, T>(high01, high23, lanes);
      s[g][3] = permute<Zip<L, Q, 2, 1>, T>(high01, high23, lanes);
    }
  }
  MBN_UNROLL
  for (int j = 0; j < Q; ++j) {
    if constexpr (G == 1) m[j] = s[0][j];
    if constexpr (G == 2) {
      m[j] = permute<Pick<L, Q, 0, 1>, T>(s[0][j], s[1][j], lanes);
      m[Q + j] = permute<Pick<L, Q, 1, 1>, T>(s[0][j], s[1][j], lanes);
    }
    if constexpr (G == 4) {
      const Vec<T> low01 = permute<Pick<L, Q, 0, 1>, T>(s[0][j], s[1][j], lanes), high01 = permute<Pick<L, Q, 2, 1>, T>(s[0][j], s[1][j], lanes);
      const Vec<T> low23 = permute<Pick<L, Q, 0, 1>, T>(s[2][j], s[3][j], lanes), high23 = permute<Pick<L, Q, 2, 1>, T>(s[2][j], s[3][j], lanes);
      m[j] = permute<Pick<L, Q, 0, 2>, T>(low01, low23, lanes);
      m[Q + j] = permute<Pick<L, Q, 1, 2>, T>(low01, low23, lanes);
      m[2 * Q + j] = permute<Pick<L, Q, 0, 2>, T>(high01, high23, lanes);
      m[3 * Q + j] = permute<Pick<L, Q, 1, 2>, T>(high01, high23, lanes);
    }
  }
}

// Columns [c, c + vectors) of weight^T [in][out], where weight is [out][in], to rows `step` apart.
template <class S>
static void pack_transposed_panel(Accumulate<S>* panel, int64_t step, const S* weight, int64_t out, int64_t in, int64_t c, int vectors) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  for (int v = 0; v < vectors; ++v, c += L) {
    const int64_t real = smaller<int64_t>(L, out - c);
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
      T* to = panel + k * step + v * L;
      MBN_UNROLL
      for (int i = 0; i < L; ++i) {
        if (i < steps) store(to + i * step, m[i]);
      }
    }
  }
}
// The same columns of weight [out][in].
template <class S>
static void pack_panel(Accumulate<S>* panel, int64_t step, const S* weight, int64_t out, int64_t in, int64_t c, int vectors) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  for (int64_t k = 0; k < out; ++k) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t cv = c + v * L;
      store(panel + k * step + v * L, load_within(weight + k * in + cv, int(smaller<int64_t>(L, in - cv)), weight + out * in));
    }
  }
}

struct PackedPanel {
  int64_t begin, step;
  int vectors;
};
// WideColumns, one by one.
template <class T>
struct WidePanelsOf {
  const WideColumns<T>& columns;
  PackedPanel operator()(int64_t j) const { return {columns.begin(j), columns.step(j), columns.vectors(j)}; }
};

// weight (or its transpose) as the right operand of a product.
template <bool Transposed, class S, class Panels>
MBN_INLINE void pack_panels_to(Accumulate<S>* packed, const S* weight, int64_t out, int64_t in, int64_t count, const Panels& panels) {
  const int64_t depth = Transposed ? in : out;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const PackedPanel panel = panels(j);
      if constexpr (Transposed) {
        pack_transposed_panel<S>(packed + panel.begin * depth, panel.step, weight, out, in, panel.begin, panel.vectors);
      } else {
        pack_panel<S>(packed + panel.begin * depth, panel.step, weight, out, in, panel.begin, panel.vectors);
      }
    }
  };
  // Waking the other threads costs more than packing a small weight.
  if (out * in < 16384) {
    body(0, count);
  } else {
    parallel_tasks(count, body);
  }
}
// The same in the caller's scratch memory.
template <bool Transposed, class S>
MBN_INLINE const Accumulate<S>* pack_weight(Scratch& scratch, const S* weight, int64_t out, int64_t in,
                                            const WideColumns<Accumulate<S>>& columns) {
  using T = Accumulate<S>;
  T* packed = take<T>(scratch, columns.size() * (Transposed ? in : out));
  pack_panels_to<Transposed>(packed, weight, out, in, columns.count, WidePanelsOf<T>{columns});
  return packed;
}

}  // namespace MBN_ISA
}  // namespace mbn
