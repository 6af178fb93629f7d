/* SPDX-License-Identifier: Apache-2.0
 * The parameters of a model: names, shapes and places in one flat array. */
#include "base/num.h"
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { LAYER_TENSORS = 14 /* at most */ };

/* One layer's tensors in flat order; cols 0: a vector. */
typedef struct shape {
  const char *name;
  size_t field; /* in emxi_layer */
  int64_t rows, cols;
  int32_t start;
  double value;
} shape;
static int layer_shapes(const emx_model_config *c, shape s[LAYER_TENSORS]) {
  const int64_t w = c->hidden_size, f = c->intermediate_size, q = (int64_t)c->num_heads * c->head_dim,
                kv = (int64_t)c->num_kv_heads * c->head_dim, e = emxi_scaled_heads(c);
  int n = 0;
#define TENSOR(field, name, ...) s[n++] = (shape){name, offsetof(emxi_layer, field), __VA_ARGS__}
  TENSOR(input_norm, "input_layernorm.weight", w, 0, EMXI_START_NORM, 1);
  TENSOR(wq, "self_attn.q_proj.weight", q, w, EMXI_START_NORMAL, 0);
  TENSOR(wk, "self_attn.k_proj.weight", kv, w, EMXI_START_NORMAL, 0);
  TENSOR(wv, "self_attn.v_proj.weight", kv, w, EMXI_START_NORMAL, 0);
  if (c->attn_scale_type == EMX_ATTN_SCALE_ASENTMAX) {
    TENSOR(theta_w, "self_attn.beta_proj.weight", e, w, EMXI_START_SCALAR, 0);
    TENSOR(theta_v, "self_attn.gamma_proj.weight", e, w, EMXI_START_SCALAR, 0);
  }
  TENSOR(wo, "self_attn.o_proj.weight", w, q, EMXI_START_RESIDUAL, 0);
  TENSOR(post_norm, "post_attention_layernorm.weight", w, 0, EMXI_START_NORM, 1);
  TENSOR(gate, "mlp.gate_proj.weight", f, w, EMXI_START_NORMAL, 0);
  TENSOR(up, "mlp.up_proj.weight", f, w, EMXI_START_NORMAL, 0);
  TENSOR(down, "mlp.down_proj.weight", w, f, EMXI_START_RESIDUAL, 0);
  if (c->alpha_learned)
    TENSOR(alpha, "self_attn.entmax_alpha_logit", c->num_heads, 0, EMXI_START_SCALAR,
           log((c->entmax_alpha - 1) / (2 - c->entmax_alpha)));
  if (c->attn_scale_type == EMX_ATTN_SCALE_ASENTMAX) { /* softplus(b) = 0.05: theta is 1.05 everywhere */
    TENSOR(theta_b, "self_attn.beta_proj.bias", e, 0, EMXI_START_SCALAR, log(expm1(0.05)));
    TENSOR(theta_c, "self_attn.gamma_proj.bias", e, 0, EMXI_START_SCALAR, 0);
  } else if (c->attn_scale_type == EMX_ATTN_SCALE_SSMAX) { /* theta is 1 at the end of a training sequence */
    TENSOR(theta_b, "self_attn.ssmax_scale", e, 0, EMXI_START_SCALAR, 1 / log(1.0 + c->max_position));
  } else if (c->attn_scale_type == EMX_ATTN_SCALE_FOCAL && c->focal_learned)
    TENSOR(theta_b, "self_attn.focal_log_temperature", e, 0, EMXI_START_SCALAR, log(c->focal_temperature));
#undef TENSOR
  return n;
}
static int64_t elements(const shape *s) { return s->rows * (s->cols ? s->cols : 1); }

int64_t emxi_param_tensors(const emx_model_config *c) {
  shape layer[LAYER_TENSORS];
  return 2 + (int64_t)layer_shapes(c, layer) * c->num_layers + (c->tie_word_embeddings ? 0 : 1);
}

void emxi_param_at(const emx_model_config *c, int64_t i, emxi_param *out) {
  shape layer[LAYER_TENSORS], table = {"", 0, c->vocab_size, c->hidden_size, EMXI_START_NORMAL, 0}, s;
  const int64_t per_layer = layer_shapes(c, layer), last = 1 + per_layer * c->num_layers;
  int64_t layer_size = 0;
  for (int64_t j = 0; j < per_layer; j++) layer_size += elements(&layer[j]);

  *out = (emxi_param){.offset = elements(&table)};
  if (i == 0) {
    s = table;
    out->offset = 0;
    snprintf(out->name, sizeof out->name, "model.embed_tokens.weight");
  } else if (i < last) {
    int64_t l = (i - 1) / per_layer, j = (i - 1) % per_layer;
    s = layer[j];
    out->offset += l * layer_size;
    for (int64_t t = 0; t < j; t++) out->offset += elements(&layer[t]);
    snprintf(out->name, sizeof out->name, "model.layers.%d.%s", (int)l, s.name);
  } else {
    out->offset += c->num_layers * layer_size;
    if (i == last) {
      s = (shape){"", 0, c->hidden_size, 0, EMXI_START_NORM, 1};
      snprintf(out->name, sizeof out->name, "model.norm.weight");
    } else {
      s = table;
      out->offset += c->hidden_size;
      snprintf(out->name, sizeof out->name, "lm_head.weight");
    }
  }
  out->ndim = s.cols ? 2 : 1;
  out->shape[0] = s.rows;
  out->shape[1] = s.cols;
  out->count = elements(&s);
  out->decay = s.cols != 0;
  out->start = s.start;
  out->value = (float)s.value;
}

