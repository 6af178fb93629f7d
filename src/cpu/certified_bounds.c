/* SPDX-License-Identifier: Apache-2.0
 * Upper bounds of scores from key sketches: superpages, groups, the two planes of codes.
 *
 *   q.k = q.offset + q'.c + q'.(y - c),   q' = s1 a + s2 b + rest
 *   superpage   q.offset + s1 a.c                    + e1 |c|                       + |q'| radius
 *   group       q.offset + (s1 a + s2 b).c           + e2 |c|                       + |q'| radius
 *   planes      the same centre + s1 a.planes        + e2 |c| + e1 (radius + error) + |q'| error
 * plus the best bias of ALiBi and the error of a computed score, so that the bound is above the true score and above the one that
 * the library would compute. The products with a and b are integers and exact; the rest is double, whose rounding `slack` covers.
 */
#include "cpu/certified.h"

#include <math.h>
#include <string.h>

#define LD EMXI_SKETCH_LD
#define HOT 64

void emxi_cert_open_query(cert_item *it, int r, const float *map) {
  const int32_t D = it->d->kv->D, dp = it->d->kv->sketch.dp;
  const float *q = it->q + r * EMXI_QLD;
  int8_t *a = it->q8 + r * LD, *b = it->q8 + (it->rows + r) * LD;
  emxi_sketch_query *c = &it->query[r].x;
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
  c->sum_a = c->sum_b = c->size_a = 0;
  for (int32_t i = 0; i < D && c->s2 > 0; i++) {
    const double x = fmin(fmax(nearbyint(w[i] / c->s1), -127), 127), rest = w[i] - c->s1 * x,
                 y = fmin(fmax(nearbyint(rest / c->s2), -127), 127), left = rest - c->s2 * y;
    a[i] = (int8_t)x;
    b[i] = (int8_t)y;
    c->sum_a += x;
    c->sum_b += y;
    c->size_a += fabs(x);
    one += rest * rest;
    two += left * left;
  }
  if (!(c->s2 > 0)) one = two = square; /* zero, or too small for its own step */
  c->norm = sqrt(square) * (1 + 1e-12) + 1e-150;
  c->e1 = sqrt(one) * (1 + 1e-12) + 0x1p-48 * c->norm;
  c->e2 = sqrt(two) * (1 + 1e-12) + 0x1p-48 * c->norm;
  c->start = start;
  it->query[r].raw = sqrt(raw) * (1 + 1e-12) + 1e-150;
  it->raw = fmax(it->raw, it->query[r].raw);
  /* (2D+8) 2^-24 A as for pages (select_cpu.c), A <= |q| |k|; products and elements below the normal floats may be lost */
  c->slack_k = (2 * D + 8) * 0x1p-24 * 1.01 * it->query[r].raw;
  c->slack_0 += 1e-35 + it->query[r].raw * sqrt(D) * 0x1p-124 + 1e-12 * size;
  it->bad[r] |= !(c->norm < INFINITY) || !(fabs(c->start) < INFINITY);
}

/* A score may overflow on the way: such keys are read, as every other path would. */
static inline bool overflows(const cert_item *it, double norm_k) { return !(it->raw * norm_k < 1e37); }

/* ---- superpages */

static void keep_best(cert_slot *slot, int r, int which, double value, int32_t super) {
  int at = CERT_SEEDS;
  while (at > 0 && (slot->best[r][which][at - 1].super < 0 || value > slot->best[r][which][at - 1].value)) at--;
  if (at == CERT_SEEDS) return;
  for (int i = CERT_SEEDS - 1; i > at; i--) slot->best[r][which][i] = slot->best[r][which][i - 1];
  slot->best[r][which][at].value = value;
  slot->best[r][which][at].super = super;
}

