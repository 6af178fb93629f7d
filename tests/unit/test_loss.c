/* Fenchel-Young losses against their definition in float64, their gradients by finite differences, and what a training loop
 * relies on: ignored rows, reductions, upstream gradients, errors that name the row. */
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
static const double alphas[] = {1, 1.001, 1.01, 1.25, 4. / 3, 1.5, 1.75, 2, 2.5, 3, 4};
enum { N_ALPHAS = sizeof alphas / sizeof *alphas };

/* Known values: loss of (-2, 0, .5) to class 2, and the Tsallis entropy that is in it */
static void test_known_values(void **state) {
  (void)state;
  double x[3] = {-2, 0, .5}, dx[3], loss;
  const map_args m = {EMX_MAP_ENTMAX, 1.5, 1};
  OK(map_loss(ctx, m, x, 2, dx, EMX_F64, 3, &loss));
  assert_true(fabs(loss - .18437138) < 1e-8);
  assert_true(dx[0] == 0 && fabs(dx[1] - .32600736) < 1e-8 && fabs(dx[2] + .32600736) < 1e-8);
  const double entropy = loss - .32600736 * (0 - .5);
  assert_true(fabs(entropy - .34737506) < 1e-8);
  /* cross-entropy and sparsemax loss by hand: ln 2; for (1, 0) to class 1 sparsemax is all in 0: 0 - 0 + 1 - (1 - 1)/2 */
  double y[2] = {0, 0};
  OK(map_loss(ctx, (map_args){EMX_MAP_ENTMAX, 1, 1}, y, 0, dx, EMX_F64, 2, &loss));
  assert_true(fabs(loss - log(2)) < 1e-16 && dx[0] == -.5 && dx[1] == .5);
  y[0] = 1;
  OK(map_loss(ctx, (map_args){EMX_MAP_ENTMAX, 2, 1}, y, 1, dx, EMX_F64, 2, &loss));
  assert_true(loss == 1 && dx[0] == 1 && dx[1] == -1);
  OK(map_loss(ctx, (map_args){EMX_MAP_ENTMAX, 2, 1}, y, 0, dx, EMX_F64, 2, &loss));
  assert_true(loss == 0 && dx[0] == 0 && dx[1] == 0);
}

/* Every alpha, dtype and table; large and small scores, ties, masks; targets inside and outside the support. */
static void test_against_definition(void **state) {
  (void)state;
  enum { V = 400 };
  static const int32_t dtypes[] = {EMX_F32, EMX_F64, EMX_F16, EMX_BF16};
  static double x[V], dx[V], s[V], p[V];
  float noise[V];
  for (int k = 0; k < 2 * N_ALPHAS; k++)
    for (int seed = 0; seed < 8; seed++)
      for (int t = 0; t < 4; t++)
        for (int c = 0; c < n_contexts; c++) {
          const map_args m = {k < N_ALPHAS ? EMX_MAP_ENTMAX : EMX_MAP_NORMMAX, alphas[k % N_ALPHAS], 1};
          if (m.kind == EMX_MAP_NORMMAX && m.alpha == 1) continue;
          const int n = 1 + seed * 57;
          emxi_normals((uint64_t)seed, 3, noise, n);
          for (int i = 0; i < n; i++) {
            double v = noise[i] * (seed + 1) * .6;
            if (seed % 3 == 1) v = round(v);
            if (seed == 5) v += 1000;
            if (seed == 6 && i % 2) v = -INFINITY;
            emxi_store(x, dtypes[t], i, v);
            s[i] = emxi_load(x, dtypes[t], i);
          }
          for (int32_t y = 0; y < n; y += 1 + n / 5) {
            double loss;
            if (s[y] == -INFINITY) continue;
            const double want = emxi_oracle_loss(s, n, m.kind, m.alpha, y, p);
            OK(map_loss(contexts[c], m, x, y, dx, dtypes[t], n, &loss));
            /* float: exponentials of softmax are good to 1e-6, everything else is in double; near alpha = 1 what a threshold
             * known to 1e-16 leaves after two divisions by alpha - 1. alpha > 2: the oracle's threshold moves p by 1e-5, H by its
             * square root's share of that */
            const double slack = (dtypes[t] == EMX_F64 ? 1e-12 : 1e-6) * (1 + want) + (m.alpha > 1 ? 2e-15 / (m.alpha - 1) : 0) +
                                 (m.alpha > 2 ? 1e-9 : 0);
            if (!(fabs(loss - want) <= slack) || loss < 0)
              fail_msg("kind %d alpha %g %s n %d target %d: %.12g, want %.12g", m.kind, m.alpha, emx_dtype_name(dtypes[t]), n, y,
                       loss, want);
            const double unit = dtypes[t] == EMX_F16 ? 0x1p-11 : dtypes[t] == EMX_BF16 ? 0x1p-8 : 0;
            for (int i = 0; i < n; i++) {
              const double g = emxi_load(dx, dtypes[t], i), w = p[i] - (i == y);
              if (!(fabs(g - w) <= 1e-6 + (m.alpha > 2 ? 3e-5 : 0) + unit * fabs(w)))
                fail_msg("kind %d alpha %g: gradient %d is %g, want %g", m.kind, m.alpha, i, g, w);
            }
          }
        }
}

