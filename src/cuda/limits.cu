/* SPDX-License-Identifier: Apache-2.0
 * CERTIFIED with max_bytes or max_delta: which keys are read is decided by their bounds, in rounds, and never by what was ready first.
 *
 *   weigh  block as in judge (certified.cu). Keys of the groups above the row's first limit, whose bounds from the 4-bit codes are above it,
 *          too: bounds and positions, in the order of the positions. With heads of one alpha = 1 the limit is as far down as max_delta says.
 *   cut    block = row, before every round. The scores that have been read raise the limit; what is not read yet is counted by its bounds:
 *          is it little enough to stop, and if not, how far down shall the next round read?
 *   fetch  block = (row, part of the sequence). Keys with bounds between the last cut and this one, exactly, into the segments that ALL's scan
 *          would have filled: solve and share of solve.cuh then do the rest.
 *   blend  block = (row, part): alpha = 1. Weighted values of the keys that were read, into the parts that merge joins.
 *
 * A row with so many keys above the limit that ALL is as fast, and one whose delta stays too large, makes its item flat: ALL's scan takes it.
 * docs/numerics.md has the bounds of what is left out. Bytes: as the sieve's, and 5 for each key above the first limit. */
#include "sketch.cuh"

namespace {

constexpr int CUT_THREADS = SOLVE_THREADS, CUT_WARPS = SOLVE_WARPS, CUT_BINS = 1024, CUT_LISTED = 256, LAST_ROUND = 4;

__device__ __forceinline__ int item_of(const emxi_cuda_decode &a, const row_place &p) {
  const int index = p.s * a.group + p.h % a.group;
  return (p.b * a.pool.G + p.g) * a.blocks + index / a.rows;
}
__device__ __forceinline__ int64_t line_of(const emxi_cuda_decode &a) {
  return ((int64_t)a.pool.D * (a.pool.dtype == EMX_F32 ? 4 : 2) + 63) / 64 * 64;
}

/* ---- weigh */

template <int DP, int R>
__global__ void __launch_bounds__(CERT_THREADS, 2) weigh(const __grid_constant__ emxi_cuda_decode a) {
  constexpr int CHUNK_GROUPS = CHUNK / GROUP, WORDS = DP / 64;
  constexpr uint32_t LOW = 0x0f0f0f0fu;
  __shared__ cert_query query[R];
  __shared__ cert_words words[R];
  wait_for_previous();
  const emxi_cuda_pool &pool = a.pool;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, key = lane / 4, t = lane % 4;
  const int split = blockIdx.x % a.splits, item = blockIdx.x / a.splits;
  if (a.cert_flat[item]) return;
  const cert_item it = open_item<R>(a, item);
  fetch_queries<R>(a, it, query, words);
  const int64_t chunks = (it.length + CHUNK - 1) / CHUNK, per = (chunks + a.splits - 1) / a.splits, from = split * per,
                to = from + per < chunks ? from + per : chunks;
  int32_t column[WORDS][4];
#pragma unroll
  for (int i = 0; i < WORDS; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) column[i][j] = column_word<R>(words, it.rows, 16 * i + 8 * (j / 2) + 2 * t + j % 2);
  const int row = R == 1 ? 0 : t; /* of this lane's products */
  const bool mine = row < it.rows && (R > 1 || t == 0);
  const cert_query q = query[mine ? row : 0];
  const float limit = mine ? from_ordered(a.cert[q.row].limit) : emxi_inf();
  /* lane: row lane / 8 and group lane % 8 of the chunk */
  const int group_row = lane / CHUNK_GROUPS;
  const float group_limit =
      group_row < it.rows ? from_ordered(a.cert[query[group_row < R ? group_row : 0].row].limit) : emxi_inf();
  uint32_t codes = 0;
  for (int64_t c = from + warp; c < to; c += CERT_WARPS) {
    const int64_t group = c * CHUNK_GROUPS + lane % CHUNK_GROUPS;
    const bool there = group < it.groups;
    const float upper = there && group_row < it.rows
                            ? a.cert_upper[query[group_row < R ? group_row : 0].row * a.cert_groups + group]
                            : -emxi_inf();
    const int32_t at = there ? (int32_t)group_at(a, it, group) : 0;
    uint32_t alive = __ballot_sync(EMXI_FULL, upper > group_limit || upper != upper);
    alive = (alive | alive >> 8 | alive >> 16 | alive >> 24) & 0xff;
    codes += __popc(alive);
    const int left =
        q.visible - c * CHUNK < CHUNK ? (int)(q.visible - c * CHUNK) : CHUNK; /* of the keys that this lane's row sees */
    const int64_t segment = (q.row * a.chunks + c) * CHUNK;
    int n = 0; /* of this lane's row */
    for (; alive; alive &= alive - 1) {
      const int g = __ffs(alive) - 1;
      const int32_t place = __shfl_sync(EMXI_FULL, at, g);
      const float u = __shfl_sync(EMXI_FULL, upper, row * CHUNK_GROUPS + g);
      int sum[4] = {0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        const uint4 p = __ldg((const uint4 *)(pool.sketch.codes + (int64_t)place * (GROUP / 2) * DP) + w * 32 + lane);
        dot_tile(sum, p.x & LOW, p.y & LOW, p.x >> 4 & LOW, p.y >> 4 & LOW, column[w][0], column[w][1]);
        dot_tile(sum, p.z & LOW, p.w & LOW, p.z >> 4 & LOW, p.w >> 4 & LOW, column[w][2], column[w][3]);
      }
      const float2 radius = __ldg((const float2 *)&pool.sketch.group[place].radius); /* the bound of a key: as in the sieve */
      const float4 tail = __ldg((const float4 *)&pool.sketch.group[place].size);
      float base = u, scale = 0;
      if (u < emxi_inf() && tail.x > 0) {
        scale = 0.5f * q.s2 * tail.y;
        base = key_base(q, u, radius, make_float2(tail.z, tail.w), scale);
      } else if (u > -emxi_inf()) {
        base = emxi_inf(); /* nothing is known */
      }
      float bound[2];
      uint32_t pass[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        bound[i] = fmaf(scale, (float)(508 * sum[2 * i] + 2 * sum[2 * i + 1] - 15 * q.sum), base);
        if (bound[i] != bound[i]) bound[i] = emxi_inf();
        const bool above = mine && g * GROUP + 8 * i + key < left && bound[i] > limit;
        pass[i] = __ballot_sync(EMXI_FULL, above) & 0x11111111u << t;
        if (above) {
          const int64_t to_place = segment + n + __popc(pass[i] & ((1u << lane) - 1));
          a.cert_bound[to_place] = bound[i];
          a.cert_local[to_place] = (uint8_t)(g * GROUP + 8 * i + key);
        }
        n += __popc(pass[i]);
      }
    }
    if (mine && key == 0) {
      a.cert_count[q.row * a.chunks + c] = (uint8_t)n;
      a.count[q.row * a.chunks + c] = 0;
      a.chunk_max[q.row * a.chunks + c] = -emxi_inf();
    }
  }
  if (lane == 0 && codes)
    for (int r = 0; r < it.rows; r++) atomicAdd(&a.cert[query[r].row].codes, codes);
  if ((int)threadIdx.x < it.rows) {
    a.split_max[query[threadIdx.x].row * a.splits + split] = -emxi_inf();
    a.bad[query[threadIdx.x].row * a.splits + split] = 0;
  }
}

/* ---- cut */

/* f(x) for all numbers of a row's segments, by the whole warp; -inf: this lane has none. */
template <typename F>
__device__ __forceinline__ void each_number(const float *x, const uint8_t *count, int64_t chunks, F f) {
  const int lane = threadIdx.x % 32;
  for (int64_t first = threadIdx.x / 32 * 32; first < chunks; first += CUT_THREADS) {
    const int mine = first + lane < chunks ? count[first + lane] : 0;
    for (uint32_t alive = __ballot_sync(EMXI_FULL, mine > 0); alive; alive &= alive - 1) {
      const int i = __ffs(alive) - 1, n = __shfl_sync(EMXI_FULL, mine, i);
      const float *segment = x + (first + i) * CHUNK;
      for (int j = 0; j < n; j += 32) f(j + lane < n ? segment[j + lane] : -emxi_inf());
    }
  }
}

struct cut_space {
  int bins[CUT_BINS];
  float list[CUT_WARPS][CUT_LISTED]; /* scores above the limit */
  int listed[CUT_WARPS];
  double sums[3][SOLVE_WARPS];
  float tops[CUT_WARPS];
  int chosen, above;
};

/* Block = row. What is known of it: scores that were read, bounds of keys that were not. */
struct cut_row {
  cut_space &space;
  const emxi_cuda_decode &a;
  const row_place &place;
  const emxi_cuda_limit &state;
  threshold k; /* units of scores for alpha = 1; the weights' power */
  double unit, slack;
  int64_t row, chunks;
  float low;                       /* at or below it nothing has weight; alpha = 1: see numerics.md */
  float m;                         /* largest score that was read */
  float far;                       /* largest bound that is finite, of what is not read */
  int n_listed, n_open, n_unknown; /* scores above the limit; unread keys above it with a bound, and without */
  double width;                    /* of a bin; bin 0 begins at the limit */
  bool short_list;                 /* all scores above the limit are in list[] */

