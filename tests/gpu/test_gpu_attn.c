/* Dense attention on a GPU, forward and backward, against float64 formulas over whole rows, which finite differences confirm. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdlib.h>

#include "base/num.h"
#include "entmax/entmax.h"
#include "gpu_case.h"

/* A call in BHND order. lens: lengths of the sequences, or 0: whole. */
typedef struct problem {
  int64_t B, H, G, S, N, D;
  int32_t dtype;
  double alpha, alphas[8]; /* alphas[0] != 0: a head each */
  bool causal, alibi, f32_out;
  int64_t left, right; /* -1: all */
  float scale;
  double spread; /* of the keys */
  int32_t len_q[4], len_k[4];
  int64_t list;
  bool no_backward;
  int clusters;            /* of 128 neighbouring queries and keys each, far apart */
  bool mixed;              /* rows of all kinds: queries of three sizes, forty of each in turn */
  bool spoil;              /* backward is given lists that lack most of the support */
  const float *own_slopes; /* [H], with alibi */
  bool heavy;              /* keys here and there are ten times as long */
  uint64_t seed;
  /* values as the tensors' dtype has them, in double; results */
  double *q, *k, *v, *d_o, *o, *tau, *support, *d_q, *d_k, *d_v, *d_alpha;
  float slopes[8];
} problem;

static double *take(int64_t n) {
  double *p = calloc((size_t)n + 1, sizeof *p);
  assert_non_null(p);
  return p;
}
static int64_t n_q(const problem *p) { return p->B * p->H * p->S * p->D; }
static int64_t n_k(const problem *p) { return p->B * p->G * p->N * p->D; }
static double *normals(const problem *p, int which, int64_t n, double spread) {
  float *f = malloc(sizeof *f * (size_t)(n + 1));
  double *x = take(n);
  char one[8];
  emxi_normals(p->seed, (uint64_t)which, f, n);
  for (int64_t i = 0; i < n; i++) {
    emxi_store(one, p->dtype, 0, (double)f[i] * spread);
    x[i] = emxi_load(one, p->dtype, 0);
  }
  free(f);
  return x;
}
static void gather(const problem *p, double *x, int64_t rows, int64_t n) {
  char one[8];
  for (int64_t i = 0; i < n; i++) {
    const bool centre = i % p->D == i / p->D % rows / 128 % p->clusters;
    emxi_store(one, p->dtype, 0, 0.5 * x[i] + (centre ? sqrt(8 * sqrt((double)p->D)) : 0));
    x[i] = emxi_load(one, p->dtype, 0);
  }
}
static void make(problem *p) {
  p->q = normals(p, 0, n_q(p), 1);
  for (int64_t i = 0; p->mixed && i < n_q(p); i++) p->q[i] *= (double[]){1, 0x1p-6, 2}[i / p->D % p->S / 40 % 3];
  p->k = normals(p, 1, n_k(p), p->spread);
  for (int64_t i = 0; p->heavy && i < n_k(p); i++)
    if (i / p->D % 97 == 5) p->k[i] *= 8;
  p->v = normals(p, 2, n_k(p), 1);
  p->d_o = normals(p, 3, n_q(p), 1);
  if (p->clusters) {
    gather(p, p->q, p->S, n_q(p));
    gather(p, p->k, p->N, n_k(p));
  }
  p->o = take(n_q(p)), p->d_q = take(n_q(p)), p->d_k = take(n_k(p)), p->d_v = take(n_k(p));
  p->tau = take(p->B * p->H * p->S), p->support = take(p->B * p->H * p->S), p->d_alpha = take(p->H);
  for (int h = 0; h < p->H; h++) p->slopes[h] = p->own_slopes ? p->own_slopes[h] : h % 3 == 0 ? 0 : 1.0f / (float)(h + 1);
}
static void release(problem *p) {
  free(p->q), free(p->k), free(p->v), free(p->d_o), free(p->o), free(p->d_q), free(p->d_k), free(p->d_v), free(p->tau),
      free(p->support), free(p->d_alpha);
}
static double alpha_of(const problem *p, int64_t h) { return p->alphas[0] != 0 ? p->alphas[h] : p->alpha; }

/* Scores that row (b, h, i) sees; the others are -inf. */
static int64_t row_scores(const problem *p, int64_t b, int64_t h, int64_t i, double *z) {
  const int64_t s = p->len_q[b] ? p->len_q[b] : p->S, n = p->len_k[b] ? p->len_k[b] : p->N, at = i + n - s;
  const double *q = p->q + ((b * p->H + h) * p->S + i) * p->D, *k = p->k + (b * p->G + h / (p->H / p->G)) * p->N * p->D;
  const double scale = p->scale == 0 ? 1 / sqrt((double)p->D) : (double)p->scale;
  if (i >= s) return 0;
  for (int64_t j = 0; j < n; j++) {
    double dot = 0;
    for (int64_t d = 0; d < p->D; d++) dot += q[d] * k[j * p->D + d];
    z[j] = dot * scale - (p->alibi ? (double)p->slopes[h] * (double)llabs((long long)(at - j)) : 0);
    if ((p->causal && j > at) || (p->left >= 0 && j < at - p->left) || (!p->causal && p->right >= 0 && j > at + p->right))
      z[j] = -INFINITY;
  }
  return n;
}

/* Everything in float64; results of each row go to `row`, if there is one, before its gradients. */
static void reference(problem *r) {
  double *z = take(r->N), *w = take(r->N), *g = take(r->N);
  const double scale = r->scale == 0 ? 1 / sqrt((double)r->D) : (double)r->scale;
  for (int64_t b = 0; b < r->B; b++)
    for (int64_t h = 0; h < r->H; h++)
      for (int64_t i = 0; i < r->S; i++) {
        const int64_t row = (b * r->H + h) * r->S + i, n = row_scores(r, b, h, i, z), D = r->D;
        const double alpha = alpha_of(r, h), *q = r->q + row * D, *d_o = r->d_o + row * D;
        double *k = r->k + (b * r->G + h / (r->H / r->G)) * r->N * D, *v = r->v + (k - r->k), *dk = r->d_k + (k - r->k),
               *dv = r->d_v + (k - r->k), m = -INFINITY, su = 0, sug = 0, sum = 0;
        int64_t support = 0;
        for (int64_t j = 0; j < n; j++) m = fmax(m, z[j]);
        double tau = m == -INFINITY ? -INFINITY : emxi_oracle_entmax(z, n, alpha, w, &support);
        if (alpha == 1 && m > -INFINITY) {
          support = 0;
          for (int64_t j = 0; j < n; j++) {
            sum += exp(z[j] - m);
            support += z[j] > -INFINITY;
          }
          tau = m + log(sum);
        }
        r->tau[row] = tau;
        r->support[row] = (double)support;
        if (!support) continue;
        for (int64_t j = 0; j < n; j++) {
          if (w[j] == 0) continue;
          g[j] = 0;
          for (int64_t d = 0; d < D; d++) {
            r->o[row * D + d] += w[j] * v[j * D + d];
            g[j] += d_o[d] * v[j * D + d];
          }
          su += pow(w[j], 2 - alpha);
          sug += pow(w[j], 2 - alpha) * g[j];
        }
        const double delta = sug / su;
        double p_log = 0;
        for (int64_t j = 0; j < n; j++)
          if (w[j] > 0) p_log += w[j] * log(w[j]);
        for (int64_t j = 0; j < n; j++) {
          if (w[j] == 0) continue;
          const double u = pow(w[j], 2 - alpha), ds = scale * u * (g[j] - delta);
          for (int64_t d = 0; d < D; d++) {
            r->d_q[row * D + d] += ds * k[j * D + d];
            dk[j * D + d] += ds * q[d];
            dv[j * D + d] += w[j] * d_o[d];
          }
          /* as the entmax package has it (Correia et al. 2019); alpha = 1: its limit */
          const double l = log(w[j]), a = alpha - 1;
          if (alpha > 1)
            r->d_alpha[h] += g[j] * ((w[j] - u / su) / (a * a) - (w[j] * l - u / su * p_log) / a);
          else
            r->d_alpha[h] -= (g[j] - delta) * w[j] * l * l / 2;
        }
      }
  free(z), free(w), free(g);
}

/* ---- the call */

/* Device tensors of a problem. */
typedef struct device {
  emx_attn_desc desc;
  emx_attn_io f, b; /* forward, backward */
  emx_tensor q, k, v, d_o, o, tau, support, d_q, d_k, d_v, slopes, alphas, d_alpha, len_q, len_k, index;
} device;