int64_t emx_model_config_parameters(const emx_model_config *c) {
  if (emx_model_config_check(c)) return 0;
  emx_model_config config; /* as this version has it */
  emxi_struct_init(&config, sizeof config, c, c->struct_size);
  emxi_param last;
  emxi_param_at(&config, emxi_param_tensors(&config) - 1, &last);
  return last.offset + last.count;
}

emx_status emxi_weights_create(const emx_model_config *c, float *data, emxi_weights *w) {
  EMX_TRY(emx_model_config_check(c));
  emxi_weights r = {.count = emx_model_config_parameters(c), .data = data, .owns_data = !data};
  size_t bytes = (size_t)c->num_layers * sizeof *r.layers;
  r.layers = emxi_calloc(bytes);
  if (!r.layers) return emxi_fail(EMX_ERR_NOMEM, "model weights: no memory for %zu bytes", bytes);
  if (!data) {
    bytes = (size_t)r.count * sizeof *r.data;
    r.data = emxi_calloc(bytes);
    if (!r.data) {
      emxi_free(r.layers);
      return emxi_fail(EMX_ERR_NOMEM, "model weights: no memory for %zu bytes", bytes);
    }
  }
  float *p = r.data;
  shape s[LAYER_TENSORS];
  const int per_layer = layer_shapes(c, s);
  const int64_t table = (int64_t)c->vocab_size * c->hidden_size;
  r.embed = p;
  p += table;
  for (int32_t l = 0; l < c->num_layers; l++)
    for (int j = 0; j < per_layer; j++) {
      memcpy((char *)&r.layers[l] + s[j].field, &p, sizeof p);
      p += elements(&s[j]);
    }
  r.norm = p;
  p += c->hidden_size;
  r.head = c->tie_word_embeddings ? r.embed : p;
  *w = r;
  return EMX_OK;
}

void emxi_weights_destroy(emxi_weights *w) {
  if (w->owns_data) emxi_free(w->data);
  emxi_free(w->layers);
  *w = (emxi_weights){0};
}

int32_t emxi_alibi_heads(const emx_model_config *c) {
  return c->position_type == EMX_POSITION_NAPE ? c->alibi_num_heads : c->position_type == EMX_POSITION_ALIBI ? c->num_heads : 0;
}
void emxi_alibi_slopes(const emx_model_config *c, float *slopes) {
  const int32_t n = emxi_alibi_heads(c);
  for (int32_t h = 0; h < c->num_heads; h++)
    slopes[h] = h >= n                                   ? 0
                : c->alibi_slope_type == EMX_SLOPE_GIVEN ? (float)c->alibi_slopes[h]
                : c->alibi_slope_type == EMX_SLOPE_EXP   ? ldexpf(1, -h)
                                                         : 1.0f / (float)(h + 1);
}
int32_t emxi_scaled_heads(const emx_model_config *c) {
  return c->attn_scale_type == EMX_ATTN_SCALE_NONE ? 0
         : c->position_type == EMX_POSITION_NAPE   ? c->num_heads - c->alibi_num_heads
                                                   : c->num_heads;
}

void emxi_learned_alphas(const emx_model_config *c, const emxi_layer *w, double *alphas, double *slopes) {
  for (int32_t h = 0; h < c->num_heads; h++) {
    const double s = 1 / (1 + exp(-(double)w->alpha[h])), least = EMXI_LEAST_ALPHA - 1;
    alphas[h] = 1 + (s > least ? s : least);
    if (slopes) slopes[h] = s > least ? s * (1 - s) : 0;
  }
}

/* ---- on disk */

static const char *dims(const emx_tensor *t, char text[64]) {
  if (t->ndim == 1)
    snprintf(text, 64, "[%lld]", (long long)t->shape[0]);
  else if (t->ndim == 2)
    snprintf(text, 64, "[%lld,%lld]", (long long)t->shape[0], (long long)t->shape[1]);
  else
    snprintf(text, 64, "%d dimensions", t->ndim);
  return text;
}

