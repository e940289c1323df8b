// The kernels' arithmetic on the CPU, chunk by chunk as the threads do it: what can be tested of it without a GPU.
#include "memory.cuh"

namespace agd_fast {
namespace {

template <typename T, int BITS>
void pack_rows(const Rows& rows, const T* x, Codes packed) {
  const int chunks = rows.group() / CHUNK;
  for (int64_t thread = 0; thread < rows.threads(); thread += chunks) {
    float values[8][CHUNK] = {};
    Reach<BITS> reach;
    for (int c = 0; c < chunks; ++c) {
      const Place at = rows.place(static_cast<uint32_t>(thread + c));
      for (int j = 0; j < at.count; ++j) {
        values[c][j] = to_float(x[rows.element(at) + j]);
        reach.include(values[c][j]);
      }
    }
    const uint16_t scale = scale_for(reach);
    for (int c = 0; c < chunks; ++c) {
      const Place at = rows.place(static_cast<uint32_t>(thread + c));
      if (at.count <= 0) continue;
      uint32_t words[WORDS<BITS>];
      encode<BITS>(values[c], scale, words);
      for (int k = 0; k < (at.count * BITS + 7) / 8; ++k)
        packed.codes[rows.byte(at, BITS) + k] = static_cast<uint8_t>(words[k / 4] >> (8 * (k % 4)));
      packed.scales[rows.scale(at)] = scale;
    }
  }
}

template <typename T, int BITS>
void unpack_rows(const Rows& rows, Codes packed, T* y) {
  for (int64_t thread = 0; thread < rows.threads(); ++thread) {
    const Place at = rows.place(static_cast<uint32_t>(thread));
    uint32_t words[WORDS<BITS>] = {};
    for (int k = 0; k < (at.count * BITS + 7) / 8; ++k)
      words[k / 4] |= static_cast<uint32_t>(packed.codes[rows.byte(at, BITS) + k]) << (8 * (k % 4));
    float values[CHUNK];
    decode<BITS>(words, packed.scales[rows.scale(at)], values);
    for (int j = 0; j < at.count; ++j) y[rows.element(at) + j] = from_float<T>(values[j]);
  }
}

template <typename T>
void pack_bits(const Shape& shape, const Format& format, const void* x, Codes packed) {
  const Rows rows(shape.R, shape.n, format.bits, format.group, true);
  if (format.bits == 8) pack_rows<T, 8>(rows, static_cast<const T*>(x), packed);
  else pack_rows<T, 4>(rows, static_cast<const T*>(x), packed);
}

template <typename T>
void unpack_bits(const Shape& shape, const Format& format, Codes packed, void* y) {
  const Rows rows(shape.R, shape.n, format.bits, format.group, false);
  if (format.bits == 8) unpack_rows<T, 8>(rows, packed, static_cast<T*>(y));
  else unpack_rows<T, 4>(rows, packed, static_cast<T*>(y));
}

}  // namespace

void host_pack(Shape shape, Format format, const void* x, Codes packed) {
  if (shape.type == Type::BFLOAT16) pack_bits<__nv_bfloat16>(shape, format, x, packed);
  else if (shape.type == Type::FLOAT16) pack_bits<__half>(shape, format, x, packed);
  else pack_bits<float>(shape, format, x, packed);
}

void host_unpack(Shape shape, Format format, Codes packed, void* y) {
  if (shape.type == Type::BFLOAT16) unpack_bits<__nv_bfloat16>(shape, format, packed, y);
  else if (shape.type == Type::FLOAT16) unpack_bits<__half>(shape, format, packed, y);
  else unpack_bits<float>(shape, format, packed, y);
}

void host_activation(Activation activation, int64_t n, const float* x, float* value, float* derivative) {
  for (int64_t i = 0; i < n; ++i) {
    const Derived at = activation == Activation::GELU        ? activate<Activation::GELU>(x[i])
                       : activation == Activation::GELU_TANH ? activate<Activation::GELU_TANH>(x[i])
                                                             : activate<Activation::SILU>(x[i]);
    value[i] = at.value, derivative[i] = at.derivative;
  }
}

uint32_t host_divide(uint32_t n, uint32_t by) { return Divisor(by).divide(n); }

void host_channels(int64_t R, int64_t n, int64_t G, int64_t S, int64_t* found) {
  const Channels channels(n, G, S);
  for (int64_t row = 0; row < R; ++row)
    for (int64_t i = 0; i < n; ++i)
      found[row * n + i] = channels.first_of(static_cast<uint32_t>(row)) + channels.S.divide(static_cast<uint32_t>(i));
}

}  // namespace agd_fast
