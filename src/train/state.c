/* SPDX-License-Identifier: Apache-2.0
 * The trainer's folder: config.json, model.safetensors for inference, trainer.safetensors to continue from.
 *
 * trainer.safetensors: f32 tensors weights, moment1, moment2 [P] in flat order; metadata: format_version, step, every option,
 * the configuration, size and hash of the data. It holds all that a resume needs besides config.json, and it is written last: a
 * crash between the files leaves the previous state, complete, next to a newer model. */
#include "train.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char *const tensor_names[3] = {"weights", "moment1", "moment2"};

typedef struct entry {
  const char *key, *about; /* about: what differs when the value does */
  char value[48];
} entry;
enum { MAX_ENTRIES = 48 };

static int describe(const emx_trainer *t, entry e[MAX_ENTRIES]) {
  const emx_train_opts *o = &t->opts;
  const emx_model_config *c = &t->config;
  int n = 0;
#define ENTRY(name, what, format, x)                      \
  do {                                                    \
    e[n].key = name;                                      \
    e[n].about = what;                                    \
    snprintf(e[n++].value, sizeof e[0].value, format, x); \
  } while (0)
#define OPTION_INT(field) ENTRY("opts." #field, "the option " #field, "%" PRId64, (int64_t)o->field)
#define OPTION_REAL(field) ENTRY("opts." #field, "the option " #field, "%.17g", o->field)
#define CONFIG_INT(field) ENTRY("config." #field, "the configuration's " #field, "%" PRId64, (int64_t)c->field)
#define CONFIG_REAL(field) ENTRY("config." #field, "the configuration's " #field, "%.17g", c->field)
  ENTRY("format_version", "the version of the file format", "%d", 1);
  CONFIG_INT(vocab_size);
  CONFIG_INT(hidden_size);
  CONFIG_INT(intermediate_size);
  CONFIG_INT(num_layers);
  CONFIG_INT(num_heads);
  CONFIG_INT(num_kv_heads);
  CONFIG_INT(head_dim);
  CONFIG_INT(position_type);
  CONFIG_INT(alibi_num_heads);
  CONFIG_INT(alibi_slope_type);
  CONFIG_INT(attn_scale_type);
  CONFIG_INT(tie_word_embeddings);
  CONFIG_INT(max_position);
  CONFIG_REAL(rms_norm_eps);
  CONFIG_REAL(entmax_alpha);
  /* Where they mean something: folders from before these keys existed can still be continued. */
  if (c->alpha_learned) CONFIG_INT(alpha_learned);
  if (c->position_type == EMX_POSITION_ROPE) CONFIG_REAL(rope_theta);
  if (c->attn_scale_type == EMX_ATTN_SCALE_FOCAL) {
    CONFIG_REAL(focal_temperature);
    CONFIG_INT(focal_learned);
  }
  if (c->alibi_slope_type == EMX_SLOPE_GIVEN) {
    uint64_t hash = 14695981039346656037u; /* FNV-1a of the numbers' bytes */
    for (size_t i = 0; i < (size_t)c->alibi_num_heads * sizeof *c->alibi_slopes; i++)
      hash = (hash ^ ((const unsigned char *)c->alibi_slopes)[i]) * 1099511628211u;
    ENTRY("config.alibi_slopes", "the configuration's alibi_slopes (their hash)", "%016" PRIx64, hash);
  }
  OPTION_INT(save_dtype);
  OPTION_INT(steps);
  OPTION_INT(warmup);
  OPTION_INT(length);
  OPTION_INT(batch);
  OPTION_INT(long_length);
  OPTION_INT(long_every);
  OPTION_REAL(lr);
  OPTION_REAL(min_lr);
  OPTION_REAL(beta1);
  OPTION_REAL(beta2);
  OPTION_REAL(eps);
  OPTION_REAL(weight_decay);
  OPTION_REAL(clip);
  OPTION_REAL(embed_dropout);
  OPTION_REAL(head_dropout);
  ENTRY("opts.seed", "the option seed", "%" PRIu64, o->seed);
  if (t->task.kind) {
    ENTRY("data.task", "the task", "%s", emx_task_name(t->task.kind));
    ENTRY("data.split", "the split of the task", "%d", t->task.split);
    ENTRY("data.seed", "the seed of the task", "%" PRIu64, t->task.seed);
    ENTRY("data.min_length", "the shortest length of the task", "%" PRId64, t->task.min_length);
    ENTRY("data.max_length", "the longest length of the task", "%" PRId64, t->task.max_length);
    ENTRY("data.answers", "the task's number of answers", "%d", t->task.answers);
    ENTRY("data.p_write", "the task's p_write", "%.17g", t->task.p_write);
    return n;
  }
  ENTRY("data.files", "the number of files of the data", "%" PRId64, t->data.n);
  ENTRY("data.bytes", "the size of the data", "%" PRId64, t->data.bytes);
  ENTRY("data.hash", "the content of the data (its hash)", "%016" PRIx64, t->data.hash);
#undef ENTRY
#undef OPTION_INT
#undef OPTION_REAL
#undef CONFIG_INT
#undef CONFIG_REAL
  return n;
}

