/* The forward pass and the session against a float64 model written out here, and the laws of a session: chunks, decoding, forks,
 * truncation, threads and selectors do not change what is computed. */
#define _DEFAULT_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "entmax/entmax.h"
#include "model/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { V = 50, W = 64, F = 96, L = 2, H = 4, G = 2, D = 16, N = 100 };

static char folder[] = "/tmp/emx_session_XXXXXX";
static emx_model_config config;
static float *weights;
static emx_ctx *ctx;
static emx_model *model;
static int32_t tokens[N];
static double want_logits[N][V]; /* of the reference */
static double want_q[L][N][H * D], want_k[L][N][G * D], want_v[L][N][G * D];

static emx_ctx *context(int32_t threads) {
  emx_ctx_opts o;
  emx_ctx *c;
  emx_ctx_opts_init(&o);
  o.threads = threads;
  return emx_ctx_create(&o, &c) ? NULL : c;
}
static emx_status save(void) {
  char path[300];
  snprintf(path, sizeof path, "%s/model.safetensors", folder);
  emx_status status = emxi_config_write(folder, &config, EMX_F32);
  return status ? status : emxi_weights_save(path, &config, weights, EMX_F32, NULL, 0);
}

/* ---- the model in float64, one loop per line of emx_model.h */

static void ref_norm(const double *x, const float *w, double *y) {
  double ss = 0;
  for (int i = 0; i < W; i++) ss += x[i] * x[i];
  for (int i = 0; i < W; i++) y[i] = x[i] / sqrt(ss / W + config.rms_norm_eps) * w[i];
}
static void ref_linear(const double *x, const float *w, int in, int out, double *y) {
  for (int o = 0; o < out; o++) {
    y[o] = 0;
    for (int i = 0; i < in; i++) y[o] += (double)w[o * in + i] * x[i];
  }
}
/* theta of head `head` at position t, h its normed state */
static double ref_theta(const emxi_layer *y, int head, const double *h, int t) {
  const int first = config.position_type == EMX_POSITION_NAPE ? config.alibi_num_heads : 0, e = head - first;
  const double n = log(t + 2.0);
  if (e < 0 || config.attn_scale_type == EMX_ATTN_SCALE_NONE) return 1;
  if (config.attn_scale_type == EMX_ATTN_SCALE_SSMAX) return y->theta_b[e] * n;
  if (config.attn_scale_type == EMX_ATTN_SCALE_FOCAL)
    return 1 / (config.focal_learned ? exp(y->theta_b[e]) : config.focal_temperature);
  double b, g;
  ref_linear(h, y->theta_w + e * W, W, 1, &b);
  ref_linear(h, y->theta_v + e * W, W, 1, &g);
  return 1 + log(1 + exp(b + y->theta_b[e])) * pow(n, 2 * tanh(g + y->theta_c[e]));
}
static void ref_rope(double *x, int heads, int t) {
  for (int head = 0; config.position_type == EMX_POSITION_ROPE && head < heads; head++)
    for (int d = 0; d < D / 2; d++) {
      double *a = x + head * D + d, *b = a + D / 2, angle = t / pow(config.rope_theta, 2. * d / D), keep = *a;
      *a = keep * cos(angle) - *b * sin(angle);
      *b = keep * sin(angle) + *b * cos(angle);
    }
}
static double ref_slope(int head) {
  const int heads = config.position_type == EMX_POSITION_NAPE    ? config.alibi_num_heads
                    : config.position_type == EMX_POSITION_ALIBI ? H
                                                                 : 0;
  return head >= heads ? 0 : config.alibi_slope_type == EMX_SLOPE_GIVEN ? config.alibi_slopes[head] : 1. / (head + 1);
}
static void reference(void) {
  static double x[N][W];
  emxi_weights w;
  assert_int_equal(emxi_weights_create(&config, weights, &w), EMX_OK);
  for (int t = 0; t < N; t++)
    for (int i = 0; i < W; i++) x[t][i] = w.embed[tokens[t] * W + i];
  for (int l = 0; l < L; l++) {
    const emxi_layer *y = &w.layers[l];
    double h[W], (*q)[H * D] = want_q[l], (*k)[G * D] = want_k[l], (*v)[G * D] = want_v[l];
    for (int t = 0; t < N; t++) {
      ref_norm(x[t], y->input_norm, h);
      ref_linear(h, y->wq, W, H * D, q[t]);
      ref_linear(h, y->wk, W, G * D, k[t]);
      ref_linear(h, y->wv, W, G * D, v[t]);
      ref_rope(q[t], H, t);
      ref_rope(k[t], G, t);
      for (int head = 0; head < H; head++)
        for (int d = 0; d < D; d++) q[t][head * D + d] *= ref_theta(y, head, h, t);
    }
    for (int t = 0; t < N; t++) {
      double a[H * D] = {0}, out[W], g[F], u[F];
      for (int head = 0; head < H; head++) {
        const int kv = head / (H / G);
        double s[N], p[N];
        int64_t support;
        for (int j = 0; j <= t; j++) {
          s[j] = 0;
          for (int d = 0; d < D; d++) s[j] += q[t][head * D + d] * k[j][kv * D + d];
          s[j] = s[j] / sqrt(D) - ref_slope(head) * (t - j);
        }
        emxi_oracle_entmax(s, t + 1, y->alpha ? 1 + 1 / (1 + exp(-y->alpha[head])) : config.entmax_alpha, p, &support);
        for (int j = 0; j <= t; j++)
          for (int d = 0; d < D; d++) a[head * D + d] += p[j] * v[j][kv * D + d];
      }
      ref_linear(a, y->wo, H * D, W, out);
      for (int i = 0; i < W; i++) x[t][i] += out[i];
      ref_norm(x[t], y->post_norm, h);
      ref_linear(h, y->gate, W, F, g);
      ref_linear(h, y->up, W, F, u);
      for (int i = 0; i < F; i++) g[i] = g[i] / (1 + exp(-g[i])) * u[i];
      ref_linear(g, y->down, F, W, out);
      for (int i = 0; i < W; i++) x[t][i] += out[i];
    }
  }
  for (int t = 0; t < N; t++) {
    double h[W];
    ref_norm(x[t], w.norm, h);
    ref_linear(h, w.head, W, V, want_logits[t]);
  }
  emxi_weights_destroy(&w);
}

