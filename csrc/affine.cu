// affine_unpack, silu_affine_backward: z = x_hat * A + B, and a gradient through SiLU at it.
#include "launch.h"

namespace agd_fast {
namespace {

struct Rescaled {
  const float *A, *B;
  int64_t A_stride, B_stride;
  Divisor rows_per_sample;
  Channels channels;

  Rescaled(const Affine& affine, int64_t n)
      : A(affine.A), B(affine.B), A_stride(affine.A_stride), B_stride(affine.B_stride),
        rows_per_sample(static_cast<uint32_t>(affine.layout.rows_per_sample)), channels(n, affine.layout.G, affine.layout.S) {}

  __device__ __forceinline__ void operator()(const Place& at, float (&values)[CHUNK]) const {
    const uint32_t row = static_cast<uint32_t>(at.row), sample = rows_per_sample.divide(row);
    const int64_t channel = channels.first_of(row);
    float factors[CHUNK], offsets[CHUNK];
    if (A) load_channels(A + channel + sample * A_stride, channels, at, factors);
    if (B) load_channels(B + channel + sample * B_stride, channels, at, offsets);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) values[j] = fmaf(values[j], A ? factors[j] : 1.0f, B ? offsets[j] : 0.0f);
  }
};

template <typename T, int BITS>
__global__ void __launch_bounds__(THREADS) affine_kernel(Rows rows, const T* dy, Packed packed, Rescaled rescaled, T* out) {
  const Place at = rows.place(blockIdx.x * THREADS + threadIdx.x);
  if (at.count <= 0) return;
  float values[CHUNK];
  packed.read<BITS>(rows, at, values);
  rescaled(at, values);
  if (dy) {
    float grads[CHUNK];
    load(dy + rows.element(at), at.count, grads);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) values[j] = grads[j] * silu(values[j]).derivative;
  }
  store(out + rows.element(at), at.count, values);
}

void launch(On on, const Shape& shape, const Format& format, const void* dy, Codes packed, const Affine& affine, void* out,
            const char* op) {
  const Rows rows(shape.R, shape.n, format.bits, format.group, false);
  if (!rows.threads()) return;
  const OnDevice guard(on.device);
  dispatch(shape.type, format.bits, [&](auto type, auto bits) {
    using T = decltype(type);
    affine_kernel<T, bits()><<<blocks_for(rows.threads(), op), THREADS, 0, static_cast<cudaStream_t>(on.stream)>>>(
        rows, static_cast<const T*>(dy), Packed{packed.codes, packed.scales}, Rescaled(affine, shape.n), static_cast<T*>(out));
  });
  check(cudaGetLastError(), op);
}

}  // namespace

void affine_unpack(On on, Shape shape, Format format, Codes packed, Affine affine, void* z) {
  launch(on, shape, format, nullptr, packed, affine, z, "affine_unpack");
}

void silu_affine_backward(On on, Shape shape, Format format, const void* dy, Codes packed, Affine affine, void* dx) {
  launch(on, shape, format, dy, packed, affine, dx, "silu_affine_backward");
}

}  // namespace agd_fast
