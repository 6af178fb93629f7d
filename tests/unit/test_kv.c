/* The paged cache: pages, sequences, copy-on-write, summaries, refusals. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>

#include "base/base.h"
#include "base/num.h"
#include "check.h"
#include "kv/kv.h"
#include "one_context.h"

static emx_kv_opts options(int32_t dtype, int32_t G, int32_t D, int32_t P, int32_t layout, int64_t pages) {
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.dtype = dtype;
  o.kv_heads = G;
  o.head_dim = D;
  o.page_size = P;
  o.layout = layout;
  o.summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS;
  o.max_seqs = 8;
  o.max_pages = pages;
  return o;
}
static emx_tensor ints(int32_t *p, int64_t n) { return emx_tensor_view(p, EMX_I32, 1, &n); }
static emx_kv_batch batch_of(const int32_t *seqs, int32_t n) {
  emx_kv_batch b;
  emx_kv_batch_init(&b);
  b.batch = n;
  b.seqs = seqs;
  return b;
}

/* K and V of "token id": any test can tell where a row in the pool came from. V is K plus one. */
static float element(uint32_t id, int32_t head, int32_t d) {
  uint32_t w[4];
  emxi_philox(7, id, (uint64_t)head * 1000 + (uint64_t)d, w);
  return (float)((int)(w[0] % 2001) - 1000) / 256.0f;
}
static void tokens(const uint32_t *ids, int32_t n, int32_t G, int32_t D, int32_t layout, float add, float *out) {
  for (int32_t t = 0; t < n; t++)
    for (int32_t g = 0; g < G; g++)
      for (int32_t d = 0; d < D; d++)
        out[layout == EMX_LAYOUT_BHND ? (g * n + t) * D + d : (t * G + g) * D + d] = element(ids[t], g, d) + add;
}
/* Appends n tokens to one sequence as f32. */
static emx_status append(emx_kv *kv, int32_t seq, const uint32_t *ids, int32_t n) {
  emx_kv_info info = {.struct_size = sizeof info};
  OK(emx_kv_get_info(kv, &info));
  const int32_t G = info.kv_heads, D = info.head_dim;
  float *k = malloc(sizeof(float) * (size_t)(n * G * D + 1)), *v = malloc(sizeof(float) * (size_t)(n * G * D + 1));
  tokens(ids, n, G, D, info.layout, 0, k);
  tokens(ids, n, G, D, info.layout, 1, v);
  int64_t shape[4] = {1, info.layout == EMX_LAYOUT_BHND ? G : n, info.layout == EMX_LAYOUT_BHND ? n : G, D};
  emx_tensor kt = emx_tensor_view(k, EMX_F32, 4, shape), vt = emx_tensor_view(v, EMX_F32, 4, shape);
  emx_kv_batch b = batch_of(&seq, 1);
  emx_status status = emx_kv_append(ctx, kv, &b, &kt, &vt, NULL);
  free(k);
  free(v);
  return status;
}
static double rounded(float x, int32_t dtype) {
  double one;
  emxi_store(&one, dtype, 0, x);
  return emxi_load(&one, dtype, 0);
}
/* The sequence holds exactly these tokens, read through its block table. */
static void holds(emx_kv *kv, int32_t seq, const uint32_t *ids, int64_t n) {
  emx_kv_info info = {.struct_size = sizeof info};
  OK(emx_kv_get_info(kv, &info));
  emx_tensor k, v;
  const int32_t *pages;
  int64_t length, n_pages;
  OK(emx_kv_pool_view(kv, &k, &v));
  OK(emx_seq_length(kv, seq, &length));
  OK(emx_seq_block_table(kv, seq, &pages, &n_pages));
  assert_int_equal(length, n);
  assert_int_equal(n_pages, (n + info.page_size - 1) / info.page_size);
  const int head = info.layout == EMX_LAYOUT_BHND ? 1 : 2, token = 3 - head;
  for (int64_t t = 0; t < n; t++)
    for (int32_t g = 0; g < info.kv_heads; g++)
      for (int32_t d = 0; d < info.head_dim; d++) {
        int64_t page = pages[t / info.page_size], in = t % info.page_size;
        double kx = emxi_load(k.data, k.dtype, page * k.stride[0] + g * k.stride[head] + in * k.stride[token] + d);
        double vx = emxi_load(v.data, v.dtype, page * v.stride[0] + g * v.stride[head] + in * v.stride[token] + d);
        float want = element(ids[t], g, d);
        if (kx != rounded(want, k.dtype) || vx != rounded(want + 1, k.dtype))
          fail_msg("token %d head %d d %d: k %g v %g, expected %g", (int)t, g, d, kx, vx, want);
      }
}

