/* SPDX-License-Identifier: Apache-2.0
 * What the host side of a model's layers on a GPU (C) and its kernels (CUDA C++) share. A launch returns nothing: the caller asks
 * cudaGetLastError. Arrays are f32; "row" is the floats from one token to the next. */
#ifndef EMXI_CUDA_LAYERS_H
#define EMXI_CUDA_LAYERS_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* x [m,d] = rows of the table; tokens NULL: of the one `token`. */
typedef struct emxi_cuda_embed {
  const float *table;
  const int32_t *tokens;
  float *x;
  int64_t m, d;
  int32_t token;
} emxi_cuda_embed;
/* y [m,d] = x rstd w, rstd = 1/sqrt(mean(x^2) + eps) */
typedef struct emxi_cuda_norm {
  const float *x, *w;
  float *y;
  double eps;
  int64_t m, d;
} emxi_cuda_norm;
/* RoPE of queries and keys at positions from .. from + m - 1, then theta of the last `scaled` query heads: z [m, 2 scaled] and
 * b, c [scaled] as emxi_scale_queries has them; focal: the logarithm of the temperature where b is NULL. */
typedef struct emxi_cuda_turn {
  float *q, *k;
  const float *z, *b, *c;
  const int32_t *at; /* position of the only row, or NULL: from */
  int64_t q_row, k_row, z_row, m, from;
  int32_t heads, kv_heads, d, scaled, type;
  bool rope;
  double rope_theta, focal;
} emxi_cuda_turn;
/* emxi_block_parts: part makes q of from_q [m, heads d] (q_row floats apart), and k, v of from_k, from_v; join makes a of o. */
typedef struct emxi_cuda_parts {
  const float *from_q;
  const void *from_k, *from_v;
  void *q, *k, *v;
  const float *o;
  float *a;
  int32_t *beyond; /* not 0: a query has an element that is too large for the dtype */
  int64_t q_row, m, n;
  int32_t heads, kv_heads, d, dtype;
} emxi_cuda_parts;
/* gate [m,f] = silu(gate) * up */
typedef struct emxi_cuda_glu {
  float *gate;
  const float *up;
  int64_t row, m, f;
} emxi_cuda_glu;
/* One token: y [out] = (accumulate ? y : 0) + w h, w [out,in], h = x or, with norm, x rstd norm. up: y = silu(w h) * (up h). */
typedef struct emxi_cuda_product {
  const float *x, *norm, *w, *up;
  float *y;
  double eps;
  int64_t in, out;
  bool accumulate;
} emxi_cuda_product;

/* step[0], step[1] = token, position */
typedef struct emxi_cuda_step {
  int32_t *step, token, position;
} emxi_cuda_step;

/* overlap: a kernel may be made ready while the one before it ends. */
void emxi_cuda_launch_step(const emxi_cuda_step *a, void *stream);
void emxi_cuda_launch_embed(const emxi_cuda_embed *a, void *stream);
void emxi_cuda_launch_norm(const emxi_cuda_norm *a, bool overlap, void *stream);
void emxi_cuda_launch_turn(const emxi_cuda_turn *a, bool overlap, void *stream);
void emxi_cuda_launch_part_queries(const emxi_cuda_parts *a, void *stream);
void emxi_cuda_launch_part_keys(const emxi_cuda_parts *a, void *stream);
void emxi_cuda_launch_join(const emxi_cuda_parts *a, void *stream);
void emxi_cuda_launch_glu(const emxi_cuda_glu *a, bool overlap, void *stream);
void emxi_cuda_launch_product(const emxi_cuda_product *a, bool overlap, void *stream);

#ifdef __cplusplus
}
#endif
#endif
