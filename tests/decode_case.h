/* One decode problem: a cache filled with known data through the public interface, queries, and a float64 reference computed from
 * what the cache stores. Used by test_decode.c and test_decode_props.c. */
#ifndef DECODE_CASE_H
#define DECODE_CASE_H

#include <stdio.h>
#include <stdlib.h>

#include "base/base.h"
#include "base/num.h"
#include "entmax/entmax.h"

enum { DATA_IID, DATA_AR, DATA_TOPIC, DATA_FLAT, DATA_EQUAL, DATA_NEEDLE, DATA_OUTLIER, DATA_HUGE, DATA_WIDE, DATA_KINDS };

typedef struct decode_case {
  /* set by the caller; zero means the default */
  int32_t B, H, G, S, D, P, dtype, layout, summaries, data, q_dtype, o_dtype;
  int64_t len[4];
  double alpha;
  float scale, gain;     /* gain: of DATA_WIDE's channels, default 50 */
  int32_t kv_memory;     /* of emx_kv_opts, for the cache on a GPU */
  bool alibi, in_decode; /* in_decode: the last S tokens go in through emx_decode */
  const char *file;      /* of emx_kv_opts */
  uint64_t seed;
  /* made */
  emx_ctx *ctx;
  emx_kv *kv;
  int32_t seqs[4];
  int64_t max_len;
  float *q, *k, *v, *slopes; /* q [B,H,S,D]; k, v [B,G,max_len,D]: as stored, after rounding */
  void *q_data, *o_data, *k_new, *v_new, *workspace;
  size_t workspace_bytes;
  emx_tensor tq, to, tk, tv, ts, tp, tn, tb;
  int32_t *pages, *n_pages;
  float *bound;
  emx_report *reports;
  emx_decode_io io;
  emx_kv_batch batch;
} decode_case;

