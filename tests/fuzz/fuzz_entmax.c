/* Rows of scores through emx_entmax_forward, against the float64 oracle on the rounded scores.
 * Input: alpha code, dtype, rows, row length, row pitch, value mode, then the scores. */
#include "base/num.h"
#include "entmax/entmax.h"
#include "fuzz/fuzz.h"
#include "entmax_call.h"

enum { ROWS = 4, LENGTH = 600 };

static float read_score(fuzz_input *in, int mode) {
  uint16_t w = fuzz_u16(in);
  switch (mode) {
    case 0: return (float)(int16_t)w / 4096; /* ordinary */
    case 1: return (float)(w & 7) / 4;       /* ties */
    case 2: {                                /* any bits: NaN, infinities, denormals */
      uint32_t bits = (uint32_t)w << 16 | fuzz_u16(in);
      float f;
      memcpy(&f, &bits, 4);
      return f;
    }
    case 3: return w & 1 ? (float)(int16_t)w / 256 : -INFINITY; /* masks */
    case 4: return 1e8f + (float)(w & 63);
    default: return (float)(int16_t)w * 1e-9f;
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static emx_ctx *ctx;
  if (!ctx) {
    emx_ctx_opts opts;
    emx_ctx_opts_init(&opts);
    opts.threads = 1;
    FUZZ_CHECK(!emx_ctx_create(&opts, &ctx), "%s", emx_last_error());
  }
  static const double alphas[] = {1, 1.001, 1.1, 1.25, 4. / 3, 1.5, 1.75, 2, 2.5, 3, 4};
  static const int32_t dtypes[] = {EMX_F32, EMX_F64, EMX_BF16, EMX_F16};
  fuzz_input in = {data, size};
  uint8_t code = fuzz_u8(&in);
  const double alpha = code < 220 ? alphas[code % 11] : 1.0 + (double)(code - 219) * 3.0 / 36.0;
  const int32_t dtype = dtypes[fuzz_u8(&in) % 4];
  const int64_t rows = fuzz_u8(&in) % (ROWS + 1), n = fuzz_u16(&in) % (LENGTH + 1);
  const int mode = fuzz_u8(&in) % 6;
  static double store[ROWS * LENGTH], out[ROWS * LENGTH], s[LENGTH], want[LENGTH];
  for (int64_t i = 0; i < rows * n; i++) emxi_store(store, dtype, i, read_score(&in, mode));

  int32_t support[ROWS];
  double tau[ROWS];
  int64_t shape[2] = {rows, n};
  emx_tensor x = emx_tensor_view(store, dtype, 2, shape), p = emx_tensor_view(out, dtype, 2, shape),
             t = emx_tensor_view(tau, EMX_F64, 1, shape), c = emx_tensor_view(support, EMX_I32, 1, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  desc.alpha = alpha;
  FUZZ_CHECK(!entmax_forward(ctx, &desc, &x, &p, &t, &c), "%s", emx_last_error());

  for (int64_t r = 0; r < rows; r++) {
    int64_t wanted;
    double top = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
      s[i] = emxi_load(store, dtype, r * n + i);
      if (s[i] > top) top = s[i];
    }
    double tau_want = emxi_oracle_entmax(s, n, alpha, want, &wanted), sum = 0;
    if (alpha > 1) FUZZ_CHECK(isnan(tau_want) == isnan(tau[r]), "tau %g, oracle %g", tau[r], tau_want);
    /* 1e-6 is the promise; the output's rounding comes on top: half a unit of 11 or 8 bits, and f16's smallest step. For alpha > 2 an
     * element whose score lies on the threshold is ill-conditioned: y^b with b < 1 turns an error of 1e-15 in y into 1e-15^b. */
    const double unit = dtype == EMX_F16 ? 0x1p-11 : dtype == EMX_BF16 ? 0x1p-8 : 0, b = alpha > 1 ? 1 / (alpha - 1) : 1;
    double sum_slack = 1e-6;
    for (int64_t i = 0; i < n; i++) {
      double got = emxi_load(out, dtype, r * n + i);
      FUZZ_CHECK(isnan(got) == isnan(want[i]), "element %d is %g, oracle %g", (int)i, got, want[i]);
      if (isnan(got)) continue;
      double edge = 0;
      if (alpha > 2) {
        double y = fmax((alpha - 1) * (s[i] - top) - (tau_want - (alpha - 1) * top), 0);
        edge = pow(y + 4e-15, b) - pow(y, b);
      }
      double slack = 1e-6 + edge + unit * want[i] + (dtype == EMX_F16 ? 0x1p-25 : 0);
      FUZZ_CHECK(got >= 0 && got <= 1, "element %d is %g", (int)i, got);
      FUZZ_CHECK(fabs(got - want[i]) <= slack, "alpha %g n %d element %d is %.17g, oracle %.17g", alpha, (int)n, (int)i, got,
                 want[i]);
      sum += got;
      sum_slack += slack - 1e-6;
    }
    if (wanted) FUZZ_CHECK(fabs(sum - 1) <= sum_slack, "alpha %g n %d: sum %.9g", alpha, (int)n, sum);
    FUZZ_CHECK((support[r] > 0) == (wanted > 0), "support %d, oracle %d", support[r], (int)wanted);
  }
  return 0;
}
