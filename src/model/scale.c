/* SPDX-License-Identifier: Apache-2.0
 * RoPE and theta on the CPU: element-wise passes over queries and keys, bound by memory, and per query and head a few calls of
 * libm in double (about 0.2 us for ASEntmax). Tiles are fixed rows, sums are added in their order: bits do not depend on
 * threads. */
#include "model/scale.h"
#include "model/nn.h"
#include "model/theta.h"

#include <math.h>

enum { ROWS = 64 }; /* of a task */

static int64_t tiles_of(int64_t m) { return (m + ROWS - 1) / ROWS; }

/* ------------------------------------------------------------------------------------------------------------------ RoPE */

void emxi_rope_table(const emx_model_config *c, int64_t from, int64_t n, float *table) {
  const int64_t d = c->head_dim, half = d / 2;
  for (int64_t k = 0; k < half; k++) {
    const double frequency = pow(c->rope_theta, -2.0 * (double)k / (double)d);
    for (int64_t i = 0; i < n; i++) {
      const double angle = (double)(from + i) * frequency;
      table[i * d + k] = (float)cos(angle);
      table[i * d + half + k] = (float)sin(angle);
    }
  }
}

struct rope {
  float *x;
  const float *table;
  int64_t row, heads, d;
  emxi_places places;
  float sign;
};
EMXI_CLONES static void rope_rows(const struct rope *p, int64_t from, int64_t to) {
  const int64_t half = p->d / 2;
  for (int64_t t = from; t < to; t++) {
    const float *turn = p->table + t % p->places.length * p->d;
    float *x = p->x + t * p->row;
    for (int64_t h = 0; h < p->heads; h++, x += p->d) {
      EMXI_ELEMENTWISE
      for (int64_t k = 0; k < half; k++) {
        const float a = x[k], b = x[k + half], cosine = turn[k], sine = p->sign * turn[k + half];
        x[k] = a * cosine - b * sine;
        x[k + half] = b * cosine + a * sine;
      }
    }
  }
}
static void rope_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct rope *p = arg;
  const int64_t to = (index + 1) * ROWS;
  rope_rows(p, index * ROWS, to < p->places.m ? to : p->places.m);
}
emx_status emxi_rope(emx_ctx *ctx, float *x, int64_t row, int64_t heads, int64_t d, const float *table, emxi_places places,
                     bool back) {
  struct rope p = {x, table, row, heads, d, places, back ? -1 : 1};
  return emxi_parallel(ctx, tiles_of(places.m), rope_task, &p);
}

/* ----------------------------------------------------------------------------------------------------------------- theta */

double emxi_theta(int32_t scale_type, double b, double c, int64_t i, double derivative[2]) {
  return emxi_theta_at(scale_type, b, c, emxi_place_of(scale_type, i), derivative);
}

struct scale {
  const emx_model_config *c;
  const emxi_layer *w;
  float *q, *dq, *dz; /* backward: q is only read */
  const float *z;
  int64_t q_row, z_row;
  double *sums; /* [tiles, 2 E] */
  emxi_places places;
};

/* The parameters of head e (of those with a theta) in row t. */
static void parameters(const struct scale *p, int64_t t, int32_t e, int32_t heads, double *b, double *c) {
  *c = 0;
  if (p->c->attn_scale_type == EMX_ATTN_SCALE_ASENTMAX) {
    const float *z = p->z + t * p->z_row;
    *b = (double)z[e] + p->w->theta_b[e];
    *c = (double)z[heads + e] + p->w->theta_c[e];
  } else if (p->w->theta_b)
    *b = p->w->theta_b[e];
  else
    *b = log(p->c->focal_temperature);
}

