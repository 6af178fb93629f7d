/* Rows of scores through every entry of the mapping, against the float64 oracles on the rounded scores.
 * Input: alpha code, dtype, rows, row length, value mode + 6 * part, for the budget a byte of it, then the scores. Part 0: entmax
 * forward; 1: its gradient and loss as well; 2 and 3: normmax and budget, forward, gradient, and normmax's loss. */
#include "base/num.h"
#include "entmax/entmax.h"
#include "fuzz/fuzz.h"
#include "entmax_call.h"
#include "map_call.h"

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

/* Half a unit in the last place, relative, and the smallest step. */
static double unit_of(int32_t dtype) {
  return dtype == EMX_F16 ? 0x1p-11 : dtype == EMX_BF16 ? 0x1p-8 : dtype == EMX_F32 ? 0x1p-24 : 0;
}
static double step_of(int32_t dtype) { return dtype == EMX_F16 ? 0x1p-25 : 0; }

/* Row x[n] of normmax or budget: the weights. Rows with NaN or +inf, and masked ones, by what is promised for them. */
static void check_forward(emx_ctx *ctx, map_args m, void *x, void *p, int32_t dtype, int64_t n) {
  static double s[LENGTH], want[LENGTH];
  double top = -INFINITY, total = m.kind == EMX_MAP_BUDGET ? m.budget : 1, sum = 0, tau;
  int64_t visible = 0;
  bool bad = false;
  int32_t support;
  FUZZ_CHECK(!map_forward(ctx, m, x, p, dtype, n, &tau, &support), "%s", emx_last_error());
  for (int64_t i = 0; i < n; i++) {
    s[i] = emxi_load(x, dtype, i);
    bad |= !(s[i] < INFINITY);
    visible += s[i] > -INFINITY;
    top = fmax(top, s[i]);
  }
  if (bad || !visible) {
    FUZZ_CHECK(bad ? isnan(tau) : tau == -INFINITY && support == 0, "tau %g, support %d", tau, support);
    for (int64_t i = 0; i < n; i++)
      FUZZ_CHECK(bad ? isnan(emxi_load(p, dtype, i)) : emxi_load(p, dtype, i) == 0, "element %d", (int)i);
    return;
  }
  if (total > (double)visible) total = (double)visible;
  const double tau_want =
      m.kind == EMX_MAP_BUDGET ? emxi_oracle_budget(s, n, m.alpha, total, want) : emxi_oracle_normmax(s, n, m.alpha, want);
  const double a = m.kind == EMX_MAP_BUDGET ? m.alpha - 1 : 1, b = 1 / (m.alpha - 1);
  double sum_slack = 1e-6 * total;
  for (int64_t i = 0; i < n; i++) {
    /* the oracle's y is a difference of numbers of the row's size: their rounding, times b, and without bound at the threshold */
    const double got = emxi_load(p, dtype, i), y = fmax(a * s[i] - tau_want, 0),
                 off = 4e-16 * (1 + fabs(a * s[i]) + fabs(tau_want) + (m.kind == EMX_MAP_BUDGET ? 0 : fabs(top))) + 4e-15;
    const double slack = 1e-6 + fmin(1, pow(y + off, b) - pow(y, b)) + unit_of(dtype) * want[i] + step_of(dtype);
    FUZZ_CHECK(got >= 0 && got <= 1, "element %d is %g", (int)i, got);
    FUZZ_CHECK(fabs(got - want[i]) <= slack, "kind %d alpha %g budget %g n %d element %d is %.17g, oracle %.17g", m.kind, m.alpha,
               total, (int)n, (int)i, got, want[i]);
    sum += got;
    sum_slack += slack - 1e-6;
  }
  FUZZ_CHECK(fabs(sum - total) <= sum_slack, "kind %d alpha %g n %d: sum %.9g of %g", m.kind, m.alpha, (int)n, sum, total);
}

