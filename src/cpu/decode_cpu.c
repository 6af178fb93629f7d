/* SPDX-License-Identifier: Apache-2.0
 * Decode on the CPU.
 *
 *   s_j = q.k_j + slope (j - i),  o = sum_j [a s_j - tau]_+^(1/a) v_j,  a = alpha-1     (alpha = 1: softmax, one online pass)
 *
 * A work item is (sequence, KV head, up to 32 query rows); it owns those rows of o and their reports. Keys are scored 256
 * positions at a time; what can still be in the support (above the running maximum minus 1/a, T1 of docs/math.md) is kept as
 * (score, position), so tau is solved exactly without another look at K, and values are read for the support only. Lists have
 * room for every token. Traffic: K of the pages read, once per item (N D bytes-per-element), and support * D of V; softmax reads
 * all of V as well. 2 N D FLOP a row. Error: scores and sums of 256 products in float, across blocks in double. Oracle:
 * src/entmax/oracle.c on the stored values.
 *
 * Same support, same bits: scores do not depend on blocking, lists are in position order, tau is canonical (emxi_solve), and
 * values are added in chunks of 256 of the support. So ALL, TOPK with a full budget and any list that covers the support agree
 * exactly.
 */
#include "cpu/decode_cpu.h"

#include "base/num.h"
#include "kv/gaussian.h"

#include <float.h>

void emxi_cpu_carve(const emxi_decode *d, emxi_arena *a, emxi_work *w, int64_t rows, bool with_lists) {
  const int64_t pages = emxi_kv_pages_of(d->kv, d->max_len);
  const bool ladder = with_lists && d->asked == EMX_SELECT_CERTIFIED, sparse = d->select.kind != EMX_SELECT_ALL,
             lists = ladder || (with_lists && (d->per_head || d->alpha > 1.0) && !d->select_only);
  *w = (emxi_work){0};
  w->q = emxi_arena_take(a, rows * EMXI_QLD, sizeof(float));
  w->o = emxi_arena_take(a, rows * EMXI_QLD, sizeof(double));
  w->part = emxi_arena_take(a, rows * EMXI_QLD, sizeof(float));
  w->score = emxi_arena_take(a, rows * EMXI_SLD, sizeof(float));
  w->at = emxi_arena_take(a, rows * EMXI_SLD, sizeof(int32_t));
  w->weight = emxi_arena_take(a, EMXI_SLD, sizeof(float));
  w->index = emxi_arena_take(a, EMXI_SLD, sizeof(int32_t));
  w->offset = emxi_arena_take(a, EMXI_BLOCK, sizeof(int64_t));
  w->rows = emxi_arena_take(a, emxi_rows_bytes(d->kv), 1);
  w->list_ld = lists ? (d->max_len + 64 + 15) / 16 * 16 : 0;
  w->list = emxi_arena_take(a, rows * w->list_ld, sizeof(float));
  w->pos = emxi_arena_take(a, rows * w->list_ld, sizeof(int32_t));
  w->page_ld = sparse || ladder ? (pages + 63) / 64 * 64 : 0;
  w->chosen = emxi_arena_take(a, rows * w->page_ld, 1);
  const int64_t judged = sparse ? w->page_ld : 0;
  w->any = emxi_arena_take(a, judged, 1);
  w->usable = emxi_arena_take(a, judged, 1);
  w->upper = emxi_arena_take(a, rows * judged, sizeof(float));
  w->slack = emxi_arena_take(a, rows * judged, sizeof(float));
  const int64_t gauss = d->select.kind == EMX_SELECT_GAUSSIAN ? rows * judged : 0;
  w->mu = emxi_arena_take(a, gauss, sizeof(float));
  w->sigma = emxi_arena_take(a, gauss, sizeof(float));
  const bool check = sparse && !d->select_only && d->kv->sketch.dp;
  const int64_t checked = check ? judged : 0;
  w->super_ld = check ? (d->max_len / EMXI_SUPER + 64) / 64 * 64 : 0;
  w->super = emxi_arena_take(a, 8 * w->super_ld, sizeof(float));
  w->valid = emxi_arena_take(a, w->super_ld, 1);
  w->check = emxi_arena_take(a, checked, sizeof(int32_t));
  w->check_rows = emxi_arena_take(a, checked, 1);
  w->need = emxi_arena_take(a, checked, 1);
  w->far = emxi_arena_take(a, check ? rows * EMXI_FAR_LD : 0, sizeof(float));
  w->far_pos = emxi_arena_take(a, check ? 8 * EMXI_FAR_LD : 0, sizeof(int32_t));
  w->pick = emxi_arena_take(a, judged, sizeof(float));
  w->spread = emxi_arena_take(a, judged, sizeof(float));
}

