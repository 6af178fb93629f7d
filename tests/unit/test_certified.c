/* SPDX-License-Identifier: Apache-2.0
 * Key sketches and CERTIFIED: kernels against the reference, rebuilds, foreign block tables, limits, threads, refusals.
 * Certificates by the thousand are in test_certificates.c. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <string.h>

#include "check.h"
#include "cpu/certified.h"
#include "decode_case.h"

static emx_ctx *ctx;
static int setup(void **state) {
  (void)state;
  emxi_certified_short = 64;
  return emx_ctx_create(NULL, &ctx);
}
static int teardown(void **state) {
  (void)state;
  emx_ctx_destroy(ctx);
  return 0;
}

/* ---- kernels */

enum { MAX_DP = 256, WORDS = MAX_DP * 4 };
typedef struct sketch {
  emxi_sketch_group group;
  uint8_t centre[MAX_DP], row[16 * MAX_DP / 2], super[MAX_DP / 2];
  uint32_t high[MAX_DP], low[MAX_DP];
  emxi_sketch_super record;
} sketch;

static void encode(const emxi_sketch_kernels *k, const float *keys, int d, int dp, const float *map, sketch *s) {
  memset(s, 0, sizeof *s);
  const emxi_sketch_out out = {.group = &s->group, .centre = s->centre, .high = s->high, .low = s->low, .row = s->row};
  k->encode_group(keys, d, dp, map, &out);
  k->encode_super(keys, d, dp, map, s->super, &s->record);
}

/* What the codes say about key t, and whether the stored bounds hold, in double. */
static void check_sketch(const sketch *s, const float *keys, int d, int dp, const float *map) {
  if (!(s->group.radius < INFINITY)) return;
  for (int t = 0; t < 16; t++) {
    double r0 = 0, r2 = 0, r4 = 0, r5 = 0, k2 = 0, c2 = 0;
    for (int i = 0; i < d; i++) {
      const double y = ((double)keys[t * 256 + i] - (double)map[i]) / (double)map[dp + i];
      const double c = s->group.step_c > 0 ? ((double)s->centre[i] - 128) * (double)s->group.step_c : 0;
      const int shift = 8 * (i % 4) + 2 * (i / 4 % 4), word = i / 16 * 16 + t;
      const double h = s->high[word] >> shift & 3, l = s->low[word] >> shift & 3;
      const uint8_t pair = s->row[t * dp / 2 + i % (dp / 2)];
      const double m = i < dp / 2 ? pair & 15 : pair >> 4;
      const double e4 = y - c - (4 * h + l - 7.5) * (double)s->group.step;
      r0 += (y - c) * (y - c);
      r2 += pow(y - c - (4 * h - 6) * (double)s->group.step, 2);
      r4 += e4 * e4;
      r5 += pow(e4 - (m - 7.5) * (double)s->group.step5, 2);
      k2 += (double)keys[t * 256 + i] * (double)keys[t * 256 + i];
      c2 += c * c;
    }
    const uint32_t norm_k = (uint32_t)s->group.norm_k << 16, norm_c = (uint32_t)s->group.norm_c << 16;
    float fk, fc;
    memcpy(&fk, &norm_k, 4);
    memcpy(&fc, &norm_c, 4);
    assert_true((double)s->group.radius >= sqrt(r0) && (double)s->group.error2 >= sqrt(r2) &&
                (double)s->group.error4 >= sqrt(r4));
    assert_true((double)s->group.error5 >= sqrt(r5) && (double)fk >= sqrt(k2) && (double)fc >= sqrt(c2));
  }
  if (!(s->record.radius < INFINITY)) return;
  for (int t = 0; t < 64; t++) {
    double r = 0;
    for (int i = 0; i < d; i++) {
      const uint8_t pair = s->super[i % (dp / 2)];
      const double y = ((double)keys[t * 256 + i] - (double)map[i]) / (double)map[dp + i], n = i < dp / 2 ? pair & 15 : pair >> 4;
      r += pow(y - (n - 7.5) * (double)s->record.step_c, 2);
    }
    assert_true((double)s->record.radius >= sqrt(r));
  }
}

