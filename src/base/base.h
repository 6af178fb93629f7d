/* SPDX-License-Identifier: Apache-2.0
 * What every part of the library stands on: status, memory, arena, context, threads. */
#ifndef EMXI_BASE_H
#define EMXI_BASE_H

#include "layouts.h"

#include <emx.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Exported for libentmax_model, which shares the error text, the allocator, the arena and the workers; not part of the ABI. */
#define EMXI_SHARED EMX_API

#define EMXI_MAX_THREADS 256
#define EMXI_ALIGN 64

/* Stores the sentence for emx_last_error and returns `status`. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
EMXI_SHARED emx_status
emxi_fail(emx_status status, const char *format, ...);

#define EMX_TRY(call)                            \
  do {                                           \
    emx_status emx_try_status_ = (call);         \
    if (emx_try_status_) return emx_try_status_; \
  } while (0)

/* -- structs of callers, which may have been compiled with an older or a newer header (docs/design.md, "Versions of structs") */

/* Defaults into a caller's struct of `size` bytes. */
EMXI_SHARED void emxi_struct_init(void *p, size_t size, const void *defaults, size_t known);
/* What functions read: `out` [size] is the struct as this version has it, with zeros where p ends earlier. Refused: one shorter
 * than `first`, the size in the first header that had it, and one with anything in fields that this version does not have. */
EMXI_SHARED emx_status emxi_struct_read(const void *p, size_t first, size_t size, void *out, const char *who, const char *type);
/* What functions fill: p says how much of it there is; then as much of `from` [size] goes there, and zeros into the rest. */
EMXI_SHARED emx_status emxi_struct_check(const void *p, size_t first, const char *who, const char *type);
EMXI_SHARED void emxi_struct_write(void *p, const void *from, size_t size);

/* Bytes of a struct up to the last field of its first header (layouts.h). */
#define EMXI_FIRST_SIZE(type) EMXI_FIELD_END(type, EMXI_LAST_##type)
#define EMXI_FIELD_END(type, field) (offsetof(type, field) + sizeof(((type *)0)->field))
/* Puts the struct as this version has it in the place of the parameter p. */
#define EMXI_READ_STRUCT(p, type)                                                                       \
  type p##_;                                                                                            \
  _Static_assert(EMXI_FIRST_SIZE(type) % _Alignof(type) == 0, "an old " #type " would end in padding"); \
  EMX_TRY(emxi_struct_read(p, EMXI_FIRST_SIZE(type), sizeof(type), &p##_, __func__, #type));            \
  p = &p##_
#define EMXI_CHECK_STRUCT(p, type) EMX_TRY(emxi_struct_check(p, EMXI_FIRST_SIZE(type), __func__, #type))

/* -- memory: 64-byte aligned. emxi_alloc(0) gives a valid pointer. A request beyond the machine's physical memory is refused at
 * once, so that an absurd size never reaches the OOM killer. */
EMXI_SHARED void *emxi_alloc(size_t size);
EMXI_SHARED void *emxi_calloc(size_t size);
EMXI_SHARED void emxi_free(void *p);
/* Tests: the n-th allocation from now on fails (0: the next); -1: none. */
void emxi_alloc_fail_after(int64_t n);
EMXI_SHARED size_t emxi_physical_memory(void);

/* *out = a * b, false when that overflows. */
static inline bool emxi_mul(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }
static inline bool emxi_add(size_t a, size_t b, size_t *out) { return !__builtin_add_overflow(a, b, out); }

/* -- arena: carves a caller's workspace. With base NULL it only counts, so the size query and the carving are one code path. */
typedef struct emxi_arena {
  char *base;
  size_t used, size;
  bool overflow;
} emxi_arena;
EMXI_SHARED void emxi_arena_init(emxi_arena *a, void *base, size_t size);
/* count * size bytes, 64-byte aligned; NULL while counting, or when it does not fit (a->overflow). */
EMXI_SHARED void *emxi_arena_take(emxi_arena *a, int64_t count, size_t size);
/* Bytes to ask the caller for, with room to align an unaligned buffer. */
EMXI_SHARED size_t emxi_arena_total(const emxi_arena *a);
/* EMX_ERR_WORKSPACE if anything did not fit. */
EMXI_SHARED emx_status emxi_arena_check(const emxi_arena *a, const char *who);

/* -- tensors */
bool emxi_is_float(int32_t dtype);
/* ndim, known dtype, non-negative shape, positive strides, contiguous last dimension, device of ctx. For size queries. */
EMXI_SHARED emx_status emxi_tensor_layout(const emx_ctx *ctx, const emx_tensor *t, int32_t ndim, const char *who,
                                          const char *name);
EMXI_SHARED emx_status emxi_tensor_shape(const emx_tensor *t, int32_t ndim, const int64_t *shape, const char *who,
                                         const char *name);
/* The layout, and data unless empty. */
EMXI_SHARED emx_status emxi_tensor_check(const emx_ctx *ctx, const emx_tensor *t, int32_t ndim, const char *who,
                                         const char *name);
/* Additionally the shape. */
EMXI_SHARED emx_status emxi_tensor_expect(const emx_ctx *ctx, const emx_tensor *t, int32_t ndim, const int64_t *shape,
                                          const char *who, const char *name);

/* 1, or 1 + 1e-6 to 4: closer to 1 the exponent 1/(alpha-1) leaves double's reach, and softmax is within every float of it. */
EMXI_SHARED emx_status emxi_alpha_check(double alpha, const char *who);

/* -- threads */
typedef struct emxi_pool emxi_pool;
emx_status emxi_pool_create(int32_t threads, emxi_pool **out);
void emxi_pool_destroy(emxi_pool *pool);
/* Worker 0 is the caller. Rebuilds its threads in a forked child. */
void emxi_pool_run(emxi_pool *pool, int64_t n, emx_task_fn task, void *arg);

/* -- context */
struct emxi_backend;
struct emx_ctx {
  const struct emxi_backend *backend;
  void *backend_state; /* owned by the back end: the CPU keeps its kernel table and mapping scratch there */
  int32_t device, device_index, threads;
  void *stream;
  emxi_pool *pool; /* NULL: the caller's parallel_for */
  emx_parallel_for_fn parallel_for;
  void *parallel_user;
  pthread_mutex_t lock; /* recursive: emx_decode calls emx_kv_append */
  pid_t pid;            /* whose lock: a forked child starts with a fresh one */
  atomic_int cancelled;
};
/* Runs fn(arg, i, worker) for i < n over the context's workers, polling the cancel flag before each i. */
EMXI_SHARED emx_status emxi_parallel(emx_ctx *ctx, int64_t n, emx_task_fn fn, void *arg);
/* Public entries hold the lock: two threads on one context are serialised. */
EMXI_SHARED void emxi_ctx_lock(emx_ctx *ctx);
EMXI_SHARED void emxi_ctx_unlock(emx_ctx *ctx);
static inline bool emxi_cancelled(emx_ctx *ctx) { return atomic_load_explicit(&ctx->cancelled, memory_order_relaxed) != 0; }
#define EMXI_LOCKED(ctx, call)              \
  do {                                      \
    emxi_ctx_lock(ctx);                     \
    emx_status emx_locked_status_ = (call); \
    emxi_ctx_unlock(ctx);                   \
    return emx_locked_status_;              \
  } while (0)

#endif
