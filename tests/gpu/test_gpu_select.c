/* Selectors on a GPU: lists against those of the CPU, results against the float64 oracle on what was read, and what the reports claim of the
 * rest against the whole. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "gpu_case.h"

static const int32_t dims[] = {64, 128, 80, 33, 16, 256, 96, 32}, dtypes[] = {EMX_F16, EMX_BF16, EMX_F32}, sizes[] = {16, 32, 64};
enum { BOTH = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS };

static double element(const void *row, int d, int32_t dtype) {
  return (double)(dtype == EMX_F32   ? ((const float *)row)[d]
                  : dtype == EMX_F16 ? emxi_f16_to_f32(((const uint16_t *)row)[d])
                                     : emxi_bf16_to_f32(((const uint16_t *)row)[d]));
}

typedef struct row_view {
  double *s, *p, *q, o[256], whole[256];
  uint8_t *read;
} row_view;
static row_view view_open(const decode_case *c) {
  const size_t n = (size_t)c->max_len + 1;
  return (row_view){.s = case_take(sizeof(double) * n),
                    .p = case_take(sizeof(double) * n),
                    .q = case_take(sizeof(double) * n),
                    .read = case_take(n)};
}
static void view_close(row_view *v) { free(v->s), free(v->p), free(v->q), free(v->read); }

/* One row after a decode with the lists that the case holds: o and tau over those pages, delta_bound and max_unread over the others.
 * Tolerances as in test_gpu_decode.c; bounds have none but the oracle's own. */
static void check_row(const decode_case *c, const emx_select_desc *d, row_view *v, int b, int h) {
  const int64_t row = case_row(c, b, h, 0), n = c->len[b], pages = (n + c->P - 1) / c->P;
  const int32_t *list = c->pages + row * c->tp.shape[3], count = c->n_pages[row];
  const emx_report *r = &c->reports[row];
  const double a = c->alpha > 1 ? c->alpha - 1 : 1;
  memset(v->read, 0, (size_t)pages + 1);
  int64_t tokens = 0, support = 0, all = 0;
  for (int32_t i = 0; i < count; i++) {
    assert_true(list[i] >= 0 && list[i] < pages && (!i || list[i] > list[i - 1]));
    v->read[list[i]] = 1;
    tokens += (list[i] + 1) * c->P <= n ? c->P : n % c->P;
  }
  assert_true(r->select == d->kind && r->pages == count && r->tokens == tokens);
  assert_int_equal(r->path, tokens == n ? EMX_PATH_ALL : EMX_PATH_PAGES);
  case_reference(c, b, h, 0, NULL, v->s, v->q, v->whole, &all);
  double m = 1, unread = -INFINITY, delta = 0;
  for (int64_t j = 0; j < n; j++) {
    m = fmax(m, fabs(v->s[j]));
    if (!v->read[j / c->P]) unread = fmax(unread, a * v->s[j]), delta += v->q[j];
  }
  const double tau = case_reference(c, b, h, 0, v->read, v->s, v->p, v->o, &support);
  if (!(r->max_unread >= unread)) fail_msg("kind %d: max_unread %g, but %g is not read", d->kind, r->max_unread, unread);
  if (!(r->delta_bound >= delta - 1e-9))
    fail_msg("kind %d alpha %g data %d: delta_bound %g, dropped %g (b %d h %d)", d->kind, c->alpha, c->data, r->delta_bound,
             delta, b, h);
  if (r->flags & EMX_REPORT_CERTIFIED)
    assert_true(r->delta_bound == 0 && delta <= 1e-9 && (d->tau_mode == EMX_TAU_EXACT || tokens == n));
  if (tokens == n) assert_true(r->max_unread == -INFINITY && r->delta_bound == 0);
  assert_true(!(r->flags & EMX_REPORT_NONFINITE));
  if (d->tau_mode != EMX_TAU_EXACT) {
    double mass = 0;
    for (int64_t j = 0; j < n; j++)
      if (v->read[j / c->P]) mass += pow(fmax(a * v->s[j] - r->tau, 0), 1 / a);
    if (d->tau_mode == EMX_TAU_CORRECTED && tokens) assert_true(fabs(r->mass - mass) < 1e-3 * m * fmax(1, mass));
    return;
  }
  for (int x = 0; x < c->D; x++) {
    const double got = case_out(c, b, h, 0, x);
    if (!(fabs(got - v->o[x]) <= case_tolerance(c, m)))
      fail_msg("kind %d b %d h %d d %d: %g, oracle %g (alpha %g D %d P %d dtype %d group %d n %d data %d pages %d of %d)",
               d->kind, b, h, x, got, v->o[x], c->alpha, c->D, c->P, c->dtype, c->H / c->G, (int)n, c->data, count, (int)pages);
    if (r->flags & EMX_REPORT_CERTIFIED && !(fabs(got - v->whole[x]) <= case_tolerance(c, m)))
      fail_msg("certified, but %g is not %g", got, v->whole[x]);
  }
  if (c->alpha > 1 && tokens && !(fabs(r->tau - tau) <= 1e-5 * m)) fail_msg("tau %g, oracle %g", r->tau, tau);
  if (tokens) assert_true(fabs(r->mass - 1) < 1e-5);
}
static void check_rows(const decode_case *c, const emx_select_desc *d) {
  row_view v = view_open(c);
  for (int b = 0; b < c->B; b++)
    for (int h = 0; h < c->H; h++) check_row(c, d, &v, b, h);
  view_close(&v);
}

