/* SPDX-License-Identifier: Apache-2.0
 * Threshold of alpha-entmax over normally distributed scores (EntmaxKV, section 3.3 and eq. 19), in double. */
#ifndef EMXI_GAUSSIAN_H
#define EMXI_GAUSSIAN_H

#include <stdint.h>

/* *value = E[(t+Z)_+^b], *below = E[(t+Z)_+^(b-1)] for a standard normal Z, b > 0; b = 1: below = P(Z > -t). Never negative.
 * b = 1, 2, 3 (alpha = 2, 3/2, 4/3) in closed form: the recurrence I_k = t I_(k-1) + (k-1) I_(k-2), run backward for t < -2 where
 * the forward one cancels. Other b by the trapezoidal rule in log(t+z). Relative error below 1e-7. */
void emxi_gauss_moments(double b, double t, double *value, double *below);

/* tau with sum_i n E[((alpha-1) X_i - tau)_+^(1/(alpha-1))] = 1, X_i ~ N(mu[i], sigma[i]^2), sigma >= 0, count >= 1, 1 < alpha.
 * The left end of the bracket is Jensen's max_i (alpha-1) mu[i] - n^(1-alpha), valid at any spread including zero. */
double emxi_gauss_tau(double alpha, double n, const float *mu, const float *sigma, int64_t count);

/* z with P(max of n standard normals <= z) = q, 0 < q < 1. */
double emxi_gauss_max_quantile(double q, int32_t n);

#endif
