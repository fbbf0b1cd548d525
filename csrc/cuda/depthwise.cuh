// What both depthwise kernels share: which part of the work a block has, and how rows of a tile travel into shared memory.
//
// A thread takes two channels and a group of neighbouring columns, and slides down the rows of a unit. Rows arrive a few ahead in a ring of
// stages in shared memory, raw, in 16-byte pieces; threads read their own two channels from there.
#pragma once

#include "gpu.cuh"
#include "kernels.h"

namespace mbn {

constexpr int kStages = 4;  // rows in flight, and the one in use

template <class S>
constexpr int kVector = 16 / int(sizeof(S));  // channels in 16 bytes

// The thread's and its block's share of the work.
template <class S>
struct Place {
  int slice, group, first_image, part;
  int units;             // of this block
  int pairs;             // of channels in a slice
  int active;            // threads that have work
  int pair, column_group;  // this thread's
  int channel;           // its first of two, in the tensor; not below map.channels: nothing to do

  MBN_DEVICE_MEMBER Place(const Map& map, const Share& share) {
    group = block_index() / share.slices;
    slice = block_index() % share.slices;
    first_image = group / share.parts * share.span;
    part = group % share.parts;
    const int images = map.images - first_image;
    units = (images < share.span ? images : share.span) * share.run;
    pairs = share.vectors * (kVector<S> / 2);
    active = pairs * share.groups;
    pair = thread_index() % pairs;
    column_group = thread_index() / pairs;
    channel = slice * share.vectors * kVector<S> + 2 * pair;
    if (thread_index() >= active) channel = map.channels;
  }
};

// One unit: an image, steps of rows and a tile of columns.
struct Unit {
  int image, first, end, tile;
  bool live;

  MBN_DEVICE_MEMBER Unit(const Share& share, int first_image, int part, int t, int steps) {
    const int u = part * share.run + t % share.run;
    image = first_image + t / share.run;
    live = u < share.strips * share.tiles;
    tile = u % share.tiles;
    first = u / share.tiles * share.strip;
    end = first + share.strip < steps ? first + share.strip : steps;
  }
};

// Copies one row of a tile, `columns` pixels from `first` on, of this block's channels; zeros where there is no pixel. Rows are dense in shared
// memory: [columns][pairs][2].
template <class S>
struct RowCopy {
  int vector, column, step;  // this thread's vector of channels, its first column, and how far the next is
  int bytes;                 // of a pixel in shared memory
  int channel;
  bool some;

  MBN_DEVICE_MEMBER RowCopy(const Place<S>& place, const Map& map, const Share& share) {
    vector = thread_index() % share.vectors;
    column = thread_index() / share.vectors;
    step = place.active / share.vectors;
    bytes = share.vectors * 16;
    channel = (place.slice * share.vectors + vector) * kVector<S>;
    some = thread_index() < place.active && channel < map.channels;
  }

  // `row` is the tensor's row, of `width` pixels.
  MBN_DEVICE_MEMBER void operator()(char* to, const S* row, int channels, int first, int columns, int width) const {
    if (!some) return;
    const S* from = row + (int64_t(first + column) * channels + channel);
    to += column * bytes + vector * 16;
    for (int i = column; i < columns; i += step) {
      const bool inside = unsigned(first + i) < unsigned(width);
      copy_async(to, inside ? from : row, inside);
      from += int64_t(step) * channels;
      to += step * bytes;
    }
  }
};

// A thread's neighbouring pixels, `channels` numbers apart, from `first` on of a row of `width`.
template <class S, int N>
MBN_DEVICE void add_pixels(Pair (&v)[N], const S* from, int channels, int first, int width) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (unsigned(first + i) < unsigned(width)) {
      const Pair r = load_pair(from, 0);
      v[i] = {v[i].a + r.a, v[i].b + r.b};
    }
    from += channels;
  }
}
// Leaves in v what is stored, as rounded.
template <class S, int N>
MBN_DEVICE void store_pixels(S* to, Pair (&v)[N], int channels, int first, int width) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (unsigned(first + i) < unsigned(width)) v[i] = store_pair(to, 0, v[i]);
    to += channels;
  }
}

// Sums over the column groups of a block: each thread gives N pairs, those of the first group get the sums. `scratch` holds N pairs a thread.
template <int N, class S>
MBN_DEVICE void add_groups(Pair* v, Pair* scratch, const Place<S>& place, int groups) {
  MBN_BARRIER();  // whoever used the scratch memory before is done
  if (thread_index() < place.active) {
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[i * place.active + thread_index()] = v[i];
  }
  MBN_BARRIER();
  if (thread_index() < place.pairs) {
#pragma unroll 1
    for (int g = 1; g < groups; ++g) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Pair other = scratch[i * place.active + g * place.pairs + thread_index()];
        v[i] = {v[i].a + other.a, v[i].b + other.b};
      }
    }
  }
}

}  // namespace mbn
