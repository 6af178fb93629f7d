/* SPDX-License-Identifier: Apache-2.0
 * Upper bounds of scores from key sketches: superpages, groups, the two planes of codes.
 *
 *   q.k = q.offset + q'.c + q'.(y - c),   q' = s1 a + s2 b + rest
 *   superpage   q.offset + s1 a.c                    + e1 |c|                       + |q'| radius
 *   group       q.offset + (s1 a + s2 b).c           + e2 |c|                       + |q'| radius
 *   planes      the same centre + s1 a.planes        + e2 |c| + e1 (radius + error) + |q'| error
 * plus the best bias of ALiBi and the error of a computed score, so that the bound is above the true score and above the one that the
 * library would compute. The products with a and b are integers and exact; the rest is double, whose rounding `slack` covers.
 */
#include "cpu/certified.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define LD EMXI_SKETCH_LD
#define SUPER_BLOCK 64
#define CERT_HOT 64

static float float_up(double x) {
  float f = (float)x;
  if (!(f == f)) return INFINITY;
  return (double)f >= x ? f : nextafterf(f, INFINITY);
}

void emxi_cert_open_query(cert_item *it, int r, const float *map) {
  const int32_t D = it->d->kv->D, dp = it->d->kv->sketch.dp;
  const float *q = it->q + r * EMXI_QLD;
  int8_t *a = it->q8 + r * LD, *b = it->q8 + (it->rows + r) * LD;
  cert_query *c = &it->query[r];
  double w[LD], top = 0, square = 0, raw = 0, one = 0, two = 0, start = 0, size = 0;
  memset(a, 0, LD);
  memset(b, 0, LD);
  for (int32_t i = 0; i < D; i++) {
    w[i] = (double)q[i] * (double)map[dp + i];
    top = fmax(top, fabs(w[i]));
    square += w[i] * w[i];
    raw += (double)q[i] * (double)q[i];
    start += (double)q[i] * (double)map[i];
    size += fabs((double)q[i] * (double)map[i]);
  }
  c->s1 = top / 127;
  c->s2 = c->s1 / 254;
  c->sum_a = c->sum_b = 0;
  for (int32_t i = 0; i < D && c->s2 > 0; i++) {
    const double x = fmin(fmax(nearbyint(w[i] / c->s1), -127), 127), rest = w[i] - c->s1 * x,
                 y = fmin(fmax(nearbyint(rest / c->s2), -127), 127), left = rest - c->s2 * y;
    a[i] = (int8_t)x;
    b[i] = (int8_t)y;
    c->sum_a += x;
    c->sum_b += y;
    one += rest * rest;
    two += left * left;
  }
  c->norm = sqrt(square) * (1 + 1e-12) + 1e-300;
  c->raw = sqrt(raw) * (1 + 1e-12) + 1e-300;
  if (!(c->s2 > 0)) one = two = square; /* zero, or too small for its own step */
  c->e1 = sqrt(one) * (1 + 1e-12) + 0x1p-48 * c->norm;
  c->e2 = sqrt(two) * (1 + 1e-12) + 0x1p-48 * c->norm;
  c->start = start;
  /* (2D+8) 2^-24 A as for pages (select_cpu.c), A <= |q| |k|; products and elements below the normal floats may be lost */
  c->slack_k = (2 * D + 8) * 0x1p-24 * 1.01 * c->raw;
  c->slack_0 += 1e-35 + c->raw * sqrt(D) * 0x1p-124 + 1e-12 * size;
  it->bad[r] |= !(c->norm < INFINITY) || !(fabs(c->start) < INFINITY);
}

/* Best bias over positions [from, from + n) into *best; what its rounding may add. */
static inline double bias_of(const cert_query *c, int64_t from, int64_t n, double *best) {
  if (c->slope == 0) {
    *best = 0;
    return 0;
  }
  const double x = c->slope * (double)(from - (c->visible - 1)), y = c->slope * (double)(from + n - c->visible);
  *best = fmax(x, y);
  return 0x1p-22 * fmax(fabs(x), fabs(y));
}

/* What every bound of keys with |k| <= norm_k adds, for a sum whose parts are at most `size`. */
static inline double slack_of(const cert_query *c, double norm_k, double size) {
  return c->slack_k * norm_k + c->slack_0 + 1e-12 * size;
}

/* A score may overflow on the way: such keys are read, as every other path would. */
static inline bool overflows(const cert_query *c, double norm_k) { return !(c->raw * norm_k < 1e37); }

/* ---- superpages */

