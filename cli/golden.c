/* SPDX-License-Identifier: Apache-2.0
 * Tolerances. Inputs are exact in every dtype and every q.k is exact in float, so what is left is the float arithmetic of the
 * weights and of sums of at most 200 products: weights, outputs (|v| <= 1/2) and tau (|tau| < 8) within a few dozen units in the
 * last place of their scale; 1e-6 is what emx.h promises. A wrong threshold, mask, bias, page or head is off by 1e-3 and more.
 * float64 rows: 1e-12. A wrong support counts as an error of 1 and more. */
#include "golden.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

const golden golden_values = {
#include "golden_data.inc"
};

#define TRY(call)                \
  do {                           \
    emx_status status_ = (call); \
    if (status_) return status_; \
  } while (0)

enum { D = GOLDEN_D };
static const double LIMIT = 1e-6, LIMIT64 = 1e-12;
/* delta_bound is rounded up; what is left is the rounding of the sum of stored weights. */
static const double LIMIT_MASS = 1e-12;

/* n multiples of scale / 256 in [-scale/2, scale/2): scripts/golden.py has the same generator. */
static void numbers(uint32_t seed, int n, float scale, float *out) {
  for (int i = 0; i < n; i++) {
    seed = seed * 1664525u + 1013904223u;
    out[i] = (float)((int)(seed >> 24) - 128) * scale / 256;
  }
}

/* *worst = max(*worst, d), and NaN once d is. */
static void grow(double *worst, double d) {
  if (isnan(d) || d > *worst) *worst = d;
}
static void compare(double *worst, const float *got, const double *want, int n) {
  for (int i = 0; i < n; i++) grow(worst, fabs(got[i] - want[i]));
}
static void compare_counts(double *worst, const int32_t *got, const int *want, int n) {
  for (int i = 0; i < n; i++) grow(worst, abs(got[i] - want[i]));
}

static emx_status check_map(emx_ctx *ctx, const golden *want, golden_report report, void *user) {
  static const double alphas[GOLDEN_MAP_ROWS] = {1, 1.25, 1.5, 2, 4};
  enum { N = GOLDEN_MAP_N };
  const int64_t shape[2] = {1, N};
  for (int a = 0; a < GOLDEN_MAP_ROWS; a++)
    for (int wide = 0; wide < 2; wide++) {
      float x[N], p[N], tau;
      double x64[N], p64[N], tau64, e = 0;
      int32_t support;
      numbers(11 + (uint32_t)a, N, 8, x);
      for (int i = 0; i < N; i++) x64[i] = x[i];
      emx_entmax_desc desc;
      emx_entmax_desc_init(&desc);
      desc.alpha = alphas[a];
      const int32_t dtype = wide ? EMX_F64 : EMX_F32;
      emx_tensor tx = emx_tensor_view(wide ? (void *)x64 : x, dtype, 2, shape),
                 tp = emx_tensor_view(wide ? (void *)p64 : p, dtype, 2, shape),
                 tt = emx_tensor_view(wide ? (void *)&tau64 : &tau, dtype, 1, shape),
                 ts = emx_tensor_view(&support, EMX_I32, 1, shape);
      emx_entmax_io io;
      emx_entmax_io_init(&io);
      io.x = &tx, io.p = &tp, io.tau = &tt, io.support = &ts;
      TRY(emx_entmax_forward(ctx, &desc, &io));
      for (int i = 0; i < N; i++) grow(&e, fabs((wide ? p64[i] : p[i]) - want->map_p[a * N + i]));
      if (desc.alpha > 1) grow(&e, fabs((wide ? tau64 : tau) - want->map_tau[a]));
      compare_counts(&e, &support, want->map_support + a, 1);
      char what[64];
      snprintf(what, sizeof what, "map alpha %g %s", alphas[a], emx_dtype_name(dtype));
      report(user, what, e, wide ? LIMIT64 : LIMIT);
    }
  return EMX_OK;
}

