/* Threads: two on one context, several contexts at once, a cancellation from outside, a fork of a process with workers. What each
 * thread computes is what it computes alone. Run these under ThreadSanitizer. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "cache_help.h"
#include "tiny_model.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__SANITIZE_THREAD__)
#define EMX_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EMX_TSAN 1
#endif
#endif

enum { V = 50, STEPS = 24, THREADS = 3, G = 2, D = 32, H = 4 };
static char folder[32];

/* Thread functions return NULL, or what went wrong: cmocka's checks belong to the main thread. */
#define MUST(call)                    \
  do {                                \
    if (call) return (void *)(#call); \
  } while (0)

static int setup(void **state) {
  (void)state;
  const emx_model_config c = tiny_config();
  return !folder_create(folder) || !tiny_write(folder, &c, 3);
}
static int teardown(void **state) {
  (void)state;
  tiny_remove(folder);
  return rmdir(folder);
}
static emx_ctx *context(int32_t threads) {
  emx_ctx_opts o;
  emx_ctx *ctx = NULL;
  emx_ctx_opts_init(&o);
  o.threads = threads;
  assert_int_equal(emx_ctx_create(&o, &ctx), EMX_OK);
  return ctx;
}
static void run_all(void *(*f)(void *), void *args, size_t size, int n) {
  pthread_t t[8];
  for (int i = 0; i < n; i++) assert_int_equal(pthread_create(&t[i], NULL, f, (char *)args + (size_t)i * size), 0);
  for (int i = 0; i < n; i++) {
    void *failed;
    pthread_join(t[i], &failed);
    if (failed) fail_msg("thread %d: %s: %s", i, (char *)failed, emx_last_error());
  }
}

/* ---- one cache, a sequence a thread */

typedef struct cache_job {
  emx_ctx *ctx;
  emx_kv *kv;
  uint64_t seed;
  float o[STEPS][H * D];
} cache_job;

/* Appends tokens and decodes after each; looks at the cache and forks in between. */
static void *use_cache(void *arg) {
  cache_job *j = arg;
  static const int64_t ks[4] = {1, G, 1, D}, qs[4] = {1, H, 1, D};
  float k[G * D], v[G * D], q[H * D];
  int32_t seq, fork_id;
  char *work = malloc(1 << 18);
  emx_kv_info info = {.struct_size = sizeof info};
  MUST(!work);
  MUST(emx_seq_create(j->kv, &seq));
  for (int step = 0; step < STEPS; step++) {
    emxi_normals(j->seed, (uint64_t)(3 * step), k, G * D);
    emxi_normals(j->seed, (uint64_t)(3 * step + 1), v, G * D);
    emxi_normals(j->seed, (uint64_t)(3 * step + 2), q, H * D);
    emx_tensor tk = emx_tensor_view(k, EMX_F32, 4, ks), tv = emx_tensor_view(v, EMX_F32, 4, ks),
               tq = emx_tensor_view(q, EMX_F32, 4, qs), to = emx_tensor_view(j->o[step], EMX_F32, 4, qs);
    emx_select_desc select;
    emx_select_desc_init(&select);
    select.kind = EMX_SELECT_TOPK;
    select.budget = 16;
    emx_decode_io io;
    emx_decode_io_init(&io);
    io.alpha = 1.5;
    io.q = &tq;
    io.k_new = &tk;
    io.v_new = &tv;
    io.o = &to;
    emx_kv_batch b;
    emx_kv_batch_init(&b);
    b.batch = 1;
    b.seqs = &seq;
    size_t bytes;
    MUST(emx_decode_workspace_size(j->ctx, j->kv, &select, &io, STEPS, &bytes));
    MUST(bytes > 1 << 18);
    MUST(emx_decode(j->ctx, j->kv, &b, &select, &io, work, bytes));
    MUST(emx_kv_get_info(j->kv, &info));
    MUST(emx_seq_fork(j->kv, seq, &fork_id));
    MUST(emx_seq_truncate(j->kv, fork_id, step / 2));
    MUST(emx_seq_destroy(j->kv, fork_id));
  }
  free(work);
  MUST(emx_seq_destroy(j->kv, seq));
  return NULL;
}

static void test_one_context(void **state) {
  (void)state;
  static cache_job alone[THREADS], together[THREADS];
  emx_ctx *ctx = context(2);
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.kv_heads = G;
  o.head_dim = D;
  o.summaries = EMX_SUMMARY_MINMAX;
  o.max_pages = 4 * THREADS;
  emx_kv *kv;
  assert_int_equal(emx_kv_create(ctx, &o, &kv), EMX_OK);
  for (int i = 0; i < THREADS; i++) {
    alone[i] = together[i] = (cache_job){.ctx = ctx, .kv = kv, .seed = 5 + (uint64_t)i};
    assert_null(use_cache(&alone[i]));
  }
  run_all(use_cache, together, sizeof *together, THREADS);
  for (int i = 0; i < THREADS; i++) assert_memory_equal(alone[i].o, together[i].o, sizeof alone[i].o);
  assert_int_equal(kv->n_free, kv->max_pages);
  emx_kv_destroy(kv);
  emx_ctx_destroy(ctx);
}

/* ---- sessions: of one model, and each with a context of its own */

typedef struct session_job {
  emx_model *model; /* NULL: its own, over a context of 1 + seed % 3 workers */
  uint64_t seed;
  float logits[STEPS][V];
} session_job;

static void *run_session(session_job *j, emx_model *model) {
  int32_t tokens[40];
  emx_session_opts o;
  emx_session_opts_init(&o);
  o.max_tokens = 100;
  o.chunk = 16;
  o.max_sessions = 2;
  emx_session *s, *f;
  emx_session_stats stats = {.struct_size = sizeof stats};
  MUST(emx_session_create(model, &o, &s));
  for (int i = 0; i < 40; i++) tokens[i] = (int32_t)((j->seed * 31 + (uint64_t)(i * i)) % V);
  MUST(emx_session_prefill(s, tokens, 40, NULL, j->logits[0], NULL, NULL));
  MUST(emx_session_fork(s, &f));
  for (int i = 1; i < STEPS; i++) {
    MUST(emx_session_decode(f, tokens[i], j->logits[i]));
    MUST(emx_session_length(f) != 40 + i);
    MUST(emx_session_get_stats(f, &stats));
  }
  emx_session_destroy(f);
  emx_session_destroy(s);
  return NULL;
}
static void *use_session(void *arg) {
  session_job *j = arg;
  if (j->model) return run_session(j, j->model);
  emx_ctx_opts o;
  emx_ctx *ctx;
  emx_model *model;
  emx_ctx_opts_init(&o);
  o.threads = 1 + (int32_t)(j->seed % 3);
  MUST(emx_ctx_create(&o, &ctx));
  MUST(emx_model_open(ctx, folder, &model));
  void *failed = run_session(j, model);
  emx_model_close(model);
  emx_ctx_destroy(ctx);
  return failed;
}
static void test_sessions(void **state) {
  (void)state;
  static session_job alone[THREADS], together[THREADS];
  emx_ctx *ctx = context(2);
  emx_model *model;
  assert_int_equal(emx_model_open(ctx, folder, &model), EMX_OK);
  for (int own = 0; own < 2; own++) {
    for (int i = 0; i < THREADS; i++) {
      alone[i] = together[i] = (session_job){.model = own ? NULL : model, .seed = (uint64_t)i};
      assert_null(use_session(&alone[i]));
    }
    run_all(use_session, together, sizeof *together, THREADS);
    for (int i = 0; i < THREADS; i++) assert_memory_equal(alone[i].logits, together[i].logits, sizeof alone[i].logits);
  }
  emx_model_close(model);
  emx_ctx_destroy(ctx);
}

/* ---- cancel */

typedef struct cancel_job {
  emx_ctx *ctx;
  emx_session *session;
  atomic_int calls, stop;
  int64_t done, cancelled;
} cancel_job;
static void *decode_on(void *arg) {
  cancel_job *j = arg;
  float logits[V];
  while (!atomic_load(&j->stop)) {
    emx_status status = emx_session_decode(j->session, (int32_t)(j->done % V), logits);
    if (status == EMX_ERR_CANCELLED) {
      j->cancelled++;
      emx_ctx_resume(j->ctx);
    } else if (status) {
      return "emx_session_decode";
    } else if (++j->done == 90) {
      MUST(emx_session_truncate(j->session, 0));
      j->done = 0;
    }
    atomic_fetch_add(&j->calls, 1);
  }
  return NULL;
}
static void test_cancel(void **state) {
  (void)state;
  cancel_job j = {.ctx = context(2)};
  emx_model *model;
  emx_session_opts o;
  emx_session_opts_init(&o);
  o.max_tokens = 100;
  o.max_sessions = 1;
  assert_int_equal(emx_model_open(j.ctx, folder, &model), EMX_OK);
  assert_int_equal(emx_session_create(model, &o, &j.session), EMX_OK);
  pthread_t t;
  assert_int_equal(pthread_create(&t, NULL, decode_on, &j), 0);
  for (int i = 0; i < 60; i++) {
    const int before = atomic_load(&j.calls);
    usleep((useconds_t)(i * 7 % 50));
    emx_ctx_cancel(j.ctx);
    while (atomic_load(&j.calls) == before) { /* and somebody looks on */
      emx_session_stats stats = {.struct_size = sizeof stats};
      assert_in_range(emx_session_length(j.session), 0, 90);
      assert_int_equal(emx_session_get_stats(j.session, &stats), EMX_OK);
      usleep(50);
    }
  }
  atomic_store(&j.stop, 1);
  void *failed;
  pthread_join(t, &failed);
  assert_null(failed);
  assert_true(j.cancelled > 0);
  emx_ctx_resume(j.ctx);
  /* Cancelled or not, the session holds exactly the tokens whose calls succeeded: the next logits are those of a fresh one. */
  assert_int_equal(emx_session_length(j.session), j.done);
  float got[V], want[V];
  emx_session *fresh;
  assert_int_equal(emx_session_create(model, &o, &fresh), EMX_OK);
  for (int64_t i = 0; i < j.done; i++) assert_int_equal(emx_session_decode(fresh, (int32_t)(i % V), want), EMX_OK);
  assert_int_equal(emx_session_decode(j.session, 7, got), EMX_OK);
  assert_int_equal(emx_session_decode(fresh, 7, want), EMX_OK);
  assert_memory_equal(got, want, sizeof got);
  emx_session_destroy(fresh);
  emx_session_destroy(j.session);
  emx_model_close(model);
  emx_ctx_destroy(j.ctx);
}

/* ---- fork */

static void test_fork(void **state) {
  (void)state;
#ifdef EMX_TSAN
  skip(); /* TSan does not follow threads that a forked child starts */
#endif
  static session_job parent, after;
  emx_ctx *ctx = context(3);
  emx_model *model;
  assert_int_equal(emx_model_open(ctx, folder, &model), EMX_OK);
  parent.model = after.model = model;
  assert_null(use_session(&parent)); /* the workers are there */
  pid_t child = fork();
  assert_true(child >= 0);
  if (!child) {
    alarm(60); /* a pool that waits for threads that stayed behind would hang */
    static session_job mine[2];
    int bad = 0;
    mine[0].model = model; /* the inherited context, and one of its own */
    for (int i = 0; i < 2; i++) bad |= use_session(&mine[i]) || memcmp(mine[i].logits, parent.logits, sizeof parent.logits);
    emx_model_close(model);
    emx_ctx_destroy(ctx);
    _exit(bad);
  }
  assert_null(use_session(&after)); /* at the same time */
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  assert_memory_equal(parent.logits, after.logits, sizeof parent.logits);
  emx_model_close(model);
  emx_ctx_destroy(ctx);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_one_context),
      cmocka_unit_test(test_sessions),
      cmocka_unit_test(test_cancel),
      cmocka_unit_test(test_fork),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
