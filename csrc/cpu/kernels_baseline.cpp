// Whatever the compiler targets by default: SSE2 on x86-64, NEON on aarch64.
#define MBN_ISA baseline
#define MBN_VECTOR_BYTES 16
#include "kernel_table.h"

namespace mbn {
const AllKernels kBaselineKernels = {"baseline", MBN_TABLE_OF(float), MBN_TABLE_OF(double), MBN_TABLE_OF(bf16), MBN_ISA::peak};
}  // namespace mbn