static emx_status check_attention(emx_ctx *ctx, const golden *want, golden_report report, void *user) {
  enum { H = 2, S = 3, N = GOLDEN_ATTN_N, ROWS = H * S };
  static const double alphas[3] = {1, 1.5, 2};
  float q[ROWS * D], k[N * D], v[N * D], o[ROWS * D], tau[ROWS], slopes[H] = {0.5f, 0.25f};
  int32_t support[ROWS];
  numbers(21, ROWS * D, 8, q);
  numbers(22, N * D, 1, k);
  numbers(23, N * D, 1, v);
  const int64_t q_shape[4] = {1, H, S, D}, k_shape[4] = {1, 1, N, D}, h_shape[1] = {H};
  emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, q_shape), tk = emx_tensor_view(k, EMX_F32, 4, k_shape),
             tv = emx_tensor_view(v, EMX_F32, 4, k_shape), to = emx_tensor_view(o, EMX_F32, 4, q_shape),
             tt = emx_tensor_view(tau, EMX_F32, 3, q_shape), ts = emx_tensor_view(support, EMX_I32, 3, q_shape),
             th = emx_tensor_view(slopes, EMX_F32, 1, h_shape);
  for (int a = 0; a < 3; a++) {
    emx_attn_desc desc;
    emx_attn_desc_init(&desc);
    desc.alpha = alphas[a];
    emx_attn_io io;
    emx_attn_io_init(&io);
    io.q = &tq, io.k = &tk, io.v = &tv, io.o = &to, io.alibi_slopes = &th, io.support = &ts;
    *(desc.alpha > 1 ? &io.tau : &io.lse) = &tt;
    size_t bytes;
    TRY(emx_attn_workspace_size(ctx, &desc, &io, EMX_PASS_FORWARD, &bytes));
    void *work = malloc(bytes);
    const emx_status status = emx_attn_forward(ctx, &desc, &io, work, work ? bytes : 0);
    free(work);
    TRY(status);
    double e = 0;
    compare(&e, o, want->attn_o + a * ROWS * D, ROWS * D);
    compare(&e, tau, want->attn_tau + a * ROWS, ROWS);
    compare_counts(&e, support, want->attn_support + a * ROWS, ROWS);
    char what[64];
    snprintf(what, sizeof what, "attention alpha %g f32", alphas[a]);
    report(user, what, e, LIMIT);
  }
  return EMX_OK;
}

/* One decode step of two heads. Whatever was selected: a certified head must have the answer of reading everything; a head that
 * is not certified must bound the true weight of the pages it did not read; ALL, CERTIFIED, and the head whose weight is in one
 * page must be certified. CERTIFIED leaves out tokens, not pages: its answer alone is compared. */
static emx_status check_selector(emx_ctx *ctx, emx_kv *kv, const emx_kv_batch *batch, const float *q, int row, int32_t kind,
                                 const golden *want, double *answer, double *certificate) {
  enum { H = 2, M = GOLDEN_DECODE_PAGES };
  float o[H * D];
  int32_t pages[H * M], n_pages[H];
  emx_report reports[H];
  const int64_t q_shape[4] = {1, H, 1, D}, page_shape[4] = {1, H, 1, M};
  emx_tensor tq = emx_tensor_view((void *)q, EMX_F32, 4, q_shape), to = emx_tensor_view(o, EMX_F32, 4, q_shape),
             tp = emx_tensor_view(pages, EMX_I32, 4, page_shape), tn = emx_tensor_view(n_pages, EMX_I32, 3, page_shape);
  emx_select_desc select;
  emx_select_desc_init(&select);
  select.kind = kind;
  select.budget = 48;
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.alpha = row ? 1.5 : 1;
  io.scale = 0.5f;
  io.q = &tq, io.o = &to, io.reports = reports, io.pages = &tp, io.n_pages = &tn;
  size_t bytes;
  TRY(emx_decode_workspace_size(ctx, kv, &select, &io, GOLDEN_DECODE_N, &bytes));
  void *work = malloc(bytes);
  emx_status status = EMX_OK;
  if (kind != EMX_SELECT_CERTIFIED) status = emx_select(ctx, kv, batch, &select, &io, work, work ? bytes : 0);
  if (!status) {
    io.pages = io.n_pages = NULL;
    status = emx_decode(ctx, kv, batch, &select, &io, work, work ? bytes : 0);
  }
  free(work);
  TRY(status);
  for (int h = 0; h < H; h++) {
    const int at = row * H + h;
    double unread = 0;
    for (int p = 0; p < M; p++) unread += want->decode_mass[at * M + p];
    for (int i = 0; kind != EMX_SELECT_CERTIFIED && i < n_pages[h]; i++) unread -= want->decode_mass[at * M + pages[h * M + i]];
    const bool certified = reports[h].flags & EMX_REPORT_CERTIFIED;
    if (certified) {
      compare(answer, o + h * D, want->decode_o + at * D, D);
      if (io.alpha > 1) compare(answer, &reports[h].tau, want->decode_tau + at, 1);
      compare_counts(answer, &reports[h].support, want->decode_support + at, 1);
      if (kind != EMX_SELECT_CERTIFIED) grow(certificate, unread);
    } else {
      grow(certificate, unread - reports[h].delta_bound);
      if (kind == EMX_SELECT_ALL || kind == EMX_SELECT_CERTIFIED || (kind == EMX_SELECT_TOPK && h == 0)) grow(certificate, 1);
    }
  }
  return EMX_OK;
}

