/* SPDX-License-Identifier: Apache-2.0
 * What was left out, and what reports say about it: softmax with max_delta; page lists that sketches check, those of CERTIFIED
 * among them. */
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

/* ---- softmax with max_delta. The best key of each head has a channel of V to itself, so that the weight it got tells how much
 * mass was dropped: p / (1 - delta). The others' values are unit vectors: no two values are further apart than sqrt(2). */
enum { D = 32, H = 3, N = 6000 };
static double s[N], p[N];

static void softmax_case(decode_case *c, int i, int64_t *best, double *top, double dense[H][D]) {
  *c = (decode_case){.G = 1,
                     .H = H,
                     .D = D,
                     .P = 16 << i % 3,
                     .dtype = (int[]){EMX_BF16, EMX_F16, EMX_F32}[i / 3 % 3],
                     .len = {i % 5 == 4 ? 1 + i : 2000 + 83 * i},
                     .alpha = 1,
                     .summaries = EMX_SUMMARY_SKETCH | (i % 2 ? EMX_SUMMARY_RESIDUAL : 0),
                     .alibi = i % 4 == 3,
                     .scale = (float[]){0, 1, 3, 0.6f}[i / 2 % 4],
                     .seed = (uint64_t)i,
                     .data = (int[]){DATA_IID, DATA_AR, DATA_TOPIC, DATA_OUTLIER, DATA_NEEDLE, DATA_FLAT, DATA_EQUAL}[i % 7]};
  case_open(c, ctx);
  emx_tensor k, v;
  const int32_t *table;
  int64_t n_table, support;
  CASE_OK(emx_kv_pool_view(c->kv, &k, &v));
  CASE_OK(emx_seq_block_table(c->kv, c->seqs[0], &table, &n_table));
  const int64_t n = c->len[0];
  for (int h = 0; h < H; h++) {
    case_scores(c, 0, h, 0, NULL, s);
    best[h] = 0;
    for (int64_t j = 0; j < n; j++) best[h] = s[j] > s[best[h]] ? j : best[h];
  }
  for (int64_t j = 0; j < n; j++) {
    int dim = H + (int)(j % (D - H));
    for (int h = H - 1; h >= 0; h--)
      dim = j == best[h] ? h : dim; /* heads with the same best key share the first one's channel */
    for (int d = 0; d < D; d++) {
      emxi_store(v.data, c->dtype, (table[j / c->P] * c->P + j % c->P) * D + d, d == dim);
      case_value(c, 0, 0, j)[d] = d == dim;
    }
  }
  for (int h = 0; h < H; h++) {
    case_reference(c, 0, h, 0, NULL, s, p, dense[h], &support);
    top[h] = p[best[h]];
  }
}

static void test_softmax(void **state) {
  (void)state;
  int ladder = 0, loose = 0;
  for (int i = 0; i < 48; i++) {
    decode_case c;
    int64_t best[H];
    double top[H], dense[H][D];
    softmax_case(&c, i, best, top, dense);
    for (int limit = 0; limit < 6; limit++) {
      emx_select_desc desc = case_desc(EMX_SELECT_CERTIFIED, 0);
      desc.max_delta = (double[]){0.5, 0.05, 1e-3, 0, 1e-3, 0.05}[limit];
      desc.max_bytes = limit < 4 ? 0 : 50000;
      CASE_OK(case_decode(&c, &desc));
      for (int h = 0; h < H; h++) {
        const emx_report *r = &c.reports[h];
        int dim = h;
        for (int x = h - 1; x >= 0; x--) dim = best[x] == best[h] ? x : dim;
        /* scores are off by (D+8) 2^-24 of |q||k| here, 1e-4 at most, the sums of weights by less */
        const double got = case_out(&c, 0, h, 0, dim), dropped = 1 - top[h] / got, off = 3e-4;
        double error = 0;
        for (int d = 0; d < D; d++) error += pow(case_out(&c, 0, h, 0, d) - dense[h][d], 2);
        assert_true(dropped <= (double)r->delta_bound + off);
        assert_true(sqrt(error) <= sqrt(2) * (double)r->delta_bound + off);
        assert_true((double)r->delta_bound <= desc.max_delta * (1 + 1e-6) || r->stopped_by == EMX_STOP_BYTES);
        assert_true(r->mass == 1 && r->tau != r->tau && r->delta_bound <= 1);
        if (r->delta_bound == 0) {
          assert_true(r->flags == EMX_REPORT_CERTIFIED && r->max_unread == -INFINITY && r->tokens == c.len[0]);
          continue;
        }
        ladder++;
        loose += dropped > 1e-3;
        assert_true(limit != 3 && r->flags == 0 && r->path == EMX_PATH_LADDER);
        assert_true(r->stopped_by == EMX_STOP_DELTA || (r->stopped_by == EMX_STOP_BYTES && limit > 3));
        assert_true(r->support <= r->tokens && r->tokens <= c.len[0] && r->bytes_meta > 0);
      }
    }
    case_close(&c);
  }
  assert_true(ladder > 60 && loose > 10);
}

