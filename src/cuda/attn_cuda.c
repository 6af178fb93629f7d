/* SPDX-License-Identifier: Apache-2.0
 * Dense attention on a GPU: how a call is cut into slices of heads whose lists fit the workspace, and where that lies. All of it depends on
 * shapes alone; no call waits, allocates or reads device memory, so it can be captured in a graph. */
#include "cuda/attn_args.h"
#include "cuda/backend_cuda.h"

#define SLICE_BYTES ((int64_t)640 << 20) /* of lists, if there is more than one KV head of a sequence */
#define COUNTS ((int64_t)1 << 24)        /* entries of the table that sorts nonzeros by key */
#define ACTIVE_WORDS 4096                /* at most, of a tile of queries */
#define ACTIVE ((int64_t)1 << 24)        /* words of all of them */

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t at_least_one(int64_t x) { return x < 1 ? 1 : x; }

static emxi_cuda_mat mat_of(const emxi_mat *m) {
  const int64_t per = m->dtype == EMX_F32 ? 4 : 8;
  return (emxi_cuda_mat){
      .data = m->data,
      .batch = m->batch,
      .head = m->head,
      .row = m->row,
      .dtype = m->dtype,
      .vectors = (uintptr_t)m->data % 16 == 0 && m->batch % per == 0 && m->head % per == 0 && m->row % per == 0};
}

emx_status emxi_cuda_attn_supports(emx_ctx *ctx, const emxi_attn *a) {
  (void)ctx;
  const char *who = a->pass == EMX_PASS_BACKWARD ? "emx_attn_backward" : "emx_attn_forward";
  if (a->k.dtype == EMX_F64) return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: a GPU has f32, f16 and bf16; f64 runs on the CPU", who);
  if (!a->alphas && a->alpha > 2)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: alpha is %g; a GPU has 1 <= alpha <= 2, the CPU up to 4", who, a->alpha);
  return EMX_OK;
}

emx_status emxi_cuda_attn_fault(const emxi_cuda_fault *f, const char *who) {
  static const char *const names[] = {"seqlens_q", "seqlens_k", "cu_seqlens_q", "cu_seqlens_k"};
  if (f->column == EMXI_CUDA_ATTN_ALPHA)
    return emxi_fail(EMX_ERR_INVALID,
                     "%s: an earlier attention call met an alpha of head %d out of range, expected 1 or 1.000001 to 2", who,
                     f->row);
  if (f->column == EMXI_CUDA_ATTN_FAR)
    return emxi_fail(EMX_ERR_UNSUPPORTED,
                     "%s: an earlier attention call met sequence %d of %d keys; ALiBi positions are exact in float up to 2^24",
                     who, f->row, f->value);
  if (f->column == EMXI_CUDA_ATTN_PAGE)
    return emxi_fail(EMX_ERR_INVALID,
                     "%s: an earlier attention call met page %d in row %d of block_table, which is no page of the pool", who,
                     f->value, f->row);
  return emxi_fail(EMX_ERR_INVALID,
                   "%s: an earlier attention call met %s[%d] = %d; it must not be negative, fall, or exceed the tensor", who,
                   names[f->column & 3], f->row, f->value);
}

/* Heads and sequences of a slice. */
static void cut(const emxi_attn *a, int64_t row_bytes, int32_t *nb, int32_t *ng) {
  const int64_t group = a->heads / a->kv_heads, most = at_least_one(SLICE_BYTES / at_least_one(row_bytes)),
                of_head = at_least_one(group * (a->cu_q ? a->rows_q : a->max_q)), of_sequence = of_head * a->kv_heads;
  int64_t b = a->cu_q ? a->batch : 1, g = a->kv_heads;
  if (of_sequence > most)
    g = at_least_one(most / of_head);
  else if (!a->cu_q)
    b = at_least_one(most / of_sequence);
  *nb = (int32_t)(b > a->batch ? a->batch : b);
  *ng = (int32_t)(g > a->kv_heads ? a->kv_heads : g);
}

