// Elements of [M, D] beside rows of another pitch: strided halves, or a row of twice the width.
#pragma once

#include "launch.h"

namespace agd_fast {

struct Halves {
  int64_t D;
  bool whole;  // a chunk is of one row
  Divisor by_chunks;

  explicit Halves(int64_t D) : D(D), whole(D % CHUNK == 0), by_chunks(whole && D ? static_cast<uint32_t>(D / CHUNK) : 1) {}

  // Where element `first` of [M, D] is, with rows `stride` apart; of a chunk that is whole.
  HD int64_t at(int64_t first, int64_t stride) const {
    const uint32_t chunk = static_cast<uint32_t>(first / CHUNK), row = by_chunks.divide(chunk);
    return row * stride + static_cast<int64_t>(chunk - row * by_chunks.by) * CHUNK;
  }

  // Calls for each of a chunk's elements with its number and where it is.
  template <typename Function>
  HD void each(const Place& at, int64_t stride, Function function) const {
    int64_t row = at.first / D, column = at.first - row * D;
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) {
      if (j < at.count) function(j, row * stride + column);
      if (++column == D) column = 0, ++row;
    }
  }
};

template <typename T>
__device__ __forceinline__ void load(const T* p, const Halves& halves, int64_t stride, const Place& at, float (&values)[CHUNK]) {
  if (halves.whole) return load(p + halves.at(at.first, stride), at.count, values);
#pragma unroll
  for (int j = 0; j < CHUNK; ++j) values[j] = 0.0f;
  halves.each(at, stride, [&](int j, int64_t place) { values[j] = to_float(p[place]); });
}

template <typename T>
__device__ __forceinline__ void store(T* p, const Halves& halves, int64_t stride, const Place& at, const float (&values)[CHUNK]) {
  if (halves.whole) return store(p + halves.at(at.first, stride), at.count, values);
  halves.each(at, stride, [&](int j, int64_t place) { p[place] = from_float<T>(values[j]); });
}

}  // namespace agd_fast
