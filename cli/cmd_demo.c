/* SPDX-License-Identifier: Apache-2.0
 * emx demo: prefills a long text once, continues it from forks of that one cache with every selector, then measures for both
 * models how the error falls as more of the cache is read. scripts/demo.sh supplies models and text. */
#define _GNU_SOURCE
#include "cli.h"
#include "session.h"
#include "svg.h"

#include <stdlib.h>
#include <string.h>

typedef struct options {
  cli_common common;
  cli_select select;
  cli_session session;
  const char *model, *softmax, *file, *svg;
  int64_t n, positions;
} options;
enum { KEY_SOFTMAX = 1, KEY_SVG, KEY_POSITIONS };
static const struct argp_option option_table[] = {
    {"model", 'm', "DIR", 0, "The entmax model", 1},
    {"softmax", KEY_SOFTMAX, "DIR", 0, "Its softmax twin, for the picture", 1},
    {"file", 'f', "FILE", 0, "The text; its first -c bytes are read (default 65536)", 1},
    {"predict", 'n', "N", 0, "Tokens every selector generates (default 128)", 1},
    {"positions", KEY_POSITIONS, "N", 0,
     "Tokens after the context over which the errors of the picture are averaged (default 32)", 1},
    {"svg", KEY_SVG, "FILE", 0, "Where the picture goes (default demo.svg)", 1},
    {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT:
      state->child_inputs[0] = &o->session;
      state->child_inputs[1] = &o->select;
      state->child_inputs[2] = &o->common;
      return 0;
    case 'm': o->model = arg; return 0;
    case KEY_SOFTMAX: o->softmax = arg; return 0;
    case 'f': o->file = arg; return 0;
    case 'n': o->n = cli_int(state, "-n", arg, 1, 1 << 20); return 0;
    case KEY_POSITIONS: o->positions = cli_int(state, "--positions", arg, 1, 1 << 20); return 0;
    case KEY_SVG: o->svg = arg; return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
    case ARGP_KEY_END:
      if (!o->model || !o->file) argp_error(state, "-m DIR and -f FILE are required");
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

/* A model with the text in its cache. */
typedef struct reader {
  emx_model *model;
  emx_model_config config;
  emx_session *base;
  float *logits; /* [vocab] after the text */
  char label[48];
} reader;

static int read_text(const options *o, emx_ctx *ctx, const char *folder, const char *text, reader *r) {
  int code;
  CLI_TRY(emx_model_open(ctx, folder, &r->model));
  r->config.struct_size = sizeof r->config;
  CLI_TRY(emx_model_get_config(r->model, &r->config));
  if (folder == o->softmax && r->config.entmax_alpha != 1) {
    code = cli_fail("--softmax %s: its alpha is %g, not 1", folder, r->config.entmax_alpha);
    goto done;
  }
  if (r->config.entmax_alpha == 1)
    snprintf(r->label, sizeof r->label, "softmax");
  else
    snprintf(r->label, sizeof r->label, "entmax %g", r->config.entmax_alpha);
  cli_session room = o->session;
  room.ctx = 0; /* the text, and the tails of two forks at a time */
  const int64_t tail = (o->n > o->positions ? o->n : o->positions) + o->session.page;
  if ((code = session_open(r->model, &room, &o->select, o->session.ctx + 2 * tail, &r->base))) goto done;
  r->logits = malloc((size_t)r->config.vocab_size * sizeof *r->logits);
  if (!r->logits) {
    code = cli_nomem((size_t)r->config.vocab_size * sizeof *r->logits, "logits");
    goto done;
  }
  char label[80];
  snprintf(label, sizeof label, "%s reads the text", r->label);
  double start = cli_seconds();
  code = session_prefill(r->base, &r->config, text, (size_t)o->session.ctx, NULL, r->logits, label);
  if (!code) cli_warn("%s read %lld bytes in %.1f s", r->label, (long long)o->session.ctx, cli_seconds() - start);
done:
  return code;
}
static void reader_close(reader *r) {
  free(r->logits);
  emx_session_destroy(r->base);
  emx_model_close(r->model);
}
static int fork_with(const reader *r, const emx_select_desc *select, emx_session **out) {
  int code = cli_status(emx_session_fork(r->base, out));
  if (!code) code = cli_status(emx_session_set_select(*out, select));
  if (!code) emx_session_reset_stats(*out);
  return code;
}

/* ---- generation */

static int generate(const options *o, const reader *r, const emx_select_desc *select, char *text, session_summary *sum) {
  emx_session *s = NULL;
  const size_t bytes = (size_t)r->config.vocab_size * sizeof(float);
  float *logits = malloc(bytes);
  emx_sample_opts sample;
  emx_sample_opts_init(&sample);
  cli_progress progress;
  cli_progress_init(&progress, cli_select_name(select->kind));
  int code = logits ? fork_with(r, select, &s) : cli_nomem(bytes, "logits");
  if (code) goto done;
  memcpy(logits, r->logits, bytes);
  for (int64_t i = 0; i < o->n; i++) {
    int32_t token;
    CLI_TRY(emx_sample(logits, r->config.vocab_size, &sample, i, &token));
    text[i] = (char)token;
    CLI_TRY(emx_session_decode(s, token, logits));
    cli_progress_text(&progress, i + 1, o->n, NULL);
  }
  code = session_summarize(s, sum);
done:
  cli_progress_end(&progress);
  emx_session_destroy(s);
  free(logits);
  return code;
}

static int generate_all(const options *o, const reader *r) {
  char *dense = malloc((size_t)o->n), *text = malloc((size_t)o->n);
  int code = dense && text ? CLI_OK : cli_nomem((size_t)o->n * 2, "text");
  if (!code && !o->common.json)
    printf("%-10s %10s %14s %10s %9s %12s %10s  %s\n", "selector", "tokens/s", "attention ms", "K/V read", "support",
           "delta_bound", "certified", "same text as all");
  for (int i = 0; i < o->select.n && !code; i++) {
    session_summary sum;
    const emx_select_desc *select = &o->select.desc[i];
    char name[32];
    cli_select_label(select, name);
    code = generate(o, r, select, i ? text : dense, &sum);
    if (code) break;
    const char *mine = i ? text : dense;
    const bool same = !memcmp(mine, dense, (size_t)o->n);
    if (o->common.json) {
      json_t *j = session_json(&sum, select);
      if (j) {
        json_object_set_new(j, "tokens", json_integer(o->n));
        json_object_set_new(j, "same_text", json_boolean(same));
        json_object_set_new(j, "text", cli_json_text(mine, (size_t)o->n));
      }
      code = cli_json_line(j);
    } else {
      printf("%-10s %10.1f %14.3f %9.2f%% %9.1f %12.2g %9.1f%%  %s\n", name, sum.tok_per_s, sum.attn_ms_per_tok,
             100 * sum.bytes_share, sum.support_mean, sum.delta_bound_max, 100 * sum.certified_share,
             i ? same ? "yes" : "no" : "-");
      code = cli_flush();
    }
  }
  if (!code && !o->common.json) {
    printf("\nText of `all`:\n%.*s\n\n", (int)o->n, dense);
    code = cli_flush();
  }
  free(dense);
  free(text);
  return code;
}

/* ---- error against bytes */

enum { MAX_POINTS = 16 };
typedef struct points {
  double share[MAX_POINTS], error[MAX_POINTS];
  int n;
} points;

/* Mean KL divergence against ALL, and the share of bytes, per budget of TOPK; the last entry is GAUSSIAN where there is one. */
static int sweep(const options *o, const reader *r, const char *next, points *topk, points *gaussian) {
  int32_t *tokens = NULL;
  session_reference reference = {0};
  int code = session_tokens(&r->config, next, (size_t)o->positions, &tokens);
  if (!code) code = session_reference_open(r->base, tokens, o->positions, r->config.vocab_size, &reference);
  static const int64_t budgets[] = {64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const int n = sizeof budgets / sizeof *budgets;
  for (int i = 0; i <= n && !code; i++) {
    points *into = i < n ? topk : gaussian;
    if (i == n && r->config.entmax_alpha == 1) break; /* softmax has no threshold to estimate */
    if (i < n && budgets[i] >= o->session.ctx) continue;
    emx_select_desc select;
    emx_select_desc_init(&select);
    select.kind = i < n ? EMX_SELECT_TOPK : EMX_SELECT_GAUSSIAN;
    if (i < n) select.budget = budgets[i];
    session_difference d;
    code = session_reference_compare(&reference, &select, &d);
    if (code) break;
    into->share[into->n] = 100 * d.stats.bytes_share;
    into->error[into->n++] = fmax(d.kl, 1e-9); /* the logarithmic axis needs an end */
    if (o->common.json)
      code = cli_json_line(json_pack("{s:s, s:s, s:I, s:f, s:f}", "model", r->label, "select", cli_select_name(select.kind),
                                     "budget", (json_int_t)(i < n ? budgets[i] : 0), "bytes_share", d.stats.bytes_share, "kl",
                                     d.kl));
  }
  session_reference_close(&reference);
  free(tokens);
  return code;
}

static int draw(const options *o, const points p[3], const reader r[2]) {
  char names[3][80];
  svg_series series[3];
  int n = 0;
  for (int i = 0; i < 3; i++) {
    snprintf(names[i], sizeof names[i], "%s, %s", r[i == 1].label, i == 2 ? "gaussian" : "top-k budgets");
    if (p[i].n)
      series[n++] = (svg_series){.name = names[i], .x = p[i].share, .y = p[i].error, .n = p[i].n, .dots = true, .dashed = i == 1};
  }
  char title[160];
  snprintf(title, sizeof title, "Reading less of the cache: error after %lld bytes of text (mean of %lld tokens)",
           (long long)o->session.ctx, (long long)o->positions);
  svg_chart chart = {.title = title,
                     .x_label = "share of K and V bytes read (%), summaries included",
                     .y_label = "KL of the next token against all (nats)",
                     .log_x = true,
                     .log_y = true,
                     .series = series,
                     .n = n};
  return svg_write(o->svg, &chart);
}

int cmd_demo(int argc, char **argv) {
  static const struct argp_child children[] = {
      {&cli_session_argp, 0, NULL, 0}, {&cli_select_argp, 0, NULL, 0}, {&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Reads the first -c bytes of a text into one cache, continues it greedily with every selector from forks of that "
          "cache, and "
          "draws the error of reading only part of the cache, entmax beside softmax. `make demo` supplies models and text."};
  options o = {.n = 128, .positions = 32, .svg = "demo.svg"};
  cli_select_init(&o.select);
  o.select.n = 3;
  o.select.desc[1].kind = EMX_SELECT_TOPK;
  o.select.desc[2].kind = EMX_SELECT_GAUSSIAN;
  cli_session_init(&o.session);
  o.session.ctx = 65536;
  cli_parse(&argp, argc, argv, &o);
  if (o.select.desc[0].kind != EMX_SELECT_ALL) {
    cli_warn("--select must begin with all: the others are compared with it");
    return CLI_USAGE;
  }

  emx_ctx *ctx = NULL;
  reader readers[2] = {0};
  points p[3] = {0}; /* entmax top-k, softmax top-k, entmax gaussian */
  char *text = NULL;
  size_t size;
  int code = cli_check_out(o.svg);
  if (code || (code = cli_read_file(o.file, &text, &size))) return code;
  if (size < (size_t)o.session.ctx + (size_t)o.positions) {
    code = cli_fail("%s has %zu bytes, %lld are needed", o.file, size, (long long)(o.session.ctx + o.positions));
    goto done;
  }
  if ((code = cli_context_on(&o.common, o.session.device, &ctx))) goto done;
  if ((code = read_text(&o, ctx, o.model, text, &readers[0]))) goto done;
  if ((code = generate_all(&o, &readers[0]))) goto done;
  const char *next = text + o.session.ctx;
  if ((code = sweep(&o, &readers[0], next, &p[0], &p[2]))) goto done;
  if (o.softmax) {
    if ((code = read_text(&o, ctx, o.softmax, text, &readers[1]))) goto done;
    if ((code = sweep(&o, &readers[1], next, &p[1], &p[1]))) goto done;
  }
  code = draw(&o, p, readers);
  if (!code) cli_warn("picture: %s", o.svg);
done:
  reader_close(&readers[0]);
  reader_close(&readers[1]);
  free(text);
  emx_ctx_destroy(ctx);
  return code;
}
