/* Inputs at the ends of the float range, where a certificate could be wrong or a bound could take forever. One head, one
 * sequence. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/num.h"
#include "entmax/entmax.h"
#include "one_context.h"

typedef struct line {
  int32_t dtype, D, P, summaries;
  int64_t n;
  float *k, *v; /* [n,D] */
  float q[256], o[256];
  emx_report report;
} line;

static line open_line(int32_t dtype, int32_t D, int32_t P, int32_t summaries, int64_t n) {
  line l = {.dtype = dtype, .D = D, .P = P, .summaries = summaries, .n = n};
  l.k = calloc((size_t)(n * D), sizeof(float));
  l.v = calloc((size_t)(n * D), sizeof(float));
  assert_non_null(l.k);
  assert_non_null(l.v);
  return l;
}

/* Decodes with the page list {last page} or with `select`; returns the true mass of what was not read. */
static double decode(line *l, emx_select_desc *select, double alpha, float scale) {
  emx_kv_opts opts;
  emx_kv_opts_init(&opts);
  opts.dtype = l->dtype;
  opts.kv_heads = 1;
  opts.head_dim = l->D;
  opts.page_size = l->P;
  opts.max_pages = (l->n + l->P - 1) / l->P;
  opts.summaries = l->summaries;
  emx_kv *kv;
  int32_t seq;
  assert_int_equal(emx_kv_create(ctx, &opts, &kv), EMX_OK);
  assert_int_equal(emx_seq_create(kv, &seq), EMX_OK);
  int64_t sk[4] = {1, 1, l->n, l->D}, sq[4] = {1, 1, 1, l->D}, sp[4] = {1, 1, 1, opts.max_pages};
  emx_tensor tk = emx_tensor_view(l->k, EMX_F32, 4, sk), tv = emx_tensor_view(l->v, EMX_F32, 4, sk),
             tq = emx_tensor_view(l->q, EMX_F32, 4, sq), to = emx_tensor_view(l->o, EMX_F32, 4, sq);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &seq;
  assert_int_equal(emx_kv_append(ctx, kv, &batch, &tk, &tv, NULL), EMX_OK);
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.alpha = alpha;
  io.scale = scale;
  io.q = &tq;
  io.o = &to;
  io.reports = &l->report;
  int32_t *pages = calloc((size_t)opts.max_pages, sizeof *pages), count = 1;
  pages[0] = (int32_t)opts.max_pages - 1;
  emx_tensor tp = emx_tensor_view(pages, EMX_I32, 4, sp), tn = emx_tensor_view(&count, EMX_I32, 3, sq);
  if (select->kind == EMX_SELECT_PAGES) io.pages = &tp, io.n_pages = &tn;
  size_t bytes;
  assert_int_equal(emx_decode_workspace_size(ctx, kv, select, &io, l->n, &bytes), EMX_OK);
  void *work = malloc(bytes);
  if (emx_decode(ctx, kv, &batch, select, &io, work, bytes)) fail_msg("%s", emx_last_error());
  free(work);
  free(pages);
  emx_kv_destroy(kv);
  double *s = malloc((size_t)l->n * sizeof *s), *p = malloc((size_t)l->n * sizeof *p), dropped = 0;
  for (int64_t j = 0; j < l->n; j++) {
    s[j] = 0;
    for (int d = 0; d < l->D; d++) {
      double stored;
      emxi_store(&stored, l->dtype, 0, (double)l->k[j * l->D + d]);
      s[j] += (double)l->q[d] * (double)scale * emxi_load(&stored, l->dtype, 0);
    }
  }
  emxi_oracle_entmax(s, l->n, alpha, p, NULL);
  for (int64_t j = 0; j < (l->n - 1) / l->P * l->P; j++) dropped += p[j]; /* when only the last page is read */
  free(s);
  free(p);
  return dropped;
}
static void close_line(line *l) {
  free(l->k);
  free(l->v);
}

/* An unread page far above everything read: the root of the mass bound lies where floats are coarse. */
static void test_far_unread_page(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.25, 1.5, 2, 3}, sizes[] = {1e3, 1e6, 1e7, 1e20, 1e37};
  for (int a = 0; a < 5; a++)
    for (int b = 0; b < 5; b++) {
      line l = open_line(EMX_BF16, 16, 16, EMX_SUMMARY_MINMAX, 32);
      emx_select_desc top;
      emx_select_desc_init(&top);
      top.kind = EMX_SELECT_TOPK;
      top.budget = 16;
      l.q[0] = 1;
      for (int j = 0; j < 16; j++) l.k[j * 16] = (float)sizes[b];
      alarm(20); /* it must end */
      const double dropped = decode(&l, &top, alphas[a], 1);
      alarm(0);
      assert_true(l.report.delta_bound >= dropped && l.report.delta_bound <= 1 && !(l.report.flags & EMX_REPORT_CERTIFIED));
      close_line(&l);
    }
}

