/* SPDX-License-Identifier: Apache-2.0 */
#include "session.h"

#include <stdlib.h>
#include <string.h>

enum { KEY_PAGE = 1201, KEY_KV_DTYPE, KEY_KV_FILE, KEY_DEVICE };
static const struct argp_option session_options[] = {
    {NULL, 0, NULL, 0, "Cache:", 70},
    {"ctx-size", 'c', "N", 0, "Tokens the cache may hold (default: what is needed)", 70},
    {"page", KEY_PAGE, "P", 0, "Tokens a page: 16 (default), 32 or 64", 70},
    {"kv-dtype", KEY_KV_DTYPE, "T", 0, "bf16 (default), f16 or f32", 70},
    {"kv-file", KEY_KV_FILE, "FILE", 0,
     "Keep keys and values in FILE, only what selectors read to choose in memory. FILE must not exist, and is gone at the end",
     70},
    {"device", KEY_DEVICE, "WHERE", 0, "Where the model and its cache are: cpu (default), cuda or cuda:N", 70},
    {0}};
static error_t parse_session(int key, char *arg, struct argp_state *state) {
  cli_session *s = state->input;
  switch (key) {
    case 'c': s->ctx = cli_int(state, "-c", arg, 1, INT64_MAX / 4); return 0;
    case KEY_PAGE: s->page = cli_page(state, arg); return 0;
    case KEY_KV_FILE: s->kv_file = arg; return 0;
    case KEY_DEVICE: s->device = cli_device_arg(state, arg); return 0;
    case ARGP_KEY_END:
      if (s->kv_file) cli_session_needs_cpu(state, s, "--kv-file");
      return 0;
    case KEY_KV_DTYPE: s->kv_dtype = cli_dtype(state, "--kv-dtype", arg, "bf16, f16, f32"); return 0;
  }
  return ARGP_ERR_UNKNOWN;
}
const struct argp cli_session_argp = {.options = session_options, .parser = parse_session};
void cli_session_init(cli_session *s) { *s = (cli_session){.page = 16, .kv_dtype = EMX_BF16, .device = {EMX_DEVICE_CPU, 0}}; }
void cli_session_needs_cpu(const struct argp_state *state, const cli_session *s, const char *option) {
  if (s->device.kind != EMX_DEVICE_CPU) argp_error(state, "%s is for the CPU: no --device cuda", option);
}

int session_open(emx_model *model, const cli_session *opts, const cli_select *select, int64_t tokens, emx_session **out) {
  emx_session_opts o;
  emx_session_opts_init(&o);
  o.kv_dtype = opts->kv_dtype;
  o.page_size = opts->page;
  /* A GPU's sketches have no residual rows. */
  if (select) o.summaries |= cli_sketches(select) & (opts->device.kind == EMX_DEVICE_CPU ? ~0 : ~EMX_SUMMARY_RESIDUAL);
  o.kv_file = opts->kv_file;
  o.max_tokens = opts->ctx ? opts->ctx : tokens;
  if (opts->ctx && tokens > opts->ctx)
    return cli_fail("%lld tokens are needed, the context (-c) has %lld", (long long)tokens, (long long)opts->ctx);
  return cli_status(emx_session_create(model, &o, out));
}

int session_check_bytes(const emx_model_config *config) {
  if (config->task) return cli_fail("the model's tokens are those of task %s, not bytes", emx_task_name(config->task));
  return CLI_OK;
}

int session_tokens(const emx_model_config *config, const char *text, size_t n, int32_t **out) {
  int code = session_check_bytes(config);
  if (code) return code;
  int32_t *tokens = malloc((n + 1) * sizeof *tokens);
  if (!tokens) return cli_nomem(n * sizeof *tokens, "the tokens");
  for (size_t i = 0; i < n; i++) {
    tokens[i] = (unsigned char)text[i];
    if (tokens[i] >= config->vocab_size) {
      free(tokens);
      return cli_fail("byte %d at offset %zu is not in the model's vocabulary of %d", (int)(unsigned char)text[i], i,
                      config->vocab_size);
    }
  }
  *out = tokens;
  return CLI_OK;
}

