/* config.json and the model folder: round trips, every key's absence, type and range, weights that contradict the
 * configuration. */
#define _DEFAULT_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "model/model.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static emx_ctx *ctx;
static char folder[] = "/tmp/emx_config_XXXXXX";
static char config_path[256], weights_path[256];
static emx_model_config tiny;

static int setup(void **state) {
  (void)state;
  if (!mkdtemp(folder)) return 1;
  snprintf(config_path, sizeof config_path, "%s/config.json", folder);
  snprintf(weights_path, sizeof weights_path, "%s/model.safetensors", folder);
  emx_model_config_init(&tiny);
  tiny.vocab_size = 20;
  tiny.hidden_size = 8;
  tiny.intermediate_size = 12;
  tiny.num_layers = 2;
  tiny.num_heads = 4;
  tiny.num_kv_heads = 2;
  tiny.head_dim = 16;
  tiny.alibi_num_heads = 2;
  return emx_ctx_create(NULL, &ctx);
}
static int teardown(void **state) {
  (void)state;
  unlink(config_path);
  unlink(weights_path);
  emx_ctx_destroy(ctx);
  return rmdir(folder);
}

static bool same(const emx_model_config *a, const emx_model_config *b) {
  return a->vocab_size == b->vocab_size && a->hidden_size == b->hidden_size && a->intermediate_size == b->intermediate_size &&
         a->num_layers == b->num_layers && a->num_heads == b->num_heads && a->num_kv_heads == b->num_kv_heads &&
         a->head_dim == b->head_dim && a->position_type == b->position_type && a->alibi_num_heads == b->alibi_num_heads &&
         a->alibi_slope_type == b->alibi_slope_type && a->attn_scale_type == b->attn_scale_type &&
         a->tie_word_embeddings == b->tie_word_embeddings && a->max_position == b->max_position &&
         a->rms_norm_eps == b->rms_norm_eps && a->entmax_alpha == b->entmax_alpha && a->alpha_learned == b->alpha_learned &&
         a->rope_theta == b->rope_theta && a->focal_temperature == b->focal_temperature && a->focal_learned == b->focal_learned &&
         !memcmp(a->alibi_slopes, b->alibi_slopes, sizeof a->alibi_slopes);
}

static void test_round_trip(void **state) {
  (void)state;
  emx_model_config c, back;
  emx_model_config_init(&c);
  assert_int_equal(emxi_config_write(folder, &c, EMX_BF16), EMX_OK);
  assert_int_equal(emxi_config_read(folder, &back), EMX_OK);
  assert_true(same(&c, &back));
  c = tiny;
  c.entmax_alpha = 4. / 3; /* all digits come back */
  c.rms_norm_eps = 1e-6;
  c.tie_word_embeddings = 0;
  c.alibi_slope_type = EMX_SLOPE_EXP;
  c.max_position = 123456;
  assert_int_equal(emxi_config_write(folder, &c, EMX_F32), EMX_OK);
  assert_int_equal(emxi_config_read(folder, &back), EMX_OK);
  assert_true(same(&c, &back));
  c.position_type = EMX_POSITION_NOPE;
  c.alibi_num_heads = 0;
  c.alibi_slope_type = EMX_SLOPE_LINEAR;
  c.entmax_alpha = 1;
  assert_int_equal(emxi_config_write(folder, &c, EMX_F16), EMX_OK);
  assert_int_equal(emxi_config_read(folder, &back), EMX_OK);
  assert_true(same(&c, &back));
  assert_int_equal(emxi_config_write(folder, &c, EMX_F64), EMX_ERR_DTYPE);
}

/* What the scale, the positions and a learned alpha add. */
static void test_round_trip_scales(void **state) {
  (void)state;
  emx_model_config c = tiny, back;
  c.attn_scale_type = EMX_ATTN_SCALE_ASENTMAX;
  c.alibi_slope_type = EMX_SLOPE_GIVEN;
  c.alibi_slopes[0] = 0.1, c.alibi_slopes[1] = 1. / 3;
  c.alpha_learned = 1;
  assert_int_equal(emxi_config_write(folder, &c, EMX_BF16), EMX_OK);
  assert_int_equal(emxi_config_read(folder, &back), EMX_OK);
  assert_true(same(&c, &back));
  c = tiny;
  c.position_type = EMX_POSITION_ROPE;
  c.alibi_num_heads = 0;
  c.rope_theta = 500000;
  c.attn_scale_type = EMX_ATTN_SCALE_FOCAL;
  c.focal_temperature = 0.7;
  c.focal_learned = 1;
  assert_int_equal(emxi_config_write(folder, &c, EMX_BF16), EMX_OK);
  assert_int_equal(emxi_config_read(folder, &back), EMX_OK);
  assert_true(same(&c, &back));
  c.focal_learned = 0;
  c.attn_scale_type = EMX_ATTN_SCALE_SSMAX;
  c.focal_temperature = 0.4; /* not kept where it means nothing */
  assert_int_equal(emxi_config_write(folder, &c, EMX_BF16), EMX_OK);
  assert_int_equal(emxi_config_read(folder, &back), EMX_OK);
  assert_true(same(&c, &back));
}

