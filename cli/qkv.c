/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "qkv.h"

#include "base/base.h"
#include "model/model.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int qkv_write(const char *path, const qkv *x) {
  const int64_t wide[3] = {x->queries, x->heads, x->dim}, narrow[3] = {x->tokens, x->kv_heads, x->dim};
  const emx_named_tensor tensors[] = {{"q", emx_tensor_view((void *)x->q, EMX_F32, 3, wide)},
                                      {"k", emx_tensor_view((void *)x->k, x->dtype, 3, narrow)},
                                      {"v", emx_tensor_view((void *)x->v, x->dtype, 3, narrow)},
                                      {"alibi_slopes", emx_tensor_view((void *)x->alibi_slopes, EMX_F32, 1, &x->heads)},
                                      {"alphas", emx_tensor_view((void *)x->alphas, EMX_F64, 1, &x->heads)}};
  char layer[16], alpha[32];
  snprintf(layer, sizeof layer, "%d", x->layer);
  snprintf(alpha, sizeof alpha, "%.17g", x->alpha);
  const char *const metadata[] = {"layer", layer, "entmax_alpha", alpha};
  return cli_status(emx_checkpoint_write(path, tensors, x->alphas ? 5 : 4, metadata, 2));
}

int qkv_alpha(const char *path, const emx_checkpoint *ck, double otherwise, double *alpha) {
  const char *text = emx_checkpoint_metadata(ck, "entmax_alpha");
  char *end;
  *alpha = otherwise;
  if (!text) return CLI_OK;
  const double x = strtod(text, &end);
  if (end == text || *end || !(x >= 1 && x <= 4)) return cli_fail("%s: entmax_alpha is '%s', expected 1 to 4", path, text);
  *alpha = x;
  return CLI_OK;
}

/* ---- the steps of a session */

typedef struct layer {
  emx_kv *kv;
  int32_t seq;
  float *q; /* [steps,H,D] */
} layer;
struct qkv_recorder {
  emx_session *session;
  emx_model_config config;
  const char *folder;
  int32_t only;         /* layer, or -1 */
  int64_t first, steps; /* position of step 0, room */
  layer *layers;        /* [num_layers] */
  float *q;             /* of all */
  float *slopes;        /* [H] */
  double *alphas;       /* [num_layers,H] */
};

static emx_status tap(void *user, const emxi_layer_view *view) {
  qkv_recorder *r = user;
  const int64_t heads = r->config.num_heads, row = heads * r->config.head_dim, step = view->first - r->first;
  layer *l = &r->layers[view->layer];
  l->kv = view->kv;
  l->seq = view->seq;
  if (l->q && step < r->steps) memcpy(l->q + step * row, view->q, (size_t)row * sizeof *l->q); /* m is 1 */
  if (view->alibi_slopes) memcpy(r->slopes, view->alibi_slopes, (size_t)heads * sizeof *r->slopes);
  if (view->alphas) memcpy(r->alphas + view->layer * heads, view->alphas, (size_t)heads * sizeof *r->alphas);
  return EMX_OK;
}

