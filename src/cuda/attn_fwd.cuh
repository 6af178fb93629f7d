/* SPDX-License-Identifier: Apache-2.0
 * Dense attention, forward:   o_i = sum_j p_ij v_j,  p_i = alpha-entmax(scale q_i.k + bias)
 *
 *   scan      a block of 64 queries walks the tiles of its keys from the newest to the oldest, keeps for each row a lower bound of its
 *             threshold (that of the candidates so far: docs/math.md) and lists what lies above: 2 D FLOP a visible pair. With slopes
 *             it passes over tiles that are out of every row's reach: norms of keys bound their scores
 *   resolve   a warp a row: exact tau from the list, values of the support gathered: 2 D FLOP and D elements of V a nonzero
 *   dense     rows whose list has outgrown its room, and all rows of alpha = 1: passes over the tiles until tau is exact, then P V; 16
 *             bit: attn_tiles.cuh, unless there are infinities or NaN
 *
 * A row's outputs are one warp's (list) or one block's (dense), in a fixed order. Scores are sums of D products in f32; tau is solved in
 * double; on the dense path weights enter the product with V in the tiles' type, relative to the row's largest. Oracle:
 * tests/gpu/test_gpu_attn.c. */
#ifndef EMXI_CUDA_ATTN_FWD_CUH
#define EMXI_CUDA_ATTN_FWD_CUH

#include "attn.cuh"

