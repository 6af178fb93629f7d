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
static truth open_case(gpu_case *g, decode_case *c, const double *own) {
  gpu_open(g, c);
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
  /* rounding of scores near 2e-6 of their size moves each of D channels' mass by a multiple of it, and softmax's exponentials by 1e-5 */
  const double far = 2e-5 * m * sqrt((double)c->D);
  rows_done++;
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

static void run(decode_case *c, const double *own) {
  gpu_case g;
  truth t = open_case(&g, c, own);
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
  for (int limit = 0; limit < 8; limit++) {
    d.max_bytes = limit < 3 ? (int64_t[]){1, whole * 7 / 10, whole * 9 / 10}[limit] : limit == 7 ? whole * 8 / 10 : 0;
    d.max_delta = limit < 3 ? 0 : (double[]){0.5, 0.05, 1e-3, 1e-5, 0.02}[limit - 3];
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
    const int G = 1 + (int)(w[0] % 2), group = 1 + (int)(w[0] >> 8) % 5;
    static const int kinds[] = {DATA_IID, DATA_AR, DATA_TOPIC, DATA_NEEDLE, DATA_OUTLIER, DATA_FLAT};
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
                     .data = kinds[(w[2] >> 12) % 6],
                     .seed = (uint64_t)(seed * 1000003 + i)};
    run(&c, NULL);
  }
  printf("%lld rows with limits, seed %lld, up to %lld keys: 0 wrong; ladder %lld; done %lld, bytes %lld, delta %lld\n",
         (long long)rows_done, (long long)seed, (long long)longest, (long long)ladders, (long long)stopped[EMX_STOP_DONE],
         (long long)stopped[EMX_STOP_BYTES], (long long)stopped[EMX_STOP_DELTA]);
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
                     .data = i < 2 ? DATA_NEEDLE : DATA_IID,
                     .scale = 0.5f,
                     .seed = 60 + (uint64_t)i};
    run(&c, own);
  }
  assert_true(ladders * 4 > rows_done);
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
  emxi_cuda_certified_short = 64;
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_refused), cmocka_unit_test(test_alphas),
                                     cmocka_unit_test(test_random)};
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  emx_ctx_destroy(gpu);
  emx_ctx_destroy(cpu);
  return failed;
}
