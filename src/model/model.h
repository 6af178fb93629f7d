/* SPDX-License-Identifier: Apache-2.0
 * What the runtime and the trainer share: the parameters of a model in one flat array, and its folder. */
#ifndef EMXI_MODEL_H
#define EMXI_MODEL_H

#include "base/base.h"
#include <emx_model.h>

/* Shape letters here: V vocabulary, W hidden width, F gated width, H query heads, E of them with a theta, G KV heads, D head dim.
 * Matrices are [out,in]. */
typedef struct emxi_layer {
  float *input_norm;        /* [W] */
  float *wq, *wk, *wv;      /* [H*D,W], [G*D,W], [G*D,W] */
  float *theta_w, *theta_v; /* ASEntmax: [E,W] each. wq, wk, wv and these are neighbours: one matrix product gives them all */
  float *wo;                /* [W,H*D] */
  float *post_norm;         /* [W] */
  float *gate, *up, *down;  /* [F,W], [F,W], [W,F] */
  float *alpha;             /* [H], learned alpha: a of alpha = 1 + sigmoid(a) */
  float *theta_b, *theta_c; /* [E] each. ASEntmax: both; SSMax: b is s; learned focal: b is the temperature's logarithm */
} emxi_layer;

typedef struct emxi_weights {
  float *embed;       /* [V,W] */
  float *norm;        /* [W] */
  float *head;        /* [V,W]; == embed when tied */
  emxi_layer *layers; /* [num_layers], owned */
  float *data;        /* [count] */
  int64_t count;
  bool owns_data;
} emxi_weights;

enum {
  EMXI_START_NORMAL,
  EMXI_START_RESIDUAL /* onto the residual stream */,
  EMXI_START_NORM,
  EMXI_START_SCALAR /* alpha's and theta's */
};
typedef struct emxi_param {
  char name[96]; /* Llama's */
  int32_t ndim;
  int64_t shape[2];
  int64_t offset, count; /* elements in the flat array */
  bool decay;            /* matrices only */
  int32_t start;         /* EMXI_START_*: how training begins */
  float value;           /* of all elements at the start; NORM and SCALAR */
} emxi_param;

/* The functions below expect a configuration that emx_model_config_check accepts. */
int64_t emxi_param_tensors(const emx_model_config *c);
/* Tensor i of emxi_param_tensors, in flat order: the embedding, the layers, the last norm, the head if it is not tied. */
void emxi_param_at(const emx_model_config *c, int64_t i, emxi_param *out);
/* Views into data [emx_model_config_parameters], which is borrowed; NULL: an array of zeros that the weights own. */
emx_status emxi_weights_create(const emx_model_config *c, float *data, emxi_weights *w);
void emxi_weights_destroy(emxi_weights *w); /* of a zeroed struct: nothing */
/* Heads with ALiBi: the first ones. */
int32_t emxi_alibi_heads(const emx_model_config *c);
/* slopes [H] of the ALiBi heads, the others 0. */
void emxi_alibi_slopes(const emx_model_config *c, float *slopes);
/* Learned alphas do not come closer to 1: from there on a head is softmax for all that floats can tell, and lists of candidates
 * are as long as the context. */
#define EMXI_LEAST_ALPHA 1.01
/* alphas [H] of a layer's parameters; slopes: optional [H], derivatives to them (0 where alpha is held at EMXI_LEAST_ALPHA). */
void emxi_learned_alphas(const emx_model_config *c, const emxi_layer *w, double *alphas, double *slopes);
/* E, heads with a theta: the last ones. */
int32_t emxi_scaled_heads(const emx_model_config *c);

/* config.json of a folder. save_dtype is a record of what model.safetensors holds (torch_dtype). Writing is atomic. */
emx_status emxi_config_read(const char *folder, emx_model_config *c);
/* The text of config.json, for emxi_free; NULL when out of memory. */
char *emxi_config_text(const emx_model_config *c, const char *dtype);
emx_status emxi_config_write(const char *folder, const emx_model_config *c, int32_t save_dtype);

/* data (flat, f32) as a checkpoint of dtype f32, f16 or bf16, rounded to nearest; atomic. */
emx_status emxi_weights_save(const char *path, const emx_model_config *c, const float *data, int32_t dtype,
                             const char *const *metadata, int64_t n_metadata);
/* The other way: data [emx_model_config_parameters] from a checkpoint whose tensors must be exactly those of the
 * configuration. */
emx_status emxi_weights_load(const emx_checkpoint *ck, const emx_model_config *c, float *data);
/* The check of emxi_weights_load alone, before memory is taken for the data. */
emx_status emxi_weights_check(const emx_checkpoint *ck, const emx_model_config *c);

