// A whole inverted-residual block in evaluation: expand, depthwise, project, with the expanded tensor in shared memory and registers only.
//
// A block of threads makes one tile of output pixels of one image. It loads the input tile with its halo once; then, for each chunk of expanded
// channels, expands it (tensor cores), convolves it (a thread has two channels and a few neighbouring pixels) and multiplies it into the sums of the
// project convolution, which stay in registers (tensor cores). The next chunk's weights arrive meanwhile.
#pragma once

#include "depthwise.cuh"
#include "inverted_residual_memory.h"

namespace mbn {

template <class S, int K, int STRIDE>
struct BlockOfThreads {
  const InvertedResidual& p;
  const BlockMemory memory;
  char* const shared;
  const int thread, lane, warp;
  int image, row, column;  // of the tile's first output pixel
  int chunk;
  float sums[kProducts][2][4];

  MBN_DEVICE_MEMBER explicit BlockOfThreads(const InvertedResidual& params)
      : p(params), memory(params, K, STRIDE), shared(shared_memory()), thread(thread_index()), lane(thread % kWarp), warp(thread / kWarp), chunk(0), sums{} {
    const int tiles = p.tiles_down * p.tiles_across, tile = block_index() % tiles;
    image = block_index() / tiles;
    row = tile / p.tiles_across * p.tile_height;
    column = tile % p.tiles_across * p.tile_width;
  }

  template <class T>
  MBN_DEVICE_MEMBER T* at(int offset) const {
    return reinterpret_cast<T*>(shared + offset);
  }
  MBN_DEVICE_MEMBER S* weights_at(int offset, int of_chunk) const { return at<S>(memory.weights + of_chunk % 2 * memory.weights_bytes + offset); }
  // Rows of kChunk: expand's factors and summands, depthwise's, and its window's weights.
  MBN_DEVICE_MEMBER float* numbers_at(int of_chunk) const { return at<float>(memory.numbers) + of_chunk % 2 * (4 + K * K) * kChunk; }
  MBN_DEVICE_MEMBER S* expanded(int of_chunk) const { return at<S>(of_chunk % 2 ? memory.second : memory.expanded); }
  MBN_DEVICE_MEMBER bool expands() const { return p.expand.weight != nullptr; }
  MBN_DEVICE_MEMBER bool projects() const { return p.project.weight != nullptr; }

  // Rows of `vectors` pieces of 16 bytes, of which those from `given` on are zeros.
  template <class Row>
  MBN_DEVICE_MEMBER void copy_rows(S* to, int stride, int rows, int vectors, int given, const Row& row_of) const {
    for (int i = thread; i < rows * vectors; i += kBlockThreads) {
      const int r = i / vectors, v = i % vectors;
      const S* from = row_of(r);
      const bool wanted = from != nullptr && v < given;
      copy_async(to + r * stride + v * kVector<S>, wanted ? from + v * kVector<S> : static_cast<const S*>(p.x), wanted);
    }
  }
  // The input tile's pixel, null outside of the image.
  MBN_DEVICE_MEMBER const S* input(int pixel, int channel) const {
    const int h = row * STRIDE - p.map.top + pixel / memory.in_width, w = column * STRIDE - p.map.left + pixel % memory.in_width;
    if (h < 0 || h >= p.map.height || w < 0 || w >= p.map.width) return nullptr;
    return static_cast<const S*>(p.x) + ((int64_t(image) * p.map.height + h) * p.map.width + w) * p.in_channels + channel;
  }

  MBN_DEVICE_MEMBER void load_input() const {
    char* const inside = at<char>(memory.inside);
    for (int i = thread; i < divide_up(memory.in_pixels, 16) * 16; i += kBlockThreads) inside[i] = i < memory.in_pixels && input(i, 0) != nullptr;
    if (!expands()) return;
    copy_rows(at<S>(memory.x), memory.x_stride, divide_up(memory.in_pixels, 16) * 16, memory.inner / kVector<S>, p.in_channels / kVector<S>,
              [&](int r) { return r < memory.in_pixels ? input(r, 0) : nullptr; });
  }

