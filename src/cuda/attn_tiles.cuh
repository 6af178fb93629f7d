/* SPDX-License-Identifier: Apache-2.0
 * Dense attention by products of tiles, 16 bit, head dims up to 128: forward of dense rows; backward, where tiles hold many nonzeros, from
 * (q, k, v, tau, do) and the tiles that have weights (`mode`, `active`).
 *
 * A block has 64 rows, 16 a warp, and walks tiles of 64 columns, which come to shared memory while the ones before are multiplied (sm_90a:
 * wgmma; else mma, m16n8k16; f32 sums). Backward: S = R1 C1^T, P' = R2 C2^T; what they make of each other stays in registers, the left side
 * of the products that follow, 8 D FLOP a pair of an active tile for each of
 *   queries   rows q, do; columns k, v:   u = p^(2-alpha) of S,  A += (u (P' - guess)) K,  B += u K,  and the sums of p, u and
 *             u (P' - guess): delta falls out at the end, dq = scale (A - (delta - guess) B). guess: delta over the first tile that the
 *             row weighs, so that what is rounded to 16 bits is no larger than ds
 *   keys      rows k, v; columns q, do:   dv += p^T do,  dk += (u (P' - delta))^T q
 * A row whose weights do not sum to one, for tau's rounding or because its lists were wrong, is left to the path of dense rows, which
 * solves tau again. Every sum has one owner and a fixed order. Oracle: tests/gpu/test_gpu_attn.c. */
#ifndef EMXI_CUDA_ATTN_TILES_CUH
#define EMXI_CUDA_ATTN_TILES_CUH

#include "attn.cuh"

namespace {

constexpr int TILES_THREADS = 128, BATCH = 384; /* BATCH: tiles listed at once */

template <int D>
struct tiles {
  static constexpr int BYTES = TILE * 2 * D;
  static constexpr size_t SHARED = 6 * BYTES + 2 * TILE * sizeof(emxi_cuda_edge);
};

enum { SOFTMAX = 3 }; /* beside powers.kind */
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ uint32_t shared_of(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
/* 16 bytes, of which the first `bytes` are copied and the others are zero. */
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <typename T>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  uint32_t x;
  if constexpr (std::is_same_v<T, __half>)
    *(__half2 *)&x = __floats2half2_rn(lo, hi);
  else
    *(__nv_bfloat162 *)&x = __floats2bfloat162_rn(lo, hi);
  return x;
}

/* Tiles in shared memory: 64 columns after 64, rows of 128 bytes, their chunks of 16 bytes swizzled. Chunk `chunk` of row r, whose
 * lowest three bits are x: */
constexpr int ROW = 128, HALF = TILE * ROW;
__device__ __forceinline__ uint32_t chunk_at(int r, int x, int chunk) {
  return chunk / 8 * HALF + r * ROW + (((chunk & 7) ^ x) << 4);
}
/* Rows `first` .. of `from`; zeros from `end` and from d on. */
template <int D>
__device__ __forceinline__ void copy_tile(uint32_t to, const char *from, int64_t stride, int first, int end, int d) {
  constexpr int CHUNKS = D / 8, STEP = TILES_THREADS / CHUNKS; /* a multiple of 8: a thread's rows have one swizzle */
  const int chunk = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
  const char *row = from + (first + r0) * stride + chunk * 16;
  to += chunk_at(r0, r0 & 7, chunk);
  if (first + TILE <= end && d == D) {
#pragma unroll
    for (int i = 0; i < TILE / STEP; i++, row += STEP * stride)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i * STEP * ROW), "l"(row) : "memory");
    return;
  }
  for (int i = 0; i < TILE / STEP; i++, row += STEP * stride) {
    const bool real = first + r0 + i * STEP < end && chunk * 8 < d;
    copy_async(to + i * STEP * ROW, real ? row : from, real ? 16 : 0);
  }
}

/* Products. Lane l of a warp has rows l / 4 and l / 4 + 8 of the warp's 16 and of each 8 columns 2 (l % 4) and the next. row_products:
 * s = R C^T, 64 columns; add_products: acc += w C, w in 16 bits, four times 16 columns. They may be under way until `settle`, and their
 * last LEFT longer; then the tiles they read may change. */
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* Shared memory ends below 2^18. */
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int offset) {
  return (uint64_t)(((address >> 4) | 64 << 16) + offset / 16) | (uint64_t)(64 | 1 << 30) << 32;
}
#define EMXI_D4(d, n) "+f"((d)[n][0]), "+f"((d)[n][1]), "+f"((d)[n][2]), "+f"((d)[n][3])
#define EMXI_D(d) \
  EMXI_D4(d, 0), EMXI_D4(d, 1), EMXI_D4(d, 2), EMXI_D4(d, 3), EMXI_D4(d, 4), EMXI_D4(d, 5), EMXI_D4(d, 6), EMXI_D4(d, 7)
#define EMXI_WGMMA(type)                                         \
  "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type    \
  " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16," \
  "%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
