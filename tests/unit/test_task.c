/* The synthetic tasks: every generator against its definition, batches, the trainer on labels alone, and exact match against
 * greedy decoding. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "train/train.h"
#include "two_contexts.h"

enum { ROOM = 70000 };
static int32_t tokens[ROOM], labels[ROOM];
static int64_t length; /* of the last sample */
static emx_task_info info;

static emx_task_desc desc_of(int32_t kind, int64_t from, int64_t to) {
  emx_task_desc t;
  emx_task_desc_init(&t, kind);
  if (to) t.min_length = from, t.max_length = to;
  return t;
}
/* Draws a sample and checks what holds for every task. */
static void draw(const emx_task_desc *t, int64_t index) {
  info.struct_size = sizeof info;
  if (emx_task_get_info(t, &info)) fail_msg("%s", emx_last_error());
  assert_true(info.max_tokens <= ROOM);
  if (emx_task_sample(t, index, tokens, labels, info.max_tokens, &length)) fail_msg("%s", emx_last_error());
  assert_in_range(length, 1, info.max_tokens);
  assert_int_equal(tokens[0], info.bos);
  int64_t scored = 0;
  for (int64_t i = 0; i < length; i++) {
    assert_in_range(tokens[i], 0, info.vocab_size - 1);
    assert_true(tokens[i] != info.pad);
    assert_true(labels[i] >= EMX_UNSCORED && labels[i] < info.vocab_size);
    scored += labels[i] != EMX_UNSCORED;
  }
  assert_in_range(scored, 1, info.max_scored);
}
static int64_t find(int32_t token, int64_t from) {
  for (int64_t i = from; i < length; i++)
    if (tokens[i] == token) return i;
  return -1;
}
/* Sequence tasks: the answer is the label chain from `at` to the end, each label the next input; returns its length without the
 * end. */
static int64_t answer_at(int64_t at, int32_t end) {
  for (int64_t i = 0; i < at; i++) assert_int_equal(labels[i], EMX_UNSCORED);
  for (int64_t i = at; i + 1 < length; i++) assert_int_equal(labels[i], tokens[i + 1]);
  assert_int_equal(labels[length - 1], end);
  return length - 1 - at;
}

static void test_sequences(void **state) {
  (void)state;
  for (int32_t kind = EMX_TASK_COPY; kind <= EMX_TASK_SORT; kind++) {
    int lengths[9] = {0}, ids[32] = {0};
    const emx_task_desc t = desc_of(kind, 4, 12);
    for (int64_t i = 0; i < 900; i++) {
      draw(&t, i);
      const int64_t sep = find(info.sep, 0), s = sep - 1;
      assert_in_range(s, 4, 12);
      lengths[s - 4]++;
      assert_int_equal(answer_at(sep, info.eos), s);
      const int32_t *src = tokens + 1, *trg = tokens + sep + 1;
      int counts[32] = {0};
      for (int64_t j = 0; j < s; j++) {
        assert_in_range(src[j], 0, 31);
        ids[src[j]]++;
        counts[src[j]]++;
        counts[trg[j]]--;
        if (kind == EMX_TASK_COPY) assert_int_equal(trg[j], src[j]);
        if (kind == EMX_TASK_REVERSE) assert_int_equal(trg[j], src[s - 1 - j]);
        if (kind == EMX_TASK_SORT && j) assert_true(trg[j - 1] <= trg[j]);
      }
      for (int j = 0; j < 32; j++) assert_int_equal(counts[j], 0); /* a permutation */
    }
    for (int j = 0; j < 9; j++) assert_in_range(lengths[j], 53, 147); /* 100 +- 5 standard deviations of 9.4 */
    for (int j = 0; j < 32; j++) assert_in_range(ids[j], 150, 300);   /* about 225 +- 15 */
    assert_int_equal(info.vocab_size, 37);
  }
}

