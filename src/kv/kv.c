/* SPDX-License-Identifier: Apache-2.0
 * Pages, sequences, reference counts, copy-on-write. Host bookkeeping only: K, V and summaries are touched by the back end. */
#include "kv/kv.h"

#include <math.h>
#include <string.h>

/* ---- options and memory */

void emx_kv_opts_init_sized(emx_kv_opts *opts, size_t size) {
  const emx_kv_opts defaults = {.dtype = EMX_BF16, .page_size = 16, .layout = EMX_LAYOUT_BHND, .max_seqs = 64};
  emxi_struct_init(opts, size, &defaults, sizeof defaults);
}
void emx_kv_batch_init_sized(emx_kv_batch *batch, size_t size) {
  const emx_kv_batch defaults = {0};
  emxi_struct_init(batch, size, &defaults, sizeof defaults);
}

static emx_status check_opts(const emx_kv_opts *o, const char *who) {
  if (o->dtype != EMX_F32 && o->dtype != EMX_F16 && o->dtype != EMX_BF16)
    return emxi_fail(EMX_ERR_DTYPE, "%s: a cache of %s is not supported, expected f32, f16 or bf16", who,
                     emx_dtype_name(o->dtype));
  if (o->kv_heads < 1) return emxi_fail(EMX_ERR_INVALID, "%s: kv_heads is %d", who, o->kv_heads);
  if (o->head_dim < 16 || o->head_dim > 256)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: head_dim is %d, supported are 16..256", who, o->head_dim);
  if (o->page_size != 16 && o->page_size != 32 && o->page_size != 64)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: page_size is %d, supported are 16, 32 and 64", who, o->page_size);
  if (o->layout != EMX_LAYOUT_BHND && o->layout != EMX_LAYOUT_BNHD)
    return emxi_fail(EMX_ERR_INVALID, "%s: unknown layout %d", who, o->layout);
  if (o->summaries & ~(EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS | EMX_SUMMARY_SKETCH | EMX_SUMMARY_RESIDUAL))
    return emxi_fail(EMX_ERR_INVALID, "%s: unknown bits in summaries (0x%x)", who, (unsigned)o->summaries);
  if ((o->summaries & EMX_SUMMARY_RESIDUAL) && !(o->summaries & EMX_SUMMARY_SKETCH))
    return emxi_fail(EMX_ERR_INVALID, "%s: EMX_SUMMARY_RESIDUAL goes with EMX_SUMMARY_SKETCH", who);
  if (o->max_seqs < 0) return emxi_fail(EMX_ERR_INVALID, "%s: max_seqs is %d", who, o->max_seqs);
  if (o->max_pages < 1 || o->max_pages > INT32_MAX)
    return emxi_fail(EMX_ERR_INVALID, "%s: max_pages is %lld, expected 1..%d", who, (long long)o->max_pages, INT32_MAX);
  if (!o->k_pool != !o->v_pool) return emxi_fail(EMX_ERR_INVALID, "%s: k_pool and v_pool go together", who);
  if (o->kv_memory != EMX_KV_MEMORY_DEVICE && o->kv_memory != EMX_KV_MEMORY_HOST)
    return emxi_fail(EMX_ERR_INVALID, "%s: unknown kv_memory %d", who, o->kv_memory);
  if (o->k_pool && o->kv_memory)
    return emxi_fail(EMX_ERR_INVALID, "%s: kv_memory and k_pool are given: a caller's pool lies where it lies", who);
  if (o->k_pool && o->file) return emxi_fail(EMX_ERR_INVALID, "%s: file and k_pool are given: K and V are in one place", who);
  return EMX_OK;
}

static void *take(emxi_arena *a, int64_t n0, int64_t n1, int64_t n2, size_t size) {
  int64_t n;
  if (__builtin_mul_overflow(n0, n1, &n) || __builtin_mul_overflow(n, n2, &n)) n = -1;
  return emxi_arena_take(a, n, size);
}

static bool pinned(const emx_kv_opts *opts, const emx_ctx *ctx) {
  return opts->kv_memory == EMX_KV_MEMORY_HOST && ctx->device != EMX_DEVICE_CPU;
}

/* Row length of sketches on a GPU: EMXI_CUDA_SKETCH_PADDED of src/cuda/kernels.h. */
static int64_t sketch_padded(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }

/* Carves the two blocks, or counts them: one code path for the size query and for creation. */
static void carve(emx_kv *kv, const emx_kv_opts *opts, const emx_ctx *ctx, emxi_arena *device, emxi_arena *host) {
  const size_t es = emx_dtype_size(kv->dtype);
  const int64_t M = kv->max_pages, G = kv->G, D = kv->D;
  size_t before = device->used;
  if (opts->file) {
    const emxi_kv_file f = {.path = take(host, (int64_t)strlen(opts->file) + 1, 1, 1, 1),
                            .bench = take(host, ctx->threads, 2 * kv->P, D, es),
                            .bench_size = 2 * kv->P * D * (int64_t)es};
    kv->file = take(host, 1, 1, 1, sizeof *kv->file);
    if (kv->file) *kv->file = f;
  } else if (!opts->k_pool && !pinned(opts, ctx)) {
    kv->k = take(device, M, G * kv->P, D, es);
    kv->v = take(device, M, G * kv->P, D, es);
    kv->bytes_kv = (int64_t)(device->used - before);
  }
  before = device->used;
  const bool gpu = ctx->device != EMX_DEVICE_CPU;
  const int64_t wide = gpu ? (D + 15) / 16 * 16 : D;
  kv->moments_ld = (2 * D + 1 + 15) / 16 * 16;
  if (kv->summaries & EMX_SUMMARY_MINMAX) kv->minmax = take(device, M, G, 2 * wide, es);
  if (kv->summaries & EMX_SUMMARY_MOMENTS && !gpu) kv->moments = take(device, M, G, kv->moments_ld, sizeof(float));
  if (kv->summaries & EMX_SUMMARY_MOMENTS && gpu) kv->codes = take(device, M, G, 2 * wide, 1);
  if (kv->summaries && gpu) kv->tails = take(device, M, G, 4, sizeof(float));
  if (!gpu) kv->marks = take(device, M, G, 1, 1);
  if (!gpu) emxi_sketch_carve(kv, device, host);
  if (kv->summaries & EMX_SUMMARY_SKETCH && gpu) {
    const int64_t groups = G * (kv->P / 16), dp = sketch_padded(D);
    kv->sketch_group = take(device, M, groups, 8, sizeof(float));
    kv->sketch_centre = take(device, M, groups, dp, 1);
    kv->sketch_codes = take(device, M, groups, 8 * dp, 1);
    kv->sketch_weights = take(device, G, dp, 1, sizeof(float));
  }
  kv->bytes_summary = (int64_t)(device->used - before);
  if (gpu) kv->device_tables = take(device, kv->max_seqs, M, 1, sizeof(int32_t));
  if (gpu) kv->facts = take(host, 1, 1, 1, sizeof *kv->facts);
  kv->sum_tokens = take(host, M, 1, 1, sizeof(int32_t));
  kv->refs = take(host, M, 1, 1, sizeof(int32_t));
  kv->free_list = take(host, M, 1, 1, sizeof(int32_t));
  kv->stamp = take(host, M, 1, 1, sizeof(uint32_t));
  kv->seqs = take(host, kv->max_seqs, 1, 1, sizeof *kv->seqs);
  kv->copies = take(host, kv->max_seqs, 1, 1, sizeof *kv->copies);
  kv->tables = take(host, kv->max_seqs, M, 1, sizeof(int32_t));
}

