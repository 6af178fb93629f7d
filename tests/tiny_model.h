/* A model small enough to be written in a test: random weights that make attention sparse. */
#ifndef TINY_MODEL_H
#define TINY_MODEL_H

#include "base/num.h"
#include "model/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static inline emx_model_config tiny_config(void) {
  emx_model_config c;
  emx_model_config_init(&c);
  c.vocab_size = 50;
  c.hidden_size = 64;
  c.intermediate_size = 96;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 16;
  c.alibi_num_heads = 2;
  return c;
}
/* Writes config.json and model.safetensors into an existing folder; false if that fails. queries: how many times as long as
 * usual they are. */
static inline bool tiny_write_scaled(const char *folder, const emx_model_config *c, uint64_t seed, float queries) {
  const int64_t count = emx_model_config_parameters(c);
  float *w = malloc((size_t)count * sizeof *w);
  if (!w) return false;
  emxi_normals(seed, 0, w, count);
  for (int64_t i = 0; i < emxi_param_tensors(c); i++) {
    emxi_param p;
    emxi_param_at(c, i, &p);
    const float scale = (p.decay ? 1.5f / sqrtf((float)p.shape[1]) : .1f) * (strstr(p.name, "q_proj") ? queries : 1);
    for (int64_t j = 0; j < p.count; j++) w[p.offset + j] = w[p.offset + j] * scale + (p.decay ? 0 : 1);
  }
  char path[300];
  snprintf(path, sizeof path, "%s/model.safetensors", folder);
  const bool good = !emxi_config_write(folder, c, EMX_F32) && !emxi_weights_save(path, c, w, EMX_F32, NULL, 0);
  free(w);
  return good;
}
static inline bool tiny_write(const char *folder, const emx_model_config *c, uint64_t seed) {
  return tiny_write_scaled(folder, c, seed, 1);
}
static inline void tiny_remove(const char *folder) {
  char path[300];
  snprintf(path, sizeof path, "%s/model.safetensors", folder);
  remove(path);
  snprintf(path, sizeof path, "%s/config.json", folder);
  remove(path);
}

#endif
