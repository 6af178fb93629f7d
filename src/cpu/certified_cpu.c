/* SPDX-License-Identifier: Apache-2.0
 * The certified selector on the CPU: exact entmax from the few keys that can have weight.
 *
 *   1. tasks (item, chunk): bounds of all superpages from their 4-bit centres, and the best ones (certified_bounds.c).
 *   2. tasks (item): the newest keys and the best superpages, exactly. Their threshold is a lower bound of the threshold (T1 of
 *      docs/math.md): what a bound puts at or below it has no weight. A probe of a few groups tells whether the ladder pays.
 *   3. tasks (item, chunk): groups of 16 keys by ball, then keys by two planes of 2-bit codes. Keys whose estimate exceeds the
 *      limit are read at once and raise it; the others that may have weight become candidates.
 *   4. tasks (item): candidates by their residual rows, the rest by their keys; threshold, values, output, report.
 * With enough items for the threads each does its own tasks in a row: steps that wait for each other cost more than they share.
 * An item is a sequence, a KV head and up to 8 of its query heads, which share every read. Chunks start from the item's limit and
 * know nothing of each other: no bit and no report depends on the number of threads. Lists are bounded; where one is too short,
 * and where the probe or the limit says that most keys would be read anyway, the item takes ALL's path, which is exact as well.
 *
 * Same bits as ALL: exact scores come from the same kernels, whatever is dropped has a computed score below the computed
 * threshold, and the threshold and the output depend on the support alone (decode_cpu.c).
 * Bytes at D = 128 and 16-bit keys: 80 a superpage, 160 a surviving group's centre, 32 and 32 a key and plane, 64 a residual row,
 * 256 an exact key or value.
 */
#include "cpu/certified.h"

#include <math.h>
#include <string.h>

/* Tokens times head dimension below which ALL's path is as fast on keys that give nothing away. A variable for the tests
 * alone. */
int64_t emxi_certified_short = (int64_t)1 << 21;
#define MIN_SLOTS 32          /* chunks in flight: several items together when sequences are short */
#define FLAT 160              /* scores above the limit after the seeds, or after the probe */
#define FEW 16                /* one superpage in this many may matter: no probe */
#define MAX_SHARE 0.75        /* of keys that the planes leave: more, and ALL's path is faster */
#define MAX_SHARE_SOFTMAX 0.2 /* of which most are read, values and all */

/* ---- exact keys */

double emxi_cert_norm(const cert_item *it, int64_t position) {
  const emx_kv *kv = it->d->kv;
  if (emxi_sketch_page_valid(kv, it->table[position >> it->shift]) && position / kv->P < it->length / kv->P) {
    const emxi_sketch_group *g = kv->sketch.group + (int64_t)it->g * kv->sketch.groups + emxi_cert_group(it, position);
    const uint32_t u = (uint32_t)g->norm_k << 16;
    float norm;
    memcpy(&norm, &u, 4);
    if (g->radius < INFINITY) return (double)norm;
  }
  float key[EMXI_QLD];
  char row[EMXI_QLD * sizeof(float)];
  double s = 0;
  it->k->load[emxi_slot(kv->dtype)](emxi_kv_keys(kv, it->table[position / kv->P], it->g, position % kv->P, 1, row), kv->D, key);
  for (int x = 0; x < kv->D; x++) s += (double)key[x] * (double)key[x];
  return sqrt(s) * (1 + 1e-12);
}

double emxi_cert_slack(const cert_item *it, int r, int64_t position, double norm) {
  const cert_query *c = &it->query[r];
  if (norm < 0) norm = emxi_cert_norm(it, position);
  const double bias = c->x.slope != 0 ? 0x1p-22 * fabs(c->x.slope * (double)(position - (c->visible - 1))) : 0;
  return c->x.slack_k * norm + c->x.slack_0 + bias;
}

static void add(cert_item *it, cert_list *list, int r, float s, int64_t position, double norm) {
  const cert_query *c = &it->query[r];
  if (s == -INFINITY) {
    const int32_t at = (int32_t)position;
    emxi_cpu_overflows(it->d->kv, it->table, it->g, &s, &at, 0, 1);
  }
  if (s != s || s == INFINITY) {
    list->bad = true;
    return;
  }
  const bool below = (double)s <= list->limit;
  if (s == -INFINITY || (below && c->alpha > 1)) return;
  list->slack = fmax(list->slack, emxi_cert_slack(it, r, position, norm));
  if (below) return;
  if (list->n == list->cap) {
    list->full = true;
    return;
  }
  list->s[list->n] = s;
  list->pos[list->n++] = (int32_t)position;
}

/* Scores of keys in a file, a few at a time; `page` is a physical one. */
static __attribute__((noinline)) void dot_file(const cert_item *it, int first, int rows, int32_t page, int64_t token, int64_t n,
                                               float *s) {
  const emx_kv *kv = it->d->kv;
  _Alignas(64) char keys[EMXI_ROWS_BYTES];
  for (int64_t t = 0; t < n; t += EMXI_ROWS) {
    const int64_t count = n - t < EMXI_ROWS ? n - t : EMXI_ROWS;
    it->k->dot[emxi_slot(kv->dtype)](it->q + first * EMXI_QLD, EMXI_QLD, rows,
                                     emxi_kv_file_read(kv, false, page, it->g, token + t, count, keys), kv->D, count, kv->D,
                                     s + t, EMXI_SUPER);
  }
}