static void test_mqmtar(void **state) {
  (void)state;
  /* lengths of the paper's files at nominal 64 to 65,536 */
  static const int64_t nominal[] = {64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536},
                       real[] = {76, 131, 250, 488, 964, 1923, 3834, 7656, 15300, 30595, 61178};
  for (int n = 0; n < 11; n++)
    for (int64_t i = 0; i < (n < 4 ? 20 : 1); i++) {
      const emx_task_desc t = desc_of(EMX_TASK_MQMTAR, nominal[n], nominal[n]);
      draw(&t, i);
      assert_int_equal(info.vocab_size, 265);
      const int64_t sep = find(info.sep, 0), queries = sep - 12;
      assert_int_equal(sep - 1, real[n]);
      assert_int_equal(answer_at(sep, info.eos), 12);
      uint8_t *seen = calloc(2, 65536);
      int64_t pairs = 0;
      for (int64_t j = 1; j < queries; j++) {
        assert_true(tokens[j] != 2);
        if (tokens[j] != 1) continue;
        const int32_t key = (tokens[j - 2] - 3) << 8 | (tokens[j - 1] - 3),
                      value = (tokens[j + 1] - 3) << 8 | (tokens[j + 2] - 3);
        assert_true(tokens[j - 2] > 2 && tokens[j - 1] > 2 && tokens[j + 1] > 2 && tokens[j + 2] > 2);
        assert_int_equal(tokens[j + 3], 0);
        assert_false(seen[key]++);
        assert_false(seen[65536 + value]++);
        pairs++;
      }
      free(seen);
      assert_int_equal(pairs, 2 * nominal[n] / 15);
      for (int q = 0; q < 4; q++) { /* each query is a key of the sample, its answer the value behind it */
        const int32_t *query = tokens + queries + 3 * q, *trg = tokens + sep + 1 + 3 * q;
        int found = 0;
        assert_int_equal(query[0], 2);
        assert_int_equal(trg[0], 2);
        for (int64_t j = 3; j < queries; j++)
          if (tokens[j] == 1 && tokens[j - 2] == query[1] && tokens[j - 1] == query[2]) {
            assert_int_equal(tokens[j + 1], trg[1]);
            assert_int_equal(tokens[j + 2], trg[2]);
            found++;
          }
        assert_int_equal(found, 1);
      }
    }
  /* the spaces of a pair stand on both sides: of slots - 6 = 2 about (slots - 1) / (2 slots - 4) = 7/12 to the left */
  const emx_task_desc t = desc_of(EMX_TASK_MQMTAR, 64, 64); /* 8 pairs of 8 slots */
  int left = 0;
  for (int64_t i = 0; i < 200; i++) {
    draw(&t, i);
    for (int p = 0; p < 8; p++)
      for (int j = 0; j < 2 && tokens[1 + 8 * p + j] == 0; j++) left++;
  }
  assert_in_range(left, 1730, 2010); /* 1867 +- 5 standard deviations of 27 */
  /* 10,000 keys of a split: two splits share few of them, two seeds too (10,000^2 / 65,536 = 1,526 by chance) */
  static uint8_t keys[3][65536];
  for (int k = 0; k < 3; k++) {
    emx_task_desc u = desc_of(EMX_TASK_MQMTAR, 65536, 65536);
    u.split = k == 1 ? EMX_SPLIT_TEST : EMX_SPLIT_TRAIN;
    u.seed = k == 2 ? 2 : 1;
    for (int64_t i = 0; i < 30; i++) {
      draw(&u, i);
      for (int64_t j = 3; j < length - 30; j++)
        if (tokens[j] == 1) keys[k][(tokens[j - 2] - 3) << 8 | (tokens[j - 1] - 3)] = 1;
    }
  }
  int64_t sizes[3] = {0}, shared[2] = {0};
  for (int j = 0; j < 65536; j++) {
    for (int k = 0; k < 3; k++) sizes[k] += keys[k][j];
    for (int k = 0; k < 2; k++) shared[k] += keys[0][j] & keys[k + 1][j];
  }
  for (int k = 0; k < 3; k++) assert_int_equal(sizes[k], 10000); /* 30 samples of 8,738: one is missed with chance 1e-27 each */
  for (int k = 0; k < 2; k++) assert_in_range(shared[k], 1350, 1700);
}

