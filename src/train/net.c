/* SPDX-License-Identifier: Apache-2.0
 * The network on one batch: forward with saved activations, backward.
 *
 *   x += attn(rms(x)) Wo^T;  x += (silu(h Wg^T) * (h Wu^T)) Wd^T, h = rms(x);  logits = rms(x) head^T
 *
 * Cost: 2 P FLOP a token forward, 4 P backward, and the attention. Saved: L (5 W + (2 H + 2 G) D + 2 F + ...) floats a token; the
 * product silu(gate) up is computed again in the backward pass, which reads gate and up anyway. */
#include "base/num.h"
#include "model/scale.h"
#include "train.h"

typedef struct sizes {
  int64_t vocab, width, gated, q, kv, z, qkv; /* q = H D, kv = G D, z: where theta's columns begin, qkv: a whole row */
} sizes;
static sizes sizes_of(const emx_model_config *c) {
  const int64_t q = (int64_t)c->num_heads * c->head_dim, kv = (int64_t)c->num_kv_heads * c->head_dim;
  const int64_t theta = c->attn_scale_type == EMX_ATTN_SCALE_ASENTMAX ? 2 * emxi_scaled_heads(c) : 0;
  return (sizes){c->vocab_size, c->hidden_size, c->intermediate_size, q, kv, q + 2 * kv, q + 2 * kv + theta};
}

/* ---- attention: heads of the rows of qkv as [B,H,T,D] views */

typedef struct views {
  emx_attn_desc desc;
  emx_attn_io io;
  emx_tensor q, k, v, o, tau, support, index, slopes, alphas, d_alpha, d_o, d_q, d_k, d_v;
} views;

static emx_tensor heads(float *p, int64_t batch, int64_t length, int64_t n, int64_t d, int64_t row) {
  const int64_t shape[4] = {batch, n, length, d};
  emx_tensor t = emx_tensor_view(p, EMX_F32, 4, shape);
  t.stride[0] = length * row;
  t.stride[1] = d;
  t.stride[2] = row;
  return t;
}

static bool saves_support(const emx_model_config *c) { return c->entmax_alpha > 1; }

static void attention_views(const emxi_net *net, const emxi_saved *s, int64_t batch, int64_t length, int32_t pass, views *a) {
  const emx_model_config *c = &net->config;
  const sizes z = sizes_of(c);
  const int64_t h = c->num_heads, g = c->num_kv_heads, d = c->head_dim;
  emx_attn_desc_init(&a->desc);
  a->desc.alpha = c->entmax_alpha;
  emx_attn_io_init(&a->io);
  /* Offsets of a NULL base are not formed: while counting, any aligned address stands for the memory to come. */
  static float nowhere[1];
  static int32_t no_list[1];
  float *qkv = s ? s->qkv : nowhere, *dqkv = net->dqkv ? net->dqkv : nowhere;
  const int64_t at_k = s ? z.q : 0, at_v = s ? z.q + z.kv : 0, dat_k = net->dqkv ? z.q : 0, dat_v = net->dqkv ? z.q + z.kv : 0;
  a->q = heads(qkv, batch, length, h, d, z.qkv);
  a->k = heads(qkv + at_k, batch, length, g, d, z.qkv);
  a->v = heads(qkv + at_v, batch, length, g, d, z.qkv);
  a->tau = emx_tensor_view(s ? s->tau : nowhere, EMX_F32, 3, (int64_t[]){batch, h, length});
  a->slopes = emx_tensor_view(net->slopes ? net->slopes : nowhere, EMX_F32, 1, &h);
  a->io.q = &a->q;
  a->io.k = &a->k;
  a->io.v = &a->v;
  if (c->alpha_learned) {
    a->alphas = emx_tensor_view(net->alphas, EMX_F64, 1, &h);
    a->d_alpha = emx_tensor_view(net->d_alpha, EMX_F64, 1, &h);
    a->io.alphas = &a->alphas;
  }
  *(a->desc.alpha == 1 ? &a->io.lse : &a->io.tau) = &a->tau;
  if (saves_support(c)) {
    a->support = emx_tensor_view(s ? s->support : no_list, EMX_I32, 3, (int64_t[]){batch, h, length});
    a->index = emx_tensor_view(s ? s->index : no_list, EMX_I32, 4, (int64_t[]){batch, h, length, EMXI_SAVED_SUPPORT});
    a->io.support = &a->support;
    a->io.support_index = &a->index;
  }
  a->io.alibi_slopes = &a->slopes;
  if (pass == EMX_PASS_FORWARD) {
    a->o = heads(s ? s->o : nowhere, batch, length, h, d, z.q);
    a->io.o = &a->o;
  } else {
    a->d_o = heads(net->d_o ? net->d_o : nowhere, batch, length, h, d, z.q);
    a->d_q = heads(dqkv, batch, length, h, d, z.qkv);
    a->d_k = heads(dqkv + dat_k, batch, length, g, d, z.qkv);
    a->d_v = heads(dqkv + dat_v, batch, length, g, d, z.qkv);
    a->io.d_o = &a->d_o;
    a->io.d_q = &a->d_q;
    a->io.d_k = &a->d_k;
    a->io.d_v = &a->d_v;
    if (c->alpha_learned) a->io.d_alpha = &a->d_alpha;
  }
}

