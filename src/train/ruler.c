/* SPDX-License-Identifier: Apache-2.0
 * Writes the prompts: draws words, makes sentences ("needles") and a question of them, and fills up with text to the exact
 * length. */
#include "train/ruler.h"

#include "base/num.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MAX_NEEDLES = 10, NEEDLE = 96, QUESTION = 192, MIN_TEXT = 64, SNAP = 160, MAX_RANKS = 40 };

static const char *const names[EMXI_RULER_TASKS] = {"niah",     "multikey", "multivalue", "multiquery",
                                                    "tracking", "frequent", "passkey"};
const char *emxi_ruler_name(int task) { return task >= 0 && task < EMXI_RULER_TASKS ? names[task] : NULL; }

/* Says nothing of secrets, passes, names or keys. */
static const char filler[] =
    "The old road leaves the village by the mill and climbs between two stone walls. In spring the walls are white with blossom, "
    "and "
    "the children who walk to school pick a branch each and carry it for a mile before they let it fall. Nobody minds. There is "
    "more "
    "of it than anyone could carry. Above the last house the road turns to grass, and the grass to heather, and from there one "
    "sees "
    "the whole of the plain, with its ditches drawn in straight lines and its cattle standing in the wet. My grandfather came "
    "here "
    "every evening. He said that he wanted to look at the weather, but he looked at the trains. At six the slow one went west "
    "with "
    "its lamps lit, and he counted the carriages under his breath. Some evenings there were five, and he was content. Once there "
    "were only two, and he did not speak until supper was over and the plates were dry. People have asked me what he was afraid "
    "of. I "
    "think that he had seen a thing grow smaller, year after year, and had learned to measure it. A man who counts is not always "
    "a "
    "man who hopes. When the rain came from the south it came all at once. We stood under the roof of the barn and heard it run "
    "along "
    "the gutters, and the dog lay down with his nose on the sill as if he had been asked to keep watch. After an hour the yard "
    "was a "
    "lake with heaps of straw. After two hours the ducks arrived, in a line, very calm, like people who had bought their seats "
    "long "
    "before. My aunt laughed so much that she had to sit down on a sack. Later, when she was ill, we would say to her, do you "
    "remember the ducks, and she always did. The market was on the first day of the week. Farmers set down their baskets along "
    "the "
    "north side, where the sun did not reach the butter, and talked about prices in low voices. One sold honey in jars without "
    "labels. Another had apples of a kind that is in no book, red on one side only, sour until the frost and sweet until the "
    "thaw. A woman from the coast brought fish on ice and shouted so well that the band stopped playing. By noon everything was "
    "sold "
    "or given away, and the square was swept, and only the pigeons knew that there had been anything at all. I have lived in "
    "larger "
    "places since. They have their own evenings and their own trains. But when I cannot sleep I go up that road again, past the "
    "mill "
    "and the two walls, and I stand where he stood, and I wait for the lights to come out of the east. I count them slowly. It "
    "is a "
    "way of holding still while the world goes by, and it costs nothing, and it harms no one. ";
static const char noise[] = "Rain falls on the hills. The stream runs down to the lake. The wind turns and comes again. ";

static const char *const keys[] = {"garden",  "tower",  "ladder", "lantern", "bridge", "harbor", "orchard", "chapel",
                                   "kitchen", "island", "forest", "window",  "valley", "castle", "meadow",  "fountain"};
enum { KEYS = sizeof keys / sizeof *keys };

/* ---- draws: a counter per sample, so that nothing depends on other samples */

typedef struct draw {
  uint64_t key, n;
  uint32_t word[4];
} draw;
static uint64_t mix(uint64_t key, uint64_t a, uint64_t b) {
  uint32_t r[4];
  emxi_philox(key, a, b, r);
  return (uint64_t)r[1] << 32 | r[0];
}
static uint32_t next(draw *d) {
  if (d->n % 4 == 0) emxi_philox(d->key, 0, d->n / 4, d->word);
  return d->word[d->n++ % 4];
}
/* In 0 .. n-1, n < 2^31: the bias of the multiplication is below n / 2^32. */
static int64_t below(draw *d, int64_t n) { return (int64_t)(((uint64_t)next(d) * (uint64_t)n) >> 32); }
static double uniform(draw *d) { return emxi_uniform(next(d)); }

