/* SPDX-License-Identifier: Apache-2.0
 * Which kernel table runs. __builtin_cpu_supports reads CPUID and, through XGETBV, whether the operating system saves the
 * registers. */
#include "cpu/table.h"

#include <stdlib.h>
#include <string.h>

static bool can_run(const emxi_table *t) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (t == &emxi_table_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
  if (t == &emxi_table_avx2) {
    /* F16C has no name in older compilers' cpu_supports; every CPU with AVX2 and FMA has it, and OS support is AVX's own. */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return t == &emxi_table_scalar;
}

static const emxi_table *const all[] = {
#if defined(__x86_64__)
    &emxi_table_avx512, &emxi_table_avx2,
#endif
    &emxi_table_scalar};

const emxi_table *emxi_table_available(int i) {
  for (size_t t = 0; t < sizeof all / sizeof *all; t++)
    if (can_run(all[t]) && i-- == 0) return all[t];
  return NULL;
}

emx_status emxi_table_choose(const emxi_table **out) {
  const char *want = getenv("EMX_ISA");
  if (!want || !*want) {
    *out = emxi_table_available(0);
    return EMX_OK;
  }
  for (size_t t = 0; t < sizeof all / sizeof *all; t++)
    if (!strcmp(all[t]->name, want)) {
      if (!can_run(all[t])) return emxi_fail(EMX_ERR_UNSUPPORTED, "EMX_ISA=%s: this CPU or operating system cannot run it", want);
      *out = all[t];
      return EMX_OK;
    }
  return emxi_fail(EMX_ERR_INVALID, "EMX_ISA is '%s', expected scalar, avx2 or avx512", want);
}
