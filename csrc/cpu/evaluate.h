// Evaluation of a whole block, [expand] -> [depthwise (+ squeeze-excite)] -> [project] (+ residual), in one call: the expanded tensor never reaches main
// memory. Every stage's batch norm is folded into a scale and a shift.
//
// A unit is (image, panel of channels, band of output rows): it expands the rows it needs into a ring in scratch, convolves them and leaves the activated
// result in panels, the very layout that the project product reads. Only squeeze-excite makes the second half wait for the whole image.
// What a unit computes depends on the shape alone; threads share the images of a large batch, or the units of one image.
#pragma once

#include "depthwise_rows.h"
#include "gemm.h"

namespace mbn {
namespace MBN_ISA {

constexpr int64_t kProjectRows = 49;  // rows of a project task: an even share for 2 or 4 threads at 14 x 14, and five tiles of 9 or 10 rows

template <class S>
struct EvaluatePlan {
  using T = Accumulate<S>;
  const Evaluate<S>& p;
  int64_t panels, bands, out_pixels, row_blocks;
  int64_t ring_rows, ring_columns;
};

// Rows of `source` [rows][channels] as panels.
template <class S>
static void pack_rows(const S* source, int64_t channels, int64_t all_rows, int64_t begin, int64_t end, Accumulate<S>* panels) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  for (int64_t c = 0; c < channels; c += L) {
    const int count = int(smaller<int64_t>(L, channels - c));
    T* to = panels + c / kPanel<T> * all_rows * kPanel<T> + c % kPanel<T>;
    for (int64_t r = begin; r < end; ++r) store(to + r * kPanel<T>, load(source + r * channels + c, count));
  }
}

// A pointwise weight [out][in] as the right operand of a product.
template <class S>
int64_t packed_pointwise_size(int64_t out, int64_t in) {
  return panel_count<Accumulate<S>>(out) * kPanel<Accumulate<S>> * in;
}
template <class S>
void pack_pointwise(const S* weight, int64_t out, int64_t in, Accumulate<S>* to) {
  pack_panels_to<true>(to, weight, out, in, panel_count<Accumulate<S>>(out), PanelsOf<Accumulate<S>>{out});
}

// A depthwise weight [channels][taps] as [vector of channels][taps][lane].
template <class S>
int64_t packed_depthwise_size(int64_t channels, int64_t taps) {
  constexpr int L = kLanes<Accumulate<S>>;
  return ceil_div(channels, L) * L * taps;
}
template <class S>
void pack_depthwise(const S* weight, int64_t channels, int64_t taps, Accumulate<S>* to) {
  constexpr int L = kLanes<Accumulate<S>>;
  for (int64_t c = 0; c < channels; c += L) {
    for (int64_t q = 0; q < taps; ++q, to += L) {
      S lanes[L] = {};
      for (int64_t i = 0; i < smaller<int64_t>(L, channels - c); ++i) lanes[i] = weight[(c + i) * taps + q];
      store(to, load(lanes));
    }
  }
}

// A tile of left * right to `to`, rows of kPanel numbers: what follows a product here is a loop over it in the first-level cache, so that
// each tile size is compiled once and not once per activation.
template <class T, int R, int NV>
static __attribute__((noinline)) void product_tile(const T* left, int64_t panel_stride, const T* right, int64_t depth, T* to) {
  const Tile<T, R, NV> acc = product<T, R, NV>(left, panel_stride, right, depth);
  MBN_UNROLL
  for (int r = 0; r < R; ++r) {
    MBN_UNROLL
    for (int v = 0; v < NV; ++v) store(to + r * kPanel<T> + v * kLanes<T>, acc.at[r][v]);
  }
}
template <class T>
static void product_into(T* to, int rows, int vectors, const T* left, int64_t panel_stride, const T* right, int64_t depth) {
  with_tile(rows, vectors, [&](auto size) { product_tile<T, size.rows, size.vectors>(left, panel_stride, right, depth, to); });
}

// One row of the panel's input in the ring: for each vector, `ring_columns` columns from -pad_left on, zero outside of the image.
template <class S>
static void expand_row(const EvaluatePlan<S>& plan, const Accumulate<S>* x_panels, int64_t n, int64_t panel, int64_t row, int64_t vector_stride,
                       Accumulate<S>* to) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  const Evaluate<S>& p = plan.p;
  const int64_t c = panel * kPanel<T>, left = smaller(p.window.pad_left, plan.ring_columns);
  const int64_t width = smaller(p.width, plan.ring_columns - left);
  const int vectors = panel_vectors<T>(p.channels, c);
  for (int v = 0; v < vectors; ++v) {
    for (int64_t i = 0; i < left; ++i) store(to + v * vector_stride + i * L, Vec<T>{});
    for (int64_t i = left + width; i < plan.ring_columns; ++i) store(to + v * vector_stride + i * L, Vec<T>{});
  }
  if (p.expand.weight == nullptr) {
    for (int v = 0; v < vectors; ++v) {
      const int count = int(smaller<int64_t>(L, p.channels - c - v * L));
      const S* from = p.x + ((n * p.height + row) * p.width) * p.channels + c + v * L;
      for (int64_t i = 0; i < width; ++i) store(to + v * vector_stride + (left + i) * L, load(from + i * p.channels, count));
    }
    return;
  }
  const T* weight = p.expand.weight + panel * p.in_channels * kPanel<T>;
  const int64_t panel_stride = p.height * p.width * kPanel<T>;
  T tile[kTileRows * kPanel<T>];
  for_tiles(width, [&](int64_t first, int rows) {
    product_into(tile, rows, vectors, x_panels + (row * p.width + first) * kPanel<T>, panel_stride, weight, p.in_channels);
    for (int v = 0; v < vectors; ++v) {
      const int count = int(smaller<int64_t>(L, p.channels - c - v * L));
      const Vec<T> scale = load(p.expand.scale + c + v * L, count), shift = load(p.expand.shift + c + v * L, count);
      T* row_to = to + v * vector_stride + (left + first) * L;
      with_act(p.expand.act, [&](auto act) {
        for (int r = 0; r < rows; ++r) {
          store(row_to + r * L, activate<decltype(act)::act>(scale * load(tile + r * kPanel<T> + v * L) + shift));
        }
      });
    }
  });
}

