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

double emxi_oracle_normmax(const double *s, int64_t n, double alpha, double *p) {
  const double a = alpha - 1.0;
  double m = -INFINITY, lo = -1.0, hi = 0.0;
  for (int64_t i = 0; i < n; i++) m = fmax(m, s[i]);
  for (;;) { /* sum w^alpha >= 1 at lo */
    const double mid = 0.5 * (lo + hi);
    if (mid <= lo || mid >= hi) break;
    long double f = 0;
    for (int64_t i = 0; i < n; i++) {
      const double y = (s[i] - m) - mid;
      if (y > 0) f += powl(y, alpha / a);
    }
    if (f >= 1)
      lo = mid;
    else
      hi = mid;
  }
  long double sum = 0;
  for (int64_t i = 0; i < n; i++) {
    const double y = (s[i] - m) - lo;
    if (y > 0) sum += powl(y, 1.0 / a);
  }
  for (int64_t i = 0; i < n; i++) {
    const double y = (s[i] - m) - lo;
    p[i] = y > 0 ? (double)(powl(y, 1.0 / a) / sum) : 0;
  }
  return lo + m;
}

double emxi_oracle_budget(const double *s, int64_t n, double alpha, double budget, double *p) {
  const double a = alpha - 1.0;
  double top = -INFINITY, bottom = INFINITY;
  for (int64_t i = 0; i < n; i++) {
    top = fmax(top, s[i]);
    if (s[i] > -INFINITY) bottom = fmin(bottom, s[i]);
  }
  double lo = a * bottom - 1.0, hi = a * top;
  for (;;) {
    const double mid = 0.5 * (lo + hi);
    if (mid <= lo || mid >= hi) break;
    long double f = 0;
    for (int64_t i = 0; i < n; i++) {
      const double y = a * s[i] - mid;
      if (y > 0) f += y < 1 ? powl(y, 1.0 / a) : 1;
    }
    if (f >= budget)
      lo = mid;
    else
      hi = mid;
  }
  for (int64_t i = 0; i < n; i++) {
    const double y = a * s[i] - lo;
    p[i] = y <= 0 ? 0 : y < 1 ? pow(y, 1.0 / a) : 1;
  }
  return lo;
}

double emxi_oracle_loss(const double *s, int64_t n, int32_t kind, double alpha, int64_t target, double *p) {
  if (kind == EMX_MAP_NORMMAX)
    emxi_oracle_normmax(s, n, alpha, p);
  else
    emxi_oracle_entmax(s, n, alpha, p, NULL);
  long double entropy = 0, score = 0;
  for (int64_t i = 0; i < n; i++) {
    if (!(p[i] > 0)) continue;
    score += p[i] * ((long double)s[i] - s[target]);
    if (alpha == 1)
      entropy -= p[i] * logl(p[i]);
    else if (kind == EMX_MAP_NORMMAX)
      entropy += powl(p[i], alpha);
    else
      entropy += (p[i] - powl(p[i], alpha)) / (alpha * (alpha - 1));
  }
  if (kind == EMX_MAP_NORMMAX) entropy = 1 - powl(entropy, 1 / alpha);
  return (double)(entropy + score);
}

void emxi_oracle_backward(const double *p, const double *g, int64_t n, int32_t kind, double alpha, double *dx) {
  long double su = 0, sug = 0, spg = 0, norm = 0;
  for (int64_t i = 0; i < n; i++) {
    if (!(p[i] > 0) || (kind == EMX_MAP_BUDGET && p[i] >= 1)) continue;
    const long double u = powl(p[i], 2 - alpha);
    su += u;
    sug += u * g[i];
    spg += (long double)p[i] * g[i];
    norm += powl(p[i], alpha);
  }
  const long double scale = alpha > 1 ? powl(norm, (alpha - 1) / alpha) / (alpha - 1) : 0;
  for (int64_t i = 0; i < n; i++) {
    dx[i] = 0;
    if (!(p[i] > 0) || (kind == EMX_MAP_BUDGET && p[i] >= 1)) continue;
    const long double u = powl(p[i], 2 - alpha);
    dx[i] = kind == EMX_MAP_NORMMAX ? (double)(scale * (u * (g[i] - spg) - p[i] * (sug - su * spg)))
                                    : (double)(u * (g[i] - sug / su));
  }
}
