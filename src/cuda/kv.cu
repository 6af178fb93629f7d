/* SPDX-License-Identifier: Apache-2.0
 * Block tables, copy-on-write, appends and page summaries. A warp moves one row of K and one of V: 2 D elements read and written, no arithmetic but the
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

/* Rows of [G, n] in blocks of eight. */
__global__ void read_tokens(const __grid_constant__ emxi_cuda_packed r) {
  const emxi_cuda_pool &p = r.pool;
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x * (int64_t)(blockDim.x / 32) + threadIdx.x / 32;
  const int64_t head = row / r.n, position = r.from + row % r.n, slot = position & (p.P - 1);
  if (head >= p.G) return;
  int64_t length;
  const int32_t *table = batch_entry(r.batch, 0, &length);
  const int64_t page = table_page(r.batch, p, table, 0, position >> p.shift);
  const int es = p.dtype == EMX_F32 ? 4 : 2;
  copy_row(p.k + (page * p.k_page + head * p.k_head + slot * p.k_token) * es, r.k + row * p.D * es, p.D * es, lane);
  copy_row(p.v + (page * p.v_page + head * p.v_head + slot * p.v_token) * es, r.v + row * p.D * es, p.D * es, lane);
}

/* ---- summaries */

/* A warp, the P keys of (page, head): P D elements read three times (once from memory). Lane l has elements l + 32 e. */
__device__ void summarize_page(const emxi_cuda_pool &p, int64_t page, int head, int lane) {
  constexpr int E = 8;
  const int es = p.dtype == EMX_F32 ? 4 : 2, padded = EMXI_CUDA_PADDED(p.D);
  const char *keys = p.k + (page * p.k_page + head * p.k_head) * es;
  const int64_t record = page * p.G + head;
  float lo[E], hi[E], mean[E], spread[E];
  bool odd = false;
#pragma unroll
  for (int e = 0; e < E; e++) lo[e] = emxi_inf(), hi[e] = -emxi_inf(), mean[e] = spread[e] = 0;
  for (int t = 0; t < p.P; t++)
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int d = lane + 32 * e;
      if (d >= p.D) continue;
      const float x = load_any(keys, p.dtype, t * p.k_token + d);
      odd |= !(fabsf(x) < emxi_inf());
      lo[e] = fminf(lo[e], x);
      hi[e] = fmaxf(hi[e], x);
      mean[e] += x / (float)p.P; /* P is a power of two; a sum may overflow where the mean does not */
    }
  float square = 0, largest = 0;
#pragma unroll
  for (int e = 0; e < E; e++) {
    if (lane + 32 * e >= p.D) continue;
    const float top = fmaxf(fabsf(lo[e]), fabsf(hi[e]));
    square = fmaf(top, top, square);
    largest = fmaxf(largest, fabsf(mean[e]));
  }
  emxi_cuda_tail tail = {};
  tail.size = fmaxf(root_up(warp_sum(square), p.D), 1e-30f);
  if (p.sum.box) {
    char *box = p.sum.box + record * 2 * padded * es;
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int d = lane + 32 * e;
      if (d >= padded) continue;
      store_any(box, p.dtype, d, d < p.D ? lo[e] : 0.0f); /* elements of K: the conversion is exact */
      store_any(box, p.dtype, padded + d, d < p.D ? hi[e] : 0.0f);
    }
  }
  if (p.sum.codes) {
    for (int t = 0; t < p.P; t++)
#pragma unroll
      for (int e = 0; e < E; e++) {
        const int d = lane + 32 * e;
        if (d >= p.D) continue;
        const float x = load_any(keys, p.dtype, t * p.k_token + d) - mean[e];
        spread[e] = fmaf(x, x, spread[e]);
      }
    float widest = 0;
#pragma unroll
    for (int e = 0; e < E; e++) {
      spread[e] = sqrtf(spread[e] / (float)p.P);
      widest = fmaxf(widest, spread[e]);
    }
    tail.step = warp_max(largest) / 127.0f;
    tail.spread_step = warp_max(widest) / 255.0f;
    uint8_t *codes = p.sum.codes + record * 2 * padded;
    float centre[E];
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int d = lane + 32 * e;
      int code = tail.step > 0 ? __float2int_rn(mean[e] / tail.step) : 0;
      code = max(-127, min(127, code));
      centre[e] = tail.step * (float)code;
      const int wide = tail.spread_step > 0 ? min(255, __float2int_ru(spread[e] / tail.spread_step)) : 0;
      if (d < padded) codes[d] = (uint8_t)((d < p.D ? code : 0) + 128), codes[padded + d] = (uint8_t)(d < p.D ? wide : 0);
    }
    float farthest = 0;
    for (int t = 0; t < p.P; t++) {
      float far = 0;
#pragma unroll
      for (int e = 0; e < E; e++) {
        const int d = lane + 32 * e;
        if (d >= p.D) continue;
        const float x = load_any(keys, p.dtype, t * p.k_token + d) - centre[e];
        far = fmaf(x, x, far);
      }
      farthest = fmaxf(farthest, warp_sum(far));
    }
    tail.radius = root_up(farthest, p.D);
    odd |= !(tail.radius < emxi_inf()) || !(tail.step < emxi_inf()) || !(tail.spread_step < emxi_inf());
  }
  odd |= !(tail.size < emxi_inf());
  if (__any_sync(EMXI_FULL, odd)) tail = {};
  if (lane == 0) p.sum.tails[record] = tail;
}

