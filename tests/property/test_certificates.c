/* SPDX-License-Identifier: Apache-2.0
 * Certificates against the truth: CERTIFIED on caches of many shapes and kinds of data, adversarial ones among them, compared
 * with float64 attention and, bit for bit, with ALL. `test_certificates [decodes [seed [shortest [longest]]]]`; a decode is one
 * query head. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/num.h"
#include "cpu/certified.h"
#include "entmax/entmax.h"

static int64_t want = 3000, shortest = 1, longest = 20000;
static uint64_t seed = 1;

enum {
  IID,
  AR,
  TOPIC,
  FLAT,
  EQUAL,
  NEEDLE,
  OUTLIER,
  HUGE_SCORES,
  DENORMAL,
  DUPLICATE,
  AT_TAU,
  CONSTANT_PAGES,
  MASKED,
  LATE,
  OFFSET,
  TAILS,
  SINK,
  BAD,
  KINDS
};
static const char *const names[KINDS] = {"iid",     "ar",   "topic",    "flat",      "equal",  "needle",
                                         "outlier", "huge", "denormal", "duplicate", "at-tau", "constant-pages",
                                         "masked",  "late", "offset",   "tails",     "sink",   "nonfinite"};
static const double alphas[] = {1.25, 4. / 3, 1.5, 1.75, 2};
static const int32_t dims[] = {64, 16, 128, 32, 80, 20, 96, 64, 256, 128};

/* ---- a generator of numbers that depends on (seed, case) */
static uint64_t stream_now, counter;
static uint32_t word(void) {
  uint32_t w[4];
  emxi_philox(seed, stream_now, counter++, w);
  return w[0];
}
static int64_t below(int64_t n) { return (int64_t)(((uint64_t)word() << 16 ^ word()) % (uint64_t)n); }
static double uniform(void) { return emxi_uniform(word()); }

typedef struct tally {
  int64_t lists, lists_certified, lists_bounded, softmax, softmax_ladder;
  int64_t decodes, certified, ladder, half, near, long_runs, by_kind[KINDS], ladder_by_kind[KINDS];
  double share;
} tally;
static tally sum;

typedef struct problem {
  int kind;
  int32_t D, P, G, H, dtype, layout;
  int64_t n;
  bool alibi, boxes;
  emx_kv *kv;
  int32_t seq;
  float *k, *v; /* [G,n,D] as stored */
  float slopes[16];
} problem;

static float rounded(double x, int32_t dtype) {
  double cell;
  emxi_store(&cell, dtype, 0, x);
  return (float)emxi_load(&cell, dtype, 0);
}