/* The names that other programs look for. */
static void test_keys(void **state) {
  (void)state;
  assert_int_equal(emxi_config_write(folder, &tiny, EMX_BF16), EMX_OK);
  json_t *j = json_load_file(config_path, JSON_REJECT_DUPLICATES, NULL);
  assert_non_null(j);
  assert_string_equal(json_string_value(json_object_get(j, "model_type")), "libentmax");
  assert_string_equal(json_string_value(json_array_get(json_object_get(j, "architectures"), 0)), "LibentmaxForCausalLM");
  assert_string_equal(json_string_value(json_object_get(j, "torch_dtype")), "bfloat16");
  assert_string_equal(json_string_value(json_object_get(j, "hidden_act")), "silu");
  assert_string_equal(json_string_value(json_object_get(j, "position_type")), "nape");
  assert_string_equal(json_string_value(json_object_get(j, "alibi_slope_type")), "linear");
  assert_string_equal(json_string_value(json_object_get(j, "attn_scale_type")), "none");
  assert_string_equal(json_string_value(json_object_get(j, "tokenizer")), "byte");
  assert_int_equal(json_integer_value(json_object_get(j, "num_key_value_heads")), 2);
  assert_int_equal(json_integer_value(json_object_get(j, "max_position_embeddings")), tiny.max_position);
  assert_true(json_real_value(json_object_get(j, "entmax_alpha")) == 1.5);
  assert_true(json_is_true(json_object_get(j, "tie_word_embeddings")));
  /* Folders without a scale are as they always were. */
  static const char *const absent[] = {"alibi_slopes", "rope_theta", "focal_temperature", "focal_learned",
                                       "entmax_alpha_learned"};
  for (int i = 0; i < 5; i++) assert_null(json_object_get(j, absent[i]));
  json_decref(j);
  emx_model_config c = tiny;
  c.position_type = EMX_POSITION_ROPE;
  c.attn_scale_type = EMX_ATTN_SCALE_FOCAL;
  c.alpha_learned = 1;
  assert_int_equal(emxi_config_write(folder, &c, EMX_BF16), EMX_OK);
  j = json_load_file(config_path, JSON_REJECT_DUPLICATES, NULL);
  assert_true(json_real_value(json_object_get(j, "rope_theta")) == 10000);
  assert_true(json_real_value(json_object_get(j, "focal_temperature")) == 0.4);
  assert_true(json_is_false(json_object_get(j, "focal_learned")));
  assert_true(json_is_true(json_object_get(j, "entmax_alpha_learned")));
  assert_string_equal(json_string_value(json_object_get(j, "attn_scale_type")), "focal");
  json_decref(j);
}