void emxi_cert_read(cert_item *it, cert_slot *slot, int r, int64_t from, int64_t n, double norm) {
  const emx_kv *kv = it->d->kv;
  const int first = r < 0 ? 0 : r, rows = r < 0 ? it->rows : 1;
  const int64_t key = (int64_t)kv->D * (int64_t)emx_dtype_size(kv->dtype), page = from % CERT_CHUNK / kv->P;
  float s[CERT_ROWS * EMXI_SUPER];
  if (kv->file)
    dot_file(it, first, rows, it->table[from / kv->P], from % kv->P, n, s);
  else
    it->k->dot[emxi_slot(kv->dtype)](it->q + first * EMXI_QLD, EMXI_QLD, rows,
                                     emxi_kv_k(kv, it->table[from / kv->P], it->g, from % kv->P), kv->k_token, n, kv->D, s,
                                     EMXI_SUPER);
  for (int h = first; h < first + rows; h++) {
    const cert_query *c = &it->query[h];
    float *score = s + (h - first) * EMXI_SUPER;
    if (c->x.slope != 0) it->k->kv->bias(score, n, (float)c->x.slope, (float)(from - (c->visible - 1)));
    for (int64_t t = 0; t < n; t++) add(it, &slot->found[h], h, score[t], from + t, norm);
    slot->count[h].tokens += n;
    slot->count[h].bytes_k += kv->k_token == kv->D ? emxi_lines(n * key) : n * emxi_lines(key);
    it->slots[from / CERT_CHUNK].pages[h][page >> 3] |= (uint8_t)(1u << (page & 7));
  }
}

/* What lies above the limit stays. */
static void keep_above(const cert_item *it, cert_list *list, double limit) {
  if (!(limit > list->limit)) return;
  list->limit = limit;
  float down = (float)limit;
  if ((double)down > limit) down = nextafterf(down, -INFINITY);
  list->n = it->k->keep(list->s, list->pos, 0, list->n, down, list->s, list->pos);
}

void emxi_cert_raise(const cert_item *it, int r, cert_list *list, cert_list *scratch) {
  if (!list->n || list->bad) return;
  const double a = it->query[r].a, alpha = it->query[r].alpha;
  if (alpha == 1) { /* any limit is sound: whoever bounds what was dropped counts all that lies below it */
    const float m = it->k->max(list->s, list->n);
    keep_above(it, list, (double)m + log(emxi_cpu_exp_sum(it->k, list->s, list->n, m)) + it->query[r].rest);
    return;
  }
  double tau = list->tau;
  if (tau == -INFINITY || alpha > 2) {
    memcpy(scratch->s, list->s, (size_t)list->n * sizeof *list->s);
    memcpy(scratch->pos, list->pos, (size_t)list->n * sizeof *list->pos);
    const emxi_solution sol = emxi_solve(it->k, alpha, scratch->s, scratch->pos, list->n);
    if (sol.nonfinite) list->bad = true;
    if (sol.nonfinite || !sol.support) return;
    tau = emxi_tau(&sol, alpha);
  } else { /* Newton on the norm of the weights, from the left, stays left (solver.inc) */
    for (int i = 0; i < 3; i++) {
      double f, g;
      emxi_power_sums(it->k, alpha, list->s, list->n, 0, tau, &f, &g);
      const double step = f > 1 && g > 0 ? (f - pow(f, 1 - a)) / g : 0;
      if (!(step > 0)) break;
      tau += step;
      if (step < 1e-6) break;
    }
  }
  if (!(tau >= list->tau) || !(list->slack < INFINITY)) return;
  list->tau = tau;
  /* rounded down: T2 for the scores' errors, plus what this arithmetic may have lost */
  const double low = tau - a * list->slack - 1e-9 * fmax(1.0, fabs(tau)) - (double)list->n * 0x1p-50;
  keep_above(it, list, low / a - 1e-15 * fabs(low / a));
}

/* ---- the call */

typedef struct job {
  emx_ctx *ctx;
  const emxi_decode *d;
  emxi_decode all; /* the same with ALL */
  cert_item *items;
  cert_slot *slots;
  emxi_work *work;          /* [threads] */
  cert_list *scratch;       /* [threads] */
  emxi_sketch_sink *heap;   /* [threads] with a limit: candidates of one row */
  bool limited;             /* max_bytes or max_delta */
  int64_t n_items, n_slots; /* of the wave */
  int32_t rows, blocks;     /* of an item; items per KV head */
  int64_t first;            /* first item of the wave */
  bool whole;               /* the wave's items are done one by one, not step by step */
} job;

static void list_carve(emxi_arena *a, cert_list *list, int64_t cap) {
  list->cap = cap;
  list->s = emxi_arena_take(a, cap + 64, sizeof(float));
  list->pos = emxi_arena_take(a, cap + 64, sizeof(int32_t));
}

