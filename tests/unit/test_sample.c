/* Sampling against an own sort-based reference in float64. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include <emx_model.h>

#include <stdbool.h>
#include <stdlib.h>

static void test_greedy(void **state) {
  (void)state;
  emx_sample_opts o;
  emx_sample_opts_init(&o);
  int32_t t = -1;
  assert_int_equal(emx_sample((float[]){0, 2, 1, 2}, 4, &o, 0, &t), EMX_OK);
  assert_int_equal(t, 1); /* lowest id among equals */
  assert_int_equal(emx_sample((float[]){-INFINITY, -INFINITY, -3}, 3, &o, 0, &t), EMX_OK);
  assert_int_equal(t, 2);
  assert_int_equal(emx_sample((float[]){-0.f, 0.f}, 2, &o, 0, &t), EMX_OK);
  assert_int_equal(t, 0);
}

static void test_errors(void **state) {
  (void)state;
  emx_sample_opts good, o;
  emx_sample_opts_init(&good);
  int32_t t = 77;
  const float x[3] = {1, 2, 3};
  assert_int_equal(emx_sample((float[]){1, NAN, 2}, 3, &good, 0, &t), EMX_ERR_NONFINITE);
  assert_int_equal(emx_sample((float[]){1, INFINITY, 2}, 3, &good, 0, &t), EMX_ERR_NONFINITE);
  assert_int_equal(emx_sample((float[]){-INFINITY, -INFINITY}, 2, &good, 0, &t), EMX_ERR_NONFINITE);
  assert_int_equal(emx_sample(NULL, 3, &good, 0, &t), EMX_ERR_INVALID);
  assert_int_equal(emx_sample(x, 0, &good, 0, &t), EMX_ERR_INVALID);
  assert_int_equal(emx_sample(x, 3, NULL, 0, &t), EMX_ERR_INVALID);
  static const float bad[] = {-1, NAN, INFINITY};
  for (int i = 0; i < 3; i++) {
    o = good, o.temperature = bad[i];
    assert_int_equal(emx_sample(x, 3, &o, 0, &t), EMX_ERR_INVALID);
    o = good, o.top_p = bad[i];
    assert_int_equal(emx_sample(x, 3, &o, 0, &t), EMX_ERR_INVALID);
  }
  o = good, o.top_p = 0;
  assert_int_equal(emx_sample(x, 3, &o, 0, &t), EMX_ERR_INVALID);
  o = good, o.top_k = -1;
  assert_int_equal(emx_sample(x, 3, &o, 0, &t), EMX_ERR_INVALID);
  assert_int_equal(t, 77);
}

/* The distribution that the options describe, by sorting. */
static const float *sort_logits;
static int order(const void *a, const void *b) {
  int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
  if (sort_logits[i] != sort_logits[j]) return sort_logits[i] > sort_logits[j] ? -1 : 1;
  return i - j;
}
static void reference(const float *logits, int32_t n, const emx_sample_opts *o, double *p) {
  int32_t id[512];
  for (int32_t i = 0; i < n; i++) id[i] = i, p[i] = 0;
  sort_logits = logits;
  qsort(id, (size_t)n, sizeof *id, order);
  int32_t k = o->top_k && o->top_k < n ? o->top_k : n;
  double w[512], total = 0, sum = 0;
  for (int32_t r = 0; r < k; r++) total += w[r] = exp((logits[id[r]] - logits[id[0]]) / o->temperature);
  int32_t kept = 0;
  while (kept < k && (kept == 0 || sum < o->top_p * total)) sum += w[kept++];
  for (int32_t r = 0; r < kept; r++) p[id[r]] = w[r] / sum;
}

static void test_distribution(void **state) {
  (void)state;
  enum { N = 40, DRAWS = 20000 };
  static const struct {
    float temperature, top_p;
    int32_t top_k;
  } cases[] = {{1, 1, 0},     {.5f, 1, 5}, {2, .7f, 0}, {1, .5f, 8},   {1e-3f, 1, 0},
               {1, 1e-6f, 0}, {1, 1, 1},   {1, 1, 100}, {3, .999f, 39}};
  float logits[N];
  emxi_normals(5, 0, logits, N);
  for (int i = 0; i < N; i++) logits[i] = roundf(logits[i] * 4) / 3; /* ties at the edges of the cuts */
  logits[7] = -INFINITY;
  for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
    emx_sample_opts o;
    emx_sample_opts_init(&o);
    o.temperature = cases[c].temperature;
    o.top_p = cases[c].top_p;
    o.top_k = cases[c].top_k;
    o.seed = 9;
    double p[512];
    int count[N] = {0};
    reference(logits, N, &o, p);
    for (int64_t step = 0; step < DRAWS; step++) {
      int32_t t, again;
      assert_int_equal(emx_sample(logits, N, &o, step, &t), EMX_OK);
      if (step < 50) { /* reproducible from (seed, step) */
        assert_int_equal(emx_sample(logits, N, &o, step, &again), EMX_OK);
        assert_int_equal(t, again);
      }
      count[t]++;
    }
    for (int i = 0; i < N; i++) {
      /* Never a token outside of the kept set; inside, five standard deviations of a binomial, and five for where that is
       * small. */
      double slack = p[i] > 0 ? 5 * sqrt(p[i] * (1 - p[i]) * DRAWS) + 5 : 0;
      if (fabs(count[i] - p[i] * DRAWS) > slack)
        fail_msg("case %d token %d: drawn %d, expected %g", (int)c, i, count[i], p[i] * DRAWS);
    }
  }
}

/* The exact set that survives, on many rows: with a flat draw from it every member is likely to appear. */
static void test_kept_set(void **state) {
  (void)state;
  enum { N = 300, DRAWS = 400 };
  for (uint64_t seed = 0; seed < 20; seed++) {
    float logits[N];
    emxi_normals(seed, 1, logits, N);
    if (seed & 1)
      for (int i = 0; i < N; i++) logits[i] = roundf(logits[i] * 2);
    emx_sample_opts o;
    emx_sample_opts_init(&o);
    o.temperature = 10; /* nearly flat */
    o.top_k = 1 + (int32_t)seed;
    o.seed = seed;
    double p[512];
    bool seen[N] = {false};
    reference(logits, N, &o, p);
    for (int64_t step = 0; step < DRAWS; step++) {
      int32_t t;
      assert_int_equal(emx_sample(logits, N, &o, step, &t), EMX_OK);
      seen[t] = true;
    }
    for (int i = 0; i < N; i++)
      assert_true(seen[i] == (p[i] > 0)); /* a miss has chance 20 (1 - 1/26)^400 = 3e-6, and the draws are fixed */
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_greedy), cmocka_unit_test(test_errors),
                                     cmocka_unit_test(test_distribution), cmocka_unit_test(test_kept_set)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