void emxi_cert_superpages(cert_item *it, const uint8_t *valid, cert_slot *slot, int64_t from, int64_t to) {
  const emx_kv *kv = it->d->kv;
  const emxi_sketch *s = &kv->sketch;
  const int64_t per = EMXI_SUPER / kv->P, codes = s->dp / 2;
  const uint8_t *base = s->super + (int64_t)it->g * s->supers * codes;
  const emxi_sketch_super *records = s->super_record + (int64_t)it->g * s->supers;
  uintptr_t line[2] = {0}; /* of codes, of records: what lies next to each other shares lines */
  for (int64_t at = from; at < to; at += EMXI_SKETCH_BLOCK) {
    const uint8_t *record[EMXI_SKETCH_BLOCK];
    emxi_sketch_supers soa;
    int32_t dot[CERT_ROWS * EMXI_SKETCH_BLOCK], which[EMXI_SKETCH_BLOCK];
    float up[EMXI_SKETCH_BLOCK], mid[EMXI_SKETCH_BLOCK];
    const int64_t end = at + EMXI_SKETCH_BLOCK < to ? at + EMXI_SKETCH_BLOCK : to;
    int n = 0;
    int64_t lines = 0;
    for (int64_t p = at; p < end; p++) {
      if (p + EMXI_SKETCH_BLOCK < to) { /* a block ahead */
        const int64_t next = emxi_sketch_super_slot(kv, it->table[(p + EMXI_SKETCH_BLOCK + 1) * per - 1]);
        emxi_prefetch((const char *)(base + next * codes), (size_t)codes);
        __builtin_prefetch(records + next, 0, 3);
      }
      emxi_sketch_super x = {.radius = INFINITY};
      const int64_t slot_of = emxi_sketch_super_slot(kv, it->table[(p + 1) * per - 1]);
      const uint8_t *found = base + slot_of * codes;
      if (valid[p]) x = records[slot_of];
      if (!(x.radius < INFINITY) || overflows(it, (double)x.norm_k)) {
        for (int r = 0; r < it->rows; r++) it->upper[r * it->supers_ld + p] = INFINITY;
        continue;
      }
      const uintptr_t first = (uintptr_t)found / 64, last = ((uintptr_t)found + (uintptr_t)codes - 1) / 64,
                      head = (uintptr_t)(records + slot_of) / 64;
      lines += (int64_t)(last - first) + (first != line[0]) + (head != line[1]);
      line[0] = last;
      line[1] = head;
      record[n] = found;
      soa.step_c[n] = x.step_c;
      soa.norm_c[n] = x.norm_c;
      soa.radius[n] = x.radius;
      soa.norm_k[n] = x.norm_k;
      soa.from[n] = (double)(p * EMXI_SUPER - (it->length - 1));
      which[n++] = (int32_t)p;
    }
    it->sk->nibbles(it->q8, it->rows, record, n, s->dp, dot, EMXI_SKETCH_BLOCK);
    for (int r = 0; r < it->rows; r++) {
      float *upper = it->upper + r * it->supers_ld;
      it->sk->judge_supers(&it->query[r].x, &soa, n, dot + r * EMXI_SKETCH_BLOCK, up, mid);
      for (int i = 0; i < n; i++) {
        upper[which[i]] = up[i];
        for (int w = 0; w < 2; w++) {
          const double value = (double)(w ? up[i] : mid[i]);
          if (slot->best[r][w][CERT_SEEDS - 1].super < 0 || value > slot->best[r][w][CERT_SEEDS - 1].value)
            keep_best(slot, r, w, value, which[i]);
        }
      }
      slot->count[r].bytes_meta += 64 * lines;
    }
  }
}

/* ---- groups */

/* Some groups on their way: listed (records prefetched), judged (planes prefetched), done. */
typedef struct block {
  int n, n_exact;
  int64_t at[CERT_BLOCK], from[CERT_BLOCK]; /* index in the head's arrays, position of the first key */
  int64_t exact[CERT_BLOCK];                /* positions of groups without a description */
  int x[CERT_BLOCK];                        /* place in the arrays below of a group that has survived */
  uint8_t rows[CERT_BLOCK];                 /* query rows that the superpage may matter to */
  int32_t high[CERT_ROWS][CERT_BLOCK];
  emxi_sketch_row want[CERT_ROWS];
} block;

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
  bool fused;            /* both planes at once */
  bool bare;             /* few of the last groups had a centre: not worth sending for */
  int64_t tried, passed; /* groups that the high plane has seen, and left */
  hot hot[CERT_ROWS][HOT];
  int n_hot[CERT_ROWS];
} scan;

