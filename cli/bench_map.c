/* SPDX-License-Identifier: Apache-2.0
 * emx bench map: R rows of N scores, softmax and alpha-entmax in turn, the weights against the float64 oracle. */
#include "bench.h"

#include "base/num.h"
#include "entmax/entmax.h"

#include <stdlib.h>

typedef struct options {
  cli_common common;
  int64_t n, rows;
  double alpha, std;
  int32_t dtype;
  int rounds;
  uint64_t seed;
} options;
enum { KEY_ROWS = 1, KEY_STD, KEY_DTYPE, KEY_ROUNDS, KEY_SEED, KEY_N };
static const struct argp_option option_table[] = {{"n", KEY_N, "N", 0, "Scores a row (default 65536)", 1},
                                                  {"rows", KEY_ROWS, "R", 0, "Rows (default 64)", 1},
                                                  {"std", KEY_STD, "S", 0, "Standard deviation of the scores (default 1)", 1},
                                                  {"alpha", 'a', "A", 0, "1 to 4 (default 1.5)", 1},
                                                  {"dtype", KEY_DTYPE, "T", 0, "f32 (default), f16, bf16 or f64", 1},
                                                  {"rounds", KEY_ROUNDS, "N", 0, "Timed rounds (default 9)", 1},
                                                  {"seed", KEY_SEED, "S", 0, "Seed of the scores (default 1)", 1},
                                                  {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &o->common; return 0;
    case KEY_N: o->n = cli_int(state, "--n", arg, 1, 1 << 28); return 0;
    case KEY_ROWS: o->rows = cli_int(state, "--rows", arg, 1, 1 << 24); return 0;
    case KEY_STD: o->std = cli_real(state, "--std", arg, 0, 1e6); return 0;
    case 'a': o->alpha = cli_real(state, "--alpha", arg, 1, 4); return 0;
    case KEY_DTYPE: o->dtype = cli_dtype(state, "--dtype", arg, "f32, f16, bf16, f64"); return 0;
    case KEY_ROUNDS: o->rounds = (int)cli_int(state, "--rounds", arg, 1, 100000); return 0;
    case KEY_SEED: o->seed = cli_seed(state, "--seed", arg); return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

/* Largest |p - oracle| over the first row, and its support. */
static double check(const options *o, double alpha, const void *x, const void *p, double *s, double *want, int64_t *support) {
  double worst = 0;
  for (int64_t i = 0; i < o->n; i++) s[i] = emxi_load(x, o->dtype, i);
  emxi_oracle_entmax(s, o->n, alpha, want, support);
  for (int64_t i = 0; i < o->n; i++) worst = fmax(worst, fabs(emxi_load(p, o->dtype, i) - want[i]));
  return worst;
}

int bench_map(int argc, char **argv) {
  static const struct argp_child children[] = {{&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Times rows of normal scores through softmax and alpha-entmax, in turn in every round.\v"
          "Median, minimum and median absolute deviation over the rounds; vs_softmax is the median of the ratios within a round; "
          "max_err is the largest error of a weight of the first row against float64."};
  options o = {.n = 65536, .rows = 64, .alpha = 1.5, .std = 1, .dtype = EMX_F32, .rounds = 9, .seed = 1};
  cli_parse(&argp, argc, argv, &o);

  emx_ctx *ctx = NULL;
  int code = cli_context(&o.common, &ctx);
  if (code) return code;
  const size_t es = emx_dtype_size(o.dtype), bytes = (size_t)o.rows * (size_t)o.n * es;
  char *x = emxi_alloc(bytes), *p = emxi_alloc(bytes);
  double *s = emxi_alloc((size_t)o.n * sizeof *s), *want = emxi_alloc((size_t)o.n * sizeof *want);
  float *noise = emxi_alloc((size_t)o.n * sizeof *noise);
  double *ms[2] = {calloc((size_t)o.rounds, sizeof(double)), calloc((size_t)o.rounds, sizeof(double))};
  if (!x || !p || !s || !want || !noise || !ms[0] || !ms[1]) {
    code = cli_nomem(2 * bytes, "the rows");
    goto done;
  }
  for (int64_t r = 0; r < o.rows; r++) {
    emxi_normals(o.seed, (uint64_t)r, noise, o.n);
    for (int64_t i = 0; i < o.n; i++) emxi_store(x, o.dtype, r * o.n + i, noise[i] * o.std);
  }
  int64_t shape[2] = {o.rows, o.n}, support[2];
  emx_tensor tx = emx_tensor_view(x, o.dtype, 2, shape), tp = emx_tensor_view(p, o.dtype, 2, shape);
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.x = &tx;
  io.p = &tp;
  double err[2];
  const double alphas[2] = {1, o.alpha};
  const int methods = o.alpha == 1 ? 1 : 2;
  for (int round = -BENCH_WARMUP; round < o.rounds; round++)
    for (int m = 0; m < methods; m++) {
      emx_entmax_desc desc;
      emx_entmax_desc_init(&desc);
      desc.alpha = alphas[m];
      double start = cli_seconds();
      CLI_TRY(emx_entmax_forward(ctx, &desc, &io));
      if (round >= 0)
        ms[m][round] = 1e3 * (cli_seconds() - start);
      else
        err[m] = check(&o, alphas[m], x, p, s, want, &support[m]);
    }
  if (!o.common.json)
    printf("%-8s %9s %9s %9s %11s %9s %9s %9s\n", "map", "ms", "min", "mad", "vs_softmax", "GB/s", "support", "max_err");
  for (int m = 0; m < methods && !code; m++) {
    bench_times t = bench_summary(ms[m], o.rounds);
    const double ratio = bench_ratio(ms[0], ms[m], o.rounds), gbps = 2e-6 * (double)bytes / t.median;
    if (o.common.json) {
      code = cli_json_line(json_pack("{s:s, s:I, s:I, s:s, s:f, s:f, s:f, s:f, s:f, s:o, s:I, s:f, s:I, s:f}", "device", "cpu",
                                     "n", (json_int_t)o.n, "rows", (json_int_t)o.rows, "dtype", emx_dtype_name(o.dtype), "std",
                                     o.std, "alpha", alphas[m], "ms", t.median, "ms_min", t.min, "ms_mad", t.mad, "vs_softmax",
                                     cli_json_real(ratio), "bytes", (json_int_t)(2 * bytes), "gbps", gbps, "support",
                                     (json_int_t)support[m], "max_err", err[m]));
    } else {
      char name[32];
      snprintf(name, sizeof name, m ? "%g" : "softmax", alphas[m]);
      printf("%-8s %9.3f %9.3f %9.3f %11.2f %9.1f %9lld %9.1e\n", name, t.median, t.min, t.mad, ratio, gbps,
             (long long)support[m], err[m]);
    }
  }
  if (!code) code = cli_flush();
done:
  emxi_free(x), emxi_free(p), emxi_free(s), emxi_free(want), emxi_free(noise);
  free(ms[0]), free(ms[1]);
  emx_ctx_destroy(ctx);
  return code;
}
