/* SPDX-License-Identifier: Apache-2.0
 * Long-context questions for byte models, in the categories of RULER (Hsieh et al. 2024) with sentences of our own:
 * docs/ruler.md. */
#ifndef EMXI_RULER_H
#define EMXI_RULER_H

#include "base/base.h"

enum {
  EMXI_RULER_NIAH,       /* one needle in a text */
  EMXI_RULER_MULTIKEY,   /* eight keys with a word each, one is asked for */
  EMXI_RULER_MULTIVALUE, /* two keys with four words each, all of one are asked for */
  EMXI_RULER_MULTIQUERY, /* eight keys, four are asked for at once */
  EMXI_RULER_TRACKING,   /* two chains of five names; who stands, by how many steps soever, for a word? */
  EMXI_RULER_FREQUENT,   /* nothing but words, as often as Zipf's law of exponent 2 says; the three most frequent */
  EMXI_RULER_PASSKEY,    /* one needle in three sentences that repeat */
  EMXI_RULER_TASKS
};
enum { EMXI_RULER_WORD = 6, EMXI_RULER_ANSWERS = 5, EMXI_RULER_CHOICES = 8 };

/* "niah", "multikey", ...; NULL for another number. */
const char *emxi_ruler_name(int task);

typedef struct emxi_ruler_spec {
  int task;
  int64_t length; /* bytes of the prompt, exactly */
  double depth;   /* share of the text before the needle (NIAH, MULTIKEY: that of the key asked for, PASSKEY); negative: drawn */
  uint64_t seed;
  /* Haystack, read as a ring from a place that is drawn; NULL: the text built in. Not for FREQUENT and PASSKEY. */
  const char *text;
  int64_t text_size;
} emxi_ruler_spec;

/* One word to be said. The choices are words of the same length, distinct; only choices[right] is true. */
typedef struct emxi_ruler_answer {
  char choices[EMXI_RULER_CHOICES][EMXI_RULER_WORD + 1];
  int n_choices, right;
  /* Where the prompt tells the word: its one place, except in FREQUENT (the first) and TRACKING (where the name is explained). */
  int64_t at;
} emxi_ruler_answer;

/* The prompt ends just before the first answer; the answers are said one after the other with ", " between. */
typedef struct emxi_ruler_sample {
  char *prompt; /* [length], NUL appended */
  int64_t length;
  int64_t question; /* prompt[question..length) is the question */
  double depth;     /* NIAH, MULTIKEY, PASSKEY: where the needle is, as a share of the text; else -1 */
  int n_answers;
  emxi_ruler_answer answers[EMXI_RULER_ANSWERS];
} emxi_ruler_sample;

/* Sample i: a function of the spec and i alone. Errors: INVALID (unknown task, depth above 1, a text of no bytes, a length that
 * is too short, with the shortest), NOMEM. */
emx_status emxi_ruler_make(const emxi_ruler_spec *spec, int64_t i, emxi_ruler_sample *out);
void emxi_ruler_free(emxi_ruler_sample *s);

#endif
