/* SPDX-License-Identifier: Apache-2.0
 * Sessions: one sequence over a paged cache of every layer, and the forward pass through it.
 *
 * Sessions that come from one another by fork share a pool: the caches, and the activations of one call, which is why a call
 * holds the context's lock from its beginning to its end. A call that fails truncates every layer to where it was.
 * Queries stay f32 over a cache of any dtype, in prefill and in decode alike, so both compute the same scores. */
#define _POSIX_C_SOURCE 200809L
#include "base/num.h"
#include "cache.h"
#include "kv/kv.h"
#include "model.h"
#include "nn.h"
#include "scale.h"

#include <time.h>

enum { NLL_ROWS = 64 }; /* rows of logits at a time */

typedef struct session_pool {
  emx_model *model;
  int32_t refs; /* sessions */
  int32_t kv_dtype, page_size, summaries;
  int64_t chunk, max_tokens;
  emx_kv **kv; /* [num_layers] */
  float *memory;
  float *x, *h;                          /* [chunk,W] residual stream; normed */
  float *q, *k, *v, *a;                  /* [chunk,H*D], [chunk,G*D] twice, [chunk,H*D] output of attention */
  float *gate, *up;                      /* [chunk,F] */
  float *logits;                         /* [NLL_ROWS,V] */
  float *slopes;                         /* [H] */
  float *theta;                          /* [chunk,2E], ASEntmax: what theta_w and theta_v make of the states */
  float *rope;                           /* [chunk,D], RoPE */
  emx_report *reports;                   /* [H] */
  bool alibi;                            /* some slope is not 0 */
  bool in_file;                          /* K and V are in a file */
  double *alphas;                        /* [num_layers,H], learned alpha; else NULL */
  void *attn_work, *decode_work, *stage; /* stage: of prefill, keys and values from a file */
  size_t attn_size, decode_size, stage_size;
  float *nll; /* [nll_room] of the prefill that runs */
  int64_t nll_room;
} session_pool;

struct emx_session {
  session_pool *pool;
  int32_t *seqs; /* [num_layers] */
  int64_t length;
  float *last; /* [W] normed state of the last token */
  bool last_known;
  emx_select_desc select;
  emx_session_stats stats;
  emx_session_support support; /* count NULL: none is wanted */
  emxi_tap_fn tap;
  void *tap_user;
};

void emx_session_opts_init_sized(emx_session_opts *opts, size_t size) {
  const emx_session_opts defaults = {.kv_dtype = EMX_BF16,
                                     .page_size = 16,
                                     .summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS,
                                     .chunk = 512,
                                     .max_sessions = 16,
                                     .max_tokens = 4096};
  emxi_struct_init(opts, size, &defaults, sizeof defaults);
}

/* ---- tensors of one call: queries and outputs [1,H,m,D] and keys [1,G,m,D] are views of what the linear layers write,
 * [m,heads*D] */

static emx_tensor heads_view(float *data, int64_t heads, int64_t m, int64_t d) {
  emx_tensor t = emx_tensor_view(data, EMX_F32, 4, (int64_t[]){1, heads, m, d});
  t.stride[0] = m * heads * d;
  t.stride[1] = d;
  t.stride[2] = heads * d;
  return t;
}

typedef struct tensors {
  emx_tensor q, k, v, o, slopes, alphas;
} tensors;
static tensors tensors_of(const session_pool *p, int32_t l, int64_t m) {
  const emx_model_config *c = &p->model->config;
  double *alphas = p->alphas ? p->alphas + (int64_t)l * c->num_heads : NULL;
  return (tensors){heads_view(p->q, c->num_heads, m, c->head_dim),
                   heads_view(p->k, c->num_kv_heads, m, c->head_dim),
                   heads_view(p->v, c->num_kv_heads, m, c->head_dim),
                   heads_view(p->a, c->num_heads, m, c->head_dim),
                   emx_tensor_view(p->slopes, EMX_F32, 1, (int64_t[]){c->num_heads}),
                   emx_tensor_view(alphas, EMX_F64, 1, (int64_t[]){c->num_heads})};
}
static emx_decode_io decode_io(const session_pool *p, const tensors *t) {
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.layout = EMX_LAYOUT_BHND;
  io.alpha = p->model->config.entmax_alpha;
  io.q = &t->q;
  io.k_new = &t->k;
  io.v_new = &t->v;
  io.o = &t->o;
  io.alibi_slopes = p->alibi ? &t->slopes : NULL;
  io.alphas = p->alphas ? &t->alphas : NULL;
  io.reports = p->reports;
  return io;
}

/* At least `size` bytes at *work; the contents are lost. */
static emx_status grow(void **work, size_t *have, size_t size, const char *what) {
  if (size <= *have) return EMX_OK;
  void *p = emxi_alloc(size);
  if (!p) return emxi_fail(EMX_ERR_NOMEM, "session: no memory for %zu bytes of %s", size, what);
  emxi_free(*work);
  *work = p;
  *have = size;
  return EMX_OK;
}

/* ---- create, fork, destroy */

