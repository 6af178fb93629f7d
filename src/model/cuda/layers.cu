/* SPDX-License-Identifier: Apache-2.0
 * Layers of a model between its matrix products, and the products of a single token. Everything here is bound by memory or, for small
 * models, by the launch: each array is read and written once (a product reads its matrix once, the vectors come from the caches).
 * Formulas are those of src/model/nn.c and scale.c; sums run in another order, a few units of the last place of f32 apart. */
#include "layers.h"

#include "cuda/device.cuh"
#include "model/theta.h"

namespace {

constexpr int WARPS = 4; /* of a block */

__device__ __forceinline__ float silu(float x) { return x * (1.0f / (1.0f + expf(-x))); }

__global__ void set_step(const __grid_constant__ emxi_cuda_step a) {
  a.step[0] = a.token;
  a.step[1] = a.position;
}

/* Grid: rows. */
__global__ void embed(const __grid_constant__ emxi_cuda_embed a) {
  const float *from = a.table + (a.tokens ? a.tokens[blockIdx.x] : a.token) * a.d;
  for (int64_t i = threadIdx.x; i < a.d; i += blockDim.x) a.x[blockIdx.x * a.d + i] = from[i];
}

/* What a warp gives for a row of d elements, in every lane. */
__device__ __forceinline__ float row_rstd(const float *x, int64_t d, double eps, int lane) {
  float sum = 0;
  for (int64_t i = lane; i < d; i += 32) sum += x[i] * x[i];
  return (float)(1.0 / sqrt((double)warp_sum(sum) / (double)d + eps));
}

/* A warp a row. */
__global__ void rmsnorm(const __grid_constant__ emxi_cuda_norm a) {
  wait_for_previous();
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
  if (row >= a.m) return;
  const float *x = a.x + row * a.d, rstd = row_rstd(x, a.d, a.eps, lane);
  for (int64_t i = lane; i < a.d; i += 32) a.y[row * a.d + i] = x[i] * rstd * a.w[i];
}

/* A warp a (token, head), query heads first. */
__global__ void turn(const __grid_constant__ emxi_cuda_turn a) {
  wait_for_previous();
  const int lane = threadIdx.x % 32, all = a.heads + (a.rope ? a.kv_heads : 0);
  const int64_t item = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32, t = item / all;
  const int head = (int)(item % all), e = head - (a.heads - a.scaled);
  if (t >= a.m) return;
  float *x = head < a.heads ? a.q + t * a.q_row + head * (int64_t)a.d : a.k + t * a.k_row + (head - a.heads) * (int64_t)a.d;
  const int64_t position = a.at ? *a.at : a.from + t;
  float theta = 1;
  if (e >= 0 && e < a.scaled) {
    double b = a.b ? (double)a.b[e] : a.focal, c = 0;
    if (a.z) {
      b += (double)a.z[t * a.z_row + e];
      c = (double)a.z[t * a.z_row + a.scaled + e] + (double)a.c[e];
    }
    theta = (float)emxi_theta_at(a.type, b, c, emxi_place_of(a.type, position), nullptr);
  }
  if (a.rope) {
    const int half = a.d / 2;
    for (int i = lane; i < half; i += 32) {
      double sine, cosine;
      sincos((double)position * pow(a.rope_theta, -2.0 * (double)i / (double)a.d), &sine, &cosine);
      const float p = x[i], r = x[i + half];
      x[i] = (p * (float)cosine - r * (float)sine) * theta;
      x[i + half] = (r * (float)cosine + p * (float)sine) * theta;
    }
  } else {
    for (int i = lane; i < a.d; i += 32) x[i] *= theta;
  }
}

/* Element i of [heads,rows,d], and where it lies in [heads,rows,2d]. */
struct part_place {
  int64_t head, row, e, wide;
};
__device__ __forceinline__ part_place part_place_of(int64_t i, int64_t rows, int64_t d) {
  const int64_t e = i % d, x = i / d;
  return {x / rows, x % rows, e, x * 2 * d + e};
}
__global__ void part_queries(const __grid_constant__ emxi_cuda_parts a) {
  const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (i >= a.m * a.heads * a.d) return;
  const part_place p = part_place_of(i, a.m, a.d);
  const float x = a.from_q[p.row * a.q_row + p.head * a.d + p.e];
  store_any((char *)a.q, a.dtype, p.wide, x);
  const float first = load_any((const char *)a.q, a.dtype, p.wide);
  store_any((char *)a.q, a.dtype, p.wide + a.d, fabsf(first) < INFINITY ? x - first : 0.0f);
  if (fabsf(x) < INFINITY && fabsf(first) == INFINITY) *a.beyond = 1;
}
__global__ void part_keys(const __grid_constant__ emxi_cuda_parts a) {
  const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (i >= a.n * a.kv_heads * a.d) return;
  const part_place p = part_place_of(i, a.n, a.d);
  const uint16_t k = ((const uint16_t *)a.from_k)[i];
  ((uint16_t *)a.k)[p.wide] = k;
  ((uint16_t *)a.k)[p.wide + a.d] = k;
  ((uint16_t *)a.v)[p.wide] = ((const uint16_t *)a.from_v)[i];
  ((uint16_t *)a.v)[p.wide + a.d] = 0;
}
__global__ void join_outputs(const __grid_constant__ emxi_cuda_parts a) {
  const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (i >= a.m * a.heads * a.d) return;
  const part_place p = part_place_of(i, a.m, a.d);
  a.a[(p.row * a.heads + p.head) * a.d + p.e] = a.o[p.wide];
}

__global__ void swiglu(const __grid_constant__ emxi_cuda_glu a) {
  wait_for_previous();
  const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (i >= a.m * a.f) return;
  const int64_t at = i / a.f * a.row + i % a.f;
  a.gate[at] = silu(a.gate[at]) * a.up[at];
}

/* The norm's part of a product: x[i] as it goes in. */
template <bool NORM>
__device__ __forceinline__ float taken(float x, float rstd, float norm) {
  return NORM ? x * rstd * norm : x;
}

/* A warp an element of y. in * out elements of w (and of up) are read, 16 bytes a lane where VECTORS. */
template <bool NORM, bool GLU, bool VECTORS>
__global__ void product(const __grid_constant__ emxi_cuda_product a) {
  wait_for_previous();
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
  if (row >= a.out) return;
  const float *w = a.w + row * a.in, *up = GLU ? a.up + row * a.in : nullptr;
  const float rstd = NORM ? row_rstd(a.x, a.in, a.eps, lane) : 0;
  float sum = 0, sum_up = 0;
  if (VECTORS) {
#pragma unroll 4
    for (int64_t i = 4 * lane; i < a.in; i += 128) {
      const float4 p = *(const float4 *)(w + i), x = *(const float4 *)(a.x + i);
      const float4 n = NORM ? *(const float4 *)(a.norm + i) : x, u = GLU ? *(const float4 *)(up + i) : x;
      const float h[4] = {taken<NORM>(x.x, rstd, n.x), taken<NORM>(x.y, rstd, n.y), taken<NORM>(x.z, rstd, n.z),
                          taken<NORM>(x.w, rstd, n.w)};
      sum += p.x * h[0] + p.y * h[1] + (p.z * h[2] + p.w * h[3]);
      if (GLU) sum_up += u.x * h[0] + u.y * h[1] + (u.z * h[2] + u.w * h[3]);
    }
  } else {
    for (int64_t i = lane; i < a.in; i += 32) {
      const float h = taken<NORM>(a.x[i], rstd, NORM ? a.norm[i] : 0);
      sum += w[i] * h;
      if (GLU) sum_up += up[i] * h;
    }
  }
  sum = warp_sum(sum);
  if (GLU) sum = silu(sum) * warp_sum(sum_up);
  if (lane == 0) a.y[row] = a.accumulate ? a.y[row] + sum : sum;
}

unsigned blocks_of(int64_t items, int64_t each) { return (unsigned)((items + each - 1) / each); }
bool aligned(const void *p) { return (uintptr_t)p % 16 == 0; }

template <bool NORM, bool GLU>
void launch_product(const emxi_cuda_product &a, bool overlap, cudaStream_t stream) {
  const unsigned grid = blocks_of(a.out, WARPS);
  if (a.in % 4 == 0 && aligned(a.x) && aligned(a.w) && aligned(a.norm) && aligned(a.up))
    launch(product<NORM, GLU, true>, grid, 32 * WARPS, 0, stream, overlap, a);
  else
    launch(product<NORM, GLU, false>, grid, 32 * WARPS, 0, stream, overlap, a);
}

} // namespace