static void slot_carve(emxi_arena *a, cert_slot *slot, int32_t rows, int64_t cap) {
  slot->cap = cap;
  for (int32_t r = 0; r < rows; r++) {
    list_carve(a, &slot->found[r], CERT_FOUND);
    slot->left[r].up = emxi_arena_take(a, cap + 64, sizeof(float)); /* kernels store whole vectors */
    slot->left[r].pos = emxi_arena_take(a, cap + 64, sizeof(int32_t));
  }
}

static void carve(job *j, emxi_arena *a) {
  const emxi_decode *d = j->d;
  const int64_t chunks = cert_chunks(d->max_len), total = (int64_t)d->B * d->kv->G * j->blocks;
  j->n_slots = chunks > MIN_SLOTS ? chunks : MIN_SLOTS;
  if (j->n_slots > total * chunks) j->n_slots = total * chunks;
  const int64_t supers_ld = (d->max_len / EMXI_SUPER + 64) / 64 * 64;
  j->items = emxi_arena_take(a, j->n_slots, sizeof *j->items); /* ragged batches may fit more items than n_items */
  j->slots = emxi_arena_take(a, j->n_slots, sizeof *j->slots);
  j->work = emxi_arena_take(a, j->ctx->threads, sizeof *j->work);
  j->scratch = emxi_arena_take(a, j->ctx->threads, sizeof *j->scratch);
  j->heap = emxi_arena_take(a, j->ctx->threads, sizeof *j->heap);
  const bool live = a->base && !a->overflow;
  j->n_items = j->n_slots < total ? j->n_slots : total;
  /* superpage arrays of one item never exceed those of its chunks */
  for (int64_t i = 0; i < j->n_items; i++) {
    cert_item it = {.supers_ld = supers_ld};
    it.q = emxi_arena_take(a, j->rows * EMXI_QLD, sizeof(float));
    it.q8 = emxi_arena_take(a, 2 * j->rows * EMXI_SKETCH_LD, 1);
    it.upper = emxi_arena_take(a, j->rows * supers_ld, sizeof(float));
    it.taken = emxi_arena_take(a, supers_ld, 1);
    it.valid = emxi_arena_take(a, supers_ld, 1);
    slot_carve(a, &it.own, j->rows, 2 * CERT_PROBE * EMXI_GROUP);
    if (live) j->items[i] = it;
  }
  for (int64_t i = 0; i < j->n_slots; i++) {
    cert_slot s = {0};
    slot_carve(a, &s, j->rows, CERT_CANDIDATES);
    for (int32_t r = 0; r < j->rows; r++) s.pages[r] = emxi_arena_take(a, CERT_CHUNK / 16 / 8, 1);
    if (live) j->slots[i] = s;
  }
  for (int32_t t = 0; t < j->ctx->threads; t++) {
    emxi_work w;
    cert_list list = {0};
    emxi_cpu_carve(&j->all, a, &w, j->rows, true);
    list_carve(a, &list, CERT_FOUND);
    emxi_sketch_sink heap = {.up = emxi_arena_take(a, j->limited ? d->max_len : 0, sizeof(float)),
                             .pos = emxi_arena_take(a, j->limited ? d->max_len : 0, sizeof(int32_t))};
    if (live) {
      j->heap[t] = heap;
      j->work[t] = w;
      j->scratch[t] = list;
    }
  }
}

static void list_reset(cert_list *list) {
  list->n = 0;
  list->limit = list->tau = -INFINITY;
  list->slack = 0;
  list->bad = list->full = false;
}

static void open_item(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  const emxi_decode *d = j->d;
  cert_item *it = &j->items[i];
  const int64_t index = j->first + i;
  emxi_item e;
  it->d = d;
  it->ctx = j->ctx;
  it->k = emxi_cpu_of(j->ctx)->k;
  it->sk = emxi_sketch_choose(it->k);
  it->b = (int32_t)(index / j->blocks / d->kv->G);
  it->g = (int32_t)(index / j->blocks % d->kv->G);
  it->first_row = (int32_t)(index % j->blocks) * j->rows;
  emxi_cpu_open_item(&e, j->ctx, d, &j->work[worker], it->b, it->g, it->first_row, j->rows);
  it->rows = e.rows;
  it->table = e.table;
  it->length = e.length;
  it->supers = e.length / EMXI_SUPER;
  it->shift = e.page_shift;
  it->raw = 0;
  it->skip = it->given_up = false;
  it->chunk_bytes = 0;
  it->own.full = false;
  it->all = e.length * d->kv->D < emxi_certified_short || !d->kv->sketch.mapped;
  memset(it->taken, 0, (size_t)it->supers_ld);
  for (int r = 0; r < it->rows; r++) {
    const float *q = e.w->q + r * EMXI_QLD;
    memcpy(it->q + r * EMXI_QLD, q, EMXI_QLD * sizeof(float));
    it->bad[r] = e.row[r].bad;
    it->own.count[r] = (cert_count){0};
    it->own.left[r].n = 0;
    const double alpha = emxi_decode_alpha(d, e.row[r].h);
    it->query[r] = (cert_query){.alpha = alpha,
                                .a = alpha > 1 ? alpha - 1 : 1,
                                .visible = e.row[r].visible,
                                .x = {.slope = (double)e.row[r].slope, .slack_0 = e.row[r].underflow}};
    if (alpha == 1) {
      const double max = d->select.max_delta;
      it->query[r].rest = log(max / 2) - log((double)(e.length ? e.length : 1));
      it->query[r].cool = INFINITY; /* until the probe is over */
      it->all |= !(max > 0);
    }
    list_reset(&it->own.found[r]);
    it->all |= it->bad[r];
    it->all |= fabs((double)e.row[r].slope) * (double)e.length >= 1e37; /* a bias near the end of the floats */
    if (!it->all) emxi_cert_open_query(it, r, d->kv->sketch.map + (int64_t)it->g * 3 * d->kv->sketch.dp);
    it->all |= it->bad[r];
  }
}

