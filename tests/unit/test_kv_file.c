/* SPDX-License-Identifier: Apache-2.0
 * K and V in a file: the bits of a cache in memory, whatever is done to it; faults of the file; and a context whose K and V are
 * larger than what the process may map, with the bytes that the system read from the device. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <emx_model.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "cpu/certified.h"
#include "decode_case.h"

static emx_ctx *ctx;
static char path[64]; /* of the cache's file, in the folder of the test */

static int name_file(void **state) {
  (void)state;
  snprintf(path, sizeof path, "kv_file_%ld.tmp", (long)getpid());
  return 0;
}
static int setup(void **state) {
  (void)state;
  emxi_certified_short = 64;
  return emx_ctx_create(NULL, &ctx);
}
static int teardown(void **state) {
  (void)state;
  emx_ctx_destroy(ctx);
  return 0;
}

/* The file without a name, opened once more; -1: there is none. */
static int open_again(void) {
  DIR *dir = opendir("/proc/self/fd");
  assert_non_null(dir);
  int found = -1;
  for (struct dirent *e; found < 0 && (e = readdir(dir));) {
    char link[300], target[512];
    snprintf(link, sizeof link, "/proc/self/fd/%s", e->d_name);
    const ssize_t n = readlink(link, target, sizeof target - 1);
    if (n <= 0) continue;
    target[n] = 0;
    if (strstr(target, path)) found = open(link, O_RDWR);
  }
  closedir(dir);
  return found;
}

/* ---- the same bits */

static void same(const decode_case *a, const decode_case *b, const char *what) {
  const size_t rows = (size_t)a->B * (size_t)a->H * (size_t)a->S;
  if (memcmp(a->o_data, b->o_data, rows * (size_t)a->D * sizeof(float))) fail_msg("%s: outputs differ", what);
  if (memcmp(a->reports, b->reports, rows * sizeof(emx_report))) fail_msg("%s: reports differ", what);
}

static void test_same_bits(void **state) {
  (void)state;
  static const int dims[] = {32, 64, 80, 128}, pages[] = {16, 32, 64}, dtypes[] = {EMX_BF16, EMX_F16, EMX_F32};
  static const double alphas[] = {1.5, 1, 2, 1.25, 1.5, 3};
  int ladder = 0;
  for (int i = 0; i < 36; i++) {
    decode_case c[2];
    for (int f = 0; f < 2; f++) {
      c[f] = (decode_case){
          .B = 1 + i % 2,
          .G = 1 + i % 3,
          .D = dims[i % 4],
          .P = pages[i % 3],
          .dtype = dtypes[i / 3 % 3],
          .layout = i % 2 ? EMX_LAYOUT_BNHD : EMX_LAYOUT_BHND,
          .S = i % 5 == 4 ? 3 : 1,
          .len = {1500 + 37 * i, 700},
          .alpha = alphas[i % 6],
          .alibi = i % 4 == 1,
          .data = i % DATA_KINDS,
          .seed = (uint64_t)i,
          .file = f ? path : NULL,
          .summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS | EMX_SUMMARY_SKETCH | (i % 2 ? EMX_SUMMARY_RESIDUAL : 0)};
      c[f].H = 2 * c[f].G;
      case_open(&c[f], ctx);
    }
    for (int kind = EMX_SELECT_ALL; kind <= EMX_SELECT_PAGES; kind++) {
      if (kind != EMX_SELECT_ALL && c[0].S > 1) continue;
      if ((kind == EMX_SELECT_GAUSSIAN || kind == EMX_SELECT_CERTIFIED) && c[0].alpha == 1) continue;
      char what[64];
      snprintf(what, sizeof what, "case %d, selector %d", i, kind);
      const emx_select_desc select = case_desc(kind, kind == EMX_SELECT_TOPK ? 256 : 0), topk = case_desc(EMX_SELECT_TOPK, 128);
      for (int f = 0; f < 2; f++) {
        if (kind == EMX_SELECT_PAGES) OK(case_select(&c[f], &topk));
        OK(case_decode(&c[f], &select));
      }
      same(&c[0], &c[1], what);
      ladder += kind == EMX_SELECT_CERTIFIED && c[0].reports[0].path == EMX_PATH_LADDER;
    }
    case_close(&c[0]);
    case_close(&c[1]);
  }
  assert_true(ladder >= 8); /* CERTIFIED did not always stream */
  assert_int_equal(access(path, F_OK), -1);
  assert_int_equal(open_again(), -1); /* and no cache has left its file open */
}

