/* SPDX-License-Identifier: Apache-2.0
 * A transformer block on a GPU. Matrix products of several tokens are cuBLASLt's, in full f32; those of one token, and everything
 * else, are kernels of our own (layers.cu), so that decoding allocates nothing and plans nothing.
 *
 * cuBLASLt is neither linked nor bundled: it is looked for when the first model is opened. */
#include "cuda/backend_cuda.h"
#include "layers.h"
#include "model/block.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <math.h>
#include <string.h>

/* ---- the library */

#define CUBLASLT_CALLS(X)            \
  X(cublasLtCreate)                  \
  X(cublasLtDestroy)                 \
  X(cublasLtGetStatusString)         \
  X(cublasLtMatmul)                  \
  X(cublasLtMatmulAlgoGetHeuristic)  \
  X(cublasLtMatmulDescCreate)        \
  X(cublasLtMatmulDescDestroy)       \
  X(cublasLtMatmulDescSetAttribute)  \
  X(cublasLtMatrixLayoutCreate)      \
  X(cublasLtMatrixLayoutDestroy)     \
  X(cublasLtMatmulPreferenceCreate)  \
  X(cublasLtMatmulPreferenceDestroy) \
  X(cublasLtMatmulPreferenceSetAttribute)

static struct {
  pthread_mutex_t lock;
  bool loaded; /* and stays, as its kernels do */
#define DECLARE(name) __typeof__(&name) name;
  CUBLASLT_CALLS(DECLARE)
#undef DECLARE
} lt = {.lock = PTHREAD_MUTEX_INITIALIZER};

