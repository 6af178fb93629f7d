/* emx_seq_copy: a sequence from the CPU to a GPU and back. */
#define _DEFAULT_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "copy_case.h"
#include "gpu_case.h"

static void test_there_and_back(void **state) {
  (void)state;
  for (size_t i = 0; i < sizeof COPY_CASES / sizeof *COPY_CASES; i++) {
    copy_there_and_back(cpu, gpu, &COPY_CASES[i], 0);
    copy_there_and_back(cpu, gpu, &COPY_CASES[i], EMX_SUMMARY_MINMAX | EMX_SUMMARY_SKETCH);
  }
}

int main(void) {
  const int missing = gpu_missing();
  if (missing) return missing;
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_there_and_back)};
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  emx_ctx_destroy(gpu);
  emx_ctx_destroy(cpu);
  return failed;
}