static void test_gradient(void **state) {
  (void)state;
  enum { V = 9 };
  for (int k = 0; k < 2 * N_ALPHAS; k++)
    for (int seed = 0; seed < 10; seed++) {
      const map_args m = {k < N_ALPHAS ? EMX_MAP_ENTMAX : EMX_MAP_NORMMAX, alphas[k % N_ALPHAS], 1};
      if (m.kind == EMX_MAP_NORMMAX && m.alpha == 1) continue;
      float noise[V];
      double x[V], dx[V], up, down, loss;
      emxi_normals((uint64_t)seed, 5, noise, V);
      for (int i = 0; i < V; i++) x[i] = noise[i];
      const int32_t y = seed % V;
      OK(map_loss(ctx, m, x, y, dx, EMX_F64, V, &loss));
      for (int i = 0; i < V; i++) {
        /* the loss is once differentiable, its slope has a bounded slope for alpha <= 2: h of error; symmetric differences do
         * better */
        const double h = 1e-6, x0 = x[i];
        x[i] = x0 + h;
        OK(map_loss(ctx, m, x, y, NULL, EMX_F64, V, &up));
        x[i] = x0 - h;
        OK(map_loss(ctx, m, x, y, NULL, EMX_F64, V, &down));
        x[i] = x0;
        const double slope = (up - down) / (2 * h), slack = 1e-6 + (m.alpha > 1 ? 2e-15 / (m.alpha - 1) / h : 0) +
                                                            (m.alpha > 2 ? pow(3 * h, 1 / (m.alpha - 1)) : 0);
        if (fabs(slope - dx[i]) > slack)
          fail_msg("kind %d alpha %g seed %d: gradient %d is %.9g, differences %.9g", m.kind, m.alpha, seed, i, dx[i], slope);
      }
    }
}

typedef struct batch {
  emx_loss_io io;
  emx_tensor x, target, loss, total, support, d_loss, dx;
} batch;
enum { R = 6, V = 70 };
static float bx[R * V], bdx[R * V], bloss[R], bd_loss[R];
static int32_t btarget[R], bsupport[R];
static double btotal;
static void make(batch *b) {
  static const int64_t shape[2] = {R, V}, one[1] = {1};
  emxi_normals(6, 6, bx, R * V);
  for (int i = 0; i < R; i++) btarget[i] = i * 11 % V, bd_loss[i] = (float)i - 2.5f;
  btarget[2] = btarget[5] = -100;
  for (int i = 0; i < V; i++) bx[2 * V + i] = NAN; /* an ignored row may hold anything */
  emx_loss_io_init(&b->io);
  b->x = emx_tensor_view(bx, EMX_F32, 2, shape), b->dx = emx_tensor_view(bdx, EMX_F32, 2, shape);
  b->target = emx_tensor_view(btarget, EMX_I32, 1, shape), b->loss = emx_tensor_view(bloss, EMX_F32, 1, shape);
  b->support = emx_tensor_view(bsupport, EMX_I32, 1, shape), b->d_loss = emx_tensor_view(bd_loss, EMX_F32, 1, shape);
  b->total = emx_tensor_view(&btotal, EMX_F64, 1, one);
  b->io.x = &b->x, b->io.target = &b->target, b->io.loss = &b->loss, b->io.support = &b->support, b->io.dx = &b->dx;
}