static emx_status load_locked(void) {
  static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
  if (lt.loaded) return EMX_OK;
  void *library = NULL;
  for (size_t i = 0; i < sizeof names / sizeof *names && !library; i++) library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
  if (!library)
    return emxi_fail(EMX_ERR_UNSUPPORTED,
                     "emx_model_open: models on a GPU need cuBLASLt, and neither %s nor %s can be loaded (%s); it comes with the "
                     "CUDA toolkit. The CPU needs neither",
                     names[0], names[1], dlerror());
#define FIND(name)                                                                                                     \
  {                                                                                                                    \
    void *found = dlsym(library, #name);                                                                               \
    if (!found) return emxi_fail(EMX_ERR_UNSUPPORTED, "emx_model_open: the cuBLASLt that was found has no %s", #name); \
    memcpy(&lt.name, &found, sizeof found);                                                                            \
  }
  CUBLASLT_CALLS(FIND)
#undef FIND
  lt.loaded = true;
  return EMX_OK;
}
static emx_status load(void) {
  pthread_mutex_lock(&lt.lock);
  const emx_status status = load_locked();
  pthread_mutex_unlock(&lt.lock);
  return status;
}

/* ---- products of several tokens */

/* What a product's shape and alignment decide. */
typedef struct product_key {
  int64_t m, in, out, x_row, y_row;
  uint32_t x_align, w_align, y_align; /* bytes */
} product_key;
typedef struct plan {
  product_key key;
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t w, x, y;
  cublasLtMatmulAlgo_t algo;
} plan;

enum { PLANS = 32, WORKSPACE = 16 << 20 };
typedef struct layers {
  cublasLtHandle_t handle;
  void *workspace; /* on the device */
  plan plans[PLANS];
  int32_t n_plans, next;
  int32_t n_events;
  cudaEvent_t *events;
  bool overlap;
  cudaStream_t recorder; /* what is recorded goes there: the default stream cannot be */
  void *stream;          /* while recording: the context's */
  bool recording;
} layers;

static emx_status lt_fail(cublasStatus_t status, const char *what) {
  return emxi_fail(status == CUBLAS_STATUS_ALLOC_FAILED ? EMX_ERR_NOMEM : EMX_ERR_DEVICE, "cuBLASLt: %s: %s", what,
                   lt.cublasLtGetStatusString(status));
}
static uint32_t alignment(const void *p) {
  const uintptr_t low = (uintptr_t)p & -(uintptr_t)p;
  return low > 256 || !low ? 256 : (uint32_t)low;
}
static void plan_destroy(plan *p) {
  if (p->op) lt.cublasLtMatmulDescDestroy(p->op);
  if (p->w) lt.cublasLtMatrixLayoutDestroy(p->w);
  if (p->x) lt.cublasLtMatrixLayoutDestroy(p->x);
  if (p->y) lt.cublasLtMatrixLayoutDestroy(p->y);
  *p = (plan){0};
}
/* Arrays in rows are matrices in columns the other way round: y^T [out,m] = w^T' x^T, w^T [in,out] transposed. */
static cublasStatus_t plan_fill(const layers *s, const product_key *k, plan *p) {
  const cublasOperation_t transposed = CUBLAS_OP_T;
  cublasLtMatmulPreference_t preference = NULL;
  cublasLtMatmulHeuristicResult_t found;
  int n = 0;
  cublasStatus_t bad = lt.cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  if (!bad) bad = lt.cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
  if (!bad) bad = lt.cublasLtMatrixLayoutCreate(&p->w, CUDA_R_32F, (uint64_t)k->in, (uint64_t)k->out, k->in);
  if (!bad) bad = lt.cublasLtMatrixLayoutCreate(&p->x, CUDA_R_32F, (uint64_t)k->in, (uint64_t)k->m, k->x_row);
  if (!bad) bad = lt.cublasLtMatrixLayoutCreate(&p->y, CUDA_R_32F, (uint64_t)k->out, (uint64_t)k->m, k->y_row);
  if (!bad) bad = lt.cublasLtMatmulPreferenceCreate(&preference);
  const size_t workspace = WORKSPACE;
  const struct {
    cublasLtMatmulPreferenceAttributes_t name;
    const void *value;
    size_t size;
  } wishes[] = {{CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &k->w_align, sizeof k->w_align},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &k->x_align, sizeof k->x_align},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &k->y_align, sizeof k->y_align},
                {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &k->y_align, sizeof k->y_align}};
  for (size_t i = 0; i < sizeof wishes / sizeof *wishes && !bad; i++)
    bad = lt.cublasLtMatmulPreferenceSetAttribute(preference, wishes[i].name, wishes[i].value, wishes[i].size);
  if (!bad) bad = lt.cublasLtMatmulAlgoGetHeuristic(s->handle, p->op, p->w, p->x, p->y, p->y, preference, 1, &found, &n);
  if (!bad && !n) bad = CUBLAS_STATUS_NOT_SUPPORTED;
  if (preference) lt.cublasLtMatmulPreferenceDestroy(preference);
  p->algo = found.algo;
  p->key = *k;
  return bad;
}
static emx_status plan_of(layers *s, const product_key *k, const plan **out) {
  for (int32_t i = 0; i < s->n_plans; i++)
    if (!memcmp(&s->plans[i].key, k, sizeof *k)) {
      *out = &s->plans[i];
      return EMX_OK;
    }
  plan made = {0};
  const cublasStatus_t bad = plan_fill(s, k, &made);
  if (bad) {
    plan_destroy(&made);
    return lt_fail(bad, "no way to multiply these matrices");
  }
  plan *slot = &s->plans[s->next]; /* the oldest makes way */
  s->next = (s->next + 1) % PLANS;
  if (s->n_plans < PLANS) s->n_plans++;
  plan_destroy(slot);
  *slot = made;
  *out = slot;
  return EMX_OK;
}

/* y [m,out] = (accumulate ? y : 0) + x [m,in] w^T, for m > 1. */
static emx_status linear(emx_ctx *ctx, layers *s, const float *x, int64_t x_row, const float *w, float *y, int64_t y_row,
                         int64_t m, int64_t in, int64_t out, bool accumulate) {
  product_key key;
  memset(&key, 0, sizeof key); /* its padding is compared, too */
  key.m = m, key.in = in, key.out = out, key.x_row = x_row, key.y_row = y_row;
  key.x_align = alignment(x), key.w_align = alignment(w), key.y_align = alignment(y);
  const plan *p = NULL;
  EMX_TRY(plan_of(s, &key, &p));
  const float one = 1, beta = accumulate ? 1 : 0;
  const cublasStatus_t bad = lt.cublasLtMatmul(s->handle, p->op, &one, w, p->w, x, p->x, &beta, y, p->y, y, p->y, &p->algo,
                                               s->workspace, WORKSPACE, ctx->stream);
  return bad ? lt_fail(bad, "a product failed") : EMX_OK;
}