emx_status emxi_weights_check(const emx_checkpoint *ck, const emx_model_config *c) {
  EMX_TRY(emx_model_config_check(c));
  const int64_t n = emxi_param_tensors(c), have = emx_checkpoint_count(ck);
  /* Missing tensors first: a config with more layers than the file is refused before anything of its size is allocated. */
  for (int64_t i = 0; i < n; i++) {
    emxi_param p;
    emx_tensor t;
    emxi_param_at(c, i, &p);
    if (emx_checkpoint_find(ck, p.name, &t)) return emxi_fail(EMX_ERR_FORMAT, "model weights: tensor %s is missing", p.name);
    emx_tensor expected = emx_tensor_view(NULL, t.dtype, p.ndim, p.shape);
    char got[64], want[64];
    if (t.ndim != p.ndim || t.shape[0] != p.shape[0] || (p.ndim == 2 && t.shape[1] != p.shape[1]))
      return emxi_fail(EMX_ERR_FORMAT, "model weights: tensor %s has shape %s, config.json implies %s", p.name, dims(&t, got),
                       dims(&expected, want));
    if (t.dtype != EMX_F32 && t.dtype != EMX_F16 && t.dtype != EMX_BF16)
      return emxi_fail(EMX_ERR_FORMAT, "model weights: tensor %s is %s, expected f32, f16 or bf16", p.name,
                       emx_dtype_name(t.dtype));
  }
  if (have == n) return EMX_OK;
  bool *known = emxi_calloc((size_t)have);
  if (!known) return emxi_fail(EMX_ERR_NOMEM, "model weights: no memory for %lld bytes", (long long)have);
  for (int64_t i = 0; i < n; i++) {
    emxi_param p;
    emxi_param_at(c, i, &p);
    known[emxi_checkpoint_index(ck, p.name)] = true;
  }
  int64_t extra = 0;
  while (known[extra]) extra++;
  emxi_free(known);
  const char *name;
  emx_tensor t;
  EMX_TRY(emx_checkpoint_get(ck, extra, &name, &t));
  return emxi_fail(EMX_ERR_FORMAT, "model weights: config.json implies no tensor named %.200s", name);
}

emx_status emxi_weights_load(const emx_checkpoint *ck, const emx_model_config *c, float *data) {
  EMX_TRY(emxi_weights_check(ck, c));
  for (int64_t i = 0; i < emxi_param_tensors(c); i++) {
    emxi_param p;
    emx_tensor t;
    emxi_param_at(c, i, &p);
    EMX_TRY(emx_checkpoint_find(ck, p.name, &t));
    float *out = data + p.offset;
    if (t.dtype == EMX_F32) {
      memcpy(out, t.data, (size_t)p.count * sizeof *out);
      continue;
    }
    for (int64_t j = 0; j < p.count; j++) {
      uint16_t h; /* foreign files need not align their tensors */
      memcpy(&h, (const char *)t.data + 2 * j, 2);
      out[j] = t.dtype == EMX_F16 ? emxi_f16_to_f32(h) : emxi_bf16_to_f32(h);
    }
  }
  return EMX_OK;
}

emx_status emxi_weights_save(const char *path, const emx_model_config *c, const float *data, int32_t dtype,
                             const char *const *metadata, int64_t n_metadata) {
  EMX_TRY(emx_model_config_check(c));
  if (dtype != EMX_F32 && dtype != EMX_F16 && dtype != EMX_BF16)
    return emxi_fail(EMX_ERR_DTYPE, "%s: dtype %d, expected f32, f16 or bf16", path, dtype);
  const int64_t n = emxi_param_tensors(c), count = emx_model_config_parameters(c);
  const size_t size = emx_dtype_size(dtype), bytes = dtype == EMX_F32 ? 0 : (size_t)count * size;
  emx_named_tensor *tensors = emxi_calloc((size_t)n * sizeof *tensors);
  emxi_param *params = emxi_calloc((size_t)n * sizeof *params);
  uint16_t *narrow = emxi_alloc(bytes);
  emx_status status;
  if (!tensors || !params || !narrow)
    status =
        emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", path, bytes + (size_t)n * (sizeof *tensors + sizeof *params));
  else {
    if (bytes)
      for (int64_t i = 0; i < count; i++) narrow[i] = dtype == EMX_F16 ? emxi_f32_to_f16(data[i]) : emxi_f32_to_bf16(data[i]);
    for (int64_t i = 0; i < n; i++) {
      emxi_param_at(c, i, &params[i]);
      void *p = bytes ? (void *)(narrow + params[i].offset) : (void *)(data + params[i].offset);
      tensors[i] = (emx_named_tensor){params[i].name, emx_tensor_view(p, dtype, params[i].ndim, params[i].shape)};
    }
    status = emx_checkpoint_write(path, tensors, n, metadata, n_metadata);
  }
  emxi_free(narrow);
  emxi_free(params);
  emxi_free(tensors);
  return status;
}
