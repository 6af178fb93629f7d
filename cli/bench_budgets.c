/* SPDX-License-Identifier: Apache-2.0
 * emx bench budgets: what a byte budget loses, on the activations of trained models. A text is read into the cache; for some of
 * the tokens that follow, the true weights of every layer and head are computed in float64 from the cached keys, and every
 * selector's pages and output are held against them. Models are then compared where they read the same number of bytes. */
#define _GNU_SOURCE
#include "bench.h"
#include "session.h"
#include "svg.h"

#include "base/base.h"
#include "base/num.h"
#include "entmax/entmax.h"
#include "model/model.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_MODELS = 4, MAX_LENGTHS = 8, MAX_METHODS = 64, STRIDE = 61 /* bytes between queries; shares no factor with a page */ };

typedef struct options {
  cli_common common;
  const char *models[MAX_MODELS], *file, *svg;
  int n_models, n_len;
  int64_t len[MAX_LENGTHS], queries;
} options;
enum { KEY_LEN = 1, KEY_QUERIES, KEY_SVG };
static const struct argp_option option_table[] = {
    {"model", 'm', "DIR", 0, "A model folder; up to four, compared at equal bytes", 1},
    {"file", 'f', "FILE", 0, "The text that models of text read; models of a task read its samples", 1},
    {"len", KEY_LEN, "L,...", 0, "Bytes of context, or nominal lengths of a task's samples (default 4096,16384)", 1},
    {"queries", KEY_QUERIES, "N", 0, "Tokens after the context that are measured, each in every layer and head (default 32)", 1},
    {"svg", KEY_SVG, "FILE", 0, "Draw dropped mass and error against bytes read", 1},
    {0}};
static int ascending(const void *a, const void *b) {
  const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &o->common; return 0;
    case 'm':
      if (o->n_models == MAX_MODELS) argp_error(state, "at most %d models", MAX_MODELS);
      o->models[o->n_models++] = arg;
      return 0;
    case 'f': o->file = arg; return 0;
    case KEY_LEN:
      o->n_len = 0;
      for (char *rest, *text = strtok_r(arg, ",", &rest); text; text = strtok_r(NULL, ",", &rest)) {
        if (o->n_len == MAX_LENGTHS) argp_error(state, "--len: more than %d lengths", MAX_LENGTHS);
        o->len[o->n_len++] = cli_int(state, "--len", text, 128, INT32_MAX / 4);
      }
      if (!o->n_len) argp_error(state, "--len: no length");
      qsort(o->len, (size_t)o->n_len, sizeof *o->len, ascending); /* one prefill serves all */
      return 0;
    case KEY_QUERIES: o->queries = cli_int(state, "--queries", arg, 1, 4096); return 0;
    case KEY_SVG: o->svg = arg; return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
    case ARGP_KEY_END:
      if (!o->n_models) argp_error(state, "-m DIR is required");
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

/* ---- one query in one layer */

enum { DELTA, RECALL, RECALL99, ERROR, SHARE, METRICS };
static const char *const metric_names[METRICS] = {"delta", "recall", "recall99", "rel_err", "bytes_share"};

typedef struct probe {
  emx_model_config config;
  emx_select_desc methods[MAX_METHODS];
  int n_methods;
  int64_t queries, query;                  /* the present one */
  double *values;                          /* [methods, METRICS, layers, heads, queries] */
  int64_t room;                            /* tokens that the arrays below have room for */
  float *k, *v;                            /* [G,room,D] of the cache */
  double *score, *weight, *sorted, *dense; /* [H,room] three times, [H,D] */
  double *light;                           /* [H] weight of the lightest token among the heaviest with 99 % of the mass */
  float *out, *logits;                     /* [H,D], [vocab] */
  int32_t *pages, *n_pages;                /* [H,page_room], [H] */
  int64_t page_room;
  emx_report *reports; /* [H] */
  void *work;
  size_t work_bytes;
  const emxi_layer_view *view;
  int64_t n, page; /* tokens that the query sees; tokens a page */
} probe;

static double *value(probe *p, int method, int metric, int layer, int head) {
  const emx_model_config *c = &p->config;
  return p->values + ((((int64_t)method * METRICS + metric) * c->num_layers + layer) * c->num_heads + head) * p->queries +
         p->query;
}

static int descending(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x < y) - (x > y);
}

