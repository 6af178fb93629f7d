/* SPDX-License-Identifier: Apache-2.0
 * Sketch kernels for AVX2. Compiled with that ISA's flags; nothing here may run before the CPU has been checked.
 * vpmaddubsw saturates at 16 bits: codes up to 15 times 127, two products and at most four steps before widening stay below
 * 15300. */
#include "cpu/sketch_kernels.h"

#include <immintrin.h>

#include "cpu/sketch_encode.inc"

#define INL static inline __attribute__((always_inline))
#define MAXQ 4

INL int32_t four(const int8_t *q) {
  int32_t x;
  memcpy(&x, q, 4);
  return x;
}
INL int32_t sum8(__m256i a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

static void nibbles(const int8_t *q, int nq, const uint8_t *const *codes, int64_t n, int dp, int32_t *out, int64_t ldo) {
  const int half = dp / 2;
  const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  for (int64_t i = 0; i < n; i++)
    for (int h = 0; h < nq; h++) {
      const int8_t *r = q + h * LD;
      __m256i acc = _mm256_setzero_si256();
      int j = 0;
      for (; j + 32 <= half; j += 32) {
        const __m256i c = _mm256_loadu_si256((const __m256i *)(codes[i] + j));
        const __m256i x = _mm256_maddubs_epi16(_mm256_and_si256(c, low), _mm256_loadu_si256((const __m256i *)(r + j)));
        const __m256i y = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(c, 4), low),
                                               _mm256_loadu_si256((const __m256i *)(r + half + j)));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_add_epi16(x, y), one));
      }
      int32_t s = sum8(acc);
      for (; j < half; j++) s += r[j] * (codes[i][j] & 15) + r[j + half] * (codes[i][j] >> 4);
      out[h * ldo + i] = s;
    }
}

static void bytes(const int8_t *q, int nq, const uint8_t *const *codes, int64_t n, int dp, int32_t *out, int64_t ldo) {
  for (int64_t i = 0; i < n; i++)
    for (int h = 0; h < nq; h++) {
      __m256i acc = _mm256_setzero_si256();
      for (int j = 0; j < dp; j += 16)
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(codes[i] + j))),
                                                      _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(q + h * LD + j)))));
      out[h * ldo + i] = sum8(acc);
    }
}

/* Codes of word w in four vectors, for keys 8 half .. 8 half + 7. */
INL void high_codes(const uint32_t *words, __m256i *c) {
  const __m256i two = _mm256_set1_epi8(3), x = _mm256_loadu_si256((const __m256i *)words);
  c[0] = _mm256_and_si256(x, two);
  c[1] = _mm256_and_si256(_mm256_srli_epi32(x, 2), two);
  c[2] = _mm256_and_si256(_mm256_srli_epi32(x, 4), two);
  c[3] = _mm256_and_si256(_mm256_srli_epi32(x, 6), two);
}
INL void both_codes(const uint32_t *upper, const uint32_t *lower, __m256i *c) {
  const __m256i four_times = _mm256_set1_epi8(12), x = _mm256_loadu_si256((const __m256i *)upper);
  high_codes(lower, c);
  c[0] = _mm256_or_si256(c[0], _mm256_and_si256(_mm256_slli_epi32(x, 2), four_times));
  c[1] = _mm256_or_si256(c[1], _mm256_and_si256(x, four_times));
  c[2] = _mm256_or_si256(c[2], _mm256_and_si256(_mm256_srli_epi32(x, 2), four_times));
  c[3] = _mm256_or_si256(c[3], _mm256_and_si256(_mm256_srli_epi32(x, 4), four_times));
}
/* lower NULL: the high plane alone. */
INL void planes(const int8_t *q, const int nq, const uint32_t *upper, const uint32_t *lower, int dp, int32_t *out) {
  const __m256i one = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; half++) {
    __m256i acc[MAXQ];
    for (int h = 0; h < nq; h++) acc[h] = _mm256_setzero_si256();
    for (int w = 0; w < dp / 16; w++) {
      __m256i c[4];
      const int64_t at = w * EMXI_GROUP + 8 * half;
      if (lower)
        both_codes(upper + at, lower + at, c);
      else
        high_codes(upper + at, c);
      for (int h = 0; h < nq; h++) {
        const int8_t *r = q + h * LD + 16 * w;
        const __m256i x = _mm256_add_epi16(_mm256_maddubs_epi16(c[0], _mm256_set1_epi32(four(r))),
                                           _mm256_maddubs_epi16(c[1], _mm256_set1_epi32(four(r + 4))));
        const __m256i y = _mm256_add_epi16(_mm256_maddubs_epi16(c[2], _mm256_set1_epi32(four(r + 8))),
                                           _mm256_maddubs_epi16(c[3], _mm256_set1_epi32(four(r + 12))));
        acc[h] = _mm256_add_epi32(acc[h], _mm256_madd_epi16(_mm256_add_epi16(x, y), one));
      }
    }
    for (int h = 0; h < nq; h++) _mm256_storeu_si256((__m256i *)(out + h * EMXI_GROUP + 8 * half), acc[h]);
  }
}
static void rows(const int8_t *q, int nq, const uint32_t *upper, const uint32_t *lower, int dp, int32_t *out) {
  for (; nq >= 4; nq -= 4, q += 4 * LD, out += 4 * EMXI_GROUP) planes(q, 4, upper, lower, dp, out);
  for (; nq >= 1; nq -= 1, q += LD, out += EMXI_GROUP) planes(q, 1, upper, lower, dp, out);
}
INL unsigned above(const int32_t *dot, int32_t limit) {
  const __m256i t = _mm256_set1_epi32(limit), a = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i *)dot), t),
                b = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i *)(dot + 8)), t);
  return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(a)) | (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(b)) << 8;
}

static bool high(const int8_t *q, int nq, const uint32_t *words, int dp, const int32_t *limit) {
  int32_t dot[8 * EMXI_GROUP];
  unsigned any = 0;
  rows(q, nq, words, NULL, dp, dot);
  for (int h = 0; h < nq; h++) any |= above(dot + h * EMXI_GROUP, limit[h * EMXI_SKETCH_BLOCK]);
  return any != 0;
}
static bool both(const int8_t *q, int nq, const uint32_t *upper, const uint32_t *lower, int dp, const emxi_sketch_row *row, int x,
                 int32_t from, emxi_sketch_sink *sink, int32_t *dot, uint16_t *hot) {
  unsigned any = 0;
  rows(q, nq, upper, lower, dp, dot);
  for (int h = 0; h < nq; h++, row++, sink++, dot += EMXI_GROUP) {
    hot[h] = (uint16_t)above(dot, row->hot[x]);
    any |= hot[h];
    for (unsigned m = above(dot, row->limit[x]) & ~(unsigned)hot[h]; m; m &= m - 1) {
      const int t = __builtin_ctz(m);
      sink->up[sink->n] = row->base[x] + (float)(2 * dot[t] - row->zero) * row->scale[x];
      sink->pos[sink->n++] = from + t;
    }
  }
  return any != 0;
}

const emxi_sketch_kernels emxi_sketch_avx2 = {.name = "avx2",
                                              .encode_group = encode_group,
                                              .encode_super = encode_super,
                                              .nibbles = nibbles,
                                              .bytes = bytes,
                                              .high = high,
                                              .both = both,
                                              .judge_supers = judge_supers,
                                              .judge_groups = judge_groups};
