/* The trainer against a float64 forward pass written here, its finite differences, and itself across resumes and threads. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/num.h"
#include "entmax/entmax.h"
#include "model/scale.h"
#include "train/train.h"
#include "two_contexts.h"

/* A temporary folder, and its removal with everything in it. */
static void folder_create(char path[64]) {
  snprintf(path, 64, "/tmp/emx_train_XXXXXX");
  assert_non_null(mkdtemp(path));
}
static void folder_remove(const char *path) {
  DIR *dir = opendir(path);
  if (!dir) return;
  for (struct dirent *e; (e = readdir(dir));) {
    char name[512];
    snprintf(name, sizeof name, "%s/%s", path, e->d_name);
    unlink(name);
  }
  closedir(dir);
  rmdir(path);
}

static emx_model_config tiny(double alpha) {
  emx_model_config c;
  emx_model_config_init(&c);
  c.vocab_size = 23;
  c.hidden_size = 24;
  c.intermediate_size = 40;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 16;
  c.alibi_num_heads = 2;
  c.entmax_alpha = alpha;
  return c;
}
static emx_train_opts short_run(void) {
  emx_train_opts o;
  emx_train_opts_init(&o);
  o.steps = 6;
  o.warmup = 2;
  o.length = 12;
  o.batch = 4;
  o.long_length = 30;
  o.long_every = 2;
  o.lr = 1e-2;
  o.min_lr = 1e-3;
  return o;
}
enum { FILES = 3 };
static uint8_t bytes[FILES][200];
static const uint8_t *files[FILES];
static const int64_t sizes[FILES] = {200, 37, 150};
static const emx_train_data corpus = {sizeof corpus, 0, FILES, files, sizes, NULL};
static void fill_files(void) {
  for (int f = 0; f < FILES; f++) {
    files[f] = bytes[f];
    for (int i = 0; i < 200; i++) bytes[f][i] = (uint8_t)((i * i / 3 + 5 * f + i) % 23);
  }
}
static emx_trainer *create(emx_ctx *ctx, const emx_model_config *c, const emx_train_opts *o) {
  emx_trainer *t;
  fill_files();
  if (emx_trainer_create(ctx, c, o, &corpus, &t)) fail_msg("%s", emx_last_error());
  return t;
}
static emx_train_stats must_step(emx_trainer *t) {
  emx_train_stats s = {.struct_size = sizeof s};
  if (emx_trainer_step(t, &s)) fail_msg("%s", emx_last_error());
  return s;
}

/* ---- the whole network in float64, from the definition */

enum { MAX_T = 16, MAX_W = 128 };
static void norm64(const double *x, const double *w, int64_t d, double eps, double *y) {
  double sum = 0;
  for (int64_t i = 0; i < d; i++) sum += x[i] * x[i];
  for (int64_t i = 0; i < d; i++) y[i] = x[i] / sqrt(sum / (double)d + eps) * w[i];
}
static void product64(const double *w, const double *x, int64_t out, int64_t in, double *y, bool add) {
  for (int64_t o = 0; o < out; o++) {
    double sum = add ? y[o] : 0;
    for (int64_t i = 0; i < in; i++) sum += w[o * in + i] * x[i];
    y[o] = sum;
  }
}
/* Place of a parameter in the flat array, by its name with or without ".weight". The list is that of the last configuration. */
static const double *named(const emx_model_config *c, const double *w, int layer, const char *name) {
  static emx_model_config listed;
  static emxi_param list[40];
  static int64_t n;
  char full[96];
  if (memcmp(&listed, c, sizeof listed)) {
    listed = *c;
    n = emxi_param_tensors(c);
    assert_true(n <= 40);
    for (int64_t i = 0; i < n; i++) emxi_param_at(c, i, &list[i]);
  }
  if (layer < 0)
    snprintf(full, sizeof full, "%s", name);
  else
    snprintf(full, sizeof full, "model.layers.%d.%s", layer, name);
  const size_t length = strlen(full);
  for (int64_t i = 0; i < n; i++)
    if (!strncmp(list[i].name, full, length) && (!list[i].name[length] || !strcmp(list[i].name + length, ".weight")))
      return w + list[i].offset;
  fail_msg("no parameter %s", full);
  return NULL;
}
/* theta of head a for the query at position t whose normed state is h, from its definition. */
static double theta64(const emx_model_config *c, const double *w, int l, int64_t a, const double *h, int64_t t) {
  const int64_t W = c->hidden_size, first = c->position_type == EMX_POSITION_NAPE ? c->alibi_num_heads : 0, e = a - first;
  const double n = log((double)t + 2);
  if (e < 0) return 1;
  switch (c->attn_scale_type) {
    case EMX_ATTN_SCALE_ASENTMAX: {
      double b = named(c, w, l, "self_attn.beta_proj.bias")[e], g = named(c, w, l, "self_attn.gamma_proj.bias")[e];
      const double *wb = named(c, w, l, "self_attn.beta_proj.weight") + e * W,
                   *wg = named(c, w, l, "self_attn.gamma_proj.weight") + e * W;
      for (int64_t i = 0; i < W; i++) {
        b += wb[i] * h[i];
        g += wg[i] * h[i];
      }
      return 1 + log(1 + exp(b)) * pow(n, 2 * tanh(g));
    }
    case EMX_ATTN_SCALE_SSMAX: return named(c, w, l, "self_attn.ssmax_scale")[e] * n;
    case EMX_ATTN_SCALE_FOCAL:
      return 1 / (c->focal_learned ? exp(named(c, w, l, "self_attn.focal_log_temperature")[e]) : c->focal_temperature);
    default: return 1;
  }
}
static double slope64(const emx_model_config *c, int64_t a) {
  const int64_t heads = c->position_type == EMX_POSITION_NAPE    ? c->alibi_num_heads
                        : c->position_type == EMX_POSITION_ALIBI ? 99
                                                                 : 0;
  return a >= heads                               ? 0
         : c->alibi_slope_type == EMX_SLOPE_GIVEN ? c->alibi_slopes[a]
         : c->alibi_slope_type == EMX_SLOPE_EXP   ? pow(2, -(double)a)
                                                  : 1.0 / (double)(a + 1);
}
/* Rotary positions as complex numbers: pair (d, d + D/2) times e^(i t base^(-2d/D)). */
static void rope64(const emx_model_config *c, double *x, int64_t heads, int64_t t) {
  const int64_t D = c->head_dim;
  if (c->position_type != EMX_POSITION_ROPE) return;
  for (int64_t a = 0; a < heads; a++)
    for (int64_t d = 0; d < D / 2; d++) {
      const double angle = (double)t / pow(c->rope_theta, 2 * (double)d / (double)D), re = x[a * D + d],
                   im = x[a * D + d + D / 2];
      x[a * D + d] = re * cos(angle) - im * sin(angle);
      x[a * D + d + D / 2] = re * sin(angle) + im * cos(angle);
    }
}

