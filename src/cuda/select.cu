/* SPDX-License-Identifier: Apache-2.0
 * Selectors on the device (src/cpu/select_cpu.c is their specification), and what they say of the tokens that are left out.
 *
 *   judge    block = (sequence, KV head, up to R query heads, part of the pages). Summaries of complete pages, 16 bytes a lane: bounds
 *            of their scores, and for GAUSSIAN their mean and spread. Bytes: 4 D a page for boxes of two-byte elements, 2 D + 16 for balls.
 *   pick     block = row: the estimated threshold or the budget; pages as a bit each, then as a list in order.
 *   certify  block = row, after the decode: the bound of the mass of what was not read (T6 of docs/math.md in its root form).
 *
 * Bounds of a score q.k + bias of a page, q times scale already, u = 2^-24:
 *   box   sum max(q lo, q hi)            ball   q.c + |q| radius, c what the codes say
 * Rounding: both, and the score that would be computed, are sums of D products in some order whose absolute terms add up to at most
 * A = |q| (size + 2 radius), size the norm of the largest elements; D + 2 roundings for a bound, D + 1 for a score, 1 for the distance between c
 * and its float: (2 D + 8) u A with 1 % for the roundings of A. A bias is within 4 u of the largest in size. All rounded up. */
#include "rows.cuh"

#include "../kv/gauss_moments.h"

namespace {

constexpr int JUDGE_THREADS = 256, JUDGE_WARPS = JUDGE_THREADS / 32, PICK_THREADS = 1024, SECTIONS = 256,
              CERTIFY_THREADS = SOLVE_THREADS, BINS = 256, LISTED = 256;

__device__ __forceinline__ float float_up(double x) {
  const float f = __double2float_ru(x);
  return f == f ? f : emxi_inf();
}
__device__ __forceinline__ double score_slack(int d, double norm, double size, double bias) {
  return (2 * d + 8) * 0x1p-24 * 1.01 * norm * size + 0x1p-22 * bias + 1e-35;
}
/* q times scale, in shared memory, zeros up to `padded`; returns its norm, rounded up, and in *lost what elements below the smallest normal
 * float may cost a score, in every thread. Has barriers. */
__device__ double load_query(const emxi_cuda_decode &a, int b, int h, int s, int padded, float *q, double *scratch,
                             double *lost) {
  double square = 0, small = 0;
  for (int d = threadIdx.x; d < padded; d += blockDim.x) {
    const float x = d < a.pool.D ? load_any(a.q, a.q_dtype, b * a.q_stride[0] + h * a.q_stride[1] + s * a.q_stride[2] + d) : 0.0f,
                y = x * a.scale;
    q[d] = y;
    square += (double)y * (double)y;
    small += x != 0 && fabsf(y) < 1.17549435e-38f ? 0x1p-22 : 0.0; /* off by 2^-150, an element of a key is below 2^128 */
  }
  square = block_sum(square, scratch);
  *lost = block_sum(small, scratch);
  return sqrt(square) * (1 + 1e-12);
}

/* ---- judge */

/* Byte i of w as a float: 2^23 + byte has it in its last bits. */
template <int I>
__device__ __forceinline__ float byte_float(uint32_t w, float less) {
  return __uint_as_float(__byte_perm(w, 0x4b000000u, 0x7440 + I)) - less;
}
template <typename T>
struct eight { /* elements */
  float x[8];
  __device__ __forceinline__ void load(const T *p, uint64_t once) {
    if constexpr (sizeof(T) == 4) {
      const uint4 a = load16(p, once), b = load16(p + 4, once);
      const uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = __uint_as_float(w[i]);
    } else {
      const uint4 a = load16(p, once);
      const uint32_t w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const uint16_t half = (uint16_t)(w[i / 2] >> (16 * (i % 2)));
        x[i] = to_float(*reinterpret_cast<const T *>(&half));
      }
    }
  }
};

/* Largest norm of the coordinate-wise largest elements of n keys; by a warp. */
__device__ float size_of_keys(const emxi_cuda_pool &p, int64_t page, int head, int64_t n, int lane) {
  const int es = p.dtype == EMX_F32 ? 4 : 2;
  const char *keys = p.k + (page * p.k_page + head * p.k_head) * es;
  float square = 0;
  for (int d = lane; d < p.D; d += 32) {
    float top = 0;
    for (int64_t t = 0; t < n; t++) {
      const float x = fabsf(load_any(keys, p.dtype, t * p.k_token + d));
      if (!(x <= top)) top = x;
    }
    square = fmaf(top, top, square);
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) square += __shfl_xor_sync(EMXI_FULL, square, step);
  const float up = __fsqrt_ru(square * (1.0f + (float)(p.D + 8) * 0x1p-23f)) + 1e-21f;
  return up == up ? up : emxi_inf();
}

