/* The generator of long-context questions: exact lengths, answers where they are said to be and true by what the prompt says,
 * samples that depend on nothing but their own number. The questions are parsed here by themselves, as a reader would. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "train/ruler.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static emxi_ruler_spec spec_of(int task, int64_t length) {
  return (emxi_ruler_spec){.task = task, .length = length, .depth = -1, .seed = 5};
}
static emxi_ruler_sample make(const emxi_ruler_spec *spec, int64_t i) {
  emxi_ruler_sample s;
  if (emxi_ruler_make(spec, i, &s)) fail_msg("%s", emx_last_error());
  return s;
}
static int count(const char *hay, int64_t size, const char *needle) {
  int n = 0;
  const size_t m = strlen(needle);
  for (const char *p = hay; (p = memmem(p, (size_t)(hay + size - p), needle, m)); p += m) n++;
  return n;
}
static const char *right(const emxi_ruler_sample *s, int a) { return s->answers[a].choices[s->answers[a].right]; }
/* The one occurrence of a string before the question. */
static const char *only(const emxi_ruler_sample *s, const char *text) {
  assert_int_equal(count(s->prompt, s->question, text), 1);
  return memmem(s->prompt, (size_t)s->question, text, strlen(text));
}

static void check_form(int task, const emxi_ruler_spec *spec, const emxi_ruler_sample *s) {
  static const int answers[EMXI_RULER_TASKS] = {1, 1, 4, 4, 5, 3, 1}, choices[EMXI_RULER_TASKS] = {8, 8, 5, 8, 6, 8, 8};
  assert_int_equal(s->length, spec->length);
  assert_int_equal(strlen(s->prompt), spec->length); /* no NUL inside either */
  assert_true(s->question > 0 && s->question < s->length);
  assert_int_equal(s->n_answers, answers[task]);
  for (int a = 0; a < s->n_answers; a++) {
    const emxi_ruler_answer *x = &s->answers[a];
    assert_int_equal(x->n_choices, choices[task]);
    assert_in_range(x->right, 0, x->n_choices - 1);
    for (int i = 0; i < x->n_choices; i++) {
      assert_int_equal(strlen(x->choices[i]), EMXI_RULER_WORD);
      for (int j = 0; j < i; j++) assert_string_not_equal(x->choices[i], x->choices[j]);
    }
    assert_in_range(x->at, 0, s->question - EMXI_RULER_WORD);
    assert_memory_equal(s->prompt + x->at, right(s, a), EMXI_RULER_WORD);
    const int times = count(s->prompt, s->length, right(s, a));
    if (task == EMXI_RULER_TRACKING)
      assert_int_equal(times, a < 4 ? 2 : 1); /* explained, and used by the next name */
    else if (task != EMXI_RULER_FREQUENT)
      assert_int_equal(times, 1);
  }
}

/* What the prompt says, read back: the answers must follow from the sentences. */
static void check_truth(int task, const emxi_ruler_sample *s) {
  char text[160], key[4][32];
  const char *question = s->prompt + s->question;
  switch (task) {
    case EMXI_RULER_PASSKEY: assert_memory_equal(only(s, "The pass word is ") + 17, right(s, 0), EMXI_RULER_WORD); break;
    case EMXI_RULER_NIAH:
    case EMXI_RULER_MULTIKEY:
      assert_int_equal(sscanf(question, "\nWhat is the secret word of the %31[a-z]? The", key[0]), 1);
      snprintf(text, sizeof text, "The secret word of the %s is ", key[0]);
      assert_memory_equal(only(s, text) + strlen(text), right(s, 0), EMXI_RULER_WORD);
      for (int i = 0; i < 8; i++) /* the other words are in the text, or nowhere */
        if (i != s->answers[0].right)
          assert_int_equal(count(s->prompt, s->length, s->answers[0].choices[i]), task == EMXI_RULER_MULTIKEY);
      break;
    case EMXI_RULER_MULTIQUERY:
      assert_int_equal(sscanf(question, "\nThe secret words of the %31[a-z], the %31[a-z], the %31[a-z] and the %31[a-z] are",
                              key[0], key[1], key[2], key[3]),
                       4);
      for (int a = 0; a < 4; a++) {
        snprintf(text, sizeof text, "The secret word of the %s is ", key[a]);
        assert_memory_equal(only(s, text) + strlen(text), right(s, a), EMXI_RULER_WORD);
        for (int i = 0; i < 8; i++) assert_int_equal(count(s->prompt, s->length, s->answers[a].choices[i]), 1);
      }
      break;
    case EMXI_RULER_MULTIVALUE: {
      assert_int_equal(sscanf(question, "\nWhat are the four secret words of the %31[a-z]? The", key[0]), 1);
      snprintf(text, sizeof text, "One secret word of the %s is ", key[0]);
      const char *p = s->prompt;
      for (int a = 0; a < 4; a++) {
        p = strstr(p, text) + strlen(text);
        assert_memory_equal(p, right(s, a), EMXI_RULER_WORD);
        for (int i = 0; i < 5; i++) assert_int_equal(count(s->prompt, s->length, s->answers[a].choices[i]), 1);
      }
      assert_null(strstr(p, text));
      break;
    }
    case EMXI_RULER_TRACKING: {
      char value[8], name[8] = "", chain[5][8];
      assert_int_equal(sscanf(question, "\nFive names stand for %6[a-z].", value), 1);
      snprintf(text, sizeof text, " stands for %s. ", value);
      const char *p = only(s, text);
      for (int a = 0; a < 5; a++) { /* from the value along the chain; explained in this order */
        memcpy(name, p - EMXI_RULER_WORD, EMXI_RULER_WORD);
        assert_string_equal(name, right(s, a));
        memcpy(chain[a], name, sizeof name);
        snprintf(text, sizeof text, " stands for what %s stands for. ", name);
        if (a < 4) {
          const char *q = only(s, text);
          assert_true(q > p);
          p = q;
        }
      }
      for (int a = 0; a < 5; a++)
        for (int i = 0; i < 6; i++) /* the others are names too, but not of this chain */
          if (i != s->answers[a].right) {
            assert_true(count(s->prompt, s->question, s->answers[a].choices[i]) >= 1);
            for (int b = 0; b < 5; b++) assert_string_not_equal(s->answers[a].choices[i], chain[b]);
          }
      break;
    }
    case EMXI_RULER_FREQUENT:
      for (int a = 0; a < 3; a++) {
        const int times = count(s->prompt, s->question, right(s, a));
        if (a) assert_true(times < count(s->prompt, s->question, right(s, a - 1)));
        assert_ptr_equal(memmem(s->prompt, (size_t)s->question, right(s, a), 6), s->prompt + s->answers[a].at);
        for (int i = 0; i < 8; i++)
          if (i != s->answers[a].right) assert_in_range(count(s->prompt, s->question, s->answers[a].choices[i]), 1, times - 1);
      }
      for (int64_t i = 0; i < s->question; i++) assert_true(strchr("abcdefghijklmnopqrstuvwxyz .", s->prompt[i]));
      break;
    default: break;
  }
}