static inline float from16(uint16_t x) {
  const uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static const emxi_sketch_group *heads_of(const cert_item *it) {
  const emxi_sketch *s = &it->d->kv->sketch;
  return s->group + (int64_t)it->g * s->groups;
}
/* The group at a position joins the block; its records are on their way. */
static void list_group(const scan *s, block *b, int64_t position, unsigned rows) {
  const cert_item *it = s->it;
  const emx_kv *kv = it->d->kv;
  if (!emxi_sketch_page_valid(kv, it->table[position >> it->shift])) {
    b->exact[b->n_exact++] = position;
    return;
  }
  const int64_t at = emxi_cert_group(it, position);
  b->at[b->n] = at;
  b->from[b->n] = position;
  b->rows[b->n++] = (uint8_t)rows;
  __builtin_prefetch(heads_of(it) + at, 0, 3);
  if (!s->bare)
    emxi_prefetch((const char *)(kv->sketch.centre + ((int64_t)it->g * kv->sketch.groups + at) * kv->sketch.dp),
                  (size_t)kv->sketch.dp);
}

/* One plane of a group, or both, on the way to the cache. */
static inline void send_plane(const scan *s, const uint32_t *plane, int64_t at) {
  const emxi_sketch *k = &s->it->d->kv->sketch;
  emxi_prefetch((const char *)(plane + ((int64_t)s->it->g * k->groups + at) * k->dp), (size_t)k->dp * 4);
}
static inline void send_both(const scan *s, int64_t at) {
  send_plane(s, s->it->d->kv->sketch.high, at);
  send_plane(s, s->it->d->kv->sketch.low, at);
}

/* Centres and balls: the groups that may matter stay. Their high planes are on their way. */
static void judge(scan *s, block *b) {
  cert_item *it = s->it;
  const emxi_sketch *k = &it->d->kv->sketch;
  const int64_t base = (int64_t)it->g * k->groups;
  const emxi_sketch_group *head = heads_of(it);
  const uint8_t *codes[CERT_BLOCK];
  emxi_sketch_groups soa;
  int32_t some[2 * CERT_ROWS * CERT_BLOCK], dot[2 * CERT_ROWS * CERT_BLOCK];
  int has[CERT_BLOCK], n = 0, n_codes = 0, left = 0;
  const int all = b->n;
  for (int i = 0; i < b->n; i++) {
    const emxi_sketch_group *g = &head[b->at[i]];
    if (!(g->radius < INFINITY) || overflows(it, (double)from16(g->norm_k))) {
      b->exact[b->n_exact++] = b->from[i];
      continue;
    }
    soa.step_c[n] = g->step_c;
    soa.norm_c[n] = from16(g->norm_c);
    soa.norm_k[n] = from16(g->norm_k);
    soa.radius[n] = g->radius;
    soa.step[n] = g->step;
    soa.error2[n] = g->error2;
    soa.error4[n] = g->error4;
    soa.from[n] = (double)(b->from[i] - (it->length - 1));
    if (g->step_c > 0) {
      has[n_codes] = n;
      codes[n_codes] = k->centre + (base + b->at[i]) * k->dp;
      if (s->bare) emxi_prefetch((const char *)codes[n_codes], (size_t)k->dp);
      n_codes++;
    }
    b->at[n] = b->at[i];
    b->from[n] = b->from[i];
    b->rows[n++] = b->rows[i];
  }
  if (n) s->bare = 4 * n_codes < n;
  if (n_codes) it->sk->bytes(it->q8, 2 * it->rows, codes, n_codes, k->dp, some, CERT_BLOCK);
  for (int h = 0; h < 2 * it->rows; h++) {
    int32_t *to = dot + h * CERT_BLOCK;
    if (n_codes == n) {
      memcpy(to, some + h * CERT_BLOCK, (size_t)n * sizeof *to);
      continue;
    }
    memset(to, 0, (size_t)n * sizeof *to);
    for (int i = 0; i < n_codes; i++) to[has[i]] = some[h * CERT_BLOCK + i];
  }
  unsigned alive[CERT_BLOCK] = {0};
  for (int r = 0; r < it->rows; r++) {
    emxi_sketch_query *c = &it->query[r].x;
    emxi_sketch_query here = *c;
    here.limit = s->slot->found[r].limit;
    emxi_sketch_row *want = &b->want[r];
    it->sk->judge_groups(&here, &soa, n, dot + r * CERT_BLOCK, dot + (it->rows + r) * CERT_BLOCK, b->high[r], want);
    for (int i = 0; i < n; i++) {
      if (!(b->rows[i] >> r & 1)) b->high[r][i] = want->limit[i] = want->hot[i] = INT32_MAX;
      alive[i] |= want->limit[i] < INT32_MAX;
    }
    s->slot->count[r].bytes_meta += all * (int64_t)sizeof(emxi_sketch_group) + n_codes * emxi_lines(k->dp);
  }
  for (int i = 0; i < n; i++) {
    if (!alive[i]) continue;
    b->at[left] = b->at[i];
    b->from[left] = b->from[i];
    b->x[left++] = i;
    if (!s->fused) send_plane(s, k->high, b->at[i]);
  }
  b->n = left;
}

/* Room for n more candidates: those below the limit, which may have risen, go. */
static void make_room(cert_slot *slot, int r, int64_t n) {
  emxi_sketch_sink *c = &slot->left[r];
  if (c->n + n <= slot->cap) return;
  int64_t left = 0;
  for (int64_t i = 0; i < c->n; i++)
    if ((double)c->up[i] > slot->found[r].limit) {
      c->up[left] = c->up[i];
      c->pos[left++] = c->pos[i];
    }
  c->n = left;
  slot->full |= left + n > slot->cap - slot->cap / 4;
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
    if (h[i].mid <= list->limit + s->it->query[r].cool) {
      make_room(s->slot, r, 1);
      emxi_sketch_sink *c = &s->slot->left[r];
      if (s->slot->full) break;
      c->up[c->n] = h[i].up;
      c->pos[c->n++] = h[i].pos;
      continue;
    }
    if (i + 4 < n) {
      const emx_kv *kv = s->it->d->kv;
      const int32_t p = h[i + 4].pos;
      emxi_prefetch_key(kv, s->it->table[p / kv->P], s->it->g, p % kv->P);
    }
    emxi_cert_read(s->it, s->slot, r, h[i].pos, 1, h[i].norm);
    if (i % 4 == 3 || i == n - 1) emxi_cert_raise(s->it, r, list, s->scratch);
  }
  s->n_hot[r] = 0;
}

