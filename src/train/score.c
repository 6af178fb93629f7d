/* SPDX-License-Identifier: Apache-2.0
 * Tasks meet the network: padded batches, and exact match.
 *
 * One pass over prompt and true answer decides exact match. Let a_1..a_m be the answer and g_i the first choice after the prompt
 * and a_1..a_{i-1}. Greedy decoding that says a_1..a_{i-1} says g_i next, because attention is causal: it has seen the same
 * tokens. If g_i = a_i for all i it says the answer; else, at the smallest i with g_i != a_i, it says a_1..a_{i-1} and then
 * something else. */
#include "base/num.h"
#include "train.h"

#include <math.h>
#include <string.h>

enum { BATCH_TOKENS = 8192 };

emx_status emxi_task_fits(const emx_task_desc *t, const emx_model_config *c) {
  emx_task_info info = {.struct_size = sizeof info};
  EMX_TRY(emx_task_get_info(t, &info));
  if (c->task != t->kind)
    return c->task ? emxi_fail(EMX_ERR_INVALID, "the model is of task %s, not %s", emx_task_name(c->task), emx_task_name(t->kind))
                   : emxi_fail(EMX_ERR_INVALID, "the model is of text, not of task %s", emx_task_name(t->kind));
  if (c->vocab_size != info.vocab_size)
    return emxi_fail(EMX_ERR_INVALID, "the model has a vocabulary of %d, task %s one of %d", c->vocab_size,
                     emx_task_name(t->kind), info.vocab_size);
  return EMX_OK;
}

emx_status emxi_task_batch(const emx_task_desc *t, int64_t first, int64_t n, emxi_net *net, int64_t *length, int64_t *tokens) {
  emx_task_info info = {.struct_size = sizeof info};
  EMX_TRY(emx_task_get_info(t, &info));
  const int64_t room = info.max_tokens;
  int64_t longest = 1, total = 0;
  for (int64_t i = 0; i < n; i++) {
    int32_t *row = net->tokens + i * room, *labels = net->targets + i * room;
    int64_t size;
    EMX_TRY(emx_task_sample(t, first + i, row, labels, room, &size));
    for (int64_t j = size; j < room; j++) {
      row[j] = info.pad;
      labels[j] = EMX_UNSCORED;
    }
    if (size > longest) longest = size;
    total += size;
  }
  /* rows move up to their distance, and labels become a list: neither overtakes what is still to be read */
  net->n_scored = 0;
  for (int64_t i = 0; i < n; i++) {
    memmove(net->tokens + i * longest, net->tokens + i * room, (size_t)longest * sizeof *net->tokens);
    for (int64_t j = 0; j < longest; j++) {
      const int32_t label = net->targets[i * room + j];
      if (label == EMX_UNSCORED) continue;
      net->scored[net->n_scored] = (int32_t)(i * longest + j);
      net->targets[net->n_scored++] = label;
    }
  }
  *length = longest;
  if (tokens) *tokens = total;
  return EMX_OK;
}

/* The layers share one set of activations: nothing is kept for a backward pass. */
static emx_status take_memory(emxi_net *net, int64_t batch, int64_t max_tokens, void **memory) {
  emxi_arena arena;
  const int32_t layers = net->config.num_layers;
  net->config.num_layers = 1;
  emxi_arena_init(&arena, NULL, 0);
  int64_t(*shapes)[2] = emxi_alloc((size_t)max_tokens * sizeof *shapes);
  if (!shapes) return emxi_fail(EMX_ERR_NOMEM, "task: no memory for %lld shapes", (long long)max_tokens);
  for (int64_t i = 0; i < max_tokens; i++) shapes[i][0] = batch, shapes[i][1] = i + 1;
  emx_status status = emxi_net_carve(net, &arena, shapes, (int)max_tokens);
  const size_t bytes = emxi_arena_total(&arena);
  if (!status && (arena.overflow || !(*memory = emxi_alloc(bytes))))
    status = emxi_fail(EMX_ERR_NOMEM, "task: no memory for %zu bytes", bytes);
  if (!status) {
    emxi_arena_init(&arena, *memory, bytes);
    status = emxi_net_carve(net, &arena, shapes, (int)max_tokens);
  }
  emxi_free(shapes);
  net->config.num_layers = layers;
  for (int32_t l = 1; l < layers; l++) net->layers[l] = net->layers[0];
  return status;
}

