/* SPDX-License-Identifier: Apache-2.0
 * A sequence's keys and values out of a cache, and into another one, wherever the two live. Rows pass through staging memory of a
 * few mebibytes: packed on the source's device, and once more on the target's where that is another. */
#include "kv/kv.h"

#include <string.h>

#define STAGED (4 << 20) /* bytes of K, and of V, on their way at a time; at least 64 tokens */

static emx_status read_rows(const emx_kv *kv, int32_t seq, int64_t from, int64_t n, char *k, char *v, const char *who) {
  emx_ctx *ctx = kv->ctx;
  if (emxi_kv_on_device(kv)) {
    const emxi_kv_read read = {.kv = kv, .seq = seq, .from = from, .n = n, .k = k, .v = v, .who = who};
    return ctx->backend->kv_read(ctx, &read);
  }
  const int64_t row = kv->D * (int64_t)emx_dtype_size(kv->dtype);
  const int32_t *table = kv->tables + (int64_t)seq * kv->max_pages;
  EMX_TRY(emxi_kv_file_begin(kv, who));
  for (int32_t g = 0; g < kv->G; g++)
    for (int64_t t = from, step; t < from + n; t += step) {
      const int64_t in_page = t % kv->P, left = from + n - t;
      const int32_t page = table[t / kv->P];
      step = kv->P - in_page < left ? kv->P - in_page : left;
      char *to_k = k + (g * n + t - from) * row, *to_v = v + (g * n + t - from) * row;
      if (kv->file) {
        (void)emxi_kv_file_read(kv, false, page, g, in_page, step, to_k);
        (void)emxi_kv_file_read(kv, true, page, g, in_page, step, to_v);
        continue;
      }
      for (int64_t i = 0; i < step; i++) {
        memcpy(to_k + i * row, emxi_kv_k(kv, page, g, in_page + i), (size_t)row);
        memcpy(to_v + i * row, emxi_kv_v(kv, page, g, in_page + i), (size_t)row);
      }
    }
  return emxi_kv_file_end(kv, who);
}

/* Staging: `packed` where the source lives, `host` between two devices, `landed` where the target lives; what is not needed is
 * the one before. */
typedef struct stages {
  char *packed, *host, *landed;
} stages;

static emx_status stages_open(const emx_kv *from, const emx_kv *to, size_t bytes, stages *s) {
  *s = (stages){0};
  void *p = NULL;
  EMX_TRY(from->ctx->backend->memory_alloc(from->ctx, bytes, &p));
  s->packed = s->host = p;
  if (from->ctx != to->ctx && emxi_kv_on_device(from)) {
    s->host = emxi_calloc(bytes);
    if (!s->host) return emxi_fail(EMX_ERR_NOMEM, "emx_seq_copy: no memory for %zu bytes of staging", bytes);
  }
  s->landed = s->host;
  if (from->ctx != to->ctx && emxi_kv_on_device(to)) {
    p = NULL;
    EMX_TRY(to->ctx->backend->memory_alloc(to->ctx, bytes, &p));
    s->landed = p;
  }
  return EMX_OK;
}
static void stages_close(const emx_kv *from, const emx_kv *to, stages *s) {
  if (s->landed != s->host) to->ctx->backend->memory_free(to->ctx, s->landed);
  if (s->host != s->packed) emxi_free(s->host);
  from->ctx->backend->memory_free(from->ctx, s->packed);
}

static emx_status fetch(const emx_kv *from, int32_t seq, int64_t at, int64_t n, const stages *s, size_t half) {
  if (seq < 0 || seq >= from->max_seqs || !from->seqs[seq].used || from->seqs[seq].length < at + n)
    return emxi_fail(EMX_ERR_STATE, "emx_seq_copy: sequence %d was changed meanwhile", seq);
  EMX_TRY(read_rows(from, seq, at, n, s->packed, s->packed + half, "emx_seq_copy"));
  return s->host == s->packed ? EMX_OK : from->ctx->backend->memory_copy(from->ctx, s->host, s->packed, 2 * half);
}
static emx_status land(emx_kv *to, int32_t copy, int64_t n, int32_t dtype, const stages *s, size_t half) {
  if (s->landed != s->host) EMX_TRY(to->ctx->backend->memory_copy(to->ctx, s->landed, s->host, 2 * half));
  const int64_t shape[4] = {1, to->G, n, to->D};
  emx_tensor k = emx_tensor_view(s->landed, dtype, 4, shape), v = emx_tensor_view(s->landed + half, dtype, 4, shape);
  k.device = v.device = to->ctx->device;
  k.device_index = v.device_index = to->ctx->device_index;
  emx_kv_batch batch = {.struct_size = sizeof batch, .batch = 1, .seqs = &copy};
  return emxi_kv_append(to->ctx, to, &batch, &k, &v, NULL, EMX_LAYOUT_BHND, "emx_seq_copy");
}

emx_status emx_seq_copy(const emx_kv *from, int32_t seq, emx_kv *to, int32_t *copy) {
  static const char who[] = "emx_seq_copy";
  if (!from || !to || !copy) return emxi_fail(EMX_ERR_INVALID, "%s: %s is NULL", who, !from ? "from" : !to ? "to" : "copy");
  int64_t length, free_pages;
  EMX_TRY(emx_seq_length(from, seq, &length));
  if (from->G != to->G || from->D != to->D)
    return emxi_fail(EMX_ERR_SHAPE, "%s: %d KV heads of %d numbers do not fit a cache of %d of %d", who, from->G, from->D, to->G,
                     to->D);
  if (from->dtype != to->dtype && from->dtype != EMX_F32)
    return emxi_fail(EMX_ERR_DTYPE, "%s: %s into a cache of %s, expected the same or f32", who, emx_dtype_name(from->dtype),
                     emx_dtype_name(to->dtype));
  emxi_ctx_lock(to->ctx);
  free_pages = to->n_free;
  emxi_ctx_unlock(to->ctx);
  if (emxi_kv_pages_of(to, length) > free_pages) /* before anything is carried */
    return emxi_fail(EMX_ERR_STATE, "%s: %lld pages are needed, %lld are free", who, (long long)emxi_kv_pages_of(to, length),
                     (long long)free_pages);
  const int64_t row = from->G * (int64_t)from->D * (int64_t)emx_dtype_size(from->dtype);
  int64_t chunk = STAGED / row > 64 ? STAGED / row / 64 * 64 : 64; /* whole pages of either cache */
  if (chunk > length) chunk = length > 0 ? length : 1;
  int32_t id;
  EMX_TRY(emx_seq_create(to, &id));
  stages s;
  emx_status status = stages_open(from, to, 2 * (size_t)(chunk * row), &s);
  for (int64_t at = 0, n; !status && at < length; at += n) {
    n = length - at < chunk ? length - at : chunk;
    emxi_ctx_lock(from->ctx);
    status = fetch(from, seq, at, n, &s, (size_t)(n * row));
    emxi_ctx_unlock(from->ctx);
    if (status) break;
    emxi_ctx_lock(to->ctx);
    status = land(to, id, n, from->dtype, &s, (size_t)(n * row));
    if (!status && emxi_kv_on_device(to)) status = to->ctx->backend->sync(to->ctx); /* before the staging is used again */
    emxi_ctx_unlock(to->ctx);
  }
  stages_close(from, to, &s);
  if (status) {
    (void)emx_seq_destroy(to, id);
    return status;
  }
  *copy = id;
  return EMX_OK;
}