template <typename T, bool BOX, int R>
__global__ void __launch_bounds__(JUDGE_THREADS, 2) judge(const __grid_constant__ emxi_cuda_decode a) {
  constexpr int PER = BOX ? 8 : 16, AHEAD = R == 1 ? 4 : 2; /* elements a lane; pages at a time */
  __shared__ float shared_q[R][MAX_D];
  __shared__ double scratch[JUDGE_WARPS], shared_norm[R], shared_lost[R];
  __shared__ float shared_stats[JUDGE_WARPS][R][4], shared_size[JUDGE_WARPS];
  wait_for_previous();
  const emxi_cuda_pool &pool = a.pool;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, padded = EMXI_CUDA_PADDED(pool.D), blocks = (a.group + R - 1) / R;
  const int split = blockIdx.x % a.page_splits, item = blockIdx.x / a.page_splits, g = item / blocks % pool.G,
            b = item / blocks / pool.G, first = item % blocks * R, rows = a.group - first < R ? a.group - first : R;
  int64_t length;
  const int32_t *table = batch_entry(a.batch, b, &length);
  const int64_t pages = (length + pool.P - 1) >> pool.shift;
  for (int r = 0; r < R; r++) {
    double lost = 0;
    const double norm = r < rows ? load_query(a, b, g * a.group + first + r, 0, padded, shared_q[r], scratch, &lost) : 0;
    if (threadIdx.x == 0) shared_norm[r] = norm, shared_lost[r] = lost;
  }
  __syncthreads();
  int lanes = 1;
  while (lanes * PER < padded) lanes *= 2;
  const int l = lane % lanes, sub = lane / lanes, subs = 32 / lanes;
  const bool inside = l * PER < padded;
  float q[R][PER];
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int e = 0; e < PER; e++) q[r][e] = inside && r < rows ? shared_q[r][l * PER + e] : 0.0f;
  float stats[R][4], size = 0; /* of the pages whose leader this lane is */
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int i = 0; i < 4; i++) stats[r][i] = 0;

  const uint64_t once = read_once();
  const int64_t row0 = (int64_t)b * a.H + g * a.group + first; /* S = 1 */
  for (int64_t base = ((int64_t)split * JUDGE_WARPS + warp) * subs * AHEAD; base < pages;
       base += (int64_t)a.page_splits * JUDGE_WARPS * subs * AHEAD) {
    int32_t page[AHEAD];
    emxi_cuda_tail tail[AHEAD];
    uint4 codes[AHEAD][2];
    eight<T> low[BOX ? AHEAD : 1], high[BOX ? AHEAD : 1];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int64_t p = base + u * subs + sub;
      page[u] = p < pages ? table_page(a.batch, pool, table, b, p) : 0;
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int64_t record = (int64_t)page[u] * pool.G + g;
      tail[u] = pool.sum.tails[record];
      if (!inside) {
        codes[u][0] = codes[u][1] = make_uint4(0, 0, 0, 0);
        if constexpr (BOX)
#pragma unroll
          for (int e = 0; e < 8; e++) low[u].x[e] = high[u].x[e] = 0;
      } else if constexpr (BOX) {
        low[u].load((const T *)pool.sum.box + record * 2 * padded + l * PER, once);
        high[u].load((const T *)pool.sum.box + (record * 2 + 1) * padded + l * PER, once);
      } else {
        codes[u][0] = load16(pool.sum.codes + record * 2 * padded + l * PER, once);
        codes[u][1] = load16(pool.sum.codes + (record * 2 + 1) * padded + l * PER, once);
      }
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int64_t p = base + u * subs + sub;
      const bool there = p < pages;
      /* The newest page is read, but for lists, which may leave it out; then it must be complete. */
      const bool newest = p == pages - 1,
                 usable = there && tail[u].size > 0 && (!newest || (a.kind == EMX_SELECT_PAGES && length == pages << pool.shift));
      float sum[R], wide[R];
#pragma unroll
      for (int r = 0; r < R; r++) sum[r] = wide[r] = 0;
      if constexpr (BOX) {
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
          for (int e = 0; e < PER; e++) sum[r] += fmaxf(q[r][e] * low[u].x[e], q[r][e] * high[u].x[e]);
      } else {
        const uint32_t w[2][4] = {{codes[u][0].x, codes[u][0].y, codes[u][0].z, codes[u][0].w},
                                  {codes[u][1].x, codes[u][1].y, codes[u][1].z, codes[u][1].w}};
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float centre = 8388608.0f + 128.0f;
          const float c[4] = {byte_float<0>(w[0][e], centre), byte_float<1>(w[0][e], centre), byte_float<2>(w[0][e], centre),
                              byte_float<3>(w[0][e], centre)},
                      s[4] = {byte_float<0>(w[1][e], 8388608.0f), byte_float<1>(w[1][e], 8388608.0f),
                              byte_float<2>(w[1][e], 8388608.0f), byte_float<3>(w[1][e], 8388608.0f)};
#pragma unroll
          for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
              sum[r] = fmaf(q[r][4 * e + i], c[i], sum[r]);
              const float x = q[r][4 * e + i] * s[i];
              wide[r] = fmaf(x, x, wide[r]);
            }
        }
      }
      for (int step = lanes / 2; step; step >>= 1)
