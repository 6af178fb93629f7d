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
 *   3. The threshold: bracketed closed-form or Newton steps, in float until they are small and then in double to the end (as
 *      src/cpu/solver.inc). Sums are in a fixed order that depends on the row and its length alone. A cluster adds its blocks' sums in
 *      the order of their ranks.
 *   4. Weights, or the gradient of the loss, straight into the output.
 * Weights are in double until they are rounded once, except softmax's exponentials of f32 and 16-bit rows: 2e-7. Oracle:
 * src/entmax/oracle.c, by tests/gpu/test_gpu_maps.c. */
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

__device__ __half2 pair_of(__half);
__device__ __nv_bfloat162 pair_of(__nv_bfloat16);

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
/* 16 bytes of a row, its largest element. */
template <typename T>
struct alignas(16) pack {
  T e[16 / sizeof(T)];
};
__device__ __forceinline__ float top_of(const pack<float> &x) { return larger(larger(x.e[0], x.e[1]), larger(x.e[2], x.e[3])); }
__device__ __forceinline__ double top_of(const pack<double> &x) { return larger(x.e[0], x.e[1]); }
template <typename T>
__device__ __forceinline__ float top_of(const pack<T> &x) {
  const auto pair = [&](int i) { return *(const decltype(pair_of(T{})) *)&x.e[2 * i]; };
  const auto two = __hmax2_nan(__hmax2_nan(pair(0), pair(1)), __hmax2_nan(pair(2), pair(3)));
  return widen(__hmax_nan(two.x, two.y));
}
__device__ __forceinline__ float exponential(float x) { return __expf(x); }
__device__ __noinline__ double exponential(double x) { return exp(x); }

/* ---- the map of a row */

