// The kernels' entry points, a set for each storage type (kernels_*.cu), for the bindings.
#pragma once

#include <string>

#include "types.h"

namespace mbn {

// Whether there is a kernel for windows of this size and stride.
constexpr bool has_window(int64_t kernel, int64_t stride) { return (kernel == 3 || kernel == 5 || kernel == 7) && (stride == 1 || stride == 2); }

constexpr int kMostThreads = 128;  // of a block of a depthwise kernel
// How many blocks of so many threads a multiprocessor should have registers for: as many as leave enough of them.
constexpr int forward_blocks(int kernel, int stride) { return kernel == 3 ? 5 - stride : 2; }

// Neighbouring columns that a thread has, of the output forward and of the steps of STRIDE input columns backward. 7 divides every width of a
// MobileNet at 224; where they do not fit in registers, 4.
constexpr int kForwardColumns = 7;
constexpr int backward_columns(int kernel, int stride) { return kernel > 5 || stride > 1 ? 4 : 7; }

// A whole block: expanded channels at a time; products of 16 output channels that a warp sums up; the most output pixels and channels of a tile.
constexpr int kChunk = 32, kProducts = 5;
constexpr int kMostPixels = 128;
constexpr int most_out_channels(int pixels) { return (pixels > 64 ? 1 : 2) * kProducts * 16; }
constexpr bool has_block(int64_t kernel, int64_t stride) { return has_window(kernel, stride) && kernel < 7; }

template <class S>
void run_depthwise_forward(const DepthwiseForward& p, int kernel, int stride, void* stream);
template <class S>
void run_depthwise_backward(const DepthwiseBackward& p, int kernel, int stride, void* stream);
// Bytes of shared memory that a block takes at most.
template <class S>
size_t depthwise_shared(const Share& share, int kernel, int stride, bool backward);
// 16-bit storage only.
template <class S>
void run_inverted_residual(const InvertedResidual& p, int kernel, int stride, void* stream);

// Why the library's kernels cannot run on the current GPU, or nothing.
std::string missing();

}  // namespace mbn