/* Which superpages have a record: a question about the sequence, not about the head. */
static void check(const job *j, const cert_item *it, int64_t from, int64_t to) {
  const int64_t per = EMXI_SUPER / it->d->kv->P;
  uint8_t *valid = j->items[it->first].valid;
  for (int64_t p = from; p < to && p < it->supers; p++) valid[p] = emxi_sketch_super_valid(it->d->kv, it->table + p * per);
}
static void check_chunk(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  const cert_slot *s = &j->slots[i];
  const int64_t from = (int64_t)s->chunk * CERT_SUPERS;
  (void)worker;
  if (j->items[s->item].first == s->item) check(j, &j->items[s->item], from, from + CERT_SUPERS);
}
static void open_and_check(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  const cert_item *it = &j->items[i];
  open_item(arg, i, worker);
  const int64_t peers = j->items[it->first].peers, mine = i - it->first; /* each a part */
  check(j, it, it->supers * mine / peers, it->supers * (mine + 1) / peers);
}

static void bound_chunk(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  cert_slot *s = &j->slots[i];
  cert_item *it = &j->items[s->item];
  (void)worker;
  s->full = false;
  for (int r = 0; r < it->rows; r++) {
    s->left[r].n = 0;
    s->count[r] = (cert_count){0};
    memset(s->pages[r], 0, CERT_CHUNK / 16 / 8);
    for (int w = 0; w < 2; w++)
      for (int x = 0; x < CERT_SEEDS; x++) s->best[r][w][x].super = -1;
  }
  if (it->all) return;
  const int64_t from = (int64_t)s->chunk * CERT_SUPERS, most = from + CERT_SUPERS;
  if (from < it->supers) emxi_cert_superpages(it, j->items[it->first].valid, s, from, it->supers < most ? it->supers : most);
}

static void read_range(cert_item *it, int64_t from, int64_t to) {
  const int32_t P = it->d->kv->P;
  for (int64_t p = from; it->d->kv->file && p < to; p = (p / P + 1) * P)
    emxi_kv_file_expect_keys(it->d->kv, it->table[p / P], it->g, p % P, (p / P + 1) * P < to ? P - p % P : to - p);
  while (from < to) {
    const int64_t end = (from / P + 1) * P < to ? (from / P + 1) * P : to;
    emxi_cert_read(it, &it->own, -1, from, end - from, -1);
    from = end;
  }
}

/* Bound of the mass of what is neither in the list nor known to lie below its limit: candidates, and superpages in upper[]. alpha
 * = 1: of what lies below the limit, too, as far as scores that were read can tell. */
static double bound_dropped(const cert_item *it, int r, const cert_list *list, const float *up, int64_t n) {
  const float top = it->k->max(list->s, list->n), rest = nextafterf((float)(list->limit + list->slack), INFINITY);
  const emxi_dropped x = {
      .k = it->k,
      .alpha = it->query[r].alpha,
      .list = list->s,
      .n = list->n,
      .top = top,
      .tau_low = list->limit * it->query[r].a,
      .slack = list->slack,
      .far = {{.up = up, .n = n, .times = 1},
              {.up = it->upper + r * it->supers_ld, .n = it->supers, .times = EMXI_SUPER},
              {.up = &rest, .n = it->query[r].alpha == 1 && list->n < it->length, .times = (double)(it->length - list->n)}}};
  return emxi_cpu_dropped_mass(&x);
}

/* Keys of a superpage that will be read, on their way. */
static void send_superpage(const cert_item *it, int64_t super) {
  const emx_kv *kv = it->d->kv;
  const int64_t per = EMXI_SUPER / kv->P;
  for (int64_t p = super * per; !kv->file && p < (super + 1) * per; p++) {
    emxi_prefetch_rows(emxi_kv_k(kv, it->table[p], it->g, 0), kv->k_token, kv, kv->P);
    for (int64_t x = 0; x < kv->P; x += EMXI_GROUP)
      __builtin_prefetch(kv->sketch.group + (int64_t)it->g * kv->sketch.groups + emxi_cert_group(it, p * kv->P + x), 0, 3);
  }
}
/* How many superpages may matter, to the row to which most do. */
static int64_t open_superpages(const cert_item *it) {
  int64_t most = 0;
  for (int r = 0; r < it->rows; r++) {
    const float *upper = it->upper + r * it->supers_ld, limit = (float)it->own.found[r].limit;
    int64_t n = 0;
    for (int64_t p = 0; p < it->supers; p++) n += upper[p] > limit;
    most = n > most ? n : most;
  }
  return most;
}

