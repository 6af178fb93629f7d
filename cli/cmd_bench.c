/* SPDX-License-Identifier: Apache-2.0
 * emx bench: picks the benchmark; options, statistics and the read-bandwidth probe that they share. */
#include "bench.h"

#include "base/base.h"

#include <stdlib.h>
#include <string.h>

enum { KEY_N = 1300, KEY_HQ, KEY_HKV, KEY_D, KEY_ROUNDS, KEY_SEED };
static const struct argp_option shape_options[] = {
    {"n", KEY_N, "N", 0, "Tokens (default 131072; attn: 4096)", 1},
    {"hq", KEY_HQ, "H", 0, "Query heads (default 8)", 1},
    {"hkv", KEY_HKV, "G", 0, "KV heads (default 8)", 1},
    {"d", KEY_D, "D", 0, "Head dimension (default 64; file: 128)", 1},
    {"rounds", KEY_ROUNDS, "N", 0, "Timed rounds (default 9; file: 5, each with a new query)", 1},
    {"seed", KEY_SEED, "S", 0, "Seed of the data (default 1)", 1},
    {0}};
static error_t parse_shape(int key, char *arg, struct argp_state *state) {
  bench_shape *s = state->input;
  switch (key) {
    case KEY_N: s->n = cli_int(state, "--n", arg, 1, INT32_MAX / 2); return 0;
    case KEY_HQ: s->hq = (int)cli_int(state, "--hq", arg, 1, 4096); return 0;
    case KEY_HKV: s->hkv = (int)cli_int(state, "--hkv", arg, 1, 4096); return 0;
    case KEY_D: s->d = (int)cli_int(state, "--d", arg, 16, 256); return 0;
    case KEY_ROUNDS: s->rounds = (int)cli_int(state, "--rounds", arg, 1, 100000); return 0;
    case KEY_SEED: s->seed = cli_seed(state, "--seed", arg); return 0;
    case ARGP_KEY_END:
      if (s->hq % s->hkv) argp_error(state, "--hq %d is not a multiple of --hkv %d", s->hq, s->hkv);
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}
const struct argp bench_shape_argp = {.options = shape_options, .parser = parse_shape};

bench_times bench_summary(const double *ms, int rounds) {
  double *copy = malloc(((size_t)rounds + 1) * sizeof *copy);
  bench_times t = {NAN, NAN, cli_mad(ms, rounds)};
  if (!copy) return t;
  memcpy(copy, ms, (size_t)rounds * sizeof *copy);
  t.median = cli_median(copy, rounds);
  t.min = copy[0]; /* sorted by now */
  free(copy);
  return t;
}
double bench_ratio(const double *base, const double *ms, int rounds) {
  double *ratio = malloc(((size_t)rounds + 1) * sizeof *ratio), median = NAN;
  if (!ratio) return NAN;
  for (int r = 0; r < rounds; r++) ratio[r] = base[r] / ms[r];
  median = cli_median(ratio, rounds);
  free(ratio);
  return median;
}

enum { SPAN = 1 << 20 };
typedef struct reader {
  const char *memory;
  size_t bytes;
  atomic_ullong sum; /* keeps the loads alive */
} reader;
static void read_span(void *arg, int64_t i, int32_t worker) {
  (void)worker;
  reader *r = arg;
  size_t at = (size_t)i * SPAN, n = (r->bytes - at < SPAN ? r->bytes - at : SPAN) / sizeof(uint64_t);
  const uint64_t *p = (const uint64_t *)(const void *)(r->memory + at);
  uint64_t s[8] = {0};
  for (size_t j = 0; j + 8 <= n; j += 8)
    for (int l = 0; l < 8; l++) s[l] ^= p[j + (size_t)l];
  atomic_fetch_add_explicit(&r->sum, s[0] ^ s[1] ^ s[2] ^ s[3] ^ s[4] ^ s[5] ^ s[6] ^ s[7], memory_order_relaxed);
}
double bench_read(emx_ctx *ctx, const void *memory, size_t bytes) {
  reader r = {.memory = memory, .bytes = bytes};
  atomic_init(&r.sum, 0);
  double start = cli_seconds();
  emxi_parallel(ctx, (int64_t)((bytes + SPAN - 1) / SPAN), read_span, &r);
  return cli_seconds() - start;
}

int cmd_bench(int argc, char **argv) {
  static const char usage[] =
      "Usage: emx bench decode|attn|map|budgets|file [OPTION...]\n\n"
      "  decode   one decode step: softmax first, then each selector, against float64 attention\n"
      "  attn     dense attention, forward and backward: softmax first, then alpha-entmax\n"
      "  map      rows of the mapping: softmax first, then alpha-entmax\n"
      "  budgets  what a byte budget loses on the activations of trained models\n"
      "  file     one decode step with keys and values in a cold file\n\n"
      "`emx bench decode --help` lists the options.\n";
  if (argc < 2) {
    fputs(usage, stderr);
    return CLI_USAGE;
  }
  if (!strcmp(argv[1], "decode")) {
    cli_command = "emx bench decode";
    return bench_decode(argc - 1, argv + 1);
  }
  if (!strcmp(argv[1], "attn")) {
    cli_command = "emx bench attn";
    return bench_attn(argc - 1, argv + 1);
  }
  if (!strcmp(argv[1], "map")) {
    cli_command = "emx bench map";
    return bench_map(argc - 1, argv + 1);
  }
  if (!strcmp(argv[1], "budgets")) {
    cli_command = "emx bench budgets";
    return bench_budgets(argc - 1, argv + 1);
  }
  if (!strcmp(argv[1], "file")) {
    cli_command = "emx bench file";
    return bench_file(argc - 1, argv + 1);
  }
  if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-?")) {
    fputs(usage, stdout);
    return cli_flush();
  }
  cli_warn("unknown benchmark '%s', expected decode, attn, map, budgets or file", argv[1]);
  return CLI_USAGE;
}
