/* Sessions on disk: a restored session goes on with the same bits, and a file that is refused changes nothing. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "cache_help.h"
#include "check.h"
#include "tiny_model.h"

enum { V = 50, N = 90 };
static char folder[32], path[64];
static emx_ctx *ctx;
static emx_model *model;
static int32_t tokens[N];

static int setup(void **state) {
  (void)state;
  const emx_model_config c = tiny_config();
  if (!folder_create(folder) || !tiny_write(folder, &c, 3)) return 1;
  snprintf(path, sizeof path, "%s/cache", folder);
  for (int i = 0; i < N; i++) {
    uint32_t r[4];
    emxi_philox(11, 0, (uint64_t)i, r);
    tokens[i] = (int32_t)(r[0] % V);
  }
  return emx_ctx_create(NULL, &ctx) || emx_model_open(ctx, folder, &model);
}
static int teardown(void **state) {
  (void)state;
  emx_model_close(model);
  emx_ctx_destroy(ctx);
  tiny_remove(folder);
  unlink(path);
  return rmdir(folder);
}

static emx_session *session(emx_model *m, int32_t dtype, int32_t page, int64_t max_tokens) {
  emx_session_opts o;
  emx_session_opts_init(&o);
  o.kv_dtype = dtype;
  o.page_size = page;
  o.chunk = 32;
  o.max_tokens = max_tokens;
  o.max_sessions = 3;
  emx_session *s;
  OK(emx_session_create(m, &o, &s));
  return s;
}
static void set_select(emx_session *s, int32_t kind) {
  emx_select_desc d;
  emx_select_desc_init(&d);
  d.kind = kind;
  d.budget = 32;
  OK(emx_session_set_select(s, &d));
}

static void goes_on(emx_model *m) {
  static const int32_t dtypes[] = {EMX_BF16, EMX_F16, EMX_F32};
  for (int variant = 0; variant < 3; variant++) {
    const int32_t page = variant == 1 ? 32 : 16, cut = variant == 2 ? 64 : 61; /* 64: every page is full */
    emx_session *a = session(m, dtypes[variant], page, N), *b = session(m, dtypes[variant], page, N);
    float la[V], lb[V], na[20], nb[20];
    set_select(a, EMX_SELECT_GAUSSIAN);
    set_select(b, EMX_SELECT_GAUSSIAN);
    OK(emx_session_prefill(a, tokens, cut - 3, NULL, NULL, NULL, NULL));
    for (int i = cut - 3; i < cut; i++) OK(emx_session_decode(a, tokens[i], la));
    OK(emx_session_save(a, path, NULL, NULL));
    OK(emx_session_load(b, path, NULL, NULL));
    assert_int_equal(emx_session_length(b), cut);
    OK(emx_session_logits(b, lb));
    assert_memory_equal(la, lb, sizeof la);
    for (int i = cut; i < cut + 5; i++) {
      OK(emx_session_decode(a, tokens[i], la));
      OK(emx_session_decode(b, tokens[i], lb));
      assert_memory_equal(la, lb, sizeof la);
    }
    OK(emx_session_prefill(a, tokens + cut + 5, 20, na, la, NULL, NULL));
    OK(emx_session_prefill(b, tokens + cut + 5, 20, nb, lb, NULL, NULL));
    assert_memory_equal(la, lb, sizeof la);
    assert_memory_equal(na, nb, sizeof na); /* the first of these comes from the state that the file brought */
    emx_session_destroy(a);
    emx_session_destroy(b);
  }
}

/* K and V in a file: prefill has the bits of prefill in memory where one head of a layer fits into memory beside it, and differs
 * by the order of its sums where not. */
