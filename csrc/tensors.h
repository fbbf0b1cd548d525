// Tensors as arguments of kernels: what they have to be, said in one sentence where they are not. For the bindings of one device: the including file
// defines MBN_DEVICE_NAME and MBN_IS_ON_DEVICE(tensor).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "check.h"

namespace mbn {
namespace binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Shape {
  int64_t images, channels, height, width;
  int64_t pixels() const { return height * width; }
};

template <class Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// A schema takes None for a tensor.
inline void check_defined(const char* op, const char* name, const Tensor& t) {
  MBN_CHECK(t.defined(), op, ": ", name, ": expected a tensor, got none");
}

inline void check_kind(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  check_defined(op, name, t);
  MBN_CHECK(MBN_IS_ON_DEVICE(t), op, ": ", name, ": expected a " MBN_DEVICE_NAME " tensor, got one on another device");
  MBN_CHECK(t.scalar_type() == dtype, op, ": ", name, ": expected ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  // Who shards parameters frees their storage and leaves the tensor as it is.
  MBN_CHECK(t.const_data_ptr() != nullptr || t.numel() == 0, op, ": ", name, ": expected a tensor with memory, got one whose memory was freed");
}

// The strides of dimensions of size 1 mean nothing, nor do those of an empty tensor.
inline bool dense_in_order(const Tensor& t, const int* order, int64_t dims) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    const int64_t d = order ? order[i] : i;
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1 && strides[d] != expected) expected = -1;
    if (expected > 0) expected *= sizes[d];
  }
  return expected > 0;
}

inline Shape shape_of(const char* op, const char* name, const Tensor& t) {
  MBN_CHECK(t.dim() == 4, op, ": ", name, ": expected 4 dimensions [N, C, H, W], got ", t.dim());
  const auto s = t.sizes();
  return {s[0], s[1], s[2], s[3]};
}

inline void check_activations(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Shape& shape) {
  static constexpr int kChannelsLast[] = {0, 2, 3, 1};
  check_kind(op, name, t, dtype);
  const Shape s = shape_of(op, name, t);
  const int64_t expected[] = {shape.images, shape.channels, shape.height, shape.width};
  MBN_CHECK(s.images == shape.images && s.channels == shape.channels && s.height == shape.height && s.width == shape.width,
                  op, ": ", name, ": expected size ", text_of(torch::headeronly::IntHeaderOnlyArrayRef(expected, 4)), ", got ",
                  text_of(t.sizes()));
  MBN_CHECK(dense_in_order(t, kChannelsLast, 4), op, ": ", name, ": expected dense channels-last memory, got strides ",
                  text_of(t.strides()));
}

inline void check_dense(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t numel) {
  check_kind(op, name, t, dtype);
  MBN_CHECK(t.numel() == numel, op, ": ", name, ": expected ", numel, " elements, got size ", text_of(t.sizes()));
  MBN_CHECK(dense_in_order(t, nullptr, t.dim()), op, ": ", name, ": expected contiguous memory, got strides ",
                  text_of(t.strides()));
}

}  // namespace binding
}  // namespace mbn
