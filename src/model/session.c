/* SPDX-License-Identifier: Apache-2.0
 * Sessions: one sequence over a paged cache of every layer, and the forward pass through it.
 *
 * Sessions that come from one another by fork share a pool: the caches, and the activations of one call, which is why a call
 * holds the context's lock from its beginning to its end. A call that fails truncates every layer to where it was.
 * Queries stay f32 over a cache of any dtype, in prefill and in decode alike, so both compute the same scores.
 *
 * Caches and activations are in the memory of the context's device. Where that is a GPU, the host enqueues a whole token, and
 * waits once, when it fetches the reports and the logits. */
#define _POSIX_C_SOURCE 200809L
#include "base/num.h"
#include "block.h"
#include "cache.h"
#include "kv/kv.h"

#include <time.h>

enum { NLL_ROWS = 64 }; /* rows of logits at a time */
/* Tokens of a chunk: as many as fill the device with rows. On a GPU fewer than MANY_QUERIES are left to the decoder. */
enum { CPU_CHUNK = 512, GPU_CHUNK = 8192, MANY_QUERIES = 256 };

typedef struct session_pool {
  emx_model *model;
  int32_t refs; /* sessions */
  int32_t kv_dtype, page_size, summaries;
  int64_t chunk, max_tokens;
  emx_kv **kv;         /* [num_layers] */
  void *memory;        /* on the device: */
  emxi_block block;    /* activations of a chunk; w, m and from are those of a call */
  float *slopes;       /* [H] */
  double *alphas;      /* [num_layers,H], learned alpha; else NULL */
  emx_report *reports; /* [num_layers,H], */
  float *logits;       /* and behind them [NLL_ROWS,V] */
  bool alibi;          /* some slope is not 0 */
  bool in_file;        /* K and V are in a file */
  bool on_gpu;
  void *fetched;                 /* on_gpu: a copy of reports and logits for the host */
  size_t fetched_reports;        /* bytes of reports */
  void *attn_work, *decode_work; /* on the device */
  void *stage;                   /* of prefill, keys and values from a file */
  size_t attn_size, decode_size, stage_size;
  float *nll; /* [nll_room] of the prefill that runs */
  int64_t nll_room;
} session_pool;

/* A token's work as the device has recorded it, for at most `reach` tokens in the cache. */
typedef struct session_piece {
  void *piece; /* or NULL */
  int64_t reach;
  const void *work; /* decode_work that it uses */
} session_piece;

struct emx_session {
  session_pool *pool;
  int32_t *seqs; /* [num_layers] */
  int64_t length;
  float *states; /* on the device: [2,W], the normed state of the last token and room for that of the next */
  int32_t last;  /* which of the two */
  bool last_known;
  session_piece pieces[2]; /* a token's work, by where the state goes */
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
                                     .max_sessions = 16,
                                     .max_tokens = 4096};
  emxi_struct_init(opts, size, &defaults, sizeof defaults);
}

/* ---- tensors of one call: queries and outputs [1,H,m,D] and keys [1,G,m,D] are views of what the linear layers write,
 * [m,heads*D] */

static emx_tensor device_view(const session_pool *p, void *data, int32_t dtype, int32_t ndim, const int64_t *shape) {
  emx_tensor t = emx_tensor_view(data, dtype, ndim, shape);
  t.device = p->model->ctx->device;
  t.device_index = p->model->ctx->device_index;
  return t;
}
/* m tokens `row` floats apart. */
static emx_tensor heads_view(const session_pool *p, float *data, int64_t heads, int64_t m, int64_t row) {
  const int64_t d = p->model->config.head_dim;
  emx_tensor t = device_view(p, data, EMX_F32, 4, (int64_t[]){1, heads, m, d});
  t.stride[0] = m * row;
  t.stride[1] = d;
  t.stride[2] = row;
  return t;
}