/* Weights for the configuration. Norms near one, projections that keep the size of their input; queries and keys larger, so that
 * supports are small; theta's parameters of size one. */
static void make_weights(void) {
  const int64_t count = emx_model_config_parameters(&config);
  free(weights);
  weights = malloc((size_t)count * sizeof *weights);
  assert_non_null(weights);
  emxi_normals(3, 0, weights, count);
  for (int64_t i = 0; i < emxi_param_tensors(&config); i++) {
    emxi_param p;
    emxi_param_at(&config, i, &p);
    float scale = p.start == EMXI_START_NORM ? .1f
                  : !p.decay                 ? .5f
                             : 1 / sqrtf((float)p.shape[1]) * (strstr(p.name, "q_proj") || strstr(p.name, "k_proj") ? 1.7f : 1);
    for (int64_t j = 0; j < p.count; j++)
      weights[p.offset + j] = weights[p.offset + j] * scale + (p.start == EMXI_START_NORM ? 1 : 0);
  }
}
static int setup(void **state) {
  (void)state;
  if (!mkdtemp(folder)) return 1;
  emx_model_config_init(&config);
  config.vocab_size = V;
  config.hidden_size = W;
  config.intermediate_size = F;
  config.num_layers = L;
  config.num_heads = H;
  config.num_kv_heads = G;
  config.head_dim = D;
  config.alibi_num_heads = 2;
  config.tie_word_embeddings = 0;
  make_weights();
  uint32_t r[4];
  for (int i = 0; i < N; i++) {
    emxi_philox(11, 0, (uint64_t)i, r);
    tokens[i] = (int32_t)(r[0] % V);
  }
  reference();
  ctx = context(2);
  return !ctx || save() || emx_model_open(ctx, folder, &model);
}
static int teardown(void **state) {
  (void)state;
  char path[300];
  emx_model_close(model);
  emx_ctx_destroy(ctx);
  free(weights);
  snprintf(path, sizeof path, "%s/model.safetensors", folder);
  unlink(path);
  snprintf(path, sizeof path, "%s/config.json", folder);
  unlink(path);
  return rmdir(folder);
}

static emx_session *session(emx_model *m, int32_t dtype, int32_t chunk, int64_t max_tokens) {
  emx_session_opts o;
  emx_session_opts_init(&o);
  o.kv_dtype = dtype;
  o.chunk = chunk;
  o.max_tokens = max_tokens;
  o.max_sessions = 3;
  emx_session *s;
  if (emx_session_create(m, &o, &s)) fail_msg("%s", emx_last_error());
  return s;
}
static void prefill(emx_session *s, int64_t from, int64_t n, float *nll, float *logits) {
  if (emx_session_prefill(s, tokens + from, n, nll, logits, NULL, NULL)) fail_msg("%s", emx_last_error());
}
static void decode(emx_session *s, int64_t i, float *logits) {
  if (emx_session_decode(s, tokens[i], logits)) fail_msg("%s", emx_last_error());
}
static void expect_near(const float *got, const double *want, double slack, const char *what, int64_t at) {
  for (int i = 0; i < V; i++)
    if (!(fabs(got[i] - want[i]) <= slack))
      fail_msg("%s, token %d, logit %d: %g, expected %g", what, (int)at, i, (double)got[i], want[i]);
}

/* Logits are of size 1 to 5 and come out of sums of at most 100 products in f32, a handful in a row: errors near 1e-6. 1e-4
 * leaves room for the softmax-like amplification of scores in two layers. With a bf16 cache, a key or value whose f32 forms
 * differ in the last bit may round to neighbours 2^-8 apart; one such coordinate of thousands moves a logit by less than 2e-2. */
static const double TIGHT = 1e-4, BF16 = 2e-2;

