/* SPDX-License-Identifier: Apache-2.0
 * Appends on the device: block tables up to date, shared pages copied, tokens stored. Page numbers, lengths and copies travel as kernel
 * arguments, so nothing of the host's memory is read after a call has returned, and nothing waits. */
#include "cuda/backend_cuda.h"

emxi_cuda_pool emxi_cuda_pool_of(const emx_kv *kv) {
  return (emxi_cuda_pool){
      .k = kv->k,
      .v = kv->v,
      .k_page = kv->k_page,
      .k_head = kv->k_head,
      .k_token = kv->k_token,
      .v_page = kv->v_page,
      .v_head = kv->v_head,
      .v_token = kv->v_token,
      .G = kv->G,
      .D = kv->D,
      .P = kv->P,
      .shift = kv->P == 16   ? 4
               : kv->P == 32 ? 5
                             : 6,
      .dtype = kv->dtype,
      .max_pages = (int32_t)kv->max_pages,
      .sum = {kv->minmax, kv->codes, (emxi_cuda_tail *)kv->tails},
      .sketch = {(emxi_cuda_group *)kv->sketch_group, kv->sketch_centre, kv->sketch_codes, kv->sketch_weights,
                 EMXI_CUDA_SKETCH_PADDED(kv->D)},
  };
}

emxi_cuda_batch emxi_cuda_batch_of(const emx_kv *kv, const emx_kv_batch *batch, int32_t first, int32_t n) {
  emxi_cuda_batch out = {.n = n, .fault = emxi_cuda_of(kv->ctx)->fault, .claimed = emxi_cuda_of(kv->ctx)->claimed};
  if (batch->seqs) {
    out.tables = kv->device_tables;
    out.stride = kv->max_pages;
    for (int32_t i = 0; i < n; i++) {
      out.seq[i] = batch->seqs[first + i];
      out.len[i] = (int32_t)kv->seqs[out.seq[i]].length;
    }
  } else {
    out.stride = batch->block_table->stride[0];
    out.tables = (const int32_t *)batch->block_table->data + first * out.stride;
    out.lengths = (const int32_t *)batch->seq_lens->data + first;
    out.limit = batch->max_len;
  }
  return out;
}

emx_status emxi_cuda_update_tables(emx_ctx *ctx, const emx_kv *kv, const emx_kv_batch *batch, const char *who) {
  if (!batch->seqs) return EMX_OK;
  enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(ctx->stream, &capture) || capture != cudaStreamCaptureStatusNone) {
    (void)cudaGetLastError();
    return emxi_fail(EMX_ERR_UNSUPPORTED,
                     "%s: the stream is being captured, and a graph would keep today's lengths of the library's sequences; give "
                     "block_table and seq_lens",
                     who);
  }
  emxi_cuda_updates u = {.tables = kv->device_tables, .stride = kv->max_pages};
  for (int32_t b = 0; b < batch->batch; b++) {
    emxi_kv_seq *s = &kv->seqs[batch->seqs[b]];
    const int32_t *table = kv->tables + (int64_t)batch->seqs[b] * kv->max_pages;
    for (; s->mirrored < s->n_pages; s->mirrored++) {
      u.seq[u.n] = batch->seqs[b];
      u.at[u.n] = (int32_t)s->mirrored;
      u.page[u.n++] = table[s->mirrored];
      if (u.n < EMXI_CUDA_UPDATES) continue;
      emxi_cuda_launch_updates(&u, ctx->stream);
      u.n = 0;
    }
  }
  if (u.n) emxi_cuda_launch_updates(&u, ctx->stream);
  return EMX_OK;
}