static void count_right(const emxi_net *net, int64_t n, int64_t length, emx_task_score *score) {
  const int64_t vocab = net->config.vocab_size;
  int64_t row = 0;
  for (int64_t i = 0; i < n; i++) {
    bool exact = true;
    for (; row < net->n_scored && net->scored[row] < (i + 1) * length; row++) {
      const float *z = net->logits + row * vocab;
      int64_t best = 0;
      for (int64_t j = 1; j < vocab; j++)
        if (z[j] > z[best]) best = j;
      const bool right = best == net->targets[row];
      exact &= right;
      score->right += right;
    }
    score->exact += exact;
  }
}

static emx_status evaluate(emxi_net *net, const emx_task_desc *t, int64_t first, int64_t n, int64_t batch,
                           emx_progress_fn progress, void *user, emx_task_score *score) {
  double nats = 0;
  for (int64_t at = 0; at < n; at += batch) {
    const int64_t here = n - at < batch ? n - at : batch;
    int64_t length;
    double loss;
    EMX_TRY(emxi_task_batch(t, first + at, here, net, &length, NULL));
    EMX_TRY(emxi_net_forward(net, here, length, false, &loss));
    if (!isfinite(loss)) return emxi_fail(EMX_ERR_NONFINITE, "task: the loss of a sample is %g", loss);
    nats += loss * (double)net->n_scored;
    score->scored += net->n_scored;
    count_right(net, here, length, score);
    if (progress) progress(user, at + here, n);
  }
  score->samples = n;
  score->nats = nats / (double)score->scored;
  return EMX_OK;
}

emx_status emxi_task_evaluate(emx_ctx *ctx, const emx_model_config *c, const emxi_weights *w, const emx_task_desc *t,
                              int64_t first, int64_t n, emx_progress_fn progress, void *user, emx_task_score *score) {
  EMXI_CHECK_STRUCT(score, emx_task_score);
  EMXI_READ_STRUCT(t, emx_task_desc);
  EMX_TRY(emxi_task_check(t));
  if (first < 0 || n < 1 || first > INT64_MAX - n)
    return emxi_fail(EMX_ERR_INVALID, "task: samples from %lld, %lld of them", (long long)first, (long long)n);
  EMX_TRY(emxi_task_fits(t, c));
  emx_task_info info = {.struct_size = sizeof info};
  EMX_TRY(emx_task_get_info(t, &info));
  int64_t batch = BATCH_TOKENS / info.max_tokens;
  if (batch > n) batch = n;
  if (batch < 1) batch = 1;
  emxi_net net = {.ctx = ctx, .config = *c, .w = *w, .max_scored = info.max_scored * batch};
  void *memory = NULL;
  emx_task_score result = {0};
  net.layers = emxi_calloc((size_t)c->num_layers * sizeof *net.layers);
  emx_status status = net.layers ? take_memory(&net, batch, info.max_tokens, &memory)
                                 : emxi_fail(EMX_ERR_NOMEM, "task: no memory for the layers");
  if (!status) status = evaluate(&net, t, first, n, batch, progress, user, &result);
  emxi_free(memory);
  emxi_free(net.layers);
  if (!status) emxi_struct_write(score, &result, sizeof result);
  return status;
}

emx_status emx_task_evaluate(emx_model *model, const emx_task_desc *task, int64_t first, int64_t n, emx_progress_fn progress,
                             void *user, emx_task_score *score) {
  if (!model) return emxi_fail(EMX_ERR_INVALID, "emx_task_evaluate: model is NULL");
  if (model->ctx->device != EMX_DEVICE_CPU)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "emx_task_evaluate: tasks are scored on the CPU; open the model with a CPU context");
  EMXI_LOCKED(model->ctx, emxi_task_evaluate(model->ctx, &model->config, &model->w, task, first, n, progress, user, score));
}
