// Products of evaluation: a map times a packed weight, finished in registers. Maps and weights are panels of kPanel channels.
//
// Map<S> is what a map's numbers are between stages: those of S, but float for bfloat16 where the processor has no instruction that multiplies it. With that
// instruction two channels are multiplied at a time, so a packed weight holds pairs of rows, channel by channel.
#pragma once

#include "deferred.h"
#include "gemm.h"

namespace mbn {
namespace MBN_ISA {

template <class S>
struct MapOf {
  using type = Accumulate<S>;
};
#if defined(MBN_BF16_PRODUCTS)
template <>
struct MapOf<bf16> {
  using type = bf16;
};
#endif
template <class S>
using Map = typename MapOf<S>::type;

template <class M>
constexpr int kPair = sizeof(M) == 2 ? 2 : 1;  // channels that one multiplication takes
template <class M>
constexpr int kColumns = kPanel<Accumulate<M>>;

template <class M>
MBN_INLINE int64_t steps_of(int64_t depth) {
  return ceil_div(depth, kPair<M>);
}
template <class M>
MBN_INLINE int64_t panels_of(int64_t channels) {
  return ceil_div(channels, kColumns<M>);
}
// Numbers in one panel of a weight, and in all of it.
template <class M>
MBN_INLINE int64_t weight_panel_size(int64_t depth) {
  return steps_of<M>(depth) * kPair<M> * kColumns<M>;
}
template <class M>
MBN_INLINE int64_t weight_size(int64_t columns, int64_t depth) {
  return panels_of<M>(columns) * weight_panel_size<M>(depth);
}

// Rows of channels as panels: channel c of row r is at data[c / kColumns * panel + r * step + c % kColumns].
template <class M>
struct Rows {
  M* data;
  int64_t panel;               // from panel to panel: (rows of the whole map) * kColumns
  int64_t step = kColumns<M>;  // from row to row; of a narrow map kNarrow
};
template <class M>
MBN_INLINE Rows<M> from_row(Rows<M> rows, int64_t row) {
  return {rows.data + row * rows.step, rows.panel, rows.step};
}
template <class M>
MBN_INLINE Rows<const M> reading(Rows<M> rows) {
  return {rows.data, rows.panel, rows.step};
}

// Between steps, a map of no more than one vector of channels is that wide: the largest maps of a network have 16 channels and, half padding, would not stay
// in the second-level cache.
template <class M>
constexpr bool kNarrows = MBN_VECTOR_BYTES == 64 && sizeof(Accumulate<M>) == sizeof(float);
template <class M>
constexpr int64_t kNarrow = kLanes<Accumulate<M>>;
template <class M>
MBN_INLINE int64_t row_step(int64_t channels) {
  return kNarrows<M> && channels <= kNarrow<M> ? kNarrow<M> : kColumns<M>;
}

// A tile applies four of the activations to its sums in registers, each in a kernel of its own: the two minima of a clamp cost a processor as much as two
// multiplications. The others are applied afterwards (finish_rows).
MBN_INLINE constexpr bool finishes_later(Act act) { return act > Act::hardswish; }
MBN_INLINE Act act_of_tile(Act act) { return finishes_later(act) ? Act::identity : act; }

// The lower half of a vector. Channels come in eights: where the last vector of a layer is half padding and the processor has wide vectors, it multiplies half.
template <class T>
struct HalfOf {
  typedef T type __attribute__((vector_size(MBN_VECTOR_BYTES / 2)));
};
template <class T>
using Half = typename HalfOf<T>::type;
#if MBN_VECTOR_BYTES == 64 && __has_builtin(__builtin_shufflevector)
constexpr bool kHalves = true;
template <class T, int... I>
MBN_INLINE Vec<T> widen(Half<T> half, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(half, Half<T>{}, I...);
}
#else
constexpr bool kHalves = false;
template <class T, int... I>
MBN_INLINE Vec<T> widen(Half<T> half, std::integer_sequence<int, I...>);
#endif
// Halves of vectors in a layer's vectors [first, first + vectors).
template <class T>
MBN_INLINE int halves_of(int64_t columns, int64_t first, int vectors) {
  const int64_t missing = (first + vectors) * kLanes<T> - columns;
  return 2 * vectors - (kHalves && missing >= kLanes<T> / 2);
}

// Adds left * right to each vector, or half vector, of a row.
#if defined(MBN_BF16_PRODUCTS)
template <class M, int N>
MBN_INLINE void multiply_row(Vec<float> (&sum)[N], const bf16* left, const Vec<float> (&right)[N]) {
  int pair;
  __builtin_memcpy(&pair, left, sizeof pair);
  const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
  MBN_UNROLL
  for (int v = 0; v < N; ++v) sum[v] = (Vec<float>)_mm512_dpbf16_ps((__m512)sum[v], both, (__m512bh)right[v]);
}
template <class M>
MBN_INLINE void multiply_row(Half<float> (&sum)[1], const bf16* left, const Half<float> (&right)[1]) {
  int pair;
  __builtin_memcpy(&pair, left, sizeof pair);
  sum[0] = (Half<float>)_mm256_dpbf16_ps((__m256)sum[0], (__m256bh)_mm256_set1_epi32(pair), (__m256bh)right[0]);
}
#endif
template <class M, class V, int N>
MBN_INLINE void multiply_row(V (&sum)[N], const Accumulate<M>* left, const V (&right)[N]) {
  const V number = *left - V{};  // broadcast
  MBN_UNROLL
  for (int v = 0; v < N; ++v) sum[v] += number * right[v];
}
// A vector of a packed weight, as bits.
template <class V, class M>
MBN_INLINE V load_bits(const M* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class M, class To>
struct ProductTile {
  using T = Accumulate<M>;
  const M* left;  // the tile's first row
  int64_t left_panel, left_step;
  const M* right;  // one panel of the weight
  int64_t steps;
  const T* shift;  // of the panel's columns; added last, as a sum that began with it would round each term to its size
  Act act;
  To* to;
  int64_t vector_step;          // from a row's vector to its next in `to`
  const int32_t* places;        // of each row, counted from `to`
  const To* residual;           // added at the end; null: none
  const int32_t* residual_places;  // of each row, counted from there
  const T* before = nullptr;    // added before the activation, rows of kColumns; null: none
  const M* ahead = nullptr;     // what the next panel's tile reads: a line of it is fetched with each step; null: nothing
};

// R rows of sums, H halves of vectors wide.
template <class T, int R, int H>
struct HalfTile {
  static constexpr int kWhole = H / 2;
  Vec<T> whole[R][kWhole > 0 ? kWhole : 1];
  Half<T> half[R][1];  // of an odd H

  __attribute__((always_inline)) Tile<T, R, (H + 1) / 2> widened() const {
    Tile<T, R, (H + 1) / 2> all;
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      MBN_UNROLL
      for (int v = 0; v < kWhole; ++v) all.at[r][v] = whole[r][v];
      if constexpr (H % 2) all.at[r][kWhole] = widen<T>(half[r][0], std::make_integer_sequence<int, kLanes<T>>{});
    }
    return all;
  }
};

// Numbers of a cache line.
template <class M>
constexpr int64_t kLine = 64 / sizeof(M);

// Up to one panel's steps of a tile.
template <class M, int Step, class T, int R, int H>
MBN_INLINE void multiply_panel(HalfTile<T, R, H>& acc, const M* left, const M* right, int64_t steps, const M* ahead) {
  constexpr int kWhole = H / 2;
  for (int64_t k = 0; k < steps; ++k) {
    Vec<T> b[kWhole > 0 ? kWhole : 1];
    MBN_UNROLL
    for (int v = 0; v < kWhole; ++v) b[v] = load_bits<Vec<T>>(right + v * kLanes<T> * kPair<M>);
    Half<T> half[1];
    if constexpr (H % 2) half[0] = load_bits<Half<T>>(right + kWhole * kLanes<T> * kPair<M>);
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      if constexpr (kWhole > 0) multiply_row<M>(acc.whole[r], left + r * Step, b);
      if constexpr (H % 2) multiply_row<M>(acc.half[r], left + r * Step, half);
    }
    __builtin_prefetch(ahead, 0, 2);
    ahead += kLine<M>;
    left += kPair<M>;
    right += kPair<M> * kColumns<M>;
  }
}

// From the sums in registers to the map.
template <Act A, class M, class T, int R, int NV, class To>
MBN_INLINE void finish_tile(const Tile<T, R, NV>& acc, const ProductTile<M, To>& t) {
  Vec<T> shift[NV];
  MBN_UNROLL
  for (int v = 0; v < NV; ++v) shift[v] = load(t.shift + v * kLanes<T>);
  To* const to = t.to;  // a store might change what lies in t
  const To* const residual = t.residual;
  const int32_t *places = t.places, *residual_places = t.residual_places;
  const int64_t step = t.vector_step;
  MBN_UNROLL
  for (int r = 0; r < R; ++r) {
    const int64_t at = places[r], residual_at = residual ? residual_places[r] : 0;
    MBN_UNROLL
    for (int v = 0; v < NV; ++v) {
      Vec<T> z = activate<A>(acc.at[r][v] + shift[v]);
      if (residual) z += load(residual + residual_at + v * step);
      store(to + at + v * step, z);
    }
  }
}

// One tile of a panel: rows x halves of vectors.
template <class M, class To, int R, int H, Act A, int Step>
static void product_tile(const ProductTile<M, To>& t) {
  using T = Accumulate<M>;
  constexpr int L = kLanes<T>, NV = (H + 1) / 2;
  constexpr int64_t kPanelSteps = kColumns<M> / kPair<M>;
  HalfTile<T, R, H> sums = {};
  const M *left = t.left, *right = t.right, *ahead = t.ahead ? t.ahead : right;
  for (int64_t rest = t.steps; rest > 0; rest -= kPanelSteps) {
    const int64_t steps = smaller(rest, kPanelSteps);
    multiply_panel<M, Step>(sums, left, right, steps, ahead);
    ahead += steps * kLine<M>;
    left += t.left_panel;
    right += steps * kPair<M> * kColumns<M>;
  }
  Tile<T, R, NV> acc = sums.widened();
  if (t.before) {
    MBN_UNROLL
    for (int r = 0; r < R; ++r) {
      MBN_UNROLL
      for (int v = 0; v < NV; ++v) acc.at[r][v] += load(t.before + r * kColumns<M> + v * L);
    }
  }
  finish_tile<A>(acc, t);
}

// The tile kernels for [narrow rows to the left][activation][halves of vectors][rows].
template <class M, class To>
struct ProductKernels {
  void (*at[2][4][2 * kPanelVectors + 1][kTileRows + 1])(const ProductTile<M, To>&);
  template <Act A, int H, int... R>
  constexpr void fill(std::integer_sequence<int, R...>) {
    ((at[0][int(A)][H][R + 1] = product_tile<M, To, R + 1, H, A, kColumns<M>>), ...);
    if constexpr (kNarrows<M>) ((at[1][int(A)][H][R + 1] = product_tile<M, To, R + 1, H, A, kNarrow<M>>), ...);
  }
  template <Act A>
  constexpr void fill_widths() {
    constexpr auto rows = std::make_integer_sequence<int, kTileRows>{};
    fill<A, 2>(rows), fill<A, 4>(rows);
    if constexpr (kHalves) fill<A, 1>(rows), fill<A, 3>(rows);
  }
  constexpr ProductKernels() : at() {
    fill_widths<Act::identity>(), fill_widths<Act::relu>(), fill_widths<Act::relu6>(), fill_widths<Act::hardswish>();
  }
};
template <class M, class To>
static constexpr ProductKernels<M, To> kProductKernels;

template <class M, class To>
MBN_INLINE void product_of_rows(const ProductTile<M, To>& t, int rows, int halves) {
  kProductKernels<M, To>.at[t.left_step < kColumns<M>][int(act_of_tile(t.act))][halves][rows](t);
}

// Rows that lie `Step` numbers apart.
template <int Step>
struct EvenRows {
  int32_t at[16];
  constexpr EvenRows() : at() {
    for (int r = 0; r < 16; ++r) at[r] = r * Step;
  }
};
template <int Step>
static constexpr EvenRows<Step> kEvenRows;

// The activations that a tile does not apply, and the residual behind them.
template <class M, class To>
static __attribute__((noinline)) void finish_rows(const ProductTile<M, To>& t, int rows, int vectors, const To* residual) {
  with_act(t.act, [&](auto act) {
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < vectors; ++v) {
        To* at = t.to + t.places[r] + v * t.vector_step;
        auto z = activate<decltype(act)::act>(load(at));
        if (residual) z += load(residual + t.residual_places[r] + v * t.vector_step);
        store(at, z);
      }
    }
  });
}