/* Places the activations from base on (NULL: only counts) and returns how many floats they take. */
static size_t carve(session_pool *p, float *base) {
  const emx_model_config *c = &p->model->config;
  const size_t rows = (size_t)p->chunk, qd = (size_t)c->num_heads * (size_t)c->head_dim,
               kvd = (size_t)c->num_kv_heads * (size_t)c->head_dim;
  struct {
    float **place;
    size_t n;
  } parts[] = {{&p->x, rows * (size_t)c->hidden_size},
               {&p->h, rows * (size_t)c->hidden_size},
               {&p->q, rows * qd},
               {&p->k, rows * kvd},
               {&p->v, rows * kvd},
               {&p->a, rows * qd},
               {&p->gate, rows * (size_t)c->intermediate_size},
               {&p->up, rows * (size_t)c->intermediate_size},
               {&p->logits, (size_t)NLL_ROWS * (size_t)c->vocab_size},
               {&p->slopes, (size_t)c->num_heads},
               {&p->theta, c->attn_scale_type == EMX_ATTN_SCALE_ASENTMAX ? rows * 2 * (size_t)emxi_scaled_heads(c) : 0},
               {&p->rope, c->position_type == EMX_POSITION_ROPE ? rows * (size_t)c->head_dim : 0}};
  size_t used = 0;
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
    if (base) *parts[i].place = base + used;
    used += (parts[i].n + 15) / 16 * 16;
  }
  return used;
}

static void destroy_pool(session_pool *p) {
  if (p->kv)
    for (int32_t l = 0; l < p->model->config.num_layers; l++) emx_kv_destroy(p->kv[l]);
  emxi_free(p->kv);
  emxi_free(p->memory);
  emxi_free(p->reports);
  emxi_free(p->alphas);
  emxi_free(p->attn_work);
  emxi_free(p->decode_work);
  emxi_free(p->stage);
  emxi_free(p->nll);
  emxi_free(p);
}

static emx_status create_pool(emx_model *model, const emx_session_opts *o, session_pool **out) {
  const emx_model_config *c = &model->config;
  session_pool *p = emxi_calloc(sizeof *p);
  if (!p) return emxi_fail(EMX_ERR_NOMEM, "session: no memory for %zu bytes", sizeof *p);
  p->model = model;
  p->kv_dtype = o->kv_dtype;
  p->page_size = o->page_size;
  p->summaries = o->summaries;
  p->max_tokens = o->max_tokens;
  p->in_file = o->kv_file != NULL;
  p->chunk = o->chunk < o->max_tokens ? o->chunk : o->max_tokens;
  emx_kv_opts kv;
  emx_kv_opts_init(&kv);
  kv.dtype = o->kv_dtype;
  kv.kv_heads = c->num_kv_heads;
  kv.head_dim = c->head_dim;
  kv.page_size = o->page_size;
  kv.layout = EMX_LAYOUT_BHND;
  kv.file = o->kv_file; /* loses its name at once: the next layer takes the same */
  kv.summaries = o->summaries;
  kv.max_seqs = o->max_sessions;
  /* Every session may leave one page partly filled. */
  kv.max_pages = o->page_size > 0 ? (o->max_tokens + o->page_size - 1) / o->page_size + o->max_sessions - 1 : 0;
  size_t layer = 0, tables = 0, total = 0, floats = carve(p, NULL) * sizeof(float);
  emx_status status = emx_kv_memory_size(model->ctx, &kv, &layer, &tables);
  if (!status && (!emxi_add(layer, tables, &layer) || !emxi_mul(layer, (size_t)c->num_layers, &total) ||
                  !emxi_add(total, floats, &total) || total > emxi_physical_memory()))
    status = emxi_fail(EMX_ERR_NOMEM, "session: %lld tokens need %.0f bytes, the machine has %zu", (long long)o->max_tokens,
                       (double)layer * c->num_layers + (double)floats, emxi_physical_memory());
  if (!status) {
    p->kv = emxi_calloc((size_t)c->num_layers * sizeof(emx_kv *));
    p->memory = emxi_calloc(floats);
    p->reports = emxi_calloc((size_t)c->num_heads * sizeof *p->reports);
    if (c->alpha_learned) p->alphas = emxi_calloc((size_t)c->num_layers * (size_t)c->num_heads * sizeof *p->alphas);
    if (!p->kv || !p->memory || !p->reports || (c->alpha_learned && !p->alphas))
      status = emxi_fail(EMX_ERR_NOMEM, "session: no memory for %zu bytes", floats);
  }
  for (int32_t l = 0; l < c->num_layers && !status; l++) status = emx_kv_create(model->ctx, &kv, &p->kv[l]);
  if (status) {
    destroy_pool(p);
    return status;
  }
  carve(p, p->memory);
  emxi_alibi_slopes(c, p->slopes);
  for (int32_t l = 0; p->alphas && l < c->num_layers; l++)
    emxi_learned_alphas(c, &model->w.layers[l], p->alphas + (int64_t)l * c->num_heads, NULL);
  for (int32_t h = 0; h < c->num_heads; h++) p->alibi |= p->slopes[h] != 0;
  *out = p;
  return EMX_OK;
}