static void fill(problem *c) {
  const int64_t n = c->n;
  const int D = c->D;
  for (int g = 0; g < c->G; g++) {
    float *k = c->k + g * n * D, *v = c->v + g * n * D;
    emxi_normals(seed, stream_now << 8 | (uint64_t)g, k, n * D);
    for (int64_t i = 0; i < n * D; i++)
      v[i] = (float)((i * 2654435761u >> 7 & 1023) * 0x1p-9 - 1); /* only their bits are compared */
    float topic[256], dir[256];
    emxi_normals(seed, stream_now << 8 | 200, dir, D);
    const double gain = pow(10, uniform() * 2);
    const int64_t hot = below(n), late = below(n);
    for (int64_t j = 0; j < n; j++) {
      float *x = k + j * D;
      if (c->kind == TOPIC && j % 64 == 0) emxi_normals(seed, stream_now << 8 | 201, topic, D), topic[j / 64 % D] += 3;
      for (int d = 0; d < D; d++) {
        switch (c->kind) {
          case AR: x[d] = j ? 0.99f * x[d - D] + 0.141f * x[d] : x[d]; break;
          case TOPIC: x[d] = 0.9f * topic[(d + j / 64 * 7) % D] + 0.45f * x[d]; break;
          case FLAT: x[d] *= 0.05f; break;
          case EQUAL: x[d] = dir[d]; break;
          case NEEDLE: x[d] = j == hot ? 30 * dir[d] : j % 16 == hot % 16 ? 3e-3f * x[d] : 1e-3f * x[d]; break;
          case OUTLIER: x[d] *= d % 16 == 3 ? (float)gain : 1; break;
          case HUGE_SCORES: x[d] *= (float)gain * 20; break;
          case DENORMAL: x[d] *= c->dtype == EMX_F16 ? 3e-7f : 3e-39f; break;
          case DUPLICATE: x[d] = j % 37 == hot % 37 ? 2 * dir[d] : x[d]; break;
          case AT_TAU: { /* a single score that makes the threshold 0, and others at it, above and below */
            const float near[5] = {0, 0x1p-20f, -0x1p-20f, 5e-5f * x[1 % D], -0.25f};
            x[d] = d ? 0 : j == hot ? 1 : near[(j * 7 + hot) % 5];
            break;
          }
          case CONSTANT_PAGES: x[d] = j % 16 ? x[d - D] : x[d]; break;
          case LATE: x[d] *= j < late ? 1e-3f : 1; break;
          case OFFSET: x[d] += 100 * dir[d]; break;
          case TAILS: x[d] = x[d] * x[d] * x[d]; break;
          case SINK: x[d] = j == 0 ? 4 * dir[d] : x[d] - 0.2f * dir[d]; break;
          default: break;
        }
      }
      if (c->kind == MASKED && (j + hot) % 11 == 0) x[0] = -INFINITY;
      if (c->kind == BAD && j == hot && hot % 2) x[j % D] = hot % 4 == 1 ? NAN : INFINITY;
      for (int d = 0; d < D; d++) x[d] = rounded((double)x[d], c->dtype), v[j * D + d] = rounded((double)v[j * D + d], c->dtype);
    }
  }
}

static void check(emx_status s) {
  if (s) fail_msg("%s (%s)", emx_status_name(s), emx_last_error());
}

static void append(emx_ctx *ctx, const problem *c, int32_t seq, int64_t from, int64_t n) {
  float *kn = malloc(sizeof(float) * (size_t)(c->G * n * c->D)), *vn = malloc(sizeof(float) * (size_t)(c->G * n * c->D));
  for (int g = 0; g < c->G; g++)
    for (int64_t t = 0; t < n; t++) {
      const int64_t to = (c->layout == EMX_LAYOUT_BHND ? g * n + t : t * c->G + g) * c->D;
      memcpy(kn + to, c->k + (g * c->n + from + t) * c->D, sizeof(float) * (size_t)c->D);
      memcpy(vn + to, c->v + (g * c->n + from + t) * c->D, sizeof(float) * (size_t)c->D);
    }
  const bool hnd = c->layout == EMX_LAYOUT_BHND;
  int64_t shape[4] = {1, hnd ? c->G : n, hnd ? n : c->G, c->D};
  emx_tensor tk = emx_tensor_view(kn, EMX_F32, 4, shape), tv = emx_tensor_view(vn, EMX_F32, 4, shape);
  emx_kv_batch one;
  emx_kv_batch_init(&one);
  one.batch = 1;
  one.seqs = &seq;
  check(emx_kv_append(ctx, c->kv, &one, &tk, &tv, NULL));
  free(kn);
  free(vn);
}

