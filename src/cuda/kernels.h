/* SPDX-License-Identifier: Apache-2.0
 * What the host side of the CUDA back end (C) and its kernels (CUDA C++) share: plain structs, passed to kernels by value, and the
 * functions that launch. A launch returns nothing: the caller asks cudaGetLastError. */
#ifndef EMXI_CUDA_KERNELS_H
#define EMXI_CUDA_KERNELS_H

#include <emx.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Sequences of one launch; larger batches are several launches. Their lengths and ids travel as kernel arguments. */
#define EMXI_CUDA_SLICE 64
/* Positions of a chunk: what one warp scores in one go, and what one candidate segment has room for. A local position is a byte. */
#define EMXI_CUDA_CHUNK 128
#define EMXI_CUDA_POINTS 16
#define EMXI_CUDA_PARTS 16
#define EMXI_CUDA_SOLVE_THREADS 512
#define EMXI_CUDA_UPDATES 300

/* The first fault of asynchronous work, in host memory that the device sees; who may write it is decided by a word in device memory. */
enum {
  EMXI_CUDA_FAULT_PAGE = 1,       /* block_table[row][column] */
  EMXI_CUDA_FAULT_LENGTH = 2,     /* seq_lens[row], with a column n_new[row] */
  EMXI_CUDA_FAULT_LIST = 3,       /* page list of row: entry `column`, or with column -1 their number */
  EMXI_CUDA_FAULT_ALPHA = 4,      /* alphas[row] */
  EMXI_CUDA_FAULT_SUMMARIZE = 5,  /* emx_kv_summarize: pages[row], with a column tokens[row] */
  EMXI_CUDA_FAULT_ROW_ALPHA = 6,  /* maps: alpha of row */
  EMXI_CUDA_FAULT_TARGET = 7,     /* losses: target[row] */
  EMXI_CUDA_FAULT_ROW_BUDGET = 8, /* maps: budget of row */
  EMXI_CUDA_FAULT_ATTN = 9,       /* dense attention: see attn_args.h */
};
typedef struct emxi_cuda_fault {
  int32_t code, row, column, value;
} emxi_cuda_fault;

/* Summaries of complete pages, by page and KV head. A page that is open, unknown, or that holds a NaN or an infinity (also in what
 * would be written here) has size 0: nothing can be said of it, and it is read.
 *   box    smallest and largest element of each coordinate, dtype of the cache
 *   ball   centre (the mean, as code - 128 in steps) and spread of each coordinate (rounded up to steps), a byte each; the radius is
 *          about the centre as the codes say it, so it holds whatever they lost
 * Rows are padded to a multiple of 16 elements with zeros (centre 128): vectors need no remainder. */
typedef struct emxi_cuda_tail {
  float step, spread_step; /* of the codes */
  float radius;            /* >= the largest distance of a key to the centre */
  float size;              /* >= the norm of every key, > 0; 0: nothing is known */
} emxi_cuda_tail;
typedef struct emxi_cuda_summaries {
  char *box;             /* [M,G,2,Dp] or NULL */
  uint8_t *codes;        /* [M,G,2,Dp] centre, spread; or NULL */
  emxi_cuda_tail *tails; /* [M,G]; NULL: the cache has none */
} emxi_cuda_summaries;
#define EMXI_CUDA_PADDED(d) (((d) + 15) / 16 * 16)

