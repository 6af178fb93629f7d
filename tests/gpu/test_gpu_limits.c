/* CERTIFIED on a GPU with max_bytes and max_delta: what a row says it dropped against the float64 oracle, softmax, and that the same call
 * gives the same bits. `test_gpu_limits [problems [seed [longest]]]` tries that many problems at random, each with every limit. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "cuda/backend_cuda.h"
#include "gpu_case.h"

static const int32_t dims[] = {64, 128, 80, 33, 256}, dtypes[] = {EMX_F16, EMX_BF16, EMX_F32}, sizes[] = {16, 32, 64};
static const double alphas[] = {1.5, 1, 2, 1.25, 1, 1.75};
static int64_t problems = 20, seed = 1, longest = 4000;
static int64_t rows_done, ladders, stopped[4];
static double excess; /* most that was dropped beyond what was reported, in units of the scores' rounding */

/* Weights and thresholds of all rows (S = 1). Values are made anew: the D - 1 heaviest keys of each group's first head have a channel
 * each and the rest share one, so half the sum of the outputs' differences is the mass that went elsewhere. */
typedef struct truth {
  double *s, *p, *tau;
  int64_t n;
} truth;
static double head_alpha(const decode_case *c, const double *own, int h) { return own ? own[h] : c->alpha; }

static const double *order_by;
static int heavier(const void *a, const void *b) {
  const double x = order_by[*(const int64_t *)a], y = order_by[*(const int64_t *)b];
  return x > y ? -1 : x < y;
}
static truth open_case(gpu_case *g, decode_case *c, const double *own, void (*change)(decode_case *)) {
  gpu_open(g, c);
  if (change) change(c);
  const double usual = c->alpha;
  truth t = {.n = c->max_len};
  const size_t rows = (size_t)(c->B * c->H);
  t.s = case_take(sizeof(double) * rows * (size_t)t.n);
  t.p = case_take(sizeof(double) * rows * (size_t)t.n);
  t.tau = case_take(sizeof(double) * rows);
  int64_t *order = case_take(sizeof(int64_t) * (size_t)t.n);
  for (int b = 0; b < c->B; b++)
    for (int h = 0; h < c->H; h++) {
      const int64_t row = case_row(c, b, h, 0), n = c->len[b];
      int64_t support;
      c->alpha = head_alpha(c, own, h);
      (void)case_scores(c, b, h, 0, NULL, t.s + row * t.n);
      t.tau[row] = emxi_oracle_entmax(t.s + row * t.n, n, c->alpha, t.p + row * t.n, &support);
      if (h % (c->H / c->G)) continue;
      for (int64_t j = 0; j < n; j++) order[j] = j;
      order_by = t.s + row * t.n;
      qsort(order, (size_t)n, sizeof *order, heavier);
      for (int64_t i = 0; i < n; i++)
        for (int d = 0; d < c->D; d++) case_value(c, b, h / (c->H / c->G), order[i])[d] = d == (i < c->D ? i : c->D - 1);
    }
  free(order);
  c->alpha = usual;
  for (int b = 0; b < c->B; b++) {
    OK(emx_seq_truncate(g->kv, g->seqs[b], 0));
    gpu_append(c, g->kv, g->seqs[b], b, 0, c->len[b]);
  }
  return t;
}
static void close_case(gpu_case *g, truth *t) {
  free(t->s), free(t->p), free(t->tau);
  gpu_close(g);
}