static void write_text(const char *text, size_t size) {
  FILE *f = fopen(config_path, "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(text, 1, size, f), size);
  fclose(f);
}
static void refuse_text(const char *text, const char *sentence) {
  emx_model_config c = {.vocab_size = 77};
  write_text(text, strlen(text));
  emx_status status = emxi_config_read(folder, &c);
  if (status != EMX_ERR_FORMAT || !strstr(emx_last_error(), sentence))
    fail_msg("%.200s: %s: \"%s\" does not say \"%s\"", text, emx_status_name(status), emx_last_error(), sentence);
  assert_int_equal(c.vocab_size, 77);
}
static emx_model_config good;
/* The file of `good` with one key changed to `value` (a JSON text; NULL: removed). */
static emx_status with(const char *key, const char *value, emx_model_config *c) {
  assert_int_equal(emxi_config_write(folder, &good, EMX_BF16), EMX_OK);
  json_t *j = json_load_file(config_path, 0, NULL);
  if (value)
    json_object_set_new(j, key, json_loads(value, JSON_DECODE_ANY, NULL));
  else
    assert_int_equal(json_object_del(j, key), 0);
  assert_int_equal(json_dump_file(j, config_path, 0), 0);
  json_decref(j);
  return emxi_config_read(folder, c);
}
static void refuse(const char *key, const char *value, const char *sentence) {
  emx_model_config c;
  emx_status status = with(key, value, &c);
  if (status != EMX_ERR_FORMAT || !strstr(emx_last_error(), key) || !strstr(emx_last_error(), sentence))
    fail_msg("%s = %s: %s: \"%s\" does not name the key and \"%s\"", key, value ? value : "(none)", emx_status_name(status),
             emx_last_error(), sentence);
}

static void test_bad_values(void **state) {
  (void)state;
  emx_model_config c;
  good = tiny;
  static const char *const required[] = {
      "model_type",      "vocab_size",    "hidden_size",         "intermediate_size",       "num_hidden_layers",
      "head_dim",        "rms_norm_eps",  "tie_word_embeddings", "max_position_embeddings", "num_attention_heads",
      "entmax_alpha",    "position_type", "attn_scale_type",     "alibi_num_heads",         "num_key_value_heads",
      "alibi_slope_type"};
  for (size_t i = 0; i < sizeof required / sizeof *required; i++) refuse(required[i], NULL, "missing");
  static const char *const integers[] = {
      "vocab_size",          "hidden_size", "intermediate_size",       "num_hidden_layers", "num_attention_heads",
      "num_key_value_heads", "head_dim",    "max_position_embeddings", "alibi_num_heads"};
  for (size_t i = 0; i < sizeof integers / sizeof *integers; i++) {
    refuse(integers[i], "\"8\"", "not an integer");
    refuse(integers[i], "8.0", "not an integer");
    refuse(integers[i], "null", "not an integer");
    refuse(integers[i], "-1", "expected");
    refuse(integers[i], "4294967297", "expected"); /* 1 in 32 bits */
  }
  for (int i = 0; i < 7; i++) refuse(integers[i], "0", "expected");
  refuse("entmax_alpha", "0.99", "expected 1..4");
  refuse("entmax_alpha", "4.01", "expected 1..4");
  refuse("entmax_alpha", "\"1.5\"", "not a number");
  refuse("entmax_alpha", "null", "not a number");
  refuse("rms_norm_eps", "-1e-9", "expected");
  refuse("rms_norm_eps", "true", "not a number");
  refuse("head_dim", "15", "16..256");
  refuse("head_dim", "257", "16..256");
  refuse("num_key_value_heads", "3", "not a multiple");
  refuse("alibi_num_heads", "5", "0..4");
  refuse("tie_word_embeddings", "1", "true or false");
  refuse("position_type", "\"sinus\"", "nape, alibi, nope");
  refuse("position_type", "1", "not a string");
  refuse("alibi_slope_type", "\"cubic\"", "linear, exp, given");
  refuse("model_type", "\"llama\"", "libentmax");
  refuse("architectures", "[\"LlamaForCausalLM\"]", "LibentmaxForCausalLM");
  refuse("architectures", "\"LibentmaxForCausalLM\"", "LibentmaxForCausalLM");
  refuse("hidden_act", "\"gelu\"", "silu");
  refuse("tokenizer", "\"bpe\"", "byte");
  refuse("attn_scale_type", "\"sqrt\"", "none, ssmax, asentmax, focal");
  refuse("attn_scale_type", "0", "not a string");
  /* Allowed: whole numbers for reals, unknown keys, absent constants. */
  assert_int_equal(with("entmax_alpha", "2", &c), EMX_OK);
  assert_true(c.entmax_alpha == 2);
  assert_int_equal(with("somebody_elses", "{\"a\":[1]}", &c), EMX_OK);
  assert_int_equal(with("architectures", NULL, &c), EMX_OK);
  assert_int_equal(with("hidden_act", NULL, &c), EMX_OK);
  assert_int_equal(with("torch_dtype", NULL, &c), EMX_OK);
  assert_int_equal(with("position_type", "\"alibi\"", &c), EMX_OK);
  assert_int_equal(c.alibi_num_heads, 4); /* all heads, whatever the count says */
}

static void test_bad_scales(void **state) {
  (void)state;
  emx_model_config c;
  good = tiny; /* NAPE with two ALiBi heads of four */
  refuse("alibi_slope_type", "\"cubic\"", "linear, exp, given");
  assert_int_equal(with("alibi_slope_type", "\"given\"", &c), EMX_ERR_FORMAT);
  assert_non_null(strstr(emx_last_error(), "alibi_slopes is missing"));
  good.alibi_slope_type = EMX_SLOPE_GIVEN;
  refuse("alibi_slopes", NULL, "missing");
  refuse("alibi_slopes", "0.5", "array of 2 numbers");
  refuse("alibi_slopes", "[0.5]", "array of 2 numbers");
  refuse("alibi_slopes", "[1, 2, 3]", "array of 2 numbers");
  refuse("alibi_slopes", "[1, \"2\"]", "alibi_slopes[1] is not a number");
  refuse("alibi_slopes", "[1, -0.5]", "alibi_slopes[1] is -0.5, expected 0..");
  refuse("alibi_slopes", "[1e30, 0.5]", "alibi_slopes[0]");
  assert_int_equal(with("alibi_slopes", "[1, 0]", &c), EMX_OK);
  assert_true(c.alibi_slopes[0] == 1 && c.alibi_slopes[1] == 0);

  good = tiny;
  good.position_type = EMX_POSITION_ROPE;
  good.head_dim = 18;
  refuse("rope_theta", "\"10000\"", "not a number");
  refuse("rope_theta", "0", "expected 1..");
  refuse("rope_theta", "null", "not a number");
  assert_int_equal(with("rope_theta", NULL, &c), EMX_OK);
  assert_true(c.rope_theta == 10000);
  assert_int_equal(with("head_dim", "17", &c), EMX_ERR_FORMAT);
  assert_non_null(strstr(emx_last_error(), "head_dim 17 is odd"));

  good = tiny;
  good.attn_scale_type = EMX_ATTN_SCALE_FOCAL;
  refuse("focal_temperature", NULL, "missing");
  refuse("focal_temperature", "0", "expected");
  refuse("focal_temperature", "1e9", "expected");
  refuse("focal_learned", NULL, "missing");
  refuse("focal_learned", "1", "true or false");
  refuse("entmax_alpha_learned", "1", "true or false");
  assert_int_equal(with("alibi_num_heads", "4", &c), EMX_ERR_FORMAT);
  assert_non_null(strstr(emx_last_error(), "no head to scale"));
  assert_int_equal(with("position_type", "\"alibi\"", &c), EMX_OK); /* there every head is scaled */
  assert_int_equal(emxi_scaled_heads(&c), 4);

  good = tiny;
  good.alpha_learned = 1;
  refuse("entmax_alpha", "1", "learned alpha");
  refuse("entmax_alpha", "2", "learned alpha");
  refuse("entmax_alpha", "1.01", "learned alpha");
  assert_int_equal(with("entmax_alpha", "1.3", &c), EMX_OK);
  assert_true(c.alpha_learned && c.entmax_alpha == 1.3);
}

static void test_bad_text(void **state) {
  (void)state;
  emx_model_config c;
  refuse_text("", "line");
  refuse_text("[]", "not a JSON object");
  refuse_text("{", "line 1");
  refuse_text("{\"vocab_size\": 1, \"vocab_size\": 2}", "duplicate");
  refuse_text("{\"a\": \"\xff\"}", "line 1");
  refuse_text("{} {}", "line 1");
  size_t big = (1 << 20) + 1;
  char *spaces = malloc(big);
  assert_non_null(spaces);
  memset(spaces, ' ', big);
  write_text(spaces, big);
  free(spaces);
  assert_int_equal(emxi_config_read(folder, &c), EMX_ERR_FORMAT);
  unlink(config_path);
  assert_int_equal(emxi_config_read(folder, &c), EMX_ERR_IO);
  assert_int_equal(mkdir(config_path, 0777), 0);
  assert_int_equal(emxi_config_read(folder, &c), EMX_ERR_IO);
  assert_int_equal(emxi_config_write(folder, &tiny, EMX_F32), EMX_ERR_IO);
  rmdir(config_path);
}

static void test_check(void **state) {
  (void)state;
  emx_model_config c = tiny;
  assert_int_equal(emx_model_config_check(&c), EMX_OK);
  c.struct_size = 4;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.entmax_alpha = NAN;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.tie_word_embeddings = 2;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.position_type = -1;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.position_type = EMX_POSITION_ROPE + 1;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.attn_scale_type = EMX_ATTN_SCALE_FOCAL + 1;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.attn_scale_type = -1;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.alibi_slope_type = EMX_SLOPE_GIVEN + 1;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.alibi_slope_type = EMX_SLOPE_GIVEN, c.alibi_slopes[1] = NAN;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.alibi_slope_type = EMX_SLOPE_GIVEN, c.num_heads = c.alibi_num_heads = EMX_MAX_ALIBI_SLOPES + 2;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "at most 128"));
  c = tiny, c.rope_theta = NAN;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.focal_temperature = 0;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.focal_learned = 2;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.alpha_learned = -1;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  c = tiny, c.num_layers = 0;
  assert_int_equal(emx_model_config_check(&c), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "num_hidden_layers"));
  assert_int_equal(emx_model_config_parameters(&c), 0);
}

