/* Rows of the mapping, their gradients and losses on a GPU: against the float64 oracle, against the CPU, and what only a GPU has: graphs,
 * streams, rows over many blocks, faults that come later. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "gpu_case.h"
#include "base/num.h"
#include "entmax/entmax.h"
#include "map_call.h"

#include <stdlib.h>
#include <string.h>

/* ---- one call on both devices */

/* A tensor in host memory with room between its rows, and its copy in device memory. */
typedef struct pair {
  emx_tensor host, gpu;
  size_t bytes;
} pair;
static pair make_pair(int32_t dtype, int64_t rows, int64_t n, int64_t pitch, int offset) {
  pair p = {.host = emx_tensor_view(NULL, dtype, 2, (int64_t[]){rows, n}), .bytes = 0};
  const size_t es = emx_dtype_size(dtype);
  p.bytes = (size_t)(rows * pitch + offset + 64) * es;
  p.host.stride[0] = pitch;
  p.gpu = p.host;
  p.gpu.device = EMX_DEVICE_CUDA;
  char *h = malloc(p.bytes);
  memset(h, 0x5a, p.bytes);
  p.host.data = h + (size_t)offset * es;
  p.gpu.data = (char *)gpu_take(h, p.bytes) + (size_t)offset * es;
  return p;
}
/* `offset` elements before the first row: alignment is what the caller makes of it. */
static void drop_pair(pair *p, int offset) {
  const size_t off = (size_t)offset * emx_dtype_size(p->host.dtype);
  gpu_free((char *)p->gpu.data - off);
  free((char *)p->host.data - off);
}
static void send(pair *p) {
  gpu->backend->memory_copy(gpu, p->gpu.data, p->host.data, p->bytes - 64 * emx_dtype_size(p->host.dtype));
}
static double at(const emx_tensor *t, int64_t r, int64_t i) { return emxi_load(t->data, t->dtype, r * t->stride[0] + i); }
/* What the GPU has, in a buffer that looks like the host's. */
static emx_tensor fetch(const pair *p) {
  emx_tensor t = p->host;
  t.data = malloc(p->bytes);
  gpu_fetch(t.data, p->gpu.data, p->bytes - 64 * emx_dtype_size(p->host.dtype));
  return t;
}
typedef struct column { /* one number a row, f64 or i32 */
  void *gpu;
  emx_tensor t;
} column;
static column make_column(int32_t dtype, int64_t rows, const void *from) {
  column c = {.gpu = gpu_take(from, (size_t)rows * emx_dtype_size(dtype))};
  c.t = emx_tensor_view(c.gpu, dtype, 1, &rows);
  c.t.device = EMX_DEVICE_CUDA;
  return c;
}

/* ---- data */

enum { KINDS = 12 };
static const char *const names[KINDS] = {"normal", "wide", "ties",  "equal",   "masked", "flat",
                                         "+1e4",   "-1e4", "spike", "nothing", "nan",    "inf"};
static void fill_row(emx_tensor *x, int64_t r, int what, uint64_t seed) {
  const int64_t n = x->shape[1];
  float *noise = malloc(sizeof(float) * (size_t)(n + 4));
  emxi_normals(seed, (uint64_t)r, noise, n);
  for (int64_t i = 0; i < n; i++) {
    double v = noise[i];
    switch (what) {
      case 1: v *= 6; break;
      case 2: v = round(2 * v) / 2; break;
      case 3: v = 1.25; break;
      case 4: v = i % 3 == 1 ? v : -INFINITY; break;
      case 5: v *= .02; break;
      case 6: v += 1e4; break;
      case 7: v -= 1e4; break;
      case 8: v += i == n / 2 ? 1000 : 0; break;
      case 9: v = -INFINITY; break;
      case 10: v = i == n - 1 ? NAN : v; break;
      case 11: v = i == n / 3 ? INFINITY : v; break;
    }
    emxi_store(x->data, x->dtype, r * x->stride[0] + i, v);
  }
  free(noise);
}
static double unit_of(int32_t dtype) {
  return dtype == EMX_F16 ? 0x1p-11 : dtype == EMX_BF16 ? 0x1p-8 : dtype == EMX_F32 ? 6e-8 : 0;
}

static const double alphas[] = {1, 1.001, 1.25, 4. / 3, 1.5, 1.75, 2, 2.5, 4};
enum { ALPHAS = sizeof alphas / sizeof *alphas };

/* ---- forward */

