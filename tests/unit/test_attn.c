/* Dense attention against a float64 oracle that shares nothing with it, and its gradients against finite differences. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/base.h"
#include "base/num.h"
#include "entmax/entmax.h"
#include "one_context.h"

typedef struct shape {
  int64_t B, H, G, S, N, D;
} shape;

typedef struct problem {
  shape s;
  int32_t dtype;
  double alpha;
  float scale;
  bool causal;
  float slopes[64];
  bool alibi;
  void *q, *k, *v, *o, *tau;
  int32_t *support;
  double *oracle, *oracle_tau; /* [B,H,S,D], [B,H,S] */
  int64_t *oracle_support;
} problem;

static void *zalloc(size_t n) {
  void *p = calloc(n ? n : 1, 1);
  assert_non_null(p);
  return p;
}

/* spread scales the keys, so it sets how peaked the scores are; 0 makes them all equal. */
static problem make(shape s, int32_t dtype, double alpha, bool causal, bool alibi, double spread, uint64_t seed) {
  problem p = {.s = s, .dtype = dtype, .alpha = alpha, .causal = causal, .alibi = alibi};
  const int64_t nq = s.B * s.H * s.S * s.D, nk = s.B * s.G * s.N * s.D;
  const size_t es = emx_dtype_size(dtype), ts = dtype == EMX_F64 ? 8 : 4;
  p.q = zalloc((size_t)nq * es);
  p.o = zalloc((size_t)nq * es);
  p.k = zalloc((size_t)nk * es);
  p.v = zalloc((size_t)nk * es);
  p.tau = zalloc((size_t)(s.B * s.H * s.S) * ts);
  p.support = zalloc((size_t)(s.B * s.H * s.S) * 4);
  float *f = zalloc((size_t)(nq + nk) * 4);
  emxi_normals(seed, 0, f, nq);
  for (int64_t i = 0; i < nq; i++) emxi_store(p.q, dtype, i, f[i]);
  emxi_normals(seed, 1, f, nk);
  for (int64_t i = 0; i < nk; i++) emxi_store(p.k, dtype, i, f[i] * spread);
  emxi_normals(seed, 2, f, nk);
  for (int64_t i = 0; i < nk; i++) emxi_store(p.v, dtype, i, f[i]);
  free(f);
  for (int h = 0; h < s.H; h++) p.slopes[h] = h % 3 == 0 ? 0 : 1.0f / (float)(h + 1);
  p.oracle = zalloc((size_t)nq * 8);
  p.oracle_tau = zalloc((size_t)(s.B * s.H * s.S) * 8);
  p.oracle_support = zalloc((size_t)(s.B * s.H * s.S) * 8);
  return p;
}
static void release(problem *p) {
  free(p->q), free(p->k), free(p->v), free(p->o), free(p->tau), free(p->support);
  free(p->oracle), free(p->oracle_tau), free(p->oracle_support);
}

static void solve_oracle(problem *p) {
  const shape *s = &p->s;
  double scale = p->scale == 0 ? 1 / sqrt((double)s->D) : p->scale;
  double *z = zalloc((size_t)s->N * 8), *w = zalloc((size_t)s->N * 8);
  for (int64_t b = 0; b < s->B; b++)
    for (int64_t h = 0; h < s->H; h++)
      for (int64_t i = 0; i < s->S; i++) {
        int64_t g = h / (s->H / s->G), row = (b * s->H + h) * s->S + i, pos = i + s->N - s->S;
        int64_t n = p->causal ? pos + 1 : s->N;
        if (n < 0) n = 0;
        for (int64_t j = 0; j < n; j++) {
          double dot = 0;
          for (int64_t d = 0; d < s->D; d++)
            dot += emxi_load(p->q, p->dtype, row * s->D + d) * emxi_load(p->k, p->dtype, ((b * s->G + g) * s->N + j) * s->D + d);
          z[j] = dot * scale - (p->alibi ? p->slopes[h] * (double)llabs((long long)(pos - j)) : 0);
        }
        double tau = emxi_oracle_entmax(z, n, p->alpha, w, &p->oracle_support[row]);
        if (p->alpha == 1.0 && n) { /* log-sum-exp */
          double m = -INFINITY, sum = 0;
          for (int64_t j = 0; j < n; j++) m = fmax(m, z[j]);
          for (int64_t j = 0; j < n; j++) sum += exp(z[j] - m);
          tau = m + log(sum);
        }
        p->oracle_tau[row] = tau;
        for (int64_t d = 0; d < s->D; d++) {
          double o = 0;
          for (int64_t j = 0; j < n; j++)
            if (w[j] != 0) o += w[j] * emxi_load(p->v, p->dtype, ((b * s->G + g) * s->N + j) * s->D + d);
          p->oracle[row * s->D + d] = o;
        }
      }
  free(z);
  free(w);
}

