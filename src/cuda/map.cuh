/* SPDX-License-Identifier: Apache-2.0
 * Rows of weights p_i = [a x_i - tau]_+^b, their gradients and their losses (emx.h, "mapping"; docs/math.md, 1, 2, 6). Rows [R,N] in f32, f16,
 * bf16, f64.
 *
 * A team works on a row. Up to 1,024 elements: a warp, with the row in registers. Longer: a block, or a cluster of up to 8 blocks with a
 * slice of the row each, in shared memory if it fits. Then forward and loss read a row once and write it once, 2 N elements of traffic and
 * nothing else: the floor is the time of a copy. Rows that fit no cluster are read again for each pass.
 *   1. Read; the largest score m, NaN and +inf noticed.
 *   2. Only scores above m - reach can have weight: they go to a list in shared memory, which is then all that the solver sees. A list
 *      that is too long (a flat row) stays where it is, and the solver passes over the slices instead.
 *   3. The threshold: bracketed closed-form or Newton steps in double, to the end (as src/cpu/solver.inc). Sums are in a fixed order that
 *      depends on N, the dtype and the row alone. A cluster adds its blocks' sums in the order of their ranks.
 *   4. Weights, or the gradient of the loss, straight into the output.
 * Weights are in double until they are rounded once, except softmax's exponentials of f32 and 16-bit rows: 2e-7. Oracle:
 * src/entmax/oracle.c, by tests/gpu/test_gpu_map.c. */
#ifndef EMXI_CUDA_MAP_CUH
#define EMXI_CUDA_MAP_CUH

#include "../entmax/solve.h"
#include "device.cuh"
#include "map.h"

