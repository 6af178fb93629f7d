/* SPDX-License-Identifier: Apache-2.0
 * Public entries of dense attention: every layout is validated and resolved to strides here, once; back ends see emxi_attn. */
#include "attn.h"

#include <math.h>

#include "base/backend.h"

void emx_attn_desc_init_sized(emx_attn_desc *desc, size_t size) {
  const emx_attn_desc defaults = {
      .flags = EMX_ATTN_CAUSAL, .alpha = 1.5, .layout = EMX_LAYOUT_BHND, .window_left = -1, .window_right = -1};
  emxi_struct_init(desc, size, &defaults, sizeof defaults);
}
void emx_attn_io_init_sized(emx_attn_io *io, size_t size) {
  const emx_attn_io defaults = {0};
  emxi_struct_init(io, size, &defaults, sizeof defaults);
}

/* What a dimension of one element is spaced by means nothing, and bindings put anything there: zero is aligned to whatever a
 * kernel would like. */
static int64_t stride_of(const emx_tensor *t, int d) { return t->shape[d] == 1 ? 0 : t->stride[d]; }

/* Strides of a tensor [B,H,S(,D)], [B,S,H(,D)] or packed [T,H(,D)]. */
static void resolve(emxi_mat *m, const emx_tensor *t, int32_t layout, bool packed) {
  *m = (emxi_mat){.data = t->data, .dtype = t->dtype};
  if (packed) {
    m->row = stride_of(t, 0);
    m->head = stride_of(t, 1);
  } else {
    m->batch = stride_of(t, 0);
    m->head = stride_of(t, layout == EMX_LAYOUT_BHND ? 1 : 2);
    m->row = stride_of(t, layout == EMX_LAYOUT_BHND ? 2 : 1);
  }
}

struct call {
  const char *who;
  emx_ctx *ctx;
  const emx_attn_desc *desc;
  bool packed, sizes;             /* sizes: a size query, which has no data */
  int64_t shape_q[4], shape_k[4]; /* of q and of k, in their own dimension order */
};

static emx_status check_tensor(const struct call *c, const emx_tensor *t, int32_t ndim, const int64_t *shape, const char *name) {
  EMX_TRY(c->sizes ? emxi_tensor_layout(c->ctx, t, ndim, c->who, name) : emxi_tensor_check(c->ctx, t, ndim, c->who, name));
  return shape ? emxi_tensor_shape(t, ndim, shape, c->who, name) : EMX_OK;
}

static emx_status lengths(const struct call *c, const emx_tensor *t, int64_t n, const char *name, const int32_t **out) {
  *out = NULL;
  if (!t) return EMX_OK;
  EMX_TRY(check_tensor(c, t, 1, &n, name));
  if (t->dtype != EMX_I32) return emxi_fail(EMX_ERR_DTYPE, "%s: %s is %s, expected i32", c->who, name, emx_dtype_name(t->dtype));
  *out = t->data;
  return EMX_OK;
}

/* tau, lse or support: the shape of q without D. */
static emx_status per_row(const struct call *c, const emx_tensor *t, int32_t dtype, const char *name, emxi_mat *out) {
  EMX_TRY(check_tensor(c, t, c->packed ? 2 : 3, c->shape_q, name));
  if (t->dtype != dtype)
    return emxi_fail(EMX_ERR_DTYPE, "%s: %s is %s, expected %s", c->who, name, emx_dtype_name(t->dtype), emx_dtype_name(dtype));
  resolve(out, t, c->desc->layout, c->packed);
  return EMX_OK;
}

/* A tensor like q or k, with its dtype or f32. */
static emx_status like(const struct call *c, const emx_tensor *t, const int64_t *shape, int32_t dtype, const char *name,
                       emxi_mat *out) {
  int32_t ndim = c->packed ? 3 : 4;
  EMX_TRY(check_tensor(c, t, ndim, shape, name));
  if (t->dtype != dtype && !(t->dtype == EMX_F32 && dtype != EMX_F64))
    return emxi_fail(EMX_ERR_DTYPE, "%s: %s is %s, expected %s%s", c->who, name, emx_dtype_name(t->dtype), emx_dtype_name(dtype),
                     dtype == EMX_F64 || dtype == EMX_F32 ? "" : " or f32");
  resolve(out, t, c->desc->layout, c->packed);
  return EMX_OK;
}

