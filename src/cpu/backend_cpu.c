/* SPDX-License-Identifier: Apache-2.0
 * The CPU's entry in the back-end table. */
#define _GNU_SOURCE
#include "cpu/backend_cpu.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

static emx_status cpu_open(emx_ctx *ctx) {
  const emxi_table *k;
  EMX_TRY(emxi_table_choose(&k));
  emxi_cpu *cpu = emxi_calloc(sizeof *cpu);
  if (cpu) cpu->scratch = emxi_calloc((size_t)ctx->threads * sizeof *cpu->scratch);
  if (!cpu || !cpu->scratch) {
    emxi_free(cpu);
    return emxi_fail(EMX_ERR_NOMEM, "emx_ctx_create: no memory for the CPU back end");
  }
  cpu->k = k;
  cpu->k64 = &emxi_table_scalar64;
  ctx->backend_state = cpu;
  return EMX_OK;
}

static void cpu_close(emx_ctx *ctx) {
  emxi_cpu *cpu = emxi_cpu_of(ctx);
  for (int32_t i = 0; i < ctx->threads; i++) emxi_free(cpu->scratch[i].p);
  emxi_free(cpu->scratch);
  emxi_free(cpu);
}

void *emxi_cpu_scratch(emx_ctx *ctx, int32_t worker, size_t size) {
  emxi_cpu *cpu = emxi_cpu_of(ctx);
  if (cpu->scratch[worker].size < size) {
    void *p = emxi_alloc(size);
    if (!p) return NULL;
    emxi_free(cpu->scratch[worker].p);
    cpu->scratch[worker].p = p;
    cpu->scratch[worker].size = size;
  }
  return cpu->scratch[worker].p;
}

static emx_status cpu_sync(emx_ctx *ctx) {
  (void)ctx;
  return EMX_OK;
}

static void cpu_info(emx_ctx *ctx, emx_ctx_info *info) {
  snprintf(info->isa, sizeof info->isa, "%s", emxi_cpu_of(ctx)->k->name);
  snprintf(info->device_name, sizeof info->device_name, "unknown CPU");
  FILE *f = fopen("/proc/cpuinfo", "r");
  if (!f) return;
  char line[512];
  while (fgets(line, sizeof line, f)) {
    char *colon = strchr(line, ':');
    if (!colon || strncmp(line, "model name", 10)) continue;
    colon[strcspn(colon, "\n")] = 0;
    snprintf(info->device_name, sizeof info->device_name, "%.100s", colon[1] ? colon + 2 : "");
    break;
  }
  fclose(f);
}

static emx_status cpu_memory_alloc(emx_ctx *ctx, size_t bytes, void **out) {
  (void)ctx;
  void *p = emxi_alloc(bytes);
  if (!p)
    return emxi_fail(EMX_ERR_NOMEM, "%zu bytes of memory are needed, the machine has %zu in all", bytes, emxi_physical_memory());
#if defined(MADV_HUGEPAGE)
  /* Pages of a cache lie all over its pool: with small pages of memory each one costs a walk of the page table. Advice only. */
  const uintptr_t huge = (uintptr_t)1 << 21, from = ((uintptr_t)p + huge - 1) & ~(huge - 1),
                  to = ((uintptr_t)p + bytes) & ~(huge - 1);
  if (from < to) (void)madvise((void *)from, to - from, MADV_HUGEPAGE);
#endif
  *out = p;
  return EMX_OK;
}
static void cpu_memory_free(emx_ctx *ctx, void *p) {
  (void)ctx;
  emxi_free(p);
}

static emx_status cpu_memory_copy(emx_ctx *ctx, void *to, const void *from, size_t bytes) {
  (void)ctx;
  memcpy(to, from, bytes);
  return EMX_OK;
}

const emxi_backend emxi_backend_cpu = {
    .name = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .sync = cpu_sync,
    .info = cpu_info,
    .memory_alloc = cpu_memory_alloc,
    .memory_free = cpu_memory_free,
    .memory_copy = cpu_memory_copy,
    .entmax_forward = emxi_cpu_entmax_forward,
    .entmax_backward = emxi_cpu_entmax_backward,
    .entmax_loss = emxi_cpu_entmax_loss,
    .attn_supports = emxi_cpu_attn_supports,
    .attn_run = emxi_cpu_attn_run,
    .kv_write = emxi_cpu_kv_write,
    .kv_summarize = emxi_cpu_kv_summarize,
    .decode_run = emxi_cpu_decode_run,
};
