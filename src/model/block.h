/* SPDX-License-Identifier: Apache-2.0
 * A transformer block around attention, by device. A session's forward pass is begin, then for each layer before, attention over
 * the cache (emx_decode, emx_attn_forward) and after, then norm and head. What a device fuses within one of these is its own
 * business.
 *
 * Arrays are f32 in memory of the context's device. Calls enqueue; on the CPU they are done on return. */
#ifndef EMXI_BLOCK_H
#define EMXI_BLOCK_H

#include "model/model.h"

typedef struct emxi_block {
  const emx_model_config *config;
  const emxi_layer *w; /* of the layer, on the device */
  int64_t m, from;     /* tokens, and the position of the first */
  int32_t scaled;      /* E */
  /* Activations. The rows of the first line are their width apart. */
  float *x, *h, *a;             /* [m,W] residual stream; [m,W] normed; [m,H*D] what attention gives */
  float *q, *k, *v, *z;         /* [m,H*D], [m,G*D] twice, [m,2E] what theta_w and theta_v make of the states */
  int64_t q_row, kv_row, z_row; /* floats from one token to the next */
  float *gate, *up;             /* [m,F] */
  int64_t gate_row;
  float *rope;     /* [m,D], CPU: cosines and sines */
  int32_t *tokens; /* [m], at least 2, elsewhere: in memory of the device */
  bool stepped;    /* m = 1: the token and its position are tokens[0] and tokens[1] at the time when the work runs */
} emxi_block;

typedef struct emxi_block_parts {
  int64_t m, n;                /* queries, keys */
  int32_t dtype;               /* EMX_F16, EMX_BF16 */
  const void *from_k, *from_v; /* [G,n,D] */
  void *q;                     /* [H,m,2D] q rounded, and the rest of it rounded */
  void *k, *v;                 /* [G,n,2D] k twice; v and zeros */
  float *o;                    /* [H,m,2D], of which the first half means something */
  int32_t *beyond;             /* in memory of the device: working memory of part_queries */
} emxi_block_parts;

typedef struct emxi_blocks {
  /* q, k, v, z of a token lie next to each other in this order, and so do gate and up: one matrix product makes them. */
  bool merged;
  /* What the calls below need on this context. */
  emx_status (*open)(emx_ctx *ctx, const emx_model_config *config, void **state);
  void (*close)(emx_ctx *ctx, void *state);
  /* x of the tokens (host memory; valid ones; stepped: not looked at), and what depends on their positions alone. */
  emx_status (*begin)(emx_ctx *ctx, void *state, const emxi_block *b, const float *embed, const int32_t *tokens);
  /* q (turned, and times theta), k (turned) and v of x. */
  emx_status (*before)(emx_ctx *ctx, void *state, const emxi_block *b);
  /* Dense attention by 16-bit products, heads of 2 D: q for it, and whether two numbers of that dtype are enough (f16 ends at
   * 65,504, and to know whether all queries do, the call waits); k and v; a of its o. NULL on the CPU. */
  emx_status (*part_queries)(emx_ctx *ctx, void *state, const emxi_block *b, const emxi_block_parts *parts, bool *enough);
  emx_status (*part_keys)(emx_ctx *ctx, void *state, const emxi_block *b, const emxi_block_parts *parts);
  emx_status (*join)(emx_ctx *ctx, void *state, const emxi_block *b, const emxi_block_parts *parts);
  /* x += W_o a, then x += W_down(silu(W_gate rms(x)) * W_up rms(x)). */
  emx_status (*after)(emx_ctx *ctx, void *state, const emxi_block *b);
  /* h = rms(x) w */
  emx_status (*norm)(emx_ctx *ctx, void *state, const emxi_block *b, const float *w);
  /* logits [m,V] of states [m,W]; w [V,W]. */
  emx_status (*head)(emx_ctx *ctx, void *state, const emx_model_config *config, const float *w, const float *states,
                     float *logits, int64_t m);
  /* Notes the time at which the device gets here; i < 2 num_layers. */
  emx_status (*mark)(emx_ctx *ctx, void *state, int32_t i);
  /* Seconds from mark i to mark i + 1, once the device has passed both. */
  double (*between)(emx_ctx *ctx, void *state, int32_t i);
  /* A token's work as one piece that is enqueued again and again, where a device has that; else NULL. Calls after `record` are
   * noted, not run, up to `recorded`, which gives the piece or, with NULL, drops it. */
  emx_status (*record)(emx_ctx *ctx, void *state);
  emx_status (*recorded)(emx_ctx *ctx, void *state, void **piece);
  /* Runs a piece with this token at this position. */
  emx_status (*replay)(emx_ctx *ctx, void *state, void *piece, const emxi_block *b, int32_t token, int64_t position);
  void (*forget)(emx_ctx *ctx, void *state, void *piece); /* NULL is allowed */
} emxi_blocks;

extern const emxi_blocks emxi_blocks_cpu;
/* With the CUDA back end, where its build has found cublasLt.h; elsewhere its address is NULL. */
extern const emxi_blocks emxi_blocks_cuda __attribute__((weak));

#endif
