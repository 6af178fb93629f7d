/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cli.h"

#include "base/num.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

const char *cli_command = "emx";

/* ---- failures */

static void complain(const char *format, va_list args) {
  fprintf(stderr, "%s: ", cli_command);
  vfprintf(stderr, format, args);
  fputc('\n', stderr);
}
void cli_warn(const char *format, ...) {
  va_list args;
  va_start(args, format);
  complain(format, args);
  va_end(args);
}
int cli_fail(const char *format, ...) {
  va_list args;
  va_start(args, format);
  complain(format, args);
  va_end(args);
  return CLI_ERROR;
}
int cli_status(emx_status status) {
  if (!status) return CLI_OK;
  if (status == EMX_ERR_CANCELLED && cli_interrupted()) return CLI_INTERRUPTED;
  return cli_fail("%s", emx_last_error());
}
int cli_nomem(size_t bytes, const char *what) { return cli_fail("no memory for %s (%zu bytes)", what, bytes); }

/* ---- options */

int64_t cli_int(const struct argp_state *state, const char *option, const char *text, int64_t min, int64_t max) {
  char *end;
  errno = 0;
  long long v = strtoll(text, &end, 10);
  if (errno || end == text || *end || v < min || v > max)
    argp_error(state, "%s is '%s', expected an integer from %lld to %lld", option, text, (long long)min, (long long)max);
  return v;
}
double cli_real(const struct argp_state *state, const char *option, const char *text, double min, double max) {
  char *end;
  errno = 0;
  double v = strtod(text, &end);
  if (errno || end == text || *end || !(v >= min && v <= max))
    argp_error(state, "%s is '%s', expected a number from %g to %g", option, text, min, max);
  return v;
}
uint64_t cli_seed(const struct argp_state *state, const char *option, const char *text) {
  char *end;
  errno = 0;
  unsigned long long v = strtoull(text, &end, 10);
  if (errno || end == text || *end || *text == '-')
    argp_error(state, "%s is '%s', expected an integer from 0 to 2^64-1", option, text);
  return v;
}
int32_t cli_map_kind(const struct argp_state *state, const char *text) {
  static const char *const names[] = {"entmax", "normmax", "budget"};
  for (int32_t kind = 0; kind < 3; kind++)
    if (!strcmp(text, names[kind])) return kind;
  argp_error(state, "--kind is '%s', expected entmax, normmax or budget", text);
  return EMX_MAP_ENTMAX;
}
void cli_map_check(const struct argp_state *state, const emx_entmax_desc *desc, bool budget_set) {
  const bool budget = desc->kind == EMX_MAP_BUDGET;
  if ((desc->alpha > 1 && desc->alpha < 1.000001) || (desc->alpha > 4 && desc->kind != EMX_MAP_NORMMAX))
    argp_error(state, "--alpha is %.9g, expected 1 or 1.000001 to 4%s", desc->alpha,
               desc->kind == EMX_MAP_NORMMAX ? ", or to 1000" : "");
  if (desc->kind != EMX_MAP_ENTMAX && desc->alpha == 1)
    argp_error(state, "--kind %s needs --alpha above 1", budget ? "budget" : "normmax");
  if (budget_set && !budget) argp_error(state, "--budget goes with --kind budget");
  if (budget && !(desc->budget > 0)) argp_error(state, "--budget is %g, expected more than 0", desc->budget);
}
int32_t cli_task(const struct argp_state *state, const char *text) {
  for (int32_t kind = EMX_TASK_NONE + 1; emx_task_name(kind); kind++)
    if (!strcmp(text, emx_task_name(kind))) return kind;
  argp_error(state, "--task is '%s', which is no task; --help lists them", text);
  return 0;
}
void cli_range(const struct argp_state *state, const char *option, const char *text, int64_t min, int64_t max, int64_t *from,
               int64_t *to) {
  const char *dots = strstr(text, "..");
  if (!dots) {
    *from = *to = cli_int(state, option, text, min, max);
    return;
  }
  char first[24];
  snprintf(first, sizeof first, "%.*s", (int)(dots - text < 23 ? dots - text : 23), text);
  *from = cli_int(state, option, first, min, max);
  *to = cli_int(state, option, dots + 2, *from, max);
}
int cli_page(const struct argp_state *state, const char *text) {
  if (strcmp(text, "16") && strcmp(text, "32") && strcmp(text, "64"))
    argp_error(state, "--page is '%s', expected 16, 32 or 64", text);
  return atoi(text);
}
int32_t cli_dtype(const struct argp_state *state, const char *option, const char *text, const char *allowed) {
  static const int32_t all[] = {EMX_F32, EMX_F16, EMX_BF16, EMX_F64};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++)
    if (!strcmp(text, emx_dtype_name(all[i]))) {
      for (const char *at = allowed; (at = strstr(at, text)); at++) /* a whole word: f16 is a part of bf16 */
        if (at == allowed || at[-1] == ' ') return all[i];
    }
  argp_error(state, "%s is '%s', expected one of %s", option, text, allowed);
  return 0;
}
/* argp prints --help and ends the program by itself: what it could not write is said here. */
static bool parsing;
static void help_lost(void) {
  if (parsing && cli_flush()) _exit(CLI_ERROR);
}
void cli_parse(const struct argp *argp, int argc, char **argv, void *input) {
  argv[0] = (char *)cli_command;
  argp_err_exit_status = CLI_USAGE;
  atexit(help_lost);
  parsing = true;
  error_t err = argp_parse(argp, argc, argv, ARGP_IN_ORDER, NULL, input);
  parsing = false;
  if (err) { /* ENOMEM or a parser that returned an error without a word */
    cli_warn("%s", strerror(err));
    exit(CLI_USAGE);
  }
}

