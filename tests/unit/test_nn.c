/* The f32 layers against plain float64 loops; gradients against the formulas' float64 differences; bits against threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "model/nn.h"

enum { CONTEXTS = 3 };
static emx_ctx *contexts[CONTEXTS]; /* 1, 2 and 5 workers */
static int setup(void **state) {
  (void)state;
  for (int i = 0; i < CONTEXTS; i++) {
    emx_ctx_opts opts;
    emx_ctx_opts_init(&opts);
    opts.threads = (int32_t[]){1, 2, 5}[i];
    if (emx_ctx_create(&opts, &contexts[i])) return -1;
  }
  return 0;
}
static int teardown(void **state) {
  (void)state;
  for (int i = 0; i < CONTEXTS; i++) emx_ctx_destroy(contexts[i]);
  return 0;
}

static float *normals(uint64_t stream, int64_t n) {
  float *p = emxi_alloc((size_t)(n + 4) * sizeof *p);
  emxi_normals(7, stream, p, n);
  return p;
}
/* |got - want| <= tolerance * (1 + |want|), everywhere. */
static void expect(const char *what, const float *got, const double *want, int64_t n, double tolerance) {
  for (int64_t i = 0; i < n; i++)
    if (!(fabs((double)got[i] - want[i]) <= tolerance * (1 + fabs(want[i]))))
      fail_msg("%s[%lld] = %.9g, reference %.9g", what, (long long)i, (double)got[i], want[i]);
}

/* Sums of k products of standard normals in f32: the error grows like sqrt(k) * 2^-24 * sqrt(k) = 6e-8 * k; 4e-7 * k covers it
 * with room to spare, and a wrong index gives errors near 1. */
static void test_linear(void **state) {
  (void)state;
  static const int64_t sizes[][3] = {{1, 24, 40},   {1, 192, 3000}, {1, 1, 1},       {3, 17, 5},   {64, 33, 70},
                                     {70, 192, 97}, {300, 96, 200}, {2100, 40, 100}, {9, 8, 1100}, {0, 5, 6}};
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
    const int64_t m = sizes[s][0], in = sizes[s][1], out = sizes[s][2];
    float *x = normals(1, m * in), *w = normals(2, out * in), *dy = normals(3, m * out), *y0 = normals(4, m * out),
          *dx0 = normals(5, m * in), *dw0 = normals(6, out * in);
    double *ry = emxi_calloc((size_t)(m * out) * 8), *rdx = emxi_calloc((size_t)(m * in) * 8),
           *rdw = emxi_calloc((size_t)(out * in) * 8);
    for (int64_t i = 0; i < m; i++)
      for (int64_t o = 0; o < out; o++)
        for (int64_t k = 0; k < in; k++) {
          ry[i * out + o] += (double)x[i * in + k] * w[o * in + k];
          rdx[i * in + k] += (double)dy[i * out + o] * w[o * in + k];
          rdw[o * in + k] += (double)dy[i * out + o] * x[i * in + k];
        }
    for (int accumulate = 0; accumulate < 2; accumulate++) {
      if (accumulate) {
        for (int64_t i = 0; i < m * out; i++) ry[i] += y0[i];
        for (int64_t i = 0; i < m * in; i++) rdx[i] += dx0[i];
        for (int64_t i = 0; i < out * in; i++) rdw[i] += dw0[i];
      }
      float *first[4] = {NULL};
      for (int c = 0; c < CONTEXTS; c++) {
        float *y = normals(4, m * out), *dx = normals(5, m * in), *dw = normals(6, out * in), *res = normals(8, m * out),
              *partials = normals(9, emxi_linear_partials(m, in, out));
        assert_int_equal(emxi_linear(contexts[c], x, w, y, m, in, out, accumulate), EMX_OK);
        assert_int_equal(emxi_linear_dx(contexts[c], dy, w, dx, m, in, out, accumulate), EMX_OK);
        assert_int_equal(emxi_linear_dw(contexts[c], x, dy, dw, partials, m, in, out, accumulate), EMX_OK);
        assert_int_equal(emxi_linear_residual(contexts[c], x, w, y0, res, m, in, out), EMX_OK);
        expect("y", y, ry, m * out, 4e-7 * (double)(in + 10));
        expect("dx", dx, rdx, m * in, 4e-7 * (double)(out + 10));
        expect("dw", dw, rdw, out * in, 4e-7 * (double)(m + 10));
        if (accumulate) expect("residual", res, ry, m * out, 4e-7 * (double)(in + 10));
        emxi_free(partials);
        float *now[4] = {y, dx, dw, res};
        const int64_t n[4] = {m * out, m * in, out * in, m * out};
        for (int t = 0; t < 4; t++) {
          if (c == 0)
            first[t] = now[t];
          else {
            assert_memory_equal(first[t], now[t], (size_t)n[t] * sizeof(float));
            emxi_free(now[t]);
          }
        }
      }
      for (int t = 0; t < 4; t++) emxi_free(first[t]);
    }
    emxi_free(x);
    emxi_free(w);
    emxi_free(dy);
    emxi_free(y0);
    emxi_free(dx0);
    emxi_free(dw0);
    emxi_free(ry);
    emxi_free(rdx);
    emxi_free(rdw);
  }
}

