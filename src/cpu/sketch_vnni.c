/* SPDX-License-Identifier: Apache-2.0
 * Sketch kernels for AVX-512 with VNNI. Compiled with that ISA's flags; nothing here may run before the CPU has been checked.
 * vpdpbusd adds four products of unsigned by signed bytes to a 32-bit lane without saturation. */
#include "cpu/sketch_kernels.h"

#include <immintrin.h>

#include "cpu/sketch_encode.inc"

#define INL static inline __attribute__((always_inline))
#define MAXQ 8 /* rows that keep their accumulators in registers */

INL int32_t four(const int8_t *q) {
  int32_t x;
  memcpy(&x, q, 4);
  return x;
}

/* Four sums over lanes, in order. */
INL __m128i sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i h = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}

INL __m512i nibble_dot(const int8_t *q, const uint8_t *codes, int half) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i a = _mm512_setzero_si512(), b = a;
  for (int j = 0; j < half; j += 64) {
    const __mmask64 in = half - j >= 64 ? ~0ull : (1ull << (half - j)) - 1;
    const __m512i c = _mm512_maskz_loadu_epi8(in, codes + j);
    a = _mm512_dpbusd_epi32(a, _mm512_and_si512(c, low), _mm512_maskz_loadu_epi8(in, q + j));
    b = _mm512_dpbusd_epi32(b, _mm512_and_si512(_mm512_srli_epi16(c, 4), low), _mm512_maskz_loadu_epi8(in, q + half + j));
  }
  return _mm512_add_epi32(a, b);
}
static void nibbles(const int8_t *q, int nq, const uint8_t *const *codes, int64_t n, int dp, int32_t *out, int64_t ldo) {
  const int half = dp / 2;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int h = 0; h < nq; h++) {
      const int8_t *r = q + h * LD;
      _mm_storeu_si128((__m128i *)(out + h * ldo + i),
                       sum4(nibble_dot(r, codes[i], half), nibble_dot(r, codes[i + 1], half), nibble_dot(r, codes[i + 2], half),
                            nibble_dot(r, codes[i + 3], half)));
    }
  for (; i < n; i++)
    for (int h = 0; h < nq; h++) out[h * ldo + i] = _mm512_reduce_add_epi32(nibble_dot(q + h * LD, codes[i], half));
}

INL __m512i byte_dot(const int8_t *q, const uint8_t *codes, int dp) {
  __m512i a = _mm512_setzero_si512();
  for (int j = 0; j < dp; j += 64) {
    const __mmask64 in = dp - j >= 64 ? ~0ull : (1ull << (dp - j)) - 1;
    a = _mm512_dpbusd_epi32(a, _mm512_maskz_loadu_epi8(in, codes + j), _mm512_maskz_loadu_epi8(in, q + j));
  }
  return a;
}
static void bytes(const int8_t *q, int nq, const uint8_t *const *codes, int64_t n, int dp, int32_t *out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int h = 0; h < nq; h++) {
      const int8_t *r = q + h * LD;
      _mm_storeu_si128((__m128i *)(out + h * ldo + i), sum4(byte_dot(r, codes[i], dp), byte_dot(r, codes[i + 1], dp),
                                                            byte_dot(r, codes[i + 2], dp), byte_dot(r, codes[i + 3], dp)));
    }
  for (; i < n; i++)
    for (int h = 0; h < nq; h++) out[h * ldo + i] = _mm512_reduce_add_epi32(byte_dot(q + h * LD, codes[i], dp));
}