  // What chunk c needs from memory, without waiting.
  MBN_DEVICE_MEMBER void load_chunk(int c) const {
    const int first = c * kChunk, given = (p.map.channels - first < kChunk ? p.map.channels - first : kChunk) / kVector<S>;
    if (given <= 0) return;
    if (expands()) {
      copy_rows(weights_at(memory.expand, c), memory.x_stride, kChunk, memory.inner / kVector<S>, p.in_channels / kVector<S>, [&](int r) {
        return first + r < p.map.channels ? static_cast<const S*>(p.expand.weight) + int64_t(first + r) * p.in_channels : nullptr;
      });
    } else {
      copy_rows(expanded(c), kStride, memory.in_pixels, kChunk / kVector<S>, given, [&](int r) { return input(r, first); });
    }
    if (projects()) {
      copy_rows(weights_at(memory.project, c), kStride, p.out_channels, kChunk / kVector<S>, given,
                [&](int r) { return static_cast<const S*>(p.project.weight) + int64_t(r) * p.map.channels + first; });
    }
  }
  // The numbers of chunk c that threads want as floats: batch norms, folded, and the depthwise weights, channels side by side.
  MBN_DEVICE_MEMBER void load_numbers(int c) const {
    const int first = c * kChunk, given = p.map.channels - first < kChunk ? p.map.channels - first : kChunk;
    float* const to = numbers_at(c);
    if constexpr (K == 1) {  // the gate in the window's place
      if (thread >= given) return;
      to[2 * kChunk + thread] = 1;
      to[3 * kChunk + thread] = 0;
      to[4 * kChunk + thread] = at<float>(memory.gate)[first + thread];
      return;
    }
    const bool of_expand = thread < kPairs;
    const int channel = 2 * (thread % kPairs);
    if (thread < 2 * kPairs && channel < given && (expands() || !of_expand)) {
      Pair scale, shift;
      fold<S>(of_expand ? p.expand.norm : p.depthwise.norm, first + channel, scale, shift);
      store_pair(to + (of_expand ? 0 : 2 * kChunk), channel, scale);
      store_pair(to + (of_expand ? kChunk : 3 * kChunk), channel, shift);
    }
    const S* const weight = static_cast<const S*>(p.depthwise.weight) + int64_t(first) * K * K;
    for (int i = thread; i < given * K * K; i += kBlockThreads) to[(4 + i % (K * K)) * kChunk + i / (K * K)] = to_float(weight[i]);
  }

  // Squeeze-excite's two layers, by a warp for each of their outputs.
  MBN_DEVICE_MEMBER void make_gate() const {
    const Squeeze& s = p.squeeze;
    const int channels = p.map.channels;
    float* const gate = at<float>(memory.gate);
    float* const mean = gate + channels;
    float* const hidden = mean + channels;
    for (int c = thread; c < channels; c += kBlockThreads) {
      float sum = 0;
      for (int part = 0; part < s.parts; ++part) sum += s.pooled[(int64_t(image) * s.parts + part) * channels + c];
      mean[c] = sum;
    }
    MBN_BARRIER();
    layer(hidden, s.hidden, mean, channels, s.w1, s.b1, s.act);
    MBN_BARRIER();
    layer(gate, channels, hidden, s.hidden, s.w2, s.b2, s.gate_act);
    MBN_BARRIER();
  }
  MBN_DEVICE_MEMBER void layer(float* out, int outer, const float* in, int inner, const Parameter& weight, const Parameter& bias, int act) const {
    for (int o = warp; o < outer; o += kBlockWarps) {
      float sum = 0;
      for (int i = lane; i < inner; i += kWarp) sum = fmaf(parameter<S>(weight, int64_t(o) * inner + i), in[i], sum);
      Pair v[1] = {{sum_of_warp(sum) + parameter<S>(bias, o), 0}};
      activate_all(v, act);
      if (lane == 0) out[o] = v[0].a;
    }
  }

  // Two 8-column blocks of a matrix whose rows lie in shared memory: the second factor of two products.
  MBN_DEVICE_MEMBER void load_columns(uint32_t (&b)[4], const S* rows, int stride, int first_row, int inner) const {
    load_matrices(b, rows + (first_row + lane / 16 * 8 + lane % 8) * stride + inner + lane / 8 % 2 * 8);
  }
  MBN_DEVICE_MEMBER void load_rows(uint32_t (&a)[4], const S* rows, int stride, int first_row, int inner) const {
    load_matrices(a, rows + (first_row + lane % 16) * stride + inner + lane / 16 * 8);
  }

