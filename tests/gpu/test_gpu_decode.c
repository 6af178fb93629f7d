/* Decode on a GPU against the float64 oracle, with the CPU's cases and tolerances; odd data, determinism, graphs, streams, faults. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "cuda/backend_cuda.h"
#include "gpu_case.h"

/* As in tests/unit/test_decode.c: scores carry float rounding, about 1e-6 of their size, and so does tau. */
static void check(const decode_case *c) {
  double *s = case_take(sizeof(double) * (size_t)(c->max_len + 1)), *p = case_take(sizeof(double) * (size_t)(c->max_len + 1)),
         o[256];
  for (int b = 0; b < c->B; b++)
    for (int h = 0; h < c->H; h++)
      for (int t = 0; t < c->S; t++) {
        int64_t support = 0;
        const double tau = case_reference(c, b, h, t, NULL, s, p, o, &support);
        const emx_report *r = &c->reports[case_row(c, b, h, t)];
        const int64_t n = c->len[b] - c->S + t + 1 > 0 ? c->len[b] - c->S + t + 1 : 0;
        double m = 1;
        for (int64_t j = 0; j < n; j++) m = fmax(m, fabs(s[j]));
        const double unit = c->o_dtype == EMX_BF16 ? 0x1p-8 : c->o_dtype == EMX_F16 ? 0x1p-11 : 0;
        for (int d = 0; d < c->D; d++) {
          const double got = case_out(c, b, h, t, d);
          if (!(fabs(got - o[d]) <= case_tolerance(c, m) + unit * fabs(o[d])))
            fail_msg("b %d h %d s %d d %d: %g, oracle %g (alpha %g D %d P %d dtype %d group %d n %d data %d)", b, h, t, d, got,
                     o[d], c->alpha, c->D, c->P, c->dtype, c->H / c->G, (int)n, c->data);
        }
        if (c->alpha > 1 && n && !(fabs(r->tau - tau) <= 1e-5 * m))
          fail_msg("tau %g, oracle %g (alpha %g)", r->tau, tau, c->alpha);
        if (c->alpha == 1) assert_true(isnan(r->tau));
        if (!n) assert_true(r->support == 0 && (c->alpha == 1 || r->tau == -INFINITY));
        int64_t sure = 0, maybe = 0;
        for (int64_t j = 0; j < n && c->alpha > 1; j++) {
          sure += (c->alpha - 1) * s[j] - tau > 1e-5 * m;
          maybe += (c->alpha - 1) * s[j] - tau > -1e-5 * m;
        }
        if (c->alpha > 1) assert_true(r->support <= maybe && (c->alpha < 1.5 || r->support >= sure));
        if (c->alpha == 1) assert_int_equal(r->support, n);
        assert_true(r->flags == EMX_REPORT_CERTIFIED && r->delta_bound == 0 && r->max_unread == -INFINITY);
        assert_true(r->tokens == n && r->pages == (n + c->P - 1) / c->P && r->path == EMX_PATH_ALL &&
                    r->select == EMX_SELECT_ALL);
        assert_true(r->stopped_by == EMX_STOP_DONE && r->bytes_meta == 0 && (!n || fabs(r->mass - 1) < 1e-5));
        const int64_t line = (c->D * (int64_t)emx_dtype_size(c->dtype) + 63) / 64 * 64;
        assert_int_equal(r->bytes_v, r->support * line);
        if (c->layout == EMX_LAYOUT_BNHD && c->G > 1) assert_int_equal(r->bytes_k, n * line);
      }
  free(s);
  free(p);
}
static void run_case(decode_case c) {
  gpu_case g;
  gpu_open(&g, &c);
  gpu_decode(&g);
  check(&c);
  gpu_close(&g);
}

static const int32_t dims[] = {16, 32, 64, 80, 96, 128, 256, 20, 33}, dtypes[] = {EMX_F16, EMX_BF16, EMX_F32},
                     sizes[] = {16, 32, 64};