/* The flat array: tensors are adjacent, cover it, and the pointers agree with the offsets. */
static void test_parameters(void **state) {
  (void)state;
  for (int tied = 0; tied < 2; tied++) {
    emx_model_config c = tiny;
    c.tie_word_embeddings = tied;
    /* by hand: embed 20*8; a layer 8 + 64*8 + 2*32*8 + 8*64 + 8 + 3*12*8; norm 8 */
    int64_t want = 160 + 2 * (8 + 512 + 512 + 512 + 8 + 288) + 8 + (tied ? 0 : 160), at = 0;
    assert_int_equal(emx_model_config_parameters(&c), want);
    assert_int_equal(emxi_param_tensors(&c), tied ? 20 : 21);
    for (int64_t i = 0; i < emxi_param_tensors(&c); i++) {
      emxi_param p;
      emxi_param_at(&c, i, &p);
      assert_int_equal(p.offset, at);
      assert_int_equal(p.count, p.shape[0] * (p.ndim == 2 ? p.shape[1] : 1));
      assert_true(p.decay == (p.ndim == 2));
      at += p.count;
    }
    assert_int_equal(at, want);
    emxi_weights w;
    assert_int_equal(emxi_weights_create(&c, NULL, &w), EMX_OK);
    for (int64_t i = 0; i < emxi_param_tensors(&c); i++) {
      emxi_param p;
      emxi_param_at(&c, i, &p);
      const emxi_layer *l = &w.layers[strstr(p.name, "layers.1.") ? 1 : 0];
      static const char *const names[] = {"embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj",     "input_layernorm",
                                          "post_att",     "gate",   "up_p",   "down",   "model.norm", "lm_head"};
      float *const at_name[] = {w.embed,      l->wq,   l->wk, l->wv,   l->wo,  l->input_norm,
                                l->post_norm, l->gate, l->up, l->down, w.norm, w.head};
      int found = 0;
      for (int n = 0; n < 12; n++)
        if (strstr(p.name, names[n])) {
          found++;
          assert_ptr_equal(at_name[n], w.data + p.offset);
        }
      assert_int_equal(found, 1);
    }
    assert_true((w.head == w.embed) == tied);
    emxi_weights_destroy(&w);
  }
  emxi_param p;
  emxi_param_at(&tiny, 10, &p);
  assert_string_equal(p.name, "model.layers.1.input_layernorm.weight");
}