typedef struct views {
  emx_attn_desc desc;
  emx_attn_io io;
  emx_tensor q, k, v, o, tau, support, slopes;
} views;
static void view(const problem *p, views *w) {
  const shape *s = &p->s;
  int64_t sq[4] = {s->B, s->H, s->S, s->D}, sk[4] = {s->B, s->G, s->N, s->D};
  emx_attn_desc_init(&w->desc);
  emx_attn_io_init(&w->io);
  w->desc.alpha = p->alpha;
  w->desc.scale = p->scale;
  w->desc.flags = p->causal ? EMX_ATTN_CAUSAL : 0;
  w->q = emx_tensor_view(p->q, p->dtype, 4, sq);
  w->o = emx_tensor_view(p->o, p->dtype, 4, sq);
  w->k = emx_tensor_view(p->k, p->dtype, 4, sk);
  w->v = emx_tensor_view(p->v, p->dtype, 4, sk);
  w->tau = emx_tensor_view(p->tau, p->dtype == EMX_F64 ? EMX_F64 : EMX_F32, 3, sq);
  w->support = emx_tensor_view(p->support, EMX_I32, 3, sq);
  w->slopes = emx_tensor_view((void *)p->slopes, EMX_F32, 1, &s->H);
  w->io.q = &w->q, w->io.k = &w->k, w->io.v = &w->v, w->io.o = &w->o, w->io.support = &w->support;
  *(p->alpha == 1 ? &w->io.lse : &w->io.tau) = &w->tau;
  if (p->alibi) w->io.alibi_slopes = &w->slopes;
}
static void run_forward(emx_ctx *c, views *w) {
  size_t bytes;
  assert_int_equal(emx_attn_workspace_size(c, &w->desc, &w->io, EMX_PASS_FORWARD, &bytes), EMX_OK);
  void *ws = malloc(bytes);
  emx_status st = emx_attn_forward(c, &w->desc, &w->io, ws, bytes);
  if (st) fail_msg("%s: %s", emx_status_name(st), emx_last_error());
  free(ws);
}

static void check_forward(problem *p, const char *what) {
  views w;
  view(p, &w);
  run_forward(ctx, &w);
  solve_oracle(p);
  const shape *s = &p->s;
  /* Scores carry the rounding of a D-term sum in the working type (one scalar accumulator, D = 256: up to 256 * 6e-8 of their
   * size), weights inherit it through d p / d s <= 1; 16-bit outputs add half a unit in the last place. */
  const double tol = p->dtype == EMX_F64 ? 1e-11 : p->dtype == EMX_F32 ? 5e-5 : p->dtype == EMX_F16 ? 2e-3 : 1.6e-2;
  const double tol_tau = p->dtype == EMX_F64 ? 1e-11 : 1e-5;
  for (int64_t r = 0; r < s->B * s->H * s->S; r++) {
    double tau = emxi_load(p->tau, w.tau.dtype, r), want = p->oracle_tau[r];
    if (!(tau == want || fabs(tau - want) <= tol_tau * fmax(1, fabs(want))))
      fail_msg("%s row %d: tau %g, oracle %g", what, (int)r, tau, want);
    for (int64_t d = 0; d < s->D; d++) {
      double o = emxi_load(p->o, p->dtype, r * s->D + d), e = p->oracle[r * s->D + d];
      if (!(fabs(o - e) <= tol * fmax(1, fabs(e)))) fail_msg("%s row %d dim %d: %g, oracle %g", what, (int)r, (int)d, o, e);
    }
    if (p->dtype == EMX_F64) assert_int_equal(p->support[r], p->oracle_support[r]);
  }
}

static void test_forward_catalogue(void **state) {
  (void)state;
  static const shape
      shapes[] =
          {
              {1, 1, 1, 1, 1, 16},     {1, 2, 1, 3, 3, 16},   {2, 4, 2, 65, 65, 32},
              {1, 6, 3, 33, 150, 32},  {1, 4, 4, 1, 200, 64}, {1, 8, 1, 5, 130, 80},
              {1, 3, 3, 100, 100, 96}, {1, 2, 2, 7, 64, 256}, {1, 1, 1, 130, 64, 24}, /* S > N: first rows see nothing */
          };
  static const double alphas[] = {1, 1.25, 1.5, 1.9, 2, 3};
  static const int32_t dtypes[] = {EMX_F32, EMX_F64, EMX_BF16, EMX_F16};
  int c = 0;
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
    for (size_t a = 0; a < sizeof alphas / sizeof *alphas; a++)
      for (size_t t = 0; t < 4; t++, c++) {
        static const double spreads[] = {1, 3, 0, 0.05};
        problem p = make(shapes[i], dtypes[t], alphas[a], c % 3 != 0, c % 2, spreads[c / 3 % 4], (uint64_t)c);
        if (c % 5 == 0) p.scale = 0.4f;
        char what[100];
        snprintf(what, sizeof what, "shape %zu alpha %g %s causal %d alibi %d", i, alphas[a], emx_dtype_name(dtypes[t]), p.causal,
                 p.alibi);
        check_forward(&p, what);
        release(&p);
      }
}

