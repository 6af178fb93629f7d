/* SPDX-License-Identifier: Apache-2.0 */
#include "kv/gaussian.h"

#include "kv/gauss_moments.h"

#include <math.h>

void emxi_gauss_moments(double b, double t, double *value, double *below) {
  const int k = emxi_gauss_small_integer(b);
  if (k) {
    double m[4];
    emxi_gauss_integer_moments(t, m);
    *value = m[k];
    *below = m[k - 1];
    return;
  }
  double ratio;
  *value = exp(emxi_gauss_any_moment(b, t, &ratio));
  *below = *value * ratio;
}

typedef struct mixture {
  double a, b, n;
  const float *mu, *sigma;
  int64_t count;
} mixture;

/* f(tau) and -f'(tau). */
static double mass(const mixture *m, double tau, double *slope) {
  double f = 0, g = 0;
  for (int64_t i = 0; i < m->count; i++) {
    double s;
    f += emxi_gauss_term(m->a, m->b, (double)m->mu[i], (double)m->sigma[i], tau, &s);
    g += s;
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
    if (emxi_gauss_upper_tail(mid) > tail)
      lo = mid;
    else
      hi = mid;
  }
  return 0.5 * (lo + hi);
}