/* d = (add ? d : 0) + a b^T, both in shared memory. */
#define EMXI_WGMMA_ROWS(type)                                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" EMXI_WGMMA(type) "%32, %33, p, 1, 1, 0, 0;\n}" \
               : EMXI_D(d)                                                                                 \
               : "l"(descriptor(R, at)), "l"(descriptor(C, at)), "n"(k > 0))
/* d += a b, a in registers, b's rows in shared memory. */
#define EMXI_WGMMA_ADD(type)                                                   \
  asm volatile("{\n" EMXI_WGMMA(type) "{%32,%33,%34,%35}, %36, 1, 1, 1, 1;\n}" \
               : EMXI_D(d)                                                     \
               : "r"(w[k][0]), "r"(w[k][1]), "r"(w[k][2]), "r"(w[k][3]), "l"(descriptor(C, half * HALF + k * 16 * ROW)))
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT, int N>
__device__ __forceinline__ void settle(float (&d)[N][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#pragma unroll
  for (int n = 0; n < N; n++) asm volatile("" : EMXI_D4(d, n)::"memory");
}
template <typename T, int D, int k = 0>
__device__ __forceinline__ void row_products(float (&d)[8][4], uint32_t R, uint32_t C) {
  if constexpr (k == 0) products_begin();
  constexpr int at = k / 4 * HALF + k % 4 * 32;
  if constexpr (std::is_same_v<T, __half>)
    EMXI_WGMMA_ROWS("f16");
  else
    EMXI_WGMMA_ROWS("bf16");
  if constexpr (k + 1 < D / 16)
    row_products<T, D, k + 1>(d, R, C);
  else
    products_end();
}
template <typename T, int D>
__device__ __forceinline__ void add_products(float (&acc)[D / 8][4], const uint32_t (&w)[4][4], uint32_t C) {
  products_begin();
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int half = 0; half < D / 64; half++) {
      float(&d)[8][4] = *(float(*)[8][4])(acc + 8 * half);
      if constexpr (std::is_same_v<T, __half>)
        EMXI_WGMMA_ADD("f16");
      else
        EMXI_WGMMA_ADD("bf16");
    }
  products_end();
}
/* What copies have brought may be read by products after the next barrier. */
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
template <int LEFT, int N>
__device__ __forceinline__ void settle(float (&)[N][4]) {}
template <typename T, int D>
__device__ __forceinline__ void row_products(float (&s)[8][4], uint32_t R, uint32_t C) {
  const int lane = threadIdx.x % 32, x = lane & 7, r = threadIdx.x / 32 * 16 + (lane & 15), c = x + (lane >> 4) * 8;
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = 0;
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t a[4];
    load_matrices(a, R + k / 4 * HALF + chunk_at(r, x, 2 * (k % 4) + (lane >> 4)));
    const uint32_t at = C + k / 4 * HALF + chunk_at(c, x, 2 * (k % 4) + (lane >> 3 & 1));
#pragma unroll
    for (int n = 0; n < 4; n++) {
      uint32_t b[4];
      load_matrices(b, at + n * 16 * ROW);
      multiply_add<T>(s[2 * n], a, b[0], b[1]);
      multiply_add<T>(s[2 * n + 1], a, b[2], b[3]);
    }
  }
}
template <typename T, int D>
__device__ __forceinline__ void add_products(float (&acc)[D / 8][4], const uint32_t (&w)[4][4], uint32_t C) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 4; k++)
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      uint32_t b[4];
      load_transposed(b, C + k * 16 * ROW + n / 4 * HALF + chunk_at(lane & 15, lane & 7, 2 * (n % 4) + (lane >> 4)));
      multiply_add<T>(acc[2 * n], w[k], b[0], b[1]);
      multiply_add<T>(acc[2 * n + 1], w[k], b[2], b[3]);
    }
}
__device__ __forceinline__ void publish() {}
#endif

/* u = p^(2-alpha) and p of y > 0, both 0 at y = 0. */
template <int KIND>
__device__ __forceinline__ void tile_weigh(float b, float y, float *p, float *u) {
  if (KIND == 2) {
    *u = y;
    *p = y * y;
  } else if (KIND == 1) {
    *u = y > 0 ? 1.0f : 0.0f;
    *p = y;
  } else if (KIND == SOFTMAX) {
    *u = *p = y;
  } else {
    *u = y > 0 ? exp2f((b - 1) * log2f(y)) : 0.0f;
    *p = *u * y;
  }
}

/* A block's tile of queries: those that see most come first, unit after unit, whose keys stay in the second-level cache. */
__device__ __forceinline__ bool tile_of_queries(const emxi_cuda_attn &a, int64_t block, query_tile *t) {
  const int64_t per_unit = (int64_t)a.group * a.q_tiles, at = block % per_unit, x = a.q_tiles - 1 - at / a.group;
  const int unit = (int)(block / per_unit), head = (a.packed ? unit : unit % a.ng) * a.group + (int)(at % a.group);
  return locate(a, a.packed ? sequence_of<false>(a, x) : a.b0 + unit / a.ng, x, head, t);
}
/* Elements d and d + 1 of a row of m. */
template <typename T>
__device__ __forceinline__ void store_pair(const emxi_cuda_mat &m, char *row, int d, int D, float x, float y) {
  if (d >= D) return;
  if (m.dtype == dtype_of<T> && m.vectors) {
    *(uint32_t *)(row + 2 * d) = pack<T>(x, y);
  } else {
    store_any(row, m.dtype, d, x);
    store_any(row, m.dtype, d + 1, y);
  }
}