  template <typename F>
  __device__ __forceinline__ void each_score(F f) const {
    if (short_list) {
      const int warp = threadIdx.x / 32;
      for (int i = threadIdx.x % 32; i < space.listed[warp]; i += 32) f(space.list[warp][i]);
    } else {
      const float above = low;
      each_number(a.z + row * a.chunks * CHUNK, a.count + row * a.chunks, chunks, [&](float x) {
        if (x > above) f(x);
      });
    }
  }
  template <typename F>
  __device__ __forceinline__ void each_unread(F f) const {
    const float above = low, read = state.cut; /* what lies above it was read in earlier rounds */
    each_number(a.cert_bound + row * a.chunks * CHUNK, a.cert_count + row * a.chunks, chunks, [&](float x) {
      if (x > above && !(x > read)) f(x);
    });
  }
  __device__ __forceinline__ float largest(float x) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) space.tops[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_max(space.tops[threadIdx.x % CUT_WARPS]);
  }
  __device__ __forceinline__ void list_scores() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int n = 0;
    float top = -emxi_inf();
    each_number(a.z + row * a.chunks * CHUNK, a.count + row * a.chunks, chunks, [&](float x) {
      const uint32_t mask = __ballot_sync(EMXI_FULL, x > low);
      const int at = n + __popc(mask & ((1u << lane) - 1));
      if (x > low && at < CUT_LISTED) space.list[warp][at] = x;
      n += __popc(mask);
      top = fmaxf(top, x);
    });
    if (lane == 0) space.listed[warp] = n;
    short_list = !__syncthreads_or(n > CUT_LISTED);
    m = largest(top);
    double sum[3] = {lane ? 0.0 : (double)n, 0, 0};
    block_sums(sum, space.sums);
    n_listed = (int)sum[0];
  }
  /* The threshold of the scores, from the left, by Newton's steps on the norm of the weights (convex for alpha <= 2). */
  __device__ __forceinline__ void raise() {
    if (!n_listed) return;
    double t = fmax(unit * ((double)low - (double)m), -1.0);
    for (int step = 0; step < 40; step++) {
      double s[3] = {0, 0, 0};
      each_score([&](float x) {
        const double y = unit * ((double)x - (double)m) - t;
        if (!(y > 0)) return;
        const double p = power_of(y, k.b, k.power);
        s[0] += p / y;
        s[1] += p;
      });
      block_sums(s, space.sums);
      if (!(s[1] > 1 && s[0] > 0)) break;
      const double go = (s[1] - (k.alpha == 2.0 ? 1.0 : slow_power(s[1], 1.0 - unit))) / s[0] * (1 - 1e-9);
      t += go;
      if (go < 1e-9) break;
    }
    const double to = (double)m + t / unit, down = to - slack - 1e-7 * (1 + fabs(to) + fabs((double)m));
    const float raised = __double2float_rd(down);
    if (!(raised > low)) return;
    low = raised;
    list_scores();
  }
  __device__ __forceinline__ void count_unread() {
    float top = -emxi_inf();
    double n[3] = {0, 0, 0};
    each_unread([&](float x) {
      if (x < emxi_inf())
        top = fmaxf(top, x), n[0] += 1;
      else
        n[1] += 1;
    });
    far = largest(top);
    block_sums(n, space.sums);
    n_open = (int)n[0], n_unknown = (int)n[1];
    width = n_open ? ((double)far - (double)low) / CUT_BINS : 0;
    fill(low, width, (double)emxi_inf());
  }
  /* Counts bounds of (from, to]; the last bin has all that are beyond its edge. */
  __device__ __forceinline__ void fill(double from, double step, double to) {
    __syncthreads();
    for (int i = threadIdx.x; i < CUT_BINS; i += CUT_THREADS) space.bins[i] = 0;
    __syncthreads();
    if (step > 0)
      each_unread([&](float x) {
        const double at = ((double)x - from) / step;
        if (at > 0 && (double)x <= to && x < emxi_inf()) atomicAdd(&space.bins[at < CUT_BINS ? (int)at : CUT_BINS - 1], 1);
      });
    __syncthreads();
  }
  __device__ __forceinline__ double edge(int bin) const { /* upper edge, and what its arithmetic may lose */
    return (double)low + width * (double)(bin + 1) + 1e-12 * (1.0 + fabs((double)low) + fabs((double)far));
  }
  /* Weights at threshold t: sums over what was read and over what was not, each at its bin's upper edge, and the slope of both. */
  __device__ __forceinline__ void masses(double t, double (&s)[3]) const {
    s[0] = s[1] = s[2] = 0;
    each_score([&](float x) {
      const double y = unit * (double)x - t;
      if (!(y > 0)) return;
      const double p = power_of(y, k.b, k.power);
      s[0] += p, s[2] += p / y;
    });
    for (int i = threadIdx.x; i < CUT_BINS; i += CUT_THREADS) {
      const double y = unit * edge(i) - t;
      if (!space.bins[i] || !(y > 0)) continue;
      const double p = power_of(y, k.b, k.power) * space.bins[i];
      s[1] += p, s[2] += p / y;
    }
    block_sums(s, const_cast<cut_space &>(space).sums);
  }
  /* Sound bound of the mass that the unread keys have: T6 of docs/math.md in its root form; alpha = 1: their share. */
  __device__ __forceinline__ double dropped() const {
    if (n_unknown || !n_listed) return 1;
    double s[3];
    if (k.alpha == 1.0) {
      const double ref = fmax((double)m, n_open ? (double)far : (double)m);
      s[0] = s[1] = s[2] = 0;
      each_score([&](float x) { s[0] += exp((double)x - ref); });
      for (int i = threadIdx.x; i < CUT_BINS; i += CUT_THREADS)
        if (space.bins[i]) s[1] += space.bins[i] * exp(edge(i) - ref);
      block_sums(s, const_cast<cut_space &>(space).sums);
      const double below = (double)(place.visible - state.listed) * exp((double)state.first - ref),
                   read = s[0] * exp(-slack) * (1 - 1e-12);
      const double unread = (s[1] + below) * (1 + 1e-12);
      if (!n_open && state.listed >= place.visible) return 0;
      if (!(read > 0)) return 1;
      return fmax(unread / (unread + read) * (1 + 1e-12), 1e-300); /* never 0 while anything is unread */
    }
    double t = unit * (double)low, go = 0;
    for (int step = 0; step < 40; step++) {
      masses(t, s);
      const double all = s[0] + s[1];
      if (!(all > 1 && s[2] > 0)) break;
      go = (all - (k.alpha == 2.0 ? 1.0 : slow_power(all, 1.0 - unit))) / s[2];
      t += go;
      if (go < 1e-9) break;
    }
    double room = 1e-8 * (1 + fabs(t));
    for (int i = 0;; i++, room *= 4) { /* on the right of the root: more is dropped there */
      masses(t + room, s);
      if (s[0] + s[1] <= 1) break;
      if (i == 12) return 1;
    }
    t += room;
    masses(t + 2 * unit * slack + 1e-12 * (1 + fabs(t)),
           s); /* scores may be lower than computed, and the root by as much again */
    return fmin(fmax(1 - s[0] + 1e-12 + (double)place.count * 0x1p-50, 1e-12), 1.0);
  }
  /* The cut below which what is unread has at most this much weight, however it is spread. alpha = 1: a sum of exp(s - m). */
  __device__ __forceinline__ double cut_by_mass(double allowed) {
    __syncthreads();
    if (threadIdx.x < 32) {
      constexpr int EACH = CUT_BINS / 32;
      const int lane = threadIdx.x;
      const auto weight = [&](int i) {
        if (!space.bins[i]) return 0.0;
        const double y = unit * (edge(i) - (double)low);
        return space.bins[i] * (k.alpha == 1.0 ? exp(edge(i) - (double)m) : power_of(y, k.b, k.power));
      };
      double own = 0;
      for (int i = 0; i < EACH; i++) own += weight(lane * EACH + i);
      double upto = own;
#pragma unroll
      for (int step = 1; step < 32; step <<= 1) {
        const double other = __shfl_up_sync(EMXI_FULL, upto, step);
        if (lane >= step) upto += other;
      }
      double sum = upto - own;
      int bin = 0; /* bins below it may stay unread */
      for (int i = 0; i < EACH; i++) {
        sum += weight(lane * EACH + i);
        if (sum <= allowed) bin = lane * EACH + i + 1;
      }
      bin = __reduce_max_sync(EMXI_FULL, bin);
      if (lane == 0) space.chosen = bin;
    }
    __syncthreads();
    return (double)low + width * space.chosen;
  }
  /* The highest cut with so many keys above it, as nearly as bins of bins tell. */
  __device__ __forceinline__ double cut_by_number(int64_t number) {
    number -= n_unknown;
    if (number <= 0) return (double)far;
    double from = (double)low, step = width;
    for (int level = 0; level < 2; level++) {
      if (level) fill(from, step, from + step * CUT_BINS);
      if (threadIdx.x < 32) {
        constexpr int EACH = CUT_BINS / 32;
        const int lane = threadIdx.x;
        int own = 0;
        for (int i = 0; i < EACH; i++) own += space.bins[lane * EACH + i];
        int after = own; /* of this lane's bins and all above */
#pragma unroll
        for (int shift = 1; shift < 32; shift <<= 1) {
          const int other = __shfl_down_sync(EMXI_FULL, after, shift);
          if (lane + shift < 32) after += other;
        }
        int bin = 0, above = 0, sum = after - own; /* the highest bin with enough from it on; how many are above it */
        for (int i = EACH - 1; i >= 0; i--) {
          const int before = sum;
          sum += space.bins[lane * EACH + i];
          if (sum >= number && !bin) bin = lane * EACH + i + 1, above = before;
        }
        const int best = __reduce_max_sync(EMXI_FULL, bin);
        const uint32_t whose = __ballot_sync(EMXI_FULL, best && bin == best);
        above = __shfl_sync(EMXI_FULL, above, whose ? __ffs(whose) - 1 : 0);
        if (lane == 0) space.chosen = best, space.above = above;
      }
      __syncthreads();
      if (!space.chosen) return from; /* not so many */
      from += step * (space.chosen - 1);
      number -= space.above;
      step /= CUT_BINS;
      __syncthreads();
    }
    return from;
  }
};