/* Keys and values of KV head g as floats, in order. */
typedef struct gather_job {
  probe *p;
  emx_tensor k, v;
  const int32_t *table;
} gather_job;
static void gather_head(void *arg, int64_t g, int32_t worker) {
  (void)worker;
  const gather_job *j = arg;
  probe *p = j->p;
  const int64_t d = p->config.head_dim;
  for (int64_t t = 0; t < p->n; t++) {
    const int64_t page = j->table[t / p->page], slot = t % p->page;
    const int64_t ak = page * j->k.stride[0] + g * j->k.stride[1] + slot * j->k.stride[2],
                  av = page * j->v.stride[0] + g * j->v.stride[1] + slot * j->v.stride[2];
    for (int64_t x = 0; x < d; x++) {
      p->k[(g * p->room + t) * d + x] = (float)emxi_load(j->k.data, j->k.dtype, ak + x);
      p->v[(g * p->room + t) * d + x] = (float)emxi_load(j->v.data, j->v.dtype, av + x);
    }
  }
}

/* True weights and output of head h. */
static void dense_head(void *arg, int64_t h, int32_t worker) {
  (void)worker;
  probe *p = arg;
  const emx_model_config *c = &p->config;
  const int64_t d = c->head_dim, n = p->n, g = h / (c->num_heads / c->num_kv_heads);
  const float *q = p->view->q + h * d, *k = p->k + g * p->room * d, *v = p->v + g * p->room * d;
  double *s = p->score + h * p->room, *w = p->weight + h * p->room, *sorted = p->sorted + h * p->room, *o = p->dense + h * d;
  const double scale = 1 / sqrt((double)d), slope = p->view->alibi_slopes ? p->view->alibi_slopes[h] : 0;
  for (int64_t j = 0; j < n; j++) {
    double dot = 0;
    for (int64_t x = 0; x < d; x++) dot += (double)q[x] * (double)k[j * d + x];
    s[j] = scale * dot - slope * (double)(n - 1 - j);
  }
  emxi_oracle_entmax(s, n, p->view->alphas ? p->view->alphas[h] : c->entmax_alpha, w, NULL);
  memset(o, 0, (size_t)d * sizeof *o);
  int64_t support = 0;
  for (int64_t j = 0; j < n; j++) {
    if (w[j] == 0) continue;
    sorted[support++] = w[j];
    for (int64_t x = 0; x < d; x++) o[x] += w[j] * (double)v[j * d + x];
  }
  qsort(sorted, (size_t)support, sizeof *sorted, descending);
  double mass = 0;
  int64_t i = 0;
  while (i < support && mass < 0.99) mass += sorted[i++];
  p->light[h] = sorted[i > 0 ? i - 1 : 0];
}

/* Holds pages and output of head h against the truth. */
static void judge(probe *p, int method, int64_t h) {
  const emx_model_config *c = &p->config;
  const emx_report *r = &p->reports[h];
  const double *w = p->weight + h * p->room;
  const int64_t d = c->head_dim, layer = p->view->layer;
  const bool everything = r->path == EMX_PATH_ALL;
  const int32_t *pages = p->pages + h * p->page_room;
  const int64_t n_pages = everything ? (p->n + p->page - 1) / p->page : p->n_pages[h];
  double kept = 0, total = 0, support = 0, heavy = 0, kept_support = 0, kept_heavy = 0;
  for (int64_t j = 0; j < p->n; j++) {
    total += w[j];
    support += w[j] > 0;
    heavy += w[j] >= p->light[h];
  }
  for (int64_t i = 0; i < n_pages; i++) {
    const int64_t from = (everything ? i : pages[i]) * p->page, to = from + p->page < p->n ? from + p->page : p->n;
    for (int64_t j = from; j < to; j++) {
      kept += w[j];
      kept_support += w[j] > 0;
      kept_heavy += w[j] >= p->light[h];
    }
  }
  double err = 0, ref = 0;
  for (int64_t x = 0; x < d; x++) {
    const double want = p->dense[h * d + x];
    err += (p->out[h * d + x] - want) * (p->out[h * d + x] - want);
    ref += want * want;
  }
  const double full = 2.0 * (double)(p->n * d) * (double)emx_dtype_size(EMX_BF16);
  *value(p, method, DELTA, (int)layer, (int)h) = fmax(total - kept, 0); /* both are sums of a million roundings of 1e-16 */
  *value(p, method, RECALL, (int)layer, (int)h) = kept_support / support;
  *value(p, method, RECALL99, (int)layer, (int)h) = kept_heavy / heavy;
  *value(p, method, ERROR, (int)layer, (int)h) = sqrt(err / ref);
  *value(p, method, SHARE, (int)layer, (int)h) = (double)(r->bytes_k + r->bytes_v + r->bytes_meta) / full;
}

