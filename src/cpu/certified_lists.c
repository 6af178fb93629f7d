/* SPDX-License-Identifier: Apache-2.0
 * The check of page lists: what sketches say about the pages that TOPK, GAUSSIAN or a caller left out, after the rows' thresholds
 * are known.
 *
 *   superpages  lower the bounds of pages that may still matter
 *   groups, planes, keys  of the pages that do, best bounds first (emxi_cert_check); of a page that was looked at all keys are at
 *               or below the limit but those in `far`, each with its own bound
 * It goes on to the end as long as a certificate is possible. Once a key is known that is above the limit, a row goes on only if
 * the rest costs little; what it did not get to keeps its bound. Bytes a token at D = 128: 1.3 of superpages; of a page 10 of
 * groups, 64 of planes, and 256 of a key that those leave.
 */
#include "cpu/certified.h"

#include <math.h>
#include <string.h>

#define BEST 16 /* pages of a row that are looked at first */

/* Error of any score of the pages that the row has read (alpha = 1), or of those that have weight. */
static double slack_of(const cert_item *c, const emxi_item *e, int r, const emxi_row *row) {
  double slack = 0;
  if (row->alpha > 1)
    for (int64_t i = 0; i < row->sol.support; i++) slack = fmax(slack, emxi_cert_slack(c, r, row->pos[i], -1));
  else
    for (int64_t p = 0; p < e->pages; p++) {
      if (!e->w->chosen[(row - e->row) * e->w->page_ld + p]) continue;
      for (int64_t t = 0; t < emxi_page_tokens(e, p); t++) slack = fmax(slack, emxi_cert_slack(c, r, (p << c->shift) + t, -1));
    }
  return slack;
}

/* Takes rows [first, first + c->rows) of the item to where their pages can be judged. Returns the rows that ask for it. */
static unsigned open_rows(cert_item *c, emxi_item *e, int first, unsigned *open) {
  const emxi_work *w = e->w;
  const emxi_sketch *s = &c->d->kv->sketch;
  unsigned asks = 0;
  for (int r = 0; r < c->rows; r++) {
    emxi_row *row = &e->row[first + r];
    cert_list *list = &c->own.found[r];
    c->own.left[r] = (emxi_sketch_sink){.up = w->far + (first + r) * EMXI_FAR_LD, .pos = w->far_pos + r * EMXI_FAR_LD};
    list->limit = INFINITY;
    if (row->bad || !(row->max_unread > -INFINITY) || !(row->alpha == 1 ? row->z > 0 : row->sol.support > 0) ||
        (row->alpha > 1 && (row->alpha - 1) * row->max_unread <= emxi_cpu_tau_low(row)) ||
        fabs((double)row->slope) * (double)c->length >= 1e37)
      continue;
    c->query[r] = (cert_query){.alpha = row->alpha,
                               .a = row->alpha > 1 ? row->alpha - 1 : 1,
                               .visible = row->visible,
                               .x = {.slope = (double)row->slope, .slack_0 = row->underflow}};
    emxi_cert_open_query(c, r, s->map + (int64_t)c->g * 3 * s->dp);
    if (c->bad[r]) continue;
    row->slack = slack_of(c, e, r, row);
    if (row->alpha == 1) { /* what lies below is worth a millionth in all; any limit is sound */
      list->limit = (double)row->m + log(row->z) - log((double)c->length) - 14;
    } else {
      const double low = emxi_cpu_tau_low(row) / (row->alpha - 1);
      list->limit = low - 1e-15 * fabs(low);
      *open |= 1u << r;
    }
    if (list->limit > -INFINITY) asks |= 1u << r;
  }
  *open &= asks;
  return asks;
}

/* need[page]: the rows that have not read the page and to whom it may matter. */
static void mark(const cert_item *c, const emxi_item *e, int first, unsigned asks) {
  const emxi_work *w = e->w;
  memset(w->need, 0, (size_t)e->pages);
  for (int r = 0; r < c->rows; r++) {
    if (!(asks >> r & 1)) continue;
    const uint8_t *restrict chosen = w->chosen + (first + r) * w->page_ld;
    const float *restrict upper = w->upper + (first + r) * w->page_ld;
    uint8_t *restrict need = w->need;
    float limit = (float)c->own.found[r].limit;
    if ((double)limit > c->own.found[r].limit) limit = nextafterf(limit, -INFINITY);
    for (int64_t p = 0; p < e->pages; p++) need[p] = (uint8_t)(need[p] | (!chosen[p] & (upper[p] > limit)) << r);
  }
}

static void bound_superpages(cert_item *c, emxi_item *e, int first, unsigned asks) {
  const emxi_work *w = e->w;
  const int64_t per = EMXI_SUPER / c->d->kv->P;
  for (int64_t p = 0; p < c->supers; p++) {
    unsigned rows = 0;
    for (int64_t i = 0; i < per; i++) rows |= w->need[p * per + i];
    c->valid[p] = rows && emxi_sketch_super_valid(c->d->kv, c->table + p * per);
  }
  emxi_cert_superpages(c, c->valid, &c->own, 0, c->supers);
  for (int r = 0; r < c->rows; r++) {
    if (!(asks >> r & 1)) continue;
    float *upper = w->upper + (first + r) * w->page_ld;
    for (int64_t p = 0; p < c->supers; p++)
      for (int64_t i = 0; i < per; i++) upper[p * per + i] = fminf(upper[p * per + i], c->upper[r * c->supers_ld + p]);
  }
}

