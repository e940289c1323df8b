// How values are packed into bytes; agd_fast/memory/ops/layout.py says the same in torch, bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#else
#define HD inline
#endif

namespace agd_fast {

constexpr int CHUNK = 16;  // elements that a thread handles at once
template <int BITS>
constexpr int WORDS = CHUNK * BITS / 32;  // of 32 bits, for the codes of a chunk

constexpr uint32_t INFINITE = 0x7f800000u;      // magnitudes from here on are infinite or NaN
constexpr uint32_t SMALLEST_SCALE = 27u << 23;  // 2^-100
constexpr uint16_t NAN_SCALE = 0x7fc0u;
constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer, halves to even

HD uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

HD float scale_of(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// |value| as bits, which order as magnitudes do, NaN above all.
HD uint32_t magnitude(float value) { return bits_of(value) & 0x7fffffffu; }

// The bfloat16 scale of a group, of the largest magnitude in it.
template <int BITS>
HD uint16_t scale_for(uint32_t largest) {
  constexpr float RECIPROCAL = static_cast<float>(1.0 / (BITS == 8 ? 127 : 7));
  if (largest == 0) return 0;
  if (largest >= INFINITE) return NAN_SCALE;
  uint32_t quotient = bits_of(float_of(largest) * RECIPROCAL);
  if (quotient < SMALLEST_SCALE) quotient = SMALLEST_SCALE;
  return static_cast<uint16_t>((quotient + 0xffffu) >> 16);
}

// 1/scale; 0 for 0.
HD float reciprocal_of(float scale) {
#ifdef __CUDA_ARCH__
  return scale == 0 ? 0 : __frcp_rn(scale);
#else
  return scale == 0 ? 0 : 1 / scale;
#endif
}

// value/scale rounded to an integer, in the low bits. The quotient is the correctly rounded one: the product with the rounded
// reciprocal, corrected once by its exact remainder (Markstein), holds for every value and every bfloat16 scale >= 2^-100.
HD uint32_t code_of(float value, float scale, float reciprocal) {
  const float estimate = value * reciprocal;
  const float remainder = fmaf(-estimate, scale, value);
  return bits_of(fmaf(remainder, reciprocal, estimate) + ROUNDING);
}

// The codes of a chunk. A group whose scale is NaN has codes 0.
template <int BITS>
HD void encode(const float (&values)[CHUNK], uint16_t scale_bits, uint32_t (&words)[WORDS<BITS>]) {
  const float scale = scale_of(scale_bits), reciprocal = reciprocal_of(scale);
  constexpr uint32_t ZERO = BITS == 8 ? 0 : 0x88888888u;
  constexpr int PER_WORD = 32 / BITS;
#pragma unroll
  for (int w = 0; w < WORDS<BITS>; ++w) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < PER_WORD; ++j) {
      const uint32_t code = code_of(values[w * PER_WORD + j], scale, reciprocal);
      word |= (BITS == 8 ? code & 0xffu : (code + 8) & 0xfu) << (BITS * j);
    }
    words[w] = scale_bits == NAN_SCALE ? ZERO : word;
  }
}

// The values of a chunk: code * scale, exactly.
template <int BITS>
HD void decode(const uint32_t (&words)[WORDS<BITS>], uint16_t scale_bits, float (&values)[CHUNK]) {
  const float scale = scale_of(scale_bits);
  constexpr int PER_WORD = 32 / BITS;
#pragma unroll
  for (int j = 0; j < CHUNK; ++j) {
    const uint32_t code = words[j / PER_WORD] >> (BITS * (j % PER_WORD));
    const int value = BITS == 8 ? static_cast<int8_t>(code & 0xffu) : static_cast<int>(code & 0xfu) - 8;
    values[j] = static_cast<float>(value) * scale;
  }
}

}  // namespace agd_fast
