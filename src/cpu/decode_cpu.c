/* SPDX-License-Identifier: Apache-2.0
 * Selection and decode on the CPU. */
#include "cpu/backend_cpu.h"
emx_status emxi_cpu_decode_run(emx_ctx *ctx, const struct emxi_decode *decode, emxi_arena *arena) {
  (void)ctx, (void)decode, (void)arena;
  return emxi_fail(EMX_ERR_UNSUPPORTED, "decode");
}
