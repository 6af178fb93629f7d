/* emx_seq_copy between caches of the CPU, in memory and in files. Between the CPU and a GPU: tests/gpu/test_gpu_copy.c. */
#define _DEFAULT_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "copy_case.h"
#include "one_context.h"

static void test_memory(void **state) {
  (void)state;
  emx_ctx *other;
  OK(emx_ctx_create(NULL, &other));
  for (size_t i = 0; i < sizeof COPY_CASES / sizeof *COPY_CASES; i++) {
    copy_there_and_back(ctx, other, &COPY_CASES[i], EMX_SUMMARY_MINMAX);
    copy_there_and_back(ctx, ctx, &COPY_CASES[i], 0);
  }
  emx_ctx_destroy(other);
}
static void test_file(void **state) {
  (void)state;
  char folder[32], path[64];
  assert_true(folder_create(folder));
  snprintf(path, sizeof path, "%s/kv", folder);
  for (size_t i = 0; i < sizeof COPY_CASES / sizeof *COPY_CASES; i++) {
    copy_case c = COPY_CASES[i];
    c.file = path;
    copy_there_and_back(ctx, ctx, &c, 0);
  }
  rmdir(folder);
}
static void test_arguments(void **state) {
  (void)state;
  int32_t copy = 7;
  emx_kv *kv = copy_cache(ctx, &COPY_CASES[1], 0, EMX_F32, 0, 0);
  fails(emx_seq_copy(NULL, 0, kv, &copy), EMX_ERR_INVALID, "from");
  fails(emx_seq_copy(kv, 0, NULL, &copy), EMX_ERR_INVALID, "to");
  fails(emx_seq_copy(kv, 0, kv, NULL), EMX_ERR_INVALID, "copy");
  fails(emx_seq_copy(kv, 0, kv, &copy), EMX_ERR_STATE, "no sequence");
  assert_int_equal(copy, 7);
  emx_kv_destroy(kv);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_memory), cmocka_unit_test(test_file),
                                     cmocka_unit_test(test_arguments)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
