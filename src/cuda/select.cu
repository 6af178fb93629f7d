/* SPDX-License-Identifier: Apache-2.0
 * Selectors on the device (src/cpu/select_cpu.c is their specification), and what they say of the tokens that are left out.
 *
 *   judge    block = (sequence, KV head, up to R query heads, part of the pages). Summaries of complete pages: bounds of their scores, and for
 *            GAUSSIAN their mean and spread. Boxes: 16 bytes a lane, products in float; 4 D bytes a page of two-byte elements. Balls: 16 pages a
 *            warp, tensor products; 2 D + 16 bytes a page.
 *   choose   GAUSSIAN, block = (row, part of the pages): the estimated threshold, by every block for itself; pages above it as a bit each, then
 *            as a list in order, behind what the parts before it have found.
 *   pick     others, block = row: the budget, or a caller's list.
 *   certify  block = (row, part of the pages), after the decode: the bound of the mass of what was not read (T6 of docs/math.md in its root
 *            form). Parts count bounds by size, the last one to do so solves.
 *
 * Bounds of a score q.k + bias of a page, q times scale already, u = 2^-24:
 *   box   sum max(q lo, q hi)            ball   q.c + |q| radius, c what the codes say
 * Rounding: both, and the score that would be computed, are sums of D products in some order whose absolute terms add up to at most
 * A = |q| (size + 2 radius), size the norm of the largest elements; D + 2 roundings for a bound, D + 1 for a score, 1 for the distance between c
 * and its float: (2 D + 8) u A with 1 % for the roundings of A. A bias is within 4 u of the largest in size. All rounded up.
 * For balls q = s2 (254 a + b) + rest with 8-bit integers a, b: q.c is an integer times two floats, and |rest| (size + radius). */
#include "sketch.cuh"

#include "../kv/gauss_moments.h"

