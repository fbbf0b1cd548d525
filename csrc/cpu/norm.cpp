// torch.ops.mbn.norm_forward, norm_backward and update_running on CPU tensors: the per-channel numbers of batch norm. They are small, so that what
// counts is that each is one call.
#include <cmath>
#include <vector>

#include "binding.h"

namespace mbn {
namespace {

using namespace binding;

// Calls f(StorageTag<T>{}) for an accumulation type.
template <class F>
void by_accumulate_dtype(const char* op, const char* name, const Tensor& t, const F& f) {
  check_defined(op, name, t);
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(StorageTag<float>{});
    case ScalarType::Double: return f(StorageTag<double>{});
    default: fail(op, ": ", name, ": expected Float or Double, got ", torch::headeronly::toString(t.scalar_type()));
  }
}

void norm_forward(const Tensor& mean, const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                  const Tensor& norm) {
  Call op("norm_forward");
  MBN_CHECK(weight.has_value() == bias.has_value(), op, ": bias: expected weight and bias together, got one of them");
  by_accumulate_dtype(op, "mean", mean, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t channels = mean.numel();
    const T *m = dense<T>(op, "mean", mean, channels), *v = dense<T>(op, "var", var, channels);
    const T *w = dense<T>(op, "weight", weight, channels), *b = dense<T>(op, "bias", bias, channels);
    T *scale = dense_out<T>(op, "norm", norm, 4 * channels), *shift = scale + channels, *mean_to = shift + channels, *rstd = mean_to + channels;
    for (int64_t c = 0; c < channels; ++c) {
      rstd[c] = T(1) / std::sqrt(v[c] + T(eps));
      scale[c] = w ? w[c] * rstd[c] : rstd[c];
      shift[c] = (b ? b[c] : T(0)) - m[c] * scale[c];
      mean_to[c] = m[c];
    }
  });
}

void norm_backward(const Tensor& sums, const OptionalTensor& gate, const OptionalTensor& q, const Tensor& norm, int64_t count,
                   const Tensor& dweight, const Tensor& dbias, const OptionalTensor& b, const OptionalTensor& c) {
  Call op("norm_backward");
  MBN_CHECK(gate.has_value() == q.has_value(), op, ": q: expected gate and q together, got one of them");
  MBN_CHECK(b.has_value() == c.has_value(), op, ": c: expected b and c together, got one of them");
  MBN_CHECK(count > 0 || !b.has_value(), op, ": count: expected at least 1, got ", count);
  by_accumulate_dtype(op, "norm", norm, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t channels = norm.numel() / 4, images = gate && channels ? gate->numel() / channels : 1;
    const T *scale = dense<T>(op, "norm", norm, 4 * channels), *mean = scale + 2 * channels, *rstd = scale + 3 * channels;
    const T *g = dense<T>(op, "gate", gate, images * channels), *dmean = dense<T>(op, "q", q, images * channels);
    const T* s = dense<T>(op, "sums", sums, gate ? 5 * images * channels : 2 * channels);
    T *dgamma = dense_out<T>(op, "dweight", dweight, channels), *dbeta = dense_out<T>(op, "dbias", dbias, channels);
    T *b_to = dense_out<T>(op, "b", b, channels), *c_to = dense_out<T>(op, "c", c, channels);
    for (int64_t i = 0; i < channels; ++i) {
      if (!gate) {
        dbeta[i] = s[i];
        dgamma[i] = s[channels + i];
      } else {  // sums: dv*act(n), dv*d, d, dv*d*x, d*x
        const int64_t step = images * channels;
        T beta = 0, gamma = 0;
        for (int64_t n = 0; n < images; ++n) {
          const int64_t at = n * channels + i;
          beta += g[at] * s[step + at] + dmean[at] * s[2 * step + at];
          gamma += g[at] * s[3 * step + at] + dmean[at] * s[4 * step + at];
        }
        dbeta[i] = beta;
        dgamma[i] = gamma;
      }
      if (b_to == nullptr) continue;
      b_to[i] = -scale[i] * rstd[i] * (dgamma[i] / T(count));
      c_to[i] = -scale[i] * (dbeta[i] / T(count)) - b_to[i] * mean[i];
    }
  });
}

// Everything is checked before anything is changed, and nothing can fail in between: the statistics are those before the batch or those after it.
void update_running(std::vector<Tensor> running, std::vector<Tensor> batch, std::vector<double> momenta, std::vector<Tensor> counts) {
  constexpr const char* op = "update_running";
  MBN_CHECK(running.size() == batch.size() && running.size() == 2 * momenta.size(), op,
            ": running: expected a mean and a variance for each momentum and as many of the batch, got ", running.size(), ", ", momenta.size(), " and ",
            batch.size());
  for (const Tensor& count : counts) dense_out<int64_t>(op, "counts", count, 1);
  if (!running.empty()) {
    by_accumulate_dtype(op, "running", running[0], [&](auto tag) {
      using T = typename decltype(tag)::type;
      for (size_t i = 0; i < running.size(); ++i) {
        dense_out<T>(op, "running", running[i], running[i - i % 2].numel());
        dense<T>(op, "batch", batch[i], running[i].numel());
      }
      for (size_t i = 0; i < running.size(); ++i) {
        T* to = static_cast<T*>(running[i].mutable_data_ptr());
        const T *from = static_cast<const T*>(batch[i].const_data_ptr()), momentum = T(momenta[i / 2]), rest = T(1 - momenta[i / 2]);
        for (int64_t c = 0, channels = running[i].numel(); c < channels; ++c) to[c] = rest * to[c] + momentum * from[c];
      }
    });
  }
  for (const Tensor& count : counts) ++*static_cast<int64_t*>(count.mutable_data_ptr());
}

}  // namespace
}  // namespace mbn

STABLE_TORCH_LIBRARY_IMPL(mbn, CPU, m) {
  m.impl("norm_forward", TORCH_BOX(&mbn::norm_forward));
  m.impl("norm_backward", TORCH_BOX(&mbn::norm_backward));
  m.impl("update_running", TORCH_BOX(&mbn::update_running));
}