/* Every kind of row in one call, pitch and offset as given; compared with the oracle (slow: short rows) or with the CPU. */
static void check_forward(map_args m, int32_t dtype, int64_t n, int64_t pitch, int offset, bool oracle) {
  pair x = make_pair(dtype, KINDS, n, pitch, offset), p = make_pair(dtype, KINDS, n, pitch + 1, offset);
  for (int r = 0; r < KINDS; r++) fill_row(&x.host, r, r, (uint64_t)n);
  send(&x);
  column tau = make_column(EMX_F64, KINDS, NULL), support = make_column(EMX_I32, KINDS, NULL);
  const emx_entmax_desc desc = map_desc(m);
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.x = &x.gpu, io.p = &p.gpu, io.tau = &tau.t, io.support = &support.t;
  OK(emx_entmax_forward(gpu, &desc, &io));
  OK(emx_ctx_sync(gpu));
  emx_tensor got = fetch(&p);
  double taus[KINDS], cpu_tau[KINDS], *s = malloc(sizeof(double) * (size_t)n), *w = malloc(sizeof(double) * (size_t)n);
  int32_t supports[KINDS], cpu_support[KINDS];
  gpu_fetch(taus, tau.gpu, sizeof taus);
  gpu_fetch(supports, support.gpu, sizeof supports);
  const int64_t rows = KINDS;
  emx_tensor tt = emx_tensor_view(cpu_tau, EMX_F64, 1, &rows), ts = emx_tensor_view(cpu_support, EMX_I32, 1, &rows);
  io.x = &x.host, io.p = &p.host, io.tau = &tt, io.support = &ts;
  OK(emx_entmax_forward(cpu, &desc, &io));
  const bool norm = m.kind == EMX_MAP_NORMMAX;
  const double a = norm ? 1 : m.alpha - 1, b = 1 / (m.alpha - 1);
  for (int r = 0; r < KINDS; r++) {
    double t = cpu_tau[r], total = m.kind == EMX_MAP_BUDGET ? m.budget : 1, visible = 0, sum = 0;
    const bool judged = oracle && r < 9;
    for (int64_t i = 0; i < n; i++) s[i] = at(&x.host, r, i), visible += s[i] > -INFINITY;
    if (m.kind == EMX_MAP_BUDGET && total > visible) total = visible;
    double slack_sum = 1e-6 * fmax(1, total);
    if (judged && visible > 0)
      t = norm                       ? emxi_oracle_normmax(s, n, m.alpha, w)
          : m.kind == EMX_MAP_BUDGET ? emxi_oracle_budget(s, n, m.alpha, total, w)
                                     : emxi_oracle_entmax(s, n, m.alpha, w, NULL);
    else if (judged)
      memset(w, 0, sizeof *w * (size_t)n);
    for (int64_t i = 0; i < n; i++) {
      const double g = at(&got, r, i), c = judged ? w[i] : at(&p.host, r, i);
      if (r >= 10) {
        if (!isnan(g)) fail_msg("%s alpha %g n %d: %g", names[r], m.alpha, (int)n, g);
        continue;
      }
      /* 1e-6 is the promise; beyond it what the threshold's own rounding, of numbers of the row's size, does to y^b, which has no bound
       * at y = 0 for alpha > 2. 16-bit results are rounded (half a unit; two that were rounded: one), f16 below 2^-14 to a step. */
      double slack = 1e-6 + 2 * unit_of(dtype) * fabs(c) + (dtype == EMX_F16 ? 0x1p-24 : 0);
      if (m.alpha > 1 && r < 9) {
        const double y = fmax(a * s[i] - t, 0), off = 4e-16 * (1 + fabs(a * s[i]) + fabs(t)) + 4e-15;
        slack += pow(y + off, b) - pow(y, b);
        slack_sum += slack - 1e-6;
      }
      if (!(fabs(g - c) <= slack))
        fail_msg("%s kind %d alpha %g %s n %d: weight %d is %.9g, expected %.9g (%s)", names[r], m.kind, m.alpha,
                 emx_dtype_name(dtype), (int)n, (int)i, g, c, judged ? "oracle" : "CPU");
      sum += g;
    }
    if (r < 9 && (dtype == EMX_F32 || dtype == EMX_F64) && cpu_support[r] && !(fabs(sum - total) <= slack_sum))
      fail_msg("%s alpha %g n %d: sum %.9g", names[r], m.alpha, (int)n, sum);
    const bool all_one = m.kind == EMX_MAP_BUDGET && total >= visible; /* many thresholds do */
    const bool same_nan = all_one || (isnan(taus[r]) && isnan(cpu_tau[r])), both = taus[r] == cpu_tau[r];
    /* budgets: until the sum of n terms is right to its rounding */
    const double slack_tau = 1e-12 * fmax(1, fabs(cpu_tau[r])) + (m.kind == EMX_MAP_BUDGET ? 4e-16 * (double)n * total : 0);
    if (!same_nan && !both && !(fabs(taus[r] - cpu_tau[r]) <= slack_tau))
      fail_msg("%s kind %d alpha %g %s n %d: tau %.17g, CPU %.17g", names[r], m.kind, m.alpha, emx_dtype_name(dtype), (int)n,
               taus[r], cpu_tau[r]);
    /* what lies within rounding of the threshold, ties of 16-bit scores among them, may count here and not there */
    int marginal = 0;
    for (int64_t i = 0; i < n && m.alpha > 1; i++) marginal += fabs(a * s[i] - cpu_tau[r]) <= 1e-12 * (1 + fabs(cpu_tau[r]));
    if (abs(supports[r] - cpu_support[r]) > marginal)
      fail_msg("%s kind %d alpha %g n %d: support %d, CPU %d", names[r], m.kind, m.alpha, (int)n, supports[r], cpu_support[r]);
  }
  free(got.data), free(s), free(w);
  gpu_free(tau.gpu), gpu_free(support.gpu);
  drop_pair(&x, offset), drop_pair(&p, offset);
}

