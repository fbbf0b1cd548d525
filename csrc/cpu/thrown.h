// The first exception of several threads, for the one that waits for them: PyTorch's C interface would make a RuntimeError of any.
#pragma once

#include <atomic>
#include <exception>

namespace mbn {

class Thrown {
 public:
  // Runs f; returns whether it threw.
  template <class F>
  bool by(const F& f) noexcept {
    try {
      f();
      return false;
    } catch (...) {
      if (!any_.exchange(true)) first_ = std::current_exception();
      return true;
    }
  }
  // After all threads have come to their end.
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::atomic<bool> any_{false};
  std::exception_ptr first_;
};

}  // namespace mbn
