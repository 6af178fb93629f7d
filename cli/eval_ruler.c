/* SPDX-License-Identifier: Apache-2.0
 * emx eval --ruler: long-context questions (src/train/ruler.h), scored by what a model says and by what it would choose. */
#define _GNU_SOURCE
#include "eval.h"
#include "svg.h"

#include "model/model.h"
#include "train/ruler.h"

#include <stdlib.h>
#include <string.h>

/* ---- options */

enum { KEY_LEN = 1301, KEY_SAMPLES, KEY_SEED, KEY_RULER = 1321, KEY_DEPTH, KEY_SHOW };
static const struct argp_option cells_options[] = {
    {NULL, 0, NULL, 0, "Generated tests:", 60},
    {"len", KEY_LEN, "L,...", 0, "Lengths (--ruler: bytes of a prompt, 1024 and 4096 by default)", 60},
    {"samples", KEY_SAMPLES, "N", 0, "Samples of every cell (default: --ruler 20, --task 500)", 60},
    {"seed", KEY_SEED, "S", 0, "Sample i depends on the seed, its cell and i alone (default 1)", 60},
    {0}};
static error_t parse_cells(int key, char *arg, struct argp_state *state) {
  eval_cells *c = state->input;
  switch (key) {
    case ARGP_KEY_INIT: c->seed = 1; return 0;
    case KEY_LEN:
      c->n_len = 0;
      c->set = "--len";
      for (char *rest, *text = strtok_r(arg, ",", &rest); text; text = strtok_r(NULL, ",", &rest)) {
        if (c->n_len == EVAL_MAX_CELLS) argp_error(state, "--len: more than %d lengths", EVAL_MAX_CELLS);
        c->len[c->n_len++] = cli_int(state, "--len", text, 1, INT32_MAX / 2);
      }
      if (!c->n_len) argp_error(state, "--len: no length");
      return 0;
    case KEY_SAMPLES:
      c->samples = cli_int(state, "--samples", arg, 1, 1 << 30);
      c->set = "--samples";
      return 0;
    case KEY_SEED:
      c->seed = cli_seed(state, "--seed", arg);
      c->set = "--seed";
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}
const struct argp eval_cells_argp = {.options = cells_options, .parser = parse_cells};

static const struct argp_option ruler_options[] = {
    {"ruler", KEY_RULER, "T,...", 0,
     "Questions on long contexts instead of a text's bits: niah, multikey, multivalue, multiquery, tracking, frequent, passkey, "
     "or all; "
     "-f FILE is the haystack (default: a text built in)",
     61},
    {"depth", KEY_DEPTH, "P,...", 0,
     "Where the needle of niah, multikey and passkey lies, in percent of the text (default: anywhere)", 61},
    {"show", KEY_SHOW, NULL, 0, "Print the prompts of --ruler, their choices and answers, or those of --task, and ask no model",
     61},
    {0}};
static error_t parse_ruler(int key, char *arg, struct argp_state *state) {
  eval_ruler_options *o = state->input;
  switch (key) {
    case KEY_RULER:
      o->n_tasks = 0;
      for (char *rest, *name = strtok_r(arg, ",", &rest); name; name = strtok_r(NULL, ",", &rest)) {
        bool known = false;
        for (int t = 0; t < EMXI_RULER_TASKS; t++)
          if (!strcmp(name, "all") || !strcmp(name, emxi_ruler_name(t))) {
            known = true;
            if (o->n_tasks == EVAL_MAX_CELLS) argp_error(state, "--ruler: more than %d tasks", EVAL_MAX_CELLS);
            o->tasks[o->n_tasks++] = t;
          }
        if (!known) argp_error(state, "--ruler: unknown task '%s', see --help", name);
      }
      if (!o->n_tasks) argp_error(state, "--ruler: no task");
      return 0;
    case KEY_DEPTH:
      o->n_depth = 0;
      for (char *rest, *text = strtok_r(arg, ",", &rest); text; text = strtok_r(NULL, ",", &rest)) {
        if (o->n_depth == EVAL_MAX_CELLS) argp_error(state, "--depth: more than %d depths", EVAL_MAX_CELLS);
        o->depth[o->n_depth++] = cli_real(state, "--depth", text, 0, 100) / 100;
      }
      if (!o->n_depth) argp_error(state, "--depth: no depth");
      return 0;
    case KEY_SHOW: o->show = true; return 0;
    case ARGP_KEY_SUCCESS:
      if (o->n_depth && !o->n_tasks) argp_error(state, "--depth needs --ruler");
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}
const struct argp eval_ruler_argp = {.options = ruler_options, .parser = parse_ruler};

static bool takes_depth(int task) { return task == EMXI_RULER_NIAH || task == EMXI_RULER_MULTIKEY || task == EMXI_RULER_PASSKEY; }

/* ---- one sample */

enum { ANSWER_ROOM = EMXI_RULER_ANSWERS * (EMXI_RULER_WORD + 2) };

/* Sums over the samples of a cell. */
typedef struct score {
  int64_t samples, exact;
  int64_t answers, found, chosen, gained;
  double chance, margin, bytes_share;
} score;
typedef double weights[EMXI_RULER_ANSWERS][EMXI_RULER_CHOICES]; /* ln p of every choice */

typedef struct runner {
  emx_session *base;
  int32_t vocab;
  float *now, *then; /* [vocab] logits where the next answer begins; while a choice is read */
} runner;

/* ln p(token) by log-sum-exp in double. */
static double log_p(const float *logits, int32_t vocab, int32_t token) {
  const double best = logits[logits_best(logits, vocab)];
  double sum = 0;
  for (int32_t i = 0; i < vocab; i++) sum += exp(logits[i] - best);
  return logits[token] - best - log(sum);
}

/* Greedy continuation of a fork of s, n bytes. */
static int say(const runner *r, emx_session *s, char *out, int n) {
  emx_session *fork = NULL;
  int code = cli_status(emx_session_fork(s, &fork));
  if (code) return code;
  memcpy(r->then, r->now, (size_t)r->vocab * sizeof *r->now);
  for (int i = 0; i < n; i++) {
    const int token = logits_best(r->then, r->vocab);
    out[i] = (char)token;
    if (i + 1 < n) CLI_TRY(emx_session_decode(fork, token, r->then));
  }
done:
  emx_session_destroy(fork);
  return code;
}
/* ln p of a word after s. */
static int weigh(const runner *r, emx_session *s, const char *word, double *out) {
  emx_session *fork = NULL;
  int code = cli_status(emx_session_fork(s, &fork));
  if (code) return code;
  memcpy(r->then, r->now, (size_t)r->vocab * sizeof *r->now);
  double sum = 0;
  for (int i = 0; i < EMXI_RULER_WORD; i++) {
    sum += log_p(r->then, r->vocab, (unsigned char)word[i]);
    if (i + 1 < EMXI_RULER_WORD) CLI_TRY(emx_session_decode(fork, (unsigned char)word[i], r->then));
  }
  *out = sum;
done:
  emx_session_destroy(fork);
  return code;
}

/* ln p of every choice of every answer after s, which then reads the right one. r->now: what is expected after s. */
static int weigh_all(const runner *r, emx_session *s, const emxi_ruler_sample *q, weights out) {
  int code = CLI_OK;
  for (int a = 0; a < q->n_answers; a++) {
    const emxi_ruler_answer *x = &q->answers[a];
    for (int c = 0; c < x->n_choices; c++)
      if ((code = weigh(r, s, x->choices[c], &out[a][c]))) goto done;
    if (a + 1 == q->n_answers) break; /* nothing comes after it */
    for (int i = 0; i < EMXI_RULER_WORD; i++) CLI_TRY(emx_session_decode(s, (unsigned char)x->choices[x->right][i], r->now));
    CLI_TRY(emx_session_decode(s, ',', r->now));
    CLI_TRY(emx_session_decode(s, ' ', r->now));
  }
done:
  return code;
}
/* The same after the question alone: what the words are worth to one who has not read the text. */
static int weigh_blind(const runner *r, const emx_model_config *config, const emxi_ruler_sample *q, weights out) {
  emx_session *s = NULL;
  int code = CLI_OK;
  CLI_TRY(emx_session_truncate(r->base, 0));
  CLI_TRY(emx_session_fork(r->base, &s));
  code = session_prefill(s, config, q->prompt + q->question, (size_t)(q->length - q->question), NULL, r->now, NULL);
  if (!code) code = weigh_all(r, s, q, out);
done:
  emx_session_destroy(s);
  return code;
}

/* Whether weight i, the right one, is the largest (the first of equals counts); *margin: over the best of the others. */
static bool wins(const double *w, int n, int i, double *margin) {
  double other = -INFINITY;
  bool best = true;
  for (int c = 0; c < n; c++)
    if (c != i) {
      other = fmax(other, w[c]);
      best &= c < i ? w[i] > w[c] : w[i] >= w[c];
    }
  *margin = w[i] - other;
  return best;
}

/* The text is in r->base. The question and the answers go through the selector, byte by byte. */
static int answer(const runner *r, const emxi_ruler_sample *q, const emx_select_desc *select, weights blind, score *sum) {
  emx_session *s = NULL;
  char want[ANSWER_ROOM + 1] = "", got[ANSWER_ROOM];
  weights w = {{0}};
  int n = 0, code = CLI_OK;
  for (int a = 0; a < q->n_answers; a++)
    n += snprintf(want + n, sizeof want - (size_t)n, "%s%s", a ? ", " : "", q->answers[a].choices[q->answers[a].right]);
  CLI_TRY(emx_session_fork(r->base, &s));
  CLI_TRY(emx_session_set_select(s, select));
  emx_session_reset_stats(s);
  for (int64_t i = q->question; i < q->length; i++) CLI_TRY(emx_session_decode(s, (unsigned char)q->prompt[i], r->now));
  if ((code = say(r, s, got, n)) || (code = weigh_all(r, s, q, w))) goto done;
  session_summary stats;
  if ((code = session_summarize(s, &stats))) goto done;
  for (int a = 0; a < q->n_answers; a++) {
    const emxi_ruler_answer *x = &q->answers[a];
    double margin;
    sum->chosen += wins(w[a], x->n_choices, x->right, &margin);
    for (int c = 0; c < x->n_choices; c++) w[a][c] -= blind[a][c];
    sum->gained += wins(w[a], x->n_choices, x->right, &margin);
    sum->margin += margin;
    sum->chance += 1.0 / x->n_choices;
    sum->found += memmem(got, (size_t)n, x->choices[x->right], EMXI_RULER_WORD) != NULL;
  }
  sum->samples++;
  sum->exact += !memcmp(got, want, (size_t)n);
  sum->answers += q->n_answers;
  sum->bytes_share += stats.bytes_share;
done:
  emx_session_destroy(s);
  return code;
}

/* ---- cells */

static int64_t samples_of(const eval_common *e) { return e->cells->samples ? e->cells->samples : 20; }

typedef struct cell {
  int task;
  double depth; /* negative: anywhere */
  int64_t length;
} cell;

static int print_cell(const eval_common *e, const char *folder, const cell *c, const emx_select_desc *select, const score *s) {
  const double answers = (double)s->answers, samples = (double)s->samples, choice = (double)s->chosen / answers,
               gain = (double)s->gained / answers, chance = s->chance / answers;
  char label[32], depth[16] = "-";
  if (e->json) {
    json_t *j = json_pack("{s:s, s:s, s:I, s:o, s:s, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:o}", "model", folder, "ruler",
                          emxi_ruler_name(c->task), "length", (json_int_t)c->length, "depth",
                          c->depth < 0 ? json_null() : json_real(c->depth), "select", cli_select_name(select->kind), "samples",
                          (json_int_t)s->samples, "answers", (json_int_t)s->answers, "exact", (double)s->exact / samples, "found",
                          (double)s->found / answers, "choice", choice, "gain", gain, "chance", chance, "margin",
                          s->margin / answers, "bytes_share", cli_json_real(s->bytes_share / samples));
    if (j && select->kind == EMX_SELECT_TOPK) json_object_set_new(j, "budget", json_integer(select->budget));
    return cli_json_line(j);
  }
  if (c->depth >= 0) snprintf(depth, sizeof depth, "%g %%", 100 * c->depth);
  printf("%-14s %-10s %8lld %6s %-12s %6.1f%% %6.1f%% %6.1f%% %6.1f%% %6.1f%% %6.1f%% %8.2f %8.2f%%\n", eval_model_name(folder),
         emxi_ruler_name(c->task), (long long)c->length, depth, cli_select_label(select, label), 100 * (double)s->exact / samples,
         100 * (double)s->found / answers, 100 * choice, 100 * gain, 100 * sqrt(gain * (1 - gain) / answers), 100 * chance,
         s->margin / answers, 100 * s->bytes_share / samples);
  return cli_flush();
}

static int make_sample(const eval_common *e, const cell *c, const char *text, size_t size, int64_t i, emxi_ruler_sample *q) {
  const emxi_ruler_spec spec = {
      .task = c->task, .length = c->length, .depth = c->depth, .seed = e->cells->seed, .text = text, .text_size = (int64_t)size};
  return cli_status(emxi_ruler_make(&spec, i, q));
}

/* All samples of a cell with every selector; scores [n_select]. */
static int run_cell(const eval_common *e, const char *folder, const cell *c, const cli_select *select, const char *text,
                    size_t size, const emx_model_config *config, const runner *r, score *scores) {
  const int64_t samples = samples_of(e);
  char label[80];
  snprintf(label, sizeof label, "%s, %s, %lld bytes", eval_model_name(folder), emxi_ruler_name(c->task), (long long)c->length);
  cli_progress progress;
  cli_progress_init(&progress, label);
  int code = CLI_OK;
  for (int64_t i = 0; i < samples && !code; i++) {
    emxi_ruler_sample q;
    weights blind = {{0}};
    cli_progress_text(&progress, i, samples, NULL);
    if ((code = make_sample(e, c, text, size, i, &q))) break;
    code = weigh_blind(r, config, &q, blind);
    if (!code) code = session_prefill(r->base, config, q.prompt, (size_t)q.question, NULL, NULL, NULL);
    for (int s = 0; s < select->n && !code; s++) code = answer(r, &q, &select->desc[s], blind, &scores[s]);
    emxi_ruler_free(&q);
  }
  cli_progress_end(&progress);
  return code;
}

/* --show: the samples of a cell as they are. */
static int show_cell(const eval_common *e, const cell *c, const char *text, size_t size) {
  int code = CLI_OK;
  for (int64_t i = 0; i < samples_of(e) && !code; i++) {
    emxi_ruler_sample q;
    if ((code = make_sample(e, c, text, size, i, &q))) break;
    if (e->json) {
      json_t *answers = json_array(), *choices = json_array(), *at = json_array();
      for (int a = 0; a < q.n_answers; a++) {
        json_t *list = json_array();
        for (int x = 0; x < q.answers[a].n_choices; x++) json_array_append_new(list, json_string(q.answers[a].choices[x]));
        json_array_append_new(choices, list);
        json_array_append_new(answers, json_string(q.answers[a].choices[q.answers[a].right]));
        json_array_append_new(at, json_integer(q.answers[a].at));
      }
      code = cli_json_line(json_pack("{s:s, s:I, s:o, s:I, s:o, s:I, s:o, s:o, s:o}", "ruler", emxi_ruler_name(c->task), "length",
                                     (json_int_t)c->length, "depth", c->depth < 0 ? json_null() : json_real(c->depth), "sample",
                                     (json_int_t)i, "prompt", cli_json_text(q.prompt, (size_t)q.length), "question",
                                     (json_int_t)q.question, "answers", answers, "choices", choices, "at", at));
    } else {
      printf("== %s, %lld bytes, sample %lld\n%s[", emxi_ruler_name(c->task), (long long)c->length, (long long)i, q.prompt);
      for (int a = 0; a < q.n_answers; a++) printf("%s%s", a ? ", " : "", q.answers[a].choices[q.answers[a].right]);
      printf("]\n");
      code = cli_flush();
    }
    emxi_ruler_free(&q);
  }
  return code;
}

typedef struct grid {
  cell rows[EVAL_MAX_CELLS * EVAL_MAX_CELLS]; /* length: unset */
  int n_rows, n_len;
  double *gain; /* [models, selectors, rows, lengths] */
  double chance[EVAL_MAX_CELLS * EVAL_MAX_CELLS];
} grid;

static int run_model(const eval_common *e, int m, const cli_select *select, const int64_t *len, grid *g, const char *text,
                     size_t size) {
  const char *folder = e->models[m];
  emx_model *model = NULL;
  emx_model_config config = {.struct_size = sizeof config};
  runner r = {0};
  int code = CLI_OK;
  int64_t longest = 0;
  for (int l = 0; l < g->n_len; l++) longest = len[l] > longest ? len[l] : longest;
  CLI_TRY(emx_model_open(e->ctx, folder, &model));
  CLI_TRY(emx_model_get_config(model, &config));
  /* a prompt, and the tails of two forks */
  if ((code = session_open(model, e->session, select, longest + 2 * (ANSWER_ROOM + e->session->page), &r.base))) goto done;
  r.vocab = config.vocab_size;
  r.now = malloc(2 * (size_t)r.vocab * sizeof *r.now);
  if (!r.now) {
    code = cli_nomem(2 * (size_t)r.vocab * sizeof *r.now, "logits");
    goto done;
  }
  r.then = r.now + r.vocab;
  if (!e->json && m == 0) /* nothing can be wrong with the call any more */
    printf("%-14s %-10s %8s %6s %-12s %7s %7s %7s %7s %7s %7s %8s %9s\n", "model", "task", "length", "depth", "select", "exact",
           "found", "choice", "gain", "+-", "chance", "margin", "K+V read");
  for (int row = 0; row < g->n_rows; row++)
    for (int l = 0; l < g->n_len; l++) {
      cell c = g->rows[row];
      c.length = len[l];
      score scores[CLI_MAX_SELECT] = {{0}};
      if ((code = run_cell(e, folder, &c, select, text, size, &config, &r, scores))) goto done;
      for (int s = 0; s < select->n; s++) {
        if ((code = print_cell(e, folder, &c, &select->desc[s], &scores[s]))) goto done;
        g->gain[(((int64_t)m * select->n + s) * g->n_rows + row) * g->n_len + l] =
            (double)scores[s].gained / (double)scores[s].answers;
        g->chance[row] = scores[s].chance / (double)scores[s].answers;
      }
    }
done:
  free(r.now);
  emx_session_destroy(r.base);
  emx_model_close(model);
  return code;
}

static int draw_grid(const eval_common *e, const cli_select *select, const int64_t *len, const grid *g) {
  enum { PANELS = EVAL_MAX_MODELS * CLI_MAX_SELECT };
  char columns[EVAL_MAX_CELLS][24], rows[EVAL_MAX_CELLS * EVAL_MAX_CELLS][32], titles[PANELS][80];
  const char *column[EVAL_MAX_CELLS], *row[EVAL_MAX_CELLS * EVAL_MAX_CELLS], *title[PANELS];
  for (int l = 0; l < g->n_len; l++) {
    snprintf(columns[l], sizeof columns[l], "%lld", (long long)len[l]);
    column[l] = columns[l];
  }
  for (int i = 0; i < g->n_rows; i++) {
    const cell *c = &g->rows[i];
    if (c->depth < 0)
      snprintf(rows[i], sizeof rows[i], "%s", emxi_ruler_name(c->task));
    else
      snprintf(rows[i], sizeof rows[i], "%s, %g %%", emxi_ruler_name(c->task), 100 * c->depth);
    row[i] = rows[i];
  }
  int panels = 0;
  for (int m = 0; m < e->n_models; m++)
    for (int s = 0; s < select->n; s++) {
      char label[32];
      snprintf(titles[panels], sizeof titles[panels], "%.40s, %s", eval_model_name(e->models[m]),
               cli_select_label(&select->desc[s], label));
      title[panels] = titles[panels];
      panels++;
    }
  const svg_heat heat = {.title = "Words that the context makes likelier than their distractors, percent (white: chance)",
                         .x_label = "length of the prompt (bytes)",
                         .panels = title,
                         .rows = row,
                         .columns = column,
                         .n_panels = panels,
                         .n_rows = g->n_rows,
                         .n_columns = g->n_len,
                         .values = g->gain,
                         .floor = g->chance};
  return svg_write_heat(e->svg, &heat);
}

int eval_ruler(const eval_common *e, const eval_ruler_options *o, const char *text, size_t size) {
  static const int64_t usual[] = {1024, 4096};
  const int64_t *len = e->cells->n_len ? e->cells->len : usual;
  cli_select select = *e->select;
  if (!select.n) select.n = 1; /* ALL */
  grid g = {.n_len = e->cells->n_len ? e->cells->n_len : (int)(sizeof usual / sizeof *usual)};
  for (int t = 0; t < o->n_tasks; t++)
    if (o->n_depth && takes_depth(o->tasks[t]))
      for (int d = 0; d < o->n_depth; d++) g.rows[g.n_rows++] = (cell){.task = o->tasks[t], .depth = o->depth[d]};
    else
      g.rows[g.n_rows++] = (cell){.task = o->tasks[t], .depth = -1};
  int code = CLI_OK;
  if (o->show) {
    for (int row = 0; row < g.n_rows; row++)
      for (int l = 0; l < g.n_len && !code; l++) {
        g.rows[row].length = len[l];
        code = show_cell(e, &g.rows[row], text, size);
      }
    return code;
  }
  for (int row = 0; row < g.n_rows; row++) /* a length too short for its task is said before the work */
    for (int l = 0; l < g.n_len; l++) {
      cell c = g.rows[row];
      emxi_ruler_sample q;
      c.length = len[l];
      if ((code = make_sample(e, &c, text, size, 0, &q))) return code;
      emxi_ruler_free(&q);
    }
  for (int m = 0; m < e->n_models; m++) {
    emx_model_config config;
    if ((code = cli_status(emxi_config_read(e->models[m], &config))) || (code = session_check_bytes(&config))) return code;
  }
  const size_t cells = (size_t)e->n_models * (size_t)select.n * (size_t)g.n_rows * (size_t)g.n_len;
  g.gain = malloc(cells * sizeof *g.gain);
  if (!g.gain) return cli_nomem(cells * sizeof *g.gain, "the grid");
  for (int m = 0; m < e->n_models && !code; m++) code = run_model(e, m, &select, len, &g, text, size);
  if (!code && e->svg) code = draw_grid(e, &select, len, &g);
  free(g.gain);
  return code;
}
