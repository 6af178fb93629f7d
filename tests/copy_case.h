/* A sequence goes from a cache of f32 through one of another context, page size and layout, and comes back: what arrives must be
 * what an append of the same numbers makes, K, V, tables and summaries. After cmocka.h. */
#ifndef COPY_CASE_H
#define COPY_CASE_H

#include "base/num.h"
#include "cache_help.h"
#include "check.h"
#include "kv/kv.h"

typedef struct copy_case {
  int32_t G, D, dtype; /* of the caches behind the first */
  int64_t n;
  int32_t P[3], layout[3];
  const char *file; /* of the last cache, or NULL */
} copy_case;

static emx_kv *copy_cache(emx_ctx *ctx, const copy_case *c, int i, int32_t dtype, int32_t summaries, int64_t spare) {
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.dtype = dtype;
  o.kv_heads = c->G;
  o.head_dim = c->D;
  o.page_size = c->P[i];
  o.layout = c->layout[i];
  o.summaries = summaries;
  o.max_seqs = 3;
  o.max_pages = (c->n + c->P[i] - 1) / c->P[i] + spare;
  if (o.max_pages < 1) o.max_pages = 1;
  if (i == 2) o.file = c->file;
  emx_kv *kv = NULL;
  OK(emx_kv_create(ctx, &o, &kv));
  return kv;
}
static int32_t copy_fill(emx_ctx *ctx, emx_kv *kv, const copy_case *c) {
  int32_t seq;
  OK(emx_seq_create(kv, &seq));
  if (!c->n) return seq;
  const size_t count = (size_t)(c->n * c->G * c->D);
  float *rows = malloc(2 * count * sizeof *rows);
  for (size_t i = 0; i < 2 * count; i++) {
    uint32_t w[4];
    emxi_philox(11, i, 0, w);
    rows[i] = (float)(int32_t)w[0] / 1e9f;
  }
  const int64_t bhnd[4] = {1, c->G, c->n, c->D}, bnhd[4] = {1, c->n, c->G, c->D};
  const bool heads_first = kv->layout == EMX_LAYOUT_BHND;
  emx_tensor k = emx_tensor_view(rows, EMX_F32, 4, heads_first ? bhnd : bnhd),
             v = emx_tensor_view(rows + count, EMX_F32, 4, heads_first ? bhnd : bnhd);
  if (!heads_first) { /* the same numbers */
    const int64_t stride[4] = {c->n * c->G * c->D, c->D, c->n * c->D, 1};
    memcpy(k.stride, stride, sizeof stride);
    memcpy(v.stride, stride, sizeof stride);
  }
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &seq;
  OK(emx_kv_append(ctx, kv, &batch, &k, &v, NULL));
  free(rows);
  return seq;
}
/* `other`: the context in the middle, with these summaries. */
static void copy_there_and_back(emx_ctx *cpu_ctx, emx_ctx *other, const copy_case *c, int32_t summaries) {
  const int32_t kinds = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS;
  emx_kv *first = copy_cache(cpu_ctx, c, 0, EMX_F32, 0, 0), *middle = copy_cache(other, c, 1, c->dtype, summaries, 2),
         *last = copy_cache(cpu_ctx, c, 2, c->dtype, c->file ? 0 : kinds, 0);
  const int32_t seq = copy_fill(cpu_ctx, first, c);
  int32_t there = -1, back = -1, again = -1;
  OK(emx_seq_copy(first, seq, middle, &there));
  OK(emx_seq_destroy(first, seq)); /* nothing is shared */
  OK(emx_seq_copy(middle, there, last, &back));
  if (c->file) { /* files are compared by what comes out of them */
    emx_kv *memory = copy_cache(cpu_ctx, c, 0, c->dtype, kinds, 0);
    OK(emx_seq_copy(last, back, memory, &again));
    emx_kv_destroy(last);
    last = memory;
  }
  copy_case plain = *c;
  plain.file = NULL;
  emx_kv *want = copy_cache(cpu_ctx, &plain, c->file ? 0 : 2, c->dtype, kinds, 0);
  copy_fill(cpu_ctx, want, c);
  if (!fingerprint_same(fingerprint_of(last), fingerprint_of(want)))
    fail_msg("%s, G %d, D %d, n %d: the copy differs from an append", emx_dtype_name(c->dtype), c->G, c->D, (int)c->n);
  /* a target without room, and one of another shape, stay as they were */
  if (c->n) {
    const fingerprint before = fingerprint_of(last);
    fails(emx_seq_copy(middle, there, last, &again), EMX_ERR_STATE, "pages");
    copy_case wide = plain;
    wide.D = c->D == 64 ? 80 : 64;
    emx_kv *odd = copy_cache(cpu_ctx, &wide, 0, c->dtype, 0, 0);
    fails(emx_seq_copy(middle, there, odd, &again), EMX_ERR_SHAPE, "numbers");
    emx_kv_destroy(odd);
    if (c->dtype != EMX_F32) {
      emx_kv *narrow = copy_cache(cpu_ctx, &plain, 0, c->dtype == EMX_F16 ? EMX_BF16 : EMX_F16, 0, 0);
      fails(emx_seq_copy(last, 0, narrow, &again), EMX_ERR_DTYPE, "into a cache of");
      emx_kv_destroy(narrow);
    }
    assert_true(fingerprint_same(before, fingerprint_of(last)));
  }
  fails(emx_seq_copy(middle, 2, last, &again), EMX_ERR_STATE, "no sequence");
  emx_kv_destroy(first);
  emx_kv_destroy(middle);
  emx_kv_destroy(last);
  emx_kv_destroy(want);
}

static const copy_case COPY_CASES[] = {
    {1, 64, EMX_BF16, 0, {16, 16, 16}, {0, 0, 0}, NULL},
    {2, 64, EMX_F16, 1, {16, 32, 16}, {0, 1, 0}, NULL},
    {2, 80, EMX_BF16, 15, {16, 16, 64}, {1, 0, 1}, NULL},
    {1, 128, EMX_F16, 16, {32, 16, 16}, {0, 1, 1}, NULL},
    {3, 16, EMX_F32, 65, {64, 16, 32}, {0, 0, 0}, NULL},
    {2, 256, EMX_BF16, 5001, {16, 64, 16}, {1, 0, 0}, NULL}, /* several turns of the staging memory */
};

#endif
