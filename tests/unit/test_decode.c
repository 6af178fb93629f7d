/* Decode against the float64 oracle, reports, policies for odd data, refusals. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "check.h"
#include "decode_case.h"
#include "kv/kv.h"
#include "one_context.h"

/* Every row of an ALL decode against the dense oracle. Scores carry float rounding, about 1e-6 of their size, and so does tau; a
 * weight is 1/(alpha-1)-Lipschitz in them at worst where the support is large. */
static void check_all(decode_case *c) {
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
            fail_msg("b %d h %d s %d d %d: %g, oracle %g (alpha %g data %d)", b, h, t, d, got, o[d], c->alpha, c->data);
        }
        if (c->alpha > 1 && n) assert_true(fabs(r->tau - tau) <= 1e-5 * m);
        if (c->alpha == 1) assert_true(isnan(r->tau));
        if (!n) assert_true(r->support == 0 && (c->alpha == 1 || r->tau == -INFINITY));
        /* tokens within rounding of the threshold may fall on either side */
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
        if (c->alpha > 1) assert_int_equal(r->bytes_v, r->support * line);
        if (c->layout == EMX_LAYOUT_BNHD) assert_int_equal(r->bytes_k, n * line);
      }
  free(s);
  free(p);
}

static void test_all(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.05, 1.25, 4. / 3, 1.5, 1.75, 2, 2.5, 4};
  static const int32_t dims[] = {16, 32, 64, 80, 96, 128, 256}, dtypes[] = {EMX_F32, EMX_F16, EMX_BF16}, sizes[] = {16, 32, 64};
  for (int i = 0; i < 36; i++) {
    decode_case c = {.B = 2,
                     .G = 1 + i % 2,
                     .H = (1 + i % 2) * (1 + i % 5),
                     .D = dims[i % 7],
                     .P = sizes[i % 3],
                     .dtype = dtypes[i / 2 % 3],
                     .layout = i % 2,
                     .len = {1 + i * 17, 300},
                     .alpha = alphas[i % 9],
                     .alibi = i % 4 == 3,
                     .in_decode = i % 3 == 0,
                     .data = i % DATA_HUGE,
                     .seed = (uint64_t)i,
                     .q_dtype = dtypes[i % 3],
                     .o_dtype = i % 2 ? EMX_F32 : dtypes[i % 3]};
    emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
    case_open(&c, ctx);
    CASE_OK(case_decode(&c, &all));
    check_all(&c);
    int64_t length;
    CASE_OK(emx_seq_length(c.kv, c.seqs[0], &length));
    assert_int_equal(length, c.len[0]);
    case_close(&c);
  }
}

/* Lengths around page ends; an empty sequence next to a full one. */
static void test_lengths(void **state) {
  (void)state;
  static const int64_t lengths[] = {0, 1, 15, 16, 17, 32, 33, 255, 256, 257, 513};
  for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
    for (int a = 0; a < 2; a++) {
      decode_case c = {.B = 2, .G = 2, .H = 4, .D = 16, .len = {lengths[i], 40}, .alpha = a ? 1.5 : 1, .seed = i};
      emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
      case_open(&c, ctx);
      memset(c.o_data, 0xff, sizeof(float) * (size_t)(c.B * c.H * c.D));
      CASE_OK(case_decode(&c, &all));
      check_all(&c);
      if (lengths[i] == 1) /* one token: its value, exactly */
        for (int d = 0; d < c.D; d++) assert_true(case_out(&c, 0, 1, 0, d) == (double)case_value(&c, 0, 0, 0)[d]);
      case_close(&c);
    }
}

/* Several query tokens: causal, also where the first of them see nothing; more rows than one work item takes. */
static void test_query_tokens(void **state) {
  (void)state;
  for (int i = 0; i < 4; i++) {
    decode_case c = {.B = 2,
                     .G = 1 + i / 2,
                     .H = 4,
                     .S = 3 + 7 * i,
                     .D = 48,
                     .layout = i % 2,
                     .len = {i == 1 ? 4 : 290, 3 + 7 * i + 30},
                     .alpha = i % 2 ? 1 : 1.5,
                     .alibi = i == 2,
                     .in_decode = i > 1,
                     .seed = (uint64_t)i};
    emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
    case_open(&c, ctx);
    CASE_OK(case_decode(&c, &all));
    check_all(&c);
    case_close(&c);
  }
}