/* Without sequences of the caches yet. */
static emx_status create_shell(session_pool *p, emx_session **out) {
  const emx_model_config *c = &p->model->config;
  emx_session *s = emxi_calloc(sizeof *s);
  if (s) {
    s->seqs = emxi_alloc((size_t)c->num_layers * sizeof *s->seqs);
    s->last = emxi_calloc((size_t)c->hidden_size * sizeof *s->last);
  }
  if (!s || !s->seqs || !s->last) {
    if (s) {
      emxi_free(s->seqs);
      emxi_free(s->last);
    }
    emxi_free(s);
    return emxi_fail(EMX_ERR_NOMEM, "session: no memory for %zu bytes", sizeof *s);
  }
  for (int32_t l = 0; l < c->num_layers; l++) s->seqs[l] = -1;
  s->pool = p;
  s->stats.struct_size = sizeof s->stats;
  p->refs++;
  *out = s;
  return EMX_OK;
}

static void destroy(emx_session *s) {
  session_pool *p = s->pool;
  for (int32_t l = 0; l < p->model->config.num_layers; l++)
    if (s->seqs[l] >= 0) emx_seq_destroy(p->kv[l], s->seqs[l]);
  emxi_free(s->seqs);
  emxi_free(s->last);
  emxi_free(s);
  if (!--p->refs) destroy_pool(p);
}

static emx_status set_select(emx_session *s, const emx_select_desc *select) {
  session_pool *p = s->pool;
  if (select->kind == EMX_SELECT_PAGES)
    return emxi_fail(EMX_ERR_UNSUPPORTED,
                     "emx_session_set_select: every layer and step has its own pages; use emx_decode for page lists");
  tensors t = tensors_of(p, 0, 1);
  emx_decode_io io = decode_io(p, &t);
  size_t size;
  EMX_TRY(emx_decode_workspace_size(p->model->ctx, p->kv[0], select, &io, p->max_tokens, &size));
  EMX_TRY(grow(&p->decode_work, &p->decode_size, size, "working memory"));
  s->select = *select;
  return EMX_OK;
}

static emx_status create(emx_model *model, const emx_session_opts *opts, emx_session **out) {
  session_pool *p = NULL;
  emx_session *s = NULL;
  EMX_TRY(create_pool(model, opts, &p));
  emx_status status = create_shell(p, &s);
  if (status) {
    destroy_pool(p);
    return status;
  }
  for (int32_t l = 0; l < model->config.num_layers && !status; l++) {
    int32_t seq = -1;
    if (!(status = emx_seq_create(p->kv[l], &seq))) s->seqs[l] = seq;
  }
  emx_select_desc all;
  emx_select_desc_init(&all);
  if (!status) status = set_select(s, &all);
  if (status)
    destroy(s);
  else
    *out = s;
  return status;
}
emx_status emx_session_create(emx_model *model, const emx_session_opts *opts, emx_session **out) {
  emx_session_opts defaults;
  emx_session_opts_init(&defaults);
  if (!opts) opts = &defaults;
  EMXI_READ_STRUCT(opts, emx_session_opts);
  if (!model || !out) return emxi_fail(EMX_ERR_INVALID, "emx_session_create: %s is NULL", model ? "out" : "model");
  if (opts->max_tokens < 1 || opts->max_tokens > INT32_MAX / 2)
    return emxi_fail(EMX_ERR_INVALID, "emx_session_create: max_tokens is %lld, expected 1..%d", (long long)opts->max_tokens,
                     INT32_MAX / 2);
  if (opts->chunk < 1 || opts->chunk > 1 << 16)
    return emxi_fail(EMX_ERR_INVALID, "emx_session_create: chunk is %d, expected 1..%d", opts->chunk, 1 << 16);
  if (opts->max_sessions < 1 || opts->max_sessions > 1 << 16)
    return emxi_fail(EMX_ERR_INVALID, "emx_session_create: max_sessions is %d, expected 1..%d", opts->max_sessions, 1 << 16);
  EMXI_LOCKED(model->ctx, create(model, opts, out));
}

static emx_status fork_session(emx_session *parent, emx_session **out) {
  session_pool *p = parent->pool;
  emx_session *s = NULL;
  EMX_TRY(create_shell(p, &s));
  emx_status status = EMX_OK;
  for (int32_t l = 0; l < p->model->config.num_layers && !status; l++) {
    int32_t seq = -1;
    if (!(status = emx_seq_fork(p->kv[l], parent->seqs[l], &seq))) s->seqs[l] = seq;
  }
  if (status) {
    destroy(s);
    return status;
  }
  s->length = parent->length;
  s->last_known = parent->last_known;
  s->select = parent->select;
  memcpy(s->last, parent->last, (size_t)p->model->config.hidden_size * sizeof *s->last);
  *out = s;
  return EMX_OK;
}
emx_status emx_session_fork(emx_session *parent, emx_session **out) {
  if (!parent || !out) return emxi_fail(EMX_ERR_INVALID, "emx_session_fork: %s is NULL", parent ? "out" : "parent");
  EMXI_LOCKED(parent->pool->model->ctx, fork_session(parent, out));
}

void emx_session_destroy(emx_session *s) {
  if (!s) return;
  emx_ctx *ctx = s->pool->model->ctx;
  emxi_ctx_lock(ctx);
  destroy(s);
  emxi_ctx_unlock(ctx);
}