static void keep_best(cert_slot *slot, int r, int which, double value, int32_t super) {
  int at = CERT_SEEDS;
  while (at > 0 && (slot->best[r][which][at - 1].super < 0 || value > slot->best[r][which][at - 1].value)) at--;
  if (at == CERT_SEEDS) return;
  for (int i = CERT_SEEDS - 1; i > at; i--) slot->best[r][which][i] = slot->best[r][which][i - 1];
  slot->best[r][which][at].value = value;
  slot->best[r][which][at].super = super;
}

void emxi_cert_superpages(cert_item *it, cert_slot *slot, int64_t from, int64_t to) {
  const emx_kv *kv = it->d->kv;
  const emxi_sketch *s = &kv->sketch;
  const int64_t per = EMXI_SUPER / kv->P, codes = s->dp / 2;
  const uint8_t *base = s->super + (int64_t)it->g * kv->max_pages * s->super_ld;
  for (int r = 0; r < it->rows; r++)
    for (int w = 0; w < 2; w++)
      for (int i = 0; i < CERT_SEEDS; i++) slot->best[r][w][i].super = -1;
  for (int64_t at = from; at < to; at += SUPER_BLOCK) {
    const uint8_t *record[SUPER_BLOCK];
    int32_t dot[CERT_ROWS * SUPER_BLOCK], which[SUPER_BLOCK];
    const int64_t end = at + SUPER_BLOCK < to ? at + SUPER_BLOCK : to;
    int64_t n = 0;
    for (int64_t p = at; p < end; p++) {
      const int32_t *pages = it->table + p * per;
      if (p + 24 < to) __builtin_prefetch(base + it->table[(p + 25) * per - 1] * s->super_ld, 0, 2);
      if (emxi_sketch_super_valid(kv, pages)) {
        record[n] = base + pages[per - 1] * s->super_ld;
        which[n++] = (int32_t)p;
      } else {
        for (int r = 0; r < it->rows; r++) it->upper[r * it->supers_ld + p] = INFINITY;
      }
    }
    it->sk->nibbles(it->q8, it->rows, record, n, s->dp, dot, SUPER_BLOCK);
    for (int64_t i = 0; i < n; i++) {
      emxi_sketch_super x;
      memcpy(&x, record[i] + codes, sizeof x);
      for (int r = 0; r < it->rows; r++) {
        const cert_query *c = &it->query[r];
        double best;
        const double loose = bias_of(c, (int64_t)which[i] * EMXI_SUPER, EMXI_SUPER, &best), step = (double)x.step_c,
                     centre = step * c->s1 * ((double)dot[r * SUPER_BLOCK + i] - 7.5 * c->sum_a), mid = c->start + centre + best,
                     reach = c->e1 * (double)x.norm_c + c->norm * (double)x.radius,
                     up = mid + reach + loose + slack_of(c, (double)x.norm_k, fabs(centre) + fabs(best) + reach);
        const bool fine = x.radius < INFINITY && !overflows(c, (double)x.norm_k);
        it->upper[r * it->supers_ld + which[i]] = fine ? float_up(up) : INFINITY;
        if (!fine) continue;
        keep_best(slot, r, 0, mid, which[i]);
        keep_best(slot, r, 1, up, which[i]);
      }
    }
    for (int r = 0; r < it->rows; r++) slot->count[r].bytes_meta += n * emxi_lines(codes + (int64_t)sizeof(emxi_sketch_super));
  }
}

/* ---- groups */

/* One group under judgement. */
typedef struct group {
  int64_t at;    /* index in the head's arrays */
  int64_t from;  /* position of its first key */
  unsigned rows; /* rows that it may matter to */
  double mid[CERT_ROWS], base[CERT_ROWS]; /* q.offset + q'.c + best bias; what every bound adds */
} group;

/* The largest integer whose sum mid + loose + scale (i - zero) is at or below the limit, or less. */
static inline int32_t threshold(double limit, double mid, double loose, double scale, double zero) {
  const double room = limit - mid - loose;
  if (!(scale > 0)) return room >= 0 ? INT32_MAX : INT32_MIN;
  double x = room / scale + zero;
  x -= 1e-9 * (fabs(x) + fabs(zero)) + 1e-6;
  if (x >= 0x1p30) return INT32_MAX;
  if (!(x > -0x1p30)) return INT32_MIN;
  return (int32_t)floor(x);
}

static inline unsigned above(const int32_t *dot, int32_t t) {
  unsigned mask = 0;
  for (int i = 0; i < EMXI_GROUP; i++) mask |= (unsigned)(dot[i] > t) << i;
  return mask;
}