static emx_status look(void *user, const emxi_layer_view *view) {
  probe *p = user;
  const emx_model_config *c = &p->config;
  const int64_t H = c->num_heads, D = c->head_dim;
  gather_job job = {.p = p};
  emx_kv_info info = {.struct_size = sizeof info};
  int64_t tabled;
  p->view = view;
  p->n = view->first + 1;
  EMX_TRY(emx_kv_get_info(view->kv, &info));
  p->page = info.page_size;
  EMX_TRY(emx_kv_pool_view(view->kv, &job.k, &job.v));
  EMX_TRY(emx_seq_block_table(view->kv, view->seq, &job.table, &tabled));
  EMX_TRY(emxi_parallel(view->ctx, c->num_kv_heads, gather_head, &job));
  EMX_TRY(emxi_parallel(view->ctx, H, dense_head, p));

  float *slopes = (float *)view->alibi_slopes;
  double *alphas = (double *)view->alphas;
  emx_tensor q = emx_tensor_view((float *)view->q, EMX_F32, 4, (int64_t[4]){1, H, 1, D}),
             o = emx_tensor_view(p->out, EMX_F32, 4, (int64_t[4]){1, H, 1, D}), ts = emx_tensor_view(slopes, EMX_F32, 1, &H),
             ta = emx_tensor_view(alphas, EMX_F64, 1, &H),
             pages = emx_tensor_view(p->pages, EMX_I32, 4, (int64_t[4]){1, H, 1, p->page_room}),
             n_pages = emx_tensor_view(p->n_pages, EMX_I32, 3, (int64_t[3]){1, H, 1});
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &view->seq;
  for (int m = 0; m < p->n_methods; m++) {
    const emx_select_desc *select = &p->methods[m];
    emx_decode_io io;
    emx_decode_io_init(&io);
    io.alpha = c->entmax_alpha;
    io.q = &q;
    io.alibi_slopes = slopes ? &ts : NULL;
    io.alphas = alphas ? &ta : NULL;
    io.pages = &pages;
    io.n_pages = &n_pages;
    size_t bytes;
    EMX_TRY(emx_decode_workspace_size(view->ctx, view->kv, select, &io, p->room, &bytes));
    if (bytes > p->work_bytes) {
      emxi_free(p->work);
      p->work_bytes = 0;
      p->work = emxi_alloc(bytes);
      if (!p->work) return emxi_fail(EMX_ERR_NOMEM, "no memory for a workspace of %zu bytes", bytes);
      p->work_bytes = bytes;
    }
    if (select->kind != EMX_SELECT_ALL) EMX_TRY(emx_select(view->ctx, view->kv, &batch, select, &io, p->work, p->work_bytes));
    io.pages = NULL;
    io.n_pages = NULL;
    io.o = &o;
    io.reports = p->reports;
    EMX_TRY(emx_decode(view->ctx, view->kv, &batch, select, &io, p->work, p->work_bytes));
    for (int64_t h = 0; h < H; h++) judge(p, m, h);
  }
  return EMX_OK;
}