static void test_kernels(void **state) {
  (void)state;
  static const int dims[] = {16, 20, 64, 80, 96, 128, 256};
  static float keys[64 * 256], map[3 * 256];
  static int8_t q[16 * 256];
  for (int i = 0; i < 42; i++) {
    const int d = dims[i % 7], dp = (d + 15) / 16 * 16, kind = i / 7;
    memset(keys, 0, sizeof keys);
    for (int t = 0; t < 64; t++) {
      emxi_normals(3, (uint64_t)(i * 100 + t), keys + t * 256, d);
      for (int x = 0; x < d; x++) {
        float *k = &keys[t * 256 + x];
        if (kind == 1) *k = 0.5f + 0.01f * *k;
        if (kind == 2) *k *= x % 9 == 2 ? 80 : 1e-3f;
        if (kind == 3) *k = t % 16 ? 1e-40f : 3e37f * *k; /* subnormal, and near the end of the range */
        if (kind == 4) *k = (float)(x % 3);
        if (kind == 5 && t == 3 && x == 7) *k = NAN;
      }
    }
    for (int x = 0; x < dp; x++)
      map[x] = x < d ? 0.1f * (float)(x % 3) : 0, map[dp + x] = ldexpf(1, x % 5 - 2), map[2 * dp + x] = 1 / map[dp + x];
    for (int x = 0; x < 16 * 256; x++)
      q[x] = (int8_t)(x % 256 < d ? x * 2654435761u >> 24 == 128 ? 0 : (int)(x * 2654435761u >> 24) - 128 : 0);
    for (int x = 0; x < 16 * 256; x++) q[x] = q[x] == -128 ? -127 : q[x];
    static sketch want;
    encode(&emxi_sketch_scalar, keys, d, dp, map, &want);
    if (kind == 5) assert_true(want.group.radius == INFINITY && want.record.radius == INFINITY);
    check_sketch(&want, keys, d, dp, map);
    const emxi_table *table;
    for (int a = 0; (table = emxi_table_available(a)); a++) {
      const emxi_sketch_kernels *k = emxi_sketch_choose(table);
      static sketch got;
      encode(k, keys, d, dp, map, &got);
      assert_memory_equal(&got, &want, sizeof got);
      const uint8_t *codes[5] = {want.row, want.row + dp / 2, want.super, want.row + dp, want.row + 3 * dp / 2};
      const uint8_t *bytes[5] = {want.centre, (uint8_t *)want.high, (uint8_t *)want.low, want.row, want.centre};
      int32_t x[2][16 * 8];
      for (int n = 1; n <= 5; n += 2) {
        emxi_sketch_scalar.nibbles(q, 3, codes, n, dp, x[0], 8), k->nibbles(q, 3, codes, n, dp, x[1], 8);
        for (int h = 0; h < 3; h++) assert_memory_equal(x[0] + h * 8, x[1] + h * 8, sizeof(int32_t) * (size_t)n);
        emxi_sketch_scalar.bytes(q, 16, bytes, n, dp, x[0], 8), k->bytes(q, 16, bytes, n, dp, x[1], 8);
        for (int h = 0; h < 16; h++) assert_memory_equal(x[0] + h * 8, x[1] + h * 8, sizeof(int32_t) * (size_t)n);
      }
      static emxi_sketch_row rows[8];
      for (int nq = 1; nq <= 8; nq++) {
        int32_t dot[2][8 * 16], limit[8 * EMXI_SKETCH_BLOCK];
        uint16_t hot[2][8];
        float up[2][8][64];
        int32_t pos[2][8][64];
        emxi_sketch_sink sink[2][8];
        for (int h = 0; h < nq; h++) {
          limit[h * EMXI_SKETCH_BLOCK + 5] = (h - 3) * 1000;
          rows[h].limit[5] = h == 2 ? INT32_MAX : (h - 4) * 4000;
          rows[h].hot[5] = h == 2 ? INT32_MAX : (h - 2) * 4000;
          rows[h].base[5] = (float)h, rows[h].scale[5] = 1e-3f, rows[h].zero = h * 77;
          for (int w = 0; w < 2; w++) sink[w][h] = (emxi_sketch_sink){up[w][h], pos[w][h], h % 3};
        }
        assert_int_equal(emxi_sketch_scalar.high(q, nq, want.high, dp, limit + 5), k->high(q, nq, want.high, dp, limit + 5));
        const bool any = emxi_sketch_scalar.both(q, nq, want.high, want.low, dp, rows, 5, 160, sink[0], dot[0], hot[0]);
        assert_int_equal(any, k->both(q, nq, want.high, want.low, dp, rows, 5, 160, sink[1], dot[1], hot[1]));
        assert_memory_equal(dot[0], dot[1], sizeof(int32_t) * 16 * (size_t)nq);
        assert_memory_equal(hot[0], hot[1], sizeof(uint16_t) * (size_t)nq);
        for (int h = 0; h < nq; h++) {
          const int64_t from = h % 3, n = sink[0][h].n;
          assert_int_equal(n, sink[1][h].n);
          assert_memory_equal(up[0][h] + from, up[1][h] + from, sizeof(float) * (size_t)(n - from));
          assert_memory_equal(pos[0][h] + from, pos[1][h] + from, sizeof(int32_t) * (size_t)(n - from));
        }
      }
    }
  }
}

