/* CERTIFIED on a GPU: the float64 oracle over all keys, ALL on the same device, and that the ladder leaves keys unread where it can.
 * `test_gpu_certified [problems [seed [longest [decodes]]]]` tries that many problems at random, every row of them against the oracle,
 * then that many decodes (a query head each), every one against ALL and one in 97 against the oracle. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "cuda/backend_cuda.h"
#include "gpu_case.h"

static const int32_t dims[] = {64, 128, 80, 33, 16, 256, 96, 32}, dtypes[] = {EMX_F16, EMX_BF16, EMX_F32}, sizes[] = {16, 32, 64};
static const double alphas[] = {1.5, 2, 1.25, 4. / 3, 1.75};
static int64_t problems = 60, longest = 9000, seed = 1, many = 20000;
static int64_t rows_done, ladders, halves, near_tau, fewest_chunks; /* with a weight, of a row on the ladder */
static int64_t sparse, missed; /* rows of few weights; of which the ladder reads half of the keys or more */
/* Little enough has weight for the ladder to pay. */
static bool is_sparse(const emx_report *r, int64_t n) { return (int64_t)r->support * 64 < n; }

/* Results of ALL on the device, to be compared with. */
typedef struct outputs {
  float *o;
  emx_report *reports;
} outputs;
static outputs keep(const decode_case *c) {
  const size_t rows = (size_t)(c->B * c->H * c->S);
  outputs k = {case_take(sizeof(float) * rows * (size_t)c->D), case_take(sizeof(emx_report) * rows)};
  memcpy(k.o, c->o_data, sizeof(float) * rows * (size_t)c->D);
  memcpy(k.reports, c->reports, sizeof(emx_report) * rows);
  return k;
}

static void check_row(const decode_case *c, const outputs *all, double *s, double *p, int b, int h, int q) {
  const int64_t row = case_row(c, b, h, q), n = c->len[b] - c->S + q + 1;
  const emx_report *r = &c->reports[row], *a = &all->reports[row];
  double o[256], m = 1;
  int64_t support = 0, least = 0, most = 0;
  rows_done++;
  assert_int_equal(r->select, EMX_SELECT_CERTIFIED);
  const float *got = (const float *)c->o_data + row * c->D;
  if (isnan(all->o[row * c->D])) {
    assert_true(isnan(got[0]) && r->flags == EMX_REPORT_NONFINITE);
    return;
  }
  assert_true(r->flags == EMX_REPORT_CERTIFIED && r->delta_bound == 0 && r->stopped_by == EMX_STOP_DONE);
  assert_true(r->path == EMX_PATH_LADDER || r->path == EMX_PATH_ALL);
  ladders += r->path == EMX_PATH_LADDER;
  halves += 2 * (int64_t)r->tokens < n;
  sparse += is_sparse(r, n);
  missed += is_sparse(r, n) && (r->path != EMX_PATH_LADDER || 2 * (int64_t)r->tokens >= n);
  const double tau = case_reference(c, b, h, q, NULL, s, p, o, &support);
  for (int64_t j = 0; j < n; j++) m = fmax(m, fabs(s[j]));
  const double band = 2e-6 * m * (c->data == DATA_OUTLIER || c->data == DATA_HUGE ? 8 : 1);
  bool near = false;
  int64_t chunks = 0, last = -1;
  for (int64_t j = 0; j < n; j++) {
    const double y = (c->alpha - 1) * s[j] - tau;
    least += y > band;
    most += y > -band;
    near |= fabs(y) < 1e-4;
    if (y > 0 && j / 128 != last) last = j / 128, chunks++;
  }
  near_tau += near;
  if (r->support < least || r->support > most || abs(r->support - a->support) > (int)(most - least))
    fail_msg("support %d, ALL %d, oracle %d..%d (alpha %g D %d P %d dtype %d n %d data %d seed %d tokens %d)", r->support,
             a->support, (int)least, (int)most, c->alpha, c->D, c->P, c->dtype, (int)n, c->data, (int)c->seed, r->tokens);
  assert_true(r->tokens >= r->support && r->tokens <= n);
  if (!(fabs(r->tau - tau) <= 1e-5 * m)) fail_msg("tau %g, oracle %g", (double)r->tau, tau);
  if (r->path == EMX_PATH_LADDER && chunks < fewest_chunks) fewest_chunks = chunks;
  if (r->path == EMX_PATH_LADDER) { /* above the threshold nothing is unread, and what exceeds the bound was read */
    int64_t above = 0;
    for (int64_t j = 0; j < n; j++) above += (c->alpha - 1) * s[j] > (double)r->max_unread + 1e-5 * m;
    if (!((double)r->max_unread <= (double)r->tau + 1e-5 * m) || above > r->tokens)
      fail_msg("max_unread %g, tau %g, %d keys above it, %d read", (double)r->max_unread, (double)r->tau, (int)above, r->tokens);
  }
  for (int d = 0; d < c->D; d++) {
    const double mine = case_out(c, b, h, q, d);
    if (!(fabs(mine - o[d]) <= case_tolerance(c, m)) || !(fabs(mine - (double)all->o[row * c->D + d]) <= case_tolerance(c, m)))
      fail_msg("o[%d] %g, ALL %g, oracle %g (alpha %g D %d P %d dtype %d n %d data %d seed %d)", d, mine,
               (double)all->o[row * c->D + d], o[d], c->alpha, c->D, c->P, c->dtype, (int)n, c->data, (int)c->seed);
  }
}
static void run(decode_case *c) {
  gpu_case g;
  gpu_open(&g, c);
  emx_select_desc d = case_desc(EMX_SELECT_ALL, 0);
  gpu_decode_by(&g, &d);
  g.io.k_new = g.io.v_new = NULL;
  const outputs all = keep(c);
  d = case_desc(EMX_SELECT_CERTIFIED, 0);
  double *s = case_take(sizeof(double) * (size_t)(c->max_len + 1)), *p = case_take(sizeof(double) * (size_t)(c->max_len + 1));
  for (int turn = 0; turn < 2; turn++) { /* what is read depends on timing, the answer does not */
    gpu_decode_by(&g, &d);
    for (int b = 0; b < c->B; b++)
      for (int h = 0; h < c->H; h++)
        for (int q = 0; q < c->S; q++) check_row(c, &all, s, p, b, h, q);
  }
  free(s), free(p), free(all.o), free(all.reports);
  gpu_close(&g);
}