static void set_geometry(emx_kv *kv, const emx_kv_opts *o) {
  *kv = (emx_kv){.dtype = o->dtype,
                 .G = o->kv_heads,
                 .D = o->head_dim,
                 .P = o->page_size,
                 .layout = o->layout,
                 .summaries = o->summaries,
                 .max_seqs = o->max_seqs,
                 .max_pages = o->max_pages};
}

static emx_status sizes(const emx_ctx *ctx, const emx_kv_opts *opts, const char *who, size_t *device_bytes, size_t *host_bytes,
                        size_t *pinned_bytes) {
  emx_kv kv;
  emxi_arena device, host;
  EMX_TRY(check_opts(opts, who));
  if (opts->summaries & EMX_SUMMARY_RESIDUAL && ctx->device != EMX_DEVICE_CPU)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: sketches on a GPU have no residual rows; take EMX_SUMMARY_SKETCH alone", who);
  if (opts->file && ctx->device != EMX_DEVICE_CPU)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: a file goes with the CPU; a cache on a GPU has device memory", who);
  set_geometry(&kv, opts);
  emxi_arena_init(&device, NULL, 0);
  emxi_arena_init(&host, NULL, 0);
  carve(&kv, opts, ctx, &device, &host);
  emxi_arena file; /* or pinned memory */
  emxi_arena_init(&file, NULL, 0);
  if (opts->file || pinned(opts, ctx)) take(&file, 2 * kv.max_pages, kv.G * (int64_t)kv.P, kv.D, emx_dtype_size(kv.dtype));
  size_t total;
  if (device.overflow || host.overflow || file.overflow || file.used > PTRDIFF_MAX ||
      !emxi_add(emxi_arena_total(&device), emxi_arena_total(&host), &total) || total > PTRDIFF_MAX)
    return emxi_fail(EMX_ERR_NOMEM,
                     "%s: %lld pages of %d tokens, %d heads and dimension %d are more than the address space holds", who,
                     (long long)opts->max_pages, opts->page_size, opts->kv_heads, opts->head_dim);
  *device_bytes = emxi_arena_total(&device);
  *host_bytes = emxi_arena_total(&host);
  *pinned_bytes = opts->file ? 0 : file.used;
  return EMX_OK;
}

emx_status emx_kv_memory_size(emx_ctx *ctx, const emx_kv_opts *opts, size_t *device_bytes, size_t *host_bytes) {
  if (!ctx) return emxi_fail(EMX_ERR_INVALID, "emx_kv_memory_size: ctx is NULL");
  EMXI_READ_STRUCT(opts, emx_kv_opts);
  size_t device, host, pin;
  EMX_TRY(sizes(ctx, opts, "emx_kv_memory_size", &device, &host, &pin));
  if (device_bytes) *device_bytes = device;
  if (host_bytes) *host_bytes = host + pin + sizeof(emx_kv);
  return EMX_OK;
}

/* Shape and strides of the caller's pool; no two elements may be the same memory. */
static emx_status check_pool(const emx_ctx *ctx, const emx_kv *kv, const emx_tensor *t, const char *name) {
  static const char who[] = "emx_kv_create";
  const bool hnd = kv->layout == EMX_LAYOUT_BHND;
  int64_t shape[4] = {kv->max_pages, hnd ? kv->G : kv->P, hnd ? kv->P : kv->G, kv->D};
  EMX_TRY(emxi_tensor_expect(ctx, t, 4, shape, who, name));
  if (t->dtype != kv->dtype)
    return emxi_fail(EMX_ERR_DTYPE, "%s: %s is %s, the cache %s", who, name, emx_dtype_name(t->dtype), emx_dtype_name(kv->dtype));
  /* Sorted by stride, each dimension must step over all smaller ones. */
  int order[3] = {0, 1, 2};
  for (int i = 0; i < 3; i++)
    for (int j = i + 1; j < 3; j++)
      if (t->stride[order[j]] < t->stride[order[i]]) {
        int swap = order[i];
        order[i] = order[j];
        order[j] = swap;
      }
  int64_t span = kv->D;
  for (int i = 0; i < 3; i++) {
    int d = order[i];
    if (t->shape[d] == 1) continue;
    if (t->stride[d] < span)
      return emxi_fail(EMX_ERR_SHAPE, "%s: %s has stride %lld in dimension %d, elements would overlap", who, name,
                       (long long)t->stride[d], d);
    span += (t->shape[d] - 1) * t->stride[d];
  }
  return EMX_OK;
}