int session_prompt(const emx_model_config *config, const char *text, size_t size, int32_t **out, int64_t *n) {
  *n = (int64_t)size;
  if (!config->task) return session_tokens(config, text, size, out);
  int32_t *tokens = malloc((size / 2 + 1) * sizeof *tokens); /* a digit and a blank each */
  if (!tokens) return cli_nomem((size / 2 + 1) * sizeof *tokens, "the tokens");
  *n = 0;
  for (const char *at = text + strspn(text, " \t\r\n"); at < text + size; at += strspn(at, " \t\r\n")) {
    char *end;
    const long token = strtol(at, &end, 10);
    const size_t length = strcspn(at, " \t\r\n");
    if (end == at || end != at + length || token < 0 || token >= config->vocab_size) {
      free(tokens);
      return cli_fail("'%.*s' is no token of task %s, expected numbers from 0 to %d", length < 40 ? (int)length : 40, at,
                      emx_task_name(config->task), config->vocab_size - 1);
    }
    tokens[(*n)++] = (int32_t)token;
    at = end;
  }
  *out = tokens;
  if (!*n) return cli_fail("the prompt has no tokens");
  return CLI_OK;
}

int session_prefill(emx_session *s, const emx_model_config *config, const char *text, size_t n, float *nll, float *logits,
                    const char *label) {
  int32_t *tokens = NULL;
  int code = session_tokens(config, text, n, &tokens);
  if (!code) code = session_prefill_tokens(s, tokens, (int64_t)n, nll, logits, label);
  free(tokens);
  return code;
}
int session_prefill_tokens(emx_session *s, const int32_t *tokens, int64_t n, float *nll, float *logits, const char *label) {
  cli_progress progress;
  cli_progress_init(&progress, label);
  int code = cli_status(emx_session_prefill(s, tokens, n, nll, logits, label ? cli_progress_show : NULL, &progress));
  cli_progress_end(&progress);
  return code;
}

static void show_bytes(void *user, int64_t done, int64_t total) {
  cli_progress *p = user;
  cli_progress_text(p, done >> 20, total >> 20, "MB, %.0f MB/s", (double)done / 1048576 / fmax(cli_seconds() - p->start, 1e-9));
}
int session_save(emx_session *s, const char *path, const char *label) {
  cli_progress progress;
  cli_progress_init(&progress, label);
  int code = cli_status(emx_session_save(s, path, show_bytes, &progress));
  cli_progress_end(&progress);
  return code;
}
int session_load(emx_session *s, const char *path, const char *label) {
  cli_progress progress;
  cli_progress_init(&progress, label);
  int code = cli_status(emx_session_load(s, path, show_bytes, &progress));
  cli_progress_end(&progress);
  return code;
}

int session_summarize(const emx_session *s, session_summary *out) {
  emx_session_stats t = {.struct_size = sizeof t};
  int code = cli_status(emx_session_get_stats(s, &t));
  if (code) return code;
  const double tokens = (double)t.tokens, rows = (double)t.rows;
  *out = (session_summary){.tok_per_s = tokens / t.seconds,
                           .attn_ms_per_tok = 1e3 * t.attn_seconds / tokens,
                           .bytes_share = (double)(t.bytes_k + t.bytes_v + t.bytes_meta) / (double)t.bytes_full,
                           .support_mean = t.support_sum / rows,
                           .delta_bound_max = t.tokens ? t.delta_bound_max : NAN,
                           .certified_share = (double)t.certified / rows,
                           .raw = t};
  return CLI_OK;
}
json_t *session_json(const session_summary *s, const emx_select_desc *select) {
  json_t *j = json_pack("{s:o, s:o, s:s, s:o, s:o, s:o, s:o}", "tok_per_s", cli_json_real(s->tok_per_s), "attn_ms_per_tok",
                        cli_json_real(s->attn_ms_per_tok), "select", cli_select_name(select->kind), "bytes_share",
                        cli_json_real(s->bytes_share), "support_mean", cli_json_real(s->support_mean), "delta_bound_max",
                        cli_json_real(s->delta_bound_max), "certified_share", cli_json_real(s->certified_share));
  const emx_session_stats *t = &s->raw;
  json_t *counts = json_pack("{s:I, s:I, s:{s:I, s:I, s:I}, s:I, s:I, s:I}", "rows", (json_int_t)t->rows, "certified",
                             (json_int_t)t->certified, "paths", cli_path_name(EMX_PATH_ALL), (json_int_t)t->paths[EMX_PATH_ALL],
                             cli_path_name(EMX_PATH_PAGES), (json_int_t)t->paths[EMX_PATH_PAGES], cli_path_name(EMX_PATH_LADDER),
                             (json_int_t)t->paths[EMX_PATH_LADDER], "bytes_k", (json_int_t)t->bytes_k, "bytes_v",
                             (json_int_t)t->bytes_v, "bytes_meta", (json_int_t)t->bytes_meta);
  if (j && counts) json_object_update(j, counts);
  json_decref(counts);
  if (j && select->kind == EMX_SELECT_TOPK) json_object_set_new(j, "budget", json_integer(select->budget));
  return j;
}

