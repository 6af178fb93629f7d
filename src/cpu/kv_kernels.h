/* SPDX-License-Identifier: Apache-2.0
 * Kernels over page summaries, one constant table per ISA (body_kv.inc). D elements a row; float arithmetic. */
#ifndef EMXI_KV_KERNELS_H
#define EMXI_KV_KERNELS_H

#include "cpu/table.h"

typedef struct emxi_kv_kernels {
  /* The n-th token x enters the running minimum, maximum, mean and sum of squared deviations (Welford), inv_n = 1/n. Start from
   * +inf, -inf, 0, 0. Element-wise, with the same roundings in every table: bits do not depend on the ISA, nor on whether the
   * state went through memory between two tokens. Returns whether x holds a NaN or an infinity. */
  bool (*fold)(const float *x, int d, float inv_n, float *lo, float *hi, float *mean, float *m2);
  /* sum_d (x[d] - mean[d])^2 */
  float (*distance2)(const float *x, const float *mean, int d);
  /* By slot of lo and hi: u[h] = sum_d max(q lo, q hi), a[h] = sum_d |q| max(|lo|, |hi|), for nq rows of q. */
  void (*box[EMXI_SLOTS])(const float *q, int64_t ldq, int nq, const void *lo, const void *hi, int d, float *u, float *a);
  /* mu[h] = sum_d q mean, var[h] = sum_d q^2 m2, a[h] = sum_d |q| |mean|. */
  void (*moments)(const float *q, int64_t ldq, int nq, const float *mean, const float *m2, int d, float *mu, float *var,
                  float *a);
  /* s[j] += slope * (first + j); |first + j| < 2^24. */
  void (*bias)(float *s, int64_t n, float slope, float first);
} emxi_kv_kernels;

#endif
