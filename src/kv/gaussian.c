/* SPDX-License-Identifier: Apache-2.0 */
#include "kv/gaussian.h"

#include <math.h>
#include <stdbool.h>

#define SQRT1_2 0.70710678118654752440
#define INV_SQRT_2PI 0.39894228040143267794

static double upper_tail(double z) { return 0.5 * erfc(z * SQRT1_2); } /* P(Z > z) */
static double density(double z) { return INV_SQRT_2PI * exp(-0.5 * z * z); }

/* I_0..I_3. */
static void integer_moments(double t, double out[4]) {
  out[0] = upper_tail(-t);
  if (t >= -2.0) {
    out[1] = t * out[0] + density(t);
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
static double any_moment(double b, double t, double *ratio) {
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
  return top + log(sum * step * INV_SQRT_2PI);
}

static int small_integer(double b) {
  for (int k = 1; k <= 3; k++)
    if (fabs(b - k) < 1e-12) return k;
  return 0;
}

void emxi_gauss_moments(double b, double t, double *value, double *below) {
  const int k = small_integer(b);
  if (k) {
    double m[4];
    integer_moments(t, m);
    *value = m[k];
    *below = m[k - 1];
    return;
  }
  double ratio;
  *value = exp(any_moment(b, t, &ratio));
  *below = *value * ratio;
}

typedef struct mixture {
  double a, b, n;
  const float *mu, *sigma;
  int64_t count;
} mixture;

/* f(tau) and -f'(tau). */
static double mass(const mixture *m, double tau, double *slope) {
  const int k = small_integer(m->b);
  double f = 0, g = 0;
  for (int64_t i = 0; i < m->count; i++) {
    const double mean = m->a * (double)m->mu[i] - tau, spread = m->a * (double)m->sigma[i];
    if (mean + 9.0 * spread <= 0) continue; /* below 1e-18 of a token */
    if (spread <= 1e-12 * fabs(mean)) {     /* a point */
      f += pow(mean, m->b);
      g += m->b * pow(mean, m->b - 1.0);
      continue;
    }
    if (k) {
      double value, below;
      emxi_gauss_moments(m->b, mean / spread, &value, &below);
      const double scale = pow(spread, m->b - 1.0);
      f += scale * spread * value;
      g += m->b * scale * below;
    } else {
      double ratio;
      const double term = exp(m->b * log(spread) + any_moment(m->b, mean / spread, &ratio));
      f += term;
      g += m->b * term * ratio / spread;
    }
  }
  *slope = m->n * g;
  return m->n * f;
}

double emxi_gauss_tau(double alpha, double n, const float *mu, const float *sigma, int64_t count) {
  const mixture m = {alpha - 1.0, 1.0 / (alpha - 1.0), n, mu, sigma, count};
  double top = -INFINITY, widest = 0, slope;
  for (int64_t i = 0; i < count; i++) {
    top = fmax(top, (double)mu[i]);
    widest = fmax(widest, (double)sigma[i]);
  }
  /* Jensen: E[Y_+^b] >= (E Y)_+^b for b >= 1; for b < 1 the interval may have to grow. */
  double lo = m.a * top - pow(n, 1.0 - alpha), step = 1e-12 * (1.0 + fabs(lo));
  while (mass(&m, lo, &slope) < 1.0) {
    lo -= step;
    step *= 4.0;
  }
  step = fmax(0.5 * m.a * widest, 1e-3);
  double hi = lo + step;
  while (mass(&m, hi, &slope) >= 1.0) {
    lo = hi;
    step *= 2.0;
    hi += step;
  }
  /* Newton on log f, which is nearly straight in the tail; bisection where it leaves the bracket. */
  double tau = lo;
  for (int it = 0; it < 100 && hi - lo > 1e-12 * (1.0 + fabs(hi)); it++) {
    const double f = mass(&m, tau, &slope);
    if (fabs(f - 1.0) <= 1e-9) return tau;
    if (f >= 1.0)
      lo = tau;
    else
      hi = tau;
    const double next = tau + log(f) * f / slope;
    tau = next > lo && next < hi ? next : 0.5 * (lo + hi);
  }
  return lo;
}

double emxi_gauss_max_quantile(double q, int32_t n) {
  const double tail = -expm1(log(q) / n); /* 1 - q^(1/n) without cancellation */
  double lo = -40, hi = 40;
  for (int i = 0; i < 100; i++) {
    double mid = 0.5 * (lo + hi);
    if (upper_tail(mid) > tail)
      lo = mid;
    else
      hi = mid;
  }
  return 0.5 * (lo + hi);
}