static void check(const decode_case *c, const truth *t, const double *own, const emx_select_desc *d, int b, int h) {
  const int64_t row = case_row(c, b, h, 0), n = c->len[b];
  const emx_report *r = &c->reports[row];
  const double *s = t->s + row * t->n, *p = t->p + row * t->n, alpha = head_alpha(c, own, h), unit = alpha > 1 ? alpha - 1 : 1;
  const float *o = (const float *)c->o_data + row * c->D;
  double m = 1, mass[256] = {0}, tv = 0;
  int64_t above = 0;
  for (int64_t j = 0; j < n; j++) {
    m = fmax(m, fabs(s[j]));
    above += unit * s[j] > (double)r->max_unread + 1e-5 * m;
    const float *v = case_value(c, b, h / (c->H / c->G), j);
    for (int x = 0; x < c->D && p[j] > 0; x++) mass[x] += p[j] * (double)v[x];
  }
  for (int x = 0; x < c->D; x++) tv += 0.5 * fabs(mass[x] - (double)o[x]);
  /* what rounding of scores moves: 8e-8 in these units at most, in 6,723 rows on an H100 */
  const double far = 3e-7 * m * sqrt((double)c->D);
  rows_done++;
  excess = fmax(excess, (tv - (double)r->delta_bound) / (m * sqrt((double)c->D)));
  stopped[r->stopped_by]++;
  ladders += r->path == EMX_PATH_LADDER;
#define WRONG(what)                                                                                                             \
  fail_msg(                                                                                                                     \
      "%s: stopped by %d, delta_bound %g, true %g, tokens %d of %d, bytes %lld, max_unread %g, tau %g of %g (alpha %g D %d P "  \
      "%d dtype %d data %d seed %d, max_bytes %lld, max_delta %g)",                                                             \
      what, r->stopped_by, (double)r->delta_bound, tv, r->tokens, (int)n, (long long)(r->bytes_k + r->bytes_v + r->bytes_meta), \
      (double)r->max_unread, (double)r->tau, t->tau[row], alpha, c->D, c->P, c->dtype, c->data, (int)c->seed,                   \
      (long long)d->max_bytes, d->max_delta)
  if (!(tv <= (double)r->delta_bound + far)) WRONG("more was dropped than reported");
  if (r->flags & EMX_REPORT_NONFINITE || r->select != EMX_SELECT_CERTIFIED) WRONG("flags");
  if (((r->flags & EMX_REPORT_CERTIFIED) != 0) != (r->delta_bound == 0)) WRONG("certified is delta 0");
  if (!(r->delta_bound >= 0 && r->delta_bound <= 1) || !(fabs((double)r->mass - 1) < 1e-4)) WRONG("mass");
  if (alpha > 1 && !((double)r->tau <= t->tau[row] + 1e-5 * m)) WRONG("tau rises with what is read");
  if (r->path == EMX_PATH_ALL) {
    if (!(r->flags & EMX_REPORT_CERTIFIED) || r->stopped_by != EMX_STOP_DONE) WRONG("ALL's path is exact");
    return;
  }
  if (above > r->tokens) WRONG("max_unread");
  if (r->stopped_by == EMX_STOP_DONE && !(r->flags & EMX_REPORT_CERTIFIED)) WRONG("done");
  if (r->stopped_by == EMX_STOP_DELTA && !((double)r->delta_bound <= d->max_delta * (1 + 1e-6))) WRONG("delta");
  if (d->max_delta > 0 && d->max_bytes == 0 && !((double)r->delta_bound <= d->max_delta * (1 + 1e-6))) WRONG("max_delta");
  const int64_t line = (int64_t)((size_t)c->D * emx_dtype_size(c->dtype) + 63) / 64 * 64,
                sum = r->bytes_k + r->bytes_v + r->bytes_meta;
  if (r->stopped_by == EMX_STOP_BYTES && d->max_bytes == 0) WRONG("no limit");
  /* values of keys at the threshold are foreseen, and may turn out to have no weight */
  if (r->stopped_by == EMX_STOP_BYTES && sum + 8 * line < d->max_bytes) WRONG("bytes are left");
#undef WRONG
}

