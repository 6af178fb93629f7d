/* One alpha per query head: every selector and path gives each head the bits it has in a decode where all heads share its alpha,
 * and the float64 oracle's result over the pages that were read; what a report promises holds head by head. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "check.h"
#include "decode_case.h"

static emx_ctx *one, *three;
static int setup(void **state) {
  (void)state;
  emx_ctx_opts o;
  emx_ctx_opts_init(&o);
  o.threads = 1;
  if (emx_ctx_create(&o, &one)) return 1;
  o.threads = 3;
  return emx_ctx_create(&o, &three);
}
static int teardown(void **state) {
  (void)state;
  emx_ctx_destroy(one);
  emx_ctx_destroy(three);
  return 0;
}

enum { H = 6 };
static const double sets[2][H] = {{1, 1.25, 1.5, 2, 3, 1}, {1.1, 1.5, 4. / 3, 2.5, 1.75, 1.5}}; /* GAUSSIAN has no softmax */

typedef struct outcome {
  float *o; /* [B,H,S,D] */
  emx_report *reports;
  float *bound;
  int32_t *pages;
} outcome;
static size_t rows_of(const decode_case *c) { return (size_t)(c->B * c->H * c->S); }
/* A decode and, where it is allowed, the selection alone. */
static outcome run(decode_case *c, const emx_select_desc *select) {
  const size_t rows = rows_of(c), width = (size_t)c->tp.shape[3];
  outcome r = {case_take(rows * (size_t)c->D * sizeof(float)), case_take(rows * sizeof(emx_report)),
               case_take(rows * sizeof(float)), case_take(rows * width * sizeof(int32_t))};
  if (select->kind != EMX_SELECT_PAGES) CASE_OK(case_select(c, select));
  memcpy(r.bound, c->bound, rows * sizeof(float));
  memcpy(r.pages, c->pages, rows * width * sizeof(int32_t));
  memset(c->o_data, 0xff, rows * (size_t)c->D * sizeof(float));
  CASE_OK(case_decode(c, select));
  memcpy(r.reports, c->reports, rows * sizeof(emx_report));
  for (int b = 0; b < c->B; b++)
    for (int h = 0; h < c->H; h++)
      for (int s = 0; s < c->S; s++)
        for (int d = 0; d < c->D; d++) r.o[case_row(c, b, h, s) * c->D + d] = (float)case_out(c, b, h, s, d);
  return r;
}
static void release(outcome *r) { free(r->o), free(r->reports), free(r->bound), free(r->pages); }

static void expect_same_row(const decode_case *c, const outcome *a, const outcome *b, int64_t row, const char *what,
                            double alpha) {
  const size_t width = (size_t)c->tp.shape[3] * sizeof(int32_t);
  if (memcmp(a->o + row * c->D, b->o + row * c->D, (size_t)c->D * sizeof(float)))
    fail_msg("%s, alpha %g: another output", what, alpha);
  if (memcmp(&a->reports[row], &b->reports[row], sizeof(emx_report))) fail_msg("%s, alpha %g: another report", what, alpha);
  if (memcmp(&a->bound[row], &b->bound[row], sizeof(float))) fail_msg("%s, alpha %g: another bound", what, alpha);
  if (memcmp((char *)a->pages + (size_t)row * width, (char *)b->pages + (size_t)row * width, width))
    fail_msg("%s, alpha %g: other pages", what, alpha);
}