/* ---- sketches in the cache */

static void rebuild(emx_kv *kv, const int32_t *pages, int64_t n) {
  const emx_tensor t = emx_tensor_view((void *)(uintptr_t)pages, EMX_I32, 1, &n);
  CASE_OK(emx_kv_summarize(ctx, kv, &t, NULL));
}

/* Made by appending in pieces, and made again from K: the same bits; and the same certificates afterwards. */
static void test_rebuild(void **state) {
  (void)state;
  for (int i = 0; i < 9; i++) {
    decode_case c = {.G = 2,
                     .H = 4,
                     .D = i % 2 ? 80 : 64,
                     .P = 16 << i % 3,
                     .dtype = i / 3 == 0   ? EMX_F32
                              : i / 3 == 1 ? EMX_F16
                                           : EMX_BF16,
                     .len = {1500},
                     .summaries = EMX_SUMMARY_SKETCH | EMX_SUMMARY_RESIDUAL,
                     .data = i % 2 ? DATA_OUTLIER : DATA_AR,
                     .seed = (uint64_t)i};
    case_open(&c, ctx);
    const int32_t *pages;
    int64_t n;
    CASE_OK(emx_seq_block_table(c.kv, c.seqs[0], &pages, &n));
    n = 1500 / c.P;
    const emxi_sketch *s = &c.kv->sketch;
    const size_t size = (size_t)(c.kv->bytes_summary);
    char *before = case_take(size), *at = (char *)s->group;
    memcpy(before, at, size - (size_t)(at - (char *)c.kv->marks)); /* sketches end the summaries */
    rebuild(c.kv, pages, n);
    assert_memory_equal(before, at, size - (size_t)(at - (char *)c.kv->marks));
    for (int64_t p = EMXI_SUPER / c.P - 1; p < n; p += EMXI_SUPER / c.P)
      assert_true(emxi_sketch_super_valid(c.kv, pages + p + 1 - EMXI_SUPER / c.P));
    emx_select_desc certified = case_desc(EMX_SELECT_CERTIFIED, 0);
    CASE_OK(case_decode(&c, &certified));
    for (int h = 0; h < 4; h++) assert_int_equal(c.reports[h].flags, EMX_REPORT_CERTIFIED);
    /* a page whose number has changed: its superpage is not believed */
    rebuild(c.kv, pages + 2, 1);
    assert_int_equal(emxi_sketch_super_valid(c.kv, pages + 2 / (EMXI_SUPER / c.P) * (EMXI_SUPER / c.P)), c.P == 64);
    free(before);
    case_close(&c);
  }
}

static void all_and_certified(decode_case *c, float *all, float *got) {
  emx_select_desc s = case_desc(EMX_SELECT_ALL, 0);
  const size_t bytes = sizeof(float) * (size_t)(c->B * c->H * c->D);
  CASE_OK(case_decode(c, &s));
  memcpy(all, c->o_data, bytes);
  s.kind = EMX_SELECT_CERTIFIED;
  CASE_OK(case_decode(c, &s));
  memcpy(got, c->o_data, bytes);
}