/* ---- the table */

static void cuda_close(emx_ctx *ctx, void *state) {
  layers *s = state;
  int before;
  const bool entered = !emxi_cuda_enter(ctx, &before);
  for (int32_t i = 0; i < s->n_plans; i++) plan_destroy(&s->plans[i]);
  if (s->handle) lt.cublasLtDestroy(s->handle);
  for (int32_t i = 0; i < s->n_events; i++) (void)cudaEventDestroy(s->events[i]);
  if (s->recorder) (void)cudaStreamDestroy(s->recorder);
  ctx->backend->memory_free(ctx, s->workspace);
  if (entered) (void)emxi_cuda_leave(before, EMX_OK, false, "emx_model_close");
  emxi_free(s->events);
  emxi_free(s);
}
static emx_status fill(emx_ctx *ctx, layers *s, const emx_model_config *config) {
  s->overlap = emxi_cuda_of(ctx)->overlap;
  s->events = emxi_alloc(2 * (size_t)config->num_layers * sizeof *s->events);
  if (!s->events) return emxi_fail(EMX_ERR_NOMEM, "emx_model_open: no memory for %d layers", config->num_layers);
  EMX_TRY(ctx->backend->memory_alloc(ctx, WORKSPACE, &s->workspace));
  const cublasStatus_t bad = lt.cublasLtCreate(&s->handle);
  if (bad) return lt_fail(bad, "it does not start");
  const cudaError_t no_stream = cudaStreamCreateWithFlags(&s->recorder, cudaStreamNonBlocking);
  if (no_stream) return emxi_fail(EMX_ERR_DEVICE, "emx_model_open: no CUDA stream: %s", cudaGetErrorString(no_stream));
  for (; s->n_events < 2 * config->num_layers; s->n_events++) {
    const cudaError_t error = cudaEventCreate(&s->events[s->n_events]);
    if (error) return emxi_fail(EMX_ERR_DEVICE, "emx_model_open: no CUDA event: %s", cudaGetErrorString(error));
  }
  return EMX_OK;
}
static emx_status cuda_open(emx_ctx *ctx, const emx_model_config *config, void **state) {
  int before;
  EMX_TRY(load());
  layers *s = emxi_calloc(sizeof *s);
  if (!s) return emxi_fail(EMX_ERR_NOMEM, "emx_model_open: no memory for %zu bytes", sizeof *s);
  emx_status status = emxi_cuda_enter(ctx, &before);
  if (!status) status = emxi_cuda_leave(before, fill(ctx, s, config), false, "emx_model_open");
  if (status)
    cuda_close(ctx, s);
  else
    *state = s;
  return status;
}

/* Calls fn between enter and leave. */
#define ON_DEVICE(call)                                                        \
  do {                                                                         \
    int before_;                                                               \
    if (emxi_cancelled(ctx)) return emxi_fail(EMX_ERR_CANCELLED, "cancelled"); \
    EMX_TRY(emxi_cuda_enter(ctx, &before_));                                   \
    const emx_status on_device_ = (call);                                      \
    return emxi_cuda_leave(before_, on_device_, true, "emx_session");          \
  } while (0)

static emx_status begin(emx_ctx *ctx, const emxi_block *b, const float *table, const int32_t *tokens) {
  const bool listed = b->m > 1 || b->stepped;
  const emxi_cuda_embed e = {table, listed ? b->tokens : NULL, b->x, b->m, b->config->hidden_size, listed ? 0 : tokens[0]};
  if (b->m > 1) {
    const cudaError_t error =
        cudaMemcpyAsync(b->tokens, tokens, (size_t)b->m * sizeof *tokens, cudaMemcpyHostToDevice, ctx->stream);
    if (error) return emxi_fail(EMX_ERR_DEVICE, "emx_session: tokens cannot be copied: %s", cudaGetErrorString(error));
  }
  emxi_cuda_launch_embed(&e, ctx->stream);
  return EMX_OK;
}
static emx_status cuda_begin(emx_ctx *ctx, void *state, const emxi_block *b, const float *embed, const int32_t *tokens) {
  (void)state;
  ON_DEVICE(begin(ctx, b, embed, tokens));
}