static inline double loose2(const cert_query *c, const emxi_sketch_group *g) {
  return c->norm * (double)g->error2 + c->e1 * ((double)g->radius + (double)g->error2);
}
static inline double loose4(const cert_query *c, const emxi_sketch_group *g) {
  return c->norm * (double)g->error4 + c->e1 * ((double)g->radius + (double)g->error4);
}

/* Centres and balls of n groups; those that may matter stay, in order. Groups without a description go to *exact. */
static int64_t judge(cert_item *it, group *groups, int64_t n, const double *limit, cert_count *count, group *exact, int64_t *n_exact) {
  const emxi_sketch *s = &it->d->kv->sketch;
  const emxi_sketch_group *head = s->group + (int64_t)it->g * s->groups;
  const uint8_t *centres = s->centre + (int64_t)it->g * s->groups * s->dp, *codes[CERT_BLOCK];
  int32_t dot[2 * CERT_ROWS * CERT_BLOCK];
  int64_t has[CERT_BLOCK], n_codes = 0, left = 0;
  for (int64_t i = 0; i < n; i++) {
    has[i] = -1;
    if (!(head[groups[i].at].step_c > 0)) continue;
    has[i] = n_codes;
    codes[n_codes++] = centres + groups[i].at * s->dp;
  }
  it->sk->bytes(it->q8, 2 * it->rows, codes, n_codes, s->dp, dot, CERT_BLOCK);
  for (int r = 0; r < it->rows; r++)
    count[r].bytes_meta += n * (int64_t)sizeof(emxi_sketch_group) + n_codes * emxi_lines(s->dp);
  for (int64_t i = 0; i < n; i++) {
    const emxi_sketch_group *g = &head[groups[i].at];
    group *x = &groups[i];
    bool described = g->radius < INFINITY;
    unsigned rows = 0;
    for (int r = 0; r < it->rows && described; r++) {
      const cert_query *c = &it->query[r];
      double best, centre = 0;
      const double loose = bias_of(c, x->from, EMXI_GROUP, &best);
      if (has[i] >= 0)
        centre = (double)g->step_c * (c->s1 * ((double)dot[r * CERT_BLOCK + has[i]] - 128 * c->sum_a) +
                                      c->s2 * ((double)dot[(it->rows + r) * CERT_BLOCK + has[i]] - 128 * c->sum_b));
      const double ball = c->norm * (double)g->radius, about = c->e2 * (double)g->norm_c;
      x->mid[r] = c->start + centre + best;
      x->base[r] = about + loose + slack_of(c, (double)g->norm_k, fabs(centre) + fabs(best) + about + 3 * ball + fabs(limit[r]));
      described = !overflows(c, (double)g->norm_k);
      rows |= (unsigned)!(x->mid[r] + x->base[r] + ball <= limit[r]) << r;
    }
    if (!described) {
      exact[(*n_exact)++] = *x;
    } else if (rows) {
      x->rows = rows & x->rows;
      if (x->rows) groups[left++] = *x;
    }
  }
  return left;
}

/* Keys whose estimate is above the limit will raise it: they wait here until there are some to choose from. */
typedef struct hot {
  double mid, norm;
  float up;
  int32_t pos;
} hot;
typedef struct scan {
  cert_item *it;
  cert_slot *slot;
  cert_list *scratch;
  hot hot[CERT_ROWS][CERT_HOT];
  int n_hot[CERT_ROWS];
} scan;

static void candidate(cert_slot *slot, int r, float up, int32_t pos) {
  if (slot->n[r] == slot->cap) { /* the limit may have risen since */
    int64_t n = 0;
    for (int64_t i = 0; i < slot->n[r]; i++)
      if ((double)slot->up[r][i] > slot->found[r].limit) {
        slot->up[r][n] = slot->up[r][i];
        slot->pos[r][n++] = slot->pos[r][i];
      }
    slot->n[r] = n;
    if (n > slot->cap / 2) slot->full = true;
    if (n == slot->cap) return;
  }
  slot->up[r][slot->n[r]] = up;
  slot->pos[r][slot->n[r]++] = pos;
}

/* Best first, as long as the estimate stays above the limit. */
static void confirm(scan *s, int r) {
  cert_list *list = &s->slot->found[r];
  hot *h = s->hot[r];
  const int n = s->n_hot[r];
  for (int i = 1; i < n; i++) {
    const hot x = h[i];
    int at = i;
    for (; at > 0 && h[at - 1].mid < x.mid; at--) h[at] = h[at - 1];
    h[at] = x;
  }
  for (int i = 0; i < n; i++) {
    if ((double)h[i].up <= list->limit) continue;
    if (h[i].mid <= list->limit) {
      candidate(s->slot, r, h[i].up, h[i].pos);
      continue;
    }
    if (i + 4 < n) {
      const emx_kv *kv = s->it->d->kv;
      const int32_t p = h[i + 4].pos;
      emxi_prefetch(emxi_kv_k(kv, s->it->table[p / kv->P], s->it->g, p % kv->P), (size_t)kv->D * emx_dtype_size(kv->dtype));
    }
    emxi_cert_read(s->it, s->slot, r, h[i].pos, 1, h[i].norm);
    if (i % 4 == 3 || i == n - 1) emxi_cert_raise(s->it, r, list, s->scratch);
  }
  s->n_hot[r] = 0;
}

