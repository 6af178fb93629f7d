/* SPDX-License-Identifier: Apache-2.0
 * The scan of decode.cuh: scores of all keys that a row reads, and of them the candidates.
 *
 *   block = (sequence, KV head, up to R query rows, part of the sequence). A warp takes chunks of 128 positions. Sixteen bytes of a key a
 *   lane, L lanes a key; the products of U keys with R queries are summed over the lanes by exchanging halves, so that afterwards every
 *   lane owns different scores. What exceeds the largest score so far minus 1/a (T1 of docs/math.md) goes to the chunk's segment of the
 *   row, which has room for all of it. Bytes: N D of K for all R rows; 5 a candidate.
 *   Short sequences, softmax and lists: keys straight into registers, a tile ahead; a part has its own chunks. BULK, of long sequences: keys
 *   by bulk copies into shared memory, parts tell each other the largest score, and warps take what chunks are left.
 * Softmax: also sums exp(s - m) v of its part. */
#ifndef EMXI_CUDA_SCAN_CUH
#define EMXI_CUDA_SCAN_CUH

#include "sketch.cuh"

namespace {

constexpr int SCAN_THREADS = 256, SCAN_WARPS = SCAN_THREADS / 32;

/* ---- rows of K and V in registers: eight elements a lane */

/* FIXED > 0: that head dimension, two-byte elements, aligned rows: lane l of FIXED/8 holds elements 8 l .. 8 l + 7.
 * FIXED = 0: any dimension and alignment: a warp reads a row, lane l holds elements l + 32 e. */
template <typename T, int FIXED>
struct piece {
  static constexpr int L = FIXED / 8;
  uint4 x;
  __device__ __forceinline__ void load(const T *row, int l, int, uint64_t once) { x = load16(row + 8 * l, once); }
  __device__ __forceinline__ void clear() { x = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ static void two(uint32_t w, float &a, float &b, const __half *) {
    const float2 f = __half22float2(*reinterpret_cast<const __half2 *>(&w));
    a = f.x;
    b = f.y;
  }
  __device__ __forceinline__ static void two(uint32_t w, float &a, float &b, const __nv_bfloat16 *) {
    a = __uint_as_float(w << 16);
    b = __uint_as_float(w & 0xffff0000u);
  }
  __device__ __forceinline__ void get(float (&f)[8]) const {
    two(x.x, f[0], f[1], (const T *)nullptr);
    two(x.y, f[2], f[3], (const T *)nullptr);
    two(x.z, f[4], f[5], (const T *)nullptr);
    two(x.w, f[6], f[7], (const T *)nullptr);
  }
  __device__ __forceinline__ static int element(int l, int e) { return 8 * l + e; }
};
template <typename T>
struct piece<T, 0> {
  static constexpr int L = 32;
  T x[8];
  __device__ __forceinline__ void load(const T *row, int l, int d, uint64_t) {
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (l + 32 * e < d)
        x[e] = row[l + 32 * e];
      else
        from_float(0.0f, &x[e]);
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int e = 0; e < 8; e++) from_float(0.0f, &x[e]);
  }
  __device__ __forceinline__ void get(float (&f)[8]) const {
#pragma unroll
    for (int e = 0; e < 8; e++) f[e] = to_float(x[e]);
  }
  __device__ __forceinline__ static int element(int l, int e) { return l + 32 * e; }
};

/* Sums v[0..V) over the L lanes of a group. Afterwards lane l has the sums of V/L neighbouring indices, from first_index<V,
 * L>(l) on, in v[0..); with V < L, L/V lanes have the same one. V and L are powers of two. */
template <int V, int L>
__device__ __forceinline__ void exchange_sum(float (&v)[V], int l) {
  int n = V;
#pragma unroll
  for (int step = L / 2; step; step >>= 1) {
    if (n > 1) {
      n >>= 1;
#pragma unroll
      for (int i = 0; i < V / 2; i++) {
        if (i >= n) continue;
        const float give = l & step ? v[i] : v[i + n], keep = l & step ? v[i + n] : v[i];
        v[i] = keep + __shfl_xor_sync(EMXI_FULL, give, step);
      }
    } else {
      v[0] += __shfl_xor_sync(EMXI_FULL, v[0], step);
    }
  }
}
template <int V, int L>
__device__ __forceinline__ int first_index(int l) {
  return V >= L ? l * (V / L) : l / (L / V);
}
/* The lane that has index i, and where. */
template <int V, int L>
__device__ __forceinline__ constexpr int lane_of(int i) {
  return V >= L ? i / (V / L) : i * (L / V);
}

/* ---- rows of a work item */

struct row_id {
  int64_t row;     /* in the workspace */
  int64_t visible; /* keys that it sees */
  int h, s;
};
__device__ __forceinline__ row_id item_row(const emxi_cuda_decode &a, int b, int g, int index, int64_t length) {
  row_id r;
  r.s = index / a.group;
  r.h = g * a.group + index % a.group;
  r.row = ((int64_t)b * a.H + r.h) * a.S + r.s;
  const int64_t visible = length - a.S + r.s + 1;
  r.visible = visible > 0 ? visible : 0;
  return r;
}
/* The same in float, never above it: what a scan may leave out. */
__device__ __forceinline__ float scan_bound(float m, float reach, float floor) {
  return fminf(nextafterf(__fsub_rd(m, reach), -emxi_inf()), floor);
}

/* A score of -inf from a finite key: a partial sum has overflowed, and the true score may be anything. */
template <typename T>
__device__ __noinline__ bool key_is_finite(const T *key, int d) {
  for (int i = 0; i < d; i++)
    if (!(fabsf(to_float(key[i])) < emxi_inf())) return false;
  return true;
}

/* ---- scan */

/* Ordered integers as parts tell each other: 0 is below all. */
__device__ __forceinline__ uint32_t as_told(int ordered) { return (uint32_t)ordered ^ 0x80000000u; }
__global__ void __launch_bounds__(SCAN_THREADS) open_told(const __grid_constant__ emxi_cuda_decode a) {
  start_next(); /* the scan, which waits at once */
  wait_for_previous();
  const unsigned row = blockIdx.x * SCAN_THREADS + threadIdx.x;
  if (row < (unsigned)(a.batch.n * a.H * a.S)) a.told[row] = {};
}

/* Scores v[0..COUNT) of a lane: number i is of row own_r[i % OWN], one of R, whose state this lane has. */

/* A new largest score somewhere in the warp: all lanes, and through shared memory the other warps, get to know it. */
template <int COUNT, int R, int OWN, int V>
__device__ __forceinline__ void raise_bounds(const float (&v)[V], const int (&own_r)[OWN], const float (&reach)[OWN], float floor,
                                             int *shared_max, int lane, float (&m)[OWN], float (&bound)[OWN]) {
#pragma unroll
  for (int r = 0; r < R; r++) {
    int top = to_ordered(-emxi_inf());
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if (own_r[i % OWN] == r && v[i] > -emxi_inf() && to_ordered(v[i]) > top) top = to_ordered(v[i]);
    top = __reduce_max_sync(EMXI_FULL, top);
    if (lane == 0) top = max(top, atomicMax(&shared_max[r], top));
    top = __shfl_sync(EMXI_FULL, top, 0);
    const float new_m = from_ordered(top);
#pragma unroll
    for (int i = 0; i < OWN; i++)
      if (own_r[i] == r && new_m > m[i]) {
        m[i] = new_m;
        bound[i] = scan_bound(new_m, reach[i], floor);
      }
  }
}
/* What is above the bound goes to the chunk's segment; `first`: position of the tile in the chunk. */
template <int COUNT, int R, int OWN, int V, typename F>
__device__ __forceinline__ void keep_candidates(const emxi_cuda_decode &a, int64_t c, int first, const float (&v)[V],
                                                const float (&bound)[OWN], const int (&own_r)[OWN], const int (&own_token)[COUNT],
                                                F row_number, int lane, int (&count)[R]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    const bool mine = v[i] > bound[i % OWN];
#pragma unroll
    for (int r = 0; r < R; r++) {
      const uint32_t mask = __ballot_sync(EMXI_FULL, mine && own_r[i % OWN] == r);
      if (!mask) continue;
      if (mine && own_r[i % OWN] == r) {
        const int64_t at = (row_number(r) * a.chunks + c) * CHUNK + count[r] + __popc(mask & ((1u << lane) - 1));
        a.z[at] = v[i];
        a.local[at] = (uint8_t)(first + own_token[i]);
      }
      count[r] += __popc(mask);
    }
  }
}
/* The chunk is complete. BULK: parts tell each other the largest score; `heard`: in lane r < R, what row r's had when the
 * chunk began. */
