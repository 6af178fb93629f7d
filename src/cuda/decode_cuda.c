/* SPDX-License-Identifier: Apache-2.0
 * How a decode is cut up for the device, and where its workspace lies. Everything that kernels decide by lies in device memory or is a
 * kernel argument; the cut depends on shapes and max_len only, so a captured graph stays right while lengths grow up to max_len. */
#include "cuda/backend_cuda.h"
#include "entmax/solve.h"
#include "kv/gaussian.h"

static int64_t at_least_one(int64_t x) { return x < 1 ? 1 : x; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Sixteen-byte reads of a row need every address to be a multiple of it. The stride of a single KV head or page means nothing. */
static bool rows_are_aligned(const emx_kv *kv) {
  const int64_t es = (int64_t)emx_dtype_size(kv->dtype), heads = kv->G > 1, pages = kv->max_pages > 1;
  return (uintptr_t)kv->k % 16 == 0 && (uintptr_t)kv->v % 16 == 0 && pages * kv->k_page * es % 16 == 0 &&
         heads * kv->k_head * es % 16 == 0 && kv->k_token * es % 16 == 0 && pages * kv->v_page * es % 16 == 0 &&
         heads * kv->v_head * es % 16 == 0 && kv->v_token * es % 16 == 0;
}

/* Cached tokens times head dimension below which CERTIFIED takes ALL's path. A variable for the tests alone. */
int64_t emxi_cuda_certified_short = (int64_t)6 << 20;
/* So it does where all KV heads of a launch have less than so many times this: five launches one after the other cost what ALL needs
 * for some 60 million elements of K, twice as many where several rows share a KV head. Sketches are 64 dimensions wide at least, and
 * kernels are made for 64 and 128, so at others less is saved. */
static int64_t certified_least(const emxi_cuda_decode *k) {
  const bool made_for = k->vectors && k->pool.dtype != EMX_F32 && (k->pool.D == 64 || k->pool.D == 128);
  return emxi_cuda_certified_short * (!made_for ? 32 : k->group * k->S > 1 ? 20 : 10);
}

emx_status emxi_cuda_decode_run(emx_ctx *ctx, const emxi_decode *d, emxi_arena *arena) {
  static const char who[] = "emx_decode";
  const emx_kv *kv = d->kv;
  const emx_select_desc *select = &d->select;
  const bool softmax = d->per_head || d->alpha == 1.0, entmax = d->per_head || d->alpha != 1.0,
             certified = select->kind == EMX_SELECT_CERTIFIED, sparse = select->kind != EMX_SELECT_ALL && !certified,
             lists = sparse || d->select_only;
  const int32_t slice = d->B < EMXI_CUDA_SLICE ? d->B : EMXI_CUDA_SLICE, group = d->H / kv->G;
  const int64_t rows = (int64_t)slice * d->H * d->S, per_head = (int64_t)group * d->S;
  emxi_cuda_decode k = {.pool = emxi_cuda_pool_of(kv),
                        .H = d->H,
                        .S = d->S,
                        .group = group,
                        .vectors = rows_are_aligned(kv),
                        .q_dtype = d->q_dtype,
                        .o_dtype = d->o_dtype,
                        .shared = emxi_cuda_of(ctx)->shared,
                        .overlap = emxi_cuda_of(ctx)->overlap,
                        .alpha = d->alpha,
                        .alphas = d->alphas,
                        .power = d->alpha > 1 ? 1.0 / (d->alpha - 1.0) : 0,
                        .power_kind = d->alpha > 1 ? emxi_power_kind(1.0 / (d->alpha - 1.0)) : 0,
                        .scale = d->scale,
                        .slopes = d->slopes,
                        .report_stride = d->report_stride,
                        .chunks = at_least_one(ceil_div(d->max_len, 4 * EMXI_CUDA_CHUNK)) * 4, /* read four at a time */
                        .kind = select->kind,
                        .select_only = d->select_only,
                        .sparse = sparse,
                        .bounds = d->reports || d->bound,
                        .box = select->kind == EMX_SELECT_TOPK || (select->kind == EMX_SELECT_PAGES && kv->minmax),
                        .tau_mode = select->tau_mode,
                        .tau_steps = select->tau_steps,
                        .pages = at_least_one(ceil_div(d->max_len, kv->P)),
                        .budget = at_least_one(select->budget / kv->P),
                        .safety_margin = select->safety_margin,
                        .excess_margin = select->excess_margin};
  if (select->kind == EMX_SELECT_GAUSSIAN) k.page_z = (float)emxi_gauss_max_quantile((double)select->max_quantile, kv->P);
  if (certified && d->select_only)
    return emxi_fail(EMX_ERR_UNSUPPORTED,
                     "emx_select: on a GPU this version has no page lists of CERTIFIED; emx_decode takes it");
  /* Below, ALL reads the keys as fast: on the device, and all of them. Of alphas in device memory `seed` decides. */
  const bool whole = !kv->pinned_block && !(select->max_bytes > 0 || select->max_delta > 0);
  const bool ladder = certified && d->max_len * kv->D >= emxi_cuda_certified_short &&
                      !(whole && slice * d->max_len * kv->G * kv->D < certified_least(&k)) &&
                      (d->per_head || (d->alpha == 1 && select->max_delta > 0) ||
                       (d->alpha >= EMXI_CUDA_CERT_ALPHA_LEAST && d->alpha <= EMXI_CUDA_CERT_ALPHA_MOST));
  const bool limited = ladder && (select->max_bytes > 0 || select->max_delta > 0), scores = entmax || limited;
  const bool fast = k.vectors && kv->dtype != EMX_F32 && (kv->D == 32 || kv->D == 64 || kv->D == 128);
  k.rows = fast && per_head == 1 ? 1 : 4;
  if (ladder && k.rows > 4) k.rows = 4; /* its kernels take one row or four at a time */
  const int64_t blocks = ceil_div(per_head, k.rows), items = at_least_one(sparse ? rows : slice * kv->G * blocks);
  /* Two blocks fit a multiprocessor. One sequence: all parts run at once. Several may have unequal lengths: twice as many parts, handed
   * out as blocks become free. */
  const int64_t target = (int64_t)emxi_cuda_of(ctx)->processors * (slice > 1 ? 4 : 2), most = ceil_div(k.chunks, 8);
  /* Selectors leave few weights, and `certify` starts the sooner for fewer blocks of `share`. */
  int64_t splits = at_least_one(target / items), shares = at_least_one((sparse ? target / 2 : target) / at_least_one(rows));
  splits = splits > most ? most : splits;
  shares = shares > most ? most : shares;
  k.judge_heads = k.box ? 1 : 8; /* eight warps a block */
  while (kv->G % k.judge_heads) k.judge_heads /= 2;
  const int64_t judges = at_least_one(slice * kv->G / k.judge_heads * ceil_div(group, group == 1 ? 1 : 4)),
                few = ceil_div(k.pages, 256 / k.judge_heads);
  int64_t page_splits = at_least_one((int64_t)emxi_cuda_of(ctx)->processors * 2 / judges);
  page_splits = page_splits > few ? few : page_splits;
  k.page_splits = (int32_t)page_splits;
  /* Blocks of 512 threads, one a multiprocessor. Each finds the threshold: with slopes that is a long way over all pages. */
  int64_t picks = at_least_one((int64_t)emxi_cuda_of(ctx)->processors / at_least_one(rows));
  picks = picks > EMXI_CUDA_PICKS ? EMXI_CUDA_PICKS : picks;
  picks = picks > at_least_one(k.pages / 1024) ? at_least_one(k.pages / 1024) : picks;
  k.picks = d->slopes ? 1 : (int32_t)picks;
  if (items * splits > INT32_MAX || rows * shares > INT32_MAX || judges * page_splits > INT32_MAX)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: %d query heads of %d tokens in %d sequences are too many for one call", who, d->H,
                     d->S, d->B);
  if (d->reports && ((uintptr_t)d->reports % 8 || d->report_stride % 8))
    return emxi_fail(EMX_ERR_INVALID, "%s: on a GPU reports and report_stride must be multiples of 8", who);
  k.blocks = (int32_t)blocks;
  k.splits = (int32_t)splits;
  k.shares = (int32_t)shares;
  const int64_t solvers = emxi_cuda_of(ctx)->processors / at_least_one(rows);
  k.parts = solvers < 1 ? 1 : solvers > EMXI_CUDA_PARTS ? EMXI_CUDA_PARTS : (int32_t)solvers;

  int64_t cells; /* chunks of all rows */
  if (__builtin_mul_overflow(rows, k.chunks, &cells)) cells = -1;
  if (cells > INT64_MAX / EMXI_CUDA_CHUNK) cells = -1;
  const int64_t list = !scores || d->select_only ? 0 : cells, segments = list < 0 ? -1 : list * EMXI_CUDA_CHUNK,
                parts = d->select_only ? 0 : rows * splits, merged = softmax ? parts : 0, solved = scores ? parts : 0;
  k.z = emxi_arena_take(arena, segments, sizeof *k.z);
  k.local = emxi_arena_take(arena, segments, sizeof *k.local);
  k.count = emxi_arena_take(arena, list, sizeof *k.count);
  k.chunk_max = emxi_arena_take(arena, list, sizeof *k.chunk_max);
  k.bad = emxi_arena_take(arena, parts, sizeof *k.bad);
  /* Keys of long sequences come by bulk copies of 16 tokens that are neighbours; the parts of the scan tell each other the largest
   * score, for a part's own leaves ten times the candidates that all of a million independent tokens would, and take what chunks are
   * left. Worth a kernel that makes this ready. */
  if (k.overlap && fast && kv->k_token == kv->D && select->kind == EMX_SELECT_ALL && entmax && !d->select_only &&
      k.chunks >= 48 * splits)
    k.told = emxi_arena_take(arena, rows, sizeof *k.told);
  k.wide = emxi_arena_take(arena, d->select_only ? 0 : rows, sizeof *k.wide);
  k.share = emxi_arena_take(arena, solved ? rows * shares * kv->D : 0, sizeof *k.share);
  /* Room for 32K scores of a row with many (flat:0.05 leaves 10,000 at 64K to 1M tokens), but for no more than there are. */
  const int64_t solve_warps = (int64_t)k.parts * (EMXI_CUDA_SOLVE_THREADS / 32), packs = solved ? rows * solve_warps : 0,
                room = ceil_div(k.chunks, solve_warps) * EMXI_CUDA_CHUNK,
                wanted = k.parts > 4 ? 512 : 32768 / solve_warps / 32 * 32;
  k.packed = (int32_t)(room < wanted ? room : wanted);
  k.packed_z = emxi_arena_take(arena, packs * k.packed, sizeof *k.packed_z);
  k.packed_at = emxi_arena_take(arena, packs * k.packed, sizeof *k.packed_at);
  k.packed_n = emxi_arena_take(arena, packs, sizeof *k.packed_n);
  k.points = emxi_arena_take(arena, solved ? rows * k.parts * 2 * EMXI_CUDA_POINTS : 0, sizeof *k.points);
  k.part_o = emxi_arena_take(arena, merged * kv->D, sizeof *k.part_o);
  k.part_m = emxi_arena_take(arena, merged, sizeof *k.part_m);
  k.part_z = emxi_arena_take(arena, merged, sizeof *k.part_z);
  k.part_n = emxi_arena_take(arena, merged, sizeof *k.part_n);
  int64_t listed = 0;
  if (sparse && __builtin_mul_overflow(rows, k.pages, &listed)) listed = -1;
  const int64_t gauss = select->kind == EMX_SELECT_GAUSSIAN ? listed : 0, judged = sparse && kv->tails ? rows * page_splits : 0;
  k.upper = emxi_arena_take(arena, sparse && kv->tails ? listed : 0, sizeof *k.upper);
  k.mu = emxi_arena_take(arena, gauss, sizeof *k.mu);
  k.sigma = emxi_arena_take(arena, gauss, sizeof *k.sigma);
  k.sizes = emxi_arena_take(arena, judged, sizeof *k.sizes);
  k.stats = emxi_arena_take(arena, gauss ? judged * 4 : 0, sizeof *k.stats);
  k.chosen = emxi_arena_take(arena, listed < 0 ? -1 : sparse ? rows * ceil_div(k.pages, 32) : 0, sizeof *k.chosen);
  k.list = emxi_arena_take(arena, listed, sizeof *k.list);
  k.place = emxi_arena_take(arena, listed, sizeof *k.place);
  k.n_list = emxi_arena_take(arena, sparse ? rows : 0, sizeof *k.n_list);
  k.choice = emxi_arena_take(arena, sparse ? rows : 0, sizeof *k.choice);
  k.judged = emxi_arena_take(arena, judged ? rows : 0, sizeof *k.judged);
  k.bins = emxi_arena_take(arena, judged ? rows : 0, EMXI_CUDA_BINS * sizeof *k.bins);
  if (ladder) {
    const int64_t cut = items * splits;
    k.cert_groups = at_least_one(ceil_div(d->max_len, EMXI_CUDA_GROUP));
    k.cert = emxi_arena_take(arena, rows, sizeof *k.cert);
    k.cert_query = emxi_arena_take(arena, rows, sizeof *k.cert_query);
    k.cert_words = emxi_arena_take(arena, rows, sizeof *k.cert_words);
    k.cert_upper = emxi_arena_take(arena, __builtin_mul_overflow(rows, k.cert_groups, &cells) ? -1 : cells, sizeof *k.cert_upper);
    k.cert_best = emxi_arena_take(arena, parts * 2, sizeof *k.cert_best);
    k.cert_bins = emxi_arena_take(arena, rows, EMXI_CUDA_BINS * sizeof *k.cert_bins);
    k.cert_size = emxi_arena_take(arena, cut, sizeof *k.cert_size);
    k.cert_flat = emxi_arena_take(arena, items, sizeof *k.cert_flat);
    if (limited) {
      k.split_max = emxi_arena_take(arena, parts, sizeof *k.split_max);
      k.max_bytes = select->max_bytes;
      k.max_delta = select->max_delta;
      k.cert_bound = emxi_arena_take(arena, segments, sizeof *k.cert_bound);
      k.cert_local = emxi_arena_take(arena, segments, sizeof *k.cert_local);
      k.cert_count = emxi_arena_take(arena, list, sizeof *k.cert_count);
      k.cert_limit = emxi_arena_take(arena, rows, sizeof *k.cert_limit);
    }
  }
  if (!arena->base) return EMX_OK;
  EMX_TRY(emxi_arena_check(arena, who));
  if (!rows) return EMX_OK;
  if (emxi_cancelled(ctx)) return emxi_fail(EMX_ERR_CANCELLED, "%s: cancelled", who);

  int before;
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  emx_status status = emxi_cuda_update_tables(ctx, kv, d->batch, who);
  const int64_t q_size = (int64_t)emx_dtype_size(d->q_dtype), o_size = (int64_t)emx_dtype_size(d->o_dtype);
  for (int32_t b = 0; b < d->B && !status; b += slice) {
    k.batch = emxi_cuda_batch_of(kv, d->batch, b, d->B - b < slice ? d->B - b : slice);
    k.batch.added = d->batch->seqs ? 0 : d->added;
    k.q = d->q + b * d->q_stride[0] * q_size;
    k.o = d->o + b * d->o_stride[0] * o_size;
    for (int i = 0; i < 3; i++) k.q_stride[i] = d->q_stride[i], k.o_stride[i] = d->o_stride[i];
    k.reports = d->reports ? d->reports + (int64_t)b * d->H * d->S * d->report_stride : NULL;
    if (lists) {
      for (int i = 0; i < 3; i++) {
        k.io_pages_stride[i] = d->pages_stride[i];
        k.io_n_stride[i] = d->n_pages_stride[i];
        k.io_bound_stride[i] = d->bound_stride[i];
      }
      k.io_width = d->pages_width;
      k.io_pages = d->pages ? d->pages + b * d->pages_stride[0] : NULL;
      k.io_n = d->n_pages ? d->n_pages + b * d->n_pages_stride[0] : NULL;
      k.io_bound = d->bound ? d->bound + b * d->bound_stride[0] : NULL;
      emxi_cuda_select(&k, ctx->stream);
      if (d->select_only) continue;
    }
    (kv->dtype == EMX_F32   ? emxi_cuda_decode_f32
     : kv->dtype == EMX_F16 ? emxi_cuda_decode_f16
                            : emxi_cuda_decode_bf16)(&k, ctx->stream);
    if (sparse && k.reports) emxi_cuda_certify(&k, ctx->stream);
    if (ladder && k.reports && !k.alphas && k.alpha == 1.0) emxi_cuda_account(&k, ctx->stream); /* else share does it */
  }
  return emxi_cuda_leave(before, status, true, who);
}