/* Dense problems with known answers: ties, one dominant token, tiny and huge scores. */
static void test_known(void **state) {
  (void)state;
  static const double alphas[] = {4. / 3, 1.5, 1.75, 2, 3};
  for (size_t a = 0; a < 5; a++)
    for (int kind = 0; kind < 4; kind++) {
      decode_case c = {.D = 16, .len = {50}, .alpha = alphas[a], .scale = 1, .data = DATA_EQUAL};
      emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
      case_open(&c, ctx);
      /* the last key is changed in place: score e0 * q0 */
      emx_tensor k, v;
      CASE_OK(emx_kv_pool_view(c.kv, &k, &v));
      const int32_t *pages;
      int64_t n;
      CASE_OK(emx_seq_block_table(c.kv, c.seqs[0], &pages, &n));
      float *q = c.q_data;
      memset(q, 0, sizeof(float) * 16);
      q[0] = 1;
      for (int64_t j = 0; j < 50; j++) {
        float *key = (float *)k.data + pages[j / 16] * k.stride[0] + j % 16 * k.stride[2];
        memset(key, 0, sizeof(float) * 16);
        switch (kind) {
          case 0: key[0] = j == 7 || j == 44 ? 10 : 0; break;         /* two equal maxima, the rest far below */
          case 1: key[0] = j == 20 ? 5 : 0; break;                    /* one dominant */
          case 2: key[0] = -3e6f; break;                              /* all equal, far below zero */
          default: key[0] = j == 3 || j == 4 ? 60000 : -60000; break; /* the ends of f16 */
        }
      }
      CASE_OK(case_decode(&c, &all));
      const emx_report *r = &c.reports[0];
      const double al = alphas[a],
                   m = kind == 0   ? 10
                       : kind == 1 ? 5
                       : kind == 2 ? -3e6
                                   : 60000,
                   count = kind == 1   ? 1
                           : kind == 2 ? 50
                                       : 2;
      assert_int_equal(r->support, count);
      assert_true(fabs(r->tau - ((al - 1) * m - pow(count, 1 - al))) <= 1e-6 * fmax(1, fabs(m)));
      for (int d = 0; d < 16; d++) {
        double want = 0;
        for (int64_t j = 0; j < 50; j++)
          if (kind == 2 || (kind == 1 ? j == 20 : kind == 0 ? j == 7 || j == 44 : j == 3 || j == 4))
            want += (double)case_value(&c, 0, 0, j)[d] / count;
        assert_true(fabs(case_out(&c, 0, 0, 0, d) - want) < 2e-6);
      }
      case_close(&c);
    }
}

static float *pool_row(const decode_case *c, bool value, int b, int g, int64_t j) { /* f32, BHND */
  emx_tensor k, v;
  const int32_t *pages;
  int64_t n;
  CASE_OK(emx_kv_pool_view(c->kv, &k, &v));
  CASE_OK(emx_seq_block_table(c->kv, c->seqs[b], &pages, &n));
  if (value) k = v;
  return (float *)k.data + pages[j / c->P] * k.stride[0] + g * k.stride[1] + j % c->P * k.stride[2];
}

