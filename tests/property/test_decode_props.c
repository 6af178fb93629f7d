/* What selections and reports claim, against the truth in float64: dropped mass, certificates, error bounds, lists. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "cpu/kv_kernels.h"
#include "decode_case.h"
#include "one_context.h"

/* Summaries of one page over its first `tokens` tokens. */
static void summarize(emx_kv *kv, int32_t page, int32_t tokens) {
  const int64_t one = 1;
  const emx_tensor tp = emx_tensor_view(&page, EMX_I32, 1, &one), tn = emx_tensor_view(&tokens, EMX_I32, 1, &one);
  CASE_OK(emx_kv_summarize(ctx, kv, &tp, &tn));
}

/* Scratch of the truth about one row. */
typedef struct truth {
  double *s, *p, *s2, *p2;
  uint8_t *read;
  float *dense; /* output of ALL, [rows, D] */
  double certified, rows, delta_sum, bound_sum;
} truth;
static void truth_open(truth *t, const decode_case *c) {
  const size_t n = sizeof(double) * (size_t)(c->max_len + 1);
  *t = (truth){case_take(n),
               case_take(n),
               case_take(n),
               case_take(n),
               case_take((size_t)c->max_len / 16 + 2),
               case_take(sizeof(float) * (size_t)(c->B * c->H * c->D)),
               0,
               0,
               0,
               0};
}
static void truth_close(truth *t) { free(t->s), free(t->p), free(t->s2), free(t->p2), free(t->read), free(t->dense); }

static double diameter_of_values(const decode_case *c, int b, int g) { /* at most 2 max ||v|| */
  double far = 0;
  for (int64_t j = 0; j < c->len[b]; j++) {
    double n2 = 0;
    for (int d = 0; d < c->D; d++) n2 += (double)case_value(c, b, g, j)[d] * (double)case_value(c, b, g, j)[d];
    far = fmax(far, sqrt(n2));
  }
  return 2 * far;
}

/* One decode with the given selector; every claim of every row is checked. Page lists come from emx_select, or are already in c
 * for PAGES. */
static void check_claims(decode_case *c, const emx_select_desc *select, truth *t) {
  if (select->kind != EMX_SELECT_PAGES) CASE_OK(case_select(c, select));
  CASE_OK(case_decode(c, select));
  const double a = c->alpha - 1, unit = c->alpha == 1 ? 1 : a;
  for (int b = 0; b < c->B; b++)
    for (int h = 0; h < c->H; h++) {
      const int64_t row = case_row(c, b, h, 0), n = c->len[b], pages = (n + c->P - 1) / c->P;
      const emx_report *r = &c->reports[row];
      const int32_t *list = c->pages + row * c->tp.shape[3];
      memset(t->read, 0, (size_t)pages + 1);
      int64_t tokens = 0;
      for (int32_t i = 0; i < c->n_pages[row]; i++) {
        assert_true(list[i] >= 0 && list[i] < pages && (!i || list[i] > list[i - 1]));
        t->read[list[i]] = 1;
        tokens += n - list[i] * c->P < c->P ? n - list[i] * c->P : c->P;
      }
      if (select->kind != EMX_SELECT_PAGES) {
        assert_true(t->read[pages - 1]); /* the newest page */
        for (int64_t i = c->n_pages[row]; i < c->tp.shape[3]; i++) assert_int_equal(list[i], -1);
        assert_true(c->bound[row] == r->max_unread || (isnan(c->bound[row]) && isnan(r->max_unread)));
      }
      assert_true(r->tokens == tokens && r->pages == c->n_pages[row]);

      double o[256], o2[256];
      int64_t support = 0, support2 = 0;
      const double tau = case_reference(c, b, h, 0, NULL, t->s, t->p, o, &support);
      double dropped = 0, top_unread = -INFINITY, size = 1;
      for (int64_t j = 0; j < n; j++) {
        size = fmax(size, fabs(t->s[j]));
        if (t->read[j / c->P]) continue;
        dropped += t->p[j];
        top_unread = fmax(top_unread, t->s[j]);
      }
      t->rows++;
      t->delta_sum += dropped;
      t->bound_sum += r->delta_bound;
      /* soundness: no tolerance but the oracle's own double rounding */
      if (!((double)r->delta_bound >= dropped * (1 - 1e-9) - 1e-13))
        fail_msg("kind %d alpha %g data %d: delta_bound %.9g below the truth %.9g", select->kind, c->alpha, c->data,
                 r->delta_bound, dropped);
      if (!((double)r->max_unread >= unit * top_unread))
        fail_msg("kind %d alpha %g data %d: max_unread %.9g below the truth %.9g", select->kind, c->alpha, c->data, r->max_unread,
                 unit * top_unread);
      assert_true(r->delta_bound <= 1);
      if (r->flags & EMX_REPORT_CERTIFIED) {
        t->certified++;
        assert_true(r->delta_bound == 0 && dropped <= 1e-13 && select->tau_mode == EMX_TAU_EXACT);
        if (c->alpha == 1) assert_true(tokens == n);
        for (int d = 0; d < c->D; d++) { /* certified means: the same bits as ALL */
          const float got = (float)case_out(c, b, h, 0, d);
          if (memcmp(&got, &t->dense[row * c->D + d], 4))
            fail_msg("certified, but %.9g is not %.9g", got, t->dense[row * c->D + d]);
        }
      }
      if (select->tau_mode != EMX_TAU_EXACT) continue;
      /* the answer for what was read */
      const double tau2 = case_reference(c, b, h, 0, t->read, t->s2, t->p2, o2, &support2);
      double error = 0;
      for (int d = 0; d < c->D; d++) {
        const double got = case_out(c, b, h, 0, d);
        if (!(fabs(got - o2[d]) <= case_tolerance(c, size)))
          fail_msg("kind %d alpha %g data %d d %d: %g, on the selected tokens %g", select->kind, c->alpha, c->data, d, got,
                   o2[d]);
        error += (got - o[d]) * (got - o[d]);
      }
      if (c->alpha > 1 && tokens) {
        assert_true(fabs((double)r->tau - tau2) <= 1e-5 * size);
        assert_true(tau2 <= tau + 1e-9 * size); /* T1 */
      }
      /* T4 */
      if (tokens)
        assert_true(sqrt(error) <= (double)r->delta_bound * diameter_of_values(c, b, h / (c->H / c->G)) +
                                       5 * case_tolerance(c, size) * sqrt(c->D));
    }
}
static void dense_first(decode_case *c, truth *t) {
  emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
  truth_open(t, c);
  CASE_OK(case_decode(c, &all));
  for (int b = 0; b < c->B; b++)
    for (int h = 0; h < c->H; h++)
      for (int d = 0; d < c->D; d++) t->dense[case_row(c, b, h, 0) * c->D + d] = (float)case_out(c, b, h, 0, d);
}