static void seed_item(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  cert_item *it = &j->items[i];
  if (it->all) return;
  const cert_slot *slots = it->slots;
  double max_share = MAX_SHARE;
  int64_t seeds[CERT_ROWS * 2 * CERT_SEEDS];
  int n_seeds = 0;
  bool softmax = false;
  read_range(it, it->supers * EMXI_SUPER, it->length);
  for (int r = 0; r < it->rows; r++)
    for (int w = 0; w < 2; w++)
      for (int x = 0; x < CERT_SEEDS; x++) { /* the best of all chunks, as many as of one */
        int64_t best = -1;
        double value = 0;
        for (int64_t c = 0; c < cert_chunks(it->length); c++)
          for (int y = 0; y < CERT_SEEDS; y++) {
            const int32_t p = slots[c].best[r][w][y].super;
            if (p < 0 || it->taken[p] & CERT_READ || (best >= 0 && slots[c].best[r][w][y].value <= value)) continue;
            best = p;
            value = slots[c].best[r][w][y].value;
          }
        if (best < 0) break;
        it->taken[best] = CERT_READ;
        send_superpage(it, best);
        seeds[n_seeds++] = best;
      }
  for (int s = 0; s < n_seeds; s++) read_range(it, seeds[s] * EMXI_SUPER, (seeds[s] + 1) * EMXI_SUPER);
  for (int r = 0; r < it->rows; r++) {
    cert_list *list = &it->own.found[r];
    emxi_cert_raise(it, r, list, &j->scratch[worker]);
    it->all |= list->full || list->bad || !(list->limit > -INFINITY);
    /* where most of the best keys have weight, most of the others will */
    if (it->query[r].alpha == 1) {
      max_share = MAX_SHARE_SOFTMAX;
      softmax = true;
    } else {
      it->all |= list->n > FLAT && list->n > it->own.count[r].tokens / 2;
    }
  }
  if (softmax || open_superpages(it) * FEW > it->supers) { /* else a probe would read as much as the rest of the ladder */
    it->all = it->all || emxi_cert_probe(it, &j->scratch[worker]) > max_share || it->own.full;
    /* where so many of a sample have weight thousands of the others will, and each of them is read by itself, key and value */
    for (int r = 0; r < it->rows; r++) it->all |= it->query[r].alpha > 1 && it->own.found[r].n > FLAT;
  }
  for (int r = 0; r < it->rows; r++) it->all |= it->own.found[r].full || it->own.found[r].bad;
  if (it->all || !j->limited) return;
  const emx_select_desc *select = &j->d->select;
  for (int r = 0; r < it->rows; r++)
    if (it->query[r].alpha == 1) it->query[r].cool = fmax(0, log(fmax(select->max_delta / 64, 1.0 / 512)) - it->query[r].rest);
  if (select->max_bytes > 0) {
    int64_t used = 0;
    for (int r = 0; r < it->rows; r++) {
      int64_t row = it->own.count[r].bytes_k + it->own.count[r].bytes_meta;
      for (int64_t c = 0; c < cert_chunks(it->length); c++) row += slots[c].count[r].bytes_meta;
      used = row > used ? row : used;
    }
    it->chunk_bytes = (select->max_bytes - used) / cert_chunks(it->length);
    if (it->chunk_bytes < 1) it->chunk_bytes = 1;
  }
  it->skip = select->max_delta > 0;
  for (int r = 0; r < it->rows; r++) {
    float *upper = it->upper + r * it->supers_ld;
    for (int64_t p = 0; p < it->supers; p++)
      if (it->taken[p] & CERT_READ) upper[p] = -INFINITY;
    it->skip = it->skip && bound_dropped(it, r, &it->own.found[r], it->own.left[r].up, it->own.left[r].n) <= select->max_delta;
  }
}

static void scan_chunk(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  cert_slot *s = &j->slots[i];
  cert_item *it = &j->items[s->item];
  if (it->all) return;
  for (int r = 0; r < it->rows; r++) {
    const cert_list *own = &it->own.found[r];
    cert_list list = *own;
    list.s = s->found[r].s;
    list.pos = s->found[r].pos;
    memcpy(list.s, own->s, (size_t)own->n * sizeof *own->s);
    memcpy(list.pos, own->pos, (size_t)own->n * sizeof *own->pos);
    s->found[r] = list;
  }
  s->next = (int64_t)s->chunk * CERT_SUPERS;
  if (!it->skip) emxi_cert_scan(it, s, &j->scratch[worker]);
  if (!j->limited) return;
  for (int r = 0; r < it->rows; r++) /* what is left in upper[] has not been judged */
    for (int64_t p = (int64_t)s->chunk * CERT_SUPERS; p < s->next; p++) it->upper[r * it->supers_ld + p] = -INFINITY;
}

