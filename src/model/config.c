/* SPDX-License-Identifier: Apache-2.0
 * config.json of a model folder, with the key names of Hugging Face. */
#include "model.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void emx_model_config_init_sized(emx_model_config *config, size_t size) {
  const emx_model_config defaults = {.vocab_size = 256,
                                     .hidden_size = 192,
                                     .intermediate_size = 512,
                                     .num_layers = 4,
                                     .num_heads = 6,
                                     .num_kv_heads = 3,
                                     .head_dim = 32,
                                     .position_type = EMX_POSITION_NAPE,
                                     .alibi_num_heads = 3,
                                     .alibi_slope_type = EMX_SLOPE_LINEAR,
                                     .attn_scale_type = EMX_ATTN_SCALE_NONE,
                                     .tie_word_embeddings = 1,
                                     .max_position = 512,
                                     .rms_norm_eps = 1e-5,
                                     .entmax_alpha = 1.5,
                                     .rope_theta = 10000,
                                     .focal_temperature = 0.4};
  emxi_struct_init(config, size, &defaults, sizeof defaults);
}

/* Integer fields: key in config.json, place, range. The ranges keep every product of sizes in this library far below 2^63. */
enum { WIDEST = 1 << 20 };
static const struct {
  const char *key;
  size_t offset;
  int32_t min, max;
} integers[] = {
#define FIELD(key, name, min, max) \
  { key, offsetof(emx_model_config, name), min, max }
    FIELD("vocab_size", vocab_size, 1, WIDEST),
    FIELD("hidden_size", hidden_size, 1, WIDEST),
    FIELD("intermediate_size", intermediate_size, 1, WIDEST),
    FIELD("num_hidden_layers", num_layers, 1, 1024),
    FIELD("num_attention_heads", num_heads, 1, 4096),
    FIELD("num_key_value_heads", num_kv_heads, 1, 4096),
    FIELD("head_dim", head_dim, 16, 256),
    FIELD("max_position_embeddings", max_position, 1, INT32_MAX),
#undef FIELD
};
enum { INTEGERS = sizeof integers / sizeof *integers };
static int32_t *integer(emx_model_config *c, int i) { return (int32_t *)((char *)c + integers[i].offset); }

/* Ranges of reals: within them every angle, temperature and bias is a normal float. */
#define ROPE_MIN 1.0
#define ROPE_MAX 1e12
#define SLOPE_MAX 1e6
#define TEMPERATURE_MIN 1e-3
#define TEMPERATURE_MAX 1e3

static const char *const position_names[] = {"nape", "alibi", "nope", "rope"};
static const char *const slope_names[] = {"linear", "exp", "given"};
static const char *const scale_names[] = {"none", "ssmax", "asentmax", "focal"};

