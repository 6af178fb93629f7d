/* Status, memory, arena, tensors, context, threads, number formats, the counter-based generator. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "cpu/table.h"
#include "entmax/entmax.h"
#include "entmax_call.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- status */

static void test_status_names(void **state) {
  (void)state;
  assert_string_equal(emx_status_name(EMX_OK), "EMX_OK");
  assert_string_equal(emx_status_name(EMX_ERR_INVALID), "EMX_ERR_INVALID");
  assert_string_equal(emx_status_name(EMX_ERR_FORMAT), "EMX_ERR_FORMAT");
  assert_string_equal(emx_status_name(EMX_ERR_CANCELLED), "EMX_ERR_CANCELLED");
  assert_string_equal(emx_status_name(EMX_ERR_INTERNAL), "EMX_ERR_INTERNAL");
  static const int32_t unknown[] = {1, INT_MAX, EMX_ERR_INTERNAL - 1, INT_MIN};
  for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++)
    assert_string_equal(emx_status_name(unknown[i]), "unknown status");
  assert_int_equal(emxi_fail(EMX_ERR_IO, "first %d", 1), EMX_ERR_IO);
  assert_int_equal(emxi_fail(EMX_ERR_IO, "again: %s", emx_last_error()), EMX_ERR_IO); /* may quote the sentence before it */
  assert_string_equal(emx_last_error(), "again: first 1");
  char wide[32];
  snprintf(wide, sizeof wide, "%d.%d.%d", EMX_VERSION_MAJOR, EMX_VERSION_MINOR, EMX_VERSION_PATCH);
  assert_string_equal(emx_version(), wide);
  assert_int_equal(emx_abi_version(), EMX_ABI_VERSION);
}

static void *other_thread(void *arg) {
  *(bool *)arg = emx_last_error()[0] == 0;
  emxi_fail(EMX_ERR_IO, "elsewhere");
  return NULL;
}
static void test_detail_is_per_thread(void **state) {
  (void)state;
  bool clean = false;
  pthread_t t;
  emxi_fail(EMX_ERR_IO, "here");
  assert_int_equal(pthread_create(&t, NULL, other_thread, &clean), 0);
  pthread_join(t, NULL);
  assert_true(clean);
  assert_string_equal(emx_last_error(), "here");
}

/* ---- structs of callers that were compiled with another header */

/* A struct of three versions; the library knows the first two of them. */
typedef struct toy_1 {
  uint32_t struct_size;
  int32_t a;
  double b;
} toy_1;
typedef struct toy {
  uint32_t struct_size;
  int32_t a;
  double b;
  int64_t c; /* appended */
} toy;
typedef struct toy_3 {
  uint32_t struct_size;
  int32_t a;
  double b;
  int64_t c;
  int64_t d;
} toy_3;
#define EMXI_LAST_toy b
static emx_status toy_call(const toy *in, toy *seen) {
  EMXI_READ_STRUCT(in, toy);
  *seen = *in;
  return EMX_OK;
}
static emx_status toy_ask(toy *out) {
  const toy now = {.a = 1, .b = 2, .c = 3};
  EMXI_CHECK_STRUCT(out, toy);
  emxi_struct_write(out, &now, sizeof now);
  return EMX_OK;
}

