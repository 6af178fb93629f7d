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
/* Shared memory of the solver: the scores of twice `listed` candidates, or of `listed` with their positions; and chunks that have some.
 * Rows with more are solved from global memory. What a multiprocessor of compute capability 8.0 and 9.0 has, and others. */
#define EMXI_CUDA_LISTED 12288
#define EMXI_CUDA_LISTED_LEAST 4096
#define EMXI_CUDA_ALIVE 8192
#define EMXI_CUDA_SOLVE_BYTES(listed) ((size_t)(listed)*8 + (size_t)EMXI_CUDA_ALIVE * 6)
#define EMXI_CUDA_UPDATES 300
#define EMXI_CUDA_MAX_ROWS 8 /* query rows that share one read of K */

/* The first fault of asynchronous work, in host memory that the device sees; who may write it is decided by a word in device memory. */
enum { EMXI_CUDA_FAULT_PAGE = 1, EMXI_CUDA_FAULT_LENGTH = 2 };
typedef struct emxi_cuda_fault {
  int32_t code, row, column, value;
} emxi_cuda_fault;

typedef struct emxi_cuda_pool {
  char *k, *v;
  int64_t k_page, k_head, k_token, v_page, v_head, v_token; /* elements */
  int32_t G, D, P, shift, dtype;                            /* shift: log2 P */
  int32_t max_pages;
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

/* What is left to do for a row whose values are added by all the device. */
typedef struct emxi_cuda_wide {
  double t;
  float m, thr;
  uint32_t wide, done; /* done: blocks that have added their share */
} emxi_cuda_wide;

/* One slice of a decode with ALL. Rows of the workspace: (b, h, s) in BHND order within the slice. */
typedef struct emxi_cuda_decode {
  emxi_cuda_pool pool;
  emxi_cuda_batch batch;
  int32_t H, S, group;               /* group: H / G */
  int32_t rows, blocks;              /* rows of a work item; items of a (sequence, KV head): they cover group * S rows */
  int32_t splits, shares;            /* parts of a sequence: in the scan; in the sums of wide rows */
  int32_t listed;                    /* EMXI_CUDA_LISTED or _LEAST */
  int32_t q_dtype, o_dtype, vectors; /* vectors: rows of K may be read 16 bytes at a time */
  double alpha;
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
  float *split_max;     /* [rows, splits] */
  int32_t *bad;         /* [rows, splits] NaN or +inf among the scores */
  emxi_cuda_wide *wide; /* [rows] */
  float *share;         /* [rows, shares, D] */
  /* alpha = 1 */
  float *part_o; /* [rows, splits, D] sum of exp(s - m) v */
  float *part_m, *part_z;
  int32_t *part_n; /* scores above -inf */
} emxi_cuda_decode;

void emxi_cuda_launch_updates(const emxi_cuda_updates *u, void *stream);
void emxi_cuda_launch_copies(const emxi_cuda_copies *c, void *stream);
void emxi_cuda_launch_append(const emxi_cuda_append *a, void *stream);
/* One translation unit per dtype of the cache. */
void emxi_cuda_decode_f32(const emxi_cuda_decode *d, void *stream);
void emxi_cuda_decode_f16(const emxi_cuda_decode *d, void *stream);
void emxi_cuda_decode_bf16(const emxi_cuda_decode *d, void *stream);

#ifdef __cplusplus
}
#endif
#endif