static const double alphas[] = {1.5, 1, 2, 1.25, 4. / 3, 1.75, 2.5, 1.05, 4, 1.5};
static const int32_t dims[] = {16, 32, 64, 80, 96, 128, 256}, dtypes[] = {EMX_F32, EMX_F16, EMX_BF16}, sizes[] = {16, 32, 64};

static decode_case variant(int i) {
  return (decode_case){.B = 2,
                       .G = 1 + i % 2,
                       .H = (1 + i % 2) * (1 + i / 3 % 4),
                       .D = dims[i % 7],
                       .P = sizes[i / 2 % 3],
                       .dtype = dtypes[i % 3],
                       .layout = i / 5 % 2,
                       .len = {i % 4 ? 700 : 512, 97 + i},
                       .alpha = alphas[i % 10],
                       .alibi = i % 3 == 2,
                       .data = i % DATA_KINDS,
                       .seed = (uint64_t)(1000 + i)};
}

static void test_claims(void **state) {
  (void)state;
  double certified = 0, rows = 0;
  for (int i = 0; i < 80; i++) {
    decode_case c = variant(i);
    truth t;
    case_open(&c, ctx);
    dense_first(&c, &t);
    emx_select_desc s = case_desc(EMX_SELECT_TOPK, 0);
    for (int k = 0; k < 3; k++) {
      s.budget = k == 0 ? 0 : k == 1 ? 180 : 5000;
      check_claims(&c, &s, &t);
    }
    for (int mode = 0; c.alpha > 1 && mode < 3; mode++) {
      s = case_desc(EMX_SELECT_GAUSSIAN, 0);
      s.tau_mode = mode;
      s.max_quantile = i % 2 ? .995f : .9f;
      check_claims(&c, &s, &t);
    }
    /* lists of somebody else: pages at random, the newest one or not, nothing at all */
    for (int k = 0; k < 3; k++) {
      uint32_t w[4];
      for (int b = 0; b < c.B; b++)
        for (int h = 0; h < c.H; h++) {
          const int64_t row = case_row(&c, b, h, 0), pages = (c.len[b] + c.P - 1) / c.P;
          c.n_pages[row] = 0;
          for (int64_t p = 0; p < pages; p++) {
            emxi_philox(9, (uint64_t)(i * 100 + k * 10 + h), (uint64_t)(p + b * 1000), w);
            if (k == 0 ? w[0] % 2 : k == 1 ? w[0] % 4 || p == pages - 1 : 0)
              c.pages[row * c.tp.shape[3] + c.n_pages[row]++] = (int32_t)p;
          }
        }
      s = case_desc(EMX_SELECT_PAGES, 0);
      check_claims(&c, &s, &t);
    }
    certified += t.certified;
    rows += t.rows;
    truth_close(&t);
    case_close(&c);
  }
  assert_true(certified > 0.1 * rows); /* certificates that never fire would pass everything above */
}

