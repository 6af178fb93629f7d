/* SPDX-License-Identifier: Apache-2.0
 * Dense entmax attention on the CPU.
 *
 *   forward   o_i = sum_j p_ij v_j,  p_i = alpha-entmax(scale q_i.k + bias)          one pass over K, exact tau
 *   backward  u = p^(2-alpha),  ds = u (dp - (sum u dp)/(sum u)),  dp_ij = do_i.v_j
 *
 * A forward task owns the outputs of a block of queries times the query heads of one KV head. It walks the keys from the newest
 * to the oldest in tiles of 64 (collect): a tile is transposed once, its scores stay in registers, and (score, position) of what
 * lies above a running lower bound of the row's threshold is compressed into the row's list. The bound is that of the list so
 * far: a threshold of a subset is a lower bound (docs/math.md). The list that is left contains the support, and tau is solved
 * exactly on it. Tiles whose scores are bounded below the threshold of every row (center and radius of the tile, and the bias)
 * are not even scored.
 *
 * A block's lists share a slab of fixed size. Should a list outgrow its share, which takes long and flat rows, the block is cut
 * in two and starts again; a block of one query always fits. Where the cuts are cannot be seen in the results.
 *
 * A backward task owns one KV head of one sequence, hence dk and dv; where there are fewer of those than workers, a first round
 * of tasks owns blocks of queries, a second ranges of keys, and the order of every sum is the same. Rows come from the caller's
 * support lists, where they hold what they should, else from the same walk over the keys with the row's threshold known.
 *
 * Cost: 2 D FLOP a visible pair that is not bounded away and 2 D (backward 10 D) a nonzero; K is read rows / block times from
 * cache. Scores accumulate in REAL (relative error of a sum of D products), tau in double. Oracle: tests/unit/test_attn.c.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attn/attn.h"
#include "base/num.h"
#include "cpu/backend_cpu.h"

#define ROWS_WANTED 192                 /* rows of a block: enough to amortise the fetch and transposition of a key tile */
#define SUB_ROWS 12                     /* rows that are scored or skipped together: whole register blocks of every table */
#define LIST_ENTRIES ((int64_t)1 << 21) /* of the slab of lists a worker has */
#define ROOM (EMXI_TILE + 16)           /* entries in front of a list that one tile may need */
#define DOT_ROWS 8                      /* below this many rows, keys are not transposed */
#define BOUND_ROWS 64                   /* from here on it pays to bound tiles */
#define CHUNK 256

/* Rows of a block: `queries` positions of each of the group's heads, or fewer. Depends on shapes only. */
typedef struct block {
  int64_t group, queries, rows, count; /* count: blocks per sequence */
  int64_t entries;                     /* list entries a worker */
} block;

static block block_of(const emxi_attn *a) {
  block b = {.group = a->heads / a->kv_heads};
  b.queries = ROWS_WANTED / b.group;
  if (b.queries > a->max_q) b.queries = a->max_q;
  if (b.queries < 1) b.queries = 1;
  b.rows = b.queries * b.group;
  b.count = (a->max_q + b.queries - 1) / b.queries;
  const int64_t row = a->max_k + 2 * ROOM, most = b.rows * row, least = b.group * row;
  b.entries = most < LIST_ENTRIES ? most : least > LIST_ENTRIES ? least : LIST_ENTRIES;
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

/* Softmax alone needs every score; few queries, or few keys, are not worth a look at the keys before. */
static bool bounded(const emxi_attn *a) {
  return (a->alphas || a->alpha > 1.0) && a->max_q * (a->heads / a->kv_heads) >= BOUND_ROWS && a->max_k >= 8 * EMXI_TILE;
}

/* Keys from the start of `left` ones of a tile that lie next to each other in memory. */
static int run_of(const emxi_attn *a, int left) { return a->block_table && a->page_size < left ? (int)a->page_size : left; }

/* Keys that come next: a hint. */
static void prefetch_keys(const emxi_attn *a, const emxi_span *sp, int64_t b, int64_t g, int64_t j, int n) {
  const int64_t es = (int64_t)emx_dtype_size(a->k.dtype), bytes = a->d * es;
  for (int i = 0; i < n; i++) {
    const char *key = a->k.data + key_offset(a, &a->k, sp, b, g, j + i) * es;
    for (int64_t x = 0; x < bytes; x += 64) __builtin_prefetch(key + x);
  }
}

typedef struct job {
  emx_ctx *ctx;
  const emxi_attn *a;
  block blk;
  double *d_alpha;       /* [rows of q, heads]: each row's share */
  void *states;          /* the same, where queries and keys are tasks of their own; else NULL */
  int64_t range, ranges; /* keys of a task, tasks a KV head */
  /* Bounds of key tiles, or NULL: centers [batch * kv_heads, panels, d, TILE] of REAL, a panel being TILE tiles, and what a unit
   * of |q| adds to q.center [batch * kv_heads, panels * TILE]. */
  void *center, *radius;
  int64_t panels;
  void *work[EMXI_MAX_THREADS]; /* per worker, carved by the template */
} job;

/* Rows of q in memory, head by head: where per-row results of the backward pass are kept. */
static int64_t query_rows(const emxi_attn *a) { return (a->cu_q ? a->rows_q : a->batch * a->max_q) * a->heads; }
static int64_t row_index(const emxi_attn *a, const emxi_span *sp, int64_t b, int64_t h, int64_t i) {
  return (a->cu_q ? sp->q0 + i : b * a->max_q + i) * a->heads + h;
}
enum { ROW_NONE, ROW_WEIGHTS, ROW_NAN }; /* sees nothing; has weights; is NaN */

/* d p / d alpha, as far as it matters beside d_p - delta, whose mean under u is zero (docs/math.md, 6): -p L^2 (e^x - 1 - x) /
 * x^2 with L = log p and x = -(alpha-1) L. The quotient is 1/2 at x = 0 (alpha = 1) and is not taken as a difference where that
 * cancels. */
static double alpha_slope(double alpha, double p) {
  const double l = log(p), x = -(alpha - 1.0) * l;
  const double psi = fabs(x) < 1e-2 ? 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x / 5040))))
                                    : (expm1(x) - x) / (x * x);
  return -p * l * l * psi;
}

