/* SPDX-License-Identifier: Apache-2.0
 * The threshold of decode.cuh's rows from their candidates, and the values of the support.
 *
 *   solve  block = (part, row). The true maximum and a bound from the largest scores of sets of chunks decide which candidates are left: a set,
 *          and an order, that do not depend on timing. Few are one block's, in shared memory: tau from bounds at 32 thresholds at a time, then
 *          in closed form in double, with values of up to MAX_HERE of them. Of many, all parts pack what is left and weigh it at several
 *          thresholds, and the last one solves, by bracketed steps in double.
 *   share  block = (row, part): values of all other rows; leaves at once for the rest. The last block adds up. */
#ifndef EMXI_CUDA_SOLVE_CUH
#define EMXI_CUDA_SOLVE_CUH

#include "scan.cuh"

namespace {

constexpr int MAX_HERE = 256; /* support whose values the block of the row reads by itself */
constexpr int PER_LANE = 8, MAX_ALIVE = 1024,
              LISTED = 4096; /* of a row that one block solves in shared memory: chunks, candidates */
enum { WIDE_NOT, WIDE_SEGMENTS, WIDE_PACKED };

/* ---- values */

/* Where the value at `position` begins, in elements. */
__device__ __forceinline__ int64_t value_at(const emxi_cuda_decode &a, const row_place &p, int64_t position) {
  const int32_t page =
      p.place ? p.place[position >> a.pool.shift] : table_page(a.batch, a.pool, p.table, p.b, position >> a.pool.shift);
  return page * a.pool.v_page + p.g * a.pool.v_head + (position & (a.pool.P - 1)) * a.pool.v_token;
}
/* acc += sum of p v over lanes with a bit in `active`, in ascending order: the warp reads 32 / L values at a time. The n-th of all
 * values, of all calls with the same `phase`, is added by lanes of group n % (32 / L), whichever calls they come in: places in
 * the scan's segments depend on timing, their order does not. */
template <typename T, int FIXED>
__device__ __forceinline__ void add_values(const emxi_cuda_decode &a, const row_place &place, uint32_t active, float p,
                                           int64_t position, int lane, uint64_t once, int &phase, float (&acc)[PER_LANE]) {
  using value_piece = piece<T, FIXED>;
  constexpr int L = value_piece::L, SUBS = 32 / L, AHEAD = 4;
  const int64_t start = active >> lane & 1 ? value_at(a, place, position) : 0;
  const int mine = (lane / L - phase) & (SUBS - 1);
  phase += __popc(active);
  while (active) {
    value_piece x[AHEAD];
    float w[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int from = 0;
      bool more = false;
#pragma unroll
      for (int sub = 0; sub < SUBS; sub++, active &= active - 1)
        if (sub == mine) more = active != 0, from = more ? __ffs(active) - 1 : 0;
      const int64_t at = __shfl_sync(EMXI_FULL, start, from);
      w[i] = __shfl_sync(EMXI_FULL, p, from);
      if (more)
        x[i].load((const T *)a.pool.v + at, lane % L, a.pool.D, once);
      else
        x[i].clear(), w[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      float f[8];
      x[i].get(f);
      if (w[i] > 0) {
#pragma unroll
        for (int e = 0; e < PER_LANE; e++) acc[e] = fmaf(w[i], f[e], acc[e]);
      }
    }
  }
}

/* ---- solve */

/* Scores above thr of a row with many, as `solve` has packed them: a list for each warp of each part. */
struct packed {
  const float *z;
  const int32_t *at, *n; /* at: where the scan has put them, counted along the row's segments */
  int lists;
};
__device__ __forceinline__ packed packed_of(const emxi_cuda_decode &a, int64_t row) {
  const int lists = a.parts * SOLVE_WARPS;
  return {a.packed_z + row * lists * a.packed, a.packed_at + row * lists * a.packed, a.packed_n + row * lists, lists};
}

/* What a block that solves a row has in shared memory. */
struct __align__(16) solve_space {
  float list[2 * LISTED];   /* scores, then positions; at first the largest scores of sets of chunks, at the end sums of values */
  int32_t alive[MAX_ALIVE]; /* chunks with a candidate; for bounds what each warp weighs */
  uint8_t alive_n[MAX_ALIVE]; /* candidates of the scan */
  double scratch[3][SOLVE_WARPS];
  double found[3]; /* by the first warp: threshold, one without margins, mass */
  float2 part_sum[SOLVE_WARPS], bound;
  int found_n, chosen_n, offsets[2][SOLVE_WARPS], offset[2][SOLVE_WARPS];
};
/* What all threads of the block know of the row. */
struct solve_row {
  int64_t row, chunks;
  int part, total; /* candidates: above thr, if they are few */
  threshold k;     /* with the largest score */
  float low, thr;  /* a lower bound of the threshold, relative to the largest score; what is not above thr has no weight */
  bool few, estimated;
};
__device__ __forceinline__ int32_t *positions_of(solve_space &space) { return (int32_t *)space.list + LISTED; }
__device__ __forceinline__ bool is_closed(const threshold &k) { return k.alpha == 2.0 || k.alpha == 1.5; }
/* How far a Newton step in float may end beyond the root. */
__device__ __forceinline__ constexpr float float_slack(bool closed) { return closed ? 2e-5f : 1e-4f; }
/* From thresholds that leave less no step is taken: sums of powers below the normal floats tell nothing. */
constexpr float LEAST_MASS = 1e-30f;
/* Newton's step on the norm of the positive parts, given the sums of their powers and of the powers one lower. The norm is
 * convex for alpha <= 2: a step ends at or below the root wherever it starts. */
template <bool CLOSED>
__device__ __forceinline__ float norm_step(bool two, float fa, float mass, float slope) {
  return __fdividef(mass - (!CLOSED ? slow_power(mass, 1.0f - fa)
                            : two   ? 1.0f
                                    : mass * rsqrtf(mass)),
                    slope) -
         float_slack(CLOSED);
}
/* Adds what y above the threshold contributes to those sums. CLOSED: alpha 1.5 and 2, without a branch. Else a power is off by
 * as much as that of a y that is off by a millionth. */
template <bool CLOSED>
__device__ __forceinline__ void add_float(bool two, float b, float y, float &mass, float &slope) {
  if constexpr (CLOSED) {
    y = fmaxf(y, 0.0f);
    const float one_lower = two ? (y > 0 ? 1.0f : 0.0f) : y;
    mass = fmaf(y, one_lower, mass);
    slope += one_lower;
  } else {
    const float p = y > 0 ? __powf(y, b) : 0.0f;
    mass += p;
    slope += y > 0 ? __fdividef(p, y) : 0.0f;
  }
}
/* By the block, alpha <= 2: a lower bound, relative to m, of the threshold of x[0..n), which is in shared memory with room for
 * three more, from one that is known. Lanes weigh x at a threshold each, warps a part of x; another turn does so between the
 * best step and the first lane with too little. Of 33 to 4,000 scores of N(0, 1) one turn ends 1e-3 from the root at most and
 * two 4e-7. Begins with a barrier. */
template <bool CLOSED>
__device__ __noinline__ float bound_of(solve_space &space, float *x, int n, int turns, float low, bool two, float fa, float fb,
                                       float m) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float high = !CLOSED ? -slow_power((float)n, -fa)
               : two   ? __fdividef(-1.0f, (float)n)
                       : -rsqrtf((float)n); /* of n equal scores */
  float2 *sums = (float2 *)space.alive;   /* [SOLVE_WARPS][32] */
  if (threadIdx.x < 3) x[n + threadIdx.x] = -emxi_inf();
  __syncthreads();
  for (int turn = 0; turn < turns; turn++) {
    const float t = fmaf((float)lane, (high - low) * (1.0f / 32), low);
    float mass = 0, slope = 0;
    for (int i = 4 * warp; i < n; i += 4 * SOLVE_WARPS) {
      const float4 four = *(const float4 *)(x + i);
      add_float<CLOSED>(two, fb, fmaf(fa, four.x - m, -t), mass, slope);
      add_float<CLOSED>(two, fb, fmaf(fa, four.y - m, -t), mass, slope);
      add_float<CLOSED>(two, fb, fmaf(fa, four.z - m, -t), mass, slope);
      add_float<CLOSED>(two, fb, fmaf(fa, four.w - m, -t), mass, slope);
    }
    sums[warp * 32 + lane] = make_float2(mass, slope);
    __syncthreads();
    if (warp == 0) {
      for (int w = 1; w < SOLVE_WARPS; w++) mass += sums[w * 32 + lane].x, slope += sums[w * 32 + lane].y;
      const float best = mass > LEAST_MASS ? t + norm_step<CLOSED>(two, fa, mass, slope) : low;
      low = fmaxf(low, from_ordered(__reduce_max_sync(EMXI_FULL, to_ordered(best))));
      high = from_ordered(__reduce_min_sync(EMXI_FULL, to_ordered(mass > 1 ? high : t)));
      if (lane == 0) space.bound = make_float2(low, high);
    }
    __syncthreads();
    low = space.bound.x, high = space.bound.y;
  }
  return low;
}

/* The warps' sums of values, which may lie where the list was: the row's output. */
__device__ __forceinline__ void store_values(const emxi_cuda_decode &a, const row_place &place, solve_space &space,
                                             const float (&acc)[PER_LANE]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = a.pool.D;
  float *sum = space.list; /* [SOLVE_WARPS][D] */
  __syncthreads();
#pragma unroll
  for (int e = 0; e < PER_LANE; e++)
    if (lane + 32 * e < D) sum[warp * D + lane + 32 * e] = acc[e];
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += SOLVE_THREADS) {
    float x = 0;
    for (int w = 0; w < SOLVE_WARPS; w++) x += sum[w * D + d];
    store_output(a, place, d, x);
  }
}

