/* Rows of the mapping against the float64 oracle. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "entmax/entmax.h"
#include "entmax_call.h"
#include "map_call.h"
#include "one_context.h"

/* Known values: entmax-1.5 of (-2, 0, .5) */
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

/* More known rows, and Lemma 1: a key at or under the threshold, wherever it is put, changes no bit of the others. */
static void test_notes(void **state) {
  (void)state;
  const map_args m = {EMX_MAP_ENTMAX, 1.5, 1};
  double x[3] = {1, 2, 3.5}, p[3], y[5] = {.7, -.1, .3, .2, -1}, q[5];
  static const double want[5] = {.47830253, .08502718, .24166485, .19500544, 0};
  assert_int_equal(map_forward(ctx, m, x, p, EMX_F64, 3, NULL, NULL), EMX_OK);
  assert_true(p[0] == 0 && fabs(p[1] - .05039079) < 1e-8 && fabs(p[2] - .94960921) < 1e-8);
  assert_int_equal(map_forward(ctx, m, y, q, EMX_F64, 5, NULL, NULL), EMX_OK);
  for (int i = 0; i < 5; i++) assert_true(fabs(q[i] - want[i]) < 1e-8);
  enum { N = 200, MORE = 150 };
  static const double few[] = {1.001, 1.25, 4. / 3, 1.5, 1.75, 2};
  for (int seed = 0; seed < 20; seed++)
    for (size_t a = 0; a < sizeof few / sizeof *few; a++) {
      const map_args k = {EMX_MAP_ENTMAX, few[a], 1};
      float s[N], w[N], t[N + MORE], v[N + MORE], noise[MORE];
      double tau, tau_more;
      int32_t support, support_more;
      emxi_normals((uint64_t)seed, 1, s, N);
      emxi_normals((uint64_t)seed, 2, noise, MORE);
      assert_int_equal(map_forward(ctx, k, s, w, EMX_F32, N, &tau, &support), EMX_OK);
      int from = 0, n = 0, kept[N]; /* newcomers among the old, some of them just under the threshold */
      for (int i = 0; i < N + MORE; i++)
        if (i % 7 < 3 && n < MORE)
          t[i] = nextafterf((float)(tau / (few[a] - 1)), -INFINITY) - fabsf(noise[n]) * (float)(n % 3), n++;
        else if (from < N)
          kept[from] = i, t[i] = s[from++];
        else
          t[i] = -INFINITY;
      assert_int_equal(from, N);
      assert_int_equal(map_forward(ctx, k, t, v, EMX_F32, N + MORE, &tau_more, &support_more), EMX_OK);
      assert_true(tau == tau_more && support == support_more);
      for (int i = 0; i < N; i++) assert_memory_equal(&v[kept[i]], &w[i], sizeof *w);
    }
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
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_known_values), cmocka_unit_test(test_notes),
                                     cmocka_unit_test(test_against_oracle)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
