/* SPDX-License-Identifier: Apache-2.0
 * What emx_select and emx_decode accept: everything is checked and resolved here, before anything is touched. */
#include "kv/kv.h"

#include <math.h>

void emx_select_desc_init_sized(emx_select_desc *desc, size_t size) {
  const emx_select_desc defaults = {.kind = EMX_SELECT_ALL, .max_quantile = 0.995f, .excess_margin = 0.1f};
  emxi_struct_init(desc, size, &defaults, sizeof defaults);
}
void emx_decode_io_init_sized(emx_decode_io *io, size_t size) {
  const emx_decode_io defaults = {.alpha = 1.5};
  emxi_struct_init(io, size, &defaults, sizeof defaults);
}

/* What the selector can do with a head's alpha. */
static emx_status check_alpha(const emx_select_desc *s, double alpha, const char *who) {
  EMX_TRY(emxi_alpha_check(alpha, who));
  if (s->kind == EMX_SELECT_GAUSSIAN && alpha == 1.0)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: GAUSSIAN needs alpha > 1; use TOPK for softmax", who);
  return EMX_OK;
}
static emx_status check_select(const emx_kv *kv, const emx_select_desc *s, const char *who) {
  switch (s->kind) {
    case EMX_SELECT_ALL:
    case EMX_SELECT_PAGES: break;
    case EMX_SELECT_TOPK:
      if (s->budget < 0) return emxi_fail(EMX_ERR_INVALID, "%s: the budget is %lld tokens", who, (long long)s->budget);
      if (!(kv->summaries & EMX_SUMMARY_MINMAX))
        return emxi_fail(EMX_ERR_STATE, "%s: TOPK needs a cache with EMX_SUMMARY_MINMAX", who);
      break;
    case EMX_SELECT_GAUSSIAN:
      if (!(kv->summaries & EMX_SUMMARY_MOMENTS))
        return emxi_fail(EMX_ERR_STATE, "%s: GAUSSIAN needs a cache with EMX_SUMMARY_MOMENTS", who);
      if (!(s->max_quantile > 0 && s->max_quantile < 1))
        return emxi_fail(EMX_ERR_INVALID, "%s: max_quantile is %g, expected 0 < max_quantile < 1", who, s->max_quantile);
      if (!(s->safety_margin >= 0 && s->safety_margin < INFINITY) || !(s->excess_margin >= 0 && s->excess_margin < INFINITY))
        return emxi_fail(EMX_ERR_INVALID, "%s: the margins are %g and %g, expected numbers that are not negative", who,
                         s->safety_margin, s->excess_margin);
      break;
    case EMX_SELECT_CERTIFIED:
      if (!(kv->summaries & EMX_SUMMARY_SKETCH))
        return emxi_fail(EMX_ERR_STATE, "%s: CERTIFIED needs a cache with EMX_SUMMARY_SKETCH", who);
      if (s->max_bytes < 0) return emxi_fail(EMX_ERR_INVALID, "%s: max_bytes is %lld", who, (long long)s->max_bytes);
      if (!(s->max_delta >= 0 && s->max_delta <= 1))
        return emxi_fail(EMX_ERR_INVALID, "%s: max_delta is %g, expected 0 to 1", who, s->max_delta);
      break;
    default: return emxi_fail(EMX_ERR_INVALID, "%s: unknown selector %d", who, s->kind);
  }
  if (s->tau_mode < EMX_TAU_EXACT || s->tau_mode > EMX_TAU_FIXED)
    return emxi_fail(EMX_ERR_INVALID, "%s: unknown tau_mode %d", who, s->tau_mode);
  if (s->tau_mode != EMX_TAU_EXACT && s->kind != EMX_SELECT_GAUSSIAN)
    return emxi_fail(EMX_ERR_INVALID, "%s: only GAUSSIAN estimates a threshold; other selectors take EMX_TAU_EXACT", who);
  if (s->tau_steps < 0) return emxi_fail(EMX_ERR_INVALID, "%s: tau_steps is %d", who, s->tau_steps);
  return EMX_OK;
}

/* [B,H,S] (+ one dimension) of page lists and bounds, always in BHND order. */
static emx_status check_list(const emx_ctx *ctx, const emx_tensor *t, int32_t ndim, int32_t dtype, const emxi_decode *d,
                             const char *who, const char *name) {
  int64_t shape[4] = {d->B, d->H, d->S, ndim == 4 && t && t->ndim == 4 ? t->shape[3] : 0};
  EMX_TRY(emxi_tensor_expect(ctx, t, ndim, shape, who, name));
  if (t->dtype != dtype)
    return emxi_fail(EMX_ERR_DTYPE, "%s: %s is %s, expected %s", who, name, emx_dtype_name(t->dtype), emx_dtype_name(dtype));
  return EMX_OK;
}

