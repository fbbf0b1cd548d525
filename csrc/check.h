// Errors of the bindings: one sentence, as a std::runtime_error, which PyTorch hands to Python as a RuntimeError.
//
// Composed with std::string alone. PyTorch's own STD_TORCH_CHECK writes through a string stream, which crashes in a library that was linked with a
// static C++ runtime: its locale is not the process's.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace mbn {

template <class Part>
std::string text_part(const Part& part) {
  if constexpr (std::is_arithmetic_v<Part>) {
    return std::to_string(part);
  } else {
    return std::string(part);
  }
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string message;
  ((message += text_part(parts)), ...);
  throw std::runtime_error(message);
}

}  // namespace mbn

#define MBN_CHECK(condition, ...)          \
  do {                                     \
    if (!(condition)) ::mbn::fail(__VA_ARGS__); \
  } while (0)