static void norm(emx_ctx *ctx, const layers *s, const emxi_block *b, const float *w) {
  const emxi_cuda_norm n = {b->x, w, b->h, b->config->rms_norm_eps, b->m, b->config->hidden_size};
  emxi_cuda_launch_norm(&n, s->overlap, ctx->stream);
}
static emx_status normed(emx_ctx *ctx, const layers *s, const emxi_block *b, const float *w) {
  norm(ctx, s, b, w);
  return EMX_OK;
}
static emx_status cuda_norm(emx_ctx *ctx, void *state, const emxi_block *b, const float *w) {
  ON_DEVICE(normed(ctx, state, b, w));
}

static emx_status before_attention(emx_ctx *ctx, layers *s, const emxi_block *b) {
  const emx_model_config *c = b->config;
  const emxi_layer *w = b->w;
  const int64_t width = c->hidden_size; /* a row of q, k, v and z is the product's */
  if (b->m == 1) {
    const emxi_cuda_product p = {
        .x = b->x, .norm = w->input_norm, .w = w->wq, .y = b->q, .eps = c->rms_norm_eps, .in = width, .out = b->q_row};
    emxi_cuda_launch_product(&p, s->overlap, ctx->stream);
  } else {
    norm(ctx, s, b, w->input_norm);
    EMX_TRY(linear(ctx, s, b->h, width, w->wq, b->q, b->q_row, b->m, width, b->q_row, false));
  }
  const bool rope = c->position_type == EMX_POSITION_ROPE;
  if (!rope && !b->scaled) return EMX_OK;
  const emxi_cuda_turn t = {.q = b->q,
                            .k = b->k,
                            .z = c->attn_scale_type == EMX_ATTN_SCALE_ASENTMAX ? b->z : NULL,
                            .b = w->theta_b,
                            .c = w->theta_c,
                            .at = b->stepped ? b->tokens + 1 : NULL,
                            .q_row = b->q_row,
                            .k_row = b->kv_row,
                            .z_row = b->z_row,
                            .m = b->m,
                            .from = b->from,
                            .heads = c->num_heads,
                            .kv_heads = c->num_kv_heads,
                            .d = c->head_dim,
                            .scaled = b->scaled,
                            .type = c->attn_scale_type,
                            .rope = rope,
                            .rope_theta = c->rope_theta,
                            .focal = c->attn_scale_type == EMX_ATTN_SCALE_FOCAL ? log(c->focal_temperature) : 0};
  emxi_cuda_launch_turn(&t, s->overlap, ctx->stream);
  return EMX_OK;
}
static emx_status cuda_before(emx_ctx *ctx, void *state, const emxi_block *b) { ON_DEVICE(before_attention(ctx, state, b)); }