/* NaN and infinities: in q, in a key, in the value of a token without weight; masks. */
static void test_odd_data(void **state) {
  (void)state;
  for (int a = 0; a < 3; a++) {
    const double alpha = a == 0 ? 1 : a == 1 ? 1.5 : 1.25;
    emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
    for (int kind = 0; kind < 7; kind++) {
      decode_case c = {.B = 1, .G = 2, .H = 4, .D = 32, .len = {300}, .alpha = alpha, .seed = 3};
      case_open(&c, ctx);
      float *q = c.q_data; /* [H,D] */
      bool nan_group0 = false, nan_row1 = false;
      switch (kind) {
        case 0:
          q[32 + 5] = NAN;
          nan_row1 = true;
          break;
        case 1:
          q[32 + 5] = INFINITY;
          nan_row1 = true;
          break;
        case 2:
          pool_row(&c, false, 0, 0, 77)[3] = NAN;
          nan_group0 = true;
          break;
        case 3: /* score +inf for row 0, -inf for row 1 */
          q[4] = 1, q[32 + 4] = -1;
          pool_row(&c, false, 0, 0, 77)[4] = INFINITY;
          break;
        case 4: /* every score of the group is NaN */
          for (int64_t j = 0; j < 300; j++) pool_row(&c, false, 0, 0, j)[3] = NAN;
          nan_group0 = true;
          break;
        case 5: /* a value without weight: the key is pushed far down for both rows */
          for (int d = 0; d < 32; d++)
            pool_row(&c, false, 0, 0, 100)[d] = -1e4f * (q[d] + q[32 + d]), pool_row(&c, true, 0, 0, 100)[d] = NAN;
          break;
        default: /* all masked */
          q[0] = q[32] = 1;
          for (int64_t j = 0; j < 300; j++) pool_row(&c, false, 0, 0, j)[0] = -INFINITY;
      }
      CASE_OK(case_decode(&c, &all));
      for (int h = 0; h < 4; h++) {
        const emx_report *r = &c.reports[h];
        const bool nan = (h < 2 && nan_group0) || (h == 1 && nan_row1) || (kind == 3 && h == 0);
        for (int d = 0; d < 32; d++) assert_int_equal(isnan(case_out(&c, 0, h, 0, d)) != 0, nan);
        assert_int_equal(r->flags, nan ? EMX_REPORT_NONFINITE : EMX_REPORT_CERTIFIED);
        if (nan) assert_true(r->support == 0 && r->delta_bound == 1 && isnan(r->mass));
        if (kind == 6 && h < 2) {
          assert_true(r->support == 0 && r->mass == 0 && (alpha == 1 || r->tau == -INFINITY));
          for (int d = 0; d < 32; d++) assert_true(case_out(&c, 0, h, 0, d) == 0);
        }
      }
      case_close(&c);
    }
  }
}

/* Weights that are positive but too small for a float: their values are not touched either. */
static void test_vanishing_weight(void **state) {
  (void)state;
  decode_case c = {.D = 16, .len = {40}, .alpha = 1.05, .scale = 1};
  emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
  case_open(&c, ctx);
  memset(c.q_data, 0, sizeof(float) * 16);
  *(float *)c.q_data = 1;
  for (int64_t j = 0; j < 40; j++) { /* one at 0, one with (1 - .05 * 19.98)^20 = 1e-60, the others out of reach */
    float *key = pool_row(&c, false, 0, 0, j);
    memset(key, 0, sizeof(float) * 16);
    key[0] = j == 9 ? 0 : j == 30 ? -19.98f : -50;
    if (j != 9) pool_row(&c, true, 0, 0, j)[2] = NAN;
  }
  CASE_OK(case_decode(&c, &all));
  assert_int_equal(c.reports[0].support, 1);
  for (int d = 0; d < 16; d++) assert_true(case_out(&c, 0, 0, 0, d) == (double)case_value(&c, 0, 0, 9)[d]);
  case_close(&c);
}

/* The same bits from either layout, any page size, any number of threads, alone or in a batch, and for a head alone or in a
 * group. */
static void test_same_bits(void **state) {
  (void)state;
  static const double alphas[] = {1, 1.25, 1.5, 2, 3};
  enum { D = 80, N = 700 };
  for (size_t a = 0; a < 5; a++) {
    float want[4 * D];
    for (int v = 0; v < 6; v++) {
      emx_ctx_opts co;
      emx_ctx_opts_init(&co);
      co.threads = 1 + v % 2 * 2;
      emx_ctx *own;
      CASE_OK(emx_ctx_create(&co, &own));
      decode_case c = {.B = v == 5 ? 3 : 1,
                       .G = 1,
                       .H = 4,
                       .D = D,
                       .P = 16 << v % 3,
                       .layout = v % 2,
                       .dtype = EMX_BF16,
                       .len = {N, 20, 300},
                       .alpha = alphas[a],
                       .seed = 11};
      emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
      case_open(&c, own);
      if (v == 0) memcpy(want, c.q, sizeof want);
      for (int i = 0; i < 4 * D; i++) /* the first sequence has the same queries whatever the shape */
        emxi_store(c.q_data, EMX_F32, case_at(&c, 4, 1, c.layout, 0, i / D, 0) + i % D, (double)c.q[i]);
      CASE_OK(case_decode(&c, &all));
      for (int i = 0; i < 4 * D; i++) {
        const float got = (float)case_out(&c, 0, i / D, 0, i % D);
        if (v == 0)
          want[i] = got;
        else if (memcmp(&want[i], &got, 4))
          fail_msg("variant %d element %d: %.9g, first %.9g", v, i, got, want[i]);
      }
      case_close(&c);
      emx_ctx_destroy(own);
    }
  }
}