namespace {

constexpr int MAP_THREADS = 256, MAP_WARPS = MAP_THREADS / 32, MAP_OWN = 512, MAP_LIST = 1536, MAP_SUMS = 8;

/* ---- elements */

template <typename T>
struct wide_of {
  using type = float;
};
template <>
struct wide_of<double> {
  using type = double;
};
__device__ __forceinline__ double widen(double x) { return x; }
template <typename T>
__device__ __forceinline__ float widen(T x) {
  return to_float(x);
}
__device__ __forceinline__ void narrow(double x, double *out) { *out = x; }
template <typename T>
__device__ __forceinline__ void narrow(float x, T *out) {
  from_float(x, out);
}
__device__ __forceinline__ double load_value(const char *p, int32_t dtype, int64_t i) {
  return dtype == EMX_F32 ? (double)((const float *)p)[i] : ((const double *)p)[i];
}
__device__ __forceinline__ void store_value(char *p, int32_t dtype, int64_t i, double x) {
  if (dtype == EMX_F32)
    ((float *)p)[i] = (float)x;
  else
    ((double *)p)[i] = x;
}

/* The larger; NaN wins. */
__device__ __forceinline__ float larger(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
__device__ __forceinline__ double larger(double x, double y) { return x != x || y <= x ? x : y; }

/* The largest number that is certainly not above v, which is known to 1e-15 of `size`. */
template <typename R>
__device__ __forceinline__ R below(double v, double size);
template <>
__device__ __forceinline__ float below<float>(double v, double size) {
  return nextafterf((float)(v - 1e-15 * size), -emxi_inf());
}
template <>
__device__ __forceinline__ double below<double>(double v, double size) {
  return v - 1e-15 * size;
}
__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __noinline__ double exponential(double x) { return exp(x); }

/* ---- the map of a row */

__device__ __noinline__ double any_power(double y, double b) { return pow(y, b); }
/* y^b for y > 0; kind: emxi_power_kind(b), or -1 for b = 0. */
__device__ __forceinline__ double power_of(double y, double b, int kind) {
  return kind > 0 ? emxi_power(y, 1.0, kind) : kind < 0 ? 1.0 : any_power(y, b);
}
__device__ __forceinline__ int kind_of(double b) { return b == 0 ? -1 : emxi_power_kind(b); }

/* sum y^q = 1 with y = scale (x - m) - t; weights are y^b, for normmax over their sum. */
struct row_map {
  double alpha, scale, b, q;
  int b_kind, q_kind;
  double root; /* 1/q: alpha - 1 of the entmax that has this threshold */
};
__device__ __forceinline__ row_map map_of(const emxi_cuda_rows &r, double alpha) {
  const double a = alpha - 1.0, b = 1.0 / a;
  const bool norm = r.kind == EMX_MAP_NORMMAX;
  row_map w;
  w.alpha = alpha;
  w.scale = norm ? 1.0 : a;
  w.b = b;
  w.q = norm ? b + 1.0 : b;
  w.b_kind = kind_of(b);
  w.q_kind = kind_of(w.q);
  w.root = norm ? a / alpha : a;
  return w;
}
__device__ __noinline__ void rows_fault(const emxi_cuda_rows &r, int32_t code, int64_t row, int32_t value) {
  if (atomicExch(r.claimed, 1)) return;
  volatile emxi_cuda_fault *fault = r.fault;
  fault->code = code;
  fault->row = (int32_t)row;
  fault->column = 0;
  fault->value = value;
}
/* The row's alpha; 0 for one out of range, which is a fault and makes the row NaN. */
__device__ __forceinline__ double alpha_of(const emxi_cuda_rows &r, int64_t row, bool report) {
  if (!r.alphas) return r.alpha;
  const double alpha = load_value(r.alphas, r.alphas_dtype, row);
  const bool norm = r.kind == EMX_MAP_NORMMAX;
  if (alpha == 1.0 ? r.kind == EMX_MAP_ENTMAX : alpha >= 1.0 + 1e-6 && alpha <= (norm ? 1000.0 : 4.0)) return alpha;
  if (report) rows_fault(r, EMXI_CUDA_FAULT_ROW_ALPHA, row, 0);
  return 0;
}
/* Rows that are not ignored; for all threads of the block. Has barriers. */
__device__ __forceinline__ double counted_rows(const emxi_cuda_rows &r, double *scratch) {
  int64_t count = 0;
  for (int64_t i = threadIdx.x; i < r.rows; i += blockDim.x) count += __ldg(r.target + i) != r.ignore_index;
  return block_sum((double)count, scratch);
}

struct add_up {
  template <int K>
  __device__ __forceinline__ void operator()(double (&x)[K], const double (&y)[K]) const {
#pragma unroll
    for (int k = 0; k < K; k++) x[k] += y[k];
  }
};
struct take_larger {
  __device__ __forceinline__ void operator()(double (&x)[1], const double (&y)[1]) const { x[0] = larger(x[0], y[0]); }
};
/* (u, position): the larger u, of equal ones the first. */
struct take_first_largest {
  __device__ __forceinline__ void operator()(double (&x)[2], const double (&y)[2]) const {
    if (y[0] > x[0] || (y[0] == x[0] && y[1] < x[1])) x[0] = y[0], x[1] = y[1];
  }
};
/* op(x, y) is op(y, x), so all lanes get the same bits. */
template <int K, typename Op>
__device__ __forceinline__ void warp_reduce(double (&x)[K], Op op, int from = 16) {
  for (int step = from; step; step >>= 1) {
    double y[K];
#pragma unroll
    for (int k = 0; k < K; k++) y[k] = __shfl_xor_sync(EMXI_FULL, x[k], step);
    op(x, y);
  }
}

/* ---- clusters */

/* Before it, warps must be whole. */
__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/* The same variable of another block of the cluster. */
template <typename X>
__device__ __forceinline__ X *in_block(X *p, int rank) {
#if __CUDA_ARCH__ >= 900
  X *q;
  asm("mapa.u64 %0, %1, %2;" : "=l"(q) : "l"(p), "r"(rank));
  return q;
#else
  (void)rank;
  return p;
#endif
}

/* ---- teams: each element has one thread that looks at it, by its position alone */

/* A warp. `list` has room for the row. */
template <typename T, int PER>
struct warp_team {
  using R = typename wide_of<T>::type;
  R z[PER], *list;
  int n, count, lane;

  __device__ __forceinline__ bool first() const { return lane == 0; }
  /* The largest, NaN if there is one. */
  __device__ __forceinline__ R open(const T *row) {
    R top = (R)-emxi_inf();
#pragma unroll
    for (int k = 0; k < PER; k++) z[k] = lane + 32 * k < n ? widen(row[lane + 32 * k]) : (R)-emxi_inf();
#pragma unroll
    for (int k = 0; k < PER; k++) top = larger(top, z[k]);
#pragma unroll
    for (int step = 16; step; step >>= 1) top = larger(top, __shfl_xor_sync(EMXI_FULL, top, step));
    return top;
  }
  template <int K, typename Op>
  __device__ __forceinline__ void reduce(double (&x)[K], Op op) {
    warp_reduce(x, op);
  }
  /* Lists what lies above low; how many. */
  __device__ __forceinline__ int64_t keep(R low) {
    count = 0;
    __syncwarp();
#pragma unroll
    for (int k = 0; k < PER; k++) {
      const unsigned votes = __ballot_sync(EMXI_FULL, z[k] > low);
      if (z[k] > low) list[count + __popc(votes & ((1u << lane) - 1))] = z[k];
      count += __popc(votes);
    }
    __syncwarp();
    return count;
  }
  template <typename F>
  __device__ __forceinline__ void each_kept(F f) const {
    for (int i = lane; i < count; i += 32) f(list[i]);
  }
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int k = 0; k < PER; k++)
      if (lane + 32 * k < n) f(z[k], (int64_t)(lane + 32 * k));
  }
  __device__ __forceinline__ void fill(T *out, R value) const {
    for (int i = lane; i < n; i += 32) narrow(value, out + i);
  }
  template <typename F>
  __device__ __forceinline__ void put(T *out, F f) const {
#pragma unroll
    for (int k = 0; k < PER; k++)
      if (lane + 32 * k < n) narrow(f(z[k], (int64_t)(lane + 32 * k)), out + lane + 32 * k);
  }
};

