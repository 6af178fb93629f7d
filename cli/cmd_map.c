/* SPDX-License-Identifier: Apache-2.0
 * emx map: rows of numbers on standard input, their weights (alpha-entmax, normmax, budget) or losses on standard output. */
#define _GNU_SOURCE
#include "cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
  cli_common common;
  emx_entmax_desc desc;
  bool budget_set, loss;
} options;
enum { KEY_KIND = 1, KEY_BUDGET, KEY_LOSS };
static const struct argp_option option_table[] = {
    {"alpha", 'a', "A", 0, "1 (softmax) to 4, normmax to 1000 (default 1.5)", 1},
    {"kind", KEY_KIND, "K", 0, "entmax (default), normmax (alpha-normmax) or budget (weights up to 1 that sum to --budget)", 1},
    {"budget", KEY_BUDGET, "B", 0, "With --kind budget: sum of a row's weights (default 1)", 1},
    {"loss", KEY_LOSS, 0, 0, "A row begins with a class, 0 for its first score; prints the Fenchel-Young loss", 1},
    {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &o->common; return 0;
    case 'a': o->desc.alpha = cli_real(state, "--alpha", arg, 1, 1000); return 0;
    case KEY_KIND: o->desc.kind = cli_map_kind(state, arg); return 0;
    case KEY_BUDGET:
      o->desc.budget = cli_real(state, "--budget", arg, 0, 1 << 28);
      o->budget_set = true;
      return 0;
    case KEY_LOSS: o->loss = true; return 0;
    case ARGP_KEY_END:
      cli_map_check(state, &o->desc, o->budget_set);
      if (o->loss && o->desc.kind == EMX_MAP_BUDGET) argp_error(state, "--loss has one class, a budget is several");
      return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s': rows are read from standard input", arg); return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

/* Numbers of one line, separated by blanks or commas. -inf is a number here, as a mask; what overflows to it is not. */
static int read_row(const char *line, size_t length, long number, double **row, int64_t *n, int64_t *room) {
  *n = 0;
  if (strlen(line) != length) return cli_fail("line %ld holds a NUL byte", number);
  for (const char *p = line;;) {
    p += strspn(p, " \t,\r\n");
    if (!*p) return CLI_OK;
    char *end;
    errno = 0;
    double v = strtod(p, &end);
    if (end == p || !strchr(" \t,\r\n", *end))
      return cli_fail("line %ld: '%.*s' is no number", number, (int)strcspn(p, " \t,\r\n"), p);
    if (!isfinite(v) && (v != -INFINITY || errno == ERANGE))
      return cli_fail("line %ld: '%.*s' is not finite; only -inf is allowed, which masks", number, (int)(end - p), p);
    if (*n == *room) {
      int64_t more = *room ? 2 * *room : 1024;
      double *grown = realloc(*row, (size_t)more * sizeof **row);
      if (!grown) return cli_nomem((size_t)more * sizeof **row, "a row");
      *row = grown;
      *room = more;
    }
    (*row)[(*n)++] = v;
    p = end;
  }
}

/* One row's results. */
typedef struct result {
  double tau, loss;
  int32_t support;
  double *p, *dx; /* [n]; dx with --loss */
} result;

static emx_status compute(emx_ctx *ctx, const options *o, double *x, int64_t n, int32_t class, result *r) {
  const int64_t shape[2] = {1, n};
  emx_tensor tx = emx_tensor_view(x, EMX_F64, 2, shape), tp = emx_tensor_view(r->p, EMX_F64, 2, shape),
             tt = emx_tensor_view(&r->tau, EMX_F64, 1, shape), ts = emx_tensor_view(&r->support, EMX_I32, 1, shape);
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.x = &tx, io.p = &tp, io.tau = &tt, io.support = &ts;
  emx_status status = emx_entmax_forward(ctx, &o->desc, &io);
  if (status || !o->loss) return status;
  emx_tensor ty = emx_tensor_view(&class, EMX_I32, 1, shape), tl = emx_tensor_view(&r->loss, EMX_F64, 1, shape),
             td = emx_tensor_view(r->dx, EMX_F64, 2, shape);
  emx_loss_io loss;
  emx_loss_io_init(&loss);
  loss.x = &tx, loss.target = &ty, loss.loss = &tl, loss.dx = &td;
  return emx_entmax_loss(ctx, &o->desc, &loss);
}

static json_t *numbers(const double *v, int64_t n) {
  json_t *array = json_array();
  for (int64_t i = 0; i < n; i++) json_array_append_new(array, cli_json_real(v[i]));
  return array;
}

static int print(const options *o, const result *r, int64_t n) {
  if (!o->common.json) {
    if (o->loss) {
      printf("%.9g\n", r->loss);
    } else {
      for (int64_t i = 0; i < n; i++) printf("%s%.9g", i ? " " : "", r->p[i]);
      putchar('\n');
    }
    return CLI_OK;
  }
  json_t *out = json_object();
  json_object_set_new(out, "tau", cli_json_real(r->tau));
  json_object_set_new(out, "support", json_integer(r->support));
  json_object_set_new(out, "p", numbers(r->p, n));
  if (o->loss) {
    json_object_set_new(out, "loss", cli_json_real(r->loss));
    json_object_set_new(out, "dx", numbers(r->dx, n));
  }
  const bool lost = json_dumpf(out, stdout, JSON_COMPACT | JSON_REAL_PRECISION(17)) || putchar('\n') == EOF;
  json_decref(out);
  return lost ? cli_fail("cannot write to standard output") : CLI_OK;
}

int cmd_map(int argc, char **argv) {
  static const struct argp_child children[] = {{&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Reads rows of numbers from standard input (one a line; blanks or commas between; -inf masks) and prints the "
          "weights of each, or with --loss its loss, computed in float64.\v"
          "With --json a line is {\"tau\": threshold in units of (alpha-1) x score (normmax: of the score), null at alpha = 1, "
          "\"support\": nonzero weights, \"p\": weights}; with --loss also \"loss\" (null where the class is masked: infinite) "
          "and "
          "\"dx\", its gradient p - e_class."};
  options o = {.loss = false};
  emx_entmax_desc_init(&o.desc);
  cli_parse(&argp, argc, argv, &o);

  emx_ctx *ctx = NULL;
  double *row = NULL;
  result r = {0};
  char *line = NULL;
  size_t line_room = 0;
  int64_t room = 0;
  int code = cli_context(&o.common, &ctx);
  if (code) return code;
  long number = 0;
  ssize_t length;
  for (errno = 0; (length = getline(&line, &line_room, stdin)) >= 0; errno = 0) {
    int64_t n;
    number++;
    if ((code = read_row(line, (size_t)length, number, &row, &n, &room))) goto done;
    if (!n) continue; /* an empty line separates */
    double *x = row;
    int32_t class = 0;
    if (o.loss) {
      x++;
      n--;
      if (!n)
        code = cli_fail("line %ld has a class but no scores", number);
      else if (!(row[0] >= 0 && row[0] < (double)n && row[0] == floor(row[0])))
        code = cli_fail("line %ld: the class is %.9g, expected an integer from 0 to %lld", number, row[0], (long long)n - 1);
      if (code) goto done;
      class = (int32_t)row[0];
    }
    if (o.desc.kind == EMX_MAP_BUDGET && o.desc.budget > (double)n) {
      code = cli_fail("line %ld has %lld scores of weight at most 1, less than the budget of %g", number, (long long)n,
                      o.desc.budget);
      goto done;
    }
    double *grown = realloc(r.p, 2 * (size_t)n * sizeof *r.p);
    if (!grown) {
      code = cli_nomem(2 * (size_t)n * sizeof *r.p, "a row");
      goto done;
    }
    r.p = grown;
    r.dx = grown + n;
    CLI_TRY(compute(ctx, &o, x, n, class, &r));
    if ((code = print(&o, &r, n))) goto done;
  }
  if (ferror(stdin)) {
    code = cli_fail("cannot read standard input: %s", strerror(errno));
    goto done;
  }
  code = number ? cli_flush() : cli_fail("standard input is empty, expected rows of numbers");
done:
  free(line);
  free(row);
  free(r.p);
  emx_ctx_destroy(ctx);
  return code;
}
