/* SPDX-License-Identifier: Apache-2.0
 * Page writes and summaries on the CPU. One task per (sequence, KV head): it owns those rows of the pool and of the summaries.
 * A token costs one store of K and V and O(D) for the summaries; K is read back so that summaries describe what was stored. */
#include "base/num.h"
#include "cpu/backend_cpu.h"
#include "cpu/kv_kernels.h"
#include "cpu/sketch_cpu.h"

#define MAX_D 256

/* Running summaries of one page. */
typedef struct page_state {
  float lo[MAX_D], hi[MAX_D], mean[MAX_D], m2[MAX_D];
  int32_t tokens;
  bool nonfinite;
} page_state;

static void state_reset(page_state *s, int d) {
  for (int i = 0; i < d; i++) {
    s->lo[i] = INFINITY;
    s->hi[i] = -INFINITY;
    s->mean[i] = s->m2[i] = 0;
  }
  s->tokens = 0;
  s->nonfinite = false;
}

static void state_load(const emxi_table *k, const emx_kv *kv, int32_t page, int32_t head, int32_t tokens, page_state *s) {
  state_reset(s, kv->D);
  if (kv->minmax) {
    const char *lo = emxi_kv_minmax(kv, page, head);
    k->load[emxi_slot(kv->dtype)](lo, kv->D, s->lo);
    k->load[emxi_slot(kv->dtype)](lo + (size_t)kv->D * emx_dtype_size(kv->dtype), kv->D, s->hi);
  }
  if (kv->moments) {
    const float *m = emxi_kv_moments(kv, page, head);
    memcpy(s->mean, m, (size_t)kv->D * sizeof(float));
    memcpy(s->m2, m + kv->D, (size_t)kv->D * sizeof(float));
  }
  s->tokens = tokens;
  s->nonfinite = (*emxi_kv_mark(kv, page, head) & EMXI_MARK_NONFINITE) != 0;
}

static void store_row(const float *src, int32_t dtype, int d, char *dst) {
  if (dtype == EMX_F32)
    memcpy(dst, src, (size_t)d * sizeof(float));
  else if (dtype == EMX_BF16)
    for (int i = 0; i < d; i++) ((uint16_t *)dst)[i] = emxi_f32_to_bf16(src[i]);
  else
    for (int i = 0; i < d; i++) ((uint16_t *)dst)[i] = emxi_f32_to_f16(src[i]);
}

/* A key as it is stored enters the state. */
static void state_add(const emxi_table *k, const emx_kv *kv, const char *key, page_state *s) {
  float x[MAX_D];
  k->load[emxi_slot(kv->dtype)](key, kv->D, x);
  s->tokens++;
  s->nonfinite |= k->kv->fold(x, kv->D, 1.0f / (float)s->tokens, s->lo, s->hi, s->mean, s->m2);
}

/* >= max ||k - mean|| over the page. Each computed square of a distance is within (D+3) 2^-24 of the true one, relatively, plus D
 * 2^-149 for underflow, whose root is below 1e-21. */
static float page_radius(const emxi_table *k, const emx_kv *kv, const char *keys, const float *mean) {
  const size_t step = (size_t)kv->k_token * emx_dtype_size(kv->dtype);
  float worst = 0;
  for (int32_t t = 0; t < kv->P; t++) {
    float x[MAX_D];
    k->load[emxi_slot(kv->dtype)](keys + (size_t)t * step, kv->D, x);
    float d2 = k->kv->distance2(x, mean, kv->D);
    if (!(d2 <= worst)) worst = d2;
  }
  double r = sqrt((double)worst * (1.0 + (kv->D + 8) * 0x1p-23)) + 1e-21;
  float up = nextafterf((float)r, INFINITY);
  return up == up ? up : INFINITY;
}

/* keys: the page's. */
static void state_store(const emxi_table *k, const emx_kv *kv, int32_t page, int32_t head, const char *keys,
                        const page_state *s) {
  if (kv->minmax) { /* these are elements of K: the conversion is exact */
    char *lo = emxi_kv_minmax(kv, page, head);
    store_row(s->lo, kv->dtype, kv->D, lo);
    store_row(s->hi, kv->dtype, kv->D, lo + (size_t)kv->D * emx_dtype_size(kv->dtype));
  }
  if (kv->moments) {
    float *m = emxi_kv_moments(kv, page, head);
    memcpy(m, s->mean, (size_t)kv->D * sizeof(float));
    memcpy(m + kv->D, s->m2, (size_t)kv->D * sizeof(float));
    m[2 * kv->D] = s->tokens == kv->P ? page_radius(k, kv, keys, s->mean) : INFINITY;
  }
  *emxi_kv_mark(kv, page, head) = s->nonfinite ? EMXI_MARK_NONFINITE : 0;
}