static void test_struct_versions(void **state) {
  (void)state;
  toy seen = {0};
  struct {
    toy_1 in;
    int64_t behind; /* must not be taken for c */
  } old = {{sizeof old.in, 7, 0.5}, 99};
  assert_int_equal(toy_call((const toy *)(const void *)&old, &seen), EMX_OK);
  assert_true(seen.struct_size == sizeof seen && seen.a == 7 && seen.b == 0.5 && seen.c == 0);
  const toy same = {sizeof same, 8, 1.5, 4};
  assert_int_equal(toy_call(&same, &seen), EMX_OK);
  assert_memory_equal(&seen, &same, sizeof same);
  toy_3 later = {sizeof later, 9, 2.5, 5, 0};
  assert_int_equal(toy_call((const toy *)(const void *)&later, &seen), EMX_OK);
  assert_true(seen.struct_size == sizeof seen && seen.a == 9 && seen.c == 5);
  later.a = 10, later.d = 1; /* asks for what this version does not have */
  assert_int_equal(toy_call((const toy *)(const void *)&later, &seen), EMX_ERR_UNSUPPORTED);
  assert_non_null(strstr(emx_last_error(), "toy_call: this toy uses fields of a later version"));
  static const uint32_t sizes[] = {0, 4, sizeof(toy_1) - 1, UINT32_MAX};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    old.in.struct_size = sizes[i];
    assert_int_equal(toy_call((const toy *)(const void *)&old, &seen), EMX_ERR_INVALID);
    assert_int_equal(toy_ask((toy *)(void *)&old), EMX_ERR_INVALID);
    assert_non_null(strstr(emx_last_error(), "struct_size"));
  }
  assert_int_equal(toy_call(NULL, &seen), EMX_ERR_INVALID);
  assert_true(seen.a == 9 && old.in.a == 7); /* untouched */

  old.in.struct_size = sizeof old.in;
  assert_int_equal(toy_ask((toy *)(void *)&old), EMX_OK);
  assert_true(old.in.struct_size == sizeof old.in && old.in.a == 1 && old.in.b == 2 && old.behind == 99);
  later = (toy_3){.struct_size = sizeof later, .d = 6}; /* only struct_size need be set */
  assert_int_equal(toy_ask((toy *)(void *)&later), EMX_OK);
  assert_true(later.struct_size == sizeof later && later.c == 3 && later.d == 0);
}
/* The same through entries of the library, with a struct of a later header. */
static void test_later_structs(void **state) {
  (void)state;
  struct {
    emx_ctx_opts v1;
    int64_t appended;
  } opts = {.v1 = {.struct_size = sizeof opts, .threads = 2}};
  struct {
    emx_ctx_info v1;
    int64_t appended;
  } info = {.v1 = {.struct_size = sizeof info}, .appended = -1};
  emx_ctx *ctx = NULL;
  assert_int_equal(emx_ctx_create(&opts.v1, &ctx), EMX_OK);
  assert_int_equal(emx_ctx_get_info(ctx, &info.v1), EMX_OK);
  assert_true(info.v1.threads == 2 && info.v1.struct_size == sizeof info && info.appended == 0);
  emx_ctx_destroy(ctx);
  opts.appended = 1;
  assert_int_equal(emx_ctx_create(&opts.v1, &ctx), EMX_ERR_UNSUPPORTED);
}

/* ---- memory and arena */

static void test_alloc(void **state) {
  (void)state;
  void *p = emxi_alloc(0);
  assert_non_null(p);
  emxi_free(p);
  p = emxi_calloc(1000);
  assert_int_equal((uintptr_t)p % EMXI_ALIGN, 0);
  for (int i = 0; i < 1000; i++) assert_int_equal(((char *)p)[i], 0);
  emxi_free(p);
  assert_null(emxi_alloc(SIZE_MAX));
  assert_null(emxi_alloc(SIZE_MAX - 10));
  assert_null(emxi_alloc(emxi_physical_memory() + 1));
  emxi_free(NULL);
  size_t out;
  assert_false(emxi_mul(SIZE_MAX / 2, 3, &out));
  assert_false(emxi_add(SIZE_MAX, 1, &out));
  assert_true(emxi_mul(3, 5, &out) && out == 15);
}

