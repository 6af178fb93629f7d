/* SPDX-License-Identifier: Apache-2.0 */
#include "workload.h"

#include "base/base.h"
#include "base/num.h"

#include <stdio.h>
#include <string.h>

enum { CHUNK = 512, SEGMENT = 64 };
/* Streams of the generator: what it is for, the sequence, the head, the chunk or segment or round. */
enum { STREAM_KEY = 1, STREAM_VALUE, STREAM_TOPIC, STREAM_QUERY, STREAM_PICK, STREAM_START };
static uint64_t stream(uint64_t purpose, int id, int head, int64_t number) {
  return purpose << 58 | (uint64_t)id << 44 | (uint64_t)head << 32 | (uint64_t)number;
}

bool workload_parse(const char *name, uint64_t seed, workload *w) {
  char end;
  *w = (workload){.kind = WORKLOAD_IID, .seed = seed};
  if (!strcmp(name, "iid")) return true;
  if (sscanf(name, "ar:%lf%c", &w->rho, &end) == 1) {
    w->kind = WORKLOAD_AR;
    return w->rho >= 0 && w->rho < 1;
  }
  if (!strcmp(name, "topics") || sscanf(name, "topics:%d%c", &w->shift, &end) == 1) {
    w->kind = WORKLOAD_TOPICS;
    return w->shift >= 0 && w->shift < SEGMENT;
  }
  if (sscanf(name, "outlier:%d,%lf%c", &w->channels, &w->gain, &end) == 2) {
    w->kind = WORKLOAD_OUTLIER;
    return w->channels >= 1 && w->channels <= 16 && w->gain > 0 && w->gain <= 1e4;
  }
  if (sscanf(name, "flat:%lf%c", &w->std, &end) == 1) {
    w->kind = WORKLOAD_FLAT;
    return w->std > 0 && w->std <= 100;
  }
  return false;
}

float workload_scale(const workload *w, int d) {
  if (w->kind == WORKLOAD_OUTLIER) return (float)(1 / sqrt(d - w->channels + w->channels * w->gain * w->gain));
  return (float)((w->kind == WORKLOAD_FLAT ? w->std : 1) / sqrt(d));
}

typedef struct fill {
  const workload *w;
  float *k, *v, *last; /* [G,CHUNK,D], [G,CHUNK,D], [G,D]: the AR process's last key */
  int id, d;
  int64_t from, n; /* tokens [from, from+n) */
} fill;

static void fill_head(void *arg, int64_t g, int32_t worker) {
  (void)worker;
  const fill *f = arg;
  const workload *w = f->w;
  const int d = f->d;
  float *k = f->k + g * f->n * d, *v = f->v + g * f->n * d, *last = f->last + g * d;
  emxi_normals(w->seed, stream(STREAM_KEY, f->id, (int)g, f->from / CHUNK), k, f->n * d);
  emxi_normals(w->seed, stream(STREAM_VALUE, f->id, (int)g, f->from / CHUNK), v, f->n * d);
  if (w->kind == WORKLOAD_AR) {
    const float rho = (float)w->rho, fresh = (float)sqrt(1 - w->rho * w->rho);
    if (f->from == 0) emxi_normals(w->seed, stream(STREAM_START, f->id, (int)g, 0), last, d);
    for (int64_t t = 0; t < f->n; t++)
      for (int x = 0; x < d; x++) k[t * d + x] = last[x] = rho * last[x] + fresh * k[t * d + x];
  } else if (w->kind == WORKLOAD_TOPICS) {
    float topic[256];
    int64_t segment = -1;
    for (int64_t t = 0; t < f->n; t++) {
      int64_t s = (f->from + t + w->shift) / SEGMENT;
      if (s != segment) emxi_normals(w->seed, stream(STREAM_TOPIC, f->id, (int)g, s), topic, d);
      segment = s;
      for (int x = 0; x < d; x++) k[t * d + x] = 0.9f * topic[x] + 0.45f * k[t * d + x];
    }
  } else if (w->kind == WORKLOAD_OUTLIER) {
    for (int64_t t = 0; t < f->n; t++)
      for (int c = 0; c < w->channels; c++) k[t * d + c * d / w->channels] *= (float)w->gain;
  }
}

emx_status workload_append(emx_ctx *ctx, emx_kv *kv, int32_t seq, int id, int64_t n, const workload *w) {
  emx_kv_info info = {.struct_size = sizeof info};
  EMX_TRY(emx_kv_get_info(kv, &info));
  const int g = info.kv_heads, d = info.head_dim;
  const size_t bytes = ((size_t)2 * CHUNK + 1) * (size_t)g * (size_t)d * sizeof(float);
  float *memory = emxi_alloc(bytes);
  if (!memory) return emxi_fail(EMX_ERR_NOMEM, "no memory for %zu bytes", bytes);
  fill f = {.w = w, .k = memory, .v = memory + (size_t)CHUNK * (size_t)g * (size_t)d, .id = id, .d = d};
  f.last = f.v + (size_t)CHUNK * (size_t)g * (size_t)d;
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &seq;
  emx_status status = EMX_OK;
  for (int64_t from = 0; from < n && !status; from += CHUNK) {
    f.from = from;
    f.n = n - from < CHUNK ? n - from : CHUNK;
    int64_t shape[4] = {1, g, f.n, d};
    emx_tensor k = emx_tensor_view(f.k, EMX_F32, 4, shape), v = emx_tensor_view(f.v, EMX_F32, 4, shape);
    status = emxi_parallel(ctx, g, fill_head, &f);
    if (!status) status = emx_kv_append(ctx, kv, &batch, &k, &v, NULL);
  }
  emxi_free(memory);
  return status;
}

emx_status workload_tensors(emx_ctx *ctx, int id, int64_t g, int64_t n, int d, const workload *w, float *k, float *v) {
  const size_t bytes = ((size_t)2 * CHUNK + 1) * (size_t)g * (size_t)d * sizeof(float);
  float *memory = emxi_alloc(bytes);
  if (!memory) return emxi_fail(EMX_ERR_NOMEM, "no memory for %zu bytes", bytes);
  fill f = {.w = w, .k = memory, .v = memory + CHUNK * g * d, .last = memory + 2 * CHUNK * g * d, .id = id, .d = d};
  emx_status status = EMX_OK;
  for (f.from = 0; f.from < n && !status; f.from += CHUNK) {
    f.n = n - f.from < CHUNK ? n - f.from : CHUNK;
    status = emxi_parallel(ctx, g, fill_head, &f);
    for (int64_t head = 0; head < g; head++) {
      memcpy(k + (head * n + f.from) * d, f.k + head * f.n * d, (size_t)(f.n * d) * sizeof(float));
      memcpy(v + (head * n + f.from) * d, f.v + head * f.n * d, (size_t)(f.n * d) * sizeof(float));
    }
  }
  emxi_free(memory);
  return status;
}

int64_t workload_pick(const workload *w, int round, int id, int head, int64_t n) {
  uint32_t words[4];
  emxi_philox(w->seed, stream(STREAM_PICK, id, head, round), 0, words);
  return (int64_t)(emxi_uniform(words[0]) * (double)n);
}
void workload_query(const workload *w, int round, int id, int head, const float *key, int d, float *q) {
  emxi_normals(w->seed, stream(STREAM_QUERY, id, head, round), q, d);
  if (w->kind != WORKLOAD_TOPICS) return;
  for (int x = 0; x < d; x++) q[x] = 0.8f * key[x] + 0.6f * q[x];
}