/* Two caches, in memory and in the file, to which the same is done. */
typedef struct pair {
  emx_kv *kv[2];
  int32_t seq[2]; /* the same ids in both */
} pair;
enum { G = 2, D = 64, P = 16, H = 4 };

static emx_kv_opts opts_of(const char *file, int64_t max_pages) {
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.kv_heads = G;
  o.head_dim = D;
  o.page_size = P;
  o.summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS | EMX_SUMMARY_SKETCH;
  o.max_pages = max_pages;
  o.file = file;
  return o;
}
/* Tokens made from (seed, position), n of them. */
static emx_status append(emx_kv *kv, int32_t seq, uint64_t seed, int64_t n) {
  float *data = case_take((size_t)(2 * G * n * D) * sizeof *data);
  int64_t shape[4] = {1, G, n, D};
  emxi_normals(seed, 1, data, 2 * G * n * D);
  emx_tensor k = emx_tensor_view(data, EMX_F32, 4, shape), v = emx_tensor_view(data + G * n * D, EMX_F32, 4, shape);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &seq;
  const emx_status status = emx_kv_append(ctx, kv, &batch, &k, &v, NULL);
  free(data);
  return status;
}
typedef struct answer {
  float o[H * D];
  emx_report reports[H];
} answer;
static emx_status ask(emx_kv *kv, int32_t seq, int32_t kind, uint64_t seed, answer *a) {
  static float q[H * D];
  int64_t shape[4] = {1, H, 1, D};
  emxi_normals(seed, 2, q, H * D);
  emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, shape), to = emx_tensor_view(a->o, EMX_F32, 4, shape);
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.q = &tq;
  io.o = &to;
  io.reports = a->reports;
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &seq;
  const emx_select_desc select = case_desc(kind, kind == EMX_SELECT_TOPK ? 128 : 0);
  int64_t length;
  size_t bytes;
  OK(emx_seq_length(kv, seq, &length));
  OK(emx_decode_workspace_size(ctx, kv, &select, &io, length, &bytes));
  void *work = case_take(bytes);
  const emx_status status = emx_decode(ctx, kv, &batch, &select, &io, work, bytes);
  free(work);
  return status;
}
static void compare(const pair *p, int s) {
  static const int32_t kinds[] = {EMX_SELECT_ALL, EMX_SELECT_CERTIFIED, EMX_SELECT_TOPK};
  for (int i = 0; i < 3; i++) {
    static answer a[2];
    for (int f = 0; f < 2; f++) OK(ask(p->kv[f], p->seq[s], kinds[i], 5 + (uint64_t)i, &a[f]));
    assert_memory_equal(&a[0], &a[1], sizeof a[0]);
  }
  const int32_t *pages[2];
  int64_t n = 0;
  for (int f = 0; f < 2; f++) OK(emx_seq_block_table(p->kv[f], p->seq[s], &pages[f], &n));
  for (int64_t i = 0; i < n; i++)
    for (int g = 0; g < G; g++) {
      emx_kv_summary x[2] = {{.struct_size = sizeof x[0]}, {.struct_size = sizeof x[0]}};
      for (int f = 0; f < 2; f++) OK(emx_kv_get_summary(p->kv[f], pages[f][i], g, &x[f]));
      assert_int_equal(x[0].tokens, x[1].tokens);
      if (!x[0].valid) continue;
      assert_memory_equal(x[0].min, x[1].min, 2 * D * 2);
      assert_memory_equal(x[0].mean, x[1].mean, 2 * D * sizeof(float));
      assert_true(x[0].radius == x[1].radius && x[0].nonfinite == x[1].nonfinite);
    }
}