emx_status emxi_decode_shape(emx_ctx *ctx, const emx_kv *kv, const emx_select_desc *select, const emx_decode_io *io,
                             const char *who, emxi_decode *out) {
  if (kv->ctx != ctx) return emxi_fail(EMX_ERR_INVALID, "%s: the cache was made from another context", who);
  if (io->layout != EMX_LAYOUT_BHND && io->layout != EMX_LAYOUT_BNHD)
    return emxi_fail(EMX_ERR_INVALID, "%s: unknown layout %d", who, io->layout);
  if (!io->alphas) EMX_TRY(check_alpha(select, io->alpha, who));
  if (!isfinite(io->scale)) return emxi_fail(EMX_ERR_INVALID, "%s: scale is %g", who, io->scale);
  EMX_TRY(check_select(kv, select, who));
  if (ctx->device != EMX_DEVICE_CPU && (io->support_index || io->support_weight || io->support_count))
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: supports are listed on the CPU; on a GPU reports have their sizes", who);
  EMX_TRY(emxi_tensor_check(ctx, io->q, 4, who, "q"));
  const emx_tensor *q = io->q;
  if (q->dtype != EMX_F32 && q->dtype != EMX_F16 && q->dtype != EMX_BF16)
    return emxi_fail(EMX_ERR_DTYPE, "%s: q is %s, expected f32, f16 or bf16", who, emx_dtype_name(q->dtype));
  const int head = io->layout == EMX_LAYOUT_BHND ? 1 : 2, token = 3 - head;
  if (q->shape[3] != kv->D)
    return emxi_fail(EMX_ERR_SHAPE, "%s: q has head dimension %lld, the cache %d", who, (long long)q->shape[3], kv->D);
  if (q->shape[head] < 1 || q->shape[head] % kv->G)
    return emxi_fail(EMX_ERR_SHAPE, "%s: %lld query heads are no multiple of %d KV heads", who, (long long)q->shape[head], kv->G);
  if (q->shape[0] > INT32_MAX || q->shape[head] > INT32_MAX / 64 || q->shape[token] > INT32_MAX / 64)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: q is too large", who);
  if (q->shape[token] != 1 && select->kind != EMX_SELECT_ALL)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: %lld query tokens per sequence; this version takes one, or any number with ALL",
                     who, (long long)q->shape[token]);
  if (io->alphas) {
    EMX_TRY(emxi_tensor_layout(ctx, io->alphas, 1, who, "alphas"));
    EMX_TRY(emxi_tensor_shape(io->alphas, 1, &q->shape[head], who, "alphas"));
    if (io->alphas->dtype != EMX_F64)
      return emxi_fail(EMX_ERR_DTYPE, "%s: alphas is %s, expected f64", who, emx_dtype_name(io->alphas->dtype));
  }
  *out = (emxi_decode){.kv = kv,
                       .B = (int32_t)q->shape[0],
                       .H = (int32_t)q->shape[head],
                       .S = (int32_t)q->shape[token],
                       .select = *select,
                       .asked = select->kind,
                       .per_head = io->alphas != NULL,
                       .alpha = io->alpha,
                       .scale = io->scale == 0 ? 1.0f / sqrtf((float)kv->D) : io->scale,
                       .q = q->data,
                       .q_dtype = q->dtype,
                       .q_stride = {q->stride[0], q->stride[head], q->stride[token]}};
  return EMX_OK;
}

static emx_status resolve_support(const emx_ctx *ctx, const emx_decode_io *io, const char *who, emxi_decode *d) {
  const emx_tensor *index = io->support_index, *weight = io->support_weight, *count = io->support_count;
  if (!index && !weight && !count) return EMX_OK;
  if (!index || !weight || !count)
    return emxi_fail(EMX_ERR_INVALID, "%s: support_index, support_weight and support_count go together", who);
  EMX_TRY(check_list(ctx, index, 4, EMX_I32, d, who, "support_index"));
  EMX_TRY(check_list(ctx, weight, 4, EMX_F32, d, who, "support_weight"));
  EMX_TRY(check_list(ctx, count, 3, EMX_I32, d, who, "support_count"));
  if (index->shape[3] != weight->shape[3])
    return emxi_fail(EMX_ERR_SHAPE, "%s: support_index has room for %lld tokens a row, support_weight for %lld", who,
                     (long long)index->shape[3], (long long)weight->shape[3]);
  d->support_index = index->data;
  d->support_weight = weight->data;
  d->support_count = count->data;
  d->support_width = index->shape[3];
  for (int i = 0; i < 3; i++) {
    d->index_stride[i] = index->stride[i];
    d->weight_stride[i] = weight->stride[i];
    d->count_stride[i] = count->stride[i];
  }
  return EMX_OK;
}