/* A problem of its own for each number. */
static decode_case problem(uint64_t stream, int64_t i) {
  uint32_t w[4];
  emxi_philox((uint64_t)seed, stream, (uint64_t)i, w);
  const int G = 1 + (int)(w[0] % 3), group = 1 + (int)(w[0] >> 8) % 6;
  const double spread = (double)w[3] / 4294967296.0;
  return (decode_case){.B = 1 + (int)(w[0] >> 16) % 2,
                       .G = G,
                       .H = G * group,
                       .D = dims[(w[0] >> 20) % 8],
                       .P = sizes[w[1] % 3],
                       .dtype = dtypes[(w[1] >> 8) % 3],
                       .layout = w[1] >> 12 & 1,
                       .summaries = EMX_SUMMARY_SKETCH | (w[1] >> 13 & 1 ? EMX_SUMMARY_MOMENTS : 0),
                       .len = {(int64_t)(200 * pow((double)longest / 200, spread) + 0.5), 2 + w[2] % 700},
                       .alpha = alphas[(w[1] >> 16) % 5],
                       .alibi = w[1] >> 20 & 1,
                       .in_decode = w[1] >> 21 & 1,
                       .kv_memory = w[1] >> 22 & 1 ? EMX_KV_MEMORY_HOST : EMX_KV_MEMORY_DEVICE,
                       .data = (int)(w[2] >> 12) % DATA_KINDS,
                       .seed = (uint64_t)(seed * 1000003 + i)};
}

static void test_random(void **state) {
  (void)state;
  const int64_t usual = emxi_cuda_certified_short;
  emxi_cuda_certified_short = 1;
  rows_done = ladders = halves = near_tau = 0;
  for (int64_t i = 0; i < problems; i++) {
    decode_case c = problem(77, i);
    run(&c);
  }
  emxi_cuda_certified_short = usual;
  printf(
      "%lld rows, seed %lld, up to %lld keys: 0 wrong; ladder %lld, fewer than half of the keys read in %lld, a score within "
      "1e-4 of tau in "
      "%lld\n",
      (long long)rows_done, (long long)seed, (long long)longest, (long long)ladders, (long long)halves, (long long)near_tau);
  assert_true(rows_done < 200 ||
              (ladders * 8 > rows_done && halves * 20 > rows_done)); /* a ladder that reads everything passes all of the above */
}