#pragma unroll
        for (int r = 0; r < R; r++) {
          sum[r] += __shfl_xor_sync(EMXI_FULL, sum[r], step);
          if (!BOX) wide[r] += __shfl_xor_sync(EMXI_FULL, wide[r], step);
        }
      if (l == 0 && there) {
        if (usable) size = fmaxf(size, tail[u].size);
        const double from = (double)(p * pool.P - (length - 1)), last = from + (double)(pool.P - 1);
#pragma unroll
        for (int r = 0; r < R; r++) {
          if (r >= rows) continue;
          const float slope = a.slopes ? a.slopes[g * a.group + first + r] : 0.0f;
          const int64_t at = (row0 + r) * a.pages + p;
          const double norm = shared_norm[r];
          const float mean = BOX ? sum[r] : tail[u].step * sum[r];
          if (a.bounds || a.kind == EMX_SELECT_TOPK) {
            float up = emxi_inf();
            if (usable) {
              const double x = (double)slope * from, y = (double)slope * last, radius = BOX ? 0.0 : (double)tail[u].radius;
              up = float_up(
                  (double)mean + norm * radius * (1 + 1e-12) + (slope != 0 ? fmax(x, y) : 0.0) +
                  score_slack(pool.D, norm, (double)tail[u].size + 2 * radius, slope != 0 ? fmax(fabs(x), fabs(y)) : 0.0) +
                  shared_lost[r]);
            }
            a.upper[at] = up;
          }
          if (!BOX && a.kind == EMX_SELECT_GAUSSIAN) {
            const float mu = slope != 0 ? (float)((double)mean + (double)slope * (from + 0.5 * (pool.P - 1))) : mean,
                        sigma = tail[u].spread_step * sqrtf(wide[r]);
            if (a.slopes) {
              a.mu[at] = mu;
              a.sigma[at] = usable ? sigma : -1.0f;
            } else { /* what pick compares is enough */
              a.mu[at] = usable ? fmaf(a.page_z, sigma, mu) : emxi_inf();
            }
            if (usable) {
              stats[r][0] += 1;
              stats[r][1] += mu;
              stats[r][2] += sigma;
              stats[r][3] = fmaf(mu, mu, fmaf(sigma, sigma, stats[r][3]));
            }
          }
        }
      }
      /* How large the keys of a page without a summary are: what rounding may do to their scores. */
      uint32_t unknown = a.bounds ? __ballot_sync(EMXI_FULL, l == 0 && there && !(tail[u].size > 0)) : 0;
      while (unknown) {
        const int from = __ffs(unknown) - 1;
        const int32_t at = __shfl_sync(EMXI_FULL, page[u], from);
        const int64_t left = length - ((base + u * subs + from / lanes) << pool.shift);
        const float x = size_of_keys(pool, at, g, left < pool.P ? left : pool.P, lane);
        size = fmaxf(size, x);
        unknown &= unknown - 1;
      }
    }
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) {
    size = fmaxf(size, __shfl_xor_sync(EMXI_FULL, size, step));
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int i = 0; i < 4; i++) stats[r][i] += __shfl_xor_sync(EMXI_FULL, stats[r][i], step);
  }
  if (lane == 0) {
    shared_size[warp] = size;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int i = 0; i < 4; i++) shared_stats[warp][r][i] = stats[r][i];
  }
  __syncthreads();
  if (threadIdx.x < rows) {
    const int64_t at = (row0 + threadIdx.x) * a.page_splits + split;
    for (int w = 1; w < JUDGE_WARPS; w++) size = fmaxf(size, shared_size[w]);
    a.sizes[at] = fmaxf(size, shared_size[0]);
    for (int i = 0; a.kind == EMX_SELECT_GAUSSIAN && i < 4; i++) {
      double x = 0;
      for (int w = 0; w < JUDGE_WARPS; w++) x += (double)shared_stats[w][threadIdx.x][i];
      a.stats[at * 4 + i] = x;
    }
  }
}

/* ---- pick */

struct picker {
  int *offsets;    /* [32] */
  double *scratch; /* [32] */
  float *top;      /* [32] */
};

__device__ __noinline__ double slow_term(double a, double b, double mean, double spread, double tau) {
  double slope;
  return emxi_gauss_term(a, b, mean, spread, tau, &slope);
}
/* ln(n E[(a X - tau)_+^b]) of one normal crosses zero: SECTIONS thresholds at a time, three rounds leave a 16-millionth of the bracket. For
 * b = 1, 2, 3 in float, with the recurrence forward: at the fifth spread, where a token in a million is, 1e-4 of the mass is lost, which
 * moves tau by 1e-5 spreads. */