enum { KEY_JSON = 1000, KEY_BUDGET = 1101, KEY_MAX_BYTES, KEY_MAX_DELTA, KEY_TAU_MODE, KEY_SELECT };

static const struct argp_option common_options[] = {
    {"threads", 't', "N", 0, "Workers (default: EMX_THREADS, else the CPUs this process may use)", 90},
    {"json", KEY_JSON, NULL, 0, "Print one JSON object a line on standard output", 90},
    {0}};
static error_t parse_common(int key, char *arg, struct argp_state *state) {
  cli_common *c = state->input;
  switch (key) {
    case 't': c->threads = (int32_t)cli_int(state, "--threads", arg, 1, 256); return 0;
    case KEY_JSON: c->json = true; return 0;
  }
  return ARGP_ERR_UNKNOWN;
}
const struct argp cli_common_argp = {.options = common_options, .parser = parse_common};

cli_device cli_device_arg(const struct argp_state *state, const char *text) {
  cli_device device = {EMX_DEVICE_CPU, 0};
  char end;
  if (!strcmp(text, "cpu")) return device;
  device.kind = EMX_DEVICE_CUDA;
  if (strcmp(text, "cuda") && (sscanf(text, "cuda:%d%c", &device.index, &end) != 1 || device.index < 0))
    argp_error(state, "--device is '%s', expected cpu, cuda or cuda:N", text);
  return device;
}

int cli_context(const cli_common *common, emx_ctx **ctx) { return cli_context_on(common, (cli_device){EMX_DEVICE_CPU, 0}, ctx); }
int cli_context_on(const cli_common *common, cli_device device, emx_ctx **ctx) {
  emx_ctx_opts opts;
  emx_ctx_opts_init(&opts);
  opts.device = device.kind;
  opts.device_index = device.index;
  opts.threads = common->threads;
  emx_status status = emx_ctx_create(&opts, ctx);
  if (status) return cli_status(status);
  cli_on_interrupt(*ctx, false);
  return CLI_OK;
}

static const struct {
  const char *name;
  int32_t kind;
} selectors[] = {
    {"all", EMX_SELECT_ALL}, {"topk", EMX_SELECT_TOPK}, {"gaussian", EMX_SELECT_GAUSSIAN}, {"certified", EMX_SELECT_CERTIFIED}};
const char *cli_select_name(int32_t kind) {
  for (size_t i = 0; i < sizeof selectors / sizeof *selectors; i++)
    if (selectors[i].kind == kind) return selectors[i].name;
  return kind == EMX_SELECT_PAGES ? "pages" : "unknown";
}
const char *cli_select_label(const emx_select_desc *select, char out[32]) {
  if (select->kind == EMX_SELECT_TOPK)
    snprintf(out, 32, "topk %lld", (long long)select->budget);
  else
    snprintf(out, 32, "%s", cli_select_name(select->kind));
  return out;
}
const char *cli_path_name(int32_t path) {
  return path == EMX_PATH_ALL ? "all" : path == EMX_PATH_PAGES ? "pages" : path == EMX_PATH_LADDER ? "ladder" : "unknown";
}
const char *cli_stop_name(int32_t stop) {
  static const char *const names[] = {"done", "budget", "bytes", "delta"};
  return stop >= 0 && stop < 4 ? names[stop] : "unknown";
}

