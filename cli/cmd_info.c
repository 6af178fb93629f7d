/* SPDX-License-Identifier: Apache-2.0
 * emx info: the library and the machine, a model folder, or the tensors of a safetensors file. */
#define _GNU_SOURCE
#include "attention.h"

#include <stdlib.h>
#include <unistd.h>

typedef struct options {
  cli_common common;
  const char *model, *file;
} options;
static const struct argp_option option_table[] = {{"model", 'm', "DIR", 0, "A model folder: its shape, alpha and positions", 1},
                                                  {"file", 'f', "FILE", 0, "A safetensors file: its tensors", 1},
                                                  {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &o->common; return 0;
    case 'm': o->model = arg; return 0;
    case 'f': o->file = arg; return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

static int show_library(const options *o, emx_ctx *ctx) {
  emx_ctx_info info = {.struct_size = sizeof info};
  int code = cli_status(emx_ctx_get_info(ctx, &info));
  if (code) return code;
  long long memory = (long long)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
  /* The first GPU, or why there is none. */
  emx_ctx *gpu = NULL;
  emx_ctx_opts opts;
  emx_ctx_info cuda = {.struct_size = sizeof cuda};
  emx_ctx_opts_init(&opts);
  opts.device = EMX_DEVICE_CUDA;
  const bool there = !emx_ctx_create(&opts, &gpu) && !emx_ctx_get_info(gpu, &cuda);
  emx_ctx_destroy(gpu);
  if (o->common.json)
    return cli_json_line(json_pack("{s:s, s:i, s:s, s:s, s:s, s:i, s:I, s:o, s:o}", "version", emx_version(), "abi",
                                   (int)emx_abi_version(), "device", info.device == EMX_DEVICE_CPU ? "cpu" : "cuda",
                                   "device_name", info.device_name, "isa", info.isa, "threads", (int)info.threads, "memory",
                                   (json_int_t)memory, "cuda", there ? json_string(cuda.device_name) : json_null(),
                                   "cuda_missing", there ? json_null() : json_string(emx_last_error())));
  printf("libentmax %s (ABI %d)\n", emx_version(), (int)emx_abi_version());
  printf("device    cpu: %s\nkernels   %s (EMX_ISA chooses)\nthreads   %d (EMX_THREADS or -t chooses)\nmemory    %lld bytes\n",
         info.device_name, info.isa, (int)info.threads, memory);
  if (there)
    printf("cuda      %s, %s\n", cuda.device_name, cuda.isa);
  else
    printf("cuda      none: %s\n", emx_last_error());
  return cli_flush();
}

static int show_model(const options *o, emx_ctx *ctx) {
  emx_model *model;
  int code = cli_status(emx_model_open(ctx, o->model, &model));
  if (code) return code;
  emx_model_config c = {.struct_size = sizeof c};
  code = cli_status(emx_model_get_config(model, &c));
  if (code) goto done;
  const json_int_t parameters = emx_model_config_parameters(&c);
  const char *position = cli_position_name(c.position_type), *slope = cli_slope_name(c.alibi_slope_type),
             *scale = cli_scale_name(c.attn_scale_type);
  const bool given = c.alibi_slope_type == EMX_SLOPE_GIVEN, rope = c.position_type == EMX_POSITION_ROPE,
             focal = c.attn_scale_type == EMX_ATTN_SCALE_FOCAL;
  if (o->common.json) {
    json_t *j = json_pack("{s:s, s:I, s:f, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:i, s:s, s:s, s:b, s:i}", "model", o->model,
                          "parameters", parameters, "entmax_alpha", c.entmax_alpha, "vocab_size", c.vocab_size, "hidden_size",
                          c.hidden_size, "intermediate_size", c.intermediate_size, "num_layers", c.num_layers, "num_heads",
                          c.num_heads, "num_kv_heads", c.num_kv_heads, "head_dim", c.head_dim, "position_type", position,
                          "alibi_num_heads", c.alibi_num_heads, "alibi_slope_type", slope, "attn_scale_type", scale,
                          "tie_word_embeddings", c.tie_word_embeddings, "max_position", c.max_position);
    if (given) {
      json_t *list = json_array();
      for (int32_t h = 0; h < c.alibi_num_heads; h++) json_array_append_new(list, json_real(c.alibi_slopes[h]));
      json_object_set_new(j, "alibi_slopes", list);
    }
    if (c.alpha_learned) json_object_set_new(j, "entmax_alpha_learned", json_true());
    if (c.task) json_object_set_new(j, "task", json_string(emx_task_name(c.task)));
    if (rope) json_object_set_new(j, "rope_theta", json_real(c.rope_theta));
    if (focal) {
      json_object_set_new(j, "focal_temperature", json_real(c.focal_temperature));
      json_object_set_new(j, "focal_learned", json_boolean(c.focal_learned));
    }
    code = cli_json_line(j);
    goto done;
  }
  printf("model        %s\nparameters   %lld\nattention    alpha %g%s, %d heads of %d over %d KV heads, scale %s", o->model,
         (long long)parameters, c.entmax_alpha,
         c.alpha_learned       ? " at the start, learned per head"
         : c.entmax_alpha == 1 ? " (softmax)"
                               : "",
         c.num_heads, c.head_dim, c.num_kv_heads, scale);
  if (focal) printf(" (%stemperature %g)", c.focal_learned ? "learned, from " : "", c.focal_temperature);
  printf("\npositions    %s", position);
  if (rope) printf(" (base %g)", c.rope_theta);
  if (c.alibi_num_heads) printf(", %d ALiBi heads (%s slopes", c.alibi_num_heads, slope);
  for (int32_t h = 0; given && h < c.alibi_num_heads; h++) printf(" %g", c.alibi_slopes[h]);
  printf("%s, trained at length %d\n", c.alibi_num_heads ? ")" : "", c.max_position);
  printf("layers       %d of width %d, gated width %d\nvocabulary   %d %s%s, head %s\n", c.num_layers, c.hidden_size,
         c.intermediate_size, c.vocab_size, c.task ? "tokens of task " : "bytes", c.task ? emx_task_name(c.task) : "",
         c.tie_word_embeddings ? "tied" : "untied");
  code = cli_flush();
done:
  emx_model_close(model);
  return code;
}

static int show_file(const options *o) {
  emx_checkpoint *ck;
  int code = cli_status(emx_checkpoint_open(o->file, &ck));
  if (code) return code;
  for (int64_t i = 0; !code && i < emx_checkpoint_count(ck); i++) {
    const char *name;
    emx_tensor t;
    if ((code = cli_status(emx_checkpoint_get(ck, i, &name, &t)))) break;
    if (o->common.json) {
      json_t *shape = json_array();
      for (int d = 0; d < t.ndim; d++) json_array_append_new(shape, json_integer(t.shape[d]));
      code = cli_json_line(json_pack("{s:s, s:s, s:o}", "name", name, "dtype", emx_dtype_name(t.dtype), "shape", shape));
      continue;
    }
    printf("%-40s %-5s [", name, emx_dtype_name(t.dtype));
    for (int d = 0; d < t.ndim; d++) printf("%s%lld", d ? ", " : "", (long long)t.shape[d]);
    printf("]\n");
  }
  emx_checkpoint_close(ck);
  return code ? code : cli_flush();
}

int cmd_info(int argc, char **argv) {
  static const struct argp_child children[] = {{&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc = "Describes the library and this machine, a model folder (-m), or a safetensors file (-f)."};
  options o = {0};
  cli_parse(&argp, argc, argv, &o);
  if (o.file) return show_file(&o);
  emx_ctx *ctx = NULL;
  int code = cli_context(&o.common, &ctx);
  if (code) return code;
  code = o.model ? show_model(&o, ctx) : show_library(&o, ctx);
  emx_ctx_destroy(ctx);
  return code;
}
