// Whether the library has code for the current GPU.
#include "kernels.h"
#include "launch.cuh"

namespace mbn {

MBN_KERNEL(kWarp, 1) nothing(int) {}

std::string missing() {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&nothing));
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // said once
  return cudaGetErrorString(error);
#else
  launch("nothing", &nothing, 0, {1, kWarp, 0, nullptr});
  return "";
#endif
}

}  // namespace mbn