  // The expanded chunk of every pixel of the input tile, 0 outside of the image: what the depthwise convolution is padded with.
  MBN_DEVICE_MEMBER void expand_chunk() const {
    const S* const x = at<S>(memory.x);
    const S* const w = weights_at(memory.expand, chunk);
    const float* const norms = numbers_at(chunk);
    S* const to = expanded(chunk);
#pragma unroll 1
    for (int m = warp * 16; m < memory.in_pixels; m += kBlockWarps * 16) {
      float product[kChunk / 8][4] = {};
#pragma unroll 1
      for (int k = 0; k < memory.inner; k += 16) {
        uint32_t a[4], b[4];
        load_rows(a, x, memory.x_stride, m, k);
#pragma unroll
        for (int n = 0; n < kChunk / 16; ++n) {
          load_columns(b, w, memory.x_stride, 16 * n, k);
          multiply<S>(product[2 * n], a, b[0], b[1]);
          multiply<S>(product[2 * n + 1], a, b[2], b[3]);
        }
      }
      const int first = m + lane / 4;
      const bool inside[2] = {at<char>(memory.inside)[first] != 0, at<char>(memory.inside)[first + 8] != 0};
      Pair v[kChunk / 4];
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
        const int channel = 8 * n + lane % 4 * 2;
        const Pair scale = load_pair(norms, channel), shift = load_pair(norms + kChunk, channel);
        v[2 * n] = multiply_add({product[n][0], product[n][1]}, scale, shift);
        v[2 * n + 1] = multiply_add({product[n][2], product[n][3]}, scale, shift);
      }
      activate_all(v, p.expand.act);
#pragma unroll
      for (int n = 0; n < kChunk / 4; ++n) {
        store_pair(to + (first + n % 2 * 8) * kStride, n / 2 * 8 + lane % 4 * 2, inside[n % 2] ? v[n] : Pair{});
      }
    }
  }

  // The depthwise stage of the chunk: for the project convolution, or out to memory with its sums for squeeze-excite.
  MBN_DEVICE_MEMBER void convolve_chunk() const {
    const int pair = thread % kPairs, slot = thread / kPairs, channel = chunk * kChunk + 2 * pair;
    const bool works = channel < p.map.channels;
    const S* const from = expanded(chunk) + 2 * pair;
    const int runs = divide_up(p.tile_width, kRun);
    const float* const numbers = numbers_at(chunk) + 2 * pair;
    Pair squeezed = {};
#pragma unroll 1
    for (int i = slot; i < p.tile_height * runs; i += kSlots) {
      const int h = i / runs, first = i % runs * kRun;
      Pair v[kRun] = {};
      if (works) {
#pragma unroll
        for (int r = 0; r < K; ++r) {
          const S* const line = from + ((h * STRIDE + r) * memory.in_width + first * STRIDE) * kStride;
          Pair met[(kRun - 1) * STRIDE + K];
#pragma unroll
          for (int j = 0; j < (kRun - 1) * STRIDE + K; ++j) met[j] = load_pair(line, j * kStride);
#pragma unroll
          for (int j = 0; j < K; ++j) {
            const Pair w = load_pair(numbers, (4 + r * K + j) * kChunk);
#pragma unroll
            for (int o = 0; o < kRun; ++o) v[o] = multiply_add(w, met[o * STRIDE + j], v[o]);
          }
        }
        const Pair scale = load_pair(numbers, 2 * kChunk), shift = load_pair(numbers, 3 * kChunk);
#pragma unroll
        for (int o = 0; o < kRun; ++o) v[o] = multiply_add(v[o], scale, shift);
        activate_all(v, p.depthwise.act);
      }
#pragma unroll
      for (int o = 0; o < kRun; ++o) {
        if (first + o >= p.tile_width) continue;
        if (projects()) {
          store_pair(at<S>(memory.convolved) + (h * p.tile_width + first + o) * kStride, 2 * pair, v[o]);
        } else if (works && row + h < p.map.out_height && column + first + o < p.map.out_width) {
          const int64_t pixel = (int64_t(image) * p.map.out_height + row + h) * p.map.out_width + column + first + o;
          const Pair stored = store_pair(static_cast<S*>(p.out), pixel * p.map.channels + channel, v[o]);
          squeezed = {squeezed.a + stored.a, squeezed.b + stored.b};
        }
      }
    }
    if (p.pooled != nullptr) store_pooled(squeezed, pair, slot, channel);
  }

