/* SPDX-License-Identifier: Apache-2.0
 * Generators of the synthetic tasks; docs/tasks.md defines them. A sample is a function of (seed, split, kind, index) and the
 * task's parameters: every random word comes from Philox with the seed as key and (index, split, kind, draw) as counter. */
#include "base/num.h"
#include "train.h"

#include <math.h>
#include <string.h>

enum {
  ALPHABET = 32, /* copy, reverse, sort */
  SMALL = 16,    /* count, nback */
  RUN_MIN = 2,   /* count: lengths of a run */
  RUN_MAX = 48,
  INVENTORY = 10000, /* mqmtar: keys, and values, of a split */
  QUERIES = 4,
  CORE = 6,           /* mqmtar: k1 k2 1 v1 v2 0 */
  IDENTIFIERS = 5500, /* retrieval: a sequence of 16,384 tokens has 5,460 */
  PAIR_END = IDENTIFIERS
};

/* Data ids are 0 .. last_data. Nominal lengths that make sense, and what the paper's recipe trains on. */
static const struct {
  const char *name;
  int32_t last_data;
  int64_t shortest, longest, from, to;
} table[] = {
    {"none", 0, 0, 0, 0, 0},
    {"copy", ALPHABET - 1, 1, 1 << 24, 32, 64},
    {"reverse", ALPHABET - 1, 1, 1 << 24, 32, 64},
    {"sort", ALPHABET - 1, 1, 1 << 24, 32, 64},
    {"mqmtar", 259, 30, 1 << 24, 38, 64},
    {"count", RUN_MAX - 1, (RUN_MIN + RUN_MAX) / 2, 1 << 24, 64, 128},
    {"nback", SMALL - 1, 1, 1 << 24, 32, 64},
    {"flipflop", 4, 4, 1 << 24, 32, 64},
    {"parity", 1, 0, 1 << 24, 32, 64},
    {"retrieval", PAIR_END, 10, 3 * IDENTIFIERS + 4, 16, 64},
};
enum { KINDS = sizeof table / sizeof *table };

const char *emx_task_name(int32_t kind) { return kind >= 0 && kind < KINDS ? table[kind].name : NULL; }

void emx_task_desc_init_sized(emx_task_desc *task, size_t size, int32_t kind) {
  emx_task_desc defaults = {.kind = kind, .answers = 2, .seed = 1, .p_write = 0.8};
  if (kind > EMX_TASK_NONE && kind < KINDS) {
    defaults.min_length = table[kind].from;
    defaults.max_length = table[kind].to;
  }
  emxi_struct_init(task, size, &defaults, sizeof defaults);
}

/* Of a sequence of at most s tokens: bos, pairs and their ends, sep, start, all of the answer but its last token. */
static int64_t retrieval_pairs(const emx_task_desc *t, int64_t s) { return (s - 2 - t->answers) / 3; }

emx_status emxi_task_check(const emx_task_desc *t) {
  if (t->kind <= EMX_TASK_NONE || t->kind >= KINDS)
    return emxi_fail(EMX_ERR_INVALID, "task: kind is %d, expected EMX_TASK_COPY to EMX_TASK_RETRIEVAL", t->kind);
  if (t->split < EMX_SPLIT_TRAIN || t->split > EMX_SPLIT_TEST)
    return emxi_fail(EMX_ERR_INVALID, "task: split is %d, expected EMX_SPLIT_*", t->split);
  if (t->min_length < table[t->kind].shortest || t->max_length > table[t->kind].longest || t->min_length > t->max_length)
    return emxi_fail(EMX_ERR_INVALID, "task %s: lengths %lld to %lld, expected a range within %lld..%lld", table[t->kind].name,
                     (long long)t->min_length, (long long)t->max_length, (long long)table[t->kind].shortest,
                     (long long)table[t->kind].longest);
  if (t->answers < 1 || (t->kind == EMX_TASK_RETRIEVAL && retrieval_pairs(t, t->min_length) < t->answers))
    return emxi_fail(EMX_ERR_INVALID, "task: %d answers, expected from 1 to as many as the shortest sample has pairs",
                     t->answers);
  if (!(t->p_write >= 0 && t->p_write <= 1)) return emxi_fail(EMX_ERR_INVALID, "task: p_write is %g, expected 0..1", t->p_write);
  return EMX_OK;
}

static int64_t mqmtar_pairs(int64_t s) {
  const int64_t n = 2 * s / 15; /* floor(0.8 s / 6) */
  return n < INVENTORY ? n : INVENTORY;
}

