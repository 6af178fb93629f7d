/* Laws of the row mapping, over the catalogue of edge rows: single elements, ties, equal rows, one dominant score, a score on the
 * threshold, masks, non-finite input, huge and tiny scores, alpha from 1.001 to 4; and its gradient by finite differences. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "cpu/table.h"
#include "entmax/entmax.h"
#include "entmax_call.h"
#include "table_contexts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double alphas[] = {1, 1.001, 1.01, 1.25, 4. / 3, 1.5, 1.75, 2, 2.5, 3, 4};
#define N_ALPHAS ((int)(sizeof alphas / sizeof *alphas))
enum { LONGEST = 1 << 20 };

static float *x32, *p32;
static double *x64, *p64, *want;

static int setup(void **state) {
  (void)state;
  if (open_contexts()) return 1;
  x32 = malloc(LONGEST * sizeof *x32);
  p32 = malloc(LONGEST * sizeof *p32);
  x64 = malloc(LONGEST * sizeof *x64);
  p64 = malloc(LONGEST * sizeof *p64);
  want = malloc(LONGEST * sizeof *want);
  return !(x32 && p32 && x64 && p64 && want);
}
static int teardown(void **state) {
  (void)state;
  close_contexts();
  free(x32), free(p32), free(x64), free(p64), free(want);
  return 0;
}

typedef struct result {
  double tau;
  int32_t support;
} result;
static result map(emx_ctx *ctx, double alpha, void *x, void *p, int32_t dtype, int64_t n) {
  result r;
  int64_t shape[2] = {1, n};
  emx_tensor tx = emx_tensor_view(x, dtype, 2, shape), tp = emx_tensor_view(p, dtype, 2, shape),
             tt = emx_tensor_view(&r.tau, EMX_F64, 1, shape), ts = emx_tensor_view(&r.support, EMX_I32, 1, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  desc.alpha = alpha;
  if (entmax_forward(ctx, &desc, &tx, &tp, &tt, &ts)) fail_msg("%s", emx_last_error());
  return r;
}

/* |p - want| of one element: 1e-6, the promise. For alpha > 2 the mapping is ill-conditioned at the threshold: p = y^b with b =
 * 1/(alpha-1) < 1, so an unavoidable 4e-15 in y = (alpha-1)(s-m) - t (rounding of its terms, |y| <= 1) is worth (y + 4e-15)^b -
 * y^b. */
static double slack_at(double alpha, double y) {
  if (alpha <= 2) return 1e-6;
  double b = 1 / (alpha - 1);
  y = fmax(y, 0);
  return 1e-6 + pow(y + 4e-15, b) - pow(y, b);
}