/* Sum of the losses of one sequence; nll: optional [n]; factors: optional [n,W] on the outputs of the embedding,
 * heads: optional [L,H] on those of the heads. */
static double forward64(const emx_model_config *c, const double *w, const int32_t *tokens, const int32_t *targets, int64_t n,
                        const double *factors, const double *heads, double *nll) {
  static double x[MAX_T][MAX_W], h[MAX_W], q[MAX_T][MAX_W], k[MAX_T][MAX_W], v[MAX_T][MAX_W], gate[MAX_W], up[MAX_W];
  const int64_t W = c->hidden_size, F = c->intermediate_size, D = c->head_dim, H = c->num_heads, G = c->num_kv_heads;
  const double *embed = named(c, w, -1, "model.embed_tokens");
  const double *head = c->tie_word_embeddings ? embed : named(c, w, -1, "lm_head");
  for (int64_t t = 0; t < n; t++)
    for (int64_t i = 0; i < W; i++) x[t][i] = embed[tokens[t] * W + i] * (factors ? factors[t * W + i] : 1);
  for (int l = 0; l < c->num_layers; l++) {
    for (int64_t t = 0; t < n; t++) {
      norm64(x[t], named(c, w, l, "input_layernorm"), W, c->rms_norm_eps, h);
      product64(named(c, w, l, "self_attn.q_proj"), h, H * D, W, q[t], false);
      product64(named(c, w, l, "self_attn.k_proj"), h, G * D, W, k[t], false);
      product64(named(c, w, l, "self_attn.v_proj"), h, G * D, W, v[t], false);
      rope64(c, q[t], H, t);
      rope64(c, k[t], G, t);
      for (int64_t a = 0; a < H; a++)
        for (int64_t i = 0; i < D; i++) q[t][a * D + i] *= theta64(c, w, l, a, h, t);
    }
    for (int64_t t = 0; t < n; t++) {
      double o[MAX_W] = {0}, s[MAX_T], p[MAX_T];
      for (int64_t a = 0; a < H; a++) {
        const int64_t kv = a / (H / G);
        const double slope = slope64(c, a);
        for (int64_t j = 0; j <= t; j++) {
          s[j] = -slope * (double)(t - j);
          for (int64_t i = 0; i < D; i++) s[j] += q[t][a * D + i] * k[j][kv * D + i] / sqrt((double)D);
        }
        int64_t support;
        const double alpha =
            c->alpha_learned ? 1 + 1 / (1 + exp(-named(c, w, l, "self_attn.entmax_alpha_logit")[a])) : c->entmax_alpha;
        emxi_oracle_entmax(s, t + 1, alpha, p, &support);
        for (int64_t j = 0; j <= t; j++)
          for (int64_t i = 0; i < D; i++) o[a * D + i] += p[j] * v[j][kv * D + i] * (heads ? heads[l * H + a] : 1);
      }
      product64(named(c, w, l, "self_attn.o_proj"), o, W, H * D, x[t], true);
      norm64(x[t], named(c, w, l, "post_attention_layernorm"), W, c->rms_norm_eps, h);
      product64(named(c, w, l, "mlp.gate_proj"), h, F, W, gate, false);
      product64(named(c, w, l, "mlp.up_proj"), h, F, W, up, false);
      for (int64_t i = 0; i < F; i++) gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
      product64(named(c, w, l, "mlp.down_proj"), gate, W, F, x[t], true);
    }
  }
  double total = 0;
  for (int64_t t = 0; t < n; t++) {
    double sum = 0, target = 0;
    norm64(x[t], named(c, w, -1, "model.norm"), W, c->rms_norm_eps, h);
    for (int32_t o = 0; o < c->vocab_size; o++) {
      double z = 0;
      for (int64_t i = 0; i < W; i++) z += head[o * W + i] * h[i];
      sum += exp(z);
      if (o == targets[t]) target = z;
    }
    total += log(sum) - target;
    if (nll) nll[t] = log(sum) - target;
  }
  return total;
}

/* Losses and gradients of the f32 passes against float64: relative to the largest gradient of the tensor, a few hundred roundings
 * of 6e-8 through two layers stay below 2e-4; a wrong term shows at 1e-1. Central differences with h = 1e-5 are good to ~1e-9. */