template <typename R>
struct block_shared {
  double scratch[MAP_SUMS][MAP_WARPS];
  double inbox[2][EMXI_CUDA_ROW_BLOCKS][MAP_SUMS];
  int offsets[MAP_WARPS];
  R own[MAP_OWN], all[MAP_LIST]; /* kept by this block; by its cluster */
};

/* The blocks of a cluster, or one. */
template <typename T>
struct block_team {
  using R = typename wide_of<T>::type;
  static constexpr int V = 16 / (int)sizeof(T);
  block_shared<R> *shared;
  T *room; /* for the slice and 16 bytes; NULL: it stays in global memory */
  int rank, size;
  uint32_t turn;
  const T *slice;
  int64_t from, len; /* of the slice */
  const R *list;
  int64_t count; /* entries of the list; -1: the slice itself */
  bool together; /* the list is the whole row's */
  R low;

  __device__ __forceinline__ bool first() const { return rank == 0 && threadIdx.x == 0; }

  __device__ __forceinline__ R open(const T *row) {
    const T *source = row + from;
    R top = (R)-emxi_inf();
    const int phase = (int)((uintptr_t)source % 16 / sizeof(T));
    T *to = room ? room + phase : nullptr;
    const int64_t head = phase ? (V - phase < len ? V - phase : len) : 0, vectors = (len - head) / V, tail = head + vectors * V;
    const auto single = [&](int64_t i) {
      const T x = source[i];
      if (to) to[i] = x;
      top = larger(top, widen(x));
    };
    if (threadIdx.x < head) single(threadIdx.x);
    if (tail + threadIdx.x < len) single(tail + threadIdx.x);
    const uint4 *in = (const uint4 *)(source + head);
    uint4 *out = to ? (uint4 *)(to + head) : nullptr;
    constexpr int AHEAD = 8;
    for (int64_t at = threadIdx.x; at < vectors; at += AHEAD * MAP_THREADS) {
      uint4 x[AHEAD];
#pragma unroll
      for (int k = 0; k < AHEAD; k++)
        if (at + k * MAP_THREADS < vectors) x[k] = __ldcs(in + at + k * MAP_THREADS);
#pragma unroll
      for (int k = 0; k < AHEAD; k++)
        if (at + k * MAP_THREADS < vectors) {
          if (out) out[at + k * MAP_THREADS] = x[k];
          const T *e = (const T *)&x[k];
#pragma unroll
          for (int v = 0; v < V; v++) top = larger(top, widen(e[v]));
        }
    }
    slice = to ? to : source;
    count = -1;
    together = false;
    double m[1] = {(double)top};
    reduce(m, take_larger());
    return (R)m[0];
  }

  /* For all threads of all blocks. With the whole list everywhere, each block does the same sums by itself. */
  template <int K, typename Op>
  __device__ __forceinline__ void reduce(double (&x)[K], Op op) {
    const int lane = threadIdx.x % 32;
    warp_reduce(x, op);
    __syncthreads();
    if (lane == 0)
#pragma unroll
      for (int k = 0; k < K; k++) shared->scratch[k][threadIdx.x / 32] = x[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) x[k] = shared->scratch[k][lane % MAP_WARPS];
    warp_reduce(x, op, MAP_WARPS / 2);
    if (size == 1 || together) return;
    /* Two inboxes in turn: who writes to one again has passed the barrier that all reach after they have read it. */
    double(*box)[MAP_SUMS] = shared->inbox[turn++ & 1];
    if (threadIdx.x < size) {
      double *to = in_block(box[rank], threadIdx.x);
#pragma unroll
      for (int k = 0; k < K; k++) to[k] = x[k];
    }
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int k = 0; k < K; k++) x[k] = box[0][k];
    for (int i = 1; i < size; i++) {
      double y[K];
#pragma unroll
      for (int k = 0; k < K; k++) y[k] = box[i][k];
      op(x, y);
    }
  }

  /* How many threads before this one have, in all. Has barriers. */
  __device__ __forceinline__ int offset_of(int have, int *total) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int upto = have;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int other = __shfl_up_sync(EMXI_FULL, upto, step);
      if (lane >= step) upto += other;
    }
    __syncthreads();
    if (lane == 31) shared->offsets[warp] = upto;
    __syncthreads();
    int before = 0;
    *total = 0;
#pragma unroll
    for (int i = 0; i < MAP_WARPS; i++) {
      const int of = shared->offsets[i];
      before += i < warp ? of : 0;
      *total += of;
    }
    return before + upto - have;
  }

  __device__ __forceinline__ int64_t keep(R bound) {
    low = bound;
    R *to = size == 1 ? shared->all : shared->own;
    const int room_for = size == 1 ? MAP_LIST : MAP_OWN;
    int have = 0, own;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < len; i += MAP_THREADS) have += widen(slice[i]) > low;
    int at = offset_of(have, &own);
    if (own <= room_for)
