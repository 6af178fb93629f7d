/* Gradients of the row maps: finite differences in float64 for every map and alpha, the gradient of alpha, tiny weights, masks,
 * NaN, one alpha a row, dtypes and kernel tables. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "check.h"
#include "cpu/table.h"
#include "entmax/entmax.h"
#include "map_call.h"
#include "table_contexts.h"

#include <stdlib.h>
#include <string.h>

static emx_ctx *ctx;
static int setup(void **state) {
  (void)state;
  if (open_contexts()) return 1;
  ctx = contexts[0];
  return 0;
}
static int teardown(void **state) {
  (void)state;
  close_contexts();
  return 0;
}

static const double alphas[] = {1, 1.001, 1.01, 1.25, 4. / 3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 10, 100}; /* above 4: normmax */
#define EACH_ALPHA(a)                                                     \
  for (size_t i_##a = 0; i_##a < sizeof alphas / sizeof *alphas; i_##a++) \
    for (double a = alphas[i_##a]; a > 0; a = 0)

enum { N = 12 };
static double dot(const double *a, const double *b) {
  double s = 0;
  for (int i = 0; i < N; i++) s += a[i] * b[i];
  return s;
}
/* g . p at x + h e_i, or at alpha + h for i < 0 */
static double value(map_args m, const double *x, int i, double h, const double *g) {
  double y[N], p[N];
  memcpy(y, x, sizeof y);
  if (i < 0)
    m.alpha += h;
  else
    y[i] += h;
  OK(map_forward(ctx, m, y, p, EMX_F64, N, NULL, NULL));
  return dot(g, p);
}
/* Fourth order: the error is h^4 times a fifth derivative over 30, and the rounding of g . p over h. */
static double difference(map_args m, const double *x, int i, double h, const double *g) {
  return (8 * (value(m, x, i, h, g) - value(m, x, i, -h, g)) - (value(m, x, i, 2 * h, g) - value(m, x, i, -2 * h, g))) / (12 * h);
}

/* A row, a gradient, its map; false if a score is so near to a corner of the map that differences say nothing. */
static bool draw(map_args m, int seed, double *x, double *g, double *p) {
  float noise[2 * N];
  emxi_normals((uint64_t)seed, 51, noise, 2 * N);
  for (int i = 0; i < N; i++) x[i] = noise[i] * (seed % 4 + 1) * .5, g[i] = noise[N + i];
  if (seed % 5 == 0) x[3] = -INFINITY;
  if (seed % 7 == 0) x[1] = x[2];
  double tau;
  OK(map_forward(ctx, m, x, p, EMX_F64, N, &tau, NULL));
  for (int i = 0; i < N; i++) {
    const double y = (m.kind == EMX_MAP_NORMMAX ? 1 : m.alpha - 1) * x[i] - tau;
    /* alpha > 2: y^(1/(alpha-1)) has a fifth derivative of 1e9 at y = 0.03; h^4 = 1e-16 then leaves 1e-7 / 30 */
    const double near = m.alpha > 2 ? .03 : 2e-3 * (m.kind == EMX_MAP_NORMMAX ? 1 : m.alpha - 1); /* 2e-3 of a score */
    if (m.alpha > 1 && (fabs(y) < near || (m.kind == EMX_MAP_BUDGET && fabs(y - 1) < near))) return false;
  }
  return true;
}

static void test_finite_differences(void **state) {
  (void)state;
  EACH_ALPHA(a)
  for (int kind = 0; kind <= EMX_MAP_BUDGET; kind++) {
    if (a == 1 ? kind != EMX_MAP_ENTMAX : a > 4 && kind != EMX_MAP_NORMMAX) continue;
    int checked = 0;
    for (int seed = 0; seed < 60 && checked < 20; seed++) {
      const map_args m = {kind, a, .5 + seed % 6};
      double x[N], g[N], p[N], dx[N], total = 0, size = 1;
      if (!draw(m, seed, x, g, p)) continue;
      OK(map_backward(ctx, m, p, g, dx, EMX_F64, N, NULL));
      for (int i = 0; i < N; i++) size = fmax(size, fabs(dx[i]));
      for (int i = 0; i < N; i++) {
        if (isinf(x[i])) {
          assert_true(dx[i] == 0);
          continue;
        }
        /* rounding: the threshold is known to 1e-16, a weight to b times that */
        const double h = 1e-4, slope = difference(m, x, i, h, g), slack = 5e-8 * size + (a > 1 ? 1e-15 / (a - 1) / h : 0);
        if (fabs(slope - dx[i]) > slack)
          fail_msg("kind %d alpha %g seed %d: gradient %d is %.9g, differences %.9g", kind, a, seed, i, dx[i], slope);
        total += dx[i];
      }
      assert_true(fabs(total) < 1e-12 * size); /* shifts do nothing: the gradient sums to zero */
      checked++;
    }
    if (checked < 10) fail_msg("kind %d alpha %g: only %d rows", kind, a, checked);
  }
}

static void test_alpha_gradient(void **state) {
  (void)state;
  static const double smooth[] = {1, 1.0005, 1.001, 1.01, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.9};
  for (size_t t = 0; t < sizeof smooth / sizeof *smooth; t++) {
    const map_args m = {EMX_MAP_ENTMAX, smooth[t], 1};
    int checked = 0;
    for (int seed = 0; seed < 80 && checked < 20; seed++) {
      double x[N], g[N], p[N], dx[N], d;
      if (!draw(m, seed, x, g, p)) continue;
      OK(map_backward(ctx, m, p, g, dx, EMX_F64, N, &d));
      double slope, slack;
      if (m.alpha == 1) { /* one side only: third order, h = 1e-3 leaves h^2 f''' / 3 */
        const double h = 1e-3, f0 = value(m, x, -1, 0, g), f1 = value(m, x, -1, h, g), f2 = value(m, x, -1, 2 * h, g);
        slope = (4 * f1 - 3 * f0 - f2) / (2 * h);
        slack = 2e-4 * fmax(1, fabs(d)); /* f''' reaches a few hundred: powers of ln p */
      } else {
        const double h = fmin(1e-4, (m.alpha - 1) / 10); /* alpha moves every y by h x */
        slope = difference(m, x, -1, h, g);
        slack = 1e-7 * fmax(1, fabs(d)) + 1e-15 / (m.alpha - 1) / h;
      }
      if (fabs(slope - d) > slack) fail_msg("alpha %g seed %d: d_alpha %.9g, differences %.9g", m.alpha, seed, d, slope);
      checked++;
    }
    if (checked < 8) fail_msg("alpha %g: only %d rows", m.alpha, checked);
  }
  /* The textbook form (Correia et al. 2019, prop. 1), where it does not cancel. */
  for (int seed = 0; seed < 10; seed++) {
    const map_args m = {EMX_MAP_ENTMAX, 1.5 + .25 * (seed % 4), 1};
    double x[N], g[N], p[N], dx[N], d;
    draw(m, seed, x, g, p);
    OK(map_backward(ctx, m, p, g, dx, EMX_F64, N, &d));
    const double a = m.alpha - 1;
    double su = 0, e = 0, want = 0;
    for (int i = 0; i < N; i++)
      if (p[i] > 0) su += pow(p[i], 1 - a), e += p[i] * log(p[i]);
    for (int i = 0; i < N; i++)
      if (p[i] > 0) {
        const double q = pow(p[i], 1 - a) / su;
        want += g[i] * ((p[i] - q) / (a * a) - (p[i] * log(p[i]) - q * e) / a);
      }
    if (fabs(want - d) > 1e-13 * fmax(1, fabs(d))) fail_msg("alpha %g: %.17g, textbook %.17g", m.alpha, d, want);
  }
  /* The limit at alpha = 1 and its approach: d(1 + e) - d(1) = O(e), with no cancellation left at e = 1e-6. */
  const map_args at1 = {EMX_MAP_ENTMAX, 1, 1};
  double x[N], g[N], p[N], dx[N], d1, want = 0, l2 = 0;
  draw(at1, 3, x, g, p);
  OK(map_backward(ctx, at1, p, g, dx, EMX_F64, N, &d1));
  for (int i = 0; i < N; i++) l2 += p[i] * log(p[i]) * log(p[i]);
  for (int i = 0; i < N; i++) want += g[i] * p[i] * (l2 - log(p[i]) * log(p[i])) / 2;
  assert_true(fabs(d1 - want) < 1e-14);
  for (double e = 1e-3; e > 5e-7; e /= 10) {
    double d;
    const map_args near = {EMX_MAP_ENTMAX, 1 + e, 1};
    OK(map_backward(ctx, near, p, g, dx, EMX_F64, N, &d)); /* of the same p: smooth in alpha */
    assert_true(fabs(d - d1) < 10 * e);
  }
}

/* alpha > 2: u = p^(2-alpha) grows without bound, the gradient has a limit as long as it happens once in a row. */
static void test_tiny_weights(void **state) {
  (void)state;
  static const double tiny[] = {1e-3, 1e-5, 1e-9, 1e-20, 1e-38};
  static const double big[] = {2.25, 2.5, 3, 4};
  for (size_t b = 0; b < 4; b++)
    for (size_t t = 0; t < 5; t++) {
      const map_args m = {EMX_MAP_ENTMAX, big[b], 1};
      double p[4] = {.5, .3, .2 - tiny[t], tiny[t]}, g[4] = {1, -2, .5, 3}, dx[4], d;
      OK(map_backward(ctx, m, p, g, dx, EMX_F64, 4, &d));
      /* dx_i = sum_j u_i u_j (g_i - g_j) / sum u, in terms of 1 / u_3: exact for a tiny p_3, no large number anywhere */
      long double u[4], all = 1, want[4] = {0}, least = emxi_weight_floor(m.alpha);
      for (int i = 0; i < 4; i++) u[i] = powl(p[i], 2 - m.alpha);
      const long double r = powl(fmaxl(p[3], least), m.alpha - 2); /* 1 / u_3 */
      for (int i = 0; i < 3; i++) all += u[i] * r;                 /* sum u / u_3 */
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
          want[i] += (i == 3 ? 1 : u[i]) * (j == 3 ? 1 : u[j]) * (i != 3 && j != 3 ? r : 1) * (g[i] - g[j]) / all;
      for (int i = 0; i < 4; i++)
        if (!(fabsl(dx[i] - want[i]) <= 1e-12L * (1 + fabsl(want[i]))))
          fail_msg("alpha %g p %g: gradient %d is %.17g, want %.17Lg", m.alpha, tiny[t], i, dx[i], want[i]);
      assert_true(isfinite(d));
      /* Two of them: the true gradient between them grows as u; it is cut off at the floor's u and stays a float. */
      double p2[4] = {.5, .5, tiny[t], tiny[t] / 2};
      float pf[4], gf[4], df[4];
      for (int i = 0; i < 4; i++) pf[i] = (float)p2[i], gf[i] = (float)g[i];
      for (int kind = 0; kind <= EMX_MAP_BUDGET; kind++) {
        const map_args k = {kind, big[b], 1};
        OK(map_backward(ctx, k, p2, g, dx, EMX_F64, 4, NULL));
        OK(map_backward(ctx, k, pf, gf, df, EMX_F32, 4, NULL));
        for (int i = 0; i < 4; i++) assert_true(isfinite(dx[i]) && isfinite(df[i]));
      }
    }
}

static void test_special_rows(void **state) {
  (void)state;
  EACH_ALPHA(a)
  for (int kind = 0; kind <= EMX_MAP_BUDGET; kind++) {
    if (a == 1 ? kind != EMX_MAP_ENTMAX : a > 4 && kind != EMX_MAP_NORMMAX) continue;
    const map_args m = {kind, a, 1};
    double d, *da = kind == EMX_MAP_ENTMAX ? &d : NULL;
    double p[5] = {0, .25, 0, .75, 0}, g[5] = {NAN, 1, INFINITY, 2, -INFINITY}, dx[5];
    OK(map_backward(ctx, m, p, g, dx, EMX_F64, 5, da)); /* a gradient where the weight is zero is not read */
    for (int i = 0; i < 5; i++) assert_true(isfinite(dx[i]) && (dx[i] == 0) == (p[i] == 0));
    if (da) assert_true(isfinite(d));
    memset(p, 0, sizeof p); /* a masked row, in place */
    OK(map_backward(ctx, m, p, g, g, EMX_F64, 5, da));
    for (int i = 0; i < 5; i++) assert_true(g[i] == 0);
    if (da) assert_true(d == 0);
    for (int i = 0; i < 5; i++) p[i] = NAN, g[i] = i;
    OK(map_backward(ctx, m, p, g, dx, EMX_F64, 5, da));
    for (int i = 0; i < 5; i++) assert_true(isnan(dx[i]));
    if (da) assert_true(isnan(d));
    double one[3] = {0, 1, 0}, up[3] = {5, 6, 7}; /* alone in its support: nothing can move */
    OK(map_backward(ctx, m, one, up, dx, EMX_F64, 3, da));
    assert_true(dx[0] == 0 && dx[1] == 0 && dx[2] == 0);
    if (da) assert_true(d == 0);
  }
  /* row 0 of the Jacobian of entmax-1.5 at (.7, -.1, .3, .2, -1) and its map, known values */
  double x[5] = {.7, -.1, .3, .2, -1}, p[5], dp[5] = {1}, dx[5];
  static const double row[5] = {.4420073, -.10523236, -.17740963, -.15936531, 0},
                      map[5] = {.47830253, .08502718, .24166485, .19500544, 0};
  const map_args m = {EMX_MAP_ENTMAX, 1.5, 1};
  OK(map_forward(ctx, m, x, p, EMX_F64, 5, NULL, NULL));
  OK(map_backward(ctx, m, p, dp, dx, EMX_F64, 5, NULL));
  for (int i = 0; i < 5; i++) assert_true(fabs(dx[i] - row[i]) < 1e-7 && fabs(p[i] - map[i]) < 1e-8);
}

/* Every dtype and table against the formulas over the whole row in long double, on the weights as stored; rows with a pitch. */
static void test_dtypes(void **state) {
  (void)state;
  enum { R = 3, L = 333, PITCH = 340 };
  static const int32_t dtypes[] = {EMX_F32, EMX_F64, EMX_F16, EMX_BF16};
  static double x[R * PITCH], p[R * PITCH], g[R * PITCH], dx[R * PITCH], dp[L], q[L], want[L];
  float noise[2 * R * PITCH];
  emxi_normals(8, 8, noise, 2 * R * PITCH);
  EACH_ALPHA(a)
  for (int kind = 0; kind <= EMX_MAP_BUDGET; kind++)
    for (int t = 0; t < 4; t++)
      for (int c = 0; c < n_contexts; c++) {
        if (a == 1 ? kind != EMX_MAP_ENTMAX : a > 4 && kind != EMX_MAP_NORMMAX) continue;
        const map_args m = {kind, a, 4.5};
        const emx_entmax_desc desc = map_desc(m);
        for (int i = 0; i < R * PITCH; i++) {
          emxi_store(x, dtypes[t], i, noise[i]);
          emxi_store(g, dtypes[t], i, noise[R * PITCH + i] + 100); /* a constant does nothing */
        }
        const int64_t shape[2] = {R, L};
        emx_tensor tx = emx_tensor_view(x, dtypes[t], 2, shape), tp = emx_tensor_view(p, dtypes[t], 2, shape),
                   tg = emx_tensor_view(g, dtypes[t], 2, shape), td = emx_tensor_view(dx, dtypes[t], 2, shape);
        tx.stride[0] = tg.stride[0] = tp.stride[0] = td.stride[0] = PITCH;
        emx_entmax_io io;
        emx_entmax_io_init(&io);
        io.x = &tx, io.p = &tp, io.dp = &tg, io.dx = &td;
        OK(emx_entmax_forward(contexts[c], &desc, &io));
        OK(emx_entmax_backward(contexts[c], &desc, &io));
        for (int r = 0; r < R; r++) {
          long double norm = 0;
          double size = 1e-3; /* a row with one weight has no gradient but rounding */
          for (int i = 0; i < L; i++) {
            q[i] = emxi_load(p, dtypes[t], r * PITCH + i);
            norm += powl(q[i], a);
            dp[i] = emxi_load(g, dtypes[t], r * PITCH + i);
          }
          /* the oracle knows no floor */
          const double least = emxi_weight_floor(a) * (kind == EMX_MAP_NORMMAX ? (double)powl(norm, 1 / (long double)a) : 1);
          for (int i = 0; i < L; i++) q[i] = q[i] > 0 ? fmax(q[i], least) : 0;
          if (kind == EMX_MAP_NORMMAX) {
            /* its J drops constants only if p sums to one, which rounded weights do not: drop the same */
            int top = -1;
            for (int i = 0; i < L; i++)
              if (q[i] > 0 && (top < 0 || (a > 2 ? q[i] < q[top] : a < 2 && q[i] > q[top]))) top = i;
            const double base = dp[top];
            for (int i = 0; i < L; i++) dp[i] -= base;
          }
          emxi_oracle_backward(q, dp, L, kind, a, want);
          for (int i = 0; i < L; i++) size = fmax(size, fabs(want[i]));
          /* u is held as float: 6e-8 of the largest term; f16 and bf16 round the result. normmax and the mean over stored weights
           * whose sum is off by their rounding agree, being the same formulas. */
          const double unit = dtypes[t] == EMX_F16    ? 0x1p-11
                              : dtypes[t] == EMX_BF16 ? 0x1p-8
                                                      : 0,
                       slack = (dtypes[t] == EMX_F64 ? 1e-12 : 1e-6) * fmax(1, a / 4), /* u is the power 2 - alpha of a float */
              rounding = kind == EMX_MAP_NORMMAX ? 1e-14 / (a - 1) : 0; /* of g, a few, times the factor in front of J */
          for (int i = 0; i < L; i++) {
            const double got = emxi_load(dx, dtypes[t], r * PITCH + i);
            if (!(fabs(got - want[i]) <= slack * size + rounding + unit * fabs(want[i]) + (dtypes[t] == EMX_F16 ? 0x1p-25 : 0)))
              fail_msg("kind %d alpha %g %s: %d is %.9g, want %.9g of %g", kind, a, emx_dtype_name(dtypes[t]), i, got, want[i],
                       size);
          }
        }
        io.dx = &tg; /* in place */
        OK(emx_entmax_backward(contexts[c], &desc, &io));
        for (int r = 0; r < R; r++)
          assert_memory_equal((char *)g + (size_t)(r * PITCH) * emx_dtype_size(dtypes[t]),
                              (char *)dx + (size_t)(r * PITCH) * emx_dtype_size(dtypes[t]),
                              (size_t)L * emx_dtype_size(dtypes[t]));
      }
}

/* A batch with one alpha a row is its rows one by one, bit for bit; a bad alpha is named and nothing is written. */
static void test_alpha_per_row(void **state) {
  (void)state;
  enum { R = 11, L = 50 };
  float x[R * L], p[R * L], g[R * L], dx[R * L], one[L], d_one[L];
  double tau[R], da[R], t1, da1;
  int32_t support[R], s1;
  emxi_normals(4, 4, x, R * L);
  emxi_normals(5, 5, g, R * L);
  for (int as_float = 0; as_float < 2; as_float++) {
    float af[R];
    double ad[R];
    for (int i = 0; i < R; i++) ad[i] = alphas[i], af[i] = (float)alphas[i];
    const int64_t shape[2] = {R, L};
    emx_tensor tx = emx_tensor_view(x, EMX_F32, 2, shape), tp = emx_tensor_view(p, EMX_F32, 2, shape),
               tg = emx_tensor_view(g, EMX_F32, 2, shape), td = emx_tensor_view(dx, EMX_F32, 2, shape),
               tt = emx_tensor_view(tau, EMX_F64, 1, shape), ts = emx_tensor_view(support, EMX_I32, 1, shape),
               ta = as_float ? emx_tensor_view(af, EMX_F32, 1, shape) : emx_tensor_view(ad, EMX_F64, 1, shape),
               tda = emx_tensor_view(da, EMX_F64, 1, shape);
    emx_entmax_desc desc = map_desc((map_args){EMX_MAP_ENTMAX, 3.5, 1});
    emx_entmax_io io;
    emx_entmax_io_init(&io);
    io.x = &tx, io.p = &tp, io.tau = &tt, io.support = &ts, io.dp = &tg, io.dx = &td, io.alpha = &ta, io.d_alpha = &tda;
    OK(emx_entmax_forward(ctx, &desc, &io));
    OK(emx_entmax_backward(ctx, &desc, &io));
    for (int r = 0; r < R; r++) {
      const map_args m = {EMX_MAP_ENTMAX, as_float ? af[r] : ad[r], 1};
      OK(map_forward(ctx, m, x + r * L, one, EMX_F32, L, &t1, &s1));
      OK(map_backward(ctx, m, one, g + r * L, d_one, EMX_F32, L, &da1));
      assert_memory_equal(one, p + r * L, sizeof one);
      assert_memory_equal(d_one, dx + r * L, sizeof d_one);
      assert_true((t1 == tau[r] || (isnan(t1) && isnan(tau[r]))) && s1 == support[r] && da1 == da[r]);
    }
    static const double bad[] = {.5, 4.5, NAN, INFINITY, 1 + 1e-9, -1};
    for (size_t b = 0; b < 6; b++) {
      float before[R * L];
      memcpy(before, p, sizeof p);
      if (as_float && b == 4) continue; /* is 1 as a float */
      ad[7] = bad[b], af[7] = (float)bad[b];
      assert_int_equal(emx_entmax_forward(ctx, &desc, &io), EMX_ERR_INVALID);
      assert_non_null(strstr(emx_last_error(), "row 7"));
      assert_int_equal(emx_entmax_backward(ctx, &desc, &io), EMX_ERR_INVALID);
      assert_memory_equal(before, p, sizeof p);
    }
    ad[7] = af[7] = 1;
    desc.kind = EMX_MAP_NORMMAX; /* needs alpha > 1, in every row */
    io.d_alpha = NULL;
    ad[0] = af[0] = 2;
    assert_int_equal(emx_entmax_forward(ctx, &desc, &io), EMX_ERR_INVALID);
    assert_non_null(strstr(emx_last_error(), "row 7"));
    ad[7] = af[7] = 2;
    OK(emx_entmax_forward(ctx, &desc, &io));
    io.d_alpha = &tda;
    assert_int_equal(emx_entmax_backward(ctx, &desc, &io), EMX_ERR_UNSUPPORTED);
    desc.kind = EMX_MAP_ENTMAX;
    ta.shape[0] = R - 1;
    assert_int_equal(emx_entmax_forward(ctx, &desc, &io), EMX_ERR_SHAPE);
    ta.shape[0] = R;
    ta.dtype = EMX_I32;
    assert_int_equal(emx_entmax_forward(ctx, &desc, &io), EMX_ERR_DTYPE);
    io.alpha = NULL;
    tda.dtype = EMX_BF16;
    assert_int_equal(emx_entmax_backward(ctx, &desc, &io), EMX_ERR_DTYPE);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_finite_differences), cmocka_unit_test(test_alpha_gradient), cmocka_unit_test(test_tiny_weights),
      cmocka_unit_test(test_special_rows),       cmocka_unit_test(test_dtypes),         cmocka_unit_test(test_alpha_per_row)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