static int expect(const session_reference *r, const emx_select_desc *select, float *logits, session_summary *sum) {
  emx_session *s = NULL;
  char label[32];
  cli_progress progress;
  cli_progress_init(&progress, cli_select_label(select, label));
  int code = CLI_OK;
  CLI_TRY(emx_session_fork(r->base, &s));
  CLI_TRY(emx_session_set_select(s, select));
  emx_session_reset_stats(s);
  for (int64_t i = 0; i < r->n; i++) {
    CLI_TRY(emx_session_decode(s, r->tokens[i], logits + i * r->vocab));
    cli_progress_text(&progress, i + 1, r->n, NULL);
  }
  code = session_summarize(s, sum);
done:
  cli_progress_end(&progress);
  emx_session_destroy(s);
  return code;
}
int session_reference_open(emx_session *base, const int32_t *tokens, int64_t n, int32_t vocab, session_reference *r) {
  const size_t cells = (size_t)n * (size_t)vocab;
  *r = (session_reference){.base = base, .tokens = tokens, .n = n, .vocab = vocab};
  r->all = malloc(2 * cells * sizeof *r->all);
  if (!r->all) return cli_nomem(2 * cells * sizeof *r->all, "logits");
  r->other = r->all + cells;
  emx_select_desc everything;
  emx_select_desc_init(&everything);
  session_summary sum;
  return expect(r, &everything, r->all, &sum);
}
int session_reference_compare(session_reference *r, const emx_select_desc *select, session_difference *out) {
  int code = expect(r, select, r->other, &out->stats);
  if (code) return code;
  double kl = 0, largest = 0;
  int64_t equal = 0;
  for (int64_t i = 0; i < r->n; i++) {
    const float *p = r->all + i * r->vocab, *q = r->other + i * r->vocab;
    const double x = logits_kl(p, q, r->vocab);
    kl += x;
    largest = fmax(largest, x);
    equal += logits_best(p, r->vocab) == logits_best(q, r->vocab);
  }
  out->kl = kl / (double)r->n;
  out->kl_max = largest;
  out->top1 = (double)equal / (double)r->n;
  return CLI_OK;
}
void session_reference_close(session_reference *r) { free(r->all); }

static double log_sum(const float *x, int n, float m) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += exp((double)x[i] - m);
  return log(sum);
}
double logits_kl(const float *p, const float *q, int n) {
  const float mp = p[logits_best(p, n)], mq = q[logits_best(q, n)];
  const double lp = log_sum(p, n, mp), lq = log_sum(q, n, mq);
  double kl = 0;
  for (int i = 0; i < n; i++) {
    double a = (double)p[i] - mp - lp, b = (double)q[i] - mq - lq;
    kl += exp(a) * (a - b);
  }
  return kl > 0 ? kl : 0; /* rounding may leave -1e-17 */
}
int logits_best(const float *p, int n) {
  int best = 0;
  for (int i = 1; i < n; i++)
    if (p[i] > p[best]) best = i;
  return best;
}