/* Long rows: lists that are tightened many times, flat ones that keep everything. */
static void test_forward_long(void **state) {
  (void)state;
  static const double spreads[] = {0, 0.02, 0.3, 1, 30};
  for (int i = 0; i < 5; i++)
    for (int a = 0; a < 2; a++) {
      problem p = make((shape){1, 2, 1, 4, 3001, 32}, EMX_F32, a ? 1.5 : 1.3, true, false, spreads[i], 77);
      check_forward(&p, "long");
      release(&p);
    }
}

static void *copy(const void *p, size_t n) {
  void *c = malloc(n);
  assert_non_null(c);
  return memcpy(c, p, n);
}

/* Packed sequences, padded ones, pages and other strides give the bits of plain calls. */
static void test_layouts_agree(void **state) {
  (void)state;
  const shape s = {2, 4, 2, 40, 96, 32};
  const size_t row = (size_t)s.D * 4, no = (size_t)(s.B * s.H * s.S) * row;
  problem p = make(s, EMX_F32, 1.5, true, true, 1, 5);
  views w;
  view(&p, &w);
  run_forward(ctx, &w);
  float *want = copy(p.o, no);

  /* BNHD through the layout enum: transpose by hand */
  float *q2 = zalloc(no), *o2 = zalloc(no), *k2 = zalloc((size_t)(s.B * s.G * s.N) * row),
        *v2 = zalloc((size_t)(s.B * s.G * s.N) * row);
  for (int64_t b = 0; b < s.B; b++) {
    for (int64_t h = 0; h < s.H; h++)
      for (int64_t i = 0; i < s.S; i++)
        memcpy(q2 + ((b * s.S + i) * s.H + h) * s.D, (float *)p.q + ((b * s.H + h) * s.S + i) * s.D, row);
    for (int64_t g = 0; g < s.G; g++)
      for (int64_t j = 0; j < s.N; j++) {
        memcpy(k2 + ((b * s.N + j) * s.G + g) * s.D, (float *)p.k + ((b * s.G + g) * s.N + j) * s.D, row);
        memcpy(v2 + ((b * s.N + j) * s.G + g) * s.D, (float *)p.v + ((b * s.G + g) * s.N + j) * s.D, row);
      }
  }
  views x = w;
  x.io.tau = x.io.support = NULL;
  x.io.alibi_slopes = &w.slopes;
  int64_t sq[4] = {s.B, s.S, s.H, s.D}, sk[4] = {s.B, s.N, s.G, s.D};
  x.desc.layout = EMX_LAYOUT_BNHD;
  x.q = emx_tensor_view(q2, EMX_F32, 4, sq);
  x.o = emx_tensor_view(o2, EMX_F32, 4, sq);
  x.k = emx_tensor_view(k2, EMX_F32, 4, sk);
  x.v = emx_tensor_view(v2, EMX_F32, 4, sk);
  x.io.q = &x.q, x.io.k = &x.k, x.io.v = &x.v, x.io.o = &x.o;
  run_forward(ctx, &x);
  for (int64_t b = 0; b < s.B; b++)
    for (int64_t h = 0; h < s.H; h++)
      for (int64_t i = 0; i < s.S; i++)
        assert_memory_equal(o2 + ((b * s.S + i) * s.H + h) * s.D, want + ((b * s.H + h) * s.S + i) * s.D, row);

  /* packed: the same memory as [T,H,D] rows, two sequences of 40 queries and 96 keys */
  int32_t cu_q[3] = {0, 40, 80}, cu_k[3] = {0, 96, 192};
  int64_t three = 3, tq[3] = {80, s.H, s.D}, tk[3] = {192, s.G, s.D};
  views y = x;
  memset(o2, 0, no);
  emx_tensor tcq = emx_tensor_view(cu_q, EMX_I32, 1, &three), tck = emx_tensor_view(cu_k, EMX_I32, 1, &three);
  y.q = emx_tensor_view(q2, EMX_F32, 3, tq);
  y.o = emx_tensor_view(o2, EMX_F32, 3, tq);
  y.k = emx_tensor_view(k2, EMX_F32, 3, tk);
  y.v = emx_tensor_view(v2, EMX_F32, 3, tk);
  y.io.q = &y.q, y.io.k = &y.k, y.io.v = &y.v, y.io.o = &y.o, y.io.cu_seqlens_q = &tcq, y.io.cu_seqlens_k = &tck;
  run_forward(ctx, &y);
  for (int64_t b = 0; b < s.B; b++)
    for (int64_t h = 0; h < s.H; h++)
      for (int64_t i = 0; i < s.S; i++)
        assert_memory_equal(o2 + ((b * s.S + i) * s.H + h) * s.D, want + ((b * s.H + h) * s.S + i) * s.D, row);
  cu_q[1] = 81;
  size_t bytes;
  assert_int_equal(emx_attn_workspace_size(ctx, &y.desc, &y.io, EMX_PASS_FORWARD, &bytes), EMX_OK);
  void *ws = malloc(bytes);
  assert_int_equal(emx_attn_forward(ctx, &y.desc, &y.io, ws, bytes), EMX_ERR_INVALID);

  /* pages of 16 in shuffled order, [M,G,P,D] */
  enum { P = 16, M = 12 };
  float *kp = zalloc((size_t)(M * s.G * P) * row), *vp = zalloc((size_t)(M * s.G * P) * row);
  int32_t table[2][6], lens[2] = {96, 96};
  for (int b = 0; b < 2; b++)
    for (int t = 0; t < 6; t++) {
      table[b][t] = (b * 6 + t) * 5 % M;
      for (int64_t g = 0; g < s.G; g++) {
        memcpy(kp + ((table[b][t] * s.G + g) * P) * s.D, (float *)p.k + ((b * s.G + g) * s.N + t * P) * s.D, P * row);
        memcpy(vp + ((table[b][t] * s.G + g) * P) * s.D, (float *)p.v + ((b * s.G + g) * s.N + t * P) * s.D, P * row);
      }
    }
  int64_t sp[4] = {M, s.G, P, s.D}, st[2] = {2, 6}, two = 2;
  views z = w;
  emx_tensor tt = emx_tensor_view(table, EMX_I32, 2, st), tl = emx_tensor_view(lens, EMX_I32, 1, &two);
  z.k = emx_tensor_view(kp, EMX_F32, 4, sp);
  z.v = emx_tensor_view(vp, EMX_F32, 4, sp);
  z.io.q = &w.q, z.io.o = &w.o, z.io.tau = z.io.support = NULL, z.io.alibi_slopes = &w.slopes;
  z.io.k = &z.k, z.io.v = &z.v, z.io.block_table = &tt, z.io.seqlens_k = &tl;
  memset(p.o, 0, no);
  run_forward(ctx, &z);
  assert_memory_equal(p.o, want, no);
  table[1][3] = M;
  assert_int_equal(emx_attn_workspace_size(ctx, &z.desc, &z.io, EMX_PASS_FORWARD, &bytes), EMX_OK);
  ws = realloc(ws, bytes);
  assert_int_equal(emx_attn_forward(ctx, &z.desc, &z.io, ws, bytes), EMX_ERR_INVALID);
  table[1][3] = 0;
  lens[0] = 97;
  assert_int_equal(emx_attn_forward(ctx, &z.desc, &z.io, ws, bytes), EMX_ERR_INVALID);
  assert_int_equal(emx_attn_workspace_size(ctx, &z.desc, &z.io, EMX_PASS_BACKWARD, &bytes), EMX_ERR_UNSUPPORTED);
  assert_non_null(strstr(emx_last_error(), "paged keys"));
  assert_int_equal(emx_attn_backward(ctx, &z.desc, &z.io, ws, bytes), EMX_ERR_UNSUPPORTED);

  /* padding: sequence 0 has 10 queries over 50 keys; it equals the short call, and rows past it are zero */
  int32_t lq[2] = {10, 40}, lk[2] = {50, 96};
  emx_tensor tlq = emx_tensor_view(lq, EMX_I32, 1, &two), tlk = emx_tensor_view(lk, EMX_I32, 1, &two);
  views u = w;
  u.io.q = &w.q, u.io.k = &w.k, u.io.v = &w.v, u.io.o = &w.o, u.io.tau = &w.tau, u.io.support = &w.support,
  u.io.alibi_slopes = &w.slopes;
  u.io.seqlens_q = &tlq, u.io.seqlens_k = &tlk;
  memset(p.o, 0xff, no);
  run_forward(ctx, &u);
  for (int64_t h = 0; h < s.H; h++) {
    for (int64_t i = 10; i < s.S; i++)
      for (int64_t d = 0; d < s.D; d++) assert_true(((float *)p.o)[(h * s.S + i) * s.D + d] == 0);
    assert_int_equal(p.support[h * s.S + 39], 0);
  }
  assert_memory_equal((float *)p.o + s.H * s.S * s.D, want + s.H * s.S * s.D, no / 2);
  free(ws), free(kp), free(vp), free(q2), free(o2), free(k2), free(v2), free(want);
  release(&p);
}

