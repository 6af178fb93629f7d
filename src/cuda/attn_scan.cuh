/* SPDX-License-Identifier: Apache-2.0
 * Candidates of every row, backward, on sm_90a, and what attn_sieve.cuh (forward) has in common with it: 16-bit q and k, head dims up to
 * 128, heads without an ALiBi slope. What scan_keys does elsewhere.
 *
 * A block has 192 queries of a head: three warpgroups hold 64 each in registers and multiply them (wgmma) with tiles of 128 keys, which a
 * fourth copies through a ring in shared memory. The threshold is known: positions above it, less what rounding may hide, are listed.
 * Cost: 2 D FLOP a visible pair, 2 D bytes of K a pair of a key and a block.
 *
 * A row's list has four parts, one of each lane that holds scores of the row, entry by entry in turns (`quads`); a part ascends. */
#ifndef EMXI_CUDA_ATTN_SCAN_CUH
#define EMXI_CUDA_ATTN_SCAN_CUH

#include "attn.cuh"

namespace {

constexpr int FAST_GROUPS = 3, FAST_ROWS = 64 * FAST_GROUPS, FAST_KEYS = 128, FAST_THREADS = 128 * (FAST_GROUPS + 1),
              FAST_ROOM = CAP / 4;
/* Quads of scores that wait for a place in a list, a lane: 14; bytes from one to the next. */
constexpr int QUEUE = 14, QUEUE_PART = FAST_GROUPS * 128 * 8, QUEUE_STEP = 3 * QUEUE_PART;

template <int D>
struct fast {
  static constexpr int STAGES = D == 64 ? 5 : 3, STAGE_BYTES = D / 64 * FAST_KEYS * 128;
  static constexpr size_t SHARED = STAGES * STAGE_BYTES + 1024 + QUEUE * QUEUE_STEP;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/* 16 bytes, of which the first `bytes` are copied and the others are zero. */
__device__ __forceinline__ void copy16(uint32_t to, const void *from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
/* Rows of 128 bytes, swizzled, in groups of eight. */
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  return (uint64_t)((address & 0x3ffff) >> 4) | ((uint64_t)1 << 16) | ((uint64_t)64 << 32) | ((uint64_t)1 << 62);
}
/* d = (acc ? d : 0) + a b^T, 64 x 64 x 16: a in registers, b in shared memory. */
#define EMXI_WGMMA(type)                                                                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type           \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%" \
               "29,%30,%31},"                                                                                                  \
               " {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"                                                                       \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),   \
                 "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),        \
                 "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),       \
                 "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(acc))
template <typename T>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int acc) {
  if constexpr (std::is_same_v<T, __half>)
    EMXI_WGMMA("f16");
  else
    EMXI_WGMMA("bf16");
}

#endif