/* Zeros in device memory. */
static emx_status clear(emx_ctx *ctx, void *to, size_t bytes, const char *who) {
  void *zeros = emxi_calloc(bytes);
  if (!zeros) return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", who, bytes);
  const emx_status status = ctx->backend->memory_copy(ctx, to, zeros, bytes);
  emxi_free(zeros);
  return status;
}

static emx_status create(emx_ctx *ctx, const emx_kv_opts *opts, emx_kv **out) {
  static const char who[] = "emx_kv_create";
  size_t device_bytes, host_bytes, pinned_bytes;
  EMX_TRY(sizes(ctx, opts, who, &device_bytes, &host_bytes, &pinned_bytes));
  emx_kv shape;
  set_geometry(&shape, opts);
  if (opts->k_pool) {
    EMX_TRY(check_pool(ctx, &shape, opts->k_pool, "k_pool"));
    EMX_TRY(check_pool(ctx, &shape, opts->v_pool, "v_pool"));
  }
  if (device_bytes + host_bytes > emxi_physical_memory() && device_bytes + host_bytes > (size_t)1 << 20 &&
      ctx->device == EMX_DEVICE_CPU)
    return emxi_fail(EMX_ERR_NOMEM, "%s: %zu bytes are needed, the machine has %zu", who, device_bytes + host_bytes,
                     emxi_physical_memory());
  emx_kv *kv = emxi_alloc(sizeof *kv);
  if (!kv) return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", who, sizeof *kv);
  *kv = shape;
  kv->ctx = ctx;
  emx_status status = ctx->backend->memory_alloc(ctx, device_bytes, &kv->device_block);
  if (status) {
    emxi_free(kv);
    return status;
  }
  if (pinned_bytes) status = ctx->backend->pinned_alloc(ctx, pinned_bytes, &kv->pinned_block);
  if (status) {
    ctx->backend->memory_free(ctx, kv->device_block);
    emxi_free(kv);
    return status;
  }
  kv->host_block = emxi_alloc(host_bytes);
  if (!kv->host_block) {
    if (kv->pinned_block) ctx->backend->pinned_free(ctx, kv->pinned_block);
    ctx->backend->memory_free(ctx, kv->device_block);
    emxi_free(kv);
    return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes of page tables", who, host_bytes);
  }
  emxi_arena device, host;
  emxi_arena_init(&device, kv->device_block, device_bytes);
  emxi_arena_init(&host, kv->host_block, host_bytes);
  carve(kv, opts, ctx, &device, &host);
  const bool hnd = kv->layout == EMX_LAYOUT_BHND;
  if (opts->k_pool) {
    const emx_tensor *k = opts->k_pool, *v = opts->v_pool;
    kv->k = k->data;
    kv->v = v->data;
    kv->k_page = k->stride[0];
    kv->k_head = k->stride[hnd ? 1 : 2];
    kv->k_token = k->stride[hnd ? 2 : 1];
    kv->v_page = v->stride[0];
    kv->v_head = v->stride[hnd ? 1 : 2];
    kv->v_token = v->stride[hnd ? 2 : 1];
    kv->bytes_kv = 2 * kv->max_pages * kv->G * kv->P * kv->D * (int64_t)emx_dtype_size(kv->dtype);
  } else {
    kv->k_page = kv->v_page = (int64_t)kv->P * kv->G * kv->D;
    kv->k_head = kv->v_head = hnd ? (int64_t)kv->P * kv->D : kv->D;
    kv->k_token = kv->v_token = hnd ? kv->D : (int64_t)kv->G * kv->D;
  }
  if (kv->pinned_block) {
    kv->k = kv->pinned_block;
    kv->v = kv->k + pinned_bytes / 2;
    kv->bytes_kv = (int64_t)pinned_bytes;
  }
  if (opts->file) { /* the order in the file is its own affair */
    kv->k_token = kv->v_token = kv->D;
    kv->k_page = kv->v_page = (int64_t)kv->P * kv->D;
    kv->k_head = kv->v_head = kv->max_pages * kv->k_page;
    kv->bytes_kv = 2 * kv->G * kv->k_head * (int64_t)emx_dtype_size(kv->dtype);
    status = emxi_kv_file_open(kv, opts->file, who);
    if (status) {
      kv->file = NULL;
      emx_kv_destroy(kv);
      return status;
    }
  }
  const size_t M = (size_t)kv->max_pages;
  memset(kv->sum_tokens, 0, M * sizeof *kv->sum_tokens);
  memset(kv->refs, 0, M * sizeof *kv->refs);
  if (kv->sketch.number) {
    memset(kv->sketch.number, 0, M * sizeof *kv->sketch.number);
    memset(kv->sketch.super_number, 0,
           (size_t)kv->sketch.supers * (size_t)(EMXI_SUPER / kv->P) * sizeof *kv->sketch.super_number);
  }
  memset(kv->stamp, 0, M * sizeof *kv->stamp);
  memset(kv->seqs, 0, (size_t)kv->max_seqs * sizeof *kv->seqs);
  for (size_t i = 0; i < M; i++) kv->free_list[i] = (int32_t)(M - 1 - i); /* page 0 first */
  kv->n_free = kv->max_pages;
  if (kv->tails) { /* nothing is described yet */
    const size_t heads = M * (size_t)kv->G;
    status = clear(ctx, kv->tails, heads * 4 * sizeof(float), who);
    if (!status && kv->sketch_group) status = clear(ctx, kv->sketch_group, heads * (size_t)(kv->P / 16) * 8 * sizeof(float), who);
    if (!status && kv->sketch_weights)
      status = clear(ctx, kv->sketch_weights, (size_t)kv->G * (size_t)sketch_padded(kv->D) * sizeof(float), who);
    if (status) {
      emx_kv_destroy(kv);
      return status;
    }
  }
  *out = kv;
  return EMX_OK;
}

emx_status emx_kv_create(emx_ctx *ctx, const emx_kv_opts *opts, emx_kv **out) {
  if (!ctx) return emxi_fail(EMX_ERR_INVALID, "emx_kv_create: ctx is NULL");
  EMXI_READ_STRUCT(opts, emx_kv_opts);
  if (!out) return emxi_fail(EMX_ERR_INVALID, "emx_kv_create: out is NULL");
  EMXI_LOCKED(ctx, create(ctx, opts, out));
}

