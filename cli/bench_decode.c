/* SPDX-License-Identifier: Apache-2.0
 * emx bench decode: one query token per sequence against a paged cache. Softmax (alpha = 1) is the first method, then every
 * selector. Each round runs every method once on the same fresh query, and streams the cache through all workers once for the
 * read rate. The first query's results are compared with float64 attention over the cached, rounded keys.
 * On a GPU the pool of the CPU's cache is copied there, and a round's time is that of DEVICE_RUNS decodes in a row. */
#define _GNU_SOURCE
#include "bench.h"
#include "qkv.h"
#include "svg.h"
#include "workload.h"

#include "base/backend.h"
#include "base/num.h"
#include "entmax/entmax.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_BATCH = 64, CHECKED_HEADS = 4, APPEND = 512, MAX_FILES = 16, EVERY_HEAD = -2, DEVICE_RUNS = 16, DEVICE_BLOCKS = 16 };

typedef struct options {
  cli_common common;
  cli_select select;
  const char *data[MAX_FILES], *svg;
  int n_data;
  bench_shape shape;
  int page, batch, head; /* head: of a file; -1: all together, or EVERY_HEAD */
  int32_t dtype;
  double alpha; /* 0: not given */
  bool alibi, cuda;
  int32_t device_index;
} options;
enum { KEY_DATA = 1, KEY_DTYPE, KEY_PAGE, KEY_BATCH, KEY_ALIBI, KEY_HEAD, KEY_SVG, KEY_DEVICE };
static const struct argp_option option_table[] = {
    {"data", KEY_DATA, "W", 0,
     "iid (default), ar:RHO, topics[:SHIFT], outlier:C,GAIN, flat:STD, or FILE.safetensors with q [T,H,D], k, v [N,G,D], "
     "optionally alibi_slopes [H] and alphas [H]; up to 16 files",
     1},
    {"dtype", KEY_DTYPE, "T", 0, "Of the cache: bf16 (default), f16 or f32", 1},
    {"page", KEY_PAGE, "P", 0, "Tokens a page: 16 (default), 32 or 64", 1},
    {"batch", KEY_BATCH, "B", 0, "Sequences; more than one are ragged, from N down to N/2 tokens (default 1)", 1},
    {"alpha", 'a', "A", 0, "1 to 4 (default: the file's alphas or entmax_alpha, else 1.5)", 1},
    {"alibi", KEY_ALIBI, NULL, 0, "ALiBi slopes 1/(h+1) on the first half of the heads", 1},
    {"head", KEY_HEAD, "H", 0, "Only this query head of FILE, with its KV head, or `each` of them by itself (default: together)",
     1},
    {"svg", KEY_SVG, "FILE", 0, "Draw bytes and time of the last selector, of softmax's, a row a file; with --head each", 1},
    {"device", KEY_DEVICE, "WHERE", 0, "cpu (default), cuda or cuda:N", 1},
    {0}};
static bool is_file(const char *data) {
  const size_t n = strlen(data);
  return n > 12 && !strcmp(data + n - 12, ".safetensors");
}
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT:
      state->child_inputs[0] = &o->shape;
      state->child_inputs[1] = &o->select;
      state->child_inputs[2] = &o->common;
      return 0;
    case KEY_DATA:
      if (o->n_data == MAX_FILES) argp_error(state, "at most %d --data", MAX_FILES);
      o->data[o->n_data++] = arg;
      return 0;
    case KEY_SVG: o->svg = arg; return 0;
    case KEY_DTYPE: o->dtype = cli_dtype(state, "--dtype", arg, "bf16, f16, f32"); return 0;
    case KEY_PAGE: o->page = cli_page(state, arg); return 0;
    case KEY_BATCH: o->batch = (int)cli_int(state, "--batch", arg, 1, MAX_BATCH); return 0;
    case 'a': o->alpha = cli_real(state, "--alpha", arg, 1, 4); return 0;
    case KEY_DEVICE: {
      const cli_device device = cli_device_arg(state, arg);
      o->cuda = device.kind == EMX_DEVICE_CUDA;
      o->device_index = device.index;
      return 0;
    }
    case KEY_ALIBI: o->alibi = true; return 0;
    case KEY_HEAD: o->head = strcmp(arg, "each") ? (int)cli_int(state, "--head", arg, 0, 4095) : EVERY_HEAD; return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
    case ARGP_KEY_END:
      if (!o->n_data) o->data[o->n_data++] = "iid";
      for (int i = 0; i < o->n_data; i++) {
        workload w;
        if (is_file(o->data[i])) {
          if (o->batch > 1) argp_error(state, "--batch is %d, a file holds one sequence", o->batch);
          continue;
        }
        if (!workload_parse(o->data[i], o->shape.seed, &w))
          argp_error(state, "--data is '%s', expected iid, ar:RHO, topics[:SHIFT], outlier:C,GAIN, flat:STD or FILE.safetensors",
                     o->data[i]);
        if (o->head != -1) argp_error(state, "--head needs --data FILE.safetensors");
      }
      if (o->svg && o->head != EVERY_HEAD) argp_error(state, "--svg needs --head each");
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

typedef struct method {
  const char *name; /* softmax, or the selector's */
  emx_select_desc select;
  double alpha; /* of all heads, unless `alphas` has each head's */
  const double *alphas;
  double *ms;                   /* [rounds] */
  emx_report *reports;          /* [B,H], of the last round run */
  double bytes;                 /* sum over the timed rounds */
  bool certified;               /* every row of every timed round */
  double bound;                 /* largest delta_bound of the timed rounds */
  uint8_t path;                 /* of the last row */
  double err_sq, ref_sq, delta; /* of the checked rows */
} method;

