/* SPDX-License-Identifier: Apache-2.0
 * The float64 oracle. Slow and plain on purpose; it shares no code with the solver that it judges. */
#include "entmax.h"

#include <math.h>

static double mass(const double *s, int64_t n, double m, double a, double t) {
  double f = 0;
  for (int64_t i = 0; i < n; i++) {
    double y = a * (s[i] - m) - t;
    if (y > 0) f += pow(y, 1.0 / a);
  }
  return f;
}

double emxi_oracle_entmax(const double *s, int64_t n, double alpha, double *p, int64_t *support) {
  double m = -INFINITY;
  bool bad = false;
  for (int64_t i = 0; i < n; i++) {
    if (s[i] > m) m = s[i];
    if (isnan(s[i]) || s[i] == INFINITY) bad = true;
  }
  int64_t k = 0;
  if (bad || m == -INFINITY) {
    for (int64_t i = 0; p && i < n; i++) p[i] = bad ? NAN : 0;
    if (support) *support = 0;
    return bad ? NAN : -INFINITY;
  }
  if (alpha == 1.0) {
    long double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += expl((long double)s[i] - m);
    for (int64_t i = 0; i < n; i++) {
      double w = (double)(expl((long double)s[i] - m) / sum);
      k += s[i] != -INFINITY;
      if (p) p[i] = w;
    }
    if (support) *support = k;
    return NAN;
  }
  const double a = alpha - 1.0;
  double lo = -1.0, hi = 0.0;
  for (;;) {
    double mid = 0.5 * (lo + hi);
    if (mid <= lo || mid >= hi) break;
    if (mass(s, n, m, a, mid) >= 1.0)
      lo = mid;
    else
      hi = mid;
  }
  double t = lo;
  if (alpha == 1.5 || alpha == 2.0) {
    long double sum = 0, sq = 0;
    for (int64_t i = 0; i < n; i++) {
      double x = a * (s[i] - m);
      if (x > hi) {
        k++;
        sum += x;
      }
    }
    long double mean = sum / k;
    for (int64_t i = 0; i < n; i++) {
      double x = a * (s[i] - m);
      if (x > hi) sq += (x - mean) * (x - mean);
    }
    /* sum (mean + d_i - t)^2 = k (mean-t)^2 + sq = 1 */
    if (k) t = alpha == 2.0 ? (double)(mean - 1.0L / k) : (double)(mean - sqrtl((1.0L - sq) / k));
  }
  k = 0;
  for (int64_t i = 0; i < n; i++) {
    double y = a * (s[i] - m) - t;
    k += y > 0;
    if (p) p[i] = y > 0 ? pow(y, 1.0 / a) : 0;
  }
  if (support) *support = k;
  return t + a * m;
}