void emxi_session_tap(emx_session *s, emxi_tap_fn tap, void *user) {
  s->tap = tap;
  s->tap_user = user;
}

int64_t emx_session_length(const emx_session *s) {
  if (!s) return 0;
  emxi_ctx_lock(s->pool->model->ctx);
  const int64_t length = s->length;
  emxi_ctx_unlock(s->pool->model->ctx);
  return length;
}

emx_status emx_session_set_select(emx_session *s, const emx_select_desc *select) {
  if (!s) return emxi_fail(EMX_ERR_INVALID, "emx_session_set_select: the session is NULL");
  EMXI_READ_STRUCT(select, emx_select_desc);
  EMXI_LOCKED(s->pool->model->ctx, set_select(s, select));
}

static emx_status set_support(emx_session *s, const emx_session_support *support) {
  const emx_model_config *c = &s->pool->model->config;
  static const char who[] = "emx_session_set_support";
  size_t cells;
  if (support->capacity < 0 || !emxi_mul((size_t)support->capacity, (size_t)c->num_layers * (size_t)c->num_heads, &cells) ||
      cells > SIZE_MAX / 16)
    return emxi_fail(EMX_ERR_INVALID, "%s: capacity is %lld", who, (long long)support->capacity);
  if (!support->count || (support->capacity && (!support->index || !support->weight)))
    return emxi_fail(EMX_ERR_INVALID, "%s: index, weight and count go together", who);
  s->support = *support;
  return EMX_OK;
}
emx_status emx_session_set_support(emx_session *s, const emx_session_support *support) {
  if (!s) return emxi_fail(EMX_ERR_INVALID, "emx_session_set_support: the session is NULL");
  static const emx_session_support none = {.struct_size = sizeof none};
  if (support) {
    EMXI_READ_STRUCT(support, emx_session_support);
    EMXI_LOCKED(s->pool->model->ctx, set_support(s, support));
  }
  emxi_ctx_lock(s->pool->model->ctx);
  s->support = none;
  emxi_ctx_unlock(s->pool->model->ctx);
  return EMX_OK;
}

/* Cuts every layer that is longer; a layer that a failed call did not reach is left alone. */
static emx_status cut(emx_session *s, int64_t length) {
  for (int32_t l = 0; l < s->pool->model->config.num_layers; l++) {
    int64_t have;
    EMX_TRY(emx_seq_length(s->pool->kv[l], s->seqs[l], &have));
    if (have > length) EMX_TRY(emx_seq_truncate(s->pool->kv[l], s->seqs[l], length));
  }
  return EMX_OK;
}
/* After a failure: back to where the session was, and what the caches had learned from its keys (`mapped`, before the call; one
 * number, for all layers hold the same tokens). Returns the failure. */
static emx_status roll_back(emx_session *s, int32_t mapped, emx_status failure) {
  char detail[256];
  size_t n = strlen(emx_last_error());
  n = n < sizeof detail ? n : sizeof detail - 1;
  memcpy(detail, emx_last_error(), n);
  detail[n] = 0;
  if (cut(s, s->length)) return emxi_fail(EMX_ERR_INTERNAL, "session: cannot undo (%s)", detail);
  for (int32_t l = 0; l < s->pool->model->config.num_layers; l++) s->pool->kv[l]->sketch.mapped = mapped;
  return failure;
}

static emx_status truncate_session(emx_session *s, int64_t length) {
  if (length < 0 || length > s->length)
    return emxi_fail(EMX_ERR_INVALID, "emx_session_truncate: length %lld, the session has %lld tokens", (long long)length,
                     (long long)s->length);
  if (length == s->length) return EMX_OK;
  EMX_TRY(cut(s, length));
  s->length = length;
  s->last_known = false;
  return EMX_OK;
}
emx_status emx_session_truncate(emx_session *s, int64_t length) {
  if (!s) return emxi_fail(EMX_ERR_INVALID, "emx_session_truncate: the session is NULL");
  EMXI_LOCKED(s->pool->model->ctx, truncate_session(s, length));
}

/* ---- forward pass */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* What dense attention takes from the model. */
static void describe(const session_pool *p, const tensors *t, emx_attn_desc *desc, emx_attn_io *io) {
  emx_attn_desc_init(desc);
  desc->alpha = p->model->config.entmax_alpha;
  desc->layout = EMX_LAYOUT_BHND;
  emx_attn_io_init(io);
  io->q = &t->q;
  io->o = &t->o;
  io->alibi_slopes = p->alibi ? &t->slopes : NULL;
  io->alphas = p->alphas ? &t->alphas : NULL;
}
static emx_status attend(session_pool *p, const emx_attn_desc *desc, const emx_attn_io *io) {
  size_t size;
  EMX_TRY(emx_attn_workspace_size(p->model->ctx, desc, io, EMX_PASS_FORWARD, &size));
  EMX_TRY(grow(&p->attn_work, &p->attn_size, size, "working memory"));
  return emx_attn_forward(p->model->ctx, desc, io, p->attn_work, p->attn_size);
}