static void test_all(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.05, 1.25, 4. / 3, 1.5, 1.75, 2, 2.5, 4};
  for (int i = 0; i < 72; i++)
    run_case((decode_case){.B = 2,
                           .G = 1 + i % 2,
                           .H = (1 + i % 2) * (1 + i % 5),
                           .D = i % 3   ? dims[i / 2 % 9]
                                : i % 2 ? 64
                                        : 128,
                           .P = sizes[i / 3 % 3],
                           .dtype = dtypes[i / 2 % 3],
                           .layout = i % 2,
                           .len = {1 + i * 17, 300},
                           .alpha = alphas[i % 9],
                           .alibi = i % 4 == 3,
                           .in_decode = i % 3 == 0,
                           .data = i / 2 % DATA_HUGE,
                           .seed = (uint64_t)i,
                           .q_dtype = dtypes[i % 3],
                           .o_dtype = i % 2 ? EMX_F32 : dtypes[i % 3]});
}
/* Both fast shapes: one and several query heads, each dtype, each page size, many parts. */
static void test_fast_shapes(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.5, 2, 1.5};
  for (int i = 0; i < 64; i++) /* the second half with queries of the cache's dtype */
    run_case((decode_case){.B = 1 + i % 2,
                           .G = 2,
                           .H = i / 2 % 2   ? 2
                                : i % 3     ? 8
                                : i / 5 % 2 ? 12
                                            : 22,
                           .D = i % 2 ? 64 : 128,
                           .P = sizes[i % 3],
                           .dtype = dtypes[i / 4 % 2],
                           .layout = i / 3 % 2,
                           .len = {i % 8 ? 300 + 377 * (i % 24) : 1 + i, 5003},
                           .alpha = alphas[i % 4],
                           .alibi = i % 7 == 6,
                           .seed = (uint64_t)i,
                           .q_dtype = i < 32 ? EMX_F32 : dtypes[i / 4 % 2],
                           .data = i % 5 == 4 ? DATA_TOPIC
                                   : i % 5    ? DATA_IID
                                              : DATA_AR});
}
/* Long supports: values added by the whole device, scores without their positions in shared memory, more than it holds. */
static void test_flat(void **state) {
  (void)state;
  static const double alphas[] = {1.5, 2, 1.25, 1.75, 3, 1, 4. / 3};
  for (int i = 0; i < 14; i++)
    run_case((decode_case){.G = 1,
                           .H = 2,
                           .D = i % 2 ? 64 : 48,
                           .dtype = EMX_F16,
                           .q_dtype = i < 7 ? EMX_F32 : EMX_F16,
                           .len = {i % 3 ? 9000 + i : 40000},
                           .alpha = alphas[i % 7],
                           .data = i == 4 ? DATA_EQUAL : DATA_FLAT});
  for (int i = 0; i < 6; i++)
    run_case((decode_case){
        .D = 64, .dtype = EMX_BF16, .len = {i % 2 ? 14000 : 30011}, .alpha = alphas[i % 3 * 2], .data = DATA_EQUAL});
}
/* Long supports of so many rows that one block or two solve each: scores packed closely, more of them than there is room for (equal keys),
 * and the same bits every time. */
static void test_flat_rows(void **state) {
  (void)state;
  for (int i = 0; i < 6; i++) {
    decode_case c = {.G = 2,
                     .H = 4,
                     .S = i % 2 ? 10 : 34,
                     .D = 64,
                     .dtype = EMX_F16,
                     .len = {40000 + 77 * i},
                     .alpha = i == 4   ? 2
                              : i == 5 ? 1.25
                                       : 1.5,
                     .data = i / 2 == 1 ? DATA_EQUAL : DATA_FLAT};
    gpu_case g;
    gpu_open(&g, &c);
    gpu_decode(&g);
    check(&c);
    const size_t bytes = gpu_bytes(&c.to);
    void *first = case_take(bytes);
    memcpy(first, c.o_data, bytes);
    for (int n = 0; n < 3; n++) {
      gpu_decode(&g);
      assert_memory_equal(first, c.o_data, bytes);
    }
    free(first);
    gpu_close(&g);
  }
}
/* Alphas so close to one that powers of most differences are no floats: bounds that are found in float must stay below the threshold. */
static void test_low_alphas(void **state) {
  (void)state;
  static const double alphas[] = {1.0003, 1.001, 1.002, 1.01, 1.0337, 1.05};
  static const int64_t lengths[] = {1, 8, 1000, 40000};
  for (int i = 0; i < 24; i++)
    for (int data = 0; data < 3; data++)
      run_case((decode_case){.D = data == 2 ? 64 : 32,
                             .dtype = EMX_F16,
                             .len = {lengths[i / 6]},
                             .alpha = alphas[i % 6],
                             .data = (int[]){DATA_IID, DATA_FLAT, DATA_NEEDLE}[data],
                             .seed = (uint64_t)i});
}
static void test_lengths(void **state) {
  (void)state;
  static const int64_t lengths[] = {0, 1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025};
  for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
    for (int a = 0; a < 4; a++)
      run_case((decode_case){.B = 2,
                             .G = 2,
                             .H = a > 1 ? 2 : 4,
                             .D = a % 2 ? 64 : 16,
                             .dtype = EMX_F16,
                             .len = {lengths[i], 40},
                             .alpha = a % 2 ? 1.5 : 1,
                             .seed = i});
}
static void test_query_tokens(void **state) {
  (void)state;
  for (int i = 0; i < 4; i++)
    run_case((decode_case){.B = 2,
                           .G = 1 + i / 2,
                           .H = 4,
                           .S = 3 + 7 * i,
                           .D = i % 2 ? 48 : 64,
                           .layout = i % 2,
                           .dtype = EMX_F16,
                           .len = {i == 1 ? 4 : 290, 3 + 7 * i + 30},
                           .alpha = i % 2 ? 1 : 1.5,
                           .alibi = i == 2,
                           .in_decode = i > 1,
                           .seed = (uint64_t)i});
}

