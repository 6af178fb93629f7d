/* SPDX-License-Identifier: Apache-2.0
 * emx bench file: one query token against a cache whose keys and values are in a file, cold, in a process that may not map more
 * than --room beyond what it has at the start. ALL is the first method, then the selectors; every output is compared with ALL's.
 * Before every call the file is written out and dropped from the system's cache, and the system's own count of bytes read is
 * taken around it. */
#define _GNU_SOURCE
#include "bench.h"
#include "workload.h"

#include "base/num.h"
#include "kv/kv.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

typedef struct options {
  cli_common common;
  cli_select select;
  const char *path, *data;
  bench_shape shape;
  int64_t room;
  int page;
  double alpha;
  bool planes;
} options;
enum { KEY_FILE = 1, KEY_DATA, KEY_PAGE, KEY_ROOM, KEY_PLANES };
static const struct argp_option option_table[] = {
    {"kv-file", KEY_FILE, "FILE", 0, "Where keys and values go, bf16 (required). FILE must not exist, and is gone at the end", 1},
    {"room", KEY_ROOM, "MIB", 0, "What the process may map beyond what it has at the start (default: no limit)", 1},
    {"data", KEY_DATA, "W", 0, "iid (default), ar:RHO, topics[:SHIFT], outlier:C,GAIN or flat:STD", 1},
    {"page", KEY_PAGE, "P", 0, "Tokens a page: 16 (default), 32 or 64", 1},
    {"alpha", 'a', "A", 0, "1 to 4 (default 1.5)", 1},
    {"planes", KEY_PLANES, NULL, 0, "Sketches without residual rows: less memory, more keys read", 1},
    {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT:
      state->child_inputs[0] = &o->shape;
      state->child_inputs[1] = &o->select;
      state->child_inputs[2] = &o->common;
      return 0;
    case KEY_FILE: o->path = arg; return 0;
    case KEY_ROOM: o->room = cli_int(state, "--room", arg, 1, INT64_MAX >> 21) << 20; return 0;
    case KEY_DATA: o->data = arg; return 0;
    case KEY_PAGE: o->page = cli_page(state, arg); return 0;
    case 'a': o->alpha = cli_real(state, "--alpha", arg, 1, 4); return 0;
    case KEY_PLANES: o->planes = true; return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
    case ARGP_KEY_END:
      if (!o->path) argp_error(state, "--kv-file FILE is required");
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

typedef struct method {
  emx_select_desc select;
  double *ms, *bytes; /* [rounds]; bytes: read from the device */
  emx_report *reports;
  double support, keys; /* sums over rounds and heads */
  bool certified, equal;
  uint8_t path;
} method;

typedef struct bench {
  const options *o;
  emx_ctx *ctx;
  emx_kv *kv;
  workload w;
  int32_t seq;
  float *q, *out, *all;
  void *work;
  size_t work_bytes;
  int64_t start, peak; /* bytes of address space */
  method methods[CLI_MAX_SELECT + 1];
  int n_methods;
} bench;

/* The number after `name` in a file of /proc; -1: not there. */
static int64_t system_number(const char *file, const char *name) {
  FILE *f = fopen(file, "r");
  char line[256];
  int64_t n = -1;
  while (f && n < 0 && fgets(line, sizeof line, f))
    if (!strncmp(line, name, strlen(name))) n = strtoll(line + strlen(name), NULL, 10);
  if (f) fclose(f);
  return n;
}

static emx_status limit(bench *b) {
  const int64_t kib = system_number("/proc/self/status", "VmSize:");
  if (kib < 0) return emxi_fail(EMX_ERR_UNSUPPORTED, "/proc/self/status does not say how much this process maps");
  b->start = kib << 10;
  const struct rlimit most = {(rlim_t)(b->start + b->o->room), (rlim_t)(b->start + b->o->room)};
  if (b->o->room && setrlimit(RLIMIT_AS, &most)) return emxi_fail(EMX_ERR_INVALID, "--room: the limit cannot be set");
  return EMX_OK;
}

static emx_decode_io make_io(const bench *b, const method *m, const emx_tensor *q, const emx_tensor *out) {
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.alpha = b->o->alpha;
  io.scale = workload_scale(&b->w, b->o->shape.d);
  io.q = q;
  io.o = out;
  io.reports = m->reports;
  return io;
}
static emx_tensor view(const bench *b, float *data) {
  return emx_tensor_view(data, EMX_F32, 4, (int64_t[4]){1, b->o->shape.hq, 1, b->o->shape.d});
}

static emx_status prepare(bench *b) {
  const options *o = b->o;
  const size_t cells = (size_t)o->shape.hq * (size_t)o->shape.d;
  emx_kv_opts kv;
  emx_kv_opts_init(&kv);
  kv.kv_heads = o->shape.hkv;
  kv.head_dim = o->shape.d;
  kv.page_size = o->page;
  kv.file = o->path;
  kv.max_seqs = 1;
  kv.max_pages = (o->shape.n + o->page - 1) / o->page;
  kv.summaries = cli_sketches(&o->select) & ~(o->planes ? EMX_SUMMARY_RESIDUAL : 0);
  for (int i = 0; i < o->select.n; i++) {
    if (o->select.desc[i].kind == EMX_SELECT_TOPK) kv.summaries |= EMX_SUMMARY_MINMAX;
    if (o->select.desc[i].kind == EMX_SELECT_GAUSSIAN) kv.summaries |= EMX_SUMMARY_MOMENTS;
  }
  EMX_TRY(emx_kv_create(b->ctx, &kv, &b->kv));
  EMX_TRY(emx_seq_create(b->kv, &b->seq));
  b->q = emxi_alloc(cells * sizeof *b->q);
  b->out = emxi_alloc(cells * sizeof *b->out);
  b->all = emxi_alloc(cells * sizeof *b->all);
  if (!b->q || !b->out || !b->all) return emxi_fail(EMX_ERR_NOMEM, "no memory for queries");
  emx_select_desc_init(&b->methods[b->n_methods++].select);
  for (int i = 0; i < o->select.n; i++)
    if (o->select.desc[i].kind != EMX_SELECT_ALL) b->methods[b->n_methods++].select = o->select.desc[i];
  const emx_tensor q = view(b, b->q), out = view(b, b->out);
  for (int i = 0; i < b->n_methods; i++) {
    method *m = &b->methods[i];
    size_t bytes;
    m->ms = emxi_calloc((size_t)o->shape.rounds * sizeof *m->ms);
    m->bytes = emxi_calloc((size_t)o->shape.rounds * sizeof *m->bytes);
    m->reports = emxi_calloc((size_t)o->shape.hq * sizeof *m->reports);
    m->certified = m->equal = true;
    if (!m->ms || !m->bytes || !m->reports) return emxi_fail(EMX_ERR_NOMEM, "no memory for reports");
    const emx_decode_io io = make_io(b, m, &q, &out);
    EMX_TRY(emx_decode_workspace_size(b->ctx, b->kv, &m->select, &io, o->shape.n, &bytes));
    if (bytes > b->work_bytes) b->work_bytes = bytes;
  }
  b->work = emxi_alloc(b->work_bytes);
  if (!b->work) return emxi_fail(EMX_ERR_NOMEM, "no memory for a workspace of %zu bytes", b->work_bytes);
  cli_progress progress;
  cli_progress_init(&progress, "generating");
  cli_progress_text(&progress, 0, 1, NULL);
  const emx_status status = workload_append(b->ctx, b->kv, b->seq, 0, o->shape.n, &b->w);
  cli_progress_end(&progress);
  return status;
}

static emx_status make_queries(bench *b, int round) {
  const options *o = b->o;
  const int32_t *pages;
  int64_t n;
  EMX_TRY(emx_seq_block_table(b->kv, b->seq, &pages, &n));
  EMX_TRY(emxi_kv_file_begin(b->kv, "emx bench file"));
  for (int h = 0; h < o->shape.hq; h++) {
    const int64_t at = workload_pick(&b->w, round, 0, h, o->shape.n);
    char row[256 * sizeof(float)];
    float key[256];
    emxi_kv_file_read(b->kv, false, pages[at / o->page], h / (o->shape.hq / o->shape.hkv), at % o->page, 1, row);
    for (int x = 0; x < o->shape.d; x++) key[x] = (float)emxi_load(row, b->kv->dtype, x);
    workload_query(&b->w, round, 0, h, key, o->shape.d, b->q + (int64_t)h * o->shape.d);
  }
  return emxi_kv_file_end(b->kv, "emx bench file");
}

static emx_status run(bench *b, method *m, int round) {
  const options *o = b->o;
  const emx_tensor q = view(b, b->q), out = view(b, b->out);
  const emx_decode_io io = make_io(b, m, &q, &out);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &b->seq;
  if (fsync(b->kv->file->fd) || posix_fadvise(b->kv->file->fd, 0, 0, POSIX_FADV_DONTNEED))
    return emxi_fail(EMX_ERR_IO, "%s: it cannot be dropped from the system's cache", o->path);
  const int64_t before = system_number("/proc/self/io", "read_bytes:");
  const double start = cli_seconds();
  EMX_TRY(emx_decode(b->ctx, b->kv, &batch, &m->select, &io, b->work, b->work_bytes));
  m->ms[round] = 1e3 * (cli_seconds() - start);
  m->bytes[round] = before < 0 ? NAN : (double)(system_number("/proc/self/io", "read_bytes:") - before);
  const size_t size = (size_t)o->shape.hq * (size_t)o->shape.d * sizeof *b->out;
  if (m == b->methods) memcpy(b->all, b->out, size);
  m->equal &= !memcmp(b->all, b->out, size);
  for (int h = 0; h < o->shape.hq; h++) {
    m->support += m->reports[h].support;
    m->keys += m->reports[h].tokens;
    m->certified &= (m->reports[h].flags & EMX_REPORT_CERTIFIED) != 0;
    m->path = m->reports[h].path;
  }
  return EMX_OK;
}

static emx_status measure(bench *b) {
  cli_progress progress;
  cli_progress_init(&progress, "measuring");
  for (int round = 0; round < b->o->shape.rounds; round++) {
    EMX_TRY(make_queries(b, round));
    for (int i = 0; i < b->n_methods; i++) EMX_TRY(run(b, &b->methods[i], round));
    cli_progress_text(&progress, round + 1, b->o->shape.rounds, NULL);
  }
  cli_progress_end(&progress);
  b->peak = system_number("/proc/self/status", "VmPeak:") << 10;
  return EMX_OK;
}

static int report(bench *b) {
  const options *o = b->o;
  emx_kv_info info = {.struct_size = sizeof info};
  int code = cli_status(emx_kv_get_info(b->kv, &info));
  const double rows = (double)o->shape.rounds * o->shape.hq;
  if (!code && !o->common.json) {
    printf(
        "%s, n %lld, %d/%d heads of %d, bf16, page %d: K and V %.0f MiB in the file, %.0f MiB of summaries and %.0f MiB in all "
        "mapped "
        "beyond the start",
        o->data, (long long)o->shape.n, o->shape.hq, o->shape.hkv, o->shape.d, o->page, (double)info.bytes_kv / 1048576,
        (double)info.bytes_summary / 1048576, (double)(b->peak - b->start) / 1048576);
    if (o->room) printf(" (limit %lld)", (long long)(o->room >> 20));
    printf("\n%-10s %-6s %9s %9s %12s %9s %9s %-9s %s\n", "select", "path", "ms", "min", "bytes read", "keys", "support",
           "certified", "as all");
  }
  for (int i = 0; i < b->n_methods && !code; i++) {
    method *m = &b->methods[i];
    const bench_times t = bench_summary(m->ms, o->shape.rounds);
    const double bytes = cli_median(m->bytes, o->shape.rounds);
    char label[32];
    if (o->common.json) {
      json_t *j =
          json_pack("{s:s, s:s, s:I, s:i, s:i, s:i, s:s, s:i, s:f, s:s, s:s}", "device", "cpu", "data", o->data, "n",
                    (json_int_t)o->shape.n, "hq", o->shape.hq, "hkv", o->shape.hkv, "d", o->shape.d, "dtype", "bf16", "page",
                    o->page, "alpha", o->alpha, "select", cli_select_name(m->select.kind), "path", cli_path_name(m->path));
      json_t *numbers = json_pack("{s:b, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:o, s:f, s:f, s:b, s:b}", "planes", (int)o->planes,
                                  "bytes_kv", (json_int_t)info.bytes_kv, "bytes_summary", (json_int_t)info.bytes_summary, "room",
                                  (json_int_t)o->room, "mapped", (json_int_t)(b->peak - b->start), "ms", t.median, "ms_min",
                                  t.min, "ms_mad", t.mad, "read_bytes", cli_json_real(bytes), "keys", m->keys / rows, "support",
                                  m->support / rows, "certified", (int)m->certified, "equal", (int)m->equal);
      if (j && numbers) json_object_update(j, numbers);
      if (j && m->select.kind == EMX_SELECT_TOPK) json_object_set_new(j, "budget", json_integer(m->select.budget));
      json_decref(numbers);
      code = cli_json_line(j);
    } else {
      printf("%-10s %-6s %9.3f %9.3f %12.0f %9.0f %9.1f %-9s %s\n", cli_select_label(&m->select, label), cli_path_name(m->path),
             t.median, t.min, bytes, m->keys / rows, m->support / rows, m->certified ? "yes" : "no", m->equal ? "yes" : "no");
    }
  }
  return code ? code : cli_flush();
}

int bench_file(int argc, char **argv) {
  static const struct argp_child children[] = {
      {&bench_shape_argp, 0, NULL, 0}, {&cli_select_argp, 0, NULL, 0}, {&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {
      .options = option_table,
      .parser = parse,
      .children = children,
      .doc =
          "Decodes from a cache whose keys and values are in a file that the system has just dropped from its cache: everything "
          "first, then each selector of --select (default certified here).\v"
          "ms: median over the rounds; bytes read: median, as the system counts what came from the device (0 where the file lies "
          "in "
          "memory, as on tmpfs); keys, support: a head; as all: every output has the bits of ALL's."};
  options o = {
      .data = "iid", .shape = {.n = 131072, .hq = 8, .hkv = 8, .d = 128, .rounds = 5, .seed = 1}, .page = 16, .alpha = 1.5};
  cli_select_init(&o.select);
  o.select.desc[0].kind = EMX_SELECT_CERTIFIED;
  cli_parse(&argp, argc, argv, &o);
  bench b = {.o = &o};
  if (!workload_parse(o.data, o.shape.seed, &b.w)) {
    cli_warn("--data is '%s', expected iid, ar:RHO, topics[:SHIFT], outlier:C,GAIN or flat:STD", o.data);
    return CLI_USAGE;
  }
  int code = cli_context(&o.common, &b.ctx);
  if (code) return code;
  CLI_TRY(limit(&b));
  CLI_TRY(prepare(&b));
  CLI_TRY(measure(&b));
  code = report(&b);
done:
  for (int i = 0; i < b.n_methods; i++)
    emxi_free(b.methods[i].ms), emxi_free(b.methods[i].bytes), emxi_free(b.methods[i].reports);
  emxi_free(b.q), emxi_free(b.out), emxi_free(b.all), emxi_free(b.work);
  emx_kv_destroy(b.kv);
  emx_ctx_destroy(b.ctx);
  return code;
}