/* attend_prefill where not even one head of a layer fits into memory: the decoder streams keys and values. */
static emx_status attend_streaming(emx_session *s, int32_t l, const emx_kv_batch *batch, const tensors *t, int64_t total) {
  session_pool *p = s->pool;
  emx_select_desc all;
  emx_select_desc_init(&all);
  emx_decode_io io = decode_io(p, t);
  io.reports = NULL;
  size_t size;
  EMX_TRY(emx_decode_workspace_size(p->model->ctx, p->kv[l], &all, &io, total, &size));
  EMX_TRY(grow(&p->attn_work, &p->attn_size, size, "working memory"));
  return emx_decode(p->model->ctx, p->kv[l], batch, &all, &io, p->attn_work, p->attn_size);
}

/* attend_prefill where K and V are in a file: one KV head after the other in memory. */
static emx_status attend_file(emx_session *s, int32_t l, const emx_kv_batch *batch, const tensors *t, int64_t total) {
  session_pool *p = s->pool;
  const emx_model_config *c = &p->model->config;
  emx_kv *kv = p->kv[l];
  const int64_t D = c->head_dim, n_pages = (total + kv->P - 1) / kv->P;
  const int32_t group = c->num_heads / c->num_kv_heads;
  const size_t half = (size_t)(n_pages * kv->k_page) * emx_dtype_size(kv->dtype);
  if (grow(&p->stage, &p->stage_size, 2 * half, "keys and values")) return attend_streaming(s, l, batch, t, total);
  EMX_TRY(emx_kv_append(p->model->ctx, kv, batch, &t->k, &t->v, NULL));

  const int32_t *pages;
  int64_t count;
  EMX_TRY(emx_seq_block_table(kv, s->seqs[l], &pages, &count));
  char *rows[2] = {p->stage, (char *)p->stage + half};
  const emx_tensor k = emx_tensor_view(rows[0], kv->dtype, 4, (int64_t[]){1, 1, total, D}),
                   v = emx_tensor_view(rows[1], kv->dtype, 4, (int64_t[]){1, 1, total, D});
  for (int32_t g = 0; g < c->num_kv_heads; g++) {
    EMX_TRY(emxi_kv_file_begin(kv, "session"));
    for (int values = 0; values < 2; values++) emxi_kv_file_pages(kv, values, g, pages, count, rows[values]);
    EMX_TRY(emxi_kv_file_end(kv, "session"));
    tensors heads = *t;
    heads.q.data = (float *)t->q.data + g * group * t->q.stride[1];
    heads.o.data = (float *)t->o.data + g * group * t->o.stride[1];
    heads.q.shape[1] = heads.o.shape[1] = heads.slopes.shape[0] = heads.alphas.shape[0] = group;
    heads.slopes.data = p->alibi ? (float *)t->slopes.data + g * group : NULL;
    heads.alphas.data = p->alphas ? (double *)t->alphas.data + g * group : NULL;
    emx_attn_desc desc;
    emx_attn_io io;
    describe(p, &heads, &desc, &io);
    io.k = &k;
    io.v = &v;
    EMX_TRY(attend(p, &desc, &io));
  }
  return EMX_OK;
}

/* Appends k, v [m] to layer l and attends densely from q [m] into a. */
static emx_status attend_prefill(emx_session *s, int32_t l, int64_t m, int64_t length) {
  session_pool *p = s->pool;
  tensors t = tensors_of(p, l, m);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &s->seqs[l];
  if (p->in_file) return attend_file(s, l, &batch, &t, length + m);
  EMX_TRY(emx_kv_append(p->model->ctx, p->kv[l], &batch, &t.k, &t.v, NULL));

  const int32_t *pages;
  int64_t n_pages;
  int32_t total = (int32_t)(length + m);
  emx_tensor k, v;
  EMX_TRY(emx_kv_pool_view(p->kv[l], &k, &v));
  EMX_TRY(emx_seq_block_table(p->kv[l], s->seqs[l], &pages, &n_pages));
  emx_tensor table = emx_tensor_view((void *)pages, EMX_I32, 2, (int64_t[]){1, n_pages}),
             lengths = emx_tensor_view(&total, EMX_I32, 1, (int64_t[]){1});
  emx_attn_desc desc;
  emx_attn_io io;
  describe(p, &t, &desc, &io);
  io.k = &k;
  io.v = &v;
  io.block_table = &table;
  io.seqlens_k = &lengths;
  return attend(p, &desc, &io);
}