static void probe_close(probe *p) {
  emxi_free(p->values), emxi_free(p->k), emxi_free(p->v), emxi_free(p->score), emxi_free(p->weight), emxi_free(p->sorted);
  emxi_free(p->dense), emxi_free(p->light), emxi_free(p->out), emxi_free(p->pages), emxi_free(p->n_pages), emxi_free(p->reports);
  emxi_free(p->work), emxi_free(p->logits);
}
static int probe_open(const emx_model_config *config, int64_t room, int64_t queries, probe *p) {
  *p = (probe){.config = *config, .queries = queries, .room = room, .page_room = room / 16 + 1};
  const size_t H = (size_t)config->num_heads, G = (size_t)config->num_kv_heads, D = (size_t)config->head_dim, n = (size_t)room;
  p->values = emxi_calloc(MAX_METHODS * METRICS * (size_t)config->num_layers * H * (size_t)queries * sizeof *p->values);
  p->k = emxi_alloc(G * n * D * sizeof *p->k);
  p->v = emxi_alloc(G * n * D * sizeof *p->v);
  p->score = emxi_alloc(H * n * sizeof *p->score);
  p->weight = emxi_alloc(H * n * sizeof *p->weight);
  p->sorted = emxi_alloc(H * n * sizeof *p->sorted);
  p->dense = emxi_alloc(H * D * sizeof *p->dense);
  p->light = emxi_alloc(H * sizeof *p->light);
  p->out = emxi_alloc(H * D * sizeof *p->out);
  p->logits = emxi_alloc((size_t)config->vocab_size * sizeof *p->logits);
  p->pages = emxi_alloc(H * (size_t)p->page_room * sizeof *p->pages);
  p->n_pages = emxi_alloc(H * sizeof *p->n_pages);
  p->reports = emxi_calloc(H * sizeof *p->reports);
  if (p->values && p->k && p->v && p->score && p->weight && p->sorted && p->dense && p->light && p->out && p->logits &&
      p->pages && p->n_pages && p->reports)
    return CLI_OK;
  return cli_nomem((2 * G * D * sizeof(float) + 3 * H * sizeof(double)) * n, "keys, values and weights");
}
/* ALL, TOPK at quarter octaves of tokens from 64 up, GAUSSIAN. */
static void choose_methods(probe *p, int64_t length) {
  p->n_methods = 0;
  for (int step = -1;; step++) {
    const int64_t tokens = 16 * (int64_t)(4 * pow(2, step / 4.0) + 0.5);
    if (tokens >= length) break;
    emx_select_desc *m = &p->methods[p->n_methods];
    emx_select_desc_init(m);
    if (step >= 0) {
      m->kind = EMX_SELECT_TOPK;
      m->budget = tokens;
    }
    p->n_methods++;
  }
  if (p->config.entmax_alpha > 1) { /* softmax has no threshold to estimate */
    emx_select_desc_init(&p->methods[p->n_methods]);
    p->methods[p->n_methods++].kind = EMX_SELECT_GAUSSIAN;
  }
}

/* ---- results */

typedef struct stats {
  double mean, p10, p50, p90, max;
} stats;
typedef struct row {
  emx_select_desc select;
  stats metric[METRICS];
  double kl, top1, exact; /* exact: of a task's samples, else NaN */
  json_t *heads;          /* {"delta": [layers][heads], "rel_err": ...} means */
} row;
typedef struct result {
  const char *folder, *task; /* task: NULL: text */
  char label[48];
  double alpha;
  int64_t length;
  row rows[MAX_METHODS];
  int n;
} result;

static stats summarize(double *x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i];
  cli_median(x, (int)n); /* sorts */
  return (stats){sum / (double)n, x[(int64_t)(0.1 * (double)(n - 1) + 0.5)], x[(int64_t)(0.5 * (double)(n - 1) + 0.5)],
                 x[(int64_t)(0.9 * (double)(n - 1) + 0.5)], x[n - 1]};
}
static json_t *head_means(probe *p, int method, int metric) {
  json_t *layers = json_array();
  for (int l = 0; l < p->config.num_layers; l++) {
    json_t *heads = json_array();
    for (int h = 0; h < p->config.num_heads; h++) {
      double sum = 0;
      p->query = 0;
      const double *x = value(p, method, metric, l, h);
      for (int64_t i = 0; i < p->queries; i++) sum += x[i];
      json_array_append_new(heads, cli_json_real(sum / (double)p->queries));
    }
    json_array_append_new(layers, heads);
  }
  return layers;
}

