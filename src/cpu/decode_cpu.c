/* SPDX-License-Identifier: Apache-2.0
 * Decode on the CPU.
 *
 *   s_j = q.k_j + slope (j - i),  o = sum_j [a s_j - tau]_+^(1/a) v_j,  a = alpha-1            (alpha = 1: softmax, one online pass)
 *
 * A work item is (sequence, KV head, up to 32 query rows); it owns those rows of o and their reports. Keys are scored 256 positions at
 * a time; what can still be in the support (above the running maximum minus 1/a, T1 of docs/math.md) is kept as (score, position), so
 * tau is solved exactly without another look at K, and values are read for the support only. Lists have room for every token.
 * Traffic: K of the pages read, once per item (N D bytes-per-element), and support * D of V; softmax reads all of V as well. 2 N D FLOP
 * a row. Error: scores and sums of 256 products in float, across blocks in double. Oracle: src/entmax/oracle.c on the stored values.
 *
 * Same support, same bits: scores do not depend on blocking, lists are in position order, tau is canonical (emxi_solve), and values are
 * added in chunks of 256 of the support. So ALL, TOPK with a full budget and any list that covers the support agree exactly.
 */
#include "cpu/decode_cpu.h"

#include "base/num.h"
#include "kv/gaussian.h"

static void carve(const emxi_decode *d, emxi_arena *a, emxi_work *w, int64_t rows) {
  const int64_t pages = emxi_kv_pages_of(d->kv, d->max_len);
  const bool lists = d->alpha > 1.0 && !d->select_only, sparse = d->select.kind != EMX_SELECT_ALL;
  *w = (emxi_work){0};
  w->q = emxi_arena_take(a, rows * EMXI_QLD, sizeof(float));
  w->o = emxi_arena_take(a, rows * EMXI_QLD, sizeof(double));
  w->part = emxi_arena_take(a, EMXI_QLD, sizeof(float));
  w->score = emxi_arena_take(a, rows * (EMXI_BLOCK + 16), sizeof(float));
  w->at = emxi_arena_take(a, rows * (EMXI_BLOCK + 16), sizeof(int32_t));
  w->weight = emxi_arena_take(a, EMXI_BLOCK + 16, sizeof(float));
  w->index = emxi_arena_take(a, EMXI_BLOCK + 16, sizeof(int32_t));
  w->offset = emxi_arena_take(a, EMXI_BLOCK, sizeof(int64_t));
  w->list_ld = lists ? (d->max_len + 64 + 15) / 16 * 16 : 0;
  w->list = emxi_arena_take(a, rows * w->list_ld, sizeof(float));
  w->pos = emxi_arena_take(a, rows * w->list_ld, sizeof(int32_t));
  w->page_ld = sparse ? (pages + 63) / 64 * 64 : 0;
  w->chosen = emxi_arena_take(a, rows * w->page_ld, 1);
  w->any = emxi_arena_take(a, w->page_ld, 1);
  w->usable = emxi_arena_take(a, w->page_ld, 1);
  w->upper = emxi_arena_take(a, rows * w->page_ld, sizeof(float));
  w->slack = emxi_arena_take(a, rows * w->page_ld, sizeof(float));
  const int64_t gauss = d->select.kind == EMX_SELECT_GAUSSIAN ? rows * w->page_ld : 0;
  w->mu = emxi_arena_take(a, gauss, sizeof(float));
  w->sigma = emxi_arena_take(a, gauss, sizeof(float));
  w->pick = emxi_arena_take(a, w->page_ld, sizeof(float));
  w->spread = emxi_arena_take(a, w->page_ld, sizeof(float));
}

/* ---- reading keys */

static inline void prefetch(const char *p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}
/* The K or V rows of one page and head. */
static void prefetch_page(const emx_kv *kv, int32_t page, int32_t head, bool values) {
  const size_t row = (size_t)kv->D * emx_dtype_size(kv->dtype);
  const int64_t step = values ? kv->v_token : kv->k_token;
  const char *p = values ? emxi_kv_v(kv, page, head, 0) : emxi_kv_k(kv, page, head, 0);
  if (step == kv->D) {
    prefetch(p, row * (size_t)kv->P);
  } else {
    for (int32_t t = 0; t < kv->P; t++) prefetch(p + (size_t)(t * step) * emx_dtype_size(kv->dtype), row);
  }
}