/* The same for one token through the selector; adds to stats. */
static emx_status attend_decode(emx_session *s, int32_t l, emx_session_stats *stats) {
  session_pool *p = s->pool;
  const emx_model_config *c = &p->model->config;
  tensors t = tensors_of(p, l, 1);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &s->seqs[l];
  emx_decode_io io = decode_io(p, &t);
  const emx_session_support *wanted = &s->support;
  emx_tensor index, weight, count;
  if (wanted->count) {
    const int64_t heads = c->num_heads, from = l * heads, shape[4] = {1, heads, 1, wanted->capacity};
    const int64_t at = from * wanted->capacity; /* no room: counts alone, and the arrays may be NULL */
    index = emx_tensor_view(at ? wanted->index + at : wanted->index, EMX_I32, 4, shape);
    weight = emx_tensor_view(at ? wanted->weight + at : wanted->weight, EMX_F32, 4, shape);
    count = emx_tensor_view(wanted->count + from, EMX_I32, 3, shape);
    io.support_index = &index;
    io.support_weight = &weight;
    io.support_count = &count;
  }
  double start = now();
  EMX_TRY(emx_decode(p->model->ctx, p->kv[l], &batch, &s->select, &io, p->decode_work, p->decode_size));
  stats->attn_seconds += now() - start;
  if (wanted->count && wanted->reports)
    memcpy(wanted->reports + (int64_t)l * c->num_heads, p->reports, (size_t)c->num_heads * sizeof *p->reports);
  const int64_t visible = s->length + 1, row_bytes = 2 * (int64_t)c->head_dim * (int64_t)emx_dtype_size(p->kv_dtype);
  for (int32_t h = 0; h < c->num_heads; h++) {
    const emx_report *r = &p->reports[h];
    if (!stats->rows || r->mass < stats->mass_min) stats->mass_min = r->mass;
    if (!stats->rows || r->mass > stats->mass_max) stats->mass_max = r->mass;
    if (r->delta_bound > stats->delta_bound_max) stats->delta_bound_max = r->delta_bound;
    stats->rows++;
    stats->paths[r->path]++;
    stats->certified += (r->flags & EMX_REPORT_CERTIFIED) != 0;
    stats->nonfinite |= (r->flags & EMX_REPORT_NONFINITE) != 0;
    stats->support_sum += r->support;
    stats->delta_bound_sum += r->delta_bound;
    stats->bytes_k += r->bytes_k;
    stats->bytes_v += r->bytes_v;
    stats->bytes_meta += r->bytes_meta;
    stats->bytes_full += visible * row_bytes;
  }
  return EMX_OK;
}

/* m tokens after the first `length`: their keys and values go into the caches, their normed states into p->h. stats: decode (m =
 * 1). */
static emx_status forward(emx_session *s, const int32_t *tokens, int64_t m, int64_t length, emx_session_stats *stats) {
  session_pool *p = s->pool;
  emx_ctx *ctx = p->model->ctx;
  const emx_model_config *c = &p->model->config;
  const emxi_weights *w = &p->model->w;
  const int64_t width = c->hidden_size, f = c->intermediate_size, qd = (int64_t)c->num_heads * c->head_dim,
                kvd = (int64_t)c->num_kv_heads * c->head_dim;
  const emxi_places places = {.m = m, .length = m, .from = length};
  const bool rope = c->position_type == EMX_POSITION_ROPE;
  const int64_t scaled = emxi_scaled_heads(c);
  if (rope) emxi_rope_table(c, length, m, p->rope);
  emxi_embed(w->embed, tokens, p->x, m, width);
  for (int32_t l = 0; l < c->num_layers; l++) {
    const emxi_layer *y = &w->layers[l];
    EMX_TRY(emxi_rmsnorm(ctx, p->x, y->input_norm, c->rms_norm_eps, p->h, NULL, m, width));
    EMX_TRY(emxi_linear(ctx, p->h, y->wq, p->q, m, width, qd, false));
    EMX_TRY(emxi_linear(ctx, p->h, y->wk, p->k, m, width, kvd, false));
    EMX_TRY(emxi_linear(ctx, p->h, y->wv, p->v, m, width, kvd, false));
    if (rope) {
      EMX_TRY(emxi_rope(ctx, p->q, qd, c->num_heads, c->head_dim, p->rope, places, false));
      EMX_TRY(emxi_rope(ctx, p->k, kvd, c->num_kv_heads, c->head_dim, p->rope, places, false));
    }
    if (c->attn_scale_type == EMX_ATTN_SCALE_ASENTMAX) /* theta_w and theta_v are neighbours */
      EMX_TRY(emxi_linear(ctx, p->h, y->theta_w, p->theta, m, width, 2 * scaled, false));
    if (scaled) EMX_TRY(emxi_scale_queries(ctx, c, y, p->q, qd, p->theta, 2 * scaled, places));
    EMX_TRY(stats ? attend_decode(s, l, stats) : attend_prefill(s, l, m, length));
    if (s->tap) {
      const emxi_layer_view view = {ctx,
                                    p->kv[l],
                                    s->seqs[l],
                                    l,
                                    length,
                                    m,
                                    p->q,
                                    p->k,
                                    p->v,
                                    p->alibi ? p->slopes : NULL,
                                    p->alphas ? p->alphas + (int64_t)l * c->num_heads : NULL};
      EMX_TRY(s->tap(s->tap_user, &view));
    }
    EMX_TRY(emxi_linear(ctx, p->a, y->wo, p->x, m, qd, width, true));
    EMX_TRY(emxi_rmsnorm(ctx, p->x, y->post_norm, c->rms_norm_eps, p->h, NULL, m, width));
    EMX_TRY(emxi_linear(ctx, p->h, y->gate, p->gate, m, width, f, false));
    EMX_TRY(emxi_linear(ctx, p->h, y->up, p->up, m, width, f, false));
    EMX_TRY(emxi_swiglu(ctx, p->gate, p->up, p->gate, m * f));
    EMX_TRY(emxi_linear(ctx, p->gate, y->down, p->x, m, f, width, true));
  }
  return emxi_rmsnorm(ctx, p->x, w->norm, c->rms_norm_eps, p->h, NULL, m, width);
}

