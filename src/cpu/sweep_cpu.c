/* SPDX-License-Identifier: Apache-2.0
 * ALL with one query token per sequence: all KV heads walk through the pages together.
 *
 * A page holds G heads next to each other. A worker that followed one head would jump G pages of data at every page, and the
 * hardware prefetchers would fetch what it does not want: measured, a third of the memory's rate. So a task is (sequence, 512
 * positions), takes each page head by head, and memory is read in order; sequences are long enough for many tasks even where
 * batch * G is small.
 *   1. tasks (sequence, chunk): scores of a block of 256 positions for all rows, page by page; alpha > 1: candidates into the
 *      chunk's list; alpha = 1: weights, then the values of the block, page by page.
 *   2. tasks (sequence, KV head): lists of the chunks are joined in order (alpha = 1: partial sums), then as any other row.
 * Chunks are fixed, partial results have one owner and are joined in order: no bit depends on the number of threads. The lists
 * hold every token if need be. Bytes: N G D of K, and of V for alpha = 1 (else the support's); lists are 8 bytes a candidate and
 * row.
 */
#include "base/num.h"
#include "cpu/decode_cpu.h"

#define SEGMENT (EMXI_CHUNK + 64) /* of a list: one chunk's candidates, and what kernels store past their end */
#define READ ((int64_t)1 << 18)   /* bytes of a file at a time */
#define MIN_SLOTS 64              /* short sequences go through together, so that there are tasks for all workers */

/* A worker's memory in step 1. */
typedef struct bench {
  float *q;        /* [H, QLD] times scale */
  float *score;    /* [H, SLD] */
  float *weight;   /* [H, SLD] weights that are not zero */
  int32_t *index;  /* [H, SLD] their positions in the block */
  int64_t *offset; /* [2, BLOCK] of values: of a whole page, and of some of its tokens */
  int32_t *count;  /* [2, H] weights in the block, and how many of them have met their values */
  char *pages;     /* [G,run,P,D] of a file */
} bench;

typedef struct sweep {
  emx_ctx *ctx;
  const emxi_decode *d;
  const emxi_table *k;
  bench *bench;                 /* [threads] */
  emxi_work *work;              /* [threads], step 2 */
  int64_t slots;                /* chunks in flight */
  int32_t *slot_b, *slot_chunk; /* [slots] */
  int64_t *first_slot;          /* [B] */
  emxi_partial *partial;        /* [slots, H] */
  float *part;                  /* [slots, H, QLD], alpha = 1 */
  float *list;                  /* [slots, H, SEGMENT], alpha > 1; of one sequence: row by row, chunk by chunk */
  int32_t *pos;
  bool values;          /* some head has alpha = 1: values are read along with the keys */
  int32_t first_b;      /* sequences in flight start here */
  int32_t rows, blocks; /* step 2: rows of an item, items of a KV head */
  int64_t run;          /* pages of a file read at a time, of every head */
  size_t file_head;     /* bytes of a head's */
} sweep;

static int64_t chunks_of(int64_t length) { return (length + EMXI_CHUNK - 1) / EMXI_CHUNK; }
/* Where the candidates of (row, chunk) start. */
static int64_t segment(const sweep *s, int32_t b, int64_t chunks, int32_t h, int64_t chunk) {
  return (s->first_slot[b] * s->d->H + h * chunks + chunk) * SEGMENT;
}

/* ---- step 1 */

/* A file: page `at / P` of a block of n positions, with those after it that the buffer takes. Heads are file_head apart. */
static const char *file_page(const sweep *s, const bench *w, bool values, const int32_t *pages, int64_t at, int64_t n) {
  const emx_kv *kv = s->d->kv;
  const int64_t page = at / kv->P, left = emxi_kv_pages_of(kv, n) - page, count = left < s->run ? left : s->run;
  const size_t bytes = (size_t)kv->k_page * emx_dtype_size(kv->dtype);
  if (page % s->run == 0) {
    for (int32_t g = 0; g < kv->G; g++) emxi_kv_file_expect_pages(kv, values, g, pages + page, count);
    for (int32_t g = 0; g < kv->G; g++) emxi_kv_file_pages(kv, values, g, pages + page, count, w->pages + g * s->file_head);
  }
  return w->pages + (size_t)(page % s->run) * bytes;
}

