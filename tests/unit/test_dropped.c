/* SPDX-License-Identifier: Apache-2.0
 * What was left out, and what reports say about it: softmax with max_delta. */
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

/* ---- softmax with max_delta. The best key of each head has a channel of V to itself, so that the weight it got tells how much mass was
 * dropped: p / (1 - delta). The others' values are unit vectors: no two values are further apart than sqrt(2). */
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
    for (int limit = 0; limit < 4; limit++) {
      emx_select_desc desc = case_desc(EMX_SELECT_CERTIFIED, 0);
      desc.max_delta = (double[]){0.5, 0.05, 1e-3, 0}[limit];
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
        assert_true((double)r->delta_bound <= desc.max_delta * (1 + 1e-6) && r->mass == 1 && r->tau != r->tau);
        if (r->delta_bound == 0) {
          assert_true(r->flags == EMX_REPORT_CERTIFIED && r->max_unread == -INFINITY && r->tokens == c.len[0]);
          continue;
        }
        ladder++;
        loose += dropped > 1e-3;
        assert_true(limit < 3 && r->flags == 0 && r->stopped_by == EMX_STOP_DELTA && r->path == EMX_PATH_LADDER);
        assert_true(r->support <= r->tokens && r->tokens <= c.len[0] && r->bytes_meta > 0);
      }
    }
    case_close(&c);
  }
  assert_true(ladder > 60 && loose > 10);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_softmax)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