static emx_status check_alpha(double alpha, int32_t pass, const char *who) {
  EMX_TRY(emxi_alpha_check(alpha, who));
  if (pass == EMX_PASS_BACKWARD && alpha > 2.0)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: alpha is %g; the backward pass has 1 <= alpha <= 2", who, alpha);
  return EMX_OK;
}
/* [H] f64 beside the query heads. */
static emx_status per_head(const struct call *c, const emx_tensor *t, int64_t heads, const char *name, void **out) {
  EMX_TRY(check_tensor(c, t, 1, &heads, name));
  if (t->dtype != EMX_F64) return emxi_fail(EMX_ERR_DTYPE, "%s: %s is %s, expected f64", c->who, name, emx_dtype_name(t->dtype));
  /* a size query has no data, but whether the tensor is there matters to it */
  static double somewhere;
  *out = t->data ? t->data : &somewhere;
  return EMX_OK;
}

/* support_index: the shape of q with C in the place of D. */
static emx_status lists(const struct call *c, const emx_tensor *t, bool softmax, bool support, emxi_attn *a) {
  const int32_t ndim = c->packed ? 3 : 4;
  int64_t shape[4];
  if (softmax) return emxi_fail(EMX_ERR_INVALID, "%s: alpha = 1 has no support lists", c->who);
  if (!support) return emxi_fail(EMX_ERR_INVALID, "%s: support_index without support, which says how long the lists are", c->who);
  for (int32_t d = 0; d < ndim; d++) shape[d] = c->shape_q[d];
  if (t->ndim == ndim) shape[ndim - 1] = t->shape[ndim - 1];
  EMX_TRY(check_tensor(c, t, ndim, shape, "support_index"));
  if (t->dtype != EMX_I32)
    return emxi_fail(EMX_ERR_DTYPE, "%s: support_index is %s, expected i32", c->who, emx_dtype_name(t->dtype));
  resolve(&a->index, t, c->desc->layout, c->packed);
  a->list = shape[ndim - 1];
  return EMX_OK;
}