/* Only MOMENTS, only MINMAX, nothing: what a foreign list is told. */
static void test_claims_by_summary(void **state) {
  (void)state;
  static const int32_t kinds[] = {EMX_SUMMARY_MOMENTS, EMX_SUMMARY_MINMAX, -1};
  for (int i = 0; i < 9; i++) {
    decode_case c = {.B = 1,
                     .G = 1,
                     .H = 2,
                     .D = 64,
                     .dtype = EMX_BF16,
                     .len = {900},
                     .summaries = kinds[i / 3],
                     .seed = (uint64_t)i,
                     .data = i % 3 == 0   ? DATA_AR
                             : i % 3 == 1 ? DATA_TOPIC
                                          : DATA_NEEDLE,
                     .scale = .5f};
    truth t;
    case_open(&c, ctx);
    dense_first(&c, &t);
    for (int h = 0; h < 2; h++) { /* the pages that matter, and no other */
      case_scores(&c, 0, h, 0, NULL, t.s);
      emxi_oracle_entmax(t.s, 900, c.alpha, t.p, NULL);
      c.n_pages[h] = 0;
      for (int64_t p = 0; p < 57; p++) {
        bool support = p == 56;
        for (int64_t j = p * 16; j < p * 16 + 16 && j < 900; j++) support |= t.p[j] > 0;
        if (support) c.pages[h * c.tp.shape[3] + c.n_pages[h]++] = (int32_t)p;
      }
    }
    emx_select_desc s = case_desc(EMX_SELECT_PAGES, 0);
    check_claims(&c, &s, &t);
    for (int h = 0; h < 2; h++) {
      if (kinds[i / 3] < 0) assert_true(c.reports[h].delta_bound == 1 && c.reports[h].max_unread == INFINITY);
      if (kinds[i / 3] > 0) assert_true(c.reports[h].bytes_meta > 0);
    }
    truth_close(&t);
    case_close(&c);
  }
}

/* TOPK reads the pages with the best boxes (in float64; pages within rounding of the last may go either way), the newest one, and
 * no more than its budget. */
static void test_topk_choice(void **state) {
  (void)state;
  for (int i = 0; i < 12; i++) {
    decode_case c = {.B = 1,
                     .G = 2,
                     .H = 4,
                     .D = 80,
                     .P = sizes[i % 3],
                     .dtype = dtypes[i % 3],
                     .len = {1000 + i},
                     .alpha = alphas[i % 10],
                     .alibi = i % 2,
                     .data = i % DATA_KINDS,
                     .seed = (uint64_t)i};
    case_open(&c, ctx);
    const int64_t n = c.len[0], pages = (n + c.P - 1) / c.P, want = 3 + i;
    emx_select_desc s = case_desc(EMX_SELECT_TOPK, want * c.P + c.P / 2);
    CASE_OK(case_select(&c, &s));
    for (int h = 0; h < 4; h++) {
      assert_int_equal(c.n_pages[h], want < pages ? want : pages);
      double box[80], last = INFINITY;
      for (int64_t p = 0; p < pages - 1; p++) {
        box[p] = 0;
        for (int d = 0; d < c.D; d++) {
          double best = -INFINITY;
          for (int64_t j = p * c.P; j < (p + 1) * c.P; j++)
            best = fmax(best, (double)c.q[h * c.D + d] * (double)case_key(&c, 0, h / 2, j)[d]);
          box[p] += best / sqrt(80);
        }
        const double slope = (double)c.slopes[h];
        box[p] += fmax(slope * (double)(p * c.P - n + 1), slope * (double)((p + 1) * c.P - n));
      }
      for (int32_t k = 0; k + 1 < c.n_pages[h]; k++) last = fmin(last, box[c.pages[h * c.tp.shape[3] + k]]);
      for (int64_t p = 0, k = 0; p < pages - 1; p++) {
        const bool read = c.pages[h * c.tp.shape[3] + k] == p;
        k += read;
        if (!read) assert_true(box[p] <= last + 1e-4 * fmax(1, fabs(last)));
      }
    }
    case_close(&c);
  }
  /* equal pages: the first ones */
  decode_case c = {.D = 16, .len = {160}, .data = DATA_EQUAL};
  case_open(&c, ctx);
  emx_select_desc s = case_desc(EMX_SELECT_TOPK, 64);
  CASE_OK(case_select(&c, &s));
  assert_true(c.n_pages[0] == 4 && c.pages[0] == 0 && c.pages[1] == 1 && c.pages[2] == 2 && c.pages[3] == 9);
  case_close(&c);
}

/* E[(m + s Z)_+^b] by Simpson's rule on z: independent of the closed forms, the recurrence and the substitution. */
static double moment(double m, double s, double b) {
  if (s == 0) return m > 0 ? pow(m, b) : 0;
  const double from = fmax(-m / s, -12), to = 12;
  if (from >= to) return 0;
  const int n = 4000;
  double sum = 0;
  for (int i = 0; i <= n; i++) {
    const double z = from + (to - from) * i / n, y = m + s * z;
    sum += (i == 0 || i == n ? 1 : i % 2 ? 4 : 2) * (y > 0 ? pow(y, b) : 0) * exp(-.5 * z * z);
  }
  return sum * (to - from) / n / 3 * 0.3989422804014327;
}

