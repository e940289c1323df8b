// Where things are: rows of a tensor, the chunks of a row, the channels of a chunk's elements.
#pragma once

#include "codec.h"

namespace agd_fast {

// Division of n < 2^31 by a number known at launch: a product and a shift.
struct Divisor {
  uint32_t by = 1, factor = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t by) : by(by) {
    while ((uint64_t{1} << shift) < by) ++shift;
    factor = static_cast<uint32_t>((((uint64_t{1} << shift) - by) << 32) / by + 1);
  }

  HD uint32_t divide(uint32_t n) const {
#ifdef __CUDA_ARCH__
    return (__umulhi(n, factor) + n) >> shift;
#else
    return static_cast<uint32_t>((((static_cast<uint64_t>(n) * factor) >> 32) + n) >> shift);
#endif
  }
};

// A chunk of a row: its first element, and how many there are of CHUNK.
struct Place {
  int64_t row, first;
  int count;
};

// R rows of n elements, packed by groups. Threads are numbered by chunk, row after row.
struct Rows {
  int64_t R, n, groups, pitch;
  int group_bits;   // log2 of the group
  uint32_t chunks;  // a row's; padded: of whole groups, so that a group's threads are neighbours in a warp
  Divisor by_chunks;

  Rows(int64_t R, int64_t n, int bits, int group, bool padded)
      : R(R), n(n), groups((n + group - 1) / group), pitch((n * bits + 7) / 8), group_bits(group == 32 ? 5 : group == 64 ? 6 : 7) {
    chunks = static_cast<uint32_t>(padded ? groups * (group / CHUNK) : (n + CHUNK - 1) / CHUNK);
    by_chunks = Divisor(chunks ? chunks : 1);
  }

  int64_t threads() const { return R * chunks; }

  // Of a thread beyond the last, and of a chunk that is padding, count is not above 0.
  HD Place place(uint32_t thread) const {
    const uint32_t row = by_chunks.divide(thread);
    const int64_t first = static_cast<int64_t>(thread - row * chunks) * CHUNK;
    const int64_t left = row < R ? n - first : 0;
    return {row, first, static_cast<int>(left < CHUNK ? left : CHUNK)};
  }

  HD int64_t element(const Place& at) const { return at.row * n + at.first; }
  HD int64_t byte(const Place& at, int bits) const { return at.row * pitch + at.first * bits / 8; }
  HD int64_t scale(const Place& at) const { return at.row * groups + (at.first >> group_bits); }
  HD int group() const { return 1 << group_bits; }
};

// Element i of row r is of channel (r mod G) * (n/S) + i/S, in [0, C).
struct Channels {
  Divisor G, S;
  uint32_t per_row;

  Channels(int64_t n, int64_t G, int64_t S)
      : G(static_cast<uint32_t>(G)), S(static_cast<uint32_t>(S)), per_row(static_cast<uint32_t>(n / S)) {}

  HD int64_t first_of(uint32_t row) const { return static_cast<int64_t>(row - G.divide(row) * G.by) * per_row; }
};

}  // namespace agd_fast
