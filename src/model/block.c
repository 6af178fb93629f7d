/* SPDX-License-Identifier: Apache-2.0
 * A transformer block on the CPU: the layers of nn.h and scale.h one after the other. */
#define _POSIX_C_SOURCE 200809L
#include "block.h"
#include "nn.h"
#include "scale.h"

#include <time.h>

/* The state is the times of the marks. */
static emx_status cpu_open(emx_ctx *ctx, const emx_model_config *config, void **state) {
  (void)ctx;
  const size_t bytes = 2 * (size_t)config->num_layers * sizeof(double);
  void *times = emxi_alloc(bytes);
  if (!times) return emxi_fail(EMX_ERR_NOMEM, "model: no memory for %zu bytes", bytes);
  *state = times;
  return EMX_OK;
}
static void cpu_close(emx_ctx *ctx, void *state) {
  (void)ctx;
  emxi_free(state);
}

static emx_status cpu_begin(emx_ctx *ctx, void *state, const emxi_block *b, const float *embed, const int32_t *tokens) {
  (void)ctx, (void)state;
  if (b->config->position_type == EMX_POSITION_ROPE) emxi_rope_table(b->config, b->from, b->m, b->rope);
  emxi_embed(embed, tokens, b->x, b->m, b->config->hidden_size);
  return EMX_OK;
}

static emx_status cpu_before(emx_ctx *ctx, void *state, const emxi_block *b) {
  (void)state;
  const emx_model_config *c = b->config;
  const emxi_layer *w = b->w;
  const emxi_places places = {.m = b->m, .length = b->m, .from = b->from};
  const int64_t m = b->m, width = c->hidden_size;
  EMX_TRY(emxi_rmsnorm(ctx, b->x, w->input_norm, c->rms_norm_eps, b->h, NULL, m, width));
  EMX_TRY(emxi_linear(ctx, b->h, w->wq, b->q, m, width, b->q_row, false));
  EMX_TRY(emxi_linear(ctx, b->h, w->wk, b->k, m, width, b->kv_row, false));
  EMX_TRY(emxi_linear(ctx, b->h, w->wv, b->v, m, width, b->kv_row, false));
  if (c->position_type == EMX_POSITION_ROPE) {
    EMX_TRY(emxi_rope(ctx, b->q, b->q_row, c->num_heads, c->head_dim, b->rope, places, false));
    EMX_TRY(emxi_rope(ctx, b->k, b->kv_row, c->num_kv_heads, c->head_dim, b->rope, places, false));
  }
  if (c->attn_scale_type == EMX_ATTN_SCALE_ASENTMAX) /* theta_w and theta_v are neighbours */
    EMX_TRY(emxi_linear(ctx, b->h, w->theta_w, b->z, m, width, b->z_row, false));
  return b->scaled ? emxi_scale_queries(ctx, c, w, b->q, b->q_row, b->z, b->z_row, places) : EMX_OK;
}

static emx_status cpu_norm(emx_ctx *ctx, void *state, const emxi_block *b, const float *w) {
  (void)state;
  return emxi_rmsnorm(ctx, b->x, w, b->config->rms_norm_eps, b->h, NULL, b->m, b->config->hidden_size);
}

static emx_status cpu_after(emx_ctx *ctx, void *state, const emxi_block *b) {
  const emxi_layer *w = b->w;
  const int64_t m = b->m, width = b->config->hidden_size, f = b->gate_row;
  EMX_TRY(emxi_linear(ctx, b->a, w->wo, b->x, m, (int64_t)b->config->num_heads * b->config->head_dim, width, true));
  EMX_TRY(cpu_norm(ctx, state, b, w->post_norm));
  EMX_TRY(emxi_linear(ctx, b->h, w->gate, b->gate, m, width, f, false));
  EMX_TRY(emxi_linear(ctx, b->h, w->up, b->up, m, width, f, false));
  EMX_TRY(emxi_swiglu(ctx, b->gate, b->up, b->gate, m * f));
  return emxi_linear(ctx, b->gate, w->down, b->x, m, f, width, true);
}

static emx_status cpu_head(emx_ctx *ctx, void *state, const emx_model_config *c, const float *w, const float *states,
                           float *logits, int64_t m) {
  (void)state;
  return emxi_linear(ctx, states, w, logits, m, c->hidden_size, c->vocab_size, false);
}

static emx_status cpu_mark(emx_ctx *ctx, void *state, int32_t i) {
  (void)ctx;
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  ((double *)state)[i] = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
  return EMX_OK;
}
static double cpu_between(emx_ctx *ctx, void *state, int32_t i) {
  (void)ctx;
  return ((double *)state)[i + 1] - ((double *)state)[i];
}

const emxi_blocks emxi_blocks_cpu = {.merged = false,
                                     .open = cpu_open,
                                     .close = cpu_close,
                                     .begin = cpu_begin,
                                     .before = cpu_before,
                                     .after = cpu_after,
                                     .norm = cpu_norm,
                                     .head = cpu_head,
                                     .mark = cpu_mark,
                                     .between = cpu_between};