/* BLAKE2b with a digest of 256 bits (RFC 7693): `b2sum -l 256`. */
typedef struct emxi_hash {
  uint64_t h[8], bytes;
  uint8_t block[128];
  size_t used; /* of block */
} emxi_hash;
enum { EMXI_HASH_SIZE = 32 };
void emxi_hash_init(emxi_hash *hash);
void emxi_hash_add(emxi_hash *hash, const void *data, size_t size);
void emxi_hash_end(emxi_hash *hash, uint8_t digest[EMXI_HASH_SIZE]);

/* ---- files (file.c) */
/* A regular file for reading, and its size. Anything else is refused; a FIFO does not hang. */
emx_status emxi_file_open(const char *path, int *fd, size_t *size);

/* A file that is read from front to back; `left` bytes are still to come. */
typedef struct emxi_source {
  const char *path; /* for messages */
  int fd;
  uint64_t left;
  emxi_hash *hash; /* of what is read; or NULL */
} emxi_source;
emx_status emxi_source_get(emxi_source *source, void *out, size_t size);

/* Replaces a file as a whole or not at all: temporary name in the same folder, fsync, rename. A body that fails leaves the old
 * file. */
typedef struct emxi_sink {
  const char *path;
  int fd;
  emxi_hash *hash; /* of what is written; or NULL */
} emxi_sink;
emx_status emxi_sink_put(emxi_sink *sink, const void *data, size_t size);
typedef emx_status (*emxi_write_fn)(void *arg, emxi_sink *sink);
emx_status emxi_file_write(const char *path, emxi_write_fn body, void *arg);
typedef struct emxi_bytes {
  const void *data;
  size_t size;
} emxi_bytes;
emx_status emxi_file_replace(const char *path, const emxi_bytes *spans, int64_t n);
/* A whole file of at most `max` bytes into memory for emxi_free. Errors: IO, FORMAT (larger), NOMEM. */
emx_status emxi_file_read(const char *path, size_t max, char **data, size_t *size);
/* "folder/name" in memory for emxi_free; NULL when out of memory. */
char *emxi_path_join(const char *folder, const char *name);

/* A text as JSON, duplicate keys refused; NULL with the reason in *e. */
struct json_error_t;
struct json_t;
struct json_t *emxi_json_parse(const char *text, size_t size, struct json_error_t *e);
/* The reason is lack of memory. Where jansson is short of it inside of a string, it says that the text is wrong. */
bool emxi_json_nomem(const struct json_error_t *e);
/* A value as text, for emxi_free; NULL when out of memory. */
char *emxi_json_text(const struct json_t *value, size_t flags);
/* The header of a safetensors file that is streamed: tensors without data. The source is at the first byte of data afterwards. */
emx_status emxi_checkpoint_header(emxi_source *source, emx_checkpoint **out);
/* The first bytes of a file of these tensors in this order, up to the data, for emxi_free. Their data is not looked at. */
emx_status emxi_checkpoint_head(const char *path, const emx_named_tensor *tensors, int64_t n, const char *const *metadata,
                                int64_t n_metadata, char **head, size_t *size);
/* Place of a tensor in file order, -1 if it is not there. */
int64_t emxi_checkpoint_index(const emx_checkpoint *ck, const char *name);

struct emxi_blocks; /* src/model/block.h */
struct emx_model {
  emx_ctx *ctx;
  emx_model_config config;
  emxi_weights w;
  const struct emxi_blocks *blocks; /* of the context's device, */
  void *blocks_state;               /* what they need there, */
  emxi_weights on_device;           /* and the weights as they see them; on the CPU those of w */
  char identity[2 * EMXI_HASH_SIZE + 1]; /* of the configuration and the weights, in hexadecimal; "" until it is asked for */
};
/* The context's lock is held. NULL when out of memory. */
const char *emxi_model_identity(emx_model *model);

/* What layer `layer` attended with, seen after it did: queries q [m,H,D] of tokens first .. first+m-1 as they meet the keys (f32,
 * scores are q.k/sqrt(D) plus the bias), their keys and values k, v [m,G,D] before the cache rounds them, and the cache, which
 * holds them. */
typedef struct emxi_layer_view {
  emx_ctx *ctx;
  emx_kv *kv;
  int32_t seq, layer;
  int64_t first, m;
  const float *q, *k, *v;
  const float *alibi_slopes; /* [H]; NULL: no bias */
  const double *alphas;      /* [H]; NULL: the configuration's for all */
} emxi_layer_view;
typedef emx_status (*emxi_tap_fn)(void *user, const emxi_layer_view *view);
/* Called for every layer of every chunk and token of this session (not of its forks) until the tap is NULL; a failure of the tap
 * is that of the call. The tap may use the cache but not change it. */
void emxi_session_tap(emx_session *s, emxi_tap_fn tap, void *user);

#endif
