/* SPDX-License-Identifier: Apache-2.0
 * emx selftest: what this CPU offers, whether every kernel table it can run gives the known answers, and how fast the chosen one
 * is. */
#define _GNU_SOURCE
#include "bench.h"
#include "golden.h"
#include "workload.h"

#include "base/num.h"
#include "cpu/table.h"

#include <stdlib.h>
#include <string.h>

typedef struct options {
  cli_common common;
  bool checks;
} options;
enum { KEY_CHECKS = 1 };
static const struct argp_option option_table[] = {{"checks", KEY_CHECKS, NULL, 0, "Only the known answers, no speed table", 1},
                                                  {0}};
static error_t parse(int key, char *arg, struct argp_state *state) {
  options *o = state->input;
  switch (key) {
    case ARGP_KEY_INIT: state->child_inputs[0] = &o->common; return 0;
    case KEY_CHECKS: o->checks = true; return 0;
    case ARGP_KEY_ARG: argp_error(state, "unexpected argument '%s'", arg); return 0;
  }
  return ARGP_ERR_UNKNOWN;
}

/* ---- the machine */

/* What src/cpu/dispatch.c asks for, and what later kernels may: __builtin_cpu_supports wants literals. */
static json_t *features(void) {
  json_t *list = json_array();
#if defined(__x86_64__)
  __builtin_cpu_init();
#define FEATURE(name) \
  if (__builtin_cpu_supports(name)) json_array_append_new(list, json_string(name));
  FEATURE("sse4.2")
  FEATURE("avx")
  FEATURE("fma")
  FEATURE("avx2")
  FEATURE("avx512f")
  FEATURE("avx512dq")
  FEATURE("avx512bw")
  FEATURE("avx512vl")
  FEATURE("avx512vnni")
  FEATURE("avx512bf16")
#undef FEATURE
#endif
  return list;
}
static json_t *tables(void) {
  json_t *list = json_array();
  for (int i = 0; emxi_table_available(i); i++) json_array_append_new(list, json_string(emxi_table_available(i)->name));
  return list;
}
static void print_list(const char *label, const json_t *list, const char *chosen) {
  size_t i;
  json_t *item;
  printf("%-10s", label);
  json_array_foreach(list, i, item) {
    const char *name = json_string_value(item);
    printf(" %s%s", name, chosen && !strcmp(name, chosen) ? "*" : "");
  }
  printf(json_array_size(list) ? "\n" : " none\n");
}
static int show_machine(const options *o, emx_ctx *ctx) {
  emx_ctx_info info = {.struct_size = sizeof info};
  const int code = cli_status(emx_ctx_get_info(ctx, &info));
  if (code) return code;
  json_t *cpu = features(), *isa = tables();
  if (o->common.json)
    return cli_json_line(json_pack("{s:s, s:i, s:s, s:o, s:s, s:o, s:i}", "version", emx_version(), "abi", (int)emx_abi_version(),
                                   "device_name", info.device_name, "features", cpu, "isa", info.isa, "available", isa, "threads",
                                   (int)info.threads));
  printf("libentmax %s (ABI %d) on %s, %d threads\n", emx_version(), (int)emx_abi_version(), info.device_name, (int)info.threads);
  print_list("features", cpu, NULL);
  print_list("kernels", isa, info.isa);
  json_decref(cpu);
  json_decref(isa);
  return cli_flush();
}

/* ---- known answers */

typedef struct tally {
  const options *o;
  const char *isa;
  int checks, failed, code;
  double worst; /* largest error / limit */
} tally;
static void count(void *user, const char *what, double error, double limit) {
  tally *t = user;
  const bool ok = error <= limit;
  t->checks++;
  t->failed += !ok;
  if (!(error / limit <= t->worst)) t->worst = error / limit;
  if (t->o->common.json) {
    const int code = cli_json_line(json_pack("{s:s, s:s, s:o, s:f, s:b}", "isa", t->isa, "check", what, "error",
                                             cli_json_real(error), "limit", limit, "ok", (int)ok));
    if (code) t->code = code;
  } else if (!ok) {
    printf("  %-8s %s: error %g, at most %g is right\n", t->isa, what, error, limit);
  }
}
/* Every table that this CPU can run, through contexts made as EMX_ISA makes them. */
static int check_tables(const options *o, int *checks, int *failed) {
  const char *set = getenv("EMX_ISA");
  char *before = set ? strdup(set) : NULL;
  int code = CLI_OK;
  for (int i = 0; !code && emxi_table_available(i); i++) {
    tally t = {.o = o, .isa = emxi_table_available(i)->name};
    setenv("EMX_ISA", t.isa, 1);
    emx_ctx *ctx = NULL;
    code = cli_context(&o->common, &ctx);
    emx_ctx_info info = {.struct_size = sizeof info};
    if (!code) code = cli_status(emx_ctx_get_info(ctx, &info));
    if (!code && strcmp(info.isa, t.isa)) code = cli_fail("asked for the kernels %s, got %s", t.isa, info.isa);
    if (!code) code = cli_status(golden_check(ctx, &golden_values, count, &t));
    if (!code) code = t.code;
    cli_on_interrupt(NULL, false);
    emx_ctx_destroy(ctx);
    *checks += t.checks;
    *failed += t.failed;
    if (!code && !o->common.json)
      printf("%-10s %d known answers, %s (largest error %.2g of its limit)\n", t.isa, t.checks,
             t.failed ? "NOT all right" : "all right", t.worst);
  }
  if (before)
    setenv("EMX_ISA", before, 1);
  else
    unsetenv("EMX_ISA");
  free(before);
  return code;
}