__device__ double single_tau(const threshold &k, double n, double mean, double spread) {
  const double a = k.a, rare = sqrtf(2.0f * logf((float)n + 1.0f)) + 8.0;
  double lo = a * mean - slow_power(n, -a) - (k.b < 1.0 ? 1.0 + 8.0 * a * spread : 1e-9 * (1.0 + fabs(a * mean))),
         hi = a * mean + a * spread * rare + 1e-9;
  const int kind = k.power <= 3 ? k.power : 0;
  const float unit = (float)(a * spread);
  for (int round = 0; round < 3; round++) {
    const double width = (hi - lo) / (SECTIONS + 1);
    bool more = false;
    if (threadIdx.x < SECTIONS) {
      const double tau = lo + width * (double)(threadIdx.x + 1);
      const float above = (float)(a * mean - tau);
      if (!kind || unit <= 1e-5f * fabsf(above)) {
        more = n * slow_term(a, k.b, mean, spread, tau) >= 1.0;
      } else {
        const float t = __fdividef(above, unit);
        float low = 0.5f * erfcf(-t * 0.70710678f), x = fmaf(t, low, 0.39894228f * __expf(-0.5f * t * t)), scale = unit;
        for (int i = 2; i <= kind; i++) {
          const float next = fmaf(t, x, (float)(i - 1) * low);
          low = x;
          x = next;
          scale *= unit;
        }
        more = (float)n * x * scale >= 1.0f;
      }
    }
    lo += width * (double)__syncthreads_count(more);
    hi = lo + width;
  }
  return lo;
}
/* The same for pages that differ: as emxi_gauss_tau, to 1e-6 of the mass. */
__device__ __noinline__ double mixture_tau(double alpha, double n, const float *mu, const float *sigma, int64_t pages,
                                           const picker &k) {
  const double a = alpha - 1.0, b = 1.0 / a;
  float top = -emxi_inf(), widest = 0;
  for (int64_t p = threadIdx.x; p < pages; p += PICK_THREADS)
    if (sigma[p] >= 0) top = fmaxf(top, mu[p]), widest = fmaxf(widest, sigma[p]);
  for (int step = 16; step; step >>= 1) {
    top = fmaxf(top, __shfl_xor_sync(EMXI_FULL, top, step));
    widest = fmaxf(widest, __shfl_xor_sync(EMXI_FULL, widest, step));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) k.top[threadIdx.x / 32] = top, k.scratch[threadIdx.x / 32] = (double)widest;
  __syncthreads();
  for (int w = 0; w < PICK_THREADS / 32; w++) top = fmaxf(top, k.top[w]), widest = fmaxf(widest, (float)k.scratch[w]);
  __syncthreads();
  double slope = 0;
  const auto mass = [&](double tau) {
    double f = 0, g = 0;
    for (int64_t p = threadIdx.x; p < pages; p += PICK_THREADS) {
      double s;
      if (!(sigma[p] >= 0)) continue;
      f += emxi_gauss_term(a, b, (double)mu[p], (double)sigma[p], tau, &s);
      g += s;
    }
    slope = n * block_sum(g, k.scratch);
    return n * block_sum(f, k.scratch);
  };
  double lo = a * (double)top - pow(n, 1.0 - alpha), step = 1e-9 * (1.0 + fabs(lo));
  for (int i = 0; i < 200 && mass(lo) < 1.0; i++) {
    lo -= step;
    step *= 4.0;
  }
  step = fmax(0.5 * a * (double)widest, 1e-3);
  double hi = lo + step;
  for (int i = 0; i < 200 && mass(hi) >= 1.0; i++) {
    lo = hi;
    step *= 2.0;
    hi += step;
  }
  double tau = lo;
  for (int i = 0; i < 60 && hi - lo > 1e-9 * (1.0 + fabs(hi)); i++) {
    const double f = mass(tau);
    if (fabs(f - 1.0) <= 1e-6) return tau;
    if (f >= 1.0)
      lo = tau;
    else
      hi = tau;
    const double next = tau + log(f) * f / slope;
    tau = next > lo && next < hi ? next : 0.5 * (lo + hi);
  }
  return lo;
}

/* Orders floats as unsigned integers, NaN last. */
__device__ __forceinline__ uint32_t sortable(float f) {
  const uint32_t u = __float_as_uint(f);
  return f != f ? 0 : u & 0x80000000u ? ~u : u | 0x80000000u;
}