typedef struct bench {
  const options *o;
  const char *data;
  int head; /* of a file, or -1 */
  emx_ctx *ctx;
  emx_kv *kv;
  workload w;
  float *file_q; /* [T,H,D] of FILE */
  int64_t file_queries;
  double alpha;
  float scale, *slopes;
  double *alphas; /* [H] of FILE, or NULL */
  int B, H, G, D;
  int32_t seqs[MAX_BATCH];
  int64_t lengths[MAX_BATCH], max_len;
  emx_tensor k, v; /* pool views [M,G,P,D] */
  float *q, *out;  /* [B,H,D] */
  emx_tensor tq, to, ts, ta;
  void *work;
  size_t work_bytes;
  method methods[CLI_MAX_SELECT + 1];
  int n_methods;
  double *read_s;
  /* On a GPU: its context, a cache over a copy of the pool, and copies of the tensors; blocks is all its memory. */
  emx_ctx *gpu;
  emx_kv *gpu_kv;
  emx_tensor gpu_q, gpu_o, gpu_slopes, gpu_table, gpu_lengths;
  emx_report *gpu_reports;
  void *gpu_work, *blocks[DEVICE_BLOCKS];
  int n_blocks;
} bench;

/* ---- data */

static int64_t offset_of(const bench *b, const emx_tensor *t, int seq, int g, int64_t pos) {
  const int32_t *pages;
  int64_t n;
  if (emx_seq_block_table(b->kv, b->seqs[seq], &pages, &n)) return -1;
  return pages[pos / b->o->page] * t->stride[0] + g * t->stride[1] + pos % b->o->page * t->stride[2];
}

static emx_status make_cache(bench *b) {
  const options *o = b->o;
  emx_kv_opts kv;
  emx_kv_opts_init(&kv);
  kv.dtype = o->dtype;
  kv.kv_heads = b->G;
  kv.head_dim = b->D;
  kv.page_size = o->page;
  kv.summaries = o->cuda ? 0 : EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS | cli_sketches(&o->select);
  kv.max_seqs = b->B;
  for (int i = 0; i < b->B; i++) kv.max_pages += (b->lengths[i] + o->page - 1) / o->page;
  EMX_TRY(emx_kv_create(b->ctx, &kv, &b->kv));
  for (int i = 0; i < b->B; i++) EMX_TRY(emx_seq_create(b->kv, &b->seqs[i]));
  return emx_kv_pool_view(b->kv, &b->k, &b->v);
}

static emx_status fill_synthetic(bench *b) {
  cli_progress progress;
  cli_progress_init(&progress, "generating");
  for (int i = 0; i < b->B; i++) {
    cli_progress_text(&progress, i, b->B, NULL);
    EMX_TRY(workload_append(b->ctx, b->kv, b->seqs[i], i, b->lengths[i], &b->w));
  }
  cli_progress_end(&progress);
  return EMX_OK;
}

