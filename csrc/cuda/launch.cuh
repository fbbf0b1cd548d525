// How a kernel is started: the one place that knows the runtime.
#pragma once

#include "check.h"
#include "gpu.cuh"

namespace mbn {

template <class Params>
void launch(const char* op, void (*kernel)(Params), Params params, const Launch& at) {
  if (at.blocks == 0) return;
#if defined(__CUDACC__)
  const void* const function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  constexpr size_t kUnasked = 48 * 1024;  // what a kernel may have without asking
  if (at.shared > kUnasked) error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(at.shared));
  void* arguments[] = {&params};
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(function, dim3(unsigned(at.blocks)), dim3(unsigned(at.threads)), arguments, at.shared,
                             static_cast<cudaStream_t>(at.stream));
  }
  if (error != cudaSuccess) cudaGetLastError();  // said once: the next launch starts without it
  MBN_CHECK(error == cudaSuccess, op, ": launch of ", at.blocks, " blocks of ", at.threads, " threads with ", at.shared,
            " bytes of shared memory: ", cudaGetErrorString(error));
#else
  (void)op;
  host::run(at.blocks, at.threads, at.shared, [&] { kernel(params); });
#endif
}

}  // namespace mbn