#define REAL float
#define TINY 1e-37f     /* above what underflow hides in a score */
#define ROOT_TINY 1e-21 /* above what underflow of squares hides in a norm */
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
#undef TINY
#undef ROOT_TINY

#define REAL double
#define TINY 1e-300
#define ROOT_TINY 1e-160
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

/* Whether queries and keys are tasks of their own, which finds every row's weights twice but keeps more workers busy than one a
 * KV head does. The gradients have the same bits either way. */
static bool split(const emx_ctx *ctx, const emxi_attn *a) {
  const int64_t heads = a->batch * a->kv_heads;
  return ctx->threads > 1 && a->max_k > 0 && a->max_q * (a->heads / a->kv_heads) > 2 * ROWS_WANTED &&
         heads < (a->list ? 2 : 1) * (int64_t)ctx->threads;
}

emx_status emxi_cpu_attn_run(emx_ctx *ctx, const emxi_attn *a, emxi_arena *arena) {
  const bool f64 = a->k.dtype == EMX_F64, backward = a->pass == EMX_PASS_BACKWARD;
  const int64_t heads = a->batch * a->kv_heads;
  job j = {.ctx = ctx, .a = a, .blk = block_of(a)};
  for (int32_t w = 0; w < ctx->threads; w++) j.work[w] = f64 ? carve64(arena, &j) : carve(arena, &j);
  j.d_alpha = emxi_arena_take(arena, a->d_alpha ? query_rows(a) : 0, sizeof(double));
  if (bounded(a)) {
    const size_t real = f64 ? sizeof(double) : sizeof(float);
    j.panels = (a->max_k + EMXI_TILE * EMXI_TILE - 1) / (EMXI_TILE * EMXI_TILE);
    j.center = emxi_arena_take(arena, heads, (size_t)(j.panels * EMXI_TILE * a->d) * real);
    j.radius = emxi_arena_take(arena, heads, (size_t)(j.panels * EMXI_TILE) * real);
  }
  if (backward && split(ctx, a)) {
    j.states = emxi_arena_take(arena, query_rows(a), f64 ? sizeof(state64) : sizeof(state));
    const int64_t tiles = (a->max_k + EMXI_TILE - 1) / EMXI_TILE, want = 4 * ctx->threads / heads + 1;
    j.range = ((tiles + want - 1) / want) * EMXI_TILE;
    j.ranges = (a->max_k + j.range - 1) / j.range;
  }
  if (!arena->base) return EMX_OK;
  EMX_TRY(emxi_arena_check(arena, "attention"));
  EMX_TRY(emxi_attn_check_lengths(a));
  for (int32_t w = 0; w < ctx->threads; w++) f64 ? lay_out64(&j, w) : lay_out(&j, w);
  if (j.center) EMX_TRY(emxi_parallel(ctx, heads * j.panels, f64 ? bound_task64 : bound_task, &j));
  if (backward) {
    const int64_t rows = query_rows(a);
    if (a->d_alpha) memset(j.d_alpha, 0, (size_t)rows * sizeof(double)); /* padding has no share */
    if (j.ranges) {
      EMX_TRY(emxi_parallel(ctx, heads * j.blk.count, f64 ? queries_task64 : queries_task, &j));
      EMX_TRY(emxi_parallel(ctx, heads * j.ranges, f64 ? keys_task64 : keys_task, &j));
    } else {
      EMX_TRY(emxi_parallel(ctx, heads, f64 ? backward_task64 : backward_task, &j));
    }
    for (int64_t h = 0; a->d_alpha && h < a->heads; h++) {
      double sum = 0;
      for (int64_t i = h; i < rows; i += a->heads) sum += j.d_alpha[i];
      a->d_alpha[h] = sum;
    }
    return EMX_OK;
  }
  return emxi_parallel(ctx, heads * j.blk.count, f64 ? forward_task64 : forward_task, &j);
}
