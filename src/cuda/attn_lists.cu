/* SPDX-License-Identifier: Apache-2.0
 * What dense attention does with rows' lists, whatever found them and whatever the dtypes: exact thresholds, sums over the support, and
 * the nonzeros sorted by key. attn_fwd.cuh and attn_bwd.cuh say how it fits together. */
#include "attn.cuh"

namespace {

/* m and t of a list of n that is in registers, the first `used` of each lane, -inf where there is none. tau: its value but for rounding, or
 * NaN. */
__device__ __forceinline__ double solve_list(const threshold &whole, const powers &w, const float (&z)[HELD], int used, int n,
                                             float tau, float *m_out) {
  const float a1 = (float)whole.a;
  float m = -emxi_inf();
#pragma unroll
  for (int c = 0; c < HELD; c++) {
    if (c >= used) break;
    m = fmaxf(m, z[c]);
  }
  m = warp_max(m);
  *m_out = m;
  threshold k = whole;
  k.m = m;
  const double hi = (w.kind == 2   ? -rsqrt((double)n)
                     : w.kind == 1 ? -1.0 / (double)n
                                   : -slow_power((double)n, -k.a)) *
                    (1 - 1e-12);
  float light = -1;
  for (int i = 0; tau != tau && i < 12; i++) {
    float F, G;
    light_sums(w, a1, z, used, m, light, &F, &G);
    if (!(F > 1.0f)) break;
    const float e = light_step(w, a1, F, G);
    light += e;
    if (!(e > 1e-5f)) break;
  }
  root x = {-1.0, hi, fmin(fmax(tau == tau ? (double)tau - k.a * (double)m : (double)light, -1.0), hi), false};
  for (int i = 0; i < 100 && !x.done; i++) {
    double s[3] = {0, 0, 0};
#pragma unroll
    for (int c = 0; c < HELD; c++) {
      if (c >= used) break;
      add_term(k, z[c], x.t, 0, s);
    }
#pragma unroll
    for (int step = 16; step; step >>= 1)
#pragma unroll
      for (int y = 0; y < 3; y++) s[y] += __shfl_xor_sync(EMXI_FULL, s[y], step);
    x.step(k, s, 1e-10, 1e-13);
  }
  return x.t;
}

/* Lanes that have one row's elements together, eight each. */
__device__ __forceinline__ int lanes_of(int D) { return D <= 16 ? 2 : D <= 32 ? 4 : D <= 64 ? 8 : D <= 128 ? 16 : 32; }

/* Rows that kernels read eight elements a lane. KIND: 1 f16, 2 bf16, contiguous heads of 16, 32, 64, 128 or 256 that start at multiples of 16
 * bytes, not paged: loads without a question, so that several are under way; 0: anything. */
template <int KIND>
__device__ __forceinline__ void unpack8(const uint4 &w, float (&x)[8]) {
  const uint32_t u[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 f = KIND == 1 ? __half22float2(*(const __half2 *)&u[i])
                               : make_float2(__uint_as_float(u[i] << 16), __uint_as_float(u[i] & 0xffff0000u));
    x[2 * i] = f.x;
    x[2 * i + 1] = f.y;
  }
}
/* Eight elements of each of N rows: load() starts what take() turns into floats. */
template <int KIND, int N>
struct eights {
  uint4 w[KIND ? N : 1];
  const char *row[KIND ? 1 : N];
  __device__ __forceinline__ void load(int i, const source &s, int j, int d) {
    if (KIND)
      w[i] = __ldg((const uint4 *)(s.data + j * s.row + 2 * d));
    else
      row[i] = at_row(s, j);
  }
  __device__ __forceinline__ void load_at(int i, const char *p, int d) {
    if (KIND)
      w[i] = __ldg((const uint4 *)(p + 2 * d));
    else
      row[i] = p;
  }
  __device__ __forceinline__ void take(int i, const source &s, int d, int D, float (&x)[8]) const {
    if (KIND)
      unpack8<KIND>(w[KIND ? i : 0], x);
    else
      load8(row[KIND ? 0 : i], s.dtype, s.vectors, d, D, x);
  }
};
template <int KIND>
__device__ __forceinline__ void put8(char *row, int32_t dtype, int d, int D, const float (&x)[8]) {
  if (KIND && dtype == (KIND == 1 ? EMX_F16 : EMX_BF16)) {
    uint32_t u[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (KIND == 1)
        *(__half2 *)&u[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      else
        *(__nv_bfloat162 *)&u[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    }
    *(uint4 *)(row + 2 * d) = make_uint4(u[0], u[1], u[2], u[3]);
    return;
  }
  store8(row, dtype, d, D, x);
}

/* sum of weight[e] m[pos[e]] over a list in shared memory: a warp; lanes below lanes_of(D) have it. */
template <int KIND>
__device__ __forceinline__ void gather(const source &src, const float *weight, const int32_t *pos, int n, int D,
                                       float (&acc)[8]) {
  constexpr int N = 4;
  const int lane = threadIdx.x % 32, G = lanes_of(D), E = 32 / G, d = lane % G * 8;
#pragma unroll
  for (int i = 0; i < 8; i++) acc[i] = 0;
  for (int e = lane / G; e < n; e += N * E) {
    eights<KIND, N> rows;
    float p[N];
#pragma unroll
    for (int u = 0; u < N; u++) {
      const int at = min(e + u * E, n - 1);
      rows.load(u, src, pos[at], d);
      p[u] = weight[at];
    }
#pragma unroll
    for (int u = 0; u < N; u++) {
      if (!(e + u * E < n)) break; /* what was loaded in its place may be infinite */
      float x[8];
      rows.take(u, src, d, D, x);
#pragma unroll
      for (int i = 0; i < 8; i++) acc[i] = fmaf(p[u], x[i], acc[i]);
    }
  }
  for (int step = G; step < 32; step <<= 1)
#pragma unroll
    for (int i = 0; i < 8; i++) acc[i] += __shfl_xor_sync(EMXI_FULL, acc[i], step);
}

/* Entry of a row's list that is a lane's i-th: its place, or -1. */
__device__ __forceinline__ int entry_of(const emxi_cuda_attn &a, int at, int n, int i) {
  const int lane = threadIdx.x % 32, e = lane + 32 * i;
  if (a.quads) return e / 4 < (at >> 8 * (lane & 3) & 255) ? e : -1;
  return e < n ? at + e : -1;
}
/* Entries that some lane has. */
__device__ __forceinline__ int used_of(const emxi_cuda_attn &a, int at, int n) {
  if (!a.quads) return (n + 31) / 32;
  const int longest = max(max(at & 255, at >> 8 & 255), max(at >> 16 & 255, at >> 24 & 255));
  return (longest + 7) / 8;
}
/* Whether the tile has rows that take the dense path. A barrier. */
__device__ __forceinline__ void count_dense(const emxi_cuda_attn &a, const query_tile &t) {
  const int dense = __syncthreads_count((int)threadIdx.x < t.rows && a.n_list[t.row0 + threadIdx.x] < 0);
  if (threadIdx.x == 0) a.dense[t.unit * (a.group * a.q_tiles) + t.tile] = dense;
}
/* How many of n positions in shared memory are below mine. */
__device__ __forceinline__ int rank_of(int32_t mine, const int32_t *pos, int n) {
  int rank = 0;
#pragma unroll 4
  for (int e = 0; e < n; e++) rank += pos[e] < mine;
  return rank;
}

/* What is not NaN and not dense: outputs from the lists. Rows that see nothing, and padding, have an empty one. */
template <int KIND>
__global__ void __launch_bounds__(THREADS, 3) resolve_forward(const __grid_constant__ emxi_cuda_attn a) {
  __shared__ float weight[WARPS][CAP];
  __shared__ int32_t where[WARPS][CAP];
  query_tile t;
  if (!tile_of_block(a, blockIdx.x, &t)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, G = lanes_of(a.d);
  const double alpha = alpha_of(a, t.h);
  const threshold k = threshold_at(alpha, 0);
  const powers w = powers_of(alpha);
  const source values = keys_of(a, a.v, t.b, t.g, t.sp);
  count_dense(a, t);
  for (int r = warp; r < t.rows + t.padded; r += WARPS) {
    const int64_t row = t.row0 + r, place = t.sp.q0 + t.i0 + r;
    const int n = r < t.rows ? a.n_list[row] : 0;
    if (n == EMXI_CUDA_ROW_DENSE) continue;
    int support = 0;
    double tau = n < 0 ? (double)emxi_nan() : -(double)emxi_inf();
    if (n > 0) {
      const int at = a.at[row], used = used_of(a, at, n);
      float z[HELD], m;
#pragma unroll
      for (int c = 0; c < HELD; c++) {
        z[c] = -emxi_inf();
        if (c >= used) continue;
        const int e = entry_of(a, at, n, c);
        if (e >= 0) z[c] = a.quads ? a.entry[row * CAP + e].x * a.scale : a.z[row * CAP + e];
      }
      const double x = solve_list(k, w, z, used, n, emxi_nan(), &m);
      tau = k.a * (double)m + x;
#pragma unroll
      for (int c = 0; c < HELD; c++) {
        if (c >= used) break;
        const float y = (float)(k.a * ((double)z[c] - (double)m) - x);
        const uint32_t kept = __ballot_sync(EMXI_FULL, y > 0);
        if (y > 0) {
          const int to = support + __popc(kept & ((1u << lane) - 1));
          float u;
          weigh(w, y, &weight[warp][to], &u);
          const int64_t e = row * CAP + entry_of(a, at, n, c);
          where[warp][to] = a.quads ? a.entry[e].at : a.pos[e];
        }
        support += __popc(kept);
      }
      __syncwarp();
      if (a.index.data && support <= a.list)
        for (int x = lane; x < support; x += 32) {
          const int32_t mine = where[warp][x];
          ((int32_t *)row_of(a.index, t.b, t.h, place))[a.quads ? rank_of(mine, where[warp], support) : x] = mine;
        }
    }
    float acc[8];
    gather<KIND>(values, weight[warp], where[warp], support, a.d, acc);
    if (n < 0)
#pragma unroll
      for (int i = 0; i < 8; i++) acc[i] = emxi_nan();
    if (lane < G) put8<KIND>(row_of(a.o, t.b, t.h, place), a.o.dtype, lane * 8, a.d, acc);
    if (lane == 0 && a.tau.data) *(float *)row_of(a.tau, t.b, t.h, place) = (float)tau;
    if (lane == 0 && a.support.data) *(int32_t *)row_of(a.support, t.b, t.h, place) = support;
    __syncwarp();
  }
}

__device__ __forceinline__ float dot8(const float (&x)[8], const float (&y)[8]) {
  float s = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) s = fmaf(x[i], y[i], s);
  return s;
}

/* Rows of lists: gradients of q, and p and ds of the support. GIVEN: the caller's lists; rows for which they do not hold are todo. */
template <bool GIVEN, int KIND>
__global__ void __launch_bounds__(THREADS, 2) resolve_backward(const __grid_constant__ emxi_cuda_attn a) {
  __shared__ float score[WARPS][CAP], dp[WARPS][CAP];
  __shared__ int32_t where[WARPS][CAP];
  query_tile t;
  if (!tile_of_block(a, blockIdx.x, &t)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, G = lanes_of(a.d), d = lane % G * 8;
  const double alpha = alpha_of(a, t.h);
  const threshold k = threshold_at(alpha, 0);
  const powers w = powers_of(alpha);
  const float slope = a.slopes ? a.slopes[t.h] : 0;
  const source keys = keys_of(a, a.k, t.b, t.g, t.sp), values = keys_of(a, a.v, t.b, t.g, t.sp);
  if (GIVEN && a.mode && a.mode[t.unit * (a.group * a.q_tiles) + t.tile]) return;
  if (!GIVEN) {
    count_dense(a, t);
    if (!__syncthreads_or((int)threadIdx.x < t.rows && a.todo[t.row0 + threadIdx.x]) && (!t.padded || a.index.data)) return;
  }
  for (int r = warp; r < t.rows + t.padded; r += WARPS) {
    const int64_t row = t.row0 + r, place = t.sp.q0 + t.i0 + r;
    if (r < t.rows && !GIVEN && !a.todo[row]) continue;
    int n = 0;
    float tau = 0;
    if (r < t.rows) {
      const key_range vis = visible(a, t.sp, t.i0 + r);
      const int32_t *list = a.pos + row * CAP;
      tau = *(const float *)row_of(a.tau, t.b, t.h, place);
      if (GIVEN) {
        list = (const int32_t *)row_of(a.index, t.b, t.h, place);
        n = *(const int32_t *)row_of(a.support, t.b, t.h, place);
        bool good = alpha_is_good(alpha) && alpha != 1.0 && finite(tau) && n >= 1 && n <= CAP && n <= a.list;
        for (int e = lane; good && e < n; e += 32) good = list[e] >= (e ? list[e - 1] + 1 : vis.from) && list[e] < vis.to;
        good = __all_sync(EMXI_FULL, good);
        if (lane == 0) a.todo[row] = !good;
        if (!good) continue;
      } else {
        n = a.n_list[row];
        if (n < 0) continue;
      }
      if (GIVEN) {
        for (int e = lane; e < n; e += 32) where[warp][e] = list[e];
      } else { /* in order of position */
        const int at = a.at[row];
        const int used = used_of(a, at, n);
        int32_t found[HELD], kept = 0;
#pragma unroll
        for (int c = 0; c < HELD; c++) {
          found[c] = -1;
          if (c >= used) continue;
          const int e = entry_of(a, at, n, c);
          const uint32_t some = __ballot_sync(EMXI_FULL, e >= 0);
          found[c] = e >= 0 ? list[e] : -1;
          if (e >= 0) where[warp][kept + __popc(some & ((1u << lane) - 1))] = found[c];
          kept += __popc(some);
        }
        if (a.quads) {
          int rank[HELD];
          __syncwarp();
#pragma unroll
          for (int c = 0; c < HELD; c++) {
            if (c >= used) break;
            rank[c] = found[c] >= 0 ? rank_of(found[c], where[warp], n) : 0;
          }
          __syncwarp();
#pragma unroll
          for (int c = 0; c < HELD; c++)
            if (found[c] >= 0) where[warp][rank[c]] = found[c];
        }
      }
    } else if (!GIVEN && a.index.data) {
      continue; /* padding: has been written */
    }
    __syncwarp();
    float q[8], grad[8], acc[8];
    if (n) {
      load8(row_of(a.q, t.b, t.h, place), a.q.dtype, a.q.vectors, d, a.d, q);
      load8(row_of(a.d_o, t.b, t.h, place), a.d_o.dtype, a.d_o.vectors, d, a.d, grad);
      constexpr int N = 4;
      const int at = t.i0 + r + t.sp.n - t.sp.s, E = 32 / G;
      for (int e0 = lane / G; e0 - lane / G < n; e0 += N * E) {
        eights<KIND, N> k8, v8;
        float x[N], y[N], v[8];
#pragma unroll
        for (int i = 0; i < N; i++) {
          const int j = where[warp][min(e0 + i * E, n - 1)];
          k8.load(i, keys, j, d);
          v8.load(i, values, j, d);
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
          k8.take(i, keys, d, a.d, v);
          x[i] = dot8(q, v);
          v8.take(i, values, d, a.d, v);
          y[i] = dot8(grad, v);
        }
        for (int step = G / 2; step; step >>= 1)
#pragma unroll
          for (int i = 0; i < N; i++) {
            x[i] += __shfl_xor_sync(EMXI_FULL, x[i], step);
            y[i] += __shfl_xor_sync(EMXI_FULL, y[i], step);
          }
#pragma unroll
        for (int i = 0; i < N; i++) {
          const int e = e0 + i * E;
          if (e >= n || lane % G) continue;
          const float s = x[i] * a.scale;
          score[warp][e] = slope != 0 ? fmaf(-slope, (float)abs(at - where[warp][e]), s) : s;
          dp[warp][e] = y[i];
        }
      }
      __syncwarp();
    }
    int support = 0;
    double share = 0;
    if (n) {
      float z[HELD], m, p[HELD], u[HELD];
#pragma unroll
      for (int c = 0; c < HELD; c++) z[c] = lane + 32 * c < n ? score[warp][lane + 32 * c] : -emxi_inf();
      const int used = (n + 31) / 32;
      const double x = solve_list(k, w, z, used, n, tau, &m), exact = k.a * (double)m + x;
      if (GIVEN && !(fabs(exact - (double)tau) <= 1e-5 * (1 + fabs((double)tau)))) { /* not all of the support */
        if (lane == 0) a.todo[row] = 1;
        __syncwarp();
        continue;
      }
      double su = 0, sud = 0;
#pragma unroll
      for (int c = 0; c < HELD; c++) {
        const float y = (float)(k.a * ((double)z[c] - (double)m) - x);
        p[c] = u[c] = 0;
        if (c >= used || !(y > 0)) continue;
        weigh(w, y, &p[c], &u[c]);
        su += (double)u[c];
        sud += (double)u[c] * (double)dp[warp][lane + 32 * c];
      }
#pragma unroll
      for (int step = 16; step; step >>= 1) {
        su += __shfl_xor_sync(EMXI_FULL, su, step);
        sud += __shfl_xor_sync(EMXI_FULL, sud, step);
      }
      const float delta = su == 0 ? 0 : (float)(sud / su);
      const int64_t base = row * CAP;
#pragma unroll
      for (int c = 0; c < HELD; c++) { /* where[] and score[] are compacted in place: entries move down */
        if (c >= used) break;
        const bool keep = u[c] > 0;
        const uint32_t kept = __ballot_sync(EMXI_FULL, keep);
        const int to = support + __popc(kept & ((1u << lane) - 1));
        const int32_t position = keep ? where[warp][lane + 32 * c] : 0;
        const float g = keep ? dp[warp][lane + 32 * c] - delta : 0;
        __syncwarp();
        if (keep) {
          if (a.d_alpha && p[c] > 0) share += (double)g * alpha_slope(alpha, (double)p[c]);
          where[warp][to] = position;
          score[warp][to] = u[c] * g;
          a.pos[base + to] = position;
          a.weight[base + to] = {p[c], u[c] * g};
        }
        support += __popc(kept);
        __syncwarp();
      }
    }
    gather<KIND>(keys, score[warp], where[warp], support, a.d, acc);
#pragma unroll
    for (int i = 0; i < 8; i++) acc[i] *= a.scale;
    if (lane < G) put8<KIND>(row_of(a.d_q, t.b, t.h, place), a.d_q.dtype, d, a.d, acc);
    if (r < t.rows) {
      if (a.d_alpha) {
#pragma unroll
        for (int step = 16; step; step >>= 1) share += __shfl_xor_sync(EMXI_FULL, share, step);
        if (lane == 0) a.share[row] = share;
      }
      if (lane == 0) {
        a.n_list[row] = support;
        a.at[row] = 0;
      }
    }
    __syncwarp();
  }
}

/* ---- which tiles to multiply */

/* A block a part of a unit. */
constexpr int ODD_PARTS = 64;
__global__ void __launch_bounds__(THREADS) find_odd(const __grid_constant__ emxi_cuda_attn a) {
  const int unit = (int)(blockIdx.x / ODD_PARTS), g = a.g0 + (a.packed ? unit : unit % a.ng), chunks = a.d / 8;
  const int b = a.packed ? 0 : a.b0 + unit / a.ng;
  const uint32_t E = a.k.dtype == EMX_F16 ? 0x7c00 : 0x7f80; /* all ones: infinity or NaN */
  bool odd = false;
  const auto look = [&](const emxi_cuda_mat &m, int h, int64_t n) {
    constexpr int STEP = ODD_PARTS * THREADS, N = 4; /* N loads at once */
    const char *const rows = row_of(m, b, h, 0);
    const int64_t of_row = m.row * 2;
    for (int64_t x = blockIdx.x % ODD_PARTS * THREADS + threadIdx.x; x < n * chunks; x += N * STEP) {
      uint4 w[N];
#pragma unroll
      for (int y = 0; y < N; y++) {
        const int64_t at = min(x + y * STEP, n * chunks - 1), row = at >> 31 ? at / chunks : (uint32_t)at / (uint32_t)chunks;
        w[y] = __ldg((const uint4 *)(rows + row * of_row + (at - row * chunks) * 16));
      }
#pragma unroll
      for (int y = 0; y < N; y++) {
        const uint32_t u[4] = {w[y].x, w[y].y, w[y].z, w[y].w};
#pragma unroll
        for (int i = 0; i < 4; i++) odd |= (u[i] & E) == E || (u[i] & E << 16) == E << 16;
      }
    }
  };
  const int64_t s = a.packed ? a.rows_q : a.span[b].s, n = a.packed ? a.rows_k : a.span[b].n;
  look(a.k, g, n);
  look(a.v, g, n);
  for (int h = 0; h < a.group; h++) {
    look(a.q, g * a.group + h, s);
    if (a.backward) look(a.d_o, g * a.group + h, s);
  }
  if (__syncthreads_or(odd) && threadIdx.x == 0) a.odd[unit] = 1;
}

/* Whether a tile of queries is to be multiplied, and with what. GIVEN: by the caller's lists; then by what the scan found for the rows
 * that are todo. A row that takes part has no list and no longer is todo; GIVEN: the others are todo. */
template <bool GIVEN>
__global__ void __launch_bounds__(THREADS) survey(const __grid_constant__ emxi_cuda_attn a) {
  enum { OUT, LISTED, ALL };
  extern __shared__ uint32_t active[];
  __shared__ int states[TILE], scratch[3];
  query_tile t;
  if (!tile_of_block(a, blockIdx.x, &t)) return;
  const int64_t at = t.unit * (a.group * a.q_tiles) + t.tile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (!GIVEN && a.mode[at]) return;
  for (int x = threadIdx.x; x < a.active_words; x += THREADS) active[x] = 0;
  if (threadIdx.x < 3) scratch[threadIdx.x] = 0;
  __syncthreads();
  const auto mark = [&](int j) { atomicOr(&active[(j / TILE >> a.active_shift) / 32], 1u << (j / TILE >> a.active_shift) % 32); };
  for (int r = warp; !a.odd[t.unit] && r < t.rows; r += WARPS) {
    const int64_t row = t.row0 + r, place = t.sp.q0 + t.i0 + r;
    const float tau = *(const float *)row_of(a.tau, t.b, t.h, place);
    int n = 0, state = OUT;
    if (GIVEN) {
      const key_range vis = visible(a, t.sp, t.i0 + r);
      const int32_t *list = (const int32_t *)row_of(a.index, t.b, t.h, place);
      n = *(const int32_t *)row_of(a.support, t.b, t.h, place);
      if (finite(tau) && n > a.list) state = ALL;
      if (finite(tau) && n >= 1 && n <= a.list) {
        bool good = true;
        for (int e = lane; e < n; e += 32) good &= list[e] >= vis.from && list[e] < vis.to;
        state = __all_sync(EMXI_FULL, good) ? LISTED : OUT;
        for (int e = lane; state == LISTED && e < n; e += 32) mark(list[e]);
      }
    } else if (a.todo[row]) {
      n = a.n_list[row];
      state = n >= 0 ? LISTED : n == EMXI_CUDA_ROW_DENSE && finite(tau) ? ALL : OUT;
      const int begin = n > 0 ? a.at[row] : 0, used = n > 0 ? used_of(a, begin, n) : 0;
      for (int i = 0; i < used; i++) {
        const int e = entry_of(a, begin, n, i);
        if (e >= 0) mark(a.pos[row * CAP + e]);
      }
    }
    if (lane) continue;
    states[r] = state;
    if (state == LISTED) atomicAdd(&scratch[0], n);
    if (state == ALL) atomicAdd(&scratch[1], 1);
  }
  __syncthreads();
  int count = 0;
  for (int x = threadIdx.x; x < a.active_words; x += THREADS) count += __popc(active[x]);
  count = warp_sum(count);
  if (lane == 0) atomicAdd(&scratch[2], count << a.active_shift);
  __syncthreads();
  /* rows whose lists are too short: few are scanned */
  const bool all = GIVEN ? 2 * scratch[1] > t.rows : scratch[1] > 0;
  const int mode = all                                                            ? EMXI_CUDA_TILES_ALL
                   : scratch[0] && scratch[0] >= EMXI_CUDA_ATTN_MANY * scratch[2] ? EMXI_CUDA_TILES_SOME
                                                                                  : 0;
  if (threadIdx.x == 0) a.mode[at] = mode;
  if (!mode) return;
  for (int x = threadIdx.x; x < a.active_words; x += THREADS) a.active[at * a.active_words + x] = active[x];
  if (threadIdx.x >= TILE) return;
  const int r = threadIdx.x;
  emxi_cuda_edge edge = {emxi_inf(), 1};
  if (r < t.rows) {
    const int64_t row = t.row0 + r;
    const bool in = states[r] == LISTED || (all && states[r] == ALL);
    const float tau = *(const float *)row_of(a.tau, t.b, t.h, t.sp.q0 + t.i0 + r);
    if (in && finite(tau)) edge.t = a.alpha == 1.0 ? tau * 1.4426950408889634f : tau;
    edge.delta = in;
    if (in) {
      a.n_list[row] = 0;
      a.at[row] = 0;
    }
    if (GIVEN || in) a.todo[row] = !in;
  }
  a.edge[at * TILE + r] = edge;
}

/* ---- gradients of keys */

/* Nonzeros of a block of query tiles by key tile: their numbers (added to counts), or, FILL, their places. Within a key tile they are in
 * order of row and position: a warp has eight neighbouring rows, whose lists ascend. WINDOW: key tiles at once. */
constexpr int WINDOW = 1024, OF_WARP = TILE / WARPS;
template <bool FILL>
__global__ void __launch_bounds__(THREADS, FILL ? 4 : 5) by_key_tile(const __grid_constant__ emxi_cuda_attn a) {
  constexpr int PARTS = FILL ? WARPS : 1;
  __shared__ uint32_t pairs[PARTS][WINDOW / 2]; /* two counts of 16 bits; FILL: of a warp's rows, then places */
  __shared__ uint32_t start[FILL ? WINDOW : 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, unit = (int)(blockIdx.x / a.blocks);
  const int64_t block = blockIdx.x % a.blocks, tiles = (int64_t)a.group * a.q_tiles;
  uint16_t *const mine = (uint16_t *)pairs[FILL ? warp : 0];
  for (int64_t at = block * a.block_rows; at < tiles && at < (block + 1) * a.block_rows; at++) {
    const int64_t x = at % a.q_tiles;
    const int head = (int)(a.packed ? unit : unit % a.ng) * a.group + (int)(at / a.q_tiles);
    query_tile t;
    if (!locate(a, a.packed ? sequence_of<false>(a, x) : a.b0 + unit / a.ng, x, head, &t) || !t.rows) continue;
    const int r = OF_WARP * warp + lane % OF_WARP, of_lane = r < t.rows ? max(0, a.n_list[t.row0 + r]) : 0,
              from_lane = of_lane ? a.at[t.row0 + r] : 0;
    if (!__syncthreads_or(of_lane)) continue;
    const int64_t row0 = t.row0 + OF_WARP * warp, shift = a.packed ? t.sp.k_tile : 0;
    const int32_t *const pos = a.pos + row0 * CAP;
    int head_of[OF_WARP]; /* first positions of the warp's rows */
#pragma unroll
    for (int i = 0; i < OF_WARP; i++) {
      const int n = __shfl_sync(EMXI_FULL, of_lane, i), from = i * CAP + __shfl_sync(EMXI_FULL, from_lane, i);
      head_of[i] = lane < n ? pos[from + lane] : 0;
    }
    const int first = visible(a, t.sp, t.i0).from / TILE, to = (visible(a, t.sp, t.i0 + t.rows - 1).to + TILE - 1) / TILE;
    /* each(key tile of the window, or -1; place in pos) for the warp's entries in their order */
    const auto walk = [&](int w0, int used, auto &&each) {
#pragma unroll
      for (int i = 0; i < OF_WARP; i++) {
        const int n = __shfl_sync(EMXI_FULL, of_lane, i), from = i * CAP + __shfl_sync(EMXI_FULL, from_lane, i);
        for (int e0 = 0; e0 < n; e0 += 32) {
          const int e = e0 + lane, tile = e >= n ? -1 : (e0 ? pos[from + e] : head_of[i]) / TILE - w0;
          each(tile >= 0 && tile < used ? tile : -1, from + e);
        }
      }
    };
    for (int w0 = first; w0 < to; w0 += WINDOW) {
      const int used = min(WINDOW, to - w0);
      for (int e = FILL ? lane : threadIdx.x; e < (used + 1) / 2; e += FILL ? 32 : THREADS) ((uint32_t *)mine)[e] = 0;
      __syncthreads();
      walk(w0, used, [&](int tile, int) {
        if (tile >= 0) atomicAdd((uint32_t *)mine + tile / 2, 1u << 16 * (tile & 1));
      });
      __syncthreads();
      for (int x = threadIdx.x; x < used && w0 + x + shift < a.k_tiles; x += THREADS) {
        uint32_t total = 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          uint16_t *const count = (uint16_t *)pairs[part] + x;
          const uint32_t here = *count;
          if (FILL) *count = (uint16_t)total;
          total += here;
        }
        if (!total) continue;
        const int64_t tile = unit * a.k_tiles + shift + w0 + x;
        uint32_t *const sum = a.counts + tile * a.blocks + block;
        if (FILL) start[x] = *sum + a.tile_start[tile + unit];
        *sum += total;
      }
      __syncthreads();
      if (FILL)
        walk(w0, used, [&](int tile, int entry) {
          const int before = __shfl_up_sync(EMXI_FULL, tile, 1), after = __shfl_down_sync(EMXI_FULL, tile, 1);
          const uint32_t heads = __ballot_sync(EMXI_FULL, lane == 0 || before != tile);
          const int rank = lane - (31 - __clz(heads & ((2u << lane) - 1)));
          const uint32_t place = tile >= 0 ? mine[tile] + rank : 0;
          __syncwarp(); /* every lane has read */
          if (tile >= 0) {
            if (lane == 31 || after != tile) mine[tile] = (uint16_t)(place + 1);
            a.by_tile[unit * a.unit_rows * CAP + start[tile] + place] = (uint32_t)((row0 - unit * a.unit_rows) * CAP + entry);
          }
          __syncwarp();
        });
      __syncthreads();
    }
  }
}

/* Counts of blocks become those before them; a key tile's sum goes to tile_start. A warp a key tile. */
__global__ void __launch_bounds__(THREADS) scan_blocks(const __grid_constant__ emxi_cuda_attn a, int64_t tiles) {
  const int lane = threadIdx.x % 32;
  const int64_t tile = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
  if (tile >= tiles) return;
  uint32_t *counts = a.counts + tile * a.blocks, run = 0;
  for (int64_t x = 0; x < a.blocks; x += 32) {
    const uint32_t n = x + lane < a.blocks ? counts[x + lane] : 0;
    uint32_t upto = n;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const uint32_t other = __shfl_up_sync(EMXI_FULL, upto, step);
      if (lane >= step) upto += other;
    }
    if (x + lane < a.blocks) counts[x + lane] = run + upto - n;
    run += __shfl_sync(EMXI_FULL, upto, 31);
  }
  if (lane == 0) a.tile_start[tile + tile / a.k_tiles] = run;
}
/* A block a unit. */
__global__ void __launch_bounds__(THREADS) scan_tiles(const __grid_constant__ emxi_cuda_attn a) {
  __shared__ int scratch[WARPS];
  uint32_t *start = a.tile_start + blockIdx.x * (a.k_tiles + 1), run = 0;
  for (int64_t x = 0; x < a.k_tiles; x += THREADS) {
    const int n = x + threadIdx.x < a.k_tiles ? (int)start[x + threadIdx.x] : 0;
    int total;
    const int before = block_offsets(n, scratch, &total);
    if (x + threadIdx.x < a.k_tiles) start[x + threadIdx.x] = run + (uint32_t)before;
    run += (uint32_t)total;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    start[a.k_tiles] = run;
    a.key_start[(blockIdx.x + 1) * (a.k_tiles * TILE + 1) - 1] = run;
  }
}

/* A key tile's nonzeros by key, in the order they had: a warp has an eighth of them, of which it keeps the first KEPT times 32. */
__global__ void __launch_bounds__(THREADS) sort_by_key(const __grid_constant__ emxi_cuda_attn a) {
  constexpr int KEPT = 8;
  __shared__ uint32_t next[WARPS][TILE];
  const int unit = (int)(blockIdx.x / a.k_tiles), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t begin = a.tile_start[blockIdx.x + unit], end = a.tile_start[blockIdx.x + unit + 1],
                 share = (end - begin + 32 * WARPS - 1) / (32 * WARPS) * 32, from = min(begin + warp * share, end),
                 to = min(from + share, end);
  const int64_t base = unit * a.unit_rows * CAP;
  const uint32_t *const by_tile = a.by_tile + base;
  const int32_t *const pos = a.pos + base;
  uint32_t *const mine = next[warp];
  for (int c = lane; c < TILE; c += 32) mine[c] = 0;
  uint32_t place[KEPT];
  int key[KEPT];
#pragma unroll
  for (int i = 0; i < KEPT; i++) place[i] = from + 32 * i + lane < to ? by_tile[from + 32 * i + lane] : 0;
#pragma unroll
  for (int i = 0; i < KEPT; i++) key[i] = from + 32 * i + lane < to ? pos[place[i]] % TILE : TILE;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < KEPT; i++)
    if (key[i] < TILE) atomicAdd(&mine[key[i]], 1u);
  for (uint32_t e = from + 32 * KEPT + lane; e < to; e += 32) atomicAdd(&mine[pos[by_tile[e]] % TILE], 1u);
  __syncthreads();
  if (warp == 0) { /* numbers become places; a lane has two keys */
    uint32_t of[2] = {0, 0};
#pragma unroll
    for (int c = 0; c < 2; c++)
      for (int x = 0; x < WARPS; x++) of[c] += next[x][2 * lane + c];
    uint32_t upto = of[0] + of[1];
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const uint32_t other = __shfl_up_sync(EMXI_FULL, upto, step);
      if (lane >= step) upto += other;
    }
    uint32_t run = begin + upto - of[0] - of[1];
#pragma unroll
    for (int c = 0; c < 2; c++) {
      a.key_start[unit * (a.k_tiles * TILE + 1) + blockIdx.x % a.k_tiles * TILE + 2 * lane + c] = run;
      for (int x = 0; x < WARPS; x++) {
        const uint32_t n = next[x][2 * lane + c];
        next[x][2 * lane + c] = run;
        run += n;
      }
    }
  }
  __syncthreads();
  const auto put = [&](int k, uint32_t what) { /* k: TILE where there is none */
    const uint32_t same = __match_any_sync(EMXI_FULL, k);
    const int rank = __popc(same & ((1u << lane) - 1));
    const uint32_t at = k < TILE ? mine[k] + rank : 0;
    __syncwarp(); /* every lane has read */
    if (k < TILE) {
      if (rank == 0) mine[k] = at + __popc(same);
      a.by_key[base + at] = what;
    }
    __syncwarp();
  };
#pragma unroll
  for (int i = 0; i < KEPT; i++)
    if (from + 32 * i < to) put(key[i], place[i]);
  for (uint32_t e = from + 32 * KEPT; e < to; e += 32) {
    const uint32_t what = e + lane < to ? by_tile[e + lane] : 0;
    put(e + lane < to ? pos[what] % TILE : TILE, what);
  }
}

/* Nonzeros from .. to-1 of a key, those of this lane's turn: sums of p do and ds q. */
template <int KIND>
__device__ __forceinline__ void add_rows(const emxi_cuda_attn &a, const key_tile &t, const source &q, const source &grad,
                                         uint32_t from, uint32_t to, float (&dk)[8], float (&dv)[8]) {
  constexpr int N = 2; /* more warps gain more than more loads of each */
  const int lane = threadIdx.x % 32, G = lanes_of(a.d), d = lane % G * 8;
  const uint32_t E = 32 / G, per = (uint32_t)(a.packed ? a.rows_q : a.max_q);
  const int64_t q_head = a.q.head * bytes_of(q.dtype), grad_head = a.d_o.head * bytes_of(grad.dtype);
  const uint32_t *const by_key = a.by_key + t.unit * a.unit_rows * CAP;
  const emxi_cuda_weight *const weight = a.weight + t.unit * a.unit_rows * CAP;
  for (uint32_t e = from + lane / G; e < to; e += N * E) {
    eights<KIND, N> x, y;
    emxi_cuda_weight w[N];
    uint32_t place[N];
#pragma unroll
    for (int i = 0; i < N; i++) place[i] = by_key[min(e + i * E, to - 1)];
#pragma unroll
    for (int i = 0; i < N; i++) {
      const uint32_t row = place[i] / CAP, h = a.group == 1 ? 0 : row / per, at = row - h * per;
      w[i] = weight[place[i]];
      y.load_at(i, grad.data + h * grad_head + at * grad.row, d);
      x.load_at(i, q.data + h * q_head + at * q.row, d);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (!(e + i * E < to)) break;
      float v[8];
      y.take(i, grad, d, a.d, v);
#pragma unroll
      for (int z = 0; z < 8; z++) dv[z] = fmaf(w[i].p, v[z], dv[z]);
      x.take(i, q, d, a.d, v);
#pragma unroll
      for (int z = 0; z < 8; z++) dk[z] = fmaf(w[i].ds, v[z], dk[z]);
    }
  }
  for (int step = G; step < 32; step <<= 1)
#pragma unroll
    for (int z = 0; z < 8; z++) {
      dv[z] += __shfl_xor_sync(EMXI_FULL, dv[z], step);
      dk[z] += __shfl_xor_sync(EMXI_FULL, dk[z], step);
    }
}

/* A warp a key; keys that many rows weigh are shared by the block's warps, an eighth of the rows each. */
constexpr uint32_t LONG_COLUMN = 384;
template <int KIND>
__global__ void __launch_bounds__(THREADS, KIND ? 4 : 2) gather_keys(const __grid_constant__ emxi_cuda_attn a) {
  __shared__ float shares[WARPS][2][MAX_D];
  key_tile t;
  if (!key_tile_of(a, blockIdx.x / (TILE / WARPS), &t)) return;
  const int c0 = blockIdx.x % (TILE / WARPS) * WARPS, warp = threadIdx.x / 32, lane = threadIdx.x % 32, G = lanes_of(a.d),
            d = lane % G * 8;
  const int64_t tile = blockIdx.x / (TILE / WARPS);
  if (a.has_dense[tile] == EMXI_CUDA_KEYS_DONE) return;
  const uint32_t *start = a.key_start + t.unit * (a.k_tiles * TILE + 1) + t.tile * TILE + c0;
  const int real = min(WARPS, t.n - c0); /* keys that rows may weigh */
  const uint32_t begin = start[min(max(real, 0), min(lane, WARPS))];
  const source q = rows_of(a.q, t.b, t.g * a.group, 0), grad = rows_of(a.d_o, t.b, t.g * a.group, 0);
  const auto store = [&](int c, float(&dk)[8], float(&dv)[8]) {
    if (lane >= G) return;
    if (a.has_dense[tile] && c < t.n)
#pragma unroll
      for (int y = 0; y < 8; y++)
        if (d + y < a.d) {
          dv[y] += a.dv[(tile * TILE + c) * a.d + d + y];
          dk[y] += a.dk[(tile * TILE + c) * a.d + d + y];
        }
#pragma unroll
    for (int y = 0; y < 8; y++) dk[y] *= a.scale;
    put8<KIND>(row_of(a.d_k, t.b, t.g, t.sp.k0 + t.j0 + c), a.d_k.dtype, d, a.d, dk);
    put8<KIND>(row_of(a.d_v, t.b, t.g, t.sp.k0 + t.j0 + c), a.d_v.dtype, d, a.d, dv);
  };
  const uint32_t of_lane = __shfl_down_sync(EMXI_FULL, begin, 1) - begin;
  const bool many = __any_sync(EMXI_FULL, lane < WARPS && of_lane > LONG_COLUMN);
  for (int x = -1; x < (many ? WARPS : 0); x++) { /* this warp's key, then those that all share */
    const int c = x < 0 ? warp : x;
    const uint32_t first = __shfl_sync(EMXI_FULL, begin, c), n = __shfl_sync(EMXI_FULL, of_lane, c),
                   share = x < 0 ? n : (n + WARPS - 1) / WARPS;
    if ((x < 0) == (n > LONG_COLUMN) || c0 + c >= t.all) continue;
    const uint32_t from = x < 0 ? first : min(first + warp * share, first + n), to = min(from + share, first + n);
    float dk[8] = {}, dv[8] = {};
    if (from < to) add_rows<KIND>(a, t, q, grad, from, to, dk, dv);
    if (x >= 0) {
      if (lane < G)
#pragma unroll
        for (int y = 0; y < 8; y++) {
          shares[warp][0][d + y] = dk[y];
          shares[warp][1][d + y] = dv[y];
        }
      __syncthreads();
      if (warp == x && lane < G)
#pragma unroll
        for (int y = 0; y < 8; y++) {
          dk[y] = dv[y] = 0;
          for (int o = 0; o < WARPS; o++) {
            dk[y] += shares[o][0][d + y];
            dv[y] += shares[o][1][d + y];
          }
        }
      __syncthreads();
    }
    if (x < 0 || warp == x) store(c0 + c, dk, dv);
  }
}

/* The gradient of each head's alpha: the sum of its rows' shares, added to what earlier slices found. A block a head. */
__global__ void __launch_bounds__(THREADS) add_shares(const __grid_constant__ emxi_cuda_attn a) {
  __shared__ double scratch[WARPS];
  const int64_t per = a.packed ? a.rows_q : a.max_q, heads = (int64_t)a.ng * a.group;
  double sum = 0;
  for (int b = 0; b < (a.packed ? 1 : a.nb); b++)
    for (int64_t i = threadIdx.x; i < per; i += THREADS) sum += a.share[(b * heads + blockIdx.x) * per + i];
  sum = block_sum(sum, scratch);
  double *out = a.d_alpha + a.g0 * a.group + blockIdx.x;
  if (threadIdx.x == 0) *out = (a.b0 ? *out : 0.0) + sum;
}

} // namespace