/* GAUSSIAN re-derived: page means and spreads from the stored keys, the threshold's defining equation, the selection rule. */
static void test_gaussian_rule(void **state) {
  (void)state;
  for (int i = 0; i < 16; i++) {
    decode_case c = {.B = 1,
                     .G = 1,
                     .H = 3,
                     .D = 32,
                     .P = sizes[i % 3],
                     .dtype = dtypes[i % 3],
                     .len = {600 + i * 3},
                     .alpha = alphas[i % 8],
                     .alibi = i % 2,
                     .data = i % 5,
                     .seed = (uint64_t)i};
    if (c.alpha == 1) c.alpha = 1.5;
    case_open(&c, ctx);
    emx_select_desc s = case_desc(EMX_SELECT_GAUSSIAN, 0);
    s.safety_margin = i % 3 ? 0 : .3f;
    s.tau_mode = EMX_TAU_FIXED;
    CASE_OK(case_select(&c, &s));
    CASE_OK(case_decode(&c, &s));
    const double a = c.alpha - 1, beta = 1 / a;
    const int64_t n = c.len[0], M = (n + c.P - 1) / c.P - 1;
    double zlo = -10, zhi = 10; /* quantile of the maximum of P normals */
    for (int k = 0; k < 100; k++) {
      const double mid = .5 * (zlo + zhi);
      if (pow(.5 * erfc(-mid / sqrt(2)), c.P) < (double)s.max_quantile)
        zlo = mid;
      else
        zhi = mid;
    }
    for (int h = 0; h < 3; h++) {
      double mu[64], sigma[64], mean = 0, var = 0, upper = 0, vm = 0;
      for (int64_t p = 0; p < M; p++) {
        double v = 0;
        mu[p] = 0;
        for (int d = 0; d < c.D; d++) {
          double sum = 0, sq = 0;
          const double q = (double)c.q[h * c.D + d] / sqrt(c.D);
          for (int64_t j = p * c.P; j < (p + 1) * c.P; j++) sum += (double)case_key(&c, 0, 0, j)[d];
          for (int64_t j = p * c.P; j < (p + 1) * c.P; j++) sq += pow((double)case_key(&c, 0, 0, j)[d] - sum / c.P, 2);
          mu[p] += q * sum / c.P;
          v += q * q * sq / c.P;
        }
        mu[p] += (double)c.slopes[h] * ((double)(p * c.P) + .5 * (c.P - 1) - (double)(n - 1));
        sigma[p] = sqrt(v);
        mean += mu[p] / (double)M;
        var += v / (double)M;
        upper += (mu[p] + 1.5 * sigma[p]) / (double)M;
      }
      for (int64_t p = 0; p < M; p++) vm += (mu[p] - mean) * (mu[p] - mean) / (double)M;
      const double spread = sqrt(var + vm), tau = (double)c.reports[h].tau;
      /* the threshold solves its equation: the sum is 1 within what an error of 1e-4 in a score means */
      double mass[2];
      for (int side = 0; side < 2; side++) {
        const double at = tau + (side ? 1e-4 : -1e-4) * fmax(1, fabs(tau));
        mass[side] = 0;
        if (c.slopes[h] == 0)
          mass[side] = (double)(M * c.P) * moment(a * mean - at, a * spread, beta);
        else
          for (int64_t p = 0; p < M; p++) mass[side] += c.P * moment(a * mu[p] - at, a * sigma[p], beta);
      }
      if (!(mass[0] >= 1 - 1e-6 && mass[1] <= 1 + 1e-6))
        fail_msg("case %d head %d alpha %g: masses around tau %g are %g and %g", i, h, c.alpha, tau, mass[0], mass[1]);
      const double margin = fmax((double)s.safety_margin * spread, .1 * fmax(tau / a - upper, 0)), floor = tau - a * margin;
      for (int64_t p = 0, k = 0; p < M; p++) {
        const bool read = k < c.n_pages[h] && c.pages[h * c.tp.shape[3] + k] == p;
        k += read;
        const double z = a * (mu[p] + zlo * sigma[p]);
        if (fabs(z - floor) > 1e-3 * fmax(1, fabs(floor))) assert_int_equal(read, z > floor);
      }
    }
    case_close(&c);
  }
}

