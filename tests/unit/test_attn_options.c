/* Attention on ragged packed sequences: windows, one alpha a head, gradients of alpha. The reference is float64 and dense. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/num.h"
#include "entmax/entmax.h"
#include "one_context.h"

enum { MAX_SEQS = 6, MAX_HEADS = 8 };
/* Sequence b has sq[b] queries and sk[b] keys. */
typedef struct packed {
  int b, h, g, d;
  int32_t sq[MAX_SEQS], sk[MAX_SEQS];
  bool causal, alibi;
  int32_t left, right;
  double alpha, alphas[MAX_HEADS]; /* alphas[0] != 0: one a head */
  double spread;
  bool clustered; /* keys of a tile lie near each other, so that whole tiles are bounded away */
  int32_t dtype;
  /* filled by make() */
  int32_t cu_q[MAX_SEQS + 1], cu_k[MAX_SEQS + 1];
  float slopes[MAX_HEADS];
  void *q, *k, *v, *o, *tau;
  int32_t *support;
} packed;

static void *zalloc(size_t n) {
  void *p = calloc(n ? n : 1, 1);
  assert_non_null(p);
  return p;
}
static int64_t total(const int32_t *cu, int b) { return cu[b]; }
static void *noise(int32_t dtype, uint64_t stream, int64_t n, double factor) {
  void *p = zalloc((size_t)n * emx_dtype_size(dtype));
  float *f = zalloc((size_t)n * 4);
  emxi_normals(11, stream, f, n);
  for (int64_t i = 0; i < n; i++) emxi_store(p, dtype, i, f[i] * factor);
  free(f);
  return p;
}
static void make(packed *p, uint64_t seed) {
  for (int b = 0; b < p->b; b++) {
    p->cu_q[b + 1] = p->cu_q[b] + p->sq[b];
    p->cu_k[b + 1] = p->cu_k[b] + p->sk[b];
  }
  const int64_t nq = total(p->cu_q, p->b) * p->h, nk = total(p->cu_k, p->b) * p->g;
  p->q = noise(p->dtype, 3 * seed, nq * p->d, 1);
  p->k = noise(p->dtype, 3 * seed + 1, nk * p->d, p->spread);
  p->v = noise(p->dtype, 3 * seed + 2, nk * p->d, 1);
  for (int64_t i = 0; p->clustered && i < nk * p->d; i++) {
    const int64_t j = i / p->d / p->g, leader = j / 64 * 64, at = (leader * p->g + i / p->d % p->g) * p->d + i % p->d;
    if (j != leader) /* every fourth is a copy: ties */
      emxi_store(p->k, p->dtype, i, emxi_load(p->k, p->dtype, at) + (j % 4 ? 0.02 : 0) * emxi_load(p->k, p->dtype, i));
  }
  p->o = zalloc((size_t)(nq * p->d) * emx_dtype_size(p->dtype));
  p->tau = zalloc((size_t)nq * 8);
  p->support = zalloc((size_t)nq * 4);
  for (int h = 0; h < p->h; h++) p->slopes[h] = h % 3 == 1 ? 0 : 1.0f / (float)(h + 2);
}
static void drop(packed *p) { free(p->q), free(p->k), free(p->v), free(p->o), free(p->tau), free(p->support); }