static const int32_t dtypes[] = {EMX_F32, EMX_F16, EMX_BF16, EMX_F64};
static void test_short_rows(void **state) {
  (void)state;
  static const int64_t lengths[] = {1, 2, 3, 31, 33, 64, 255, 300, 512, 700, 1024};
  for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
    for (int t = 0; t < 4; t++)
      for (int k = 0; k < ALPHAS; k++) {
        check_forward((map_args){EMX_MAP_ENTMAX, alphas[k], 1}, dtypes[t], lengths[l], lengths[l] + (int64_t)l % 3, (int)l % 2,
                      true);
        if (k > 0 && l % 3 == 0)
          check_forward((map_args){EMX_MAP_NORMMAX, k == 1 ? 50 : alphas[k], 1}, dtypes[t], lengths[l], lengths[l] + 5, 0, true);
        if (k > 1 && (l + (size_t)k) % 3 == 0 && t % 3 == 0) {
          const double budgets[] = {.3, 1, 1.5, (double)lengths[l] / 3, (double)lengths[l] - .5, (double)lengths[l]};
          for (int b = k % 2; b < 6; b += 2)
            if (budgets[b] > 0 && budgets[b] <= (double)lengths[l])
              check_forward((map_args){EMX_MAP_BUDGET, alphas[k], budgets[b]}, dtypes[t], lengths[l], lengths[l], 1, true);
        }
      }
}
/* Over the edges of a block's slice, of a cluster's size and of what fits in shared memory; odd lengths, rows off alignment. */
static void test_long_rows(void **state) {
  (void)state;
  static const int64_t lengths[] = {1025, 4099, 16640, 16641, 33001, 50257, 128256, 262144};
  for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
    for (int t = 0; t < 4; t++)
      for (int k = 0; k < ALPHAS; k++) {
        if (lengths[l] > 20000 && k != 0 && k != 4 && k != 5 && k != 6 && k != 8) continue;
        if (lengths[l] > 20000 && (k + t + (int)l) % 2 && k != 4) continue; /* keeps the test short */
        check_forward((map_args){EMX_MAP_ENTMAX, alphas[k], 1}, dtypes[t], lengths[l], lengths[l] + (int64_t)l % 3, (int)l % 2,
                      lengths[l] < 2000);
        if (k == 6 && l < 6) check_forward((map_args){EMX_MAP_BUDGET, 2, 77.5}, dtypes[t], lengths[l], lengths[l], 0, false);
        if (k == 6 && l < 5) check_forward((map_args){EMX_MAP_NORMMAX, 2, 1}, dtypes[t], lengths[l], lengths[l] + 3, 0, false);
      }
  check_forward((map_args){EMX_MAP_ENTMAX, 1.5, 1}, EMX_F32, 1000003, 1000003, 1, false); /* more than a cluster holds */
  check_forward((map_args){EMX_MAP_ENTMAX, 1, 1}, EMX_F32, 1000003, 1000004, 0, false);
  check_forward((map_args){EMX_MAP_ENTMAX, 2, 1}, EMX_F64, 300001, 300001, 1, false);
}

/* ---- gradients */

