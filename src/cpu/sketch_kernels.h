/* SPDX-License-Identifier: Apache-2.0
 * Kernels over key sketches (src/kv/sketch.h has the formats), one constant table per ISA. All of them are exact: dot products
 * are sums of integers, and the encoder is the same element-wise C in every table, so no bit depends on the ISA. */
#ifndef EMXI_SKETCH_KERNELS_H
#define EMXI_SKETCH_KERNELS_H

#include "cpu/table.h"
#include "kv/sketch.h"

#define EMXI_SKETCH_LD 256 /* row pitch of keys and of int8 queries */

/* Where one group's sketch goes. row may be NULL. */
typedef struct emxi_sketch_out {
  emxi_sketch_group *group;
  uint8_t *centre;
  uint32_t *high, *low;
  uint8_t *row;
} emxi_sketch_out;

/* A query in the sketches' terms: q.k = start + q'.y with start = q.offset, q' = q weight, and q' = s1 a + s2 b + rest in 8-bit
 * integers a, b. Scores include scale and bias. */
typedef struct emxi_sketch_query {
  double start, s1, s2;
  double e1, e2;           /* >= |q' - s1 a|, >= |q' - s1 a - s2 b| */
  double norm;             /* >= |q'| */
  double sum_a, sum_b;     /* of a and b */
  double size_a;           /* sum of |a| */
  double slack_k, slack_0; /* error of a score: slack_k |k| + slack_0, and that of its bias */
  double slope;
  double limit; /* what lies at or below it has no weight */
} emxi_sketch_query;

#define EMXI_SKETCH_BLOCK 64
typedef struct emxi_sketch_supers {
  float step_c[EMXI_SKETCH_BLOCK], norm_c[EMXI_SKETCH_BLOCK], radius[EMXI_SKETCH_BLOCK], norm_k[EMXI_SKETCH_BLOCK];
  double from[EMXI_SKETCH_BLOCK]; /* first position minus the query's */
} emxi_sketch_supers;
typedef struct emxi_sketch_groups {
  float step_c[EMXI_SKETCH_BLOCK], norm_c[EMXI_SKETCH_BLOCK], radius[EMXI_SKETCH_BLOCK], norm_k[EMXI_SKETCH_BLOCK];
  float step[EMXI_SKETCH_BLOCK], error2[EMXI_SKETCH_BLOCK], error4[EMXI_SKETCH_BLOCK];
  double from[EMXI_SKETCH_BLOCK];
} emxi_sketch_groups;

/* What a query row wants of the planes of the groups of a block. */
typedef struct emxi_sketch_row {
  int32_t limit[EMXI_SKETCH_BLOCK], hot[EMXI_SKETCH_BLOCK]; /* bounds, estimates above the limit exceed these integers */
  float base[EMXI_SKETCH_BLOCK], scale[EMXI_SKETCH_BLOCK], width[EMXI_SKETCH_BLOCK]; /* width: bound minus estimate */
  int32_t zero;                                                                      /* 15 sum of a */
} emxi_sketch_row;
/* Bounds and positions of keys. */
typedef struct emxi_sketch_sink {
  float *up;
  int32_t *pos;
  int64_t n;
} emxi_sketch_sink;

typedef struct emxi_sketch_kernels {
  const char *name;
  /* Sketch of 16 keys k[16, LD], zero from d to dp. map: offset, weight, 1/weight [3, dp]. */
  void (*encode_group)(const float *k, int d, int dp, const float *map, const emxi_sketch_out *out);
  /* Codes [dp/2] and record of 64 keys. */
  void (*encode_super)(const float *k, int d, int dp, const float *map, uint8_t *codes, emxi_sketch_super *out);
  /* out[h*ldo + i] = sum_j q[h*LD + j] code_i[j], for nq rows of int8 and n rows of codes: nibbles (dp/2 bytes, low nibbles
   * first), or bytes (dp). */
  void (*nibbles)(const int8_t *q, int nq, const uint8_t *const *codes, int64_t n, int dp, int32_t *out, int64_t ldo);
  void (*bytes)(const int8_t *q, int nq, const uint8_t *const *codes, int64_t n, int dp, int32_t *out, int64_t ldo);
  /* With dot_t = sum_j q[h*LD + j] c_t[j] for the keys t of a group: whether one of them is above limit[h*BLOCK] in some row h. c
   * are the high plane's codes (0..3). */
  bool (*high)(const int8_t *q, int nq, const uint32_t *high, int dp, const int32_t *limit);
  /* The same with the codes 4 high + low (0..15). Keys above row[h].limit[x] but not above row[h].hot[x] are appended to the sink
   * with their bounds base[x] + (2 dot - zero) scale[x], whole vectors being stored. dot [nq,16]; hot[h]: the keys above hot.
   * Returns whether there are any of those. */
  bool (*both)(const int8_t *q, int nq, const uint32_t *high, const uint32_t *low, int dp, const emxi_sketch_row *row, int x,
               int32_t from, emxi_sketch_sink *sink, int32_t *dot, uint16_t *hot);
  /* Upper bounds and estimates of n superpages, from the nibbles' dots. */
  void (*judge_supers)(const emxi_sketch_query *c, const emxi_sketch_supers *g, int n, const int32_t *dot, float *up, float *mid);
  /* n groups from the bytes' dots with a and b. high: the integers that the high plane's sums must exceed for a key to be above
   * the limit, INT32_MAX where the ball is not. */
  void (*judge_groups)(const emxi_sketch_query *c, const emxi_sketch_groups *g, int n, const int32_t *da, const int32_t *db,
                       int32_t *high, emxi_sketch_row *out);
} emxi_sketch_kernels;

extern const emxi_sketch_kernels emxi_sketch_scalar;
#if defined(__x86_64__)
extern const emxi_sketch_kernels emxi_sketch_avx2, emxi_sketch_vnni;
#endif
/* The kernels that go with a table: the ISA's own, and with AVX-512 those that need VNNI where the CPU has it. */
const emxi_sketch_kernels *emxi_sketch_choose(const emxi_table *table);

#endif