/* NaN and infinities, as in tests/unit/test_decode.c: in q, in a key, in the value of a token without weight; masks. */
static void test_odd_data(void **state) {
  (void)state;
  for (int a = 0; a < 6; a++)
    for (int kind = 0; kind < 8; kind++) {
      decode_case c = {.G = 2,
                       .H = 4,
                       .D = a % 2 ? 64 : 32,
                       .dtype = a % 2 ? EMX_BF16 : EMX_F32,
                       .q_dtype = a % 2 ? EMX_BF16 : EMX_F32,
                       .len = {300},
                       .alpha = a / 2 == 0   ? 1
                                : a / 2 == 1 ? 1.5
                                             : 1.25,
                       .seed = 3};
      gpu_case g;
      gpu_open(&g, &c);
      const int D = c.D;
      float *q = c.q; /* [H,D] */
      bool nan_group0 = false, nan_row1 = false;
      emx_seq_truncate(g.kv, g.seqs[0], 0);
      switch (kind) {
        case 0: q[D + 5] = NAN, nan_row1 = true; break;
        case 1: q[D + 5] = INFINITY, nan_row1 = true; break;
        case 2: case_key(&c, 0, 0, 77)[3] = NAN, nan_group0 = true; break;
        case 3: q[4] = 1, q[D + 4] = -1, case_key(&c, 0, 0, 77)[4] = INFINITY; break; /* +inf for row 0, -inf for row 1 */
        case 4:
          for (int64_t j = 0; j < 300; j++) case_key(&c, 0, 0, j)[3] = NAN;
          nan_group0 = true;
          break;
        case 5: /* a value without weight: its key is pushed far down for both rows */
          for (int d = 0; d < D; d++) case_key(&c, 0, 0, 100)[d] = -1e4f * (q[d] + q[D + d]), case_value(&c, 0, 0, 100)[d] = NAN;
          break;
        case 6: /* all masked */
          q[0] = q[D] = 1;
          for (int64_t j = 0; j < 300; j++) case_key(&c, 0, 0, j)[0] = -INFINITY;
          break;
        default: /* a finite key whose score overflows to -inf */
          q[0] = 3e38f, case_key(&c, 0, 0, 7)[0] = -3e38f, nan_group0 = false;
      }
      gpu_append(&c, g.kv, g.seqs[0], 0, 0, 300);
      for (int i = 0; i < 4 * D; i++) emxi_store(c.q_data, c.q_dtype, i, (double)q[i]);
      OK(gpu->backend->memory_copy(gpu, g.q.data, c.q_data, gpu_bytes(&c.tq)));
      gpu_decode(&g);
      for (int h = 0; h < 4; h++) {
        const emx_report *r = &c.reports[h];
        const bool nan = (h < 2 && nan_group0) || (h == 1 && nan_row1) || (kind == 3 && h == 0) || (kind == 7 && h == 0);
        for (int d = 0; d < D; d++)
          if ((isnan(case_out(&c, 0, h, 0, d)) != 0) != nan) fail_msg("kind %d alpha %g h %d", kind, c.alpha, h);
        assert_int_equal(r->flags, nan ? EMX_REPORT_NONFINITE : EMX_REPORT_CERTIFIED);
        if (nan) assert_true(r->support == 0 && r->delta_bound == 1 && isnan(r->mass));
        if (kind == 6 && h < 2) {
          assert_true(r->support == 0 && r->mass == 0 && (c.alpha == 1 || r->tau == -INFINITY));
          for (int d = 0; d < D; d++) assert_true(case_out(&c, 0, h, 0, d) == 0);
        }
      }
      gpu_close(&g);
    }
}

/* The same call gives the same bits, whatever the order in which blocks run. */
static void test_deterministic(void **state) {
  (void)state;
  for (int i = 0; i < 3; i++) {
    decode_case c = {
        .G = 2, .H = 8, .D = 64, .dtype = EMX_F16, .len = {30000}, .alpha = i ? 1.5 : 1, .data = i == 2 ? DATA_FLAT : DATA_IID};
    gpu_case g;
    gpu_open(&g, &c);
    gpu_decode(&g);
    float first[8 * 64];
    emx_report reports[8];
    memcpy(first, c.o_data, sizeof first);
    memcpy(reports, c.reports, sizeof reports);
    for (int n = 0; n < 20; n++) {
      gpu_decode(&g);
      assert_memory_equal(first, c.o_data, sizeof first);
      assert_memory_equal(reports, c.reports, sizeof reports);
    }
    gpu_close(&g);
  }
}

/* So many query tokens that a part of the scan has many chunks: bulk copies, parts that tell each other the largest score whenever they come
 * to know it, and chunks that go to whoever is free. The same call gives the same bits all the same. */