#pragma unroll 8
      for (int64_t i = threadIdx.x; i < len; i += MAP_THREADS) {
        const R z = widen(slice[i]);
        if (z > low) to[at++] = z;
      }
    __syncthreads();
    list = to;
    count = own <= room_for ? own : -1;
    if (size == 1) return own;
    double x[1] = {threadIdx.x == 0 ? (double)own : 0.0};
    const int box = turn & 1;
    reduce(x, add_up());
    int begin = 0;
    bool fits = x[0] <= MAP_LIST;
    for (int i = 0; i < size; i++) {
      const int theirs = (int)shared->inbox[box][i][0];
      begin += i < rank ? theirs : 0;
      fits &= theirs <= MAP_OWN;
    }
    if (!fits) return (int64_t)x[0];
    for (int to = 0; to < size; to++) {
      R *theirs = in_block(shared->all + begin, to);
      for (int i = threadIdx.x; i < own; i += MAP_THREADS) theirs[i] = shared->own[i];
    }
    cluster_arrive();
    cluster_wait();
    list = shared->all;
    count = (int64_t)x[0];
    together = true;
    return count;
  }
  template <typename F>
  __device__ __forceinline__ void each_kept(F f) const {
    if (count >= 0) {
      for (int64_t i = threadIdx.x; i < count; i += MAP_THREADS) f(list[i]);
      return;
    }
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < len; i += MAP_THREADS) {
      const R z = widen(slice[i]);
      if (z > low) f(z);
    }
  }
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < len; i += MAP_THREADS) f(widen(slice[i]), from + i);
  }
  __device__ __forceinline__ void fill(T *row, R value) const {
    T x;
    narrow(value, &x);
    for (int64_t i = threadIdx.x; i < len; i += MAP_THREADS) row[from + i] = x;
  }
  /* Results may go over what was read: a thread has read a vector before it writes it, and nobody else reads it. */
  template <typename F>
  __device__ __forceinline__ void put(T *row, F f) const {
    T *out = row + from;
    const int phase = (int)((uintptr_t)out % 16 / sizeof(T));
    const int64_t head = phase ? (V - phase < len ? V - phase : len) : 0, vectors = (len - head) / V, tail = head + vectors * V;
    if (threadIdx.x < head) narrow(f(widen(slice[threadIdx.x]), from + threadIdx.x), out + threadIdx.x);
    if (tail + threadIdx.x < len)
      narrow(f(widen(slice[tail + threadIdx.x]), from + tail + threadIdx.x), out + tail + threadIdx.x);
    const bool alike = (uintptr_t)(slice + head) % 16 == 0;
    for (int64_t at = threadIdx.x; at < vectors; at += MAP_THREADS) {
      const int64_t i = head + at * V;
      uint4 x, y;
      T *e = (T *)&x, *w = (T *)&y;
      if (alike)
        x = *(const uint4 *)(slice + i);
      else
#pragma unroll
        for (int v = 0; v < V; v++) e[v] = slice[i + v];
#pragma unroll
      for (int v = 0; v < V; v++) narrow(f(widen(e[v]), from + i + v), w + v);
      __stcs((uint4 *)(out + i), y);
    }
  }
};

/* ---- the threshold */

/* The threshold relative to m, of `count` scores kept. As emxi_root in src/cpu/solver.inc: steps while they stay inside the bracket and
 * make progress, bisection otherwise; the left end when rounding cannot tell the ends apart. */