static void open(emx_ctx *ctx, problem *c) {
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.dtype = c->dtype;
  o.kv_heads = c->G;
  o.head_dim = c->D;
  o.page_size = c->P;
  o.layout = c->layout;
  o.summaries =
      EMX_SUMMARY_SKETCH | (word() % 2 ? EMX_SUMMARY_RESIDUAL : 0) | (c->boxes ? EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS : 0);
  o.max_seqs = 3;
  o.max_pages = 2 * (c->n / c->P + 2);
  check(emx_kv_create(ctx, &o, &c->kv));
  check(emx_seq_create(c->kv, &c->seq));
  /* prompts, single tokens, forks that go on alone, and pages that are cut into and written again */
  for (int64_t at = 0; at < c->n;) {
    const uint32_t what = word() % 16;
    int64_t m = what == 0 ? 1 : what < 4 ? 1 + below(70) : 1 + below(3000);
    if (m > c->n - at) m = c->n - at;
    append(ctx, c, c->seq, at, m);
    at += m;
    if (what == 5 && at > 1) {
      const int64_t back = at - below(at < 300 ? at : 300);
      check(emx_seq_truncate(c->kv, c->seq, back));
      at = back;
    } else if (what == 6 && at < c->n / 2) {
      int32_t child;
      check(emx_seq_fork(c->kv, c->seq, &child));
      append(ctx, c, child, at, 1 + below(40) < c->n - at ? 1 : c->n - at);
      check(emx_seq_destroy(c->kv, c->seq));
      c->seq = child;
      at = 0;
      check(emx_seq_length(c->kv, child, &at));
    }
  }
}

/* Scores in float64; what is NaN or +inf in any of them makes the row NaN. */
static double scores(const problem *c, const float *q, int h, double scale, double *s, double *size) {
  const float *k = c->k + (int64_t)(h / (c->H / c->G)) * c->n * c->D;
  double m = -INFINITY;
  *size = 1;
  for (int64_t j = 0; j < c->n; j++, k += c->D) {
    double a = 0, b = 0;
    for (int d = 0; d < c->D; d++) a += (double)q[d] * (double)k[d];
    s[j] = scale * a + (double)c->slopes[h] * (double)(j - (c->n - 1));
    if (s[j] != s[j] || s[j] == INFINITY) return NAN;
    if (s[j] > m) m = s[j];
    for (int d = 0; d < c->D; d++) b += fabs((double)q[d] * (double)k[d]);
    if (b < INFINITY && b * scale > *size) *size = b * scale;
  }
  if ((double)c->slopes[h] != 0) *size += fabs((double)c->slopes[h]) * (double)c->n;
  return m;
}

/* Exact threshold of scores. Newton from the left gives lower bounds (alpha <= 2), below which nothing matters; the oracle does
 * the rest. */
static double threshold(const double *s, int64_t n, double m, double alpha, double *near, double *p) {
  const double a = alpha - 1, b = 1 / a;
  double t = a * m - 1;
  int64_t c = 0, support;
  for (int64_t j = 0; j < n; j++)
    if (a * s[j] > t - 1e-7 * (1 + fabs(t))) near[c++] = s[j];
  for (int turn = 0; turn < 12; turn++) {
    double f = 0, g = 0;
    for (int64_t j = 0; j < c; j++) {
      const double y = a * near[j] - t;
      if (y <= 0) continue;
      const double w = alpha == 2 ? 1 : alpha == 1.5 ? y : alpha == 1.25 ? y * y * y : pow(y, b - 1);
      f += w * y;
      g += w;
    }
    if (!(f > 1)) break;
    t += (f - 1) * a / g * (1 - 1e-9);
    int64_t left = 0;
    for (int64_t j = 0; j < c; j++)
      if (a * near[j] > t - 1e-7 * (1 + fabs(t))) near[left++] = near[j];
    c = left;
  }
  return emxi_oracle_entmax(near, c, alpha, p, &support);
}

static void decode(emx_ctx *ctx, const problem *c, const emx_select_desc *select, const emx_decode_io *io) {
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &c->seq;
  size_t bytes;
  check(emx_decode_workspace_size(ctx, c->kv, select, io, c->n, &bytes));
  void *work = malloc(bytes);
  check(emx_decode(ctx, c->kv, &batch, select, io, work, bytes));
  free(work);
}

static int descending(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return x < y ? 1 : x > y ? -1 : 0;
}

