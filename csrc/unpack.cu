// unpack, scale_unpack: a packed tensor, or a gradient times it.
#include "launch.h"

namespace agd_fast {
namespace {

template <typename T, int BITS>
__global__ void __launch_bounds__(THREADS) unpack_kernel(Rows rows, const T* dy, Packed packed, T* y) {
  const Place at = rows.place(blockIdx.x * THREADS + threadIdx.x);
  if (at.count <= 0) return;
  float values[CHUNK];
  packed.read<BITS>(rows, at, values);
  if (dy) {
    float grads[CHUNK];
    load(dy + rows.element(at), at.count, grads);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) values[j] *= grads[j];
  }
  store(y + rows.element(at), at.count, values);
}

void launch(On on, const Shape& shape, const Format& format, const void* dy, Codes packed, void* y, const char* op) {
  const Rows rows(shape.R, shape.n, format.bits, format.group, false);
  if (!rows.threads()) return;
  const OnDevice guard(on.device);
  dispatch(shape.type, format.bits, [&](auto type, auto bits) {
    using T = decltype(type);
    unpack_kernel<T, bits()><<<blocks_for(rows.threads(), op), THREADS, 0, static_cast<cudaStream_t>(on.stream)>>>(
        rows, static_cast<const T*>(dy), Packed{packed.codes, packed.scales}, static_cast<T*>(y));
  });
  check(cudaGetLastError(), op);
}

}  // namespace

void unpack(On on, Shape shape, Format format, Codes packed, void* y) { launch(on, shape, format, nullptr, packed, y, "unpack"); }

void scale_unpack(On on, Shape shape, Format format, const void* dy, Codes packed, void* dx) {
  launch(on, shape, format, dy, packed, dx, "scale_unpack");
}

}  // namespace agd_fast
