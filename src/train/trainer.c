/* SPDX-License-Identifier: Apache-2.0
 * The training loop's body: options, memory, one step, evaluation. */
#include "base/num.h"
#include "train.h"

#include <math.h>
#include <string.h>

void emx_train_data_init_sized(emx_train_data *data, size_t size) {
  const emx_train_data defaults = {0};
  emxi_struct_init(data, size, &defaults, sizeof defaults);
}

void emx_train_opts_init_sized(emx_train_opts *opts, size_t size) {
  const emx_train_opts defaults = {.save_dtype = EMX_BF16,
                                   .steps = 10000,
                                   .warmup = 200,
                                   .length = 512,
                                   .batch = 16,
                                   .lr = 2e-3,
                                   .min_lr = 2e-4,
                                   .beta1 = 0.9,
                                   .beta2 = 0.95,
                                   .eps = 1e-8,
                                   .weight_decay = 0.1,
                                   .clip = 1,
                                   .seed = 1};
  emxi_struct_init(opts, size, &defaults, sizeof defaults);
}

static emx_status check_opts(const emx_train_opts *o) {
#define REQUIRE(condition, ...) \
  if (!(condition)) return emxi_fail(EMX_ERR_INVALID, "trainer options: " __VA_ARGS__)
  REQUIRE(o->save_dtype == EMX_BF16 || o->save_dtype == EMX_F32, "save_dtype is %d, expected EMX_BF16 or EMX_F32", o->save_dtype);
  REQUIRE(o->steps >= 1, "steps is %lld, expected at least 1", (long long)o->steps);
  REQUIRE(o->warmup >= 0 && o->warmup <= o->steps, "warmup is %lld, expected 0..%lld (steps)", (long long)o->warmup,
          (long long)o->steps);
  REQUIRE(o->length >= 1 && o->length <= INT32_MAX, "length is %lld, expected 1..%d", (long long)o->length, INT32_MAX);
  REQUIRE(o->batch >= 1 && o->batch <= INT32_MAX / o->length, "batch is %lld, expected 1..%lld at length %lld",
          (long long)o->batch, (long long)(INT32_MAX / o->length), (long long)o->length);
  REQUIRE(
      (o->long_length == 0) == (o->long_every == 0) && o->long_length >= 0 && o->long_length <= INT32_MAX && o->long_every >= 0,
      "long_length is %lld and long_every %lld, expected both 0 or both positive", (long long)o->long_length,
      (long long)o->long_every);
  REQUIRE(o->lr > 0 && isfinite(o->lr), "lr is %g, expected a positive number", o->lr);
  REQUIRE(o->min_lr >= 0 && o->min_lr <= o->lr, "min_lr is %g, expected 0..%g (lr)", o->min_lr, o->lr);
  REQUIRE(o->beta1 >= 0 && o->beta1 < 1, "beta1 is %g, expected 0 <= beta1 < 1", o->beta1);
  REQUIRE(o->beta2 >= 0 && o->beta2 < 1, "beta2 is %g, expected 0 <= beta2 < 1", o->beta2);
  REQUIRE(o->eps > 0 && isfinite(o->eps), "eps is %g, expected a positive number", o->eps);
  REQUIRE(o->weight_decay >= 0 && isfinite(o->weight_decay), "weight_decay is %g, expected a number from 0", o->weight_decay);
  REQUIRE(o->embed_dropout >= 0 && o->embed_dropout < 1, "embed_dropout is %g, expected 0 <= embed_dropout < 1",
          o->embed_dropout);
  REQUIRE(o->head_dropout >= 0 && o->head_dropout < 1, "head_dropout is %g, expected 0 <= head_dropout < 1", o->head_dropout);
  REQUIRE(o->clip > 0, "clip is %g, expected a positive number (infinity: no clipping)", o->clip);
#undef REQUIRE
  return EMX_OK;
}

/* Sequences of a long step: as many tokens as an ordinary one, at least one sequence. */
static int64_t long_batch(const emx_train_opts *o) {
  const int64_t n = o->batch * o->length / o->long_length;
  return n < 1 ? 1 : n;
}

