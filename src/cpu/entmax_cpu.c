/* SPDX-License-Identifier: Apache-2.0
 * Row mapping on the CPU. A row is converted to scores of the working type, filtered by the bound max - 1/(alpha-1) (nothing below it
 * can be in the support), solved on the survivors and written. One row per task; reads x once, writes p once. Oracle:
 * src/entmax/oracle.c. */
#include "base/num.h"
#include "cpu/backend_cpu.h"
#include "entmax/entmax.h"

#include <string.h>

typedef struct job {
  emx_ctx *ctx;
  const emxi_rows *r;
  atomic_int nomem;
} job;

#define REAL float
#define TABLE emxi_table
#define FN(name) name
#define KTABLE(cpu) ((cpu)->k)
#include "entmax_rows.inc"
#undef REAL
#undef TABLE
#undef FN
#undef KTABLE

#define REAL double
#define TABLE emxi_table64
#define FN(name) name##64
#define KTABLE(cpu) ((cpu)->k64)
#include "entmax_rows.inc"

static emx_status run(emx_ctx *ctx, const emxi_rows *rows, emx_task_fn f32, emx_task_fn f64) {
  job j = {.ctx = ctx, .r = rows};
  atomic_init(&j.nomem, 0);
  EMX_TRY(emxi_parallel(ctx, rows->rows, rows->dtype == EMX_F64 ? f64 : f32, &j));
  if (atomic_load(&j.nomem)) return emxi_fail(EMX_ERR_NOMEM, "no memory for a row of %lld scores", (long long)rows->n);
  return EMX_OK;
}

emx_status emxi_cpu_entmax_forward(emx_ctx *ctx, const emxi_rows *rows) { return run(ctx, rows, forward_row, forward_row64); }
emx_status emxi_cpu_entmax_backward(emx_ctx *ctx, const emxi_rows *rows) { return run(ctx, rows, backward_row, backward_row64); }
