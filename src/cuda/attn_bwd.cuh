/* SPDX-License-Identifier: Apache-2.0
 * Dense attention, backward, from (q, k, v, tau) alone:   u = p^(2-alpha),  ds = u (dp - (sum u dp)/(sum u)),  dp_ij = do_i.v_j
 *
 *   lists       the caller's support lists, where they are what they should be; else scan_keys with the threshold known
 *   tiles       queries whose tiles hold many nonzeros or all: attn_tiles.cuh, from the tiles that lists name; the others:
 *   resolve     a warp a row: scores and dp of the list by dot products, tau exactly, ds, dq_i = scale sum ds k: 6 D FLOP a nonzero
 *   dense       rows without a list that attn_tiles.cuh does not have (f32, heads past 128, alpha a head) or gave back: passes over the
 *               tiles; dq of 64 queries, or dk, dv of 64 keys, a block
 *   count, ...  nonzeros sorted by key, each key's in the order of rows
 *   gather      a warp a key: dv_j = sum p do, dk_j = scale sum ds q, and the dense rows' share: 4 D FLOP a nonzero
 *
 * Every sum has one owner and a fixed order; no float atomics. Sums in f32 (of a row: double). Oracle: tests/gpu/test_gpu_attn.c. */
#ifndef EMXI_CUDA_ATTN_BWD_CUH
#define EMXI_CUDA_ATTN_BWD_CUH

#include "attn_fwd.cuh"
#include "attn_scan.cuh"

