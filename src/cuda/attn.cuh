/* SPDX-License-Identifier: Apache-2.0
 * What the kernels of dense attention share: sequences and their rows, tiles of 64 x 64 and their products, thresholds.
 *
 * A row's list has its candidates in order of position, at the end of the CAP places it has. A thread block has THREADS threads; where it
 * works on a tile of scores, four neighbouring threads have a row, sixteen neighbouring columns each. */
#ifndef EMXI_CUDA_ATTN_CUH
#define EMXI_CUDA_ATTN_CUH

#include "attn_args.h"
#include "rows.cuh"

#include <mma.h>

namespace {

constexpr int TILE = EMXI_CUDA_ATTN_TILE, CAP = EMXI_CUDA_ATTN_CAP, THREADS = 256, WARPS = THREADS / 32, PART = 16,
              S_LD = TILE + 4;

/* ---- where things are */

__device__ __forceinline__ int bytes_of(int32_t dtype) { return dtype == EMX_F32 || dtype == EMX_I32 ? 4 : 2; }
__device__ __forceinline__ char *row_of(const emxi_cuda_mat &m, int64_t b, int64_t h, int64_t row) {
  return m.data + (b * m.batch + h * m.head + row * m.row) * bytes_of(m.dtype);
}

/* See emxi_cuda_attn.split. */
__device__ __forceinline__ bool is_asked_for(const emxi_cuda_attn &a, int h) {
  return !a.split || (a.split[h] != 0) == (a.sloped != 0);
}

/* A tile of queries of one head. */
struct query_tile {
  int b, h, hh, g, unit; /* hh: head of its group; unit: of the slice */
  int i0, rows, padded;  /* queries from i0 on; rows of the tensor that are past the length */
  int64_t row0;          /* of query i0 in the slice */
  int64_t tile;          /* of the unit */
  emxi_cuda_span sp;
};
/* The sequence whose tile of queries (keys) x is: packed, by bisection. */
template <bool KEYS>
__device__ __forceinline__ int sequence_of(const emxi_cuda_attn &a, int64_t x) {
  int lo = 0, hi = a.batch;
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if ((KEYS ? a.span[mid].k_tile : a.span[mid].q_tile) <= x)
      lo = mid;
    else
      hi = mid;
  }
  return lo;
}
__device__ __forceinline__ bool locate(const emxi_cuda_attn &a, int b, int64_t x, int head, query_tile *t) {
  t->b = b;
  t->sp = a.span[b];
  t->hh = head % a.group;
  t->g = a.g0 + head / a.group;
  t->h = t->g * a.group + t->hh;
  const int64_t first = a.packed ? x - t->sp.q_tile : x;
  t->i0 = (int)(first * TILE);
  const int64_t all = a.packed ? t->sp.s : a.max_q, left = all - t->i0;
  const int real = t->sp.s - t->i0 < 0 ? 0 : t->sp.s - t->i0 < TILE ? t->sp.s - t->i0 : TILE;
  t->rows = real;
  t->padded = (int)(left < TILE ? left : TILE) - real;
  t->unit = a.packed ? head / a.group : (b - a.b0) * a.ng + head / a.group;
  t->row0 = a.packed ? head * a.rows_q + t->sp.q0 + t->i0 : ((int64_t)(b - a.b0) * a.ng * a.group + head) * a.max_q + t->i0;
  t->tile = t->hh * a.q_tiles + x;
  return left > 0 && is_asked_for(a, t->h);
}
/* Tile of a block of a grid of tiles times heads (padded: times sequences); the last tiles of all heads come first, they see most keys. */
__device__ __forceinline__ bool tile_of_block(const emxi_cuda_attn &a, int64_t block, query_tile *t) {
  const int64_t heads = (int64_t)a.ng * a.group, x = a.q_tiles - 1 - block / (heads * (a.packed ? 1 : a.nb));
  const int64_t rest = block % (heads * (a.packed ? 1 : a.nb));
  const int b = a.packed ? sequence_of<false>(a, x) : a.b0 + (int)(rest / heads);
  return locate(a, b, x, (int)(rest % heads), t);
}