static emx_tensor put(const double *x, int32_t dtype, int ndim, const int64_t *shape) {
  emx_tensor t = emx_tensor_view(NULL, dtype, ndim, shape);
  int64_t n = 1;
  for (int d = 0; d < ndim; d++) n *= shape[d];
  void *host = malloc((size_t)n * 8 + 1);
  for (int64_t i = 0; x && i < n; i++) emxi_store(host, dtype, i, x[i]);
  t.data = gpu_take(x ? host : NULL, (size_t)n * emx_dtype_size(dtype));
  t.device = EMX_DEVICE_CUDA;
  free(host);
  return t;
}
static double *get(const emx_tensor *t) {
  const int64_t n = (int64_t)(gpu_bytes(t) / emx_dtype_size(t->dtype));
  void *host = malloc(gpu_bytes(t) + 1);
  double *x = take(n);
  gpu_fetch(host, t->data, gpu_bytes(t));
  for (int64_t i = 0; i < n; i++) x[i] = emxi_load(host, t->dtype, i);
  free(host);
  return x;
}
static void open_device(const problem *p, device *w) {
  const int64_t sq[4] = {p->B, p->H, p->S, p->D}, sk[4] = {p->B, p->G, p->N, p->D}, si[4] = {p->B, p->H, p->S, p->list};
  const int32_t out = p->f32_out ? EMX_F32 : p->dtype;
  *w = (device){0};
  emx_attn_desc_init(&w->desc);
  emx_attn_io_init(&w->f);
  w->desc.alpha = p->alpha;
  w->desc.scale = p->scale;
  w->desc.flags = p->causal ? EMX_ATTN_CAUSAL : 0;
  w->desc.window_left = (int32_t)p->left;
  w->desc.window_right = (int32_t)p->right;
  w->q = put(p->q, p->dtype, 4, sq), w->k = put(p->k, p->dtype, 4, sk), w->v = put(p->v, p->dtype, 4, sk);
  w->d_o = put(p->d_o, p->dtype, 4, sq), w->o = put(NULL, out, 4, sq), w->tau = put(NULL, EMX_F32, 3, sq);
  w->support = put(NULL, EMX_I32, 3, sq);
  w->d_q = put(NULL, out, 4, sq), w->d_k = put(NULL, out, 4, sk), w->d_v = put(NULL, out, 4, sk);
  w->f.q = &w->q, w->f.k = &w->k, w->f.v = &w->v;
  if (p->alibi) {
    double s[8];
    for (int h = 0; h < p->H; h++) s[h] = (double)p->slopes[h];
    w->slopes = put(s, EMX_F32, 1, &p->H);
    w->f.alibi_slopes = &w->slopes;
  }
  if (p->alphas[0] != 0) {
    w->alphas = put(p->alphas, EMX_F64, 1, &p->H);
    w->f.alphas = &w->alphas;
  }
  if (p->len_q[0]) {
    double lq[4], lk[4];
    for (int b = 0; b < 4; b++) lq[b] = p->len_q[b], lk[b] = p->len_k[b];
    w->len_q = put(lq, EMX_I32, 1, &p->B), w->len_k = put(lk, EMX_I32, 1, &p->B);
    w->f.seqlens_q = &w->len_q, w->f.seqlens_k = &w->len_k;
  }
  *(p->alphas[0] == 0 && p->alpha == 1 ? &w->f.lse : &w->f.tau) = &w->tau;
  w->b = w->f;
  w->f.o = &w->o, w->f.support = &w->support;
  if (p->list) {
    w->index = put(NULL, EMX_I32, 4, si);
    w->f.support_index = w->b.support_index = &w->index;
    w->b.support = &w->support;
  }
  w->b.d_o = &w->d_o, w->b.d_q = &w->d_q, w->b.d_k = &w->d_k, w->b.d_v = &w->d_v;
  if (p->alphas[0] != 0) {
    w->d_alpha = put(NULL, EMX_F64, 1, &p->H);
    w->b.d_alpha = &w->d_alpha;
  }
}
static void close_device(device *w) {
  emx_tensor *t[] = {&w->q,   &w->k,   &w->v,      &w->d_o,    &w->o,       &w->tau,   &w->support, &w->d_q,
                     &w->d_k, &w->d_v, &w->slopes, &w->alphas, &w->d_alpha, &w->len_q, &w->len_k,   &w->index};
  for (size_t i = 0; i < sizeof t / sizeof *t; i++) gpu_free(t[i]->data);
}
/* The workspace is as large as asked for, full of NaN, and off alignment. */
static void call(const device *w, int32_t pass) {
  const emx_attn_io *io = pass == EMX_PASS_FORWARD ? &w->f : &w->b;
  size_t bytes;
  OK(emx_attn_workspace_size(gpu, &w->desc, io, pass, &bytes));
  char *work = gpu_take(NULL, bytes + 1);
  OK((pass == EMX_PASS_FORWARD ? emx_attn_forward : emx_attn_backward)(gpu, &w->desc, io, work + 1, bytes));
  OK(emx_ctx_sync(gpu));
  gpu_free(work);
}

/* Relative distance over everything. */
static double distance(const double *x, const double *want, int64_t n) {
  double err = 0, norm = 0;
  for (int64_t i = 0; i < n; i++) {
    err += (x[i] - want[i]) * (x[i] - want[i]);
    norm += want[i] * want[i];
  }
  return norm > 0 ? sqrt(err / norm) : sqrt(err);
}
static const char *describe(const problem *p) {
  static char text[200];
  snprintf(text, sizeof text, "B %d H %d G %d S %d N %d D %d %s alpha %g%s causal %d alibi %d left %d right %d spread %g list %d",
           (int)p->B, (int)p->H, (int)p->G, (int)p->S, (int)p->N, (int)p->D, emx_dtype_name(p->dtype), p->alpha,
           p->alphas[0] != 0 ? "s" : "", p->causal, p->alibi, (int)p->left, (int)p->right, p->spread, (int)p->list);
  return text;
}

/* Outputs of the last check, for comparisons. */
static double *last_o, *last_dk;

/* Outputs of a forward pass, in the problem's order. */
static void judge_forward(const problem *p, const problem *r, const double *o, const double *tau, const double *support) {
  /* Scores are f32 sums of D products (up to 1e-5 of their size here), weights inherit it; elements of 16-bit outputs have half a
   * unit in the last place, and weights of the dense path are rounded to the keys' type. */
  const double unit = p->dtype == EMX_BF16 ? 0x1p-8 : p->dtype == EMX_F16 ? 0x1p-11 : 0, tol = 4e-5 + unit;
  for (int64_t row = 0; row < p->B * p->H * p->S; row++) {
    double m = 1;
    if (isfinite(r->tau[row])) m = fmax(1, fabs(r->tau[row]));
    if (!(tau[row] == r->tau[row] || fabs(tau[row] - r->tau[row]) <= 2e-6 * m + 2e-6 * p->spread))
      fail_msg("%s row %d: tau %.9g, oracle %.9g", describe(p), (int)row, tau[row], r->tau[row]);
    if (r->support[row] == 0) assert_true(support[row] == 0);
    for (int64_t d = 0; d < p->D; d++)
      if (!(fabs(o[row * p->D + d] - r->o[row * p->D + d]) <= 2 * tol * fmax(1, fabs(r->o[row * p->D + d]))))
        fail_msg("%s row %d dim %d: %g, oracle %g", describe(p), (int)row, (int)d, o[row * p->D + d], r->o[row * p->D + d]);
  }
  double *z = take(p->N); /* support: exact but for scores that float rounding puts on either side of tau */
  for (int64_t row = 0; row < p->B * p->H * p->S; row++) {
    const int64_t h = row / p->S % p->H, n = row_scores(p, row / p->S / p->H, h, row % p->S, z);
    int64_t least = 0, most = 0;
    double sum = 0;
    if (alpha_of(p, h) == 1) {
      assert_true(support[row] == r->support[row]);
      continue;
    }
    for (int64_t j = 0; j < n; j++) {
      const double over = (alpha_of(p, h) - 1) * z[j] - tau[row], y = (alpha_of(p, h) - 1) * z[j] - r->tau[row],
                   band = 4e-6 * fmax(1, fabs(r->tau[row])) + 4e-6 * p->spread;
      least += y > band && z[j] > -INFINITY;
      most += y > -band && z[j] > -INFINITY;
      sum += over > 0 ? pow(over, 1 / (alpha_of(p, h) - 1)) : 0;
    }
    /* tau is rounded to f32; every score that it comes from, too: those of clusters are scored again, others may be the tensor cores' */
    const double off = 1e-5 * fmax(1, fabs(r->tau[row]) / 8) * (p->clusters ? 1 : 4);
    if (r->support[row] > 0 && (alpha_of(p, h) == 1.5 || alpha_of(p, h) == 2) && p->D <= 128 && !(fabs(sum - 1) <= off))
      fail_msg("%s row %d: p of tau sums to 1 + %g", describe(p), (int)row, sum - 1);
    if (!(support[row] >= (double)least && support[row] <= (double)most))
      fail_msg("%s row %d: support %d, oracle %d..%d", describe(p), (int)row, (int)support[row], (int)least, (int)most);
  }
  free(z);
}
/* Gradients of q, k and v. */
static void judge_backward(const problem *p, const problem *r, double *const g[3]) {
  const double *want[3] = {r->d_q, r->d_k, r->d_v};
  /* sqrt(p) of elements near the threshold moves by as much as the score does; 16 bits: products of rounded weights */
  const double limit = p->dtype == EMX_F32 ? 1e-4 : p->dtype == EMX_F16 ? 1.5e-3 : 1e-2;
  for (int i = 0; i < 3; i++) {
    const double e = distance(g[i], want[i], i ? n_k(p) : n_q(p));
    /* a gradient that is zero but for cancellation has no relative error: its terms are as large as those of d_v */
    double size = 0;
    for (int64_t x = 0; x < (i ? n_k(p) : n_q(p)); x++) size += want[i][x] * want[i][x];
    if (!(e < limit) && !(i < 2 && e * sqrt(size > 0 ? size : 1) < limit))
      fail_msg("%s: gradient of %s, relative error %g", describe(p), i == 0 ? "q" : i == 1 ? "k" : "v", e);
  }
}

