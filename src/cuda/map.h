/* SPDX-License-Identifier: Apache-2.0
 * What the host side of the row mapping (C) and its kernels (CUDA C++) share. */
#ifndef EMXI_CUDA_MAP_H
#define EMXI_CUDA_MAP_H

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Thread blocks of one row, at most: a portable cluster. */
#define EMXI_CUDA_ROW_BLOCKS 8
/* The longest row of a warp; in f64 it is half of that. */
#define EMXI_CUDA_WARP_ROW 1024

/* One call of the map, its gradient or its loss; fields are those of emxi_rows (src/entmax/entmax.h). */
typedef struct emxi_cuda_rows {
  int32_t kind, backward;
  double alpha, budget;
  const char *alphas, *budgets;
  int32_t alphas_dtype, budgets_dtype;
  int64_t rows, n;
  const char *x, *p_in;
  char *p;
  int64_t ldx, ldp_in, ldp;
  char *tau;
  int32_t tau_dtype;
  int32_t *support;
  char *d_alpha;
  int32_t d_alpha_dtype;
  char *loss;
  int32_t loss_dtype;
  const int32_t *target;
  int32_t ignore_index;
  const char *d_loss;
  int32_t d_loss_dtype;
  int64_t inc_d_loss;
  int32_t mean; /* gradients are those of the mean over rows that are not ignored */
  char *total;
  int32_t total_dtype;
  emxi_cuda_fault *fault;
  int32_t *claimed;
  /* how the work is cut up; depends on n, the dtype and the device alone, and so do results */
  int32_t blocks;   /* of a row: a cluster; 0: a warp a row */
  int32_t resident; /* a block's share of the row stays in shared memory */
  int64_t slice;    /* elements of that share, a multiple of 16 bytes */
  int32_t processors;
} emxi_cuda_rows;

/* Shared memory of a block with room for a slice of so many elements of so many bytes. */
size_t emxi_cuda_rows_shared(int64_t slice, size_t element);
/* Whether the device code in use has clusters; 0 as well where CUDA cannot say. */
int emxi_cuda_rows_clusters(void);

/* One translation unit per dtype of the rows. */
void emxi_cuda_rows_f32(const emxi_cuda_rows *r, void *stream);
void emxi_cuda_rows_f16(const emxi_cuda_rows *r, void *stream);
void emxi_cuda_rows_bf16(const emxi_cuda_rows *r, void *stream);
void emxi_cuda_rows_f64(const emxi_cuda_rows *r, void *stream);
void emxi_cuda_rows_total(const emxi_cuda_rows *r, void *stream);

#ifdef __cplusplus
}
#endif
#endif