static inline double loose4(const emxi_sketch_query *c, const emxi_sketch_group *g) {
  return c->norm * (double)g->error4 + c->e1 * ((double)g->radius + (double)g->error4);
}
/* Keys of group x whose estimates are above the limit. */
static void keep_hot(scan *s, int r, const emxi_sketch_row *row, int x, int32_t from, double norm, const int32_t *dot,
                     unsigned mask) {
  for (; mask; mask &= mask - 1) {
    const int t = __builtin_ctz(mask);
    const float up = row->base[x] + (float)(2 * dot[t] - row->zero) * row->scale[x];
    if (s->n_hot[r] == HOT) confirm(s, r);
    s->hot[r][s->n_hot[r]++] = (hot){(double)up - (double)row->width[x], norm, up, from + t};
    const emx_kv *kv = s->it->d->kv;
    if (!kv->file) emxi_prefetch_key(kv, s->it->table[(from + t) / kv->P], s->it->g, (from + t) % kv->P);
  }
}

/* Both planes of the groups, the high one alone first unless most of them pass it; then groups that nothing describes. Where both
 * planes of a whole block are wanted, `next` gets its own one by one: all at once would fill the queue of misses and leave memory
 * idle afterwards. */
static void read_planes(scan *s, block *b, const block *next) {
  cert_item *it = s->it;
  const emxi_sketch *k = &it->d->kv->sketch;
  const int64_t base = (int64_t)it->g * k->groups;
  const emxi_sketch_group *head = heads_of(it);
  int32_t dot[CERT_ROWS * EMXI_GROUP];
  uint16_t mask[CERT_ROWS];
  const int64_t high_only = b->n;
  int sent = 0;
  for (int r = 0; r < it->rows; r++) make_room(s->slot, r, b->n * EMXI_GROUP);
  if (!s->fused) { /* the low planes of what passes are on their way while the other high planes are read */
    int left = 0;
    for (int i = 0; i < b->n; i++) {
      if (!it->sk->high(it->q8, it->rows, k->high + (base + b->at[i]) * k->dp, k->dp, &b->high[0][b->x[i]])) continue;
      send_plane(s, k->low, b->at[i]);
      b->at[left] = b->at[i];
      b->from[left] = b->from[i];
      b->x[left++] = b->x[i];
    }
    s->tried += b->n;
    s->passed += left;
    b->n = left;
  }
  for (int i = 0; i < b->n && !s->slot->full; i++) {
    const int x = b->x[i];
    if (s->fused && sent < next->n) send_both(s, next->at[sent++]);
    const uint32_t *upper = k->high + (base + b->at[i]) * k->dp, *lower = k->low + (base + b->at[i]) * k->dp;
    if (!it->sk->both(it->q8, it->rows, upper, lower, k->dp, b->want, x, (int32_t)b->from[i], s->slot->left, dot, mask)) continue;
    const double norm = (double)from16(head[b->at[i]].norm_k);
    for (int r = 0; r < it->rows; r++)
      if (mask[r]) keep_hot(s, r, &b->want[r], x, (int32_t)b->from[i], norm, dot + r * EMXI_GROUP, mask[r]);
    for (int r = 0; r < it->rows; r++)
      make_room(s->slot, r, (b->n - i) * EMXI_GROUP); /* some went from the hot ones to the others */
  }
  while (s->fused && sent < next->n) send_both(s, next->at[sent++]);
  for (int r = 0; r < it->rows; r++) s->slot->count[r].bytes_meta += (high_only + b->n) * k->dp * 4;
  for (int i = 0; i < b->n_exact && !s->slot->full; i++) {
    emxi_cert_read(it, s->slot, -1, b->exact[i], EMXI_GROUP, -1);
    for (int r = 0; r < it->rows; r++) emxi_cert_raise(it, r, &s->slot->found[r], s->scratch);
  }
  for (int r = 0; r < it->rows; r++) {
    confirm(s, r);
    s->slot->full |= s->slot->found[r].full;
  }
}