template <typename T, int D, bool KEYS, int KIND>
__global__ void __launch_bounds__(TILES_THREADS, D == 64 ? 3 : 2) tile_gradients(const __grid_constant__ emxi_cuda_attn a) {
  using tile_t = tiles<D>;
  extern __shared__ __align__(1024) char shared[];
  __shared__ int32_t listed[BATCH];
  __shared__ int found[BATCH / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, col = lane % 4 * 2;
  const uint32_t R1 = shared_of(shared), R2 = R1 + tile_t::BYTES, columns = R2 + tile_t::BYTES;
  emxi_cuda_edge *const edges = (emxi_cuda_edge *)(shared + 6 * tile_t::BYTES); /* KEYS: of the columns, two stages */
  const int64_t per_unit = (int64_t)a.group * a.q_tiles;

  query_tile qt;
  key_tile kt;
  int mode = 0;
  if (KEYS) {
    if (!key_tile_of(a, blockIdx.x, &kt) || !kt.n) return;
  } else {
    if (!tile_of_queries(a, blockIdx.x, &qt)) return;
    mode = a.mode[qt.unit * per_unit + qt.tile];
    if (mode != EMXI_CUDA_TILES_SOME && mode != EMXI_CUDA_TILES_ALL) return;
  }
  const emxi_cuda_span sp = KEYS ? kt.sp : qt.sp;
  const int shift = sp.n - sp.s, left = (int)min(a.left, (int64_t)1 << 30), right = (int)min(a.right, (int64_t)1 << 30);
  const float a1 = KIND == SOFTMAX ? LOG2E : (float)(a.alpha - 1.0), c = a1 * a.scale, b = 1.0f / (float)(a.alpha - 1.0);
  const float stretch = KEYS && std::is_same_v<T, __half> ? 1024.0f : 1.0f; /* small weights of flat rows are no numbers of f16 */
  const int first_row = KEYS ? kt.j0 : qt.i0, my_row = first_row + warp * 16 + lane / 4;
  const int g = KEYS ? kt.g : qt.g;
  const auto data = [&](const emxi_cuda_mat &m, int h, bool query) {
    return row_of(m, KEYS ? kt.b : qt.b, h, query ? sp.q0 : sp.k0);
  };
  float slope = !KEYS && a.slopes ? a.slopes[qt.h] * a1 : 0;

  float edge[2] = {emxi_inf(), emxi_inf()}, guess[2] = {0, 0}, su[2] = {0, 0}, sud[2] = {0, 0}, sum[2] = {0, 0};
  bool guessed[2];
  if (!KEYS)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      edge[i] = a.edge[(qt.unit * per_unit + qt.tile) * TILE + warp * 16 + lane / 4 + 8 * i].t;
      guessed[i] = !(edge[i] < emxi_inf());
    }
  float acc1[D / 8][4], acc2[D / 8][4];
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) acc1[n][e] = acc2[n][e] = 0;

  /* candidates: tiles that see each other; KEYS: of queries, head by head */
  int from, to;
  if (KEYS) {
    const int64_t first = (int64_t)kt.j0 - shift - right, last = (int64_t)kt.j0 + TILE - 1 - shift + left;
    from = (int)(first > 0 ? first / TILE : 0);
    to = last < 0 ? 0 : (int)min(last / TILE + 1, (int64_t)(sp.s + TILE - 1) / TILE);
  } else {
    from = visible(a, sp, qt.i0).from / TILE;
    to = qt.rows ? (visible(a, sp, qt.i0 + qt.rows - 1).to + TILE - 1) / TILE : 0;
  }
  const char *column1 = nullptr, *column2 = nullptr; /* rows of C1 and C2 */
  int64_t queries = qt.unit * per_unit + qt.tile;    /* in mode, active and edge; KEYS: of the head's first tile */
  if (!KEYS) column1 = data(a.k, g, false), column2 = data(a.v, g, false);
  const auto is_active = [&](int e) {
    if (e >= to) return false;
    const int64_t x = queries + (KEYS ? e : 0);
    const int j = (KEYS ? kt.j0 / TILE : e) >> a.active_shift, m = KEYS ? a.mode[x] : mode;
    const uint32_t some = a.active[x * a.active_words + j / 32] >> j % 32 & 1;
    return m && ((m & EMXI_CUDA_TILES_ALL) || some);
  };
  const auto load = [&](int e, int stage) {
    const uint32_t C1 = columns + stage * 2 * tile_t::BYTES, C2 = C1 + tile_t::BYTES;
    copy_tile<D>(C1, column1, (KEYS ? a.q : a.k).row * 2, e * TILE, KEYS ? sp.s : sp.n, a.d);
    copy_tile<D>(C2, column2, (KEYS ? a.d_o : a.v).row * 2, e * TILE, KEYS ? sp.s : sp.n, a.d);
    if (KEYS && threadIdx.x < TILE / 2)
      copy_async(shared_of(edges + stage * TILE + 2 * threadIdx.x), a.edge + (queries + e) * TILE + 2 * threadIdx.x, 16);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  const auto work = [&](int e, int stage) {
    const uint32_t C1 = columns + stage * 2 * tile_t::BYTES, C2 = C1 + tile_t::BYTES;
    const emxi_cuda_edge *const its = edges + stage * TILE;
    const int i0 = KEYS ? e * TILE : qt.i0, j0 = KEYS ? kt.j0 : e * TILE;
    float s[8][4], dp[8][4];
    row_products<T, D>(s, R1, C1);
    row_products<T, D>(dp, R2, C2);
    settle<1>(s);
#pragma unroll
    for (int n = 0; n < 8; n++) {
      float4 two = {};
      if (KEYS) two = *(const float4 *)(its + 8 * n + col);
#pragma unroll
      for (int x = 0; x < 4; x++) {
        const float t = KEYS ? (x & 1 ? two.z : two.x) : edge[x >> 1];
        s[n][x] = fmaf(s[n][x], c, -t);
      }
    }
    if (slope != 0) /* a loop of its own: predicated instructions of the one before would cost what they cost with a slope */
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int x = 0; x < 4; x++)
          s[n][x] = fmaf(-slope,
                         (float)abs(my_row + 8 * (x >> 1) - (KEYS ? i0 : j0) - (8 * n + col + (x & 1)) + (KEYS ? -shift : shift)),
                         s[n][x]);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int x = 0; x < 4; x++) s[n][x] = KIND == SOFTMAX ? exp2f(s[n][x]) : fmaxf(s[n][x], 0.0f);
    if (j0 - i0 - (TILE - 1) - shift < -left || j0 + TILE - 1 - i0 - shift > right || j0 + TILE > sp.n) { /* not all is visible */
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int x = 0; x < 4; x++) {
          const int r = my_row + 8 * (x >> 1), q = (KEYS ? i0 : j0) + 8 * n + col + (x & 1), i = KEYS ? q : r, j = KEYS ? r : q,
                    d = j - i - shift;
          if (d < -left || d > right || j >= sp.n) s[n][x] = 0;
        }
    }
    settle<0>(dp);
    if (!KEYS && __any_sync(EMXI_FULL, !guessed[0] || !guessed[1]))
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float f = 0, h = 0, p, u;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int x = 0; x < 2; x++) {
            tile_weigh<KIND>(b, s[n][2 * i + x], &p, &u);
            f += u;
            h += u * dp[n][2 * i + x];
          }
        f = quad_sum(f);
        h = quad_sum(h);
        if (!guessed[i] && f > 0) {
          guess[i] = h / f;
          guessed[i] = true;
        }
      }
    float fu[2] = {0, 0}, fd[2] = {0, 0}, fp[2] = {0, 0};
    uint32_t w1[4][4], w2[4][4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int n = 2 * k + half;
        float4 two = {};
        if (KEYS) two = *(const float4 *)(its + 8 * n + col);
        float ds[4], w[4];
#pragma unroll
        for (int x = 0; x < 4; x++) {
          float p, u;
          tile_weigh<KIND>(b, s[n][x], &p, &u);
          ds[x] = u * (dp[n][x] - (KEYS ? (x & 1 ? two.w : two.y) : guess[x >> 1]));
          w[x] = KEYS ? p * stretch : u;
          if (!KEYS) {
            fu[x >> 1] += u;
            fd[x >> 1] += ds[x];
            fp[x >> 1] += p;
          }
        }
        w1[k][2 * half] = pack<T>(ds[0], ds[1]);
        w1[k][2 * half + 1] = pack<T>(ds[2], ds[3]);
        w2[k][2 * half] = pack<T>(w[0], w[1]);
        w2[k][2 * half + 1] = pack<T>(w[2], w[3]);
      }
    }
    add_products<T, D>(acc1, w1, C1);
    add_products<T, D>(acc2, w2, KEYS ? C2 : C1);
    if (!KEYS)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        su[i] += fu[i];
        sud[i] += fd[i];
        sum[i] += fp[i];
      }
    settle<1>(acc1);
    settle<0>(acc2);
  };

  bool any = false;
  const auto walk = [&]() {
    for (int base = from; base < to; base += BATCH) {
      constexpr int PARTS = BATCH / TILES_THREADS;
      uint32_t some[PARTS];
#pragma unroll
      for (int x = 0; x < PARTS; x++) {
        some[x] = __ballot_sync(EMXI_FULL, is_active(base + x * TILES_THREADS + (int)threadIdx.x));
        if (lane == 0) found[x * TILES_THREADS / 32 + warp] = __popc(some[x]);
      }
      __syncthreads();
      int n = 0;
#pragma unroll
      for (int x = 0; x < BATCH / 32; x++) {
        if (x % (TILES_THREADS / 32) == warp && some[x / (TILES_THREADS / 32)] >> lane & 1)
          listed[n + __popc(some[x / (TILES_THREADS / 32)] & ((1u << lane) - 1))] = base + 32 * x + lane;
        n += found[x];
      }
      __syncthreads();
      if (!n) continue;
      if (!any) {
        copy_tile<D>(R1, KEYS ? data(a.k, g, false) : data(a.q, qt.h, true), (KEYS ? a.k : a.q).row * 2, first_row,
                     KEYS ? sp.n : sp.s, a.d);
        copy_tile<D>(R2, KEYS ? data(a.v, g, false) : data(a.d_o, qt.h, true), (KEYS ? a.v : a.d_o).row * 2, first_row,
                     KEYS ? sp.n : sp.s, a.d);
      }
      any = true;
      load(listed[0], 0);
      for (int x = 0; x < n; x++) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        publish();
        __syncthreads();
        if (x + 1 < n) load(listed[x + 1], (x + 1) % 2);
        work(listed[x], x % 2);
      }
      __syncthreads();
    }
  };
  for (int hh = 0; hh < (KEYS ? a.group : 1); hh++) {
    if (KEYS) {
      const int h = g * a.group + hh;
      queries = kt.unit * per_unit + hh * a.q_tiles + (a.packed ? sp.q_tile : 0);
      column1 = data(a.q, h, true), column2 = data(a.d_o, h, true);
      slope = a.slopes ? a.slopes[h] * a1 : 0;
    }
    walk();
  }
  asm volatile("cp.async.wait_all;" ::: "memory");

  if constexpr (KEYS) {
    /* all there is, unless lists add to it; what dense rows gave is there */
    const bool lists = a.tile_start[blockIdx.x + kt.unit] != a.tile_start[blockIdx.x + kt.unit + 1],
               dense = a.has_dense[blockIdx.x];
    if (lists && !any) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = warp * 16 + lane / 4 + 8 * i;
      char *const dk = row_of(a.d_k, kt.b, g, sp.k0 + kt.j0 + r), *const dv = row_of(a.d_v, kt.b, g, sp.k0 + kt.j0 + r);
      if (r >= kt.all) continue;
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        const int d = 8 * n + col;
        if (d >= a.d) continue;
        const int64_t at = ((int64_t)blockIdx.x * TILE + r) * a.d + d;
        float2 k = make_float2(acc1[n][2 * i], acc1[n][2 * i + 1]),
               v = make_float2(acc2[n][2 * i] / stretch, acc2[n][2 * i + 1] / stretch);
        if (dense && r < kt.n) {
          const float2 other_k = *(const float2 *)(a.dk + at), other_v = *(const float2 *)(a.dv + at);
          k.x += other_k.x, k.y += other_k.y, v.x += other_v.x, v.y += other_v.y;
        }
        if (lists) {
          *(float2 *)(a.dk + at) = k;
          *(float2 *)(a.dv + at) = v;
        } else {
          store_pair<T>(a.d_k, dk, d, a.d, k.x * a.scale, k.y * a.scale);
          store_pair<T>(a.d_v, dv, d, a.d, v.x, v.y);
        }
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) a.has_dense[blockIdx.x] = lists ? 1 : EMXI_CUDA_KEYS_DONE;
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int r = warp * 16 + lane / 4 + 8 * i;
      emxi_cuda_edge *const mine = a.edge + (qt.unit * per_unit + qt.tile) * TILE + r;
      const bool has = edge[i] < emxi_inf(), wanted = has || mine->delta != 0;
      const float u = quad_sum(su[i]), ud = quad_sum(sud[i]), over = u > 0 ? ud / u : 0, total = quad_sum(sum[i]);
      /* tiles that a list should have named: as much as a row by itself lets its tau be off, in units of the sum (one key of alpha 2 has a
       * gradient of full size however small its weight), and far from zero, where that is much, what a flat row's gradients bear; or NaN */
      const float allowed = KIND == SOFTMAX ? 1e-3f : fminf(1e-3f, 1e-5f * (1 + fabsf(edge[i])) * b * u);
      const bool wrong = has && !(fabsf(total - 1) <= allowed);
      __syncwarp();
      if (lane % 4 == 0) {
        *mine = wrong || !has ? emxi_cuda_edge{emxi_inf(), 0} : emxi_cuda_edge{edge[i], guess[i] + over};
        if (wrong) a.n_list[qt.row0 + r] = EMXI_CUDA_ROW_DENSE;
      }
      if (r >= qt.rows + qt.padded || !wanted) continue;
      char *const out = row_of(a.d_q, qt.b, qt.h, sp.q0 + qt.i0 + r);
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        store_pair<T>(a.d_q, out, 8 * n + col, a.d, (acc1[n][2 * i] - over * acc2[n][2 * i]) * a.scale,
                      (acc1[n][2 * i + 1] - over * acc2[n][2 * i + 1]) * a.scale);
    }
    __syncthreads();
    if (threadIdx.x == 0) a.mode[qt.unit * per_unit + qt.tile] = mode | EMXI_CUDA_TILES_DONE;
  }
}

