/* SPDX-License-Identifier: Apache-2.0
 * Bounds of pages' scores from their summaries, for select.cu.
 *
 *   judge    block = (sequence, KV head, up to R query heads, part of the pages). Summaries of complete pages: bounds of their scores, and for
 *            GAUSSIAN their mean and spread. Boxes: 16 bytes a lane, products in float; 4 D bytes a page of two-byte elements. Balls: 16 pages a
 *            warp, tensor products; 2 D + 16 bytes a page.
 *
 * Bounds of a score q.k + bias of a page, q times scale already, u = 2^-24:
 *   box   sum max(q lo, q hi)            ball   q.c + |q| radius, c what the codes say
 * Rounding: both, and the score that would be computed, are sums of D products in some order whose absolute terms add up to at most
 * A = |q| (size + 2 radius), size the norm of the largest elements; D + 2 roundings for a bound, D + 1 for a score, 1 for the distance between c
 * and its float: (2 D + 8) u A with 1 % for the roundings of A. A bias is within 4 u of the largest in size. All rounded up.
 * For balls q = s2 (254 a + b) + rest with 8-bit integers a, b: q.c is an integer times two floats, and |rest| (size + radius). */
#ifndef EMXI_CUDA_SELECT_JUDGE_CUH
#define EMXI_CUDA_SELECT_JUDGE_CUH

#include "sketch.cuh"