emx_status emxi_cuda_attn_run(emx_ctx *ctx, const emxi_attn *a, emxi_arena *arena) {
  const bool backward = a->pass == EMX_PASS_BACKWARD, lists = a->alphas || a->alpha != 1.0, packed = a->cu_q != NULL;
  const char *who = backward ? "emx_attn_backward" : "emx_attn_forward";
  emxi_cuda_attn k = {.q = mat_of(&a->q),
                      .k = mat_of(&a->k),
                      .v = mat_of(&a->v),
                      .o = mat_of(&a->o),
                      .tau = mat_of(&a->tau),
                      .support = mat_of(&a->support),
                      .d_o = mat_of(&a->d_o),
                      .d_q = mat_of(&a->d_q),
                      .d_k = mat_of(&a->d_k),
                      .d_v = mat_of(&a->d_v),
                      .index = mat_of(&a->index),
                      .list = a->list,
                      .backward = backward,
                      .packed = packed,
                      .alpha = a->alpha,
                      .alphas = a->alphas,
                      .d_alpha = a->d_alpha,
                      .scale = (float)a->scale,
                      .slopes = a->slopes,
                      .left = a->left,
                      .right = a->right,
                      .batch = (int32_t)a->batch,
                      .heads = (int32_t)a->heads,
                      .kv_heads = (int32_t)a->kv_heads,
                      .group = (int32_t)(a->heads / a->kv_heads),
                      .d = (int32_t)a->d,
                      .max_q = a->max_q,
                      .max_k = a->max_k,
                      .rows_q = a->rows_q,
                      .rows_k = a->rows_k,
                      .seqlens_q = a->seqlens_q,
                      .seqlens_k = a->seqlens_k,
                      .cu_q = a->cu_q,
                      .cu_k = a->cu_k,
                      .block_table = a->block_table,
                      .table_stride = a->table_stride,
                      .table_width = a->table_width,
                      .pages = a->pages,
                      .page_size = (int32_t)a->page_size,
                      .fault = emxi_cuda_of(ctx)->fault,
                      .claimed = emxi_cuda_of(ctx)->claimed};
  const int64_t entry = !lists ? 0 : backward ? 4 + (int64_t)sizeof *k.weight + 8 : 8, cap = lists ? EMXI_CUDA_ATTN_CAP : 0;
  int32_t nb, ng;
  if (a->batch >= INT32_MAX || a->heads >= INT32_MAX)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: too many sequences or heads", who);
  cut(a, entry * EMXI_CUDA_ATTN_CAP, &nb, &ng);
  k.q_tiles = packed ? a->rows_q / EMXI_CUDA_ATTN_TILE + a->batch : ceil_div(a->max_q, EMXI_CUDA_ATTN_TILE);
  k.k_tiles = packed ? a->rows_k / EMXI_CUDA_ATTN_TILE + a->batch : ceil_div(a->max_k, EMXI_CUDA_ATTN_TILE);
  k.q_blocks = packed ? a->rows_q / EMXI_CUDA_ATTN_BLOCK + a->batch : ceil_div(a->max_q, EMXI_CUDA_ATTN_BLOCK);
  k.unit_rows = k.group * (packed ? a->rows_q : a->max_q);
  const int64_t units = packed ? ng : (int64_t)nb * ng, tiles = k.group * k.q_tiles;
  k.rows = units * k.unit_rows;
  if (k.unit_rows > INT32_MAX / EMXI_CUDA_ATTN_CAP || units * tiles > INT32_MAX || units * k.k_tiles * 8 > INT32_MAX)
    return emxi_fail(EMX_ERR_UNSUPPORTED,
                     "%s: %lld queries of %d heads that read one KV head are too many for one call; at most %d", who,
                     (long long)(packed ? a->rows_q : a->max_q), k.group, INT32_MAX / EMXI_CUDA_ATTN_CAP);
  k.span = emxi_arena_take(arena, a->batch, sizeof *k.span);
  k.n_list = emxi_arena_take(arena, k.rows, sizeof *k.n_list);
  k.at = emxi_arena_take(arena, k.rows, sizeof *k.at);
  k.dense = emxi_arena_take(arena, units * tiles, sizeof *k.dense);
  k.odd = emxi_arena_take(arena, units, sizeof *k.odd);
  k.norms = emxi_arena_take(arena, a->slopes ? units * k.k_tiles : 0, sizeof *k.norms);
  k.longest = emxi_arena_take(arena, a->slopes ? units * (packed ? a->batch : 1) : 0, sizeof *k.longest);
  if (!a->slopes) k.norms = NULL;
  if (!backward) {
    k.entry = emxi_arena_take(arena, k.rows * cap, sizeof *k.entry);
    k.pos = (int32_t *)k.entry;
    k.z = k.entry ? (float *)(k.pos + k.rows * cap) : NULL;
    k.bound = emxi_arena_take(arena, k.rows, sizeof *k.bound);
  } else {
    k.pos = emxi_arena_take(arena, k.rows * cap, sizeof *k.pos);
    const int64_t key_tiles = units * k.k_tiles;
    for (k.block_rows = 1; key_tiles * ceil_div(tiles, k.block_rows) > COUNTS && k.block_rows < tiles;) k.block_rows *= 2;
    k.blocks = at_least_one(ceil_div(tiles, k.block_rows));
    k.todo = emxi_arena_take(arena, k.rows, sizeof *k.todo);
    k.weight = emxi_arena_take(arena, k.rows * cap, sizeof *k.weight);
    k.row = emxi_arena_take(arena, k.rows, sizeof *k.row);
    k.share = emxi_arena_take(arena, a->d_alpha ? k.rows : 0, sizeof *k.share);
    for (k.active_words = 1; k.active_words < ceil_div(ceil_div(k.k_tiles, (int64_t)1 << k.active_shift), 32);)
      if (k.active_words < ACTIVE_WORDS && units * tiles * k.active_words <= ACTIVE / 2)
        k.active_words *= 2;
      else
        k.active_shift++;
    k.mode = emxi_arena_take(arena, units * tiles, sizeof *k.mode);
    k.active = emxi_arena_take(arena, units * tiles * k.active_words, sizeof *k.active);
    k.edge = emxi_arena_take(arena, units * tiles * EMXI_CUDA_ATTN_TILE, sizeof *k.edge);
    k.counts = emxi_arena_take(arena, key_tiles * k.blocks, sizeof *k.counts);
    k.tile_start = emxi_arena_take(arena, key_tiles + units, sizeof *k.tile_start);
    k.key_start = emxi_arena_take(arena, key_tiles * EMXI_CUDA_ATTN_TILE + units, sizeof *k.key_start);
    k.by_tile = emxi_arena_take(arena, k.rows * cap, sizeof *k.by_tile);
    k.by_key = emxi_arena_take(arena, k.rows * cap, sizeof *k.by_key);
    k.dk = emxi_arena_take(arena, key_tiles * EMXI_CUDA_ATTN_TILE * a->d, sizeof *k.dk);
    k.dv = emxi_arena_take(arena, key_tiles * EMXI_CUDA_ATTN_TILE * a->d, sizeof *k.dv);
    k.has_dense = emxi_arena_take(arena, key_tiles, sizeof *k.has_dense);
  }
  if (!arena->base) return EMX_OK;
  EMX_TRY(emxi_arena_check(arena, "attention"));
  if (emxi_cancelled(ctx)) return emxi_fail(EMX_ERR_CANCELLED, "%s: cancelled", who);
  if (!a->batch) return EMX_OK;
  int before;
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  emxi_cuda_attn_prepare(&k, ctx->stream);
  const int32_t type = a->k.dtype;
  const bool own = a->q.dtype == type && (!backward || a->d_o.dtype == type);
  for (k.b0 = 0; k.b0 < k.batch; k.b0 += nb)
    for (k.g0 = 0; k.g0 < k.kv_heads; k.g0 += ng) {
      k.nb = k.batch - k.b0 < nb ? k.batch - k.b0 : nb;
      k.ng = k.kv_heads - k.g0 < ng ? k.kv_heads - k.g0 : ng;
      (own && type == EMX_F16    ? emxi_cuda_attn_f16
       : own && type == EMX_BF16 ? emxi_cuda_attn_bf16
                                 : emxi_cuda_attn_f32)(&k, ctx->stream);
    }
  return emxi_cuda_leave(before, EMX_OK, true, who);
}
