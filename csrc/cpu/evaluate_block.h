// A block in evaluation, [dense or expand] -> [depthwise (+ squeeze-excite)] -> [project] (+ residual): the expanded map exists a few rows at a time. Members of a team
// share its work. Who does what changes no number: every sum is taken in one order, fixed by the shape.
#pragma once

#include "evaluate_depthwise.h"
#include "team.h"

namespace mbn {
namespace MBN_ISA {

MBN_INLINE Range share_of(const Member& member, int64_t count) { return share(count, member.rank, member.size); }

constexpr int64_t kPieces = 4;  // of some work for each member, where that costs little

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
  layer_rows<S, M>(reduce, reading(pooled), hidden, {}, 0, b.images, narrow.begin, narrow.end);
  meet(member);
  layer_rows<S, T>(restore, reading(hidden), {space.gate, b.images * P}, {}, 0, b.images, wide.begin, wide.end);
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

// From a band of the depthwise's output to rows [begin, end) of an image; `from` and `to` point at the band's first row.
template <class S>
static void project_band(const Block<S>& b, const Source<S>& source, Rows<const Map<S>> from, Rows<Map<S>> to, int64_t begin, int64_t end) {
  using M = Map<S>;
  constexpr int64_t P = kPanel<Accumulate<S>>;
  const int64_t width = b.p.out_width, vectors = ceil_div(b.p.out_channels, kLanes<Accumulate<S>>);
  if (source.kept == nullptr) {
    const Rows<const M> residual = b.p.residual ? from_row(source.map, begin * width) : Rows<const M>{};
    return layer_rows<S, M>(b.project, from, to, residual, 0, (end - begin) * width, 0, vectors);
  }
  for (int64_t row = begin; row < end; ++row) {
    const Rows<const M> kept = {source.kept + row % source.kept_rows * width * P, source.kept_rows * width * P};
    const int64_t at = (row - begin) * width;
    layer_rows<S, M>(b.project, from_row(from, at), from_row(to, at), kept, 0, width, 0, vectors);
  }
}

// Blocks without squeeze-excite, band by band, so that what the depthwise leaves is still in the second-level cache when it is read. A member goes on where its
// last band ended; where it begins anew, it makes rows that another has made, too.
template <class S>
static void share_bands(const Block<S>& b, const Member& member, Source<S> from, int64_t image_step, Rows<Map<S>> out) {
  using T = Accumulate<S>;
  using M = Map<S>;
  constexpr int64_t P = kPanel<T>, kBandBytes = 192 << 10;
  const Depthwise<S> d = depthwise_of(b.p);
  const int64_t width = b.p.out_width, height = b.p.out_height, row_bytes = b.panels * P * width * int64_t(sizeof(M));
  // A member alone may take an image as one band; otherwise some pieces fall to each.
  const int64_t most = member.size == 1 ? height : ceil_div(height, kPieces * member.size);
  const int64_t rows = smaller(most, larger<int64_t>(1, kBandBytes / (row_bytes * d.chunk)) * d.chunk), bands = ceil_div(height, rows);
  Scratch scratch;
  const int64_t rings_kept = bands > 1 ? d.units : 1;
  UnitRing<S>* rings = take<UnitRing<S>>(scratch, rings_kept);
  for (int64_t i = 0; i < rings_kept; ++i) rings[i] = take_ring(d, scratch);
  if (b.p.residual && b.p.dense.weight) {
    from.kept_rows = rows + d.slots;
    from.kept = take<M>(scratch, b.panels * P * from.kept_rows * width);
  }
  const Rows<M> middle = {take<M>(scratch, b.panels * rows * width * P), rows * width * P};
  int64_t goes_on = -1;
  share_pieces(member, b.images * bands, [&](int64_t i) {
    const int64_t n = i / bands, begin = i % bands * rows, end = smaller(begin + rows, height);
    Source<S> image = from;
    image.map = from_row(from.map, n * b.pixels), image.image.data += n * image_step;
    const Rows<M> to = from_row(out, n * b.out_pixels + begin * width);
    for (int64_t unit = 0; unit < d.units; ++unit) {
      UnitRing<S>& ring = rings[rings_kept > 1 ? unit : 0];
      if (begin == 0 || goes_on != i) begin_ring(d, ring, begin);
      convolve_rows(d, image, unit, begin, end, ring, b.projects ? middle : to, static_cast<T*>(nullptr));
    }
    goes_on = i + 1;
    if (b.projects) project_band(b, image, reading(middle), to, begin, end);
  });
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
  const int64_t each = b.images * b.parts;
  int64_t goes_on = -1;
  share_pieces(member, d.units * each, [&](int64_t piece) {
    const int64_t unit = piece / each, n = piece % each / b.parts, part = piece % b.parts;
    const Range rows = share(b.p.out_height, part, b.parts);
    if (part == 0 || goes_on != piece) begin_ring(d, ring, rows.begin);
    goes_on = piece + 1;
    Source<S> image = from;
    image.map = from_row(from.map, n * b.pixels), image.image.data += n * image_step;
    convolve_rows<S>(d, image, unit, rows.begin, rows.end, ring, from_row(to, n * b.out_pixels + rows.begin * b.p.out_width),
                     b.gated ? space.sums + (part * b.images + n) * b.panels * P : nullptr);
  });
}

// Whether the gate is multiplied into the project's weight rather than into the map: by shape alone, as the two round differently.
template <class S>
MBN_INLINE bool gates_weight(const Block<S>& b) {
  constexpr int64_t L = kLanes<Accumulate<S>>;
  return b.gated && b.out_pixels * ceil_div(b.p.channels, L) > 2 * b.p.channels * ceil_div(b.p.out_channels, L);
}
// How members share a project: a group of rows, which is an image where each has a gate of its own, as so many parts of its rows times so many of its columns.
struct ProjectParts {
  int64_t groups, rows, columns;
  int64_t count() const { return groups * rows * columns; }
};
template <class S>
MBN_INLINE ProjectParts project_parts(const Block<S>& b, int64_t members) {
  constexpr int64_t kLeastRows = 24;  // two tiles
  const int64_t groups = b.gated ? b.images : 1, rows = b.images * b.out_pixels / groups;
  if (members == 1) return {groups, 1, 1};
  const int64_t parts = smaller(rows / kLeastRows, ceil_div(kPieces * members, groups));
  if (groups * parts >= kPieces * members) return {groups, parts, 1};
  return {groups, larger<int64_t>(1, smaller(ceil_div(members, groups), rows)), panels_of<Map<S>>(b.p.out_channels)};
}

template <class S>
static void project_share(const Block<S>& b, const Member& member, Rows<Map<S>> from, Rows<const Map<S>> x, Rows<Map<S>> out,
                          const Workspace<S>& space) {
  using T = Accumulate<S>;
  using M = Map<S>;
  constexpr int64_t P = kPanel<T>;
  const ProjectParts parts = project_parts(b, member.size);
  const int64_t rows = b.images * b.out_pixels / parts.groups, vectors = ceil_div(b.p.out_channels, kLanes<T>), panels = panels_of<M>(b.p.out_channels);
  const Rows<const M> residual = b.p.residual ? x : Rows<const M>{};
  const bool in_weight = gates_weight(b), in_map = b.gated && !in_weight;
  if (in_map && member.size > 1) {  // a row's columns may fall to several members, so all rows come first
    const Range mine = share_of(member, b.images * rows);
    for (int64_t n = 0; n < b.images; ++n) gate_rows(b, from, space.gate + n * P, larger(mine.begin, n * rows), smaller(mine.end, (n + 1) * rows));
    meet(member);
  }
  Scratch scratch;
  M* weight = in_weight ? take<M>(scratch, weight_size<M>(b.p.out_channels, b.p.channels)) : nullptr;
  int64_t weight_of = -1;
  share_pieces(member, parts.count(), [&](int64_t i) {
    const int64_t group = i / (parts.rows * parts.columns), first = group * rows;
    const Range part = share(rows, i / parts.columns % parts.rows, parts.rows), columns = share(panels, i % parts.columns, parts.columns);
    Layer<S> layer = b.project;
    if (in_weight) {
      if (weight_of != group) gate_weight(b, space.gate + group * P, weight), weight_of = group;
      layer.weight = weight;
    }
    if (in_map && member.size == 1) gate_rows(b, from, space.gate + group * P, first, first + rows);
    layer_rows<S, M>(layer, reading(from), out, residual, first + part.begin, first + part.end, columns.begin * kPanelVectors,
                     smaller(vectors, columns.end * kPanelVectors));
  });
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
  if (!b.spatial) return project_share(b, member, {const_cast<M*>(x.data), x.panel, x.step}, x, out, space);
  if (shares_rows(b, member)) return share_bands(b, member, from, image_step, out);
  if (!b.projects) return convolve_share(b, member, from, image_step, out, space);
  const Rows<M> middle = {space.middle, images * b.out_pixels * kPanel<Accumulate<S>>};
  convolve_share(b, member, from, image_step, middle, space);
  meet(member);
  if (b.gated) gates_of(b, member, space);
  project_share(b, member, middle, x, out, space);
}

}  // namespace MBN_ISA
}  // namespace mbn