/* ---- speed: softmax and alpha = 1.5 in turn, every round */

enum { ROUNDS = 7, HEADS = 4, D = 64, CACHED = 65536, MAP_ROWS = 16, MAP_N = 65536, ATTN_N = 1024 };
typedef struct speed {
  emx_ctx *ctx;
  float *memory; /* one block for the tensors of the three measurements */
  char *work;
  size_t work_bytes;
} speed;

static int show_speed(const options *o, const char *what, const char *method, const double *ms, double gigabytes,
                      const double *base) {
  double copy[ROUNDS];
  memcpy(copy, ms, sizeof copy);
  const double median = cli_median(copy, ROUNDS), ratio = bench_ratio(base, ms, ROUNDS), gbps = 1e3 * gigabytes / median;
  if (o->common.json)
    return cli_json_line(json_pack("{s:s, s:s, s:f, s:o, s:o}", "speed", what, "method", method, "ms", median, "gbps",
                                   gigabytes > 0 ? json_real(gbps) : json_null(), "vs_softmax",
                                   base == ms && strcmp(method, "softmax") ? json_null() : cli_json_real(ratio)));
  printf("  %-42s %-8s %9.2f ms", what, method, median);
  if (gigabytes > 0) printf(" %7.1f GB/s", gbps);
  if (base != ms) printf(" %17.2f x softmax", 1 / ratio);
  printf("\n");
  return CLI_OK;
}

/* ms[method][round] of call(speed, alpha) for softmax and 1.5. */
static emx_status time_both(speed *s, emx_status (*call)(speed *, double, void *), void *arg, double ms[2][ROUNDS]) {
  for (int round = -BENCH_WARMUP; round < ROUNDS; round++)
    for (int m = 0; m < 2; m++) {
      const double start = cli_seconds();
      EMX_TRY(call(s, m ? 1.5 : 1, arg));
      if (round >= 0) ms[m][round] = 1e3 * (cli_seconds() - start);
    }
  return EMX_OK;
}
/* Working memory of at least this size, kept between calls. */
static emx_status room(speed *s, size_t bytes) {
  if (bytes <= s->work_bytes) return EMX_OK;
  emxi_free(s->work);
  s->work = emxi_alloc(bytes);
  s->work_bytes = s->work ? bytes : 0;
  return s->work ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "no memory for %zu bytes", bytes);
}