typedef struct tensors {
  emx_tensor q, k, v, o, slopes, alphas;
} tensors;
/* Of tokens first .. first + m - 1 of the chunk. */
static tensors tensors_of(const session_pool *p, int32_t l, int64_t first, int64_t m) {
  const emx_model_config *c = &p->model->config;
  const emxi_block *b = &p->block;
  const int64_t wide = (int64_t)c->num_heads * c->head_dim;
  double *alphas = p->alphas ? p->alphas + (int64_t)l * c->num_heads : NULL;
  return (tensors){heads_view(p, b->q + first * b->q_row, c->num_heads, m, b->q_row),
                   heads_view(p, b->k + first * b->kv_row, c->num_kv_heads, m, b->kv_row),
                   heads_view(p, b->v + first * b->kv_row, c->num_kv_heads, m, b->kv_row),
                   heads_view(p, b->a + first * wide, c->num_heads, m, wide),
                   device_view(p, p->slopes, EMX_F32, 1, (int64_t[]){c->num_heads}),
                   device_view(p, alphas, EMX_F64, 1, (int64_t[]){c->num_heads})};
}
static emx_decode_io decode_io(const session_pool *p, const tensors *t, int32_t l) {
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
  io.reports = p->reports + (int64_t)l * p->model->config.num_heads;
  return io;
}

/* At least `size` bytes of the device's memory at *work; the contents are lost. */
static emx_status grow_device(emx_ctx *ctx, void **work, size_t *have, size_t size) {
  if (size <= *have) return EMX_OK;
  void *p = NULL;
  EMX_TRY(ctx->backend->memory_alloc(ctx, size, &p));
  ctx->backend->memory_free(ctx, *work);
  *work = p;
  *have = size;
  return EMX_OK;
}
/* The same of the host's. */
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

/* Places what the pool has on the device, or counts it where the arena has no base. */
static void carve(session_pool *p, emxi_arena *arena) {
  const emx_model_config *c = &p->model->config;
  emxi_block *b = &p->block;
  const bool merged = p->model->blocks->merged, rope = c->position_type == EMX_POSITION_ROPE && !p->on_gpu;
  const int64_t rows = p->chunk, f = c->intermediate_size, qd = (int64_t)c->num_heads * c->head_dim,
                kvd = (int64_t)c->num_kv_heads * c->head_dim,
                z = c->attn_scale_type == EMX_ATTN_SCALE_ASENTMAX ? 2 * b->scaled : 0;
  b->x = emxi_arena_take(arena, rows * c->hidden_size, sizeof *b->x);
  b->h = emxi_arena_take(arena, rows * c->hidden_size, sizeof *b->h);
  b->a = emxi_arena_take(arena, rows * qd, sizeof *b->a);
  b->q_row = merged ? qd + 2 * kvd + z : qd;
  b->kv_row = merged ? b->q_row : kvd;
  b->z_row = merged ? b->q_row : z;
  b->gate_row = merged ? 2 * f : f;
  b->q = emxi_arena_take(arena, rows * b->q_row, sizeof *b->q);
  if (!merged) {
    b->k = emxi_arena_take(arena, rows * kvd, sizeof *b->k);
    b->v = emxi_arena_take(arena, rows * kvd, sizeof *b->v);
    b->z = emxi_arena_take(arena, rows * z, sizeof *b->z);
  } else if (b->q) {
    b->k = b->q + qd;
    b->v = b->k + kvd;
    b->z = b->v + kvd;
  }
  b->gate = emxi_arena_take(arena, rows * b->gate_row, sizeof *b->gate);
  if (!merged)
    b->up = emxi_arena_take(arena, rows * f, sizeof *b->up);
  else if (b->gate)
    b->up = b->gate + f;
  b->rope = emxi_arena_take(arena, rope ? rows * c->head_dim : 0, sizeof *b->rope);
  b->tokens = emxi_arena_take(arena, p->on_gpu ? rows + 1 : 0, sizeof *b->tokens);
  p->slopes = emxi_arena_take(arena, c->num_heads, sizeof *p->slopes);
  p->alphas = emxi_arena_take(arena, c->alpha_learned ? (int64_t)c->num_layers * c->num_heads : 0, sizeof *p->alphas);
  if (!c->alpha_learned) p->alphas = NULL;
  p->reports = emxi_arena_take(arena, (int64_t)c->num_layers * c->num_heads, sizeof *p->reports);
  p->logits = emxi_arena_take(arena, (int64_t)NLL_ROWS * c->vocab_size, sizeof *p->logits); /* 64-byte reports: right behind */
}

