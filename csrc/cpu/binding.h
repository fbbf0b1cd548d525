// From the operators' tensors to the kernels' structs: every tensor is checked here, so that no call can read or write outside its arguments.
#pragma once

#define MBN_DEVICE_NAME "CPU"
#define MBN_IS_ON_DEVICE(tensor) (tensor).is_cpu()
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "kernels.h"
#include "tensors.h"

namespace mbn {
namespace binding {

// A tensor's first number and the bytes from there to its last.
struct Memory {
  const char *name, *begin;
  int64_t bytes;
  bool overlaps(const Memory& other) const { return bytes > 0 && other.bytes > 0 && begin < other.begin + other.bytes && other.begin < begin + bytes; }
};
// All of it lies in the tensor's storage, which may have been made smaller since. Of a dense tensor:
inline Memory memory_of(const char* op, const char* name, const Tensor& t, int64_t itemsize, int64_t numel) {
  const Memory memory = {name, static_cast<const char*>(t.const_data_ptr()), numel * itemsize};
  int64_t offset, stored;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &stored));
  MBN_CHECK(numel == 0 || offset * itemsize + memory.bytes <= stored, op, ": ", name, ": expected a storage of at least ",
            offset * itemsize + memory.bytes, " bytes, got ", stored);
  return memory;
}
// Of one with any strides.
inline Memory memory_of(const char* op, const char* name, const Tensor& t, int64_t itemsize) {
  int64_t span = t.numel() > 0 ? 1 : 0;
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; span > 0 && i < sizes.size(); ++i) span += (sizes[i] - 1) * strides[i];
  return memory_of(op, name, t, itemsize, span);
}

// An operator's call: its name, and the memory of its arguments, none of which may lie in what it writes.
class Call {
 public:
  explicit Call(const char* op) : op_(op) {}
  operator const char*() const { return op_; }

  const void* read(const Memory& memory) { return add(memory, false); }
  void* write(const Memory& memory, const Tensor& t) {
    add(memory, true);
    return t.mutable_data_ptr();
  }

 private:
  static constexpr int kMost = 32;
  const void* add(const Memory& memory, bool written) {
    for (int i = 0; i < count_; ++i) {
      MBN_CHECK(!(written || written_[i]) || !memory.overlaps(memory_[i]), op_, ": ", (written ? memory : memory_[i]).name,
                ": expected memory of its own, got some that is also ", (written ? memory_[i] : memory).name, "'s");
    }
    MBN_CHECK(count_ < kMost, op_, ": expected at most ", kMost, " tensors, got more");
    written_[count_] = written;
    memory_[count_++] = memory;
    return memory.begin;
  }
  const char* op_;
  Memory memory_[kMost];
  bool written_[kMost];
  int count_ = 0;
};

template <class S>
constexpr ScalarType kDtype = ScalarType::Undefined;
template <>
constexpr ScalarType kDtype<float> = ScalarType::Float;
template <>
constexpr ScalarType kDtype<double> = ScalarType::Double;
template <>
constexpr ScalarType kDtype<bf16> = ScalarType::BFloat16;

template <>
constexpr ScalarType kDtype<int64_t> = ScalarType::Long;

// Activations [N, C, H, W] of storage type S, dense channels-last.
template <class S>
const S* activations(Call& op, const char* name, const Tensor& t, const Shape& shape) {
  check_activations(op, name, t, kDtype<S>, shape);
  return static_cast<const S*>(op.read(memory_of(op, name, t, sizeof(S), shape.images * shape.channels * shape.pixels())));
}
template <class S>
S* activations_out(Call& op, const char* name, const Tensor& t, const Shape& shape) {
  check_activations(op, name, t, kDtype<S>, shape);
  return static_cast<S*>(op.write(memory_of(op, name, t, sizeof(S), shape.images * shape.channels * shape.pixels()), t));
}
// Anything else (weights, per-channel vectors, gates, sums), contiguous with exactly `numel` elements of type T.
template <class T>
const T* dense(Call& op, const char* name, const Tensor& t, int64_t numel) {
  check_dense(op, name, t, kDtype<T>, numel);
  return static_cast<const T*>(op.read(memory_of(op, name, t, sizeof(T), numel)));
}
template <class T>
T* dense_out(Call& op, const char* name, const Tensor& t, int64_t numel) {
  check_dense(op, name, t, kDtype<T>, numel);
  return static_cast<T*>(op.write(memory_of(op, name, t, sizeof(T), numel), t));
}

// Of a call in which nothing can lie in what is written.
template <class T>
const T* dense(const char* op, const char* name, const Tensor& t, int64_t numel) {
  Call call(op);
  return dense<T>(call, name, t, numel);
}
template <class T>
T* dense_out(const char* op, const char* name, const Tensor& t, int64_t numel) {
  Call call(op);
  return dense_out<T>(call, name, t, numel);
}