__global__ void __launch_bounds__(CUT_THREADS) cut(const __grid_constant__ emxi_cuda_decode a) {
  __shared__ cut_space space;
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const row_place place = place_of(a, row);
  const int item = item_of(a, place), round = a.cert_round;
  if (__syncthreads_or(a.cert_flat[item])) return; /* other rows of the item may say so meanwhile */
  emxi_cuda_limit *limit = &a.cert_limit[row];
  const emxi_cuda_cert *cert = &a.cert[row];
  emxi_cuda_limit state = *limit;
  if (round == 0) {
    state = {};
    state.cut = state.before = emxi_inf();
    state.first = state.low = from_ordered(cert->limit);
    state.stopped = -1;
  } else if (state.stopped >= 0) {
    return;
  }
  const double alpha = alpha_of(a, place.h), unit = alpha > 1 ? alpha - 1 : 1;
  const bool softmax = alpha == 1.0;
  __syncthreads(); /* the state has been read */
  cut_row r = {space, a, place, state, threshold_of(a, softmax ? 2.0 : alpha, 0.0f)};
  r.k.alpha = alpha;
  /* Keys without a sketch have been read in the first round: their scores may be off by more than those that `seed` knew of. */
  const double longest = (sqrt((double)__int_as_float(cert->longest)) + 2e-18) * (1 + 1e-4);
  r.unit = unit, r.slack = fmax((double)cert->slack, round ? cert_slack(a.cert_query[row], longest, (double)place.length) : 0.0);
  r.row = row, r.chunks = (place.visible + CHUNK - 1) / CHUNK;
  r.low = state.low, r.m = -emxi_inf(), r.n_listed = 0, r.short_list = true;
  if (round) r.list_scores();
  if (round && !softmax) r.raise();
  r.count_unread();
  state.low = r.low;
  if (round == 0) {
    state.listed = r.n_open + r.n_unknown;
    if (4 * (int64_t)state.listed > place.visible) { /* ALL is as fast */
      if (threadIdx.x == 0) atomicOr(&a.cert_flat[item], 1);
      return;
    }
  }
  const int64_t line = line_of(a), dp = a.pool.sketch.dp,
                used = (place.visible + GROUP - 1) / GROUP * (dp + 32) + 4 * (int64_t)a.pool.D + (int64_t)cert->codes * 8 * dp +
                       ((int64_t)cert->tokens + r.n_listed) * line;
  const int64_t open = (int64_t)r.n_open + r.n_unknown;
  const bool done = !open && !softmax, over = round && a.max_bytes > 0 && used >= a.max_bytes;
  double delta = 0;
  if (!done && round && (a.max_delta > 0 || over || round == LAST_ROUND)) delta = r.dropped();
  const bool enough = round && a.max_delta > 0 && delta <= a.max_delta, last = round == LAST_ROUND;
  if (done || enough || over || last) {
    if (threadIdx.x) return;
    /* Only the slack can keep delta up where all candidates have been read. */
    if (last && !done && !enough && !over && a.max_bytes == 0) atomicOr(&a.cert_flat[item], 1);
    state.stopped = done ? EMX_STOP_DONE : enough ? EMX_STOP_DELTA : EMX_STOP_BYTES;
    state.delta = delta;
    state.far = r.n_unknown ? emxi_inf() : fmaxf(open ? r.far : -emxi_inf(), r.low);
    state.before = state.cut;
    *limit = state;
    return;
  }
  double to = (double)r.low;
  int64_t most = round == 0 ? 512 : round == 1 ? 4096 : INT64_MAX;
  if (a.max_bytes > 0) {
    const int64_t allowed = (a.max_bytes - used + line - 1) / line, few = round ? 0 : 64; /* some keys, for an answer */
    most = allowed < few ? few : allowed < most ? allowed : most;
  }
  if (a.max_delta > 0 && round && round < LAST_ROUND - 1 && r.n_open) {
    double allowed = a.max_delta * (1 - 1e-3);
    if (softmax) {
      double s[3] = {0, 0, 0};
      r.each_score([&](float x) { s[0] += exp((double)x - (double)r.m); });
      block_sums(s, space.sums);
      allowed *= s[0] * exp(-r.slack);
      allowed -= (double)(place.visible - state.listed) * exp((double)state.first - (double)r.m);
    }
    to = r.cut_by_mass(allowed);
  }
  if (most < open) to = fmax(to, r.cut_by_number(most));
  if (threadIdx.x) return;
  state.before = state.cut;
  state.cut = fminf(__double2float_rd(to), state.cut);
  *limit = state;
}