typedef struct views {
  emx_attn_desc desc;
  emx_attn_io io;
  emx_tensor q, k, v, o, tau, support, slopes, cu_q, cu_k, alphas;
} views;
static void view(packed *p, views *w) {
  const int64_t h = p->h, n = p->b + 1, sq[3] = {total(p->cu_q, p->b), p->h, p->d}, sk[3] = {total(p->cu_k, p->b), p->g, p->d};
  emx_attn_desc_init(&w->desc);
  emx_attn_io_init(&w->io);
  w->desc.alpha = p->alpha;
  w->desc.flags = p->causal ? EMX_ATTN_CAUSAL : 0;
  w->desc.window_left = p->left;
  w->desc.window_right = p->right;
  w->q = emx_tensor_view(p->q, p->dtype, 3, sq);
  w->o = emx_tensor_view(p->o, p->dtype, 3, sq);
  w->k = emx_tensor_view(p->k, p->dtype, 3, sk);
  w->v = emx_tensor_view(p->v, p->dtype, 3, sk);
  w->tau = emx_tensor_view(p->tau, p->dtype == EMX_F64 ? EMX_F64 : EMX_F32, 2, sq);
  w->support = emx_tensor_view(p->support, EMX_I32, 2, sq);
  w->slopes = emx_tensor_view(p->slopes, EMX_F32, 1, &h);
  w->alphas = emx_tensor_view(p->alphas, EMX_F64, 1, &h);
  w->cu_q = emx_tensor_view(p->cu_q, EMX_I32, 1, &n);
  w->cu_k = emx_tensor_view(p->cu_k, EMX_I32, 1, &n);
  w->io.q = &w->q, w->io.k = &w->k, w->io.v = &w->v, w->io.o = &w->o, w->io.support = &w->support;
  w->io.cu_seqlens_q = &w->cu_q, w->io.cu_seqlens_k = &w->cu_k;
  if (p->alphas[0] != 0) w->io.alphas = &w->alphas;
  *(p->alphas[0] == 0 && p->alpha == 1 ? &w->io.lse : &w->io.tau) = &w->tau;
  if (p->alibi) w->io.alibi_slopes = &w->slopes;
}
static emx_status run(views *w, int32_t pass) {
  size_t bytes;
  emx_status st = emx_attn_workspace_size(ctx, &w->desc, &w->io, pass, &bytes);
  if (st) return st;
  void *ws = zalloc(bytes);
  st = (pass == EMX_PASS_FORWARD ? emx_attn_forward : emx_attn_backward)(ctx, &w->desc, &w->io, ws, bytes);
  free(ws);
  return st;
}
static void run_ok(views *w, int32_t pass) {
  if (run(w, pass)) fail_msg("%s", emx_last_error());
}

/* Weights [sk] of query i of sequence b and head h. */
static void oracle_row(const packed *p, int b, int h, int i, double *w, double *tau, int64_t *support) {
  const int n = p->sk[b], g = h / (p->h / p->g), at = i + n - p->sq[b];
  double *z = zalloc((size_t)n * 8);
  for (int j = 0; j < n; j++) {
    double dot = 0;
    for (int x = 0; x < p->d; x++)
      dot += emxi_load(p->q, p->dtype, ((int64_t)(p->cu_q[b] + i) * p->h + h) * p->d + x) *
             emxi_load(p->k, p->dtype, ((int64_t)(p->cu_k[b] + j) * p->g + g) * p->d + x);
    const bool seen = (!p->causal || j <= at) && (p->left < 0 || j >= at - p->left) && (p->right < 0 || j <= at + p->right);
    z[j] = seen ? dot / sqrt(p->d) - (p->alibi ? (double)p->slopes[h] * abs(at - j) : 0) : -INFINITY;
  }
  const double alpha = p->alphas[0] != 0 ? p->alphas[h] : p->alpha;
  *tau = emxi_oracle_entmax(z, n, alpha, w, support);
  if (alpha == 1) {
    double m = -INFINITY, sum = 0;
    for (int j = 0; j < n; j++) m = fmax(m, z[j]);
    for (int j = 0; j < n && m > -INFINITY; j++) sum += exp(z[j] - m);
    *tau = m > -INFINITY ? m + log(sum) : -INFINITY;
  }
  free(z);
}

