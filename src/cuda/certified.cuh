/* SPDX-License-Identifier: Apache-2.0
 * CERTIFIED on the device: which keys must be read so that nothing else can have weight.
 *
 *   judge  block = (sequence, KV head, up to R query rows, part of the sequence). An upper bound of the scores of every group of 16 keys
 *          from its centre and radius; the best groups of each part.
 *   seed   block = row. The keys of the best groups, exactly. Their threshold bounds the threshold from below (T1 of docs/math.md).
 *          Rows of which most of these keys have weight are flat: the item goes to ALL's scan.
 *   sieve  block as in judge. Groups above the row's limit, key by key from their 4-bit codes, then the keys that these leave, exactly,
 *          into the segments that ALL's scan would have filled. Exact scores are counted in a histogram at the lower edges of its bins;
 *          any state of it bounds the threshold from below, and whoever adds to it raises the limit.
 *   report what was read.
 * Between seed and report run ALL's scan, for flat items alone, and its solve and share kernels. docs/numerics.md derives the bounds.
 * Bytes of a group at dimension D, padded to 64, 128 or 256: 32 + D to judge it, 8 D for its codes, and rows of K. */
#ifndef EMXI_CUDA_CERTIFIED_CUH
#define EMXI_CUDA_CERTIFIED_CUH

#include "decode.cuh"
#include "sketch.cuh"

namespace {

/* ---- keys */

/* Exact scores of `n` keys of an item for all its rows, with the bits of ALL's scan (decode.cuh): U keys a lane group at a time. where(i):
 * position of the i-th. use(i, position, row in the item, score) is called by all lanes together; i < 0: none of mine. */
template <typename T, int FIXED, int R, int U>
struct cert_reader {
  using row_piece = piece<T, FIXED>;
  static constexpr int L = row_piece::L, SUBS = 32 / L, V = U * R, OWN = V >= L ? V / L : 1, BATCH = U * SUBS;

