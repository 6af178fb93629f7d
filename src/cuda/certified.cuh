/* SPDX-License-Identifier: Apache-2.0
 * CERTIFIED on the device: which keys must be read so that nothing else can have weight.
 *
 *   judge  block = (sequence, KV head, up to R query rows, part of the sequence). An upper bound of the scores of every group of 16 keys
 *          from its centre and radius; the best groups of each part.
 *   seed   block = row. The keys of the best groups, exactly. Their threshold bounds the threshold from below (T1 of docs/math.md).
 *          Rows of which most of these keys have weight (of few keys nearly all) are flat: the item goes to ALL's scan.
 *   sieve  block = (sequence, part of it), for all heads. Groups above a row's limit, key by key from their 4-bit codes, then the keys that
 *          these leave, exactly, into the segments that ALL's scan would have filled. Exact scores are counted in a histogram at the lower
 *          edges of its bins; any state of it bounds the threshold from below, and whoever adds to it raises the limit.
 *   report what was read.
 * Flat items take ALL's scan, in the sieve's place or after it; solve and share are ALL's. docs/numerics.md derives the bounds.
 * Bytes of a group at dimension D, padded to 64, 128 or 256: 32 + D to judge it, 8 D for its codes, and rows of K. */
#ifndef EMXI_CUDA_CERTIFIED_CUH
#define EMXI_CUDA_CERTIFIED_CUH

#include "decode.cuh"

namespace {

/* ---- keys */

/* Exact scores of `n` keys of an item for all its rows, with the bits of ALL's scan (scan.cuh): U keys a lane group are under way at a time,
 * W of them are added up together. where(i): the i-th. use(i, row in the item, score) is called by all lanes together; i < 0: none of mine.
 * What a row does not see has -inf. */
struct cert_key {
  int32_t position, page;
};
template <typename T, int FIXED, int R, int U, int W>
struct cert_reader {
  using row_piece = piece<T, FIXED>;
  static constexpr int L = row_piece::L, SUBS = 32 / L, V = W * R, OWN = V >= L ? V / L : 1, BATCH = U * SUBS;