static void test_batches(void **state) {
  (void)state;
  for (int k = 0; k < N_ALPHAS; k++) {
    batch b;
    make(&b);
    const map_args m = {EMX_MAP_ENTMAX, alphas[k], 1};
    const emx_entmax_desc desc = map_desc(m);
    double single[R], sum = 0;
    float grads[R * V], upstream[R * V];
    OK(emx_entmax_loss(ctx, &desc, &b.io));
    memcpy(grads, bdx, sizeof grads);
    for (int r = 0; r < R; r++) {
      const bool ignored = r == 2 || r == 5;
      single[r] = 0;
      if (!ignored) OK(map_loss(ctx, m, bx + r * V, btarget[r], bdx, EMX_F32, V, &single[r]));
      assert_true(bloss[r] == (float)single[r] && (bsupport[r] > 0) == !ignored);
      sum += bloss[r];
      for (int i = 0; i < V; i++) assert_true(ignored ? grads[r * V + i] == 0 : grads[r * V + i] == bdx[i]);
    }
    b.io.d_loss = &b.d_loss; /* one upstream gradient a row */
    OK(emx_entmax_loss(ctx, &desc, &b.io));
    memcpy(upstream, bdx, sizeof upstream);
    for (int i = 0; i < R * V; i++)
      assert_true(fabsf(upstream[i] - bd_loss[i / V] * grads[i]) <= 4e-7f); /* two roundings of up to 2.5 */
    static const int64_t one[1] = {1};
    double up = 3;
    b.d_loss = emx_tensor_view(&up, EMX_F64, 1, one); /* of the sum, of the mean over the four rows that count */
    b.io.total = &b.total;
    b.io.reduction = EMX_REDUCE_SUM;
    OK(emx_entmax_loss(ctx, &desc, &b.io));
    assert_true(fabs(btotal - sum) < 1e-12 * (1 + sum));
    for (int i = 0; i < R * V; i++) assert_true(fabsf(bdx[i] - 3 * grads[i]) <= 5e-7f);
    b.io.reduction = EMX_REDUCE_MEAN;
    OK(emx_entmax_loss(ctx, &desc, &b.io));
    assert_true(fabs(btotal - sum / 4) < 1e-12 * (1 + sum));
    for (int i = 0; i < R * V; i++) assert_true(fabsf(bdx[i] - .75f * grads[i]) <= 2e-7f);
    memcpy(grads, bdx, sizeof grads);
    b.io.dx = &b.x; /* in place */
    OK(emx_entmax_loss(ctx, &desc, &b.io));
    assert_memory_equal(grads, bx, sizeof grads);
    make(&b);
    for (int r = 0; r < R; r++) btarget[r] = 7;
    b.io.ignore_index = 7; /* a class may be the one that is ignored */
    b.io.total = &b.total;
    b.io.reduction = EMX_REDUCE_MEAN;
    OK(emx_entmax_loss(ctx, &desc, &b.io));
    assert_true(isnan(btotal));
    for (int i = 0; i < R * V; i++) assert_true(bdx[i] == 0);
    b.io.reduction = EMX_REDUCE_SUM;
    OK(emx_entmax_loss(ctx, &desc, &b.io));
    assert_true(btotal == 0);
  }
}