namespace {

constexpr int JUDGE_THREADS = 256, JUDGE_WARPS = JUDGE_THREADS / 32;

/* Elements lane + 32 e of a row, 0 from D on; all of them are asked for before one is waited for. */
template <int N>
__device__ __forceinline__ void load_lanes(const char *p, int32_t dtype, int64_t at, int D, float (&x)[N]) {
  const int lane = threadIdx.x % 32;
  if (dtype == EMX_F32) {
#pragma unroll
    for (int e = 0; e < N; e++) x[e] = lane + 32 * e < D ? ((const float *)p)[at + lane + 32 * e] : 0.0f;
    return;
  }
  uint16_t bits[N];
#pragma unroll
  for (int e = 0; e < N; e++) bits[e] = lane + 32 * e < D ? ((const uint16_t *)p)[at + lane + 32 * e] : (uint16_t)0;
#pragma unroll
  for (int e = 0; e < N; e++)
    x[e] = dtype == EMX_F16 ? __half2float(__ushort_as_half(bits[e])) : __uint_as_float((uint32_t)bits[e] << 16);
}
__device__ __forceinline__ float float_up(double x) {
  const float f = __double2float_ru(x);
  return f == f ? f : emxi_inf();
}
__device__ __forceinline__ double score_slack(int d, double norm, double size, double bias) {
  return (2 * d + 8) * 0x1p-24 * 1.01 * norm * size + 0x1p-22 * bias + 1e-35;
}
/* q times scale, in shared memory, zeros up to `padded`; returns its norm, rounded up, and in *lost what elements below the
 * smallest normal float may cost a score, in every thread. Has barriers. */
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

static_assert(EMXI_CUDA_PICKS == 32, "a lane each");
/* By 32 threads, i: nothing has been chosen yet. */
__device__ __forceinline__ void open_row(const emxi_cuda_decode &a, int64_t row, double norm, double lost, int i) {
  emxi_cuda_judged *state = &a.judged[row];
  if (i >= 32) return;
  state->part[i] = 0;
#pragma unroll
  for (int j = 0; j < BINS; j += 32) a.bins[row * BINS + j + i] = 0;
  if (i) return;
  state->norm = norm;
  state->lost = lost;
  state->picked = state->certified = 0;
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

/* Pages whose summaries are wanted: the newest one is read, but for lists, which may leave it out; then it must be complete. */
__device__ __forceinline__ int judged_pages(const emxi_cuda_decode &a, int64_t length, int pages) {
  return a.kind == EMX_SELECT_PAGES && length == (int64_t)pages << a.pool.shift ? pages : pages - 1;
}
/* How large the keys of pages without a summary are, page p of every lane with `unknown`: what rounding may do to their
 * scores. By a warp. */
__device__ __noinline__ float sizes_of_keys(const emxi_cuda_decode &a, int b, int head, int64_t length, const int32_t *table,
                                            bool unknown, int p) {
  float size = 0;
  for (uint32_t left = __ballot_sync(EMXI_FULL, unknown); left; left &= left - 1) {
    const int at = __shfl_sync(EMXI_FULL, p, __ffs(left) - 1);
    const int64_t tokens = length - ((int64_t)at << a.pool.shift);
    size = fmaxf(size, size_of_keys(a.pool, table_page(a.batch, a.pool, table, b, at), head,
                                    tokens < a.pool.P ? tokens : a.pool.P, threadIdx.x % 32));
  }
  return size;
}

template <typename T, int R>
__global__ void __launch_bounds__(JUDGE_THREADS, 2) judge_boxes(const __grid_constant__ emxi_cuda_decode a) {
  constexpr int PER = 8, AHEAD = R == 1 ? 4 : 2; /* elements a lane; pages at a time */
  __shared__ float shared_q[R][MAX_D];
  __shared__ double scratch[JUDGE_WARPS], shared_norm[R], shared_lost[R];
  __shared__ float shared_size[JUDGE_WARPS];
  wait_for_previous();
  const emxi_cuda_pool &pool = a.pool;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, padded = EMXI_CUDA_PADDED(pool.D), blocks = (a.group + R - 1) / R;
  const int split = blockIdx.x % a.page_splits, item = blockIdx.x / a.page_splits, g = item / blocks % pool.G,
            b = item / blocks / pool.G, first = item % blocks * R, rows = a.group - first < R ? a.group - first : R;
  const int64_t row0 = (int64_t)b * a.H + g * a.group + first; /* S = 1 */
  int64_t length;
  const int32_t *table = batch_entry(a.batch, b, &length);
  const int pages = (int)((length + pool.P - 1) >> pool.shift), judged = judged_pages(a, length, pages);
  for (int r = 0; r < R; r++) {
    double lost = 0;
    const double norm = r < rows ? load_query(a, b, g * a.group + first + r, 0, padded, shared_q[r], scratch, &lost) : 0;
    if (threadIdx.x == 0) shared_norm[r] = norm, shared_lost[r] = lost;
    if (split == 0 && r < rows) open_row(a, row0 + r, norm, lost, (int)threadIdx.x);
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
  float size = 0; /* of the pages whose leader this lane is */

  const uint64_t once = read_once();
  for (int base = (split * JUDGE_WARPS + warp) * subs * AHEAD; base < pages; base += a.page_splits * JUDGE_WARPS * subs * AHEAD) {
    int32_t page[AHEAD];
    emxi_cuda_tail tail[AHEAD];
    eight<T> low[AHEAD], high[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int p = base + u * subs + sub;
      page[u] = p < pages ? table_page(a.batch, pool, table, b, p) : 0;
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int64_t record = (int64_t)page[u] * pool.G + g;
      tail[u] = pool.sum.tails[record];
      if (!inside) {
#pragma unroll
        for (int e = 0; e < 8; e++) low[u].x[e] = high[u].x[e] = 0;
      } else {
        low[u].load((const T *)pool.sum.box + record * 2 * padded + l * PER, once);
        high[u].load((const T *)pool.sum.box + (record * 2 + 1) * padded + l * PER, once);
      }
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int p = base + u * subs + sub;
      const bool there = p < pages, usable = p < judged && tail[u].size > 0;
      float sum[R];
#pragma unroll
      for (int r = 0; r < R; r++) {
        sum[r] = 0;
#pragma unroll
        for (int e = 0; e < PER; e++) sum[r] += fmaxf(q[r][e] * low[u].x[e], q[r][e] * high[u].x[e]);
      }
      for (int step = lanes / 2; step; step >>= 1)
#pragma unroll
        for (int r = 0; r < R; r++) sum[r] += __shfl_xor_sync(EMXI_FULL, sum[r], step);
      if (l == 0 && there) {
        size = fmaxf(size, tail[u].size); /* also of the newest page, which is read */
        const double from = (double)((int64_t)p * pool.P - (length - 1)), last = from + (double)(pool.P - 1);
#pragma unroll
        for (int r = 0; r < R; r++) {
          if (r >= rows) continue;
          const float slope = a.slopes ? a.slopes[g * a.group + first + r] : 0.0f;
          float up = emxi_inf();
          if (usable && fabsf(sum[r]) < emxi_inf()) { /* of a sum that overflows nothing is known, whatever its sign */
            const double x = (double)slope * from, y = (double)slope * last;
            up = float_up((double)sum[r] + (slope != 0 ? fmax(x, y) : 0.0) +
                          score_slack(pool.D, shared_norm[r], (double)tail[u].size, slope != 0 ? fmax(fabs(x), fabs(y)) : 0.0) +
                          shared_lost[r]);
          }
          a.upper[(row0 + r) * a.pages + p] = up;
        }
      }
      if (a.bounds) size = fmaxf(size, sizes_of_keys(a, b, g, length, table, l == 0 && there && !(tail[u].size > 0), p));
    }
  }
  size = warp_max(size);
  if (lane == 0) shared_size[warp] = size;
  __syncthreads();
  if (threadIdx.x < rows) {
    for (int w = 1; w < JUDGE_WARPS; w++) size = fmaxf(size, shared_size[w]);
    a.sizes[(row0 + threadIdx.x) * a.page_splits + split] = fmaxf(size, shared_size[0]);
  }
}

/* A query as balls want it; zeros from D on. */
template <int WORDS>
struct ball_query {
  int32_t a[16 * WORDS], b[16 * WORDS]; /* four dimensions a word */
  __half squares[64 * WORDS];           /* (q / top)^2 */
  float top;                            /* largest element */
  float s2, e2;                         /* e2 >= |q - s2 (254 a + b)| */
  float norm, slack_k, slack_0;         /* rounding costs a score of keys of norm k no more than slack_k k + slack_0 */
  double exact_norm, lost;
};
/* By one warp, a lane E elements. Differences are exact but for 2^-24 of what is left by a, which is at most s1: 16 2^-24 s1
 * in all. */
template <int WORDS>
__device__ __forceinline__ void open_ball_query(const emxi_cuda_decode &a, const float (&q)[2 * WORDS], ball_query<WORDS> *out) {
  constexpr int E = 2 * WORDS;
  const int lane = threadIdx.x % 32, D = a.pool.D;
  float w[E], top = 0;
  double square = 0, two = 0;
  int small = 0;
#pragma unroll
  for (int e = 0; e < E; e++) {
    w[e] = q[e] * a.scale;
    top = fmaxf(top, fabsf(w[e]));
    square += (double)w[e] * (double)w[e];
    small += q[e] != 0 && fabsf(w[e]) < 1.17549435e-38f;
  }
  top = warp_max(top);
  square = warp_sum_double(square);
  small = __reduce_add_sync(EMXI_FULL, small);
  /* A product of s2, of sixteen bits, with 254 is exact. A query of next to nothing counts as an error of zero. */
  const bool some = top >= 1e-25f;
  const float s2 = some ? __uint_as_float((__float_as_uint(top * (1.0f / 32258)) + 255) & ~255u) : 0.0f, s1 = 254 * s2,
              per_s1 = some ? 1 / s1 : 0.0f, per_s2 = 254 * per_s1, per_top = some ? 1 / top : 0.0f;
#pragma unroll
  for (int e = 0; e < E; e++) {
    const float x = fminf(fmaxf(rintf(w[e] * per_s1), -127.0f), 127.0f), left = fmaf(-s1, x, w[e]),
                y = fminf(fmaxf(rintf(left * per_s2), -127.0f), 127.0f), rest = fmaf(-s2, y, left), part = w[e] * per_top;
    two += (double)rest * (double)rest;
    ((int8_t *)out->a)[lane + 32 * e] = (int8_t)x;
    ((int8_t *)out->b)[lane + 32 * e] = (int8_t)y;
    out->squares[lane + 32 * e] = __float2half_rn(part * part);
  }
  two = warp_sum_double(two);
  const double norm = sqrt(square) * (1 + 1e-12),
               lost = (double)small * 0x1p-22; /* off by 2^-150 each, an element of a key is below 2^128 */
  if (lane) return;
  out->exact_norm = norm;
  out->lost = lost;
  out->top = some ? top : 0.0f;
  out->s2 = s2;
  out->e2 = round_up(sqrt(two) * (1 + 1e-6) + 0x1p-20 * (double)s1);
  out->norm = round_up(norm);
  out->slack_k = round_up((2 * D + 8) * 0x1p-24 * 1.01 * norm);
  out->slack_0 = round_up(1e-35 + lost);
}
__device__ __forceinline__ float root_near(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/* Squares of the bytes of a word, two by two. 1024 + byte has it in its last bits. */
__device__ __forceinline__ void byte_squares(uint32_t w, uint32_t *low, uint32_t *high) {
  const uint32_t x[2] = {__byte_perm(w, 0x64646464u, 0x4140), __byte_perm(w, 0x64646464u, 0x4342)};
  const __half2 less = __half2half2(__ushort_as_half(0x6400));
  uint32_t *out[2] = {low, high};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const __half2 y = __hsub2(*reinterpret_cast<const __half2 *>(&x[i]), less), z = __hmul2(y, y); /* at most 65025, of 65504 */
    *out[i] = *reinterpret_cast<const uint32_t *>(&z);
  }
}
__device__ __forceinline__ void half_tile(float (&c)[4], uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3, uint32_t y0,
                                          uint32_t y1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(y0), "r"(y1));
}

__device__ __forceinline__ void copy16_once(uint4 *to, const void *from, uint64_t once) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "l"(once)
               : "memory");
}
/* What a warp of judge_balls copies in a turn, in 16 bytes: ROW for a page's centre and spread, then records; and how many
 * turns ahead of the sums, as the shared memory of two blocks a multiprocessor allows. */