/* The caller's tables: pages in another order than they were written in, superpages of nobody. */
static void test_foreign_tables(void **state) {
  (void)state;
  for (int i = 0; i < 6; i++) {
    decode_case c = {.H = 3,
                     .D = 64,
                     .P = 16 << i % 3,
                     .dtype = EMX_BF16,
                     .len = {2048},
                     .summaries = EMX_SUMMARY_SKETCH,
                     .data = i % 2 ? DATA_TOPIC : DATA_IID,
                     .seed = (uint64_t)i,
                     .scale = .4f};
    float all[3 * 64], got[3 * 64];
    case_open(&c, ctx);
    const int32_t *pages;
    int64_t n, one = 1;
    CASE_OK(emx_seq_block_table(c.kv, c.seqs[0], &pages, &n));
    int32_t table[128], length = 2048 - 7;
    for (int64_t p = 0; p < n; p++) table[p] = pages[(p * 5 + 3) % n];
    int64_t shape[2] = {1, n};
    const emx_tensor tt = emx_tensor_view(table, EMX_I32, 2, shape), tl = emx_tensor_view(&length, EMX_I32, 1, &one);
    c.batch.seqs = NULL;
    c.batch.block_table = &tt;
    c.batch.seq_lens = &tl;
    all_and_certified(&c, all, got);
    assert_memory_equal(all, got, sizeof all);
    assert_true(c.reports[0].flags == EMX_REPORT_CERTIFIED && c.reports[0].path == EMX_PATH_LADDER);
    case_close(&c);
  }
}

/* ---- limits: T1, T4 and the report's claims. Values are unit vectors, so that half the L1 distance of two outputs is at most
 * the total variation of their weights, which T4 says is the dropped mass. */
static void test_limits(void **state) {
  (void)state;
  int stopped[4] = {0};
  for (int i = 0; i < 40; i++) {
    static const double alphas[] = {1.5, 2, 1.25, 4. / 3, 1.75, 3};
    decode_case c = {.G = 1,
                     .H = 2,
                     .D = 32,
                     .P = 16 << i % 3,
                     .dtype = EMX_BF16,
                     .len = {1200 + 300 * (i % 5)},
                     .alpha = alphas[i % 6],
                     .summaries = EMX_SUMMARY_SKETCH | (i % 2 ? EMX_SUMMARY_RESIDUAL : 0),
                     .alibi = i % 4 == 3,
                     .seed = (uint64_t)i,
                     .data = (int[]){DATA_IID, DATA_AR, DATA_TOPIC, DATA_OUTLIER}[i / 6 % 4]};
    case_open(&c, ctx);
    emx_tensor k, v;
    CASE_OK(emx_kv_pool_view(c.kv, &k, &v));
    for (int64_t j = 0; j < v.shape[0] * v.shape[2]; j++)
      for (int d = 0; d < 32; d++) ((uint16_t *)v.data)[j * 32 + d] = emxi_f32_to_bf16(d == j % 32);
    emx_select_desc s = case_desc(EMX_SELECT_ALL, 0);
    CASE_OK(case_decode(&c, &s));
    float dense[64], tau[2];
    memcpy(dense, c.o_data, sizeof dense);
    for (int h = 0; h < 2; h++) tau[h] = c.reports[h].tau;
    for (int limit = 0; limit < 6; limit++) {
      s = case_desc(EMX_SELECT_CERTIFIED, 0);
      s.max_bytes = limit < 3 ? (int64_t[]){1, 40000, 120000}[limit] : 0;
      s.max_delta = limit >= 3 ? (double[]){0.5, 0.05, 1e-3}[limit - 3] : 0;
      CASE_OK(case_decode(&c, &s));
      for (int h = 0; h < 2; h++) {
        const emx_report *r = &c.reports[h];
        const double far = 1e-4 + (c.alpha > 2 ? 2e-2 : 0);
        double tv = 0;
        for (int d = 0; d < 32; d++) tv += 0.5 * fabs(case_out(&c, 0, h, 0, d) - (double)dense[h * 32 + d]);
        stopped[r->stopped_by]++;
        assert_true(tv <= (double)r->delta_bound + far);
        assert_true(r->delta_bound >= 0 && r->delta_bound <= 1 && fabs((double)r->mass - 1) < 1e-4);
        assert_true(r->tau <= tau[h] + 1e-4f * (1 + fabsf(tau[h])));
        assert_true(((r->flags & EMX_REPORT_CERTIFIED) != 0) == (r->delta_bound == 0));
        if (r->stopped_by == EMX_STOP_DONE) assert_true(r->flags & EMX_REPORT_CERTIFIED && tv == 0);
        if (r->stopped_by == EMX_STOP_DELTA) assert_true((double)r->delta_bound <= s.max_delta * (1 + 1e-6));
        if (r->stopped_by == EMX_STOP_DELTA) assert_true(s.max_delta > 0);
        if (r->stopped_by == EMX_STOP_BYTES)
          assert_true(s.max_bytes > 0 && r->bytes_k + r->bytes_v + r->bytes_meta >= s.max_bytes);
        if (s.max_delta > 0) assert_true((double)r->delta_bound <= s.max_delta * (1 + 1e-6));
      }
    }
    case_close(&c);
  }
  assert_true(stopped[EMX_STOP_DONE] > 20 && stopped[EMX_STOP_BYTES] > 20 && stopped[EMX_STOP_DELTA] > 20);
}

