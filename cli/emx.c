/* SPDX-License-Identifier: Apache-2.0
 * emx: one program, a sub-command for each job. */
#include "cli.h"

#include <string.h>

static const struct command {
  const char *name, *summary;
  int (*run)(int argc, char **argv);
} commands[] = {
    {"info", "the library, this machine, a model folder or a safetensors file", cmd_info},
    {"selftest", "does this machine compute the known answers, and how fast", cmd_selftest},
    {"map", "alpha-entmax of rows of numbers", cmd_map},
    {"decode", "attention of queries against keys and values from a file, with a report", cmd_decode},
    {"train", "train a model on text files or a synthetic task", cmd_train},
    {"generate", "continue a prompt", cmd_generate},
    {"inspect", "a page that shows which tokens every head attends to", cmd_inspect},
    {"eval", "bits per byte of a text, what a selector changes, long contexts, synthetic tasks", cmd_eval},
    {"bench", "time decode, attention and the row mapping; what a byte budget loses", cmd_bench},
    {"demo", "read a long text from one cache with every selector (make demo)", cmd_demo},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static void usage(FILE *to) {
  fprintf(to,
          "Usage: emx COMMAND [OPTION...]\n\nAttention with weights that are exactly zero (alpha-entmax), on a paged cache.\n\n");
  for (int i = 0; i < COMMANDS; i++) fprintf(to, "  %-10s %s\n", commands[i].name, commands[i].summary);
  fprintf(to,
          "\n`emx COMMAND --help` lists a command's options. Data goes to standard output, progress to standard error.\n"
          "Environment: EMX_THREADS, workers where -t is not given; EMX_ISA, the kernels: scalar, avx2 or avx512 (default: the "
          "best).\n"
          "Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.\n");
}

int main(int argc, char **argv) {
  static char version[64];
  snprintf(version, sizeof version, "emx %s (ABI %d)", emx_version(), (int)emx_abi_version());
  argp_program_version = version;
  if (argc < 2) {
    usage(stderr);
    return CLI_USAGE;
  }
  if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
    usage(stdout);
    return cli_flush();
  }
  if (!strcmp(argv[1], "--version") || !strcmp(argv[1], "-V")) {
    printf("%s\n", version);
    return cli_flush();
  }
  for (int i = 0; i < COMMANDS; i++)
    if (!strcmp(argv[1], commands[i].name)) {
      static char name[32];
      snprintf(name, sizeof name, "emx %s", commands[i].name);
      cli_command = name;
      return commands[i].run(argc - 1, argv + 1);
    }
  fprintf(stderr, "emx: unknown command '%s'; `emx --help` lists them\n", argv[1]);
  return CLI_USAGE;
}
