/* SPDX-License-Identifier: Apache-2.0
 * emx_decode: append, run, and take the append back if the run did not finish. */
#include "kv/kv.h"

static emx_status workspace_size(emx_ctx *ctx, const emx_kv *kv, const emx_select_desc *select, const emx_decode_io *io,
                                 int64_t max_len, size_t *bytes) {
  static const char who[] = "emx_decode_workspace_size";
  emxi_decode d;
  size_t need = 0;
  if (max_len < 0 || max_len > EMXI_KV_MAX_LEN)
    return emxi_fail(EMX_ERR_INVALID, "%s: max_len is %lld, expected 0..%lld", who, (long long)max_len,
                     (long long)EMXI_KV_MAX_LEN);
  EMX_TRY(emxi_decode_shape(ctx, kv, select, io, who, &d));
  d.max_len = max_len;
  EMX_TRY(emxi_decode_workspace(ctx, &d, &need));
  *bytes = need;
  return EMX_OK;
}

emx_status emx_decode_workspace_size(emx_ctx *ctx, const emx_kv *kv, const emx_select_desc *select, const emx_decode_io *io,
                                     int64_t max_len, size_t *bytes) {
  if (!ctx || !kv || !bytes)
    return emxi_fail(EMX_ERR_INVALID, "emx_decode_workspace_size: %s is NULL", !ctx ? "ctx" : !kv ? "kv" : "bytes");
  EMXI_READ_STRUCT(select, emx_select_desc);
  EMXI_READ_STRUCT(io, emx_decode_io);
  EMXI_LOCKED(ctx, workspace_size(ctx, kv, select, io, max_len, bytes));
}

static emx_status decode(emx_ctx *ctx, emx_kv *kv, const emx_kv_batch *batch, const emx_select_desc *select,
                         const emx_decode_io *io, void *workspace, size_t workspace_bytes) {
  static const char who[] = "emx_decode";
  emxi_decode d;
  emxi_arena arena;
  int32_t added = 0;
  EMX_TRY(emxi_decode_resolve(ctx, kv, select, io, false, who, &d));
  if (!io->k_new != !io->v_new) return emxi_fail(EMX_ERR_INVALID, "%s: k_new and v_new go together", who);
  if (io->k_new) {
    EMX_TRY(emxi_kv_check_new(ctx, kv, d.B, io->k_new, io->v_new, io->layout, who, &added));
    if (added != d.S) return emxi_fail(EMX_ERR_SHAPE, "%s: k_new holds %d tokens per sequence, q %d", who, added, d.S);
  }
  EMX_TRY(emxi_decode_bind(&d, batch, added, who));
  EMX_TRY(emxi_decode_arena(ctx, &d, workspace, workspace_bytes, who, &arena));
  const int32_t mapped = kv->sketch.mapped;
  if (io->k_new) EMX_TRY(emxi_kv_append(ctx, kv, batch, io->k_new, io->v_new, NULL, io->layout, who));
  d.added = added;
  emx_status status = ctx->backend->decode_run(ctx, &d, &arena);
  if (status && io->k_new && batch->seqs) {
    for (int32_t b = 0; b < d.B; b++) emxi_kv_truncate(kv, batch->seqs[b], kv->seqs[batch->seqs[b]].length - added);
    kv->sketch.mapped = mapped;
  }
  return status;
}

emx_status emx_decode(emx_ctx *ctx, emx_kv *kv, const emx_kv_batch *batch, const emx_select_desc *select, const emx_decode_io *io,
                      void *workspace, size_t workspace_bytes) {
  if (!ctx || !kv) return emxi_fail(EMX_ERR_INVALID, "emx_decode: %s is NULL", ctx ? "kv" : "ctx");
  EMXI_READ_STRUCT(batch, emx_kv_batch);
  EMXI_READ_STRUCT(select, emx_select_desc);
  EMXI_READ_STRUCT(io, emx_decode_io);
  EMXI_LOCKED(ctx, decode(ctx, kv, batch, select, io, workspace, workspace_bytes));
}