static emx_status find(const emx_checkpoint *ck, const char *name, int ndim, emx_tensor *t) {
  EMX_TRY(emx_checkpoint_find(ck, name, t));
  if (t->ndim != ndim || (t->dtype != EMX_F32 && t->dtype != EMX_F16 && t->dtype != EMX_BF16))
    return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s must be f32, f16 or bf16 with %d dimensions", "--data", name, ndim);
  return EMX_OK;
}
/* One number a query head of the file; no data where it has none. */
static emx_status find_heads(const emx_checkpoint *ck, const char *name, int64_t heads, emx_tensor *t) {
  if (emx_checkpoint_find(ck, name, t))
    t->data = NULL;
  else if (t->ndim != 1 || t->shape[0] != heads || t->dtype == EMX_I32)
    return emxi_fail(EMX_ERR_SHAPE, "--data: %s must be [%lld], floating", name, (long long)heads);
  return EMX_OK;
}
/* q [T,H,D], k and v [N,G,D]; a round takes one of the queries, as if it were the last. */
static emx_status load_file(bench *b, const emx_checkpoint *ck, int64_t *file_heads) {
  emx_tensor q, k, v, slopes, alphas;
  EMX_TRY(find(ck, "q", 3, &q));
  EMX_TRY(find(ck, "k", 3, &k));
  EMX_TRY(find(ck, "v", 3, &v));
  const int64_t heads = q.shape[1], kv_heads = k.shape[1];
  if (q.shape[0] < 1 || k.shape[0] < 1 || q.shape[2] != k.shape[2] || memcmp(k.shape, v.shape, 3 * sizeof *k.shape) ||
      kv_heads < 1 || heads < 1 || heads % kv_heads)
    return emxi_fail(EMX_ERR_SHAPE, "--data: expected q [T,H,D], k and v [N,G,D] with H a multiple of G and T, N at least 1");
  const bool one = b->head >= 0;
  if (b->head >= heads) return emxi_fail(EMX_ERR_INVALID, "--head is %d, the file's last is %lld", b->head, (long long)heads - 1);
  const int64_t first = one ? b->head : 0, first_kv = one ? first / (heads / kv_heads) : 0; /* of the heads that are taken */
  *file_heads = heads;
  b->H = one ? 1 : (int)heads;
  b->G = one ? 1 : (int)kv_heads;
  b->D = (int)k.shape[2];
  b->lengths[0] = b->max_len = k.shape[0];
  b->scale = 0;
  b->file_queries = q.shape[0];
  const int64_t row = (int64_t)b->G * b->D, wide = (int64_t)b->H * b->D;
  b->file_q = emxi_alloc((size_t)(b->file_queries * wide) * sizeof *b->file_q);
  float *chunk = emxi_alloc((size_t)(2 * APPEND * row) * sizeof *chunk);
  emx_status status = b->file_q && chunk ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "no memory for queries and a chunk of keys");
  for (int64_t t = 0; !status && t < b->file_queries; t++)
    for (int64_t i = 0; i < wide; i++) b->file_q[t * wide + i] = (float)cli_element(&q, (t * heads + first) * b->D + i);
  if (!status) status = make_cache(b);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = b->seqs;
  for (int64_t from = 0; !status && from < b->max_len; from += APPEND) {
    const int64_t n = b->max_len - from < APPEND ? b->max_len - from : APPEND;
    const emx_tensor *source[2] = {&k, &v};
    emx_tensor part[2];
    for (int s = 0; s < 2; s++) { /* [N,G,D] -> [1,G,n,D] by strides */
      float *at = chunk + s * APPEND * row;
      for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < row; i++)
          at[t * row + i] = (float)cli_element(source[s], ((from + t) * kv_heads + first_kv) * b->D + i);
      part[s] = emx_tensor_view(at, EMX_F32, 4, (int64_t[4]){1, b->G, n, b->D});
      part[s].stride[1] = b->D;
      part[s].stride[2] = row;
    }
    status = emx_kv_append(b->ctx, b->kv, &batch, &part[0], &part[1], NULL);
  }
  emxi_free(chunk);
  EMX_TRY(status);
  EMX_TRY(find_heads(ck, "alibi_slopes", heads, &slopes));
  EMX_TRY(find_heads(ck, "alphas", heads, &alphas));
  if (b->o->alpha > 0) alphas.data = NULL; /* --alpha says otherwise */
  if (slopes.data) b->slopes = emxi_alloc((size_t)b->H * sizeof *b->slopes);
  if (alphas.data) b->alphas = emxi_alloc((size_t)b->H * sizeof *b->alphas);
  if ((slopes.data && !b->slopes) || (alphas.data && !b->alphas))
    return emxi_fail(EMX_ERR_NOMEM, "no memory for slopes and alphas");
  for (int h = 0; h < b->H; h++) {
    if (b->slopes) b->slopes[h] = (float)cli_element(&slopes, first + h);
    if (b->alphas) b->alphas[h] = cli_element(&alphas, first + h);
  }
  return EMX_OK;
}

static void make_queries(bench *b, int round) {
  for (int s = 0; s < b->B; s++)
    for (int h = 0; h < b->H; h++) {
      float *q = b->q + ((int64_t)s * b->H + h) * b->D, key[256];
      if (b->file_q) {
        const int64_t t = b->file_queries - 1 - round % b->file_queries; /* the last first */
        memcpy(q, b->file_q + (t * b->H + h) * b->D, (size_t)b->D * sizeof *q);
        continue;
      }
      int64_t pos = workload_pick(&b->w, round, s, h, b->lengths[s]), at = offset_of(b, &b->k, s, h / (b->H / b->G), pos);
      for (int x = 0; x < b->D; x++) key[x] = (float)emxi_load(b->k.data, b->k.dtype, at + x);
      workload_query(&b->w, round, s, h, key, b->D, q);
    }
}

/* ---- running */

static emx_decode_io make_io(bench *b, const method *m) {
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.alpha = m->alpha;
  io.alphas = m->alphas ? &b->ta : NULL;
  io.scale = b->scale;
  io.q = &b->tq;
  io.o = &b->to;
  io.alibi_slopes = b->slopes ? &b->ts : NULL;
  io.reports = m->reports;
  return io;
}
static emx_kv_batch make_batch(const bench *b) {
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = b->B;
  batch.seqs = b->seqs;
  return batch;
}

/* ---- on a GPU */