static void test_life(void **state) {
  (void)state;
  pair p;
  for (int f = 0; f < 2; f++) {
    const emx_kv_opts o = opts_of(f ? path : NULL, 128);
    OK(emx_kv_create(ctx, &o, &p.kv[f]));
    OK(emx_seq_create(p.kv[f], &p.seq[0]));
    OK(append(p.kv[f], p.seq[0], 1, 700));
    for (uint64_t t = 0; t < 20; t++) OK(append(p.kv[f], p.seq[0], 2 + t, 1)); /* over the end of a page, token by token */
  }
  compare(&p, 0);
  for (int f = 0; f < 2; f++) OK(emx_seq_fork(p.kv[f], p.seq[0], &p.seq[1]));
  compare(&p, 1);
  for (int f = 0; f < 2; f++) { /* into a page that cannot be described any more, and into one that is copied first */
    OK(emx_seq_truncate(p.kv[f], p.seq[1], 661));
    OK(append(p.kv[f], p.seq[1], 40, 30));
    OK(append(p.kv[f], p.seq[0], 41, 3));
  }
  compare(&p, 0);
  compare(&p, 1);
  for (int f = 0; f < 2; f++) { /* alone in the page: it is open again */
    OK(emx_seq_truncate(p.kv[f], p.seq[1], 683));
    OK(append(p.kv[f], p.seq[1], 42, 100));
  }
  compare(&p, 1);
  for (int f = 0; f < 2; f++) { /* summaries anew */
    const int32_t *pages;
    int64_t n;
    OK(emx_seq_block_table(p.kv[f], p.seq[1], &pages, &n));
    n = 783 / P;
    emx_tensor list = emx_tensor_view((void *)pages, EMX_I32, 1, &n);
    OK(emx_kv_summarize(ctx, p.kv[f], &list, NULL));
  }
  compare(&p, 1);

  char saved[2][80];
  for (int f = 0; f < 2; f++) {
    snprintf(saved[f], sizeof saved[f], "%s.%d.safetensors", path, f);
    OK(emx_kv_save(p.kv[f], p.seq, 2, saved[f], NULL, NULL));
  }
  char *bytes[2];
  long size[2];
  for (int f = 0; f < 2; f++) {
    FILE *file = fopen(saved[f], "rb");
    assert_non_null(file);
    fseek(file, 0, SEEK_END);
    size[f] = ftell(file);
    rewind(file);
    bytes[f] = case_take((size_t)size[f]);
    assert_int_equal(fread(bytes[f], 1, (size_t)size[f], file), size[f]);
    fclose(file);
  }
  assert_int_equal(size[0], size[1]);
  assert_memory_equal(bytes[0], bytes[1], (size_t)size[0]);
  /* from memory into a file */
  emx_kv *other;
  int32_t seqs[2], n;
  const emx_kv_opts o = opts_of(path, 128);
  OK(emx_kv_create(ctx, &o, &other));
  OK(emx_kv_load(other, saved[0], seqs, 2, &n, NULL, NULL));
  for (int s = 0; s < 2; s++) {
    static answer a[2];
    OK(ask(p.kv[0], p.seq[s], EMX_SELECT_CERTIFIED, 9, &a[0]));
    OK(ask(other, seqs[s], EMX_SELECT_CERTIFIED, 9, &a[1]));
    assert_memory_equal(a[0].o, a[1].o, sizeof a[0].o); /* what was read may differ: sketches were rebuilt */
  }
  /* a damaged file changes nothing */
  bytes[0][size[0] - 100] ^= 1;
  FILE *file = fopen(saved[0], "wb");
  assert_int_equal(fwrite(bytes[0], 1, (size_t)size[0], file), size[0]);
  fclose(file);
  emx_kv_info before = {.struct_size = sizeof before}, after = {.struct_size = sizeof after};
  OK(emx_kv_get_info(other, &before));
  fails(emx_kv_load(other, saved[0], seqs, 2, &n, NULL, NULL), EMX_ERR_FORMAT, "checksum");
  OK(emx_kv_get_info(other, &after));
  assert_memory_equal(&before, &after, sizeof before);
  for (int f = 0; f < 2; f++) {
    unlink(saved[f]);
    free(bytes[f]);
    emx_kv_destroy(p.kv[f]);
  }
  emx_kv_destroy(other);
}