__global__ void __launch_bounds__(PICK_THREADS) pick(const __grid_constant__ emxi_cuda_decode a) {
  __shared__ int offsets[PICK_THREADS / 32], bins[256], shared_choice[2];
  __shared__ double scratch[PICK_THREADS / 32];
  __shared__ float shared_top[PICK_THREADS / 32];
  wait_for_previous();
  const picker tools = {offsets, scratch, shared_top};
  const emxi_cuda_pool &pool = a.pool;
  const int64_t row = blockIdx.x;
  const uint32_t r32 = (uint32_t)row;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, s = (int)(r32 % (uint32_t)a.S),
            h = (int)(r32 / (uint32_t)a.S % (uint32_t)a.H), b = (int)(r32 / (uint32_t)a.S / (uint32_t)a.H);
  int64_t length;
  const int32_t *table = batch_entry(a.batch, b, &length);
  const int64_t visible = length - a.S + s + 1 > 0 ? length - a.S + s + 1 : 0, pages = (visible + pool.P - 1) >> pool.shift,
                words = (pages + 31) / 32;
  const double alpha = alpha_of(a, h);
  float *upper = a.upper ? a.upper + row * a.pages : nullptr;
  const float *mu = a.mu + row * a.pages, *sigma = a.sigma + row * a.pages;
  uint32_t *chosen = a.chosen + row * ((a.pages + 31) / 32);
  int32_t *list = a.list + row * a.pages, *place = a.place + row * a.pages;
  emxi_cuda_choice choice = {0, -emxi_inf(), 0, 0, 0};
  const bool judged = a.kind != EMX_SELECT_ALL && a.pool.sum.tails && (a.bounds || a.kind != EMX_SELECT_PAGES);
  if (judged) {
    float size = 0;
    for (int i = threadIdx.x; i < a.page_splits; i += PICK_THREADS) size = fmaxf(size, a.sizes[row * a.page_splits + i]);
    size = block_max(size, shared_top);
    choice.size = size;
  }
  int n = 0; /* pages that are read */
  float unread = -emxi_inf();
  const auto leave_out = [&](float up) {
    if (!(up <= unread)) unread = up;
  };

  if (a.kind == EMX_SELECT_ALL) {
    n = (int)pages;
  } else if (a.kind == EMX_SELECT_PAGES) {
    const int32_t *io = a.io_pages + b * a.io_pages_stride[0] + h * a.io_pages_stride[1] + s * a.io_pages_stride[2];
    const int32_t asked = a.io_n[b * a.io_n_stride[0] + h * a.io_n_stride[1] + s * a.io_n_stride[2]];
    bool wrong = asked < 0 || asked > a.io_width;
    if (wrong && threadIdx.x == 0) report_fault(a.batch, EMXI_CUDA_FAULT_LIST, (int32_t)row, -1, asked);
    n = wrong ? 0 : asked;
    for (int i = threadIdx.x; i < n; i += PICK_THREADS) {
      const int32_t p = io[i];
      if (p < 0 || p >= pages || (i && p <= io[(i - 1)])) {
        report_fault(a.batch, EMXI_CUDA_FAULT_LIST, (int32_t)row, i, p);
        wrong = true;
      } else if (i < a.pages) {
        list[i] = p;
        place[i] = table_page(a.batch, pool, table, b, p);
        if (judged) upper[p] = -emxi_inf();
      }
    }
    if (__syncthreads_or(wrong)) n = 0;
    if (!judged) {
      if (n < pages) unread = emxi_inf();
    } else {
      for (int64_t p = threadIdx.x; p < pages; p += PICK_THREADS) leave_out(upper[p]);
      choice.judged = (int32_t)pages;
    }
  } else {
    float floor = -emxi_inf();
    bool all = alpha == 0;
    if (a.kind == EMX_SELECT_GAUSSIAN && !all) {
      double t[4] = {0, 0, 0, 0};
      for (int i = 0; i < 4; i++) {
        double x = 0;
        for (int j = threadIdx.x; j < a.page_splits; j += PICK_THREADS) x += a.stats[(row * a.page_splits + j) * 4 + i];
        t[i] = block_sum(x, scratch);
      }
      const double count = t[0], mean = t[1] / count, spread = sqrt(fmax(t[3] / count - mean * mean, 0.0)), unit = alpha - 1.0;
      choice.judged = (int32_t)count;
      if (count > 0 && !(spread < emxi_inf() && fabs(mean) < emxi_inf())) {
        all = true; /* means that overflow say nothing */
      } else if (count > 0) {
        const float slope = a.slopes ? a.slopes[h] : 0.0f;
        const double tau = slope == 0 ? single_tau(threshold_of(a, alpha, 0), count * pool.P, mean, spread)
                                      : mixture_tau(alpha, pool.P, mu, sigma, pages, tools);
        const double excess = tau / unit - (t[1] + 1.5 * t[2]) / count;
        floor = (float)(tau / unit - fmax((double)a.safety_margin * spread, (double)a.excess_margin * fmax(excess, 0.0)));
        choice.estimate = tau;
        choice.estimated = 1;
      }
    }
    /* TOPK: the key of the last page that the budget reaches, by its bits from the top, and how many of those like it. */
    uint32_t last = 0;
    int64_t ties = 0, spare = 0;
    if (a.kind == EMX_SELECT_TOPK && !all) {
      if (a.budget >= pages) all = true;
      int64_t usable = 0;
      for (int64_t p = threadIdx.x; p < pages && !all; p += PICK_THREADS) usable += upper[p] != emxi_inf();
      usable = (int64_t)block_sum((double)usable, scratch);
      choice.judged = (int32_t)usable;
      spare = a.budget - (pages - usable);
      if (!all && spare >= usable) all = true;
      if (!all && spare > 0) {
        uint32_t mask = 0;
        int64_t k = spare;
        for (int shift = 24; shift >= 0; shift -= 8) {
          if (threadIdx.x < 256) bins[threadIdx.x] = 0;
          __syncthreads();
#pragma unroll 4
          for (int64_t p = threadIdx.x; p < pages; p += PICK_THREADS) {
            const uint32_t u = sortable(upper[p]);
            if (upper[p] != emxi_inf() && (u & mask) == last) atomicAdd(&bins[u >> shift & 255], 1);
          }
          __syncthreads();
          if (threadIdx.x == 0) {
            int bin = 255;
            int64_t left = k;
            while (left > bins[bin]) left -= bins[bin--];
            shared_choice[0] = bin;
            shared_choice[1] = (int)left;
          }
          __syncthreads();
          last |= (uint32_t)shared_choice[0] << shift;
          k = shared_choice[1];
          mask |= (uint32_t)255 << shift;
          __syncthreads();
        }
        ties = k;
      }
    }
    /* A bit a page, eight words a warp at a time, so that loads overlap. */
    constexpr int WORDS = 8, WARPS = PICK_THREADS / 32;
    const bool topk = a.kind == EMX_SELECT_TOPK;
    if (topk) { /* those like the last one in `place` for now */
      for (int64_t w = warp; w < words; w += WARPS) {
        const int64_t p = w * 32 + lane;
        const float up = p < pages ? upper[p] : -emxi_inf();
        const uint32_t key = sortable(up);
        const bool take = p < pages && (all || up == emxi_inf() || (spare > 0 && key > last)),
                   tie = p < pages && !take && spare > 0 && key == last;
        const uint32_t bits = __ballot_sync(EMXI_FULL, take), even = __ballot_sync(EMXI_FULL, tie);
        if (lane == 0) chosen[w] = bits, place[w] = (int32_t)even;
      }
    } else {
      for (int64_t first = warp; first < words; first += WORDS * WARPS) {
        float up[WORDS], x[WORDS], y[WORDS];
#pragma unroll
        for (int u = 0; u < WORDS; u++) {
          const int64_t p = (first + u * WARPS) * 32 + lane;
          const bool there = p < pages;
          up[u] = there && a.bounds ? upper[p] : -emxi_inf();
          x[u] = there ? mu[p] : -emxi_inf();
          y[u] = there && a.slopes ? sigma[p] : 0.0f;
        }
#pragma unroll
        for (int u = 0; u < WORDS; u++) {
          const int64_t w = first + u * WARPS, p = w * 32 + lane;
          const bool take = p < pages && (all || (!a.slopes ? x[u] > floor : !(y[u] >= 0) || fmaf(a.page_z, y[u], x[u]) > floor));
          const uint32_t bits = __ballot_sync(EMXI_FULL, take);
          if (lane == 0 && w < words) chosen[w] = bits;
          if (!take) leave_out(up[u]);
          if (take && a.bounds) upper[p] = -emxi_inf();
        }
      }
    }
    __syncthreads();
    const int64_t per = (words + PICK_THREADS - 1) / PICK_THREADS, from = threadIdx.x * per,
                  to = from + per < words ? from + per : words;
    if (a.kind == EMX_SELECT_TOPK && !all) { /* the first `ties` of those like the last one */
      int mine = 0, total;
      for (int64_t w = from; w < to; w++) mine += __popc((uint32_t)place[w]);
      int64_t before = block_offsets(mine, offsets, &total);
      for (int64_t w = from; w < to; w++)
        for (uint32_t even = (uint32_t)place[w]; even; even &= even - 1)
          if (before++ < ties) chosen[w] |= even & -even;
      __syncthreads();
      for (int64_t p = threadIdx.x; a.bounds && p < pages; p += PICK_THREADS)
        if (chosen[p / 32] >> (p % 32) & 1)
          upper[p] = -emxi_inf();
        else
          leave_out(upper[p]);
    }
    int mine = 0;
    for (int64_t w = from; w < to; w++) mine += __popc(chosen[w]);
    int at = block_offsets(mine, offsets, &n);
    for (int64_t w = from; w < to; w++)
      for (uint32_t bits = chosen[w]; bits; bits &= bits - 1) list[at++] = (int32_t)(w * 32 + __ffs(bits) - 1);
    __syncthreads();
    for (int i = threadIdx.x; i < n && !a.select_only; i += PICK_THREADS) place[i] = table_page(a.batch, pool, table, b, list[i]);
  }
  unread = block_max(unread, shared_top);
  if (threadIdx.x == 0) {
    if (unread != unread) unread = emxi_inf();
    choice.max_unread = unread;
    if (!a.select_only) {
      a.n_list[row] = n;
      a.choice[row] = choice;
    } else {
      a.io_n[b * a.io_n_stride[0] + h * a.io_n_stride[1] + s * a.io_n_stride[2]] = n;
      const double unit = alpha > 1 ? alpha - 1.0 : 1.0;
      if (a.io_bound)
        a.io_bound[b * a.io_bound_stride[0] + h * a.io_bound_stride[1] + s * a.io_bound_stride[2]] =
            unread > -emxi_inf() ? float_up(unit * (double)unread) : -emxi_inf();
    }
  }
  if (a.select_only) {
    int32_t *io = a.io_pages + b * a.io_pages_stride[0] + h * a.io_pages_stride[1] + s * a.io_pages_stride[2];
    for (int64_t i = threadIdx.x; i < a.io_width; i += PICK_THREADS)
      io[i] = i >= n ? -1 : a.kind == EMX_SELECT_ALL ? (int32_t)i : list[i];
  }
}