template <int R, bool BULK, int OWN, typename F>
__device__ __forceinline__ void close_chunk(const emxi_cuda_decode &a, int64_t c, int rows, const int (&own_r)[OWN],
                                            const float (&reach)[OWN], float floor, int *shared_max, F row_number, int lane,
                                            int heard, float (&chunk_top)[OWN], float (&m)[OWN], float (&bound)[OWN],
                                            int (&count)[R]) {
#pragma unroll
  for (int r = 0; r < R; r++) {
    int top = to_ordered(-emxi_inf());
#pragma unroll
    for (int i = 0; i < OWN; i++)
      if (own_r[i] == r) top = max(top, to_ordered(chunk_top[i]));
    top = __reduce_max_sync(EMXI_FULL, top);
    const int here = ((const volatile int *)shared_max)[r], there = BULK ? __shfl_sync(EMXI_FULL, heard, r) : here;
    if (lane == 0 && r < rows) {
      const int64_t row = row_number(r), at = row * a.chunks + c;
      a.chunk_max[at] = from_ordered(top);
      a.count[at] = (uint8_t)count[r];
      if (there > here) atomicMax(&shared_max[r], there);
      if (here > there) atomicMax(&a.told[row].top, as_told(here));
    }
    count[r] = 0;
    const float all = from_ordered(max(here, there));
#pragma unroll
    for (int i = 0; i < OWN; i++)
      if (own_r[i] == r && all > m[i]) {
        m[i] = all;
        bound[i] = scan_bound(all, reach[i], floor);
      }
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) chunk_top[i] = -emxi_inf();
}

