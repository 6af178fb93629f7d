/* SPDX-License-Identifier: Apache-2.0
 * Queries in the terms of key sketches, and the limit of a row: what the kernels of CERTIFIED share. */
#ifndef EMXI_CUDA_SKETCH_CUH
#define EMXI_CUDA_SKETCH_CUH

#include "rows.cuh"

namespace {

constexpr int GROUP = EMXI_CUDA_GROUP, CERT_THREADS = 256, CERT_WARPS = CERT_THREADS / 32, BINS = EMXI_CUDA_BINS;
constexpr float BIN = 1.0f / 64;

__device__ __forceinline__ double warp_sum_double(double x) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(EMXI_FULL, x, step);
  return x;
}
__device__ __forceinline__ float round_up(double x) { return __double2float_ru(x); }

using cert_query = emxi_cuda_query;
using cert_words = emxi_cuda_words;

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
/* By one warp. */
__device__ void open_query(const emxi_cuda_decode &a, int b, int h, int s, int64_t row, int64_t visible, cert_query *out,
                           cert_words *words) {
  const int lane = threadIdx.x % 32, D = a.pool.D;
  const float *weights = a.pool.sketch.weights + (int64_t)(h / a.group) * a.pool.sketch.dp;
  float q[8], weight[8];
  load_lanes(a.q, a.q_dtype, b * a.q_stride[0] + h * a.q_stride[1] + s * a.q_stride[2], D, q);
#pragma unroll
  for (int e = 0; e < 8; e++) weight[e] = lane + 32 * e < D ? __ldg(weights + lane + 32 * e) : 1.0f; /* 0: not set, as 1 */
  double w[8], top = 0, square = 0, far = 0, plain = 0; /* squares: of channels of weight 1; of the others, with and without it */
  bool weighted = false;
#pragma unroll
  for (int e = 0; e < 8; e++) {
    w[e] = (double)(q[e] * a.scale);
    weighted |= weight[e] > 1;
    square += w[e] * w[e];
  }
  weighted = __any_sync(EMXI_FULL, weighted);
  if (weighted) {
    square = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const double own = w[e] * w[e];
      square += weight[e] > 1 ? 0 : own;
      plain += weight[e] > 1 ? own : 0;
      if (weight[e] > 1) w[e] *= (double)weight[e];
      far += weight[e] > 1 ? w[e] * w[e] : 0;
    }
    far = warp_sum_double(far);
    plain = warp_sum_double(plain);
  }
#pragma unroll
  for (int e = 0; e < 8; e++) top = fmax(top, fabs(w[e]));
#pragma unroll
  for (int step = 16; step; step >>= 1) top = fmax(top, __shfl_xor_sync(EMXI_FULL, top, step));
  square = warp_sum_double(square);
  /* s2 far above the smallest normal float; a query below it counts as an error of zero */
  const double s1 = top < 1e-25 ? 0 : top / 127, s2 = s1 / 254, per_s1 = s1 > 0 ? 1 / s1 : 0, per_s2 = 254 * per_s1;
  double two = 0;
  int sum = 0, size = 0;
#pragma unroll
  for (int e = 0; e < 8; e++) {
    double x = 0, y = 0;
    if (s2 > 0 && 32 * e < D) { /* any integers will do: e2 is measured */
      x = fmin(fmax(nearbyint(w[e] * per_s1), -127.0), 127.0);
      y = fmin(fmax(nearbyint((w[e] - s1 * x) * per_s2), -127.0), 127.0);
    }
    const double left = w[e] - s1 * x - s2 * y;
    two += left * left;
    sum += 254 * (int)x + (int)y;
    size += 254 * abs((int)x) + abs((int)y);
    ((int8_t *)words->a)[lane + 32 * e] = (int8_t)x;
    ((int8_t *)words->b)[lane + 32 * e] = (int8_t)y;
  }
  two = warp_sum_double(two);
  sum = __reduce_add_sync(EMXI_FULL, sum);
  size = __reduce_add_sync(EMXI_FULL, size);
  if (lane) return;
  const double norm = sqrt(square) * (1 + 1e-12) + 1e-150, wide = weighted ? sqrt(far) * (1 + 1e-12) + 1e-30 : 0,
               bare = weighted ? sqrt(square + plain) * (1 + 1e-12) + 1e-150 : norm;
  out->s2 = (float)s2;
  out->norm = round_up(norm);
  out->norm_down = __double2float_rd(sqrt(square) * (1 - 1e-12));
  out->e2 = round_up(sqrt(two) * (1 + 1e-12) + 0x1p-48 * (norm + wide));
  /* a computed score's own error, scale * q included; products and elements below the normal floats may be lost */
  out->slack_k = round_up((2 * D + 8) * 0x1p-24 * 1.01 * bare + sqrt((double)D) * 0x1p-126);
  out->slack_0 = round_up(1e-35 + bare * sqrt((double)D) * 0x1p-124);
  out->slope = a.slopes ? (double)a.slopes[h] : 0;
  out->sum = sum;
  out->size = size;
  out->row = (int32_t)row;
  out->visible = (int32_t)visible;
  out->far = round_up(wide);
  out->far_down = weighted ? __double2float_rd(sqrt(far) * (1 - 1e-12)) : 0;
}
/* Error of the score of a key of this norm at a position. */
__device__ __forceinline__ double cert_slack(const cert_query &q, double norm, double distance) {
  return (double)q.slack_k * norm + (double)q.slack_0 + 0x1p-22 * fabs(q.slope) * distance;
}
/* What the bounds of the keys of a group have in common, `up` being the group's: the bound of a key is this and scale times an integer of its
 * codes, in one fused operation. docs/numerics.md. */