emx_status emx_task_get_info(const emx_task_desc *t, emx_task_info *info) {
  EMXI_READ_STRUCT(t, emx_task_desc);
  EMX_TRY(emxi_task_check(t));
  EMXI_CHECK_STRUCT(info, emx_task_info);
  const int64_t s = t->max_length, last = table[t->kind].last_data;
  emx_task_info r = {.vocab_size = (int32_t)last + 6,
                     .pad = (int32_t)last + 1,
                     .bos = (int32_t)last + 2,
                     .eos = (int32_t)last + 3,
                     .sep = (int32_t)last + 5};
  switch (t->kind) {
    case EMX_TASK_COPY:
    case EMX_TASK_REVERSE:
    case EMX_TASK_SORT: r.max_tokens = 2 * s + 2, r.max_scored = s + 1; break;
    case EMX_TASK_MQMTAR: r.max_tokens = s + 3 * QUERIES + 2 + 3 * QUERIES, r.max_scored = 3 * QUERIES + 1; break;
    case EMX_TASK_COUNT: {
      const int64_t longest = s / ((RUN_MIN + RUN_MAX) / 2) * RUN_MAX;
      r.max_tokens = longest + 2, r.max_scored = longest;
      break;
    }
    case EMX_TASK_NBACK: r.max_tokens = s + 3, r.max_scored = s + 1; break;
    case EMX_TASK_FLIPFLOP: r.max_tokens = s / 2 * 2 + 1, r.max_scored = 2; break;
    case EMX_TASK_PARITY: r.max_tokens = s + 3, r.max_scored = 2; break;
    default: r.max_tokens = 3 * retrieval_pairs(t, s) + 2 + t->answers, r.max_scored = t->answers;
  }
  emxi_struct_write(info, &r, sizeof r);
  return EMX_OK;
}

/* ---- random numbers */

typedef struct source {
  uint64_t seed, index, stream, block;
  uint32_t word[4];
  int left;
} source;
static source source_of(const emx_task_desc *t, uint64_t index) {
  return (source){.seed = t->seed, .index = index, .stream = (uint64_t)t->split << 60 | (uint64_t)t->kind << 52};
}
static uint32_t word(source *r) {
  if (!r->left) {
    emxi_philox(r->seed, r->index, r->stream | r->block++, r->word);
    r->left = 4;
  }
  return r->word[4 - r->left--];
}
/* Uniform in 0 .. n-1, without bias: words that would make the first values more frequent are drawn again. */
static uint32_t below(source *r, uint32_t n) {
  const uint32_t uneven = (uint32_t)-n % n; /* 2^32 mod n */
  for (;;) {
    const uint64_t product = (uint64_t)word(r) * n;
    if ((uint32_t)product >= uneven) return (uint32_t)(product >> 32);
  }
}
static bool chance(source *r, double p) { return word(r) < p * 0x1p32; }

/* The first k places of a random permutation of items [n]. */
static void shuffle(source *r, uint16_t *items, uint32_t n, uint32_t k) {
  for (uint32_t i = 0; i < k && i + 1 < n; i++) {
    const uint32_t j = i + below(r, n - i);
    const uint16_t x = items[i];
    items[i] = items[j];
    items[j] = x;
  }
}

/* ---- one sample, written in order */

typedef struct writer {
  int32_t *tokens, *labels;
  int64_t n;
} writer;
static void put(writer *w, int32_t token, int32_t label) {
  w->tokens[w->n] = token;
  w->labels[w->n++] = label;
}
/* A token of the answer is the label of the place before it, and then an input itself. */
static void answer(writer *w, int32_t token) {
  w->labels[w->n - 1] = token;
  put(w, token, EMX_UNSCORED);
}
/* The last token of the answer is no input. */
static void last(writer *w, int32_t token) { w->labels[w->n - 1] = token; }

static void sequences(const emx_task_desc *t, source *r, int64_t s, const emx_task_info *id, writer *w) {
  int32_t counts[ALPHABET] = {0};
  put(w, id->bos, EMX_UNSCORED);
  for (int64_t i = 0; i < s; i++) {
    const int32_t token = (int32_t)below(r, ALPHABET);
    counts[token]++;
    put(w, token, EMX_UNSCORED);
  }
  const int32_t *src = w->tokens + w->n - s;
  put(w, id->sep, EMX_UNSCORED);
  if (t->kind == EMX_TASK_SORT) {
    for (int32_t token = 0; token < ALPHABET; token++)
      for (int32_t i = 0; i < counts[token]; i++) answer(w, token);
  } else {
    for (int64_t i = 0; i < s; i++) answer(w, src[t->kind == EMX_TASK_COPY ? i : s - 1 - i]);
  }
  last(w, id->eos);
}

