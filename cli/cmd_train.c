/* SPDX-License-Identifier: Apache-2.0
 * emx train: a byte model on text files, or a model of a synthetic task. The folder holds the model, the trainer's state,
 * log.jsonl (one object a step) and loss.svg. */
#define _GNU_SOURCE
#include "attention.h"
#include "cli.h"
#include "svg.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct texts {
  uint8_t **data; /* [n] */
  int64_t *sizes; /* [n] */
  const char **paths;
  int64_t n;
} texts;

typedef struct options {
  cli_common common;
  const char *out;
  texts train, valid, *list; /* list: which one a bare FILE belongs to */
  emx_model_config config;
  cli_attention attention;
  emx_train_opts opts;
  emx_task_desc task; /* kind 0: text */
  const char *length, *p_write, *answers;
  int64_t save_every;
  bool resume, warmup; /* warmup: --warmup was given */
} options;
enum {
  KEY_DATA = 1,
  KEY_TASK,
  KEY_P_WRITE,
  KEY_ANSWERS,
  KEY_VALID,
  KEY_ALPHA,
  KEY_LAYERS,
  KEY_HIDDEN,
  KEY_HEADS,
  KEY_KV_HEADS,
  KEY_HEAD_DIM,
  KEY_FFN,
  KEY_LENGTH,
  KEY_BATCH,
  KEY_STEPS,
  KEY_WARMUP,
  KEY_LR,
  KEY_MIN_LR,
  KEY_DECAY,
  KEY_BETA2,
  KEY_EMBED_DROPOUT,
  KEY_HEAD_DROPOUT,
  KEY_CLIP,
  KEY_SEED,
  KEY_SAVE_EVERY,
  KEY_RESUME,
  KEY_LONG_LENGTH,
  KEY_LONG_EVERY,
  KEY_DTYPE
};
static const struct argp_option option_table[] = {
    {"out", 'o', "DIR", 0, "Folder of the model (made if missing)", 1},
    {"data", KEY_DATA, "FILE...", 0, "Text to train on; windows do not cross files", 1},
    {"task", KEY_TASK, "TASK", 0,
     "Instead of text: copy, reverse, sort, mqmtar, count, nback, flipflop, parity or retrieval (docs/tasks.md)", 1},
    {"answers", KEY_ANSWERS, "N", 0, "retrieval: tokens of the answer in training (default 2, as in emx eval)", 1},
    {"p-write", KEY_P_WRITE, "P", 0, "flipflop: share of writes (default 0.8)", 1},
    {"valid", KEY_VALID, "FILE...", 0, "Text to measure at every save", 1},
    {"resume", KEY_RESUME, NULL, 0, "Continue from DIR, with the options of the first run", 1},
    {"save-every", KEY_SAVE_EVERY, "N", 0, "Steps between saves (default 500)", 1},
    {NULL, 0, NULL, 0, "Model:", 2},
    {"alpha", KEY_ALPHA, "A", 0, "1 (softmax) to 2 (default 1.5)", 2},
    {"layers", KEY_LAYERS, "N", 0, "Layers (default 4)", 2},
    {"hidden", KEY_HIDDEN, "N", 0, "Width (default 192)", 2},
    {"heads", KEY_HEADS, "N", 0, "Query heads (default 6)", 2},
    {"kv-heads", KEY_KV_HEADS, "N", 0, "KV heads (default 3)", 2},
    {"head-dim", KEY_HEAD_DIM, "N", 0, "Head dimension (default 32)", 2},
    {"ffn", KEY_FFN, "N", 0, "Width of the gated layer (default 512)", 2},
    {NULL, 0, NULL, 0, "Optimisation:", 3},
    {"length", KEY_LENGTH, "N", 0,
     "Tokens a sequence (default 512); with --task a range A..B of lengths (default: docs/tasks.md)", 3},
    {"batch", KEY_BATCH, "N", 0, "Sequences a step (default 16)", 3},
    {"steps", KEY_STEPS, "N", 0, "Steps, warm-up included (default 10000)", 3},
    {"warmup", KEY_WARMUP, "N", 0, "Steps of linear warm-up (default 200, or all steps where they are fewer)", 3},
    {"lr", KEY_LR, "X", 0, "Largest learning rate (default 0.002)", 3},
    {"min-lr", KEY_MIN_LR, "X", 0, "Learning rate at the end of the cosine (default 0.0002)", 3},
    {"weight-decay", KEY_DECAY, "X", 0, "AdamW's, on matrices (default 0.1)", 3},
    {"beta2", KEY_BETA2, "X", 0, "AdamW's memory of squared gradients (default 0.95; rare tokens need more)", 3},
    {"clip", KEY_CLIP, "X", 0, "Largest norm of the gradient (default 1)", 3},
    {"embed-dropout", KEY_EMBED_DROPOUT, "P", 0, "Share of the embedding's outputs set to zero in a step (default 0)", 3},
    {"head-dropout", KEY_HEAD_DROPOUT, "P", 0, "Share of the heads without ALiBi left out, sequence by sequence (default 0)", 3},
    {"seed", KEY_SEED, "S", 0, "Of the weights and the order of the data (default 1)", 3},
    {"long-length", KEY_LONG_LENGTH, "N", 0, "Length of every long-every-th step, with as many tokens (default 0: never)", 3},
    {"long-every", KEY_LONG_EVERY, "N", 0, "See --long-length", 3},
    {"dtype", KEY_DTYPE, "T", 0, "Of model.safetensors: bf16 (default) or f32", 3},
    {0}};

