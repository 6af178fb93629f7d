/* SPDX-License-Identifier: Apache-2.0
 * Decode on the device: every key (with a selector: of the pages in the row's list) is read once, values of the support only.
 *
 *   s_j = scale q.k_j + slope (j - i),  o = sum_j [a s_j - tau]_+^(1/a) v_j,  a = alpha-1        (alpha = 1: softmax, K and V in one pass)
 *
 * Three kernels, nothing between them but the stream, so a graph can hold them:
 *   scan   block = (sequence, KV head, up to R query rows, part of the sequence). A warp takes chunks of 128 positions. Sixteen bytes of
 *          a key a lane, L lanes a key; the products of U keys with R queries are summed over the lanes by exchanging halves, so that
 *          afterwards every lane owns different scores. What exceeds the largest score so far minus 1/a (T1 of docs/math.md) goes to the
 *          chunk's segment of the row, which has room for all of it. Bytes: N D of K for all R rows; 5 a candidate.
 *   solve  block = (part, row). The true maximum and a bound from the largest scores of sets of chunks decide which candidates are left: a set,
 *          and an order, that do not depend on timing. Few are one block's, in shared memory: tau from bounds at 32 thresholds at a time, then
 *          in closed form in double, with values of up to MAX_HERE of them. Of many, all parts pack what is left and weigh it at several
 *          thresholds, and the last one solves, by bracketed steps in double.
 *   share  block = (row, part): values of all other rows; leaves at once for the rest. The last block adds up.
 * Softmax: scan also sums exp(s - m) v for its part, merge joins the parts.
 *
 * f32 products and sums of a score as on the CPU (f16 and bf16 keys are exact in f32); weights and tau in double; values in f32 over at
 * most a chunk-strided share, in a fixed order: the same call gives the same bits. Oracle: src/entmax/oracle.c. */
#ifndef EMXI_CUDA_DECODE_CUH
#define EMXI_CUDA_DECODE_CUH

#include "sketch.cuh"

