/* SPDX-License-Identifier: Apache-2.0
 * emx map: rows of numbers on standard input, their alpha-entmax on standard output. */
#define _GNU_SOURCE
#include "cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
  cli_common common;
  double alpha;
} options;
static const struct argp_option option_table[] = {{"alpha", 'a', "A", 0, "1 (softmax) to 4 (default 1.5)", 1}, {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &o->common; return 0;
    case 'a': o->alpha = cli_real(state, "--alpha", arg, 1, 4); return 0;
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

int cmd_map(int argc, char **argv) {
  static const struct argp_child children[] = {{&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Reads rows of numbers from standard input (one a line; blanks or commas between; -inf masks) and prints the "
          "alpha-entmax weights of each, computed in float64.\v"
          "With --json a line is {\"tau\": threshold in units of (alpha-1) x score, null at alpha = 1, \"support\": nonzero "
          "weights, "
          "\"p\": weights}."};
  options o = {.alpha = 1.5};
  cli_parse(&argp, argc, argv, &o);

  emx_ctx *ctx = NULL;
  double *x = NULL, *p = NULL;
  char *line = NULL;
  size_t line_room = 0;
  int64_t room = 0;
  int code = cli_context(&o.common, &ctx);
  if (code) return code;
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  desc.alpha = o.alpha;
  long number = 0;
  ssize_t length;
  for (errno = 0; (length = getline(&line, &line_room, stdin)) >= 0; errno = 0) {
    int64_t n;
    number++;
    if ((code = read_row(line, (size_t)length, number, &x, &n, &room))) goto done;
    if (!n) continue; /* an empty line separates */
    double *grown = realloc(p, (size_t)n * sizeof *p), tau;
    if (!grown) {
      code = cli_nomem((size_t)n * sizeof *p, "a row");
      goto done;
    }
    p = grown;
    int32_t support;
    int64_t shape[2] = {1, n};
    emx_tensor tx = emx_tensor_view(x, EMX_F64, 2, shape), tp = emx_tensor_view(p, EMX_F64, 2, shape),
               tt = emx_tensor_view(&tau, EMX_F64, 1, shape), ts = emx_tensor_view(&support, EMX_I32, 1, shape);
    emx_entmax_io io;
    emx_entmax_io_init(&io);
    io.x = &tx;
    io.p = &tp;
    io.tau = &tt;
    io.support = &ts;
    CLI_TRY(emx_entmax_forward(ctx, &desc, &io));
    if (o.common.json) {
      json_t *weights = json_array();
      for (int64_t i = 0; i < n; i++) json_array_append_new(weights, cli_json_real(p[i]));
      json_t *out = json_object();
      json_object_set_new(out, "tau", cli_json_real(tau));
      json_object_set_new(out, "support", json_integer(support));
      json_object_set_new(out, "p", weights);
      if (json_dumpf(out, stdout, JSON_COMPACT | JSON_REAL_PRECISION(17)) || putchar('\n') == EOF)
        code = cli_fail("cannot write to standard output");
      json_decref(out);
      if (code) goto done;
    } else {
      for (int64_t i = 0; i < n; i++) printf("%s%.9g", i ? " " : "", p[i]);
      putchar('\n');
    }
  }
  if (ferror(stdin)) {
    code = cli_fail("cannot read standard input: %s", strerror(errno));
    goto done;
  }
  code = number ? cli_flush() : cli_fail("standard input is empty, expected rows of numbers");
done:
  free(line);
  free(x);
  free(p);
  emx_ctx_destroy(ctx);
  return code;
}
