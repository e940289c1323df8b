// geglu_pack, swiglu_pack: both factors of a gated activation's gradient, from one read of a and g.
#include "gated.cuh"

namespace agd_fast {
namespace {

template <typename T>
struct Strided {
  const T* p;
  int64_t stride;
};

template <typename T, int BITS, Activation KIND>
__global__ void __launch_bounds__(THREADS)
    gated_pack_kernel(Rows rows, Halves halves, Strided<T> a, Strided<T> g, Codes P, Codes Q) {
  const Place at = rows.place(blockIdx.x * THREADS + threadIdx.x);
  float p[CHUNK] = {}, q[CHUNK] = {};
  if (at.count > 0) {
    load(g.p, halves, g.stride, at, p);
    load(a.p, halves, a.stride, at, q);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) {
      const Derived gate = activate<KIND>(p[j]);
      p[j] = j < at.count ? gate.value : 0.0f;
      q[j] = j < at.count ? q[j] * gate.derivative : 0.0f;
    }
  }
  write_packed<BITS>(rows, at, p, P.codes, P.scales);
  write_packed<BITS>(rows, at, q, Q.codes, Q.scales);
}

}  // namespace

void gated_pack(On on, int64_t M, int64_t D, Type type, Format format, Activation activation, const void* a, int64_t a_stride,
                const void* g, int64_t g_stride, Codes P, Codes Q) {
  const Rows rows(1, M * D, format.bits, format.group, true);
  if (!rows.threads()) return;
  const OnDevice guard(on.device);
  const unsigned blocks = blocks_for(rows.threads(), "geglu_pack");
  dispatch(type, format.bits, [&](auto value, auto bits) {
    using T = decltype(value);
    const Strided<T> values{static_cast<const T*>(a), a_stride}, gates{static_cast<const T*>(g), g_stride};
    const auto launch = [&](auto kernel) {
      kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(on.stream)>>>(rows, Halves(D), values, gates, P, Q);
    };
    if (activation == Activation::GELU) launch(gated_pack_kernel<T, bits(), Activation::GELU>);
    else if (activation == Activation::GELU_TANH) launch(gated_pack_kernel<T, bits(), Activation::GELU_TANH>);
    else launch(gated_pack_kernel<T, bits(), Activation::SILU>);
  });
  check(cudaGetLastError(), "geglu_pack");
}

}  // namespace agd_fast