/* Softmax with max_delta against float64: what was kept is worth at most what as many of the best keys are, and no element of the
 * output is further off than the dropped mass times the range of V, which is 2. */
static void run_softmax(emx_ctx *ctx, const problem *c, emx_decode_io io, const double *z, const double *m, const double *size) {
  emx_report reports[16];
  float *o = malloc(sizeof(float) * (size_t)(c->H * c->D));
  double *p = malloc(sizeof(double) * (size_t)c->n);
  int64_t qs[4] = {1, c->H, 1, c->D};
  const emx_tensor to = emx_tensor_view(o, EMX_F32, 4, qs);
  emx_select_desc select;
  emx_select_desc_init(&select);
  select.kind = EMX_SELECT_CERTIFIED;
  select.max_delta = pow(10, -4 * uniform());
  io.alpha = 1, io.o = &to, io.reports = reports;
  decode(ctx, c, &select, &io);
  for (int h = 0; h < c->H; h++) {
    const emx_report *r = &reports[h];
    sum.softmax++;
    sum.softmax_ladder += r->path == EMX_PATH_LADDER;
    assert_true(r->delta_bound >= 0 && r->delta_bound <= 1);
    if (!(m[h] > -INFINITY)) continue;
    assert_true((double)r->delta_bound <= select.max_delta * (1 + 1e-6));
    double all = 0, kept = 0, out[256] = {0};
    for (int64_t j = 0; j < c->n; j++) all += p[j] = exp(z[h * c->n + j] - m[h]);
    const float *v = c->v + (int64_t)(h / (c->H / c->G)) * c->n * c->D;
    for (int64_t j = 0; j < c->n; j++)
      for (int d = 0; d < c->D; d++) out[d] += p[j] / all * (double)v[j * c->D + d];
    qsort(p, (size_t)c->n, sizeof *p, descending);
    for (int64_t j = 0; j < r->support; j++) kept += p[j];
    /* scores, and so the weights' logarithms, are off by this at most; weights below 1e-38 are zero */
    const double band = expm1(2 * (c->D + 8) * 0x1p-23 * size[h]) + 1e-5;
    double off = 0;
    for (int d = 0; d < c->D; d++) off = fmax(off, fabs(out[d] - (double)o[h * c->D + d]));
    if (!(1 - kept / all <= (double)r->delta_bound + 1e-9) || !(off <= 2 * ((double)r->delta_bound + band)))
      fail_msg(
          "softmax: seed %llu case %llu %s n %lld D %d P %d head %d max_delta %g: delta_bound %g, kept %.9g; output off by %g",
          (unsigned long long)seed, (unsigned long long)stream_now, names[c->kind], (long long)c->n, c->D, c->P, h,
          select.max_delta, (double)r->delta_bound, kept / all, off);
  }
  free(o), free(p);
}

/* Page lists against float64: those of CERTIFIED, TOPK and GAUSSIAN, of pages that hold a key near or above the threshold (where
 * nothing may be wrong with leaving out the others), and at random. `all` and `truth`: what ALL gave. */