/* More chunks than are worked on at a time, sequences of very different lengths: each row as if it were alone. */
static void test_many_chunks(void **state) {
  (void)state;
  for (int a = 0; a < 2; a++) {
    decode_case c = {.B = 4,
                     .G = 2,
                     .H = 4,
                     .D = 16,
                     .dtype = EMX_F16,
                     .len = {12000, 0, 13001, 9000},
                     .alpha = a ? 1.5 : 1,
                     .seed = 21,
                     .alibi = true,
                     .in_decode = false};
    emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
    case_open(&c, ctx);
    CASE_OK(case_decode(&c, &all));
    check_all(&c);
    float together[16 * 16];
    for (int r = 0; r < 16; r++)
      for (int d = 0; d < 16; d++) together[r * 16 + d] = (float)case_out(&c, r / 4, r % 4, 0, d);
    for (int b = 0; b < 4; b++) {
      int64_t shape[4] = {1, 4, 1, 16};
      float o[4 * 16];
      emx_tensor q = emx_tensor_view((float *)c.q_data + b * 64, EMX_F32, 4, shape), to = emx_tensor_view(o, EMX_F32, 4, shape);
      emx_decode_io io = c.io;
      io.q = &q;
      io.o = &to;
      io.pages = NULL;
      io.reports = NULL;
      emx_kv_batch one = c.batch;
      one.batch = 1;
      one.seqs = &c.seqs[b];
      CASE_OK(emx_decode(ctx, c.kv, &one, &all, &io, (char *)c.workspace + 1, c.workspace_bytes));
      assert_memory_equal(o, together + b * 64, sizeof o);
    }
    case_close(&c);
  }
}

static void test_callers_tables(void **state) {
  (void)state;
  decode_case c = {.B = 2, .G = 2, .H = 4, .D = 32, .len = {100, 37}, .seed = 5, .in_decode = true};
  emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
  case_open(&c, ctx);
  int32_t table[2][8], lens[2] = {99, 36};
  for (int b = 0; b < 2; b++) {
    const int32_t *pages;
    int64_t n;
    CASE_OK(emx_seq_block_table(c.kv, c.seqs[b], &pages, &n));
    for (int i = 0; i < 8; i++) table[b][i] = i < n ? pages[i] : -1;
  }
  c.batch.seqs = NULL;
  const emx_tensor tt = emx_tensor_view(table, EMX_I32, 2, (int64_t[]){2, 8}),
                   tl = emx_tensor_view(lens, EMX_I32, 1, (int64_t[]){2});
  c.batch.block_table = &tt;
  c.batch.seq_lens = &tl;
  CASE_OK(case_decode(&c, &all));
  check_all(&c);
  table[1][1] = 1000;
  fails(case_decode(&c, &all), EMX_ERR_INVALID, "block_table[1][1]");
  case_close(&c);
}