  template <typename WHERE, typename USE>
  __device__ __forceinline__ static void read(const emxi_cuda_decode &a, const cert_item &it, const float (*shared_q)[MAX_D],
                                              const cert_query *query, int n, WHERE where, USE use) {
    const int lane = threadIdx.x % 32, l = lane % L, sub = lane / L, D = FIXED ? FIXED : a.pool.D;
    const T *k_base = (const T *)a.pool.k + it.g * a.pool.k_head;
    const uint64_t once = read_once();
    for (int first = 0; first < n; first += BATCH) {
      row_piece x[U];
#pragma unroll
      for (int u = 0; u < U; u++) {
        const int i = first + u * SUBS + sub;
        if (i < n) {
          const int64_t position = where(i), page = table_page(a.batch, a.pool, it.table, it.b, position >> a.pool.shift);
          x[u].load(k_base + page * a.pool.k_page + (position & (a.pool.P - 1)) * a.pool.k_token, l, D, once);
        } else {
          x[u].clear();
        }
      }
      float v[V];
#pragma unroll
      for (int u = 0; u < U; u++) {
        float f[8];
        x[u].get(f);
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
        const int index = first_index<V, L>(l) + o, r = index % R, i = first + index / R * SUBS + sub;
        const bool mine = (V >= L || l % (V < L ? L / V : 1) == 0) && r < it.rows && i < n;
        const int64_t position = mine ? where(i) : 0;
        float score = -emxi_inf();
        const bool in = mine && position < query[r].visible;
        if (in) {
          score = v[o];
          if (query[r].slope != 0)
            score = fmaf((float)query[r].slope, (float)((int32_t)position - (query[r].visible - 1)), score);
          if (score == -emxi_inf()) {
            const int64_t page = table_page(a.batch, a.pool, it.table, it.b, position >> a.pool.shift);
            if (key_is_finite(k_base + page * a.pool.k_page + (position & (a.pool.P - 1)) * a.pool.k_token, D))
              score = emxi_nan();
          }
        }
        use(in ? i : -1, position, r, score);
      }
    }
  }
};
/* scale q of an item's rows as floats, zero beyond. Has a barrier. */
template <int R>
__device__ __forceinline__ void load_queries(const emxi_cuda_decode &a, const cert_item &it, float (*shared_q)[MAX_D]) {
  for (int i = threadIdx.x; i < R * MAX_D; i += blockDim.x) {
    const int r = i / MAX_D, x = i % MAX_D, index = it.first_row + r, s = index / a.group, h = it.g * a.group + index % a.group;
    shared_q[r][x] = r < it.rows && x < a.pool.D
                         ? load_any(a.q, a.q_dtype, it.b * a.q_stride[0] + h * a.q_stride[1] + s * a.q_stride[2] + x) * a.scale
                         : 0.0f;
  }
  __syncthreads();
}

/* ---- seed */

constexpr int SEED_GROUPS = 64, SEED_PARTS = 1024, SEED_THREADS = 512, SEED_WARPS = SEED_THREADS / 32;

template <typename T, int FIXED>
__global__ void __launch_bounds__(SEED_THREADS) seed(const __grid_constant__ emxi_cuda_decode a) {
  __shared__ cert_query query[1];
  __shared__ cert_words words[1];
  __shared__ float shared_q[1][MAX_D], z[SEED_GROUPS * GROUP], value[SEED_PARTS], part[SEED_WARPS];
  __shared__ int32_t entry[SEED_PARTS], chosen[SEED_GROUPS];
  __shared__ int n_chosen;
  wait_for_previous();
  const row_place place = place_of(a, blockIdx.x);
  const int index = place.s * a.group + place.h % a.group, item = (place.b * a.pool.G + place.g) * a.blocks + index / a.rows;
  const cert_item it = {place.b, place.g, index, 1, place.length, (place.length + GROUP - 1) / GROUP, place.table};
  fetch_queries<1>(a, it, query, words);
  load_queries<1>(a, it, shared_q);
  if (threadIdx.x == 0) n_chosen = 0;

  /* The best groups; the two of a part may be the same one, and a key may count only once. */
  const int parts = 2 * a.splits < SEED_PARTS ? 2 * a.splits : SEED_PARTS;
  float size = 0;
  for (int i = threadIdx.x; i < parts; i += SEED_THREADS) {
    const uint64_t best = a.cert_best[blockIdx.x * 2 * (int64_t)a.splits + i];
    entry[i] = best ? (int32_t)(uint32_t)best : -1;
    if (i % 2 && best && (uint32_t)a.cert_best[blockIdx.x * 2 * (int64_t)a.splits + i - 1] == (uint32_t)best) entry[i] = -1;
    value[i] = entry[i] < 0 ? -emxi_inf() : from_ordered((int)((uint32_t)(best >> 32) ^ 0x80000000u));
  }
  for (int i = threadIdx.x; i < a.splits; i += SEED_THREADS) size = fmaxf(size, a.cert_size[item * (int64_t)a.splits + i]);
#pragma unroll
  for (int step = 16; step; step >>= 1) size = fmaxf(size, __shfl_xor_sync(EMXI_FULL, size, step));
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = size;
  __syncthreads();
  for (int w = 0; w < SEED_WARPS; w++) size = fmaxf(size, part[w]);
  for (int i = threadIdx.x; i < parts; i += SEED_THREADS) {
    if (entry[i] < 0) continue;
    int better = 0;
    for (int j = 0; j < parts; j++) better += value[j] > value[i] || (value[j] == value[i] && j < i && entry[j] >= 0);
    if (better < SEED_GROUPS) chosen[atomicAdd(&n_chosen, 1)] = entry[i];
  }
  __syncthreads();
  const int groups = n_chosen;
  for (int i = threadIdx.x; i < SEED_GROUPS * GROUP; i += SEED_THREADS) z[i] = -emxi_inf();
  __syncthreads();
  using reader = cert_reader<T, FIXED, 1, 8>;
  for (int c = threadIdx.x / 32; c < groups; c += SEED_WARPS)
    reader::read(
        a, it, shared_q, query, GROUP, [&](int i) { return (int64_t)chosen[c] * GROUP + i; },
        [&](int i, int64_t, int, float score) {
          if (i >= 0 && score < emxi_inf()) z[c * GROUP + i] = score; /* NaN and +inf are the sieve's to find */
        });
  __syncthreads();

  /* One warp, all scores in its registers: as in raise_limit. */
  if (threadIdx.x < 32) {
    constexpr int EACH = SEED_GROUPS * GROUP / 32;
    float s[EACH], m = -emxi_inf();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      s[i] = z[i * 32 + threadIdx.x];
      m = fmaxf(m, s[i]);
    }
#pragma unroll
    for (int step = 16; step; step >>= 1) m = fmaxf(m, __shfl_xor_sync(EMXI_FULL, m, step));
    const double alpha = alpha_of(a, place.h);
    const bool laddered = alpha >= EMXI_CUDA_CERT_ALPHA_LEAST && alpha <= EMXI_CUDA_CERT_ALPHA_MOST;
    const float fa = (float)(alpha - 1);
    const float low = !laddered ? 0.0f : newton_below(alpha, -1.0f, 6, [&](auto add) {
#pragma unroll
      for (int i = 0; i < EACH; i++) add(fa * (s[i] - m), 1.0f);
    });
    float limit = m + low / fa;
    limit -= 1e-5f * (1 + fabsf(limit) + fabsf(m));
    /* the same in terms of true scores: listed ones are off by this at most (T2) */
    const double slack = cert_slack(query[0], (double)size, (double)it.length);
    limit = __double2float_rd((double)limit - slack);
    if (alpha == 1.0 && a.max_delta > 0 && slack < 0.05) { /* all that lies below is worth half of max_delta at most */
      float sum = 0;
#pragma unroll
      for (int i = 0; i < EACH; i++) sum += s[i] > -emxi_inf() ? expf(s[i] - m) : 0.0f;
      limit = (float)((double)m + log((double)warp_sum(sum)) + log(a.max_delta / 2) - log((double)it.length));
    } else if (!laddered || !(limit > -emxi_inf()))
      limit = -emxi_inf(); /* no score, or one that is not a number */
    int above = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) above += s[i] > limit;
    above = __reduce_add_sync(EMXI_FULL, above);
    if (threadIdx.x == 0) {
      emxi_cuda_cert *cert = &a.cert[blockIdx.x];
      cert->limit = to_ordered(limit);
      cert->base = limit;
      cert->slack = (float)slack * 1.1f; /* and what the subtraction of a float loses */
      cert->tokens = cert->pages = cert->codes = 0;
      a.wide[blockIdx.x].arrived = 0; /* as ALL's scan does, which this row's item may skip */
      if (!(limit > -emxi_inf()) || (alpha > 1 && 2 * above > groups * GROUP)) atomicOr(&a.cert_flat[item], 1);
    }
  }
  for (int i = threadIdx.x; i < BINS; i += SEED_THREADS) a.cert_bins[blockIdx.x * (int64_t)BINS + i] = 0;
}