__device__ __noinline__ double any_power(double y, double b) { return pow(y, b); }
/* y^b for y > 0; kind: emxi_power_kind(b), or -1 for b = 0. */
__device__ __forceinline__ double power_of(double y, double b, int kind) {
  return kind > 0 ? emxi_power(y, 1.0, kind) : kind < 0 ? 1.0 : any_power(y, b);
}
__device__ __forceinline__ float power_of(float y, float b, int kind) {
  return kind == 1 ? y : kind == 2 ? y * y : kind == 3 ? y * y * y : kind == 4 ? y * y * (y * y) : __powf(y, b);
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
/* The row's alpha; 0 for one out of range, which is a fault and makes the row NaN. */
__device__ __forceinline__ double alpha_of(const emxi_cuda_rows &r, int64_t row, bool report) {
  if (!r.alphas) return r.alpha;
  const double alpha = load_value(r.alphas, r.alphas_dtype, row);
  const bool norm = r.kind == EMX_MAP_NORMMAX;
  if (alpha == 1.0 ? r.kind == EMX_MAP_ENTMAX : alpha >= 1.0 + 1e-6 && alpha <= (norm ? 1000.0 : 4.0)) return alpha;
  if (report) report_fault(r, EMXI_CUDA_FAULT_ROW_ALPHA, (int32_t)row, 0, 0);
  return 0;
}
/* Rows that are not ignored; for all threads of the block. Has barriers. */
__device__ __forceinline__ double counted_rows(const emxi_cuda_rows &r, double *scratch) {
  int64_t count = 0;
  for (int64_t i = threadIdx.x; i < r.rows; i += blockDim.x) count += __ldg(r.target + i) != r.ignore_index;
  return block_sum((double)count, scratch);
}

struct add_up {
  template <typename X, int K>
  __device__ __forceinline__ void operator()(X (&x)[K], const X (&y)[K]) const {
#pragma unroll
    for (int k = 0; k < K; k++) x[k] += y[k];
  }
};
struct take_larger {
  template <typename X>
  __device__ __forceinline__ void operator()(X (&x)[1], const X (&y)[1]) const {
    x[0] = larger(x[0], y[0]);
  }
};
/* (u, position): the larger u, of equal ones the first. */
struct take_first_largest {
  __device__ __forceinline__ void operator()(double (&x)[2], const double (&y)[2]) const {
    if (y[0] > x[0] || (y[0] == x[0] && y[1] < x[1])) x[0] = y[0], x[1] = y[1];
  }
};
/* op(x, y) is op(y, x), so all lanes get the same bits. */
template <typename X, int K, typename Op>
__device__ __forceinline__ void warp_reduce(X (&x)[K], Op op, int from = 16) {
#pragma unroll
  for (int step = from; step; step >>= 1) {
    X y[K];
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

/* Elements [i, i + V) of p[n]; past its end `pad`. `aligned`: p is, to 16 bytes. */
template <typename T>
__device__ __forceinline__ pack<T> get(const T *p, int i, int n, bool aligned, T pad) {
  constexpr int V = 16 / (int)sizeof(T);
  if (aligned && i + V <= n) return *(const pack<T> *)(p + i);
  pack<T> x;
#pragma unroll
  for (int v = 0; v < V; v++) x.e[v] = i + v < n ? p[i + v] : pad;
  return x;
}
template <typename T>
__device__ __forceinline__ bool is_aligned(const T *p) {
  return (uintptr_t)p % 16 == 0;
}

/* A warp, lanes with 16 bytes of every 512. `list` has room for the row. */
template <typename T, int PER>
struct warp_team {
  using R = typename wide_of<T>::type;
  static constexpr int G = 16 / (int)sizeof(T), GROUPS = PER / G;
  R z[GROUPS][G], g[GROUPS][G], *list;
  int n, count, lane;

  __device__ __forceinline__ bool first() const { return lane == 0; }
  __device__ __forceinline__ void load(const T *row, R pad, R (&to)[GROUPS][G]) {
    T past;
    narrow(pad, &past);
    const bool aligned = is_aligned(row);
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
      const pack<T> x = get(row, (lane + 32 * k) * G, n, aligned, past);
#pragma unroll
      for (int v = 0; v < G; v++) to[k][v] = widen(x.e[v]);
    }
  }
  /* The largest, NaN if there is one. Past the end is `pad`. */
  __device__ __forceinline__ R open(const T *row, R pad) {
    R top[1] = {(R)-emxi_inf()};
    load(row, pad, z);
#pragma unroll
    for (int k = 0; k < GROUPS; k++)
#pragma unroll
      for (int v = 0; v < G; v++) top[0] = larger(top[0], z[k][v]);
    warp_reduce(top, take_larger());
    return top[0];
  }
  __device__ __forceinline__ void attach(const T *row) { load(row, 0, g); }
  template <typename X, int K, typename Op>
  __device__ __forceinline__ void reduce(X (&x)[K], Op op) {
    warp_reduce(x, op);
  }
  /* Lists what lies above low; how many. */
  __device__ __forceinline__ int keep(R low) {
    count = 0;
    __syncwarp();
#pragma unroll
    for (int k = 0; k < GROUPS; k++)
#pragma unroll
      for (int v = 0; v < G; v++) {
        const unsigned votes = __ballot_sync(EMXI_FULL, z[k][v] > low);
        if (z[k][v] > low) list[count + __popc(votes & ((1u << lane) - 1))] = z[k][v];
        count += __popc(votes);
      }
    __syncwarp();
    return count;
  }
  template <typename F>
  __device__ __forceinline__ void each_kept(F f) const {
#pragma unroll 1
    for (int i = lane; i < count; i += 32) f(list[i]);
  }
  /* f(G elements). */
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int k = 0; k < GROUPS; k++) f(z[k]);
  }
  /* f(element, the attached row's, position) where the element is not zero. */
  template <typename F>
  __device__ __forceinline__ void each_pair(F f) const {
#pragma unroll
    for (int k = 0; k < GROUPS; k++)
#pragma unroll
      for (int v = 0; v < G; v++)
        if (z[k][v] != 0) f(z[k][v], g[k][v], (lane + 32 * k) * G + v);
  }
  __device__ __forceinline__ void fill(T *out, R value) const {
    for (int i = lane; i < n; i += 32) narrow(value, out + i);
  }
  template <typename F>
  __device__ __forceinline__ void write(T *out, F f) const {
    const bool aligned = is_aligned(out);
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
      const int i = (lane + 32 * k) * G;
      pack<T> y;
#pragma unroll
      for (int v = 0; v < G; v++) narrow(f(z[k][v], g[k][v], i + v), &y.e[v]);
      if (aligned && i + G <= n)
        *(pack<T> *)(out + i) = y;
      else
#pragma unroll
        for (int v = 0; v < G; v++)
          if (i + v < n) out[i + v] = y.e[v];
    }
  }
  /* f(element, position). It is 0 at and under `cut` but for the position `but`, which longer rows make use of. */
  template <typename F>
  __device__ __forceinline__ void put(T *out, R, int, F f) const {
    write(out, [&](R x, R, int i) { return f(x, i); });
  }
  template <typename F>
  __device__ __forceinline__ void put_pair(T *out, F f) const {
    write(out, [&](R x, R d, int) { return x != 0 ? f(x, d) : (R)0; });
  }
};

template <typename R>
struct block_shared {
  double scratch[2][MAP_SUMS][MAP_WARPS];
  double inbox[2][EMXI_CUDA_ROW_BLOCKS][MAP_SUMS];
  int offsets[MAP_WARPS];
  R own[MAP_OWN], all[MAP_LIST]; /* kept by this block; by its cluster */
};

