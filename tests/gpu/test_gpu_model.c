/* Models on a GPU beside the same models on the CPU: every position, scale and alpha, prefill of odd lengths, decoding, selectors, forks
 * and truncation, what a GPU's session refuses, and the text that the shipped models write.
 * `test_gpu_model [FOLDER [FILTER]]`: the shipped models are in FOLDER; only tests that the filter lets through.
 *
 * The CPU's session reads a token at a time (chunk 1): its own tests hold prefill against that and against float64. */
#define _DEFAULT_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "cuda/backend_cuda.h"
#include "gpu_case.h"
#include "tiny_model.h"

#include <unistd.h>

enum { N = 700, V = 50 };
static char folder[] = "/tmp/emx_gpu_model_XXXXXX";
static const char *shipped = EMX_SOURCE "/models";
static int32_t tokens[N];

/* The same model on both devices, a session each. */
typedef struct pair {
  emx_model *model[2]; /* CPU, GPU */
  emx_session *s[2];
} pair;
static void pair_open(pair *p, const char *path, int32_t dtype, int32_t chunk, int32_t summaries, int64_t room) {
  *p = (pair){0};
  for (int i = 0; i < 2; i++) {
    emx_session_opts o;
    emx_session_opts_init(&o);
    o.kv_dtype = dtype;
    o.max_tokens = room;
    o.chunk = i ? chunk : 1;
    o.summaries |= summaries;
    OK(emx_model_open(i ? gpu : cpu, path, &p->model[i]));
    OK(emx_session_create(p->model[i], &o, &p->s[i]));
  }
}
static void pair_close(pair *p) {
  for (int i = 0; i < 2; i++) {
    emx_session_destroy(p->s[i]);
    emx_model_close(p->model[i]);
  }
}
static float queries = 1; /* see tiny_write_scaled */
static void make(const emx_model_config *c) { assert_true(tiny_write_scaled(folder, c, 7, queries)); }

/* Largest difference of two rows of logits over the largest logit. */
static double apart(const float *a, const float *b, int n) {
  double most = 0, size = 0;
  for (int i = 0; i < n; i++) {
    if (!isfinite(b[i])) return INFINITY;
    most = fmax(most, fabs((double)a[i] - b[i]));
    size = fmax(size, fabs((double)a[i]));
  }
  return most / size;
}
static double worst; /* of a test: shown, so that tolerances can be judged */
static void near(const float *a, const float *b, int n, double tolerance, const char *what) {
  const double d = apart(a, b, n);
  worst = fmax(worst, d);
  if (!(d <= tolerance)) fail_msg("%s: logits %.2g apart, %.2g allowed", what, d, tolerance);
}

/* f32 caches: both devices round sums of a few hundred f32 products differently (an attention output is off by up to 9e-6 at these
 * scores, on either device), and two layers with scores of size 10 to 50 make up to 9.7e-4 of it at one step of hundreds. 16-bit
 * caches: a key that the last bit of an f32 moves over a rounding border changes by a unit of its own last place, 2^-8 (bf16) or 2^-11
 * of one element of one key; and dense attention rounds weights like that before it multiplies values. */
static double tolerance_of(int32_t dtype) { return dtype == EMX_F32 ? 1e-3 : dtype == EMX_F16 ? 1e-2 : 2e-2; }