static void test_threads_and_batch_do_not_matter(void **state) {
  (void)state;
  problem p = make((shape){3, 4, 2, 70, 150, 48}, EMX_F32, 1.5, true, true, 1, 9);
  views w;
  view(&p, &w);
  const size_t no = (size_t)(3 * 4 * 70 * 48) * 4;
  run_forward(ctx, &w);
  float *want = copy(p.o, no);
  for (int threads = 1; threads <= 3; threads++) {
    emx_ctx_opts opts;
    emx_ctx_opts_init(&opts);
    opts.threads = threads;
    emx_ctx *c;
    assert_int_equal(emx_ctx_create(&opts, &c), EMX_OK);
    memset(p.o, 0, no);
    run_forward(c, &w);
    assert_memory_equal(p.o, want, no);
    emx_ctx_destroy(c);
  }
  /* sequence 1 alone */
  views x = w;
  x.q.data = (float *)p.q + no / 12, x.k.data = (float *)p.k + 2 * 150 * 48, x.v.data = (float *)p.v + 2 * 150 * 48;
  x.q.shape[0] = x.k.shape[0] = x.v.shape[0] = x.o.shape[0] = 1;
  x.io.q = &x.q, x.io.k = &x.k, x.io.v = &x.v, x.io.o = &x.o, x.io.tau = x.io.support = NULL, x.io.alibi_slopes = &w.slopes;
  run_forward(ctx, &x);
  assert_memory_equal(p.o, want + no / 12, no / 3);
  free(want);
  release(&p);
}

