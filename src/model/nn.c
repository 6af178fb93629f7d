/* SPDX-License-Identifier: Apache-2.0
 * The f32 layers on the CPU. Matrix products are compute-bound: 2 m in out FLOP on tiles of rows (forward, dx) or of the weight
 * matrix (dw), each one sgemm call at 80..100 % of the core's sgemm rate. Everything else moves each array once and is bound by
 * memory. */
#include "model/nn.h"

#include <cblas.h>
#include <math.h>
#include <pthread.h>
#include <string.h>

enum { LANES = 16, SPAN = 16384 /* elements that make a task of an element-wise pass worth its hand-out */ };

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
/* Rows of a tile for a row-wise pass. */
static int64_t span_rows(int64_t d) { return d >= SPAN ? 1 : SPAN / (d > 0 ? d : 1); }

/* ------------------------------------------------------------------------------------------------------ matrix products */

/* Many workers call sgemm at the same time. A serial build of OpenBLAS hands the same scratch memory to two callers and returns
 * wrong products (measured with 0.3.21: 1 % of products of 64 x 96 x 128 from four threads), so it gets one call at a time. A
 * threaded build is safe; it is told to use the calling thread alone for as long as our workers run. Other BLAS libraries have
 * none of these names. */
extern int openblas_get_parallel(void) __attribute__((weak));
extern int openblas_get_num_threads(void) __attribute__((weak));
extern void openblas_set_num_threads(int) __attribute__((weak));
static pthread_mutex_t blas_count_lock = PTHREAD_MUTEX_INITIALIZER, blas_call_lock = PTHREAD_MUTEX_INITIALIZER;
static int blas_users, blas_threads;

struct one_at_a_time {
  emx_task_fn task;
  void *arg;
};
static void one_at_a_time(void *arg, int64_t index, int32_t worker) {
  const struct one_at_a_time *t = arg;
  pthread_mutex_lock(&blas_call_lock);
  t->task(t->arg, index, worker);
  pthread_mutex_unlock(&blas_call_lock);
}

/* emxi_parallel for tasks that call the BLAS. */
static emx_status blas_parallel(emx_ctx *ctx, int64_t n, emx_task_fn task, void *arg) {
  if (openblas_get_parallel && openblas_get_parallel() == 0) {
    struct one_at_a_time t = {task, arg};
    return emxi_parallel(ctx, n, one_at_a_time, &t);
  }
  const bool threaded = openblas_get_num_threads && openblas_set_num_threads;
  pthread_mutex_lock(&blas_count_lock);
  if (threaded && blas_users++ == 0) {
    blas_threads = openblas_get_num_threads();
    if (blas_threads != 1) openblas_set_num_threads(1);
  }
  pthread_mutex_unlock(&blas_count_lock);
  emx_status status = emxi_parallel(ctx, n, task, arg);
  pthread_mutex_lock(&blas_count_lock);
  if (threaded && --blas_users == 0 && blas_threads != 1) openblas_set_num_threads(blas_threads);
  pthread_mutex_unlock(&blas_count_lock);
  return status;
}

struct gemm {
  enum { FORWARD, DX, DW } kind;
  const float *a, *b, *residual;
  float *c;
  int64_t m, in, out;
  int64_t tile_rows, tile_cols; /* of c */
  int64_t col_tiles;
  float beta;
  /* DW: the sum over m is cut into chunks, the first into c, the others into partials [chunks-1,out,in] */
  int64_t tiles, chunks, chunk;
  float *partials;
};

static void gemm_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct gemm *g = arg;
  const int64_t row = index / g->col_tiles * g->tile_rows, col = index % g->col_tiles * g->tile_cols;
  const int in = (int)g->in, out = (int)g->out;
  const int rows = (int)min64(g->tile_rows, g->m - row);
  if (g->kind == FORWARD) {
    const int cols = (int)min64(g->tile_cols, out - col);
    float *c = g->c + row * out + col;
    if (g->residual)
      for (int i = 0; i < rows; i++)
        memcpy(c + (int64_t)i * out, g->residual + (row + i) * out + col, (size_t)cols * sizeof(float));
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, cols, in, 1, g->a + row * in, in, g->b + col * in, in, g->beta, c,
                out);
  } else {
    const int cols = (int)min64(g->tile_cols, in - col);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, rows, cols, out, 1, g->a + row * out, out, g->b + col, in, g->beta,
                g->c + row * in + col, in);
  }
}