void cli_select_init(cli_select *select) {
  *select = (cli_select){.n = 1};
  for (int i = 0; i < CLI_MAX_SELECT; i++) {
    emx_select_desc_init(&select->desc[i]);
    select->desc[i].budget = 1024;
  }
}
static const struct argp_option select_options[] = {
    {NULL, 0, NULL, 0, "Selection of keys and values:", 80},
    {"select", KEY_SELECT, "NAME", 0, "all (default), topk, gaussian or certified; a list where the command compares", 80},
    {"budget", KEY_BUDGET, "TOKENS", 0, "topk: tokens a query head reads (default 1024); a list where the command compares", 80},
    {"tau-mode", KEY_TAU_MODE, "M", 0, "gaussian: exact (default), corrected or fixed", 80},
    {"max-bytes", KEY_MAX_BYTES, "B", 0, "certified: stop a head after this many bytes (default 0: no limit)", 80},
    {"max-delta", KEY_MAX_DELTA, "X", 0,
     "certified: stop when the bound of the dropped mass is at most X (default 0: exact, which leaves softmax heads dense)", 80},
    {0}};
static bool selects(const cli_select *s, int32_t kind) {
  for (int i = 0; i < s->n; i++)
    if (s->desc[i].kind == kind) return true;
  return false;
}
/* One topk a budget, in its place among the others. */
static void expand_budgets(const struct argp_state *state, cli_select *s) {
  emx_select_desc out[CLI_MAX_SELECT];
  int n = 0;
  for (int i = 0; i < s->n; i++) {
    const int copies = s->desc[i].kind == EMX_SELECT_TOPK && s->n_budgets ? s->n_budgets : 1;
    for (int b = 0; b < copies; b++) {
      if (n == CLI_MAX_SELECT) argp_error(state, "--select: more than %d selectors and budgets", CLI_MAX_SELECT);
      out[n] = s->desc[i];
      if (s->n_budgets) out[n].budget = s->budgets[b];
      n++;
    }
  }
  memcpy(s->desc, out, (size_t)n * sizeof *out);
  s->n = n;
}
int32_t cli_sketches(const cli_select *select) {
  return selects(select, EMX_SELECT_CERTIFIED) ? EMX_SUMMARY_SKETCH | EMX_SUMMARY_RESIDUAL : 0;
}
static error_t parse_select(int key, char *arg, struct argp_state *state) {
  cli_select *s = state->input;
  switch (key) {
    case KEY_SELECT: {
      s->n = 0;
      for (char *rest, *name = strtok_r(arg, ",", &rest); name; name = strtok_r(NULL, ",", &rest)) {
        size_t i = 0;
        while (i < sizeof selectors / sizeof *selectors && strcmp(selectors[i].name, name)) i++;
        if (i == sizeof selectors / sizeof *selectors)
          argp_error(state, "--select: unknown selector '%s', expected all, topk, gaussian or certified", name);
        if (s->n == CLI_MAX_SELECT) argp_error(state, "--select: more than %d selectors", CLI_MAX_SELECT);
        s->desc[s->n++].kind = selectors[i].kind;
      }
      if (!s->n) argp_error(state, "--select: no selector");
      return 0;
    }
    case KEY_BUDGET: {
      s->n_budgets = 0;
      for (char *rest, *text = strtok_r(arg, ",", &rest); text; text = strtok_r(NULL, ",", &rest)) {
        if (s->n_budgets == CLI_MAX_SELECT) argp_error(state, "--budget: more than %d numbers", CLI_MAX_SELECT);
        s->budgets[s->n_budgets++] = cli_int(state, "--budget", text, 1, INT64_MAX / 4);
      }
      if (!s->n_budgets) argp_error(state, "--budget: no number");
      return 0;
    }
    case KEY_MAX_BYTES: {
      int64_t bytes = cli_int(state, "--max-bytes", arg, 0, INT64_MAX);
      for (int i = 0; i < CLI_MAX_SELECT; i++) s->desc[i].max_bytes = bytes;
      s->limit_set = "--max-bytes";
      return 0;
    }
    case KEY_MAX_DELTA: {
      double delta = cli_real(state, "--max-delta", arg, 0, 1);
      for (int i = 0; i < CLI_MAX_SELECT; i++) s->desc[i].max_delta = delta;
      s->limit_set = "--max-delta";
      return 0;
    }
    case KEY_TAU_MODE: {
      static const char *const modes[] = {"exact", "corrected", "fixed"};
      int mode = 0;
      while (mode < 3 && strcmp(modes[mode], arg)) mode++;
      if (mode == 3) argp_error(state, "--tau-mode is '%s', expected exact, corrected or fixed", arg);
      for (int i = 0; i < CLI_MAX_SELECT; i++) s->desc[i].tau_mode = mode;
      s->tau_mode_set = true;
      return 0;
    }
    case ARGP_KEY_SUCCESS:
      if (s->n_budgets && !selects(s, EMX_SELECT_TOPK)) argp_error(state, "--budget needs topk in --select");
      if (s->tau_mode_set && !selects(s, EMX_SELECT_GAUSSIAN)) argp_error(state, "--tau-mode needs gaussian in --select");
      if (s->limit_set && !selects(s, EMX_SELECT_CERTIFIED)) argp_error(state, "%s needs certified in --select", s->limit_set);
      /* only GAUSSIAN has an estimate to keep */
      for (int i = 0; i < s->n; i++)
        if (s->desc[i].kind != EMX_SELECT_GAUSSIAN) s->desc[i].tau_mode = EMX_TAU_EXACT;
      expand_budgets(state, s);
      return 0;
  }
  return ARGP_ERR_UNKNOWN;
}
const struct argp cli_select_argp = {.options = select_options, .parser = parse_select};