/* ---- forward of dense rows */

/* Where n times the mean of (z - t)+^kind over normal z is one: within m - 1 .. m. */
__device__ __forceinline__ float normal_threshold(int kind, float n, float mean, float deviation, float m) {
  float lo = m - 1, hi = m;
  for (int i = 0; i < 30; i++) {
    const float t = 0.5f * (lo + hi), h = (mean - t) / deviation, phi = 0.39894228f * expf(-0.5f * h * h), Phi = normcdff(h),
                f = kind == 2 ? deviation * deviation * ((h * h + 1) * Phi + h * phi) : deviation * (h * Phi + phi);
    (n * f > 1 ? lo : hi) = t;
  }
  return 0.5f * (lo + hi);
}

/* Rows without a list: tau by Newton's steps, of which each reads all keys (alpha 1.5: in closed form for the weights that are not zero), 
 * from where normal scores of the mean and deviation of a quarter of the tiles would have it; then outputs. Sums over a tile in f32, over tiles
 * in double; weights enter the product with V in 16 bits, relative to the row's largest. */
template <typename T, int D, int KIND>
__global__ void __launch_bounds__(TILES_THREADS, D == 64 ? 3 : 2) tile_forward(const __grid_constant__ emxi_cuda_attn a) {
  using tile_t = tiles<D>;
  extern __shared__ __align__(1024) char shared[];
  query_tile t;
  if (!tile_of_queries(a, blockIdx.x, &t) || a.odd[t.unit] || !a.dense[t.unit * (a.group * a.q_tiles) + t.tile]) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, col = lane % 4 * 2, r0 = warp * 16 + lane / 4;
  const uint32_t R = shared_of(shared), columns = R + 2 * tile_t::BYTES;
  const float a1 = KIND == SOFTMAX ? LOG2E : (float)(a.alpha - 1.0), c = a1 * a.scale, b = 1.0f / (float)(a.alpha - 1.0),
              slope = a.slopes ? a.slopes[t.h] * a1 : 0;
  const char *const keys = row_of(a.k, t.b, t.g, t.sp.k0), *const values = row_of(a.v, t.b, t.g, t.sp.k0);
  const key_range top = visible(a, t.sp, t.i0), bottom = visible(a, t.sp, t.i0 + t.rows - 1);
  const int from = top.from / TILE, to = (bottom.to + TILE - 1) / TILE;
  bool mine[2];
  key_range vis[2] = {};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int r = r0 + 8 * i;
    mine[i] = r < t.rows && a.n_list[t.row0 + r] == EMXI_CUDA_ROW_DENSE;
    if (mine[i]) vis[i] = visible(a, t.sp, t.i0 + r);
  }
  copy_tile<D>(R, row_of(a.q, t.b, t.h, t.sp.q0), a.q.row * 2, t.i0, t.sp.s, a.d);

  /* each(s, f, tile, V) for every step-th tile: f s = (alpha - 1) score, alpha = 1: in base 2; -inf: not visible */
  const auto walk = [&](int step, bool with_values, auto &&each) {
    const auto load = [&](int j, int stage) {
      const uint32_t C = columns + stage * 2 * tile_t::BYTES;
      copy_tile<D>(C, keys, a.k.row * 2, j * TILE, t.sp.n, a.d);
      if (with_values) copy_tile<D>(C + tile_t::BYTES, values, a.v.row * 2, j * TILE, t.sp.n, a.d);
      asm volatile("cp.async.commit_group;" ::: "memory");
    };
    int stage = 0;
    const int first = from + (to - 1 - from) % step; /* the last tile is one of them */
    load(first, 0);
    for (int j = first; j < to; j += step, stage ^= 1) {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
      publish();
      __syncthreads();
      if (j + step < to) load(j + step, stage ^ 1);
      const uint32_t C = columns + stage * 2 * tile_t::BYTES;
      float s[8][4];
      row_products<T, D>(s, R, C);
      settle<0>(s);
      const int j0 = j * TILE;
      const bool cut = bottom.from > j0 || top.to < j0 + TILE;
      if (slope != 0 || cut)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int x = 0; x < 4; x++) s[n][x] *= c;
      if (slope != 0)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int x = 0; x < 4; x++)
            s[n][x] =
                fmaf(-slope, (float)abs(t.i0 + r0 + 8 * (x >> 1) + t.sp.n - t.sp.s - (j0 + 8 * n + col + (x & 1))), s[n][x]);
      if (cut)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int x = 0; x < 4; x++) {
            const int at = j0 + 8 * n + col + (x & 1);
            if (at < vis[x >> 1].from || at >= vis[x >> 1].to) s[n][x] = -emxi_inf();
          }
      each(s, slope != 0 || cut ? 1.0f : c, j, C + tile_t::BYTES);
    }
    __syncthreads();
  };

  const threshold k = threshold_at(KIND == SOFTMAX ? 2.0 : a.alpha, 0);
  float m[2] = {-emxi_inf(), -emxi_inf()};
  root x[2];
  {
    float mean[2] = {0, 0}, square[2] = {0, 0}, count[2] = {0, 0}, ref[2] = {-emxi_inf(), -emxi_inf()};
    walk(KIND != SOFTMAX && to - from >= 16 ? 4 : 1, false, [&](float(&z)[8][4], float scale, int, uint32_t) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float largest = -emxi_inf();
#pragma unroll
        for (int n = 0; n < 8; n++) {
          z[n][2 * i] *= scale, z[n][2 * i + 1] *= scale;
          largest = fmaxf(largest, fmaxf(z[n][2 * i], z[n][2 * i + 1]));
        }
        m[i] = fmaxf(m[i], largest);
        if (KIND == SOFTMAX) continue;
        const float so_far = quad_max(m[i]); /* a row's four threads have the same ref */
        if (ref[i] == -emxi_inf()) ref[i] = so_far;
        if (ref[i] == -emxi_inf()) continue;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const float over = z[n][2 * i + e] - ref[i];
            if (over == -emxi_inf()) continue;
            count[i] += 1;
            mean[i] += over;
            square[i] += over * over;
          }
      }
    });
