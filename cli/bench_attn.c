/* SPDX-License-Identifier: Apache-2.0
 * emx bench attn: causal attention of N queries over N keys, softmax (alpha = 1) and alpha-entmax in turn in every round, forward
 * and backward, on the CPU or a GPU. Sampled rows of the output and of the gradient of q are compared with float64. */
#include "bench.h"
#include "workload.h"

#include "base/backend.h"
#include "base/base.h"
#include "base/num.h"
#include "entmax/entmax.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CHECKED_HEADS = 4, CHECKED_ROWS = 6, DEVICE_RUNS = 5 /* calls that are timed together on a GPU */ };

typedef struct options {
  cli_common common;
  const char *data;
  bench_shape shape;
  int64_t list;
  int32_t dtype;
  double alpha;
  bool alibi, forward;
  cli_device device;
} options;
enum { KEY_DATA = 1, KEY_DTYPE, KEY_ALIBI, KEY_LIST, KEY_FORWARD, KEY_DEVICE };
static const struct argp_option option_table[] = {
    {"data", KEY_DATA, "W", 0, "iid (default), ar:RHO, topics[:SHIFT], outlier:C,GAIN or flat:STD", 1},
    {"dtype", KEY_DTYPE, "T", 0, "Of q, k and v: f32 (default), f16 or bf16; the backward pass writes f32", 1},
    {"alpha", 'a', "A", 0, "1 to 4, backward to 2 (default 1.5)", 1},
    {"alibi", KEY_ALIBI, NULL, 0, "ALiBi slopes 1/(h+1) on the first half of the heads", 1},
    {"list", KEY_LIST, "C", 0, "Capacity of the support lists that forward saves for backward; 0: none (default 64)", 1},
    {"forward", KEY_FORWARD, NULL, 0, "No backward pass", 1},
    {"device", KEY_DEVICE, "WHERE", 0, "cpu (default), cuda or cuda:N", 1},
    {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT:
      state->child_inputs[0] = &o->shape;
      state->child_inputs[1] = &o->common;
      return 0;
    case KEY_DATA: o->data = arg; return 0;
    case KEY_DTYPE: o->dtype = cli_dtype(state, "--dtype", arg, "f32, f16, bf16"); return 0;
    case 'a': o->alpha = cli_real(state, "--alpha", arg, 1, 4); return 0;
    case KEY_ALIBI: o->alibi = true; return 0;
    case KEY_LIST: o->list = cli_int(state, "--list", arg, 0, 1 << 20); return 0;
    case KEY_DEVICE: o->device = cli_device_arg(state, arg); return 0;
    case KEY_FORWARD: o->forward = true; return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
    case ARGP_KEY_END:
      if (o->alpha > 2 && !o->forward) argp_error(state, "--alpha %g has no backward pass; use --forward", o->alpha);
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

/* One alpha and one pass. */
typedef struct method {
  double alpha;
  int32_t pass;
  emx_attn_desc desc;
  emx_attn_io io;
  double *ms;
  double err, density;
} method;

typedef struct bench {
  const options *o;
  emx_ctx *ctx, *gpu;                  /* gpu NULL: the CPU is measured */
  void *q, *k, *v, *work, *blocks[16]; /* blocks: on the GPU */
  int n_blocks;
  float *out, *tau[2], *d_o, *d_q, *d_k, *d_v, *slopes;
  int32_t *support, *index;
  size_t work_bytes;
  emx_tensor tq, tk, tv, to, ttau[2], tsupport, tindex, tslopes, tdo, tdq, tdk, tdv;
  float scale;
  method methods[4];
  int n_methods;
} bench;

static void *take(size_t count, size_t size, size_t *total, bool *ok) {
  size_t bytes;
  void *p = emxi_mul(count, size, &bytes) ? emxi_alloc(bytes) : NULL;
  *total += count * size;
  *ok &= p != NULL;
  return p;
}

static emx_status fill(bench *b, const workload *w) {
  const options *o = b->o;
  const int64_t nk = o->shape.hkv * o->shape.n * o->shape.d;
  float *k = emxi_alloc((size_t)nk * sizeof *k), *v = emxi_alloc((size_t)nk * sizeof *v), q[256];
  emx_status status = k && v ? workload_tensors(b->ctx, 0, o->shape.hkv, o->shape.n, o->shape.d, w, k, v)
                             : emxi_fail(EMX_ERR_NOMEM, "no memory for %zu bytes", 2 * (size_t)nk * sizeof *k);
  for (int64_t i = 0; i < nk && !status; i++) {
    emxi_store(b->k, o->dtype, i, (double)k[i]);
    emxi_store(b->v, o->dtype, i, (double)v[i]);
  }
  for (int64_t i = 0; i < o->shape.n && !status; i++)
    for (int h = 0; h < o->shape.hq; h++) {
      const int64_t at = workload_pick(w, (int)i, 0, h, i + 1); /* a key that the query sees */
      workload_query(w, (int)i, 0, h, k + ((int64_t)(h / (o->shape.hq / o->shape.hkv)) * o->shape.n + at) * o->shape.d,
                     o->shape.d, q);
      for (int x = 0; x < o->shape.d; x++) emxi_store(b->q, o->dtype, (h * o->shape.n + i) * o->shape.d + x, (double)q[x]);
    }
  emxi_free(k);
  emxi_free(v);
  if (!status) emxi_normals(o->shape.seed, 77, b->d_o, o->shape.hq * o->shape.n * o->shape.d);
  for (int h = 0; h < o->shape.hq; h++) b->slopes[h] = o->alibi && h < (o->shape.hq + 1) / 2 ? 1.0f / (float)(h + 1) : 0;
  return status;
}

/* Moves a tensor to the GPU, with what the host's memory holds. */
static emx_status upload(bench *b, emx_tensor *t) {
  size_t bytes = emx_dtype_size(t->dtype);
  void *p;
  for (int d = 0; d < t->ndim; d++) bytes *= (size_t)t->shape[d];
  EMX_TRY(b->gpu->backend->memory_alloc(b->gpu, bytes, &p));
  b->blocks[b->n_blocks++] = p;
  EMX_TRY(b->gpu->backend->memory_copy(b->gpu, p, t->data, bytes));
  t->data = p;
  t->device = b->o->device.kind;
  t->device_index = b->o->device.index;
  return EMX_OK;
}
/* What check() and density() look at, back into the host's memory. */
static emx_status download(const bench *b, const method *m) {
  const size_t rows = (size_t)b->o->shape.hq * (size_t)b->o->shape.n, q = rows * (size_t)b->o->shape.d * sizeof(float);
  if (!b->gpu) return EMX_OK;
  const emxi_backend *copy = b->gpu->backend;
  if (m->pass == EMX_PASS_BACKWARD) return copy->memory_copy(b->gpu, b->d_q, b->tdq.data, q);
  EMX_TRY(copy->memory_copy(b->gpu, b->support, b->tsupport.data, rows * sizeof *b->support));
  return copy->memory_copy(b->gpu, b->out, b->to.data, q);
}

static emx_status prepare(bench *b) {
  const options *o = b->o;
  const int64_t sq[4] = {1, o->shape.hq, o->shape.n, o->shape.d}, sk[4] = {1, o->shape.hkv, o->shape.n, o->shape.d},
                si[4] = {1, o->shape.hq, o->shape.n, o->list};
  b->tq = emx_tensor_view(b->q, o->dtype, 4, sq);
  b->tk = emx_tensor_view(b->k, o->dtype, 4, sk);
  b->tv = emx_tensor_view(b->v, o->dtype, 4, sk);
  b->to = emx_tensor_view(b->out, EMX_F32, 4, sq);
  b->tdo = emx_tensor_view(b->d_o, EMX_F32, 4, sq);
  b->tdq = emx_tensor_view(b->d_q, EMX_F32, 4, sq);
  b->tdk = emx_tensor_view(b->d_k, EMX_F32, 4, sk);
  b->tdv = emx_tensor_view(b->d_v, EMX_F32, 4, sk);
  for (int i = 0; i < 2; i++) b->ttau[i] = emx_tensor_view(b->tau[i], EMX_F32, 3, sq);
  b->tsupport = emx_tensor_view(b->support, EMX_I32, 3, sq);
  b->tindex = emx_tensor_view(b->index, EMX_I32, 4, si);
  b->tslopes = emx_tensor_view(b->slopes, EMX_F32, 1, &sq[1]);
  emx_tensor *placed[] = {&b->tq,  &b->tk,      &b->tv,  &b->to,  &b->ttau[0], &b->ttau[1], &b->tsupport,
                          &b->tdo, &b->tslopes, &b->tdq, &b->tdk, &b->tdv,     &b->tindex};
  emx_ctx *ctx = b->gpu ? b->gpu : b->ctx;
  for (size_t i = 0; b->gpu && i < sizeof placed / sizeof *placed - !o->list; i++) EMX_TRY(upload(b, placed[i]));
  for (int a = 0; a < (o->alpha == 1 ? 1 : 2); a++)
    for (int32_t pass = EMX_PASS_FORWARD; pass <= (o->forward ? EMX_PASS_FORWARD : EMX_PASS_BACKWARD); pass++) {
      method *m = &b->methods[b->n_methods++];
      m->alpha = a ? o->alpha : 1;
      m->pass = pass;
      emx_attn_desc_init(&m->desc);
      emx_attn_io_init(&m->io);
      m->desc.alpha = m->alpha;
      m->desc.scale = b->scale;
      m->io.q = &b->tq, m->io.k = &b->tk, m->io.v = &b->tv;
      *(a ? &m->io.tau : &m->io.lse) = &b->ttau[a];
      if (o->alibi) m->io.alibi_slopes = &b->tslopes;
      if (a) m->io.support = &b->tsupport;
      if (a && o->list) m->io.support_index = &b->tindex;
      if (pass == EMX_PASS_FORWARD)
        m->io.o = &b->to;
      else
        m->io.d_o = &b->tdo, m->io.d_q = &b->tdq, m->io.d_k = &b->tdk, m->io.d_v = &b->tdv;
      size_t bytes;
      EMX_TRY(emx_attn_workspace_size(ctx, &m->desc, &m->io, pass, &bytes));
      if (bytes > b->work_bytes) b->work_bytes = bytes;
    }
  if (b->gpu) return b->gpu->backend->memory_alloc(b->gpu, b->work_bytes, &b->work);
  b->work = emxi_alloc(b->work_bytes);
  return b->work ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "no memory for %zu bytes", b->work_bytes);
}

/* Calls in a row, and what one takes; on a GPU from an idle device to an idle device. */
static emx_status run(const bench *b, const method *m, int times, double *seconds) {
  emx_ctx *ctx = b->gpu ? b->gpu : b->ctx;
  EMX_TRY(emx_ctx_sync(ctx));
  const double start = cli_seconds();
  for (int i = 0; i < times; i++)
    EMX_TRY((m->pass == EMX_PASS_FORWARD ? emx_attn_forward : emx_attn_backward)(ctx, &m->desc, &m->io, b->work, b->work_bytes));
  EMX_TRY(emx_ctx_sync(ctx));
  *seconds = (cli_seconds() - start) / times;
  return EMX_OK;
}

/* Relative L2 error of o, or of the gradient of q, over sampled rows; memory [3,n]. */
static double check(const bench *b, const method *m, double *memory) {
  const options *o = b->o;
  const int64_t d = o->shape.d;
  double err = 0, ref = 0, *z = memory, *p = memory + o->shape.n, *g = memory + 2 * o->shape.n;
  for (int hh = 0; hh < CHECKED_HEADS && hh < o->shape.hq; hh++)
    for (int r = 0; r < CHECKED_ROWS; r++) {
      const int h = (int)((int64_t)hh * o->shape.hq / (o->shape.hq < CHECKED_HEADS ? o->shape.hq : CHECKED_HEADS));
      const int64_t i = o->shape.n - 1 - r * (o->shape.n - 1) / CHECKED_ROWS, row = h * o->shape.n + i,
                    kv = (int64_t)(h / (o->shape.hq / o->shape.hkv)) * o->shape.n;
      double want[256] = {0}, sum_u = 0, sum_ug = 0;
      for (int64_t j = 0; j <= i; j++) {
        double dot = 0;
        for (int64_t x = 0; x < d; x++)
          dot += emxi_load(b->q, o->dtype, row * d + x) * emxi_load(b->k, o->dtype, (kv + j) * d + x);
        z[j] = dot * (double)b->scale - (double)b->slopes[h] * (double)(i - j);
      }
      emxi_oracle_entmax(z, i + 1, m->alpha, p, NULL);
      for (int64_t j = 0; j <= i; j++) {
        if (m->pass == EMX_PASS_FORWARD) {
          for (int64_t x = 0; x < d && p[j] > 0; x++) want[x] += p[j] * emxi_load(b->v, o->dtype, (kv + j) * d + x);
        } else {
          g[j] = 0;
          for (int64_t x = 0; x < d; x++) g[j] += (double)b->d_o[row * d + x] * emxi_load(b->v, o->dtype, (kv + j) * d + x);
          const double u = p[j] > 0 ? pow(p[j], 2 - m->alpha) : 0;
          sum_u += u;
          sum_ug += u * g[j];
        }
      }
      for (int64_t j = 0; j <= i && m->pass == EMX_PASS_BACKWARD; j++) {
        const double ds = p[j] > 0 ? (double)b->scale * pow(p[j], 2 - m->alpha) * (g[j] - sum_ug / sum_u) : 0;
        for (int64_t x = 0; x < d && p[j] > 0; x++) want[x] += ds * emxi_load(b->k, o->dtype, (kv + j) * d + x);
      }
      const float *got = m->pass == EMX_PASS_FORWARD ? b->out : b->d_q;
      for (int64_t x = 0; x < d; x++) {
        const double e = (double)got[row * d + x] - want[x];
        err += e * e;
        ref += want[x] * want[x];
      }
    }
  return sqrt(err / ref);
}

static double density(const bench *b, double alpha) {
  const options *o = b->o;
  double total = 0;
  for (int64_t i = 0; i < o->shape.hq * o->shape.n; i++) total += b->support[i];
  return alpha == 1 ? 1 : total / ((double)o->shape.hq * (double)o->shape.n * ((double)o->shape.n + 1) / 2);
}

static int report(const bench *b) {
  const options *o = b->o;
  int code = 0;
  if (!o->common.json)
    printf("%-8s %-9s %10s %10s %9s %11s %9s %9s\n", "alpha", "pass", "ms", "min", "mad", "vs_softmax", "density", "rel_err");
  for (int i = 0; i < b->n_methods && !code; i++) {
    const method *m = &b->methods[i], *base = &b->methods[m->pass == EMX_PASS_FORWARD ? 0 : 1];
    const bench_times t = bench_summary(m->ms, o->shape.rounds);
    const double ratio = bench_ratio(base->ms, m->ms, o->shape.rounds);
    const char *pass = m->pass == EMX_PASS_FORWARD ? "forward" : "backward";
    if (o->common.json) {
      code = cli_json_line(json_pack("{s:s, s:s, s:I, s:i, s:i, s:i, s:s, s:s, s:f, s:b, s:I, s:f, s:f, s:f, s:o, s:f, s:f}",
                                     "device", b->gpu ? "cuda" : "cpu", "data", o->data, "n", (json_int_t)o->shape.n, "h",
                                     o->shape.hq, "hkv", o->shape.hkv, "d", o->shape.d, "dtype", emx_dtype_name(o->dtype), "pass",
                                     pass, "alpha", m->alpha, "alibi", o->alibi, "list",
                                     (json_int_t)(m->alpha == 1 ? 0 : o->list), "ms", t.median, "ms_min", t.min, "ms_mad", t.mad,
                                     "vs_softmax", cli_json_real(ratio), "density", m->density, "rel_err", m->err));
    } else {
      printf("%-8g %-9s %10.2f %10.2f %9.2f %11.2f %9.4f %9.1e\n", m->alpha, pass, t.median, t.min, t.mad, ratio, m->density,
             m->err);
    }
  }
  return code ? code : cli_flush();
}

static void drop(bench *b) {
  if (b->gpu) {
    b->gpu->backend->memory_free(b->gpu, b->work);
    b->work = NULL;
    for (int i = 0; i < b->n_blocks; i++) b->gpu->backend->memory_free(b->gpu, b->blocks[i]);
    emx_ctx_destroy(b->gpu);
  }
  void *owned[] = {b->q,   b->k,   b->v,   b->work, b->out,    b->tau[0],  b->tau[1],
                   b->d_o, b->d_q, b->d_k, b->d_v,  b->slopes, b->support, b->index};
  for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) emxi_free(owned[i]);
  for (int i = 0; i < 4; i++) free(b->methods[i].ms);
  emx_ctx_destroy(b->ctx);
}