static void test_bulk(void **state) {
  (void)state;
  static const double alphas[] = {1.5, 2, 1.25, 3, 1.5, 1.5};
  static const int data[] = {DATA_IID, DATA_AR, DATA_NEEDLE, DATA_FLAT, DATA_IID, DATA_IID};
  for (int i = 0; i < 6; i++) {
    decode_case c = {.G = 4,
                     .H = 16,
                     .S = 16,
                     .D = i == 2 ? 32 : 64,
                     .dtype = i == 3 ? EMX_BF16 : EMX_F16,
                     .B = 1 + i % 2,
                     .len = {26000 + 31 * i, 700 * (i - 1)}, /* what is cut for the longest is right for others */
                     .P = i == 2 ? 64 : 16,
                     .alpha = alphas[i],
                     .data = data[i]};
    c.alibi = i == 1;
    if (i == 1) c.kv_memory = EMX_KV_MEMORY_HOST;
    if (i == 4) c.G = 2, c.H = 4, c.S = 64, c.D = 128;
    if (i == 1) c.len[1] = 16;
    if (i == 5) c.scale = 0.2f / sqrtf(64); /* hundreds of weights, added from the scan's segments */
    gpu_case g;
    gpu_open(&g, &c);
    gpu_decode(&g);
    check(&c);
    const size_t bytes = gpu_bytes(&c.to);
    void *first = case_take(bytes);
    memcpy(first, c.o_data, bytes);
    for (int n = 0; n < 10; n++) {
      gpu_decode(&g);
      assert_memory_equal(first, c.o_data, bytes);
    }
    free(first);
    gpu_close(&g);
  }
}

/* ---- the caller's tables: graphs, faults */

enum { STEPS = 64, START = 1000, HEADS = 4, DIM = 64 };
typedef struct growing { /* one new token a step, f16, pages in falling order */
  emx_kv *kv;
  emx_tensor table, lengths, q, o, k, v;
  int32_t host_lengths[2];
  void *work;
  emx_report *reports;
  size_t bytes;
  emx_kv_batch batch;
  emx_decode_io io;
  emx_select_desc select;
} growing;
static void growing_open(growing *w, double alpha, int32_t kind, double max_delta) {
  const decode_case shape = {
      .G = 2, .D = DIM, .P = 16, .dtype = EMX_F16, .summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS | EMX_SUMMARY_SKETCH};
  const int64_t columns = (START + STEPS + 15) / 16, pages = 2 * columns;
  *w = (growing){.kv = gpu_cache(&shape, pages, 1), .host_lengths = {START, START / 2 + 3}, .select = case_desc(kind, START / 3)};
  w->select.max_delta = max_delta;
  int32_t *table = case_take(sizeof(int32_t) * (size_t)pages);
  for (int64_t i = 0; i < pages; i++) table[i] = (int32_t)(pages - 1 - i);
  emx_tensor t = emx_tensor_view(table, EMX_I32, 2, (int64_t[2]){2, columns}),
             n = emx_tensor_view(w->host_lengths, EMX_I32, 1, (int64_t[1]){2});
  w->table = gpu_tensor(&t);
  free(table);
  /* what is there at the start */
  const int32_t none[2] = {0, 0};
  w->lengths = gpu_tensor(&n);
  gpu_free(w->lengths.data);
  w->lengths.data = gpu_take(none, sizeof none);
  emx_kv_batch_init(&w->batch);
  w->batch.batch = 2;
  w->batch.block_table = &w->table;
  w->batch.seq_lens = &w->lengths;
  w->batch.max_len = START + STEPS;
  float *x = case_take(sizeof(float) * 2 * 2 * START * DIM);
  emx_tensor k = emx_tensor_view(x, EMX_F32, 4, (int64_t[4]){2, 2, START, DIM});
  emxi_normals(1, 1, x, 2 * 2 * START * DIM);
  emx_tensor gk = gpu_tensor(&k);
  emxi_normals(1, 2, x, 2 * 2 * START * DIM);
  emx_tensor gv = gpu_tensor(&k);
  emx_tensor counts = gpu_tensor(&n); /* ragged */
  OK(emx_kv_append(gpu, w->kv, &w->batch, &gk, &gv, &counts));
  OK(emx_ctx_sync(gpu));
  gpu_fetch(x, gk.data, 16);
  gpu_free(gk.data), gpu_free(gv.data), gpu_free(counts.data);
  OK(gpu->backend->memory_copy(gpu, w->lengths.data, w->host_lengths, sizeof w->host_lengths));
  emx_tensor q = emx_tensor_view(x, EMX_F32, 4, (int64_t[4]){2, HEADS, 1, DIM}),
             new = emx_tensor_view(x, EMX_F32, 4, (int64_t[4]){2, 2, 1, DIM});
  w->q = gpu_tensor(&q);
  w->o = gpu_tensor(&q);
  w->k = gpu_tensor(&new);
  w->v = gpu_tensor(&new);
  free(x);
  emx_decode_io_init(&w->io);
  w->io.alpha = alpha;
  w->io.q = &w->q;
  w->io.o = &w->o;
  w->io.k_new = &w->k;
  w->io.v_new = &w->v;
  w->reports = gpu_take(NULL, 2 * HEADS * sizeof(emx_report));
  w->io.reports = w->reports;
  OK(emx_decode_workspace_size(gpu, w->kv, &w->select, &w->io, w->batch.max_len, &w->bytes));
  w->work = gpu_take(NULL, w->bytes);
}
static emx_status growing_call(growing *w) { return emx_decode(gpu, w->kv, &w->batch, &w->select, &w->io, w->work, w->bytes); }
/* New query, key and value of the step before the call; the output and the longer lengths after it. */
static void growing_feed(growing *w, int step) {
  float x[2 * HEADS * DIM];
  emxi_normals(2, (uint64_t)step, x, 2 * HEADS * DIM);
  OK(gpu->backend->memory_copy(gpu, w->q.data, x, sizeof x));
  OK(gpu->backend->memory_copy(gpu, w->k.data, x, 2 * 2 * DIM * sizeof(float)));
  OK(gpu->backend->memory_copy(gpu, w->v.data, x, 2 * 2 * DIM * sizeof(float)));
}
enum { TAKEN = 2 * HEADS * (DIM + (int)(sizeof(emx_report) / sizeof(float))) }; /* the output, then the reports */
static void growing_take(growing *w, float *out) {
  OK(emx_ctx_sync(gpu));
  gpu_fetch(out, w->o.data, 2 * HEADS * DIM * sizeof(float));
  gpu_fetch(out + 2 * HEADS * DIM, w->reports, 2 * HEADS * sizeof(emx_report));
  for (int b = 0; b < 2; b++) w->host_lengths[b]++;
  OK(gpu->backend->memory_copy(gpu, w->lengths.data, w->host_lengths, sizeof w->host_lengths));
}
static void growing_close(growing *w) {
  emx_kv_destroy(w->kv);
  gpu_free(w->table.data), gpu_free(w->lengths.data), gpu_free(w->q.data), gpu_free(w->o.data), gpu_free(w->k.data),
      gpu_free(w->v.data), gpu_free(w->work), gpu_free(w->reports);
}