/* ---- step 4 */

static void swap(float *s, int32_t *pos, int64_t a, int64_t b) {
  const float f = s[a];
  const int32_t p = pos[a];
  s[a] = s[b];
  pos[a] = pos[b];
  s[b] = f;
  pos[b] = p;
}
/* Heaps with the largest position, or the largest s, on top. */
static void sift(float *s, int32_t *pos, int64_t at, int64_t n, bool by_s) {
  for (int64_t child; (child = 2 * at + 1) < n; at = child) {
    if (child + 1 < n && (by_s ? s[child + 1] > s[child] : pos[child + 1] > pos[child])) child++;
    if (by_s ? s[at] >= s[child] : pos[at] >= pos[child]) return;
    swap(s, pos, at, child);
  }
}
static void sort_positions(float *s, int32_t *pos, int64_t n) {
  for (int64_t i = n / 2; i-- > 0;) sift(s, pos, i, n, false);
  for (int64_t end = n - 1; end > 0; end--) {
    swap(s, pos, 0, end);
    sift(s, pos, 0, end, false);
  }
}

/* Keeps what is above the limit. */
static void cut(emxi_sketch_sink *c, double limit) {
  int64_t n = 0;
  for (int64_t i = 0; i < c->n; i++) {
    c->up[n] = c->up[i];
    c->pos[n] = c->pos[i];
    n += (double)c->up[i] > limit;
  }
  c->n = n;
}

/* Reads the candidates that may still have weight. False: a list was too short. */
static bool settle(cert_item *it, cert_slot *all, cert_slot *from, int r, cert_list *scratch) {
  const emx_kv *kv = it->d->kv;
  cert_list *list = &all->found[r];
  emxi_sketch_sink *c = &from->left[r];
  int64_t since = 0;
  cut(c, list->limit);
  if (kv->sketch.row) { /* the residual rows rule most of them out */
    emxi_cert_refine(it, r, c);
    all->count[r].bytes_meta += c->n * emxi_lines(kv->sketch.dp / 2);
    cut(c, list->limit);
  }
  for (int64_t i = 0; i < c->n; i++) {
    if (i + 8 < c->n) {
      const int32_t p = c->pos[i + 8];
      emxi_prefetch_key(kv, it->table[p / kv->P], it->g, p % kv->P);
    }
    if (!((double)c->up[i] > list->limit)) continue;
    emxi_cert_read(it, all, r, c->pos[i], 1, -1);
    if (++since == 64) {
      since = 0;
      if (list->n > scratch->cap) return false;
      emxi_cert_raise(it, r, list, scratch);
    }
  }
  return true;
}

/* The same with a limit: best bound first, until nothing is left that can have weight, or enough has been read. False: as above,
 * or alpha = 1 and what lies below the limit is worth more than max_delta. */
static bool settle_limited(const job *j, cert_item *it, cert_slot *all, int r, emxi_row *row, cert_list *scratch,
                           emxi_sketch_sink *heap) {
  const emx_select_desc *select = &j->d->select;
  const emxi_sketch *k = &it->d->kv->sketch;
  const int64_t chunks = cert_chunks(it->length),
                line = emxi_lines((int64_t)it->d->kv->D * (int64_t)emx_dtype_size(it->d->kv->dtype));
  cert_list *list = &all->found[r];
  cert_count *count = &all->count[r];
  heap->n = 0;
  for (int64_t c = -1; c < chunks; c++) {
    emxi_sketch_sink *from = &(c < 0 ? &it->own : &it->slots[c])->left[r];
    cut(from, list->limit);
    if (k->row) {
      emxi_cert_refine(it, r, from);
      count->bytes_meta += from->n * emxi_lines(k->dp / 2);
      cut(from, list->limit);
    }
    memcpy(heap->up + heap->n, from->up, (size_t)from->n * sizeof *from->up);
    memcpy(heap->pos + heap->n, from->pos, (size_t)from->n * sizeof *from->pos);
    heap->n += from->n;
  }
  for (int64_t i = heap->n / 2; i-- > 0;) sift(heap->up, heap->pos, i, heap->n, true);
  const float *upper = it->upper + r * it->supers_ld;
  const double far = it->supers ? (double)it->k->max(upper, it->supers) : -INFINITY;
  const bool softmax = it->query[r].alpha == 1;
  for (int64_t since = 0, look = 0;; since++) {
    const bool now = since == look;
    if (now) {
      look += softmax && since > 128 ? since / 8 : 16; /* softmax reads many */
      if (list->n > scratch->cap && !softmax) return false;
      emxi_cert_raise(it, r, list, scratch);
    }
    const bool done = far <= list->limit && (!heap->n || (double)heap->up[0] <= list->limit);
    if (done && !softmax) break;
    const bool bytes = select->max_bytes > 0 && count->bytes_k + count->bytes_meta + list->n * line >= select->max_bytes;
    const bool over = bytes || done || !heap->n;
    if (over || (select->max_delta > 0 && now)) {
      const double delta = bound_dropped(it, r, list, heap->up, heap->n);
      const bool enough = select->max_delta > 0 && delta <= select->max_delta;
      if (over && softmax && !enough && select->max_bytes == 0) return false;
      if (over || enough) {
        row->delta = delta;
        row->stopped_by = enough ? EMX_STOP_DELTA : EMX_STOP_BYTES;
        if (list->n < it->length)
          row->max_unread = fmax(list->limit + (softmax ? list->slack : 0), fmax(far, heap->n ? (double)heap->up[0] : -INFINITY));
        return true;
      }
    }
    const int32_t p = heap->pos[0];
    heap->n--;
    swap(heap->up, heap->pos, 0, heap->n);
    sift(heap->up, heap->pos, 0, heap->n, true);
    emxi_cert_read(it, all, r, p, 1, -1);
  }
  row->max_unread = list->limit;
  return true;
}

