/* SPDX-License-Identifier: Apache-2.0
 * Page writes and summaries on the CPU. */
#include "cpu/backend_cpu.h"
emx_status emxi_cpu_kv_write(emx_ctx *ctx, const struct emxi_kv_write *write) {
  (void)ctx, (void)write;
  return emxi_fail(EMX_ERR_UNSUPPORTED, "kv_write");
}
emx_status emxi_cpu_kv_summarize(emx_ctx *ctx, emx_kv *kv, const int32_t *pages, const int32_t *tokens, int64_t n) {
  (void)ctx, (void)kv, (void)pages, (void)tokens, (void)n;
  return emxi_fail(EMX_ERR_UNSUPPORTED, "kv_summarize");
}