/* Small tiles meet often: a BLAS that shares scratch memory between concurrent callers fails here in most runs. */
static void test_linear_concurrent(void **state) {
  (void)state;
  enum { M = 2000, IN = 24, OUT = 32 };
  float *x = normals(1, M * IN), *w = normals(2, OUT * IN), *want = normals(3, M * OUT), *y = normals(4, M * OUT);
  assert_int_equal(emxi_linear(contexts[0], x, w, want, M, IN, OUT, false), EMX_OK);
  for (int i = 0; i < 3000; i++) {
    assert_int_equal(emxi_linear(contexts[CONTEXTS - 1], x, w, y, M, IN, OUT, false), EMX_OK);
    assert_memory_equal(want, y, M * OUT * sizeof(float));
  }
  emxi_free(x);
  emxi_free(w);
  emxi_free(want);
  emxi_free(y);
}

static void test_linear_errors(void **state) {
  (void)state;
  float a[4] = {1, 2, 3, 4}, y[4] = {5, 6, 7, 8};
  assert_int_equal(emxi_linear(contexts[0], a, a, y, (int64_t)INT32_MAX + 1, 2, 2, false), EMX_ERR_INVALID);
  assert_int_equal(emxi_linear_dw(contexts[0], a, a, y, NULL, -1, 2, 2, false), EMX_ERR_INVALID);
  emx_ctx_cancel(contexts[1]);
  assert_int_equal(emxi_linear(contexts[1], a, a, y, 2, 2, 2, false), EMX_ERR_CANCELLED);
  emx_ctx_resume(contexts[1]);
  assert_int_equal(emxi_linear(contexts[1], a, a, y, 2, 2, 2, false), EMX_OK);
  assert_true(y[0] == 5 && y[3] == 25);
}

static void norm_reference(const double *x, const double *w, double eps, double *y, int64_t d) {
  double sum = 0;
  for (int64_t i = 0; i < d; i++) sum += x[i] * x[i];
  for (int64_t i = 0; i < d; i++) y[i] = x[i] / sqrt(sum / (double)d + eps) * w[i];
}
static void test_rmsnorm(void **state) {
  (void)state;
  static const int64_t sizes[][2] = {{1, 1}, {1, 19}, {5, 64}, {3, 200}, {1100, 37}};
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
    const int64_t m = sizes[s][0], d = sizes[s][1];
    const double eps = 1e-5, h = 1e-5;
    float *x = normals(1, m * d), *w = normals(2, d), *dy = normals(3, m * d), *first[4] = {NULL};
    double *xd = emxi_alloc((size_t)d * 8), *wd = emxi_alloc((size_t)d * 8), *y0 = emxi_alloc((size_t)(m * d) * 8),
           *y1 = emxi_alloc((size_t)d * 8), *rdx = emxi_calloc((size_t)(m * d) * 8), *rdw = emxi_calloc((size_t)d * 8);
    for (int64_t i = 0; i < d; i++) wd[i] = w[i];
    for (int64_t r = 0; r < m; r++) { /* central differences in float64: error ~ h^2 */
      for (int64_t i = 0; i < d; i++) xd[i] = x[r * d + i];
      norm_reference(xd, wd, eps, y0 + r * d, d);
      if (d * m <= 2000 || r % 100 == 0)
        for (int64_t i = 0; i < d; i++)
          for (int side = -1; side <= 1; side += 2) {
            const double keep = xd[i];
            xd[i] += side * h;
            norm_reference(xd, wd, eps, y1, d);
            for (int64_t j = 0; j < d; j++) rdx[r * d + i] += side * y1[j] * dy[r * d + j] / (2 * h);
            xd[i] = keep;
          }
      for (int64_t i = 0; i < d; i++) rdw[i] += y0[r * d + i] / wd[i] * dy[r * d + i];
    }
    for (int c = 0; c < CONTEXTS; c++) {
      float *y = normals(9, m * d), *rstd = normals(9, m), *dx = normals(4, m * d), *dw = emxi_calloc((size_t)d * 4),
            *partials = normals(9, emxi_rmsnorm_partials(m, d));
      assert_int_equal(emxi_rmsnorm(contexts[c], x, w, eps, y, rstd, m, d), EMX_OK);
      expect("y", y, y0, m * d, 1e-6);
      assert_int_equal(emxi_rmsnorm_backward(contexts[c], x, w, rstd, dy, dx, dw, partials, m, d, false), EMX_OK);
      for (int64_t r = 0; r < m; r++) /* 2e-5: cancellation between the two terms in f32, at |rstd| up to ~30 when d = 1 */
        if (d * m <= 2000 || r % 100 == 0) expect("dx", dx + r * d, rdx + r * d, d, 2e-5);
      expect("dw", dw, rdw, d, 1e-5);
      float *added = normals(4, m * d), *base = normals(4, m * d), *dw2 = emxi_calloc((size_t)d * 4);
      assert_int_equal(emxi_rmsnorm_backward(contexts[c], x, w, rstd, dy, added, dw2, partials, m, d, true), EMX_OK);
      for (int64_t i = 0; i < m * d; i++)
        assert_true(fabsf(added[i] - base[i] - dx[i]) <= 1e-5f * (1 + fabsf(base[i]) + fabsf(dx[i])));
      emxi_free(added);
      emxi_free(base);
      emxi_free(dw2);
      emxi_free(partials);
      float *now[4] = {y, rstd, dx, dw};
      const int64_t n[4] = {m * d, m, m * d, d};
      for (int t = 0; t < 4; t++) {
        if (c == 0)
          first[t] = now[t];
        else {
          assert_memory_equal(first[t], now[t], (size_t)n[t] * sizeof(float));
          emxi_free(now[t]);
        }
      }
    }
    for (int t = 0; t < 4; t++) emxi_free(first[t]);
    emxi_free(x);
    emxi_free(w);
    emxi_free(dy);
    emxi_free(xd);
    emxi_free(wd);
    emxi_free(y0);
    emxi_free(y1);
    emxi_free(rdx);
    emxi_free(rdw);
  }
}

