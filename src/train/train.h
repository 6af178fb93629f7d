/* SPDX-License-Identifier: Apache-2.0
 * Inside the trainer: the data, the network with its saved activations, the optimiser, the state on disk.
 * Shape letters: B sequences of T tokens, N = B T; V, W, F, H, G, D as in model/model.h; L layers; P parameters. */
#ifndef EMXI_TRAIN_H
#define EMXI_TRAIN_H

#include "model/model.h"
#include "model/nn.h"

/* ---- data (data.c): files of bytes, borrowed */
typedef struct emxi_data {
  const uint8_t **files; /* [n] */
  int64_t *sizes;        /* [n] */
  int64_t n, bytes;
  uint64_t hash; /* of the sizes and the content */
} emxi_data;
/* Every byte must be below `vocab`. */
emx_status emxi_data_create(const uint8_t *const *files, const int64_t *sizes, int64_t n, int32_t vocab, emxi_data *out);
void emxi_data_destroy(emxi_data *d);
/* Windows of length+1 bytes that lie in one file. */
int64_t emxi_data_windows(const emxi_data *d, int64_t length);
/* Window i of step t: uniform over all windows, a function of (seed, t, i) and the data. There must be a window. */
const uint8_t *emxi_data_draw(const emxi_data *d, int64_t length, uint64_t seed, int64_t t, int64_t i);

/* ---- network (net.c) */
/* Positions a row that forward saves for backward; a longer row is found again. */
#define EMXI_SAVED_SUPPORT 32

typedef struct emxi_saved { /* what the backward pass needs of one layer */
  float *x, *rstd, *h;      /* [N,W] input of the layer, [N], [N,W] normalised */
  float *qkv;               /* [N,(H+2G)D + 2E]: one product with wq, wk, wv, theta_w, theta_v, neighbours in the flat array;
                                      then q and k are turned (RoPE) and q is multiplied by theta, in place. 2E: ASEntmax */
  float *tau, *o;           /* [B,H,T], [N,H D] */
  int32_t *support, *index; /* [B,H,T], [B,H,T,EMXI_SAVED_SUPPORT]: positions that have a weight; alpha > 1 */
  float *x_mid, *rstd_mid, *h_mid; /* after the attention */
  float *gate, *up;                /* [N,F] */
} emxi_saved;

/* Which outputs of the embedding and which heads a pass drops: a function of (seed, step) and the place. */
typedef struct emxi_dropout {
  double embed, head; /* shares */
  uint64_t seed;
  int64_t step;
} emxi_dropout;

typedef struct emxi_net {
  emx_ctx *ctx;
  emx_model_config config;
  emxi_weights w, g;                       /* views: weights and their gradient */
  float *slopes;                           /* [H] */
  float *rope;                             /* [T,D], RoPE */
  double *sums;                            /* of theta's gradient */
  double *alphas, *d_alpha, *alpha_slopes; /* [H] each, learned alpha: of the layer at work */
  emxi_saved *layers;
  float *x_last, *rstd_last, *h_last; /* of the last norm */
  float *logits, *nll;                /* [M,V], [M] of the M rows that are scored */
  float *dx, *dh, *dqkv, *d_o, *glu;  /* working memory, not per layer; glu [N,F] */
  float *partials;
  int32_t *tokens, *targets; /* [N], [M] */
  /* Text: every row is scored, max_scored = n_scored = 0 and M = N. Tasks: max_scored is set before carving, n_scored >= 1 before
   * a pass, and M = n_scored. */
  int64_t max_scored, n_scored;
  int32_t *scored;      /* [max_scored] rows, ascending */
  float *x_scored;      /* [max_scored,W] their x_last */
  emxi_dropout dropout; /* of passes that want a gradient */
  void *workspace;      /* of the attention */
  size_t workspace_bytes;
} emxi_net;
/* Carves everything that depends on the number of tokens, for at most `tokens` in a batch of any of the n shapes (B,T).
 * A counting arena gives the size; net->layers [L] and the views must be there when it computes. */
emx_status emxi_net_carve(emxi_net *net, emxi_arena *arena, const int64_t (*shapes)[2], int n);
/* Mean loss of net->tokens and net->targets, losses of the scored rows in net->nll. want_gradient: net->logits becomes their
 * gradient. */
emx_status emxi_net_forward(emxi_net *net, int64_t batch, int64_t length, bool want_gradient, double *loss);
/* All of net->g, after a forward pass that wanted it. */
emx_status emxi_net_backward(emxi_net *net, int64_t batch, int64_t length);

/* ---- tasks (task.c, score.c) */
emx_status emxi_task_check(const emx_task_desc *t);
/* That a model with this configuration speaks the task's tokens. */
emx_status emxi_task_fits(const emx_task_desc *t, const emx_model_config *c);
/* Tokens, targets and scored rows of samples first .. first+n-1, padded to the longest, *length; tokens: optional, without
 * padding. The network has room for [n, max_tokens]. */
emx_status emxi_task_batch(const emx_task_desc *t, int64_t first, int64_t n, emxi_net *net, int64_t *length, int64_t *tokens);
emx_status emxi_task_evaluate(emx_ctx *ctx, const emx_model_config *c, const emxi_weights *w, const emx_task_desc *t,
                              int64_t first, int64_t n, emx_progress_fn progress, void *user, emx_task_score *score);

/* ---- optimiser (adamw.c) */
typedef struct emxi_adamw_span {
  int64_t offset, count;
  bool decay;
} emxi_adamw_span;
typedef struct emxi_adamw {
  int64_t n;              /* spans cover the flat array in order */
  emxi_adamw_span *spans; /* [n] */
  double *sums;           /* [n] */
  uint8_t *done;          /* [n] */
  float *m, *v;           /* [P] */
} emxi_adamw;
void emxi_adamw_carve(emxi_adamw *a, emxi_arena *arena, const emx_model_config *c);
/* Global 2-norm of g. */
emx_status emxi_adamw_norm(emx_ctx *ctx, emxi_adamw *a, const float *g, double *norm);
/* Step number `step` (from 1) on w with grad_scale * g. Once begun it is finished, cancelled or not. */
void emxi_adamw_update(emx_ctx *ctx, emxi_adamw *a, const emx_train_opts *opts, double lr, int64_t step, double grad_scale,
                       const float *g, float *w);
/* Learning rate of the step after `done` steps. */
double emxi_learning_rate(const emx_train_opts *opts, int64_t done);

/* ---- trainer (trainer.c) */
struct emx_trainer {
  emx_ctx *ctx;
  emx_model_config config;
  emx_train_opts opts;
  emxi_data data;     /* of text */
  emx_task_desc task; /* kind 0: text */
  emxi_net net;
  emxi_adamw adamw;
  void *memory; /* of everything that the arena carves */
  int64_t step; /* done */
  bool nonfinite;
};

/* ---- state on disk (state.c) */
emx_status emxi_state_save(const emx_trainer *t, const char *folder);
/* Before the memory is there: that the file belongs to this configuration, these options and this data; the steps done. */
emx_status emxi_state_check(const emx_checkpoint *ck, const char *path, const emx_trainer *t, int64_t *step);
/* Weights and moments. */
emx_status emxi_state_load(const emx_checkpoint *ck, const char *path, emx_trainer *t);
emx_status emxi_state_open(const char *folder, emx_checkpoint **ck, char **path);

#endif