/* The tensors that a scale and a learned alpha add: names, shapes, no decay of what is not a matrix; what the trainer's one
 * product takes together lies together. */
static void test_parameters_of_scales(void **state) {
  (void)state;
  static const struct {
    int32_t scale, learned, alpha;
    const char *names[5];
  } cases[] = {{EMX_ATTN_SCALE_ASENTMAX, 0, 0, {"beta_proj.weight", "gamma_proj.weight", "beta_proj.bias", "gamma_proj.bias"}},
               {EMX_ATTN_SCALE_SSMAX, 0, 0, {"ssmax_scale"}},
               {EMX_ATTN_SCALE_FOCAL, 0, 0, {NULL}},
               {EMX_ATTN_SCALE_FOCAL, 1, 0, {"focal_log_temperature"}},
               {EMX_ATTN_SCALE_NONE, 0, 1, {"entmax_alpha_logit"}}};
  const int64_t plain = emx_model_config_parameters(&tiny);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    emx_model_config c = tiny;
    c.attn_scale_type = cases[i].scale;
    c.focal_learned = cases[i].learned;
    c.alpha_learned = cases[i].alpha;
    int64_t at = 0, extra = 0, found = 0, want = 0;
    while (want < 5 && cases[i].names[want]) want++;
    for (int64_t t = 0; t < emxi_param_tensors(&c); t++) {
      emxi_param p;
      emxi_param_at(&c, t, &p);
      assert_int_equal(p.offset, at);
      assert_true(p.decay == (p.ndim == 2));
      at += p.count;
      for (int64_t n = 0; n < want; n++) {
        char name[96];
        snprintf(name, sizeof name, "model.layers.1.self_attn.%s", cases[i].names[n]);
        if (strcmp(p.name, name)) continue;
        found++;
        extra += p.count;
        assert_int_equal(p.shape[0], cases[i].alpha ? 4 : 2); /* heads; those without ALiBi */
        assert_int_equal(p.start, EMXI_START_SCALAR);
      }
    }
    assert_int_equal(found, want);
    assert_int_equal(at, plain + 2 * extra);
    assert_int_equal(emx_model_config_parameters(&c), at);
    emxi_weights w;
    assert_int_equal(emxi_weights_create(&c, NULL, &w), EMX_OK);
    const emxi_layer *l = &w.layers[1];
    if (cases[i].scale == EMX_ATTN_SCALE_ASENTMAX) {
      assert_ptr_equal(l->wk, l->wq + 64 * 8);
      assert_ptr_equal(l->wv, l->wk + 32 * 8);
      assert_ptr_equal(l->theta_w, l->wv + 32 * 8);
      assert_ptr_equal(l->theta_v, l->theta_w + 2 * 8);
      assert_ptr_equal(l->wo, l->theta_v + 2 * 8);
    }
    assert_true(!l->theta_w == (cases[i].scale != EMX_ATTN_SCALE_ASENTMAX));
    assert_true(!l->alpha == !cases[i].alpha);
    assert_true(!l->theta_b == (!want || cases[i].alpha));
    emxi_weights_destroy(&w);
  }
}

