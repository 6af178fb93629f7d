/* SPDX-License-Identifier: Apache-2.0
 * Sketches of keys, bounds of groups of keys, and what CERTIFIED's reports say. docs/numerics.md derives the bounds. */
#include "sketch.cuh"

namespace {

/* ---- weights of channels. A warp, one head; lane l has dimensions l + 32 e. */

constexpr int LANE_DIMS = MAX_D / 32, LESSONS = 16;
constexpr float LARGEST_KEY = 1e15f;

/* From the groups of a page; false, and no weights, where a key is odd or half of the channels do not spread. How far a channel spreads in a group
 * are the distances of its keys in order, second and last but one, third and last but two, ..., added up, but no more than twice what they are of a
 * normal with these quartiles: an odd key or two do not matter, and the others' spread by chance as little as can be. As on the CPU a channel counts as
 * far out beyond four times the median of all; its weight is what it spreads beyond that median, so that in k / w it spreads like the others. */
__device__ __noinline__ bool learn_weights(const emxi_cuda_pool &p, int64_t page, int head, int lane, float *weight) {
  const int es = p.dtype == EMX_F32 ? 4 : 2;
  const char *keys = p.k + (page * p.k_page + head * p.k_head) * es;
  bool odd = false;
  for (int d = lane; d < p.D; d += 32) {
    float spread = 0;
    for (int from = 0; from < p.P; from += GROUP) {
      float x[GROUP], sum = 0;
#pragma unroll
      for (int t = 0; t < GROUP; t++) {
        x[t] = load_any(keys, p.dtype, (from + t) * p.k_token + d);
        odd |= !(fabsf(x[t]) <= LARGEST_KEY);
      }
#pragma unroll
      for (int size = 2; size <= GROUP; size *= 2) /* bitonic sort */
#pragma unroll
        for (int far = size / 2; far; far /= 2)
#pragma unroll
          for (int i = 0; i < GROUP; i++)
            if (!(i & far)) {
              const float low = fminf(x[i], x[i + far]), high = fmaxf(x[i], x[i + far]);
              x[i] = i & size ? high : low;
              x[i + far] = i & size ? low : high;
            }
#pragma unroll
      for (int i = 1; i < GROUP / 2; i++) sum += x[GROUP - 1 - i] - x[i];
      spread += fminf(sum, 11.3f * (x[GROUP - 4] - x[3]));
    }
    weight[d] = spread;
  }
  if (__any_sync(EMXI_FULL, odd)) return false;
  int usual = 0; /* the bits of the largest number above which half of the channels are, or that they are: the median */
  for (int bit = 30; bit >= 0; bit--) {
    const int next = usual | 1 << bit;
    int n = 0;
#pragma unroll
    for (int e = 0; e < LANE_DIMS; e++)
      n += __popc(__ballot_sync(EMXI_FULL, lane + 32 * e < p.D && __float_as_int(weight[lane + 32 * e]) >= next));
    if (2 * n >= p.D) usual = next;
  }
  const float median = __int_as_float(usual);
  if (!(median > 0)) return false;
  for (int d = lane; d < p.D; d += 32) /* the nearest power of two, by its logarithm */
    weight[d] = weight[d] > 4 * median
                    ? fminf(__int_as_float(__float_as_int(weight[d] / median * 1.4142135f) & 0x7f800000), 0x1p20f)
                    : 1.0f;
  return true;
}
/* What a launch may learn from: pages that it completes, in an order of their own; with `tokens` only those that hold P. */
struct lesson {
  const int32_t *pages, *tokens;
  int64_t n;
};
/* 1 / weights of a head, and whether some weight is above 1. Where the head has none yet every warp of the launch finds the same ones, from the
 * first page that tells, and all of them store them; a warp that sees some of them there already finds them for itself. So neither the number of
 * tokens in a call nor the order of blocks matters, unless the first pages tell nothing. */
template <typename F>
__device__ bool open_weights(const emxi_cuda_pool &p, int head, int lane, F lessons, float *inverse) {
  float *weights = p.sketch.weights + (int64_t)head * p.sketch.dp;
  bool open = false, weighted = false;
#pragma unroll
  for (int d = lane; d < MAX_D; d += 32) {
    inverse[d] = d < p.D ? __ldcg(weights + d) : 1.0f;
    open |= inverse[d] == 0;
  }
  if (__any_sync(EMXI_FULL, open)) {
    const lesson from = lessons();
    bool learned = false;
    for (int64_t i = 0; i < from.n && i < LESSONS && !learned; i++) {
      const int32_t page = from.pages[i];
      if ((uint32_t)page >= (uint32_t)p.max_pages || (from.tokens && from.tokens[i] != p.P)) continue;
      learned = learn_weights(p, page, head, lane, inverse);
    }
    for (int d = lane; d < p.D; d += 32)
      if (learned)
        __stcg(weights + d, inverse[d]);
      else
        inverse[d] = 1;
  }
#pragma unroll
  for (int d = lane; d < MAX_D; d += 32) {
    weighted |= inverse[d] > 1;
    inverse[d] = 1 / inverse[d];
  }
  return __any_sync(EMXI_FULL, weighted);
}

/* ---- sketches */

/* A warp, 16 keys of (page, head): read six times, once from memory. Lane l has dimensions l + 32 e. */
template <typename F>
__device__ void sketch_group(const emxi_cuda_pool &p, int64_t page, int head, int index, int lane, F lessons) {
  constexpr int E = LANE_DIMS, TRIES = 6;
  const int es = p.dtype == EMX_F32 ? 4 : 2, D = p.D, dp = p.sketch.dp;
  const char *keys = p.k + (page * p.k_page + head * p.k_head + (int64_t)index * GROUP * p.k_token) * es;
  const int64_t at = (page * p.G + head) * (p.P / GROUP) + index;
  __shared__ float weights[8][MAX_D];
  float mean[E], *inverse = weights[threadIdx.x / 32];
  const bool weighted = open_weights(p, head, lane, lessons, inverse);
  bool odd = false;
  float size = 0;
#pragma unroll
  for (int e = 0; e < E; e++) mean[e] = 0;
  for (int t = 0; t < GROUP; t++) {
    float square = 0;
#pragma unroll
    for (int e = 0; e < E; e++) {
      if (lane + 32 * e >= D) continue;
      const float x = load_any(keys, p.dtype, t * p.k_token + lane + 32 * e);
      odd |= !(fabsf(x) <= LARGEST_KEY);
      mean[e] += x * inverse[lane + 32 * e] / GROUP;
      square = fmaf(x, x, square);
    }
    size = fmaxf(size, warp_sum(square));
  }
  emxi_cuda_group out = {};
  if (__any_sync(EMXI_FULL, odd)) {
    if (lane == 0) p.sketch.group[at] = out;
    return;
  }
  out.size = fmaxf(root_up(size, D), 1e-30f);
  float largest = 0, centre[E], square = 0;
#pragma unroll
  for (int e = 0; e < E; e++) largest = fmaxf(largest, fabsf(mean[e]));
  out.step_c = warp_max(largest) / 127;
#pragma unroll
  for (int e = 0; e < E; e++) {
    const int d = lane + 32 * e;
    const int code = out.step_c > 0 ? max(-127, min(127, __float2int_rn(mean[e] / out.step_c))) : 0;
    centre[e] = out.step_c * (float)code;
    square = fmaf(centre[e], centre[e], square);
    if (d < dp) p.sketch.centre[at * dp + d] = (int8_t)(d < D ? code : 0);
  }
  out.norm_c = root_up(warp_sum(square), D);
  float top = 0, top_far = 0, total = 0;
  for (int t = 0; t < GROUP; t++) {
    float here = 0, there = 0;
#pragma unroll
    for (int e = 0; e < E; e++) {
      if (lane + 32 * e >= D) continue;
      const float x = load_any(keys, p.dtype, t * p.k_token + lane + 32 * e) * inverse[lane + 32 * e] - centre[e];
      if (inverse[lane + 32 * e] < 1)
        there = fmaf(x, x, there);
      else
        here = fmaf(x, x, here);
    }
    here = warp_sum(here);
    if (weighted) there = warp_sum(there);
    top = fmaxf(top, here);
    top_far = fmaxf(top_far, there);
    total += here + there;
  }
  /* differences were rounded, and centres when they became floats */
  out.radius = __fadd_ru(root_up(top, D), __fmul_ru(0x1p-22f, out.norm_c));
  out.radius_far = __fadd_ru(root_up(top_far, D), __fmul_ru(0x1p-22f, out.norm_c));

  /* The best of some steps: what the codes leave counts by what a query has there if its elements are alike. */
  float emphasis = 1;
  if (weighted) {
    float squares = 0, n = 0;
#pragma unroll
    for (int e = 0; e < E; e++)
      if (inverse[lane + 32 * e] < 1) squares += 1 / (inverse[lane + 32 * e] * inverse[lane + 32 * e]), n += 1;
    emphasis = warp_sum(squares) / fmaxf((float)D - warp_sum(n), 1.0f);
  }
  const float spread = sqrtf(total / (float)(GROUP * D));
  float worst[TRIES];
#pragma unroll
  for (int i = 0; i < TRIES; i++) worst[i] = 0;
  /* with weights a channel may spread further than the others after all */
  const float first_step = weighted ? 3 : 6, grain = spread * (weighted ? 0.1f : 0.05f);
  const auto step_of = [&](int i) { return (first_step + (float)i) * grain; };
  const auto code_of = [&](float x, float step) { return step > 0 ? fminf(fmaxf(rintf(x / step + 7.5f), 0.0f), 15.0f) : 0.0f; };
  for (int t = 0; t < GROUP; t++) {
    float error[TRIES];
#pragma unroll
    for (int i = 0; i < TRIES; i++) error[i] = 0;
#pragma unroll
    for (int e = 0; e < E; e++) {
      if (lane + 32 * e >= D) continue;
      const float x = load_any(keys, p.dtype, t * p.k_token + lane + 32 * e) * inverse[lane + 32 * e] - centre[e],
                  weigh = inverse[lane + 32 * e] < 1 ? emphasis : 1.0f;
#pragma unroll
      for (int i = 0; i < TRIES; i++) {
        const float step = step_of(i), left = x - (code_of(x, step) - 7.5f) * step;
        error[i] = fmaf(left * weigh, left, error[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < TRIES; i++) worst[i] = fmaxf(worst[i], warp_sum(error[i]));
  }
  int best = 0;
#pragma unroll
  for (int i = 1; i < TRIES; i++)
    if (worst[i] < worst[best]) best = i;
  out.step = step_of(best);
  top = top_far = 0;
  for (int t = 0; t < GROUP; t++) {
    float here = 0, there = 0;
#pragma unroll
    for (int e = 0; e < E; e++) {
      const int d = lane + 32 * e;
      if (32 * e >= dp) continue;
      const float x = d < D ? load_any(keys, p.dtype, t * p.k_token + d) * inverse[d] - centre[e] : 0.0f;
      const int code = (int)code_of(x, out.step), above = __shfl_down_sync(EMXI_FULL, code, 4);
      const float left = d < D ? x - ((float)code - 7.5f) * out.step : 0.0f;
      if (inverse[d] < 1)
        there = fmaf(left, left, there);
      else
        here = fmaf(left, left, here);
      if (lane % 8 < 4)
        p.sketch.codes[at * (GROUP / 2) * dp + e / 2 * 512 + (t % 8 * 4 + lane / 8) * 16 + (e % 2 * 2 + t / 8) * 4 + lane % 8] =
            (uint8_t)(code | above << 4);
    }
    top = fmaxf(top, warp_sum(here));
    if (weighted) top_far = fmaxf(top_far, warp_sum(there));
  }
  const float lost = __fmul_ru(0x1p-21f, out.norm_c + out.radius + out.radius_far + 8 * sqrtf((float)D) * out.step);
  out.error = __fadd_ru(root_up(top, D), lost);
  out.error_far = __fadd_ru(root_up(top_far, D), lost);
  if (weighted) out.norm_c = -out.norm_c;
  if (!(out.size < 1e18f) || !(out.radius + out.radius_far < 1e18f) || !(out.error + out.error_far < 1e18f)) out = {};
  if (lane == 0) p.sketch.group[at] = out;
}
template <typename F>
__device__ void sketch_page(const emxi_cuda_pool &p, int64_t page, bool complete, F lessons) {
  const int per = p.P / GROUP;
  for (int i = threadIdx.x / 32; i < p.G * per; i += blockDim.x / 32)
    if (complete)
      sketch_group(p, page, i / per, i % per, threadIdx.x % 32, lessons);
    else if (threadIdx.x % 32 == 0)
      p.sketch.group[page * p.G * per + i] = {};
}

/* Entry b of an append: its table, length before, and tokens; NULL: nothing is appended. */
__device__ const int32_t *appended(const emxi_cuda_append &a, int b, int64_t *length, int64_t *n) {
  const int32_t *table = batch_entry(a.batch, b, length);
  if (!table) return nullptr;
  *n = a.n ? a.n[b] : a.t;
  if (*n <= 0 || *n > a.t || (a.batch.lengths && *length + *n > a.batch.limit)) return nullptr; /* append_tokens has said so */
  return table;
}
/* Grid: (pages that an entry's tokens may touch, entries). */
__global__ void __launch_bounds__(256, 3) append_sketches(const __grid_constant__ emxi_cuda_append a) {
  const emxi_cuda_pool &p = a.pool;
  const int b = blockIdx.y;
  int64_t length, n;
  const int32_t *table = appended(a, b, &length, &n);
  if (!table) return;
  const int64_t i = (length >> p.shift) + blockIdx.x;
  if (i << p.shift >= length + n) return;
  const int64_t page = table_page(a.batch, p, table, b, i);
  if (page != table[i]) return;
  sketch_page(p, page, (i + 1) << p.shift <= length + n,
              [&]() -> lesson { /* pages of the first entry that completes one */
                                for (int other = 0; other < a.batch.n; other++) {
                                  int64_t before, more;
                                  const int32_t *pages = appended(a, other, &before, &more);
                                  if (!pages) continue;
                                  const int64_t first = before >> p.shift, complete = ((before + more) >> p.shift) - first;
                                  if (complete > 0) return {pages + first, nullptr, complete};
                                }
                                return {};
              });
}
__global__ void __launch_bounds__(256, 3) listed_sketches(const __grid_constant__ emxi_cuda_listed l) {
  const int32_t page = l.pages[blockIdx.x], tokens = l.tokens ? l.tokens[blockIdx.x] : l.pool.P;
  if ((uint32_t)page >= (uint32_t)l.pool.max_pages || tokens < 0 || tokens > l.pool.P) return; /* listed_summaries says so */
  sketch_page(l.pool, page, tokens == l.pool.P, [&]() -> lesson { return {l.pages, l.tokens, l.n}; });
}

/* ---- judge */

/* No score of a key of this group is larger, as docs/numerics.md derives; *mid: estimate by the centre. dot: 254 a + b with the centre. */
__device__ __forceinline__ float group_bound(const cert_query &q, float4 head, float size, int dot, int64_t first, float *mid) {
  const float step = head.x, c = fabsf(head.y);
  *mid = q.s2 * step * (float)dot;
  float loose = __fmaf_ru(q.norm, head.z, __fmaf_ru(q.e2, c, __fmaf_ru(q.slack_k, size, q.slack_0)));
  if (q.far > 0) loose = __fmaf_ru(q.far, head.w, loose);
  loose = __fmaf_ru(0x1p-21f, fabsf(*mid), loose);
  if (q.slope == 0) return __fadd_ru(*mid, loose);
  const double near = (double)(first + GROUP < q.visible ? first + GROUP : q.visible) - (double)q.visible,
               far = (double)first - (double)(q.visible - 1), bias = fmax(q.slope * near, q.slope * far),
               up = (double)*mid + bias + (double)loose + 0x1p-22 * fabs(q.slope * far) + 1e-12 * fabs(bias);
  *mid = (float)((double)*mid + bias);
  return round_up(up);
}

/* A warp has sixteen groups in a tensor product. Of four rows a lane has the sums of one with two groups of a product; of one row alone those
 * of two groups in one of four products. */
template <int DP, int R>
__global__ void __launch_bounds__(CERT_THREADS, 2) judge(const __grid_constant__ emxi_cuda_decode a) {
  constexpr int WORDS = DP / 64, TILES = R == 1 ? 256 / DP : (DP == 256 ? 1 : 2), MINE = R == 1 ? 1 : TILES, AT_ONCE = 16 * TILES,
                LOOK = AT_ONCE > 32 ? AT_ONCE / 32 : 1;
  __shared__ cert_query query[R];
  __shared__ cert_words words[R];
  __shared__ unsigned long long best[R][2];
  __shared__ int shared_size;
  wait_for_previous();
  const emxi_cuda_sketch &sketch = a.pool.sketch;
  const int split = blockIdx.x % a.splits, item = blockIdx.x / a.splits, lane = threadIdx.x % 32, key = lane / 4, t = lane % 4;
  const cert_item it = open_item<R>(a, item);
  raw_query<DP / 32> raw;
  load_query(a, it, &raw);
  if (threadIdx.x < 2 * R) best[threadIdx.x / 2][threadIdx.x % 2] = 0;
  if (threadIdx.x == 0) {
    shared_size = 0;
    if (split == 0) a.cert_flat[item] = 0;
  }
  const int64_t chunks = (it.length + CHUNK - 1) / CHUNK, per = ((uint32_t)chunks + a.splits - 1) / (uint32_t)a.splits,
                from = split * per * (CHUNK / GROUP), end = from + per * (CHUNK / GROUP), to = end < it.groups ? end : it.groups;
  /* A turn's centres and records are asked for as soon as those of the turn before have been multiplied, the first ones before anything else;
   * page numbers, a lane each, a turn before that. Loads are on every path: what is not there is read from page 0 and not used. */
  const int shift = a.pool.shift - 4; /* groups of a page */
  int32_t page[LOOK];
  uint4 x[2 * TILES][WORDS];
  float4 next_head[2 * MINE];
  float next_norm[2 * MINE];
  const auto look_up = [&](int64_t base) {
#pragma unroll
    for (int i = 0; i < LOOK; i++) page[i] = base + 32 * i + lane < to ? __ldg(it.table + ((base + 32 * i + lane) >> shift)) : 0;
  };
  const auto load = [&](int64_t base) {
    int32_t here[LOOK], place[2 * TILES];
#pragma unroll
    for (int i = 0; i < LOOK; i++) {
      const int64_t group = base + 32 * i + lane;
      here[i] = ((checked_page(a.batch, a.pool, it.b, group >> shift, page[i]) * a.pool.G + it.g) << shift) +
                ((int32_t)group & ((1 << shift) - 1));
    }
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) place[i] = __shfl_sync(EMXI_FULL, here[i / 4], 8 * i % 32 + key);
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++)
#pragma unroll
      for (int w = 0; w < WORDS; w++) x[i][w] = __ldg((const uint4 *)(sketch.centre + (int64_t)place[i] * sketch.dp) + 4 * w + t);
#pragma unroll
    for (int i = 0; i < 2 * MINE; i++) {
      int32_t at = place[i];
      if constexpr (R == 1)
#pragma unroll
        for (int tile = 1; tile < TILES; tile++)
          if (tile == t) at = place[2 * tile + i];
      next_head[i] = __ldg((const float4 *)(sketch.group + at));
      next_norm[i] = __ldg(&sketch.group[at].size);
    }
  };
  constexpr int STRIDE = CERT_WARPS * AT_ONCE;
  int64_t base = from + threadIdx.x / 32 * AT_ONCE;
  look_up(base);
  load(base);
  look_up(base + STRIDE);
  open_queries(a, it, raw, query, words);
  if (split == 0 && (int)threadIdx.x < it.rows) a.cert_query[query[threadIdx.x].row] = query[threadIdx.x];
  constexpr int SIZE = sizeof(cert_words) / 4;
  for (int i = threadIdx.x; split == 0 && i < it.rows * SIZE; i += CERT_THREADS)
    ((int32_t *)&a.cert_words[query[i / SIZE].row])[i % SIZE] = ((const int32_t *)&words[i / SIZE])[i % SIZE];
  int32_t column[WORDS][4]; /* dimensions as this lane's sixteen bytes of a centre lie */
#pragma unroll
  for (int i = 0; i < WORDS; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) column[i][j] = column_word<R>(words, it.rows, 16 * i + 4 * t + j);
  const int r = R == 1 ? 0 : t; /* the row of this lane */
  const bool mine = r < it.rows;
  const cert_query &q = query[mine ? r : 0];
  float best_mid = -emxi_inf(), best_up = -emxi_inf(), size = 0;
  uint32_t at_mid = 0, at_up = 0;
  for (; base < to; base += STRIDE) {
    int dot[2 * MINE];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      int c[4] = {0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        const uint4 &p = x[2 * tile][w], &s = x[2 * tile + 1][w];
        dot_tile(c, p.x, s.x, p.y, s.y, column[w][0], column[w][1]);
        dot_tile(c, p.z, s.z, p.w, s.w, column[w][2], column[w][3]);
      }
      if (R > 1 || tile == t || tile == 0) { /* of one row: this lane's product last */
        dot[R == 1 ? 0 : 2 * tile] = 254 * c[0] + c[1];
        dot[R == 1 ? 1 : 2 * tile + 1] = 254 * c[2] + c[3];
      }
    }
    float4 head[2 * MINE];
    float norm[2 * MINE];
#pragma unroll
    for (int i = 0; i < 2 * MINE; i++) head[i] = next_head[i], norm[i] = next_norm[i];
    load(base + STRIDE);
    look_up(base + 2 * STRIDE);
#pragma unroll
    for (int i = 0; i < 2 * MINE; i++) {
      const int64_t group = base + (R == 1 ? 16 * t : 0) + 8 * i + key, first = group * GROUP;
      if (!mine || (R == 1 && t >= TILES) || group >= to) continue;
      float up;
      if (first >= q.visible) {
        up = -emxi_inf();
      } else if (!(norm[i] > 0) || (head[i].y < 0) != (q.far > 0) || !((q.norm + q.far) * norm[i] < 1e37f)) {
        up = emxi_inf();
      } else {
        float value;
        up = group_bound(q, head[i], norm[i], dot[i], first, &value);
        if (!(up < emxi_inf())) up = emxi_inf();
        size = fmaxf(size, norm[i]);
        if (first + GROUP <= q.visible) {
          if (value > best_mid) best_mid = value, at_mid = (uint32_t)group;
          if (up > best_up) best_up = up, at_up = (uint32_t)group;
        }
      }
      a.cert_upper[q.row * a.cert_groups + group] = up;
    }
  }
  const auto best_of = [&](float value, uint32_t group) {
    unsigned long long x =
        value > -emxi_inf() ? (unsigned long long)((uint32_t)to_ordered(value) ^ 0x80000000u) << 32 | group : 0;
#pragma unroll
    for (int step = 16; step >= (R == 1 ? 1 : 4); step >>= 1) {
      const unsigned long long other = __shfl_xor_sync(EMXI_FULL, x, step);
      if (other > x) x = other;
    }
    return x;
  };
  const unsigned long long mid = best_of(best_mid, at_mid), up = best_of(best_up, at_up);
  size = warp_max(size);
  if (mine && lane < R) {
    atomicMax(&best[r][0], mid);
    atomicMax(&best[r][1], up);
    if (lane == 0) atomicMax(&shared_size, __float_as_int(size)); /* not negative: the order of the integers */
  }
  __syncthreads();
  if ((int)threadIdx.x < 2 * it.rows)
    a.cert_best[(query[threadIdx.x / 2].row * a.splits + split) * 2 + threadIdx.x % 2] = best[threadIdx.x / 2][threadIdx.x % 2];
  if (threadIdx.x == 0) a.cert_size[item * (int64_t)a.splits + split] = __int_as_float(shared_size);
}

/* ---- account */

/* Of rows that have no share. */
__global__ void account(const __grid_constant__ emxi_cuda_decode a) {
  wait_for_previous();
  const int64_t row = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (row >= (int64_t)a.batch.n * a.H * a.S) return;
  account_row(a, row);
}

template <int DP>
void launch_judge(const emxi_cuda_decode &d, cudaStream_t stream) {
  const unsigned grid = (unsigned)(d.batch.n * d.pool.G * d.blocks * d.splits);
  if (d.rows == 1)
    launch(judge<DP, 1>, grid, CERT_THREADS, 0, stream, d.overlap, d);
  else
    launch(judge<DP, 4>, grid, CERT_THREADS, 0, stream, d.overlap, d);
}

} // namespace

