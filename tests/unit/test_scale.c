/* theta and RoPE by themselves: published values, limits, derivatives, positions up to 2^20; what a layer's weights make of
 * them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "entmax/entmax.h"
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
    assert_true(fabs(emxi_theta(EMX_ATTN_SCALE_ASENTMAX, 2, -20, i, slope) - (1 + log1p(exp(2)) / (l * l))) <
                1e-14 * (1 + 8 / (l * l)));
    assert_true(slope[1] == 0);
    assert_true(fabs(emxi_theta(EMX_ATTN_SCALE_SSMAX, 0.43, 0, i, slope) - 0.43 * l) < 1e-14 && fabs(slope[0] - l) < 1e-14);
    assert_true(fabs(emxi_theta(EMX_ATTN_SCALE_FOCAL, log(0.4), 0, i, slope) - 2.5) < 1e-14);
  }
}

/* Central differences with h = 1e-5: truncation h^2/6 times the third derivative, rounding 1e-16/h; both below 1e-9 of the size
 * of theta. */
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

/* Rows of the pass itself: the heads without ALiBi times theta in float, the others untouched; beta -> 0 leaves every bit
 * alone. */
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
        assert_true(fabs(q[t][(ALIBI + e) * D + k] - want) <=
                    2e-7 * fabs(want)); /* theta and the product are rounded once each */
      }
    }
  }
}

/* Against complex numbers in double. The angle is exact to 1e-10 at position 2^20, so only the roundings of the sine, the
 * products and the sum remain; turning back gives what was there. Scores depend on the distance alone. */
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

/* ---- one NAPE layer of two heads, the second with ASEntmax, in double: loss = sum r.o */

enum { GN = 12, GW = 10, GD = 16 };
static struct {
  double x[GN][GW], wq[2][GD][GW], k[2][GN][GD], v[2][GN][GD], r[2][GN][GD], w[GW], u[GW], b, c; /* u: gamma's weights */
} layer;
static struct {
  double q[GN][GD], dq[GN][GD], db[GN], dc[GN]; /* of the second head: q before theta, dq the gradient of theta q */
  double x[GN][GW], w[GW], u[GW], b, c;
} slope;
static double dot64(const double *a, const double *b, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}
/* gradient: fills `slope` by the formulas of docs/math.md. */
static double layer64(bool gradient) {
  double loss = 0;
  for (int i = 0; i < GN; i++) {
    double derivative[2];
    const double b = dot64(layer.w, layer.x[i], GW) + layer.b, c = dot64(layer.u, layer.x[i], GW) + layer.c;
    for (int h = 0; h < 2; h++) {
      const double theta = h ? emxi_theta(EMX_ATTN_SCALE_ASENTMAX, b, c, i, derivative) : 1;
      double q[GD], z[GN], p[GN], g[GN], mean = 0, total = 0, d_theta = 0;
      int64_t support;
      for (int d = 0; d < GD; d++) q[d] = dot64(layer.wq[h][d], layer.x[i], GW);
      for (int j = 0; j <= i; j++) z[j] = theta * dot64(q, layer.k[h][j], GD) / 4 - (h ? 0 : i - j);
      emxi_oracle_entmax(z, i + 1, 1.5, p, &support);
      for (int j = 0; j <= i; j++) {
        g[j] = dot64(layer.r[h][i], layer.v[h][j], GD);
        loss += p[j] * g[j];
        mean += sqrt(p[j]) * g[j];
        total += sqrt(p[j]);
      }
      if (!gradient) continue;
      double dq[GD] = {0};
      for (int j = 0; j <= i; j++)
        for (int d = 0; d < GD; d++) dq[d] += sqrt(p[j]) * (g[j] - mean / total) * layer.k[h][j][d] / 4;
      for (int d = 0; d < GD; d++)
        for (int e = 0; e < GW; e++) slope.x[i][e] += theta * dq[d] * layer.wq[h][d][e];
      if (!h) continue;
      d_theta = dot64(q, dq, GD);
      slope.db[i] = derivative[0] * d_theta;
      slope.dc[i] = derivative[1] * d_theta;
      slope.b += slope.db[i];
      slope.c += slope.dc[i];
      for (int e = 0; e < GW; e++) {
        slope.w[e] += slope.db[i] * layer.x[i][e];
        slope.u[e] += slope.dc[i] * layer.x[i][e];
        slope.x[i][e] += slope.db[i] * layer.w[e] + slope.dc[i] * layer.u[e];
      }
      memcpy(slope.q[i], q, sizeof q);
      memcpy(slope.dq[i], dq, sizeof dq);
    }
  }
  return loss;
}
/* Central differences of h = 1e-5 in double: 1e-10 of truncation, 1e-11 of rounding. Supports do not change within h: the weights
 * are square roots away from the threshold, and a kink would show as an error of 1e-3. */