// Channels of one panel and output rows [begin, end) of image n: expand, depthwise, activate. Into `mid` panels (or the output where there is no
// project), and their sums per channel into `sums`.
template <class S>
static void depthwise_unit(const EvaluatePlan<S>& plan, const Accumulate<S>* x_panels, int64_t n, int64_t panel, int64_t begin, int64_t end,
                           Accumulate<S>* mid, Accumulate<S>* sums) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  const Evaluate<S>& p = plan.p;
  const Window& w = p.window;
  const int64_t c = panel * kPanel<T>, taps = w.kernel_h * w.kernel_w;
  const int vectors = panel_vectors<T>(p.channels, c);
  const T* weights = p.depthwise.weight + c * taps;
  const auto convolve = with_width(w, [](auto width) { return &convolve_row<T, width.kernel, width.stride>; });

  Scratch scratch;
  const int64_t row_stride = ring_row_stride<T>(plan.ring_columns), vector_stride = plan.ring_rows * row_stride;
  T* ring = take<T>(scratch, kPanelVectors * vector_stride);
  T* tile = take<T>(scratch, p.out_width * L);
  Tap* row_taps = take<Tap>(scratch, w.kernel_h);
  Vec<T> total[kPanelVectors] = {};
  int64_t next = larger<int64_t>(0, begin * w.stride_h - w.pad_top);
  for (int64_t out_row = begin; out_row < end; ++out_row) {
    const int64_t top = out_row * w.stride_h - w.pad_top;
    const int64_t last = smaller(p.height, top + (w.kernel_h - 1) * w.dilation_h + 1);
    for (next = larger(next, top); next < last; ++next) {
      expand_row(plan, x_panels, n, panel, next, vector_stride, ring + next % plan.ring_rows * row_stride);
    }
    int64_t count = 0;
    for (int64_t k = 0; k < w.kernel_h; ++k) {
      const int64_t row = top + k * w.dilation_h;
      if (row >= 0 && row < p.height) row_taps[count++] = {row % plan.ring_rows * row_stride, k * w.kernel_w * L};
    }
    for (int v = 0; v < vectors; ++v) {
      convolve({ring + v * vector_stride, weights + v * taps * L, row_taps, count, w.kernel_w, w.stride_w, w.dilation_w}, tile, p.out_width);
      const int lanes = int(smaller<int64_t>(L, p.channels - c - v * L));
      const Vec<T> scale = load(p.depthwise.scale + c + v * L, lanes), shift = load(p.depthwise.shift + c + v * L, lanes);
      Vec<T> row_sum = {};
      with_act(p.depthwise.act, [&](auto act) {
        if (p.project.weight == nullptr) {
          S* to = p.out + ((n * p.out_height + out_row) * p.out_width) * p.channels + c + v * L;
          for (int64_t i = 0; i < p.out_width; ++i) {
            store(to + i * p.channels, activate<decltype(act)::act>(scale * load(tile + i * L) + shift), lanes);
          }
          return;
        }
        T* to = mid + (panel * plan.out_pixels + out_row * p.out_width) * kPanel<T> + v * L;
        for (int64_t i = 0; i < p.out_width; ++i) {
          const Vec<T> z = activate<decltype(act)::act>(scale * load(tile + i * L) + shift);
          row_sum += z;
          store(to + i * kPanel<T>, z);
        }
      });
      total[v] += row_sum;
    }
  }
  if (sums) {
    for (int v = 0; v < vectors; ++v) store(sums + c + v * L, total[v], int(smaller<int64_t>(L, p.channels - c - v * L)));
  }
}