static void destroy_pool(session_pool *p) {
  emx_ctx *ctx = p->model->ctx;
  if (p->kv)
    for (int32_t l = 0; l < p->model->config.num_layers; l++) emx_kv_destroy(p->kv[l]);
  emxi_free(p->kv);
  ctx->backend->memory_free(ctx, p->memory);
  ctx->backend->memory_free(ctx, p->attn_work);
  ctx->backend->memory_free(ctx, p->decode_work);
  emxi_free(p->fetched);
  emxi_free(p->stage);
  emxi_free(p->nll);
  emxi_free(p);
}

/* What attention takes from the model besides queries and keys, onto the device. */
static emx_status place_constants(session_pool *p) {
  const emx_model *model = p->model;
  const emx_model_config *c = &model->config;
  emx_ctx *ctx = model->ctx;
  const size_t heads = (size_t)c->num_heads;
  double *values = emxi_alloc(heads * sizeof *values);
  if (!values) return emxi_fail(EMX_ERR_NOMEM, "session: no memory for %zu bytes", heads * sizeof *values);
  float *slopes = (float *)values;
  emxi_alibi_slopes(c, slopes);
  for (int32_t h = 0; h < c->num_heads; h++) p->alibi |= slopes[h] != 0;
  emx_status status = ctx->backend->memory_copy(ctx, p->slopes, slopes, heads * sizeof *slopes);
  for (int32_t l = 0; p->alphas && l < c->num_layers && !status; l++) {
    emxi_learned_alphas(c, &model->w.layers[l], values, NULL);
    status = ctx->backend->memory_copy(ctx, p->alphas + (size_t)l * heads, values, heads * sizeof *values);
  }
  emxi_free(values);
  return status;
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
  p->on_gpu = model->ctx->device != EMX_DEVICE_CPU;
  p->chunk = o->chunk ? o->chunk : p->on_gpu ? GPU_CHUNK : CPU_CHUNK;
  if (p->chunk > o->max_tokens) p->chunk = o->max_tokens;
  p->block.config = c;
  p->block.scaled = emxi_scaled_heads(c);
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
  emxi_arena arena;
  emxi_arena_init(&arena, NULL, 0);
  carve(p, &arena);
  size_t layer = 0, tables = 0, total = 0;
  const size_t activations = emxi_arena_total(&arena);
  emx_status status = arena.overflow
                          ? emxi_fail(EMX_ERR_NOMEM, "session: chunks of %lld tokens are too large", (long long)p->chunk)
                          : emx_kv_memory_size(model->ctx, &kv, &layer, &tables);
  /* A GPU's memory is asked for, and counted, as it is taken. */
  if (!status && ((!p->on_gpu && !emxi_add(layer, tables, &tables)) || !emxi_mul(tables, (size_t)c->num_layers, &total) ||
                  !emxi_add(total, activations, &total) || total > emxi_physical_memory()))
    status = emxi_fail(EMX_ERR_NOMEM, "session: %lld tokens need %.0f bytes, the machine has %zu", (long long)o->max_tokens,
                       (double)tables * c->num_layers + (double)activations, emxi_physical_memory());
  if (!status) {
    p->kv = emxi_calloc((size_t)c->num_layers * sizeof(emx_kv *));
    p->fetched_reports = (size_t)c->num_layers * (size_t)c->num_heads * sizeof *p->reports;
    const size_t fetched = p->fetched_reports + (size_t)NLL_ROWS * (size_t)c->vocab_size * sizeof *p->logits;
    if (p->on_gpu) p->fetched = emxi_alloc(fetched);
    if (!p->kv || (p->on_gpu && !p->fetched)) status = emxi_fail(EMX_ERR_NOMEM, "session: no memory for %zu bytes", fetched);
  }
  if (!status) status = model->ctx->backend->memory_alloc(model->ctx, activations, &p->memory);
  if (!status) {
    emxi_arena_init(&arena, p->memory, activations);
    carve(p, &arena);
    status = place_constants(p);
  }
  for (int32_t l = 0; l < c->num_layers && !status; l++) status = emx_kv_create(model->ctx, &kv, &p->kv[l]);
  if (status) {
    destroy_pool(p);
    return status;
  }
  *out = p;
  return EMX_OK;
}