/* ---- certify */

__global__ void __launch_bounds__(CERTIFY_THREADS) certify(const __grid_constant__ emxi_cuda_decode a) {
  __shared__ float q[MAX_D], list[SOLVE_WARPS][LISTED]; /* a list for each warp */
  __shared__ int bins[BINS], listed[SOLVE_WARPS];
  __shared__ double scratch[SOLVE_WARPS];
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const row_place place = place_of(a, row);
  const emxi_cuda_choice choice = a.choice[row];
  const emxi_cuda_wide *wide = &a.wide[row];
  emx_report *report = (emx_report *)(a.reports + row * a.report_stride);
  const double alpha = alpha_of(a, place.h), unit = alpha > 1.0 ? alpha - 1.0 : 1.0;
  const bool bad = (report->flags & EMX_REPORT_NONFINITE) != 0, unread = choice.max_unread > -emxi_inf(),
             exact = a.tau_mode == EMX_TAU_EXACT || !choice.estimated;
  double lost = 0;
  const double norm = unread && !bad ? load_query(a, place.b, place.h, place.s, a.pool.D, q, scratch, &lost) : 0;
  const float slope = a.slopes ? a.slopes[place.h] : 0.0f;
  const double slack = score_slack(a.pool.D, norm, (double)choice.size, fabs((double)slope) * (double)place.visible) + lost;
  double delta = 0;
  bool certified = !bad && exact;
  __syncthreads(); /* the report has been read */
  if (bad) {
    delta = 1;
  } else if (unread) {
    const double tau = wide->exact + unit * (double)wide->m,
                 low = tau - unit * slack - 1e-9 * fmax(1.0, fabs(tau)) - (double)place.count * 0x1p-50;
    const int64_t all_pages = (place.visible + a.pool.P - 1) >> a.pool.shift;
    const float *upper = a.upper + row * a.pages;
    delta = 1;
    if (!wide->solved || !(choice.max_unread < emxi_inf()) || !(slack < emxi_inf())) {
      certified = false;
    } else if (alpha == 1.0) { /* the share of a sum of exponentials; exp here and in the scan is off by less than 1e-4 */
      const float ref = fmaxf(wide->m, choice.max_unread);
      double sum = 0;
      for (int64_t p = threadIdx.x; p < all_pages; p += CERTIFY_THREADS)
        if (upper[p] > -emxi_inf()) sum += (double)expf(upper[p] - ref) * (1 + 1e-4) + 1e-37;
      sum = block_sum(sum, scratch) * a.pool.P;
      const double read = wide->exact * exp((double)wide->m - (double)ref - slack) * (1 - 1e-4);
      delta = fmin(sum / (sum + read) * (1 + 1e-12), 1.0);
      certified = false;
    } else if (unit * (double)choice.max_unread <= low) {
      delta = 0;
    } else {
      certified = false;
      /* Unread pages by their bounds, rounded up to the edge of a bin. */
      const double top = unit * (double)choice.max_unread, width = (top - low) / BINS,
                   nudge = 1e-12 * (1.0 + fabs(top) + fabs(low));
      for (int i = threadIdx.x; i < BINS; i += CERTIFY_THREADS) bins[i] = 0;
      __syncthreads();
      for (int64_t first = threadIdx.x; first < all_pages; first += 8 * CERTIFY_THREADS) {
        float up[8];
#pragma unroll
        for (int u = 0; u < 8; u++)
          up[u] = first + u * CERTIFY_THREADS < all_pages ? upper[first + u * CERTIFY_THREADS] : -emxi_inf();
#pragma unroll
        for (int u = 0; u < 8; u++) {
          const double x = unit * (double)up[u];
          if (!(x > low)) continue;
          const int i = (int)((x - low) / width);
          atomicAdd(&bins[i < BINS ? i : BINS - 1], 1);
        }
      }
      /* Scores above the lower bound of tau; those of too many to hold count as nothing known. */
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
      const float *z = a.z + row * a.chunks * CHUNK, *chunk_max = a.chunk_max + row * a.chunks,
                  thr = nextafterf((float)(low / unit), -emxi_inf());
      const int64_t chunks = (place.count + CHUNK - 1) / CHUNK;
      int n = 0;
      for (int64_t first = warp * 32; first < chunks && n <= LISTED; first += CERTIFY_THREADS) {
        const int64_t mine = first + lane;
        uint32_t alive = __ballot_sync(EMXI_FULL, mine < chunks && chunk_max[mine] > thr);
        for (; alive && n <= LISTED; alive &= alive - 1) {
          const int64_t c = first + __ffs(alive) - 1;
          const int there = a.count[row * a.chunks + c];
#pragma unroll
          for (int j = 0; j < CHUNK; j += 32) {
            const float score = j + lane < there ? z[c * CHUNK + j + lane] : -emxi_inf();
            const uint32_t mask = __ballot_sync(EMXI_FULL, score > thr);
            const int at = n + __popc(mask & ((1u << lane) - 1));
            if (score > thr && at < LISTED) list[warp][at] = score;
            n += __popc(mask);
          }
        }
      }
      if (lane == 0) listed[warp] = n;
      const bool known = !__syncthreads_or(n > LISTED);
      const threshold k = threshold_of(a, alpha, 0);
      /* The mass at t, with every unread token at its bound or with none; by each warp for itself. */
      const auto mass = [&](double t, bool far) {
        double sum = 0;
        const auto add = [&](double y, double times) {
          if (y > 0) sum += times * power_of(y, k.b, k.power);
        };
        for (int w = 0; w < SOLVE_WARPS; w++)
          for (int i = lane; i < listed[w]; i += 32) add(unit * (double)list[w][i] - t, 1);
        for (int i = lane; far && i < BINS; i += 32)
          if (bins[i]) add(low + width * (double)(i + 1) + nudge - t, (double)bins[i] * a.pool.P);
#pragma unroll
        for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(EMXI_FULL, sum, step);
        return sum;
      };
      /* Its root, at SOLVE_WARPS thresholds at a time. One above every score that was read leaves nothing of them. */
      double lo = low, hi = unit * (double)wide->m;
      if (known && lo < hi && mass(hi, true) < 1.0) {
        for (int round = 0; round < 12 && hi - lo > 1e-6 * (1.0 + fabs(lo)); round++) {
          const double part = (hi - lo) / (SOLVE_WARPS + 1);
          const bool above = mass(lo + part * (double)(warp + 1), true) >= 1.0;
          lo += part * (double)(__syncthreads_count(above) / 32); /* it falls with t: the first ones are above */
          hi = lo + part;
        }
        hi += 1e-12 * (1.0 + fabs(hi)); /* of the sections' arithmetic */
        /* Scores may be lower than computed by the slack, and the root lower by as much again. */
        const double read = mass(hi + 2 * unit * slack + 1e-12 * (1.0 + fabs(hi)), false);
        delta = fmin(fmax(1.0 - read + 1e-12 + (double)place.count * 0x1p-50, 0.0), 1.0);
      }
    }
  }
  if (threadIdx.x) return;
  const int64_t es = a.pool.dtype == EMX_F32 ? 4 : 2, padded = EMXI_CUDA_PADDED(a.pool.D),
                record = (a.box ? 2 * padded * es + 63 : 2 * padded + 63) / 64 * 64 + (int64_t)sizeof(emxi_cuda_tail);
  report->delta_bound = fminf(float_up(delta), 1.0f);
  report->max_unread = unread ? float_up(unit * (double)choice.max_unread) : -emxi_inf();
  report->bytes_meta = ((int64_t)choice.judged * record + 63) / 64 * 64;
  report->flags = (uint8_t)((certified && delta == 0 ? EMX_REPORT_CERTIFIED : 0) | (bad ? EMX_REPORT_NONFINITE : 0));
  report->stopped_by =
      unread && !(report->flags & EMX_REPORT_CERTIFIED) && a.kind == EMX_SELECT_TOPK ? EMX_STOP_BUDGET : EMX_STOP_DONE;
}