void emxi_cert_scan(cert_item *it, cert_slot *slot, cert_list *scratch) {
  const int64_t from = (int64_t)slot->chunk * CERT_SUPERS, most = from + CERT_SUPERS;
  int64_t to = it->supers < most ? it->supers : most;
  scan s = {.it = it, .slot = slot, .scratch = scratch};
  block ring[3];
  int64_t since = 0, before[CERT_ROWS]; /* bytes of its superpages */
  for (int r = 0; r < it->rows; r++) before[r] = slot->count[r].bytes_k + slot->count[r].bytes_meta;
  /* while one block's planes are read, the next one's are on their way, and the records of the one after it */
  ring[0].n = ring[1].n = ring[2].n = 0;
  ring[0].n_exact = ring[1].n_exact = ring[2].n_exact = 0;
  int64_t p = from;
  for (int turn = 0, drained = 0; drained < 3 && !slot->full; turn++) {
    block *listed = &ring[turn % 3], *judged = &ring[(turn + 2) % 3], *ready = &ring[(turn + 1) % 3];
    listed->n = listed->n_exact = 0;
    for (int r = 0; it->chunk_bytes && r < it->rows; r++)
      if (slot->count[r].bytes_k + slot->count[r].bytes_meta - before[r] >= it->chunk_bytes) to = p;
    for (; p < to && listed->n + listed->n_exact <= CERT_BLOCK - 4; p++) {
      unsigned rows = 0;
      for (int r = 0; r < it->rows; r++)
        rows |= (unsigned)!((double)it->upper[r * it->supers_ld + p] <= slot->found[r].limit) << r;
      for (int64_t x = 0; rows && x < EMXI_SUPER; x += EMXI_GROUP)
        if (!cert_own(it, p * EMXI_SUPER + x)) list_group(&s, listed, p * EMXI_SUPER + x, rows);
    }
    drained += p >= to;
    judge(&s, judged);
    since += ready->n;
    read_planes(&s, ready, judged);
    if (!s.fused && s.tried >= 64) { /* most groups pass the high plane: both at once, with another look later on */
      s.fused = s.passed * 2 > s.tried;
      s.tried = s.passed = since = 0;
    } else if (s.fused && since >= 512) {
      s.fused = false;
      s.tried = s.passed = 0;
    }
    if (emxi_cancelled(it->ctx)) return;
  }
  slot->next = p;
}