/* Summaries of a page against a float64 recomputation, and bit for bit against emx_kv_summarize. */
static void summary_is_right(emx_kv *kv, int32_t page, int32_t n) {
  emx_kv_info info = {.struct_size = sizeof info};
  OK(emx_kv_get_info(kv, &info));
  emx_tensor k, v;
  OK(emx_kv_pool_view(kv, &k, &v));
  const int head = info.layout == EMX_LAYOUT_BHND ? 1 : 2, token = 3 - head, D = info.head_dim;
  const size_t es = emx_dtype_size(info.dtype);
  char minmax[2][256 * 4];
  float moments[2][256], radius = 0;
  for (int pass = 0; pass < 2; pass++) { /* as appended, then recomputed */
    for (int32_t g = 0; g < info.kv_heads; g++) {
      emx_kv_summary s = {.struct_size = sizeof s};
      OK(emx_kv_get_summary(kv, page, g, &s));
      assert_true(s.valid && s.tokens == n && !s.nonfinite);
      double far = 0;
      for (int32_t t = 0; t < n; t++) {
        double d2 = 0;
        for (int d = 0; d < D; d++) {
          double e =
              emxi_load(k.data, k.dtype, page * k.stride[0] + g * k.stride[head] + t * k.stride[token] + d) - (double)s.mean[d];
          d2 += e * e;
        }
        far = fmax(far, sqrt(d2));
      }
      if (n == info.page_size)
        assert_true(s.radius >= far && s.radius <= far * (1 + 1e-4) + 1e-20);
      else
        assert_true(s.radius == INFINITY);
      for (int d = 0; d < D; d++) {
        double lo = INFINITY, hi = -INFINITY, sum = 0, m2 = 0;
        for (int32_t t = 0; t < n; t++) {
          double x = emxi_load(k.data, k.dtype, page * k.stride[0] + g * k.stride[head] + t * k.stride[token] + d);
          lo = fmin(lo, x);
          hi = fmax(hi, x);
          sum += x;
        }
        for (int32_t t = 0; t < n; t++) {
          double x = emxi_load(k.data, k.dtype, page * k.stride[0] + g * k.stride[head] + t * k.stride[token] + d) - sum / n;
          m2 += x * x;
        }
        assert_true(emxi_load(s.min, info.dtype, d) == lo && emxi_load(s.max, info.dtype, d) == hi);
        /* n float steps of relative error 2^-24 on numbers up to 4 */
        assert_true(fabs(s.mean[d] - sum / n) <= n * 4 * 0x1p-23 && fabs(s.m2[d] - m2) <= 1e-4 * m2 + 1e-5);
      }
      if (g == 0) {
        if (pass == 0) {
          memcpy(minmax[0], s.min, (size_t)D * es);
          memcpy(minmax[1], s.max, (size_t)D * es);
          memcpy(moments[0], s.mean, (size_t)D * sizeof(float));
          memcpy(moments[1], s.m2, (size_t)D * sizeof(float));
          radius = s.radius;
        } else {
          assert_memory_equal(minmax[0], s.min, (size_t)D * es);
          assert_memory_equal(minmax[1], s.max, (size_t)D * es);
          assert_memory_equal(moments[0], s.mean, (size_t)D * sizeof(float));
          assert_memory_equal(moments[1], s.m2, (size_t)D * sizeof(float));
          assert_true(radius == s.radius);
        }
      }
    }
    if (pass == 0) {
      const emx_tensor tp = ints(&page, 1), tn = ints(&n, 1);
      OK(emx_kv_summarize(ctx, kv, &tp, &tn));
    }
  }
}

static void test_round_trip(void **state) {
  (void)state;
  static const int32_t dtypes[] = {EMX_F32, EMX_F16, EMX_BF16}, sizes[] = {16, 32, 64}, dims[] = {16, 80, 33};
  for (int c = 0; c < 9; c++)
    for (int32_t layout = 0; layout < 2; layout++) {
      const int32_t P = sizes[c % 3];
      emx_kv_opts o = options(dtypes[c / 3], 2, dims[(c + c / 3) % 3], P, layout, 8);
      emx_kv *kv;
      int32_t seq;
      uint32_t ids[256];
      for (uint32_t i = 0; i < 256; i++) ids[i] = i;
      OK(emx_kv_create(ctx, &o, &kv));
      OK(emx_seq_create(kv, &seq));
      /* lengths around page ends: kP and kP+1 are appended one token at a time */
      int32_t at = 0, steps[] = {1, P - 2, 1, 1, P - 1, 3};
      for (size_t i = 0; i < sizeof steps / sizeof *steps; at += steps[i++]) {
        OK(append(kv, seq, ids + at, steps[i]));
        holds(kv, seq, ids, at + steps[i]);
        const int32_t *pages;
        int64_t n;
        OK(emx_seq_block_table(kv, seq, &pages, &n));
        summary_is_right(kv, pages[n - 1], at + steps[i] - (int32_t)(n - 1) * P);
        summary_is_right(kv, pages[0], at + steps[i] < P ? at + steps[i] : P);
      }
      emx_kv_destroy(kv);
    }
}

