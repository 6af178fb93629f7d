/* SPDX-License-Identifier: Apache-2.0
 * theta, which multiplies queries (docs/math.md, "Scale and positions"): formulas in double, shared by C and CUDA. */
#ifndef EMXI_THETA_H
#define EMXI_THETA_H

#include "entmax/solve.h"

#include <emx_model.h>

/* What depends on the position alone, which the heads of a row share. */
typedef struct emxi_place {
  double l, log_l; /* ln(i + 2) and its logarithm */
} emxi_place;
EMX_HD emxi_place emxi_place_of(int32_t type, int64_t i) {
  emxi_place p = {0, 0};
  if (type != EMX_ATTN_SCALE_FOCAL) p.l = log((double)i + 2);
  if (type == EMX_ATTN_SCALE_ASENTMAX) p.log_l = log(p.l);
  return p;
}

/* theta, and its derivatives to b and c. ASEntmax: b and c, SSMax: b is s, focal: b is the logarithm of the temperature.
 * derivative: NULL where it is not needed. */
EMX_HD double emxi_theta_at(int32_t type, double b, double c, emxi_place p, double *derivative) {
  double theta;
  if (type == EMX_ATTN_SCALE_ASENTMAX) {
    const double small = exp(-fabs(b)), beta = (b > 0 ? b : 0) + log1p(small), t = tanh(c), power = exp(2 * t * p.log_l);
    theta = 1 + beta * power;
    if (derivative) {
      derivative[0] = (b > 0 ? 1 : small) / (1 + small) * power;
      derivative[1] = beta * power * p.log_l * 2 * (1 - t * t);
    }
  } else if (type == EMX_ATTN_SCALE_SSMAX) {
    theta = b * p.l;
    if (derivative) derivative[0] = p.l, derivative[1] = 0;
  } else {
    theta = exp(-b);
    if (derivative) derivative[0] = -theta, derivative[1] = 0;
  }
  return theta;
}

#endif