typedef struct job {
  const emxi_table *k;
  emx_kv *kv;
  const emxi_kv_write *w;
  const int32_t *pages, *tokens;
} job;

static void copy_page(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  const emx_kv *kv = j->kv;
  const emxi_kv_copy *c = &j->w->copies[i / kv->G];
  const int32_t head = (int32_t)(i % kv->G);
  const size_t row = (size_t)kv->D * emx_dtype_size(kv->dtype);
  for (int values = 0; kv->file && values < 2; values++) {
    char *rows = kv->file->bench + worker * kv->file->bench_size;
    emxi_kv_file_read(kv, values, c->from, head, 0, c->tokens, rows);
    emxi_kv_file_write(kv, values, c->to, head, 0, c->tokens, rows);
  }
  for (int32_t t = 0; !kv->file && t < c->tokens; t++) {
    memcpy((char *)emxi_kv_k(kv, c->to, head, t), emxi_kv_k(kv, c->from, head, t), row);
    memcpy((char *)emxi_kv_v(kv, c->to, head, t), emxi_kv_v(kv, c->from, head, t), row);
  }
  if (kv->sum_tokens[c->to] != c->tokens) return; /* summaries of other tokens: the write rebuilds them */
  if (kv->minmax) memcpy(emxi_kv_minmax(kv, c->to, head), emxi_kv_minmax(kv, c->from, head), 2 * row);
  if (kv->moments)
    memcpy(emxi_kv_moments(kv, c->to, head), emxi_kv_moments(kv, c->from, head), (size_t)kv->moments_ld * sizeof(float));
  *emxi_kv_mark(kv, c->to, head) = *emxi_kv_mark(kv, c->from, head);
}

static void write_tokens(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  const emx_kv *kv = j->kv;
  const emxi_kv_write *w = j->w;
  const int32_t b = (int32_t)(i / kv->G), head = (int32_t)(i % kv->G), n = w->n ? w->n[b] : w->t;
  const size_t es = emx_dtype_size(w->dtype), row = (size_t)kv->D * es;
  const bool same = w->dtype == kv->dtype;
  int64_t length;
  const int32_t *table = emxi_kv_entry(kv, w->batch, b, &length);
  const char *k = w->k + (size_t)(b * w->k_stride[0] + head * w->k_stride[1]) * es;
  const char *v = w->v + (size_t)(b * w->v_stride[0] + head * w->v_stride[1]) * es;
  const size_t k_step = (size_t)kv->k_token * emx_dtype_size(kv->dtype), v_step = (size_t)kv->v_token * emx_dtype_size(kv->dtype);
  page_state s;
  for (int32_t done = 0; done < n;) {
    const int32_t page = table[(length + done) / kv->P], first = (int32_t)((length + done) % kv->P);
    const int32_t count = kv->P - first < n - done ? kv->P - first : n - done;
    const bool known = first && kv->sum_tokens[page] == first;
    /* the page in the pool, or a copy of what is needed of it */
    char *keys = kv->file ? kv->file->bench + worker * kv->file->bench_size : (char *)emxi_kv_k(kv, page, head, 0);
    char *values = kv->file ? keys + kv->file->bench_size / 2 : (char *)emxi_kv_v(kv, page, head, 0);
    if (kv->file && first && (!known || first + count == kv->P)) emxi_kv_file_read(kv, false, page, head, 0, first, keys);
    if (known) {
      state_load(j->k, kv, page, head, first, &s);
    } else {
      state_reset(&s, kv->D);
      for (int32_t t = 0; t < first; t++) state_add(j->k, kv, keys + (size_t)t * k_step, &s);
    }
    for (int32_t t = first; t < first + count; t++, done++) {
      const char *kr = k + (size_t)(done * w->k_stride[2]) * es, *vr = v + (size_t)(done * w->v_stride[2]) * es;
      char *kt = keys + (size_t)t * k_step, *vt = values + (size_t)t * v_step;
      if (same) {
        memcpy(kt, kr, row);
        memcpy(vt, vr, row);
      } else {
        store_row((const float *)kr, kv->dtype, kv->D, kt);
        store_row((const float *)vr, kv->dtype, kv->D, vt);
      }
      state_add(j->k, kv, kt, &s);
    }
    if (kv->file) {
      emxi_kv_file_write(kv, false, page, head, first, count, keys + (size_t)first * k_step);
      emxi_kv_file_write(kv, true, page, head, first, count, values + (size_t)first * v_step);
    }
    state_store(j->k, kv, page, head, keys, &s);
  }
}