/* Rows of which `solve` does not have all in a short list, and other alphas than 1.5 and 2. Many candidates: a block packs
 * those of its chunks, and the last one of the row solves. */
template <typename T>
__device__ __noinline__ void solve_long(const emxi_cuda_decode &a, solve_space &space, const solve_row &known) {
  constexpr int POINTS = EMXI_CUDA_POINTS, MOST_PARTS = EMXI_CUDA_PARTS, ABREAST = 8;
  const int64_t row = known.row, chunks = known.chunks;
  const int part = known.part, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const row_place place = place_of(a, row);
  const float *chunk_max = a.chunk_max + row * a.chunks, *z = a.z + row * a.chunks * CHUNK;
  const uint8_t *count = a.count + row * a.chunks;
  emxi_cuda_wide *wide = &a.wide[row];
  const threshold k = known.k;
  const float m = k.m, fa = (float)k.a, fb = (float)k.b;
  const bool few = known.few, estimated = known.estimated, closed = is_closed(k), convex = k.alpha <= 2.0, two = k.alpha == 2.0;
  float *list = space.list;
  int32_t *position = positions_of(space);
  float low = known.low, thr = known.thr;
  int total = known.total, at;
  bool held = few, listed = true; /* in shared memory; in the packed lists: else scores are read where the scan has put them */
  const packed pack = packed_of(a, row);
  const auto add_closed = [two](float y, float &mass, float &slope) { add_float<true>(two, 0.0f, y, mass, slope); };
  const auto add_other = [fb](float y, float &mass, float &slope) { add_float<false>(false, fb, y, mass, slope); };
  if (!few) {
    /* The largest scores of the chunks are scores, too, and bound flat rows better than sets of them: up to 1,024 at many
     * thresholds, then all of them by Newton's steps. */
    if (convex) {
      constexpr int MOST = 1024;
      const int64_t stride = (chunks + MOST - 1) / MOST;
      const int n = (int)((chunks + stride - 1) / stride);
      for (int i = threadIdx.x; i < n; i += SOLVE_THREADS) list[i] = chunk_max[i * stride];
      low = closed ? bound_of<true>(space, list, n, 2, low, two, fa, fb, m)
                   : bound_of<false>(space, list, n, 2, low, two, fa, fb, m);
      /* of more than 16 million tokens a part, so that no thread adds up more than 256 of them in float */
      const int64_t apart = 4 * SOLVE_THREADS * (1 + chunks / (256 * SOLVE_THREADS));
      for (int step = 0; step < 4 && stride > 1; step++) {
        float mass = 0, slope = 0;
        const auto add_all = [&](auto add) {
          for (int64_t c = 4 * threadIdx.x; c < chunks; c += apart) {
            const float4 four = *(const float4 *)(chunk_max + c);
            const auto y_of = [&](int i, float x) { return c + i < chunks ? fmaf(fa, x - m, -low) : -1.0f; };
            add(y_of(0, four.x), mass, slope), add(y_of(1, four.y), mass, slope);
            add(y_of(2, four.z), mass, slope), add(y_of(3, four.w), mass, slope);
          }
        };
        closed ? add_all(add_closed) : add_all(add_other);
        warp_pair(mass, slope);
        __syncthreads();
        if (lane == 0) space.part_sum[warp] = make_float2(mass, slope);
        __syncthreads();
        const float2 of_warp = space.part_sum[lane % SOLVE_WARPS];
        mass = lane < SOLVE_WARPS ? of_warp.x : 0, slope = lane < SOLVE_WARPS ? of_warp.y : 0;
        warp_pair(mass, slope);
        if (!(mass > 1 && slope > 0)) break;
        const float by = closed ? norm_step<true>(two, fa, mass, slope) : norm_step<false>(two, fa, mass, slope);
        low += fmaxf(0.0f, by);
        if (by < -1e-3f * low) break;
      }
    }
    if (!estimated) thr = fmaxf(thr, nextafterf((float)((double)m + (double)low * k.b), -emxi_inf()));
    int alive = 0; /* how many candidates the scan has kept depends on timing; so many there may be */
    for (int64_t c = threadIdx.x; c < chunks; c += SOLVE_THREADS) alive += chunk_max[c] > thr;
    (void)block_offsets(alive, space.offset[0], &total);
    total = (int)min((int64_t)total * CHUNK, place.count);
    const int64_t share_of = (chunks + a.parts - 1) / a.parts, first = part * share_of,
                  end = first + share_of < chunks ? first + share_of : chunks;
    const int64_t slot = ((row * a.parts + part) * SOLVE_WARPS + warp) * a.packed;
    int n = 0;
    for (int64_t base = first + warp; base < end; base += SOLVE_WARPS * 4) { /* four chunks at a time, of few one for each warp */
      float v[4][CHUNK / 32];
#pragma unroll
      for (int u = 0; u < 4; u++) {
        const int64_t c = base + u * SOLVE_WARPS;
        const int there = c < end && chunk_max[c] > thr ? count[c] : 0;
#pragma unroll
        for (int j = 0; j < CHUNK / 32; j++) v[u][j] = 32 * j + lane < there ? z[c * CHUNK + 32 * j + lane] : -emxi_inf();
      }
#pragma unroll
      for (int u = 0; u < 4; u++)
#pragma unroll
        for (int j = 0; j < CHUNK / 32; j++) {
          const uint32_t mask = __ballot_sync(EMXI_FULL, v[u][j] > thr);
          const int to_place = n + __popc(mask & ((1u << lane) - 1));
          if (v[u][j] > thr && to_place < a.packed) {
            a.packed_z[slot + to_place] = v[u][j];
            a.packed_at[slot + to_place] = (int32_t)((base + u * SOLVE_WARPS) * CHUNK + 32 * j + lane);
          }
          n += __popc(mask);
        }
    }
    if (lane == 0) a.packed_n[(row * a.parts + part) * SOLVE_WARPS + warp] = n;
    /* What the part's candidates weigh at POINTS thresholds from the bound up to the largest that so many candidates allow. A
     * step on a convex norm ends below the root wherever it starts, so the best of the steps from all of them, over all parts,
     * is the bound that the last part goes on with. */
    const float most = k.alpha == 1.5   ? -rsqrtf((float)total)
                       : k.alpha == 2.0 ? -1.0f / (float)total
                                        : -slow_power((float)total, -fa),
                gap = (most - low) * (1.0f / POINTS);
    float *weights = (float *)space.alive; /* [SOLVE_WARPS][2 POINTS]: masses, then slopes */
    if (convex) {
      float sum[2 * POINTS];
#pragma unroll
      for (int i = 0; i < 2 * POINTS; i++) sum[i] = 0;
      __syncwarp();
      const auto add_all = [&](auto add) {
        for (int j = lane, packs = min(n, a.packed); j < packs; j += 128) {
          float y[4];
#pragma unroll
          for (int u = 0; u < 4; u++) y[u] = j + 32 * u < packs ? fmaf(fa, a.packed_z[slot + j + 32 * u] - m, -low) : -emxi_inf();
#pragma unroll
          for (int u = 0; u < 4; u++)
#pragma unroll
            for (int i = 0; i < POINTS; i++) add(fmaf(-(float)i, gap, y[u]), sum[i], sum[POINTS + i]);
        }
      };
      closed ? add_all(add_closed) : add_all(add_other);
      exchange_sum<2 * POINTS, 32>(sum, lane);
      weights[warp * 2 * POINTS + lane] = sum[0];
    }
    __threadfence();
    __syncthreads();
    if (warp == 0) {
      if (convex) {
        float sum = 0;
        for (int w = 0; w < SOLVE_WARPS; w++) sum += weights[w * 2 * POINTS + lane];
        a.points[(row * a.parts + part) * 2 * POINTS + lane] = sum;
        __threadfence();
        __syncwarp();
      }
      if (lane == 0) space.chosen_n = atomicAdd(&wide->arrived, 1u) == (uint32_t)a.parts - 1;
    }
    __syncthreads();
    if (!space.chosen_n) return;
    __threadfence();
    if (convex) {
      float mass = 0, best = -1.0f, of_part[MOST_PARTS];
#pragma unroll
      for (int i = 0; i < MOST_PARTS; i++)
        of_part[i] = i < a.parts ? __ldcg(a.points + (row * a.parts + i) * 2 * POINTS + lane) : 0.0f;
#pragma unroll
      for (int i = 0; i < MOST_PARTS; i++) mass += of_part[i];
      const float slope = __shfl_xor_sync(EMXI_FULL, mass, POINTS);
      if (lane < POINTS && mass > LEAST_MASS)
        best = fmaf((float)lane, gap, low) +
               (closed ? norm_step<true>(two, fa, mass, slope) : norm_step<false>(two, fa, mass, slope));
      low = fmaxf(low, warp_max(best));
      if (!estimated) thr = fmaxf(thr, nextafterf((float)((double)m + (double)low * k.b), -emxi_inf()));
    }
    /* What is above it, to shared memory: counted, then put where it belongs. A warp has the lists of one warp of every part. */
    const int n_list = lane < a.parts ? __ldcg(pack.n + lane * SOLVE_WARPS + warp) : 0;
    listed = !__syncthreads_or(n_list > a.packed);
    at = 0;
    for (int pass = 0; listed && pass < 2; pass++) {
      for (int i = 0; i < a.parts; i += ABREAST) {
        const float *from_z[ABREAST];
        int n_of[ABREAST], longest = 0;
#pragma unroll
        for (int u = 0; u < ABREAST; u++) {
          n_of[u] = __shfl_sync(EMXI_FULL, n_list, i + u);
          from_z[u] = pack.z + ((int64_t)(i + u) * SOLVE_WARPS + warp) * a.packed;
          longest = max(longest, n_of[u]);
        }
        for (int base = lane; base - lane < longest; base += 64) {
          float v[ABREAST][2];
#pragma unroll
          for (int u = 0; u < ABREAST; u++)
#pragma unroll
            for (int j = 0; j < 2; j++) v[u][j] = base + 32 * j < n_of[u] ? from_z[u][base + 32 * j] : -emxi_inf();
#pragma unroll
          for (int u = 0; u < ABREAST; u++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
              const uint32_t mask = __ballot_sync(EMXI_FULL, v[u][j] > thr);
              if (pass && v[u][j] > thr) list[at + __popc(mask & ((1u << lane) - 1))] = v[u][j];
              at += __popc(mask);
            }
        }
      }
      if (pass) break;
      at = __shfl_sync(EMXI_FULL, block_offsets(lane == 0 ? at : 0, space.offset[0], &total), 0);
      held = total <= 2 * LISTED;
      if (!held) break;
    }
    __syncthreads();
  }
  /* f(score) for everything above thr, by some thread, in an order that depends on nothing else. Packed lists are of other
   * blocks, behind a fence: plain loads, so that they come from the first-level cache when they are read again. */
  const auto each = [&](auto f) {
    if (held) {
      for (int i = threadIdx.x; i < total; i += SOLVE_THREADS) f(list[i]);
    } else if (listed) {
      for (int i = warp; i < pack.lists; i += SOLVE_WARPS)
        for (int j = lane, n = pack.n[i]; j < n; j += 128) {
          float v[4];
#pragma unroll
          for (int u = 0; u < 4; u++) v[u] = j + 32 * u < n ? pack.z[(int64_t)i * a.packed + j + 32 * u] : -emxi_inf();
#pragma unroll
          for (int u = 0; u < 4; u++) f(v[u]);
        }
    } else {
      /* Where a score lies in its segment depends on timing, how many above thr lie before it does not. */
      float *dense = list + warp * 2 * CHUNK;
      for (int64_t c = warp; c < chunks; c += 2 * SOLVE_WARPS) {
        float v[2][CHUNK / 32];
        int n[2] = {0, 0};
#pragma unroll
        for (int u = 0; u < 2; u++) {
          const int64_t chunk = c + u * SOLVE_WARPS;
          const int there = chunk < chunks && chunk_max[chunk] > thr ? count[chunk] : 0;
#pragma unroll
          for (int j = 0; j < CHUNK / 32; j++) v[u][j] = 32 * j + lane < there ? z[chunk * CHUNK + 32 * j + lane] : -emxi_inf();
        }
        __syncwarp();
#pragma unroll
        for (int u = 0; u < 2; u++)
#pragma unroll
          for (int j = 0; j < CHUNK / 32; j++) {
            const uint32_t mask = __ballot_sync(EMXI_FULL, v[u][j] > thr);
            if (v[u][j] > thr) dense[u * CHUNK + n[u] + __popc(mask & ((1u << lane) - 1))] = v[u][j];
            n[u] += __popc(mask);
          }
        __syncwarp();
#pragma unroll
        for (int u = 0; u < 2; u++)
          for (int j = lane; j < n[u]; j += 32) f(dense[u * CHUNK + j]);
      }
    }
  };
  /* The same numbers in every thread that works. A short list is the first warp's, which needs no barriers. */
  const bool alone = held && total <= MAX_HERE, works = !alone || warp == 0;
  const auto sums = [&](double t, double margin, double(&s)[3]) {
    s[0] = s[1] = s[2] = 0;
    if (alone) {
      for (int i = lane; i < total; i += 32) add_term(k, list[i], t, margin, s);
#pragma unroll
      for (int step = 16; step; step >>= 1)
#pragma unroll
        for (int i = 0; i < 3; i++) s[i] += __shfl_xor_sync(EMXI_FULL, s[i], step);
      return;
    }
    each([&](float score) { add_term(k, score, t, margin, s); });
    block_sums(s, space.scratch);
  };

  /* Root in [lo, hi], as in src/cpu/solver.inc: steps while they stay inside and make progress, else bisection (alpha > 2: of the
   * exponent, a flat row needs t relatively). 1e-14 is far below what the rounding of a float score moves. */
  double lo = low,
         hi = (k.alpha == 1.5   ? -rsqrt((double)total)
               : k.alpha == 2.0 ? -1.0 / (double)total
                                : -slow_power((double)total, -k.a)) *
              (1 - 1e-12),
         t = lo, last = 1e300, s[3];
  for (int iteration = 0; works && iteration < 300; iteration++) {
    double f;
    sums(t, 0, s);
    const double e = threshold_step(k, s, &f);
    if (f == 0) break;
    if (f > 0)
      lo = t;
    else
      hi = t;
    const double unit = k.alpha > 2.0 ? -lo * 1e-14 : 1e-14, middle = k.alpha > 2.0 ? -sqrt(lo * hi) : 0.5 * (lo + hi);
    double next = t + e;
    if (fabs(e) <= unit || hi - lo <= 2 * unit) {
      t = fmin(fmax(next, lo), hi);
      break;
    }
    if (!(next > lo && next < hi)) {
      next = middle;
      if (next <= lo || next >= hi) {
        t = lo;
        break;
      }
    } else if (k.alpha > 2.0 && fabs(e) > 0.25 * last) {
      next = middle;
    }
    last = fabs(next - t);
    t = next;
  }
  const double margin = k.alpha <= 2.0 ? 1e-13 : 0.0;
  if (works && closed) { /* in closed form from the support */
    double f;
    sums(t, margin, s);
    t += threshold_step(k, s, &f);
  }
  double exact = t;
  if (estimated && works) {
    t = a.choice[row].estimate - k.a * (double)m;
    if (a.tau_mode == EMX_TAU_CORRECTED) { /* steps inside [m-1, m], as on the CPU */
      double below = -1, above = 0;
      t = fmin(fmax(t, below), above);
      for (int i = 0; i < (a.tau_steps ? a.tau_steps : 3); i++) {
        sums(t, 0, s);
        const double f = (closed && k.alpha == 2.0 ? s[1] : s[2]) - 1.0,
                     g = !closed          ? s[1]
                         : k.alpha == 2.0 ? s[0]
                                          : s[1],
                     next = t + f * k.a / g;
        if (f >= 0)
          below = t;
        else
          above = t;
        t = next > below && next < above ? next : 0.5 * (below + above);
      }
    }
  }

  /* Weights: their sum and number. Values of a short list are added here, of a long one by all the device. */
  double result[3] = {0, 0, 0};
  const auto weigh = [&](float score) {
    const float p = weight_of(k, score, t);
    result[0] += p;
    result[1] += p > 0;
  };
  if (alone) {
    if (warp == 0) {
      for (int i = lane; i < total; i += 32) weigh(list[i]);
#pragma unroll
      for (int step = 16; step; step >>= 1)
#pragma unroll
        for (int i = 0; i < 2; i++) result[i] += __shfl_xor_sync(EMXI_FULL, result[i], step);
      if (lane == 0) space.found[0] = t, space.found[1] = exact, space.found[2] = result[0], space.found_n = (int)result[1];
    }
    __syncthreads();
    t = space.found[0], exact = space.found[1], result[0] = space.found[2], result[1] = space.found_n;
  } else {
    each(weigh);
    block_sums(result, space.scratch);
  }
  const bool here = few && result[1] <= MAX_HERE;
  if (threadIdx.x == 0) {
    wide->wide = here ? WIDE_NOT : !few && listed ? WIDE_PACKED : WIDE_SEGMENTS;
    wide->done = 0;
    wide->t = t;
    wide->m = m;
    wide->thr = thr;
    wide->exact = exact;
    wide->solved = 1;
    write_report(a, place, row, false, t + k.a * (double)m, result[0], (int64_t)result[1], (int64_t)result[1]);
  }
  if (!here) return;
  float acc[PER_LANE];
#pragma unroll
  for (int e = 0; e < PER_LANE; e++) acc[e] = 0;
  int phase = 0;
  for (int base = warp * 4; base < total;
       base += SOLVE_WARPS * 4) { /* four candidates a warp, so that a short list is read by all */
    const int i = base + lane;
    const bool there = lane < 4 && i < total;
    const float p = there ? weight_of(k, list[i], t) : 0.0f;
    add_values<T, 0>(a, place, __ballot_sync(EMXI_FULL, p > 0), p, there ? position[i] : 0, lane, 0, phase, acc);
  }
  store_values(a, place, space, acc);
}

