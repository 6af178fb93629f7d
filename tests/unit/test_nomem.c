/* Out of memory at every place: each public call that may allocate runs with its first, second, ... allocation failing, until it
 * succeeds; once with that one alone, once with all later ones failing too. The call must say NOMEM, leave handles, results,
 * caches and files as they were, and leak nothing (the ASan build looks). Calls that promise not to allocate are held to that.
 *
 * The program is linked so that malloc and its like, as called by the libraries, come here first (CMakeLists.txt, --wrap);
 * jansson is told to come here as well. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "cache_help.h"
#include "tiny_model.h"

#include <dirent.h>
#include <errno.h>
#include <jansson.h>
#include <stdatomic.h>
#include <sys/mman.h>

/* ---- the allocators */

static atomic_int countdown = -1; /* requests until the one that fails; -1: none */
static atomic_bool armed, failed, failed_in_json;
static bool persistent;

static bool refuse(bool json) {
  if (!atomic_load(&armed)) return false;
  const int left = atomic_load(&countdown);
  if (left < 0) return false;
  if (left == 0) {
    if (!persistent) atomic_store(&countdown, -1);
    atomic_store(&failed, true);
    atomic_store(&failed_in_json, json);
    errno = ENOMEM;
    return true;
  }
  atomic_store(&countdown, left - 1);
  return false;
}

/* The linker's names. */
void *__real_malloc(size_t size);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t size);
void *__real_aligned_alloc(size_t align, size_t size);
char *__real_strdup(const char *s);
char *__real_realpath(const char *path, char *out);
void *__real_mmap(void *p, size_t size, int protection, int flags, int fd, off_t offset);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t size);
void *__wrap_aligned_alloc(size_t align, size_t size);
char *__wrap_strdup(const char *s);
char *__wrap_realpath(const char *path, char *out);
void *__wrap_mmap(void *p, size_t size, int protection, int flags, int fd, off_t offset);

void *__wrap_malloc(size_t size) { return refuse(false) ? NULL : __real_malloc(size); }
void *__wrap_calloc(size_t n, size_t size) { return refuse(false) ? NULL : __real_calloc(n, size); }
void *__wrap_realloc(void *p, size_t size) { return refuse(false) ? NULL : __real_realloc(p, size); }
void *__wrap_aligned_alloc(size_t align, size_t size) { return refuse(false) ? NULL : __real_aligned_alloc(align, size); }
char *__wrap_strdup(const char *s) { return refuse(false) ? NULL : __real_strdup(s); }
char *__wrap_realpath(const char *path, char *out) { return refuse(false) ? NULL : __real_realpath(path, out); }
void *__wrap_mmap(void *p, size_t size, int protection, int flags, int fd, off_t offset) {
  return refuse(false) ? MAP_FAILED : __real_mmap(p, size, protection, flags, fd, offset);
}
/* jansson 2.14 writes past its token buffer, of 32, 64, ... bytes, when it cannot grow it. That is not ours to test; the library
 * asks for memory before it parses. */
static bool parses;
static void *json_alloc(size_t size) {
  const bool token = parses && size >= 32 && !(size & (size - 1));
  return !token && refuse(true) ? NULL : __real_malloc(size);
}

/* ---- what is called */

enum { V = 50, N = 60, G = 2, D = 16, P = 16 };
static char folder[32], path[64], link_path[64], train_folder[64];
static emx_ctx *ctx;
static emx_model *model;
static emx_kv *kv, *target;
static emx_session *session, *fork_of;
static emx_trainer *trainer;
static int32_t tokens[N], ids[4], got[4], n_got;
static float nll[N], logits[V];
static uint8_t text[4000];
static void *out; /* of calls that make a handle */
#define SENTINEL ((void *)&out)

/* do: the call. undo: after it succeeded. same: what a failure must leave alone, as a number. */
typedef struct scenario {
  const char *name;
  emx_status (*call)(void);
  void (*undo)(void);
  int most; /* allocations that the call may make; 0: none */
  bool parses;
} scenario;

static emx_status call_ctx(void) {
  emx_ctx_opts o;
  emx_ctx_opts_init(&o);
  o.threads = 2;
  return emx_ctx_create(&o, (emx_ctx **)&out);
}
static void undo_ctx(void) { emx_ctx_destroy(out); }