/* Scores of the pages of block [start, start + 256) that some row reads. counts[r]: scores of row r, at w->score; their positions are at
 * w->at when `sparse`, else start, start + 1, ... `ahead` is the next block's start, for prefetching. */
static void score_block(emxi_item *it, int64_t start, int64_t ahead, int64_t *counts) {
  const emx_kv *kv = it->d->kv;
  const emxi_work *w = it->w;
  const int64_t ld = EMXI_BLOCK + 16, first = start / kv->P;
  const int slot = emxi_slot(kv->dtype), per_block = EMXI_BLOCK / kv->P;
  for (int r = 0; r < it->rows; r++) counts[r] = 0;
  for (int i = 0; i < per_block; i++) {
    const int64_t page = first + i, next = ahead / kv->P + i;
    if (next < it->pages && (!it->sparse || w->any[next])) prefetch_page(kv, it->table[next], it->g, false);
    if (page >= it->pages) continue;
    if (it->sparse && !w->any[page]) continue;
    const int64_t n = emxi_page_tokens(it, page), from = page * kv->P;
    const char *keys = emxi_kv_k(kv, it->table[page], it->g, 0);
    bool together = true;
    for (int r = 0; it->sparse && r < it->rows; r++)
      together &= w->chosen[r * w->page_ld + page] && counts[r] == counts[0];
    if (together) it->k->dot[slot](w->q, EMXI_QLD, it->rows, keys, kv->k_token, n, kv->D, w->score + counts[0], ld);
    for (int r = 0; r < it->rows; r++) {
      emxi_row *row = &it->row[r];
      float *s = w->score + r * ld + counts[r];
      if (it->sparse && !w->chosen[r * w->page_ld + page]) continue;
      if (!together) it->k->dot[slot](w->q + r * EMXI_QLD, EMXI_QLD, 1, keys, kv->k_token, n, kv->D, s, ld);
      if (row->slope != 0) it->k->kv->bias(s, n, row->slope, (float)(from - (row->visible - 1)));
      if (it->sparse)
        for (int64_t j = 0; j < n; j++) w->at[r * ld + counts[r] + j] = (int32_t)(from + j);
      counts[r] += n;
    }
  }
  if (!it->sparse) /* causal: a row of several query tokens does not see the last keys */
    for (int r = 0; r < it->rows; r++) {
      const int64_t seen = it->row[r].visible - start;
      if (counts[r] > seen) counts[r] = seen > 0 ? seen : 0;
    }
}

/* Adds w->weight[0..n) times the values at w->offset to the row's output. A weight of zero never meets its value. */
static void add_values(emxi_item *it, int r, int64_t n) {
  const emx_kv *kv = it->d->kv;
  const emxi_work *w = it->w;
  double *o = w->o + r * EMXI_QLD;
  memset(w->part, 0, (size_t)kv->D * sizeof(float));
  it->k->accumulate[emxi_slot(kv->dtype)](w->part, kv->D, emxi_kv_v(kv, 0, it->g, 0), w->offset, w->weight, n);
  for (int x = 0; x < kv->D; x++) o[x] += (double)w->part[x];
  it->row[r].bytes_v += n * emxi_lines((int64_t)kv->D * (int64_t)emx_dtype_size(kv->dtype));
}
static inline int64_t value_offset(const emxi_item *it, int64_t position) {
  const emx_kv *kv = it->d->kv;
  const int64_t page = (uint64_t)position / (uint32_t)kv->P, token = position - page * kv->P;
  return it->table[page] * kv->v_page + token * kv->v_token;
}

/* alpha > 1: candidates of a block join the row's list. */
static void keep_block(emxi_item *it, int r, int64_t start, int64_t n) {
  const emxi_work *w = it->w;
  emxi_row *row = &it->row[r];
  float *s = w->score + r * (EMXI_BLOCK + 16);
  const float m = it->k->max(s, n);
  if (m > row->m) {
    row->m = m;
    if (m == INFINITY) {
      row->bad = true;
      return;
    }
    /* one float further down covers the rounding of the difference */
    row->below = nextafterf((float)((double)m - 1.0 / (it->d->alpha - 1.0)), -INFINITY);
  }
  const float thr = row->below < row->floor ? row->below : row->floor;
  row->n += it->k->keep(s, it->sparse ? w->at + r * (EMXI_BLOCK + 16) : NULL, (int32_t)start, n, thr, w->list + r * w->list_ld + row->n,
                        w->pos + r * w->list_ld + row->n);
}