/* A tile of keys of a unit. */
struct key_tile {
  int b, g, unit, j0, n; /* n: real keys of the tile */
  int all;               /* and rows of the tensor */
  int64_t tile;
  emxi_cuda_span sp;
};
__device__ __forceinline__ bool key_tile_of(const emxi_cuda_attn &a, int64_t block, key_tile *t) {
  t->tile = block % a.k_tiles;
  t->unit = (int)(block / a.k_tiles);
  t->b = a.packed ? sequence_of<true>(a, t->tile) : a.b0 + t->unit / a.ng;
  t->g = a.g0 + (a.packed ? t->unit : t->unit % a.ng);
  t->sp = a.span[t->b];
  t->j0 = (int)((t->tile - (a.packed ? t->sp.k_tile : 0)) * TILE);
  const int64_t left = (a.packed ? t->sp.n : a.max_k) - t->j0;
  t->n = max(0, min(TILE, t->sp.n - t->j0));
  t->all = (int)(left < TILE ? left : TILE);
  return left > 0;
}

/* Keys that query i sees. */
struct key_range {
  int from, to;
};
__device__ __forceinline__ key_range visible(const emxi_cuda_attn &a, const emxi_cuda_span &sp, int i) {
  const int64_t at = (int64_t)i + sp.n - sp.s, from = at - a.left, to = at + a.right + 1;
  key_range r = {(int)(from < 0 ? 0 : from > sp.n ? sp.n : from), (int)(to < 0 ? 0 : to > sp.n ? sp.n : to)};
  if (r.from > r.to) r.from = r.to;
  return r;
}

/* Rows of a matrix, one sequence and head. */
struct source {
  const char *data;
  int64_t row; /* bytes */
  const int32_t *table;
  int64_t page; /* bytes */
  int32_t dtype, vectors, page_size;
};
__device__ __forceinline__ source rows_of(const emxi_cuda_mat &m, int64_t b, int64_t h, int64_t first) {
  return {row_of(m, b, h, first), m.row * bytes_of(m.dtype), nullptr, 0, m.dtype, m.vectors, 0};
}
__device__ __forceinline__ source keys_of(const emxi_cuda_attn &a, const emxi_cuda_mat &m, int b, int g,
                                          const emxi_cuda_span &sp) {
  source s = rows_of(m, a.block_table ? 0 : b, g, sp.k0);
  if (a.block_table) {
    s.table = a.block_table + b * a.table_stride;
    s.page = m.batch * bytes_of(m.dtype);
    s.page_size = a.page_size;
  }
  return s;
}
__device__ __forceinline__ const char *at_row(const source &s, int j) {
  return s.table ? s.data + s.table[j / s.page_size] * s.page + (j % s.page_size) * s.row : s.data + j * s.row;
}

/* ---- eight elements of a row */

__device__ __forceinline__ bool finite(float x) { return fabsf(x) < emxi_inf(); }

/* Above the root of what f32 makes of a sum of up to 256 squares, so far that the product of two such norms is above the product of the
 * vectors, in whatever order f32 sums it. */
__device__ __forceinline__ float norm_up(float squares) { return (sqrtf(squares) + 2e-18f) * 1.0002f; }