/* CERTIFIED: which keys it reads depends on timing, so sums of floats may differ in their last bits; support and certificate not. */
static int64_t same_but_bits(const float *x, const float *y) {
  int64_t ladders = 0;
  for (int i = 0; i < 2 * HEADS * DIM; i++) assert_true(fabsf(x[i] - y[i]) <= 1e-6f);
  const emx_report *a = (const emx_report *)(x + 2 * HEADS * DIM), *b = (const emx_report *)(y + 2 * HEADS * DIM);
  for (int r = 0; r < 2 * HEADS; r++) {
    assert_true(a[r].support == b[r].support && fabsf(a[r].tau - b[r].tau) <= 1e-6f * fmaxf(1, fabsf(a[r].tau)));
    assert_true(a[r].flags == EMX_REPORT_CERTIFIED && b[r].flags == EMX_REPORT_CERTIFIED && b[r].delta_bound == 0);
    ladders += a[r].path == EMX_PATH_LADDER;
  }
  return ladders;
}

static void test_graph(void **state) {
  (void)state;
  static const struct {
    double alpha;
    int32_t kind;
    double max_delta;
  } ways[] = {{1, EMX_SELECT_ALL, 0},         {1.5, EMX_SELECT_ALL, 0},       {1.5, EMX_SELECT_TOPK, 0},
              {1.5, EMX_SELECT_GAUSSIAN, 0},  {1, EMX_SELECT_TOPK, 0},        {2, EMX_SELECT_ALL, 0},
              {2, EMX_SELECT_CERTIFIED, 0},   {1.5, EMX_SELECT_CERTIFIED, 0}, {1.5, EMX_SELECT_CERTIFIED, 0.05},
              {1, EMX_SELECT_CERTIFIED, 0.05}};
  static float all[STEPS][TAKEN]; /* of alpha 2 */
  const int64_t usual = emxi_cuda_certified_short;
  int64_t ladders = 0;
  emxi_cuda_certified_short = 1;
  for (size_t a = 0; a < sizeof ways / sizeof *ways; a++) {
    static float eager[STEPS][TAKEN], replayed[TAKEN];
    growing w;
    growing_open(&w, ways[a].alpha, ways[a].kind, ways[a].max_delta);
    for (int i = 0; i < STEPS; i++) {
      growing_feed(&w, i);
      OK(growing_call(&w));
      growing_take(&w, eager[i]);
      for (int x = 0; x < 2 * HEADS * DIM; x++) assert_true(isfinite(eager[i][x]));
      if (ways[a].alpha == 2 && ways[a].kind == EMX_SELECT_CERTIFIED) ladders += same_but_bits(eager[i], all[i]);
    }
    growing_close(&w);
    if (ways[a].alpha == 2 && ways[a].kind == EMX_SELECT_ALL) memcpy(all, eager, sizeof all);

    growing_open(&w, ways[a].alpha, ways[a].kind, ways[a].max_delta);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    OK(emx_ctx_set_stream(gpu, stream));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    OK(growing_call(&w));
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < STEPS; i++) {
      growing_feed(&w, i);
      CUDA(cudaGraphLaunch(exec, stream));
      growing_take(&w, replayed);
      if (ways[a].kind == EMX_SELECT_CERTIFIED && ways[a].max_delta == 0)
        ladders += same_but_bits(replayed, eager[i]);
      else
        assert_memory_equal(replayed, eager[i], sizeof replayed);
    }
    /* one token more than max_len: nothing is written past the end, and the next synchronisation says so */
    CUDA(cudaGraphLaunch(exec, stream));
    fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "max_len");
    OK(emx_ctx_sync(gpu));
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    OK(emx_ctx_set_stream(gpu, NULL));
    CUDA(cudaStreamDestroy(stream));
    growing_close(&w);
  }
  emxi_cuda_certified_short = usual;
  assert_true(ladders > 0);
}

