/* SPDX-License-Identifier: Apache-2.0
 * A model folder, opened. */
#include "base/backend.h"
#include "block.h"

#include <stdio.h>
#include <string.h>

/* What runs the model on the context's device, before memory is taken for the weights: a GPU's may be missing. */
static emx_status open_blocks(emx_model *model) {
  emx_ctx *ctx = model->ctx;
  model->blocks = ctx->device == EMX_DEVICE_CPU ? &emxi_blocks_cpu : ctx->backend->blocks;
  if (!model->blocks)
    return emxi_fail(EMX_ERR_UNSUPPORTED,
                     "emx_model_open: this build cannot run models on a GPU: it was made without cublasLt.h; use a CPU context");
  EMXI_LOCKED(ctx, model->blocks->open(ctx, &model->config, &model->blocks_state));
}

/* The weights where the device reads them. */
static emx_status place_weights(emx_model *model) {
  emx_ctx *ctx = model->ctx;
  float *data = model->w.data;
  if (ctx->device != EMX_DEVICE_CPU) {
    const size_t bytes = (size_t)model->w.count * sizeof *data;
    void *p = NULL;
    EMX_TRY(ctx->backend->memory_alloc(ctx, bytes, &p));
    const emx_status status = ctx->backend->memory_copy(ctx, p, model->w.data, bytes);
    if (status) {
      ctx->backend->memory_free(ctx, p);
      return status;
    }
    data = p;
  }
  const emx_status status = emxi_weights_create(&model->config, data, &model->on_device);
  if (status && data != model->w.data) ctx->backend->memory_free(ctx, data);
  return status;
}

emx_status emx_model_open(emx_ctx *ctx, const char *folder, emx_model **out) {
  if (!ctx || !folder || !out)
    return emxi_fail(EMX_ERR_INVALID, "emx_model_open: %s is NULL", !ctx ? "ctx" : !folder ? "folder" : "out");
  emx_model_config config;
  EMX_TRY(emxi_config_read(folder, &config));
  char *path = emxi_path_join(folder, "model.safetensors");
  if (!path) return emxi_fail(EMX_ERR_NOMEM, "emx_model_open: no memory for a path");
  emx_checkpoint *ck = NULL;
  emx_model *model = NULL;
  emx_status status = emx_checkpoint_open(path, &ck);
  /* Before memory is taken: a small file with a huge config is a bad file, not a shortage. */
  if (!status && (status = emxi_weights_check(ck, &config))) status = emxi_fail(status, "%s: %s", path, emx_last_error());
  if (!status && !(model = emxi_calloc(sizeof *model)))
    status = emxi_fail(EMX_ERR_NOMEM, "emx_model_open: no memory for %zu bytes", sizeof *model);
  if (!status) {
    model->ctx = ctx;
    model->config = config;
    status = open_blocks(model);
  }
  if (!status) status = emxi_weights_create(&config, NULL, &model->w);
  if (!status) status = emxi_weights_load(ck, &config, model->w.data);
  if (!status) status = place_weights(model);
  emx_checkpoint_close(ck);
  emxi_free(path);
  if (status)
    emx_model_close(model);
  else
    *out = model;
  return status;
}

void emx_model_close(emx_model *model) {
  if (!model) return;
  if (model->on_device.data != model->w.data) model->ctx->backend->memory_free(model->ctx, model->on_device.data);
  emxi_weights_destroy(&model->on_device);
  emxi_weights_destroy(&model->w);
  if (model->blocks_state) model->blocks->close(model->ctx, model->blocks_state);
  emxi_free(model);
}

emx_status emx_model_get_config(const emx_model *model, emx_model_config *config) {
  if (!model) return emxi_fail(EMX_ERR_INVALID, "emx_model_get_config: model is NULL");
  EMXI_CHECK_STRUCT(config, emx_model_config);
  emxi_struct_write(config, &model->config, sizeof model->config);
  return EMX_OK;
}

const char *emxi_model_identity(emx_model *model) {
  if (model->identity[0]) return model->identity;
  char *config = emxi_config_text(&model->config, "float32"); /* in memory the weights are f32, whatever the file holds */
  if (!config) return NULL;
  emxi_hash hash;
  uint8_t digest[EMXI_HASH_SIZE];
  emxi_hash_init(&hash);
  emxi_hash_add(&hash, config, strlen(config) + 1);
  emxi_hash_add(&hash, model->w.data, (size_t)model->w.count * sizeof *model->w.data);
  emxi_hash_end(&hash, digest);
  for (int i = 0; i < EMXI_HASH_SIZE; i++) snprintf(model->identity + 2 * i, 3, "%02x", digest[i]);
  emxi_free(config);
  return model->identity;
}
