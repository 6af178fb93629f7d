/* SPDX-License-Identifier: Apache-2.0
 * Moments of the positive part of a normal, for C and CUDA (src/kv/gaussian.h says what they are for). */
#ifndef EMXI_GAUSS_MOMENTS_H
#define EMXI_GAUSS_MOMENTS_H

#include "../entmax/solve.h"

#define EMXI_SQRT1_2 0.70710678118654752440
#define EMXI_INV_SQRT_2PI 0.39894228040143267794

EMX_HD double emxi_gauss_upper_tail(double z) { return 0.5 * erfc(z * EMXI_SQRT1_2); } /* P(Z > z) */

/* I_0..I_3, I_k = E[(t+Z)_+^k]; I_0 = P(Z > -t). */
EMX_HD void emxi_gauss_integer_moments(double t, double out[4]) {
  out[0] = emxi_gauss_upper_tail(-t);
  if (t >= -2.0) {
    out[1] = t * out[0] + EMXI_INV_SQRT_2PI * exp(-0.5 * t * t);
    out[2] = t * out[1] + out[0];
    out[3] = t * out[2] + 2.0 * out[1];
    return;
  }
  out[1] = out[2] = out[3] = 0;
  if (t < -38.0) return; /* below the smallest double */
  /* For t < 0 the I_k are the minimal solution: every term of I_(k-2) = (I_k - t I_(k-1)) / (k-1) is positive. The start is
   * arbitrary and its error dies out as exp(-2 |t| sqrt(2k)). */
  double high = 0, low = 1, scaled[4] = {0};
  for (int k = 8 + (int)(150.0 / (t * t)); k >= 0; k--) {
    /* low is I_k, high is I_(k+1) */
    if (k < 4) scaled[k] = low;
    double next = k ? (high - t * low) / k : 0;
    high = low;
    low = next;
  }
  for (int k = 1; k < 4; k++) out[k] = out[0] * (scaled[k] / scaled[0]);
}

/* Any b > 0: the logarithm of E[(t+Z)_+^b], which for large b is far out of range itself, and E[(t+Z)_+^(b-1)] over it. */
EMX_HD double emxi_gauss_any_moment(double b, double t, double *ratio) {
  /* With y = t + z = e^u the integrand y^(b+1) phi(y - t) is log-concave around its peak, analytic, and dies out on both
   * sides. */
  const double y0 = 0.5 * (t + sqrt(t * t + 4.0 * (b + 1.0)));
  const double peak = y0 > 0 ? y0 : (b + 1.0) / fmax(-t, 1.0), width = 1.0 / sqrt(peak * (2.0 * peak - t));
  const double step = 0.35 * width, u0 = log(peak), top = (b + 1.0) * u0 - 0.5 * (peak - t) * (peak - t);
  double sum = 0, below = 0;
  for (int side = -1; side <= 1; side += 2)
    for (int i = side < 0 ? 1 : 0; i < 4000; i++) {
      const double u = u0 + side * i * step, y = exp(u), z = y - t;
      const double f = exp((b + 1.0) * u - 0.5 * z * z - top), g = f / y;
      sum += f;
      below += g;
      if (g <= 1e-12 * below && f <= 1e-12 * sum) break;
    }
  *ratio = below / sum;
  return top + log(sum * step * EMXI_INV_SQRT_2PI);
}

/* The integer that b is, 1..3, or 0. */
EMX_HD int emxi_gauss_small_integer(double b) {
  for (int k = 1; k <= 3; k++)
    if (fabs(b - k) < 1e-12) return k;
  return 0;
}

/* What tokens of a page N(mu, sigma^2) add at tau, in units of a * score: E[(a X - tau)_+^b], and -d/dtau of it. */
EMX_HD double emxi_gauss_term(double a, double b, double mu, double sigma, double tau, double *slope) {
  const double mean = a * mu - tau, spread = a * sigma;
  *slope = 0;
  if (mean + 9.0 * spread <= 0) return 0; /* below 1e-18 of a token */
  if (spread <= 1e-12 * fabs(mean)) {     /* a point */
    *slope = b * pow(mean, b - 1.0);
    return pow(mean, b);
  }
  const int k = emxi_gauss_small_integer(b);
  if (k) {
    double m[4];
    emxi_gauss_integer_moments(mean / spread, m);
    const double scale = k == 1 ? 1.0 : k == 2 ? spread : spread * spread;
    *slope = b * scale * m[k - 1];
    return scale * spread * m[k];
  }
  double ratio;
  const double term = exp(b * log(spread) + emxi_gauss_any_moment(b, mean / spread, &ratio));
  *slope = b * term * ratio / spread;
  return term;
}

#endif