static void check(problem *p) {
  make(p);
  problem r = *p;
  reference(&r);
  device w;
  open_device(p, &w);
  call(&w, EMX_PASS_FORWARD);
  double *o = get(&w.o), *tau = get(&w.tau), *support = get(&w.support);
  judge_forward(p, &r, o, tau, support);
  if (!p->no_backward) {
    if (p->spoil) {
      double *less = get(&w.support);
      for (int64_t i = 0; i < p->B * p->H * p->S; i++) less[i] = fmin(less[i], 3);
      gpu_free(w.support.data);
      w.support = put(less, EMX_I32, 3, w.support.shape);
      free(less);
    }
    call(&w, EMX_PASS_BACKWARD);
    double *const g[3] = {get(&w.d_q), get(&w.d_k), get(&w.d_v)};
    judge_backward(p, &r, g);
    if (p->alphas[0] != 0) {
      double *d_alpha = get(&w.d_alpha);
      for (int h = 0; h < p->H; h++)
        if (!(fabs(d_alpha[h] - r.d_alpha[h]) <= (p->dtype == EMX_F32 ? 2e-3 : 2e-2) * fmax(1, fabs(r.d_alpha[h]))))
          fail_msg("%s: gradient of alpha %d (%g): %g, want %g", describe(p), h, p->alphas[h], d_alpha[h], r.d_alpha[h]);
      free(d_alpha);
    }
    free(last_dk);
    last_dk = g[1];
    free(g[0]), free(g[2]);
  }
  free(last_o);
  last_o = o;
  free(tau), free(support);
  close_device(&w);
  release(p);
}

static const problem usual = {.B = 1,
                              .H = 2,
                              .G = 1,
                              .S = 70,
                              .N = 70,
                              .D = 64,
                              .alpha = 1.5,
                              .causal = true,
                              .left = -1,
                              .right = -1,
                              .spread = 2,
                              .seed = 1};

/* The formulas of reference() are the derivative of its own output. */
static void test_reference(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.3, 1.5, 2};
  for (int a = 0; a < 4; a++) {
    problem p = usual;
    p.dtype = EMX_F64, p.alpha = alphas[a], p.D = 4, p.S = 5, p.N = 7, p.alibi = true;
    make(&p);
    problem r = p;
    reference(&r);
    double *x[3] = {p.q, p.k, p.v}, *g[3] = {r.d_q, r.d_k, r.d_v};
    for (int t = 0; t < 3; t++)
      for (int64_t i = 0; i < (t ? n_k(&p) : n_q(&p)); i += 3) {
        double f[2], keep = x[t][i];
        for (int s = 0; s < 2; s++) {
          problem y = p;
          y.o = take(n_q(&p)), y.d_q = take(n_q(&p)), y.d_k = take(n_k(&p)), y.d_v = take(n_k(&p));
          x[t][i] = keep + (s ? 1e-6 : -1e-6);
          reference(&y);
          f[s] = 0;
          for (int64_t e = 0; e < n_q(&p); e++) f[s] += y.o[e] * p.d_o[e];
          free(y.o), free(y.d_q), free(y.d_k), free(y.d_v);
        }
        x[t][i] = keep;
        const double slope = (f[1] - f[0]) / 2e-6;
        if (!(fabs(slope - g[t][i]) <= 1e-5 * fmax(1, fabs(slope))))
          fail_msg("tensor %d: %g, finite difference %g", t, g[t][i], slope);
      }
    release(&p);
  }
}

static void test_catalogue(void **state) {
  (void)state;
  static const int64_t shapes[][6] = {{1, 1, 1, 1, 1, 16},      {1, 2, 1, 3, 3, 16},    {2, 4, 2, 65, 65, 32},
                                      {1, 6, 3, 33, 150, 32},   {1, 4, 4, 1, 200, 64},  {1, 8, 1, 5, 130, 80},
                                      {1, 3, 3, 100, 100, 96},  {1, 2, 2, 70, 64, 256}, {1, 1, 1, 130, 64, 24},
                                      {1, 2, 1, 130, 300, 128}, {1, 2, 1, 64, 64, 33},  {2, 2, 2, 63, 191, 64}};
  static const double alphas[] = {1, 1.25, 1.5, 1.9, 2}, spreads[] = {2, 6, 0, 0.05};
  static const int32_t dtypes[] = {EMX_F32, EMX_BF16, EMX_F16};
  int c = 0;
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
    for (int a = 0; a < 5; a++)
      for (int t = 0; t < 3; t++, c++) {
        problem p = usual;
        p.B = shapes[s][0], p.H = shapes[s][1], p.G = shapes[s][2], p.S = shapes[s][3], p.N = shapes[s][4], p.D = shapes[s][5];
        p.dtype = dtypes[t], p.alpha = alphas[a], p.causal = c % 3 != 0, p.alibi = c % 2, p.spread = spreads[c / 3 % 4];
        p.f32_out = c % 4 == 1;
        p.list = alphas[a] != 1 && c % 3 == 1 ? 40 : 0;
        p.seed = (uint64_t)c + 1;
        if (c % 5 == 0) p.scale = 0.4f;
        check(&p);
      }
}

/* Backward by products of tiles, where they hold many weights: sparse, half full and flat rows in one tile, with lists that are long enough,
 * too short, wrong or absent. */
static void test_tiles(void **state) {
  (void)state;
  static const double alphas[] = {1.5, 2, 1.25, 1, 1.5};
  for (int c = 0; c < 40; c++) {
    problem p = usual;
    p.H = 4, p.G = c % 2 + 1, p.S = 250 + c, p.N = 330, p.D = c % 3 == 0 ? 128 : c % 3 == 1 ? 64 : 40, p.mixed = true;
    p.dtype = c % 4 < 2 ? EMX_BF16 : EMX_F16, p.alpha = alphas[c % 5], p.causal = c % 7 != 0, p.alibi = c % 6 == 5;
    if (c % 9 == 4) p.left = 100;
    p.spread = c % 8 < 4 ? 1 : 0.25, p.f32_out = c % 11 == 3, p.seed = (uint64_t)c;
    p.list = p.alpha == 1 || c % 4 == 3 ? 0 : c % 4 == 0 ? 330 : 60;
    p.spoil = p.list == 330 && c % 3 == 0;
    check(&p);
  }
}

/* Every length up to 65: tiles that are not full. */
static void test_short(void **state) {
  (void)state;
  for (int64_t n = 1; n <= 65; n++) {
    problem p = usual;
    p.S = p.N = n, p.D = n % 2 ? 64 : 16, p.dtype = n % 3 ? EMX_BF16 : EMX_F32, p.alpha = n % 4 ? 1.5 : 2, p.seed = (uint64_t)n;
    check(&p);
  }
}