static void test_prefill_from_file(void **state) {
  (void)state;
  static const int32_t dtypes[] = {EMX_BF16, EMX_F16, EMX_F32};
  static const int64_t parts[] = {1, 37, 52};
  float la[V], lb[V], na[N], nb[N];
  unlink(path); /* what another test saved */
  for (int variant = 0; variant < 3; variant++) {
    emx_session_opts o;
    emx_session_opts_init(&o);
    o.kv_dtype = dtypes[variant];
    o.page_size = 16 << variant;
    o.chunk = 32;
    o.max_tokens = N;
    emx_session *a, *b;
    OK(emx_session_create(model, &o, &a));
    o.kv_file = path;
    OK(emx_session_create(model, &o, &b));
    int64_t at = 0;
    for (int i = 0; i < 3; at += parts[i++]) {
      OK(emx_session_prefill(a, tokens + at, parts[i], na, la, NULL, NULL));
      OK(emx_session_prefill(b, tokens + at, parts[i], nb, lb, NULL, NULL));
      assert_memory_equal(la, lb, sizeof la);
      assert_memory_equal(na, nb, sizeof *na * (size_t)parts[i]); /* NaN, the first, is the same bits as well */
    }
    assert_int_equal(at, N);
    emx_session_destroy(a);
    emx_session_destroy(b);

    o.chunk = 128; /* all in one: the first layer has 90 keys when the memory is missing */
    OK(emx_session_create(model, &o, &b));
    o.kv_file = NULL;
    OK(emx_session_create(model, &o, &a));
    OK(emx_session_prefill(a, tokens, N, na, la, NULL, NULL));
    emxi_alloc_fail_after(1); /* the next allocation holds nll, the one behind it the first head's keys and values */
    OK(emx_session_prefill(b, tokens, N, nb, lb, NULL, NULL));
    for (int i = 0; i < 2; i++) { /* it has failed: none of these does, and of all that prefill takes only that may be missing */
      void *still = emxi_alloc(1);
      assert_non_null(still);
      emxi_free(still);
    }
    /* sums of some 90 terms of size 1 in f32; and a key or value of the second layer that rounds the other way into the cache is
     * off by an ulp of it, a few of them together by four */
    static const float off[] = {2e-4f + 0x1p-6f, 2e-4f + 0x1p-9f, 2e-4f};
    for (int i = 0; i < V; i++)
      if (!(fabsf(la[i] - lb[i]) < off[variant])) fail_msg("variant %d logit %d: %g, %g", variant, i, la[i], lb[i]);
    emx_session_destroy(a);
    emx_session_destroy(b);
  }
}

static void test_goes_on(void **state) {
  (void)state;
  goes_on(model);
  for (int which = 0; which < 2;
       which++) { /* keys that were turned, queries that are scaled by where they are, an alpha a head */
    char other[32];
    emx_model *m;
    emx_model_config c = tiny_config();
    c.position_type = which ? EMX_POSITION_ROPE : EMX_POSITION_NAPE;
    c.attn_scale_type = which ? EMX_ATTN_SCALE_SSMAX : EMX_ATTN_SCALE_ASENTMAX;
    c.alpha_learned = which;
    assert_true(folder_create(other) && tiny_write(other, &c, 5));
    OK(emx_model_open(ctx, other, &m));
    goes_on(m);
    emx_model_close(m);
    tiny_remove(other);
    rmdir(other);
  }
}

/* A state that is gone stays gone; an empty session is one, too. */
static void test_without_a_state(void **state) {
  (void)state;
  float logits[V], nll[5];
  emx_session *a = session(model, EMX_BF16, 16, N), *b = session(model, EMX_BF16, 16, N);
  fails(emx_session_logits(a, logits), EMX_ERR_STATE, "empty");
  OK(emx_session_save(a, path, NULL, NULL));
  OK(emx_session_load(b, path, NULL, NULL));
  assert_int_equal(emx_session_length(b), 0);
  OK(emx_session_prefill(a, tokens, 50, NULL, NULL, NULL, NULL));
  OK(emx_session_truncate(a, 41));
  fails(emx_session_logits(a, logits), EMX_ERR_STATE, "cut");
  OK(emx_session_save(a, path, NULL, NULL));
  OK(emx_session_load(b, path, NULL, NULL));
  assert_int_equal(emx_session_length(b), 41);
  fails(emx_session_logits(b, logits), EMX_ERR_STATE, "cut");
  OK(emx_session_prefill(b, tokens + 41, 5, nll, logits, NULL, NULL));
  assert_true(isnan(nll[0]) && !isnan(nll[1]));
  emx_session_destroy(a);
  emx_session_destroy(b);
}

static fingerprint of_session(emx_session *s) { /* length, last logits, and what the next token would say */
  emxi_hash h;
  fingerprint f;
  float logits[V] = {0};
  const int64_t length = emx_session_length(s);
  emxi_hash_init(&h);
  emxi_hash_add(&h, &length, sizeof length);
  if (!emx_session_logits(s, logits)) emxi_hash_add(&h, logits, sizeof logits);
  OK(emx_session_decode(s, 1, logits));
  emxi_hash_add(&h, logits, sizeof logits);
  OK(emx_session_truncate(s, length));
  emxi_hash_end(&h, f.bytes);
  return f;
}
static void refused(emx_session *s, const char *name, emx_status want, const char *word) {
  const fingerprint before = of_session(s);
  fails(emx_session_load(s, name, NULL, NULL), want, word);
  assert_true(fingerprint_same(before, of_session(s)));
}