static void run(decode_case *c, const double *own, void (*change)(decode_case *)) {
  gpu_case g;
  truth t = open_case(&g, c, own, change);
  const size_t rows = (size_t)(c->B * c->H), out = sizeof(float) * rows * (size_t)c->D;
  float *first = case_take(out);
  emx_report *reports = case_take(sizeof(emx_report) * rows);
  emx_tensor host, device = {0};
  if (own) {
    host = emx_tensor_view((void *)own, EMX_F64, 1, (int64_t[1]){c->H});
    device = gpu_tensor(&host);
    g.io.alphas = &device;
  }
  emx_select_desc d = case_desc(EMX_SELECT_CERTIFIED, 0);
  gpu_decode_by(&g, &d);
  const int64_t whole = c->reports[0].bytes_k + c->reports[0].bytes_meta;
  for (int limit = 0; limit < 9; limit++) {
    d.max_bytes = limit < 3 ? (int64_t[]){1, whole * 7 / 10, whole * 9 / 10}[limit] : limit >= 7 ? whole * 8 / 10 : 0;
    d.max_delta = limit < 3 ? 0 : (double[]){0.5, 0.05, 1e-3, 1e-5, 0.02, 1e-3}[limit - 3];
    gpu_decode_by(&g, &d);
    for (int b = 0; b < c->B; b++)
      for (int h = 0; h < c->H; h++) check(c, &t, own, &d, b, h);
    memcpy(first, c->o_data, out);
    memcpy(reports, c->reports, sizeof(emx_report) * rows);
    gpu_decode_by(&g, &d);
    assert_memory_equal(first, c->o_data, out); /* nothing depends on timing */
    assert_memory_equal(reports, c->reports, sizeof(emx_report) * rows);
  }
  gpu_free(device.data);
  free(first), free(reports);
  close_case(&g, &t);
}

static void test_random(void **state) {
  (void)state;
  for (int64_t i = 0; i < problems; i++) {
    uint32_t w[4];
    emxi_philox((uint64_t)seed, 79, (uint64_t)i, w);
    static const int kinds[] = {DATA_IID, DATA_AR, DATA_TOPIC, DATA_NEEDLE}; /* of which the ladder leaves much unread */
    const int G = 1 + (int)(w[0] % 2), group = 1 + (int)(w[0] >> 8) % 5;
    decode_case c = {.B = 1 + (int)(w[0] >> 16) % 2,
                     .G = G,
                     .H = G * group,
                     .D = dims[(w[0] >> 20) % 5],
                     .P = sizes[w[1] % 3],
                     .dtype = dtypes[(w[1] >> 8) % 3],
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {(int64_t)(300 * pow((double)longest / 300, (double)w[3] / 4294967296.0)), 100 + w[2] % 900},
                     .alpha = alphas[i % 6],
                     .scale = w[1] >> 22 & 1 ? 0.4f : 0, /* peaked: softmax may leave keys out */
                     .alibi = (w[1] >> 20 & 3) == 3,
                     .data = i % 3 ? kinds[(w[2] >> 12) % 4] : (int)(w[2] >> 12) % DATA_KINDS,
                     .seed = (uint64_t)(seed * 1000003 + i)};
    run(&c, NULL, NULL);
  }
  printf(
      "%lld rows with limits, seed %lld, up to %lld keys: 0 wrong; ladder %lld; done %lld, bytes %lld, delta %lld; beyond the "
      "bound by %g\n",
      (long long)rows_done, (long long)seed, (long long)longest, (long long)ladders, (long long)stopped[EMX_STOP_DONE],
      (long long)stopped[EMX_STOP_BYTES], (long long)stopped[EMX_STOP_DELTA], excess);
  if (problems < 20) return;
  assert_true(ladders * 8 > rows_done && stopped[EMX_STOP_BYTES] > 5 && stopped[EMX_STOP_DELTA] > 5);
}

/* One alpha a head, softmax ones beside the others: with max_delta all of an item may be on the ladder. */
static void test_alphas(void **state) {
  (void)state;
  static const double own[4] = {1.5, 1, 2, 1};
  rows_done = ladders = 0;
  for (int i = 0; i < 4; i++) {
    decode_case c = {.G = i % 2 ? 4 : 1,
                     .H = 4,
                     .D = 64,
                     .P = sizes[i % 3],
                     .dtype = dtypes[i % 2],
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {4000 + 100 * i},
                     .alibi = i == 3,
                     .data = i < 2 ? DATA_NEEDLE : DATA_IID,
                     .scale = 0.5f,
                     .seed = 60 + (uint64_t)i};
    run(&c, own, NULL);
  }
  assert_true(ladders * 4 > rows_done);
}

