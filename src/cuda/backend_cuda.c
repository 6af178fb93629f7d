/* SPDX-License-Identifier: Apache-2.0
 * The GPU's entry in the back-end table: device, stream, memory, faults. The CUDA run-time is linked in and finds the driver when it is
 * first used, so a machine without one loads the library and gets CUDA's own sentence from emx_ctx_create.
 *
 * No call here waits for the device but sync, copy and the allocations of creation. */
#include "cuda/backend_cuda.h"
#include "cuda/map.h"
#include "model/block.h"

#include <stdio.h>
#include <string.h>

static emx_status cuda_fail(cudaError_t error, const char *who, const char *what) {
  (void)cudaGetLastError(); /* an error that can be cleared does not come up again later */
  return emxi_fail(error == cudaErrorMemoryAllocation ? EMX_ERR_NOMEM : EMX_ERR_DEVICE, "%s: %s: %s (%s)", who, what,
                   cudaGetErrorString(error), cudaGetErrorName(error));
}

emx_status emxi_cuda_enter(emx_ctx *ctx, int *before) {
  cudaError_t error = cudaGetDevice(before);
  if (!error && *before != ctx->device_index) error = cudaSetDevice(ctx->device_index);
  return error ? cuda_fail(error, "libentmax", "the GPU cannot be used") : EMX_OK;
}
emx_status emxi_cuda_leave(int before, emx_status status, bool launched, const char *who) {
  if (launched && !status) {
    const cudaError_t error = cudaGetLastError();
    if (error) status = cuda_fail(error, who, "a kernel could not be started");
  }
  int now;
  if (!cudaGetDevice(&now) && now != before) (void)cudaSetDevice(before);
  return status;
}

static emx_status cuda_open(emx_ctx *ctx) {
  static const char who[] = "emx_ctx_create";
  int n = 0, before, major = 0, minor = 0, processors = 0, shared = 0;
  cudaError_t error = cudaGetDeviceCount(&n);
  if (error) return cuda_fail(error, who, "no CUDA device can be used; the CPU can");
  if (ctx->device_index < 0 || ctx->device_index >= n)
    return emxi_fail(EMX_ERR_INVALID, "%s: device_index is %d, the machine has %d CUDA devices", who, ctx->device_index, n);
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ctx->device_index);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ctx->device_index);
  if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ctx->device_index);
  if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, ctx->device_index);
  emx_status status = error ? cuda_fail(error, who, "the device cannot be asked") : EMX_OK;
  if (!status && major < 8)
    status = emxi_fail(EMX_ERR_UNSUPPORTED, "%s: CUDA device %d has compute capability %d.%d, 8.0 or later is needed", who,
                       ctx->device_index, major, minor);
  emxi_cuda *cuda = NULL;
  if (!status && !(cuda = emxi_calloc(sizeof *cuda))) status = emxi_fail(EMX_ERR_NOMEM, "%s: no memory for the back end", who);
  if (!status) {
    void *fault = NULL;
    error = cudaHostAlloc(&fault, sizeof *cuda->fault, cudaHostAllocMapped | cudaHostAllocPortable);
    if (error) status = cuda_fail(error, who, "no pinned memory");
    cuda->fault = fault;
  }
  if (!status) {
    void *claimed = NULL;
    error = cudaMalloc(&claimed, sizeof *cuda->claimed);
    if (!error) error = cudaMemset(claimed, 0, sizeof *cuda->claimed);
    if (error) status = cuda_fail(error, who, "no device memory");
    cuda->claimed = claimed;
  }
  if (status) {
    if (cuda) {
      (void)cudaFreeHost(cuda->fault);
      (void)cudaFree(cuda->claimed);
    }
    emxi_free(cuda);
    return emxi_cuda_leave(before, status, false, who);
  }
  memset(cuda->fault, 0, sizeof *cuda->fault);
  cuda->processors = processors;
  cuda->overlap = major >= 9 && emxi_cuda_kernels_wait();
  cuda->shared = shared;
  cuda->clusters = emxi_cuda_rows_clusters();
  ctx->backend_state = cuda;
  return emxi_cuda_leave(before, EMX_OK, false, who);
}

