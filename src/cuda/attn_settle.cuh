/* SPDX-License-Identifier: Apache-2.0
 * From the lists of attn_sieve.cuh to results, alpha 1.5 and 2: D / 8 lanes a row, eight elements each, so that a warp works on two or four
 * rows at once and a row of keys or values is one load.
 *
 *   tau'     of the products in the list (tensor cores' sums, which are truncated, all one way), in f32, from the scan's bound upwards
 *   support  of tau', and what is so little below that the products' error may hide it: scored again, sums of D products in f32, rounded
 *            to nearest
 *   tau      of those, by Newton on the norm of the weights; then weights, positions and the sum of values. Where all keys have been scored
 *            again the sum of p is off by the roundings of p (2^-24 each) and of tau itself (2^-24 |tau| times 2 sum sqrt p at alpha 1.5).
 *
 * 2 D FLOP and D elements of K and of V a nonzero. A row's sums are in a fixed order. */
#ifndef EMXI_CUDA_ATTN_SETTLE_CUH
#define EMXI_CUDA_ATTN_SETTLE_CUH

#include "attn_sieve.cuh"

namespace {

constexpr int SETTLE_THREADS = 128, SETTLE_WARPS = SETTLE_THREADS / 32;

template <typename T>
__device__ __forceinline__ void unpack(const uint4 &w, float (&x)[8]) {
  const uint32_t u[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 f = std::is_same_v<T, __half> ? __half22float2(*(const __half2 *)&u[i])
                                               : make_float2(__uint_as_float(u[i] << 16), __uint_as_float(u[i] & 0xffff0000u));
    x[2 * i] = f.x;
    x[2 * i + 1] = f.y;
  }
}

/* Sums over G neighbouring lanes, largest over them, largest over the warp. */
template <int G>
__device__ __forceinline__ float among(float x) {
#pragma unroll
  for (int step = G / 2; step; step >>= 1) x += __shfl_xor_sync(EMXI_FULL, x, step);
  return x;
}
template <int G>
__device__ __forceinline__ float top_among(float x) {
#pragma unroll
  for (int step = G / 2; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(EMXI_FULL, x, step));
  return x;
}

/* G = D / 8 lanes a row; SPARSEMAX: alpha 2, else 1.5. */
template <typename T, int G, bool SPARSEMAX>
__global__ void __launch_bounds__(SETTLE_THREADS, G == 8 ? 6 : 7) settle(const __grid_constant__ emxi_cuda_attn a) {
  constexpr int ROWS = 32 / G, LD = CAP + G; /* rows of a warp; LD: their entries lie in different banks */
  __shared__ float score[SETTLE_WARPS][ROWS][LD];
  __shared__ __align__(16) int32_t where[SETTLE_WARPS][ROWS][LD];
  query_tile t;
  /* head by head, whose keys and values stay in the second-level cache */
  const int64_t heads = (int64_t)a.ng * a.group, x0 = blockIdx.x % a.q_tiles, rest = blockIdx.x / a.q_tiles;
  const int b = a.packed ? sequence_of<false>(a, x0) : a.b0 + (int)(rest / heads);
  if (!locate(a, b, x0, (int)(rest % heads), &t)) return;
  const int dense = __syncthreads_count((int)threadIdx.x < t.rows && a.n_list[t.row0 + threadIdx.x] == EMXI_CUDA_ROW_DENSE);
  if (threadIdx.x == 0) a.dense[t.unit * (a.group * a.q_tiles) + t.tile] = dense;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, l = lane % G, first_lane = lane - l;
  const bool has = 8 * l < a.d;
  const float c = (SPARSEMAX ? 1.0f : 0.5f) * a.scale;
  const char *const keys = row_of(a.k, t.b, t.g, t.sp.k0) + 16 * l, *const values = row_of(a.v, t.b, t.g, t.sp.k0) + 16 * l;
  const int64_t key_row = a.k.row * 2, value_row = a.v.row * 2;
  float *const z = score[warp][lane / G];
  int32_t *const pos = where[warp][lane / G];

  for (int r0 = warp * ROWS; r0 < t.rows + t.padded; r0 += SETTLE_WARPS * ROWS) {
    const int r = r0 + lane / G;
    const int64_t row = t.row0 + r, place = t.sp.q0 + t.i0 + r;
    const int state = r < t.rows ? a.n_list[row] : 0, at = state > 0 ? a.at[row] : 0;
    const int longest = max(max(at & 255, at >> 8 & 255), max(at >> 16 & 255, at >> 24 & 255));
    const int used = __reduce_max_sync(EMXI_FULL, (4 * longest + G - 1) / G);
    float top = -emxi_inf();
    for (int i = 0; i < used; i++) {
      const int e = l + G * i;
      emxi_cuda_entry entry = {-emxi_inf(), 0};
      if (e / 4 < (at >> 8 * (e & 3) & 255)) entry = a.entry[row * CAP + e];
      z[e] = entry.x;
      pos[e] = entry.at;
      top = fmaxf(top, entry.x);
    }
    __syncwarp();
    top = top_among<G>(top);
    /* tau' relative to the top, in units of y */
    const auto solve = [&](float x, int entries, int steps, float enough) {
      for (int step = 0; step < steps; step++) {
        float f = 0, g = 0;
        for (int i = 0; i < entries; i++) {
          const float y = fmaxf(fmaf(z[l + G * i] - top, c, -x), 0.0f);
          f += SPARSEMAX ? y : y * y;
          g += SPARSEMAX ? (y > 0 ? 1.0f : 0.0f) : y;
        }
        f = among<G>(f);
        g = among<G>(g);
        const float e = f > 0 ? (SPARSEMAX ? f - 1.0f : f - sqrtf(f)) / g : 0.0f;
        x += e;
        if (!__any_sync(EMXI_FULL, fabsf(e) > enough)) break;
      }
      return x;
    };
    float x = -1;
    if (state > 0) x = fmaxf(-1.0f, (a.bound[row] - top) * c);
    x = solve(x, used, 16, 1e-5f);
    const float margin = 1e-5f + 2e-6f * fabsf(top * c);
    int n = 0;
    /* keep(score): whether the entry stays, and what replaces its score */
    const auto compact = [&](int entries, auto keep) {
      n = 0;
      for (int i = 0; i < entries; i++) {
        float s = z[l + G * i];
        const int32_t p = pos[l + G * i];
        const bool stays = keep(s);
        const uint32_t some = __ballot_sync(EMXI_FULL, stays) >> first_lane & ((1u << G) - 1);
        __syncwarp(); /* every lane has read */
        if (stays) {
          const int to = n + __popc(some & ((1u << l) - 1));
          z[to] = s;
          pos[to] = p;
        }
        n += __popc(some);
        __syncwarp();
      }
    };
    compact(used, [&](float &s) { return fmaf(s - top, c, margin) > x; });
    /* scores of what is left */
    for (int e = n + l; state > 0 && e < (n + 3) / 4 * 4; e += G) pos[e] = pos[0];
    __syncwarp();
    const int most = __reduce_max_sync(EMXI_FULL, n);
    if (most) {
      float q[8] = {};
      if (has && state > 0) unpack<T>(*(const uint4 *)(row_of(a.q, t.b, t.h, place) + 16 * l), q);
      const bool hi = l & G / 2, odd = l & G / 4;
      for (int e = 0; e < most; e += 4) {
        uint4 k[4];
        float s[4];
#pragma unroll
        for (int u = 0; u < 4; u++) {
          k[u] = make_uint4(0, 0, 0, 0);
          if (has && e < n) k[u] = __ldg((const uint4 *)(keys + pos[e + u] * key_row));
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
          float y[8];
          unpack<T>(k[u], y);
          s[u] = q[0] * y[0];
#pragma unroll
          for (int i = 1; i < 8; i++) s[u] = fmaf(q[i], y[i], s[u]);
        }
        /* four sums over the row's lanes, each in some of them */
        float s0 = hi ? s[2] : s[0], s1 = hi ? s[3] : s[1];
        s0 += __shfl_xor_sync(EMXI_FULL, hi ? s[0] : s[2], G / 2);
        s1 += __shfl_xor_sync(EMXI_FULL, hi ? s[1] : s[3], G / 2);
        float sum = odd ? s1 : s0;
        sum += __shfl_xor_sync(EMXI_FULL, odd ? s0 : s1, G / 4);
#pragma unroll
        for (int step = G / 8; step; step >>= 1) sum += __shfl_xor_sync(EMXI_FULL, sum, step);
        const int to = e + (hi ? 2 : 0) + (odd ? 1 : 0);
        if (to < n) z[to] = sum;
      }
      __syncwarp();
    }
    const int parts = (most + G - 1) / G;
    const float old = top;
    top = -emxi_inf();
    for (int e = l; e < n; e += G) top = fmaxf(top, z[e]);
    top = top_among<G>(top);
    for (int i = 0; i < parts; i++)
      if (l + G * i >= n) z[l + G * i] = -emxi_inf();
    __syncwarp();
    /* from the left of the root, which is at most -1 / sqrt n (alpha 2: -1 / n) */
    x = solve(fminf(fmaxf(-1.0f, x + (old - top) * c - margin), SPARSEMAX ? -1.0f / CAP : -rsqrtf((float)CAP)), parts, 8, 1e-7f);
    compact(parts, [&](float &s) {
      const float y = fmaf(s - top, c, -x);
      s = SPARSEMAX ? y : y * y;
      return y > 0;
    });
    const int support = n;
    if (a.index.data) { /* positions in order: a position's place is the number of smaller ones */
      const bool write = state > 0 && support <= a.list;
      for (int e = support + l; e < (support + 3) / 4 * 4; e += G) pos[e] = INT32_MAX;
      __syncwarp();
      int32_t *const index = write ? (int32_t *)row_of(a.index, t.b, t.h, place) : nullptr;
      for (int e = l; write && e < support; e += 2 * G) {
        const int32_t one = pos[e], two = e + G < support ? pos[e + G] : -1;
        int first = 0, second = 0;
        for (int i = 0; i < support; i += 4) {
          const int4 p = *(const int4 *)(pos + i);
          first += (p.x < one) + (p.y < one) + (p.z < one) + (p.w < one);
          second += (p.x < two) + (p.y < two) + (p.z < two) + (p.w < two);
        }
        index[first] = one;
        if (two >= 0) index[second] = two;
      }
    }
    float acc[8] = {};
    if (has) {
      for (int e = 0; e < support; e += 4) {
        uint4 v[4];
        float p[4];
#pragma unroll
        for (int u = 0; u < 4; u++) {
          v[u] = make_uint4(0, 0, 0, 0);
          p[u] = 0;
          if (e + u < support) {
            v[u] = __ldg((const uint4 *)(values + pos[e + u] * value_row));
            p[u] = z[e + u];
          }
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
          float y[8];
          unpack<T>(v[u], y);
#pragma unroll
          for (int i = 0; i < 8; i++) acc[i] = fmaf(p[u], y[i], acc[i]);
        }
      }
    }
    if (r < t.rows + t.padded && state != EMXI_CUDA_ROW_DENSE) {
      if (state < 0)
#pragma unroll
        for (int i = 0; i < 8; i++) acc[i] = emxi_nan();
      char *const out = row_of(a.o, t.b, t.h, place);
      if (has && a.o.vectors && a.o.dtype == dtype_of<T>) {
        alignas(16) T y[8];
#pragma unroll
        for (int i = 0; i < 8; i++) from_float(acc[i], &y[i]);
        *(uint4 *)(out + 16 * l) = *(const uint4 *)y;
      } else if (has) {
        store8(out, a.o.dtype, 8 * l, a.d, acc);
      }
      const double tau = state < 0 ? (double)emxi_nan()
                         : state   ? (double)top * ((SPARSEMAX ? 1.0 : 0.5) * (double)a.scale) + (double)x
                                   : -(double)emxi_inf();
      if (l == 0 && a.tau.data) *(float *)row_of(a.tau, t.b, t.h, place) = (float)tau;
      if (l == 0 && a.support.data) *(int32_t *)row_of(a.support, t.b, t.h, place) = support;
    }
    __syncwarp();
  }
}

template <typename T>
void sift(const emxi_cuda_attn &a, unsigned sequences, cudaStream_t stream) {
  const unsigned of_block = (unsigned)(a.ng * a.group) * sequences;
  const auto scan = [&](auto kernel, size_t shared) {
    (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    kernel<<<(unsigned)a.q_blocks * of_block, FAST_THREADS, shared, stream>>>(a);
  };
  if (a.d <= 64)
    scan(sieve<T, 64>, sieve_of<64>::SHARED);
  else
    scan(sieve<T, 128>, sieve_of<128>::SHARED);
  const unsigned tiles = (unsigned)a.q_tiles * of_block;
  if (a.alphas || (a.alpha != 1.5 && a.alpha != 2.0) || a.v.dtype != dtype_of<T> || !a.v.vectors)
    emxi_cuda_attn_resolve_forward(&a, tiles, stream);
  else if (a.d <= 64)
    (a.alpha == 2.0 ? settle<T, 8, true> : settle<T, 8, false>)<<<tiles, SETTLE_THREADS, 0, stream>>>(a);
  else
    (a.alpha == 2.0 ? settle<T, 16, true> : settle<T, 16, false>)<<<tiles, SETTLE_THREADS, 0, stream>>>(a);
}

} // namespace

#endif