static void test_refusals(void **state) {
  (void)state;
  decode_case c = {.B = 2, .G = 2, .H = 4, .D = 32, .len = {64, 37}, .seed = 5, .in_decode = true};
  emx_select_desc all = case_desc(EMX_SELECT_ALL, 0), s;
  case_open(&c, ctx);
  emx_decode_io io = c.io;
  int64_t length;
  s = all, s.kind = EMX_SELECT_CERTIFIED;
  size_t bytes;
  fails(emx_decode_workspace_size(ctx, c.kv, &s, &c.io, 64, &bytes), EMX_ERR_STATE, "EMX_SUMMARY_SKETCH");
  s.kind = 9;
  fails(emx_decode_workspace_size(ctx, c.kv, &s, &c.io, 64, &bytes), EMX_ERR_INVALID, "selector 9");
  fails(emx_decode_workspace_size(ctx, c.kv, &all, &c.io, -1, &bytes), EMX_ERR_INVALID, "max_len");
  s = all, s.tau_mode = EMX_TAU_FIXED;
  fails(emx_decode_workspace_size(ctx, c.kv, &s, &c.io, 64, &bytes), EMX_ERR_INVALID, "GAUSSIAN");
  s = case_desc(EMX_SELECT_TOPK, -1);
  fails(emx_decode_workspace_size(ctx, c.kv, &s, &c.io, 64, &bytes), EMX_ERR_INVALID, "budget");
  s = case_desc(EMX_SELECT_GAUSSIAN, 0), s.max_quantile = 1;
  fails(emx_decode_workspace_size(ctx, c.kv, &s, &c.io, 64, &bytes), EMX_ERR_INVALID, "max_quantile");
  c.io.alpha = 1;
  s.max_quantile = .9f;
  fails(emx_decode_workspace_size(ctx, c.kv, &s, &c.io, 64, &bytes), EMX_ERR_UNSUPPORTED, "alpha > 1");
  c.io.alpha = .5;
  fails(emx_decode_workspace_size(ctx, c.kv, &all, &c.io, 64, &bytes), EMX_ERR_INVALID, "alpha");
  c.io = io, c.io.scale = NAN;
  fails(emx_decode_workspace_size(ctx, c.kv, &all, &c.io, 64, &bytes), EMX_ERR_INVALID, "scale");

  /* a workspace that is one byte short, and nothing has been appended */
  c.io = io;
  void *w = case_workspace(&c, &all);
  fails(emx_decode(ctx, c.kv, &c.batch, &all, &c.io, w, c.workspace_bytes - 1), EMX_ERR_WORKSPACE, "needed");
  fails(emx_decode(ctx, c.kv, &c.batch, &all, &c.io, NULL, 0), EMX_ERR_WORKSPACE, "0 bytes");
  c.io.v_new = NULL;
  fails(case_decode(&c, &all), EMX_ERR_INVALID, "k_new and v_new");
  c.io = io, c.io.o = NULL;
  fails(case_decode(&c, &all), EMX_ERR_INVALID, "o is NULL");
  c.io = io, c.to.dtype = EMX_F16;
  fails(case_decode(&c, &all), EMX_ERR_DTYPE, "o is f16");
  c.to.dtype = EMX_F32, c.tq.shape[1] = 3;
  fails(emx_decode_workspace_size(ctx, c.kv, &all, &c.io, 64, &bytes), EMX_ERR_SHAPE, "no multiple of 2");
  c.tq.shape[1] = 4, c.tq.shape[2] = 2, c.tq.stride[2] = 0;
  fails(emx_decode_workspace_size(ctx, c.kv, &all, &c.io, 64, &bytes), EMX_ERR_SHAPE, "stride");
  c.tq.shape[2] = 1, c.io.report_stride = 32;
  fails(case_decode(&c, &all), EMX_ERR_INVALID, "report_stride");
  c.io = io;
  emx_ctx_cancel(ctx);
  fails(case_decode(&c, &all), EMX_ERR_CANCELLED, "cancelled");
  emx_ctx_resume(ctx);
  for (int b = 0; b < 2; b++) {
    CASE_OK(emx_seq_length(c.kv, c.seqs[b], &length));
    assert_int_equal(length, c.len[b] - 1);
  }
  /* page lists are checked before anything is touched */
  s = case_desc(EMX_SELECT_PAGES, 0);
  static const int32_t bad[][2] = {{-1, 2}, {2, 1}, {1, 1}, {0, 4}};
  for (int i = 0; i < 4; i++) {
    for (int r = 0; r < 8; r++) {
      memcpy(c.pages + r * c.tp.shape[3], bad[i], sizeof bad[i]);
      c.n_pages[r] = 2;
    }
    fails(case_decode(&c, &s), EMX_ERR_INVALID, "pages[0][0]");
  }
  c.n_pages[0] = -1;
  fails(case_decode(&c, &s), EMX_ERR_INVALID, "n_pages[0][0]");
  fails(case_select(&c, &s), EMX_ERR_INVALID, "PAGES");
  c.io = io;
  CASE_OK(case_decode(&c, &all)); /* and the same call still works */
  check_all(&c);
  case_close(&c);

  decode_case plain = {.D = 32, .len = {64}, .summaries = -1};
  case_open(&plain, ctx);
  s = case_desc(EMX_SELECT_TOPK, 16);
  fails(emx_decode_workspace_size(ctx, plain.kv, &s, &plain.io, 64, &bytes), EMX_ERR_STATE, "MINMAX");
  s = case_desc(EMX_SELECT_GAUSSIAN, 16);
  fails(emx_decode_workspace_size(ctx, plain.kv, &s, &plain.io, 64, &bytes), EMX_ERR_STATE, "MOMENTS");
  case_close(&plain);
  decode_case many = {.D = 32, .S = 2, .len = {64}};
  case_open(&many, ctx);
  s = case_desc(EMX_SELECT_TOPK, 16);
  fails(emx_decode_workspace_size(ctx, many.kv, &s, &many.io, 64, &bytes), EMX_ERR_UNSUPPORTED, "ALL");
  case_close(&many);
}

