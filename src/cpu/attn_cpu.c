/* SPDX-License-Identifier: Apache-2.0
 * Dense attention on the CPU. */
#include "cpu/backend_cpu.h"
emx_status emxi_cpu_attn_supports(emx_ctx *ctx, const struct emxi_attn *attn) {
  (void)ctx, (void)attn;
  return emxi_fail(EMX_ERR_UNSUPPORTED, "attn");
}
emx_status emxi_cpu_attn_run(emx_ctx *ctx, const struct emxi_attn *attn, emxi_arena *arena) {
  (void)ctx, (void)attn, (void)arena;
  return emxi_fail(EMX_ERR_UNSUPPORTED, "attn");
}
