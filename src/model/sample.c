/* SPDX-License-Identifier: Apache-2.0
 * A token from logits: temperature, then top-k, then top-p of what is left, then one draw by inverse cumulative sum.
 *
 * Nothing is sorted and nothing is allocated. Tokens are ordered by a 64-bit key, (logit, lower id first); the best k, or the
 * best that hold a share of the mass, are those with a key of at least some bound, and eight counting passes find that bound. */
#include "base/num.h"
#include "model.h"

void emx_sample_opts_init_sized(emx_sample_opts *opts, size_t size) {
  const emx_sample_opts defaults = {.top_p = 1};
  emxi_struct_init(opts, size, &defaults, sizeof defaults);
}

typedef struct sampler {
  const float *logits;
  int32_t n;
  double best, inverse_temperature;
} sampler;

static uint64_t key_of(const sampler *s, int32_t i) {
  float x = s->logits[i] + 0.0f; /* -0 equals +0 */
  uint32_t u;
  memcpy(&u, &x, 4);
  u = u & 0x80000000u ? ~u : u | 0x80000000u; /* unsigned order is the order of the floats */
  return (uint64_t)u << 32 | (uint32_t)(s->n - 1 - i);
}
/* Not normalised. */
static double weight(const sampler *s, int32_t i) { return exp(((double)s->logits[i] - s->best) * s->inverse_temperature); }

/* The largest bound such that the tokens with keys >= bound (and >= floor) number at least `wanted`, or by_mass weigh that
 * much. */
static uint64_t cut(const sampler *s, uint64_t floor, bool by_mass, double wanted) {
  uint64_t bound = 0;
  double above = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    double sum[256] = {0};
    bool there[256] = {false};
    for (int32_t i = 0; i < s->n; i++) {
      uint64_t key = key_of(s, i);
      if (key < floor || (shift < 56 && (key ^ bound) >> (shift + 8))) continue;
      sum[key >> shift & 255] += by_mass ? weight(s, i) : 1;
      there[key >> shift & 255] = true;
    }
    int digit = -1;
    for (int d = 255; d >= 0; d--) {
      if (!there[d]) continue;
      if (digit >= 0) above += sum[digit];
      digit = d;
      if (above + sum[d] >= wanted) break; /* sums in another order may miss it by rounding: then the last digit that is there */
    }
    bound |= (uint64_t)digit << shift;
  }
  return bound;
}

emx_status emx_sample(const float *logits, int32_t vocab, const emx_sample_opts *opts, int64_t step, int32_t *token) {
  EMXI_READ_STRUCT(opts, emx_sample_opts);
  if (!logits || !token || vocab < 1)
    return emxi_fail(EMX_ERR_INVALID, "emx_sample: logits or token is NULL, or the vocabulary of %d is empty", vocab);
  if (!(opts->temperature >= 0) || isinf(opts->temperature))
    return emxi_fail(EMX_ERR_INVALID, "emx_sample: temperature is %g, expected a number from 0", (double)opts->temperature);
  if (opts->top_k < 0) return emxi_fail(EMX_ERR_INVALID, "emx_sample: top_k is %d, expected 0 or more", opts->top_k);
  if (!(opts->top_p > 0 && opts->top_p <= 1))
    return emxi_fail(EMX_ERR_INVALID, "emx_sample: top_p is %g, expected more than 0 and at most 1", (double)opts->top_p);
  int32_t best = 0;
  for (int32_t i = 0; i < vocab; i++) {
    if (isnan(logits[i]) || logits[i] == INFINITY)
      return emxi_fail(EMX_ERR_NONFINITE, "emx_sample: the logit of token %d is %g", i, (double)logits[i]);
    if (logits[i] > logits[best]) best = i;
  }
  if (logits[best] == -INFINITY) return emxi_fail(EMX_ERR_NONFINITE, "emx_sample: no logit is finite");
  if (opts->temperature == 0) {
    *token = best;
    return EMX_OK;
  }
  sampler s = {logits, vocab, logits[best], 1.0 / (double)opts->temperature};
  uint64_t bound = 0;
  double total = 0;
  if (opts->top_k && opts->top_k < vocab) bound = cut(&s, 0, false, opts->top_k);
  for (int pass = 0; pass < 2; pass++) {
    if (pass && opts->top_p < 1) bound = cut(&s, bound, true, opts->top_p * total);
    total = 0;
    for (int32_t i = 0; i < vocab; i++)
      if (key_of(&s, i) >= bound) total += weight(&s, i);
  }
  uint32_t random[4];
  emxi_philox(opts->seed, 0, (uint64_t)step, random);
  double left = emxi_uniform(random[0]) * total;
  int32_t chosen = best; /* the best is always kept: the answer if rounding runs past the end */
  for (int32_t i = 0; i < vocab && left >= 0; i++) {
    double w = key_of(&s, i) >= bound ? weight(&s, i) : 0;
    if (w <= 0) continue;
    chosen = i;
    left -= w;
  }
  *token = chosen;
  return EMX_OK;
}
