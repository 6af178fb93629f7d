/* SPDX-License-Identifier: Apache-2.0
 * Supports of a decode: for every selector the listed tokens and weights are those of the float64 oracle over what was read, and
 * make the output that was written. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <unistd.h>

#include "check.h"
#include "cpu/certified.h"
#include "decode_case.h"

static emx_ctx *ctx;
static int setup(void **state) {
  (void)state;
  emxi_certified_short = 64; /* the ladder on short sequences too */
  return emx_ctx_create(NULL, &ctx);
}
static int teardown(void **state) {
  (void)state;
  emx_ctx_destroy(ctx);
  return 0;
}

enum { UNTOUCHED = -77, GAP = 3 };
typedef struct lists {
  int64_t width, pitch; /* C, and how far rows lie apart */
  int32_t *index, *count;
  float *weight;
  emx_tensor ti, tw, tc;
} lists;

static lists lists_open(decode_case *c, int64_t width) {
  const int64_t rows = (int64_t)c->B * c->H * c->S;
  lists l = {.width = width, .pitch = width + GAP};
  l.index = case_take(sizeof(int32_t) * (size_t)(rows * l.pitch));
  l.weight = case_take(sizeof(float) * (size_t)(rows * l.pitch));
  l.count = case_take(sizeof(int32_t) * (size_t)rows);
  for (int64_t i = 0; i < rows * l.pitch; i++) l.index[i] = UNTOUCHED, l.weight[i] = (float)UNTOUCHED;
  for (int64_t i = 0; i < rows; i++) l.count[i] = UNTOUCHED;
  const int64_t shape[4] = {c->B, c->H, c->S, width};
  l.ti = emx_tensor_view(l.index, EMX_I32, 4, shape);
  l.tw = emx_tensor_view(l.weight, EMX_F32, 4, shape);
  l.tc = emx_tensor_view(l.count, EMX_I32, 3, shape);
  const int64_t strides[3] = {c->H * c->S * l.pitch, c->S * l.pitch, l.pitch};
  memcpy(l.ti.stride, strides, sizeof strides);
  memcpy(l.tw.stride, strides, sizeof strides);
  return l;
}
/* After the lists have their place: the caller holds them where c->io can point to. */
static void lists_bind(decode_case *c, const lists *l) {
  c->io.support_index = &l->ti;
  c->io.support_weight = &l->tw;
  c->io.support_count = &l->tc;
}
static void lists_close(lists *l) { free(l->index), free(l->weight), free(l->count); }

/* read: per row and page, NULL: everything. exact: tau was solved, not estimated, and what was not read has no weight. */
static void check_lists(const decode_case *c, const lists *l, const uint8_t *read, int64_t pages, bool exact) {
  double *s = case_take(sizeof(double) * (size_t)(c->max_len + 1)), *p = case_take(sizeof(double) * (size_t)(c->max_len + 1)),
         o[256];
  for (int b = 0; b < c->B; b++)
    for (int h = 0; h < c->H; h++)
      for (int t = 0; t < c->S; t++) {
        const int64_t row = case_row(c, b, h, t), n = c->len[b] - c->S + t + 1;
        const emx_report *r = &c->reports[row];
        const int32_t *index = l->index + row * l->pitch, count = l->count[row];
        const float *weight = l->weight + row * l->pitch;
        assert_int_equal(count, r->support);
        const int64_t kept = count < l->width ? count : l->width;
        for (int64_t i = kept; i < l->pitch; i++) assert_true(index[i] == UNTOUCHED && weight[i] == (float)UNTOUCHED);
        int64_t want = 0;
        const double tau = case_reference(c, b, h, t, read ? read + row * pages : NULL, s, p, o, &want);
        double m = 1, sum = 0, unlisted = 0;
        for (int64_t j = 0; j < n; j++)
          if (isfinite(s[j])) m = fmax(m, fabs(s[j]));
        double out[256] = {0};
        int64_t at = 0;
        for (int64_t j = 0; j < n; j++) {
          if (at == kept || index[at] != j) {
            if (kept == count) unlisted = fmax(unlisted, p[j]);
            continue;
          }
          const double w = (double)weight[at++];
          assert_true(w > 0 || c->alpha == 1);
          /* a weight moves by at most a small multiple of the scores' float rounding, and at alpha > 2 as case_tolerance says */
          if (exact && !(fabs(w - p[j]) <= case_tolerance(c, m)))
            fail_msg("b %d h %d s %d position %lld: weight %g, oracle %g (alpha %g data %d tau %g)", b, h, t, (long long)j, w,
                     p[j], c->alpha, c->data, tau);
          if (!exact && r->select == EMX_SELECT_GAUSSIAN) /* the estimated threshold is the one of the report */
            assert_true(fabs(w - pow(fmax((c->alpha - 1) * s[j] - (double)r->tau, 0), 1 / (c->alpha - 1))) <= 1e-4 * m);
          sum += w;
          for (int d = 0; d < c->D; d++) out[d] += w * (double)case_value(c, b, h / (c->H / c->G), j)[d];
        }
        assert_int_equal(at, kept); /* ascending, visible, each once */
        if (kept < count) continue;
        if (exact) assert_true(unlisted <= case_tolerance(c, m));
        assert_true(fabs(sum - (double)r->mass) <= 2e-6 * fmax(1, (double)r->mass)); /* float weights, summed in double */
        for (int d = 0; d < c->D; d++)                                               /* sums of up to 512 products in float */
          if (!(fabs(out[d] - case_out(c, b, h, t, d)) <= 1e-5 * fmax(1, (double)r->mass)))
            fail_msg("b %d h %d s %d d %d: the list makes %g, the output is %g", b, h, t, d, out[d], case_out(c, b, h, t, d));
      }
  free(s);
  free(p);
}