double emxi_cert_probe(cert_item *it, cert_list *scratch) {
  const int64_t n = it->supers / 4 < CERT_PROBE ? it->supers / 4 : CERT_PROBE;
  scan s = {.it = it, .slot = &it->own, .scratch = scratch, .fused = true};
  int64_t blind = 0, tokens = 0;
  block ring[2] = {{.n = 0}, {.n = 0}};
  for (int64_t i = 0, turn = 0; turn <= (n + CERT_BLOCK - 1) / CERT_BLOCK; turn++) {
    block *listed = &ring[turn % 2], *ready = &ring[(turn + 1) % 2];
    listed->n = listed->n_exact = 0;
    for (const int64_t end = i + CERT_BLOCK < n ? i + CERT_BLOCK : n; i < end; i++) {
      const int64_t p = it->supers * i / n, x = p * EMXI_SUPER + i % 4 * EMXI_GROUP;
      if (cert_own(it, x)) continue;
      tokens += EMXI_GROUP;
      list_group(&s, listed, x, (1u << it->rows) - 1);
      it->taken[p] |= (uint8_t)(1u << i % 4);
    }
    judge(&s, listed);
    blind += listed->n_exact * EMXI_GROUP;
    read_planes(&s, ready, listed);
  }
  int64_t most = 0;
  for (int r = 0; r < it->rows; r++) {
    int64_t still = 0;
    for (int64_t i = 0; i < it->own.left[r].n; i++) still += (double)it->own.left[r].up[i] > it->own.found[r].limit;
    most = still > most ? still : most;
  }
  return tokens ? (double)(blind + most) / (double)tokens : 1;
}

/* Reads the keys that the codes have left from c->up[from] on: those at or below the limit go, and one above it ends the row's
 * hope in `open`, and with it, but for `most` bytes, the reading. Keys without a bound are read in any case. */
