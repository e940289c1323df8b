// GELU and SiLU with their derivatives, in float; agd_fast/memory/ops/activations.py says the same in torch. Value and derivative
// share one exponential and one reciprocal.
#pragma once

#include <cmath>

#include "codec.h"

namespace agd_fast {

enum class Activation { GELU, GELU_TANH, SILU };

struct Derived {
  float value, derivative;
};

// 1/x for x >= 1; within 2 ulp.
HD float inverse(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

// Phi(x) + x * phi(x). The tail of Phi is exp(-x^2/2) times a polynomial in t = 1/(1 + 0.405 |x|/sqrt(2)), fitted to the smallest
// largest error of erfc on [0, 12]: 5e-8.
HD Derived gelu(float x) {
  const float t = inverse(fmaf(0.405f * 0.70710678118654752f, fabsf(x), 1.0f));
  const float density = exp2f(-0.72134752044448170f * x * x);  // exp(-x^2/2)
  float sum = fmaf(-0.186943801f, t, 0.628844453f);
  sum = fmaf(sum, t, -0.25847394f);
  sum = fmaf(sum, t, 0.395806431f);
  sum = fmaf(sum, t, 0.189261312f);
  sum = fmaf(sum, t, 0.231505501f);
  const float tail = 0.5f * density * t * sum, cdf = x < 0 ? tail : 1 - tail;
  return {x * cdf, fmaf(x, density * 0.39894228040143268f, cdf)};
}

struct Sigmoid {
  float of, of_minus;  // sigma(x), and sigma(-x) = 1 - sigma(x) to its own precision
};

HD Sigmoid sigmoid(float x) {
  const float small = exp2f(-1.44269504088896341f * fabsf(x)), large = inverse(1 + small);
  return x < 0 ? Sigmoid{small * large, large} : Sigmoid{large, small * large};
}

// 0.5 * (1 + tanh(u)) is sigma(2u)
HD Derived gelu_tanh(float x) {
  constexpr float SLOPE = 2 * 0.79788456080286536f, CUBIC = 0.044715f;
  const float square = x * x;
  const Sigmoid gate = sigmoid(SLOPE * x * fmaf(CUBIC, square, 1.0f));
  return {x * gate.of, fmaf(x * (gate.of * gate.of_minus), SLOPE * fmaf(3 * CUBIC, square, 1.0f), gate.of)};
}

// sigma(x) * (1 + x * (1 - sigma(x)))
HD Derived silu(float x) {
  const Sigmoid gate = sigmoid(x);
  return {x * gate.of, gate.of * fmaf(x, gate.of_minus, 1.0f)};
}

template <Activation KIND>
HD Derived activate(float x) {
  return KIND == Activation::GELU ? gelu(x) : KIND == Activation::GELU_TANH ? gelu_tanh(x) : silu(x);
}

}  // namespace agd_fast