/* alpha = 1: online softmax. The weights of a block are relative to the maximum so far. */
static void softmax_block(emxi_item *it, int r, int64_t start, int64_t n) {
  const emxi_work *w = it->w;
  emxi_row *row = &it->row[r];
  const float *s = w->score + r * (EMXI_BLOCK + 16);
  const int32_t *at = w->at + r * (EMXI_BLOCK + 16);
  const float m = it->k->max(s, n);
  int64_t finite = 0, nans = 0;
  for (int64_t j = 0; j < n; j++) {
    finite += s[j] > -INFINITY;
    nans += s[j] != s[j];
  }
  row->n += finite;
  if (nans || m == INFINITY) row->bad = true;
  if (row->bad || m == -INFINITY) return;
  if (m > row->m) {
    const double f = exp((double)row->m - (double)m);
    double *o = w->o + r * EMXI_QLD;
    for (int x = 0; x < it->d->kv->D; x++) o[x] *= f;
    row->z *= f;
    row->m = m;
  }
  row->z += it->k->exps(s, n, row->m, w->weight);
  const int64_t c = it->k->keep(w->weight, NULL, 0, n, 0.0f, w->weight, w->index);
  for (int64_t j = 0; j < c; j++) w->offset[j] = value_offset(it, it->sparse ? at[w->index[j]] : start + w->index[j]);
  add_values(it, r, c);
}

static void stream(emxi_item *it) {
  const emx_kv *kv = it->d->kv;
  const emxi_work *w = it->w;
  int64_t counts[EMXI_ITEM_ROWS], end = 0;
  for (int r = 0; r < it->rows; r++)
    if (it->row[r].visible > end) end = it->row[r].visible;
  const int per_block = EMXI_BLOCK / kv->P;
  for (int64_t start = 0, ahead; start < end; start = ahead) {
    ahead = start + EMXI_BLOCK;
    if (it->sparse) /* the next block that is not empty */
      for (bool found = false; ahead < end && !found; ahead += found ? 0 : EMXI_BLOCK)
        for (int64_t p = ahead / kv->P; p < ahead / kv->P + per_block && p < it->pages; p++) found |= w->any[p];
    score_block(it, start, ahead, counts);
    if (it->d->alpha == 1.0)
      for (int i = 0; i < per_block; i++) {
        const int64_t page = start / kv->P + i;
        if (page < it->pages && (!it->sparse || w->any[page])) prefetch_page(kv, it->table[page], it->g, true);
      }
    for (int r = 0; r < it->rows; r++) {
      if (!counts[r] || it->row[r].bad) continue;
      if (it->d->alpha == 1.0)
        softmax_block(it, r, start, counts[r]);
      else
        keep_block(it, r, start, counts[r]);
    }
    if (emxi_cancelled(it->ctx)) return;
  }
}

/* ---- thresholds and results */

/* o += sum of weights times values over the candidates; returns the sum of the weights and counts those that are not zero. */
static double gather(emxi_item *it, int r, const emxi_solution *sol, int64_t *support) {
  const emxi_work *w = it->w;
  const float *list = w->list + r * w->list_ld;
  const int32_t *pos = w->pos + r * w->list_ld;
  const size_t bytes = (size_t)it->d->kv->D * emx_dtype_size(it->d->kv->dtype), es = emx_dtype_size(it->d->kv->dtype);
  const char *values = emxi_kv_v(it->d->kv, 0, it->g, 0);
  double sum = 0;
  *support = 0;
  for (int64_t i = 0; i < sol->support; i += EMXI_BLOCK) {
    emxi_solution part = *sol;
    part.support = sol->support - i < EMXI_BLOCK ? sol->support - i : EMXI_BLOCK;
    emxi_weights(it->k, it->d->alpha, &part, list + i, w->weight);
    /* a small power of a small number may be zero in float: such a token is not in the support, and its value is not touched */
    const int64_t c = it->k->keep(w->weight, pos + i, 0, part.support, 0.0f, w->weight, w->index);
    for (int64_t j = 0; j < c; j++) {
      w->offset[j] = value_offset(it, w->index[j]);
      prefetch(values + (size_t)w->offset[j] * es, bytes);
    }
    double four[4] = {0};
    int64_t j = 0;
    for (; j + 4 <= c; j += 4)
      for (int x = 0; x < 4; x++) four[x] += (double)w->weight[j + x];
    for (; j < c; j++) four[0] += (double)w->weight[j];
    sum += (four[0] + four[1]) + (four[2] + four[3]);
    add_values(it, r, c);
    *support += c;
  }
  return sum;
}