/* A limit is used: a row that it stops has read as much as it allows, and no more than three blocks of groups beyond it. */
static void test_limit_used(void **state) {
  (void)state;
  decode_case c = {.G = 1,
                   .H = 1,
                   .D = 128,
                   .P = 16,
                   .dtype = EMX_BF16,
                   .len = {65536},
                   .data = DATA_AR,
                   .seed = 3,
                   .summaries = EMX_SUMMARY_SKETCH};
  case_open(&c, ctx);
  emx_select_desc s = case_desc(EMX_SELECT_CERTIFIED, 0);
  CASE_OK(case_decode(&c, &s));
  const emx_report all = c.reports[0];
  assert_int_equal(all.path, EMX_PATH_LADDER);
  for (int i = 5; i < 9; i++) {
    s.max_bytes = (all.bytes_k + all.bytes_meta) * i / 10;
    CASE_OK(case_decode(&c, &s));
    const emx_report *r = &c.reports[0];
    assert_int_equal(r->stopped_by, EMX_STOP_BYTES);
    const int64_t over = r->bytes_k + r->bytes_v + r->bytes_meta - s.max_bytes;
    assert_true(over >= 0 && over <= (int64_t)3 * 64 * (32 + 128 + 2 * 512 + 256));
  }
  case_close(&c);
}

/* ---- one result whatever the threads and the instruction set */
static void test_same(void **state) {
  (void)state;
  static const char *const isas[] = {NULL, "avx512", "avx2", "scalar"};
  emx_report first[12] = {{0}};
  float out[12 * 64];
  bool have = false;
  for (int w = 0; w < 4; w++)
    for (int threads = 1; threads <= 3; threads += 2) {
      emx_ctx *other;
      emx_ctx_opts o;
      emx_ctx_opts_init(&o);
      o.threads = threads;
      if (isas[w]) setenv("EMX_ISA", isas[w], 1);
      const emx_status status = emx_ctx_create(&o, &other);
      if (isas[w]) unsetenv("EMX_ISA");
      if (status) continue; /* not on this CPU */
      decode_case c = {.B = 2,
                       .G = 2,
                       .H = 6,
                       .D = 64,
                       .P = 32,
                       .dtype = EMX_F16,
                       .len = {4000, 1111},
                       .data = DATA_AR,
                       .seed = 4,
                       .summaries = EMX_SUMMARY_SKETCH | EMX_SUMMARY_RESIDUAL};
      case_open(&c, other);
      emx_select_desc s = case_desc(EMX_SELECT_CERTIFIED, 0);
      CASE_OK(case_decode(&c, &s));
      for (int r = 0; r < 12; r++) {
        const emx_report *x = &c.reports[r];
        assert_int_equal(x->flags, EMX_REPORT_CERTIFIED);
        if (have) assert_true(x->support == first[r].support && x->path == first[r].path && x->stopped_by == first[r].stopped_by);
        if (have && threads == 3) assert_memory_equal(x, &first[r], sizeof *x); /* the same table as the round before */
        if (have && threads == 3) assert_memory_equal((float *)c.o_data + r * 64, out + r * 64, 64 * sizeof(float));
        first[r] = *x;
      }
      memcpy(out, c.o_data, sizeof out);
      have = true;
      case_close(&c);
      emx_ctx_destroy(other);
    }
}