int qkv_record(emx_session *s, const emx_model_config *config, const char *folder, int32_t only, int64_t steps,
               qkv_recorder **out) {
  if (only >= config->num_layers) return cli_fail("--layer is %d, the model's last is %d", only, config->num_layers - 1);
  if (mkdir(folder, 0777) && errno != EEXIST) return cli_fail("%s: %s", folder, strerror(errno));
  const int64_t layers = config->num_layers, heads = config->num_heads, row = heads * config->head_dim;
  qkv_recorder *r = calloc(1, sizeof *r);
  if (!r) return cli_nomem(sizeof *r, "queries");
  *r = (qkv_recorder){.session = s,
                      .config = *config,
                      .folder = folder,
                      .only = only,
                      .first = emx_session_length(s),
                      .steps = steps,
                      .layers = calloc((size_t)layers, sizeof *r->layers),
                      .slopes = calloc((size_t)heads, sizeof *r->slopes),
                      .alphas = calloc((size_t)(layers * heads), sizeof *r->alphas)};
  size_t cells = 0;
  if (emxi_mul((size_t)steps, (size_t)(row * (only < 0 ? layers : 1)), &cells)) r->q = calloc(cells, sizeof *r->q);
  if (!r->layers || !r->slopes || !r->alphas || !r->q) {
    qkv_record_end(r);
    return cli_nomem(cells * sizeof *r->q, "queries");
  }
  for (int32_t l = 0; l < layers; l++)
    if (only < 0 || l == only) r->layers[l].q = r->q + (only < 0 ? l * steps * row : 0);
  emxi_session_tap(s, tap, r);
  *out = r;
  return CLI_OK;
}

/* Rows of all KV heads, token by token, from the pages of a sequence: [N,G,D]. */
static void gather(const emx_tensor *pool, const int32_t *pages, int64_t page, int64_t tokens, char *out) {
  const int64_t heads = pool->shape[1], dim = pool->shape[3];
  const size_t width = emx_dtype_size(pool->dtype), row = (size_t)dim * width;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t g = 0; g < heads; g++, out += row) {
      const int64_t at = pages[t / page] * pool->stride[0] + g * pool->stride[1] + t % page * pool->stride[2];
      memcpy(out, (const char *)pool->data + (size_t)at * width, row);
    }
}

static int write_layer(const qkv_recorder *r, int32_t l, int64_t tokens) {
  const emx_model_config *c = &r->config;
  const layer *y = &r->layers[l];
  emx_tensor k, v;
  const int32_t *pages;
  int64_t n_pages;
  emx_kv_info info = {.struct_size = sizeof info};
  char *rows = NULL, *path = NULL;
  int code = CLI_OK;
  CLI_TRY(emx_kv_get_info(y->kv, &info));
  CLI_TRY(emx_kv_pool_view(y->kv, &k, &v));
  CLI_TRY(emx_seq_block_table(y->kv, y->seq, &pages, &n_pages));
  const size_t bytes = (size_t)(tokens * c->num_kv_heads * c->head_dim) * emx_dtype_size(info.dtype); /* no more than the cache */
  rows = malloc(2 * bytes);
  if (!rows || asprintf(&path, "%s/layer-%d.safetensors", r->folder, l) < 0) {
    path = NULL;
    code = cli_nomem(2 * bytes, "keys and values");
    goto done;
  }
  gather(&k, pages, info.page_size, tokens, rows);
  gather(&v, pages, info.page_size, tokens, rows + bytes);
  const qkv x = {.q = y->q,
                 .k = rows,
                 .v = rows + bytes,
                 .alibi_slopes = r->slopes,
                 .alphas = c->alpha_learned ? r->alphas + (int64_t)l * c->num_heads : NULL,
                 .queries = tokens - r->first,
                 .tokens = tokens,
                 .heads = c->num_heads,
                 .kv_heads = c->num_kv_heads,
                 .dim = c->head_dim,
                 .dtype = info.dtype,
                 .layer = l,
                 .alpha = c->entmax_alpha};
  code = qkv_write(path, &x);
done:
  free(rows);
  free(path);
  return code;
}
int qkv_record_write(qkv_recorder *r) {
  const int64_t tokens = emx_session_length(r->session); /* without a step that failed */
  int code = CLI_OK;
  for (int32_t l = 0; l < r->config.num_layers && !code; l++)
    if (r->layers[l].q && tokens > r->first) code = write_layer(r, l, tokens);
  return code;
}
void qkv_record_end(qkv_recorder *r) {
  if (!r) return;
  emxi_session_tap(r->session, NULL, NULL);
  free(r->layers);
  free(r->slopes);
  free(r->alphas);
  free(r->q);
  free(r);
}
