// Evaluation of a network, or of a part of it, in one call: what goes from step to step stays in scratch. Every stage's batch norm is folded into its weight and
// shift.
//
// Images pass through the first steps one by one, so that their maps stay in the second-level cache; through those whose weights outweigh their maps a few
// at a time; and through what follows the pool, whose maps are one pixel, all at once.
#pragma once

#include "evaluate_block.h"

namespace mbn {
namespace MBN_ISA {

// ---- Packing --------------------------------------------------------------------------------------------------------------------

// How many bytes a packed weight takes: pointwise and dense [out][depth], depthwise [channels][taps].
template <class S>
int64_t packed_pointwise_size(int64_t out, int64_t depth) {
  return weight_size<Map<S>>(out, depth) * int64_t(sizeof(Map<S>));
}
template <class S>
int64_t packed_depthwise_size(int64_t channels, int64_t taps) {
  using T = Accumulate<S>;
  return panel_count<T>(channels) * kPanel<T> * taps * int64_t(sizeof(T));
}

template <class S>
int64_t padded_channels(int64_t channels) {
  return panel_count<Accumulate<S>>(channels) * kPanel<Accumulate<S>>;
}

// Rows of a panel, [depth][kColumns] numbers of type T, times the columns' scales; as pairs where that is what is multiplied. Columns from c on.
template <class M>
static void finish_panel(Accumulate<M>* rows, int64_t depth, const Accumulate<M>* scale, int64_t c, int64_t columns, M* to) {
  using T = Accumulate<M>;
  constexpr int64_t P = kColumns<M>, L = kLanes<T>;
  for (int64_t v = 0; v < P && c + v < columns; v += L) {
    const Vec<T> factor = scale ? load(scale + c + v, int(smaller<int64_t>(L, columns - c - v))) : broadcast(T(1));
    for (int64_t k = 0; k < depth; ++k) store(rows + k * P + v, load(rows + k * P + v) * factor);
  }
  for (int64_t k = 0; k < steps_of<M>(depth); ++k) {
    for (int64_t i = 0; i < P; i += L) {
      if constexpr (kPair<M> == 1) {
        store(to + k * P + i, load(rows + k * P + i));
      } else {
        M even[L], odd[L];
        store(even, load(rows + 2 * k * P + i));
        store(odd, 2 * k + 1 < depth ? load(rows + (2 * k + 1) * P + i) : Vec<T>{});
        for (int64_t l = 0; l < L; ++l) to[2 * (k * P + i + l)] = even[l], to[2 * (k * P + i + l) + 1] = odd[l];
      }
    }
  }
}
// scale [out]: multiplied in; null: 1. The last panel's columns beyond `out`, and the second of an odd depth's last pair, are zero.
template <class S, class From>
MBN_INLINE void pack_panels(const From* weight, int64_t out, int64_t depth, const Accumulate<S>* scale, void* to) {
  using T = Accumulate<S>;
  using M = Map<S>;
  const auto body = [&](int64_t begin, int64_t end) {
    Scratch scratch;
    T* rows = take<T>(scratch, depth * kPanel<T>);
    for (int64_t j = begin; j < end; ++j) {
      __builtin_memset(rows, 0, size_t(depth * kPanel<T>) * sizeof(T));
      pack_transposed_panel<From>(rows, kPanel<T>, weight, out, depth, j * kPanel<T>, panel_vectors<T>(out, j * kPanel<T>));
      finish_panel<M>(rows, depth, scale, j * kPanel<T>, out, static_cast<M*>(to) + j * weight_panel_size<M>(depth));
    }
  };
  // Waking the other threads costs more than packing a small weight.
  if (out * depth < 16384) return body(0, panels_of<M>(out));
  parallel_tasks(panels_of<M>(out), body);
}
template <class S>
void pack_pointwise(const S* weight, int64_t out, int64_t depth, const Accumulate<S>* scale, void* to) {
  pack_panels<S>(weight, out, depth, scale, to);
}
template <class S>
void pack_wide(const Accumulate<S>* weight, int64_t out, int64_t depth, void* to) {
  pack_panels<S>(weight, out, depth, nullptr, to);
}
template <class S>
void pack_depthwise(const S* weight, int64_t channels, int64_t taps, const Accumulate<S>* scale, void* packed) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  T* to = static_cast<T*>(packed);
  for (int64_t c = 0; c < panel_count<T>(channels) * kPanel<T>; c += L) {
    const int count = int(larger<int64_t>(0, smaller<int64_t>(L, channels - c)));
    const Vec<T> factor = scale && count > 0 ? load(scale + c, count) : broadcast(T(1));
    for (int64_t q = 0; q < taps; ++q, to += L) {
      S lanes[L] = {};
      for (int i = 0; i < count; ++i) lanes[i] = weight[(c + i) * taps + q];
      store(to, load(lanes) * factor);
    }
  }
}

// ---- The ends of a network --------------------------------------------------------------------------------------------------------

// Rows [begin, end) of a dense channels-last array as panels; channels beyond the last are zero.
template <class S>
static void rows_to_panels(const S* from, int64_t channels, int64_t begin, int64_t end, Rows<Map<S>> to) {
  using T = Accumulate<S>;
  constexpr int64_t P = kPanel<T>, L = kLanes<T>;
  for (int64_t c = 0; c < channels; c += L) {
    const int count = int(smaller<int64_t>(L, channels - c));
    Map<S>* at = to.data + c / P * to.panel + c % P;
    for (int64_t r = begin; r < end; ++r) store(at + r * to.step, load(from + r * channels + c, count));
  }
}
template <class S>
static void panels_to_rows(Rows<const Map<S>> from, int64_t channels, int64_t begin, int64_t end, S* to) {
  using T = Accumulate<S>;
  constexpr int64_t P = kPanel<T>, L = kLanes<T>;
  for (int64_t c = 0; c < channels; c += L) {
    const int count = int(smaller<int64_t>(L, channels - c));
    const Map<S>* at = from.data + c / P * from.panel + c % P;
    for (int64_t r = begin; r < end; ++r) store(to + r * channels + c, load(at + r * from.step), count);
  }
}

// The mean over the pixels of each image, into row n of `to`.
template <class S>
static void pool_panels(const Step<S>& p, int64_t images, Range vectors, Rows<const Map<S>> from, Rows<Map<S>> to) {
  using T = Accumulate<S>;
  constexpr int64_t P = kPanel<T>, L = kLanes<T>;
  const int64_t pixels = p.height * p.width;
  for (int64_t v = vectors.begin; v < vectors.end; ++v) {
    const int64_t panel = v / kPanelVectors, at = v % kPanelVectors * L;
    for (int64_t n = 0; n < images; ++n) {
      const Map<S>* row = from.data + panel * from.panel + n * pixels * from.step + at;
      Vec<T> sum[4] = {};
      for (int64_t r = 0; r < pixels; ++r) sum[r % 4] += load(row + r * from.step);
      store(to.data + panel * to.panel + n * P + at, ((sum[0] + sum[1]) + (sum[2] + sum[3])) * (T(1) / T(pixels)));
    }
  }
}

// ---- The network ------------------------------------------------------------------------------------------------------------------

template <class S>
struct Network {
  using M = Map<S>;
  const Evaluate<S>& p;
  int64_t grouped, together;  // the first step that runs on a few images at a time, and on all at once
  int64_t group;