/* ---- words: three syllables, so that no word of a language is easier to guess than another */

typedef struct words {
  char word[2 * MAX_NEEDLES + MAX_RANKS + EMXI_RULER_CHOICES][EMXI_RULER_WORD + 1];
  int n;
} words;
static bool occurs(const char *text, int64_t size, const char *word) {
  for (const char *p = text, *end = text + size; end - p >= EMXI_RULER_WORD;) {
    p = memchr(p, word[0], (size_t)(end - p - EMXI_RULER_WORD + 1));
    if (!p) return false;
    if (!memcmp(p, word, EMXI_RULER_WORD)) return true;
    p++;
  }
  return false;
}
/* A word that is new, also to the text. A text may hold few of the 343,000 words, so a few draws do. */
static const char *new_word(draw *d, words *w, const char *text, int64_t size) {
  static const char consonants[] = "bdfgklmnprstvz", vowels[] = "aeiou";
  char *word = w->word[w->n];
  for (bool taken = true; taken;) {
    for (int i = 0; i < EMXI_RULER_WORD; i += 2) {
      word[i] = consonants[below(d, sizeof consonants - 1)];
      word[i + 1] = vowels[below(d, sizeof vowels - 1)];
    }
    word[EMXI_RULER_WORD] = 0;
    taken = occurs(text, size, word);
    for (int i = 0; i < w->n; i++) taken |= !strcmp(w->word[i], word);
  }
  w->n++;
  return word;
}

/* ---- a prompt in the making */

typedef struct needle {
  char text[NEEDLE];
  int64_t size, place; /* place: in the text, before insertion */
  const char *word;    /* that it tells; NULL: none */
} needle;
typedef struct plan {
  draw d;
  words w;
  needle needles[MAX_NEEDLES];
  int n_needles, asked; /* the needle that the depth is about; -1: none */
  char question[QUESTION];
} plan;

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static void
add_needle(plan *p, const char *word, const char *format, ...) {
  needle *n = &p->needles[p->n_needles++];
  va_list args;
  va_start(args, format);
  n->size = vsnprintf(n->text, sizeof n->text, format, args);
  va_end(args);
  n->word = word;
}

/* The answer `right` among others, in an order that is drawn. */
static void add_answer(plan *p, emxi_ruler_sample *s, const char *right, const char *const *others, int n) {
  emxi_ruler_answer *a = &s->answers[s->n_answers++];
  a->n_choices = n + 1;
  a->right = (int)below(&p->d, n + 1);
  for (int i = 0, j = 0; i <= n; i++) memcpy(a->choices[i], i == a->right ? right : others[j++], EMXI_RULER_WORD + 1);
}

static void shuffle(draw *d, int *x, int n) {
  for (int i = 0; i < n; i++) x[i] = i;
  for (int i = n - 1; i > 0; i--) {
    const int j = (int)below(d, i + 1), t = x[i];
    x[i] = x[j];
    x[j] = t;
  }
}

static void plan_single(plan *p, emxi_ruler_sample *s, bool passkey, const char *text, int64_t size) {
  const char *word = new_word(&p->d, &p->w, text, size), *others[EMXI_RULER_CHOICES - 1];
  for (int i = 0; i < EMXI_RULER_CHOICES - 1; i++) others[i] = new_word(&p->d, &p->w, text, size);
  if (passkey) {
    add_needle(p, word, "The pass word is %s. Keep it in mind. ", word);
    snprintf(p->question, sizeof p->question, "\nWhat is the pass word? The pass word is ");
  } else {
    const char *key = keys[below(&p->d, KEYS)];
    add_needle(p, word, "The secret word of the %s is %s. ", key, word);
    snprintf(p->question, sizeof p->question, "\nWhat is the secret word of the %s? The secret word of the %s is ", key, key);
  }
  p->asked = 0;
  add_answer(p, s, word, others, EMXI_RULER_CHOICES - 1);
}

