/* SPDX-License-Identifier: Apache-2.0
 * Shared by the benchmarks: rounds in which every method runs once, so that a machine whose speed drifts treats them alike. */
#ifndef EMX_CLI_BENCH_H
#define EMX_CLI_BENCH_H

#include "cli.h"

enum { BENCH_WARMUP = 2 };

/* --n, --hq, --hkv, --d, --rounds and --seed of the benchmarks of attention, a child parser. What it starts with are the
 * defaults. Key range 1300. */
typedef struct bench_shape {
  int64_t n;
  int hq, hkv, d, rounds;
  uint64_t seed;
} bench_shape;
extern const struct argp bench_shape_argp;

/* Milliseconds of one method, [rounds]. */
typedef struct bench_times {
  double median, min, mad;
} bench_times;
bench_times bench_summary(const double *ms, int rounds);
/* Median over the rounds of base[r] / ms[r]. */
double bench_ratio(const double *base, const double *ms, int rounds);

/* Reads memory once with all workers of the context; a round's answer to "how fast can it be read". Returns seconds. */
double bench_read(emx_ctx *ctx, const void *memory, size_t bytes);

int bench_decode(int argc, char **argv);
int bench_map(int argc, char **argv);
int bench_attn(int argc, char **argv);
int bench_budgets(int argc, char **argv);
int bench_file(int argc, char **argv);

#endif
