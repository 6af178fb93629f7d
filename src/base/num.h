/* SPDX-License-Identifier: Apache-2.0
 * 16-bit floats, element access by dtype, and a counter-based generator. */
#ifndef EMXI_NUM_H
#define EMXI_NUM_H

#include <emx.h>
#include <math.h>
#include <string.h>

static inline float emxi_bf16_to_f32(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
/* Round to nearest even; NaN stays NaN. */
static inline uint16_t emxi_f32_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
static inline float emxi_f16_to_f32(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 0x3ff, u;
  float f;
  if (exp == 31)
    u = sign | 0x7f800000u | (man << 13);
  else if (exp)
    u = sign | ((exp + 112) << 23) | (man << 13);
  else { /* zero or subnormal: man * 2^-24 is exact */
    f = (float)man * 0x1p-24f;
    return sign ? -f : f;
  }
  memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t emxi_f32_to_f16(float f) {
  uint32_t u, sign;
  memcpy(&u, &f, 4);
  sign = (u >> 16) & 0x8000;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* rounds to 65536 or more: infinity */
  if (u < 0x38800000u) {                                  /* below 2^-14: a multiple of 2^-24 */
    float a;
    memcpy(&a, &u, 4);
    return (uint16_t)(sign | (uint32_t)nearbyintf(a * 0x1p24f));
  }
  u += 0xfffu + ((u >> 13) & 1);
  return (uint16_t)(sign | ((u - 0x38000000u) >> 13));
}

static inline double emxi_load(const void *p, int32_t dtype, int64_t i) {
  switch (dtype) {
    case EMX_F32: return ((const float *)p)[i];
    case EMX_F64: return ((const double *)p)[i];
    case EMX_BF16: return emxi_bf16_to_f32(((const uint16_t *)p)[i]);
    case EMX_F16: return emxi_f16_to_f32(((const uint16_t *)p)[i]);
    case EMX_I32: return ((const int32_t *)p)[i];
  }
  return NAN;
}
static inline void emxi_store(void *p, int32_t dtype, int64_t i, double v) {
  switch (dtype) {
    case EMX_F32: ((float *)p)[i] = (float)v; break;
    case EMX_F64: ((double *)p)[i] = v; break;
    case EMX_BF16: ((uint16_t *)p)[i] = emxi_f32_to_bf16((float)v); break;
    case EMX_F16: ((uint16_t *)p)[i] = emxi_f32_to_f16((float)v); break;
    case EMX_I32: ((int32_t *)p)[i] = (int32_t)v; break;
  }
}

/* Philox4x32-10 (Salmon et al. 2011): four random words of (key, counter), no state, so that sample i depends on i alone. */
static inline void emxi_philox(uint64_t key, uint64_t counter_hi, uint64_t counter_lo, uint32_t out[4]) {
  uint32_t c0 = (uint32_t)counter_lo, c1 = (uint32_t)(counter_lo >> 32), c2 = (uint32_t)counter_hi,
           c3 = (uint32_t)(counter_hi >> 32), k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
  for (int r = 0; r < 10; r++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}
/* In (0, 1), 32 bits. */
static inline double emxi_uniform(uint32_t word) { return ((double)word + 0.5) * 0x1p-32; }
/* n standard normals of stream (key, stream), Box-Muller on pairs of words. */
static inline void emxi_normals(uint64_t key, uint64_t stream, float *out, int64_t n) {
  for (int64_t i = 0; i < n; i += 4) {
    uint32_t w[4];
    emxi_philox(key, stream, (uint64_t)(i / 4), w);
    for (int64_t j = 0; j < 4 && i + j < n; j += 2) {
      double r = sqrt(-2.0 * log(emxi_uniform(w[j]))), a = 6.283185307179586 * emxi_uniform(w[j + 1]);
      out[i + j] = (float)(r * cos(a));
      if (i + j + 1 < n) out[i + j + 1] = (float)(r * sin(a));
    }
  }
}

#endif