static emx_status resolve_call(emx_ctx *ctx, const emx_attn_desc *desc, const emx_attn_io *io, int32_t pass, bool sizes,
                               emxi_attn *a) {
  struct call c = {
      .sizes = sizes, .who = pass == EMX_PASS_BACKWARD ? "emx_attn_backward" : "emx_attn_forward", .ctx = ctx, .desc = desc};
  const char *who = c.who;
  void *alphas = NULL, *d_alpha = NULL;
  if (!io->alphas) EMX_TRY(check_alpha(desc->alpha, pass, who));
  const bool softmax = !io->alphas && desc->alpha == 1.0;
  if (!isfinite(desc->scale)) return emxi_fail(EMX_ERR_INVALID, "%s: scale is %g", who, (double)desc->scale);
  if (desc->flags & ~(uint32_t)EMX_ATTN_CAUSAL) return emxi_fail(EMX_ERR_INVALID, "%s: unknown flags 0x%x", who, desc->flags);
  if (desc->layout != EMX_LAYOUT_BHND && desc->layout != EMX_LAYOUT_BNHD)
    return emxi_fail(EMX_ERR_INVALID, "%s: unknown layout %d", who, desc->layout);
  if (desc->window_left < -1 || desc->window_right < -1)
    return emxi_fail(EMX_ERR_INVALID, "%s: window (%d, %d); a side is a number of keys, or -1 for all", who, desc->window_left,
                     desc->window_right);
  if (io->d_alpha && !io->alphas) return emxi_fail(EMX_ERR_INVALID, "%s: d_alpha without alphas", who);
  if (!io->q || !io->k || !io->v) return emxi_fail(EMX_ERR_INVALID, "%s: q, k or v is NULL", who);
  if (!io->cu_seqlens_q != !io->cu_seqlens_k)
    return emxi_fail(EMX_ERR_INVALID, "%s: cu_seqlens_q and cu_seqlens_k go together", who);
  const bool paged = io->block_table != NULL, bnhd = desc->layout == EMX_LAYOUT_BNHD;
  c.packed = io->cu_seqlens_q != NULL;
  if (paged && c.packed) return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: packed queries over paged keys; use padded queries", who);
  if (paged && pass == EMX_PASS_BACKWARD)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: paged keys; the backward pass has contiguous and packed ones", who);

  const int32_t ndim = c.packed ? 3 : 4;
  EMX_TRY(check_tensor(&c, io->q, ndim, NULL, "q"));
  EMX_TRY(check_tensor(&c, io->k, ndim, NULL, "k"));
  for (int32_t d = 0; d < ndim; d++) {
    c.shape_q[d] = io->q->shape[d];
    c.shape_k[d] = io->k->shape[d];
  }
  EMX_TRY(check_tensor(&c, io->v, ndim, c.shape_k, "v"));
  const int32_t kt = io->k->dtype;
  if (!emxi_is_float(kt)) return emxi_fail(EMX_ERR_DTYPE, "%s: k is %s, expected f32, f16, bf16 or f64", who, emx_dtype_name(kt));
  if (io->v->dtype != kt)
    return emxi_fail(EMX_ERR_DTYPE, "%s: v is %s and k is %s, they must agree", who, emx_dtype_name(io->v->dtype),
                     emx_dtype_name(kt));
  const int hd = c.packed ? 1 : bnhd ? 2 : 1, sd = c.packed ? 0 : bnhd ? 1 : 2; /* dimensions of heads and rows */
  *a = (emxi_attn){.pass = pass,
                   .alpha = desc->alpha,
                   .left = desc->window_left < 0 ? INT32_MAX : desc->window_left,
                   .right = desc->flags & EMX_ATTN_CAUSAL ? 0
                            : desc->window_right < 0      ? INT32_MAX
                                                          : desc->window_right,
                   .heads = c.shape_q[hd],
                   .kv_heads = c.shape_k[hd],
                   .d = c.shape_q[ndim - 1],
                   .rows_q = c.shape_q[sd],
                   .rows_k = c.shape_k[sd]};
  if (c.shape_k[ndim - 1] != a->d)
    return emxi_fail(EMX_ERR_SHAPE, "%s: head dim of k is %lld, of q %lld", who, (long long)c.shape_k[ndim - 1], (long long)a->d);
  if (a->d < (kt == EMX_F64 ? 1 : 16) || a->d > 256)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: head dim %lld; supported are 16..256 (f64: 1..256)", who, (long long)a->d);
  if (a->kv_heads < 1 || a->heads < 1 || a->heads % a->kv_heads)
    return emxi_fail(EMX_ERR_SHAPE, "%s: %lld query heads are no multiple of %lld KV heads", who, (long long)a->heads,
                     (long long)a->kv_heads);
  a->scale = desc->scale == 0 ? 1.0 / sqrt((double)a->d) : (double)desc->scale;

  if (c.packed) {
    int64_t n = io->cu_seqlens_q->ndim == 1 ? io->cu_seqlens_q->shape[0] : 0;
    if (n < 1) return emxi_fail(EMX_ERR_SHAPE, "%s: cu_seqlens_q must be [B+1]", who);
    a->batch = n - 1;
    EMX_TRY(lengths(&c, io->cu_seqlens_q, n, "cu_seqlens_q", &a->cu_q));
    EMX_TRY(lengths(&c, io->cu_seqlens_k, n, "cu_seqlens_k", &a->cu_k));
    if (io->seqlens_q || io->seqlens_k) return emxi_fail(EMX_ERR_INVALID, "%s: seqlens and cu_seqlens exclude each other", who);
    a->max_q = a->rows_q;
    a->max_k = a->rows_k;
  } else {
    a->batch = c.shape_q[0];
    if (!paged && c.shape_k[0] != a->batch)
      return emxi_fail(EMX_ERR_SHAPE, "%s: k has batch %lld, q %lld", who, (long long)c.shape_k[0], (long long)a->batch);
    EMX_TRY(lengths(&c, io->seqlens_q, a->batch, "seqlens_q", &a->seqlens_q));
    EMX_TRY(lengths(&c, io->seqlens_k, a->batch, "seqlens_k", &a->seqlens_k));
    a->max_q = a->rows_q;
    a->max_k = a->rows_k;
  }
  if (paged) {
    const emx_tensor *bt = io->block_table;
    EMX_TRY(check_tensor(&c, bt, 2, NULL, "block_table"));
    if (bt->dtype != EMX_I32 || bt->shape[0] != a->batch)
      return emxi_fail(EMX_ERR_SHAPE, "%s: block_table must be i32 [%lld, M]", who, (long long)a->batch);
    if (!a->seqlens_k) return emxi_fail(EMX_ERR_INVALID, "%s: a block table needs seqlens_k", who);
    a->page_size = a->rows_k;
    if (a->page_size != 16 && a->page_size != 32 && a->page_size != 64)
      return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: page size %lld; supported are 16, 32 and 64", who, (long long)a->page_size);
    a->block_table = bt->data;
    a->table_stride = bt->stride[0];
    a->table_width = bt->shape[1];
    a->pages = c.shape_k[0];
    if (__builtin_mul_overflow(a->table_width, a->page_size, &a->max_k))
      return emxi_fail(EMX_ERR_SHAPE, "%s: block_table is absurdly wide", who);
  }
  if (a->max_k > INT32_MAX - 64 || a->max_q > INT32_MAX - 64)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: sequences are limited to 2^31 rows", who);

  if (io->q->dtype != kt && !(io->q->dtype == EMX_F32 && kt != EMX_F64))
    return emxi_fail(EMX_ERR_DTYPE, "%s: q is %s, k is %s: q has k's dtype or f32", who, emx_dtype_name(io->q->dtype),
                     emx_dtype_name(kt));
  resolve(&a->q, io->q, desc->layout, c.packed);
  resolve(&a->k, io->k, desc->layout, c.packed);
  resolve(&a->v, io->v, desc->layout, c.packed);
  if (io->alibi_slopes) {
    EMX_TRY(check_tensor(&c, io->alibi_slopes, 1, &a->heads, "alibi_slopes"));
    if (io->alibi_slopes->dtype != EMX_F32) return emxi_fail(EMX_ERR_DTYPE, "%s: alibi_slopes must be f32", who);
    a->slopes = io->alibi_slopes->data;
  }
  if (io->alphas) EMX_TRY(per_head(&c, io->alphas, a->heads, "alphas", &alphas));
  a->alphas = alphas;
  if (softmax ? io->tau != NULL : io->lse != NULL)
    return emxi_fail(EMX_ERR_INVALID, "%s: %s", who,
                     softmax ? "alpha = 1 has no tau, it has lse" : "alpha > 1 and alphas have no lse, they have tau");
  if (io->support && (pass == EMX_PASS_FORWARD || io->support_index))
    EMX_TRY(per_row(&c, io->support, EMX_I32, "support", &a->support));
  if (io->support_index) EMX_TRY(lists(&c, io->support_index, softmax, io->support != NULL, a));
  const emx_tensor *threshold = softmax ? io->lse : io->tau;
  if (threshold) EMX_TRY(per_row(&c, threshold, kt == EMX_F64 ? EMX_F64 : EMX_F32, softmax ? "lse" : "tau", &a->tau));
  if (pass == EMX_PASS_FORWARD) {
    EMX_TRY(like(&c, io->o, c.shape_q, io->q->dtype, "o", &a->o));
  } else {
    if (!threshold) return emxi_fail(EMX_ERR_INVALID, "%s: %s of the forward pass is required", who, softmax ? "lse" : "tau");
    if (io->d_alpha) EMX_TRY(per_head(&c, io->d_alpha, a->heads, "d_alpha", &d_alpha));
    a->d_alpha = d_alpha;
    EMX_TRY(like(&c, io->d_o, c.shape_q, io->q->dtype, "d_o", &a->d_o));
    EMX_TRY(like(&c, io->d_q, c.shape_q, io->q->dtype, "d_q", &a->d_q));
    EMX_TRY(like(&c, io->d_k, c.shape_k, kt, "d_k", &a->d_k));
    EMX_TRY(like(&c, io->d_v, c.shape_k, kt, "d_v", &a->d_v));
  }
  return ctx->backend->attn_supports(ctx, a);
}

