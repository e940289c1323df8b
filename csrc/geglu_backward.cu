// geglu_backward: [dy * P | dy * Q].
#include "gated.cuh"

namespace agd_fast {
namespace {

template <typename T, int BITS>
__global__ void __launch_bounds__(THREADS)
    gated_backward_kernel(Rows rows, Halves halves, const T* dy, Packed P, Packed Q, T* dx) {
  const Place at = rows.place(blockIdx.x * THREADS + threadIdx.x);
  if (at.count <= 0) return;
  float grads[CHUNK], p[CHUNK], q[CHUNK];
  load(dy + at.first, at.count, grads);
  P.read<BITS>(rows, at, p);
  Q.read<BITS>(rows, at, q);
#pragma unroll
  for (int j = 0; j < CHUNK; ++j) p[j] *= grads[j], q[j] *= grads[j];
  store(dx, halves, 2 * halves.D, at, p);
  store(dx + halves.D, halves, 2 * halves.D, at, q);
}

}  // namespace

void gated_backward(On on, int64_t M, int64_t D, Type type, Format format, const void* dy, Codes P, Codes Q, void* dx) {
  const Rows rows(1, M * D, format.bits, format.group, false);
  if (!rows.threads()) return;
  const OnDevice guard(on.device);
  dispatch(type, format.bits, [&](auto value, auto bits) {
    using T = decltype(value);
    gated_backward_kernel<T, bits()>
        <<<blocks_for(rows.threads(), "geglu_backward"), THREADS, 0, static_cast<cudaStream_t>(on.stream)>>>(
            rows, Halves(D), static_cast<const T*>(dy), Packed{P.codes, P.scales}, Packed{Q.codes, Q.scales}, static_cast<T*>(dx));
  });
  check(cudaGetLastError(), "geglu_backward");
}

}  // namespace agd_fast