static void test_tokens(void **state) {
  (void)state;
  emx_task_desc t = desc_of(EMX_TASK_COUNT, 25, 128);
  int runs = 0, longest = 0, shortest = 100;
  for (int64_t i = 0; i < 300; i++) {
    draw(&t, i);
    assert_int_equal(tokens[length - 1], info.eos);
    int here = 0;
    for (int64_t j = 1; j < length - 1; j++) {
      const bool first = j == 1 || tokens[j] != tokens[j - 1];
      assert_in_range(tokens[j], 0, 15);
      assert_int_equal(labels[j], first ? 0 : labels[j - 1] + 1);
      here += first;
      if (j == length - 2 || tokens[j + 1] != tokens[j]) {
        assert_in_range(labels[j] + 1, 2, 48);
        if (labels[j] + 1 > longest) longest = labels[j] + 1;
        if (labels[j] + 1 < shortest) shortest = labels[j] + 1;
      }
    }
    assert_in_range(here, 1, 5);
    runs += here;
  }
  assert_true(longest == 48 && shortest == 2 && runs > 600);
  t = desc_of(EMX_TASK_COUNT, 64, 64);
  for (int64_t i = 0; i < 50; i++) {
    draw(&t, i);
    int here = 0;
    for (int64_t j = 1; j < length - 1; j++) here += labels[j] == 0;
    assert_int_equal(here, 2); /* floor(64 / 25) runs */
  }

  t = desc_of(EMX_TASK_NBACK, 1, 9);
  for (int64_t i = 0; i < 200; i++) {
    draw(&t, i);
    assert_int_equal(tokens[1], 0);
    for (int64_t j = 1; j < length - 1; j++) {
      if (j > 1) assert_in_range(tokens[j], 1, 15);
      assert_int_equal(labels[j], j < 3 ? 0 : tokens[j - 2]);
    }
    assert_int_equal(tokens[length - 1], info.eos);
    assert_int_equal(labels[length - 1], EMX_UNSCORED);
  }

  static const double share[] = {0.8, 0.1, 0};
  for (int p = 0; p < 3; p++) {
    t = desc_of(EMX_TASK_FLIPFLOP, 32, 64);
    t.p_write = share[p];
    int64_t writes = 0, middle = 0, ones = 0;
    for (int64_t i = 0; i < 400; i++) {
      draw(&t, i);
      const int64_t read = length - 2;
      int32_t stored = -1;
      assert_int_equal(length % 2, 1); /* bos, 2 n - 1 tokens, the answer */
      assert_in_range(length / 2, 16, 32);
      assert_int_equal(tokens[1], 2);
      assert_int_equal(tokens[read], 4);
      for (int64_t j = 1; j < read; j += 2) {
        assert_true(tokens[j] == 2 || tokens[j] == 3);
        assert_in_range(tokens[j + 1], 0, 1);
        if (tokens[j] == 2) stored = tokens[j + 1];
        if (j > 1) writes += tokens[j] == 2, middle++;
      }
      assert_int_equal(labels[read], stored);
      assert_int_equal(answer_at(read, info.eos), 1);
      ones += stored;
    }
    assert_in_range(ones, 150, 250);
    assert_true(fabs((double)writes / (double)middle - share[p]) < 0.02); /* 9,000 commands: 5 standard deviations */
  }

  t = desc_of(EMX_TASK_PARITY, 0, 5);
  for (int64_t i = 0; i < 200; i++) {
    draw(&t, i);
    int32_t sum = 0;
    const int64_t sep = find(info.sep, 0);
    for (int64_t j = 1; j < sep; j++) sum += tokens[j];
    assert_int_equal(labels[sep], sum % 2 == 0);
    assert_int_equal(answer_at(sep, info.eos), 1);
  }
}