/* Pages without spread whose means are close (the reference's bracket fails there): all pages of the support are selected. */
static void test_gaussian_without_spread(void **state) {
  (void)state;
  for (int alibi = 0; alibi < 2; alibi++) {
    decode_case c = {.D = 16, .len = {25 * 16}, .data = DATA_EQUAL, .scale = 1, .alibi = false};
    case_open(&c, ctx);
    emx_tensor k, v;
    CASE_OK(emx_kv_pool_view(c.kv, &k, &v));
    const int32_t *pages;
    int64_t n;
    CASE_OK(emx_seq_block_table(c.kv, c.seqs[0], &pages, &n));
    memset(c.q_data, 0, sizeof(float) * 16);
    *(float *)c.q_data = 1;
    for (int64_t p = 0; p < 25; p++) {
      for (int t = 0; t < 16; t++) {
        float *key = (float *)k.data + pages[p] * k.stride[0] + t * k.stride[2];
        memset(key, 0, sizeof(float) * 16);
        key[0] = p < 4 ? 2 - .1f * (float)p : 1;
      }
    }
    for (int p = 0; p < 25; p++) summarize(c.kv, pages[p], 16);
    float slope = 1e-12f; /* takes the mixture */
    int64_t one = 1;
    emx_tensor ts = emx_tensor_view(&slope, EMX_F32, 1, &one);
    if (alibi) c.io.alibi_slopes = &ts;
    emx_select_desc s = case_desc(EMX_SELECT_GAUSSIAN, 0);
    CASE_OK(case_select(&c, &s));
    for (int32_t p = 0; p < 4; p++) assert_int_equal(c.pages[p], p);
    if (alibi) { /* the reference's number for this case */
      s.tau_mode = EMX_TAU_FIXED;
      CASE_OK(case_decode(&c, &s));
      assert_true(fabs(c.reports[0].tau - .8132) < 1e-3);
    }
    case_close(&c);
  }
}

/* CORRECTED stays within [m-1, m] and converges to EXACT; FIXED says what its weights sum to, and they are what the formula
 * says. */
static void test_tau_modes(void **state) {
  (void)state;
  for (int i = 0; i < 8; i++) {
    decode_case c = {
        .B = 1, .G = 1, .H = 2, .D = 64, .len = {1500}, .alpha = alphas[i], .alibi = i % 2, .data = i % 3, .seed = (uint64_t)i};
    if (c.alpha == 1) c.alpha = 1.5;
    truth t;
    case_open(&c, ctx);
    dense_first(&c, &t);
    emx_select_desc s = case_desc(EMX_SELECT_GAUSSIAN, 0);
    CASE_OK(case_decode(&c, &s));
    float exact[2] = {c.reports[0].tau, c.reports[1].tau};
    double error = 0;
    for (int steps = 0; steps <= 60; steps += 60) {
      s.tau_mode = EMX_TAU_CORRECTED;
      s.tau_steps = steps; /* 0: three */
      CASE_OK(case_decode(&c, &s));
      for (int h = 0; h < 2; h++) {
        error = fabs((double)(c.reports[h].tau - exact[h]));
        if (!(error <= (steps ? 1e-6 : 1) && (steps == 0 || fabs((double)c.reports[h].mass - 1) < 1e-4)))
          fail_msg("case %d head %d steps %d: tau %.9g, exact %.9g, mass %.9g", i, h, steps, c.reports[h].tau, exact[h],
                   c.reports[h].mass);
        assert_false(c.reports[h].flags & EMX_REPORT_CERTIFIED);
      }
    }
    s.tau_mode = EMX_TAU_FIXED;
    check_claims(&c, &s, &t);
    for (int h = 0; h < 2; h++) {
      memset(t.read, 0, 1500 / 16 + 1);
      for (int32_t k = 0; k < c.n_pages[h]; k++) t.read[c.pages[h * c.tp.shape[3] + k]] = 1;
      case_scores(&c, 0, h, 0, t.read, t.s);
      double mass = 0, o[64] = {0};
      for (int64_t j = 0; j < 1500; j++) {
        const double y = (c.alpha - 1) * t.s[j] - (double)c.reports[h].tau, w = y > 0 ? pow(y, 1 / (c.alpha - 1)) : 0;
        mass += w;
        for (int d = 0; d < 64; d++) o[d] += w * (double)case_value(&c, 0, 0, j)[d];
      }
      assert_true(fabs((double)c.reports[h].mass - mass) <= 2e-4 * fmax(1, mass));
      for (int d = 0; d < 64; d++) assert_true(fabs(case_out(&c, 0, h, 0, d) - o[d]) <= 5e-4 * fmax(1, mass));
    }
    truth_close(&t);
    case_close(&c);
  }
}

/* At the same budget on the same data, entmax drops less of its mass than softmax does. */
static void test_entmax_drops_less(void **state) {
  (void)state;
  double dropped[2];
  for (int a = 0; a < 2; a++) {
    dropped[a] = 0;
    for (int seed = 0; seed < 3; seed++) {
      decode_case c = {.B = 1, .G = 1, .H = 8, .D = 64, .len = {4096}, .alpha = a ? 1.5 : 1, .seed = (uint64_t)seed};
      truth t;
      case_open(&c, ctx);
      dense_first(&c, &t);
      emx_select_desc s = case_desc(EMX_SELECT_TOPK, 1024);
      check_claims(&c, &s, &t);
      dropped[a] += t.delta_sum / t.rows / 3;
      truth_close(&t);
      case_close(&c);
    }
  }
  assert_true(dropped[1] < dropped[0] && dropped[0] > .3);
}