/* The blocks of a cluster, or one. Threads look at 16 bytes of the slice at a time. */
template <typename T>
struct block_team {
  using R = typename wide_of<T>::type;
  static constexpr int V = 16 / (int)sizeof(T), G = V, STEP = V * MAP_THREADS;
  block_shared<R> *shared;
  T *room; /* for the slice and 16 bytes; NULL: it stays in global memory */
  int rank, size;
  uint32_t turn, phase;
  const T *slice, *other; /* other: the attached row's */
  int from, len;          /* of the slice */
  T pad;
  bool aligned; /* the slice */
  const R *list;
  int count;     /* entries of the list; -1: the slice itself */
  bool together; /* the list is the whole row's */
  R low;

  __device__ __forceinline__ bool first() const { return rank == 0 && threadIdx.x == 0; }

  __device__ __forceinline__ R open(const T *row, R past) {
    const T *source = row + from;
    R top[1] = {(R)-emxi_inf()};
    const int off = (int)((uintptr_t)source % 16 / sizeof(T));
    T *to = room ? room + off : nullptr;
    const int head = off ? min(V - off, len) : 0, vectors = (len - head) / V, tail = head + vectors * V;
    const auto single = [&](int i) {
      const T x = source[i];
      if (to) to[i] = x;
      top[0] = larger(top[0], widen(x));
    };
    if ((int)threadIdx.x < head) single((int)threadIdx.x);
    if (tail + (int)threadIdx.x < len) single(tail + (int)threadIdx.x);
    const uint4 *in = (const uint4 *)(source + head);
    uint4 *out = to ? (uint4 *)(to + head) : nullptr;
    constexpr int AHEAD = 8;
    for (int at = threadIdx.x; at < vectors; at += AHEAD * MAP_THREADS) {
      uint4 x[AHEAD];
#pragma unroll
      for (int k = 0; k < AHEAD; k++)
        if (at + k * MAP_THREADS < vectors) x[k] = __ldcs(in + at + k * MAP_THREADS);
#pragma unroll
      for (int k = 0; k < AHEAD; k++)
        if (at + k * MAP_THREADS < vectors) {
          if (out) out[at + k * MAP_THREADS] = x[k];
          top[0] = larger(top[0], top_of((const pack<T> &)x[k]));
        }
    }
    slice = to ? to : source;
    aligned = is_aligned(slice);
    narrow(past, &pad);
    count = -1;
    together = false;
    reduce(top, take_larger());
    return top[0];
  }
  __device__ __forceinline__ void attach(const T *row) { other = row + from; }

