/* SPDX-License-Identifier: Apache-2.0
 * emx bench map: R rows of N scores through softmax and one other map in turn, forward, backward and loss, each against
 * float64. */
#include "bench.h"

#include "base/num.h"
#include "entmax/entmax.h"

#include <stdlib.h>
#include <string.h>

enum { FORWARD, BACKWARD, LOSS, PASSES };
static const char *const pass_names[PASSES] = {"forward", "backward", "loss"};

typedef struct options {
  cli_common common;
  int64_t n, rows;
  emx_entmax_desc desc;
  double std;
  int32_t dtype;
  int rounds;
  uint64_t seed;
  bool passes[PASSES], pass_set, budget_set;
} options;
enum { KEY_ROWS = 1, KEY_STD, KEY_DTYPE, KEY_ROUNDS, KEY_SEED, KEY_N, KEY_KIND, KEY_BUDGET, KEY_PASS };
static const struct argp_option option_table[] = {
    {"n", KEY_N, "N", 0, "Scores a row (default 65536)", 1},
    {"rows", KEY_ROWS, "R", 0, "Rows (default 64)", 1},
    {"std", KEY_STD, "S", 0, "Standard deviation of the scores (default 1)", 1},
    {"kind", KEY_KIND, "K", 0, "entmax (default), normmax or budget", 1},
    {"alpha", 'a', "A", 0, "1 to 4, normmax to 1000 (default 1.5)", 1},
    {"budget", KEY_BUDGET, "B", 0, "With --kind budget: sum of a row's weights (default 1)", 1},
    {"pass", KEY_PASS, "P", 0, "forward, backward, loss, or several with commas (default all that the map has)", 1},
    {"dtype", KEY_DTYPE, "T", 0, "f32 (default), f16, bf16 or f64", 1},
    {"rounds", KEY_ROUNDS, "N", 0, "Timed rounds (default 9)", 1},
    {"seed", KEY_SEED, "S", 0, "Seed of the scores (default 1)", 1},
    {0}};

static void parse_passes(struct argp_state *state, options *o, const char *arg) {
  memset(o->passes, 0, sizeof o->passes);
  o->pass_set = true;
  for (const char *at = arg;; at++) {
    const size_t length = strcspn(at, ",");
    int pass = 0;
    while (pass < PASSES && (strlen(pass_names[pass]) != length || strncmp(at, pass_names[pass], length))) pass++;
    if (pass == PASSES) argp_error(state, "--pass: '%.*s' is none of forward, backward, loss", (int)length, at);
    o->passes[pass % PASSES] = true;
    at += length;
    if (!*at) return;
  }
}

static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &o->common; return 0;
    case KEY_N: o->n = cli_int(state, "--n", arg, 1, 1 << 28); return 0;
    case KEY_ROWS: o->rows = cli_int(state, "--rows", arg, 1, 1 << 24); return 0;
    case KEY_STD: o->std = cli_real(state, "--std", arg, 0, 1e6); return 0;
    case KEY_KIND: o->desc.kind = cli_map_kind(state, arg); return 0;
    case 'a': o->desc.alpha = cli_real(state, "--alpha", arg, 1, 1000); return 0;
    case KEY_BUDGET:
      o->desc.budget = cli_real(state, "--budget", arg, 0, 1 << 28);
      o->budget_set = true;
      return 0;
    case KEY_PASS: parse_passes(state, o, arg); return 0;
    case KEY_DTYPE: o->dtype = cli_dtype(state, "--dtype", arg, "f32, f16, bf16, f64"); return 0;
    case KEY_ROUNDS: o->rounds = (int)cli_int(state, "--rounds", arg, 1, 100000); return 0;
    case KEY_SEED: o->seed = cli_seed(state, "--seed", arg); return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
    case ARGP_KEY_END:
      cli_map_check(state, &o->desc, o->budget_set);
      if (!o->pass_set) o->passes[FORWARD] = o->passes[BACKWARD] = true, o->passes[LOSS] = o->desc.kind != EMX_MAP_BUDGET;
      if (o->desc.kind == EMX_MAP_BUDGET && o->passes[LOSS]) argp_error(state, "a budget has no loss: --pass forward,backward");
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

/* What all methods share, and each method's weights. */
typedef struct bench {
  const options *o;
  emx_ctx *ctx;
  char *x, *g, *dx, *p[2];
  double *loss, *s, *want, *grad; /* loss [rows]; float64 rows for the check */
  int32_t *target;
} bench;

