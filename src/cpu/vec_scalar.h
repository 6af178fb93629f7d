/* One-lane "vectors" over REAL: the reference that every other table is tested against. */
#define VL 1
#define VDL 1
#define TILE_NV 8
#define TILE_MR 2
typedef REAL VF;
typedef double VD;
#define INL static inline __attribute__((unused))
INL VF v_load(const REAL *p) { return *p; }
INL VF v_loadn(const REAL *p, int n) { return n > 0 ? *p : 0; }
INL void v_store(REAL *p, VF v) { *p = v; }
INL void v_storen(REAL *p, VF v, int n) {
  if (n > 0) *p = v;
}
INL VF v_set1(REAL a) { return a; }
INL VF v_add(VF a, VF b) { return a + b; }
INL VF v_sub(VF a, VF b) { return a - b; }
INL VF v_mul(VF a, VF b) { return a * b; }
INL VF v_fma(VF a, VF b, VF c) { return sizeof(REAL) == 4 ? (REAL)fmaf((float)a, (float)b, (float)c) : (REAL)fma(a, b, c); }
INL VF v_max(VF a, VF b) { return a > b ? a : b; } /* b if either is NaN, as in x86 */
INL REAL v_hsum(VF a) { return a; }
INL REAL v_hmax(VF a) { return a; }
INL void v_hsum4(VF a, VF b, VF c, VF d, REAL *out) {
  out[0] = a;
  out[1] = b;
  out[2] = c;
  out[3] = d;
}
INL unsigned v_not_le(VF a, VF b) { return !(a <= b); }
INL VF v_round(VF a) { return (REAL)nearbyint(a); }
INL VF v_pow2i(VF n) { return n == n ? (REAL)ldexp(1.0, (int)n) : n; } /* NaN is no int */
INL VF v_zero_below(VF v, VF x, VF lim) { return x < lim ? 0 : v; }
#define v_compress_store(so, io, v, mask, idx_or_null, base) \
  do {                                                       \
    *(so) = (v);                                             \
    *(io) = (idx_or_null) ? *(idx_or_null) : (base);         \
  } while (0)
#define v_push(so, io, v, mask, base) \
  do {                                \
    (so)[-1] = (v);                   \
    (io)[-1] = (base);                \
  } while (0)
INL void v_transpose(VF *rows) { (void)rows; }
INL VD vd_load(const REAL *p) { return *p; }
INL VD vd_loadn(const REAL *p, int n, REAL fill) { return n > 0 ? *p : fill; }
INL void vd_store(REAL *p, VD v) { *p = (REAL)v; }
INL void vd_storen(REAL *p, VD v, int n) {
  if (n > 0) *p = (REAL)v;
}
INL VD vd_set1(double a) { return a; }
INL VD vd_add(VD a, VD b) { return a + b; }
INL VD vd_sub(VD a, VD b) { return a - b; }
INL VD vd_mul(VD a, VD b) { return a * b; }
INL VD vd_fma(VD a, VD b, VD c) { return fma(a, b, c); }
INL VD vd_fms(VD a, VD b, VD c) { return fma(a, b, -c); }
INL VD vd_pos(VD a) { return a > 0 ? a : 0; } /* NaN gives 0 */
INL unsigned vd_gt0(VD a) { return a > 0; }
INL VD vd_where(VD cond, VD a) { return cond == 0 ? 0 : a; } /* a where cond is not 0 */
INL VD vd_fold(VF a) { return a; }
INL double vd_hsum(VD a) { return a; }
#ifdef EMXI_F32
INL VF v_load_f16(const uint16_t *p) { return emxi_f16_to_f32(*p); }
INL VF v_loadn_f16(const uint16_t *p, int n) { return n > 0 ? emxi_f16_to_f32(*p) : 0; }
INL VF v_load_bf16(const uint16_t *p) { return emxi_bf16_to_f32(*p); }
INL VF v_loadn_bf16(const uint16_t *p, int n) { return n > 0 ? emxi_bf16_to_f32(*p) : 0; }
#endif