static void add_count(cert_count *to, const cert_count *from) {
  to->tokens += from->tokens;
  to->bytes_k += from->bytes_k;
  to->bytes_meta += from->bytes_meta;
}

/* Joins what the chunks have found with the item's own scores, in the row's list. False: a list was too short. */
static bool collect(const job *j, cert_item *it, cert_slot *all, int r, emxi_row *row, cert_list *scratch,
                    emxi_sketch_sink *heap) {
  const int64_t chunks = cert_chunks(it->length);
  const cert_list *own = &it->own.found[r];
  cert_list *list = &all->found[r];
  double dropped = own->limit;
  *list = *own;
  list->s = row->list;
  list->pos = row->pos;
  list->cap = it->length;
  all->count[r] = it->own.count[r];
  memcpy(list->s, own->s, (size_t)own->n * sizeof *own->s);
  memcpy(list->pos, own->pos, (size_t)own->n * sizeof *own->pos);
  for (int64_t c = 0; c < chunks; c++) {
    const cert_slot *s = &it->slots[c];
    const cert_list *f = &s->found[r];
    if (f->full || s->full) return false;
    list->bad |= f->bad;
    list->slack = fmax(list->slack, f->slack);
    list->tau = fmax(list->tau, f->tau);
    dropped = fmax(dropped, f->limit);
    add_count(&all->count[r], &s->count[r]);
    for (int64_t i = 0; i < f->n; i++) {
      if (cert_own(it, f->pos[i])) continue;
      list->s[list->n] = f->s[i];
      list->pos[list->n++] = f->pos[i];
    }
  }
  if (list->bad) return true;
  if (list->n > scratch->cap && it->query[r].alpha > 1) return false;
  list->limit = dropped;
  emxi_cert_raise(it, r, list, scratch);
  if (j->limited) return settle_limited(j, it, all, r, row, scratch, heap);
  if (!settle(it, all, &it->own, r, scratch)) return false;
  for (int64_t c = 0; c < chunks; c++)
    if (!settle(it, all, &it->slots[c], r, scratch)) return false;
  row->max_unread = list->limit;
  return true;
}

/* emx_select: the pages of the keys that the row's ladder has read. */
static void choose_pages(const cert_item *it, emxi_item *e, int r) {
  uint8_t *chosen = e->w->chosen + r * e->w->page_ld;
  const int64_t per = CERT_CHUNK / it->d->kv->P;
  for (int64_t p = 0; p < e->pages; p++) chosen[p] = it->slots[p / per].pages[r][p % per >> 3] >> (p & 7) & 1;
}

static void end_item(const job *j, int64_t i, int32_t worker) {
  cert_item *it = &j->items[i];
  emxi_item e;
  emxi_cpu_open_item(&e, j->ctx, j->d, &j->work[worker], it->b, it->g, it->first_row, j->rows);
  cert_slot all = {0};
  for (int r = 0; r < it->rows && !it->all; r++)
    if (!collect(j, it, &all, r, &e.row[r], &j->scratch[worker], &j->heap[worker])) it->all = true;
  if (j->d->select_only) {
    e.sparse = !it->all;
    for (int r = 0; r < it->rows; r++) {
      if (it->all)
        e.row[r].max_unread = -INFINITY;
      else
        choose_pages(it, &e, r);
    }
    emxi_cpu_write_lists(&e);
    return;
  }
  if (it->all) {
    emxi_cpu_stream(&e);
    if (emxi_cancelled(j->ctx)) return;
  }
  for (int r = 0; r < it->rows; r++) {
    emxi_row *row = &e.row[r];
    if (it->all) {
      row->max_unread = -INFINITY;
      row->bytes_meta = it->own.count[r].bytes_meta; /* what the attempt has read */
    } else {
      row->ladder = true;
      row->bad |= all.found[r].bad;
      row->n = all.found[r].n;
      row->tokens = all.count[r].tokens;
      row->bytes_k = all.count[r].bytes_k;
      row->bytes_meta = all.count[r].bytes_meta;
      for (int64_t c = 0; c < cert_chunks(it->length); c++)
        for (int x = 0; x < CERT_CHUNK / 16 / 8; x++) row->pages += __builtin_popcount(it->slots[c].pages[r][x]);
      sort_positions(row->list, row->pos, row->n);
    }
    emxi_cpu_finish_row(&e, r);
  }
}