/* Rows longer than the chunks that one block of `cut` looks at in one turn. */
static void test_long(void **state) {
  (void)state;
  rows_done = ladders = 0;
  for (int i = 0; i < 2; i++) {
    decode_case c = {.H = 1 + i,
                     .D = 64,
                     .P = sizes[i],
                     .dtype = EMX_F16,
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {70001 + 70000 * i},
                     .alpha = i ? 1 : 1.5,
                     .scale = 0.5f,
                     .seed = 80 + (uint64_t)i};
    run(&c, NULL, NULL);
  }
  assert_true(ladders * 4 > rows_done);
}

/* ---- keys of an open page, of which no sketch tells anything */

/* The newest key has a score of `top` and is as long as `cross` besides, across the query: its computed score may be off by far more than
 * any other key's. `many` keys have scores of `next` and a little, and all others
 * none to speak of. */
static double top, next, cross;
static int many;
static void lengthen_newest(decode_case *c) {
  const int64_t n = c->len[0];
  const float *q = c->q, scale = c->scale != 0 ? c->scale : 1.0f / sqrtf((float)c->D);
  double square = 0;
  for (int d = 0; d < c->D; d++) square += (double)q[d] * (double)q[d];
  for (int64_t j = 0; j < n; j++) {
    const double score = j == n - 1 ? top : j % 3 == 0 && j < 3 * many ? next + 1e-5 * (double)(j % 100) : -60;
    float *k = case_key(c, 0, 0, j);
    for (int d = 0; d < c->D; d++) k[d] = 1e-3f * k[d] + (float)(score / ((double)scale * square) * (double)q[d]);
    if (j == n - 1) k[0] += (float)cross * q[1], k[1] -= (float)cross * q[0];
  }
}
static void test_open_page(void **state) {
  (void)state;
  static const double crosses[] = {0, 1e5, 3e6, 1e9};
  for (int i = 0; i < 8; i++) {
    decode_case c = {.D = 64, .summaries = EMX_SUMMARY_SKETCH, .len = {4005}, .alpha = i % 2 ? 1.5 : 2, .seed = 90 + (uint64_t)i};
    top = 1, next = 0.02, many = 900, cross = crosses[i / 2]; /* next: a little above the threshold that the newest key leaves */
    gpu_case g;
    truth t = open_case(&g, &c, NULL, lengthen_newest);
    emx_select_desc d = case_desc(EMX_SELECT_ALL, 0);
    gpu_decode_by(&g, &d);
    float all[64];
    memcpy(all, c.o_data, sizeof all);
    for (int limit = 0; limit < 6; limit++) {
      d = case_desc(EMX_SELECT_CERTIFIED, 0);
      d.max_delta = (double[]){0, 1e-6, 1e-3, 0.1, 0, 1e-6}[limit];
      d.max_bytes = limit < 4 ? 0 : 60000;
      gpu_decode_by(&g, &d);
      const emx_report *r = c.reports;
      double tv = 0, from_all = 0, exact[64] = {0};
      for (int64_t j = 0; j < t.n; j++)
        for (int x = 0; x < 64 && t.p[j] > 0; x++) exact[x] += t.p[j] * (double)case_value(&c, 0, 0, j)[x];
      for (int x = 0; x < 64; x++) {
        const double got = (double)((const float *)c.o_data)[x];
        tv += 0.5 * fabs(got - exact[x]);
        from_all += 0.5 * fabs(got - (double)all[x]);
      }
      /* exact is what ALL computes from the same scores; what is reported as dropped counts what the scores may be off by */
      const bool certified = r->flags & EMX_REPORT_CERTIFIED;
      if (certified ? from_all > 1e-5 : !(tv <= (double)r->delta_bound + 1e-5))
        fail_msg("across %g, alpha %g, limit %d: flags %d, dropped %g, reported %g, from ALL %g (tokens %d, path %d)", cross,
                 c.alpha, limit, r->flags, tv, (double)r->delta_bound, from_all, r->tokens, r->path);
    }
    close_case(&g, &t);
  }
}
/* exp(-800) is no double: with softmax what is unread has some weight all the same, and is never reported as nothing. */
static void test_softmax_peak(void **state) {
  (void)state;
  for (int i = 0; i < 4; i++) {
    decode_case c = {.D = 64, .summaries = EMX_SUMMARY_SKETCH, .len = {4000 + 5 * (i % 2)}, .alpha = 1, .seed = 70 + (uint64_t)i};
    top = i < 2 ? 800 : 30, next = 0, many = 500, cross = 0;
    gpu_case g;
    truth t = open_case(&g, &c, NULL, lengthen_newest);
    emx_select_desc d = case_desc(EMX_SELECT_CERTIFIED, 0);
    for (int limit = 0; limit < 3; limit++) {
      d.max_delta = (double[]){1e-3, 1e-6, 1e-3}[limit];
      d.max_bytes = limit < 2 ? 0 : 60000;
      gpu_decode_by(&g, &d);
      check(&c, &t, NULL, &d, 0, 0);
      const emx_report *r = c.reports;
      assert_true(!(r->flags & EMX_REPORT_CERTIFIED) || r->path == EMX_PATH_ALL || r->tokens == c.len[0]);
    }
    close_case(&g, &t);
  }
}
/* A limit below any answer reads something all the same, also where many keys are the best. */
static void repeat_best(decode_case *c) {
  const float *q = c->q;
  for (int64_t j = 0; j < c->len[0]; j++)
    for (int d = 0; d < c->D; d++) case_key(c, 0, 0, j)[d] = case_round(j % 37 == 5 && j < 3700 ? q[d] : 0, c->dtype);
}
static void test_copies(void **state) {
  (void)state;
  for (int i = 0; i < 4; i++) {
    decode_case c = {.D = 64,
                     .dtype = dtypes[i % 3],
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {4000},
                     .alpha = i < 2 ? 1.5 : 2,
                     .seed = 50 + (uint64_t)i};
    gpu_case g;
    truth t = open_case(&g, &c, NULL, repeat_best);
    emx_select_desc d = case_desc(EMX_SELECT_CERTIFIED, 0);
    d.max_bytes = 1;
    gpu_decode_by(&g, &d);
    check(&c, &t, NULL, &d, 0, 0);
    assert_true(c.reports[0].support >= 1 && c.reports[0].tokens >= 1 && c.reports[0].tokens < 4000);
    close_case(&g, &t);
  }
}