static void check_forward(packed *p, const char *what) {
  views w;
  view(p, &w);
  run_ok(&w, EMX_PASS_FORWARD);
  /* Sums of D products in the working type, as in test_attn.c; 16-bit outputs add half a unit in the last place. */
  const double tol = p->dtype == EMX_F64   ? 1e-11
                     : p->dtype == EMX_F32 ? 5e-5
                                           : 1.6e-2,
               tol_tau = p->dtype == EMX_F64 ? 1e-11 : 1e-5;
  for (int b = 0; b < p->b; b++)
    for (int h = 0; h < p->h; h++)
      for (int i = 0; i < p->sq[b]; i++) {
        double *weights = zalloc((size_t)p->sk[b] * 8), want;
        int64_t support, row = (int64_t)(p->cu_q[b] + i) * p->h + h;
        oracle_row(p, b, h, i, weights, &want, &support);
        const double tau = emxi_load(p->tau, w.tau.dtype, row);
        if (!(tau == want || fabs(tau - want) <= tol_tau * fmax(1, fabs(want))))
          fail_msg("%s: sequence %d head %d row %d: tau %g, oracle %g", what, b, h, i, tau, want);
        if (p->dtype == EMX_F64) assert_int_equal(p->support[row], support);
        for (int x = 0; x < p->d; x++) {
          double o = 0, got = emxi_load(p->o, p->dtype, row * p->d + x);
          for (int j = 0; j < p->sk[b]; j++)
            if (weights[j] != 0)
              o += weights[j] * emxi_load(p->v, p->dtype, ((int64_t)(p->cu_k[b] + j) * p->g + h / (p->h / p->g)) * p->d + x);
          /* a weight is y^b, b = 1/(alpha-1): near 1 the rounding of y times b; above 2 a y that is zero but for its rounding */
          const double alpha = p->alphas[0] != 0 ? p->alphas[h] : p->alpha, extra = alpha > 2   ? pow(1e-15, 1 / (alpha - 1))
                                                                                    : alpha > 1 ? 4e-16 / (alpha - 1)
                                                                                                : 0;
          if (!(fabs(got - o) <= (tol + extra) * fmax(1, fabs(o))))
            fail_msg("%s: sequence %d head %d row %d dim %d: %g, oracle %g", what, b, h, i, x, got, o);
        }
        free(weights);
      }
}

static const packed catalogue[] = {
    {.b = 4, .h = 4, .g = 2, .d = 16, .sq = {5, 0, 3, 90}, .sk = {7, 4, 0, 90}, .left = -1, .right = -1},
    {.b = 3,
     .h = 6,
     .g = 2,
     .d = 32,
     .sq = {130, 70, 1},
     .sk = {130, 200, 150},
     .left = -1,
     .right = -1,
     .causal = true,
     .alibi = true},
    {.b = 2, .h = 2, .g = 1, .d = 16, .sq = {150, 9}, .sk = {150, 300}, .left = 20, .right = -1, .causal = true},
    {.b = 2, .h = 3, .g = 3, .d = 24, .sq = {150, 40}, .sk = {170, 300}, .left = 70, .right = 5, .alibi = true},
    {.b = 2, .h = 2, .g = 2, .d = 16, .sq = {100, 80}, .sk = {100, 20}, .left = -1, .right = 3}, /* S > N: positions below 0 */
    {.b = 1, .h = 1, .g = 1, .d = 16, .sq = {50}, .sk = {50}, .left = 0, .right = 0},            /* sees itself */
    {.b = 1, .h = 8, .g = 2, .d = 64, .sq = {140}, .sk = {333}, .left = 100, .right = 100, .causal = true, .alibi = true},
    {.b = 1, .h = 2, .g = 1, .d = 16, .sq = {90}, .sk = {1000}, .left = -1, .right = -1, .causal = true, .alibi = true},
    {.b = 1, .h = 1, .g = 1, .d = 32, .sq = {130}, .sk = {900}, .left = -1, .right = -1, .causal = true, .clustered = true},
    {.b = 2,
     .h = 4,
     .g = 2,
     .d = 16,
     .sq = {200, 40},
     .sk = {700, 4500},
     .left = -1,
     .right = -1,
     .alibi = true,
     .clustered = true},
    {.b = 3,
     .h = 4,
     .g = 2,
     .d = 16,
     .sq = {210, 0, 30},
     .sk = {300, 5, 30},
     .left = -1,
     .right = -1,
     .causal = true,
     .alibi = true},
    {.b = 1, .h = 1, .g = 1, .d = 16, .sq = {520}, .sk = {520}, .left = 300, .right = -1, .clustered = true},
};
enum { CASES = sizeof catalogue / sizeof *catalogue };