// In parts of 256 steps: one chain of a thousand additions loses digits that shorter ones keep.
constexpr int64_t kPartSteps = 256;
template <class M, class To>
static __attribute__((noinline)) void product_in_parts(ProductTile<M, To> t, int rows, int halves) {
  using T = Accumulate<M>;
  static constexpr T kZeros[kColumns<M>] = {};
  T sums[kTileRows * kColumns<M>];
  ProductTile<M, T> part = {t.left, t.left_panel, t.left_step, t.right, kPartSteps, kZeros, Act::identity, sums,
                            kLanes<T>, kEvenRows<kColumns<M>>.at, nullptr, nullptr, nullptr, t.ahead};
  t.before = sums;
  for (; t.steps > kPartSteps; t.steps -= kPartSteps) {
    product_of_rows(part, rows, halves);
    part.left += kPartSteps * kPair<M> / kColumns<M> * t.left_panel;
    part.right += kPartSteps * kPair<M> * kColumns<M>;
    part.before = sums;
    if (part.ahead) part.ahead += kPartSteps * kLine<M>;
  }
  t.left = part.left, t.right = part.right, t.ahead = part.ahead;
  product_of_rows(t, rows, halves);
}

template <class M, class To>
MBN_INLINE void finished_product(ProductTile<M, To> t, int rows, int halves) {
  const To* residual = t.residual;
  const bool later = finishes_later(t.act);
  if (later) t.residual = nullptr;
  if (t.steps > kPartSteps) {
    product_in_parts(t, rows, halves);
  } else {
    product_of_rows(t, rows, halves);
  }
  if (later) finish_rows(t, rows, (halves + 1) / 2, residual);
}