namespace {

/* p and u of a part of a dense row's scores; what is not visible or has no weight is 0, a NaN row's NaN. Whether any is not 0. */
__device__ __forceinline__ bool dense_weights(const powers &w, bool softmax, float a1, const emxi_cuda_row &s, bool mine,
                                              const scored &x, float (&p)[PART], float (&u)[PART]) {
  bool some = false;
#pragma unroll
  for (int c = 0; c < PART; c++) {
    p[c] = u[c] = 0;
    if (!mine || !(x.seen >> c & 1)) continue;
    if (s.nan) {
      p[c] = u[c] = emxi_nan();
    } else if (softmax) {
      p[c] = u[c] = expf(x.s[c] - s.ref) * s.inv;
    } else {
      const float y = (a1 * (x.s[c] - s.ref) - s.t_hi) - s.t_lo;
      if (y > 0) weigh(w, y, &p[c], &u[c]);
    }
    some |= u[c] != 0;
  }
  return some;
}

template <typename T>
size_t dense_queries_shared() {
  return scan_shared<T>() + TILE * product<T>::LD * sizeof(T);
}

template <typename T, int CHUNKS>
__global__ void __launch_bounds__(THREADS) dense_queries(const __grid_constant__ emxi_cuda_attn a) {
  extern __shared__ __align__(128) char shared[];
  float *S = (float *)shared;
  T *A = (T *)(S + TILE * S_LD), *B = A + TILE * product<T>::LD, *P = B + TILE * product<T>::LD;
  query_tile t;
  if (!tile_of_block(a, blockIdx.x, &t) || !a.dense[t.unit * (a.group * a.q_tiles) + t.tile]) return;
  const int r = threadIdx.x / 4, part = threadIdx.x % 4, i = t.i0 + r, D = a.d;
  const int64_t row = t.row0 + r;
  const bool mine = r < t.rows && a.n_list[row] < 0;
  const double alpha = alpha_of(a, t.h);
  const bool softmax = alpha == 1.0;
  const float a1 = (float)(alpha - 1.0), slope = a.slopes ? a.slopes[t.h] : 0;
  const powers w = powers_of(alpha);
  const int at = i + t.sp.n - t.sp.s;
  const key_range vis = mine ? visible(a, t.sp, i) : key_range{0, 0};
  const source q = rows_of(a.q, t.b, t.h, t.sp.q0), grad = rows_of(a.d_o, t.b, t.h, t.sp.q0),
               keys = keys_of(a, a.k, t.b, t.g, t.sp), values = keys_of(a, a.v, t.b, t.g, t.sp);
  const int first = visible(a, t.sp, t.i0).from / TILE * TILE, end = visible(a, t.sp, t.i0 + t.rows - 1).to;
  const auto sweep = [&](auto &&each) {
    for (int j0 = first; j0 < end; j0 += TILE) {
      dots<T>(S, A, B, q, t.i0, t.i0 + t.rows, keys, j0, end, D);
      each(scores_of(a, S, slope, at, vis, j0), j0);
    }
  };
  const float tau = mine ? *(const float *)row_of(a.tau, t.b, t.h, t.sp.q0 + i) : 0;
  emxi_cuda_row s = {};
  s.nan = mine && (a.n_list[row] == EMXI_CUDA_ROW_NAN || !finite(tau));
  threshold k = threshold_at(softmax ? 2.0 : alpha, 0);
  s.ref = softmax ? tau : (float)((double)tau / k.a);
  root x = {-1.0, 1.0, (double)tau - k.a * (double)s.ref, softmax || !mine || s.nan};
  double total = 1;
  bool odd = false;
  for (int pass = 0; pass < 60; pass++) { /* tau has been rounded: where that shows in the sum of p, it is solved again */
    if (softmax ? pass > 0 : !__syncthreads_or(!x.done)) break;
    s.t_hi = (float)x.t;
    s.t_lo = (float)(x.t - (double)s.t_hi);
    double sums[3] = {0, 0, 0};
    sweep([&](const scored &y, int) {
      float f[3] = {0, 0, 0};
#pragma unroll
      for (int c = 0; c < PART; c++) {
        if (!(y.seen >> c & 1)) continue;
        odd |= !(y.s[c] < emxi_inf());
        if (softmax) {
          f[0] += expf(y.s[c] - s.ref);
          continue;
        }
        const float over = (a1 * (y.s[c] - s.ref) - s.t_hi) - s.t_lo;
        if (over > 0) add_weight(w, over, f);
      }
#pragma unroll
      for (int e = 0; e < 3; e++) sums[e] += (double)f[e];
    });
#pragma unroll
    for (int e = 0; e < 3; e++) sums[e] = quad_sum(sums[e]);
    if (softmax)
      total = sums[0];
    else if (!x.done)
      x.step(k, sums, 1e-7, 1e-11);
  }
  odd = __ballot_sync(EMXI_FULL, odd) >> (threadIdx.x % 32 & ~3) & 15;
  s.nan |= mine && odd;
  s.t_hi = (float)x.t;
  s.t_lo = (float)(x.t - (double)s.t_hi);
  s.inv = (float)(1.0 / total);
  double su = 0, sud = 0, share = 0;
  const auto gradients = [&](auto &&each) { /* of tiles with weights: their dp are in S */
                                            sweep([&](const scored &y, int j0) {
                                              float p[PART], u[PART];
                                              if (!__syncthreads_or(dense_weights(w, softmax, a1, s, mine && !s.nan, y, p, u)))
                                                return;
                                              dots<T>(S, A, B, grad, t.i0, t.i0 + t.rows, values, j0, end, D);
                                              each(p, u, j0);
                                            });
  };
  gradients([&](const float(&)[PART], const float(&u)[PART], int) {
    float f = 0, g = 0;
#pragma unroll
    for (int c = 0; c < PART; c++)
      if (u[c] > 0) {
        f += u[c];
        g += u[c] * S[r * S_LD + part * PART + c];
      }
    su += (double)f;
    sud += (double)g;
  });
  su = quad_sum(su);
  sud = quad_sum(sud);
  s.delta = su == 0 ? 0 : (float)(sud / su);
  product<T> dq[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) dq[c].zero();
  gradients([&](const float(&p)[PART], const float(&u)[PART], int j0) {
#pragma unroll
    for (int c = 0; c < PART; c++) {
      float ds = 0;
      if (u[c] > 0) {
        const float g = S[r * S_LD + part * PART + c] - s.delta;
        ds = u[c] * g;
        if (a.d_alpha && p[c] > 0) share += (double)g * alpha_slope(alpha, (double)p[c]);
      }
      P[r * product<T>::LD + part * PART + c] = to_element<T>(ds);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      load_tile<T, true>(B, keys, j0, end, c * TILE, D);
      __syncthreads();
      dq[c].template add<false, false>(P, B);
      __syncthreads();
    }
  });
  share = quad_sum(share);
  char *out = mine ? row_of(a.d_q, t.b, t.h, t.sp.q0 + i) : nullptr;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    __syncthreads();
    dq[c].store(S);
    __syncthreads();
    for (int e = 0; mine && e < PART; e++) {
      const int d = c * TILE + part * PART + e;
      if (d < D) store_any(out, a.d_q.dtype, d, s.nan ? emxi_nan() : S[r * S_LD + part * PART + e] * a.scale);
    }
  }
  if (!mine || part) return;
  a.row[row] = s;
  if (a.d_alpha) a.share[row] = s.nan ? (double)emxi_nan() : share;
}