/* Sketches of complete groups of 16 keys (a page has P/16), for CERTIFIED. A group without one has size 0.
 *   centre   the mean in signed 8-bit codes times step_c, [Dp]
 *   codes    4 bits a coordinate of a key, (code - 7.5) step from the centre: [Dp/64][32 lanes][4 words], what a lane of a warp gives to
 *            integer tensor products of 16 keys: word w of lane l is of key l/4 + 8 (w%2), dimensions 32 (w/2) + 8 (l%4) and 7 more of
 *            the 64; byte i has dimension i below and i + 4 above
 * radius and error are about the centre and the codes as rounded. Dp is D padded to 64, 128 or 256.
 * All of these, but for size, are of k / w with weights w of the channels of a KV head, powers of two from 1 up: a channel whose keys
 * spread far more than the others' has one above 1, so that it does not set the step of all codes. Distances in these channels (`far`)
 * and in the others are bounded apart, for a query is far longer in the former. The first complete page whose keys say how they spread
 * sets a head's weights for good; a sketch that was made before, under weights of 1, is no sketch afterwards. */
#define EMXI_CUDA_GROUP 16
#define EMXI_CUDA_SKETCH_PADDED(d) ((d) <= 64 ? 64 : (d) <= 128 ? 128 : 256)
typedef struct emxi_cuda_group {
  float step_c, norm_c;     /* |norm_c| >= the norm of the centre; below zero: some weight is above 1 */
  float radius, radius_far; /* >= the distance of a key to the centre */
  float size;               /* >= the norm of every key */
  float step;
  float error, error_far; /* >= the distance of a key to its codes */
} emxi_cuda_group;
typedef struct emxi_cuda_sketch {
  emxi_cuda_group *group; /* [M,G,P/16] or NULL */
  int8_t *centre;         /* [M,G,P/16,Dp] */
  uint8_t *codes;         /* [M,G,P/16,8 Dp] */
  float *weights;         /* [G,Dp]; 0: not set yet */
  int32_t dp;
} emxi_cuda_sketch;
/* A query in the terms of the sketches: q' = scale w q = s1 a + s2 b + rest with 8-bit integers a, b. */
typedef struct emxi_cuda_query {
  float s2, e2;          /* s1 = 254 s2; e2 >= |q' - s1 a - s2 b| */
  float norm, norm_down; /* >= |q'|, <= |q'| in channels of weight 1 */
  float slack_k, slack_0;
  double slope;
  int32_t sum, size; /* of 254 a + b; of the absolute values */
  int32_t row, visible;
  float far, far_down; /* the same in the others; 0: there are none, above 0 else */
} emxi_cuda_query;
/* a and b as words of four dimensions, and scale q itself; zero from D on. */
typedef struct emxi_cuda_words {
  int32_t a[64], b[64];
  float q[256];
} emxi_cuda_words;
/* Alphas whose rows CERTIFIED's kernels take; others, and 1, are ALL's: bounds of a threshold need a convex power of moderate exponent. */
#define EMXI_CUDA_CERT_ALPHA_LEAST 1.05
#define EMXI_CUDA_CERT_ALPHA_MOST 2.0
/* State of a row of CERTIFIED. */
#define EMXI_CUDA_BINS 256
typedef struct emxi_cuda_cert {
  int32_t limit;                 /* ordered integer of a score: at or below it nothing has weight. Only rises */
  float base;                    /* the first limit: lower edge of bin 0 */
  float slack;                   /* >= the error of any score */
  uint32_t tokens, pages, codes; /* read: keys, pages, groups' codes */
  int32_t longest;    /* bits of a float: largest square of a norm among the first keys that `fetch` (limits.cu) reads */
  int32_t unused[25]; /* a line of its own: it is polled */
} emxi_cuda_cert;

/* The same with a limit (limits.cu), in units of scores. */
typedef struct emxi_cuda_limit {
  double delta;      /* when stopped: bound of the mass of what was not read */
  float first, low;  /* at or below it is no bound that is listed; at or below it nothing has weight */
  float cut, before; /* keys with bounds above the cut are read; above the one before they had been */
  float far;         /* when stopped: no score that was not read is larger */
  int32_t listed;    /* bounds */
  int32_t stopped;   /* EMX_STOP_*; -1: not yet */
} emxi_cuda_limit;

