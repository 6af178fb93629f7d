/* SPDX-License-Identifier: Apache-2.0
 * Resolved arguments of the row mapping, and the float64 oracle. */
#ifndef EMXI_ENTMAX_H
#define EMXI_ENTMAX_H

#include "base/base.h"

typedef struct emxi_rows {
  double alpha;
  int64_t rows, n;
  int32_t dtype; /* of x, p, dp, dx */
  const void *x; /* forward: scores; backward: dp */
  const void *p_in;
  void *p;       /* forward: weights; backward: dx */
  int64_t ldx, ldp_in, ldp;
  void *tau; /* optional */
  int32_t tau_dtype;
  int64_t inc_tau;
  int32_t *support; /* optional */
  int64_t inc_support;
} emxi_rows;

/* Float64 oracle: bisection on [m-1, m] in x = (alpha-1) s until the interval collapses, then the closed form (alpha 1.5, 2) on the
 * support found; alpha = 1 is softmax. Any alpha in [1, 4]. p[n] optional; returns tau (alpha = 1: NaN), the support in *support. */
double emxi_oracle_entmax(const double *s, int64_t n, double alpha, double *p, int64_t *support);

#endif
