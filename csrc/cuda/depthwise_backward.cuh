// du, the sums of the stage before at du, and a part of dweight, from one reading of the output's gradient and of u.
//
// Rows and columns are counted as the window sees them: step m is the STRIDE input rows S*m + s - top, and output row o = m - d meets them through
// window row s + S*d; columns likewise. So one step needs the gradient of the ROWS output rows m, m - 1, …, of which only m is new. It is computed
// once, from what is loaded (chain.py, Gradient), and kept in a ring in shared memory, in float.
#pragma once

#include "depthwise.cuh"

namespace mbn {

template <int K, int STRIDE>
struct BackwardWindow {
  static constexpr int kColumns = backward_columns(K, STRIDE);  // steps of columns of a thread
  static constexpr int kRows = (K - 1) / STRIDE + 1;            // output rows, and columns, that one step meets
  static constexpr int kReach = kColumns + kRows - 1;           // output columns that a thread meets
  static constexpr int kStages = 3;
  static MBN_BOTH constexpr int tile(int groups) { return groups * kColumns + kRows - 1; }
};

// Where things are in shared memory.
template <class S, int K, int STRIDE>
struct BackwardMemory {
  using Window = BackwardWindow<K, STRIDE>;
  int gradient_row, value_row, stage;  // bytes: of a row of dv or y, of x, of all that a step brings
  size_t ring, weight, scratch, end;   // offsets

  MBN_BOTH explicit BackwardMemory(const DepthwiseBackward& p) {
    const Share& share = p.share;
    const int pairs = share.vectors * (kVector<S> / 2), bytes = share.vectors * 16;
    gradient_row = Window::tile(share.groups) * bytes;
    value_row = share.groups * Window::kColumns * STRIDE * bytes;
    stage = gradient_row * (p.g.of.y != nullptr ? 2 : 1) + (reads_value(p) ? STRIDE * value_row : 0);
    ring = size_t(Window::kStages) * stage;
    weight = ring + size_t(Window::kRows) * ring_row(share.groups) * pairs * sizeof(Pair);
    scratch = weight + size_t(K) * K * pairs * sizeof(Pair);
    end = scratch + size_t(share.groups) * pairs * (K > 5 ? K : 5) * sizeof(Pair);
  }
  // Columns of a row of the ring, which is [pairs][columns], as the window's weights are [pairs][K * K]: what a thread reads then lies side by side, and
  // since both are odd, in other banks than what its neighbours read.
  static MBN_BOTH constexpr int ring_row(int groups) { return Window::tile(groups) | 1; }
  static MBN_BOTH bool reads_value(const DepthwiseBackward& p) { return p.dweight != nullptr || p.sums != nullptr; }
};

// The gradient of two channels' raw outputs, for any column.
template <class S>
struct OutputGradient {
  Pair scale, shift, a, b, c, gate, q;
  bool has_y, gated, normed;

  MBN_DEVICE_MEMBER OutputGradient(const Gradient& g, int channel, bool works)
      : scale{1, 1}, shift{}, a{1, 1}, b{}, c{}, gate{1, 1}, q{}, has_y(g.of.y != nullptr), gated(g.of.gate != nullptr), normed(g.b != nullptr) {
    if (!works) return;
    scale = vector_pair(g.of.scale, channel, 1);
    shift = vector_pair(g.of.shift, channel, 0);
    a = vector_pair(g.a, channel, 1);
    b = vector_pair(g.b, channel, 0);
    c = vector_pair(g.c, channel, 0);
  }
  MBN_DEVICE_MEMBER void of_image(const Gradient& g, int64_t at) {
    if (!gated) return;
    gate = vector_pair(g.of.gate, at, 1);
    q = vector_pair(g.q, at, 0);
  }
  template <Act A>
  MBN_DEVICE_MEMBER Pair of(Pair dv, Pair y) const {
    Pair h = gated ? multiply_add(dv, gate, q) : dv;
    if (A != Act::identity) {
      const Pair n = multiply_add(y, scale, shift);
      h = {h.a * activate_grad<A>(n.a), h.b * activate_grad<A>(n.b)};
    }
    h = {h.a * a.a, h.b * a.b};
    if (!normed) return h;
    const Pair shifted = multiply_add(y, b, c);
    return {h.a + shifted.a, h.b + shifted.b};
  }
};

// The sums of a stage's backward for two channels (docs/design.md, "Backward"): T2 and T4, and with a gate T1, T3 and T5.
struct Sums {
  Pair t[5] = {};

