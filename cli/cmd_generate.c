/* SPDX-License-Identifier: Apache-2.0
 * emx generate: prefills a prompt into a paged cache and continues it with a selector. */
#define _GNU_SOURCE
#include "cli.h"
#include "qkv.h"
#include "session.h"

#include <stdlib.h>
#include <string.h>

typedef struct options {
  cli_common common;
  cli_select select;
  cli_session session;
  const char *model, *prompt, *file, *load, *save, *dump;
  int64_t n;
  int32_t layer; /* of dump; -1: all */
  emx_sample_opts sample;
} options;
enum { KEY_TEMP = 1, KEY_TOP_K, KEY_TOP_P, KEY_SEED, KEY_LOAD, KEY_SAVE, KEY_DUMP, KEY_LAYER };
static const struct argp_option option_table[] = {
    {"model", 'm', "DIR", 0, "The model folder", 1},
    {"prompt", 'p', "TEXT", 0, "The prompt", 1},
    {"file", 'f', "FILE", 0, "Read the prompt from FILE (- is standard input)", 1},
    {"predict", 'n', "N", 0, "Tokens to generate (default 128; 0 with --cache-save: only read the prompt)", 1},
    {"cache-load", KEY_LOAD, "FILE", 0, "Go on from a saved cache; a prompt is appended to it", 1},
    {"cache-save", KEY_SAVE, "FILE", 0, "Save the cache after the prompt, and again at the end or at Ctrl-C", 1},
    {"dump-qkv", KEY_DUMP, "DIR", 0,
     "Write what every step attended with to DIR/layer-L.safetensors: q [T,H,D] of the T steps, k and v [N,G,D] as the cache "
     "holds "
     "them, alibi_slopes [H]. `emx decode -f` replays them with any selector, `emx bench decode --data` times them",
     1},
    {"layer", KEY_LAYER, "L", 0, "Only this layer of --dump-qkv, 0 is the first (default: all)", 1},
    {NULL, 0, NULL, 0, "Sampling:", 2},
    {"temp", KEY_TEMP, "T", 0, "Temperature (default 0: the most probable token)", 2},
    {"top-k", KEY_TOP_K, "K", 0, "Only the K most probable tokens (default 0: all)", 2},
    {"top-p", KEY_TOP_P, "P", 0, "Only the most probable tokens that hold mass P, above 0 (default 1: all)", 2},
    {"seed", KEY_SEED, "S", 0, "Seed (default 0)", 2},
    {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT:
      state->child_inputs[0] = &o->session;
      state->child_inputs[1] = &o->select;
      state->child_inputs[2] = &o->common;
      return 0;
    case 'm':
      if (o->model) argp_error(state, "-m is given twice: one model generates");
      o->model = arg;
      return 0;
    case 'p': o->prompt = arg; return 0;
    case 'f': o->file = arg; return 0;
    case 'n': o->n = cli_int(state, "-n", arg, 0, 1 << 30); return 0;
    case KEY_LOAD: o->load = arg; return 0;
    case KEY_SAVE: o->save = arg; return 0;
    case KEY_DUMP: o->dump = arg; return 0;
    case KEY_LAYER: o->layer = (int32_t)cli_int(state, "--layer", arg, 0, INT32_MAX); return 0;
    case KEY_TEMP: o->sample.temperature = (float)cli_real(state, "--temp", arg, 0, 100); return 0;
    case KEY_TOP_K: o->sample.top_k = (int32_t)cli_int(state, "--top-k", arg, 0, INT32_MAX); return 0;
    case KEY_TOP_P:
      o->sample.top_p = (float)cli_real(state, "--top-p", arg, 0, 1);
      if (!(o->sample.top_p > 0)) argp_error(state, "--top-p is '%s', expected a number above 0, up to 1", arg);
      return 0;
    case KEY_SEED: o->sample.seed = cli_seed(state, "--seed", arg); return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
    case ARGP_KEY_END:
      if (!o->model) argp_error(state, "-m DIR is required");
      if (!o->prompt && !o->file && !o->load) argp_error(state, "one of -p TEXT, -f FILE and --cache-load FILE is required");
      if (!o->n && !o->save) argp_error(state, "-n is 0, expected 1 or more without --cache-save");
      if (o->dump && o->n < 2) argp_error(state, "--dump-qkv needs -n 2 or more: the first token comes with the prompt");
      if (o->dump && o->session.kv_file) argp_error(state, "--dump-qkv takes keys and values from memory: no --kv-file");
      if (o->layer >= 0 && !o->dump) argp_error(state, "--layer needs --dump-qkv");
      if (o->load) cli_session_needs_cpu(state, &o->session, "--cache-load");
      if (o->save) cli_session_needs_cpu(state, &o->session, "--cache-save");
      if (o->dump) cli_session_needs_cpu(state, &o->session, "--dump-qkv");
      if (o->prompt && o->file) argp_error(state, "only one of -p TEXT and -f FILE may be given");
      return 0;
    case ARGP_KEY_SUCCESS:
      if (o->select.n > 1) argp_error(state, "--select takes one selector here");
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

/* What was made, as text. */
static char *text_of(const emx_model_config *config, const int32_t *tokens, int64_t n, size_t *size) {
  char *text = malloc((size_t)n * (config->task ? 12 : 1) + 1);
  *size = 0;
  for (int64_t i = 0; text && i < n; i++) {
    if (config->task)
      *size += (size_t)sprintf(text + *size, i ? " %d" : "%d", tokens[i]);
    else
      text[(*size)++] = (char)tokens[i];
  }
  return text;
}

static int print_stats(const options *o, const emx_session *s, const char *text, size_t size, int64_t tokens) {
  session_summary sum;
  int code = session_summarize(s, &sum);
  if (code) return code;
  if (o->common.json) {
    json_t *j = session_json(&sum, &o->select.desc[0]);
    if (j) {
      json_object_set_new(j, "tokens", json_integer(tokens));
      json_object_set_new(j, "text", cli_json_text(text, size));
    }
    return cli_json_line(j);
  }
  if (tokens < 2) { /* the first token comes with the prompt: no step was decoded, there is nothing to divide by */
    fprintf(stderr, "%lld tokens, - tokens/s\n", (long long)tokens);
    return CLI_OK;
  }
  fprintf(stderr,
          "%lld tokens, %.1f tokens/s, attention %.3f ms a token, %.2f %% of K and V read, support %.1f, delta_bound %.2g, %.0f "
          "%% certified\n",
          (long long)tokens, sum.tok_per_s, sum.attn_ms_per_tok, 100 * sum.bytes_share, sum.support_mean, sum.delta_bound_max,
          100 * sum.certified_share);
  return CLI_OK;
}

int cmd_generate(int argc, char **argv) {
  static const struct argp_child children[] = {
      {&cli_session_argp, 0, NULL, 0}, {&cli_select_argp, 0, NULL, 0}, {&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Continues a prompt. The text goes to standard output as it is made, statistics to standard error; "
          "with --json only one object at the end. Prompt and text of a model of a task are token numbers (`emx eval --task T "
          "--show` "
          "prints such prompts).\v"
          "A saved cache holds the prompt and what was generated. A run that loads it goes on as the run that saved it would "
          "have "
          "done, with the same seed too: what is drawn depends on the seed and the position. It needs the same model; page size "
          "and "
          "dtype are the file's."};
  options o = {.n = 128, .layer = -1};
  cli_select_init(&o.select);
  cli_session_init(&o.session);
  o.session.page = 0; /* not given: the file's, or the default */
  o.session.kv_dtype = 0;
  emx_sample_opts_init(&o.sample);
  cli_parse(&argp, argc, argv, &o);

  emx_ctx *ctx = NULL;
  emx_model *model = NULL;
  emx_session *session = NULL;
  qkv_recorder *recorder = NULL;
  char *prompt = NULL, *text = NULL;
  int32_t *given = NULL, *made = NULL; /* tokens */
  int64_t n_given = 0, n_made = 0;
  float *logits = NULL;
  size_t size = 0;
  int code = CLI_OK;
  if (o.save && (code = cli_check_out(o.save))) return code;
  if (o.file) {
    if ((code = cli_read_file(o.file, &prompt, &size))) return code;
  } else if (o.prompt) {
    size = strlen(o.prompt);
  }
  if (!size && (o.file || o.prompt)) {
    code = cli_fail("the prompt is empty");
    goto done;
  }
  if ((code = cli_context_on(&o.common, o.session.device, &ctx))) goto done;
  CLI_TRY(emx_model_open(ctx, o.model, &model));
  emx_model_config config = {.struct_size = sizeof config};
  emx_cache_info info = {.struct_size = sizeof info};
  CLI_TRY(emx_model_get_config(model, &config));
  if (size && (code = session_prompt(&config, o.file ? prompt : o.prompt, size, &given, &n_given))) goto done;
  if (o.load) CLI_TRY(emx_cache_get_info(o.load, &info));
  cli_session defaults;
  cli_session_init(&defaults);
  if (!o.session.page) o.session.page = o.load ? info.page_size : defaults.page;
  if (!o.session.kv_dtype) o.session.kv_dtype = o.load ? info.dtype : defaults.kv_dtype;
  if ((code = session_open(model, &o.session, &o.select, info.tokens + n_given + o.n, &session))) goto done;
  CLI_TRY(emx_session_set_select(session, o.select.desc));
  logits = malloc((size_t)config.vocab_size * sizeof *logits);
  made = malloc(((size_t)o.n + 1) * sizeof *made);
  if (!logits || !made) {
    code = cli_nomem(((size_t)o.n + 1) * sizeof *made, "the text");
    goto done;
  }
  if (o.load && (code = session_load(session, o.load, "load"))) goto done;
  if (given) {
    if ((code = session_prefill_tokens(session, given, n_given, NULL, logits, "prefill"))) goto done;
    if (o.save && (code = session_save(session, o.save, "save"))) goto done;
  } else {
    CLI_TRY(emx_session_logits(session, logits));
  }

  if (o.dump && (code = qkv_record(session, &config, o.dump, o.layer, o.n, &recorder))) goto done;
  const int64_t start = emx_session_length(session);
  while (n_made < o.n) {
    int32_t token;
    CLI_TRY(emx_sample(logits, config.vocab_size, &o.sample, start + n_made, &token));
    made[n_made++] = token;
    if (!o.common.json) {
      const bool lost = config.task ? printf(n_made > 1 ? " %d" : "%d", token) < 0 : putchar(token) == EOF;
      if (lost || (code = cli_flush())) break;
    }
    if (n_made == o.n) break;
    if ((code = cli_status(emx_session_decode(session, token, logits)))) break;
  }
  if (!o.common.json && o.n) putchar('\n');
  if (o.save && n_made && (code == CLI_OK || code == CLI_INTERRUPTED)) { /* with the last token, which nothing was drawn after */
    if (code) emx_ctx_resume(ctx);
    int saved = CLI_OK;
    if (emx_session_length(session) < start + n_made) saved = cli_status(emx_session_decode(session, made[n_made - 1], logits));
    if (!saved) saved = session_save(session, o.save, "save");
    if (!code) code = saved;
  }
  if (recorder && (code == CLI_OK || code == CLI_INTERRUPTED)) {
    if (code) emx_ctx_resume(ctx);
    const int dumped = qkv_record_write(recorder);
    if (!code) code = dumped;
  }
  if (code == CLI_OK || code == CLI_INTERRUPTED) {
    text = text_of(&config, made, n_made, &size);
    const int stats = text ? print_stats(&o, session, text, size, n_made) : cli_nomem((size_t)n_made, "the text");
    if (!code) code = stats ? stats : cli_flush();
  }
done:
  free(prompt);
  free(text);
  free(given);
  free(made);
  free(logits);
  qkv_record_end(recorder);
  emx_session_destroy(session);
  emx_model_close(model);
  emx_ctx_destroy(ctx);
  return code;
}
