/* Every entry of every kernel table that this CPU can run, against the scalar table or plain float64 code, over odd sizes. Inputs
 * and outputs stand against unreadable pages, once at their end and once at their start, so that a byte touched outside is a
 * crash. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "cpu/table.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- guarded buffers: [no access][room][no access] */

typedef struct guard {
  char *base;
  size_t page, room;
} guard;

static guard guard_make(size_t bytes) {
  guard g = {.page = (size_t)sysconf(_SC_PAGESIZE)};
  g.room = (bytes + g.page - 1) / g.page * g.page;
  g.base = mmap(NULL, g.room + 2 * g.page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  assert_true(g.base != MAP_FAILED);
  assert_int_equal(mprotect(g.base + g.page, g.room, PROT_READ | PROT_WRITE), 0);
  return g;
}
static void guard_free(guard g) { munmap(g.base, g.room + 2 * g.page); }
/* `bytes` that end (at_end) or start at the edge of the room, filled with a pattern. */
static void *guard_at(guard g, size_t bytes, bool at_end) {
  assert_true(bytes <= g.room);
  memset(g.base + g.page, 0x5a, g.room);
  return at_end ? g.base + g.page + g.room - bytes : g.base + g.page;
}
/* The rest of the room still holds the pattern. */
static void guard_check(guard g, const void *p, size_t bytes, const char *what) {
  for (char *c = g.base + g.page; c < g.base + g.page + g.room; c++)
    if ((c < (const char *)p || c >= (const char *)p + bytes) && *c != 0x5a) fail_msg("%s wrote outside its output", what);
}

#define EACH_TABLE(k)                                       \
  for (int i_##k = 0; emxi_table_available(i_##k); i_##k++) \
    for (const emxi_table *k = emxi_table_available(i_##k); k; k = NULL)
static const int sizes[] = {0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 100, 127, 129, 257, 1000};
#define N_SIZES ((int)(sizeof sizes / sizeof *sizes))
enum { MOST = 1024 };
static const int dims[] = {1, 3, 8, 15, 16, 17, 31, 32, 64, 80, 96, 100, 127, 128, 129, 255, 256};
#define N_DIMS ((int)(sizeof dims / sizeof *dims))

/* Ordinary scores, ties, infinities; NaN on request. */
static void fill_scores(float *s, int n, uint64_t seed, bool nans) {
  emxi_normals(seed, 11, s, n);
  for (int i = 0; i < n; i++) {
    if (i % 7 == 3) s[i] = 0.25f;
    if (i % 13 == 5) s[i] = -INFINITY;
    if (nans && i % 11 == 4) s[i] = NAN;
  }
}
static void fill_elements(void *p, int32_t dtype, int64_t n, uint64_t seed) {
  float x[MOST];
  for (int64_t at = 0; at < n; at += MOST) {
    int64_t m = n - at < MOST ? n - at : MOST;
    emxi_normals(seed, (uint64_t)at, x, m);
    for (int64_t i = 0; i < m; i++) emxi_store(p, dtype, at + i, x[i]);
  }
}
static const int32_t dtypes[EMXI_SLOTS] = {EMX_F32, EMX_F16, EMX_BF16};

/* ---- rows of scores */

static void test_max(void **state) {
  (void)state;
  guard g = guard_make(MOST * 4);
  EACH_TABLE(k)
  for (int i = 0; i < N_SIZES; i++)
    for (int variant = 0; variant < 6; variant++) {
      const int n = sizes[i];
      float *s = guard_at(g, (size_t)n * 4, variant & 1), want = -INFINITY;
      fill_scores(s, n, (uint64_t)n, variant >= 2);
      if (variant >= 4)
        for (int j = 0; j < n; j++) s[j] = j % 2 ? NAN : -INFINITY;
      for (int j = 0; j < n; j++)
        if (s[j] > want) want = s[j];
      if (k->max(s, n) != want) fail_msg("%s max of %d", k->name, n);
    }
  guard_free(g);
}

static void test_keep(void **state) {
  (void)state;
  guard in = guard_make(MOST * 4), ids = guard_make(MOST * 4), out = guard_make((MOST + 16) * 4),
        oid = guard_make((MOST + 16) * 4);
  static const float thresholds[] = {-INFINITY, -1, 0.25f, 2.5f, INFINITY};
  EACH_TABLE(k)
  for (int i = 0; i < N_SIZES; i++)
    for (int variant = 0; variant < 8; variant++)
      for (size_t t = 0; t < sizeof thresholds / sizeof *thresholds; t++) {
        const int n = sizes[i];
        const bool at_end = variant & 1, with_ids = variant & 2, in_place = variant & 4;
        float want[MOST];
        int32_t want_id[MOST];
        int count = 0;
        /* a whole vector may be stored past the survivors: 16 elements of room */
        const size_t room = (size_t)(n + 16) * 4;
        float *so = guard_at(out, room, at_end), *s = in_place ? so : guard_at(in, (size_t)n * 4, at_end);
        int32_t *io = guard_at(oid, room, at_end), *id = in_place ? io : guard_at(ids, (size_t)n * 4, at_end);
        fill_scores(s, n, (uint64_t)n + 1, variant >= 4 || variant == 1);
        for (int j = 0; j < n; j++) {
          id[j] = 3 * j + 1;
          if (s[j] <= thresholds[t]) continue;
          want[count] = s[j];
          want_id[count++] = with_ids ? id[j] : 1000 + j;
        }
        int64_t got = k->keep(s, with_ids ? id : NULL, 1000, n, thresholds[t], so, io);
        if (got != count || memcmp(so, want, (size_t)count * 4) || memcmp(io, want_id, (size_t)count * 4))
          fail_msg("%s keep of %d, variant %d", k->name, n, variant);
        guard_check(out, so, room, "keep");
        guard_check(oid, io, room, "keep");
      }
  guard_free(in);
  guard_free(ids);
  guard_free(out);
  guard_free(oid);
}

static void test_sums(void **state) {
  (void)state;
  guard g = guard_make(MOST * 4);
  EACH_TABLE(k)
  for (int i = 0; i < N_SIZES; i++)
    for (int variant = 0; variant < 4; variant++) {
      const int n = sizes[i];
      const double offset = variant & 2 ? 1e6 : 0, a = variant & 2 ? 0.5 : 1.0, m = offset + 3, t = -0.75;
      float *s = guard_at(g, (size_t)n * 4, variant & 1);
      fill_scores(s, n, (uint64_t)n + 2, false);
      long double count = 0, s1 = 0, s2 = 0;
      for (int j = 0; j < n; j++) {
        s[j] += (float)offset + 2;
        long double y = (long double)a * ((long double)s[j] - m) - t;
        if (y > 0) count++, s1 += y, s2 += y * y;
      }
      emxi_sums sums;
      k->sums(s, n, m, a, t, &sums);
      /* each of the n terms carries two roundings of 2^-53, and the sum at most n more */
      const double slack = (n + 2) * 0x1p-52;
      if (sums.k != (double)count || fabs(sums.s1 - (double)s1) > slack * fabs((double)s1) + 1e-300 ||
          fabs(sums.s2 - (double)s2) > 2 * slack * (double)s2 + 1e-300)
        fail_msg("%s sums of %d: %g %g %g", k->name, n, sums.k, sums.s1, sums.s2);
    }
  guard_free(g);
}

static void test_weights(void **state) {
  (void)state;
  guard in = guard_make(MOST * 4), out = guard_make(MOST * 4);
  EACH_TABLE(k)
  for (int i = 0; i < N_SIZES; i++)
    for (int variant = 0; variant < 8; variant++) {
      const int n = sizes[i], beta = variant & 2 ? 2 : 1;
      float want[MOST];
      float *p = guard_at(out, (size_t)n * 4, variant & 1), *s = variant & 4 ? p : guard_at(in, (size_t)n * 4, variant & 1);
      fill_scores(s, n, (uint64_t)n + 3, false);
      emxi_table_scalar.weights(s, n, 2.5, 0.5, -0.9, beta, want);
      k->weights(s, n, 2.5, 0.5, -0.9, beta, p);
      if (memcmp(p, want, (size_t)n * 4)) fail_msg("%s weights of %d", k->name, n);
      for (int j = 0; j < n; j++) assert_true(p[j] >= 0);
      guard_check(out, p, (size_t)n * 4, "weights");
    }
  guard_free(in);
  guard_free(out);
}

static void test_exps(void **state) {
  (void)state;
  guard in = guard_make(MOST * 4), out = guard_make(MOST * 4);
  EACH_TABLE(k)
  for (int i = 0; i < N_SIZES; i++)
    for (int variant = 0; variant < 4; variant++) {
      const int n = sizes[i];
      float *p = guard_at(out, (size_t)n * 4, variant & 1), *s = variant & 2 ? p : guard_at(in, (size_t)n * 4, variant & 1),
            x[MOST];
      fill_scores(s, n, (uint64_t)n + 4, false);
      for (int j = 0; j < n; j++) x[j] = s[j] = j % 5 == 2 ? s[j] * 20 - 60 : s[j] - 5;
      double total = k->exps(s, n, 1.5f, p), want = 0;
      for (int j = 0; j < n; j++) {
        double e = exp((double)x[j] - 1.5);
        /* contract: 1e-6 relative, and the subtraction s - m rounds to half a unit of up to 128; below e^-87 zero */
        if (fabs(p[j] - e) > (1e-6 + 4e-6 * (x[j] < -30)) * e + 1e-37)
          fail_msg("%s exp(%g - 1.5): %g, want %g", k->name, x[j], p[j], e);
        want += p[j];
      }
      if (fabs(total - want) > 1e-12 * want) fail_msg("%s exps sum of %d: %.17g, want %.17g", k->name, n, total, want);
      guard_check(out, p, (size_t)n * 4, "exps");
    }
  guard_free(in);
  guard_free(out);
}

/* ---- rows of q, k, v */

static void test_load(void **state) {
  (void)state;
  guard in = guard_make(MOST * 4), out = guard_make(MOST * 4);
  EACH_TABLE(k)
  for (int slot = 0; slot < EMXI_SLOTS; slot++)
    for (int i = 0; i < N_SIZES; i++)
      for (int at_end = 0; at_end < 2; at_end++) {
        const int n = sizes[i];
        const size_t es = emx_dtype_size(dtypes[slot]);
        char *src = guard_at(in, (size_t)n * es, at_end);
        float *dst = guard_at(out, (size_t)n * 4, at_end);
        fill_elements(src, dtypes[slot], n, 5);
        if (n > 2) emxi_store(src, dtypes[slot], 2, -INFINITY);
        k->load[slot](src, n, dst);
        for (int j = 0; j < n; j++)
          if (dst[j] != (float)emxi_load(src, dtypes[slot], j)) fail_msg("%s load of %d", k->name, n);
        guard_check(out, dst, (size_t)n * 4, "load");
      }
  guard_free(in);
  guard_free(out);
}

static void test_dot(void **state) {
  (void)state;
  enum { KEYS = 9, HEADS = 5, PITCH = 7 };
  const size_t widest = 300 + PITCH;
  guard gq = guard_make(HEADS * widest * 4), gk = guard_make(KEYS * widest * 4), gs = guard_make(HEADS * (KEYS + 2) * 4);
  EACH_TABLE(k)
  for (int slot = 0; slot < EMXI_SLOTS; slot++)
    for (int i = 0; i < N_DIMS; i++)
      for (int variant = 0; variant < 4; variant++) {
        const int d = dims[i], n = variant & 2 ? KEYS : 1 + i % 5, nq = 1 + i % HEADS;
        const int64_t ldq = d + (variant & 2 ? 3 : 0), stride = d + (variant & 2 ? PITCH : 0), lds = n + 2;
        const size_t es = emx_dtype_size(dtypes[slot]);
        const size_t nq_bytes = ((size_t)(nq - 1) * (size_t)ldq + (size_t)d) * 4;
        const size_t nk = (size_t)(n - 1) * (size_t)stride + (size_t)d,
                     ns_bytes = ((size_t)(nq - 1) * (size_t)lds + (size_t)n) * 4;
        float *q = guard_at(gq, nq_bytes, variant & 1), *s = guard_at(gs, ns_bytes, variant & 1);
        char *keys = guard_at(gk, nk * es, variant & 1);
        fill_elements(q, EMX_F32, (int64_t)(nq_bytes / 4), 6);
        fill_elements(keys, dtypes[slot], (int64_t)nk, 7);
        k->dot[slot](q, ldq, nq, keys, stride, n, d, s, lds);
        for (int h = 0; h < nq; h++)
          for (int j = 0; j < n; j++) {
            double want = 0, size = 0;
            for (int x = 0; x < d; x++) {
              double term = (double)q[h * ldq + x] * emxi_load(keys, dtypes[slot], j * stride + x);
              want += term;
              size += fabs(term);
            }
            /* d fma's of float, in any order */
            if (fabs(s[h * lds + j] - want) > d * 0x1p-24 * size) fail_msg("%s dot %d of d=%d", k->name, slot, d);
            /* a pair has the same bits alone as in a block */
            float alone;
            k->dot[slot](q + h * ldq, ldq, 1, keys + (size_t)(j * stride) * es, stride, 1, d, &alone, 1);
            if (memcmp(&alone, &s[h * lds + j], 4)) fail_msg("%s dot %d of d=%d depends on its block", k->name, slot, d);
          }
        guard_check(gs, s, ns_bytes, "dot");
      }
  guard_free(gq);
  guard_free(gk);
  guard_free(gs);
}

static void test_accumulate(void **state) {
  (void)state;
  enum { ROWS = 37 };
  guard gv = guard_make(ROWS * 300 * 4), go = guard_make(300 * 4), gw = guard_make(ROWS * 4), gi = guard_make(ROWS * 8);
  EACH_TABLE(k)
  for (int slot = 0; slot < EMXI_SLOTS; slot++)
    for (int i = 0; i < N_DIMS; i++)
      for (int variant = 0; variant < 4; variant++) {
        const int d = dims[i], n = variant & 2 ? ROWS : i % 4;
        const size_t es = emx_dtype_size(dtypes[slot]);
        float *o = guard_at(go, (size_t)d * 4, variant & 1), *w = guard_at(gw, (size_t)n * 4, variant & 1), want[256], start[256];
        int64_t *off = guard_at(gi, (size_t)n * 8, variant & 1);
        char *v = guard_at(gv, (size_t)(ROWS * d) * es, variant & 1);
        fill_elements(v, dtypes[slot], ROWS * d, 8);
        fill_elements(w, EMX_F32, n, 9);
        fill_elements(o, EMX_F32, d, 10);
        memcpy(want, o, (size_t)d * 4);
        memcpy(start, o, (size_t)d * 4);
        for (int j = 0; j < n; j++) off[j] = (int64_t)((j * 7) % ROWS) * d;
        emxi_table_scalar.accumulate[slot](want, d, v, off, w, n);
        k->accumulate[slot](o, d, v, off, w, n);
        if (memcmp(o, want, (size_t)d * 4)) fail_msg("%s accumulate %d of d=%d", k->name, slot, d);
        for (int x = 0; x < d; x += 1 + d / 3) { /* the scalar one itself against float64 */
          double sum = start[x], size = fabs(start[x]);
          for (int j = 0; j < n; j++) {
            double term = w[j] * emxi_load(v, dtypes[slot], off[j] + x);
            sum += term;
            size += fabs(term);
          }
          if (fabs(want[x] - sum) > (n + 1) * 0x1p-24 * size) fail_msg("scalar accumulate %d of d=%d", slot, d);
        }
        guard_check(go, o, (size_t)d * 4, "accumulate");
      }
  guard_free(gv);
  guard_free(go);
  guard_free(gw);
  guard_free(gi);
}

static void test_axpy(void **state) {
  (void)state;
  guard gx = guard_make(300 * 4), gy = guard_make(300 * 4);
  EACH_TABLE(k)
  for (int i = 0; i < N_DIMS; i++)
    for (int at_end = 0; at_end < 2; at_end++) {
      const int d = dims[i];
      float *x = guard_at(gx, (size_t)d * 4, at_end), *y = guard_at(gy, (size_t)d * 4, at_end), want[256];
      fill_elements(x, EMX_F32, d, 12);
      fill_elements(y, EMX_F32, d, 13);
      for (int j = 0; j < d; j++) want[j] = fmaf(-1.7f, x[j], y[j]);
      k->axpy(y, x, -1.7f, d);
      if (memcmp(y, want, (size_t)d * 4)) fail_msg("%s axpy of %d", k->name, d);
      guard_check(gy, y, (size_t)d * 4, "axpy");
    }
  guard_free(gx);
  guard_free(gy);
}

/* ---- tiles */

static void test_pack_and_tile(void **state) {
  (void)state;
  enum { ROWS = 13 };
  static float want[ROWS * EMXI_TILE];
  guard gk = guard_make(EMXI_TILE * 307 * 4), gt = guard_make(300 * EMXI_TILE * 4), gq = guard_make(ROWS * 303 * 4),
        gs = guard_make(ROWS * (EMXI_TILE + 5) * 4), gh = guard_make(ROWS * 4), gb = guard_make(ROWS * 8);
  EACH_TABLE(k)
  for (int slot = 0; slot < EMXI_SLOTS; slot++)
    for (int i = 0; i < N_DIMS; i += slot ? 3 : 1)
      for (int variant = 0; variant < 4; variant++) {
        const int d = dims[i], n = variant & 2 ? EMXI_TILE : 1 + i * 3, rows = variant & 2 ? ROWS : 1 + i % ROWS;
        const int64_t stride = d + (variant & 2 ? 7 : 0), ldq = d + 3, lds = EMXI_TILE + 5;
        const size_t es = emx_dtype_size(dtypes[slot]), nk = (size_t)(n - 1) * (size_t)stride + (size_t)d;
        const size_t nq = (size_t)(rows - 1) * (size_t)ldq + (size_t)d, ns = (size_t)(rows - 1) * (size_t)lds + EMXI_TILE;
        const size_t nt = (size_t)d * EMXI_TILE;
        char *keys = guard_at(gk, nk * es, variant & 1);
        float *kt = guard_at(gt, nt * 4, variant & 1), *q = guard_at(gq, nq * 4, variant & 1),
              *s = guard_at(gs, ns * 4, variant & 1);
        fill_elements(keys, dtypes[slot], (int64_t)nk, 14);
        fill_elements(q, EMX_F32, (int64_t)nq, 15);
        for (int x = 0; x < d * EMXI_TILE; x++) kt[x] = 7;
        k->pack[slot](keys, stride, n, d, kt);
        for (int x = 0; x < d; x++)
          for (int j = 0; j < EMXI_TILE; j++)
            if (kt[x * EMXI_TILE + j] != (j < n ? (float)emxi_load(keys, dtypes[slot], j * stride + x) : 7))
              fail_msg("%s pack %d of d=%d n=%d", k->name, slot, d, n);
        guard_check(gt, kt, nt * 4, "pack");
        k->tile(q, ldq, rows, kt, d, s, lds);
        for (int r = 0; r < rows; r++) {
          for (int j = 0; j < EMXI_TILE; j++) { /* one fma at a time in the order of d: the bits are the same everywhere */
            float sum = 0;
            for (int x = 0; x < d; x++) sum = fmaf(q[r * ldq + x], kt[x * EMXI_TILE + j], sum);
            want[r * EMXI_TILE + j] = sum;
          }
          if (memcmp(s + r * lds, want + r * EMXI_TILE, EMXI_TILE * 4)) fail_msg("%s tile row %d of d=%d", k->name, r, d);
          if (r + 1 < rows)
            for (int64_t j = EMXI_TILE; j < lds; j++) /* the gap between rows is not written */
              if (memcmp(&s[r * lds + j], "\x5a\x5a\x5a\x5a", 4)) fail_msg("%s tile wrote between rows", k->name);
        }
        guard_check(gs, s, ns * 4, "tile");

        /* the same scores with a bias, of which the ones that are hit are stored */
        const float slope = i % 3 ? (float)i * -0.11f + 0.3f : 0, x0 = (float)(i * 9 - 70);
        float *thr = guard_at(gh, (size_t)rows * 4, variant & 1), *tile = guard_at(gs, (size_t)rows * EMXI_TILE * 4, variant & 1);
        uint64_t *hit = guard_at(gb, (size_t)rows * 8, variant & 1);
        for (int r = 0; r < rows; r++) thr[r] = r % 4 == 0 ? INFINITY : r % 4 == 1 ? -INFINITY : want[r * EMXI_TILE + r];
        k->score(q, ldq, rows, kt, d, slope, x0, thr, tile, hit);
        for (int r = 0; r < rows; r++)
          for (int j = 0; j < EMXI_TILE; j++) {
            const float v = want[r * EMXI_TILE + j], e = slope != 0 ? fmaf(-slope, fabsf(x0 - (float)r + (float)j), v) : v;
            if ((hit[r] >> j & 1) != !(e <= thr[r])) fail_msg("%s score row %d column %d of d=%d: hit", k->name, r, j, d);
            if (hit[r] >> j & 1 && memcmp(&tile[r * EMXI_TILE + j], &e, 4))
              fail_msg("%s score row %d column %d of d=%d", k->name, r, j, d);
          }
        guard_check(gs, tile, (size_t)rows * EMXI_TILE * 4, "score");
        guard_check(gb, hit, (size_t)rows * 8, "score");
      }
  guard_free(gh);
  guard_free(gb);
  guard_free(gk);
  guard_free(gt);
  guard_free(gq);
  guard_free(gs);
}

static void test_scan(void **state) {
  (void)state;
  guard g = guard_make(EMXI_TILE * 4);
  static const float slopes[] = {0, 0.5f, -0.25f}, from[] = {0, -20, -63, 1000}, thresholds[] = {-INFINITY, -3, 1, 1e9f};
  EACH_TABLE(k)
  for (int variant = 0; variant < 3 * 4 * 4; variant++) {
    const float slope = slopes[variant % 3], x0 = from[variant / 3 % 4], thr = thresholds[variant / 12];
    float *s = guard_at(g, EMXI_TILE * 4, true), expect[EMXI_TILE];
    fill_scores(s, EMXI_TILE, (uint64_t)variant + 16, variant % 5 == 0);
    uint64_t want = 0;
    for (int j = 0; j < EMXI_TILE; j++) {
      expect[j] = slope != 0 ? fmaf(-slope, fabsf(x0 + (float)j), s[j]) : s[j];
      want |= (uint64_t) !(expect[j] <= thr) << j;
    }
    assert_true(k->scan(s, slope, x0, thr) == want);
    for (int j = 0; j < EMXI_TILE; j++)
      if (s[j] != expect[j] && !(isnan(s[j]) && isnan(expect[j]))) fail_msg("%s scan: score %d", k->name, j);
  }
  guard_free(g);
}

static void test_push(void **state) {
  (void)state;
  enum { FULL = 16 + EMXI_TILE, AFTER = 5 }; /* scratch and survivors in front of what is there already */
  guard gs = guard_make(EMXI_TILE * 4), go = guard_make((FULL + AFTER) * 4), gi = guard_make((FULL + AFTER) * 4);
  EACH_TABLE(k)
  for (int variant = 0; variant < 300; variant++) {
    uint32_t words[4];
    emxi_philox(5, 6, (uint64_t)variant, words);
    uint64_t mask = (uint64_t)words[0] << 32 | words[1];
    if (variant & 1) mask &= (uint64_t)words[2] << 32 | words[3];
    if (variant % 7 == 0) mask = variant % 2 ? 0 : ~(uint64_t)0;
    if (variant % 7 == 1) mask = (uint64_t)1 << variant % 64;
    const int n = __builtin_popcountll(mask);
    const size_t room = (size_t)(16 + n + AFTER);
    float *s = guard_at(gs, EMXI_TILE * 4, variant & 1), *so = guard_at(go, room * 4, variant & 1);
    int32_t *io = guard_at(gi, room * 4, variant & 1);
    for (int j = 0; j < EMXI_TILE; j++) s[j] = (float)j;
    for (int j = 0; j < AFTER; j++) so[16 + n + j] = -1, io[16 + n + j] = -1;
    assert_int_equal(k->push(s, mask, 1000, so + 16 + n, io + 16 + n), n);
    for (int j = 0, at = 16; j < EMXI_TILE; j++)
      if (mask >> j & 1) {
        if (so[at] != (float)j || io[at] != 1000 + j) fail_msg("%s push: element %d", k->name, j);
        at++;
      }
    for (int j = 0; j < AFTER; j++) assert_true(so[16 + n + j] == -1 && io[16 + n + j] == -1);
    guard_check(go, so, room * 4, "push");
    guard_check(gi, io, room * 4, "push");
  }
  guard_free(gs);
  guard_free(go);
  guard_free(gi);
}

static void test_center(void **state) {
  (void)state;
  guard gt = guard_make(256 * EMXI_TILE * 4), gc = guard_make(256 * 4 * 3);
  EACH_TABLE(k)
  for (int i = 0; i < N_DIMS; i++)
    for (int n = 1; n <= EMXI_TILE; n += n < 18 ? 1 : 23) {
      const int d = dims[i];
      const size_t nc = (size_t)(d - 1) * 3 + 1;
      float *kt = guard_at(gt, (size_t)(d * EMXI_TILE) * 4, n & 1), *c = guard_at(gc, nc * 4, n & 1);
      fill_elements(kt, EMX_F32, d * EMXI_TILE, 22);
      const float r2 = k->center(kt, d, n, c, 3);
      double most = 0;
      for (int j = 0; j < n; j++) {
        double e = 0;
        for (int x = 0; x < d; x++) {
          double mean = 0;
          for (int l = 0; l < n; l++) mean += kt[x * EMXI_TILE + l];
          mean /= n;
          if (fabs(c[x * 3] - mean) > 64 * 0x1p-24 * 8) fail_msg("%s center %d of d=%d", k->name, x, d);
          e += pow(kt[x * EMXI_TILE + j] - (double)c[x * 3], 2);
        }
        most = fmax(most, e);
      }
      if (fabs(r2 - most) > (d + 2) * 0x1p-24 * most) fail_msg("%s radius of d=%d n=%d: %g, %g", k->name, d, n, (double)r2, most);
      guard_check(gc, c, nc * 4, "center");
      kt[d / 2 * EMXI_TILE + n / 2] = n % 2 ? NAN : -INFINITY;
      assert_true(k->center(kt, d, n, c, 3) == INFINITY);
    }
  guard_free(gt);
  guard_free(gc);
}

/* ---- support lists */

static void test_dot_list(void **state) {
  (void)state;
  enum { ROWS = 37 };
  guard gv = guard_make(ROWS * 256 * 4), gq = guard_make(256 * 4), go = guard_make(ROWS * 4), gi = guard_make(ROWS * 8);
  EACH_TABLE(k)
  for (int slot = 0; slot < EMXI_SLOTS; slot++)
    for (int i = 0; i < N_DIMS; i++)
      for (int n = 0; n <= ROWS; n += n < 10 ? 1 : 3) {
        const int d = dims[i];
        const size_t es = emx_dtype_size(dtypes[slot]);
        float *out = guard_at(go, (size_t)n * 4, n & 1), *q = guard_at(gq, (size_t)d * 4, n & 1);
        int64_t *off = guard_at(gi, (size_t)n * 8, n & 1);
        char *v = guard_at(gv, (size_t)(ROWS * d) * es, n & 1);
        fill_elements(v, dtypes[slot], ROWS * d, 17);
        fill_elements(q, EMX_F32, d, 18);
        for (int j = 0; j < n; j++) off[j] = (int64_t)((j * 7) % ROWS) * d;
        k->dot_list[slot](q, v, off, n, d, out);
        for (int j = 0; j < n; j++) {
          double sum = 0, size = 0;
          for (int x = 0; x < d; x++) {
            double term = q[x] * emxi_load(v, dtypes[slot], off[j] + x);
            sum += term;
            size += fabs(term);
          }
          if (fabs(out[j] - sum) > d * 0x1p-24 * size) fail_msg("%s dot_list %d of d=%d", k->name, slot, d);
        }
        guard_check(go, out, (size_t)n * 4, "dot_list");
        k->chain[slot](q, v, off, n, d, out);
        for (int j = 0; j < n; j++) { /* the bits of tile() */
          float sum = 0;
          for (int x = 0; x < d; x++) sum = fmaf(q[x], (float)emxi_load(v, dtypes[slot], off[j] + x), sum);
          if (memcmp(&out[j], &sum, 4)) fail_msg("%s chain %d of d=%d", k->name, slot, d);
        }
        guard_check(go, out, (size_t)n * 4, "chain");
        int32_t at[ROWS];
        for (int j = 0; j < n; j++) at[j] = j * 1000;
        k->list_bias(out, at, n, 0.37f, 2500);
        for (int j = 0; j < n; j++) {
          float sum = 0;
          for (int x = 0; x < d; x++) sum = fmaf(q[x], (float)emxi_load(v, dtypes[slot], off[j] + x), sum);
          sum = fmaf(-0.37f, fabsf((float)(at[j] - 2500)), sum);
          if (memcmp(&out[j], &sum, 4)) fail_msg("%s list_bias of d=%d", k->name, d);
        }
      }
  guard_free(gv);
  guard_free(gq);
  guard_free(go);
  guard_free(gi);
}

static void test_scatter(void **state) {
  (void)state;
  enum { ROWS = 9 };
  guard gy = guard_make(ROWS * 260 * 4), gx = guard_make(256 * 4), gw = guard_make(ROWS * 4), gi = guard_make(ROWS * 4);
  static float expect[ROWS * 260];
  EACH_TABLE(k)
  for (int i = 0; i < N_DIMS; i++)
    for (int n = 0; n <= ROWS; n++) {
      const int d = dims[i];
      const int64_t ld = d + (n & 2 ? 4 : 0);
      const size_t ny = (size_t)(ROWS - 1) * (size_t)ld + (size_t)d;
      float *y = guard_at(gy, ny * 4, n & 1), *x = guard_at(gx, (size_t)d * 4, n & 1), *w = guard_at(gw, (size_t)n * 4, n & 1);
      int32_t *idx = guard_at(gi, (size_t)n * 4, n & 1);
      fill_elements(y, EMX_F32, (int64_t)ny, 19);
      fill_elements(x, EMX_F32, d, 20);
      fill_elements(w, EMX_F32, n, 21);
      memcpy(expect, y, ny * 4);
      for (int j = 0; j < n; j++) {
        idx[j] = j * 7 % ROWS;
        for (int c = 0; c < d; c++) expect[idx[j] * ld + c] = fmaf(w[j], x[c], expect[idx[j] * ld + c]);
      }
      k->scatter(y, ld, idx, w, n, x, d);
      if (memcmp(y, expect, ny * 4)) fail_msg("%s scatter of d=%d", k->name, d);
      guard_check(gy, y, ny * 4, "scatter");
    }
  guard_free(gy);
  guard_free(gx);
  guard_free(gw);
  guard_free(gi);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_max),           cmocka_unit_test(test_keep),     cmocka_unit_test(test_sums),
      cmocka_unit_test(test_weights),       cmocka_unit_test(test_exps),     cmocka_unit_test(test_load),
      cmocka_unit_test(test_dot),           cmocka_unit_test(test_axpy),     cmocka_unit_test(test_accumulate),
      cmocka_unit_test(test_pack_and_tile), cmocka_unit_test(test_scan),     cmocka_unit_test(test_push),
      cmocka_unit_test(test_center),        cmocka_unit_test(test_dot_list), cmocka_unit_test(test_scatter)};
  for (int i = 0; emxi_table_available(i); i++) printf("kernel table: %s\n", emxi_table_available(i)->name);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