__device__ __forceinline__ float key_base(const cert_query &q, float up, float2 radius, float2 error, float scale) {
  float x = __fsub_ru(up, __fmul_rd(q.norm_down, radius.x)),
        loose = __fmaf_ru(q.norm, error.x, __fmul_ru(q.e2, __fadd_ru(radius.x, error.x)));
  if (q.far > 0) {
    x = __fsub_ru(x, __fmul_rd(q.far_down, radius.y));
    loose = __fadd_ru(loose, __fmaf_ru(q.far, error.y, __fmul_ru(q.e2, __fadd_ru(radius.y, error.y))));
  }
  x = __fadd_ru(x, loose);
  return __fadd_ru(x, __fmaf_ru(0x1p-21f, __fmaf_ru(15 * scale, (float)q.size, fabsf(x)), 1e-36f));
}

/* Integer tensor product: c += the rows of 16 keys (words x of four dimensions as codes lie) times eight columns. */
__device__ __forceinline__ void dot_tile(int (&c)[4], uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3, int32_t y0,
                                         int32_t y1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(y0), "r"(y1));
}
/* The columns' word `word` that lane l brings into a product, four dimensions: column l/4 is a or b (odd) of row l/8; with one row in all,
 * every pair of columns is its. Lane l gets columns 2 (l%4) and the next, a and b of row l%4, of keys l/4 and l/4 + 8. */
template <int R>
__device__ __forceinline__ int32_t column_word(const cert_words *words, int rows, int word) {
  const int column = threadIdx.x % 32 / 4, r = R == 1 ? 0 : column / 2;
  if (r >= rows) return 0;
  return column % 2 ? words[r].b[word] : words[r].a[word];
}

struct cert_item {
  int b, g, first_row, rows;
  int64_t length, groups;
  const int32_t *table;
};
template <int R>
__device__ __forceinline__ cert_item open_item(const emxi_cuda_decode &a, int item) {
  cert_item it;
  it.first_row = item % a.blocks * R;
  it.g = item / a.blocks % a.pool.G;
  it.b = item / a.blocks / a.pool.G;
  const int left = a.group * a.S - it.first_row;
  it.rows = left >= R ? R : left;
  it.table = batch_entry(a.batch, it.b, &it.length);
  it.groups = (it.length + GROUP - 1) / GROUP;
  return it;
}
/* Queries of an item, a warp each; afterwards a barrier. */
template <int R>
__device__ __forceinline__ void open_queries(const emxi_cuda_decode &a, const cert_item &it, cert_query *q, cert_words *words) {
  for (int r = threadIdx.x / 32; r < it.rows; r += blockDim.x / 32) {
    const int index = it.first_row + r, s = index / a.group, h = it.g * a.group + index % a.group;
    const int64_t visible = it.length - a.S + s + 1;
    open_query(a, it.b, h, s, ((int64_t)it.b * a.H + h) * a.S + s, visible > 0 ? visible : 0, &q[r], &words[r]);
  }
  __syncthreads();
}
/* The same as judge has left them. */
template <int R>
__device__ __forceinline__ void fetch_queries(const emxi_cuda_decode &a, const cert_item &it, cert_query *q, cert_words *words) {
  for (int r = 0; r < it.rows; r++) {
    const int index = it.first_row + r, s = index / a.group, h = it.g * a.group + index % a.group;
    const int64_t row = ((int64_t)it.b * a.H + h) * a.S + s;
    for (int i = threadIdx.x; i < (int)(sizeof(cert_words) / 4); i += blockDim.x)
      ((int32_t *)&words[r])[i] = __ldcg((const int32_t *)&a.cert_words[row] + i);
    for (int i = threadIdx.x; i < (int)(sizeof(cert_query) / 8); i += blockDim.x)
      ((int64_t *)&q[r])[i] = __ldcg((const long long *)&a.cert_query[row] + i);
  }
  __syncthreads();
}
__device__ __forceinline__ int64_t group_at(const emxi_cuda_decode &a, const cert_item &it, int64_t group) {
  const int64_t position = group * GROUP;
  const int64_t page = table_page(a.batch, a.pool, it.table, it.b, position >> a.pool.shift);
  return (page * a.pool.G + it.g) * (a.pool.P / GROUP) + ((position & (a.pool.P - 1)) / GROUP);
}