/* Pages that no bound may judge are read whatever the budget: non-finite keys, and pages whose summaries are not of all their
 * tokens. */
static void test_always_read(void **state) {
  (void)state;
  for (int kind = 0; kind < 2; kind++)
    for (int a = 0; a < 2; a++) {
      decode_case c = {.B = 1, .G = 2, .H = 4, .D = 32, .len = {400}, .alpha = a || kind ? 1.5 : 1, .alibi = a, .seed = 4};
      case_open(&c, ctx);
      emx_tensor k, v;
      const int32_t *pages;
      int64_t n;
      CASE_OK(emx_kv_pool_view(c.kv, &k, &v));
      CASE_OK(emx_seq_block_table(c.kv, c.seqs[0], &pages, &n));
      ((float *)k.data)[pages[3] * k.stride[0] + k.stride[1] + 5 * k.stride[2] + 7] = NAN; /* KV head 1 */
      summarize(c.kv, pages[3], 16);
      summarize(c.kv, pages[6], 8);
      emx_select_desc s = case_desc(kind ? EMX_SELECT_GAUSSIAN : EMX_SELECT_TOPK, 16);
      CASE_OK(case_select(&c, &s));
      CASE_OK(case_decode(&c, &s));
      for (int h = 0; h < 4; h++) {
        bool three = false, six = false;
        for (int32_t i = 0; i < c.n_pages[h]; i++) {
          three |= c.pages[h * c.tp.shape[3] + i] == 3;
          six |= c.pages[h * c.tp.shape[3] + i] == 6;
        }
        assert_true(six && (three || h < 2));
        assert_int_equal(isnan(case_out(&c, 0, h, 0, 0)) != 0, h >= 2);
        assert_int_equal((c.reports[h].flags & EMX_REPORT_NONFINITE) != 0, h >= 2);
        if (!kind) assert_int_equal(c.n_pages[h], h < 2 ? 2 : 3);
      }
      case_close(&c);
    }
}

/* The score that was read is computed too high by cancellation, the unread one lies between the true and the computed threshold:
 * a certificate that trusted computed scores would be wrong. */
static void test_certificate_covers_rounding(void **state) {
  (void)state;
  int tried = 0;
  for (int seed = 0; seed < 60 && tried < 5; seed++) {
    decode_case c = {.D = 256, .len = {17}, .scale = 1, .seed = (uint64_t)seed};
    truth t;
    case_open(&c, ctx);
    truth_open(&t, &c);
    emx_tensor k, v;
    CASE_OK(emx_kv_pool_view(c.kv, &k, &v));
    const int32_t *pages;
    int64_t n;
    CASE_OK(emx_seq_block_table(c.kv, c.seqs[0], &pages, &n));
    float *last = case_key(&c, 0, 0, 16);
    double rest = 0, exact = 0;
    c.q[0] = 1;
    for (int d = 1; d < 256; d++) rest += (double)c.q[d] * (double)(last[d] *= 1000);
    last[0] = (float)-rest; /* large terms, a sum near zero: the unread score is small and so is its own slack */
    memcpy(c.q_data, c.q, sizeof(float) * 256);
    memcpy((float *)k.data + pages[1] * k.stride[0], last, sizeof(float) * 256);
    for (int d = 0; d < 256; d++) exact += (double)c.q[d] * (double)case_key(&c, 0, 0, 16)[d];
    float far = (float)(exact - 1e6);
    for (int turn = 0; turn < 2; turn++) {
      for (int64_t j = 0; j < 16; j++)
        for (int d = 0; d < 256; d++) {
          case_key(&c, 0, 0, j)[d] = d ? 0 : far;
          ((float *)k.data)[pages[0] * k.stride[0] + j * k.stride[2] + d] = d ? 0 : far;
        }
      summarize(c.kv, pages[0], 16);
      summarize(c.kv, pages[1], 1);
      emx_select_desc s = case_desc(EMX_SELECT_PAGES, 0);
      c.pages[0] = 1;
      c.n_pages[0] = 1;
      CASE_OK(case_decode(&c, &s));
      const double computed = ((double)c.reports[0].tau + 1) / .5;
      if (turn == 0) {
        assert_true(c.reports[0].flags & EMX_REPORT_CERTIFIED); /* a million below */
        far = (float)(.5 * (exact + computed) - 2);
        if (!(computed > exact && (double)far - (exact - 2) > 1e-4 && (computed - 2) - (double)far > 1e-4)) break;
        continue;
      }
      tried++;
      assert_false(c.reports[0].flags & EMX_REPORT_CERTIFIED);
      double o[256], dropped = 0;
      case_reference(&c, 0, 0, 0, NULL, t.s, t.p, o, NULL);
      for (int j = 0; j < 16; j++) dropped += t.p[j];
      assert_true(dropped > 0 && (double)c.reports[0].delta_bound >= dropped);
    }
    truth_close(&t);
    case_close(&c);
  }
  assert_true(tried >= 3);
}

