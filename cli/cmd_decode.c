/* SPDX-License-Identifier: Apache-2.0
 * emx decode: the queries of a file against its keys and values, one token at a time, with the report of every head. */
#define _GNU_SOURCE
#include "cli.h"
#include "qkv.h"

#include "base/base.h"

#include <stdlib.h>
#include <string.h>

typedef struct options {
  cli_common common;
  cli_select select;
  const char *file, *out, *kv_file;
  double alpha, scale;
  int page;
  int32_t dtype;
} options;
enum { KEY_OUT = 1, KEY_PAGE, KEY_SCALE, KEY_DTYPE, KEY_KV_FILE };
static const struct argp_option option_table[] = {
    {"file", 'f', "FILE", 0, "safetensors with q [T,H,D], k and v [N,G,D], optionally alibi_slopes [H] and alphas [H]", 1},
    {"out", KEY_OUT, "FILE", 0, "Write the attention output as tensor o [T,H,D] (f32)", 1},
    {"alpha", 'a', "A", 0, "1 to 4 (default: the file's alphas, else its entmax_alpha, else 1.5)", 1},
    {"scale", KEY_SCALE, "S", 0, "Of q.k (default 1/sqrt(D))", 1},
    {"page", KEY_PAGE, "P", 0, "Tokens a page: 16 (default), 32 or 64", 1},
    {"kv-dtype", KEY_DTYPE, "T", 0, "Of the cache: f32, f16 or bf16 (default: that of k)", 1},
    {"kv-file", KEY_KV_FILE, "FILE", 0,
     "Keep keys and values in FILE, only what selectors read to choose in memory. FILE must not exist, and is gone at the end",
     1},
    {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT:
      state->child_inputs[0] = &o->select;
      state->child_inputs[1] = &o->common;
      return 0;
    case 'f': o->file = arg; return 0;
    case KEY_KV_FILE: o->kv_file = arg; return 0;
    case KEY_OUT: o->out = arg; return 0;
    case 'a': o->alpha = cli_real(state, "--alpha", arg, 1, 4); return 0;
    case KEY_SCALE: o->scale = cli_real(state, "--scale", arg, 0, 1e6); return 0;
    case KEY_PAGE: o->page = cli_page(state, arg); return 0;
    case KEY_DTYPE: o->dtype = cli_dtype(state, "--kv-dtype", arg, "f32, f16, bf16"); return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
    case ARGP_KEY_END:
      if (!o->file) argp_error(state, "-f FILE is required");
      return 0;
    case ARGP_KEY_SUCCESS:
      if (o->select.n > 1) argp_error(state, "--select takes one selector here");
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

static emx_status find(const options *o, const emx_checkpoint *ck, const char *name, emx_tensor *t) {
  if (emx_checkpoint_find(ck, name, t))
    return emxi_fail(EMX_ERR_FORMAT, "%s: no tensor named %s, expected q, k and v", o->file, name);
  if (t->ndim != 3) return emxi_fail(EMX_ERR_SHAPE, "%s: %s has %d dimensions, expected 3", o->file, name, t->ndim);
  if (t->dtype != EMX_F32 && t->dtype != EMX_F16 && t->dtype != EMX_BF16)
    return emxi_fail(EMX_ERR_DTYPE, "%s: %s is %s, expected f32, f16 or bf16", o->file, name, emx_dtype_name(t->dtype));
  return EMX_OK;
}

static int print_report(const options *o, int64_t query, int64_t head, const emx_report *r) {
  const char *select = cli_select_name(r->select), *path = cli_path_name(r->path), *stop = cli_stop_name(r->stopped_by);
  const bool certified = r->flags & EMX_REPORT_CERTIFIED;
  if (!o->common.json) {
    printf("%5lld %4lld %-9s %-6s %9d %7d %8d %11.5g %11.3g %-9s %-7s %11lld %11lld %11lld%s\n", (long long)query,
           (long long)head, select, path, r->tokens, r->pages, r->support, (double)r->tau, (double)r->delta_bound,
           certified ? "yes" : "no", stop, (long long)r->bytes_k, (long long)r->bytes_v, (long long)r->bytes_meta,
           r->flags & EMX_REPORT_NONFINITE ? "  not finite" : "");
    return CLI_OK;
  }
  json_t *j = json_pack("{s:I, s:I, s:s, s:s, s:i, s:i, s:i, s:o, s:o, s:b, s:b, s:s}", "query", (json_int_t)query, "head",
                        (json_int_t)head, "select", select, "path", path, "tokens", r->tokens, "pages", r->pages, "support",
                        r->support, "tau", cli_json_real(r->tau), "delta_bound", cli_json_real(r->delta_bound), "certified",
                        (int)certified, "nonfinite", (r->flags & EMX_REPORT_NONFINITE) != 0, "stopped_by", stop);
  if (j) {
    json_object_set_new(j, "bytes_k", json_integer(r->bytes_k));
    json_object_set_new(j, "bytes_v", json_integer(r->bytes_v));
    json_object_set_new(j, "bytes_meta", json_integer(r->bytes_meta));
  }
  return cli_json_line(j);
}

/* Rows [from, from+n) of x [N,G,D] as f32 in out, and a [1,G,n,D] view of it. */
static emx_tensor rows_of(const emx_tensor *x, int64_t from, int64_t n, float *out) {
  const int64_t row = x->shape[1] * x->shape[2];
  for (int64_t i = 0; i < n * row; i++) out[i] = (float)cli_element(x, from * row + i);
  emx_tensor t = emx_tensor_view(out, EMX_F32, 4, (int64_t[4]){1, x->shape[1], n, x->shape[2]});
  t.stride[1] = x->shape[2];
  t.stride[2] = row;
  return t;
}

int cmd_decode(int argc, char **argv) {
  static const struct argp_child children[] = {{&cli_select_argp, 0, NULL, 0}, {&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {.options = option_table,
                                   .parser = parse,
                                   .children = children,
                                   .doc =
                                       "Decodes T query tokens, the last of them at position N-1, against a paged cache of N "
                                       "keys and values: token t sees keys 0 to "
                                       "N-T+t. Prints what every query head did.\v"
                                       "delta_bound is a sound upper bound of the attention mass of the tokens that were not "
                                       "read; certified means it is zero. Bytes "
                                       "are counted in 64-byte lines."};
  options o = {.page = 16};
  cli_select_init(&o.select);
  cli_parse(&argp, argc, argv, &o);

  enum { CHUNK = 512 };
  emx_ctx *ctx = NULL;
  emx_checkpoint *ck = NULL;
  emx_kv *kv = NULL;
  float *chunk = NULL, *q = NULL, *out = NULL, *slopes = NULL;
  double *alphas = NULL;
  emx_report *reports = NULL;
  void *work = NULL;
  int code = cli_check_out(o.out);
  if (code || (code = cli_context(&o.common, &ctx))) return code;
  emx_tensor tq, tk, tv, ts, ta;
  CLI_TRY(emx_checkpoint_open(o.file, &ck));
  CLI_TRY(find(&o, ck, "q", &tq));
  CLI_TRY(find(&o, ck, "k", &tk));
  CLI_TRY(find(&o, ck, "v", &tv));
  const int64_t T = tq.shape[0], H = tq.shape[1], D = tq.shape[2], N = tk.shape[0], G = tk.shape[1];
  if (memcmp(tk.shape, tv.shape, 3 * sizeof *tk.shape) || tk.shape[2] != D || G < 1 || H % G || T < 1 || T > N) {
    code = cli_fail(
        "%s: q is [%lld,%lld,%lld], k [%lld,%lld,%lld], v [%lld,%lld,%lld]; expected q [T,H,D], k and v [N,G,D], H a "
        "multiple of G, 1 <= T <= N",
        o.file, (long long)T, (long long)H, (long long)D, (long long)N, (long long)G, (long long)tk.shape[2],
        (long long)tv.shape[0], (long long)tv.shape[1], (long long)tv.shape[2]);
    goto done;
  }
  if (tk.dtype != tv.dtype) {
    code = cli_fail("%s: k is %s and v is %s, expected one dtype", o.file, emx_dtype_name(tk.dtype), emx_dtype_name(tv.dtype));
    goto done;
  }
  emx_kv_opts opts;
  emx_kv_opts_init(&opts);
  opts.dtype = o.dtype ? o.dtype : tk.dtype;
  opts.kv_heads = (int32_t)(G < INT32_MAX ? G : INT32_MAX);
  opts.head_dim = (int32_t)(D < INT32_MAX ? D : INT32_MAX);
  opts.page_size = o.page;
  opts.file = o.kv_file;
  opts.summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS | cli_sketches(&o.select);
  opts.max_seqs = 1;
  opts.max_pages = (N + o.page - 1) / o.page;
  CLI_TRY(emx_kv_create(ctx, &opts, &kv));
  int32_t seq;
  CLI_TRY(emx_seq_create(kv, &seq));
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &seq;

  const size_t row = (size_t)(G * D);
  chunk = emxi_alloc(2 * CHUNK * row * sizeof *chunk);
  q = emxi_alloc((size_t)(H * D) * sizeof *q);
  out = emxi_alloc((size_t)(T * H * D) * sizeof *out);
  reports = emxi_calloc((size_t)H * sizeof *reports);
  slopes = emxi_alloc((size_t)H * sizeof *slopes);
  alphas = emxi_alloc((size_t)H * sizeof *alphas);
  if (!chunk || !q || !out || !reports || !slopes || !alphas) {
    code = cli_nomem((2 * CHUNK * row + (size_t)(T * H * D)) * sizeof(float), "queries and outputs");
    goto done;
  }
  emx_decode_io io;
  emx_decode_io_init(&io);
  if (o.alpha > 0)
    io.alpha = o.alpha;
  else if ((code = qkv_alpha(o.file, ck, io.alpha, &io.alpha)))
    goto done;
  io.scale = (float)o.scale;
  io.reports = reports;
  if (!emx_checkpoint_find(ck, "alibi_slopes", &ts)) {
    if (ts.ndim != 1 || ts.shape[0] != H) {
      code = cli_fail("%s: alibi_slopes must be [%lld], one a query head", o.file, (long long)H);
      goto done;
    }
    for (int64_t h = 0; h < H; h++) slopes[h] = (float)cli_element(&ts, h);
    ts = emx_tensor_view(slopes, EMX_F32, 1, &H);
    io.alibi_slopes = &ts;
  }
  if (!(o.alpha > 0) && !emx_checkpoint_find(ck, "alphas", &ta)) {
    if (ta.ndim != 1 || ta.shape[0] != H) {
      code = cli_fail("%s: alphas must be [%lld], one a query head", o.file, (long long)H);
      goto done;
    }
    for (int64_t h = 0; h < H; h++) alphas[h] = cli_element(&ta, h);
    ta = emx_tensor_view(alphas, EMX_F64, 1, &H);
    io.alphas = &ta;
  }
  /* the keys before the first query's position, then one token a query */
  emx_tensor k_new, v_new, q_now = emx_tensor_view(q, EMX_F32, 4, (int64_t[4]){1, H, 1, D}), o_now;
  for (int64_t from = 0; from < N - T; from += CHUNK) {
    const int64_t n = N - T - from < CHUNK ? N - T - from : CHUNK;
    k_new = rows_of(&tk, from, n, chunk);
    v_new = rows_of(&tv, from, n, chunk + CHUNK * row);
    CLI_TRY(emx_kv_append(ctx, kv, &batch, &k_new, &v_new, NULL));
  }
  size_t work_bytes;
  io.q = &q_now;
  k_new = rows_of(&tk, 0, 1, chunk);
  v_new = rows_of(&tv, 0, 1, chunk + CHUNK * row);
  o_now = emx_tensor_view(out, EMX_F32, 4, (int64_t[4]){1, H, 1, D});
  io.k_new = &k_new;
  io.v_new = &v_new;
  io.o = &o_now;
  CLI_TRY(emx_decode_workspace_size(ctx, kv, o.select.desc, &io, N, &work_bytes));
  work = emxi_alloc(work_bytes);
  if (!work) {
    code = cli_nomem(work_bytes, "the workspace");
    goto done;
  }
  if (!o.common.json)
    printf("%5s %4s %-9s %-6s %9s %7s %8s %11s %11s %-9s %-7s %11s %11s %11s\n", "query", "head", "select", "path", "tokens",
           "pages", "support", "tau", "delta_bound", "certified", "stopped", "bytes_k", "bytes_v", "bytes_meta");
  for (int64_t t = 0; t < T; t++) {
    for (int64_t i = 0; i < H * D; i++) q[i] = (float)cli_element(&tq, t * H * D + i);
    k_new = rows_of(&tk, N - T + t, 1, chunk);
    v_new = rows_of(&tv, N - T + t, 1, chunk + CHUNK * row);
    o_now = emx_tensor_view(out + t * H * D, EMX_F32, 4, (int64_t[4]){1, H, 1, D});
    CLI_TRY(emx_decode(ctx, kv, &batch, o.select.desc, &io, work, work_bytes));
    for (int64_t h = 0; h < H; h++)
      if ((code = print_report(&o, t, h, &reports[h]))) goto done;
  }
  if (o.out) {
    emx_named_tensor named = {"o", emx_tensor_view(out, EMX_F32, 3, (int64_t[3]){T, H, D})};
    CLI_TRY(emx_checkpoint_write(o.out, &named, 1, NULL, 0));
  }
  code = cli_flush();
done:
  emxi_free(chunk), emxi_free(q), emxi_free(out), emxi_free(reports), emxi_free(slopes), emxi_free(alphas), emxi_free(work);
  emx_kv_destroy(kv);
  emx_checkpoint_close(ck);
  emx_ctx_destroy(ctx);
  return code;
}