/* Heads with an alpha each: softmax ones stop at max_delta next to the others, and without it their group is read in full. */
static void test_mixed_alphas(void **state) {
  (void)state;
  double alphas[6] = {1, 1.5, 2, 1.5, 1.25, 2};
  static float all[6 * 64];
  int64_t heads = 6;
  decode_case c = {
      .G = 2, .H = 6, .D = 64, .dtype = EMX_BF16, .len = {5000}, .summaries = EMX_SUMMARY_SKETCH, .seed = 5, .scale = 2};
  case_open(&c, ctx);
  const emx_tensor ta = emx_tensor_view(alphas, EMX_F64, 1, &heads);
  c.io.alphas = &ta;
  emx_select_desc desc = case_desc(EMX_SELECT_ALL, 0);
  CASE_OK(case_decode(&c, &desc));
  memcpy(all, c.o_data, sizeof all);
  desc.kind = EMX_SELECT_CERTIFIED;
  CASE_OK(case_decode(&c, &desc));
  for (int h = 0; h < 6; h++) {
    assert_true(c.reports[h].flags == EMX_REPORT_CERTIFIED && c.reports[h].path == (h < 3 ? EMX_PATH_ALL : EMX_PATH_LADDER));
    for (int d = 0; d < 64; d++) assert_float_equal(case_out(&c, 0, h, 0, d), (double)all[h * 64 + d], h ? 0 : 1e-6);
  }
  desc.max_delta = 0.1;
  CASE_OK(case_decode(&c, &desc));
  for (int h = 0; h < 6; h++)
    assert_true(c.reports[h].path == EMX_PATH_LADDER && c.reports[h].delta_bound <= 0.1f && (c.reports[h].delta_bound > 0 || h));
  assert_true(isnan(c.reports[0].tau) && !isnan(c.reports[1].tau));
  case_close(&c);
}

/* ---- page lists. What a report claims about the pages outside a list against float64: the mass of those tokens, and whether the
 * answer is ALL's. */
enum { SUPPORT, ALL_BUT_ONE, RANDOM, HALF, TOPK, GAUSSIAN, LISTS };

/* Fills the rows' lists: pages with a weight (and the best one taken away), some at random, the newer half. */
static void make_lists(decode_case *c, int kind) {
  uint32_t w[4];
  const int64_t pages = (c->len[0] + c->P - 1) / c->P, ld = c->tp.shape[3];
  double o[256];
  int64_t support;
  for (int h = 0; h < c->H; h++) {
    int32_t *list = c->pages + h * ld, n = 0;
    uint8_t read[N / 16 + 1] = {0};
    case_reference(c, 0, h, 0, NULL, s, p, o, &support);
    int64_t best = 0;
    for (int64_t j = 0; j < c->len[0]; j++) best = p[j] > p[best] ? j : best;
    for (int64_t j = 0; j < c->len[0]; j++) read[j / c->P] |= kind <= ALL_BUT_ONE && p[j] > 0;
    if (kind == ALL_BUT_ONE) read[best / c->P] = 0;
    for (int64_t i = 0; i < pages; i++) {
      emxi_philox(c->seed, 77, (uint64_t)(h * pages + i), w);
      if (read[i] || (kind == RANDOM && w[0] % 3 == 0) || (kind == HALF && i >= pages / 2)) list[n++] = (int32_t)i;
    }
    for (int64_t i = n; i < ld; i++) list[i] = -1;
    c->n_pages[h] = n;
  }
}