/* 1 + sigmoid, held away from softmax; derivatives by differences. */
static void test_learned_alphas(void **state) {
  (void)state;
  float a[4] = {0, 1.5f, -3, 4};
  const emxi_layer layer = {.alpha = a};
  double alphas[4], slopes[4], up[4], down[4];
  emxi_learned_alphas(&tiny, &layer, alphas, slopes);
  assert_true(alphas[0] == 1.5 && slopes[0] == 0.25);
  float above[4], below[4];
  for (int h = 0; h < 4; h++) {
    above[h] = a[h] + 0x1p-10f;
    below[h] = a[h] - 0x1p-10f;
  }
  emxi_learned_alphas(&tiny, &(emxi_layer){.alpha = above}, up, NULL);
  emxi_learned_alphas(&tiny, &(emxi_layer){.alpha = below}, down, NULL);
  for (int h = 0; h < 4; h++) { /* truncation: h^2/6 of the third derivative, < 2e-8 */
    assert_true(fabs(alphas[h] - (1 + 1 / (1 + exp(-a[h])))) < 1e-15);
    assert_true(fabs(slopes[h] - (up[h] - down[h]) * 0x1p9) < 1e-7);
  }
  a[1] = -40, a[2] = 1000, a[3] = -1000;
  emxi_learned_alphas(&tiny, &layer, alphas, slopes);
  assert_true(alphas[1] == EMXI_LEAST_ALPHA && slopes[1] == 0 && alphas[3] == EMXI_LEAST_ALPHA);
  assert_true(alphas[2] == 2 && slopes[2] == 0);
}

static void test_slopes(void **state) {
  (void)state;
  emx_model_config c = tiny;
  float s[4];
  emxi_alibi_slopes(&c, s);
  assert_true(s[0] == 1 && s[1] == .5f && s[2] == 0 && s[3] == 0);
  c.alibi_slope_type = EMX_SLOPE_EXP;
  c.position_type = EMX_POSITION_ALIBI;
  emxi_alibi_slopes(&c, s);
  assert_true(s[0] == 1 && s[1] == .5f && s[2] == .25f && s[3] == .125f);
  c.alibi_slope_type = EMX_SLOPE_GIVEN;
  for (int h = 0; h < 4; h++) c.alibi_slopes[h] = 0.1 * h;
  emxi_alibi_slopes(&c, s);
  assert_true(s[0] == 0 && s[1] == .1f && s[2] == .2f && s[3] == (float)(0.1 * 3));
  c.position_type = EMX_POSITION_ROPE;
  emxi_alibi_slopes(&c, s);
  assert_true(s[0] == 0 && s[1] == 0 && s[2] == 0 && s[3] == 0);
  c.position_type = EMX_POSITION_NOPE;
  emxi_alibi_slopes(&c, s);
  assert_true(s[0] == 0 && s[1] == 0 && s[2] == 0 && s[3] == 0);
}