INL unsigned high_rows(const int8_t *q, const int nq, const uint32_t *words, int dp, const int32_t *limit) {
  const __m512i two = _mm512_set1_epi8(3);
  __m512i a[MAXQ], b[MAXQ];
  for (int h = 0; h < nq; h++) a[h] = b[h] = _mm512_setzero_si512();
  for (int w = 0; w < dp / 16; w++) {
    const __m512i x = _mm512_loadu_si512(words + w * EMXI_GROUP);
    const __m512i c0 = _mm512_and_si512(x, two), c1 = _mm512_and_si512(_mm512_srli_epi32(x, 2), two),
                  c2 = _mm512_and_si512(_mm512_srli_epi32(x, 4), two), c3 = _mm512_and_si512(_mm512_srli_epi32(x, 6), two);
    for (int h = 0; h < nq; h++) {
      const int8_t *r = q + h * LD + 16 * w;
      a[h] = _mm512_dpbusd_epi32(a[h], c0, _mm512_set1_epi32(four(r)));
      b[h] = _mm512_dpbusd_epi32(b[h], c1, _mm512_set1_epi32(four(r + 4)));
      a[h] = _mm512_dpbusd_epi32(a[h], c2, _mm512_set1_epi32(four(r + 8)));
      b[h] = _mm512_dpbusd_epi32(b[h], c3, _mm512_set1_epi32(four(r + 12)));
    }
  }
  unsigned any = 0;
  for (int h = 0; h < nq; h++)
    any |= _mm512_cmpgt_epi32_mask(_mm512_add_epi32(a[h], b[h]), _mm512_set1_epi32(limit[h * EMXI_SKETCH_BLOCK]));
  return any;
}
INL unsigned both_rows(const int8_t *q, const int nq, const uint32_t *upper, const uint32_t *lower, int dp,
                       const emxi_sketch_row *row, int x_, int32_t from, emxi_sketch_sink *sink, int32_t *dot, uint16_t *hot) {
  const __m512i two = _mm512_set1_epi8(3), top = _mm512_set1_epi8(12);
  __m512i a[MAXQ], b[MAXQ];
  for (int h = 0; h < nq; h++) a[h] = b[h] = _mm512_setzero_si512();
  for (int w = 0; w < dp / 16; w++) {
    const __m512i x = _mm512_loadu_si512(upper + w * EMXI_GROUP), y = _mm512_loadu_si512(lower + w * EMXI_GROUP);
    /* (y & 3) | (x & 12), both shifted into place */
    const __m512i c0 = _mm512_ternarylogic_epi32(_mm512_and_si512(_mm512_slli_epi32(x, 2), top), y, two, 0xF8),
                  c1 = _mm512_ternarylogic_epi32(_mm512_and_si512(x, top), _mm512_srli_epi32(y, 2), two, 0xF8),
                  c2 = _mm512_ternarylogic_epi32(_mm512_and_si512(_mm512_srli_epi32(x, 2), top), _mm512_srli_epi32(y, 4), two,
                                                 0xF8),
                  c3 = _mm512_ternarylogic_epi32(_mm512_and_si512(_mm512_srli_epi32(x, 4), top), _mm512_srli_epi32(y, 6), two,
                                                 0xF8);
    for (int h = 0; h < nq; h++) {
      const int8_t *r = q + h * LD + 16 * w;
      a[h] = _mm512_dpbusd_epi32(a[h], c0, _mm512_set1_epi32(four(r)));
      b[h] = _mm512_dpbusd_epi32(b[h], c1, _mm512_set1_epi32(four(r + 4)));
      a[h] = _mm512_dpbusd_epi32(a[h], c2, _mm512_set1_epi32(four(r + 8)));
      b[h] = _mm512_dpbusd_epi32(b[h], c3, _mm512_set1_epi32(four(r + 12)));
    }
  }
  unsigned any = 0;
  const __m512i at =
      _mm512_add_epi32(_mm512_set1_epi32(from), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int h = 0; h < nq; h++) { /* no branch: in hostile data every other group has a candidate */
    const __m512i x = _mm512_add_epi32(a[h], b[h]);
    const __mmask16 over = _mm512_cmpgt_epi32_mask(x, _mm512_set1_epi32(row[h].hot[x_]));
    const __mmask16 keep = _mm512_mask_cmpgt_epi32_mask((__mmask16)~over, x, _mm512_set1_epi32(row[h].limit[x_]));
    const __m512 twice = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_slli_epi32(x, 1), _mm512_set1_epi32(row[h].zero)));
    const __m512 up = _mm512_add_ps(_mm512_set1_ps(row[h].base[x_]), _mm512_mul_ps(twice, _mm512_set1_ps(row[h].scale[x_])));
    _mm512_storeu_ps(sink[h].up + sink[h].n, _mm512_maskz_compress_ps(keep, up));
    _mm512_storeu_si512(sink[h].pos + sink[h].n, _mm512_maskz_compress_epi32(keep, at));
    sink[h].n += __builtin_popcount(keep);
    _mm512_storeu_si512(dot + h * EMXI_GROUP, x);
    any |= hot[h] = over;
  }
  return any;
}

/* Rows in blocks whose size the compiler knows. */
#define BLOCKS(call, next)                          \
  unsigned any = 0;                                 \
  for (; nq >= 8; nq -= 8, next(8)) any |= call(8); \
  for (; nq >= 4; nq -= 4, next(4)) any |= call(4); \
  for (; nq >= 2; nq -= 2, next(2)) any |= call(2); \
  if (nq) any |= call(1);                           \
  return any != 0
static bool high(const int8_t *q, int nq, const uint32_t *words, int dp, const int32_t *limit) {
#define CALL(n) high_rows(q, n, words, dp, limit)
#define NEXT(n) q += n * LD, limit += n * EMXI_SKETCH_BLOCK
  BLOCKS(CALL, NEXT);
#undef CALL
#undef NEXT
}
static bool both(const int8_t *q, int nq, const uint32_t *upper, const uint32_t *lower, int dp, const emxi_sketch_row *row, int x,
                 int32_t from, emxi_sketch_sink *sink, int32_t *dot, uint16_t *hot) {
#define CALL(n) both_rows(q, n, upper, lower, dp, row, x, from, sink, dot, hot)
#define NEXT(n) q += n * LD, row += n, sink += n, dot += n * EMXI_GROUP, hot += n
  BLOCKS(CALL, NEXT);
#undef CALL
#undef NEXT
}

const emxi_sketch_kernels emxi_sketch_vnni = {.name = "vnni",
                                              .encode_group = encode_group,
                                              .encode_super = encode_super,
                                              .nibbles = nibbles,
                                              .bytes = bytes,
                                              .high = high,
                                              .both = both,
                                              .judge_supers = judge_supers,
                                              .judge_groups = judge_groups};