static void test_retrieval(void **state) {
  (void)state;
  static const int64_t lengths[] = {10, 31, 32, 64, 3200, 16384};
  static int32_t next[5600], seen[5600];
  int starts[4] = {0};
  for (int n = 0; n < 6; n++)
    for (int64_t i = 0; i < (lengths[n] > 1000 ? 3 : 200); i++) {
      const emx_task_desc t = desc_of(EMX_TASK_RETRIEVAL, lengths[n], lengths[n]);
      draw(&t, i);
      const int64_t pairs = (lengths[n] - 4) / 3, sep = 3 * pairs + 1;
      assert_int_equal(info.vocab_size, 5506);
      assert_int_equal(length, 3 * pairs + 4);
      assert_int_equal(tokens[sep], info.sep);
      memset(next, 255, sizeof next);
      for (int64_t p = 0; p < pairs; p++) {
        const int32_t key = tokens[1 + 3 * p], value = tokens[2 + 3 * p];
        assert_in_range(key, 0, 5499);
        assert_in_range(value, 0, 5499);
        assert_int_equal(tokens[3 + 3 * p], 5500);
        assert_int_equal(next[key], -1); /* a key once */
        next[key] = value;
      }
      const int32_t a = tokens[sep + 1];
      int64_t steps = 0;
      for (int32_t x = a; steps == 0 || x != a; x = next[x], steps++) {
        assert_true(next[x] >= 0);
        assert_true(steps < pairs);
      }
      assert_int_equal(steps, pairs); /* one cycle through all */
      assert_int_equal(labels[sep + 1], next[a]);
      assert_int_equal(answer_at(sep + 1, next[next[a]]), 1);
      if (pairs == 20)
        for (int64_t p = 0; p < pairs; p++)
          if (tokens[1 + 3 * p] == a) starts[4 * p / pairs]++;
      if (lengths[n] == 64) seen[a]++;
    }
  for (int j = 0; j < 4; j++) assert_in_range(starts[j], 20, 80); /* the pair asked for stands anywhere: 50 +- 6 of 200 */
  emx_task_desc long_answer = desc_of(EMX_TASK_RETRIEVAL, 32, 32);
  long_answer.answers = 6;
  for (int64_t i = 0; i < 50; i++) { /* 8 pairs, six steps */
    draw(&long_answer, i);
    assert_int_equal(length, 32);
    assert_int_equal(answer_at(26, labels[31]), 5);
    for (int64_t p = 0; p < 8; p++) next[tokens[1 + 3 * p]] = tokens[2 + 3 * p];
    for (int64_t j = 26; j < 32; j++) assert_int_equal(labels[j], next[tokens[j]]);
  }
  int distinct = 0;
  for (int j = 0; j < 5500; j++) distinct += seen[j] > 0;
  assert_true(distinct > 185); /* of 200 draws from 5,500: 196 +- 2 */
}

/* A sample depends on (seed, split, index) alone; another seed, split or index is another sample. */
static void test_reproducible(void **state) {
  (void)state;
  static int32_t kept[2][2000];
  for (int32_t kind = EMX_TASK_COPY; emx_task_name(kind); kind++) {
    emx_task_desc t = desc_of(kind, 40, 60);
    draw(&t, 1234567890123);
    const int64_t n = length;
    memcpy(kept[0], tokens, sizeof kept[0]);
    memcpy(kept[1], labels, sizeof kept[1]);
    draw(&t, 5);
    assert_true(length != n || memcmp(kept[0], tokens, (size_t)n * sizeof *tokens));
    t.split = EMX_SPLIT_TEST;
    draw(&t, 1234567890123);
    assert_true(length != n || memcmp(kept[0], tokens, (size_t)n * sizeof *tokens));
    t.split = EMX_SPLIT_TRAIN;
    t.seed = 2;
    draw(&t, 1234567890123);
    assert_true(length != n || memcmp(kept[0], tokens, (size_t)n * sizeof *tokens));
    t.seed = 1;
    draw(&t, 1234567890123);
    assert_int_equal(length, n);
    assert_memory_equal(kept[0], tokens, (size_t)n * sizeof *tokens);
    assert_memory_equal(kept[1], labels, (size_t)n * sizeof *labels);
  }
}