/* ---- output */

json_t *cli_json_real(double x) { return isfinite(x) ? json_real(x) : json_null(); }

/* Length of the UTF-8 sequence at s, 0 if there is none (Unicode 15, table 3-7: no surrogates, nothing overlong, up to
 * U+10FFFF). */
static size_t utf8_length(const unsigned char *s, size_t n) {
  if (s[0] < 0x80) return 1;
  const size_t want = s[0] >= 0xC2 && s[0] <= 0xDF ? 2 : (s[0] & 0xF0) == 0xE0 ? 3 : s[0] >= 0xF0 && s[0] <= 0xF4 ? 4 : 0;
  if (!want || n < want) return 0;
  for (size_t i = 1; i < want; i++)
    if ((s[i] & 0xC0) != 0x80) return 0;
  if ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F) || (s[0] == 0xF0 && s[1] < 0x90) ||
      (s[0] == 0xF4 && s[1] > 0x8F))
    return 0;
  return want;
}
json_t *cli_json_text(const char *bytes, size_t n) {
  char *out = malloc(3 * n + 1);
  if (!out) return json_null();
  size_t m = 0;
  for (size_t i = 0; i < n;) {
    size_t len = utf8_length((const unsigned char *)bytes + i, n - i);
    if (len) {
      memcpy(out + m, bytes + i, len);
      m += len;
      i += len;
    } else {
      memcpy(out + m, "\xEF\xBF\xBD", 3);
      m += 3;
      i++;
    }
  }
  json_t *text = json_stringn(out, m);
  free(out);
  return text;
}
int cli_json_line(json_t *object) {
  int bad = !object || json_dumpf(object, stdout, JSON_COMPACT | JSON_REAL_PRECISION(9)) || fputc('\n', stdout) == EOF;
  json_decref(object);
  return bad ? cli_fail("cannot write to standard output") : cli_flush();
}
int cli_flush(void) { return fflush(stdout) || ferror(stdout) ? cli_fail("cannot write to standard output") : CLI_OK; }

/* ---- progress */