/* Without sequences of the caches yet. */
static emx_status create_shell(session_pool *p, emx_session **out) {
  const emx_model_config *c = &p->model->config;
  emx_ctx *ctx = p->model->ctx;
  emx_session *s = emxi_calloc(sizeof *s);
  if (s) s->seqs = emxi_alloc((size_t)c->num_layers * sizeof *s->seqs);
  if (!s || !s->seqs) {
    emxi_free(s);
    return emxi_fail(EMX_ERR_NOMEM, "session: no memory for %zu bytes", sizeof *s);
  }
  void *states = NULL;
  const emx_status status = ctx->backend->memory_alloc(ctx, 2 * (size_t)c->hidden_size * sizeof *s->states, &states);
  if (status) {
    emxi_free(s->seqs);
    emxi_free(s);
    return status;
  }
  s->states = states;
  for (int32_t l = 0; l < c->num_layers; l++) s->seqs[l] = -1;
  s->pool = p;
  s->stats.struct_size = sizeof s->stats;
  p->refs++;
  *out = s;
  return EMX_OK;
}

static void forget_pieces(emx_session *s) {
  emx_model *model = s->pool->model;
  for (int i = 0; i < 2; i++) {
    if (s->pieces[i].piece) model->blocks->forget(model->ctx, model->blocks_state, s->pieces[i].piece);
    s->pieces[i] = (session_piece){0};
  }
}

static void destroy(emx_session *s) {
  session_pool *p = s->pool;
  forget_pieces(s);
  for (int32_t l = 0; l < p->model->config.num_layers; l++)
    if (s->seqs[l] >= 0) emx_seq_destroy(p->kv[l], s->seqs[l]);
  p->model->ctx->backend->memory_free(p->model->ctx, s->states);
  emxi_free(s->seqs);
  emxi_free(s);
  if (!--p->refs) destroy_pool(p);
}

static emx_status set_select(emx_session *s, const emx_select_desc *select) {
  session_pool *p = s->pool;
  if (select->kind == EMX_SELECT_PAGES)
    return emxi_fail(EMX_ERR_UNSUPPORTED,
                     "emx_session_set_select: every layer and step has its own pages; use emx_decode for page lists");
  emx_ctx *ctx = p->model->ctx;
  tensors t = tensors_of(p, 0, 0, 1);
  emx_decode_io io = decode_io(p, &t, 0);
  size_t size;
  EMX_TRY(emx_decode_workspace_size(ctx, p->kv[0], select, &io, p->max_tokens, &size));
  EMX_TRY(grow_device(ctx, &p->decode_work, &p->decode_size, size));
  forget_pieces(s);
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
  if (opts->chunk < 0 || opts->chunk > 1 << 16)
    return emxi_fail(EMX_ERR_INVALID, "emx_session_create: chunk is %d, expected 0..%d", opts->chunk, 1 << 16);
  if (opts->max_sessions < 1 || opts->max_sessions > 1 << 16)
    return emxi_fail(EMX_ERR_INVALID, "emx_session_create: max_sessions is %d, expected 1..%d", opts->max_sessions, 1 << 16);
  EMXI_LOCKED(model->ctx, create(model, opts, out));
}

