/* SPDX-License-Identifier: Apache-2.0
 * Queries in the terms of key sketches, and the limit of a row: what the kernels of CERTIFIED share. */
#ifndef EMXI_CUDA_SKETCH_CUH
#define EMXI_CUDA_SKETCH_CUH

#include "rows.cuh"

namespace {

constexpr int GROUP = EMXI_CUDA_GROUP, CERT_THREADS = 256, CERT_WARPS = CERT_THREADS / 32, BINS = EMXI_CUDA_BINS;
constexpr float BIN = 1.0f / 64;

__device__ __forceinline__ double warp_sum_double(double x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(EMXI_FULL, x, step);
  return x;
}
__device__ __forceinline__ float round_up(double x) { return __double2float_ru(x); }

using cert_query = emxi_cuda_query;
using cert_words = emxi_cuda_words;

/* By one warp. */
__device__ void open_query(const emxi_cuda_decode &a, int b, int h, int s, int64_t row, int64_t visible, cert_query *out,
                           cert_words *words) {
  const int lane = threadIdx.x % 32, D = a.pool.D;
  double w[8], top = 0, square = 0;
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const int d = lane + 32 * e;
    w[e] = d < D ? (double)(load_any(a.q, a.q_dtype, b * a.q_stride[0] + h * a.q_stride[1] + s * a.q_stride[2] + d) * a.scale) : 0;
    top = fmax(top, fabs(w[e]));
    square += w[e] * w[e];
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) top = fmax(top, __shfl_xor_sync(EMXI_FULL, top, step));
  square = warp_sum_double(square);
  const double s1 = top / 127, s2 = s1 / 254;
  double one = 0, two = 0;
  int sum = 0, size = 0;
#pragma unroll
  for (int e = 0; e < 8; e++) {
    double x = 0, y = 0;
    if (s2 > 0) {
      x = fmin(fmax(nearbyint(w[e] / s1), -127.0), 127.0);
      y = fmin(fmax(nearbyint((w[e] - s1 * x) / s2), -127.0), 127.0);
    }
    const double rest = w[e] - s1 * x, left = rest - s2 * y;
    one += rest * rest;
    two += left * left;
    sum += (int)x;
    size += abs((int)x);
    ((int8_t *)words->a)[lane + 32 * e] = (int8_t)x;
    ((int8_t *)words->b)[lane + 32 * e] = (int8_t)y;
  }
  one = warp_sum_double(one);
  two = warp_sum_double(two);
  sum = __reduce_add_sync(EMXI_FULL, sum);
  size = __reduce_add_sync(EMXI_FULL, size);
  if (lane) return;
  const double norm = sqrt(square) * (1 + 1e-12) + 1e-150;
  out->s1 = s1;
  out->s2 = s2;
  out->norm = norm;
  out->e1 = sqrt(one) * (1 + 1e-12) + 0x1p-48 * norm;
  out->e2 = sqrt(two) * (1 + 1e-12) + 0x1p-48 * norm;
  /* a computed score's own error, scale * q included; products and elements below the normal floats may be lost */
  out->slack_k = (2 * D + 8) * 0x1p-24 * 1.01 * norm + sqrt((double)D) * 0x1p-126;
  out->slack_0 = 1e-35 + norm * sqrt((double)D) * 0x1p-124;
  out->slope = a.slopes ? (double)a.slopes[h] : 0;
  out->sum_a = sum;
  out->size_a = size;
  out->row = (int32_t)row;
  out->visible = (int32_t)visible;
}
/* Error of the score of a key of this norm at a position. */
__device__ __forceinline__ double cert_slack(const cert_query &q, double norm, double distance) {
  return q.slack_k * norm + q.slack_0 + 0x1p-22 * fabs(q.slope) * distance;
}