/* Sketches of the pages that the write has completed, and of the superpages that end in them. */
static void sketch_tokens(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  const emx_kv *kv = j->kv;
  const int32_t b = (int32_t)(i / kv->G), head = (int32_t)(i % kv->G), n = j->w->n ? j->w->n[b] : j->w->t,
                per = EMXI_SUPER / kv->P;
  int64_t length;
  const int32_t *table = emxi_kv_entry(kv, j->w->batch, b, &length);
  (void)worker;
  for (int64_t p = length / kv->P; p < (length + n) / kv->P; p++) {
    emxi_sketch_page(j->k, kv, table[p], head);
    if (emxi_sketch_super_ready(kv, table, p, length / kv->P)) emxi_sketch_superpage(j->k, kv, table + p + 1 - per, head);
  }
}

static emx_status run_write(emx_ctx *ctx, const emxi_kv_write *w) {
  emx_kv *kv = w->kv;
  job j = {.k = emxi_cpu_of(ctx)->k, .kv = kv, .w = w};
  EMX_TRY(emxi_parallel(ctx, (int64_t)w->n_copies * kv->G, copy_page, &j));
  EMX_TRY(emxi_parallel(ctx, (int64_t)w->batch->batch * kv->G, write_tokens, &j));
  EMX_TRY(emxi_kv_file_end(kv, "append"));
  bool complete = false;
  for (int32_t b = 0; kv->sketch.group && b < w->batch->batch; b++) {
    int64_t length;
    const int32_t *table = emxi_kv_entry(kv, w->batch, b, &length);
    const int64_t from = length / kv->P, to = (length + (w->n ? w->n[b] : w->t)) / kv->P;
    complete |= to > from;
    if (to <= from || kv->sketch.mapped) continue;
    emxi_sketch_learn(j.k, kv, table + from, to - from);
    EMX_TRY(emxi_kv_file_end(kv, "append"));
    kv->sketch.mapped = 1;
  }
  return complete ? emxi_parallel(ctx, (int64_t)w->batch->batch * kv->G, sketch_tokens, &j) : EMX_OK;
}
emx_status emxi_cpu_kv_write(emx_ctx *ctx, const emxi_kv_write *w) {
  EMX_TRY(emxi_kv_file_begin(w->kv, "append"));
  EMX_TRY(run_write(ctx, w));
  return emxi_kv_file_end(w->kv, "append");
}

static void summarize_page(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  const emx_kv *kv = j->kv;
  const int32_t page = j->pages[i / kv->G], head = (int32_t)(i % kv->G), n = j->tokens ? j->tokens[i / kv->G] : kv->P;
  const size_t step = (size_t)kv->k_token * emx_dtype_size(kv->dtype);
  if (!n) return;
  const char *keys = emxi_kv_keys(kv, page, head, 0, n, kv->file ? kv->file->bench + worker * kv->file->bench_size : NULL);
  page_state s;
  state_reset(&s, kv->D);
  for (int32_t t = 0; t < n; t++) state_add(j->k, kv, keys + (size_t)t * step, &s);
  state_store(j->k, kv, page, head, keys, &s);
}

/* Sketches of the listed pages that are complete; 64/P of them next to each other, from a multiple of that number on, are a
 * superpage. */
static void sketch_listed(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  const emx_kv *kv = j->kv;
  const int64_t at = i / kv->G;
  const int32_t head = (int32_t)(i % kv->G), per = EMXI_SUPER / kv->P;
  (void)worker;
  if (j->tokens && j->tokens[at] != kv->P) return;
  emxi_sketch_page(j->k, kv, j->pages[at], head);
  bool all = (at + 1) % per == 0;
  for (int32_t p = 1; all && p < per; p++) all = !j->tokens || j->tokens[at - p] == kv->P;
  if (all) emxi_sketch_superpage(j->k, kv, j->pages + at + 1 - per, head);
}

static emx_status run_summarize(emx_ctx *ctx, emx_kv *kv, const int32_t *pages, const int32_t *tokens, int64_t n) {
  job j = {.k = emxi_cpu_of(ctx)->k, .kv = kv, .pages = pages, .tokens = tokens};
  EMX_TRY(emxi_parallel(ctx, n * kv->G, summarize_page, &j));
  if (!kv->sketch.group) return EMX_OK;
  for (int64_t i = 0, end; !kv->sketch.mapped && i < n; i = end + 1) {
    for (end = i; end < n && (!tokens || tokens[end] == kv->P); end++) continue;
    if (end == i) continue;
    emxi_sketch_learn(j.k, kv, pages + i, end - i);
    EMX_TRY(emxi_kv_file_end(kv, "summaries"));
    kv->sketch.mapped = 1;
  }
  return emxi_parallel(ctx, n * kv->G, sketch_listed, &j);
}
emx_status emxi_cpu_kv_summarize(emx_ctx *ctx, emx_kv *kv, const int32_t *pages, const int32_t *tokens, int64_t n) {
  EMX_TRY(emxi_kv_file_begin(kv, "summaries"));
  EMX_TRY(run_summarize(ctx, kv, pages, tokens, n));
  return emxi_kv_file_end(kv, "summaries");
}