/* A tile of keys for each warp in shared memory, filled by bulk copies of 16 tokens: while one warp waits for its tile, the
 * others have theirs. */
template <typename T, int FIXED, int U>
struct key_tile {
  static constexpr int TOKENS = U * 256 / FIXED, PIECES = TOKENS / 16, PIECE = 16 * FIXED * (int)sizeof(T);
  static constexpr size_t SHARED = (size_t)SCAN_WARPS * PIECES * PIECE;
};

/* By a block of SCAN_THREADS. */
template <typename T, int FIXED, int R, int U, bool SOFTMAX, bool SPARSE, bool BULK>
__device__ __forceinline__ void scan_part(const emxi_cuda_decode &a) {
  static_assert(!SPARSE || R == 1, "rows of a group have lists of their own");
  static_assert(!BULK || (FIXED && !SOFTMAX && !SPARSE), "of known rows, and of keys alone");
  using row_piece = piece<T, FIXED>;
  constexpr int L = row_piece::L, SUBS = 32 / L, V = U * R, OWN = V >= L ? V / L : 1, TILE = U * SUBS, TILES = CHUNK / TILE,
                PAGES = TILE > 16 ? TILE / 16 : 1;
  __shared__ float shared_q[R][MAX_D];
  __shared__ int shared_max[R], shared_bad;
  extern __shared__ __align__(128) float shared_o[]; /* softmax: [SCAN_WARPS][R][D]; else tiles of keys */
  __shared__ float shared_m[SOFTMAX ? SCAN_WARPS : 1][R], shared_z[SOFTMAX ? SCAN_WARPS : 1][R];
  __shared__ int shared_n[SOFTMAX ? SCAN_WARPS : 1][R];

  const emxi_cuda_pool &pool = a.pool;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, l = lane % L, sub = lane / L, D = FIXED ? FIXED : pool.D;
  /* Parts of an item are far apart on the device, so that items end together. */
  const uint32_t items = (uint32_t)(SPARSE ? a.batch.n * a.H : a.batch.n * a.pool.G * a.blocks);
  const int split = (int)(blockIdx.x / items), item = (int)(blockIdx.x % items), block = SPARSE ? 0 : item % a.blocks;
  if (!SPARSE && a.cert && !a.cert_flat[item]) return;
  int g = item / a.blocks % pool.G, b = item / a.blocks / pool.G;
  const int first_row = block * R, left = a.group * a.S - first_row, rows = SPARSE || left >= R ? R : left;
  int64_t length;
  row_place self; /* sparse: the row of this block, and positions are those of its list */
  const int32_t *table;
  if constexpr (SPARSE) {
    self = place_of(a, item);
    b = self.b, g = self.g, table = self.table, length = self.count;
  } else {
    table = batch_entry(a.batch, b, &length);
  }
  const auto row_of = [&](int r) {
    if constexpr (SPARSE)
      return row_id{item, self.count, self.h, 0};
    else
      return item_row(a, b, g, first_row + r, length);
  };
  const auto row_number = [&](int r) { return row_of(r).row; };
  const auto page_of = [&](int64_t i) {
    if constexpr (SPARSE)
      return __ldg(self.place + i);
    else
      return table_page(a.batch, pool, table, b, i);
  };
  const int64_t chunks = (length + CHUNK - 1) / CHUNK, per = ((uint32_t)chunks + a.splits - 1) / (uint32_t)a.splits,
                from = split * per, to = from + per < chunks ? from + per : chunks;

  for (int i = threadIdx.x; i < R * MAX_D; i += SCAN_THREADS) {
    const int r = i / MAX_D, x = i % MAX_D;
    float q = 0;
    if (r < rows && x < D) {
      const row_id id = row_of(r);
      q = load_any(a.q, a.q_dtype, b * a.q_stride[0] + id.h * a.q_stride[1] + id.s * a.q_stride[2] + x) * a.scale;
    }
    shared_q[r][x] = q;
  }
  if (threadIdx.x < R) shared_max[threadIdx.x] = to_ordered(-emxi_inf());
  if (threadIdx.x == 0) shared_bad = 0;
#if __CUDA_ARCH__ >= 900
  __shared__ uint64_t barriers[BULK ? SCAN_WARPS : 1];
  if (BULK && lane == 0) {
    barrier_init(&barriers[warp], 1);
    barriers_ready();
  }
#endif
  __syncthreads();
  float q[R][8];
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int e = 0; e < 8; e++) q[r][e] = shared_q[r][row_piece::element(l, e)];

  /* The scores that this lane owns: key u, row r. */
  int own_r[OWN], own_token[OWN];
  float slope[OWN], m[OWN], bound[OWN], chunk_top[OWN]; /* bound: what is not above it has no weight */
  float reach[OWN], floor = emxi_inf(); /* of weight below the largest score; an estimated threshold may lie lower */
  int32_t visible[OWN];
  bool any = false; /* rows of this kind */
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int index = first_index<V, L>(l) + i;
    own_r[i] = index % R;
    own_token[i] = index / R * SUBS + sub;
    const bool mine = (V >= L || l % (V < L ? L / V : 1) == 0) && own_r[i] < rows;
    const row_id id = row_of(mine ? own_r[i] : 0);
    const double alpha = mine ? alpha_of(a, id.h) : 0;
    any |= alpha > 0 && (alpha == 1.0) == SOFTMAX;
    visible[i] = alpha > 0 && (alpha == 1.0) == SOFTMAX ? (int32_t)id.visible : 0;
    slope[i] = a.slopes && mine ? a.slopes[id.h] : 0.0f;
    reach[i] = SOFTMAX || alpha <= 1.0 ? 0.0f : __double2float_ru(1.0 / (alpha - 1.0));
    m[i] = bound[i] = chunk_top[i] = -emxi_inf();
  }
  if (a.alphas && !__syncthreads_or(any)) return;
  if constexpr (SPARSE && !SOFTMAX)
    if (a.tau_mode == EMX_TAU_FIXED && a.choice[item].estimated)
      floor = nextafterf((float)(a.choice[item].estimate / (alpha_of(a, self.h) - 1.0)), -emxi_inf());
  uint32_t bad = 0;
  int count[R];
  float o[SOFTMAX ? R : 1][8], z[OWN];
  int seen[OWN];