static json_t *stats_json(const stats *s) {
  return json_pack("{s:o, s:o, s:o, s:o, s:o}", "mean", cli_json_real(s->mean), "p10", cli_json_real(s->p10), "p50",
                   cli_json_real(s->p50), "p90", cli_json_real(s->p90), "max", cli_json_real(s->max));
}
/* target: NULL for a measurement; else what the row was chosen for. */
static int print_row(const options *o, const result *r, const row *x, json_t *target) {
  char label[32];
  if (o->common.json) {
    json_t *j = json_pack("{s:s, s:f, s:I, s:I, s:s}", "model", r->folder, "alpha", r->alpha, "length", (json_int_t)r->length,
                          "queries", (json_int_t)o->queries, "select", cli_select_name(x->select.kind));
    if (j) {
      if (x->select.kind == EMX_SELECT_TOPK) json_object_set_new(j, "budget", json_integer(x->select.budget));
      for (int m = 0; m < METRICS; m++) json_object_set_new(j, metric_names[m], stats_json(&x->metric[m]));
      json_object_set_new(j, "kl", cli_json_real(x->kl));
      json_object_set_new(j, "top1", cli_json_real(x->top1));
      if (r->task) {
        json_object_set_new(j, "task", json_string(r->task));
        json_object_set_new(j, "exact", cli_json_real(x->exact));
      }
      if (target)
        json_object_set_new(j, "target", target);
      else
        json_object_set(j, "heads", x->heads);
    }
    return cli_json_line(j);
  }
  json_decref(target);
  const stats *m = x->metric;
  printf("%-14s %8lld %-12s %6.2f%% %9.2e %9.2e %9.2e %7.2f%% %7.2f%% %9.2e %9.2e %9.2e %9.2e %7.4f", r->label,
         (long long)r->length, cli_select_label(&x->select, label), 100 * m[SHARE].mean, m[DELTA].mean, m[DELTA].p50,
         m[DELTA].p90, 100 * m[RECALL].mean, 100 * m[RECALL99].mean, m[ERROR].mean, m[ERROR].p50, m[ERROR].p90, x->kl, x->top1);
  if (r->task) printf(" %6.1f%%", 100 * x->exact);
  putchar('\n');
  return cli_flush();
}
/* ---- measuring */

/* What the whole model expects with each method in every layer, summed over tokens. */
typedef struct tally {
  double kl, top1;
  int64_t tokens, samples, exact; /* exact: samples of a task whose labels are all first choices */
} tally;
static int compare(const probe *p, emx_session *base, const int32_t *tokens, const int32_t *labels, int64_t n, tally *t) {
  session_reference reference = {0};
  int code = session_reference_open(base, tokens, n, p->config.vocab_size, &reference);
  for (int m = 0; m < p->n_methods && !code; m++) {
    session_difference d;
    if ((code = session_reference_compare(&reference, &p->methods[m], &d))) break;
    t[m].kl += d.kl * (double)n;
    t[m].top1 += d.top1 * (double)n;
    t[m].tokens += n;
    t[m].samples++;
    bool exact = labels != NULL;
    for (int64_t i = 0; i < n && exact; i++)
      exact = labels[i] == EMX_UNSCORED || logits_best(reference.other + i * reference.vocab, reference.vocab) == labels[i];
    t[m].exact += exact;
  }
  session_reference_close(&reference);
  return code;
}

/* Decodes one token of s with ALL, looking. */
static int look_at(emx_session *s, int32_t token, probe *p) {
  emxi_session_tap(s, look, p);
  int code = cli_status(emx_session_decode(s, token, p->logits));
  emxi_session_tap(s, NULL, NULL);
  p->query++;
  return code;
}

/* The text up to `length` is in base; queries are tokens after it, STRIDE apart. */
static int measure_text(const options *o, emx_session *base, const int32_t *next, probe *p, cli_progress *progress, tally *t) {
  emx_session *s = NULL;
  int code = CLI_OK;
  CLI_TRY(emx_session_fork(base, &s));
  while (p->query < o->queries) {
    const int32_t *at = next + p->query * STRIDE;
    cli_progress_text(progress, p->query, o->queries, NULL);
    if ((code = look_at(s, at[0], p))) goto done;
    CLI_TRY(emx_session_prefill(s, at + 1, STRIDE - 1, NULL, NULL, NULL, NULL));
  }
  cli_progress_end(progress);
  emx_session_destroy(s);
  s = NULL;
  code = compare(p, base, next, NULL, o->queries, t);
done:
  emx_session_destroy(s);
  return code;
}