typedef struct emxi_cuda_pool {
  char *k, *v;
  int64_t k_page, k_head, k_token, v_page, v_head, v_token; /* elements */
  int32_t G, D, P, shift, dtype;                            /* shift: log2 P */
  int32_t max_pages;
  emxi_cuda_summaries sum;
  emxi_cuda_sketch sketch;
} emxi_cuda_pool;

typedef struct emxi_cuda_batch {
  const int32_t *tables;  /* [rows, stride] */
  const int32_t *lengths; /* device, by entry; NULL: len[] */
  int64_t stride;
  int32_t n, added; /* added: tokens that this call has appended and that lengths[] does not count */
  int64_t limit;    /* with lengths: no entry may be longer, `added` included */
  emxi_cuda_fault *fault;
  int32_t *claimed;
  int32_t seq[EMXI_CUDA_SLICE], len[EMXI_CUDA_SLICE];
} emxi_cuda_batch;

/* Updates of block tables. */
typedef struct emxi_cuda_updates {
  int32_t *tables;
  int64_t stride;
  int32_t n;
  int32_t seq[EMXI_CUDA_UPDATES], at[EMXI_CUDA_UPDATES], page[EMXI_CUDA_UPDATES];
} emxi_cuda_updates;

typedef struct emxi_cuda_copies {
  emxi_cuda_pool pool;
  int32_t n, from[EMXI_CUDA_SLICE], to[EMXI_CUDA_SLICE], tokens[EMXI_CUDA_SLICE];
} emxi_cuda_copies;

/* Entry b's n[b] (or t) new tokens go behind its length. */
typedef struct emxi_cuda_append {
  emxi_cuda_pool pool;
  emxi_cuda_batch batch;
  const int32_t *n;
  const char *k, *v;
  int64_t k_stride[3], v_stride[3]; /* batch, head, token; elements */
  int32_t t, dtype;                 /* dtype: of k and v, the cache's or f32 */
} emxi_cuda_append;

/* Rows [from, from + n) of entry 0, packed as [G,n,D] in the cache's dtype. */
typedef struct emxi_cuda_packed {
  emxi_cuda_pool pool;
  emxi_cuda_batch batch;
  int64_t from, n;
  char *k, *v;
} emxi_cuda_packed;

/* emx_kv_summarize: lists in device memory. */
typedef struct emxi_cuda_listed {
  emxi_cuda_pool pool;
  emxi_cuda_batch batch; /* for faults */
  const int32_t *pages, *tokens;
  int64_t n;
} emxi_cuda_listed;

/* What is left to do for a row whose values are added by all the device. */
typedef struct emxi_cuda_wide {
  double t;
  float m, thr;
  uint32_t wide, done; /* who adds values; done: blocks that have added their share */
  uint32_t arrived;    /* parts that have packed what they have */
  /* for the bound of what was not read */
  double exact;   /* threshold that was solved, relative to m; alpha = 1: sum of exp(s - m) */
  int32_t solved; /* the row has scores, all below +inf */
} emxi_cuda_wide;

/* What parts of the scan tell each other of a row. */
typedef struct emxi_cuda_told {
  uint32_t top;  /* the largest score, as an unsigned integer of the same order; 0: none yet */
  uint32_t next; /* of an item's first row: chunks that have been taken */
} emxi_cuda_told;

/* What a selector says of a row. */
typedef struct emxi_cuda_choice {
  double estimate;   /* GAUSSIAN: threshold in units of (alpha-1) score */
  float max_unread;  /* bound of the scores of all pages that are not read; -inf: all are */
  float size;        /* >= the norm of every key that may be read */
  int32_t estimated; /* GAUSSIAN: there is an estimate */
  int32_t judged;    /* pages whose summaries were read */
} emxi_cuda_choice;

