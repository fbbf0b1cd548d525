// A block in evaluation, [dense or expand] -> [depthwise (+ squeeze-excite)] -> [project] (+ residual): the expanded map exists a few rows at a time. Members of a team
// share its work. Who does what changes no number: every sum is taken in one order, fixed by the shape.
#pragma once

#include "evaluate_depthwise.h"
#include "team.h"

namespace mbn {
namespace MBN_ISA {

MBN_INLINE Range share_of(const Member& member, int64_t count) { return share(count, member.rank, member.size); }

template <class S>
struct Block {
  using T = Accumulate<S>;
  using M = Map<S>;
  const Step<S>& p;
  int64_t images, pixels, out_pixels, panels, parts;  // parts: of an image's rows; squeeze-excite's mean is summed up part by part
  Layer<S> project;
  bool spatial, projects, gated;
};

template <class S>
MBN_INLINE Block<S> block_of(const Step<S>& p, int64_t images) {
  Block<S> b = {p, images, p.height * p.width, p.out_height * p.out_width, panels_of<Map<S>>(p.channels), 1,
                layer_of<S>(p.project, p.channels, p.out_channels)};
  b.spatial = p.depthwise.weight != nullptr, b.projects = p.project.weight != nullptr, b.gated = p.squeeze > 0;
  // Eight shares of the work at least, of seven rows at least.
  if (b.spatial) b.parts = larger<int64_t>(1, smaller(ceil_div(8, b.panels), p.out_height / 7));
  return b;
}

// What members share while a block runs.
template <class S>
struct Workspace {
  Map<S>* middle;         // the depthwise's output
  Accumulate<S>* sums;    // [part][image][channels, whole panels]
  Map<S>* hidden;         // of squeeze-excite
  Accumulate<S>* gate;    // panels, as a map
};
template <class S>
struct WorkspaceSize {
  int64_t middle = 0, sums = 0, hidden = 0, gate = 0;
  void hold(const Step<S>& p, int64_t images) {
    constexpr int64_t P = kPanel<Accumulate<S>>;
    if (p.kind != StepKind::block) return;
    const Block<S> b = block_of(p, images);
    const int64_t channels = b.panels * P;
    if (b.spatial && b.projects) middle = larger(middle, images * b.out_pixels * channels);
    if (!b.gated) return;
    sums = larger(sums, b.parts * images * channels);
    hidden = larger(hidden, images * panels_of<Map<S>>(p.squeeze) * P);
    gate = larger(gate, images * channels);
  }
  Workspace<S> take_from(Scratch& scratch) const {
    using T = Accumulate<S>;
    return {take<Map<S>>(scratch, middle), take<T>(scratch, sums), take<Map<S>>(scratch, hidden), take<T>(scratch, gate)};
  }
};

// ---- Squeeze-excite -------------------------------------------------------------------------------------------------------------

// The gates of all images from the sums of the depthwise's output.
template <class S>
static void gates_of(const Block<S>& b, const Member& member, const Workspace<S>& space) {
  using T = Accumulate<S>;
  using M = Map<S>;
  constexpr int64_t P = kPanel<T>, L = kLanes<T>;
  const Step<S>& p = b.p;
  Scratch scratch;
  const Rows<M> pooled = {take<M>(scratch, b.images * b.panels * P), b.images * P};
  const Rows<M> hidden = {space.hidden, b.images * P};
  const int64_t channels = b.panels * P, vectors = ceil_div(p.channels, L);
  for (int64_t n = 0; n < b.images; ++n) {
    for (int64_t v = 0; v < vectors; ++v) {
      Vec<T> sum = {};
      for (int64_t part = 0; part < b.parts; ++part) sum += load(space.sums + (part * b.images + n) * channels + v * L);
      const int64_t c = v * L;
      store(pooled.data + c / P * pooled.panel + n * P + c % P, sum * (T(1) / T(b.out_pixels)));
    }
  }
  clear_odd_lane(pooled, p.channels, 0, b.images);
  const Layer<S> reduce = layer_of<S>(p.reduce, p.channels, p.squeeze), restore = layer_of<S>(p.restore, p.squeeze, p.channels);
  const Range narrow = share_of(member, ceil_div(p.squeeze, L)), wide = share_of(member, vectors);
  layer_rows<S, M>(reduce, {pooled.data, pooled.panel}, hidden, {}, 0, b.images, narrow.begin, narrow.end);
  meet(member);
  layer_rows<S, T>(restore, {hidden.data, hidden.panel}, {space.gate, b.images * P}, {}, 0, b.images, wide.begin, wide.end);
  meet(member);
}

// The depthwise's output times the gate, in place, for rows [begin, end) of an image.
template <class S>
static void gate_rows(const Block<S>& b, Rows<Map<S>> middle, const Accumulate<S>* gate, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  constexpr int64_t P = kPanel<T>, L = kLanes<T>;
  for (int64_t c = 0; c < b.p.channels; c += L) {
    const Vec<T> g = load(gate + c / P * b.images * P + c % P);
    Map<S>* at = middle.data + c / P * middle.panel + c % P;
    for (int64_t r = begin; r < end; ++r) store(at + r * P, load(at + r * P) * g);
  }
  clear_odd_lane(middle, b.p.channels, begin, end);
}

// The project's weight times one image's gate: the same product, and less work where there are more pixels than columns.
template <class S>
static const Map<S>* gate_weight(const Block<S>& b, const Accumulate<S>* gate, Map<S>* to) {
  using T = Accumulate<S>;
  using M = Map<S>;
  constexpr int64_t P = kPanel<T>, L = kLanes<T>, kStep = P * kPair<M>;
  const int64_t columns = panels_of<M>(b.p.out_channels), size = weight_panel_size<M>(b.p.channels);
  for (int64_t k = 0; k < steps_of<M>(b.p.channels); ++k) {
    const int64_t c = k * kPair<M>;
    const T* g = gate + c / P * b.images * P + c % P;
    for (int64_t j = 0; j < columns; ++j) {
      const M* from = b.project.weight + j * size + k * kStep;
      M* into = to + j * size + k * kStep;
      if constexpr (kPair<M> == 1) {
        const Vec<T> factor = broadcast(*g);
        for (int64_t i = 0; i < P; i += L) store(into + i, load(from + i) * factor);
      } else {
        Vec<T> factor;
        for (int i = 0; i < L; ++i) factor[i] = c + i % 2 < b.p.channels ? g[i % 2] : T(0);
        for (int64_t i = 0; i < kStep; i += L) store(into + i, load(from + i) * factor);
      }
    }
  }
  return to;
}

// ---- The block ------------------------------------------------------------------------------------------------------------------

// Output rows [begin, end) of an image, a band at a time, so that what the depthwise leaves is still in the second-level cache when it is read.
template <class S>
static void band_rows(const Block<S>& b, Source<S> from, Rows<Map<S>> out, int64_t begin, int64_t end) {
  using T = Accumulate<S>;
  using M = Map<S>;
  constexpr int64_t P = kPanel<T>, kBandBytes = 192 << 10;
  if (begin >= end) return;
  const Depthwise<S> d = depthwise_of(b.p);
  const int64_t width = b.p.out_width, row_bytes = b.panels * P * width * int64_t(sizeof(M));
  const int64_t rows = smaller(end - begin, larger<int64_t>(1, kBandBytes / (row_bytes * d.chunk)) * d.chunk);
  Scratch scratch;
  const int64_t rings_kept = rows < end - begin ? d.units : 1;
  UnitRing<S>* rings = take<UnitRing<S>>(scratch, rings_kept);
  for (int64_t i = 0; i < rings_kept; ++i) {
    rings[i] = take_ring(d, scratch);
    begin_ring(d, rings[i], begin);
  }
  if (b.p.residual && b.p.dense.weight) {
    from.kept_rows = rows + d.slots;
    from.kept = take<M>(scratch, b.panels * P * from.kept_rows * width);
  }
  const Rows<M> middle = {take<M>(scratch, b.panels * rows * width * P), rows * width * P};
  for (int64_t band = begin; band < end; band += rows) {
    const int64_t last = smaller(band + rows, end), pixel = band * width;
    for (int64_t unit = 0; unit < d.units; ++unit) {
      UnitRing<S>& ring = rings[rings_kept > 1 ? unit : 0];
      if (rings_kept == 1 && unit > 0) begin_ring(d, ring, begin);
      convolve_rows(d, from, unit, band, last, ring, b.projects ? middle : from_row(out, pixel), static_cast<T*>(nullptr));
    }
    if (!b.projects) continue;
    const int64_t vectors = ceil_div(b.p.out_channels, kLanes<T>);
    if (from.kept == nullptr) {
      const Rows<const M> residual = b.p.residual ? from_row(from.map, pixel) : Rows<const M>{};
      layer_rows<S, M>(b.project, {middle.data, middle.panel}, from_row(out, pixel), residual, 0, (last - band) * width, 0, vectors);
      continue;
    }
    for (int64_t row = band; row < last; ++row) {
      const Rows<const M> kept = {from.kept + row % from.kept_rows * width * P, from.kept_rows * width * P};
      const Rows<M> rows_of = from_row(middle, (row - band) * width);
      layer_rows<S, M>(b.project, {rows_of.data, rows_of.panel}, from_row(out, row * width), kept, 0, width, 0, vectors);
    }
  }
}

// Whether members take bands of an image each: they make the rows between them twice, but wait for nothing and keep what they make to themselves.
template <class S>
MBN_INLINE bool shares_rows(const Block<S>& b, const Member& member) {
  const Window& w = b.p.window;
  const int64_t twice = (w.kernel_h - 1) * w.dilation_h + 1 - w.stride_h;
  if (!b.spatial || b.gated) return false;
  if (member.size == 1 || (b.p.residual && b.p.dense.weight)) return true;
  return twice * member.size * 7 <= b.p.out_height * w.stride_h && b.p.out_height >= 7 * member.size;
}

// The depthwise's output of all images and, for squeeze-excite, its sums: a member takes units, or parts of them.
template <class S>
static void convolve_share(const Block<S>& b, const Member& member, const Source<S>& from, int64_t image_step, Rows<Map<S>> to,
                           const Workspace<S>& space) {
  using T = Accumulate<S>;
  constexpr int64_t P = kPanel<T>;
  const Depthwise<S> d = depthwise_of(b.p);
  Scratch scratch;
  UnitRing<S> ring = take_ring(d, scratch);
  // A unit takes as many slots as it has vectors: slots are an even share of the work.
  const int64_t each = b.images * b.parts;
  const Range slots = share_of(member, d.vectors * each);
  int64_t goes_on = -1;
  for (int64_t unit = 0; unit < d.units; ++unit) {
    const int64_t vectors = smaller(d.unit, d.vectors - unit * d.unit), first = unit * d.unit * each;
    for (int64_t i = 0; i < each; ++i) {
      const int64_t slot = first + i * vectors;
      if (slot < slots.begin || slot >= slots.end) continue;
      const int64_t n = i / b.parts, part = i % b.parts;
      const Range rows = share(b.p.out_height, part, b.parts);
      if (part == 0 || goes_on != unit * each + i) begin_ring(d, ring, rows.begin);
      goes_on = unit * each + i + 1;
      Source<S> image = from;
      image.map = from_row(from.map, n * b.pixels), image.image.data += n * image_step;
      convolve_rows<S>(d, image, unit, rows.begin, rows.end, ring, from_row(to, n * b.out_pixels + rows.begin * b.p.out_width),
                       b.gated ? space.sums + (part * b.images + n) * b.panels * P : nullptr);
    }
  }
}

// Whether the gate is multiplied into the project's weight rather than into the map: by shape alone, as the two round differently.
template <class S>
MBN_INLINE bool gates_weight(const Block<S>& b) {
  constexpr int64_t L = kLanes<Accumulate<S>>;
  return b.gated && b.out_pixels * ceil_div(b.p.channels, L) > 2 * b.p.channels * ceil_div(b.p.out_channels, L);
}
// Of the project's operands members share the larger one; the other they all read.
template <class S>
MBN_INLINE bool shares_columns(const Block<S>& b, const Member& member) {
  return !gates_weight(b) && b.p.out_channels > b.images * b.out_pixels && ceil_div(b.p.out_channels, kLanes<Accumulate<S>>) >= 2 * member.size;
}

template <class S>
static void project_share(const Block<S>& b, const Member& member, Rows<Map<S>> from, Rows<const Map<S>> x, Rows<Map<S>> out,
                          const Workspace<S>& space) {
  using T = Accumulate<S>;
  using M = Map<S>;
  constexpr int64_t P = kPanel<T>;
  const int64_t rows = b.images * b.out_pixels, vectors = ceil_div(b.p.out_channels, kLanes<T>);
  const bool by_columns = shares_columns(b, member);
  const Range mine = by_columns ? Range{0, rows} : share_of(member, rows), columns = by_columns ? share_of(member, vectors) : Range{0, vectors};
  const Rows<const M> residual = b.p.residual ? x : Rows<const M>{};
  if (!b.gated) return layer_rows<S, M>(b.project, {from.data, from.panel}, out, residual, mine.begin, mine.end, columns.begin, columns.end);
  Scratch scratch;
  const bool in_weight = gates_weight(b);
  M* weight = in_weight ? take<M>(scratch, weight_size<M>(b.p.out_channels, b.p.channels)) : nullptr;
  const Range gated = share_of(member, rows);  // not `mine` where columns are shared: then each row is gated by one member for all
  for (int64_t n = 0; n < b.images; ++n) {
    const int64_t first = n * b.out_pixels;
    const Range part = {larger(gated.begin, first), smaller(gated.end, first + b.out_pixels)};
    if (length(part) <= 0) continue;
    const T* gate = space.gate + n * P;
    Layer<S> layer = b.project;
    if (in_weight) {
      layer.weight = gate_weight(b, gate, weight);
    } else {
      gate_rows(b, from, gate, part.begin, part.end);
    }
    if (!by_columns) layer_rows<S, M>(layer, {from.data, from.panel}, out, residual, part.begin, part.end, 0, vectors);
  }
  if (!by_columns) return;
  meet(member);
  layer_rows<S, M>(b.project, {from.data, from.panel}, out, residual, mine.begin, mine.end, columns.begin, columns.end);
}

// A dense convolution alone.
template <class S>
static void dense_share(const Step<S>& p, int64_t images, const Member& member, const Image<S>& image, int64_t image_step, Rows<Map<S>> out) {
  using T = Accumulate<S>;
  constexpr int64_t P = kPanel<T>;
  const Dense<S> dense = dense_before(p);
  const Range rows = share_of(member, p.height);
  Scratch scratch;
  Lines<S> lines = take_lines(dense, scratch);
  for (int64_t n = 0; n < images; ++n) {
    lines.next = 0;
    Image<S> from = image;
    from.data += n * image_step;
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      Map<S>* to = out.data + (n * p.height + y) * p.width * P;
      for (int64_t c = 0; c < p.channels; c += P) {
        dense_row<int(P)>(dense, from, lines, y, c / kLanes<T>, panel_vectors<T>(p.channels, c), to + c / P * out.panel, kLanes<T>);
      }
    }
  }
}

// Members meet before they read what others wrote; not at the end. image: what a dense convolution reads, images image_step apart.
template <class S>
static void run_block(const Step<S>& p, int64_t images, const Member& member, Rows<const Map<S>> x, const Image<S>& image, int64_t image_step,
                      Rows<Map<S>> out, const Workspace<S>& space) {
  using M = Map<S>;
  const Block<S> b = block_of(p, images);
  const Source<S> from = {x, image, nullptr, 0};
  if (!b.spatial && p.dense.weight) return dense_share(p, images, member, image, image_step, out);
  if (!b.spatial) return project_share(b, member, {const_cast<M*>(x.data), x.panel}, x, out, space);
  if (shares_rows(b, member)) {
    const Range rows = share_of(member, p.out_height);
    for (int64_t n = 0; n < images; ++n) {
      Source<S> one = from;
      one.map = from_row(x, n * b.pixels), one.image.data += n * image_step;
      band_rows(b, one, from_row(out, n * b.out_pixels), rows.begin, rows.end);
    }
    return;
  }
  if (!b.projects) return convolve_share(b, member, from, image_step, out, space);
  const Rows<M> middle = {space.middle, images * b.out_pixels * kPanel<Accumulate<S>>};
  convolve_share(b, member, from, image_step, middle, space);
  meet(member);
  if (b.gated) gates_of(b, member, space);
  project_share(b, member, middle, x, out, space);
}

}  // namespace MBN_ISA
}  // namespace mbn
