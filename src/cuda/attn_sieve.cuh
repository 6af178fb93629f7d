/* SPDX-License-Identifier: Apache-2.0
 * Candidates of every row, forward, on sm_90a: 16-bit q and k, head dims up to 128, heads without an ALiBi slope. What scan_keys does
 * elsewhere.
 *
 * A block has 192 queries of a head: three warpgroups hold 64 each in registers and multiply them (wgmma) with tiles of 128 keys, which a
 * fourth copies through a ring in shared memory. Tiles are visited so:
 *   1. the edges, of which some row sees a part only (the diagonal), then every second tile: the maxima of 64 classes of columns a row stay
 *      in registers (half an instruction a score, no branch). The threshold of these 64 scores is a lower bound of the row's (T1 of
 *      docs/math.md: they are scores of 64 keys of the row), and close to it. The edges alone give a first bound, and a tile with a score
 *      above its row's first bound is marked, for each warpgroup. Where few tiles are, the other half is looked at in the same way.
 *   2. the edges again, what has not been looked at, and marked tiles: scores above the bound are listed. A tile without a mark has
 *      nothing above a lower bound of its rows' thresholds, hence no weight: clustered keys need hardly a second product. A list that is
 *      full has its row's bound raised to its own threshold. Where every row's list is full even so (flat rows), the block ends.
 * Cost: 2 D FLOP a visible pair times 1 and the share of marked tiles (1.5 where most are), 2 D bytes of K a pair of a key and a block.
 *
 * docs/numerics.md has the roundings. A row's list has four parts, one of each lane that holds scores of the row, entry by entry in turns
 * (`quads`): product of q and k, and position. */
#ifndef EMXI_CUDA_ATTN_SIEVE_CUH
#define EMXI_CUDA_ATTN_SIEVE_CUH

#include "attn_scan.cuh"