/* Grid: (pages that an entry's tokens may touch, entries). A page that is complete now is described, another one is not any more. */
__global__ void append_summaries(const __grid_constant__ emxi_cuda_append a) {
  const emxi_cuda_pool &p = a.pool;
  const int lane = threadIdx.x % 32, b = blockIdx.y;
  int64_t length;
  const int32_t *table = batch_entry(a.batch, b, &length);
  if (!table) return;
  const int64_t n = a.n ? a.n[b] : a.t;
  if (n <= 0 || n > a.t || (a.batch.lengths && length + n > a.batch.limit)) return; /* append_tokens has said so */
  const int64_t i = (length >> p.shift) + blockIdx.x;
  if (i << p.shift >= length + n) return;
  const int64_t page = table_page(a.batch, p, table, b, i);
  if (page != table[i]) return;
  const bool complete = (i + 1) << p.shift <= length + n;
  for (int head = threadIdx.x / 32; head < p.G; head += blockDim.x / 32)
    if (complete)
      summarize_page(p, page, head, lane);
    else if (lane == 0)
      p.sum.tails[page * p.G + head] = {};
}

/* A block for each page of the list. */
__global__ void listed_summaries(const __grid_constant__ emxi_cuda_listed l) {
  const emxi_cuda_pool &p = l.pool;
  const int lane = threadIdx.x % 32;
  const int32_t page = l.pages[blockIdx.x], tokens = l.tokens ? l.tokens[blockIdx.x] : p.P;
  const bool outside = (uint32_t)page >= (uint32_t)p.max_pages;
  if (outside || tokens < 0 || tokens > p.P) {
    if (threadIdx.x == 0)
      report_fault(l.batch, EMXI_CUDA_FAULT_SUMMARIZE, (int32_t)blockIdx.x, !outside, outside ? page : tokens);
    return;
  }
  for (int head = threadIdx.x / 32; head < p.G; head += blockDim.x / 32)
    if (tokens == p.P)
      summarize_page(p, page, head, lane);
    else if (lane == 0)
      p.sum.tails[(int64_t)page * p.G + head] = {};
}

} // namespace

extern "C" int emxi_cuda_kernels_wait(void) {
  cudaFuncAttributes attributes;
  if (!cudaFuncGetAttributes(&attributes, update_tables)) return attributes.ptxVersion >= 90;
  (void)cudaGetLastError();
  return 0;
}
extern "C" void emxi_cuda_launch_summaries(const emxi_cuda_append *a, void *stream) {
  const int64_t pages = ((int64_t)a->t + a->pool.P - 2) / a->pool.P + 1;
  append_summaries<<<dim3((unsigned)pages, (unsigned)a->batch.n), 256, 0, (cudaStream_t)stream>>>(*a);
}
extern "C" void emxi_cuda_launch_listed(const emxi_cuda_listed *l, void *stream) {
  listed_summaries<<<(unsigned)l->n, 256, 0, (cudaStream_t)stream>>>(*l);
}
extern "C" void emxi_cuda_launch_updates(const emxi_cuda_updates *u, void *stream) {
  update_tables<<<1, 320, 0, (cudaStream_t)stream>>>(*u);
}
extern "C" void emxi_cuda_launch_copies(const emxi_cuda_copies *c, void *stream) {
  copy_pages<<<dim3((unsigned)c->pool.G, (unsigned)c->n), 256, 0, (cudaStream_t)stream>>>(*c);
}
extern "C" void emxi_cuda_launch_read(const emxi_cuda_packed *r, void *stream) {
  read_tokens<<<(unsigned)((r->n * r->pool.G + 7) / 8), 256, 0, (cudaStream_t)stream>>>(*r);
}
extern "C" void emxi_cuda_launch_append(const emxi_cuda_append *a, void *stream) {
  const int64_t rows = (int64_t)a->t * a->pool.G;
  append_tokens<<<dim3((unsigned)((rows + 7) / 8), (unsigned)a->batch.n), 256, 0, (cudaStream_t)stream>>>(*a);
}