/* Scores of the n positions from `start`, row h at w->score + h*SLD. `more`: pages after this block that the task will read as
 * well. */
static void score_pages(const sweep *s, const bench *w, const int32_t *table, int64_t length, int64_t start, int64_t n,
                        bool more) {
  const emx_kv *kv = s->d->kv;
  const int32_t group = s->d->H / kv->G;
  for (int64_t at = 0; at < n; at += kv->P) {
    const int64_t page = (start + at) / kv->P, count = n - at < kv->P ? n - at : kv->P;
    const bool last = at + kv->P >= n;
    const char *file = kv->file ? file_page(s, w, false, table + start / kv->P, at, n) : NULL;
    for (int32_t g = 0; g < kv->G; g++) {
      const char *keys = file ? file + g * s->file_head : emxi_kv_k(kv, table[page], g, 0);
      if (!file && last && s->values) /* what comes next */
        emxi_prefetch_rows(emxi_kv_v(kv, table[start / kv->P], g, 0), kv->v_token, kv, kv->P);
      else if (!file && (!last || more))
        emxi_prefetch_rows(emxi_kv_k(kv, table[page + 1], g, 0), kv->k_token, kv, kv->P);
      s->k->dot[emxi_slot(kv->dtype)](w->q + g * group * EMXI_QLD, EMXI_QLD, group, keys, kv->k_token, count, kv->D,
                                      w->score + g * group * EMXI_SLD + at, EMXI_SLD);
    }
  }
  for (int32_t h = 0; s->d->slopes && h < s->d->H; h++)
    if (s->d->slopes[h] != 0) s->k->kv->bias(w->score + h * EMXI_SLD, n, s->d->slopes[h], (float)(start - (length - 1)));
}

/* part[h] += weights times values of the block. */
static void add_pages(const sweep *s, const bench *w, const int32_t *table, int64_t start, int64_t n, bool more, float *part) {
  const emx_kv *kv = s->d->kv;
  const int32_t group = s->d->H / kv->G, H = s->d->H;
  int64_t *some = w->offset + EMXI_BLOCK;
  for (int64_t at = 0; at < n; at += kv->P) {
    const int64_t page = (start + at) / kv->P, count = n - at < kv->P ? n - at : kv->P;
    const int64_t base = kv->file ? 0 : table[page] * kv->v_page;
    const bool last = at + kv->P >= n;
    const char *file = kv->file ? file_page(s, w, true, table + start / kv->P, at, n) : NULL;
    for (int64_t j = 0; j < count; j++) w->offset[j] = base + j * kv->v_token;
    for (int32_t g = 0; g < kv->G; g++) {
      if (!file && !last)
        emxi_prefetch_rows(emxi_kv_v(kv, table[page + 1], g, 0), kv->v_token, kv, kv->P);
      else if (!file && more)
        emxi_prefetch_rows(emxi_kv_k(kv, table[page + 1], g, 0), kv->k_token, kv, kv->P);
      const void *values = file ? file + g * s->file_head : emxi_kv_v(kv, 0, g, 0);
      for (int32_t h = g * group; h < (g + 1) * group; h++) {
        if (emxi_decode_alpha(s->d, h) != 1.0) continue;
        const float *weight = w->weight + h * EMXI_SLD + w->count[H + h];
        const int32_t *index = w->index + h * EMXI_SLD;
        const int64_t *offset = w->offset;
        int64_t c = count;
        if (w->count[h] < n) { /* some weights of the block are zero */
          int32_t i = w->count[H + h];
          for (c = 0; i < w->count[h] && index[i] < at + count; i++) some[c++] = w->offset[index[i] - at];
          offset = some;
        }
        w->count[H + h] += (int32_t)c;
        s->k->accumulate[emxi_slot(kv->dtype)](part + h * EMXI_QLD, kv->D, values, offset, weight, c);
      }
    }
  }
}