/* The source in the cache's own dtype, with strides, ragged n. */
static void test_ragged_strided(void **state) {
  (void)state;
  enum { G = 2, D = 16, T = 20 };
  emx_kv_opts o = options(EMX_BF16, G, D, 16, EMX_LAYOUT_BHND, 8);
  emx_kv *kv;
  int32_t seqs[3];
  OK(emx_kv_create(ctx, &o, &kv));
  for (int i = 0; i < 3; i++) OK(emx_seq_create(kv, &seqs[i]));
  static uint16_t k[3 * T * G * (D + 3)], v[3 * T * G * (D + 3)];
  uint32_t ids[3][T];
  for (int b = 0; b < 3; b++)
    for (int t = 0; t < T; t++) {
      ids[b][t] = (uint32_t)(b * 100 + t);
      for (int g = 0; g < G; g++)
        for (int d = 0; d < D; d++) {
          size_t at = (size_t)(((b * T + t) * G + g) * (D + 3) + d);
          k[at] = emxi_f32_to_bf16(element(ids[b][t], g, d));
          v[at] = emxi_f32_to_bf16(element(ids[b][t], g, d) + 1);
        }
    }
  emx_tensor kt = {
      .data = k, .dtype = EMX_BF16, .ndim = 4, .shape = {3, G, T, D}, .stride = {T * G * (D + 3), D + 3, G * (D + 3), 1}};
  emx_tensor vt = kt;
  vt.data = v;
  int32_t n[3] = {T, 0, 5};
  const emx_tensor tn = ints(n, 3);
  emx_kv_batch b = batch_of(seqs, 3);
  OK(emx_kv_append(ctx, kv, &b, &kt, &vt, &tn));
  for (int i = 0; i < 3; i++) holds(kv, seqs[i], ids[i], n[i]);
  n[1] = T + 1;
  fails(emx_kv_append(ctx, kv, &b, &kt, &vt, &tn), EMX_ERR_INVALID, "n[1]");
  emx_kv_destroy(kv);
}

static void test_fork_and_truncate(void **state) {
  (void)state;
  emx_kv_opts o = options(EMX_F16, 2, 16, 16, EMX_LAYOUT_BNHD, 8);
  emx_kv *kv;
  emx_kv_info info = {.struct_size = sizeof info};
  int32_t a, b;
  uint32_t ia[64], ib[64];
  for (uint32_t i = 0; i < 64; i++) ia[i] = ib[i] = i;
  OK(emx_kv_create(ctx, &o, &kv));
  OK(emx_seq_create(kv, &a));
  OK(append(kv, a, ia, 40));
  OK(emx_seq_fork(kv, a, &b));
  OK(emx_kv_get_info(kv, &info));
  assert_true(info.free_pages == 5 && info.seqs == 2);
  /* both go on differently: one copies the open page, the other then owns it */
  for (int i = 40; i < 50; i++) ia[i] = (uint32_t)(100 + i), ib[i] = (uint32_t)(200 + i);
  OK(append(kv, b, ib + 40, 10));
  OK(append(kv, a, ia + 40, 10));
  holds(kv, a, ia, 50);
  holds(kv, b, ib, 50);
  OK(emx_kv_get_info(kv, &info));
  assert_int_equal(info.free_pages, 8 - 2 - 2 - 2);
  const int32_t *pages;
  int64_t n;
  OK(emx_seq_block_table(kv, a, &pages, &n));
  summary_is_right(kv, pages[2], 16);
  OK(emx_seq_block_table(kv, b, &pages, &n));
  summary_is_right(kv, pages[2], 16);
  summary_is_right(kv, pages[3], 2);
  /* a cut into a complete page opens it again, and new tokens replace the old ones in its summaries */
  OK(emx_seq_truncate(kv, b, 37));
  emx_kv_summary s = {.struct_size = sizeof s};
  OK(emx_seq_block_table(kv, b, &pages, &n));
  OK(emx_kv_get_summary(kv, pages[2], 0, &s));
  assert_false(s.valid);
  for (int i = 37; i < 48; i++) ib[i] = (uint32_t)(300 + i);
  OK(append(kv, b, ib + 37, 11));
  holds(kv, b, ib, 48);
  summary_is_right(kv, pages[2], 16);
  /* a cut into a page that the parent still holds: the parent's tokens and summaries stay */
  OK(emx_seq_truncate(kv, b, 20));
  ib[20] = 999;
  OK(append(kv, b, ib + 20, 1));
  holds(kv, b, ib, 21);
  holds(kv, a, ia, 50);
  OK(emx_seq_block_table(kv, a, &pages, &n));
  summary_is_right(kv, pages[1], 16);
  OK(emx_seq_block_table(kv, b, &pages, &n));
  summary_is_right(kv, pages[1], 5);
  OK(emx_seq_destroy(kv, a));
  OK(emx_seq_destroy(kv, b));
  OK(emx_kv_get_info(kv, &info));
  assert_true(info.free_pages == 8 && info.seqs == 0);
  fails(emx_seq_truncate(kv, a, 0), EMX_ERR_STATE, "no sequence");
  emx_kv_destroy(kv);
}