/* Samples of the model's task; queries are the tokens after which something is scored. tokens, labels: [room]. */
static int measure_task(const options *o, emx_session *base, const emx_task_desc *task, int32_t *tokens, int32_t *labels,
                        int64_t room, probe *p, cli_progress *progress, tally *t) {
  emx_session *s = NULL;
  int code = CLI_OK;
  for (int64_t sample = 0; p->query < o->queries; sample++) {
    int64_t n, first = 0;
    CLI_TRY(emx_task_sample(task, sample, tokens, labels, room, &n));
    while (first < n && labels[first] == EMX_UNSCORED) first++;
    while (n > first && labels[n - 1] == EMX_UNSCORED) n--;
    if (first < 1 || first == n) continue; /* nothing to prefill */
    CLI_TRY(emx_session_truncate(base, 0));
    CLI_TRY(emx_session_prefill(base, tokens, first, NULL, NULL, NULL, NULL));
    CLI_TRY(emx_session_fork(base, &s));
    for (int64_t i = first; i < n && p->query < o->queries; i++) {
      cli_progress_text(progress, p->query, o->queries, NULL);
      if (labels[i] == EMX_UNSCORED)
        CLI_TRY(emx_session_decode(s, tokens[i], p->logits));
      else if ((code = look_at(s, tokens[i], p)))
        goto done;
    }
    emx_session_destroy(s);
    s = NULL;
    if ((code = compare(p, base, tokens + first, labels + first, n - first, t))) goto done;
  }
done:
  emx_session_destroy(s);
  return code;
}

static int finish(const options *o, probe *p, const tally *t, result *r) {
  const int64_t cells = (int64_t)p->config.num_layers * p->config.num_heads * o->queries;
  int code = CLI_OK;
  for (int m = 0; m < p->n_methods && !code; m++) {
    row *x = &r->rows[r->n++];
    x->select = p->methods[m];
    x->kl = t[m].kl / (double)t[m].tokens;
    x->top1 = t[m].top1 / (double)t[m].tokens;
    x->exact = r->task ? (double)t[m].exact / (double)t[m].samples : NAN;
    x->heads = json_pack("{s:o, s:o, s:o}", "delta", head_means(p, m, DELTA), "recall99", head_means(p, m, RECALL99), "rel_err",
                         head_means(p, m, ERROR));
    p->query = 0;
    for (int i = 0; i < METRICS; i++) x->metric[i] = summarize(value(p, m, i, 0, 0), cells);
    if (o->common.json) code = print_row(o, r, x, NULL);
  }
  return code;
}

static int measure_model(const options *o, emx_ctx *ctx, const char *folder, const char *text, size_t size, result *results) {
  emx_model *model = NULL;
  emx_model_config config = {.struct_size = sizeof config};
  emx_session *base = NULL;
  int32_t *tokens = NULL, *labels = NULL;
  probe p = {0};
  cli_progress progress;
  int code = CLI_OK;
  cli_progress_init(&progress, folder);
  CLI_TRY(emx_model_open(ctx, folder, &model));
  CLI_TRY(emx_model_get_config(model, &config));
  int64_t need = o->len[o->n_len - 1] + o->queries * STRIDE;
  emx_task_desc task;
  if (config.task != EMX_TASK_NONE) {
    emx_task_info info = {.struct_size = sizeof info};
    emx_task_desc_init(&task, config.task);
    task.split = EMX_SPLIT_TEST;
    task.min_length = task.max_length = o->len[o->n_len - 1];
    CLI_TRY(emx_task_get_info(&task, &info));
    need = info.max_tokens;
    tokens = malloc(2 * (size_t)need * sizeof *tokens);
    if (!tokens) {
      code = cli_nomem(2 * (size_t)need * sizeof *tokens, "tokens");
      goto done;
    }
    labels = tokens + need;
  } else if (!text) {
    code = cli_fail("%s is a model of text: -f FILE is required", folder);
    goto done;
  } else if (size < (size_t)need) {
    code = cli_fail("the text has %zu bytes, %lld are needed", size, (long long)need);
    goto done;
  } else if ((code = session_tokens(&config, text, (size_t)need, &tokens))) {
    goto done;
  }
  cli_session opts;
  cli_session_init(&opts);
  if ((code = session_open(model, &opts, NULL, need + o->queries + 2 * opts.page, &base))) goto done;
  if ((code = probe_open(&config, need + 1, o->queries, &p))) goto done;
  for (int l = 0; l < o->n_len; l++) {
    result *r = &results[l];
    tally t[MAX_METHODS] = {{0}};
    const char *slash = strrchr(folder, '/');
    *r = (result){.folder = folder,
                  .alpha = config.entmax_alpha,
                  .length = o->len[l],
                  .task = config.task ? emx_task_name(config.task) : NULL};
    snprintf(r->label, sizeof r->label, "%.40s", slash && slash[1] ? slash + 1 : folder);
    choose_methods(&p, r->length);
    p.query = 0;
    char label[80];
    snprintf(label, sizeof label, "%s, %lld", r->label, (long long)r->length);
    cli_progress_init(&progress, label);
    if (r->task) {
      task.min_length = task.max_length = r->length;
      code = measure_task(o, base, &task, tokens, labels, need, &p, &progress, t);
    } else {
      const int64_t from = l ? o->len[l - 1] : 0;
      if (from < r->length) code = session_prefill(base, &config, text + from, (size_t)(r->length - from), NULL, NULL, "prefill");
      if (!code) code = measure_text(o, base, tokens + r->length, &p, &progress, t);
    }
    cli_progress_end(&progress);
    if (code || (code = finish(o, &p, t, r))) goto done;
  }
done:
  cli_progress_end(&progress);
  probe_close(&p);
  free(tokens);
  emx_session_destroy(base);
  emx_model_close(model);
  return code;
}

