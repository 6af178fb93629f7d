/* SPDX-License-Identifier: Apache-2.0
 * Lengths, block tables and alphas of an attention call lie in device memory: they are checked there, once a call, by one block. What cannot
 * be is a fault that the next synchronising call reports; its sequence counts as empty, its head's results are NaN. */
#include "attn.cuh"

namespace {

__device__ __forceinline__ void fault(const emxi_cuda_attn &a, int32_t what, int32_t row, int32_t value) {
  report_fault(a, EMXI_CUDA_FAULT_ATTN, row, what, value);
}

/* Length of sequence b on one side, and its first row if packed; 0 for one that cannot be. */
__device__ int32_t length_of(const emxi_cuda_attn &a, int b, const int32_t *lengths, const int32_t *cu, int64_t most,
                             int32_t what, int32_t *first) {
  *first = 0;
  if (cu) {
    const int32_t from = cu[b], to = cu[b + 1];
    if ((b == 0 && from != 0) || from < 0 || to < from || to > most) {
      fault(a, what, b + 1, to);
      return 0;
    }
    *first = from;
    return to - from;
  }
  if (!lengths) return (int32_t)most;
  if (lengths[b] >= 0 && lengths[b] <= most) return lengths[b];
  fault(a, what, b, lengths[b]);
  return 0;
}

__global__ void __launch_bounds__(256) prepare(const __grid_constant__ emxi_cuda_attn a) {
  for (int b = threadIdx.x; b < a.batch; b += blockDim.x) {
    emxi_cuda_span s = {};
    s.s = length_of(a, b, a.seqlens_q, a.cu_q, a.packed ? a.rows_q : a.max_q,
                    a.packed ? EMXI_CUDA_ATTN_CU_Q : EMXI_CUDA_ATTN_LEN_Q, &s.q0);
    s.n = length_of(a, b, a.seqlens_k, a.cu_k, a.packed ? a.rows_k : a.max_k,
                    a.packed ? EMXI_CUDA_ATTN_CU_K : EMXI_CUDA_ATTN_LEN_K, &s.k0);
    if (a.slopes && (s.n > 1 << 24 || s.s > 1 << 24)) {
      fault(a, EMXI_CUDA_ATTN_FAR, b, s.n);
      s.s = s.n = 0;
    }
    for (int64_t p = 0; a.block_table && p * a.page_size < s.n; p++) {
      const int32_t page = a.block_table[b * a.table_stride + p];
      if (page >= 0 && page < a.pages) continue;
      fault(a, EMXI_CUDA_ATTN_PAGE, b, page);
      s.n = 0;
    }
    a.span[b] = s;
  }
  for (int h = threadIdx.x; a.alphas && h < a.heads; h += blockDim.x) {
    const double alpha = a.alphas[h];
    if (!(alpha == 1.0 || (alpha >= 1.0 + 1e-6 && alpha <= 2.0))) fault(a, EMXI_CUDA_ATTN_ALPHA, h, 0);
  }
  __syncthreads();
  if (threadIdx.x || !a.packed) return;
  int32_t q = 0, k = 0, blocks = 0;
  for (int b = 0; b < a.batch; b++) { /* first tiles */
    a.span[b].q_tile = q;
    a.span[b].k_tile = k;
    a.span[b].q_block = blocks;
    blocks += (a.span[b].s + EMXI_CUDA_ATTN_BLOCK - 1) / EMXI_CUDA_ATTN_BLOCK;
    q += (a.span[b].s + EMXI_CUDA_ATTN_TILE - 1) / EMXI_CUDA_ATTN_TILE;
    k += (a.span[b].n + EMXI_CUDA_ATTN_TILE - 1) / EMXI_CUDA_ATTN_TILE;
  }
}

/* Block = tile of keys, four threads a key. */
__global__ void __launch_bounds__(THREADS) find_norms(const __grid_constant__ emxi_cuda_attn a) {
  __shared__ int largest;
  key_tile t;
  if (!key_tile_of(a, blockIdx.x, &t)) return;
  const int r = threadIdx.x / 4;
  const source keys = keys_of(a, a.k, t.b, t.g, t.sp);
  float sum = 0;
  for (int d = threadIdx.x % 4 * 8; r < t.n && d < a.d; d += 32) {
    float x[8];
    load8(at_row(keys, t.j0 + r), keys.dtype, keys.vectors, d, a.d, x);
#pragma unroll
    for (int e = 0; e < 8; e++) sum = fmaf(x[e], x[e], sum);
  }
  sum = norm_up(quad_sum(sum));
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  atomicMax(&largest, __float_as_int(sum < emxi_inf() ? sum : emxi_inf())); /* none is negative: the order of the integers */
  __syncthreads();
  if (threadIdx.x) return;
  a.norms[blockIdx.x] = __int_as_float(largest);
  atomicMax((int *)&a.longest[a.packed ? t.unit * a.batch + t.b : t.unit], largest);
}

} // namespace

extern "C" void emxi_cuda_attn_norms(const emxi_cuda_attn *a, unsigned units, void *stream) {
  (void)cudaMemsetAsync(a->longest, 0, (a->packed ? (size_t)units * a->batch : units) * sizeof *a->longest, (cudaStream_t)stream);
  if (units && a->k_tiles) find_norms<<<(unsigned)(units * a->k_tiles), THREADS, 0, (cudaStream_t)stream>>>(*a);
}
extern "C" void emxi_cuda_attn_prepare(const emxi_cuda_attn *a, void *stream) {
  prepare<<<1, 256, 0, (cudaStream_t)stream>>>(*a);
}
