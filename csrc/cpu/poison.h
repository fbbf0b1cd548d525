// What AddressSanitizer is told of memory that is cut out of larger pieces, which has no fence of its own. In an ordinary build, nothing.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#define MBN_ADDRESS_SANITIZER __has_feature(address_sanitizer)
#elif defined(__SANITIZE_ADDRESS__)
#define MBN_ADDRESS_SANITIZER 1
#endif

#if MBN_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#endif

namespace mbn {

#if MBN_ADDRESS_SANITIZER
constexpr size_t kFence = 64;  // bytes behind each piece that nobody may touch
inline void forbid(const void* p, size_t bytes) { ASAN_POISON_MEMORY_REGION(p, bytes); }
inline void allow(const void* p, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(p, bytes); }
#else
constexpr size_t kFence = 0;
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
#endif

}  // namespace mbn
