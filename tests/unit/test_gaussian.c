/* Truncated moments of a normal variable and the threshold that they define. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>

#include "kv/gaussian.h"

/* E[(t+Z)_+^b] by the trapezoidal rule in y = log(t+z), far finer than the library's and over a fixed range. */
static double reference(double b, double t) {
  double sum = 0;
  for (int i = -30000; i < 4000; i++) {
    const double y = exp(i * 2e-3), z = y - t;
    sum += exp(b * i * 2e-3 - .5 * z * z) * y;
  }
  return sum * 2e-3 * .3989422804014327;
}

static void test_moments(void **state) {
  (void)state;
  static const double powers[] = {1, 2, 3, 4, 1. / 3, .5, 2. / 3, 4. / 3, 20};
  for (int i = 0; i < 9; i++)
    for (double t = -36; t <= 36; t += 1.7) {
      double value, below;
      emxi_gauss_moments(powers[i], t, &value, &below);
      const double want = reference(powers[i], t);
      if (want > 1e-290 && !(fabs(value - want) <= 1e-7 * want))
        fail_msg("b %g t %g: %.12g, expected %.12g", powers[i], t, value, want);
      if (powers[i] > 1 && want > 1e-290) assert_true(fabs(below - reference(powers[i] - 1, t)) <= 1e-7 * below);
    }
  double value, below;
  emxi_gauss_moments(3, 0, &value, &below);
  assert_true(fabs(value - sqrt(2 / 3.14159265358979323846)) < 1e-12);
  for (int b = 1; b <= 3; b++)
    for (double t = -60; t <= 40; t += .25) { /* no cancellation below zero; increasing in t */
      double more;
      emxi_gauss_moments(b, t, &value, &below);
      assert_true(value >= 0 && below >= 0);
      emxi_gauss_moments(b, t + .25, &more, &below);
      assert_true(more >= value);
    }
}

static void test_threshold(void **state) {
  (void)state;
  static const double alphas[] = {1.001, 1.25, 4. / 3, 1.5, 1.75, 2, 2.5, 4};
  for (int i = 0; i < 8; i++) {
    const double a = alphas[i] - 1;
    float mu[3] = {-2, .5f, 3}, zero[3] = {0}, sigma[3] = {.1f, 1, 2};
    /* no spread: the equal-score threshold, whatever the count */
    for (double n = 1; n < 1e7; n *= 37) {
      const double tau = emxi_gauss_tau(alphas[i], n, &mu[1], zero, 1), want = a * .5 - pow(n, 1 - alphas[i]);
      assert_true(fabs(tau - want) <= 1e-8);
    }
    /* more spread, a shift and more tokens move it as they must */
    const double base = emxi_gauss_tau(alphas[i], 100, mu, sigma, 3);
    float shifted[3] = {mu[0] + 7, mu[1] + 7, mu[2] + 7}, wider[3] = {.2f, 1.5f, 3};
    assert_true(fabs(emxi_gauss_tau(alphas[i], 100, shifted, sigma, 3) - base - 7 * a) <= 1e-6);
    assert_true(emxi_gauss_tau(alphas[i], 1000, mu, sigma, 3) > base);
    if (alphas[i] <= 2) assert_true(emxi_gauss_tau(alphas[i], 100, mu, wider, 3) > base); /* x^b is convex */
  }
  /* EntmaxKV's bracket misses this one: four pages without spread, their means closer than n^(1-alpha) */
  float mu[24], zero[24] = {0};
  for (int i = 0; i < 24; i++) mu[i] = i < 4 ? 2 - .1f * (float)i : 1;
  assert_true(fabs(emxi_gauss_tau(1.5, 16, mu, zero, 24) - .8132) < 1e-4);
}

static void test_quantile(void **state) {
  (void)state;
  assert_true(fabs(emxi_gauss_max_quantile(.99, 16) - 3.226) < 1e-3 && fabs(emxi_gauss_max_quantile(.995, 16) - 3.420) < 1e-3);
  assert_true(fabs(emxi_gauss_max_quantile(.5, 16) - 1.7235) < 1e-4 && fabs(emxi_gauss_max_quantile(.5, 1)) < 1e-12);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_moments), cmocka_unit_test(test_threshold),
                                     cmocka_unit_test(test_quantile)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