/* ---- memory */

emx_status emxi_net_carve(emxi_net *net, emxi_arena *arena, const int64_t (*shapes)[2], int n) {
  const emx_model_config *c = &net->config;
  const sizes z = sizes_of(c);
  int64_t tokens = 0, longest = 0;
  for (int i = 0; i < n; i++) {
    if (shapes[i][0] * shapes[i][1] > tokens) tokens = shapes[i][0] * shapes[i][1];
    if (shapes[i][1] > longest) longest = shapes[i][1];
  }
#define FLOATS(count) emxi_arena_take(arena, count, sizeof(float))
  const int64_t lists = saves_support(c) ? tokens * c->num_heads : 0;
  const bool rope = c->position_type == EMX_POSITION_ROPE;
  net->slopes = FLOATS(c->num_heads);
  net->rope = FLOATS(rope ? longest * c->head_dim : 0);
  net->alphas = emxi_arena_take(arena, c->alpha_learned ? c->num_heads : 0, sizeof(double));
  net->d_alpha = emxi_arena_take(arena, c->alpha_learned ? c->num_heads : 0, sizeof(double));
  net->alpha_slopes = emxi_arena_take(arena, c->alpha_learned ? c->num_heads : 0, sizeof(double));
  net->sums = emxi_arena_take(arena, emxi_scale_sums(c, tokens), sizeof(double));
  for (int32_t l = 0; l < c->num_layers; l++) {
    const emxi_saved s = {.x = FLOATS(tokens * z.width),
                          .rstd = FLOATS(tokens),
                          .h = FLOATS(tokens * z.width),
                          .qkv = FLOATS(tokens * z.qkv),
                          .tau = FLOATS(tokens * c->num_heads),
                          .support = emxi_arena_take(arena, lists, sizeof(int32_t)),
                          .index = emxi_arena_take(arena, lists, EMXI_SAVED_SUPPORT * sizeof(int32_t)),
                          .o = FLOATS(tokens * z.q),
                          .x_mid = FLOATS(tokens * z.width),
                          .rstd_mid = FLOATS(tokens),
                          .h_mid = FLOATS(tokens * z.width),
                          .gate = FLOATS(tokens * z.gated),
                          .up = FLOATS(tokens * z.gated)};
    if (arena->base) net->layers[l] = s;
  }
  net->x_last = FLOATS(tokens * z.width);
  net->rstd_last = FLOATS(tokens);
  net->h_last = FLOATS(tokens * z.width);
  const int64_t scored = net->max_scored ? net->max_scored : tokens;
  net->x_scored = FLOATS(net->max_scored * z.width);
  net->logits = FLOATS(scored * z.vocab);
  net->nll = FLOATS(scored);
  net->dx = FLOATS(tokens * z.width);
  net->dh = FLOATS(tokens * z.width);
  net->dqkv = FLOATS(tokens * z.qkv);
  net->d_o = FLOATS(tokens * z.q);
  net->glu = FLOATS(tokens * z.gated);
  int64_t partials = 0;
  for (int i = 0; i < n; i++) {
    const int64_t m = shapes[i][0] * shapes[i][1];
    const int64_t need[] = {emxi_rmsnorm_partials(m, z.width),         emxi_linear_partials(m, z.width, z.vocab),
                            emxi_linear_partials(m, z.gated, z.width), emxi_linear_partials(m, z.width, z.gated),
                            emxi_linear_partials(m, z.q, z.width),     emxi_linear_partials(m, z.width, z.qkv)};
    for (size_t j = 0; j < sizeof need / sizeof *need; j++)
      if (need[j] > partials) partials = need[j];
  }
  net->partials = FLOATS(partials);
#undef FLOATS
  net->tokens = emxi_arena_take(arena, tokens, sizeof(int32_t));
  net->targets = emxi_arena_take(arena, tokens, sizeof(int32_t));
  net->scored = emxi_arena_take(arena, net->max_scored, sizeof(int32_t));
  size_t most = 0;
  for (int i = 0; i < n; i++)
    for (int32_t pass = EMX_PASS_FORWARD; pass <= EMX_PASS_BACKWARD; pass++) {
      views a;
      size_t bytes;
      attention_views(net, arena->base ? &net->layers[0] : NULL, shapes[i][0], shapes[i][1], pass, &a);
      EMX_TRY(emx_attn_workspace_size(net->ctx, &a.desc, &a.io, pass, &bytes));
      if (bytes > most) most = bytes;
    }
  net->workspace = emxi_arena_take(arena, (int64_t)most, 1);
  net->workspace_bytes = most;
  if (arena->base && !arena->overflow) {
    emxi_alibi_slopes(c, net->slopes);
    if (rope) emxi_rope_table(c, 0, longest, net->rope);
  }
  return EMX_OK;
}