/* Device memory of the bench; what `from` holds (NULL: nothing) is copied there. */
static emx_status upload(bench *b, const void *from, size_t bytes, void **out) {
  void *p;
  if (b->n_blocks == DEVICE_BLOCKS) return emxi_fail(EMX_ERR_INTERNAL, "more than %d blocks of device memory", DEVICE_BLOCKS);
  EMX_TRY(b->gpu->backend->memory_alloc(b->gpu, bytes, &p));
  *out = b->blocks[b->n_blocks++] = p;
  return from ? b->gpu->backend->memory_copy(b->gpu, p, from, bytes) : EMX_OK;
}
/* The same tensor in device memory. */
static emx_status upload_tensor(bench *b, const emx_tensor *t, emx_tensor *out) {
  size_t bytes = emx_dtype_size(t->dtype);
  for (int d = 0; d < t->ndim; d++) bytes *= (size_t)t->shape[d];
  *out = *t;
  out->device = EMX_DEVICE_CUDA;
  out->device_index = b->o->device_index;
  return upload(b, t->data, bytes, &out->data);
}
/* Every page of the copied pool; an open one describes what nobody asks for, the newest page is read. */
static emx_status summarize_gpu(bench *b, int64_t pages) {
  int32_t *ids = emxi_alloc((size_t)pages * sizeof *ids);
  if (!ids) return emxi_fail(EMX_ERR_NOMEM, "no memory for %lld page numbers", (long long)pages);
  for (int64_t i = 0; i < pages; i++) ids[i] = (int32_t)i;
  const emx_tensor host = emx_tensor_view(ids, EMX_I32, 1, &pages);
  emx_tensor list;
  emx_status status = upload_tensor(b, &host, &list);
  emxi_free(ids);
  return status ? status : emx_kv_summarize(b->gpu, b->gpu_kv, &list, NULL);
}
static emx_status prepare_gpu(bench *b) {
  const options *o = b->o;
  const int64_t columns = (b->max_len + o->page - 1) / o->page;
  emx_tensor k, v;
  EMX_TRY(upload_tensor(b, &b->k, &k));
  EMX_TRY(upload_tensor(b, &b->v, &v));
  emx_kv_opts kv;
  emx_kv_opts_init(&kv);
  kv.dtype = o->dtype;
  kv.kv_heads = b->G;
  kv.head_dim = b->D;
  kv.page_size = o->page;
  kv.summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS | (cli_sketches(&o->select) & EMX_SUMMARY_SKETCH);
  kv.max_seqs = 1;
  kv.max_pages = b->k.shape[0];
  kv.k_pool = &k;
  kv.v_pool = &v;
  for (int i = 0; i < o->select.n; i++) {
    if (o->select.desc[i].kind == EMX_SELECT_TOPK) kv.summaries |= EMX_SUMMARY_MINMAX;
    if (o->select.desc[i].kind == EMX_SELECT_GAUSSIAN) kv.summaries |= EMX_SUMMARY_MOMENTS;
  }
  EMX_TRY(emx_kv_create(b->gpu, &kv, &b->gpu_kv));
  if (kv.summaries) EMX_TRY(summarize_gpu(b, kv.max_pages));
  int32_t *table = emxi_calloc((size_t)(b->B * columns) * sizeof *table), lengths[MAX_BATCH];
  if (!table) return emxi_fail(EMX_ERR_NOMEM, "no memory for block tables");
  emx_status status = EMX_OK;
  for (int i = 0; i < b->B && !status; i++) {
    const int32_t *pages;
    int64_t n = 0;
    lengths[i] = (int32_t)b->lengths[i];
    status = emx_seq_block_table(b->kv, b->seqs[i], &pages, &n);
    if (!status) memcpy(table + i * columns, pages, (size_t)n * sizeof *table);
  }
  const emx_tensor tables = emx_tensor_view(table, EMX_I32, 2, (int64_t[2]){b->B, columns}),
                   counts = emx_tensor_view(lengths, EMX_I32, 1, (int64_t[1]){b->B});
  if (!status) status = upload_tensor(b, &tables, &b->gpu_table);
  if (!status) status = upload_tensor(b, &counts, &b->gpu_lengths);
  for (int i = 0; i < b->B && !status; i++) { /* summaries: the pages are not the library's own */
    int64_t n = (b->lengths[i] + o->page - 1) / o->page;
    emx_tensor pages = emx_tensor_view((int32_t *)b->gpu_table.data + i * columns, EMX_I32, 1, &n), fill, on_device;
    pages.device = EMX_DEVICE_CUDA;
    pages.device_index = o->device_index;
    for (int64_t p = 0; p < n; p++) table[p] = (int32_t)(p < n - 1 ? o->page : b->lengths[i] - p * o->page);
    fill = emx_tensor_view(table, EMX_I32, 1, &n);
    status = upload_tensor(b, &fill, &on_device);
    if (!status) status = emx_kv_summarize(b->gpu, b->gpu_kv, &pages, &on_device);
  }
  emxi_free(table);
  EMX_TRY(status);
  EMX_TRY(upload_tensor(b, &b->tq, &b->gpu_q));
  EMX_TRY(upload_tensor(b, &b->to, &b->gpu_o));
  if (b->slopes) EMX_TRY(upload_tensor(b, &b->ts, &b->gpu_slopes));
  void *reports = NULL;
  EMX_TRY(upload(b, NULL, (size_t)(b->B * b->H) * sizeof(emx_report), &reports));
  b->gpu_reports = reports;
  return EMX_OK;
}
static emx_status run_gpu(bench *b, method *m, int times, double *seconds) {
  const size_t cells = (size_t)(b->B * b->H * b->D) * sizeof(float);
  emx_decode_io io = make_io(b, m);
  io.q = &b->gpu_q;
  io.o = &b->gpu_o;
  io.alibi_slopes = b->slopes ? &b->gpu_slopes : NULL;
  io.reports = b->gpu_reports;
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = b->B;
  batch.block_table = &b->gpu_table;
  batch.seq_lens = &b->gpu_lengths;
  batch.max_len = b->max_len;
  EMX_TRY(b->gpu->backend->memory_copy(b->gpu, b->gpu_q.data, b->q, cells));
  const double start = cli_seconds();
  for (int i = 0; i < times; i++) EMX_TRY(emx_decode(b->gpu, b->gpu_kv, &batch, &m->select, &io, b->gpu_work, b->work_bytes));
  EMX_TRY(emx_ctx_sync(b->gpu));
  *seconds = (cli_seconds() - start) / times;
  EMX_TRY(b->gpu->backend->memory_copy(b->gpu, b->out, b->gpu_o.data, cells));
  return b->gpu->backend->memory_copy(b->gpu, m->reports, b->gpu_reports, (size_t)(b->B * b->H) * sizeof(emx_report));
}
static emx_status make_workspace(bench *b) {
  for (int i = 0; i < b->n_methods; i++) {
    emx_decode_io io = make_io(b, &b->methods[i]);
    size_t bytes;
    if (b->gpu) io.q = &b->gpu_q;
    EMX_TRY(emx_decode_workspace_size(b->gpu ? b->gpu : b->ctx, b->gpu ? b->gpu_kv : b->kv, &b->methods[i].select, &io,
                                      b->max_len, &bytes));
    if (bytes > b->work_bytes) b->work_bytes = bytes;
  }
  if (b->gpu) return upload(b, NULL, b->work_bytes, &b->gpu_work);
  b->work = emxi_alloc(b->work_bytes);
  return b->work ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "no memory for a workspace of %zu bytes", b->work_bytes);
}