namespace {

/* A warp raises a row's bound by its list so far and drops what is at or below. */
__device__ __noinline__ void tighten(const powers &w, float a1, float *z, int32_t *pos, int *from, float *thr) {
  const int lane = threadIdx.x % 32;
  float zz[HELD], m = -emxi_inf();
  int32_t pp[HELD];
#pragma unroll
  for (int c = 0; c < HELD; c++) {
    const int e = CAP - 1 - lane - 32 * c;
    zz[c] = e >= *from ? z[e] : -emxi_inf();
    pp[c] = e >= *from ? pos[e] : 0;
    m = fmaxf(m, zz[c]);
  }
  m = warp_max(m);
  float t = fmaxf(-1.0f, a1 * (*thr - m) - 1e-6f);
  for (int i = 0; i < 3; i++) {
    float F, G;
    light_sums(w, a1, zz, HELD, m, t, &F, &G);
    if (!(F > 1.0f)) break;
    t += fmaxf(0.0f, light_step(w, a1, F, G) - 4e-6f);
  }
  *thr = fmaxf(*thr, nextafterf(m + (t - 2e-6f) / a1, -emxi_inf()));
  int end = CAP;
#pragma unroll
  for (int c = 0; c < HELD; c++) {
    const bool keep = zz[c] > *thr;
    const uint32_t kept = __ballot_sync(EMXI_FULL, keep);
    if (keep) {
      const int to = end - 1 - __popc(kept & ((1u << lane) - 1));
      z[to] = zz[c];
      pos[to] = pp[c];
    }
    end -= __popc(kept);
  }
  *from = end;
  __syncwarp();
}

/* Scores of a part that are above the row's bound. */
__device__ __forceinline__ uint32_t above(const scored &x, float thr) {
  uint32_t hit = 0;
#pragma unroll
  for (int c = 0; c < PART; c++) hit |= (uint32_t)(x.s[c] > thr) << c;
  return hit & x.seen;
}

template <typename T>
constexpr size_t scan_shared() {
  return 2 * TILE * product<T>::LD * sizeof(T) + TILE * S_LD * sizeof(float);
}

/* Candidates of every row: forward with scores, backward (threshold known) positions alone. */
template <typename T>
__global__ void __launch_bounds__(THREADS) scan_keys(const __grid_constant__ emxi_cuda_attn a) {
  extern __shared__ __align__(128) char shared[];
  float *S = (float *)shared;
  T *A = (T *)(S + TILE * S_LD), *B = A + TILE * product<T>::LD;
  query_tile t;
  if (!tile_of_block(a, blockIdx.x, &t)) return;
  const int r = threadIdx.x / 4, part = threadIdx.x % 4, lane = threadIdx.x % 32, i = t.i0 + r;
  const int64_t row = t.row0 + r;
  const bool real = r < t.rows, todo = real && row_is_todo(a, row);
  const double alpha = alpha_of(a, t.h);
  const float a1 = (float)(alpha - 1.0), slope = a.slopes ? a.slopes[t.h] : 0, reach = 1.000001f / a1;
  const powers w = powers_of(alpha);
  const int at = i + t.sp.n - t.sp.s;
  const key_range vis = real ? visible(a, t.sp, i) : key_range{0, 0};
  int state = 0, from = CAP, limit = 96;
  float thr = -emxi_inf();
  bool busy = todo && vis.to > vis.from;
  if (busy && a.backward) {
    const float tau = *(const float *)row_of(a.tau, t.b, t.h, t.sp.q0 + i);
    if (tau != tau) state = EMXI_CUDA_ROW_NAN;
    if (tau == -emxi_inf()) busy = false;
    /* tau has been rounded, and the scores of the resolved list are sums in another order */
    thr = (tau - 1e-5f * (1.0f + fabsf(tau))) / a1;
    thr -= 1e-5f * fabsf(thr);
  }
  if (busy && !state) state = !alpha_is_good(alpha) ? EMXI_CUDA_ROW_NAN : alpha == 1.0 ? EMXI_CUDA_ROW_DENSE : 0;
  busy &= !state;
  float *z = a.z + row * CAP;
  int32_t *pos = a.pos + row * CAP;
  const source q = rows_of(a.q, t.b, t.h, t.sp.q0), keys = keys_of(a, a.k, t.b, t.g, t.sp);
  const int first = t.rows ? visible(a, t.sp, t.i0).from / TILE * TILE : 0,
            end = t.rows ? visible(a, t.sp, t.i0 + t.rows - 1).to : 0;
  /* No score of the row with keys of a tile, no longer than k_norm, is larger: by Cauchy and Schwarz, and the bias is that of the nearest
   * (a negative slope: of the farthest). docs/numerics.md has the factor. */
  float q_norm = 0;
  for (int d = part * 8; a.norms && real && d < a.d; d += 32) {
    float y[8];
    load8(at_row(q, t.i0 + r), q.dtype, q.vectors, d, a.d, y);
#pragma unroll
    for (int e = 0; e < 8; e++) q_norm = fmaf(y[e], y[e], q_norm);
  }
  q_norm = norm_up(quad_sum(q_norm)) * fabsf(a.scale);
  const auto most = [&](int j0, float k_norm) {
    const int before = at - (j0 + TILE - 1), after = j0 - at, near = max(0, max(before, after)), far = max(at - j0, -before);
    return fmaf(-slope, (float)(slope < 0 ? far : near), q_norm * k_norm);
  };
  const float *const norms = a.norms ? a.norms + t.unit * a.k_tiles + (a.packed ? t.sp.k_tile : 0) : nullptr;
  const float longest = a.norms ? a.longest[a.packed ? t.unit * a.batch + t.b : t.unit] : 0;
  bool held = false;
  for (int j0 = (end - 1) / TILE * TILE; end > 0 && j0 >= first; j0 -= TILE) {
    /* of tiles before the row's position the nearest has the largest bias */
    const bool over = norms && slope > 0 && j0 + TILE - 1 <= at && most(j0, longest) <= thr;
    if (!__syncthreads_or(busy && !over)) break;
    if (norms && !__syncthreads_or(busy && !(most(j0, norms[j0 / TILE]) <= thr))) continue;
    dots<T>(S, A, B, q, t.i0, t.i0 + t.rows, keys, j0, end, a.d, held);
    held = true;
    const scored x = scores_of(a, S, slope, at, vis, j0);
    float m = -emxi_inf();
    bool odd = false;
#pragma unroll
    for (int c = 0; c < PART; c++)
      if (x.seen >> c & 1) {
        odd |= !(x.s[c] < emxi_inf());
        m = fmaxf(m, x.s[c]);
      }
    m = quad_max(m);
    if (__ballot_sync(EMXI_FULL, odd) >> (lane & ~3) & 15 && busy) {
      state = EMXI_CUDA_ROW_NAN;
      busy = false;
    }
    if (!a.backward) thr = fmaxf(thr, nextafterf(m - reach, -emxi_inf()));
    uint32_t hit = busy ? above(x, thr) : 0;
    int n = __popc(hit), total = quad_sum(n);
    const auto raise = [&](bool which) {
      __syncwarp();
      for (uint32_t left = __ballot_sync(EMXI_FULL, which && part == 0); left; left &= left - 1) {
        const int owner = __ffs(left) - 1;
        int f = __shfl_sync(EMXI_FULL, from, owner);
        float h = __shfl_sync(EMXI_FULL, thr, owner);
        const int64_t other = row + owner / 4 - lane / 4;
        tighten(w, a1, a.z + other * CAP, a.pos + other * CAP, &f, &h);
        if ((lane & ~3) == owner) {
          from = f;
          thr = h;
          limit = max(2 * (CAP - f), CAP - f + 64);
        }
      }
    };
    if (!a.backward && __any_sync(EMXI_FULL, total > from)) {
      raise(total > from);
      hit = busy ? above(x, thr) : 0;
      n = __popc(hit);
      total = quad_sum(n);
    }
    if (total > from) {
      state = EMXI_CUDA_ROW_DENSE;
      busy = false;
    } else if (total) {
      from -= total;
    }
    int before = 0;
#pragma unroll
    for (int p = 0; p < 3; p++) {
      const int other = __shfl_sync(EMXI_FULL, n, (lane & ~3) + p);
      if (p < part) before += other;
    }
    if (busy) {
      int to = from + before;
#pragma unroll
      for (int c = 0; c < PART; c++)
        if (hit >> c & 1) {
          if (!a.backward) z[to] = x.s[c];
          pos[to++] = j0 + part * PART + c;
        }
    }
    if (!a.backward) raise(busy && CAP - from > limit);
  }
  if (todo && part == 0) {
    a.n_list[row] = state ? state : CAP - from;
    a.at[row] = from;
  }
}

template <typename T>
size_t dense_forward_shared(int D) {
  return scan_shared<T>() + TILE * product<T>::LD * sizeof(T) + (size_t)TILE * D;
}

/* Kinds of infinity and NaN among the values that a row's output element has a weight for. */
enum { ODD_PLUS = 1, ODD_MINUS = 2, ODD_NAN = 4 };
__device__ __forceinline__ uint8_t odd_kind(const char *row, int32_t dtype, int d) {
  const float v = load_any(row, dtype, d);
  return finite(v) ? 0 : v != v ? ODD_NAN : v > 0 ? ODD_PLUS : ODD_MINUS;
}
/* A sum whose other terms are y. */
__device__ __forceinline__ float odd_sum(float y, uint8_t kinds) {
  return !kinds ? y : kinds == ODD_PLUS ? y + emxi_inf() : kinds == ODD_MINUS ? y - emxi_inf() : emxi_nan();
}

template <typename T, int CHUNKS>
__global__ void __launch_bounds__(THREADS) dense_forward(const __grid_constant__ emxi_cuda_attn a) {
  extern __shared__ __align__(128) char shared[];
  float *S = (float *)shared;
  T *A = (T *)(S + TILE * S_LD), *B = A + TILE * product<T>::LD, *P = B + TILE * product<T>::LD;
  uint8_t *odd_values = (uint8_t *)(P + TILE * product<T>::LD); /* [TILE, D] */
  query_tile t;
  if (!tile_of_block(a, blockIdx.x, &t) || !a.dense[t.unit * (a.group * a.q_tiles) + t.tile]) return;
  if (a.odd && !a.odd[t.unit]) return; /* attn_tiles.cuh has been there */
  const int r = threadIdx.x / 4, part = threadIdx.x % 4, lane = threadIdx.x % 32, i = t.i0 + r, D = a.d;
  const bool mine = r < t.rows && a.n_list[t.row0 + r] == EMXI_CUDA_ROW_DENSE;
  const double alpha = alpha_of(a, t.h);
  const bool softmax = alpha == 1.0;
  const float a1 = (float)(alpha - 1.0), slope = a.slopes ? a.slopes[t.h] : 0;
  const powers w = powers_of(alpha);
  const int at = i + t.sp.n - t.sp.s;
  const key_range vis = mine ? visible(a, t.sp, i) : key_range{0, 0};
  const source q = rows_of(a.q, t.b, t.h, t.sp.q0), keys = keys_of(a, a.k, t.b, t.g, t.sp),
               values = keys_of(a, a.v, t.b, t.g, t.sp);
  const int first = visible(a, t.sp, t.i0).from / TILE * TILE, end = visible(a, t.sp, t.i0 + t.rows - 1).to;
  const auto sweep = [&](auto &&each) {
    for (int j0 = first; j0 < end; j0 += TILE) {
      dots<T>(S, A, B, q, t.i0, t.i0 + t.rows, keys, j0, end, D, j0 > first);
      each(scores_of(a, S, slope, at, vis, j0), j0);
    }
  };
  float m = -emxi_inf();
  int count = 0;
  bool odd = false;
  sweep([&](const scored &x, int) {
#pragma unroll
    for (int c = 0; c < PART; c++)
      if (x.seen >> c & 1) {
        odd |= !(x.s[c] < emxi_inf());
        count += x.s[c] > -emxi_inf();
        m = fmaxf(m, x.s[c]);
      }
  });
  m = quad_max(m);
  count = quad_sum(count);
  odd = __ballot_sync(EMXI_FULL, odd) >> (lane & ~3) & 15;
  const bool live = mine && !odd && m > -emxi_inf();
  threshold k = threshold_at(softmax ? 2.0 : alpha, m);
  root x = {-1.0, 0.0, -1.0, softmax || !live};
  double total = 0; /* alpha = 1: sum of exp(s - m) */
  for (int pass = 0; pass < 60; pass++) {
    if (softmax ? pass > 0 : !__syncthreads_or(!x.done)) break;
    const float t_hi = (float)x.t, t_lo = (float)(x.t - (double)t_hi);
    double sums[3] = {0, 0, 0};
    sweep([&](const scored &y, int) {
      float s[3] = {0, 0, 0};
#pragma unroll
      for (int c = 0; c < PART; c++) {
        if (!(y.seen >> c & 1)) continue;
        if (softmax) {
          s[0] += expf(y.s[c] - m);
          continue;
        }
        const float over = (a1 * (y.s[c] - m) - t_hi) - t_lo;
        if (over > 0) add_weight(w, over, s);
      }
#pragma unroll
      for (int e = 0; e < 3; e++) sums[e] += (double)s[e];
    });
#pragma unroll
    for (int e = 0; e < 3; e++) sums[e] = quad_sum(sums[e]);
    if (softmax)
      total = sums[0];
    else if (!x.done)
      x.step(k, sums, 1e-7, 1e-11);
  }
  const float t_hi = (float)x.t, t_lo = (float)(x.t - (double)t_hi);
  float largest = 1, unused; /* weight of the largest score */
  if (live && !softmax) weigh(w, -t_hi, &largest, &unused);
  const float inverse = 1.0f / largest;

  product<T> o[CHUNKS], recent[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    o[c].zero();
    recent[c].zero();
  }
  for (int e = threadIdx.x; e < TILE * D; e += THREADS) odd_values[e] = 0;
  int support = 0;
  sweep([&](scored y, int j0) {
    uint32_t some = 0;
    __syncthreads(); /* S is rewritten */
#pragma unroll
    for (int c = 0; c < PART; c++) {
      float p = 0, u;
      if (live && (y.seen >> c & 1)) {
        const float over = (a1 * (y.s[c] - m) - t_hi) - t_lo;
        if (softmax)
          p = expf(y.s[c] - m);
        else if (over > 0)
          weigh(w, over, &p, &u);
        some |= (uint32_t)(softmax ? y.s[c] > -emxi_inf() : over > 0) << c;
        p *= inverse;
      }
      P[r * product<T>::LD + part * PART + c] = to_element<T>(p);
      S[r * S_LD + part * PART + c] = p;
    }
    const int n = __popc(some);
    if (a.index.data && !softmax) { /* in order of position, while there is room */
      int before = support;
#pragma unroll
      for (int e = 0; e < 3; e++) {
        const int other = __shfl_sync(EMXI_FULL, n, (lane & ~3) + e);
        if (e < part) before += other;
      }
      if (mine) {
        int32_t *index = (int32_t *)row_of(a.index, t.b, t.h, t.sp.q0 + i);
        for (int c = 0; c < PART; c++)
          if (some >> c & 1) {
            if (before < a.list) index[before] = j0 + part * PART + c;
            before++;
          }
      }
    }
    support += quad_sum(n);
    if (!__syncthreads_or(some != 0)) return;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const bool met = load_tile<T, true>(B, values, j0, end, c * TILE, D);
      if (__syncthreads_or(met)) { /* an infinity or NaN among the values: seldom */
        for (int e = threadIdx.x; e < TILE * TILE; e += THREADS) {
          const int qr = e / TILE, d = c * TILE + e % TILE;
          if (d >= D) continue;
          uint8_t kinds = odd_values[qr * D + d];
          for (int j = j0; j < min(j0 + TILE, end); j++)
            if (S[qr * S_LD + j - j0] > 0) kinds |= odd_kind(at_row(values, j), values.dtype, d);
          odd_values[qr * D + d] = kinds;
        }
      }
      recent[c].template add<false, false>(P, B);
      if ((j0 / TILE) % 8 == 7) o[c].take(recent[c]);
      __syncthreads();
    }
  });
  const float factor = softmax ? (float)(1.0 / total) : largest;
  char *out = mine ? row_of(a.o, t.b, t.h, t.sp.q0 + i) : nullptr;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    o[c].take(recent[c]);
    __syncthreads();
    o[c].store(S);
    __syncthreads();
    for (int e = 0; mine && e < PART; e++) {
      const int d = c * TILE + part * PART + e;
      if (d >= D) break;
      const float y = live ? S[r * S_LD + part * PART + e] * factor : odd ? emxi_nan() : 0.0f;
      store_any(out, a.o.dtype, d, odd_sum(y, live ? odd_values[r * D + d] : 0));
    }
  }
  if (!mine || part) return;
  const double tau = odd       ? (double)emxi_nan()
                     : !live   ? -(double)emxi_inf()
                     : softmax ? (double)m + log(total)
                               : k.a * (double)m + x.t;
  if (a.tau.data) *(float *)row_of(a.tau, t.b, t.h, t.sp.q0 + i) = (float)tau;
  if (a.support.data) *(int32_t *)row_of(a.support, t.b, t.h, t.sp.q0 + i) = odd ? 0 : softmax ? count : support;
}

} // namespace

#endif