// Rows [begin, end) of image n: gate, multiply by the project weight, normalise, activate, add the residual.
template <class S>
static void project_unit(const EvaluatePlan<S>& plan, int64_t n, int64_t begin, int64_t end, Accumulate<S>* mid, const Accumulate<S>* gate) {
  using T = Accumulate<S>;
  constexpr int L = kLanes<T>;
  const Evaluate<S>& p = plan.p;
  const int64_t depth = p.channels, panel_stride = plan.out_pixels * kPanel<T>;
  if (gate) {
    for (int64_t c = 0; c < depth; c += L) {
      const Vec<T> g = load(gate + c, int(smaller<int64_t>(L, depth - c)));
      T* at = mid + c / kPanel<T> * panel_stride + c % kPanel<T>;
      for (int64_t r = begin; r < end; ++r) store(at + r * kPanel<T>, load(at + r * kPanel<T>) * g);
    }
  }
  T tile[kTileRows * kPanel<T>];
  for (int64_t c = 0; c < p.out_channels; c += kPanel<T>) {
    const T* weight = p.project.weight + c / kPanel<T> * depth * kPanel<T>;
    const int vectors = panel_vectors<T>(p.out_channels, c);
    for_tiles(end - begin, [&](int64_t first, int rows) {
      product_into(tile, rows, vectors, mid + (begin + first) * kPanel<T>, panel_stride, weight, depth);
      for (int v = 0; v < vectors; ++v) {
        const int count = int(smaller<int64_t>(L, p.out_channels - c - v * L));
        const Vec<T> scale = load(p.project.scale + c + v * L, count), shift = load(p.project.shift + c + v * L, count);
        const int64_t at = (n * plan.out_pixels + begin + first) * p.out_channels + c + v * L;
        with_act(p.project.act, [&](auto act) {
          for (int r = 0; r < rows; ++r) {
            Vec<T> z = activate<decltype(act)::act>(scale * load(tile + r * kPanel<T> + v * L) + shift);
            if (p.residual) z += load(p.residual + at + r * p.out_channels, count);
            store(p.out + at + r * p.out_channels, z, count);
          }
        });
      }
    });
  }
}

// out[row] = act(sum over k of weight[row][k] * in[k] + bias[row]) for rows [begin, end).
template <class T>
static void dense_rows(const T* weight, const T* bias, const T* in, int64_t depth, Act act, int64_t begin, int64_t end, T* out) {
  constexpr int L = kLanes<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* w = weight + row * depth;
    Vec<T> sum[4] = {};
    int64_t k = 0;
    for (; k + 4 * L <= depth; k += 4 * L) {
      for (int i = 0; i < 4; ++i) sum[i] += load(w + k + i * L) * load(in + k + i * L);
    }
    for (; k < depth; k += L) {
      const int count = int(smaller<int64_t>(L, depth - k));
      sum[0] += load(w + k, count) * load(in + k, count);
    }
    const Vec<T> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    T n = bias[row];
    for (int i = 0; i < L; ++i) n += all[i];
    with_act(act, [&](auto tag) { out[row] = activate<decltype(tag)::act>(n); });
  }
}