/* Elements d .. d+7, zeros from D on. */
__device__ __forceinline__ void load8(const char *row, int32_t dtype, int vectors, int d, int D, float (&x)[8]) {
  if (vectors && d + 8 <= D) {
    if (dtype == EMX_F32) {
      const float4 a = *(const float4 *)(row + 4 * d), b = *(const float4 *)(row + 4 * d + 16);
      x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
      const uint4 w = *(const uint4 *)(row + 2 * d);
      const uint32_t u[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 f = dtype == EMX_F16 ? __half22float2(*(const __half2 *)&u[i])
                                          : make_float2(__uint_as_float(u[i] << 16), __uint_as_float(u[i] & 0xffff0000u));
        x[2 * i] = f.x;
        x[2 * i + 1] = f.y;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = d + i < D ? load_any(row, dtype, d + i) : 0.0f;
}
__device__ __forceinline__ void store8(char *row, int32_t dtype, int d, int D, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (d + i < D) store_any(row, dtype, d + i, x[i]);
}

/* ---- tiles in shared memory and their products: C += op(A) op(B), all 64 x 64, by all threads of the block */

template <typename T>
struct product { /* 16 bit: tensor cores, a warp has 16 x 32 of C */
  static constexpr int LD = TILE + 8;
  using frag = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;
  frag c[2];
  __device__ __forceinline__ void zero() {
    nvcuda::wmma::fill_fragment(c[0], 0.0f);
    nvcuda::wmma::fill_fragment(c[1], 0.0f);
  }
  /* Adds and empties `other`: tensor cores round sums towards zero, which shows where thousands are added. */
  __device__ __forceinline__ void take(product &other) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int e = 0; e < frag::num_elements; e++) c[i].x[e] += other.c[i].x[e];
    other.zero();
  }
  /* TA: A is stored [k][m]; TB: B is stored [n][k]. */
  template <bool TA, bool TB>
  __device__ __forceinline__ void add(const T *A, const T *B) {
    namespace w = nvcuda::wmma;
    using la = std::conditional_t<TA, w::col_major, w::row_major>;
    using lb = std::conditional_t<TB, w::col_major, w::row_major>;
    const int warp = threadIdx.x / 32, m0 = warp / 2 * 16, n0 = warp % 2 * 32;
#pragma unroll
    for (int k = 0; k < TILE; k += 16) {
      w::fragment<w::matrix_a, 16, 16, 16, T, la> fa;
      w::load_matrix_sync(fa, TA ? A + k * LD + m0 : A + m0 * LD + k, LD);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        w::fragment<w::matrix_b, 16, 16, 16, T, lb> fb;
        const int n = n0 + 16 * i;
        w::load_matrix_sync(fb, TB ? B + n * LD + k : B + k * LD + n, LD);
        w::mma_sync(c[i], fa, fb, c[i]);
      }
    }
  }
  __device__ __forceinline__ void store(float *S) const {
    const int warp = threadIdx.x / 32, m0 = warp / 2 * 16, n0 = warp % 2 * 32;
#pragma unroll
    for (int i = 0; i < 2; i++)
      nvcuda::wmma::store_matrix_sync(S + m0 * S_LD + n0 + 16 * i, c[i], S_LD, nvcuda::wmma::mem_row_major);
  }
};
template <>
struct product<float> { /* a thread has rows 4 ty .. and columns tx, tx + 16, .. */
  static constexpr int LD = TILE + 1;
  float c[4][4];
  __device__ __forceinline__ void zero() {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) c[i][j] = 0;
  }
  __device__ __forceinline__ void take(product &other) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) c[i][j] += other.c[i][j];
    other.zero();
  }
  template <bool TA, bool TB>
  __device__ __forceinline__ void add(const float *A, const float *B) {
    const int m = threadIdx.x / 16 * 4, n = threadIdx.x % 16;
#pragma unroll 8
    for (int k = 0; k < TILE; k++) {
      float x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = TA ? A[k * LD + m + i] : A[(m + i) * LD + k];
#pragma unroll
      for (int j = 0; j < 4; j++) y[j] = TB ? B[(n + 16 * j) * LD + k] : B[k * LD + n + 16 * j];
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) c[i][j] = fmaf(x[i], y[j], c[i][j]);
    }
  }
  __device__ __forceinline__ void store(float *S) const {
    const int m = threadIdx.x / 16 * 4, n = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) S[(m + i) * S_LD + n + 16 * j] = c[i][j];
  }
};

template <typename T>
__device__ __forceinline__ T to_element(float x) {
  T y;
  from_float(x, &y);
  return y;
}

template <typename T>
constexpr int32_t dtype_of = std::is_same_v<T, float>    ? EMX_F32
                             : std::is_same_v<T, __half> ? EMX_F16
                                                         : EMX_BF16;

/* Columns d0 .. d0+63 of rows first .. first+63 of the source into dst; zeros from `end` and from D on. CLEAN: what is not finite is a zero;
 * whether there was such is returned, to the thread that met it. */