/* c [out,in] = a^T b, a = dy [m,out], b = x [m,in] */
static void dw_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct gemm *g = arg;
  const int64_t chunk = index / g->tiles, tile = index % g->tiles, row = tile / g->col_tiles * g->tile_rows,
                col = tile % g->col_tiles * g->tile_cols, from = chunk * g->chunk, depth = min64(g->chunk, g->m - from);
  const int in = (int)g->in, out = (int)g->out;
  float *c = chunk ? g->partials + (chunk - 1) * g->out * g->in : g->c;
  cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (int)min64(g->tile_rows, out - row), (int)min64(g->tile_cols, in - col),
              (int)depth, 1, g->a + from * out + row, out, g->b + from * in + col, in, chunk ? 0 : g->beta, c + row * in + col,
              in);
}
/* Adds the partial sums in order. */
static void dw_sum_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct gemm *g = arg;
  const int64_t count = g->out * g->in, from = index * SPAN, to = min64(from + SPAN, count);
  for (int64_t k = 0; k < g->chunks - 1; k++)
    for (int64_t i = from; i < to; i++) g->c[i] += g->partials[k * count + i];
}

/* Splits n into equal tiles of at most `most`, multiples of 8. */
static int64_t even_tile(int64_t n, int64_t most) {
  int64_t tile = ceil_div(n, ceil_div(n, most));
  return ceil_div(tile, 8) * 8;
}

/* Tiles of 256 x 256 read x and dy as seldom as possible; a matrix of few tiles gets its tasks from chunks of the sum. */
static void dw_shape(struct gemm *g) {
  g->tile_rows = even_tile(g->out, 256);
  g->tile_cols = even_tile(g->in, 256);
  g->col_tiles = ceil_div(g->in, g->tile_cols);
  g->tiles = ceil_div(g->out, g->tile_rows) * g->col_tiles;
  const int64_t want = 8 / g->tiles, most = g->m / 512;
  g->chunks = want < 1 || most < 1 ? 1 : min64(want, most);
  g->chunk = ceil_div(g->m, g->chunks);
}

static emx_status gemm_run(emx_ctx *ctx, struct gemm *g, const char *who) {
  if (g->m < 0 || g->in < 0 || g->out < 0 || g->m > INT32_MAX || g->in > INT32_MAX || g->out > INT32_MAX)
    return emxi_fail(EMX_ERR_INVALID, "%s: a product of %lld x %lld x %lld is beyond what the BLAS can count", who,
                     (long long)g->m, (long long)g->in, (long long)g->out);
  const int64_t rows = g->kind == DW ? g->out : g->m, cols = g->kind == FORWARD ? g->out : g->in,
                depth = g->kind == DW   ? g->m
                        : g->kind == DX ? g->out
                                        : g->in;
  if (rows == 0 || cols == 0) return EMX_OK;
  if (depth == 0) { /* an empty sum; BLAS leaves c alone */
    if (g->residual)
      memcpy(g->c, g->residual, (size_t)(rows * cols) * sizeof(float));
    else if (g->beta == 0)
      memset(g->c, 0, (size_t)(rows * cols) * sizeof(float));
    return EMX_OK;
  }
  if (g->kind == DW) {
    dw_shape(g);
    EMX_TRY(blas_parallel(ctx, g->tiles * g->chunks, dw_task, g));
    return g->chunks > 1 ? emxi_parallel(ctx, ceil_div(rows * cols, SPAN), dw_sum_task, g) : EMX_OK;
  }
  if (rows * cols < ((int64_t)1 << 20) / depth) { /* microseconds: no hand-out */
    g->tile_rows = rows;
    g->tile_cols = cols;
  } else {
    g->tile_rows = rows >= 2048 ? 256 : 64;
    g->tile_cols = even_tile(cols, 1024);
  }
  g->col_tiles = ceil_div(cols, g->tile_cols);
  return blas_parallel(ctx, ceil_div(rows, g->tile_rows) * g->col_tiles, gemm_task, g);
}