/* Head by head against the oracle over the pages that the lists name (ALL: all), and the report's promise about the rest. */
static void check_rows(decode_case *c, const outcome *r, const emx_select_desc *select, const double *alphas, const char *what) {
  const int64_t width = c->tp.shape[3];
  const size_t doubles = sizeof(double) * (size_t)(c->max_len + 1);
  double *s = case_take(doubles), *p = case_take(doubles), *q = case_take(doubles), o[256];
  uint8_t *read = case_take((size_t)width);
  for (int b = 0; b < c->B; b++)
    for (int h = 0; h < c->H; h++)
      for (int t = 0; t < c->S; t++) {
        const int64_t row = case_row(c, b, h, t), n = c->len[b] - c->S + t + 1;
        const emx_report *rep = &r->reports[row];
        int64_t support;
        memset(read, select->kind == EMX_SELECT_ALL, (size_t)width);
        for (int64_t i = 0; i < width && select->kind != EMX_SELECT_ALL; i++)
          if (r->pages[row * width + i] >= 0) read[r->pages[row * width + i]] = 1;
        c->alpha = alphas[h];
        const double tau = case_reference(c, b, h, t, read, s, p, o, &support);
        double m = 1, dropped = 0;
        for (int64_t j = 0; j < n; j++)
          if (s[j] > -INFINITY) m = fmax(m, fabs(s[j]));
        for (int d = 0; d < c->D; d++)
          if (!(fabs((double)r->o[row * c->D + d] - o[d]) <= case_tolerance(c, m)))
            fail_msg("%s, head %d, alpha %g: %g, oracle %g", what, h, alphas[h], (double)r->o[row * c->D + d], o[d]);
        if (alphas[h] == 1)
          assert_true(isnan(rep->tau));
        else
          assert_true(fabs((double)rep->tau - tau) <= 1e-5 * m);
        case_scores(c, b, h, t, NULL, s);
        emxi_oracle_entmax(s, n, alphas[h], q, &support);
        for (int64_t j = 0; j < n; j++)
          if (!read[j / c->P]) dropped += q[j];
        if (!(dropped <= (double)rep->delta_bound + 1e-6)) /* the oracle's scores are exact, the library's floats */
          fail_msg("%s, head %d, alpha %g: %g dropped, the report says %g", what, h, alphas[h], dropped,
                   (double)rep->delta_bound);
        if (rep->flags & EMX_REPORT_CERTIFIED) assert_true(rep->delta_bound == 0);
      }
  free(s), free(p), free(q), free(read);
}

static void compare(decode_case *c, const emx_select_desc *select, const double *alphas, bool oracle, const char *what) {
  emx_tensor t = emx_tensor_view((void *)alphas, EMX_F64, 1, (int64_t[]){H});
  c->io.alphas = &t;
  c->io.alpha = 0; /* not looked at */
  outcome mixed = run(c, select);
  c->io.alphas = NULL;
  for (int h = 0; h < H; h++) {
    c->io.alpha = alphas[h];
    outcome single = run(c, select);
    for (int b = 0; b < c->B; b++)
      for (int s = 0; s < c->S; s++) expect_same_row(c, &mixed, &single, case_row(c, b, h, s), what, alphas[h]);
    release(&single);
  }
  if (oracle) check_rows(c, &mixed, select, alphas, what);
  release(&mixed);
}