static emx_status write_tokens(emx_ctx *ctx, const emxi_kv_write *w) {
  emx_kv *kv = w->kv;
  const int32_t B = w->batch->batch;
  EMX_TRY(emxi_cuda_update_tables(ctx, kv, w->batch, "emx_kv_append"));
  for (int32_t i = 0; i < w->n_copies; i += EMXI_CUDA_SLICE) {
    emxi_cuda_copies c = {.pool = emxi_cuda_pool_of(kv)};
    for (; c.n < EMXI_CUDA_SLICE && i + c.n < w->n_copies; c.n++) {
      c.from[c.n] = w->copies[i + c.n].from;
      c.to[c.n] = w->copies[i + c.n].to;
      c.tokens[c.n] = w->copies[i + c.n].tokens;
    }
    emxi_cuda_launch_copies(&c, ctx->stream);
  }
  const int64_t es = (int64_t)emx_dtype_size(w->dtype);
  for (int32_t b = 0; w->t && b < B; b += EMXI_CUDA_SLICE) {
    const emxi_cuda_append a = {.pool = emxi_cuda_pool_of(kv),
                                .batch = emxi_cuda_batch_of(kv, w->batch, b, B - b < EMXI_CUDA_SLICE ? B - b : EMXI_CUDA_SLICE),
                                .n = w->n ? w->n + b : NULL,
                                .k = w->k + b * w->k_stride[0] * es,
                                .v = w->v + b * w->v_stride[0] * es,
                                .k_stride = {w->k_stride[0], w->k_stride[1], w->k_stride[2]},
                                .v_stride = {w->v_stride[0], w->v_stride[1], w->v_stride[2]},
                                .t = w->t,
                                .dtype = w->dtype};
    emxi_cuda_launch_append(&a, ctx->stream);
    if (kv->tails) emxi_cuda_launch_summaries(&a, ctx->stream);
    if (kv->sketch_group) emxi_cuda_launch_sketches(&a, ctx->stream);
  }
  return EMX_OK;
}

emx_status emxi_cuda_kv_write(emx_ctx *ctx, const emxi_kv_write *w) {
  int before;
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  return emxi_cuda_leave(before, write_tokens(ctx, w), true, "emx_kv_append");
}

emx_status emxi_cuda_kv_read(emx_ctx *ctx, const emxi_kv_read *r) {
  const emx_kv_batch batch = {.batch = 1, .seqs = &r->seq};
  int before;
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  emx_status status = emxi_cuda_update_tables(ctx, r->kv, &batch, r->who);
  if (!status) {
    const emxi_cuda_packed packed = {.pool = emxi_cuda_pool_of(r->kv),
                                     .batch = emxi_cuda_batch_of(r->kv, &batch, 0, 1),
                                     .from = r->from,
                                     .n = r->n,
                                     .k = r->k,
                                     .v = r->v};
    emxi_cuda_launch_read(&packed, ctx->stream);
  }
  return emxi_cuda_leave(before, status, true, r->who);
}

emx_status emxi_cuda_kv_summarize(emx_ctx *ctx, emx_kv *kv, const int32_t *pages, const int32_t *tokens, int64_t n) {
  if (!kv->tails || !n) return EMX_OK;
  const emxi_cuda_listed l = {.pool = emxi_cuda_pool_of(kv),
                              .batch = {.fault = emxi_cuda_of(ctx)->fault, .claimed = emxi_cuda_of(ctx)->claimed},
                              .pages = pages,
                              .tokens = tokens,
                              .n = n};
  if (n > INT32_MAX) return emxi_fail(EMX_ERR_UNSUPPORTED, "emx_kv_summarize: %lld pages in one call", (long long)n);
  int before;
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  emxi_cuda_launch_listed(&l, ctx->stream);
  if (kv->sketch_group) emxi_cuda_launch_listed_sketches(&l, ctx->stream);
  return emxi_cuda_leave(before, EMX_OK, true, "emx_kv_summarize");
}

emx_status emxi_cuda_kv_facts(emx_ctx *ctx, const emx_kv *kv, int32_t page, int32_t head, emxi_kv_facts *out) {
  const int64_t record = (int64_t)page * kv->G + head, padded = EMXI_CUDA_PADDED(kv->D);
  const size_t es = emx_dtype_size(kv->dtype), row = (size_t)kv->D * es;
  emxi_cuda_tail tail = {0};
  uint8_t codes[2 * 256];
  if (kv->tails) EMX_TRY(ctx->backend->memory_copy(ctx, &tail, (emxi_cuda_tail *)kv->tails + record, sizeof tail));
  out->tokens = tail.size > 0 ? kv->P : 0;
  out->radius = tail.radius;
  for (int i = 0; i < 2 && kv->minmax; i++)
    EMX_TRY(ctx->backend->memory_copy(ctx, out->box + (size_t)i * row,
                                      (char *)kv->minmax + (size_t)((2 * record + i) * padded) * es, row));
  if (!kv->codes) return EMX_OK;
  EMX_TRY(ctx->backend->memory_copy(ctx, codes, kv->codes + record * 2 * padded, (size_t)(2 * padded)));
  for (int32_t d = 0; d < kv->D; d++) {
    const float spread = tail.spread_step * (float)codes[padded + d];
    out->moments[d] = tail.step * (float)(codes[d] - 128);
    out->moments[kv->D + d] = spread * spread * (float)kv->P;
  }
  return EMX_OK;
}