#pragma unroll
  for (int r = 0; r < R; r++) count[r] = 0;
#pragma unroll
  for (int i = 0; i < OWN; i++) z[i] = 0, seen[i] = 0;
  if (SOFTMAX)
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int e = 0; e < 8; e++) o[r][e] = 0;

  const uint64_t once = read_once();
  /* Tiles of this warp: all of chunk `c`, then of the next one that is its. Page numbers are fetched two tiles ahead, keys
   * one. */
  const T *k_base = (const T *)pool.k + g * pool.k_head, *v_base = (const T *)pool.v + g * pool.v_head;
  const auto fetch = [&](int64_t c, int tile, int32_t(&page)[PAGES]) {
#pragma unroll
    for (int i = 0; i < PAGES; i++) {
      const int64_t token = c * CHUNK + tile * TILE + 16 * i;
      page[i] = c < to && token < length ? page_of(token >> pool.shift) : 0;
    }
  };
  /* Sixteen aligned positions lie in one page, so the rows of a lane are a constant step apart. */
  const auto read = [&](const T *base, int64_t page_stride, int64_t token_stride, int64_t c, int tile,
                        const int32_t(&page)[PAGES], row_piece(&x)[U]) {
    const int64_t first = c * CHUNK + tile * TILE, step = SUBS * token_stride;
    const T *start[PAGES];
#pragma unroll
    for (int i = 0; i < PAGES; i++)
      start[i] =
          base + page[i] * page_stride + (int64_t)((int)(first + 16 * i) & (pool.P - 1)) * token_stride + sub * token_stride;
    if (c < to && first + TILE <= length) {
#pragma unroll
      for (int u = 0; u < U; u++)
        x[u].load(start[PAGES > 1 ? u * SUBS / 16 : 0] + (PAGES > 1 ? u % (16 / SUBS) : u) * step, l, D, once);
    } else {
#pragma unroll
      for (int u = 0; u < U; u++)
        if (c < to && first + u * SUBS + sub < length)
          x[u].load(start[PAGES > 1 ? u * SUBS / 16 : 0] + (PAGES > 1 ? u % (16 / SUBS) : u) * step, l, D, once);
        else
          x[u].clear();
    }
  };
  const auto advance = [&](int64_t &c, int &tile) {
    if (++tile == TILES) tile = 0, c += SCAN_WARPS;
  };

  int heard = INT_MIN;
  const auto products = [&](auto &v, auto key) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      float f[8];
      key(u).get(f);