/* A lower bound of the threshold of numbers y that f(add) hands out, add(y, how many), in the warp: at most `steps` Newton steps from t on the
 * left, on the norm of the positive parts. Each is cut by 1e-4 of itself: it is at most the way to the root, and sums of at most 1,024
 * positive terms, a power and a division are off by far less. */
template <typename F>
__device__ __forceinline__ float newton_below(double alpha, float t, int steps, F each) {
  const float fa = (float)(alpha - 1), fb = 1 / fa;
  for (int step = 0; step < steps; step++) {
    float mass = 0, slope = 0;
    if (alpha == 1.5)
      each([&](float y, float n) {
        y = fmaxf(y - t, 0.0f);
        mass = fmaf(n * y, y, mass);
        slope = fmaf(n, y, slope);
      });
    else
      each([&](float y, float n) {
        y -= t;
        if (!(y > 0) || !(n > 0)) return;
        const float p = slow_power(y, fb);
        mass += n * p;
        slope += n * (p / y);
      });
    mass = warp_sum(mass);
    slope = warp_sum(slope);
    if (!(mass > 1 && slope > 0) || !(mass < 1e30f)) break;
    t += (mass - (alpha == 1.5 ? sqrtf(mass) : slow_power(mass, 1.0f - fa))) / slope * (1 - 1e-4f);
  }
  return t;
}
/* The limit of a row, below which nothing has weight, from its histogram. By a warp. `low`: a limit that is known. */
__device__ __noinline__ void raise_limit(const emxi_cuda_decode &a, int64_t row, double alpha, float low) {
  const int lane = threadIdx.x % 32;
  constexpr int MINE = BINS / 32;
  const float base = a.cert[row].base, fa = (float)(alpha - 1);
  float n[MINE];
#pragma unroll
  for (int i = 0; i < MINE; i++) n[i] = (float)__ldcg(&a.cert_bins[row * BINS + lane * MINE + i]);
  const float t = newton_below(alpha, fa * (low - base), 5, [&](auto add) {
#pragma unroll
    for (int i = 0; i < MINE; i++) add(fa * ((float)(lane * MINE + i) * BIN), n[i]);
  });
  const float limit = base + t / fa, down = limit - 1e-5f * (1 + fabsf(limit) + fabsf(base));
  if (lane == 0 && down > low) atomicMax(&a.cert[row].limit, to_ordered(down));
}

/* By one thread, when the row's report has been written: what was read. */
__device__ __noinline__ void account_row(const emxi_cuda_decode &a, int64_t row) {
  const row_place p = place_of(a, row);
  const int index = p.s * a.group + p.h % a.group, item = (p.b * a.pool.G + p.g) * a.blocks + index / a.rows;
  emx_report *r = (emx_report *)(a.reports + row * a.report_stride);
  const emxi_cuda_cert &c = a.cert[row];
  const int64_t key = (int64_t)a.pool.D * (a.pool.dtype == EMX_F32 ? 4 : 2), dp = a.pool.sketch.dp;
  const int64_t judged = (p.visible + GROUP - 1) / GROUP * (dp + 32) + 4 * (int64_t)a.pool.D;
  r->bytes_meta += judged;
  if (a.cert_flat[item]) return;
  r->path = EMX_PATH_LADDER;
  r->bytes_meta += (int64_t)c.codes * 8 * dp;
  r->tokens = (int32_t)c.tokens;
  r->pages = (int32_t)c.pages;
  r->bytes_k = (int64_t)c.tokens * ((key + 63) / 64 * 64);
  if (r->flags & EMX_REPORT_NONFINITE) {
    r->max_unread = r->tokens == p.visible ? -emxi_inf() : emxi_inf();
    return;
  }
  const double alpha = alpha_of(a, p.h), unit = alpha > 1 ? alpha - 1 : 1;
  r->max_unread = __double2float_ru(unit * (double)from_ordered(c.limit));
  if (!a.cert_limit) return;
  const emxi_cuda_limit &limit = a.cert_limit[row];
  r->stopped_by = (uint8_t)limit.stopped;
  r->delta_bound = fminf(__double2float_ru(limit.delta), 1.0f);
  r->max_unread = r->tokens == p.visible ? -emxi_inf() : __double2float_ru(unit * (double)limit.far);
  if (r->delta_bound > 0) r->flags = 0;
}

} // namespace

#endif