/* Two forks of one open page in one batch: neither sees the other's tokens, and the page they shared is free afterwards. */
static void test_siblings_in_one_batch(void **state) {
  (void)state;
  emx_kv_opts o = options(EMX_F32, 1, 16, 16, EMX_LAYOUT_BHND, 3);
  emx_kv *kv;
  int32_t seqs[2];
  uint32_t ids[2][8] = {{1, 2, 3, 10}, {1, 2, 3, 20}};
  float k[2 * 16], v[2 * 16];
  OK(emx_kv_create(ctx, &o, &kv));
  OK(emx_seq_create(kv, &seqs[0]));
  OK(append(kv, seqs[0], ids[0], 3));
  OK(emx_seq_fork(kv, seqs[0], &seqs[1]));
  for (int b = 0; b < 2; b++) {
    tokens(&ids[b][3], 1, 1, 16, 0, 0, k + 16 * b);
    tokens(&ids[b][3], 1, 1, 16, 0, 1, v + 16 * b);
  }
  int64_t shape[4] = {2, 1, 1, 16};
  emx_tensor kt = emx_tensor_view(k, EMX_F32, 4, shape), vt = emx_tensor_view(v, EMX_F32, 4, shape);
  emx_kv_batch b = batch_of(seqs, 2);
  OK(emx_kv_append(ctx, kv, &b, &kt, &vt, NULL));
  holds(kv, seqs[0], ids[0], 4);
  holds(kv, seqs[1], ids[1], 4);
  emx_kv_info info = {.struct_size = sizeof info};
  OK(emx_kv_get_info(kv, &info));
  assert_int_equal(info.free_pages, 1);
  int32_t twice[2] = {seqs[0], seqs[0]};
  b.seqs = twice;
  fails(emx_kv_append(ctx, kv, &b, &kt, &vt, NULL), EMX_ERR_INVALID, "twice");
  emx_kv_destroy(kv);
}

static void test_append_is_atomic(void **state) {
  (void)state;
  emx_kv_opts o = options(EMX_BF16, 1, 16, 16, EMX_LAYOUT_BHND, 4);
  emx_kv *kv;
  int32_t a, b;
  uint32_t ids[80];
  for (uint32_t i = 0; i < 80; i++) ids[i] = i;
  OK(emx_kv_create(ctx, &o, &kv));
  OK(emx_seq_create(kv, &a));
  OK(append(kv, a, ids, 40));
  OK(emx_seq_fork(kv, a, &b));
  fails(append(kv, b, ids + 40, 9), EMX_ERR_STATE, "2 more pages are needed, 1 are free"); /* a copy and a new one */
  holds(kv, a, ids, 40);
  holds(kv, b, ids, 40);
  OK(append(kv, b, ids + 40, 8));
  holds(kv, b, ids, 48);
  /* cancelled: nothing has changed, and the summaries heal */
  emx_kv_info before = {.struct_size = sizeof before}, after = before;
  OK(emx_kv_get_info(kv, &before));
  emx_ctx_cancel(ctx);
  assert_int_equal(append(kv, a, ids + 40, 3), EMX_ERR_CANCELLED);
  emx_ctx_resume(ctx);
  OK(emx_kv_get_info(kv, &after));
  assert_memory_equal(&before, &after, sizeof before);
  holds(kv, a, ids, 40);
  OK(append(kv, a, ids + 40, 3));
  const int32_t *pages;
  int64_t n;
  OK(emx_seq_block_table(kv, a, &pages, &n));
  summary_is_right(kv, pages[2], 11);
  emx_kv_destroy(kv);
}