  template <Act A>
  MBN_DEVICE_MEMBER void add(Pair dv, Pair n, Pair x, bool gated) {
    const Pair d = {activate_grad<A>(n.a), activate_grad<A>(n.b)}, h = {dv.a * d.a, dv.b * d.b};
    const Pair one = {1, 1};
    t[1] = multiply_add(h, one, t[1]);
    t[3] = multiply_add(h, x, t[3]);
    if (!gated) return;
    t[0] = multiply_add(dv, {activate<A>(n.a), activate<A>(n.b)}, t[0]);
    t[2] = multiply_add(d, one, t[2]);
    t[4] = multiply_add(d, x, t[4]);
  }
};

// The steps of a unit, in the order in which they are loaded and used: those before `first` bring only the output's gradient.
template <int K, int STRIDE>
struct UnitSteps {
  int step = 0, first = 0, end = 0, rows = 0;

  UnitSteps() = default;
  MBN_DEVICE_MEMBER UnitSteps(const Map& map, const Unit& unit) : rows(map.out_height) {
    const int lowest = map.top / STRIDE, before = BackwardWindow<K, STRIDE>::kRows - 1;
    first = lowest + unit.first;
    end = unit.live ? lowest + unit.end : first;
    step = !unit.live ? end : first > before ? first - before : 0;
    if (step < first && step >= rows) step = first;
  }
  MBN_DEVICE_MEMBER void next() {
    ++step;
    if (step < first && step >= rows) step = first;
  }
  MBN_DEVICE_MEMBER bool gradient() const { return step < rows; }
  MBN_DEVICE_MEMBER bool values() const { return step >= first; }
};

template <class S, int K, int STRIDE>
MBN_KERNEL(kMostThreads, 2) depthwise_backward(const DepthwiseBackward p) {
  using Window = BackwardWindow<K, STRIDE>;
  constexpr int C = Window::kColumns, R = Window::kRows, E = STRIDE * C;
  const Place<S> place(p.map, p.share);
  const RowCopy<S> copy(place, p.map, p.share);
  const BackwardMemory<S, K, STRIDE> memory(p);
  const int channels = p.map.channels, channel = place.channel, pairs = place.pairs;
  const int tile = Window::tile(p.share.groups), ring_row = memory.ring_row(p.share.groups);
  const int lowest_column = p.map.left / STRIDE;
  const bool works = channel < channels, reads_value = memory.reads_value(p), gated = p.u.gate != nullptr;
  char* const stages = shared_memory();
  Pair* const ring = reinterpret_cast<Pair*>(stages + memory.ring) + place.pair * ring_row;
  Pair* const scratch = reinterpret_cast<Pair*>(stages + memory.scratch);

  Pair* const w = reinterpret_cast<Pair*>(stages + memory.weight) + place.pair * (K * K);  // with dw there are not registers enough
  Pair dw[K * K] = {}, u_scale = {1, 1}, u_shift = {}, u_gate = {1, 1}, rstd = {1, 1}, mean = {};
  OutputGradient<S> gradient(p.g, channel, works);
  Sums sums;
  if (works) {
    const S* weight = static_cast<const S*>(p.weight) + int64_t(channel) * (K * K);
    for (int i = place.column_group; i < K * K; i += p.share.groups) w[i] = {to_float(weight[i]), to_float(weight[K * K + i])};
    u_scale = vector_pair(p.u.scale, channel, 1);
    u_shift = vector_pair(p.u.shift, channel, 0);
    mean = vector_pair(p.mean, channel, 0);
    rstd = vector_pair(p.rstd, channel, 1);
  }

  int fetched = 0, fetch_image = 0, fetch_column = 0;
  UnitSteps<K, STRIDE> ahead;
  const auto fetch = [&](int into) {
    while (ahead.step >= ahead.end && fetched < place.units) {
      const Unit unit(p.share, place.first_image, place.part, fetched++, divide_up(p.map.height + p.map.top, STRIDE) - p.map.top / STRIDE);
      ahead = UnitSteps<K, STRIDE>(p.map, unit);
      fetch_image = unit.image;
      fetch_column = lowest_column + unit.tile * p.share.groups * C;
    }
    if (ahead.step < ahead.end) {
      char* to = stages + into * memory.stage;
      if (ahead.gradient()) {
        const int64_t row = (int64_t(fetch_image) * p.map.out_height + ahead.step) * p.map.out_width * channels;
        const int first = fetch_column - (R - 1);
        copy(to, static_cast<const S*>(p.g.dv) + row, channels, first, tile, p.map.out_width);
        if (gradient.has_y) copy(to + memory.gradient_row, static_cast<const S*>(p.g.of.y) + row, channels, first, tile, p.map.out_width);
      }
      to += memory.gradient_row * (gradient.has_y ? 2 : 1);
#pragma unroll
      for (int s = 0; s < STRIDE; ++s) {
        const int h = STRIDE * ahead.step + s - p.map.top;
        if (!reads_value || !ahead.values() || h < 0 || h >= p.map.height) continue;
        const S* row = static_cast<const S*>(p.u.y) + (int64_t(fetch_image) * p.map.height + h) * p.map.width * channels;
        copy(to + s * memory.value_row, row, channels, STRIDE * fetch_column - p.map.left, p.share.groups * E, p.map.width);
      }
      ahead.next();
    }
    commit_copies();  // of nothing, too, so that one group is one step
  };
  for (int i = 0; i < Window::kStages - 1; ++i) fetch(i);

  int stage = 0;
  for (int t = 0; t < place.units; ++t) {
    const Unit unit(p.share, place.first_image, place.part, t, divide_up(p.map.height + p.map.top, STRIDE) - p.map.top / STRIDE);
    const int tile_column = lowest_column + unit.tile * p.share.groups * C;
    if (works) {
      const int64_t of_image = int64_t(unit.image) * channels + channel;
      gradient.of_image(p.g, of_image);
      u_gate = vector_pair(p.u.gate, gated ? of_image : 0, 1);
    }
    for (UnitSteps<K, STRIDE> steps(p.map, unit); steps.step < steps.end; steps.next()) {
      const int m = steps.step;
      MBN_WAIT_COPIES(Window::kStages - 2);
      MBN_BARRIER();
      fetch(stage == 0 ? Window::kStages - 1 : stage - 1);  // the step that was used last
      const char* const raw = stages + stage * memory.stage;
      stage = stage + 1 == Window::kStages ? 0 : stage + 1;
      if (works && steps.gradient()) {
        const S* dv = reinterpret_cast<const S*>(raw);
        const S* y = gradient.has_y ? reinterpret_cast<const S*>(raw + memory.gradient_row) : dv;
        Pair* to = ring + m % R * pairs * ring_row;
        with_act(static_cast<Act>(p.g.of.act), [&](auto tag) {
          for (int i = place.column_group; i < tile; i += p.share.groups) {
            const int o = tile_column - (R - 1) + i, at = 2 * (i * pairs + place.pair);
            const Pair dy = gradient.template of<decltype(tag)::act>(load_pair(dv, at), load_pair(y, at));
            to[i] = unsigned(o) < unsigned(p.map.out_width) ? dy : Pair{};
          }
        });
      }
      MBN_BARRIER();
      if (!works || !steps.values()) continue;
      const char* const values = raw + memory.gradient_row * (gradient.has_y ? 2 : 1);
      const int column = STRIDE * (tile_column + place.column_group * C) - p.map.left;  // the thread's first input
#pragma unroll
      for (int s = 0; s < STRIDE; ++s) {
        const int h = STRIDE * m + s - p.map.top;
        if (h < 0 || h >= p.map.height) continue;
        const S* x = reinterpret_cast<const S*>(values + s * memory.value_row);
        const auto x_at = [&](int e) { return load_pair(x, 2 * ((place.column_group * E + e) * pairs + place.pair)); };
        Pair v[E] = {}, du[E] = {};
        if (p.dweight != nullptr) {
#pragma unroll
          for (int e = 0; e < E; ++e) v[e] = multiply_add(x_at(e), u_scale, u_shift);
          activate_all(v, p.u.act);
#pragma unroll
          for (int e = 0; e < E; ++e) {
            const bool inside = unsigned(column + e) < unsigned(p.map.width);
            v[e] = {inside ? v[e].a * u_gate.a : 0, inside ? v[e].b * u_gate.b : 0};
          }
        }
#pragma unroll
        for (int d = 0; d < R; ++d) {
          const int i = s + STRIDE * d;
          if (i >= K || unsigned(m - d) >= unsigned(p.map.out_height)) continue;
          const Pair* dy_row = ring + (m - d) % R * pairs * ring_row + place.column_group * C;
          Pair dy[Window::kReach];
#pragma unroll
          for (int f = 0; f < Window::kReach; ++f) dy[f] = dy_row[f];
#pragma unroll
          for (int j = 0; j < K; ++j) {
            const Pair weight = w[i * K + j];
#pragma unroll
            for (int e = j % STRIDE; e < E; e += STRIDE) {
              const Pair met = dy[e / STRIDE - j / STRIDE + R - 1];
              du[e] = multiply_add(weight, met, du[e]);
              dw[i * K + j] = multiply_add(v[e], met, dw[i * K + j]);
            }
          }
        }
        if (p.du == nullptr) continue;
        const int64_t to = ((int64_t(unit.image) * p.map.height + h) * p.map.width + column) * channels + channel;
        if (p.residual != nullptr) add_pixels(du, static_cast<const S*>(p.residual) + to, channels, column, p.map.width);
        store_pixels(static_cast<S*>(p.du) + to, du, channels, column, p.map.width);
        if (p.sums == nullptr) continue;
        with_act(static_cast<Act>(p.u.act), [&](auto tag) {
#pragma unroll
          for (int e = 0; e < E; ++e) {
            if (unsigned(column + e) >= unsigned(p.map.width)) continue;
            const Pair raw_x = x_at(e), normal = {(raw_x.a - mean.a) * rstd.a, (raw_x.b - mean.b) * rstd.b};
            sums.template add<decltype(tag)::act>(du[e], multiply_add(raw_x, u_scale, u_shift), normal, gated);
          }
        });
      }
    }
    if (p.sums != nullptr && gated && (t + 1) % p.share.run == 0) {
      add_groups<5>(sums.t, scratch, place, p.share.groups);
      if (works && thread_index() < pairs) {
        float* to = p.sums + (int64_t(unit.image) * p.share.parts + place.part) * 5 * channels + channel;
#pragma unroll
        for (int i = 0; i < 5; ++i) store_pair(to, i * channels, sums.t[i]);
      }
      sums = Sums();
    }
  }
  if (p.sums != nullptr && !gated) {
    add_groups<5>(sums.t, scratch, place, p.share.groups);
    if (works && thread_index() < pairs) {
      float* to = p.sums + int64_t(place.group) * 2 * channels + channel;
      store_pair(to, 0, sums.t[1]);
      store_pair(to, channels, sums.t[3]);
    }
  }
  if (p.dweight == nullptr) return;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    add_groups<K>(dw + i * K, scratch, place, p.share.groups);
  }
  if (works && thread_index() < pairs) {
    float* to = p.dweight + (int64_t(place.group) * channels + channel) * (K * K);
#pragma unroll
    for (int i = 0; i < K * K; ++i) {
      to[i] = dw[i].a;
      to[K * K + i] = dw[i].b;
    }
  }
}

}  // namespace mbn