static void sort_out(scan *s, int r, const group *x, const emxi_sketch_group *g, const int32_t *dot, unsigned mask) {
  const cert_query *c = &s->it->query[r];
  const double loose = x->base[r] + loose4(c, g), scale = c->s1 * (double)g->step;
  for (; mask; mask &= mask - 1) {
    const int t = __builtin_ctz(mask);
    const double mid = x->mid[r] + scale * ((double)dot[t] - 7.5 * c->sum_a);
    const float up = float_up(mid + loose);
    if (mid > s->slot->found[r].limit) {
      if (s->n_hot[r] == CERT_HOT) confirm(s, r);
      s->hot[r][s->n_hot[r]++] = (hot){mid, (double)g->norm_k, up, (int32_t)(x->from + t)};
    } else {
      candidate(s->slot, r, up, (int32_t)(x->from + t));
    }
  }
}

/* Both planes of the groups: the high one alone first unless most of them pass it. */
static void planes(scan *s, const group *groups, int64_t n, bool *fused, int64_t *tried, int64_t *passed) {
  cert_item *it = s->it;
  const emxi_sketch *k = &it->d->kv->sketch;
  const int64_t base = (int64_t)it->g * k->groups;
  int32_t dot[CERT_ROWS * EMXI_GROUP];
  for (int64_t i = 0; i < n && !s->slot->full; i++) {
    const group *x = &groups[i];
    const emxi_sketch_group *g = k->group + base + x->at;
    const uint32_t *high = k->high + (base + x->at) * k->dp, *low = k->low + (base + x->at) * k->dp;
    unsigned rows = x->rows;
    if (!*fused) {
      it->sk->high(it->q8, it->rows, high, k->dp, dot);
      for (int r = 0; r < it->rows; r++) {
        const cert_query *c = &it->query[r];
        s->slot->count[r].bytes_meta += k->dp * 4;
        if (!(rows >> r & 1)) continue;
        const int32_t t = threshold(s->slot->found[r].limit, x->mid[r], x->base[r] + loose2(c, g), 4 * c->s1 * (double)g->step,
                                    1.5 * c->sum_a);
        if (!above(dot + r * EMXI_GROUP, t)) rows &= ~(1u << r);
      }
      ++*tried;
      *passed += rows != 0;
      if (!rows) continue;
    }
    it->sk->both(it->q8, it->rows, high, low, k->dp, dot);
    for (int r = 0; r < it->rows; r++) {
      const cert_query *c = &it->query[r];
      s->slot->count[r].bytes_meta += k->dp * (*fused ? 8 : 4);
      if (!(rows >> r & 1)) continue;
      const int32_t t =
          threshold(s->slot->found[r].limit, x->mid[r], x->base[r] + loose4(c, g), c->s1 * (double)g->step, 7.5 * c->sum_a);
      const unsigned mask = above(dot + r * EMXI_GROUP, t);
      if (mask) sort_out(s, r, x, g, dot + r * EMXI_GROUP, mask);
    }
  }
}

/* The groups of positions [from, to), a range of complete superpages; *blind: the page has no sketches. */
static group group_at(const cert_item *it, int64_t position, unsigned rows, bool *blind) {
  const emx_kv *kv = it->d->kv;
  const int32_t page = it->table[position / kv->P];
  *blind = !emxi_sketch_page_valid(kv, page);
  return (group){.at = (int64_t)page * (kv->P / EMXI_GROUP) + position % kv->P / EMXI_GROUP, .from = position, .rows = rows};
}

