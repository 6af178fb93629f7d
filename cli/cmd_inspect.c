/* SPDX-License-Identifier: Apache-2.0
 * emx inspect: which tokens every head attends to while a model reads the end of a prompt and continues it, as a page. */
#define _GNU_SOURCE
#include "cli.h"
#include "page.h"
#include "session.h"

#include <stdlib.h>
#include <string.h>

typedef struct options {
  cli_common common;
  cli_select select;
  cli_session session;
  const char *model, *prompt, *file, *out;
  int64_t n, queries, keep;
} options;
enum { KEY_QUERIES = 1, KEY_KEEP };
static const struct argp_option option_table[] = {
    {"model", 'm', "DIR", 0, "The model folder", 1},
    {"prompt", 'p', "TEXT", 0, "The prompt", 1},
    {"file", 'f', "FILE", 0, "Read the prompt from FILE (- is standard input)", 1},
    {"prompt-file", 'f', NULL, OPTION_ALIAS, NULL, 1},
    {"predict", 'n', "N", 0, "Tokens to generate, each the most probable one (default 16)", 1},
    {"tokens", 'n', NULL, OPTION_ALIAS, NULL, 1},
    {"out", 'o', "FILE", 0, "Write the page to FILE", 1},
    {"queries", KEY_QUERIES, "N", 0,
     "Show the last N tokens of the prompt too, the last of which makes the first new one (default 1; all, if it has fewer)", 1},
    {"keep", KEY_KEEP, "N", 0, "Tokens of a head and step that the page holds, the heaviest ones; sizes count all (default 1024)",
     1},
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
    case 'p': o->prompt = arg; return 0;
    case 'f': o->file = arg; return 0;
    case 'n': o->n = cli_int(state, "-n", arg, 0, 1 << 20); return 0;
    case 'o': o->out = arg; return 0;
    case KEY_QUERIES: o->queries = cli_int(state, "--queries", arg, 0, 1 << 20); return 0;
    case KEY_KEEP: o->keep = cli_int(state, "--keep", arg, 1, 1 << 20); return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
    case ARGP_KEY_END:
      cli_session_needs_cpu(state, &o->session, "this command");
      if (!o->model) argp_error(state, "-m DIR is required");
      if (!o->prompt == !o->file) argp_error(state, "one of -p TEXT and -f FILE is required");
      if (!o->out && !o->common.json) argp_error(state, "-o FILE is required, or --json for the lists themselves");
      if (!o->queries && o->n < 2) argp_error(state, "nothing to show: --queries is 0 and the first new token needs the second");
      return 0;
    case ARGP_KEY_SUCCESS:
      if (o->select.n > 1) argp_error(state, "--select takes one selector here");
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

typedef struct inspection {
  const options *o;
  emx_session *session;
  emx_model_config config;
  emx_session_support support;
  page_rows rows;
  int32_t *tokens; /* [n] the prompt, then what was made */
  int64_t n_prompt, n;
  int64_t *steps; /* [n_steps] positions of the tokens whose lists were taken */
  int64_t n_steps, n_lists;
  double sizes;
} inspection;

static json_t *list_json(const inspection *x, int32_t layer, int32_t head, int64_t position) {
  const int64_t row = (int64_t)layer * x->config.num_heads + head, from = row * x->support.capacity;
  const emx_report *r = &x->support.reports[row];
  json_t *index = json_array(), *weight = json_array();
  for (int32_t i = 0; i < x->support.count[row]; i++) {
    json_array_append_new(index, json_integer(x->support.index[from + i]));
    json_array_append_new(weight, json_real((double)x->support.weight[from + i]));
  }
  return json_pack("{s:I, s:i, s:i, s:i, s:i, s:o, s:f, s:b, s:o, s:o}", "position", (json_int_t)position, "token",
                   x->tokens[position], "layer", layer, "head", head, "support", x->support.count[row], "tau",
                   cli_json_real((double)r->tau), "delta_bound", (double)r->delta_bound, "certified",
                   (r->flags & EMX_REPORT_CERTIFIED) != 0, "index", index, "weight", weight);
}

/* Reads the token at `position` and takes the lists. */
static int step(inspection *x, int64_t position, float *logits) {
  int code = cli_status(emx_session_decode(x->session, x->tokens[position], logits));
  x->steps[x->n_steps++] = position;
  for (int32_t l = 0; l < x->config.num_layers && !code; l++)
    for (int32_t h = 0; h < x->config.num_heads && !code; h++) {
      const int64_t row = (int64_t)l * x->config.num_heads + h;
      if (x->o->out)
        code = page_add(&x->rows, &x->support.reports[row], x->support.index + row * x->support.capacity,
                        x->support.weight + row * x->support.capacity, x->support.count[row]);
      if (!code && x->o->common.json) code = cli_json_line(list_json(x, l, h, position));
      x->sizes += x->support.count[row];
      x->n_lists++;
    }
  return code;
}

/* Everything of the page but the lists. */
static json_t *head_json(const inspection *x) {
  const options *o = x->o;
  const char *from = o->file ? o->file : "a prompt";
  json_t *steps = json_array();
  for (int64_t i = 0; i < x->n_steps; i++) json_array_append_new(steps, json_integer(x->steps[i]));
  char label[32];
  json_t *head = json_pack("{s:i, s:o, s:o, s:s, s:f, s:i, s:i, s:I, s:I, s:I, s:o}", "version", 1, "model",
                           cli_json_text(o->model, strlen(o->model)), "source", cli_json_text(from, strlen(from)), "select",
                           cli_select_label(o->select.desc, label), "alpha", x->config.entmax_alpha, "layers",
                           x->config.num_layers, "heads", x->config.num_heads, "tokens", (json_int_t)x->n, "prompt",
                           (json_int_t)x->n_prompt, "keep", (json_int_t)o->keep, "steps", steps);
  if (!head) return NULL;
  if (!x->config.task) {
    unsigned char *bytes = malloc((size_t)x->n + 1);
    for (int64_t i = 0; bytes && i < x->n; i++) bytes[i] = (unsigned char)x->tokens[i];
    json_object_set_new(head, "bytes", bytes ? page_base64(bytes, (size_t)x->n) : NULL);
    free(bytes);
    return head;
  }
  emx_task_desc task;
  emx_task_info info = {.struct_size = sizeof info};
  emx_task_desc_init(&task, x->config.task);
  const bool named = !emx_task_get_info(&task, &info);
  json_t *labels = json_array();
  for (int64_t i = 0; i < x->n; i++) {
    const int32_t t = x->tokens[i];
    char number[16];
    snprintf(number, sizeof number, "%d", t);
    json_array_append_new(labels, json_string(!named          ? number
                                              : t == info.bos ? "bos"
                                              : t == info.eos ? "eos"
                                              : t == info.sep ? "sep"
                                              : t == info.pad ? "pad"
                                                              : number));
  }
  json_object_set_new(head, "labels", labels);
  return head;
}

static int finish(const inspection *x) {
  const options *o = x->o;
  size_t bytes = 0;
  int code = o->out ? page_write(o->out, head_json(x), &x->rows, &bytes) : CLI_OK;
  if (code) return code;
  const double mean = x->n_lists ? x->sizes / (double)x->n_lists : 0;
  if (o->common.json)
    return cli_json_line(json_pack("{s:o, s:I, s:I, s:I, s:I, s:f}", "page",
                                   o->out ? cli_json_text(o->out, strlen(o->out)) : json_null(), "bytes", (json_int_t)bytes,
                                   "tokens", (json_int_t)x->n, "steps", (json_int_t)x->n_steps, "lists", (json_int_t)x->n_lists,
                                   "support_mean", mean));
  fprintf(stderr, "%s: %.1f KB, %lld tokens, %lld steps, %lld lists of %.1f tokens on average\n", o->out, (double)bytes / 1e3,
          (long long)x->n, (long long)x->n_steps, (long long)x->n_lists, mean);
  return CLI_OK;
}

int cmd_inspect(int argc, char **argv) {
  static const struct argp_child children[] = {
      {&cli_session_argp, 0, NULL, 0}, {&cli_select_argp, 0, NULL, 0}, {&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Reads a prompt, continues it, and writes a page that shows which tokens every head attended to, with which weights: "
          "one HTML file that needs nothing else.\v"
          "The page shows one step at a time, a token and what its heads looked at, or one head over all steps. Drag and wheel "
          "move and zoom, arrow keys change step and head, ? lists the keys. With --json every list is printed, a line each for "
          "every step, layer and head, with all tokens and exact weights; the last line describes the page. Prompts of a model "
          "of a task are token numbers (`emx eval --task T --show`)."};
  options o = {.n = 16, .queries = 1, .keep = 1024};
  cli_select_init(&o.select);
  cli_session_init(&o.session);
  cli_parse(&argp, argc, argv, &o);

  emx_ctx *ctx = NULL;
  emx_model *model = NULL;
  inspection x = {.o = &o, .config = {.struct_size = sizeof x.config}, .rows = {.keep = o.keep}};
  x.support.struct_size = sizeof x.support;
  char *prompt = NULL;
  int32_t *given = NULL;
  float *logits = NULL;
  size_t size = 0;
  int code = cli_check_out(o.out);
  if (code) return code;
  if (o.file && (code = cli_read_file(o.file, &prompt, &size))) return code;
  if (!o.file) size = strlen(o.prompt);
  if (!size) {
    code = cli_fail("the prompt is empty");
    goto done;
  }
  if ((code = cli_context(&o.common, &ctx))) goto done;
  CLI_TRY(emx_model_open(ctx, o.model, &model));
  CLI_TRY(emx_model_get_config(model, &x.config));
  if ((code = session_prompt(&x.config, o.file ? prompt : o.prompt, size, &given, &x.n_prompt))) goto done;
  if (o.queries > x.n_prompt) o.queries = x.n_prompt;
  if ((code = session_open(model, &o.session, &o.select, x.n_prompt + o.n, &x.session))) goto done;
  CLI_TRY(emx_session_set_select(x.session, o.select.desc));
  const size_t heads = (size_t)x.config.num_layers * (size_t)x.config.num_heads, most = (size_t)(x.n_prompt + o.n);
  x.support.capacity = (int64_t)most;
  x.support.index = calloc(heads * most, sizeof *x.support.index); /* pages of memory that no list reaches are never touched */
  x.support.weight = calloc(heads * most, sizeof *x.support.weight);
  x.support.count = calloc(heads, sizeof *x.support.count);
  x.support.reports = calloc(heads, sizeof *x.support.reports);
  x.tokens = malloc(most * sizeof *x.tokens);
  x.steps = malloc(most * sizeof *x.steps);
  logits = malloc((size_t)x.config.vocab_size * sizeof *logits);
  if (!x.support.index || !x.support.weight || !x.support.count || !x.support.reports || !x.tokens || !x.steps || !logits) {
    code = cli_nomem(heads * most * 8, "the lists");
    goto done;
  }
  memcpy(x.tokens, given, (size_t)x.n_prompt * sizeof *given);
  const int64_t dense = x.n_prompt - o.queries, total = o.queries + (o.n > 1 ? o.n - 1 : 0);
  if (dense && (code = session_prefill_tokens(x.session, x.tokens, dense, NULL, logits, "prefill"))) goto done;
  CLI_TRY(emx_session_set_support(x.session, &x.support));
  cli_progress bar;
  cli_progress_init(&bar, "inspect");
  for (x.n = dense; x.n < x.n_prompt && !code; x.n++) {
    code = step(&x, x.n, logits);
    cli_progress_show(&bar, x.n_steps, total);
  }
  while (x.n < x.n_prompt + o.n && !code) {
    x.tokens[x.n++] = logits_best(logits, x.config.vocab_size);
    if (x.n == x.n_prompt + o.n) break; /* nothing is drawn after the last one: it is not read */
    code = step(&x, x.n - 1, logits);
    cli_progress_show(&bar, x.n_steps, total);
  }
  cli_progress_end(&bar);
  if (!code && cli_interrupted()) code = CLI_INTERRUPTED;
  if (!code) code = finish(&x);
done:
  free(prompt);
  free(given);
  free(logits);
  free(x.tokens);
  free(x.steps);
  free(x.support.index);
  free(x.support.weight);
  free(x.support.count);
  free(x.support.reports);
  page_free(&x.rows);
  emx_session_destroy(x.session);
  emx_model_close(model);
  emx_ctx_destroy(ctx);
  return code;
}