static void test_refused(void **state) {
  (void)state;
  emx_task_desc t = desc_of(EMX_TASK_RETRIEVAL, 16, 32);
  info.struct_size = sizeof info;
#define REFUSED(change, text)                                              \
  do {                                                                     \
    emx_task_desc bad = t;                                                 \
    change;                                                                \
    assert_int_equal(emx_task_get_info(&bad, &info), EMX_ERR_INVALID);     \
    if (!strstr(emx_last_error(), text)) fail_msg("%s", emx_last_error()); \
  } while (0)
  REFUSED(bad.kind = 0, "kind is 0");
  REFUSED(bad.kind = 10, "kind is 10");
  REFUSED(bad.split = 3, "split is 3");
  REFUSED(bad.min_length = 9, "9 to 32");
  REFUSED(bad.max_length = 15, "16 to 15");
  REFUSED(bad.max_length = 3 * 5500 + 5, "10..16504");
  REFUSED(bad.answers = 0, "0 answers");
  REFUSED(bad.answers = 4, "4 answers"); /* 16 tokens have 3 pairs then */
  REFUSED(bad.p_write = 1.5, "p_write");
  REFUSED(bad.p_write = NAN, "p_write");
  REFUSED((bad.kind = EMX_TASK_MQMTAR, bad.min_length = 29), "30");
  REFUSED((bad.kind = EMX_TASK_COUNT, bad.min_length = 24), "25");
  REFUSED((bad.kind = EMX_TASK_FLIPFLOP, bad.min_length = 3), "4");
  REFUSED((bad.kind = EMX_TASK_COPY, bad.max_length = INT64_MAX), "expected a range");
#undef REFUSED
  int64_t n = -7;
  assert_int_equal(emx_task_sample(&t, 0, tokens, labels, 30, &n), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "31"));
  assert_int_equal(emx_task_sample(&t, -1, tokens, labels, ROOM, &n), EMX_ERR_INVALID);
  assert_int_equal(emx_task_sample(&t, 0, NULL, labels, ROOM, &n), EMX_ERR_INVALID);
  assert_int_equal(n, -7);
  assert_null(emx_task_name(-1));
  assert_null(emx_task_name(10));
  assert_string_equal(emx_task_name(EMX_TASK_RETRIEVAL), "retrieval");
}

/* ---- training */

static emx_model_config model_of(const emx_task_desc *t) {
  emx_model_config c;
  emx_task_info i = {.struct_size = sizeof i};
  assert_int_equal(emx_task_get_info(t, &i), EMX_OK);
  emx_model_config_init(&c);
  c.vocab_size = i.vocab_size;
  c.task = t->kind;
  c.hidden_size = 32;
  c.intermediate_size = 32;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 16;
  c.alibi_num_heads = 2;
  c.max_position = (int32_t)i.max_tokens;
  return c;
}
static emx_train_opts opts_of(int64_t steps) {
  emx_train_opts o;
  emx_train_opts_init(&o);
  o.steps = steps;
  o.warmup = steps < 10 ? 1 : 10;
  o.batch = 8;
  o.lr = 5e-3;
  o.save_dtype = EMX_F32;
  return o;
}
static emx_trainer *trainer_of(emx_ctx *ctx, const emx_task_desc *t, const emx_train_opts *o) {
  const emx_model_config c = model_of(t);
  emx_train_data data;
  emx_trainer *trainer;
  emx_train_data_init(&data);
  data.task = t;
  if (emx_trainer_create(ctx, &c, o, &data, &trainer)) fail_msg("%s", emx_last_error());
  return trainer;
}

/* The loss of a step is the mean over the labels of its samples, each sample by itself: neither padding nor neighbours change it,
 * and padding gets no gradient. Sums of 1e-7 roundings over at most 60 tokens: 1e-5 is far above, a wrong row far below. */