/* Saves `count` of the model's tensors after `edit` has changed the list, and expects this of emx_model_open. */
typedef void (*edit_fn)(emx_named_tensor *t, int64_t *n);
static emx_status open_edited(edit_fn edit) {
  const int64_t count = emx_model_config_parameters(&good);
  float *data = calloc((size_t)count, sizeof *data);
  emx_named_tensor t[32];
  emxi_param p[32];
  int64_t n = emxi_param_tensors(&good);
  for (int64_t i = 0; i < n; i++) {
    emxi_param_at(&good, i, &p[i]);
    t[i] = (emx_named_tensor){p[i].name, emx_tensor_view(data + p[i].offset, EMX_F32, p[i].ndim, p[i].shape)};
  }
  edit(t, &n);
  assert_int_equal(emx_checkpoint_write(weights_path, t, n, NULL, 0), EMX_OK);
  free(data);
  emx_model *model = NULL;
  emx_status status = emx_model_open(ctx, folder, &model);
  if (status) assert_null(model);
  emx_model_close(model);
  return status;
}
static void edit_nothing(emx_named_tensor *t, int64_t *n) { (void)t, (void)n; }
static void edit_missing(emx_named_tensor *t, int64_t *n) { t[3] = t[--*n]; }
static void edit_extra(emx_named_tensor *t, int64_t *n) {
  t[*n] = (emx_named_tensor){"model.layers.2.mlp.gate_proj.weight", t[0].tensor};
  ++*n;
}
static void edit_renamed(emx_named_tensor *t, int64_t *n) { (void)n, t[1].name = "model.layers.0.input_norm.weight"; }
static void edit_shape(emx_named_tensor *t, int64_t *n) {
  (void)n;
  t[2].tensor = emx_tensor_view(t[2].tensor.data, EMX_F32, 2, (int64_t[]){8, 64}); /* transposed: the same bytes */
}
static void edit_flat(emx_named_tensor *t, int64_t *n) {
  (void)n;
  t[2].tensor = emx_tensor_view(t[2].tensor.data, EMX_F32, 1, (int64_t[]){512});
}
static void edit_vocab(emx_named_tensor *t, int64_t *n) {
  (void)n;
  t[0].tensor = emx_tensor_view(t[0].tensor.data, EMX_F32, 2, (int64_t[]){19, 8});
}
static void edit_dtype(emx_named_tensor *t, int64_t *n) { (void)n, t[4].tensor.dtype = EMX_I32; }
static void edit_bias(emx_named_tensor *t, int64_t *n) { /* the last tensor of the last layer; model.norm follows */
  t[*n - 2] = t[*n - 1];
  --*n;
}
static void edit_heads(emx_named_tensor *t, int64_t *n) {
  (void)n;
  t[5].tensor = emx_tensor_view(t[5].tensor.data, EMX_F32, 2, (int64_t[]){4, 4});
}