/* ---- fetch */

constexpr int FETCH_THREADS = 256, FETCH_WARPS = FETCH_THREADS / 32, PER_LANE = MAX_D / 32;

__global__ void __launch_bounds__(FETCH_THREADS) fetch(const __grid_constant__ emxi_cuda_decode a) {
  constexpr int U = 8; /* keys at a time */
  __shared__ float q[MAX_D];
  __shared__ uint8_t queue[FETCH_WARPS][CHUNK];
  __shared__ int shared_top, shared_bad;
  wait_for_previous();
  const int64_t row = blockIdx.x / a.splits;
  const int split = (int)(blockIdx.x % a.splits), lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = a.pool.D;
  const row_place place = place_of(a, row);
  if (a.cert_flat[item_of(a, place)]) return;
  const float cut = a.cert_limit[row].cut, before = a.cert_limit[row].before;
  if (!(cut < before)) return;
  const int64_t chunks = (place.visible + CHUNK - 1) / CHUNK, per = (chunks + a.splits - 1) / a.splits, from = split * per,
                to = from + per < chunks ? from + per : chunks;
  for (int d = threadIdx.x; d < MAX_D; d += FETCH_THREADS)
    q[d] = d < D ? load_any(a.q, a.q_dtype, place.b * a.q_stride[0] + place.h * a.q_stride[1] + place.s * a.q_stride[2] + d) *
                       a.scale
                 : 0.0f;
  if (threadIdx.x == 0) shared_top = to_ordered(-emxi_inf()), shared_bad = 0;
  __syncthreads();
  const float slope = a.slopes ? a.slopes[place.h] : 0.0f;
  const bool first_round = before == emxi_inf(); /* which has all keys without a sketch */
  uint32_t tokens = 0, pages = 0;
  float top = -emxi_inf(), longest = 0;
  bool bad = false;
  for (int64_t c = from + warp; c < to; c += FETCH_WARPS) {
    const int64_t cell = row * a.chunks + c;
    const int there = a.cert_count[cell];
    if (!there) continue;
    int n = 0;
    uint32_t now = 0, earlier = 0; /* pages of the chunk */
    for (int j = 0; j < there; j += 32) {
      const bool in = j + lane < there;
      const float bound = in ? a.cert_bound[cell * CHUNK + j + lane] : -emxi_inf();
      const uint8_t local = in ? a.cert_local[cell * CHUNK + j + lane] : 0;
      const bool pick = bound > cut && !(bound > before);
      const uint32_t mask = __ballot_sync(EMXI_FULL, pick);
      if (pick) queue[warp][n + __popc(mask & ((1u << lane) - 1))] = local;
      now |= __reduce_or_sync(EMXI_FULL, pick ? 1u << (local >> a.pool.shift) : 0u);
      earlier |= __reduce_or_sync(EMXI_FULL, bound > before ? 1u << (local >> a.pool.shift) : 0u);
      n += __popc(mask);
    }
    if (!n) continue;
    __syncwarp();
    tokens += n;
    pages += __popc(now & ~earlier);
    int count = a.count[cell];
    float chunk_top = a.chunk_max[cell];
    for (int i = 0; i < n; i += U) {
      int64_t at[U];
      float v[U], square[U];
#pragma unroll
      for (int u = 0; u < U; u++) {
        const int64_t position = c * CHUNK + queue[warp][i + u < n ? i + u : i],
                      page = table_page(a.batch, a.pool, place.table, place.b, position >> a.pool.shift);
        at[u] = page * a.pool.k_page + place.g * a.pool.k_head + (position & (a.pool.P - 1)) * a.pool.k_token;
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        v[u] = square[u] = 0;
#pragma unroll
        for (int e = 0; e < PER_LANE; e++) {
          if (lane + 32 * e >= D) continue;
          const float x = load_any(a.pool.k, a.pool.dtype, at[u] + lane + 32 * e);
          v[u] = fmaf(x, q[lane + 32 * e], v[u]);
          square[u] = fmaf(x, x, square[u]);
        }
      }
      float score = -emxi_inf(), norm = 0;
#pragma unroll
      for (int u = 0; u < U; u++) {
        const float x = warp_sum(v[u]), y = first_round ? warp_sum(square[u]) : 0.0f;
        if (lane == u && i + u < n) score = x, norm = y;
      }
      const bool mine = lane < U && i + lane < n;
      const int local = mine ? queue[warp][i + lane] : 0;
      if (mine && slope != 0) score = fmaf(slope, (float)((int32_t)(c * CHUNK) + local - (int32_t)(place.visible - 1)), score);
      /* -inf from a finite key: a partial sum has overflowed, and the true score may be anything */
      for (uint32_t odd = __ballot_sync(EMXI_FULL, mine && score == -emxi_inf()); odd; odd &= odd - 1) {
        const int u = __ffs(odd) - 1;
        int64_t key = 0;
#pragma unroll
        for (int x = 0; x < U; x++)
          if (x == u) key = at[x];
        bool infinite = false;
        for (int d = lane; d < D; d += 32) infinite |= !(fabsf(load_any(a.pool.k, a.pool.dtype, key + d)) < emxi_inf());
        if (!__any_sync(EMXI_FULL, infinite) && lane == u) score = emxi_nan();
      }
      bad |= mine && !(score < emxi_inf());
      const bool keep = mine && score > -emxi_inf() && score < emxi_inf();
      const uint32_t mask = __ballot_sync(EMXI_FULL, keep);
      if (keep) {
        const int64_t to_place = cell * CHUNK + count + __popc(mask & ((1u << lane) - 1));
        a.z[to_place] = score;
        a.local[to_place] = (uint8_t)local;
        chunk_top = fmaxf(chunk_top, score);
        longest = fmaxf(longest, norm);
      }
      count += __popc(mask);
    }
    chunk_top = warp_max(chunk_top);
    top = fmaxf(top, chunk_top);
    if (lane == 0) a.count[cell] = (uint8_t)count, a.chunk_max[cell] = chunk_top;
    __syncwarp();
  }
  bad = __any_sync(EMXI_FULL, bad);
  longest = warp_max(longest);
  if (lane == 0) {
    atomicMax(&shared_top, to_ordered(top));
    if (bad) shared_bad = 1;
    if (longest > 0) atomicMax(&a.cert[row].longest, __float_as_int(longest)); /* not negative: the order of the integers */
    if (tokens) atomicAdd(&a.cert[row].tokens, tokens), atomicAdd(&a.cert[row].pages, pages);
  }
  __syncthreads();
  if (threadIdx.x) return;
  float *most = &a.split_max[row * a.splits + split];
  *most = fmaxf(*most, from_ordered(shared_top));
  if (shared_bad) a.bad[row * a.splits + split] = 1;
}

