// From the operators' tensors to the kernels' structs: every tensor is checked here, so that no kernel can read or write outside its arguments.
#pragma once

#if defined(MBN_CUDA_ON_HOST)  // the tests' build of the kernels for the CPU
#define MBN_DEVICE_NAME "CPU"
#define MBN_IS_ON_DEVICE(tensor) (tensor).is_cpu()
#define MBN_DISPATCH_KEY CPU
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define MBN_DEVICE_NAME "CUDA"
#define MBN_IS_ON_DEVICE(tensor) (tensor).is_cuda()
#define MBN_DISPATCH_KEY CUDA
#endif

#include <cstdint>
#include <limits>
#include <vector>

#include "activation.h"
#include "kernels.h"
#include "tensors.h"

namespace mbn {
namespace binding {

// Chooses a tensor's device for the launches in a scope, and knows its stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t)
#if defined(MBN_CUDA_ON_HOST)
      : stream_(nullptr) {
    (void)t;
  }
#else
      : guard_(t.get_device_index()), stream_(nullptr) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
#endif
  void* stream() const { return stream_; }

 private:
#if !defined(MBN_CUDA_ON_HOST)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_;
};

// The arguments of one call: all on the device of the first.
class Arguments {
 public:
  Arguments(const char* op, const char* name, const Tensor& first) : op_(op), name_(name), first_(first), dtype_(first.scalar_type()) {
    MBN_CHECK(dtype_ == ScalarType::Float || dtype_ == ScalarType::Half || dtype_ == ScalarType::BFloat16, op, ": ",
              name, ": expected Float, Half or BFloat16, got ", torch::headeronly::toString(dtype_));
  }
  const char* op() const { return op_; }
  ScalarType dtype() const { return dtype_; }
  int vector() const { return dtype_ == ScalarType::Float ? 4 : 8; }  // channels in 16 bytes

  // Activations of this shape in dense channels-last memory, a multiple of 16 bytes of channels each.
  const void* activations(const char* name, const Tensor& t, const Shape& shape) const {
    check_activations(op_, name, t, dtype_, shape);
    check_device(name, t);
    MBN_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, op_, ": ", name, ": expected memory that begins at a multiple of 16 bytes");
    return t.const_data_ptr();
  }
  const void* activations(const char* name, const OptionalTensor& t, const Shape& shape) const {
    return t ? activations(name, *t, shape) : nullptr;
  }
  template <class T>
  void* activations_out(const char* name, const T& t, const Shape& shape) const {
    return const_cast<void*>(activations(name, t, shape));
  }
  const void* weight(const char* name, const Tensor& t, int64_t numel) const { return dense(name, t, dtype_, numel); }
  const float* numbers(const char* name, const OptionalTensor& t, int64_t numel) const {
    return t ? static_cast<const float*>(dense(name, *t, ScalarType::Float, numel)) : nullptr;
  }
  float* numbers_out(const char* name, const OptionalTensor& t, int64_t numel) const { return const_cast<float*>(numbers(name, t, numel)); }

  // Float or of the storage type.
  Parameter parameter(const char* name, const OptionalTensor& t, int64_t numel) const {
    if (!t) return {};
    const bool wide = t->scalar_type() == ScalarType::Float;
    return {dense(name, *t, wide ? ScalarType::Float : dtype_, numel), wide};
  }

  int activation(const char* name, int64_t act) const {
    MBN_CHECK(act >= 0 && act < kActCount, op_, ": ", name, ": expected an activation in [0, ", kActCount, "), got ", act);
    return int(act);
  }
  // Numbers that kernels count in 32 bits.
  int count(const char* name, int64_t n, int64_t least = 0) const {
    MBN_CHECK(n >= least && n <= std::numeric_limits<int>::max() / 8, op_, ": ", name, ": expected a number from ", least, " to ",
              std::numeric_limits<int>::max() / 8, ", got ", n);
    return int(n);
  }
  void together(const char* name, const OptionalTensor& a, const OptionalTensor& b) const {
    MBN_CHECK(a.has_value() == b.has_value(), op_, ": ", name, ": expected all or none of its group, got some");
  }

  Value value(const char* name, const Shape& shape, const Tensor& y, const OptionalTensor& scale, const OptionalTensor& shift,
              const OptionalTensor& gate, int64_t act) const {
    together(name, scale, shift);
    return {activations(name, y, shape), numbers(name, scale, shape.channels), numbers(name, shift, shape.channels),
            numbers(name, gate, shape.images * shape.channels), activation(name, act)};
  }
  Gradient gradient(const Shape& shape, const Tensor& dv, const OptionalTensor& y, const OptionalTensor& scale, const OptionalTensor& shift,
                    const OptionalTensor& gate, int64_t act, const OptionalTensor& q, const OptionalTensor& a, const OptionalTensor& b,
                    const OptionalTensor& c) const {
    together("g_shift", scale, shift);
    together("g_c", b, c);
    MBN_CHECK(y.has_value() || (act == int64_t(Act::identity) && !b.has_value()), op_,
              ": g_y: expected a tensor where g_act is not the identity or g_b is given, got none");
    const int64_t n = shape.channels, each = shape.images * n;
    return {activations("g_dv", dv, shape),
            {activations("g_y", y, shape), numbers("g_scale", scale, n), numbers("g_shift", shift, n), numbers("g_gate", gate, each),
             activation("g_act", act)},
            numbers("g_q", q, each), numbers("g_a", a, n), numbers("g_b", b, n), numbers("g_c", c, n)};
  }

 private:
  void check_device(const char* name, const Tensor& t) const {
    MBN_CHECK(t.get_device_index() == first_.get_device_index(), op_, ": ", name, ": expected a tensor on the device of ", name_, ", got one on another");
  }
  const void* dense(const char* name, const Tensor& t, ScalarType dtype, int64_t numel) const {
    check_dense(op_, name, t, dtype, numel);
    check_device(name, t);
    return t.const_data_ptr();
  }

  const char *op_, *name_;
  const Tensor& first_;
  ScalarType dtype_;
};

template <class S>
struct StorageTag {
  using type = S;
};

// Calls f(StorageTag<S>{}) for the storage type of these arguments.
template <class F>
void by_dtype(const Arguments& arguments, const F& f) {
  if (arguments.dtype() == ScalarType::Float) return f(StorageTag<float>{});
  if (arguments.dtype() == ScalarType::Half) return f(StorageTag<float16>{});
  return f(StorageTag<bfloat16>{});
}

}  // namespace binding
}  // namespace mbn
