// How a block of threads of the whole-block kernel uses its shared memory: for the kernel, and for those who plan with it.
#pragma once

#include "kernels.h"

namespace mbn {

constexpr int kBlockThreads = 256, kBlockWarps = kBlockThreads / 32;
constexpr int kPad = 8;  // numbers at the end of a row in shared memory: the rows that ldmatrix reads then lie in different banks
constexpr int kPairs = kChunk / 2, kSlots = kBlockThreads / kPairs, kRun = 4;  // a thread's neighbouring output pixels
constexpr int kStride = kChunk + kPad;                                         // of a pixel's chunk in shared memory

// Offsets in shared memory, and the sizes of a tile.
struct BlockMemory {
  int in_width, in_pixels, out_pixels;
  int inner, x_stride;  // input channels in whole products, and as rows in shared memory
  int x, expanded, second, convolved, weights, weights_bytes, expand, project, numbers, gate, inside, scratch, end;

  MBN_BOTH static int place(int& end, int bytes) {
    const int at = end;
    end += (bytes + 15) / 16 * 16;
    return at;
  }
  MBN_BOTH BlockMemory(const InvertedResidual& p, int kernel, int stride) : end(0) {
    constexpr int number = 2;  // bytes of one
    const bool expands = p.expand.weight != nullptr, projects = p.project.weight != nullptr;
    in_width = (p.tile_width - 1) * stride + kernel;
    // A run at a tile's right edge reads further than the tile is wide: up to a run's pixels beyond the last.
    in_pixels = ((p.tile_height - 1) * stride + kernel) * in_width;
    out_pixels = p.tile_height * p.tile_width;
    inner = divide_up(p.in_channels, 16) * 16;
    x_stride = inner + kPad;
    const int rows = divide_up(in_pixels, 16) * 16, tile = (rows + kRun * stride) * kStride * number;
    x = place(end, expands ? rows * x_stride * number : 0);
    expanded = place(end, tile);
    second = expands ? expanded : place(end, tile);  // without expand, the next chunk arrives beside this one
    convolved = place(end, projects ? divide_up(out_pixels, 64) * 64 * kStride * number : 0);
    int of_chunk = 0;
    expand = place(of_chunk, expands ? kChunk * x_stride * number : 0);
    project = place(of_chunk, projects ? divide_up(p.out_channels, 16) * 16 * kStride * number : 0);
    weights_bytes = of_chunk;
    weights = place(end, 2 * of_chunk);
    numbers = place(end, 2 * (4 + kernel * kernel) * kChunk * int(sizeof(float)));
    gate = place(end, p.squeeze.hidden ? (2 * p.map.channels + p.squeeze.hidden) * int(sizeof(float)) : 0);  // and what it is made of
    inside = place(end, rows);
    scratch = place(end, projects ? 0 : kBlockThreads * int(sizeof(Pair)));
  }
};

}  // namespace mbn