static emx_status save_files(const emx_trainer *t, const char *folder, const char *model, const char *state) {
  entry e[MAX_ENTRIES];
  const int n = describe(t, e);
  char step[32];
  snprintf(step, sizeof step, "%" PRId64, t->step);
  const char *metadata[2 * (MAX_ENTRIES + 1)] = {"step", step};
  for (int i = 0; i < n; i++) {
    metadata[2 * i + 2] = e[i].key;
    metadata[2 * i + 3] = e[i].value;
  }
  float *const arrays[3] = {t->net.w.data, t->adamw.m, t->adamw.v};
  emx_named_tensor tensors[3];
  for (int i = 0; i < 3; i++)
    tensors[i] = (emx_named_tensor){tensor_names[i], emx_tensor_view(arrays[i], EMX_F32, 1, &t->net.w.count)};
  /* The large file first: where the disk is too small for it, a first save leaves no model that could not be continued. */
  EMX_TRY(emxi_config_write(folder, &t->config, t->opts.save_dtype));
  EMX_TRY(emx_checkpoint_write(state, tensors, 3, metadata, n + 1));
  return emxi_weights_save(model, &t->config, t->net.w.data, t->opts.save_dtype, metadata, 1);
}

emx_status emxi_state_save(const emx_trainer *t, const char *folder) {
  if (t->nonfinite) return emxi_fail(EMX_ERR_NONFINITE, "%s: not saved, training met a NaN or an infinity", folder);
  for (int64_t i = 0; i < t->net.w.count; i++)
    if (!isfinite(t->net.w.data[i]))
      return emxi_fail(EMX_ERR_NONFINITE, "%s: not saved, a weight is %g", folder, (double)t->net.w.data[i]);
  if (mkdir(folder, 0777) && errno != EEXIST)
    return emxi_fail(EMX_ERR_IO, "%s: the folder cannot be created: %s", folder, strerror(errno));
  char *model = emxi_path_join(folder, "model.safetensors"), *state = emxi_path_join(folder, "trainer.safetensors");
  emx_status status =
      model && state ? save_files(t, folder, model, state) : emxi_fail(EMX_ERR_NOMEM, "%s: no memory for a path", folder);
  emxi_free(model);
  emxi_free(state);
  return status;
}

emx_status emxi_state_open(const char *folder, emx_checkpoint **ck, char **path) {
  char *name = emxi_path_join(folder, "trainer.safetensors");
  if (!name) return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for a path", folder);
  emx_status status = emx_checkpoint_open(name, ck);
  if (status)
    emxi_free(name);
  else
    *path = name;
  return status;
}

emx_status emxi_state_check(const emx_checkpoint *ck, const char *path, const emx_trainer *t, int64_t *step) {
  entry e[MAX_ENTRIES];
  const int n = describe(t, e);
  for (int i = 0; i < n; i++) {
    const char *was = emx_checkpoint_metadata(ck, e[i].key);
    if (!was && (!strcmp(e[i].key, "opts.embed_dropout") || !strcmp(e[i].key, "opts.head_dropout")))
      was = "0"; /* files of the time before the options */
    if (!was) return emxi_fail(EMX_ERR_FORMAT, "%s: %s is missing; not a trainer's state", path, e[i].key);
    if (strcmp(was, e[i].value)) /* the version and config.json come from files, the rest from the caller */
      return emxi_fail(i == 0 || !strncmp(e[i].key, "config.", 7) ? EMX_ERR_FORMAT : EMX_ERR_INVALID,
                       "%s: %s was %.60s, now it is %s", path, e[i].about, was, e[i].value);
  }
  const char *text = emx_checkpoint_metadata(ck, "step");
  char *end = NULL;
  errno = 0;
  const long long done = text && *text >= '0' && *text <= '9' ? strtoll(text, &end, 10) : -1;
  if (done < 0 || errno || *end || done > t->opts.steps)
    return emxi_fail(EMX_ERR_FORMAT, "%s: step is %.40s, expected 0..%" PRId64, path, text ? text : "missing", t->opts.steps);
  const int64_t count = emx_model_config_parameters(&t->config);
  if (emx_checkpoint_count(ck) != 3)
    return emxi_fail(EMX_ERR_FORMAT, "%s: %" PRId64 " tensors, expected 3", path, emx_checkpoint_count(ck));
  for (int i = 0; i < 3; i++) {
    emx_tensor v;
    if (emx_checkpoint_find(ck, tensor_names[i], &v))
      return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s is missing", path, tensor_names[i]);
    if (v.dtype != EMX_F32 || v.ndim != 1 || v.shape[0] != count)
      return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s is not f32 [%" PRId64 "]", path, tensor_names[i], count);
  }
  *step = done;
  return EMX_OK;
}

emx_status emxi_state_load(const emx_checkpoint *ck, const char *path, emx_trainer *t) {
  float *const arrays[3] = {t->net.w.data, t->adamw.m, t->adamw.v};
  for (int i = 0; i < 3; i++) {
    emx_tensor v;
    EMX_TRY(emx_checkpoint_find(ck, tensor_names[i], &v));
    memcpy(arrays[i], v.data, (size_t)t->net.w.count * sizeof(float));
    for (int64_t j = 0; j < t->net.w.count; j++)
      if (!isfinite(arrays[i][j]))
        return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s holds %g", path, tensor_names[i], (double)arrays[i][j]);
  }
  return EMX_OK;
}