static void test_against_reference(void **state) {
  (void)state;
  static const int32_t chunks[] = {512, 1, 7, 32};
  double want_nll[N] = {0};
  for (int t = 1; t < N; t++) {
    double sum = 0;
    for (int i = 0; i < V; i++) sum += exp(want_logits[t - 1][i]);
    want_nll[t] = log(sum) - want_logits[t - 1][tokens[t]];
  }
  for (int c = 0; c < 4; c++) {
    emx_session *s = session(model, EMX_F32, chunks[c], N);
    float nll[N], logits[V];
    prefill(s, 0, N, nll, logits);
    assert_int_equal(emx_session_length(s), N);
    expect_near(logits, want_logits[N - 1], TIGHT, "prefill", N - 1);
    assert_true(isnan(nll[0]));
    for (int t = 1; t < N; t++)
      if (!(fabs(nll[t] - want_nll[t]) <= TIGHT)) fail_msg("nll %d: %g, expected %g", t, (double)nll[t], want_nll[t]);
    emx_session_destroy(s);
  }
  /* In several calls, decoding among them: the first loss of a call comes from the state that the last call left. */
  emx_session *s = session(model, EMX_F32, 16, N);
  float nll[N], logits[V];
  prefill(s, 0, 30, nll, NULL);
  for (int t = 30; t < 34; t++) {
    decode(s, t, logits);
    expect_near(logits, want_logits[t], TIGHT, "decode", t);
  }
  prefill(s, 34, 50, nll, NULL);
  for (int t = 0; t < 50; t++) assert_true(fabs(nll[t] - want_nll[34 + t]) <= TIGHT);
  emx_session *f;
  assert_int_equal(emx_session_fork(s, &f), EMX_OK);
  prefill(f, 84, 1, nll, NULL);
  assert_true(fabs(nll[0] - want_nll[84]) <= TIGHT);
  assert_int_equal(emx_session_truncate(f, 50), EMX_OK);
  prefill(f, 50, 2, nll, NULL);
  assert_true(isnan(nll[0]) && fabs(nll[1] - want_nll[51]) <= TIGHT); /* the state was cut off */
  emx_session_destroy(f);
  emx_session_destroy(s);
}

static void test_decode_is_prefill(void **state) {
  (void)state;
  static const int32_t dtypes[] = {EMX_F32, EMX_BF16, EMX_F16};
  for (int d = 0; d < 3; d++) {
    emx_session *s = session(model, dtypes[d], 512, N), *p = session(model, dtypes[d], 512, N);
    float logits[V], row[V];
    for (int t = 0; t < N; t++) {
      decode(s, t, logits);
      if (dtypes[d] == EMX_F32) expect_near(logits, want_logits[t], TIGHT, "decode", t);
      if (t % 9 && t != N - 1) continue;
      double want[V];
      assert_int_equal(emx_session_truncate(p, 0), EMX_OK);
      prefill(p, 0, t + 1, NULL, row);
      for (int i = 0; i < V; i++) want[i] = row[i];
      expect_near(logits, want, dtypes[d] == EMX_F32 ? TIGHT : BF16, emx_dtype_name(dtypes[d]), t);
    }
    emx_session_destroy(s);
    emx_session_destroy(p);
  }
}

static void test_fork(void **state) {
  (void)state;
  emx_session *a = session(model, EMX_BF16, 64, 2 * N), *b, *c, *d;
  float la[V], lb[V], alone[V];
  prefill(a, 0, 37, NULL, NULL); /* ends inside of a page */
  assert_int_equal(emx_session_fork(a, &b), EMX_OK);
  assert_int_equal(emx_session_fork(a, &c), EMX_OK);
  assert_int_equal(emx_session_fork(a, &d), EMX_ERR_STATE); /* max_sessions is 3 */
  assert_int_equal(emx_session_length(b), 37);
  for (int t = 0; t < 20; t++) { /* diverge, in turns */
    decode(a, 37 + t, la);
    decode(b, 60 + t, lb);
  }
  emx_session_destroy(a); /* the pool outlives the parent */
  for (int t = 0; t < 20; t++) decode(c, 60 + t, alone);
  assert_memory_equal(lb, alone, sizeof lb);
  assert_memory_not_equal(la, lb, sizeof la);
  emx_session_destroy(b);
  emx_session_destroy(c);
}

static void test_truncate(void **state) {
  (void)state;
  emx_session *s = session(model, EMX_BF16, 64, N);
  float first[V], again[V];
  prefill(s, 0, 50, NULL, NULL);
  for (int t = 50; t < 70; t++) decode(s, t, first);
  assert_int_equal(emx_session_truncate(s, 50), EMX_OK);
  assert_int_equal(emx_session_length(s), 50);
  for (int t = 50; t < 70; t++) decode(s, t, again);
  assert_memory_equal(first, again, sizeof first);
  assert_int_equal(emx_session_truncate(s, 71), EMX_ERR_INVALID);
  assert_int_equal(emx_session_truncate(s, -1), EMX_ERR_INVALID);
  assert_int_equal(emx_session_truncate(s, 0), EMX_OK);
  prefill(s, 0, 50, NULL, NULL);
  for (int t = 50; t < 70; t++) decode(s, t, again);
  assert_memory_equal(first, again, sizeof first);
  emx_session_destroy(s);
}

static void test_threads(void **state) {
  (void)state;
  float logits[3][2][V], nll[3][N];
  static const int32_t threads[] = {1, 2, 5};
  for (int i = 0; i < 3; i++) {
    emx_ctx *c = context(threads[i]);
    emx_model *m;
    assert_non_null(c);
    assert_int_equal(emx_model_open(c, folder, &m), EMX_OK);
    emx_session *s = session(m, EMX_BF16, 40, N);
    prefill(s, 0, N - 1, nll[i], logits[i][0]);
    decode(s, N - 1, logits[i][1]);
    emx_session_destroy(s);
    emx_model_close(m);
    emx_ctx_destroy(c);
    assert_memory_equal(logits[i], logits[0], sizeof logits[0]);
    assert_memory_equal(nll[i] + 1, nll[0] + 1, (N - 2) * sizeof(float));
  }
}