void emxi_cert_scan(cert_item *it, cert_slot *slot, cert_list *scratch) {
  const emxi_sketch *k = &it->d->kv->sketch;
  const int64_t from = (int64_t)slot->chunk * CERT_SUPERS, most = from + CERT_SUPERS, to = it->supers < most ? it->supers : most;
  const emxi_sketch_group *head = k->group + (int64_t)it->g * k->groups;
  const uint32_t *high = k->high + (int64_t)it->g * k->groups * k->dp, *low = k->low + (int64_t)it->g * k->groups * k->dp;
  scan s = {.it = it, .slot = slot, .scratch = scratch};
  bool fused = false;
  int64_t tried = 0, passed = 0, since = 0;
  group groups[CERT_BLOCK], exact[CERT_BLOCK];
  for (int64_t p = from; p < to && !slot->full;) {
    double limit[CERT_ROWS];
    int64_t n = 0, n_exact = 0;
    for (int r = 0; r < it->rows; r++) limit[r] = slot->found[r].limit;
    for (; p < to && n + n_exact <= CERT_BLOCK - 4; p++) {
      unsigned rows = 0;
      for (int r = 0; r < it->rows; r++) rows |= (unsigned)!((double)it->upper[r * it->supers_ld + p] <= limit[r]) << r;
      for (int64_t x = 0; rows && x < EMXI_SUPER; x += EMXI_GROUP) {
        bool blind;
        if (cert_own(it, p * EMXI_SUPER + x)) continue;
        const group g = group_at(it, p * EMXI_SUPER + x, rows, &blind);
        if (blind)
          exact[n_exact++] = g;
        else
          groups[n++] = g;
      }
    }
    for (int64_t i = 0; i < n; i++) {
      __builtin_prefetch(&head[groups[i].at], 0, 3);
      emxi_prefetch((const char *)(k->centre + ((int64_t)it->g * k->groups + groups[i].at) * k->dp), (size_t)k->dp);
    }
    n = judge(it, groups, n, limit, slot->count, exact, &n_exact);
    for (int64_t i = 0; i < n; i++) {
      emxi_prefetch((const char *)(high + groups[i].at * k->dp), (size_t)k->dp * 4);
      if (fused) emxi_prefetch((const char *)(low + groups[i].at * k->dp), (size_t)k->dp * 4);
    }
    planes(&s, groups, n, &fused, &tried, &passed);
    /* most groups pass the high plane: both at once, with another look later on */
    since += n;
    if (!fused && tried >= 64) {
      fused = passed * 2 > tried;
      tried = passed = since = 0;
    } else if (fused && since >= 2048) {
      fused = false;
    }
    for (int64_t i = 0; i < n_exact && !slot->full; i++) {
      emxi_cert_read(it, slot, -1, exact[i].from, EMXI_GROUP, -1);
      for (int r = 0; r < it->rows; r++) {
        emxi_cert_raise(it, r, &slot->found[r], scratch);
        slot->full |= slot->found[r].full;
      }
    }
    for (int r = 0; r < it->rows; r++) {
      confirm(&s, r);
      slot->full |= slot->found[r].full;
    }
    if (emxi_cancelled(it->ctx)) return;
  }
}

double emxi_cert_probe(cert_item *it, cert_list *scratch) {
  const int64_t n = it->supers / 4 < CERT_BLOCK ? it->supers / 4 : CERT_BLOCK, before = it->supers;
  scan s = {.it = it, .slot = &it->own, .scratch = scratch};
  group groups[CERT_BLOCK], exact[CERT_BLOCK];
  double limit[CERT_ROWS];
  int64_t left = 0, n_exact = 0, tried = 0, passed = 0, tokens = 0;
  bool fused = true;
  for (int r = 0; r < it->rows; r++) limit[r] = it->own.found[r].limit;
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i++) {
    const int64_t p = before * i / n, x = (i % 4) * EMXI_GROUP;
    bool blind;
    if (cert_own(it, p * EMXI_SUPER + x)) continue;
    const group g = group_at(it, p * EMXI_SUPER + x, (1u << it->rows) - 1, &blind);
    tokens += EMXI_GROUP;
    if (blind) {
      left += EMXI_GROUP;
      continue;
    }
    it->taken[p] |= (uint8_t)(1u << i % 4);
    groups[kept++] = g;
  }
  kept = judge(it, groups, kept, limit, it->own.count, exact, &n_exact);
  planes(&s, groups, kept, &fused, &tried, &passed);
  for (int64_t i = 0; i < n_exact; i++) emxi_cert_read(it, &it->own, -1, exact[i].from, EMXI_GROUP, -1);
  int64_t most = 0;
  for (int r = 0; r < it->rows; r++) {
    confirm(&s, r);
    emxi_cert_raise(it, r, &it->own.found[r], scratch);
    int64_t still = 0;
    for (int64_t i = 0; i < it->own.n[r]; i++) still += (double)it->own.up[r][i] > it->own.found[r].limit;
    most = still > most ? still : most;
  }
  left += most + n_exact * EMXI_GROUP;
  return tokens ? (double)left / (double)tokens : 1;
}