/* Block = (part, row). All parts find out how many scores may matter. Few: part 0 has them in shared memory, and with no more
 * than MAX_HERE of them, as most rows have, all that follows is here: the code of a kernel is not in the instruction cache
 * when it starts, so there should not be much of it. */
template <typename T>
__global__ void __launch_bounds__(SOLVE_THREADS) solve(const __grid_constant__ emxi_cuda_decode a) {
  constexpr int KEPT = 16, MAX_TOPS = SOLVE_THREADS / 4,
                TURN = 4 * SOLVE_THREADS; /* chunk maxima of a thread: those of a million tokens; of a block at a time */
  __shared__ solve_space space;
  float *list = space.list;
  int32_t *position = positions_of(space), *alive = space.alive;
  const uint32_t n_rows = (uint32_t)(a.batch.n * a.H * a.S);
  const int64_t row = blockIdx.x % n_rows;
  const int part = (int)(blockIdx.x / n_rows), lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = a.pool.D;
  /* All that the kernel before does not write is looked at while it runs. */
  const row_place place = place_of(a, row);
  const int64_t chunks = (place.count + CHUNK - 1) / CHUNK;
  emxi_cuda_wide *wide = &a.wide[row];
  const double alpha = alpha_of(a, place.h);
  bool bad = alpha == 0;
  if ((int)threadIdx.x < D)
    bad |= !(fabsf(load_any(a.q, a.q_dtype,
                            place.b * a.q_stride[0] + place.h * a.q_stride[1] + place.s * a.q_stride[2] + threadIdx.x) *
                   a.scale) < emxi_inf());
  wait_for_previous();
  if (alpha == 1.0) { /* merge's row */
    if (threadIdx.x == 0 && part == 0) wide->wide = 0;
    return;
  }

  /* Four neighbouring chunks a thread, then the four that are TURN further on. Rows begin at multiples of four. */
  const float *chunk_max = a.chunk_max + row * a.chunks, *z = a.z + row * a.chunks * CHUNK;
  const uint8_t *count = a.count + row * a.chunks, *local = a.local + row * a.chunks * CHUNK;
  const int64_t from = 4 * (int64_t)threadIdx.x;
  float kept[KEPT];
  uint32_t kept_n[KEPT / 4]; /* four bytes each */
#pragma unroll
  for (int i = 0; i < KEPT; i += 4) {
    const int64_t c = from + i / 4 * TURN;
    float4 x = make_float4(0, 0, 0, 0);
    kept_n[i / 4] = 0;
    if (c < chunks) x = *(const float4 *)(chunk_max + c), kept_n[i / 4] = *(const uint32_t *)(count + c);
    kept[i] = c < chunks ? x.x : -emxi_inf();
    kept[i + 1] = c + 1 < chunks ? x.y : -emxi_inf();
    kept[i + 2] = c + 2 < chunks ? x.z : -emxi_inf();
    kept[i + 3] = c + 3 < chunks ? x.w : -emxi_inf();
  }
  const auto each_beyond = [&](auto f) { /* chunks that are not in registers */
                                         for (int64_t c = from + KEPT / 4 * TURN; c < chunks; c += TURN)
                                           for (int64_t i = c; i < c + 4 && i < chunks; i++) f(i);
  };

  const float limit = a.cert && !a.cert_bound ? from_ordered(__ldcg(&a.cert[row].limit)) : -emxi_inf();
  for (int i = threadIdx.x; i < a.splits && alpha != 0; i += SOLVE_THREADS) bad |= a.bad[row * a.splits + i] != 0;
  /* The largest scores of up to 128 sets of chunks, each of a thread's or of four neighbours'. */
  float top = -emxi_inf();
#pragma unroll
  for (int i = 0; i < KEPT; i++) top = fmaxf(top, kept[i]);
  each_beyond([&](int64_t c) { top = fmaxf(top, chunk_max[c]); });
  const bool joined = chunks > 4 * MAX_TOPS;
  if (joined) {
    top = fmaxf(top, __shfl_xor_sync(EMXI_FULL, top, 1));
    top = fmaxf(top, __shfl_xor_sync(EMXI_FULL, top, 2));
  }
  const int tops = joined ? MAX_TOPS : (int)((chunks + 3) / 4), of_top = joined ? (int)threadIdx.x / 4 : (int)threadIdx.x;
  if (of_top < tops && (!joined || threadIdx.x % 4 == 0)) list[of_top] = top;
  bad = __syncthreads_or(bad);
  float m = -emxi_inf();
  for (int i = lane; i < tops; i += 32) m = fmaxf(m, list[i]);
  m = warp_max(m);
  if (bad || m == -emxi_inf()) {
    if (part) return;
    for (int d = threadIdx.x; d < D; d += SOLVE_THREADS) store_output(a, place, d, bad ? emxi_nan() : 0.0f);
    if (threadIdx.x == 0) {
      wide->wide = 0;
      wide->solved = 0;
      const bool estimated = a.sparse && a.tau_mode != EMX_TAU_EXACT && a.choice[row].estimated;
      write_report(a, place, row, bad, estimated ? a.choice[row].estimate : (double)-emxi_inf(), 0, 0, 0);
    }
    return;
  }

  solve_row known = {row, chunks, part, 0, threshold_of(a, alpha, m), -1.0f, 0, false, false};
  const threshold &k = known.k;
  /* GAUSSIAN: weights from the estimated threshold, which may lie on either side of the true one. */
  known.estimated = a.sparse && a.tau_mode != EMX_TAU_EXACT && a.choice[row].estimated;
  /* The largest scores of sets of chunks are scores: the threshold of any subset is a lower bound (T1), and this one leaves
   * little more than the support. */
  const bool closed = is_closed(k), two = k.alpha == 2.0;
  const float fa = (float)k.a, fb = (float)k.b;
  known.low = fmaxf(-1.0f, fmaf(fa, limit - m, -1e-6f));
  if (known.low > -1.0f) { /* CERTIFIED has found it already */
  } else if (closed)
    known.low = bound_of<true>(space, list, tops, 1, -1.0f, two, fa, fb, m);
  else if (k.alpha < 2.0)
    known.low = bound_of<false>(space, list, tops, 1, -1.0f, two, fa, fb, m);
  float thr = fmaxf(below_of(k), nextafterf((float)((double)m + (double)known.low * k.b), -emxi_inf()));
  if (known.estimated) {
    thr = below_of(k);
    if (a.tau_mode == EMX_TAU_FIXED) thr = fminf(thr, nextafterf((float)(a.choice[row].estimate / k.a), -emxi_inf()));
  }
  known.thr = thr;

  /* Chunks with a candidate, in an order that depends on nothing else. */
  int mine = 0, candidates = 0;
#pragma unroll
  for (int i = 0; i < KEPT; i++)
    if (kept[i] > thr) mine++, candidates += kept_n[i / 4] >> i % 4 * 8 & 0xff;
  each_beyond([&](int64_t c) {
    if (chunk_max[c] > thr) mine++, candidates += count[c];
  });
  int before = mine;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const int other = __shfl_up_sync(EMXI_FULL, before, step);
    if (lane >= step) before += other;
  }
  candidates = __reduce_add_sync(EMXI_FULL, candidates);
  if (lane == 31) space.offsets[0][warp] = before, space.offsets[1][warp] = candidates;
  __syncthreads();
  const int of_warp = lane < SOLVE_WARPS ? space.offsets[0][lane] : 0, n_alive = __reduce_add_sync(EMXI_FULL, of_warp),
            n_candidates = __reduce_add_sync(EMXI_FULL, lane < SOLVE_WARPS ? space.offsets[1][lane] : 0);
  int at = before - mine + __reduce_add_sync(EMXI_FULL, lane < warp ? of_warp : 0);
  /* Few in number, by what depends on no timing: the scan's candidates do, those above thr do not. Bounds fill up to fours. */
  constexpr int MOST = LISTED - 4;
  if (part && n_alive <= MAX_ALIVE && n_candidates <= MOST) return;
  const int n_read = n_alive <= MAX_ALIVE ? n_alive : 0;