static void test_forward(void **state) {
  (void)state;
  static const int32_t dtypes[] = {EMX_F32, EMX_F64, EMX_BF16};
  static const double alphas[] = {1, 1.5, 1.3, 2};
  for (int c = 0; c < CASES; c++)
    for (int t = 0; t < 3; t++)
      for (int a = 0; a < 5; a++) {
        if (c >= 7 && (c + t + a) % 3) continue; /* long rows: the oracle takes its time */
        packed p = catalogue[c];
        p.dtype = dtypes[t];
        p.spread = a == 1 ? 0.05 : 1.5;
        if (a < 4) p.alpha = alphas[a];
        for (int h = 0; a == 4 && h < p.h; h++) p.alphas[h] = (double[]){1.5, 1, 2, 1.000001, 1.7, 3, 1.2, 4}[(h + c) % 8];
        make(&p, (uint64_t)(c * 16 + a));
        char what[64];
        snprintf(what, sizeof what, "case %d %s alpha %g%s", c, emx_dtype_name(p.dtype), p.alpha, a == 4 ? " a head" : "");
        check_forward(&p, what);
        drop(&p);
      }
}

typedef struct gradients {
  void *g[3];
  double d_alpha[MAX_HEADS];
  size_t bytes[3];
} gradients;
/* d_o is q itself: any numbers do. */
static gradients run_backward(packed *p, views *w, emx_ctx *c) {
  gradients g = {0};
  emx_tensor t[3] = {w->q, w->k, w->v}, d_o = w->q, da = w->alphas;
  for (int i = 0; i < 3; i++) {
    g.bytes[i] =
        (size_t)(i ? total(p->cu_k, p->b) * p->g : total(p->cu_q, p->b) * p->h) * (size_t)p->d * emx_dtype_size(p->dtype);
    t[i].data = g.g[i] = zalloc(g.bytes[i]);
  }
  da.data = g.d_alpha;
  emx_attn_io keep = w->io;
  w->io.o = NULL;
  w->io.d_o = &d_o, w->io.d_q = &t[0], w->io.d_k = &t[1], w->io.d_v = &t[2];
  if (w->io.alphas) w->io.d_alpha = &da;
  emx_ctx *mine = ctx;
  ctx = c;
  run_ok(w, EMX_PASS_BACKWARD);
  ctx = mine;
  w->io = keep;
  return g;
}
static void same(const gradients *a, const gradients *b, const char *what) {
  for (int i = 0; i < 3; i++)
    if (memcmp(a->g[i], b->g[i], a->bytes[i])) fail_msg("%s: tensor %d differs", what, i);
  if (memcmp(a->d_alpha, b->d_alpha, sizeof a->d_alpha)) fail_msg("%s: d_alpha differs", what);
}
static void forget(gradients *g) {
  for (int i = 0; i < 3; i++) free(g->g[i]);
}

/* What the lists hold, that the backward pass has the same bits with them, without them and with lists that lie, on any number of
 * threads. */
