/* SPDX-License-Identifier: Apache-2.0
 * Block tables, copy-on-write and appends. A warp moves one row of K and one of V: 2 D elements read and written, no arithmetic but the
 * rounding of f32 to the cache's dtype (to nearest even, NaN stays NaN), so the CPU's cache holds the same bits. */
#include "device.cuh"

namespace {

__global__ void update_tables(const __grid_constant__ emxi_cuda_updates u) {
  const int i = threadIdx.x;
  if (i < u.n) u.tables[u.seq[i] * u.stride + u.at[i]] = u.page[i];
}

/* Rows are copied in units of two bytes: the smallest element, and all the alignment that is sure. */
__device__ void copy_row(const char *from, char *to, int bytes, int lane) {
  for (int i = lane; i < bytes / 2; i += 32) ((uint16_t *)to)[i] = ((const uint16_t *)from)[i];
}

__global__ void copy_pages(const __grid_constant__ emxi_cuda_copies c) {
  const emxi_cuda_pool &p = c.pool;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x, i = blockIdx.y;
  const int es = p.dtype == EMX_F32 ? 4 : 2;
  for (int t = warp; t < c.tokens[i]; t += blockDim.x / 32) {
    copy_row(p.k + (c.from[i] * p.k_page + head * p.k_head + t * p.k_token) * es,
             p.k + (c.to[i] * p.k_page + head * p.k_head + t * p.k_token) * es, p.D * es, lane);
    copy_row(p.v + (c.from[i] * p.v_page + head * p.v_head + t * p.v_token) * es,
             p.v + (c.to[i] * p.v_page + head * p.v_head + t * p.v_token) * es, p.D * es, lane);
  }
}

__device__ void store_row(const char *from, int32_t from_dtype, char *to, int32_t dtype, int d, int lane) {
  const int es = dtype == EMX_F32 ? 4 : 2;
  if (from_dtype == dtype) {
    copy_row(from, to, d * es, lane);
  } else {
    for (int i = lane; i < d; i += 32) store_any(to, dtype, i, ((const float *)from)[i]);
  }
}

/* Grid: (rows of [T, G] in blocks of eight, entries). */
__global__ void append_tokens(const __grid_constant__ emxi_cuda_append a) {
  const emxi_cuda_pool &p = a.pool;
  const int lane = threadIdx.x % 32, b = blockIdx.y;
  const int64_t row = blockIdx.x * (int64_t)(blockDim.x / 32) + threadIdx.x / 32;
  const int64_t t = row / p.G, head = row % p.G;
  int64_t length;
  const int32_t *table = batch_entry(a.batch, b, &length);
  if (!table) return;
  int64_t n = a.n ? a.n[b] : a.t;
  if ((a.n && (n < 0 || n > a.t)) || (a.batch.lengths && length + n > a.batch.limit)) {
    report_fault(a.batch, EMXI_CUDA_FAULT_LENGTH, b, a.n != nullptr, (int32_t)(a.n ? n : length));
    return;
  }
  if (t >= n) return;
  const int64_t position = length + t, slot = position & (p.P - 1);
  const int64_t page = table_page(a.batch, p, table, b, position >> p.shift);
  if (page != table[position >> p.shift]) return; /* a page that is not there: nothing may be written in its place */
  const int es = p.dtype == EMX_F32 ? 4 : 2, from_es = a.dtype == EMX_F32 ? 4 : 2;
  store_row(a.k + (b * a.k_stride[0] + head * a.k_stride[1] + t * a.k_stride[2]) * from_es, a.dtype,
            p.k + (page * p.k_page + head * p.k_head + slot * p.k_token) * es, p.dtype, p.D, lane);
  store_row(a.v + (b * a.v_stride[0] + head * a.v_stride[1] + t * a.v_stride[2]) * from_es, a.dtype,
            p.v + (page * p.v_page + head * p.v_head + slot * p.v_token) * es, p.dtype, p.D, lane);
}

} // namespace

extern "C" void emxi_cuda_launch_updates(const emxi_cuda_updates *u, void *stream) {
  update_tables<<<1, 320, 0, (cudaStream_t)stream>>>(*u);
}
extern "C" void emxi_cuda_launch_copies(const emxi_cuda_copies *c, void *stream) {
  copy_pages<<<dim3((unsigned)c->pool.G, (unsigned)c->n), 256, 0, (cudaStream_t)stream>>>(*c);
}
extern "C" void emxi_cuda_launch_append(const emxi_cuda_append *a, void *stream) {
  const int64_t rows = (int64_t)a->t * a->pool.G;
  append_tokens<<<dim3((unsigned)((rows + 7) / 8), (unsigned)a->batch.n), 256, 0, (cudaStream_t)stream>>>(*a);
}