/* The pages that emx_select names, as one byte a page. */
static uint8_t *pages_read(const decode_case *c, int64_t *pages) {
  *pages = c->tp.shape[3];
  const int64_t rows = (int64_t)c->B * c->H * c->S;
  uint8_t *read = case_take((size_t)(rows * *pages));
  for (int64_t r = 0; r < rows; r++)
    for (int32_t i = 0; i < c->n_pages[r]; i++) read[r * *pages + c->pages[r * *pages + i]] = 1;
  return read;
}

static void decode_and_check(decode_case *c, const emx_select_desc *select, const uint8_t *read, int64_t pages, bool exact,
                             int64_t width) {
  lists l = lists_open(c, width);
  lists_bind(c, &l);
  CASE_OK(case_decode(c, select));
  check_lists(c, &l, read, pages, exact);
  c->io.support_index = c->io.support_weight = c->io.support_count = NULL;
  lists_close(&l);
}

static void test_all(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.05, 1.5, 4. / 3, 2, 3};
  for (int i = 0; i < 12; i++) {
    decode_case c = {.B = 2,
                     .G = 2,
                     .H = 4,
                     .S = i % 3 ? 1 : 5,
                     .D = i % 2 ? 64 : 80,
                     .P = 16 << i % 3,
                     .len = {700 + i, i ? 33 : 2}, /* the first case has rows that see nothing */
                     .alpha = alphas[i % 6],
                     .data = i % DATA_FLAT,
                     .alibi = i % 4 == 1,
                     .layout = i % 2,
                     .dtype = i % 2 ? EMX_BF16 : EMX_F32,
                     .in_decode = i > 5,
                     .seed = (uint64_t)i};
    const emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
    case_open(&c, ctx);
    decode_and_check(&c, &all, NULL, 0, true, 720);
    case_close(&c);
  }
}

/* TOPK, GAUSSIAN, and the same pages as a caller's lists; the file's cache as the one in memory. */
static void test_pages(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.5, 2, 1.2};
  char name[64];
  snprintf(name, sizeof name, "/tmp/emx_support_%ld", (long)getpid());
  for (int i = 0; i < 12; i++) {
    decode_case c = {.B = 2,
                     .G = 2,
                     .H = 6,
                     .D = 32,
                     .len = {600, 95},
                     .alpha = alphas[i % 4],
                     .data = i % 3 == 2 ? DATA_NEEDLE : i % 3,
                     .file = i % 2 ? name : NULL,
                     .seed = (uint64_t)(50 + i)};
    case_open(&c, ctx);
    emx_select_desc select = case_desc(EMX_SELECT_TOPK, 160), given = case_desc(EMX_SELECT_PAGES, 0);
    for (int kind = 0; kind < (c.alpha > 1 ? 4 : 1); kind++) {
      if (kind) select = case_desc(EMX_SELECT_GAUSSIAN, 0);
      CASE_OK(case_select(&c, &select));
      int64_t pages;
      uint8_t *read = pages_read(&c, &pages);
      select.tau_mode = kind == 2 ? EMX_TAU_CORRECTED : kind == 3 ? EMX_TAU_FIXED : EMX_TAU_EXACT;
      decode_and_check(&c, &select, read, pages, kind < 2, 600);
      decode_and_check(&c, &given, read, pages, true, 600);
      free(read);
    }
    case_close(&c);
  }
}