static void check_gradient(const emx_model_config *config, double dropout, const char *what) {
  const emx_model_config c = *config;
  emx_train_opts o = short_run();
  o.long_length = o.long_every = 0;
  o.batch = 2;
  o.embed_dropout = o.head_dropout = dropout;
  emx_trainer *t = create(two, &c, &o);
  const int64_t n = o.batch * o.length, count = t->net.w.count;
  double *w = emxi_alloc((size_t)count * sizeof *w), nll[32], loss, sum = 0;
  emxi_normals(5, 0, t->net.w.data, count); /* away from the small weights of the start, where everything is linear */
  for (int64_t i = 0; i < count; i++) w[i] = t->net.w.data[i] *= 0.4f;
  for (int64_t i = 0; i < n; i++) {
    t->net.tokens[i] = (int32_t)((i * 7 + i * i) % 23);
    t->net.targets[i] = (int32_t)((i * 5 + 3) % 23);
  }
  t->net.dropout = (emxi_dropout){dropout, dropout, 3, 4};
  assert_int_equal(emxi_net_forward(&t->net, o.batch, o.length, true, &loss), EMX_OK);
  /* What was dropped, as the first layer saw it: zero, or the rest scaled up. 5 standard deviations of 576 draws. */
  static double factors[32 * MAX_W];
  const int64_t width = c.hidden_size;
  int64_t zeros = 0;
  for (int64_t i = 0; i < n * width; i++) {
    factors[i] = t->net.layers[0].x[i] / w[t->net.tokens[i / width] * width + i % width];
    zeros += factors[i] == 0;
    assert_true(factors[i] == 0 || fabs(factors[i] * (1 - dropout) - 1) < 1e-4);
  }
  double head_factors[2][2 * 4];
  int out = 0;
  for (int64_t b = 0; b < 2; b++)
    for (int64_t i = 0; i < 2 * c.num_heads; i++) {
      const float *first = t->net.layers[i / c.num_heads].o + (b * o.length * c.num_heads + i % c.num_heads) * c.head_dim;
      const bool slope = t->net.slopes[i % c.num_heads] != 0, zero = first[0] == 0;
      head_factors[b][i] = slope ? 1 : zero ? 0 : 1 / (1 - dropout);
      assert_false(slope && zero);
      out += zero;
    }
  assert_true(dropout > 0 ? out > 0 && out < 8 : !out); /* of 8 heads without a slope; the step above drops some */
  assert_true(fabs((double)zeros - dropout * (double)(n * width)) <= 5 * sqrt(dropout * (double)(n * width)));
  for (int b = 0; b < 2; b++)
    sum += forward64(&c, w, t->net.tokens + b * o.length, t->net.targets + b * o.length, o.length, factors + b * o.length * width,
                     head_factors[b], nll + b * o.length);
  for (int64_t i = 0; i < n; i++)
    if (!(fabs(nll[i] - t->net.nll[i]) < 1e-4))
      fail_msg("%s, alpha %g: nll[%d] %g, float64 %g", what, c.entmax_alpha, (int)i, t->net.nll[i], nll[i]);
  assert_true(fabs(loss - sum / (double)n) < 2e-5);
  assert_int_equal(emxi_net_backward(&t->net, o.batch, o.length), EMX_OK);
  for (int64_t p = 0; p < emxi_param_tensors(&c); p++) {
    emxi_param info;
    emxi_param_at(&c, p, &info);
    const float *g = t->net.g.data + info.offset;
    double top = 0;
    for (int64_t i = 0; i < info.count; i++) top = fmax(top, fabs((double)g[i]));
    assert_true(top > 1e-4);
    for (int s = 0; s < 4; s++) {
      uint32_t word[4];
      emxi_philox(9, (uint64_t)p, (uint64_t)s, word);
      double *at = &w[info.offset + word[0] % info.count];
      const double keep = *at, h = 1e-5;
      double difference = 0;
      for (int side = -1; side <= 1; side += 2) {
        *at = keep + side * h;
        for (int b = 0; b < 2; b++)
          difference += side * forward64(&c, w, t->net.tokens + b * o.length, t->net.targets + b * o.length, o.length,
                                         factors + b * o.length * width, head_factors[b], NULL);
      }
      *at = keep;
      difference /= 2 * h * (double)n;
      const double got = t->net.g.data[at - w];
      if (!(fabs(got - difference) <= 2e-4 * top))
        fail_msg("%s, alpha %g %s[%d]: %g, differences %g, largest %g", what, c.entmax_alpha, info.name,
                 (int)(at - w - info.offset), got, difference, top);
    }
  }
  emxi_free(w);
  emx_trainer_destroy(t);
}
static void test_gradient(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.5, 2, 1.25};
  for (int a = 0; a < 4; a++)
    for (int tied = 0; tied < 2; tied++) {
      emx_model_config c = tiny(alphas[a]);
      c.tie_word_embeddings = tied;
      check_gradient(&c, 0, "plain");
      check_gradient(&c, 0.25, "dropout");
    }
}
/* The same for every scale and position type. */
static void test_gradient_scales(void **state) {
  (void)state;
  static const struct {
    const char *name;
    int32_t position, scale, slopes, learned;
    double alpha;
    int32_t alpha_learned;
  } cases[] = {{"nape, asentmax", .position = EMX_POSITION_NAPE, .scale = EMX_ATTN_SCALE_ASENTMAX, .alpha = 1.5},
               {"rope, asentmax", .position = EMX_POSITION_ROPE, .scale = EMX_ATTN_SCALE_ASENTMAX, .alpha = 1.25},
               {"nope, ssmax", .position = EMX_POSITION_NOPE, .scale = EMX_ATTN_SCALE_SSMAX, .alpha = 1},
               {"nape, given, ssmax", .position = EMX_POSITION_NAPE, .scale = EMX_ATTN_SCALE_SSMAX, .slopes = EMX_SLOPE_GIVEN,
                .alpha = 1.5},
               {"alibi, exp, learned focal", .position = EMX_POSITION_ALIBI, .scale = EMX_ATTN_SCALE_FOCAL,
                .slopes = EMX_SLOPE_EXP, .learned = 1, .alpha = 1.5},
               {"rope, focal", .position = EMX_POSITION_ROPE, .scale = EMX_ATTN_SCALE_FOCAL, .alpha = 1.5},
               {"rope", .position = EMX_POSITION_ROPE, .alpha = 1.5},
               {"nape, learned alpha", .position = EMX_POSITION_NAPE, .alpha = 1.5, .alpha_learned = 1},
               {"rope, asentmax, learned alpha", .position = EMX_POSITION_ROPE, .scale = EMX_ATTN_SCALE_ASENTMAX, .alpha = 1.5,
                .alpha_learned = 1}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    emx_model_config c = tiny(cases[i].alpha);
    c.position_type = cases[i].position;
    c.attn_scale_type = cases[i].scale;
    c.alibi_slope_type = cases[i].slopes;
    c.focal_learned = cases[i].learned;
    c.alpha_learned = cases[i].alpha_learned;
    c.alibi_slopes[0] = 0.7, c.alibi_slopes[1] = 0.05;
    c.rope_theta = 50;
    check_gradient(&c, 0, cases[i].name);
  }
}