static void test_select(void **state) {
  (void)state;
  float all[V], some[V];
  emx_session *s = session(model, EMX_BF16, 512, N), *f;
  prefill(s, 0, 90, NULL, NULL);
  emx_select_desc topk;
  emx_select_desc_init(&topk);
  topk.kind = EMX_SELECT_TOPK;
  topk.budget = 128; /* every page */
  assert_int_equal(emx_session_fork(s, &f), EMX_OK);
  assert_int_equal(emx_session_set_select(f, &topk), EMX_OK);
  for (int t = 90; t < N; t++) {
    decode(s, t, all);
    decode(f, t, some);
    assert_memory_equal(all, some, sizeof all);
  }
  emx_session_stats st = {.struct_size = sizeof st};
  assert_int_equal(emx_session_get_stats(f, &st), EMX_OK);
  assert_int_equal(st.certified, st.rows);
  /* Two pages of seven: fewer bytes, a bound where something was dropped. */
  topk.budget = 32;
  assert_int_equal(emx_session_truncate(f, 90), EMX_OK);
  assert_int_equal(emx_session_set_select(f, &topk), EMX_OK);
  emx_session_reset_stats(f);
  for (int t = 90; t < N; t++) decode(f, t, some);
  assert_int_equal(emx_session_get_stats(f, &st), EMX_OK);
  assert_true(st.bytes_k < st.bytes_full / 2 && st.bytes_meta > 0);
  assert_true(st.certified < st.rows && st.delta_bound_max > 0 && st.delta_bound_max <= 1);
  /* The other estimate, which chooses its own budget. */
  emx_select_desc gaussian;
  emx_select_desc_init(&gaussian);
  gaussian.kind = EMX_SELECT_GAUSSIAN;
  assert_int_equal(emx_session_truncate(f, 90), EMX_OK);
  assert_int_equal(emx_session_set_select(f, &gaussian), EMX_OK);
  emx_session_reset_stats(f);
  for (int t = 90; t < N; t++) decode(f, t, some);
  assert_int_equal(emx_session_get_stats(f, &st), EMX_OK);
  assert_true(st.rows == (N - 90) * L * H && st.bytes_k > 0 && st.bytes_meta > 0 && st.delta_bound_max <= 1);
  assert_true(fabs(st.mass_min - 1) < 1e-5 && fabs(st.mass_max - 1) < 1e-5);
  gaussian.kind = EMX_SELECT_CERTIFIED; /* refused, and the selector is the one of before */
  assert_int_equal(emx_session_set_select(f, &gaussian), EMX_ERR_STATE);
  assert_int_equal(emx_session_truncate(f, 90), EMX_OK);
  for (int t = 90; t < N; t++) decode(f, t, all);
  assert_memory_equal(all, some, sizeof all);
  emx_session_destroy(f);

  topk.kind = EMX_SELECT_PAGES;
  assert_int_equal(emx_session_set_select(s, &topk), EMX_ERR_UNSUPPORTED);
  topk.kind = 99;
  assert_int_equal(emx_session_set_select(s, &topk), EMX_ERR_INVALID);
  topk.struct_size = 4;
  assert_int_equal(emx_session_set_select(s, &topk), EMX_ERR_INVALID);
  emx_session_destroy(s);
  emx_session_opts o;
  emx_session_opts_init(&o);
  o.summaries = 0;
  assert_int_equal(emx_session_create(model, &o, &s), EMX_OK);
  emx_select_desc_init(&topk);
  topk.kind = EMX_SELECT_TOPK;
  topk.budget = 32;
  assert_int_equal(emx_session_set_select(s, &topk), EMX_ERR_STATE);
  topk.kind = EMX_SELECT_GAUSSIAN;
  assert_int_equal(emx_session_set_select(s, &topk), EMX_ERR_STATE);
  emx_session_destroy(s);
}

static void test_stats(void **state) {
  (void)state;
  emx_session *s = session(model, EMX_BF16, 512, N);
  float logits[V];
  emx_session_stats st = {.struct_size = sizeof st};
  prefill(s, 0, 60, NULL, NULL);
  assert_int_equal(emx_session_get_stats(s, &st), EMX_OK);
  assert_true(st.tokens == 0 && st.rows == 0 && st.bytes_full == 0);
  decode(s, 60, logits);
  decode(s, 61, logits);
  assert_int_equal(emx_session_get_stats(s, &st), EMX_OK);
  assert_int_equal(st.tokens, 2);
  assert_int_equal(st.rows, 2 * L * H);
  assert_int_equal(st.certified, st.rows);
  assert_int_equal(st.bytes_full, (61 + 62) * L * H * 2 * D * 2);
  assert_true(st.support_sum >= (double)st.rows && st.support_sum < 62. * (double)st.rows);
  assert_true(st.delta_bound_sum == 0 && st.delta_bound_max == 0 && !st.nonfinite);
  assert_true(fabs(st.mass_min - 1) < 1e-5 && fabs(st.mass_max - 1) < 1e-5);
  assert_true(st.bytes_k >= 61 * L * H * 2 * D * 2 && st.bytes_v > 0 && st.bytes_v < st.bytes_k);
  assert_true(st.attn_seconds > 0 && st.seconds >= st.attn_seconds);
  emx_session_reset_stats(s);
  assert_int_equal(emx_session_get_stats(s, &st), EMX_OK);
  assert_int_equal(st.rows, 0);
  st.struct_size = 8;
  assert_int_equal(emx_session_get_stats(s, &st), EMX_ERR_INVALID);
  emx_session_destroy(s);
}

struct watch {
  int calls, cancel_at;
  int64_t done;
};
static void on_progress(void *user, int64_t done, int64_t total) {
  struct watch *w = user;
  assert_int_equal(total, 60);
  assert_true(done > w->done);
  w->done = done;
  if (++w->calls == w->cancel_at) emx_ctx_cancel(ctx);
}