static void list_page(const emxi_work *w, int64_t p, int64_t *n) {
  if (!w->need[p]) return;
  w->check[*n] = (int32_t)p;
  w->check_rows[(*n)++] = w->need[p];
  w->need[p] = 0;
}

/* Pages that may matter, those first that are among the best of a row: they tell soonest that it has no hope. Returns how many;
 * *few: the rows whose pages have no more than `most` bytes of sketches. */
static int64_t list_pages(const cert_item *c, const emxi_item *e, int first, int64_t most, unsigned *few) {
  const emxi_work *w = e->w;
  const emx_kv *kv = c->d->kv;
  const int64_t page = kv->P / EMXI_GROUP * (int64_t)(sizeof(emxi_sketch_group) + (size_t)kv->sketch.dp * 9);
  int32_t best[CERT_ROWS][BEST];
  int64_t many[CERT_ROWS], n = 0;
  for (int r = 0; r < c->rows; r++) {
    const float *upper = w->upper + (first + r) * w->page_ld;
    many[r] = 0;
    for (int64_t p = 0; p < e->pages; p++) {
      if (!(w->need[p] >> r & 1)) continue;
      int64_t at = many[r] < BEST ? many[r] : BEST;
      many[r]++;
      if (at == BEST && !(upper[p] > upper[best[r][--at]])) continue;
      for (; at > 0 && upper[p] > upper[best[r][at - 1]]; at--) best[r][at] = best[r][at - 1];
      best[r][at] = (int32_t)p;
    }
    *few |= (unsigned)(many[r] * page <= most) << r;
  }
  for (int r = 0; r < c->rows; r++)
    for (int i = 0; i < BEST && i < many[r]; i++) list_page(w, best[r][i], &n);
  for (int64_t p = 0; p < e->pages; p++) list_page(w, p, &n);
  return n;
}

static void check_rows(emxi_item *e, int first) {
  const emxi_work *w = e->w;
  const emx_kv *kv = e->d->kv;
  int8_t q8[2 * CERT_ROWS * EMXI_SKETCH_LD] = {0};
  cert_item c = {.d = e->d,
                 .k = e->k,
                 .sk = emxi_sketch_choose(e->k),
                 .ctx = e->ctx,
                 .table = e->table,
                 .b = e->b,
                 .g = e->g,
                 .rows = e->rows - first < CERT_ROWS ? e->rows - first : CERT_ROWS,
                 .length = e->length,
                 .supers = e->length / EMXI_SUPER,
                 .shift = e->page_shift,
                 .q = w->q + first * EMXI_QLD,
                 .q8 = q8,
                 .upper = w->super,
                 .supers_ld = w->super_ld,
                 .valid = w->valid,
                 .own.cap = EMXI_FAR};
  unsigned open = 0;
  const unsigned asks = open_rows(&c, e, first, &open);
  if (!asks) return;
  mark(&c, e, first, asks);
  bound_superpages(&c, e, first, asks);
  mark(&c, e, first, asks);
  int64_t read = 0;
  for (int64_t p = 0; p < e->pages; p++) read += w->any[p];
  read = read * kv->P * kv->D * (int64_t)emx_dtype_size(kv->dtype) + e->row[first].bytes_meta;
  unsigned few = 0;
  const int64_t n = list_pages(&c, e, first, read, &few);
  emxi_cert_check(&c, w->check, w->check_rows, n, e->d->select.kind == EMX_SELECT_PAGES ? open : open & few, few & asks,
                  read / 4);
  for (int r = 0; r < c.rows; r++) {
    emxi_row *row = &e->row[first + r];
    if (!(asks >> r & 1)) continue;
    float *upper = w->upper + (first + r) * w->page_ld;
    const emxi_sketch_sink *far = &c.own.left[r];
    for (int64_t i = 0; i < n; i++)
      if (w->check_rows[i] >> r & 1) {
        upper[w->check[i]] = -INFINITY;
        row->n_below += kv->P;
      }
    row->limit = c.own.found[r].limit;
    row->far = far->up;
    row->n_far = far->n;
    row->max_unread = row->n_below ? row->limit : -INFINITY;
    for (int64_t p = 0; p < e->pages; p++)
      if (!w->chosen[(first + r) * w->page_ld + p]) row->max_unread = fmax(row->max_unread, (double)upper[p]);
    if (far->n) row->max_unread = fmax(row->max_unread, (double)e->k->max(far->up, far->n));
    row->bytes_meta += c.own.count[r].bytes_meta + c.own.count[r].bytes_k;
  }
}

void emxi_cpu_check_lists(emxi_item *e) {
  if (!e->sparse || !e->bounds || !e->d->kv->sketch.mapped) return;
  for (int first = 0; first < e->rows; first += CERT_ROWS) check_rows(e, first);
}