/* ---- at equal bytes */

static const row *within(const result *r, double share) {
  const row *best = NULL;
  for (int i = 0; i < r->n; i++)
    if (r->rows[i].select.kind == EMX_SELECT_TOPK && r->rows[i].metric[SHARE].mean <= share &&
        (!best || r->rows[i].metric[SHARE].mean > best->metric[SHARE].mean))
      best = &r->rows[i];
  return best;
}
static const row *gaussian_of(const result *r) {
  for (int i = 0; i < r->n; i++)
    if (r->rows[i].select.kind == EMX_SELECT_GAUSSIAN) return &r->rows[i];
  return NULL;
}
/* Per length: the largest measured TOPK budget of every model within shares of K+V, then within what GAUSSIAN takes. */
static int print_matched(const options *o, const result *results) {
  static const double targets[] = {0.07, 0.08, 0.10, 0.125, 0.16, 0.25, 0.5};
  int code = CLI_OK;
  if (!o->common.json)
    printf("%-14s %8s %-12s %7s %9s %9s %9s %8s %8s %9s %9s %9s %9s %7s\n", "model", "length", "select", "K+V", "dropped", "p50",
           "p90", "support", "99 %", "error", "p50", "p90", "kl", "top1  exact");
  for (int l = 0; l < o->n_len && !code; l++) {
    for (size_t t = 0; t < sizeof targets / sizeof *targets && !code; t++) {
      bool any = false;
      for (int m = 0; m < o->n_models; m++) any |= within(&results[m * MAX_LENGTHS + l], targets[t]) != NULL;
      if (any && !o->common.json)
        printf("\n%lld of context, topk within %g %% of K and V:\n", (long long)o->len[l], 100 * targets[t]);
      for (int m = 0; m < o->n_models && !code; m++) {
        const result *r = &results[m * MAX_LENGTHS + l];
        const row *x = within(r, targets[t]);
        if (x) code = print_row(o, r, x, json_real(targets[t]));
      }
    }
    for (int g = 0; g < o->n_models && !code; g++) {
      const result *of = &results[g * MAX_LENGTHS + l];
      const row *x = gaussian_of(of);
      if (!x) continue;
      if (!o->common.json) printf("\n%lld of context, gaussian, and topk within its bytes:\n", (long long)o->len[l]);
      code = print_row(o, of, x, json_string("gaussian"));
      for (int m = 0; m < o->n_models && !code; m++) {
        const result *r = &results[m * MAX_LENGTHS + l];
        const row *y = within(r, x->metric[SHARE].mean);
        if (y) code = print_row(o, r, y, json_string("gaussian"));
      }
    }
  }
  return code;
}