/* Queries for another round: every other one leans towards the query that the keys of its head know, the group's first. */
static void draw_queries(gpu_case *g, uint64_t round) {
  decode_case *c = g->c;
  const int group = c->H / c->G;
  float *noise = case_take(sizeof(float) * (size_t)(c->B * c->H * c->D));
  emxi_normals(c->seed, 9000 + round, noise, (int64_t)c->B * c->H * c->D);
  for (int b = 0; b < c->B; b++)
    for (int h = 0; h < c->H; h++) {
      if (h % group == 0) continue;
      const float *first = c->q + case_row(c, b, h / group * group, 0) * c->D;
      const float wide = h % 4 == 3 ? 2.0f : 1.0f;
      float *q = c->q + case_row(c, b, h, 0) * c->D;
      for (int d = 0; d < c->D; d++) {
        const float x = noise[case_row(c, b, h, 0) * c->D + d] * wide;
        q[d] = h % 2 ? 0.8f * first[d] + 0.6f * x : x;
        emxi_store(c->q_data, c->q_dtype, case_at(c, c->H, 1, c->layout, b, h, 0) + d, (double)q[d]);
      }
    }
  OK(gpu->backend->memory_copy(gpu, g->q.data, c->q_data, gpu_bytes(&c->tq)));
  free(noise);
}
static void test_many(void **state) {
  (void)state;
  const int64_t usual = emxi_cuda_certified_short;
  emxi_cuda_certified_short = 1;
  int64_t decodes = 0, by_ladder = 0, at_half = 0;
  rows_done = ladders = halves = near_tau = 0;
  for (int64_t i = 0; decodes < many; i++) {
    decode_case c = problem(78, i);
    c.H = c.G * (1 + (int32_t)(i * 37 % 127)); /* many heads share keys, which take most of the time to make */
    c.in_decode = false;
    gpu_case g;
    gpu_open(&g, &c);
    double *s = case_take(sizeof(double) * (size_t)(c.max_len + 1)), *p = case_take(sizeof(double) * (size_t)(c.max_len + 1));
    for (int round = 0; round < 10 && decodes < many; round++) {
      if (round) draw_queries(&g, (uint64_t)round);
      emx_select_desc d = case_desc(EMX_SELECT_ALL, 0);
      gpu_decode_by(&g, &d);
      const outputs all = keep(&c);
      d = case_desc(EMX_SELECT_CERTIFIED, 0);
      gpu_decode_by(&g, &d);
      for (int b = 0; b < c.B; b++)
        for (int h = 0; h < c.H; h++, decodes++) {
          const int64_t row = case_row(&c, b, h, 0);
          const emx_report *r = &c.reports[row], *a = &all.reports[row];
          /* the same number of weights, the same tau and output: no oracle is needed to see that nothing was lost */
          bool same =
              r->flags == a->flags && r->support == a->support && fabsf(r->tau - a->tau) <= 1e-6f * fmaxf(1, fabsf(a->tau));
          for (int x = 0; x < c.D && same; x++) {
            const float mine = ((const float *)c.o_data)[row * c.D + x], theirs = all.o[row * c.D + x];
            same = fabsf(mine - theirs) <= 1e-6f * fmaxf(1, fabsf(theirs)) || (isnan(mine) && isnan(theirs));
          }
          if (!same || decodes % 97 == 0) check_row(&c, &all, s, p, b, h, 0); /* fails with what is wrong */
          by_ladder += r->path == EMX_PATH_LADDER;
          at_half += 2 * (int64_t)r->tokens < c.len[b];
        }
      free(all.o), free(all.reports);
    }
    free(s), free(p);
    gpu_close(&g);
  }
  emxi_cuda_certified_short = usual;
  printf(
      "%lld decodes, seed %lld, up to %lld keys, against ALL: 0 wrong; ladder %lld, fewer than half of the keys read in %lld; "
      "%lld of them against float64, a score within 1e-4 of tau in %lld\n",
      (long long)decodes, (long long)seed, (long long)longest, (long long)by_ladder, (long long)at_half, (long long)rows_done,
      (long long)near_tau);
  assert_true(decodes < 10000 || (by_ladder * 8 > decodes && at_half * 100 > decodes)); /* of a few caches it means nothing */
}