static void test_evaluate(void **state) {
  (void)state;
  emx_model_config c = tiny(1.5);
  emx_train_opts o = short_run();
  emx_trainer *t = create(two, &c, &o);
  const int64_t windows = 6, count = t->net.w.count; /* a whole batch of 4 and 2 more; 5 bytes are left over */
  double *w = emxi_alloc((size_t)count * sizeof *w), want = 0, got = -1;
  for (int64_t i = 0; i < count; i++) w[i] = t->net.w.data[i] *= 10;
  for (int64_t i = 0; i < windows; i++) {
    int32_t tokens[12], targets[12];
    for (int j = 0; j < 12; j++) {
      tokens[j] = bytes[0][i * 12 + j];
      targets[j] = bytes[0][i * 12 + j + 1];
    }
    want += forward64(&c, w, tokens, targets, 12, NULL, NULL, NULL);
  }
  assert_int_equal(emx_trainer_evaluate(t, bytes[0], windows * 12 + 6, &got), EMX_OK);
  assert_true(fabs(got - want / (double)(windows * 12)) < 1e-5);
  assert_int_equal(emx_trainer_evaluate(t, bytes[0], 12, &got), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "13"));
  const uint8_t foreign[13] = {0, 1, 2, 200};
  assert_int_equal(emx_trainer_evaluate(t, foreign, 13, &got), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "offset 3"));
  emxi_free(w);
  emx_trainer_destroy(t);
}

/* ---- pieces */

static void test_data(void **state) {
  (void)state;
  uint8_t a[5] = {0, 1, 2, 3, 4}, b[3] = {10, 11, 12}, d[9] = {20, 21, 22, 23, 24, 25, 26, 27, 28};
  const uint8_t *const list[4] = {a, b, NULL, d};
  const int64_t list_sizes[4] = {5, 3, 0, 9};
  emxi_data data, other;
  assert_int_equal(emxi_data_create(list, list_sizes, 4, 256, &data), EMX_OK);
  assert_int_equal(emxi_data_windows(&data, 4), 6); /* 1 in a, none in b, 5 in d */
  assert_int_equal(emxi_data_windows(&data, 9), 0);
  int counts[29] = {0};
  for (int t = 0; t < 600; t++)
    for (int i = 0; i < 10; i++) {
      const uint8_t *p = emxi_data_draw(&data, 4, 3, t, i);
      assert_true(p == a || (p >= d && p + 5 <= d + 9));
      assert_ptr_equal(p, emxi_data_draw(&data, 4, 3, t, i));
      counts[*p]++;
    }
  for (int i = 0; i < 5; i++) assert_in_range(counts[20 + i], 850, 1150); /* 1000 +- 5 standard deviations of 29 */
  assert_in_range(counts[0], 850, 1150);
  const uint64_t hash = data.hash;
  d[8]++;
  assert_int_equal(emxi_data_create(list, list_sizes, 4, 256, &other), EMX_OK);
  assert_true(other.hash != hash);
  d[8]--;
  emxi_data_destroy(&other);
  const int64_t shifted[4] = {4, 4, 0, 9}; /* the same bytes cut elsewhere are other data */
  uint8_t b4[4] = {4, 10, 11, 12};
  const uint8_t *const moved[4] = {a, b4, NULL, d};
  assert_int_equal(emxi_data_create(moved, shifted, 4, 256, &other), EMX_OK);
  assert_true(other.hash != hash);
  emxi_data_destroy(&other);
  emxi_data_destroy(&data);
  assert_int_equal(emxi_data_create(list, list_sizes, 4, 25, &data), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "byte 25 at offset 5 of file 3"));
  const int64_t negative[4] = {5, -3, 0, 9};
  assert_int_equal(emxi_data_create(list, negative, 4, 256, &data), EMX_ERR_INVALID);
}

static void test_learning_rate(void **state) {
  (void)state;
  emx_train_opts o = short_run();
  o.steps = 110;
  o.warmup = 10;
  assert_true(fabs(emxi_learning_rate(&o, 0) - 1e-3) < 1e-15);
  assert_true(fabs(emxi_learning_rate(&o, 9) - 1e-2) < 1e-15);
  assert_true(fabs(emxi_learning_rate(&o, 10) - 1e-2) < 1e-15);
  assert_true(fabs(emxi_learning_rate(&o, 60) - 5.5e-3) < 1e-12); /* half way */
  assert_true(fabs(emxi_learning_rate(&o, 110) - 1e-3) < 1e-12);
  for (int i = 10; i < 109; i++) assert_true(emxi_learning_rate(&o, i + 1) < emxi_learning_rate(&o, i));
}

/* Four steps of AdamW against float64; 1e-5 covers f32 moments. Norms, biases and alphas do not decay. */
static void test_adamw(void **state) {
  (void)state;
  emx_model_config c = tiny(1.5);
  c.attn_scale_type = EMX_ATTN_SCALE_ASENTMAX;
  c.alpha_learned = 1;
  emx_train_opts o = short_run();
  o.weight_decay = 0.3;
  emx_trainer *t = create(two, &c, &o);
  const int64_t n = t->net.w.count;
  double *w = emxi_calloc((size_t)n * 8), *m = emxi_calloc((size_t)n * 8), *v = emxi_calloc((size_t)n * 8);
  for (int64_t i = 0; i < n; i++) w[i] = t->net.w.data[i];
  for (int step = 1; step <= 4; step++) {
    double norm, squares = 0;
    const double lr = 0.01 * step, scale = 0.5 + step;
    emxi_normals(1, (uint64_t)step, t->net.g.data, n);
    for (int64_t i = 0; i < n; i++) squares += (double)t->net.g.data[i] * t->net.g.data[i];
    assert_int_equal(emxi_adamw_norm(two, &t->adamw, t->net.g.data, &norm), EMX_OK);
    assert_true(fabs(norm - sqrt(squares)) < 1e-9 * norm);
    emxi_adamw_update(two, &t->adamw, &o, lr, step, scale, t->net.g.data, t->net.w.data);
    for (int64_t p = 0; p < emxi_param_tensors(&c); p++) {
      emxi_param info;
      emxi_param_at(&c, p, &info);
      for (int64_t i = info.offset; i < info.offset + info.count; i++) {
        const double g = scale * t->net.g.data[i];
        m[i] = o.beta1 * m[i] + (1 - o.beta1) * g;
        v[i] = o.beta2 * v[i] + (1 - o.beta2) * g * g;
        if (info.ndim == 2) w[i] *= 1 - lr * o.weight_decay;
        w[i] -= lr * m[i] / (1 - pow(o.beta1, step)) / (sqrt(v[i] / (1 - pow(o.beta2, step))) + o.eps);
        assert_true(fabs(w[i] - t->net.w.data[i]) < 1e-5);
      }
    }
  }
  emxi_free(w);
  emxi_free(m);
  emxi_free(v);
  emx_trainer_destroy(t);
}