emx_status emxi_decode_resolve(emx_ctx *ctx, const emx_kv *kv, const emx_select_desc *select, const emx_decode_io *io,
                               bool select_only, const char *who, emxi_decode *out) {
  EMX_TRY(emxi_decode_shape(ctx, kv, select, io, who, out));
  emxi_decode *d = out;
  const int head = io->layout == EMX_LAYOUT_BHND ? 1 : 2;
  d->select_only = select_only;
  if (io->alphas) {
    EMX_TRY(emxi_tensor_check(ctx, io->alphas, 1, who, "alphas"));
    d->alphas = io->alphas->data;
    for (int32_t h = 0; h < d->H && !emxi_kv_on_device(kv); h++) EMX_TRY(check_alpha(select, d->alphas[h], who));
  }
  if (io->alibi_slopes) {
    int64_t shape[1] = {d->H};
    EMX_TRY(emxi_tensor_expect(ctx, io->alibi_slopes, 1, shape, who, "alibi_slopes"));
    if (io->alibi_slopes->dtype != EMX_F32) return emxi_fail(EMX_ERR_DTYPE, "%s: alibi_slopes must be f32", who);
    d->slopes = io->alibi_slopes->data;
  }
  if (select_only && select->kind == EMX_SELECT_CERTIFIED && kv->file)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: CERTIFIED reads keys, which are in a file; there it is for emx_decode", who);
  if (select_only && select->kind == EMX_SELECT_PAGES)
    return emxi_fail(EMX_ERR_INVALID, "%s: PAGES is for emx_decode, the lists are what this call makes", who);
  if (select_only || select->kind == EMX_SELECT_PAGES) {
    EMX_TRY(check_list(ctx, io->pages, 4, EMX_I32, d, who, "pages"));
    EMX_TRY(check_list(ctx, io->n_pages, 3, EMX_I32, d, who, "n_pages"));
    d->pages = io->pages->data;
    d->pages_width = io->pages->shape[3];
    d->n_pages = io->n_pages->data;
    for (int i = 0; i < 3; i++) {
      d->pages_stride[i] = io->pages->stride[i];
      d->n_pages_stride[i] = io->n_pages->stride[i];
    }
  }
  if (select_only) {
    if (io->bound) {
      EMX_TRY(check_list(ctx, io->bound, 3, EMX_F32, d, who, "bound"));
      d->bound = io->bound->data;
      for (int i = 0; i < 3; i++) d->bound_stride[i] = io->bound->stride[i];
    }
    return EMX_OK;
  }
  EMX_TRY(emxi_tensor_expect(ctx, io->o, 4, io->q->shape, who, "o"));
  if (io->o->dtype != io->q->dtype && io->o->dtype != EMX_F32)
    return emxi_fail(EMX_ERR_DTYPE, "%s: o is %s, expected %s or f32", who, emx_dtype_name(io->o->dtype),
                     emx_dtype_name(io->q->dtype));
  d->o = io->o->data;
  d->o_dtype = io->o->dtype;
  d->o_stride[0] = io->o->stride[0];
  d->o_stride[1] = io->o->stride[head];
  d->o_stride[2] = io->o->stride[3 - head];
  if (io->report_stride && io->report_stride < (int64_t)sizeof(emx_report))
    return emxi_fail(EMX_ERR_INVALID, "%s: report_stride is %lld bytes, a report takes %zu", who, (long long)io->report_stride,
                     sizeof(emx_report));
  d->reports = (char *)io->reports;
  d->report_stride = io->report_stride ? io->report_stride : (int64_t)sizeof(emx_report);
  return resolve_support(ctx, io, who, d);
}