static void compare(const emx_model_config *c, int32_t dtype, const char *what) {
  static const int64_t cuts[] = {1, 38, 40, 167, 660}; /* prefills end there; the rest is decoded */
  pair p;
  float logits[2][V], nll[2][N];
  const double tolerance = tolerance_of(dtype);
  make(c);
  pair_open(&p, folder, dtype, 300, 0, N); /* 300 queries over a 16-bit cache: dense attention */
  int64_t n = 0;
  for (size_t i = 0; i < sizeof cuts / sizeof *cuts; n = cuts[i++]) {
    for (int d = 0; d < 2; d++) OK(emx_session_prefill(p.s[d], tokens + n, cuts[i] - n, nll[d] + n, logits[d], NULL, NULL));
    near(logits[0], logits[1], V, tolerance, what);
  }
  assert_true(isnan(nll[1][0]));
  for (int64_t i = 1; i < n; i++)
    if (!(fabs((double)nll[0][i] - nll[1][i]) <= 10 * tolerance)) /* logits are of size 10 */
      fail_msg("%s: nll[%d] %g, CPU %g", what, (int)i, (double)nll[1][i], (double)nll[0][i]);
  for (; n < N; n++) {
    for (int d = 0; d < 2; d++) OK(emx_session_decode(p.s[d], tokens[n], logits[d]));
    near(logits[0], logits[1], V, tolerance, what);
  }
  float again[V];
  OK(emx_session_logits(p.s[1], again));
  assert_memory_equal(again, logits[1], sizeof again);
  emx_session_stats stats[2] = {{.struct_size = sizeof *stats}, {.struct_size = sizeof *stats}};
  for (int d = 0; d < 2; d++) OK(emx_session_get_stats(p.s[d], &stats[d]));
  assert_true(stats[1].tokens == stats[0].tokens && stats[1].rows == stats[0].rows && stats[1].certified == stats[0].certified);
  assert_true(stats[1].bytes_full == stats[0].bytes_full && stats[1].delta_bound_max == 0 && !stats[1].nonfinite);
  assert_true(fabs(stats[1].support_sum - stats[0].support_sum) <= 0.02 * stats[0].support_sum);
  assert_true(stats[1].attn_seconds > 0 && stats[1].attn_seconds < stats[1].seconds);
  pair_close(&p);
}

static void test_positions_and_scales(void **state) {
  (void)state;
  static const int32_t positions[] = {EMX_POSITION_NAPE, EMX_POSITION_ALIBI, EMX_POSITION_NOPE, EMX_POSITION_ROPE};
  char what[80];
  worst = 0;
  for (int p = 0; p < 4; p++)
    for (int scale = 0; scale < 5; scale++) {
      emx_model_config c = tiny_config();
      c.position_type = positions[p];
      c.alibi_num_heads = positions[p] == EMX_POSITION_ALIBI ? c.num_heads : positions[p] == EMX_POSITION_NAPE ? 2 : 0;
      c.attn_scale_type = scale < 4 ? scale : EMX_ATTN_SCALE_FOCAL;
      c.focal_learned = scale == 4;
      snprintf(what, sizeof what, "position %d, scale %d", positions[p], scale);
      compare(&c, scale % 2 ? EMX_BF16 : EMX_F32, what);
    }
  print_message("f32 and bf16 caches: logits at most %.2g apart\n", worst);
}

static void test_alphas_and_shapes(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.25, 1.5, 2, 3};
  static const int32_t dtypes[] = {EMX_F32, EMX_F16, EMX_BF16};
  char what[80];
  for (int d = 0; d < 3; d++) {
    worst = 0;
    for (int a = 0; a < 6; a++) {
      emx_model_config c = tiny_config();
      c.alpha_learned = a == 5;
      c.entmax_alpha = a == 5 ? 1.5 : alphas[a];
      c.attn_scale_type = EMX_ATTN_SCALE_ASENTMAX;
      c.tie_word_embeddings = a % 2;
      if (a == 3) { /* rows that no vector of four fits, heads of their own */
        c.hidden_size = 37;
        c.intermediate_size = 51;
        c.head_dim = 18;
        c.num_kv_heads = 4;
        c.position_type = EMX_POSITION_ROPE;
        c.alibi_num_heads = 0;
      }
      snprintf(what, sizeof what, "alpha %g%s, %s", c.entmax_alpha, c.alpha_learned ? " learned" : "", emx_dtype_name(dtypes[d]));
      compare(&c, dtypes[d], what);
    }
    print_message("%s caches: logits at most %.2g apart\n", emx_dtype_name(dtypes[d]), worst);
  }
}

