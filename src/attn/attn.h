/* SPDX-License-Identifier: Apache-2.0
 * Resolved arguments of one attention call: every layout (BHND, BNHD, packed, paged) becomes strides. */
#ifndef EMXI_ATTN_H
#define EMXI_ATTN_H

#include "base/base.h"

/* Element [b][h][row] of a tensor; rows are contiguous. data NULL: absent. */
typedef struct emxi_mat {
  char *data;
  int32_t dtype;
  int64_t batch, head, row; /* strides in elements */
} emxi_mat;

typedef struct emxi_attn {
  int32_t pass;
  double alpha, scale;
  const double *alphas; /* [heads] or NULL: `alpha` for all; emxi_attn_alpha() */
  double *d_alpha;      /* [heads] or NULL */
  int64_t left, right;  /* keys around its own position that a query sees; INT32_MAX: all. Causal: right is 0 */
  int64_t batch, heads, kv_heads, d;
  int64_t max_q, max_k;   /* largest lengths that the shapes allow */
  int64_t rows_q, rows_k; /* rows of q and k in memory: lengths and offsets are checked against them */
  emxi_mat q, k, v, o, tau /* alpha = 1: lse */, support, d_o, d_q, d_k, d_v;
  emxi_mat index; /* support lists of `list` entries a row */
  int64_t list;
  const float *slopes; /* [heads] or NULL */
  const int32_t *seqlens_q, *seqlens_k, *cu_q, *cu_k;
  /* paged k, v: `row` strides inside a page, `batch` is the stride between pages */
  const int32_t *block_table;
  int64_t table_stride, table_width, pages, page_size;
} emxi_attn;

static inline double emxi_attn_alpha(const emxi_attn *a, int64_t head) { return a->alphas ? a->alphas[head] : a->alpha; }

/* Sequence b's extent: first row and length on both sides. */
typedef struct emxi_span {
  int64_t q0, k0, s, n;
} emxi_span;
static inline emxi_span emxi_attn_span(const emxi_attn *a, int64_t b) {
  emxi_span r = {0, 0, a->max_q, a->max_k};
  if (a->cu_q) {
    r.q0 = a->cu_q[b];
    r.s = a->cu_q[b + 1] - r.q0;
  } else if (a->seqlens_q) {
    r.s = a->seqlens_q[b];
  }
  if (a->cu_k) {
    r.k0 = a->cu_k[b];
    r.n = a->cu_k[b + 1] - r.k0;
  } else if (a->seqlens_k) {
    r.n = a->seqlens_k[b];
  }
  return r;
}
/* Lengths, offsets and page indices that live in host memory, against the shapes. A device back end checks its own. */
emx_status emxi_attn_check_lengths(const emxi_attn *a);

static inline void *emxi_mat_row(const emxi_mat *m, int64_t b, int64_t h, int64_t row) {
  return m->data + (b * m->batch + h * m->head + row * m->row) * (int64_t)emx_dtype_size(m->dtype);
}

#endif
