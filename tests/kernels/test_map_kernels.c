/* The row mapping's kernels of every table against long double, bits alike where that is promised. Every array ends at a page
 * that must not be touched. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "cpu/table.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST = 1000, ARRAYS = 3 };
static char *ends[ARRAYS];
static int setup(void **state) {
  (void)state;
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (MOST * sizeof(double) + page - 1) / page * page;
  for (int i = 0; i < ARRAYS; i++) {
    char *p = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + room, page, PROT_NONE)) return 1;
    ends[i] = p + room;
  }
  return 0;
}
static float *floats(int i, int n) { return (float *)ends[i] - n; }
static const int sizes[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 500, MOST};
#define EACH_TABLE(k)                                       \
  for (int i_##k = 0; emxi_table_available(i_##k); i_##k++) \
    for (const emxi_table *k = emxi_table_available(i_##k); k; k = NULL)

/* y^b for y from 1e-17 to 1 and what is not above zero, b from 1/3 to 1e5 and below zero. */
static void test_powers(void **state) {
  (void)state;
  static const double bs[] = {1. / 3, .5, .7, 1, 1.25, 1.5, 4.2, 10, 100, 1000, 1e5, -.5, -2};
  for (size_t e = 0; e < sizeof bs / sizeof *bs; e++)
    for (size_t z = 0; z < sizeof sizes / sizeof *sizes; z++) {
      const int n = sizes[z];
      const double b = bs[e], m = 3, a = 1 / fmax(b, .3), t = -1;
      float *s = floats(0, n), *p = floats(1, n), first[MOST];
      for (int i = 0; i < n; i++) {
        uint32_t w[4];
        emxi_philox(5, (uint64_t)n, (uint64_t)i, w);
        const double y = b > 0 ? pow(10, -17 * emxi_uniform(w[0]) * (i % 3) / 2) : .01 + .99 * emxi_uniform(w[0]);
        s[i] = (float)(m + (y - 1) / a);
        if (i % 10 == 7) s[i] = -INFINITY;
        if (i % 10 == 4) s[i] = (float)(m - 2 / a);
      }
      double f0 = 0, g0 = 0;
      EACH_TABLE(k) {
        double f, g;
        long double sum = 0, slope = 0;
        k->powers(s, n, m, a, t, b, p, &f, &g);
        for (int i = 0; i < n; i++) {
          const double y = a * ((double)s[i] - m) - t;
          const long double want = y > 0 ? powl(y, b) : 0;
          /* a float's rounding, and the smallest normal one */
          if (!(fabsl(p[i] - want) <= want * (6.1e-8L + fabsl(b * logl(y > 0 ? y : 1)) * 1e-15L) + 1.2e-38L))
            fail_msg("%s: %g^%g is %.9g, want %.9Lg", k->name, y, b, p[i], want);
          sum += want;
          slope += y > 0 ? want / y : 0;
        }
        /* 3e-16 for each factor that is rounded, and |b ln y| of them where it is large: |b ln y| < 50 or the term is nothing */
        const double slack = 1e-13;
        if (!(fabsl(f - sum) <= slack * sum) || !(fabsl(g - slope) <= slack * slope))
          fail_msg("%s b %g n %d: sums %.17g %.17g, want %.17Lg %.17Lg", k->name, b, n, f, g, sum, slope);
        if (i_k == 0) {
          f0 = f, g0 = g;
          memcpy(first, p, (size_t)n * 4);
        }
        assert_true(f == f0 && g == g0 && !memcmp(first, p, (size_t)n * 4));
        k->powers(s, n, m, a, t, b, NULL, &f, &g);
        assert_true(f == f0 && g == g0);
        memcpy(p, s, (size_t)n * 4);
        k->powers(p, n, m, a, t, b, p, NULL, NULL); /* in place */
        assert_memory_equal(first, p, (size_t)n * 4);
      }
    }
}

static void test_pair_sums_and_spread(void **state) {
  (void)state;
  for (size_t z = 0; z < sizeof sizes / sizeof *sizes; z++) EACH_TABLE(k) {
      const int n = sizes[z];
      float *u = floats(0, n), *g = floats(1, n), *out = floats(2, n);
      emxi_normals(1, (uint64_t)n, u, n);
      emxi_normals(2, (uint64_t)n, g, n);
      long double su = 0, sug = 0, size = 0;
      for (int i = 0; i < n; i++) {
        u[i] = i % 3 ? fabsf(u[i]) : 0;
        if (i % 6 == 0) g[i] = i % 12 ? NAN : INFINITY; /* beside a zero */
        if (!u[i]) continue;
        su += u[i];
        sug += (long double)u[i] * g[i];
        size += fabsl((long double)u[i] * g[i]);
      }
      double a, b;
      k->pair_sums(u, g, n, &a, &b);
      assert_true(fabsl(a - su) <= 1e-13L * su && fabsl(b - sug) <= 1e-13L * size); /* 1e-16 for each of n terms */
      k->spread(u, g, n, .125, out);
      for (int i = 0; i < n; i++) assert_true(out[i] == (u[i] ? (float)((double)u[i] * ((double)g[i] - .125)) : 0));
      emxi_normals(2, (uint64_t)n, g, n);
      k->spread(u, g, n, 0, u); /* in place */
      for (int i = 0; i < n; i++) assert_true(i % 3 == 0 ? u[i] == 0 : isfinite(u[i]));
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_powers), cmocka_unit_test(test_pair_sums_and_spread)};
  return cmocka_run_group_tests(tests, setup, NULL);
}