static emx_status check_cu(const int32_t *cu, int64_t b, int64_t rows, const char *name) {
  for (int64_t i = 0; i <= b; i++)
    if ((i == 0 && cu[0] != 0) || cu[i] < (i ? cu[i - 1] : 0) || cu[i] > rows)
      return emxi_fail(EMX_ERR_INVALID, "attention: %s[%lld] is %d; it must start at 0, not fall, and stay within %lld rows",
                       name, (long long)i, cu[i], (long long)rows);
  return EMX_OK;
}
emx_status emxi_attn_check_lengths(const emxi_attn *a) {
  for (int64_t h = 0; a->alphas && h < a->heads; h++) EMX_TRY(check_alpha(a->alphas[h], a->pass, "attention: alphas"));
  if (a->cu_q) {
    EMX_TRY(check_cu(a->cu_q, a->batch, a->rows_q, "cu_seqlens_q"));
    EMX_TRY(check_cu(a->cu_k, a->batch, a->rows_k, "cu_seqlens_k"));
  }
  for (int64_t b = 0; b < a->batch; b++) {
    if (a->seqlens_q && (a->seqlens_q[b] < 0 || a->seqlens_q[b] > a->max_q))
      return emxi_fail(EMX_ERR_INVALID, "attention: seqlens_q[%lld] is %d, expected 0..%lld", (long long)b, a->seqlens_q[b],
                       (long long)a->max_q);
    if (a->seqlens_k && (a->seqlens_k[b] < 0 || a->seqlens_k[b] > a->max_k))
      return emxi_fail(EMX_ERR_INVALID, "attention: seqlens_k[%lld] is %d, expected 0..%lld", (long long)b, a->seqlens_k[b],
                       (long long)a->max_k);
    const emxi_span sp = emxi_attn_span(a, b);
    if (a->slopes && (sp.n > ((int64_t)1 << 24) || sp.s > ((int64_t)1 << 24)))
      return emxi_fail(EMX_ERR_UNSUPPORTED,
                       "attention: ALiBi positions are exact in float up to 2^24, sequence %lld has %lld keys", (long long)b,
                       (long long)sp.n);
    if (!a->block_table) continue;
    for (int64_t p = 0; p * a->page_size < a->seqlens_k[b]; p++) {
      int32_t page = a->block_table[b * a->table_stride + p];
      if (page < 0 || page >= a->pages)
        return emxi_fail(EMX_ERR_INVALID, "attention: block_table[%lld][%lld] is %d, the pool has %lld pages", (long long)b,
                         (long long)p, page, (long long)a->pages);
    }
  }
  return EMX_OK;
}