/* ---- reading keys */

/* The keys of the next page that will be read. Pages of one head lie G pages of data apart, where a hardware prefetcher fetches
 * mostly what other heads need. */
static void prefetch_next(emxi_item *it) {
  const emx_kv *kv = it->d->kv;
  while (it->next < it->pages && it->sparse && !it->w->any[it->next]) it->next++;
  if (it->next >= it->pages || kv->file) return;
  emxi_prefetch_rows(emxi_kv_k(kv, it->table[it->next++], it->g, 0), kv->k_token, kv, kv->P);
}

/* Scores of the pages of block [start, start + 256) that some row reads. counts[r]: scores of row r, at w->score; their positions
 * are at w->at when `sparse`, else start, start + 1, ... */
static void score_block(emxi_item *it, int64_t start, int64_t *counts) {
  const emx_kv *kv = it->d->kv;
  const emxi_work *w = it->w;
  const int64_t ld = EMXI_SLD, first = start / kv->P;
  const int slot = emxi_slot(kv->dtype), per_block = EMXI_BLOCK / kv->P;
  for (int r = 0; r < it->rows; r++) counts[r] = 0;
  if (kv->file && !it->sparse)
    emxi_kv_file_pages(kv, false, it->g, it->table + first, it->pages - first < per_block ? it->pages - first : per_block,
                       w->rows);
  for (int i = 0; i < per_block; i++) {
    const int64_t page = first + i;
    if (page >= it->pages || (it->sparse && !w->any[page])) continue;
    prefetch_next(it);
    const int64_t n = emxi_page_tokens(it, page), from = page * kv->P;
    const char *keys = kv->file && !it->sparse ? w->rows + (size_t)(i * kv->k_page) * emx_dtype_size(kv->dtype)
                                               : emxi_kv_keys(kv, it->table[page], it->g, 0, n, w->rows);
    bool together = true;
    for (int r = 0; it->sparse && r < it->rows; r++) together &= w->chosen[r * w->page_ld + page] && counts[r] == counts[0];
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

/* add_values for a file, in steps of as many values as the buffer holds. */
static void add_file_values(emxi_item *it, int r, int64_t n, int64_t step) {
  const emx_kv *kv = it->d->kv;
  const emxi_work *w = it->w;
  int64_t at[EMXI_BLOCK];
  if (it->d->S == 1) emxi_kv_file_expect_values(kv, it->g, w->offset, n); /* prefill has just read what it reads again */
  for (int64_t i = 0; i < n; i += step) {
    const int64_t count = n - i < step ? n - i : step;
    emxi_kv_file_values(kv, it->g, w->offset + i, count, w->rows, at);
    it->k->accumulate[emxi_slot(kv->dtype)](w->part + r * EMXI_QLD, kv->D, w->rows, at, w->weight + i, count);
  }
}

/* part += w->weight[0..n) times the values at w->offset. A weight of zero never meets its value: the caller has left those
 * out. */
static void add_values(emxi_item *it, int r, int64_t n) {
  const emx_kv *kv = it->d->kv;
  const emxi_work *w = it->w;
  const size_t es = emx_dtype_size(kv->dtype), bytes = (size_t)kv->D * es;
  const int64_t step = EMXI_PREFETCH / (int64_t)bytes;
  it->row[r].bytes_v += n * emxi_lines((int64_t)bytes);
  if (kv->file) {
    add_file_values(it, r, n, step);
    return;
  }
  const char *values = emxi_kv_v(kv, 0, it->g, 0);
  for (int64_t j = 0; j < step && j < n; j++) emxi_prefetch(values + (size_t)w->offset[j] * es, bytes);
  for (int64_t i = 0; i < n; i += step) { /* one step is read while the next is on its way */
    for (int64_t j = i + step; j < i + 2 * step && j < n; j++) emxi_prefetch(values + (size_t)w->offset[j] * es, bytes);
    it->k->accumulate[emxi_slot(kv->dtype)](w->part + r * EMXI_QLD, kv->D, values, w->offset + i, w->weight + i,
                                            n - i < step ? n - i : step);
  }
}
static inline int64_t value_offset(const emxi_item *it, int64_t position) {
  const emx_kv *kv = it->d->kv;
  const int64_t page = position >> it->page_shift, token = position & (kv->P - 1);
  return it->table[page] * kv->v_page + token * kv->v_token;
}

/* alpha > 1: candidates of a block join the row's list. */
void emxi_cpu_overflows(const emx_kv *kv, const int32_t *table, int32_t g, float *s, const int32_t *at, int64_t start,
                        int64_t n) {
  for (int64_t j = 0; j < n; j++) {
    if (s[j] != -INFINITY) continue;
    const int64_t position = at ? at[j] : start + j;
    char row[EMXI_QLD * sizeof(float)];
    const void *key = emxi_kv_keys(kv, table[position / kv->P], g, position % kv->P, 1, row);
    bool finite = true;
    for (int32_t x = 0; x < kv->D; x++) finite &= isfinite(emxi_load(key, kv->dtype, x)) != 0;
    if (finite) s[j] = NAN;
  }
}

static void keep_block(emxi_item *it, int r, int64_t start, int64_t n) {
  const emxi_work *w = it->w;
  emxi_row *row = &it->row[r];
  float *s = w->score + r * EMXI_SLD;
  if (it->k->min(s, n) == -INFINITY)
    emxi_cpu_overflows(it->d->kv, it->table, it->g, s, it->sparse ? w->at + r * EMXI_SLD : NULL, start, n);
  const float m = it->k->max(s, n);
  if (m > row->m) {
    row->m = m;
    row->bad |= m == INFINITY;
    row->below = emxi_below(m, row->alpha);
  }
  if (row->bad) return;
  const float thr = row->below < row->floor ? row->below : row->floor;
  row->n +=
      it->k->keep(s, it->sparse ? w->at + r * EMXI_SLD : NULL, (int32_t)start, n, thr, row->list + row->n, row->pos + row->n);
}

/* ---- softmax */

bool emxi_cpu_softmax_block(const emxi_table *k, int d, const float *s, int64_t n, emxi_partial *c, float *part, float *p) {
  const float m = k->max(s, n);
  int64_t finite = 0, nans = 0;
  for (int64_t j = 0; j < n; j++) {
    finite += s[j] > -INFINITY;
    nans += s[j] != s[j];
  }
  c->n += finite;
  c->bad |= nans || m == INFINITY;
  if (c->bad || m == -INFINITY) return false;
  if (m > c->m) {
    const float f = expf(c->m - m);
    for (int x = 0; x < d; x++) part[x] *= f;
    c->z *= (double)f;
    c->m = m;
  }
  c->z += k->exps(s, n, c->m, p);
  return true;
}

void emxi_cpu_softmax_merge(int d, emxi_row *row, const emxi_partial *c, const float *part, double *o) {
  row->n += c->n;
  row->bad |= c->bad;
  if (row->bad || c->m == -INFINITY) return;
  double g = 1;
  if (c->m > row->m) {
    const double f = exp((double)row->m - (double)c->m);
    for (int x = 0; x < d; x++) o[x] *= f;
    row->z *= f;
    row->m = c->m;
  } else {
    g = exp((double)c->m - (double)row->m);
  }
  row->z += g * c->z;
  for (int x = 0; x < d; x++) o[x] += g * (double)part[x];
}

static void softmax_block(emxi_item *it, int r, int64_t start, int64_t n) {
  const emxi_work *w = it->w;
  emxi_row *row = &it->row[r];
  const int32_t *at = w->at + r * EMXI_SLD;
  float *s = w->score + r * EMXI_SLD;
  if (it->k->min(s, n) == -INFINITY) emxi_cpu_overflows(it->d->kv, it->table, it->g, s, it->sparse ? at : NULL, start, n);
  if (!emxi_cpu_softmax_block(it->k, it->d->kv->D, w->score + r * EMXI_SLD, n, &row->chunk, w->part + r * EMXI_QLD, w->weight))
    return;
  const int64_t c = it->k->keep(w->weight, NULL, 0, n, 0.0f, w->weight, w->index);
  for (int64_t j = 0; j < c; j++) w->offset[j] = value_offset(it, it->sparse ? at[w->index[j]] : start + w->index[j]);
  add_values(it, r, c);
}

void emxi_cpu_stream(emxi_item *it) {
  const emx_kv *kv = it->d->kv;
  const emxi_work *w = it->w;
  const int per_block = EMXI_BLOCK / kv->P;
  int64_t counts[EMXI_ITEM_ROWS], end = 0;
  for (int r = 0; r < it->rows; r++)
    if (it->row[r].visible > end) end = it->row[r].visible;
  for (int64_t bytes = 0; bytes < EMXI_PREFETCH; bytes += kv->P * kv->D * (int64_t)emx_dtype_size(kv->dtype)) prefetch_next(it);
  for (int64_t start = 0; start < end; start += EMXI_BLOCK) {
    if (start % EMXI_CHUNK == 0)
      for (int r = 0; r < it->rows; r++) {
        if (it->row[r].alpha != 1.0) continue;
        it->row[r].chunk = (emxi_partial){.m = -INFINITY};
        memset(w->part + r * EMXI_QLD, 0, (size_t)kv->D * sizeof(float));
      }
    bool found = !it->sparse;
    for (int64_t p = start / kv->P; !found && p < start / kv->P + per_block && p < it->pages; p++) found = w->any[p];
    if (found) score_block(it, start, counts);
    for (int r = 0; found && r < it->rows; r++) {
      if (!counts[r] || it->row[r].bad) continue;
      if (it->row[r].alpha == 1.0)
        softmax_block(it, r, start, counts[r]);
      else
        keep_block(it, r, start, counts[r]);
    }
    if ((start + EMXI_BLOCK) % EMXI_CHUNK == 0 || start + EMXI_BLOCK >= end)
      for (int r = 0; r < it->rows; r++)
        if (it->row[r].alpha == 1.0)
          emxi_cpu_softmax_merge(kv->D, &it->row[r], &it->row[r].chunk, w->part + r * EMXI_QLD, w->o + r * EMXI_QLD);
    if (emxi_cancelled(it->ctx)) return;
  }
}

/* ---- thresholds and results */

/* Tokens [at, at + n) of the row's support, where the caller wants to know them. */
static void list_support(const emxi_item *it, int r, int64_t at, const int32_t *pos, const float *weight, int64_t n) {
  const emxi_decode *d = it->d;
  const emxi_row *row = &it->row[r];
  if (!d->support_count || at >= d->support_width) return;
  if (n > d->support_width - at) n = d->support_width - at;
  memcpy(d->support_index + it->b * d->index_stride[0] + row->h * d->index_stride[1] + row->s * d->index_stride[2] + at, pos,
         (size_t)n * sizeof *pos);
  memcpy(d->support_weight + it->b * d->weight_stride[0] + row->h * d->weight_stride[1] + row->s * d->weight_stride[2] + at,
         weight, (size_t)n * sizeof *weight);
}
/* Listed weights exp(s - m) of softmax become shares of their sum z. */
static void list_shares(const emxi_item *it, int r, int64_t n, double z) {
  const emxi_decode *d = it->d;
  const emxi_row *row = &it->row[r];
  float *weight = d->support_weight + it->b * d->weight_stride[0] + row->h * d->weight_stride[1] + row->s * d->weight_stride[2];
  for (int64_t i = 0; i < n && i < d->support_width; i++) weight[i] = (float)((double)weight[i] / z);
}
/* alpha = 1, of which no list of scores is kept: the keys that the row has read are scored again, to the same bits. */
static void list_softmax(const emxi_item *it, int r) {
  const emx_kv *kv = it->d->kv;
  const emxi_work *w = it->w;
  const emxi_row *row = &it->row[r];
  float *s = w->score + r * EMXI_SLD;
  int64_t found = 0;
  for (int64_t p = 0; p < emxi_kv_pages_of(kv, row->visible) && found < it->d->support_width; p++) {
    if (it->sparse && !w->chosen[r * w->page_ld + p]) continue;
    const int64_t from = p * kv->P, left = row->visible - from, n = left < kv->P ? left : kv->P;
    it->k->dot[emxi_slot(kv->dtype)](w->q + r * EMXI_QLD, EMXI_QLD, 1, emxi_kv_keys(kv, it->table[p], it->g, 0, n, w->rows),
                                     kv->k_token, n, kv->D, s, EMXI_SLD);
    if (row->slope != 0) it->k->kv->bias(s, n, row->slope, (float)(from - (row->visible - 1)));
    const int64_t c = it->k->keep(s, NULL, (int32_t)from, n, -INFINITY, s, w->index);
    it->k->exps(s, c, row->m, w->weight);
    list_support(it, r, found, w->index, w->weight, c);
    found += c;
  }
  list_shares(it, r, found, row->z);
}
static void finish_support(const emxi_item *it, int r) {
  const emxi_decode *d = it->d;
  const emxi_row *row = &it->row[r];
  d->support_count[it->b * d->count_stride[0] + row->h * d->count_stride[1] + row->s * d->count_stride[2]] =
      (int32_t)row->support;
  if (row->alpha == 1.0 && row->support) {
    if (row->ladder)
      list_shares(it, r, row->support, row->z);
    else
      list_softmax(it, r);
  }
}

/* o += sum of weights times values over the candidates; returns the sum of the weights and counts those that are not zero. */
static double gather(emxi_item *it, int r, const emxi_solution *sol, int64_t *support) {
  const emxi_work *w = it->w;
  const float *list = it->row[r].list;
  const int32_t *pos = it->row[r].pos;
  float *part_sum = w->part + r * EMXI_QLD;
  double *o = w->o + r * EMXI_QLD, sum = 0;
  *support = 0;
  for (int64_t i = 0; i < sol->support; i += EMXI_BLOCK) {
    emxi_solution part = *sol;
    part.support = sol->support - i < EMXI_BLOCK ? sol->support - i : EMXI_BLOCK;
    emxi_weights(it->k, it->row[r].alpha, &part, list + i, w->weight);
    /* a small power of a small number may be zero in float: such a token is not in the support, and its value is not touched */
    const int64_t c = it->k->keep(w->weight, pos + i, 0, part.support, 0.0f, w->weight, w->index);
    for (int64_t j = 0; j < c; j++) w->offset[j] = value_offset(it, w->index[j]);
    double four[4] = {0};
    int64_t j = 0;
    for (; j + 4 <= c; j += 4)
      for (int x = 0; x < 4; x++) four[x] += (double)w->weight[j + x];
    for (; j < c; j++) four[0] += (double)w->weight[j];
    sum += (four[0] + four[1]) + (four[2] + four[3]);
    memset(part_sum, 0, (size_t)it->d->kv->D * sizeof(float));
    add_values(it, r, c);
    for (int x = 0; x < it->d->kv->D; x++) o[x] += (double)part_sum[x];
    list_support(it, r, *support, w->index, w->weight, c);
    *support += c;
  }
  return sum;
}

/* alpha = 1: the same for a list of scores, weights exp(s - m). */
static double gather_softmax(emxi_item *it, int r, int64_t *support) {
  const emxi_work *w = it->w;
  const emxi_row *row = &it->row[r];
  double *o = w->o + r * EMXI_QLD, sum = 0;
  *support = 0;
  for (int64_t i = 0; i < row->n; i += EMXI_BLOCK) {
    const int64_t n = row->n - i < EMXI_BLOCK ? row->n - i : EMXI_BLOCK;
    sum += it->k->exps(row->list + i, n, row->m, w->weight);
    const int64_t c = it->k->keep(w->weight, row->pos + i, 0, n, 0.0f, w->weight, w->index);
    for (int64_t j = 0; j < c; j++) w->offset[j] = value_offset(it, w->index[j]);
    memset(w->part + r * EMXI_QLD, 0, (size_t)it->d->kv->D * sizeof(float));
    add_values(it, r, c);
    for (int x = 0; x < it->d->kv->D; x++) o[x] += (double)w->part[r * EMXI_QLD + x];
    list_support(it, r, *support, w->index, w->weight, c);
    *support += c;
  }
  return sum;
}

/* EMX_TAU_CORRECTED: steps on the candidates from the estimate, inside [m-1, m] (relative: t in [-1, 0]). */
static double corrected(const emxi_item *it, double alpha, const float *list, int64_t n, double m, double t, int steps) {
  double lo = -1, hi = 0;
  t = fmin(fmax(t, lo), hi);
  for (int i = 0; i < steps; i++) {
    double f, g;
    emxi_power_sums(it->k, alpha, list, n, m, t, &f, &g);
    if (f >= 1.0)
      lo = t;
    else
      hi = t;
    const double next = t + (f - 1.0) * (alpha - 1.0) / g; /* not finite where nothing is active */
    t = next > lo && next < hi ? next : 0.5 * (lo + hi);
  }
  return t;
}

static void write_row(const emxi_item *it, int r, double scale, bool nan) {
  const emxi_decode *d = it->d;
  const emxi_row *row = &it->row[r];
  const double *o = it->w->o + r * EMXI_QLD;
  char *out =
      d->o + (size_t)(it->b * d->o_stride[0] + row->h * d->o_stride[1] + row->s * d->o_stride[2]) * emx_dtype_size(d->o_dtype);
  for (int x = 0; x < d->kv->D; x++) emxi_store(out, d->o_dtype, x, nan ? (double)NAN : o[x] * scale);
}

static float round_up(double x) {
  float f = (float)x;
  return (double)f >= x ? f : nextafterf(f, INFINITY);
}

/* What the row has read, in tokens, pages and lines of K. */
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

void emxi_cpu_solve_row(emxi_item *it, int r) {
  const emxi_decode *d = it->d;
  emxi_row *row = &it->row[r];
  const double alpha = row->alpha, a = alpha - 1.0;
  float *list = row->list;
  int32_t *pos = row->pos;
  row->tau = NAN;
  if (row->bad) return;
  if (alpha == 1.0) {
    row->exact = true;
    row->support = row->n;
    if (row->ladder) {
      row->m = it->k->max(list, row->n);
      row->z = gather_softmax(it, r, &row->support);
    }
    row->mass = row->support > 0;
    write_row(it, r, row->z > 0 ? 1.0 / row->z : 0.0, false);
    return;
  }
  const bool estimated = d->select.tau_mode != EMX_TAU_EXACT && row->has_estimate;
  for (int64_t i = 0; estimated && i < row->n; i++) row->bad |= list[i] != list[i];
  if (row->bad) return;
  if (estimated) {
    emxi_solution sol = {.m = row->m, .support = row->n, .t = row->n ? row->estimate - a * (double)row->m : 0};
    if (d->select.tau_mode == EMX_TAU_CORRECTED && row->n)
      sol.t = corrected(it, alpha, list, row->n, sol.m, sol.t, d->select.tau_steps ? d->select.tau_steps : 3);
    row->tau = row->n ? sol.t + a * sol.m : row->estimate;
    row->mass = gather(it, r, &sol, &row->support);
  }
  if (!estimated ||
      (it->bounds && row->max_unread > -INFINITY)) { /* an estimated threshold still needs the exact one for its bound */
    row->sol = emxi_solve(it->k, alpha, list, pos, row->n);
    row->bad = row->sol.nonfinite;
    if (!row->bad && !estimated) {
      row->exact = true;
      row->tau = emxi_tau(&row->sol, alpha);
      row->mass = gather(it, r, &row->sol, &row->support);
    }
  }
  if (!row->bad) write_row(it, r, 1.0, false);
}

void emxi_cpu_report_row(emxi_item *it, int r) {
  const emxi_decode *d = it->d;
  emxi_row *row = &it->row[r];
  const double a = row->alpha > 1 ? row->alpha - 1.0 : 1.0;
  const bool unread = row->max_unread > -INFINITY;
  double delta = 0;
  if (row->bad) {
    row->tau = row->mass = NAN;
    row->support = 0;
    delta = 1;
    write_row(it, r, 0, true);
  } else if (row->ladder) {
    delta = row->delta;
  } else if (it->bounds && unread && !(row->exact && row->alpha > 1 && a * row->max_unread <= emxi_cpu_tau_low(row))) {
    delta = emxi_cpu_dropped(it, r);
    row->exact &= row->alpha == 1;
  }
  if (d->support_count) finish_support(it, r);
  if (!d->reports) return;
  if (!row->ladder) count_reads(it, r);
  emx_report rep = {.tau = (float)row->tau,
                    .mass = (float)row->mass,
                    .support = (int32_t)row->support,
                    .tokens = (int32_t)row->tokens,
                    .pages = (int32_t)row->pages,
                    .select = (uint8_t)d->asked,
                    .bytes_k = row->bytes_k,
                    .bytes_v = row->bytes_v,
                    .bytes_meta = row->bytes_meta};
  rep.delta_bound = round_up(fmin(delta, 1.0));
  rep.max_unread = unread ? round_up(a * row->max_unread) : -INFINITY;
  rep.path = row->ladder ? EMX_PATH_LADDER : row->tokens == row->visible ? EMX_PATH_ALL : EMX_PATH_PAGES;
  const bool certified = !row->bad && row->exact && (row->alpha > 1.0 || !unread) && delta == 0;
  rep.flags = (uint8_t)((certified ? EMX_REPORT_CERTIFIED : 0) | (row->bad ? EMX_REPORT_NONFINITE : 0));
  rep.stopped_by = row->ladder                                                 ? row->stopped_by
                   : unread && !certified && d->select.kind == EMX_SELECT_TOPK ? EMX_STOP_BUDGET
                                                                               : EMX_STOP_DONE;
  memcpy(d->reports + (((int64_t)it->b * d->H + row->h) * d->S + row->s) * d->report_stride, &rep, sizeof rep);
}

void emxi_cpu_finish_row(emxi_item *it, int r) {
  emxi_cpu_solve_row(it, r);
  emxi_cpu_report_row(it, r);
}

void emxi_cpu_write_lists(const emxi_item *it) {
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
          row->max_unread > -INFINITY ? round_up((row->alpha == 1.0 ? 1.0 : row->alpha - 1.0) * row->max_unread) : -INFINITY;
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

void emxi_cpu_load_query(const emxi_table *k, const emxi_decode *d, int32_t b, emxi_row *row, float *q) {
  const size_t es = emx_dtype_size(d->q_dtype);
  k->load[emxi_slot(d->q_dtype)](d->q + (size_t)(b * d->q_stride[0] + row->h * d->q_stride[1] + row->s * d->q_stride[2]) * es,
                                 d->kv->D, q);
  double square = 0, lost = 0;
  for (int x = 0; x < d->kv->D; x++) {
    const float before = q[x];
    q[x] *= d->scale;
    square += (double)q[x] * (double)q[x];
    /* Below the normal floats the product is off by up to 2^-150, or by all of 2^-126 in a thread that flushes subnormals to
     * zero; a key element is below 2^128. */
    if (before != 0 && fabsf(q[x]) < FLT_MIN) lost += q[x] == 0 ? fabs((double)before * (double)d->scale) + 0x1p-150 : 0x1p-150;
  }
  row->underflow = lost * 0x1p128;
  row->bad = !(square < INFINITY);
  row->norm = sqrt(square) * (1 + 1e-12);
}

void emxi_cpu_open_item(emxi_item *it, emx_ctx *ctx, const emxi_decode *d, emxi_work *w, int32_t b, int32_t g, int32_t first_row,
                        int32_t rows) {
  const emx_kv *kv = d->kv;
  const int32_t group = d->H / kv->G;
  *it = (emxi_item){.d = d, .k = emxi_cpu_of(ctx)->k, .w = w, .ctx = ctx, .g = g, .b = b, .first_row = first_row, .rows = rows};
  it->bounds = d->reports || d->bound;
  it->page_shift = kv->P == 16 ? 4 : kv->P == 32 ? 5 : 6;
  it->table = emxi_decode_entry(d, b, &it->length);
  it->pages = emxi_kv_pages_of(kv, it->length);
  if (group * d->S - first_row < rows) it->rows = group * d->S - first_row;
  for (int r = 0; r < it->rows; r++) {
    emxi_row *row = &it->row[r];
    row->h = g * group + (first_row + r) % group;
    row->s = (first_row + r) / group;
    const int64_t visible = it->length - d->S + row->s + 1;
    row->visible = visible > 0 ? visible : 0;
    row->slope = d->slopes ? d->slopes[row->h] : 0;
    row->alpha = emxi_decode_alpha(d, row->h);
    row->m = row->below = row->max_unread = -INFINITY;
    row->floor = INFINITY;
    row->list = w->list + r * w->list_ld;
    row->pos = w->pos + r * w->list_ld;
    emxi_cpu_load_query(it->k, d, b, row, w->q + r * EMXI_QLD);
    memset(w->o + r * EMXI_QLD, 0, EMXI_QLD * sizeof(double));
  }
}

static void run_item(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  const emxi_decode *d = j->d;
  const int32_t G = d->kv->G;
  emxi_item it;
  emxi_cpu_open_item(&it, j->ctx, d, &j->work[worker], (int32_t)(i / j->blocks / G), (int32_t)(i / j->blocks % G),
                     (int32_t)(i % j->blocks) * j->rows, j->rows);
  it.page_z = j->page_z;
  if (d->select.kind != EMX_SELECT_ALL) emxi_cpu_select(&it);
  if (d->select_only) {
    emxi_cpu_write_lists(&it);
    return;
  }
  for (int r = 0; r < it.rows; r++) {
    emxi_row *row = &it.row[r];
    /* a fixed threshold may lie below m - 1/a, and everything above it has weight */
    if (d->select.tau_mode == EMX_TAU_FIXED && row->has_estimate)
      row->floor = nextafterf((float)(row->estimate / (row->alpha - 1.0)), -INFINITY);
  }
  emxi_cpu_stream(&it);
  if (emxi_cancelled(it.ctx)) return;
  for (int r = 0; r < it.rows; r++) emxi_cpu_solve_row(&it, r);
  emxi_cpu_check_lists(&it);
  for (int r = 0; r < it.rows; r++) emxi_cpu_report_row(&it, r);
}

static emx_status run(emx_ctx *ctx, const emxi_decode *d, emxi_arena *arena) {
  const int64_t total = (int64_t)(d->H / d->kv->G) * d->S;
  const int64_t rows = total < EMXI_ITEM_ROWS ? total : EMXI_ITEM_ROWS;
  if (d->select.kind == EMX_SELECT_ALL && d->S == 1 && !d->select_only) return emxi_cpu_sweep(ctx, d, arena);
  if (d->select.kind == EMX_SELECT_CERTIFIED) return emxi_cpu_certified(ctx, d, arena);
  job j = {.ctx = ctx, .d = d, .rows = (int32_t)rows};
  j.work = emxi_arena_take(arena, ctx->threads, sizeof *j.work);
  for (int32_t t = 0; t < ctx->threads; t++) {
    emxi_work w;
    emxi_cpu_carve(d, arena, &w, rows, true);
    if (arena->base && !arena->overflow) j.work[t] = w;
  }
  if (!arena->base) return EMX_OK;
  EMX_TRY(emxi_arena_check(arena, "emx_decode"));
  if (!rows) return EMX_OK;
  j.blocks = (int32_t)((total + rows - 1) / rows);
  if (d->select.kind == EMX_SELECT_GAUSSIAN) j.page_z = emxi_gauss_max_quantile((double)d->select.max_quantile, d->kv->P);
  return emxi_parallel(ctx, (int64_t)d->B * d->kv->G * j.blocks, run_item, &j);
}

/* K and V in a file: reads may fail when some rows have been written. So outputs and reports reach the caller when all is
 * known. */
static emx_status run_file(emx_ctx *ctx, const emxi_decode *d, emxi_arena *arena) {
  const size_t es = emx_dtype_size(d->o_dtype);
  const int64_t rows = (int64_t)d->B * d->H * d->S, D = d->kv->D;
  emxi_decode staged = *d;
  staged.o = emxi_arena_take(arena, rows * D, sizeof(float));
  staged.reports = emxi_arena_take(arena, rows, sizeof(emx_report));
  staged.report_stride = sizeof(emx_report);
  int32_t *count = emxi_arena_take(arena, rows, sizeof *count);
  staged.o_stride[0] = (int64_t)d->H * d->S * D;
  staged.o_stride[1] = d->S * D;
  staged.o_stride[2] = D;
  if (!arena->base) return run(ctx, &staged, arena);
  EMX_TRY(emxi_arena_check(arena, "emx_decode"));
  if (!d->reports) staged.reports = NULL;
  if (d->support_count) { /* the lists themselves go where they belong: without their counts they say nothing */
    staged.support_count = count;
    staged.count_stride[0] = (int64_t)d->H * d->S;
    staged.count_stride[1] = d->S;
    staged.count_stride[2] = 1;
  }
  EMX_TRY(emxi_kv_file_begin(d->kv, "emx_decode"));
  EMX_TRY(run(ctx, &staged, arena));
  EMX_TRY(emxi_kv_file_end(d->kv, "emx_decode"));
  for (int64_t i = 0; i < rows; i++) {
    const int64_t b = i / d->S / d->H, h = i / d->S % d->H, s = i % d->S;
    memcpy(d->o + (size_t)(b * d->o_stride[0] + h * d->o_stride[1] + s * d->o_stride[2]) * es, staged.o + (size_t)(i * D) * es,
           (size_t)D * es);
    if (d->support_count) d->support_count[b * d->count_stride[0] + h * d->count_stride[1] + s * d->count_stride[2]] = count[i];
    if (d->reports) memcpy(d->reports + i * d->report_stride, staged.reports + i * staged.report_stride, sizeof(emx_report));
  }
  return EMX_OK;
}

emx_status emxi_cpu_decode_run(emx_ctx *ctx, const emxi_decode *d, emxi_arena *arena) {
  return d->kv->file && !d->select_only ? run_file(ctx, d, arena) : run(ctx, d, arena);
}