void emx_trainer_destroy(emx_trainer *t) {
  if (!t) return;
  emxi_weights_destroy(&t->net.w);
  emxi_weights_destroy(&t->net.g);
  emxi_data_destroy(&t->data);
  emxi_free(t->net.layers);
  emxi_free(t->memory);
  emxi_free(t);
}

static emx_status take_data(emx_trainer *t, const emx_train_data *data) {
  const emx_train_opts *o = &t->opts;
  if (data->task) {
    if (data->n_files) return emxi_fail(EMX_ERR_INVALID, "trainer: a task and %lld files", (long long)data->n_files);
    if (o->long_length) return emxi_fail(EMX_ERR_INVALID, "trainer: long_length is for text; a task has a range of lengths");
    const emx_task_desc *task = data->task;
    EMXI_READ_STRUCT(task, emx_task_desc);
    t->task = *task;
    return emxi_task_fits(&t->task, &t->config);
  }
  if (t->config.task)
    return emxi_fail(EMX_ERR_INVALID, "trainer: the model is of task %s, the data are text", emx_task_name(t->config.task));
  EMX_TRY(emxi_data_create(data->files, data->sizes, data->n_files, t->config.vocab_size, &t->data));
  const int64_t lengths[2] = {o->length, o->long_length};
  for (int i = 0; i < 2; i++)
    if (lengths[i] && emxi_data_windows(&t->data, lengths[i]) < 1)
      return emxi_fail(EMX_ERR_INVALID, "trainer: no file has the %lld bytes of a window of %lld tokens",
                       (long long)lengths[i] + 1, (long long)lengths[i]);
  return EMX_OK;
}

/* Everything but the memory of the network. */
static emx_status open_trainer(emx_ctx *ctx, const emx_model_config *config, const emx_train_opts *opts,
                               const emx_train_data *data, emx_trainer **out) {
  if (ctx->device != EMX_DEVICE_CPU)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "trainer: training runs on the CPU; use a CPU context");
  EMXI_READ_STRUCT(config, emx_model_config);
  EMXI_READ_STRUCT(opts, emx_train_opts);
  EMXI_READ_STRUCT(data, emx_train_data);
  EMX_TRY(emx_model_config_check(config));
  EMX_TRY(check_opts(opts));
  if (config->entmax_alpha > 2)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "trainer: entmax_alpha is %g; gradients exist for 1 to 2", config->entmax_alpha);
  emx_trainer *t = emxi_calloc(sizeof *t);
  if (!t) return emxi_fail(EMX_ERR_NOMEM, "trainer: no memory for %zu bytes", sizeof *t);
  t->ctx = ctx;
  t->config = *config;
  t->opts = *opts;
  /* Fields that the position type fixes, as config.json gives them back. */
  if (config->position_type != EMX_POSITION_NAPE)
    t->config.alibi_num_heads = config->position_type == EMX_POSITION_ALIBI ? config->num_heads : 0;
  if (!t->config.alibi_num_heads) t->config.alibi_slope_type = EMX_SLOPE_LINEAR;
  emx_status status = take_data(t, data);
  if (!status && opts->head_dropout > 0 && t->config.alibi_num_heads == t->config.num_heads)
    status = emxi_fail(EMX_ERR_INVALID, "trainer options: head_dropout is %g, but every head has ALiBi", opts->head_dropout);
  if (status)
    emx_trainer_destroy(t);
  else
    *out = t;
  return status;
}

