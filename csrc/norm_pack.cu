// norm_pack: (x - mean) * rstd of every row.
#include "pack.cuh"

namespace agd_fast {
namespace {

template <typename T>
struct Normed {
  const T* x;
  const float *mean, *rstd;
  __device__ void operator()(const Rows& rows, const Place& at, float (&values)[CHUNK]) const {
    load(x + rows.element(at), at.count, values);
    const float centre = mean ? __ldg(mean + at.row) : 0.0f, factor = __ldg(rstd + at.row);
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) values[j] = j < at.count ? (values[j] - centre) * factor : 0.0f;
  }
};

}  // namespace

void norm_pack(On on, Shape shape, Format format, const void* x, const float* mean, const float* rstd, Codes packed) {
  dispatch(shape.type, format.bits, [&](auto type, auto bits) {
    using T = decltype(type);
    launch_pack<bits()>(on, shape, format, Normed<T>{static_cast<const T*>(x), mean, rstd}, packed, "norm_pack");
  });
}

}  // namespace agd_fast