static emx_kv_opts kv_options(int64_t pages) {
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.kv_heads = G;
  o.head_dim = D;
  o.summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS;
  o.max_seqs = 6;
  o.max_pages = pages;
  return o;
}
static emx_status call_kv(void) {
  const emx_kv_opts o = kv_options(8);
  return emx_kv_create(ctx, &o, (emx_kv **)&out);
}
static void undo_kv(void) { emx_kv_destroy(out); }
static emx_status call_kv_file(void) { /* the name is free again at once, whether it succeeds or not */
  emx_kv_opts o = kv_options(8);
  char name[80];
  snprintf(name, sizeof name, "%s/slow.tmp", folder);
  o.file = name;
  return emx_kv_create(ctx, &o, (emx_kv **)&out);
}

static emx_status append(emx_kv *to, int32_t seq, int64_t n) {
  static float k[G * 40 * D];
  emxi_normals(1, (uint64_t)n, k, G * n * D);
  emx_tensor t = emx_tensor_view(k, EMX_F32, 4, (int64_t[]){1, G, n, D});
  emx_kv_batch b;
  emx_kv_batch_init(&b);
  b.batch = 1;
  b.seqs = &seq;
  return emx_kv_append(ctx, to, &b, &t, &t, NULL);
}
static emx_status call_append(void) { return append(kv, ids[0], 20); }
static void undo_append(void) { assert_int_equal(emx_seq_truncate(kv, ids[0], 30), EMX_OK); }
static emx_status call_seqs(void) {
  int32_t seq, child;
  emx_status status = emx_seq_create(kv, &seq);
  if (!status) status = emx_seq_fork(kv, ids[0], &child);
  if (!status) status = append(kv, child, 3); /* copies the shared page */
  if (!status) status = emx_seq_destroy(kv, child);
  return status ? status : emx_seq_destroy(kv, seq);
}
static void nothing(void) {}

/* A row longer than any before: the mapping's scratch. */
static emx_status call_map(void) {
  static float x[4000];
  static int64_t length = 100;
  const int64_t shape[2] = {1, length};
  emxi_normals(2, 0, x, length);
  emx_tensor t = emx_tensor_view(x, EMX_F32, 2, shape);
  emx_entmax_desc desc;
  emx_entmax_io io;
  emx_entmax_desc_init(&desc);
  emx_entmax_io_init(&io);
  io.x = io.p = &t;
  emx_status status = emx_entmax_forward(ctx, &desc, &io);
  if (!status) length = length * 2 % 4000;
  return status;
}

static emx_status call_attention(void) {
  enum { S = 20 };
  static float q[S * D], o[S * D], dq[S * D], dk[S * D], dv[S * D], tau[S];
  static char work[1 << 20];
  emxi_normals(2, 0, q, S * D);
  const int64_t shape[4] = {1, 1, S, D}, rows[3] = {1, 1, S};
  emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, shape), to = emx_tensor_view(o, EMX_F32, 4, shape),
             tt = emx_tensor_view(tau, EMX_F32, 3, rows), tdq = emx_tensor_view(dq, EMX_F32, 4, shape),
             tdk = emx_tensor_view(dk, EMX_F32, 4, shape), tdv = emx_tensor_view(dv, EMX_F32, 4, shape);
  emx_attn_desc desc;
  emx_attn_io io;
  emx_attn_desc_init(&desc);
  emx_attn_io_init(&io);
  io.q = io.k = io.v = io.d_o = &tq;
  io.o = &to;
  io.tau = &tt;
  io.d_q = &tdq;
  io.d_k = &tdk;
  io.d_v = &tdv;
  emx_status status = EMX_OK;
  for (int32_t pass = EMX_PASS_FORWARD; pass <= EMX_PASS_BACKWARD && !status; pass++) {
    size_t bytes;
    status = emx_attn_workspace_size(ctx, &desc, &io, pass, &bytes);
    if (!status) status = (pass ? emx_attn_backward : emx_attn_forward)(ctx, &desc, &io, work, sizeof work);
  }
  return status;
}

