// Starting a kernel: on which device, for which type and number of bits, and what CUDA says of it.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "memory.cuh"

namespace agd_fast {

constexpr int THREADS = 256;  // of a block

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("agd_fast._cuda: " + what + " failed with CUDA error " + std::to_string(static_cast<int>(error)) +
                           " (" + cudaGetErrorName(error) + "): " + cudaGetErrorString(error));
}

// Makes a device the current one, and the one before it again at the end.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline unsigned blocks_for(int64_t threads, const char* op) {
  if (threads >= (int64_t{1} << 31) - THREADS) throw std::runtime_error(std::string("agd_fast._cuda: ") + op + ": too many elements");
  return static_cast<unsigned>((threads + THREADS - 1) / THREADS);
}

// Calls with a value of the type, and with the number of bits as a constant.
template <typename Function>
void dispatch(Type type, int bits, Function function) {
  const auto by_bits = [&](auto value) {
    if (bits == 8) function(value, std::integral_constant<int, 8>{});
    else function(value, std::integral_constant<int, 4>{});
  };
  if (type == Type::BFLOAT16) by_bits(__nv_bfloat16{});
  else if (type == Type::FLOAT16) by_bits(__half{});
  else by_bits(float{});
}

}  // namespace agd_fast