emx_status emx_model_config_check(const emx_model_config *c) {
  EMXI_READ_STRUCT(c, emx_model_config);
  for (int i = 0; i < INTEGERS; i++) {
    int32_t v = *integer((emx_model_config *)c, i);
    if (v < integers[i].min || v > integers[i].max)
      return emxi_fail(EMX_ERR_INVALID, "model configuration: %s is %d, expected %d..%d", integers[i].key, v, integers[i].min,
                       integers[i].max);
  }
  if (c->num_heads % c->num_kv_heads)
    return emxi_fail(EMX_ERR_INVALID, "model configuration: num_attention_heads %d is not a multiple of num_key_value_heads %d",
                     c->num_heads, c->num_kv_heads);
  if (c->position_type < EMX_POSITION_NAPE || c->position_type > EMX_POSITION_ROPE)
    return emxi_fail(EMX_ERR_INVALID, "model configuration: position_type is %d, expected EMX_POSITION_*", c->position_type);
  if (c->position_type == EMX_POSITION_ROPE && c->head_dim % 2)
    return emxi_fail(EMX_ERR_INVALID, "model configuration: position_type rope turns pairs, but head_dim %d is odd", c->head_dim);
  if (!(c->rope_theta >= ROPE_MIN && c->rope_theta <= ROPE_MAX))
    return emxi_fail(EMX_ERR_INVALID, "model configuration: rope_theta is %g, expected %g..%g", c->rope_theta, ROPE_MIN,
                     ROPE_MAX);
  if (c->alibi_num_heads < 0 || c->alibi_num_heads > c->num_heads)
    return emxi_fail(EMX_ERR_INVALID, "model configuration: alibi_num_heads is %d, expected 0..%d (num_attention_heads)",
                     c->alibi_num_heads, c->num_heads);
  if (c->alibi_slope_type < EMX_SLOPE_LINEAR || c->alibi_slope_type > EMX_SLOPE_GIVEN)
    return emxi_fail(EMX_ERR_INVALID, "model configuration: alibi_slope_type is %d, expected EMX_SLOPE_*", c->alibi_slope_type);
  const int32_t alibi_heads = emxi_alibi_heads(c);
  if (c->alibi_slope_type == EMX_SLOPE_GIVEN) {
    if (alibi_heads > EMX_MAX_ALIBI_SLOPES)
      return emxi_fail(EMX_ERR_INVALID, "model configuration: alibi_slopes for %d heads, at most %d can be given", alibi_heads,
                       EMX_MAX_ALIBI_SLOPES);
    for (int32_t h = 0; h < alibi_heads; h++)
      if (!(c->alibi_slopes[h] >= 0 && c->alibi_slopes[h] <= SLOPE_MAX))
        return emxi_fail(EMX_ERR_INVALID, "model configuration: alibi_slopes[%d] is %g, expected 0..%g", h, c->alibi_slopes[h],
                         SLOPE_MAX);
  }
  if (c->attn_scale_type < EMX_ATTN_SCALE_NONE || c->attn_scale_type > EMX_ATTN_SCALE_FOCAL)
    return emxi_fail(EMX_ERR_INVALID, "model configuration: attn_scale_type is %d, expected EMX_ATTN_SCALE_*",
                     c->attn_scale_type);
  if (c->attn_scale_type != EMX_ATTN_SCALE_NONE && emxi_scaled_heads(c) == 0)
    return emxi_fail(EMX_ERR_INVALID,
                     "model configuration: attn_scale_type %s has no head to scale: with position_type nape these are the heads "
                     "without ALiBi, and alibi_num_heads is all %d; position_type alibi scales every head",
                     scale_names[c->attn_scale_type], c->num_heads);
  if (!(c->focal_temperature >= TEMPERATURE_MIN && c->focal_temperature <= TEMPERATURE_MAX))
    return emxi_fail(EMX_ERR_INVALID, "model configuration: focal_temperature is %g, expected %g..%g", c->focal_temperature,
                     TEMPERATURE_MIN, TEMPERATURE_MAX);
  if (c->focal_learned != 0 && c->focal_learned != 1)
    return emxi_fail(EMX_ERR_INVALID, "model configuration: focal_learned is %d, expected 0 or 1", c->focal_learned);
  if (c->tie_word_embeddings != 0 && c->tie_word_embeddings != 1)
    return emxi_fail(EMX_ERR_INVALID, "model configuration: tie_word_embeddings is %d, expected 0 or 1", c->tie_word_embeddings);
  if (!(c->rms_norm_eps >= 0 && c->rms_norm_eps <= 1))
    return emxi_fail(EMX_ERR_INVALID, "model configuration: rms_norm_eps is %g, expected 0..1", c->rms_norm_eps);
  if (!emx_task_name(c->task)) return emxi_fail(EMX_ERR_INVALID, "model configuration: task is %d, expected EMX_TASK_*", c->task);
  if (!(c->entmax_alpha >= 1 && c->entmax_alpha <= 4))
    return emxi_fail(EMX_ERR_INVALID, "model configuration: entmax_alpha is %g, expected 1..4", c->entmax_alpha);
  if (c->alpha_learned != 0 && c->alpha_learned != 1)
    return emxi_fail(EMX_ERR_INVALID, "model configuration: alpha_learned is %d, expected 0 or 1", c->alpha_learned);
  if (c->alpha_learned && !(c->entmax_alpha > EMXI_LEAST_ALPHA && c->entmax_alpha < 2))
    return emxi_fail(EMX_ERR_INVALID,
                     "model configuration: entmax_alpha is %g, a learned alpha starts between %g and 2, both excluded",
                     c->entmax_alpha, EMXI_LEAST_ALPHA);
  return EMX_OK;
}