static double silu(double g) { return g / (1 + exp(-g)); }
static void test_swiglu(void **state) {
  (void)state;
  enum { N = 40000 };
  float *gate = normals(1, N), *up = normals(2, N), *dout = normals(3, N), *out = normals(4, N), *dgate = normals(5, N),
        *dup = normals(6, N), *again = normals(7, N);
  double *want = emxi_alloc(3 * N * 8);
  for (int i = 0; i < N; i++) gate[i] *= i < 30000 ? 3 : 40;
  gate[0] = 1e4f, gate[1] = -1e4f, gate[2] = -87.5f, gate[3] = 0, gate[4] = -0.0f;
  for (int i = 0; i < N; i++) {
    const double g = gate[i], s = 1 / (1 + exp(-g));
    want[i] = silu(g) * up[i];
    want[N + i] = (double)dout[i] * up[i] * (s + g * s * (1 - s));
    want[2 * N + i] = dout[i] * silu(g);
  }
  for (int i = 0; i < 50; i++) { /* the formula of the derivative itself */
    const double h = 1e-5, g = gate[100 + i],
                 difference = (silu(g + h) - silu(g - h)) / (2 * h) * (double)dout[100 + i] * up[100 + i];
    assert_true(fabs(difference - want[N + 100 + i]) < 1e-8);
  }
  for (int c = 0; c < CONTEXTS; c++) { /* the exponential is good to 2e-7, the rest rounds a few times */
    assert_int_equal(emxi_swiglu(contexts[c], gate, up, out, N), EMX_OK);
    expect("out", out, want, N, 1e-6);
    assert_int_equal(emxi_swiglu_backward(contexts[c], gate, up, dout, dgate, dup, again, N), EMX_OK);
    assert_memory_equal(again, out, N * sizeof(float));
    expect("dgate", dgate, want + N, N, 2e-6);
    expect("dup", dup, want + 2 * N, N, 1e-6);
  }
  assert_int_equal(emxi_swiglu_backward(contexts[1], gate, up, dout, gate, up, dout, N), EMX_OK); /* in place: same bits */
  assert_memory_equal(gate, dgate, N * sizeof(float));
  assert_memory_equal(up, dup, N * sizeof(float));
  assert_memory_equal(dout, out, N * sizeof(float));
  gate[7] = NAN;
  assert_int_equal(emxi_swiglu(contexts[0], gate, up, out, N), EMX_OK);
  assert_true(isnan(out[7]) && !isnan(out[8]));
  float *all[] = {gate, up, dout, out, dgate, dup, again};
  for (int i = 0; i < 7; i++) emxi_free(all[i]);
  emxi_free(want);
}