/* scale * q below the normal floats, keys near the largest: what is lost there reaches the score. */
static void test_subnormal_query(void **state) {
  (void)state;
  static const int32_t dtypes[] = {EMX_F32, EMX_BF16};
  static const int32_t kinds[][2] = {
      {EMX_SELECT_TOPK, EMX_SUMMARY_MINMAX}, {EMX_SELECT_PAGES, EMX_SUMMARY_MINMAX}, {EMX_SELECT_PAGES, EMX_SUMMARY_MOMENTS}};
  for (int t = 0; t < 2; t++)
    for (int i = 0; i < 3; i++) {
      line l = open_line(dtypes[t], 256, 64, kinds[i][1], 64 * 65);
      emx_select_desc select;
      emx_select_desc_init(&select);
      select.kind = kinds[i][0];
      select.budget = 64;
      l.q[0] = 1e30f;
      for (int d = 1; d < 256; d++) l.q[d] = (float)(0.49 * 0x1p-149 / 1e-30);
      for (int64_t j = 0; j < l.n; j++)
        for (int d = 0; d < 256; d++)
          l.k[j * 256 + d] = j < l.n - 64 ? (d ? 1.9f * 0x1p126f : 0) : d ? 0 : t ? 0.015747070f : (float)(1. / 64 + 1e-5);
      const double dropped = decode(&l, &select, 2, 1e-30f);
      if (l.report.flags & EMX_REPORT_CERTIFIED) assert_true(dropped < 1e-12);
      if (!((double)l.report.delta_bound >= dropped))
        fail_msg("delta_bound %g, dropped %g", (double)l.report.delta_bound, dropped);
      close_line(&l);
    }
}

/* A finite key whose partial sums overflow to -inf although its score is the largest. Where the order of the sum avoids the
 * overflow the result is right; elsewhere it is NaN with its flag. Dropping the token is what must not happen. */
static void test_overflow_on_the_way(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.5};
  for (int a = 0; a < 2; a++)
    for (int apart = 1; apart <= 8; apart *= 2) { /* lanes that are added first differ between instruction sets */
      line l = open_line(EMX_BF16, 16, 16, EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS, 16);
      emx_select_desc all;
      emx_select_desc_init(&all);
      for (int j = 0; j < 16; j++)
        for (int d = 0; d < 16; d++) {
          l.q[d] = 1;
          l.k[j * 16 + d] = j == 3 ? 0 : -1;
          l.v[j * 16 + d] = j == 3 ? 7 : 1;
        }
      const int minus[2] = {0, apart};
      for (int i = 0, plus = 0; plus < 2; i++)
        if (i != minus[0] && i != minus[1]) l.k[3 * 16 + i] = 0x1.8p127f, plus++;
      l.k[3 * 16 + minus[0]] = l.k[3 * 16 + minus[1]] = -0x1.8p127f;
      decode(&l, &all, alphas[a], 1);
      const bool nan = l.o[0] != l.o[0];
      /* the other tokens score -16, so that softmax gives them 15 e^-16 = 2e-6 */
      if (!nan && fabsf(l.o[0] - 7) > 1e-4f) fail_msg("alpha %g, lanes %d apart: o is %g", alphas[a], apart, (double)l.o[0]);
      assert_int_equal(l.report.flags, nan ? EMX_REPORT_NONFINITE : EMX_REPORT_CERTIFIED);
      close_line(&l);
    }
}

static void test_alpha_range(void **state) {
  (void)state;
  line l = open_line(EMX_F32, 16, 16, 0, 16);
  emx_select_desc all;
  emx_select_desc_init(&all);
  for (int j = 0; j < 16; j++) l.k[j * 16] = (float)j * 0.1f;
  l.q[0] = 1;
  decode(&l, &all, 1.000001, 1);
  assert_true(fabsf(l.report.mass - 1) < 1e-5f);
  emx_entmax_desc desc;
  emx_entmax_io io;
  emx_entmax_desc_init(&desc);
  emx_entmax_io_init(&io);
  desc.alpha = 1 + 1e-9;
  assert_int_equal(emx_entmax_forward(ctx, &desc, &io), EMX_ERR_INVALID);
  close_line(&l);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_far_unread_page), cmocka_unit_test(test_subnormal_query),
                                     cmocka_unit_test(test_overflow_on_the_way), cmocka_unit_test(test_alpha_range)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