/* Eight keys; `ask` of them are asked for. Every word of the text is a choice. */
static void plan_keys(plan *p, emxi_ruler_sample *s, int ask, const char *text, int64_t size) {
  enum { N = EMXI_RULER_CHOICES };
  int order[KEYS], asked[N];
  const char *word[N];
  shuffle(&p->d, order, KEYS);
  for (int i = 0; i < N; i++) {
    word[i] = new_word(&p->d, &p->w, text, size);
    add_needle(p, word[i], "The secret word of the %s is %s. ", keys[order[i]], word[i]);
  }
  shuffle(&p->d, asked, N);
  const char *k[4];
  for (int i = 0; i < 4; i++) k[i] = keys[order[asked[i]]];
  if (ask == 1) {
    p->asked = asked[0];
    snprintf(p->question, sizeof p->question, "\nWhat is the secret word of the %s? The secret word of the %s is ", k[0], k[0]);
  } else {
    snprintf(p->question, sizeof p->question, "\nThe secret words of the %s, the %s, the %s and the %s are, in this order, ",
             k[0], k[1], k[2], k[3]);
  }
  for (int i = 0; i < ask; i++) {
    const char *others[N];
    int n = 0;
    for (int j = 0; j < N; j++)
      if (j != asked[i]) others[n++] = word[j];
    add_answer(p, s, word[asked[i]], others, n);
  }
}

/* Two keys with four words each; the words of one are asked for in the order of the text, those of the other are the choices
 * beside. */
static void plan_values(plan *p, emxi_ruler_sample *s, const char *text, int64_t size) {
  enum { N = 4 };
  int order[KEYS];
  const char *word[2][N];
  shuffle(&p->d, order, KEYS);
  for (int i = 0; i < 2 * N; i++) {
    word[i % 2][i / 2] = new_word(&p->d, &p->w, text, size);
    add_needle(p, word[i % 2][i / 2], "One secret word of the %s is %s. ", keys[order[i % 2]], word[i % 2][i / 2]);
  }
  snprintf(p->question, sizeof p->question, "\nWhat are the four secret words of the %s? The secret words of the %s are ",
           keys[order[0]], keys[order[0]]);
  for (int i = 0; i < N; i++) add_answer(p, s, word[0][i], word[1], N);
}

/* Two chains, told in order. Names of the other chain are the choices beside. */
static void plan_tracking(plan *p, emxi_ruler_sample *s, const char *text, int64_t size) {
  enum { N = EMXI_RULER_ANSWERS };
  const char *value[2], *name[2][N];
  for (int c = 0; c < 2; c++) {
    value[c] = new_word(&p->d, &p->w, text, size);
    for (int i = 0; i < N; i++) name[c][i] = new_word(&p->d, &p->w, text, size);
  }
  for (int i = 0; i < 2 * N; i++) {
    const int c = i % 2, j = i / 2;
    if (j)
      add_needle(p, name[c][j], "The name %s stands for what %s stands for. ", name[c][j], name[c][j - 1]);
    else
      add_needle(p, name[c][0], "The name %s stands for %s. ", name[c][0], value[c]);
  }
  snprintf(p->question, sizeof p->question, "\nFive names stand for %s. The five names that stand for %s are ", value[0],
           value[0]);
  for (int i = 0; i < N; i++) add_answer(p, s, name[0][i], name[1], N);
}

/* ---- assembly */

static char at_ring(const char *text, int64_t size, int64_t i) { return text[i % size]; }
static bool sentence_starts(const char *hay, int64_t i) {
  return i == 0 || (i > 1 && (hay[i - 1] == ' ' || hay[i - 1] == '\n') && strchr(".!?", hay[i - 2]) && hay[i - 2]);
}
/* The start of a sentence nearest to `target`, up to SNAP bytes away; failing that, target. */
static int64_t snap(const char *hay, int64_t n, int64_t target) {
  for (int64_t away = 0; away <= SNAP; away++) {
    if (target - away >= 0 && sentence_starts(hay, target - away)) return target - away;
    if (target + away <= n && sentence_starts(hay, target + away)) return target + away;
  }
  return target;
}

static emx_status too_short(const emxi_ruler_spec *spec, int64_t least) {
  return emxi_fail(EMX_ERR_INVALID, "ruler: %s needs at least %lld bytes, the length is %lld", names[spec->task],
                   (long long)least, (long long)spec->length);
}
static emx_status take_prompt(const emxi_ruler_spec *spec, emxi_ruler_sample *s) {
  s->prompt = emxi_alloc((size_t)spec->length + 1);
  if (!s->prompt) return emxi_fail(EMX_ERR_NOMEM, "ruler: no memory for %lld bytes", (long long)spec->length);
  s->prompt[spec->length] = 0;
  s->length = spec->length;
  return EMX_OK;
}