/* ---- passes */

/* Factors of the elements 8 i .. 8 i + 7 of a stream: zero, or what the rest is scaled by. 16 bits decide on an element.
 * ~seed: neither the weights nor the data of this seed are drawn with that key. */
static void drop_factors(const emxi_dropout *p, double share, uint64_t stream, int64_t i, float factor[8]) {
  const uint32_t below = (uint32_t)(share * 65536);
  const float rest = 1 / (1 - (float)below / 65536);
  uint32_t word[4];
  emxi_philox(~p->seed, (uint64_t)p->step, stream << 48 | (uint64_t)i, word);
  for (int j = 0; j < 8; j++) factor[j] = (word[j / 2] >> 16 * (j % 2) & 0xffff) < below ? 0 : rest;
}
/* Both are their own backward pass. x: outputs of the embedding [n]. */
static void drop_elements(const emxi_dropout *p, float *x, int64_t n) {
  float factor[8];
  for (int64_t i = 0; i < n && p->embed > 0; i += 8) {
    drop_factors(p, p->embed, 0, i / 8, factor);
    for (int64_t j = 0; j < 8 && i + j < n; j++) x[i + j] *= factor[j];
  }
}
/* o [B,T,H D]: whole heads of a sequence, of those without a slope: the others hold the order of the tokens, which nothing
 * replaces. */
static void drop_heads(const emxi_net *net, int32_t layer, float *o, int64_t batch, int64_t length) {
  const int64_t heads = net->config.num_heads, d = net->config.head_dim;
  float factor[8];
  for (int64_t i = 0; i < batch * heads && net->dropout.head > 0; i++) {
    const int64_t b = i / heads, h = i % heads;
    if (i % 8 == 0) drop_factors(&net->dropout, net->dropout.head, 1 + (uint64_t)layer, i / 8, factor);
    for (int64_t t = 0; t < length && net->slopes[h] == 0 && factor[i % 8] != 1; t++)
      for (int64_t j = 0; j < d; j++) o[((b * length + t) * heads + h) * d + j] *= factor[i % 8];
  }
}