/* Rows of more candidates and more support than a list has room for, and flat ones. */
static void test_long(void **state) {
  (void)state;
  static const double spreads[] = {0, 0.02, 0.3, 1, 2, 30};
  for (int i = 0; i < 6; i++)
    for (int a = 0; a < 6; a++) {
      problem p = usual;
      p.S = 20, p.N = 3001, p.D = 32, p.spread = spreads[i], p.seed = 77;
      if (i == 2) p.S = 130;
      p.alpha = a % 3 == 0 ? 1.5 : a % 3 == 1 ? 1.3 : 1;
      p.dtype = a < 3 ? EMX_F32 : EMX_BF16;
      check(&p);
    }
}

static void test_windows(void **state) {
  (void)state;
  for (int c = 0; c < 12; c++) {
    problem p = usual;
    p.S = 150, p.N = 210, p.causal = c % 2, p.left = c % 3 == 0 ? -1 : c % 3 == 1 ? 0 : 67, p.right = c % 4 < 2 ? -1 : 40;
    p.alibi = c % 5 == 1, p.dtype = c % 2 ? EMX_F32 : EMX_BF16, p.spread = c % 6 ? 2 : 0.1, p.alpha = c == 7 ? 1 : 1.5;
    check(&p);
  }
}

static void test_alphas(void **state) {
  (void)state;
  for (int c = 0; c < 4; c++) {
    problem p = usual;
    p.B = 2, p.H = 6, p.G = 3, p.S = 90, p.N = c < 2 ? 130 : 700, p.D = 32, p.dtype = c % 2 ? EMX_BF16 : EMX_F32;
    const double alphas[] = {1.5, 2, 1, 1.2, 1.75, 1.000001};
    memcpy(p.alphas, alphas, sizeof alphas);
    p.alphas[5] = 1.01; /* the formula of reference() cancels nearer to 1 */
    p.spread = c < 2 ? 1 : 0.2;
    check(&p);
  }
}

/* Lengths in device memory. */
static void test_lengths(void **state) {
  (void)state;
  for (int c = 0; c < 4; c++) {
    problem p = usual;
    p.B = 3, p.S = 100, p.N = 170, p.dtype = c % 2 ? EMX_BF16 : EMX_F32, p.alibi = true, p.spread = c < 2 ? 2 : 0.1;
    const int32_t q[] = {1, 100, 65}, k[] = {64, 170, 3};
    memcpy(p.len_q, q, sizeof q), memcpy(p.len_k, k, sizeof k);
    check(&p);
  }
}

/* Scores far from zero: weights must not show that tau and the scores have few digits left after the point. */
static void test_far(void **state) {
  (void)state;
  static const double levels[] = {-1e4, 1e4, 1000, -65536};
  for (int c = 0; c < 20; c++) { /* from 8 on: 16 bits and rows with lists, the last four of alpha 2 */
    problem p = usual;
    enum { D = 16 };
    const int64_t N = c < 8 ? 1500 : 600;
    p.H = p.G = 1, p.S = c < 8 ? 2 : 130, p.N = N, p.D = D, p.dtype = c < 8 ? EMX_F32 : EMX_BF16, p.f32_out = true;
    p.scale = 1, p.alpha = c >= 16 ? 2 : c % 2 ? 1.5 : 1.7, p.causal = false;
    make(&p);
    const double level = levels[c % 8 / 2];
    for (int64_t i = 0; i < p.S; i++)
      for (int d = 0; d < D; d++) p.q[i * D + d] = d < 2;
    for (int64_t j = 0; j < N; j++) p.k[j * D] = level, p.k[j * D + 1] = (double)(j % 3 == 0); /* flat: a third is one higher */
    for (int64_t j = 0; j < N * D; j++) p.v[j] = 1;
    device w;
    open_device(&p, &w);
    call(&w, EMX_PASS_FORWARD);
    call(&w, EMX_PASS_BACKWARD);
    double *o = get(&w.o), *dv = get(&w.d_v), *support = get(&w.support);
    for (int64_t d = 0; d < p.S * D; d++)
      if (!(fabs(o[d] - 1) < 1e-5)) fail_msg("level %g: the mean of ones is %.9g", level, o[d]);
    double sum = 0, want = 0, size = 0;
    for (int64_t i = 0; i < p.S; i++) want += p.d_o[i * D], size += fabs(p.d_o[i * D]);
    for (int64_t j = 0; j < N; j++) sum += dv[j * D];
    /* of 16 bits: a row that all keys of this level may belong to is dense, and its weights, all equal here, are rounded to the keys' type */
    if (!(fabs(sum - want) < (c < 8 ? 3e-5 : 1e-5 * size + 0x1p-9 * fabs(want))))
      fail_msg("level %g: weights of the backward pass sum to %.9g, want %.9g", level, sum, want);
    assert_true(support[0] == N / 3);
    free(o), free(dv), free(support);
    close_device(&w);
    release(&p);
  }
}

/* Near-uniform rows: their weights sum to one. */
static void test_flat(void **state) {
  (void)state;
  static const int64_t lengths[] = {8192, 32768 + 5, 131072};
  for (int c = 0; c < 18; c++) {
    problem p = usual;
    p.H = p.G = 1, p.S = 2, p.N = lengths[c / 2 % 3], p.D = 16, p.dtype = c % 2 ? EMX_BF16 : EMX_F32, p.f32_out = true;
    p.spread = c / 6 == 0 ? 0 : c / 6 == 1 ? 0.02 : 0.05;
    make(&p);
    for (int64_t j = 0; j < n_k(&p); j++) p.v[j] = 1;
    device w;
    open_device(&p, &w);
    call(&w, EMX_PASS_FORWARD);
    double *o = get(&w.o), *tau = get(&w.tau), *z = take(p.N);
    for (int i = 0; i < 2; i++) {
      const int64_t n = row_scores(&p, 0, 0, i, z);
      double sum = 0;
      for (int64_t j = 0; j < n; j++) sum += z[j] / 2 > tau[i] ? (z[j] / 2 - tau[i]) * (z[j] / 2 - tau[i]) : 0;
      if (!(fabs(sum - 1) < 1e-5)) fail_msg("N %d spread %g: p of tau sums to %.9g", (int)p.N, p.spread, sum);
      /* bf16: weights are rounded, one by one */
      if (!(fabs(o[i * p.D] - 1) < (p.dtype == EMX_F32 ? 1e-5 : 1e-4)))
        fail_msg("N %d spread %g: the mean of ones is %.9g", (int)p.N, p.spread, o[i * p.D]);
    }
    free(o), free(tau), free(z);
    close_device(&w);
    release(&p);
  }
}

/* ALiBi: tiles beyond a row's reach are passed over. Heads without a slope beside others, slopes of any size and sign, keys that are long
 * enough to matter from afar, and rows that see keys on both sides. */
static void test_reach(void **state) {
  (void)state;
  static const float slopes[][8] = {{0.5f, 0.25f, 0.125f, 0.0625f, 0, 0, 0, 0},
                                    {0, 1e-6f, 0.004f, 0.02f, 4, 1000, -0.01f, -2e-4f},
                                    {0.3f, 0, 0.1f, 0, 0.03f, 0, 0.01f, 0}};
  static const double alphas[] = {1.5, 2, 1.5, 1.25, 1};
  for (int c = 0; c < 30; c++) {
    problem p = usual;
    p.H = 8, p.G = c % 2 ? 4 : 2, p.S = c % 5 == 4 ? 70 : 330, p.N = c % 3 ? 450 : p.S,
    p.D = c % 4 == 0   ? 64
          : c % 4 == 1 ? 32
          : c % 4 == 2 ? 128
                       : 18;
    p.dtype = c % 3 == 0   ? EMX_BF16
              : c % 3 == 1 ? EMX_F16
                           : EMX_F32,
    p.alpha = alphas[c % 5], p.alibi = true, p.own_slopes = slopes[c / 5 % 3];
    p.causal = c % 4 < 2, p.heavy = c % 2, p.spread = c % 7 == 6 ? 0.05 : 1, p.seed = (uint64_t)c + 300;
    p.list = p.alpha == 1 || c % 3 == 2 ? 0 : 64;
    if (c % 8 == 5) p.left = 200;
    if (c % 8 == 6) p.right = 90;
    check(&p);
  }
  /* heads of several tiles' width, slopes that leave a row one key, and more queries than keys, so that some see none */
  static const float steep[][8] = {{1e6f, 0.5f, 0, 0.01f, 3e4f, 1e6f, 0.1f, 0}, {1e6f, 1e6f, 1e6f, 1e6f, 1e6f, 1e6f, 1e6f, 1e6f}};
  for (int c = 0; c < 12; c++) {
    problem p = usual;
    p.H = c % 4 == 3 ? 8 : 4, p.G = 2, p.S = c % 2 ? 300 : 170, p.N = c % 2 ? 210 : 400, p.D = c % 3 ? 256 : 64;
    p.dtype = (const int32_t[]){EMX_F32, EMX_BF16, EMX_F16}[c / 2 % 3], p.alpha = alphas[c % 5], p.alibi = true;
    p.own_slopes = steep[c % 4 == 3], p.causal = c % 4 < 2, p.heavy = c % 3 == 1, p.spread = p.heavy ? 0.5 : 1,
    p.seed = (uint64_t)c + 500;
    p.list = p.alpha == 1 || c % 2 ? 0 : 64;
    if (c % 6 == 5) p.left = 40;
    check(&p);
  }
}