static emx_status call_save(void) { return emx_kv_save(kv, ids, 2, path, NULL, NULL); }
static emx_status call_save_link(void) { return emx_kv_save(kv, ids, 2, link_path, NULL, NULL); }
static emx_status call_load(void) { return emx_kv_load(target, path, got, 4, &n_got, NULL, NULL); }
static void undo_load(void) {
  for (int i = 0; i < n_got; i++) assert_int_equal(emx_seq_destroy(target, got[i]), EMX_OK);
  n_got = -1;
  memset(got, 0xff, sizeof got);
}
static emx_status call_info(void) {
  emx_cache_info info = {.struct_size = sizeof info};
  return emx_cache_get_info(path, &info);
}

static emx_status call_checkpoint(void) {
  char name[80];
  snprintf(name, sizeof name, "%s/model.safetensors", folder);
  return emx_checkpoint_open(name, (emx_checkpoint **)&out);
}
static void undo_checkpoint(void) { emx_checkpoint_close(out); }
static emx_status call_write(void) {
  static float x[6];
  const emx_named_tensor t[2] = {{"a", emx_tensor_view(x, EMX_F32, 2, (int64_t[]){2, 3})},
                                 {"b", emx_tensor_view(x, EMX_F32, 1, (int64_t[]){4})}};
  static const char *const metadata[] = {"key", "value", "other", "text"};
  return emx_checkpoint_write(path, t, 2, metadata, 2);
}

static emx_status call_model(void) { return emx_model_open(ctx, folder, (emx_model **)&out); }
static void undo_model(void) { emx_model_close(out); }

static emx_status call_session(void) {
  emx_session_opts o;
  emx_session_opts_init(&o);
  o.max_tokens = 2 * N;
  o.max_sessions = 3;
  return emx_session_create(model, &o, (emx_session **)&out);
}
static void undo_session(void) { emx_session_destroy(out); }
static emx_status call_fork(void) { return emx_session_fork(session, (emx_session **)&out); }
static emx_status call_prefill(void) { return emx_session_prefill(fork_of, tokens, N, nll, logits, NULL, NULL); }
static void undo_prefill(void) { assert_int_equal(emx_session_truncate(fork_of, 0), EMX_OK); }
static emx_status call_decode(void) {
  emx_status status = emx_session_decode(session, 3, logits);
  if (!status) status = emx_session_logits(session, logits);
  return status ? status : emx_session_truncate(session, 40);
}
static emx_status call_session_save(void) { return emx_session_save(session, path, NULL, NULL); }
static emx_status call_session_load(void) { return emx_session_load(fork_of, path, NULL, NULL); }

static emx_train_opts train_options(void) {
  emx_train_opts o;
  emx_train_opts_init(&o);
  o.steps = 4;
  o.warmup = 1;
  o.length = 16;
  o.batch = 2;
  return o;
}
static emx_status trained(emx_status (*make)(const emx_model_config *, const emx_train_opts *, const emx_train_data *)) {
  static const uint8_t *files[1] = {text};
  static const int64_t sizes[1] = {sizeof text};
  const emx_model_config c = tiny_config();
  const emx_train_opts o = train_options();
  emx_train_data data;
  emx_train_data_init(&data);
  data.n_files = 1;
  data.files = files;
  data.sizes = sizes;
  return make(&c, &o, &data);
}
static emx_status trainer_create(const emx_model_config *c, const emx_train_opts *o, const emx_train_data *d) {
  return emx_trainer_create(ctx, c, o, d, (emx_trainer **)&out);
}
static emx_status trainer_resume(const emx_model_config *c, const emx_train_opts *o, const emx_train_data *d) {
  (void)c;
  return emx_trainer_resume(ctx, train_folder, o, d, (emx_trainer **)&out);
}
static emx_status call_trainer(void) { return trained(trainer_create); }
static emx_status call_resume(void) { return trained(trainer_resume); }
static void undo_trainer(void) { emx_trainer_destroy(out); }
static emx_status call_step(void) {
  static int done;
  emx_train_stats s = {.struct_size = sizeof s};
  return done++ < 4 ? emx_trainer_step(trainer, &s) : EMX_OK;
}
static emx_status call_evaluate(void) {
  double nats;
  return emx_trainer_evaluate(trainer, text, 400, &nats);
}
static emx_status call_trainer_save(void) { return emx_trainer_save(trainer, train_folder); }