static void test_batch(void **state) {
  (void)state;
  static const int32_t kinds[] = {EMX_TASK_RETRIEVAL, EMX_TASK_COUNT, EMX_TASK_SORT, EMX_TASK_FLIPFLOP};
  for (int k = 0; k < 4; k++) {
    const emx_task_desc t = kinds[k] == EMX_TASK_COUNT ? desc_of(kinds[k], 25, 60) : desc_of(kinds[k], 10, 30);
    const emx_train_opts o = opts_of(3);
    emx_trainer *trainer = trainer_of(two, &t, &o);
    emxi_net *net = &trainer->net;
    for (int64_t i = 0; i < net->w.count; i++) net->w.data[i] *= 3; /* away from the start, where all losses are ln V */
    int64_t T, all_tokens, scored = 0, real = 0;
    double loss, sum = 0;
    for (int64_t i = 0; i < o.batch; i++) { /* each alone */
      assert_int_equal(emxi_task_batch(&t, 100 + i, 1, net, &T, &all_tokens), EMX_OK);
      assert_int_equal(T, all_tokens);
      draw(&t, 100 + i);
      assert_int_equal(T, length);
      real += T;
      int64_t here = 0;
      for (int64_t j = 0; j < length; j++) {
        assert_int_equal(net->tokens[j], tokens[j]);
        if (labels[j] == EMX_UNSCORED) continue;
        assert_int_equal(net->scored[here], j);
        assert_int_equal(net->targets[here++], labels[j]);
      }
      assert_int_equal(net->n_scored, here);
      assert_int_equal(emxi_net_forward(net, 1, T, false, &loss), EMX_OK);
      sum += loss * (double)here;
      scored += here;
    }
    assert_int_equal(emxi_task_batch(&t, 100, o.batch, net, &T, &all_tokens), EMX_OK);
    assert_int_equal(all_tokens, real);
    assert_true(o.batch * T > real); /* there is padding */
    assert_int_equal(net->n_scored, scored);
    assert_int_equal(emxi_net_forward(net, o.batch, T, true, &loss), EMX_OK);
    assert_true(fabs(loss - sum / (double)scored) < 1e-5);
    assert_int_equal(emxi_net_backward(net, o.batch, T), EMX_OK);

    /* the gradient of the same labels when every row has logits: unscored rows weighted with zero */
    const int64_t count = net->w.count;
    float *g = malloc((size_t)count * sizeof *g);
    memcpy(g, net->g.data, (size_t)count * sizeof *g);
    /* central differences along the gradient of one random direction: d loss = g . u h */
    float *u = malloc((size_t)count * sizeof *u), *w = malloc((size_t)count * sizeof *w);
    double want = 0, got = 0, top = 0;
    for (int64_t i = 0; i < count; i++) {
      u[i] = (float)((i * 2654435761u >> 7) % 1000) / 500 - 1;
      want += (double)g[i] * u[i];
      top += fabs((double)g[i] * u[i]);
    }
    memcpy(w, net->w.data, (size_t)count * sizeof *w);
    for (int side = -1; side <= 1; side += 2) {
      for (int64_t i = 0; i < count; i++) net->w.data[i] = w[i] + (float)side * 2e-4f * u[i];
      assert_int_equal(emxi_net_forward(net, o.batch, T, false, &loss), EMX_OK);
      got += side * loss / 4e-4;
    }
    /* f32 losses of about 4 are good to 1e-6, so the difference to 3e-3; curvature adds h^2 */
    if (!(fabs(got - want) < 1e-2 + 0.03 * fabs(want))) fail_msg("task %d: %g, gradient says %g of %g", kinds[k], got, want, top);
    free(g);
    free(u);
    free(w);
    emx_trainer_destroy(trainer);
  }
}

static void folder_remove(const char *path) {
  DIR *dir = opendir(path);
  if (!dir) return;
  for (struct dirent *e; (e = readdir(dir));) {
    char name[512];
    snprintf(name, sizeof name, "%s/%s", path, e->d_name);
    unlink(name);
  }
  closedir(dir);
  rmdir(path);
}