static void test_initial_weights(void **state) {
  (void)state;
  emx_model_config c;
  emx_train_opts o = short_run();
  emx_model_config_init(&c);
  emx_trainer *t = create(two, &c, &o);
  for (int64_t p = 0; p < emxi_param_tensors(&c); p++) {
    emxi_param info;
    emxi_param_at(&c, p, &info);
    double squares = 0;
    for (int64_t i = 0; i < info.count; i++) squares += pow(t->net.w.data[info.offset + i], 2);
    const double got = sqrt(squares / (double)info.count);
    const bool residual = strstr(info.name, "o_proj") || strstr(info.name, "down_proj");
    const double want = info.ndim == 1 ? 1 : residual ? 0.02 / sqrt(8) : 0.02;
    assert_true(fabs(got / want - 1) < 0.03); /* >= 18,432 normals: 5 standard deviations of 0.5 % */
  }
  /* Every scale: the shared tensors start with the same bits, theta at 1.05, at 1 at the last position, at the temperature's
   * inverse. */
  static const int32_t scales[] = {EMX_ATTN_SCALE_ASENTMAX, EMX_ATTN_SCALE_SSMAX, EMX_ATTN_SCALE_FOCAL};
  for (int i = 0; i < 3; i++) {
    emx_model_config other = c;
    other.attn_scale_type = scales[i];
    other.focal_learned = other.alpha_learned = 1;
    other.entmax_alpha = 1.25;
    emx_trainer *u = create(two, &other, &o);
    int64_t p = 0, scalars = 0;
    for (int64_t q = 0; q < emxi_param_tensors(&other); q++) {
      emxi_param info, plain;
      emxi_param_at(&other, q, &info);
      if (info.start == EMXI_START_SCALAR) {
        scalars++;
        for (int64_t j = 1; j < info.count; j++) assert_true(u->net.w.data[info.offset + j] == u->net.w.data[info.offset]);
        continue;
      }
      emxi_param_at(&c, p++, &plain);
      assert_string_equal(info.name, plain.name);
      assert_memory_equal(u->net.w.data + info.offset, t->net.w.data + plain.offset, (size_t)info.count * sizeof(float));
    }
    assert_int_equal(scalars, c.num_layers * (i == 0 ? 5 : 2));
    const emxi_layer *l = &u->net.w.layers[3];
    double slope[2], alphas[6];
    const double theta = emxi_theta(scales[i], l->theta_b[2], l->theta_c ? l->theta_c[2] : 0, c.max_position - 1, slope);
    assert_true(fabs(theta - (i == 0 ? 1.05 : i == 1 ? 1 : 2.5)) < 1e-6);
    for (int64_t j = 0; i == 0 && j < 3 * c.hidden_size; j++) assert_true(l->theta_w[j] == 0 && l->theta_v[j] == 0);
    emxi_learned_alphas(&other, l, alphas, NULL);
    for (int h = 0; h < 6; h++) assert_true(fabs(alphas[h] - 1.25) < 1e-7);
    emx_trainer_destroy(u);
  }
  emx_trainer_destroy(t);
}

/* ---- whole runs */

/* A pattern of period 8. A uniform guess costs 5.5 nats, the last byte alone leaves 0.52 (three bytes follow an "a"), so a lower
 * loss takes attention. */
static void test_learns(void **state) {
  (void)state;
  static uint8_t text[4096];
  for (size_t i = 0; i < sizeof text; i++) text[i] = (uint8_t) "abacabad"[i % 8];
  const uint8_t *const list[1] = {text};
  const int64_t list_sizes[1] = {sizeof text};
  for (int a = 0; a < 2; a++) {
    emx_model_config c;
    emx_train_opts o;
    emx_model_config_init(&c);
    c.hidden_size = 32;
    c.intermediate_size = 64;
    c.num_layers = 2;
    c.num_heads = 2;
    c.num_kv_heads = 1;
    c.head_dim = 16;
    c.alibi_num_heads = 1;
    c.entmax_alpha = a ? 1.5 : 1;
    emx_train_opts_init(&o);
    o.steps = 120;
    c.tie_word_embeddings = 0;
    o.warmup = 10;
    o.length = 32;
    o.batch = 8;
    o.lr = 5e-3;
    o.min_lr = 5e-4;
    emx_trainer *t;
    assert_int_equal(emx_trainer_create(two, &c, &o, &(emx_train_data){sizeof(emx_train_data), 0, 1, list, list_sizes, NULL}, &t),
                     EMX_OK);
    double before, after;
    assert_int_equal(emx_trainer_evaluate(t, text, sizeof text, &before), EMX_OK);
    assert_true(before > 5);
    for (int i = 0; i < o.steps; i++) {
      emx_train_stats s = must_step(t);
      assert_int_equal(s.step, i + 1);
      assert_int_equal(s.tokens, 256);
    }
    assert_int_equal(emx_trainer_evaluate(t, text, sizeof text, &after), EMX_OK);
    print_message("alpha %g: %.3f -> %.4f nats a byte\n", c.entmax_alpha, before, after);
    assert_true(after < 0.35);
    emx_train_stats s = {.struct_size = sizeof s};
    assert_int_equal(emx_trainer_step(t, &s), EMX_ERR_STATE);
    emx_trainer_destroy(t);
  }
}