/* Compares a row with the oracle in f32 (x32 as it is) and in f64. */
static void check_row(double alpha, int64_t n, const char *what) {
  int64_t wanted;
  double m = -INFINITY;
  for (int64_t i = 0; i < n; i++) {
    x64[i] = x32[i];
    m = fmax(m, x64[i]);
  }
  double tau = emxi_oracle_entmax(x64, n, alpha, want, &wanted);
  for (int c = 0; c <= n_contexts; c++) {
    const bool f64 = c == n_contexts;
    result r = f64 ? map(contexts[0], alpha, x64, p64, EMX_F64, n) : map(contexts[c], alpha, x32, p32, EMX_F32, n);
    double sum = 0, slack_sum = 1e-6;
    int64_t positive = 0;
    for (int64_t i = 0; i < n; i++) {
      double got = f64 ? p64[i] : p32[i], slack = slack_at(alpha, (alpha - 1) * (x64[i] - m) - (tau - (alpha - 1) * m));
      if (isnan(want[i]) || isnan(got)) {
        if (isnan(want[i]) != isnan(got)) fail_msg("%s alpha %g n %d: NaN at %d", what, alpha, (int)n, (int)i);
        continue;
      }
      if (fabs(got - want[i]) > slack)
        fail_msg("%s alpha %g n %d element %d: %.9g, oracle %.9g", what, alpha, (int)n, (int)i, got, want[i]);
      sum += got;
      slack_sum += slack - 1e-6;
      positive += got > 0;
    }
    if (wanted && fabs(sum - 1) > slack_sum) fail_msg("%s alpha %g n %d: sum %.9g", what, alpha, (int)n, sum);
    if (r.support < positive)
      fail_msg("%s alpha %g n %d: support %d, %d positive", what, alpha, (int)n, r.support, (int)positive);
    if ((r.support == 0) != (wanted == 0)) fail_msg("%s alpha %g n %d: support %d", what, alpha, (int)n, r.support);
    if (alpha == 1)
      assert_true(isnan(r.tau));
    else if (isnan(tau) || isinf(tau))
      assert_true(isnan(tau) ? isnan(r.tau) : r.tau == tau);
    else if (fabs(r.tau - tau) > 1e-6 * fmax(1, fabs(tau)))
      fail_msg("%s alpha %g n %d: tau %.9g, oracle %.9g", what, alpha, (int)n, r.tau, tau);
  }
}
#define EACH_ALPHA(a)                            \
  for (int i_##a = 0; i_##a < N_ALPHAS; i_##a++) \
    for (double a = alphas[i_##a]; a > 0; a = 0)

/* ---- the catalogue */

static void test_single(void **state) {
  (void)state;
  static const float values[] = {0, -3, 7.5f, 1e8f, -1e30f, 1e-30f, 65504};
  EACH_ALPHA(a)
  for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
    float x = values[i], p = -1;
    result r = map(contexts[0], a, &x, &p, EMX_F32, 1);
    assert_true(p == 1 && r.support == 1);
    if (a > 1) assert_true(fabs(r.tau - ((a - 1) * x - 1)) <= 1e-15 * fmax(1, fabs((a - 1) * x)));
  }
}

static void test_equal_rows(void **state) {
  (void)state;
  static const int64_t lengths[] = {2, 3, 7, 16, 100, 1000, 65536, LONGEST};
  static const float values[] = {0, 123.25f, -1e8f};
  EACH_ALPHA(a)
  for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
    const int64_t n = lengths[l];
    if (n == LONGEST && a != 1 && a != 1.5 && a != 2 && a != 4) continue; /* keeps the test short */
    for (int c = 0; c < (n < 1000 ? n_contexts : 1); c++) {
      float value = values[(l + (size_t)c) % 3];
      for (int64_t i = 0; i < n; i++) x32[i] = value;
      result r = map(contexts[c], a, x32, p32, EMX_F32, n);
      assert_int_equal(r.support, n);
      double sum = 0;
      for (int64_t i = 0; i < n; i++) {
        sum += p32[i];
        /* equal scores, equal weights; 1/n to float rounding and the solver's 1e-15 in t, that is (alpha-1)^-1 n^(alpha-1)
         * 1e-15 */
        if (p32[i] != p32[0]) fail_msg("alpha %g n %d: weights differ", a, (int)n);
      }
      if (fabs(sum - 1) > 1e-6 || fabs(p32[0] * (double)n - 1) > 1e-6) fail_msg("alpha %g n %d: sum %.9g", a, (int)n, sum);
      if (a > 1) assert_true(fabs(r.tau - ((a - 1) * value - pow((double)n, 1 - a))) <= 1e-12 * fmax(1, fabs(r.tau)));
    }
  }
}

static void test_two_maxima_and_dominant(void **state) {
  (void)state;
  EACH_ALPHA(a) {
    if (a < 1.2) continue; /* gap 1/(alpha-1) times a few is plain softmax there */
    for (int n = 2; n < 40; n += 5) {
      const float gap = (float)(1 / (a - 1)) * 1.001f;
      for (int i = 0; i < n; i++) x32[i] = 5 - gap - (float)i;
      x32[n / 2] = x32[0] = 5;
      result r = map(contexts[0], a, x32, p32, EMX_F32, n);
      assert_true(r.support == 2 && fabs(p32[0] - .5) < 1e-6 && p32[0] == p32[n / 2]);
      assert_true(fabs(r.tau - ((a - 1) * 5 - pow(2, 1 - a))) < 1e-6);
      check_row(a, n, "two maxima");
      x32[0] = 5 - gap;
      r = map(contexts[0], a, x32, p32, EMX_F32, n);
      assert_true(r.support == 1 && p32[n / 2] == 1 && fabs(r.tau - ((a - 1) * 5 - 1)) < 1e-6);
    }
  }
}

/* A score exactly at tau has weight zero; adding or removing it changes no bit. Exact in float: alpha = 1.5, k equal scores m
 * have tau/(alpha-1) = m - 2/sqrt(k); k = 1, 4, 16. alpha = 2: m - 1/k; k = 1, 2, 4. */
static void test_score_at_threshold(void **state) {
  (void)state;
  static const struct {
    double alpha;
    int k;
    float gap;
  } cases[] = {{1.5, 1, 2}, {1.5, 4, 1}, {1.5, 16, .5f}, {2, 1, 1}, {2, 2, .5f}, {2, 4, .25f}};
  for (size_t t = 0; t < sizeof cases / sizeof *cases; t++)
    for (int c = 0; c < n_contexts; c++) {
      const int k = cases[t].k, n = k + 3;
      for (int i = 0; i < n; i++) x32[i] = 3 - (i < k ? 0 : cases[t].gap);
      result all = map(contexts[c], cases[t].alpha, x32, p32, EMX_F32, n);
      float alone[20];
      result few = map(contexts[c], cases[t].alpha, x32, alone, EMX_F32, k);
      assert_int_equal(all.support, k);
      assert_int_equal(few.support, k);
      assert_true(all.tau == few.tau);
      assert_memory_equal(p32, alone, (size_t)k * 4);
      for (int i = k; i < n; i++) assert_true(p32[i] == 0);
    }
}

static void test_scales(void **state) {
  (void)state;
  static const double scale[] = {1e-38, 1e-12, 1e-7, 1e-3, 1, 30, 1e4, 1e8, 3e37},
                      offset[] = {0, 0, 0, 100, -1e4, 1e6, -3e6, 1e8, 0};
  EACH_ALPHA(a)
  for (size_t s = 0; s < sizeof scale / sizeof *scale; s++)
    for (int n = 2; n < 400; n = n * 3 + 1) {
      emxi_normals((uint64_t)n, s, x32, n);
      for (int i = 0; i < n; i++) x32[i] = (float)(x32[i] * scale[s] + offset[s]);
      check_row(a, n, "scale");
    }
}

static void test_masks(void **state) {
  (void)state;
  EACH_ALPHA(a) {
    for (int n = 1; n < 80; n += 13) { /* nothing visible */
      for (int i = 0; i < n; i++) x32[i] = -INFINITY;
      check_row(a, n, "all masked");
      for (int i = 0; i < n; i++) assert_true(p32[i] == 0 && p64[i] == 0);
      x32[n - 1] = -1e20f; /* one finite score */
      check_row(a, n, "one visible");
      assert_true(p32[n - 1] == 1);
    }
    emxi_normals(3, 3, x32, 90); /* a mask is the row without the masked elements, bit for bit */
    float packed[45], p[45];
    for (int i = 0; i < 45; i++) packed[i] = x32[2 * i];
    for (int i = 0; i < 45; i++) x32[2 * i + 1] = -INFINITY;
    result r = map(contexts[0], a, x32, p32, EMX_F32, 90), q = map(contexts[0], a, packed, p, EMX_F32, 45);
    assert_int_equal(r.support, q.support);
    for (int i = 0; i < 45; i++) {
      assert_true(p32[2 * i + 1] == 0);
      if (a > 1 && p32[2 * i] != p[i]) fail_msg("alpha %g: a mask changed weight %d", a, i);
      if (fabsf(p32[2 * i] - p[i]) > 1e-6f) fail_msg("alpha %g: a mask changed weight %d", a, i);
    }
    if (a > 1) assert_true(r.tau == q.tau);
  }
}

static void test_nonfinite(void **state) {
  (void)state;
  static const float bad[] = {NAN, INFINITY};
  EACH_ALPHA(a)
  for (int b = 0; b < 2; b++)
    for (int n = 1; n < 70; n += 17)
      for (int at = 0; at < n; at += 7) {
        emxi_normals(5, 5, x32, n);
        x32[at] = bad[b];
        check_row(a, n, "non-finite");
        for (int i = 0; i < n; i++) assert_true(isnan(p32[i]));
      }
  /* only its own row */
  float x[4] = {NAN, 1, 1, 1}, p[4];
  int64_t shape[2] = {2, 2};
  emx_tensor tx = emx_tensor_view(x, EMX_F32, 2, shape), tp = emx_tensor_view(p, EMX_F32, 2, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  assert_int_equal(entmax_forward(contexts[0], &desc, &tx, &tp, NULL, NULL), EMX_OK);
  assert_true(isnan(p[0]) && isnan(p[1]) && p[2] == .5f && p[3] == .5f);
}

static void test_random_rows(void **state) {
  (void)state;
  EACH_ALPHA(a)
  for (int seed = 0; seed < 24; seed++) {
    const int n = 1 + (seed * seed * 5) % 1500;
    emxi_normals((uint64_t)seed, 77, x32, n);
    for (int i = 0; i < n; i++) {
      x32[i] *= (float)(seed % 6 + 1) * .7f;
      if (seed % 3 == 1) x32[i] = roundf(x32[i] * 2) / 2; /* ties everywhere, at the edge of the support too */
    }
    check_row(a, n, "random");
  }
}

/* Lemma 2 of the long-context paper: k equal maxima, the others lower by delta. At delta >= 2/sqrt(k) (alpha 1.5) the support is
 * the maxima alone, just below that it is everything. The edge n = 65536, 1.0001 or 0.98 of the gap, is from its test list. */
static void test_lemma2(void **state) {
  (void)state;
  static const int ks[] = {1, 2, 4, 9}, ns[] = {64, 65536};
  for (int k = 0; k < 4; k++)
    for (int n = 0; n < 2; n++)
      for (int c = 0; c < n_contexts; c++)
        for (int wide = 0; wide < 2; wide++) {
          const float delta = (float)((wide ? 1.0001 : 0.98) * 2 / sqrt(ks[k]));
          for (int i = 0; i < ns[n]; i++) x32[i] = i % (ns[n] / ks[k]) == 0 && i / (ns[n] / ks[k]) < ks[k] ? 1 : 1 - delta;
          result r = map(contexts[c], 1.5, x32, p32, EMX_F32, ns[n]);
          assert_int_equal(r.support, wide ? ks[k] : ns[n]);
          if (wide) assert_true(fabs(p32[0] - 1. / ks[k]) < 1e-6);
        }
}

/* ---- laws */

static void test_permutation_and_shift(void **state) {
  (void)state;
  enum { N = 301 };
  float y[N], q[N];
  EACH_ALPHA(a)
  for (int seed = 0; seed < 6; seed++) {
    emxi_normals((uint64_t)seed, 21, x32, N);
    for (int i = 0; i < N; i++) x32[i] = roundf(x32[i] * 256) / 64; /* so that adding the offset is exact */
    result r = map(contexts[0], a, x32, p32, EMX_F32, N);
    const int step = 7 + 2 * seed;
    for (int i = 0; i < N; i++) y[i] = x32[i * step % N]; /* N = 7 * 43 is not a multiple of 9, 11, 13, 15, 17; 7 is skipped */
    if (N % step) {
      result s = map(contexts[0], a, y, q, EMX_F32, N);
      assert_int_equal(s.support, r.support);
      /* the order of the sums changes: rounding of t only, 1e-6 by contract, far less in fact */
      for (int i = 0; i < N; i++) assert_true(fabsf(q[i] - p32[i * step % N]) <= 2e-7f + (float)(slack_at(a, 0) - 1e-6));
    }
    for (int i = 0; i < N; i++) y[i] = x32[i] + 4096;
    result s = map(contexts[0], a, y, q, EMX_F32, N);
    assert_int_equal(s.support, r.support);
    if (a > 1) assert_true(fabs(s.tau - r.tau - (a - 1) * 4096) < 1e-9);
    for (int i = 0; i < N; i++) /* differences from the maximum are the same numbers */
      if (q[i] != p32[i]) fail_msg("alpha %g: shifted weight %d is %.9g, was %.9g", a, i, q[i], p32[i]);
  }
}

/* T1: tau of a subset is a lower bound; equality exactly when no newcomer is above it. Tested on a growing prefix. */
static void test_monotone(void **state) {
  (void)state;
  EACH_ALPHA(a) {
    if (a == 1) continue;
    for (int seed = 0; seed < 5; seed++) {
      emxi_normals((uint64_t)seed, 31, x32, 500);
      double last = -INFINITY;
      for (int n = 1; n <= 500; n += n < 20 ? 1 : 37) {
        double before = last;
        int above = 0, from = n == 1 ? 0 : n <= 20 ? n - 1 : n - 37;
        for (int i = from; i < n; i++) above += (a - 1) * (double)x32[i] > before;
        last = map(contexts[0], a, x32, p32, EMX_F32, n).tau;
        /* 1e-12: what rounding may do to a threshold that does not move */
        if (last < before - 1e-12) fail_msg("alpha %g: tau fell from %.12g to %.12g at n = %d", a, before, last, n);
        if (!above && a <= 2 && last != before) fail_msg("alpha %g: tau moved at n = %d without a newcomer above it", a, n);
      }
    }
  }
}

/* Output row in place, rows of a pitch, and 16-bit rows: the weights are the rounded weights of the rounded scores. */
static void test_dtypes_and_strides(void **state) {
  (void)state;
  enum { R = 5, N = 37, PITCH = 41 };
  static const int32_t dtypes[] = {EMX_F32, EMX_F64, EMX_F16, EMX_BF16};
  EACH_ALPHA(a)
  for (int t = 0; t < 4; t++) {
    double cells[R * PITCH], tau[R], s[N];
    int32_t support[R];
    float noise[R * PITCH];
    emxi_normals(9, 9, noise, R * PITCH);
    for (int i = 0; i < R * PITCH; i++) emxi_store(cells, dtypes[t], i, i % PITCH < N ? noise[i] : 12345);
    double copy[R * PITCH];
    memcpy(copy, cells, sizeof cells);
    emx_tensor x = emx_tensor_view(cells, dtypes[t], 2, (int64_t[]){R, N}), tt = emx_tensor_view(tau, EMX_F64, 1, (int64_t[]){R}),
               ts = emx_tensor_view(support, EMX_I32, 1, (int64_t[]){R});
    x.stride[0] = PITCH;
    emx_entmax_desc desc;
    emx_entmax_desc_init(&desc);
    desc.alpha = a;
    assert_int_equal(entmax_forward(contexts[0], &desc, &x, &x, &tt, &ts), EMX_OK);
    const double unit = dtypes[t] == EMX_F16 ? 0x1p-11 : dtypes[t] == EMX_BF16 ? 0x1p-8 : 0; /* half a unit in the last place */
    for (int r = 0; r < R; r++) {
      for (int i = 0; i < N; i++) s[i] = emxi_load(copy, dtypes[t], r * PITCH + i);
      double tau_want = emxi_oracle_entmax(s, N, a, want, NULL);
      for (int i = 0; i < N; i++) {
        double got = emxi_load(cells, dtypes[t], r * PITCH + i), y = (a - 1) * s[i] - tau_want;
        if (fabs(got - want[i]) > slack_at(a, y) + unit * want[i]) fail_msg("alpha %g %s", a, emx_dtype_name(dtypes[t]));
      }
      for (int i = N; i < PITCH; i++)
        assert_true(emxi_load(cells, dtypes[t], r * PITCH + i) == emxi_load(copy, dtypes[t], r * PITCH + i));
    }
  }
  /* nothing to do is not an error */
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  emx_tensor none = emx_tensor_view(NULL, EMX_F32, 2, (int64_t[]){0, 5}),
             thin = emx_tensor_view(NULL, EMX_F32, 2, (int64_t[]){3, 0});
  assert_int_equal(entmax_forward(contexts[0], &desc, &none, &none, NULL, NULL), EMX_OK);
  int32_t support[3] = {7, 7, 7};
  emx_tensor ts = emx_tensor_view(support, EMX_I32, 1, (int64_t[]){3});
  assert_int_equal(entmax_forward(contexts[0], &desc, &thin, &thin, NULL, &ts), EMX_OK);
  assert_true(support[0] == 0 && support[2] == 0);
}

/* A row's bits do not depend on threads, nor on the rows beside it. */
static void test_thread_invariance(void **state) {
  (void)state;
  enum { R = 40, N = 700 };
  emx_ctx_opts opts;
  emx_ctx_opts_init(&opts);
  float *alone = malloc(N * sizeof *alone);
  emxi_normals(13, 13, x32, R * N);
  int64_t shape[2] = {R, N};
  EACH_ALPHA(a) {
    emx_entmax_desc desc;
    emx_entmax_desc_init(&desc);
    desc.alpha = a;
    for (int threads = 1; threads <= 4; threads += 3) {
      emx_ctx *ctx;
      opts.threads = threads;
      assert_int_equal(emx_ctx_create(&opts, &ctx), EMX_OK);
      emx_tensor x = emx_tensor_view(x32, EMX_F32, 2, shape), p = emx_tensor_view(p32, EMX_F32, 2, shape);
      assert_int_equal(entmax_forward(ctx, &desc, &x, &p, NULL, NULL), EMX_OK);
      for (int r = 0; r < R; r += 7) {
        map(ctx, a, x32 + r * N, alone, EMX_F32, N);
        assert_memory_equal(alone, p32 + r * N, N * sizeof *alone);
      }
      emx_ctx_destroy(ctx);
    }
  }
  free(alone);
}

/* ---- gradients */

static void test_gradient(void **state) {
  (void)state;
  enum { N = 12 };
  static const double smooth[] = {1, 1.5, 2};
  for (int t = 0; t < 3; t++) {
    const double a = smooth[t];
    int checked = 0;
    for (int seed = 0; seed < 40; seed++) {
      float noise[2 * N];
      double x[N], p[N], dp[N], dx[N], up[N], down[N];
      emxi_normals((uint64_t)seed, 51, noise, 2 * N);
      for (int i = 0; i < N; i++) x[i] = noise[i] * (seed % 4 + 1) * .5, dp[i] = noise[N + i];
      if (seed % 5 == 0) x[3] = -INFINITY;
      if (seed % 7 == 0) x[1] = x[2];
      result r = map(contexts[0], a, x, p, EMX_F64, N);
      bool kink = false; /* the mapping has a kink where a score crosses the threshold: no derivative there */
      for (int i = 0; i < N; i++) kink |= a > 1 && fabs((a - 1) * x[i] - r.tau) < 1e-3;
      if (kink) continue;
      emx_entmax_desc desc;
      emx_entmax_desc_init(&desc);
      desc.alpha = a;
      int64_t shape[2] = {1, N};
      emx_tensor tp = emx_tensor_view(p, EMX_F64, 2, shape), td = emx_tensor_view(dp, EMX_F64, 2, shape),
                 tx = emx_tensor_view(dx, EMX_F64, 2, shape);
      assert_int_equal(entmax_backward(contexts[0], &desc, &tp, &td, &tx), EMX_OK);
      double total = 0;
      for (int i = 0; i < N; i++) {
        if (isinf(x[i])) {
          assert_true(dx[i] == 0);
          continue;
        }
        /* central difference: truncation h^2 |p'''| / 6 (1e-10 times at most a few hundred), rounding 1e-16 / h */
        const double h = 1e-5, x0 = x[i];
        x[i] = x0 + h;
        map(contexts[0], a, x, up, EMX_F64, N);
        x[i] = x0 - h;
        map(contexts[0], a, x, down, EMX_F64, N);
        x[i] = x0;
        double slope = 0;
        for (int j = 0; j < N; j++) slope += dp[j] * (up[j] - down[j]) / (2 * h);
        if (fabs(slope - dx[i]) > 2e-7)
          fail_msg("alpha %g seed %d: gradient %d is %.9g, differences %.9g", a, seed, i, dx[i], slope);
        total += dx[i];
      }
      assert_true(fabs(total) < 1e-12); /* shifts do nothing: the gradient sums to zero */
      checked++;
    }
    assert_true(checked > 25);
  }
  /* Jacobian row 0 of entmax-1.5 at (.7, -.1, .3, .2, -1), from the derivations of the long-context paper's notes */
  double x[5] = {.7, -.1, .3, .2, -1}, p[5], dp[5] = {1}, dx[5];
  static const double row[5] = {.4420073, -.10523236, -.17740963, -.15936531, 0};
  map(contexts[0], 1.5, x, p, EMX_F64, 5);
  int64_t shape[2] = {1, 5};
  emx_tensor tp = emx_tensor_view(p, EMX_F64, 2, shape), td = emx_tensor_view(dp, EMX_F64, 2, shape),
             tx = emx_tensor_view(dx, EMX_F64, 2, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  assert_int_equal(entmax_backward(contexts[0], &desc, &tp, &td, &tx), EMX_OK);
  for (int i = 0; i < 5; i++) assert_true(fabs(dx[i] - row[i]) < 1e-7);
  /* a fully masked row has zero gradient, also in place */
  memset(p, 0, sizeof p);
  assert_int_equal(entmax_backward(contexts[0], &desc, &tp, &td, &td), EMX_OK);
  for (int i = 0; i < 5; i++) assert_true(dp[i] == 0);
}

/* alpha near 1 approaches softmax linearly in alpha - 1. */
static void test_softmax_limit(void **state) {
  (void)state;
  enum { N = 50 };
  float soft[N];
  emxi_normals(61, 1, x32, N);
  map(contexts[0], 1, x32, soft, EMX_F32, N);
  for (double e = 1e-2; e > 1e-4; e /= 10) {
    map(contexts[0], 1 + e, x32, p32, EMX_F32, N);
    double worst = 0;
    for (int i = 0; i < N; i++) worst = fmax(worst, fabs(p32[i] - soft[i]));
    assert_true(worst < 1.0 * e && worst > 0.01 * e); /* the slope at alpha = 1 of this row is about 0.2 */
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_single),
                                     cmocka_unit_test(test_equal_rows),
                                     cmocka_unit_test(test_two_maxima_and_dominant),
                                     cmocka_unit_test(test_score_at_threshold),
                                     cmocka_unit_test(test_scales),
                                     cmocka_unit_test(test_masks),
                                     cmocka_unit_test(test_nonfinite),
                                     cmocka_unit_test(test_random_rows),
                                     cmocka_unit_test(test_lemma2),
                                     cmocka_unit_test(test_permutation_and_shift),
                                     cmocka_unit_test(test_monotone),
                                     cmocka_unit_test(test_dtypes_and_strides),
                                     cmocka_unit_test(test_thread_invariance),
                                     cmocka_unit_test(test_gradient),
                                     cmocka_unit_test(test_softmax_limit)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