#pragma unroll
    for (int i = 0; i < 2; i++) {
      m[i] = quad_max(m[i]);
      x[i] = {(double)m[i] - 1, (double)emxi_inf(), (double)m[i] - 1, KIND == SOFTMAX || !mine[i] || m[i] == -emxi_inf()};
      const float n = quad_sum(count[i]), mu = quad_sum(mean[i]) / n, var = quad_sum(square[i]) / n - mu * mu;
      if ((KIND == 1 || KIND == 2) && n > 0)
        x[i].t = (double)normal_threshold(KIND, (float)(vis[i].to - vis[i].from), ref[i] + mu, sqrtf(fmaxf(var, 1e-12f)), m[i]);
    }
  }
  for (int pass = 0; pass < 60 && KIND != SOFTMAX; pass++) {
    if (!__syncthreads_or(!x[0].done || !x[1].done)) break;
    float hi[2], lo[2];
    double sums[2][3] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      hi[i] = mine[i] ? (float)x[i].t : emxi_inf();
      lo[i] = mine[i] ? (float)(x[i].t - (double)hi[i]) : 0.0f;
    }
    walk(1, false, [&](const float(&z)[8][4], float scale, int, uint32_t) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float f[3] = {0, 0, 0}, top = -emxi_inf();
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const float over = fmaf(z[n][2 * i + e], scale, -hi[i]) - lo[i], y = fmaxf(over, 0.0f);
            top = fmaxf(top, over);
            if (KIND) {
              f[0] += over > 0 ? 1.0f : 0.0f;
              f[1] += y;
              f[2] += y * y;
            } else {
              float p, u;
              tile_weigh<KIND>(b, y, &p, &u);
              f[1] += u;
              f[2] += p;
            }
          }