/* A call that fails, wherever it fails, leaves the session and the results as they were. */
static void test_undo(void **state) {
  (void)state;
  emx_session *s = session(model, EMX_BF16, 16, N), *twin = session(model, EMX_BF16, 16, N);
  float nll[60], logits[V], want[V];
  prefill(s, 0, 20, NULL, NULL);
  prefill(twin, 0, 20, NULL, NULL);
  struct watch w = {.cancel_at = 2};
  for (int i = 0; i < 60; i++) nll[i] = -7;
  logits[0] = -7;
  assert_int_equal(emx_session_prefill(s, tokens + 20, 60, nll, logits, on_progress, &w), EMX_ERR_CANCELLED);
  assert_int_equal(w.calls, 2);
  assert_int_equal(emx_session_length(s), 20);
  for (int i = 0; i < 60; i++) assert_true(nll[i] == -7);
  assert_true(logits[0] == -7);
  assert_int_equal(emx_session_decode(s, 3, logits), EMX_ERR_CANCELLED);
  assert_true(logits[0] == -7);
  emx_ctx_resume(ctx);
  w = (struct watch){.cancel_at = -1};
  assert_int_equal(emx_session_prefill(s, tokens + 20, 60, nll, logits, on_progress, &w), EMX_OK);
  assert_int_equal(w.calls, 4);
  assert_int_equal(w.done, 60);
  prefill(twin, 20, 60, NULL, want);
  assert_memory_equal(logits, want, sizeof want);

  /* Too long; no such token; no room: nothing changes. */
  assert_int_equal(emx_session_prefill(s, tokens, 21, NULL, NULL, NULL, NULL), EMX_ERR_STATE);
  int32_t bad[2] = {0, V};
  assert_int_equal(emx_session_prefill(s, bad, 2, NULL, NULL, NULL, NULL), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "token 1 is 50"));
  assert_int_equal(emx_session_decode(s, -1, logits), EMX_ERR_INVALID);
  assert_int_equal(emx_session_decode(s, V, logits), EMX_ERR_INVALID);
  assert_int_equal(emx_session_decode(s, 1, NULL), EMX_ERR_INVALID);
  assert_int_equal(emx_session_prefill(s, tokens, 0, NULL, NULL, NULL, NULL), EMX_ERR_INVALID);
  assert_int_equal(emx_session_prefill(s, NULL, 1, NULL, NULL, NULL, NULL), EMX_ERR_INVALID);
  assert_int_equal(emx_session_length(s), 80);
  for (int t = 80; t < N; t++) {
    decode(s, t, logits);
    decode(twin, t, want);
  }
  assert_memory_equal(logits, want, sizeof want);
  assert_int_equal(emx_session_decode(s, 0, logits), EMX_ERR_STATE);
  emx_session_destroy(s);
  emx_session_destroy(twin);
}

/* Forks share max_tokens: what does not fit is STATE, whatever layer notices. */
static void test_pool_is_shared(void **state) {
  (void)state;
  emx_session *a = session(model, EMX_BF16, 64, 96), *b, *c;
  prefill(a, 0, 48, NULL, NULL);
  assert_int_equal(emx_session_fork(a, &b), EMX_OK);
  assert_int_equal(emx_session_fork(a, &c), EMX_OK);
  prefill(a, 48, 48, NULL, NULL); /* 96 tokens, 6 pages of the pool's 8 */
  prefill(b, 48, 30, NULL, NULL);
  assert_int_equal(emx_session_prefill(c, tokens, 30, NULL, NULL, NULL, NULL), EMX_ERR_STATE);
  assert_int_equal(emx_session_length(c), 48);
  emx_session_destroy(b);
  prefill(c, 48, 30, NULL, NULL);
  emx_session_destroy(a);
  emx_session_destroy(c);
}

static void test_bad_options(void **state) {
  (void)state;
  emx_session_opts good, o;
  emx_session *s = NULL;
  emx_session_opts_init(&good);
  o = good, o.max_tokens = 0;
  assert_int_equal(emx_session_create(model, &o, &s), EMX_ERR_INVALID);
  o = good, o.max_tokens = INT64_MAX;
  assert_int_equal(emx_session_create(model, &o, &s), EMX_ERR_INVALID);
  o = good, o.chunk = -1;
  assert_int_equal(emx_session_create(model, &o, &s), EMX_ERR_INVALID);
  o = good, o.max_sessions = 0;
  assert_int_equal(emx_session_create(model, &o, &s), EMX_ERR_INVALID);
  o = good, o.page_size = 0;
  assert_true(emx_session_create(model, &o, &s) < 0);
  o = good, o.page_size = 17;
  assert_true(emx_session_create(model, &o, &s) < 0);
  o = good, o.kv_dtype = EMX_F64;
  assert_true(emx_session_create(model, &o, &s) < 0);
  o = good, o.struct_size = 4;
  assert_int_equal(emx_session_create(model, &o, &s), EMX_ERR_INVALID);
  assert_int_equal(emx_session_create(NULL, &good, &s), EMX_ERR_INVALID);
  /* The whole pool is weighed before any of it is allocated. 2^30 tokens of this model: 256 GiB and summaries. */
  o = good, o.max_tokens = INT32_MAX / 2;
  o.kv_dtype = EMX_F32;
  if (emxi_physical_memory() < (size_t)256 << 30) {
    assert_int_equal(emx_session_create(model, &o, &s), EMX_ERR_NOMEM);
    assert_non_null(strstr(emx_last_error(), "bytes"));
  }
  assert_null(s);
  emx_session_destroy(NULL);
  assert_int_equal(emx_session_length(NULL), 0);
}

