/* theta and RoPE by themselves: published values, limits, derivatives, positions up to 2^20; what a layer's weights make of them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "model/scale.h"

static emx_ctx *contexts[2]; /* 1 and 3 workers */
static int setup(void **state) {
  (void)state;
  for (int i = 0; i < 2; i++) {
    emx_ctx_opts o;
    emx_ctx_opts_init(&o);
    o.threads = i ? 3 : 1;
    if (emx_ctx_create(&o, &contexts[i])) return 1;
  }
  return 0;
}
static int teardown(void **state) {
  (void)state;
  for (int i = 0; i < 2; i++) emx_ctx_destroy(contexts[i]);
  return 0;
}

static double asentmax(double b, double c, int64_t i) {
  double slope[2];
  return emxi_theta(EMX_ATTN_SCALE_ASENTMAX, b, c, i, slope);
}

/* Seven digits computed elsewhere, hence half a unit of the last. */
static void test_oracle(void **state) {
  (void)state;
  static const int64_t at[4] = {0, 1, 63, 65535};
  static const double down[4] = {1.987354, 1.823218, 1.486026, 1.330480}, up[4] = {1.646669, 1.917648, 3.530612, 6.317296};
  for (int i = 0; i < 4; i++) {
    assert_true(fabs(asentmax(0.3, -0.2, at[i]) - down[i]) < 5e-7);
    assert_true(fabs(asentmax(0.3, 0.4, at[i]) - up[i]) < 5e-7);
  }
  /* The start of training: 1.05 at every position, whatever the state. */
  for (int64_t i = 0; i < 1 << 20; i += 4099) assert_true(fabs(asentmax(log(exp(0.05) - 1), 0, i) - 1.05) < 1e-14);
}

/* Where the formula's textbook form would overflow, cancel or give NaN. */
static void test_limits(void **state) {
  (void)state;
  double slope[2];
  for (int64_t i = 0; i <= 1 << 20; i = i ? i * 2 : 1) {
    const double l = log((double)i + 2);
    assert_true(emxi_theta(EMX_ATTN_SCALE_ASENTMAX, -60, 0.7, i, slope) == 1); /* beta is 9e-27 */
    assert_true(slope[0] > 0 && slope[0] < 1e-23 && fabs(slope[1]) < 1e-23);
    assert_true(emxi_theta(EMX_ATTN_SCALE_ASENTMAX, -1e4, 0.7, i, slope) == 1 && slope[0] == 0 && slope[1] == 0);
    assert_true(fabs(emxi_theta(EMX_ATTN_SCALE_ASENTMAX, 40, 0, i, slope) - 41) < 1e-13); /* softplus(40) = 40 */
    assert_true(slope[0] == 1);
    assert_true(fabs(emxi_theta(EMX_ATTN_SCALE_ASENTMAX, 1e4, 20, i, slope) - (1 + 1e4 * l * l)) < 1e-12 * 1e4 * (1 + l * l));
    assert_true(slope[1] == 0); /* tanh is flat, gamma is 2 */
    assert_true(fabs(emxi_theta(EMX_ATTN_SCALE_ASENTMAX, 2, -20, i, slope) - (1 + log1p(exp(2)) / (l * l))) < 1e-14 * (1 + 8 / (l * l)));
    assert_true(slope[1] == 0);
    assert_true(fabs(emxi_theta(EMX_ATTN_SCALE_SSMAX, 0.43, 0, i, slope) - 0.43 * l) < 1e-14 && fabs(slope[0] - l) < 1e-14);
    assert_true(fabs(emxi_theta(EMX_ATTN_SCALE_FOCAL, log(0.4), 0, i, slope) - 2.5) < 1e-14);
  }
}

/* Central differences with h = 1e-5: truncation h^2/6 times the third derivative, rounding 1e-16/h; both below 1e-9 of the size of theta. */
static void test_derivatives(void **state) {
  (void)state;
  static const int32_t types[] = {EMX_ATTN_SCALE_ASENTMAX, EMX_ATTN_SCALE_SSMAX, EMX_ATTN_SCALE_FOCAL};
  static const int64_t at[] = {0, 1, 2, 63, 4095, 1 << 20};
  const double h = 1e-5;
  for (int t = 0; t < 3; t++)
    for (int p = 0; p < 6; p++)
      for (double b = -6; b <= 6; b += 0.75)
        for (double c = -2; c <= 2; c += 0.5) {
          double slope[2], none[2];
          const double theta = emxi_theta(types[t], b, c, at[p], slope),
                       db = (emxi_theta(types[t], b + h, c, at[p], none) - emxi_theta(types[t], b - h, c, at[p], none)) / (2 * h),
                       dc = (emxi_theta(types[t], b, c + h, at[p], none) - emxi_theta(types[t], b, c - h, at[p], none)) / (2 * h);
          assert_true(fabs(slope[0] - db) < 1e-8 * (1 + fabs(theta)));
          assert_true(fabs(slope[1] - dc) < 1e-8 * (1 + fabs(theta)));
        }
}

enum { H = 5, D = 16, ALIBI = 2, E = H - ALIBI, M = 150, ROW = H * D + 2 * E };
static emx_model_config config(int32_t position, int32_t scale) {
  emx_model_config c;
  emx_model_config_init(&c);
  c.num_heads = c.num_kv_heads = H;
  c.head_dim = D;
  c.alibi_num_heads = ALIBI;
  c.position_type = position;
  c.attn_scale_type = scale;
  return c;
}