#define CASE_OK(call)                                                                                  \
  do {                                                                                                 \
    emx_status case_status_ = (call);                                                                  \
    if (case_status_) fail_msg("%s: %s (%s)", #call, emx_status_name(case_status_), emx_last_error()); \
  } while (0)

static inline void *case_take(size_t n) {
  void *p = calloc(n ? n : 1, 1);
  if (!p) abort();
  return p;
}
static inline float case_round(float x, int32_t dtype) {
  double cell;
  emxi_store(&cell, dtype, 0, (double)x);
  return (float)emxi_load(&cell, dtype, 0);
}
static inline int64_t case_row(const decode_case *c, int b, int h, int s) { return ((int64_t)b * c->H + h) * c->S + s; }
static inline float *case_key(const decode_case *c, int b, int g, int64_t j) {
  return c->k + (((int64_t)b * c->G + g) * c->max_len + j) * c->D;
}
static inline float *case_value(const decode_case *c, int b, int g, int64_t j) {
  return c->v + (((int64_t)b * c->G + g) * c->max_len + j) * c->D;
}

/* Keys of one head. `toward` is a query of the head, so that needles and topics have something to be found by. */
static inline void case_keys(const decode_case *c, uint64_t stream, const float *toward, float *k, int64_t n) {
  const int D = c->D;
  const float gain = c->gain > 0 ? c->gain : 50, small = 4 / sqrtf(15 + gain * gain);
  float *z = case_take(sizeof(float) * (size_t)(n * D));
  emxi_normals(c->seed, stream, z, n * D);
  for (int64_t j = 0; j < n; j++)
    for (int d = 0; d < D; d++) {
      float x = z[j * D + d], *out = k + j * D + d;
      switch (c->data) {
        case DATA_AR: *out = j ? 0.97f * out[-D] + 0.2431f * x : x; break;
        case DATA_TOPIC: *out = 2.0f * z[j / 40 * 40 % n * D + d] + 0.25f * x; break;
        case DATA_FLAT: *out = 0.05f * x; break;
        case DATA_EQUAL: *out = 0.25f * (float)(d % 5); break;
        case DATA_NEEDLE: *out = j % 97 == 50 ? 3.0f * toward[d] : 0.01f * x; break; /* one among fifteen tiny ones */
        case DATA_OUTLIER: *out = d == 3 ? 40.0f + 0.5f * x : x; break;
        case DATA_HUGE: *out = 100.0f * x; break;
        case DATA_WIDE: *out = (d % 16 == 3 ? gain : 1.0f) * x * small; break; /* scores deviate by 1 */
        default: *out = x;
      }
    }
  free(z);
}

static inline emx_tensor case_tensor(const decode_case *c, void *data, int32_t dtype, int heads, int64_t tokens, int32_t layout) {
  int64_t shape[4] = {c->B, layout == EMX_LAYOUT_BHND ? heads : tokens, layout == EMX_LAYOUT_BHND ? tokens : heads, c->D};
  return emx_tensor_view(data, dtype, 4, shape);
}
/* Element (b, head, token) of such a tensor. */
static inline int64_t case_at(const decode_case *c, int heads, int64_t tokens, int32_t layout, int b, int h, int64_t t) {
  return layout == EMX_LAYOUT_BHND ? ((b * (int64_t)heads + h) * tokens + t) * c->D : ((b * tokens + t) * heads + h) * c->D;
}

static inline void case_open(decode_case *c, emx_ctx *ctx) {
  if (!c->B) c->B = 1;
  if (!c->S) c->S = 1;
  if (!c->P) c->P = 16;
  if (!c->G) c->G = 1;
  if (!c->H) c->H = c->G;
  if (!c->D) c->D = 32;
  if (!c->dtype) c->dtype = EMX_F32;
  if (!c->q_dtype) c->q_dtype = EMX_F32;
  if (!c->o_dtype) c->o_dtype = EMX_F32;
  if (!c->alpha) c->alpha = 1.5;
  if (!c->summaries) c->summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS;
  if (c->summaries < 0) c->summaries = 0;
  c->ctx = ctx;
  const int D = c->D, S = c->S;
  int64_t pages = 4;
  for (int b = 0; b < c->B; b++) {
    if (c->len[b] > c->max_len) c->max_len = c->len[b];
    pages += (c->len[b] + c->P - 1) / c->P;
  }
  const size_t rows = (size_t)c->B * (size_t)c->H * (size_t)S;
  c->q = case_take(sizeof(float) * rows * (size_t)D);
  c->k = case_take(sizeof(float) * (size_t)(c->B * c->G * c->max_len * D));
  c->v = case_take(sizeof(float) * (size_t)(c->B * c->G * c->max_len * D));
  c->q_data = case_take(sizeof(float) * rows * (size_t)D);
  c->o_data = case_take(sizeof(float) * rows * (size_t)D);
  c->slopes = case_take(sizeof(float) * (size_t)c->H);
  emxi_normals(c->seed, 1, c->q, (int64_t)rows * D);
  for (int b = 0; b < c->B; b++)
    for (int g = 0; g < c->G; g++) {
      float *k = case_key(c, b, g, 0), *v = case_value(c, b, g, 0);
      case_keys(c, (uint64_t)(100 + b * 50 + g), c->q + case_row(c, b, g * (c->H / c->G), 0) * D, k, c->len[b]);
      emxi_normals(c->seed, (uint64_t)(500 + b * 50 + g), v, c->len[b] * D);
      for (int64_t i = 0; i < c->len[b] * D; i++) k[i] = case_round(k[i], c->dtype), v[i] = case_round(v[i], c->dtype);
    }
  for (int h = 0; c->alibi && h < c->H; h++)
    c->slopes[h] = h % 3 == 1 ? 0 : ldexpf(h % 3 ? -1 : 1, -1 - h % 6); /* mixed signs and zeros */

  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.dtype = c->dtype;
  o.kv_heads = c->G;
  o.head_dim = D;
  o.page_size = c->P;
  o.layout = c->layout;
  o.summaries = c->summaries;
  o.max_seqs = 5;
  o.max_pages = pages;
  o.file = c->file;
  CASE_OK(emx_kv_create(ctx, &o, &c->kv));
  for (int b = 0; b < c->B; b++) CASE_OK(emx_seq_create(c->kv, &c->seqs[b]));
  emx_kv_batch_init(&c->batch);
  /* In turns of 41 tokens, so that block tables are interleaved. */
  const int64_t held = c->in_decode ? S : 0;
  enum { TURN = 41 };
  float *kn = case_take(sizeof(float) * (size_t)(c->G * TURN * D)), *vn = case_take(sizeof(float) * (size_t)(c->G * TURN * D));
  for (int64_t at = 0; at < c->max_len; at += TURN)
    for (int b = 0; b < c->B; b++) {
      int64_t n = c->len[b] - held - at;
      if (n <= 0) continue;
      if (n > TURN) n = TURN;
      for (int g = 0; g < c->G; g++)
        for (int64_t t = 0; t < n; t++) {
          const int64_t to = c->layout == EMX_LAYOUT_BHND ? (g * n + t) * D : (t * c->G + g) * D;
          memcpy(kn + to, case_key(c, b, g, at + t), sizeof(float) * (size_t)D);
          memcpy(vn + to, case_value(c, b, g, at + t), sizeof(float) * (size_t)D);
        }
      int64_t shape[4] = {1, c->layout == EMX_LAYOUT_BHND ? c->G : n, c->layout == EMX_LAYOUT_BHND ? n : c->G, D};
      emx_tensor tk = emx_tensor_view(kn, EMX_F32, 4, shape), tv = emx_tensor_view(vn, EMX_F32, 4, shape);
      emx_kv_batch one;
      emx_kv_batch_init(&one);
      one.batch = 1;
      one.seqs = &c->seqs[b];
      CASE_OK(emx_kv_append(ctx, c->kv, &one, &tk, &tv, NULL));
    }
  free(kn);
  free(vn);
  c->batch.batch = c->B;
  c->batch.seqs = c->seqs;

  const int32_t io_layout = c->layout; /* queries in the same order as the cache: both orders get tested */
  for (int b = 0; b < c->B; b++)
    for (int h = 0; h < c->H; h++)
      for (int s = 0; s < S; s++)
        for (int d = 0; d < D; d++) {
          float *x = c->q + case_row(c, b, h, s) * D + d;
          *x = case_round(*x, c->q_dtype);
          emxi_store(c->q_data, c->q_dtype, case_at(c, c->H, S, io_layout, b, h, s) + d, (double)*x);
        }
  c->tq = case_tensor(c, c->q_data, c->q_dtype, c->H, S, io_layout);
  c->to = case_tensor(c, c->o_data, c->o_dtype, c->H, S, io_layout);
  emx_decode_io_init(&c->io);
  c->io.layout = io_layout;
  c->io.alpha = c->alpha;
  c->io.scale = c->scale;
  c->io.q = &c->tq;
  c->io.o = &c->to;
  if (c->in_decode) {
    c->k_new = case_take(sizeof(float) * (size_t)(c->B * c->G * S * D));
    c->v_new = case_take(sizeof(float) * (size_t)(c->B * c->G * S * D));
    for (int b = 0; b < c->B; b++)
      for (int g = 0; g < c->G; g++)
        for (int s = 0; s < S; s++)
          for (int d = 0; d < D; d++) {
            const int64_t at = case_at(c, c->G, S, io_layout, b, g, s) + d;
            emxi_store(c->k_new, c->dtype, at, (double)case_key(c, b, g, c->len[b] - S + s)[d]);
            emxi_store(c->v_new, c->dtype, at, (double)case_value(c, b, g, c->len[b] - S + s)[d]);
          }
    c->tk = case_tensor(c, c->k_new, c->dtype, c->G, S, io_layout);
    c->tv = case_tensor(c, c->v_new, c->dtype, c->G, S, io_layout);
    c->io.k_new = &c->tk;
    c->io.v_new = &c->tv;
  }
  int64_t hs[1] = {c->H}, ps[4] = {c->B, c->H, S, c->max_len / c->P + 2};
  if (c->alibi) {
    c->ts = emx_tensor_view(c->slopes, EMX_F32, 1, hs);
    c->io.alibi_slopes = &c->ts;
  }
  c->pages = case_take(sizeof(int32_t) * rows * (size_t)ps[3]);
  c->n_pages = case_take(sizeof(int32_t) * rows);
  c->bound = case_take(sizeof(float) * rows);
  c->tp = emx_tensor_view(c->pages, EMX_I32, 4, ps);
  c->tn = emx_tensor_view(c->n_pages, EMX_I32, 3, ps);
  c->tb = emx_tensor_view(c->bound, EMX_F32, 3, ps);
  c->io.pages = &c->tp;
  c->io.n_pages = &c->tn;
  c->io.bound = &c->tb;
  c->reports = case_take(sizeof(emx_report) * rows);
  c->io.reports = c->reports;
}

static inline void case_close(decode_case *c) {
  emx_kv_destroy(c->kv);
  free(c->q), free(c->k), free(c->v), free(c->q_data), free(c->o_data), free(c->slopes), free(c->k_new), free(c->v_new);
  free(c->pages), free(c->n_pages), free(c->bound), free(c->reports), free(c->workspace);
}

/* The workspace of exactly the size asked for, placed one byte off alignment. */
static inline void *case_workspace(decode_case *c, const emx_select_desc *select) {
  CASE_OK(emx_decode_workspace_size(c->ctx, c->kv, select, &c->io, c->max_len, &c->workspace_bytes));
  free(c->workspace);
  c->workspace = case_take(c->workspace_bytes + 1);
  return (char *)c->workspace + 1;
}
static inline emx_status case_decode(decode_case *c, const emx_select_desc *select) {
  memset(c->reports, 0xee, sizeof(emx_report) * (size_t)(c->B * c->H * c->S));
  void *w = case_workspace(c, select);
  return emx_decode(c->ctx, c->kv, &c->batch, select, &c->io, w, c->workspace_bytes);
}
static inline emx_status case_select(decode_case *c, const emx_select_desc *select) {
  void *w = case_workspace(c, select);
  return emx_select(c->ctx, c->kv, &c->batch, select, &c->io, w, c->workspace_bytes);
}
static inline double case_out(const decode_case *c, int b, int h, int s, int d) {
  return emxi_load(c->o_data, c->o_dtype, case_at(c, c->H, c->S, c->layout, b, h, s) + d);
}
static inline emx_select_desc case_desc(int32_t kind, int64_t budget) {
  emx_select_desc d;
  emx_select_desc_init(&d);
  d.kind = kind;
  d.budget = budget;
  return d;
}

/* How far an output element may be from the oracle's when scores up to `size` carry float rounding. Up to alpha 2 a weight moves
 * by no more than a small multiple of that; beyond, a token at the threshold has weight y^b with b < 1, whose slope there is
 * infinite. */
static inline double case_tolerance(const decode_case *c, double size) {
  return c->alpha > 2 ? 2 * pow(1e-6 * size, 1 / (c->alpha - 1)) : 2e-5 * size;
}

/* Exact scores of a row in float64; tokens whose page is not in read[] (NULL: all) get -inf. Returns how many keys the row
 * sees. */
static inline int64_t case_scores(const decode_case *c, int b, int h, int s, const uint8_t *read, double *out) {
  const int g = h / (c->H / c->G);
  const int64_t n = c->len[b] - c->S + s + 1;
  const float *q = c->q + case_row(c, b, h, s) * c->D;
  const double scale = c->scale != 0 ? (double)c->scale : (double)(1.0f / sqrtf((float)c->D));
  for (int64_t j = 0; j < n; j++) {
    double dot = 0;
    const float *k = case_key(c, b, g, j);
    for (int d = 0; d < c->D; d++) dot += (double)q[d] * (double)k[d];
    out[j] = scale * dot + (double)c->slopes[h] * (double)(j - (n - 1));
    if (read && !read[j / c->P]) out[j] = -INFINITY;
  }
  return n > 0 ? n : 0;
}
/* o, tau and support of a row over the pages in read[]. p [max_len] and s [max_len] are scratch that the caller may look at. */
static inline double case_reference(const decode_case *c, int b, int h, int s, const uint8_t *read, double *score, double *p,
                                    double *o, int64_t *support) {
  const int g = h / (c->H / c->G);
  const int64_t n = case_scores(c, b, h, s, read, score);
  const double tau = emxi_oracle_entmax(score, n, c->alpha, p, support);
  for (int d = 0; d < c->D; d++) o[d] = 0;
  for (int64_t j = 0; j < n; j++)
    if (p[j] != 0)
      for (int d = 0; d < c->D; d++) o[d] += p[j] * (double)case_value(c, b, g, j)[d];
  return tau;
}

#endif
