/* SPDX-License-Identifier: Apache-2.0
 * Kernel tables of the CPU back end: one constant table per ISA, all compiled from body.inc, scalar first; chosen once. */
#ifndef EMXI_TABLE_H
#define EMXI_TABLE_H

#include "base/base.h"
#include "entmax/solve.h"

#define EMXI_TILE 64
#define EMXI_SLOTS 3

/* Index into the dtype arrays of a table: f32 0, f16 1, bf16 2. In the double table slot 0 is f64 and the others are empty. */
static inline int emxi_slot(int32_t dtype) { return dtype == EMX_F16 ? 1 : dtype == EMX_BF16 ? 2 : 0; }

struct emxi_kv_kernels; /* src/cpu/kv_kernels.h */

#define REAL float
#define EMXI_TABLE emxi_table
#define EMXI_TABLE_F32
#include "table_def.inc"
#undef REAL
#undef EMXI_TABLE
#undef EMXI_TABLE_F32

#define REAL double
#define EMXI_TABLE emxi_table64
#include "table_def.inc"
#undef REAL
#undef EMXI_TABLE

extern const emxi_table emxi_table_scalar;
extern const emxi_table64 emxi_table_scalar64;
#if defined(__x86_64__)
extern const emxi_table emxi_table_avx2;
extern const emxi_table emxi_table_avx512;
#endif

/* The best table that this CPU and its operating system can run; NULL past the last. Tests walk them all. */
const emxi_table *emxi_table_available(int i);
/* The table that EMX_ISA names, else the best. */
emx_status emxi_table_choose(const emxi_table **out);

/* Exact threshold of a row of scores (solver.inc): the same bits for every superset of the support, because the last step is the
 * closed form over the support in position order. */
typedef struct emxi_solution {
  double m;        /* largest score */
  double t;        /* threshold relative to it: tau = t + (alpha-1) m */
  int64_t support; /* elements left in s[], idx[] */
  bool nonfinite;  /* NaN or +inf among the scores: m, t are NaN */
} emxi_solution;
/* Compacts s[n], idx[n] (idx may be NULL) in place to the support, in order. n = 0 or all -inf: support 0, m = t = -inf.
 * alpha > 1. s and idx need room for n + 16 elements. */
emxi_solution emxi_solve(const emxi_table *k, double alpha, float *s, int32_t *idx, int64_t n);
emxi_solution emxi_solve64(const emxi_table64 *k, double alpha, double *s, int32_t *idx, int64_t n);
/* The same from a score that is known to lie at or below the threshold's, which saves steps; the bits are the same. */
emxi_solution emxi_solve_above(const emxi_table *k, double alpha, float *s, int32_t *idx, int64_t n, float below);
emxi_solution emxi_solve_above64(const emxi_table64 *k, double alpha, double *s, int32_t *idx, int64_t n, double below);
/* What emxi_solve gives for a list of which s[n] is the support; false if it cannot be one. Whether anything is missing only tau
 * tells. */
bool emxi_resolve(const emxi_table *k, double alpha, const float *s, int64_t n, emxi_solution *sol);
bool emxi_resolve64(const emxi_table64 *k, double alpha, const double *s, int64_t n, emxi_solution *sol);
/* From a lower bound t of the threshold of s[n] relative to m (as in emxi_solution) a better one: two Newton steps, which from
 * the left stay left for alpha <= 2. alpha > 2: t. */
double emxi_raise(const emxi_table *k, double alpha, const float *s, int64_t n, double m, double t);
double emxi_raise64(const emxi_table64 *k, double alpha, const double *s, int64_t n, double m, double t);
/* p[i] of the support that emxi_solve left; p may be s. */
void emxi_weights(const emxi_table *k, double alpha, const emxi_solution *sol, const float *s, float *p);
void emxi_weights64(const emxi_table64 *k, double alpha, const emxi_solution *sol, const double *s, double *p);
/* *f = sum y^b, *g = sum y^(b-1) over y = (alpha-1) (s - m) - t > 0, b = 1/(alpha-1): a Newton step from t is (f-1) (alpha-1) /
 * g. */
void emxi_power_sums(const emxi_table *k, double alpha, const float *s, int64_t n, double m, double t, double *f, double *g);
void emxi_power_sums64(const emxi_table64 *k, double alpha, const double *s, int64_t n, double m, double t, double *f, double *g);
/* tau = t + (alpha-1) m, -inf for an empty row, NaN when nonfinite. */
static inline double emxi_tau(const emxi_solution *sol, double alpha) {
  return sol->nonfinite ? NAN : sol->support ? sol->t + (alpha - 1.0) * sol->m : -INFINITY;
}

/* Back-end state of the CPU. */
typedef struct emxi_cpu {
  const emxi_table *k;
  const emxi_table64 *k64;
  struct {
    void *p;
    size_t size;
  } * scratch; /* [threads], rows of the mapping */
} emxi_cpu;
static inline emxi_cpu *emxi_cpu_of(emx_ctx *ctx) { return ctx->backend_state; }
/* At least `size` bytes for this worker, contents lost on growth; NULL when out of memory. */
void *emxi_cpu_scratch(emx_ctx *ctx, int32_t worker, size_t size);

#endif