/* One row times a matrix streams the weights once: each output is a dot product in LANES partial sums. */
EMXI_CLONES static void gemv_rows(const float *x, const float *w, float *y, int64_t in, int64_t rows, float beta) {
  for (int64_t r = 0; r < rows; r++, w += in) {
    float acc[4][LANES] = {{0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= in; i += 4 * LANES)
      for (int c = 0; c < 4; c++)
        for (int j = 0; j < LANES; j++) acc[c][j] += w[i + c * LANES + j] * x[i + c * LANES + j];
    for (int j = 0; i < in; i++, j = (j + 1) % LANES) acc[0][j] += w[i] * x[i];
    for (int j = 0; j < LANES; j++) acc[0][j] = (acc[0][j] + acc[1][j]) + (acc[2][j] + acc[3][j]);
    for (int half = LANES / 2; half; half /= 2)
      for (int j = 0; j < half; j++) acc[0][j] += acc[0][j + half];
    y[r] = beta == 0 ? acc[0][0] : y[r] + acc[0][0];
  }
}
static void gemv_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct gemm *g = arg;
  const int64_t row = index * g->tile_rows, rows = min64(g->tile_rows, g->out - row);
  if (g->residual) memcpy(g->c + row, g->residual + row, (size_t)rows * sizeof(float));
  gemv_rows(g->a, g->b + row * g->in, g->c + row, g->in, rows, g->beta);
}

static emx_status forward(emx_ctx *ctx, struct gemm *g) {
  if (g->m != 1 || g->in <= 0 || g->out <= 0) return gemm_run(ctx, g, "linear");
  g->tile_rows =
      ceil_div((int64_t)1 << 19, g->in); /* 2 MB of weights a task: waking a thread costs as much as reading a few 100 KB */
  return emxi_parallel(ctx, ceil_div(g->out, g->tile_rows), gemv_task, g);
}

emx_status emxi_linear(emx_ctx *ctx, const float *x, const float *w, float *y, int64_t m, int64_t in, int64_t out,
                       bool accumulate) {
  struct gemm g = {.kind = FORWARD, .a = x, .b = w, .c = y, .m = m, .in = in, .out = out, .beta = accumulate ? 1 : 0};
  return forward(ctx, &g);
}
emx_status emxi_linear_residual(emx_ctx *ctx, const float *x, const float *w, const float *residual, float *y, int64_t m,
                                int64_t in, int64_t out) {
  struct gemm g = {.kind = FORWARD, .a = x, .b = w, .residual = residual, .c = y, .m = m, .in = in, .out = out, .beta = 1};
  return forward(ctx, &g);
}
emx_status emxi_linear_dx(emx_ctx *ctx, const float *dy, const float *w, float *dx, int64_t m, int64_t in, int64_t out,
                          bool accumulate) {
  struct gemm g = {.kind = DX, .a = dy, .b = w, .c = dx, .m = m, .in = in, .out = out, .beta = accumulate ? 1 : 0};
  return gemm_run(ctx, &g, "linear (input gradient)");
}
int64_t emxi_linear_partials(int64_t m, int64_t in, int64_t out) {
  struct gemm g = {.m = m, .in = in, .out = out};
  dw_shape(&g);
  return (g.chunks - 1) * out * in;
}
emx_status emxi_linear_dw(emx_ctx *ctx, const float *x, const float *dy, float *dw, float *partials, int64_t m, int64_t in,
                          int64_t out, bool accumulate) {
  struct gemm g = {
      .kind = DW, .a = dy, .b = x, .c = dw, .partials = partials, .m = m, .in = in, .out = out, .beta = accumulate ? 1 : 0};
  return gemm_run(ctx, &g, "linear (weight gradient)");
}