/* ---- reading. Every reader leaves the value alone on failure; the caller's sentence starts with the file's path. */

typedef struct reader {
  const char *path;
  json_t *root;
} reader;

static emx_status want(const reader *r, const char *key, json_t **out) {
  *out = json_object_get(r->root, key);
  if (!*out) return emxi_fail(EMX_ERR_FORMAT, "%s: %s is missing", r->path, key);
  return EMX_OK;
}
static emx_status read_integer(const reader *r, const char *key, int32_t min, int32_t max, int32_t *out) {
  json_t *v;
  EMX_TRY(want(r, key, &v));
  if (!json_is_integer(v)) return emxi_fail(EMX_ERR_FORMAT, "%s: %s is not an integer", r->path, key);
  json_int_t n = json_integer_value(v);
  if (n < min || n > max)
    return emxi_fail(EMX_ERR_FORMAT, "%s: %s is %lld, expected %d..%d", r->path, key, (long long)n, min, max);
  *out = (int32_t)n;
  return EMX_OK;
}
static emx_status read_number(const reader *r, const char *key, double min, double max, double *out) {
  json_t *v;
  EMX_TRY(want(r, key, &v));
  if (!json_is_number(v)) return emxi_fail(EMX_ERR_FORMAT, "%s: %s is not a number", r->path, key);
  double x = json_number_value(v);
  if (!(x >= min && x <= max)) return emxi_fail(EMX_ERR_FORMAT, "%s: %s is %g, expected %g..%g", r->path, key, x, min, max);
  *out = x;
  return EMX_OK;
}
static emx_status read_boolean(const reader *r, const char *key, int32_t *out) {
  json_t *v;
  EMX_TRY(want(r, key, &v));
  if (!json_is_boolean(v)) return emxi_fail(EMX_ERR_FORMAT, "%s: %s is not true or false", r->path, key);
  *out = json_is_true(v);
  return EMX_OK;
}
/* Exactly n numbers. */
static emx_status read_slopes(const reader *r, int32_t n, double *out) {
  json_t *v;
  EMX_TRY(want(r, "alibi_slopes", &v));
  if (!json_is_array(v) || json_array_size(v) != (size_t)n)
    return emxi_fail(EMX_ERR_FORMAT, "%s: alibi_slopes is not an array of %d numbers, one per ALiBi head", r->path, n);
  for (int32_t h = 0; h < n; h++) {
    json_t *x = json_array_get(v, (size_t)h);
    if (!json_is_number(x)) return emxi_fail(EMX_ERR_FORMAT, "%s: alibi_slopes[%d] is not a number", r->path, h);
    out[h] = json_number_value(x);
  }
  return EMX_OK;
}
/* One of n names; out: its index. */
static emx_status read_name(const reader *r, const char *key, const char *const *names, int n, int32_t *out) {
  json_t *v;
  EMX_TRY(want(r, key, &v));
  const char *s = json_string_value(v);
  if (!s) return emxi_fail(EMX_ERR_FORMAT, "%s: %s is not a string", r->path, key);
  char list[128] = "";
  size_t used = 0;
  for (int i = 0; i < n; i++) {
    if (!strcmp(s, names[i])) {
      *out = i;
      return EMX_OK;
    }
    used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", i ? ", " : "", names[i]);
  }
  return emxi_fail(EMX_ERR_FORMAT, "%s: %s is \"%.40s\", expected %s", r->path, key, s, list);
}
/* A key that says what the reader already is: absent, or exactly this. */
static emx_status read_fixed(const reader *r, const char *key, const char *value) {
  int32_t index;
  if (!json_object_get(r->root, key)) return EMX_OK;
  return read_name(r, key, &value, 1, &index);
}

/* Bytes, or the tokens of a synthetic task. */
static emx_status read_task(const reader *r, int32_t *task) {
  const char *names[16];
  int n = 0;
  *task = EMX_TASK_NONE;
  if (!json_object_get(r->root, "task")) return read_fixed(r, "tokenizer", "byte");
  for (const char *name; n < 16 && (name = emx_task_name(n)); n++) names[n] = name;
  EMX_TRY(read_name(r, "task", names, n, task));
  return read_fixed(r, "tokenizer", *task ? "task" : "byte");
}