/* A head's result does not depend on its siblings: groups of four against the same heads alone, and other rows of the batch. */
static void test_siblings(void **state) {
  (void)state;
  for (int i = 0; i < 6; i++) {
    decode_case c = {
        .B = 2, .G = 1, .H = 4, .D = 64, .dtype = EMX_BF16, .len = {800, 300}, .alpha = i % 2 ? 1.5 : 1, .seed = (uint64_t)i};
    if (i >= 4) c.alpha = 4. / 3;
    case_open(&c, ctx);
    emx_select_desc s = case_desc(i == 4 ? EMX_SELECT_GAUSSIAN : EMX_SELECT_TOPK, 250);
    CASE_OK(case_decode(&c, &s));
    float together[8 * 64];
    for (int r = 0; r < 8; r++)
      for (int d = 0; d < 64; d++) together[r * 64 + d] = (float)case_out(&c, r / 4, r % 4, 0, d);
    emx_report reports[8];
    memcpy(reports, c.reports, sizeof reports);
    for (int r = 0; r < 8; r++) {
      int64_t shape[4] = {1, 1, 1, 64};
      emx_tensor q = emx_tensor_view((float *)c.q_data + r * 64, EMX_F32, 4, shape);
      float o[64];
      emx_tensor to = emx_tensor_view(o, EMX_F32, 4, shape);
      emx_decode_io io = c.io;
      emx_report rep;
      io.q = &q;
      io.o = &to;
      io.pages = NULL;
      io.reports = &rep;
      emx_kv_batch b = c.batch;
      b.batch = 1;
      b.seqs = &c.seqs[r / 4];
      CASE_OK(emx_decode(ctx, c.kv, &b, &s, &io, c.workspace, c.workspace_bytes));
      assert_memory_equal(o, together + r * 64, sizeof o);
      assert_memory_equal(&rep, &reports[r], sizeof rep);
    }
    case_close(&c);
  }
}

/* More candidates never lower tau. */
static void test_tau_is_monotone(void **state) {
  (void)state;
  for (int i = 0; i < 5; i++) {
    decode_case c = {.D = 32, .len = {600}, .alpha = alphas[i] == 1 ? 3 : alphas[i], .seed = (uint64_t)i, .data = i % 2};
    case_open(&c, ctx);
    emx_select_desc s = case_desc(EMX_SELECT_PAGES, 0);
    float last = -INFINITY;
    for (int32_t n = 1; n <= 38; n++) { /* every second page, then the others from the left */
      c.n_pages[0] = 0;
      for (int32_t p = 0; p < 38; p++)
        if (p % 2 ? p / 2 < n - 19 : p / 2 < n) c.pages[c.n_pages[0]++] = p;
      CASE_OK(case_decode(&c, &s));
      assert_true(c.reports[0].tau >= last);
      last = c.reports[0].tau;
    }
    case_close(&c);
  }
}

/* Every kernel table on this CPU gives the scalar table's answers. */
static void test_tables_agree(void **state) {
  (void)state;
  emx_ctx *own;
  CASE_OK(emx_ctx_create(NULL, &own));
  for (int i = 0; i < 14; i++) {
    decode_case base = variant(i);
    float *want = NULL;
    emx_report *reports = NULL;
    for (int isa = 0;; isa++) {
      const emxi_table *table = isa ? emxi_table_available(isa - 1) : &emxi_table_scalar;
      if (!table) break;
      emxi_cpu_of(own)->k = table;
      decode_case c = base;
      case_open(&c, own);
      const size_t rows = (size_t)(c.B * c.H);
      emx_select_desc s = case_desc(EMX_SELECT_TOPK, 150);
      CASE_OK(case_decode(&c, &s));
      if (!isa) {
        want = case_take(rows * (size_t)c.D * sizeof(float));
        reports = case_take(rows * sizeof *reports);
        memcpy(reports, c.reports, rows * sizeof *reports);
      }
      for (size_t r = 0; r < rows; r++)
        for (int d = 0; d < c.D; d++) {
          float *w = &want[r * (size_t)c.D + (size_t)d];
          const float got = (float)case_out(&c, (int)r / c.H, (int)r % c.H, 0, d);
          if (!isa) *w = got;
          /* the same pages unless two boxes tie within rounding, which random data does not do */
          assert_true(reports[r].tokens == c.reports[r].tokens);
          const float size = fmaxf(1, fabsf(reports[r].tau));
          if (c.data != DATA_EQUAL && !(fabsf(got - *w) <= 4e-5f * size)) fail_msg("%s: %g, scalar %g", table->name, got, *w);
        }
      case_close(&c);
    }
    free(want);
    free(reports);
  }
  emx_ctx_destroy(own);
}