static void read_left(cert_item *it, int r, int64_t from, unsigned *open, int64_t most) {
  const emx_kv *kv = it->d->kv;
  const cert_query *q = &it->query[r];
  emxi_sketch_sink *c = &it->own.left[r];
  _Alignas(64) char row[EMXI_QLD * sizeof(float)];
  int64_t n = from;
  for (int64_t i = from; i < c->n; i++, n++) {
    const int32_t at = c->pos[i];
    float s[EMXI_GROUP];
    c->up[n] = c->up[i];
    c->pos[n] = at;
    if ((double)c->up[n] <= it->own.found[r].limit) {
      n--;
      continue;
    }
    if (!(*open >> r & 1) && it->own.count[r].bytes_k >= most && c->up[i] < INFINITY) continue;
    if (i + 4 < c->n) emxi_prefetch_key(kv, it->table[c->pos[i + 4] >> it->shift], it->g, c->pos[i + 4] % kv->P);
    const char *k = emxi_kv_keys(kv, it->table[at >> it->shift], it->g, at % kv->P, 1, row);
    it->k->dot[emxi_slot(kv->dtype)](it->q + r * EMXI_QLD, EMXI_QLD, 1, k, kv->k_token, 1, kv->D, s, EMXI_GROUP);
    if (q->x.slope != 0) it->k->kv->bias(s, 1, (float)q->x.slope, (float)(at - (q->visible - 1)));
    it->own.count[r].bytes_k += emxi_lines((int64_t)kv->D * (int64_t)emx_dtype_size(kv->dtype));
    const double norm = emxi_cert_norm(it, at), up = (double)s[0] + emxi_cert_slack(it, r, at, norm);
    if (up < (double)c->up[n] && !overflows(it, norm)) c->up[n] = nextafterf((float)up, INFINITY);
    if ((double)c->up[n] <= it->own.found[r].limit)
      n--;
    else
      *open &= ~(1u << r);
  }
  c->n = n;
}

void emxi_cert_check(cert_item *it, const int32_t *pages, uint8_t *rows, int64_t n, unsigned open, unsigned few, int64_t most) {
  const emx_kv *kv = it->d->kv;
  const emxi_sketch *k = &kv->sketch;
  const int64_t base = (int64_t)it->g * k->groups, room = it->own.cap - CERT_BLOCK * EMXI_GROUP - EMXI_SUPER;
  scan s = {.it = it, .slot = &it->own};
  block ring[3];
  int64_t from[3] = {0}, at = 0, done = 0;
  for (int i = 0; i < 3; i++) ring[i].n = ring[i].n_exact = 0;
  bool stop = false;
  for (int turn = 0; done < n && !stop; turn++) { /* blocks on their way as in emxi_cert_scan */
    block *listed = &ring[turn % 3], *ready = &ring[(turn + 1) % 3];
    listed->n = listed->n_exact = 0;
    from[turn % 3] = at;
    for (; at < n && listed->n + listed->n_exact <= CERT_BLOCK - 4; at++) {
      const int64_t first = (int64_t)pages[at] * kv->P;
      rows[at] &= (uint8_t)(open | few);
      if (!rows[at]) continue;
      for (int64_t x = 0; x < kv->P && first + kv->P <= it->length; x += EMXI_GROUP) list_group(&s, listed, first + x, rows[at]);
      for (int r = 0; r < it->rows && first + kv->P > it->length; r++) /* the newest page has no sketch yet: its keys */
        if (rows[at] >> r & 1) {
          emxi_sketch_sink *c = &it->own.left[r];
          const int64_t before = c->n;
          for (int64_t t = first; t < it->length; t++, c->n++) c->up[c->n] = INFINITY, c->pos[c->n] = (int32_t)t;
          read_left(it, r, before, &open, few >> r & 1 ? most : 0);
        }
    }
    judge(&s, &ring[(turn + 2) % 3]);
    if (turn < 2) continue;
    int64_t high = 0, low = 0, before[CERT_ROWS];
    for (int r = 0; r < it->rows; r++) before[r] = it->own.left[r].n;
    for (int i = 0; i < ready->n; i++, high++) {
      const int x = ready->x[i];
      const uint32_t *upper = k->high + (base + ready->at[i]) * k->dp, *lower = k->low + (base + ready->at[i]) * k->dp;
      int32_t dot[CERT_ROWS * EMXI_GROUP];
      uint16_t mask[CERT_ROWS];
      if (!it->sk->high(it->q8, it->rows, upper, k->dp, &ready->high[0][x])) continue;
      low++;
      for (int r = 0; r < it->rows; r++) ready->want[r].hot[x] = INT32_MAX; /* all that is above the limit goes to the list */
      it->sk->both(it->q8, it->rows, upper, lower, k->dp, ready->want, x, (int32_t)ready->from[i], it->own.left, dot, mask);
    }
    for (int64_t i = 0; i < ready->n_exact; i++) /* groups that nothing describes: their pages keep their bounds */
      for (int64_t p = done; p < from[(turn + 2) % 3]; p++)
        if (pages[p] == ready->exact[i] >> it->shift) {
          open &= ~(unsigned)rows[p];
          rows[p] = 0;
        }
    done = from[(turn + 2) % 3];
    for (int r = 0; r < it->rows; r++) {
      it->own.count[r].bytes_meta += (high + low) * k->dp * 4;
      emxi_sketch_sink *c = &it->own.left[r], left = {.up = c->up + before[r], .pos = c->pos + before[r], .n = c->n - before[r]};
      if (k->row && (open | few) >> r & 1) {
        emxi_cert_refine(it, r, &left);
        it->own.count[r].bytes_meta += left.n * emxi_lines(k->dp / 2);
      }
      read_left(it, r, before[r], &open, few >> r & 1 ? most : 0);
      stop |= it->own.left[r].n > room;
    }
    stop |= !(open | few) || emxi_cancelled(it->ctx);
  }
  for (; done < n; done++) rows[done] = 0;
}