emx_status emxi_net_forward(emxi_net *net, int64_t batch, int64_t length, bool want_gradient, double *loss) {
  const emx_model_config *c = &net->config;
  const sizes z = sizes_of(c);
  const int64_t n = batch * length;
  const emxi_places places = {.m = n, .length = length};
  emx_ctx *ctx = net->ctx;
  emxi_embed(net->w.embed, net->tokens, net->layers[0].x, n, z.width);
  if (want_gradient) drop_elements(&net->dropout, net->layers[0].x, n * z.width);
  for (int32_t l = 0; l < c->num_layers; l++) {
    const emxi_layer *w = &net->w.layers[l];
    const emxi_saved *s = &net->layers[l];
    float *next = l + 1 < c->num_layers ? net->layers[l + 1].x : net->x_last;
    EMX_TRY(emxi_rmsnorm(ctx, s->x, w->input_norm, c->rms_norm_eps, s->h, s->rstd, n, z.width));
    EMX_TRY(emxi_linear(ctx, s->h, w->wq, s->qkv, n, z.width, z.qkv, false));
    if (c->position_type == EMX_POSITION_ROPE)
      EMX_TRY(emxi_rope(ctx, s->qkv, z.qkv, c->num_heads + c->num_kv_heads, c->head_dim, net->rope, places, false));
    if (c->attn_scale_type != EMX_ATTN_SCALE_NONE)
      EMX_TRY(emxi_scale_queries(ctx, c, w, s->qkv, z.qkv, s->qkv + z.z, z.qkv, places));
    views a;
    if (c->alpha_learned) emxi_learned_alphas(c, w, net->alphas, NULL);
    attention_views(net, s, batch, length, EMX_PASS_FORWARD, &a);
    EMX_TRY(emx_attn_forward(ctx, &a.desc, &a.io, net->workspace, net->workspace_bytes));
    if (want_gradient) drop_heads(net, l, s->o, batch, length);
    EMX_TRY(emxi_linear_residual(ctx, s->o, w->wo, s->x, s->x_mid, n, z.q, z.width));
    EMX_TRY(emxi_rmsnorm(ctx, s->x_mid, w->post_norm, c->rms_norm_eps, s->h_mid, s->rstd_mid, n, z.width));
    EMX_TRY(emxi_linear(ctx, s->h_mid, w->gate, s->gate, n, z.width, z.gated, false));
    EMX_TRY(emxi_linear(ctx, s->h_mid, w->up, s->up, n, z.width, z.gated, false));
    EMX_TRY(emxi_swiglu(ctx, s->gate, s->up, net->glu, n * z.gated));
    EMX_TRY(emxi_linear_residual(ctx, net->glu, w->down, s->x_mid, next, n, z.gated, z.width));
  }
  /* Only scored rows get logits: with a large vocabulary and a short answer they would cost more than the layers. */
  const int64_t m = net->n_scored ? net->n_scored : n;
  const float *x = net->x_last;
  if (net->n_scored) {
    emxi_embed(net->x_last, net->scored, net->x_scored, m, z.width);
    x = net->x_scored;
  }
  EMX_TRY(emxi_rmsnorm(ctx, x, net->w.norm, c->rms_norm_eps, net->h_last, net->rstd_last, m, z.width));
  EMX_TRY(emxi_linear(ctx, net->h_last, net->w.head, net->logits, m, z.width, z.vocab, false));
  EMX_TRY(emxi_cross_entropy(ctx, net->logits, net->targets, net->nll, want_gradient ? 1.0f / (float)m : 0.0f, m, z.vocab));
  double sum = 0;
  for (int64_t i = 0; i < m; i++) sum += net->nll[i];
  *loss = sum / (double)m;
  return EMX_OK;
}

/* Gradients of the head, and of x_last into dx. */
static emx_status head_backward(emxi_net *net, const sizes *z, int64_t n) {
  emx_ctx *ctx = net->ctx;
  const int64_t m = net->n_scored ? net->n_scored : n;
  const float *x = net->n_scored ? net->x_scored : net->x_last;
  float *dx = net->n_scored ? net->dh : net->dx;
  EMX_TRY(emxi_linear_dw(ctx, net->h_last, net->logits, net->g.head, net->partials, m, z->width, z->vocab, false));
  EMX_TRY(emxi_linear_dx(ctx, net->logits, net->w.head, net->dh, m, z->width, z->vocab, false));
  EMX_TRY(
      emxi_rmsnorm_backward(ctx, x, net->w.norm, net->rstd_last, net->dh, dx, net->g.norm, net->partials, m, z->width, false));
  if (!net->n_scored) return EMX_OK;
  memset(net->dx, 0, (size_t)(n * z->width) * sizeof(float));
  for (int64_t i = 0; i < m; i++)
    memcpy(net->dx + net->scored[i] * z->width, net->dh + i * z->width, (size_t)z->width * sizeof(float));
  return EMX_OK;
}