/* Bounds beyond the floats: keys in sketches whose weights fit other keys, and a query that leans on the channel with the large
 * weight. Sums of codes overflow while scores do not; a bound that is inf - inf must not rule a key out. */
static void test_far_bounds(void **state) {
  (void)state;
  enum { D = 16, N = 4096 };
  static float k[N * D], v[N * D], o[2][D], q[D];
  for (int i = 0; i < 12; i++) {
    emx_kv_opts opts;
    emx_kv_opts_init(&opts);
    opts.dtype = i % 2 ? EMX_BF16 : EMX_F32, opts.kv_heads = 1, opts.head_dim = D, opts.max_pages = N / 16 + 2, opts.max_seqs = 2;
    opts.summaries = EMX_SUMMARY_SKETCH | (i % 4 < 2 ? EMX_SUMMARY_RESIDUAL : 0);
    emx_kv *kv;
    int32_t seq;
    CASE_OK(emx_kv_create(ctx, &opts, &kv));
    CASE_OK(emx_seq_create(kv, &seq));
    emx_kv_batch one;
    emx_kv_batch_init(&one);
    one.batch = 1, one.seqs = &seq;
    /* the keys that weights are learned from */
    emxi_normals(7, (uint64_t)i, k, 16 * D);
    for (int t = 0; t < 16; t++) k[t * D] *= 0x1p20f;
    int64_t shape[4] = {1, 1, 16, D};
    emx_tensor tk = emx_tensor_view(k, EMX_F32, 4, shape), tv = emx_tensor_view(k, EMX_F32, 4, shape);
    CASE_OK(emx_kv_append(ctx, kv, &one, &tk, &tv, NULL));
    CASE_OK(emx_seq_truncate(kv, seq, 0));
    /* and others: far out in channel 1, which the query does not look at */
    const int found = 64 * (3 + 5 * i) + 17;
    for (int j = 0; j < N; j++)
      for (int d = 0; d < D; d++) {
        k[j * D + d] = d == 0 ? -1e15f : d == 1 ? (j % 2 ? 3e13f : 1e13f) : 0;
        v[j * D + d] = (float)(j % 7);
      }
    k[found * D] = -5e13f;
    memset(q, 0, sizeof q);
    q[0] = 6e20f;
    shape[2] = N;
    tk = emx_tensor_view(k, EMX_F32, 4, shape), tv = emx_tensor_view(v, EMX_F32, 4, shape);
    CASE_OK(emx_kv_append(ctx, kv, &one, &tk, &tv, NULL));
    emx_report reports[2];
    for (int way = 0; way < 2; way++) {
      emx_decode_io io;
      emx_decode_io_init(&io);
      io.scale = 1;
      int64_t qs[4] = {1, 1, 1, D};
      const emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, qs), to = emx_tensor_view(o[way], EMX_F32, 4, qs);
      io.q = &tq, io.o = &to, io.reports = &reports[way];
      const emx_select_desc s = case_desc(way ? EMX_SELECT_CERTIFIED : EMX_SELECT_ALL, 0);
      size_t bytes;
      CASE_OK(emx_decode_workspace_size(ctx, kv, &s, &io, N, &bytes));
      void *work = case_take(bytes);
      CASE_OK(emx_decode(ctx, kv, &one, &s, &io, work, bytes));
      free(work);
    }
    assert_true(reports[1].flags == EMX_REPORT_CERTIFIED && reports[1].support == reports[0].support);
    assert_memory_equal(o[0], o[1], sizeof o[0]);
    emx_kv_destroy(kv);
  }
}