/* The shapes of the batches (B,T): text has one or two, a task one for every length that the longest sample may have. */
static emx_status list_shapes(const emx_trainer *t, int64_t (**out)[2], int *n) {
  const emx_train_opts *o = &t->opts;
  emx_task_info info = {.struct_size = sizeof info};
  if (t->task.kind) EMX_TRY(emx_task_get_info(&t->task, &info));
  if (info.max_tokens > INT32_MAX / o->batch)
    return emxi_fail(EMX_ERR_INVALID, "trainer: a batch of %lld samples of %lld tokens is too large", (long long)o->batch,
                     (long long)info.max_tokens);
  const int64_t count = t->task.kind ? info.max_tokens : o->long_length ? 2 : 1;
  int64_t(*shapes)[2] = emxi_alloc((size_t)count * sizeof *shapes);
  if (!shapes) return emxi_fail(EMX_ERR_NOMEM, "trainer: no memory for %lld shapes", (long long)count);
  for (int64_t i = 0; i < count; i++) {
    shapes[i][0] = i && !t->task.kind ? long_batch(o) : o->batch;
    shapes[i][1] = t->task.kind ? i + 1 : i ? o->long_length : o->length;
  }
  *out = shapes;
  *n = (int)count;
  return EMX_OK;
}

/* The flat arrays, the optimiser and the network: counted when arena has no base. */
static emx_status carve(emx_trainer *t, emxi_arena *arena, const int64_t (*shapes)[2], int n, float **weights, float **gradient) {
  const int64_t parameters = emx_model_config_parameters(&t->config);
  *weights = emxi_arena_take(arena, parameters, sizeof(float));
  *gradient = emxi_arena_take(arena, parameters, sizeof(float));
  emxi_adamw_carve(&t->adamw, arena, &t->config);
  EMX_TRY(emxi_net_carve(&t->net, arena, shapes, n));
  if (arena->overflow) return emxi_fail(EMX_ERR_NOMEM, "trainer: a step of this size does not fit into memory");
  return EMX_OK;
}
static emx_status take_memory_for(emx_trainer *t, const int64_t (*shapes)[2], int n) {
  emxi_arena arena;
  float *weights, *gradient;
  t->net.ctx = t->ctx;
  t->net.config = t->config;
  emxi_arena_init(&arena, NULL, 0);
  EMX_TRY(carve(t, &arena, shapes, n, &weights, &gradient));
  const size_t bytes = emxi_arena_total(&arena), list = (size_t)t->config.num_layers * sizeof *t->net.layers;
  t->net.layers = emxi_calloc(list);
  t->memory = emxi_alloc(bytes);
  if (!t->net.layers || !t->memory) return emxi_fail(EMX_ERR_NOMEM, "trainer: no memory for %zu bytes", bytes + list);
  emxi_arena_init(&arena, t->memory, bytes);
  EMX_TRY(carve(t, &arena, shapes, n, &weights, &gradient));
  EMX_TRY(emxi_weights_create(&t->config, weights, &t->net.w));
  return emxi_weights_create(&t->config, gradient, &t->net.g);
}
static emx_status take_memory(emx_trainer *t) {
  int64_t(*shapes)[2] = NULL;
  int n = 0;
  EMX_TRY(list_shapes(t, &shapes, &n));
  if (t->task.kind) {
    emx_task_info info = {.struct_size = sizeof info};
    emx_task_get_info(&t->task, &info);
    t->net.max_scored = info.max_scored * t->opts.batch;
  }
  emx_status status = take_memory_for(t, shapes, n);
  emxi_free(shapes);
  return status;
}

/* N(0, 0.02), the projections onto the residual stream smaller by sqrt(2 L), which keeps its variance independent of the depth
 * (Radford et al. 2019); norms 1, the parameters of alpha and theta constant. The i-th tensor beside those is stream i of the
 * seed: models that differ in them alone start from the same weights. */
static void initial_weights(emx_trainer *t) {
  const double residual = 1 / sqrt(2.0 * t->config.num_layers);
  uint64_t stream = 0;
  for (int64_t i = 0; i < emxi_param_tensors(&t->config); i++) {
    emxi_param p;
    emxi_param_at(&t->config, i, &p);
    float *w = t->net.w.data + p.offset;
    if (p.start == EMXI_START_NORM || p.start == EMXI_START_SCALAR) {
      for (int64_t j = 0; j < p.count; j++) w[j] = p.value;
    } else {
      const float scale = (float)(0.02 * (p.start == EMXI_START_RESIDUAL ? residual : 1));
      emxi_normals(t->opts.seed, stream, w, p.count);
      for (int64_t j = 0; j < p.count; j++) w[j] *= scale;
    }
    stream += p.start != EMXI_START_SCALAR;
  }
  const size_t bytes = (size_t)t->net.w.count * sizeof(float);
  memset(t->adamw.m, 0, bytes);
  memset(t->adamw.v, 0, bytes);
}