/* What kernels find wrong in device memory comes out at the next synchronisation, once. */
static void test_faults(void **state) {
  (void)state;
  growing w;
  growing_open(&w, 1.5, EMX_SELECT_ALL, 0);
  const int32_t absent = -1, far = 1 << 30, negative[2] = {-7, 5};
  OK(gpu->backend->memory_copy(gpu, (int32_t *)w.table.data + 3, &absent, sizeof absent));
  OK(growing_call(&w));
  fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "block_table[0][3] = -1");
  OK(emx_ctx_sync(gpu));
  OK(gpu->backend->memory_copy(gpu, (int32_t *)w.table.data + 3, &far, sizeof far));
  OK(growing_call(&w));
  fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "no page of the pool");
  OK(gpu->backend->memory_copy(gpu, w.lengths.data, negative, sizeof negative));
  OK(growing_call(&w));
  fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "seq_lens[0] = -7");
  growing_close(&w);
}

/* Two contexts on two streams at the same time. */
static void test_streams(void **state) {
  (void)state;
  emx_ctx *const first = gpu;
  emx_ctx *second = NULL;
  emx_ctx_opts o;
  cudaStream_t stream;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  emx_ctx_opts_init(&o);
  o.device = EMX_DEVICE_CUDA;
  o.stream = stream;
  OK(emx_ctx_create(&o, &second));
  growing w[2];
  float out[2][TAKEN];
  growing_open(&w[0], 1.5, EMX_SELECT_GAUSSIAN, 0);
  gpu = second;
  growing_open(&w[1], 1.5, EMX_SELECT_GAUSSIAN, 0);
  for (int i = 0; i < 8; i++) {
    gpu = first;
    growing_feed(&w[0], i);
    OK(growing_call(&w[0]));
    gpu = second;
    growing_feed(&w[1], i);
    OK(growing_call(&w[1]));
    growing_take(&w[1], out[1]);
    gpu = first;
    growing_take(&w[0], out[0]);
    assert_memory_equal(out[0], out[1], sizeof out[0]);
  }
  growing_close(&w[0]);
  gpu = second;
  growing_close(&w[1]);
  gpu = first;
  emx_ctx_destroy(second);
  CUDA(cudaStreamDestroy(stream));
}

/* A million tokens, 32 KV heads of 64: 2^31 elements. All keys are zero but one a head, whose value is the answer. */
static void test_huge(void **state) {
  (void)state;
  enum { N = 1 << 20, G = 32, D = 64, P = 64 };
  const size_t bytes = (size_t)N * G * D * 2;
  size_t available, total;
  CUDA(cudaMemGetInfo(&available, &total));
  if (available < 2 * bytes + ((size_t)1 << 30)) skip();
  uint16_t *pool[2];
  for (int i = 0; i < 2; i++) {
    CUDA(cudaMalloc((void **)&pool[i], bytes));
    CUDA(cudaMemset(pool[i], 0, bytes));
  }
  int64_t shape[4] = {N / P, G, P, D};
  emx_tensor k = emx_tensor_view(pool[0], EMX_F16, 4, shape), v = emx_tensor_view(pool[1], EMX_F16, 4, shape);
  k.device = v.device = EMX_DEVICE_CUDA;
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.dtype = EMX_F16;
  o.kv_heads = G;
  o.head_dim = D;
  o.page_size = P;
  o.max_seqs = 1;
  o.max_pages = N / P;
  o.k_pool = &k;
  o.v_pool = &v;
  emx_kv *kv;
  OK(emx_kv_create(gpu, &o, &kv));
  int32_t *table = case_take(sizeof(int32_t) * N / P), length = N;
  for (int i = 0; i < N / P; i++) table[i] = N / P - 1 - i;
  float q[G * D] = {0}, out[G * D];
  for (int g = 0; g < G; g++) {
    const int64_t at = N - 1 - (int64_t)g * 33331; /* from the last token on */
    const int64_t row = (table[at / P] * (int64_t)G + g) * P + at % P;
    uint16_t key[D] = {0}, value[D];
    key[g] = emxi_f32_to_f16(40); /* score 40 / 8 = 5, all others 0 */
    q[g * D + g] = 1;
    for (int d = 0; d < D; d++) value[d] = emxi_f32_to_f16((float)(g + d));
    CUDA(cudaMemcpy(pool[0] + row * D, key, sizeof key, cudaMemcpyDefault));
    CUDA(cudaMemcpy(pool[1] + row * D, value, sizeof value, cudaMemcpyDefault));
  }
  emx_tensor ht = emx_tensor_view(table, EMX_I32, 2, (int64_t[2]){1, N / P}),
             hl = emx_tensor_view(&length, EMX_I32, 1, (int64_t[1]){1}),
             hq = emx_tensor_view(q, EMX_F32, 4, (int64_t[4]){1, G, 1, D});
  emx_tensor tt = gpu_tensor(&ht), tl = gpu_tensor(&hl), tq = gpu_tensor(&hq), to = gpu_tensor(&hq);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.block_table = &tt;
  batch.seq_lens = &tl;
  batch.max_len = N;
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.q = &tq;
  io.o = &to;
  const emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
  size_t need;
  OK(emx_decode_workspace_size(gpu, kv, &all, &io, N, &need));
  void *work = gpu_take(NULL, need);
  OK(emx_decode(gpu, kv, &batch, &all, &io, work, need));
  OK(emx_ctx_sync(gpu));
  gpu_fetch(out, to.data, sizeof out);
  for (int g = 0; g < G; g++)
    for (int d = 0; d < D; d++)
      if (out[g * D + d] != (float)(g + d)) fail_msg("head %d element %d: %g", g, d, (double)out[g * D + d]);
  gpu_free(tt.data), gpu_free(tl.data), gpu_free(tq.data), gpu_free(to.data), gpu_free(work);
  emx_kv_destroy(kv);
  for (int i = 0; i < 2; i++) CUDA(cudaFree(pool[i]));
  free(table);
}