/* ---- sieve */

template <typename T, int FIXED, int R>
__global__ void __launch_bounds__(CERT_THREADS, 2) sieve(const __grid_constant__ emxi_cuda_decode a) {
  /* WORDS: sixteen bytes of codes a lane and group, at most; STEP: groups that are read at once */
  constexpr int CHUNK_GROUPS = CHUNK / GROUP, WORDS = FIXED ? FIXED / 64 : MAX_D / 64, STEP = 4;
  __shared__ cert_query query[R];
  __shared__ cert_words words[R];
  __shared__ float shared_q[R][MAX_D];
  __shared__ uint8_t queue[CERT_WARPS][CHUNK];
  __shared__ int shared_max[R], shared_bad;
  const emxi_cuda_pool &pool = a.pool;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  wait_for_previous();
  const int split = blockIdx.x % a.splits, item = blockIdx.x / a.splits;
  if (a.cert_flat[item]) return;
  const cert_item it = open_item<R>(a, item);
  fetch_queries<R>(a, it, query, words);
  load_queries<R>(a, it, shared_q);
  if (threadIdx.x < R) shared_max[threadIdx.x] = to_ordered(-emxi_inf());
  if (threadIdx.x == 0) shared_bad = 0;
  __syncthreads();
  const int64_t chunks = (it.length + CHUNK - 1) / CHUNK, per = (chunks + a.splits - 1) / a.splits, from = split * per,
                to = from + per < chunks ? from + per : chunks;
  const int dp = pool.sketch.dp, key = lane / 4, t = lane % 4, dims = FIXED ? WORDS : dp / 64;
  int32_t column[WORDS][4];
#pragma unroll
  for (int i = 0; i < WORDS; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      column[i][j] = i < dims ? column_word<R>(words, it.rows, 16 * i + 8 * (j / 2) + 2 * t + j % 2) : 0;
  float limit[R];
  uint32_t tokens = 0, pages = 0, codes = 0, bad = 0;
  const auto poll = [&]() {
#pragma unroll
    for (int r = 0; r < R; r++) limit[r] = r < it.rows ? from_ordered(__ldcg(&a.cert[query[r].row].limit)) : emxi_inf();
  };
  /* lane: row lane / 8 and group lane % 8 of the chunk */
  const int my_r = lane / CHUNK_GROUPS < R ? lane / CHUNK_GROUPS : 0;
  const bool my_part = lane / CHUNK_GROUPS < it.rows;
  const auto bound_of = [&](int64_t c) {
    const int64_t group = c * CHUNK_GROUPS + lane % CHUNK_GROUPS;
    return my_part && c < to && group < it.groups ? a.cert_upper[query[my_r].row * a.cert_groups + group] : -emxi_inf();
  };
  /* lane: group lane % 8 of the chunk, where its sketch lies */
  const auto place_of_group = [&](int64_t c) {
    const int64_t group = c * CHUNK_GROUPS + lane % CHUNK_GROUPS;
    return c < to && group < it.groups ? (int32_t)group_at(a, it, group) : 0;
  };
  poll();
  float upper = bound_of(from + warp);
  int32_t next_at = place_of_group(from + warp);
  for (int64_t c = from + warp, turn = 0; c < to; c += CERT_WARPS, turn++) {
    const float bound = upper;
    const int32_t at = next_at;
    upper = bound_of(c + CERT_WARPS);
    next_at = place_of_group(c + CERT_WARPS);
    if (turn % 4 == 3) poll();
    float mine = emxi_inf();
#pragma unroll
    for (int r = 0; r < R; r++)
      if (r == my_r) mine = limit[r];
    uint32_t alive = __ballot_sync(EMXI_FULL, bound > mine || bound != bound);
    alive = (alive | alive >> 8 | alive >> 16 | alive >> 24) & 0xff;
    int n = 0;
    if (alive) {
      const int left = it.length - c * CHUNK < CHUNK ? (int)(it.length - c * CHUNK) : CHUNK;
      int last_page = -1;
      codes += __popc(alive);
      while (alive) {
        int g[STEP], c_of[STEP][4];
        int32_t place[STEP];
#pragma unroll
        for (int j = 0; j < STEP; j++) {
          g[j] = alive ? __ffs(alive) - 1 : -1;
          alive &= alive - 1;
          place[j] = __shfl_sync(EMXI_FULL, at, g[j] < 0 ? 0 : g[j]);
#pragma unroll
          for (int i = 0; i < 4; i++) c_of[j][i] = 0;
        }
        /* lane (group j, row): what the bounds of the group's keys have in common. Its record comes with the codes. */
        const int my_j = R == 1 ? t : lane / R % STEP, my_row = R == 1 ? 0 : t;
        int my_group = g[0], my_place = place[0];
#pragma unroll
        for (int i = 1; i < STEP; i++)
          if (my_j == i) my_group = g[i], my_place = place[i];
        const float u = __shfl_sync(EMXI_FULL, bound, my_row * CHUNK_GROUPS + (my_group < 0 ? 0 : my_group));
        float2 radius = make_float2(0, 0);
        float4 tail = make_float4(0, 0, 0, 0); /* size, step, error */
        if (my_group >= 0) {
          radius = __ldg((const float2 *)&pool.sketch.group[my_place].radius);
          tail = __ldg((const float4 *)&pool.sketch.group[my_place].size);
        }
        uint4 x[STEP][WORDS];
#pragma unroll
        for (int w = 0; w < WORDS; w++)
#pragma unroll
          for (int j = 0; j < STEP; j++)
            x[j][w] = g[j] < 0 || w >= dims
                          ? make_uint4(0, 0, 0, 0)
                          : __ldg((const uint4 *)(pool.sketch.codes + (int64_t)place[j] * (GROUP / 2) * dp) + w * 32 + lane);
#pragma unroll
        for (int w = 0; w < WORDS; w++)
#pragma unroll
          for (int j = 0; j < STEP; j++) {
            constexpr uint32_t LOW = 0x0f0f0f0fu;
            const uint4 &p = x[j][w];
            dot_tile(c_of[j], p.x & LOW, p.y & LOW, p.x >> 4 & LOW, p.y >> 4 & LOW, column[w][0], column[w][1]);
            dot_tile(c_of[j], p.z & LOW, p.w & LOW, p.z >> 4 & LOW, p.w >> 4 & LOW, column[w][2], column[w][3]);
          }
        float base = -emxi_inf(), scale = 0;
        if (my_group >= 0 && my_row < it.rows) {
          const cert_query &q = query[my_row];
          base = u;
          if (u < emxi_inf() && tail.x > 0) {
            scale = 0.5f * q.s2 * tail.y;
            base = key_base(q, u, radius, make_float2(tail.z, tail.w), scale);
          } else if (u > -emxi_inf()) {
            base = emxi_inf(); /* nothing is known */
          }
        }
        /* Keys of the `first`-th group of the chunk (a number of the lane's own with one row) whose bound is above the limit, from ballots
         * of lanes 4 key + row, or 4 key + j: keys 0..7, then 8..15. */
        const auto above = [&](int group, const int(&c)[4], float b, float f, int row, float lim, bool(&pass)[2]) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int dot = 508 * c[2 * i] + 2 * c[2 * i + 1] - 15 * query[row].sum;
            pass[i] = group >= 0 && row < it.rows && group * GROUP + 8 * i + key < left && !(fmaf(f, (float)dot, b) <= lim);
          }
        };
        const auto note_page = [&](int group) {
          const int page = group * GROUP >> pool.shift;
          pages += page != last_page;
          last_page = page;
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
          above(my_group, c_mine, base, scale, 0, limit[0], pass);
          const uint32_t low = __ballot_sync(EMXI_FULL, pass[0]), high = __ballot_sync(EMXI_FULL, pass[1]);
          if (low | high) {
            const uint32_t self = 0x11111111u << t, before = 0x11111111u * ((1u << t) - 1), below = (1u << lane) - 1;
            const int start = n + __popc(low & before) + __popc(high & before);
            if (pass[0]) queue[warp][start + __popc(low & self & below)] = (uint8_t)(my_group * GROUP + key);
            if (pass[1])
              queue[warp][start + __popc(low & self) + __popc(high & self & below)] = (uint8_t)(my_group * GROUP + 8 + key);
            n += __popc(low) + __popc(high);
#pragma unroll
            for (int j = 0; j < STEP; j++)
              if ((low | high) & 0x11111111u << j) note_page(g[j]);
          }
        } else {
          float lim = emxi_inf();
#pragma unroll
          for (int r = 0; r < R; r++)
            if (r == t) lim = limit[r];
#pragma unroll
          for (int j = 0; j < STEP; j++) {
            const float b = __shfl_sync(EMXI_FULL, base, R * j + t), f = __shfl_sync(EMXI_FULL, scale, R * j + t);
            bool pass[2];
            above(g[j], c_of[j], b, f, t < it.rows ? t : 0, t < it.rows ? lim : emxi_inf(), pass);
            uint32_t keys[2];
#pragma unroll
            for (int i = 0; i < 2; i++) keys[i] = __ballot_sync(EMXI_FULL, pass[i]);
            if (!(keys[0] | keys[1])) continue;
#pragma unroll
            for (int i = 0; i < 2; i++) {
              uint32_t any = keys[i] | keys[i] >> 1; /* of some row */
              any = (any | any >> 2) & 0x11111111u;
              if (any >> lane & 1) queue[warp][n + __popc(any & ((1u << lane) - 1))] = (uint8_t)(g[j] * GROUP + 8 * i + key);
              n += __popc(any);
            }
            note_page(g[j]);
          }
        }
      }
      __syncwarp();
    }
    int count[R];
    float top[R];
    bool raised[R];
#pragma unroll
    for (int r = 0; r < R; r++) count[r] = 0, top[r] = -emxi_inf(), raised[r] = false;
    if (n) {
      tokens += n;
      cert_reader<T, FIXED, R, R == 1 ? 8 : 4>::read(
          a, it, shared_q, query, n, [&](int i) { return c * CHUNK + queue[warp][i]; },
          [&](int i, int64_t position, int row, float score) {
            if (i >= 0 && !(score < emxi_inf())) bad |= 1u << row;
#pragma unroll
            for (int r = 0; r < R; r++) {
              const bool here = i >= 0 && row == r && score > limit[r];
              const uint32_t mask = __ballot_sync(EMXI_FULL, here);
              if (i >= 0 && row == r && score < emxi_inf()) top[r] = fmaxf(top[r], score);
              if (!mask) continue;
              if (here) {
                const int64_t to_place = (query[r].row * a.chunks + c) * CHUNK + count[r] + __popc(mask & ((1u << lane) - 1));
                a.z[to_place] = score;
                a.local[to_place] = (uint8_t)(position % CHUNK);
                const emxi_cuda_cert *cert = &a.cert[query[r].row];
                const float bin = (score - cert->slack - cert->base) / BIN - 1e-3f;
                if (bin >= 0 && score < emxi_inf()) atomicAdd(&a.cert_bins[query[r].row * BINS + (int)fminf(bin, BINS - 1)], 1u);
              }
              count[r] += __popc(mask);
              raised[r] |= __any_sync(EMXI_FULL, here && score > limit[r] + 0.125f);
            }
          });
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      if (r >= it.rows) continue;
      if (n) top[r] = from_ordered(__reduce_max_sync(EMXI_FULL, to_ordered(top[r])));
      if (lane == 0) {
        a.count[query[r].row * a.chunks + c] = (uint8_t)count[r];
        a.chunk_max[query[r].row * a.chunks + c] = top[r];
        if (n) atomicMax(&shared_max[r], to_ordered(top[r]));
      }
      if (raised[r]) {
        __threadfence();
        raise_limit(a, query[r].row, alpha_of(a, head_of(a, query[r].row)), limit[r]);
      }
    }
    if (n) poll();
  }
  if (bad) atomicOr(&shared_bad, (int)bad);
  if (lane == 0) {
    for (int r = 0; r < it.rows; r++) {
      emxi_cuda_cert *cert = &a.cert[query[r].row];
      if (tokens) atomicAdd(&cert->tokens, tokens), atomicAdd(&cert->pages, pages);
      if (codes) atomicAdd(&cert->codes, codes);
    }
  }
  __syncthreads();
  if ((int)threadIdx.x < it.rows) {
    a.split_max[query[threadIdx.x].row * a.splits + split] = from_ordered(shared_max[threadIdx.x]);
    a.bad[query[threadIdx.x].row * a.splits + split] = shared_bad >> threadIdx.x & 1;
  }
}

template <typename T, int FIXED, int R>
void certified_any(const emxi_cuda_decode &d, cudaStream_t stream) {
  emxi_cuda_judge(&d, stream);
  launch(seed<T, FIXED>, (unsigned)(d.batch.n * d.H * d.S), SEED_THREADS, 0, stream, d.overlap, d);
  if (d.cert_limit) return emxi_cuda_limits(&d, stream);
  launch(sieve<T, FIXED, R>, (unsigned)(d.batch.n * d.pool.G * d.blocks * d.splits), CERT_THREADS, 0, stream, d.overlap, d);
}
/* What comes before ALL's scan, which then does flat items only. */
template <typename T>
void certified(const emxi_cuda_decode &d, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (d.vectors && d.pool.D == 64) return d.rows == 1 ? certified_any<T, 64, 1>(d, stream) : certified_any<T, 64, 4>(d, stream);
    if (d.vectors && d.pool.D == 128)
      return d.rows == 1 ? certified_any<T, 128, 1>(d, stream) : certified_any<T, 128, 4>(d, stream);
  }
  certified_any<T, 0, 4>(d, stream);
}

} // namespace

#endif
