/* SPDX-License-Identifier: Apache-2.0
 * The synthetic queries, keys and values of `emx bench decode` and `attn`, a function of (name, seed, shape) alone.
 *   iid           independent N(0,1)
 *   ar:RHO        keys AR(1) along the tokens, unit variance
 *   topics[:S]    64-token segments share a topic vector (shifted by S tokens): k = 0.9 topic + 0.45 noise; q = 0.8 a random
 *                 key + 0.6 noise
 *   outlier:C,G   iid keys with C channels G times larger; scores rescaled to unit variance
 *   flat:STD      scores of standard deviation STD
 */
#ifndef EMX_CLI_WORKLOAD_H
#define EMX_CLI_WORKLOAD_H

#include <emx.h>
#include <stdbool.h>

enum { WORKLOAD_IID, WORKLOAD_AR, WORKLOAD_TOPICS, WORKLOAD_OUTLIER, WORKLOAD_FLAT };
typedef struct workload {
  int kind;
  double rho, gain, std;
  int channels, shift;
  uint64_t seed;
} workload;

/* False if the name or its parameters make no sense. */
bool workload_parse(const char *name, uint64_t seed, workload *out);
/* What q.k is multiplied with for head dimension d. */
float workload_scale(const workload *w, int d);
/* Appends n tokens to sequence `seq`, filled from streams of number `id`. */
emx_status workload_append(emx_ctx *ctx, emx_kv *kv, int32_t seq, int id, int64_t n, const workload *w);
/* The same keys and values as plain arrays [g,n,d]. */
emx_status workload_tensors(emx_ctx *ctx, int id, int64_t g, int64_t n, int d, const workload *w, float *k, float *v);
/* One query [d] for the given number of round, sequence and head. key: a cached key [d], picked by workload_pick; used by
 * topics. */
void workload_query(const workload *w, int round, int id, int head, const float *key, int d, float *q);
/* Position of the key that a topics query leans on. */
int64_t workload_pick(const workload *w, int round, int id, int head, int64_t n);

#endif
