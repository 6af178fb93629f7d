/* SPDX-License-Identifier: Apache-2.0
 * Public entries of the row mapping: validation, then the back end. */
#include "entmax.h"

#include "base/backend.h"

void emx_entmax_desc_init_sized(emx_entmax_desc *desc, size_t size) {
  const emx_entmax_desc defaults = {.alpha = 1.5};
  emxi_struct_init(desc, size, &defaults, sizeof defaults);
}

void emx_entmax_io_init_sized(emx_entmax_io *io, size_t size) {
  const emx_entmax_io defaults = {0};
  emxi_struct_init(io, size, &defaults, sizeof defaults);
}

static emx_status check_rows(emx_ctx *ctx, const emx_tensor *t, const emx_tensor *like, const char *who, const char *name) {
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

/* Empty rows may have no data at all, and NULL takes no offset: they all start at one place that is never read. */
static char nothing;
static void *row_data(const emx_tensor *t) { return t->shape[1] ? t->data : &nothing; }
static int64_t row_stride(const emx_tensor *t) { return t->shape[1] ? t->stride[0] : 0; }

static emx_status check(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_entmax_io *io, const char *who) {
  if (!ctx) return emxi_fail(EMX_ERR_INVALID, "%s: ctx is NULL", who);
  EMXI_CHECK_STRUCT(desc, emx_entmax_desc);
  EMXI_CHECK_STRUCT(io, emx_entmax_io);
  if (desc->kind != EMX_MAP_ENTMAX)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: map kind %d; this version has EMX_MAP_ENTMAX", who, desc->kind);
  return emxi_alpha_check(desc->alpha, who);
}

static emx_status forward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_entmax_io *io) {
  static const char who[] = "emx_entmax_forward";
  const emx_tensor *x = io->x, *p = io->p, *tau = io->tau, *support = io->support;
  EMX_TRY(check_rows(ctx, x, NULL, who, "x"));
  EMX_TRY(check_rows(ctx, p, x, who, "p"));
  emxi_rows r = {.alpha = desc->alpha,
                 .rows = x->shape[0],
                 .n = x->shape[1],
                 .dtype = x->dtype,
                 .x = row_data(x),
                 .p = row_data(p),
                 .ldx = row_stride(x),
                 .ldp = row_stride(p)};
  if (tau) {
    EMX_TRY(emxi_tensor_expect(ctx, tau, 1, x->shape, who, "tau"));
    if (tau->dtype != EMX_F32 && tau->dtype != EMX_F64) return emxi_fail(EMX_ERR_DTYPE, "%s: tau must be f32 or f64", who);
    r.tau = tau->data;
    r.tau_dtype = tau->dtype;
    r.inc_tau = 1;
  }
  if (support) {
    EMX_TRY(emxi_tensor_expect(ctx, support, 1, x->shape, who, "support"));
    if (support->dtype != EMX_I32) return emxi_fail(EMX_ERR_DTYPE, "%s: support must be i32", who);
    r.support = support->data;
    r.inc_support = 1;
  }
  return ctx->backend->entmax_forward(ctx, &r);
}

emx_status emx_entmax_forward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_entmax_io *io) {
  EMX_TRY(check(ctx, desc, io, "emx_entmax_forward"));
  EMXI_LOCKED(ctx, forward(ctx, desc, io));
}

static emx_status backward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_entmax_io *io) {
  static const char who[] = "emx_entmax_backward";
  const emx_tensor *p = io->p, *dp = io->dp, *dx = io->dx;
  EMX_TRY(check_rows(ctx, p, NULL, who, "p"));
  EMX_TRY(check_rows(ctx, dp, p, who, "dp"));
  EMX_TRY(check_rows(ctx, dx, p, who, "dx"));
  emxi_rows r = {.alpha = desc->alpha,
                 .rows = p->shape[0],
                 .n = p->shape[1],
                 .dtype = p->dtype,
                 .x = row_data(dp),
                 .p_in = row_data(p),
                 .p = row_data(dx),
                 .ldx = row_stride(dp),
                 .ldp_in = row_stride(p),
                 .ldp = row_stride(dx)};
  return ctx->backend->entmax_backward(ctx, &r);
}

emx_status emx_entmax_backward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_entmax_io *io) {
  EMX_TRY(check(ctx, desc, io, "emx_entmax_backward"));
  if (desc->alpha != 1.0 && desc->alpha != 1.5 && desc->alpha != 2.0)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "emx_entmax_backward: alpha is %g; this version has 1, 1.5 and 2", desc->alpha);
  EMXI_LOCKED(ctx, backward(ctx, desc, io));
}