template <typename T, bool CLEAN>
__device__ __forceinline__ bool load_tile(T *dst, const source &src, int first, int end, int d0, int D) {
  bool odd = false;
  for (int x = threadIdx.x; x < TILE * TILE / 8; x += THREADS) {
    const int r = x / 8, c = x % 8 * 8;
    if (sizeof(T) == 2 && src.dtype == dtype_of<T> && src.vectors && d0 + c + 8 <= D) { /* as they are */
      uint4 w = first + r < end ? *(const uint4 *)(at_row(src, first + r) + 2 * (d0 + c)) : make_uint4(0, 0, 0, 0);
      bool plain = true;
      if (CLEAN) {
        constexpr uint32_t E = dtype_of<T> == EMX_F16 ? 0x7c00 : 0x7f80; /* all ones: infinity or NaN */
        const uint32_t u[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int i = 0; i < 4; i++) plain &= (u[i] & E) != E && (u[i] & E << 16) != E << 16;
      }
      if (plain) {
        *(uint4 *)(dst + r * product<T>::LD + c) = w;
        continue;
      }
    }
    float v[8] = {};
    if (first + r < end && d0 + c < D) load8(at_row(src, first + r), src.dtype, src.vectors, d0 + c, D, v);
    alignas(16) T out[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (CLEAN && !finite(v[i])) {
        v[i] = 0;
        odd = true;
      }
      out[i] = to_element<T>(v[i]);
    }
    T *to = dst + r * product<T>::LD + c;
    if (sizeof(T) == 2) {
      *(uint4 *)to = *(const uint4 *)out;
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) to[i] = out[i];
    }
  }
  return odd;
}

/* S = A B^T of rows a0.. of `a` and b0.. of `b`, dot products over D, into S. All threads; ends with a barrier. held: A has those rows from the
 * call before, if they fit it. */
template <typename T>
__device__ __forceinline__ void dots(float *S, T *A, T *B, const source &a, int a0, int a_end, const source &b, int b0, int b_end,
                                     int D, bool held = false) {
  product<T> c;
  c.zero();
  for (int d0 = 0; d0 < D; d0 += TILE) {
    __syncthreads();
    if (!held || D > TILE) load_tile<T, false>(A, a, a0, a_end, d0, D);
    load_tile<T, false>(B, b, b0, b_end, d0, D);
    __syncthreads();
    c.template add<false, true>(A, B);
  }
  c.store(S);
  __syncthreads();
}

/* ---- a thread's part of a tile of scores */

struct scored {
  float s[PART];
  uint32_t seen; /* a bit each: visible */
};
__device__ __forceinline__ scored scores_of(const emxi_cuda_attn &a, const float *S, float slope, int at, key_range vis, int j0) {
  scored x;
  const int r = threadIdx.x / 4, c0 = threadIdx.x % 4 * PART;
  x.seen = 0;
#pragma unroll
  for (int c = 0; c < PART; c += 4) {
    const float4 v = *(const float4 *)(S + r * S_LD + c0 + c);
    x.s[c] = v.x, x.s[c + 1] = v.y, x.s[c + 2] = v.z, x.s[c + 3] = v.w;
  }
#pragma unroll
  for (int c = 0; c < PART; c++) {
    const int j = j0 + c0 + c;
    x.s[c] *= a.scale;
    if (slope != 0) x.s[c] = fmaf(-slope, (float)abs(at - j), x.s[c]);
    x.seen |= (uint32_t)(j >= vis.from && j < vis.to) << c;
  }
  return x;
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(EMXI_FULL, x, 1));
  return fmaxf(x, __shfl_xor_sync(EMXI_FULL, x, 2));
}
template <typename X>
__device__ __forceinline__ X quad_sum(X x) {
  x += __shfl_xor_sync(EMXI_FULL, x, 1);
  return x + __shfl_xor_sync(EMXI_FULL, x, 2);
}

/* ---- thresholds */