static void expect_same(const emx_trainer *a, const emx_trainer *b) {
  const size_t size = (size_t)a->net.w.count * sizeof(float);
  assert_int_equal(a->step, b->step);
  assert_memory_equal(a->net.w.data, b->net.w.data, size);
  assert_memory_equal(a->adamw.m, b->adamw.m, size);
  assert_memory_equal(a->adamw.v, b->adamw.v, size);
}

static void test_resume(void **state) {
  (void)state;
  char folder[64];
  folder_create(folder);
  static const int32_t positions[] = {EMX_POSITION_NOPE /* fields that config.json does not keep */, EMX_POSITION_NAPE,
                                      EMX_POSITION_NAPE, EMX_POSITION_ROPE, EMX_POSITION_ALIBI},
                       scales[] = {EMX_ATTN_SCALE_NONE, EMX_ATTN_SCALE_NONE, EMX_ATTN_SCALE_ASENTMAX, EMX_ATTN_SCALE_FOCAL,
                                   EMX_ATTN_SCALE_SSMAX};
  for (int v = 0; v < 5; v++) {
    emx_model_config c = tiny(1.5);
    const bool dtype = v > 0;
    c.position_type = positions[v];
    c.attn_scale_type = scales[v];
    c.focal_learned = 1;
    c.alpha_learned = v == 2;
    c.rope_theta = 123;
    if (v == 4) {
      c.alibi_slope_type = EMX_SLOPE_GIVEN;
      for (int a = 0; a < 4; a++) c.alibi_slopes[a] = 0.3 * a;
    }
    emx_train_opts o = short_run();
    o.save_dtype = dtype ? EMX_F32 : EMX_BF16;
    emx_trainer *whole = create(one, &c, &o), *first = create(two, &c, &o), *second;
    emx_train_stats want[6], got;
    for (int i = 0; i < 6; i++) want[i] = must_step(whole);
    assert_int_equal(want[1].tokens, 30); /* every second step: one sequence of 30 in the place of four of 12 */
    for (int i = 0; i < 3; i++) must_step(first);
    assert_int_equal(emx_trainer_save(first, folder), EMX_OK);
    must_step(first);
    assert_int_equal(emx_trainer_resume(one, folder, &o, &corpus, &second), EMX_OK);
    for (int i = 3; i < 6; i++) {
      got = must_step(second);
      assert_memory_equal(&got, &want[i], sizeof got);
    }
    expect_same(whole, second);
    emx_trainer_destroy(second);
    for (int i = 4; i < 6; i++) must_step(first); /* a save changes nothing; two workers give the bits of one */
    expect_same(whole, first);

    /* what was saved is a model folder: its weights are the trainer's, rounded */
    assert_int_equal(emx_trainer_save(whole, folder), EMX_OK);
    char path[128];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    emx_checkpoint *ck;
    assert_int_equal(emx_checkpoint_open(path, &ck), EMX_OK);
    float *w = emxi_alloc((size_t)whole->net.w.count * sizeof *w);
    assert_int_equal(emxi_weights_load(ck, &whole->config, w), EMX_OK);
    for (int64_t i = 0; i < whole->net.w.count; i++)
      assert_true(w[i] == (dtype ? whole->net.w.data[i] : emxi_bf16_to_f32(emxi_f32_to_bf16(whole->net.w.data[i]))));
    assert_string_equal(emx_checkpoint_metadata(ck, "step"), "6");
    emxi_free(w);
    emx_checkpoint_close(ck);
    emx_trainer_destroy(whole);
    emx_trainer_destroy(first);
  }
  folder_remove(folder);
}