// ---- Dense convolutions -----------------------------------------------------------------------------------------------------------

// The product of the windows under a row's pixels, as they lie in lines of the input: `runs` runs of `steps` multiplications each, rows `row_step` apart.
template <class M, class To>
struct DenseTile {
  const M* const* lines;  // of each run
  int64_t at, row_step, runs, steps;
  ProductTile<M, To> product;  // left, left_panel, left_step and steps are not read
};
constexpr int kDenseRows = MBN_VECTOR_BYTES == 64 ? 14 : kTileRows;
template <class M, class To, int R, int NV, Act A>
static __attribute__((noinline)) void dense_tile(const DenseTile<M, To>& t) {
  using T = Accumulate<M>;
  Tile<T, R, NV> acc = {};
  const M* right = t.product.right;
  const int64_t step = t.row_step;
  for (int64_t run = 0; run < t.runs; ++run) {
    const M* left = t.lines[run] + t.at;
    for (int64_t k = 0; k < t.steps; ++k) {
      Vec<T> b[NV];
      MBN_UNROLL
      for (int v = 0; v < NV; ++v) b[v] = load_bits<Vec<T>>(right + v * kLanes<T> * kPair<M>);
      MBN_UNROLL
      for (int r = 0; r < R; ++r) multiply_row<M>(acc.at[r], left + r * step, b);
      left += kPair<M>;
      right += kPair<M> * kColumns<M>;
    }
  }
  finish_tile<A>(acc, t.product);
}
template <class M, class To, int R>
MBN_INLINE void dense_rows_of(const DenseTile<M, To>& t, int vectors) {
  with_act(act_of_tile(t.product.act), [&](auto tag) {
    constexpr Act A = decltype(tag)::act;
    if constexpr (!finishes_later(A)) vectors == 1 ? dense_tile<M, To, R, 1, A>(t) : dense_tile<M, To, R, 2, A>(t);
  });
}