static void test_arena(void **state) {
  (void)state;
  /* Counting and carving are one code path, so they must agree for every misalignment of the caller's buffer. */
  emxi_arena count, carve;
  emxi_arena_init(&count, NULL, 0);
  assert_null(emxi_arena_take(&count, 3, 7));
  assert_null(emxi_arena_take(&count, 0, 8));
  assert_null(emxi_arena_take(&count, 100, 4));
  const size_t total = emxi_arena_total(&count);
  char *buffer = malloc(total + EMXI_ALIGN);
  for (size_t shift = 0; shift < EMXI_ALIGN; shift++) {
    emxi_arena_init(&carve, buffer + shift, total);
    char *a = emxi_arena_take(&carve, 3, 7), *b = emxi_arena_take(&carve, 0, 8), *c = emxi_arena_take(&carve, 100, 4);
    assert_true(a && b && c && a >= buffer + shift && c + 400 <= buffer + shift + total);
    assert_true((uintptr_t)a % EMXI_ALIGN == 0 && (uintptr_t)c % EMXI_ALIGN == 0 && b >= a + 21 && c >= b);
    assert_int_equal(emxi_arena_check(&carve, "test"), EMX_OK);
    assert_null(emxi_arena_take(&carve, (int64_t)total, 1));
    assert_int_equal(emxi_arena_check(&carve, "test"), EMX_ERR_WORKSPACE);
    emxi_arena_init(&carve, buffer + shift, total - EMXI_ALIGN - 1 - 63); /* one line short */
    emxi_arena_take(&carve, 3, 7);
    emxi_arena_take(&carve, 0, 8);
    emxi_arena_take(&carve, 100, 4);
    assert_int_equal(emxi_arena_check(&carve, "test"), EMX_ERR_WORKSPACE);
  }
  free(buffer);
  static const struct {
    int64_t count;
    size_t size;
  } absurd[] = {{-1, 4}, {INT64_MAX, 4}, {INT64_MAX, SIZE_MAX}, {2, SIZE_MAX - 70}};
  for (size_t i = 0; i < sizeof absurd / sizeof *absurd; i++) {
    emxi_arena_init(&count, NULL, 0);
    emxi_arena_take(&count, 10, 1);
    emxi_arena_take(&count, absurd[i].count, absurd[i].size);
    assert_true(emxi_arena_total(&count) == SIZE_MAX); /* so that no caller's buffer is ever large enough */
    assert_int_equal(emxi_arena_check(&count, "test"), EMX_ERR_WORKSPACE);
  }
  emxi_arena_init(&carve, "", 1); /* smaller than the alignment */
  assert_null(emxi_arena_take(&carve, 1, 1));
}

/* ---- tensors */

static void test_tensor_view(void **state) {
  (void)state;
  static const int64_t shape[5] = {2, 3, 4, 5, 6}, absurd[3] = {INT64_MAX, INT64_MAX, 2}, empty[2] = {0, 7};
  float data[1];
  emx_tensor t = emx_tensor_view(data, EMX_F32, 5, shape);
  assert_true(t.stride[0] == 360 && t.stride[3] == 6 && t.stride[4] == 1 && t.shape[2] == 4);
  emx_ctx *ctx;
  assert_int_equal(emx_ctx_create(NULL, &ctx), EMX_OK);
  assert_int_equal(emxi_tensor_check(ctx, &t, 5, "test", "t"), EMX_OK);
  t = emx_tensor_view(data, EMX_F32, 6, shape);
  assert_int_not_equal(emxi_tensor_check(ctx, &t, 5, "test", "t"), EMX_OK);
  t = emx_tensor_view(data, EMX_F32, -1, shape);
  assert_int_not_equal(emxi_tensor_check(ctx, &t, 1, "test", "t"), EMX_OK);
  t = emx_tensor_view(data, EMX_F32, 3, absurd);
  assert_int_not_equal(emxi_tensor_check(ctx, &t, 3, "test", "t"), EMX_OK);
  t = emx_tensor_view(NULL, EMX_F32, 2, empty);
  assert_int_equal(emxi_tensor_check(ctx, &t, 2, "test", "t"), EMX_OK);
  emx_ctx_destroy(ctx);
  static const struct {
    int32_t dtype;
    size_t size;
    const char *name;
  } dtypes[] = {{EMX_F32, 4, "f32"}, {EMX_F16, 2, "f16"}, {EMX_BF16, 2, "bf16"}, {EMX_F64, 8, "f64"},
                {EMX_I32, 4, "i32"}, {99, 0, "unknown"},  {0, 0, "unknown"}};
  for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
    assert_true(emx_dtype_size(dtypes[i].dtype) == dtypes[i].size);
    assert_string_equal(emx_dtype_name(dtypes[i].dtype), dtypes[i].name);
  }
}