/* Flat rows, block after block: scans end early, and what lies where they have not been must be found all the same. */
static void test_flat_blocks(void **state) {
  (void)state;
  for (int c = 0; c < 6; c++) {
    problem p = usual;
    p.H = 2, p.G = 1, p.S = c < 3 ? 420 : 300, p.N = c < 3 ? 2100 : 2900, p.D = c % 2 ? 128 : 64, p.causal = c != 2;
    p.dtype = c % 2 ? EMX_F16 : EMX_BF16, p.spread = 0.03, p.list = c < 3 ? 128 : 0, p.mixed = c == 5, p.alpha = c == 4 ? 2 : 1.5;
    check(&p);
  }
  enum { N = 1600, D = 64, ODD = 200 };
  /* a key in a tile that is visited late: NaN; of numbers, but an infinite score; above all others; among them */
  for (int c = 0; c < 4; c++) {
    problem p = usual;
    p.H = p.G = 1, p.S = p.N = N, p.D = D, p.dtype = EMX_BF16, p.spread = 0.02;
    make(&p);
    for (int i = 0; i < N; i++) p.q[i * D] = 2;
    p.k[ODD * D] = (const double[]){(double)NAN, 0x1.8p127, 16, 2}[c];
    device w;
    open_device(&p, &w);
    call(&w, EMX_PASS_FORWARD);
    double *o = get(&w.o), *tau = get(&w.tau), *support = get(&w.support), *z = take(N);
    for (int i = 0; i < N; i++) {
      if (c < 2) {
        assert_int_equal(isnan(tau[i]) != 0, i >= ODD);
        for (int d = 0; d < D; d++) assert_int_equal(isnan(o[i * D + d]) != 0, i >= ODD);
      }
      if (c < 2 && i >= ODD) continue;
      const int64_t n = row_scores(&p, 0, 0, i, z);
      double sum = 0;
      for (int64_t j = 0; j < n; j++) sum += z[j] / 2 > tau[i] ? (z[j] / 2 - tau[i]) * (z[j] / 2 - tau[i]) : 0;
      if (!(fabs(sum - 1) < 1e-5)) fail_msg("key %d, row %d: p of tau sums to %.9g", c, i, sum);
      if (c == 2 && i >= ODD) assert_true(support[i] == 1);
    }
    free(o), free(tau), free(support), free(z);
    close_device(&w);
    release(&p);
  }
}

/* Many tiles of keys, of which most hold nothing for a row: what may be passed over must not be missed. */
static void test_sieve(void **state) {
  (void)state;
  static const float gentle = 0.01f;
  static const int64_t shapes[][4] = {{1300, 1300, 64, 1}, {1411, 1411, 128, 2}, {200, 2500, 80, 1}, {260, 3900, 64, 1}};
  for (int c = 0; c < 16; c++) {
    problem p = usual;
    const int64_t *s = shapes[c % 4];
    p.H = s[3], p.G = 1, p.S = s[0], p.N = s[1], p.D = s[2], p.seed = (uint64_t)c + 40, p.no_backward = c >= 4;
    p.dtype = c % 3 ? EMX_BF16 : EMX_F16;
    p.clusters = c < 8 ? 8 : c < 12 ? 3 : 0;
    p.alpha = c % 5 == 3 ? 2 : c % 7 == 6 ? 1.3 : 1.5;
    p.f32_out = c % 2, p.list = c % 4 == 1 ? 128 : 0;
    if (c % 8 == 5) p.left = 300;
    if (c == 7) p.causal = false;
    check(&p);
  }
  problem p = usual; /* more tiles than there are marks for */
  p.H = p.G = 1, p.S = 66, p.N = 140000, p.D = 16, p.dtype = EMX_BF16, p.clusters = 8, p.no_backward = true;
  check(&p);
  /* a NaN in the key of one tile after another, seen and not seen; an infinite value */
  for (int c = 0; c < 14; c++) {
    p = usual;
    p.H = p.G = 1, p.S = 200, p.N = 3500, p.D = 64, p.dtype = EMX_BF16, p.clusters = c % 2 ? 8 : 0, p.no_backward = true;
    if (c % 3 == 2) p.alpha = 1.3;
    if (c % 4 == 3) p.alibi = true, p.own_slopes = &gentle;
    make(&p);
    const int64_t at = c < 11 ? 317 * c : c == 11 ? 3310 : c == 12 ? 3400 : 3499;
    p.k[at * p.D + 3] = NAN;
    device w;
    open_device(&p, &w);
    call(&w, EMX_PASS_FORWARD);
    double *o = get(&w.o), *tau = get(&w.tau);
    for (int64_t i = 0; i < p.S; i++)
      if ((isnan(tau[i]) != 0) != (i + p.N - p.S >= at) || (isnan(o[i * p.D]) != 0) != (i + p.N - p.S >= at))
        fail_msg("NaN at %d: row %d has tau %g", (int)at, (int)i, tau[i]);
    free(o), free(tau);
    close_device(&w);
    for (int64_t d = 0; d < p.D; d++) p.k[at * p.D + d] = 0;
    for (int64_t d = 0; d < p.D; d++) p.q[d] = p.k[1000 * p.D + d]; /* row 0 weighs key 1000, whatever else */
    for (int64_t d = 0; d < p.D; d++) p.k[1000 * p.D + d] *= 4;
    p.v[1000 * p.D + 7] = INFINITY;
    open_device(&p, &w);
    call(&w, EMX_PASS_FORWARD);
    o = get(&w.o);
    if (!(o[7] == INFINITY)) fail_msg("%s: an infinite value with all the weight gives %g", describe(&p), o[7]);
    for (int64_t i = 0; i < p.S * p.D; i++) assert_true(i % p.D == 7 ? !isnan(o[i]) && o[i] > -INFINITY : isfinite(o[i]));
    free(o);
    close_device(&w);
    release(&p);
  }
}

/* Equal scores, some of them on the edge of the support. */
static void test_ties(void **state) {
  (void)state;
  for (int c = 0; c < 6; c++) {
    problem p = usual;
    enum { N = 400, D = 16 };
    p.H = p.G = 1, p.S = 1, p.N = N, p.D = D, p.dtype = c % 2 ? EMX_BF16 : EMX_F32, p.scale = 1,
    p.alpha = c / 2 == 0   ? 1.5
              : c / 2 == 1 ? 2
                           : 1.25;
    make(&p);
    for (int d = 0; d < D; d++) p.q[d] = d == 0;
    /* two maxima, many at exactly the distance at which two equal weights of 1/2 leave nothing (alpha 2: 1/2), the rest below */
    for (int64_t j = 0; j < N; j++) p.k[j * D] = j == 10 || j == 390 ? 4 : j % 2 ? 3.5 : -1;
    problem r = p;
    reference(&r);
    device w;
    open_device(&p, &w);
    call(&w, EMX_PASS_FORWARD);
    double *o = get(&w.o), *tau = get(&w.tau);
    assert_true(fabs(tau[0] - r.tau[0]) < 2e-6);
    for (int d = 0; d < D; d++) assert_true(fabs(o[d] - r.o[d]) < (p.dtype == EMX_F32 ? 2e-5 : 1.2e-2));
    free(o), free(tau);
    close_device(&w);
    release(&p);
  }
}