/* ---- what a failure leaves alone */

/* Files of the folder, each whole or not there: names without content, apart from `path`, which must keep it. */
static void add_files(emxi_hash *h, const char *where, int *temporary) {
  DIR *d = opendir(where);
  assert_non_null(d);
  for (struct dirent *e; (e = readdir(d));)
    if (strstr(e->d_name, ".tmp")) ++*temporary;
  closedir(d);
  char *data;
  size_t size;
  if (!access(path, F_OK)) {
    assert_int_equal(emxi_file_read(path, 1 << 24, &data, &size), EMX_OK);
    emxi_hash_add(h, data, size);
    emxi_free(data);
  }
}
static fingerprint world(void) {
  emxi_hash h;
  fingerprint f;
  int temporary = 0;
  int64_t lengths[2] = {emx_session_length(session), emx_session_length(fork_of)};
  emxi_hash_init(&h);
  emxi_hash_add(&h, &out, sizeof out);
  fingerprint_add(&h, kv);
  fingerprint_add(&h, target);
  emxi_hash_add(&h, got, sizeof got);
  emxi_hash_add(&h, &n_got, sizeof n_got);
  emxi_hash_add(&h, lengths, sizeof lengths);
  emxi_hash_add(&h, logits, sizeof logits);
  emxi_hash_add(&h, nll, sizeof nll);
  add_files(&h, folder, &temporary);
  add_files(&h, train_folder, &temporary);
  assert_int_equal(temporary, 0);
  emxi_hash_end(&h, f.bytes);
  return f;
}
/* A session that failed says of the next token what it said before. */
static void next_logits(float out_logits[V]) {
  assert_int_equal(emx_session_decode(session, 9, out_logits), EMX_OK);
  assert_int_equal(emx_session_truncate(session, 40), EMX_OK);
}

static const scenario scenarios[] = {
    {"emx_ctx_create", call_ctx, undo_ctx, 9, false},
    {"emx_kv_create", call_kv, undo_kv, 9, false},
    {"emx_kv_create, file", call_kv_file, undo_kv, 9, false},
    {"emx_kv_append", call_append, undo_append, 0, false},
    {"emx_seq_create, _fork, _destroy", call_seqs, nothing, 0, false},
    {"emx_entmax_forward", call_map, nothing, 2, false},
    {"emx_attn_forward, _backward", call_attention, nothing, 0, false},
    {"emx_kv_save", call_save, nothing, 400, false},
    {"emx_kv_save over a link", call_save_link, nothing, 400, false},
    {"emx_kv_load", call_load, undo_load, 400, true},
    {"emx_cache_get_info", call_info, nothing, 400, true},
    {"emx_checkpoint_open", call_checkpoint, undo_checkpoint, 2000, true},
    {"emx_checkpoint_write", call_write, nothing, 400, false},
    {"emx_model_open", call_model, undo_model, 2000, true},
    {"emx_session_create", call_session, undo_session, 40, false},
    {"emx_session_fork", call_fork, undo_session, 9, false},
    {"emx_session_prefill", call_prefill, undo_prefill, 9, false},
    {"emx_session_decode, _logits", call_decode, nothing, 0, false},
    {"emx_session_save", call_session_save, nothing, 400, false},
    {"emx_session_load", call_session_load, undo_prefill, 400, true},
    {"emx_trainer_create", call_trainer, undo_trainer, 40, false},
    {"emx_trainer_step", call_step, nothing, 0, false},
    {"emx_trainer_evaluate", call_evaluate, nothing, 0, false},
    {"emx_trainer_save", call_trainer_save, nothing, 3000, false},
    {"emx_trainer_resume", call_resume, undo_trainer, 3000, true},
};

static emx_status attempt(const scenario *s, int n) {
  atomic_store(&failed, false);
  atomic_store(&failed_in_json, false);
  atomic_store(&countdown, n);
  atomic_store(&armed, true);
  emx_status status = s->call();
  atomic_store(&armed, false);
  atomic_store(&countdown, -1);
  return status;
}