/* ---- blend */

__global__ void __launch_bounds__(FETCH_THREADS) blend(const __grid_constant__ emxi_cuda_decode a) {
  __shared__ float sum[FETCH_WARPS][MAX_D], weight[FETCH_WARPS];
  __shared__ int number[FETCH_WARPS];
  wait_for_previous();
  const int64_t row = blockIdx.x / a.splits;
  const int split = (int)(blockIdx.x % a.splits), lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = a.pool.D;
  const row_place place = place_of(a, row);
  if (alpha_of(a, place.h) != 1.0 || a.cert_flat[item_of(a, place)]) return;
  const int64_t chunks = (place.visible + CHUNK - 1) / CHUNK, per = (chunks + a.splits - 1) / a.splits, from = split * per,
                to = from + per < chunks ? from + per : chunks;
  const float m = a.split_max[row * a.splits + split];
  float acc[PER_LANE], total = 0;
  int n = 0;
#pragma unroll
  for (int e = 0; e < PER_LANE; e++) acc[e] = 0;
  for (int64_t c = from + warp; c < to; c += FETCH_WARPS) {
    const int64_t cell = row * a.chunks + c;
    const int count = a.count[cell];
    for (int first = 0; first < count; first += 32) {
      const bool in = first + lane < count;
      const float p = in ? expf(a.z[cell * CHUNK + first + lane] - m) : 0.0f;
      const int64_t position = c * CHUNK + (in ? a.local[cell * CHUNK + first + lane] : 0),
                    page = table_page(a.batch, a.pool, place.table, place.b, position >> a.pool.shift),
                    at = page * a.pool.v_page + place.g * a.pool.v_head + (position & (a.pool.P - 1)) * a.pool.v_token;
      total += p;
      n += in;
      for (int i = 0, here = count - first < 32 ? count - first : 32; i < here; i++) {
        const float w = __shfl_sync(EMXI_FULL, p, i);
        const int64_t value = __shfl_sync(EMXI_FULL, at, i);
        if (!(w > 0)) continue; /* what has no weight may be anything */
#pragma unroll
        for (int e = 0; e < PER_LANE; e++)
          if (lane + 32 * e < D) acc[e] = fmaf(w, load_any(a.pool.v, a.pool.dtype, value + lane + 32 * e), acc[e]);
      }
    }
  }
  total = warp_sum(total);
  n = __reduce_add_sync(EMXI_FULL, n);
#pragma unroll
  for (int e = 0; e < PER_LANE; e++) sum[warp][lane + 32 * e] = acc[e];
  if (lane == 0) weight[warp] = total, number[warp] = n;
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += FETCH_THREADS) {
    float x = 0;
    for (int w = 0; w < FETCH_WARPS; w++) x += sum[w][d];
    a.part_o[(row * a.splits + split) * D + d] = x;
  }
  if (threadIdx.x) return;
  total = 0, n = 0;
  for (int w = 0; w < FETCH_WARPS; w++) total += weight[w], n += number[w];
  a.part_m[row * a.splits + split] = m;
  a.part_z[row * a.splits + split] = total;
  a.part_n[row * a.splits + split] = n;
}

