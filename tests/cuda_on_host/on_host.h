// What nvcc gives to kernels, for a C++ compiler: a block's threads run in turns, each up to where it waits for others.
// Included before everything else; build.py rewrites launches.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#include "cuda_runtime_api.h"

#define __CUDACC__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __global__
#define __device__
#define __host__
#define __shared__ static  // of the block that runs: they do so one after another

namespace on_host {

struct Index {
  unsigned x, y, z;
};

// Waits until the threads of a warp, or of the block, have come here too. Ends the process where not all of them do.
void wait_for_warp();
void wait_for_block();
// Room for what a thread gives to the others of its warp, by its number in the block.
uint64_t& given(unsigned thread);
void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

}  // namespace on_host

extern on_host::Index threadIdx, blockIdx, blockDim;

template <typename T>
T __ldg(const T* p) {
  return *p;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "of one register");
  std::memcpy(&on_host::given(threadIdx.x), &value, sizeof value);
  on_host::wait_for_warp();
  std::memcpy(&value, &on_host::given(threadIdx.x ^ static_cast<unsigned>(other)), sizeof value);
  on_host::wait_for_warp();
  return value;
}

inline void __syncthreads() { on_host::wait_for_block(); }
