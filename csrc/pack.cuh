// A kernel that packs what a source gives of every chunk, which is read once.
#pragma once

#include "launch.h"

namespace agd_fast {

template <int BITS, typename Source>
__global__ void __launch_bounds__(THREADS) pack_kernel(Rows rows, Source source, Codes packed) {
  const Place at = rows.place(blockIdx.x * THREADS + threadIdx.x);
  float values[CHUNK] = {};
  if (at.count > 0) source(rows, at, values);
  write_packed<BITS>(rows, at, values, packed.codes, packed.scales);
}

template <int BITS, typename Source>
void launch_pack(On on, const Shape& shape, const Format& format, Source source, Codes packed, const char* op) {
  const Rows rows(shape.R, shape.n, BITS, format.group, true);
  if (!rows.threads()) return;
  const OnDevice guard(on.device);
  pack_kernel<BITS><<<blocks_for(rows.threads(), op), THREADS, 0, static_cast<cudaStream_t>(on.stream)>>>(rows, source, packed);
  check(cudaGetLastError(), op);
}

}  // namespace agd_fast