static void test_nonfinite(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.5, 1.7};
  for (int c = 0; c < 12; c++) {
    problem p = usual;
    enum { N = 140, D = 16 };
    p.H = p.G = 1, p.S = p.N = N, p.D = D, p.dtype = c % 2 ? EMX_BF16 : EMX_F32, p.alpha = alphas[c / 2 % 3],
    p.spread = c < 6 ? 2 : 0.01;
    make(&p);
    p.k[70 * D + 3] = NAN; /* rows 70.. see it */
    device w;
    open_device(&p, &w);
    call(&w, EMX_PASS_FORWARD);
    call(&w, EMX_PASS_BACKWARD);
    double *o = get(&w.o), *tau = get(&w.tau), *dq = get(&w.d_q), *dv = get(&w.d_v);
    for (int i = 0; i < N; i++) {
      assert_int_equal(isnan(tau[i]) != 0, i >= 70);
      assert_int_equal(isnan(dv[i * D]) != 0, 1); /* each key is seen by a NaN row */
      for (int d = 0; d < D; d++) {
        assert_int_equal(isnan(o[i * D + d]) != 0, i >= 70);
        assert_int_equal(isnan(dq[i * D + d]) != 0, i >= 70);
      }
    }
    free(o), free(tau), free(dq), free(dv);
    close_device(&w);
    /* -inf scores weigh nothing, and a NaN in their V stays there; a row of nothing else is zero; NaN and infinities of V that have
     * weight come out */
    for (int j = 0; j < N; j++) p.k[j * D] = j < 3 ? -INFINITY : 0;
    for (int j = 0; j < N * D; j++) p.k[j] = isnan(p.k[j]) ? 0 : p.k[j];
    for (int i = 0; i < N; i++) p.q[i * D] = 1;
    p.v[1 * D + 2] = NAN;
    if (p.alpha == 1) p.v[100 * D + 5] = INFINITY;
    open_device(&p, &w);
    call(&w, EMX_PASS_FORWARD);
    call(&w, EMX_PASS_BACKWARD);
    o = get(&w.o), tau = get(&w.tau), dq = get(&w.d_q), dv = get(&w.d_v);
    for (int i = 0; i < N; i++) {
      if (i < 3) assert_true(tau[i] == -INFINITY);
      for (int d = 0; d < D; d++) {
        if (i < 3) assert_true(o[i * D + d] == 0 && dq[i * D + d] == 0);
        if (p.alpha == 1 && d == 5 && i >= 100)
          assert_true(o[i * D + d] == INFINITY);
        else
          assert_true(isfinite(o[i * D + d]));
        if (p.alpha != 1) assert_true(isfinite(dq[i * D + d]) && isfinite(dv[i * D + d]));
      }
    }
    free(o), free(tau), free(dq), free(dv);
    close_device(&w);
    release(&p);
  }
}

/* NaN and infinities come out where the formulas bring them and nowhere else; what is finite is right. */
static void judge_odd(const problem *p, const char *what, const double *got, const double *want, int64_t n, double limit) {
  double err = 0, norm = 0;
  for (int64_t i = 0; i < n; i++) {
    if (isfinite(got[i]) != isfinite(want[i]))
      fail_msg("%s: element %d of %s is %g, oracle %g", describe(p), (int)i, what, got[i], want[i]);
    if (!isfinite(want[i])) continue;
    err += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  if (!(sqrt(err) <= limit * fmax(1, sqrt(norm))))
    fail_msg("%s: %s is off by %g of %g", describe(p), what, sqrt(err), sqrt(norm));
}
/* In V of masked keys (0), in V of keys that some rows weigh (1), in the gradient of o (2): in many tiles, rows of lists and
 * dense ones. */
static void test_odd_values(void **state) {
  (void)state;
  static const double alphas[] = {1.5, 2, 1.3, 1, 1.5};
  static const int64_t at[] = {3, 70, 130, 200, 255, 256, 301, 327};
  for (int c = 0; c < 45; c++) {
    problem p = usual;
    enum { N = 330, D0 = 64 };
    const int kind = c % 3;
    p.S = p.N = N, p.D = (const int64_t[]){D0, 128, 256, 40}[c / 3 % 4],
    p.dtype = (const int32_t[]){EMX_F32, EMX_BF16, EMX_F16}[c / 9 % 3];
    p.alpha = alphas[c / 3 % 5], p.causal = c % 2, p.spread = c / 6 % 2 ? 0.02 : 2, p.list = p.alpha == 1 || c % 4 ? 0 : 64;
    p.f32_out = true, p.seed = 900 + (uint64_t)c;
    make(&p);
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
      const double odd = i % 3 == 0 ? (double)NAN : i % 3 == 1 ? (double)INFINITY : -(double)INFINITY;
      if (kind == 0) p.k[at[i] * p.D] = -INFINITY;
      if (kind < 2) p.v[at[i] * p.D + 5 + (int64_t)i % 2] = odd;
      if (kind == 2 && i % 3 != 2) p.d_o[at[i] * p.D + 9] = odd;
    }
    for (int64_t i = 0; kind == 0 && i < n_q(&p); i += p.D) p.q[i] = 1;
    problem r = p;
    reference(&r);
    device w;
    open_device(&p, &w);
    call(&w, EMX_PASS_FORWARD);
    call(&w, EMX_PASS_BACKWARD);
    const double limit = p.dtype == EMX_F32 ? 2e-4 : p.dtype == EMX_F16 ? 2e-3 : 1.5e-2;
    const emx_tensor *out[5] = {&w.o, &w.tau, &w.d_q, &w.d_k, &w.d_v};
    const double *want[5] = {r.o, r.tau, r.d_q, r.d_k, r.d_v};
    for (int i = 0; i < 5; i++) {
      double *x = get(out[i]);
      judge_odd(&p, (const char *[]){"o", "tau", "d_q", "d_k", "d_v"}[i], x, want[i],
                i == 1  ? p.H * N
                : i < 3 ? n_q(&p)
                        : n_k(&p),
                limit);
      free(x);
    }
    close_device(&w);
    release(&r);
  }
}

/* Packed sequences give the bits of separate calls. */
static void test_packed(void **state) {
  (void)state;
  enum { B = 4, H = 4, G = 2, D = 32, TQ = 300, TK = 420 };
  static const double cu_q[B + 1] = {0, 70, 70, 199, 290}, cu_k[B + 1] = {0, 64, 100, 301, 400};
  for (int c = 0; c < 8; c++) { /* from 4 on: with slopes */
    problem p = usual;
    p.B = 1, p.H = H, p.G = G, p.D = D, p.S = TQ, p.N = TK, p.dtype = c % 2 ? EMX_BF16 : EMX_F32, p.spread = c % 4 < 2 ? 2 : 0.01;
    make(&p); /* as [T,H,D] */
    const int64_t sq[3] = {TQ, H, D}, sk[3] = {TK, G, D}, five = B + 1;
    emx_attn_desc desc;
    emx_attn_desc_init(&desc);
    emx_tensor q = put(p.q, p.dtype, 3, sq), k = put(p.k, p.dtype, 3, sk), v = put(p.v, p.dtype, 3, sk),
               d_o = put(p.d_o, p.dtype, 3, sq), slopes = put((const double[H]){0, 0.5, 0.02, 0.125}, EMX_F32, 1, &p.H),
               tq = put(cu_q, EMX_I32, 1, &five), tk = put(cu_k, EMX_I32, 1, &five), out[2][5];
    for (int way = 0; way < 2; way++) {
      for (int i = 0; i < 5; i++) {
        out[way][i] = put(NULL, i == 4 ? EMX_F32 : p.dtype, i == 4 ? 2 : 3, i == 2 || i == 3 ? sk : sq);
        CUDA(cudaMemset(out[way][i].data, 0, gpu_bytes(&out[way][i])));
      }
      for (int b = 0; b < (way ? B : 1); b++) {
        device w = {.desc = desc};
        emx_attn_io_init(&w.f);
        emx_tensor t[9] = {q, k, v, d_o, out[way][0], out[way][1], out[way][2], out[way][3], out[way][4]};
        if (way) { /* the sequence alone, as [1,S,H,D] */
          w.desc.layout = EMX_LAYOUT_BNHD;
          for (int i = 0; i < 9; i++) {
            const bool key = i == 1 || i == 2 || i == 6 || i == 7;
            const double *cu = key ? cu_k : cu_q;
            emx_tensor x = t[i];
            x.ndim = i == 8 ? 3 : 4;
            x.shape[0] = 1, x.shape[1] = (int64_t)(cu[b + 1] - cu[b]), x.shape[2] = key ? G : H, x.shape[3] = D;
            x.stride[0] = x.stride[1] = t[i].stride[0], x.stride[2] = t[i].stride[1], x.stride[3] = 1;
            x.data = (char *)t[i].data + (int64_t)cu[b] * t[i].stride[0] * (int64_t)emx_dtype_size(t[i].dtype);
            t[i] = x;
          }
          if (t[0].shape[1] == 0) continue;
        }
        w.f.q = &t[0], w.f.k = &t[1], w.f.v = &t[2], w.f.tau = &t[8];
        if (!way) w.f.cu_seqlens_q = &tq, w.f.cu_seqlens_k = &tk;
        if (c >= 4) w.f.alibi_slopes = &slopes;
        w.b = w.f;
        w.f.o = &t[4];
        w.b.d_o = &t[3], w.b.d_q = &t[5], w.b.d_k = &t[6], w.b.d_v = &t[7];
        call(&w, EMX_PASS_FORWARD);
        call(&w, EMX_PASS_BACKWARD);
      }
    }
    for (int i = 0; i < 5; i++) {
      double *x = get(&out[0][i]), *y = get(&out[1][i]);
      const int64_t n = (int64_t)(gpu_bytes(&out[0][i]) / emx_dtype_size(out[0][i].dtype));
      for (int64_t e = 0; e < n; e++)
        if (!(x[e] == y[e])) fail_msg("case %d output %d [%d]: packed %g, alone %g", c, i, (int)e, x[e], y[e]);
      double sum = 0;
      for (int64_t e = 0; e < n; e++) sum += fabs(x[e]);
      assert_true(sum > 1);
      free(x), free(y);
      gpu_free(out[0][i].data), gpu_free(out[1][i].data);
    }
    gpu_free(q.data), gpu_free(k.data), gpu_free(v.data), gpu_free(d_o.data), gpu_free(tq.data), gpu_free(tk.data),
        gpu_free(slopes.data);
    release(&p);
  }
}