static emx_status run(const bench *b, const emx_entmax_desc *desc, int method, int pass) {
  const options *o = b->o;
  const int64_t shape[2] = {o->rows, o->n};
  emx_tensor x = emx_tensor_view(b->x, o->dtype, 2, shape), g = emx_tensor_view(b->g, o->dtype, 2, shape),
             dx = emx_tensor_view(b->dx, o->dtype, 2, shape), p = emx_tensor_view(b->p[method], o->dtype, 2, shape),
             target = emx_tensor_view(b->target, EMX_I32, 1, shape), loss = emx_tensor_view(b->loss, EMX_F64, 1, shape);
  if (pass == LOSS) {
    emx_loss_io io;
    emx_loss_io_init(&io);
    io.x = &x, io.target = &target, io.loss = &loss, io.dx = &dx;
    return emx_entmax_loss(b->ctx, desc, &io);
  }
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.x = &x, io.p = &p, io.dp = &g, io.dx = &dx;
  return pass == FORWARD ? emx_entmax_forward(b->ctx, desc, &io) : emx_entmax_backward(b->ctx, desc, &io);
}

/* Largest error over the first row against float64: of a weight; of a gradient, relative to the largest one; of the loss or a
 * gradient. */
static double check(const bench *b, const emx_entmax_desc *desc, int method, int pass, int64_t *support) {
  const options *o = b->o;
  const int64_t n = o->n;
  double worst = 0, size = 1;
  for (int64_t i = 0; i < n; i++) b->s[i] = emxi_load(pass == BACKWARD ? b->g : b->x, o->dtype, i);
  if (pass == BACKWARD) {
    for (int64_t i = 0; i < n; i++) b->want[i] = emxi_load(b->p[method], o->dtype, i);
    emxi_oracle_backward(b->want, b->s, n, desc->kind, desc->alpha, b->grad);
    size = 0;
    for (int64_t i = 0; i < n; i++) size = fmax(size, fabs(b->grad[i]));
  } else if (pass == LOSS) {
    const double loss = emxi_oracle_loss(b->s, n, desc->kind, desc->alpha, b->target[0], b->grad);
    worst = fabs(loss - b->loss[0]) / (1 + loss);
    b->grad[b->target[0]] -= 1;
  } else if (desc->kind == EMX_MAP_NORMMAX) {
    emxi_oracle_normmax(b->s, n, desc->alpha, b->grad);
  } else if (desc->kind == EMX_MAP_BUDGET) {
    emxi_oracle_budget(b->s, n, desc->alpha, desc->budget, b->grad);
  } else {
    emxi_oracle_entmax(b->s, n, desc->alpha, b->grad, NULL);
  }
  const char *got = pass == FORWARD ? b->p[method] : b->dx;
  *support = 0;
  for (int64_t i = 0; i < n; i++) {
    const double v = emxi_load(got, o->dtype, i);
    if (fabs(v - b->grad[i]) > worst * size) worst = fabs(v - b->grad[i]) / size;
    *support += emxi_load(b->p[method], o->dtype, i) != 0;
  }
  return worst;
}

static int print(const options *o, const emx_entmax_desc *desc, int pass, double *const ms[2], int method, int64_t support,
                 double err) {
  static const char *const kinds[] = {"entmax", "normmax", "budget"};
  const bench_times t = bench_summary(ms[method], o->rounds);
  /* whole tensors; where weights are zero a backward pass does not read dp */
  const double bytes = (pass == BACKWARD ? 3.0 : 2.0) * (double)o->rows * (double)o->n * (double)emx_dtype_size(o->dtype),
               gbps = 1e-6 * bytes / t.median, ratio = bench_ratio(ms[0], ms[method], o->rounds);
  if (o->common.json)
    return cli_json_line(json_pack("{s:s, s:s, s:s, s:I, s:I, s:s, s:f, s:f, s:f, s:f, s:f, s:o, s:I, s:f, s:I, s:f}", "device",
                                   "cpu", "map", method ? kinds[desc->kind] : "softmax", "pass", pass_names[pass], "n",
                                   (json_int_t)o->n, "rows", (json_int_t)o->rows, "dtype", emx_dtype_name(o->dtype), "std",
                                   o->std, "alpha", desc->alpha, "ms", t.median, "ms_min", t.min, "ms_mad", t.mad, "vs_softmax",
                                   cli_json_real(ratio), "bytes", (json_int_t)bytes, "gbps", gbps, "support", (json_int_t)support,
                                   "max_err", err));
  char name[32];
  snprintf(name, sizeof name, method ? "%s %g" : "softmax", kinds[desc->kind], desc->alpha);
  printf("%-14s %-8s %9.3f %9.3f %9.3f %11.2f %9.1f %9lld %9.1e\n", name, pass_names[pass], t.median, t.min, t.mad, ratio, gbps,
         (long long)support, err);
  return CLI_OK;
}