static void cuda_close(emx_ctx *ctx) {
  emxi_cuda *cuda = emxi_cuda_of(ctx);
  int before;
  if (!emxi_cuda_enter(ctx, &before)) {
    (void)cudaStreamSynchronize(ctx->stream); /* kernels may still write to the fault record */
    (void)cudaFreeHost(cuda->fault);
    (void)cudaFree(cuda->claimed);
    (void)emxi_cuda_leave(before, EMX_OK, false, "emx_ctx_destroy");
  }
  emxi_free(cuda);
}

/* The first fault that kernels have recorded; it is taken back. */
static emx_status take_fault(emx_ctx *ctx, const char *who) {
  emxi_cuda *cuda = emxi_cuda_of(ctx);
  const emxi_cuda_fault f = *cuda->fault;
  if (!f.code) return EMX_OK;
  memset(cuda->fault, 0, sizeof *cuda->fault);
  const cudaError_t error = cudaMemsetAsync(cuda->claimed, 0, sizeof *cuda->claimed, ctx->stream);
  if (error) return cuda_fail(error, who, "a fault could not be taken back");
  if (f.code == EMXI_CUDA_FAULT_PAGE)
    return emxi_fail(EMX_ERR_INVALID, "%s: an earlier call met block_table[%d][%d] = %d, which is no page of the pool", who,
                     f.row, f.column, f.value);
  if (f.code == EMXI_CUDA_FAULT_LIST && f.column < 0)
    return emxi_fail(EMX_ERR_INVALID,
                     "%s: an earlier call met n_pages = %d of query row %d, more than pages has columns, or negative", who,
                     f.value, f.row);
  if (f.code == EMXI_CUDA_FAULT_LIST)
    return emxi_fail(EMX_ERR_INVALID,
                     "%s: an earlier call met pages[%d] = %d of query row %d; lists ascend and name pages of the sequence", who,
                     f.column, f.value, f.row);
  if (f.code == EMXI_CUDA_FAULT_ALPHA)
    return emxi_fail(EMX_ERR_INVALID,
                     "%s: an earlier call met an alpha of head %d out of range, expected 1 (not with GAUSSIAN) or %s", who, f.row,
                     "1.000001 to 4");
  if (f.code == EMXI_CUDA_FAULT_SUMMARIZE)
    return emxi_fail(EMX_ERR_INVALID, "%s: an earlier emx_kv_summarize met %s[%d] = %d, which is out of range", who,
                     f.column ? "tokens" : "pages", f.row, f.value);
  if (f.code == EMXI_CUDA_FAULT_ROW_ALPHA || f.code == EMXI_CUDA_FAULT_ROW_BUDGET)
    return emxi_fail(EMX_ERR_INVALID, "%s: an earlier map met %s of row %d that is out of range", who,
                     f.code == EMXI_CUDA_FAULT_ROW_ALPHA ? "an alpha" : "a budget", f.row);
  if (f.code == EMXI_CUDA_FAULT_TARGET)
    return emxi_fail(EMX_ERR_INVALID, "%s: an earlier loss met target of row %d, %d, which is no class and not ignore_index", who,
                     f.row, f.value);
  if (f.code == EMXI_CUDA_FAULT_ATTN) return emxi_cuda_attn_fault(&f, who);
  return emxi_fail(EMX_ERR_INVALID, "%s: an earlier call met %s[%d] = %d, which is negative or above what max_len allows", who,
                   f.column ? "n_new" : "seq_lens", f.row, f.value);
}

static emx_status cuda_sync(emx_ctx *ctx) {
  static const char who[] = "emx_ctx_sync";
  int before;
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  const cudaError_t error = cudaStreamSynchronize(ctx->stream);
  emx_status status = error ? cuda_fail(error, who, "work on the stream has failed") : take_fault(ctx, who);
  return emxi_cuda_leave(before, status, false, who);
}

static void cuda_info(emx_ctx *ctx, emx_ctx_info *info) {
  struct cudaDeviceProp p;
  if (cudaGetDeviceProperties(&p, ctx->device_index)) {
    (void)cudaGetLastError();
    snprintf(info->device_name, sizeof info->device_name, "CUDA device %d", ctx->device_index);
    return;
  }
  snprintf(info->isa, sizeof info->isa, "sm_%d%d", p.major, p.minor);
  snprintf(info->device_name, sizeof info->device_name, "%.80s, %d SMs, %.1f GiB", p.name, p.multiProcessorCount,
           (double)p.totalGlobalMem / 0x1p30);
}

