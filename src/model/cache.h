/* SPDX-License-Identifier: Apache-2.0
 * Cache files: what emx_kv_save and emx_session_save have in common (docs/design.md, "Cache files"). */
#ifndef EMXI_CACHE_H
#define EMXI_CACHE_H

#include "model.h"

/* What a file holds: sequences over the pages of one cache (EMX_CACHE_KV), or one sequence over a cache a layer
 * (EMX_CACHE_SESSION). */
typedef struct emxi_cache {
  int32_t kind; /* EMX_CACHE_* */
  emx_ctx *ctx;
  emx_kv *const *kv; /* [layers], all of one shape */
  int32_t layers;
  int32_t n_seqs;
  int32_t *seqs; /* KV: [n_seqs]; SESSION: [layers], one of each cache */
  /* A session's: */
  const char *model; /* identity */
  int64_t width, max_tokens;
  float *last; /* [width] state of the last token */
  bool last_known;
  int64_t length;
  /* Both: */
  emx_progress_fn progress; /* in bytes; or NULL */
  void *user;
} emxi_cache;

/* The context's lock is held. */
emx_status emxi_cache_save(const emxi_cache *c, const char *path);
/* KV: c->seqs has room for n_seqs, which becomes their number. SESSION: c->seqs are there and empty; last, last_known and length
 * are filled. Nothing of *c, its arrays and the caches has changed when it fails; pages that are free may have been written
 * to. */
emx_status emxi_cache_load(emxi_cache *c, const char *path);

#endif
