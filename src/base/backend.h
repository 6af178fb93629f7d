/* SPDX-License-Identifier: Apache-2.0
 * The back-end table: what a device must be able to do. Coarse on purpose, so that a GPU can fuse; nothing element-wise crosses
 * it. Arguments have been validated and resolved by the caller (src/entmax, src/attn, src/kv); a back end only computes. */
#ifndef EMXI_BACKEND_H
#define EMXI_BACKEND_H

#include "base.h"

/* Resolved views; see the headers that define them. */
struct emxi_rows;     /* src/entmax/entmax.h */
struct emxi_attn;     /* src/attn/attn.h */
struct emxi_kv_write; /* src/kv/kv.h */
struct emxi_kv_read;  /* src/kv/kv.h */
struct emxi_decode;   /* src/kv/kv.h */
struct emxi_kv_facts; /* src/kv/kv.h */
struct emxi_blocks;   /* src/model/block.h */

typedef struct emxi_backend {
  const char *name;
  emx_status (*open)(emx_ctx *ctx);
  void (*close)(emx_ctx *ctx);
  emx_status (*sync)(emx_ctx *ctx);
  void (*info)(emx_ctx *ctx, emx_ctx_info *info);
  emx_status (*memory_alloc)(emx_ctx *ctx, size_t bytes, void **out); /* device memory; NOMEM with the bytes */
  void (*memory_free)(emx_ctx *ctx, void *p);
  /* Host memory, pinned, that the device reads and writes by the same address; NULL on the CPU. NOMEM with the bytes. */
  emx_status (*pinned_alloc)(emx_ctx *ctx, size_t bytes, void **out);
  void (*pinned_free)(emx_ctx *ctx, void *p);
  /* Between host and device memory or within either, behind what the context has been asked for; has been done on return. */
  emx_status (*memory_copy)(emx_ctx *ctx, void *to, const void *from, size_t bytes);
  emx_status (*entmax_forward)(emx_ctx *ctx, const struct emxi_rows *rows);
  emx_status (*entmax_backward)(emx_ctx *ctx, const struct emxi_rows *rows);
  emx_status (*entmax_loss)(emx_ctx *ctx, const struct emxi_rows *rows);
  /* EMX_OK, or EMX_ERR_UNSUPPORTED with the reason and the nearest thing that is supported. */
  emx_status (*attn_supports)(emx_ctx *ctx, const struct emxi_attn *attn);
  /* Counts with an arena that has no base, computes with one that has. */
  emx_status (*attn_run)(emx_ctx *ctx, const struct emxi_attn *attn, emxi_arena *arena);
  emx_status (*kv_write)(emx_ctx *ctx, const struct emxi_kv_write *write); /* copy pages, store tokens, update summaries */
  emx_status (*kv_summarize)(emx_ctx *ctx, emx_kv *kv, const int32_t *pages, const int32_t *tokens, int64_t n);
  emx_status (*kv_read)(emx_ctx *ctx, const struct emxi_kv_read *read); /* NULL on the CPU, where the host reads for itself */
  /* NULL on the CPU, where summaries are read in place. */
  emx_status (*kv_facts)(emx_ctx *ctx, const emx_kv *kv, int32_t page, int32_t head, struct emxi_kv_facts *out);
  /* Select and/or decode: counts or computes, as attn_run. */
  emx_status (*decode_run)(emx_ctx *ctx, const struct emxi_decode *decode, emxi_arena *arena);
  /* Layers of models, for the model library, which has the CPU's itself; NULL: not in this build. */
  const struct emxi_blocks *blocks;
} emxi_backend;

extern const emxi_backend emxi_backend_cpu;
/* In builds with CUDA, and there in the shared library and the tool; elsewhere its address is NULL. */
extern const emxi_backend emxi_backend_cuda __attribute__((weak));

#endif