/* What eights<> may assume. */
static int kind_of(const emxi_cuda_attn *a) {
  const int32_t type = a->k.dtype;
  const bool plain = type != EMX_F32 && a->q.dtype == type && a->q.vectors && a->k.vectors && a->v.vectors && !a->block_table &&
                     (a->d == 16 || a->d == 32 || a->d == 64 || a->d == 128 || a->d == 256);
  const bool written =
      a->backward ? a->d_o.dtype == type && a->d_o.vectors && a->d_q.vectors && a->d_k.vectors && a->d_v.vectors : a->o.vectors;
  return !plain || !written ? 0 : type == EMX_F16 ? 1 : 2;
}
extern "C" void emxi_cuda_attn_resolve_forward(const emxi_cuda_attn *a, unsigned tiles, void *stream) {
  const int kind = kind_of(a);
  (kind == 1   ? resolve_forward<1>
   : kind == 2 ? resolve_forward<2>
               : resolve_forward<0>)<<<tiles, THREADS, 0, (cudaStream_t)stream>>>(*a);
}
extern "C" void emxi_cuda_attn_resolve_backward(const emxi_cuda_attn *a, unsigned tiles, int given, void *stream) {
  const int kind = kind_of(a);
  if (given && kind && a->d <= 128 && !a->alphas && (a->alpha == 1.5 || a->alpha == 2.0) && !a->slopes && !a->d_alpha)
    emxi_cuda_attn_settle_back(a, tiles, stream);
  else if (given)
    (kind == 1   ? resolve_backward<true, 1>
     : kind == 2 ? resolve_backward<true, 2>
                 : resolve_backward<true, 0>)<<<tiles, THREADS, 0, (cudaStream_t)stream>>>(*a);
  else
    (kind == 1   ? resolve_backward<false, 1>
     : kind == 2 ? resolve_backward<false, 2>
                 : resolve_backward<false, 0>)<<<tiles, THREADS, 0, (cudaStream_t)stream>>>(*a);
}
extern "C" void emxi_cuda_attn_find_odd(const emxi_cuda_attn *a, unsigned units, void *stream) {
  (void)cudaMemsetAsync(a->odd, 0, units * sizeof *a->odd, (cudaStream_t)stream);
  find_odd<<<units * ODD_PARTS, THREADS, 0, (cudaStream_t)stream>>>(*a);
}
extern "C" void emxi_cuda_attn_survey(const emxi_cuda_attn *a, unsigned tiles, int given, void *stream) {
  const size_t shared = (size_t)a->active_words * sizeof *a->active;
  (given ? survey<true> : survey<false>)<<<tiles, THREADS, shared, (cudaStream_t)stream>>>(*a);
}
extern "C" void emxi_cuda_attn_sort(const emxi_cuda_attn *a, unsigned units, void *s) {
  cudaStream_t stream = (cudaStream_t)s;
  const int64_t key_tiles = units * a->k_tiles;
  (void)cudaMemsetAsync(a->counts, 0, (size_t)(key_tiles * a->blocks) * sizeof *a->counts, stream);
  by_key_tile<false><<<(unsigned)(units * a->blocks), THREADS, 0, stream>>>(*a);
  scan_blocks<<<(unsigned)((key_tiles + WARPS - 1) / WARPS), THREADS, 0, stream>>>(*a, key_tiles);
  scan_tiles<<<units, THREADS, 0, stream>>>(*a);
  by_key_tile<true><<<(unsigned)(units * a->blocks), THREADS, 0, stream>>>(*a);
  sort_by_key<<<(unsigned)key_tiles, THREADS, 0, stream>>>(*a);
}
extern "C" void emxi_cuda_attn_gather_keys(const emxi_cuda_attn *a, unsigned units, void *stream) {
  const int kind = kind_of(a);
  const unsigned blocks = (unsigned)(units * a->k_tiles * (TILE / WARPS));
  (kind == 1 ? gather_keys<1> : kind == 2 ? gather_keys<2> : gather_keys<0>)<<<blocks, THREADS, 0, (cudaStream_t)stream>>>(*a);
}
extern "C" void emxi_cuda_attn_shares(const emxi_cuda_attn *a, void *stream) {
  add_shares<<<(unsigned)(a->ng * a->group), THREADS, 0, (cudaStream_t)stream>>>(*a);
}