static void test_out_of_memory(void **state) {
  (void)state;
  emx_session_opts o;
  emx_session_opts_init(&o);
  o.max_tokens = N;
  o.max_sessions = 2;
  emx_session *s = NULL, *f = NULL;
  int n = 0;
  for (emx_status status = EMX_ERR_NOMEM; status; n++) {
    emxi_alloc_fail_after(n);
    status = emx_session_create(model, &o, &s);
    emxi_alloc_fail_after(-1);
    if (status && status != EMX_ERR_NOMEM) fail_msg("allocation %d: %s", n, emx_last_error());
  }
  assert_true(n > 5);
  float nll[N];
  n = 0;
  for (emx_status status = EMX_ERR_NOMEM; status; n++) {
    emxi_alloc_fail_after(n);
    status = emx_session_prefill(s, tokens, 50, nll, NULL, NULL, NULL);
    emxi_alloc_fail_after(-1);
    if (status) assert_true(status == EMX_ERR_NOMEM && emx_session_length(s) == 0);
  }
  assert_true(n > 1);
  n = 0;
  for (emx_status status = EMX_ERR_NOMEM; status; n++) {
    emxi_alloc_fail_after(n);
    status = emx_session_fork(s, &f);
    emxi_alloc_fail_after(-1);
    if (status) assert_int_equal(status, EMX_ERR_NOMEM);
  }
  assert_true(n > 1);
  /* Decoding allocates nothing. */
  emxi_alloc_fail_after(0);
  emx_status status = emx_session_decode(f, 1, nll);
  emxi_alloc_fail_after(-1);
  assert_int_equal(status, EMX_OK);
  emx_session_destroy(f);
  emx_session_destroy(s);
}

/* alpha = 1 is softmax, in the same session. */
static void test_softmax(void **state) {
  (void)state;
  static double entmax[N][V];
  memcpy(entmax, want_logits, sizeof entmax);
  config.entmax_alpha = 1;
  reference();
  assert_int_equal(save(), EMX_OK);
  emx_model *m;
  assert_int_equal(emx_model_open(ctx, folder, &m), EMX_OK);
  emx_session *s = session(m, EMX_F32, 64, N);
  float logits[V];
  prefill(s, 0, 80, NULL, logits);
  expect_near(logits, want_logits[79], TIGHT, "prefill", 79);
  decode(s, 80, logits);
  expect_near(logits, want_logits[80], TIGHT, "decode", 80);
  emx_session_destroy(s);
  emx_model_close(m);
  config.entmax_alpha = 1.5;
  memcpy(want_logits, entmax, sizeof entmax);
  assert_int_equal(save(), EMX_OK);
}

/* ---- what a tap sees */

typedef struct tapped {
  int64_t tokens[L]; /* seen, in order */
  double worst;      /* difference to the reference */
  emx_status answer;
} tapped;
static double largest(const float *got, const double *want, int64_t n, double worst) {
  for (int64_t i = 0; i < n; i++) worst = fmax(worst, fabs(got[i] - want[i]));
  return worst;
}
static emx_status look(void *user, const emxi_layer_view *view) {
  tapped *t = user;
  int64_t length;
  assert_int_equal(view->first, t->tokens[view->layer]);
  assert_int_equal(emx_seq_length(view->kv, view->seq, &length), EMX_OK); /* the cache has the tokens by then */
  assert_int_equal(length, view->first + view->m);
  assert_true(view->alibi_slopes[0] == 1 && view->alibi_slopes[1] == .5f && view->alibi_slopes[2] == 0);
  t->tokens[view->layer] += view->m;
  t->worst = largest(view->q, want_q[view->layer][view->first], view->m * H * D, t->worst);
  t->worst = largest(view->k, want_k[view->layer][view->first], view->m * G * D, t->worst);
  t->worst = largest(view->v, want_v[view->layer][view->first], view->m * G * D, t->worst);
  return t->answer;
}
static void test_tap(void **state) {
  (void)state;
  emx_session_opts o;
  emx_session_opts_init(&o);
  o.kv_dtype = EMX_F32;
  o.chunk = 30;
  o.max_tokens = 200;
  emx_session *s, *fork;
  float logits[V];
  tapped t = {{0}, 0, EMX_OK};
  assert_int_equal(emx_session_create(model, &o, &s), EMX_OK);
  emxi_session_tap(s, look, &t);
  assert_int_equal(emx_session_prefill(s, tokens, N - 2, NULL, NULL, NULL, NULL), EMX_OK);
  assert_int_equal(emx_session_decode(s, tokens[N - 2], logits), EMX_OK);
  assert_true(t.tokens[0] == N - 1 && t.tokens[1] == N - 1);
  assert_true(t.worst < TIGHT); /* on the way to the logits errors are no larger */
  /* a fork has no tap; a failing one undoes the call */
  assert_int_equal(emx_session_fork(s, &fork), EMX_OK);
  assert_int_equal(emx_session_decode(fork, tokens[N - 1], logits), EMX_OK);
  assert_int_equal(t.tokens[0], N - 1);
  t.answer = EMX_ERR_IO;
  assert_int_equal(emx_session_decode(s, tokens[N - 1], logits), EMX_ERR_IO);
  assert_int_equal(emx_session_length(s), N - 1);
  emxi_session_tap(s, NULL, NULL);
  assert_int_equal(emx_session_decode(s, tokens[N - 1], logits), EMX_OK);
  assert_int_equal(t.tokens[0], N);
  emx_session_destroy(fork);
  emx_session_destroy(s);
}