static void test_lists(void **state) {
  (void)state;
  static const int32_t dtypes[] = {EMX_F32, EMX_BF16, EMX_F64};
  for (int c = 0; c < CASES; c++) {
    packed p = catalogue[c];
    p.dtype = dtypes[c % 3];
    p.spread = c % 2 ? 1.5 : 0.7;
    p.alpha = c % 4 == 3 ? 2 : 1.5;
    for (int h = 0; c % 4 == 1 && h < p.h; h++) p.alphas[h] = (double[]){1.5, 1, 1.3, 2}[h % 4];
    const int64_t capacity = (int64_t[]){5, 12, 33}[c % 3];
    make(&p, (uint64_t)(300 + c));
    views w;
    view(&p, &w);
    const int64_t rows = total(p.cu_q, p.b) * p.h, shape[3] = {total(p.cu_q, p.b), p.h, capacity};
    int32_t *index = zalloc((size_t)(rows * capacity) * 4), *counts = zalloc((size_t)rows * 4);
    memset(index, 0x77, (size_t)(rows * capacity) * 4);
    emx_tensor ti = emx_tensor_view(index, EMX_I32, 3, shape);
    w.io.support_index = &ti;
    run_ok(&w, EMX_PASS_FORWARD);
    int64_t longer = 0, listed = 0;
    for (int b = 0; b < p.b; b++)
      for (int h = 0; h < p.h; h++)
        for (int i = 0; i < p.sq[b]; i++) {
          const int64_t row = (int64_t)(p.cu_q[b] + i) * p.h + h;
          const double alpha = p.alphas[0] != 0 ? p.alphas[h] : p.alpha;
          double *weights = zalloc((size_t)p.sk[b] * 8), tau;
          int64_t support, at = 0;
          oracle_row(&p, b, h, i, weights, &tau, &support);
          longer += p.support[row] > capacity;
          listed += p.support[row] > 0 && p.support[row] <= capacity;
          for (int j = 0; j < p.sk[b] && p.support[row] <= capacity && alpha > 1 && p.dtype == EMX_F64; j++)
            if (weights[j] > 0) assert_int_equal(index[row * capacity + at++], j);
          free(weights);
        }
    assert_true(listed > 0 || p.sq[0] == 0);
    if (c == 0 || c == 3) assert_true(longer > 0); /* the case is there */
    gradients with = run_backward(&p, &w, ctx), other;
    memcpy(counts, p.support, (size_t)rows * 4);
    w.io.support_index = NULL;
    other = run_backward(&p, &w, ctx);
    same(&with, &other, "without lists");
    forget(&other);
    w.io.support_index = &ti;
    for (int lie = 0; lie < 6; lie++) {
      int32_t *good = zalloc((size_t)(rows * capacity) * 4);
      memcpy(good, index, (size_t)(rows * capacity) * 4);
      for (int64_t r = 0; r < rows; r++) {
        uint32_t rnd[4];
        emxi_philox(3, (uint64_t)lie, (uint64_t)r, rnd);
        int32_t *list = index + r * capacity;
        if (rnd[3] % 3 == 0) continue;
        if (lie == 0) list[rnd[0] % (uint32_t)capacity] = (int32_t)rnd[1];      /* far outside */
        if (lie == 1) list[rnd[0] % (uint32_t)capacity] += rnd[1] % 2 ? 1 : -1; /* beside */
        if (lie == 2) p.support[r] = (int32_t)rnd[1];                           /* any length */
        if (lie == 3) p.support[r] += rnd[1] % 2 ? 1 : -1;                      /* one more or less */
        if (lie == 4) list[0] = list[capacity - 1];                             /* unsorted */
        if (lie == 5) memset(list, rnd[1] % 2 ? 0 : 0xff, (size_t)capacity * 4);
      }
      other = run_backward(&p, &w, ctx);
      for (int i = 0; i < 3;
           i++) /* A list that lacks an element with p = y^2 moves tau by about p, and passes where that is below tau's
                                     rounding, 1e-6: its share of the gradients is y, 1e-3. bf16 rounds them to 4e-3. */
        for (size_t x = 0; x < with.bytes[i] / emx_dtype_size(p.dtype); x++) {
          const double e = emxi_load(with.g[i], p.dtype, (int64_t)x), got = emxi_load(other.g[i], p.dtype, (int64_t)x);
          if (!(fabs(e - got) <= 1e-2 * (1 + fabs(e)))) fail_msg("case %d lie %d tensor %d: %g, expected %g", c, lie, i, got, e);
        }
      forget(&other);
      memcpy(index, good, (size_t)(rows * capacity) * 4);
      memcpy(p.support, counts, (size_t)rows * 4);
      free(good);
    }
    for (int variant = 0; variant < 4; variant++) { /* one worker: a task a KV head; many: queries and keys apart */
      emx_ctx_opts opts;
      emx_ctx_opts_init(&opts);
      opts.threads = variant & 1 ? 9 : 1;
      w.io.support_index = variant & 2 ? NULL : &ti;
      emx_ctx *mine;
      assert_int_equal(emx_ctx_create(&opts, &mine), EMX_OK);
      other = run_backward(&p, &w, mine);
      same(&with, &other, "threads");
      forget(&other);
      emx_ctx_destroy(mine);
    }
    forget(&with);
    free(index), free(counts);
    drop(&p);
  }
}

/* Rows that are uniform or nearly so, and longer than their share of the working memory: every block is cut until its lists
 * fit. */