/* ---- launches */

template <typename T, bool BOX>
void launch_judge(const emxi_cuda_decode &d, cudaStream_t stream) {
  const int per = d.group == 1 ? 1 : 4;
  const unsigned grid = (unsigned)(d.batch.n * d.pool.G * ((d.group + per - 1) / per) * d.page_splits);
  if (per == 1)
    launch(judge<T, BOX, 1>, grid, JUDGE_THREADS, 0, stream, d.overlap, d);
  else
    launch(judge<T, BOX, 4>, grid, JUDGE_THREADS, 0, stream, d.overlap, d);
}

} // namespace

extern "C" void emxi_cuda_select(const emxi_cuda_decode *d, void *on) {
  const cudaStream_t stream = (cudaStream_t)on;
  if (d->kind != EMX_SELECT_ALL && d->pool.sum.tails && (d->bounds || d->kind != EMX_SELECT_PAGES)) {
    if (!d->box)
      launch_judge<float, false>(*d, stream);
    else if (d->pool.dtype == EMX_F32)
      launch_judge<float, true>(*d, stream);
    else if (d->pool.dtype == EMX_F16)
      launch_judge<__half, true>(*d, stream);
    else
      launch_judge<__nv_bfloat16, true>(*d, stream);
  }
  launch(pick, (unsigned)(d->batch.n * d->H * d->S), PICK_THREADS, 0, stream, d->overlap, *d);
}
extern "C" void emxi_cuda_certify(const emxi_cuda_decode *d, void *stream) {
  launch(certify, (unsigned)(d->batch.n * d->H * d->S), CERTIFY_THREADS, 0, (cudaStream_t)stream, d->overlap, *d);
}
