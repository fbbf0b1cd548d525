// What the tests ask of the kernels' build for the CPU, beside the operators.
#include "gpu_on_host.h"

using namespace mbn::host;

#define MBN_EXPORT extern "C" __attribute__((visibility("default")))

// Which of the orders that a GPU may take.
MBN_EXPORT void mbn_host_order(bool from_the_last) { descending = from_the_last; }

// Leaves out the barrier at this place; line 0: none. Returns whether one was since the last call.
MBN_EXPORT bool mbn_host_skip(const char* file, int line) {
  const bool was = skipped;
  skipped = false;
  skipped_file = file;
  skipped_line = line;
  return was;
}

// Kernels started since the last call.
MBN_EXPORT long mbn_host_launches() {
  const long count = launches;
  launches = 0;
  return count;
}
