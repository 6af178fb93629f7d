/* SPDX-License-Identifier: Apache-2.0
 * Between the projections and attention: RoPE turns queries and keys, theta multiplies queries (docs/math.md, "Scale and
 * positions").
 *
 * Arrays hold m rows (tokens), `row` floats apart. Row t is at position `from` + t % length: whole sequences of the same length,
 * or a chunk of one. Positions are absolute, so a step of decoding computes what prefill computes. */
#ifndef EMXI_SCALE_H
#define EMXI_SCALE_H

#include "model/model.h"

typedef struct emxi_places {
  int64_t m, length, from;
} emxi_places;

/* table [n,D]: D/2 cosines and D/2 sines of the angles (from + i) rope_theta^(-2 d / D). */
void emxi_rope_table(const emx_model_config *c, int64_t from, int64_t n, float *table);
/* Turns the pairs (x[d], x[d + D/2]) of the first `heads` heads of each row; back: by the opposite angle, which is the gradient.
 * table [length,D] begins at places.from. */
emx_status emxi_rope(emx_ctx *ctx, float *x, int64_t row, int64_t heads, int64_t d, const float *table, emxi_places places,
                     bool back);

/* theta of one query at position i, and its derivatives to the two parameters. ASEntmax: b and c, SSMax: s, focal: the logarithm
 * of the temperature; the second parameter is unused there. */
double emxi_theta(int32_t scale_type, double b, double c, int64_t i, double derivative[2]);

/* q times theta, in place, in the heads that have one: q [m,H*D]. z: ASEntmax: [m,2 E] products of theta_w and theta_v with the
 * normed states; otherwise unused. */
emx_status emxi_scale_queries(emx_ctx *ctx, const emx_model_config *c, const emxi_layer *w, float *q, int64_t q_row,
                              const float *z, int64_t z_row, emxi_places places);
/* From q times theta, as the forward pass left it, and its gradient dq: dq becomes the gradient of q (in place), dz (ASEntmax)
 * that of z, and g->theta_b and g->theta_c are set. sums: working memory, emxi_scale_sums doubles. */
emx_status emxi_scale_backward(emx_ctx *ctx, const emx_model_config *c, const emxi_layer *w, const float *q, const float *z,
                               float *dq, float *dz, int64_t row, double *sums, const emxi_layer *g, emxi_places places);
int64_t emxi_scale_sums(const emx_model_config *c, int64_t m);

#endif