static void run_list(emx_ctx *ctx, const problem *c, emx_decode_io io, const double *z, double stretch, const double *m,
                     const double *size, const float *all, const emx_report *truth, double *near, double *p) {
  const int64_t pages = (c->n + c->P - 1) / c->P;
  const int32_t H = c->H;
  int32_t *list = malloc(sizeof(int32_t) * (size_t)(H * pages)), n[16];
  uint8_t *read = malloc((size_t)(H * pages));
  float *o = malloc(sizeof(float) * (size_t)(H * c->D));
  emx_report reports[16];
  int64_t qs[4] = {1, H, 1, c->D}, ls[4] = {1, H, 1, pages}, ns[3] = {1, H, 1};
  const emx_tensor to = emx_tensor_view(o, EMX_F32, 4, qs), tl = emx_tensor_view(list, EMX_I32, 4, ls),
                   tn = emx_tensor_view(n, EMX_I32, 3, ns);
  emx_select_desc select;
  emx_select_desc_init(&select);
  io.o = &to, io.reports = reports, io.pages = &tl, io.n_pages = &tn;
  const int kind = (int)(word() % (c->boxes ? 6 : 4));
  memset(read, 0, (size_t)(H * pages));
  if (kind < 3) {
    select.kind = EMX_SELECT_PAGES;
    const double margin = kind == 0 ? 0 : pow(10, -4 * uniform());
    const uint32_t share = 1 + word() % 8;
    for (int h = 0; h < H; h++) {
      n[h] = 0;
      for (int64_t j = 0; j < c->n; j++)
        read[h * pages + j / c->P] |= kind < 2 && io.alpha > 1 &&
                                      (io.alpha - 1) * stretch * z[h * c->n + j] > (double)truth[h].tau - margin * (io.alpha - 1);
      if (kind == 1 && word() % 2) read[h * pages + below(pages)] = 0; /* and one missing */
      for (int64_t i = 0; i < pages; i++) {
        read[h * pages + i] |= kind == 2 && word() % 8 < share;
        if (read[h * pages + i]) list[h * pages + n[h]++] = (int32_t)i;
      }
      for (int64_t i = n[h]; i < pages; i++) list[h * pages + i] = -1;
    }
  } else {
    select.kind = kind == 3 ? EMX_SELECT_CERTIFIED : kind == 4 ? EMX_SELECT_TOPK : EMX_SELECT_GAUSSIAN;
    select.budget = 1 + below(c->n);
    emx_kv_batch batch;
    emx_kv_batch_init(&batch);
    batch.batch = 1;
    batch.seqs = &c->seq;
    size_t bytes;
    check(emx_decode_workspace_size(ctx, c->kv, &select, &io, c->n, &bytes));
    void *work = malloc(bytes);
    check(emx_select(ctx, c->kv, &batch, &select, &io, work, bytes));
    free(work);
    for (int h = 0; h < H; h++)
      for (int32_t i = 0; i < n[h]; i++) read[h * pages + list[h * pages + i]] = 1;
    if (kind == 3) select.kind = EMX_SELECT_PAGES;
  }
  decode(ctx, c, &select, &io);
  for (int h = 0; h < H; h++) {
    const emx_report *r = &reports[h];
    const bool sure = r->flags & EMX_REPORT_CERTIFIED;
    sum.lists++;
    sum.lists_certified += sure;
    sum.lists_bounded += !sure && r->delta_bound < 0.5f;
    assert_true(!sure || r->delta_bound == 0);
    if (kind == 3 && !sure && !(r->flags & EMX_REPORT_NONFINITE))
      fail_msg(
          "list of CERTIFIED, not certified: seed %llu case %llu %s n %lld D %d P %d alpha %g head %d: %.9g unread, tau %.9g",
          (unsigned long long)seed, (unsigned long long)stream_now, names[c->kind], (long long)c->n, c->D, c->P, io.alpha, h,
          (double)r->max_unread, (double)r->tau);
    if (sure && memcmp(all + h * c->D, o + h * c->D, sizeof(float) * (size_t)c->D))
      fail_msg("list %d: seed %llu case %llu %s n %lld D %d P %d alpha %g head %d: certified, and not ALL's answer", kind,
               (unsigned long long)seed, (unsigned long long)stream_now, names[c->kind], (long long)c->n, c->D, c->P, io.alpha,
               h);
    if (!(m[h] > -INFINITY)) continue;
    const double a = io.alpha - 1;
    double *s = p + c->n, top = -INFINITY, dropped = 0, total = 0;
    for (int64_t j = 0; j < c->n; j++) s[j] = z[h * c->n + j] * stretch;
    const double tau = a > 0 ? threshold(s, c->n, m[h] * stretch, io.alpha, near, p) : 0;
    for (int64_t j = 0; j < c->n; j++) {
      const double y = a * s[j] - tau, w = a > 0 ? y > 0 ? pow(y, 1 / a) : 0 : exp(s[j] - m[h] * stretch);
      total += w;
      if (read[h * pages + j / c->P]) continue;
      top = fmax(top, s[j]);
      dropped += w;
    }
    dropped /= a > 0 ? 1 : total;
    /* of the reference: scores and tau in double */
    const double off = 1e-9 + 1e-12 * size[h] * stretch;
    if (!(dropped <= (double)r->delta_bound + off) || !((a > 0 ? a : 1) * top <= (double)r->max_unread + off))
      fail_msg(
          "list %d: seed %llu case %llu %s n %lld D %d P %d alpha %g head %d: dropped %.9g, bound %.9g; unread %.9g, bound %.9g",
          kind, (unsigned long long)seed, (unsigned long long)stream_now, names[c->kind], (long long)c->n, c->D, c->P, io.alpha,
          h, dropped, (double)r->delta_bound, (a > 0 ? a : 1) * top, (double)r->max_unread);
  }
  free(list), free(read), free(o);
}