/* Queries whose elements f16 does not have, over an f16 cache: they are f32, and their rows have numbers. */
static void test_long_queries(void **state) {
  (void)state;
  worst = 0;
  queries = 2e4f;
  for (int alphas = 0; alphas < 2; alphas++) {
    emx_model_config c = tiny_config();
    c.alpha_learned = alphas;
    compare(&c, EMX_F16, "long queries");
  }
  queries = 1;
  print_message("f16 caches, long queries: logits at most %.2g apart\n", worst);
}

/* Selectors: TOPK picks by the same bounds as the CPU's, CERTIFIED gives ALL's answer on either path, GAUSSIAN (whose summaries differ
 * by device) says what it lost. */
static void test_selectors(void **state) {
  (void)state;
  const int64_t usual = emxi_cuda_certified_short;
  emx_model_config c = tiny_config();
  make(&c);
  pair p;
  float logits[2][V], all[N][V];
  pair_open(&p, folder, EMX_F32, 100, EMX_SUMMARY_SKETCH, 4 * N);
  const int64_t from = 221;
  for (int d = 0; d < 2; d++) OK(emx_session_prefill(p.s[d], tokens, from, NULL, NULL, NULL, NULL));
  for (int turn = 0; turn < 5; turn++) {
    static const int32_t kinds[] = {EMX_SELECT_ALL, EMX_SELECT_TOPK, EMX_SELECT_GAUSSIAN, EMX_SELECT_CERTIFIED,
                                    EMX_SELECT_CERTIFIED};
    emx_select_desc select;
    emx_select_desc_init(&select);
    select.kind = kinds[turn];
    select.budget = 64;
    emxi_cuda_certified_short = turn == 4 ? 1 : usual; /* the ladder, and what a short cache takes */
    emx_session *s[2];
    for (int d = 0; d < 2; d++) {
      OK(emx_session_fork(p.s[d], &s[d]));
      OK(emx_session_set_select(s[d], &select));
    }
    for (int64_t n = from; n < N; n++) {
      for (int d = 0; d < 2; d++) OK(emx_session_decode(s[d], tokens[n], logits[d]));
      if (!turn) memcpy(all[n], logits[1], sizeof all[n]);
      if (turn != 2) near(turn > 2 ? all[n] : logits[0], logits[1], V, 1e-3, "selector");
    }
    emx_session_stats stats = {.struct_size = sizeof stats};
    OK(emx_session_get_stats(s[1], &stats));
    assert_int_equal(stats.rows, (N - from) * c.num_layers * c.num_heads);
    if (turn > 2) assert_true(stats.certified == stats.rows && stats.delta_bound_max == 0);
    if (turn == 4) assert_true(stats.paths[EMX_PATH_LADDER] > 0);
    if (turn == 1 || turn == 2) assert_true(stats.bytes_k < stats.bytes_full / 2 && stats.delta_bound_max <= 1);
    for (int d = 0; d < 2; d++) emx_session_destroy(s[d]);
  }
  emxi_cuda_certified_short = usual;
  pair_close(&p);
}

/* The laws of a session: forks share pages and do not meddle, a cut sequence goes on, the same calls give the same bits, and a call
 * that fails leaves what was there. */