  template <int N, typename WHERE, typename USE>
  __device__ __forceinline__ static void read(const emxi_cuda_decode &a, const cert_item &it, const float (*shared_q)[N],
                                              const cert_query *query, int n, WHERE where, USE use) {
    const int lane = threadIdx.x % 32, l = lane % L, sub = lane / L, D = FIXED ? FIXED : a.pool.D;
    const T *k_base = (const T *)a.pool.k + it.g * a.pool.k_head;
    const uint64_t once = read_once();
    const auto row_at = [&](const cert_key &k) {
      return k_base + k.page * a.pool.k_page + (k.position & (a.pool.P - 1)) * a.pool.k_token;
    };
    for (int first = 0; first < n; first += BATCH) {
      row_piece x[U];
#pragma unroll
      for (int u = 0; u < U; u++) {
        const int i = first + sub * U + u;
        if (i < n)
          x[u].load(row_at(where(i)), l, D, once);
        else
          x[u].clear();
      }
#pragma unroll
      for (int w = 0; w < U; w += W) {
        float v[V];
#pragma unroll
        for (int u = 0; u < W; u++) {
          float f[8];
          x[w + u].get(f);
#pragma unroll
          for (int r = 0; r < R; r++) {
            float sum = f[0] * shared_q[r][row_piece::element(l, 0)];
#pragma unroll
            for (int e = 1; e < 8; e++) sum = fmaf(f[e], shared_q[r][row_piece::element(l, e)], sum);
            v[u * R + r] = sum;
          }
        }
        exchange_sum<V, L>(v, l);
#pragma unroll
        for (int o = 0; o < OWN; o++) {
          const int index = first_index<V, L>(l) + o, r = index % R, i = first + sub * U + w + index / R;
          const bool mine = (V >= L || l % (V < L ? L / V : 1) == 0) && r < it.rows && i < n;
          float score = -emxi_inf();
          if (mine) {
            const cert_key k = where(i);
            if (k.position < query[r].visible) {
              score = v[o];
              if (query[r].slope != 0) score = fmaf((float)query[r].slope, (float)(k.position - (query[r].visible - 1)), score);
              if (score == -emxi_inf() && key_is_finite(row_at(k), D)) score = emxi_nan();
            }
          }
          use(mine ? i : -1, r, score);
        }
      }
    }
  }
};
/* ---- seed */

constexpr int SEED_GROUPS = 64, SEED_PARTS = 1024, SEED_THREADS = 512, SEED_WARPS = SEED_THREADS / 32;

template <typename T, int FIXED>
__global__ void __launch_bounds__(SEED_THREADS) seed(const __grid_constant__ emxi_cuda_decode a) {
  __shared__ cert_query query[1];
  __shared__ float shared_q[1][FIXED ? FIXED : MAX_D], z[SEED_GROUPS * GROUP], value[SEED_PARTS], part[SEED_WARPS];
  __shared__ int32_t entry[SEED_PARTS], chosen[SEED_GROUPS], page[SEED_GROUPS];
  const row_place place = place_of(a, blockIdx.x);
  const int index = place.s * a.group + place.h % a.group, item = (place.b * a.pool.G + place.g) * a.blocks + index / a.rows,
            lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const cert_item it = {place.b, place.g, index, 1, place.length, (place.length + GROUP - 1) / GROUP, place.table};
  if (threadIdx.x < SEED_GROUPS) chosen[threadIdx.x] = -1;
  wait_for_previous();
  for (int i = threadIdx.x; i < BINS; i += SEED_THREADS) a.cert_bins[blockIdx.x * (int64_t)BINS + i] = 0;
  for (int i = threadIdx.x; i < a.splits; i += SEED_THREADS) a.bad[blockIdx.x * (int64_t)a.splits + i] = 0;

  /* The best groups; the two of a part may be the same one, and a key may count only once. */
  const int parts = 2 * a.splits < SEED_PARTS ? 2 * a.splits : SEED_PARTS;
  const uint64_t *all = a.cert_best + blockIdx.x * 2 * (int64_t)a.splits;
  for (int i = threadIdx.x; i < parts; i += SEED_THREADS) {
    const uint64_t best = all[i], other = all[i & ~1];
    const bool there = best && (i % 2 == 0 || (uint32_t)other != (uint32_t)best || !other);
    entry[i] = there ? (int32_t)(uint32_t)best : -1;
    value[i] = there ? from_ordered((int)((uint32_t)(best >> 32) ^ 0x80000000u)) : -emxi_inf();
  }
  float size = 0;
  for (int i = threadIdx.x; i < a.splits; i += SEED_THREADS) size = fmaxf(size, a.cert_size[item * (int64_t)a.splits + i]);
  size = warp_max(size);
  if (lane == 0) part[warp] = size;
  for (int i = threadIdx.x; i < (int)(sizeof(cert_query) / 4); i += SEED_THREADS)
    ((int32_t *)query)[i] = ((const int32_t *)&a.cert_query[blockIdx.x])[i];
  for (int i = threadIdx.x; i < (FIXED ? FIXED : MAX_D); i += SEED_THREADS) shared_q[0][i] = a.cert_words[blockIdx.x].q[i];
  __syncthreads();
  for (int i = warp; i < parts; i += SEED_WARPS) { /* a warp each: how many are better */
    if (entry[i] < 0) continue;
    int better = 0;
    for (int j = lane; j < parts; j += 32) better += entry[j] >= 0 && (value[j] > value[i] || (value[j] == value[i] && j < i));
    better = __reduce_add_sync(EMXI_FULL, better);
    if (lane == 0 && better < SEED_GROUPS) chosen[better] = entry[i];
  }
  __syncthreads();
  /* Four neighbouring ones a warp, read together. */
  constexpr int EACH = SEED_GROUPS / SEED_WARPS;
  if (lane < EACH) {
    const int32_t group = chosen[warp * EACH + lane];
    page[warp * EACH + lane] =
        group < 0 ? 0 : table_page(a.batch, a.pool, it.table, it.b, (int64_t)group * GROUP >> a.pool.shift);
  }
  __syncwarp();
  cert_reader<T, FIXED, 1, FIXED ? 16 : 8, 8>::read(
      a, it, shared_q, query, EACH * GROUP,
      [&](int i) {
        const int c = warp * EACH + i / GROUP;
        return cert_key{(chosen[c] < 0 ? 0 : chosen[c]) * GROUP + i % GROUP, page[c]};
      },
      [&](int i, int, float score) { /* NaN and +inf are the sieve's to find */
                                     if (i < 0) return;
                                     z[warp * EACH * GROUP + i] =
                                         chosen[warp * EACH + i / GROUP] >= 0 && score < emxi_inf() ? score : -emxi_inf();
      });
  __syncthreads();

  /* One warp, all scores in its registers: as in raise_limit. */
  if (threadIdx.x < 32) {
    constexpr int LANE = SEED_GROUPS * GROUP / 32;
    float s[LANE], m = -emxi_inf(), size = part[lane % SEED_WARPS];
#pragma unroll
    for (int i = 0; i < LANE; i++) {
      s[i] = z[i * 32 + lane];
      m = fmaxf(m, s[i]);
    }
    m = warp_max(m);
    size = warp_max(size);
    const double alpha = alpha_of(a, place.h);
    const bool laddered = alpha >= EMXI_CUDA_CERT_ALPHA_LEAST && alpha <= EMXI_CUDA_CERT_ALPHA_MOST;
    const float fa = (float)(alpha - 1);
    const float low = !laddered ? 0.0f : newton_below(alpha, -1.0f, 6, [&](auto add) {
#pragma unroll
      for (int i = 0; i < LANE; i++) add(fa * (s[i] - m), 1.0f);
    });
    float limit = m + low / fa;
    limit -= 1e-5f * (1 + fabsf(limit) + fabsf(m));
    /* the same in terms of true scores: listed ones are off by this at most (T2) */
    const double slack = cert_slack(query[0], (double)size, (double)it.length);
    limit = __double2float_rd((double)limit - slack);
    if (alpha == 1.0 && a.max_delta > 0 && slack < 0.05) { /* all that lies below is worth half of max_delta at most */
      float sum = 0;
#pragma unroll
      for (int i = 0; i < LANE; i++) sum += s[i] > -emxi_inf() ? expf(s[i] - m) : 0.0f;
      limit = (float)((double)m + log((double)warp_sum(sum)) + log(a.max_delta / 2) - log((double)it.length));
    } else if (!laddered || !(limit > -emxi_inf()))
      limit = -emxi_inf(); /* no score, or one that is not a number */
    int above = 0, there = 0;
#pragma unroll
    for (int i = 0; i < LANE; i++) above += s[i] > limit;
#pragma unroll
    for (int i = 0; i < SEED_GROUPS / 32; i++) there += chosen[i * 32 + lane] >= 0;
    above = __reduce_add_sync(EMXI_FULL, above);
    there = __reduce_add_sync(EMXI_FULL, there) * GROUP;
    if (threadIdx.x == 0) {
      emxi_cuda_cert *cert = &a.cert[blockIdx.x];
      cert->limit = to_ordered(limit);
      cert->base = limit;
      cert->slack = (float)slack * 1.1f; /* and what the subtraction of a float loses */
      cert->tokens = cert->pages = cert->codes = 0;
      cert->longest = 0;
      a.wide[blockIdx.x].arrived = 0; /* as ALL's scan does, which this row's item may skip */
      /* The best of few groups may have most of their keys above the limit in any row: parts are few where sequences are many */
      const bool most = there < SEED_GROUPS * GROUP / 2 ? 8 * above > 7 * there : 2 * above > there;
      if (!(limit > -emxi_inf()) || (alpha > 1 && most)) atomicOr(&a.cert_flat[item], 1);
    }
  }
}

/* ---- sieve */

/* Codes of some groups that a warp has asked for, on their way into shared memory, and what the bounds of their keys take.
 * Lane l copies what lane l reads. */
template <int R, int STEP>
struct sieve_step {
  static constexpr int SLOTS = R == 1 ? 4 : STEP; /* of one row a lane has group lane % 4, if there are as many */
  uint4 codes[4][32];
  emxi_cuda_group record[SLOTS];
  float upper[SLOTS][R];
  int32_t group[SLOTS], page[SLOTS]; /* group -1: none */
};
/* What a warp has in shared memory. WORDS: sixteen bytes of codes a lane and group, at most; STEP: groups that are read at
 * once; DEEP: steps under way; BATCH: keys that are read together. */
template <int FIXED, int R>
struct sieve_warp {
  static constexpr int WORDS = FIXED ? FIXED / 64 : MAX_D / 64, STEP = 4 / WORDS, DEEP = 2, QUEUE = 128, BATCH = 32;
  using step = sieve_step<R, STEP>;
  step steps[DEEP];
  float q[R][FIXED ? FIXED : MAX_D], scores[R][BATCH];
  cert_query query[R];
  cert_key queue[QUEUE];
  float limit[R], slack[R], base[R]; /* base: lower edge of the row's bins */
  float open_top[R];                 /* open: of the chunk of the last key of the batch before */
  int32_t open_count[R];
};
constexpr int SIEVE_ITEMS = 32;
/* Block = (sequence, up to SIEVE_ITEMS of its items, part of the sequence): turns of 32 groups, of every item as many. Heads
 * differ in how much their limits leave, parts hardly: a warp starts with an item of its own and, when that has no turn left,
 * goes on with others'. In a turn a lane has a group: bounds and pages are asked for one turn ahead, the codes of the next few
 * groups above the limit a step ahead. Keys whose bounds are above the limit, too, wait in a queue, in the order of their
 * positions, until there are as many as are read together: their rows are then under way all at once, and they may be of many
 * chunks. A chunk is of one turn. */
template <typename T, int FIXED, int R>
__global__ void __launch_bounds__(CERT_THREADS, 2) sieve(const __grid_constant__ emxi_cuda_decode a) {
  using state = sieve_warp<FIXED, R>;
  constexpr int WORDS = state::WORDS, STEP = state::STEP, DEEP = state::DEEP, QUEUE = state::QUEUE, BATCH = state::BATCH,
                FIRST = 8;                /* keys of a warp's first batch, so that the limit rises soon */
  extern __shared__ uint4 sieve_shared[]; /* [CERT_WARPS] state */
  __shared__ int taken[SIEVE_ITEMS];      /* turns of each item */
  const emxi_cuda_pool &pool = a.pool;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dp = FIXED ? FIXED : pool.sketch.dp, key = lane / 4, t = lane % 4,
            dims = FIXED ? WORDS : dp / 64;
  /* Lane (group j of a step, row) has what the bounds of the group's keys have in common; half: of the record */
  const int my_j = R == 1 ? t : lane / R % STEP, my_row = R == 1 ? 0 : t, half = R == 1 ? lane / 4 : t;
  state &my = ((state *)sieve_shared)[warp];
  float *const limit = my.limit;
  const cert_query *const query = my.query;
  const int all = pool.G * a.blocks, window = all < SIEVE_ITEMS ? all : SIEVE_ITEMS, windows = (all + window - 1) / window,
            parts = window * a.splits, part = blockIdx.x % parts, b = blockIdx.x / parts / windows,
            first_item = blockIdx.x / parts % windows * window, items = all - first_item < window ? all - first_item : window;
  if (threadIdx.x < SIEVE_ITEMS) taken[threadIdx.x] = 0;
  __syncthreads();
  /* seed has waited for judge before this block could be started: what judge and those before it have written is there. Of
   * seed itself the block needs flat items and limits, later. */
  uint32_t flat = 0;
  bool waited = false;
  int full = FIRST; /* keys that make a batch */
  cert_item it = open_item<R>(a, b * all + first_item);
  const int32_t groups = (int32_t)it.groups, length = (int32_t)it.length;
  for (int i = 0; i < items; i++) {
    const int start = warp * items / CERT_WARPS + i, own = start < items ? start : start - items;
    if (flat >> own & 1) continue;
    const int shifted = part + own * a.splits, first_turn = shifted < parts ? shifted : shifted - parts; /* of this block's */
    const auto take_turn = [&]() {                                                                       /* its first group */
                                   const int turn = lane == 0 ? atomicAdd(&taken[own], 1) : 0;
                                   return (__shfl_sync(EMXI_FULL, turn, 0) * parts + first_turn) * 32;
    };
    float bound[R], next_bound[R];
    int32_t page = 0, next_page = 0, turn = 0, next_turn = take_turn();
    if (next_turn >= groups) continue;
    enter_item<R>(a, (uint32_t)(first_item + own), &it);
    const auto row_of = [&](int r) { return item_row(a, it.b, it.g, it.first_row + r, it.length).row; };
    const auto fetch = [&](auto row_of) {
      const int32_t group = next_turn + lane;
#pragma unroll
      for (int r = 0; r < R; r++)
        next_bound[r] = r < it.rows && group < groups ? __ldcg(&a.cert_upper[row_of(r) * a.cert_groups + group]) : -emxi_inf();
      next_page = group < groups ? __ldg(it.table + (group >> (pool.shift - 4))) : 0;
    };
    fetch(row_of);
    const auto row_again = [&](int r) { return (int64_t)query[r].row; };
    int32_t column[WORDS][4];
#pragma unroll
    for (int j = 0; j < 4 * WORDS; j++) {
      const int r = R == 1 ? 0 : key / 2;
      const int32_t *words = key % 2 ? a.cert_words[row_of(r)].b : a.cert_words[row_of(r)].a;
      column[j / 4][j % 4] = j < 4 * dims && r < it.rows ? __ldcg(words + 16 * (j / 4) + 8 * (j % 4 / 2) + 2 * t + j % 2) : 0;
    }
    __syncwarp(); /* all lanes are done with the item before */
    constexpr int EACH = sizeof(cert_query) / 8, N = FIXED ? FIXED : MAX_D;
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int64_t row = row_of(r < it.rows ? r : 0);
#pragma unroll
      for (int x = 0; x < N; x += 64)
        *(float2 *)&my.q[r][x + 2 * lane] = __ldcg((const float2 *)&a.cert_words[row].q[x + 2 * lane]);
      if (lane < EACH) ((int64_t *)&my.query[r])[lane] = __ldcg((const long long *)&a.cert_query[row] + lane);
    }
    if (!waited) wait_for_previous();
    const emxi_cuda_cert *cert = &a.cert[row_of(lane < it.rows ? lane : 0)];
    const float slack = __ldcg(&cert->slack), base = __ldcg(&cert->base), first = from_ordered(__ldcg(&cert->limit));
    if (!waited) {
      waited = true;
      flat = __ballot_sync(EMXI_FULL, lane < items && __ldcg(&a.cert_flat[b * all + first_item + lane]));
      if (flat >> own & 1) continue;
    }
    if (lane < R) {
      limit[lane] = lane < it.rows ? first : emxi_inf();
      my.slack[lane] = slack, my.base[lane] = base;
    }
    __syncwarp();
    /* Lane r: row r's limit */
    const auto poll = [&]() { return lane < it.rows ? __ldcg(&a.cert[query[lane % R].row].limit) : to_ordered(emxi_inf()); };
    const auto take = [&](int polled) {
      __syncwarp();
      if (lane < R) limit[lane] = fmaxf(limit[lane], from_ordered(polled));
      __syncwarp();
    };
    uint32_t tokens = 0, pages = 0, codes = 0, bad = 0, alive = 0;
    /* False: there are no more groups. */
    const auto open_step = [&](typename state::step &s) {
      uint32_t above;
      for (;;) {
        bool mine = false;
#pragma unroll
        for (int r = 0; r < R; r++) mine |= !(bound[r] <= limit[r]);
        above = alive ? alive & __ballot_sync(EMXI_FULL, mine) : 0;
        if (!above && next_turn >= groups && i) { /* of others' turns one at a time: none shall wait while some warp is idle */
          next_turn = take_turn();
          fetch(row_again);
        }
        if (above) break;
        if (next_turn >= groups) return false;
#pragma unroll
        for (int r = 0; r < R; r++) bound[r] = next_bound[r];
        page = checked_page(a.batch, pool, it.b, (next_turn + lane) >> (pool.shift - 4), next_page), turn = next_turn,
        alive = EMXI_FULL;
#pragma unroll
        for (int r = 0; r < R; r++)
          if (r < it.rows && lane < 32 * GROUP / CHUNK && turn * GROUP + lane * CHUNK < length) { /* without candidates */
            const int64_t at = query[r].row * a.chunks + turn * GROUP / CHUNK + lane;
            a.count[at] = 0, a.chunk_max[at] = -emxi_inf();
          }
        next_turn = groups;
        if (!i) {
          next_turn = take_turn();
          fetch(row_again);
        }
      }
      const int32_t place = ((page * pool.G + it.g) << (pool.shift - 4)) + ((turn + lane) & ((1 << (pool.shift - 4)) - 1));
      const int first = __ffs(above) - 1;
      int mine = -1;
#pragma unroll
      for (int j = 0; j < STEP; j++) {
        if (!above) break;
        const int from_lane = __ffs(above) - 1;
        if (my_j == j) mine = from_lane;
        codes++;
        above &= above - 1;
        const uint4 *at =
            (const uint4 *)(pool.sketch.codes + (int64_t)__shfl_sync(EMXI_FULL, place, from_lane) * (GROUP / 2) * dp) + lane;
#pragma unroll
        for (int w = 0; w < WORDS; w++)
          if (w < dims) copy16(&s.codes[j * WORDS + w][lane], at + w * 32);
      }
      alive = above;
      const int of = mine < 0 ? first : mine, place_of_mine = __shfl_sync(EMXI_FULL, place, of),
                page_of_mine = __shfl_sync(EMXI_FULL, page, of);
      float upper = -emxi_inf();
#pragma unroll
      for (int r = 0; r < R; r++) {
        const float of_row = __shfl_sync(EMXI_FULL, bound[r], of);
        if (r == my_row) upper = of_row;
      }
      if (lane < (R == 1 ? 8 : 4 * STEP)) {
        if (mine >= 0 && half < 2)
          copy16((uint4 *)&s.record[my_j] + half, (const uint4 *)(pool.sketch.group + place_of_mine) + half);
        if (R > 1 || half == 0) s.upper[my_j][my_row] = upper;
        if (half == 0) s.group[my_j] = mine < 0 ? -1 : turn + mine, s.page[my_j] = page_of_mine;
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
      return true;
    };

    int waiting = 0, front = 0, last_page = -1; /* keys in the queue; the first */
    int32_t open_chunk = -1;
    const auto push = [&](int place, int32_t group, int i, int32_t page_of) {
      my.queue[(front + waiting + place) % QUEUE] = {group * GROUP + 8 * i + key, page_of};
    };
    const auto note_page = [&](int32_t group) {
      const int32_t number = group >> (pool.shift - 4);
      pages += number != last_page;
      last_page = number;
    };

    int polled = to_ordered(-emxi_inf()), number = 0, opened = 0, done = 0; /* steps */
    bool more = true;                                                       /* groups */
    do {
      if (number % 4 == 1) take(polled);
      while (more && opened - done < DEEP)
        if ((more = open_step(my.steps[opened % DEEP]))) opened++;
      if (number++ % 4 == 0) polled = poll();
      if (done < opened) {
        if (more)
          asm volatile("cp.async.wait_group %0;" ::"n"(DEEP - 1) : "memory");
        else
          asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncwarp();
        const typename state::step &s = my.steps[done++ % DEEP];
        int c_of[STEP][4];
#pragma unroll
        for (int j = 0; j < STEP; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) c_of[j][i] = 0;
#pragma unroll
        for (int w = 0; w < WORDS; w++)
#pragma unroll
          for (int j = 0; j < STEP; j++) {
            constexpr uint32_t LOW = 0x0f0f0f0fu;
            const uint4 p = s.codes[j * WORDS + w][lane];
            dot_tile(c_of[j], p.x & LOW, p.y & LOW, p.x >> 4 & LOW, p.y >> 4 & LOW, column[w][0], column[w][1]);
            dot_tile(c_of[j], p.z & LOW, p.w & LOW, p.z >> 4 & LOW, p.w >> 4 & LOW, column[w][2], column[w][3]);
          }
        const int32_t group_of_mine = s.group[my_j];
        float base = -emxi_inf(), scale = 0;
        if (group_of_mine >= 0 && my_row < it.rows) {
          const cert_query &q = query[my_row];
          const emxi_cuda_group &own = s.record[my_j];
          const float upper = s.upper[my_j][my_row];
          base = upper;
          if (upper < emxi_inf() && own.size > 0) {
            scale = 0.5f * q.s2 * own.step;
            base = key_base(q, upper, make_float2(own.radius, own.radius_far), make_float2(own.error, own.error_far), scale);
          } else if (upper > -emxi_inf()) {
            base = emxi_inf(); /* nothing is known */
          }
        }
        /* Keys key and 8 + key of a group whose bounds are above the limit */
        const auto above = [&](int32_t group, const int(&c)[4], float b, float f, int r, float lim, bool(&pass)[2]) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int dot = 508 * c[2 * i] + 2 * c[2 * i + 1] - 15 * query[r].sum;
            pass[i] = group >= 0 && group * GROUP + 8 * i + key < length && !(fmaf(f, (float)dot, b) <= lim);
          }
        };
        if constexpr (R == 1) {
          int c_mine[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            c_mine[i] = c_of[0][i];
#pragma unroll
            for (int j = 1; j < STEP; j++)
              if (t == j) c_mine[i] = c_of[j][i];
          }
          bool pass[2];
          above(group_of_mine, c_mine, base, scale, 0, limit[0], pass);
          const uint32_t low = __ballot_sync(EMXI_FULL, pass[0]), high = __ballot_sync(EMXI_FULL, pass[1]);
          if (low | high) {
            const uint32_t self = 0x11111111u << t, before = 0x11111111u * ((1u << t) - 1), below = (1u << lane) - 1;
            const int start = __popc(low & before) + __popc(high & before);
            if (pass[0]) push(start + __popc(low & self & below), group_of_mine, 0, s.page[my_j]);
            if (pass[1]) push(start + __popc(low & self) + __popc(high & self & below), group_of_mine, 1, s.page[my_j]);
            waiting += __popc(low) + __popc(high);
#pragma unroll
            for (int j = 0; j < STEP; j++)
              if ((low | high) & 0x11111111u << j) note_page(s.group[j]);
          }
        } else {
          const float lim = limit[t];
#pragma unroll
          for (int j = 0; j < STEP; j++) {
            const float b = __shfl_sync(EMXI_FULL, base, R * j + t), f = __shfl_sync(EMXI_FULL, scale, R * j + t);
            const int32_t group = s.group[j], of = s.page[j];
            bool pass[2];
            above(t < it.rows ? group : -1, c_of[j], b, f, t < it.rows ? t : 0, lim, pass);
            uint32_t keys[2];
#pragma unroll
            for (int i = 0; i < 2; i++) keys[i] = __ballot_sync(EMXI_FULL, pass[i]);
            if (!(keys[0] | keys[1])) continue;
#pragma unroll
            for (int i = 0; i < 2; i++) {
              uint32_t any = keys[i] | keys[i] >> 1; /* of some row */
              any = (any | any >> 2) & 0x11111111u;
              if (any >> lane & 1) push(__popc(any & ((1u << lane) - 1)), group, i, of);
              waiting += __popc(any);
            }
            note_page(group);
          }
        }
        __syncwarp();
      }
      while (waiting >= full || (!more && done == opened && waiting)) {
        const int n = waiting < BATCH ? waiting : BATCH;
        full = BATCH;
        tokens += n;
        cert_reader<T, FIXED, R, R == 1 ? 8 : 4, R == 1 ? 8 : 4>::read(
            a, it, my.q, query, n, [&](int i) { return my.queue[(front + i) % QUEUE]; },
            [&](int i, int r, float score) {
              if (i >= 0) my.scores[r][i] = score;
            });
        __syncwarp();
        /* lane: a key. What is above the limit goes to its chunk's segment; the first chunk may be that of the last key
         * before. */
        const int32_t position = my.queue[(front + (lane < n ? lane : 0)) % QUEUE].position,
                      chunk = lane < n ? position / CHUNK : -1, before = __shfl_up_sync(EMXI_FULL, chunk, 1);
        const uint32_t starts = __ballot_sync(EMXI_FULL, lane == 0 || chunk != before);
        const int start = 31 - __clz((int)(starts & (EMXI_FULL >> (31 - lane))));
        const bool goes_on = start == 0 && chunk == open_chunk, last = lane == n - 1 || (lane < n && starts >> lane >> 1 & 1);
        uint32_t raised = 0;
        for (int r = 0; r < it.rows; r++) {
          const float score = lane < n ? my.scores[r][lane] : -emxi_inf();
          bad |= (uint32_t) !(score < emxi_inf()) << r;
          const bool here = score > limit[r];
          const uint32_t mask = __ballot_sync(EMXI_FULL, here);
          int count = __popc(mask & ((1u << lane) - 1) & (EMXI_FULL << start)) + (goes_on ? my.open_count[r] : 0);
          const int64_t row = query[r].row;
          if (here) {
            const int64_t to_place = (row * a.chunks + chunk) * CHUNK + count;
            a.z[to_place] = score;
            a.local[to_place] = (uint8_t)(position % CHUNK);
            const float bin = (score - my.slack[r] - my.base[r]) / BIN - 1e-3f;
            /* of a key without a sketch nobody knows how far off its score is: the slack is not its */
            if (bin >= 0 && score < emxi_inf() && a.cert_upper[row * a.cert_groups + position / GROUP] < emxi_inf())
              atomicAdd(&a.cert_bins[row * BINS + (int)fminf(bin, BINS - 1)], 1u);
            count++;
          }
          float top = score < emxi_inf() ? score : -emxi_inf();
#pragma unroll
          for (int step = 1; step < 32; step <<= 1) {
            const float other = __shfl_up_sync(EMXI_FULL, top, step);
            if (lane - step >= start) top = fmaxf(top, other);
          }
          if (goes_on) top = fmaxf(top, my.open_top[r]);
          if (last) {
            a.count[row * a.chunks + chunk] = (uint8_t)count;
            a.chunk_max[row * a.chunks + chunk] = top;
          }
          __syncwarp();
          if (lane == n - 1) my.open_count[r] = count, my.open_top[r] = top;
          raised |= (uint32_t)__any_sync(EMXI_FULL, here && score > limit[r] + 0.125f) << r;
        }
        open_chunk = __shfl_sync(EMXI_FULL, chunk, n - 1);
        front += n, waiting -= n;
        /* With nothing left to do the warp leaves that to those who go on: its scores are in the histogram. Which of them a look at it
         * finds does not matter, so that no fence is needed. */
        if (!more && done == opened && !waiting) raised = 0;
        for (; raised; raised &= raised - 1) {
          const int64_t row = query[__ffs(raised) - 1].row;
          raise_limit(a, row, alpha_of(a, head_of(a, row)), from_ordered(__ldcg(&a.cert[row].limit)));
        }
        take(poll());
        __syncwarp();
      }
    } while (more || done < opened);
    bad = __reduce_or_sync(EMXI_FULL, bad);
    if (lane < it.rows) {
      const int64_t row = query[lane].row;
      emxi_cuda_cert *cert = &a.cert[row];
      if (tokens) atomicAdd(&cert->tokens, tokens), atomicAdd(&cert->pages, pages);
      if (codes) atomicAdd(&cert->codes, codes);
      if (bad >> lane & 1) a.bad[row * a.splits + part % a.splits] = 1;
    }
  }
  if (!waited) wait_for_previous();
  if constexpr (FIXED > 0)
    if (blockIdx.x < a.batch.n * all * a.splits)
      scan_part<T, FIXED, R, R == 1 ? 8 : 4, false, false, false>(a); /* a flat item's */
}