double cli_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
void cli_duration(double seconds, char out[24]) {
  if (!(seconds >= 0 && seconds < 1e9)) seconds = 0;
  long s = (long)(seconds + 0.5);
  if (s >= 3600)
    snprintf(out, 24, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
  else
    snprintf(out, 24, "%ld:%02ld", s / 60, s % 60);
}
void cli_progress_init(cli_progress *p, const char *label) {
  *p = (cli_progress){.label = label, .start = cli_seconds(), .terminal = isatty(STDERR_FILENO)};
}
void cli_progress_text(cli_progress *p, int64_t done, int64_t total, const char *format, ...) {
  double now = cli_seconds();
  if (!p->terminal || total <= 0 || (now - p->shown < 0.1 && done < total)) return;
  p->shown = now;
  enum { WIDTH = 24 };
  char bar[WIDTH + 1], left[24], tail[160] = "";
  int full = (int)(WIDTH * done / total);
  for (int i = 0; i < WIDTH; i++) bar[i] = i < full ? '#' : '.';
  bar[WIDTH] = 0;
  cli_duration(done ? (now - p->start) * (double)(total - done) / (double)done : 0, left);
  if (format) {
    va_list args;
    va_start(args, format);
    vsnprintf(tail, sizeof tail, format, args);
    va_end(args);
  }
  fprintf(stderr, "\r%s [%s] %lld/%lld %s  %s left\033[K", p->label, bar, (long long)done, (long long)total, tail, left);
  fflush(stderr);
}
void cli_progress_show(void *user, int64_t done, int64_t total) {
  cli_progress *p = user;
  cli_progress_text(p, done, total, "%.0f tokens/s", (double)done / fmax(cli_seconds() - p->start, 1e-9));
}
void cli_progress_end(cli_progress *p) {
  if (p->terminal && p->shown > 0) fprintf(stderr, "\r\033[K");
}

/* ---- interruption */

static emx_ctx *volatile interrupted_ctx;
static volatile sig_atomic_t interrupts, gentle;
static void on_signal(int signal_number) {
  (void)signal_number;
  interrupts = interrupts + 1;
  if (!gentle || interrupts > 1) emx_ctx_cancel(interrupted_ctx);
}
void cli_on_interrupt(emx_ctx *ctx, bool gently) {
  interrupted_ctx = ctx;
  gentle = gently;
  struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGTERM, &action, NULL);
}
bool cli_interrupted(void) { return interrupts > 0; }

/* ---- files */

int cli_read_file(const char *path, char **data, size_t *size) {
  FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
  if (!f) return cli_fail("cannot read %s: %s", path, strerror(errno));
  size_t room = 1 << 16, n = 0;
  char *p = malloc(room);
  while (p) {
    errno = 0;
    size_t got = fread(p + n, 1, room - n - 1, f);
    n += got;
    if (!got) break;
    if (room - n > 1) continue;
    char *more = realloc(p, room * 2);
    if (!more) free(p);
    p = more;
    room *= 2;
  }
  int code = CLI_OK;
  if (!p)
    code = cli_nomem(room, path);
  else if (ferror(f))
    code = cli_fail("cannot read %s: %s", path, strerror(errno));
  if (f != stdin) fclose(f);
  if (code) {
    free(p);
    return code;
  }
  p[n] = 0;
  *data = p;
  *size = n;
  return CLI_OK;
}

int cli_check_out(const char *path) {
  if (!path) return CLI_OK;
  struct stat st;
  const char *slash = strrchr(path, '/');
  char *folder = slash ? strndup(path, slash == path ? 1 : (size_t)(slash - path)) : strdup(".");
  if (!folder) return cli_nomem(strlen(path) + 1, "a path");
  int code = CLI_OK;
  if (!stat(path, &st) && S_ISDIR(st.st_mode))
    code = cli_fail("cannot write %s: %s", path, strerror(EISDIR));
  else if (access(folder, W_OK | X_OK))
    code = cli_fail("cannot write %s: %s", path, strerror(errno));
  free(folder);
  return code;
}

double cli_element(const emx_tensor *t, int64_t i) {
  const size_t size = emx_dtype_size(t->dtype);
  double cell = 0; /* for its alignment */
  memcpy(&cell, (const char *)t->data + (size_t)i * size, size);
  return emxi_load(&cell, t->dtype, 0);
}

/* ---- numbers */

static int compare(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}
double cli_median(double *x, int n) {
  if (n < 1) return NAN;
  qsort(x, (size_t)n, sizeof *x, compare);
  return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}
double cli_mad(const double *x, int n) {
  double *copy = malloc(((size_t)n + 1) * sizeof *copy), mid;
  if (!copy) return NAN;
  memcpy(copy, x, (size_t)n * sizeof *copy);
  mid = cli_median(copy, n);
  for (int i = 0; i < n; i++) copy[i] = fabs(copy[i] - mid);
  double mad = cli_median(copy, n);
  free(copy);
  return mad;
}