static void test_lists(void **state) {
  (void)state;
  static float all[12 * 64];
  int certified[LISTS][2] = {{0}}, useful = 0;
  for (int i = 0; i < 36; i++) {
    static const double alphas[] = {1.5, 2, 4. / 3, 1.25, 1.75, 3, 1};
    decode_case c = {.G = 1 + i % 2,
                     .H = i % 12 == 10 ? 12 : 4, /* more rows than go together */
                     .D = i % 3 ? 64 : 20,
                     .P = 16 << i % 3,
                     .dtype = (int[]){EMX_BF16, EMX_F16, EMX_F32}[i / 3 % 3],
                     .len = {i % 9 == 8 ? 40 + i : 1300 + 53 * i},
                     .alpha = alphas[i % 7],
                     .alibi = i % 5 == 3,
                     .seed = (uint64_t)i,
                     .scale = i % 4 == 1 ? 0.7f : 0,
                     .data = (int[]){DATA_IID, DATA_AR, DATA_TOPIC, DATA_OUTLIER, DATA_NEEDLE, DATA_FLAT, DATA_HUGE}[i / 2 % 7]};
    for (int sketch = 0; sketch < 2; sketch++) {
      c.summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS | (sketch ? EMX_SUMMARY_SKETCH : 0);
      decode_case x = c;
      case_open(&x, ctx);
      emx_select_desc desc = case_desc(EMX_SELECT_ALL, 0);
      CASE_OK(case_decode(&x, &desc));
      memcpy(all, x.o_data, sizeof(float) * (size_t)(x.H * x.D));
      for (int kind = 0; kind < LISTS; kind++) {
        if (kind == GAUSSIAN && x.alpha == 1) continue;
        desc = case_desc(kind == TOPK ? EMX_SELECT_TOPK : kind == GAUSSIAN ? EMX_SELECT_GAUSSIAN : EMX_SELECT_PAGES, 500);
        if (kind < TOPK)
          make_lists(&x, kind);
        else
          CASE_OK(case_select(&x, &desc));
        CASE_OK(case_decode(&x, &desc));
        for (int h = 0; h < x.H; h++) {
          const emx_report *r = &x.reports[h];
          uint8_t out[N / 16 + 1];
          double o[256], dropped = 0, top = -INFINITY, size = 1;
          int64_t support;
          const bool sure = r->flags & EMX_REPORT_CERTIFIED;
          memset(out, 1, sizeof out);
          for (int q = 0; q < x.n_pages[h]; q++) out[x.pages[h * x.tp.shape[3] + q]] = 0;
          case_reference(&x, 0, h, 0, NULL, s, p, o, &support);
          for (int64_t j = 0; j < x.len[0]; j++) {
            size = fmax(size, fabs(s[j]));
            if (!out[j / x.P]) continue;
            dropped += p[j];
            top = fmax(top, (x.alpha == 1 ? 1 : x.alpha - 1) * s[j]);
          }
          /* weights carry the rounding of scores of this size: case_tolerance of one element, here of up to all of them */
          const double off = 8 * case_tolerance(&x, size);
          assert_true(dropped <= (double)r->delta_bound + off);
          assert_true(top <= (double)r->max_unread + 1e-5 * size);
          assert_true(sure == (r->delta_bound == 0) && (!sure || x.alpha > 1 || top == -INFINITY));
          if (sure) assert_memory_equal(all + h * x.D, (float *)x.o_data + h * x.D, sizeof(float) * (size_t)x.D);
          certified[kind][sketch] += sure;
          useful += sketch && !sure && (double)r->delta_bound < fmin(0.9, 2 * dropped + 0.05);
        }
      }
      case_close(&x);
    }
  }
  /* sketches see what boxes do not; a list that holds the support is lucky but where scores lie closer to tau than their
   * rounding */
  for (int k = 0; k < LISTS; k++) assert_true(certified[k][1] >= certified[k][0]);
  assert_true(certified[SUPPORT][1] > 120 && certified[SUPPORT][1] > certified[SUPPORT][0] + 60 &&
              certified[ALL_BUT_ONE][1] == 0);
  assert_true(useful > 100);
}

