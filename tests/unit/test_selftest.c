#define _GNU_SOURCE /* setenv */
/* `emx selftest` can fail: every stored value that is changed is noticed, on every kernel table; and the stored values, which a
 * Python program made, agree with the library's float64 oracle, which shares nothing with it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "cpu/table.h"
#include "entmax/entmax.h"
#include "golden.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct tally {
  int checks, failed;
  char first[64]; /* the first that failed */
} tally;
static void count(void *user, const char *what, double error, double limit) {
  tally *t = user;
  t->checks++;
  if (error <= limit) return;
  if (!t->failed++) snprintf(t->first, sizeof t->first, "%s", what);
}
static tally check(emx_ctx *ctx, const golden *want) {
  tally t = {0};
  assert_int_equal(golden_check(ctx, want, count, &t), EMX_OK);
  return t;
}

static void test_right_on_every_table(void **state) {
  (void)state;
  int checks = 0;
  for (int i = 0; emxi_table_available(i); i++) {
    setenv("EMX_ISA", emxi_table_available(i)->name, 1);
    emx_ctx *ctx;
    assert_int_equal(emx_ctx_create(NULL, &ctx), EMX_OK);
    tally t = check(ctx, &golden_values);
    if (t.failed) fail_msg("%s: %d failed, first %s", emxi_table_available(i)->name, t.failed, t.first);
    assert_true(t.checks > 30 && (!checks || t.checks == checks));
    checks = t.checks;
    emx_ctx_destroy(ctx);
  }
  unsetenv("EMX_ISA");
}

/* Changes element i of a member by `by`, and expects a failure whose name begins with `what`. */
static void spoil(emx_ctx *ctx, double *member, int i, double by, const golden *copy, const char *what) {
  const double before = member[i];
  member[i] += by;
  tally t = check(ctx, copy);
  if (!t.failed) fail_msg("%s: element %d changed by %g was not noticed", what, i, by);
  if (strncmp(t.first, what, strlen(what))) fail_msg("%s: element %d changed by %g was reported as %s", what, i, by, t.first);
  member[i] = before;
}
static void test_wrong_values_are_noticed(void **state) {
  (void)state;
  emx_ctx *ctx;
  assert_int_equal(emx_ctx_create(NULL, &ctx), EMX_OK);
  golden copy = golden_values;
  /* 1e-5 is ten times the tolerance; what is compared in float64 is also compared in float */
  for (int i = 0; i < GOLDEN_MAP_ROWS * GOLDEN_MAP_N; i++) spoil(ctx, copy.map_p, i, i % 2 ? 1e-5 : -1e-5, &copy, "map");
  for (int i = 1; i < GOLDEN_MAP_ROWS; i++) spoil(ctx, copy.map_tau, i, 1e-5, &copy, "map"); /* alpha = 1 has no tau */
  for (int i = 0; i < GOLDEN_ATTN_ROWS * GOLDEN_D; i++) spoil(ctx, copy.attn_o, i, -1e-5, &copy, "attention");
  for (int i = 0; i < GOLDEN_ATTN_ROWS; i++) spoil(ctx, copy.attn_tau, i, 1e-5, &copy, "attention");
  for (int i = 0; i < GOLDEN_DECODE_ROWS * GOLDEN_D; i++) spoil(ctx, copy.decode_o, i, 1e-5, &copy, "decode");
  for (int i = 2; i < GOLDEN_DECODE_ROWS; i++) spoil(ctx, copy.decode_tau, i, -1e-5, &copy, "decode");
  spoil(ctx, copy.map_p, 3, NAN, &copy, "map");
  spoil(ctx, copy.attn_o, 3, NAN, &copy, "attention");
  spoil(ctx, copy.decode_o, 3, NAN, &copy, "decode");
  /* A page that top-k did not read for head 0, whose answer it certified, would have had a weight; and so much weight on a page
   * that head 1 did not read that its bound does not cover it. A page that was read may have any. */
  double *certified = copy.decode_mass + 2 * GOLDEN_DECODE_PAGES, *bounded = copy.decode_mass + 3 * GOLDEN_DECODE_PAGES;
  int noticed[2] = {0};
  for (int page = 0; page < GOLDEN_DECODE_PAGES; page++)
    for (int h = 0; h < 2; h++) {
      double *mass = (h ? bounded : certified) + page, before = *mass;
      *mass += h ? 2 : 1e-5;
      tally t = check(ctx, &copy);
      if (t.failed) {
        noticed[h]++;
        if (strncmp(t.first, "certificate topk", 16)) fail_msg("page %d of head %d was reported as %s", page, h, t.first);
      }
      *mass = before;
    }
  assert_int_equal(noticed[0], GOLDEN_DECODE_PAGES - 3); /* a budget of 48 tokens is three pages of 16 */
  assert_int_equal(noticed[1], GOLDEN_DECODE_PAGES - 3);
  for (int i = 0; i < GOLDEN_MAP_ROWS; i++) {
    copy.map_support[i]++;
    assert_true(check(ctx, &copy).failed > 0);
    copy.map_support[i]--;
  }
  for (int i = 0; i < GOLDEN_ATTN_ROWS; i++) {
    copy.attn_support[i]--;
    assert_true(check(ctx, &copy).failed > 0);
    copy.attn_support[i]++;
  }
  for (int i = 0; i < GOLDEN_DECODE_ROWS; i++) {
    copy.decode_support[i]++;
    assert_true(check(ctx, &copy).failed > 0);
    copy.decode_support[i]--;
  }
  assert_int_equal(check(ctx, &copy).failed, 0);
  emx_ctx_destroy(ctx);
}

/* The rows of scripts/golden.py, made here again. */
static void test_stored_rows_agree_with_the_oracle(void **state) {
  (void)state;
  static const double alphas[GOLDEN_MAP_ROWS] = {1, 1.25, 1.5, 2, 4};
  for (int a = 0; a < GOLDEN_MAP_ROWS; a++) {
    double s[GOLDEN_MAP_N], p[GOLDEN_MAP_N];
    uint32_t x = 11 + (uint32_t)a;
    for (int i = 0; i < GOLDEN_MAP_N; i++) {
      x = x * 1664525u + 1013904223u;
      s[i] = ((int)(x >> 24) - 128) / 32.0;
    }
    int64_t support;
    const double tau = emxi_oracle_entmax(s, GOLDEN_MAP_N, alphas[a], p, &support);
    for (int i = 0; i < GOLDEN_MAP_N; i++) assert_true(fabs(p[i] - golden_values.map_p[a * GOLDEN_MAP_N + i]) < 1e-14);
    if (alphas[a] > 1) assert_true(fabs(tau - golden_values.map_tau[a]) < 1e-14 * 16);
    assert_int_equal(support, golden_values.map_support[a]);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_right_on_every_table), cmocka_unit_test(test_wrong_values_are_noticed),
                                     cmocka_unit_test(test_stored_rows_agree_with_the_oracle)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