/* ---- faults */

static void test_refusals(void **state) {
  (void)state;
  emx_kv *kv = NULL;
  emx_kv_opts o = opts_of(path, 8);
  int fd = open(path, O_CREAT | O_RDWR, 0600);
  assert_true(fd >= 0 && write(fd, "mine", 4) == 4);
  fails(emx_kv_create(ctx, &o, &kv), EMX_ERR_IO, "never touches another");
  char text[4];
  assert_true(pread(fd, text, 4, 0) == 4 && !memcmp(text, "mine", 4));
  close(fd);
  unlink(path);
  o.file = "nowhere/cache";
  fails(emx_kv_create(ctx, &o, &kv), EMX_ERR_IO, "nowhere/cache");
  o.file = "";
  fails(emx_kv_create(ctx, &o, &kv), EMX_ERR_IO, "cannot be made");
  o = opts_of(path, INT32_MAX);
  o.kv_heads = INT32_MAX;
  fails(emx_kv_create(ctx, &o, &kv), EMX_ERR_NOMEM, "address space");
  o = opts_of(path, 8);
  float pool[1] = {0};
  int64_t shape[4] = {8, G, P, D};
  emx_tensor view = emx_tensor_view(pool, EMX_BF16, 4, shape);
  o.k_pool = o.v_pool = &view;
  fails(emx_kv_create(ctx, &o, &kv), EMX_ERR_INVALID, "one place");
  assert_null(kv);
  assert_int_equal(access(path, F_OK), -1);

  /* the size query counts what is in memory, and views of it there are none */
  o = opts_of(path, 1024);
  size_t with = 0, without = 0, tables = 0, tables_without = 0;
  OK(emx_kv_memory_size(ctx, &o, &with, &tables));
  OK(emx_kv_create(ctx, &o, &kv));
  o.file = NULL;
  OK(emx_kv_memory_size(ctx, &o, &without, &tables_without));
  emx_kv_info info = {.struct_size = sizeof info};
  OK(emx_kv_get_info(kv, &info));
  assert_int_equal(info.bytes_kv, 1024 * P * G * D * 2 * 2);
  assert_int_equal(without - with, info.bytes_kv);
  emx_tensor k, v;
  fails(emx_kv_pool_view(kv, &k, &v), EMX_ERR_UNSUPPORTED, "in a file");
  /* two caches of one name: the first has let go of it */
  emx_kv *second = NULL;
  o.file = path;
  OK(emx_kv_create(ctx, &o, &second));
  emx_kv_destroy(second);

  int32_t seq;
  OK(emx_seq_create(kv, &seq));
  OK(append(kv, seq, 1, 100));
  const pid_t child = fork();
  if (!child) { /* shares the file's descriptor, so it must not share the cache */
    static answer a;
    const bool good = append(kv, seq, 2, 1) == EMX_ERR_STATE && strstr(emx_last_error(), "forked") &&
                      ask(kv, seq, EMX_SELECT_ALL, 1, &a) == EMX_ERR_STATE;
    _exit(good ? 0 : 1);
  }
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_int_equal(status, 0);
  emx_kv_destroy(kv);
}