static void test_resume(void **state) {
  (void)state;
  const emx_task_desc t = desc_of(EMX_TASK_RETRIEVAL, 10, 24);
  const emx_train_opts o = opts_of(6);
  char folder[] = "/tmp/emx_task_XXXXXX";
  assert_non_null(mkdtemp(folder));
  emx_trainer *whole = trainer_of(one, &t, &o), *half = trainer_of(two, &t, &o), *again;
  emx_train_stats a = {.struct_size = sizeof a}, b = {.struct_size = sizeof b};
  for (int i = 0; i < 3; i++) {
    assert_int_equal(emx_trainer_step(whole, &a), EMX_OK);
    assert_int_equal(emx_trainer_step(half, &b), EMX_OK);
    assert_true(a.loss == b.loss && a.tokens == b.tokens && a.tokens < o.batch * 25);
  }
  assert_int_equal(emx_trainer_save(half, folder), EMX_OK);
  emx_trainer_destroy(half);
  emx_train_data data;
  emx_train_data_init(&data);
  data.task = &t;
  emx_task_desc other = t;
  emx_train_data wrong = data;
  wrong.task = &other;
  other.max_length = 25;
  assert_int_equal(emx_trainer_resume(two, folder, &o, &wrong, &again), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "longest length"));
  other = t;
  other.seed = 9;
  assert_int_equal(emx_trainer_resume(two, folder, &o, &wrong, &again), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "seed of the task"));
  other = desc_of(EMX_TASK_SORT, 10, 24);
  assert_int_equal(emx_trainer_resume(two, folder, &o, &wrong, &again), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "retrieval"));
  emx_train_opts large = o;
  large.embed_dropout = 0.5;
  assert_int_equal(emx_trainer_resume(two, folder, &large, &data, &again), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "embed_dropout"));
  assert_int_equal(emx_trainer_resume(two, folder, &o, &data, &again), EMX_OK);
  for (int i = 3; i < 6; i++) {
    assert_int_equal(emx_trainer_step(whole, &a), EMX_OK);
    assert_int_equal(emx_trainer_step(again, &b), EMX_OK);
    assert_true(a.loss == b.loss && a.grad_norm == b.grad_norm);
  }
  assert_memory_equal(whole->net.w.data, again->net.w.data, (size_t)whole->net.w.count * sizeof(float));

  /* a folder's model knows its task */
  emx_model *model;
  emx_model_config c = {.struct_size = sizeof c};
  assert_int_equal(emx_model_open(one, folder, &model), EMX_OK);
  assert_int_equal(emx_model_get_config(model, &c), EMX_OK);
  assert_int_equal(c.task, EMX_TASK_RETRIEVAL);
  emx_task_score score = {.struct_size = sizeof score, .samples = -3};
  other = desc_of(EMX_TASK_SORT, 10, 24);
  assert_int_equal(emx_task_evaluate(model, &other, 0, 4, NULL, NULL, &score), EMX_ERR_INVALID);
  assert_non_null(strstr(emx_last_error(), "retrieval, not sort"));
  assert_int_equal(emx_task_evaluate(model, &t, 0, 0, NULL, NULL, &score), EMX_ERR_INVALID);
  assert_int_equal(emx_task_evaluate(model, &t, -1, 4, NULL, NULL, &score), EMX_ERR_INVALID);
  assert_int_equal(score.samples, -3);
  emx_model_close(model);
  emx_trainer_destroy(whole);
  emx_trainer_destroy(again);
  folder_remove(folder);
}

static void test_mixed_up(void **state) {
  (void)state;
  const emx_task_desc t = desc_of(EMX_TASK_PARITY, 4, 8);
  const emx_train_opts o = opts_of(2);
  emx_model_config c = model_of(&t);
  static const uint8_t text[100];
  const uint8_t *const files[] = {text};
  const int64_t sizes[] = {100};
  emx_train_data data;
  emx_trainer *trainer;
  emx_train_data_init(&data);
#define REFUSED(text)                                                                    \
  do {                                                                                   \
    assert_int_equal(emx_trainer_create(one, &c, &o, &data, &trainer), EMX_ERR_INVALID); \
    if (!strstr(emx_last_error(), text)) fail_msg("%s", emx_last_error());               \
  } while (0)
  data.files = files;
  data.sizes = sizes;
  data.n_files = 1;
  REFUSED("parity, the data are text");
  data.task = &t;
  REFUSED("a task and 1 files");
  data.n_files = 0;
  c.vocab_size = 256;
  REFUSED("vocabulary of 256");
  c.task = EMX_TASK_COPY;
  REFUSED("copy, not parity");
  c.task = EMX_TASK_NONE;
  REFUSED("of text, not of task parity");
#undef REFUSED
  c.task = 77;
  assert_int_equal(emx_trainer_create(one, &c, &o, &data, &trainer), EMX_ERR_INVALID);
  emx_train_opts long_steps = opts_of(2);
  long_steps.long_length = 10;
  long_steps.long_every = 2;
  c = model_of(&t);
  assert_int_equal(emx_trainer_create(one, &c, &long_steps, &data, &trainer), EMX_ERR_INVALID);
  trainer = trainer_of(one, &t, &o);
  double nats;
  assert_int_equal(emx_trainer_evaluate(trainer, text, 100, &nats), EMX_ERR_INVALID);
  emx_trainer_destroy(trainer);
}