static emx_status check_decode(emx_ctx *ctx, const golden *want, golden_report report, void *user) {
  enum { H = 2, N = GOLDEN_DECODE_N };
  static const int32_t dtypes[] = {EMX_F32, EMX_F16, EMX_BF16};
  static const struct {
    const char *name;
    int32_t kind;
    int row; /* 0: alpha 1, 1: alpha 1.5 */
  } cases[] = {{"all alpha 1", EMX_SELECT_ALL, 0},
               {"all alpha 1.5", EMX_SELECT_ALL, 1},
               {"topk alpha 1.5", EMX_SELECT_TOPK, 1},
               {"gaussian alpha 1.5", EMX_SELECT_GAUSSIAN, 1},
               {"certified alpha 1.5", EMX_SELECT_CERTIFIED, 1}};
  float q[H * D], k[N * D], v[N * D];
  numbers(31, H * D, 8, q);
  numbers(32, N * D, 1, k);
  numbers(33, N * D, 1, v);
  for (int d = 0; d < D; d++) k[77 * D + d] = q[d] / 4;
  const int64_t shape[4] = {1, 1, N, D};
  emx_tensor tk = emx_tensor_view(k, EMX_F32, 4, shape), tv = emx_tensor_view(v, EMX_F32, 4, shape);
  for (size_t t = 0; t < sizeof dtypes / sizeof *dtypes; t++) {
    emx_kv_opts opts;
    emx_kv_opts_init(&opts);
    opts.dtype = dtypes[t], opts.kv_heads = 1, opts.head_dim = D, opts.max_pages = GOLDEN_DECODE_PAGES, opts.max_seqs = 1;
    opts.summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS | EMX_SUMMARY_SKETCH;
    emx_kv *kv;
    TRY(emx_kv_create(ctx, &opts, &kv));
    int32_t seq;
    emx_kv_batch batch;
    emx_kv_batch_init(&batch);
    batch.batch = 1, batch.seqs = &seq;
    emx_status status = emx_seq_create(kv, &seq);
    if (!status) status = emx_kv_append(ctx, kv, &batch, &tk, &tv, NULL);
    for (size_t c = 0; c < sizeof cases / sizeof *cases && !status; c++) {
      double answer = 0, certificate = 0;
      status = check_selector(ctx, kv, &batch, q, cases[c].row, cases[c].kind, want, &answer, &certificate);
      if (status) break;
      char what[64];
      snprintf(what, sizeof what, "decode %s %s", cases[c].name, emx_dtype_name(dtypes[t]));
      report(user, what, answer, LIMIT);
      snprintf(what, sizeof what, "certificate %s %s", cases[c].name, emx_dtype_name(dtypes[t]));
      report(user, what, certificate, LIMIT_MASS);
    }
    emx_kv_destroy(kv);
    TRY(status);
  }
  return EMX_OK;
}

emx_status golden_check(emx_ctx *ctx, const golden *want, golden_report report, void *user) {
  TRY(check_map(ctx, want, report, user));
  TRY(check_attention(ctx, want, report, user));
  return check_decode(ctx, want, report, user);
}