static void check_backward(map_args m, int32_t dtype, int64_t n, bool want_alpha) {
  enum { ROWS = 10 };
  const int64_t rows = ROWS, pitch = n + 3;
  pair x = make_pair(dtype, ROWS, n, pitch, 0), p = make_pair(dtype, ROWS, n, pitch, 1), g = make_pair(dtype, ROWS, n, pitch, 1),
       dx = make_pair(dtype, ROWS, n, n, 0);
  double cpu_alpha[ROWS], gpu_alpha[ROWS];
  const emx_tensor ta = emx_tensor_view(cpu_alpha, EMX_F64, 1, &rows);
  column da = make_column(EMX_F64, ROWS, NULL);
  for (int r = 0; r < ROWS; r++) fill_row(&x.host, r, r, (uint64_t)n + 1), fill_row(&g.host, r, 0, (uint64_t)n + 2);
  const emx_entmax_desc desc = map_desc(m);
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.x = &x.host, io.p = &p.host;
  OK(emx_entmax_forward(cpu, &desc, &io));
  for (int64_t i = 0; i < n; i++) /* a dp at a weight of zero is not read */
    for (int r = 0; r < ROWS; r++)
      if (at(&p.host, r, i) == 0 && i % 5 == 0) emxi_store(g.host.data, dtype, r * pitch + i, NAN);
  send(&p), send(&g);
  io.dp = &g.host, io.dx = &dx.host, io.d_alpha = want_alpha ? &ta : NULL;
  OK(emx_entmax_backward(cpu, &desc, &io));
  io.p = &p.gpu, io.dp = &g.gpu, io.dx = &dx.gpu, io.d_alpha = want_alpha ? &da.t : NULL;
  OK(emx_entmax_backward(gpu, &desc, &io));
  OK(emx_ctx_sync(gpu));
  emx_tensor got = fetch(&dx);
  gpu_fetch(gpu_alpha, da.gpu, sizeof gpu_alpha);
  double *w = malloc(sizeof(double) * (size_t)n), *d = malloc(sizeof(double) * (size_t)n),
         *want = malloc(sizeof(double) * (size_t)n);
  for (int r = 0; r < ROWS; r++) {
    double size = 0;
    /* Where no weight is floored and J drops constants by itself, the oracle's formula over the whole row. */
    const bool judged = m.alpha <= 2 && m.kind == EMX_MAP_ENTMAX && n < 2000;
    for (int64_t i = 0; i < n; i++) {
      w[i] = at(&p.host, r, i), d[i] = at(&g.host, r, i);
      want[i] = at(&dx.host, r, i);
    }
    if (judged) emxi_oracle_backward(w, d, n, m.kind, m.alpha, want);
    for (int64_t i = 0; i < n; i++) size = fmax(size, fabs(want[i]));
    for (int64_t i = 0; i < n; i++) {
      const double v = at(&got, r, i);
      /* the CPU holds u and dp less its base as floats: 1e-6 of the largest term, for u a power of a float more */
      const double slack = 1e-6 * fmax(1, m.alpha) * size + 2 * unit_of(dtype) * fabs(want[i]) + (dtype == EMX_F16 ? 0x1p-24 : 0);
      if (v != want[i] && !(fabs(v - want[i]) <= slack)) /* in f16 both may be infinite */
        fail_msg("%s kind %d alpha %g %s n %d: dx %d is %.9g, expected %.9g of %g", names[r], m.kind, m.alpha,
                 emx_dtype_name(dtype), (int)n, (int)i, v, want[i], size);
    }
    if (want_alpha && !(fabs(gpu_alpha[r] - cpu_alpha[r]) <= 2e-6 * (1 + fabs(cpu_alpha[r]))))
      fail_msg("%s alpha %g n %d: d_alpha %.12g, CPU %.12g", names[r], m.alpha, (int)n, gpu_alpha[r], cpu_alpha[r]);
  }
  io.dx = &g.gpu; /* in place: the same bits */
  io.d_alpha = NULL;
  OK(emx_entmax_backward(gpu, &desc, &io));
  emx_tensor again = fetch(&g);
  for (int r = 0; r < ROWS && !want_alpha; r++)
    for (int64_t i = 0; i < n; i++)
      if (at(&again, r, i) != at(&got, r, i)) fail_msg("in place: row %d, %d", r, (int)i);
  free(again.data), free(got.data), free(w), free(d), free(want);
  gpu_free(da.gpu);
  drop_pair(&x, 0), drop_pair(&p, 1), drop_pair(&g, 1), drop_pair(&dx, 0);
}
static void test_gradients(void **state) {
  (void)state;
  static const int64_t lengths[] = {1, 7, 64, 511, 1000, 1500, 20001, 131075};
  for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
    for (int t = 0; t < 4; t++)
      for (int k = 0; k < ALPHAS; k++) {
        if (lengths[l] > 2000 && k != 0 && k != 4 && k != 8) continue;
        const map_args m = {EMX_MAP_ENTMAX, alphas[k], 1}, norm = {EMX_MAP_NORMMAX, alphas[k], 1},
                       budget = {EMX_MAP_BUDGET, 2, 1};
        check_backward(m, dtypes[t], lengths[l], false);
        if (k % 2 == 0 && lengths[l] < 2000) check_backward(m, dtypes[t], lengths[l], true);
        if (k > 2 && l % 2) check_backward(norm, dtypes[t], lengths[l], false);
        if (k == 6) check_backward(budget, dtypes[t], lengths[l], false);
      }
}

/* ---- losses */