static void expect_resume_error(const char *folder, const emx_train_opts *o, emx_status status, const char *word) {
  emx_trainer *t = NULL;
  emx_status got = emx_trainer_resume(one, folder, o, &corpus, &t);
  if (got != status || t || !strstr(emx_last_error(), word))
    fail_msg("%s: %s; expected %s with '%s'", emx_status_name(got), emx_last_error(), emx_status_name(status), word);
}
static void test_resume_errors(void **state) {
  (void)state;
  char folder[64], path[128];
  folder_create(folder);
  emx_model_config c = tiny(2);
  emx_train_opts o = short_run(), other;
  expect_resume_error("/nonexistent/folder", &o, EMX_ERR_IO, "/nonexistent/folder");
  emx_trainer *t = create(one, &c, &o);
  must_step(t);
  assert_int_equal(emx_trainer_save(t, folder), EMX_OK);
#define CHANGED(field, value, word)                             \
  do {                                                          \
    other = o;                                                  \
    other.field = value;                                        \
    expect_resume_error(folder, &other, EMX_ERR_INVALID, word); \
  } while (0)
  CHANGED(lr, 2e-2, "lr was 0.01");
  CHANGED(seed, 2, "seed");
  CHANGED(batch, 5, "batch");
  CHANGED(long_every, 3, "long_every");
  CHANGED(clip, 2, "clip");
  CHANGED(save_dtype, EMX_F32, "save_dtype");
  CHANGED(beta2, 2, "beta2");
  CHANGED(embed_dropout, 0.1, "embed_dropout was 0");
  CHANGED(head_dropout, 0.1, "head_dropout was 0");
#undef CHANGED
  bytes[1][30]++;
  expect_resume_error(folder, &o, EMX_ERR_INVALID, "content of the data");
  bytes[1][30]--;

  snprintf(path, sizeof path, "%s/config.json", folder); /* another configuration beside the state */
  c.rms_norm_eps = 1e-6;
  assert_int_equal(emxi_config_write(folder, &c, EMX_BF16), EMX_OK);
  expect_resume_error(folder, &o, EMX_ERR_FORMAT, "rms_norm_eps");
  c.rms_norm_eps = 1e-5;
  c.position_type = EMX_POSITION_ROPE;
  assert_int_equal(emxi_config_write(folder, &c, EMX_BF16), EMX_OK);
  expect_resume_error(folder, &o, EMX_ERR_FORMAT, "position_type");
  c.position_type = EMX_POSITION_NAPE;
  c.alibi_slope_type = EMX_SLOPE_GIVEN;
  assert_int_equal(emxi_config_write(folder, &c, EMX_BF16), EMX_OK);
  expect_resume_error(folder, &o, EMX_ERR_FORMAT, "alibi_slope_type");
  c.alibi_slope_type = EMX_SLOPE_LINEAR;
  assert_int_equal(emxi_config_write(folder, &c, EMX_BF16), EMX_OK);
  emx_trainer *again;
  assert_int_equal(emx_trainer_resume(one, folder, &o, &corpus, &again), EMX_OK);
  expect_same(t, again);
  emx_trainer_destroy(again);

  emx_trainer *later; /* a save whose model cannot be written has saved the state, which comes first */
  assert_int_equal(emx_trainer_resume(one, folder, &o, &corpus, &later), EMX_OK);
  must_step(later);
  snprintf(path, sizeof path, "%s/model.safetensors", folder);
  assert_int_equal(unlink(path), 0);
  assert_int_equal(mkdir(path, 0700), 0);
  assert_int_equal(emx_trainer_save(later, folder), EMX_ERR_IO);
  assert_int_equal(emx_trainer_resume(one, folder, &o, &corpus, &again), EMX_OK);
  expect_same(later, again);
  emx_trainer_destroy(again);
  assert_int_equal(rmdir(path), 0);
  assert_int_equal(emx_trainer_save(later, folder), EMX_OK);
  assert_int_equal(emx_trainer_resume(one, folder, &o, &corpus, &again), EMX_OK);
  expect_same(later, again);
  emx_trainer_destroy(again);
  emx_trainer_destroy(later);

  snprintf(path, sizeof path, "%s/trainer.safetensors", folder);
  assert_int_equal(truncate(path, 5000), 0);
  expect_resume_error(folder, &o, EMX_ERR_FORMAT, "trainer.safetensors");
  const float zero[1] = {0};
  const emx_named_tensor tensor = {"weights", emx_tensor_view((void *)zero, EMX_F32, 1, (int64_t[]){1})};
  assert_int_equal(emx_checkpoint_write(path, &tensor, 1, NULL, 0), EMX_OK);
  expect_resume_error(folder, &o, EMX_ERR_FORMAT, "format_version is missing");
  unlink(path);
  expect_resume_error(folder, &o, EMX_ERR_IO, "trainer.safetensors");
  assert_int_equal(emx_trainer_save(t, "/nonexistent/folder"), EMX_ERR_IO);
  emx_trainer_destroy(t);
  folder_remove(folder);
}

static void test_nonfinite(void **state) {
  (void)state;
  char folder[64];
  folder_create(folder);
  emx_model_config c = tiny(1.5);
  emx_train_opts o = short_run();
  o.lr = o.min_lr = 1e30;
  o.warmup = 0;
  emx_trainer *t = create(two, &c, &o);
  const size_t size = (size_t)t->net.w.count * sizeof(float);
  float *before = emxi_alloc(size);
  emx_train_stats s = {.struct_size = sizeof s, .step = -7};
  emx_status status = EMX_OK;
  for (int i = 0; i < 6 && !status; i++) {
    memcpy(before, t->net.w.data, size);
    s.step = -7;
    status = emx_trainer_step(t, &s);
  }
  assert_int_equal(status, EMX_ERR_NONFINITE);
  assert_int_equal(s.step, -7); /* results stay untouched on failure */
  assert_memory_equal(before, t->net.w.data, size);
  assert_int_equal(emx_trainer_save(t, folder), EMX_ERR_NONFINITE);
  assert_int_equal(emx_trainer_step(t, &s), EMX_ERR_NONFINITE);
  emx_trainer_destroy(t);

  t = create(two, &c, &o); /* a weight that an update made infinite is not written either */
  t->net.w.data[5] = INFINITY;
  assert_int_equal(emx_trainer_save(t, folder), EMX_ERR_NONFINITE);
  emx_trainer_destroy(t);
  emxi_free(before);
  DIR *dir = opendir(folder);
  int entries = 0;
  while (readdir(dir)) entries++;
  closedir(dir);
  assert_int_equal(entries, 2); /* . and .. */
  folder_remove(folder);
}

/* The caller's parallel_for: cancels the context when the n-th task starts. */
static struct {
  emx_ctx *ctx;
  int64_t left, ran;
} canceller;
static void serial_for(void *user, int64_t n, emx_task_fn task, void *arg) {
  (void)user;
  for (int64_t i = 0; i < n; i++) {
    if (canceller.left-- == 0) emx_ctx_cancel(canceller.ctx);
    canceller.ran++;
    task(arg, i, 0);
  }
}
static void test_cancel(void **state) {
  (void)state;
  emx_ctx_opts opts;
  emx_ctx_opts_init(&opts);
  opts.threads = 1;
  opts.parallel_for = serial_for;
  canceller.left = -1;
  assert_int_equal(emx_ctx_create(&opts, &canceller.ctx), EMX_OK);
  emx_model_config c = tiny(1.5);
  emx_train_opts o = short_run();
  o.steps = 400;
  emx_trainer *t = create(canceller.ctx, &c, &o), *plain = create(one, &c, &o);
  canceller.ran = 0;
  must_step(t);
  const int64_t total = canceller.ran, tail = t->adamw.n + 3;
  must_step(plain);
  int64_t done = 1, cancelled = 0;
  for (int64_t at = 0; at < total; at += at + tail < total ? total / 7 + 1 : 1) { /* every task of the update */
    const bool is_long = done % 2;
    emx_train_stats s = {.struct_size = sizeof s};
    if (is_long) { /* the same shape as the step that was counted */
      must_step(t);
      must_step(plain);
      done++;
    }
    canceller.left = at;
    emx_status status = emx_trainer_step(t, &s);
    canceller.left = -1;
    emx_ctx_resume(canceller.ctx);
    if (status == EMX_ERR_CANCELLED) {
      cancelled++;
      expect_same(t, plain);
      must_step(t);
    } else
      assert_int_equal(status, EMX_OK); /* it was in the update already */
    must_step(plain);
    done++;
    expect_same(t, plain);
  }
  if (cancelled < 6) fail_msg("%d of %d tasks", (int)cancelled, (int)total);
  emx_ctx_cancel(canceller.ctx);
  emx_train_stats s = {.struct_size = sizeof s};
  double nats = -1;
  assert_int_equal(emx_trainer_step(t, &s), EMX_ERR_CANCELLED);
  assert_int_equal(emx_trainer_evaluate(t, bytes[0], 100, &nats), EMX_ERR_CANCELLED);
  assert_true(nats == -1);
  emx_trainer_destroy(t);
  emx_trainer_destroy(plain);
  emx_ctx_destroy(canceller.ctx);
}

