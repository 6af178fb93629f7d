/* SPDX-License-Identifier: Apache-2.0
 * Row mapping on the CPU, a few rows a task. Forward: one pass over the row keeps what lies within the map's reach of the largest
 * score (nothing below it can be in the support); the threshold is solved on those, and the weights are written into a cleared
 * row. Backward: one pass over p keeps its nonzeros; everything else is work on those. Reads and writes each row once. Oracle:
 * src/entmax/oracle.c. */
#include "base/num.h"
#include "cpu/backend_cpu.h"
#include "entmax/entmax.h"

#include <string.h>

enum {
  BLOCK = 4096,         /* elements that stay in the first cache between two looks */
  TASK_ELEMENTS = 16384 /* in less time than these take, no other thread wakes up */
};

typedef struct job {
  emx_ctx *ctx;
  const emxi_rows *r;
  emx_task_fn row;
  int64_t rows; /* a task */
  atomic_int nomem;
} job;

static double row_alpha(const emxi_rows *r, int64_t row) {
  return r->alphas ? emxi_load(r->alphas, r->alphas_dtype, row) : r->alpha;
}
static double row_budget(const emxi_rows *r, int64_t row) {
  return r->budgets ? emxi_load(r->budgets, r->budgets_dtype, row) : r->budget;
}

/* (e^q - 1 - q) / q^2 */
static double second_remainder(double q) {
  if (fabs(q) > 0.5) return (expm1(q) - q) / (q * q);
  double s = 0; /* sum of q^k / (k+2)!: below 1e-17 from the 13th term on */
  for (int i = 12; i >= 0; i--) s = (s * q + 1) / (i + 2);
  return s;
}

/* A row that has been mapped. */
typedef struct solved {
  double m, tau;
  double conjugate; /* max over p of p.(x - m) + H(p): what a Fenchel-Young loss needs */
  int64_t support;
  bool nonfinite, dense; /* dense: softmax, weights are to be divided by total */
  double total;
} solved;

/* t in [-1, 0) with sum min(1, [y - t]_+^b) = budget, where the rank-th largest y is 0 and rank = budget rounded up. Elements
 * under the bracket (no weight) and over it by one (weight one) are settled and left behind, so passes get shorter. Otherwise as
 * the entmax solver's root: bracketed Newton, by geometric means for alpha > 2 (docs/math.md, 2), the left end when rounding
 * decides. */
static double budget_root(double *y, int64_t n, double alpha, double budget, int64_t rank) {
  const double a = alpha - 1.0, b = 1.0 / a;
  const int ib = emxi_power_kind(b);
  double lo = -1.0, hi = -pow((budget - (double)(rank - 1)) / (double)n, a) * (1 - 1e-12), ones = 0, t = lo, last = INFINITY;
  for (int it = 0; it < 400; it++) {
    double mass = ones, slope = 0;
    for (int64_t i = 0; i < n; i++) {
      const double e = y[i] - t;
      if (e >= 1) {
        mass += 1;
      } else if (e > 0) {
        const double p = emxi_power(e, b, ib);
        mass += p;
        slope += p / e;
      }
    }
    const double f = mass - budget;
    if (fabs(f) <= 1e-16 * (double)n * mass)
      return t; /* what rounding leaves of a sum of n terms; their last bits may all agree */
    if (f > 0)
      lo = t;
    else
      hi = t;
    const double unit = alpha > 2.0 ? -lo * 1e-16 : 1e-16, middle = alpha > 2.0 ? -sqrt(lo * hi) : 0.5 * (lo + hi);
    const double step = slope > 0 ? a * f / slope : INFINITY;
    double next = t + step;
    if (fabs(step) <= unit || hi - lo <= 2 * unit) return fmin(fmax(next, lo), hi);
    if (!(next > lo && next < hi) || fabs(step) > 0.25 * last) { /* steps may creep around the corners of the sum */
      next = middle;
      if (next <= lo || next >= hi) return lo;
    }
    last = fabs(next - t);
    t = next;
    int64_t open = 0;
    for (int64_t i = 0; i < n; i++) {
      const double e = y[i];
      y[open] = e;
      open += e > lo && e < hi + 1;
      ones += e >= hi + 1;
    }
    n = open;
  }
  return lo;
}

#define REAL float
#define BITS uint32_t
#define OWN EMX_F32
#define TABLE emxi_table
#define FN(name) name
#define KTABLE(cpu) ((cpu)->k)
#include "entmax_rows.inc"
#undef REAL
#undef BITS
#undef OWN
#undef TABLE
#undef FN
#undef KTABLE
#undef SUM4

#define REAL double
#define BITS uint64_t
#define OWN EMX_F64
#define TABLE emxi_table64
#define FN(name) name##64
#define KTABLE(cpu) ((cpu)->k64)
#include "entmax_rows.inc"

static void rows_task(void *arg, int64_t i, int32_t worker) {
  job *j = arg;
  for (int64_t row = i * j->rows; row < (i + 1) * j->rows && row < j->r->rows; row++) j->row(j, row, worker);
}

static emx_status run(emx_ctx *ctx, const emxi_rows *rows, emx_task_fn f32, emx_task_fn f64) {
  job j = {.ctx = ctx,
           .r = rows,
           .row = rows->dtype == EMX_F64 ? f64 : f32,
           .rows = rows->n < TASK_ELEMENTS ? TASK_ELEMENTS / (rows->n + 1) : 1};
  atomic_init(&j.nomem, 0);
  EMX_TRY(emxi_parallel(ctx, (rows->rows + j.rows - 1) / j.rows, rows_task, &j));
  if (atomic_load(&j.nomem)) return emxi_fail(EMX_ERR_NOMEM, "no memory for a row of %lld scores", (long long)rows->n);
  return EMX_OK;
}

emx_status emxi_cpu_entmax_forward(emx_ctx *ctx, const emxi_rows *rows) { return run(ctx, rows, forward_row, forward_row64); }
emx_status emxi_cpu_entmax_backward(emx_ctx *ctx, const emxi_rows *rows) { return run(ctx, rows, backward_row, backward_row64); }

/* Sum or mean of the losses that count, in the order of the rows; the mean of none is NaN, as 0/0 is. */
static void reduce(const emxi_rows *r) {
  double sum = 0;
  for (int64_t i = 0; i < r->rows; i++)
    if (r->target[i] != r->ignore_index) sum += emxi_load(r->loss, r->loss_dtype, i);
  emxi_store(r->total, r->total_dtype, 0, sum * r->scale);
}

emx_status emxi_cpu_entmax_loss(emx_ctx *ctx, const emxi_rows *rows) {
  EMX_TRY(run(ctx, rows, loss_row, loss_row64));
  if (rows->total) reduce(rows);
  return EMX_OK;
}
