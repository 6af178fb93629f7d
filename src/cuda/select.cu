/* SPDX-License-Identifier: Apache-2.0
 * Selectors on the device (src/cpu/select_cpu.c is their specification), and what they say of the tokens that are left out.
 *
 *   judge    bounds of pages' scores (select_judge.cuh).
 *   choose   GAUSSIAN, block = (row, part of the pages): the estimated threshold, by every block for itself; pages above it as a bit each, then
 *            as a list in order, behind what the parts before it have found.
 *   pick     others, block = row: the budget, or a caller's list.
 *   certify  block = (row, part of the pages), after the decode: the bound of the mass of what was not read (T6 of docs/math.md in its root
 *            form). Parts count bounds by size, the last one to do so solves. */
#include "select_judge.cuh"

#include "../kv/gauss_moments.h"

namespace {

constexpr int PICK_THREADS = 1024, CHOOSE_THREADS = 512, CHOOSE_WARPS = CHOOSE_THREADS / 32, CERTIFY_THREADS = SOLVE_THREADS,
              LISTED = 256;

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
/* ln(n E[(a X - tau)_+^b]) of one normal crosses zero, b = 1, 2, 3: a threshold a thread, three rounds leave a 10^-8th of the
 * bracket. In float and in spreads, with the recurrence forward: at the fifth spread, where a token in a million is, 1e-4 of
 * the mass is lost, which moves tau by 1e-5 spreads. */
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
__global__ void __launch_bounds__(CHOOSE_THREADS) choose(const __grid_constant__ emxi_cuda_decode a) {
  constexpr int WORDS = 8; /* of 32 pages, at a time, so that loads overlap */
  __shared__ double scratch[32], sums[3][4];
  __shared__ float shared_top[32], shared_size;
  __shared__ int shared_part, shared_n[CHOOSE_WARPS], before, total;
  wait_for_previous();
  const emxi_cuda_pool &pool = a.pool;
  const uint32_t row = blockIdx.x / (uint32_t)a.picks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, h = (int)(row % (uint32_t)a.H), b = (int)(row / (uint32_t)a.H);
  emxi_cuda_judged *state = &a.judged[row];
  if (threadIdx.x == CHOOSE_THREADS - 1) shared_part = (int)atomicAdd(&state->picked, 1u);
  if (warp < 12) { /* a third of a sum each */
    double x = 0;
#pragma unroll 4
    for (int j = warp / 4 * 32 + lane; j < a.page_splits; j += 96)
      x += a.stats[((int64_t)row * a.page_splits + j) * 4 + warp % 4];
    x = warp_sum_double(x);
    if (lane == 0) sums[warp / 4][warp % 4] = x;
  } else if (warp == 12) {
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

  float up[WORDS], x[WORDS]; /* of the first words, on their way while the threshold is found */
  const auto load = [&](int first) {
#pragma unroll
    for (int u = 0; u < WORDS; u++) {
      const int p = (first + u) * 32 + lane;
      const bool there = first + u < to && p < pages;
      up[u] = there && a.bounds ? upper[p] : -emxi_inf();
      x[u] = there ? mu[p] : -emxi_inf();
    }
  };
  const auto sum_of = [&](int i) { return sums[0][i] + sums[1][i] + sums[2][i]; };
  const double count = sum_of(0), near = (double)(1 / (float)count), per = near * (2 - count * near), mean = sum_of(1) * per;
  const float spread = sqrtf((float)fmax(sum_of(3) * per - mean * mean, 0.0));
  emxi_cuda_choice choice = {0, -emxi_inf(), shared_size, 0, alpha != 0 ? (int32_t)count : 0};
  float floor = -emxi_inf();
  const bool all = alpha == 0 || (count > 0 && !(spread < emxi_inf() && fabs(mean) < emxi_inf())); /* such means say nothing */
  load(from);
  if (!all && count > 0) {
    const threshold k = threshold_of(a, alpha, 0);
    choice.estimate = a.slopes && a.slopes[h] != 0   ? mixture_tau(alpha, pool.P, mu, sigma, pages, {scratch, shared_top})
                      : k.power >= 1 && k.power <= 3 ? single_tau(k.a, k.power, (float)count * (float)pool.P, mean, spread)
                                                     : general_tau(k.a, k.b, count * pool.P, mean, (double)spread);
    const double tau = choice.estimate * k.b, excess = tau - (sum_of(1) + 1.5 * sum_of(2)) * per;
    floor = (float)(tau - fmax((double)(a.safety_margin * spread), (double)a.excess_margin * fmax(excess, 0.0)));
    choice.estimated = 1;
  }

  int n = 0;
  uint32_t kept = 0; /* word `lane` of up to 32; more are in `chosen` */
  float unread = -emxi_inf();
  for (int first = from; first < to; first += WORDS) {
    if (first > from) load(first);
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
  __shared__ int offsets[PICK_THREADS / 32], bins[256][32], totals[256], shared_choice[2]; /* bins: a count of each lane */
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
  /* f(page, its bound) for pages below the row's number, a warp's neighbours together, several loads under way; all lanes come. */
  const auto each_page = [&](auto f) {
    constexpr int AHEAD = 8;
    for (int64_t first = threadIdx.x; first - lane < pages; first += AHEAD * PICK_THREADS) {
      float up[AHEAD];
#pragma unroll
      for (int u = 0; u < AHEAD; u++) up[u] = first + u * PICK_THREADS < pages ? upper[first + u * PICK_THREADS] : -emxi_inf();
#pragma unroll
      for (int u = 0; u < AHEAD; u++)
        if (first - lane + u * PICK_THREADS < pages) f(first + u * PICK_THREADS, up[u]);
    }
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
      each_page([&](int64_t p, float up) {
        if (p < pages) leave_out(up);
      });
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
      if (!all) each_page([&](int64_t p, float up) { usable += p < pages && up != emxi_inf(); });
      usable = (int64_t)block_sum((double)usable, scratch);
      choice.judged = (int32_t)usable;
      spare = a.budget - (pages - usable);
      if (!all && spare >= usable) all = true;
      if (!all && spare > 0) {
        uint32_t mask = 0;
        int64_t k = spare;
        for (int shift = 24; shift >= 0; shift -= 8) {
          for (int i = threadIdx.x; i < 256 * 32; i += PICK_THREADS) (&bins[0][0])[i] = 0;
          __syncthreads();
          each_page([&](int64_t p, float up) {
            const uint32_t u = sortable(up);
            if (p < pages && up != emxi_inf() && (u & mask) == last) atomicAdd(&bins[u >> shift & 255][lane], 1);
          });
          __syncthreads();
          for (int i = warp; i < 256; i += PICK_THREADS / 32) {
            const int sum = __reduce_add_sync(EMXI_FULL, bins[i][lane]);
            if (lane == 0) totals[i] = sum;
          }
          __syncthreads();
          if (warp == 0) { /* lane l has the bins from 255 - 8 l down */
            int mine = 0, upto;
#pragma unroll
            for (int i = 0; i < 8; i++) mine += totals[255 - 8 * lane - i];
            upto = mine;
#pragma unroll
            for (int step = 1; step < 32; step <<= 1) {
              const int other = __shfl_up_sync(EMXI_FULL, upto, step);
              if (lane >= step) upto += other;
            }
            if (upto >= k && upto - mine < k) {
              int bin = 255 - 8 * lane, left = (int)k - (upto - mine);
              while (left > totals[bin]) left -= totals[bin--];
              shared_choice[0] = bin;
              shared_choice[1] = left;
            }
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
    each_page([&](int64_t p, float up) {
      const uint32_t key = sortable(up);
      const bool take = p < pages && (all || up == emxi_inf() || (spare > 0 && key > last)),
                 tie = p < pages && !take && spare > 0 && key == last;
      const uint32_t bits = __ballot_sync(EMXI_FULL, take), even = __ballot_sync(EMXI_FULL, tie);
      if (lane == 0) chosen[p / 32] = bits, place[p / 32] = (int32_t)even;
    });
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
    if (a.bounds)
      each_page([&](int64_t p, float up) {
        if (p >= pages) return;
        if (chosen[p / 32] >> (p % 32) & 1)
          upper[p] = -emxi_inf();
        else
          leave_out(up);
      });
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
  __syncthreads();
  /* What judge, choose and pick have written is there, in the second-level cache: the decode's first kernel has waited for it. */
  const int64_t row = blockIdx.x / (uint32_t)a.picks;
  const int part = (int)(blockIdx.x % (uint32_t)a.picks), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const row_place place = place_of(a, row);
  const int64_t all_pages = (place.visible + a.pool.P - 1) >> a.pool.shift, each = (all_pages + a.picks - 1) / a.picks,
                from = part * each, to = from + each < all_pages ? from + each : all_pages;
  const float *upper = a.upper + row * a.pages;
  float up[AHEAD];
  const auto load = [&](int64_t first) {
#pragma unroll
    for (int u = 0; u < AHEAD; u++)
      up[u] = first + u * CERTIFY_THREADS < to ? __ldcg(upper + first + u * CERTIFY_THREADS) : -emxi_inf();
  };
  if (a.judged) load(from + threadIdx.x);
  const emxi_cuda_choice *chosen = &a.choice[row];
  const emxi_cuda_choice choice = {__ldcg(&chosen->estimate), __ldcg(&chosen->max_unread), __ldcg(&chosen->size),
                                   __ldcg(&chosen->estimated), __ldcg(&chosen->judged)};
  const emxi_cuda_wide *wide = &a.wide[row];
  const double alpha = alpha_of(a, place.h), unit = alpha > 1.0 ? alpha - 1.0 : 1.0,
               bias = a.slopes ? fabs((double)a.slopes[place.h]) * (double)place.visible : 0.0,
               usual = a.judged ? score_slack(a.pool.D, __ldcg(&a.judged[row].norm), (double)choice.size, bias) +
                                      __ldcg(&a.judged[row].lost)
                                : 0.0;
  wait_for_previous();
  const bool unread = choice.max_unread > -emxi_inf(), known = wide->solved && choice.max_unread < emxi_inf();
  double slack = 0, low = 0;
  if (unread && known) { /* judge has been there */
    const double tau = wide->exact + unit * (double)wide->m;
    slack = usual;
    low = tau - unit * slack - 1e-9 * fmax(1.0, fabs(tau)) - (double)place.visible * 0x1p-50;
  }
  const bool sound = unread && known && slack < emxi_inf(),
             clear = sound && alpha != 1.0 && unit * (double)choice.max_unread <= low;
  double delta = unread && !clear ? 1 : 0;
  if (!sound || clear) {
    if (part) return;
  } else {
    emxi_cuda_judged *state = &a.judged[row];
    /* Unread pages by their bounds, rounded up to the edge of a bin: of a bound above `base`, a float not above low, the float
     * quotient is off by less than 1e-4 of a bin. */
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
    /* Scores above the lower bound of tau, by every part, for the last one has been waited for; those of too many to hold
     * count as nothing known. */
    int n = 0;
    if (alpha != 1.0) {
      const float *z = a.z + row * a.chunks * CHUNK, *chunk_max = a.chunk_max + row * a.chunks,
                  thr = nextafterf(edge, -emxi_inf());
      const int64_t chunks = (place.count + CHUNK - 1) / CHUNK;
      for (int64_t first = warp; first < chunks && n <= LISTED; first += CERTIFY_THREADS) { /* every warp has some of few */
        const int64_t mine = first + lane * SOLVE_WARPS;
        const int of_mine = mine < chunks ? a.count[row * a.chunks + mine] : 0;
        uint32_t alive = __ballot_sync(EMXI_FULL, mine < chunks && chunk_max[mine] > thr);
        for (; alive && n <= LISTED; alive &= alive - 1) {
          const int from = __ffs(alive) - 1, there = __shfl_sync(EMXI_FULL, of_mine, from);
          const int64_t c = first + from * SOLVE_WARPS;
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

} // namespace

extern "C" void emxi_cuda_select(const emxi_cuda_decode *d, void *on) {
  const cudaStream_t stream = (cudaStream_t)on;
  if (d->kind != EMX_SELECT_ALL && d->pool.sum.tails && (d->bounds || d->kind != EMX_SELECT_PAGES)) launch_judge(*d, stream);
  const unsigned rows = (unsigned)(d->batch.n * d->H * d->S);
  if (d->kind == EMX_SELECT_GAUSSIAN)
    launch(choose, rows * (unsigned)d->picks, CHOOSE_THREADS, 0, stream, d->overlap, *d);
  else
    launch(pick, rows, PICK_THREADS, 0, stream, d->overlap, *d);
}
extern "C" void emxi_cuda_certify(const emxi_cuda_decode *d, void *stream) {
  launch(certify, (unsigned)(d->batch.n * d->H * d->S * d->picks), CERTIFY_THREADS, 0, (cudaStream_t)stream, d->overlap, *d);
}
