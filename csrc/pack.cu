// pack, gelu_pack, silu_pack: a tensor, or a derivative at it.
#include "pack.cuh"

namespace agd_fast {
namespace {

template <typename T>
struct Plain {
  const T* x;
  __device__ void operator()(const Rows& rows, const Place& at, float (&values)[CHUNK]) const {
    load(x + rows.element(at), at.count, values);
  }
};

template <typename T, Activation KIND>
struct Derivative {
  const T* x;
  __device__ void operator()(const Rows& rows, const Place& at, float (&values)[CHUNK]) const {
    load(x + rows.element(at), at.count, values);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) values[j] = j < at.count ? activate<KIND>(values[j]).derivative : 0.0f;
  }
};

}  // namespace

void pack(On on, Shape shape, Format format, const void* x, Codes packed) {
  dispatch(shape.type, format.bits, [&](auto type, auto bits) {
    using T = decltype(type);
    launch_pack<bits()>(on, shape, format, Plain<T>{static_cast<const T*>(x)}, packed, "pack");
  });
}

void derivative_pack(On on, Shape shape, Format format, Activation activation, const void* x, Codes packed) {
  dispatch(shape.type, format.bits, [&](auto type, auto bits) {
    using T = decltype(type);
    const T* p = static_cast<const T*>(x);
    if (activation == Activation::GELU)
      launch_pack<bits()>(on, shape, format, Derivative<T, Activation::GELU>{p}, packed, "gelu_pack");
    else if (activation == Activation::GELU_TANH)
      launch_pack<bits()>(on, shape, format, Derivative<T, Activation::GELU_TANH>{p}, packed, "gelu_pack");
    else
      launch_pack<bits()>(on, shape, format, Derivative<T, Activation::SILU>{p}, packed, "silu_pack");
  });
}

}  // namespace agd_fast
