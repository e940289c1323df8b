// norm_backward: dx = rstd * (w - mean(w) - x_hat * mean(w * x_hat)) of every row, w = dy * gamma.
// A row that fits into the registers of a block is read once; a longer one twice, by several blocks, which sum it first.
#include "launch.h"

namespace agd_fast {
namespace {

constexpr int HELD = 2;                            // chunks that a thread keeps
constexpr int64_t SPAN = THREADS * HELD * CHUNK;   // elements that a block keeps

struct Sums {
  float w, wx;  // of w, and of w * x_hat
  __device__ __forceinline__ Sums operator+(const Sums& other) const { return {w + other.w, wx + other.wx}; }
};

template <typename T>
struct Gradient {
  const T* dy;
  Packed packed;
  const float* rstd;
  const void* gamma;  // of T, or float
  bool gamma_is_float, centred;
  Channels channels;
  T* dx;

  // w and x_hat of a chunk, and what they add to the sums.
  template <int BITS>
  __device__ __forceinline__ void read(
      const Rows& rows, const Place& at, float (&w)[CHUNK], float (&normed)[CHUNK], Sums& sums) const {
    load(dy + rows.element(at), at.count, w);
    packed.read<BITS>(rows, at, normed);
    if (gamma) {
      float factors[CHUNK];
      const int64_t channel = channels.first_of(static_cast<uint32_t>(at.row));
      if (std::is_same<T, float>::value || gamma_is_float)
        load_channels(static_cast<const float*>(gamma) + channel, channels, at, factors);
      else
        load_channels(static_cast<const T*>(gamma) + channel, channels, at, factors);
#pragma unroll
      for (int j = 0; j < CHUNK; ++j) w[j] *= factors[j];
    }
#pragma unroll
    for (int j = 0; j < CHUNK; ++j)
      if (j < at.count) sums.w += w[j], sums.wx = fmaf(w[j], normed[j], sums.wx);
  }

  __device__ __forceinline__ void write(
      const Rows& rows, const Place& at, float (&w)[CHUNK], const float (&normed)[CHUNK], const Sums& sums) const {
    const float factor = __ldg(rstd + at.row), share = 1.0f / static_cast<float>(rows.n);
    const float mean = centred ? sums.w * share : 0.0f, slope = sums.wx * share;
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) w[j] = factor * (w[j] - mean - normed[j] * slope);
    store(dx + rows.element(at), at.count, w);
  }
};

__device__ __forceinline__ Sums sum_lanes(Sums sums, int lanes) {
  for (int other = lanes / 2; other; other /= 2)
    sums = sums + Sums{__shfl_xor_sync(0xffffffffu, sums.w, other), __shfl_xor_sync(0xffffffffu, sums.wx, other)};
  return sums;
}

// Over the whole block; all its threads get it.
__device__ __forceinline__ Sums sum_block(Sums sums) {
  __shared__ Sums by_warp[32];
  sums = sum_lanes(sums, 32);
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // of an earlier sum, all have read theirs
  if (lane == 0) by_warp[threadIdx.x / 32] = sums;
  __syncthreads();
  return sum_lanes(lane < warps ? by_warp[lane] : Sums{0, 0}, 32);
}

__device__ __forceinline__ Place place_in(const Rows& rows, int64_t row, int64_t chunk) {
  const int64_t left = row < rows.R ? rows.n - chunk * CHUNK : 0;
  return {row, chunk * CHUNK, static_cast<int>(left < CHUNK ? left : CHUNK)};
}

// A row is a part of a warp, `lanes` wide, or a block, where lanes are its threads.
template <typename T, int BITS>
__global__ void __launch_bounds__(THREADS) norm_backward_kernel(Rows rows, Gradient<T> gradient, int lanes) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  float w[HELD][CHUNK], normed[HELD][CHUNK];
  Sums sums{0, 0};
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
    const Place at = place_in(rows, row, lane + k * lanes);
    if (at.count > 0) gradient.template read<BITS>(rows, at, w[k], normed[k], sums);
  }
  sums = lanes <= 32 ? sum_lanes(sums, lanes) : sum_block(sums);
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
    const Place at = place_in(rows, row, lane + k * lanes);
    if (at.count > 0) gradient.write(rows, at, w[k], normed[k], sums);
  }
}

