// y = the depthwise convolution of value(u): in training with the statistics of y, in evaluation normalised, activated and pooled.
#pragma once

#include "depthwise.cuh"

namespace mbn {

// What a window of K rows and columns at stride STRIDE means for a thread: it makes COLUMNS neighbouring outputs of a row, in a ring of the ROWS
// output rows that one input row reaches.
template <int K, int STRIDE>
struct ForwardWindow {
  static constexpr int kColumns = kForwardColumns;
  static constexpr int kRows = (K - 1) / STRIDE + 1;
  static constexpr int kReach = (kColumns - 1) * STRIDE + K;  // input columns
  static MBN_BOTH constexpr int tile(int groups) { return (groups * kColumns - 1) * STRIDE + K; }
};

template <class S, int K, int STRIDE>
MBN_BOTH size_t depthwise_forward_shared(const Share& share) {
  const int pairs = share.vectors * (kVector<S> / 2), active = pairs * share.groups;
  const size_t rows = size_t(kStages) * ForwardWindow<K, STRIDE>::tile(share.groups) * share.vectors * 16, merge = size_t(active) * 7 * 4;
  return (rows > merge ? rows : merge) + (size_t(active) * 5 + size_t(pairs) * K * K) * sizeof(Pair);
}

// Count, mean and sum of squared deviations of a thread's two channels. Means are of what differs from the first number: a float has not the digits
// for the variance of numbers far from zero.
struct Moments {
  Pair pivot, mean, m2;
  float count;

  MBN_DEVICE_MEMBER Moments() : pivot{}, mean{}, m2{}, count(0) {}

  // The first `some` of N numbers, two passes over them.
  template <int N>
  MBN_DEVICE_MEMBER void add(const Pair (&v)[N], int some) {
    if (some <= 0) return;
    if (count == 0) pivot = v[0];
    const float n = float(some < N ? some : N);
    Pair sum = {}, squares = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < some) sum = {sum.a + (v[i].a - pivot.a), sum.b + (v[i].b - pivot.b)};
    }
    const Pair m = {sum.a / n, sum.b / n};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Pair d = {v[i].a - pivot.a - m.a, v[i].b - pivot.b - m.b};
      if (i < some) squares = multiply_add(d, d, squares);
    }
    merge(n, m, squares);
  }
  // Chan, Golub, LeVeque 1983.
  MBN_DEVICE_MEMBER void merge(float n, Pair other_mean, Pair other_m2) {
    const float total = count + n, part = n / total;
    const Pair d = {other_mean.a - mean.a, other_mean.b - mean.b};
    m2 = {m2.a + other_m2.a + d.a * d.a * (count * part), m2.b + other_m2.b + d.b * d.b * (count * part)};
    mean = {mean.a + d.a * part, mean.b + d.b * part};
    count = total;
  }
};

template <class S>
MBN_DEVICE void store_moments(Moments& m, const DepthwiseForward& p, const Place<S>& place, float* scratch) {
  MBN_BARRIER();  // the rows in this memory are used up
  const int n = place.active, t = thread_index();
  if (t < n) {
    const float own[7] = {m.count, m.pivot.a, m.pivot.b, m.mean.a, m.mean.b, m.m2.a, m.m2.b};
#pragma unroll
    for (int i = 0; i < 7; ++i) scratch[i * n + t] = own[i];
  }
  MBN_BARRIER();
  if (t >= place.pairs || place.channel >= p.map.channels) return;
  for (int other = t + place.pairs; other < n; other += place.pairs) {
    if (scratch[other] == 0) continue;
    const Pair pivot = {scratch[n + other], scratch[2 * n + other]};
    if (m.count == 0) m.pivot = pivot;
    const Pair mean = {pivot.a - m.pivot.a + scratch[3 * n + other], pivot.b - m.pivot.b + scratch[4 * n + other]};
    m.merge(scratch[other], mean, {scratch[5 * n + other], scratch[6 * n + other]});
  }
  float* to = p.moments + int64_t(place.group) * 3 * p.map.channels + place.channel;
  store_pair(to, 0, m.pivot);
  store_pair(to, p.map.channels, m.mean);
  store_pair(to, 2 * p.map.channels, m.m2);
  if (place.channel == 0) p.counts[place.group] = m.count;
}

// The input rows of a unit, in the order in which they are loaded and used.
template <int K, int STRIDE>
struct UnitRows {
  int row = 0, end = 0;