/* Slopes whose bias leaves the floats: ALL calls such a row NaN, and so must a path that would not have read those keys. */
static void test_steep_slopes(void **state) {
  (void)state;
  static const float steep[] = {1e30f, 1e34f, -1e34f, 1e35f, 3e38f, -3e38f};
  float all[2 * 16], got[2 * 16];
  for (int i = 0; i < 6; i++) {
    decode_case c = {.B = 1,
                     .G = 1,
                     .H = 2,
                     .D = 16,
                     .P = 16,
                     .dtype = EMX_F32,
                     .len = {5000},
                     .data = DATA_IID,
                     .seed = 9,
                     .alibi = true,
                     .summaries = EMX_SUMMARY_SKETCH};
    case_open(&c, ctx);
    c.slopes[0] = steep[i], c.slopes[1] = 0.25f;
    emx_report reports[2];
    for (int way = 0; way < 2; way++) {
      const emx_select_desc s = case_desc(way ? EMX_SELECT_CERTIFIED : EMX_SELECT_ALL, 0);
      CASE_OK(case_decode(&c, &s));
      memcpy(way ? got : all, c.o_data, sizeof got);
      reports[way] = c.reports[0];
    }
    assert_int_equal(reports[0].flags, reports[1].flags);
    for (int x = 0; x < 2 * 16; x++) assert_true(isnan(all[x]) ? isnan(got[x]) : all[x] == got[x]);
    case_close(&c);
  }
}

/* One unread key that takes all the mass, where its power leaves the doubles: 4.6 to the power 1000. */
static void test_far_powers(void **state) {
  (void)state;
  static const double alphas[] = {1.001, 1 + 1e-6, 1.04, 1.6};
  const emxi_table *table;
  for (int t = 0; (table = emxi_table_available(t)); t++)
    for (int i = 0; i < 4; i++)
      for (int x = 1; x < 300; x++) {
        const double a = alphas[i] - 1;
        const float list[2] = {(float)(1 / a), 0}, up = (float)((1 + 0.05 * pow(1.1, x)) / a);
        const emxi_dropped d = {.k = table,
                                .alpha = alphas[i],
                                .list = list,
                                .n = 2,
                                .top = list[0],
                                .tau_low = 0,
                                .far = {{.up = &up, .n = 1, .times = 1}}};
        const double y = a * (double)up, least = y < 2 ? 0.5 : 1 - 1e-9; /* it is the larger one; two apart, and it is alone */
        assert_true(emxi_cpu_dropped_mass(&d) >= least);
      }
}

static void test_refusals(void **state) {
  (void)state;
  decode_case c = {.D = 32, .len = {300}, .summaries = EMX_SUMMARY_SKETCH};
  case_open(&c, ctx);
  emx_select_desc s = case_desc(EMX_SELECT_CERTIFIED, 0);
  size_t bytes;
  s.max_delta = NAN;
  fails(emx_decode_workspace_size(ctx, c.kv, &s, &c.io, 64, &bytes), EMX_ERR_INVALID, "max_delta");
  s.max_delta = 0, s.max_bytes = -1;
  fails(emx_decode_workspace_size(ctx, c.kv, &s, &c.io, 64, &bytes), EMX_ERR_INVALID, "max_bytes");
  s.max_bytes = 0;
  case_close(&c);
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.kv_heads = 1, o.head_dim = 64, o.max_pages = 4, o.summaries = EMX_SUMMARY_RESIDUAL;
  emx_kv *kv;
  fails(emx_kv_create(ctx, &o, &kv), EMX_ERR_INVALID, "EMX_SUMMARY_SKETCH");
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_kernels),        cmocka_unit_test(test_rebuild),
                                     cmocka_unit_test(test_foreign_tables), cmocka_unit_test(test_limits),
                                     cmocka_unit_test(test_limit_used),     cmocka_unit_test(test_same),
                                     cmocka_unit_test(test_refusals),       cmocka_unit_test(test_far_bounds),
                                     cmocka_unit_test(test_far_powers),     cmocka_unit_test(test_steep_slopes)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
