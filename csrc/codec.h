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

// A scale's magnitude; its sign says that the group's levels are sided.
HD float scale_of(uint16_t bits) { return float_of(static_cast<uint32_t>(bits & 0x7fffu) << 16); }
HD bool is_sided(uint16_t bits) { return (bits & 0x8000u) != 0; }

HD uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// How far a group reaches to either side of 0: magnitudes as bits, which order as magnitudes do, NaN above all. In 8 bits, which
// have no sided levels, all of it is above.
template <int BITS>
struct Reach {
  uint32_t above = 0, below = 0;

  HD void include(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    if (BITS == 8 || bits == magnitude) above = larger(above, magnitude);
    else below = larger(below, magnitude);
  }
};

HD uint16_t round_up(float quotient) {
  return static_cast<uint16_t>((larger(bits_of(quotient), SMALLEST_SCALE) + 0xffffu) >> 16);
}

// The bfloat16 scale of a group.
template <int BITS>
HD uint16_t scale_for(const Reach<BITS>& reach) {
  constexpr float PER_127 = static_cast<float>(1.0 / 127), PER_10 = static_cast<float>(1.0 / 10), PER_13 = static_cast<float>(1.0 / 13);
  const uint32_t largest = larger(reach.above, reach.below);
  if (largest == 0) return 0;
  if (largest >= INFINITE) return NAN_SCALE;
  if (BITS == 8) return round_up(float_of(largest) * PER_127);
  const float above = float_of(reach.above) * PER_13, below = float_of(reach.below) * 0.5f;
  const uint16_t even = round_up(float_of(largest) * PER_10), sided = round_up(above > below ? above : below);
  return sided < even ? static_cast<uint16_t>(sided | 0x8000u) : even;
}

// 1/scale; 0 for 0.
HD float reciprocal_of(float scale) {
#ifdef __CUDA_ARCH__
  return scale == 0 ? 0 : __frcp_rn(scale);
#else
  return scale == 0 ? 0 : 1 / scale;
#endif
}

// value/scale, correctly rounded: the product with the rounded reciprocal, corrected once by its exact remainder (Markstein), holds
// for every value and every bfloat16 scale >= 2^-100.
HD float divide(float value, float scale, float reciprocal) {
  const float estimate = value * reciprocal;
  const float remainder = fmaf(-estimate, scale, value);
  return fmaf(remainder, reciprocal, estimate);
}

// Rounded to an integer, in the low bits.
HD uint32_t rounded(float value) { return bits_of(value + ROUNDING); }

// Where the even level nearest to `level` has its place, before rounding: from 4 on, levels are 2 apart.
HD float even_place(float level) {
  const float size = fabsf(level);
  return copysignf(fminf(size, fmaf(0.5f, size, 2.0f)), level);
}

// The codes of a chunk. A group whose scale is NaN has codes 0.
template <int BITS>
HD void encode(const float (&values)[CHUNK], uint16_t scale_bits, uint32_t (&words)[WORDS<BITS>]) {
  const float scale = scale_of(scale_bits), reciprocal = reciprocal_of(scale);
  const bool sided = is_sided(scale_bits);
  constexpr uint32_t ZERO = BITS == 8 ? 0 : 0x88888888u;
  constexpr int PER_WORD = 32 / BITS;
#pragma unroll
  for (int w = 0; w < WORDS<BITS>; ++w) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < PER_WORD; ++j) {
      const float level = divide(values[w * PER_WORD + j], scale, reciprocal);
      const uint32_t code = BITS == 8 ? rounded(level) & 0xffu
                            : sided   ? (rounded(level) + 2) & 0xfu
                                      : (rounded(even_place(level)) + 8) & 0xfu;
      word |= code << (BITS * j);
    }
    words[w] = scale_bits == NAN_SCALE ? ZERO : word;
  }
}

// The values of a chunk: level * scale, exactly.
template <int BITS>
HD void decode(const uint32_t (&words)[WORDS<BITS>], uint16_t scale_bits, float (&values)[CHUNK]) {
  const float scale = scale_of(scale_bits);
  const bool sided = is_sided(scale_bits);
  constexpr int PER_WORD = 32 / BITS;
#pragma unroll
  for (int j = 0; j < CHUNK; ++j) {
    const uint32_t code = words[j / PER_WORD] >> (BITS * (j % PER_WORD));
    int level;
    if (BITS == 8) {
      level = static_cast<int8_t>(code & 0xffu);
    } else {
      const int nibble = static_cast<int>(code & 0xfu), place = nibble - 8;
      const int within = place < -4 ? -4 : place > 4 ? 4 : place;
      level = sided ? nibble - 2 : 2 * place - within;
    }
    values[j] = static_cast<float>(level) * scale;
  }
}

}  // namespace agd_fast