static void check_loss(map_args m, int32_t dtype, int64_t n, int32_t reduction, bool in_place) {
  const int64_t rows = KINDS, one = 1, pitch = n + (n % 2 ? 0 : 2);
  pair x = make_pair(dtype, KINDS, n, pitch, 0), dx = make_pair(dtype, KINDS, n, pitch, 0);
  int32_t target[KINDS], cpu_support[KINDS], gpu_support[KINDS];
  double cpu_loss[KINDS], gpu_loss[KINDS], up[KINDS], cpu_total = 0, gpu_total = 0;
  for (int r = 0; r < KINDS; r++) {
    fill_row(&x.host, r, r, (uint64_t)n + 5);
    target[r] = (int32_t)((r * 37 + 1) % n);
    up[r] = 1 + r * .25;
  }
  target[1] = target[10] = -100; /* whatever the scores are */
  send(&x);
  const emx_tensor tt = emx_tensor_view(target, EMX_I32, 1, &rows), tl = emx_tensor_view(cpu_loss, EMX_F64, 1, &rows),
                   ts = emx_tensor_view(cpu_support, EMX_I32, 1, &rows),
                   tu = emx_tensor_view(up, EMX_F64, 1, reduction ? &one : &rows),
                   to = emx_tensor_view(&cpu_total, EMX_F64, 1, &one);
  column gt = make_column(EMX_I32, KINDS, target), gl = make_column(EMX_F64, KINDS, NULL), gs = make_column(EMX_I32, KINDS, NULL),
         gu = make_column(EMX_F64, reduction ? 1 : KINDS, up), go = make_column(EMX_F64, 1, NULL);
  const emx_entmax_desc desc = map_desc(m);
  emx_loss_io io;
  emx_loss_io_init(&io);
  io.reduction = reduction;
  io.x = &x.gpu, io.target = &gt.t, io.loss = &gl.t, io.support = &gs.t, io.d_loss = &gu.t, io.dx = in_place ? &x.gpu : &dx.gpu;
  io.total = reduction ? &go.t : NULL;
  OK(emx_entmax_loss(gpu, &desc, &io));
  OK(emx_ctx_sync(gpu));
  emx_tensor got = fetch(in_place ? &x : &dx);
  gpu_fetch(gpu_loss, gl.gpu, sizeof gpu_loss), gpu_fetch(gpu_support, gs.gpu, sizeof gpu_support);
  gpu_fetch(&gpu_total, go.gpu, sizeof gpu_total);
  io.x = &x.host, io.target = &tt, io.loss = &tl, io.support = &ts, io.d_loss = &tu, io.dx = &dx.host,
  io.total = reduction ? &to : NULL;
  OK(emx_entmax_loss(cpu, &desc, &io));
  double *s = malloc(sizeof(double) * (size_t)n), *w = malloc(sizeof(double) * (size_t)n);
  for (int r = 0; r < KINDS; r++) {
    double want = cpu_loss[r];
    for (int64_t i = 0; i < n; i++) s[i] = at(&x.host, r, i);
    const bool judged = n < 2000 && r < 9 && r != 1 && s[target[r]] > -INFINITY;
    if (judged) want = emxi_oracle_loss(s, n, m.kind, m.alpha, target[r], w);
    /* 1e-6 (1 + loss) is the promise; near alpha = 1 what a threshold known to 1e-16 leaves after two divisions by alpha - 1; for
     * alpha > 2 the oracle's own threshold; a row of size 1e4 has a threshold known to 1e-12 */
    const double slack = 1e-6 * (1 + fabs(want)) + (m.alpha > 1 ? 4e-15 / (m.alpha - 1) : 0) + (m.alpha > 2 ? 1e-9 : 0);
    if (!(gpu_loss[r] == want || (isnan(gpu_loss[r]) && isnan(want)) || fabs(gpu_loss[r] - want) <= slack) || gpu_loss[r] < 0)
      fail_msg("%s kind %d alpha %g %s n %d: loss %.12g, expected %.12g", names[r], m.kind, m.alpha, emx_dtype_name(dtype),
               (int)n, gpu_loss[r], want);
    if (abs(gpu_support[r] - cpu_support[r]) > (m.alpha > 1 && r < 9))
      fail_msg("support %d, CPU %d", gpu_support[r], cpu_support[r]);
    for (int64_t i = 0; i < n; i++) {
      const double g = at(&got, r, i), c = at(&dx.host, r, i);
      const double slack_g =
          4 * (1e-6 + (m.alpha > 2 ? 3e-5 : 0)) + 2 * unit_of(dtype) * fabs(c) + (dtype == EMX_F16 ? 0x1p-24 : 0);
      if (!(fabs(g - c) <= slack_g) && !(isnan(g) && isnan(c)))
        fail_msg("%s kind %d alpha %g %s n %d: dx %d is %.9g, CPU %.9g", names[r], m.kind, m.alpha, emx_dtype_name(dtype), (int)n,
                 (int)i, g, c);
    }
  }
  if (reduction && !(isnan(cpu_total) && isnan(gpu_total)) && !(cpu_total == gpu_total))
    fail_msg("total %g, CPU %g", gpu_total, cpu_total);
  free(s), free(w), free(got.data);
  gpu_free(gt.gpu), gpu_free(gl.gpu), gpu_free(gs.gpu), gpu_free(gu.gpu), gpu_free(go.gpu);
  drop_pair(&x, 0), drop_pair(&dx, 0);
}
static void test_losses(void **state) {
  (void)state;
  static const int64_t lengths[] = {1, 5, 64, 512, 999, 1500, 50257, 128256};
  for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
    for (int t = 0; t < 4; t++)
      for (int k = 0; k < ALPHAS; k++) {
        if (lengths[l] > 2000 && k != 0 && k != 4 && k != 6) continue;
        check_loss((map_args){EMX_MAP_ENTMAX, alphas[k], 1}, dtypes[t], lengths[l], (int32_t)(l + (size_t)k) % 3, k % 2);
        if (k == 4) check_loss((map_args){EMX_MAP_NORMMAX, 2, 1}, dtypes[t], lengths[l], EMX_REDUCE_NONE, false);
      }
}
/* Finite rows only, so that there is a mean to compare. */
static void test_mean(void **state) {
  (void)state;
  enum { R = 3000 };
  static const int64_t lengths[] = {100, 1100};
  for (int l = 0; l < 2; l++) {
    const int64_t n = lengths[l], rows = R, one = 1;
    pair x = make_pair(EMX_F32, R, n, n, 0), dx = make_pair(EMX_F32, R, n, n, 0);
    int32_t target[R];
    float loss[R];
    double total, want = 0, got_total;
    int counted = 0;
    for (int r = 0; r < R; r++) {
      fill_row(&x.host, r, r % 3, 77);
      target[r] = r % 7 == 3 ? -1 : r % (int)n;
      counted += target[r] >= 0;
    }
    send(&x);
    column gt = make_column(EMX_I32, R, target), gl = make_column(EMX_F32, R, NULL), go = make_column(EMX_F64, 1, NULL);
    const emx_entmax_desc desc = map_desc((map_args){EMX_MAP_ENTMAX, 1.5, 1});
    emx_loss_io io;
    emx_loss_io_init(&io);
    io.reduction = EMX_REDUCE_MEAN, io.ignore_index = -1;
    io.x = &x.gpu, io.target = &gt.t, io.loss = &gl.t, io.dx = &dx.gpu, io.total = &go.t;
    OK(emx_entmax_loss(gpu, &desc, &io));
    emx_tensor got = fetch(&dx);
    gpu_fetch(loss, gl.gpu, sizeof loss), gpu_fetch(&got_total, go.gpu, 8);
    for (int r = 0; r < R; r++) want += target[r] >= 0 ? loss[r] : 0;
    if (!(fabs(got_total - want / counted) <= 1e-12 * fabs(got_total))) fail_msg("mean %.15g, %.15g", got_total, want / counted);
    const emx_tensor tt = emx_tensor_view(target, EMX_I32, 1, &rows), tl = emx_tensor_view(loss, EMX_F32, 1, &rows),
                     to = emx_tensor_view(&total, EMX_F64, 1, &one);
    io.x = &x.host, io.target = &tt, io.loss = &tl, io.dx = &dx.host, io.total = &to;
    OK(emx_entmax_loss(cpu, &desc, &io));
    for (int r = 0; r < R; r++)
      for (int64_t i = 0; i < n; i++)
        if (!(fabs(at(&got, r, i) - at(&dx.host, r, i)) <= 2e-7 / counted)) fail_msg("row %d: %g", r, at(&got, r, i));
    free(got.data);
    gpu_free(gt.gpu), gpu_free(gl.gpu), gpu_free(go.gpu);
    drop_pair(&x, 0), drop_pair(&dx, 0);
  }
}