/* Blocks that share a row's pages. */
#define EMXI_CUDA_PICKS 32
/* What kernels of a selector leave each other of a row. */
typedef struct emxi_cuda_judged {
  double norm, lost;          /* of the query; what its elements below the normal floats may cost a score */
  uint32_t picked, certified; /* parts that have begun to choose, that have counted bounds */
  uint64_t
      part[EMXI_CUDA_PICKS]; /* choose: pages + 1, ordered integer of the largest bound left out; of certify, alpha = 1: a sum */
} emxi_cuda_judged;

/* One slice of a selection or a decode. Rows of the workspace: (b, h, s) in BHND order within the slice. */
typedef struct emxi_cuda_decode {
  emxi_cuda_pool pool;
  emxi_cuda_batch batch;
  int32_t H, S, group;               /* group: H / G */
  int32_t rows, blocks;              /* rows of a work item; items of a (sequence, KV head): they cover group * S rows */
  int32_t splits, shares;            /* parts of a sequence: in the scan; in the sums of wide rows */
  int32_t parts;                     /* blocks that look at a row's candidates */
  int32_t q_dtype, o_dtype, vectors; /* vectors: rows of K may be read 16 bytes at a time */
  int32_t shared;                    /* bytes of shared memory that a block may have */
  int32_t overlap;                   /* a kernel may be made ready while the one before it ends */
  double alpha;
  double power; /* 1/(alpha-1), and the integer that it is, 1..4, or 0 */
  int32_t power_kind;
  const double *alphas; /* [H] or NULL: alpha for all */
  float scale;
  const char *q;
  char *o;
  int64_t q_stride[3], o_stride[3];
  const float *slopes;
  char *reports; /* of the slice's first row, or NULL */
  int64_t report_stride;
  int64_t chunks; /* room for each row */
  /* alpha > 1 */
  float *z;             /* [rows, chunks, CHUNK] candidate scores, in a fixed order of positions */
  uint8_t *local;       /* [rows, chunks, CHUNK] their positions in the chunk */
  uint8_t *count;       /* [rows, chunks] */
  float *chunk_max;     /* [rows, chunks] */
  emxi_cuda_told *told; /* [rows] or NULL: keys are not copied in bulk */
  int32_t *bad;         /* [rows, splits] NaN or +inf among the scores */
  emxi_cuda_wide *wide; /* [rows] */
  float *share;         /* [rows, shares, D] */
  /* Of rows with many candidates: [rows, parts, warps of a block, packed] and places among z, [rows, parts, warps] how many. If more than
   * there is room for, a row is solved from all its candidates. */
  float *packed_z;
  int32_t *packed_at, *packed_n, packed; /* a multiple of 32 */
  float *points; /* [rows, parts, 2, EMXI_CUDA_POINTS] mass and slope of what a part has packed, at several thresholds */
  /* alpha = 1 */
  float *part_o; /* [rows, splits, D] sum of exp(s - m) v */
  float *part_m, *part_z;
  int32_t *part_n; /* scores above -inf */
  /* Selectors other than ALL, or lists of ALL's pages (S = 1 but for those). What a row reads are the pages of list[], one after the other:
   * positions of the workspace above count along them. */
  int32_t kind, select_only, sparse, bounds, box; /* bounds: of what is left out are wanted; box: by boxes, else by balls */
  int32_t tau_mode, tau_steps;
  int64_t pages, budget;            /* pages: room for each row; budget: in pages */
  int32_t page_splits, judge_heads; /* judge_heads: KV heads of a block that judges by balls */
  float page_z, safety_margin, excess_margin;
  float *upper;                   /* [rows, pages] no score of the page is larger; +inf: not known, -inf: the page is read */
  float *mu, *sigma;              /* [rows, pages] GAUSSIAN; without slopes mu is mu + page_z sigma, and sigma is not there */
  float *sizes;                   /* [rows, page_splits] */
  double *stats;                  /* [rows, page_splits, 4] GAUSSIAN: pages, sums of mu, sigma, mu^2 + sigma^2 */
  uint32_t *chosen;               /* [rows, pages/32] */
  int32_t *list, *place, *n_list; /* [rows, pages] logical and physical; [rows] */
  emxi_cuda_choice *choice;       /* [rows] */
  int32_t picks;                  /* parts of a row's pages, at most EMXI_CUDA_PICKS */
  emxi_cuda_judged *judged;       /* [rows] */
  uint32_t *bins;                 /* [rows, BINS] certify: pages by bound */
  /* CERTIFIED; items as in the scan */
  int64_t cert_groups; /* room for each row */
  float *cert_upper;   /* [rows, cert_groups] no score of the group is larger */
  uint64_t *cert_best; /* [rows, splits, 2] best group of the part by centre and by bound: ordered value, number; 0: none */
  float *cert_size;    /* [items, splits] largest norm of its keys */
  int32_t *cert_flat;  /* [items] takes ALL's scan */
  uint32_t *cert_bins; /* [rows, BINS] */
  emxi_cuda_query *cert_query; /* [rows] */
  emxi_cuda_words *cert_words; /* [rows] */
  emxi_cuda_cert *cert;        /* [rows]; NULL: not CERTIFIED */
  /* max_bytes or max_delta (else all NULL and 0) */
  int64_t max_bytes;
  double max_delta;
  int32_t cert_round;
  float *cert_bound;           /* [rows, chunks, CHUNK] bounds of keys that may matter, in the order of their positions */
  uint8_t *cert_local;         /* [rows, chunks, CHUNK] positions in the chunk */
  uint8_t *cert_count;         /* [rows, chunks] */
  float *split_max;            /* [rows, splits] largest score of the part's keys that are read */
  emxi_cuda_limit *cert_limit; /* [rows] */
  /* the caller's lists: read with PAGES, written by emx_select */
  int32_t *io_pages, *io_n;
  float *io_bound; /* or NULL */
  int64_t io_pages_stride[3], io_n_stride[3], io_bound_stride[3], io_width;
} emxi_cuda_decode;