static emx_status timed(bench *b, method *m, double *seconds) {
  if (b->gpu) return run_gpu(b, m, DEVICE_RUNS, seconds);
  emx_decode_io io = make_io(b, m);
  emx_kv_batch batch = make_batch(b);
  const double start = cli_seconds();
  EMX_TRY(emx_decode(b->ctx, b->kv, &batch, &m->select, &io, b->work, b->work_bytes));
  *seconds = cli_seconds() - start;
  return EMX_OK;
}
static emx_status run(bench *b, method *m) {
  double seconds;
  return b->gpu ? run_gpu(b, m, 1, &seconds) : timed(b, m, &seconds);
}

static double alpha_of(const method *m, int h) { return m->alphas ? m->alphas[h] : m->alpha; }

/* Bytes that came from memory: the heads of a group read the same keys (and for softmax the same values) together. */
static double bytes_moved(const bench *b, const method *m) {
  double total = 0;
  const int group = b->H / b->G;
  for (int row = 0; row < b->B * b->G; row++) {
    int64_t k = 0, v = 0, v_all = 0;
    for (int h = 0; h < group; h++) {
      const emx_report *r = &m->reports[row * group + h];
      if (r->bytes_k + r->bytes_meta > k) k = r->bytes_k + r->bytes_meta;
      if (alpha_of(m, row % b->G * group + h) > 1)
        v += r->bytes_v;
      else if (r->bytes_v > v_all)
        v_all = r->bytes_v;
    }
    total += (double)(k + v + v_all);
  }
  return total;
}
static void account(const bench *b, method *m) {
  m->bytes += bytes_moved(b, m);
  for (int i = 0; i < b->B * b->H; i++) {
    const emx_report *r = &m->reports[i];
    m->certified &= (r->flags & EMX_REPORT_CERTIFIED) != 0;
    m->bound = fmax(m->bound, r->delta_bound);
    m->path = r->path;
  }
}

/* ---- float64 attention of one head of sequence 0 */

typedef struct dense {
  double *s, *p, *o; /* [n], [n], [D] */
} dense;
static void dense_head(bench *b, int h, double alpha, dense *d) {
  const int g = h / (b->H / b->G);
  const int64_t n = b->lengths[0];
  const float *q = b->q + (int64_t)h * b->D;
  const double scale = b->scale != 0 ? b->scale : 1 / sqrt(b->D);
  for (int64_t j = 0; j < n; j++) {
    int64_t at = offset_of(b, &b->k, 0, g, j);
    double dot = 0;
    for (int x = 0; x < b->D; x++) dot += q[x] * emxi_load(b->k.data, b->k.dtype, at + x);
    d->s[j] = scale * dot + (b->slopes ? (double)b->slopes[h] * (double)(j - (n - 1)) : 0);
  }
  emxi_oracle_entmax(d->s, n, alpha, d->p, NULL);
  memset(d->o, 0, (size_t)b->D * sizeof *d->o);
  for (int64_t j = 0; j < n; j++) {
    if (d->p[j] == 0) continue;
    int64_t at = offset_of(b, &b->v, 0, g, j);
    for (int x = 0; x < b->D; x++) d->o[x] += d->p[j] * emxi_load(b->v.data, b->v.dtype, at + x);
  }
}

/* Mass of the tokens that the selector left out for head h. */
static emx_status dropped(bench *b, const method *m, int h, const double *p, double *delta) {
  *delta = 0;
  if (m->select.kind == EMX_SELECT_ALL || m->reports[h].path == EMX_PATH_ALL) return EMX_OK;
  /* CERTIFIED leaves out tokens, not pages: what a certificate says is checked by rel_err. A GPU's lists are not fetched. */
  if (m->select.kind == EMX_SELECT_CERTIFIED || b->gpu) {
    if (!(m->reports[h].flags & EMX_REPORT_CERTIFIED)) *delta = NAN;
    return EMX_OK;
  }
  const int64_t rows = (int64_t)b->B * b->H, width = (b->max_len + b->o->page - 1) / b->o->page;
  int32_t *pages = emxi_alloc((size_t)(rows * width) * sizeof *pages), *count = emxi_alloc((size_t)rows * sizeof *count);
  char *read = emxi_calloc((size_t)width);
  emx_status status = pages && count && read ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "no memory for page lists");
  if (!status) {
    emx_tensor tp = emx_tensor_view(pages, EMX_I32, 4, (int64_t[4]){b->B, b->H, 1, width}),
               tc = emx_tensor_view(count, EMX_I32, 3, (int64_t[3]){b->B, b->H, 1});
    emx_decode_io io = make_io(b, m);
    io.o = NULL;
    io.reports = NULL;
    io.pages = &tp;
    io.n_pages = &tc;
    emx_kv_batch batch = make_batch(b);
    status = emx_select(b->ctx, b->kv, &batch, &m->select, &io, b->work, b->work_bytes);
  }
  if (!status) {
    for (int32_t i = 0; i < count[h]; i++) read[pages[h * width + i]] = 1;
    for (int64_t j = 0; j < b->lengths[0]; j++)
      if (!read[j / b->o->page]) *delta += p[j];
  }
  emxi_free(pages);
  emxi_free(count);
  emxi_free(read);
  return status;
}