static void test_samples(void **state) {
  (void)state;
  for (int task = 0; task < EMXI_RULER_TASKS; task++) {
    assert_non_null(emxi_ruler_name(task));
    for (int64_t length = 1000; length < 1012; length++) /* every remainder of a word */
      for (int i = 0; i < 6; i++) {
        emxi_ruler_spec spec = spec_of(task, i % 2 ? length : 7 * length);
        emxi_ruler_sample s = make(&spec, i);
        check_form(task, &spec, &s);
        check_truth(task, &s);
        emxi_ruler_free(&s);
      }
  }
  assert_null(emxi_ruler_name(EMXI_RULER_TASKS));
  assert_null(emxi_ruler_name(-1));
}

static bool same(const emxi_ruler_sample *a, const emxi_ruler_sample *b) {
  if (a->length != b->length || a->n_answers != b->n_answers || memcmp(a->prompt, b->prompt, (size_t)a->length)) return false;
  for (int i = 0; i < a->n_answers; i++)
    if (a->answers[i].right != b->answers[i].right ||
        memcmp(a->answers[i].choices, b->answers[i].choices, sizeof a->answers[i].choices))
      return false;
  return true;
}
static void test_reproducible(void **state) {
  (void)state;
  for (int task = 0; task < EMXI_RULER_TASKS; task++) {
    emxi_ruler_spec spec = spec_of(task, 1500), other = spec;
    emxi_ruler_sample a = make(&spec, 7), b = make(&spec, 3), c = make(&spec, 7);
    assert_true(same(&a, &c)); /* whatever was made between */
    assert_false(same(&a, &b));
    emxi_ruler_free(&b), emxi_ruler_free(&c);
    other.seed++;
    b = make(&other, 7);
    assert_string_not_equal(right(&a, 0), right(&b, 0));
    emxi_ruler_free(&b);
    other = spec;
    other.length++;
    b = make(&other, 7);
    assert_string_not_equal(right(&a, 0), right(&b, 0));
    emxi_ruler_free(&b);
    other = spec;
    other.depth = 0.5;
    b = make(&other, 7);
    assert_string_not_equal(right(&a, 0), right(&b, 0));
    other.depth = 0.25;
    c = make(&other, 7);
    assert_string_not_equal(right(&c, 0), right(&b, 0));
    emxi_ruler_free(&a), emxi_ruler_free(&b), emxi_ruler_free(&c);
  }
}

/* The right choice stands anywhere: a model that always takes the first one scores chance. */
static void test_order_of_choices(void **state) {
  (void)state;
  int seen[8] = {0};
  for (int i = 0; i < 800; i++) {
    emxi_ruler_spec spec = spec_of(EMXI_RULER_PASSKEY, 400);
    emxi_ruler_sample s = make(&spec, i);
    seen[s.answers[0].right]++;
    emxi_ruler_free(&s);
  }
  for (int i = 0; i < 8; i++) assert_in_range(seen[i], 60, 140); /* 100 expected, standard deviation 9.4 */
}