template <typename Team, typename R = typename Team::R>
__device__ __forceinline__ double threshold_of(Team &team, const row_map &w, double m, int64_t count) {
  const bool closed = w.q == 1.0 || w.q == 2.0;
  const double scale = w.scale, q = w.q;
  const int kind = w.q_kind;
  double lo = -1.0, hi = -(q == 2.0 ? 1.0 / sqrt((double)count) : any_power((double)count, -w.root)) * (1 - 1e-12);
  if (w.root <= 1.0) { /* Jensen's inequality */
    double s[2] = {0, 0};
    team.each_kept([&](R z) {
      const double y = scale * ((double)z - m) + 1.0;
      if (y > 0) s[0] += 1, s[1] += y;
    });
    team.reduce(s, add_up());
    lo = fmax(-1.0, s[1] / s[0] - 1.0 - (q == 2.0 ? 1.0 / sqrt(s[0]) : any_power(s[0], -w.root)) - 1e-12);
  }
  double t = lo, last = (double)emxi_inf();
  for (int it = 0; it < 300; it++) {
    double s[3] = {0, 0, 0}, f, e;
    if (closed) {
      team.each_kept([&](R z) {
        const double y = scale * ((double)z - m) - t;
        if (y > 0) s[0] += 1, s[1] += y, s[2] += y * y;
      });
    } else {
      team.each_kept([&](R z) {
        const double y = scale * ((double)z - m) - t;
        if (y > 0) {
          const double p = power_of(y, q, kind);
          s[0] += 1, s[1] += p / y, s[2] += p;
        }
      });
    }
    team.reduce(s, add_up());
    if (closed) {
      const emxi_sums sums = {s[0], s[1], s[2]};
      f = (q == 1.0 ? s[1] : s[2]) - 1.0;
      e = !(s[0] > 0) ? -0.5 : q == 1.0 ? emxi_step_sparsemax(sums) : emxi_step_entmax15(sums);
    } else {
      f = s[2] - 1.0;
      e = !(s[1] > 0) ? -0.5 : w.root < 1.0 ? (s[2] - any_power(s[2], 1.0 - w.root)) / s[1] : emxi_step_newton(f, s[1], q);
    }
    if (f == 0) return t;
    if (f > 0)
      lo = t;
    else
      hi = t;
    const bool steep = w.root > 1.0;
    const double unit = steep ? -lo * 1e-16 : 1e-16, middle = steep ? -sqrt(lo * hi) : 0.5 * (lo + hi);
    double next = t + e;
    if (fabs(e) <= unit || hi - lo <= 2 * unit) return fmin(fmax(next, lo), hi);
    if (!(next > lo && next < hi)) {
      next = middle;
      if (next <= lo || next >= hi) return lo;
    } else if (steep && fabs(e) > 0.25 * last) {
      next = middle;
    }
    last = fabs(next - t);
    t = next;
  }
  return lo;
}

/* ---- budgets */

/* Keys ascend with the numbers; no NaN. */
__device__ __forceinline__ uint64_t key_of(float x) { return (uint32_t)to_ordered(x) ^ 0x80000000u; }
__device__ __forceinline__ uint64_t key_of(double x) {
  const uint64_t i = (uint64_t)__double_as_longlong(x);
  return i >> 63 ? ~i : i | (uint64_t)1 << 63;
}
__device__ __forceinline__ void of_key(uint64_t key, float *x) { *x = from_ordered((int)((uint32_t)key ^ 0x80000000u)); }
__device__ __forceinline__ void of_key(uint64_t key, double *x) {
  *x = __longlong_as_double((long long)(key >> 63 ? key ^ (uint64_t)1 << 63 : ~key));
}
/* The rank-th largest score, by bisection on the bits: a pass for each bit in which the largest and -inf differ. */
template <typename Team, typename R = typename Team::R>
__device__ __forceinline__ R largest_of(Team &team, R top, double rank) {
  uint64_t lo = key_of((R)-emxi_inf()), hi = key_of(top);
  while (lo < hi) {
    const uint64_t middle = hi - (hi - lo) / 2;
    R v;
    of_key(middle, &v);
    double s[1] = {0};
    team.each([&](R z, int64_t) { s[0] += z >= v; });
    team.reduce(s, add_up());
    if (s[0] >= rank)
      lo = middle;
    else
      hi = middle - 1;
  }
  R v;
  of_key(lo, &v);
  return v;
}
/* t in [-1, 0) with sum min(1, [a (z - v) - t]_+^b) = budget, v the rank-th largest score and rank the budget rounded up. As in
 * src/cpu/entmax_cpu.c, where all passes are over what is kept. */
template <typename Team, typename R = typename Team::R>
__device__ __forceinline__ double budget_of(Team &team, const row_map &w, double v, double budget, double rank, int64_t count) {
  const double a = w.scale, n = (double)count;
  double lo = -1.0, hi = -any_power((budget - (rank - 1)) / n, a) * (1 - 1e-12), t = lo, last = (double)emxi_inf();
  for (int it = 0; it < 400; it++) {
    double s[2] = {0, 0};
    team.each_kept([&](R z) {
      const double e = a * ((double)z - v) - t;
      if (e >= 1) {
        s[0] += 1;
      } else if (e > 0) {
        const double p = power_of(e, w.b, w.b_kind);
        s[0] += p;
        s[1] += p / e;
      }
    });
    team.reduce(s, add_up());
    const double f = s[0] - budget;
    if (fabs(f) <= 1e-16 * n * s[0]) return t; /* what rounding leaves of a sum of n terms */
    if (f > 0)
      lo = t;
    else
      hi = t;
    const bool steep = w.root > 1.0;
    const double unit = steep ? -lo * 1e-16 : 1e-16, middle = steep ? -sqrt(lo * hi) : 0.5 * (lo + hi);
    const double step = s[1] > 0 ? a * f / s[1] : (double)emxi_inf();
    double next = t + step;
    if (fabs(step) <= unit || hi - lo <= 2 * unit) return fmin(fmax(next, lo), hi);
    if (!(next > lo && next < hi) || fabs(step) > 0.25 * last) { /* steps may creep around the corners of the sum */
      next = middle;
      if (next <= lo || next >= hi) return lo;
    }
    last = fabs(next - t);
    t = next;
  }
  return lo;
}
/* The row's budget; 0 for one out of range, which is a fault and makes the row NaN. */
__device__ __forceinline__ double budget_of(const emxi_cuda_rows &r, int64_t row, bool report) {
  if (!r.budgets) return r.budget;
  const double budget = load_value(r.budgets, r.budgets_dtype, row);
  if (budget > 0 && (r.n == 0 || budget <= (double)r.n)) return budget;
  if (report) rows_fault(r, EMXI_CUDA_FAULT_ROW_BUDGET, row, 0);
  return 0;
}

