/* SPDX-License-Identifier: Apache-2.0
 * How rows of the mapping are cut up for the device. The cut depends on the row's length, the dtype and the device: a row's result is the
 * same in any batch. */
#include "cuda/map.h"

#include "cuda/backend_cuda.h"
#include "entmax/entmax.h"

enum {
  SLICE_BYTES = 65 << 10, /* three such blocks and their lists share a processor of 228 KiB: one solves, others read and write */
  ELEMENTS_MOST = 1 << 30
};

static void cut(emxi_cuda_rows *k, const emxi_cuda *cuda, int64_t es) {
  if (k->n <= (es == 8 ? EMXI_CUDA_WARP_ROW / 2 : EMXI_CUDA_WARP_ROW)) return;
  k->blocks = 1;
  while (cuda->clusters && k->blocks < EMXI_CUDA_ROW_BLOCKS && k->n * es > (int64_t)SLICE_BYTES * k->blocks) k->blocks *= 2;
  const int64_t vector = 16 / es, share = (k->n + k->blocks - 1) / k->blocks;
  k->slice = (share + vector - 1) / vector * vector;
  k->resident = k->slice <= ELEMENTS_MOST / 64 && emxi_cuda_rows_shared(k->slice, (size_t)es) <= (size_t)cuda->shared;
}

emx_status emxi_cuda_entmax_rows(emx_ctx *ctx, const emxi_rows *r, bool backward) {
  const emxi_cuda *cuda = emxi_cuda_of(ctx);
  const char *who = r->loss ? "emx_entmax_loss" : backward ? "emx_entmax_backward" : "emx_entmax_forward";
  emxi_cuda_rows k = {.kind = r->kind,
                      .backward = backward,
                      .alpha = r->alpha,
                      .budget = r->budget,
                      .alphas = r->alphas,
                      .alphas_dtype = r->alphas_dtype,
                      .budgets = r->budgets,
                      .budgets_dtype = r->budgets_dtype,
                      .rows = r->rows,
                      .n = r->n,
                      .x = r->x,
                      .p_in = r->p_in,
                      .p = r->p,
                      .ldx = r->ldx,
                      .ldp_in = r->ldp_in,
                      .ldp = r->ldp,
                      .tau = r->tau,
                      .tau_dtype = r->tau_dtype,
                      .support = r->support,
                      .d_alpha = r->d_alpha,
                      .d_alpha_dtype = r->d_alpha_dtype,
                      .loss = r->loss,
                      .loss_dtype = r->loss_dtype,
                      .target = r->target,
                      .ignore_index = r->ignore_index,
                      .d_loss = r->d_loss,
                      .d_loss_dtype = r->d_loss_dtype,
                      .inc_d_loss = r->inc_d_loss,
                      .mean = r->mean,
                      .total = r->total,
                      .total_dtype = r->total_dtype,
                      .fault = cuda->fault,
                      .claimed = cuda->claimed,
                      .processors = cuda->processors};
  cut(&k, cuda, (int64_t)emx_dtype_size(r->dtype));
  int before;
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  if (k.rows > 0) switch (r->dtype) {
      case EMX_F32: emxi_cuda_rows_f32(&k, ctx->stream); break;
      case EMX_F16: emxi_cuda_rows_f16(&k, ctx->stream); break;
      case EMX_BF16: emxi_cuda_rows_bf16(&k, ctx->stream); break;
      default: emxi_cuda_rows_f64(&k, ctx->stream);
    }
  if (k.total) emxi_cuda_rows_total(&k, ctx->stream);
  return emxi_cuda_leave(before, EMX_OK, true, who);
}