/* Needles go to shares of the text that are drawn, one by one; where two groups are told in order, each group's shares are
 * sorted. */
static void place_needles(plan *p, const emxi_ruler_spec *spec, const char *hay, int64_t n) {
  double share[MAX_NEEDLES];
  for (int i = 0; i < p->n_needles; i++) share[i] = uniform(&p->d);
  if (p->asked >= 0 && spec->depth >= 0) share[p->asked] = spec->depth;
  /* the groups are the needles of even and of odd number */
  if (spec->task == EMXI_RULER_TRACKING || spec->task == EMXI_RULER_MULTIVALUE)
    for (int i = 0; i < p->n_needles; i++)
      for (int j = i + 2; j < p->n_needles; j += 2)
        if (share[j] < share[i]) {
          const double t = share[i];
          share[i] = share[j];
          share[j] = t;
        }
  for (int i = 0; i < p->n_needles; i++) p->needles[i].place = snap(hay, n, (int64_t)(share[i] * (double)n + 0.5));
}

/* Text, needles and question in one. */
static emx_status assemble(plan *p, const emxi_ruler_spec *spec, const char *text, int64_t size, int64_t from,
                           emxi_ruler_sample *s) {
  int64_t needles = 0;
  const int64_t question = (int64_t)strlen(p->question);
  for (int i = 0; i < p->n_needles; i++) needles += p->needles[i].size;
  const int64_t n = spec->length - needles - question;
  if (n < MIN_TEXT) return too_short(spec, MIN_TEXT + needles + question);
  EMX_TRY(take_prompt(spec, s));
  char *hay = emxi_alloc((size_t)n);
  if (!hay) {
    emxi_ruler_free(s);
    return emxi_fail(EMX_ERR_NOMEM, "ruler: no memory for %lld bytes", (long long)n);
  }
  for (int64_t i = 0; i < n; i++) hay[i] = at_ring(text, size, from + i);
  place_needles(p, spec, hay, n);
  int64_t read = 0, at = 0;
  bool done[MAX_NEEDLES] = {0};
  for (int k = 0; k <= p->n_needles; k++) { /* the next one; among equals the first */
    int next_one = -1;
    for (int i = 0; i < p->n_needles; i++)
      if (!done[i] && (next_one < 0 || p->needles[i].place < p->needles[next_one].place)) next_one = i;
    const int64_t stop = next_one < 0 ? n : p->needles[next_one].place;
    memcpy(s->prompt + at, hay + read, (size_t)(stop - read));
    at += stop - read;
    read = stop;
    if (next_one < 0) break;
    const needle *x = &p->needles[next_one];
    memcpy(s->prompt + at, x->text, (size_t)x->size);
    const int64_t offset = at + (strstr(x->text, x->word) - x->text);
    for (int a = 0; a < s->n_answers; a++)
      if (!strcmp(s->answers[a].choices[s->answers[a].right], x->word)) s->answers[a].at = offset;
    at += x->size;
    done[next_one] = true;
  }
  s->question = at;
  memcpy(s->prompt + at, p->question, (size_t)question);
  if (p->asked >= 0) s->depth = (double)p->needles[p->asked].place / (double)n;
  emxi_free(hay);
  return EMX_OK;
}

/* Words alone. Rank r comes floor(n / (r^2 sum)) times, at least once up to rank 3 + CHOICES; what rounding leaves over is rank
 * 1's. */