void emx_kv_destroy(emx_kv *kv) {
  if (!kv) return;
  emxi_kv_file_close(kv);
  if (kv->pinned_block) kv->ctx->backend->pinned_free(kv->ctx, kv->pinned_block);
  kv->ctx->backend->memory_free(kv->ctx, kv->device_block);
  emxi_free(kv->host_block);
  emxi_free(kv);
}

emx_status emx_kv_get_info(const emx_kv *kv, emx_kv_info *info) {
  if (!kv) return emxi_fail(EMX_ERR_INVALID, "emx_kv_get_info: kv is NULL");
  EMXI_CHECK_STRUCT(info, emx_kv_info);
  emxi_ctx_lock(kv->ctx);
  const emx_kv_info now = {.dtype = kv->dtype,
                           .kv_heads = kv->G,
                           .head_dim = kv->D,
                           .page_size = kv->P,
                           .layout = kv->layout,
                           .summaries = kv->summaries,
                           .seqs = kv->n_seqs,
                           .max_pages = kv->max_pages,
                           .free_pages = kv->n_free,
                           .bytes_kv = kv->bytes_kv,
                           .bytes_summary = kv->bytes_summary};
  emxi_ctx_unlock(kv->ctx);
  emxi_struct_write(info, &now, sizeof now);
  return EMX_OK;
}

static emx_tensor pool_view(const emx_kv *kv, void *data, int64_t page, int64_t head, int64_t token) {
  const bool hnd = kv->layout == EMX_LAYOUT_BHND;
  return (emx_tensor){.data = data,
                      .dtype = kv->dtype,
                      .device = kv->ctx->device,
                      .ndim = 4,
                      .device_index = kv->ctx->device_index,
                      .shape = {kv->max_pages, hnd ? kv->G : kv->P, hnd ? kv->P : kv->G, kv->D},
                      .stride = {page, hnd ? head : token, hnd ? token : head, 1}};
}
emx_status emx_kv_pool_view(const emx_kv *kv, emx_tensor *k, emx_tensor *v) {
  if (!kv || !k || !v) return emxi_fail(EMX_ERR_INVALID, "emx_kv_pool_view: %s is NULL", !kv ? "kv" : !k ? "k" : "v");
  if (kv->file)
    return emxi_fail(EMX_ERR_UNSUPPORTED,
                     "emx_kv_pool_view: K and V are in a file, not in memory; emx_decode with ALL reads them");
  *k = pool_view(kv, kv->k, kv->k_page, kv->k_head, kv->k_token);
  *v = pool_view(kv, kv->v, kv->v_page, kv->v_head, kv->v_token);
  return EMX_OK;
}

/* ---- pages */

static int32_t *table_of(const emx_kv *kv, int32_t seq) { return kv->tables + (int64_t)seq * kv->max_pages; }

static void release(emx_kv *kv, int32_t page) {
  if (--kv->refs[page] > 0) return;
  kv->sum_tokens[page] = 0;
  kv->free_list[kv->n_free++] = page;
}
static int32_t grab(emx_kv *kv) {
  int32_t page = kv->free_list[--kv->n_free];
  kv->refs[page] = 1;
  kv->sum_tokens[page] = 0;
  if (kv->sketch.number) kv->sketch.number[page] = 0;
  return page;
}

/* ---- sequences */

static emx_status check_seq(const emx_kv *kv, int32_t seq, const char *who) {
  if (seq < 0 || seq >= kv->max_seqs || !kv->seqs[seq].used)
    return emxi_fail(EMX_ERR_STATE, "%s: there is no sequence %d", who, seq);
  return EMX_OK;
}

/* The lowest free id; the sequence is empty. */
static emx_status open_seq(emx_kv *kv, const char *who, int32_t *out) {
  for (int32_t s = 0; s < kv->max_seqs; s++)
    if (!kv->seqs[s].used) {
      kv->seqs[s] = (emxi_kv_seq){.used = true};
      kv->n_seqs++;
      *out = s;
      return EMX_OK;
    }
  return emxi_fail(EMX_ERR_STATE, "%s: all %d sequences of the cache exist (max_seqs)", who, kv->max_seqs);
}
emx_status emx_seq_create(emx_kv *kv, int32_t *seq) {
  if (!kv || !seq) return emxi_fail(EMX_ERR_INVALID, "emx_seq_create: %s is NULL", kv ? "seq" : "kv");
  EMXI_LOCKED(kv->ctx, open_seq(kv, "emx_seq_create", seq));
}

static emx_status fork_seq(emx_kv *kv, int32_t parent, int32_t *seq) {
  int32_t child = -1;
  EMX_TRY(check_seq(kv, parent, "emx_seq_fork"));
  EMX_TRY(open_seq(kv, "emx_seq_fork", &child));
  const int32_t *from = table_of(kv, parent);
  int32_t *to = table_of(kv, child);
  const int64_t n = kv->seqs[parent].n_pages;
  for (int64_t i = 0; i < n; i++) kv->refs[to[i] = from[i]]++;
  kv->seqs[child].n_pages = n;
  kv->seqs[child].length = kv->seqs[parent].length;
  *seq = child;
  return EMX_OK;
}
emx_status emx_seq_fork(emx_kv *kv, int32_t parent, int32_t *seq) {
  if (!kv || !seq) return emxi_fail(EMX_ERR_INVALID, "emx_seq_fork: %s is NULL", kv ? "seq" : "kv");
  EMXI_LOCKED(kv->ctx, fork_seq(kv, parent, seq));
}