template <int DP>
void launch_weigh(const emxi_cuda_decode &d, cudaStream_t stream) {
  const unsigned grid = (unsigned)(d.batch.n * d.pool.G * d.blocks * d.splits);
  if (d.rows == 1)
    launch(weigh<DP, 1>, grid, CERT_THREADS, 0, stream, d.overlap, d);
  else
    launch(weigh<DP, 4>, grid, CERT_THREADS, 0, stream, d.overlap, d);
}

} // namespace

extern "C" void emxi_cuda_limits(const emxi_cuda_decode *d, void *on) {
  cudaStream_t stream = (cudaStream_t)on;
  const int dp = d->pool.sketch.dp;
  const unsigned rows = (unsigned)(d->batch.n * d->H * d->S), parts = rows * (unsigned)d->splits;
  if (dp == 64)
    launch_weigh<64>(*d, stream);
  else if (dp == 128)
    launch_weigh<128>(*d, stream);
  else
    launch_weigh<256>(*d, stream);
  emxi_cuda_decode k = *d;
  for (k.cert_round = 0; k.cert_round < LAST_ROUND; k.cert_round++) {
    launch(cut, rows, CUT_THREADS, 0, stream, d->overlap, k);
    launch(fetch, parts, FETCH_THREADS, 0, stream, d->overlap, k);
  }
  launch(cut, rows, CUT_THREADS, 0, stream, d->overlap, k);
  if (d->alphas || d->alpha == 1.0) launch(blend, parts, FETCH_THREADS, 0, stream, d->overlap, k);
}