static emx_status cuda_memory_alloc(emx_ctx *ctx, size_t bytes, void **out) {
  int before;
  void *p = NULL;
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  const cudaError_t error = cudaMalloc(&p, bytes ? bytes : 1);
  if (error == cudaErrorMemoryAllocation) {
    size_t available = 0, total = 0;
    (void)cudaGetLastError();
    (void)cudaMemGetInfo(&available, &total);
    return emxi_cuda_leave(
        before, emxi_fail(EMX_ERR_NOMEM, "%zu bytes of device memory are needed, %zu of %zu are free", bytes, available, total),
        false, "");
  }
  if (error) return emxi_cuda_leave(before, cuda_fail(error, "libentmax", "no device memory"), false, "");
  *out = p;
  return emxi_cuda_leave(before, EMX_OK, false, "");
}
static void cuda_memory_free(emx_ctx *ctx, void *p) {
  int before;
  if (!p || emxi_cuda_enter(ctx, &before)) return;
  (void)cudaFree(p);
  (void)emxi_cuda_leave(before, EMX_OK, false, "");
}
static emx_status cuda_pinned_alloc(emx_ctx *ctx, size_t bytes, void **out) {
  int before;
  void *p = NULL;
  if (bytes > emxi_physical_memory())
    return emxi_fail(EMX_ERR_NOMEM, "%zu bytes of pinned memory are needed, the machine has %zu", bytes, emxi_physical_memory());
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  const cudaError_t error = cudaHostAlloc(&p, bytes ? bytes : 1, cudaHostAllocMapped | cudaHostAllocPortable);
  emx_status status = EMX_OK;
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    status = emxi_fail(EMX_ERR_NOMEM, "%zu bytes of pinned memory are needed, which the system does not give", bytes);
  } else if (error) {
    status = cuda_fail(error, "libentmax", "no pinned memory");
  }
  if (!status) *out = p;
  return emxi_cuda_leave(before, status, false, "");
}
static void cuda_pinned_free(emx_ctx *ctx, void *p) {
  int before;
  if (!p || emxi_cuda_enter(ctx, &before)) return;
  (void)cudaStreamSynchronize(ctx->stream); /* what was asked for may still use it */
  (void)cudaFreeHost(p);
  (void)emxi_cuda_leave(before, EMX_OK, false, "");
}
static emx_status cuda_memory_copy(emx_ctx *ctx, void *to, const void *from, size_t bytes) {
  static const char who[] = "libentmax";
  int before;
  EMX_TRY(emxi_cuda_enter(ctx, &before));
  cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, ctx->stream);
  if (!error) error = cudaStreamSynchronize(ctx->stream);
  return emxi_cuda_leave(before, error ? cuda_fail(error, who, "memory could not be copied") : EMX_OK, false, who);
}

static emx_status rows_forward(emx_ctx *ctx, const struct emxi_rows *rows) { return emxi_cuda_entmax_rows(ctx, rows, false); }
static emx_status rows_backward(emx_ctx *ctx, const struct emxi_rows *rows) { return emxi_cuda_entmax_rows(ctx, rows, true); }

const emxi_backend emxi_backend_cuda = {
    .name = "cuda",
    .open = cuda_open,
    .close = cuda_close,
    .sync = cuda_sync,
    .info = cuda_info,
    .memory_alloc = cuda_memory_alloc,
    .memory_free = cuda_memory_free,
    .pinned_alloc = cuda_pinned_alloc,
    .pinned_free = cuda_pinned_free,
    .memory_copy = cuda_memory_copy,
    .entmax_forward = rows_forward,
    .entmax_backward = rows_backward,
    .entmax_loss = rows_forward,
    .attn_supports = emxi_cuda_attn_supports,
    .attn_run = emxi_cuda_attn_run,
    .kv_write = emxi_cuda_kv_write,
    .kv_summarize = emxi_cuda_kv_summarize,
    .kv_read = emxi_cuda_kv_read,
    .kv_facts = emxi_cuda_kv_facts,
    .decode_run = emxi_cuda_decode_run,
    .blocks = &emxi_blocks_cuda,
};