static void test_nonfinite(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.5, 1.7};
  for (int a = 0; a < 3; a++) {
    problem p = make((shape){1, 1, 1, 12, 12, 16}, EMX_F32, alphas[a], true, false, 1, 3);
    float *k = p.k, *v = p.v, *o = p.o;
    k[5 * 16 + 3] = NAN; /* rows 5.. read key 5 */
    for (int d = 0; d < 16; d++) k[8 * 16 + d] = 0, k[9 * 16 + d] = 0;
    views w;
    view(&p, &w);
    run_forward(ctx, &w);
    for (int i = 0; i < 12; i++)
      for (int d = 0; d < 16; d++) assert_int_equal(isnan(o[i * 16 + d]) != 0, i >= 5);
    release(&p);

    /* +inf score: NaN; -inf score: weight zero, and a NaN in its V stays there */
    p = make((shape){1, 1, 1, 1, 80, 16}, EMX_F32, alphas[a], true, false, 1, 3);
    k = p.k, v = p.v, o = p.o;
    ((float *)p.q)[0] = 1;
    for (int d = 1; d < 16; d++) ((float *)p.q)[d] = 0;
    k[7 * 16] = -INFINITY;
    v[7 * 16 + 2] = NAN;
    view(&p, &w);
    run_forward(ctx, &w);
    for (int d = 0; d < 16; d++) assert_true(isfinite(o[d]));
    k[7 * 16] = INFINITY;
    run_forward(ctx, &w);
    for (int d = 0; d < 16; d++) assert_true(isnan(o[d]));
    for (int j = 0; j < 80; j++) k[j * 16] = -INFINITY; /* fully masked */
    run_forward(ctx, &w);
    for (int d = 0; d < 16; d++) assert_true(o[d] == 0);
    assert_true(((float *)p.tau)[0] == -INFINITY && p.support[0] == 0);
    release(&p);
  }
}

/* Sum of o * c over everything, for finite differences. */
static double objective(views *w, const double *c, int64_t n) {
  run_forward(ctx, w);
  double f = 0;
  for (int64_t i = 0; i < n; i++) f += ((double *)w->o.data)[i] * c[i];
  return f;
}