static void test_special_rows(void **state) {
  (void)state;
  for (int k = 0; k < N_ALPHAS; k++)
    for (int t = 0; t < 2; t++)
      for (int c = 0; c < n_contexts; c++) {
        const map_args m = {EMX_MAP_ENTMAX, alphas[k], 1};
        const int32_t dtype = t ? EMX_BF16 : EMX_F32;
        double store[40], grad[40], loss;
        for (int i = 0; i < 40; i++) emxi_store(store, dtype, i, i % 4 ? -INFINITY : 1);
        OK(map_loss(contexts[c], m, store, 8, grad, dtype, 40, &loss)); /* ten equal scores */
        const double a = m.alpha, want = a == 1 ? log(10) : (1 - pow(10, 1 - a)) / (a * (a - 1));
        assert_true(fabs(loss - want) < 1e-6 && emxi_load(grad, dtype, 9) == 0 && fabs(emxi_load(grad, dtype, 8) + .9) < 2e-3);
        OK(map_loss(contexts[c], m, store, 9, grad, dtype, 40, &loss)); /* an impossible target */
        assert_true(loss == INFINITY && emxi_load(grad, dtype, 9) == -1 && fabs(emxi_load(grad, dtype, 8) - .1) < 1e-3);
        for (int i = 0; i < 40; i++) emxi_store(store, dtype, i, -INFINITY);
        OK(map_loss(contexts[c], m, store, 9, grad, dtype, 40, &loss));
        assert_true(loss == INFINITY);
        for (int i = 0; i < 40; i++) assert_true(emxi_load(grad, dtype, i) == 0);
        for (int bad = 0; bad < 2; bad++) {
          emxi_store(store, dtype, 13, bad ? NAN : INFINITY);
          emxi_store(store, dtype, 14, 1);
          OK(map_loss(contexts[c], m, store, 14, grad, dtype, 40, &loss));
          assert_true(isnan(loss));
          for (int i = 0; i < 40; i++) assert_true(isnan(emxi_load(grad, dtype, i)));
        }
        if (a < 1.2) continue; /* a margin of 1/(alpha-1): nothing left to learn, exactly */
        for (int i = 0; i < 40; i++) emxi_store(store, dtype, i, i == 30 ? 6 : 1);
        OK(map_loss(contexts[c], m, store, 30, grad, dtype, 40, &loss));
        assert_true(loss == 0);
        for (int i = 0; i < 40; i++) assert_true(emxi_load(grad, dtype, i) == 0);
      }
  /* A large vocabulary, flat: the loss is the entropy of 1/V each. */
  enum { LARGE = 150000 };
  float *x = calloc(LARGE, sizeof *x), *dx = malloc(LARGE * sizeof *dx);
  for (int k = 0; k < N_ALPHAS; k++) {
    const double a = alphas[k], want = a == 1 ? log(LARGE) : -expm1((1 - a) * log(LARGE)) / (a * (a - 1));
    double loss;
    OK(map_loss(contexts[n_contexts - 1], (map_args){EMX_MAP_ENTMAX, a, 1}, x, LARGE - 1, dx, EMX_F32, LARGE, &loss));
    if (fabs(loss - want) > 1e-6 * want) fail_msg("alpha %g: %.12g, want %.12g", a, loss, want);
    assert_true(fabs(dx[0] * (double)LARGE - 1) < 1e-6 && fabs(dx[LARGE - 1] + 1) < 1e-5);
  }
  free(x), free(dx);
}

static void test_refusals(void **state) {
  (void)state;
  batch b;
  make(&b);
  memset(bdx, 42, sizeof bdx);
  memset(bloss, 42, sizeof bloss);
  float before[R * V], before_loss[R];
  memcpy(before, bdx, sizeof before);
  memcpy(before_loss, bloss, sizeof before_loss);
  emx_entmax_desc desc = map_desc((map_args){EMX_MAP_ENTMAX, 1.5, 1});
#define REFUSED(status, word, change)                                                     \
  do {                                                                                    \
    make(&b);                                                                             \
    change;                                                                               \
    assert_int_equal(emx_entmax_loss(ctx, &desc, &b.io), status);                         \
    if (!strstr(emx_last_error(), word)) fail_msg("%s: no '%s'", emx_last_error(), word); \
    assert_memory_equal(before, bdx, sizeof before);                                      \
    assert_memory_equal(before_loss, bloss, sizeof before_loss);                          \
  } while (0)
  REFUSED(EMX_ERR_INVALID, "row 4 is 70", btarget[4] = V);
  REFUSED(EMX_ERR_INVALID, "row 0 is -1", btarget[0] = -1);
  REFUSED(EMX_ERR_INVALID, "row 2 is -100", b.io.ignore_index = -1);
  REFUSED(EMX_ERR_INVALID, "x", b.io.x = NULL);
  REFUSED(EMX_ERR_INVALID, "target", b.io.target = NULL);
  REFUSED(EMX_ERR_INVALID, "loss", b.io.loss = NULL);
  REFUSED(EMX_ERR_DTYPE, "target", b.target.dtype = EMX_F32);
  REFUSED(EMX_ERR_SHAPE, "target", b.target.shape[0] = R - 1);
  REFUSED(EMX_ERR_SHAPE, "loss", b.loss.shape[0] = R + 1);
  REFUSED(EMX_ERR_DTYPE, "loss", b.loss.dtype = EMX_BF16);
  REFUSED(EMX_ERR_DTYPE, "dx", b.dx.dtype = EMX_I32);
  REFUSED(EMX_ERR_SHAPE, "dx", b.dx.shape[1] = V - 1);
  REFUSED(EMX_ERR_DTYPE, "support", b.support.dtype = EMX_F32);
  REFUSED(EMX_ERR_INVALID, "total", b.io.total = &b.total);
  REFUSED(EMX_ERR_INVALID, "reduction", b.io.reduction = 9);
  REFUSED(EMX_ERR_SHAPE, "d_loss", (b.io.d_loss = &b.d_loss, b.io.reduction = EMX_REDUCE_SUM));
  REFUSED(EMX_ERR_SHAPE, "total", (b.total.shape[0] = R, b.io.total = &b.total, b.io.reduction = EMX_REDUCE_SUM));
  REFUSED(EMX_ERR_INVALID, "emx_loss_io", b.io.struct_size = 8);
  REFUSED(EMX_ERR_UNSUPPORTED, "budget", desc.kind = EMX_MAP_BUDGET);
  desc.kind = EMX_MAP_ENTMAX;
  REFUSED(EMX_ERR_INVALID, "alpha", desc.alpha = .5);
  desc.alpha = 1.5;
  make(&b);
  assert_int_equal(emx_entmax_loss(ctx, NULL, &b.io), EMX_ERR_INVALID);
  assert_int_equal(emx_entmax_loss(ctx, &desc, NULL), EMX_ERR_INVALID);
  assert_int_equal(emx_entmax_loss(NULL, &desc, &b.io), EMX_ERR_INVALID);
  /* no rows, and no classes for rows that are all ignored */
  b.x.shape[0] = b.target.shape[0] = b.loss.shape[0] = b.support.shape[0] = b.dx.shape[0] = 0;
  OK(emx_entmax_loss(ctx, &desc, &b.io));
  make(&b);
  b.x.shape[1] = b.dx.shape[1] = 0;
  assert_int_equal(emx_entmax_loss(ctx, &desc, &b.io), EMX_ERR_INVALID);
  for (int i = 0; i < R; i++) btarget[i] = -100;
  OK(emx_entmax_loss(ctx, &desc, &b.io));
  for (int i = 0; i < R; i++) assert_true(bloss[i] == 0);
}

