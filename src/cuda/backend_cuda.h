/* SPDX-License-Identifier: Apache-2.0
 * The CUDA back end's host side. */
#ifndef EMXI_BACKEND_CUDA_H
#define EMXI_BACKEND_CUDA_H

#include "attn/attn.h"
#include "base/backend.h"
#include "cuda/kernels.h"
#include "kv/kv.h"

#include <cuda_runtime_api.h>

typedef struct emxi_cuda {
  emxi_cuda_fault *fault; /* pinned, seen by the device */
  int32_t *claimed;       /* device memory: not 0 once a kernel has written the fault */
  int32_t processors;
  bool overlap;   /* compute capability 9 and code for it: kernels of a chain overlap their starts */
  int32_t shared; /* bytes of shared memory that a block may have */
  bool clusters;
} emxi_cuda;

static inline emxi_cuda *emxi_cuda_of(const emx_ctx *ctx) { return ctx->backend_state; }

extern int64_t emxi_cuda_certified_short;

/* Makes the context's device the calling thread's and remembers which was. */
emx_status emxi_cuda_enter(emx_ctx *ctx, int *before);
/* Goes back; with status OK and `launched`, what the launches since have said becomes the status. */
emx_status emxi_cuda_leave(int before, emx_status status, bool launched, const char *who);

emxi_cuda_pool emxi_cuda_pool_of(const emx_kv *kv);
/* Entries [first, first + n) of the batch. Block tables of library sequences must have been brought up to date. */
emxi_cuda_batch emxi_cuda_batch_of(const emx_kv *kv, const emx_kv_batch *batch, int32_t first, int32_t n);
/* The device's copy of the block tables of library sequences. */
emx_status emxi_cuda_update_tables(emx_ctx *ctx, const emx_kv *kv, const emx_kv_batch *batch, const char *who);

emx_status emxi_cuda_entmax_rows(emx_ctx *ctx, const struct emxi_rows *rows, bool backward);
emx_status emxi_cuda_kv_write(emx_ctx *ctx, const emxi_kv_write *w);
emx_status emxi_cuda_kv_read(emx_ctx *ctx, const struct emxi_kv_read *read);
emx_status emxi_cuda_kv_summarize(emx_ctx *ctx, emx_kv *kv, const int32_t *pages, const int32_t *tokens, int64_t n);
emx_status emxi_cuda_kv_facts(emx_ctx *ctx, const emx_kv *kv, int32_t page, int32_t head, struct emxi_kv_facts *out);
emx_status emxi_cuda_attn_supports(emx_ctx *ctx, const emxi_attn *a);
emx_status emxi_cuda_attn_run(emx_ctx *ctx, const emxi_attn *a, emxi_arena *arena);
emx_status emxi_cuda_attn_fault(const emxi_cuda_fault *f, const char *who);
emx_status emxi_cuda_decode_run(emx_ctx *ctx, const emxi_decode *d, emxi_arena *arena);

#endif