static void test_embed(void **state) {
  (void)state;
  enum { V = 11, M = 500, D = 70 };
  float *table = normals(1, V * D), *x = normals(2, M * D), *dx = normals(3, M * D);
  int32_t tokens[M];
  double *want = emxi_alloc(V * D * 8);
  float *start = normals(4, V * D), *first = NULL;
  for (int i = 0; i < V * D; i++) want[i] = start[i];
  for (int i = 0; i < M; i++) {
    tokens[i] = (i * i + 3) % V;
    for (int j = 0; j < D; j++) want[tokens[i] * D + j] += dx[i * D + j];
  }
  emxi_embed(table, tokens, x, M, D);
  for (int i = 0; i < M; i++) assert_memory_equal(x + i * D, table + tokens[i] * D, D * sizeof(float));
  for (int c = 0; c < CONTEXTS; c++) {
    float *dtable = normals(4, V * D);
    assert_int_equal(emxi_embed_backward(contexts[c], tokens, dx, dtable, M, D), EMX_OK);
    expect("dtable", dtable, want, V * D, 1e-5); /* sums of ~50 normals */
    if (first) assert_memory_equal(first, dtable, V * D * sizeof(float));
    if (c == 0)
      first = dtable;
    else
      emxi_free(dtable);
  }
  emxi_free(first);
  emxi_free(start);
  emxi_free(want);
  emxi_free(table);
  emxi_free(x);
  emxi_free(dx);
}

static void test_cross_entropy(void **state) {
  (void)state;
  static const int64_t sizes[][2] = {{1, 256}, {3, 5}, {200, 256}, {2, 20000}, {1, 1}};
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
    const int64_t m = sizes[s][0], v = sizes[s][1];
    float *logits = normals(1, m * v), *copy = normals(1, m * v), *nll = normals(2, m), *first = NULL, *first_nll = NULL;
    int32_t *targets = emxi_alloc((size_t)m * 4);
    double *want = emxi_alloc((size_t)(m * v) * 8), *want_nll = emxi_alloc((size_t)m * 8);
    for (int64_t i = 0; i < m * v; i++) logits[i] = copy[i] *= 6;
    if (v > 3) logits[1] = copy[1] = 900, logits[2] = copy[2] = -INFINITY; /* exp would overflow, or be zero */
    for (int64_t i = 0; i < m; i++) {
      double max = -INFINITY, sum = 0;
      targets[i] = (int32_t)((i * 7 + 3) % v);
      for (int64_t j = 0; j < v; j++) max = fmax(max, logits[i * v + j]);
      for (int64_t j = 0; j < v; j++) sum += exp(logits[i * v + j] - max);
      want_nll[i] = log(sum) + max - logits[i * v + targets[i]];
      for (int64_t j = 0; j < v; j++) want[i * v + j] = 0.25 * (exp(logits[i * v + j] - max) / sum - (j == targets[i]));
    }
    assert_int_equal(emxi_cross_entropy(contexts[1], logits, targets, nll, 0, m, v), EMX_OK);
    assert_memory_equal(logits, copy, (size_t)(m * v) * sizeof(float));
    expect("nll", nll, want_nll, m, 2e-6);
    for (int c = 0; c < CONTEXTS; c++) {
      float *g = emxi_alloc((size_t)(m * v) * 4), *loss = normals(3, m);
      memcpy(g, copy, (size_t)(m * v) * 4);
      assert_int_equal(emxi_cross_entropy(contexts[c], g, targets, loss, 0.25f, m, v), EMX_OK);
      expect("nll", loss, want_nll, m, 2e-6);
      expect("dlogits", g, want, m * v, 1e-6);
      if (first) {
        assert_memory_equal(first, g, (size_t)(m * v) * 4);
        assert_memory_equal(first_nll, loss, (size_t)m * 4);
        emxi_free(g);
        emxi_free(loss);
      } else {
        first = g;
        first_nll = loss;
      }
    }
    logits[0] = NAN;
    assert_int_equal(emxi_cross_entropy(contexts[0], logits, targets, nll, 0, m, v), EMX_OK);
    assert_true(isnan(nll[0]) && (m == 1 || !isnan(nll[1])));
    emxi_free(first);
    emxi_free(first_nll);
    emxi_free(logits);
    emxi_free(copy);
    emxi_free(nll);
    emxi_free(targets);
    emxi_free(want);
    emxi_free(want_nll);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_linear),        cmocka_unit_test(test_linear_concurrent),
                                     cmocka_unit_test(test_linear_errors), cmocka_unit_test(test_rmsnorm),
                                     cmocka_unit_test(test_swiglu),        cmocka_unit_test(test_embed),
                                     cmocka_unit_test(test_cross_entropy)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