/* The same bits for any number of threads; without memory for a row an error, and then work as before. */
static void test_threads_and_memory(void **state) {
  (void)state;
  enum { ROWS = 50, N = 300 };
  static float x[ROWS * N], dx[2][ROWS * N];
  static int32_t target[ROWS];
  double loss[2][ROWS], total[2];
  emxi_normals(12, 1, x, ROWS * N);
  for (int i = 0; i < ROWS; i++) target[i] = i % 9 ? i : -100;
  emx_entmax_desc desc = map_desc((map_args){EMX_MAP_ENTMAX, 1.4, 1});
  for (int t = 0; t < 2; t++) {
    static const int64_t shape[2] = {ROWS, N}, one[1] = {1};
    emx_ctx_opts opts;
    emx_ctx_opts_init(&opts);
    opts.threads = t ? 4 : 1;
    emx_ctx *own;
    OK(emx_ctx_create(&opts, &own));
    emx_tensor tx = emx_tensor_view(x, EMX_F32, 2, shape), ty = emx_tensor_view(target, EMX_I32, 1, shape),
               tl = emx_tensor_view(loss[t], EMX_F64, 1, shape), td = emx_tensor_view(dx[t], EMX_F32, 2, shape),
               tt = emx_tensor_view(&total[t], EMX_F64, 1, one);
    emx_loss_io io;
    emx_loss_io_init(&io);
    io.x = &tx, io.target = &ty, io.loss = &tl, io.dx = &td, io.total = &tt, io.reduction = EMX_REDUCE_MEAN;
    emxi_alloc_fail_after(0);
    assert_int_equal(emx_entmax_loss(own, &desc, &io), EMX_ERR_NOMEM);
    emxi_alloc_fail_after(-1);
    OK(emx_entmax_loss(own, &desc, &io));
    emx_ctx_destroy(own);
    OK(emx_ctx_create(&opts, &own));
    emx_entmax_io back;
    emx_entmax_io_init(&back);
    back.p = &tx, back.dp = &td, back.dx = &td;
    emxi_alloc_fail_after(0);
    assert_int_equal(emx_entmax_backward(own, &desc, &back), EMX_ERR_NOMEM);
    emxi_alloc_fail_after(-1);
    emx_ctx_destroy(own);
  }
  assert_true(total[0] == total[1]);
  assert_memory_equal(loss[0], loss[1], sizeof loss[0]);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_known_values),      cmocka_unit_test(test_against_definition),
                                     cmocka_unit_test(test_gradient),          cmocka_unit_test(test_batches),
                                     cmocka_unit_test(test_special_rows),      cmocka_unit_test(test_refusals),
                                     cmocka_unit_test(test_threads_and_memory)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