/* Best possible score of a page, from its box, in float64. */
static double box_bound(const decode_case *c, int b, int h, int64_t page) {
  const float *q = c->q + case_row(c, b, h, 0) * c->D;
  const double scale = (double)(1.0f / sqrtf((float)c->D)), first = (double)(page * c->P - (c->len[b] - 1)), slope = c->slopes[h];
  double sum = fmax(slope * first, slope * (first + c->P - 1));
  for (int d = 0; d < c->D; d++) {
    double best = -INFINITY;
    for (int t = 0; t < c->P; t++)
      best = fmax(best, (double)q[d] * (double)case_key(c, b, h / (c->H / c->G), page * c->P + t)[d]);
    sum += scale * best;
  }
  return sum;
}

static void test_topk(void **state) {
  (void)state;
  static const double alphas[] = {1.5, 2, 1, 1.25, 3};
  for (int i = 0; i < 40; i++) {
    decode_case c = {.B = 1 + i % 2,
                     .G = 1 + i % 3 % 2,
                     .H = (1 + i % 3 % 2) * (1 + i % 6),
                     .D = dims[i % 8],
                     .P = sizes[i / 2 % 3],
                     .dtype = dtypes[i % 3],
                     .layout = i / 3 % 2,
                     .summaries = i % 4 ? BOTH : EMX_SUMMARY_MINMAX,
                     .len = {i < 4 ? 1 + i * 20 : 700 + 131 * i, 400 + i},
                     .alpha = alphas[i % 5],
                     .alibi = i % 4 == 3,
                     .in_decode = i % 5 == 2,
                     .data = i % DATA_HUGE,
                     .seed = (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    const emx_select_desc d = case_desc(EMX_SELECT_TOPK, i % 7 ? 20 + 40 * i : 0);
    gpu_decode_by(&g, &d); /* appends, where the case says so */
    g.io.k_new = g.io.v_new = NULL;
    gpu_select(&g, &d);
    check_rows(&c, &d);
    int64_t budget = d.budget / c.P;
    if (budget < 1) budget = 1;
    for (int b = 0; b < c.B; b++)
      for (int h = 0; h < c.H; h++) {
        const int64_t row = case_row(&c, b, h, 0), pages = (c.len[b] + c.P - 1) / c.P;
        const int32_t *list = c.pages + row * c.tp.shape[3], n = c.n_pages[row];
        assert_int_equal(n, budget < pages ? budget : pages);
        assert_int_equal(list[n - 1], pages - 1);
        double worst = INFINITY, best = -INFINITY;
        for (int64_t p = 0, at = 0; p < pages - 1; p++) {
          const bool in = at < n && list[at] == p;
          const double up = box_bound(&c, b, h, p);
          if (in)
            at++, worst = fmin(worst, up);
          else
            best = fmax(best, up);
        }
        if (best > worst + 1e-4 * fmax(1, fabs(worst))) fail_msg("a page bounded by %g is read, one by %g is not", worst, best);
        if (n < pages) assert_true(c.reports[row].stopped_by == EMX_STOP_BUDGET || c.reports[row].flags == EMX_REPORT_CERTIFIED);
      }
    gpu_close(&g);
  }
}

/* Pages of the lists that the case holds and of those of the CPU. */
static void count_pages(decode_case *c, const emx_select_desc *d, int64_t *same, int64_t *differ) {
  const int64_t width = c->tp.shape[3], rows = (int64_t)c->B * c->H;
  int32_t *list = case_take(sizeof(int32_t) * (size_t)(rows * width)), *n = case_take(sizeof(int32_t) * (size_t)rows);
  memcpy(list, c->pages, sizeof(int32_t) * (size_t)(rows * width));
  memcpy(n, c->n_pages, sizeof(int32_t) * (size_t)rows);
  OK(case_select(c, d));
  for (int64_t r = 0; r < rows; r++) {
    int64_t x = 0, y = 0;
    while (x < n[r] && y < c->n_pages[r]) {
      const int32_t p = list[r * width + x], q = c->pages[r * width + y];
      *same += p == q, *differ += p != q;
      x += p <= q, y += q <= p;
    }
    *differ += n[r] - x + c->n_pages[r] - y;
    for (int64_t k = n[r]; k < width; k++) assert_int_equal(list[r * width + k], -1);
  }
  free(list), free(n);
}

/* Lists as the CPU's, but for pages at the threshold: the GPU's centres and spreads are bytes. */
static void test_gaussian(void **state) {
  (void)state;
  static const double alphas[] = {1.5, 2, 4. / 3, 1.7, 3, 1.1};
  int64_t same = 0, differ = 0;
  for (int i = 0; i < 42; i++) {
    decode_case c = {.B = 1 + i % 2,
                     .G = 1 + i % 3 % 2,
                     .H = (1 + i % 3 % 2) * (1 + i % 6),
                     .D = dims[i % 8],
                     .P = sizes[i / 2 % 3],
                     .dtype = dtypes[i % 3],
                     .layout = i / 3 % 2,
                     .summaries = i % 4 ? BOTH : EMX_SUMMARY_MOMENTS,
                     .len = {i < 4 ? 1 + i * 20 : 700 + 131 * i, 400 + i},
                     .alpha = alphas[i % 6],
                     .alibi = i % 5 == 3,
                     .data = i % DATA_HUGE,
                     .seed = (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    emx_select_desc d = case_desc(EMX_SELECT_GAUSSIAN, 0);
    d.safety_margin = i % 3 ? 0 : 0.5f;
    for (int mode = 0; mode < 3; mode++) {
      d.tau_mode = mode == 0 ? EMX_TAU_EXACT : mode == 1 ? EMX_TAU_CORRECTED : EMX_TAU_FIXED;
      gpu_select(&g, &d);
      gpu_decode_by(&g, &d);
      check_rows(&c, &d);
    }
    count_pages(&c, &d, &same, &differ);
    gpu_close(&g);
  }
  print_message("pages in both lists: %lld, in one: %lld\n", (long long)same, (long long)differ);
  assert_true(differ * 50 < same);
}

/* Rows that several blocks share, each with more than a thousand pages; the last one's pages in two turns of its warps. */
static void test_parts(void **state) {
  (void)state;
  static const int32_t groups[] = {1, 4, 3, 1};
  int64_t same = 0, differ = 0;
  for (int i = 0; i < 4; i++) {
    decode_case c = {.B = 1 + i % 2,
                     .G = 1 + i / 2,
                     .H = (1 + i / 2) * groups[i],
                     .D = dims[i % 3],
                     .P = 16,
                     .dtype = dtypes[i % 2],
                     .summaries = BOTH,
                     .len = {70000 + 4000 * i, 33333},
                     .alpha = i == 2 ? 2 : 1.5,
                     .data = i % 2 ? DATA_TOPIC : 0,
                     .seed = (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    for (int kind = 0; kind < 3; kind++) {
      emx_select_desc d = case_desc(kind == 1 ? EMX_SELECT_TOPK : EMX_SELECT_GAUSSIAN, 2000);
      d.safety_margin = kind == 2 ? 1 : 0; /* most pages of some rows */
      gpu_select(&g, &d);
      gpu_decode_by(&g, &d);
      check_rows(&c, &d);
      if (kind != 1) count_pages(&c, &d, &same, &differ);
    }
    gpu_close(&g);
  }
  print_message("pages in both lists: %lld, in one: %lld\n", (long long)same, (long long)differ);
  assert_true(differ * 50 < same);
}

/* Lists from outside: half of the pages, by chance, also without the newest one, with each kind of summary and with none. */
static void test_pages(void **state) {
  (void)state;
  static const int32_t kinds[] = {-1, EMX_SUMMARY_MINMAX, EMX_SUMMARY_MOMENTS, BOTH};
  static const double alphas[] = {1.5, 1, 2, 1.25, 2.5};
  for (int i = 0; i < 40; i++) {
    decode_case c = {.B = 1 + i % 2,
                     .G = 2,
                     .H = 2 * (1 + i % 3),
                     .D = dims[i % 8],
                     .P = sizes[i / 2 % 3],
                     .dtype = dtypes[i % 3],
                     .summaries = kinds[i % 4],
                     .len = {i < 8 ? 64 * (i + 1) : 900 + 100 * i, 333},
                     .alpha = alphas[i % 5],
                     .alibi = i % 6 == 5,
                     .data = i % DATA_HUGE,
                     .seed = (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    const int64_t width = c.tp.shape[3];
    float *x = case_take(sizeof(float) * (size_t)width);
    for (int b = 0; b < c.B; b++)
      for (int h = 0; h < c.H; h++) {
        const int64_t row = case_row(&c, b, h, 0), pages = (c.len[b] + c.P - 1) / c.P;
        emxi_normals((uint64_t)i, (uint64_t)(900 + row), x, width);
        int32_t n = 0;
        for (int64_t p = 0; p < pages; p++)
          if ((x[p] > 0 || (h == 1 && i % 3)) && !(h == 0 && i % 7 == 6))
            c.pages[row * width + n++] = (int32_t)p; /* h 1: all, h 0: none */
        c.n_pages[row] = n;
      }
    free(x);
    OK(gpu->backend->memory_copy(gpu, g.pages.data, c.pages, gpu_bytes(&g.pages)));
    OK(gpu->backend->memory_copy(gpu, g.n_pages.data, c.n_pages, gpu_bytes(&g.n_pages)));
    const emx_select_desc d = case_desc(EMX_SELECT_PAGES, 0);
    gpu_decode_by(&g, &d);
    check_rows(&c, &d);
    for (int64_t r = 0; r < (int64_t)c.B * c.H && !c.summaries; r++)
      assert_true(c.reports[r].delta_bound == (c.reports[r].path == EMX_PATH_ALL ? 0 : 1));
    gpu_close(&g);
  }
}

/* Topics: few pages can matter, and the reports say so; a list that a certified one extends stays so. */
static void test_certified(void **state) {
  (void)state;
  int sure = 0, partial = 0;
  for (int i = 0; i < 8; i++) {
    decode_case c = {.G = 2,
                     .H = 4,
                     .D = 64,
                     .dtype = dtypes[i % 2],
                     .summaries = BOTH,
                     .len = {6000},
                     .data = DATA_TOPIC,
                     .seed = (uint64_t)i};
    c.alpha = i % 4 == 3 ? 2 : 1.5;
    gpu_case g;
    gpu_open(&g, &c);
    for (int kind = 0; kind < 2; kind++) {
      const emx_select_desc d = case_desc(kind ? EMX_SELECT_GAUSSIAN : EMX_SELECT_TOPK, 1200);
      gpu_select(&g, &d);
      gpu_decode_by(&g, &d);
      check_rows(&c, &d);
      for (int h = 0; h < 4; h++) {
        sure += c.reports[h].flags == EMX_REPORT_CERTIFIED;
        partial += c.reports[h].delta_bound > 0 && c.reports[h].delta_bound < 1;
      }
    }
    gpu_close(&g);
  }
  print_message("certified rows: %d, with a bound between 0 and 1: %d\n", sure, partial);
  assert_true(sure > 0);
}

/* Summaries that emx_kv_summarize makes for pages of a caller's pool are those of append; a page that is forgotten is read. */
static void test_summarize(void **state) {
  (void)state;
  for (int i = 0; i < 6; i++) {
    decode_case c = {.G = 2,
                     .H = 4,
                     .D = dims[i],
                     .P = sizes[i % 3],
                     .dtype = dtypes[i % 3],
                     .summaries = BOTH,
                     .len = {64 * 20},
                     .seed = (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    const emx_select_desc d = case_desc(i % 2 ? EMX_SELECT_GAUSSIAN : EMX_SELECT_TOPK, 256);
    gpu_select(&g, &d);
    const size_t bytes = gpu_bytes(&g.pages);
    int32_t *before = case_take(bytes), *ids = case_take(bytes), *tokens = case_take(bytes);
    memcpy(before, c.pages, bytes);
    const int64_t n = c.len[0] / c.P;
    const int32_t *table;
    int64_t held;
    OK(emx_seq_block_table(g.kv, g.seqs[0], &table, &held));
    memcpy(ids, table, sizeof(int32_t) * (size_t)n);
    emx_tensor hi = emx_tensor_view(ids, EMX_I32, 1, (int64_t[1]){n}), ht = emx_tensor_view(tokens, EMX_I32, 1, (int64_t[1]){n});
    emx_tensor ti = gpu_tensor(&hi), tt = gpu_tensor(&ht);
    OK(emx_kv_summarize(gpu, g.kv, &ti, &tt)); /* all forgotten */
    gpu_select(&g, &d);
    for (int h = 0; h < c.H; h++) assert_int_equal(c.n_pages[h], n);
    OK(emx_kv_summarize(gpu, g.kv, &ti, NULL));
    gpu_select(&g, &d);
    assert_memory_equal(before, c.pages, bytes);
    ids[3] = (int32_t)1 << 30;
    OK(gpu->backend->memory_copy(gpu, ti.data, ids, gpu_bytes(&ti)));
    OK(emx_kv_summarize(gpu, g.kv, &ti, NULL));
    fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "pages[3]");
    tokens[2] = 65;
    OK(gpu->backend->memory_copy(gpu, tt.data, tokens, gpu_bytes(&tt)));
    OK(gpu->backend->memory_copy(gpu, ti.data, table, gpu_bytes(&ti)));
    OK(emx_kv_summarize(gpu, g.kv, &ti, &tt));
    fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "tokens[2]");
    gpu_free(ti.data), gpu_free(tt.data);
    free(before), free(ids), free(tokens);
    gpu_close(&g);
  }
}

/* Truncated, recycled and shared pages: what is described is what the sequence sees. */
static void test_recycled(void **state) {
  (void)state;
  for (int i = 0; i < 4; i++) {
    decode_case c = {
        .G = 2, .H = 4, .D = 64, .P = sizes[i % 3], .dtype = EMX_F16, .summaries = BOTH, .len = {1500}, .seed = (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    const int64_t cut = 1000 + 7 * i;
    int32_t child;
    OK(emx_seq_fork(g.kv, g.seqs[0], &child));
    OK(emx_seq_truncate(g.kv, g.seqs[0], cut)); /* into a page that the child still has */
    gpu_append(&c, g.kv, g.seqs[0], 0, 0, 20);  /* other keys behind */
    OK(emx_seq_destroy(g.kv, child));
    gpu_append(&c, g.kv, g.seqs[0], 0, 20, 1493 - cut - 20); /* in pages that were the child's */
    for (int64_t j = cut; j < 1493; j++)
      for (int h = 0; h < 2; h++) {
        memcpy(case_key(&c, 0, h, j), case_key(&c, 0, h, j - cut), sizeof(float) * (size_t)c.D);
        memcpy(case_value(&c, 0, h, j), case_value(&c, 0, h, j - cut), sizeof(float) * (size_t)c.D);
      }
    c.len[0] = 1493;
    for (int kind = 0; kind < 2; kind++) {
      const emx_select_desc d = case_desc(kind ? EMX_SELECT_GAUSSIAN : EMX_SELECT_TOPK, 400);
      gpu_select(&g, &d);
      gpu_decode_by(&g, &d);
      check_rows(&c, &d);
    }
    gpu_close(&g);
  }
}

/* NaN and infinities: a page that holds one in K is always read; the rest as with ALL. Denormal queries and keys. */
static void test_odd_data(void **state) {
  (void)state;
  for (int kind = 0; kind < 6; kind++)
    for (int selector = 0; selector < 2; selector++) {
      decode_case c = {
          .G = 2, .H = 4, .D = 64, .dtype = kind == 5 ? EMX_F32 : EMX_F16, .summaries = BOTH, .len = {1600}, .seed = 3};
      gpu_case g;
      gpu_open(&g, &c);
      float *q = c.q_data;
      bool nan_group0 = false, nan_row1 = false;
      emx_seq_truncate(g.kv, g.seqs[0], 0);
      switch (kind) {
        case 0: q[64 + 5] = NAN, nan_row1 = true; break;
        case 1: case_key(&c, 0, 0, 77)[3] = NAN, nan_group0 = true; break;
        case 2: q[4] = q[64 + 4] = -1, case_key(&c, 0, 0, 77)[4] = INFINITY; break; /* masked for both rows */
        case 3:                                                                     /* a value without weight */
          for (int d = 0; d < 64; d++) case_key(&c, 0, 0, 100)[d] = -50 * (q[d] + q[64 + d]), case_value(&c, 0, 0, 100)[d] = NAN;
          break;
        case 4: /* half of group 0 masked, whole pages of it */
          q[0] = q[64] = 1;
          for (int64_t j = 0; j < 800; j++) case_key(&c, 0, 0, j)[0] = -INFINITY;
          break;
        default: /* denormals */
          for (int d = 0; d < 4 * 64; d++) q[d] *= 1e-39f;
          for (int64_t j = 0; j < 1600; j++) case_key(&c, 0, 0, j)[7] *= 1e-40f;
      }
      memcpy(c.q, q, sizeof(float) * 4 * 64);
      gpu_append(&c, g.kv, g.seqs[0], 0, 0, 1600);
      OK(gpu->backend->memory_copy(gpu, g.q.data, c.q_data, gpu_bytes(&c.tq)));
      const emx_select_desc d = case_desc(selector ? EMX_SELECT_GAUSSIAN : EMX_SELECT_TOPK, 320);
      gpu_select(&g, &d);
      gpu_decode_by(&g, &d);
      row_view v = view_open(&c);
      for (int h = 0; h < 4; h++) {
        const emx_report *r = &c.reports[h];
        const bool nan = (h < 2 && nan_group0) || (h == 1 && nan_row1);
        for (int x = 0; x < 64; x++)
          if ((isnan(case_out(&c, 0, h, 0, x)) != 0) != nan) fail_msg("kind %d selector %d h %d", kind, d.kind, h);
        if (nan) assert_true(r->flags == EMX_REPORT_NONFINITE && r->delta_bound == 1 && r->support == 0);
        if (!nan && kind != 2 && kind != 4) check_row(&c, &d, &v, 0, h);
        if (kind == 4 && h < 2) /* every page with an infinity is read */
          for (int p = 0; p < 50; p++) assert_int_equal(c.pages[h * c.tp.shape[3] + p], p);
      }
      view_close(&v);
      gpu_close(&g);
    }
}

/* Scores of the newest page that are far off, in a page that has a summary: what they may be off by decides about the page that is not read.
 * Keys of the pages between cancel, so that they look wide to both selectors. */
static void test_large_newest(void **state) {
  (void)state;
  static const float newest[8] = {0x1p27f, 24, 24, 24, 24, 24, 24, -0x1p27f};
  for (int i = 0; i < 4; i++) {
    const int64_t n = 512, last = i % 2 ? n - 16 : n - 1;
    decode_case c = {.G = 1, .H = i < 2 ? 1 : 4, .D = 64, .dtype = EMX_BF16, .P = 16, .summaries = BOTH, .len = {512}};
    gpu_case g;
    gpu_open(&g, &c);
    emx_seq_truncate(g.kv, g.seqs[0], 0);
    for (int h = 0; h < c.H; h++)
      for (int d = 0; d < 64; d++) ((float *)c.q_data)[h * 64 + d] = d < 10;
    for (int64_t j = 0; j < n; j++) {
      float *key = case_key(&c, 0, 0, j);
      memset(key, 0, sizeof(float) * 64);
      if (j < 16)
        key[0] = 160;
      else if (j == last)
        memcpy(key, newest, sizeof newest);
      else if (j < n - 16)
        key[8] = j % 2 ? 1000 : -1000, key[9] = -key[8];
    }
    gpu_append(&c, g.kv, g.seqs[0], 0, 0, n);
    OK(gpu->backend->memory_copy(gpu, g.q.data, c.q_data, gpu_bytes(&c.tq)));
    for (int kind = 0; kind < 2; kind++) {
      emx_select_desc d = case_desc(kind ? EMX_SELECT_GAUSSIAN : EMX_SELECT_TOPK, 31 * 16);
      d.safety_margin = 2;
      gpu_select(&g, &d);
      gpu_decode_by(&g, &d);
      for (int h = 0; h < c.H; h++) {
        const emx_report *r = &c.reports[h];
        assert_int_equal(c.n_pages[h], 31); /* all but page 0, which has all the weight */
        assert_int_equal(c.pages[h * c.tp.shape[3]], 1);
        assert_true(r->tau > 10); /* computed; in truth it is 8 */
        assert_true(r->flags == 0 && r->delta_bound == 1 && r->max_unread >= 10);
      }
    }
    gpu_close(&g);
  }
}

/* A bound whose sum in floats overflows downwards, of scores that do not: nothing is known of the page, and it is read. */
static void test_overflow(void **state) {
  (void)state;
  decode_case c = {.G = 1, .H = 1, .D = 64, .dtype = EMX_F32, .P = 16, .summaries = BOTH, .len = {200}};
  gpu_case g;
  gpu_open(&g, &c);
  emx_seq_truncate(g.kv, g.seqs[0], 0);
  for (int d = 0; d < 64; d++) ((float *)c.q_data)[d] = d < 3 ? 8e20f : 0;
  for (int64_t j = 32; j < 48; j++) {
    float *key = case_key(&c, 0, 0, j);
    key[0] = -4e18f, key[1] = key[2] = 3e18f;
  }
  gpu_append(&c, g.kv, g.seqs[0], 0, 0, 200);
  OK(gpu->backend->memory_copy(gpu, g.q.data, c.q_data, gpu_bytes(&c.tq)));
  for (int kind = 0; kind < 2; kind++) {
    const emx_select_desc d = case_desc(kind ? EMX_SELECT_GAUSSIAN : EMX_SELECT_TOPK, 32);
    gpu_select(&g, &d);
    bool there = false;
    for (int i = 0; i < c.n_pages[0]; i++) there |= c.pages[i] == 2;
    assert_true(there || c.bound[0] == INFINITY);
  }
  gpu_close(&g);
}

/* Lists and alphas in device memory that are wrong: the next synchronisation says so, and nothing outside is touched. */
static void test_faults(void **state) {
  (void)state;
  decode_case c = {.G = 1, .H = 2, .D = 64, .dtype = EMX_F16, .summaries = BOTH, .len = {500}};
  gpu_case g;
  gpu_open(&g, &c);
  const emx_select_desc d = case_desc(EMX_SELECT_PAGES, 0), all = case_desc(EMX_SELECT_ALL, 0);
  size_t bytes;
  char *work = gpu_work(&g, &d, &bytes);
  const int32_t lists[4][3] = {{1, 5, 5}, {1, 5, 1000}, {-1, 2, 3}, {9, 8, 7}}, counts[2] = {3, 0}, many[2] = {1 << 20, 0};
  for (int i = 0; i < 4; i++) {
    OK(gpu->backend->memory_copy(gpu, g.pages.data, lists[i], sizeof lists[i]));
    OK(gpu->backend->memory_copy(gpu, g.n_pages.data, counts, sizeof counts));
    OK(emx_decode(gpu, g.kv, &g.batch, &d, &g.io, work, bytes));
    fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "ascend");
    OK(emx_ctx_sync(gpu));
    gpu_fetch(c.reports, g.reports, sizeof(emx_report) * 2);
    assert_true(c.reports[0].delta_bound == 1 && c.reports[0].max_unread == INFINITY && c.reports[0].flags == 0);
  }
  OK(gpu->backend->memory_copy(gpu, g.n_pages.data, many, sizeof many));
  OK(emx_decode(gpu, g.kv, &g.batch, &d, &g.io, work, bytes));
  fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "n_pages");
  gpu_free(work);
  double alphas[2] = {1.5, 7};
  emx_tensor ha = emx_tensor_view(alphas, EMX_F64, 1, (int64_t[1]){2}), ta = gpu_tensor(&ha);
  g.io.alphas = &ta;
  work = gpu_work(&g, &all, &bytes);
  OK(emx_decode(gpu, g.kv, &g.batch, &all, &g.io, work, bytes));
  fails(emx_ctx_sync(gpu), EMX_ERR_INVALID, "alpha of head 1");
  gpu_fetch(c.o_data, g.o.data, gpu_bytes(&c.to));
  assert_true(isfinite(case_out(&c, 0, 0, 0, 3)) && isnan(case_out(&c, 0, 1, 0, 3)));
  gpu_free(work);
  gpu_free(ta.data);
  gpu_close(&g);
}

/* One alpha a head, softmax among them. */
static void test_alphas(void **state) {
  (void)state;
  static const double alphas[8] = {1.5, 1, 2, 1.25, 1, 3, 4. / 3, 1.0001};
  for (int i = 0; i < 8; i++) {
    decode_case c = {.B = 2,
                     .G = i % 2 ? 2 : 8,
                     .H = 8,
                     .S = i == 6 ? 3 : 1,
                     .D = i % 3 ? 64 : 48,
                     .dtype = dtypes[i % 3],
                     .summaries = BOTH,
                     .len = {1700, 90 + i},
                     .seed = (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    emx_tensor ha = emx_tensor_view((void *)(uintptr_t)alphas, EMX_F64, 1, (int64_t[1]){8}), ta = gpu_tensor(&ha);
    g.io.alphas = &ta;
    const bool topk = c.S == 1 && i % 2;
    const emx_select_desc d = case_desc(topk ? EMX_SELECT_TOPK : EMX_SELECT_ALL, 300);
    gpu_select(&g, &d);
    gpu_decode_by(&g, &d);
    row_view v = view_open(&c);
    for (int h = 0; h < 8; h++) {
      c.alpha = alphas[h];
      for (int b = 0; b < 2; b++)
        for (int s = 0; s < c.S; s++) {
          if (c.S == 1) {
            check_row(&c, &d, &v, b, h);
            continue;
          }
          int64_t support;
          case_reference(&c, b, h, s, NULL, v.s, v.p, v.o, &support);
          assert_int_equal(c.n_pages[case_row(&c, b, h, s)], (c.len[b] - c.S + s + 1 + c.P - 1) / c.P);
          for (int x = 0; x < c.D; x++) assert_true(fabs(case_out(&c, b, h, s, x) - v.o[x]) < 1e-4);
        }
    }
    view_close(&v);
    gpu_free(ta.data);
    gpu_close(&g);
  }
}

/* What emx_kv_get_summary brings from the device against float64: boxes exactly, mean and spread to a step of their codes, and radii that
 * hold for every key. Pages that are open or odd are not described. */
static void test_get_summary(void **state) {
  (void)state;
  static const int32_t kinds[] = {BOTH, EMX_SUMMARY_MINMAX, EMX_SUMMARY_MOMENTS, EMX_SUMMARY_SKETCH, -1};
  for (int i = 0; i < 10; i++) {
    decode_case c = {.G = 2,
                     .H = 2,
                     .D = dims[i % 8],
                     .P = sizes[i % 3],
                     .dtype = dtypes[i / 2 % 3],
                     .layout = i % 2,
                     .summaries = kinds[i % 5],
                     .len = {300},
                     .seed = (uint64_t)i};
    gpu_case g;
    gpu_open(&g, &c);
    OK(emx_seq_truncate(g.kv, g.seqs[0], 0));
    case_key(&c, 0, 1, c.P)[3] = NAN; /* in the second page */
    gpu_append(&c, g.kv, g.seqs[0], 0, 0, 300);
    const int32_t *table;
    int64_t n;
    OK(emx_seq_block_table(g.kv, g.seqs[0], &table, &n));
    for (int64_t p = 0; p < n; p++)
      for (int h = 0; h < 2; h++) {
        emx_kv_summary s = {.struct_size = sizeof s};
        OK(emx_kv_get_summary(g.kv, table[p], h, &s));
        assert_true(!s.min == !(c.summaries > 0 && c.summaries & EMX_SUMMARY_MINMAX) && !s.max == !s.min);
        assert_true(!s.mean == !(c.summaries > 0 && c.summaries & EMX_SUMMARY_MOMENTS) && !s.m2 == !s.mean);
        const bool known = c.summaries > 0 && (p + 1) * c.P <= 300 && !(p == 1 && h == 1);
        assert_true(s.valid == known && s.tokens == (known ? c.P : 0) && !s.nonfinite);
        if (!known || !s.mean) assert_true(s.radius == INFINITY);
        if (!known) continue;
        double mean[256], spread[256], centre = 0, widest = 0, square[64] = {0};
        for (int d = 0; d < c.D; d++) {
          double low = INFINITY, high = -INFINITY, sum = 0, m2 = 0;
          for (int t = 0; t < c.P; t++) {
            const double x = (double)case_key(&c, 0, h, p * c.P + t)[d];
            low = fmin(low, x), high = fmax(high, x), sum += x;
          }
          mean[d] = sum / c.P;
          for (int t = 0; t < c.P; t++) {
            const double x = (double)case_key(&c, 0, h, p * c.P + t)[d];
            m2 += (x - mean[d]) * (x - mean[d]);
            if (s.mean) square[t] += (x - (double)s.mean[d]) * (x - (double)s.mean[d]);
          }
          spread[d] = sqrt(m2 / c.P);
          centre = fmax(centre, fabs(mean[d])), widest = fmax(widest, spread[d]);
          if (s.min) assert_true(element(s.min, d, c.dtype) == low && element(s.max, d, c.dtype) == high);
        }
        for (int d = 0; d < c.D && s.mean; d++) {
          const double got = sqrt((double)s.m2[d] / c.P); /* half a step of the mean, a step up of the spread; f32 rounding */
          assert_true(fabs((double)s.mean[d] - mean[d]) <= centre * (0.5 / 127 + 1e-5));
          assert_true(got >= spread[d] * (1 - 1e-5) && got <= spread[d] + widest * (1.0 / 255 + 1e-5));
        }
        for (int t = 0; t < c.P && s.mean; t++) assert_true((double)s.radius >= sqrt(square[t]));
      }
    emx_kv_summary s = {.struct_size = sizeof s};
    fails(emx_kv_get_summary(g.kv, 1 << 20, 0, &s), EMX_ERR_INVALID, "page 1048576");
    gpu_close(&g);
  }
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]);
  const int missing = gpu_missing();
  if (missing) return missing;
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_get_summary), cmocka_unit_test(test_topk),      cmocka_unit_test(test_gaussian),
      cmocka_unit_test(test_parts),       cmocka_unit_test(test_pages),     cmocka_unit_test(test_certified),
      cmocka_unit_test(test_alphas),      cmocka_unit_test(test_summarize), cmocka_unit_test(test_recycled),
      cmocka_unit_test(test_odd_data),    cmocka_unit_test(test_faults),    cmocka_unit_test(test_large_newest),
      cmocka_unit_test(test_overflow)};
  const int failed = cmocka_run_group_tests(tests, NULL, NULL);
  emx_ctx_destroy(gpu);
  emx_ctx_destroy(cpu);
  return failed;
}