static void test_invalid(void **state) {
  (void)state;
  emx_model_config c = tiny(1.5), bad;
  emx_train_opts o = short_run(), other;
  emx_trainer *t = NULL;
  fill_files();
#define REFUSED(status, word)                                                                 \
  do {                                                                                        \
    assert_int_equal(emx_trainer_create(one, &bad, &other, &corpus, &t), status);             \
    assert_null(t);                                                                           \
    if (!strstr(emx_last_error(), word)) fail_msg("'%s' lacks '%s'", emx_last_error(), word); \
  } while (0)
#define OPTION(field, value)          \
  do {                                \
    other = o;                        \
    bad = c;                          \
    other.field = value;              \
    REFUSED(EMX_ERR_INVALID, #field); \
  } while (0)
  OPTION(struct_size, 8);
  OPTION(save_dtype, EMX_F16);
  OPTION(steps, 0);
  OPTION(warmup, 7);
  OPTION(length, 0);
  OPTION(batch, 0);
  OPTION(batch, INT64_MAX);
  OPTION(long_length, 0);
  OPTION(long_every, -1);
  OPTION(lr, 0);
  OPTION(lr, NAN);
  OPTION(min_lr, 1);
  OPTION(beta1, 1);
  OPTION(beta2, -0.1);
  OPTION(eps, 0);
  OPTION(weight_decay, -1);
  OPTION(clip, 0);
  OPTION(embed_dropout, 1);
  OPTION(embed_dropout, -0.1);
  OPTION(head_dropout, 1);
  OPTION(head_dropout, NAN);
  other = o;
  other.head_dropout = 0.1;
  bad = c;
  bad.alibi_num_heads = bad.num_heads;
  REFUSED(EMX_ERR_INVALID, "every head has ALiBi");
  other = o;
  bad = c;
  bad.entmax_alpha = 2.5;
  REFUSED(EMX_ERR_UNSUPPORTED, "entmax_alpha");
  bad = c;
  bad.head_dim = 3;
  REFUSED(EMX_ERR_INVALID, "head_dim");
  bad = c;
  bad.vocab_size = 20;
  REFUSED(EMX_ERR_INVALID, "vocab_size");
  bad = c;
  other.long_length = 200; /* the longest file has 200 bytes, a window needs 201 */
  REFUSED(EMX_ERR_INVALID, "201 bytes");
  other = o;
  other.batch = 100000000;
  REFUSED(EMX_ERR_NOMEM, "bytes");
#undef OPTION
#undef REFUSED
  assert_int_equal(emx_trainer_create(one, &c, &o, &(emx_train_data){sizeof(emx_train_data), 0, 0, files, sizes, NULL}, &t),
                   EMX_ERR_INVALID);
  assert_int_equal(emx_trainer_create(one, &c, &o, &corpus, NULL), EMX_ERR_INVALID);
  assert_int_equal(emx_trainer_create(NULL, &c, &o, &corpus, &t), EMX_ERR_INVALID);
  t = create(one, &c, &o);
  emx_train_stats s = {0};
  assert_int_equal(emx_trainer_step(t, &s), EMX_ERR_INVALID);
  assert_int_equal(emx_trainer_step(t, NULL), EMX_ERR_INVALID);
  emx_trainer_destroy(t);
}

/* Every allocation of create, save and resume fails once. */
static void test_no_memory(void **state) {
  (void)state;
  char folder[64];
  folder_create(folder);
  emx_model_config c = tiny(1.5);
  emx_train_opts o = short_run();
  emx_trainer *t = NULL, *again = NULL;
  fill_files();
  int n = 0;
  emx_status status;
  for (;; n++) {
    emxi_alloc_fail_after(n);
    status = emx_trainer_create(one, &c, &o, &corpus, &t);
    if (!status) break;
    assert_int_equal(status, EMX_ERR_NOMEM);
    assert_null(t);
  }
  emxi_alloc_fail_after(-1);
  assert_in_range(n, 4, 20);
  must_step(t);
  for (n = 0;; n++) {
    emxi_alloc_fail_after(n);
    status = emx_trainer_save(t, folder);
    if (!status) break;
    assert_int_equal(status, EMX_ERR_NOMEM);
  }
  emxi_alloc_fail_after(-1);
  assert_in_range(n, 4, 60);
  for (n = 0;; n++) {
    emxi_alloc_fail_after(n);
    status = emx_trainer_resume(one, folder, &o, &corpus, &again);
    if (!status) break;
    assert_int_equal(status, EMX_ERR_NOMEM);
    assert_null(again);
  }
  emxi_alloc_fail_after(-1);
  assert_in_range(n, 4, 60);
  expect_same(t, again);
  emx_trainer_destroy(again);
  emx_trainer_destroy(t);
  folder_remove(folder);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_gradient_scales), cmocka_unit_test(test_gradient),
      cmocka_unit_test(test_evaluate),        cmocka_unit_test(test_data),
      cmocka_unit_test(test_learning_rate),   cmocka_unit_test(test_adamw),
      cmocka_unit_test(test_initial_weights), cmocka_unit_test(test_learns),
      cmocka_unit_test(test_resume),          cmocka_unit_test(test_resume_errors),
      cmocka_unit_test(test_nonfinite),       cmocka_unit_test(test_cancel),
      cmocka_unit_test(test_invalid),         cmocka_unit_test(test_no_memory),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
