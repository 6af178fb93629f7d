/* SPDX-License-Identifier: Apache-2.0
 *
 * libentmax_model: model folders, sessions over a paged cache, text generation and training, on top of emx.h.
 * The conventions of emx.h hold here too. Functions named _create, _open, _save and _write allocate.
 *
 * A model is a folder with config.json and model.safetensors (Llama tensor names; docs/design.md, "Model folder").
 */
#ifndef EMX_MODEL_H
#define EMX_MODEL_H

#include <emx.h>

#ifdef __cplusplus
extern "C" {
#endif

/* --------------------------------------------------------------------------------------------------------- safetensors */

/* A safetensors file, mapped read-only. Every size, offset, shape and name in the header is checked before any of it is used:
 * header length against the file and a cap of 100 MB, duplicate keys, dtype and shape against the byte range, overlaps and holes
 * between tensors, trailing bytes. A file that fails is EMX_ERR_FORMAT and the detail names the tensor. Out of
 * memory is NOMEM, or FORMAT where the JSON parser cannot tell the two apart. */
typedef struct emx_checkpoint emx_checkpoint;
EMX_API emx_status emx_checkpoint_open(const char *path, emx_checkpoint **out);
/* The same on bytes in memory, borrowed until close (fuzzing, embedding). */
EMX_API emx_status emx_checkpoint_open_memory(const void *data, size_t size, emx_checkpoint **out);
EMX_API void emx_checkpoint_close(emx_checkpoint *ck);
EMX_API int64_t emx_checkpoint_count(const emx_checkpoint *ck);
/* The i-th tensor in file order; the name and the data live as long as the checkpoint. Data is aligned to the dtype's size only
 * where the file aligns it: copy with memcpy when in doubt. */
EMX_API emx_status emx_checkpoint_get(const emx_checkpoint *ck, int64_t i, const char **name, emx_tensor *tensor);
EMX_API emx_status emx_checkpoint_find(const emx_checkpoint *ck, const char *name, emx_tensor *tensor);
/* Value of a __metadata__ key; NULL if absent. */
EMX_API const char *emx_checkpoint_metadata(const emx_checkpoint *ck, const char *key);

typedef struct emx_named_tensor {
  const char *name;
  emx_tensor tensor; /* C-contiguous; f32, f16, bf16, f64 or i32 */
} emx_named_tensor;
/* Writes to a temporary name in the same folder, fsyncs, renames: an existing file is replaced whole or not at all. The data
 * starts at a multiple of 64 bytes and wide dtypes come first, so every tensor is aligned to its dtype (the format has no holes).
 * metadata: 2*n_metadata strings, key then value. */
EMX_API emx_status emx_checkpoint_write(const char *path, const emx_named_tensor *tensors, int64_t n, const char *const *metadata,
                                        int64_t n_metadata);

/* --------------------------------------------------------------------------------------------------------------- model */

enum { EMX_POSITION_NAPE = 0, EMX_POSITION_ALIBI = 1, EMX_POSITION_NOPE = 2, EMX_POSITION_ROPE = 3 /* all heads, rotate-half */ };
enum { EMX_SLOPE_LINEAR = 0 /* 1/(h+1) */, EMX_SLOPE_EXP = 1 /* 2^-h */, EMX_SLOPE_GIVEN = 2 /* alibi_slopes */ };
/* theta, which multiplies the query of a token at position i (from 0) after RoPE and before 1/sqrt(head_dim); docs/math.md,
 * "Scale and positions". NAPE: only the heads without ALiBi have it; otherwise all heads. */
enum {
  EMX_ATTN_SCALE_NONE = 0,
  EMX_ATTN_SCALE_SSMAX = 1, /* s_h ln(i+2), s_h learned per layer and head (Nakanishi 2025) */
  EMX_ATTN_SCALE_ASENTMAX =
      2, /* 1 + softplus(w_h.x + b_h) ln(i+2)^(2 tanh(v_h.x + c_h)), x the normed state (Vasylenko et al. 2025) */
  EMX_ATTN_SCALE_FOCAL = 3 /* 1 / focal_temperature, constant or learned per layer and head (Ram 2025) */
};
#define EMX_MAX_ALIBI_SLOPES 128

/* Decoder-only transformer: x += W_o attn(rms(x)); x += W_down(silu(W_gate rms(x)) * W_up rms(x)); no biases.
 * NAPE positions (Vasylenko et al. 2025): the first alibi_num_heads heads are ALiBi, the others have no position. */
typedef struct emx_model_config {
  uint32_t struct_size;
  int32_t vocab_size; /* 256: bytes */
  int32_t hidden_size;
  int32_t intermediate_size;
  int32_t num_layers;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t position_type; /* EMX_POSITION_* */
  int32_t alibi_num_heads;
  int32_t alibi_slope_type; /* EMX_SLOPE_* */
  int32_t attn_scale_type;  /* EMX_ATTN_SCALE_* */
  int32_t tie_word_embeddings;
  int32_t max_position; /* length of training, a record; longer contexts are allowed */
  double rms_norm_eps;
  double entmax_alpha;      /* 1: softmax; with alpha_learned between 1.01 and 2, both excluded */
  double rope_theta;        /* ROPE: base of the wavelengths; 10000 */
  double focal_temperature; /* FOCAL: what scores are divided by; 0.4 */
  int32_t focal_learned;    /* FOCAL, 1: a temperature per layer and head, which starts at focal_temperature */
  int32_t alpha_learned; /* 1: an alpha per layer and head, 1 + sigmoid(a) (Correia et al. 2019), which starts at entmax_alpha */
  double alibi_slopes[EMX_MAX_ALIBI_SLOPES]; /* GIVEN: one per ALiBi head, from 0 */
  int32_t task;                              /* EMX_TASK_* whose tokens these are; EMX_TASK_NONE: bytes */
  int32_t reserved;
} emx_model_config;
/* 4 layers of width 192, 6 heads of 32 over 3 KV heads, 3 of them ALiBi, gated width 512, bytes, tied head, alpha 1.5. */
EMX_API void emx_model_config_init_sized(emx_model_config *config, size_t size);
#define emx_model_config_init(config) emx_model_config_init_sized((config), sizeof *(config))
/* Errors: INVALID with the field that is wrong. */
EMX_API emx_status emx_model_config_check(const emx_model_config *config);
EMX_API int64_t emx_model_config_parameters(const emx_model_config *config);

typedef struct emx_model emx_model;
/* Opens a model folder. Weights are f32, f16 or bf16 in the file and f32 in memory. Every tensor that config.json implies must be
 * there with its shape, and no other. A config without entmax_alpha is an error, never softmax. Errors: IO, FORMAT, NOMEM.
 *
 * The context says where sessions run. On a GPU the weights are there as well, and products of several tokens are cuBLASLt's, in
 * f32: libcublasLt.so.13 or .12, which the first call loads (UNSUPPORTED where there is none, or the build did not find its
 * header). Files of caches, kv_file, emx_session_set_support and emx_task_evaluate are UNSUPPORTED there; everything else is as
 * below, logits differ from the CPU's by rounding, and pointers stay the host's. */
EMX_API emx_status emx_model_open(emx_ctx *ctx, const char *folder, emx_model **out);
EMX_API void emx_model_close(emx_model *model);
EMX_API emx_status emx_model_get_config(const emx_model *model, emx_model_config *config); /* set struct_size first */

/* ------------------------------------------------------------------------------------------------------------- session */

/* One sequence over a paged cache of every layer, on the device of the model's context. Sessions that come from one another by
 * fork share the pool and its pages. */
typedef struct emx_session emx_session;
typedef struct emx_session_opts {
  uint32_t struct_size;
  int32_t kv_dtype;     /* EMX_BF16 (default), EMX_F16, EMX_F32 */
  int32_t page_size;    /* 16 */
  int32_t summaries;    /* EMX_SUMMARY_*; default both */
  int32_t chunk;        /* tokens per prefill chunk; 0 (default): 512, on a GPU 8192 */
  int32_t max_sessions; /* forks that may exist at the same time; 16 */
  int64_t max_tokens;   /* 4096; of the whole pool: shared pages count once. Beyond the machine's memory: NOMEM with the bytes */
  /* K and V of every layer in a scratch file of this name (emx_kv_opts.file; the name must be free), the summaries in memory:
   * CERTIFIED then reads what its sketches leave. Prefill takes the keys and values of one head of a layer into memory at a time;
   * where there is no memory for that it streams them for every few queries, slower, and its sums run in another order. NULL
   * (default): in memory. */
  const char *kv_file;
} emx_session_opts;
EMX_API void emx_session_opts_init_sized(emx_session_opts *opts, size_t size); /* the numbers in the comments above */
#define emx_session_opts_init(opts) emx_session_opts_init_sized((opts), sizeof *(opts))
EMX_API emx_status emx_session_create(emx_model *model, const emx_session_opts *opts, emx_session **out);
EMX_API emx_status emx_session_fork(emx_session *parent, emx_session **out);
EMX_API emx_status emx_session_truncate(emx_session *s, int64_t length);
EMX_API void emx_session_destroy(emx_session *s); /* the model must still be open */
EMX_API int64_t emx_session_length(const emx_session *s);

/* Called between chunks and tokens, on the calling thread. done tokens of total. May call emx_ctx_cancel. */
typedef void (*emx_progress_fn)(void *user, int64_t done, int64_t total);

/* Appends n >= 1 tokens with dense attention. nll: optional [n]; nll[i] = -ln p(tokens[i] | before), NaN for the first token of
 * an empty session and for the first after a truncation (the state before it is gone). logits: optional [vocab] after the last
 * token. On failure or cancellation the session and the results are as they were. Allocates where a context is longer than any
 * before. */
EMX_API emx_status emx_session_prefill(emx_session *s, const int32_t *tokens, int64_t n, float *nll, float *logits,
                                       emx_progress_fn progress, void *user);
/* Selector for emx_session_decode; the default is ALL, a fork starts with its parent's. Allocates the selector's working memory.
 * Errors: UNSUPPORTED, STATE (summaries missing), NOMEM. */
EMX_API emx_status emx_session_set_select(emx_session *s, const emx_select_desc *select);
/* Appends one token; logits [vocab]. On failure the session is as it was. On a GPU the work is recorded as a CUDA graph for up to
 * twice as many tokens as there are, at least 1024, which allocates when it is outgrown. */
EMX_API emx_status emx_session_decode(emx_session *s, int32_t token, float *logits);

/* Where emx_session_decode writes what every head attended to: the caller's arrays, layer by layer, L layers of H query heads.
 * The contents are those of the last successful decode; a failed one leaves them undefined. */
typedef struct emx_session_support {
  uint32_t struct_size;
  int32_t reserved;
  int64_t capacity;    /* C >= 0 */
  int32_t *index;      /* [L,H,C] and */
  float *weight;       /* [L,H,C]: emx_decode_io.support_index and support_weight */
  int32_t *count;      /* [L,H] */
  emx_report *reports; /* [L,H]; NULL: none */
} emx_session_support;
/* Until the next call of this function, or with NULL no more; the arrays (the struct is copied) must live that long. A fork
 * starts without. Errors: INVALID. */
EMX_API emx_status emx_session_set_support(emx_session *s, const emx_session_support *support);

/* Sums over all decode calls of this session since the last reset, over layers, query heads and steps. */
typedef struct emx_session_stats {
  uint32_t struct_size;
  int32_t nonfinite; /* 1: some report had EMX_REPORT_NONFINITE */
  int64_t tokens;    /* decode calls */
  int64_t rows;      /* reports: tokens * layers * heads */
  int64_t certified; /* rows with EMX_REPORT_CERTIFIED */
  double support_sum;
  double delta_bound_sum, delta_bound_max;
  double mass_min, mass_max;
  int64_t bytes_k, bytes_v, bytes_meta;
  int64_t bytes_full;  /* K and V of every visible token, once per row: what a dense softmax decode would read */
  double attn_seconds; /* inside emx_decode; on a GPU of the device */
  double seconds;      /* inside emx_session_decode */
  int64_t paths[3];    /* rows that took each EMX_PATH_* */
} emx_session_stats;
EMX_API emx_status emx_session_get_stats(const emx_session *s, emx_session_stats *stats); /* set struct_size first */
EMX_API void emx_session_reset_stats(emx_session *s);

/* Logits [vocab] after the last token, as the call that appended it gave them. STATE for an empty session and after a
 * truncation. */
EMX_API emx_status emx_session_logits(emx_session *s, float *logits);

/* --------------------------------------------------------------------------------------------------------- cache files
 *
 * safetensors with a checksum over every byte (docs/design.md, "Cache files"). Written like emx_checkpoint_write: a full disk, a
 * folder that cannot be written to and a cancelled call leave the old file. Read with every size checked, streamed into free
 * pages: whatever is wrong with a file - damaged, truncated, hostile, of another kind, model or shape - the cache is as it was
 * before the call. progress (may be NULL) counts bytes; it may call emx_ctx_cancel, nothing else on this context.
 * Errors of saving: INVALID, STATE (no such sequence), UNSUPPORTED (a GPU's cache), IO, NOMEM, CANCELLED. Of loading also: FORMAT
 * (damaged, not a cache, another kind), UNSUPPORTED (a later version), INVALID (another model, too few ids), DTYPE, SHAPE, STATE
 * (too few free pages or sequences; the detail has the numbers). */
enum { EMX_CACHE_KV = 1, EMX_CACHE_SESSION = 2 };

/* Saves n sequences of a cache; pages that they share are stored once and shared again when they are loaded. */
EMX_API emx_status emx_kv_save(const emx_kv *kv, const int32_t *seqs, int32_t n, const char *path, emx_progress_fn progress,
                               void *user);
/* Adds the sequences of a file to a cache of the same dtype, page size, heads and head dim; layout, summaries and pool may
 * differ. Summaries are rebuilt from the keys, with the bits that they had if the CPU is of the same kind. seqs [room] takes the
 * new ids, in the order of the save, *n their number. */
EMX_API emx_status emx_kv_load(emx_kv *kv, const char *path, int32_t *seqs, int32_t room, int32_t *n, emx_progress_fn progress,
                               void *user);
/* All layers of a session and the state that continuing needs: a session that loads it goes on with the same bits. */
EMX_API emx_status emx_session_save(emx_session *s, const char *path, emx_progress_fn progress, void *user);
/* Into an empty session (else STATE) of the same model, by a hash of configuration and weights, of the same kv_dtype and
 * page_size. The selector and the statistics are not part of a file. */
EMX_API emx_status emx_session_load(emx_session *s, const char *path, emx_progress_fn progress, void *user);

/* What the header of a cache file says. The data and the checksum are not looked at. */
typedef struct emx_cache_info {
  uint32_t struct_size;
  int32_t kind; /* EMX_CACHE_* */
  int32_t version;
  int32_t dtype, layers, kv_heads, head_dim, page_size, seqs;
  int32_t reserved;
  int64_t pages;  /* a layer: what loading takes from the pool */
  int64_t tokens; /* of all sequences */
  char model[65]; /* session: hash of configuration and weights, in hexadecimal; else "" */
} emx_cache_info;
EMX_API emx_status emx_cache_get_info(const char *path, emx_cache_info *info); /* set info->struct_size first */

/* ------------------------------------------------------------------------------------------------------------ sampling */

typedef struct emx_sample_opts {
  uint32_t struct_size;
  int32_t top_k;     /* 0: all */
  float temperature; /* 0: greedy, the lowest token id among equals */
  float top_p;       /* 1: all */
  uint64_t seed;
} emx_sample_opts;
EMX_API void emx_sample_opts_init_sized(emx_sample_opts *opts, size_t size); /* greedy, top_p 1 */
#define emx_sample_opts_init(opts) emx_sample_opts_init_sized((opts), sizeof *(opts))
/* A token from logits [vocab], reproducible from (seed, step). Errors: INVALID, NONFINITE (NaN or no finite logit). */
EMX_API emx_status emx_sample(const float *logits, int32_t vocab, const emx_sample_opts *opts, int64_t step, int32_t *token);

/* ----------------------------------------------------------------------------------------------------- synthetic tasks */

/* Generated sequences with an answer: docs/tasks.md defines every token. */
enum {
  EMX_TASK_NONE = 0, /* text */
  EMX_TASK_COPY = 1,
  EMX_TASK_REVERSE = 2,
  EMX_TASK_SORT = 3,
  EMX_TASK_MQMTAR = 4,   /* multi-query multi-token associative recall */
  EMX_TASK_COUNT = 5,    /* place of every token in its run */
  EMX_TASK_NBACK = 6,    /* the token two places back */
  EMX_TASK_FLIPFLOP = 7, /* the bit of the last write */
  EMX_TASK_PARITY = 8,
  EMX_TASK_RETRIEVAL = 9 /* two steps along a cycle given as shuffled pairs */
};
enum { EMX_SPLIT_TRAIN = 0, EMX_SPLIT_VALID = 1, EMX_SPLIT_TEST = 2 };
enum { EMX_UNSCORED = -1 };
/* "retrieval"; NULL for a number that is no task, so that a loop ends there. */
EMX_API const char *emx_task_name(int32_t kind);

typedef struct emx_task_desc {
  uint32_t struct_size;
  int32_t kind;  /* EMX_TASK_* */
  int32_t split; /* EMX_SPLIT_*; default train */
  /* Retrieval: tokens of the answer, steps along the cycle; 2. More of them in training are more labels a sample. */
  int32_t answers;
  uint64_t seed;      /* 1 */
  int64_t min_length; /* nominal length of a sample, uniform from min to max; the defaults are those of the task's recipe */
  int64_t max_length;
  double p_write; /* flip-flop: share of writes among the commands in the middle; 0.8 */
} emx_task_desc;
EMX_API void emx_task_desc_init_sized(emx_task_desc *task, size_t size, int32_t kind);
#define emx_task_desc_init(task, kind) emx_task_desc_init_sized((task), sizeof *(task), (kind))

typedef struct emx_task_info {
  uint32_t struct_size;
  int32_t vocab_size;
  int32_t pad, bos, eos, sep; /* special tokens */
  int64_t max_tokens;         /* of any sample of the description */
  int64_t max_scored;
} emx_task_info;
/* Errors: INVALID with the field that is wrong. */
EMX_API emx_status emx_task_get_info(const emx_task_desc *task, emx_task_info *info); /* set struct_size first */
/* Sample `index` >= 0, a function of (seed, split, index) and the task's parameters. tokens, labels [room >= max_tokens], *n of
 * them written; labels[i]: what must be said after tokens[0..i], or EMX_UNSCORED. The prompt ends with the first label; the
 * tokens that follow are the answer so far. */
EMX_API emx_status emx_task_sample(const emx_task_desc *task, int64_t index, int32_t *tokens, int32_t *labels, int64_t room,
                                   int64_t *n);

typedef struct emx_task_score {
  uint32_t struct_size;
  int32_t reserved;
  int64_t samples;
  int64_t exact;  /* samples whose whole answer is right */
  int64_t scored; /* labels */
  int64_t right;  /* labels that are the first choice (the lowest token id among equals) given the right answer so far */
  double nats;    /* mean -ln p of a label */
} emx_task_score;
/* Scores samples first .. first+n-1 with dense f32 attention, several at a time. A sample is exact if every label is the first
 * choice in one pass over the true sequence; greedy decoding gives that answer if and only if this holds (docs/tasks.md), up to
 * rounding. Allocates. Errors: INVALID (the model is of another task), NOMEM, CANCELLED, NONFINITE. */
EMX_API emx_status emx_task_evaluate(emx_model *model, const emx_task_desc *task, int64_t first, int64_t n,
                                     emx_progress_fn progress, void *user, emx_task_score *score); /* set struct_size first */

/* ------------------------------------------------------------------------------------------------------------- trainer */

typedef struct emx_trainer emx_trainer;
typedef struct emx_train_opts {
  uint32_t struct_size;
  int32_t save_dtype;  /* of model.safetensors: EMX_BF16 (default) or EMX_F32; the trainer's own state is always f32 */
  int64_t steps;       /* total, warm-up included */
  int64_t warmup;      /* steps of linear warm-up, then cosine to min_lr */
  int64_t length;      /* tokens per sequence of text; tasks have their own */
  int64_t batch;       /* sequences per step */
  int64_t long_length; /* every long_every-th step uses sequences of this length, at the same number of tokens; 0: never */
  int64_t long_every;
  double lr, min_lr;
  double beta1, beta2, eps, weight_decay; /* AdamW; decay on matrices only */
  double clip;                            /* global norm of the gradient */
  double embed_dropout; /* share of the embedding's outputs that a step sets to zero, the rest scaled to the same mean (Srivastava
                         * et al. 2014); 0 to below 1. Evaluation and inference drop nothing. */
  double head_dropout;  /* the same for whole heads of a sequence, those without ALiBi (Zhou et al. 2020, DropHead) */
  uint64_t seed;        /* initial weights and the order of the data: sample i of step t depends on (seed, t, i) alone */
} emx_train_opts;
/* 10000 steps (200 of warm-up) of 16 sequences of 512; lr 2e-3 to 2e-4, beta 0.9 and 0.95, eps 1e-8, weight_decay 0.1, clip 1, no
 * dropout, seed 1. */
EMX_API void emx_train_opts_init_sized(emx_train_opts *opts, size_t size);
#define emx_train_opts_init(opts) emx_train_opts_init_sized((opts), sizeof *(opts))

/* Bytes to train on: files[i] of sizes[i] bytes, borrowed for the life of the trainer. Windows are drawn uniformly and do not
 * cross files. Or a task: step t trains on its samples t*batch .. t*batch+batch-1, padded on the right to the longest, and the
 * loss is the mean over their labels. */
typedef struct emx_train_data {
  uint32_t struct_size;
  uint32_t reserved;
  int64_t n_files;
  const uint8_t *const *files;
  const int64_t *sizes;
  /* Copied; NULL: text. With a task there are no files, and config.task and vocab_size are the task's. */
  const emx_task_desc *task;
} emx_train_data;
EMX_API void emx_train_data_init_sized(emx_train_data *data, size_t size);
#define emx_train_data_init(data) emx_train_data_init_sized((data), sizeof *(data))

/* Errors: INVALID (no window fits), NOMEM with the bytes. */
EMX_API emx_status emx_trainer_create(emx_ctx *ctx, const emx_model_config *config, const emx_train_opts *opts,
                                      const emx_train_data *data, emx_trainer **out);
/* Continues from a folder that emx_trainer_save wrote; opts and data must be those of the first run (checked). The continued run
 * is bit-identical to an uninterrupted one, for any number of threads, with the same build on the same kind of CPU (the BLAS
 * picks its kernels by CPU). Errors: IO, FORMAT (files that are damaged or contradict each other), INVALID (what differs),
 * NOMEM. */
EMX_API emx_status emx_trainer_resume(emx_ctx *ctx, const char *folder, const emx_train_opts *opts, const emx_train_data *data,
                                      emx_trainer **out);
EMX_API void emx_trainer_destroy(emx_trainer *t);

typedef struct emx_train_stats {
  uint32_t struct_size;
  int32_t reserved;
  int64_t step;     /* steps done */
  int64_t tokens;   /* in this step */
  double loss;      /* mean nats a token (a label, for a task), of this step's batch before the update */
  double grad_norm; /* before clipping */
  double lr;
} emx_train_stats;
/* One optimiser step; STATE when all are done. EMX_ERR_NONFINITE when the loss or a gradient is NaN or infinite: the weights are
 * those before the step, and emx_trainer_save refuses from then on. EMX_ERR_CANCELLED leaves the weights as before the step. */
EMX_API emx_status emx_trainer_step(emx_trainer *t, emx_train_stats *stats); /* set struct_size first */
/* Writes config.json, model.safetensors and trainer.safetensors into `folder` (created if missing), each atomically, the
 * trainer's state before the model. */
EMX_API emx_status emx_trainer_save(emx_trainer *t, const char *folder);
/* Mean nats per byte of `data` over its whole windows of opts.length, one after the other, with the weights of now. What is left
 * at the end is not counted. Errors: INVALID (not one window, which takes opts.length + 1 bytes), CANCELLED. */
EMX_API emx_status emx_trainer_evaluate(emx_trainer *t, const uint8_t *data, int64_t size, double *nats);
/* emx_task_evaluate with the weights of now. */
EMX_API emx_status emx_trainer_evaluate_task(emx_trainer *t, const emx_task_desc *task, int64_t first, int64_t n,
                                             emx_task_score *score); /* set struct_size first */

#ifdef __cplusplus
}
#endif
#endif /* EMX_MODEL_H */