void emxi_kv_truncate(emx_kv *kv, int32_t seq, int64_t length) {
  emxi_kv_seq *s = &kv->seqs[seq];
  const int64_t keep = emxi_kv_pages_of(kv, length);
  const int32_t *table = table_of(kv, seq);
  while (s->n_pages > keep) release(kv, table[--s->n_pages]);
  s->length = length;
  if (s->mirrored > keep) s->mirrored = keep;
  /* A page that is cut into no longer is what its summaries say, unless another sequence still sees all of it. */
  if (length % kv->P && kv->refs[table[keep - 1]] == 1 && kv->sum_tokens[table[keep - 1]] != length % kv->P)
    kv->sum_tokens[table[keep - 1]] = 0;
}
static emx_status truncate_seq(emx_kv *kv, int32_t seq, int64_t length) {
  EMX_TRY(check_seq(kv, seq, "emx_seq_truncate"));
  if (length < 0 || length > kv->seqs[seq].length)
    return emxi_fail(EMX_ERR_INVALID, "emx_seq_truncate: length %lld, sequence %d has %lld tokens", (long long)length, seq,
                     (long long)kv->seqs[seq].length);
  emxi_kv_truncate(kv, seq, length);
  return EMX_OK;
}
emx_status emx_seq_truncate(emx_kv *kv, int32_t seq, int64_t length) {
  if (!kv) return emxi_fail(EMX_ERR_INVALID, "emx_seq_truncate: kv is NULL");
  EMXI_LOCKED(kv->ctx, truncate_seq(kv, seq, length));
}

static emx_status destroy_seq(emx_kv *kv, int32_t seq) {
  EMX_TRY(check_seq(kv, seq, "emx_seq_destroy"));
  emxi_kv_truncate(kv, seq, 0);
  kv->seqs[seq].used = false;
  kv->n_seqs--;
  return EMX_OK;
}
emx_status emx_seq_destroy(emx_kv *kv, int32_t seq) {
  if (!kv) return emxi_fail(EMX_ERR_INVALID, "emx_seq_destroy: kv is NULL");
  EMXI_LOCKED(kv->ctx, destroy_seq(kv, seq));
}

void emxi_kv_adopt(emx_kv *kv, const emxi_kv_image *image, int32_t *seqs) {
  const int32_t *number = image->tables;
  for (int32_t q = 0; q < image->seqs; q++) {
    if (seqs[q] < 0) (void)open_seq(kv, "emxi_kv_adopt", &seqs[q]);
    emxi_kv_seq *s = &kv->seqs[seqs[q]];
    s->length = image->lengths[q];
    s->mirrored = 0;
    s->n_pages = emxi_kv_pages_of(kv, s->length);
    for (int64_t i = 0; i < s->n_pages; i++) {
      const int32_t page = emxi_kv_next_page(kv, *number++);
      table_of(kv, seqs[q])[i] = page;
      kv->refs[page]++;
    }
  }
  for (int64_t i = 0; i < image->pages; i++) {
    kv->sum_tokens[emxi_kv_next_page(kv, i)] = image->described[i];
    if (kv->sketch.number) kv->sketch.number[emxi_kv_next_page(kv, i)] = 0;
  }
  kv->n_free -= image->pages;
}

static emx_status seq_length(const emx_kv *kv, int32_t seq, int64_t *length) {
  EMX_TRY(check_seq(kv, seq, "emx_seq_length"));
  *length = kv->seqs[seq].length;
  return EMX_OK;
}
emx_status emx_seq_length(const emx_kv *kv, int32_t seq, int64_t *length) {
  if (!kv || !length) return emxi_fail(EMX_ERR_INVALID, "emx_seq_length: %s is NULL", kv ? "length" : "kv");
  EMXI_LOCKED(kv->ctx, seq_length(kv, seq, length));
}

static emx_status seq_table(const emx_kv *kv, int32_t seq, const int32_t **pages, int64_t *n) {
  EMX_TRY(check_seq(kv, seq, "emx_seq_block_table"));
  *pages = table_of(kv, seq);
  *n = kv->seqs[seq].n_pages;
  return EMX_OK;
}
emx_status emx_seq_block_table(const emx_kv *kv, int32_t seq, const int32_t **pages, int64_t *n) {
  if (!kv || !pages || !n)
    return emxi_fail(EMX_ERR_INVALID, "emx_seq_block_table: %s is NULL", !kv ? "kv" : !pages ? "pages" : "n");
  EMXI_LOCKED(kv->ctx, seq_table(kv, seq, pages, n));
}

/* ---- batches */