emx_status emx_trainer_create(emx_ctx *ctx, const emx_model_config *config, const emx_train_opts *opts,
                              const emx_train_data *data, emx_trainer **out) {
  if (!ctx || !out) return emxi_fail(EMX_ERR_INVALID, "emx_trainer_create: %s is NULL", ctx ? "out" : "ctx");
  emx_trainer *t;
  EMX_TRY(open_trainer(ctx, config, opts, data, &t));
  emx_status status = take_memory(t);
  if (status) {
    emx_trainer_destroy(t);
    return status;
  }
  initial_weights(t);
  *out = t;
  return EMX_OK;
}

static emx_status resume(emx_ctx *ctx, const char *folder, const emx_checkpoint *ck, const char *path, const emx_train_opts *opts,
                         const emx_train_data *data, emx_trainer **out) {
  emx_model_config config;
  emx_trainer *t;
  EMX_TRY(emxi_config_read(folder, &config));
  EMX_TRY(open_trainer(ctx, &config, opts, data, &t));
  emx_status status = emxi_state_check(ck, path, t, &t->step);
  if (!status) status = take_memory(t);
  if (!status) status = emxi_state_load(ck, path, t);
  if (status)
    emx_trainer_destroy(t);
  else
    *out = t;
  return status;
}
emx_status emx_trainer_resume(emx_ctx *ctx, const char *folder, const emx_train_opts *opts, const emx_train_data *data,
                              emx_trainer **out) {
  if (!ctx || !folder || !out)
    return emxi_fail(EMX_ERR_INVALID, "emx_trainer_resume: %s is NULL", !ctx ? "ctx" : !folder ? "folder" : "out");
  emx_checkpoint *ck;
  char *path;
  EMX_TRY(emxi_state_open(folder, &ck, &path));
  emx_status status = resume(ctx, folder, ck, path, opts, data, out);
  emx_checkpoint_close(ck);
  emxi_free(path);
  return status;
}

static void put_window(emxi_net *net, int64_t i, int64_t length, const uint8_t *bytes) {
  for (int64_t j = 0; j < length; j++) {
    net->tokens[i * length + j] = bytes[j];
    net->targets[i * length + j] = bytes[j + 1];
  }
}

static emx_status stop(emx_trainer *t, const char *what, double value) {
  t->nonfinite = true;
  return emxi_fail(EMX_ERR_NONFINITE, "step %lld: the %s is %g; the weights are those before the step", (long long)t->step + 1,
                   what, value);
}