extern "C" void emxi_cuda_launch_sketches(const emxi_cuda_append *a, void *stream) {
  const int64_t pages = ((int64_t)a->t + a->pool.P - 2) / a->pool.P + 1;
  append_sketches<<<dim3((unsigned)pages, (unsigned)a->batch.n), 256, 0, (cudaStream_t)stream>>>(*a);
}
extern "C" void emxi_cuda_launch_listed_sketches(const emxi_cuda_listed *l, void *stream) {
  listed_sketches<<<(unsigned)l->n, 256, 0, (cudaStream_t)stream>>>(*l);
}
extern "C" void emxi_cuda_judge(const emxi_cuda_decode *d, void *stream) {
  const int dp = d->pool.sketch.dp;
  if (dp == 64)
    launch_judge<64>(*d, (cudaStream_t)stream);
  else if (dp == 128)
    launch_judge<128>(*d, (cudaStream_t)stream);
  else
    launch_judge<256>(*d, (cudaStream_t)stream);
}
extern "C" void emxi_cuda_account(const emxi_cuda_decode *d, void *stream) {
  const int64_t rows = (int64_t)d->batch.n * d->H * d->S;
  launch(account, (unsigned)((rows + 127) / 128), 128, 0, (cudaStream_t)stream, d->overlap, *d);
}