#pragma unroll
  for (int i = 0; i < KEPT; i++)
    if (n_read && kept[i] > thr)
      alive[at] = (int32_t)(from + i / 4 * TURN) + i % 4, space.alive_n[at++] = kept_n[i / 4] >> i % 4 * 8 & 0xff;
  each_beyond([&](int64_t c) {
    if (n_read && chunk_max[c] > thr) alive[at] = (int32_t)c, space.alive_n[at++] = count[c];
  });
  __syncthreads();
  /* Their candidates: a warp counts what is above thr in four chunks, then all warps write, until there are too many. */
  for (int first = 0, turn = 0; first < n_read && known.total <= MOST; first += SOLVE_WARPS * 4, turn ^= 1) {
    constexpr int EACH = CHUNK / 32;
    float v[4][EACH];
    uint8_t in_chunk[4][EACH];
    int of_chunk[4], n = 0;
    int32_t chunk[4];
#pragma unroll
    for (int u = 0; u < 4; u++) {
      const int i = first + warp * 4 + u;
      of_chunk[u] = i < n_read ? space.alive_n[i] : 0;
      chunk[u] = i < n_read ? alive[i] : 0;
    }
#pragma unroll
    for (int u = 0; u < 4; u++)
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        v[u][j] = -emxi_inf(), in_chunk[u][j] = 0;
        if (32 * j >= of_chunk[u]) continue; /* of most chunks all but the first */
        const int64_t base = (int64_t)chunk[u] * CHUNK + 32 * j + lane;
        if (32 * j + lane < of_chunk[u]) v[u][j] = z[base], in_chunk[u][j] = local[base];
      }