/* Every scale and position type: prefill in chunks and step by step, after a fork and after a truncation, against the reference,
 * and the same bits for any number of threads. */
/* What the heads attended to: dense float64 weights of the reference's queries and keys over the f32 cache. */
static void test_support(void **state) {
  (void)state;
  enum { C = N };
  static int32_t index[L * H * C], count[L * H];
  static float weight[L * H * C];
  emx_report reports[L * H];
  float logits[V], same[V];
  emx_session *s = session(model, EMX_F32, 64, N), *f;
  emx_session_support want = {
      .struct_size = sizeof want, .capacity = C, .index = index, .weight = weight, .count = count, .reports = reports};
  prefill(s, 0, 60, NULL, NULL);
  assert_int_equal(emx_session_set_support(s, &want), EMX_OK);
  assert_int_equal(emx_session_fork(s, &f), EMX_OK); /* which starts without */
  decode(s, 60, logits);
  for (int l = 0; l < L; l++)
    for (int h = 0; h < H; h++) {
      double score[N], p[N], sum = 0;
      int64_t support = 0, at = 0;
      float slopes[H];
      emxi_alibi_slopes(&config, slopes);
      for (int j = 0; j <= 60; j++) {
        score[j] = (double)slopes[h] * (j - 60);
        for (int d = 0; d < D; d++) score[j] += want_q[l][60][h * D + d] * want_k[l][j][h / (H / G) * D + d] / sqrt((double)D);
      }
      const double tau = emxi_oracle_entmax(score, 61, config.entmax_alpha, p, &support);
      const int row = l * H + h;
      assert_int_equal(count[row], reports[row].support);
      assert_true(fabs((double)reports[row].tau - tau) < 1e-4); /* f32 activations of two layers */
      for (int j = 0; j <= 60; j++) {
        const bool listed = at < count[row] && index[row * C + at] == j;
        const double w = listed ? (double)weight[row * C + at++] : 0;
        assert_true(fabs(w - p[j]) < 1e-4);
        sum += w;
      }
      assert_true(at == count[row] && fabs(sum - 1) < 1e-5);
    }
  count[0] = -5;
  decode(f, 60, same);
  assert_int_equal(count[0], -5);
  assert_memory_equal(logits, same, sizeof same);
  assert_int_equal(emx_session_set_support(s, NULL), EMX_OK);
  decode(s, 61, logits);
  assert_int_equal(count[0], -5);
  want.capacity = 0; /* sizes alone */
  want.index = NULL, want.weight = NULL, want.reports = NULL;
  assert_int_equal(emx_session_set_support(s, &want), EMX_OK);
  decode(s, 62, logits);
  assert_true(count[0] > 0);
  want.capacity = 1;
  assert_int_equal(emx_session_set_support(s, &want), EMX_ERR_INVALID);
  want.capacity = INT64_MAX / 2, want.index = index, want.weight = weight;
  assert_int_equal(emx_session_set_support(s, &want), EMX_ERR_INVALID);
  assert_int_equal(emx_session_set_support(NULL, &want), EMX_ERR_INVALID);
  emx_session_destroy(s);
  emx_session_destroy(f);
}