static void test_refusals(void **state) {
  (void)state;
  decode_case c = {.G = 1, .D = 64, .dtype = EMX_F16, .len = {100}};
  gpu_case g;
  gpu_open(&g, &c);
  emx_select_desc s = case_desc(EMX_SELECT_ALL, 0);
  size_t bytes;
  OK(emx_decode_workspace_size(gpu, g.kv, &s, &g.io, 100, &bytes));
  char *work = gpu_take(NULL, bytes);
  g.io.q = &c.tq;
  fails(emx_decode(gpu, g.kv, &g.batch, &s, &g.io, work, bytes), EMX_ERR_INVALID, "device");
  g.io.q = &g.q;
  fails(emx_decode(gpu, g.kv, &g.batch, &s, &g.io, work, bytes - 1), EMX_ERR_WORKSPACE, "workspace");
  fails(emx_decode(cpu, g.kv, &g.batch, &s, &g.io, work, bytes), EMX_ERR_INVALID, "context");
  s.kind = EMX_SELECT_CERTIFIED;
  assert_int_not_equal(emx_decode(gpu, g.kv, &g.batch, &s, &g.io, work, bytes), EMX_OK);
  s.kind = EMX_SELECT_TOPK;
  fails(emx_decode(gpu, g.kv, &g.batch, &s, &g.io, work, bytes), EMX_ERR_STATE, "MINMAX");
  s.kind = EMX_SELECT_GAUSSIAN;
  fails(emx_decode(gpu, g.kv, &g.batch, &s, &g.io, work, bytes), EMX_ERR_STATE, "MOMENTS");
  s.kind = EMX_SELECT_ALL;
  g.io.support_count = &g.q;
  fails(emx_decode(gpu, g.kv, &g.batch, &s, &g.io, work, bytes), EMX_ERR_UNSUPPORTED, "supports");
  g.io.support_count = NULL;
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.kv_heads = 1;
  o.head_dim = 64;
  o.max_pages = 4;
  o.summaries = EMX_SUMMARY_SKETCH | EMX_SUMMARY_RESIDUAL;
  emx_kv *kv;
  fails(emx_kv_create(gpu, &o, &kv), EMX_ERR_UNSUPPORTED, "residual");
  o.summaries = 0;
  o.max_pages = (int64_t)1 << 30; /* terabytes */
  fails(emx_kv_create(gpu, &o, &kv), EMX_ERR_NOMEM, "bytes");
  /* a graph of the library's own sequences would not grow */
  cudaStream_t stream;
  cudaGraph_t graph;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  OK(emx_ctx_set_stream(gpu, stream));
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  fails(emx_decode(gpu, g.kv, &g.batch, &s, &g.io, work, bytes), EMX_ERR_UNSUPPORTED, "block_table");
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphDestroy(graph));
  OK(emx_ctx_set_stream(gpu, NULL));
  CUDA(cudaStreamDestroy(stream));
  emx_ctx_opts options;
  emx_ctx *ctx;
  emx_ctx_opts_init(&options);
  options.device = EMX_DEVICE_CUDA;
  options.device_index = 99;
  fails(emx_ctx_create(&options, &ctx), EMX_ERR_INVALID, "99");
  gpu_free(work);
  gpu_close(&g);
}

/* ---- the cache: the same operations on both devices leave the same bits in the same pages */