static void test_backward(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.25, 1.5, 1.8, 2};
  static const shape shapes[] = {{1, 2, 1, 9, 9, 4}, {2, 4, 2, 6, 70, 3}};
  for (int a = 0; a < 5; a++)
    for (int sh = 0; sh < 2; sh++) {
      const shape s = shapes[sh];
      problem p = make(s, EMX_F64, alphas[a], sh == 0, sh == 1, 1, (uint64_t)(40 + a));
      const int64_t nq = s.B * s.H * s.S * s.D, nk = s.B * s.G * s.N * s.D;
      views w;
      view(&p, &w);
      float *cf = zalloc((size_t)nq * 4);
      double *c = zalloc((size_t)nq * 8), *grad[3];
      emxi_normals(7, 7, cf, nq);
      for (int64_t i = 0; i < nq; i++) c[i] = cf[i];
      run_forward(ctx, &w);
      emx_tensor d_o = w.q, g[3] = {w.q, w.k, w.v};
      d_o.data = c;
      for (int t = 0; t < 3; t++) g[t].data = grad[t] = zalloc((size_t)(t ? nk : nq) * 8);
      emx_attn_io io = w.io;
      io.d_o = &d_o, io.d_q = &g[0], io.d_k = &g[1], io.d_v = &g[2];
      io.o = NULL; /* backward is correct from (q, k, v, tau) alone */
      size_t bytes;
      assert_int_equal(emx_attn_workspace_size(ctx, &w.desc, &io, EMX_PASS_BACKWARD, &bytes), EMX_OK);
      void *ws = malloc(bytes);
      emx_status st = emx_attn_backward(ctx, &w.desc, &io, ws, bytes);
      if (st) fail_msg("%s", emx_last_error());
      free(ws);
      const emx_tensor *x[3] = {&w.q, &w.k, &w.v};
      for (int t = 0; t < 3; t++)
        for (int64_t i = 0; i < (t ? nk : nq); i += 1 + (t ? nk : nq) / 40) {
          double *e = (double *)x[t]->data + i, keep = *e;
          /* alpha = 2 is piecewise linear in its weights and the others have a kink of their derivative at the support's edge: a
           * difference of 1e-6 crosses one with probability 1e-5 a coordinate; the error is eps^2 / eps = 1e-10 / 1e-6 */
          const double eps = 1e-6;
          *e = keep + eps;
          double hi = objective(&w, c, nq);
          *e = keep - eps;
          double lo = objective(&w, c, nq);
          *e = keep;
          double fd = (hi - lo) / (2 * eps);
          if (fabs(fd - grad[t][i]) > 2e-6 * fmax(1, fabs(fd)))
            fail_msg("alpha %g shape %d tensor %d [%d]: %.9g, finite difference %.9g", alphas[a], sh, t, (int)i, grad[t][i], fd);
        }
      for (int t = 0; t < 3; t++) free(grad[t]);
      free(c), free(cf);
      release(&p);
    }
}

/* f32 and bf16 gradients agree with the f64 ones of the same numbers. */
static void test_backward_types(void **state) {
  (void)state;
  const shape s = {2, 4, 2, 70, 70, 32};
  const int64_t nq = s.B * s.H * s.S * s.D, nk = s.B * s.G * s.N * s.D;
  static const int32_t dtypes[] = {EMX_BF16, EMX_F32, EMX_F64};
  static const double alphas[] = {1, 1.5, 2};
  for (int a = 0; a < 3; a++) {
    double *ref[3] = {0};
    for (int t = 2; t >= 0; t--) {
      problem p = make(s, EMX_BF16, alphas[a], true, true, 1, 11), p2 = make(s, dtypes[t], alphas[a], true, true, 1, 11);
      for (int64_t i = 0; i < nq; i++) emxi_store(p2.q, dtypes[t], i, emxi_load(p.q, EMX_BF16, i));
      for (int64_t i = 0; i < nk; i++) {
        emxi_store(p2.k, dtypes[t], i, emxi_load(p.k, EMX_BF16, i));
        emxi_store(p2.v, dtypes[t], i, emxi_load(p.v, EMX_BF16, i));
      }
      views w;
      view(&p2, &w);
      run_forward(ctx, &w);
      int32_t out = dtypes[t] == EMX_F64 ? EMX_F64 : EMX_F32;
      emx_tensor g[3] = {w.q, w.k, w.v};
      for (int x = 0; x < 3; x++) {
        g[x].dtype = out;
        g[x].data = zalloc((size_t)(x ? nk : nq) * 8);
      }
      emx_attn_io io = w.io;
      io.d_o = &w.q; /* any numbers do */
      io.d_q = &g[0], io.d_k = &g[1], io.d_v = &g[2];
      size_t bytes;
      assert_int_equal(emx_attn_workspace_size(ctx, &w.desc, &io, EMX_PASS_BACKWARD, &bytes), EMX_OK);
      void *ws = malloc(bytes);
      assert_int_equal(emx_attn_backward(ctx, &w.desc, &io, ws, bytes), EMX_OK);
      free(ws);
      for (int x = 0; x < 3; x++) {
        if (t == 2) {
          ref[x] = g[x].data;
          continue;
        }
        double err = 0, norm = 0;
        for (int64_t i = 0; i < (x ? nk : nq); i++) {
          double e = emxi_load(g[x].data, out, i) - ref[x][i];
          err += e * e;
          norm += ref[x][i] * ref[x][i];
        }
        /* f32 scores are off by 1e-6, which moves sqrt(p) of an element near the threshold by as much */
        if (!(sqrt(err / norm) < 2e-5))
          fail_msg("alpha %g %s tensor %d: relative error %g", alphas[a], emx_dtype_name(dtypes[t]), x, sqrt(err / norm));
        free(g[x].data);
      }
      release(&p);
      release(&p2);
    }
    for (int x = 0; x < 3; x++) free(ref[x]);
  }
}

/* Long rows of equal scores, and scores far from zero: tau reaches the backward pass rounded to a float, the sums must not show
 * it. */