static emx_status read_fields(const reader *r, emx_model_config *c) {
  static const char *const model_type = "libentmax", *const architecture = "LibentmaxForCausalLM";
  int32_t index;
  EMX_TRY(read_name(r, "model_type", &model_type, 1, &index));
  json_t *v = json_object_get(r->root, "architectures");
  if (v) {
    const char *s = json_string_value(json_array_get(v, 0));
    if (json_array_size(v) != 1 || !s || strcmp(s, architecture))
      return emxi_fail(EMX_ERR_FORMAT, "%s: architectures is not [\"%s\"]", r->path, architecture);
  }
  EMX_TRY(read_fixed(r, "hidden_act", "silu"));
  EMX_TRY(read_task(r, &c->task));
  for (int i = 0; i < INTEGERS; i++) EMX_TRY(read_integer(r, integers[i].key, integers[i].min, integers[i].max, integer(c, i)));
  EMX_TRY(read_number(r, "rms_norm_eps", 0, 1, &c->rms_norm_eps));
  EMX_TRY(read_number(r, "entmax_alpha", 1, 4, &c->entmax_alpha));
  if (json_object_get(r->root, "entmax_alpha_learned")) EMX_TRY(read_boolean(r, "entmax_alpha_learned", &c->alpha_learned));
  EMX_TRY(read_boolean(r, "tie_word_embeddings", &c->tie_word_embeddings));
  EMX_TRY(read_name(r, "attn_scale_type", scale_names, 4, &c->attn_scale_type));
  if (c->attn_scale_type == EMX_ATTN_SCALE_FOCAL) {
    EMX_TRY(read_number(r, "focal_temperature", TEMPERATURE_MIN, TEMPERATURE_MAX, &c->focal_temperature));
    EMX_TRY(read_boolean(r, "focal_learned", &c->focal_learned));
  }
  EMX_TRY(read_name(r, "position_type", position_names, 4, &c->position_type));
  if (c->position_type == EMX_POSITION_NAPE) {
    EMX_TRY(read_integer(r, "alibi_num_heads", 0, c->num_heads, &c->alibi_num_heads));
  } else
    c->alibi_num_heads = c->position_type == EMX_POSITION_ALIBI ? c->num_heads : 0;
  c->alibi_slope_type = EMX_SLOPE_LINEAR;
  if (c->alibi_num_heads) EMX_TRY(read_name(r, "alibi_slope_type", slope_names, 3, &c->alibi_slope_type));
  if (c->alibi_slope_type == EMX_SLOPE_GIVEN) {
    if (c->alibi_num_heads > EMX_MAX_ALIBI_SLOPES)
      return emxi_fail(EMX_ERR_FORMAT, "%s: alibi_slope_type given for %d heads, at most %d can be", r->path, c->alibi_num_heads,
                       EMX_MAX_ALIBI_SLOPES);
    EMX_TRY(read_slopes(r, c->alibi_num_heads, c->alibi_slopes));
  }
  if (c->position_type == EMX_POSITION_ROPE && json_object_get(r->root, "rope_theta")) /* absent: 10000, as elsewhere */
    EMX_TRY(read_number(r, "rope_theta", ROPE_MIN, ROPE_MAX, &c->rope_theta));
  /* What is left: relations between keys. */
  emx_status status = emx_model_config_check(c);
  if (status) return emxi_fail(status == EMX_ERR_INVALID ? EMX_ERR_FORMAT : status, "%s: %s", r->path, emx_last_error());
  return EMX_OK;
}