template <class S>
void evaluate(const Evaluate<S>& p) {
  using T = Accumulate<S>;
  const int64_t out_pixels = p.out_height * p.out_width;
  const bool spatial = p.depthwise.weight != nullptr, projects = p.project.weight != nullptr, gated = p.squeeze > 0;
  EvaluatePlan<S> plan = {p, panel_count<T>(p.channels), 1, out_pixels, even_count(ceil_div(out_pixels, kProjectRows), out_pixels / 24), 0, 0};
  if (spatial) {
    const Window& w = p.window;
    plan.bands = larger<int64_t>(1, smaller(ceil_div(8, plan.panels), p.out_height / 8));  // eight units an image, bands of at least eight rows
    plan.ring_rows = (w.kernel_h - 1) * w.dilation_h + 1;
    plan.ring_columns = (p.out_width - 1) * w.stride_w + (w.kernel_w - 1) * w.dilation_w + 1;
  }
  // A unit takes as many slots as it has vectors: so many slots, not units, are an even share of the work.
  const int64_t slots = spatial ? ceil_div(p.channels, kLanes<T>) * plan.bands : 0;
  const int64_t x_channels = p.expand.weight ? p.in_channels : spatial ? 0 : p.channels;  // what a product reads of x
  const int64_t x_size = panel_count<T>(x_channels) * p.height * p.width * kPanel<T>;
  const int64_t mid_size = spatial && projects ? plan.panels * out_pixels * kPanel<T> : 0;

  // The image's steps; run(tasks, f) shares tasks among threads, or not.
  const auto image = [&](int64_t n, T* x_panels, T* mid, T* sums, T* vectors, const auto& run) {
    if (x_channels > 0) {
      const int64_t rows = p.height * p.width, block = 256;
      run(ceil_div(rows, block), [&](int64_t i) {
        pack_rows(p.x + n * rows * x_channels, x_channels, rows, i * block, smaller(rows, (i + 1) * block), x_panels);
      });
    }
    run(slots, [&](int64_t slot) {
      const int64_t panel = slot / (kPanelVectors * plan.bands), vectors_of = panel_vectors<T>(p.channels, panel * kPanel<T>);
      const int64_t at = slot - panel * kPanelVectors * plan.bands, band = at / vectors_of;
      if (at % vectors_of != 0) return;
      depthwise_unit(plan, x_panels, n, panel, band * p.out_height / plan.bands, (band + 1) * p.out_height / plan.bands, mid,
                     gated ? sums + band * p.channels : nullptr);
    });
    T *pooled = vectors, *hidden = pooled + p.channels, *gate = hidden + p.squeeze;
    if (gated) {
      for (int64_t c = 0; c < p.channels; ++c) {
        T sum = 0;
        for (int64_t band = 0; band < plan.bands; ++band) sum += sums[band * p.channels + c];
        pooled[c] = sum / T(out_pixels);
      }
      constexpr int64_t kRows = 16;
      const auto layer = [&](const T* weight, const T* bias, const T* in, int64_t depth, int64_t width, Act act, T* out) {
        run(ceil_div(width, kRows), [&](int64_t i) {
          dense_rows(weight, bias, in, depth, act, i * kRows, smaller(width, (i + 1) * kRows), out);
        });
      };
      layer(p.w1, p.b1, pooled, p.channels, p.squeeze, p.squeeze_act, hidden);
      layer(p.w2, p.b2, hidden, p.squeeze, p.channels, p.gate_act, gate);
    }
    if (!projects) return;
    run(plan.row_blocks, [&](int64_t i) {
      project_unit(plan, n, i * out_pixels / plan.row_blocks, (i + 1) * out_pixels / plan.row_blocks, spatial ? mid : x_panels,
                   gated ? gate : nullptr);
    });
  };
  const auto with_buffers = [&](const auto& f) {
    Scratch local;
    T* x_panels = take<T>(local, x_size);
    T* mid = take<T>(local, mid_size);
    T* sums = take<T>(local, gated ? plan.bands * p.channels : 0);
    f(x_panels, mid, sums, take<T>(local, 2 * p.channels + p.squeeze));
  };

  const int64_t threads = thread_count();
  if (threads == 1 || p.images >= 4 * threads || (p.images > 1 && p.images % threads == 0)) {
    const auto serially = [](int64_t tasks, const auto& f) {
      for (int64_t i = 0; i < tasks; ++i) f(i);
    };
    parallel_tasks(p.images, [&](int64_t begin, int64_t end) {
      with_buffers([&](T* x_panels, T* mid, T* sums, T* vectors) {
        for (int64_t n = begin; n < end; ++n) image(n, x_panels, mid, sums, vectors, serially);
      });
    });
    return;
  }
  const auto together = [](int64_t tasks, const auto& f) {
    parallel_tasks(tasks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  };
  with_buffers([&](T* x_panels, T* mid, T* sums, T* vectors) {
    for (int64_t n = 0; n < p.images; ++n) image(n, x_panels, mid, sums, vectors, together);
  });
}

}  // namespace MBN_ISA
}  // namespace mbn