static void test_flat_and_far_rows(void **state) {
  (void)state;
  enum { N = 20011, D = 16 };
  static const double alphas[] = {1, 1.4, 1.5, 2};
  static const float levels[] = {0, 100.7f, 65536.f, -3e5f};
  float *k = zalloc(N * D * 4), *v = zalloc(N * D * 4), *dk = zalloc(N * D * 4), *dv = zalloc(N * D * 4);
  float q[D] = {1}, o[D], d_o[D], dq[D], tau;
  for (int i = 0; i < D; i++) d_o[i] = 1;
  for (int i = 0; i < N * D; i++) v[i] = 1;
  for (size_t a = 0; a < sizeof alphas / sizeof *alphas; a++)
    for (size_t l = 0; l < sizeof levels / sizeof *levels; l++) {
      for (int j = 0; j < N; j++) k[j * D] = levels[l];
      int64_t sq[4] = {1, 1, 1, D}, sk[4] = {1, 1, N, D};
      emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, sq), tk = emx_tensor_view(k, EMX_F32, 4, sk),
                 tv = emx_tensor_view(v, EMX_F32, 4, sk), to = emx_tensor_view(o, EMX_F32, 4, sq),
                 tt = emx_tensor_view(&tau, EMX_F32, 3, sq), tdo = emx_tensor_view(d_o, EMX_F32, 4, sq),
                 tdq = emx_tensor_view(dq, EMX_F32, 4, sq), tdk = emx_tensor_view(dk, EMX_F32, 4, sk),
                 tdv = emx_tensor_view(dv, EMX_F32, 4, sk);
      views w;
      emx_attn_desc_init(&w.desc);
      emx_attn_io_init(&w.io);
      w.desc.alpha = alphas[a];
      w.desc.scale = 1;
      w.io.q = &tq, w.io.k = &tk, w.io.v = &tv, w.io.o = &to;
      *(alphas[a] == 1 ? &w.io.lse : &w.io.tau) = &tt;
      run_forward(ctx, &w);
      for (int d = 0; d < D; d++) assert_true(fabsf(o[d] - 1) < 1e-5f); /* the mean of ones */
      w.io.o = NULL;
      w.io.d_o = &tdo, w.io.d_q = &tdq, w.io.d_k = &tdk, w.io.d_v = &tdv;
      size_t bytes;
      assert_int_equal(emx_attn_workspace_size(ctx, &w.desc, &w.io, EMX_PASS_BACKWARD, &bytes), EMX_OK);
      void *ws = malloc(bytes);
      assert_int_equal(emx_attn_backward(ctx, &w.desc, &w.io, ws, bytes), EMX_OK);
      free(ws);
      double sum = 0; /* of p: dv_j = p_j do */
      for (int j = 0; j < N; j++) sum += dv[j * D];
      if (!(fabs(sum - 1) < 2e-5)) fail_msg("alpha %g level %g: the weights sum to %g", alphas[a], (double)levels[l], sum);
      for (int d = 0; d < D; d++) assert_true(fabsf(dq[d]) < 1e-2f * (1 + fabsf(levels[l]))); /* values are equal: no gradient */
    }
  free(k), free(v), free(dk), free(dv);
}

/* A NaN row is NaN in both passes. */
static void test_nonfinite_backward(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.5, 1.7, 2};
  for (int a = 0; a < 4; a++) {
    problem p = make((shape){1, 1, 1, 6, 6, 16}, EMX_F32, alphas[a], true, false, 1, 3);
    ((float *)p.q)[3 * 16] = NAN;
    views w;
    view(&p, &w);
    run_forward(ctx, &w);
    float g[3][6 * 16];
    emx_tensor t[3] = {w.q, w.k, w.v}, d_o = w.q;
    float ones[6 * 16];
    for (int i = 0; i < 6 * 16; i++) ones[i] = 1;
    d_o.data = ones;
    for (int i = 0; i < 3; i++) t[i].data = g[i];
    emx_attn_io io = w.io;
    io.d_o = &d_o, io.d_q = &t[0], io.d_k = &t[1], io.d_v = &t[2];
    size_t bytes;
    assert_int_equal(emx_attn_workspace_size(ctx, &w.desc, &io, EMX_PASS_BACKWARD, &bytes), EMX_OK);
    void *ws = malloc(bytes);
    assert_int_equal(emx_attn_backward(ctx, &w.desc, &io, ws, bytes), EMX_OK);
    free(ws);
    for (int i = 0; i < 6; i++) {
      assert_int_equal(isnan(g[0][i * 16]) != 0, i == 3);
      assert_int_equal(isnan(g[2][i * 16]) != 0, i <= 3); /* the keys that row 3 sees */
    }
    release(&p);
  }
}

