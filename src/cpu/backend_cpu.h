/* SPDX-License-Identifier: Apache-2.0
 * The operations of the CPU back end, one file each; backend_cpu.c makes the table. */
#ifndef EMXI_BACKEND_CPU_H
#define EMXI_BACKEND_CPU_H

#include "base/backend.h"
#include "cpu/table.h"

emx_status emxi_cpu_entmax_forward(emx_ctx *ctx, const struct emxi_rows *rows);
emx_status emxi_cpu_entmax_backward(emx_ctx *ctx, const struct emxi_rows *rows);
emx_status emxi_cpu_entmax_loss(emx_ctx *ctx, const struct emxi_rows *rows);
emx_status emxi_cpu_attn_supports(emx_ctx *ctx, const struct emxi_attn *attn);
emx_status emxi_cpu_attn_run(emx_ctx *ctx, const struct emxi_attn *attn, emxi_arena *arena);
emx_status emxi_cpu_kv_write(emx_ctx *ctx, const struct emxi_kv_write *write);
emx_status emxi_cpu_kv_summarize(emx_ctx *ctx, emx_kv *kv, const int32_t *pages, const int32_t *tokens, int64_t n);
emx_status emxi_cpu_decode_run(emx_ctx *ctx, const struct emxi_decode *decode, emxi_arena *arena);

#endif