template <int WORDS, int R>
struct ball_turns {
  static constexpr int TILES = R == 1 && WORDS == 1 ? 2 : 1, AT_ONCE = 16 * TILES, ROW = 8 * WORDS, SIZE = AT_ONCE * (ROW + 1),
                       MOST = SIZE < 200   ? 4
                              : WORDS == 4 ? 2
                                           : 3;
  static constexpr size_t shared(int ahead) { return (size_t)JUDGE_WARPS * ahead * SIZE * 16; }
};

/* A warp has sixteen pages in a tensor product; four lanes have a page's codes, 64 dimensions in each of WORDS pieces. Columns
 * 2 r and 2 r + 1 are row r's (of one row: all are): a and b with centres, squares with the squares of spreads. Of four rows a
 * lane has the sums of one with two pages; of one row alone those of one page. */
template <int WORDS, int R, int AHEAD>
__global__ void __launch_bounds__(JUDGE_THREADS, WORDS == 4 ? 1 : 2) judge_balls(const __grid_constant__ emxi_cuda_decode a) {
  using turns = ball_turns<WORDS, R>;
  constexpr int TILES = turns::TILES, MINE = R == 1 ? 1 : 2, AT_ONCE = turns::AT_ONCE, ROW = turns::ROW;
  __shared__ __align__(16) ball_query<WORDS> queries[JUDGE_WARPS];
  __shared__ float shared_stats[JUDGE_WARPS][R][4], shared_size[JUDGE_WARPS];
  extern __shared__ uint4 ring[]; /* [warps][AHEAD]: [pages][ROW], in odd rows halves of eight the other way round; records */
  wait_for_previous();
  const emxi_cuda_pool &pool = a.pool;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, key = lane / 4, t = lane % 4, padded = EMXI_CUDA_PADDED(pool.D),
            blocks = (a.group + R - 1) / R;
  /* Warps of a block have neighbouring KV heads, whose records are neighbours, and the same pages; of what is left, other
   * pages. */
  const int heads = a.judge_heads, slots = JUDGE_WARPS / heads, slot = warp / heads, items = pool.G / heads;
  const int split = blockIdx.x % a.page_splits, item = blockIdx.x / a.page_splits,
            g = item / blocks % items * heads + warp % heads, b = item / blocks / items, first = item % blocks * R,
            rows = a.group - first < R ? a.group - first : R;
  const int64_t row0 = (int64_t)b * a.H + g * a.group + first; /* S = 1 */
  int64_t length;
  const int32_t *table = batch_entry(a.batch, b, &length);
  const int pages = (int)((length + pool.P - 1) >> pool.shift);

  /* Codes are copied some turns ahead, the first ones before anything but queries; page numbers, a lane each, are asked for a
   * turn before that. What is not there is read from page 0, or from the last dimensions, and not used. */
  const uint64_t once = read_once();
  const int piece = lane % ROW, in = 16 * (piece % (ROW / 2)), odd = lane / ROW % 2 * 4, page_step = pool.G * 2 * padded;
  const uint8_t *codes = pool.sum.codes + (int64_t)g * 2 * padded + (piece < ROW / 2 ? 0 : padded) + min(in, padded - 16);
  const emxi_cuda_tail *tails = pool.sum.tails + g;
  uint4 *const own_ring = ring + warp * AHEAD * turns::SIZE;
  const auto look_up = [&](int base) { return lane < AT_ONCE && base + lane < pages ? __ldg(table + base + lane) : 0; };
  const auto copy = [&](int base, int32_t page, int stage) {
    if (base < pages) {
      const int32_t here = checked_page(a.batch, pool, b, base + lane, page);
      uint4 *to = own_ring + stage * turns::SIZE;
      constexpr int PAGES = 32 / ROW; /* of one copy */
#pragma unroll
      for (int i = 0; i < AT_ONCE; i += PAGES) {
        const int32_t of = __shfl_sync(EMXI_FULL, here, i + lane / ROW);
        copy16_once(to + i * ROW + lane / ROW * ROW + (piece ^ (PAGES > 1 ? odd : i % 2 * 4)), codes + (int64_t)of * page_step,
                    once);
      }
      if (lane < AT_ONCE) copy16(to + AT_ONCE * ROW + lane, tails + (int64_t)here * pool.G);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  const int stride = a.page_splits * slots * AT_ONCE;
  int base = (split * slots + slot) * AT_ONCE, stage = 0;
  int32_t page;
  float q[R][2 * WORDS];
  {
    int32_t begin[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) begin[i] = look_up(base + i * stride);
    page = look_up(base + AHEAD * stride);
#pragma unroll
    for (int of = 0; of < R; of++)
      load_lanes(a.q, a.q_dtype, b * a.q_stride[0] + (g * a.group + first + (of < rows ? of : 0)) * a.q_stride[1], pool.D, q[of]);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) copy(base + i * stride, begin[i], i);
  }

  const int r = R == 1 ? 0 : t; /* the row of this lane */
  const bool mine = r < rows && (R > 1 || t < 2 * TILES);
  const int last = mine ? pages : 0, judged = mine ? judged_pages(a, length, pages) : 0;
  int32_t column[WORDS][4] = {}; /* dimensions as this lane's sixteen bytes lie */
  uint2 square[WORDS][4] = {};
  float s2 = 0, e2 = 0, norm = 0, slack_k = 0, slack_0 = 0, top = 0;
#pragma unroll 1
  for (int of = 0; of < rows; of++) {
    ball_query<WORDS> &query = queries[warp];
    open_ball_query<WORDS>(a, q[0], &query);
#pragma unroll
    for (int i = 1; i < R; i++)
#pragma unroll
      for (int e = 0; e < 2 * WORDS; e++) q[i - 1][e] = q[i][e];
    __syncwarp();
    if (split == 0 && slot == 0) open_row(a, row0 + of, query.exact_norm, query.lost, lane);
    if (R == 1 || key / 2 == of)
#pragma unroll
      for (int w = 0; w < WORDS; w++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int word = 16 * w + 4 * t + j;
          column[w][j] = key % 2 ? query.b[word] : query.a[word];
          square[w][j] = ((const uint2 *)query.squares)[word];
        }
    if (r == of)
      s2 = query.s2, e2 = query.e2, norm = query.norm, slack_k = query.slack_k, slack_0 = query.slack_0, top = query.top;
    __syncwarp();
  }
  const float slope = a.slopes && mine ? a.slopes[g * a.group + first + r] : 0.0f;
  const int64_t row_at = (row0 + r) * a.pages;
  float count = 0, sum_mean = 0, sum_spread = 0, sum_square = 0, size = 0; /* of the pages that this lane has */
  int unknown = 0, unknown_at = 0;                                         /* without a summary: how many, one of them */

  for (; base < pages; base += stride) {
    asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory");
    __syncwarp();
    const uint4 *turn = own_ring + stage * turns::SIZE;
    int dot[MINE];
    float wide[MINE];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      int c[4] = {0, 0, 0, 0};
      float f[4] = {0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        const auto piece_of = [&](int half, int i) { /* this lane's of a page's */
                                                     return turn[(16 * tile + 8 * half + key) * ROW + ((i + t) ^ (key % 2 * 4))];
        };
        const uint4 x = piece_of(0, 4 * w), y = piece_of(1, 4 * w);
        constexpr uint32_t SIGN = 0x80808080u; /* code - 128 */
        dot_tile(c, x.x ^ SIGN, y.x ^ SIGN, x.y ^ SIGN, y.y ^ SIGN, column[w][0], column[w][1]);
        dot_tile(c, x.z ^ SIGN, y.z ^ SIGN, x.w ^ SIGN, y.w ^ SIGN, column[w][2], column[w][3]);
        const uint4 u = piece_of(0, ROW / 2 + 4 * w), v = piece_of(1, ROW / 2 + 4 * w);
        const uint32_t low[4] = {u.x, u.y, u.z, u.w}, high[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          uint32_t x0, x1, x2, x3;
          byte_squares(low[j], &x0, &x2);
          byte_squares(high[j], &x1, &x3);
          half_tile(f, x0, x1, x2, x3, square[w][j].x, square[w][j].y);
        }
      }
      if constexpr (R == 1) { /* this lane's page last */
        if (tile == 0 || t / 2 == tile) {
          dot[0] = t % 2 ? 254 * c[2] + c[3] : 254 * c[0] + c[1];
          wide[0] = t % 2 ? f[2] : f[0];
        }
      } else {
        dot[0] = 254 * c[0] + c[1], dot[MINE - 1] = 254 * c[2] + c[3];
        wide[0] = f[0], wide[MINE - 1] = f[2];
      }
    }
    float4 tail[MINE]; /* step, step of the spread, radius, size */
#pragma unroll
    for (int i = 0; i < MINE; i++)
      tail[i] = ((const float4 *)turn)[AT_ONCE * ROW + (R > 1 ? 8 * i : t < 2 * TILES ? 8 * t : 0) + key];
    __syncwarp();
    copy(base + AHEAD * stride, page, stage);
    page = look_up(base + (AHEAD + 1) * stride);
    stage = stage + 1 == AHEAD ? 0 : stage + 1;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      const int p = base + 8 * (R == 1 ? t : i) + key;
      const bool there = p < last, usable = p < judged && tail[i].w > 0;
      float mid = tail[i].x * (s2 * (float)dot[i]);
      const float far = __fadd_ru(tail[i].w, tail[i].z);
      float loose = __fmaf_ru(slack_k, __fadd_ru(far, tail[i].z), slack_0);
      loose = __fmaf_ru(norm, tail[i].z, __fmaf_ru(e2, far, loose));
      loose = __fmaf_ru(0x1p-21f, fabsf(mid), loose);
      const bool finite = fabsf(mid) < emxi_inf();
      float up = mid;
      if (a.slopes) { /* within 2^-23 of the larger one, and so is a score's */
        const int from = p * pool.P - (int)(length - 1);
        const float x = slope * (float)from, y = slope * (float)(from + pool.P - 1);
        loose = __fadd_ru(__fmaf_ru(0x1p-21f, fmaxf(fabsf(x), fabsf(y)), loose), fmaxf(x, y));
        mid += 0.5f * (x + y);
      }
      up = __fadd_ru(up, loose);
      if (there && a.bounds) a.upper[row_at + p] = usable && finite && fabsf(up) < emxi_inf() ? up : emxi_inf();
      if (there) size = fmaxf(size, tail[i].w); /* also of the newest page, which is read */
      if (a.kind == EMX_SELECT_GAUSSIAN) {
        const float broad = tail[i].y * top * root_near(wide[i]);
        if (there) /* without slopes: what choose compares is enough */
          a.mu[row_at + p] = a.slopes ? mid : usable ? fmaf(a.page_z, broad, mid) : emxi_inf();
        if (there && a.slopes) a.sigma[row_at + p] = usable ? broad : -1.0f;
        if (usable) {
          count += 1;
          sum_mean += mid;
          sum_spread += broad;
          sum_square = fmaf(mid, mid, fmaf(broad, broad, sum_square));
        }
      }
      if (there && !(tail[i].w > 0)) unknown++, unknown_at = p;
    }
  }
  if (R > 1 && t) unknown = 0; /* other rows of the same pages */
  if (a.bounds && __any_sync(EMXI_FULL, unknown > 0)) {
    if (!__any_sync(EMXI_FULL, unknown > 1)) {
      size = fmaxf(size, sizes_of_keys(a, b, g, length, table, unknown > 0, unknown_at));
    } else { /* too many to remember: once more through the records */
      for (base = (split * slots + slot) * AT_ONCE; base < pages; base += stride) {
        const int p = base + lane;
        const bool there = lane < AT_ONCE && p < pages;
        size = fmaxf(
            size,
            sizes_of_keys(a, b, g, length, table,
                          there && !(tails[(int64_t)table_page(a.batch, pool, table, b, there ? p : 0) * pool.G].size > 0), p));
      }
    }
  }
  size = warp_max(size);
  float stats[4] = {count, sum_mean, sum_spread, sum_square};
