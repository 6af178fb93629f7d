/* SPDX-License-Identifier: Apache-2.0
 * What the kernels of a decode share: the rows of the workspace, their results, and the threshold of a row. */
#ifndef EMXI_CUDA_ROWS_CUH
#define EMXI_CUDA_ROWS_CUH

#include "../entmax/solve.h"
#include "device.cuh"

namespace {

constexpr int CHUNK = EMXI_CUDA_CHUNK, SOLVE_THREADS = EMXI_CUDA_SOLVE_THREADS, SOLVE_WARPS = SOLVE_THREADS / 32, MAX_D = 256;

/* ---- rows */

struct row_place {
  int b, h, s, g;
  int64_t length, visible; /* of the sequence; keys that the row sees */
  int64_t count;           /* keys that it reads: positions of the workspace */
  int32_t pages;           /* pages that it reads */
  const int32_t *table;
  const int32_t *list, *place; /* sparse: logical and physical pages that it reads */
};
__device__ __forceinline__ row_place place_of(const emxi_cuda_decode &a, int64_t row) {
  row_place p;
  const uint32_t r = (uint32_t)row; /* rows fit 31 bits; long divisions are slow */
  p.s = (int)(r % (uint32_t)a.S);
  p.h = (int)(r / (uint32_t)a.S % (uint32_t)a.H);
  p.b = (int)(r / (uint32_t)a.S / (uint32_t)a.H);
  p.g = (int)((uint32_t)p.h / (uint32_t)a.group);
  p.table = batch_entry(a.batch, p.b, &p.length);
  p.visible = p.length - a.S + p.s + 1;
  if (p.visible < 0) p.visible = 0;
  p.list = p.place = nullptr;
  p.count = p.visible;
  p.pages = (int32_t)((p.visible + a.pool.P - 1) >> a.pool.shift);
  if (a.sparse) {
    p.list = a.list + row * a.pages;
    p.place = a.place + row * a.pages;
    p.pages = __ldcg(a.n_list + row);
    const int64_t left = p.pages ? p.visible - (int64_t)__ldcg(p.list + p.pages - 1) * a.pool.P : 0;
    p.count = p.pages ? (int64_t)(p.pages - 1) * a.pool.P + (left < a.pool.P ? left : a.pool.P) : 0;
  }
  return p;
}
__device__ __forceinline__ int head_of(const emxi_cuda_decode &a, int64_t row) {
  return (int)((uint32_t)row / (uint32_t)a.S % (uint32_t)a.H);
}
/* The head's alpha; 0 for one out of range, which is a fault and makes the head's output NaN. */
__device__ __forceinline__ double alpha_of(const emxi_cuda_decode &a, int h) {
  if (!a.alphas) return a.alpha;
  const double alpha = a.alphas[h];
  if (alpha == 1.0 ? a.kind != EMX_SELECT_GAUSSIAN : alpha >= 1.0 + 1e-6 && alpha <= 4.0) return alpha;
  report_fault(a.batch, EMXI_CUDA_FAULT_ALPHA, h, 0, 0);
  return 0;
}
__device__ __forceinline__ void store_output(const emxi_cuda_decode &a, const row_place &p, int d, float x) {
  store_any(a.o, a.o_dtype, p.b * a.o_stride[0] + p.h * a.o_stride[1] + p.s * a.o_stride[2] + d, x);
}
/* Whether some element of scale * q is not finite; for all threads of the block. Has a barrier. */
__device__ __forceinline__ bool query_is_bad(const emxi_cuda_decode &a, const row_place &p) {
  bool bad = false;
  for (int d = threadIdx.x; d < a.pool.D; d += blockDim.x)
    bad |= !(fabsf(load_any(a.q, a.q_dtype, p.b * a.q_stride[0] + p.h * a.q_stride[1] + p.s * a.q_stride[2] + d) * a.scale) <
             emxi_inf());
  return __syncthreads_or(bad);
}
/* One thread. With a selector emxi_cuda_certify adds what it says of unread tokens. */
__device__ void write_report(const emxi_cuda_decode &a, const row_place &p, int64_t row, bool bad, double tau, double mass,
                             int64_t support, int64_t values) {
  if (!a.reports) return;
  const int64_t key = (int64_t)a.pool.D * (a.pool.dtype == EMX_F32 ? 4 : 2), P = a.pool.P;
  const auto lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const bool whole = a.pool.k_token == a.pool.D;
  const int64_t full = p.count >> a.pool.shift, rest = p.count & (P - 1);
  emx_report r = {};
  r.tau = bad ? emxi_nan() : (float)tau;
  r.mass = bad ? emxi_nan() : (float)mass;
  r.delta_bound = bad ? 1.0f : 0.0f;
  r.max_unread = -emxi_inf();
  r.support = bad ? 0 : (int32_t)support;
  r.tokens = (int32_t)p.count;
  r.pages = p.pages;
  r.select = (uint8_t)a.kind;
  r.path = p.count == p.visible ? EMX_PATH_ALL : EMX_PATH_PAGES;
  r.stopped_by = EMX_STOP_DONE;
  r.flags = bad ? EMX_REPORT_NONFINITE : EMX_REPORT_CERTIFIED;
  r.bytes_k = whole ? full * lines(P * key) + lines(rest * key) : p.count * lines(key);
  r.bytes_v = bad ? 0 : values * lines(key);
  *(emx_report *)(a.reports + row * a.report_stride) = r;
}

/* ---- the threshold of a row */

struct threshold {
  double alpha, a, b;
  int power;
  float m;
};
/* A kernel here runs once over code that is not in the instruction cache: what is long and seldom needed is a function. */
__device__ __noinline__ double slow_power(double x, double b) { return pow(x, b); }
__device__ __noinline__ float slow_power(float x, float b) { return powf(x, b); }
__device__ __forceinline__ double power_of(double y, double b, int kind) {
  return kind ? emxi_power(y, 1.0, kind) : slow_power(y, b);
}
__device__ __forceinline__ threshold threshold_of(const emxi_cuda_decode &a, double alpha, float m) {
  if (!a.alphas) return {alpha, alpha - 1.0, a.power, a.power_kind, m};
  const double b = 1.0 / (alpha - 1.0);
  return {alpha, alpha - 1.0, b, emxi_power_kind(b), m};
}
/* What cannot be in the support once a score m was seen: one float further down covers the rounding of the difference. */
__device__ __forceinline__ float below_of(const threshold &k) { return nextafterf((float)((double)k.m - k.b), -emxi_inf()); }
__device__ __forceinline__ float weight_of(const threshold &k, float z, double t) {
  const double y = k.a * ((double)z - (double)k.m) - t;
  return y > 0 ? (float)power_of(y, k.b, k.power) : 0.0f;
}
/* Adds what z contributes: alpha 2 and 1.5: count, sum y, sum y^2 over y > margin; else 0, sum y^(b-1), sum y^b. */
__device__ __forceinline__ void add_term(const threshold &k, float z, double t, double margin, double (&s)[3]) {
  const double y = k.a * ((double)z - (double)k.m) - t;
  if (!(y > margin)) return;
  if (k.alpha == 2.0 || k.alpha == 1.5) {
    s[0] += 1;
    s[1] += y;
    s[2] += y * y;
  } else {
    const double p = power_of(y, k.b, k.power);
    s[1] += p / y;
    s[2] += p;
  }
}
/* The next threshold minus t, and the residual at t. As in src/cpu/solver.inc. */
__device__ __noinline__ double threshold_step(const threshold &k, const double (&s)[3], double *f) {
  if (k.alpha == 2.0 || k.alpha == 1.5) {
    const emxi_sums sums = {s[0], s[1], s[2]};
    *f = (k.alpha == 2.0 ? s[1] : s[2]) - 1.0;
    if (!(s[0] > 0)) return -0.5;
    return k.alpha == 2.0 ? emxi_step_sparsemax(sums) : emxi_step_entmax15(sums);
  }
  *f = s[2] - 1.0;
  if (!(s[1] > 0)) return -0.5;
  return k.alpha < 2.0 ? (s[2] - slow_power(s[2], 1.0 - k.a)) / s[1] : emxi_step_newton(*f, s[1], k.b);
}

/* Exclusive sum of x over the block and, in *total, of all. scratch: a number for each warp. Has barriers. */
template <typename I>
__device__ __forceinline__ I block_offsets(I x, I *scratch, I *total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  I upto = x;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const I other = __shfl_up_sync(EMXI_FULL, upto, step);
    if (lane >= step) upto += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = upto;
  __syncthreads();
  I sum = lane < warps ? scratch[lane] : 0;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const I other = __shfl_up_sync(EMXI_FULL, sum, step);
    if (lane >= step) sum += other;
  }
  *total = __shfl_sync(EMXI_FULL, sum, 31);
  const I before = __shfl_sync(EMXI_FULL, sum, warp ? warp - 1 : 0);
  return (warp ? before : 0) + upto - x;
}

/* Sums of the warp, in every lane. */
__device__ __forceinline__ void warp_pair(float &x, float &y) {
#pragma unroll
  for (int step = 16; step; step >>= 1) {
    x += __shfl_xor_sync(EMXI_FULL, x, step);
    y += __shfl_xor_sync(EMXI_FULL, y, step);
  }
}
/* Sums of all threads in a fixed order, the same in every thread. Has barriers. */
template <typename S>
__device__ __forceinline__ void block_sums(S (&x)[3], S (*scratch)[SOLVE_WARPS]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 16; step; step >>= 1)
#pragma unroll
    for (int i = 0; i < 3; i++) x[i] += __shfl_xor_sync(EMXI_FULL, x[i], step);
  __syncthreads();
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < 3; i++) scratch[i][threadIdx.x / 32] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 3; i++) {
    x[i] = scratch[i][lane % SOLVE_WARPS];
#pragma unroll
    for (int step = SOLVE_WARPS / 2; step; step >>= 1) x[i] += __shfl_xor_sync(EMXI_FULL, x[i], step);
  }
}

} // namespace

#endif