// spans: blocks a row. parts: [R, spans]
template <typename T, int BITS>
__global__ void __launch_bounds__(THREADS) norm_sums_kernel(Rows rows, Gradient<T> gradient, Divisor spans, Sums* parts) {
  const uint32_t row = spans.divide(blockIdx.x), span = blockIdx.x - row * spans.by;
  Sums sums{0, 0};
#pragma unroll 1
  for (int k = 0; k < HELD; ++k) {
    const Place at = place_in(rows, row, static_cast<int64_t>(span) * (SPAN / CHUNK) + k * THREADS + threadIdx.x);
    float w[CHUNK], normed[CHUNK];
    if (at.count > 0) gradient.template read<BITS>(rows, at, w, normed, sums);
  }
  sums = sum_block(sums);
  if (threadIdx.x == 0) parts[blockIdx.x] = sums;
}

template <typename T, int BITS>
__global__ void __launch_bounds__(THREADS)
    norm_backward_long_kernel(Rows rows, Gradient<T> gradient, Divisor spans, const Sums* parts) {
  const uint32_t row = spans.divide(blockIdx.x), span = blockIdx.x - row * spans.by;
  Sums sums{0, 0}, unused{0, 0};
  for (uint32_t part = threadIdx.x; part < spans.by; part += THREADS) sums = sums + parts[row * spans.by + part];
  sums = sum_block(sums);
#pragma unroll 1
  for (int k = 0; k < HELD; ++k) {
    const Place at = place_in(rows, row, static_cast<int64_t>(span) * (SPAN / CHUNK) + k * THREADS + threadIdx.x);
    float w[CHUNK], normed[CHUNK];
    if (at.count <= 0) continue;
    gradient.template read<BITS>(rows, at, w, normed, unused);
    gradient.write(rows, at, w, normed, sums);
  }
}

int64_t spans_of(int64_t n) { return (n + SPAN - 1) / SPAN; }

// Threads of a row of n <= SPAN elements: the fewest that can keep it.
int lanes_for(int64_t n) {
  int lanes = 1;
  while (lanes * HELD * CHUNK < n) lanes *= 2;
  return lanes;
}

}  // namespace

int64_t norm_backward_sums(int64_t R, int64_t n) { return n <= SPAN ? 0 : 2 * R * spans_of(n); }

void norm_backward(On on, Shape shape, Format format, const void* dy, Codes packed, const float* rstd, const void* gamma,
                   bool gamma_is_float, bool centred, Layout layout, float* sums, void* dx) {
  const Rows rows(shape.R, shape.n, format.bits, format.group, false);
  if (!rows.threads()) return;
  const OnDevice guard(on.device);
  const auto stream = static_cast<cudaStream_t>(on.stream);
  dispatch(shape.type, format.bits, [&](auto type, auto bits) {
    using T = decltype(type);
    const Gradient<T> gradient{static_cast<const T*>(dy), {packed.codes, packed.scales}, rstd, gamma, gamma_is_float, centred,
                               Channels(shape.n, layout.G, layout.S), static_cast<T*>(dx)};
    if (shape.n <= SPAN) {
      const int lanes = lanes_for(shape.n), threads = lanes <= 32 ? 128 : lanes;
      const int64_t rows_a_block = threads / lanes;
      const unsigned blocks = blocks_for((shape.R + rows_a_block - 1) / rows_a_block * THREADS, "norm_backward");
      norm_backward_kernel<T, bits()><<<blocks, threads, 0, stream>>>(rows, gradient, lanes);
    } else {
      const Divisor spans(static_cast<uint32_t>(spans_of(shape.n)));
      const unsigned blocks = blocks_for(shape.R * spans.by * THREADS, "norm_backward");
      Sums* parts = reinterpret_cast<Sums*>(sums);
      norm_sums_kernel<T, bits()><<<blocks, THREADS, 0, stream>>>(rows, gradient, spans, parts);
      check(cudaGetLastError(), "norm_backward, the sums");
      norm_backward_long_kernel<T, bits()><<<blocks, THREADS, 0, stream>>>(rows, gradient, spans, parts);
    }
  });
  check(cudaGetLastError(), "norm_backward");
}

}  // namespace agd_fast