#pragma unroll
        for (int e = 0; e < 3; e++) sums[i][e] += (double)f[e];
        m[i] = fmaxf(m[i], (top + lo[i]) + hi[i]);
      }
    });
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int e = 0; e < 3; e++) sums[i][e] = quad_sum(sums[i][e]);
      m[i] = quad_max(m[i]);
      x[i].lo = fmax(x[i].lo, (double)m[i] - 1);
      x[i].hi = fmin(x[i].hi, (double)m[i]);
      /* alpha 1.5: a step e leaves out the squares of weights' roots below e, at most that many */
      if (!x[i].done) x[i].step(k, sums[i], 1e-7, KIND == 2 ? sqrt(1e-7 / (vis[i].to - vis[i].from)) : 1e-11);
    }
  }

  float hi[2], lo[2], largest[2] = {1, 1}, inverse[2] = {1, 1};
  bool live[2], odd[2] = {false, false};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float unused;
    live[i] = mine[i] && m[i] > -emxi_inf();
    hi[i] = !live[i] ? emxi_inf() : KIND == SOFTMAX ? m[i] : (float)x[i].t;
    lo[i] = !live[i] || KIND == SOFTMAX ? 0.0f : (float)(x[i].t - (double)hi[i]);
    if (live[i] && KIND != SOFTMAX) tile_weigh<KIND>(b, (m[i] - hi[i]) - lo[i], &largest[i], &unused);
    inverse[i] = 1.0f / largest[i];
  }
  float o[D / 8][4], recent[D / 8][4];
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) o[n][e] = recent[n][e] = 0;
  const auto take = [&]() { /* tensor cores round sums towards zero, which shows where thousands are added */
#pragma unroll
                            for (int n = 0; n < D / 8; n++)
#pragma unroll
                              for (int e = 0; e < 4; e++) {
                                o[n][e] += recent[n][e];
                                recent[n][e] = 0;
                              }
  };
  double total[2] = {0, 0};
  int support[2] = {0, 0}, listed[2] = {0, 0};
  walk(1, true, [&](float(&z)[8][4], float scale, int j, uint32_t V) {
    uint32_t some[2] = {0, 0};
    float f[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = e >> 1;
        const float over = fmaf(z[n][e], scale, -hi[i]) - lo[i];
        odd[i] |= !(over < emxi_inf());
        const bool has = KIND == SOFTMAX ? live[i] && z[n][e] > -emxi_inf() : over > 0;
        float p = 0, u;
        if (KIND == SOFTMAX)
          p = exp2f(over);
        else
          tile_weigh<KIND>(b, fmaxf(over, 0.0f), &p, &u);
        some[i] |= (uint32_t)has << (2 * n + (e & 1));
        if (KIND == SOFTMAX) f[i] += p;
        z[n][e] = p * inverse[i];
      }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      support[i] += __popc(some[i]);
      if (KIND == SOFTMAX) total[i] += (double)f[i];
      const bool lists = KIND != SOFTMAX && a.index.data && mine[i] && listed[i] <= a.list;
      if (!__any_sync(EMXI_FULL, lists)) continue;
      int32_t *const index = (int32_t *)row_of(a.index, t.b, t.h, t.sp.q0 + t.i0 + r0 + 8 * i);
#pragma unroll
      for (int n = 0; n < 8; n++) { /* in order of position, while there is room */
        const uint32_t two = some[i] >> 2 * n & 3;
        const int of_me = __popc(two);
        int at = listed[i];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int other = __shfl_sync(EMXI_FULL, of_me, (lane & ~3) + e);
          if (e < (lane & 3)) at += other;
          listed[i] += other;
        }
        const int position = j * TILE + 8 * n + col;
        if (lists && (two & 1) && at < a.list) index[at] = position;
        at += two & 1;
        if (lists && (two & 2) && at < a.list) index[at] = position + 1;
      }
    }
    uint32_t w[4][4];