static void expect_slope(double *at, double got, const char *what) {
  const double keep = *at, h = 1e-5;
  *at = keep + h;
  const double up = layer64(false);
  *at = keep - h;
  const double down = layer64(false);
  *at = keep;
  if (!(fabs(got - (up - down) / (2 * h)) < 1e-7)) fail_msg("%s: %.10g, differences %.10g", what, got, (up - down) / (2 * h));
}
static void normals64(uint64_t stream, double *out, int n, double scale) {
  for (int i = 0; i < n; i++) {
    float x[1];
    emxi_normals(21, stream * 10000 + (uint64_t)i, x, 1);
    out[i] = scale * (double)x[0];
  }
}
static void test_gradient(void **state) {
  (void)state;
  normals64(1, &layer.x[0][0], GN * GW, 1);
  normals64(2, &layer.wq[0][0][0], 2 * GD * GW, 0.3);
  normals64(3, &layer.k[0][0][0], 2 * GN * GD, 1);
  normals64(4, &layer.v[0][0][0], 2 * GN * GD, 1);
  normals64(5, &layer.r[0][0][0], 2 * GN * GD, 1);
  normals64(6, layer.w, GW, 0.4);
  normals64(7, layer.u, GW, 0.3);
  layer.b = 0.3, layer.c = -0.2;
  layer64(true);
  for (int e = 0; e < GW; e++) {
    expect_slope(&layer.w[e], slope.w[e], "w");
    expect_slope(&layer.u[e], slope.u[e], "v");
    for (int i = 0; i < GN; i++) expect_slope(&layer.x[i][e], slope.x[i][e], "x");
  }
  expect_slope(&layer.b, slope.b, "b");
  expect_slope(&layer.c, slope.c, "c");
  assert_true(fabs(slope.b) > 1e-3 && fabs(slope.c) > 1e-3);
  assert_true(fabs(slope.db[0]) < 1e-15); /* one key: nothing to scale */

  /* The library's pass on the same numbers, rounded to float: 1e-6 of the largest. */
  emx_model_config c = config(EMX_POSITION_NAPE, EMX_ATTN_SCALE_ASENTMAX);
  c.num_heads = c.num_kv_heads = 2;
  c.alibi_num_heads = 1;
  enum { R = 2 * GD + 2 };
  static float q[GN][R], dq[GN][R];
  float b = (float)layer.b, g = (float)layer.c, gb = -1, gc = -1;
  const emxi_layer w = {.theta_b = &b, .theta_c = &g}, grad = {.theta_b = &gb, .theta_c = &gc};
  double sums[2], top = 0;
  for (int i = 0; i < GN; i++) {
    double none[2];
    const double zb = dot64(layer.w, layer.x[i], GW), zc = dot64(layer.u, layer.x[i], GW),
                 theta = emxi_theta(EMX_ATTN_SCALE_ASENTMAX, zb + layer.b, zc + layer.c, i, none);
    q[i][2 * GD] = (float)zb, q[i][2 * GD + 1] = (float)zc;
    for (int d = 0; d < GD; d++) {
      q[i][GD + d] = (float)(theta * slope.q[i][d]);
      dq[i][d] = 7; /* the ALiBi head's stays */
      dq[i][GD + d] = (float)slope.dq[i][d];
      top = fmax(top, fabs(theta * slope.dq[i][d]));
    }
  }
  const emxi_places places = {.m = GN, .length = GN};
  assert_int_equal(emxi_scale_sums(&c, GN), 2);
  assert_int_equal(
      emxi_scale_backward(contexts[1], &c, &w, &q[0][0], &q[0][2 * GD], &dq[0][0], &dq[0][2 * GD], R, sums, &grad, places),
      EMX_OK);
  assert_true(fabs((double)gb - slope.b) < 1e-6 * (1 + fabs(slope.b)) && fabs((double)gc - slope.c) < 1e-6 * (1 + fabs(slope.c)));
  for (int i = 0; i < GN; i++) {
    double none[2];
    const double theta =
        emxi_theta(EMX_ATTN_SCALE_ASENTMAX, (double)q[i][2 * GD] + layer.b, (double)q[i][2 * GD + 1] + layer.c, i, none);
    assert_true(fabs((double)dq[i][2 * GD] - slope.db[i]) < 1e-6 * (1 + fabs(slope.db[i])));
    assert_true(fabs((double)dq[i][2 * GD + 1] - slope.dc[i]) < 1e-6 * (1 + fabs(slope.dc[i])));
    for (int d = 0; d < GD; d++) {
      assert_true(dq[i][d] == 7);
      assert_true(fabs((double)dq[i][GD + d] - theta * slope.dq[i][d]) < 1e-6 * top);
    }
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
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_oracle),      cmocka_unit_test(test_limits),
                                     cmocka_unit_test(test_derivatives), cmocka_unit_test(test_queries),
                                     cmocka_unit_test(test_gradient),    cmocka_unit_test(test_rope),
                                     cmocka_unit_test(test_heads)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
