/* SPDX-License-Identifier: Apache-2.0
 * The context: a device, a stream, workers, a lock and a cancel flag. */
#define _GNU_SOURCE
#include "backend.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void emx_ctx_opts_init_sized(emx_ctx_opts *opts, size_t size) {
  const emx_ctx_opts defaults = {.device = EMX_DEVICE_CPU};
  emxi_struct_init(opts, size, &defaults, sizeof defaults);
}

/* Workers by default: EMX_THREADS, else the CPUs of this process's affinity mask. */
static emx_status default_threads(int32_t *out) {
  const char *s = getenv("EMX_THREADS");
  if (s && *s) {
    char *end;
    errno = 0;
    long n = strtol(s, &end, 10);
    if (errno || *end || n < 1 || n > EMXI_MAX_THREADS)
      return emxi_fail(EMX_ERR_INVALID, "EMX_THREADS is '%s', expected 1..%d", s, EMXI_MAX_THREADS);
    *out = (int32_t)n;
    return EMX_OK;
  }
  cpu_set_t set;
  int n = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
  *out = n < 1 ? 1 : n > EMXI_MAX_THREADS ? EMXI_MAX_THREADS : n;
  return EMX_OK;
}

static void init_lock(emx_ctx *ctx) {
  pthread_mutexattr_t attr;
  pthread_mutexattr_init(&attr);
  pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_RECURSIVE);
  pthread_mutex_init(&ctx->lock, &attr);
  pthread_mutexattr_destroy(&attr);
  ctx->pid = getpid();
}

emx_status emx_ctx_create(const emx_ctx_opts *opts, emx_ctx **out) {
  emx_ctx_opts defaults;
  emx_ctx_opts_init(&defaults);
  if (!opts) opts = &defaults;
  EMXI_READ_STRUCT(opts, emx_ctx_opts);
  if (!out) return emxi_fail(EMX_ERR_INVALID, "emx_ctx_create: out is NULL");
  const bool cuda = opts->device == EMX_DEVICE_CUDA;
  if (cuda && !&emxi_backend_cuda)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "emx_ctx_create: this build has no CUDA back end; use the CPU");
  if (!cuda && opts->device != EMX_DEVICE_CPU)
    return emxi_fail(EMX_ERR_INVALID, "emx_ctx_create: unknown device kind %d", opts->device);
  if (opts->parallel_for && !opts->threads)
    return emxi_fail(EMX_ERR_INVALID, "emx_ctx_create: with parallel_for, threads must say how many workers it has");
  if (opts->threads < 0 || opts->threads > EMXI_MAX_THREADS)
    return emxi_fail(EMX_ERR_INVALID, "emx_ctx_create: %d threads, expected 0..%d", opts->threads, EMXI_MAX_THREADS);
  int32_t threads = cuda && !opts->parallel_for ? 1 : opts->threads; /* the device does the work */
  if (!threads) EMX_TRY(default_threads(&threads));

  emx_ctx *ctx = emxi_calloc(sizeof *ctx);
  if (!ctx) return emxi_fail(EMX_ERR_NOMEM, "emx_ctx_create: no memory for %zu bytes", sizeof *ctx);
  ctx->backend = cuda ? &emxi_backend_cuda : &emxi_backend_cpu;
  ctx->device = opts->device;
  ctx->device_index = opts->device_index;
  ctx->stream = opts->stream;
  ctx->threads = threads;
  ctx->parallel_for = opts->parallel_for;
  ctx->parallel_user = opts->parallel_user;
  atomic_init(&ctx->cancelled, 0);
  init_lock(ctx);

  emx_status status = EMX_OK;
  if (!ctx->parallel_for) status = emxi_pool_create(threads, &ctx->pool);
  if (!status) status = ctx->backend->open(ctx);
  if (status) {
    emxi_pool_destroy(ctx->pool);
    pthread_mutex_destroy(&ctx->lock);
    emxi_free(ctx);
    return status;
  }
  *out = ctx;
  return EMX_OK;
}

void emx_ctx_destroy(emx_ctx *ctx) {
  if (!ctx) return;
  ctx->backend->close(ctx);
  emxi_pool_destroy(ctx->pool);
  pthread_mutex_destroy(&ctx->lock);
  emxi_free(ctx);
}

emx_status emx_ctx_get_info(emx_ctx *ctx, emx_ctx_info *info) {
  if (!ctx) return emxi_fail(EMX_ERR_INVALID, "emx_ctx_get_info: ctx is NULL");
  EMXI_CHECK_STRUCT(info, emx_ctx_info);
  emx_ctx_info now = {.device = ctx->device, .threads = ctx->threads};
  ctx->backend->info(ctx, &now);
  emxi_struct_write(info, &now, sizeof now);
  return EMX_OK;
}
emx_status emx_ctx_sync(emx_ctx *ctx) {
  if (!ctx) return emxi_fail(EMX_ERR_INVALID, "emx_ctx_sync: ctx is NULL");
  EMXI_LOCKED(ctx, ctx->backend->sync(ctx));
}
emx_status emx_ctx_set_stream(emx_ctx *ctx, void *stream) {
  if (!ctx) return emxi_fail(EMX_ERR_INVALID, "emx_ctx_set_stream: ctx is NULL");
  emxi_ctx_lock(ctx);
  ctx->stream = stream;
  emxi_ctx_unlock(ctx);
  return EMX_OK;
}
void emx_ctx_cancel(emx_ctx *ctx) {
  if (ctx) atomic_store(&ctx->cancelled, 1);
}
void emx_ctx_resume(emx_ctx *ctx) {
  if (ctx) atomic_store(&ctx->cancelled, 0);
}

void emxi_ctx_lock(emx_ctx *ctx) {
  if (ctx->pid != getpid()) init_lock(ctx); /* a forked child has one thread, and the lock may have been another's */
  pthread_mutex_lock(&ctx->lock);
}
void emxi_ctx_unlock(emx_ctx *ctx) { pthread_mutex_unlock(&ctx->lock); }

struct guarded {
  emx_ctx *ctx;
  emx_task_fn fn;
  void *arg;
  atomic_int bad_worker;
};
static void run_guarded(void *arg, int64_t i, int32_t worker) {
  struct guarded *g = arg;
  if (worker < 0 || worker >= g->ctx->threads) { /* a caller's parallel_for that has more workers than it said */
    atomic_store(&g->bad_worker, 1);
    return;
  }
  if (!emxi_cancelled(g->ctx)) g->fn(g->arg, i, worker);
}

emx_status emxi_parallel(emx_ctx *ctx, int64_t n, emx_task_fn fn, void *arg) {
  struct guarded g = {.ctx = ctx, .fn = fn, .arg = arg};
  atomic_init(&g.bad_worker, 0);
  if (n > 0) {
    if (ctx->parallel_for)
      ctx->parallel_for(ctx->parallel_user, n, run_guarded, &g);
    else
      emxi_pool_run(ctx->pool, n, run_guarded, &g);
  }
  if (atomic_load(&g.bad_worker))
    return emxi_fail(EMX_ERR_INVALID, "parallel_for used a worker index outside 0..%d", ctx->threads - 1);
  if (emxi_cancelled(ctx)) return emxi_fail(EMX_ERR_CANCELLED, "cancelled");
  return EMX_OK;
}