template <typename T, int FIXED, int R>
bool certified_any(const emxi_cuda_decode &d, cudaStream_t stream) {
  emxi_cuda_judge(&d, stream);
  launch(seed<T, FIXED>, (unsigned)(d.batch.n * d.H * d.S), SEED_THREADS, 0, stream, d.overlap, d);
  if (d.cert_limit) {
    emxi_cuda_limits(&d, stream);
    return false;
  }
  const int all = d.pool.G * d.blocks, window = all < SIEVE_ITEMS ? all : SIEVE_ITEMS, windows = (all + window - 1) / window;
  constexpr size_t shared = sizeof(sieve_warp<FIXED, R>) * CERT_WARPS;
  (void)cudaFuncSetAttribute(sieve<T, FIXED, R>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  launch(sieve<T, FIXED, R>, (unsigned)(d.batch.n * windows * window * d.splits), CERT_THREADS, shared, stream, d.overlap, d);
  return FIXED > 0;
}
/* What comes before solve; where it says so but for ALL's scan, which then does flat items only. */
template <typename T>
bool certified(const emxi_cuda_decode &d, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (d.vectors && d.pool.D == 64) return d.rows == 1 ? certified_any<T, 64, 1>(d, stream) : certified_any<T, 64, 4>(d, stream);
    if (d.vectors && d.pool.D == 128)
      return d.rows == 1 ? certified_any<T, 128, 1>(d, stream) : certified_any<T, 128, 4>(d, stream);
  }
  return certified_any<T, 0, 4>(d, stream);
}

} // namespace

#endif
