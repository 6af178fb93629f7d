/* SPDX-License-Identifier: Apache-2.0
 * What generate, eval and demo share: sessions over a model's cache, their options and their statistics. */
#ifndef EMX_CLI_SESSION_H
#define EMX_CLI_SESSION_H

#include "cli.h"

/* -c, --page, --kv-dtype, --kv-file, --device, a child parser. Key range 1200. */
typedef struct cli_session {
  int64_t ctx; /* 0: as much as the command needs */
  int page;
  int32_t kv_dtype;
  const char *kv_file; /* or NULL */
  cli_device device;   /* of the context that the command opens its models with */
} cli_session;
extern const struct argp cli_session_argp;
void cli_session_init(cli_session *s);
/* For options that need a cache in the CPU's memory: a usage error where --device is a GPU. */
void cli_session_needs_cpu(const struct argp_state *state, const cli_session *s, const char *option);

/* A session for `tokens` tokens, with the summaries that the selectors (or NULL) need; CLI_ERROR if they exceed -c, or the
 * machine (with the bytes). */
int session_open(emx_model *model, const cli_session *opts, const cli_select *select, int64_t tokens, emx_session **out);
/* Appends n bytes of text, with a progress bar if there is a label. nll [n] and logits [vocab] are optional. Bytes must be tokens
 * of the model. */
int session_prefill(emx_session *s, const emx_model_config *config, const char *text, size_t n, float *nll, float *logits,
                    const char *label);

int session_prefill_tokens(emx_session *s, const int32_t *tokens, int64_t n, float *nll, float *logits, const char *label);

/* Cache files, with a progress bar. */
int session_save(emx_session *s, const char *path, const char *label);
int session_load(emx_session *s, const char *path, const char *label);

typedef struct session_summary {
  double tok_per_s, attn_ms_per_tok, bytes_share, support_mean, delta_bound_max, certified_share;
  emx_session_stats raw; /* the sums these were made of */
} session_summary;
/* NaN where nothing was decoded. */
int session_summarize(const emx_session *s, session_summary *out);
/* {"tok_per_s", "budget" (topk), "attn_ms_per_tok", "select", "bytes_share", "support_mean", "delta_bound_max",
 * "certified_share", "rows", "certified", "paths": {"all", "pages", "ladder"} (rows that took each), "bytes_k", "bytes_v",
 * "bytes_meta"} */
json_t *session_json(const session_summary *s, const emx_select_desc *select);

/* What ALL expects after each of some tokens, and by how much a selector's expectation differs. */
typedef struct session_reference {
  emx_session *base; /* borrowed; stays as it is: the tokens go into forks */
  const int32_t *tokens;
  int64_t n;
  int32_t vocab;
  float *all, *other; /* [n,vocab] */
} session_reference;
typedef struct session_difference {
  double kl, kl_max, top1; /* mean and largest KL divergence, share of equal first choices */
  session_summary stats;
} session_difference;
/* Decodes the tokens with ALL. Room for two forks with n tokens each is the caller's business. */
int session_reference_open(emx_session *base, const int32_t *tokens, int64_t n, int32_t vocab, session_reference *r);
int session_reference_compare(session_reference *r, const emx_select_desc *select, session_difference *out);
void session_reference_close(session_reference *r);

/* An error for a model of a task, whose tokens are not bytes. */
int session_check_bytes(const emx_model_config *config);
/* n bytes as tokens, for free(); CLI_ERROR names the first byte that is no token of the model. */
int session_tokens(const emx_model_config *config, const char *text, size_t n, int32_t **out);
/* A prompt's tokens, for free(): its bytes, or for a model of a task the numbers that it spells. */
int session_prompt(const emx_model_config *config, const char *text, size_t size, int32_t **out, int64_t *n);

/* KL divergence in nats between the next-token distributions of two rows of logits. */
double logits_kl(const float *p, const float *q, int n);
int logits_best(const float *p, int n);

#endif