// The same where the tensor may be absent.
template <class S>
const S* activations(Call& op, const char* name, const OptionalTensor& t, const Shape& shape) {
  return t ? activations<S>(op, name, *t, shape) : nullptr;
}
template <class S>
S* activations_out(Call& op, const char* name, const OptionalTensor& t, const Shape& shape) {
  return t ? activations_out<S>(op, name, *t, shape) : nullptr;
}
template <class T>
const T* dense(Call& op, const char* name, const OptionalTensor& t, int64_t numel) {
  return t ? dense<T>(op, name, *t, numel) : nullptr;
}
template <class T>
T* dense_out(Call& op, const char* name, const OptionalTensor& t, int64_t numel) {
  return t ? dense_out<T>(op, name, *t, numel) : nullptr;
}

inline Act activation(const char* op, const char* name, int64_t act) {
  MBN_CHECK(act >= 0 && act < kActCount, op, ": ", name, ": expected an activation in [0, ", kActCount, "), got ", act);
  return static_cast<Act>(act);
}

// u_*: `shape` is that of u_y.
template <class S>
Value<S> value(Call& op, const Shape& shape, const Tensor& y, const OptionalTensor& scale, const OptionalTensor& shift,
               const OptionalTensor& gate, int64_t act) {
  using T = Accumulate<S>;
  MBN_CHECK(scale.has_value() == shift.has_value(), op, ": u_shift: expected u_scale and u_shift together, got one of them");
  Value<S> u;
  u.y = activations<S>(op, "u_y", y, shape);
  u.scale = dense<T>(op, "u_scale", scale, shape.channels);
  u.shift = dense<T>(op, "u_shift", shift, shape.channels);
  u.gate = dense<T>(op, "u_gate", gate, shape.images * shape.channels);
  u.act = activation(op, "u_act", act);
  return u;
}

// g_*: `shape` is that of g_dv.
template <class S>
Gradient<S> gradient(Call& op, const Shape& shape, const Tensor& dv, const OptionalTensor& y, const OptionalTensor& scale,
                     const OptionalTensor& shift, const OptionalTensor& gate, int64_t act, const OptionalTensor& q,
                     const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& c) {
  using T = Accumulate<S>;
  MBN_CHECK(scale.has_value() == shift.has_value(), op, ": g_shift: expected g_scale and g_shift together, got one of them");
  MBN_CHECK(b.has_value() == c.has_value(), op, ": g_c: expected g_b and g_c together, got one of them");
  Gradient<S> g;
  g.dv = activations<S>(op, "g_dv", dv, shape);
  g.of.act = activation(op, "g_act", act);
  MBN_CHECK(y.has_value() || (g.of.act == Act::identity && !b.has_value()), op,
                  ": g_y: expected a tensor where g_act is not the identity or g_b is given, got none");
  g.of.y = activations<S>(op, "g_y", y, shape);
  g.of.scale = dense<T>(op, "g_scale", scale, shape.channels);
  g.of.shift = dense<T>(op, "g_shift", shift, shape.channels);
  g.of.gate = dense<T>(op, "g_gate", gate, shape.images * shape.channels);
  g.q = dense<T>(op, "g_q", q, shape.images * shape.channels);
  g.a = dense<T>(op, "g_a", a, shape.channels);
  g.b = dense<T>(op, "g_b", b, shape.channels);
  g.c = dense<T>(op, "g_c", c, shape.channels);
  return g;
}

// Sums at a value of this shape; `gated` where that value has a gate: [5, N, C], else [2, C].
template <class S>
Sums<S> sums(Call& op, const Shape& shape, bool gated, const OptionalTensor& mean, const OptionalTensor& rstd,
             const OptionalTensor& out) {
  using T = Accumulate<S>;
  MBN_CHECK(mean.has_value() == rstd.has_value(), op, ": rstd: expected mean and rstd together, got one of them");
  Sums<S> s;
  s.mean = dense<T>(op, "mean", mean, shape.channels);
  s.rstd = dense<T>(op, "rstd", rstd, shape.channels);
  s.out = dense_out<T>(op, "sums", out, gated ? 5 * shape.images * shape.channels : 2 * shape.channels);
  return s;
}

template <class S>
struct StorageTag {
  using type = S;
};

// Calls f(StorageTag<S>{}) for the storage type of `t`.
template <class F>
void by_dtype(const char* op, const char* name, const Tensor& t, const F& f) {
  check_defined(op, name, t);
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(StorageTag<float>{});
    case ScalarType::Double: return f(StorageTag<double>{});
    case ScalarType::BFloat16: return f(StorageTag<bf16>{});
    default:
      fail(op, ": ", name, ": expected Float, Double or BFloat16, got ", torch::headeronly::toString(t.scalar_type()));
  }
}

}  // namespace binding
}  // namespace mbn
