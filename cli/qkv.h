/* SPDX-License-Identifier: Apache-2.0
 * Files of queries, keys and values: what `emx eval --dump` and `emx generate --dump-qkv` write and `emx decode -f` and
 * `emx bench decode --data` read. */
#ifndef EMX_CLI_QKV_H
#define EMX_CLI_QKV_H

#include "cli.h"

typedef struct qkv {
  const void *q, *k, *v;                         /* [T,H,D] f32, [N,G,D] twice */
  const float *alibi_slopes;                     /* [H] */
  const double *alphas;                          /* [H], of a model that learned them; else NULL */
  int64_t queries, tokens, heads, kv_heads, dim; /* T, N, H, G, D; query t sits at position N-T+t */
  int32_t dtype;                                 /* of k and v */
  int32_t layer;
  double alpha; /* of all heads without alphas */
} qkv;
int qkv_write(const char *path, const qkv *x);
/* The alpha that a file names, or `otherwise` if it names none. CLI_ERROR: not a number from 1 to 4. */
int qkv_alpha(const char *path, const emx_checkpoint *ck, double otherwise, double *alpha);

/* Records the queries of every step that a session decodes, a file a layer at the end. */
typedef struct qkv_recorder qkv_recorder;
/* Room for `steps` steps, all layers or (layer >= 0) one. The session must live as long. Makes the folder. */
int qkv_record(emx_session *s, const emx_model_config *config, const char *folder, int32_t layer, int64_t steps,
               qkv_recorder **out);
/* folder/layer-L.safetensors with the steps since qkv_record and the cache's keys and values as they are; nothing if there was no
 * step. */
int qkv_record_write(qkv_recorder *r);
void qkv_record_end(qkv_recorder *r); /* before the session */

#endif