static void read_chunk(void *arg, int64_t slot, int32_t worker) {
  const sweep *s = arg;
  const emxi_decode *d = s->d;
  const bench *w = &s->bench[worker];
  const int32_t b = s->slot_b[slot], chunk = s->slot_chunk[slot], H = d->H;
  int64_t length;
  const int32_t *table = emxi_decode_entry(d, b, &length);
  const int64_t from = (int64_t)chunk * EMXI_CHUNK, to = length - from < EMXI_CHUNK ? length : from + EMXI_CHUNK;
  emxi_partial *partial = s->partial + slot * H;
  float *part = s->values ? s->part + slot * H * EMXI_QLD : NULL;
  for (int32_t h = 0; h < H; h++) {
    emxi_row row = {.h = h};
    emxi_cpu_load_query(s->k, d, b, &row, w->q + h * EMXI_QLD);
    partial[h] = (emxi_partial){.m = -INFINITY};
    if (part) memset(part + h * EMXI_QLD, 0, (size_t)d->kv->D * sizeof(float));
  }
  for (int64_t start = from; start < to; start += EMXI_BLOCK) {
    const int64_t n = to - start < EMXI_BLOCK ? to - start : EMXI_BLOCK;
    const bool more = start + EMXI_BLOCK < to;
    score_pages(s, w, table, length, start, n, more);
    for (int32_t h = 0; h < H; h++) {
      emxi_partial *c = &partial[h];
      float *score = w->score + h * EMXI_SLD;
      if (s->k->min(score, n) == -INFINITY) emxi_cpu_overflows(d->kv, table, h / (H / d->kv->G), score, NULL, start, n);
      const double alpha = emxi_decode_alpha(d, h);
      if (alpha == 1.0) {
        w->count[h] = w->count[H + h] = 0;
        if (c->bad || !emxi_cpu_softmax_block(s->k, d->kv->D, score, n, c, part + h * EMXI_QLD, w->weight + h * EMXI_SLD))
          continue;
        w->count[h] =
            (int32_t)s->k->keep(w->weight + h * EMXI_SLD, NULL, 0, n, 0.0f, w->weight + h * EMXI_SLD, w->index + h * EMXI_SLD);
        c->used += w->count[h];
        continue;
      }
      const float m = s->k->max(score, n);
      if (m > c->m) c->m = m;
      const int64_t at = segment(s, b, chunks_of(length), h, chunk) + c->n;
      c->n += s->k->keep(score, NULL, (int32_t)start, n, emxi_below(c->m, alpha), s->list + at, s->pos + at);
    }
    if (part) add_pages(s, w, table, start, n, more, part);
  }
}

/* ---- step 2 */

static void finish_item(void *arg, int64_t i, int32_t worker) {
  const sweep *s = arg;
  const emxi_decode *d = s->d;
  const int32_t G = d->kv->G, H = d->H;
  emxi_item it;
  emxi_cpu_open_item(&it, s->ctx, d, &s->work[worker], s->first_b + (int32_t)(i / s->blocks / G), (int32_t)(i / s->blocks % G),
                     (int32_t)(i % s->blocks) * s->rows, s->rows);
  const int64_t chunks = chunks_of(it.length), line = emxi_lines((int64_t)d->kv->D * (int64_t)emx_dtype_size(d->kv->dtype));
  for (int r = 0; r < it.rows; r++) {
    emxi_row *row = &it.row[r];
    const emxi_partial *c = s->partial + s->first_slot[it.b] * H + row->h;
    if (row->alpha == 1.0) {
      const float *part = s->part + (s->first_slot[it.b] * H + row->h) * EMXI_QLD;
      for (int64_t k = 0; k < chunks; k++) {
        emxi_cpu_softmax_merge(d->kv->D, row, &c[k * H], part + k * H * EMXI_QLD, it.w->o + r * EMXI_QLD);
        row->bytes_v += c[k * H].used * line;
      }
    } else {
      for (int64_t k = 0; k < chunks; k++) row->m = c[k * H].m > row->m ? c[k * H].m : row->m;
      row->bad |= row->m == INFINITY;
      const float below = emxi_below(row->m, row->alpha);
      row->list = s->list + segment(s, it.b, chunks, row->h, 0);
      row->pos = s->pos + segment(s, it.b, chunks, row->h, 0);
      for (int64_t k = 0; k < chunks; k++) /* to the left: never over what has not been read */
        row->n += s->k->keep(row->list + k * SEGMENT, row->pos + k * SEGMENT, 0, c[k * H].n, below, row->list + row->n,
                             row->pos + row->n);
    }
    emxi_cpu_finish_row(&it, r);
  }
}