/* Some candidates' rows and headers, on their way to the cache. */
typedef struct refining {
  int64_t n;
  const uint8_t *row[EMXI_SKETCH_BLOCK];
  const emxi_sketch_group *group[EMXI_SKETCH_BLOCK];
} refining;
static void send_rows(const cert_item *it, const emxi_sketch_sink *c, int64_t from, refining *to) {
  const emxi_sketch *k = &it->d->kv->sketch;
  const int64_t head = (int64_t)it->g * k->groups;
  to->n = c->n - from < EMXI_SKETCH_BLOCK ? c->n - from : EMXI_SKETCH_BLOCK;
  for (int64_t i = 0; i < to->n; i++) {
    const int64_t at = head + emxi_cert_group(it, c->pos[from + i]);
    to->group[i] = k->group + at;
    to->row[i] = k->row + (at * EMXI_GROUP + c->pos[from + i] % EMXI_GROUP) * (k->dp / 2);
    __builtin_prefetch(to->group[i], 0, 3);
    emxi_prefetch((const char *)to->row[i], (size_t)k->dp / 2);
  }
}

void emxi_cert_refine(cert_item *it, int r, emxi_sketch_sink *c) {
  const emxi_sketch *k = &it->d->kv->sketch;
  const emxi_sketch_query *q = &it->query[r].x;
  refining ring[2];
  send_rows(it, c, 0, &ring[0]);
  for (int64_t from = 0, turn = 0; from < c->n; from += EMXI_SKETCH_BLOCK, turn++) {
    const refining *now = &ring[turn % 2];
    int32_t dot[EMXI_SKETCH_BLOCK];
    if (from + now->n < c->n) send_rows(it, c, from + now->n, &ring[(turn + 1) % 2]);
    it->sk->nibbles(it->q8 + r * LD, 1, now->row, now->n, k->dp, dot, EMXI_SKETCH_BLOCK);
    for (int64_t i = 0; i < now->n; i++) {
      const emxi_sketch_group *g = now->group[i];
      const double up = (double)c->up[from + i], term = q->s1 * (double)g->step5 * ((double)dot[i] - 7.5 * q->sum_a);
      const double loose5 = q->norm * (double)g->error5 + q->e1 * ((double)g->radius + (double)g->error5);
      /* up is start + centre + planes + what every bound adds + loose4, rounded up */
      const double better = up - loose4(q, g) + term + loose5 + 1e-12 * (fabs(up) + fabs(term) + q->norm * (double)g->radius);
      if (better < up) {
        const float f = (float)better;
        c->up[from + i] = (double)f >= better ? f : nextafterf(f, INFINITY);
      }
    }
  }
}