/* ---- forward and loss */

template <typename Team, typename T, typename R = typename Team::R>
__device__ __forceinline__ void budget_row(Team &team, const emxi_cuda_rows &r, int64_t row) {
  const double nan = (double)emxi_nan(), inf = (double)emxi_inf();
  T *p = (T *)r.p + row * r.ldp;
  const double alpha = alpha_of(r, row, team.first());
  double budget = budget_of(r, row, team.first()), tau = nan, support = 0;
  const R top = team.open((const T *)r.x + row * r.ldx);
  if (alpha == 0 || budget == 0 || !((double)top < inf)) {
    team.fill(p, (R)nan);
  } else if ((double)top == -inf) {
    team.fill(p, 0);
    tau = -inf;
  } else {
    double s[1] = {0};
    team.each([&](R z, int64_t) { s[0] += z > (R)-inf; });
    team.reduce(s, add_up());
    double rank = ceil(budget);
    if (s[0] < rank) budget = rank = s[0]; /* all that is visible */
    const row_map w = map_of(r, alpha);
    const double v = (double)largest_of(team, top, rank), reach = 1.0 / w.scale;
    const int64_t count = team.keep(below<R>(v - reach, fabs(v) + reach));
    const double t = budget_of(team, w, v, budget, rank, count);
    const R cut = below<R>(v + t / w.scale, fabs(v) - t / w.scale);
    s[0] = 0;
    team.each_kept([&](R z) { s[0] += w.scale * ((double)z - v) - t > 0; });
    team.reduce(s, add_up());
    support = s[0];
    tau = t + w.scale * v;
    team.put(p, [=](R z, int64_t) -> R {
      if (!(z > cut)) return 0;
      const double e = w.scale * ((double)z - v) - t;
      return !(e > 0) ? (R)0 : e < 1 ? (R)power_of(e, w.b, w.b_kind) : (R)1;
    });
  }
  if (!team.first()) return;
  if (r.tau) store_value(r.tau, r.tau_dtype, row, tau);
  if (r.support) r.support[row] = (int32_t)support;
}