static emx_status make_frequent(plan *p, const emxi_ruler_spec *spec, emxi_ruler_sample *s) {
  enum { TOP = 3, BESIDE = 7, STEP = EMXI_RULER_WORD + 1, LEAST = 50 };
  static const char question[] = "\nThe three words that come most often, the first of them most often of all, are ";
  const int64_t size = (int64_t)sizeof question - 1, n = (spec->length - size) / STEP;
  if (n < LEAST) return too_short(spec, LEAST * STEP + size);
  double sum = 0;
  for (int r = 1; r <= MAX_RANKS; r++) sum += 1.0 / (r * r);
  int64_t count[MAX_RANKS], left = n;
  const char *word[MAX_RANKS];
  int ranks = 0;
  for (int r = 1; r <= MAX_RANKS; r++) {
    int64_t c = (int64_t)((double)n / (sum * r * r));
    if (!c && r <= TOP + BESIDE) c = 1;
    if (!c) break;
    count[ranks] = c;
    word[ranks++] = new_word(&p->d, &p->w, "", 0);
    left -= c;
  }
  count[0] += left;
  EMX_TRY(take_prompt(spec, s));
  int32_t *order = emxi_alloc((size_t)n * sizeof *order);
  if (!order) {
    emxi_ruler_free(s);
    return emxi_fail(EMX_ERR_NOMEM, "ruler: no memory for %lld words", (long long)n);
  }
  int64_t i = 0;
  for (int r = 0; r < ranks; r++)
    for (int64_t c = 0; c < count[r]; c++) order[i++] = r;
  for (i = n - 1; i > 0; i--) {
    const int64_t j = below(&p->d, i + 1);
    const int32_t t = order[i];
    order[i] = order[j];
    order[j] = t;
  }
  s->question = s->length - size;
  memset(s->prompt, '.', (size_t)s->question); /* what is shorter than a word, at the end */
  for (i = 0; i < n; i++) {
    memcpy(s->prompt + i * STEP, word[order[i]], EMXI_RULER_WORD);
    s->prompt[i * STEP + EMXI_RULER_WORD] = ' ';
  }
  memcpy(s->prompt + s->question, question, (size_t)size);
  for (int a = 0; a < TOP; a++) {
    add_answer(p, s, word[a], &word[TOP], BESIDE);
    for (i = 0; order[i] != a; i++) {
    }
    s->answers[a].at = i * STEP;
  }
  emxi_free(order);
  return EMX_OK;
}

emx_status emxi_ruler_make(const emxi_ruler_spec *spec, int64_t i, emxi_ruler_sample *out) {
  const int task = spec->task;
  if (task < 0 || task >= EMXI_RULER_TASKS) return emxi_fail(EMX_ERR_INVALID, "ruler: no task has number %d", task);
  if (!(spec->depth <= 1)) return emxi_fail(EMX_ERR_INVALID, "ruler: depth is %g, expected at most 1", spec->depth);
  if (spec->length > INT32_MAX / 2)
    return emxi_fail(EMX_ERR_INVALID, "ruler: length is %lld, expected at most %d", (long long)spec->length, INT32_MAX / 2);
  if (spec->text && spec->text_size < 1) return emxi_fail(EMX_ERR_INVALID, "ruler: the text is empty");
  const char *text = task == EMXI_RULER_PASSKEY ? noise : spec->text ? spec->text : filler;
  const int64_t size = task == EMXI_RULER_PASSKEY ? (int64_t)sizeof noise - 1
                       : spec->text               ? spec->text_size
                                                  : (int64_t)sizeof filler - 1;
  plan p = {.asked = -1};
  emxi_ruler_sample s = {.depth = -1};
  /* the key of the draws: seed, task, length, depth in millionths, i, one after the other */
  const uint64_t depth = spec->depth < 0 ? UINT64_MAX : (uint64_t)(spec->depth * 1e6 + 0.5);
  p.d.key = mix(mix(mix(spec->seed, 0x72756c6572u, (uint64_t)task), (uint64_t)spec->length, depth), 1, (uint64_t)i);
  const int64_t from = task == EMXI_RULER_PASSKEY ? 0 : below(&p.d, size < INT32_MAX ? size : INT32_MAX);
  switch (task) {
    case EMXI_RULER_NIAH: plan_single(&p, &s, false, text, size); break;
    case EMXI_RULER_PASSKEY: plan_single(&p, &s, true, text, size); break;
    case EMXI_RULER_MULTIKEY: plan_keys(&p, &s, 1, text, size); break;
    case EMXI_RULER_MULTIQUERY: plan_keys(&p, &s, 4, text, size); break;
    case EMXI_RULER_MULTIVALUE: plan_values(&p, &s, text, size); break;
    case EMXI_RULER_TRACKING: plan_tracking(&p, &s, text, size); break;
    default: break;
  }
  EMX_TRY(task == EMXI_RULER_FREQUENT ? make_frequent(&p, spec, &s) : assemble(&p, spec, text, size, from, &s));
  *out = s;
  return EMX_OK;
}
void emxi_ruler_free(emxi_ruler_sample *s) {
  emxi_free(s->prompt);
  s->prompt = NULL;
}
