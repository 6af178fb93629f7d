/* SPDX-License-Identifier: Apache-2.0
 * Page bounds and selectors on the CPU, and what they say about the tokens that are left out.
 *
 * Bounds of a score s = q.k + bias of a page (q already times scale):
 *   box   sum_d max(q_d kmin_d, q_d kmax_d),       A = sum_d |q_d| max(|kmin_d|, |kmax_d|)
 *   ball  q.mean + ||q|| radius,                   A = sum_d |q_d| |mean_d| + ||q|| radius
 * where A >= sum_d |q_d k_d| for every key of the page. Rounding, u = 2^-24:
 *   the bound itself, D products and D sums in any order            (D+1) u A
 *   a computed score against the exact one: its dot product         (D)   u A
 *   q times scale, rounded once                                           u A
 * together (2D+2) u A; (2D+8) u A with A enlarged by 1 % also covers the rounding of A (D+2 operations on positive numbers, D <=
 * 256) and of the sum with the bias, which is itself within 4 u max|bias| of slope * (j-i). Underflow of products adds at most 2
 * D 2^-149. upper = bound + best bias + slack is therefore above both the true score and the one that the library would compute,
 * so a page with a * upper <= tau can neither hold support nor, if it were read, change a bit of the result. All of this is
 * rounded upwards.
 */
#include "cpu/decode_cpu.h"
#include "kv/gaussian.h"

#include <math.h>
#include <string.h>

/* Rounding error of one score whose absolute terms sum to at most `abs_sum`, and whose bias is at most `bias` in size. */
static double score_slack(int d, double abs_sum, double bias) {
  return (2 * d + 8) * 0x1p-24 * 1.01 * abs_sum + 0x1p-22 * bias + 1e-35;
}
static float float_up(double x) {
  float f = (float)x;
  if (!(f == f)) return INFINITY;
  return (double)f >= x ? f : nextafterf(f, INFINITY);
}

/* Largest and largest absolute bias of the row over a page. */
static void page_bias(const emxi_item *it, const emxi_row *row, int64_t page, double *best, double *size) {
  const double first = (double)(page * it->d->kv->P - (row->visible - 1)),
               last = first + (double)emxi_page_tokens(it, page) - 1.0;
  const double x = (double)row->slope * first, y = (double)row->slope * last;
  *best = fmax(x, y);
  *size = fmax(fabs(x), fabs(y));
}

static void set_bound(emxi_item *it, int r, int64_t page, double bound, double abs_sum) {
  const emxi_row *row = &it->row[r];
  double best = 0, size = 0;
  if (row->slope != 0) page_bias(it, row, page, &best, &size);
  const double slack = score_slack(it->d->kv->D, abs_sum, size) + row->underflow;
  it->w->slack[r * it->w->page_ld + page] = float_up(slack);
  it->w->upper[r * it->w->page_ld + page] = float_up(bound + best + slack);
}

#define AHEAD 12 /* pages */

/* Judges every usable page by its box, or by its ball. Pages that are not usable keep +inf. */
static void bound_pages(emxi_item *it, bool box) {
  const emx_kv *kv = it->d->kv;
  const emxi_work *w = it->w;
  const size_t es = emx_dtype_size(kv->dtype);
  const bool gauss = it->d->select.kind == EMX_SELECT_GAUSSIAN;
  float u[EMXI_ITEM_ROWS], v[EMXI_ITEM_ROWS], a[EMXI_ITEM_ROWS];
  int64_t judged = 0;
  for (int64_t p = 0; p < it->pages; p++) {
    if (!w->usable[p]) continue;
    const int32_t page = it->table[p];
    judged++;
    if (p + AHEAD < it->pages) { /* summaries of one head lie G records apart */
      const int32_t next = it->table[p + AHEAD];
      if (box)
        emxi_prefetch(emxi_kv_minmax(kv, next, it->g), 2 * (size_t)kv->D * es);
      else
        emxi_prefetch((const char *)emxi_kv_moments(kv, next, it->g), (2 * (size_t)kv->D + 1) * sizeof(float));
    }
    if (box) {
      const char *lo = emxi_kv_minmax(kv, page, it->g);
      it->k->kv->box[emxi_slot(kv->dtype)](w->q, EMXI_QLD, it->rows, lo, lo + (size_t)kv->D * es, kv->D, u, a);
      for (int r = 0; r < it->rows; r++) set_bound(it, r, p, (double)u[r], (double)a[r]);
      continue;
    }
    const float *mean = emxi_kv_moments(kv, page, it->g);
    it->k->kv->moments(w->q, EMXI_QLD, it->rows, mean, mean + kv->D, kv->D, u, v, a);
    for (int r = 0; r < it->rows; r++) {
      const emxi_row *row = &it->row[r];
      const double reach = row->norm * (double)mean[2 * kv->D] * (1 + 1e-12);
      set_bound(it, r, p, (double)u[r] + reach, (double)a[r] + reach);
      if (!gauss) continue;
      /* ALiBi at the mean position of the page */
      const double at = (double)(p * kv->P - (row->visible - 1)) + 0.5 * (kv->P - 1);
      w->mu[r * w->page_ld + p] = (float)((double)u[r] + (double)row->slope * at);
      w->sigma[r * w->page_ld + p] = sqrtf(fmaxf(v[r], 0) / (float)kv->P);
    }
  }
  const int64_t bytes = box ? emxi_lines(2 * kv->D * (int64_t)es) : emxi_lines((2 * kv->D + 1) * (int64_t)sizeof(float));
  for (int r = 0; r < it->rows; r++) it->row[r].bytes_meta += judged * bytes;
}