static void test_flat_rows(void **state) {
  (void)state;
  enum { S = 24, D = 16 };
  static const int64_t lengths[] = {1000, 16384, 131072};
  static const double spreads[] = {0, 0.02};
  for (int l = 0; l < 3; l++)
    for (int t = 0; t < 2; t++) {
      const int64_t n = lengths[l], sq[4] = {1, 1, S, D}, sk[4] = {1, 1, n, D};
      float *q = noise(EMX_F32, 1, S * D, spreads[t]), *k = noise(EMX_F32, 2, n * D, 1), *v = zalloc((size_t)(n * D) * 4),
            o[S * D];
      for (int64_t i = 0; i < n * D; i++) v[i] = 1;
      int32_t support[S];
      emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, sq), tk = emx_tensor_view(k, EMX_F32, 4, sk),
                 tv = emx_tensor_view(v, EMX_F32, 4, sk), to = emx_tensor_view(o, EMX_F32, 4, sq),
                 ts = emx_tensor_view(support, EMX_I32, 3, sq);
      views w = {0};
      emx_attn_desc_init(&w.desc);
      emx_attn_io_init(&w.io);
      w.io.q = &tq, w.io.k = &tk, w.io.v = &tv, w.io.o = &to, w.io.support = &ts;
      run_ok(&w, EMX_PASS_FORWARD);
      for (int i = 0; i < S; i++) {
        if (t == 0) assert_int_equal(support[i], n - S + 1 + i);
        if (!(fabsf(o[i * D] - 1) < 1e-5f))
          fail_msg("n %lld std %g row %d: the weights sum to %.8f", (long long)n, spreads[t], i, (double)o[i * D]);
      }
      if (n == 131072) assert_true(support[S - 1] > n / 20);
      free(q), free(k), free(v);
    }
}

static double objective(views *w, const double *c, int64_t n) {
  run_ok(w, EMX_PASS_FORWARD);
  double f = 0;
  for (int64_t i = 0; i < n; i++) f += ((double *)w->o.data)[i] * c[i];
  return f;
}

static void test_backward(void **state) {
  (void)state;
  for (int c = 0; c < CASES; c++) {
    packed p = catalogue[c];
    p.dtype = EMX_F64;
    p.spread = 1;
    p.d = 4;
    for (int b = 0; b < p.b; b++)
      p.sq[b] = (p.sq[b] + 6) / 7, p.sk[b] = (p.sk[b] + 6) / 7; /* differences run the forward pass often */
    p.left = p.left > 7 ? p.left / 7 : p.left;
    p.right = p.right > 7 ? p.right / 7 : p.right;
    for (int h = 0; h < p.h; h++) p.alphas[h] = (double[]){1.5, 1.25, 1.001, 1.9, 1.00003}[(h + c) % 5];
    make(&p, (uint64_t)(200 + c));
    const int64_t nq = total(p.cu_q, p.b) * p.h * p.d, nk = total(p.cu_k, p.b) * p.g * p.d;
    views w;
    view(&p, &w);
    double *weight = noise(EMX_F64, 999, nq, 1), *grad[4], d_alpha[MAX_HEADS];
    objective(&w, weight, nq);
    emx_tensor d_o = w.q, g[3] = {w.q, w.k, w.v}, ga = w.alphas;
    d_o.data = weight;
    ga.data = grad[3] = d_alpha;
    for (int t = 0; t < 3; t++) g[t].data = grad[t] = zalloc((size_t)(t ? nk : nq) * 8);
    views x = w;
    x.io.q = &w.q, x.io.k = &w.k, x.io.v = &w.v, x.io.o = NULL, x.io.tau = &w.tau, x.io.alphas = &w.alphas;
    x.io.cu_seqlens_q = &w.cu_q, x.io.cu_seqlens_k = &w.cu_k, x.io.alibi_slopes = p.alibi ? &w.slopes : NULL;
    x.io.d_o = &d_o, x.io.d_q = &g[0], x.io.d_k = &g[1], x.io.d_v = &g[2], x.io.d_alpha = &ga;
    run_ok(&x, EMX_PASS_BACKWARD);
    double *at[4] = {p.q, p.k, p.v, p.alphas};
    for (int t = 0; t < 4; t++) {
      const int64_t n = t == 0 ? nq : t == 3 ? p.h : nk;
      for (int64_t i = 0; i < n; i += 1 + (t == 3 ? 0 : n / 20)) {
        /* The difference is off by eps^2 times a third derivative, about 1e-10, and by the rounding of the two values, 1e-15 /
         * eps. */
        const double eps = 1e-5, keep = at[t][i];
        at[t][i] = keep + eps;
        const double hi = objective(&w, weight, nq);
        at[t][i] = keep - eps;
        const double lo = objective(&w, weight, nq);
        at[t][i] = keep;
        const double fd = (hi - lo) / (2 * eps);
        /* alpha near 1 has no kinks at all, larger alphas have one of the first derivative where a score crosses the threshold:
         * by chance a difference straddles one, and is then off by eps times the jump */
        if (fabs(fd - grad[t][i]) > 3e-5 * fmax(1, fabs(fd)))
          fail_msg("case %d tensor %d [%d]: %.9g, finite difference %.9g", c, t, (int)i, grad[t][i], fd);
      }
    }
    for (int t = 0; t < 3; t++) free(grad[t]);
    free(weight);
    drop(&p);
  }
}