/* ---- what only a GPU has */

/* A row gives the same bits alone, in a batch and in place, wherever it lies in a vector of 16 bytes. */
static void test_same_bits(void **state) {
  (void)state;
  static const int64_t lengths[] = {500, 3000, 70001};
  for (int l = 0; l < 3; l++)
    for (int k = 0; k < 3; k++) {
      enum { R = 400 };
      const int64_t n = lengths[l], rows = l == 2 ? 24 : R;
      const map_args m = {EMX_MAP_ENTMAX, k == 0 ? 1 : k == 1 ? 1.5 : 1.7, 1};
      const emx_entmax_desc desc = map_desc(m);
      pair x = make_pair(EMX_F32, rows, n, n + 1, 1), p = make_pair(EMX_F32, rows, n, n + 2, 0);
      for (int r = 0; r < rows; r++) fill_row(&x.host, r, r % 9, 5);
      send(&x);
      emx_entmax_io io;
      emx_entmax_io_init(&io);
      io.x = &x.gpu, io.p = &p.gpu;
      OK(emx_entmax_forward(gpu, &desc, &io));
      emx_tensor all = fetch(&p);
      for (int64_t r = 0; r < rows; r += rows / 12) {
        const int offset = (int)((1 + r * (n + 1)) % 4);
        pair one = make_pair(EMX_F32, 1, n, n, offset);
        memcpy(one.host.data, (float *)x.host.data + r * (n + 1), sizeof(float) * (size_t)n);
        send(&one);
        io.x = io.p = &one.gpu;
        OK(emx_entmax_forward(gpu, &desc, &io));
        emx_tensor alone = fetch(&one);
        assert_memory_equal(alone.data, (float *)all.data + r * (n + 2), sizeof(float) * (size_t)n);
        free(alone.data);
        drop_pair(&one, offset);
      }
      io.x = io.p = &x.gpu;
      OK(emx_entmax_forward(gpu, &desc, &io));
      emx_tensor place = fetch(&x);
      for (int64_t r = 0; r < rows; r++)
        assert_memory_equal((float *)place.data + r * (n + 1), (float *)all.data + r * (n + 2), sizeof(float) * (size_t)n);
      free(all.data), free(place.data);
      drop_pair(&x, 1), drop_pair(&p, 0);
    }
}