template <typename Team, typename T, typename R = typename Team::R>
__device__ __forceinline__ void map_row(Team &team, const emxi_cuda_rows &r, int64_t row, double scale) {
  const double nan = (double)emxi_nan(), inf = (double)emxi_inf();
  const T *x = (const T *)r.x + row * r.ldx;
  T *p = r.p ? (T *)r.p + row * r.ldp : nullptr;
  const bool loss = r.loss != nullptr;
  int64_t y = -1;
  double at = 0;
  bool bad = false;
  if (loss) {
    y = __ldg(r.target + row);
    if (y == r.ignore_index) { /* whatever it is: the scores are not read */
      if (p) team.fill(p, 0);
      if (team.first()) {
        store_value(r.loss, r.loss_dtype, row, 0);
        if (r.support) r.support[row] = 0;
      }
      return;
    }
    if (y < 0 || y >= r.n) {
      if (team.first()) rows_fault(r, EMXI_CUDA_FAULT_TARGET, row, (int32_t)y);
      bad = true;
    } else {
      at = (double)widen(x[y]); /* dx may be x; what follows has barriers before anything is written */
    }
  }
  const double alpha = alpha_of(r, row, team.first());
  const double m = (double)team.open(x);
  double tau = nan, conjugate = 0, support = 0;
  bad |= alpha == 0 || !(m < inf);
  const bool empty = !bad && m == -inf;
  const double up = loss ? scale * (r.d_loss ? load_value(r.d_loss, r.d_loss_dtype, row * r.inc_d_loss) : 1) : 1;
  if (bad) {
    if (p) team.fill(p, (R)nan);
  } else if (empty) {
    if (p) team.fill(p, 0);
    if (alpha != 1.0) tau = -inf;
  } else if (alpha == 1.0) {
    const R top = (R)m;
    double s[2] = {0, 0};
    team.each([&](R z, int64_t) {
      s[0] += (double)exponential(z - top);
      s[1] += z > (R)-inf;
    });
    team.reduce(s, add_up());
    support = s[1];
    conjugate = log(s[0]);
    const R part = (R)(up / s[0]);
    const R own = (R)(up * ((double)exponential((R)at - top) / s[0] - 1));
    if (p) team.put(p, [=](R z, int64_t i) { return i == y ? own : exponential(z - top) * part; });
  } else {
    const row_map w = map_of(r, alpha);
    const double reach = 1.0 / w.scale;
    const int64_t count = team.keep(below<R>(m - reach, fabs(m) + reach));
    const double t = threshold_of(team, w, m, count), margin = w.root <= 1.0 ? 1e-13 : 0.0;
    const bool norm = r.kind == EMX_MAP_NORMMAX;
    tau = t + w.scale * m;
    /* The support, and what the weights (normmax) or the entropy need. */
    double s[2] = {0, 0};
    team.each_kept([&](R z) {
      const double e = w.scale * ((double)z - m) - t;
      if (!(e > margin)) return;
      s[0] += 1;
      if (norm)
        s[1] += power_of(e, w.b, w.b_kind);
      else if (loss)
        s[1] += e * power_of(e, w.b, w.b_kind);
    });
    team.reduce(s, add_up());
    support = s[0];
    conjugate = norm ? 1.0 + t : s[1] / alpha + (1.0 + t) / (alpha * w.scale) + t / alpha;
    const double part = norm ? 1.0 / s[1] : 1.0;
    const R cut = below<R>(m + t / w.scale, fabs(m) - t / w.scale);
    const auto weight = [=](R z) -> R {
      if (!(z > cut)) return 0;
      const double e = w.scale * ((double)z - m) - t;
      return e > margin ? (R)(part * power_of(e, w.b, w.b_kind)) : (R)0;
    };
    if (!p) {
    } else if (loss) {
      const R own = (R)(up * ((double)weight((R)at) - 1));
      team.put(p, [=](R z, int64_t i) { return i == y ? own : z > cut ? (R)(up * (double)weight(z)) : (R)0; });
    } else {
      team.put(p, [=](R z, int64_t) { return weight(z); });
    }
  }
  if (!team.first()) return;
  if (r.tau) store_value(r.tau, r.tau_dtype, row, tau);
  if (r.support) r.support[row] = (int32_t)support;
  if (loss) store_value(r.loss, r.loss_dtype, row, bad ? nan : empty ? inf : fmax(conjugate + (m - at), 0.0));
}

/* ---- backward */

/* (e^q - 1 - q) / q^2 */
__device__ __noinline__ double second_remainder(double q) {
  if (fabs(q) > 0.5) return (expm1(q) - q) / (q * q);
  double s = 0;
  for (int i = 12; i >= 0; i--) s = (s * q + 1) / (i + 2);
  return s;
}

/* dx from the weights and dp; dp is read where a weight is not zero, and again where it is used: the second time out of a cache. */
template <typename Team, typename T, typename R = typename Team::R>
__device__ __forceinline__ void gradient_row(Team &team, const emxi_cuda_rows &r, int64_t row) {
  const T *p = (const T *)r.p_in + row * r.ldp_in;
  const T *dp = (const T *)r.x + row * r.ldx;
  T *dx = (T *)r.p + row * r.ldp;
  const double alpha = alpha_of(r, row, team.first()), a = alpha - 1.0;
  const double top = (double)team.open(p);
  if (alpha == 0) {
    team.fill(dx, (R)emxi_nan());
    if (r.d_alpha && team.first()) store_value(r.d_alpha, r.d_alpha_dtype, row, (double)emxi_nan());
    return;
  }
  const bool norm = r.kind == EMX_MAP_NORMMAX;
  const int slope_kind = kind_of(2.0 - alpha);
  const double least = alpha > 1.0 ? exp2(-52.0 / a) : 0;
  double size = 1; /* |p|_alpha of normmax */
  if (norm && top > 0) {
    double s[1] = {0};
    team.each([&](R z, int64_t) {
      if (z > 0) s[0] += any_power((double)z / top, alpha);
    });
    team.reduce(s, add_up());
    size = top * any_power(s[0], 1.0 / alpha);
  }
  const double part = 1.0 / size;
  const bool bounded = r.kind == EMX_MAP_BUDGET; /* weights at their bound of one do not move */
  const auto still = [=](R z) { return z <= 0 || (bounded && z >= 1); };
  /* p^(2-alpha), of w = p / size */
  const auto slope = [=](double v) -> double {
    if (alpha == 1.5) return sqrt(v);
    if (alpha == 1.0 || v != v) return v;
    if (alpha == 2.0) return 1;
    return power_of(v < least ? least : v, 2.0 - alpha, slope_kind);
  };
  double base = 0;
  if (alpha > 2.0 || r.d_alpha || norm) { /* J ignores constants: the dp of the largest u is taken off */
    double best[2] = {-1, 0};
    team.each([&](R z, int64_t i) {
      if (still(z)) return;
      const double u = slope((double)z * part);
      if (u > best[0]) best[0] = u, best[1] = (double)i; /* positions ascend */
    });
    team.reduce(best, take_first_largest());
    if (best[0] >= 0) base = (double)widen(dp[(int64_t)best[1]]);
  }
  double s[3] = {0, 0, 0}; /* sum u, sum u g, sum w g */
  team.each([&](R z, int64_t i) {
    if (still(z)) return;
    const double v = (double)z * part, u = slope(v), g = (double)widen(dp[i]) - base;
    s[0] += u;
    s[1] += u != 0 ? u * g : 0.0;
    s[2] += v * g;
  });
  team.reduce(s, add_up());
  if (r.d_alpha) { /* docs/math.md, 6, as in src/cpu/entmax_rows.inc */
    double c[7] = {0, 0, 0, 0, 0, 0, 0};
    team.each([&](R z, int64_t i) {
      if (still(z)) return;
      const double v = (double)z < least ? least : (double)z, l = log(v), q = -a * l, h = v * l * l * second_remainder(q);
      const double g = (double)widen(dp[i]) - base;
      c[0] += v;
      c[1] += v * l;
      c[2] += h;
      c[3] += v + v * q + a * a * h;
      c[4] += g * v;
      c[5] += g * v * l;
      c[6] += g * h;
    });
    team.reduce(c, add_up());
    const double ml = c[1] / c[0], mr = c[2] / c[0];
    if (team.first())
      store_value(r.d_alpha, r.d_alpha_dtype, row,
                  c[0] == 0 ? 0.0 : (mr * c[4] - c[6] - a * (mr * c[5] - ml * c[6])) * c[0] / c[3]);
  }
  const double mean = s[0] == 0 ? 0.0 : s[1] / s[0], spg = size * s[2], factor = size / a;
  team.put(dx, [=](R z, int64_t i) -> R {
    if (still(z)) return 0;
    const double v = (double)z * part, u = slope(v);
    if (u == 0) return 0;
    const double g = (double)widen(dp[i]) - base;
    return norm ? (R)(factor * (u * (g - spg) - size * v * (s[1] - s[0] * spg))) : (R)(u * (g - mean));
  });
}