static void test_every_allocation(void **state) {
  (void)state;
  const int count = (int)(sizeof scenarios / sizeof *scenarios);
  for (int i = 0; i < count; i++) {
    const scenario *s = &scenarios[i];
    parses = s->parses;
    for (int mode = 0; mode < 2; mode++) {
      float before[V], after[V];
      int n = 0;
      persistent = mode;
      next_logits(before);
      out = SENTINEL;
      fingerprint was = world();
      for (;; n++) {
        emx_status status = attempt(s, n);
        if (!status && !atomic_load(&failed)) break;
        if (!status) { /* somebody could do without: the result is a result */
          s->undo();
          out = SENTINEL;
          if (!fingerprint_same(was, world())) fail_msg("%s, allocation %d: another result", s->name, n);
          continue;
        }
        /* jansson calls a string that it has no memory for a wrong one: emx_model.h says so */
        if (status != EMX_ERR_NOMEM && !(status == EMX_ERR_FORMAT && atomic_load(&failed_in_json)))
          fail_msg("%s, allocation %d: %s (%s)", s->name, n, emx_status_name(status), emx_last_error());
        if (s->call == call_trainer_save) /* three files: those before the failure are new, and whole */
          was = world();
        if (!fingerprint_same(was, world())) fail_msg("%s, allocation %d: something has changed", s->name, n);
        if (n > s->most) fail_msg("%s: allocation %d and no end", s->name, n);
      }
      if (n > 0 && !s->most) fail_msg("%s promises not to allocate", s->name);
      if (n == 0 && s->most && !mode) fail_msg("%s: nothing was allocated: what does this test?", s->name);
      s->undo();
      out = SENTINEL;
      next_logits(after);
      assert_memory_equal(before, after, sizeof before);
      if (!mode) printf("%-34s %4d allocations\n", s->name, n);
    }
  }
}

static int setup(void **state) {
  (void)state;
  json_set_alloc_funcs(json_alloc, free);
  const emx_model_config c = tiny_config();
  const emx_kv_opts o = kv_options(12);
  emx_ctx_opts opts;
  emx_ctx_opts_init(&opts);
  opts.threads = 1;
  if (!folder_create(folder) || !tiny_write(folder, &c, 3)) return 1;
  snprintf(path, sizeof path, "%s/cache", folder);
  snprintf(link_path, sizeof link_path, "%s/link", folder);
  snprintf(train_folder, sizeof train_folder, "%s/trained", folder);
  for (int i = 0; i < N; i++) tokens[i] = i * i % V;
  for (size_t i = 0; i < sizeof text; i++) text[i] = (uint8_t)(i * i % 47);
  memset(got, 0xff, sizeof got);
  if (emx_ctx_create(&opts, &ctx) || emx_kv_create(ctx, &o, &kv) || emx_kv_create(ctx, &o, &target)) return 1;
  if (emx_seq_create(kv, &ids[0]) || append(kv, ids[0], 30) || emx_seq_fork(kv, ids[0], &ids[1]) || append(kv, ids[1], 5))
    return 1;
  if (emx_seq_create(target, &ids[2]) || append(target, ids[2], 3)) return 1;
  if (call_save() || symlink(path, link_path)) return 1;
  if (emx_model_open(ctx, folder, &model) || call_session()) return 1;
  session = out;
  if (emx_session_fork(session, &fork_of) || emx_session_prefill(session, tokens, 40, NULL, NULL, NULL, NULL)) return 1;
  if (call_trainer()) return 1;
  trainer = out;
  return emx_trainer_save(trainer, train_folder);
}
static int teardown(void **state) {
  (void)state;
  static const char *const names[] = {"config.json", "model.safetensors", "trainer.safetensors"};
  emx_trainer_destroy(trainer);
  emx_session_destroy(fork_of);
  emx_session_destroy(session);
  emx_model_close(model);
  emx_kv_destroy(target);
  emx_kv_destroy(kv);
  emx_ctx_destroy(ctx);
  for (int i = 0; i < 3; i++) {
    char name[128];
    snprintf(name, sizeof name, "%s/%s", train_folder, names[i]);
    remove(name);
  }
  rmdir(train_folder);
  unlink(link_path);
  unlink(path);
  tiny_remove(folder);
  return rmdir(folder);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_every_allocation)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