/* At alpha = 1 there is no difference to take on the left: the gradient is the limit from above, 1e-6 of a second derivative
 * away. */
static void test_d_alpha_of_softmax(void **state) {
  (void)state;
  packed p = {.b = 1, .h = 2, .g = 1, .d = 8, .sq = {9}, .sk = {30}, .left = -1, .right = -1, .spread = 1, .dtype = EMX_F64};
  make(&p, 5);
  double d[2][2], *gq = zalloc(9 * 2 * 8 * 8), *gk = zalloc(30 * 8 * 8), *gv = zalloc(30 * 8 * 8);
  for (int near = 0; near < 2; near++) {
    p.alphas[0] = p.alphas[1] = near ? 1.000001 : 1;
    views w;
    view(&p, &w);
    run_ok(&w, EMX_PASS_FORWARD);
    emx_tensor tq = w.q, tk = w.k, tv = w.v, ta = w.alphas;
    tq.data = gq, tk.data = gk, tv.data = gv, ta.data = d[near];
    w.io.d_o = &w.q, w.io.d_q = &tq, w.io.d_k = &tk, w.io.d_v = &tv, w.io.d_alpha = &ta;
    run_ok(&w, EMX_PASS_BACKWARD);
  }
  for (int h = 0; h < 2; h++) {
    assert_true(fabs(d[0][h]) > 1e-2);
    if (!(fabs(d[0][h] - d[1][h]) < 1e-4 * fabs(d[0][h]))) fail_msg("head %d: %.9g at 1, %.9g near it", h, d[0][h], d[1][h]);
  }
  free(gq), free(gk), free(gv);
  drop(&p);
}

static void test_bad_alphas(void **state) {
  (void)state;
  packed p = {.b = 1, .h = 2, .g = 1, .d = 16, .sq = {3}, .sk = {3}, .left = -1, .right = -1, .spread = 1, .dtype = EMX_F32};
  p.alphas[0] = p.alphas[1] = 1.5;
  make(&p, 6);
  views w;
  view(&p, &w);
  p.alphas[1] = 4.5;
  assert_int_equal(run(&w, EMX_PASS_FORWARD), EMX_ERR_INVALID);
  p.alphas[1] = NAN;
  assert_int_equal(run(&w, EMX_PASS_FORWARD), EMX_ERR_INVALID);
  p.alphas[1] = 3;
  w.io.d_o = w.io.d_q = &w.q, w.io.d_k = &w.k, w.io.d_v = &w.v;
  assert_int_equal(run(&w, EMX_PASS_BACKWARD), EMX_ERR_UNSUPPORTED);
  p.alphas[1] = 1;
  w.io.lse = &w.tau;
  assert_int_equal(run(&w, EMX_PASS_FORWARD), EMX_ERR_INVALID); /* tau, never lse */
  w.io.lse = NULL;
  w.alphas.shape[0] = 1;
  assert_int_equal(run(&w, EMX_PASS_FORWARD), EMX_ERR_SHAPE);
  w.alphas.shape[0] = 2;
  w.alphas.dtype = EMX_F32;
  assert_int_equal(run(&w, EMX_PASS_FORWARD), EMX_ERR_DTYPE);
  w.io.alphas = NULL;
  w.alphas.dtype = EMX_F64;
  w.desc.alpha = 1.5;
  w.io.d_alpha = &w.alphas;
  assert_int_equal(run(&w, EMX_PASS_BACKWARD), EMX_ERR_INVALID); /* d_alpha without alphas */
  drop(&p);
}

