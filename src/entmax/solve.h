/* SPDX-License-Identifier: Apache-2.0
 * The threshold core: step formulas shared by C and CUDA. Derivations: docs/math.md.
 *
 * Rows are given as scores s relative to their maximum m, x = (alpha-1) (s - m) <= 0, and the threshold t = tau - (alpha-1) m, so
 * that -1 <= t <= -n^(1-alpha). Sums over the active set {x > t}:
 *     k = count,  s1 = sum (x-t),  s2 = sum (x-t)^2          (f = s1-1 for alpha 2, s2-1 for alpha 1.5)
 */
#ifndef EMXI_SOLVE_H
#define EMXI_SOLVE_H

#include <math.h>

#ifdef __CUDACC__
#define EMX_HD __host__ __device__ static inline
#else
#define EMX_HD static inline
#endif

typedef struct emxi_sums {
  double k, s1, s2;
} emxi_sums;

/* Exact threshold of the present active set, alpha = 2: s1 - k e = 1. */
EMX_HD double emxi_step_sparsemax(emxi_sums s) { return (s.s1 - 1.0) / s.k; }

/* Exact threshold of the present active set, alpha = 1.5: the smaller root of k e^2 - 2 s1 e + (s2 - 1) = 0, in the form that
 * does not cancel. From t <= t* it lands at or above t*, from above at or below. A negative discriminant (no root: the set is too
 * wide) takes the Newton step, which from the left stays left of t* because f is convex. */
EMX_HD double emxi_step_entmax15(emxi_sums s) {
  double f = s.s2 - 1.0, d = s.s1 * s.s1 - s.k * f;
  return d >= 0 ? f / (s.s1 + sqrt(d)) : f / (2.0 * s.s1);
}

/* Newton for any alpha, f = sum y^b - 1, g = sum y^(b-1), b = 1/(alpha-1): monotone from the left for alpha <= 2. */
EMX_HD double emxi_step_newton(double f, double g, double b) { return f / (b * g); }

/* Upper end of the bracket: t <= -n^(1-alpha), with equality when all n are equal. */
EMX_HD double emxi_bracket_hi(double n, double alpha) { return -pow(n, 1.0 - alpha); }

/* y^b for y >= 0: multiplication where b is a small integer (alpha = 2, 3/2, 4/3, 5/4), else pow. */
EMX_HD double emxi_power(double y, double b, int ib) {
  switch (ib) {
    case 0: return pow(y, b);
    case 1: return y;
    case 2: return y * y;
    case 3: return y * y * y;
    default: return (y * y) * (y * y);
  }
}
/* The integer that b is, 1..4, or 0. */
EMX_HD int emxi_power_kind(double b) {
  int i = (int)(b + 0.5);
  return i >= 1 && i <= 4 && fabs(b - i) < 1e-12 ? i : 0;
}

#endif