/* One alpha a head, in device memory: a work item with a head that the ladder does not take, softmax or alpha above 2, goes to ALL's path. */
static void test_alphas(void **state) {
  (void)state;
  static const double own[2][8] = {{1.5, 2, 1.25, 1.75, 1.5, 1, 2, 1.5}, {4. / 3, 3, 1.5, 1.04, 2, 1, 1.2, 7. / 4}};
  const int64_t usual = emxi_cuda_certified_short;
  emxi_cuda_certified_short = 1;
  rows_done = ladders = 0;
  for (int i = 0; i < 8; i++) {
    decode_case c = {.B = 1 + i % 2,
                     .G = i % 4 < 2 ? 2 : 8, /* four heads an item, or one */
                     .H = 8,
                     .D = i % 3 ? 64 : 128,
                     .P = sizes[i % 3],
                     .dtype = dtypes[i / 2 % 2],
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {5000 + 11 * i, 1200},
                     .alibi = i >= 6,
                     .data = i % 3 == 2 ? DATA_AR : DATA_IID,
                     .seed = 800 + (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    const double *alpha_of = own[i / 2 % 2];
    const emx_tensor host = emx_tensor_view((void *)alpha_of, EMX_F64, 1, (int64_t[1]){8}), device = gpu_tensor(&host);
    g.io.alphas = &device;
    emx_select_desc d = case_desc(EMX_SELECT_ALL, 0);
    gpu_decode_by(&g, &d);
    const outputs all = keep(&c);
    d.kind = EMX_SELECT_CERTIFIED;
    gpu_decode_by(&g, &d);
    double *s = case_take(sizeof(double) * (size_t)(c.max_len + 1)), *p = case_take(sizeof(double) * (size_t)(c.max_len + 1));
    for (int b = 0; b < c.B; b++)
      for (int h = 0; h < 8; h++) {
        const int64_t row = case_row(&c, b, h, 0), per = c.H / c.G;
        const emx_report *r = &c.reports[row];
        bool laddered = true;
        for (int x = (int)(h / per * per); x < (h / per + 1) * per; x++) laddered &= alpha_of[x] >= 1.05 && alpha_of[x] <= 2;
        if (!laddered) assert_int_equal(r->path, EMX_PATH_ALL);
        c.alpha = alpha_of[h];
        if (c.alpha < 1.05 || c.alpha > 2) { /* the same kernels as ALL's */
          assert_memory_equal((float *)c.o_data + row * c.D, all.o + row * c.D, sizeof(float) * (size_t)c.D);
          assert_true(r->flags == EMX_REPORT_CERTIFIED && r->support == all.reports[row].support);
        } else {
          check_row(&c, &all, s, p, b, h, 0);
        }
      }
    free(s), free(p), free(all.o), free(all.reports);
    gpu_free(device.data);
    gpu_close(&g);
  }
  emxi_cuda_certified_short = usual;
  assert_true(ladders * 4 > rows_done);
}

/* So many keys that a block of the sieve has several turns of groups of every head: its warps go on with other heads' turns. */
static void test_turns(void **state) {
  (void)state;
  const int64_t usual = emxi_cuda_certified_short;
  emxi_cuda_certified_short = 1;
  rows_done = ladders = 0;
  for (int i = 0; i < 2; i++) {
    decode_case c = {.G = 4,
                     .H = i ? 16 : 4,
                     .D = 64,
                     .dtype = EMX_F16,
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {300000},
                     .alpha = 1.5,
                     .data = i ? DATA_AR : DATA_IID,
                     .seed = 710 + (uint64_t)i};
    run(&c);
  }
  emxi_cuda_certified_short = usual;
  assert_true(ladders * 2 > rows_done); /* ALL's path would prove nothing here */
}

/* Rows with weights in more chunks than one block solves (MAX_ALIVE in solve.cuh): all parts of the row pack what they have, and the last
 * one to arrive solves. Independent keys whose scores deviate so little have some 2,000 weights among 400,000. */
static void test_wide(void **state) {
  (void)state;
  const int64_t usual = emxi_cuda_certified_short;
  emxi_cuda_certified_short = 1;
  rows_done = ladders = 0;
  fewest_chunks = INT64_MAX;
  for (int i = 0; i < 2; i++) {
    decode_case c = {.H = 1 + i,
                     .D = 32,
                     .dtype = EMX_F16,
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {400000},
                     .alpha = 1.5,
                     .scale = 0.1f / sqrtf(32), /* scores deviate by 0.1 */
                     .seed = 700 + (uint64_t)i};
    run(&c);
  }
  emxi_cuda_certified_short = usual;
  assert_true(fewest_chunks > 1024);
  assert_true(ladders > 0); /* ALL's path would prove nothing here */
}

/* Odd keys and queries, and a cache that is cut, forked and written again. */
static void test_changes(void **state) {
  (void)state;
  const int64_t usual = emxi_cuda_certified_short;
  emxi_cuda_certified_short = 1;
  for (int i = 0; i < 6; i++) {
    decode_case c = {.G = 1 + i % 2,
                     .H = 4,
                     .D = dims[i % 3],
                     .P = sizes[i % 3],
                     .dtype = dtypes[i % 3],
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {3000 + 7 * i},
                     .alpha = alphas[i % 5],
                     .data = (int[]){DATA_AR, DATA_IID, DATA_WIDE}[i % 3],
                     .seed = 900 + (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    const int64_t n = c.len[0], back = n - 1234;
    int32_t child;
    OK(emx_seq_truncate(g.kv, g.seqs[0], back));
    OK(emx_seq_fork(g.kv, g.seqs[0], &child));
    gpu_append(&c, g.kv, child, 0, back, 1); /* copies the shared page */
    float *k = case_key(&c, 0, 0, n - 700);
    k[1] = i == 2 ? NAN : i == 3 ? INFINITY : i == 4 ? -INFINITY : k[1];
    for (int64_t at = back; at < n; at += 300) gpu_append(&c, g.kv, g.seqs[0], 0, at, n - at < 300 ? n - at : 300);
    emx_select_desc d = case_desc(EMX_SELECT_ALL, 0);
    gpu_decode_by(&g, &d);
    const outputs all = keep(&c);
    d.kind = EMX_SELECT_CERTIFIED;
    gpu_decode_by(&g, &d);
    for (int h = 0; h < c.H; h++) {
      const emx_report *r = &c.reports[h], *a = &all.reports[h];
      const float *got = (const float *)c.o_data + h * c.D, *want = all.o + h * c.D;
      assert_int_equal(r->support, a->support);
      assert_int_equal(r->flags, a->flags);
      if (i == 2) assert_int_equal(isnan(want[0]) != 0, h < c.H / c.G);
      for (int x = 0; x < c.D; x++) assert_true(isnan(want[x]) ? isnan(got[x]) : fabsf(got[x] - want[x]) <= 1e-5f);
    }
    free(all.o), free(all.reports);
    gpu_close(&g);
  }
  emxi_cuda_certified_short = usual;
}

/* Channels far out, of several gains: without weights of their own nine keys of ten would be read. */
static void test_wide_channels(void **state) {
  (void)state;
  static const float gains[] = {50, 20, 8, 1000};
  const int64_t usual = emxi_cuda_certified_short;
  emxi_cuda_certified_short = 1;
  rows_done = sparse = missed = 0;
  for (int i = 0; i < 16; i++) {
    decode_case c = {.G = 1 + i % 2,
                     .H = (1 + i % 2) * (i % 3 ? 1 : 4),
                     .D = dims[i % 8],
                     .P = sizes[i % 3],
                     .dtype = dtypes[i / 2 % 3],
                     .layout = i % 5 == 4,
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {24000 + 7 * i},
                     .alpha = (double[]){1.5, 2, 1.75}[i % 3],
                     .kv_memory = i % 4 == 3 ? EMX_KV_MEMORY_HOST : EMX_KV_MEMORY_DEVICE,
                     .data = DATA_WIDE,
                     .gain = gains[i / 4],
                     .seed = 300 + (uint64_t)i};
    const int64_t before = missed;
    run(&c);
    if (missed > before) printf("gain %g, D %d, alpha %g: %lld\n", (double)c.gain, c.D, c.alpha, (long long)(missed - before));
  }
  emxi_cuda_certified_short = usual;
  printf("channels far out: %lld rows, %lld sparse, half of the keys or more read in %lld of those\n", (long long)rows_done,
         (long long)sparse, (long long)missed);
  assert_true(2 * sparse > rows_done && 5 * missed <= sparse);
}

/* The weights of a cache's channels in device memory; and its groups' records and codes. */
typedef struct sketches {
  size_t weight_bytes, group_bytes, code_bytes;
  float *weights;
  char *groups, *codes, *centres;
} sketches;
static sketches fetch_sketches(const emx_kv *kv, int64_t groups) {
  const size_t dp = EMXI_CUDA_SKETCH_PADDED(kv->D), n = (size_t)groups * (size_t)kv->G;
  sketches s = {.weight_bytes = sizeof(float) * (size_t)kv->G * dp, .group_bytes = n * 32, .code_bytes = n * 8 * dp};
  s.weights = case_take(s.weight_bytes);
  s.groups = case_take(s.group_bytes);
  s.codes = case_take(s.code_bytes);
  s.centres = case_take(s.code_bytes / 8);
  OK(emx_ctx_sync(gpu));
  gpu_fetch(s.weights, kv->sketch_weights, s.weight_bytes);
  gpu_fetch(s.groups, kv->sketch_group, s.group_bytes);
  gpu_fetch(s.codes, kv->sketch_codes, s.code_bytes);
  gpu_fetch(s.centres, kv->sketch_centre, s.code_bytes / 8);
  return s;
}
static void same_sketches(const sketches *want, const emx_kv *kv, int64_t groups) {
  sketches s = fetch_sketches(kv, groups);
  assert_memory_equal(s.weights, want->weights, want->weight_bytes);
  assert_memory_equal(s.groups, want->groups, want->group_bytes);
  assert_memory_equal(s.codes, want->codes, want->code_bytes);
  assert_memory_equal(s.centres, want->centres, want->code_bytes / 8);
  free(s.weights), free(s.groups), free(s.codes), free(s.centres);
}
/* Whatever way the keys come, the weights and sketches are the same: all at once, in pieces, from another cache, by emx_kv_summarize. */
static void test_weights(void **state) {
  (void)state;
  for (int i = 0; i < 8; i++) {
    decode_case c = {.G = 1 + i % 3,
                     .D = dims[i],
                     .P = sizes[i % 3],
                     .dtype = dtypes[i % 3],
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {640},
                     .kv_memory = i % 2 ? EMX_KV_MEMORY_HOST : EMX_KV_MEMORY_DEVICE,
                     .data = i == 7 ? DATA_IID : DATA_WIDE,
                     .seed = 400 + (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    const int64_t dp = EMXI_CUDA_SKETCH_PADDED(c.D), groups = c.len[0] / 16;
    sketches want = fetch_sketches(g.kv, groups);
    for (int head = 0; head < c.G; head++)
      for (int d = 0; d < dp; d++) {
        const float weight = want.weights[head * dp + d];
        if (d >= c.D)
          assert_true(weight == 0);
        else if (c.data == DATA_WIDE && d % 16 == 3)
          assert_true(weight == 16 || weight == 32 || weight == 64 || weight == 128);
        else
          assert_true(weight == 1);
      }
    const int64_t step[3] = {1, 37, c.len[0]};
    int32_t seq;
    for (int way = 0; way < 5; way++) {
      emx_kv *other = gpu_cache(&c, c.len[0] / c.P + 4, 2);
      if (way < 3) {
        OK(emx_seq_create(other, &seq));
        for (int64_t at = 0; at < c.len[0]; at += step[way])
          gpu_append(&c, other, seq, 0, at, c.len[0] - at < step[way] ? c.len[0] - at : step[way]);
      } else {
        OK(emx_seq_copy(way == 3 ? g.kv : c.kv, way == 3 ? g.seqs[0] : c.seqs[0], other, &seq));
      }
      same_sketches(&want, other, groups);
      if (way == 2) { /* what was known is lost: zeros; and what is there is made again */
        float *none = case_take(want.weight_bytes);
        int32_t list[640 / 16];
        for (int p = 0; p < 640 / 16; p++) list[p] = p;
        const int64_t n = c.len[0] / c.P;
        const emx_tensor host = emx_tensor_view(list, EMX_I32, 1, &n), pages = gpu_tensor(&host);
        OK(gpu->backend->memory_copy(gpu, other->sketch_weights, none, want.weight_bytes));
        OK(emx_kv_summarize(gpu, other, &pages, NULL));
        same_sketches(&want, other, groups);
        OK(emx_kv_summarize(gpu, other, &pages, NULL));
        same_sketches(&want, other, groups);
        gpu_free(pages.data);
        free(none);
      }
      emx_kv_destroy(other);
    }
    free(want.weights), free(want.groups), free(want.codes), free(want.centres);
    gpu_close(&g);
  }
}

/* First pages that say nothing of the others, or something else. */
static void test_odd_beginnings(void **state) {
  (void)state;
  const int64_t usual = emxi_cuda_certified_short;
  emxi_cuda_certified_short = 1;
  int64_t rows = 0, too_many = 0;
  for (int i = 0; i < 15; i++) {
    const int kind = i % 5;
    decode_case c = {.B = 2,
                     .G = 1 + i % 2,
                     .H = 2 + 2 * (i % 2),
                     .D = dims[i % 3],
                     .P = sizes[i % 3],
                     .dtype = dtypes[i / 5 % 3],
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {24000 + i, 700},
                     .alpha = alphas[i % 2],
                     .kv_memory = i == 8 ? EMX_KV_MEMORY_HOST : EMX_KV_MEMORY_DEVICE,
                     .data = DATA_WIDE,
                     .seed = 500 + (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    emx_kv_destroy(g.kv); /* the same once more, with other keys */
    g.kv = gpu_cache(&c, 24800 / c.P + 6, 5);
    for (int b = 0; b < 2; b++) OK(emx_seq_create(g.kv, &g.seqs[b]));
    int64_t first = 10 * c.P + 5; /* tokens of the first call */
    for (int head = 0; head < c.G; head++) {
      if (kind == 0) /* nothing but zeros */
        memset(case_key(&c, 0, head, 0), 0, sizeof(float) * (size_t)(first * c.D));
      if (kind == 1) { /* most channels are constant, in more pages than are looked at */
        first = 700;
        for (int64_t j = 0; j < first; j++)
          for (int d = 0; d < c.D; d++)
            if (d % 16 >= 6) case_key(&c, 0, head, j)[d] = 0.5f;
        /* some of them lie before a query's eyes, against its direction in the channels that are going to be far out: seen through their
         * weights, by which these sketches were not made, they would lie behind */
        const float *q = c.q + case_row(&c, 0, head * (c.H / c.G), 0) * c.D;
        for (int64_t j = 7; j < first; j += 16)
          for (int d = 0; d < c.D; d++)
            if (d % 16 < 6) case_key(&c, 0, head, j)[d] = case_round(d % 16 == 3 ? -0.4f * q[d] : 2 * q[d], c.dtype);
      }
      if (kind == 2) case_key(&c, 1, head, 3)[0] = head ? INFINITY : NAN;
      if (kind == 3) /* later other channels are far out */
        for (int64_t j = 100; j < c.len[0]; j++)
          for (int d = 3; d + 4 < c.D; d += 16) {
            float *k = case_key(&c, 0, head, j), x = k[d];
            k[d] = k[d + 4];
            k[d + 4] = x;
          }
      if (kind == 4) /* one key of the first page is far larger */
        for (int d = 0; d < c.D; d++) case_key(&c, 0, head, 2)[d] *= d % 2 ? 16 : -16;
    }
    if (kind == 2) {
      gpu_append(&c, g.kv, g.seqs[1], 1, 0, c.P);
      gpu_append(&c, g.kv, g.seqs[0], 0, 0, first);
      gpu_append(&c, g.kv, g.seqs[1], 1, c.P, 700 - c.P);
    } else {
      gpu_append(&c, g.kv, g.seqs[0], 0, 0, first);
      gpu_append(&c, g.kv, g.seqs[1], 1, 0, 700);
    }
    for (int64_t at = first; at < c.len[0]; at += 3000)
      gpu_append(&c, g.kv, g.seqs[0], 0, at, c.len[0] - at < 3000 ? c.len[0] - at : 3000);
    emx_select_desc d = case_desc(EMX_SELECT_ALL, 0);
    gpu_decode_by(&g, &d);
    const outputs all = keep(&c);
    d.kind = EMX_SELECT_CERTIFIED;
    gpu_decode_by(&g, &d);
    double *s = case_take(sizeof(double) * (size_t)(c.max_len + 1)), *p = case_take(sizeof(double) * (size_t)(c.max_len + 1));
    for (int h = 0; h < c.H; h++) {
      check_row(&c, &all, s, p, 0, h, 0);
      if (kind == 2)
        assert_true(c.reports[c.H + h].flags == all.reports[c.H + h].flags &&
                    c.reports[c.H + h].support == all.reports[c.H + h].support);
      else
        check_row(&c, &all, s, p, 1, h, 0);
      const emx_report *r = &c.reports[h];
      if (!is_sparse(r, c.len[0])) continue;
      assert_int_equal(r->path, EMX_PATH_LADDER);
      if (kind == 1) assert_true(r->tokens >= 700 / c.P * c.P); /* their sketches are of other weights: they are read */
      if (kind == 3) continue;
      rows++;
      if (2 * (int64_t)r->tokens < c.len[0]) continue;
      printf("beginning %d, D %d, alpha %g: %d of %d keys read, support %d\n", kind, c.D, c.alpha, r->tokens, (int)c.len[0],
             r->support);
      too_many++;
    }
    free(s), free(p), free(all.o), free(all.reports);
    gpu_close(&g);
  }
  emxi_cuda_certified_short = usual;
  printf("odd beginnings: half of the keys or more read in %lld of %lld rows\n", (long long)too_many, (long long)rows);
  assert_true(rows > 20 && 5 * too_many <= rows);
}

static void test_refused(void **state) {
  (void)state;
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.summaries = EMX_SUMMARY_SKETCH | EMX_SUMMARY_RESIDUAL;
  o.kv_heads = 1;
  o.head_dim = 64;
  o.max_seqs = 1;
  o.max_pages = 4;
  emx_kv *kv = NULL;
  assert_int_equal(emx_kv_create(gpu, &o, &kv), EMX_ERR_UNSUPPORTED);
  assert_true(!kv && strstr(emx_last_error(), "residual"));
  /* no page lists of it yet, said before anything runs: what the lists held stays */
  decode_case c = {.D = 64, .dtype = EMX_F16, .summaries = EMX_SUMMARY_SKETCH, .len = {600}, .alpha = 1.5};
  gpu_case g;
  gpu_open(&g, &c);
  const emx_select_desc certified = case_desc(EMX_SELECT_CERTIFIED, 0), all = case_desc(EMX_SELECT_ALL, 0);
  size_t bytes;
  char *work = gpu_work(&g, &certified, &bytes);
  CUDA(cudaMemset(g.n_pages.data, 0x77, gpu_bytes(&g.n_pages)));
  fails(emx_select(gpu, g.kv, &g.batch, &certified, &g.io, work + 1, bytes), EMX_ERR_UNSUPPORTED, "page lists of CERTIFIED");
  OK(emx_ctx_sync(gpu));
  gpu_fetch(c.n_pages, g.n_pages.data, gpu_bytes(&g.n_pages));
  assert_int_equal(c.n_pages[0], 0x77777777);
  gpu_free(work);
  gpu_select(&g, &all); /* others are as before */
  assert_int_equal(c.n_pages[0], (600 + c.P - 1) / c.P);
  gpu_close(&g);
}

/* When the ladder is taken: its workspace is larger than ALL's. */
static void test_short(void **state) {
  (void)state;
  const struct {
    int32_t G, group, D, kv_memory;
    double max_delta;
    bool ladder;
  } ways[] = {{4, 1, 64, EMX_KV_MEMORY_DEVICE, 0, true},  {1, 1, 64, EMX_KV_MEMORY_DEVICE, 0, false},
              {1, 1, 64, EMX_KV_MEMORY_HOST, 0, true},    {1, 1, 64, EMX_KV_MEMORY_DEVICE, 0.5, true},
              {4, 2, 64, EMX_KV_MEMORY_DEVICE, 0, false}, {4, 2, 128, EMX_KV_MEMORY_DEVICE, 0, true},
              {8, 1, 32, EMX_KV_MEMORY_DEVICE, 0, false}};
  const int64_t usual = emxi_cuda_certified_short;
  emxi_cuda_certified_short = 640;
  for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
    decode_case c = {.G = ways[i].G,
                     .H = ways[i].G * ways[i].group,
                     .D = ways[i].D,
                     .dtype = EMX_F16,
                     .summaries = EMX_SUMMARY_SKETCH,
                     .len = {40},
                     .alpha = 1.5,
                     .kv_memory = ways[i].kv_memory,
                     .seed = 800 + (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    emx_select_desc s = case_desc(EMX_SELECT_ALL, 0);
    size_t all, bytes;
    OK(emx_decode_workspace_size(gpu, g.kv, &s, &g.io, 40, &all));
    s.kind = EMX_SELECT_CERTIFIED;
    s.max_delta = ways[i].max_delta;
    OK(emx_decode_workspace_size(gpu, g.kv, &s, &g.io, 40, &bytes));
    assert_int_equal(bytes > all, ways[i].ladder);
    gpu_close(&g);
  }
  emxi_cuda_certified_short = usual;
}

int main(int argc, char **argv) {
  if (argc > 1) problems = atoll(argv[1]);
  if (argc > 2) seed = atoll(argv[2]);
  if (argc > 3) longest = atoll(argv[3]);
  if (argc > 4) many = atoll(argv[4]);
  const int missing = gpu_missing();
  if (missing) return missing;
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_refused),       cmocka_unit_test(test_changes),        cmocka_unit_test(test_weights),
      cmocka_unit_test(test_wide_channels), cmocka_unit_test(test_odd_beginnings), cmocka_unit_test(test_random),
      cmocka_unit_test(test_many),          cmocka_unit_test(test_turns),          cmocka_unit_test(test_wide),
      cmocka_unit_test(test_alphas),        cmocka_unit_test(test_short),
  };
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  emx_ctx_destroy(gpu);
  emx_ctx_destroy(cpu);
  return failed;
}
