/* SPDX-License-Identifier: Apache-2.0
 * What the sub-commands of emx share: exit codes, options, JSON lines, progress, interruption. */
#ifndef EMX_CLI_H
#define EMX_CLI_H

#include <emx_model.h>

#include <argp.h>
#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>

enum { CLI_OK = 0, CLI_ERROR = 1, CLI_USAGE = 2, CLI_INTERRUPTED = 130 };

int cmd_info(int argc, char **argv);
int cmd_selftest(int argc, char **argv);
int cmd_map(int argc, char **argv);
int cmd_decode(int argc, char **argv);
int cmd_train(int argc, char **argv);
int cmd_generate(int argc, char **argv);
int cmd_inspect(int argc, char **argv);
int cmd_eval(int argc, char **argv);
int cmd_bench(int argc, char **argv);
int cmd_demo(int argc, char **argv);

/* -- failures: the reason on standard error, "emx COMMAND: " in front. */
extern const char *cli_command;
__attribute__((format(printf, 1, 2))) void cli_warn(const char *format, ...);
/* Prints and returns CLI_ERROR. */
__attribute__((format(printf, 1, 2))) int cli_fail(const char *format, ...);
/* The library's sentence; CLI_INTERRUPTED without a word if it was cancelled by Ctrl-C. */
int cli_status(emx_status status);
/* No memory for `what`: CLI_ERROR. */
int cli_nomem(size_t bytes, const char *what);

#define CLI_TRY(status_call)             \
  do {                                   \
    emx_status cli_try_ = (status_call); \
    if (cli_try_) {                      \
      code = cli_status(cli_try_);       \
      goto done;                         \
    }                                    \
  } while (0)

/* -- options */
/* A number in [min, max], else a usage error that names the option. */
int64_t cli_int(const struct argp_state *state, const char *option, const char *text, int64_t min, int64_t max);
double cli_real(const struct argp_state *state, const char *option, const char *text, double min, double max);
int32_t cli_map_kind(const struct argp_state *state, const char *text); /* --kind: entmax, normmax or budget */
/* --kind, --alpha and --budget against each other, when all have been read. */
void cli_map_check(const struct argp_state *state, const emx_entmax_desc *desc, bool budget_set);
/* The number of a task's name. */
int32_t cli_task(const struct argp_state *state, const char *text);
/* "N" or "A..B", within [min, max], A <= B. */
void cli_range(const struct argp_state *state, const char *option, const char *text, int64_t min, int64_t max, int64_t *from,
               int64_t *to);
int cli_page(const struct argp_state *state, const char *text); /* --page: 16, 32 or 64 */
uint64_t cli_seed(const struct argp_state *state, const char *option, const char *text);
int32_t cli_dtype(const struct argp_state *state, const char *option, const char *text, const char *allowed);
/* Fills argv[0] with "emx COMMAND" and parses; argp prints usage errors itself and exits with CLI_USAGE. */
void cli_parse(const struct argp *argp, int argc, char **argv, void *input);

/* -t and --json, a child parser of every command. Key range 1000. */
typedef struct cli_common {
  int32_t threads;
  bool json;
} cli_common;
extern const struct argp cli_common_argp;
/* --device: cpu, cuda or cuda:N. */
typedef struct cli_device {
  int32_t kind, index; /* EMX_DEVICE_* */
} cli_device;
cli_device cli_device_arg(const struct argp_state *state, const char *text);
/* A context with these threads; Ctrl-C cancels it from now on. */
int cli_context(const cli_common *common, emx_ctx **ctx);
int cli_context_on(const cli_common *common, cli_device device, emx_ctx **ctx);

/* --select and its parameters, a child parser. Key range 1100. */
enum { CLI_MAX_SELECT = 16 };
typedef struct cli_select {
  emx_select_desc desc[CLI_MAX_SELECT]; /* one per name in --select, topk one per budget, the parameters in all of them */
  int n;
  int64_t budgets[CLI_MAX_SELECT];
  int n_budgets; /* as given; 0: the default */
  bool tau_mode_set;
  const char *limit_set; /* --max-bytes or --max-delta, if given */
} cli_select;
extern const struct argp cli_select_argp;
void cli_select_init(cli_select *select);
/* EMX_SUMMARY_* bits of sketches if one of the selectors reads them. */
int32_t cli_sketches(const cli_select *select);
const char *cli_select_name(int32_t kind);
/* "topk 1024", "gaussian": for tables. */
const char *cli_select_label(const emx_select_desc *select, char out[32]);
const char *cli_path_name(int32_t path);
const char *cli_stop_name(int32_t stop);

/* -- output */
/* A number, or null where JSON has none (NaN, infinities). */
json_t *cli_json_real(double x);
/* A string from bytes that need not be UTF-8: what is not becomes U+FFFD. */
json_t *cli_json_text(const char *bytes, size_t n);
/* One line on standard output; takes the reference. CLI_ERROR if it cannot be written. */
int cli_json_line(json_t *object);
/* Flushes standard output: CLI_ERROR if some of it was lost. */
int cli_flush(void);

/* -- progress on standard error, a bar only on a terminal */
double cli_seconds(void);
typedef struct cli_progress {
  const char *label;
  double start, shown;
  bool terminal;
} cli_progress;
void cli_progress_init(cli_progress *p, const char *label);
/* An emx_progress_fn with p as user. */
void cli_progress_show(void *p, int64_t done, int64_t total);
/* Shows done of total and a tail such as "loss 1.93"; at most ten times a second. */
__attribute__((format(printf, 4, 5))) void cli_progress_text(cli_progress *p, int64_t done, int64_t total, const char *format,
                                                             ...);
/* Clears the bar. */
void cli_progress_end(cli_progress *p);
/* "1:02:03" */
void cli_duration(double seconds, char out[24]);

/* -- interruption */
/* From now on Ctrl-C (and SIGTERM) sets the flag and, unless gently, cancels the context; the second one always cancels it. */
void cli_on_interrupt(emx_ctx *ctx, bool gently);
bool cli_interrupted(void);

/* -- files */
/* The whole file, NUL appended; "-" is standard input. CLI_ERROR with a message. */
int cli_read_file(const char *path, char **data, size_t *size);

/* Whether a file can be written, asked before the work: it will be replaced by one made beside it, so the folder decides. NULL:
 * no file. */
int cli_check_out(const char *path);

/* Element i of a checkpoint's tensor, whatever its dtype and alignment. */
double cli_element(const emx_tensor *t, int64_t i);

/* -- numbers */
double cli_median(double *x, int n); /* sorts x */
/* Median absolute deviation from the median of x. */
double cli_mad(const double *x, int n);

#endif