static void run_problem(emx_ctx *ctx, problem *c) {
  const int64_t cells = c->G * c->n * c->D;
  c->k = malloc(sizeof(float) * (size_t)cells);
  c->v = malloc(sizeof(float) * (size_t)cells);
  fill(c);
  open(ctx, c);
  const int H = c->H, D = c->D;
  float *q = malloc(sizeof(float) * (size_t)(H * D)), *o = malloc(sizeof(float) * (size_t)(2 * H * D));
  double *s = malloc(sizeof(double) * (size_t)(c->n * H)), *near = malloc(sizeof(double) * (size_t)c->n),
         *p = malloc(sizeof(double) * 2 * (size_t)c->n), m[16], size[16];
  emx_report reports[2][16];
  for (int turn = 0; turn < 8 && sum.decodes < want; turn++) {
    emxi_normals(seed, stream_now << 8 | (uint64_t)(210 + turn), q, H * D);
    for (int h = 0; h < H; h++)
      for (int d = 0; d < D; d++) {
        float *x = &q[h * D + d];
        const float *key = c->k + ((int64_t)(h / (H / c->G)) * c->n + below(c->n)) * D;
        if (c->kind == TOPIC) *x = 0.8f * (float)key[d] + 0.6f * *x;
        if (c->kind == DENORMAL) *x *= c->dtype == EMX_F16 ? 1e6f : 1e37f;
        if (c->kind == AT_TAU) *x = d == 0;
        if (c->kind == MASKED && d == 0) *x = fabsf(*x);
        if (c->kind == BAD && turn % 4 == 2 && h == 0 && d == 3) *x = NAN;
        if (turn % 4 == 1 && h == 1) *x *= d == 5 ? 30 : 1; /* a query that leans on one channel */
        if (turn % 4 == 2 && h == 2) *x = 0;
      }
    const float scale = c->kind == AT_TAU ? 1 : turn % 4 == 1 ? 3 / sqrtf((float)D) : 0;
    for (int h = 0; h < H; h++)
      m[h] = scores(c, q + h * D, h, scale != 0 ? (double)scale : (double)(1 / sqrtf((float)D)), s + h * c->n, &size[h]);
    for (int x = 0; x < 5; x++) {
      emx_decode_io io;
      emx_decode_io_init(&io);
      io.alpha = alphas[x];
      io.scale = c->kind == AT_TAU ? (float)(1 / (alphas[x] - 1)) : scale;
      const double stretch = c->kind == AT_TAU ? (double)io.scale : 1;
      int64_t qs[4] = {1, H, 1, D}, hs[1] = {H};
      const emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, qs), ts = emx_tensor_view(c->slopes, EMX_F32, 1, hs);
      io.q = &tq;
      io.alibi_slopes = c->alibi ? &ts : NULL;
      for (int way = 0; way < 2; way++) {
        emx_select_desc select;
        emx_select_desc_init(&select);
        select.kind = way ? EMX_SELECT_CERTIFIED : EMX_SELECT_ALL;
        const emx_tensor to = emx_tensor_view(o + way * H * D, EMX_F32, 4, qs);
        io.o = &to;
        io.reports = reports[way];
        decode(ctx, c, &select, &io);
      }
      run_list(ctx, c, io, s, stretch, m, size, o, reports[0], near, p);
      if (x == turn % 5 && stretch == 1) run_softmax(ctx, c, io, s, m, size);
      for (int h = 0; h < H; h++) {
        const emx_report *r = &reports[1][h], *all = &reports[0][h];
        sum.decodes++;
        sum.by_kind[c->kind]++;
        if (memcmp(o + h * D, o + (H + h) * D, sizeof(float) * (size_t)D) && !(isnan(o[h * D]) && isnan(o[(H + h) * D])))
          fail_msg(
              "not ALL's bits: seed %llu case %llu %s n %lld D %d P %d alpha %g head %d turn %d: %.9g, ALL %.9g; support %d, ALL "
              "%d",
              (unsigned long long)seed, (unsigned long long)stream_now, names[c->kind], (long long)c->n, D, c->P, alphas[x], h,
              turn, (double)o[(H + h) * D], (double)o[h * D], r->support, all->support);
        assert_int_equal(r->select, EMX_SELECT_CERTIFIED);
        assert_int_equal(r->support, all->support);
        if (isnan(o[h * D])) {
          assert_int_equal(r->flags, EMX_REPORT_NONFINITE);
          continue;
        }
        /* nothing limits the ladder: it must end with a certificate */
        assert_true(r->flags == EMX_REPORT_CERTIFIED && r->delta_bound == 0 && r->stopped_by == EMX_STOP_DONE);
        assert_true(r->tokens >= r->support && r->tokens <= c->n && r->pages <= (c->n + c->P - 1) / c->P);
        sum.certified++;
        sum.ladder += r->path == EMX_PATH_LADDER;
        sum.ladder_by_kind[c->kind] += r->path == EMX_PATH_LADDER;
        sum.half += 2 * (int64_t)r->tokens < c->n;
        sum.share += (double)r->tokens / (double)c->n;
        sum.long_runs += c->n >= 1 << 18;
        if (!(m[h] > -INFINITY)) continue; /* float and double differ on what is masked: the bits above are the check */
        /* the stated rounding band: a score and the threshold are each within D 2^-23 of the sum of absolute terms */
        double *z = s + h * c->n;
        for (int64_t j = 0; j < c->n && stretch != 1; j++) z[j] *= stretch;
        const double top = m[h] * stretch, a = alphas[x] - 1, tau = threshold(z, c->n, top, alphas[x], near, p),
                     band = 2.0 * (D + 8) * 0x1p-23 * size[h] * stretch + 1e-9;
        int64_t least = 0, most = 0;
        bool near_tau = false;
        for (int64_t j = 0; j < c->n; j++) {
          const double y = a * z[j] - tau;
          least += y > a * band;
          most += y > -a * band;
          near_tau |= fabs(y) < 1e-4;
        }
        for (int64_t j = 0; j < c->n && stretch != 1; j++) z[j] /= stretch;
        sum.near += near_tau;
        if (!(fabs((double)r->tau - tau) <= a * band + 1e-6 * fabs(tau)) || r->support < least || r->support > most)
          fail_msg(
              "seed %llu case %llu %s n %lld D %d P %d alpha %g head %d turn %d: tau %.9g, true %.9g; support %d, true "
              "%lld..%lld",
              (unsigned long long)seed, (unsigned long long)stream_now, names[c->kind], (long long)c->n, D, c->P, alphas[x], h,
              turn, (double)r->tau, tau, r->support, (long long)least, (long long)most);
        assert_true((double)r->max_unread <= (double)r->tau + 1e-6 * (1 + fabs((double)r->tau)));
      }
    }
  }
  emx_kv_destroy(c->kv);
  free(c->k), free(c->v), free(q), free(o), free(s), free(near), free(p);
}