static void test_bad_tensors(void **state) {
  (void)state;
  emx_ctx *ctx;
  assert_int_equal(emx_ctx_create(NULL, &ctx), EMX_OK);
  float x[12] = {0}, p[12];
  int32_t support[3];
  const int64_t shape[2] = {3, 4};
  const emx_tensor good = emx_tensor_view(x, EMX_F32, 2, shape), out = emx_tensor_view(p, EMX_F32, 2, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  assert_int_equal(entmax_forward(ctx, &desc, &good, &out, NULL, NULL), EMX_OK);
  memset(p, 42, sizeof p);
  float before[12];
  memcpy(before, p, sizeof p);
#define REFUSED(expected, field_change)                                                  \
  do {                                                                                   \
    emx_tensor bad = good;                                                               \
    field_change;                                                                        \
    assert_int_equal(entmax_forward(ctx, &desc, &bad, &out, NULL, NULL), expected);      \
    assert_true(strstr(emx_last_error(), "x") != NULL && strlen(emx_last_error()) > 10); \
  } while (0)
  REFUSED(EMX_ERR_SHAPE, bad.ndim = 1);
  REFUSED(EMX_ERR_SHAPE, bad.ndim = -1);
  REFUSED(EMX_ERR_SHAPE, bad.shape[0] = -3);
  REFUSED(EMX_ERR_SHAPE, bad.shape[1] = 5);
  REFUSED(EMX_ERR_SHAPE, bad.stride[1] = 2);
  REFUSED(EMX_ERR_SHAPE, bad.stride[0] = 0);
  REFUSED(EMX_ERR_SHAPE, bad.stride[0] = -4);
  REFUSED(EMX_ERR_SHAPE, bad.stride[0] = INT64_MAX);
  REFUSED(EMX_ERR_DTYPE, bad.dtype = 77);
  REFUSED(EMX_ERR_DTYPE, bad.dtype = EMX_I32);
  REFUSED(EMX_ERR_DTYPE, bad.dtype = EMX_F64);
  REFUSED(EMX_ERR_INVALID, bad.device = EMX_DEVICE_CUDA);
  REFUSED(EMX_ERR_INVALID, bad.data = NULL);
#undef REFUSED
  emx_tensor one = emx_tensor_view(support, EMX_I32, 1, shape);
  assert_int_equal(entmax_forward(ctx, &desc, NULL, &out, NULL, NULL), EMX_ERR_INVALID);
  assert_int_equal(entmax_forward(ctx, &desc, &good, NULL, NULL, NULL), EMX_ERR_INVALID);
  assert_int_equal(entmax_forward(NULL, &desc, &good, &out, NULL, NULL), EMX_ERR_INVALID);
  assert_int_equal(entmax_forward(ctx, NULL, &good, &out, NULL, NULL), EMX_ERR_INVALID);
  assert_int_equal(entmax_forward(ctx, &desc, &good, &out, &one, NULL), EMX_ERR_DTYPE); /* tau must be floating */
  one.shape[0] = 2;
  assert_int_equal(entmax_forward(ctx, &desc, &good, &out, NULL, &one), EMX_ERR_SHAPE);
  static const double alphas[] = {0, 0.999, 4.001, -1, NAN, INFINITY};
  for (size_t i = 0; i < sizeof alphas / sizeof *alphas; i++) {
    desc.alpha = alphas[i];
    assert_int_equal(entmax_forward(ctx, &desc, &good, &out, NULL, NULL), EMX_ERR_INVALID);
  }
  emx_entmax_desc_init(&desc);
  desc.struct_size = 4;
  assert_int_equal(entmax_forward(ctx, &desc, &good, &out, NULL, NULL), EMX_ERR_INVALID);
  emx_entmax_desc_init(&desc);
  desc.alpha = 5;
  assert_int_equal(entmax_backward(ctx, &desc, &good, &out, &out), EMX_ERR_INVALID);
  assert_memory_equal(p, before, sizeof p); /* nothing was written on the way */
  emx_ctx_destroy(ctx);
}

/* ---- context */

static void test_context_options(void **state) {
  (void)state;
  emx_ctx *const untouched = (emx_ctx *)&state, *ctx = untouched;
  emx_ctx_opts opts;
#define REFUSED(expected, change)                            \
  do {                                                       \
    emx_ctx_opts_init(&opts);                                \
    change;                                                  \
    assert_int_equal(emx_ctx_create(&opts, &ctx), expected); \
    assert_ptr_equal(ctx, untouched);                        \
  } while (0)
  REFUSED(EMX_ERR_INVALID, opts.struct_size = 0);
  REFUSED(EMX_ERR_INVALID, opts.threads = -1);
  REFUSED(EMX_ERR_INVALID, opts.threads = EMXI_MAX_THREADS + 1);
  REFUSED(EMX_ERR_INVALID, opts.device = 17);
  REFUSED(EMX_ERR_UNSUPPORTED, opts.device = EMX_DEVICE_CUDA); /* the archive that tests link has the CPU's back end alone */
  assert_non_null(strstr(emx_last_error(), "CPU"));            /* names the nearest thing that works */
  assert_int_equal(emx_ctx_create(NULL, NULL), EMX_ERR_INVALID);

  static const char *const bad_threads[] = {"0", "-1", "257", "two", "2x", "99999999999999999999", " "};
  for (size_t i = 0; i < sizeof bad_threads / sizeof *bad_threads; i++) {
    setenv("EMX_THREADS", bad_threads[i], 1);
    REFUSED(EMX_ERR_INVALID, (void)0);
    assert_non_null(strstr(emx_last_error(), "EMX_THREADS"));
  }
  setenv("EMX_THREADS", "3", 1);
  emx_ctx_info info = {.struct_size = sizeof info};
  assert_int_equal(emx_ctx_create(NULL, &ctx), EMX_OK);
  assert_int_equal(emx_ctx_get_info(ctx, &info), EMX_OK);
  assert_int_equal(info.threads, 3);
  assert_int_equal(info.device, EMX_DEVICE_CPU);
  assert_true(strlen(info.device_name) > 0);
  info.struct_size = 3;
  assert_int_equal(emx_ctx_get_info(ctx, &info), EMX_ERR_INVALID);
  assert_int_equal(emx_ctx_get_info(ctx, NULL), EMX_ERR_INVALID);
  assert_int_equal(emx_ctx_sync(ctx), EMX_OK);
  assert_int_equal(emx_ctx_set_stream(ctx, NULL), EMX_OK);
  emx_ctx_destroy(ctx);
  ctx = untouched;
  unsetenv("EMX_THREADS");

  static const char *const bad_isa[] = {"sse9", "AVX2", "scalar ", "gpu"};
  for (size_t i = 0; i < sizeof bad_isa / sizeof *bad_isa; i++) {
    setenv("EMX_ISA", bad_isa[i], 1);
    REFUSED(EMX_ERR_INVALID, (void)0);
    assert_non_null(strstr(emx_last_error(), "EMX_ISA"));
  }
  for (int i = 0; emxi_table_available(i); i++) {
    setenv("EMX_ISA", emxi_table_available(i)->name, 1);
    assert_int_equal(emx_ctx_create(NULL, &ctx), EMX_OK);
    info.struct_size = sizeof info;
    assert_int_equal(emx_ctx_get_info(ctx, &info), EMX_OK);
    assert_string_equal(info.isa, emxi_table_available(i)->name);
    emx_ctx_destroy(ctx);
    ctx = untouched;
  }
  unsetenv("EMX_ISA");
  emx_ctx_destroy(NULL);
  emx_ctx_cancel(NULL);
  emx_ctx_resume(NULL);
  assert_int_equal(emx_ctx_sync(NULL), EMX_ERR_INVALID);
  assert_int_equal(emx_ctx_set_stream(NULL, NULL), EMX_ERR_INVALID);
  assert_int_equal(emx_ctx_get_info(NULL, &info), EMX_ERR_INVALID);
#undef REFUSED
}

/* ---- threads */

enum { TASKS = 1000 };
typedef struct counts {
  atomic_int seen[TASKS];
  atomic_int in_use[EMXI_MAX_THREADS];
  atomic_int wrong, total;
  int32_t threads;
  emx_ctx *ctx;
  int cancel_at;
} counts;
static void count_task(void *arg, int64_t i, int32_t worker) {
  counts *c = arg;
  if (i < 0 || i >= TASKS || worker < 0 || worker >= c->threads) {
    atomic_fetch_add(&c->wrong, 1);
    return;
  }
  if (atomic_fetch_add(&c->in_use[worker], 1)) atomic_fetch_add(&c->wrong, 1);
  atomic_fetch_add(&c->seen[i], 1);
  if (atomic_fetch_add(&c->total, 1) + 1 == c->cancel_at) emx_ctx_cancel(c->ctx);
  atomic_fetch_sub(&c->in_use[worker], 1);
}

static void test_pool(void **state) {
  (void)state;
  static const int32_t threads[] = {1, 2, 3, 16};
  counts *c = calloc(1, sizeof *c);
  for (size_t t = 0; t < sizeof threads / sizeof *threads; t++) {
    emxi_pool *pool;
    assert_int_equal(emxi_pool_create(threads[t], &pool), EMX_OK);
    static const int64_t sizes[] = {0, 1, 2, 15, TASKS};
    for (int round = 0; round < 20; round++)
      for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        memset(c, 0, sizeof *c);
        c->threads = threads[t];
        emxi_pool_run(pool, sizes[s], count_task, c);
        assert_int_equal(atomic_load(&c->wrong), 0);
        for (int64_t i = 0; i < TASKS; i++) assert_int_equal(atomic_load(&c->seen[i]), i < sizes[s]);
      }
    emxi_pool_destroy(pool);
  }
  free(c);
  emxi_pool_destroy(NULL);
}