/* A caller's parallel_for that cancels between two tasks: what was half done is taken back. */
static emx_ctx *cancelling;
static int64_t tasks_left;
static void cancel_midway(void *user, int64_t n, emx_task_fn task, void *arg) {
  (void)user;
  for (int64_t i = 0; i < n; i++) {
    if (tasks_left-- == 0) emx_ctx_cancel(cancelling);
    task(arg, i, 0);
  }
}
static void test_cancel_midway(void **state) {
  (void)state;
  emx_ctx *keep = ctx;
  emx_ctx_opts co;
  emx_ctx_opts_init(&co);
  co.threads = 1;
  co.parallel_for = cancel_midway;
  OK(emx_ctx_create(&co, &cancelling));
  ctx = cancelling;
  for (int after = 0; after < 6; after++) { /* two copies, two writes, two sketches */
    emx_kv_opts o = options(EMX_BF16, 2, 16, 16, EMX_LAYOUT_BHND, 4);
    o.summaries |= EMX_SUMMARY_SKETCH;
    emx_kv *kv;
    int32_t a, b;
    uint32_t ids[40];
    for (uint32_t i = 0; i < 40; i++) ids[i] = i;
    tasks_left = -1;
    OK(emx_kv_create(ctx, &o, &kv));
    OK(emx_seq_create(kv, &a));
    OK(append(kv, a, ids, 10));
    OK(emx_seq_fork(kv, a, &b));
    emx_kv_info before = {.struct_size = sizeof before}, now = before;
    OK(emx_kv_get_info(kv, &before));
    tasks_left = after;
    assert_int_equal(append(kv, b, ids + 10, 20), EMX_ERR_CANCELLED);
    emx_ctx_resume(ctx);
    tasks_left = -1;
    OK(emx_kv_get_info(kv, &now));
    assert_memory_equal(&before, &now, sizeof now);
    assert_int_equal(kv->sketch.mapped, 0); /* nothing was learned from keys that are not there */
    holds(kv, a, ids, 10);
    holds(kv, b, ids, 10);
    OK(append(kv, b, ids + 10, 20));
    assert_int_equal(kv->sketch.mapped, 1);
    OK(append(kv, a, ids + 10, 2));
    holds(kv, a, ids, 12);
    holds(kv, b, ids, 30);
    const int32_t *pages;
    int64_t n;
    OK(emx_seq_block_table(kv, b, &pages, &n));
    summary_is_right(kv, pages[0], 16);
    OK(emx_seq_block_table(kv, a, &pages, &n));
    summary_is_right(kv, pages[0], 12);
    emx_kv_destroy(kv);
  }
  emx_ctx_destroy(ctx);
  ctx = keep;
}

/* A cancelled append to two holders of one page, of different lengths: neither may have been written to. A third sequence comes
 * after them, so that a cancellation can fall behind both their writes. */
static void test_cancel_two_holders(void **state) {
  (void)state;
  emx_ctx *keep = ctx;
  emx_ctx_opts co;
  emx_ctx_opts_init(&co);
  co.threads = 1;
  co.parallel_for = cancel_midway;
  OK(emx_ctx_create(&co, &cancelling));
  ctx = cancelling;
  for (int after = 0; after < 8; after++) {
    emx_kv_opts o = options(EMX_F32, 1, 16, 16, EMX_LAYOUT_BHND, 8);
    emx_kv *kv;
    int32_t seqs[3];
    uint32_t ids[40], fresh[3] = {97, 98, 99};
    for (uint32_t i = 0; i < 40; i++) ids[i] = i;
    tasks_left = -1;
    OK(emx_kv_create(ctx, &o, &kv));
    OK(emx_seq_create(kv, &seqs[0]));
    OK(append(kv, seqs[0], ids, 10));
    OK(emx_seq_fork(kv, seqs[0], &seqs[1]));
    OK(emx_seq_truncate(kv, seqs[1], 3));
    OK(emx_seq_create(kv, &seqs[2]));
    float k[3 * 16], v[3 * 16];
    for (int b = 0; b < 3; b++) {
      tokens(&fresh[b], 1, 1, 16, 0, 0, k + 16 * b);
      tokens(&fresh[b], 1, 1, 16, 0, 1, v + 16 * b);
    }
    emx_tensor kt = emx_tensor_view(k, EMX_F32, 4, (int64_t[]){3, 1, 1, 16}),
               vt = emx_tensor_view(v, EMX_F32, 4, (int64_t[]){3, 1, 1, 16});
    emx_kv_batch b = batch_of(seqs, 3);
    tasks_left = after;
    const emx_status status = emx_kv_append(ctx, kv, &b, &kt, &vt, NULL);
    emx_ctx_resume(ctx);
    if (status) {
      assert_int_equal(status, EMX_ERR_CANCELLED);
      holds(kv, seqs[0], ids, 10);
      holds(kv, seqs[1], ids, 3);
    }
    emx_kv_destroy(kv);
  }
  emx_ctx_destroy(ctx);
  ctx = keep;
}