#pragma unroll
      for (int r = 0; r < R; r++) {
        float sum = f[0] * q[r][0];
#pragma unroll
        for (int e = 1; e < 8; e++) sum = fmaf(f[e], q[r][e], sum);
        v[u * R + r] = sum;
      }
    }
  };
  const auto judge_tile = [&](int64_t c, int tile, auto &v, const auto &values) {
    exchange_sum<V, L>(v, l);
    const int32_t start = (int32_t)(c * CHUNK + tile * TILE);
    bool up = false;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int32_t token = start + own_token[i];
      const bool in = token < visible[i];
      float s = v[i];
      if (slope[i] != 0 && in) {
        if constexpr (SPARSE)
          s = fmaf(slope[i],
                   (float)(self.list[token >> pool.shift] * pool.P + (token & (pool.P - 1)) - (int32_t)(self.visible - 1)), s);
        else
          s = fmaf(slope[i], (float)(token - (visible[i] - 1)), s);
      }
      if (in && s == -emxi_inf()) {
        const int32_t p = page_of(token >> pool.shift);
        if (key_is_finite(k_base + p * pool.k_page + (token & (pool.P - 1)) * pool.k_token, D)) s = emxi_nan();
      }
      if (in && !(s < emxi_inf())) bad |= 1u << own_r[i];
      if (!in) s = -emxi_inf();
      v[i] = s;
      up |= s > m[i];
      if (s > chunk_top[i]) chunk_top[i] = s;
    }
    if (__any_sync(EMXI_FULL, up)) {
      if constexpr (!SOFTMAX) raise_bounds<OWN, R>(v, own_r, reach, floor, shared_max, lane, m, bound);
#pragma unroll
      for (int r = 0; SOFTMAX && r < R; r++) { /* all lanes get to know it, and scale what they have */
        int top = to_ordered(-emxi_inf());
#pragma unroll
        for (int i = 0; i < OWN; i++)
          if (own_r[i] == r && v[i] > -emxi_inf() && to_ordered(v[i]) > top) top = to_ordered(v[i]);
        const float new_m = from_ordered(__reduce_max_sync(EMXI_FULL, top));
        float old = -emxi_inf();
#pragma unroll
        for (int i = 0; i < OWN; i++)
          if (own_r[i] == r) {
            old = m[i];
            if (new_m > old) {
              z[i] *= __expf(old - new_m);
              m[i] = new_m;
            }
          }
        old = from_ordered(__reduce_max_sync(EMXI_FULL, to_ordered(old))); /* the same in every lane: some lane owns row r */
        const float f = new_m > old ? __expf(old - new_m) : 1.0f;
#pragma unroll
        for (int e = 0; e < 8; e++) o[SOFTMAX ? r : 0][e] *= f;
      }
    }

    if constexpr (SOFTMAX) {
#pragma unroll
      for (int i = 0; i < OWN; i++) {
        const float s = v[i];
        const bool there = s > -emxi_inf() && s < emxi_inf();
        v[i] = there ? __expf(s - m[i]) : 0.0f;
        z[i] += v[i];
        seen[i] += there;
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        float f[8];
        values[u].get(f);
#pragma unroll
        for (int r = 0; r < R; r++) {
          const float p = __shfl_sync(EMXI_FULL, v[(u * R + r) % OWN], lane_of<V, L>(u * R + r), L);
          if (p > 0) {
#pragma unroll
            for (int e = 0; e < 8; e++) o[r][e] = fmaf(p, f[e], o[r][e]);
          }
        }
      }
    } else {
      bool pass = false;
#pragma unroll
      for (int i = 0; i < OWN; i++) pass |= v[i] > bound[i]; /* what is not visible is -inf */
      if (__any_sync(EMXI_FULL, pass))
        keep_candidates<OWN, R>(a, c, tile * TILE, v, bound, own_r, own_token, row_number, lane, count);
      if (tile == TILES - 1)
        close_chunk<R, BULK>(a, c, rows, own_r, reach, floor, shared_max, row_number, lane, heard, chunk_top, m, bound, count);
      if (BULK && tile == 0 && lane < rows) heard = (int)as_told((int)*(const volatile uint32_t *)&a.told[row_number(lane)].top);
    }
  };
  if constexpr (BULK) {
#if __CUDA_ARCH__ >= 900 /* else it is never launched */
    /* Warps take the next chunk that is left, so that all end together. A copied piece is one lane's, which has the piece's
     * page. */
    using shape = key_tile<T, FIXED, U>;
    constexpr int PIECES = shape::PIECES, PIECE = shape::PIECE;
    static_assert(shape::TOKENS == TILE && PIECES >= 1, "bulk copies are of 16 tokens");
    char *const keys = (char *)shared_o + warp * PIECES * PIECE;
    uint64_t *const full = &barriers[warp];
    uint32_t *const next = &a.told[row_number(0)].next;
    const auto take = [&]() {
      int chunk = 0;
      if (lane == 0) chunk = (int)atomicAdd(next, 1);
      return __shfl_sync(EMXI_FULL, chunk, 0);
    };
    const auto page_in = [&](int chunk) {
      const int64_t token = (int64_t)chunk * CHUNK + 16 * lane;
      return chunk < chunks && lane < CHUNK / 16 && token < length ? page_of(token >> pool.shift) : -1;
    };
    const auto send = [&](int chunk, int tile, int32_t page) {
      if (chunk >= chunks || lane / PIECES != tile) return;
      const int first = chunk * CHUNK + tile * TILE, there = (int)(length - first + 15) / 16;
      if (lane % PIECES == 0) barrier_expect(full, (uint32_t)(PIECE * min(max(there, 0), PIECES)));
      if (page < 0) return;
      copy_bulk(keys + lane % PIECES * PIECE, k_base + page * pool.k_page + ((first + lane % PIECES * 16) & (pool.P - 1)) * FIXED,
                PIECE, full, once);
    };
    const row_piece none[1] = {};
    uint32_t parity = 0;
    int c = take();
    int32_t page = page_in(c);
    send(c, 0, page);
    while (c < chunks) {
      const int chunk = c;
#pragma unroll 1
      for (int tile = 0; tile < TILES; tile++) {
        if (tile == TILES - 1) { /* the next copy is of another chunk */
          c = take();
          page = page_in(c);
        }
        barrier_wait(full, parity);
        parity ^= 1;
        float v[V];
        products(v, [&](int u) {
          row_piece x;
          x.x = *(const uint4 *)(keys + (32 * u + lane) * 16);
          return x;
        });
        __syncwarp(); /* all have read it */
        send(c, (tile + 1) % TILES, page);
        judge_tile(chunk, tile, v, none);
      }
    }
#endif
  } else {
    int64_t c = from + warp, next_c = c;
    int tile = 0, next_tile = 0;
    int32_t page[PAGES], next_page[PAGES];
    row_piece x[U], next[U];
    fetch(c, tile, page);
    read(k_base, pool.k_page, pool.k_token, c, tile, page, x);
    advance(next_c, next_tile);
    fetch(next_c, next_tile, next_page);
    while (c < to) {
      row_piece values[SOFTMAX ? U : 1];
      if constexpr (SOFTMAX) read(v_base, pool.v_page, pool.v_token, c, tile, page, values);
      int64_t after_c = next_c;
      int after_tile = next_tile;
      int32_t after_page[PAGES];
      read(k_base, pool.k_page, pool.k_token, next_c, next_tile, next_page, next);
      advance(after_c, after_tile);
      fetch(after_c, after_tile, after_page);
      float v[V];
      products(v, [&](int u) { return x[u]; });
      judge_tile(c, tile, v, values);
      c = next_c, tile = next_tile, next_c = after_c, next_tile = after_tile;
#pragma unroll
      for (int u = 0; u < U; u++) x[u] = next[u];
#pragma unroll
      for (int i = 0; i < PAGES; i++) page[i] = next_page[i], next_page[i] = after_page[i];
    }
  }

  if (bad) atomicOr(&shared_bad, (int)bad);
  if constexpr (SOFTMAX) {
#pragma unroll
    for (int r = 0; r < R; r++) {
      int top = to_ordered(-emxi_inf()), n = 0;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < OWN; i++)
        if (own_r[i] == r) {
          top = max(top, to_ordered(m[i]));
          sum += z[i];
          n += seen[i];
        }
      if (V < L && l % (V < L ? L / V : 1)) sum = 0, n = 0; /* copies of the lane before */
      top = __reduce_max_sync(EMXI_FULL, top);
#pragma unroll
      for (int step = 16; step; step >>= 1) {
        sum += __shfl_xor_sync(EMXI_FULL, sum, step);
        n += __shfl_xor_sync(EMXI_FULL, n, step);
      }
      if (lane == 0) {
        shared_m[warp][r] = from_ordered(top);
        shared_z[warp][r] = sum;
        shared_n[warp][r] = n;
      }
#pragma unroll
      for (int e = 0; e < 8; e++) {
#pragma unroll
        for (int step = 16; step >= L; step >>= 1) o[r][e] += __shfl_xor_sync(EMXI_FULL, o[r][e], step);
        if (sub == 0 && row_piece::element(l, e) < D) shared_o[(warp * R + r) * D + row_piece::element(l, e)] = o[r][e];
      }
    }
  }
  __syncthreads();
  if constexpr (SOFTMAX) {
    for (int i = threadIdx.x; i < rows * D; i += SCAN_THREADS) {
      const int r = i / D, d = i % D;
      const row_id id = row_of(r);
      float top = -emxi_inf(), sum = 0, total = 0;
      int n = 0;
      for (int w = 0; w < SCAN_WARPS; w++) top = fmaxf(top, shared_m[w][r]);
      for (int w = 0; w < SCAN_WARPS; w++) {
        if (shared_m[w][r] == -emxi_inf()) continue;
        const float f = __expf(shared_m[w][r] - top);
        sum += f * shared_o[(w * R + r) * D + d];
        total += f * shared_z[w][r];
        n += shared_n[w][r];
      }
      a.part_o[(id.row * a.splits + split) * D + d] = sum;
      if (d) continue;
      a.part_m[id.row * a.splits + split] = top;
      a.part_z[id.row * a.splits + split] = total;
      a.part_n[id.row * a.splits + split] = n;
    }
  }
  if (threadIdx.x < rows) {
    const row_id id = row_of((int)threadIdx.x);
    if (a.alphas && (alpha_of(a, id.h) == 1.0) != SOFTMAX) return; /* the other scan's row */
    a.bad[id.row * a.splits + split] = shared_bad >> threadIdx.x & 1;
    if (!SOFTMAX && split == 0) a.wide[id.row].arrived = 0;
  }
}

template <typename T, int FIXED, int R, int U, bool SOFTMAX, bool SPARSE, bool BULK>
__global__ void __launch_bounds__(SCAN_THREADS, 2) scan(const __grid_constant__ emxi_cuda_decode a) {
  wait_for_previous();
  scan_part<T, FIXED, R, U, SOFTMAX, SPARSE, BULK>(a);
}

} // namespace

#endif