  /* For all threads of all blocks. With the whole list everywhere, each block does the same sums by itself. Two scratches in turn: who
   * writes to one again has passed the barrier that all reach after they have read it. The same of the inboxes. */
  template <typename X, int K, typename Op>
  __device__ __forceinline__ void reduce(X (&x)[K], Op op) {
    const int lane = threadIdx.x % 32;
    double(*scratch)[MAP_WARPS] = shared->scratch[phase++ & 1];
    warp_reduce(x, op);
    if (lane == 0)
#pragma unroll
      for (int k = 0; k < K; k++) scratch[k][threadIdx.x / 32] = (double)x[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) x[k] = (X)scratch[k][lane % MAP_WARPS];
    warp_reduce(x, op, MAP_WARPS / 2);
    if (size == 1 || together) return;
    double(*box)[MAP_SUMS] = shared->inbox[turn++ & 1];
    if ((int)threadIdx.x < size) {
      double *to = in_block(box[rank], (int)threadIdx.x);
#pragma unroll
      for (int k = 0; k < K; k++) to[k] = (double)x[k];
    }
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int k = 0; k < K; k++) x[k] = (X)box[0][k];
    for (int i = 1; i < size; i++) {
      X y[K];
#pragma unroll
      for (int k = 0; k < K; k++) y[k] = (X)box[i][k];
      op(x, y);
    }
  }

  /* How many threads before this one have, in all. Has barriers. */
  __device__ __forceinline__ int offset_of(int have, int *total) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int upto = have;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int before = __shfl_up_sync(EMXI_FULL, upto, step);
      if (lane >= step) upto += before;
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

  __device__ __forceinline__ int keep(R bound) {
    low = bound;
    R *to = size == 1 ? shared->all : shared->own;
    const int room_for = size == 1 ? MAP_LIST : MAP_OWN;
    int have = 0, own;
    uint64_t groups = 0; /* which of this thread's have any; of more than 64 a bit stands for several */
    for (int i = (int)threadIdx.x * V, k = 0; i < len; i += STEP, k++) {
      const pack<T> x = get(slice, i, len, aligned, pad);
      if (!(top_of(x) > low)) continue;
      groups |= (uint64_t)1 << (k & 63);
#pragma unroll
      for (int v = 0; v < V; v++) have += widen(x.e[v]) > low;
    }
    int at = offset_of(have, &own);
    if (own <= room_for && have)
      for (int i = (int)threadIdx.x * V, k = 0; i < len; i += STEP, k++) {
        if (!(groups >> (k & 63) & 1)) continue;
        const pack<T> x = get(slice, i, len, aligned, pad);
#pragma unroll
        for (int v = 0; v < V; v++)
          if (widen(x.e[v]) > low) to[at++] = widen(x.e[v]);
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
    if (!fits) return (int)x[0];
    for (int block = 0; block < size; block++) {
      R *theirs = in_block(shared->all + begin, block);
      for (int i = threadIdx.x; i < own; i += MAP_THREADS) theirs[i] = shared->own[i];
    }
    cluster_arrive();
    cluster_wait();
    list = shared->all;
    count = (int)x[0];
    together = true;
    return count;
  }
  template <typename F>
  __device__ __forceinline__ void each_kept(F f) const {
    if (count >= 0) {
#pragma unroll 1
      for (int i = threadIdx.x; i < count; i += MAP_THREADS) f(list[i]);
      return;
    }
#pragma unroll 1
    for (int i = (int)threadIdx.x * V; i < len; i += STEP) {
      const pack<T> x = get(slice, i, len, aligned, pad);
      if (!(top_of(x) > low)) continue;
#pragma unroll
      for (int v = 0; v < V; v++) {
        const R z = widen(x.e[v]);
        if (z > low) f(z);
      }
    }
  }
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    for (int i = (int)threadIdx.x * V; i < len; i += STEP) {
      const pack<T> x = get(slice, i, len, aligned, pad);
      R z[V];
#pragma unroll
      for (int v = 0; v < V; v++) z[v] = widen(x.e[v]);
      f(z);
    }
  }
  __device__ __forceinline__ static bool any(const pack<T> &x) {
    const uint4 &b = (const uint4 &)x;
    return b.x | b.y | b.z | b.w;
  }
  template <typename F>
  __device__ __forceinline__ void each_pair(F f) const {
    for (int i = (int)threadIdx.x * V; i < len; i += STEP) {
      const pack<T> x = get(slice, i, len, aligned, pad);
      if (!any(x)) continue;
      const pack<T> d = get(other, i, len, is_aligned(other), pad);
#pragma unroll
      for (int v = 0; v < V; v++)
        if (widen(x.e[v]) != 0) f(widen(x.e[v]), widen(d.e[v]), from + i + v);
    }
  }
  __device__ __forceinline__ void fill(T *row, R value) const {
    T x;
    narrow(value, &x);
    for (int i = threadIdx.x; i < len; i += MAP_THREADS) row[from + i] = x;
  }
  /* Writes 16 bytes where they lie so in `row`: single(i) is the element of the slice at i, whole(i) V of them. Results may go over what
   * was read: a thread has read an element before it writes it, and nobody else reads it. */
  template <typename One, typename Whole>
  __device__ __forceinline__ void write(T *row, One single, Whole whole) const {
    T *out = row + from;
    const int off = (int)((uintptr_t)out % 16 / sizeof(T));
    const int head = off ? min(V - off, len) : 0, vectors = (len - head) / V, tail = head + vectors * V;
    if ((int)threadIdx.x < head) out[threadIdx.x] = single((int)threadIdx.x);
    if (tail + (int)threadIdx.x < len) out[tail + threadIdx.x] = single(tail + (int)threadIdx.x);
    for (int at = threadIdx.x; at < vectors; at += MAP_THREADS) {
      const pack<T> y = whole(head + at * V);
      __stcs((uint4 *)(out + head) + at, (const uint4 &)y);
    }
  }
  /* V elements from i on, all in the slice. */
  __device__ __forceinline__ static pack<T> whole_pack(const T *p, int i) {
    if ((uintptr_t)(p + i) % 16 == 0) return *(const pack<T> *)(p + i);
    pack<T> x;
#pragma unroll
    for (int v = 0; v < V; v++) x.e[v] = p[i + v];
    return x;
  }
  template <typename F>
  __device__ __forceinline__ void put(T *row, R cut, int but, F f) const {
    write(
        row,
        [&](int i) {
          T y;
          narrow(f(widen(slice[i]), from + i), &y);
          return y;
        },
        [&](int i) {
          const pack<T> x = whole_pack(slice, i);
          pack<T> y = {};
          if (!(top_of(x) > cut) && (unsigned)(but - from - i) >= (unsigned)V) return y;
#pragma unroll
          for (int v = 0; v < V; v++) narrow(f(widen(x.e[v]), from + i + v), &y.e[v]);
          return y;
        });
  }
  template <typename F>
  __device__ __forceinline__ void put_pair(T *row, F f) const {
    const auto result = [&](T x, T d) {
      T y;
      narrow(widen(x) != 0 ? f(widen(x), widen(d)) : (R)0, &y);
      return y;
    };
    write(
        row, [&](int i) { return result(slice[i], other[i]); },
        [&](int i) {
          const pack<T> x = whole_pack(slice, i);
          pack<T> y = {};
          if (!any(x)) return y;
          const pack<T> d = whole_pack(other, i);
#pragma unroll
          for (int v = 0; v < V; v++) y.e[v] = result(x.e[v], d.e[v]);
          return y;
        });
  }
};