namespace {

constexpr int JUDGE_THREADS = 256, JUDGE_WARPS = JUDGE_THREADS / 32, PICK_THREADS = 1024, CHOOSE_THREADS = 512,
              CHOOSE_WARPS = CHOOSE_THREADS / 32, CERTIFY_THREADS = SOLVE_THREADS, LISTED = 256;

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
/* How large the keys of pages without a summary are, page p of every lane with `unknown`: what rounding may do to their scores. By a warp. */
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
/* By one warp, a lane E elements. Differences are exact but for 2^-24 of what is left by a, which is at most s1: 16 2^-24 s1 in all. */
template <int WORDS>
__device__ __forceinline__ void open_ball_query(const emxi_cuda_decode &a, int b, int h, ball_query<WORDS> *out) {
  constexpr int E = 2 * WORDS;
  const int lane = threadIdx.x % 32, D = a.pool.D;
  float w[E], top = 0;
  double square = 0, two = 0;
  int small = 0;
  load_lanes(a.q, a.q_dtype, b * a.q_stride[0] + h * a.q_stride[1], D, w);
#pragma unroll
  for (int e = 0; e < E; e++) {
    const float x = w[e];
    w[e] = x * a.scale;
    top = fmaxf(top, fabsf(w[e]));
    square += (double)w[e] * (double)w[e];
    small += x != 0 && fabsf(w[e]) < 1.17549435e-38f;
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

/* Sixteen bytes into shared memory. */
__device__ __forceinline__ void copy16(uint4 *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy16_once(uint4 *to, const void *from, uint64_t once) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
               "l"(from), "l"(once)
               : "memory");
}
/* What a warp of judge_balls copies in a turn, in 16 bytes: ROW for a page's centre and spread, then records; and how many turns ahead of the
 * sums, as the shared memory of two blocks a multiprocessor allows. */
template <int WORDS, int R>
struct ball_turns {
  static constexpr int TILES = R == 1 && WORDS == 1 ? 2 : 1, AT_ONCE = 16 * TILES, ROW = 8 * WORDS, SIZE = AT_ONCE * (ROW + 1),
                       MOST = SIZE < 200   ? 4
                              : WORDS == 4 ? 2
                                           : 3;
  static constexpr size_t shared(int ahead) { return (size_t)JUDGE_WARPS * ahead * SIZE * 16; }
};

/* A warp has sixteen pages in a tensor product; four lanes have a page's codes, 64 dimensions in each of WORDS pieces. Columns 2 r and 2 r + 1
 * are row r's (of one row: all are): a and b with centres, squares with the squares of spreads. Of four rows a lane has the sums of one with two
 * pages; of one row alone those of one page. */
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
  /* Warps of a block have neighbouring KV heads, whose records are neighbours, and the same pages; of what is left, other pages. */
  const int heads = a.judge_heads, slots = JUDGE_WARPS / heads, slot = warp / heads, items = pool.G / heads;
  const int split = blockIdx.x % a.page_splits, item = blockIdx.x / a.page_splits,
            g = item / blocks % items * heads + warp % heads, b = item / blocks / items, first = item % blocks * R,
            rows = a.group - first < R ? a.group - first : R;
  const int64_t row0 = (int64_t)b * a.H + g * a.group + first; /* S = 1 */
  int64_t length;
  const int32_t *table = batch_entry(a.batch, b, &length);
  const int pages = (int)((length + pool.P - 1) >> pool.shift);

  /* Codes are copied some turns ahead, the first ones before anything else; page numbers, a lane each, are asked for a turn before that. What is
   * not there is read from page 0, or from the last dimensions, and not used. */
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
  {
    int32_t begin[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) begin[i] = look_up(base + i * stride);
    page = look_up(base + AHEAD * stride);
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
    open_ball_query(a, b, g * a.group + first + of, &query);
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

/* ---- choose: GAUSSIAN */

/* What emx_select says of a list. */
__device__ __forceinline__ void write_selected(const emxi_cuda_decode &a, int b, int h, int s, double alpha, int n,
                                               float unread) {
  a.io_n[b * a.io_n_stride[0] + h * a.io_n_stride[1] + s * a.io_n_stride[2]] = n;
  const double unit = alpha > 1 ? alpha - 1.0 : 1.0;
  if (a.io_bound)
    a.io_bound[b * a.io_bound_stride[0] + h * a.io_bound_stride[1] + s * a.io_bound_stride[2]] =
        unread > -emxi_inf() ? float_up(unit * (double)unread) : -emxi_inf();
}

struct picker {
  double *scratch; /* [32] */
  float *top;      /* [32] */
};

__device__ __noinline__ double slow_term(double a, double b, double mean, double spread, double tau) {
  double slope;
  return emxi_gauss_term(a, b, mean, spread, tau, &slope);
}
/* ln(n E[(a X - tau)_+^b]) of one normal crosses zero, b = 1, 2, 3: a threshold a thread, three rounds leave a 10^-8th of the bracket. In float
 * and in spreads, with the recurrence forward: at the fifth spread, where a token in a million is, 1e-4 of the mass is lost, which moves tau
 * by 1e-5 spreads. */
__device__ __forceinline__ double single_tau(double a, int kind, float n, double mean, float spread) {
  const float rare = sqrtf(2.0f * __logf(n + 1.0f)) + 8.0f, unit = (float)a * spread,
              whole = kind == 1   ? 1 / n
                      : kind == 2 ? rsqrtf(n)
                                  : exp2f(-__log2f(n) / 3);
  if (!(unit > 1e-5f * whole)) return a * mean - (double)whole; /* a point */
  const float count = n * (kind == 1 ? unit : kind == 2 ? unit * unit : unit * unit * unit);
  float lo = -rare, hi = 1.0001f * (whole / unit); /* tau = a mean - t unit; where t is hi the mass is above 1 */
#pragma unroll 1
  for (int round = 0; round < 3; round++) {
    const float width = (hi - lo) * (1.0f / (CHOOSE_THREADS + 1)), t = hi - width * (float)(threadIdx.x + 1);
    float low = 0.5f * erfcf(-t * 0.70710678f), x = fmaf(t, low, 0.39894228f * __expf(-0.5f * t * t));
    for (int i = 2; i <= kind; i++) {
      const float next = fmaf(t, x, (float)(i - 1) * low);
      low = x;
      x = next;
    }
    hi -= width * (float)__syncthreads_count(count * x >= 1.0f);
    lo = hi - width;
  }
  return a * mean - (double)hi * (double)unit;
}
/* Any b, by the block. */
__device__ __noinline__ double general_tau(double a, double b, double n, double mean, double spread) {
  const double rare = sqrtf(2.0f * logf((float)n + 1.0f)) + 8.0f;
  double lo = a * mean - slow_power(n, -a) - (b < 1.0 ? 1.0 + 8.0 * a * spread : 1e-9 * (1.0 + fabs(a * mean))),
         hi = a * mean + a * spread * rare + 1e-9;
  for (int round = 0; round < 3; round++) {
    const double width = (hi - lo) / (CHOOSE_THREADS + 1), tau = lo + width * (double)(threadIdx.x + 1);
    lo += width * (double)__syncthreads_count(n * slow_term(a, b, mean, spread, tau) >= 1.0);
    hi = lo + width;
  }
  return lo;
}
/* The same for pages that differ: as emxi_gauss_tau, to 1e-6 of the mass. */
__device__ __noinline__ double mixture_tau(double alpha, double n, const float *mu, const float *sigma, int64_t pages,
                                           const picker &k) {
  const double a = alpha - 1.0, b = 1.0 / a;
  float top = -emxi_inf(), widest = 0;
  for (int64_t p = threadIdx.x; p < pages; p += CHOOSE_THREADS)
    if (sigma[p] >= 0) top = fmaxf(top, mu[p]), widest = fmaxf(widest, sigma[p]);
  for (int step = 16; step; step >>= 1) {
    top = fmaxf(top, __shfl_xor_sync(EMXI_FULL, top, step));
    widest = fmaxf(widest, __shfl_xor_sync(EMXI_FULL, widest, step));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) k.top[threadIdx.x / 32] = top, k.scratch[threadIdx.x / 32] = (double)widest;
  __syncthreads();
  for (int w = 0; w < CHOOSE_THREADS / 32; w++) top = fmaxf(top, k.top[w]), widest = fmaxf(widest, (float)k.scratch[w]);
  __syncthreads();
  double slope = 0;
  const auto mass = [&](double tau) {
    double f = 0, g = 0;
    for (int64_t p = threadIdx.x; p < pages; p += CHOOSE_THREADS) {
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

/* Parts of a row get their number when they start, so one may wait for those before it. */
__global__ void __launch_bounds__(CHOOSE_THREADS, 2) choose(const __grid_constant__ emxi_cuda_decode a) {
  constexpr int WORDS = 8; /* of 32 pages, at a time, so that loads overlap */
  __shared__ double scratch[32], sums[4];
  __shared__ float shared_top[32], shared_size;
  __shared__ int shared_part, shared_n[CHOOSE_WARPS], before, total;
  wait_for_previous();
  const emxi_cuda_pool &pool = a.pool;
  const uint32_t row = blockIdx.x / (uint32_t)a.picks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, h = (int)(row % (uint32_t)a.H), b = (int)(row / (uint32_t)a.H);
  emxi_cuda_judged *state = &a.judged[row];
  if (threadIdx.x == CHOOSE_THREADS - 1) shared_part = (int)atomicAdd(&state->picked, 1u);
  if (warp < 4) {
    double x = 0;
#pragma unroll 4
    for (int j = lane; j < a.page_splits; j += 32) x += a.stats[((int64_t)row * a.page_splits + j) * 4 + warp];
    x = warp_sum_double(x);
    if (lane == 0) sums[warp] = x;
  } else if (warp == 4) {
    float size = 0;
#pragma unroll 4
    for (int j = lane; j < a.page_splits; j += 32) size = fmaxf(size, a.sizes[(int64_t)row * a.page_splits + j]);
    size = warp_max(size);
    if (lane == 0) shared_size = size;
  }
  int64_t length;
  const int32_t *table = batch_entry(a.batch, b, &length);
  const int64_t pages = (length + pool.P - 1) >> pool.shift;
  const double alpha = alpha_of(a, h);
  float *upper = a.upper + row * a.pages;
  const float *mu = a.mu + row * a.pages, *sigma = a.sigma + row * a.pages;
  uint32_t *chosen = a.chosen + row * ((a.pages + 31) / 32);
  int32_t *list = a.list + row * a.pages, *place = a.place + row * a.pages;
  __syncthreads();
  /* Words of this part, of this warp. */
  const int part = shared_part, words = (int)((pages + 31) / 32), each = (words + a.picks - 1) / a.picks,
            begin = min(part * each, words), share = (min(begin + each, words) - begin + CHOOSE_WARPS - 1) / CHOOSE_WARPS,
            end = min(begin + each, words), from = min(begin + warp * share, end), to = min(from + share, end);

  emxi_cuda_choice choice = {0, -emxi_inf(), shared_size, 0, 0};
  float floor = -emxi_inf();
  bool all = alpha == 0;
  if (!all) {
    const double count = sums[0], near = (double)(1 / (float)count), per = near * (2 - count * near), mean = sums[1] * per;
    const float spread = sqrtf((float)fmax(sums[3] * per - mean * mean, 0.0));
    choice.judged = (int32_t)count;
    if (count > 0 && !(spread < emxi_inf() && fabs(mean) < emxi_inf())) {
      all = true; /* means that overflow say nothing */
    } else if (count > 0) {
      const threshold k = threshold_of(a, alpha, 0);
      double tau;
      if (a.slopes && a.slopes[h] != 0) {
        tau = mixture_tau(alpha, pool.P, mu, sigma, pages, {scratch, shared_top});
      } else if (k.power >= 1 && k.power <= 3) {
        tau = single_tau(k.a, k.power, (float)count * (float)pool.P, mean, spread);
      } else {
        tau = general_tau(k.a, k.b, count * pool.P, mean, (double)spread);
      }
      const double excess = tau * k.b - (sums[1] + 1.5 * sums[2]) * per;
      floor = (float)(tau * k.b - fmax((double)(a.safety_margin * spread), (double)a.excess_margin * fmax(excess, 0.0)));
      choice.estimate = tau;
      choice.estimated = 1;
    }
  }

  int n = 0;
  uint32_t kept = 0; /* word `lane` of up to 32; more are in `chosen` */
  float unread = -emxi_inf();
  for (int first = from; first < to; first += WORDS) {
    float up[WORDS], x[WORDS];
#pragma unroll
    for (int u = 0; u < WORDS; u++) {
      const int p = (first + u) * 32 + lane;
      const bool there = first + u < to && p < pages;
      up[u] = there && a.bounds ? upper[p] : -emxi_inf();
      x[u] = there ? mu[p] : -emxi_inf();
    }
#pragma unroll
    for (int u = 0; u < WORDS; u++) {
      const int p = (first + u) * 32 + lane;
      bool take = x[u] > floor || all;
      if (a.slopes && first + u < to && p < pages) {
        const float y = sigma[p];
        take = all || !(y >= 0) || fmaf(a.page_z, y, x[u]) > floor;
      }
      take &= first + u < to && p < pages;
      const uint32_t bits = __ballot_sync(EMXI_FULL, take);
      n += __popc(bits);
      if (lane == first + u - from) kept = bits;
      if (share > 32 && lane == 0 && first + u < to) chosen[first + u] = bits;
      if (!take && !(up[u] <= unread)) unread = up[u];
      if (take && a.bounds) upper[p] = -emxi_inf();
    }
  }
  if (unread != unread) unread = emxi_inf();
  unread = from_ordered(__reduce_max_sync(EMXI_FULL, to_ordered(unread)));
  __syncthreads(); /* also: shared_top has been read */
  if (lane == 0) shared_n[warp] = n, shared_top[warp] = unread;
  __syncthreads();
  if (warp == 0) {
    const int mine = lane < CHOOSE_WARPS ? shared_n[lane] : 0, sum = __reduce_add_sync(EMXI_FULL, mine);
    int highest = __reduce_max_sync(EMXI_FULL, to_ordered(lane < CHOOSE_WARPS ? shared_top[lane] : -emxi_inf()));
    if (lane == 0) atomicExch((unsigned long long *)&state->part[part], (unsigned long long)(sum + 1) << 32 | (uint32_t)highest);
    int others = 0;
    if (lane < part) {
      unsigned long long x;
      do x = *(const volatile unsigned long long *)&state->part[lane];
      while (!x);
      others = (int)(x >> 32) - 1;
      highest = max(highest, (int)(uint32_t)x);
    }
    others = __reduce_add_sync(EMXI_FULL, others);
    highest = __reduce_max_sync(EMXI_FULL, highest);
    choice.max_unread = from_ordered(highest);
    if (lane == 0) before = others, total = others + sum;
    int upto = mine;
#pragma unroll
    for (int step = 1; step < CHOOSE_WARPS; step <<= 1) {
      const int other = __shfl_up_sync(EMXI_FULL, upto, step);
      if (lane >= step) upto += other;
    }
    if (lane < CHOOSE_WARPS) shared_n[lane] = upto - mine;
  }
  __syncthreads();
  int32_t *io = nullptr;
  if (a.select_only) io = a.io_pages + b * a.io_pages_stride[0] + h * a.io_pages_stride[1];
  int at = before + shared_n[warp];
  constexpr int AHEAD = 4;
  for (int first = from; first < to; first += AHEAD) {
    uint32_t bits[AHEAD];
    int32_t page[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      bits[u] = share <= 32 ? __shfl_sync(EMXI_FULL, kept, (first + u - from) % 32) : first + u < to ? chosen[first + u] : 0;
      if (first + u >= to) bits[u] = 0;
      page[u] = !a.select_only && bits[u] >> lane & 1 ? __ldg(table + (int64_t)(first + u) * 32 + lane) : 0;
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int32_t p = (first + u) * 32 + lane, to_place = at + __popc(bits[u] & ((1u << lane) - 1));
      at += __popc(bits[u]);
      if (!(bits[u] >> lane & 1)) continue;
      if (a.select_only) {
        if (to_place < a.io_width) io[to_place] = p;
      } else {
        list[to_place] = p;
        place[to_place] = checked_page(a.batch, pool, b, p, page[u]);
      }
    }
  }
  if (part != a.picks - 1) return;
  if (a.select_only)
    for (int64_t i = total + (int)threadIdx.x; i < a.io_width; i += CHOOSE_THREADS) io[i] = -1;
  if (threadIdx.x) return;
  if (!a.select_only) {
    a.n_list[row] = total;
    a.choice[row] = choice;
  } else {
    write_selected(a, b, h, 0, alpha, total, choice.max_unread);
  }
}

/* ---- pick: budgets and lists */

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
    wrong = __syncthreads_or(wrong);
    if (wrong) n = 0;
    if (!judged || wrong) { /* a wrong list may have marked pages as read */
      if (n < pages) unread = emxi_inf();
    } else {
      for (int64_t p = threadIdx.x; p < pages; p += PICK_THREADS) leave_out(upper[p]);
      choice.judged = (int32_t)pages;
    }
  } else {
    bool all = alpha == 0;
    /* The key of the last page that the budget reaches, by its bits from the top, and how many of those like it. */
    uint32_t last = 0;
    int64_t ties = 0, spare = 0;
    if (!all) {
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
    /* A bit a page; those like the last one in `place` for now. */
    for (int64_t w = warp; w < words; w += PICK_THREADS / 32) {
      const int64_t p = w * 32 + lane;
      const float up = p < pages ? upper[p] : -emxi_inf();
      const uint32_t key = sortable(up);
      const bool take = p < pages && (all || up == emxi_inf() || (spare > 0 && key > last)),
                 tie = p < pages && !take && spare > 0 && key == last;
      const uint32_t bits = __ballot_sync(EMXI_FULL, take), even = __ballot_sync(EMXI_FULL, tie);
      if (lane == 0) chosen[w] = bits, place[w] = (int32_t)even;
    }
    __syncthreads();
    const int64_t per = (words + PICK_THREADS - 1) / PICK_THREADS, from = threadIdx.x * per,
                  to = from + per < words ? from + per : words;
    if (!all) { /* the first `ties` of those like the last one */
      int mine = 0, total;
      for (int64_t w = from; w < to; w++) mine += __popc((uint32_t)place[w]);
      int64_t before = block_offsets(mine, offsets, &total);
      for (int64_t w = from; w < to; w++)
        for (uint32_t even = (uint32_t)place[w]; even; even &= even - 1)
          if (before++ < ties) chosen[w] |= even & -even;
      __syncthreads();
    }
    for (int64_t p = threadIdx.x; a.bounds && p < pages; p += PICK_THREADS)
      if (chosen[p / 32] >> (p % 32) & 1)
        upper[p] = -emxi_inf();
      else
        leave_out(upper[p]);
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
      write_selected(a, b, h, s, alpha, n, unread);
    }
  }
  if (a.select_only) {
    int32_t *io = a.io_pages + b * a.io_pages_stride[0] + h * a.io_pages_stride[1] + s * a.io_pages_stride[2];
    for (int64_t i = threadIdx.x; i < a.io_width; i += PICK_THREADS)
      io[i] = i >= n ? -1 : a.kind == EMX_SELECT_ALL ? (int32_t)i : list[i];
  }
}

/* ---- certify */

/* The parts of a row whose unread pages may matter; of another row the first part says so alone. */
__global__ void __launch_bounds__(CERTIFY_THREADS, 2) certify(const __grid_constant__ emxi_cuda_decode a) {
  __shared__ float list[SOLVE_WARPS][LISTED], all_listed[SOLVE_WARPS * LISTED]; /* a list for each warp; one behind the other */
  __shared__ int bins[BINS], listed[SOLVE_WARPS];
  __shared__ double scratch[SOLVE_WARPS];
  __shared__ bool shared_last;
  constexpr int AHEAD = 8;
  for (int i = threadIdx.x; i < BINS; i += CERTIFY_THREADS) bins[i] = 0;
  wait_for_previous();
  __syncthreads();
  const int64_t row = blockIdx.x / (uint32_t)a.picks;
  const int part = (int)(blockIdx.x % (uint32_t)a.picks), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const row_place place = place_of(a, row);
  const int64_t all_pages = (place.visible + a.pool.P - 1) >> a.pool.shift, each = (all_pages + a.picks - 1) / a.picks,
                from = part * each, to = from + each < all_pages ? from + each : all_pages;
  const float *upper = a.upper + row * a.pages;
  float up[AHEAD];
  const auto load = [&](int64_t first) {
#pragma unroll
    for (int u = 0; u < AHEAD; u++) up[u] = first + u * CERTIFY_THREADS < to ? upper[first + u * CERTIFY_THREADS] : -emxi_inf();
  };
  if (a.judged) load(from + threadIdx.x);
  const emxi_cuda_choice choice = a.choice[row];
  const emxi_cuda_wide *wide = &a.wide[row];
  const double alpha = alpha_of(a, place.h), unit = alpha > 1.0 ? alpha - 1.0 : 1.0;
  const bool unread = choice.max_unread > -emxi_inf(), known = wide->solved && choice.max_unread < emxi_inf();
  double slack = 0, low = 0;
  if (unread && known) { /* judge has been there */
    const double bias = a.slopes ? fabs((double)a.slopes[place.h]) * (double)place.visible : 0.0,
                 tau = wide->exact + unit * (double)wide->m;
    slack = score_slack(a.pool.D, a.judged[row].norm, (double)choice.size, bias) + a.judged[row].lost;
    low = tau - unit * slack - 1e-9 * fmax(1.0, fabs(tau)) - (double)place.visible * 0x1p-50;
  }
  const bool sound = unread && known && slack < emxi_inf(),
             clear = sound && alpha != 1.0 && unit * (double)choice.max_unread <= low;
  double delta = unread && !clear ? 1 : 0;
  if (!sound || clear) {
    if (part) return;
  } else {
    emxi_cuda_judged *state = &a.judged[row];
    /* Unread pages by their bounds, rounded up to the edge of a bin: of a bound above `base`, a float not above low, the float quotient is off by
     * less than 1e-4 of a bin. */
    const float edge = __double2float_rd(alpha == 1.0 ? 0.0 : low * threshold_of(a, alpha, 0).b),
                base = alpha == 1.0 ? 0.0f : nextafterf(edge, -emxi_inf()), reach = choice.max_unread - base, per = BINS / reach,
                ref = fmaxf(wide->m, choice.max_unread);
    double sum = 0;
    for (int64_t first = from + threadIdx.x; first < to; first += AHEAD * CERTIFY_THREADS) {
      if (first >= from + CERTIFY_THREADS) load(first);
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        if (alpha == 1.0) { /* the share of a sum of exponentials; exp here and in the scan is off by less than 1e-4 */
          if (up[u] > -emxi_inf()) sum += (double)expf(up[u] - ref) * (1 + 1e-4) + 1e-37;
        } else if (up[u] > base) {
          atomicAdd(&bins[min((int)((up[u] - base) * per), BINS - 1)], 1);
        }
      }
    }
    if (alpha == 1.0) {
      sum = block_sum(sum, scratch);
      if (threadIdx.x == 0) state->part[part] = (uint64_t)__double_as_longlong(sum);
    } else {
      __syncthreads();
      for (int i = threadIdx.x; i < BINS; i += CERTIFY_THREADS)
        if (bins[i]) atomicAdd(&a.bins[row * BINS + i], (uint32_t)bins[i]);
    }
    /* Scores above the lower bound of tau, by every part, for the last one has been waited for; those of too many to hold count as nothing
     * known. */
    int n = 0;
    if (alpha != 1.0) {
      const float *z = a.z + row * a.chunks * CHUNK, *chunk_max = a.chunk_max + row * a.chunks,
                  thr = nextafterf(edge, -emxi_inf());
      const int64_t chunks = (place.count + CHUNK - 1) / CHUNK;
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
    }
    __threadfence();
    const bool held = !__syncthreads_or(n > LISTED);
    if (threadIdx.x == 0) shared_last = atomicAdd(&state->certified, 1u) == (uint32_t)a.picks - 1;
    const int before = __reduce_add_sync(EMXI_FULL, alpha != 1.0 && lane < warp ? listed[lane] : 0),
              scores = __reduce_add_sync(EMXI_FULL, alpha != 1.0 && lane < SOLVE_WARPS ? listed[lane] : 0);
    for (int i = lane; held && i < n; i += 32) all_listed[before + i] = list[warp][i];
    __syncthreads();
    if (!shared_last) return;
    __threadfence();
    if (alpha == 1.0) {
      sum = 0;
      for (int i = 0; i < a.picks; i++)
        sum += __longlong_as_double((long long)__ldcg((const unsigned long long *)&state->part[i]));
      sum *= a.pool.P;
      const double read = wide->exact * exp((double)wide->m - (double)ref - slack) * (1 - 1e-4);
      delta = fmin(sum / (sum + read) * (1 + 1e-12), 1.0);
    } else {
      constexpr int EACH = BINS / 32; /* bins a lane, of all parts */
      const threshold k = threshold_of(a, alpha, 0);
      const double top = unit * (double)wide->m, floor = unit * (double)base,
                   width = unit * ((double)choice.max_unread - (double)base) / BINS,
                   nudge = 0x1p-10 * width + 1e-12 * (1.0 + fabs(floor) + fabs(unit * (double)choice.max_unread));
      float times[EACH];
#pragma unroll
      for (int i = 0; i < EACH; i++) times[i] = __uint2float_ru(__ldcg(a.bins + row * BINS + 32 * i + lane)) * (float)a.pool.P;
      /* The mass at t, with every unread token at its bound or with none; by each warp for itself. */
      const auto mass = [&](double t, bool far) {
        double sum = 0;
        const auto add = [&](double y, double times) {
          if (y > 0) sum += times * power_of(y, k.b, k.power);
        };
        for (int i = lane; i < scores; i += 32) add(unit * (double)all_listed[i] - t, 1);
        for (int i = 0; far && i < EACH; i++)
          if (times[i] > 0) add(floor + width * (double)(32 * i + lane + 1) + nudge - t, (double)times[i]);
        return warp_sum_double(sum);
      };
      /* The same for a threshold t above that of the largest score alone, in float: near enough to find where to look. */
      const float a_near = (float)unit, floor_near = (float)(floor - top), m = wide->m, width_near = (float)width,
                  b_near = (float)k.b;
      const auto near_mass = [&](float t) {
        float sum = 0;
        const auto add = [&](float y, float times) {
          y = fmaxf(y, 0.0f);
          sum = fmaf(times, k.power == 2 ? y * y : k.power == 1 ? y : y > 0 ? slow_power(y, b_near) : 0.0f, sum);
        };
        for (int i = lane; i < scores; i += 32) add(a_near * (all_listed[i] - m) - t, 1);
#pragma unroll
        for (int i = 0; i < EACH; i++) add(fmaf(width_near, (float)(32 * i + lane + 1), floor_near) - t, times[i]);
        return warp_sum(sum);
      };
      /* Its root, at SOLVE_WARPS thresholds at a time. One above every score that was read leaves nothing of them. */
      if (held && reach < emxi_inf() && low < top && near_mass(0.0f) < 1.0f) {
        float below = (float)(low - top), above = 0;
        for (int round = 0; round < 4; round++) {
          const float step = (above - below) / (SOLVE_WARPS + 1);
          below += step * (float)(__syncthreads_count(near_mass(below + step * (float)(warp + 1)) >= 1.0f) / 32);
          above = below + step; /* it falls with t: the first ones are above 1 */
        }
        const double margin = 1e-5 * (1.0 + fabs(top)), first = fmax(top + (double)below - margin, low),
                     step = (top + (double)above + margin - first) / (SOLVE_WARPS - 1);
        const int over = __syncthreads_count(mass(first + step * (double)warp, true) >= 1.0) / 32;
        double hi = first + step * (double)over;
        if (over < SOLVE_WARPS && hi < top) { /* else nothing of what was read is sure */
          hi += 1e-12 * (1.0 + fabs(hi));     /* of the sections' arithmetic */
          /* Scores may be lower than computed by the slack, and the root lower by as much again. */
          const double read = mass(hi + 2 * unit * slack + 1e-12 * (1.0 + fabs(hi)), false);
          delta = fmin(fmax(1.0 - read + 1e-12 + (double)place.count * 0x1p-50, 0.0), 1.0);
        }
      }
    }
  }
  if (threadIdx.x) return;
  emx_report *report = (emx_report *)(a.reports + row * a.report_stride);
  const bool bad = (report->flags & EMX_REPORT_NONFINITE) != 0,
             certified = !bad && (!unread || clear) && (a.tau_mode == EMX_TAU_EXACT || !choice.estimated);
  if (bad) delta = 1;
  const int64_t es = a.pool.dtype == EMX_F32 ? 4 : 2, padded = EMXI_CUDA_PADDED(a.pool.D),
                record = (a.box ? 2 * padded * es + 63 : 2 * padded + 63) / 64 * 64 + (int64_t)sizeof(emxi_cuda_tail);
  report->delta_bound = fminf(float_up(delta), 1.0f);
  report->max_unread = unread ? float_up(unit * (double)choice.max_unread) : -emxi_inf();
  report->bytes_meta = ((int64_t)choice.judged * record + 63) / 64 * 64;
  report->flags = (uint8_t)((certified ? EMX_REPORT_CERTIFIED : 0) | (bad ? EMX_REPORT_NONFINITE : 0));
  report->stopped_by = unread && !certified && a.kind == EMX_SELECT_TOPK ? EMX_STOP_BUDGET : EMX_STOP_DONE;
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

} // namespace

extern "C" void emxi_cuda_select(const emxi_cuda_decode *d, void *on) {
  const cudaStream_t stream = (cudaStream_t)on;
  if (d->kind != EMX_SELECT_ALL && d->pool.sum.tails && (d->bounds || d->kind != EMX_SELECT_PAGES)) {
    if (d->box && d->pool.dtype == EMX_F32)
      launch_boxes<float>(*d, stream);
    else if (d->box && d->pool.dtype == EMX_F16)
      launch_boxes<__half>(*d, stream);
    else if (d->box)
      launch_boxes<__nv_bfloat16>(*d, stream);
    else if (d->pool.D <= 64)
      launch_balls<1>(*d, stream);
    else if (d->pool.D <= 128)
      launch_balls<2>(*d, stream);
    else
      launch_balls<4>(*d, stream);
  }
  const unsigned rows = (unsigned)(d->batch.n * d->H * d->S);
  if (d->kind == EMX_SELECT_GAUSSIAN)
    launch(choose, rows * (unsigned)d->picks, CHOOSE_THREADS, 0, stream, d->overlap, *d);
  else
    launch(pick, rows, PICK_THREADS, 0, stream, d->overlap, *d);
}
extern "C" void emxi_cuda_certify(const emxi_cuda_decode *d, void *stream) {
  launch(certify, (unsigned)(d->batch.n * d->H * d->S * d->picks), CERTIFY_THREADS, 0, (cudaStream_t)stream, d->overlap, *d);
}