static void test_certified(void **state) {
  (void)state;
  for (int i = 0; i < 8; i++) {
    decode_case c = {.G = 1,
                     .H = 3,
                     .D = 64,
                     .len = {5000},
                     .summaries = EMX_SUMMARY_SKETCH | (i % 2 ? EMX_SUMMARY_RESIDUAL : 0),
                     .alpha = i % 4 == 3   ? 1
                              : i % 4 == 1 ? 2
                                           : 1.5,
                     .scale = i % 4 == 3 ? 1 : 0,
                     .data = i % 4 == 3 ? DATA_TOPIC : i % 3,
                     .seed = (uint64_t)(90 + i)};
    emx_select_desc certified = case_desc(EMX_SELECT_CERTIFIED, 0);
    certified.max_delta = c.alpha == 1 ? 0.01 : 0; /* softmax takes the ladder where something may be left out */
    case_open(&c, ctx);
    decode_and_check(&c, &certified, NULL, 0, c.alpha > 1, 5000);
    int ladder = 0;
    for (int h = 0; h < 3; h++) ladder += c.reports[h].path == EMX_PATH_LADDER;
    if (c.data == DATA_TOPIC) assert_true(ladder > 0);
    if (c.alpha == 1) decode_and_check(&c, &certified, NULL, 0, false, 7);
    case_close(&c);
  }
}

/* One alpha a head, and a capacity that is too small: the first ones, and how many there are. */
static void test_short_lists(void **state) {
  (void)state;
  double alphas[4] = {1, 1.5, 2, 1};
  for (int width = 0; width < 40; width += 13) {
    decode_case c = {.G = 2, .H = 4, .D = 32, .len = {300}, .scale = 0.001f, .seed = 7};
    const emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
    case_open(&c, ctx);
    emx_tensor ta = emx_tensor_view(alphas, EMX_F64, 1, (int64_t[]){4});
    c.io.alphas = &ta;
    lists full = lists_open(&c, 300), cut = lists_open(&c, width);
    lists_bind(&c, &full);
    CASE_OK(case_decode(&c, &all));
    lists_bind(&c, &cut);
    CASE_OK(case_decode(&c, &all));
    for (int h = 0; h < 4; h++) {
      assert_true(cut.count[h] == full.count[h] && cut.count[h] == c.reports[h].support && cut.count[h] > 100);
      if (alphas[h] == 1) assert_int_equal(cut.count[h], 300);
      assert_memory_equal(cut.index + h * cut.pitch, full.index + h * full.pitch, sizeof(int32_t) * (size_t)width);
      for (int64_t i = 0; i < cut.pitch; i++) {
        const float w = cut.weight[h * cut.pitch + i];
        assert_true(i < width ? w == full.weight[h * full.pitch + i] : w == (float)UNTOUCHED);
      }
    }
    lists_close(&full);
    lists_close(&cut);
    case_close(&c);
  }
}

/* A row with a NaN has no support; reports are not needed; a caller of the shorter struct is served. */
static void test_odd(void **state) {
  (void)state;
  decode_case c = {.G = 1, .H = 2, .D = 16, .len = {40}, .seed = 3};
  const emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
  case_open(&c, ctx);
  lists l = lists_open(&c, 40);
  lists_bind(&c, &l);
  ((float *)c.q_data)[3] = NAN;
  c.io.reports = NULL;
  CASE_OK(case_decode(&c, &all));
  assert_true(l.count[0] == 0 && l.index[0] == UNTOUCHED && l.count[1] > 0);
  l.count[1] = UNTOUCHED;
  c.io.struct_size = offsetof(emx_decode_io, support_index); /* before supports: what lies behind is not looked at */
  CASE_OK(case_decode(&c, &all));
  assert_int_equal(l.count[1], UNTOUCHED);
  lists_close(&l);
  case_close(&c);
}

static void test_refusals(void **state) {
  (void)state;
  decode_case c = {.G = 1, .H = 2, .D = 16, .len = {40}, .seed = 3};
  const emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
  case_open(&c, ctx);
  lists l = lists_open(&c, 40);
  lists_bind(&c, &l);
  c.io.support_weight = NULL;
  fails(case_decode(&c, &all), EMX_ERR_INVALID, "go together");
  emx_tensor other = l.tw;
  c.io.support_weight = &other;
  other.dtype = EMX_F16;
  fails(case_decode(&c, &all), EMX_ERR_DTYPE, "support_weight is f16");
  other = l.tw, other.shape[3] = 39;
  fails(case_decode(&c, &all), EMX_ERR_SHAPE, "room for 40 tokens a row, support_weight for 39");
  other = l.tw, other.shape[1] = 1;
  fails(case_decode(&c, &all), EMX_ERR_SHAPE, "support_weight has 1 in dimension 1");
  other = l.tw, other.data = NULL;
  fails(case_decode(&c, &all), EMX_ERR_INVALID, "support_weight has no data");
  assert_int_equal(l.count[0], UNTOUCHED);
  lists_close(&l);
  case_close(&c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_all),         cmocka_unit_test(test_pages), cmocka_unit_test(test_certified),
      cmocka_unit_test(test_short_lists), cmocka_unit_test(test_odd),   cmocka_unit_test(test_refusals),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