/* Row i of a sequence's head, from a tensor of packed sequences to one in BHND order, or back. */
static void repack(double *packed, double *alone, int64_t first, int64_t heads, int64_t rows, int64_t width, bool back) {
  for (int64_t h = 0; h < heads; h++)
    for (int64_t i = 0; i < rows; i++) {
      double *const x = packed + ((first + i) * heads + h) * width, *const y = alone + (h * rows + i) * width;
      memcpy(back ? y : x, back ? x : y, sizeof *x * (size_t)width);
    }
}
/* Packed sequences with slopes, some of them long, against the oracle; behind them rows of the tensor that belong to no
 * sequence. */
static void test_packed_slopes(void **state) {
  (void)state;
  enum { B = 4, H = 4, G = 2, LEFT = 9 };
  static const int64_t s[B] = {130, 1, 40, 600}, n[B] = {610, 90, 25, 1100};
  static const float slopes[2][H] = {{0.5f, 0, 0.02f, 0.125f}, {1e6f, 0.003f, 0.25f, 0.06f}};
  static const double alphas[] = {1.5, 2, 1.5, 1.3, 1, 1.5};
  for (int c = 0; c < 6; c++) {
    problem p[B], r[B];
    double cu_q[B + 1] = {0}, cu_k[B + 1] = {0};
    for (int b = 0; b < B; b++) {
      p[b] = usual;
      p[b].H = H, p[b].G = G, p[b].S = s[b], p[b].N = n[b], p[b].D = (const int64_t[]){64, 128, 48, 256}[c % 4];
      p[b].dtype = (const int32_t[]){EMX_BF16, EMX_F16, EMX_F32}[c % 3], p[b].alpha = alphas[c], p[b].alibi = true;
      p[b].own_slopes = slopes[c / 2 % 2], p[b].list = alphas[c] != 1 && c % 2 == 0 ? 64 : 0;
      p[b].spread = c == 3 ? 0.05 : 1, p[b].heavy = c % 2, p[b].seed = (uint64_t)(10 * c + b);
      if (c == 5) p[b].left = 150;
      make(&p[b]);
      r[b] = p[b];
      reference(&r[b]);
      cu_q[b + 1] = cu_q[b] + (double)s[b], cu_k[b + 1] = cu_k[b] + (double)n[b];
    }
    const int64_t TQ = (int64_t)cu_q[B] + LEFT, TK = (int64_t)cu_k[B] + LEFT, D = p[0].D, sq[3] = {TQ, H, D}, sk[3] = {TK, G, D},
                  si[3] = {TQ, H, p[0].list}, five = B + 1, heads = H;
    double *x[4] = {take(TQ * H * D), take(TK * G * D), take(TK * G * D), take(TQ * H * D)}, of_head[H];
    for (int h = 0; h < H; h++) of_head[h] = (double)p[0].slopes[h];
    for (int b = 0; b < B; b++) {
      repack(x[0], p[b].q, (int64_t)cu_q[b], H, s[b], D, false);
      repack(x[1], p[b].k, (int64_t)cu_k[b], G, n[b], D, false);
      repack(x[2], p[b].v, (int64_t)cu_k[b], G, n[b], D, false);
      repack(x[3], p[b].d_o, (int64_t)cu_q[b], H, s[b], D, false);
    }
    const int32_t type = p[0].dtype;
    device w = {.q = put(x[0], type, 3, sq),
                .k = put(x[1], type, 3, sk),
                .v = put(x[2], type, 3, sk),
                .d_o = put(x[3], type, 3, sq),
                .o = put(NULL, type, 3, sq),
                .tau = put(NULL, EMX_F32, 2, sq),
                .support = put(NULL, EMX_I32, 2, sq),
                .d_q = put(NULL, type, 3, sq),
                .d_k = put(NULL, type, 3, sk),
                .d_v = put(NULL, type, 3, sk),
                .slopes = put(of_head, EMX_F32, 1, &heads),
                .len_q = put(cu_q, EMX_I32, 1, &five),
                .len_k = put(cu_k, EMX_I32, 1, &five),
                .index = put(NULL, EMX_I32, 3, si)};
    emx_attn_desc_init(&w.desc);
    emx_attn_io_init(&w.f);
    w.desc.alpha = p[0].alpha, w.desc.window_left = (int32_t)p[0].left;
    w.f.q = &w.q, w.f.k = &w.k, w.f.v = &w.v, w.f.alibi_slopes = &w.slopes, w.f.cu_seqlens_q = &w.len_q,
    w.f.cu_seqlens_k = &w.len_k;
    *(p[0].alpha == 1 ? &w.f.lse : &w.f.tau) = &w.tau;
    w.b = w.f;
    w.f.o = &w.o, w.f.support = &w.support;
    if (p[0].list) w.f.support_index = w.b.support_index = &w.index, w.b.support = &w.support;
    w.b.d_o = &w.d_o, w.b.d_q = &w.d_q, w.b.d_k = &w.d_k, w.b.d_v = &w.d_v;
    call(&w, EMX_PASS_FORWARD);
    call(&w, EMX_PASS_BACKWARD);
    double *const out[6] = {get(&w.o), get(&w.tau), get(&w.support), get(&w.d_q), get(&w.d_k), get(&w.d_v)};
    for (int b = 0; b < B; b++) {
      double *one[6];
      for (int i = 0; i < 6; i++) {
        const bool key = i > 3;
        const int64_t width = i == 1 || i == 2 ? 1 : D;
        one[i] = take((key ? n[b] * G : s[b] * H) * width);
        repack(out[i], one[i], (int64_t)(key ? cu_k : cu_q)[b], key ? G : H, key ? n[b] : s[b], width, true);
      }
      judge_forward(&p[b], &r[b], one[0], one[1], one[2]);
      judge_backward(&p[b], &r[b], one + 3);
      for (int i = 0; i < 6; i++) free(one[i]);
      release(&p[b]);
    }
    for (int i = 0; i < 4; i++) free(x[i]);
    for (int i = 0; i < 6; i++) free(out[i]);
    close_device(&w);
  }
}