/* p->logits [m,V] of m <= NLL_ROWS states. */
static emx_status head(session_pool *p, const float *states, int64_t m) {
  const emx_model_config *c = &p->model->config;
  return emxi_linear(p->model->ctx, states, p->model->w.head, p->logits, m, c->hidden_size, c->vocab_size, false);
}

typedef struct nll_job {
  const float *logits;
  const int32_t *tokens;
  float *nll;
  int64_t vocab;
} nll_job;
/* -ln softmax(row)[token] by log-sum-exp in double. */
static void nll_row(void *arg, int64_t i, int32_t worker) {
  (void)worker;
  const nll_job *j = arg;
  const float *x = j->logits + i * j->vocab;
  double best = -INFINITY, sum = 0;
  for (int64_t t = 0; t < j->vocab; t++)
    if (x[t] > best) best = x[t];
  for (int64_t t = 0; t < j->vocab; t++) sum += exp(x[t] - best);
  j->nll[i] = (float)(best + log(sum) - x[j->tokens[i]]);
}
/* nll[i] of tokens[i] from the state before it. */
static emx_status nll_of(session_pool *p, const float *states, const int32_t *tokens, float *nll, int64_t n) {
  const int64_t width = p->model->config.hidden_size;
  for (int64_t i = 0; i < n; i += NLL_ROWS) {
    int64_t m = n - i < NLL_ROWS ? n - i : NLL_ROWS;
    EMX_TRY(head(p, states + i * width, m));
    nll_job job = {p->logits, tokens + i, nll + i, p->model->config.vocab_size};
    EMX_TRY(emxi_parallel(p->model->ctx, m, nll_row, &job));
  }
  return EMX_OK;
}

static emx_status check_tokens(const emx_session *s, const int32_t *tokens, int64_t n, const char *who) {
  const int32_t vocab = s->pool->model->config.vocab_size;
  for (int64_t i = 0; i < n; i++)
    if (tokens[i] < 0 || tokens[i] >= vocab)
      return emxi_fail(EMX_ERR_INVALID, "%s: token %lld is %d, the vocabulary has %d", who, (long long)i, tokens[i], vocab);
  if (n > s->pool->max_tokens - s->length)
    return emxi_fail(EMX_ERR_STATE, "%s: %lld tokens after %lld are more than the %lld of max_tokens", who, (long long)n,
                     (long long)s->length, (long long)s->pool->max_tokens);
  return EMX_OK;
}

static emx_status run_prefill(emx_session *s, const int32_t *tokens, int64_t n, float *nll, float *logits,
                              emx_progress_fn progress, void *user) {
  session_pool *p = s->pool;
  const emx_model_config *c = &p->model->config;
  float *work = NULL; /* results reach the caller when nothing can fail any more */
  if (nll) {
    size_t have = (size_t)p->nll_room * sizeof *p->nll;
    void *room = p->nll;
    EMX_TRY(grow(&room, &have, (size_t)n * sizeof *p->nll, "losses"));
    work = p->nll = room;
    p->nll_room = (int64_t)(have / sizeof *p->nll);
    work[0] = NAN;
    if (s->last_known) EMX_TRY(nll_of(p, s->last, tokens, work, 1));
  }
  for (int64_t done = 0; done < n;) {
    const int64_t m = n - done < p->chunk ? n - done : p->chunk;
    EMX_TRY(forward(s, tokens + done, m, s->length + done, NULL));
    if (nll) {
      int64_t known = done + m < n ? m : m - 1; /* the last state has no token after it */
      EMX_TRY(nll_of(p, p->h, tokens + done + 1, work + done + 1, known));
    }
    done += m;
    if (done == n) {
      const float *last = p->h + (m - 1) * c->hidden_size;
      if (logits) {
        EMX_TRY(head(p, last, 1));
        memcpy(logits, p->logits, (size_t)c->vocab_size * sizeof *logits);
      }
      if (nll) memcpy(nll, work, (size_t)n * sizeof *nll);
      memcpy(s->last, last, (size_t)c->hidden_size * sizeof *s->last);
      s->last_known = true;
      s->length += n;
    }
    if (progress) progress(user, done, n);
  }
  return EMX_OK;
}
static emx_status prefill(emx_session *s, const int32_t *tokens, int64_t n, float *nll, float *logits, emx_progress_fn progress,
                          void *user) {
  if (n < 1 || !tokens)
    return emxi_fail(EMX_ERR_INVALID, "emx_session_prefill: %s", tokens ? "n is not positive" : "tokens is NULL");
  EMX_TRY(check_tokens(s, tokens, n, "emx_session_prefill"));
  const int32_t mapped = s->pool->kv[0]->sketch.mapped;
  emx_status status = run_prefill(s, tokens, n, nll, logits, progress, user);
  return status ? roll_back(s, mapped, status) : EMX_OK;
}
emx_status emx_session_prefill(emx_session *s, const int32_t *tokens, int64_t n, float *nll, float *logits,
                               emx_progress_fn progress, void *user) {
  if (!s) return emxi_fail(EMX_ERR_INVALID, "emx_session_prefill: the session is NULL");
  EMXI_LOCKED(s->pool->model->ctx, prefill(s, tokens, n, nll, logits, progress, user));
}

