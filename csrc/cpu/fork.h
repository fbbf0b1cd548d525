// Locks and fork.
#pragma once

#include <mutex>

#if defined(__linux__)
#include <pthread.h>
#endif

namespace mbn {

// The mutex of each Tag, never destroyed. The system's fork waits for whoever holds it: a child must not inherit it locked by a thread that it does not have.
template <class Tag>
std::mutex& fork_safe_mutex() {
  static std::mutex* const mutex = [] {
    auto* made = new std::mutex;
#if defined(__linux__)
    pthread_atfork([] { fork_safe_mutex<Tag>().lock(); }, [] { fork_safe_mutex<Tag>().unlock(); }, [] { fork_safe_mutex<Tag>().unlock(); });
#endif
    return made;
  }();
  return *mutex;
}

}  // namespace mbn