/* EMX_TAU_CORRECTED: steps on the candidates from the estimate, inside [m-1, m] (relative: t in [-1, 0]). */
static double corrected(const emxi_item *it, const float *list, int64_t n, double m, double t, int steps) {
  double lo = -1, hi = 0;
  t = fmin(fmax(t, lo), hi);
  for (int i = 0; i < steps; i++) {
    double f, g;
    emxi_power_sums(it->k, it->d->alpha, list, n, m, t, &f, &g);
    if (f >= 1.0)
      lo = t;
    else
      hi = t;
    const double next = t + (f - 1.0) * (it->d->alpha - 1.0) / g; /* not finite where nothing is active */
    t = next > lo && next < hi ? next : 0.5 * (lo + hi);
  }
  return t;
}

static void write_row(const emxi_item *it, int r, double scale, bool nan) {
  const emxi_decode *d = it->d;
  const emxi_row *row = &it->row[r];
  const double *o = it->w->o + r * EMXI_QLD;
  char *out = d->o + (size_t)(it->b * d->o_stride[0] + row->h * d->o_stride[1] + row->s * d->o_stride[2]) * emx_dtype_size(d->o_dtype);
  for (int x = 0; x < d->kv->D; x++) emxi_store(out, d->o_dtype, x, nan ? (double)NAN : o[x] * scale);
}

static float round_up(double x) {
  float f = (float)x;
  return (double)f >= x ? f : nextafterf(f, INFINITY);
}