/* Slack of a page that was read without a summary to go by: A from the largest |k_d| of its keys. */
static void slack_from_keys(emxi_item *it, int64_t page) {
  const emx_kv *kv = it->d->kv;
  const emxi_work *w = it->w;
  const size_t step = (size_t)kv->k_token * emx_dtype_size(kv->dtype);
  float top[EMXI_QLD] = {0}, key[EMXI_QLD];
  const int64_t n = emxi_page_tokens(it, page);
  const char *keys = emxi_kv_keys(kv, it->table[page], it->g, 0, n, w->rows);
  for (int64_t t = 0; t < n; t++) {
    it->k->load[emxi_slot(kv->dtype)](keys + (size_t)t * step, kv->D, key);
    for (int x = 0; x < kv->D; x++)
      if (!(fabsf(key[x]) <= top[x])) top[x] = fabsf(key[x]);
  }
  for (int r = 0; r < it->rows; r++) {
    if (!w->chosen[r * w->page_ld + page]) continue;
    double sum = 0, best = 0, size = 0;
    for (int x = 0; x < kv->D; x++) sum += fabs((double)w->q[r * EMXI_QLD + x]) * (double)top[x];
    if (it->row[r].slope != 0) page_bias(it, &it->row[r], page, &best, &size);
    w->slack[r * w->page_ld + page] = float_up(score_slack(kv->D, sum, size) + it->row[r].underflow);
  }
}

/* ---- TOPK */

/* Orders floats as unsigned integers. */
static uint32_t sortable(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* The k-th largest of x[0..n), 1 <= k <= n, by its bits from the top, eight at a time: four passes whatever the data. */
static uint32_t kth_largest(const float *x, int64_t n, int64_t k) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t bins[256] = {0};
    for (int64_t i = 0; i < n; i++) {
      const uint32_t u = sortable(x[i]);
      if ((u & mask) == prefix) bins[u >> shift & 255]++;
    }
    int bin = 255;
    while (k > bins[bin]) k -= bins[bin--];
    prefix |= (uint32_t)bin << shift;
    mask |= (uint32_t)255 << shift;
  }
  return prefix;
}

/* The best `k` usable pages of the row, lower page first among equals. */
static void choose_best(emxi_item *it, int r, int64_t k) {
  const emxi_work *w = it->w;
  const float *upper = w->upper + r * w->page_ld;
  uint8_t *chosen = w->chosen + r * w->page_ld;
  int64_t n = 0;
  for (int64_t p = 0; p < it->pages; p++)
    if (!chosen[p]) w->pick[n++] = upper[p];
  if (k <= 0) return;
  if (k >= n) {
    memset(chosen, 1, (size_t)it->pages);
    return;
  }
  const uint32_t last = kth_largest(w->pick, n, k);
  int64_t above = 0;
  for (int64_t i = 0; i < n; i++) above += sortable(w->pick[i]) > last;
  for (int64_t p = 0, ties = k - above; p < it->pages; p++) {
    if (chosen[p]) continue;
    const uint32_t u = sortable(upper[p]);
    if (u > last || (u == last && ties-- > 0)) chosen[p] = 1;
  }
}

