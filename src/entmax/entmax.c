/* SPDX-License-Identifier: Apache-2.0
 * Public entries of the row mapping: validation, then the back end. */
#include "entmax.h"

#include "base/backend.h"
#include "base/num.h"

void emx_entmax_desc_init_sized(emx_entmax_desc *desc, size_t size) {
  const emx_entmax_desc defaults = {.alpha = 1.5, .budget = 1};
  emxi_struct_init(desc, size, &defaults, sizeof defaults);
}

void emx_entmax_io_init_sized(emx_entmax_io *io, size_t size) {
  const emx_entmax_io defaults = {0};
  emxi_struct_init(io, size, &defaults, sizeof defaults);
}

emx_status emxi_rows_check(emx_ctx *ctx, const emx_tensor *t, const emx_tensor *like, const char *who, const char *name) {
  if (like) {
    EMX_TRY(emxi_tensor_expect(ctx, t, 2, like->shape, who, name));
    if (t->dtype != like->dtype)
      return emxi_fail(EMX_ERR_DTYPE, "%s: %s is %s, expected %s", who, name, emx_dtype_name(t->dtype),
                       emx_dtype_name(like->dtype));
  } else {
    EMX_TRY(emxi_tensor_check(ctx, t, 2, who, name));
  }
  if (!emxi_is_float(t->dtype))
    return emxi_fail(EMX_ERR_DTYPE, "%s: %s is %s, expected f32, f16, bf16 or f64", who, name, emx_dtype_name(t->dtype));
  if (t->shape[1] > INT32_MAX - 64)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: rows of %s have more than 2^31 elements", who, name);
  return EMX_OK;
}

static char nothing;
void *emxi_rows_data(const emx_tensor *t) { return t->shape[1] ? t->data : &nothing; }
int64_t emxi_rows_stride(const emx_tensor *t) { return t->shape[1] ? t->stride[0] : 0; }

emx_status emxi_rows_values(emx_ctx *ctx, const emx_tensor *t, int64_t rows, const char *who, const char *name, void **data,
                            int32_t *dtype) {
  if (!t) return EMX_OK;
  EMX_TRY(emxi_tensor_expect(ctx, t, 1, &rows, who, name));
  if (t->dtype != EMX_F32 && t->dtype != EMX_F64) return emxi_fail(EMX_ERR_DTYPE, "%s: %s must be f32 or f64", who, name);
  *dtype = t->dtype;
  *data = t->data;
  return EMX_OK;
}

emx_status emxi_rows_support(emx_ctx *ctx, const emx_tensor *t, emxi_rows *r, const char *who) {
  if (!t) return EMX_OK;
  EMX_TRY(emxi_tensor_expect(ctx, t, 1, &r->rows, who, "support"));
  if (t->dtype != EMX_I32) return emxi_fail(EMX_ERR_DTYPE, "%s: support must be i32", who);
  r->support = t->data;
  return EMX_OK;
}

static const char *const alphas_of[] = {"1 or 1.000001 to 4", "1.000001 to 1000", "1.000001 to 4"};
static bool alpha_fits(int32_t kind, double alpha) {
  if (alpha == 1) return kind == EMX_MAP_ENTMAX;
  return alpha >= 1 + 1e-6 && alpha <= (kind == EMX_MAP_NORMMAX ? EMXI_NORMMAX_ALPHA : 4);
}

emx_status emxi_map_check(emx_ctx *ctx, const emx_entmax_desc *desc, const char *who) {
  if (!ctx) return emxi_fail(EMX_ERR_INVALID, "%s: ctx is NULL", who);
  static const char *const names[] = {"", "normmax", "budget"};
  if (desc->kind < EMX_MAP_ENTMAX || desc->kind > EMX_MAP_BUDGET)
    return emxi_fail(EMX_ERR_INVALID, "%s: map kind %d; there are EMX_MAP_ENTMAX, _NORMMAX and _BUDGET", who, desc->kind);
  if (desc->kind == EMX_MAP_BUDGET && !(desc->budget > 0 && desc->budget < INFINITY))
    return emxi_fail(EMX_ERR_INVALID, "%s: budget is %g, expected a positive number", who, desc->budget);
  if (desc->kind != EMX_MAP_ENTMAX && desc->alpha == 1)
    return emxi_fail(EMX_ERR_INVALID, "%s: %s needs alpha above 1, at least 1.000001", who, names[desc->kind]);
  if (!alpha_fits(desc->kind, desc->alpha))
    return emxi_fail(EMX_ERR_INVALID, "%s: alpha is %.9g, expected %s", who, desc->alpha, alphas_of[desc->kind]);
  return EMX_OK;
}

/* One alpha a row: every one of them is looked at before any output is written. (In device memory the back end looks.) */
static emx_status check_alphas(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_tensor *t, emxi_rows *r, const char *who) {
  void *alphas = NULL;
  EMX_TRY(emxi_rows_values(ctx, t, r->rows, who, "alpha", &alphas, &r->alphas_dtype));
  r->alphas = alphas;
  for (int64_t i = 0; r->alphas && ctx->device == EMX_DEVICE_CPU && i < r->rows; i++) {
    const double alpha = emxi_load(r->alphas, r->alphas_dtype, i);
    if (!alpha_fits(desc->kind, alpha))
      return emxi_fail(EMX_ERR_INVALID, "%s: alpha of row %lld is %.9g, expected %s", who, (long long)i, alpha,
                       alphas_of[desc->kind]);
  }
  return EMX_OK;
}