/* Appends fail while files may not grow, decodes fail when the file has been cut; both leave everything as it was. */
static void test_faults(void **state) {
  (void)state;
  pair p;
  for (int f = 0; f < 2; f++) {
    const emx_kv_opts o = opts_of(f ? path : NULL, 256);
    OK(emx_kv_create(ctx, &o, &p.kv[f]));
    OK(emx_seq_create(p.kv[f], &p.seq[0]));
    OK(append(p.kv[f], p.seq[0], 1, 2007));
    OK(emx_seq_fork(p.kv[f], p.seq[0], &p.seq[1]));
  }
  char saved[80];
  snprintf(saved, sizeof saved, "%s.safetensors", path);
  OK(emx_kv_save(p.kv[0], p.seq, 1, saved, NULL, NULL));
  /* the second head of V begins behind this */
  struct rlimit old, low;
  void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
  getrlimit(RLIMIT_FSIZE, &old);
  low = old;
  low.rlim_cur = (256 + 120) * (rlim_t)(G * P * D * 2);
  for (int s = 0; s < 2; s++) /* a shared page that would be copied, and later one of its own */
    for (int n = 1; n <= 100; n += 33) {
      assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
      fails(append(p.kv[1], p.seq[s], 7, n), EMX_ERR_IO, "could not be written");
      assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
      int64_t length;
      OK(emx_seq_length(p.kv[1], p.seq[s], &length));
      assert_int_equal(length, 2007);
      static answer a[2];
      for (int f = 0; f < 2; f++) OK(ask(p.kv[f], p.seq[s], EMX_SELECT_CERTIFIED, 3, &a[f]));
      assert_memory_equal(a[0].o, a[1].o, sizeof a[0].o);
    }
  int32_t loaded, n_loaded;
  setrlimit(RLIMIT_FSIZE, &low);
  fails(emx_kv_load(p.kv[1], saved, &loaded, 1, &n_loaded, NULL, NULL), EMX_ERR_IO, "could not be written");
  setrlimit(RLIMIT_FSIZE, &old);
  unlink(saved);
  emx_kv_info x = {.struct_size = sizeof x}, y = {.struct_size = sizeof y};
  OK(emx_kv_get_info(p.kv[0], &x));
  OK(emx_kv_get_info(p.kv[1], &y));
  assert_true(x.free_pages == y.free_pages && x.seqs == y.seqs);
  setrlimit(RLIMIT_FSIZE, &low);
  emx_kv *none = NULL;
  emx_kv_opts o = opts_of(path, 256);
  fails(emx_kv_create(ctx, &o, &none), EMX_ERR_IO, "RLIMIT_FSIZE");
  setrlimit(RLIMIT_FSIZE, &old);
  signal(SIGXFSZ, handler);
  for (int f = 0; f < 2; f++) OK(append(p.kv[f], p.seq[1], 8, 50));
  compare(&p, 0);
  compare(&p, 1);

  const int fd = open_again();
  assert_true(fd >= 0);
  const off_t whole = lseek(fd, 0, SEEK_END), values = whole / 2, cut[2] = {values + 4096, 4096};
  char *bytes = case_take((size_t)whole);
  assert_int_equal(pread(fd, bytes, (size_t)whole, 0), whole);
  for (int c = 0; c < 2; c++)
    for (int kind = EMX_SELECT_ALL; kind <= EMX_SELECT_CERTIFIED; kind++) {
      if (kind == EMX_SELECT_GAUSSIAN) continue;
      static answer a, before;
      memset(&a, 0x5a, sizeof a);
      before = a;
      assert_int_equal(ftruncate(fd, cut[c]), 0);
      fails(ask(p.kv[1], p.seq[0], kind, 4, &a), EMX_ERR_IO, "shorter than it was made");
      assert_memory_equal(&a, &before, sizeof a); /* no output, no report */
      if (c) {
        fails(emx_kv_save(p.kv[1], p.seq, 1, saved, NULL, NULL), EMX_ERR_IO, "could not be read");
        assert_int_equal(access(saved, F_OK), -1);
      }
      assert_int_equal(ftruncate(fd, whole), 0);
      assert_int_equal(pwrite(fd, bytes, (size_t)whole, 0), whole);
    }
  compare(&p, 0);
  free(bytes);
  close(fd);
  for (int f = 0; f < 2; f++) emx_kv_destroy(p.kv[f]);
}

/* ---- more than the process may map */

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { LIMITED = 0 }; /* sanitizers map terabytes of shadow */
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
enum { LIMITED = 0 };
#else
enum { LIMITED = 1 };
#endif
#else
enum { LIMITED = 1 };
#endif

