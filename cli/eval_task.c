/* SPDX-License-Identifier: Apache-2.0
 * emx eval --task: exact match on a synthetic task, a ladder of lengths for every model. */
#include "eval.h"
#include "svg.h"

#include <stdlib.h>

enum { KEY_TASK = 1340, KEY_P_WRITE };
static const struct argp_option option_table[] = {
    {"task", KEY_TASK, "TASK", 0,
     "Exact match on copy, reverse, sort, mqmtar, count, nback, flipflop, parity or retrieval (docs/tasks.md)", 62},
    {"p-write", KEY_P_WRITE, "P", 0, "--task flipflop: share of writes (default 0.8)", 62},
    {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  eval_task_options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT: emx_task_desc_init(&o->task, EMX_TASK_NONE); return 0;
    case KEY_TASK: o->task.kind = cli_task(state, arg); return 0;
    case KEY_P_WRITE:
      o->p_write = true;
      o->task.p_write = cli_real(state, "--p-write", arg, 0, 1);
      return 0;
    case ARGP_KEY_SUCCESS:
      if (o->p_write && o->task.kind != EMX_TASK_FLIPFLOP) argp_error(state, "--p-write needs --task flipflop");
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}
const struct argp eval_task_argp = {.options = option_table, .parser = parse};

/* exact: [n_len], percent */
static int ladder(const eval_common *e, const emx_task_desc *kind, const char *folder, double *exact) {
  emx_model *model = NULL;
  const char *name = emx_task_name(kind->kind);
  const int64_t samples = e->cells->samples ? e->cells->samples : 500;
  int code = CLI_OK;
  CLI_TRY(emx_model_open(e->ctx, folder, &model));
  for (int i = 0; i < e->cells->n_len; i++) {
    emx_task_desc task = *kind;
    emx_task_score score = {.struct_size = sizeof score};
    task.split = EMX_SPLIT_TEST;
    task.seed = e->cells->seed;
    task.min_length = task.max_length = e->cells->len[i];
    char label[64];
    snprintf(label, sizeof label, "%s, length %lld", name, (long long)task.max_length);
    cli_progress progress;
    cli_progress_init(&progress, label);
    code = cli_status(emx_task_evaluate(model, &task, 0, samples, cli_progress_show, &progress, &score));
    cli_progress_end(&progress);
    if (code) goto done;
    const double share = (double)score.exact / (double)score.samples, right = (double)score.right / (double)score.scored;
    exact[i] = 100 * share;
    if (e->json) {
      code = cli_json_line(json_pack("{s:s, s:s, s:I, s:I, s:f, s:f, s:o}", "model", folder, "task", name, "length",
                                     (json_int_t)task.max_length, "samples", (json_int_t)score.samples, "exact", share, "right",
                                     right, "nats", cli_json_real(score.nats)));
    } else {
      printf("%s%s%s, length %lld: %.1f %% of %lld samples exact, %.1f %% of the labels right\n", e->n_models > 1 ? folder : "",
             e->n_models > 1 ? ": " : "", name, (long long)task.max_length, exact[i], (long long)score.samples, 100 * right);
      code = cli_flush();
    }
    if (code) goto done;
  }
done:
  emx_model_close(model);
  return code;
}

/* A line a sample: the tokens up to the one that must be answered, as `emx generate` takes them; with --json all tokens and
 * labels. */
static int show(const eval_common *e, const emx_task_desc *kind) {
  const int64_t samples = e->cells->samples ? e->cells->samples : 1;
  int32_t *tokens = NULL;
  int code = CLI_OK;
  for (int i = 0; i < e->cells->n_len && !code; i++) {
    emx_task_desc task = *kind;
    emx_task_info info = {.struct_size = sizeof info};
    task.split = EMX_SPLIT_TEST;
    task.seed = e->cells->seed;
    task.min_length = task.max_length = e->cells->len[i];
    CLI_TRY(emx_task_get_info(&task, &info));
    free(tokens);
    tokens = malloc(2 * (size_t)info.max_tokens * sizeof *tokens);
    if (!tokens) return cli_nomem(2 * (size_t)info.max_tokens * sizeof *tokens, "a sample");
    int32_t *labels = tokens + info.max_tokens;
    for (int64_t sample = 0; sample < samples && !code; sample++) {
      int64_t n, at = 0;
      CLI_TRY(emx_task_sample(&task, sample, tokens, labels, info.max_tokens, &n));
      if (!e->json) {
        do printf(at ? " %d" : "%d", tokens[at]);
        while (labels[at] == EMX_UNSCORED && ++at < n);
        putchar('\n');
        continue;
      }
      json_t *all = json_array(), *answers = json_array();
      for (; at < n; at++) {
        json_array_append_new(all, json_integer(tokens[at]));
        json_array_append_new(answers, labels[at] == EMX_UNSCORED ? json_null() : json_integer(labels[at]));
      }
      code =
          cli_json_line(json_pack("{s:s, s:I, s:I, s:o, s:o}", "task", emx_task_name(task.kind), "length",
                                  (json_int_t)task.max_length, "sample", (json_int_t)sample, "tokens", all, "labels", answers));
    }
  }
done:
  free(tokens);
  return code;
}

int eval_task(const eval_common *e, const eval_task_options *o) {
  if (e->show) return show(e, &o->task);
  double exact[EVAL_MAX_MODELS][EVAL_MAX_CELLS], x[EVAL_MAX_CELLS];
  svg_series series[EVAL_MAX_MODELS];
  for (int i = 0; i < e->cells->n_len; i++) x[i] = (double)e->cells->len[i];
  for (int m = 0; m < e->n_models; m++) {
    int code = ladder(e, &o->task, e->models[m], exact[m]);
    if (code) return code;
    series[m] = (svg_series){.name = eval_model_name(e->models[m]), .x = x, .y = exact[m], .n = e->cells->n_len, .dots = true};
  }
  if (!e->svg) return CLI_OK;
  char title[96];
  snprintf(title, sizeof title, "Task %s: exact match against length", emx_task_name(o->task.kind));
  const svg_chart chart = {
      .title = title, .x_label = "length", .y_label = "exact (%)", .log_x = true, .series = series, .n = e->n_models};
  return svg_write(e->svg, &chart);
}