/* The pages that CERTIFIED would read: a decode with them has the same answer and is certified. */
static void test_certified_lists(void **state) {
  (void)state;
  static float want[2 * 6 * 64];
  int sparse = 0;
  for (int i = 0; i < 45; i++) {
    static const double alphas[] = {1.5, 2, 4. / 3, 1.25, 1.75, 3};
    decode_case c = {
        .B = 1 + i % 2,
        .G = 2,
        .H = 6,
        .D = i % 3 ? 64 : 20,
        .P = 16 << i / 2 % 3,
        .dtype = (int[]){EMX_BF16, EMX_F16, EMX_F32}[i / 3 % 3],
        .len = {1500 + 53 * i, i % 4 ? 700 : 0},
        .alpha = alphas[i % 6],
        .alibi = i % 5 == 3,
        .seed = (uint64_t)i,
        .summaries = EMX_SUMMARY_SKETCH | (i % 2 ? EMX_SUMMARY_RESIDUAL : 0) | (i % 4 == 1 ? EMX_SUMMARY_MINMAX : 0),
        .scale = i % 4 == 1 ? 0.7f : 0,
        .data = (int[]){DATA_IID, DATA_AR, DATA_TOPIC, DATA_OUTLIER, DATA_NEEDLE, DATA_FLAT, DATA_HUGE, DATA_EQUAL}[i % 8]};
    case_open(&c, ctx);
    emx_select_desc desc = case_desc(EMX_SELECT_CERTIFIED, 0);
    CASE_OK(case_decode(&c, &desc));
    memcpy(want, c.o_data, sizeof(float) * (size_t)(c.B * c.H * c.D));
    emx_report first[12];
    memcpy(first, c.reports, sizeof(emx_report) * (size_t)(c.B * c.H));
    /* the workspace that a decode asks for is enough, and the lists go up to the sequence's end */
    CASE_OK(case_select(&c, &desc));
    desc.kind = EMX_SELECT_PAGES;
    for (int r = 0; r < c.B * c.H; r++) {
      const int64_t pages = (c.len[r / c.H] + c.P - 1) / c.P;
      assert_true(first[r].flags == EMX_REPORT_CERTIFIED && c.n_pages[r] <= pages && (c.n_pages[r] > 0) == (pages > 0));
      assert_int_equal(c.n_pages[r], first[r].path == EMX_PATH_ALL ? pages : first[r].pages);
      assert_true(first[r].path == EMX_PATH_ALL ? c.bound[r] == -INFINITY : c.bound[r] == first[r].max_unread);
      sparse += c.n_pages[r] < pages;
    }
    CASE_OK(case_decode(&c, &desc));
    for (int r = 0; r < c.B * c.H; r++)
      assert_true(c.reports[r].flags == EMX_REPORT_CERTIFIED && c.reports[r].support == first[r].support &&
                  c.reports[r].max_unread <= c.reports[r].tau);
    assert_memory_equal(want, c.o_data, sizeof(float) * (size_t)(c.B * c.H * c.D));
    case_close(&c);
  }
  assert_true(sparse > 100);
  decode_case c = {.D = 32, .len = {300}, .summaries = EMX_SUMMARY_SKETCH, .file = "test_dropped.kv"};
  case_open(&c, ctx);
  const emx_select_desc desc = case_desc(EMX_SELECT_CERTIFIED, 0);
  fails(case_select(&c, &desc), EMX_ERR_UNSUPPORTED, "in a file");
  case_close(&c);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_softmax), cmocka_unit_test(test_mixed_alphas),
                                     cmocka_unit_test(test_lists), cmocka_unit_test(test_certified_lists)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
