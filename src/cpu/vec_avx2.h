/* Eight float lanes: AVX2, FMA, F16C. */
#include <immintrin.h>
#define VL 8
#define VDL 4
#define TILE_NV 2
#define TILE_MR 4
typedef __m256 VF;
typedef __m256d VD;
#define INL static inline __attribute__((always_inline, unused))
static const int32_t tail_mask8[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
INL __m256i tail8(int n) { return _mm256_loadu_si256((const __m256i *)(tail_mask8 + 8 - n)); }
INL VF v_load(const float *p) { return _mm256_loadu_ps(p); }
INL VF v_loadn(const float *p, int n) { return _mm256_maskload_ps(p, tail8(n)); }
INL void v_store(float *p, VF v) { _mm256_storeu_ps(p, v); }
INL void v_storen(float *p, VF v, int n) { _mm256_maskstore_ps(p, tail8(n), v); }
INL VF v_set1(float a) { return _mm256_set1_ps(a); }
INL VF v_add(VF a, VF b) { return _mm256_add_ps(a, b); }
INL VF v_sub(VF a, VF b) { return _mm256_sub_ps(a, b); }
INL VF v_mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
INL VF v_fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
INL VF v_max(VF a, VF b) { return _mm256_max_ps(a, b); }
INL float v_hsum(VF a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INL float v_hmax(VF a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
/* The order of v_hsum in each of four sums: halves, then pairs two apart, then neighbours. */
INL void v_hsum4(VF a, VF b, VF c, VF d, float *out) {
  __m128 a4 = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  __m128 b4 = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  __m128 c4 = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
  __m128 d4 = _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
  _MM_TRANSPOSE4_PS(a4, b4, c4, d4);
  _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a4, c4), _mm_add_ps(b4, d4)));
}
INL unsigned v_not_le(VF a, VF b) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)); }
INL VF v_round(VF a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INL VF v_pow2i(VF n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INL VF v_zero_below(VF v, VF x, VF lim) { return _mm256_andnot_ps(_mm256_cmp_ps(x, lim, _CMP_LT_OQ), v); }
#include "compress8.h"
INL __m256i compress_order(unsigned mask) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(compress8 + mask))); }
INL __m256i lanes_from(int32_t base) {
  return _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(base));
}
#define v_compress_store(so, io, v, mask, idx_or_null, base)                                                    \
  do {                                                                                                          \
    const __m256i order_ = compress_order(mask),                                                                \
                  ids_ = (idx_or_null) ? _mm256_loadu_si256((const __m256i *)(idx_or_null)) : lanes_from(base); \
    _mm256_storeu_ps(so, _mm256_permutevar8x32_ps(v, order_));                                                  \
    _mm256_storeu_si256((__m256i *)(io), _mm256_permutevar8x32_epi32(ids_, order_));                            \
  } while (0)
/* Compressed lanes at the upper end: the set bits are the clear ones of the complement, which come last. */
INL void v_push(float *so, int32_t *io, VF v, unsigned mask, int32_t base) {
  const __m256i order = compress_order(~mask & 255);
  _mm256_storeu_ps(so - 8, _mm256_permutevar8x32_ps(v, order));
  _mm256_storeu_si256((__m256i *)(io - 8), _mm256_permutevar8x32_epi32(lanes_from(base), order));
}
/* rows[i][j] becomes rows[j][i]. */
INL void v_transpose(VF *rows) {
  VF t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; h++) {
      rows[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
      rows[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0xEE);
    }
  for (int c = 0; c < 4; c++) {
    t[c] = _mm256_permute2f128_ps(rows[c], rows[4 + c], 0x20);
    t[4 + c] = _mm256_permute2f128_ps(rows[c], rows[4 + c], 0x31);
  }
  for (int i = 0; i < 8; i++) rows[i] = t[i];
}
INL VD vd_load(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
INL VD vd_loadn(const float *p, int n, float fill) {
  float t[4] = {fill, fill, fill, fill};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return vd_load(t);
}
INL void vd_store(float *p, VD v) { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
INL void vd_storen(float *p, VD v, int n) {
  float t[4];
  vd_store(t, v);
  for (int i = 0; i < n; i++) p[i] = t[i];
}
INL VD vd_set1(double a) { return _mm256_set1_pd(a); }
INL VD vd_add(VD a, VD b) { return _mm256_add_pd(a, b); }
INL VD vd_sub(VD a, VD b) { return _mm256_sub_pd(a, b); }
INL VD vd_mul(VD a, VD b) { return _mm256_mul_pd(a, b); }
INL VD vd_fma(VD a, VD b, VD c) { return _mm256_fmadd_pd(a, b, c); }
INL VD vd_fms(VD a, VD b, VD c) { return _mm256_fmsub_pd(a, b, c); }
INL VD vd_pos(VD a) { return _mm256_max_pd(a, _mm256_setzero_pd()); }
INL unsigned vd_gt0(VD a) { return (unsigned)_mm256_movemask_pd(_mm256_cmp_pd(a, _mm256_setzero_pd(), _CMP_GT_OQ)); }
INL VD vd_where(VD cond, VD a) { return _mm256_and_pd(_mm256_cmp_pd(cond, _mm256_setzero_pd(), _CMP_NEQ_UQ), a); }
/* Lane l plus lane l + VDL, in double. */
INL VD vd_fold(VF a) {
  return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
}
INL double vd_hsum(VD a) {
  __m128d s = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
INL VF v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INL VF v_load_bf16(const uint16_t *p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INL __m128i tail_u16(const uint16_t *p, int n) {
  uint16_t t[8] = {0};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return _mm_loadu_si128((const __m128i *)t);
}
INL VF v_loadn_f16(const uint16_t *p, int n) { return _mm256_cvtph_ps(tail_u16(p, n)); }
INL VF v_loadn_bf16(const uint16_t *p, int n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(tail_u16(p, n)), 16));
}
