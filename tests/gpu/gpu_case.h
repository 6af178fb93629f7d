/* A decode_case on a GPU: the same data appended to a cache in device memory, the same query, results fetched into the case, so that
 * the checks against the float64 oracle are the CPU's. After cmocka.h. */
#ifndef GPU_CASE_H
#define GPU_CASE_H

#include "base/backend.h"
#include "check.h"
#include "decode_case.h"

#include <cuda_runtime_api.h>

static emx_ctx *cpu, *gpu;

#define CUDA(call)                                                   \
  do {                                                               \
    cudaError_t cuda_ = (call);                                      \
    if (cuda_) fail_msg("%s: %s", #call, cudaGetErrorString(cuda_)); \
  } while (0)

/* The exit status that ctest takes for "skipped". */
static inline int gpu_missing(void) {
  emx_ctx_opts o;
  emx_ctx_opts_init(&o);
  o.device = EMX_DEVICE_CUDA;
  if (!emx_ctx_create(NULL, &cpu) && !emx_ctx_create(&o, &gpu)) return 0;
  printf("skipped: %s\n", emx_last_error());
  emx_ctx_destroy(cpu);
  return 77;
}

static inline void *gpu_take(const void *from, size_t bytes) {
  void *p = NULL;
  OK(gpu->backend->memory_alloc(gpu, bytes, &p));
  if (from)
    OK(gpu->backend->memory_copy(gpu, p, from, bytes));
  else
    CUDA(cudaMemset(p, 0xff, bytes)); /* NaN: what nobody writes is noticed */
  return p;
}
static inline void gpu_fetch(void *to, const void *from, size_t bytes) { OK(gpu->backend->memory_copy(gpu, to, from, bytes)); }
static inline void gpu_free(void *p) { gpu->backend->memory_free(gpu, p); }
static inline size_t gpu_bytes(const emx_tensor *t) {
  size_t n = emx_dtype_size(t->dtype);
  for (int d = 0; d < t->ndim; d++) n *= (size_t)t->shape[d];
  return n;
}
/* A contiguous tensor's copy in device memory. */
static inline emx_tensor gpu_tensor(const emx_tensor *t) {
  emx_tensor out = *t;
  out.device = EMX_DEVICE_CUDA;
  out.data = gpu_take(t->data, gpu_bytes(t));
  return out;
}

typedef struct gpu_case {
  decode_case *c;
  emx_kv *kv;
  int32_t seqs[4];
  emx_tensor q, o, k, v, slopes, pages, n_pages, bound;
  emx_report *reports;
  emx_decode_io io;
  emx_kv_batch batch;
} gpu_case;

static inline emx_kv *gpu_cache(const decode_case *c, int64_t pages, int32_t max_seqs) {
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.dtype = c->dtype;
  o.kv_heads = c->G;
  o.head_dim = c->D;
  o.page_size = c->P;
  o.layout = c->layout;
  o.summaries = c->summaries;
  o.max_seqs = max_seqs;
  o.max_pages = pages;
  o.kv_memory = c->kv_memory;
  emx_kv *kv = NULL;
  OK(emx_kv_create(gpu, &o, &kv));
  return kv;
}

/* Tokens [at, at + n) of sequence b of the case go to sequence `seq` of the cache, as f32. */
static inline void gpu_append(const decode_case *c, emx_kv *kv, int32_t seq, int b, int64_t at, int64_t n) {
  const int64_t shape[4] = {1, c->layout == EMX_LAYOUT_BHND ? c->G : n, c->layout == EMX_LAYOUT_BHND ? n : c->G, c->D};
  float *kn = case_take(sizeof(float) * (size_t)(c->G * n * c->D)), *vn = case_take(sizeof(float) * (size_t)(c->G * n * c->D));
  for (int g = 0; g < c->G; g++)
    for (int64_t t = 0; t < n; t++) {
      const int64_t to = c->layout == EMX_LAYOUT_BHND ? (g * n + t) * c->D : (t * c->G + g) * c->D;
      memcpy(kn + to, case_key(c, b, g, at + t), sizeof(float) * (size_t)c->D);
      memcpy(vn + to, case_value(c, b, g, at + t), sizeof(float) * (size_t)c->D);
    }
  const emx_tensor hk = emx_tensor_view(kn, EMX_F32, 4, shape), hv = emx_tensor_view(vn, EMX_F32, 4, shape);
  const emx_tensor tk = gpu_tensor(&hk), tv = gpu_tensor(&hv);
  emx_kv_batch one;
  emx_kv_batch_init(&one);
  one.batch = 1;
  one.seqs = &seq;
  OK(emx_kv_append(gpu, kv, &one, &tk, &tv, NULL));
  gpu_free(tk.data);
  gpu_free(tv.data);
  free(kn);
  free(vn);
}

/* The case's summaries, on both devices; 0: none. */
static inline void gpu_open(gpu_case *g, decode_case *c) {
  if (!c->summaries) c->summaries = -1;
  case_open(c, cpu);
  *g = (gpu_case){.c = c};
  int64_t pages = 4;
  for (int b = 0; b < c->B; b++) pages += (c->len[b] + c->P - 1) / c->P;
  g->kv = gpu_cache(c, pages, 5);
  for (int b = 0; b < c->B; b++) OK(emx_seq_create(g->kv, &g->seqs[b]));
  const int64_t turn = c->max_len / 5 + 41; /* in turns, so that block tables are interleaved */
  for (int64_t at = 0; at < c->max_len; at += turn)
    for (int b = 0; b < c->B; b++) {
      const int64_t n = c->len[b] - (c->in_decode ? c->S : 0) - at;
      if (n > 0) gpu_append(c, g->kv, g->seqs[b], b, at, n < turn ? n : turn);
    }
  g->q = gpu_tensor(&c->tq);
  g->o = c->to;
  g->o.device = EMX_DEVICE_CUDA;
  g->o.data = gpu_take(NULL, gpu_bytes(&c->to));
  g->io = c->io;
  g->io.q = &g->q;
  g->io.o = &g->o;
  g->pages = gpu_tensor(&c->tp);
  g->n_pages = gpu_tensor(&c->tn);
  g->bound = gpu_tensor(&c->tb);
  g->io.pages = &g->pages;
  g->io.n_pages = &g->n_pages;
  g->io.bound = &g->bound;
  if (c->in_decode) {
    g->k = gpu_tensor(&c->tk);
    g->v = gpu_tensor(&c->tv);
    g->io.k_new = &g->k;
    g->io.v_new = &g->v;
  }
  if (c->alibi) {
    g->slopes = gpu_tensor(&c->ts);
    g->io.alibi_slopes = &g->slopes;
  }
  g->reports = gpu_take(NULL, sizeof(emx_report) * (size_t)(c->B * c->H * c->S));
  g->io.reports = g->reports;
  emx_kv_batch_init(&g->batch);
  g->batch.batch = c->B;
  g->batch.seqs = g->seqs;
}
/* The workspace is as large as asked for, full of NaN, and off alignment. */
static inline void *gpu_work(gpu_case *g, const emx_select_desc *select, size_t *bytes) {
  OK(emx_decode_workspace_size(gpu, g->kv, select, &g->io, g->c->max_len, bytes));
  return gpu_take(NULL, *bytes + 1);
}
/* Lists into the case's. */
static inline void gpu_select(gpu_case *g, const emx_select_desc *select) {
  size_t bytes;
  char *work = gpu_work(g, select, &bytes);
  OK(emx_select(gpu, g->kv, &g->batch, select, &g->io, work + 1, bytes));
  OK(emx_ctx_sync(gpu));
  gpu_free(work);
  gpu_fetch(g->c->pages, g->pages.data, gpu_bytes(&g->pages));
  gpu_fetch(g->c->n_pages, g->n_pages.data, gpu_bytes(&g->n_pages));
  gpu_fetch(g->c->bound, g->bound.data, gpu_bytes(&g->bound));
}
/* Decodes into the case's output and reports. */
static inline void gpu_decode_by(gpu_case *g, const emx_select_desc *select) {
  decode_case *c = g->c;
  size_t bytes;
  char *work = gpu_work(g, select, &bytes);
  OK(emx_decode(gpu, g->kv, &g->batch, select, &g->io, work + 1, bytes));
  OK(emx_ctx_sync(gpu));
  gpu_free(work);
  gpu_fetch(c->o_data, g->o.data, gpu_bytes(&c->to));
  gpu_fetch(c->reports, g->reports, sizeof(emx_report) * (size_t)(c->B * c->H * c->S));
}
static inline void gpu_decode(gpu_case *g) {
  const emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
  gpu_decode_by(g, &all);
}
static inline void gpu_close(gpu_case *g) {
  emx_kv_destroy(g->kv);
  gpu_free(g->q.data), gpu_free(g->o.data), gpu_free(g->k.data), gpu_free(g->v.data), gpu_free(g->slopes.data),
      gpu_free(g->reports), gpu_free(g->pages.data), gpu_free(g->n_pages.data), gpu_free(g->bound.data);
  case_close(g->c);
}

#endif