/* Captured once, replayed over new scores: what calls outside of a graph give. Two streams at a time, one context each. */
static void test_graph_and_streams(void **state) {
  (void)state;
  enum { R = 40, N = 33000 };
  const int64_t rows = R;
  cudaStream_t streams[2];
  emx_ctx *own[2];
  cudaGraph_t graph;
  cudaGraphExec_t exec[2];
  pair x[2], p[2], dx[2];
  column target, loss[2];
  int32_t classes[R];
  float losses[2][R], eager[R];
  for (int r = 0; r < R; r++) classes[r] = r * 31;
  target = make_column(EMX_I32, R, classes);
  const emx_entmax_desc desc = map_desc((map_args){EMX_MAP_ENTMAX, 1.5, 1});
  emx_entmax_io io;
  emx_loss_io lo;
  emx_entmax_io_init(&io);
  emx_loss_io_init(&lo);
  for (int s = 0; s < 2; s++) {
    CUDA(cudaStreamCreateWithFlags(&streams[s], cudaStreamNonBlocking));
    emx_ctx_opts o;
    emx_ctx_opts_init(&o);
    o.device = EMX_DEVICE_CUDA, o.stream = streams[s];
    OK(emx_ctx_create(&o, &own[s]));
    x[s] = make_pair(EMX_F32, R, N, N, 0), p[s] = make_pair(EMX_F32, R, N, N, 0), dx[s] = make_pair(EMX_F32, R, N, N, 0);
    loss[s] = make_column(EMX_F32, R, NULL);
    CUDA(cudaStreamBeginCapture(streams[s], cudaStreamCaptureModeThreadLocal));
    io.x = &x[s].gpu, io.p = &p[s].gpu;
    OK(emx_entmax_forward(own[s], &desc, &io));
    io.dp = &x[s].gpu, io.dx = &dx[s].gpu;
    OK(emx_entmax_backward(own[s], &desc, &io));
    lo.x = &x[s].gpu, lo.target = &target.t, lo.loss = &loss[s].t,
    lo.dx = &p[s].gpu; /* over the weights: the gradient has been made */
    OK(emx_entmax_loss(own[s], &desc, &lo));
    CUDA(cudaStreamEndCapture(streams[s], &graph));
    CUDA(cudaGraphInstantiate(&exec[s], graph, 0));
    CUDA(cudaGraphDestroy(graph));
  }
  for (int turn = 0; turn < 3; turn++) {
    for (int s = 0; s < 2; s++) {
      for (int r = 0; r < R; r++) fill_row(&x[s].host, r, (r + turn) % 9, (uint64_t)(turn * 2 + s));
      send(&x[s]);
    }
    for (int again = 0; again < 4; again++)
      for (int s = 0; s < 2; s++) CUDA(cudaGraphLaunch(exec[s], streams[s]));
    for (int s = 0; s < 2; s++) {
      OK(emx_ctx_sync(own[s]));
      emx_tensor g = fetch(&dx[s]), l = fetch(&p[s]);
      gpu_fetch(losses[s], loss[s].gpu, sizeof losses[s]);
      io.x = &x[s].gpu, io.p = &p[s].gpu;
      OK(emx_entmax_forward(gpu, &desc, &io));
      io.dp = &x[s].gpu, io.dx = &dx[s].gpu;
      OK(emx_entmax_backward(gpu, &desc, &io));
      lo.x = &x[s].gpu, lo.target = &target.t, lo.loss = &loss[s].t, lo.dx = &p[s].gpu;
      OK(emx_entmax_loss(gpu, &desc, &lo));
      emx_tensor g2 = fetch(&dx[s]), l2 = fetch(&p[s]);
      gpu_fetch(eager, loss[s].gpu, sizeof eager);
      assert_memory_equal(g.data, g2.data, sizeof(float) * R * N);
      assert_memory_equal(l.data, l2.data, sizeof(float) * R * N);
      assert_memory_equal(losses[s], eager, sizeof eager);
      free(g.data), free(l.data), free(g2.data), free(l2.data);
    }
  }
  for (int s = 0; s < 2; s++) {
    CUDA(cudaGraphExecDestroy(exec[s]));
    emx_ctx_destroy(own[s]);
    CUDA(cudaStreamDestroy(streams[s]));
    drop_pair(&x[s], 0), drop_pair(&p[s], 0), drop_pair(&dx[s], 0);
    gpu_free(loss[s].gpu);
  }
  gpu_free(target.gpu);
  (void)rows;
}