/* -------------------------------------------------------------------------------------------------------------- rmsnorm */

/* Sums in LANES partial sums, folded by halves. */
#define SUM_LANES(result, n, term)                                     \
  do {                                                                 \
    float acc_[LANES] = {0};                                           \
    int64_t i = 0;                                                     \
    for (; i + LANES <= (n); i += LANES)                               \
      for (int j_ = 0; j_ < LANES; j_++) {                             \
        const int64_t e = i + j_;                                      \
        acc_[j_] += (term);                                            \
      }                                                                \
    for (int j_ = 0; i + j_ < (n); j_++) {                             \
      const int64_t e = i + j_;                                        \
      acc_[j_] += (term);                                              \
    }                                                                  \
    for (int half_ = LANES / 2; half_; half_ /= 2)                     \
      for (int j_ = 0; j_ < half_; j_++) acc_[j_] += acc_[j_ + half_]; \
    (result) = acc_[0];                                                \
  } while (0)

struct norm {
  const float *x, *w, *dy, *rstd_in;
  float *y, *rstd, *dx, *partials;
  double eps;
  int64_t m, d, tile;
  bool accumulate;
};

EMXI_CLONES static void norm_rows(const struct norm *p, int64_t row, int64_t rows) {
  const int64_t d = p->d;
  for (int64_t r = row; r < row + rows; r++) {
    const float *x = p->x + r * d, *w = p->w;
    float *y = p->y + r * d, sum;
    SUM_LANES(sum, d, x[e] * x[e]);
    const float rstd = (float)(1 / sqrt((double)sum / (double)d + p->eps));
    EMXI_ELEMENTWISE
    for (int64_t i = 0; i < d; i++) y[i] = x[i] * rstd * w[i];
    if (p->rstd) p->rstd[r] = rstd;
  }
}
static void norm_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct norm *p = arg;
  norm_rows(p, index * p->tile, min64(p->tile, p->m - index * p->tile));
}

emx_status emxi_rmsnorm(emx_ctx *ctx, const float *x, const float *w, double eps, float *y, float *rstd, int64_t m, int64_t d) {
  struct norm p = {.x = x, .w = w, .eps = eps, .y = y, .rstd = rstd, .m = m, .d = d, .tile = span_rows(d)};
  return emxi_parallel(ctx, ceil_div(m, p.tile), norm_task, &p);
}

EMXI_CLONES static void norm_backward_rows(const struct norm *p, int64_t row, int64_t rows, float *dw) {
  const int64_t d = p->d;
  const float *w = p->w;
  memset(dw, 0, (size_t)d * sizeof(float));
  for (int64_t r = row; r < row + rows; r++) {
    const float *x = p->x + r * d, *dy = p->dy + r * d, rstd = p->rstd_in[r];
    float *dx = p->dx + r * d, sum;
    SUM_LANES(sum, d, dy[e] * w[e] * x[e]);
    const float c = (float)((double)sum * rstd * rstd * rstd / (double)d); /* of x: rstd * rstd * mean(g h) with h = x rstd */
    EMXI_ELEMENTWISE
    for (int64_t i = 0; i < d; i++) dw[i] += dy[i] * (x[i] * rstd);
    if (p->accumulate) {
      EMXI_ELEMENTWISE
      for (int64_t i = 0; i < d; i++) dx[i] += rstd * (dy[i] * w[i]) - c * x[i];
    } else {
      EMXI_ELEMENTWISE
      for (int64_t i = 0; i < d; i++) dx[i] = rstd * (dy[i] * w[i]) - c * x[i];
    }
  }
}
static void norm_backward_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct norm *p = arg;
  norm_backward_rows(p, index * p->tile, min64(p->tile, p->m - index * p->tile), p->partials + index * p->d);
}