static void test_heads(void **state) {
  (void)state;
  static const int32_t dtypes[] = {EMX_F32, EMX_BF16, EMX_F16}, data[] = {DATA_IID, DATA_NEEDLE, DATA_TOPIC};
  for (int i = 0; i < 6; i++) {
    const double *alphas = sets[i / 3];
    decode_case c = {.B = 2,
                     .G = i % 2 ? 1 : 2,
                     .H = H,
                     .D = 16 << i % 3,
                     .dtype = dtypes[i % 3],
                     .layout = i % 2,
                     .len = {1100, 90},
                     .alibi = i % 2,
                     .data = data[i % 3],
                     .seed = (uint64_t)i};
    case_open(&c, i % 2 ? one : three);
    emx_select_desc all = case_desc(EMX_SELECT_ALL, 0), topk = case_desc(EMX_SELECT_TOPK, 320),
                    full = case_desc(EMX_SELECT_TOPK, 4096), pages = case_desc(EMX_SELECT_PAGES, 0),
                    gauss = case_desc(EMX_SELECT_GAUSSIAN, 0);
    compare(&c, &all, alphas, true, "ALL");
    compare(&c, &topk, alphas, true, "TOPK");
    compare(&c, &full, alphas, true, "TOPK, all pages");
    for (size_t row = 0; row < rows_of(&c); row++) { /* each head another list: every third page, and the newest */
      int32_t *list = c.pages + (int64_t)row * c.tp.shape[3], n = 0;
      const int32_t last = (int32_t)((c.len[row / H] - 1) / c.P);
      memset(list, 0xff, (size_t)c.tp.shape[3] * sizeof *list);
      for (int32_t p = (int32_t)(row % 3); p < last; p += 3) list[n++] = p;
      list[n++] = last;
      c.n_pages[row] = n;
    }
    compare(&c, &pages, alphas, true, "PAGES");
    if (i < 3) {
      case_close(&c);
      continue;
    }
    compare(&c, &gauss, alphas, true, "GAUSSIAN");
    gauss.tau_mode = EMX_TAU_CORRECTED;
    compare(&c, &gauss, alphas, false, "GAUSSIAN, corrected");
    gauss.tau_mode = EMX_TAU_FIXED;
    compare(&c, &gauss, alphas, false, "GAUSSIAN, fixed");
    case_close(&c);
  }
}

/* Several query tokens, where ALL goes another way than with one. */
static void test_query_tokens(void **state) {
  (void)state;
  decode_case c = {.B = 2, .G = 2, .H = H, .S = 4, .D = 16, .len = {600, 5}, .seed = 9};
  emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
  case_open(&c, three);
  compare(&c, &all, sets[0], true, "ALL, four tokens");
  compare(&c, &all, sets[1], true, "ALL, four tokens");
  case_close(&c);
}

static void test_refusals(void **state) {
  (void)state;
  decode_case c = {.G = 2, .H = H, .D = 16, .len = {200}};
  emx_select_desc all = case_desc(EMX_SELECT_ALL, 0), gauss = case_desc(EMX_SELECT_GAUSSIAN, 0);
  double alphas[H] = {1.5, 1.5, 1.5, 1.5, 1.5, 1.5};
  case_open(&c, one);
  emx_tensor t = emx_tensor_view(alphas, EMX_F64, 1, (int64_t[]){H}), bad;
  c.io.alphas = &t;
  CASE_OK(case_decode(&c, &all));
  static const double wrong[] = {0.5, 0, NAN, 4.5, 1 + 1e-9};
  for (int i = 0; i < 5; i++) {
    alphas[4] = wrong[i];
    fails(case_decode(&c, &all), EMX_ERR_INVALID, "alpha");
  }
  alphas[4] = 1;
  CASE_OK(case_decode(&c, &all));
  fails(emx_decode(one, c.kv, &c.batch, &gauss, &c.io, c.workspace, c.workspace_bytes), EMX_ERR_UNSUPPORTED, "GAUSSIAN");
  bad = emx_tensor_view(alphas, EMX_F64, 1, (int64_t[]){H - 1});
  c.io.alphas = &bad;
  size_t bytes;
  fails(emx_decode_workspace_size(one, c.kv, &all, &c.io, 200, &bytes), EMX_ERR_SHAPE, "alphas");
  bad = emx_tensor_view(alphas, EMX_F32, 1, (int64_t[]){H});
  fails(emx_decode_workspace_size(one, c.kv, &all, &c.io, 200, &bytes), EMX_ERR_DTYPE, "alphas");
  bad = emx_tensor_view(NULL, EMX_F64, 1, (int64_t[]){H}); /* enough for a size, not for a decode */
  CASE_OK(emx_decode_workspace_size(one, c.kv, &all, &c.io, 200, &bytes));
  fails(emx_decode(one, c.kv, &c.batch, &all, &c.io, c.workspace, c.workspace_bytes), EMX_ERR_INVALID, "alphas");
  case_close(&c);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_heads), cmocka_unit_test(test_query_tokens),
                                     cmocka_unit_test(test_refusals)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