static emx_status step(emx_trainer *t, emx_train_stats *stats) {
  const emx_train_opts *o = &t->opts;
  if (t->nonfinite) return emxi_fail(EMX_ERR_NONFINITE, "an earlier step met a NaN or an infinity; resume from the last save");
  if (t->step >= o->steps) return emxi_fail(EMX_ERR_STATE, "all %lld steps are done", (long long)o->steps);
  const bool is_long = o->long_every && t->step % o->long_every == o->long_every - 1;
  int64_t length = is_long ? o->long_length : o->length, batch = is_long ? long_batch(o) : o->batch, tokens = batch * length;
  if (t->task.kind)
    EMX_TRY(emxi_task_batch(&t->task, t->step * batch, batch, &t->net, &length, &tokens));
  else
    for (int64_t i = 0; i < batch; i++) put_window(&t->net, i, length, emxi_data_draw(&t->data, length, o->seed, t->step, i));
  t->net.dropout = (emxi_dropout){o->embed_dropout, o->head_dropout, o->seed, t->step};
  double loss, norm;
  EMX_TRY(emxi_net_forward(&t->net, batch, length, true, &loss));
  if (!isfinite(loss)) return stop(t, "loss", loss);
  EMX_TRY(emxi_net_backward(&t->net, batch, length));
  EMX_TRY(emxi_adamw_norm(t->ctx, &t->adamw, t->net.g.data, &norm));
  if (!isfinite(norm)) return stop(t, "norm of the gradient", norm);
  const double lr = emxi_learning_rate(o, t->step);
  emxi_adamw_update(t->ctx, &t->adamw, o, lr, t->step + 1, norm > o->clip ? o->clip / norm : 1, t->net.g.data, t->net.w.data);
  t->step++;
  const emx_train_stats done = {.step = t->step, .tokens = tokens, .loss = loss, .grad_norm = norm, .lr = lr};
  emxi_struct_write(stats, &done, sizeof done);
  return EMX_OK;
}
emx_status emx_trainer_step(emx_trainer *t, emx_train_stats *stats) {
  if (!t) return emxi_fail(EMX_ERR_INVALID, "emx_trainer_step: t is NULL");
  EMXI_CHECK_STRUCT(stats, emx_train_stats);
  EMXI_LOCKED(t->ctx, step(t, stats));
}

emx_status emx_trainer_save(emx_trainer *t, const char *folder) {
  if (!t || !folder) return emxi_fail(EMX_ERR_INVALID, "emx_trainer_save: %s is NULL", t ? "folder" : "t");
  EMXI_LOCKED(t->ctx, emxi_state_save(t, folder));
}

/* Batches have the shape of an ordinary step; the last one is filled up with its first window, which is not counted. */
static emx_status evaluate(emx_trainer *t, const uint8_t *data, int64_t size, double *nats) {
  if (t->task.kind)
    return emxi_fail(EMX_ERR_INVALID, "emx_trainer_evaluate: the model is of task %s", emx_task_name(t->task.kind));
  const int64_t length = t->opts.length, windows = size > 0 ? (size - 1) / length : 0;
  if (windows < 1)
    return emxi_fail(EMX_ERR_INVALID, "emx_trainer_evaluate: %lld bytes, a window takes %lld", (long long)size,
                     (long long)length + 1);
  for (int64_t i = 0; i <= windows * length; i++)
    if (data[i] >= t->config.vocab_size)
      return emxi_fail(EMX_ERR_INVALID, "emx_trainer_evaluate: byte %d at offset %lld is not below vocab_size %d", data[i],
                       (long long)i, t->config.vocab_size);
  double sum = 0, loss;
  for (int64_t at = 0; at < windows; at += t->opts.batch) {
    const int64_t n = windows - at < t->opts.batch ? windows - at : t->opts.batch;
    for (int64_t i = 0; i < t->opts.batch; i++) put_window(&t->net, i, length, data + (at + (i < n ? i : 0)) * length);
    EMX_TRY(emxi_net_forward(&t->net, t->opts.batch, length, false, &loss));
    for (int64_t i = 0; i < n * length; i++) sum += t->net.nll[i];
  }
  *nats = sum / (double)(windows * length);
  return EMX_OK;
}
emx_status emx_trainer_evaluate(emx_trainer *t, const uint8_t *data, int64_t size, double *nats) {
  if (!t || !nats || (size > 0 && !data))
    return emxi_fail(EMX_ERR_INVALID, "emx_trainer_evaluate: %s is NULL", !t ? "t" : !nats ? "nats" : "data");
  EMXI_LOCKED(t->ctx, evaluate(t, data, size, nats));
}

emx_status emx_trainer_evaluate_task(emx_trainer *t, const emx_task_desc *task, int64_t first, int64_t n, emx_task_score *score) {
  if (!t) return emxi_fail(EMX_ERR_INVALID, "emx_trainer_evaluate_task: t is NULL");
  EMXI_LOCKED(t->ctx, emxi_task_evaluate(t->ctx, &t->config, &t->net.w, task, first, n, NULL, NULL, score));
}