static void select_topk(emxi_item *it) {
  const emx_kv *kv = it->d->kv;
  const emxi_work *w = it->w;
  int64_t budget = it->d->select.budget / kv->P, forced = 0;
  if (budget < 1) budget = 1;
  if (budget >= it->pages) {
    for (int r = 0; r < it->rows; r++) memset(w->chosen + r * w->page_ld, 1, (size_t)it->pages);
    return;
  }
  bound_pages(it, true);
  for (int64_t p = 0; p < it->pages; p++) forced += !w->usable[p];
  for (int r = 0; r < it->rows; r++)
    if (!it->row[r].bad) choose_best(it, r, budget - forced);
}

/* ---- GAUSSIAN (entmaxkv.md 1.4) */

static void select_gaussian_row(emxi_item *it, int r) {
  const emxi_work *w = it->w;
  const emx_select_desc *s = &it->d->select;
  emxi_row *row = &it->row[r];
  const float *mu = w->mu + r * w->page_ld, *sigma = w->sigma + r * w->page_ld;
  const double a = row->alpha - 1.0;
  double sum = 0, sum_var = 0, sum_upper = 0, sum_square = 0;
  int64_t n = 0;
  for (int64_t p = 0; p < it->pages; p++)
    if (w->usable[p]) {
      const double x = (double)mu[p], y = (double)sigma[p];
      sum += x;
      sum_var += y * y;
      sum_upper += x + 1.5 * y;
      n++;
    }
  if (!n) return;
  const double mean = sum / (double)n;
  for (int64_t p = 0; p < it->pages; p++)
    if (w->usable[p]) sum_square += ((double)mu[p] - mean) * ((double)mu[p] - mean);
  const double spread = sqrt(sum_var / (double)n + sum_square / (double)n);
  if (!(spread < INFINITY) || !(fabs(mean) < INFINITY)) { /* means that overflow say nothing: read everything */
    memset(w->chosen + r * w->page_ld, 1, (size_t)it->pages);
    return;
  }
  double tau;
  if (row->slope == 0) { /* one normal for all tokens */
    const float m1 = (float)mean, s1 = (float)spread;
    tau = emxi_gauss_tau(row->alpha, (double)n * it->d->kv->P, &m1, &s1, 1);
  } else { /* pages differ by position: a mixture; pages that cannot matter are skipped inside */
    int64_t c = 0;
    float *mixed_mu = w->pick, *mixed_sigma = w->spread;
    for (int64_t p = 0; p < it->pages; p++)
      if (w->usable[p]) {
        mixed_mu[c] = mu[p];
        mixed_sigma[c++] = sigma[p];
      }
    tau = emxi_gauss_tau(row->alpha, it->d->kv->P, mixed_mu, mixed_sigma, c);
  }
  const double excess = tau / a - sum_upper / (double)n;
  const double margin = fmax((double)s->safety_margin * spread, (double)s->excess_margin * fmax(excess, 0));
  const double floor = tau - a * margin;
  for (int64_t p = 0; p < it->pages; p++)
    if (w->usable[p] && a * ((double)mu[p] + it->page_z * (double)sigma[p]) > floor) w->chosen[r * w->page_ld + p] = 1;
  row->has_estimate = true;
  row->estimate = tau;
}

/* ---- all of them */

/* max_unread and slack of each row from upper[], slack[] and chosen[]. */
static void summarise_bounds(emxi_item *it) {
  const emxi_work *w = it->w;
  for (int r = 0; r < it->rows; r++) {
    const uint8_t *chosen = w->chosen + r * w->page_ld;
    const float *upper = w->upper + r * w->page_ld;
    for (int64_t p = 0; p < it->pages; p++)
      if (!chosen[p] && (double)upper[p] > it->row[r].max_unread) it->row[r].max_unread = (double)upper[p];
    if (it->row[r].bad && !it->d->select_only) it->row[r].max_unread = INFINITY;
  }
  if (it->d->select_only) return;
  for (int64_t p = 0; p < it->pages; p++) {
    if (!w->any[p]) continue;
    for (int r = 0; r < it->rows; r++)
      if (w->chosen[r * w->page_ld + p] && w->slack[r * w->page_ld + p] < 0 && isfinite(it->row[r].max_unread)) {
        slack_from_keys(it, p);
        break;
      }
    for (int r = 0; r < it->rows; r++)
      if (w->chosen[r * w->page_ld + p]) it->row[r].slack = fmax(it->row[r].slack, (double)w->slack[r * w->page_ld + p]);
  }
}

/* A summary judges a page if it describes all of a complete page of finite keys. */
static bool may_judge(const emxi_item *it, int64_t p) {
  const emx_kv *kv = it->d->kv;
  return kv->sum_tokens[it->table[p]] == kv->P && !(*emxi_kv_mark(kv, it->table[p], it->g) & EMXI_MARK_NONFINITE);
}

