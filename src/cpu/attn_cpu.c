/* SPDX-License-Identifier: Apache-2.0
 * Dense entmax attention on the CPU.
 *
 *   forward   o_i = sum_j p_ij v_j,  p_i = alpha-entmax(scale q_i.k + bias)          one pass over K, exact tau
 *   backward  u = p^(2-alpha),  ds = u (dp - (sum u dp)/(sum u)),  dp_ij = do_i.v_j
 *
 * A forward task owns the outputs of a block of queries times the query heads of one KV head; it walks the keys from the newest to the
 * oldest in tiles of 64, scores them in registers (table tile(), or dot() where the block has few rows), and keeps (score, position)
 * of what lies above a running lower bound of the row's threshold: first max - 1/(alpha-1), then, whenever a list has doubled, the
 * exact threshold of the list (the threshold of a subset is a lower bound: docs/math.md). The list that is left contains the support.
 * Lists have room for every key, so nothing overflows. A backward task owns one KV head of one sequence, hence dk and dv.
 *
 * Cost: 2 D FLOP a visible pair and 2 D (backward 8 D) a nonzero; K is read ceil(rows / block) times from cache. Scores accumulate in
 * REAL (relative error of a sum of D products), tau in double. Oracle: tests/unit/test_attn.c.
 */
#include <math.h>
#include <string.h>

#include "attn/attn.h"
#include "base/num.h"
#include "cpu/backend_cpu.h"

#define ROWS_WANTED 96                 /* rows of a block: enough to amortise the transposition of a key tile */
#define LIST_BYTES ((int64_t)32 << 20) /* per worker: blocks get smaller when contexts get longer */
#define DOT_ROWS 8                     /* below this many rows, keys are not transposed */
#define CHUNK 256

/* Rows of a block: `queries` positions of each of the group's heads. Depends on shapes only. */
typedef struct block {
  int64_t group, queries, rows, count; /* count: blocks per sequence */
  int64_t cap;                         /* list entries a row */
} block;

static block block_of(const emxi_attn *a, size_t real) {
  block b = {.group = a->heads / a->kv_heads, .cap = a->max_k + 64};
  int64_t fit = LIST_BYTES / (b.cap * (int64_t)(real + sizeof(int32_t)));
  int64_t rows = fit < ROWS_WANTED ? fit : ROWS_WANTED;
  b.queries = rows / b.group;
  if (b.queries > a->max_q) b.queries = a->max_q;
  if (b.queries < 1) b.queries = 1;
  b.rows = b.queries * b.group;
  b.count = (a->max_q + b.queries - 1) / b.queries;
  return b;
}

/* Keys that query i of a span sees: from .. to-1. Both ends rise with i. */
typedef struct range {
  int64_t from, to;
} range;
static range visible(const emxi_attn *a, const emxi_span *sp, int64_t i) {
  const int64_t at = i + sp->n - sp->s, from = at - a->left, to = at + a->right + 1;
  range r = {from < 0 ? 0 : from, to < 0 ? 0 : to > sp->n ? sp->n : to};
  if (r.from > r.to) r.from = r.to;
  return r;
}

/* Element offset of key row j from m->data. */
static int64_t key_offset(const emxi_attn *a, const emxi_mat *m, const emxi_span *sp, int64_t b, int64_t g, int64_t j) {
  if (!a->block_table) return b * m->batch + g * m->head + (sp->k0 + j) * m->row;
  int64_t page = a->block_table[b * a->table_stride + j / a->page_size];
  return page * m->batch + g * m->head + (j % a->page_size) * m->row;
}

typedef struct job {
  emx_ctx *ctx;
  const emxi_attn *a;
  block blk;
  double *d_alpha;              /* [rows of q, heads]: each row's share */
  void *work[EMXI_MAX_THREADS]; /* per worker, carved by the template */
} job;

static int64_t alpha_rows(const emxi_attn *a) { return a->cu_q ? a->rows_q : a->batch * a->max_q; }
static int64_t alpha_index(const emxi_attn *a, const emxi_span *sp, int64_t b, int64_t i) {
  return a->cu_q ? sp->q0 + i : b * a->max_q + i;
}

/* d p / d alpha, as far as it matters beside d_p - delta, whose mean under u is zero (docs/math.md, 6): -p L^2 (e^x - 1 - x) / x^2 with
 * L = log p and x = -(alpha-1) L. The quotient is 1/2 at x = 0 (alpha = 1) and is not taken as a difference where that cancels. */
static double alpha_slope(double alpha, double p) {
  const double l = log(p), x = -(alpha - 1.0) * l;
  const double psi = fabs(x) < 1e-2 ? 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x / 5040))))
                                    : (expm1(x) - x) / (x * x);
  return -p * l * l * psi;
}

#define REAL float
#define TABLE emxi_table
#define FN(name) name
#define KTABLE(cpu) ((cpu)->k)
#define BELOW(x) nextafterf(x, -INFINITY)
#define ULP 0x1p-23
#define SUM_TOLERANCE 1e-5 /* of the sum of p in the backward pass, before tau is solved again */
#include "attn_body.inc"
#undef REAL
#undef TABLE
#undef FN
#undef KTABLE
#undef BELOW
#undef ULP
#undef SUM_TOLERANCE

#define REAL double
#define TABLE emxi_table64
#define FN(name) name##64
#define KTABLE(cpu) ((cpu)->k64)
#define BELOW(x) nextafter(x, -INFINITY)
#define ULP 0x1p-52
#define SUM_TOLERANCE 1e-13
#include "attn_body.inc"

emx_status emxi_cpu_attn_supports(emx_ctx *ctx, const emxi_attn *a) {
  (void)ctx, (void)a; /* everything that the interface describes */
  return EMX_OK;
}

emx_status emxi_cpu_attn_run(emx_ctx *ctx, const emxi_attn *a, emxi_arena *arena) {
  const bool f64 = a->k.dtype == EMX_F64, backward = a->pass == EMX_PASS_BACKWARD;
  job j = {.ctx = ctx, .a = a, .blk = block_of(a, f64 ? sizeof(double) : sizeof(float))};
  for (int32_t w = 0; w < ctx->threads; w++) j.work[w] = f64 ? carve64(arena, &j) : carve(arena, &j);
  j.d_alpha = emxi_arena_take(arena, a->d_alpha ? alpha_rows(a) * a->heads : 0, sizeof(double));
  if (!arena->base) return EMX_OK;
  EMX_TRY(emxi_arena_check(arena, "attention"));
  EMX_TRY(emxi_attn_check_lengths(a));
  for (int32_t w = 0; w < ctx->threads; w++) f64 ? lay_out64(&j, w) : lay_out(&j, w);
  const int64_t heads = a->batch * a->kv_heads;
  if (backward) {
    const int64_t rows = alpha_rows(a);
    if (a->d_alpha) memset(j.d_alpha, 0, (size_t)(rows * a->heads) * sizeof(double)); /* padding has no share */
    EMX_TRY(emxi_parallel(ctx, heads, f64 ? backward_task64 : backward_task, &j));
    for (int64_t h = 0; a->d_alpha && h < a->heads; h++) {
      double sum = 0;
      for (int64_t i = 0; i < rows; i++) sum += j.d_alpha[i * a->heads + h];
      a->d_alpha[h] = sum;
    }
    return EMX_OK;
  }
  return emxi_parallel(ctx, heads * j.blk.count, f64 ? forward_task64 : forward_task, &j);
}
