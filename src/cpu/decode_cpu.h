/* SPDX-License-Identifier: Apache-2.0
 * State of one work item of a decode: a sequence, a KV head, and up to EMXI_ITEM_ROWS query rows that share every key read. */
#ifndef EMXI_DECODE_CPU_H
#define EMXI_DECODE_CPU_H

#include "cpu/backend_cpu.h"
#include "cpu/kv_kernels.h"
#include "kv/kv.h"

#define EMXI_ITEM_ROWS 32
#define EMXI_BLOCK 256 /* tokens scored at a time: a multiple of every page size, aligned to its own size in the sequence */
#define EMXI_CHUNK 512 /* softmax sums run in float over these many positions, aligned, and in double across them */
#define EMXI_QLD 256   /* row pitch of q and o in the work memory */
#define EMXI_SLD (EMXI_BLOCK + 16) /* row pitch of scores: kernels store whole vectors */
#define EMXI_FAR 8192              /* keys of the check of page lists */
#define EMXI_FAR_LD (EMXI_FAR + 64)
#define EMXI_PREFETCH 8192 /* bytes ahead of the arithmetic: a sixth of a first-level cache */

/* Online softmax over one chunk: sum of exp(s - m), and the sum of exp(s - m) v next to it in float. */
typedef struct emxi_partial {
  float m;
  bool bad;     /* NaN or +inf among the scores */
  int64_t n;    /* scores above -inf; alpha > 1: candidates */
  int64_t used; /* values added */
  double z;
} emxi_partial;

/* One worker's memory. */
typedef struct emxi_work {
  float *q;        /* [rows, QLD] times scale */
  double *o;       /* [rows, QLD] */
  float *part;     /* [rows, QLD] sum of one chunk of values */
  float *score;    /* [rows, SLD] */
  int32_t *at;     /* [rows, SLD] positions of the scores, when pages are missing from the block */
  float *weight;   /* [SLD] */
  int32_t *index;  /* [SLD] */
  int64_t *offset; /* [BLOCK] of values */
  char *rows;      /* K and V in a file: a head's keys of a block, or twice EMXI_PREFETCH bytes of values */
  float *list;     /* [rows, list_ld] candidate scores, ascending positions */
  int32_t *pos;    /* [rows, list_ld] */
  int64_t list_ld;
  /* Sparse selectors: per row and page. */
  int64_t page_ld;
  uint8_t *chosen;      /* [rows, page_ld] page is read */
  uint8_t *any;         /* [page_ld] some row reads it */
  uint8_t *usable;      /* [page_ld] complete, summarised, finite: may be judged by its summary */
  float *upper;         /* [rows, page_ld] no score of the page, true or computed, is larger; +inf where nothing is known */
  float *slack;         /* [rows, page_ld] >= the rounding error of a score of the page */
  float *mu, *sigma;    /* [rows, page_ld] GAUSSIAN */
  float *pick, *spread; /* [page_ld] scratch */
  /* The check of page lists (certified_lists.c). */
  int64_t super_ld;
  float *super;        /* [8, super_ld] bounds of superpages */
  uint8_t *valid;      /* [super_ld] */
  int32_t *check;      /* [page_ld] pages that may matter */
  uint8_t *check_rows; /* [page_ld] to which rows */
  uint8_t *need;       /* [page_ld] */
  float *far;          /* [rows, FAR_LD] bounds of keys of pages that were looked at */
  int32_t *far_pos;    /* [8, FAR_LD] */
} emxi_work;

typedef struct emxi_row {
  int32_t h, s;
  int64_t visible; /* keys that the row sees */
  float slope;
  double alpha;
  bool bad;    /* NaN or +inf in q or in a score: the result is NaN */
  float *list; /* candidate scores, ascending positions */
  int32_t *pos;
  float m, floor, below; /* largest score; list keeps what exceeds min(below, floor) */
  int64_t n;             /* candidates; alpha = 1: scores above -inf */
  double z;              /* alpha = 1: sum of exp(s - m) */
  emxi_partial chunk;
  double norm;      /* ||q|| rounded up */
  double underflow; /* error of a score from elements of scale * q below the smallest normal float */
  /* selection */
  bool has_estimate;
  double estimate;   /* GAUSSIAN: threshold in units of (alpha-1) score */
  double slack;      /* largest error of a score that was read */
  double max_unread; /* in score units; -inf if all was read */
  const float *far; /* [n_far] bounds of single keys that were not read; n_below others are at or below `limit`, in score units */
  int64_t n_far, n_below;
  double limit;
  bool ladder; /* CERTIFIED: the list is what matters, the counts are made, delta bounds what was left out */
  double delta;
  uint8_t stopped_by;
  int64_t pages, tokens, bytes_k, bytes_v, bytes_meta;
  /* the answer */
  emxi_solution sol; /* alpha > 1: on what was read; list[0..support) is its support */
  double tau, mass;
  int64_t support;
  bool exact; /* tau was solved, not estimated */
} emxi_row;

typedef struct emxi_item {
  const emxi_decode *d;
  const emxi_table *k;
  emxi_work *w;
  emx_ctx *ctx;
  const int32_t *table;
  int64_t length, pages; /* of the sequence */
  int32_t b, g, rows;
  int32_t first_row;  /* of H/G * S, in the order (s, head in group) */
  double page_z;      /* GAUSSIAN: quantile of a page's maximum, in spreads */
  int32_t page_shift; /* log2 P */
  int64_t next;       /* page to prefetch */
  bool sparse;        /* chosen[] says which pages are read; otherwise all */
  bool bounds;        /* upper[], slack[] and max_unread are wanted */
  emxi_row row[EMXI_ITEM_ROWS];
} emxi_item;

