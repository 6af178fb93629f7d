/* SPDX-License-Identifier: Apache-2.0
 * The certified selector on the CPU: state of an item (a sequence, a KV head, up to 8 query heads that share every read) and of
 * its chunks (65536 positions each, whatever the number of threads). Bounds are derived in docs/numerics.md, "Sketches". */
#ifndef EMXI_CERTIFIED_H
#define EMXI_CERTIFIED_H

#include "cpu/decode_cpu.h"
#include "cpu/sketch_kernels.h"

#define CERT_ROWS 8
#define CERT_CHUNK 65536                 /* positions */
#define CERT_SUPERS (CERT_CHUNK / 64)    /* of a chunk */
#define CERT_CANDIDATES (CERT_CHUNK / 4) /* of a row and chunk that the planes leave; more: the item takes ALL's path */
#define CERT_FOUND 4096                  /* scores above the limit of a row and chunk; more: the same */
#define CERT_SEEDS 2                     /* superpages with the best centres, and as many with the best bounds */
#define CERT_BLOCK EMXI_SKETCH_BLOCK     /* groups judged at a time */
#define CERT_PROBE 256                   /* groups of a probe */
#define CERT_READ 0x80

typedef struct cert_query {
  emxi_sketch_query x; /* its limit is set where groups are judged */
  double alpha, a;     /* alpha - 1 */
  double raw;          /* >= |q| */
  int64_t visible;
  /* alpha = 1, where nothing has weight zero: the limit lies `rest` below the logarithm of the sum found so far, so that all keys
   * below it together are not worth more than half of max_delta, and keys are read at once only `cool` above it. */
  double rest, cool;
} cert_query;

/* Exact scores of one row that may matter, and what follows from them: nothing at or below `limit` has weight (alpha = 1: is
 * read, or used if it was). In score units. */
typedef struct cert_list {
  float *s;
  int32_t *pos;
  int64_t n, cap;
  double limit;
  double tau;   /* a lower bound of the threshold of the computed scores, in units of (alpha-1) score */
  double slack; /* largest error of a listed score; alpha = 1: of any score that was read */
  bool bad;     /* NaN or +inf was met */
  bool full;
} cert_list;

typedef struct cert_count {
  int64_t tokens, bytes_k, bytes_meta;
} cert_count;

/* Candidates and exact scores of one chunk, or of the item itself. */
typedef struct cert_slot {
  int32_t item, chunk;
  bool full;                        /* a list was too short */
  int64_t next;                     /* chunk: the first superpage that was not judged, for a limit in bytes */
  cert_list found[CERT_ROWS];       /* a chunk's starts with the item's */
  emxi_sketch_sink left[CERT_ROWS]; /* [cap] candidates: upper bounds of scores, positions */
  int64_t cap;
  cert_count count[CERT_ROWS];
  uint8_t *pages[CERT_ROWS]; /* chunk: bit set: a key of this page was read; [CHUNK/16/8] */
  struct {                   /* chunk: best superpages, by centre and by bound */
    double value;
    int32_t super;
  } best[CERT_ROWS][2][CERT_SEEDS];
} cert_slot;

typedef struct cert_item {
  const emxi_decode *d;
  const emxi_table *k;
  const emxi_sketch_kernels *sk;
  emx_ctx *ctx;
  const int32_t *table;
  int32_t b, g, first_row, rows;
  int64_t length, supers; /* complete superpages */
  int32_t shift;          /* log2 P */
  double raw;             /* the largest of its rows */
  bool all;               /* takes ALL's path */
  bool given_up;          /* ... as the seeds or the probe have shown */
  bool skip;              /* the bound of the dropped mass is small enough already */
  int64_t chunk_bytes;    /* of a chunk's row; 0: no limit */
  float *q;               /* [rows, QLD] times scale */
  int8_t *q8;             /* [2 rows, LD]: a of every row, then b of every row */
  cert_query query[CERT_ROWS];
  bool bad[CERT_ROWS];
  cert_slot own;    /* the newest keys, the best superpages, the probe */
  cert_slot *slots; /* its chunks */
  float *upper;     /* [rows, supers_ld] of superpages' scores */
  uint8_t *taken;   /* [supers_ld] CERT_READ: superpage was read; bit g: group g was judged by the probe */
  int64_t supers_ld;
  int64_t first;  /* item of the wave with the same sequence whose `valid` holds for all of them */
  int64_t peers;  /* that item: how many they are */
  uint8_t *valid; /* [supers_ld] the superpage's record describes its pages */
} cert_item;

extern int64_t emxi_certified_short; /* tokens times head dimension: less takes ALL's path */
static inline int64_t cert_chunks(int64_t length) { return (length + CERT_CHUNK - 1) / CERT_CHUNK; }
/* Whether the item's own lists speak for this position. */
static inline bool cert_own(const cert_item *it, int64_t position) {
  const int64_t super = position / EMXI_SUPER;
  return super >= it->supers || it->taken[super] & (CERT_READ | 1u << position % EMXI_SUPER / EMXI_GROUP);
}

/* Index in the head's arrays of the group that holds a position. */
static inline int64_t emxi_cert_group(const cert_item *it, int64_t position) {
  return ((int64_t)it->table[position >> it->shift] << (it->shift - 4)) + ((position & ((1 << it->shift) - 1)) >> 4);
}

/* certified_bounds.c */
void emxi_cert_open_query(cert_item *it, int r, const float *map);
/* Bounds of superpages [from, to) into upper[], and the best of them. */
void emxi_cert_superpages(cert_item *it, const uint8_t *valid, cert_slot *slot, int64_t from, int64_t to);
/* Judges the groups of the chunk's superpages that may matter. */
void emxi_cert_scan(cert_item *it, cert_slot *slot, cert_list *scratch);
/* Judges a few groups from all over the sequence for the item's own lists. Returns the share of keys that the planes leave. */
double emxi_cert_probe(cert_item *it, cert_list *scratch);
/* The check of page lists: looks at n pages, each for the rows in rows[i], by ball and planes, and at what those leave by the key
 * itself. Afterwards all keys of page i are at or below own.found[r].limit or in own.left[r] with their bounds, for the rows
 * still in rows[i]. A row in `open` stays there until it has such a key, so that nothing can certify it; then it goes on only if
 * it is one of `few`, and keys are read up to `most` bytes. */
void emxi_cert_check(cert_item *it, const int32_t *pages, uint8_t *rows, int64_t n, unsigned open, unsigned few, int64_t most);
/* Takes the residual rows of candidates into account. */
void emxi_cert_refine(cert_item *it, int r, emxi_sketch_sink *c);

/* certified_cpu.c: exact keys */
/* >= |k|: from the sketch, else from the key. */
double emxi_cert_norm(const cert_item *it, int64_t position);
/* Largest error of a row's score at a position. norm: >= |k|, or -1. */
double emxi_cert_slack(const cert_item *it, int r, int64_t position, double norm);
/* Scores tokens [from, from + n) of one page for all rows, or for row r >= 0 alone, into slot->found. norm: >= |k|, or -1:
 * measure. */
void emxi_cert_read(cert_item *it, cert_slot *slot, int r, int64_t from, int64_t n, double norm);
/* A better limit from the list, which is cut down to what lies above it. */
void emxi_cert_raise(const cert_item *it, int r, cert_list *list, cert_list *scratch);

#endif