/* ---- both */

emx_status emxi_cpu_sweep(emx_ctx *ctx, const emxi_decode *d, emxi_arena *arena) {
  const int64_t H = d->H, group = H / d->kv->G, most = chunks_of(d->max_len);
  sweep s = {.ctx = ctx, .d = d, .k = emxi_cpu_of(ctx)->k, .rows = (int32_t)(group < EMXI_ITEM_ROWS ? group : EMXI_ITEM_ROWS)};
  s.blocks = (int32_t)((group + s.rows - 1) / s.rows);
  s.slots = most > MIN_SLOTS ? most : MIN_SLOTS;
  if (s.slots > d->B * most) s.slots = d->B * most;
  const int64_t page_bytes = d->kv->P * (int64_t)d->kv->G * d->kv->D * (int64_t)emx_dtype_size(d->kv->dtype);
  s.run = page_bytes < READ ? READ / page_bytes : 1;
  if (s.run > EMXI_BLOCK / d->kv->P) s.run = EMXI_BLOCK / d->kv->P;
  s.file_head = (size_t)(s.run * page_bytes / d->kv->G);
  s.bench = emxi_arena_take(arena, ctx->threads, sizeof *s.bench);
  s.work = emxi_arena_take(arena, ctx->threads, sizeof *s.work);
  for (int32_t t = 0; t < ctx->threads; t++) {
    bench w = {0};
    emxi_work work;
    w.q = emxi_arena_take(arena, H * EMXI_QLD, sizeof(float));
    w.score = emxi_arena_take(arena, H * EMXI_SLD, sizeof(float));
    w.weight = emxi_arena_take(arena, H * EMXI_SLD, sizeof(float));
    w.index = emxi_arena_take(arena, H * EMXI_SLD, sizeof(int32_t));
    w.offset = emxi_arena_take(arena, 2 * EMXI_BLOCK, sizeof(int64_t));
    w.count = emxi_arena_take(arena, 2 * H, sizeof(int32_t));
    w.pages = emxi_arena_take(arena, d->kv->file ? s.run : 0, (size_t)page_bytes);
    emxi_cpu_carve(d, arena, &work, s.rows, false);
    if (arena->base && !arena->overflow) {
      s.bench[t] = w;
      s.work[t] = work;
    }
  }
  const int64_t cells = s.slots * H;
  s.slot_b = emxi_arena_take(arena, s.slots, sizeof(int32_t));
  s.slot_chunk = emxi_arena_take(arena, s.slots, sizeof(int32_t));
  s.first_slot = emxi_arena_take(arena, d->B, sizeof(int64_t));
  s.partial = emxi_arena_take(arena, cells, sizeof *s.partial);
  s.part = emxi_arena_take(arena, d->per_head || d->alpha == 1.0 ? cells * EMXI_QLD : 0, sizeof(float));
  s.list = emxi_arena_take(arena, d->per_head || d->alpha > 1.0 ? cells * SEGMENT : 0, sizeof(float));
  s.pos = emxi_arena_take(arena, d->per_head || d->alpha > 1.0 ? cells * SEGMENT : 0, sizeof(int32_t));
  if (!arena->base) return EMX_OK;
  EMX_TRY(emxi_arena_check(arena, "emx_decode"));
  for (int32_t h = 0; h < H; h++) s.values |= emxi_decode_alpha(d, h) == 1.0;

  for (int32_t b = 0; b < d->B;) { /* as many sequences as there are slots for */
    int64_t used = 0;
    for (s.first_b = b; b < d->B; b++) {
      int64_t length;
      emxi_decode_entry(d, b, &length);
      const int64_t chunks = chunks_of(length);
      if (used + chunks > s.slots) break;
      s.first_slot[b] = used;
      for (int64_t k = 0; k < chunks; k++, used++) {
        s.slot_b[used] = b;
        s.slot_chunk[used] = (int32_t)k;
      }
    }
    EMX_TRY(emxi_parallel(ctx, used, read_chunk, &s));
    EMX_TRY(emxi_parallel(ctx, (int64_t)(b - s.first_b) * d->kv->G * s.blocks, finish_item, &s));
  }
  return EMX_OK;
}