/* Kernels over summaries: the running ones bit for bit, the sums within rounding of float64. */
static void test_kernels(void **state) {
  (void)state;
  for (int d = 16; d <= 256; d += 15) {
    float x[256], lo[2][256], hi[2][256], mean[2][256], m2[2][256], q[256];
    uint16_t half[2][256];
    emxi_normals(1, 2, q, 256);
    for (int isa = 0; emxi_table_available(isa); isa++) {
      const emxi_kv_kernels *kernels[2] = {emxi_table_scalar.kv, emxi_table_available(isa)->kv};
      for (int v = 0; v < 2; v++) {
        for (int i = 0; i < d; i++) lo[v][i] = INFINITY, hi[v][i] = -INFINITY, mean[v][i] = m2[v][i] = 0;
        for (int n = 1; n <= 16; n++) {
          emxi_normals(5, (uint64_t)n, x, d);
          if (n % 5 == 0) x[n] = n % 2 ? -0.0f : 0.0f;
          assert_false(kernels[v]->fold(x, d, 1.0f / (float)n, lo[v], hi[v], mean[v], m2[v]));
        }
      }
      assert_memory_equal(lo[0], lo[1], sizeof(float) * (size_t)d);
      assert_memory_equal(hi[0], hi[1], sizeof(float) * (size_t)d);
      assert_memory_equal(mean[0], mean[1], sizeof(float) * (size_t)d);
      assert_memory_equal(m2[0], m2[1], sizeof(float) * (size_t)d);
      x[d - 1] = isa % 2 ? NAN : INFINITY;
      assert_true(kernels[1]->fold(x, d, 1, lo[1], hi[1], mean[1], m2[1]));
      for (int type = 0; type < 3; type++) {
        const int32_t dtype = dtypes[type];
        const void *pl = dtype == EMX_F32 ? (void *)lo[0] : (void *)half[0],
                   *ph = dtype == EMX_F32 ? (void *)hi[0] : (void *)half[1];
        if (dtype != EMX_F32)
          for (int i = 0; i < d; i++)
            emxi_store(half[0], dtype, i, (double)lo[0][i]), emxi_store(half[1], dtype, i, (double)hi[0][i]);
        double u = 0, a = 0, mu = 0, var = 0, am = 0, dist = 0;
        for (int i = 0; i < d; i++) {
          const double l = emxi_load(pl, dtype, i), h = emxi_load(ph, dtype, i), w = (double)q[i];
          u += fmax(w * l, w * h);
          a += fabs(w) * fmax(fabs(l), fabs(h));
          mu += w * (double)mean[0][i];
          am += fabs(w * (double)mean[0][i]);
          var += w * w * (double)m2[0][i];
          dist += ((double)q[i] - (double)mean[0][i]) * ((double)q[i] - (double)mean[0][i]);
        }
        float gu, ga, gm, gv, gam;
        kernels[1]->box[emxi_slot(dtype)](q, 256, 1, pl, ph, d, &gu, &ga);
        kernels[1]->moments(q, 256, 1, mean[0], m2[0], d, &gm, &gv, &gam);
        assert_true(fabs((double)gu - u) <= (d + 1) * 0x1p-24 * a && fabs((double)ga - a) <= (d + 2) * 0x1p-24 * a);
        assert_true(fabs((double)gm - mu) <= (d + 1) * 0x1p-24 * am && fabs((double)gam - am) <= (d + 2) * 0x1p-24 * am);
        assert_true(fabs((double)gv - var) <= (d + 3) * 0x1p-24 * var);
        assert_true(fabs((double)kernels[1]->distance2(q, mean[0], d) - dist) <= (d + 3) * 0x1p-24 * dist);
      }
      float s[2][256];
      memcpy(s[0], q, sizeof q), memcpy(s[1], q, sizeof q);
      for (int v = 0; v < 2; v++) kernels[v]->bias(s[v], d, 0.37f, -1000003.0f);
      assert_memory_equal(s[0], s[1], sizeof(float) * (size_t)d);
    }
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_kernels),
      cmocka_unit_test(test_claims),
      cmocka_unit_test(test_claims_by_summary),
      cmocka_unit_test(test_topk_choice),
      cmocka_unit_test(test_gaussian_rule),
      cmocka_unit_test(test_gaussian_without_spread),
      cmocka_unit_test(test_tau_modes),
      cmocka_unit_test(test_entmax_drops_less),
      cmocka_unit_test(test_always_read),
      cmocka_unit_test(test_siblings),
      cmocka_unit_test(test_tau_is_monotone),
      cmocka_unit_test(test_tables_agree),
      cmocka_unit_test(test_certificate_covers_rounding),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