template <typename T, int D>
__global__ void __launch_bounds__(FAST_THREADS, 1) fast_scan(const __grid_constant__ emxi_cuda_attn a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int STAGES = fast<D>::STAGES, KB = fast<D>::STAGE_BYTES, KEYS = FAST_KEYS;
  extern __shared__ __align__(1024) char shared_raw[];
  __shared__ uint64_t full[STAGES], empty[STAGES];
  char *ks = (char *)(((uintptr_t)shared_raw + 1023) & ~(uintptr_t)1023);

  /* where: blocks of 192 queries; those that see most keys first */
  const int64_t heads = (int64_t)a.ng * a.group, beside = heads * (a.packed ? 1 : a.nb);
  const int64_t block = a.q_blocks - 1 - blockIdx.x / beside, rest = blockIdx.x % beside;
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
  bool live0 = group < FAST_GROUPS && lr0 < rows, live1 = group < FAST_GROUPS && lr1 < rows;
  live0 = live0 && a.todo[slice_row + lr0];
  live1 = live1 && a.todo[slice_row + lr1];
  const key_range first_row = visible(a, sp, row0), last_row = visible(a, sp, row0 + rows - 1);
  const bool work = good && last_row.to > first_row.from && __syncthreads_or(live0 || live1);
  if (!work) {
    const auto none = [&](int lr) {
      const key_range vis = visible(a, sp, row0 + lr);
      const float tau = *(const float *)row_of(a.tau, b, h, sp.q0 + row0 + lr);
      a.n_list[slice_row + lr] = vis.to <= vis.from || tau == -emxi_inf() ? 0
                                 : alpha == 1.0 && tau == tau             ? EMXI_CUDA_ROW_DENSE
                                                                          : EMXI_CUDA_ROW_NAN;
      a.at[slice_row + lr] = 0;
    };
    if (live0 && part == 0) none(lr0);
    if (live1 && part == 0) none(lr1);
    return;
  }
  const int tile_lo = first_row.from / KEYS, tile_hi = (last_row.to + KEYS - 1) / KEYS;
  /* tiles that every row sees whole */
  int in_lo = (last_row.from + KEYS - 1) / KEYS, in_hi = min(first_row.to / KEYS, tile_hi);
  if (in_lo >= in_hi) in_lo = in_hi = tile_lo;
  const int total = tile_hi - tile_lo;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(&full[i], 128), barrier_init(&empty[i], 4 * FAST_GROUPS);
    barriers_ready();
  }
  __syncthreads();
  if (group == FAST_GROUPS) { /* the copier */
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const T *keys = (const T *)row_of(a.k, b, h / a.group, sp.k0);
    const int64_t stride = a.k.row;
    constexpr int LAG = STAGES > 3 ? 2 : 1, PER_ROW = D / 8,
                  STEP = 128 / PER_ROW; /* rows that 128 threads copy at once: a multiple of 8 */
    const int t = threadIdx.x - 128 * FAST_GROUPS, chunk = t % PER_ROW, row = t / PER_ROW, bytes = chunk * 8 < a.d ? 16 : 0;
    for (int it = 0; it < total + LAG; it++) {
      if (it < total) {
        const int s = it % STAGES, tile = tile_lo + it;
        barrier_wait(&empty[s], ((it / STAGES) & 1) ^ 1);
        const int left = sp.n - (tile * KEYS + row);
        uint32_t to = shared_address(ks + s * KB) + (chunk / 8) * (KEYS * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
        const T *from = keys + (int64_t)(tile * KEYS + row) * stride + chunk * 8;
#pragma unroll 4
        for (int i = 0; i < KEYS / STEP; i++) {
          const bool real = i * STEP < left && bytes;
          copy16(to, real ? from : keys, real ? 16 : 0);
          to += STEP * 128;
          from += STEP * stride;
        }
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
      if (it >= LAG) {
        asm volatile("cp.async.wait_group %0;" ::"n"(LAG) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        barrier_arrive(&full[(it - LAG) % STAGES]);
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 152;");
  const float c = (float)(alpha - 1.0) * a.scale; /* of a product of q and k */
  key_range vis0 = {0, 0}, vis1 = {0, 0};
  if (lr0 < rows) vis0 = visible(a, sp, row0 + lr0);
  if (lr1 < rows) vis1 = visible(a, sp, row0 + lr1);
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
  /* f(products, tile, half) for `n` tiles from `tile` on */
  const auto walk = [&](int tile, int n, auto f) {
    for (; n > 0; n--, tile++) {
      barrier_wait(&full[stage], phase);
      multiply(acc0, 0);
      multiply(acc1, 1);
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      hold(acc0);
      f(acc0, tile, 0);
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane == 0) barrier_arrive(&empty[stage]);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      phase ^= stage == 0;
      hold(acc1);
      f(acc1, tile, 1);
    }
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
  float f0 = emxi_inf(), f1 = emxi_inf(); /* products at or below it have no weight */
  const auto bound = [&](int lr) {
    const float tau = *(const float *)row_of(a.tau, b, h, sp.q0 + row0 + lr);
    if (tau != tau || tau == -emxi_inf()) return tau;
    const float thr = (tau - 1e-5f * (1.0f + fabsf(tau))) / c;
    return thr - 1e-5f * fabsf(thr);
  };
  if (live0) f0 = bound(lr0);
  if (live1) f1 = bound(lr1);
  odd0 = f0 != f0;
  odd1 = f1 != f1;
  if (f0 == -emxi_inf()) vis0 = {0, 0}, f0 = emxi_inf(); /* sees nothing */
  if (f1 == -emxi_inf()) vis1 = {0, 0}, f1 = emxi_inf();
  if (!live0) f0 = emxi_inf();
  if (!live1) f1 = emxi_inf();
  odd0 = __ballot_sync(~0u, odd0) >> (lane & ~3) & 15;
  odd1 = __ballot_sync(~0u, odd1) >> (lane & ~3) & 15;
  if (odd0) f0 = emxi_inf();
  if (odd1) f1 = emxi_inf();
  bool positive = __all_sync(~0u, f0 > 0 && f1 > 0);

  int32_t *at0 = a.pos + (slice_row + lr0) * CAP + part, *at1 = at0 + 8 * CAP;
  int n0 = 0, n1 = 0;
  bool over0 = false, over1 = false;
  const uint32_t queue = shared_address(ks + STAGES * KB) + threadIdx.x * 8, limit = queue + (QUEUE - 8) * QUEUE_STEP;
  uint32_t tail = queue;
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
        int32_t *pos = second ? at1 : at0;
#pragma unroll
        for (int i = 0; i < 4; i++) { /* without branches: a warp's lanes differ */
          const int in = x[i] > f;
          asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"(in), "l"(pos + 4 * n),
                       "r"((int32_t)(at >> 1) + 8 * (i / 2) + (i & 1))
                       : "memory");
          n += in;
        }
        (second ? n1 : n0) = n;
      }
      const bool tight0 = n0 > FAST_ROOM - 4, tight1 = n1 > FAST_ROOM - 4;
      /* a support too long for the list */
      if (__ballot_sync(~0u, tight0) >> (lane & ~3) & 15) over0 = true, f0 = emxi_inf(), n0 = 0;
      if (__ballot_sync(~0u, tight1) >> (lane & ~3) & 15) over1 = true, f1 = emxi_inf(), n1 = 0;
    }
    tail = queue;
    __syncwarp();
  };
  const auto filter = [&](float(&d)[32], int tile, const int half) {
    const int base = tile * KEYS + half * 64 + col0;
    float top[2][4];
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int g = 0; g < 4; g++) {
        const float x0 = d[8 * g + 2 * r], x1 = d[8 * g + 2 * r + 1], x2 = d[8 * g + 4 + 2 * r], x3 = d[8 * g + 5 + 2 * r];
        top[r][g] = positive ? __int_as_float(max(__vimax3_s32(__float_as_int(x0), __float_as_int(x1), __float_as_int(x2)),
                                                  __float_as_int(x3)))
                             : fmaxf(fmaxf(x0, x1), fmaxf(x2, x3));
      }
    const float x0 = fmaxf(fmaxf(top[0][0], top[0][1]), fmaxf(top[0][2], top[0][3])),
                x1 = fmaxf(fmaxf(top[1][0], top[1][1]), fmaxf(top[1][2], top[1][3]));
    if (x0 > f0 || x1 > f1) { /* lanes with a hit queue it; lists are written from the queues */
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int g = 0; g < 4; g++)
          asm volatile(
              "{\n.reg .pred p;\nsetp.gt.f32 p, %1, %2;\n@p st.shared.v2.f32 [%0], {%3, %4};\n@p st.shared.v2.f32 [%0+%9], {%5, "
              "%6};\n"
              "@p st.shared.u32 [%0+%10], %7;\n@p add.u32 %0, %0, %8;\n}"
              : "+r"(tail)
              : "f"(top[r][g]), "f"(r ? f1 : f0), "f"(d[8 * g + 2 * r]), "f"(d[8 * g + 2 * r + 1]), "f"(d[8 * g + 4 + 2 * r]),
                "f"(d[8 * g + 5 + 2 * r]), "r"(2 * base + 32 * g + r), "n"(QUEUE_STEP), "n"(QUEUE_PART), "n"(2 * QUEUE_PART)
              : "memory");
    }
    if (__any_sync(~0u, tail > limit)) flush();
  };
  const auto masked = [&](float(&d)[32], int tile, const int half) {
    mask(d, tile, half);
    filter(d, tile, half);
  };
  walk(tile_lo, in_lo - tile_lo, masked);
  walk(in_lo, in_hi - in_lo, filter);
  walk(in_hi, tile_hi - in_hi, masked);
  flush();
  const auto finish = [&](int lr, key_range vis, int n, bool live, bool odd, bool over) {
    int counts = 0;
#pragma unroll
    for (int p = 0; p < 4; p++) counts |= __shfl_sync(~0u, n, (lane & ~3) + p) << 8 * p;
    n = quad_sum(n);
    if (!live || part) return;
    a.n_list[slice_row + lr] = vis.to <= vis.from ? 0 : odd ? EMXI_CUDA_ROW_NAN : over ? EMXI_CUDA_ROW_DENSE : n;
    a.at[slice_row + lr] = counts;
  };
  finish(lr0, vis0, n0, live0, odd0, over0);
  finish(lr1, vis1, n1, live1, odd1, over1);
#endif
}

} // namespace

#endif