#pragma unroll
    for (int k16 = 0; k16 < 4; k16++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float(&y)[4] = z[2 * k16 + half];
        w[k16][2 * half] = pack<T>(y[0], y[1]);
        w[k16][2 * half + 1] = pack<T>(y[2], y[3]);
      }
    add_products<T, D>(recent, w, V);
    settle<0>(recent);
    if (j % 8 == 7) take();
  });
  take();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const bool bad = __ballot_sync(EMXI_FULL, odd[i]) >> (lane & ~3) & 15;
    const double sum = quad_sum(total[i]);
    const int n_support = quad_sum(support[i]);
    if (!mine[i]) continue;
    const int64_t place = t.sp.q0 + t.i0 + r0 + 8 * i;
    const float factor = bad ? emxi_nan() : !live[i] ? 0.0f : KIND == SOFTMAX ? (float)(1.0 / sum) : largest[i];
    char *const out = row_of(a.o, t.b, t.h, place);
#pragma unroll
    for (int n = 0; n < D / 8; n++) store_pair<T>(a.o, out, 8 * n + col, a.d, o[n][2 * i] * factor, o[n][2 * i + 1] * factor);
    if (lane % 4) continue;
    const double tau = bad               ? (double)emxi_nan()
                       : !live[i]        ? -(double)emxi_inf()
                       : KIND == SOFTMAX ? ((double)m[i] + log2(sum)) / (double)LOG2E
                                         : x[i].t;
    if (a.tau.data) *(float *)row_of(a.tau, t.b, t.h, place) = (float)tau;
    if (a.support.data) *(int32_t *)row_of(a.support, t.b, t.h, place) = bad ? 0 : n_support;
  }
}