template <typename T>
size_t dense_keys_shared(int D) {
  return scan_shared<T>() + 2 * TILE * product<T>::LD * sizeof(T) + (size_t)TILE * D;
}

/* Notes what kinds of infinity and NaN columns d0 .. d0+63 of `grad` bring to a tile of keys, by the weights P of rows i0 ..
 * end-1. noted: there are notes already. */
template <typename T>
__device__ __noinline__ void mark_odd(uint8_t *kinds, bool noted, const T *P, source grad, int i0, int end, int d0, int D) {
  for (int e = threadIdx.x; !noted && e < TILE * D; e += THREADS) kinds[e] = 0;
  __syncthreads();
  for (int e = threadIdx.x; e < TILE * TILE; e += THREADS) {
    const int j = e / TILE, d = d0 + e % TILE;
    if (d >= D) continue;
    for (int i = i0; i < end; i++)
      if (!((float)P[(i - i0) * product<T>::LD + j] == 0)) kinds[j * D + d] |= odd_kind(at_row(grad, i), grad.dtype, d);
  }
}

template <typename T, int CHUNKS>
__global__ void __launch_bounds__(THREADS, 1) /* for two blocks' sake registers would spill */ dense_keys(
    const __grid_constant__ emxi_cuda_attn a) {
  extern __shared__ __align__(128) char shared[];
  float *S = (float *)shared;
  T *A = (T *)(S + TILE * S_LD), *B = A + TILE * product<T>::LD, *P = B + TILE * product<T>::LD, *dS = P + TILE * product<T>::LD;
  uint8_t *odd_grads = (uint8_t *)(dS + TILE * product<T>::LD); /* [TILE, D]; set once there are some */
  key_tile t;
  if (!key_tile_of(a, blockIdx.x, &t)) return;
  const int r = threadIdx.x / 4, part = threadIdx.x % 4, D = a.d;
  const float stretch = sizeof(T) == 2 ? 1024.0f : 1.0f; /* small weights of flat rows are no numbers of f16 otherwise */
  const source keys = keys_of(a, a.k, t.b, t.g, t.sp), values = keys_of(a, a.v, t.b, t.g, t.sp);
  product<T> dk[CHUNKS], dv[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    dk[c].zero();
    dv[c].zero();
  }
  bool any = false, odd = false;
  const int n_tiles = t.n ? (t.sp.s + TILE - 1) / TILE : 0;
  for (int e = 0; e < a.group * n_tiles; e++) { /* tiles of queries, head by head; where none of many is dense, on to the next */
    const int hh = e / n_tiles, x = e % n_tiles;
    const int64_t x0 = a.packed ? t.sp.q_tile : 0;
    const int32_t *dense = a.dense + ((int64_t)t.unit * a.group + hh) * a.q_tiles + x0;
    if (x % THREADS == 0 && !__syncthreads_or(x + (int)threadIdx.x < n_tiles && dense[x + threadIdx.x])) {
      e += min(THREADS, n_tiles - x) - 1;
      continue;
    }
    if (!dense[x]) continue;
    query_tile qt;
    locate(a, t.b, x + x0, (t.g - a.g0) * a.group + hh, &qt);
    if (visible(a, t.sp, qt.i0).from >= t.j0 + TILE || visible(a, t.sp, qt.i0 + qt.rows - 1).to <= t.j0) continue;
    const bool mine = r < qt.rows && a.n_list[qt.row0 + r] < 0;
    const emxi_cuda_row s = mine ? a.row[qt.row0 + r] : emxi_cuda_row{};
    const double alpha = alpha_of(a, qt.h);
    const source q = rows_of(a.q, t.b, qt.h, t.sp.q0), grad = rows_of(a.d_o, t.b, qt.h, t.sp.q0);
    const int q_end = qt.i0 + qt.rows, end = t.j0 + t.n;
    dots<T>(S, A, B, q, qt.i0, q_end, keys, t.j0, end, D);
    float p[PART], u[PART];
    const scored y = scores_of(a, S, a.slopes ? a.slopes[qt.h] : 0, qt.i0 + r + t.sp.n - t.sp.s,
                               mine ? visible(a, t.sp, qt.i0 + r) : key_range{0, 0}, t.j0);
    if (!__syncthreads_or(dense_weights(powers_of(alpha), alpha == 1.0, (float)(alpha - 1.0), s, mine, y, p, u))) continue;
    any = true;
    dots<T>(S, A, B, grad, qt.i0, q_end, values, t.j0, end, D);
#pragma unroll
    for (int c = 0; c < PART; c++) {
      const int e = r * product<T>::LD + part * PART + c;
      P[e] = to_element<T>(p[c] * stretch);
      dS[e] = to_element<T>(u[c] != 0 ? u[c] * (S[r * S_LD + part * PART + c] - s.delta) : 0.0f);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const bool met = load_tile<T, true>(A, grad, qt.i0, q_end, c * TILE, D);
      load_tile<T, true>(B, q, qt.i0, q_end, c * TILE, D);
      if (__syncthreads_or(met)) { /* an infinity or NaN in a gradient: seldom */
        mark_odd(odd_grads, odd, P, grad, qt.i0, q_end, c * TILE, D);
        odd = true;
      }
      dv[c].template add<true, false>(P, A);
      dk[c].template add<true, false>(dS, B);
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) a.has_dense[blockIdx.x] = any;
  if (!any) return;
  const int64_t out = (int64_t)blockIdx.x * TILE * D;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    for (int which = 0; which < 2; which++) {
      __syncthreads();
      (which ? dv[c] : dk[c]).store(S);
      __syncthreads();
      for (int e = 0; e < PART; e++) {
        const int d = c * TILE + part * PART + e;
        const float y = S[r * S_LD + part * PART + e];
        if (d >= D) break;
        (which ? a.dv : a.dk)[out + r * D + d] = !which ? y : odd_sum(y / stretch, odd ? odd_grads[r * D + d] : 0);
      }
    }
}

/* One slice. */
template <typename T, int CHUNKS>
void attend_chunks(const emxi_cuda_attn &call, cudaStream_t stream) {
  emxi_cuda_attn a = call; /* for what is not split */
  a.split = nullptr;
  const int64_t heads = (int64_t)a.ng * a.group, units = a.packed ? a.ng : (int64_t)a.nb * a.ng, key_tiles = units * a.k_tiles;
  const unsigned tiles = (unsigned)(a.q_tiles * heads * (a.packed ? 1 : a.nb));
  const auto with = [](auto kernel, size_t shared) {
    (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    return shared;
  };
  const auto scan = [&](const emxi_cuda_attn &a) {
    if constexpr (sizeof(T) == 2 && CHUNKS <= 2) {
      if (a.quads) {
        constexpr int D = CHUNKS * TILE;
        fast_scan<T, D><<<(unsigned)(a.q_blocks * heads * (a.packed ? 1 : a.nb)), FAST_THREADS,
                          with(fast_scan<T, D>, fast<D>::SHARED), stream>>>(a);
        return;
      }
    }
    scan_keys<T><<<tiles, THREADS, with(scan_keys<T>, scan_shared<T>()), stream>>>(a);
  };
  const auto multiply = [&](const emxi_cuda_attn &a, int keys) {
    if (a.odd && tiles)
      (dtype_of<T> == EMX_F16 ? emxi_cuda_attn_tiles_f16 : emxi_cuda_attn_tiles_bf16)(&a, keys, (unsigned)units, stream);
  };
  /* Heads with and without a slope one after the other, where the scan differs: lists of both kinds share their memory. */
  const auto for_kinds = [&](auto f) {
    emxi_cuda_attn k = call;
    if (!k.split) return f(k);
    k.slopes = nullptr;
    k.norms = nullptr;
    k.quads = 1;
    f(k);
    k = call;
    k.sloped = 1;
    f(k);
  };
  if (a.odd && tiles) emxi_cuda_attn_find_odd(&a, (unsigned)units, stream);
  if (a.norms && tiles) emxi_cuda_attn_norms(&a, (unsigned)units, stream);
  if (!a.backward) {
    if (!tiles) return;
    const size_t dense = with(dense_forward<T, CHUNKS>, dense_forward_shared<T>(a.d));
    for_kinds([&](const emxi_cuda_attn &a) {
      if (a.quads) {
        (sizeof(T) == 2 && dtype_of<T> == EMX_F16 ? emxi_cuda_attn_sieve_f16 : emxi_cuda_attn_sieve_bf16)(
            &a, a.packed ? 1 : (unsigned)a.nb, stream);
      } else {
        scan(a);
        emxi_cuda_attn_resolve_forward(&a, tiles, stream);
      }
      multiply(a, 0);
      dense_forward<T, CHUNKS><<<tiles, THREADS, dense, stream>>>(a);
    });
    return;
  }
  const bool given = a.index.data && a.support.data;
  const auto survey = [&](const emxi_cuda_attn &a, int by_given) {
    if (!a.mode) return;
    emxi_cuda_attn_survey(&a, tiles, by_given, stream);
    multiply(a, 0);
  };
  if (a.d_alpha) (void)cudaMemsetAsync(a.share, 0, (size_t)a.rows * sizeof *a.share, stream);
  if (tiles) {
    if (!given) {
      (void)cudaMemsetAsync(a.todo, 1, (size_t)a.rows, stream);
      if (a.mode) (void)cudaMemsetAsync(a.mode, 0, (size_t)(units * a.group * a.q_tiles) * sizeof *a.mode, stream);
    }
    for_kinds([&](const emxi_cuda_attn &a) {
      if (given) {
        survey(a, 1);
        emxi_cuda_attn_resolve_backward(&a, tiles, 1, stream);
      }
      scan(a);
      survey(a, 0);
      emxi_cuda_attn_resolve_backward(&a, tiles, 0, stream);
      dense_queries<T, CHUNKS><<<tiles, THREADS, with(dense_queries<T, CHUNKS>, dense_queries_shared<T>()), stream>>>(a);
    });
  }
  if (key_tiles) {
    emxi_cuda_attn_sort(&a, (unsigned)units, stream);
    dense_keys<T, CHUNKS><<<(unsigned)key_tiles, THREADS, with(dense_keys<T, CHUNKS>, dense_keys_shared<T>(a.d)), stream>>>(a);
    multiply(a, 1);
    emxi_cuda_attn_gather_keys(&a, (unsigned)units, stream);
  }
  if (a.d_alpha) emxi_cuda_attn_shares(&a, stream);
}

/* Whether attn_tiles.cuh has what the call asks for. Weights are y^(1/(alpha-1)), by way of log y in f32. */
template <typename T>
bool tiles_fit(const emxi_cuda_attn &a) {
  return sizeof(T) == 2 && a.v.dtype == dtype_of<T> && a.q.vectors && a.k.vectors && a.v.vectors &&
         (!a.backward || a.d_o.vectors) && a.d <= 2 * TILE && a.d % 8 == 0 && !a.block_table && !a.alphas &&
         (a.alpha == 1.0 || a.alpha >= 1.1);
}
/* Whether fast_scan is there, for this device, and has what the call asks for of heads without a slope. */
template <typename T>
bool scan_is_fast(const emxi_cuda_attn &a) {
  if constexpr (sizeof(T) == 2) {
    cudaFuncAttributes f;
    const bool fits = a.d <= 128 && a.d % 8 == 0 && a.q.vectors && a.k.vectors && !a.block_table && a.scale > 0 && a.max_q > TILE;
    return fits && !cudaFuncGetAttributes(&f, fast_scan<T, 64>) && f.ptxVersion == 90;
  }
  return false;
}

template <typename T>
void attend(const emxi_cuda_attn &call, void *stream) {
  emxi_cuda_attn a = call;
  a.quads = scan_is_fast<T>(a);
  if (a.quads && a.slopes) a.split = a.slopes, a.quads = 0;
  if (!tiles_fit<T>(a)) a.odd = a.mode = nullptr;
  if (a.d <= TILE)
    attend_chunks<T, 1>(a, (cudaStream_t)stream);
  else if (a.d <= 2 * TILE)
    attend_chunks<T, 2>(a, (cudaStream_t)stream);
  else
    attend_chunks<T, 4>(a, (cudaStream_t)stream);
}

} // namespace

#endif