/* The gradient of stored weights: no NaN out of numbers, in place as beside, and the formulas where they are well-conditioned. */
static void check_backward(emx_ctx *ctx, map_args m, void *p, int32_t dtype, int64_t n) {
  static double dp[LENGTH], dx[LENGTH], w[LENGTH], g[LENGTH], want[LENGTH];
  float noise[LENGTH];
  double size = 1e-3, d_alpha = 0;
  bool nan = false;
  emxi_normals(1, (uint64_t)n, noise, n);
  for (int64_t i = 0; i < n; i++) {
    emxi_store(dp, dtype, i, noise[i]);
    g[i] = emxi_load(dp, dtype, i);
    w[i] = emxi_load(p, dtype, i);
    nan |= isnan(w[i]);
  }
  FUZZ_CHECK(!map_backward(ctx, m, p, dp, dx, dtype, n, m.kind == EMX_MAP_ENTMAX ? &d_alpha : NULL), "%s", emx_last_error());
  FUZZ_CHECK(!map_backward(ctx, m, p, dp, dp, dtype, n, NULL), "%s", emx_last_error());
  for (int64_t i = 0; i < n; i++) {
    const double got = emxi_load(dx, dtype, i);
    FUZZ_CHECK(isnan(got) == nan && isnan(emxi_load(dp, dtype, i)) == nan, "kind %d alpha %g: gradient %g of weight %g", m.kind,
               m.alpha, got, w[i]);
    if (w[i] == 0) FUZZ_CHECK(got == 0, "gradient %g of a zero", got);
  }
  if (m.kind == EMX_MAP_ENTMAX) FUZZ_CHECK(isnan(d_alpha) == nan && !isinf(d_alpha), "d_alpha %g", d_alpha);
  if (nan || m.alpha > 2 || (m.kind == EMX_MAP_NORMMAX && (m.alpha < 1.2 || unit_of(dtype) > 1e-6))) return;
  emxi_oracle_backward(w, g, n, m.kind, m.alpha, want);
  /* of what is subtracted, too: near-uniform rows leave a small difference of weights times gradients */
  for (int64_t i = 0; i < n; i++) size = fmax(size, fmax(fabs(want[i]), w[i] * fabs(g[i])));
  for (int64_t i = 0; i < n; i++)
    FUZZ_CHECK(fabs(emxi_load(dx, dtype, i) - want[i]) <= 2e-6 * size + unit_of(dtype) * fabs(want[i]) + step_of(dtype),
               "kind %d alpha %g n %d: gradient %d is %.9g, oracle %.9g", m.kind, m.alpha, (int)n, (int)i,
               emxi_load(dx, dtype, i), want[i]);
}

static void check_loss(emx_ctx *ctx, map_args m, void *x, int32_t dtype, int64_t n) {
  static double dx[LENGTH], s[LENGTH], p[LENGTH];
  double loss, top = -INFINITY;
  const int32_t y = (int32_t)(n / 3);
  bool bad = false;
  FUZZ_CHECK(!map_loss(ctx, m, x, y, dx, dtype, n, &loss), "%s", emx_last_error());
  for (int64_t i = 0; i < n; i++) {
    s[i] = emxi_load(x, dtype, i);
    bad |= !(s[i] < INFINITY);
    top = fmax(top, s[i]);
  }
  FUZZ_CHECK(isnan(loss) == bad && (bad || loss >= 0), "loss %g", loss);
  if (bad) return;
  if (s[y] == -INFINITY) {
    FUZZ_CHECK(loss == INFINITY, "loss %g of a masked class", loss);
    return;
  }
  const double want = emxi_oracle_loss(s, n, m.kind, m.alpha, y, p);
  /* differences of scores first; the oracle adds numbers of their size. Near alpha = 1 an error of 1e-16 in tau is divided
   * twice. */
  const double slack = 1e-6 * (1 + want) + 1e-15 * fabs(top) + (m.alpha > 1 ? 1e-15 * (1 + fabs(top)) / (m.alpha - 1) : 0);
  FUZZ_CHECK(fabs(loss - want) <= slack, "kind %d alpha %g n %d: loss %.12g, oracle %.12g", m.kind, m.alpha, (int)n, loss, want);
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
  const uint8_t what = fuzz_u8(&in);
  const int mode = what % 6, part = what / 6 % 4;
  static double store[ROWS * LENGTH], out[ROWS * LENGTH], s[LENGTH], want[LENGTH];
  const double share = part == 3 ? (fuzz_u8(&in) + 1) / 256. : 1;
  for (int64_t i = 0; i < rows * n; i++) emxi_store(store, dtype, i, read_score(&in, mode));
  if (part >= 2) {
    for (int64_t r = 0; r < rows && n && alpha > 1; r++) {
      const map_args m = {part == 2 ? EMX_MAP_NORMMAX : EMX_MAP_BUDGET, alpha, share * (double)n};
      char *x = (char *)store + (size_t)(r * n) * emx_dtype_size(dtype);
      check_forward(ctx, m, x, out, dtype, n);
      check_backward(ctx, m, out, dtype, n);
      if (part == 2) check_loss(ctx, m, x, dtype, n);
    }
    return 0;
  }

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
    /* 1e-6 is the promise; the output's rounding comes on top: half a unit of 11 or 8 bits, and f16's smallest step. For alpha >
     * 2 an element whose score lies on the threshold is ill-conditioned: y^b with b < 1 turns an error of 1e-15 in y into
     * 1e-15^b. */
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
    if (part == 1 && n) {
      const map_args m = {EMX_MAP_ENTMAX, alpha, 1};
      check_backward(ctx, m, (char *)out + (size_t)(r * n) * emx_dtype_size(dtype), dtype, n);
      check_loss(ctx, m, (char *)store + (size_t)(r * n) * emx_dtype_size(dtype), dtype, n);
    }
  }
  return 0;
}