void emxi_cpu_select(emxi_item *it) {
  const emxi_decode *d = it->d;
  const emx_kv *kv = d->kv;
  const emxi_work *w = it->w;
  const int64_t M = it->pages;
  /* The newest page is always read. */
  for (int64_t p = 0; p < M; p++) w->usable[p] = p < M - 1 && may_judge(it, p);
  it->sparse = true;
  for (int r = 0; r < it->rows; r++) {
    uint8_t *chosen = w->chosen + r * w->page_ld;
    memset(chosen, 0, (size_t)w->page_ld);
    for (int64_t p = 0; p < M; p++) {
      w->upper[r * w->page_ld + p] = INFINITY;
      w->slack[r * w->page_ld + p] = -1; /* not known yet */
      if (d->select.kind != EMX_SELECT_PAGES) chosen[p] = !w->usable[p];
    }
  }
  switch (d->select.kind) {
    case EMX_SELECT_TOPK: select_topk(it); break;
    case EMX_SELECT_GAUSSIAN:
      bound_pages(it, false);
      for (int r = 0; r < it->rows; r++)
        if (!it->row[r].bad) select_gaussian_row(it, r);
      break;
    default:
      for (int r = 0; r < it->rows; r++) {
        const emxi_row *row = &it->row[r];
        const int32_t *list = d->pages + it->b * d->pages_stride[0] + row->h * d->pages_stride[1];
        const int32_t n = d->n_pages[it->b * d->n_pages_stride[0] + row->h * d->n_pages_stride[1]];
        for (int32_t i = 0; i < n; i++) w->chosen[r * w->page_ld + list[i]] = 1;
      }
      /* a list may leave out the newest page, too; then its summary may judge it */
      if (M) w->usable[M - 1] = emxi_page_tokens(it, M - 1) == kv->P && may_judge(it, M - 1);
  }
  bool all = true;
  memset(w->any, 0, (size_t)w->page_ld);
  for (int r = 0; r < it->rows; r++)
    for (int64_t p = 0; p < M; p++) {
      w->any[p] |= w->chosen[r * w->page_ld + p];
      all &= w->chosen[r * w->page_ld + p];
    }
  it->sparse = !all;
  if (!it->sparse || !it->bounds) return;
  if (d->select.kind == EMX_SELECT_PAGES && kv->summaries & (EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS))
    bound_pages(it, (kv->summaries & EMX_SUMMARY_MINMAX) != 0);
  summarise_bounds(it);
}

/* H = F over the candidates + F over the upper bounds of what was not read, each as often as it counts; slope: the sum of
 * y^(b-1). */
static double total(const emxi_dropped *x, double t, double *slope) {
  double f;
  emxi_power_sums(x->k, x->alpha, x->list, x->n, 0, t, &f, slope);
  for (int i = 0; i < 3; i++) {
    double f2, g2;
    if (!x->far[i].n) continue;
    emxi_power_sums(x->k, x->alpha, x->far[i].up, x->far[i].n, 0, t, &f2, &g2);
    f += x->far[i].times * f2;
    *slope += x->far[i].times * g2;
  }
  return f;
}

double emxi_cpu_exp_sum(const emxi_table *k, const float *s, int64_t n, float m) {
  float p[EMXI_BLOCK + 16];
  double sum = 0;
  for (int64_t i = 0; i < n; i += EMXI_BLOCK) sum += k->exps(s + i, n - i < EMXI_BLOCK ? n - i : EMXI_BLOCK, m, p);
  return sum;
}

/* U / (U + R), which grows with the sum U over what was left out and falls with the sum R over the list. */
static double dropped_share(const emxi_dropped *x, float top) {
  double unread = 0;
  for (int i = 0; i < 3; i++)
    if (x->far[i].n)
      unread +=
          x->far[i].times * (emxi_cpu_exp_sum(x->k, x->far[i].up, x->far[i].n, top) * (1 + 2e-5) + (double)x->far[i].n * 1e-37);
  const double read = emxi_cpu_exp_sum(x->k, x->list, x->n, top) * (1 - 2e-5) * exp(-x->slack);
  return unread > 0 ? fmin(unread / (unread + read) * (1 + 1e-12), 1.0) : unread == 0 ? 0 : 1;
}