/* A cancel that arrives while the rows are being worked on: the append is taken back. */
static emx_ctx *cancelling;
static int64_t tasks_left;
static void cancel_midway(void *user, int64_t n, emx_task_fn task, void *arg) {
  (void)user;
  for (int64_t i = 0; i < n; i++) {
    if (tasks_left-- == 0) emx_ctx_cancel(cancelling);
    task(arg, i, 0);
  }
}
static void test_cancel_midway(void **state) {
  (void)state;
  emx_ctx_opts co;
  emx_ctx_opts_init(&co);
  co.threads = 1;
  co.parallel_for = cancel_midway;
  CASE_OK(emx_ctx_create(&co, &cancelling));
  tasks_left = -1;
  decode_case c = {.B = 2, .G = 2, .H = 4, .D = 32, .len = {65, 37}, .seed = 5, .in_decode = true};
  emx_select_desc all = case_desc(EMX_SELECT_ALL, 0);
  emx_kv_info before = {.struct_size = sizeof before}, now = before;
  case_open(&c, cancelling);
  CASE_OK(emx_kv_get_info(c.kv, &before));
  tasks_left = 4 + 2; /* four writes, then in the middle of four items */
  fails(case_decode(&c, &all), EMX_ERR_CANCELLED, "cancelled");
  emx_ctx_resume(cancelling);
  tasks_left = -1;
  CASE_OK(emx_kv_get_info(c.kv, &now));
  assert_memory_equal(&before, &now, sizeof now);
  CASE_OK(case_decode(&c, &all));
  check_all(&c);
  case_close(&c);
  /* the page that the append completed was the first: what its keys had taught the cache goes with it */
  c = (decode_case){.G = 2, .H = 4, .D = 32, .len = {16}, .seed = 5, .in_decode = true, .summaries = EMX_SUMMARY_SKETCH};
  case_open(&c, cancelling);
  tasks_left = 2 + 2; /* writes, sketches */
  fails(case_decode(&c, &all), EMX_ERR_CANCELLED, "cancelled");
  emx_ctx_resume(cancelling);
  tasks_left = -1;
  assert_int_equal(c.kv->sketch.mapped, 0);
  CASE_OK(case_decode(&c, &all));
  assert_int_equal(c.kv->sketch.mapped, 1);
  case_close(&c);
  emx_ctx_destroy(cancelling);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_all),
      cmocka_unit_test(test_lengths),
      cmocka_unit_test(test_query_tokens),
      cmocka_unit_test(test_known),
      cmocka_unit_test(test_odd_data),
      cmocka_unit_test(test_same_bits),
      cmocka_unit_test(test_vanishing_weight),
      cmocka_unit_test(test_many_chunks),
      cmocka_unit_test(test_callers_tables),
      cmocka_unit_test(test_refusals),
      cmocka_unit_test(test_cancel_midway),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