/* Bytes of one contiguous read, in whole lines. */
static inline int64_t emxi_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static inline int64_t emxi_page_tokens(const emxi_item *it, int64_t page) {
  const int64_t left = it->length - page * it->d->kv->P;
  return left < it->d->kv->P ? left : it->d->kv->P;
}
static inline int64_t emxi_rows_bytes(const emx_kv *kv) {
  const int64_t block = EMXI_BLOCK * kv->D * (int64_t)emx_dtype_size(kv->dtype);
  return !kv->file ? 0 : block > 2 * EMXI_PREFETCH ? block : 2 * EMXI_PREFETCH;
}
static inline void emxi_prefetch(const char *p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
}
/* The first n rows of a page. */
static inline void emxi_prefetch_rows(const char *p, int64_t token_stride, const emx_kv *kv, int64_t n) {
  const size_t es = emx_dtype_size(kv->dtype), row = (size_t)kv->D * es;
  if (token_stride == kv->D) {
    emxi_prefetch(p, row * (size_t)n);
  } else {
    for (int64_t t = 0; t < n; t++) emxi_prefetch(p + (size_t)(t * token_stride) * es, row);
  }
}
/* One key that will be read. */
static inline void emxi_prefetch_key(const emx_kv *kv, int32_t page, int32_t head, int64_t token) {
  if (kv->file)
    emxi_kv_file_expect_keys(kv, page, head, token, 1);
  else
    emxi_prefetch(emxi_kv_k(kv, page, head, token), (size_t)kv->D * emx_dtype_size(kv->dtype));
}
/* What cannot be in the support once a score m was seen: one float further down covers the rounding of the difference. */
static inline float emxi_below(float m, double alpha) { return nextafterf((float)((double)m - 1.0 / (alpha - 1.0)), -INFINITY); }

/* For a block whose smallest score is -inf: where the key is finite, a partial sum has overflowed and the true score may be
 * anything. Such scores become NaN. Positions are at[j], or start + j. */
void emxi_cpu_overflows(const emx_kv *kv, const int32_t *table, int32_t g, float *s, const int32_t *at, int64_t start, int64_t n);
/* Fills chosen[], any[] and, if wanted, the bounds (select_cpu.c). Leaves sparse false if every row reads every page. */
void emxi_cpu_select(emxi_item *it);
/* Bound of the mass of tokens that are not in the list, from its exact scores and upper bounds of theirs: T6 in its root form,
 * and for alpha = 1 the share of a sum of exponentials. */
typedef struct emxi_dropped {
  const emxi_table *k;
  double alpha;
  const float *list; /* [n] scores above tau_low, a lower bound of the threshold in units of (alpha-1) score; alpha = 1: any */
  int64_t n;
  float top;             /* the largest of them */
  double tau_low, slack; /* largest error of a listed score */
  struct {
    const float *up; /* bounds, each of `times` tokens; +inf: nothing is known */
    int64_t n;
    double times;
  } far[3];
} emxi_dropped;
double emxi_cpu_dropped_mass(const emxi_dropped *x);
/* sum exp(s - m), m >= every s; off by less than 1e-5 of itself plus n 1e-37. */
double emxi_cpu_exp_sum(const emxi_table *k, const float *s, int64_t n, float m);
/* The same for the unread tokens of a row whose answer is there. */
double emxi_cpu_dropped(const emxi_item *it, int r);
/* The row's tau rounded down: T2 for the scores' errors, plus what the solver's own arithmetic may have lost. alpha > 1. */
double emxi_cpu_tau_low(const emxi_row *row);
/* Bounds of what the rows have not read from sketches, where the cache has them (certified_lists.c). */
void emxi_cpu_check_lists(emxi_item *it);

/* decode_cpu.c */
void emxi_cpu_carve(const emxi_decode *d, emxi_arena *a, emxi_work *w, int64_t rows, bool lists);
/* emx_select: the lists and bounds of the item's rows. */
void emxi_cpu_write_lists(const emxi_item *it);
/* An item of sequence b, KV head g and rows from first_row on, its queries loaded. */
void emxi_cpu_open_item(emxi_item *it, emx_ctx *ctx, const emxi_decode *d, emxi_work *w, int32_t b, int32_t g, int32_t first_row,
                        int32_t rows);
void emxi_cpu_load_query(const emxi_table *k, const emxi_decode *d, int32_t b, emxi_row *row, float *q);
/* One block of a chunk: p[0..n) = exp(s - m) after the chunk's sums, [part] included, went over to the block's maximum. False: no
 * weight in this block. */
bool emxi_cpu_softmax_block(const emxi_table *k, int d, const float *s, int64_t n, emxi_partial *c, float *part, float *p);
/* A finished chunk joins the row; o [QLD]. */
void emxi_cpu_softmax_merge(int d, emxi_row *row, const emxi_partial *c, const float *part, double *o);
/* Reads and scores the keys of the item's rows: all of them, or those of the chosen pages. */
void emxi_cpu_stream(emxi_item *it);
/* Threshold, values (alpha > 1) and output of a row whose scores are in. */
void emxi_cpu_solve_row(emxi_item *it, int r);
/* Its report. */
void emxi_cpu_report_row(emxi_item *it, int r);
/* Both. */
void emxi_cpu_finish_row(emxi_item *it, int r);

/* sweep_cpu.c: ALL with one query token per sequence. */
emx_status emxi_cpu_sweep(emx_ctx *ctx, const emxi_decode *d, emxi_arena *arena);

/* certified_cpu.c: CERTIFIED. */
emx_status emxi_cpu_certified(emx_ctx *ctx, const emxi_decode *d, emxi_arena *arena);

#endif
