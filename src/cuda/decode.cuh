/* SPDX-License-Identifier: Apache-2.0
 * Decode on the device: every key (with a selector: of the pages in the row's list) is read once, values of the support only.
 *
 *   s_j = scale q.k_j + slope (j - i),  o = sum_j [a s_j - tau]_+^(1/a) v_j,  a = alpha-1        (alpha = 1: softmax, K and V in one pass)
 *
 * Kernels with nothing between them but the stream, so a graph can hold them: scan (scan.cuh; of long sequences open_told before it), solve and
 * share (solve.cuh). Softmax: scan and merge, which joins the parts.
 *
 * f32 products and sums of a score as on the CPU (f16 and bf16 keys are exact in f32); weights and tau in double; values in f32 over at
 * most a chunk-strided share, in a fixed order: the same call gives the same bits. Oracle: src/entmax/oracle.c. */
#ifndef EMXI_CUDA_DECODE_CUH
#define EMXI_CUDA_DECODE_CUH

#include "solve.cuh"

namespace {

/* ---- merge: softmax */

__global__ void __launch_bounds__(MAX_D) merge(const __grid_constant__ emxi_cuda_decode a) {
  __shared__ float sum[MAX_D], weight[MAX_D];
  __shared__ double scratch[MAX_D / 32];
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const row_place place = place_of(a, row);
  if (a.alphas && alpha_of(a, place.h) != 1.0) return; /* solve's row */
  const int D = a.pool.D, groups = MAX_D / D, group = threadIdx.x / D, d = threadIdx.x % D;
  bool bad = query_is_bad(a, place);
  float m = -emxi_inf();
  for (int i = threadIdx.x; i < a.splits; i += MAX_D) {
    bad |= a.bad[row * a.splits + i] != 0;
    m = fmaxf(m, a.part_m[row * a.splits + i]);
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) m = fmaxf(m, __shfl_xor_sync(EMXI_FULL, m, step));
  if (threadIdx.x % 32 == 0) sum[threadIdx.x / 32] = m;
  bad = __syncthreads_or(bad);
  for (int w = 0; w < MAX_D / 32; w++) m = fmaxf(m, sum[w]);
  double z = 0, n = 0;
  float o = 0;
  for (int base = 0; base < a.splits;
       base += MAX_D) { /* the weights of 256 parts, then a group of D threads for every few of them */
    const int i = base + threadIdx.x, most = a.splits - base < MAX_D ? a.splits - base : MAX_D;
    __syncthreads();
    if (i < a.splits) {
      const float part = a.part_m[row * a.splits + i], f = part == -emxi_inf() ? 0.0f : expf(part - m);
      weight[threadIdx.x] = f;
      z += (double)(f * a.part_z[row * a.splits + i]);
      n += a.part_n[row * a.splits + i];
    }
    __syncthreads();
    if (group < groups) {
#pragma unroll 4
      for (int j = group; j < most; j += groups)
        o = fmaf(weight[j], weight[j] > 0 ? a.part_o[(row * a.splits + base + j) * D + d] : 0.0f, o);
    }
  }
  z = block_sum(z, scratch);
  n = block_sum(n, scratch);
  sum[threadIdx.x] = o;
  __syncthreads();
  if (group == 0) {
    double x = 0;
    for (int j = 0; j < groups; j++) x += (double)sum[j * D + d];
    store_output(a, place, d, bad ? emxi_nan() : z > 0 ? (float)(x / z) : 0.0f);
  }
  if (threadIdx.x == 0) {
    emxi_cuda_wide *wide = &a.wide[row];
    wide->solved = !bad && z > 0;
    wide->m = m;
    wide->exact = z;
    write_report(a, place, row, bad, (double)emxi_nan(), n > 0, (int64_t)n, (int64_t)n);
  }
}

/* ---- launches */

template <typename T, int FIXED, int R, int U, bool SOFTMAX, bool SPARSE, bool BULK>
void launch_scan(const emxi_cuda_decode &d, cudaStream_t stream) {
  const unsigned grid = (unsigned)(SPARSE ? d.batch.n * d.H * d.splits : d.batch.n * d.pool.G * d.blocks * d.splits);
  size_t shared = SOFTMAX ? (size_t)SCAN_WARPS * R * d.pool.D * sizeof(float) : 0;
  if constexpr (BULK) {
    shared = key_tile<T, FIXED, U>::SHARED;
    (void)cudaFuncSetAttribute(scan<T, FIXED, R, U, SOFTMAX, SPARSE, BULK>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               (int)shared);
  }
  launch(scan<T, FIXED, R, U, SOFTMAX, SPARSE, BULK>, grid, SCAN_THREADS, shared, stream, d.overlap, d);
}
/* Of U keys a lane at a time; by bulk copies, of BULK_U. */
template <typename T, int FIXED, int R, int U, int BULK_U, bool SOFTMAX, bool SPARSE>
void scan_fixed(const emxi_cuda_decode &d, cudaStream_t stream) {
  if constexpr (!SOFTMAX && !SPARSE)
    if (d.told) {
      launch(open_told, (unsigned)(d.batch.n * d.H * d.S + SCAN_THREADS - 1) / SCAN_THREADS, SCAN_THREADS, 0, stream, d.overlap,
             d);
      return launch_scan<T, FIXED, R, BULK_U, SOFTMAX, SPARSE, true>(d, stream);
    }
  launch_scan<T, FIXED, R, U, SOFTMAX, SPARSE, false>(d, stream);
}
template <typename T, bool SOFTMAX>
void scan_any(const emxi_cuda_decode &d, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (d.vectors && d.pool.D == 32) {
      if (d.sparse) return scan_fixed<T, 32, 1, 4, 4, SOFTMAX, true>(d, stream);
      if (d.rows == 1) return scan_fixed<T, 32, 1, 4, 4, SOFTMAX, false>(d, stream);
      if (d.rows == 4) return scan_fixed<T, 32, 4, 4, 4, SOFTMAX, false>(d, stream);
    } else if (d.vectors && d.pool.D == 64) {
      if (d.sparse) return scan_fixed<T, 64, 1, 8, 8, SOFTMAX, true>(d, stream);
      if (d.rows == 1) return scan_fixed<T, 64, 1, 8, 8, SOFTMAX, false>(d, stream);
      if (d.rows == 4) return scan_fixed<T, 64, 4, 4, 4, SOFTMAX, false>(d, stream);
    } else if (d.vectors && d.pool.D == 128) {
      if (d.sparse) return scan_fixed<T, 128, 1, 8, 8, SOFTMAX, true>(d, stream);
      if (d.rows == 1) return scan_fixed<T, 128, 1, 8, 8, SOFTMAX, false>(d, stream);
      if (d.rows == 4) return scan_fixed<T, 128, 4, 4, 8, SOFTMAX, false>(d, stream);
    }
  }
  if (d.sparse) return launch_scan<T, 0, 1, 4, SOFTMAX, true, false>(d, stream);
  launch_scan<T, 0, 4, 2, SOFTMAX, false, false>(d, stream);
}
/* In certified.cuh: whether it has scanned flat items. */
template <typename T>
bool certified(const emxi_cuda_decode &d, cudaStream_t stream);
template <typename T>
void decode_all(const emxi_cuda_decode &d, cudaStream_t stream) {
  const unsigned rows = (unsigned)(d.batch.n * d.H * d.S);
  const bool scanned = d.cert && certified<T>(d, stream);
  if (d.alphas || d.alpha == 1.0) {
    scan_any<T, true>(d, stream);
    launch(merge, rows, MAX_D, 0, stream, d.overlap, d);
  }
  if (!d.alphas && d.alpha == 1.0) return;
  if (!scanned) scan_any<T, false>(d, stream);
  launch(solve<T>, rows * (unsigned)d.parts, SOLVE_THREADS, 0, stream, d.overlap, d);
  const auto launch_share = [&](auto kernel) {
    launch(kernel, rows * (unsigned)d.shares, SCAN_THREADS, 0, stream, d.overlap, d);
  };
  if constexpr (sizeof(T) == 2) {
    if (d.vectors && d.pool.D == 32) return launch_share(share<T, 32>);
    if (d.vectors && d.pool.D == 64) return launch_share(share<T, 64>);
    if (d.vectors && d.pool.D == 128) return launch_share(share<T, 128>);
  }
  launch_share(share<T, 0>);
}

} // namespace

#endif