/* Packed beside a very long neighbour, a sequence keeps its bits. */
static void test_long_neighbour(void **state) {
  (void)state;
  enum { LONG = 60000, D = 16 };
  float *k = zalloc((100 + LONG) * D * 4), *q = zalloc(101 * D * 4), *o = zalloc(101 * D * 4), *want = zalloc(100 * D * 4);
  emxi_normals(3, 1, k, (100 + LONG) * D);
  emxi_normals(3, 2, q, 101 * D);
  for (int neighbour = 0; neighbour < 2; neighbour++) {
    int32_t cu_q[3] = {0, 100, 101}, cu_k[3] = {0, 100, 100 + LONG};
    int64_t n = 2 + neighbour, sq[3] = {100 + neighbour, 1, D}, sk[3] = {100 + neighbour * LONG, 1, D};
    emx_tensor tq = emx_tensor_view(q, EMX_F32, 3, sq), tk = emx_tensor_view(k, EMX_F32, 3, sk),
               to = emx_tensor_view(neighbour ? o : want, EMX_F32, 3, sq), tcq = emx_tensor_view(cu_q, EMX_I32, 1, &n),
               tck = emx_tensor_view(cu_k, EMX_I32, 1, &n);
    views w;
    emx_attn_desc_init(&w.desc);
    emx_attn_io_init(&w.io);
    w.io.q = &tq, w.io.k = &tk, w.io.v = &tk, w.io.o = &to, w.io.cu_seqlens_q = &tcq, w.io.cu_seqlens_k = &tck;
    run_forward(ctx, &w);
  }
  assert_memory_equal(o, want, 100 * D * 4);
  free(k), free(q), free(o), free(want);
}

static void test_bad_input(void **state) {
  (void)state;
  problem p = make((shape){1, 2, 1, 4, 8, 16}, EMX_F32, 1.5, true, false, 1, 1);
  views w;
  view(&p, &w);
  size_t bytes;
#define REFUSES(status) assert_int_equal(emx_attn_workspace_size(ctx, &w.desc, &w.io, EMX_PASS_FORWARD, &bytes), status)
  w.desc.alpha = 0.9;
  REFUSES(EMX_ERR_INVALID);
  w.desc.alpha = NAN;
  REFUSES(EMX_ERR_INVALID);
  w.desc.alpha = 1.5;
  w.desc.window_left = -2;
  REFUSES(EMX_ERR_INVALID);
  w.desc.window_left = -1;
  w.desc.struct_size = 4;
  REFUSES(EMX_ERR_INVALID);
  w.desc.struct_size = sizeof w.desc;
  w.k.shape[1] = 3;
  REFUSES(EMX_ERR_SHAPE);
  w.k.shape[1] = 1;
  w.k.dtype = EMX_BF16;
  REFUSES(EMX_ERR_DTYPE);
  w.k.dtype = EMX_F32;
  w.q.stride[3] = 2;
  REFUSES(EMX_ERR_SHAPE);
  w.q.stride[3] = 1;
  w.q.shape[3] = w.k.shape[3] = w.v.shape[3] = w.o.shape[3] = 8;
  REFUSES(EMX_ERR_UNSUPPORTED);
  w.q.shape[3] = w.k.shape[3] = w.v.shape[3] = w.o.shape[3] = 16;
  w.io.lse = &w.tau;
  REFUSES(EMX_ERR_INVALID); /* alpha > 1 has tau */
  w.io.lse = NULL;
  w.o.data = NULL;
  REFUSES(EMX_OK); /* a size query reads shapes only */
  {
    void *room = malloc(bytes);
    assert_int_equal(emx_attn_forward(ctx, &w.desc, &w.io, room, bytes), EMX_ERR_INVALID);
    free(room);
  }
  w.o.data = p.o;
  REFUSES(EMX_OK);
  char small[64];
  assert_int_equal(emx_attn_forward(ctx, &w.desc, &w.io, small, sizeof small), EMX_ERR_WORKSPACE);
  assert_non_null(strstr(emx_last_error(), "bytes"));
  void *ws = malloc(bytes);
  emx_ctx_cancel(ctx);
  assert_int_equal(emx_attn_forward(ctx, &w.desc, &w.io, ws, bytes), EMX_ERR_CANCELLED);
  emx_ctx_resume(ctx);
  assert_int_equal(emx_attn_forward(ctx, &w.desc, &w.io, ws, bytes), EMX_OK);
  assert_int_equal(emx_attn_backward(ctx, &w.desc, &w.io, ws, bytes), EMX_ERR_INVALID); /* no d_o */
  free(ws);
  release(&p);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_forward_catalogue),  cmocka_unit_test(test_forward_long),
      cmocka_unit_test(test_layouts_agree),      cmocka_unit_test(test_threads_and_batch_do_not_matter),
      cmocka_unit_test(test_nonfinite),          cmocka_unit_test(test_backward),
      cmocka_unit_test(test_backward_types),     cmocka_unit_test(test_flat_and_far_rows),
      cmocka_unit_test(test_nonfinite_backward), cmocka_unit_test(test_long_neighbour),
      cmocka_unit_test(test_bad_input)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
