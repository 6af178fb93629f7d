/* SPDX-License-Identifier: Apache-2.0
 * State of one work item of a decode: a sequence, a KV head, and up to EMXI_ITEM_ROWS query rows that share every key read. */
#ifndef EMXI_DECODE_CPU_H
#define EMXI_DECODE_CPU_H

#include "cpu/backend_cpu.h"
#include "cpu/kv_kernels.h"
#include "kv/kv.h"

#define EMXI_ITEM_ROWS 32
#define EMXI_BLOCK 256 /* tokens scored at a time: a multiple of every page size, aligned to its own size in the sequence */
#define EMXI_QLD 256   /* row pitch of q and o in the work memory */

/* One worker's memory. */
typedef struct emxi_work {
  float *q;        /* [rows, QLD] times scale */
  double *o;       /* [rows, QLD] */
  float *part;     /* [QLD] sum of one chunk of values */
  float *score;    /* [rows, BLOCK+16] */
  int32_t *at;     /* [rows, BLOCK+16] positions of the scores, when pages are missing from the block */
  float *weight;   /* [BLOCK+16] */
  int32_t *index;  /* [BLOCK+16] */
  int64_t *offset; /* [BLOCK] of values */
  float *list;     /* [rows, list_ld] candidate scores, ascending positions */
  int32_t *pos;    /* [rows, list_ld] */
  int64_t list_ld;
  /* Sparse selectors: per row and page. */
  int64_t page_ld;
  uint8_t *chosen; /* [rows, page_ld] page is read */
  uint8_t *any;    /* [page_ld] some row reads it */
  uint8_t *usable; /* [page_ld] complete, summarised, finite: may be judged by its summary */
  float *upper;    /* [rows, page_ld] no score of the page, true or computed, is larger; +inf where nothing is known */
  float *slack;    /* [rows, page_ld] >= the rounding error of a score of the page */
  float *mu, *sigma; /* [rows, page_ld] GAUSSIAN */
  float *pick, *spread; /* [page_ld] scratch */
} emxi_work;

typedef struct emxi_row {
  int32_t h, s;
  int64_t visible;  /* keys that the row sees */
  float slope;
  bool bad;         /* NaN or +inf in q or in a score: the result is NaN */
  float m, floor, below; /* largest score; list keeps what exceeds min(below, floor) */
  int64_t n;        /* candidates; alpha = 1: scores above -inf */
  double z;         /* alpha = 1: sum of exp(s - m) */
  double norm;      /* ||q|| rounded up */
  /* selection */
  bool has_estimate;
  double estimate;  /* GAUSSIAN: threshold in units of (alpha-1) score */
  double slack;     /* largest error of a score that was read */
  double max_unread; /* in score units; -inf if all was read */
  int64_t pages, tokens, bytes_k, bytes_v, bytes_meta;
} emxi_row;

typedef struct emxi_item {
  const emxi_decode *d;
  const emxi_table *k;
  emxi_work *w;
  emx_ctx *ctx;
  const int32_t *table;
  int64_t length, pages; /* of the sequence */
  int32_t b, g, rows;
  int32_t first_row;     /* of H/G * S, in the order (s, head in group) */
  double page_z;         /* GAUSSIAN: quantile of a page's maximum, in spreads */
  bool sparse;           /* chosen[] says which pages are read; otherwise all */
  bool bounds;           /* upper[], slack[] and max_unread are wanted */
  emxi_row row[EMXI_ITEM_ROWS];
} emxi_item;

/* Bytes of one contiguous read, in whole lines. */
static inline int64_t emxi_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static inline int64_t emxi_page_tokens(const emxi_item *it, int64_t page) {
  const int64_t left = it->length - page * it->d->kv->P;
  return left < it->d->kv->P ? left : it->d->kv->P;
}

/* Fills chosen[], any[] and, if wanted, the bounds (select_cpu.c). Leaves sparse false if every row reads every page. */
void emxi_cpu_select(emxi_item *it);
/* T6 in its root form: bound of the mass of the row's unread tokens, from the candidates list[0..n) above tau_low (absolute, units of
 * (alpha-1) score). alpha > 1. */
double emxi_cpu_dropped(const emxi_item *it, int r, const float *list, int64_t n, double tau_low);
/* The same for softmax. */
double emxi_cpu_dropped_softmax(const emxi_item *it, int r);

#endif
