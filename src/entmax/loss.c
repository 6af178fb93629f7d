/* SPDX-License-Identifier: Apache-2.0
 * Public entry of the Fenchel-Young losses: validation, then the back end. */
#include "entmax.h"

#include "base/backend.h"

void emx_loss_io_init_sized(emx_loss_io *io, size_t size) {
  const emx_loss_io defaults = {.ignore_index = -100};
  emxi_struct_init(io, size, &defaults, sizeof defaults);
}

/* Every target is looked at before anything is written; how many rows count. (On a GPU the back end does both.) */
static emx_status check_targets(emx_ctx *ctx, const emx_loss_io *io, emxi_rows *r, const char *who, int64_t *counted) {
  EMX_TRY(emxi_tensor_expect(ctx, io->target, 1, &r->rows, who, "target"));
  if (io->target->dtype != EMX_I32)
    return emxi_fail(EMX_ERR_DTYPE, "%s: target is %s, expected i32", who, emx_dtype_name(io->target->dtype));
  r->target = io->target->data;
  for (int64_t i = 0; ctx->device == EMX_DEVICE_CPU && i < r->rows; i++) {
    const int32_t y = r->target[i];
    if (y == r->ignore_index) continue;
    if (y < 0 || y >= r->n)
      return emxi_fail(EMX_ERR_INVALID, "%s: target of row %lld is %d, expected 0 to %lld or ignore_index %d", who, (long long)i,
                       y, (long long)r->n - 1, r->ignore_index);
    ++*counted;
  }
  return EMX_OK;
}

static emx_status loss(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_loss_io *io) {
  static const char who[] = "emx_entmax_loss";
  const emx_tensor *x = io->x, *dx = io->dx;
  EMX_TRY(emxi_rows_check(ctx, x, NULL, who, "x"));
  if (dx) EMX_TRY(emxi_rows_check(ctx, dx, x, who, "dx"));
  emxi_rows r = {.kind = desc->kind,
                 .alpha = desc->alpha,
                 .rows = x->shape[0],
                 .n = x->shape[1],
                 .dtype = x->dtype,
                 .x = emxi_rows_data(x),
                 .p = dx ? emxi_rows_data(dx) : NULL,
                 .ldx = emxi_rows_stride(x),
                 .ldp = dx ? emxi_rows_stride(dx) : 0,
                 .ignore_index = io->ignore_index,
                 .scale = 1};
  if (!io->loss) return emxi_fail(EMX_ERR_INVALID, "%s: loss is NULL", who);
  EMX_TRY(emxi_rows_values(ctx, io->loss, r.rows, who, "loss", &r.loss, &r.loss_dtype));
  const bool reduced = io->reduction != EMX_REDUCE_NONE;
  if (reduced && io->reduction != EMX_REDUCE_SUM && io->reduction != EMX_REDUCE_MEAN)
    return emxi_fail(EMX_ERR_INVALID, "%s: reduction %d; there are EMX_REDUCE_NONE, _SUM and _MEAN", who, io->reduction);
  if (io->total && !reduced) return emxi_fail(EMX_ERR_INVALID, "%s: total needs a reduction, EMX_REDUCE_SUM or _MEAN", who);
  EMX_TRY(emxi_rows_values(ctx, io->total, 1, who, "total", &r.total, &r.total_dtype));
  void *d_loss = NULL;
  EMX_TRY(emxi_rows_values(ctx, io->d_loss, reduced ? 1 : r.rows, who, "d_loss", &d_loss, &r.d_loss_dtype));
  r.d_loss = d_loss;
  r.inc_d_loss = !reduced;
  EMX_TRY(emxi_rows_support(ctx, io->support, &r, who));
  int64_t counted = 0;
  EMX_TRY(check_targets(ctx, io, &r, who, &counted));
  r.mean = io->reduction == EMX_REDUCE_MEAN;
  if (r.mean) r.scale = 1.0 / (double)counted;
  return ctx->backend->entmax_loss(ctx, &r);
}

emx_status emx_entmax_loss(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_loss_io *io) {
  static const char who[] = "emx_entmax_loss";
  EMXI_READ_STRUCT(desc, emx_entmax_desc);
  EMXI_READ_STRUCT(io, emx_loss_io);
  EMX_TRY(emxi_map_check(ctx, desc, who));
  if (desc->kind == EMX_MAP_BUDGET)
    return emxi_fail(EMX_ERR_UNSUPPORTED,
                     "%s: a target is one class, a budget is several; EMX_MAP_ENTMAX and _NORMMAX have a loss", who);
  EMXI_LOCKED(ctx, loss(ctx, desc, io));
}