static void stop(void *user, int64_t done, int64_t total) {
  (void)done, (void)total;
  emx_ctx_cancel(user);
}
static void test_laws(void **state) {
  (void)state;
  emx_model_config c = tiny_config();
  c.attn_scale_type = EMX_ATTN_SCALE_SSMAX;
  make(&c);
  pair p;
  float logits[2][V], first[V], again[V];
  pair_open(&p, folder, EMX_F32, 32, 0, 2 * N);
  emx_session *a = p.s[1], *fork = NULL;
  assert_int_equal(emx_session_logits(a, again), EMX_ERR_STATE);
  for (int d = 0; d < 2; d++) OK(emx_session_prefill(p.s[d], tokens, 75, NULL, logits[d], NULL, NULL));
  OK(emx_session_fork(a, &fork));
  OK(emx_session_logits(fork, again));
  assert_memory_equal(again, logits[1], sizeof again);
  for (int64_t n = 75; n < 100; n++) {
    OK(emx_session_decode(a, tokens[n], first));
    OK(emx_session_decode(fork, tokens[n], again));
    assert_memory_equal(again, first, sizeof again); /* the same bits */
    OK(emx_session_decode(fork, tokens[n + 50], again));
    OK(emx_session_truncate(fork, n + 1));
  }
  emx_session_destroy(fork);
  OK(emx_session_truncate(a, 75));
  assert_int_equal(emx_session_logits(a, again), EMX_ERR_STATE);
  for (int64_t n = 75; n < 140; n++) {
    for (int d = 0; d < 2; d++) OK(emx_session_decode(p.s[d], tokens[n], logits[d]));
    near(logits[0], logits[1], V, 1e-3, "after a cut");
  }
  assert_int_equal(emx_session_prefill(a, tokens, 100, NULL, again, stop, gpu), EMX_ERR_CANCELLED);
  assert_int_equal(emx_session_decode(a, 1, again), EMX_ERR_CANCELLED);
  emx_ctx_resume(gpu);
  assert_int_equal(emx_session_length(a), 140);
  OK(emx_session_logits(a, again));
  assert_memory_equal(again, logits[1], sizeof again);
  assert_int_equal(emx_session_decode(a, V, again), EMX_ERR_INVALID);
  for (int d = 0; d < 2; d++) OK(emx_session_prefill(p.s[d], tokens + 140, 60, NULL, logits[d], NULL, NULL));
  near(logits[0], logits[1], V, 1e-3, "after a failure");
  pair_close(&p);
}

static emx_status no_tap(void *user, const emxi_layer_view *view) {
  (void)user, (void)view;
  return EMX_OK;
}
static void test_refusals(void **state) {
  (void)state;
  emx_model_config c = tiny_config();
  make(&c);
  emx_model *model = NULL;
  emx_session *s = NULL;
  float logits[V];
  int32_t count[8];
  OK(emx_model_open(gpu, folder, &model));
  emx_session_opts o;
  emx_session_opts_init(&o);
  o.kv_file = "/tmp/emx_gpu_model_file";
  assert_int_equal(emx_session_create(model, &o, &s), EMX_ERR_UNSUPPORTED);
  o.kv_file = NULL;
  OK(emx_session_create(model, &o, &s));
  const emx_session_support support = {.struct_size = sizeof support, .count = count};
  assert_int_equal(emx_session_set_support(s, &support), EMX_ERR_UNSUPPORTED);
  assert_non_null(strstr(emx_last_error(), "CPU"));
  assert_int_equal(emx_session_save(s, "/tmp/emx_gpu_model_file", NULL, NULL), EMX_ERR_UNSUPPORTED);
  assert_int_equal(emx_session_load(s, "/tmp/emx_gpu_model_file", NULL, NULL), EMX_ERR_UNSUPPORTED);
  emx_select_desc certified;
  emx_select_desc_init(&certified);
  certified.kind = EMX_SELECT_CERTIFIED;
  assert_int_equal(emx_session_set_select(s, &certified), EMX_ERR_STATE); /* no sketches */
  emxi_session_tap(s, no_tap, NULL);
  assert_int_equal(emx_session_decode(s, 1, logits), EMX_ERR_UNSUPPORTED);
  emxi_session_tap(s, NULL, NULL);
  OK(emx_session_decode(s, 1, logits));
  emx_task_desc task;
  emx_task_score score = {.struct_size = sizeof score};
  emx_task_desc_init(&task, EMX_TASK_COPY);
  assert_int_equal(emx_task_evaluate(model, &task, 0, 1, NULL, NULL, &score), EMX_ERR_UNSUPPORTED);
  emx_session_destroy(s);
  emx_model_close(model);
}

/* The text of the shipped models, the most probable token at every step. Where both devices part, the CPU's two best logits must be as
 * near to each other as the rounding of a bf16 cache moves logits; after that the texts are different questions. */