/* ---- kernels */

template <typename T, int PER, bool BACKWARD>
__global__ __launch_bounds__(MAP_THREADS) void map_warps(const __grid_constant__ emxi_cuda_rows r) {
  using R = typename wide_of<T>::type;
  __shared__ double scratch[32];
  __shared__ R lists[BACKWARD ? 1 : MAP_WARPS][BACKWARD ? 1 : 32 * PER];
  const int warp = threadIdx.x / 32;
  const double scale = !BACKWARD && r.mean && r.p ? 1.0 / counted_rows(r, scratch) : 1.0;
  warp_team<T, PER> team;
  team.lane = threadIdx.x % 32;
  team.n = (int)r.n;
  team.list = lists[BACKWARD ? 0 : warp];
  for (int64_t row = (int64_t)blockIdx.x * MAP_WARPS + warp; row < r.rows; row += (int64_t)gridDim.x * MAP_WARPS)
    if (BACKWARD)
      gradient_row<warp_team<T, PER>, T>(team, r, row);
    else if (r.kind == EMX_MAP_BUDGET)
      budget_row<warp_team<T, PER>, T>(team, r, row);
    else
      map_row<warp_team<T, PER>, T>(team, r, row, scale);
}

extern __shared__ uint4 map_shared[];

template <typename T, bool BACKWARD>
__global__ __launch_bounds__(MAP_THREADS, 3) void map_blocks(const __grid_constant__ emxi_cuda_rows r) {
  using R = typename wide_of<T>::type;
  block_team<T> team;
  team.shared = (block_shared<R> *)map_shared;
  team.room = r.resident ? (T *)((char *)map_shared + (sizeof(block_shared<R>) + 15) / 16 * 16) : nullptr;
  team.size = r.blocks;
  team.rank = (int)(blockIdx.x % (unsigned)r.blocks);
  team.turn = 0;
  team.from = team.rank * r.slice;
  team.len = r.n - team.from < r.slice ? r.n - team.from : r.slice;
  if (team.len < 0) team.len = 0;
  if (team.size > 1) { /* a block may write into another one's memory once that has begun */
    cluster_arrive();
    cluster_wait();
  }
  const double scale = !BACKWARD && r.mean && r.p ? 1.0 / counted_rows(r, team.shared->scratch[0]) : 1.0;
  for (int64_t row = blockIdx.x / (unsigned)r.blocks; row < r.rows; row += gridDim.x / (unsigned)r.blocks) {
    if (BACKWARD)
      gradient_row<block_team<T>, T>(team, r, row);
    else if (r.kind == EMX_MAP_BUDGET)
      budget_row<block_team<T>, T>(team, r, row);
    else
      map_row<block_team<T>, T>(team, r, row, scale);
    __syncthreads(); /* the slice is read by threads that did not load it */
  }
}

} // namespace

#endif