/* Rows of the pass itself: the heads without ALiBi times theta in float, the others untouched; beta -> 0 leaves every bit alone. */
static void test_queries(void **state) {
  (void)state;
  emx_model_config c = config(EMX_POSITION_NAPE, EMX_ATTN_SCALE_ASENTMAX);
  static float q[M][ROW], before[M][ROW], again[M][ROW], b[E] = {0.3f, -60, 1}, g[E] = {-0.2f, 0.5f, 0.1f};
  emxi_layer w = {.theta_b = b, .theta_c = g};
  emxi_normals(1, 1, &before[0][0], M * ROW);
  for (int t = 0; t < M; t++) before[t][H * D + 1] = before[t][H * D + E + 1] = 0; /* the head that is turned off */
  memcpy(q, before, sizeof q);
  memcpy(again, before, sizeof again);
  const emxi_places places = {.m = M, .length = 70, .from = 1000};
  assert_int_equal(emxi_scale_queries(contexts[0], &c, &w, &q[0][0], ROW, &q[0][H * D], ROW, places), EMX_OK);
  assert_int_equal(emxi_scale_queries(contexts[1], &c, &w, &again[0][0], ROW, &again[0][H * D], ROW, places), EMX_OK);
  assert_memory_equal(q, again, sizeof q);
  for (int t = 0; t < M; t++) {
    assert_memory_equal(q[t], before[t], ALIBI * D * sizeof(float));
    assert_memory_equal(q[t] + (ALIBI + 1) * D, before[t] + (ALIBI + 1) * D, D * sizeof(float));
    assert_memory_equal(q[t] + H * D, before[t] + H * D, 2 * E * sizeof(float));
    for (int e = 0; e < E; e += 2) {
      const double n = log(1000 + t % 70 + 2.0), beta = log(1 + exp(before[t][H * D + e] + (double)b[e])),
                   gamma = 2 * tanh(before[t][H * D + E + e] + (double)g[e]), theta = 1 + beta * pow(n, gamma);
      for (int k = 0; k < D; k++) {
        const double want = theta * before[t][(ALIBI + e) * D + k];
        assert_true(fabs(q[t][(ALIBI + e) * D + k] - want) <= 2e-7 * fabs(want)); /* theta and the product are rounded once each */
      }
    }
  }
}

/* Against complex numbers in double. The angle is exact to 1e-10 at position 2^20, so only the roundings of the sine, the products and the
 * sum remain; turning back gives what was there. Scores depend on the distance alone. */
static void test_rope(void **state) {
  (void)state;
  emx_model_config c = config(EMX_POSITION_ROPE, EMX_ATTN_SCALE_NONE);
  static float x[M][ROW], before[M][ROW], table[70][D], again[M][ROW];
  static const int64_t starts[] = {0, 12345, 1 << 20};
  for (int s = 0; s < 3; s++) {
    const emxi_places places = {.m = M, .length = 70, .from = starts[s]};
    emxi_normals(2, 1, &before[0][0], M * ROW);
    memcpy(x, before, sizeof x);
    memcpy(again, before, sizeof x);
    emxi_rope_table(&c, starts[s], 70, &table[0][0]);
    assert_int_equal(emxi_rope(contexts[0], &x[0][0], ROW, H, D, &table[0][0], places, false), EMX_OK);
    assert_int_equal(emxi_rope(contexts[1], &again[0][0], ROW, H, D, &table[0][0], places, false), EMX_OK);
    assert_memory_equal(x, again, sizeof x);
    for (int t = 0; t < M; t++) {
      assert_memory_equal(x[t] + H * D, before[t] + H * D, 2 * E * sizeof(float));
      for (int h = 0; h < H; h++)
        for (int k = 0; k < D / 2; k++) {
          const double re = before[t][h * D + k], im = before[t][h * D + k + D / 2], size = hypot(re, im),
                       angle = atan2(im, re) + (double)(starts[s] + t % 70) * pow(10000, -2.0 * k / D);
          assert_true(fabs(x[t][h * D + k] - size * cos(angle)) <= 3e-7 * size);
          assert_true(fabs(x[t][h * D + k + D / 2] - size * sin(angle)) <= 3e-7 * size);
        }
    }
    assert_int_equal(emxi_rope(contexts[0], &x[0][0], ROW, H, D, &table[0][0], places, true), EMX_OK);
    for (int t = 0; t < M; t++)
      for (int k = 0; k < H * D; k++) assert_true(fabsf(x[t][k] - before[t][k]) <= 2e-6f);
  }
}

/* Which heads: NAPE the ones without ALiBi, everything else all. */
static void test_heads(void **state) {
  (void)state;
  static const int32_t positions[] = {EMX_POSITION_NAPE, EMX_POSITION_ALIBI, EMX_POSITION_NOPE, EMX_POSITION_ROPE},
                       want[] = {E, H, H, H};
  for (int i = 0; i < 4; i++) {
    emx_model_config c = config(positions[i], EMX_ATTN_SCALE_SSMAX);
    assert_int_equal(emxi_scaled_heads(&c), want[i]);
    c.attn_scale_type = EMX_ATTN_SCALE_NONE;
    assert_int_equal(emxi_scaled_heads(&c), 0);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_oracle),  cmocka_unit_test(test_limits), cmocka_unit_test(test_derivatives),
                                     cmocka_unit_test(test_queries), cmocka_unit_test(test_rope),   cmocka_unit_test(test_heads)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