static void finish_item(void *arg, int64_t i, int32_t worker) {
  const job *j = arg;
  if (!j->whole || j->items[i].given_up) end_item(j, i, worker);
}

/* All steps of one item but the last one of those that have given up: if all have, they go together. */
static void do_item(void *arg, int64_t i, int32_t worker) {
  job *j = arg;
  cert_item *it = &j->items[i];
  const int64_t first = it->slots - j->slots, chunks = cert_chunks(it->length);
  for (int64_t c = 0; c < chunks; c++) bound_chunk(j, first + c, worker);
  seed_item(j, i, worker);
  it->given_up = it->all;
  for (int64_t c = 0; c < chunks && !it->all && !emxi_cancelled(j->ctx); c++) scan_chunk(j, first + c, worker);
  if (!it->given_up && !emxi_cancelled(j->ctx)) end_item(j, i, worker);
}

/* ALL's path for the whole call. */
static emx_status run_all(const job *j, emxi_arena *arena) {
  emxi_decode d = j->all;
  if (!d.select_only) return emxi_cpu_sweep(j->ctx, &d, arena);
  d.asked = EMX_SELECT_ALL;
  return emxi_cpu_decode_run(j->ctx, &d, arena);
}

emx_status emxi_cpu_certified(emx_ctx *ctx, const emxi_decode *d, emxi_arena *arena) {
  const int64_t group = d->H / d->kv->G;
  job j = {.ctx = ctx, .d = d, .all = *d, .rows = (int32_t)(group < CERT_ROWS ? group : CERT_ROWS)};
  j.all.select.kind = EMX_SELECT_ALL;
  j.limited = d->select.max_bytes > 0 || d->select.max_delta > 0;
  j.blocks = (int32_t)((group + j.rows - 1) / j.rows);
  const emxi_arena before = *arena;
  emxi_arena other = before;
  EMX_TRY(before.base ? EMX_OK : run_all(&j, &other));
  carve(&j, arena);
  if (!arena->base) {
    if (other.used > arena->used) arena->used = other.used;
    arena->overflow |= other.overflow;
    return EMX_OK;
  }
  const int64_t total = (int64_t)d->B * d->kv->G * j.blocks;
  if (d->max_len * d->kv->D < emxi_certified_short) {
    *arena = before;
    return run_all(&j, arena);
  }
  EMX_TRY(emxi_arena_check(arena, "emx_decode"));
  const int64_t most_slots = j.n_slots, most_items = j.n_items;
  for (j.first = 0; j.first < total; j.first += j.n_items) {
    /* as many items as there are slots for */
    j.n_items = j.n_slots = 0;
    for (int64_t i = j.first; i < total && j.n_items < most_items; i++) {
      int64_t length;
      emxi_decode_entry(d, (int32_t)(i / j.blocks / d->kv->G), &length);
      const int64_t chunks = cert_chunks(length);
      if (j.n_slots + chunks > most_slots) break;
      cert_item *it = &j.items[j.n_items];
      it->slots = j.slots + j.n_slots;
      it->first = j.n_items && (j.first + j.n_items) % ((int64_t)d->kv->G * j.blocks) ? it[-1].first : j.n_items;
      it->peers = 0;
      j.items[it->first].peers++;
      for (int64_t c = 0; c < chunks; c++, j.n_slots++) {
        j.slots[j.n_slots].item = (int32_t)j.n_items;
        j.slots[j.n_slots].chunk = (int32_t)c;
      }
      j.n_items++;
    }
    j.whole = j.n_items % ctx->threads == 0 || j.n_items >= 4 * (int64_t)ctx->threads;
    EMX_TRY(emxi_parallel(ctx, j.n_items, j.whole ? open_and_check : open_item, &j));
    if (!j.whole) EMX_TRY(emxi_parallel(ctx, j.n_slots, check_chunk, &j));
    if (j.whole) {
      EMX_TRY(emxi_parallel(ctx, j.n_items, do_item, &j));
    } else {
      EMX_TRY(emxi_parallel(ctx, j.n_slots, bound_chunk, &j));
      EMX_TRY(emxi_parallel(ctx, j.n_items, seed_item, &j));
      for (int64_t i = 0; i < j.n_items; i++) j.items[i].given_up = j.items[i].all;
    }
    int64_t given_up = 0;
    for (int64_t i = 0; i < j.n_items; i++) given_up += j.items[i].given_up;
    const bool all = j.first == 0 && given_up == j.n_items;
    if (all) { /* nothing here is sparse: all heads together are faster than head by head */
      *arena = before;
      return run_all(&j, arena);
    }
    if (!j.whole) EMX_TRY(emxi_parallel(ctx, j.n_slots, scan_chunk, &j));
    if (!j.whole || given_up) EMX_TRY(emxi_parallel(ctx, j.n_items, finish_item, &j));
  }
  return EMX_OK;
}