static emxi_cuda_parts parts_of(const emxi_block *b, const emxi_block_parts *p) {
  const emx_model_config *c = b->config;
  return (emxi_cuda_parts){.from_q = b->q,
                           .from_k = p->from_k,
                           .from_v = p->from_v,
                           .q = p->q,
                           .k = p->k,
                           .v = p->v,
                           .o = p->o,
                           .a = b->a,
                           .beyond = p->beyond,
                           .q_row = b->q_row,
                           .m = p->m,
                           .n = p->n,
                           .heads = c->num_heads,
                           .kv_heads = c->num_kv_heads,
                           .d = c->head_dim,
                           .dtype = p->dtype};
}
static emx_status parted_queries(emx_ctx *ctx, const emxi_block *b, const emxi_block_parts *p, bool *enough) {
  const emxi_cuda_parts x = parts_of(b, p);
  emxi_cuda_launch_part_queries(&x, ctx->stream);
  *enough = true;
  if (p->dtype != EMX_F16) return EMX_OK; /* bf16 goes as far as f32 */
  int32_t beyond = 0;
  cudaError_t error = cudaMemcpyAsync(&beyond, p->beyond, sizeof beyond, cudaMemcpyDeviceToHost, ctx->stream);
  if (!error) error = cudaStreamSynchronize(ctx->stream);
  if (error) return emxi_fail(EMX_ERR_DEVICE, "emx_session: queries could not be looked at: %s", cudaGetErrorString(error));
  *enough = !beyond;
  return EMX_OK;
}
static emx_status cuda_part_queries(emx_ctx *ctx, void *state, const emxi_block *b, const emxi_block_parts *p, bool *enough) {
  (void)state;
  ON_DEVICE(parted_queries(ctx, b, p, enough));
}
static emx_status parted_keys(emx_ctx *ctx, const emxi_block *b, const emxi_block_parts *p) {
  const emxi_cuda_parts x = parts_of(b, p);
  emxi_cuda_launch_part_keys(&x, ctx->stream);
  return EMX_OK;
}
static emx_status cuda_part_keys(emx_ctx *ctx, void *state, const emxi_block *b, const emxi_block_parts *p) {
  (void)state;
  ON_DEVICE(parted_keys(ctx, b, p));
}
static emx_status joined(emx_ctx *ctx, const emxi_block *b, const emxi_block_parts *p) {
  const emxi_cuda_parts x = parts_of(b, p);
  emxi_cuda_launch_join(&x, ctx->stream);
  return EMX_OK;
}
static emx_status cuda_join(emx_ctx *ctx, void *state, const emxi_block *b, const emxi_block_parts *p) {
  (void)state;
  ON_DEVICE(joined(ctx, b, p));
}

static emx_status after_attention(emx_ctx *ctx, layers *s, const emxi_block *b) {
  const emx_model_config *c = b->config;
  const emxi_layer *w = b->w;
  const int64_t width = c->hidden_size, f = c->intermediate_size, wide = (int64_t)c->num_heads * c->head_dim;
  if (b->m == 1) {
    const emxi_cuda_product products[] = {
        {.x = b->a, .w = w->wo, .y = b->x, .in = wide, .out = width, .accumulate = true},
        {.x = b->x, .norm = w->post_norm, .w = w->gate, .up = w->up, .y = b->gate, .eps = c->rms_norm_eps, .in = width, .out = f},
        {.x = b->gate, .w = w->down, .y = b->x, .in = f, .out = width, .accumulate = true}};
    /* before the first there is a mark, and kernels overlap with kernels alone */
    for (int i = 0; i < 3; i++) emxi_cuda_launch_product(&products[i], s->overlap && i > 0, ctx->stream);
    return EMX_OK;
  }
  EMX_TRY(linear(ctx, s, b->a, wide, w->wo, b->x, width, b->m, wide, width, true));
  norm(ctx, s, b, w->post_norm);
  EMX_TRY(linear(ctx, s, b->h, width, w->gate, b->gate, b->gate_row, b->m, width, 2 * f, false));
  const emxi_cuda_glu g = {.gate = b->gate, .up = b->up, .row = b->gate_row, .m = b->m, .f = f};
  emxi_cuda_launch_glu(&g, s->overlap, ctx->stream);
  return linear(ctx, s, b->gate, b->gate_row, w->down, b->x, width, b->m, f, width, true);
}
static emx_status cuda_after(emx_ctx *ctx, void *state, const emxi_block *b) { ON_DEVICE(after_attention(ctx, state, b)); }

static emx_status head(emx_ctx *ctx, layers *s, const emx_model_config *c, const float *w, const float *states, float *logits,
                       int64_t m) {
  if (m > 1) return linear(ctx, s, states, c->hidden_size, w, logits, c->vocab_size, m, c->hidden_size, c->vocab_size, false);
  const emxi_cuda_product p = {.x = states, .w = w, .y = logits, .in = c->hidden_size, .out = c->vocab_size};
  emxi_cuda_launch_product(&p, s->overlap, ctx->stream);
  return EMX_OK;
}
static emx_status cuda_head(emx_ctx *ctx, void *state, const emx_model_config *c, const float *w, const float *states,
                            float *logits, int64_t m) {
  ON_DEVICE(head(ctx, state, c, w, states, logits, m));
}

