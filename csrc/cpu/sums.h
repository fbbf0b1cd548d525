// The sums that a backward kernel reduces in the pass that makes dv (types.h: Sums), for one vector of channels over the rows of a tile, and
// the merge of all tiles' partials in a fixed order.
//
//   with_act(u.act, [&](auto act) { with_quantities(sums, u, [&](auto q) {      // once per tile or per vector of a tile
//     const SumLanes<S> lanes = sum_lanes(u, sums, c, count);
//     SumVectors<S, q.count> sum = {};
//     for (rows) accumulate<act.act>(sum, lanes, dv, y);                       // dv as stored
//     store_sums(sum, lanes, partials, tile, channels, c, count);
//   }); });
//   merge_sums(groups, tiles_per_group, quantities, channels, partials, sums.out);
#pragma once

#include "deferred.h"
#include "statistics.h"

namespace mbn {
namespace MBN_ISA {

template <int Q>
struct QuantityTag {
  static constexpr int count = Q;
};

// How many sums a gradient at u's stage needs: 2, or 5 where the stage has a gate, or none.
template <class S>
MBN_INLINE int quantities_of(const Sums<S>& sums, const Value<S>& u) {
  return sums.out == nullptr ? 0 : u.gate == nullptr ? 2 : 5;
}
template <class S, class F>
MBN_INLINE void with_quantities(const Sums<S>& sums, const Value<S>& u, const F& f) {
  switch (quantities_of(sums, u)) {
    case 0: return f(QuantityTag<0>{});
    case 2: return f(QuantityTag<2>{});
    default: return f(QuantityTag<5>{});
  }
}

template <class S>
struct SumLanes {
  Vec<Accumulate<S>> scale, shift, mean, rstd;
};
template <class S>
MBN_INLINE SumLanes<S> sum_lanes(const Value<S>& u, const Sums<S>& sums, int64_t c, int count) {
  using T = Accumulate<S>;
  return {load_or<T>(u.scale, c, count, 1), load_or<T>(u.shift, c, count, 0), load_or<T>(sums.mean, c, count, 0),
          load_or<T>(sums.rstd, c, count, 1)};
}

template <class S, int Q>
struct SumVectors {
  Vec<Accumulate<S>> at[Q > 0 ? Q : 1];
};

template <Act A, class S, int Q>
MBN_INLINE void accumulate(SumVectors<S, Q>& sum, const SumLanes<S>& l, Vec<Accumulate<S>> dv, Vec<Accumulate<S>> y) {
  if constexpr (Q == 0) return;
  const Vec<Accumulate<S>> n = l.scale * y + l.shift;
  const Vec<Accumulate<S>> d = activate_grad<A>(n), dn = dv * d, deviation = y - l.mean;
  if constexpr (Q == 2) {
    sum.at[0] += dn;
    sum.at[1] += dn * deviation;
  }
  if constexpr (Q == 5) {
    sum.at[0] += dv * activate<A>(n);
    sum.at[1] += dn;
    sum.at[2] += d;
    sum.at[3] += dn * deviation;
    sum.at[4] += d * deviation;
  }
}

// Partials are [tiles][Q][channels]. The deviations are scaled by rstd here, once per tile.
template <class S, int Q>
MBN_INLINE void store_sums(const SumVectors<S, Q>& sum, const SumLanes<S>& l, Accumulate<S>* partials, int64_t tile,
                           int64_t channels, int64_t c, int count) {
  Accumulate<S>* p = partials + tile * Q * channels + c;
  for (int i = 0; i < Q; ++i) {
    const bool scaled = Q == 2 ? i == 1 : i >= 3;
    store(p + i * channels, scaled ? sum.at[i] * l.rstd : sum.at[i], count);
  }
}

// out[q][group][c] = the sum over the group's tiles, in double, of partials[(group*tiles + tile)][q][c]. Without a gate there is one group, with
// one a group per image. Also for gradients of weights: one group, one quantity, channels = numel.
template <class T>
MBN_INLINE void merge_sums(int64_t groups, int64_t tiles, int64_t quantities, int64_t channels, const T* partials, T* out) {
  parallel_channels(channels, groups * tiles * quantities, [&](int64_t begin, int64_t end) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t q = 0; q < quantities; ++q) {
        const T* p = partials + (g * tiles * quantities + q) * channels;
        T* to = out + (q * groups + g) * channels;
        for_double_lanes(begin, end, [&](int64_t c, const auto& load_lanes) {
          decltype(load_lanes(p)) sum = {};
          for (int64_t t = 0; t < tiles; ++t) sum += load_lanes(p + t * quantities * channels + c);
          store_narrowed(to + c, sum);
        });
      }
    }
  });
}

}  // namespace MBN_ISA
}  // namespace mbn