enum { BIG_N = 65536, BIG_D = 128, QUERIES = 4 }; /* 2 heads, 128 dimensions, 2 bytes, K and V: 64 MiB */
#define BIG_BYTES ((int64_t)BIG_N * G * BIG_D * 2 * 2)
#define ROOM ((int64_t)32 << 20) /* what a process may map on top of what it has at the start: half of K and V */

typedef struct outcome { /* in memory that parent and child share */
  float o[QUERIES][G * BIG_D];
  emx_report reports[QUERIES][G];
  int64_t read_bytes[QUERIES]; /* -1: the system does not count */
  char error[400];
} outcome;

static int64_t number_in(const char *file, const char *format) {
  FILE *f = fopen(file, "r");
  char line[200];
  long long n = -1;
  while (f && n < 0 && fgets(line, sizeof line, f))
    if (sscanf(line, format, &n) != 1) n = -1;
  if (f) fclose(f);
  return n;
}

/* Topics of 64 tokens: a query near one of them leaves most of the others behind. */
static emx_status fill_big(emx_ctx *c, emx_kv *kv, int32_t seq) {
  enum { STEP = 64 };
  static float k[G * STEP * BIG_D], v[G * STEP * BIG_D];
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &seq;
  for (int64_t from = 0; from < BIG_N; from += STEP) {
    uint32_t state = (uint32_t)from * 2654435761u + 1;
    for (int g = 0; g < G; g++) {
      float topic[BIG_D];
      emxi_normals(77, (uint64_t)(from + g), topic, BIG_D);
      for (int i = 0; i < STEP * BIG_D; i++) { /* uniform noise is enough here, and quick */
        state = state * 1664525u + 1013904223u;
        k[g * STEP * BIG_D + i] = topic[i % BIG_D] + 0.6f * ((float)(state >> 8) * 0x1p-24f - 0.5f);
        v[g * STEP * BIG_D + i] = (float)(state >> 12 & 1023) * 0x1p-9f - 1;
      }
    }
    int64_t shape[4] = {1, G, STEP, BIG_D};
    emx_tensor tk = emx_tensor_view(k, EMX_F32, 4, shape), tv = emx_tensor_view(v, EMX_F32, 4, shape);
    EMX_TRY(emx_kv_append(c, kv, &batch, &tk, &tv, NULL));
  }
  return EMX_OK;
}

static emx_status big_decode(emx_ctx *c, emx_kv *kv, int32_t seq, int32_t kind, int fd, outcome *out) {
  float q[G * BIG_D];
  int64_t shape[4] = {1, G, 1, BIG_D};
  emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, shape), to;
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.q = &tq;
  io.o = &to;
  const emx_select_desc select = case_desc(kind, 0);
  emx_kv_batch batch;
  emx_kv_batch_init(&batch);
  batch.batch = 1;
  batch.seqs = &seq;
  size_t bytes;
  EMX_TRY(emx_decode_workspace_size(c, kv, &select, &io, BIG_N, &bytes));
  void *work = emxi_alloc(bytes);
  if (!work) return emxi_fail(EMX_ERR_NOMEM, "no memory for the workspace of %zu bytes", bytes);
  emx_status status = EMX_OK;
  for (int i = 0; i < QUERIES && !status; i++) {
    for (int g = 0; g < G; g++) emxi_normals(77, (uint64_t)(i * (BIG_N / QUERIES / 64) * 64 + g), q + g * BIG_D, BIG_D);
    to = emx_tensor_view(out->o[i], EMX_F32, 4, shape);
    io.reports = out->reports[i];
    /* what was written goes to the device, and then out of the system's cache */
    if (fd >= 0 && (fsync(fd) || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)))
      status = emxi_fail(EMX_ERR_IO, "the file cannot be evicted");
    const int64_t before = number_in("/proc/self/io", "read_bytes: %lld");
    if (!status) status = emx_decode(c, kv, &batch, &select, &io, work, bytes);
    out->read_bytes[i] = before < 0 ? -1 : number_in("/proc/self/io", "read_bytes: %lld") - before;
  }
  emxi_free(work);
  return status;
}

