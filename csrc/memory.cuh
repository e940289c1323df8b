// Loads and stores of a chunk: 16 bytes at once where the address and the number of elements allow, else one by one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ops.h"
#include "rows.h"

namespace agd_fast {

HD float to_float(float value) { return value; }
HD float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
HD float to_float(__half value) { return __half2float(value); }
template <typename T>
HD T from_float(float value);
template <>
HD float from_float<float>(float value) { return value; }
template <>
HD __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
HD __half from_float<__half>(float value) { return __float2half_rn(value); }

#ifdef __CUDACC__

template <int BYTES>
__device__ __forceinline__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & (BYTES - 1)) == 0; }

// p: the chunk's first element. What is beyond count is 0.
template <typename T>
__device__ __forceinline__ void load(const T* p, int count, float (&values)[CHUNK]) {
  constexpr int VECTORS = CHUNK * sizeof(T) / 16;
  if (count == CHUNK && aligned<16>(p)) {
    uint4 read[VECTORS];
    T elements[CHUNK];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) read[v] = __ldg(reinterpret_cast<const uint4*>(p) + v);
    memcpy(elements, read, sizeof read);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) values[j] = to_float(elements[j]);
  } else {
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) values[j] = j < count ? to_float(p[j]) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void store(T* p, int count, const float (&values)[CHUNK]) {
  constexpr int VECTORS = CHUNK * sizeof(T) / 16;
  if (count == CHUNK && aligned<16>(p)) {
    uint4 written[VECTORS];
    T elements[CHUNK];
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) elements[j] = from_float<T>(values[j]);
    memcpy(written, elements, sizeof written);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) reinterpret_cast<uint4*>(p)[v] = written[v];
  } else {
#pragma unroll
    for (int j = 0; j < CHUNK; ++j)
      if (j < count) p[j] = from_float<T>(values[j]);
  }
}

// p: the chunk's first byte. 16 bytes of 8 bits a code, 8 of 4.
template <int BITS>
__device__ __forceinline__ void load_codes(const uint8_t* p, int count, uint32_t (&words)[WORDS<BITS>]) {
  constexpr int BYTES = 4 * WORDS<BITS>;
  if (count == CHUNK && aligned<BYTES>(p)) {
    const auto read = __ldg(reinterpret_cast<const std::conditional_t<BITS == 8, uint4, uint2>*>(p));
    memcpy(words, &read, BYTES);
  } else {
    const int bytes = (count * BITS + 7) / 8;
#pragma unroll
    for (int w = 0; w < WORDS<BITS>; ++w) words[w] = 0;
#pragma unroll
    for (int k = 0; k < BYTES; ++k)
      if (k < bytes) words[k / 4] |= static_cast<uint32_t>(p[k]) << (8 * (k % 4));
  }
}

template <int BITS>
__device__ __forceinline__ void store_codes(uint8_t* p, int count, const uint32_t (&words)[WORDS<BITS>]) {
  constexpr int BYTES = 4 * WORDS<BITS>;
  if (count == CHUNK && aligned<BYTES>(p)) {
    std::conditional_t<BITS == 8, uint4, uint2> written;
    memcpy(&written, words, BYTES);
    *reinterpret_cast<decltype(written)*>(p) = written;
  } else {
    const int bytes = (count * BITS + 7) / 8;
#pragma unroll
    for (int k = 0; k < BYTES; ++k)
      if (k < bytes) p[k] = static_cast<uint8_t>(words[k / 4] >> (8 * (k % 4)));
  }
}

// A tensor packed by rows.
struct Packed {
  const uint8_t* codes;
  const uint16_t* scales;

  template <int BITS>
  __device__ __forceinline__ void read(const Rows& rows, const Place& at, float (&values)[CHUNK]) const {
    uint32_t words[WORDS<BITS>];
    load_codes<BITS>(codes + rows.byte(at, BITS), at.count, words);
    decode<BITS>(words, __ldg(scales + rows.scale(at)), values);
  }
};

// Packs a chunk together with the others of its group, which are its neighbours in the warp: all threads of the warp must come here,
// with zeros where there is nothing.
template <int BITS>
__device__ __forceinline__ void write_packed(
    const Rows& rows, const Place& at, const float (&values)[CHUNK], uint8_t* codes, uint16_t* scales) {
  Reach<BITS> reach;
#pragma unroll
  for (int j = 0; j < CHUNK; ++j) reach.include(values[j]);
  for (int chunks = 1; chunks * CHUNK < rows.group(); chunks *= 2) {
    reach.above = larger(reach.above, __shfl_xor_sync(0xffffffffu, reach.above, chunks));
    if (BITS == 4) reach.below = larger(reach.below, __shfl_xor_sync(0xffffffffu, reach.below, chunks));
  }
  if (at.count <= 0) return;
  const uint16_t scale = scale_for(reach);
  uint32_t words[WORDS<BITS>];
  encode<BITS>(values, scale, words);
  store_codes<BITS>(codes + rows.byte(at, BITS), at.count, words);
  if ((at.first & (rows.group() - 1)) == 0) scales[rows.scale(at)] = scale;
}

// The values of the channels of a chunk. p: those of the row's first channel and on.
template <typename T>
__device__ __forceinline__ void load_channels(const T* p, const Channels& channels, const Place& at, float (&values)[CHUNK]) {
  if (channels.S.by == 1) return load(p + at.first, at.count, values);
  const uint32_t first = static_cast<uint32_t>(at.first), last = first + at.count - 1;
  const uint32_t one = channels.S.divide(first);
  if (channels.S.divide(last) == one) {
    const float value = to_float(p[one]);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) values[j] = value;
  } else {
#pragma unroll
    for (int j = 0; j < CHUNK; ++j)
      values[j] = j < at.count ? to_float(p[channels.S.divide(first + j)]) : 0.0f;
  }
}

#endif

}  // namespace agd_fast