enum { TILES_FORWARD, TILES_QUERIES, TILES_KEYS };
template <typename T, int D, int KIND>
void run_tiles(const emxi_cuda_attn &a, int what, unsigned blocks, cudaStream_t stream) {
  const auto kernel = what == TILES_FORWARD   ? tile_forward<T, D, KIND>
                      : what == TILES_QUERIES ? tile_gradients<T, D, false, KIND>
                                              : tile_gradients<T, D, true, KIND>;
  (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)tiles<D>::SHARED);
  kernel<<<blocks, TILES_THREADS, tiles<D>::SHARED, stream>>>(a);
}
template <typename T>
void tile_pass(const emxi_cuda_attn &a, int keys, unsigned units, cudaStream_t stream) {
  const unsigned blocks = (unsigned)(units * (keys ? a.k_tiles : a.group * a.q_tiles));
  const int what = !a.backward ? TILES_FORWARD : keys ? TILES_KEYS : TILES_QUERIES;
  const auto of_kind = [&](auto of64, auto of128) { (a.d <= 64 ? of64 : of128)(a, what, blocks, stream); };
  if (!blocks) return;
  if (a.alpha == 1.5)
    of_kind(run_tiles<T, 64, 2>, run_tiles<T, 128, 2>);
  else if (a.alpha == 2.0)
    of_kind(run_tiles<T, 64, 1>, run_tiles<T, 128, 1>);
  else if (a.alpha == 1.0)
    of_kind(run_tiles<T, 64, SOFTMAX>, run_tiles<T, 128, SOFTMAX>);
  else
    of_kind(run_tiles<T, 64, 0>, run_tiles<T, 128, 0>);
}

} // namespace

#endif