/* K and V interleaved in one allocation of the caller's, pages in an order of its own. */
static void test_callers_pool_and_tables(void **state) {
  (void)state;
  enum { G = 2, D = 16, P = 16, M = 6 };
  static float pool[M][2][P][G][D];
  emx_kv_opts o = options(EMX_F32, G, D, P, EMX_LAYOUT_BNHD, M);
  emx_tensor kp = {.data = pool, .dtype = EMX_F32, .ndim = 4, .shape = {M, P, G, D}, .stride = {2 * P * G * D, G * D, D, 1}};
  emx_tensor vp = kp;
  vp.data = &pool[0][1];
  o.k_pool = &kp;
  o.v_pool = &vp;
  emx_kv *kv;
  OK(emx_kv_create(ctx, &o, &kv));
  int32_t table[2][3] = {{4, 1, -1}, {0, 5, 2}}, lens[2] = {15, 31}, n[2] = {3, 3};
  float k[2 * 3 * G * D], v[2 * 3 * G * D];
  uint32_t ids[6] = {1, 2, 3, 4, 5, 6};
  for (int b = 0; b < 2; b++) {
    tokens(ids + 3 * b, 3, G, D, EMX_LAYOUT_BNHD, 0, k + b * 3 * G * D);
    tokens(ids + 3 * b, 3, G, D, EMX_LAYOUT_BNHD, 1, v + b * 3 * G * D);
  }
  int64_t shape[4] = {2, 3, G, D};
  emx_tensor kt = emx_tensor_view(k, EMX_F32, 4, shape), vt = emx_tensor_view(v, EMX_F32, 4, shape);
  emx_kv_batch b;
  emx_kv_batch_init(&b);
  b.batch = 2;
  const emx_tensor tt = emx_tensor_view(table, EMX_I32, 2, (int64_t[]){2, 3}), tl = ints(lens, 2), tn = ints(n, 2);
  b.block_table = &tt;
  b.seq_lens = &tl;
  OK(emx_kv_append(ctx, kv, &b, &kt, &vt, &tn));
  for (int g = 0; g < G; g++)
    for (int d = 0; d < D; d++) {
      assert_true(pool[4][0][15][g][d] == element(1, g, d) && pool[4][1][15][g][d] == element(1, g, d) + 1);
      assert_true(pool[1][0][0][g][d] == element(2, g, d) && pool[1][1][1][g][d] == element(3, g, d) + 1);
      assert_true(pool[5][0][15][g][d] == element(4, g, d) && pool[2][1][0][g][d] == element(5, g, d) + 1);
      assert_true(pool[2][0][1][g][d] == element(6, g, d) && pool[3][0][0][g][d] == 0 && pool[2][0][2][g][d] == 0);
    }
  summary_is_right(kv, 4, 16);
  summary_is_right(kv, 2, 2);
  /* everything is range-checked before anything is touched */
  lens[0] = 30; /* three more tokens reach a third page, which is absent */
  fails(emx_kv_append(ctx, kv, &b, &kt, &vt, &tn), EMX_ERR_INVALID, "block_table[0][2] is -1");
  table[0][2] = M;
  fails(emx_kv_append(ctx, kv, &b, &kt, &vt, &tn), EMX_ERR_INVALID, "the pool has 6 pages");
  table[0][2] = 2;
  fails(emx_kv_append(ctx, kv, &b, &kt, &vt, &tn), EMX_ERR_INVALID, "two places write to page 2");
  lens[0] = 46;
  fails(emx_kv_append(ctx, kv, &b, &kt, &vt, &tn), EMX_ERR_SHAPE, "3 columns");
  lens[0] = 29;
  table[0][2] = -1;
  b.max_len = 31;
  fails(emx_kv_append(ctx, kv, &b, &kt, &vt, &tn), EMX_ERR_INVALID, "max_len is 31");
  b.max_len = 0;
  lens[0] = -1;
  fails(emx_kv_append(ctx, kv, &b, &kt, &vt, &tn), EMX_ERR_INVALID, "seq_lens[0]");
  int32_t bad[2] = {3, 3};
  const emx_tensor tb = ints(bad, 2);
  fails(emx_kv_summarize(ctx, kv, &tb, NULL), EMX_ERR_INVALID, "twice");
  bad[1] = -1;
  fails(emx_kv_summarize(ctx, kv, &tb, NULL), EMX_ERR_INVALID, "pages[1]");
  emx_kv_destroy(kv);
  kp.stride[0] = P * G * D - 1;
  fails(emx_kv_create(ctx, &o, &kv), EMX_ERR_SHAPE, "overlap");
  kp.stride[0] = 2 * P * G * D;
  kp.shape[1] = 32;
  fails(emx_kv_create(ctx, &o, &kv), EMX_ERR_SHAPE, "k_pool");
}