// ---- Layers -----------------------------------------------------------------------------------------------------------------------

// A pointwise layer of evaluation, and its columns.
template <class S>
struct Layer {
  const Map<S>* weight;
  const Accumulate<S>* shift;
  Act act;
  int64_t depth, columns;
};
template <class S>
MBN_INLINE Layer<S> layer_of(const FoldedStage<S>& stage, int64_t depth, int64_t columns) {
  return {static_cast<const Map<S>*>(stage.weight), stage.shift, stage.act, depth, columns};
}

// Where channels are multiplied in pairs and are odd, the lane behind the last is read with a weight of zero: it has to be zero, and not what infinity made of it.
template <class To>
MBN_INLINE void clear_odd_lane(Rows<To> to, int64_t channels, int64_t begin, int64_t end) {
  if constexpr (kPair<To> == 2) {
    if (channels % 2 == 0) return;
    To* at = to.data + channels / kColumns<To> * to.panel + channels % kColumns<To>;
    for (int64_t r = begin; r < end; ++r) at[r * to.step] = To{};
  }
}

// Vectors [first, last) of columns of rows [begin, end): from a map to a map of numbers To. residual without data: none.
template <class S, class To>
static void layer_rows(const Layer<S>& layer, Rows<const Map<S>> from, Rows<To> to, Rows<const To> residual, int64_t begin, int64_t end,
                       int64_t first, int64_t last) {
  using M = Map<S>;
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  for (int64_t vector = first; vector < last;) {
    const int64_t panel = vector / kPanelVectors, within = vector % kPanelVectors;
    const int vectors = int(smaller<int64_t>(last - vector, kPanelVectors - within)), halves = halves_of<T>(layer.columns, vector, vectors);
    const M* weight = layer.weight + panel * weight_panel_size<M>(layer.depth) + within * L * kPair<M>;
    const int64_t steps = steps_of<M>(layer.depth);
    // The first tiles of a panel fetch the next one: where a map is small, its weights are read once, from afar.
    const M *next = weight + weight_panel_size<M>(layer.depth), *after = vector + vectors < last ? next + weight_panel_size<M>(layer.depth) : next;
    const auto places_of = [](int64_t step) { return step < kColumns<M> ? kEvenRows<int(kNarrow<M>)>.at : kEvenRows<kColumns<M>>.at; };
    for_tiles(end - begin, [&](int64_t row, int rows) {
      const int64_t at = begin + row;
      To* into = to.data + panel * to.panel + at * to.step + within * L;
      const To* added = residual.data ? residual.data + panel * residual.panel + at * residual.step + within * L : nullptr;
      prefetch_tile(into, 1, rows, 0, to.step, vectors * L);
      finished_product<M, To>({from.data + at * from.step, from.panel, from.step, weight, steps, layer.shift + vector * L, layer.act, into, L,
                               places_of(to.step), added, places_of(residual.step), nullptr, next < after ? next : nullptr},
                              rows, halves);
      next += steps * kLine<M>;
    });
    vector += vectors;
  }
  if (last * L >= layer.columns) clear_odd_lane(to, layer.columns, begin, end);
}

}  // namespace MBN_ISA
}  // namespace mbn