/* Page lists are for emx_decode alone. */
static void test_refused(void **state) {
  (void)state;
  decode_case c = {.D = 64, .H = 2, .summaries = EMX_SUMMARY_SKETCH, .len = {200}};
  gpu_case g;
  gpu_open(&g, &c);
  void *work = gpu_take(NULL, 1 << 24);
  const emx_select_desc d = case_desc(EMX_SELECT_CERTIFIED, 0);
  fails(emx_select(gpu, g.kv, &g.batch, &d, &g.io, work, 1 << 24), EMX_ERR_UNSUPPORTED, "emx_decode takes it");
  gpu_free(work);
  gpu_close(&g);
}

int main(int argc, char **argv) {
  if (argc > 1) problems = atoll(argv[1]);
  if (argc > 2) seed = atoll(argv[2]);
  if (argc > 3) longest = atoll(argv[3]);
  const int missing = gpu_missing();
  if (missing) return missing;
  emxi_cuda_certified_short = 1;
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_refused),      cmocka_unit_test(test_open_page),
                                     cmocka_unit_test(test_softmax_peak), cmocka_unit_test(test_copies),
                                     cmocka_unit_test(test_alphas),       cmocka_unit_test(test_long),
                                     cmocka_unit_test(test_random)};
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  emx_ctx_destroy(gpu);
  emx_ctx_destroy(cpu);
  return failed;
}