/* Compares every method's output for the present query with float64. */
static emx_status check(bench *b) {
  const int heads = b->H < CHECKED_HEADS ? b->H : CHECKED_HEADS;
  const size_t n = (size_t)b->lengths[0];
  dense d = {emxi_alloc(n * sizeof(double)), emxi_alloc(n * sizeof(double)), emxi_alloc((size_t)b->D * sizeof(double))};
  emx_status status = d.s && d.p && d.o ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "no memory for the float64 check");
  cli_progress progress;
  cli_progress_init(&progress, "checking against float64");
  float *outs = emxi_alloc((size_t)b->n_methods * (size_t)b->H * (size_t)b->D * sizeof *outs);
  if (!status && !outs) status = emxi_fail(EMX_ERR_NOMEM, "no memory for outputs");
  for (int m = 0; m < b->n_methods && !status; m++) {
    status = run(b, &b->methods[m]);
    memcpy(outs + (int64_t)m * b->H * b->D, b->out, (size_t)(b->H * b->D) * sizeof *outs);
  }
  for (int i = 0; i < heads && !status; i++) {
    const int h = i * b->H / heads;
    cli_progress_text(&progress, i, heads, NULL);
    for (int m = 0; m < b->n_methods && !status; m++) {
      method *t = &b->methods[m];
      if (m == 0 || alpha_of(t, h) != alpha_of(t - 1, h)) dense_head(b, h, alpha_of(t, h), &d);
      for (int x = 0; x < b->D; x++) {
        t->err_sq += pow(outs[((int64_t)m * b->H + h) * b->D + x] - d.o[x], 2);
        t->ref_sq += d.o[x] * d.o[x];
      }
      double delta;
      status = dropped(b, t, h, d.p, &delta);
      t->delta = fmax(t->delta, delta);
    }
  }
  cli_progress_end(&progress);
  emxi_free(d.s), emxi_free(d.p), emxi_free(d.o), emxi_free(outs);
  return status;
}

/* ---- the benchmark */

static emx_status prepare(bench *b) {
  const options *o = b->o;
  const size_t rows = (size_t)(b->B * b->H), cells = rows * (size_t)b->D;
  b->q = emxi_alloc(cells * sizeof *b->q);
  b->out = emxi_alloc(cells * sizeof *b->out);
  b->read_s = emxi_calloc((size_t)o->shape.rounds * sizeof *b->read_s);
  if (o->alibi && !b->slopes) {
    b->slopes = emxi_alloc((size_t)b->H * sizeof *b->slopes);
    for (int h = 0; b->slopes && h < b->H; h++) b->slopes[h] = h < b->H / 2 ? 1.0f / (float)(h + 1) : 0;
  }
  if (!b->q || !b->out || !b->read_s || (o->alibi && !b->slopes)) return emxi_fail(EMX_ERR_NOMEM, "no memory for queries");
  b->tq = emx_tensor_view(b->q, EMX_F32, 4, (int64_t[4]){b->B, b->H, 1, b->D});
  b->to = emx_tensor_view(b->out, EMX_F32, 4, (int64_t[4]){b->B, b->H, 1, b->D});
  b->ts = emx_tensor_view(b->slopes, EMX_F32, 1, (int64_t[1]){b->H});
  b->ta = emx_tensor_view(b->alphas, EMX_F64, 1, (int64_t[1]){b->H});
  /* softmax over everything comes first: it is what the others are compared with */
  method *m = &b->methods[b->n_methods++];
  m->name = "softmax";
  emx_select_desc_init(&m->select);
  m->alpha = 1;
  for (int i = 0; i < o->select.n; i++) {
    if (b->alpha == 1 && !b->alphas && o->select.desc[i].kind == EMX_SELECT_ALL) continue; /* the row above */
    m = &b->methods[b->n_methods++];
    m->name = cli_select_name(o->select.desc[i].kind);
    m->select = o->select.desc[i];
    m->alpha = b->alpha;
    m->alphas = b->alphas;
  }
  for (int i = 0; i < b->n_methods; i++) {
    m = &b->methods[i];
    m->ms = emxi_calloc((size_t)o->shape.rounds * sizeof *m->ms);
    m->reports = emxi_calloc(rows * sizeof *m->reports);
    m->certified = true;
    if (!m->ms || !m->reports) return emxi_fail(EMX_ERR_NOMEM, "no memory for reports");
  }
  if (b->gpu) EMX_TRY(prepare_gpu(b));
  return make_workspace(b);
}

static size_t pool_bytes(const emx_tensor *t) {
  return (size_t)(t->shape[0] * t->shape[1] * t->shape[2] * t->shape[3]) * emx_dtype_size(t->dtype);
}
static emx_status measure(bench *b) {
  const int rounds = b->o->shape.rounds;
  cli_progress progress;
  make_queries(b, 0);
  EMX_TRY(check(b));
  cli_progress_init(&progress, "measuring");
  for (int round = -BENCH_WARMUP; round < rounds; round++) {
    make_queries(b, round + BENCH_WARMUP);
    for (int i = 0; i < b->n_methods; i++) {
      method *m = &b->methods[i];
      double seconds;
      EMX_TRY(timed(b, m, &seconds));
      if (round < 0) continue;
      m->ms[round] = 1e3 * seconds;
      account(b, m);
    }
    double seconds = NAN; /* the read rate is the CPU's */
    if (!b->gpu) seconds = bench_read(b->ctx, b->k.data, pool_bytes(&b->k)) + bench_read(b->ctx, b->v.data, pool_bytes(&b->v));
    if (round >= 0) b->read_s[round] = seconds;
    cli_progress_text(&progress, round + BENCH_WARMUP + 1, rounds + BENCH_WARMUP, NULL);
  }
  cli_progress_end(&progress);
  return EMX_OK;
}

