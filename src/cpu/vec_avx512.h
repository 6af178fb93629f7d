/* Sixteen float lanes: AVX-512 F, DQ, BW, VL. */
#include <immintrin.h>
#define VL 16
#define VDL 8
#define TILE_NV 4
#define TILE_MR 6
typedef __m512 VF;
typedef __m512d VD;
#define INL static inline __attribute__((always_inline, unused))
INL __mmask16 tail16(int n) { return (__mmask16)((1u << n) - 1); }
INL VF v_load(const float *p) { return _mm512_loadu_ps(p); }
INL VF v_loadn(const float *p, int n) { return _mm512_maskz_loadu_ps(tail16(n), p); }
INL void v_store(float *p, VF v) { _mm512_storeu_ps(p, v); }
INL void v_storen(float *p, VF v, int n) { _mm512_mask_storeu_ps(p, tail16(n), v); }
INL VF v_set1(float a) { return _mm512_set1_ps(a); }
INL VF v_add(VF a, VF b) { return _mm512_add_ps(a, b); }
INL VF v_sub(VF a, VF b) { return _mm512_sub_ps(a, b); }
INL VF v_mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
INL VF v_fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
INL VF v_max(VF a, VF b) { return _mm512_max_ps(a, b); }
INL __m128 fold4(VF a) { /* lanes l, l+4, l+8, l+12: (l + l+8) + (l+4 + l+12) */
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}
INL float v_hsum(VF a) {
  __m128 s = fold4(a);
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
INL float v_hmax(VF a) { return _mm512_reduce_max_ps(a); }
/* The order of v_hsum in each of four sums. Lanes are folded two accumulators to a register. */
INL void v_hsum4(VF a, VF b, VF c, VF d, float *out) {
  VF ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE)); /* a01+a23 | b01+b23 */
  VF cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  VF all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD)); /* a b c d, 4 lanes each */
  VF two = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4E));                                      /* l + (l+2) */
  VF one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xB1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, one)));
}
INL unsigned v_not_le(VF a, VF b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
INL VF v_round(VF a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INL VF v_pow2i(VF n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
INL VF v_zero_below(VF v, VF x, VF lim) {
  return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(x, lim, _CMP_LT_OQ), _mm512_setzero_ps());
}
#define v_compress_store(so, io, v, mask, idx_or_null, base)                                                                  \
  do {                                                                                                                        \
    __m512i ids_ = (idx_or_null) ? _mm512_loadu_si512(idx_or_null)                                                            \
                                 : _mm512_add_epi32(_mm512_set1_epi32(base),                                                  \
                                                    _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)); \
    _mm512_storeu_ps(so, _mm512_maskz_compress_ps((__mmask16)(mask), v));                                                     \
    _mm512_storeu_si512(io, _mm512_maskz_compress_epi32((__mmask16)(mask), ids_));                                            \
  } while (0)
/* Compressed lanes turned to the upper end. */
INL void v_push(float *so, int32_t *io, VF v, unsigned mask, int32_t base) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                turn = _mm512_add_epi32(lane, _mm512_set1_epi32(__builtin_popcount(mask))); /* of which the low 4 bits count */
  _mm512_storeu_ps(so - 16, _mm512_permutexvar_ps(turn, _mm512_maskz_compress_ps((__mmask16)mask, v)));
  _mm512_storeu_si512(io - 16,
                      _mm512_permutexvar_epi32(
                          turn, _mm512_maskz_compress_epi32((__mmask16)mask, _mm512_add_epi32(lane, _mm512_set1_epi32(base)))));
}
/* rows[i][j] becomes rows[j][i]: pairs of lanes, then of quarters. */
INL void v_transpose(VF *rows) {
  VF t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; h++) { /* rows[i + c]: column c of each group of four, of rows i .. i+3 */
      rows[i + 2 * h] = _mm512_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
      rows[i + 2 * h + 1] = _mm512_shuffle_ps(t[i + h], t[i + 2 + h], 0xEE);
    }
  for (int c = 0; c < 4; c++) {
    const VF a = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0x88), b = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0xDD),
             e = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0x88), f = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0xDD);
    t[c] = _mm512_shuffle_f32x4(a, e, 0x88);
    t[4 + c] = _mm512_shuffle_f32x4(b, f, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(a, e, 0xDD);
    t[12 + c] = _mm512_shuffle_f32x4(b, f, 0xDD);
  }
  for (int i = 0; i < 16; i++) rows[i] = t[i];
}
INL VD vd_load(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
INL VD vd_loadn(const float *p, int n, float fill) {
  return _mm512_cvtps_pd(_mm256_mask_loadu_ps(_mm256_set1_ps(fill), (__mmask8)((1u << n) - 1), p));
}
INL void vd_store(float *p, VD v) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
INL void vd_storen(float *p, VD v, int n) { _mm256_mask_storeu_ps(p, (__mmask8)((1u << n) - 1), _mm512_cvtpd_ps(v)); }
INL VD vd_set1(double a) { return _mm512_set1_pd(a); }
INL VD vd_add(VD a, VD b) { return _mm512_add_pd(a, b); }
INL VD vd_sub(VD a, VD b) { return _mm512_sub_pd(a, b); }
INL VD vd_mul(VD a, VD b) { return _mm512_mul_pd(a, b); }
INL VD vd_fma(VD a, VD b, VD c) { return _mm512_fmadd_pd(a, b, c); }
INL VD vd_fms(VD a, VD b, VD c) { return _mm512_fmsub_pd(a, b, c); }
INL VD vd_pos(VD a) { return _mm512_max_pd(a, _mm512_setzero_pd()); }
INL unsigned vd_gt0(VD a) { return _mm512_cmp_pd_mask(a, _mm512_setzero_pd(), _CMP_GT_OQ); }
INL VD vd_where(VD cond, VD a) { return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(cond, _mm512_setzero_pd(), _CMP_NEQ_UQ), a); }
/* Lane l plus lane l + VDL, in double. */
INL VD vd_fold(VF a) {
  return _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)));
}
INL double vd_hsum(VD a) {
  __m256d h = _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
  __m128d s = _mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
INL VF v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INL VF v_loadn_f16(const uint16_t *p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(tail16(n), p)); }
INL VF v_load_bf16(const uint16_t *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INL VF v_loadn_bf16(const uint16_t *p, int n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(tail16(n), p)), 16));
}