int bench_map(int argc, char **argv) {
  static const struct argp_child children[] = {{&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Times rows of normal scores through softmax and alpha-entmax (or another map), in turn in every round: the map, its "
          "gradient "
          "from the weights, and the loss of a class with its gradient.\v"
          "Median, minimum and median absolute deviation over the rounds; vs_softmax is the median of the ratios within a round, "
          "of the "
          "same pass; GB/s counts whole tensors; support is that of the first row; max_err is the largest error of the first row "
          "against "
          "float64: of a weight, of a gradient relative to the largest, of the loss or its gradient."};
  options o = {.n = 65536, .rows = 64, .std = 1, .dtype = EMX_F32, .rounds = 9, .seed = 1};
  emx_entmax_desc_init(&o.desc);
  cli_parse(&argp, argc, argv, &o);

  bench b = {.o = &o};
  int code = cli_context(&o.common, &b.ctx);
  if (code) return code;
  const size_t es = emx_dtype_size(o.dtype), bytes = (size_t)o.rows * (size_t)o.n * es, row = (size_t)o.n * sizeof(double);
  double *ms[PASSES][2] = {{NULL}};
  float *noise = emxi_alloc((size_t)o.n * sizeof *noise);
  b.x = emxi_alloc(bytes), b.g = emxi_alloc(bytes), b.dx = emxi_alloc(bytes), b.p[0] = emxi_alloc(bytes),
  b.p[1] = emxi_alloc(bytes);
  b.s = emxi_alloc(row), b.want = emxi_alloc(row), b.grad = emxi_alloc(row);
  b.loss = emxi_alloc((size_t)o.rows * sizeof *b.loss), b.target = emxi_alloc((size_t)o.rows * sizeof *b.target);
  bool complete = noise && b.x && b.g && b.dx && b.p[0] && b.p[1] && b.s && b.want && b.grad && b.loss && b.target;
  for (int i = 0; i < 2 * PASSES; i++) complete &= (ms[i / 2][i % 2] = calloc((size_t)o.rounds, sizeof(double))) != NULL;
  if (!complete) {
    code = cli_nomem(5 * bytes, "the rows");
    goto done;
  }
  for (int64_t r = 0; r < o.rows; r++) {
    if (cli_interrupted()) {
      code = CLI_INTERRUPTED;
      goto done;
    }
    emxi_normals(o.seed, (uint64_t)r, noise, o.n);
    for (int64_t i = 0; i < o.n; i++) emxi_store(b.x, o.dtype, r * o.n + i, noise[i] * o.std);
    emxi_normals(o.seed + 1, (uint64_t)r, noise, o.n);
    for (int64_t i = 0; i < o.n; i++) emxi_store(b.g, o.dtype, r * o.n + i, noise[i]);
    b.target[r] = (int32_t)((uint64_t)r * 7919 % (uint64_t)o.n);
  }
  int64_t support[PASSES][2];
  double err[PASSES][2];
  emx_entmax_desc desc[2];
  emx_entmax_desc_init(&desc[0]);
  desc[0].alpha = 1;
  desc[1] = o.desc;
  const int methods = o.desc.kind == EMX_MAP_ENTMAX && o.desc.alpha == 1 ? 1 : 2;
  for (int round = -BENCH_WARMUP; round < o.rounds; round++)
    for (int pass = 0; pass < PASSES; pass++)
      for (int m = 0; m < methods; m++) {
        if (!o.passes[pass] && (pass != FORWARD || round >= 0)) continue; /* backward needs the weights once */
        const double start = cli_seconds();
        CLI_TRY(run(&b, &desc[m], m, pass));
        if (round >= 0)
          ms[pass][m][round] = 1e3 * (cli_seconds() - start);
        else
          err[pass][m] = check(&b, &desc[m], m, pass, &support[pass][m]);
      }
  if (!o.common.json)
    printf("%-14s %-8s %9s %9s %9s %11s %9s %9s %9s\n", "map", "pass", "ms", "min", "mad", "vs_softmax", "GB/s", "support",
           "max_err");
  for (int pass = 0; pass < PASSES; pass++)
    for (int m = 0; m < methods && o.passes[pass] && !code; m++)
      code = print(&o, &desc[m], pass, ms[pass], m, support[pass][m], err[pass][m]);
  if (!code) code = cli_flush();
done:
  emxi_free(b.x), emxi_free(b.g), emxi_free(b.dx), emxi_free(b.p[0]), emxi_free(b.p[1]), emxi_free(noise);
  emxi_free(b.s), emxi_free(b.want), emxi_free(b.grad), emxi_free(b.loss), emxi_free(b.target);
  for (int i = 0; i < 2 * PASSES; i++) free(ms[i / 2][i % 2]);
  emx_ctx_destroy(b.ctx);
  return code;
}