emx_status emxi_kv_check_batch(const emx_kv *kv, const emx_kv_batch *batch, const int32_t *n, int64_t extra, const char *who) {
  if (batch->batch < 0) return emxi_fail(EMX_ERR_INVALID, "%s: the batch has %d sequences", who, batch->batch);
  if (batch->seqs && (batch->block_table || batch->seq_lens))
    return emxi_fail(EMX_ERR_INVALID, "%s: the batch names sequences and a block table; give one of the two", who);
  if (batch->batch && !batch->seqs && (!batch->block_table || !batch->seq_lens))
    return emxi_fail(EMX_ERR_INVALID, "%s: the batch has neither seqs nor block_table with seq_lens", who);
  if (batch->batch && !batch->seqs) {
    const int64_t rows[1] = {batch->batch};
    EMX_TRY(emxi_tensor_check(kv->ctx, batch->block_table, 2, who, "block_table"));
    EMX_TRY(emxi_tensor_expect(kv->ctx, batch->seq_lens, 1, rows, who, "seq_lens"));
    if (batch->block_table->shape[0] != rows[0] || batch->block_table->dtype != EMX_I32 || batch->seq_lens->dtype != EMX_I32)
      return emxi_fail(EMX_ERR_SHAPE, "%s: block_table must be i32 [%d, pages] and seq_lens i32 [%d]", who, batch->batch,
                       batch->batch);
  }
  const bool unseen = !batch->seqs && emxi_kv_on_device(kv);
  if (unseen && batch->batch) {
    if (batch->max_len < 1 || batch->max_len > EMXI_KV_MAX_LEN)
      return emxi_fail(EMX_ERR_INVALID, "%s: max_len is %lld; where the host cannot read seq_lens it must bound them, 1..%lld",
                       who, (long long)batch->max_len, (long long)EMXI_KV_MAX_LEN);
    if (emxi_kv_pages_of(kv, batch->max_len) > batch->block_table->shape[1])
      return emxi_fail(EMX_ERR_SHAPE, "%s: max_len of %lld tokens needs %lld pages, the block table has %lld columns", who,
                       (long long)batch->max_len, (long long)emxi_kv_pages_of(kv, batch->max_len),
                       (long long)batch->block_table->shape[1]);
  }
  for (int32_t b = 0; b < batch->batch && !unseen; b++) {
    const int64_t more = n ? n[b] : extra;
    if (batch->seqs) {
      EMX_TRY(check_seq(kv, batch->seqs[b], who));
      for (int32_t c = 0; c < b; c++)
        if (batch->seqs[c] == batch->seqs[b])
          return emxi_fail(EMX_ERR_INVALID, "%s: sequence %d is in the batch twice", who, batch->seqs[b]);
    }
    int64_t length;
    const int32_t *table = emxi_kv_entry(kv, batch, b, &length);
    if (length < 0) return emxi_fail(EMX_ERR_INVALID, "%s: seq_lens[%d] is %lld", who, b, (long long)length);
    length += more;
    if (!batch->seqs && batch->max_len && length > batch->max_len)
      return emxi_fail(EMX_ERR_INVALID, "%s: sequence %d would have %lld tokens, max_len is %lld", who, b, (long long)length,
                       (long long)batch->max_len);
    if (length > EMXI_KV_MAX_LEN)
      return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: sequence %d of the batch would have %lld tokens, at most %lld are supported",
                       who, b, (long long)length, (long long)EMXI_KV_MAX_LEN);
    if (batch->seqs) continue;
    const int64_t pages = emxi_kv_pages_of(kv, length);
    if (pages > batch->block_table->shape[1])
      return emxi_fail(EMX_ERR_SHAPE, "%s: %lld tokens of sequence %d need %lld pages, the block table has %lld columns", who,
                       (long long)length, b, (long long)pages, (long long)batch->block_table->shape[1]);
    for (int64_t i = 0; i < pages; i++)
      if (table[i] < 0 || table[i] >= kv->max_pages)
        return emxi_fail(EMX_ERR_INVALID, "%s: block_table[%d][%lld] is %d, the pool has %lld pages", who, b, (long long)i,
                         table[i], (long long)kv->max_pages);
  }
  return EMX_OK;
}

emx_status emxi_kv_check_new(const emx_ctx *ctx, const emx_kv *kv, int32_t batch, const emx_tensor *k_new,
                             const emx_tensor *v_new, int32_t layout, const char *who, int32_t *t) {
  const bool hnd = layout == EMX_LAYOUT_BHND;
  EMX_TRY(emxi_tensor_check(ctx, k_new, 4, who, "k_new"));
  const int64_t T = k_new->shape[hnd ? 2 : 1];
  int64_t shape[4] = {batch, hnd ? kv->G : T, hnd ? T : kv->G, kv->D};
  EMX_TRY(emxi_tensor_expect(ctx, k_new, 4, shape, who, "k_new"));
  EMX_TRY(emxi_tensor_expect(ctx, v_new, 4, shape, who, "v_new"));
  if (T > EMXI_KV_MAX_LEN) return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: %lld new tokens", who, (long long)T);
  if (k_new->dtype != kv->dtype && k_new->dtype != EMX_F32)
    return emxi_fail(EMX_ERR_DTYPE, "%s: k_new is %s, the cache takes %s or f32", who, emx_dtype_name(k_new->dtype),
                     emx_dtype_name(kv->dtype));
  if (v_new->dtype != k_new->dtype)
    return emxi_fail(EMX_ERR_DTYPE, "%s: v_new is %s, k_new %s", who, emx_dtype_name(v_new->dtype), emx_dtype_name(k_new->dtype));
  *t = (int32_t)T;
  return EMX_OK;
}

static void next_stamp(emx_kv *kv) {
  if (++kv->stamp_now == 0) {
    memset(kv->stamp, 0, (size_t)kv->max_pages * sizeof *kv->stamp);
    kv->stamp_now = 1;
  }
}

/* Every page that the append writes to, once each: two sequences of a caller's table must not write to one page. */
static emx_status check_targets(emx_kv *kv, const emx_kv_batch *batch, const int32_t *n, int32_t t, const char *who) {
  for (int32_t b = 0; b < batch->batch; b++) {
    int64_t length;
    const int32_t *table = emxi_kv_entry(kv, batch, b, &length), more = n ? n[b] : t;
    if (!more) continue;
    for (int64_t i = length / kv->P; i < emxi_kv_pages_of(kv, length + more); i++) {
      if (kv->stamp[table[i]] == kv->stamp_now)
        return emxi_fail(EMX_ERR_INVALID, "%s: the block table lets two places write to page %d", who, table[i]);
      kv->stamp[table[i]] = kv->stamp_now;
    }
  }
  return EMX_OK;
}

static void replace_last(emx_kv *kv, int32_t seq, int32_t page) {
  emxi_kv_seq *s = &kv->seqs[seq];
  table_of(kv, seq)[s->n_pages - 1] = page;
  if (s->mirrored >= s->n_pages) s->mirrored = s->n_pages - 1;
}

/* Gives the library's sequences the pages they will need: a private copy of a shared last page, and new ones. Nothing has changed
 * when there are too few. */
static emx_status reserve(emx_kv *kv, const emx_kv_batch *batch, const int32_t *n, int32_t t, int32_t *n_copies,
                          const char *who) {
  int64_t need = 0;
  int32_t copies = 0;
  for (int32_t b = 0; b < batch->batch; b++) {
    const int32_t seq = batch->seqs[b], more = n ? n[b] : t;
    const emxi_kv_seq *s = &kv->seqs[seq];
    if (!more) continue;
    need += emxi_kv_pages_of(kv, s->length + more) - s->n_pages;
    const int32_t open = (int32_t)(s->length % kv->P);
    if (!open) continue;
    const int32_t last = table_of(kv, seq)[s->n_pages - 1];
    if (kv->refs[last] == 1) continue;
    kv->copies[copies++] = (emxi_kv_copy){.from = last, .tokens = open, .batch = b};
    need++;
  }
  if (need > kv->n_free)
    return emxi_fail(EMX_ERR_STATE, "%s: %lld more pages are needed, %lld are free", who, (long long)need, (long long)kv->n_free);
  for (int32_t c = 0; c < copies; c++) {
    const int32_t seq = batch->seqs[kv->copies[c].batch];
    kv->copies[c].to = grab(kv);
    replace_last(kv, seq, kv->copies[c].to);
  }
  for (int32_t b = 0; b < batch->batch; b++) {
    emxi_kv_seq *s = &kv->seqs[batch->seqs[b]];
    const int64_t want = emxi_kv_pages_of(kv, s->length + (n ? n[b] : t));
    while (s->n_pages < want) table_of(kv, batch->seqs[b])[s->n_pages++] = grab(kv);
  }
  *n_copies = copies;
  return EMX_OK;
}