namespace {

constexpr int SIEVE_FEW = 40;   /* per cent of marked tiles: where a second visit is cheaper than longer lists */
constexpr int SIEVE_LOOK = 6;   /* visits of the second pass, after the edges, before a block looks whether it has lists to fill */
constexpr int SIEVE_WORDS = 32; /* of marks: 32 sampled tiles each, or as many times a power of two */

template <int D>
struct sieve_of {
  static constexpr int STAGES = D == 64 ? 5 : 3, STAGE_BYTES = D / 64 * FAST_KEYS * 128;
  static constexpr size_t SHARED = STAGES * STAGE_BYTES + 1024 + QUEUE * QUEUE_STEP;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* p = y^b and u = y^(b-1) for a bound: errors of a few 1e-6 at exponents up to 8 are within SIEVE_SLACK. */
constexpr float SIEVE_SLACK = 3e-5f;
__device__ __forceinline__ void quick_weigh(const powers &w, float y, float *p, float *u) {
  *u = w.kind == 2 ? y : w.kind == 1 ? (y > 0 ? 1.0f : 0.0f) : y > 0 ? exp2f((w.b - 1) * __log2f(y)) : 0.0f;
  *p = *u * y;
}
/* A lower bound of the threshold of scores z[n] a lane, over lanes that `sum` adds up: upwards from x, itself a bound, relative to their
 * top. KIND: powers::kind, so that loops have no choice in them. */
template <int KIND, int N, typename Z, typename S>
__device__ __forceinline__ float newton(const powers &w, float c, float top, float x, const Z &z, const S &sum) {
  const powers of = {w.b, KIND};
  for (int step = 0; step < 9; step++) {
    float f = 0, g = 0;
#pragma unroll
    for (int j = 0; j < N; j++) {
      float p, u;
      quick_weigh(of, fmaxf((z(j) - top) * c - x, 0.0f), &p, &u);
      f += p, g += u;
    }
    f = sum(f), g = sum(g);
    float e = (f - (KIND == 2 ? sqrtf(f) : KIND == 1 ? 1.0f : exp2f((1.0f - 1.0f / w.b) * __log2f(f)))) / g;
    e = f > 1 ? fmaxf(e, 0.0f) : 0.0f;
    x += e;
    if (!__any_sync(~0u, e > 1e-3f)) break;
  }
  return x;
}
template <int N, typename Z, typename S>
__device__ __forceinline__ float raise_bound(const powers &w, float c, float top, float x, const Z &z, const S &sum) {
  if (w.kind == 2)
    x = newton<2, N>(w, c, top, x, z, sum);
  else if (w.kind == 1)
    x = newton<1, N>(w, c, top, x, z, sum);
  else if (w.b <= 8)
    x = newton<0, N>(w, c, top, x, z, sum);
  const float bound = top + (x - (w.kind ? 6e-6f : SIEVE_SLACK)) / c; /* more than the sums lose */
  return bound - 2e-7f * (fabsf(top) + fabsf(bound));
}
#endif

template <typename T, int D>
__global__ void __launch_bounds__(FAST_THREADS, 1) sieve(const __grid_constant__ emxi_cuda_attn a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int STAGES = sieve_of<D>::STAGES, KB = sieve_of<D>::STAGE_BYTES, KEYS = FAST_KEYS;
  extern __shared__ __align__(1024) char shared_raw[];
  __shared__ uint64_t full[STAGES], empty[STAGES], known, marked, looked;
  __shared__ int busy; /* some row may have a list */
  __shared__ uint32_t marks[FAST_GROUPS][SIEVE_WORDS];
  char *ks = (char *)(((uintptr_t)shared_raw + 1023) & ~(uintptr_t)1023);

  /* where: head by head, whose keys stay in the second-level cache; blocks of 192 queries, those that see most keys first */
  const int64_t heads = (int64_t)a.ng * a.group;
  const int64_t block = a.q_blocks - 1 - blockIdx.x % a.q_blocks, rest = blockIdx.x / a.q_blocks;
  int b = a.b0 + (int)(rest / heads);
  if (a.packed) {
    int hi = a.batch;
    for (b = 0; hi - b > 1;) {
      const int mid = (b + hi) / 2;
      (a.span[mid].q_block <= block ? b : hi) = mid;
    }
  }
  const emxi_cuda_span sp = a.span[b];
  const int head = (int)(rest % heads), h = a.g0 * a.group + head,
            row0 = (int)((block - (a.packed ? sp.q_block : 0)) * FAST_ROWS);
  if (row0 >= sp.s || !is_asked_for(a, h)) return;
  const int64_t slice_row = (a.packed ? head * a.rows_q + sp.q0 : ((int64_t)(b - a.b0) * heads + head) * a.max_q) + row0;
  const double alpha = alpha_of(a, h);
  const bool good = alpha_is_good(alpha) && alpha != 1.0;
  const int rows = min(FAST_ROWS, sp.s - row0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, group = warp / 4;
  const int lr0 = group * 64 + warp % 4 * 16 + lane / 4, lr1 = lr0 + 8, part = lane & 3, col0 = part * 2; /* of this lane */
  const bool live0 = group < FAST_GROUPS && lr0 < rows, live1 = group < FAST_GROUPS && lr1 < rows;
  const key_range first_row = visible(a, sp, row0), last_row = visible(a, sp, row0 + rows - 1);
  if (!(good && last_row.to > first_row.from)) {
    const auto none = [&](int lr) {
      const key_range vis = visible(a, sp, row0 + lr);
      a.n_list[slice_row + lr] = vis.to <= vis.from ? 0 : alpha == 1.0 ? EMXI_CUDA_ROW_DENSE : EMXI_CUDA_ROW_NAN;
      a.at[slice_row + lr] = 0;
    };
    if (live0 && part == 0) none(lr0);
    if (live1 && part == 0) none(lr1);
    return;
  }
  const int tile_lo = first_row.from / KEYS, tile_hi = (last_row.to + KEYS - 1) / KEYS;
  /* tiles that every row sees whole; but for the last, whose maxima are taken as floats */
  int in_lo = (last_row.from + KEYS - 1) / KEYS, in_hi = min(first_row.to / KEYS, tile_hi - 1);
  if (in_lo >= in_hi) in_lo = in_hi = tile_lo;
  const int above = tile_hi - in_hi, edges = above + in_lo - tile_lo, inside = in_hi - in_lo, even = (inside + 1) / 2;
  const auto edge = [&](int i) { return i < above ? tile_hi - 1 - i : in_lo - 1 - (i - above); };
  const auto sample = [&](int i) { return in_lo + (i < even ? 2 * (even - 1 - i) : 2 * (i - even) + 1); };
  int coarse = 0; /* a mark stands for 2^coarse sampled tiles */
  while ((inside - 1) >> coarse >= 32 * SIEVE_WORDS) coarse++;
  for (int i = threadIdx.x; i < FAST_GROUPS * SIEVE_WORDS; i += FAST_THREADS) (&marks[0][0])[i] = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(&full[i], 128), barrier_init(&empty[i], 4 * FAST_GROUPS);
    barrier_init(&known, 4 * FAST_GROUPS), barrier_init(&marked, 4 * FAST_GROUPS);
    barrier_init(&looked, 4 * FAST_GROUPS);
    busy = 0;
    barriers_ready();
  }
  __syncthreads();
  /* Tiles of the first pass: after the even ones, if few of them are marked, the others. Counted before the last that the ring may hold, so
   * that nobody waits. */
  const int counted = max(0, even - 2 * STAGES) >> coarse;
  const auto sampled_of = [&]() {
    if (!counted) return even;
    barrier_wait(&known, 0);
    int n = 0;
    for (int i = 0; i < FAST_GROUPS; i++)
      for (int j = 0; j <= (counted - 1) / 32; j++)
        n += __popc(*(volatile uint32_t *)&marks[i][j] & (counted - 32 * j >= 32 ? ~0u : (1u << (counted - 32 * j)) - 1));
    return 100 * n <= SIEVE_FEW * FAST_GROUPS * counted ? inside : even;
  };
  /* The second pass: its tiles one by one, and whether this group wants them. `settle` runs before marks are read. */
  int sampled = even, step = 0, word = -1, from = 0, upto = 0;
  uint32_t left = 0, own = 0;
  const auto next_visit = [&](int *tile, bool *mine, auto settle) {
    *mine = true;
    if (step < edges + inside - sampled) {
      *tile = step < edges ? edge(step) : sample(step - edges + sampled);
      step++;
      return true;
    }
    if (word < 0) {
      settle();
      barrier_wait(&marked, 0);
    }
    if (from == upto) { /* the next mark */
      while (!left) {
        if (++word << (5 + coarse) >= sampled) return false;
        own = marks[group % FAST_GROUPS][word];
        left = marks[0][word] | marks[1][word] | marks[2][word];
      }
      from = (32 * word + __ffs(left) - 1) << coarse;
      upto = min(from + (1 << coarse), sampled);
      left &= left - 1;
    }
    *mine = own >> (from >> coarse & 31) & 1;
    *tile = sample(from++);
    return true;
  };
  /* Before the visit that all warps, and the copier, know by its number: every warp says (an OR) whether it has work left. */
  int visits = 0;
  const auto is_over = [&]() {
    if (visits++ != edges + SIEVE_LOOK) return false;
    barrier_wait(&looked, 0);
    return *(volatile int *)&busy == 0;
  };
  if (group == FAST_GROUPS) { /* the copier */
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    const T *keys = (const T *)row_of(a.k, b, h / a.group, sp.k0);
    const int64_t stride = a.k.row;
    constexpr int LAG = STAGES > 3 ? 2 : 1, PER_ROW = D / 8,
                  STEP = 128 / PER_ROW; /* rows that 128 threads copy at once: a multiple of 8 */
    const int t = threadIdx.x - 128 * FAST_GROUPS, chunk = t % PER_ROW, row = t / PER_ROW, bytes = chunk * 8 < a.d ? 16 : 0;
    int stage = 0, next = 0, ahead = 0; /* next: the stage to be handed over next; ahead: copies under way */
    uint32_t phase = 1;
    const auto copy = [&](int tile) {
      barrier_wait(&empty[stage], phase);
      const int left = sp.n - (tile * KEYS + row);
      uint32_t to = shared_address(ks + stage * KB) + (chunk / 8) * (KEYS * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
      const T *from = keys + (int64_t)(tile * KEYS + row) * stride + chunk * 8;
#pragma unroll 4
      for (int i = 0; i < KEYS / STEP; i++) {
        const bool real = i * STEP < left && bytes;
        copy16(to, real ? from : keys, real ? 16 : 0);
        to += STEP * 128;
        from += STEP * stride;
      }
      if (++stage == STAGES) stage = 0, phase ^= 1;
      asm volatile("cp.async.commit_group;" ::: "memory");
      if (++ahead <= LAG) return;
      asm volatile("cp.async.wait_group %0;" ::"n"(LAG) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      barrier_arrive(&full[next]);
      if (++next == STAGES) next = 0;
      ahead--;
    };
    const auto hand_over = [&]() { /* all of them */
                                   asm volatile("cp.async.wait_group 0;" ::: "memory");
                                   asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                                   for (; ahead; ahead--) {
                                     barrier_arrive(&full[next]);
                                     if (++next == STAGES) next = 0;
                                   }
    };
    for (int i = 0; i < edges; i++) copy(edge(i));
    for (int i = 0; i < even; i++) copy(sample(i));
    sampled = sampled_of();
    for (int i = even; i < sampled; i++) copy(sample(i));
    int tile;
    bool mine;
    while (next_visit(&tile, &mine, hand_over)) {
      if (visits == edges + SIEVE_LOOK) hand_over();
      if (is_over()) break;
      copy(tile);
    }
    hand_over();
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
  const powers w = powers_of(alpha);
  const float c = (float)(alpha - 1.0) * a.scale; /* of a product of q and k */
  key_range vis0 = {0, 0}, vis1 = {0, 0};
  if (live0) vis0 = visible(a, sp, row0 + lr0);
  if (live1) vis1 = visible(a, sp, row0 + lr1);
  uint32_t qf[D / 16][4];
#pragma unroll
  for (int k = 0; k < D / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int r = i & 1 ? lr1 : lr0, d = 16 * k + col0 + (i & 2 ? 8 : 0);
      qf[k][i] = r < rows && d < a.d ? *(const uint32_t *)(row_of(a.q, b, h, sp.q0 + row0 + r) + 2 * d) : 0;
    }
  float acc0[32], acc1[32];
  const uint64_t first_descriptor = matrix_descriptor(shared_address(ks));
  int stage = 0;
  uint32_t phase = 0;
  const auto hold = [&](float(&d)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) asm volatile("" : "+f"(d[i])::"memory");
  };
  const auto multiply = [&](float(&d)[32], int half) {
    const uint64_t at = first_descriptor + (uint32_t)(stage * (KB >> 4) + half * (64 * 128 >> 4));
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < D / 16; k++) wgmma<T>(d, qf[k], at + (k / 4) * (KEYS * 128 >> 4) + (k % 4) * 2, k > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  };
  const auto free_stage = [&]() {
    if (lane == 0) barrier_arrive(&empty[stage]);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    phase ^= stage == 0;
  };
  /* f(products, half) of the tile that comes next */
  const auto visit = [&](auto f) {
    barrier_wait(&full[stage], phase);
    multiply(acc0, 0);
    multiply(acc1, 1);
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    hold(acc0);
    f(acc0, 0);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    free_stage();
    hold(acc1);
    f(acc1, 1);
  };
  bool odd0 = false, odd1 = false; /* a NaN or +inf that the row sees */
  const auto mask = [&](float(&d)[32], int tile, int half) {
    const int base = tile * KEYS + half * 64 + col0;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int at = base + 8 * j + e;
        if (at < vis0.from || at >= vis0.to) d[4 * j + e] = -emxi_inf();
        if (at < vis1.from || at >= vis1.to) d[4 * j + 2 + e] = -emxi_inf();
        odd0 |= !(d[4 * j + e] < emxi_inf());
        odd1 |= !(d[4 * j + 2 + e] < emxi_inf());
      }
  };

  /* the first pass */
  float f0, f1; /* products at or below it have no weight */
  {
    int m0[16], m1[16];
#pragma unroll
    for (int j = 0; j < 16; j++) m0[j] = m1[j] = (int)0xff800000;
    for (int i = 0; i < edges; i++)
      visit([&](float(&d)[32], const int half) {
        mask(d, edge(i), half);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          int &x = m0[half * 8 + j], &y = m1[half * 8 + j];
          x = __float_as_int(fmaxf(__int_as_float(x), fmaxf(d[4 * j], d[4 * j + 1])));
          y = __float_as_int(fmaxf(__int_as_float(y), fmaxf(d[4 * j + 2], d[4 * j + 3])));
        }
      });
    float top0, top1;
    /* The threshold of the maxima; a bound that is not known, of a row with a NaN or without a key, is -inf. */
    const auto bounds = [&](float from0, float from1) {
      const auto quads = [](float x) { return quad_sum(x); };
      top0 = top1 = -emxi_inf();
#pragma unroll
      for (int j = 0; j < 16; j++) {
        odd0 |= m0[j] >= 0x7f800000;
        odd1 |= m1[j] >= 0x7f800000;
        top0 = fmaxf(top0, __int_as_float(m0[j]));
        top1 = fmaxf(top1, __int_as_float(m1[j]));
      }
      top0 = quad_max(top0);
      top1 = quad_max(top1);
      f0 = raise_bound<16>(
          w, c, top0, fmaxf(-1.0f, (from0 - top0) * c), [&](int j) { return __int_as_float(m0[j]); }, quads);
      f1 = raise_bound<16>(
          w, c, top1, fmaxf(-1.0f, (from1 - top1) * c), [&](int j) { return __int_as_float(m1[j]); }, quads);
      if (!(f0 < emxi_inf())) f0 = -emxi_inf();
      if (!(f1 < emxi_inf())) f1 = -emxi_inf();
    };
    bounds(-emxi_inf(), -emxi_inf());
    if (inside) {
      const float first0 = live0 ? f0 : emxi_inf(), first1 = live1 ? f1 : emxi_inf();
      const bool all = !__all_sync(~0u, first0 > 0 && first1 > 0); /* maxima of integers mean nothing below zero */
      for (int i = 0; i < sampled; i++) {
        bool some = all;
        /* As integers floats compare as they should where one is positive; of negative ones some is taken, and any score of the row
         * will do. NaN and +inf come out on top. */
        visit([&](float(&d)[32], const int half) {
          int t0 = __float_as_int(d[0]), t1 = __float_as_int(d[2]);
#pragma unroll
          for (int j = 0; j < 8; j++) {
            int &x = m0[half * 8 + j], &y = m1[half * 8 + j];
            const int d0 = __float_as_int(d[4 * j]), d1 = __float_as_int(d[4 * j + 1]), d2 = __float_as_int(d[4 * j + 2]),
                      d3 = __float_as_int(d[4 * j + 3]);
            x = __vimax3_s32(x, d0, d1);
            t0 = __vimax3_s32(t0, d0, d1);
            y = __vimax3_s32(y, d2, d3);
            t1 = __vimax3_s32(t1, d2, d3);
          }
          some |= __int_as_float(t0) > first0 || __int_as_float(t1) > first1;
        });
        if (__any_sync(~0u, some) && lane == 0) atomicOr(&marks[group][i >> (5 + coarse)], 1u << (i >> coarse & 31));
        if (i + 1 == counted << coarse && lane == 0) barrier_arrive(&known);
        if (i + 1 == even) sampled = sampled_of();
      }
      bounds(first0, first1);
    }
    if (lane == 0) barrier_arrive(&marked);
  }
  odd0 = __ballot_sync(~0u, odd0) >> (lane & ~3) & 15;
  odd1 = __ballot_sync(~0u, odd1) >> (lane & ~3) & 15;
  if (odd0 || vis0.to <= vis0.from) f0 = emxi_inf();
  if (odd1 || vis1.to <= vis1.from) f1 = emxi_inf();
  bool positive = __all_sync(~0u, f0 > 0 && f1 > 0);

  /* the second pass */
  const uint64_t list0 = (uint64_t)(a.entry + (slice_row + lr0) * CAP + part), list1 = list0 + 8 * CAP * sizeof(emxi_cuda_entry);
  int n0 = 0, n1 = 0;
  bool over0 = false, over1 = false;
  const uint32_t queue = shared_address(ks + STAGES * KB) + threadIdx.x * 8, limit = queue + (QUEUE - 8) * QUEUE_STEP;
  uint32_t tail = queue;
  int largest0 = 0, largest1 = 0; /* of products above the bounds; NaN and +inf on top */
  /* A row with a full part, lanes 4 q .. of which have it: its bound becomes the threshold of its list, and what is below goes. */
  const auto make_room = [&](int q, bool second) {
    emxi_cuda_entry *const list = a.entry + (slice_row + group * 64 + warp % 4 * 16 + q + (second ? 8 : 0)) * CAP;
    emxi_cuda_entry held[HELD];
    float top = -emxi_inf();
    const int n = __shfl_sync(~0u, second ? n1 : n0, 4 * q + part);
    const float old = __shfl_sync(~0u, second ? f1 : f0, 4 * q);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      held[i] = {-emxi_inf(), 0};
      if (lane / 4 + 8 * i < n) held[i] = list[lane + 32 * i];
      top = fmaxf(top, held[i].x);
    }
    top = warp_max(top);
    const float raised = raise_bound<HELD>(
        w, c, top, fmaxf(-1.0f, (old - top) * c), [&](int i) { return held[i].x; }, [](float x) { return warp_sum(x); });
    const uint32_t mine = 0x11111111u << part;
    int kept = 0;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      const uint32_t keep = __ballot_sync(~0u, held[i].x > raised) & mine;
      if (held[i].x > raised) list[4 * (kept + __popc(keep & ((1u << lane) - 1))) + part] = held[i];
      kept += __popc(keep);
    }
    __syncwarp();
    const bool over = __any_sync(~0u, kept > FAST_ROOM - 4);
    kept = __shfl_sync(~0u, kept, part);
    if (lane / 4 != q) return;
    kept = over ? 0 : kept;
    const float f = over ? emxi_inf() : fmaxf(old, raised);
    if (second)
      n1 = kept, f1 = f, over1 |= over;
    else
      n0 = kept, f0 = f, over0 |= over;
  };
  const auto flush = [&]() {
    for (uint32_t e = queue; __any_sync(~0u, e < tail); e += QUEUE_STEP) {
      if (e < tail) {
        float x[4];
        uint32_t at;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(e) : "memory");
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2+%3];" : "=f"(x[2]), "=f"(x[3]) : "r"(e), "n"(QUEUE_PART) : "memory");
        asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(at) : "r"(e), "n"(2 * QUEUE_PART) : "memory");
        const bool second = at & 1;
        const float f = second ? f1 : f0;
        int n = second ? n1 : n0;
        const uint64_t list = second ? list1 : list0;
#pragma unroll
        for (int i = 0; i < 4; i++) { /* without branches: a warp's lanes differ */
          const int in = x[i] > f;
          asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v2.b32 [%1], {%2, %3};\n}" ::"r"(in),
                       "l"(list + (uint64_t)(uint32_t)n * (4 * sizeof(emxi_cuda_entry))), "r"(__float_as_int(x[i])),
                       "r"((int32_t)(at >> 1) + 8 * (i / 2) + (i & 1))
                       : "memory");
          n += in;
        }
        if (second)
          n1 = n;
        else
          n0 = n;
      }
      if (!__any_sync(~0u, max(n0, n1) > FAST_ROOM - 4)) continue;