/* Powers of two that cancel between queries and keys change no score, hence no bit, also where the squares of keys are below all
 * floats and the bounds of tiles are made from them. */
static void test_tiny_keys(void **state) {
  (void)state;
  for (int i = 0; i < 8; i++) {
    const int32_t dtype = i % 2 ? EMX_F64 : EMX_F32;
    const int power = (dtype == EMX_F64 ? 600 : 80) * (i & 2 ? -1 : 1);
    float *o[2];
    for (int way = 0; way < 2; way++) {
      packed p = {.b = 1,
                  .h = 2,
                  .g = 1,
                  .d = 16,
                  .sq = {64},
                  .sk = {1024},
                  .left = -1,
                  .right = -1,
                  .alpha = i & 4 ? 2 : 1.5,
                  .spread = 1,
                  .dtype = dtype};
      make(&p, 60 + (uint64_t)i);
      for (int64_t x = 0; way && x < 64 * 2 * 16; x++) emxi_store(p.q, dtype, x, ldexp(emxi_load(p.q, dtype, x), power));
      for (int64_t x = 0; way && x < 1024 * 16; x++) emxi_store(p.k, dtype, x, ldexp(emxi_load(p.k, dtype, x), -power));
      views w = {.desc = {0}};
      view(&p, &w);
      run_ok(&w, EMX_PASS_FORWARD);
      o[way] = p.o;
      p.o = NULL;
      drop(&p);
    }
    assert_memory_equal(o[0], o[1], 64 * 2 * 16 * emx_dtype_size(dtype));
    free(o[0]), free(o[1]);
  }
}

/* Calls go to the workers in turn, each to one alone. */
static void in_turn(void *user, int64_t n, emx_task_fn task, void *arg) {
  int32_t *calls = user;
  const int32_t worker = (*calls)++ % 2;
  for (int64_t i = 0; i < n; i++) task(arg, i, worker);
}
/* A listed row that fills its block's lists: the worker that does the keys has not learned yet that blocks must be small. */
static void test_long_lists(void **state) {
  (void)state;
  enum { KEYS = 36864, QUERIES = 400 };
  packed p = {.b = 1,
              .h = 3,
              .g = 3,
              .d = 16,
              .sq = {QUERIES},
              .sk = {KEYS},
              .left = -1,
              .right = -1,
              .alpha = 2,
              .spread = 3,
              .dtype = EMX_F32};
  make(&p, 80);
  memset(p.q, 0, 16 * sizeof(float)); /* all keys have the same weight */
  views w = {.desc = {0}};
  view(&p, &w);
  const int64_t shape[3] = {QUERIES, 3, KEYS};
  int32_t *index = zalloc((size_t)(QUERIES * 3) * KEYS * 4);
  emx_tensor ti = emx_tensor_view(index, EMX_I32, 3, shape);
  w.io.support_index = &ti;
  run_ok(&w, EMX_PASS_FORWARD);
  assert_int_equal(p.support[0], KEYS);
  gradients g[2];
  for (int lists = 0; lists < 2; lists++) {
    emx_ctx_opts opts;
    emx_ctx_opts_init(&opts);
    int32_t turn = 0;
    opts.threads = 2, opts.parallel_for = in_turn, opts.parallel_user = &turn;
    emx_ctx *mine;
    assert_int_equal(emx_ctx_create(&opts, &mine), EMX_OK);
    w.io.support_index = lists ? &ti : NULL;
    g[lists] = run_backward(&p, &w, mine);
    emx_ctx_destroy(mine);
  }
  same(&g[0], &g[1], "with lists");
  forget(&g[0]), forget(&g[1]);
  free(index);
  drop(&p);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_forward),   cmocka_unit_test(test_backward),           cmocka_unit_test(test_lists),
      cmocka_unit_test(test_flat_rows), cmocka_unit_test(test_d_alpha_of_softmax), cmocka_unit_test(test_bad_alphas),
      cmocka_unit_test(test_tiny_keys), cmocka_unit_test(test_long_lists)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