static void finish_row(emxi_item *it, int r) {
  const emxi_decode *d = it->d;
  const emxi_work *w = it->w;
  emxi_row *row = &it->row[r];
  const double a = d->alpha - 1.0, unit = d->alpha == 1.0 ? 1.0 : a;
  const bool unread = row->max_unread > -INFINITY;
  double tau = NAN, mass = 0, delta = 0;
  int64_t support = 0;
  bool exact = false;
  float *list = w->list + r * w->list_ld;
  int32_t *pos = w->pos + r * w->list_ld;

  if (d->alpha == 1.0) {
    if (!row->bad) {
      exact = true;
      support = row->n;
      mass = support > 0;
      write_row(it, r, row->z > 0 ? 1.0 / row->z : 0.0, false);
      if (it->bounds && unread) delta = emxi_cpu_dropped_softmax(it, r);
    }
  } else {
    emxi_solution sol = {0};
    const bool estimated = d->select.tau_mode != EMX_TAU_EXACT && row->has_estimate;
    if (!row->bad) {
      for (int64_t i = 0; estimated && i < row->n; i++) row->bad |= list[i] != list[i];
    }
    if (!row->bad && estimated) {
      sol = (emxi_solution){.m = row->m, .support = row->n, .t = row->n ? row->estimate - a * (double)row->m : 0};
      if (d->select.tau_mode == EMX_TAU_CORRECTED && row->n)
        sol.t = corrected(it, list, row->n, sol.m, sol.t, d->select.tau_steps ? d->select.tau_steps : 3);
      tau = row->n ? sol.t + a * sol.m : row->estimate;
      mass = gather(it, r, &sol, &support);
    }
    if (!row->bad && (!estimated || (it->bounds && unread))) { /* an estimated threshold still needs the exact one for its bound */
      sol = emxi_solve(it->k, d->alpha, list, pos, row->n);
      if (sol.nonfinite)
        row->bad = true;
      else if (!estimated) {
        exact = true;
        tau = emxi_tau(&sol, d->alpha);
        mass = gather(it, r, &sol, &support);
      }
    }
    if (!row->bad) {
      write_row(it, r, 1.0, false);
      if (it->bounds && unread) {
        /* tau of the tokens read, rounded down: T2 for the scores' errors, plus what the solver's own arithmetic may have lost */
        const double solved = emxi_tau(&sol, d->alpha);
        const double low = solved - a * row->slack - 1e-9 * fmax(1.0, fabs(solved)) - (double)sol.support * 0x1p-50;
        if (exact && a * row->max_unread <= low)
          delta = 0;
        else {
          delta = emxi_cpu_dropped(it, r, list, sol.support, low);
          exact = false;
        }
      }
    }
  }
  if (row->bad) {
    tau = mass = NAN;
    delta = 1;
    support = 0;
    write_row(it, r, 0, true);
  }
  if (!d->reports) return;
  emx_report rep = {.tau = (float)tau, .mass = (float)mass, .support = (int32_t)support, .tokens = (int32_t)row->tokens,
                    .pages = (int32_t)row->pages, .select = (uint8_t)d->select.kind, .bytes_k = row->bytes_k, .bytes_v = row->bytes_v,
                    .bytes_meta = row->bytes_meta};
  rep.delta_bound = round_up(fmin(delta, 1.0));
  rep.max_unread = unread ? round_up(unit * row->max_unread) : -INFINITY;
  rep.path = row->tokens == row->visible ? EMX_PATH_ALL : EMX_PATH_PAGES;
  const bool certified = !row->bad && exact && (!unread || (d->alpha > 1.0 && delta == 0));
  rep.flags = (uint8_t)((certified ? EMX_REPORT_CERTIFIED : 0) | (row->bad ? EMX_REPORT_NONFINITE : 0));
  rep.stopped_by = unread && !certified && d->select.kind == EMX_SELECT_TOPK ? EMX_STOP_BUDGET : EMX_STOP_DONE;
  memcpy(d->reports + (((int64_t)it->b * d->H + row->h) * d->S + row->s) * d->report_stride, &rep, sizeof rep);
}

/* What the row will read, in tokens, pages and lines of K. */
static void count_reads(emxi_item *it, int r) {
  const emx_kv *kv = it->d->kv;
  emxi_row *row = &it->row[r];
  const int64_t key = (int64_t)kv->D * (int64_t)emx_dtype_size(kv->dtype);
  const int64_t pages = emxi_kv_pages_of(kv, row->visible);
  for (int64_t p = 0; p < pages; p++) {
    if (it->sparse && !it->w->chosen[r * it->w->page_ld + p]) continue;
    const int64_t left = row->visible - p * kv->P, n = left < kv->P ? left : kv->P;
    row->pages++;
    row->tokens += n;
    row->bytes_k += kv->k_token == kv->D ? emxi_lines(n * key) : n * emxi_lines(key);
  }
}

/* emx_select: the lists and bounds of the item's rows. */
static void write_lists(const emxi_item *it) {
  const emxi_decode *d = it->d;
  for (int r = 0; r < it->rows; r++) {
    const emxi_row *row = &it->row[r];
    int32_t *list = d->pages + it->b * d->pages_stride[0] + row->h * d->pages_stride[1] + row->s * d->pages_stride[2], n = 0;
    const int64_t pages = emxi_kv_pages_of(d->kv, row->visible);
    for (int64_t p = 0; p < pages; p++)
      if (!it->sparse || it->w->chosen[r * it->w->page_ld + p]) list[n++] = (int32_t)p;
    d->n_pages[it->b * d->n_pages_stride[0] + row->h * d->n_pages_stride[1] + row->s * d->n_pages_stride[2]] = n;
    for (int64_t i = n; i < d->pages_width; i++) list[i] = -1;
    if (d->bound)
      d->bound[it->b * d->bound_stride[0] + row->h * d->bound_stride[1] + row->s * d->bound_stride[2]] =
          row->max_unread > -INFINITY ? round_up((d->alpha == 1.0 ? 1.0 : d->alpha - 1.0) * row->max_unread) : -INFINITY;
  }
}

/* ---- items */

