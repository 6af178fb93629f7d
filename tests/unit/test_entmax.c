/* Rows of the mapping against the float64 oracle. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "entmax/entmax.h"
#include "entmax_call.h"

static emx_ctx *ctx;
static int setup(void **state) {
  (void)state;
  return emx_ctx_create(NULL, &ctx);
}
static int teardown(void **state) {
  (void)state;
  emx_ctx_destroy(ctx);
  return 0;
}

/* asentmax.md section 5: entmax-1.5 of (-2, 0, .5) */
static void test_known_values(void **state) {
  (void)state;
  double x[3] = {-2, 0, .5}, p[3], tau;
  int32_t support;
  int64_t shape[2] = {1, 3};
  emx_tensor tx = emx_tensor_view(x, EMX_F64, 2, shape), tp = emx_tensor_view(p, EMX_F64, 2, shape),
             tt = emx_tensor_view(&tau, EMX_F64, 1, shape), ts = emx_tensor_view(&support, EMX_I32, 1, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  assert_int_equal(entmax_forward(ctx, &desc, &tx, &tp, &tt, &ts), EMX_OK);
  assert_true(p[0] == 0 && fabs(p[1] - .32600736) < 1e-8 && fabs(p[2] - .67399264) < 1e-8);
  assert_true(fabs(tau + .57097055) < 1e-8);
  assert_int_equal(support, 2);
}

static void test_against_oracle(void **state) {
  (void)state;
  enum { N = 500 };
  static const double alphas[] = {1, 1.001, 1.25, 4. / 3, 1.5, 1.75, 2, 2.5, 4};
  for (size_t a = 0; a < sizeof alphas / sizeof *alphas; a++)
    for (int seed = 0; seed < 20; seed++) {
      float x[N], p[N], tau;
      double xd[N], pd[N];
      int32_t support;
      int64_t want, n = 1 + seed * 26, shape[2] = {1, n};
      emxi_normals((uint64_t)seed, a, x, n);
      for (int i = 0; i < n; i++) xd[i] = x[i] *= (float)(seed + 1) / 4;
      double t = emxi_oracle_entmax(xd, n, alphas[a], pd, &want);
      emx_tensor tx = emx_tensor_view(x, EMX_F32, 2, shape), tp = emx_tensor_view(p, EMX_F32, 2, shape),
                 tt = emx_tensor_view(&tau, EMX_F32, 1, shape), ts = emx_tensor_view(&support, EMX_I32, 1, shape);
      emx_entmax_desc desc;
      emx_entmax_desc_init(&desc);
      desc.alpha = alphas[a];
      assert_int_equal(entmax_forward(ctx, &desc, &tx, &tp, &tt, &ts), EMX_OK);
      double sum = 0;
      for (int i = 0; i < n; i++) {
        sum += p[i];
        if (fabs(p[i] - pd[i]) > 1e-6) fail_msg("alpha %g n %d i %d: %g, oracle %g", alphas[a], (int)n, i, p[i], pd[i]);
      }
      assert_true(fabs(sum - 1) < 1e-6);
      assert_int_equal(support, want);
      if (alphas[a] > 1) assert_true(fabs(tau - t) <= 1e-6 * fmax(1, fabs(t)));
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_known_values), cmocka_unit_test(test_against_oracle)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