int64_t emxi_rmsnorm_partials(int64_t m, int64_t d) { return ceil_div(m, span_rows(d)) * d; }

emx_status emxi_rmsnorm_backward(emx_ctx *ctx, const float *x, const float *w, const float *rstd, const float *dy, float *dx,
                                 float *dw, float *partials, int64_t m, int64_t d, bool accumulate) {
  struct norm p = {.x = x,
                   .w = w,
                   .rstd_in = rstd,
                   .dy = dy,
                   .dx = dx,
                   .partials = partials,
                   .m = m,
                   .d = d,
                   .tile = span_rows(d),
                   .accumulate = accumulate};
  const int64_t tiles = ceil_div(m, p.tile);
  EMX_TRY(emxi_parallel(ctx, tiles, norm_backward_task, &p));
  for (int64_t t = 0; t < tiles; t++)
    for (int64_t i = 0; i < d; i++) dw[i] += partials[t * d + i];
  return EMX_OK;
}

/* --------------------------------------------------------------------------------------------------------- element-wise */

/* a > b ? yes : no, by bits: a conditional would be turned into a branch, which stops vectorisation. */
static inline float greater(float a, float b, float yes, float no) {
  uint32_t y, n;
  memcpy(&y, &yes, 4);
  memcpy(&n, &no, 4);
  const uint32_t mask = -(uint32_t)(a > b);
  n = (y & mask) | (n & ~mask);
  memcpy(&no, &n, 4);
  return no;
}

/* e^x in plain arithmetic, so that loops vectorise: x = n ln 2 + r with n by the rounding constant, a polynomial of degree 6 on
 * |r| <= ln 2 / 2 (Taylor: the first dropped term is below 1.2e-7 relative), 2^n through the exponent. Clamped to where 2^n is a
 * normal number: e^x < 1.2e-38 gives 1.2e-38. NaN stays NaN. */
static inline float exp_f32(float x) {
  x = greater(x, 88.0f, 88.0f, x);
  x = greater(-87.3f, x, -87.3f, x);
  const float shifted = x * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  float p = 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return p * scale;
}

struct glu {
  const float *gate, *up, *dout;
  float *out, *dgate, *dup;
  int64_t n;
};

EMXI_CLONES static void swiglu_span(const float *gate, const float *up, float *out, int64_t n) {
  EMXI_ELEMENTWISE
  for (int64_t i = 0; i < n; i++) out[i] = gate[i] * (1.0f / (1.0f + exp_f32(-gate[i]))) * up[i];
}
static void swiglu_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct glu *p = arg;
  const int64_t at = index * SPAN;
  swiglu_span(p->gate + at, p->up + at, p->out + at, min64(SPAN, p->n - at));
}
emx_status emxi_swiglu(emx_ctx *ctx, const float *gate, const float *up, float *out, int64_t n) {
  struct glu p = {.gate = gate, .up = up, .out = out, .n = n};
  return emxi_parallel(ctx, ceil_div(n, SPAN), swiglu_task, &p);
}

/* s = sigmoid(gate): dgate = dout up s (1 + gate (1 - s)), dup = dout gate s; out has the bits of swiglu_span. */
EMXI_CLONES static void swiglu_backward_span(const float *gate, const float *up, const float *dout, float *dgate, float *dup,
                                             float *out, int64_t n) {
  EMXI_ELEMENTWISE
  for (int64_t i = 0; i < n; i++) {
    const float g = gate[i], u = up[i], d = dout[i], s = 1.0f / (1.0f + exp_f32(-g));
    dgate[i] = d * u * s * (1.0f + g * (1.0f - s));
    dup[i] = d * g * s;
    out[i] = g * s * u;
  }
}
static void swiglu_backward_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct glu *p = arg;
  const int64_t at = index * SPAN;
  swiglu_backward_span(p->gate + at, p->up + at, p->dout + at, p->dgate + at, p->dup + at, p->out + at, min64(SPAN, p->n - at));
}
emx_status emxi_swiglu_backward(emx_ctx *ctx, const float *gate, const float *up, const float *dout, float *dgate, float *dup,
                                float *out, int64_t n) {
  struct glu p = {.gate = gate, .up = up, .dout = dout, .dgate = dgate, .dup = dup, .out = out, .n = n};
  return emxi_parallel(ctx, ceil_div(n, SPAN), swiglu_backward_task, &p);
}