namespace {

constexpr int MAX_HERE = 256; /* support whose values the block of the row reads by itself */
constexpr int SCAN_THREADS = 256, SCAN_WARPS = SCAN_THREADS / 32, PER_LANE = MAX_D / 32, MAX_ALIVE = 1024,
              LISTED = 4096; /* of a row that one block solves in shared memory: chunks, candidates */
enum { WIDE_NOT, WIDE_SEGMENTS, WIDE_PACKED };

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

/* Sums v[0..V) over the L lanes of a group. Afterwards lane l has the sums of V/L neighbouring indices, from first_index<V, L>(l) on,
 * in v[0..); with V < L, L/V lanes have the same one. V and L are powers of two. */
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
__global__ void open_told(const __grid_constant__ emxi_cuda_decode a) {
  start_next(); /* the scan, which waits at once */
  wait_for_previous();
  for (int i = threadIdx.x; i < a.batch.n * a.H * a.S; i += blockDim.x) a.told[i] = {};
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
/* The chunk is complete. BULK: parts tell each other the largest score; `heard`: in lane r < R, what row r's had when the chunk began. */
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

/* A tile of keys for each warp in shared memory, filled by bulk copies of 16 tokens: while one warp waits for its tile, the others have theirs. */
template <typename T, int FIXED, int U>
struct key_tile {
  static constexpr int TOKENS = U * 256 / FIXED, PIECES = TOKENS / 16, PIECE = 16 * FIXED * (int)sizeof(T);
  static constexpr size_t SHARED = (size_t)SCAN_WARPS * PIECES * PIECE;
};
__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void tile_open(uint64_t *barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
/* It is full when `bytes` have come. */
__device__ __forceinline__ void tile_expect(uint64_t *barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void tile_copy(void *to, const void *from, uint32_t bytes, uint64_t *barrier, uint64_t once) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(once)
               : "memory");
#endif
}
__device__ __forceinline__ void tile_wait(uint64_t *barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred full;\n"
      "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 full, [%0], %1;\n\t@!full bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

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
  __shared__ uint64_t barriers[BULK ? SCAN_WARPS : 1];
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
  if (BULK && lane == 0) {
    tile_open(&barriers[warp]);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
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
  /* Tiles of this warp: all of chunk `c`, then of the next one that is its. Page numbers are fetched two tiles ahead, keys one. */
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
    /* Warps take the next chunk that is left, so that all end together. A copied piece is one lane's, which has the piece's page. */
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
      if (lane % PIECES == 0) tile_expect(full, (uint32_t)(PIECE * min(max(there, 0), PIECES)));
      if (page < 0) return;
      tile_copy(keys + lane % PIECES * PIECE, k_base + page * pool.k_page + ((first + lane % PIECES * 16) & (pool.P - 1)) * FIXED,
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
        tile_wait(full, parity);
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

/* ---- values */

/* Elements l + 32 e of the value at `position`, for a whole warp. */
template <typename T>
__device__ __forceinline__ piece<T, 0> load_value(const emxi_cuda_decode &a, const row_place &p, int64_t position, int lane) {
  const int32_t page =
      p.place ? p.place[position >> a.pool.shift] : table_page(a.batch, a.pool, p.table, p.b, position >> a.pool.shift);
  piece<T, 0> x;
  x.load((const T *)a.pool.v + page * a.pool.v_page + p.g * a.pool.v_head + (position & (a.pool.P - 1)) * a.pool.v_token, lane,
         a.pool.D, 0);
  return x;
}
/* acc += sum over the set bits of `active` of p v, in ascending order of the lanes whose p and position they are. */
template <typename T>
__device__ __forceinline__ void add_values(const emxi_cuda_decode &a, const row_place &place, uint32_t active, float p,
                                           int64_t position, int lane, float (&acc)[PER_LANE]) {
  constexpr int AHEAD = 4;
  while (active) {
    piece<T, 0> x[AHEAD];
    float w[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const bool more = active != 0;
      const int from = more ? __ffs(active) - 1 : 0;
      const int64_t at = __shfl_sync(EMXI_FULL, position, from);
      w[i] = __shfl_sync(EMXI_FULL, p, from);
      if (more)
        x[i] = load_value<T>(a, place, at, lane);
      else
        x[i].clear(), w[i] = 0;
      active &= active - 1;
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
  const int32_t *at, *n;
  int lists;
};
__device__ __forceinline__ packed packed_of(const emxi_cuda_decode &a, int64_t row) {
  const int lists = a.parts * SOLVE_WARPS;
  return {a.packed_z + row * lists * EMXI_CUDA_PACKED, a.packed_at + row * lists * EMXI_CUDA_PACKED, a.packed_n + row * lists,
          lists};
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
/* Newton's step on the norm of the positive parts, given the sums of their powers and of the powers one lower. The norm is convex for
 * alpha <= 2: a step ends at or below the root wherever it starts. */
template <bool CLOSED>
__device__ __forceinline__ float norm_step(bool two, float fa, float mass, float slope) {
  return __fdividef(mass - (!CLOSED ? slow_power(mass, 1.0f - fa)
                            : two   ? 1.0f
                                    : mass * rsqrtf(mass)),
                    slope) -
         float_slack(CLOSED);
}
/* Adds what y above the threshold contributes to those sums. CLOSED: alpha 1.5 and 2, without a branch. Else a power is off by as much as that
 * of a y that is off by a millionth. */
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
/* By the block, alpha <= 2: a lower bound, relative to m, of the threshold of x[0..n), which is in shared memory with room for three more,
 * from one that is known. Lanes weigh x at a threshold each, warps a part of x; another turn does so between the best step and the first lane
 * with too little. Of 33 to 4,000 scores of N(0, 1) one turn ends 1e-3 from the root at most and two 4e-7. Begins with a barrier. */
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

/* Rows of which `solve` does not have all in a short list, and other alphas than 1.5 and 2. Many candidates: a block packs those of its chunks,
 * and the last one of the row solves. */
template <typename T>
__device__ __noinline__ void solve_long(const emxi_cuda_decode &a, solve_space &space, const solve_row &known) {
  constexpr int POINTS = EMXI_CUDA_POINTS;
  const int64_t row = known.row, chunks = known.chunks;
  const int part = known.part, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const row_place place = place_of(a, row);
  const float *chunk_max = a.chunk_max + row * a.chunks, *z = a.z + row * a.chunks * CHUNK;
  const uint8_t *count = a.count + row * a.chunks, *local = a.local + row * a.chunks * CHUNK;
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
    /* The largest scores of the chunks are scores, too, and bound flat rows better than the parts': up to 1,024 at many thresholds, then all of
     * them by Newton's steps. */
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
    const int64_t slot = ((row * a.parts + part) * SOLVE_WARPS + warp) * EMXI_CUDA_PACKED;
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
          if (v[u][j] > thr && to_place < EMXI_CUDA_PACKED) {
            const int64_t c = base + u * SOLVE_WARPS;
            list[warp * EMXI_CUDA_PACKED + to_place] = v[u][j];
            a.packed_z[slot + to_place] = v[u][j];
            a.packed_at[slot + to_place] = (int32_t)(c * CHUNK + local[c * CHUNK + 32 * j + lane]);
          }
          n += __popc(mask);
        }
    }
    if (lane == 0) a.packed_n[(row * a.parts + part) * SOLVE_WARPS + warp] = n;
    /* What the part's candidates weigh at POINTS thresholds from the bound up to the largest that so many candidates allow. A step on a
     * convex norm ends below the root wherever it starts, so the best of the steps from all of them, over all parts, is the bound that
     * the last part goes on with. */
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
        for (int j = lane, packs = min(n, EMXI_CUDA_PACKED); j < packs; j += 32) {
          const float y = fmaf(fa, list[warp * EMXI_CUDA_PACKED + j] - m, -low);
#pragma unroll
          for (int i = 0; i < POINTS; i++) add(fmaf(-(float)i, gap, y), sum[i], sum[POINTS + i]);
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
      float mass = 0, best = -1.0f;
      for (int i = 0; i < a.parts; i++) mass += __ldcg(a.points + (row * a.parts + i) * 2 * POINTS + lane);
      const float slope = __shfl_xor_sync(EMXI_FULL, mass, POINTS);
      if (lane < POINTS && mass > LEAST_MASS)
        best = fmaf((float)lane, gap, low) +
               (closed ? norm_step<true>(two, fa, mass, slope) : norm_step<false>(two, fa, mass, slope));
      low = fmaxf(low, warp_max(best));
      if (!estimated) thr = fmaxf(thr, nextafterf((float)((double)m + (double)low * k.b), -emxi_inf()));
    }
    /* What is above it, to shared memory: counted, then put where it belongs. A warp has the lists of one warp of every part. */
    const int n_list = lane < a.parts ? __ldcg(pack.n + lane * SOLVE_WARPS + warp) : 0;
    listed = !__syncthreads_or(n_list > EMXI_CUDA_PACKED);
    at = 0;
    for (int pass = 0; listed && pass < 2; pass++) {
      for (int i = 0; i < a.parts; i += 4) {
        const float *from_z[4];
        int n_of[4];
#pragma unroll
        for (int u = 0; u < 4; u++) {
          n_of[u] = __shfl_sync(EMXI_FULL, n_list, i + u);
          from_z[u] = pack.z + ((int64_t)(i + u) * SOLVE_WARPS + warp) * EMXI_CUDA_PACKED;
        }
        const int longest = max(max(n_of[0], n_of[1]), max(n_of[2], n_of[3]));
        for (int base = lane; base - lane < longest; base += 64) {
          float v[4][2];
#pragma unroll
          for (int u = 0; u < 4; u++)
#pragma unroll
            for (int j = 0; j < 2; j++) v[u][j] = base + 32 * j < n_of[u] ? from_z[u][base + 32 * j] : -emxi_inf();
#pragma unroll
          for (int u = 0; u < 4; u++)
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
  /* f(score) for everything above thr, by some thread, in an order that depends on nothing else. Packed lists are of other blocks, behind a
   * fence: plain loads, so that they come from the first-level cache when they are read again. */
  const auto each = [&](auto f) {
    if (held) {
      for (int i = threadIdx.x; i < total; i += SOLVE_THREADS) f(list[i]);
    } else if (listed) {
      for (int i = warp; i < pack.lists; i += SOLVE_WARPS)
        for (int j = lane, n = pack.n[i]; j < n; j += 128) {
          float v[4];
#pragma unroll
          for (int u = 0; u < 4; u++) v[u] = j + 32 * u < n ? pack.z[(int64_t)i * EMXI_CUDA_PACKED + j + 32 * u] : -emxi_inf();
#pragma unroll
          for (int u = 0; u < 4; u++) f(v[u]);
        }
    } else {
      for (int64_t c = threadIdx.x; c < chunks; c += SOLVE_THREADS)
        for (int j = 0, n = chunk_max[c] > thr ? count[c] : 0; j < n; j++)
          if (z[c * CHUNK + j] > thr) f(z[c * CHUNK + j]);
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
  for (int base = warp * 4; base < total;
       base += SOLVE_WARPS * 4) { /* four candidates a warp, so that a short list is read by all */
    const int i = base + lane;
    const bool there = lane < 4 && i < total;
    const float p = there ? weight_of(k, list[i], t) : 0.0f;
    add_values<T>(a, place, __ballot_sync(EMXI_FULL, p > 0), p, there ? position[i] : 0, lane, acc);
  }
  store_values(a, place, space, acc);
}

/* Block = (part, row). All parts find out how many scores may matter. Few: part 0 has them in shared memory, and with no more than MAX_HERE of
 * them, as most rows have, all that follows is here: the code of a kernel is not in the instruction cache when it starts, so there should not
 * be much of it. */
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
  /* The largest scores of sets of chunks are scores: the threshold of any subset is a lower bound (T1), and this one leaves little more
   * than the support. */
  const bool closed = is_closed(k), two = k.alpha == 2.0;
  const float fa = (float)k.a, fb = (float)k.b;
  if (closed)
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
  /* Their candidates: a warp counts what is above thr in four chunks, then all warps write. */
  for (int first = 0, turn = 0; first < n_read; first += SOLVE_WARPS * 4, turn ^= 1) {
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
      if (i < chosen) value[u] = load_value<T>(a, place, position[i], lane);
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
static_assert(SOLVE_WARPS * MAX_D <= 2 * LISTED, "the warps' sums lie where the list was");
static_assert(SOLVE_WARPS * EMXI_CUDA_PACKED <= 2 * LISTED, "a part's packed scores lie there too");
static_assert(EMXI_CUDA_POINTS == 16 && SOLVE_WARPS * 2 * EMXI_CUDA_POINTS <= MAX_ALIVE, "a lane has one sum");

/* ---- share */

template <typename T>
__global__ void __launch_bounds__(SCAN_THREADS) share(const __grid_constant__ emxi_cuda_decode a) {
  __shared__ float sum[SCAN_WARPS][MAX_D];
  __shared__ bool last;
  start_next(); /* most rows need nothing here, and kernels that follow wait before they look at anything */
  wait_for_previous();
  const int64_t row = blockIdx.x / a.shares;
  const int part = (int)(blockIdx.x % a.shares);
  if (a.cert && a.reports && part == 0 && threadIdx.x == SCAN_THREADS - 1) account_row(a, row);
  emxi_cuda_wide *wide = &a.wide[row];
  if (!wide->wide) return;
  const row_place place = place_of(a, row);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, D = a.pool.D;
  const threshold k = threshold_of(a, alpha_of(a, place.h), wide->m);
  const double t = wide->t;
  float acc[PER_LANE];
#pragma unroll
  for (int e = 0; e < PER_LANE; e++) acc[e] = 0;
  const auto add = [&](float score, int64_t at, bool there) {
    const float p = there ? weight_of(k, score, t) : 0.0f;
    add_values<T>(a, place, __ballot_sync(EMXI_FULL, p > 0), p, at, lane, acc);
  };
  if (wide->wide == WIDE_PACKED) {
    const packed pack = packed_of(a, row);
    for (int i = part * SCAN_WARPS + warp; i < pack.lists; i += a.shares * SCAN_WARPS)
      for (int base = 0, n = pack.n[i]; base < n; base += 32) {
        const int64_t j = (int64_t)i * EMXI_CUDA_PACKED + base + lane;
        const bool there = base + lane < n;
        add(there ? pack.z[j] : 0.0f, there ? pack.at[j] : 0, there);
      }
  } else {
    const int64_t chunks = (place.count + CHUNK - 1) / CHUNK, per = (chunks + a.shares - 1) / a.shares, from = part * per,
                  to = from + per < chunks ? from + per : chunks;
    const float *z = a.z + row * a.chunks * CHUNK;
    const uint8_t *local = a.local + row * a.chunks * CHUNK;
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
  for (int e = 0; e < PER_LANE; e++) sum[warp][lane + 32 * e] = acc[e];
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += SCAN_THREADS) {
    float x = 0;
    for (int w = 0; w < SCAN_WARPS; w++) x += sum[w][d];
    a.share[blockIdx.x * (int64_t)D + d] = x;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&wide->done, 1u) == (uint32_t)a.shares - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int d = threadIdx.x; d < D; d += SCAN_THREADS) {
    double x = 0;
    for (int i = 0; i < a.shares; i++) x += (double)__ldcg(&a.share[(row * a.shares + i) * D + d]);
    store_output(a, place, d, (float)x);
  }
}

/* ---- merge: softmax */

__global__ void __launch_bounds__(MAX_D) merge(const __grid_constant__ emxi_cuda_decode a) {
  __shared__ float sum[MAX_D], weight[MAX_D];
  __shared__ double scratch[MAX_D / 32];
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const row_place place = place_of(a, row);
  if (a.alphas && alpha_of(a, place.h) != 1.0) return; /* solve's row */
  const int D = a.pool.D, groups = MAX_D / D, group = threadIdx.x / D, d = threadIdx.x % D;
  bool bad = query_is_bad(a, place);
  float m = -emxi_inf();
  for (int i = threadIdx.x; i < a.splits; i += MAX_D) {
    bad |= a.bad[row * a.splits + i] != 0;
    m = fmaxf(m, a.part_m[row * a.splits + i]);
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) m = fmaxf(m, __shfl_xor_sync(EMXI_FULL, m, step));
  if (threadIdx.x % 32 == 0) sum[threadIdx.x / 32] = m;
  bad = __syncthreads_or(bad);
  for (int w = 0; w < MAX_D / 32; w++) m = fmaxf(m, sum[w]);
  double z = 0, n = 0;
  float o = 0;
  for (int base = 0; base < a.splits;
       base += MAX_D) { /* the weights of 256 parts, then a group of D threads for every few of them */
    const int i = base + threadIdx.x, most = a.splits - base < MAX_D ? a.splits - base : MAX_D;
    __syncthreads();
    if (i < a.splits) {
      const float part = a.part_m[row * a.splits + i], f = part == -emxi_inf() ? 0.0f : expf(part - m);
      weight[threadIdx.x] = f;
      z += (double)(f * a.part_z[row * a.splits + i]);
      n += a.part_n[row * a.splits + i];
    }
    __syncthreads();
    if (group < groups) {
#pragma unroll 4
      for (int j = group; j < most; j += groups)
        o = fmaf(weight[j], weight[j] > 0 ? a.part_o[(row * a.splits + base + j) * D + d] : 0.0f, o);
    }
  }
  z = block_sum(z, scratch);
  n = block_sum(n, scratch);
  sum[threadIdx.x] = o;
  __syncthreads();
  if (group == 0) {
    double x = 0;
    for (int j = 0; j < groups; j++) x += (double)sum[j * D + d];
    store_output(a, place, d, bad ? emxi_nan() : z > 0 ? (float)(x / z) : 0.0f);
  }
  if (threadIdx.x == 0) {
    emxi_cuda_wide *wide = &a.wide[row];
    wide->solved = !bad && z > 0;
    wide->m = m;
    wide->exact = z;
    write_report(a, place, row, bad, (double)emxi_nan(), n > 0, (int64_t)n, (int64_t)n);
  }
}

/* ---- launches */

template <typename T, int FIXED, int R, int U, bool SOFTMAX, bool SPARSE, bool BULK>
void launch_scan(const emxi_cuda_decode &d, cudaStream_t stream) {
  const unsigned grid = (unsigned)(SPARSE ? d.batch.n * d.H * d.splits : d.batch.n * d.pool.G * d.blocks * d.splits);
  size_t shared = SOFTMAX ? (size_t)SCAN_WARPS * R * d.pool.D * sizeof(float) : 0;
  if constexpr (BULK) {
    shared = key_tile<T, FIXED, U>::SHARED;
    (void)cudaFuncSetAttribute(scan<T, FIXED, R, U, SOFTMAX, SPARSE, BULK>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               (int)shared);
  }
  launch(scan<T, FIXED, R, U, SOFTMAX, SPARSE, BULK>, grid, SCAN_THREADS, shared, stream, d.overlap, d);
}
/* Of U keys a lane at a time; by bulk copies, of BULK_U. */
template <typename T, int FIXED, int R, int U, int BULK_U, bool SOFTMAX, bool SPARSE>
void scan_fixed(const emxi_cuda_decode &d, cudaStream_t stream) {
  if constexpr (!SOFTMAX && !SPARSE)
    if (d.told) {
      launch(open_told, 1, 256, 0, stream, d.overlap, d);
      return launch_scan<T, FIXED, R, BULK_U, SOFTMAX, SPARSE, true>(d, stream);
    }
  launch_scan<T, FIXED, R, U, SOFTMAX, SPARSE, false>(d, stream);
}
template <typename T, bool SOFTMAX>
void scan_any(const emxi_cuda_decode &d, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (d.vectors && d.pool.D == 32) {
      if (d.sparse) return scan_fixed<T, 32, 1, 4, 4, SOFTMAX, true>(d, stream);
      if (d.rows == 1) return scan_fixed<T, 32, 1, 4, 4, SOFTMAX, false>(d, stream);
      if (d.rows == 4) return scan_fixed<T, 32, 4, 4, 4, SOFTMAX, false>(d, stream);
    } else if (d.vectors && d.pool.D == 64) {
      if (d.sparse) return scan_fixed<T, 64, 1, 8, 8, SOFTMAX, true>(d, stream);
      if (d.rows == 1) return scan_fixed<T, 64, 1, 8, 8, SOFTMAX, false>(d, stream);
      if (d.rows == 4) return scan_fixed<T, 64, 4, 4, 4, SOFTMAX, false>(d, stream);
    } else if (d.vectors && d.pool.D == 128) {
      if (d.sparse) return scan_fixed<T, 128, 1, 8, 8, SOFTMAX, true>(d, stream);
      if (d.rows == 1) return scan_fixed<T, 128, 1, 8, 8, SOFTMAX, false>(d, stream);
      if (d.rows == 4) return scan_fixed<T, 128, 4, 4, 8, SOFTMAX, false>(d, stream);
    }
  }
  if (d.sparse) return launch_scan<T, 0, 1, 4, SOFTMAX, true, false>(d, stream);
  launch_scan<T, 0, 4, 2, SOFTMAX, false, false>(d, stream);
}
/* In certified.cuh: whether it has scanned flat items. */
template <typename T>
bool certified(const emxi_cuda_decode &d, cudaStream_t stream);
template <typename T>
void decode_all(const emxi_cuda_decode &d, cudaStream_t stream) {
  const unsigned rows = (unsigned)(d.batch.n * d.H * d.S);
  const bool scanned = d.cert && certified<T>(d, stream);
  if (d.alphas || d.alpha == 1.0) {
    scan_any<T, true>(d, stream);
    launch(merge, rows, MAX_D, 0, stream, d.overlap, d);
  }
  if (!d.alphas && d.alpha == 1.0) return;
  if (!scanned) scan_any<T, false>(d, stream);
  launch(solve<T>, rows * (unsigned)d.parts, SOLVE_THREADS, 0, stream, d.overlap, d);
  launch(share<T>, rows * (unsigned)d.shares, SCAN_THREADS, 0, stream, d.overlap, d);
}

} // namespace

#endif
