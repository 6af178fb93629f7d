/* SPDX-License-Identifier: Apache-2.0
 * Gradients of q from the caller's lists, alpha 1.5 and 2, and the weights of their support: as attn_settle.cuh, D / 8 lanes a
 * row.
 *
 *   scores   of the list and products of do and v with it, side by side: sums of D products in f32
 *   tau      again of those scores, by Newton on the norm of the weights from the given one; a list that has another is not the
 *            support
 *   delta    sum u do v / sum u,  ds = u (do v - delta),  dq = scale sum ds k
 *
 * 6 D FLOP, two rows of K and one of V a nonzero. What a list does not answer for is todo: scanned, then attn_lists.cu. A row's
 * sums are in a fixed order. Oracle: tests/gpu/test_gpu_attn.c. */
#include "attn_settle.cuh"

namespace {

/* room: of a list in shared memory, a multiple of four. */
template <typename T, int G, bool SPARSEMAX>
__global__ void __launch_bounds__(SETTLE_THREADS, 5) settle_back(const __grid_constant__ emxi_cuda_attn a, int room) {
  constexpr int ROWS = 32 / G;
  extern __shared__ __align__(16) float kept[];
  query_tile t;
  /* head by head, whose keys and values stay in the second-level cache */
  const int64_t heads = (int64_t)a.ng * a.group, x0 = blockIdx.x % a.q_tiles, rest = blockIdx.x / a.q_tiles;
  const int b = a.packed ? sequence_of<false>(a, x0) : a.b0 + (int)(rest / heads);
  if (!locate(a, b, x0, (int)(rest % heads), &t)) return;
  if (a.mode && a.mode[t.unit * (a.group * a.q_tiles) + t.tile]) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, l = lane % G, first_lane = lane - l;
  const bool has = 8 * l < a.d, hi = l & G / 2, mid = l & G / 4, low = l & G / 8;
  const double unit = (SPARSEMAX ? 1.0 : 0.5) * (double)a.scale;
  const float c = (float)unit;
  const char *const keys = row_of(a.k, t.b, t.g, t.sp.k0) + 16 * l, *const values = row_of(a.v, t.b, t.g, t.sp.k0) + 16 * l;
  const int64_t key_row = a.k.row * 2, value_row = a.v.row * 2;
  const int ld = room + G; /* entries of different rows lie in different banks */
  float *const z = kept + (warp * ROWS + lane / G) * 3 * ld, *const dp = z + ld;
  int32_t *const pos = (int32_t *)(dp + ld);

  for (int r0 = warp * ROWS; r0 < t.rows + t.padded; r0 += SETTLE_WARPS * ROWS) {
    const int r = r0 + lane / G;
    const int64_t row = t.row0 + r, place = t.sp.q0 + t.i0 + r;
    int n = 0;
    float tau = 0;
    key_range vis = {0, 0};
    const int32_t *list = nullptr;
    if (r < t.rows) {
      vis = visible(a, t.sp, t.i0 + r);
      tau = *(const float *)row_of(a.tau, t.b, t.h, place);
      n = *(const int32_t *)row_of(a.support, t.b, t.h, place);
      list = (const int32_t *)row_of(a.index, t.b, t.h, place);
      if (!finite(tau) || n < 1 || n > room || n > a.list) n = 0;
    }
    bool todo = r < t.rows && n == 0;
    for (int e = l; e < (n + 3) / 4 * 4; e += G) pos[e] = list[min(e, n - 1)];
    __syncwarp();
    bool wrong = false;
    for (int e = l; e < n; e += G) wrong |= pos[e] < (e ? pos[e - 1] + 1 : vis.from) || pos[e] >= vis.to;
    if (__ballot_sync(EMXI_FULL, wrong) >> first_lane & ((1u << G) - 1)) todo = true, n = 0;
    const int most = __reduce_max_sync(EMXI_FULL, n);
    float q[8] = {}, grad[8] = {};
    if (has && n) {
      unpack<T>(*(const uint4 *)(row_of(a.q, t.b, t.h, place) + 16 * l), q);
      unpack<T>(*(const uint4 *)(row_of(a.d_o, t.b, t.h, place) + 16 * l), grad);
    }
    for (int e = 0; e < most; e += 4) {
      uint4 k[4], v[4];
      int4 at = {};
      if (e < n) at = *(const int4 *)(pos + e);
      const int32_t j[4] = {at.x, at.y, at.z, at.w};
#pragma unroll
      for (int u = 0; u < 4; u++) {
        k[u] = v[u] = make_uint4(0, 0, 0, 0);
        if (!has || e >= n) continue;
        k[u] = __ldg((const uint4 *)(keys + j[u] * key_row));
        v[u] = __ldg((const uint4 *)(values + j[u] * value_row));
      }
      float s[8];
#pragma unroll
      for (int u = 0; u < 4; u++) {
        float y[8];
        unpack<T>(k[u], y);
        s[u] = q[0] * y[0];
#pragma unroll
        for (int i = 1; i < 8; i++) s[u] = fmaf(q[i], y[i], s[u]);
        unpack<T>(v[u], y);
        s[4 + u] = grad[0] * y[0];
#pragma unroll
        for (int i = 1; i < 8; i++) s[4 + u] = fmaf(grad[i], y[i], s[4 + u]);
      }
      /* eight sums over the row's lanes, each in some of them */
      float four[4], two[2];
#pragma unroll
      for (int u = 0; u < 4; u++) four[u] = (hi ? s[4 + u] : s[u]) + __shfl_xor_sync(EMXI_FULL, hi ? s[u] : s[4 + u], G / 2);
#pragma unroll
      for (int u = 0; u < 2; u++)
        two[u] = (mid ? four[2 + u] : four[u]) + __shfl_xor_sync(EMXI_FULL, mid ? four[u] : four[2 + u], G / 4);
      float sum = (low ? two[1] : two[0]) + __shfl_xor_sync(EMXI_FULL, low ? two[0] : two[1], G / 8);
#pragma unroll
      for (int step = G / 16; step; step >>= 1) sum += __shfl_xor_sync(EMXI_FULL, sum, step);
      const int to = e + (mid ? 2 : 0) + (low ? 1 : 0);
      if (to < n) (hi ? dp : z)[to] = sum;
    }
    __syncwarp();

    const int parts = (most + G - 1) / G;
    float top = -emxi_inf();
    for (int e = l; e < n; e += G) top = fmaxf(top, z[e]);
    top = top_among<G>(top);
    for (int i = 0; i < parts; i++)
      if (l + G * i >= n) z[l + G * i] = -emxi_inf();
    const auto y_of = [&](int e, float x) { return fmaxf(fmaf(z[e] - top, c, -x), 0.0f); };
    /* tau relative to the top; it is at most -1 / sqrt n (alpha 2: -1 / n) */
    float x =
        n ? fminf(fmaxf(-1.0f, (float)((double)tau - unit * (double)top)), SPARSEMAX ? -1.0f / CAP : -rsqrtf((float)CAP)) : -1.0f;
    for (int step = 0; step < 8; step++) {
      float f = 0, g = 0;
      for (int i = 0; i < parts; i++) {
        const float y = y_of(l + G * i, x);
        f += SPARSEMAX ? y : y * y;
        g += SPARSEMAX ? (y > 0 ? 1.0f : 0.0f) : y;
      }
      f = among<G>(f);
      g = among<G>(g);
      const float e = f > 0 ? (SPARSEMAX ? f - 1.0f : f - sqrtf(f)) / g : 0.0f;
      x += e;
      if (!__any_sync(EMXI_FULL, fabsf(e) > 1e-7f)) break;
    }
    if (n && !(fabs(unit * (double)top + (double)x - (double)tau) <= 1e-5 * (1 + fabs((double)tau)))) todo = true, n = 0;
    float su = 0, sud = 0;
    for (int i = 0; i < parts; i++) {
      const int e = l + G * i;
      const float y = y_of(e, x), u = SPARSEMAX ? 1.0f : y;
      if (e < n && y > 0) su += u, sud = fmaf(u, dp[e], sud);
    }
    su = among<G>(su);
    sud = among<G>(sud);
    const float delta = su > 0 ? sud / su : 0.0f;
    int support = 0;
    for (int i = 0; i < parts; i++) { /* entries move down */
      const int e = l + G * i;
      const float y = y_of(e, x);
      const bool stays = e < n && y > 0;
      const int32_t position = stays ? pos[e] : 0;
      const float ds = stays ? (SPARSEMAX ? 1.0f : y) * (dp[e] - delta) : 0.0f;
      const uint32_t some = __ballot_sync(EMXI_FULL, stays) >> first_lane & ((1u << G) - 1);
      const int to = support + __popc(some & ((1u << l) - 1));
      __syncwarp(); /* every lane has read */
      if (stays) {
        z[to] = ds;
        pos[to] = position;
        a.pos[row * CAP + to] = position;
        a.weight[row * CAP + to] = {SPARSEMAX ? y : y * y, ds};
      }
      support += __popc(some);
      __syncwarp();
    }
    float acc[8] = {};
    if (has)
      for (int e = 0; e < support; e += 4) {
        uint4 k[4];
        float ds[4];
#pragma unroll
        for (int u = 0; u < 4; u++) {
          k[u] = make_uint4(0, 0, 0, 0);
          ds[u] = 0;
          if (e + u < support) {
            k[u] = __ldg((const uint4 *)(keys + pos[e + u] * key_row));
            ds[u] = z[e + u];
          }
        }
#pragma unroll
        for (int u = 0; u < 4; u++) {
          float y[8];
          unpack<T>(k[u], y);
#pragma unroll
          for (int i = 0; i < 8; i++) acc[i] = fmaf(ds[u], y[i], acc[i]);
        }
      }
    if (r < t.rows + t.padded && !todo && has) {
#pragma unroll
      for (int i = 0; i < 8; i++) acc[i] *= a.scale;
      char *const out = row_of(a.d_q, t.b, t.h, place);
      if (a.d_q.dtype == dtype_of<T>) {
        alignas(16) T y[8];
#pragma unroll
        for (int i = 0; i < 8; i++) from_float(acc[i], &y[i]);
        *(uint4 *)(out + 16 * l) = *(const uint4 *)y;
      } else {
        store8(out, a.d_q.dtype, 8 * l, a.d, acc);
      }
    }
    if (r < t.rows && l == 0) {
      a.todo[row] = todo;
      if (!todo) {
        a.n_list[row] = support;
        a.at[row] = 0;
      }
    }
    __syncwarp();
  }
}

template <typename T, int G>
void run_back(const emxi_cuda_attn &a, unsigned tiles, cudaStream_t stream) {
  const int room = (int)(a.list < CAP ? (a.list + 3) / 4 * 4 : CAP), shared = SETTLE_WARPS * (32 / G) * 3 * (room + G) * 4;
  const auto kernel = a.alpha == 2.0 ? settle_back<T, G, true> : settle_back<T, G, false>;
  (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  kernel<<<tiles, SETTLE_THREADS, shared, stream>>>(a, room);
}

} // namespace

extern "C" void emxi_cuda_attn_settle_back(const emxi_cuda_attn *a, unsigned tiles, void *s) {
  cudaStream_t stream = (cudaStream_t)s;
  if (a->k.dtype == EMX_F16)
    (a->d <= 64 ? run_back<__half, 8> : run_back<__half, 16>)(*a, tiles, stream);
  else
    (a->d <= 64 ? run_back<__nv_bfloat16, 8> : run_back<__nv_bfloat16, 16>)(*a, tiles, stream);
}