static void test_refused(void **state) {
  (void)state;
  emx_session *a = session(model, EMX_BF16, 16, N), *b;
  float logits[V];
  OK(emx_session_prefill(a, tokens, 60, NULL, NULL, NULL, NULL));
  OK(emx_session_save(a, path, NULL, NULL));
  emx_cache_info info = {.struct_size = sizeof info};
  OK(emx_cache_get_info(path, &info));
  assert_true(info.kind == EMX_CACHE_SESSION && info.layers == 2 && info.tokens == 60 && info.pages == 4 && info.seqs == 1 &&
              strlen(info.model) == 64);

  fails(emx_session_load(a, path, NULL, NULL), EMX_ERR_STATE, "60 tokens, it must be empty");
  b = session(model, EMX_F16, 16, N);
  refused(b, path, EMX_ERR_DTYPE, "bf16, the cache is f16");
  emx_session_destroy(b);
  b = session(model, EMX_BF16, 32, N);
  refused(b, path, EMX_ERR_SHAPE, "16 tokens, the cache's 32");
  emx_session_destroy(b);
  b = session(model, EMX_BF16, 16, 59);
  refused(b, path, EMX_ERR_STATE, "60 tokens are more than the 59");
  emx_session_destroy(b);
  /* a fork that was emptied shares the pool with its parent, which leaves too few pages */
  emx_session *big = session(model, EMX_BF16, 16, 70), *fork;
  OK(emx_session_prefill(big, tokens, 70, NULL, NULL, NULL, NULL));
  OK(emx_session_fork(big, &fork));
  OK(emx_session_truncate(fork, 0));
  refused(fork, path, EMX_ERR_STATE, "4 pages are needed, 2 are free");
  OK(emx_session_truncate(big, 0));
  OK(emx_session_load(fork, path, NULL, NULL));
  assert_int_equal(emx_session_length(fork), 60);
  emx_session_destroy(fork);
  emx_session_destroy(big);

  /* the same shape, one weight another; the same weights, another alpha */
  for (int which = 0; which < 2; which++) {
    char folder2[32];
    emx_model *m2;
    emx_model_config c = tiny_config();
    assert_true(folder_create(folder2));
    if (which) c.entmax_alpha = 1.25;
    assert_true(tiny_write(folder2, &c, which ? 3 : 4));
    OK(emx_model_open(ctx, folder2, &m2));
    b = session(m2, EMX_BF16, 16, N);
    refused(b, path, EMX_ERR_INVALID, "another model");
    emx_session_destroy(b);
    emx_model_close(m2);
    tiny_remove(folder2);
    rmdir(folder2);
  }

  /* damage, here and there, and a cache of one layer */
  b = session(model, EMX_BF16, 16, N);
  size_t size;
  char *file;
  OK(emxi_file_read(path, 1 << 24, &file, &size));
  for (size_t at = 0; at < size; at += at < 2048 ? 61 : 977) {
    FILE *f = fopen(path, "wb");
    file[at] ^= 16;
    assert_true(f && fwrite(file, 1, size, f) == size && !fclose(f));
    file[at] ^= 16;
    const emx_status status = emx_session_load(b, path, NULL, NULL);
    if (!status || emx_session_length(b)) fail_msg("byte %zu is damaged: %s", at, emx_status_name(status));
  }
  refused(b, path, EMX_ERR_FORMAT, path);
  emxi_free(file);
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.kv_heads = 2;
  o.head_dim = 16;
  o.max_pages = 4;
  emx_kv *kv;
  OK(emx_kv_create(ctx, &o, &kv));
  OK(emx_kv_save(kv, NULL, 0, path, NULL, NULL));
  refused(b, path, EMX_ERR_FORMAT, "libentmax.kv file, expected libentmax.session");
  OK(emx_session_save(a, path, NULL, NULL));
  int32_t ids[2], n;
  fails(emx_kv_load(kv, path, ids, 2, &n, NULL, NULL), EMX_ERR_FORMAT, "libentmax.session file, expected libentmax.kv");
  emx_kv_destroy(kv);
  OK(emx_session_load(b, path, NULL, NULL));
  OK(emx_session_logits(b, logits));
  fails(emx_session_load(b, NULL, NULL, NULL), EMX_ERR_INVALID, "path");
  fails(emx_session_save(NULL, path, NULL, NULL), EMX_ERR_INVALID, "session");
  fails(emx_session_logits(b, NULL), EMX_ERR_INVALID, "logits");
  emx_session_destroy(a);
  emx_session_destroy(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_goes_on),
      cmocka_unit_test(test_prefill_from_file),
      cmocka_unit_test(test_without_a_state),
      cmocka_unit_test(test_refused),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