#pragma unroll
  for (int step = 16; step >= (R == 1 ? 1 : 4); step >>= 1)
#pragma unroll
    for (int i = 0; i < 4; i++) stats[i] += __shfl_xor_sync(EMXI_FULL, stats[i], step);
  if (lane < R)
#pragma unroll
    for (int i = 0; i < 4; i++) shared_stats[warp][lane][i] = stats[i];
  if (lane == 0) shared_size[warp] = size;
  __syncthreads();
  /* By the first warp of each head. */
  if (slot) return;
  for (int w = warp + heads; w < JUDGE_WARPS; w += heads) size = fmaxf(size, shared_size[w]);
  if (lane < rows) a.sizes[(row0 + lane) * a.page_splits + split] = size;
  if (a.kind == EMX_SELECT_GAUSSIAN && lane < 4 * rows) {
    double x = 0;
    for (int w = warp; w < JUDGE_WARPS; w += heads) x += (double)shared_stats[w][lane / 4][lane % 4];
    a.stats[((row0 + lane / 4) * a.page_splits + split) * 4 + lane % 4] = x;
  }
}

/* ---- launches */

unsigned judge_grid(const emxi_cuda_decode &d, int rows) {
  return (unsigned)(d.batch.n * (d.pool.G / d.judge_heads) * ((d.group + rows - 1) / rows) * d.page_splits);
}
template <typename T>
void launch_boxes(const emxi_cuda_decode &d, cudaStream_t stream) {
  if (d.group == 1)
    launch(judge_boxes<T, 1>, judge_grid(d, 1), JUDGE_THREADS, 0, stream, d.overlap, d);
  else
    launch(judge_boxes<T, 4>, judge_grid(d, 4), JUDGE_THREADS, 0, stream, d.overlap, d);
}
template <int WORDS, int R, int AHEAD>
void launch_balls(const emxi_cuda_decode &d, cudaStream_t stream) {
  const size_t shared = ball_turns<WORDS, R>::shared(AHEAD);
  (void)cudaFuncSetAttribute(judge_balls<WORDS, R, AHEAD>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  launch(judge_balls<WORDS, R, AHEAD>, judge_grid(d, R), JUDGE_THREADS, shared, stream, d.overlap, d);
}
/* A turn fewer where a block may not have as much (99 KiB on compute 8.6, 8.9, 12.0). */
template <int WORDS, int R>
void launch_balls(const emxi_cuda_decode &d, cudaStream_t stream) {
  using turns = ball_turns<WORDS, R>;
  constexpr size_t STATIC = JUDGE_WARPS * (sizeof(ball_query<WORDS>) + (4 * R + 1) * sizeof(float)) + 1024, LEAST = 99 << 10;
  static_assert(turns::shared(turns::MOST - 1) + STATIC <= LEAST, "fits every device");
  if (turns::shared(turns::MOST) + STATIC <= (size_t)d.shared)
    launch_balls<WORDS, R, turns::MOST>(d, stream);
  else
    launch_balls<WORDS, R, turns::MOST - 1>(d, stream);
}
template <int WORDS>
void launch_balls(const emxi_cuda_decode &d, cudaStream_t stream) {
  if (d.group == 1)
    launch_balls<WORDS, 1>(d, stream);
  else
    launch_balls<WORDS, 4>(d, stream);
}
void launch_judge(const emxi_cuda_decode &d, cudaStream_t stream) {
  if (d.box && d.pool.dtype == EMX_F32)
    launch_boxes<float>(d, stream);
  else if (d.box && d.pool.dtype == EMX_F16)
    launch_boxes<__half>(d, stream);
  else if (d.box)
    launch_boxes<__nv_bfloat16>(d, stream);
  else if (d.pool.D <= 64)
    launch_balls<1>(d, stream);
  else if (d.pool.D <= 128)
    launch_balls<2>(d, stream);
  else
    launch_balls<4>(d, stream);
}

} // namespace

#endif