emx_status emxi_decode_bind(emxi_decode *d, const emx_kv_batch *batch, int32_t after, const char *who) {
  const emx_kv *kv = d->kv;
  if (batch->batch != d->B) return emxi_fail(EMX_ERR_SHAPE, "%s: the batch has %d sequences, q %d", who, batch->batch, d->B);
  EMX_TRY(emxi_kv_check_batch(kv, batch, NULL, after, who));
  d->batch = batch;
  const bool unseen = !batch->seqs && emxi_kv_on_device(kv);
  d->max_len = unseen ? batch->max_len : 0;
  if (unseen && d->select_only && emxi_kv_pages_of(kv, d->max_len) > d->pages_width)
    return emxi_fail(EMX_ERR_SHAPE, "%s: sequences may have %lld pages, the page lists have %lld columns", who,
                     (long long)emxi_kv_pages_of(kv, d->max_len), (long long)d->pages_width);
  for (int32_t b = 0; b < d->B && !unseen; b++) {
    int64_t length;
    emxi_kv_entry(kv, batch, b, &length);
    length += after;
    if (length > d->max_len) d->max_len = length;
    const int64_t pages = emxi_kv_pages_of(kv, length);
    if (d->select_only && pages > d->pages_width)
      return emxi_fail(EMX_ERR_SHAPE, "%s: sequence %d has %lld pages, the page lists %lld columns", who, b, (long long)pages,
                       (long long)d->pages_width);
    if (d->select_only || d->select.kind != EMX_SELECT_PAGES || emxi_kv_on_device(kv)) continue; /* a GPU's lists: kernels look */
    for (int32_t h = 0; h < d->H; h++) {
      const int32_t n = d->n_pages[b * d->n_pages_stride[0] + h * d->n_pages_stride[1]];
      const int32_t *list = d->pages + b * d->pages_stride[0] + h * d->pages_stride[1];
      if (n < 0 || n > d->pages_width)
        return emxi_fail(EMX_ERR_INVALID, "%s: n_pages[%d][%d] is %d, the lists have %lld columns", who, b, h, n,
                         (long long)d->pages_width);
      for (int32_t i = 0; i < n; i++)
        if (list[i] < 0 || list[i] >= pages || (i && list[i] <= list[i - 1]))
          return emxi_fail(EMX_ERR_INVALID, "%s: pages[%d][%d][%d] is %d; lists ascend and the sequence has %lld pages", who, b,
                           h, i, list[i], (long long)pages);
    }
  }
  if (d->slopes) {
    if (d->max_len > (1 << 24))
      return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: ALiBi is for at most 2^24 tokens, where positions are exact floats", who);
    for (int32_t h = 0; h < d->H && !emxi_kv_on_device(kv);
         h++) /* on a GPU a slope that is not finite makes the head's output NaN */
      if (!isfinite(d->slopes[h])) return emxi_fail(EMX_ERR_INVALID, "%s: alibi_slopes[%d] is %g", who, h, d->slopes[h]);
  }
  return EMX_OK;
}

emx_status emxi_decode_workspace(emx_ctx *ctx, const emxi_decode *d, size_t *bytes) {
  emxi_arena arena;
  emxi_arena_init(&arena, NULL, 0);
  EMX_TRY(ctx->backend->decode_run(ctx, d, &arena));
  if (arena.overflow)
    return emxi_fail(EMX_ERR_NOMEM, "the workspace for %lld tokens exceeds the address space", (long long)d->max_len);
  *bytes = emxi_arena_total(&arena);
  return EMX_OK;
}
emx_status emxi_decode_arena(emx_ctx *ctx, const emxi_decode *d, void *workspace, size_t bytes, const char *who,
                             emxi_arena *arena) {
  size_t need = 0;
  EMX_TRY(emxi_decode_workspace(ctx, d, &need));
  if (!workspace || bytes < need)
    return emxi_fail(EMX_ERR_WORKSPACE, "%s: the workspace holds %zu bytes, %zu are needed", who, workspace ? bytes : (size_t)0,
                     need);
  emxi_arena_init(arena, workspace, bytes);
  return EMX_OK;
}

static emx_status select_pages(emx_ctx *ctx, const emx_kv *kv, const emx_kv_batch *batch, const emx_select_desc *select,
                               const emx_decode_io *io, void *workspace, size_t workspace_bytes) {
  static const char who[] = "emx_select";
  emxi_decode d;
  emxi_arena arena;
  EMX_TRY(emxi_decode_resolve(ctx, kv, select, io, true, who, &d));
  EMX_TRY(emxi_decode_bind(&d, batch, 0, who));
  EMX_TRY(emxi_decode_arena(ctx, &d, workspace, workspace_bytes, who, &arena));
  return ctx->backend->decode_run(ctx, &d, &arena);
}

emx_status emx_select(emx_ctx *ctx, const emx_kv *kv, const emx_kv_batch *batch, const emx_select_desc *select,
                      const emx_decode_io *io, void *workspace, size_t workspace_bytes) {
  if (!ctx || !kv) return emxi_fail(EMX_ERR_INVALID, "emx_select: %s is NULL", ctx ? "kv" : "ctx");
  EMXI_READ_STRUCT(batch, emx_kv_batch);
  EMXI_READ_STRUCT(select, emx_select_desc);
  EMXI_READ_STRUCT(io, emx_decode_io);
  EMXI_LOCKED(ctx, select_pages(ctx, kv, batch, select, io, workspace, workspace_bytes));
}
