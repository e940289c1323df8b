// agd_fast._cuda: the ops by addresses. Who calls checks sizes, types and devices before; see agd_fast/memory/ops/.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;

namespace {

using namespace agd_fast;
using Address = uintptr_t;

template <typename T>
T* at(Address address) { return reinterpret_cast<T*>(address); }

On on(int device, Address stream) { return {device, at<void>(stream)}; }
Codes codes_at(Address codes, Address scales) { return {at<uint8_t>(codes), at<uint16_t>(scales)}; }
Shape shape(int64_t R, int64_t n, int type) { return {R, n, static_cast<Type>(type)}; }

Affine affine(Address A, int64_t A_stride, Address B, int64_t B_stride, int64_t rows_per_sample, int64_t G, int64_t S) {
  return {at<float>(A), at<float>(B), A_stride, B_stride, {rows_per_sample, G, S}};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of agd_fast, by addresses; types: 0 bfloat16, 1 float16, 2 float32";
  m.attr("architectures") = AGD_FAST_ARCHITECTURES;
  m.attr("cuda") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);

  m.def("pack", [](int device, Address stream, int64_t n, int type, int bits, int group, Address x, Address codes, Address scales) {
    pack(on(device, stream), shape(1, n, type), {bits, group}, at<void>(x), codes_at(codes, scales));
  });
  m.def("derivative_pack", [](int device, Address stream, int64_t n, int type, int bits, int group, int activation, Address x,
                              Address codes, Address scales) {
    derivative_pack(on(device, stream), shape(1, n, type), {bits, group}, static_cast<Activation>(activation), at<void>(x),
                    codes_at(codes, scales));
  });
  m.def("norm_pack", [](int device, Address stream, int64_t R, int64_t n, int type, int bits, int group, Address x, Address mean,
                        Address rstd, Address codes, Address scales) {
    norm_pack(on(device, stream), shape(R, n, type), {bits, group}, at<void>(x), at<float>(mean), at<float>(rstd),
              codes_at(codes, scales));
  });
  m.def("unpack", [](int device, Address stream, int64_t n, int type, int bits, int group, Address codes, Address scales, Address y) {
    unpack(on(device, stream), shape(1, n, type), {bits, group}, codes_at(codes, scales), at<void>(y));
  });
  m.def("scale_unpack", [](int device, Address stream, int64_t n, int type, int bits, int group, Address dy, Address codes,
                           Address scales, Address dx) {
    scale_unpack(on(device, stream), shape(1, n, type), {bits, group}, at<void>(dy), codes_at(codes, scales), at<void>(dx));
  });
  m.def("gated_pack", [](int device, Address stream, int64_t M, int64_t D, int type, int bits, int group, int activation, Address a,
                         int64_t a_stride, Address g, int64_t g_stride, Address codes_p, Address scales_p, Address codes_q,
                         Address scales_q) {
    gated_pack(on(device, stream), M, D, static_cast<Type>(type), {bits, group}, static_cast<Activation>(activation), at<void>(a),
               a_stride, at<void>(g), g_stride, codes_at(codes_p, scales_p), codes_at(codes_q, scales_q));
  });
  m.def("gated_backward", [](int device, Address stream, int64_t M, int64_t D, int type, int bits, int group, Address dy,
                             Address codes_p, Address scales_p, Address codes_q, Address scales_q, Address dx) {
    gated_backward(on(device, stream), M, D, static_cast<Type>(type), {bits, group}, at<void>(dy), codes_at(codes_p, scales_p),
                   codes_at(codes_q, scales_q), at<void>(dx));
  });
  m.def("affine_unpack", [](int device, Address stream, int64_t R, int64_t n, int type, int bits, int group, Address codes,
                            Address scales, Address A, int64_t A_stride, Address B, int64_t B_stride, int64_t rows_per_sample,
                            int64_t G, int64_t S, Address z) {
    affine_unpack(on(device, stream), shape(R, n, type), {bits, group}, codes_at(codes, scales),
                  affine(A, A_stride, B, B_stride, rows_per_sample, G, S), at<void>(z));
  });
  m.def("silu_affine_backward", [](int device, Address stream, int64_t R, int64_t n, int type, int bits, int group, Address dy,
                                   Address codes, Address scales, Address A, int64_t A_stride, Address B, int64_t B_stride,
                                   int64_t rows_per_sample, int64_t G, int64_t S, Address dx) {
    silu_affine_backward(on(device, stream), shape(R, n, type), {bits, group}, at<void>(dy), codes_at(codes, scales),
                         affine(A, A_stride, B, B_stride, rows_per_sample, G, S), at<void>(dx));
  });
  m.def("norm_backward", [](int device, Address stream, int64_t R, int64_t n, int type, int bits, int group, Address dy,
                            Address codes, Address scales, Address rstd, Address gamma, bool gamma_is_float, bool centred, int64_t G,
                            int64_t S, Address sums, Address dx) {
    norm_backward(on(device, stream), shape(R, n, type), {bits, group}, at<void>(dy), codes_at(codes, scales), at<float>(rstd),
                  at<void>(gamma), gamma_is_float, centred, {G, G, S}, at<float>(sums), at<void>(dx));
  });
  m.def("norm_backward_sums", &norm_backward_sums);

  m.def("host_pack", [](int64_t R, int64_t n, int type, int bits, int group, Address x, Address codes, Address scales) {
    host_pack(shape(R, n, type), {bits, group}, at<void>(x), codes_at(codes, scales));
  });
  m.def("host_unpack", [](int64_t R, int64_t n, int type, int bits, int group, Address codes, Address scales, Address y) {
    host_unpack(shape(R, n, type), {bits, group}, codes_at(codes, scales), at<void>(y));
  });
  m.def("host_activation", [](int activation, int64_t n, Address x, Address value, Address derivative) {
    host_activation(static_cast<Activation>(activation), n, at<float>(x), at<float>(value), at<float>(derivative));
  });
  m.def("host_divide", &host_divide);
  m.def("host_channels", [](int64_t R, int64_t n, int64_t G, int64_t S, Address channels) {
    host_channels(R, n, G, S, at<int64_t>(channels));
  });
}