static char isa[32];
static void report(const char *when) {
  printf(
      "%s %lld decodes (%s, seed %llu, %lld..%lld keys): %lld certified, 0 wrong; ladder %lld, fewer than half of the keys read "
      "in %lld, mean "
      "share %.3f, a score within 1e-4 of tau in %lld, 256K keys or more in %lld\n",
      when, (long long)sum.decodes, isa, (unsigned long long)seed, (long long)shortest, (long long)longest,
      (long long)sum.certified, (long long)sum.ladder, (long long)sum.half, sum.share / (double)sum.certified,
      (long long)sum.near, (long long)sum.long_runs);
  printf("  page lists: %lld decodes, %lld certified, %lld bounded below a half; softmax: %lld decodes, ladder in %lld\n",
         (long long)sum.lists, (long long)sum.lists_certified, (long long)sum.lists_bounded, (long long)sum.softmax,
         (long long)sum.softmax_ladder);
  fflush(stdout);
}

static void test_campaign(void **state) {
  (void)state;
  emx_ctx *ctx;
  check(emx_ctx_create(NULL, &ctx));
  emx_ctx_info info = {.struct_size = sizeof info};
  check(emx_ctx_get_info(ctx, &info));
  snprintf(isa, sizeof isa, "%s", info.isa);
  int64_t reported = 0;
  const int64_t usual = emxi_certified_short;
  emxi_certified_short = 64;
  for (stream_now = 1; sum.decodes < want; stream_now++) {
    counter = 0;
    int kind = (int)(stream_now % KINDS);
    if (stream_now / KINDS % 2 && (kind == FLAT || kind == EQUAL || kind == MASKED || kind == BAD || kind == AT_TAU))
      kind = (int)below(KINDS);
    problem c = {.kind = kind, /* half as many of those where nothing can be left out */
                 .D = dims[below(10)],
                 .P = 16 << below(3),
                 .G = 1 + (int32_t)below(2)};
    c.H = c.G * (1 + (int32_t)below(word() % 8 ? 3 : 8));
    c.dtype = (int32_t[]){EMX_F32, EMX_F16, EMX_BF16}[below(3)];
    c.layout = (int32_t)below(2);
    c.n = (int64_t)((double)shortest * pow((double)longest / (double)shortest, uniform()) + 0.5);
    c.boxes = word() % 2;
    c.alibi = word() % 4 == 0 && c.kind != AT_TAU; /* where the scale differs by alpha */
    for (int h = 0; c.alibi && h < c.H; h++) c.slopes[h] = h % 3 == 1 ? 0 : ldexpf(h % 3 ? -1 : 1, -1 - h % 6);
    run_problem(ctx, &c);
    if (sum.decodes / 20000 > reported) {
      reported = sum.decodes / 20000;
      report("so far");
    }
  }
  emxi_certified_short = usual;
  emx_ctx_destroy(ctx);
  report("in all");
  for (int i = 0; i < KINDS; i++)
    printf("  %-15s %8lld decodes, ladder in %lld\n", names[i], (long long)sum.by_kind[i], (long long)sum.ladder_by_kind[i]);
  assert_true(sum.half * 8 > sum.decodes); /* a ladder that reads everything would pass all of the above */
}

int main(int argc, char **argv) {
  if (argc > 1) want = atoll(argv[1]);
  if (argc > 2) seed = strtoull(argv[2], NULL, 10);
  if (argc > 3) shortest = atoll(argv[3]);
  if (argc > 4) longest = atoll(argv[4]);
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_campaign)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