static emx_status decode(emx_session *s, int32_t token, float *logits) {
  session_pool *p = s->pool;
  const emx_model_config *c = &p->model->config;
  EMX_TRY(check_tokens(s, &token, 1, "emx_session_decode"));
  emx_session_stats stats = s->stats;
  const int32_t mapped = p->kv[0]->sketch.mapped;
  double start = now();
  emx_status status = forward(s, &token, 1, s->length, &stats);
  if (!status) status = head(p, p->h, 1);
  if (status) return roll_back(s, mapped, status);
  memcpy(logits, p->logits, (size_t)c->vocab_size * sizeof *logits);
  memcpy(s->last, p->h, (size_t)c->hidden_size * sizeof *s->last);
  s->last_known = true;
  s->length++;
  stats.tokens++;
  stats.seconds += now() - start;
  s->stats = stats;
  return EMX_OK;
}
emx_status emx_session_decode(emx_session *s, int32_t token, float *logits) {
  if (!s || !logits) return emxi_fail(EMX_ERR_INVALID, "emx_session_decode: %s is NULL", s ? "logits" : "the session");
  EMXI_LOCKED(s->pool->model->ctx, decode(s, token, logits));
}

emx_status emx_session_get_stats(const emx_session *s, emx_session_stats *stats) {
  if (!s) return emxi_fail(EMX_ERR_INVALID, "emx_session_get_stats: the session is NULL");
  EMXI_CHECK_STRUCT(stats, emx_session_stats);
  emxi_ctx_lock(s->pool->model->ctx);
  emxi_struct_write(stats, &s->stats, sizeof s->stats);
  emxi_ctx_unlock(s->pool->model->ctx);
  return EMX_OK;
}
void emx_session_reset_stats(emx_session *s) {
  if (!s) return;
  emxi_ctx_lock(s->pool->model->ctx);
  s->stats = (emx_session_stats){.struct_size = sizeof s->stats};
  emxi_ctx_unlock(s->pool->model->ctx);
}

/* ---- the last state, and files */

static emx_status last_logits(emx_session *s, float *logits) {
  session_pool *p = s->pool;
  if (!s->last_known)
    return emxi_fail(EMX_ERR_STATE, "emx_session_logits: the session is %s", s->length ? "cut: its last state is gone" : "empty");
  EMX_TRY(head(p, s->last, 1));
  memcpy(logits, p->logits, (size_t)p->model->config.vocab_size * sizeof *logits);
  return EMX_OK;
}
emx_status emx_session_logits(emx_session *s, float *logits) {
  if (!s || !logits) return emxi_fail(EMX_ERR_INVALID, "emx_session_logits: %s is NULL", s ? "logits" : "the session");
  EMXI_LOCKED(s->pool->model->ctx, last_logits(s, logits));
}

static emx_status cache_of(emx_session *s, const char *who, emx_progress_fn progress, void *user, emxi_cache *c) {
  session_pool *p = s->pool;
  *c = (emxi_cache){.kind = EMX_CACHE_SESSION,
                    .ctx = p->model->ctx,
                    .kv = p->kv,
                    .layers = p->model->config.num_layers,
                    .n_seqs = 1,
                    .seqs = s->seqs,
                    .model = emxi_model_identity(p->model),
                    .width = p->model->config.hidden_size,
                    .max_tokens = p->max_tokens,
                    .last = s->last,
                    .last_known = s->last_known,
                    .progress = progress,
                    .user = user};
  return c->model ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "%s: no memory for the configuration's text", who);
}
static emx_status save(emx_session *s, const char *path, emx_progress_fn progress, void *user) {
  emxi_cache c;
  EMX_TRY(cache_of(s, "emx_session_save", progress, user, &c));
  return emxi_cache_save(&c, path);
}
emx_status emx_session_save(emx_session *s, const char *path, emx_progress_fn progress, void *user) {
  if (!s || !path) return emxi_fail(EMX_ERR_INVALID, "emx_session_save: %s is NULL", s ? "path" : "the session");
  EMXI_LOCKED(s->pool->model->ctx, save(s, path, progress, user));
}

static emx_status load(emx_session *s, const char *path, emx_progress_fn progress, void *user) {
  emxi_cache c;
  if (s->length)
    return emxi_fail(EMX_ERR_STATE, "emx_session_load: the session has %lld tokens, it must be empty", (long long)s->length);
  EMX_TRY(cache_of(s, "emx_session_load", progress, user, &c));
  EMX_TRY(emxi_cache_load(&c, path));
  s->length = c.length;
  s->last_known = c.last_known;
  return EMX_OK;
}
emx_status emx_session_load(emx_session *s, const char *path, emx_progress_fn progress, void *user) {
  if (!s || !path) return emxi_fail(EMX_ERR_INVALID, "emx_session_load: %s is NULL", s ? "path" : "the session");
  EMXI_LOCKED(s->pool->model->ctx, load(s, path, progress, user));
}