/* 1: the code that runs on the current device is for compute 9.0 or later, so kernels wait for the one before them where their starts
 * overlap. Code made from the PTX of compute 8.0 does not, whatever the device. */
int emxi_cuda_kernels_wait(void);
void emxi_cuda_launch_updates(const emxi_cuda_updates *u, void *stream);
void emxi_cuda_launch_copies(const emxi_cuda_copies *c, void *stream);
void emxi_cuda_launch_read(const emxi_cuda_packed *r, void *stream);
void emxi_cuda_launch_append(const emxi_cuda_append *a, void *stream);
void emxi_cuda_launch_summaries(const emxi_cuda_append *a, void *stream); /* of the pages that the append has touched */
void emxi_cuda_launch_listed(const emxi_cuda_listed *l, void *stream);
/* Lists of pages; after the decode, what they left out. */
void emxi_cuda_select(const emxi_cuda_decode *d, void *stream);
void emxi_cuda_certify(const emxi_cuda_decode *d, void *stream);
/* CERTIFIED: sketches of pages; bounds of groups; keys within a limit; what was read, into the reports. */
void emxi_cuda_launch_sketches(const emxi_cuda_append *a, void *stream);
void emxi_cuda_launch_listed_sketches(const emxi_cuda_listed *l, void *stream);
void emxi_cuda_judge(const emxi_cuda_decode *d, void *stream);
void emxi_cuda_limits(const emxi_cuda_decode *d, void *stream);
void emxi_cuda_account(const emxi_cuda_decode *d, void *stream);
/* One translation unit per dtype of the cache. */
void emxi_cuda_decode_f32(const emxi_cuda_decode *d, void *stream);
void emxi_cuda_decode_f16(const emxi_cuda_decode *d, void *stream);
void emxi_cuda_decode_bf16(const emxi_cuda_decode *d, void *stream);

#ifdef __cplusplus
}
#endif
#endif