static void add_text(texts *t, const char *path) {
  t->paths = realloc(t->paths, (size_t)(t->n + 1) * sizeof *t->paths);
  if (!t->paths) exit(cli_nomem((size_t)t->n * sizeof *t->paths, "file names"));
  t->paths[t->n++] = path;
}
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  emx_model_config *c = &o->config;
  emx_train_opts *t = &o->opts;
  switch (key) {
    case ARGP_KEY_INIT:
      state->child_inputs[0] = &o->common;
      state->child_inputs[1] = &o->attention;
      o->attention.config = c;
      return 0;
    case 'o': o->out = arg; return 0;
    case KEY_DATA: add_text(o->list = &o->train, arg); return 0;
    case KEY_VALID: add_text(o->list = &o->valid, arg); return 0;
    case ARGP_KEY_ARG:
      if (!o->list) argp_error(state, "unexpected argument '%s'; text files follow --data or --valid", arg);
      add_text(o->list, arg);
      return 0;
    case KEY_RESUME: o->resume = true; return 0;
    case KEY_SAVE_EVERY: o->save_every = cli_int(state, "--save-every", arg, 1, INT64_MAX); return 0;
    case KEY_ALPHA: c->entmax_alpha = cli_real(state, "--alpha", arg, 1, 2); return 0;
    case KEY_LAYERS: c->num_layers = (int32_t)cli_int(state, "--layers", arg, 1, 1024); return 0;
    case KEY_HIDDEN: c->hidden_size = (int32_t)cli_int(state, "--hidden", arg, 1, 1 << 20); return 0;
    case KEY_HEADS: c->num_heads = (int32_t)cli_int(state, "--heads", arg, 1, 4096); return 0;
    case KEY_KV_HEADS: c->num_kv_heads = (int32_t)cli_int(state, "--kv-heads", arg, 1, 4096); return 0;
    case KEY_HEAD_DIM: c->head_dim = (int32_t)cli_int(state, "--head-dim", arg, 16, 256); return 0;
    case KEY_FFN: c->intermediate_size = (int32_t)cli_int(state, "--ffn", arg, 1, 1 << 20); return 0;
    case KEY_LENGTH: o->length = arg; return 0;
    case KEY_TASK: emx_task_desc_init(&o->task, cli_task(state, arg)); return 0;
    case KEY_P_WRITE: o->p_write = arg; return 0;
    case KEY_ANSWERS: o->answers = arg; return 0;
    case KEY_BATCH: t->batch = cli_int(state, "--batch", arg, 1, INT32_MAX); return 0;
    case KEY_STEPS: t->steps = cli_int(state, "--steps", arg, 1, INT64_MAX); return 0;
    case KEY_WARMUP:
      t->warmup = cli_int(state, "--warmup", arg, 0, INT64_MAX);
      o->warmup = true;
      return 0;
    case KEY_LR: t->lr = cli_real(state, "--lr", arg, 1e-12, 100); return 0;
    case KEY_MIN_LR: t->min_lr = cli_real(state, "--min-lr", arg, 0, 100); return 0;
    case KEY_DECAY: t->weight_decay = cli_real(state, "--weight-decay", arg, 0, 100); return 0;
    case KEY_BETA2: t->beta2 = cli_real(state, "--beta2", arg, 0, 0.999999); return 0;
    case KEY_HEAD_DROPOUT: t->head_dropout = cli_real(state, "--head-dropout", arg, 0, 0.99); return 0;
    case KEY_EMBED_DROPOUT: t->embed_dropout = cli_real(state, "--embed-dropout", arg, 0, 0.99); return 0;
    case KEY_CLIP: t->clip = cli_real(state, "--clip", arg, 1e-12, 1e12); return 0;
    case KEY_SEED: t->seed = cli_seed(state, "--seed", arg); return 0;
    case KEY_LONG_LENGTH: t->long_length = cli_int(state, "--long-length", arg, 0, INT32_MAX); return 0;
    case KEY_LONG_EVERY: t->long_every = cli_int(state, "--long-every", arg, 0, INT64_MAX); return 0;
    case KEY_DTYPE: t->save_dtype = cli_dtype(state, "--dtype", arg, "bf16, f32"); return 0;
    case ARGP_KEY_END:
      if (!o->out) argp_error(state, "-o DIR is required");
      if (!o->train.n && !o->task.kind) argp_error(state, "--data FILE... or --task TASK is required");
      if (o->p_write && o->task.kind != EMX_TASK_FLIPFLOP) argp_error(state, "--p-write is for --task flipflop");
      if (o->answers && o->task.kind != EMX_TASK_RETRIEVAL) argp_error(state, "--answers is for --task retrieval");
      if (o->task.kind) {
        if (o->train.n || o->valid.n) argp_error(state, "--task needs no text: drop --data and --valid");
        if (t->long_length || t->long_every) argp_error(state, "--long-length is for text; --length A..B mixes lengths");
        if (o->length) cli_range(state, "--length", o->length, 0, INT32_MAX, &o->task.min_length, &o->task.max_length);
        if (o->p_write) o->task.p_write = cli_real(state, "--p-write", o->p_write, 0, 1);
        if (o->answers) o->task.answers = (int32_t)cli_int(state, "--answers", o->answers, 1, INT32_MAX);
        o->task.seed = t->seed;
        c->task = o->task.kind;
      } else if (o->length) {
        t->length = cli_int(state, "--length", o->length, 1, INT32_MAX);
      }
      if (!o->warmup && t->warmup > t->steps) t->warmup = t->steps;
      if (c->num_heads % c->num_kv_heads)
        argp_error(state, "--heads %d is not a multiple of --kv-heads %d", c->num_heads, c->num_kv_heads);
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

/* ---- text */

static int load_texts(texts *t) {
  t->data = calloc((size_t)t->n + 1, sizeof *t->data);
  t->sizes = calloc((size_t)t->n + 1, sizeof *t->sizes);
  if (!t->data || !t->sizes) return cli_nomem((size_t)t->n * 16, "file names");
  for (int64_t i = 0; i < t->n; i++) {
    size_t size;
    int code = cli_read_file(t->paths[i], (char **)&t->data[i], &size);
    if (code) return code;
    if (!size) return cli_fail("%s is empty", t->paths[i]);
    t->sizes[i] = (int64_t)size;
  }
  return CLI_OK;
}
static void free_texts(texts *t) {
  for (int64_t i = 0; t->data && i < t->n; i++) free(t->data[i]);
  free(t->data);
  free(t->sizes);
  free(t->paths);
}

/* ---- the folder */

static char *path_in(const char *folder, const char *name) {
  char *path;
  return asprintf(&path, "%s/%s", folder, name) < 0 ? NULL : path;
}

/* Refuses a folder that another run writes, that holds a training unless it is continued, or that cannot be written. Called
 * before the trainer is made, when a new training makes nothing yet, and after it. *lock keeps other runs out until it is closed;
 * the lock is the folder's own, so a killed run leaves nothing behind. */
static int open_folder(const options *o, bool make, int *lock) {
  if (*lock >= 0) return CLI_OK;
  if (make && mkdir(o->out, 0777) && errno != EEXIST) return cli_fail("cannot make %s: %s", o->out, strerror(errno));
  *lock = open(o->out, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (*lock < 0 && errno == ENOENT && !o->resume && !make) return CLI_OK;
  if (*lock < 0) return cli_fail("cannot open %s: %s", o->out, strerror(errno));
  if (flock(*lock, LOCK_EX | LOCK_NB)) {
    if (errno == EWOULDBLOCK) return cli_fail("another emx train is running in %s", o->out);
    fprintf(stderr, "emx train: %s cannot be locked (%s): see to it that no other training writes there\n", o->out,
            strerror(errno));
  }
  char *state = path_in(o->out, "trainer.safetensors"), *model = path_in(o->out, "model.safetensors");
  int code = CLI_OK;
  if (!state || !model)
    code = cli_nomem(4096, "a path");
  else if (!o->resume && (!access(state, F_OK) || !access(model, F_OK)))
    code = cli_fail("%s already holds a model: continue it with --resume, or choose another folder", o->out);
  else if (access(o->out, W_OK | X_OK))
    code = cli_fail("cannot write to %s: %s", o->out, strerror(errno));
  free(state);
  free(model);
  return code;
}

/* Steps done according to the trainer's state. */
static int resumed_step(const options *o, int64_t *step) {
  char *path = path_in(o->out, "trainer.safetensors");
  emx_checkpoint *ck = NULL;
  if (!path) return cli_nomem(4096, "a path");
  int code = cli_status(emx_checkpoint_open(path, &ck));
  free(path);
  if (code) return code;
  const char *text = emx_checkpoint_metadata(ck, "step");
  *step = text ? strtoll(text, NULL, 10) : 0;
  emx_checkpoint_close(ck);
  return CLI_OK;
}

/* The model's shape comes from DIR on --resume: options that say otherwise are an error, not ignored. */
static int compare_config(const options *o, emx_ctx *ctx) {
  emx_model *model;
  emx_model_config was = {.struct_size = sizeof was};
  int code = cli_status(emx_model_open(ctx, o->out, &model));
  if (code) return code;
  code = cli_status(emx_model_get_config(model, &was));
  emx_model_close(model);
  if (code) return code;
  const emx_model_config *now = &o->config;
  const struct {
    const char *option;
    double was, now;
  } fields[] = {{"--alpha", was.entmax_alpha, now->entmax_alpha},        {"--layers", was.num_layers, now->num_layers},
                {"--hidden", was.hidden_size, now->hidden_size},         {"--heads", was.num_heads, now->num_heads},
                {"--kv-heads", was.num_kv_heads, now->num_kv_heads},     {"--head-dim", was.head_dim, now->head_dim},
                {"--ffn", was.intermediate_size, now->intermediate_size}};
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
    if (fields[i].was != fields[i].now)
      return cli_fail("%s is %g, the model in %s has %g", fields[i].option, fields[i].now, o->out, fields[i].was);
  return cli_attention_compare(&was, now, o->out);
}

/* ---- log.jsonl */

static void log_close(FILE **journal) {
  if (*journal) fclose(*journal);
  *journal = NULL;
}

/* Opens the log for appending after dropping what lies past `step`: steps that ran after the last save, half a line. */
static int log_open(const options *o, int64_t step, FILE **journal) {
  char *path = path_in(o->out, "log.jsonl"), *fresh = path_in(o->out, "log.jsonl.tmp"), *line = NULL;
  size_t room = 0;
  int code = CLI_OK;
  FILE *in = NULL, *out = NULL;
  if (!path || !fresh) {
    code = cli_nomem(4096, "a path");
    goto done;
  }
  in = fopen(path, "r");
  out = fopen(fresh, "w");
  if (!out) {
    code = cli_fail("cannot write %s: %s", fresh, strerror(errno));
    goto done;
  }
  while (in && getline(&line, &room, in) >= 0) {
    json_t *j = json_loads(line, 0, NULL);
    if (j && json_integer_value(json_object_get(j, "step")) <= step && json_object_get(j, "step")) fputs(line, out);
    json_decref(j);
  }
  if (fflush(out) || ferror(out) || rename(fresh, path)) {
    code = cli_fail("cannot write %s: %s", path, strerror(errno));
    unlink(fresh);
    goto done;
  }
  *journal = out;
  out = NULL;
done:
  if (in) fclose(in);
  if (out) fclose(out);
  free(line);
  free(path);
  free(fresh);
  return code;
}
/* One line of the log, with --json on standard output too. */
static int log_line(const options *o, FILE *journal, json_t *j) {
  if (!j || json_dumpf(j, journal, JSON_COMPACT | JSON_REAL_PRECISION(9)) || fputc('\n', journal) == EOF || fflush(journal)) {
    json_decref(j);
    return cli_fail("cannot write the log: %s", strerror(errno));
  }
  if (o->common.json) return cli_json_line(j);
  json_decref(j);
  return CLI_OK;
}

/* Loss in bits per byte: the mean of about 400 stretches of the training, and every validation. */
static int draw_loss(const options *o) {
  char *path = path_in(o->out, "log.jsonl"), *svg = path_in(o->out, "loss.svg"), *line = NULL;
  size_t room = 0;
  enum { STRETCHES = 400 };
  double *sum = calloc(STRETCHES, sizeof *sum), *x = calloc(STRETCHES, sizeof *x), *y = calloc(STRETCHES, sizeof *y), *vx = NULL,
         *vy = NULL;
  int64_t *count = calloc(STRETCHES, sizeof *count), valids = 0;
  int code = CLI_OK, n = 0;
  FILE *in = path ? fopen(path, "r") : NULL;
  if (!path || !svg || !sum || !x || !y || !count || !in) {
    code = cli_fail("cannot read %s/log.jsonl", o->out);
    goto done;
  }
  while (getline(&line, &room, in) >= 0) {
    json_t *j = json_loads(line, 0, NULL);
    const json_int_t step = json_integer_value(json_object_get(j, "step"));
    json_t *loss = json_object_get(j, "loss"), *valid = json_object_get(j, "valid_loss");
    if (loss && step > 0 && step <= o->opts.steps) {
      int64_t at = (int64_t)((double)(step - 1) / (double)o->opts.steps * STRETCHES);
      sum[at] += json_number_value(loss) / log(2);
      x[at] += (double)step;
      count[at]++;
    }
    if (valid) {
      double *gx = realloc(vx, (size_t)(valids + 1) * sizeof *vx),
             *gy = gx ? realloc(vy, (size_t)(valids + 1) * sizeof *vy) : NULL;
      if (gx) vx = gx;
      if (gy) {
        vy = gy;
        vx[valids] = (double)step;
        vy[valids++] = json_number_value(valid) / log(2);
      }
    }
    json_decref(j);
  }
  for (int i = 0; i < STRETCHES; i++)
    if (count[i]) {
      x[n] = x[i] / (double)count[i];
      y[n++] = sum[i] / (double)count[i];
    }
  svg_series series[2] = {{.name = "training", .x = x, .y = y, .n = n},
                          {.name = "validation", .x = vx, .y = vy, .n = (int)valids, .dots = valids < 60}};
  svg_chart chart = {.title = o->config.entmax_alpha == 1 ? "Loss, softmax" : "Loss, entmax",
                     .x_label = "step",
                     .y_label = o->task.kind ? "bits per label" : "bits per byte",
                     .series = series,
                     .n = valids ? 2 : 1};
  code = svg_write(svg, &chart);
done:
  if (in) fclose(in);
  free(path), free(svg), free(line), free(sum), free(x), free(y), free(vx), free(vy), free(count);
  return code;
}

/* ---- the loop */

/* Mean loss over all validation files in windows of the training length; NaN without any. */
static int validate(const options *o, emx_trainer *t, double *loss) {
  double sum = 0, bytes = 0, nats;
  for (int64_t i = 0; i < o->valid.n; i++) {
    int code = cli_status(emx_trainer_evaluate(t, o->valid.data[i], o->valid.sizes[i], &nats));
    if (code) return code;
    sum += nats * (double)o->valid.sizes[i];
    bytes += (double)o->valid.sizes[i];
  }
  *loss = bytes > 0 ? sum / bytes : NAN;
  return CLI_OK;
}

/* Exact match on the first samples of the validation split at the longest length of the training. */
static int validate_task(const options *o, emx_trainer *t, int64_t step, FILE *journal) {
  enum { SAMPLES = 200 };
  emx_task_desc task = o->task;
  emx_task_score score = {.struct_size = sizeof score};
  task.split = EMX_SPLIT_VALID;
  task.min_length = task.max_length;
  task.answers = 2;
  int code = cli_status(emx_trainer_evaluate_task(t, &task, 0, SAMPLES, &score));
  if (code) return code;
  return log_line(o, journal,
                  json_pack("{s:I, s:f, s:f}", "step", (json_int_t)step, "valid_loss", score.nats, "valid_exact",
                            (double)score.exact / (double)score.samples));
}

static int save(const options *o, emx_trainer *t, int64_t step, FILE *journal) {
  double valid;
  if (o->task.kind) {
    int failed = validate_task(o, t, step, journal);
    return failed ? failed : cli_status(emx_trainer_save(t, o->out));
  }
  int code = validate(o, t, &valid);
  if (code) return code;
  if (isfinite(valid) && (code = log_line(o, journal, json_pack("{s:I, s:f}", "step", (json_int_t)step, "valid_loss", valid))))
    return code;
  return cli_status(emx_trainer_save(t, o->out));
}

static int loop(const options *o, emx_trainer *t, int64_t done, FILE *journal) {
  const int64_t first = done;
  int64_t saved = done, tokens = 0;
  double start = cli_seconds(), told = start, smooth = NAN;
  cli_progress progress;
  cli_progress_init(&progress, "train");
  int code = CLI_OK;
  while (done < o->opts.steps && !cli_interrupted()) {
    emx_train_stats s = {.struct_size = sizeof s};
    code = cli_status(emx_trainer_step(t, &s));
    if (code) break;
    done = s.step;
    tokens += s.tokens;
    smooth = isnan(smooth) ? s.loss : smooth + 0.05 * (s.loss - smooth);
    const double now = cli_seconds(), rate = (double)tokens / (now - start);
    code = log_line(o, journal,
                    json_pack("{s:I, s:I, s:f, s:f, s:f, s:f}", "step", (json_int_t)done, "tokens", (json_int_t)s.tokens, "loss",
                              s.loss, "grad_norm", s.grad_norm, "lr", s.lr, "tok_per_s", rate));
    if (code) break;
    cli_progress_text(&progress, done - first, o->opts.steps - first, "loss %.3f (%.3f bits/%s) %.0f tokens/s", smooth,
                      smooth / log(2), o->task.kind ? "label" : "byte", rate);
    if (!progress.terminal && now - told >= 60) {
      char left[24];
      cli_duration((now - start) * (double)(o->opts.steps - done) / (double)(done - first), left);
      cli_warn("step %lld of %lld, loss %.3f, %.0f tokens/s, %s left", (long long)done, (long long)o->opts.steps, smooth, rate,
               left);
      told = now;
    }
    if (done % o->save_every == 0 || done == o->opts.steps) {
      if ((code = save(o, t, done, journal))) break;
      saved = done;
    }
  }
  cli_progress_end(&progress);
  if (cli_interrupted() && (code == CLI_OK || code == CLI_INTERRUPTED)) {
    /* the first Ctrl-C lets the step end, and it is kept; after a second one the context is cancelled and nothing is written */
    if (code == CLI_OK && done > saved && !save(o, t, done, journal)) saved = done;
    if (saved > 0)
      cli_warn("interrupted after step %lld; %s holds step %lld. Continue with the same command and --resume", (long long)done,
               o->out, (long long)saved);
    else
      cli_warn("interrupted after step %lld; nothing has been saved yet", (long long)done);
    return CLI_INTERRUPTED;
  }
  if (code && saved > 0) cli_warn("%s holds step %lld", o->out, (long long)saved);
  return code;
}

int cmd_train(int argc, char **argv) {
  static const struct argp_child children[] = {
      {&cli_common_argp, 0, NULL, 0}, {&cli_attention_argp, 0, "Positions and scale:", 2}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .args_doc = "-o DIR --data FILE...\n-o DIR --task TASK",
      .doc =
          "Trains a decoder-only model on the bytes of text files, or on the samples of a synthetic task. DIR receives "
          "config.json, "
          "model.safetensors, trainer.safetensors, "
          "log.jsonl (one object a step) and loss.svg.\v"
          "Ctrl-C ends after the step and saves; a second one stops at once and leaves the last "
          "save as it was. With --json the lines of log.jsonl also go to standard output. A continued run is "
          "bit-identical to one that was never interrupted."};
  options o = {.save_every = 500};
  emx_model_config_init(&o.config);
  emx_train_opts_init(&o.opts);
  cli_parse(&argp, argc, argv, &o);
  emx_task_info info = {.struct_size = sizeof info};
  if (o.task.kind) {
    int bad = cli_status(emx_task_get_info(&o.task, &info));
    if (bad) return bad;
    o.config.vocab_size = info.vocab_size;
  }
  o.config.max_position = (int32_t)(o.task.kind ? info.max_tokens : o.opts.length);

  emx_ctx *ctx = NULL;
  emx_trainer *trainer = NULL;
  FILE *journal = NULL;
  int64_t step = 0;
  int code, lock = -1;
  if ((code = load_texts(&o.train)) || (code = load_texts(&o.valid)) || (code = open_folder(&o, false, &lock))) goto done;
  for (int64_t i = 0; i < o.valid.n; i++)
    if (o.valid.sizes[i] <= o.opts.length) {
      code = cli_fail("%s has %lld bytes, validation needs more than --length %lld", o.valid.paths[i],
                      (long long)o.valid.sizes[i], (long long)o.opts.length);
      goto done;
    }
  if ((code = cli_context(&o.common, &ctx))) goto done;
  emx_train_data data;
  emx_train_data_init(&data);
  data.files = (const uint8_t *const *)o.train.data;
  data.sizes = o.train.sizes;
  data.n_files = o.train.n;
  if (o.task.kind) data.task = &o.task;
  if (o.resume) {
    if ((code = resumed_step(&o, &step)) || (code = compare_config(&o, ctx))) goto done;
    CLI_TRY(emx_trainer_resume(ctx, o.out, &o.opts, &data, &trainer));
  } else {
    CLI_TRY(emx_trainer_create(ctx, &o.config, &o.opts, &data, &trainer));
  }
  if ((code = open_folder(&o, true, &lock)) || (code = log_open(&o, step, &journal))) goto done;
  cli_on_interrupt(ctx, true);
  int64_t total = 0;
  for (int64_t i = 0; i < o.train.n; i++) total += o.train.sizes[i];
  char what[96];
  if (o.task.kind)
    snprintf(what, sizeof what, "task %s of length %lld to %lld", emx_task_name(o.task.kind), (long long)o.task.min_length,
             (long long)o.task.max_length);
  else
    snprintf(what, sizeof what, "%lld bytes of text in %lld file%s", (long long)total, (long long)o.train.n,
             o.train.n == 1 ? "" : "s");
  cli_warn("%lld parameters, alpha %g, %s, step %lld of %lld", (long long)emx_model_config_parameters(&o.config),
           o.config.entmax_alpha, what, (long long)step, (long long)o.opts.steps);
  code = loop(&o, trainer, step, journal);
  log_close(&journal);
  if (!code) {
    code = draw_loss(&o);
    cli_warn("done: %s", o.out);
  }
done:
  log_close(&journal);
  if (lock >= 0) close(lock);
  emx_trainer_destroy(trainer);
  emx_ctx_destroy(ctx);
  free_texts(&o.train);
  free_texts(&o.valid);
  return code;
}