static emx_status big(bool in_file, bool limited, outcome *out) {
  emx_ctx *c;
  emx_kv *kv = NULL;
  emx_ctx_opts co;
  emx_ctx_opts_init(&co);
  co.threads = 2;
  EMX_TRY(emx_ctx_create(&co, &c));
  if (limited) {
    const int64_t have = number_in("/proc/self/statm", "%lld") * sysconf(_SC_PAGESIZE);
    const struct rlimit limit = {(rlim_t)(have + ROOM), (rlim_t)(have + ROOM)};
    if (have < 0 || setrlimit(RLIMIT_AS, &limit)) return emxi_fail(EMX_ERR_INTERNAL, "no limit");
  }
  emx_kv_opts o = opts_of(in_file ? path : NULL, BIG_N / P);
  o.head_dim = BIG_D;
  o.summaries = EMX_SUMMARY_SKETCH;
  o.max_seqs = 1;
  int32_t seq;
  EMX_TRY(emx_kv_create(c, &o, &kv));
  EMX_TRY(emx_seq_create(kv, &seq));
  EMX_TRY(fill_big(c, kv, seq));
  const int fd = in_file ? open_again() : -1;
  if (in_file && fd < 0) return emxi_fail(EMX_ERR_INTERNAL, "the file is not there");
  EMX_TRY(big_decode(c, kv, seq, in_file ? EMX_SELECT_CERTIFIED : EMX_SELECT_ALL, fd, out));
  emx_kv_destroy(kv);
  emx_ctx_destroy(c);
  return EMX_OK;
}

static void test_larger_than_memory(void **state) {
  (void)state;
  outcome *out = mmap(NULL, 2 * sizeof *out, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  assert_ptr_not_equal(out, MAP_FAILED);
  if (LIMITED) { /* the limit is one: in memory they do not fit */
    const pid_t child = fork();
    if (!child) _exit(big(false, true, out) == EMX_ERR_NOMEM ? 0 : 1);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
  }
  for (int f = 0; f < 2; f++) {
    const pid_t child = fork();
    if (!child) {
      const emx_status status = big(f, f && LIMITED, &out[f]);
      if (status) snprintf(out[f].error, sizeof out[f].error, "%s", emx_last_error());
      _exit(status != 0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (status) fail_msg("%s: %s (status %d)", f ? "file" : "memory", out[f].error, status);
  }
  int64_t total = 0, most = 0, support = 0;
  for (int i = 0; i < QUERIES; i++) {
    assert_memory_equal(out[0].o[i], out[1].o[i], sizeof out[0].o[i]);
    for (int g = 0; g < G; g++) {
      const emx_report *all = &out[0].reports[i][g], *r = &out[1].reports[i][g];
      assert_int_equal(r->path, EMX_PATH_LADDER);
      assert_true(r->flags & EMX_REPORT_CERTIFIED);
      assert_true(r->support == all->support && r->support >= 1 && r->tau == all->tau);
      support += r->support;
    }
    total += out[1].read_bytes[i];
    most = out[1].read_bytes[i] > most ? out[1].read_bytes[i] : most;
  }
  print_message(
      "K and V %lld MiB, at most %lld MiB more than at the start were mapped; cold, the system read %lld bytes a token for "
      "%.1f keys of support a head\n",
      (long long)(BIG_BYTES >> 20), (long long)(ROOM >> 20), (long long)total / QUERIES, (double)support / (QUERIES * G));
  /* A file system in memory reads from no device, and then there is nothing to count. Else: something was read, a hundredth of K
   * and V at most (they have 2048 topics). */
  if (total > 0) assert_true(most <= BIG_BYTES / 100);
  munmap(out, 2 * sizeof *out);
}

int main(void) {
  const struct CMUnitTest alone[] = {cmocka_unit_test(test_larger_than_memory)}; /* forks: no threads yet */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_same_bits),
      cmocka_unit_test(test_life),
      cmocka_unit_test(test_refusals),
      cmocka_unit_test(test_faults),
  };
  return cmocka_run_group_tests(alone, name_file, NULL) | cmocka_run_group_tests(tests, setup, teardown);
}