static int draw(const options *o, const result *results) {
  enum { MAX_SERIES = 2 * MAX_MODELS * MAX_LENGTHS };
  static const int shown[2] = {DELTA, ERROR};
  double *points = malloc(2 * MAX_SERIES * 2 * MAX_METHODS * sizeof *points), *at = points;
  if (!points) return cli_nomem(2 * MAX_SERIES * 2 * MAX_METHODS * sizeof *points, "the picture");
  char names[MAX_SERIES][96];
  svg_series series[2][MAX_SERIES];
  svg_chart charts[2];
  for (int c = 0; c < 2; c++) {
    int n = 0;
    for (int i = 0; i < o->n_models * o->n_len * 2; i++) { /* the lines of all lengths and models, then the dots of GAUSSIAN */
      const int dot = i / (o->n_models * o->n_len), l = i / o->n_models % o->n_len, m = i % o->n_models;
      const result *r = &results[m * MAX_LENGTHS + l];
      svg_series s = {.name = names[n], .x = at, .y = at + MAX_METHODS, .dashed = r->alpha == 1, .dots = dot, .colour = l + 1};
      for (int k = 0; k < r->n; k++) {
        if (r->rows[k].select.kind != (dot ? EMX_SELECT_GAUSSIAN : EMX_SELECT_TOPK)) continue;
        at[s.n] = 100 * r->rows[k].metric[SHARE].mean;
        /* what is below is rounding: of weights that are sums in double, of outputs in float */
        at[MAX_METHODS + s.n++] = fmax(r->rows[k].metric[shown[c]].mean, 1e-7);
      }
      if (!s.n) continue;
      snprintf(names[n], sizeof names[n], "%s %lld%s", r->label, (long long)r->length, dot ? " gaussian" : "");
      series[c][n++] = s;
      at += 2 * MAX_METHODS;
    }
    charts[c] = (svg_chart){.title = c ? "Error of attention's output" : "Dropped mass of attention",
                            .x_label = "share of K and V bytes read (%), summaries included",
                            .y_label = c ? "relative L2 error, mean" : "dropped mass, mean",
                            .log_x = true,
                            .log_y = true,
                            .series = series[c],
                            .n = n};
  }
  int code = svg_write_charts(o->svg, charts, 2);
  free(points);
  return code;
}

int bench_budgets(int argc, char **argv) {
  static const struct argp_child children[] = {{&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Measures what topk loses at budgets from 64 tokens to nearly the context, and gaussian at the budget it takes, on the "
          "activations of models that read a text; then lists, for shares of the bytes of K and V, the largest budget of each "
          "model "
          "within them.\v"
          "Over all layers, heads and queries, against float64 attention on the cached keys: delta, true mass of the tokens not "
          "read; "
          "recall, share of the tokens of nonzero weight that were read; recall99, the same of the heaviest tokens that hold 99 "
          "% of "
          "the mass; rel_err, L2 error of the output. bytes_share counts keys, values and summaries. kl and top1: the whole "
          "model with this selector in every layer against all, over the tokens that follow the context; exact: share of a "
          "task's samples "
          "that it then answers."};
  options o = {.len = {4096, 16384}, .n_len = 2, .queries = 32};
  cli_parse(&argp, argc, argv, &o);

  emx_ctx *ctx = NULL;
  char *text = NULL;
  size_t size = 0;
  result *results = calloc(MAX_MODELS * MAX_LENGTHS, sizeof *results);
  int code = results ? CLI_OK : cli_nomem(MAX_MODELS * MAX_LENGTHS * sizeof *results, "results");
  if (!code) code = cli_check_out(o.svg);
  if (code || (o.file && (code = cli_read_file(o.file, &text, &size)))) goto done;
  if ((code = cli_context(&o.common, &ctx))) goto done;
  for (int m = 0; m < o.n_models && !code; m++) code = measure_model(&o, ctx, o.models[m], text, size, results + m * MAX_LENGTHS);
  if (!code) code = print_matched(&o, results);
  if (!code && o.svg) code = draw(&o, results);
done:
  for (int i = 0; results && i < MAX_MODELS * MAX_LENGTHS; i++)
    for (int k = 0; k < results[i].n; k++) json_decref(results[i].rows[k].heads);
  free(results);
  free(text);
  emx_ctx_destroy(ctx);
  return code;
}