typedef struct cache {
  emx_kv *kv;
  int32_t seq;
} cache;
static emx_status run_decode(speed *s, double alpha, void *arg) {
  cache *c = arg;
  const int64_t shape[4] = {1, HEADS, 1, D};
  emx_tensor q = emx_tensor_view(s->memory, EMX_F32, 4, shape), out = emx_tensor_view(s->memory + HEADS * D, EMX_F32, 4, shape);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1, batch.seqs = &c->seq;
  emx_select_desc select;
  emx_select_desc_init(&select);
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.alpha = alpha, io.q = &q, io.o = &out;
  size_t bytes;
  EMX_TRY(emx_decode_workspace_size(s->ctx, c->kv, &select, &io, CACHED, &bytes));
  EMX_TRY(room(s, bytes));
  return emx_decode(s->ctx, c->kv, &batch, &select, &io, s->work, s->work_bytes);
}
static emx_status run_map(speed *s, double alpha, void *arg) {
  (void)arg;
  const int64_t shape[2] = {MAP_ROWS, MAP_N};
  emx_tensor x = emx_tensor_view(s->memory, EMX_F32, 2, shape),
             p = emx_tensor_view(s->memory + MAP_ROWS * MAP_N, EMX_F32, 2, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  desc.alpha = alpha;
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.x = &x, io.p = &p;
  return emx_entmax_forward(s->ctx, &desc, &io);
}
static emx_status run_attention(speed *s, double alpha, void *arg) {
  (void)arg;
  const int64_t shape[4] = {1, HEADS, ATTN_N, D}, size = (int64_t)HEADS * ATTN_N * D;
  emx_tensor q = emx_tensor_view(s->memory, EMX_F32, 4, shape), k = emx_tensor_view(s->memory + size, EMX_F32, 4, shape),
             v = emx_tensor_view(s->memory + 2 * size, EMX_F32, 4, shape),
             out = emx_tensor_view(s->memory + 3 * size, EMX_F32, 4, shape);
  emx_attn_desc desc;
  emx_attn_desc_init(&desc);
  desc.alpha = alpha;
  emx_attn_io io;
  emx_attn_io_init(&io);
  io.q = &q, io.k = &k, io.v = &v, io.o = &out;
  size_t bytes;
  EMX_TRY(emx_attn_workspace_size(s->ctx, &desc, &io, EMX_PASS_FORWARD, &bytes));
  EMX_TRY(room(s, bytes));
  return emx_attn_forward(s->ctx, &desc, &io, s->work, s->work_bytes);
}

static int show_speeds(const options *o, emx_ctx *ctx) {
  speed s = {.ctx = ctx};
  cache c = {0};
  enum { MAP_FLOATS = 2 * MAP_ROWS * MAP_N, ATTN_FLOATS = 4 * HEADS * ATTN_N * D };
  const int64_t size = MAP_FLOATS > ATTN_FLOATS ? MAP_FLOATS : ATTN_FLOATS;
  double ms[2][ROUNDS], read[ROUNDS];
  int code = CLI_OK;
  s.memory = emxi_alloc((size_t)size * sizeof(float));
  if (!s.memory) return cli_nomem((size_t)size * sizeof(float), "the measurements");
  emxi_normals(1, 0, s.memory, size);

  emx_kv_opts opts;
  emx_kv_opts_init(&opts);
  opts.kv_heads = HEADS, opts.head_dim = D, opts.max_pages = CACHED / 16, opts.max_seqs = 1;
  workload w;
  workload_parse("iid", 1, &w);
  CLI_TRY(emx_kv_create(ctx, &opts, &c.kv));
  CLI_TRY(emx_seq_create(c.kv, &c.seq));
  CLI_TRY(workload_append(ctx, c.kv, c.seq, 0, CACHED, &w));
  emx_tensor k, v;
  CLI_TRY(emx_kv_pool_view(c.kv, &k, &v));
  const size_t half = (size_t)CACHED * HEADS * D * emx_dtype_size(k.dtype);
  for (int round = -1; round < ROUNDS; round++) {
    const double seconds = bench_read(ctx, k.data, half) + bench_read(ctx, v.data, half);
    if (round >= 0) read[round] = 1e3 * seconds;
  }
  if (!o->common.json) printf("speed (median of %d rounds; numbers of one machine, in one moment)\n", ROUNDS);
  if ((code = show_speed(o, "read the cache of the next line", "-", read, 2e-9 * (double)half, read))) goto done;
  static const struct {
    const char *what;
    emx_status (*call)(speed *, double, void *);
    bool streams;
  } measurements[] = {{"decode, 65536 tokens, 4 heads of 64, bf16", run_decode, true},
                      {"map, 16 rows of 65536, f32", run_map, false},
                      {"attention, 1024 tokens, 4 heads of 64, f32", run_attention, false}};
  for (size_t i = 0; i < sizeof measurements / sizeof *measurements; i++) {
    CLI_TRY(time_both(&s, measurements[i].call, &c, ms));
    for (int m = 0; m < 2; m++) /* what softmax reads; entmax reads no V of zero weight */
      if ((code = show_speed(o, measurements[i].what, m ? "1.5" : "softmax", ms[m],
                             measurements[i].streams && !m ? 2e-9 * (double)half : 0, ms[0])))
        goto done;
  }
  code = cli_flush();
done:
  emx_kv_destroy(c.kv);
  emxi_free(s.memory);
  emxi_free(s.work);
  return code;
}

int cmd_selftest(int argc, char **argv) {
  static const struct argp_child children[] = {{&cli_common_argp, 0, NULL, 0}, {0}};
  static const struct argp argp = {.options = option_table,
                                   .parser = parse,
                                   .children = children,
                                   .doc =
                                       "Tells what this CPU offers, compares the mapping, attention and decode with known "
                                       "answers on every kernel table that it can "
                                       "run, and prints a short speed table (a few seconds).\v"
                                       "The known answers were computed with 50 digits by a program that shares no code with the "
                                       "library. Decode is also asked "
                                       "whether its certificate is true: what it did not read must have the weight that it "
                                       "vouches for, or less. Exit status 1 if "
                                       "anything is wrong."};
  options o = {0};
  cli_parse(&argp, argc, argv, &o);
  int checks = 0, failed = 0;
  emx_ctx *ctx = NULL;
  int code = cli_context(&o.common, &ctx);
  if (!code) code = show_machine(&o, ctx);
  if (!code) code = check_tables(&o, &checks, &failed);
  if (!code) {
    cli_on_interrupt(ctx, false);
    if (!o.checks) code = show_speeds(&o, ctx);
  }
  emx_ctx_destroy(ctx);
  if (!code && o.common.json)
    code = cli_json_line(json_pack("{s:b, s:i, s:i}", "ok", failed == 0, "checks", checks, "failed", failed));
  if (!code && failed) code = cli_fail("%d of %d known answers are wrong", failed, checks);
  return code;
}
