/* SPDX-License-Identifier: Apache-2.0
 * emx eval: bits per byte of a text, its curve against position, and what a selector changes. */
#define _GNU_SOURCE
#include "eval.h"
#include "qkv.h"
#include "svg.h"

#include "model/model.h"

#include <stdlib.h>
#include <string.h>

typedef struct options {
  cli_common common;
  cli_select select;
  cli_session session;
  eval_cells cells;
  eval_ruler_options ruler;
  eval_task_options task;
  const char *models[EVAL_MAX_MODELS], *file, *svg, *dump;
  int n_models, layer;
  int64_t bucket, n;
  bool selecting;
} options;
enum { KEY_CURVE = 1, KEY_SVG, KEY_DUMP, KEY_LAYER };
static const struct argp_option option_table[] = {
    {"model", 'm', "DIR", 0, "The model folder; up to four, each measured and drawn beside the others", 1},
    {"file", 'f', "FILE", 0, "The text", 1},
    {"curve", KEY_CURVE, "BUCKET", 0, "Also bits per byte against position, in buckets of so many bytes", 1},
    {"svg", KEY_SVG, "FILE", 0, "Draw the curve, the cells of --ruler or the ladder of --task", 1},
    {"dump", KEY_DUMP, "FILE.safetensors", 0,
     "Write what a layer attends with in the first window of -c bytes: q [N,H,D], k and v [N,G,D], alibi_slopes [H], f32, as "
     "`emx decode -f` and `emx bench decode --data` read them; of a model that learned alphas, alphas [H] for `emx decode`",
     1},
    {"layer", KEY_LAYER, "L", 0, "Layer of --dump, 0 is the first (default: the last)", 1},
    {"predict", 'n', "N", 0, "With --select: tokens decoded one by one (default 256)", 1},
    {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT:
      state->child_inputs[0] = &o->session;
      state->child_inputs[1] = &o->select;
      state->child_inputs[2] = &o->cells;
      state->child_inputs[3] = &o->ruler;
      state->child_inputs[4] = &o->common;
      state->child_inputs[5] = &o->task;
      return 0;
    case 'm':
      if (o->n_models == EVAL_MAX_MODELS) argp_error(state, "at most %d models", EVAL_MAX_MODELS);
      o->models[o->n_models++] = arg;
      return 0;
    case 'f': o->file = arg; return 0;
    case KEY_CURVE: o->bucket = cli_int(state, "--curve", arg, 1, INT64_MAX / 4); return 0;
    case KEY_SVG: o->svg = arg; return 0;
    case KEY_DUMP: o->dump = arg; return 0;
    case KEY_LAYER: o->layer = (int)cli_int(state, "--layer", arg, 0, INT32_MAX); return 0;
    case 'n': o->n = cli_int(state, "-n", arg, 1, 1 << 20); return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
    case ARGP_KEY_END:
      if (o->task.task.kind) cli_session_needs_cpu(state, &o->session, "--task");
      if (o->dump) cli_session_needs_cpu(state, &o->session, "--dump");
      if (o->ruler.show && !o->ruler.n_tasks && !o->task.task.kind) argp_error(state, "--show needs --ruler or --task");
      if (!o->n_models && !o->ruler.show) argp_error(state, "-m DIR is required");
      if (o->ruler.n_tasks && !o->task.task.kind) {
        const char *other = o->bucket ? "--curve" : o->dump ? "--dump" : o->n ? "-n" : o->session.ctx ? "-c" : NULL;
        if (other) argp_error(state, "%s is about bits per byte, not about --ruler", other);
        return 0;
      }
      if (o->task.task.kind) {
        if (o->ruler.n_tasks) argp_error(state, "--task and --ruler are two different tests");
        if (o->file || o->bucket || o->dump || o->layer >= 0 || o->n || o->session.ctx || o->select.n)
          argp_error(state, "--task draws its own samples and attends to all: no -f, -c, -n, --curve, --dump or --select");
        if (!o->cells.n_len) argp_error(state, "--task needs --len L,...");
        return 0;
      }
      if (!o->file) argp_error(state, "-f FILE is required");
      if (o->cells.set) argp_error(state, "%s needs --ruler or --task", o->cells.set);
      if (o->n && !o->select.n) argp_error(state, "-n needs --select");
      if (!o->n) o->n = 256;
      if (o->session.ctx == 1) argp_error(state, "-c is 1, expected at least 2: a window's first byte is not scored");
      if (o->dump && o->n_models > 1) argp_error(state, "--dump takes one model");
      if (o->layer >= 0 && !o->dump) argp_error(state, "--layer needs --dump");
      if (o->svg && !o->bucket) argp_error(state, "--svg draws the curve: give --curve BUCKET");
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

/* ---- bits per byte, dense */

typedef struct curve {
  double *bits;   /* [buckets] sums */
  int64_t *count; /* [buckets] */
  int64_t buckets, width;
} curve;

/* ---- activations */

typedef struct dump {
  int32_t layer;
  int64_t room; /* tokens */
  int64_t heads, kv_heads, dim;
  float *q, *k, *v, *slopes;
  double *alphas; /* [heads], of a model that has learned them */
} dump;

static emx_status dump_tap(void *user, const emxi_layer_view *view) {
  dump *d = user;
  if (view->layer != d->layer) return EMX_OK;
  const int64_t wide = d->heads * d->dim, narrow = d->kv_heads * d->dim;
  memcpy(d->q + view->first * wide, view->q, (size_t)(view->m * wide) * sizeof *d->q);
  memcpy(d->k + view->first * narrow, view->k, (size_t)(view->m * narrow) * sizeof *d->k);
  memcpy(d->v + view->first * narrow, view->v, (size_t)(view->m * narrow) * sizeof *d->v);
  for (int64_t h = 0; h < d->heads; h++) d->slopes[h] = view->alibi_slopes ? view->alibi_slopes[h] : 0;
  if (view->alphas) memcpy(d->alphas, view->alphas, (size_t)d->heads * sizeof *d->alphas);
  return EMX_OK;
}
static int dump_open(const options *o, const emx_model_config *config, int64_t tokens, dump *d) {
  if (o->layer >= config->num_layers) return cli_fail("--layer is %d, the model's last is %d", o->layer, config->num_layers - 1);
  *d = (dump){.layer = o->layer < 0 ? config->num_layers - 1 : o->layer,
              .room = tokens,
              .heads = config->num_heads,
              .kv_heads = config->num_kv_heads,
              .dim = config->head_dim};
  const size_t cells = (size_t)tokens * (size_t)(d->heads + 2 * d->kv_heads) * (size_t)d->dim;
  d->alphas = malloc((cells + 3 * (size_t)d->heads) * sizeof *d->q); /* one block, tokens fit the session's memory */
  if (!d->alphas) return cli_nomem(cells * sizeof *d->q, "activations");
  d->q = (float *)(d->alphas + d->heads);
  d->k = d->q + tokens * d->heads * d->dim;
  d->v = d->k + tokens * d->kv_heads * d->dim;
  d->slopes = d->v + tokens * d->kv_heads * d->dim;
  return CLI_OK;
}
static int dump_write(const options *o, const emx_model_config *config, const dump *d) {
  const qkv x = {.q = d->q,
                 .k = d->k,
                 .v = d->v,
                 .alibi_slopes = d->slopes,
                 .alphas = config->alpha_learned ? d->alphas : NULL,
                 .queries = d->room,
                 .tokens = d->room,
                 .heads = d->heads,
                 .kv_heads = d->kv_heads,
                 .dim = d->dim,
                 .dtype = EMX_F32,
                 .layer = d->layer,
                 .alpha = config->entmax_alpha};
  return qkv_write(o->dump, &x);
}

/* Windows of `width` bytes, each from an empty cache; a window's first byte has nothing before it and is not scored. */
static int score(emx_model *model, const options *o, const emx_model_config *config, const char *text, size_t size, int64_t width,
                 curve *c, double *bits, int64_t *bytes) {
  float *nll = malloc((size_t)width * sizeof *nll);
  emx_session *s = NULL;
  dump d = {0};
  if (!nll) return cli_nomem((size_t)width * sizeof *nll, "losses");
  int code = session_open(model, &o->session, NULL, width, &s);
  if (!code && o->dump && !(code = dump_open(o, config, width, &d))) emxi_session_tap(s, dump_tap, &d);
  cli_progress progress;
  cli_progress_init(&progress, "eval");
  for (size_t at = 0; !code && at + 1 < size; at += (size_t)width) {
    const size_t n = size - at < (size_t)width ? size - at : (size_t)width;
    const bool whole = n >= size; /* one window: its own progress is worth showing */
    code = cli_status(emx_session_truncate(s, 0));
    if (!code) code = session_prefill(s, config, text + at, n, nll, NULL, whole ? "eval" : NULL);
    if (!code && o->dump && !at) {
      emxi_session_tap(s, NULL, NULL);
      code = dump_write(o, config, &d);
    }
    for (size_t i = 1; !code && i < n; i++) {
      *bits += nll[i] / log(2);
      ++*bytes;
      if (c->bits) {
        c->bits[(int64_t)i / c->width] += nll[i] / log(2);
        c->count[(int64_t)i / c->width]++;
      }
    }
    if (!whole) cli_progress_text(&progress, (int64_t)(at + n), (int64_t)size, "%.3f bits/byte", *bits / (double)*bytes);
  }
  cli_progress_end(&progress);
  emx_session_destroy(s);
  free(d.alphas);
  free(nll);
  return code;
}

const char *eval_model_name(const char *folder) {
  const char *slash = strrchr(folder, '/');
  return slash && slash[1] ? slash + 1 : folder;
}

/* The curves of all models, named by their folders. */
static int draw_curves(const options *o, const curve *curves) {
  svg_series series[EVAL_MAX_MODELS] = {{0}};
  double *points[EVAL_MAX_MODELS] = {0};
  int code = CLI_OK;
  for (int m = 0; m < o->n_models && !code; m++) {
    const curve *c = &curves[m];
    double *x = points[m] = calloc((size_t)c->buckets * 2, sizeof *x), *y = x + c->buckets;
    int n = 0;
    if (!x) {
      code = cli_nomem((size_t)c->buckets * 16, "the curve");
      break;
    }
    for (int64_t i = 0; i < c->buckets; i++)
      if (c->count[i]) {
        x[n] = ((double)i + 0.5) * (double)c->width;
        y[n++] = c->bits[i] / (double)c->count[i];
      }
    series[m] = (svg_series){.name = eval_model_name(o->models[m]), .x = x, .y = y, .n = n, .dots = n < 60};
  }
  const svg_chart chart = {.title = "Bits per byte against position",
                           .x_label = "position (bytes)",
                           .y_label = "bits per byte",
                           .series = series,
                           .n = o->n_models};
  if (!code) code = svg_write(o->svg, &chart);
  for (int m = 0; m < o->n_models; m++) free(points[m]);
  return code;
}

/* ---- a selector against ALL */

/* Bytes that selectors are compared on. */
static int64_t context_of(const options *o, size_t size) {
  return o->session.ctx && (size_t)o->session.ctx < size ? o->session.ctx : (int64_t)size;
}

/* Prefills all but the last n bytes of the context once; every selector decodes those bytes in a fork, and what it expects after
 * each of them is compared with what ALL does. */
static int compare_selectors(emx_model *model, const options *o, const emx_model_config *config, const char *text, size_t size,
                             json_t **list) {
  const int64_t context = context_of(o, size);
  emx_session *base = NULL;
  int32_t *tokens = NULL;
  session_reference reference = {0};
  cli_session room = o->session; /* the text, and the tail of a fork */
  room.ctx = 0;
  int code = session_open(model, &room, &o->select, context + o->n + 2 * room.page, &base);
  if (!code) code = session_prefill(base, config, text, (size_t)(context - o->n), NULL, NULL, "prefill");
  if (!code) code = session_tokens(config, text + context - o->n, (size_t)o->n, &tokens);
  if (!code) code = session_reference_open(base, tokens, o->n, config->vocab_size, &reference);
  *list = json_array();
  for (int i = 0; i < o->select.n && !code; i++) {
    session_difference d;
    char label[32];
    code = session_reference_compare(&reference, &o->select.desc[i], &d);
    if (code) break;
    if (o->common.json) {
      json_t *j = session_json(&d.stats, &o->select.desc[i]);
      if (j) {
        json_object_set_new(j, "tokens", json_integer(o->n));
        json_object_set_new(j, "kl", cli_json_real(d.kl));
        json_object_set_new(j, "kl_max", cli_json_real(d.kl_max));
        json_object_set_new(j, "top1", cli_json_real(d.top1));
        json_array_append_new(*list, j);
      }
    } else {
      printf(
          "%-10s kl %.3g nats (largest %.3g), top1 %.4f, %.2f %% of K and V read, support %.1f, delta_bound %.2g over %lld "
          "tokens at %lld\n",
          cli_select_label(&o->select.desc[i], label), d.kl, d.kl_max, d.top1, 100 * d.stats.bytes_share, d.stats.support_mean,
          d.stats.delta_bound_max, (long long)o->n, (long long)context);
    }
  }
  session_reference_close(&reference);
  free(tokens);
  emx_session_destroy(base);
  return code;
}

static int measure(const options *o, emx_ctx *ctx, const char *folder, const char *text, size_t size, curve *c) {
  emx_model *model = NULL;
  json_t *list = NULL;
  int code = CLI_OK;
  CLI_TRY(emx_model_open(ctx, folder, &model));
  emx_model_config config = {.struct_size = sizeof config};
  CLI_TRY(emx_model_get_config(model, &config));
  int64_t width = o->session.ctx ? o->session.ctx : config.max_position > 1 ? config.max_position : 1024;
  if ((size_t)width > size) width = (int64_t)size;
  if (o->bucket) {
    c->width = o->bucket;
    c->buckets = (width - 1) / o->bucket + 1;
    c->bits = calloc((size_t)c->buckets, sizeof *c->bits);
    c->count = calloc((size_t)c->buckets, sizeof *c->count);
    if (!c->bits || !c->count) {
      code = cli_nomem((size_t)c->buckets * 16, "the curve");
      goto done;
    }
  }
  double bits = 0;
  int64_t bytes = 0;
  if ((code = score(model, o, &config, text, size, width, c, &bits, &bytes))) goto done;
  if (!o->common.json)
    printf("%s%s%.4f bits per byte over %lld bytes, windows of %lld\n", o->n_models > 1 ? folder : "",
           o->n_models > 1 ? ": " : "", bits / (double)bytes, (long long)bytes, (long long)width);
  if (o->select.n && (code = compare_selectors(model, o, &config, text, size, &list))) goto done;
  if (o->common.json) {
    json_t *out = json_pack("{s:s, s:o, s:I, s:I}", "model", folder, "bits_per_byte", cli_json_real(bits / (double)bytes),
                            "bytes", (json_int_t)bytes, "ctx", (json_int_t)width);
    if (out && o->bucket) {
      json_t *points = json_array();
      for (int64_t i = 0; i < c->buckets; i++)
        if (c->count[i])
          json_array_append_new(points,
                                json_pack("{s:I, s:o, s:I}", "position", (json_int_t)(i * c->width), "bits_per_byte",
                                          cli_json_real(c->bits[i] / (double)c->count[i]), "bytes", (json_int_t)c->count[i]));
      json_object_set_new(out, "curve", points);
    }
    /* a line for every selector, its keys beside bits_per_byte; one line without selectors */
    size_t i = 0;
    do {
      json_t *line = json_copy(out);
      if (line && i < json_array_size(list)) json_object_update(line, json_array_get(list, i));
      code = cli_json_line(line);
    } while (!code && ++i < json_array_size(list));
    json_decref(out);
  } else if (o->bucket) {
    for (int64_t i = 0; i < c->buckets; i++)
      if (c->count[i]) printf("%10lld %.4f\n", (long long)(i * c->width), c->bits[i] / (double)c->count[i]);
  }
done:
  json_decref(list);
  emx_model_close(model);
  return code;
}

int cmd_eval(int argc, char **argv) {
  static const struct argp_child children[] = {{&cli_session_argp, 0, NULL, 0},
                                               {&cli_select_argp, 0, NULL, 0},
                                               {&eval_cells_argp, 0, NULL, 0},
                                               {&eval_ruler_argp, 0, NULL, 0},
                                               {&cli_common_argp, 0, NULL, 0},
                                               {&eval_task_argp, 0, NULL, 0},
                                               {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Measures bits per byte of a text in windows of -c bytes (default: the length of training), with dense attention; or, "
          "with --ruler, how a byte model answers questions on long contexts; or, with --task, the share of a synthetic task's "
          "samples that a model of that task answers exactly.\v"
          "With --select it also prefills the first -c bytes but the last N, and decodes those N one by one with each selector "
          "beside "
          "ALL (with --json one line a selector and budget): kl (mean KL divergence of the next-token distributions, nats) and "
          "top1 (share of equal first choices).\n\n"
          "--ruler asks for words of six letters that no text holds. The context is read at once, the question and the answers "
          "go "
          "through the selector (default: all). exact: the greedy continuation is the answer; found: share of the words that "
          "occur in it; choice: share of the words that are likelier than all distractors; gain: share of the words whose "
          "log-likelihood the context raises more than that of any distractor; both have a chance level; margin: that rise "
          "(nats) "
          "over the best of the distractors. docs/ruler.md\n\n"
          "--task draws samples of the test split and prints exact (share of samples whose whole answer "
          "greedy decoding would give) and right (share of labels). docs/tasks.md"};
  options o = {.layer = -1};
  cli_select_init(&o.select);
  o.select.n = 0; /* nothing is compared unless --select says so */
  cli_session_init(&o.session);
  cli_parse(&argp, argc, argv, &o);

  emx_ctx *ctx = NULL;
  char *text = NULL;
  size_t size = 0;
  curve curves[EVAL_MAX_MODELS] = {{0}};
  int code = cli_check_out(o.dump);
  if (!code) code = cli_check_out(o.svg);
  if (code || (o.file && (code = cli_read_file(o.file, &text, &size)))) return code;
  if (o.file && size < 2)
    code = cli_fail("%s has %zu bytes, at least 2 are needed", o.file, size);
  else if (!o.ruler.n_tasks && !o.task.task.kind && o.select.n && context_of(&o, size) <= o.n)
    code = cli_fail("--select decodes the last %lld bytes of the context, which has %lld: at least one must come before",
                    (long long)o.n, (long long)context_of(&o, size));
  else
    code = cli_context_on(&o.common, o.session.device, &ctx);
  if (o.ruler.n_tasks || o.task.task.kind) {
    const eval_common e = {ctx, o.models, o.n_models, &o.session, &o.select, &o.cells, o.svg, o.ruler.show, o.common.json};
    if (!code) code = o.task.task.kind ? eval_task(&e, &o.task) : eval_ruler(&e, &o.ruler, text, size);
    free(text);
    emx_ctx_destroy(ctx);
    return code;
  }
  for (int m = 0; m < o.n_models && !code; m++) code = measure(&o, ctx, o.models[m], text, size, &curves[m]);
  if (!code && o.svg) code = draw_curves(&o, curves);
  if (!code) code = cli_flush();
  for (int m = 0; m < o.n_models; m++) {
    free(curves[m].bits);
    free(curves[m].count);
  }
  free(text);
  emx_ctx_destroy(ctx);
  return code;
}