emx_status emxi_config_read(const char *folder, emx_model_config *c) {
  char *path = emxi_path_join(folder, "config.json");
  if (!path) return emxi_fail(EMX_ERR_NOMEM, "model folder: no memory for a path");
  emx_status status;
  char *text = NULL;
  size_t size = 0;
  status = emxi_file_read(path, 1 << 20, &text, &size);
  if (!status) {
    json_error_t e;
    reader r = {path, emxi_json_parse(text, size, &e)};
    emx_model_config read;
    emx_model_config_init(&read);
    if (!r.root && emxi_json_nomem(&e))
      status = emxi_fail(EMX_ERR_NOMEM, "%s: no memory for its text", path);
    else if (!r.root)
      status = emxi_fail(EMX_ERR_FORMAT, "%s: line %d: %s", path, e.line, e.text);
    else if (!json_is_object(r.root))
      status = emxi_fail(EMX_ERR_FORMAT, "%s: not a JSON object", path);
    else
      status = read_fields(&r, &read);
    json_decref(r.root);
    if (!status) *c = read;
  }
  emxi_free(text);
  emxi_free(path);
  return status;
}

/* ---- writing */

char *emxi_config_text(const emx_model_config *c, const char *dtype) {
  json_t *root = json_pack("{s:s, s:[s]}", "model_type", "libentmax", "architectures", "LibentmaxForCausalLM");
  int bad = !root;
  for (int i = 0; i < INTEGERS; i++)
    bad |= json_object_set_new(root, integers[i].key, json_integer(*integer((emx_model_config *)c, i)));
  bad |= json_object_set_new(root, "rms_norm_eps", json_real(c->rms_norm_eps));
  bad |= json_object_set_new(root, "tie_word_embeddings", json_boolean(c->tie_word_embeddings));
  bad |= json_object_set_new(root, "hidden_act", json_string("silu"));
  bad |= json_object_set_new(root, "torch_dtype", json_string(dtype));
  bad |= json_object_set_new(root, "entmax_alpha", json_real(c->entmax_alpha));
  if (c->alpha_learned) bad |= json_object_set_new(root, "entmax_alpha_learned", json_true());
  bad |= json_object_set_new(root, "attn_scale_type", json_string(scale_names[c->attn_scale_type]));
  bad |= json_object_set_new(root, "position_type", json_string(position_names[c->position_type]));
  bad |= json_object_set_new(root, "alibi_num_heads", json_integer(c->alibi_num_heads));
  bad |= json_object_set_new(root, "alibi_slope_type", json_string(slope_names[c->alibi_slope_type]));
  if (c->alibi_slope_type == EMX_SLOPE_GIVEN && emxi_alibi_heads(c)) {
    json_t *slopes = json_array();
    for (int32_t h = 0; h < emxi_alibi_heads(c); h++) bad |= json_array_append_new(slopes, json_real(c->alibi_slopes[h]));
    bad |= json_object_set_new(root, "alibi_slopes", slopes);
  }
  if (c->position_type == EMX_POSITION_ROPE) bad |= json_object_set_new(root, "rope_theta", json_real(c->rope_theta));
  if (c->attn_scale_type == EMX_ATTN_SCALE_FOCAL) {
    bad |= json_object_set_new(root, "focal_temperature", json_real(c->focal_temperature));
    bad |= json_object_set_new(root, "focal_learned", json_boolean(c->focal_learned));
  }
  bad |= json_object_set_new(root, "tokenizer", json_string(c->task ? "task" : "byte"));
  if (c->task) bad |= json_object_set_new(root, "task", json_string(emx_task_name(c->task)));
  char *text = bad ? NULL : emxi_json_text(root, JSON_INDENT(2));
  json_decref(root);
  return text;
}

emx_status emxi_config_write(const char *folder, const emx_model_config *c, int32_t save_dtype) {
  EMX_TRY(emx_model_config_check(c));
  const char *dtype = save_dtype == EMX_F32    ? "float32"
                      : save_dtype == EMX_F16  ? "float16"
                      : save_dtype == EMX_BF16 ? "bfloat16"
                                               : NULL;
  if (!dtype) return emxi_fail(EMX_ERR_DTYPE, "config.json: dtype %d, expected f32, f16 or bf16", save_dtype);
  char *text = emxi_config_text(c, dtype), *path = emxi_path_join(folder, "config.json");
  emx_status status = EMX_OK;
  if (!text || !path)
    status = emxi_fail(EMX_ERR_NOMEM, "config.json: no memory for its text");
  else
    status = emxi_file_replace(path, (emxi_bytes[]){{text, strlen(text)}, {"\n", 1}}, 2);
  emxi_free(path);
  emxi_free(text);
  return status;
}