static float *state_of(const emx_session *s, int32_t i) { return s->states + (int64_t)i * s->pool->model->config.hidden_size; }
static const float *last_state(const emx_session *s) { return state_of(s, s->last); }
static emx_status set_last(emx_session *s, const float *state) {
  emx_ctx *ctx = s->pool->model->ctx;
  EMX_TRY(ctx->backend->memory_copy(ctx, state_of(s, !s->last), state,
                                    (size_t)s->pool->model->config.hidden_size * sizeof *s->states));
  s->last = !s->last;
  return EMX_OK;
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
  if (s->last_known) status = set_last(s, last_state(parent));
  if (status)
    destroy(s);
  else
    *out = s;
  return status;
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
  if (s->pool->on_gpu)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: what heads attended to is listed by the CPU alone; open the model there", who);
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

/* Cuts every layer that is longer or has pages for more; a layer that a failed call did not reach is left alone. */
static emx_status cut(emx_session *s, int64_t length) {
  for (int32_t l = 0; l < s->pool->model->config.num_layers; l++) {
    int64_t have;
    EMX_TRY(emx_seq_length(s->pool->kv[l], s->seqs[l], &have));
    if (have >= length) EMX_TRY(emx_seq_truncate(s->pool->kv[l], s->seqs[l], length));
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
  EMX_TRY(grow_device(p->model->ctx, &p->attn_work, &p->attn_size, size));
  return emx_attn_forward(p->model->ctx, desc, io, p->attn_work, p->attn_size);
}

/* attend_prefill by the decoder: on a GPU, and where not even one head of a layer in a file fits into memory. Its working memory
 * grows with queries times keys, so that long contexts take a few queries at a time. */
static emx_status attend_by_decoder(emx_session *s, int32_t l, const emx_kv_batch *batch, int64_t m, int64_t length) {
  enum { ENOUGH = 256 << 20 };
  session_pool *p = s->pool;
  emx_ctx *ctx = p->model->ctx;
  emx_select_desc all;
  emx_select_desc_init(&all);
  int64_t n = m;
  for (size_t size;; n = (n + 1) / 2) {
    tensors t = tensors_of(p, l, 0, n);
    emx_decode_io io = decode_io(p, &t, l);
    EMX_TRY(emx_decode_workspace_size(ctx, p->kv[l], &all, &io, length + m, &size));
    if (size > ENOUGH && n > 1) continue;
    EMX_TRY(grow_device(ctx, &p->attn_work, &p->attn_size, size));
    break;
  }
  for (int64_t first = 0; first < m; first += n) {
    tensors t = tensors_of(p, l, first, m - first < n ? m - first : n);
    emx_decode_io io = decode_io(p, &t, l);
    io.reports = NULL;
    EMX_TRY(emx_decode(ctx, p->kv[l], batch, &all, &io, p->attn_work, p->attn_size));
  }
  return EMX_OK;
}

/* attend_prefill where K and V are in a file: one KV head after the other in memory. */
static emx_status attend_file(emx_session *s, int32_t l, const emx_kv_batch *batch, const tensors *t, int64_t m, int64_t length) {
  session_pool *p = s->pool;
  const emx_model_config *c = &p->model->config;
  emx_kv *kv = p->kv[l];
  const int64_t D = c->head_dim, total = length + m, n_pages = (total + kv->P - 1) / kv->P;
  const int32_t group = c->num_heads / c->num_kv_heads;
  const size_t half = (size_t)(n_pages * kv->k_page) * emx_dtype_size(kv->dtype);
  if (grow(&p->stage, &p->stage_size, 2 * half, "keys and values")) return attend_by_decoder(s, l, batch, m, length);
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

/* attend_prefill on a GPU over a 16-bit cache, by products of tensor cores, which take 16-bit numbers alone. A query is the sum
 * of two of them, so a head has twice its width: both parts of q, beside k twice, and v beside zeros. */
static emx_status attend_in_parts(emx_session *s, int32_t l, const emx_kv_batch *batch, const tensors *t, int64_t m,
                                  int64_t length) {
  session_pool *p = s->pool;
  emx_ctx *ctx = p->model->ctx;
  emx_kv *kv = p->kv[l];
  const int64_t H = p->model->config.num_heads, G = kv->G, D = kv->D, n = length + m;
  const int32_t type = kv->dtype;
  const size_t es = emx_dtype_size(type);
  emx_attn_desc desc;
  emx_attn_io io;
  describe(p, t, &desc, &io);
  desc.scale = (float)(1 / sqrt((double)D));
  emx_tensor q = device_view(p, NULL, type, 4, (int64_t[]){1, H, m, 2 * D}), o = q,
             k = device_view(p, NULL, type, 4, (int64_t[]){1, G, n, 2 * D}), v = k;
  o.dtype = EMX_F32;
  io.q = &q, io.k = &k, io.v = &v, io.o = &o;
  size_t size;
  EMX_TRY(emx_attn_workspace_size(ctx, &desc, &io, EMX_PASS_FORWARD, &size));
  emxi_block_parts parts = {.m = m, .n = n, .dtype = type};
  emxi_kv_read read = {.kv = kv, .seq = s->seqs[l], .n = n, .who = "session"};
  void *work;
  for (int placed = 0; placed < 2; placed++) {
    emxi_arena arena;
    emxi_arena_init(&arena, placed ? p->attn_work : NULL, placed ? p->attn_size : 0);
    work = emxi_arena_take(&arena, (int64_t)size, 1);
    read.k = emxi_arena_take(&arena, G * n * D, es);
    read.v = emxi_arena_take(&arena, G * n * D, es);
    parts.q = q.data = emxi_arena_take(&arena, 2 * H * m * D, es);
    parts.k = k.data = emxi_arena_take(&arena, 2 * G * n * D, es);
    parts.v = v.data = emxi_arena_take(&arena, 2 * G * n * D, es);
    parts.o = o.data = emxi_arena_take(&arena, 2 * H * m * D, sizeof(float));
    parts.beyond = emxi_arena_take(&arena, 1, sizeof *parts.beyond);
    /* without the memory for it: a few queries at a time */
    if (!placed && (arena.overflow || grow_device(ctx, &p->attn_work, &p->attn_size, emxi_arena_total(&arena))))
      return attend_by_decoder(s, l, batch, m, length);
  }
  parts.from_k = read.k, parts.from_v = read.v;
  const emxi_blocks *blocks = p->model->blocks;
  bool enough;
  EMX_TRY(blocks->part_queries(ctx, p->model->blocks_state, &p->block, &parts, &enough));
  if (!enough) return attend_by_decoder(s, l, batch, m, length);
  EMX_TRY(emx_kv_append(ctx, kv, batch, &t->k, &t->v, NULL));
  EMX_TRY(ctx->backend->kv_read(ctx, &read));
  EMX_TRY(blocks->part_keys(ctx, p->model->blocks_state, &p->block, &parts));
  EMX_TRY(emx_attn_forward(ctx, &desc, &io, work, size));
  return blocks->join(ctx, p->model->blocks_state, &p->block, &parts);
}

/* Appends k, v [m] to layer l and attends densely from q [m] into a. */
static emx_status attend_prefill(emx_session *s, int32_t l, int64_t m, int64_t length) {
  session_pool *p = s->pool;
  tensors t = tensors_of(p, l, 0, m);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &s->seqs[l];
  const emx_model_config *c = &p->model->config;
  if (p->on_gpu && p->kv_dtype != EMX_F32 && m >= MANY_QUERIES && c->head_dim <= 64 &&
      (p->alphas || (c->entmax_alpha > 1 && c->entmax_alpha <= 2)))
    return attend_in_parts(s, l, &batch, &t, m, length);
  if (p->on_gpu) return attend_by_decoder(s, l, &batch, m, length);
  if (p->in_file) return attend_file(s, l, &batch, &t, m, length);
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

/* The same for one token through the selector, which leaves reports. reach > 0: for a piece: the cache's length is looked up when
 * the work runs, and is at most that. */
static emx_status attend_decode(emx_session *s, int32_t l, int64_t reach) {
  session_pool *p = s->pool;
  emx_model *model = p->model;
  const emx_model_config *c = &model->config;
  tensors t = tensors_of(p, l, 0, 1);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &s->seqs[l];
  emx_decode_io io = decode_io(p, &t, l);
  const emx_session_support *wanted = &s->support;
  emx_tensor index, weight, count, table, length;
  if (reach) {
    const emx_kv *kv = p->kv[l];
    table = device_view(p, kv->device_tables + s->seqs[l] * kv->max_pages, EMX_I32, 2, (int64_t[]){1, kv->max_pages});
    length = device_view(p, p->block.tokens + 1, EMX_I32, 1, (int64_t[]){1});
    batch.seqs = NULL;
    batch.block_table = &table;
    batch.seq_lens = &length;
    batch.max_len = reach;
  }
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
  EMX_TRY(model->blocks->mark(model->ctx, model->blocks_state, 2 * l));
  EMX_TRY(emx_decode(model->ctx, p->kv[l], &batch, &s->select, &io, p->decode_work, p->decode_size));
  return model->blocks->mark(model->ctx, model->blocks_state, 2 * l + 1);
}

/* m tokens after the first `length`: their keys and values go into the caches, their normed states to `states` [m,W].
 * tokens NULL: recorded for a token that is not known yet, in a cache of at most `length` with it. */
static emx_status forward(emx_session *s, const int32_t *tokens, int64_t m, int64_t length, bool decoding, float *states) {
  session_pool *p = s->pool;
  emx_model *model = p->model;
  emx_ctx *ctx = model->ctx;
  const emxi_blocks *blocks = model->blocks;
  const emxi_weights *w = &model->on_device;
  if (s->tap && p->on_gpu)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "session: what layers attend with is shown by the CPU alone; open the model there");
  emxi_block b = p->block;
  b.m = m;
  b.from = length;
  b.stepped = !tokens;
  EMX_TRY(blocks->begin(ctx, model->blocks_state, &b, w->embed, tokens));
  for (int32_t l = 0; l < model->config.num_layers; l++) {
    b.w = &w->layers[l];
    EMX_TRY(blocks->before(ctx, model->blocks_state, &b));
    EMX_TRY(decoding ? attend_decode(s, l, tokens ? 0 : length) : attend_prefill(s, l, m, length));
    if (s->tap) {
      const emxi_layer_view view = {ctx,
                                    p->kv[l],
                                    s->seqs[l],
                                    l,
                                    length,
                                    m,
                                    b.q,
                                    b.k,
                                    b.v,
                                    p->alibi ? p->slopes : NULL,
                                    p->alphas ? p->alphas + (int64_t)l * model->config.num_heads : NULL};
      EMX_TRY(s->tap(s->tap_user, &view));
    }
    EMX_TRY(blocks->after(ctx, model->blocks_state, &b));
  }
  b.h = states;
  return blocks->norm(ctx, model->blocks_state, &b, w->norm);
}

/* p->logits [m,V] of m <= NLL_ROWS states. */
static emx_status head(session_pool *p, const float *states, int64_t m) {
  emx_model *model = p->model;
  return model->blocks->head(model->ctx, model->blocks_state, &model->config, model->on_device.head, states, p->logits, m);
}
/* m rows of logits, and of a decode its reports, for the host. On a GPU everything that was enqueued has been done then. */
static emx_status fetch(session_pool *p, int64_t m, const float **logits, const emx_report **reports) {
  emx_ctx *ctx = p->model->ctx;
  const emx_report *records = p->reports;
  *logits = p->logits;
  if (p->on_gpu) {
    const size_t skip = reports ? 0 : p->fetched_reports; /* the logits follow the reports */
    EMX_TRY(ctx->backend->memory_copy(
        ctx, (char *)p->fetched + skip, (const char *)p->reports + skip,
        p->fetched_reports - skip + (size_t)m * (size_t)p->model->config.vocab_size * sizeof *p->logits));
    EMX_TRY(ctx->backend->sync(ctx)); /* faults */
    records = p->fetched;
    *logits = (const float *)((const char *)p->fetched + p->fetched_reports);
  }
  if (reports) *reports = records;
  return EMX_OK;
}

/* What the reports [num_layers,H] of a token at position `at` say. */
static void count_reports(const session_pool *p, const emx_report *reports, int64_t at, emx_session_stats *stats) {
  const emx_model_config *c = &p->model->config;
  const int64_t row_bytes = 2 * (int64_t)c->head_dim * (int64_t)emx_dtype_size(p->kv_dtype);
  for (int64_t i = 0; i < (int64_t)c->num_layers * c->num_heads; i++) {
    const emx_report *r = &reports[i];
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
    stats->bytes_full += (at + 1) * row_bytes;
  }
  for (int32_t l = 0; l < c->num_layers; l++)
    stats->attn_seconds += p->model->blocks->between(p->model->ctx, p->model->blocks_state, 2 * l);
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
    const float *logits;
    EMX_TRY(head(p, states + i * width, m));
    EMX_TRY(fetch(p, m, &logits, NULL));
    nll_job job = {logits, tokens + i, nll + i, p->model->config.vocab_size};
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
    if (s->last_known) EMX_TRY(nll_of(p, last_state(s), tokens, work, 1));
  }
  for (int64_t done = 0; done < n;) {
    const int64_t m = n - done < p->chunk ? n - done : p->chunk;
    EMX_TRY(forward(s, tokens + done, m, s->length + done, false, p->block.h));
    if (nll) {
      int64_t known = done + m < n ? m : m - 1; /* the last state has no token after it */
      EMX_TRY(nll_of(p, p->block.h, tokens + done + 1, work + done + 1, known));
    }
    EMX_TRY(p->model->ctx->backend->sync(p->model->ctx)); /* progress is what has been done */
    done += m;
    if (done == n) {
      const float *last = p->block.h + (m - 1) * c->hidden_size, *row = NULL;
      if (logits) {
        EMX_TRY(head(p, last, 1));
        EMX_TRY(fetch(p, 1, &row, NULL));
      }
      EMX_TRY(set_last(s, last));
      if (logits) memcpy(logits, row, (size_t)c->vocab_size * sizeof *logits);
      if (nll) memcpy(nll, work, (size_t)n * sizeof *nll);
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

/* forward and head of one token by a piece, which is recorded where there is none for this length. state: one of the session's
 * two. */
static emx_status step_by_piece(emx_session *s, int32_t token, float *state) {
  session_pool *p = s->pool;
  emx_model *model = p->model;
  const emxi_blocks *blocks = model->blocks;
  session_piece *piece = &s->pieces[state == state_of(s, 1)];
  for (int32_t l = 0; l < model->config.num_layers; l++) EMX_TRY(emxi_kv_prepare(model->ctx, p->kv[l], s->seqs[l], 1));
  if (piece->piece && (piece->reach <= s->length || piece->work != p->decode_work)) {
    blocks->forget(model->ctx, model->blocks_state, piece->piece);
    *piece = (session_piece){0};
  }
  if (!piece->piece) {
    int64_t reach = 1024; /* how the work is cut depends on it: not far beyond the length */
    while (reach <= s->length) reach *= 2;
    reach = reach < p->max_tokens ? reach : p->max_tokens;
    EMX_TRY(blocks->record(model->ctx, model->blocks_state));
    emx_status status = forward(s, NULL, 1, reach, true, state);
    if (!status) status = head(p, state, 1);
    void *made = NULL;
    const emx_status end = blocks->recorded(model->ctx, model->blocks_state, status ? NULL : &made);
    if (status || end) return status ? status : end;
    *piece = (session_piece){made, reach, p->decode_work};
  }
  return blocks->replay(model->ctx, model->blocks_state, piece->piece, &p->block, token, s->length);
}

static emx_status decode(emx_session *s, int32_t token, float *logits) {
  session_pool *p = s->pool;
  const emx_model_config *c = &p->model->config;
  EMX_TRY(check_tokens(s, &token, 1, "emx_session_decode"));
  const int32_t mapped = p->kv[0]->sketch.mapped;
  const double start = now();
  const float *row = NULL;
  const emx_report *reports = NULL;
  float *state = state_of(s, !s->last);
  const bool by_piece = p->model->blocks->replay != NULL && !s->tap;
  emx_status status = by_piece ? step_by_piece(s, token, state) : forward(s, &token, 1, s->length, true, state);
  if (!status && !by_piece) status = head(p, state, 1);
  if (!status) status = fetch(p, 1, &row, &reports);
  if (status) return roll_back(s, mapped, status);
  for (int32_t l = 0; l < c->num_layers && by_piece; l++) emxi_kv_advance(p->kv[l], s->seqs[l], 1);
  memcpy(logits, row, (size_t)c->vocab_size * sizeof *logits);
  if (s->support.count && s->support.reports)
    memcpy(s->support.reports, reports, (size_t)c->num_layers * (size_t)c->num_heads * sizeof *reports);
  count_reports(p, reports, s->length, &s->stats);
  s->last = !s->last;
  s->last_known = true;
  s->length++;
  s->stats.tokens++;
  s->stats.seconds += now() - start;
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
  const float *row;
  EMX_TRY(head(p, last_state(s), 1));
  EMX_TRY(fetch(p, 1, &row, NULL));
  memcpy(logits, row, (size_t)p->model->config.vocab_size * sizeof *logits);
  return EMX_OK;
}
emx_status emx_session_logits(emx_session *s, float *logits) {
  if (!s || !logits) return emxi_fail(EMX_ERR_INVALID, "emx_session_logits: %s is NULL", s ? "logits" : "the session");
  EMXI_LOCKED(s->pool->model->ctx, last_logits(s, logits));
}

static emx_status cache_of(emx_session *s, const char *who, emx_progress_fn progress, void *user, emxi_cache *c) {
  session_pool *p = s->pool;
  if (p->on_gpu)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: caches of a GPU are not in files in this version; keep this one on the CPU", who);
  *c = (emxi_cache){.kind = EMX_CACHE_SESSION,
                    .ctx = p->model->ctx,
                    .kv = p->kv,
                    .layers = p->model->config.num_layers,
                    .n_seqs = 1,
                    .seqs = s->seqs,
                    .model = emxi_model_identity(p->model),
                    .width = p->model->config.hidden_size,
                    .max_tokens = p->max_tokens,
                    .last = state_of(s, s->last),
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