static void test_open(void **state) {
  (void)state;
  static const struct {
    edit_fn edit;
    const char *sentence;
  } cases[] = {{edit_missing, "k_proj.weight is missing"},
               {edit_extra, "no tensor named model.layers.2.mlp.gate_proj.weight"},
               {edit_renamed, "input_layernorm.weight is missing"},
               {edit_shape, "q_proj.weight has shape [8,64], config.json implies [64,8]"},
               {edit_flat, "q_proj.weight has shape [512]"},
               {edit_vocab, "embed_tokens.weight has shape [19,8], config.json implies [20,8]"},
               {edit_dtype, "v_proj.weight is i32"}};
  good = tiny;
  assert_int_equal(emxi_config_write(folder, &tiny, EMX_F32), EMX_OK);
  assert_int_equal(open_edited(edit_nothing), EMX_OK);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    emx_status status = open_edited(cases[i].edit);
    if (status != EMX_ERR_FORMAT || !strstr(emx_last_error(), cases[i].sentence))
      fail_msg("%s: \"%s\" does not say \"%s\"", emx_status_name(status), emx_last_error(), cases[i].sentence);
  }
  /* The tensors of a scale are required, and refused where config.json has no scale. */
  good.attn_scale_type = EMX_ATTN_SCALE_ASENTMAX;
  assert_int_equal(open_edited(edit_nothing), EMX_ERR_FORMAT);
  assert_non_null(strstr(emx_last_error(), "no tensor named model.layers."));
  assert_int_equal(emxi_config_write(folder, &good, EMX_F32), EMX_OK);
  assert_int_equal(open_edited(edit_nothing), EMX_OK);
  assert_int_equal(open_edited(edit_bias), EMX_ERR_FORMAT);
  assert_non_null(strstr(emx_last_error(), "model.layers.1.self_attn.gamma_proj.bias is missing"));
  assert_int_equal(open_edited(edit_heads), EMX_ERR_FORMAT);
  assert_non_null(strstr(emx_last_error(), "beta_proj.weight has shape [4,4], config.json implies [2,8]"));
  good = tiny;
  assert_int_equal(open_edited(edit_nothing), EMX_ERR_FORMAT);
  assert_non_null(strstr(emx_last_error(), "beta_proj.weight is missing"));
  assert_int_equal(emxi_config_write(folder, &good, EMX_F32), EMX_OK);
  /* A small file with an enormous configuration is refused before memory of its size is asked for. */
  assert_int_equal(open_edited(edit_nothing), EMX_OK);
  emx_model_config huge = tiny;
  huge.vocab_size = huge.hidden_size = huge.intermediate_size = 1 << 20;
  huge.num_layers = 1024;
  emx_model *model;
  assert_int_equal(emxi_config_write(folder, &huge, EMX_F32), EMX_OK);
  assert_int_equal(emx_model_open(ctx, folder, &model), EMX_ERR_FORMAT);
  unlink(weights_path);
  assert_int_equal(emx_model_open(ctx, folder, &model), EMX_ERR_IO);
  assert_int_equal(emx_model_open(ctx, "/nonexistent", &model), EMX_ERR_IO);
  assert_int_equal(emx_model_open(NULL, folder, &model), EMX_ERR_INVALID);
}

/* Each dtype gives the weights rounded to it. */
static void test_save_and_open(void **state) {
  (void)state;
  const int64_t count = emx_model_config_parameters(&tiny);
  float *data = malloc((size_t)count * sizeof *data);
  assert_non_null(data);
  emxi_normals(1, 2, data, count);
  assert_int_equal(emxi_config_write(folder, &tiny, EMX_F32), EMX_OK);
  static const int32_t dtypes[] = {EMX_F32, EMX_F16, EMX_BF16};
  for (int d = 0; d < 3; d++) {
    static const char *const metadata[] = {"step", "7"};
    assert_int_equal(emxi_weights_save(weights_path, &tiny, data, dtypes[d], metadata, 1), EMX_OK);
    emx_model *model;
    int failures = 0;
    for (emx_status status = EMX_ERR_NOMEM; status; failures++) {
      emxi_alloc_fail_after(failures);
      status = emx_model_open(ctx, folder, &model);
      emxi_alloc_fail_after(-1);
      assert_true(!status || status == EMX_ERR_NOMEM);
    }
    assert_true(failures > 5);
    for (int64_t i = 0; i < count; i++) {
      double u;
      float want = data[i], got = model->w.data[i];
      emxi_store(&u, dtypes[d], 0, want);
      assert_true(got == (float)emxi_load(&u, dtypes[d], 0));
    }
    emx_model_config c = {.struct_size = sizeof c};
    assert_int_equal(emx_model_get_config(model, &c), EMX_OK);
    assert_true(same(&c, &tiny));
    emx_model_close(model);
  }
  assert_int_equal(emxi_weights_save(weights_path, &tiny, data, EMX_F64, NULL, 0), EMX_ERR_DTYPE);
  free(data);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_round_trip_scales), cmocka_unit_test(test_bad_scales), cmocka_unit_test(test_parameters_of_scales),
      cmocka_unit_test(test_learned_alphas),    cmocka_unit_test(test_round_trip), cmocka_unit_test(test_keys),
      cmocka_unit_test(test_bad_values),        cmocka_unit_test(test_bad_text),   cmocka_unit_test(test_check),
      cmocka_unit_test(test_parameters),        cmocka_unit_test(test_slopes),     cmocka_unit_test(test_open),
      cmocka_unit_test(test_save_and_open),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