static int report(bench *b) {
  const options *o = b->o;
  const double read_gbps = 1e-9 * (double)(pool_bytes(&b->k) + pool_bytes(&b->v)) / cli_median(b->read_s, o->shape.rounds);
  int code = CLI_OK;
  if (!o->common.json) {
    if (b->head >= 0) printf("head %d of ", b->head);
    printf("%s, n %lld, %d/%d heads of %d, %s, page %d, batch %d", b->data, (long long)b->max_len, b->H, b->G, b->D,
           emx_dtype_name(o->dtype), o->page, b->B);
    if (b->gpu)
      printf("; cuda\n");
    else
      printf("; read rate %.1f GB/s\n", read_gbps);
    printf("%-10s %-6s %9s %9s %8s %10s %11s %7s %9s %9s %11s %s\n", "select", "path", "ms", "min", "mad", "vs_softmax", "bytes",
           "GB/s", "rel_err", "delta", "delta_bound", "certified");
  }
  for (int i = 0; i < b->n_methods && !code; i++) {
    method *m = &b->methods[i];
    const bench_times t = bench_summary(m->ms, o->shape.rounds);
    const double ratio = bench_ratio(b->methods[0].ms, m->ms, o->shape.rounds), bytes = m->bytes / o->shape.rounds,
                 gbps = 1e-6 * bytes / t.median;
    const double rel_err = sqrt(m->err_sq / m->ref_sq);
    if (o->common.json) {
      json_t *j =
          json_pack("{s:s, s:s, s:I, s:i, s:i, s:i, s:s, s:i, s:i, s:f, s:s, s:s}", "device", b->gpu ? "cuda" : "cpu", "data",
                    b->data, "n", (json_int_t)b->max_len, "hq", b->H, "hkv", b->G, "d", b->D, "dtype", emx_dtype_name(o->dtype),
                    "page", o->page, "batch", b->B, "alpha", m->alpha, "select", m->name, "path", cli_path_name(m->path));
      json_t *numbers = json_pack("{s:f, s:f, s:f, s:o, s:I, s:f, s:o, s:o, s:o, s:f, s:b}", "ms", t.median, "ms_min", t.min,
                                  "ms_mad", t.mad, "vs_softmax", cli_json_real(ratio), "bytes", (json_int_t)(bytes + 0.5), "gbps",
                                  gbps, "read_gbps", cli_json_real(read_gbps), "rel_err", cli_json_real(rel_err), "delta",
                                  cli_json_real(m->delta), "delta_bound", m->bound, "certified", (int)m->certified);
      if (j && numbers) json_object_update(j, numbers);
      if (j && m->alphas) {
        json_t *alphas = json_array();
        for (int h = 0; h < b->H; h++) json_array_append_new(alphas, json_real(m->alphas[h]));
        json_object_set_new(j, "alpha", json_null());
        json_object_set_new(j, "alphas", alphas);
      }
      if (j && m->select.kind == EMX_SELECT_TOPK) json_object_set_new(j, "budget", json_integer(m->select.budget));
      if (j && b->head >= 0) json_object_set_new(j, "head", json_integer(b->head));
      json_decref(numbers);
      code = cli_json_line(j);
    } else {
      char label[32];
      printf("%-10s %-6s %9.3f %9.3f %8.3f %10.2f %11.0f %7.1f %9.1e %9.1e %11.1e %s\n",
             i ? cli_select_label(&m->select, label) : m->name, cli_path_name(m->path), t.median, t.min, t.mad, ratio, bytes,
             gbps, rel_err, m->delta, m->bound, m->certified ? "yes" : "no");
    }
  }
  return code ? code : cli_flush();
}

/* What --svg shows. */
enum { MAX_HEADS = 64 };
typedef struct picture {
  double bytes[MAX_FILES][MAX_HEADS], time[MAX_FILES][MAX_HEADS]; /* of softmax's */
  int rows, heads;
  int64_t n;
} picture;
static int draw(const options *o, const picture *p) {
  char rows[MAX_FILES][24], columns[MAX_HEADS][12], panels[2][40], title[96];
  const char *row[MAX_FILES], *column[MAX_HEADS], *panel[2] = {panels[0], panels[1]};
  double values[2 * MAX_FILES * MAX_HEADS], floor[MAX_FILES] = {0};
  const char *select = cli_select_name(o->select.desc[o->select.n - 1].kind);
  for (int i = 0; i < p->rows; i++) {
    const char *slash = strrchr(o->data[i], '/'), *name = slash ? slash + 1 : o->data[i];
    const int length = (int)strlen(name) - 12; /* .safetensors */
    snprintf(rows[i], sizeof rows[i], "%.*s", length < 16 ? length : 16, name);
    row[i] = rows[i];
    for (int h = 0; h < p->heads; h++) {
      values[i * p->heads + h] = p->bytes[i][h];
      values[(p->rows + i) * p->heads + h] = p->time[i][h];
    }
  }
  for (int h = 0; h < p->heads; h++) {
    snprintf(columns[h], sizeof columns[h], "%d", h);
    column[h] = columns[h];
  }
  snprintf(panels[0], sizeof panels[0], "%s: bytes", select);
  snprintf(panels[1], sizeof panels[1], "%s: time", select);
  snprintf(title, sizeof title, "Bytes and time of a decode, %% of softmax's, %lld tokens", (long long)p->n);
  const svg_heat heat = {.title = title,
                         .x_label = "query head",
                         .panels = panel,
                         .rows = row,
                         .columns = column,
                         .n_panels = 2,
                         .n_rows = p->rows,
                         .n_columns = p->heads,
                         .values = values,
                         .floor = floor};
  return svg_write_heat(o->svg, &heat);
}