double emxi_cpu_dropped_mass(const emxi_dropped *x) {
  const double a = x->alpha - 1.0;
  double top = (double)x->top;
  for (int i = 0; i < 3; i++) {
    const double far = x->far[i].n ? (double)x->k->max(x->far[i].up, x->far[i].n) : -INFINITY;
    top = far > top ? far : top;
  }
  if (!x->n || !(top < INFINITY) || !(x->slack < INFINITY)) return 1;
  if (x->alpha == 1.0) return dropped_share(x, (float)top);
  if (!(x->tau_low > -INFINITY)) return 1;
  /* H(tau_low) >= 1 up to rounding and H = 0 at the right end. Newton on H^(1/b), a norm, stays left of the root (alpha <= 2). */
  double lo = x->tau_low, hi = a * top, slope;
  const double tol = 1e-10 * (1.0 + fabs(lo));
  for (int i = 0; i < 50 && x->alpha <= 2.0; i++) {
    const double f = total(x, lo, &slope), step = (f - pow(f, 1.0 - a)) / slope;
    if (!(step > tol) || !(lo + step < hi)) break;
    lo += step;
  }
  if (lo + 2 * tol < hi && total(x, lo + 2 * tol, &slope) <= 1.0) hi = lo + 2 * tol;
  while (hi - lo > 2 * tol) {
    const double mid = 0.5 * (lo + hi);
    if (mid <= lo || mid >= hi) break; /* neighbours: far bounds have coarser floats than tol */
    if (total(x, mid, &slope) > 1.0)
      lo = mid;
    else
      hi = mid;
  }
  /* The candidates' true scores may be lower by the slack: F_true(t) >= F(t + a slack), and the root found with computed scores
   * may be lower than the true one by as much again. */
  double f, g;
  emxi_power_sums(x->k, x->alpha, x->list, x->n, 0, hi + 2 * a * x->slack + 1e-12 * (1 + fabs(hi)), &f, &g);
  return fmin(fmax(1.0 - f + 1e-12 + (double)x->n * 0x1p-50, 0.0), 1.0);
}

double emxi_cpu_tau_low(const emxi_row *row) {
  const double a = row->alpha - 1, tau = emxi_tau(&row->sol, row->alpha);
  return tau - a * row->slack - 1e-9 * fmax(1.0, fabs(tau)) - (double)row->sol.support * 0x1p-50;
}

static double dropped_entmax(const emxi_item *it, int r) {
  const emxi_row *row = &it->row[r];
  const emxi_work *w = it->w;
  const double a = row->alpha - 1.0, tau_low = emxi_cpu_tau_low(row);
  if (!row->sol.support || !(row->max_unread < INFINITY) || !(tau_low > -INFINITY)) return 1;
  emxi_dropped x = {.k = it->k,
                    .alpha = row->alpha,
                    .list = row->list,
                    .n = row->sol.support,
                    .top = row->m,
                    .tau_low = tau_low,
                    .slack = row->slack,
                    .far = {{.up = w->pick, .times = it->d->kv->P}, {.up = row->far, .n = row->n_far, .times = 1}}};
  for (int64_t p = 0; p < it->pages; p++) { /* every unread page is counted with P tokens, which is enough or more */
    const float u = w->upper[r * w->page_ld + p];
    if (!w->chosen[r * w->page_ld + p] && a * (double)u > tau_low) w->pick[x.far[0].n++] = u;
  }
  return emxi_cpu_dropped_mass(&x);
}

static double dropped_softmax(const emxi_item *it, int r) {
  const emxi_row *row = &it->row[r];
  const emxi_work *w = it->w;
  if (!(row->z > 0) || !(row->max_unread < INFINITY) || !(row->slack < INFINITY)) return 1;
  const double ref = fmax((double)row->m, row->max_unread);
  double unread = 0;
  for (int64_t p = 0; p < it->pages; p++)
    if (!w->chosen[r * w->page_ld + p]) {
      const double e = (double)w->upper[r * w->page_ld + p] - ref;
      unread += e > -60 ? exp(e) : 1e-26;
    }
  unread *= it->d->kv->P;
  for (int64_t i = 0; i < row->n_far; i++) unread += exp((double)row->far[i] - ref);
  unread += (double)row->n_below * exp(row->limit - ref);
  unread *= 1 + 1e-9;
  /* the sum of exponentials is within 2e-6 (k_exps and its float arguments) and the scores within the slack */
  const double read = row->z * exp((double)row->m - ref - row->slack) * (1 - 1e-5);
  return fmin(unread / (unread + read) * (1 + 1e-12), 1.0);
}

double emxi_cpu_dropped(const emxi_item *it, int r) {
  return it->row[r].alpha == 1.0 ? dropped_softmax(it, r) : dropped_entmax(it, r);
}