  MBN_DEVICE_MEMBER void store_pooled(Pair squeezed, int pair, int slot, int channel) const {
    Pair* const scratch = at<Pair>(memory.scratch);
    scratch[thread] = squeezed;
    MBN_BARRIER();
    if (slot != 0 || channel >= p.map.channels) return;
    for (int s = 1; s < kSlots; ++s) {
      const Pair other = scratch[s * kPairs + pair];
      squeezed = {squeezed.a + other.a, squeezed.b + other.b};
    }
    store_pair(p.pooled, int64_t(block_index()) * p.map.channels + channel, {squeezed.a * p.factor, squeezed.b * p.factor});
  }

  // The project convolution's 16-pixel rows, 4 or 8, are shared among the warps, and where there are 4, the output channels are, too.
  MBN_DEVICE_MEMBER int rows_of_products() const { return memory.out_pixels > 64 ? 8 : 4; }
  MBN_DEVICE_MEMBER int products_row() const { return warp % rows_of_products() * 16; }
  MBN_DEVICE_MEMBER int first_output(int n) const { return (n * (kBlockWarps / rows_of_products()) + warp / rows_of_products()) * 16; }

  MBN_DEVICE_MEMBER void project_chunk() {
    const S* const from = at<S>(memory.convolved);
    const S* const w = weights_at(memory.project, chunk);
#pragma unroll
    for (int k = 0; k < kChunk; k += 16) {
      uint32_t a[4], b[4];
      load_rows(a, from, kStride, products_row(), k);
#pragma unroll
      for (int n = 0; n < kProducts; ++n) {
        if (first_output(n) >= p.out_channels) continue;
        load_columns(b, w, kStride, first_output(n), k);
        multiply<S>(sums[n][0], a, b[0], b[1]);
        multiply<S>(sums[n][1], a, b[2], b[3]);
      }
    }
  }

  // Normalises, activates, adds the input and stores.
  MBN_DEVICE_MEMBER void finish() {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int channel = first_output(n) + 8 * i + lane % 4 * 2;
        if (channel >= p.out_channels) continue;
        Pair scale, shift;
        fold<S>(p.project.norm, channel, scale, shift);
        Pair v[2] = {multiply_add({sums[n][i][0], sums[n][i][1]}, scale, shift), multiply_add({sums[n][i][2], sums[n][i][3]}, scale, shift)};
        activate_all(v, p.project.act);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = products_row() + lane / 4 + 8 * half, h = row + pixel / p.tile_width, w = column + pixel % p.tile_width;
          if (pixel >= memory.out_pixels || h >= p.map.out_height || w >= p.map.out_width) continue;
          const int64_t to = ((int64_t(image) * p.map.out_height + h) * p.map.out_width + w) * p.out_channels + channel;
          if (p.residual != nullptr) {
            const Pair x = load_pair(static_cast<const S*>(p.residual), to);
            v[half] = {v[half].a + x.a, v[half].b + x.b};
          }
          store_pair(static_cast<S*>(p.out), to, v[half]);
        }
      }
    }
  }

  MBN_DEVICE_MEMBER void run() {
    load_input();
    load_chunk(0);
    commit_copies();
    if constexpr (K == 1) make_gate();
    load_numbers(0);
    const int chunks = divide_up(p.map.channels, kChunk);
    for (; chunk < chunks; ++chunk) {
      MBN_WAIT_COPIES(0);
      MBN_BARRIER();
      load_chunk(chunk + 1);
      commit_copies();
      load_numbers(chunk + 1);
      if (expands()) {
        expand_chunk();
        MBN_BARRIER();
      }
      convolve_chunk();
      MBN_BARRIER();
      if (projects()) project_chunk();
    }
    if (projects()) finish();
  }
};

template <class S, int K, int STRIDE>
MBN_KERNEL(kBlockThreads, 2) inverted_residual(const InvertedResidual p) {
  BlockOfThreads<S, K, STRIDE>(p).run();
}

}  // namespace mbn