/* One cache: a file's heads together or one of them, or generated data. heads: of the file. */
static int bench_cache(const options *o, emx_ctx *ctx, const char *data, int head, int64_t *heads, picture *p) {
  bench b = {.o = o,
             .data = data,
             .head = head,
             .ctx = ctx,
             .B = o->batch,
             .H = o->shape.hq,
             .G = o->shape.hkv,
             .D = o->shape.d,
             .max_len = o->shape.n};
  emx_checkpoint *ck = NULL;
  int code = CLI_OK;
  b.alpha = o->alpha > 0 ? o->alpha : 1.5;
  if (o->cuda) {
    emx_ctx_opts gpu;
    emx_ctx_opts_init(&gpu);
    gpu.device = EMX_DEVICE_CUDA;
    gpu.device_index = o->device_index;
    CLI_TRY(emx_ctx_create(&gpu, &b.gpu));
  }
  if (is_file(data)) {
    CLI_TRY(emx_checkpoint_open(data, &ck));
    if (!(o->alpha > 0) && (code = qkv_alpha(data, ck, b.alpha, &b.alpha))) goto done;
    CLI_TRY(load_file(&b, ck, heads));
  } else {
    workload_parse(data, o->shape.seed, &b.w);
    b.scale = workload_scale(&b.w, b.D);
    for (int i = 0; i < b.B; i++) b.lengths[i] = o->shape.n - (b.B > 1 ? o->shape.n / 2 * i / (b.B - 1) : 0);
    CLI_TRY(make_cache(&b));
    CLI_TRY(fill_synthetic(&b));
  }
  CLI_TRY(prepare(&b));
  CLI_TRY(measure(&b));
  const method *softmax = &b.methods[0], *last = &b.methods[b.n_methods - 1];
  if (head >= 0 && head < MAX_HEADS) {
    p->n = b.max_len;
    p->bytes[p->rows][head] = last->bytes / softmax->bytes;
    p->time[p->rows][head] = 1 / bench_ratio(softmax->ms, last->ms, o->shape.rounds);
  }
  code = report(&b);
done:
  for (int i = 0; i < b.n_methods; i++) emxi_free(b.methods[i].ms), emxi_free(b.methods[i].reports);
  emxi_free(b.work), emxi_free(b.q), emxi_free(b.out), emxi_free(b.read_s), emxi_free(b.slopes), emxi_free(b.alphas),
      emxi_free(b.file_q);
  for (int i = 0; i < b.n_blocks; i++) b.gpu->backend->memory_free(b.gpu, b.blocks[i]);
  emx_kv_destroy(b.gpu_kv);
  emx_ctx_destroy(b.gpu);
  emx_kv_destroy(b.kv);
  emx_checkpoint_close(ck);
  return code;
}
/* One --data, with every head by itself if that is asked for. */
static int bench_data(const options *o, emx_ctx *ctx, const char *data, picture *p) {
  int64_t heads = 0;
  if (o->head != EVERY_HEAD) return bench_cache(o, ctx, data, o->head, &heads, p);
  int code = bench_cache(o, ctx, data, 0, &heads, p);
  for (int h = 1; h < heads && !code; h++) code = bench_cache(o, ctx, data, h, &heads, p);
  if (!code && o->svg && (heads > MAX_HEADS || (p->rows && heads != p->heads)))
    code = cli_fail("%s has %lld heads: --svg draws up to %d, and as many in every file", data, (long long)heads, MAX_HEADS);
  p->heads = (int)heads;
  p->rows++;
  return code;
}

int bench_decode(int argc, char **argv) {
  static const struct argp_child children[] = {
      {&bench_shape_argp, 0, NULL, 0}, {&cli_select_argp, 0, NULL, 0}, {&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Times one decode step per method: softmax over every token first (the baseline), then the selectors of --select.\v"
          "In every round each method runs once on the same fresh query, and the cache is streamed once through all workers (the "
          "read "
          "rate). ms: median over the rounds, with minimum and median absolute deviation; vs_softmax: median of softmax ms / "
          "this ms "
          "within a round; rel_err: L2 error of the first query against float64 attention of the same alpha; delta: true mass of "
          "the "
          "tokens not read, delta_bound: what the library vouches for."};
  options o = {.shape = {.n = 131072, .hq = 8, .hkv = 8, .d = 64, .rounds = 9, .seed = 1},
               .page = 16,
               .batch = 1,
               .dtype = EMX_BF16,
               .head = -1};
  cli_select_init(&o.select);
  cli_parse(&argp, argc, argv, &o);

  emx_ctx *ctx = NULL;
  picture p = {0};
  int code = cli_check_out(o.svg);
  if (code || (code = cli_context(&o.common, &ctx))) return code;
  for (int i = 0; i < o.n_data && !code; i++) code = bench_data(&o, ctx, o.data[i], &p);
  if (!code && o.svg) code = draw(&o, &p);
  emx_ctx_destroy(ctx);
  return code;
}