  int64_t map_size(int64_t step, int64_t images) const {  // of a step's input
    const Step<S>& s = p.step[step];
    return images * panels_of<M>(s.in_channels) * s.height * s.width * kPanel<Accumulate<S>>;
  }
  int64_t pixels(int64_t step) const { return p.step[step].height * p.step[step].width; }
};

// Two buffers that maps go back and forth between, and what a block needs besides.
template <class S>
struct Room {
  Map<S>* maps[2];
  Workspace<S> space;
};
template <class S>
MBN_INLINE Room<S> take_room(const Network<S>& net, int64_t first, int64_t last, int64_t images, Scratch& scratch) {
  int64_t largest = 0;
  WorkspaceSize<S> size;
  for (int64_t i = first; i < last; ++i) {
    largest = larger(largest, net.map_size(i, images));
    size.hold(net.p.step[i], images);
  }
  if (first == last) return {};
  return {{take<Map<S>>(scratch, largest), take<Map<S>>(scratch, largest)}, size.take_from(scratch)};
}

// Steps [first, last) on images [begin, end), from a map to a map (the first step of a network: from x); who reads `to` has to meet first.
template <class S>
static void run_steps(const Network<S>& net, const Member& member, const Room<S>& room, int64_t first, int64_t last, int64_t begin, int64_t end,
                      Rows<const Map<S>> from, Rows<Map<S>> to) {
  using M = Map<S>;
  constexpr int64_t P = kPanel<Accumulate<S>>;
  const int64_t images = end - begin;
  const Evaluate<S>& p = net.p;
  const Image<S> image = {p.x + begin * p.x_strides[0], p.x_strides[1], p.x_strides[2], p.x_strides[3]};
  int side = 0;
  if (first == 0 && !p.step[0].dense.weight) {
    const int64_t pixels = net.pixels(0), channels = p.step[0].in_channels;
    const Range rows = share_of(member, images * pixels);
    const Rows<M> x = {room.maps[side], images * pixels * P, row_step<M>(channels)};
    rows_to_panels<S>(p.x + begin * pixels * channels, channels, rows.begin, rows.end, x);
    meet(member);
    from = reading(x), side = 1;
  }
  for (int64_t i = first; i < last; ++i) {
    const Step<S>& step = p.step[i];
    const int64_t out_pixels = step.out_height * step.out_width;
    const int64_t row = step.project.weight ? row_step<M>(step.out_channels) : P;  // others write rows of one width only
    const Rows<M> out = i + 1 == last ? to : Rows<M>{room.maps[side], images * out_pixels * P, row};
    if (step.kind == StepKind::pool) {
      pool_panels(step, images, share_of(member, ceil_div(step.in_channels, kLanes<Accumulate<S>>)), from, out);
    } else {
      run_block(step, images, member, from, image, p.x_strides[0], out, room.space);
    }
    if (i + 1 < last) meet(member);
    from = reading(out), side = 1 - side;
  }
}

// The first two parts of a network on images [begin, end): one by one, then a group at a time.
template <class S>
static void run_images(const Network<S>& net, const Member& member, const Room<S>& single, const Room<S>& group, Map<S>* gathered, int64_t begin,
                       int64_t end, Rows<Map<S>> to, int64_t to_pixels) {
  using M = Map<S>;
  constexpr int64_t P = kPanel<Accumulate<S>>;
  for (int64_t first = begin; first < end; first += net.group) {
    const int64_t last = smaller(first + net.group, end);
    const bool gathers = net.grouped > 0 && net.grouped < net.together;
    const int64_t pixels = gathers ? net.pixels(net.grouped) : to_pixels;
    const Rows<M> between = gathers ? Rows<M>{gathered, (last - first) * pixels * P} : from_row(to, first * to_pixels);
    for (int64_t n = first; n < last && net.grouped > 0; ++n) {
      run_steps<S>(net, member, single, 0, net.grouped, n, n + 1, {}, from_row(between, (n - first) * pixels));
      meet(member);
    }
    if (net.grouped == net.together) continue;
    run_steps<S>(net, member, group, net.grouped, net.together, first, last, reading(between), from_row(to, first * to_pixels));
    meet(member);
  }
}

template <class S>
MBN_INLINE bool one_pixel(const Step<S>& p) {
  return p.height * p.width == 1 && p.out_height * p.out_width == 1;
}
// Members share the images, or each image's work where there are few.
MBN_INLINE bool shares_images(int64_t images, int64_t members) { return images >= kPieces * members || images % members == 0; }

template <class S>
static Network<S> network_of(const Evaluate<S>& p) {
  constexpr int64_t kFewPixels = 100, kGroup = 4;
  int64_t together = p.steps, grouped = p.steps;
  while (together > 0 && !p.step[together - 1].dense.weight && one_pixel(p.step[together - 1])) --together;
  for (grouped = together; grouped > 0; --grouped) {
    const Step<S>& step = p.step[grouped - 1];
    if (step.dense.weight || step.out_height * step.out_width > kFewPixels) break;
  }
  const int64_t members = thread_count(), each = members > 1 && p.images >= kPieces * members ? kPieces : 1;
  const int64_t group = shares_images(p.images, members) ? larger<int64_t>(1, smaller(kGroup, p.images / (members * each))) : kGroup;
  return {p, grouped, together, grouped < together ? group : 1};
}

template <class S>
void evaluate(const Evaluate<S>& p) {
  using M = Map<S>;
  using T = Accumulate<S>;
  constexpr int64_t P = kPanel<T>;
  const Network<S> net = network_of(p);
  const Step<S>& last_step = p.step[p.steps - 1];
  const int64_t out_pixels = last_step.out_height * last_step.out_width;
  // The map between the images' own steps and those of all images, and the last one.
  const bool heads = net.together < p.steps;
  const int64_t middle_channels = heads ? p.step[net.together].in_channels : last_step.out_channels, middle_pixels = heads ? 1 : out_pixels;
  Scratch scratch;
  const Rows<M> middle = {take<M>(scratch, p.images * middle_pixels * panels_of<M>(middle_channels) * P), p.images * middle_pixels * P};
  const Rows<M> last = heads ? Rows<M>{take<M>(scratch, p.images * panels_of<M>(last_step.out_channels) * P), p.images * P} : middle;
  const Room<S> head = take_room(net, net.together, p.steps, p.images, scratch);
  const auto rooms = [&](Scratch& own, Room<S>& single, Room<S>& group, M*& gathered) {
    single = take_room(net, 0, net.grouped, 1, own);
    const int64_t images = smaller(net.group, p.images);
    group = take_room(net, net.grouped, net.together, images, own);
    gathered = net.grouped > 0 && net.grouped < net.together ? take<M>(own, net.map_size(net.grouped, images)) : nullptr;
  };
  Room<S> single, group;  // of all members together
  M* gathered;
  in_team([&](const Member& member) {
    Scratch own;
    if (shares_images(p.images, member.size)) {
      Room<S> own_single, own_group;
      M* own_gathered;
      rooms(own, own_single, own_group, own_gathered);
      share_pieces(member, ceil_div(p.images, net.group), [&](int64_t i) {
        const int64_t first = i * net.group;
        run_images(net, Member{}, own_single, own_group, own_gathered, first, smaller(first + net.group, p.images), middle, middle_pixels);
      });
      meet(member);
    } else {
      if (member.rank == 0) rooms(own, single, group, gathered);
      meet(member);
      run_images(net, member, single, group, gathered, 0, p.images, middle, middle_pixels);
    }
    if (heads) {
      run_steps<S>(net, member, head, net.together, p.steps, 0, p.images, reading(middle), last);
      meet(member);
    }
    const Range rows = share_of(member, p.images * out_pixels);
    panels_to_rows<S>(reading(last), last_step.out_channels, rows.begin, rows.end, p.out);
  });
}

}  // namespace MBN_ISA
}  // namespace mbn