static emx_status record(emx_ctx *ctx, const layers *s, int32_t i) {
  const cudaError_t error =
      cudaEventRecordWithFlags(s->events[i], ctx->stream, s->recording ? cudaEventRecordExternal : cudaEventRecordDefault);
  return error ? emxi_fail(EMX_ERR_DEVICE, "emx_session: the time cannot be taken: %s", cudaGetErrorString(error)) : EMX_OK;
}
static emx_status cuda_mark(emx_ctx *ctx, void *state, int32_t i) { ON_DEVICE(record(ctx, state, i)); }
static double cuda_between(emx_ctx *ctx, void *state, int32_t i) {
  (void)ctx;
  const layers *s = state;
  float ms = 0;
  if (cudaEventElapsedTime(&ms, s->events[i], s->events[i + 1])) {
    (void)cudaGetLastError();
    return NAN;
  }
  return 1e-3 * (double)ms;
}

/* ---- a token as a graph. A launch costs the host a few microseconds, and a token has a dozen a layer. */

static emx_status begin_recording(emx_ctx *ctx, layers *s) {
  const cudaError_t error = cudaStreamBeginCapture(s->recorder, cudaStreamCaptureModeThreadLocal);
  if (error) return emxi_fail(EMX_ERR_DEVICE, "emx_session: no graph can be recorded: %s", cudaGetErrorString(error));
  s->stream = ctx->stream;
  s->recording = true;
  ctx->stream = s->recorder; /* the context is locked */
  return EMX_OK;
}
static emx_status cuda_record(emx_ctx *ctx, void *state) { ON_DEVICE(begin_recording(ctx, state)); }

/* Also where a call has failed or was cancelled. */
static emx_status cuda_recorded(emx_ctx *ctx, void *state, void **piece) {
  layers *s = state;
  cudaGraph_t graph = NULL;
  cudaGraphExec_t exec = NULL;
  int before;
  ctx->stream = s->stream;
  s->recording = false;
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  cudaError_t error = cudaStreamEndCapture(s->recorder, &graph);
  if (!error && piece) error = cudaGraphInstantiate(&exec, graph, 0);
  if (graph) (void)cudaGraphDestroy(graph);
  (void)cudaGetLastError();
  emx_status status = EMX_OK;
  if (piece && error) status = emxi_fail(EMX_ERR_DEVICE, "emx_session: no graph can be made: %s", cudaGetErrorString(error));
  if (piece && !error) *piece = exec;
  return emxi_cuda_leave(before, status, false, "emx_session");
}

static emx_status replay(emx_ctx *ctx, void *piece, const emxi_block *b, int32_t token, int64_t position) {
  const emxi_cuda_step step = {b->tokens, token, (int32_t)position};
  emxi_cuda_launch_step(&step, ctx->stream);
  const cudaError_t error = cudaGraphLaunch(piece, ctx->stream);
  return error ? emxi_fail(EMX_ERR_DEVICE, "emx_session: a graph could not be started: %s", cudaGetErrorString(error)) : EMX_OK;
}
static emx_status cuda_replay(emx_ctx *ctx, void *state, void *piece, const emxi_block *b, int32_t token, int64_t position) {
  (void)state;
  ON_DEVICE(replay(ctx, piece, b, token, position));
}
static void cuda_forget(emx_ctx *ctx, void *state, void *piece) {
  (void)state;
  int before;
  if (!piece || emxi_cuda_enter(ctx, &before)) return;
  (void)cudaGraphExecDestroy(piece);
  (void)emxi_cuda_leave(before, EMX_OK, false, "emx_session");
}

const emxi_blocks emxi_blocks_cuda = {.merged = true,
                                      .open = cuda_open,
                                      .close = cuda_close,
                                      .begin = cuda_begin,
                                      .before = cuda_before,
                                      .part_queries = cuda_part_queries,
                                      .part_keys = cuda_part_keys,
                                      .join = cuda_join,
                                      .after = cuda_after,
                                      .norm = cuda_norm,
                                      .head = cuda_head,
                                      .mark = cuda_mark,
                                      .between = cuda_between,
                                      .record = cuda_record,
                                      .recorded = cuda_recorded,
                                      .replay = cuda_replay,
                                      .forget = cuda_forget};