static void expect_same(const decode_case *c, emx_kv *on_cpu, emx_kv *on_gpu, int32_t seq) {
  const int32_t *pages[2];
  int64_t n[2], length[2];
  emx_tensor k[2], v[2];
  emx_kv *const kv[2] = {on_cpu, on_gpu};
  for (int i = 0; i < 2; i++) {
    OK(emx_seq_length(kv[i], seq, &length[i]));
    OK(emx_seq_block_table(kv[i], seq, &pages[i], &n[i]));
    OK(emx_kv_pool_view(kv[i], &k[i], &v[i]));
  }
  assert_true(length[0] == length[1] && n[0] == n[1] && !memcmp(pages[0], pages[1], sizeof(int32_t) * (size_t)n[0]));
  const size_t bytes = gpu_bytes(&k[0]), row = (size_t)c->D * emx_dtype_size(c->dtype);
  char *copy = case_take(bytes);
  for (int value = 0; value < 2; value++) {
    const char *host = value ? v[0].data : k[0].data;
    gpu_fetch(copy, value ? v[1].data : k[1].data, bytes);
    for (int64_t j = 0; j < length[0]; j++)
      for (int g = 0; g < c->G; g++) {
        const int64_t token = j % c->P * k[0].stride[c->layout == EMX_LAYOUT_BHND ? 2 : 1],
                      head = g * k[0].stride[c->layout == EMX_LAYOUT_BHND ? 1 : 2];
        const size_t at = (size_t)(pages[0][j / c->P] * k[0].stride[0] + head + token) * emx_dtype_size(c->dtype);
        assert_memory_equal(copy + at, host + at, row);
      }
  }
  free(copy);
}
static void test_cache(void **state) {
  (void)state;
  for (int i = 0; i < 6; i++) {
    decode_case c = {
        .G = 2, .H = 4, .D = i % 2 ? 80 : 33, .P = sizes[i % 3], .dtype = dtypes[i % 3], .layout = i % 2, .len = {200}};
    gpu_case g;
    gpu_open(&g, &c);
    expect_same(&c, c.kv, g.kv, 0);
    int32_t child[2];
    emx_kv *const kv[2] = {c.kv, g.kv};
    emx_ctx *const where[2] = {cpu, gpu};
    for (int d = 0; d < 2; d++) {
      OK(emx_seq_fork(kv[d], 0, &child[d]));
      OK(emx_seq_truncate(kv[d], child[d], 150)); /* inside a shared page: the next append copies it */
    }
    assert_int_equal(child[0], child[1]);
    gpu_append(&c, g.kv, child[1], 0, 10, 7);
    /* the CPU's by its own tensors */
    const int64_t shape[4] = {1, c.layout == EMX_LAYOUT_BHND ? 2 : 7, c.layout == EMX_LAYOUT_BHND ? 7 : 2, c.D};
    float *x = case_take(sizeof(float) * (size_t)(2 * 2 * 7 * c.D)), *y = x + 2 * 7 * c.D;
    for (int h = 0; h < 2; h++)
      for (int t = 0; t < 7; t++) {
        const int64_t to = c.layout == EMX_LAYOUT_BHND ? (h * 7 + t) * c.D : (t * 2 + h) * c.D;
        memcpy(x + to, case_key(&c, 0, h, 10 + t), sizeof(float) * (size_t)c.D);
        memcpy(y + to, case_value(&c, 0, h, 10 + t), sizeof(float) * (size_t)c.D);
      }
    emx_tensor k = emx_tensor_view(x, EMX_F32, 4, shape), v = emx_tensor_view(y, EMX_F32, 4, shape);
    emx_kv_batch one;
    emx_kv_batch_init(&one);
    one.batch = 1;
    one.seqs = &child[0];
    OK(emx_kv_append(where[0], c.kv, &one, &k, &v, NULL));
    expect_same(&c, c.kv, g.kv, 0);
    expect_same(&c, c.kv, g.kv, child[0]);
    gpu_decode(&g); /* the parent is what it was */
    check(&c);
    /* the child's decode: its table has a page of its own in the middle */
    for (int h = 0; h < 2; h++)
      for (int t = 0; t < 7; t++) {
        memcpy(case_key(&c, 0, h, 150 + t), case_key(&c, 0, h, 10 + t), sizeof(float) * (size_t)c.D);
        memcpy(case_value(&c, 0, h, 150 + t), case_value(&c, 0, h, 10 + t), sizeof(float) * (size_t)c.D);
      }
    c.len[0] = 157;
    g.seqs[0] = child[1];
    gpu_decode(&g);
    check(&c);
    free(x);
    gpu_close(&g);
  }
}

/* An argument is a filter of test names, as cmocka takes it. */
int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]);
  const int missing = gpu_missing();
  if (missing) return missing;
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_cache),         cmocka_unit_test(test_lengths),      cmocka_unit_test(test_all),
      cmocka_unit_test(test_fast_shapes),   cmocka_unit_test(test_flat),         cmocka_unit_test(test_flat_rows),
      cmocka_unit_test(test_low_alphas),    cmocka_unit_test(test_query_tokens), cmocka_unit_test(test_odd_data),
      cmocka_unit_test(test_deterministic), cmocka_unit_test(test_bulk),         cmocka_unit_test(test_graph),
      cmocka_unit_test(test_faults),        cmocka_unit_test(test_streams),      cmocka_unit_test(test_refusals),
      cmocka_unit_test(test_huge)};
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  emx_ctx_destroy(gpu);
  emx_ctx_destroy(cpu);
  return failed;
}