#pragma unroll
    for (int u = 0; u < 4; u++)
#pragma unroll
      for (int j = 0; j < EACH; j++)
        if (32 * j < of_chunk[u]) n += __popc(__ballot_sync(EMXI_FULL, v[u][j] > thr));
    if (lane == 0) space.offset[turn][warp] = n;
    __syncthreads();
    const int here = lane < SOLVE_WARPS ? space.offset[turn][lane] : 0;
    int place_in = known.total + __reduce_add_sync(EMXI_FULL, lane < warp ? here : 0);
    known.total += __reduce_add_sync(EMXI_FULL, here);
#pragma unroll
    for (int u = 0; u < 4; u++)
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        if (32 * j >= of_chunk[u]) continue;
        const uint32_t mask = __ballot_sync(EMXI_FULL, v[u][j] > thr);
        const int to = place_in + __popc(mask & ((1u << lane) - 1));
        if (v[u][j] > thr && to < MOST) {
          list[to] = v[u][j];
          position[to] = chunk[u] * CHUNK + in_chunk[u][j];
        }
        place_in += __popc(mask);
      }
  }
  const int total = known.total;
  known.few = n_alive <= MAX_ALIVE && total <= MOST;
  if (part && known.few) return;
  if (known.estimated || !closed || !known.few) {
    __syncthreads();
    solve_long<T>(a, space, known);
    return;
  }

  /* The first warp solves, once what may have weight is known: the others have its values on their way meanwhile. */
  constexpr int AHEAD = 4, OTHERS = SOLVE_WARPS - 1;
  const float near = bound_of<true>(space, list, total, 2, known.low, two, fa, fb, m), least = near - float_slack(true);
  if (warp == 0) {
    int n = 0;
    for (int first = 0; first < total; first += 32) {
      const int i = first + lane;
      const float x = i < total ? list[i] : -emxi_inf();
      const int32_t at = i < total ? position[i] : 0;
      const bool may = fmaf(fa, x - m, -least) >= 0;
      const uint32_t mask = __ballot_sync(EMXI_FULL, may);
      const int to = n + __popc(mask & ((1u << lane) - 1));
      __syncwarp();
      if (may) list[to] = x, position[to] = at; /* behind what has been read */
      n += __popc(mask);
    }
    if (lane == 0) space.chosen_n = n;
  }
  __syncthreads();
  const int chosen = space.chosen_n;
  const bool here = chosen <= MAX_HERE; /* else `share` adds up the values */
  double t = near, mass = 0;
  piece<T, 0> value[AHEAD];
  const auto load_values = [&](int first) {
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int i = first + u * OTHERS;
      value[u].clear();
      if (i < chosen) value[u].load((const T *)a.pool.v + value_at(a, place, position[i]), lane, D, 0);
    }
  };
  if (warp) {
    if (here) load_values(warp - 1);
  } else { /* in closed form from the support, until that is its own */
    double s[3], f;
    for (int step = 0, n = -1; step < 16; step++) {
      s[1] = s[2] = 0;
      int above = 0;
      for (int i = lane; i < chosen; i += 32) {
        const double y = k.a * ((double)list[i] - (double)m) - t;
        if (y > 1e-13) above++, s[1] += y, s[2] += y * y;
      }
#pragma unroll
      for (int shift = 16; shift; shift >>= 1) {
        s[1] += __shfl_xor_sync(EMXI_FULL, s[1], shift);
        s[2] += __shfl_xor_sync(EMXI_FULL, s[2], shift);
      }
      above = __reduce_add_sync(EMXI_FULL, above);
      s[0] = above;
      if (above == n) break;
      n = above;
      t += threshold_step(k, s, &f);
    }
    mass = two ? s[1] : s[2];
    if (lane == 0) space.found[0] = t, space.found_n = (int)s[0];
  }
  __syncthreads();
  t = space.found[0];
  float acc[PER_LANE];