/* Taking the needle out leaves the text, read as a ring, and its place is the depth asked for, at the start of a sentence. */
static void test_depth(void **state) {
  (void)state;
  char text[301];
  for (int i = 0; i < 300; i++) text[i] = "Abc defgh ijk lmnopqr st. "[i % 26];
  text[298] = '#'; /* where the ring closes */
  for (int task = 0; task < 3; task++) {
    static const int tasks[3] = {EMXI_RULER_NIAH, EMXI_RULER_MULTIKEY, EMXI_RULER_PASSKEY};
    for (int d = 0; d <= 10; d++) {
      emxi_ruler_spec spec = spec_of(tasks[task], 6000);
      spec.depth = d / 10.0;
      spec.text = text;
      spec.text_size = 300;
      emxi_ruler_sample s = make(&spec, d);
      const int64_t at = (const char *)memrchr(s.prompt, 'T', (size_t)s.answers[0].at) - s.prompt; /* "The ... word" */
      assert_true(fabs(s.depth - spec.depth) <= 160.0 / 5000);
      /* other needles lie in between; their share is that of the text but for chance */
      assert_true(fabs((double)at / (double)s.question - spec.depth) < (tasks[task] == EMXI_RULER_MULTIKEY ? 0.08 : 0.04));
      assert_true(at == 0 || (s.prompt[at - 1] == ' ' && s.prompt[at - 2] == '.'));
      if (tasks[task] == EMXI_RULER_NIAH) {
        const int64_t end = strstr(s.prompt + at, ". ") + 2 - s.prompt, n = s.question - (end - at);
        char *rest = malloc((size_t)n);
        assert_non_null(rest);
        memcpy(rest, s.prompt, (size_t)at);
        memcpy(rest + at, s.prompt + end, (size_t)(s.question - end));
        int64_t from = 0; /* some turn of the ring fits */
        for (int64_t i = 0; i < n && from < 300; i++)
          if (rest[i] != text[(from + i) % 300]) i = -1, from++;
        assert_true(from < 300);
        free(rest);
      }
      emxi_ruler_free(&s);
    }
  }
  /* a text without sentences: exactly where asked */
  memset(text, 'x', 300);
  emxi_ruler_spec spec = spec_of(EMXI_RULER_NIAH, 2000);
  spec.text = text;
  spec.text_size = 300;
  spec.depth = 0.5;
  emxi_ruler_sample s = make(&spec, 0);
  assert_true(fabs(s.depth - 0.5) < 1e-3);
  emxi_ruler_free(&s);
}

static void test_errors(void **state) {
  (void)state;
  emxi_ruler_sample s;
  for (int task = 0; task < EMXI_RULER_TASKS; task++) { /* the shortest length that the message names does */
    emxi_ruler_spec spec = spec_of(task, 10);
    assert_int_equal(emxi_ruler_make(&spec, 0, &s), EMX_ERR_INVALID);
    const char *least = strstr(emx_last_error(), "at least ");
    assert_non_null(least);
    spec.length = atoll(least + 9) - 1;
    assert_int_equal(emxi_ruler_make(&spec, 0, &s), EMX_ERR_INVALID);
    spec.length++;
    /* the least length is of that draw: words are of one length, keys are not, and the length is part of the draw */
    for (int64_t i = 0; emxi_ruler_make(&spec, i, &s); i++) assert_in_range(i, 0, 1000);
    check_form(task, &spec, &s);
    check_truth(task, &s);
    emxi_ruler_free(&s);
  }
  emxi_ruler_spec spec = spec_of(EMXI_RULER_TASKS, 1000);
  assert_int_equal(emxi_ruler_make(&spec, 0, &s), EMX_ERR_INVALID);
  spec = spec_of(0, 1000);
  spec.depth = 1.01;
  assert_int_equal(emxi_ruler_make(&spec, 0, &s), EMX_ERR_INVALID);
  spec.depth = NAN;
  assert_int_equal(emxi_ruler_make(&spec, 0, &s), EMX_ERR_INVALID);
  spec.depth = -1;
  spec.text = "";
  assert_int_equal(emxi_ruler_make(&spec, 0, &s), EMX_ERR_INVALID);
  spec.text = NULL;
  spec.length = INT64_MAX;
  assert_int_equal(emxi_ruler_make(&spec, 0, &s), EMX_ERR_INVALID);
  spec.length = 1000;
  for (int n = 0; n < 2; n++) {
    emxi_alloc_fail_after(n);
    assert_int_equal(emxi_ruler_make(&spec, 0, &s), EMX_ERR_NOMEM);
    spec.task = n ? 0 : EMXI_RULER_FREQUENT;
    emxi_alloc_fail_after(n);
    assert_int_equal(emxi_ruler_make(&spec, 0, &s), EMX_ERR_NOMEM);
  }
  emxi_alloc_fail_after(-1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_samples), cmocka_unit_test(test_reproducible), cmocka_unit_test(test_order_of_choices),
      cmocka_unit_test(test_depth),   cmocka_unit_test(test_errors),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
