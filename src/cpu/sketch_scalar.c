/* SPDX-License-Identifier: Apache-2.0
 * Sketch kernels in plain C: the reference, and the fallback on any CPU. */
#include "cpu/sketch_kernels.h"

#include "cpu/sketch_encode.inc"

static void nibbles(const int8_t *q, int nq, const uint8_t *const *codes, int64_t n, int dp, int32_t *out, int64_t ldo) {
  for (int h = 0; h < nq; h++, q += LD)
    for (int64_t i = 0; i < n; i++) {
      int32_t s = 0;
      for (int j = 0; j < dp / 2; j++) s += q[j] * (codes[i][j] & 15) + q[j + dp / 2] * (codes[i][j] >> 4);
      out[h * ldo + i] = s;
    }
}

static void bytes(const int8_t *q, int nq, const uint8_t *const *codes, int64_t n, int dp, int32_t *out, int64_t ldo) {
  for (int h = 0; h < nq; h++, q += LD)
    for (int64_t i = 0; i < n; i++) {
      int32_t s = 0;
      for (int j = 0; j < dp; j++) s += q[j] * codes[i][j];
      out[h * ldo + i] = s;
    }
}

static void plane(const int8_t *q, const uint32_t *words, int dp, int32_t times, int32_t *out) {
  for (int w = 0; w < dp / 16; w++)
    for (int t = 0; t < EMXI_GROUP; t++)
      for (int b = 0; b < 4; b++)
        for (int s = 0; s < 4; s++)
          out[t] += times * q[16 * w + 4 * s + b] * (int32_t)(words[w * EMXI_GROUP + t] >> (8 * b + 2 * s) & 3);
}
static bool high(const int8_t *q, int nq, const uint32_t *words, int dp, const int32_t *limit) {
  for (int h = 0; h < nq; h++) {
    int32_t dot[EMXI_GROUP] = {0};
    plane(q + h * LD, words, dp, 1, dot);
    for (int t = 0; t < EMXI_GROUP; t++)
      if (dot[t] > limit[h * EMXI_SKETCH_BLOCK]) return true;
  }
  return false;
}
static bool both(const int8_t *q, int nq, const uint32_t *upper, const uint32_t *lower, int dp, const emxi_sketch_row *row, int x,
                 int32_t from, emxi_sketch_sink *sink, int32_t *dot, uint16_t *hot) {
  unsigned any = 0;
  memset(dot, 0, (size_t)nq * EMXI_GROUP * sizeof *dot);
  for (int h = 0; h < nq; h++, row++, sink++, dot += EMXI_GROUP) {
    unsigned over = 0;
    plane(q + h * LD, upper, dp, 4, dot);
    plane(q + h * LD, lower, dp, 1, dot);
    for (int t = 0; t < EMXI_GROUP; t++) {
      if (dot[t] > row->hot[x]) {
        over |= 1u << t;
      } else if (dot[t] > row->limit[x]) {
        sink->up[sink->n] = row->base[x] + (float)(2 * dot[t] - row->zero) * row->scale[x];
        sink->pos[sink->n++] = from + t;
      }
    }
    hot[h] = (uint16_t)over;
    any |= over;
  }
  return any != 0;
}

const emxi_sketch_kernels emxi_sketch_scalar = {.name = "scalar",
                                                .encode_group = encode_group,
                                                .encode_super = encode_super,
                                                .nibbles = nibbles,
                                                .bytes = bytes,
                                                .high = high,
                                                .both = both,
                                                .judge_supers = judge_supers,
                                                .judge_groups = judge_groups};