/* The append has been written: its copies have replaced the shared pages. */
static void commit(emx_kv *kv, int32_t n_copies) {
  for (int32_t c = 0; c < n_copies; c++) release(kv, kv->copies[c].from);
}
/* Takes back what reserve gave. */
static void unreserve(emx_kv *kv, const emx_kv_batch *batch, int32_t n_copies) {
  for (int32_t b = 0; b < batch->batch; b++) emxi_kv_truncate(kv, batch->seqs[b], kv->seqs[batch->seqs[b]].length);
  for (int32_t c = 0; c < n_copies; c++) {
    const int32_t seq = batch->seqs[kv->copies[c].batch];
    release(kv, kv->copies[c].to);
    replace_last(kv, seq, kv->copies[c].from);
  }
}

emx_status emxi_kv_append(emx_ctx *ctx, emx_kv *kv, const emx_kv_batch *batch, const emx_tensor *k_new, const emx_tensor *v_new,
                          const int32_t *n, int32_t layout, const char *who) {
  int32_t t, n_copies = 0;
  if (batch->batch < 0) return emxi_fail(EMX_ERR_INVALID, "%s: the batch has %d sequences", who, batch->batch);
  EMX_TRY(emxi_kv_check_new(ctx, kv, batch->batch, k_new, v_new, layout, who, &t));
  const bool unseen = !batch->seqs && emxi_kv_on_device(kv);
  if (n && batch->seqs && emxi_kv_on_device(kv))
    return emxi_fail(
        EMX_ERR_UNSUPPORTED,
        "%s: n_new is in device memory, and the library's sequences are counted on the host; append them one by one, or "
        "give block_table and seq_lens",
        who);
  for (int32_t b = 0; n && !unseen && b < batch->batch; b++)
    if (n[b] < 0 || n[b] > t) return emxi_fail(EMX_ERR_INVALID, "%s: n[%d] is %d, k_new holds %d tokens", who, b, n[b], t);
  EMX_TRY(emxi_kv_check_batch(kv, batch, n, t, who));
  if (emxi_cancelled(ctx)) return emxi_fail(EMX_ERR_CANCELLED, "%s: cancelled", who);
  next_stamp(kv);
  if (batch->seqs)
    EMX_TRY(reserve(kv, batch, n, t, &n_copies, who));
  else if (!unseen)
    EMX_TRY(check_targets(kv, batch, n, t, who));

  const int head = layout == EMX_LAYOUT_BHND ? 1 : 2, token = 3 - head;
  emxi_kv_write w = {.kv = kv,
                     .batch = batch,
                     .n = n,
                     .t = t,
                     .dtype = k_new->dtype,
                     .k = k_new->data,
                     .v = v_new->data,
                     .k_stride = {k_new->stride[0], k_new->stride[head], k_new->stride[token]},
                     .v_stride = {v_new->stride[0], v_new->stride[head], v_new->stride[token]},
                     .copies = kv->copies,
                     .n_copies = n_copies};
  for (int32_t c = 0; c < n_copies; c++) { /* a copy takes the summaries along if they are of these tokens */
    const emxi_kv_copy *copy = &kv->copies[c];
    kv->sum_tokens[copy->to] = kv->sum_tokens[copy->from] == copy->tokens ? copy->tokens : 0;
  }
  const int32_t mapped = kv->sketch.mapped;
  emx_status status = ctx->backend->kv_write(ctx, &w);
  if (status) kv->sketch.mapped = mapped; /* a cache learns from keys that it holds how to sketch */
  for (int32_t b = 0; b < batch->batch && !unseen; b++) {
    int64_t length;
    const int32_t *table = emxi_kv_entry(kv, batch, b, &length), more = n ? n[b] : t;
    for (int64_t i = length / kv->P; more && i < emxi_kv_pages_of(kv, length + more); i++) {
      const int64_t in_page = length + more - i * kv->P;
      kv->sum_tokens[table[i]] = status ? 0 : (int32_t)(in_page < kv->P ? in_page : kv->P);
      if (kv->sketch.number) kv->sketch.number[table[i]] = 0;
    }
    if (!status && more && kv->sketch.number) emxi_sketch_publish(kv, table, length / kv->P, (length + more) / kv->P);
    if (!status && batch->seqs) kv->seqs[batch->seqs[b]].length += more;
  }
  if (batch->seqs) {
    if (status)
      unreserve(kv, batch, n_copies);
    else
      commit(kv, n_copies);
  }
  return status;
}

emx_status emxi_kv_prepare(emx_ctx *ctx, emx_kv *kv, int32_t seq, int32_t n) {
  static const char who[] = "emx_kv_append";
  int32_t n_copies = 0;
  const emx_kv_batch batch = {.struct_size = sizeof batch, .batch = 1, .seqs = &seq};
  EMX_TRY(emxi_kv_check_batch(kv, &batch, NULL, n, who));
  EMX_TRY(reserve(kv, &batch, NULL, n, &n_copies, who));
  const emxi_kv_write w = {.kv = kv, .batch = &batch, .dtype = kv->dtype, .copies = kv->copies, .n_copies = n_copies};
  const emx_status status = ctx->backend->kv_write(ctx, &w); /* of no tokens */
  if (status)
    unreserve(kv, &batch, n_copies);
  else
    commit(kv, n_copies);
  return status;
}