/* The same of budgets, which mean nothing where rows are empty. */
static emx_status check_budgets(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_tensor *t, emxi_rows *r, const char *who) {
  if (t && desc->kind != EMX_MAP_BUDGET) return emxi_fail(EMX_ERR_INVALID, "%s: budget is for EMX_MAP_BUDGET", who);
  void *budgets = NULL;
  EMX_TRY(emxi_rows_values(ctx, t, r->rows, who, "budget", &budgets, &r->budgets_dtype));
  r->budgets = budgets;
  for (int64_t i = 0; r->budgets && ctx->device == EMX_DEVICE_CPU && i < r->rows; i++) {
    const double budget = emxi_load(r->budgets, r->budgets_dtype, i);
    if (!(budget > 0 && budget < INFINITY) || (r->n && budget > (double)r->n))
      return emxi_fail(EMX_ERR_INVALID, "%s: budget of row %lld is %.9g, expected above 0 and at most %lld", who, (long long)i,
                       budget, (long long)r->n);
  }
  if (desc->kind == EMX_MAP_BUDGET && !r->budgets && r->n && desc->budget > (double)r->n)
    return emxi_fail(EMX_ERR_INVALID, "%s: budget is %g, rows have %lld scores of weight at most 1", who, desc->budget,
                     (long long)r->n);
  return EMX_OK;
}

static emx_status forward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_entmax_io *io) {
  static const char who[] = "emx_entmax_forward";
  const emx_tensor *x = io->x, *p = io->p;
  EMX_TRY(emxi_rows_check(ctx, x, NULL, who, "x"));
  EMX_TRY(emxi_rows_check(ctx, p, x, who, "p"));
  emxi_rows r = {.kind = desc->kind,
                 .alpha = desc->alpha,
                 .budget = desc->budget,
                 .rows = x->shape[0],
                 .n = x->shape[1],
                 .dtype = x->dtype,
                 .x = emxi_rows_data(x),
                 .p = emxi_rows_data(p),
                 .ldx = emxi_rows_stride(x),
                 .ldp = emxi_rows_stride(p)};
  EMX_TRY(check_alphas(ctx, desc, io->alpha, &r, who));
  EMX_TRY(check_budgets(ctx, desc, io->budget, &r, who));
  EMX_TRY(emxi_rows_values(ctx, io->tau, r.rows, who, "tau", &r.tau, &r.tau_dtype));
  EMX_TRY(emxi_rows_support(ctx, io->support, &r, who));
  return ctx->backend->entmax_forward(ctx, &r);
}

emx_status emx_entmax_forward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_entmax_io *io) {
  EMXI_READ_STRUCT(desc, emx_entmax_desc);
  EMXI_READ_STRUCT(io, emx_entmax_io);
  EMX_TRY(emxi_map_check(ctx, desc, "emx_entmax_forward"));
  EMXI_LOCKED(ctx, forward(ctx, desc, io));
}

static emx_status backward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_entmax_io *io) {
  static const char who[] = "emx_entmax_backward";
  const emx_tensor *p = io->p, *dp = io->dp, *dx = io->dx;
  EMX_TRY(emxi_rows_check(ctx, p, NULL, who, "p"));
  EMX_TRY(emxi_rows_check(ctx, dp, p, who, "dp"));
  EMX_TRY(emxi_rows_check(ctx, dx, p, who, "dx"));
  emxi_rows r = {.kind = desc->kind,
                 .alpha = desc->alpha,
                 .budget = desc->budget,
                 .rows = p->shape[0],
                 .n = p->shape[1],
                 .dtype = p->dtype,
                 .x = emxi_rows_data(dp),
                 .p_in = emxi_rows_data(p),
                 .p = emxi_rows_data(dx),
                 .ldx = emxi_rows_stride(dp),
                 .ldp_in = emxi_rows_stride(p),
                 .ldp = emxi_rows_stride(dx)};
  EMX_TRY(check_alphas(ctx, desc, io->alpha, &r, who));
  EMX_TRY(emxi_rows_values(ctx, io->d_alpha, r.rows, who, "d_alpha", &r.d_alpha, &r.d_alpha_dtype));
  if (r.d_alpha && r.kind != EMX_MAP_ENTMAX)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: d_alpha is there for EMX_MAP_ENTMAX", who);
  return ctx->backend->entmax_backward(ctx, &r);
}

emx_status emx_entmax_backward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_entmax_io *io) {
  EMXI_READ_STRUCT(desc, emx_entmax_desc);
  EMXI_READ_STRUCT(io, emx_entmax_io);
  EMX_TRY(emxi_map_check(ctx, desc, "emx_entmax_backward"));
  EMXI_LOCKED(ctx, backward(ctx, desc, io));
}
