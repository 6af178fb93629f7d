/* SPDX-License-Identifier: Apache-2.0
 * The shipped text model says the same with the certified selector as with all keys: every logit of every step, bit for bit, with
 * the ladder taken at lengths where it would not pay. `test_identity FILE BYTES TOKENS` is the long run: the first BYTES of FILE
 * are the context; one line of JSON says what was done. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <emx_model.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "cpu/certified.h"

enum { VOCAB = 256 };
static const char *file = EMX_SOURCE "/LICENSE";
static int64_t bytes = 3000, tokens = 200;
static bool loud; /* the long run */

static void all_and_certified(void **state) {
  (void)state;
  emx_ctx *ctx;
  emx_model *model;
  emx_session *all, *some;
  emxi_certified_short = 0;
  OK(emx_ctx_create(NULL, &ctx));
  OK(emx_model_open(ctx, EMX_SOURCE "/models/text-entmax", &model));
  int32_t *text = malloc((size_t)bytes * sizeof *text);
  FILE *in = fopen(file, "rb");
  assert_non_null(text);
  assert_non_null(in);
  for (int64_t i = 0; i < bytes; i++) {
    text[i] = getc(in);
    assert_int_not_equal(text[i], EOF); /* FILE has fewer than BYTES bytes */
  }
  fclose(in);
  emx_session_opts opts;
  emx_session_opts_init(&opts);
  opts.max_tokens = bytes + 2 * (tokens + opts.page_size);
  opts.max_sessions = 2;
  opts.summaries |= EMX_SUMMARY_SKETCH | EMX_SUMMARY_RESIDUAL;
  OK(emx_session_create(model, &opts, &all));
  float a[VOCAB], b[VOCAB];
  OK(emx_session_prefill(all, text, bytes, NULL, a, NULL, NULL));
  OK(emx_session_fork(all, &some));
  emx_select_desc certified;
  emx_select_desc_init(&certified);
  certified.kind = EMX_SELECT_CERTIFIED;
  OK(emx_session_set_select(some, &certified));
  emx_sample_opts sample; /* drawn, so that the text does not go in circles */
  emx_sample_opts_init(&sample);
  sample.temperature = 1;
  int64_t same = 0;
  for (int64_t i = 0; i < tokens; i++) {
    int32_t token;
    OK(emx_sample(a, VOCAB, &sample, i, &token));
    OK(emx_session_decode(all, token, a));
    OK(emx_session_decode(some, token, b));
    same += !memcmp(a, b, sizeof a);
  }
  emx_session_stats st = {.struct_size = sizeof st};
  OK(emx_session_get_stats(some, &st));
  if (loud)
    printf(
        "{\"file\":\"%s\",\"context\":%lld,\"tokens\":%lld,\"same_logits\":%lld,\"rows\":%lld,\"certified\":%lld,"
        "\"paths\":{\"all\":%lld,\"ladder\":%lld},\"bytes_share\":%.4f,\"support_mean\":%.1f,\"delta_bound_max\":%g}\n",
        strrchr(file, '/') ? strrchr(file, '/') + 1 : file, (long long)bytes, (long long)tokens, (long long)same,
        (long long)st.rows, (long long)st.certified, (long long)st.paths[EMX_PATH_ALL], (long long)st.paths[EMX_PATH_LADDER],
        (double)(st.bytes_k + st.bytes_v + st.bytes_meta) / (double)st.bytes_full, st.support_sum / (double)st.rows,
        st.delta_bound_max);
  assert_int_equal(same, tokens);
  assert_int_equal(st.certified, st.rows);
  assert_int_equal(st.rows, tokens * 4 * 6);
  assert_int_equal(st.paths[EMX_PATH_ALL] + st.paths[EMX_PATH_LADDER], st.rows);
  assert_true(2 * st.paths[EMX_PATH_LADDER] > st.rows); /* else the identity says little; flat heads leave the ladder */
  free(text);
  emx_session_destroy(some);
  emx_session_destroy(all);
  emx_model_close(model);
  emx_ctx_destroy(ctx);
}

int main(int argc, char **argv) {
  if (argc != 1 && argc != 4) {
    fprintf(stderr, "usage: test_identity [FILE BYTES TOKENS]\n");
    return 2;
  }
  if (argc == 4) {
    file = argv[1];
    bytes = strtoll(argv[2], NULL, 10);
    tokens = strtoll(argv[3], NULL, 10);
    loud = true;
  }
  const struct CMUnitTest tests[] = {cmocka_unit_test(all_and_certified)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