static emx_status check_owner(const emx_ctx *ctx, const emx_kv *kv, const char *who) {
  if (!ctx || !kv) return emxi_fail(EMX_ERR_INVALID, "%s: %s is NULL", who, ctx ? "kv" : "ctx");
  if (kv->ctx != ctx) return emxi_fail(EMX_ERR_INVALID, "%s: the cache was made from another context", who);
  return EMX_OK;
}

emx_status emx_kv_append(emx_ctx *ctx, emx_kv *kv, const emx_kv_batch *batch, const emx_tensor *k_new, const emx_tensor *v_new,
                         const emx_tensor *n_new) {
  EMX_TRY(check_owner(ctx, kv, "emx_kv_append"));
  EMXI_READ_STRUCT(batch, emx_kv_batch);
  const int32_t *n = NULL;
  if (n_new) {
    const int64_t rows[1] = {batch->batch};
    EMX_TRY(emxi_tensor_expect(ctx, n_new, 1, rows, "emx_kv_append", "n_new"));
    if (n_new->dtype != EMX_I32)
      return emxi_fail(EMX_ERR_DTYPE, "emx_kv_append: n_new is %s, expected i32", emx_dtype_name(n_new->dtype));
    n = n_new->data;
  }
  EMXI_LOCKED(ctx, emxi_kv_append(ctx, kv, batch, k_new, v_new, n, kv->layout, "emx_kv_append"));
}

/* ---- summaries */

static emx_status summarize(emx_ctx *ctx, emx_kv *kv, const int32_t *pages, const int32_t *tokens, int64_t n) {
  static const char who[] = "emx_kv_summarize";
  if (emxi_kv_on_device(kv)) return ctx->backend->kv_summarize(ctx, kv, pages, tokens, n); /* lists in device memory */
  next_stamp(kv);
  for (int64_t i = 0; i < n; i++) {
    if (pages[i] < 0 || pages[i] >= kv->max_pages)
      return emxi_fail(EMX_ERR_INVALID, "%s: pages[%lld] is %d, the pool has %lld pages", who, (long long)i, pages[i],
                       (long long)kv->max_pages);
    if (tokens && (tokens[i] < 0 || tokens[i] > kv->P))
      return emxi_fail(EMX_ERR_INVALID, "%s: tokens[%lld] is %d, a page holds %d", who, (long long)i, tokens[i], kv->P);
    if (kv->stamp[pages[i]] == kv->stamp_now) return emxi_fail(EMX_ERR_INVALID, "%s: page %d is listed twice", who, pages[i]);
    kv->stamp[pages[i]] = kv->stamp_now;
  }
  const int32_t mapped = kv->sketch.mapped;
  emx_status status = ctx->backend->kv_summarize(ctx, kv, pages, tokens, n);
  if (status) kv->sketch.mapped = mapped;
  for (int64_t i = 0; i < n; i++) {
    kv->sum_tokens[pages[i]] = status ? 0 : tokens ? tokens[i] : kv->P;
    if (kv->sketch.number) kv->sketch.number[pages[i]] = 0;
  }
  for (int64_t i = 0, end; !status && kv->sketch.number && i < n; i = end + 1) { /* runs of complete pages */
    for (end = i; end < n && kv->sum_tokens[pages[end]] == kv->P; end++) continue;
    emxi_sketch_publish(kv, pages, i, end);
  }
  return status;
}
emx_status emx_kv_summarize(emx_ctx *ctx, emx_kv *kv, const emx_tensor *pages, const emx_tensor *tokens) {
  static const char who[] = "emx_kv_summarize";
  EMX_TRY(check_owner(ctx, kv, who));
  EMX_TRY(emxi_tensor_check(ctx, pages, 1, who, "pages"));
  if (tokens) EMX_TRY(emxi_tensor_expect(ctx, tokens, 1, pages->shape, who, "tokens"));
  if (pages->dtype != EMX_I32 || (tokens && tokens->dtype != EMX_I32))
    return emxi_fail(EMX_ERR_DTYPE, "%s: pages and tokens must be i32", who);
  EMXI_LOCKED(ctx, summarize(ctx, kv, pages->data, tokens ? tokens->data : NULL, pages->shape[0]));
}

static emx_status get_summary(const emx_kv *kv, int32_t page, int32_t head, emx_kv_summary *out) {
  emxi_kv_facts *f = kv->facts;
  emx_kv_summary s = {.radius = INFINITY};
  if (f) {
    EMX_TRY(kv->ctx->backend->kv_facts(kv->ctx, kv, page, head, f));
    s.tokens = f->tokens;
    if (kv->minmax) s.min = f->box;
    if (kv->codes) s.mean = f->moments;
    if (kv->codes && f->tokens > 0) s.radius = f->radius;
  } else {
    s.tokens = kv->sum_tokens[page];
    s.nonfinite = s.tokens > 0 && (*emxi_kv_mark(kv, page, head) & EMXI_MARK_NONFINITE);
    if (kv->minmax) s.min = emxi_kv_minmax(kv, page, head);
    if (kv->moments) s.mean = emxi_kv_moments(kv, page, head);
    if (s.mean && s.tokens > 0) s.radius = s.mean[2 * kv->D];
  }
  s.valid = s.tokens > 0;
  if (s.min) s.max = (const char *)s.min + (size_t)kv->D * emx_dtype_size(kv->dtype);
  if (s.mean) s.m2 = s.mean + kv->D;
  emxi_struct_write(out, &s, sizeof s);
  return EMX_OK;
}
emx_status emx_kv_get_summary(const emx_kv *kv, int32_t page, int32_t kv_head, emx_kv_summary *out) {
  if (!kv) return emxi_fail(EMX_ERR_INVALID, "emx_kv_get_summary: kv is NULL");
  EMXI_CHECK_STRUCT(out, emx_kv_summary);
  if (page < 0 || page >= kv->max_pages || kv_head < 0 || kv_head >= kv->G)
    return emxi_fail(EMX_ERR_INVALID, "emx_kv_get_summary: page %d, head %d: the cache has %lld pages and %d heads", page,
                     kv_head, (long long)kv->max_pages, kv->G);
  EMXI_LOCKED(kv->ctx, get_summary(kv, page, kv_head, out));
}