static void write_text(const char *name, int32_t kind, int64_t steps) {
  char path[300];
  snprintf(path, sizeof path, "%s/%s", shipped, name);
  if (access(path, R_OK)) {
    print_message("%s is not there\n", path);
    skip();
  }
  pair p;
  pair_open(&p, path, EMX_BF16, 100, kind == EMX_SELECT_CERTIFIED ? EMX_SUMMARY_SKETCH : 0, 1000);
  emx_model_config c = {.struct_size = sizeof c};
  OK(emx_model_get_config(p.model[0], &c));
  int32_t prompt[211], token[2];
  for (int i = 0; i < 211; i++)
    prompt[i] = c.task ? (int32_t)(5 + 97 * i % (c.vocab_size - 5)) : "The old man walked to the sea. "[i % 31];
  float *logits[2] = {case_take((size_t)c.vocab_size * sizeof(float)), case_take((size_t)c.vocab_size * sizeof(float))};
  emx_sample_opts greedy;
  emx_sample_opts_init(&greedy);
  emx_select_desc select;
  emx_select_desc_init(&select);
  select.kind = kind;
  for (int d = 0; d < 2; d++) {
    if (d) OK(emx_session_set_select(p.s[d], &select));
    OK(emx_session_prefill(p.s[d], prompt, 211, NULL, logits[d], NULL, NULL));
  }
  int64_t n = 0;
  worst = 0;
  for (; n < steps; n++) {
    near(logits[0], logits[1], c.vocab_size, 2e-2, name);
    for (int d = 0; d < 2; d++) OK(emx_sample(logits[d], c.vocab_size, &greedy, 0, &token[d]));
    if (token[0] != token[1]) break;
    for (int d = 0; d < 2; d++) OK(emx_session_decode(p.s[d], token[d], logits[d]));
  }
  print_message("%s, selector %d: %d of %d tokens the same, logits at most %.2g apart\n", name, kind, (int)n, (int)steps, worst);
  if (n < steps) {
    const double gap = fabs((double)logits[0][token[0]] - logits[0][token[1]]);
    print_message("  the two best logits of the CPU are %.2g apart there\n", gap);
    assert_true(gap < 0.05 * fabs((double)logits[0][token[0]]));
  }
  free(logits[0]), free(logits[1]);
  pair_close(&p);
}
static void test_text_entmax(void **state) {
  (void)state;
  write_text("text-entmax", EMX_SELECT_ALL, 400);
}
static void test_text_certified(void **state) {
  (void)state;
  const int64_t usual = emxi_cuda_certified_short;
  emxi_cuda_certified_short = 1;
  write_text("text-entmax", EMX_SELECT_CERTIFIED, 400);
  emxi_cuda_certified_short = usual;
}
static void test_text_softmax(void **state) {
  (void)state;
  write_text("text-softmax", EMX_SELECT_ALL, 400);
}
static void test_retrieval(void **state) {
  (void)state;
  write_text("retrieval-asentmax", EMX_SELECT_ALL, 300);
}

int main(int argc, char **argv) {
  if (argc > 1) shipped = argv[1];
  if (argc > 2) cmocka_set_test_filter(argv[2]);
  const int missing = gpu_missing();
  if (missing) return missing;
  if (!mkdtemp(folder)) return 1;
  uint32_t w[4];
  for (int i = 0; i < N; i++) {
    emxi_philox(5, 3, (uint64_t)i, w);
    tokens[i] = (int32_t)(w[0] % V);
  }
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_positions_and_scales),
                                     cmocka_unit_test(test_alphas_and_shapes),
                                     cmocka_unit_test(test_long_queries),
                                     cmocka_unit_test(test_selectors),
                                     cmocka_unit_test(test_laws),
                                     cmocka_unit_test(test_refusals),
                                     cmocka_unit_test(test_text_entmax),
                                     cmocka_unit_test(test_text_certified),
                                     cmocka_unit_test(test_text_softmax),
                                     cmocka_unit_test(test_retrieval)};
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  tiny_remove(folder);
  rmdir(folder);
  emx_ctx_destroy(gpu);
  emx_ctx_destroy(cpu);
  return failed;
}
