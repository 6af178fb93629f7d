/* SPDX-License-Identifier: Apache-2.0
 * What the host side of dense attention on a GPU and its kernels share. */
#ifndef EMXI_CUDA_ATTN_ARGS_H
#define EMXI_CUDA_ATTN_ARGS_H

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define EMXI_CUDA_ATTN_TILE 64   /* queries and keys of a tile */
#define EMXI_CUDA_ATTN_BLOCK 192 /* queries of a block of attn_scan.cuh */
#define EMXI_CUDA_ATTN_CAP 256   /* room of a row's list: a longer support takes the dense path */

/* Element [b][h][row]; rows are contiguous. data NULL: absent. */
typedef struct emxi_cuda_mat {
  char *data;
  int64_t batch, head, row; /* strides in elements */
  int32_t dtype, vectors;   /* vectors: every row starts at a multiple of 16 bytes */
} emxi_cuda_mat;

/* A sequence's rows, as checked by the device: first row and length on both sides, and its first tiles and block of 192 queries. */
typedef struct emxi_cuda_span {
  int32_t q0, k0, s, n, q_tile, k_tile, q_block;
} emxi_cuda_span;

/* What the weights of a dense row can be found again from (backward): y = a (s - ref) - (t_hi + t_lo); alpha = 1: exp(s - ref) inv. */
typedef struct emxi_cuda_row {
  float ref, t_hi, t_lo, inv, delta;
  int32_t nan, unused[2];
} emxi_cuda_row;

typedef struct emxi_cuda_weight {
  float p, ds;
} emxi_cuda_weight;

/* Of a row's list, as the forward pass of sm_90a writes it: product of q and k, and position. */
typedef struct __attribute__((aligned(8))) emxi_cuda_entry {
  float x;
  int32_t at;
} emxi_cuda_entry;
/* A row in products of tiles: y = (alpha - 1) s - t (alpha = 1: in base 2; +inf: it has no weights there), and delta, before that is found:
 * whether the row's dq is to be written. */
typedef struct __attribute__((aligned(8))) emxi_cuda_edge {
  float t, delta;
} emxi_cuda_edge;

/* What an EMXI_CUDA_FAULT_ATTN is about: its `column`. */
enum {
  EMXI_CUDA_ATTN_LEN_Q,
  EMXI_CUDA_ATTN_LEN_K,
  EMXI_CUDA_ATTN_CU_Q,
  EMXI_CUDA_ATTN_CU_K,
  EMXI_CUDA_ATTN_PAGE,
  EMXI_CUDA_ATTN_FAR,
  EMXI_CUDA_ATTN_ALPHA
};

/* How the gradients of a tile of queries are found (mode): 0: row by row; else by products with tiles of keys, those that have a weight or
 * all. DONE is added once dq has been found. */
enum { EMXI_CUDA_TILES_SOME = 1, EMXI_CUDA_TILES_ALL = 2, EMXI_CUDA_TILES_DONE = 4 };
enum { EMXI_CUDA_KEYS_DONE = 2 };
/* Nonzeros of an active tile, on average, from which on products of tiles are taken for faster than gathers. Measured are 7, where gathers
 * win, and 67 and 152, where products do (docs/performance.md); the place between is an estimate. */
#define EMXI_CUDA_ATTN_MANY 40

/* What a row's entry of n_list says when it is no length. */
enum { EMXI_CUDA_ROW_DENSE = -1, EMXI_CUDA_ROW_NAN = -2 };