static void test_nonfinite_mark(void **state) {
  (void)state;
  for (int kind = 0; kind < 3; kind++) {
    emx_kv_opts o = options(EMX_F16, 2, 16, 16, EMX_LAYOUT_BHND, 2);
    emx_kv *kv;
    int32_t seq;
    OK(emx_kv_create(ctx, &o, &kv));
    OK(emx_seq_create(kv, &seq));
    float k[2 * 16] = {0}, v[2 * 16] = {0};
    k[16 + 3] = kind == 0 ? NAN : kind == 1 ? -INFINITY : 70000; /* which rounds to infinity in f16 */
    v[0] = NAN;                                                  /* V does not count */
    int64_t shape[4] = {1, 2, 1, 16};
    emx_tensor kt = emx_tensor_view(k, EMX_F32, 4, shape), vt = emx_tensor_view(v, EMX_F32, 4, shape);
    emx_kv_batch b = batch_of(&seq, 1);
    OK(emx_kv_append(ctx, kv, &b, &kt, &vt, NULL));
    k[16 + 3] = 0;
    OK(emx_kv_append(ctx, kv, &b, &kt, &vt, NULL));
    const int32_t *pages;
    int64_t n;
    OK(emx_seq_block_table(kv, seq, &pages, &n));
    for (int g = 0; g < 2; g++) {
      emx_kv_summary s = {.struct_size = sizeof s};
      OK(emx_kv_get_summary(kv, pages[0], g, &s));
      assert_int_equal(s.nonfinite, g);
    }
    /* the page is used again by finite tokens: the mark is gone */
    OK(emx_seq_truncate(kv, seq, 0));
    OK(emx_kv_append(ctx, kv, &b, &kt, &vt, NULL));
    OK(emx_seq_block_table(kv, seq, &pages, &n));
    summary_is_right(kv, pages[0], 1);
    emx_kv_destroy(kv);
  }
}