struct cert_item {
  int b, g, first_row, rows;
  int64_t length, groups;
  const int32_t *table;
};
template <int R>
__device__ __forceinline__ cert_item open_item(const emxi_cuda_decode &a, int item) {
  cert_item it;
  it.first_row = item % a.blocks * R;
  it.g = item / a.blocks % a.pool.G;
  it.b = item / a.blocks / a.pool.G;
  const int left = a.group * a.S - it.first_row;
  it.rows = left >= R ? R : left;
  it.table = batch_entry(a.batch, it.b, &it.length);
  it.groups = (it.length + GROUP - 1) / GROUP;
  return it;
}
/* Queries of an item, a warp each; afterwards a barrier. */
template <int R>
__device__ __forceinline__ void open_queries(const emxi_cuda_decode &a, const cert_item &it, cert_query *q, cert_words *words) {
  for (int r = threadIdx.x / 32; r < it.rows; r += blockDim.x / 32) {
    const int index = it.first_row + r, s = index / a.group, h = it.g * a.group + index % a.group;
    const int64_t visible = it.length - a.S + s + 1;
    open_query(a, it.b, h, s, ((int64_t)it.b * a.H + h) * a.S + s, visible > 0 ? visible : 0, &q[r], &words[r]);
  }
  __syncthreads();
}
/* The same as judge has left them. */
template <int R>
__device__ __forceinline__ void fetch_queries(const emxi_cuda_decode &a, const cert_item &it, cert_query *q, cert_words *words) {
  for (int r = 0; r < it.rows; r++) {
    const int index = it.first_row + r, s = index / a.group, h = it.g * a.group + index % a.group;
    const int64_t row = ((int64_t)it.b * a.H + h) * a.S + s;
    for (int i = threadIdx.x; i < (int)(sizeof(cert_words) / 4); i += blockDim.x)
      ((int32_t *)&words[r])[i] = ((const int32_t *)&a.cert_words[row])[i];
    for (int i = threadIdx.x; i < (int)(sizeof(cert_query) / 8); i += blockDim.x)
      ((int64_t *)&q[r])[i] = ((const int64_t *)&a.cert_query[row])[i];
  }
  __syncthreads();
}
__device__ __forceinline__ int64_t group_at(const emxi_cuda_decode &a, const cert_item &it, int64_t group) {
  const int64_t position = group * GROUP;
  const int64_t page = table_page(a.batch, a.pool, it.table, it.b, position >> a.pool.shift);
  return (page * a.pool.G + it.g) * (a.pool.P / GROUP) + ((position & (a.pool.P - 1)) / GROUP);
}

/* The limit of a row, below which nothing has weight, from its histogram: Newton from the left on the norm of the positive parts. By a
 * warp. `low`: a limit that is known. */
__device__ __noinline__ void raise_limit(const emxi_cuda_decode &a, int64_t row, double alpha, float low) {
  const int lane = threadIdx.x % 32;
  constexpr int MINE = BINS / 32;
  const float base = a.cert[row].base, fa = (float)(alpha - 1), fb = 1 / fa;
  float n[MINE];
#pragma unroll
  for (int i = 0; i < MINE; i++) n[i] = (float)__ldcg(&a.cert_bins[row * BINS + lane * MINE + i]);
  float t = fa * (low - base);
  for (int step = 0; step < 5; step++) {
    float mass = 0, slope = 0;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      const float y = fmaf(fa, (float)(lane * MINE + i) * BIN, -t);
      if (!(y > 0) || !(n[i] > 0)) continue;
      const float p = alpha == 2.0 ? y : alpha == 1.5 ? y * y : powf(y, fb);
      mass += n[i] * p;
      slope += n[i] * (alpha == 2.0 ? 1.0f : alpha == 1.5 ? y : p / y);
    }
#pragma unroll
    for (int i = 16; i; i >>= 1) {
      mass += __shfl_xor_sync(EMXI_FULL, mass, i);
      slope += __shfl_xor_sync(EMXI_FULL, slope, i);
    }
    if (!(mass > 1 && slope > 0) || !(mass < 1e30f)) break;
    /* a few floats down: sums of at most 256 positive terms, a power and a division; the step is at most t's way to the root */
    const float move = (mass - (alpha == 2.0 ? 1.0f : alpha == 1.5 ? sqrtf(mass) : powf(mass, 1.0f - fa))) / slope;
    t += move * (1 - 1e-4f);
  }
  const float limit = base + t / fa, down = limit - 1e-5f * (1 + fabsf(limit) + fabsf(base));
  if (lane == 0 && down > low) atomicMax(&a.cert[row].limit, to_ordered(down));
}

} // namespace

#endif