/* Pages in device memory: against contiguous keys, and against the oracle with slopes, which make bounds of pages' keys. */
static void test_paged(void **state) {
  (void)state;
  enum { P = 16 };
  static const float slopes[] = {0.3f, 0, 1e6f, 0.01f};
  for (int c = 0; c < 6; c++) {
    problem p = usual;
    p.H = 4, p.G = 2, p.S = c < 2 ? 70 : c == 5 ? 1300 : 300, p.N = c < 2 ? 150 : 1100, p.D = c == 4 ? 128 : 64;
    p.dtype = c % 2 ? EMX_BF16 : c == 4 ? EMX_F16 : EMX_F32, p.no_backward = true, p.seed = 5;
    if (c > 1) p.alibi = true, p.own_slopes = slopes, p.heavy = c % 2, p.spread = c == 3 ? 0.1 : 1;
    if (c == 4) p.alpha = 2;
    check(&p);
    make(&p);
    problem r = p;
    reference(&r);
    const int64_t columns = (p.N + P - 1) / P, M = 2 * columns, of_page = p.G * P * p.D, sp[4] = {M, p.G, P, p.D},
                  st[2] = {1, columns}, one = 1;
    double *pk = take(M * of_page), *pv = take(M * of_page), *table = take(columns), len = (double)p.N;
    for (int64_t i = 0; i < columns; i++) {
      table[i] = (double)((i * 7 + 3) % M);
      for (int64_t g = 0; g < p.G; g++)
        for (int64_t j = 0; j < P && i * P + j < p.N; j++) {
          const int64_t to = (int64_t)table[i] * of_page + (g * P + j) * p.D, from = (g * p.N + i * P + j) * p.D;
          memcpy(pk + to, p.k + from, sizeof(double) * (size_t)p.D);
          memcpy(pv + to, p.v + from, sizeof(double) * (size_t)p.D);
        }
    }
    device w;
    open_device(&p, &w);
    gpu_free(w.k.data), gpu_free(w.v.data);
    w.k = put(pk, p.dtype, 4, sp), w.v = put(pv, p.dtype, 4, sp);
    emx_tensor tt = put(table, EMX_I32, 2, st);
    w.len_k = put(&len, EMX_I32, 1, &one);
    w.f.block_table = &tt, w.f.seqlens_k = &w.len_k;
    call(&w, EMX_PASS_FORWARD);
    double *o = get(&w.o), *tau = get(&w.tau), *support = get(&w.support);
    /* 16-bit keys in pages are scanned otherwise than contiguous ones: an output may round to the neighbour */
    for (int64_t i = 0; c < 2 && i < n_q(&p); i++)
      assert_true(fabs(o[i] - last_o[i]) <= (c ? 0x1p-7 * fabs(last_o[i]) + 1e-6 : 0));
    judge_forward(&p, &r, o, tau, support);
    free(o), free(tau), free(support);
    /* a page that is none comes out at the next synchronisation, once */
    char text[32];
    snprintf(text, sizeof text, "page %d", (int)M);
    table[3] = (double)M;
    gpu_free(tt.data);
    tt = put(table, EMX_I32, 2, st);
    size_t bytes;
    OK(emx_attn_workspace_size(gpu, &w.desc, &w.f, EMX_PASS_FORWARD, &bytes));
    void *work = gpu_take(NULL, bytes);
    OK(emx_attn_forward(gpu, &w.desc, &w.f, work, bytes));
    fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, text);
    OK(emx_ctx_sync(gpu));
    gpu_free(work), gpu_free(tt.data);
    free(pk), free(pv), free(table);
    close_device(&w);
    release(&r);
  }
}

/* The same bits every time, from a graph too, and with one more sequence beside it. */
static void test_deterministic(void **state) {
  (void)state;
  for (int c = 0; c < 3; c++) {
    problem p = usual;
    p.B = 2, p.H = 4, p.G = 2, p.S = p.N = 700, p.dtype = c == 1 ? EMX_F32 : EMX_BF16, p.spread = c == 2 ? 0.3 : 2;
    make(&p);
    device w;
    open_device(&p, &w);
    double *want[5] = {0};
    const emx_tensor *outs[5] = {&w.o, &w.tau, &w.d_q, &w.d_k, &w.d_v};
    size_t bytes[2];
    OK(emx_attn_workspace_size(gpu, &w.desc, &w.f, EMX_PASS_FORWARD, &bytes[0]));
    OK(emx_attn_workspace_size(gpu, &w.desc, &w.b, EMX_PASS_BACKWARD, &bytes[1]));
    void *work[2] = {gpu_take(NULL, bytes[0]), gpu_take(NULL, bytes[1])};
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    OK(emx_ctx_set_stream(gpu, stream));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    OK(emx_attn_forward(gpu, &w.desc, &w.f, work[0], bytes[0]));
    OK(emx_attn_backward(gpu, &w.desc, &w.b, work[1], bytes[1]));
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    for (int turn = 0; turn < 6; turn++) {
      for (int i = 0; i < 5; i++) CUDA(cudaMemset(outs[i]->data, 0xff, gpu_bytes(outs[i])));
      CUDA(cudaDeviceSynchronize()); /* `stream` does not wait for the default one */
      if (turn % 2) {
        CUDA(cudaGraphLaunch(exec, stream));
      } else {
        OK(emx_attn_forward(gpu, &w.desc, &w.f, work[0], bytes[0]));
        OK(emx_attn_backward(gpu, &w.desc, &w.b, work[1], bytes[1]));
      }
      OK(emx_ctx_sync(gpu));
      for (int i = 0; i < 5; i++) {
        double *x = get(outs[i]);
        if (!turn) {
          want[i] = x;
          continue;
        }
        assert_memory_equal(x, want[i], gpu_bytes(outs[i]) / emx_dtype_size(outs[i]->dtype) * sizeof *x);
        free(x);
      }
    }
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    OK(emx_ctx_set_stream(gpu, NULL));
    CUDA(cudaStreamDestroy(stream));
    for (int i = 0; i < 5; i++) free(want[i]);
    gpu_free(work[0]), gpu_free(work[1]);
    close_device(&w);
    release(&p);
  }
}

static void test_refusals(void **state) {
  (void)state;
  problem p = usual;
  p.dtype = EMX_F32;
  make(&p);
  device w;
  open_device(&p, &w);
  size_t bytes;
  w.desc.alpha = 3;
  fails(emx_attn_workspace_size(gpu, &w.desc, &w.f, EMX_PASS_FORWARD, &bytes), EMX_ERR_UNSUPPORTED, "CPU");
  w.desc.alpha = 1.5;
  OK(emx_attn_workspace_size(gpu, &w.desc, &w.f, EMX_PASS_FORWARD, &bytes));
  void *work = gpu_take(NULL, bytes);
  fails(emx_attn_forward(gpu, &w.desc, &w.f, work, bytes / 2), EMX_ERR_WORKSPACE, "bytes");
  const double bad[2] = {71, 70};
  const int64_t one = 1;
  w.len_q = put(bad, EMX_I32, 1, &one), w.len_k = put(bad + 1, EMX_I32, 1, &one);
  w.f.seqlens_q = &w.len_q, w.f.seqlens_k = &w.len_k;
  OK(emx_attn_forward(gpu, &w.desc, &w.f, work, bytes));
  fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "seqlens_q[0] = 71");
  OK(emx_ctx_sync(gpu));
  w.f.seqlens_q = w.f.seqlens_k = NULL;
  const double alphas[2] = {1.5, 0.5};
  w.alphas = put(alphas, EMX_F64, 1, &p.H);
  w.f.alphas = &w.alphas;
  OK(emx_attn_forward(gpu, &w.desc, &w.f, work, bytes));
  fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "head 1");
  double *o = get(&w.o);
  assert_true(isfinite(o[0]) && isnan(o[p.S * p.D]));
  free(o);
  gpu_free(work);
  close_device(&w);
  release(&p);
}

/* An argument is a filter of test names, as cmocka takes it. */
int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]);
  const int missing = gpu_missing();
  if (missing) return missing;
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_reference),     cmocka_unit_test(test_catalogue),     cmocka_unit_test(test_tiles),
      cmocka_unit_test(test_short),         cmocka_unit_test(test_long),          cmocka_unit_test(test_windows),
      cmocka_unit_test(test_alphas),        cmocka_unit_test(test_lengths),       cmocka_unit_test(test_far),
      cmocka_unit_test(test_flat),          cmocka_unit_test(test_sieve),         cmocka_unit_test(test_reach),
      cmocka_unit_test(test_ties),          cmocka_unit_test(test_nonfinite),     cmocka_unit_test(test_odd_values),
      cmocka_unit_test(test_packed),        cmocka_unit_test(test_packed_slopes), cmocka_unit_test(test_paged),
      cmocka_unit_test(test_deterministic), cmocka_unit_test(test_refusals),      cmocka_unit_test(test_flat_blocks)};
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  free(last_o), free(last_dk);
  emx_ctx_destroy(gpu);
  emx_ctx_destroy(cpu);
  return failed;
}