/* One alpha a row; one out of range makes its row NaN and is named when the context is synchronised. The same for targets. */
static void test_faults(void **state) {
  (void)state;
  enum { R = 9 };
  static const int64_t lengths[] = {50, 2000, 40000};
  for (int l = 0; l < 3; l++) {
    const int64_t n = lengths[l], rows = R;
    pair x = make_pair(EMX_F32, R, n, n, 0), p = make_pair(EMX_F32, R, n, n, 0), one = make_pair(EMX_F32, 1, n, n, 0);
    double own[R];
    for (int r = 0; r < R; r++) own[r] = alphas[r], fill_row(&x.host, r, 0, 3);
    send(&x);
    column a = make_column(EMX_F64, R, own);
    emx_entmax_desc desc = map_desc((map_args){EMX_MAP_ENTMAX, 3, 1});
    emx_entmax_io io;
    emx_entmax_io_init(&io);
    io.x = &x.gpu, io.p = &p.gpu, io.alpha = &a.t;
    OK(emx_entmax_forward(gpu, &desc, &io));
    OK(emx_ctx_sync(gpu));
    emx_tensor all = fetch(&p);
    for (int r = 0; r < R; r++) {
      memcpy(one.host.data, (float *)x.host.data + r * n, sizeof(float) * (size_t)n);
      send(&one);
      desc.alpha = own[r];
      io.x = io.p = &one.gpu, io.alpha = NULL;
      OK(emx_entmax_forward(gpu, &desc, &io));
      emx_tensor alone = fetch(&one);
      assert_memory_equal(alone.data, (float *)all.data + r * n, sizeof(float) * (size_t)n);
      free(alone.data);
    }
    free(all.data);
    double own_budget[R] = {1, 2, 3, 4, 5.5, 6, 7, 8, 0};
    column budgets = make_column(EMX_F64, R, own_budget);
    desc.kind = EMX_MAP_BUDGET, desc.alpha = 2, desc.budget = 1;
    io.x = &x.gpu, io.p = &p.gpu, io.alpha = NULL, io.budget = &budgets.t;
    OK(emx_entmax_forward(gpu, &desc, &io));
    fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "budget of row 8");
    all = fetch(&p);
    for (int r = 0; r < R; r++) {
      double sum = 0;
      for (int64_t i = 0; i < n; i++) sum += at(&all, r, i);
      assert_true(r == 8 ? isnan(sum) : fabs(sum - own_budget[r]) < 1e-5);
    }
    free(all.data);
    gpu_free(budgets.gpu);
    desc.kind = EMX_MAP_ENTMAX, io.budget = NULL;
    own[6] = .5;
    gpu->backend->memory_copy(gpu, a.gpu, own, sizeof own);
    io.x = &x.gpu, io.p = &p.gpu, io.alpha = &a.t;
    OK(emx_entmax_forward(gpu, &desc, &io));
    fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "alpha of row 6");
    OK(emx_ctx_sync(gpu));
    all = fetch(&p);
    assert_true(isnan(at(&all, 6, 0)) && isnan(at(&all, 6, n - 1)) && !isnan(at(&all, 5, n - 1)));
    free(all.data);
    int32_t target[R] = {0, 1, 2, -100, (int32_t)n, 0, 0, 0, -100};
    float loss[R];
    column t = make_column(EMX_I32, R, target), lo = make_column(EMX_F32, R, NULL);
    emx_loss_io li;
    emx_loss_io_init(&li);
    li.x = &x.gpu, li.target = &t.t, li.loss = &lo.t, li.dx = &p.gpu;
    OK(emx_entmax_loss(gpu, &desc, &li));
    fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "target of row 4");
    gpu_fetch(loss, lo.gpu, sizeof loss);
    all = fetch(&p);
    for (int r = 0; r < R; r++)
      assert_true(r == 4 ? isnan(loss[r]) && isnan(at(&all, r, n / 2)) : isfinite(loss[r]) && isfinite(at(&all, r, n / 2)));
    free(all.data);
    (void)rows;
    gpu_free(a.gpu), gpu_free(t.gpu), gpu_free(lo.gpu);
    drop_pair(&x, 0), drop_pair(&p, 0), drop_pair(&one, 0);
  }
}

static void test_edges(void **state) {
  (void)state;
  emx_entmax_desc desc = map_desc((map_args){EMX_MAP_ENTMAX, 1.5, 1});
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  for (int k = 0; k < 2; k++) { /* no rows; rows of nothing */
    const int64_t shape[2] = {k ? 3 : 0, k ? 0 : 5};
    emx_tensor none = emx_tensor_view(NULL, EMX_F32, 2, shape);
    none.device = EMX_DEVICE_CUDA;
    column tau = make_column(EMX_F64, 3, NULL), support = make_column(EMX_I32, 3, NULL);
    tau.t.shape[0] = support.t.shape[0] = shape[0];
    io.x = io.p = &none, io.tau = &tau.t, io.support = &support.t;
    OK(emx_entmax_forward(gpu, &desc, &io));
    io.tau = io.support = NULL;
    io.dp = io.dx = &none;
    OK(emx_entmax_backward(gpu, &desc, &io));
    OK(emx_ctx_sync(gpu));
    double t[3];
    int32_t s[3];
    gpu_fetch(t, tau.gpu, sizeof t), gpu_fetch(s, support.gpu, sizeof s);
    for (int r = 0; k && r < 3; r++) assert_true(t[r] == -INFINITY && s[r] == 0);
    gpu_free(tau.gpu), gpu_free(support.gpu);
  }
  pair x = make_pair(EMX_F32, 2, 8, 8, 0);
  io.x = &x.gpu;
  io.p = &x.host; /* on the wrong device */
  fails(emx_entmax_forward(gpu, &desc, &io), EMX_ERR_INVALID, "p is on device");
  drop_pair(&x, 0);
}

int main(void) {
  if (gpu_missing()) return 77;
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_edges),     cmocka_unit_test(test_short_rows),
                                     cmocka_unit_test(test_long_rows), cmocka_unit_test(test_gradients),
                                     cmocka_unit_test(test_losses),    cmocka_unit_test(test_mean),
                                     cmocka_unit_test(test_same_bits), cmocka_unit_test(test_graph_and_streams),
                                     cmocka_unit_test(test_faults)};
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  emx_ctx_destroy(cpu);
  emx_ctx_destroy(gpu);
  return failed;
}
