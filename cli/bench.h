/* SPDX-License-Identifier: Apache-2.0
 * Shared by the benchmarks: rounds in which every method runs once, so that a machine whose speed drifts treats them alike. */
#ifndef EMX_CLI_BENCH_H
#define EMX_CLI_BENCH_H

#include "cli.h"

enum { BENCH_WARMUP = 2 };

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