  UnitRows() = default;
  MBN_DEVICE_MEMBER UnitRows(const Map& map, const Unit& unit) {
    const int from = unit.first * STRIDE - map.top, to = (unit.end - 1) * STRIDE - map.top + K;
    row = from > 0 ? from : 0;
    end = !unit.live ? row : to < map.height ? to : map.height;
  }
};

template <class S, int K, int STRIDE>
MBN_KERNEL(kMostThreads, forward_blocks(K, STRIDE)) depthwise_forward(const DepthwiseForward p) {
  using Window = ForwardWindow<K, STRIDE>;
  constexpr int C = Window::kColumns, R = Window::kRows;
  const Place<S> place(p.map, p.share);
  const RowCopy<S> copy(place, p.map, p.share);
  const int channels = p.map.channels, channel = place.channel;
  const bool works = channel < channels, training = p.moments != nullptr, evaluation = p.norm.var.numbers != nullptr;
  const int columns = Window::tile(p.share.groups), stage_bytes = columns * copy.bytes;
  char* const stages = shared_memory();
  Pair* const weights = reinterpret_cast<Pair*>(stages + depthwise_forward_shared<S, K, STRIDE>(p.share)) - place.pairs * (K * K);
  Pair* const scratch = weights - 5 * place.active;
  const Pair* const w = weights + place.pair * (K * K);  // side by side; K * K is odd, so neighbours read other banks
  // For want of registers: the thread's factor and summand, its sum for squeeze-excite, and the gate of what it reads.
  Pair* const own = scratch + place.active + 4 * thread_index();

  Pair u_scale = {1, 1}, u_shift = {};
  const bool plain = p.u.scale == nullptr && p.u.gate == nullptr && p.u.act == int(Act::identity);
  if (works) {
    const S* weight = static_cast<const S*>(p.weight) + int64_t(channel) * (K * K);
    for (int i = place.column_group; i < K * K; i += p.share.groups) {
      weights[place.pair * (K * K) + i] = {to_float(weight[i]), to_float(weight[K * K + i])};
    }
    u_scale = vector_pair(p.u.scale, channel, 1);
    u_shift = vector_pair(p.u.shift, channel, 0);
    if (evaluation) fold<S>(p.norm, channel, own[0], own[1]);
    own[2] = {};
    own[3] = {1, 1};
  }
  Moments moments;
  MBN_BARRIER();

  // Rows are fetched some units ahead of their use.
  int fetched = 0, fetch_column = 0;
  const S* fetch_row = nullptr;
  UnitRows<K, STRIDE> ahead;
  const auto fetch = [&](int into) {
    while (ahead.row >= ahead.end && fetched < place.units) {
      const Unit unit(p.share, place.first_image, place.part, fetched++, p.map.out_height);
      ahead = UnitRows<K, STRIDE>(p.map, unit);
      fetch_row = static_cast<const S*>(p.u.y) + (int64_t(unit.image) * p.map.height + ahead.row) * p.map.width * channels;
      fetch_column = unit.tile * p.share.groups * C * STRIDE - p.map.left;
    }
    if (ahead.row < ahead.end) {
      copy(stages + into * stage_bytes, fetch_row, channels, fetch_column, columns, p.map.width);
      fetch_row += int64_t(p.map.width) * channels;
      ++ahead.row;
    }
    commit_copies();  // of nothing, too, so that one group is one row
  };
  for (int i = 0; i < kStages - 1; ++i) fetch(i);

  int stage = 0;
  for (int t = 0; t < place.units; ++t) {
    const Unit unit(p.share, place.first_image, place.part, t, p.map.out_height);
    const UnitRows<K, STRIDE> rows(p.map, unit);
    const int column = (unit.tile * p.share.groups + place.column_group) * C;  // the thread's first output
    const int from = column * STRIDE - p.map.left, some = p.map.out_width - column;
    if (works && p.u.gate != nullptr) own[3] = vector_pair(p.u.gate, int64_t(unit.image) * channels + channel, 1);

    // The next row's value, as the window sees it: 0 where there is no pixel.
    const auto take_row = [&](Pair (&v)[Window::kReach]) {
      MBN_WAIT_COPIES(kStages - 2);
      MBN_BARRIER();
      fetch(stage == 0 ? kStages - 1 : stage - 1);  // the row that was used last
      const S* tile = reinterpret_cast<const S*>(stages + stage * stage_bytes);
      stage = stage + 1 == kStages ? 0 : stage + 1;
      if (!works) return;
      const int at = place.column_group * C * STRIDE * place.pairs + place.pair;
#pragma unroll
      for (int j = 0; j < Window::kReach; ++j) v[j] = load_pair(tile, 2 * (at + j * place.pairs));
      if (plain) return;
#pragma unroll
      for (int j = 0; j < Window::kReach; ++j) v[j] = multiply_add(v[j], u_scale, u_shift);
      activate_all(v, p.u.act);
      const Pair gate = own[3];
#pragma unroll
      for (int j = 0; j < Window::kReach; ++j) {
        const bool inside = unsigned(from + j) < unsigned(p.map.width);
        v[j] = {inside ? v[j].a * gate.a : 0, inside ? v[j].b * gate.b : 0};
      }
    };
    // Output row q is done.
    const auto emit = [&](Pair (&out)[C], int q) {
      if (!works || some <= 0) return;
      if (evaluation) {
        const Pair scale = own[0], shift = own[1];
#pragma unroll
        for (int c = 0; c < C; ++c) out[c] = multiply_add(out[c], scale, shift);
        activate_all(out, p.act);
      }
      const int64_t to = ((int64_t(unit.image) * p.map.out_height + q) * p.map.out_width + column) * channels + channel;
      if (p.residual != nullptr) add_pixels(out, static_cast<const S*>(p.residual) + to, channels, column, p.map.out_width);
      store_pixels(static_cast<S*>(p.y) + to, out, channels, column, p.map.out_width);
      if (training) return moments.add(out, some);
      if (p.pooled == nullptr) return;
      Pair sum = own[2];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (c < some) sum = {sum.a + out[c].a, sum.b + out[c].b};
      }
      own[2] = sum;
    };

    // Row q is made of what ring[0] has of it and of the rows that step q brings: window rows K - STRIDE and on of it. What they mean to rows q + 1 and
    // on is added on the way to the ring's next place. Steps without a row are left out before the first row, and only empty the ring after the last.
    Pair ring[R - 1][C] = {};
    const int first_with = rows.row + p.map.top - (K - 1), begin = unit.first - (R - 1);
    int q = first_with > begin * STRIDE ? divide_up(first_with + K * STRIDE, STRIDE) - K : begin;
    if (q > unit.first) q = unit.first;
    const int after = divide_up(rows.end + p.map.top - (K - STRIDE), STRIDE);  // the first step without a row
    for (; unit.live && q < after && q < unit.end; ++q) {
      Pair out[C];
#pragma unroll
      for (int s = 0; s < STRIDE; ++s) {
        const int i = K - STRIDE + s, row = q * STRIDE - p.map.top + i;
        Pair v[Window::kReach] = {};
        if (row >= rows.row && row < rows.end) take_row(v);
#pragma unroll
        for (int a = 0; a < R; ++a) {
          Pair(&total)[C] = a == 0 ? out : ring[a == 0 ? 0 : a - 1];
          const int tap = i - a * STRIDE;
#pragma unroll
          for (int c = 0; c < C; ++c) {
            if (s == 0) total[c] = a + 1 < R ? ring[a + 1 < R ? a : 0][c] : Pair{};
          }
          if (tap < 0 || tap >= K) continue;
#pragma unroll
          for (int j = 0; j < K; ++j) {
#pragma unroll
            for (int c = 0; c < C; ++c) total[c] = multiply_add(w[tap * K + j], v[c * STRIDE + j], total[c]);
          }
        }
      }
      if (q >= unit.first) emit(out, q);
    }
    for (; unit.live && q < unit.end; ++q) {
      if (q >= unit.first) emit(ring[0], q);
#pragma unroll
      for (int a = 0; a < R - 1; ++a) {
#pragma unroll
        for (int c = 0; c < C; ++c) ring[a][c] = a + 2 < R ? ring[a + 2 < R ? a + 1 : 0][c] : Pair{};
      }
    }
    if (p.pooled != nullptr && (t + 1) % p.share.run == 0) {
      Pair sum = {};
      if (works) {
        sum = {own[2].a * p.factor, own[2].b * p.factor};
        own[2] = {};
      }
      add_groups<1>(&sum, scratch, place, p.share.groups);
      if (works && thread_index() < place.pairs) {
        store_pair(p.pooled, (int64_t(unit.image) * p.share.parts + place.part) * channels + channel, sum);
      }
    }
  }
  if (training) store_moments(moments, p, place, reinterpret_cast<float*>(stages));
}

}  // namespace mbn
