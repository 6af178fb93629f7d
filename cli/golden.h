/* SPDX-License-Identifier: Apache-2.0
 * Known answers: the mapping, attention and decode on small inputs against stored values (cli/golden_data.inc, made by
 * scripts/golden.py with 50 digits). The stored values are an argument, so that a test can hand in wrong ones. */
#ifndef EMX_CLI_GOLDEN_H
#define EMX_CLI_GOLDEN_H

#include <emx.h>

enum {
  GOLDEN_D = 16,
  GOLDEN_MAP_ROWS = 5, /* alpha 1, 1.25, 1.5, 2, 4 */
  GOLDEN_MAP_N = 37,
  GOLDEN_ATTN_ROWS = 3 * 2 * 3, /* alpha 1, 1.5, 2; heads; queries */
  GOLDEN_ATTN_N = 37,
  GOLDEN_DECODE_ROWS = 2 * 2, /* alpha 1, 1.5; heads */
  GOLDEN_DECODE_N = 200,
  GOLDEN_DECODE_PAGES = 13
};
typedef struct golden {
  double map_p[GOLDEN_MAP_ROWS * GOLDEN_MAP_N], map_tau[GOLDEN_MAP_ROWS];
  int map_support[GOLDEN_MAP_ROWS];
  double attn_o[GOLDEN_ATTN_ROWS * GOLDEN_D], attn_tau[GOLDEN_ATTN_ROWS]; /* alpha 1: the log-sum-exp instead of tau */
  int attn_support[GOLDEN_ATTN_ROWS];
  double decode_o[GOLDEN_DECODE_ROWS * GOLDEN_D], decode_tau[GOLDEN_DECODE_ROWS];
  int decode_support[GOLDEN_DECODE_ROWS];
  double decode_mass[GOLDEN_DECODE_ROWS * GOLDEN_DECODE_PAGES]; /* weight of each page's tokens */
} golden;
extern const golden golden_values;

/* A check `what` ended with `error`, which must be at most `limit` (a NaN is a failure). */
typedef void (*golden_report)(void *user, const char *what, double error, double limit);
/* Runs every check with this context. EMX_OK also when checks fail; an error only if a call did. */
emx_status golden_check(emx_ctx *ctx, const golden *want, golden_report report, void *user);

#endif