__device__ __forceinline__ double alpha_of(const emxi_cuda_attn &a, int h) { return a.alphas ? a.alphas[h] : a.alpha; }
__device__ __forceinline__ bool alpha_is_good(double alpha) { return alpha == 1.0 || (alpha >= 1.0 + 1e-6 && alpha <= 2.0); }
__device__ __forceinline__ threshold threshold_at(double alpha, float m) {
  const double b = 1.0 / (alpha - 1.0);
  return {alpha, alpha - 1.0, b, emxi_power_kind(b), m};
}

/* y^e for weights: e = b the weight, e = b - 1 its derivative's. */
struct powers {
  float b;
  int kind; /* 2: alpha 1.5; 1: alpha 2; else any */
};
__device__ __forceinline__ powers powers_of(double alpha) {
  return {(float)(1.0 / (alpha - 1.0)), alpha == 1.5 ? 2 : alpha == 2.0 ? 1 : 0};
}
/* p = y^b and u = p^(2-alpha) = y^(b-1), y > 0. */
__device__ __forceinline__ void weigh(const powers &w, float y, float *p, float *u) {
  if (w.kind == 2) {
    *u = y;
    *p = y * y;
  } else if (w.kind == 1) {
    *u = 1;
    *p = y;
  } else {
    *u = slow_power(y, w.b - 1.0f);
    *p = *u * y;
  }
}
/* Adds what y > 0 contributes to the sums of threshold_step. */
__device__ __forceinline__ void add_weight(const powers &w, float y, float (&s)[3]) {
  float p, u;
  weigh(w, y, &p, &u);
  if (w.kind) {
    s[0] += 1;
    s[1] += y;
    s[2] += y * y;
  } else {
    s[1] += u;
    s[2] += p;
  }
}

constexpr int HELD = CAP / 32; /* entries of a list a lane */

/* sum y^b and sum y^(b-1) over a warp's scores, the first `used` of each lane, in f32. */
__device__ __forceinline__ void light_sums(const powers &w, float a1, const float (&z)[HELD], int used, float m, float t,
                                           float *F, float *G) {
  float f = 0, g = 0;
#pragma unroll
  for (int c = 0; c < HELD; c++) {
    if (c >= used) break;
    const float y = a1 * (z[c] - m) - t;
    if (!(y > 0)) continue;
    float p, u;
    weigh(w, y, &p, &u);
    f += p;
    g += u;
  }
  *F = warp_sum(f);
  *G = warp_sum(g);
}
/* A step of Newton on the norm of y from the left: stays left of the threshold, up to the rounding of the sums. */
__device__ __forceinline__ float light_step(const powers &w, float a1, float F, float G) {
  return (F - (w.kind == 2 ? sqrtf(F) : w.kind == 1 ? 1.0f : slow_power(F, 1.0f - a1))) / G;
}

/* The root of a row's residual, step by step: as in src/cpu/solver.inc for alpha <= 2. */
struct root {
  double lo, hi, t;
  bool done;
  __device__ __forceinline__ void step(const threshold &k, const double (&s)[3], double f_small, double unit) {
    double f;
    const double e = threshold_step(k, s, &f);
    if (f > 0)
      lo = t;
    else
      hi = t;
    double next = t + e;
    if (fabs(f) <= f_small || fabs(e) <= unit || hi - lo <= 2 * unit) {
      t = fmin(fmax(next, lo), hi);
      done = true;
      return;
    }
    if (!(next > lo && next < hi)) next = 0.5 * (lo + hi);
    if (!(next > lo && next < hi)) done = true;
    t = done ? lo : next;
  }
};

/* d p / d alpha, as far as it matters beside d_p - delta: see src/cpu/attn_cpu.c. */
__device__ __noinline__ double alpha_slope(double alpha, double p) {
  const double l = log(p), x = -(alpha - 1.0) * l;
  const double psi = fabs(x) < 1e-2 ? 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x / 5040))))
                                    : (expm1(x) - x) / (x * x);
  return -p * l * l * psi;
}

__device__ __forceinline__ bool row_is_todo(const emxi_cuda_attn &a, int64_t row) { return !a.backward || a.todo[row]; }

} // namespace

#endif