typedef struct emxi_cuda_attn {
  emxi_cuda_mat q, k, v, o, tau, support, d_o, d_q, d_k, d_v, index;
  int64_t list; /* capacity of the caller's support lists */
  int32_t backward, packed;
  double alpha;
  const double *alphas; /* [heads] or NULL */
  double *d_alpha;
  float scale;
  const float *slopes;
  /* Slopes again, or NULL: of heads without one (`sloped` 0), or with one, which alone a launch then takes. */
  const float *split;
  int32_t sloped;
  int64_t left, right;
  int32_t batch, heads, kv_heads, group, d;
  int64_t max_q, max_k, rows_q, rows_k;
  const int32_t *seqlens_q, *seqlens_k, *cu_q, *cu_k;
  const int32_t *block_table;
  int64_t table_stride, table_width, pages;
  int32_t page_size;
  emxi_cuda_fault *fault;
  int32_t *claimed;

  /* A slice: heads [g0, g0 + ng) of sequences [b0, b0 + nb); packed: of all. Its rows of q: [nb, ng * group, max_q], packed:
   * [ng * group, rows_q]; a unit is what reads one KV head: nb * ng of them, packed: ng. */
  int32_t b0, nb, g0, ng;
  int64_t q_tiles, k_tiles, q_blocks; /* of a sequence; packed: of all, an upper bound */
  int32_t quads;                      /* lists are in four parts, of which `at` has the lengths, a byte each: attn_scan.cuh */
  int64_t rows;                       /* of the slice */
  int64_t unit_rows;                  /* q rows of a unit */

  /* workspace */
  emxi_cuda_span *span;     /* [batch] */
  float *norms;             /* [units, k_tiles] no key of the tile is longer; NULL: not for this call */
  float *longest;           /* [units], packed: [units, batch]: of all tiles of a sequence */
  int32_t *n_list;          /* [rows] */
  int32_t *at;              /* [rows] where the list begins */
  uint8_t *todo;            /* [rows] backward: not found in the caller's lists */
  int32_t *dense;           /* [units, group * q_tiles] dense rows of the tile */
  int32_t *pos;             /* [rows, CAP] */
  float *z;                 /* [rows, CAP] forward */
  emxi_cuda_entry *entry;   /* [rows, CAP] forward, the same memory as pos and z */
  float *bound;             /* [rows] forward: a lower bound of the threshold, as a product of q and k */
  emxi_cuda_weight *weight; /* [rows, CAP] backward */
  emxi_cuda_row *row;       /* [rows] backward */
  double *share;            /* [rows] backward: of the gradient of alpha */
  /* products of tiles; odd NULL: not for this call */
  int32_t *odd;  /* [units] 1: has an infinity or a NaN, which products of tiles would spread */
  int32_t *mode; /* [units, group * q_tiles] */
  uint32_t
      *active; /* [units, group * q_tiles, active_words] a bit: 1 << active_shift tiles of keys, from the sequence's first on */
  int32_t active_words, active_shift;
  emxi_cuda_edge *edge; /* [units, group * q_tiles, TILE] */
  /* entries by key: */
  int32_t block_rows;         /* query tiles of a block */
  int64_t blocks;             /* of a unit */
  uint32_t *counts;           /* [units, k_tiles, blocks] entries of a block before a key tile's, then places */
  uint32_t *tile_start;       /* [units, k_tiles + 1] */
  uint32_t *key_start;        /* [units, k_tiles * TILE + 1] */
  uint32_t *by_tile, *by_key; /* [units, unit_rows * CAP] places in pos and weight, relative to the unit's rows */
  float *dk, *dv;             /* [units, k_tiles * TILE, d] shares of dense rows, where has_dense */
  int32_t *has_dense;         /* [units, k_tiles] 1, or EMXI_CUDA_KEYS_DONE: dk and dv have been written */
} emxi_cuda_attn;

/* Forward on sm_90a, but for dense rows: attn_sieve.cuh. sequences: of the slice, packed: 1. */
void emxi_cuda_attn_sieve_f16(const emxi_cuda_attn *a, unsigned sequences, void *stream);
void emxi_cuda_attn_sieve_bf16(const emxi_cuda_attn *a, unsigned sequences, void *stream);
/* One translation unit per dtype of the tile products: that of k where q and d_o have it too, else f32. */
void emxi_cuda_attn_f32(const emxi_cuda_attn *a, void *stream);
void emxi_cuda_attn_f16(const emxi_cuda_attn *a, void *stream);
void emxi_cuda_attn_bf16(const emxi_cuda_attn *a, void *stream);
/* Products of tiles (attn_tiles.cuh). Forward: dense rows. Backward: dq of the tiles of queries that `mode` names, or, keys, their share of
 * dk and dv. */
void emxi_cuda_attn_tiles_f16(const emxi_cuda_attn *a, int keys, unsigned units, void *stream);
void emxi_cuda_attn_tiles_bf16(const emxi_cuda_attn *a, int keys, unsigned units, void *stream);
/* Which units have numbers alone; which tiles of queries have enough nonzeros for products of tiles, by the caller's lists (`given`) or by
 * those that a scan found. */
void emxi_cuda_attn_find_odd(const emxi_cuda_attn *a, unsigned units, void *stream);
void emxi_cuda_attn_survey(const emxi_cuda_attn *a, unsigned tiles, int given, void *stream);
/* Of rows with lists: outputs; gradients of q and weights, `given`: from the caller's lists. tiles: of queries, of the slice. */
void emxi_cuda_attn_resolve_forward(const emxi_cuda_attn *a, unsigned tiles, void *stream);
void emxi_cuda_attn_resolve_backward(const emxi_cuda_attn *a, unsigned tiles, int given, void *stream);
/* The same of the caller's lists, 16 bit, alpha 1.5 or 2: attn_return.cu. */
void emxi_cuda_attn_settle_back(const emxi_cuda_attn *a, unsigned tiles, void *stream);
/* Nonzeros by key; gradients of keys; of alpha. */
void emxi_cuda_attn_sort(const emxi_cuda_attn *a, unsigned units, void *stream);
void emxi_cuda_attn_gather_keys(const emxi_cuda_attn *a, unsigned units, void *stream);
void emxi_cuda_attn_shares(const emxi_cuda_attn *a, void *stream);
/* Norms of the keys of a slice. */
void emxi_cuda_attn_norms(const emxi_cuda_attn *a, unsigned units, void *stream);
/* Lengths and alphas, once a call. */
void emxi_cuda_attn_prepare(const emxi_cuda_attn *a, void *stream);

#ifdef __cplusplus
}
#endif
#endif