/* ------------------------------------------------------------------------------------------------------------ embedding */

void emxi_embed(const float *table, const int32_t *tokens, float *x, int64_t m, int64_t d) {
  for (int64_t i = 0; i < m; i++) memcpy(x + i * d, table + tokens[i] * d, (size_t)d * sizeof(float));
}

enum { EMBED_COLUMNS = 32 };
struct embed {
  const int32_t *tokens;
  const float *dx;
  float *dtable;
  int64_t m, d;
};
/* A task owns a block of columns of the whole table, so that rows are summed in the order of the tokens. */
static void embed_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct embed *p = arg;
  const int64_t col = index * EMBED_COLUMNS, cols = min64(EMBED_COLUMNS, p->d - col);
  for (int64_t i = 0; i < p->m; i++) {
    float *to = p->dtable + p->tokens[i] * p->d + col;
    const float *from = p->dx + i * p->d + col;
    for (int64_t j = 0; j < cols; j++) to[j] += from[j];
  }
}
emx_status emxi_embed_backward(emx_ctx *ctx, const int32_t *tokens, const float *dx, float *dtable, int64_t m, int64_t d) {
  struct embed p = {tokens, dx, dtable, m, d};
  return emxi_parallel(ctx, ceil_div(d, EMBED_COLUMNS), embed_task, &p);
}

/* -------------------------------------------------------------------------------------------------------- cross entropy */

struct entropy {
  float *logits;
  const int32_t *targets;
  float *nll, grad_scale;
  int64_t m, v, tile;
};

EMXI_CLONES static void entropy_rows(const struct entropy *p, int64_t row, int64_t rows) {
  const int64_t v = p->v;
  for (int64_t r = row; r < row + rows; r++) {
    float *z = p->logits + r * v, top[LANES], max, sum;
    for (int j = 0; j < LANES; j++) top[j] = -INFINITY;
    int64_t at = 0;
    for (; at + LANES <= v; at += LANES)
      for (int j = 0; j < LANES; j++) top[j] = greater(z[at + j], top[j], z[at + j], top[j]);
    for (int j = 0; at + j < v; j++) top[j] = greater(z[at + j], top[j], z[at + j], top[j]);
    max = top[0];
    for (int j = 1; j < LANES; j++) max = greater(top[j], max, top[j], max);
    const float at_target = z[p->targets[r]];
    if (p->grad_scale == 0) {
      SUM_LANES(sum, v, exp_f32(z[e] - max));
    } else {
      EMXI_ELEMENTWISE
      for (int64_t i = 0; i < v; i++) z[i] = exp_f32(z[i] - max);
      SUM_LANES(sum, v, z[e]);
      const float scale = p->grad_scale / sum;
      EMXI_ELEMENTWISE
      for (int64_t i = 0; i < v; i++) z[i] *= scale;
      z[p->targets[r]] -= p->grad_scale;
    }
    p->nll[r] = logf(sum) + (max - at_target);
  }
}
static void entropy_task(void *arg, int64_t index, int32_t worker) {
  (void)worker;
  const struct entropy *p = arg;
  entropy_rows(p, index * p->tile, min64(p->tile, p->m - index * p->tile));
}
emx_status emxi_cross_entropy(emx_ctx *ctx, float *logits, const int32_t *targets, float *nll, float grad_scale, int64_t m,
                              int64_t v) {
  struct entropy p = {logits, targets, nll, grad_scale, m, v, span_rows(v)};
  return emxi_parallel(ctx, ceil_div(m, p.tile), entropy_task, &p);
}