/* ---- the threshold */

/* y of a score, in double or, for a first search, in float: differences from m are taken where they are exact or nearly so. */
template <typename R>
__device__ __forceinline__ double rise(const row_map &w, R z, double m, double t) {
  return w.scale * ((double)z - m) - t;
}
template <typename R>
__device__ __forceinline__ float rise(const row_map &w, R z, R m, float t) {
  return (float)w.scale * (float)(z - m) - t;
}
__device__ __forceinline__ float any_power(float y, float b) { return __powf(y, b); }

/* Root of the kept scores' sum in [lo, hi], from t on. As root in src/cpu/solver.inc: steps while they stay inside the bracket and make
 * progress, bisection otherwise; the left end when rounding cannot tell the ends apart. Done when a step is below `unit`, for alpha > 2
 * relative to t: a closed form on an unchanged support is exact then, and Newton's error is the square of its step. */
template <bool CLOSED, typename X, typename M, typename Team, typename R = typename Team::R>
__device__ __forceinline__ X root_of(Team &team, const row_map &w, M m, X lo, X hi, X t, X unit, int most) {
  const bool closed = CLOSED || w.q == 1.0 || w.q == 2.0, steep = !CLOSED && w.root > 1.0;
  const X q = (X)w.q;
  X last = (X)emxi_inf();
  for (int it = 0; it < most; it++) {
    X s[3] = {0, 0, 0}, f, e;
    if (closed) {
      team.each_kept([&](R z) {
        const X y = rise(w, z, m, t);
        if (y > 0) s[0] += 1, s[1] += y, s[2] += y * y;
      });
    } else {
      team.each_kept([&](R z) {
        const X y = rise(w, z, m, t);
        if (y > 0) {
          const X p = power_of(y, q, w.q_kind);
          s[1] += p / y, s[2] += p;
        }
      });
    }
    team.reduce(s, add_up());
    if (closed) {
      f = (w.q == 1.0 ? s[1] : s[2]) - 1;
      const X d = s[1] * s[1] - s[0] * f;
      e = !(s[0] > 0) ? (X)-0.5 : w.q == 1.0 ? f / s[0] : d >= 0 ? f / (s[1] + sqrt(d)) : f / (2 * s[1]); /* solve.h */
    } else {
      f = s[2] - 1;
      e = !(s[1] > 0) ? (X)-0.5 : w.root < 1.0 ? (s[2] - any_power(s[2], (X)(1.0 - w.root))) / s[1] : f / (q * s[1]);
    }
    if (f == 0) return t;
    if (f > 0)
      lo = t;
    else
      hi = t;
    X next = t + e;
    if (fabs(e) <= (steep ? -lo * unit : unit)) return fmin(fmax(next, lo), hi);
    if (!(next > lo && next < hi) || (steep && fabs(e) > (X)0.25 * last)) { /* the slope is infinite at a support's edge */
      next = steep ? -sqrt(-lo) * sqrt(-hi) : (X)0.5 * (lo + hi);
      if (next <= lo || next >= hi) return lo;
    }
    last = fabs(next - t);
    t = next;
  }
  return t;
}