int bench_attn(int argc, char **argv) {
  static const struct argp_child children[] = {{&bench_shape_argp, 0, NULL, 0}, {&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Times causal attention of N tokens, softmax and alpha-entmax in turn in every round.\v"
          "Median, minimum and median absolute deviation over the rounds; vs_softmax is the median of the ratios within a round, "
          "against "
          "this library's own softmax; density is the share of visible pairs with a weight; rel_err is the relative error of "
          "sampled rows "
          "of the output (backward: of the gradient of q) against float64. bench/cpu/attn_vs_torch.py compares with PyTorch."};
  options o = {.data = "iid",
               .shape = {.n = 4096, .hq = 8, .hkv = 8, .d = 64, .rounds = 9, .seed = 1},
               .list = 64,
               .dtype = EMX_F32,
               .alpha = 1.5};
  cli_parse(&argp, argc, argv, &o);
  workload w;
  if (!workload_parse(o.data, o.shape.seed, &w)) {
    cli_warn("--data: '%s' is none of iid, ar:RHO, topics[:SHIFT], outlier:C,GAIN, flat:STD", o.data);
    return CLI_USAGE;
  }
  bench b = {.o = &o};
  int code = cli_context(&o.common, &b.ctx);
  if (code) return code;
  if (o.device.kind != EMX_DEVICE_CPU && (code = cli_context_on(&o.common, o.device, &b.gpu))) {
    drop(&b);
    return code;
  }
  const size_t es = emx_dtype_size(o.dtype), rows = (size_t)o.shape.hq * (size_t)o.shape.n, nq = rows * (size_t)o.shape.d,
               nk = (size_t)o.shape.hkv * (size_t)o.shape.n * (size_t)o.shape.d;
  size_t total = 0;
  bool ok = true;
  b.q = take(nq, es, &total, &ok), b.k = take(nk, es, &total, &ok), b.v = take(nk, es, &total, &ok);
  b.out = take(nq, 4, &total, &ok), b.d_o = take(nq, 4, &total, &ok), b.d_q = take(nq, 4, &total, &ok);
  b.d_k = take(nk, 4, &total, &ok), b.d_v = take(nk, 4, &total, &ok), b.slopes = take((size_t)o.shape.hq, 4, &total, &ok);
  b.tau[0] = take(rows, 4, &total, &ok), b.tau[1] = take(rows, 4, &total, &ok), b.support = take(rows, 4, &total, &ok);
  b.index = take(rows * (size_t)o.list, 4, &total, &ok);
  double *memory = take(3 * (size_t)o.shape.n, sizeof(double), &total, &ok);
  b.scale = workload_scale(&w, o.shape.d);
  if (!ok) {
    code = cli_nomem(total, "the tensors");
    goto done;
  }
  CLI_TRY(fill(&b, &w));
  CLI_TRY(prepare(&b));
  for (int i = 0; i < b.n_methods; i++)
    if (!(b.methods[i].ms = calloc((size_t)o.shape.rounds, sizeof(double)))) {
      code = cli_nomem((size_t)o.shape.rounds * sizeof(double), "the times");
      goto done;
    }
  for (int round = -1; round < o.shape.rounds; round++) /* a first round warms up, and is checked */
    for (int i = 0; i < b.n_methods; i++) {
      method *m = &b.methods[i];
      double seconds;
      CLI_TRY(run(&b, m, b.gpu && round >= 0 ? DEVICE_RUNS : 1, &seconds));
      if (round >= 0) {
        m->ms[round] = 1e3 * seconds;
        continue;
      }
      CLI_TRY(download(&b, m));
      m->err = check(&b, m, memory);
      m->density = density(&b, m->alpha);
    }
  code = report(&b);
done:
  emxi_free(memory);
  drop(&b);
  return code;
}