emx_status emx_attn_workspace_size(emx_ctx *ctx, const emx_attn_desc *desc, const emx_attn_io *io, int32_t pass, size_t *bytes) {
  if (!ctx) return emxi_fail(EMX_ERR_INVALID, "emx_attn_workspace_size: ctx is NULL");
  EMXI_READ_STRUCT(desc, emx_attn_desc);
  EMXI_READ_STRUCT(io, emx_attn_io);
  if (pass != EMX_PASS_FORWARD && pass != EMX_PASS_BACKWARD)
    return emxi_fail(EMX_ERR_INVALID, "emx_attn_workspace_size: unknown pass %d", pass);
  if (!bytes) return emxi_fail(EMX_ERR_INVALID, "emx_attn_workspace_size: bytes is NULL");
  emxi_attn a;
  EMX_TRY(resolve_call(ctx, desc, io, pass, true, &a));
  emxi_arena arena;
  emxi_arena_init(&arena, NULL, 0);
  EMX_TRY(ctx->backend->attn_run(ctx, &a, &arena));
  if (arena.overflow) return emxi_fail(EMX_ERR_NOMEM, "emx_attn_workspace_size: the size does not fit size_t");
  *bytes = emxi_arena_total(&arena);
  return EMX_OK;
}

static emx_status run(emx_ctx *ctx, const emx_attn_desc *desc, const emx_attn_io *io, int32_t pass, void *workspace,
                      size_t size) {
  emxi_attn a;
  EMX_TRY(resolve_call(ctx, desc, io, pass, false, &a));
  if (!workspace) return emxi_fail(EMX_ERR_WORKSPACE, "attention: workspace is NULL");
  emxi_arena arena;
  emxi_arena_init(&arena, workspace, size);
  return ctx->backend->attn_run(ctx, &a, &arena);
}
emx_status emx_attn_forward(emx_ctx *ctx, const emx_attn_desc *desc, const emx_attn_io *io, void *workspace,
                            size_t workspace_bytes) {
  if (!ctx) return emxi_fail(EMX_ERR_INVALID, "emx_attn_forward: ctx is NULL");
  EMXI_READ_STRUCT(desc, emx_attn_desc);
  EMXI_READ_STRUCT(io, emx_attn_io);
  EMXI_LOCKED(ctx, run(ctx, desc, io, EMX_PASS_FORWARD, workspace, workspace_bytes));
}
emx_status emx_attn_backward(emx_ctx *ctx, const emx_attn_desc *desc, const emx_attn_io *io, void *workspace,
                             size_t workspace_bytes) {
  if (!ctx) return emxi_fail(EMX_ERR_INVALID, "emx_attn_backward: ctx is NULL");
  EMXI_READ_STRUCT(desc, emx_attn_desc);
  EMXI_READ_STRUCT(io, emx_attn_io);
  EMXI_LOCKED(ctx, run(ctx, desc, io, EMX_PASS_BACKWARD, workspace, workspace_bytes));
}