/* The threshold relative to m, of `count` scores kept: found in float, finished in double. */
template <bool CLOSED, typename Team, typename R = typename Team::R>
__device__ __forceinline__ double threshold_of(Team &team, const row_map &w, double m, int count) {
  const double n = (double)count, hi = -(w.q == 2.0   ? 1.0 / sqrt(n)
                                         : w.q == 1.0 ? 1.0 / n
                                         : CLOSED     ? 0.0
                                                      : any_power(n, -w.root)) *
                                       (1 - 1e-12);
  float t = -1;
  if (CLOSED || w.root <= 1.0) { /* Jensen's inequality */
    float s[2] = {0, 0};
    team.each_kept([&](R z) {
      const float y = rise(w, z, (R)m, -1.0f);
      if (y > 0) s[0] += 1, s[1] += y;
    });
    team.reduce(s, add_up());
    t = fminf(fmaxf(-1.0f, s[1] / s[0] - 1.0f - any_power(s[0], -(float)w.root)), (float)hi);
  }
  const bool closed = CLOSED || w.q == 1.0 || w.q == 2.0, steep = !CLOSED && w.root > 1.0;
  t = root_of<CLOSED>(team, w, (R)m, -1.0f, (float)hi, t, steep ? 1e-6f : 1e-5f, 40);
  return root_of<CLOSED>(team, w, m, -1.0, hi, fmin(fmax((double)t, -1.0), hi), closed ? 1e-14 : steep ? 1e-16 : 1e-12, 300);
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
    team.each([&](const R(&z)[Team::G]) {
#pragma unroll
      for (int k = 0; k < Team::G; k++) s[0] += z[k] >= v;
    });
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
__device__ __forceinline__ double budget_of(Team &team, const row_map &w, double v, double budget, double rank, int count) {
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
  if (report) report_fault(r, EMXI_CUDA_FAULT_ROW_BUDGET, (int32_t)row, 0, 0);
  return 0;
}

/* ---- forward and loss */

template <typename Team, typename T, typename R = typename Team::R>
__device__ __forceinline__ void budget_row(Team &team, const emxi_cuda_rows &r, int64_t row) {
  const double nan = (double)emxi_nan(), inf = (double)emxi_inf();
  T *p = (T *)r.p + row * r.ldp;
  const double alpha = alpha_of(r, row, team.first());
  double budget = budget_of(r, row, team.first()), tau = nan, support = 0;
  const R top = team.open((const T *)r.x + row * r.ldx, (R)-inf);
  if (alpha == 0 || budget == 0 || !((double)top < inf)) {
    team.fill(p, (R)nan);
  } else if ((double)top == -inf) {
    team.fill(p, 0);
    tau = -inf;
  } else {
    double s[1] = {0};
    team.each([&](const R(&z)[Team::G]) {
#pragma unroll
      for (int k = 0; k < Team::G; k++) s[0] += z[k] > (R)-inf;
    });
    team.reduce(s, add_up());
    double rank = ceil(budget);
    if (s[0] < rank) budget = rank = s[0]; /* all that is visible */
    const row_map w = map_of(r, alpha);
    const double v = (double)largest_of(team, top, rank), reach = 1.0 / w.scale;
    const int count = team.keep(below<R>(v - reach, fabs(v) + reach));
    const double t = budget_of(team, w, v, budget, rank, count);
    const R cut = below<R>(v + t / w.scale, fabs(v) - t / w.scale);
    s[0] = 0;
    team.each_kept([&](R z) { s[0] += w.scale * ((double)z - v) - t > 0; });
    team.reduce(s, add_up());
    support = s[0];
    tau = t + w.scale * v;
    team.put(p, cut, -1, [=](R z, int) -> R {
      if (!(z > cut)) return 0;
      const double e = w.scale * ((double)z - v) - t;
      return !(e > 0) ? (R)0 : e < 1 ? (R)power_of(e, w.b, w.b_kind) : (R)1;
    });
  }
  if (!team.first()) return;
  if (r.tau) store_value(r.tau, r.tau_dtype, row, tau);
  if (r.support) r.support[row] = (int32_t)support;
}

/* Which rows a kernel may meet: all of alpha = 1, all entmax of alpha = 1.5 or 2, or any. */
enum { SOFTMAX_ROWS, CLOSED_ROWS, ANY_ROWS };
template <int ROWS, typename Team, typename T, typename R = typename Team::R>
__device__ __forceinline__ void map_row(Team &team, const emxi_cuda_rows &r, int64_t row, double scale) {
  const double nan = (double)emxi_nan(), inf = (double)emxi_inf();
  const T *x = (const T *)r.x + row * r.ldx;
  T *p = r.p ? (T *)r.p + row * r.ldp : nullptr;
  const bool loss = r.loss != nullptr;
  int y = -1;
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
      if (team.first()) report_fault(r, EMXI_CUDA_FAULT_TARGET, (int32_t)row, 0, y);
      bad = true;
    } else {
      at = (double)widen(x[y]); /* dx may be x; what follows has barriers before anything is written */
    }
  }
  const double alpha = ROWS == ANY_ROWS ? alpha_of(r, row, team.first()) : r.alpha;
  const double m = (double)team.open(x, (R)-inf);
  double tau = nan, conjugate = 0, support = 0;
  bad |= alpha == 0 || !(m < inf);
  const bool empty = !bad && m == -inf;
  const double up = loss ? scale * (r.d_loss ? load_value(r.d_loss, r.d_loss_dtype, row * r.inc_d_loss) : 1) : 1;
  if (bad) {
    if (p) team.fill(p, (R)nan);
  } else if (empty) {
    if (p) team.fill(p, 0);
    if (alpha != 1.0) tau = -inf;
  } else if (ROWS == SOFTMAX_ROWS || (ROWS == ANY_ROWS && alpha == 1.0)) {
    const R top = (R)m;
    double s[2] = {0, 0};
    team.each([&](const R(&z)[Team::G]) {
      R part = 0;
      int seen = 0;
#pragma unroll
      for (int k = 0; k < Team::G; k++) part += exponential(z[k] - top), seen += z[k] > (R)-inf;
      s[0] += (double)part;
      s[1] += seen;
    });
    team.reduce(s, add_up());
    support = s[1];
    conjugate = log(s[0]);
    const R part = (R)(up / s[0]);
    const R own = (R)(up * ((double)exponential((R)at - top) / s[0] - 1));
    if (p) team.put(p, (R)-inf, y, [=](R z, int i) { return i == y ? own : exponential(z - top) * part; });
  } else {
    const row_map w = map_of(r, alpha);
    const double reach = 1.0 / w.scale;
    const int count = team.keep(below<R>(m - reach, fabs(m) + reach));
    const double t = threshold_of<ROWS == CLOSED_ROWS>(team, w, m, count), margin = w.root <= 1.0 ? 1e-13 : 0.0;
    const bool norm = ROWS == ANY_ROWS && r.kind == EMX_MAP_NORMMAX;
    tau = t + w.scale * m;
    const auto power = [=](double e) { return ROWS == CLOSED_ROWS ? (w.b_kind == 1 ? e : e * e) : power_of(e, w.b, w.b_kind); };
    /* The support, and what the weights (normmax) or the entropy need. */
    double s[2] = {0, 0};
    team.each_kept([&](R z) {
      const double e = w.scale * ((double)z - m) - t;
      if (!(e > margin)) return;
      s[0] += 1;
      if (norm)
        s[1] += power(e);
      else if (loss)
        s[1] += e * power(e);
    });
    team.reduce(s, add_up());
    support = s[0];
    conjugate = norm ? 1.0 + t : s[1] / alpha + (1.0 + t) / (alpha * w.scale) + t / alpha;
    const double part = norm ? 1.0 / s[1] : 1.0;
    const R cut = below<R>(m + t / w.scale, fabs(m) - t / w.scale);
    const auto weight = [=](R z) -> R {
      if (!(z > cut)) return 0;
      const double e = w.scale * ((double)z - m) - t;
      return e > margin ? (R)(part * power(e)) : (R)0;
    };
    if (!p) {
    } else if (loss) {
      const R own = (R)(up * ((double)weight((R)at) - 1));
      team.put(p, cut, y, [=](R z, int i) { return i == y ? own : z > cut ? (R)(up * (double)weight(z)) : (R)0; });
    } else {
      team.put(p, cut, -1, [=](R z, int) { return weight(z); });
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
template <bool FULL, typename Team, typename T, typename R = typename Team::R>
__device__ __forceinline__ void gradient_row(Team &team, const emxi_cuda_rows &r, int64_t row) {
  const T *p = (const T *)r.p_in + row * r.ldp_in;
  const T *dp = (const T *)r.x + row * r.ldx;
  T *dx = (T *)r.p + row * r.ldp;
  const double alpha = alpha_of(r, row, team.first()), a = alpha - 1.0;
  const double top = (double)team.open(p, 0);
  team.attach((const T *)r.x + row * r.ldx);
  if (alpha == 0) {
    team.fill(dx, (R)emxi_nan());
    if (r.d_alpha && team.first()) store_value(r.d_alpha, r.d_alpha_dtype, row, (double)emxi_nan());
    return;
  }
  const bool norm = FULL && r.kind == EMX_MAP_NORMMAX;
  const int slope_kind = kind_of(2.0 - alpha);
  const double least = alpha > 1.0 ? exp2(-52.0 / a) : 0;
  double size = 1; /* |p|_alpha of normmax */
  if (norm && top > 0) {
    double s[1] = {0};
    team.each([&](const R(&z)[Team::G]) {
#pragma unroll
      for (int k = 0; k < Team::G; k++)
        if (z[k] > 0) s[0] += any_power((double)z[k] / top, alpha);
    });
    team.reduce(s, add_up());
    size = top * any_power(s[0], 1.0 / alpha);
  }
  const double part = 1.0 / size;
  const bool bounded = FULL && r.kind == EMX_MAP_BUDGET; /* weights at their bound of one do not move */
  const auto still = [=](R z) { return z <= 0 || (bounded && z >= 1); };
  /* p^(2-alpha), of w = p / size */
  const auto slope = [=](double v) -> double {
    if (alpha == 1.5) return sqrt(v);
    if (alpha == 1.0 || v != v) return v;
    if (alpha == 2.0) return 1;
    return power_of(v < least ? least : v, 2.0 - alpha, slope_kind);
  };
  double base = 0;
  if (FULL && (alpha > 2.0 || r.d_alpha || norm)) { /* J ignores constants: the dp of the largest u is taken off */
    double best[2] = {-1, 0};
    team.each_pair([&](R z, R, int i) {
      if (still(z)) return;
      const double u = slope((double)z * part);
      if (u > best[0]) best[0] = u, best[1] = (double)i; /* positions ascend */
    });
    team.reduce(best, take_first_largest());
    if (best[0] >= 0) base = (double)widen(dp[(int64_t)best[1]]);
  }
  double s[3] = {0, 0, 0}; /* sum u, sum u g, sum w g */
  team.each_pair([&](R z, R d, int) {
    if (still(z)) return;
    const double v = (double)z * part, u = slope(v), g = (double)d - base;
    s[0] += u;
    s[1] += u != 0 ? u * g : 0.0;
    s[2] += v * g;
  });
  team.reduce(s, add_up());
  if (FULL && r.d_alpha) { /* docs/math.md, 6, as in src/cpu/entmax_rows.inc */
    double c[7] = {0, 0, 0, 0, 0, 0, 0};
    team.each_pair([&](R z, R d, int) {
      if (still(z)) return;
      const double v = (double)z < least ? least : (double)z, l = log(v), q = -a * l, h = v * l * l * second_remainder(q);
      const double g = (double)d - base;
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
  team.put_pair(dx, [=](R z, R d) -> R {
    if (still(z)) return 0;
    const double v = (double)z * part, u = slope(v);
    if (u == 0) return 0;
    const double g = (double)d - base;
    return norm ? (R)(factor * (u * (g - spg) - size * v * (s[1] - s[0] * spg))) : (R)(u * (g - mean));
  });
}

/* ---- kernels */

/* GRADIENT: of entmax with one alpha up to 2. FULL: of any map, with the gradient of alpha. */
enum { OP_SOFTMAX, OP_CLOSED, OP_ANY, OP_BUDGET, OP_GRADIENT, OP_FULL };
template <int OP, typename T, typename Team>
__device__ __forceinline__ void do_row(Team &team, const emxi_cuda_rows &r, int64_t row, double scale) {
  if (OP == OP_SOFTMAX) map_row<SOFTMAX_ROWS, Team, T>(team, r, row, scale);
  if (OP == OP_CLOSED) map_row<CLOSED_ROWS, Team, T>(team, r, row, scale);
  if (OP == OP_ANY) map_row<ANY_ROWS, Team, T>(team, r, row, scale);
  if (OP == OP_BUDGET) budget_row<Team, T>(team, r, row);
  if (OP == OP_GRADIENT) gradient_row<false, Team, T>(team, r, row);
  if (OP == OP_FULL) gradient_row<true, Team, T>(team, r, row);
}

template <typename T, int PER, int OP>
__global__ __launch_bounds__(MAP_THREADS, PER > 16 || sizeof(T) > 4 || OP > OP_CLOSED
                                              ? 2
                                              : 3) void map_warps(const __grid_constant__ emxi_cuda_rows r) {
  using R = typename wide_of<T>::type;
  constexpr bool LISTS = OP == OP_CLOSED || OP == OP_ANY || OP == OP_BUDGET;
  __shared__ double scratch[32];
  __shared__ R lists[LISTS ? MAP_WARPS : 1][LISTS ? 32 * PER : 1];
  const int warp = threadIdx.x / 32;
  const double scale = OP <= OP_ANY && r.mean && r.p ? 1.0 / counted_rows(r, scratch) : 1.0;
  warp_team<T, PER> team;
  team.lane = threadIdx.x % 32;
  team.n = (int)r.n;
  team.list = lists[LISTS ? warp : 0];
  for (int64_t row = (int64_t)blockIdx.x * MAP_WARPS + warp; row < r.rows; row += (int64_t)gridDim.x * MAP_WARPS)
    do_row<OP, T>(team, r, row, scale);
}

extern __shared__ uint4 map_shared[];

template <typename T, int OP>
__global__ __launch_bounds__(MAP_THREADS,
                             OP == OP_FULL || OP == OP_ANY ? 2 : 3) void map_blocks(const __grid_constant__ emxi_cuda_rows r) {
  using R = typename wide_of<T>::type;
  block_team<T> team;
  team.shared = (block_shared<R> *)map_shared;
  team.room = r.resident ? (T *)((char *)map_shared + (sizeof(block_shared<R>) + 15) / 16 * 16) : nullptr;
  team.size = r.blocks;
  team.rank = (int)(blockIdx.x % (unsigned)r.blocks);
  team.turn = team.phase = 0;
  const int64_t from = team.rank * r.slice; /* rounding up may leave the last blocks nothing */
  team.from = (int)(from < r.n ? from : r.n);
  team.len = (int)(r.n - team.from < r.slice ? r.n - team.from : r.slice);
  if (team.size > 1) { /* a block may write into another one's memory once that has begun */
    cluster_arrive();
    cluster_wait();
  }
  const double scale = OP <= OP_ANY && r.mean && r.p ? 1.0 / counted_rows(r, team.shared->scratch[0][0]) : 1.0;
  for (int64_t row = blockIdx.x / (unsigned)r.blocks; row < r.rows; row += gridDim.x / (unsigned)r.blocks) {
    do_row<OP, T>(team, r, row, scale);
    __syncthreads(); /* the slice is read by threads that did not load it */
  }
}

} // namespace

#endif