static void test_scales_and_positions(void **state) {
  (void)state;
  static double plain[N][V];
  static const struct {
    const char *name;
    int32_t position, scale, slopes, learned, alpha_learned;
  } cases[] = {
      {"nape, asentmax", .position = EMX_POSITION_NAPE, .scale = EMX_ATTN_SCALE_ASENTMAX},
      {"rope, asentmax", .position = EMX_POSITION_ROPE, .scale = EMX_ATTN_SCALE_ASENTMAX},
      {"nape, given, ssmax", .position = EMX_POSITION_NAPE, .scale = EMX_ATTN_SCALE_SSMAX, .slopes = EMX_SLOPE_GIVEN},
      {"alibi, learned focal", .position = EMX_POSITION_ALIBI, .scale = EMX_ATTN_SCALE_FOCAL, .learned = 1},
      {"nope, focal", .position = EMX_POSITION_NOPE, .scale = EMX_ATTN_SCALE_FOCAL},
      {"rope", .position = EMX_POSITION_ROPE},
      {"nape, learned alpha", .position = EMX_POSITION_NAPE, .alpha_learned = 1},
      {"rope, asentmax, learned alpha", .position = EMX_POSITION_ROPE, .scale = EMX_ATTN_SCALE_ASENTMAX, .alpha_learned = 1}};
  const emx_model_config before = config;
  memcpy(plain, want_logits, sizeof plain);
  emx_ctx *single = context(1);
  assert_non_null(single);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    config = before;
    config.position_type = cases[i].position;
    config.attn_scale_type = cases[i].scale;
    config.alibi_slope_type = cases[i].slopes;
    config.focal_learned = cases[i].learned;
    config.alpha_learned = cases[i].alpha_learned;
    config.alibi_slopes[0] = 0.3, config.alibi_slopes[1] = 0.07;
    config.rope_theta = 100;
    make_weights();
    reference();
    assert_int_equal(save(), EMX_OK);
    emx_model *m, *m1;
    assert_int_equal(emx_model_open(ctx, folder, &m), EMX_OK);
    assert_int_equal(emx_model_open(single, folder, &m1), EMX_OK);
    int n = 0;
    for (emx_status status = EMX_ERR_NOMEM; status; n++) { /* what a learned alpha allocates may fail, too */
      emx_session *none = NULL;
      emxi_alloc_fail_after(n);
      status = emx_session_create(m, NULL, &none);
      emxi_alloc_fail_after(-1);
      assert_true(!status || (status == EMX_ERR_NOMEM && !none));
      emx_session_destroy(none);
    }
    float logits[V], nll[N], row[2][V];
    emx_session *s = session(m, EMX_F32, 7, 2 * N), *one = session(m1, EMX_F32, 7, N), *f;
    prefill(s, 0, 40, nll, logits); /* chunks begin inside of a tile of rows and of a page */
    expect_near(logits, want_logits[39], TIGHT, cases[i].name, 39);
    assert_int_equal(emx_session_fork(s, &f), EMX_OK);
    for (int t = 40; t < N; t++) {
      decode(s, t, logits);
      expect_near(logits, want_logits[t], TIGHT, cases[i].name, t);
    }
    prefill(f, 40, 30, NULL, logits);
    expect_near(logits, want_logits[69], TIGHT, cases[i].name, 69);
    assert_int_equal(emx_session_truncate(f, 51), EMX_OK);
    decode(f, 51, logits);
    expect_near(logits, want_logits[51], TIGHT, cases[i].name, 51);
    emx_select_desc topk; /* pages are chosen by the query that theta has multiplied, thresholds by each head's alpha */
    emx_select_desc_init(&topk);
    topk.kind = EMX_SELECT_TOPK;
    topk.budget = 128; /* every page: the bits of ALL */
    assert_int_equal(emx_session_truncate(f, 51), EMX_OK);
    assert_int_equal(emx_session_set_select(f, &topk), EMX_OK);
    decode(f, 51, row[0]);
    assert_memory_equal(logits, row[0], sizeof logits);
    emx_session_stats st = {.struct_size = sizeof st};
    assert_int_equal(emx_session_get_stats(f, &st), EMX_OK);
    assert_true(st.certified == st.rows && st.delta_bound_max == 0);
    prefill(f, 52, 20, NULL, row[0]);
    prefill(one, 0, 40, NULL, NULL);
    prefill(one, 40, 30, NULL, NULL);
    assert_int_equal(emx_session_truncate(one, 51), EMX_OK);
    decode(one, 51, row[1]);
    assert_memory_equal(logits, row[1], sizeof logits);
    prefill(one, 52, 20, NULL, row[1]);
    assert_memory_equal(row[0], row[1], sizeof row[0]);
    emx_session_destroy(one);
    emx_session_destroy(f);
    emx_session_destroy(s);
    emx_model_close(m);
    emx_model_close(m1);
  }
  emx_ctx_destroy(single);
  config = before;
  make_weights();
  memcpy(want_logits, plain, sizeof plain);
  assert_int_equal(save(), EMX_OK);
}

/* beta -> 0: ASEntmax is entmax, bit for bit, whatever gamma is. */
static void test_no_beta(void **state) {
  (void)state;
  const emx_model_config before = config;
  float logits[2][V], nll[2][N];
  config.attn_scale_type = EMX_ATTN_SCALE_ASENTMAX;
  float *plain = weights;
  const int64_t count = emx_model_config_parameters(&config);
  weights = malloc((size_t)count * sizeof *weights);
  assert_non_null(weights);
  emxi_normals(7, 0, weights, count);
  for (int64_t i = 0, k = 0; i < emxi_param_tensors(&config); i++) { /* the tensors of the other model, and theta's */
    emxi_param p, q;
    emxi_param_at(&config, i, &p);
    if (p.start == EMXI_START_SCALAR) {
      for (int64_t j = 0; j < p.count; j++)
        if (strstr(p.name, "beta_proj")) weights[p.offset + j] = strstr(p.name, "bias") ? -60 : 0;
      continue;
    }
    emxi_param_at(&before, k++, &q);
    memcpy(weights + p.offset, plain + q.offset, (size_t)p.count * sizeof(float));
  }
  for (int i = 0; i < 2; i++) {
    emx_model *m = model;
    if (i) {
      assert_int_equal(save(), EMX_OK);
      assert_int_equal(emx_model_open(ctx, folder, &m), EMX_OK);
    }
    emx_session *s = session(m, EMX_F32, 30, N);
    prefill(s, 0, N - 1, nll[i], NULL);
    decode(s, N - 1, logits[i]);
    emx_session_destroy(s);
    if (i) emx_model_close(m);
  }
  assert_memory_equal(logits[0], logits[1], sizeof logits[0]);
  assert_memory_equal(nll[0] + 1, nll[1] + 1, (N - 2) * sizeof(float));
  free(weights);
  weights = plain;
  config = before;
  assert_int_equal(save(), EMX_OK);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_against_reference),
      cmocka_unit_test(test_decode_is_prefill),
      cmocka_unit_test(test_fork),
      cmocka_unit_test(test_truncate),
      cmocka_unit_test(test_threads),
      cmocka_unit_test(test_select),
      cmocka_unit_test(test_stats),
      cmocka_unit_test(test_undo),
      cmocka_unit_test(test_pool_is_shared),
      cmocka_unit_test(test_bad_options),
      cmocka_unit_test(test_out_of_memory),
      cmocka_unit_test(test_tap),
      cmocka_unit_test(test_support),
      cmocka_unit_test(test_softmax),
      cmocka_unit_test(test_no_beta),
      cmocka_unit_test(test_scales_and_positions),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
