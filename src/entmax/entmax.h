/* SPDX-License-Identifier: Apache-2.0
 * Resolved arguments of the row mapping and its losses, and the float64 oracles. */
#ifndef EMXI_ENTMAX_H
#define EMXI_ENTMAX_H

#include "base/base.h"

#include <math.h>

/* Rows are [rows,n] with a pitch; one value a row is contiguous. */
typedef struct emxi_rows {
  int32_t kind; /* EMX_MAP_* */
  double alpha, budget;
  const void *alphas; /* [rows], optional: instead of alpha */
  int32_t alphas_dtype;
  const void *budgets; /* [rows], optional: instead of budget */
  int32_t budgets_dtype;
  int64_t rows, n;
  int32_t dtype; /* of x, p, dp, dx */
  const void *x; /* forward, loss: scores; backward: dp */
  const void *p_in;
  void *p; /* forward: weights; backward, loss: dx */
  int64_t ldx, ldp_in, ldp;
  void *tau; /* optional */
  int32_t tau_dtype;
  int32_t *support; /* optional */
  void *d_alpha;    /* optional */
  int32_t d_alpha_dtype;
  /* losses; support counts here too */
  void *loss; /* [rows]; NULL: no loss is asked for */
  int32_t loss_dtype;
  const int32_t *target; /* [rows], each in 0..n-1 or ignore_index; on a GPU nobody has looked, nor at alphas and budgets */
  int32_t ignore_index;
  const void *d_loss; /* one value (inc 0) or [rows] (inc 1), optional */
  int32_t d_loss_dtype;
  int64_t inc_d_loss;
  bool mean;    /* of the rows that count: a GPU counts them itself, on the CPU `scale` is one over their number */
  double scale; /* of all gradients, and of the sum in total */
  void *total;  /* one value, optional */
  int32_t total_dtype;
} emxi_rows;

/* The largest alpha of normmax: its weights are then equal but for those of scores within a thousandth of the threshold. */
#define EMXI_NORMMAX_ALPHA 1000.0

/* Weights under this one are noise of the threshold's rounding: y = p^(alpha-1) is under the spacing of doubles at 1. */
static inline double emxi_weight_floor(double alpha) { return alpha > 1 ? exp2(-52.0 / (alpha - 1.0)) : 0; }

/* Float64 oracle: bisection on [m-1, m] in x = (alpha-1) s until the interval collapses, then the closed form (alpha 1.5, 2) on
 * the support found; alpha = 1 is softmax. Any alpha in [1, 4]. p[n] optional; returns tau (alpha = 1: NaN), the support in
 * *support. */
double emxi_oracle_entmax(const double *s, int64_t n, double alpha, double *p, int64_t *support);
/* The others by bisection alone; at least one finite score, no NaN or +inf, and for the budget at least that many finite ones. */
double emxi_oracle_normmax(const double *s, int64_t n, double alpha, double *p);
double emxi_oracle_budget(const double *s, int64_t n, double alpha, double budget, double *p);
/* Fenchel-Young loss by its definition, H(p) + p.(s - s_target); p[n] is the map. */
double emxi_oracle_loss(const double *s, int64_t n, int32_t kind, double alpha, int64_t target, double *p);
/* J^T g by the formulas of emx.h over the whole row, in long double. */
void emxi_oracle_backward(const double *p, const double *g, int64_t n, int32_t kind, double alpha, double *dx);

/* Checks that the entries share. One value a row, f32 or f64: t may be NULL, then nothing is set. */
emx_status emxi_rows_check(emx_ctx *ctx, const emx_tensor *t, const emx_tensor *like, const char *who, const char *name);
emx_status emxi_rows_values(emx_ctx *ctx, const emx_tensor *t, int64_t n, const char *who, const char *name, void **data,
                            int32_t *dtype);
emx_status emxi_rows_support(emx_ctx *ctx, const emx_tensor *t, emxi_rows *r, const char *who);
emx_status emxi_map_check(emx_ctx *ctx, const emx_entmax_desc *desc, const char *who);
/* Empty rows may have no data at all, and NULL takes no offset: they all start at one place that is never read. */
void *emxi_rows_data(const emx_tensor *t);
int64_t emxi_rows_stride(const emx_tensor *t);

#endif
