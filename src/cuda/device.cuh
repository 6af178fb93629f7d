/* SPDX-License-Identifier: Apache-2.0
 * Small device functions that every kernel uses: element access by dtype, sequences of a batch, reductions. */
#ifndef EMXI_CUDA_DEVICE_CUH
#define EMXI_CUDA_DEVICE_CUH

#include "kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define EMXI_FULL 0xffffffffu

namespace {

__device__ __forceinline__ float emxi_inf() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float emxi_nan() { return __int_as_float(0x7fc00000); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float *out) { *out = x; }
__device__ __forceinline__ void from_float(float x, __half *out) { *out = __float2half_rn(x); }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16 *out) { *out = __float2bfloat16_rn(x); }

__device__ __forceinline__ float load_any(const char *p, int32_t dtype, int64_t i) {
  if (dtype == EMX_F32) return ((const float *)p)[i];
  if (dtype == EMX_F16) return __half2float(((const __half *)p)[i]);
  return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}
__device__ __forceinline__ void store_any(char *p, int32_t dtype, int64_t i, float x) {
  if (dtype == EMX_F32)
    ((float *)p)[i] = x;
  else if (dtype == EMX_F16)
    ((__half *)p)[i] = __float2half_rn(x);
  else
    ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(x);
}

/* Integers in the order of the floats; NaN excluded. */
__device__ __forceinline__ int to_ordered(float x) {
  const int i = __float_as_int(x);
  return i ^ ((i >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int i) { return __int_as_float(i ^ ((i >> 31) & 0x7fffffff)); }

/* The first fault stays; the host reads it when it synchronises. `where`: what has the two pointers of the context's fault. */
__device__ __noinline__ void write_fault(volatile emxi_cuda_fault *fault, int32_t *claimed, int32_t code, int32_t row,
                                         int32_t column, int32_t value) {
  if (atomicExch(claimed, 1)) return;
  fault->code = code;
  fault->row = row;
  fault->column = column;
  fault->value = value;
}
template <typename W>
__device__ __forceinline__ void report_fault(const W &where, int32_t code, int32_t row, int32_t column, int32_t value) {
  write_fault(where.fault, where.claimed, code, row, column, value);
}

/* Block table and length of entry b; a length that cannot be is a fault and counts as an empty sequence without a table. */
__device__ __forceinline__ const int32_t *batch_entry(const emxi_cuda_batch &batch, int32_t b, int64_t *length) {
  if (!batch.lengths) {
    *length = batch.len[b];
    return batch.tables + batch.seq[b] * batch.stride;
  }
  int64_t n = batch.lengths[b];
  if (n < 0 || n + batch.added > batch.limit) {
    report_fault(batch, EMXI_CUDA_FAULT_LENGTH, b, 0, (int32_t)n);
    *length = 0;
    return nullptr;
  }
  *length = n + batch.added;
  return batch.tables + b * batch.stride;
}
/* What an entry's table has as page i; one outside the pool is a fault and counts as page 0. The check waits for the load: who
 * needs several pages loads all of them first. */
__device__ __forceinline__ int32_t checked_page(const emxi_cuda_batch &batch, const emxi_cuda_pool &pool, int32_t b, int64_t i,
                                                int32_t page) {
  if ((uint32_t)page < (uint32_t)pool.max_pages) return page;
  report_fault(batch, EMXI_CUDA_FAULT_PAGE, b, (int32_t)i, page);
  return 0;
}
__device__ __forceinline__ int32_t table_page(const emxi_cuda_batch &batch, const emxi_cuda_pool &pool, const int32_t *table,
                                              int32_t b, int64_t i) {
  return checked_page(batch, pool, b, i, __ldg(table + i));
}

/* Sixteen bytes that are read once: they leave the second-level cache first, where the code of the kernels that follow and
 * what they share shall stay. `once`: read_once(). */
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint4 load16(const void *p, uint64_t once) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p), "l"(once));
  return x;
}

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
/* Sixteen bytes into shared memory, asynchronously. */
__device__ __forceinline__ void copy16(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
#if __CUDA_ARCH__ >= 900
/* Barriers in shared memory that n arrivals, and the bytes of bulk copies that were announced, complete. */
__device__ __forceinline__ void barrier_init(uint64_t *b, int n) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(n));
}
/* By the thread that has initialised some, before others use them behind a barrier of the block. */
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint64_t *b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
/* Arrives, and announces `bytes`. */
__device__ __forceinline__ void barrier_expect(uint64_t *b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t *b, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nW: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@p bra D;\nbra W;\nD:\n}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}
/* Bytes, a multiple of sixteen like both addresses, into shared memory; read once: read_once(). */
__device__ __forceinline__ void copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *barrier, uint64_t once) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(once)
               : "memory");
}
#endif

/* First in every kernel that `launch` starts: what the kernel before it wrote is there; then the next one may be made ready. */
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/* The next kernel may be made ready before this one has waited. It must read nothing of what the kernels before this one write
 * until it has waited itself. */
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/* Kernels of a chain: with `overlap` the next one's blocks may be started while the last blocks of this one run. They wait.
 * After one that could not be started there is none, for kernels poll what those before them write. */
template <typename K, typename A>
void launch(K kernel, dim3 grid, unsigned threads, size_t shared, cudaStream_t stream, bool overlap, const A &argument) {
  if (cudaPeekAtLastError()) return;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  (void)cudaLaunchKernelEx(&config, kernel, argument);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(EMXI_FULL, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(EMXI_FULL, x, step));
  return x;
}
/* A root of a sum of d squares whose terms carry d + 3 roundings, upwards; what squares lose to underflow has a root under
 * 1e-21. */
__device__ __forceinline__ float root_up(float square, int d) {
  return __fadd_ru(__fsqrt_ru(__fmul_ru(square, 1.0f + (float)(d + 8) * 0x1p-23f)), 1e-21f);
}

/* Sum over the block in a fixed order, in every thread. scratch: a double for each warp, at most 32. Has barriers. The warps'
 * sums are added by lanes: a loop over them in every warp would be issued by all of them. */
__device__ __forceinline__ double block_sum(double x, double *scratch) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(EMXI_FULL, x, step);
  __syncthreads();
  if (lane == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = lane < warps ? scratch[lane] : 0;
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(EMXI_FULL, x, step);
  return x;
}
/* The largest, -inf included; NaN wins. scratch: a float for each warp. */
__device__ __forceinline__ float block_max(float x, float *scratch) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const auto larger = [](float p, float q) { return p != p || q <= p ? p : q; };
#pragma unroll
  for (int step = 16; step; step >>= 1) x = larger(x, __shfl_xor_sync(EMXI_FULL, x, step));
  __syncthreads();
  if (lane == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[lane < warps ? lane : 0];
#pragma unroll
  for (int step = 16; step; step >>= 1) x = larger(x, __shfl_xor_sync(EMXI_FULL, x, step));
  return x;
}

} // namespace

#endif