typedef struct job {
  emx_ctx *ctx;
  const emxi_decode *d;
  emxi_work *work;
  int32_t rows, blocks; /* per item; items per (sequence, KV head) */
  double page_z;
} job;

static void load_query(emxi_item *it, int r) {
  const emxi_decode *d = it->d;
  emxi_row *row = &it->row[r];
  float *q = it->w->q + r * EMXI_QLD;
  const char *src = d->q + (size_t)(it->b * d->q_stride[0] + row->h * d->q_stride[1] + row->s * d->q_stride[2]) * emx_dtype_size(d->q_dtype);
  it->k->load[emxi_slot(d->q_dtype)](src, d->kv->D, q);
  double square = 0;
  for (int x = 0; x < d->kv->D; x++) {
    q[x] *= d->scale;
    square += (double)q[x] * q[x];
  }
  row->bad = !(square < INFINITY);
  row->norm = sqrt(square) * (1 + 1e-12);
}

static void run_item(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  const emxi_decode *d = j->d;
  const emx_kv *kv = d->kv;
  const int32_t group = d->H / kv->G, block = (int32_t)(i % j->blocks);
  emxi_item it = {.d = d, .k = emxi_cpu_of(j->ctx)->k, .w = &j->work[worker], .ctx = j->ctx, .page_z = j->page_z,
                  .g = (int32_t)(i / j->blocks % kv->G), .b = (int32_t)(i / j->blocks / kv->G), .first_row = block * j->rows};
  it.bounds = d->reports || d->bound;
  it.table = emxi_decode_entry(d, it.b, &it.length);
  it.pages = emxi_kv_pages_of(kv, it.length);
  const int32_t left = group * d->S - it.first_row;
  it.rows = left < j->rows ? left : j->rows;
  for (int r = 0; r < it.rows; r++) {
    emxi_row *row = &it.row[r];
    const int32_t n = it.first_row + r;
    row->h = it.g * group + n % group;
    row->s = n / group;
    const int64_t visible = it.length - d->S + row->s + 1;
    row->visible = visible > 0 ? visible : 0;
    row->slope = d->slopes ? d->slopes[row->h] : 0;
    row->m = row->below = row->max_unread = -INFINITY;
    row->floor = INFINITY;
    load_query(&it, r);
  }
  memset(it.w->o, 0, (size_t)it.rows * EMXI_QLD * sizeof(double));
  if (d->select.kind != EMX_SELECT_ALL) emxi_cpu_select(&it);
  if (d->select_only) {
    write_lists(&it);
    return;
  }
  for (int r = 0; r < it.rows; r++) {
    emxi_row *row = &it.row[r];
    count_reads(&it, r);
    /* a fixed threshold may lie below m - 1/a, and everything above it has weight */
    if (d->select.tau_mode == EMX_TAU_FIXED && row->has_estimate)
      row->floor = nextafterf((float)(row->estimate / (d->alpha - 1.0)), -INFINITY);
  }
  stream(&it);
  if (emxi_cancelled(it.ctx)) return;
  for (int r = 0; r < it.rows; r++) finish_row(&it, r);
}

emx_status emxi_cpu_decode_run(emx_ctx *ctx, const emxi_decode *d, emxi_arena *arena) {
  const int64_t total = (int64_t)(d->H / d->kv->G) * d->S;
  const int64_t rows = total < EMXI_ITEM_ROWS ? total : EMXI_ITEM_ROWS;
  job j = {.ctx = ctx, .d = d, .rows = (int32_t)rows};
  j.work = emxi_arena_take(arena, ctx->threads, sizeof *j.work);
  for (int32_t t = 0; t < ctx->threads; t++) {
    emxi_work w;
    carve(d, arena, &w, rows);
    if (arena->base && !arena->overflow) j.work[t] = w;
  }
  if (!arena->base) return EMX_OK;
  EMX_TRY(emxi_arena_check(arena, "emx_decode"));
  if (!rows) return EMX_OK;
  j.blocks = (int32_t)((total + rows - 1) / rows);
  if (d->select.kind == EMX_SELECT_GAUSSIAN) j.page_z = emxi_gauss_max_quantile((double)d->select.max_quantile, d->kv->P);
  return emxi_parallel(ctx, (int64_t)d->B * d->kv->G * j.blocks, run_item, &j);
}