void emxi_cuda_launch_step(const emxi_cuda_step *a, void *stream) { set_step<<<1, 1, 0, (cudaStream_t)stream>>>(*a); }
void emxi_cuda_launch_embed(const emxi_cuda_embed *a, void *stream) {
  embed<<<(unsigned)a->m, 128, 0, (cudaStream_t)stream>>>(*a);
}
void emxi_cuda_launch_norm(const emxi_cuda_norm *a, bool overlap, void *stream) {
  launch(rmsnorm, blocks_of(a->m, WARPS), 32 * WARPS, 0, (cudaStream_t)stream, overlap, *a);
}
void emxi_cuda_launch_turn(const emxi_cuda_turn *a, bool overlap, void *stream) {
  launch(turn, blocks_of(a->m * (a->heads + (a->rope ? a->kv_heads : 0)), WARPS), 32 * WARPS, 0, (cudaStream_t)stream, overlap,
         *a);
}
void emxi_cuda_launch_part_queries(const emxi_cuda_parts *a, void *stream) {
  (void)cudaMemsetAsync(a->beyond, 0, sizeof *a->beyond, (cudaStream_t)stream);
  part_queries<<<(unsigned)((a->m * a->heads * a->d + 255) / 256), 256, 0, (cudaStream_t)stream>>>(*a);
}
void emxi_cuda_launch_part_keys(const emxi_cuda_parts *a, void *stream) {
  part_keys<<<(unsigned)((a->n * a->kv_heads * a->d + 255) / 256), 256, 0, (cudaStream_t)stream>>>(*a);
}
void emxi_cuda_launch_join(const emxi_cuda_parts *a, void *stream) {
  join_outputs<<<(unsigned)((a->m * a->heads * a->d + 255) / 256), 256, 0, (cudaStream_t)stream>>>(*a);
}
void emxi_cuda_launch_glu(const emxi_cuda_glu *a, bool overlap, void *stream) {
  launch(swiglu, blocks_of(a->m * a->f, 256), 256, 0, (cudaStream_t)stream, overlap, *a);
}
void emxi_cuda_launch_product(const emxi_cuda_product *a, bool overlap, void *stream) {
  if (a->up)
    launch_product<true, true>(*a, overlap, (cudaStream_t)stream);
  else if (a->norm)
    launch_product<true, false>(*a, overlap, (cudaStream_t)stream);
  else
    launch_product<false, false>(*a, overlap, (cudaStream_t)stream);
}