#pragma unroll 1
      for (int second = 0; second < 2; second++)
#pragma unroll 1
        for (uint32_t rest = __ballot_sync(~0u, (second ? n1 : n0) > FAST_ROOM - 4); rest;) {
          const int q = (__ffs(rest) - 1) / 4;
          make_room(q, second);
          rest &= ~(15u << 4 * q);
        }
    }
    tail = queue;
    __syncwarp();
  };
  const auto filter = [&](float(&d)[32], int tile, const int half) {
    const int base = tile * KEYS + half * 64 + col0;
    int top[2][4];
    if (positive) { /* in the order of the floats above zero, NaN on top */
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int g = 0; g < 4; g++)
          top[r][g] = max(__vimax3_s32(__float_as_int(d[8 * g + 2 * r]), __float_as_int(d[8 * g + 2 * r + 1]),
                                       __float_as_int(d[8 * g + 4 + 2 * r])),
                          __float_as_int(d[8 * g + 5 + 2 * r]));
    } else {
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int g = 0; g < 4; g++) {
          const float x0 = d[8 * g + 2 * r], x1 = d[8 * g + 2 * r + 1], x2 = d[8 * g + 4 + 2 * r], x3 = d[8 * g + 5 + 2 * r];
          const bool odd = !(x0 < emxi_inf()) || !(x1 < emxi_inf()) || !(x2 < emxi_inf()) || !(x3 < emxi_inf());
          top[r][g] = odd ? 0x7fc00000 : __float_as_int(fmaxf(fmaxf(x0, x1), fmaxf(x2, x3)));
        }
    }
    const int x0 = max(__vimax3_s32(top[0][0], top[0][1], top[0][2]), top[0][3]),
              x1 = max(__vimax3_s32(top[1][0], top[1][1], top[1][2]), top[1][3]);
    if (!positive || x0 > __float_as_int(f0) ||
        x1 > __float_as_int(f1)) { /* lanes with a hit queue it; lists are written from the queues */
      largest0 = max(largest0, x0);
      largest1 = max(largest1, x1);
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int g = 0; g < 4; g++)
          asm volatile(
              "{\n.reg .pred p;\nsetp.gt.f32 p, %1, %2;\n@p st.shared.v2.f32 [%0], {%3, %4};\n@p st.shared.v2.f32 [%0+%9], {%5, "
              "%6};\n"
              "@p st.shared.u32 [%0+%10], %7;\n@p add.u32 %0, %0, %8;\n}"
              : "+r"(tail)
              : "f"(__int_as_float(top[r][g])), "f"(r ? f1 : f0), "f"(d[8 * g + 2 * r]), "f"(d[8 * g + 2 * r + 1]),
                "f"(d[8 * g + 4 + 2 * r]), "f"(d[8 * g + 5 + 2 * r]), "r"(2 * base + 32 * g + r), "n"(QUEUE_STEP),
                "n"(QUEUE_PART), "n"(2 * QUEUE_PART)
              : "memory");
    }
  };
  for (bool more = true; more;) { /* one loop, and flush() in it as seldom as can be: its code is long */
    int tile;
    bool mine;
    more = next_visit(&tile, &mine, [] {});
    if (more && visits == edges + SIEVE_LOOK) {
      const bool open = __any_sync(~0u, f0 < emxi_inf() || f1 < emxi_inf());
      if (lane == 0) {
        if (open) busy = 1;
        barrier_arrive(&looked);
      }
      __syncwarp();
    }
    more = more && !is_over();
    if (more && mine) {
      const bool cut = tile < in_lo || tile >= in_hi;
      visit([&](float(&d)[32], const int half) {
        if (cut) mask(d, tile, half);
        filter(d, tile, half);
        if (half == 0 && __any_sync(~0u, tail > limit)) flush();
      });
    } else if (more) {
      barrier_wait(&full[stage], phase);
      free_stage();
    }
    if (!more || __any_sync(~0u, tail > limit)) flush();
  }
  odd0 |= largest0 >= 0x7f800000;
  odd1 |= largest1 >= 0x7f800000;
  odd0 = __ballot_sync(~0u, odd0) >> (lane & ~3) & 15;
  odd1 = __ballot_sync(~0u, odd1) >> (lane & ~3) & 15;
  const auto finish = [&](int lr, key_range vis, int n, float f, bool live, bool odd, bool over) {
    int counts = 0;
#pragma unroll
    for (int p = 0; p < 4; p++) counts |= __shfl_sync(~0u, n, (lane & ~3) + p) << 8 * p;
    n = quad_sum(n);
    if (!live || part) return;
    a.n_list[slice_row + lr] = vis.to <= vis.from ? 0 : odd ? EMXI_CUDA_ROW_NAN : over ? EMXI_CUDA_ROW_DENSE : n;
    a.at[slice_row + lr] = counts;
    a.bound[slice_row + lr] = f;
  };
  finish(lr0, vis0, n0, f0, live0, odd0, over0);
  finish(lr1, vis1, n1, f1, live1, odd1, over1);
#endif
}

} // namespace

#endif