static void test_refusals(void **state) {
  (void)state;
  emx_kv *kv = (emx_kv *)&ctx;
  size_t bytes = 42;
  emx_kv_opts o = options(EMX_BF16, 2, 64, 16, EMX_LAYOUT_BHND, 4);
  size_t host;
  OK(emx_kv_memory_size(ctx, &o, &bytes, &host));
  bytes += host;
  /* pool, min and max, moments with the radius in whole lines, plus small tables */
  size_t least = 4 * 2 * (2 * 16 * 64 * 2 + 2 * 64 * 2 + 144 * 4);
  assert_true(bytes >= least && bytes < least + 4096);
  emx_kv_opts bad = o;
  bad.max_pages = INT32_MAX;
  bad.kv_heads = INT32_MAX;
  fails(emx_kv_create(ctx, &bad, &kv), EMX_ERR_NOMEM, "address space");
  bad = o;
  bad.max_pages = (int64_t)1 << 30;
  fails(emx_kv_create(ctx, &bad, &kv), EMX_ERR_NOMEM, "bytes are needed");
  assert_ptr_equal(kv, &ctx);
  bad = o, bad.dtype = EMX_F64;
  fails(emx_kv_create(ctx, &bad, &kv), EMX_ERR_DTYPE, "f64");
  bad = o, bad.dtype = EMX_Q8;
  fails(emx_kv_create(ctx, &bad, &kv), EMX_ERR_DTYPE, "q8");
  bad = o, bad.head_dim = 8;
  fails(emx_kv_create(ctx, &bad, &kv), EMX_ERR_UNSUPPORTED, "head_dim");
  bad = o, bad.page_size = 24;
  fails(emx_kv_create(ctx, &bad, &kv), EMX_ERR_UNSUPPORTED, "page_size");
  bad = o, bad.layout = 2;
  fails(emx_kv_create(ctx, &bad, &kv), EMX_ERR_INVALID, "layout");
  bad = o, bad.summaries = 16;
  fails(emx_kv_create(ctx, &bad, &kv), EMX_ERR_INVALID, "summaries");
  bad = o, bad.max_pages = 0;
  fails(emx_kv_create(ctx, &bad, &kv), EMX_ERR_INVALID, "max_pages");
  bad = o, bad.struct_size = 4;
  fails(emx_kv_create(ctx, &bad, &kv), EMX_ERR_INVALID, "struct_size");
  for (int n = 0;; n++) { /* every allocation fails in turn */
    emxi_alloc_fail_after(n);
    emx_status status = emx_kv_create(ctx, &o, &kv);
    emxi_alloc_fail_after(-1);
    if (!status) break;
    assert_int_equal(status, EMX_ERR_NOMEM);
    assert_true(n < 10);
  }
  emx_ctx *other;
  OK(emx_ctx_create(NULL, &other));
  emx_kv_batch b = batch_of(NULL, 0);
  fails(emx_kv_append(other, kv, &b, NULL, NULL, NULL), EMX_ERR_INVALID, "another context");
  emx_ctx_destroy(other);
  int32_t seq = 3;
  b = batch_of(&seq, 1);
  float x[128] = {0};
  int64_t shape[4] = {1, 2, 1, 64}, wrong[4] = {1, 1, 2, 64};
  emx_tensor t = emx_tensor_view(x, EMX_F32, 4, shape), u = emx_tensor_view(x, EMX_F32, 4, wrong);
  fails(emx_kv_append(ctx, kv, &b, &t, &t, NULL), EMX_ERR_STATE, "no sequence 3");
  OK(emx_seq_create(kv, &seq));
  fails(emx_kv_append(ctx, kv, &b, &u, &u, NULL), EMX_ERR_SHAPE, "k_new");
  u = t, u.dtype = EMX_F16;
  fails(emx_kv_append(ctx, kv, &b, &u, &u, NULL), EMX_ERR_DTYPE, "f16");
  fails(emx_kv_append(ctx, kv, &b, &t, &u, NULL), EMX_ERR_DTYPE, "v_new");
  for (int i = 1; i < 8; i++) OK(emx_seq_create(kv, &seq));
  seq = 77;
  fails(emx_seq_create(kv, &seq), EMX_ERR_STATE, "max_seqs");
  fails(emx_seq_fork(kv, 0, &seq), EMX_ERR_STATE, "max_seqs");
  assert_int_equal(seq, 77);
  fails(emx_seq_truncate(kv, 0, 1), EMX_ERR_INVALID, "0 tokens");
  emx_kv_summary s = {.struct_size = sizeof s};
  fails(emx_kv_get_summary(kv, 4, 0, &s), EMX_ERR_INVALID, "page 4");
  emx_kv_destroy(kv);
  emx_kv_destroy(NULL);
}

/* Where K and V lie is a GPU's question; here both answers are the same memory. */
static void test_memory_kinds(void **state) {
  (void)state;
  emx_kv_opts o = options(EMX_BF16, 2, 64, 16, EMX_LAYOUT_BHND, 8);
  size_t bytes[2], host[2];
  OK(emx_kv_memory_size(ctx, &o, &bytes[0], &host[0]));
  o.kv_memory = EMX_KV_MEMORY_HOST;
  OK(emx_kv_memory_size(ctx, &o, &bytes[1], &host[1]));
  assert_true(bytes[0] == bytes[1] && host[0] == host[1]);
  emx_kv *kv = NULL;
  OK(emx_kv_create(ctx, &o, &kv));
  emx_tensor k, v;
  OK(emx_kv_pool_view(kv, &k, &v));
  emx_kv *none = NULL;
  o.k_pool = &k;
  o.v_pool = &v;
  fails(emx_kv_create(ctx, &o, &none), EMX_ERR_INVALID, "kv_memory");
  o.k_pool = o.v_pool = NULL;
  o.kv_memory = 2;
  fails(emx_kv_create(ctx, &o, &none), EMX_ERR_INVALID, "kv_memory 2");
  assert_null(none);
  emx_kv_destroy(kv);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_memory_kinds),
      cmocka_unit_test(test_round_trip),
      cmocka_unit_test(test_ragged_strided),
      cmocka_unit_test(test_fork_and_truncate),
      cmocka_unit_test(test_siblings_in_one_batch),
      cmocka_unit_test(test_append_is_atomic),
      cmocka_unit_test(test_cancel_midway),
      cmocka_unit_test(test_cancel_two_holders),
      cmocka_unit_test(test_callers_pool_and_tables),
      cmocka_unit_test(test_nonfinite_mark),
      cmocka_unit_test(test_refusals),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