static void scale_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct scale *p = arg;
  const int32_t type = p->c->attn_scale_type, heads = emxi_scaled_heads(p->c), d = p->c->head_dim;
  const int64_t first = (int64_t)(p->c->num_heads - heads) * d;
  for (int64_t t = index * ROWS; t < (index + 1) * ROWS && t < p->places.m; t++) {
    const emxi_place at = emxi_place_of(type, p->places.from + t % p->places.length);
    float *q = p->q + t * p->q_row + first;
    for (int32_t e = 0; e < heads; e++, q += d) {
      double b, c;
      parameters(p, t, e, heads, &b, &c);
      const float theta = (float)emxi_theta_at(type, b, c, at, NULL);
      for (int32_t k = 0; k < d; k++) q[k] *= theta;
    }
  }
}
emx_status emxi_scale_queries(emx_ctx *ctx, const emx_model_config *c, const emxi_layer *w, float *q, int64_t q_row,
                              const float *z, int64_t z_row, emxi_places places) {
  struct scale p = {.c = c, .w = w, .q = q, .q_row = q_row, .z = z, .z_row = z_row, .places = places};
  return emxi_parallel(ctx, tiles_of(places.m), scale_task, &p);
}

int64_t emxi_scale_sums(const emx_model_config *c, int64_t m) { return tiles_of(m) * 2 * emxi_scaled_heads(c); }

/* d theta = q.dq', dq' the gradient of theta q. What is at hand is theta q, so the product is divided by theta; where s = 0
 * (SSMax) has made theta q zero, q is lost and the head's s gets no gradient from the row. */
static void backward_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct scale *p = arg;
  const int32_t type = p->c->attn_scale_type, heads = emxi_scaled_heads(p->c), d = p->c->head_dim;
  const int64_t first = (int64_t)(p->c->num_heads - heads) * d;
  double *sums = p->sums + index * 2 * heads;
  for (int32_t e = 0; e < 2 * heads; e++) sums[e] = 0;
  for (int64_t t = index * ROWS; t < (index + 1) * ROWS && t < p->places.m; t++) {
    const emxi_place at = emxi_place_of(type, p->places.from + t % p->places.length);
    const float *q = p->q + t * p->q_row + first;
    float *dq = p->dq + t * p->q_row + first;
    for (int32_t e = 0; e < heads; e++, q += d, dq += d) {
      double b, c, slope[2], dot = 0;
      parameters(p, t, e, heads, &b, &c);
      const float theta = (float)emxi_theta_at(type, b, c, at, slope);
      for (int32_t k = 0; k < d; k++) dot += (double)q[k] * dq[k];
      for (int32_t k = 0; k < d; k++) dq[k] *= theta;
      const double d_theta = theta == 0 ? 0 : dot / theta, db = slope[0] * d_theta, dc = slope[1] * d_theta;
      sums[e] += db;
      sums[heads + e] += dc;
      if (type == EMX_ATTN_SCALE_ASENTMAX) {
        p->dz[t * p->q_row + e] = (float)db;
        p->dz[t * p->q_row + heads + e] = (float)dc;
      }
    }
  }
}
emx_status emxi_scale_backward(emx_ctx *ctx, const emx_model_config *c, const emxi_layer *w, const float *q, const float *z,
                               float *dq, float *dz, int64_t row, double *sums, const emxi_layer *g, emxi_places places) {
  struct scale p = {
      .c = c, .w = w, .q = (float *)q, .dq = dq, .dz = dz, .z = z, .q_row = row, .z_row = row, .sums = sums, .places = places};
  const int64_t tiles = tiles_of(places.m), heads = emxi_scaled_heads(c);
  EMX_TRY(emxi_parallel(ctx, tiles, backward_task, &p));
  for (int64_t e = 0; e < heads; e++) {
    double b = 0, t = 0;
    for (int64_t i = 0; i < tiles; i++) {
      b += sums[i * 2 * heads + e];
      t += sums[i * 2 * heads + heads + e];
    }
    if (g->theta_b) g->theta_b[e] = (float)b;
    if (g->theta_c) g->theta_c[e] = (float)t;
  }
  return EMX_OK;
}