/* Entry `slot` of a split's inventory of keys (which 0) or values (1): a keyed permutation of the 65,536 pairs of ids, eight
 * rounds of a Feistel network on two bytes, so that entries are distinct and no table is needed. */
static uint32_t inventory(const emx_task_desc *t, int which, uint32_t slot) {
  uint32_t left = slot >> 8, right = slot & 255;
  for (uint32_t round = 0; round < 8; round++) {
    uint32_t out[4];
    emxi_philox(t->seed, (uint64_t)1 << 63 | (uint64_t)which << 32 | round << 8 | right,
                (uint64_t)t->split << 60 | (uint64_t)t->kind << 52, out);
    const uint32_t next = left ^ (out[0] & 255);
    left = right;
    right = next;
  }
  return left << 8 | right;
}
static void mqmtar(const emx_task_desc *t, source *r, int64_t s, const emx_task_info *id, writer *w) {
  const uint32_t n = (uint32_t)mqmtar_pairs(s);
  const int64_t slots = s / n;
  uint16_t keys[INVENTORY], values[INVENTORY];
  for (int i = 0; i < INVENTORY; i++) keys[i] = values[i] = (uint16_t)i;
  shuffle(r, keys, INVENTORY, n);
  shuffle(r, values, INVENTORY, n);
  put(w, id->bos, EMX_UNSCORED);
  for (uint32_t i = 0; i < n; i++) {
    /* Spaces to the left: of slots - 6 draws without replacement from 2 slots - 4 marbles, those among slots - 1 marked ones. */
    int64_t lefts = 0, marked = slots - 1, all = 2 * slots - 4;
    for (int64_t d = 0; d < slots - CORE; d++, all--)
      if (below(r, (uint32_t)all) < marked) lefts++, marked--;
    const uint32_t key = inventory(t, 0, keys[i]), value = inventory(t, 1, values[i]);
    for (int64_t d = 0; d < lefts; d++) put(w, 0, EMX_UNSCORED);
    const int32_t core[CORE] = {(int32_t)(key >> 8) + 3,   (int32_t)(key & 255) + 3,   1,
                                (int32_t)(value >> 8) + 3, (int32_t)(value & 255) + 3, 0};
    for (int d = 0; d < CORE; d++) put(w, core[d], EMX_UNSCORED);
    for (int64_t d = lefts; d < slots - CORE; d++) put(w, 0, EMX_UNSCORED);
  }
  uint32_t values_asked[QUERIES];
  for (int q = 0; q < QUERIES; q++) {
    const uint32_t i = below(r, n), key = inventory(t, 0, keys[i]);
    values_asked[q] = inventory(t, 1, values[i]);
    put(w, 2, EMX_UNSCORED);
    put(w, (int32_t)(key >> 8) + 3, EMX_UNSCORED);
    put(w, (int32_t)(key & 255) + 3, EMX_UNSCORED);
  }
  put(w, id->sep, EMX_UNSCORED);
  for (int q = 0; q < QUERIES; q++) {
    answer(w, 2);
    answer(w, (int32_t)(values_asked[q] >> 8) + 3);
    answer(w, (int32_t)(values_asked[q] & 255) + 3);
  }
  last(w, id->eos);
}

static void count(source *r, int64_t s, const emx_task_info *id, writer *w) {
  put(w, id->bos, EMX_UNSCORED);
  int32_t before = -1;
  for (int64_t b = s / ((RUN_MIN + RUN_MAX) / 2); b > 0; b--) {
    int32_t token = (int32_t)below(r, before < 0 ? SMALL : SMALL - 1);
    if (before >= 0 && token >= before) token++; /* uniform over the others */
    const int32_t length = RUN_MIN + (int32_t)below(r, RUN_MAX - RUN_MIN + 1);
    for (int32_t i = 0; i < length; i++) put(w, token, i);
    before = token;
  }
  put(w, id->eos, EMX_UNSCORED);
}

static void nback(source *r, int64_t s, const emx_task_info *id, writer *w) {
  put(w, id->bos, EMX_UNSCORED);
  put(w, 0, 0);
  for (int64_t i = 1; i <= s; i++) put(w, 1 + (int32_t)below(r, SMALL - 1), i < 2 ? 0 : w->tokens[w->n - 2]);
  put(w, id->eos, EMX_UNSCORED);
}

