/* Normmax and budget rows against float64 bisection, and their laws; sums of long near-uniform rows of every map. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "cpu/table.h"
#include "entmax/entmax.h"
#include "map_call.h"
#include "table_contexts.h"

#include <stdlib.h>
#include <string.h>

static const double alphas[] = {1.001, 1.01, 1.25, 4. / 3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 10, 1000}; /* above 4: normmax */
#define EACH_ALPHA(a)                                                     \
  for (size_t i_##a = 0; i_##a < sizeof alphas / sizeof *alphas; i_##a++) \
    for (double a = alphas[i_##a]; a > 0; a = 0)
enum { LONGEST = 1 << 20 };

static float *x32, *p32;
static double *x64, *p64, *want;
static int setup(void **state) {
  (void)state;
  if (open_contexts()) return 1;
  x32 = malloc(LONGEST * sizeof *x32), p32 = malloc(LONGEST * sizeof *p32);
  x64 = malloc(LONGEST * sizeof *x64), p64 = malloc(LONGEST * sizeof *p64), want = malloc(LONGEST * sizeof *want);
  return !(x32 && p32 && x64 && p64 && want);
}
static int teardown(void **state) {
  (void)state;
  close_contexts();
  free(x32), free(p32), free(x64), free(p64), free(want);
  return 0;
}
static int32_t map(int c, map_args m, void *x, void *p, int32_t dtype, int64_t n, double *tau) {
  int32_t support;
  if (map_forward(contexts[c], m, x, p, dtype, n, tau, &support)) fail_msg("%s", emx_last_error());
  return support;
}

/* x32[n] through the map as f32 by every table and as f64, against the oracle. */
static void check_row(map_args m, int64_t n, const char *what) {
  double top = -INFINITY, tau_want, total = m.kind == EMX_MAP_BUDGET ? m.budget : 1;
  int64_t visible = 0;
  for (int64_t i = 0; i < n; i++) {
    x64[i] = x32[i];
    top = fmax(top, x64[i]);
    visible += x64[i] > -INFINITY;
  }
  if (total > (double)visible) total = (double)visible;
  if (m.kind == EMX_MAP_NORMMAX)
    tau_want = emxi_oracle_normmax(x64, n, m.alpha, want);
  else
    tau_want = emxi_oracle_budget(x64, n, m.alpha, total, want);
  const double a = m.kind == EMX_MAP_NORMMAX ? 1 : m.alpha - 1, b = 1 / (m.alpha - 1);
  for (int c = 0; c <= n_contexts; c++) {
    const bool f64 = c == n_contexts;
    double tau, sum = 0, slack_sum = 1e-6 * total;
    const int32_t support = f64 ? map(0, m, x64, p64, EMX_F64, n, &tau) : map(c, m, x32, p32, EMX_F32, n, &tau);
    int64_t positive = 0;
    for (int64_t i = 0; i < n; i++) {
      const double got = f64 ? p64[i] : p32[i], y = fmax(a * x64[i] - tau_want, 0);
      /* 1e-6 is the promise; beyond it the oracle's own y, a difference of numbers of the row's size, is off by their rounding,
       * which b multiplies, and without bound at y = 0 for alpha > 2 */
      const double off = 4e-16 * (1 + fabs(a * x64[i]) + fabs(tau_want)) + 4e-15, slack = 1e-6 + pow(y + off, b) - pow(y, b);
      if (fabs(got - want[i]) > slack)
        fail_msg("%s kind %d alpha %g budget %g n %d table %d: weight %d is %.9g, oracle %.9g", what, m.kind, m.alpha, m.budget,
                 (int)n, c, (int)i, got, want[i]);
      assert_true(got >= 0 && got <= 1);
      sum += got;
      slack_sum += slack - 1e-6;
      positive += got > 0;
    }
    if (fabs(sum - total) > slack_sum)
      fail_msg("%s kind %d alpha %g n %d: sum %.9g of %g", what, m.kind, m.alpha, (int)n, sum, total);
    assert_true(support >= positive && (support > 0) == (visible > 0));
    if ((double)visible > total && fabs(tau - tau_want) > 1e-6 * fmax(1, fabs(tau_want)))
      fail_msg("%s kind %d alpha %g budget %g n %d: tau %.12g, oracle %.12g", what, m.kind, m.alpha, m.budget, (int)n, tau,
               tau_want);
  }
}
static void check_both(double alpha, int64_t n, const char *what) {
  check_row((map_args){EMX_MAP_NORMMAX, alpha, 1}, n, what);
  if (alpha > 4) return;
  const double budgets[] = {.3, 1, 1.5, 2, (double)n / 3, (double)n - .5, (double)n};
  for (int b = 0; b < 7; b++)
    if (budgets[b] > 0 && budgets[b] <= (double)n) check_row((map_args){EMX_MAP_BUDGET, alpha, budgets[b]}, n, what);
}

static void test_random_rows(void **state) {
  (void)state;
  EACH_ALPHA(a)
  for (int seed = 0; seed < 12; seed++) {
    const int n = 1 + (seed * seed * 7) % 600;
    emxi_normals((uint64_t)seed, 77, x32, n);
    for (int i = 0; i < n; i++) {
      x32[i] *= (float)(seed % 6 + 1) * .7f;
      if (seed % 3 == 1) x32[i] = roundf(x32[i] * 2) / 2; /* ties */
      if (seed % 4 == 2 && i % 3) x32[i] = -INFINITY;
      if (seed % 4 == 3) x32[i] += i % 50 == 0 ? 1000 : -3000; /* outliers far above the rest */
    }
    check_both(a, n, "random");
  }
}

static void test_scales(void **state) {
  (void)state;
  static const double scale[] = {1e-38, 1e-7, 1e-3, 30, 1e4}, offset[] = {0, 0, 100, -1e4, 1e6};
  EACH_ALPHA(a)
  for (int s = 0; s < 5; s++)
    for (int n = 2; n < 200; n = n * 4 + 1) {
      emxi_normals((uint64_t)n, (uint64_t)s, x32, n);
      for (int i = 0; i < n; i++) x32[i] = (float)(x32[i] * scale[s] + offset[s]);
      check_both(a, n, "scale");
    }
}

/* Rows whose answer is known. */
static void test_known(void **state) {
  (void)state;
  double tau;
  /* k-subsets of the entmax package's own definition: clamp(x - tau, 0, 1), here 2 of (3, 2.5, 2.25, 0) : tau = 1.875 */
  float x[6] = {3, 2.5f, 2.25f, 0}, p[6];
  assert_int_equal(map(0, (map_args){EMX_MAP_BUDGET, 2, 2}, x, p, EMX_F32, 4, &tau), 3);
  assert_true(p[0] == 1 && fabsf(p[1] - .625f) < 1e-7f && fabsf(p[2] - .375f) < 1e-7f && p[3] == 0 && fabs(tau - 1.875) < 1e-12);
  /* normmax, alpha = 2: w = [x - tau]_+, |w|_2 = 1; (.6, .8) lie 0.2 apart */
  x[0] = 1, x[1] = 1.2f, x[2] = -1;
  assert_int_equal(map(0, (map_args){EMX_MAP_NORMMAX, 2, 1}, x, p, EMX_F32, 3, &tau), 2);
  assert_true(fabs(p[0] - .6 / 1.4) < 1e-7 && fabs(p[1] - .8 / 1.4) < 1e-7 && p[2] == 0 && fabs(tau - .4) < 1e-7);
  EACH_ALPHA(a) {
    if (a > 4) continue;
    /* equal scores share; k scores apart from the rest by more than 1/(alpha-1) are the subset */
    for (int n = 1; n < 70; n = 2 * n + 1) {
      for (int i = 0; i < n; i++) x32[i] = 7;
      for (int b = 1; b <= n; b += 5) {
        assert_int_equal(map(0, (map_args){EMX_MAP_BUDGET, a, b}, x32, p32, EMX_F32, n, &tau), n);
        for (int i = 0; i < n; i++) assert_true(fabs(p32[i] - (double)b / n) < 1e-6);
      }
      assert_int_equal(map(0, (map_args){EMX_MAP_NORMMAX, a, 1}, x32, p32, EMX_F32, n, &tau), n);
      for (int i = 0; i < n; i++) assert_true(fabs(p32[i] - 1. / n) < 1e-6);
      if (n < 3) continue;
      for (int i = 0; i < n; i++) x32[i] = i % 3 == 1 ? 7 : (float)(7 - 1.001 / (a - 1) - i);
      const int k = (n + 1) / 3;
      assert_int_equal(map(0, (map_args){EMX_MAP_BUDGET, a, k}, x32, p32, EMX_F32, n, &tau), k);
      for (int i = 0; i < n; i++) assert_true(p32[i] == (i % 3 == 1 ? 1 : 0));
    }
    /* a budget of one, or less, never meets its bound: entmax, and entmax scaled */
    emxi_normals(5, 6, x32, 200);
    double tau1;
    for (int i = 0; i < 200; i++) x64[i] = x32[i];
    const int32_t s0 = map(0, (map_args){EMX_MAP_ENTMAX, a, 1}, x64, want, EMX_F64, 200, &tau1),
                  s1 = map(0, (map_args){EMX_MAP_BUDGET, a, 1}, x64, p64, EMX_F64, 200, &tau);
    assert_true(s0 == s1 && fabs(tau - tau1) < 1e-14);
    for (int i = 0; i < 200; i++) assert_true(fabs(p64[i] - want[i]) < 1e-12 + (a > 2 ? 2e-5 : 0));
    /* masked: too few scores for the budget get one each; none at all get nothing; NaN poisons its row */
    for (int i = 0; i < 40; i++) x32[i] = i % 10 ? -INFINITY : (float)-i;
    assert_int_equal(map(0, (map_args){EMX_MAP_BUDGET, a, 9}, x32, p32, EMX_F32, 40, &tau), 4);
    for (int i = 0; i < 40; i++) assert_true(p32[i] == (i % 10 ? 0 : 1));
    for (int kind = EMX_MAP_NORMMAX; kind <= EMX_MAP_BUDGET; kind++) {
      for (int i = 0; i < 40; i++) x32[i] = -INFINITY;
      assert_int_equal(map(0, (map_args){kind, a, 2}, x32, p32, EMX_F32, 40, &tau), 0);
      assert_true(tau == -INFINITY);
      for (int i = 0; i < 40; i++) assert_true(p32[i] == 0);
      static const float bad[] = {NAN, INFINITY};
      for (int b = 0; b < 2; b++) {
        x32[17] = bad[b];
        x32[20] = 3;
        assert_int_equal(map(0, (map_args){kind, a, 2}, x32, p32, EMX_F32, 40, &tau), 0);
        assert_true(isnan(tau));
        for (int i = 0; i < 40; i++) assert_true(isnan(p32[i]));
      }
    }
  }
  const emx_tensor none = emx_tensor_view(NULL, EMX_F32, 2, (int64_t[]){3, 0});
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.x = io.p = &none;
  for (int kind = EMX_MAP_NORMMAX; kind <= EMX_MAP_BUDGET; kind++) {
    const emx_entmax_desc desc =
        map_desc((map_args){kind, 2, 1e300}); /* rows of nothing have room for no budget, and need none */
    assert_int_equal(emx_entmax_forward(contexts[0], &desc, &io), EMX_OK);
  }
}

/* Shifts and permutations; larger alpha gives normmax weights that are more alike. */
static void test_laws(void **state) {
  (void)state;
  enum { N = 301 };
  float y[N], q[N];
  double tau, shifted;
  EACH_ALPHA(a)
  for (int kind = EMX_MAP_NORMMAX; kind <= EMX_MAP_BUDGET; kind++)
    for (int c = 0; c < n_contexts; c++) {
      const map_args m = {kind, a, 12.25};
      if (a > 4 && kind == EMX_MAP_BUDGET) continue;
      emxi_normals(9, 21, x32, N);
      for (int i = 0; i < N; i++) x32[i] = roundf(x32[i] * 256) / 64;
      const int32_t support = map(c, m, x32, p32, EMX_F32, N, &tau);
      for (int i = 0; i < N; i++) y[i] = x32[i * 9 % N] + 4096;
      assert_int_equal(map(c, m, y, q, EMX_F32, N, &shifted), support);
      assert_true(fabs(shifted - tau - (kind == EMX_MAP_NORMMAX ? 1 : a - 1) * 4096) < 1e-9);
      for (int i = 0; i < N; i++) assert_true(fabsf(q[i] - p32[i * 9 % N]) <= (a > 2 ? 3e-5f : 2e-7f));
    }
  emxi_normals(3, 3, x32, N);
  double last = INFINITY;
  for (double a = 1.1; a <= 1000; a *= a < 4 ? 1.05 : 1.5) {
    double spread = 0;
    const int32_t k = map(0, (map_args){EMX_MAP_NORMMAX, a, 1}, x32, p32, EMX_F32, N, &tau);
    for (int i = 0; i < N; i++) spread += p32[i] * p32[i];
    spread *= k; /* 1 if all weights of the support are equal */
    assert_true(spread <= last * 1.2);
    last = spread;
  }
}

static void test_refusals(void **state) {
  (void)state;
  float x[8] = {1, 2, 3}, p[8] = {42}, before[8];
  memcpy(before, p, sizeof p);
  static const map_args bad[] = {{3, 1.5, 1},
                                 {-1, 1.5, 1},
                                 {EMX_MAP_NORMMAX, 1, 1},
                                 {EMX_MAP_BUDGET, 1, 1},
                                 {EMX_MAP_BUDGET, 2, 0},
                                 {EMX_MAP_BUDGET, 2, -1},
                                 {EMX_MAP_BUDGET, 2, NAN},
                                 {EMX_MAP_BUDGET, 2, INFINITY},
                                 {EMX_MAP_BUDGET, 2, 4.01}};
  static const char *const words[] = {"kind", "kind", "normmax", "budget", "budget", "budget", "budget", "budget", "4 scores"};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    assert_int_equal(map_forward(contexts[0], bad[i], x, p, EMX_F32, 4, NULL, NULL), EMX_ERR_INVALID);
    if (!strstr(emx_last_error(), words[i])) fail_msg("%s", emx_last_error());
  }
  assert_memory_equal(before, p, sizeof p);
}

/* Rows that softmax cannot tell from flat sum to one at any length. The issue asks for 1e-5; the promise of the header is
 * 1e-6. */
static void test_near_uniform(void **state) {
  (void)state;
  static const int64_t lengths[] = {1000, 8192, 131072, LONGEST};
  static const float spreads[] = {0, 1e-3f, .02f, .3f};
  for (int l = 0; l < 4; l++)
    for (int s = 0; s < 4; s++) {
      const int64_t n = lengths[l];
      if (n == LONGEST && s == 1) continue; /* keeps the test short */
      emxi_normals((uint64_t)l, (uint64_t)s, x32, n);
      for (int64_t i = 0; i < n; i++) x32[i] *= spreads[s];
      static const map_args maps[] = {{EMX_MAP_ENTMAX, 1, 1},    {EMX_MAP_ENTMAX, 1.25, 1}, {EMX_MAP_ENTMAX, 1.5, 1},
                                      {EMX_MAP_ENTMAX, 2, 1},    {EMX_MAP_ENTMAX, 1.7, 1},  {EMX_MAP_ENTMAX, 4, 1},
                                      {EMX_MAP_NORMMAX, 2, 1},   {EMX_MAP_BUDGET, 2, 37},   {EMX_MAP_NORMMAX, 3, 1},
                                      {EMX_MAP_BUDGET, 1.5, 3.5}};
      for (size_t k = 0; k < sizeof maps / sizeof *maps; k++) {
        if (n == LONGEST && k >= 4 && k != 6 && k != 7) continue;
        for (int c = n > 10000 ? n_contexts - 1 : 0; c < n_contexts; c++) {
          double tau, sum = 0, total = maps[k].kind == EMX_MAP_BUDGET ? maps[k].budget : 1;
          map(c, maps[k], x32, p32, EMX_F32, n, &tau);
          for (int64_t i = 0; i < n; i++) sum += p32[i];
          if (!(fabs(sum - total) < 1e-6 * total))
            fail_msg("kind %d alpha %g n %d spread %g: sum %.9g", maps[k].kind, maps[k].alpha, (int)n, spreads[s], sum);
        }
      }
    }
}

/* A batch with one budget a row is its rows one by one, bit for bit; a bad budget is named and nothing is written. */
static void test_budget_per_row(void **state) {
  (void)state;
  enum { R = 9, L = 40 };
  static const double budgets[R] = {.25, 1, 1.5, 2, 3, 7.75, 20, 39.5, 40};
  double x[R * L], p[R * L], before[R * L], one[L], bd[R], tau;
  float normals[R * L], bf[R];
  int32_t support;
  emxi_normals(11, 11, normals, R * L);
  for (int i = 0; i < R * L; i++) x[i] = normals[i];
  const int64_t shape[2] = {R, L};
  for (int as_float = 0; as_float < 2; as_float++) {
    for (int r = 0; r < R; r++) bd[r] = budgets[r], bf[r] = (float)budgets[r];
    emx_tensor tx = emx_tensor_view(x, EMX_F64, 2, shape), tp = emx_tensor_view(p, EMX_F64, 2, shape),
               tb = as_float ? emx_tensor_view(bf, EMX_F32, 1, shape) : emx_tensor_view(bd, EMX_F64, 1, shape);
    emx_entmax_desc desc = map_desc((map_args){EMX_MAP_BUDGET, 2, 5});
    emx_entmax_io io;
    emx_entmax_io_init(&io);
    io.x = &tx, io.p = &tp, io.budget = &tb;
    assert_int_equal(emx_entmax_forward(contexts[0], &desc, &io), EMX_OK);
    for (int r = 0; r < R; r++) {
      assert_int_equal(
          map_forward(contexts[0], (map_args){EMX_MAP_BUDGET, 2, budgets[r]}, x + r * L, one, EMX_F64, L, &tau, &support),
          EMX_OK);
      assert_memory_equal(one, p + r * L, sizeof one);
    }
    static const double bad[] = {0, -1, 41, NAN, INFINITY};
    memcpy(before, p, sizeof p);
    for (size_t b = 0; b < sizeof bad / sizeof *bad; b++) {
      bd[7] = bad[b], bf[7] = (float)bad[b];
      assert_int_equal(emx_entmax_forward(contexts[0], &desc, &io), EMX_ERR_INVALID);
      assert_non_null(strstr(emx_last_error(), "budget of row 7"));
      assert_memory_equal(before, p, sizeof p);
    }
    bd[7] = bf[7] = 1;
    desc.kind = EMX_MAP_ENTMAX;
    assert_int_equal(emx_entmax_forward(contexts[0], &desc, &io), EMX_ERR_INVALID);
    desc.kind = EMX_MAP_BUDGET;
    tb.shape[0] = R - 1;
    assert_int_equal(emx_entmax_forward(contexts[0], &desc, &io), EMX_ERR_SHAPE);
    tb.shape[0] = R;
    tb.dtype = EMX_I32;
    assert_int_equal(emx_entmax_forward(contexts[0], &desc, &io), EMX_ERR_DTYPE);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_random_rows),   cmocka_unit_test(test_scales),
                                     cmocka_unit_test(test_known),         cmocka_unit_test(test_laws),
                                     cmocka_unit_test(test_refusals),      cmocka_unit_test(test_near_uniform),
                                     cmocka_unit_test(test_budget_per_row)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