/* What emx_task_evaluate calls exact is what greedy decoding answers, token by token through a session's cache (f32 keys and
 * values: the two paths round differently, but only a tie could part them). A small model learns half of its samples. */
static void test_greedy(void **state) {
  (void)state;
  static const int32_t kinds[] = {EMX_TASK_FLIPFLOP, EMX_TASK_COPY};
  for (int k = 0; k < 2; k++) {
    const emx_task_desc t = k ? desc_of(kinds[k], 1, 3) : desc_of(kinds[k], 8, 24);
    emx_train_opts o = opts_of(k ? 250 : 60);
    o.batch = 32;
    emx_trainer *trainer = trainer_of(two, &t, &o);
    emx_train_stats s = {.struct_size = sizeof s};
    for (int64_t i = 0; i < o.steps; i++) assert_int_equal(emx_trainer_step(trainer, &s), EMX_OK);
    char folder[] = "/tmp/emx_task_XXXXXX";
    assert_non_null(mkdtemp(folder));
    assert_int_equal(emx_trainer_save(trainer, folder), EMX_OK);
    emx_task_desc test = t;
    test.split = EMX_SPLIT_TEST;
    emx_task_score all = {.struct_size = sizeof all}, alone = all, from_trainer = all;
    enum { SAMPLES = 60 };
    assert_int_equal(emx_trainer_evaluate_task(trainer, &test, 0, SAMPLES, &from_trainer), EMX_OK);
    emx_trainer_destroy(trainer);
    emx_model *model;
    emx_session_opts so;
    emx_session *session;
    assert_int_equal(emx_model_open(one, folder, &model), EMX_OK);
    folder_remove(folder);
    assert_int_equal(emx_task_evaluate(model, &test, 0, SAMPLES, NULL, NULL, &all), EMX_OK);
    assert_memory_equal(&all, &from_trainer, sizeof all);
    assert_int_equal(all.samples, SAMPLES);
    emx_session_opts_init(&so);
    so.kv_dtype = EMX_F32;
    assert_int_equal(emx_session_create(model, &so, &session), EMX_OK);
    emx_sample_opts greedy;
    emx_sample_opts_init(&greedy);
    emx_model_config c = {.struct_size = sizeof c};
    assert_int_equal(emx_model_get_config(model, &c), EMX_OK);
    float *logits = malloc((size_t)c.vocab_size * sizeof *logits);
    int64_t exact = 0;
    for (int64_t i = 0; i < SAMPLES; i++) {
      draw(&test, i);
      int64_t prompt = 0;
      while (labels[prompt] == EMX_UNSCORED) prompt++;
      assert_int_equal(emx_session_truncate(session, 0), EMX_OK);
      assert_int_equal(emx_session_prefill(session, tokens, prompt + 1, NULL, logits, NULL, NULL), EMX_OK);
      bool same = true;
      for (int64_t j = prompt; j < length && same; j++) {
        int32_t token;
        assert_int_equal(emx_sample(logits, c.vocab_size, &greedy, j, &token), EMX_OK);
        same = token == labels[j];
        if (same && j + 1 < length) assert_int_equal(emx_session_decode(session, token, logits), EMX_OK);
      }
      assert_int_equal(emx_task_evaluate(model, &test, i, 1, NULL, NULL, &alone), EMX_OK);
      assert_int_equal(alone.exact, same);
      exact += same;
    }
    assert_int_equal(all.exact, exact);
    if (exact < 5 || exact > SAMPLES - 2) fail_msg("task %d: %d of %d exact show nothing", kinds[k], (int)exact, SAMPLES);
    free(logits);
    emx_session_destroy(session);
    emx_model_close(model);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_sequences), cmocka_unit_test(test_mqmtar),  cmocka_unit_test(test_tokens),
      cmocka_unit_test(test_retrieval), cmocka_unit_test(test_refused), cmocka_unit_test(test_reproducible),
      cmocka_unit_test(test_batch),     cmocka_unit_test(test_resume),  cmocka_unit_test(test_mixed_up),
      cmocka_unit_test(test_greedy),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