emx_status emxi_net_backward(emxi_net *net, int64_t batch, int64_t length) {
  const emx_model_config *c = &net->config;
  const sizes z = sizes_of(c);
  const int64_t n = batch * length;
  const emxi_places places = {.m = n, .length = length};
  emx_ctx *ctx = net->ctx;
  memset(net->g.data, 0, (size_t)net->g.count * sizeof(float)); /* norms and the embedding are added to */
  EMX_TRY(head_backward(net, &z, n));
  for (int32_t l = c->num_layers - 1; l >= 0; l--) {
    const emxi_layer *w = &net->w.layers[l], *g = &net->g.layers[l];
    const emxi_saved *s = &net->layers[l];
    /* gated layer; the gradients of gate and up replace them */
    EMX_TRY(emxi_linear_dx(ctx, net->dx, w->down, net->glu, n, z.gated, z.width, false));
    EMX_TRY(emxi_swiglu_backward(ctx, s->gate, s->up, net->glu, s->gate, s->up, net->glu, n * z.gated));
    EMX_TRY(emxi_linear_dw(ctx, net->glu, net->dx, g->down, net->partials, n, z.gated, z.width, false));
    EMX_TRY(emxi_linear_dw(ctx, s->h_mid, s->gate, g->gate, net->partials, n, z.width, z.gated, false));
    EMX_TRY(emxi_linear_dw(ctx, s->h_mid, s->up, g->up, net->partials, n, z.width, z.gated, false));
    EMX_TRY(emxi_linear_dx(ctx, s->gate, w->gate, net->dh, n, z.width, z.gated, false));
    EMX_TRY(emxi_linear_dx(ctx, s->up, w->up, net->dh, n, z.width, z.gated, true));
    EMX_TRY(emxi_rmsnorm_backward(ctx, s->x_mid, w->post_norm, s->rstd_mid, net->dh, net->dx, g->post_norm, net->partials, n,
                                  z.width, true));
    /* attention */
    EMX_TRY(emxi_linear_dx(ctx, net->dx, w->wo, net->d_o, n, z.q, z.width, false));
    EMX_TRY(emxi_linear_dw(ctx, s->o, net->dx, g->wo, net->partials, n, z.q, z.width, false));
    drop_heads(net, l, net->d_o, batch, length);
    views a;
    if (c->alpha_learned) emxi_learned_alphas(c, w, net->alphas, net->alpha_slopes);
    attention_views(net, s, batch, length, EMX_PASS_BACKWARD, &a);
    EMX_TRY(emx_attn_backward(ctx, &a.desc, &a.io, net->workspace, net->workspace_bytes));
    for (int32_t h = 0; c->alpha_learned && h < c->num_heads; h++) g->alpha[h] = (float)(net->d_alpha[h] * net->alpha_slopes[h]);
    if (c->attn_scale_type != EMX_ATTN_SCALE_NONE)
      EMX_TRY(emxi_scale_backward(ctx, c, w, s->qkv, s->qkv + z.z, net->dqkv, net->dqkv + z.z, z.qkv, net->sums, g, places));
    if (c->position_type == EMX_POSITION_ROPE)
      EMX_TRY(emxi_rope(ctx, net->dqkv, z.qkv, c->num_heads + c->num_kv_heads, c->head_dim, net->rope, places, true));
    EMX_TRY(emxi_linear_dw(ctx, s->h, net->dqkv, g->wq, net->partials, n, z.width, z.qkv, false));
    EMX_TRY(emxi_linear_dx(ctx, net->dqkv, w->wq, net->dh, n, z.width, z.qkv, false));
    EMX_TRY(emxi_rmsnorm_backward(ctx, s->x, w->input_norm, s->rstd, net->dh, net->dx, g->input_norm, net->partials, n, z.width,
                                  true));
  }
  drop_elements(&net->dropout, net->dx, n * z.width);
  return emxi_embed_backward(ctx, net->tokens, net->dx, net->g.embed, n, z.width);
}
