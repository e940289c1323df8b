// What the kernels' files offer: pointers to device memory, sizes, types; launched on a stream of a device.
// Raises: std::runtime_error naming the CUDA call that failed.
#pragma once

#include <cstdint>

#include "activations.h"

namespace agd_fast {

enum class Type { BFLOAT16, FLOAT16, FLOAT32 };

struct On {
  int device;
  void* stream;
};

struct Format {
  int bits, group;
};

// R rows of n elements; what they hold is `type`.
struct Shape {
  int64_t R, n;
  Type type;
};

// Row r is of sample r / rows_per_sample; element i of it of channel (r mod G) * (n/S) + i/S.
struct Layout {
  int64_t rows_per_sample, G, S;
};

struct Codes {
  uint8_t* codes;
  uint16_t* scales;
};

void pack(On on, Shape shape, Format format, const void* x, Codes packed);
void derivative_pack(On on, Shape shape, Format format, Activation activation, const void* x, Codes packed);
void norm_pack(On on, Shape shape, Format format, const void* x, const float* mean, const float* rstd, Codes packed);
void unpack(On on, Shape shape, Format format, Codes packed, void* y);
void scale_unpack(On on, Shape shape, Format format, const void* dy, Codes packed, void* dx);

// a, g: M rows of D elements, so many elements apart. P, Q: of the M * D elements together.
void gated_pack(On on, int64_t M, int64_t D, Type type, Format format, Activation activation, const void* a, int64_t a_stride,
                const void* g, int64_t g_stride, Codes P, Codes Q);
// dy: [M, D] -> [M, 2 * D]
void gated_backward(On on, int64_t M, int64_t D, Type type, Format format, const void* dy, Codes P, Codes Q, void* dx);

// A, B: [samples, C] with so many elements between samples (0: one for all), or null for 1 and 0.
struct Affine {
  const float *A, *B;
  int64_t A_stride, B_stride;
  Layout layout;
};
void affine_unpack(On on, Shape shape, Format format, Codes packed, Affine affine, void* z);
void silu_affine_backward(On on, Shape shape, Format format, const void* dy, Codes packed, Affine affine, void* dx);

// gamma: [C] of the type, or of float; or null. sums: norm_backward_sums(shape) floats to work in.
void norm_backward(On on, Shape shape, Format format, const void* dy, Codes packed, const float* rstd, const void* gamma,
                   bool gamma_is_float, bool centred, Layout layout, float* sums, void* dx);
int64_t norm_backward_sums(int64_t R, int64_t n);

// The device functions that the kernels are made of, looped over by the CPU on its own memory.
void host_pack(Shape shape, Format format, const void* x, Codes packed);
void host_unpack(Shape shape, Format format, Codes packed, void* y);
void host_activation(Activation activation, int64_t n, const float* x, float* value, float* derivative);
uint32_t host_divide(uint32_t n, uint32_t by);
void host_channels(int64_t R, int64_t n, int64_t G, int64_t S, int64_t* channels);

}  // namespace agd_fast
