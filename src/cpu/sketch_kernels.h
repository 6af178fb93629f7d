/* SPDX-License-Identifier: Apache-2.0
 * Kernels over key sketches (src/kv/sketch.h has the formats), one constant table per ISA. All of them are exact: dot products are sums
 * of integers, and the encoder is the same element-wise C in every table, so no bit depends on the ISA. */
#ifndef EMXI_SKETCH_KERNELS_H
#define EMXI_SKETCH_KERNELS_H

#include "cpu/table.h"
#include "kv/sketch.h"

#define EMXI_SKETCH_LD 256 /* row pitch of keys and of int8 queries */

/* Where one group's sketch goes. rest and row may be NULL. */
typedef struct emxi_sketch_out {
  emxi_sketch_group *group;
  uint8_t *centre;
  uint32_t *high, *low;
  emxi_sketch_rest *rest;
  uint8_t *row;
} emxi_sketch_out;

typedef struct emxi_sketch_kernels {
  const char *name;
  /* Sketch of 16 keys k[16, LD], zero from d to dp. map: offset, weight, 1/weight [3, dp]. */
  void (*encode_group)(const float *k, int d, int dp, const float *map, const emxi_sketch_out *out);
  /* Codes [dp/2] and record of 64 keys. */
  void (*encode_super)(const float *k, int d, int dp, const float *map, uint8_t *codes, emxi_sketch_super *out);
  /* out[h*ldo + i] = sum_j q[h*LD + j] code_i[j], for nq rows of int8 and n rows of codes: nibbles (dp/2 bytes, low nibbles first), or
   * bytes (dp). */
  void (*nibbles)(const int8_t *q, int nq, const uint8_t *const *codes, int64_t n, int dp, int32_t *out, int64_t ldo);
  void (*bytes)(const int8_t *q, int nq, const uint8_t *const *codes, int64_t n, int dp, int32_t *out, int64_t ldo);
  /* out[h*16 + t] = sum_j q[h*LD + j] c_t[j], c the high plane's codes (0..3), or 4 high + low (0..15). */
  void (*high)(const int8_t *q, int nq, const uint32_t *high, int dp, int32_t *out);
  void (*both)(const int8_t *q, int nq, const uint32_t *high, const uint32_t *low, int dp, int32_t *out);
} emxi_sketch_kernels;

extern const emxi_sketch_kernels emxi_sketch_scalar;
#if defined(__x86_64__)
extern const emxi_sketch_kernels emxi_sketch_avx2, emxi_sketch_vnni;
#endif
/* The kernels that go with a table: the ISA's own, and with AVX-512 those that need VNNI where the CPU has it. */
const emxi_sketch_kernels *emxi_sketch_choose(const emxi_table *table);

#endif