#pragma unroll
  for (int e = 0; e < PER_LANE; e++) acc[e] = 0;
  if (threadIdx.x == 0) {
    wide->wide = here ? WIDE_NOT : WIDE_SEGMENTS;
    wide->done = 0;
    wide->t = t;
    wide->m = m;
    wide->thr = thr;
    wide->exact = t;
    wide->solved = 1;
    write_report(a, place, row, false, t + k.a * (double)m, mass, space.found_n, space.found_n);
  }
  if (!here) return;
  for (int first = warp - 1; warp && first < chosen; first += AHEAD * OTHERS) {
    if (first >= OTHERS) load_values(first);
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const int i = first + u * OTHERS;
      const float p = i < chosen ? weight_of(k, list[i], t) : 0.0f;
      if (!(p > 0)) continue;
      float f[8];
      value[u].get(f);
#pragma unroll
      for (int e = 0; e < PER_LANE; e++) acc[e] = fmaf(p, f[e], acc[e]);
    }
  }
  store_values(a, place, space, acc);
}
static_assert(EMXI_CUDA_PARTS <= 32, "a lane has the list of a part");
static_assert(SOLVE_WARPS * 2 * CHUNK <= 2 * LISTED, "two chunks a warp");
static_assert(SOLVE_WARPS * MAX_D <= 2 * LISTED, "the warps' sums lie where the list was");
static_assert(EMXI_CUDA_POINTS == 16 && SOLVE_WARPS * 2 * EMXI_CUDA_POINTS <= MAX_ALIVE, "a lane has one sum");