static void flipflop(const emx_task_desc *t, source *r, int64_t s, const emx_task_info *id, writer *w) {
  enum { WRITE = 2, IGNORE = 3, READ = 4 };
  const int64_t n = s / 2;
  int32_t stored = 0;
  put(w, id->bos, EMX_UNSCORED);
  for (int64_t i = 0; i < n - 1; i++) {
    const int32_t command = i == 0 || chance(r, t->p_write) ? WRITE : IGNORE, bit = (int32_t)below(r, 2);
    if (command == WRITE) stored = bit;
    put(w, command, EMX_UNSCORED);
    put(w, bit, EMX_UNSCORED);
  }
  put(w, READ, EMX_UNSCORED);
  answer(w, stored);
  last(w, id->eos);
}

static void parity(source *r, int64_t s, const emx_task_info *id, writer *w) {
  int32_t odd = 0;
  put(w, id->bos, EMX_UNSCORED);
  for (int64_t i = 0; i < s; i++) {
    const int32_t bit = (int32_t)below(r, 2);
    odd ^= bit;
    put(w, bit, EMX_UNSCORED);
  }
  put(w, id->sep, EMX_UNSCORED);
  answer(w, !odd);
  last(w, id->eos);
}

/* items[0 .. n-1], a random sequence of distinct identifiers, read as a cycle: a random cycle over a random subset. */
static void retrieval(const emx_task_desc *t, source *r, int64_t s, const emx_task_info *id, writer *w) {
  const uint32_t n = (uint32_t)retrieval_pairs(t, s);
  uint16_t items[IDENTIFIERS], order[IDENTIFIERS];
  for (int i = 0; i < IDENTIFIERS; i++) items[i] = (uint16_t)i;
  for (uint32_t i = 0; i < n; i++) order[i] = (uint16_t)i;
  shuffle(r, items, IDENTIFIERS, n);
  shuffle(r, order, n, n);
  put(w, id->bos, EMX_UNSCORED);
  for (uint32_t i = 0; i < n; i++) {
    put(w, items[order[i]], EMX_UNSCORED);
    put(w, items[(order[i] + 1u) % n], EMX_UNSCORED);
    put(w, PAIR_END, EMX_UNSCORED);
  }
  const uint32_t start = below(r, n);
  put(w, id->sep, EMX_UNSCORED);
  put(w, items[start], EMX_UNSCORED);
  for (uint32_t i = 1; i < (uint32_t)t->answers; i++) answer(w, items[(start + i) % n]);
  last(w, items[(start + (uint32_t)t->answers) % n]);
}

emx_status emx_task_sample(const emx_task_desc *t, int64_t index, int32_t *tokens, int32_t *labels, int64_t room, int64_t *n) {
  emx_task_info id = {.struct_size = sizeof id};
  EMXI_READ_STRUCT(t, emx_task_desc);
  EMX_TRY(emx_task_get_info(t, &id));
  if (!tokens || !labels || !n || index < 0)
    return emxi_fail(EMX_ERR_INVALID, "emx_task_sample: %s", index < 0 ? "the index is negative" : "tokens, labels or n is NULL");
  if (room < id.max_tokens)
    return emxi_fail(EMX_ERR_INVALID, "emx_task_sample: room for %lld tokens, a sample may have %lld", (long long)room,
                     (long long)id.max_tokens);
  source r = source_of(t, (uint64_t)index);
  const int64_t s = t->min_length + (int64_t)below(&r, (uint32_t)(t->max_length - t->min_length + 1));
  writer w = {tokens, labels, 0};
  switch (t->kind) {
    case EMX_TASK_COPY:
    case EMX_TASK_REVERSE:
    case EMX_TASK_SORT: sequences(t, &r, s, &id, &w); break;
    case EMX_TASK_MQMTAR: mqmtar(t, &r, s, &id, &w); break;
    case EMX_TASK_COUNT: count(&r, s, &id, &w); break;
    case EMX_TASK_NBACK: nback(&r, s, &id, &w); break;
    case EMX_TASK_FLIPFLOP: flipflop(t, &r, s, &id, &w); break;
    case EMX_TASK_PARITY: parity(&r, s, &id, &w); break;
    default: retrieval(t, &r, s, &id, &w);
  }
  *n = w.n;
  return EMX_OK;
}
