/* Shared by the tests of caches: everything that a cache is, as one number. */
#ifndef CACHE_HELP_H
#define CACHE_HELP_H

#include "kv/kv.h"
#include "model/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A folder for files, in memory where the system has that: fsync costs nothing there. Needs _DEFAULT_SOURCE. */
static inline bool folder_create(char out[32]) {
  strcpy(out, "/dev/shm/emx_XXXXXX");
  if (mkdtemp(out)) return true;
  strcpy(out, "/tmp/emx_XXXXXX");
  return mkdtemp(out) != NULL;
}

typedef struct fingerprint {
  uint8_t bytes[EMXI_HASH_SIZE];
} fingerprint;

/* Sequences, tables, reference counts, the order in which free pages will be handed out, and of the pages in use K, V and
 * summaries. What free pages hold does not count. */
static inline void fingerprint_add(emxi_hash *h, const emx_kv *kv) {
  const size_t row = (size_t)kv->D * emx_dtype_size(kv->dtype);
  emxi_hash_add(h, &kv->n_seqs, sizeof kv->n_seqs);
  for (int32_t s = 0; s < kv->max_seqs; s++) {
    const emxi_kv_seq *q = &kv->seqs[s];
    emxi_hash_add(h, &q->used, sizeof q->used);
    if (!q->used) continue;
    emxi_hash_add(h, &q->length, sizeof q->length);
    emxi_hash_add(h, kv->tables + (int64_t)s * kv->max_pages, (size_t)q->n_pages * sizeof *kv->tables);
    for (int64_t t = 0; t < q->length; t++)
      for (int32_t g = 0; g < kv->G; g++) {
        const int32_t page = kv->tables[(int64_t)s * kv->max_pages + t / kv->P];
        emxi_hash_add(h, emxi_kv_k(kv, page, g, t % kv->P), row);
        emxi_hash_add(h, emxi_kv_v(kv, page, g, t % kv->P), row);
      }
  }
  emxi_hash_add(h, &kv->n_free, sizeof kv->n_free);
  emxi_hash_add(h, kv->free_list, (size_t)kv->n_free * sizeof *kv->free_list);
  emxi_hash_add(h, kv->refs, (size_t)kv->max_pages * sizeof *kv->refs);
  emxi_hash_add(h, kv->sum_tokens, (size_t)kv->max_pages * sizeof *kv->sum_tokens);
  emxi_hash_add(h, &kv->sketch.mapped, sizeof kv->sketch.mapped);
  for (int32_t page = 0; page < kv->max_pages; page++)
    if (kv->sketch.number && kv->refs[page]) emxi_hash_add(h, &kv->sketch.number[page], sizeof kv->sketch.number[page]);
  for (int32_t page = 0; page < kv->max_pages; page++)
    for (int32_t g = 0; g < kv->G && kv->refs[page] && kv->sum_tokens[page]; g++) {
      if (kv->minmax) emxi_hash_add(h, emxi_kv_minmax(kv, page, g), 2 * row);
      if (kv->moments) emxi_hash_add(h, emxi_kv_moments(kv, page, g), (size_t)(2 * kv->D + 1) * sizeof(float));
      emxi_hash_add(h, emxi_kv_mark(kv, page, g), 1);
    }
}
static inline fingerprint fingerprint_of(const emx_kv *kv) {
  fingerprint f;
  emxi_hash h;
  emxi_hash_init(&h);
  fingerprint_add(&h, kv);
  emxi_hash_end(&h, f.bytes);
  return f;
}
static inline bool fingerprint_same(fingerprint a, fingerprint b) { return !memcmp(&a, &b, sizeof a); }

#endif