/* ---- share */

template <typename T, int FIXED>
__global__ void __launch_bounds__(SCAN_THREADS, 2) share(const __grid_constant__ emxi_cuda_decode a) {
  using value_piece = piece<T, FIXED>;
  constexpr int L = value_piece::L, SUBS = 32 / L;
  __shared__ __align__(8) float sum[SCAN_WARPS * MAX_D]; /* [warps, SUBS, D] */
  __shared__ bool last;
  start_next(); /* most rows need nothing here, and what follows waits before it looks at results */
  wait_for_previous();
  const int64_t row = blockIdx.x / a.shares;
  const int part = (int)(blockIdx.x % a.shares);
  if (a.cert && a.reports && part == 0 && threadIdx.x == SCAN_THREADS - 1) account_row(a, row);
  emxi_cuda_wide *wide = &a.wide[row];
  if (!wide->wide) return;
  const row_place place = place_of(a, row);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = FIXED ? FIXED : a.pool.D;
  const uint64_t once = read_once();
  const threshold k = threshold_of(a, alpha_of(a, place.h), wide->m);
  const double t = wide->t;
  float acc[PER_LANE];
#pragma unroll
  for (int e = 0; e < PER_LANE; e++) acc[e] = 0;
  const uint8_t *local = a.local + row * a.chunks * CHUNK;
  int phase = 0;
  const auto add = [&](float score, int64_t at, bool there) {
    const float p = there ? weight_of(k, score, t) : 0.0f;
    add_values<T, FIXED>(a, place, __ballot_sync(EMXI_FULL, p > 0), p, at, lane, once, phase, acc);
  };
  if (wide->wide == WIDE_PACKED) {
    /* Pieces of 32 places, the first ones of all lists before the second ones. A warp asks 32 at a time how many hold anything. */
    const packed pack = packed_of(a, row);
    const int pieces = a.packed / 32 * pack.lists, step = a.shares * SCAN_WARPS;
    for (int first = part * SCAN_WARPS + warp; first < pieces; first += 32 * step) {
      const int looked = first + lane * step,
                filled = looked < pieces ? pack.n[looked % pack.lists] - looked / pack.lists * 32 : 0;
      for (uint32_t left = __ballot_sync(EMXI_FULL, filled > 0); left; left &= left - 1) {
        const int from = __ffs(left) - 1, piece = first + from * step;
        const bool there = lane < __shfl_sync(EMXI_FULL, filled, from);
        const int64_t j = (int64_t)(piece % pack.lists) * a.packed + piece / pack.lists * 32 + lane;
        const int32_t at = there ? pack.at[j] : 0;
        add(there ? pack.z[j] : 0.0f, at / CHUNK * CHUNK + (there ? local[at] : 0), there);
      }
    }
  } else {
    const int64_t chunks = (place.count + CHUNK - 1) / CHUNK, per = (chunks + a.shares - 1) / a.shares, from = part * per,
                  to = from + per < chunks ? from + per : chunks;
    const float *z = a.z + row * a.chunks * CHUNK;
    for (int64_t c = from + warp; c < to; c += SCAN_WARPS) {
      if (!(a.chunk_max[row * a.chunks + c] > wide->thr)) continue;
      const int n = a.count[row * a.chunks + c];
      for (int base = 0; base < n; base += 32) {
        const int i = base + lane;
        add(i < n ? z[c * CHUNK + i] : 0.0f, c * CHUNK + (i < n ? local[c * CHUNK + i] : 0), i < n);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < PER_LANE; e++)
    if (value_piece::element(lane % L, e) < D) sum[(warp * SUBS + lane / L) * D + value_piece::element(lane % L, e)] = acc[e];
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += SCAN_THREADS) {
    float x = 0;
    for (int w = 0; w < SCAN_WARPS * SUBS; w++) x += sum[w * D + d];
    a.share[blockIdx.x * (int64_t)D + d] = x;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&wide->done, 1u) == (uint32_t)a.shares - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const int groups = SCAN_THREADS / D, group = threadIdx.x / D, of_group = threadIdx.x % D;
  double x = 0, *sums = (double *)sum; /* [groups][D] */
  if (group < groups)
#pragma unroll 8
    for (int i = group; i < a.shares; i += groups) x += (double)__ldcg(&a.share[(row * a.shares + i) * D + of_group]);
  sums[threadIdx.x] = x;
  __syncthreads();
  if (group) return;
  for (int i = 1; i < groups; i++) x += sums[i * D + of_group];
  store_output(a, place, of_group, (float)x);
}

static_assert(SCAN_THREADS >= MAX_D && SCAN_THREADS * 2 <= SCAN_WARPS * MAX_D, "groups of D threads add up");

} // namespace

#endif