static void test_cancel(void **state) {
  (void)state;
  emx_ctx *ctx;
  emx_ctx_opts opts;
  emx_ctx_opts_init(&opts);
  opts.threads = 2;
  assert_int_equal(emx_ctx_create(&opts, &ctx), EMX_OK);
  counts *c = calloc(1, sizeof *c);
  c->threads = 2;
  c->ctx = ctx;
  c->cancel_at = 10;
  assert_int_equal(emxi_parallel(ctx, TASKS, count_task, c), EMX_ERR_CANCELLED);
  assert_in_range(atomic_load(&c->total), 10, 11); /* the other worker may be inside one more task */
  assert_int_equal(emxi_parallel(ctx, TASKS, count_task, c), EMX_ERR_CANCELLED); /* stays cancelled */
  float x[4] = {1, 2, 3, 4};
  int64_t shape[2] = {2, 2};
  emx_tensor tx = emx_tensor_view(x, EMX_F32, 2, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  assert_int_equal(entmax_forward(ctx, &desc, &tx, &tx, NULL, NULL), EMX_ERR_CANCELLED);
  emx_ctx_resume(ctx);
  memset(c->seen, 0, sizeof c->seen);
  c->cancel_at = 0;
  assert_int_equal(emxi_parallel(ctx, TASKS, count_task, c), EMX_OK);
  for (int i = 0; i < TASKS; i++) assert_int_equal(atomic_load(&c->seen[i]), 1);
  emx_ctx_destroy(ctx);
  free(c);
}

/* A caller's parallel_for that runs backwards on one worker. */
static void backwards(void *user, int64_t n, emx_task_fn task, void *arg) {
  ++*(int *)user;
  for (int64_t i = n; i-- > 0;) task(arg, i, 1);
}
static void test_parallel_for(void **state) {
  (void)state;
  int calls = 0;
  emx_ctx *ctx;
  emx_ctx_opts opts;
  emx_ctx_opts_init(&opts);
  opts.threads = 2;
  opts.parallel_for = backwards;
  opts.parallel_user = &calls;
  assert_int_equal(emx_ctx_create(&opts, &ctx), EMX_OK);
  float x[6] = {0, 1, 2, 9, 9, -9}, p[6];
  int64_t shape[2] = {2, 3};
  emx_tensor tx = emx_tensor_view(x, EMX_F32, 2, shape), tp = emx_tensor_view(p, EMX_F32, 2, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  assert_int_equal(entmax_forward(ctx, &desc, &tx, &tp, NULL, NULL), EMX_OK);
  assert_int_equal(calls, 1);
  assert_true(p[3] == .5f && p[4] == .5f && p[5] == 0);
  emx_ctx_destroy(ctx);
}

/* Rows of a mapping, used by several threads and by a forked child. */
static int map_rows(emx_ctx *ctx) {
  enum { R = 64, N = 33 };
  float x[R * N], p[R * N];
  emxi_normals(7, 7, x, R * N);
  int64_t shape[2] = {R, N};
  emx_tensor tx = emx_tensor_view(x, EMX_F32, 2, shape), tp = emx_tensor_view(p, EMX_F32, 2, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  for (int round = 0; round < 20; round++) {
    if (entmax_forward(ctx, &desc, &tx, &tp, NULL, NULL)) return 1;
    for (int r = 0; r < R; r++) {
      double sum = 0;
      for (int i = 0; i < N; i++) sum += p[r * N + i];
      if (fabs(sum - 1) > 1e-6) return 2;
    }
  }
  return 0;
}
static void *map_thread(void *arg) { return map_rows(arg) ? arg : NULL; }

static void test_threads_share_a_context(void **state) {
  (void)state;
  emx_ctx *ctx;
  emx_ctx_opts opts;
  emx_ctx_opts_init(&opts);
  opts.threads = 2;
  assert_int_equal(emx_ctx_create(&opts, &ctx), EMX_OK);
  pthread_t t[3];
  for (int i = 0; i < 3; i++) assert_int_equal(pthread_create(&t[i], NULL, map_thread, ctx), 0);
  for (int i = 0; i < 3; i++) {
    void *failed;
    pthread_join(t[i], &failed);
    assert_null(failed);
  }
  emx_ctx_destroy(ctx);
}

#if defined(__SANITIZE_THREAD__)
#define EMX_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EMX_TSAN 1
#endif
#endif

static void test_fork(void **state) {
  (void)state;
#ifdef EMX_TSAN
  skip(); /* TSan does not follow threads that a forked child starts */
#endif
  emx_ctx *ctx;
  emx_ctx_opts opts;
  emx_ctx_opts_init(&opts);
  opts.threads = 3;
  assert_int_equal(emx_ctx_create(&opts, &ctx), EMX_OK);
  assert_int_equal(map_rows(ctx), 0);
  pid_t child = fork();
  assert_true(child >= 0);
  if (!child) {
    alarm(30); /* a pool that waits for threads that stayed behind would hang */
    int bad = map_rows(ctx);
    emx_ctx_destroy(ctx);
    _exit(bad);
  }
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  assert_int_equal(map_rows(ctx), 0); /* the parent's threads are as they were */
  emx_ctx_destroy(ctx);
}

static void test_allocation_failures(void **state) {
  (void)state;
  int failures = 0;
  for (int64_t n = 0;; n++) {
    emx_ctx *ctx = NULL;
    emxi_alloc_fail_after(n);
    emx_status status = emx_ctx_create(NULL, &ctx);
    if (status) {
      assert_int_equal(status, EMX_ERR_NOMEM);
      assert_null(ctx);
      failures++;
      continue;
    }
    emxi_alloc_fail_after(-1);
    emx_ctx_destroy(ctx);
    break;
  }
  assert_true(failures >= 3); /* context, pool, back end */
  /* The mapping's scratch is its only allocation: it fails once, then works. */
  emx_ctx *ctx;
  assert_int_equal(emx_ctx_create(NULL, &ctx), EMX_OK);
  float x[40];
  emxi_normals(1, 1, x, 40);
  int64_t shape[2] = {1, 40};
  emx_tensor tx = emx_tensor_view(x, EMX_F32, 2, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  emxi_alloc_fail_after(0);
  assert_int_equal(entmax_forward(ctx, &desc, &tx, &tx, NULL, NULL), EMX_ERR_NOMEM);
  emxi_alloc_fail_after(-1);
  assert_int_equal(entmax_forward(ctx, &desc, &tx, &tx, NULL, NULL), EMX_OK);
  emx_ctx_destroy(ctx);
}

/* ---- numbers */

static void test_half_floats(void **state) {
  (void)state;
  for (uint32_t h = 0; h < 65536; h++) {
    float b = emxi_bf16_to_f32((uint16_t)h), f = emxi_f16_to_f32((uint16_t)h);
    if (isnan(b))
      assert_true(isnan(emxi_bf16_to_f32(emxi_f32_to_bf16(b))));
    else
      assert_int_equal(emxi_f32_to_bf16(b), h);
    if (isnan(f))
      assert_true(isnan(emxi_f16_to_f32(emxi_f32_to_f16(f))));
    else
      assert_int_equal(emxi_f32_to_f16(f), h);
  }
  /* Between two neighbours the nearer one, halfway the even one. */
  for (uint32_t h = 0; h + 1 < 0x7c00; h++) {
    float lo = emxi_f16_to_f32((uint16_t)h), hi = emxi_f16_to_f32((uint16_t)(h + 1)), mid = 0.5f * (lo + hi);
    assert_int_equal(emxi_f32_to_f16(mid), h & 1 ? h + 1 : h);
    assert_int_equal(emxi_f32_to_f16(nextafterf(mid, 0)), h);
    assert_int_equal(emxi_f32_to_f16(nextafterf(mid, INFINITY)), h + 1);
    assert_int_equal(emxi_f32_to_f16(-mid), 0x8000u | (h & 1 ? h + 1 : h));
  }
  for (uint32_t h = 0; h + 1 < 0x7f80; h++) {
    float mid = (float)(0.5 * ((double)emxi_bf16_to_f32((uint16_t)h) + emxi_bf16_to_f32((uint16_t)(h + 1))));
    assert_int_equal(emxi_f32_to_bf16(mid), h & 1 ? h + 1 : h);
    assert_int_equal(emxi_f32_to_bf16(nextafterf(mid, INFINITY)), h + 1);
  }
  assert_int_equal(emxi_f32_to_f16(65519.996f), 0x7bff);
  assert_int_equal(emxi_f32_to_f16(65520), 0x7c00);
  assert_int_equal(emxi_f32_to_f16(1e30f), 0x7c00);
  assert_int_equal(emxi_f32_to_f16(-INFINITY), 0xfc00);
  assert_int_equal(emxi_f32_to_bf16(3.4e38f), 0x7f80); /* rounds up to infinity, as IEEE asks */
  static const int32_t dtypes[] = {EMX_F32, EMX_F64, EMX_BF16, EMX_F16, EMX_I32};
  for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
    double cell[2] = {0};
    emxi_store(cell, dtypes[i], 1, -3);
    assert_true(emxi_load(cell, dtypes[i], 1) == -3 && emxi_load(cell, dtypes[i], 0) == 0);
  }
  assert_true(isnan(emxi_load("", 99, 0)));
}

/* Known answers of Philox4x32-10 from Random123's kat_vectors. */
static void test_philox(void **state) {
  (void)state;
  uint32_t w[4];
  emxi_philox(0, 0, 0, w);
  assert_true(w[0] == 0x6627e8d5 && w[1] == 0xe169c58d && w[2] == 0xbc57ac4c && w[3] == 0x9b00dbd8);
  emxi_philox(UINT64_MAX, UINT64_MAX, UINT64_MAX, w);
  assert_true(w[0] == 0x408f276d && w[1] == 0x41c83b0e && w[2] == 0xa20bc7c6 && w[3] == 0x6d5451fd);
  emxi_philox(0x299f31d0a4093822u, 0x0370734413198a2eu, 0x85a308d3243f6a88u, w);
  assert_true(w[0] == 0xd16cfe09 && w[1] == 0x94fdcceb && w[2] == 0x5001e420 && w[3] == 0x24126ea1);
  enum { N = 20000 };
  static float x[N];
  double sum = 0, square = 0, fourth = 0;
  emxi_normals(3, 4, x, N);
  for (int i = 0; i < N; i++) {
    sum += x[i];
    square += x[i] * (double)x[i];
    fourth += pow(x[i], 4);
  }
  /* four standard errors of 20000 samples: sqrt(1/N), sqrt(2/N), sqrt(96/N) */
  assert_true(fabs(sum / N) < 0.029 && fabs(square / N - 1) < 0.041 && fabs(fourth / N - 3) < 0.28);
  float part[8];
  emxi_normals(3, 4, part, 7); /* a prefix is a prefix */
  assert_memory_equal(part, x, 7 * sizeof *x);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_status_names),
                                     cmocka_unit_test(test_detail_is_per_thread),
                                     cmocka_unit_test(test_struct_versions),
                                     cmocka_unit_test(test_later_structs),
                                     cmocka_unit_test(test_alloc),
                                     cmocka_unit_test(test_arena),
                                     cmocka_unit_test(test_tensor_view),
                                     cmocka_unit_test(test_bad_tensors),
                                     cmocka_unit_test(test_context_options),
                                     cmocka_unit_test(test_pool),
                                     cmocka_unit_test(test_cancel),
                                     cmocka_unit_test(test_parallel_for),
                                     cmocka_unit_test(test_threads_share_a_context),
                                     cmocka_unit_test(test_fork),
                                     cmocka_unit_test(test_allocation_failures),
                                     cmocka_unit_test(test_half_floats),
                                     cmocka_unit_test(test_philox)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
