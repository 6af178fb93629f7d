/* Cache files: what comes back is what was saved, to the bit, and a file with anything wrong leaves the cache as it was. */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/num.h"
#include "cache_help.h"
#include "check.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[32], path[64], other[64];
static emx_ctx *ctx;

static int files(void) {
  int n = 0;
  DIR *d = opendir(folder);
  for (struct dirent *e; d && (e = readdir(d));) n += e->d_name[0] != '.';
  closedir(d);
  return n;
}
static uint8_t *slurp(const char *name, size_t *size) {
  char *data = NULL;
  OK(emxi_file_read(name, 1 << 24, &data, size));
  return (uint8_t *)data;
}
static void spit(const char *name, const void *data, size_t size) {
  FILE *f = fopen(name, "wb");
  assert_true(f && fwrite(data, 1, size, f) == size && !fclose(f));
}

/* ---- caches */

typedef struct shape {
  int32_t dtype, G, D, P, layout, summaries;
} shape;
static const shape small = {EMX_BF16, 2, 16, 16, EMX_LAYOUT_BHND, 3};

static emx_kv *cache(shape s, int64_t pages, int32_t seqs) {
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.dtype = s.dtype;
  o.kv_heads = s.G;
  o.head_dim = s.D;
  o.page_size = s.P;
  o.layout = s.layout;
  o.summaries = s.summaries;
  o.max_seqs = seqs;
  o.max_pages = pages;
  emx_kv *kv;
  OK(emx_kv_create(ctx, &o, &kv));
  return kv;
}
static emx_status append(emx_kv *kv, int32_t seq, uint64_t seed, int64_t n) {
  const int64_t count = n * kv->G * kv->D;
  float *k = malloc((size_t)(2 * count + 1) * sizeof *k), *v = k + count;
  const bool hnd = kv->layout == EMX_LAYOUT_BHND;
  for (int64_t t = 0; t < n; t++) /* the same tokens in any layout */
    for (int32_t g = 0; g < kv->G; g++) {
      const int64_t at = (hnd ? g * n + t : t * kv->G + g) * kv->D;
      emxi_normals(seed, (uint64_t)(4 * t + 2 * g), k + at, kv->D);
      emxi_normals(seed, (uint64_t)(4 * t + 2 * g + 1), v + at, kv->D);
      if (seed % 5 == 4 && t == 2) k[at + kv->D / 2] = NAN;
    }
  const int64_t dims[4] = {1, hnd ? kv->G : n, hnd ? n : kv->G, kv->D};
  emx_tensor tk = emx_tensor_view(k, EMX_F32, 4, dims), tv = emx_tensor_view(v, EMX_F32, 4, dims);
  emx_kv_batch b;
  emx_kv_batch_init(&b);
  b.batch = 1;
  b.seqs = &seq;
  emx_status status = emx_kv_append(ctx, kv, &b, &tk, &tv, NULL);
  free(k);
  return status;
}
/* A parent, a fork that went its own way, a fork cut inside of a shared page, an empty one, one of a single token. */
static int32_t family(emx_kv *kv, int32_t ids[5]) {
  const int32_t P = kv->P;
  OK(emx_seq_create(kv, &ids[0]));
  OK(append(kv, ids[0], 1, 3 * P + 5));
  OK(emx_seq_fork(kv, ids[0], &ids[1]));
  OK(append(kv, ids[1], 2, P));
  OK(emx_seq_fork(kv, ids[0], &ids[2]));
  OK(emx_seq_truncate(kv, ids[2], P + 3));
  OK(emx_seq_create(kv, &ids[3]));
  OK(emx_seq_create(kv, &ids[4]));
  OK(append(kv, ids[4], 4, 1));
  return 5;
}
/* The sequences of two caches hold the same tokens with the same bits, and their pages the same summaries. */
static void same_sequence(const emx_kv *a, int32_t sa, const emx_kv *b, int32_t sb) {
  const size_t row = (size_t)a->D * emx_dtype_size(a->dtype);
  const int32_t *ta, *tb;
  int64_t na, nb;
  OK(emx_seq_block_table(a, sa, &ta, &na));
  OK(emx_seq_block_table(b, sb, &tb, &nb));
  assert_int_equal(a->seqs[sa].length, b->seqs[sb].length);
  assert_int_equal(na, nb);
  for (int64_t t = 0; t < a->seqs[sa].length; t++)
    for (int32_t g = 0; g < a->G; g++) {
      const int32_t pa = ta[t / a->P], pb = tb[t / a->P];
      assert_memory_equal(emxi_kv_k(a, pa, g, t % a->P), emxi_kv_k(b, pb, g, t % a->P), row);
      assert_memory_equal(emxi_kv_v(a, pa, g, t % a->P), emxi_kv_v(b, pb, g, t % a->P), row);
    }
  for (int64_t i = 0; i < na; i++) {
    const int64_t left = a->seqs[sa].length - i * a->P, seen = left < a->P ? left : a->P;
    assert_int_equal(a->sum_tokens[ta[i]] == seen, b->sum_tokens[tb[i]] == seen); /* trusted there, trusted here */
    if (a->sum_tokens[ta[i]] != seen) continue;
    for (int32_t g = 0; g < a->G; g++) {
      assert_int_equal(*emxi_kv_mark(a, ta[i], g), *emxi_kv_mark(b, tb[i], g));
      if (*emxi_kv_mark(a, ta[i], g)) continue; /* always read: the payload of a NaN does not matter */
      if (a->minmax && b->minmax) assert_memory_equal(emxi_kv_minmax(a, ta[i], g), emxi_kv_minmax(b, tb[i], g), 2 * row);
      if (a->moments && b->moments)
        assert_memory_equal(emxi_kv_moments(a, ta[i], g), emxi_kv_moments(b, tb[i], g), (size_t)(2 * a->D + 1) * sizeof(float));
    }
  }
}
/* Pages, bounds, outputs and reports of a selector, one after the other, as bytes. The bytes that a report counts are left out:
 * they depend on the layout. */
static size_t selection(emx_kv *kv, int32_t seq, int32_t kind, uint8_t out[1 << 14]) {
  enum { H = 4, M = 64 };
  static float q[H * 64], o[H * 64], bound[H], slopes[H] = {0.5f, 0, 0.25f, 0};
  static int32_t pages[H * M], n_pages[H];
  static emx_report reports[H];
  static char work[1 << 22];
  emxi_normals(99, 0, q, H * kv->D);
  const int64_t qs[4] = {1, H, 1, kv->D}, ps[4] = {1, H, 1, M}, hs = H;
  emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, qs), to = emx_tensor_view(o, EMX_F32, 4, qs),
             tp = emx_tensor_view(pages, EMX_I32, 4, ps), tn = emx_tensor_view(n_pages, EMX_I32, 3, ps),
             tb = emx_tensor_view(bound, EMX_F32, 3, ps), ts = emx_tensor_view(slopes, EMX_F32, 1, &hs);
  emx_select_desc select;
  emx_select_desc_init(&select);
  select.kind = kind;
  select.budget = 2 * kv->P;
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.alpha = 1.5;
  io.q = &tq;
  io.o = &to;
  io.alibi_slopes = &ts;
  io.pages = &tp;
  io.n_pages = &tn;
  io.bound = &tb;
  io.reports = reports;
  emx_kv_batch b;
  emx_kv_batch_init(&b);
  b.batch = 1;
  b.seqs = &seq;
  size_t bytes, used = 0;
  OK(emx_decode_workspace_size(ctx, kv, &select, &io, M * kv->P, &bytes));
  assert_true(bytes <= sizeof work);
  memset(pages, 0xff, sizeof pages);
  if (kind == EMX_SELECT_CERTIFIED)
    io.pages = io.n_pages = io.bound = NULL;
  else
    OK(emx_select(ctx, kv, &b, &select, &io, work, bytes));
  OK(emx_decode(ctx, kv, &b, &select, &io, work, bytes));
  struct {
    const void *p;
    size_t n;
  } parts[] = {{pages, sizeof pages},
               {n_pages, sizeof n_pages},
               {bound, sizeof bound},
               {o, H * (size_t)kv->D * 4},
               {reports, sizeof reports}};
  for (int h = 0; h < H; h++) reports[h].bytes_k = reports[h].bytes_v = reports[h].bytes_meta = 0;
  for (int i = 0; i < 5; i++) {
    memcpy(out + used, parts[i].p, parts[i].n);
    used += parts[i].n;
  }
  return used;
}

static int setup(void **state) {
  (void)state;
  if (!folder_create(folder)) return 1;
  snprintf(path, sizeof path, "%s/a.kv", folder);
  snprintf(other, sizeof other, "%s/b.kv", folder);
  return emx_ctx_create(NULL, &ctx);
}
static int teardown(void **state) {
  (void)state;
  emx_ctx_destroy(ctx);
  unlink(path);
  unlink(other);
  return rmdir(folder);
}

/* ---- what comes back */

static void test_hash(void **state) {
  (void)state;
  /* RFC 7693 has "abc" at 512 bits only; these are of coreutils' b2sum -l 256. */
  static const struct {
    size_t n;
    const char *hex;
  } cases[] = {{0, "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8"},
               {1, "03170a2e7597b7b7e3d84c05391d139a62b157e78786d8c082f29dcf4c111314"},
               {128, "14696d2a98d9f8a280da8b132b1045b345e1033759c6b02fcc4ee885c8ae7c37"},
               {129, "3934215260b1039be9d9d2b073b059bcd50120c327a22af93eb4d98cf821c14c"},
               {256, "7b4337135e0b112b7ec8528f22dd05af226cca2a358cca731696b6713f9383cb"},
               {1000, "215bbdb5d56e0153eca48cbf15747f1daf9a359f05042c17c87563010af5b92e"}};
  uint8_t data[1000];
  for (int i = 0; i < 1000; i++) data[i] = (uint8_t)(i * 7 + i / 251);
  for (size_t c = 0; c < sizeof cases / sizeof *cases; c++)
    for (size_t step = 1; step <= 1000; step = step * 3 + 1) { /* the digest does not depend on the pieces */
      emxi_hash h;
      uint8_t digest[EMXI_HASH_SIZE];
      char hex[2 * EMXI_HASH_SIZE + 1];
      emxi_hash_init(&h);
      for (size_t at = 0; at < cases[c].n; at += step)
        emxi_hash_add(&h, data + at, cases[c].n - at < step ? cases[c].n - at : step);
      emxi_hash_end(&h, digest);
      for (int i = 0; i < EMXI_HASH_SIZE; i++) snprintf(hex + 2 * i, 3, "%02x", digest[i]);
      assert_string_equal(hex, cases[c].hex);
    }
}

static void test_round_trip(void **state) {
  (void)state;
  static uint8_t before[1 << 14], after[1 << 14];
  static const int32_t dtypes[] = {EMX_F32, EMX_F16, EMX_BF16}, dims[] = {16, 40, 17};
  for (int variant = 0; variant < 12; variant++) {
    const shape s = {dtypes[variant % 3], 1 + variant % 2, dims[variant / 2 % 3], 16 << variant / 4, variant / 2 % 2, 3};
    shape to = s;
    to.layout = variant / 3 % 2;
    emx_kv *a = cache(s, 24, 8), *b = cache(to, 40, 9);
    int32_t ids[5], got[6], in_the_way, n = -1;
    const int32_t count = family(a, ids);
    OK(emx_seq_create(b, &in_the_way)); /* the pages and the ids of b are others than those of a */
    OK(append(b, in_the_way, 77, 2 * s.P + 1));
    const int64_t free_before = b->n_free;
    OK(emx_kv_save(a, ids, count, path, NULL, NULL));
    OK(emx_kv_load(b, path, got, 6, &n, NULL, NULL));
    assert_int_equal(n, count);
    /* parent 4 pages, its fork's own 2, the page of the single token: what was shared is shared */
    assert_int_equal(free_before - b->n_free, 24 - a->n_free);
    for (int32_t i = 0; i < count; i++) same_sequence(a, ids[i], b, got[i]);
    for (int32_t i = 0; i < count; i++)
      for (int32_t kind = EMX_SELECT_ALL; kind <= EMX_SELECT_GAUSSIAN; kind++) {
        const size_t size = selection(a, ids[i], kind, before);
        assert_int_equal(size, selection(b, got[i], kind, after));
        if (memcmp(before, after, size)) fail_msg("variant %d: selector %d sees another sequence %d", variant, kind, i);
      }
    /* A file says nothing of the cache that it came from: saved again, it has the same bytes. */
    size_t n1, n2;
    OK(emx_kv_save(b, got, n, other, NULL, NULL));
    uint8_t *one = slurp(path, &n1), *two = slurp(other, &n2);
    assert_int_equal(n1, n2);
    assert_memory_equal(one, two, n1);
    emxi_free(one);
    emxi_free(two);
    /* They live on alike: copy-on-write, summaries of pages that were open. */
    for (int32_t i = 0; i < count; i++) {
      OK(append(a, ids[i], 20 + (uint64_t)i, s.P - 2));
      OK(append(b, got[i], 20 + (uint64_t)i, s.P - 2));
    }
    for (int32_t i = 0; i < count; i++) same_sequence(a, ids[i], b, got[i]);
    for (int32_t i = 0; i < count; i++) OK(emx_seq_destroy(b, got[i]));
    assert_int_equal(b->n_free, free_before);
    emx_kv_destroy(a);
    emx_kv_destroy(b);
  }
}

/* A subset, nothing at all, summaries that the other side lacks, the caller's pool. */
static void test_round_trip_odd(void **state) {
  (void)state;
  emx_kv *a = cache(small, 24, 8);
  int32_t ids[5], got[4] = {7, 7, 7, 7}, n = -1;
  family(a, ids);
  OK(emx_kv_save(a, NULL, 0, path, NULL, NULL));
  OK(emx_kv_load(a, path, NULL, 0, &n, NULL, NULL));
  assert_int_equal(n, 0);
  OK(emx_kv_save(a, &ids[2], 1, path, NULL, NULL)); /* its second page is cut: the parent's summaries are of more tokens */
  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.kv_heads = small.G;
  o.head_dim = small.D;
  o.max_pages = 5;
  o.layout = EMX_LAYOUT_BNHD;
  o.summaries = EMX_SUMMARY_MINMAX;
  static uint16_t pool[5 * 16 * 2 * 2 * 16]; /* [M,P,2,G,D]: K and V interleaved */
  emx_tensor k = emx_tensor_view(pool, EMX_BF16, 4, (int64_t[]){5, 16, 2, 16}), v;
  k.stride[1] = 2 * 2 * 16;
  k.stride[0] = 16 * k.stride[1];
  v = k;
  v.data = pool + 2 * 16;
  o.k_pool = &k;
  o.v_pool = &v;
  emx_kv *b;
  OK(emx_kv_create(ctx, &o, &b));
  OK(emx_kv_load(b, path, got, 4, &n, NULL, NULL));
  assert_int_equal(n, 1);
  assert_int_equal(b->n_free, 3);
  same_sequence(a, ids[2], b, got[0]);
  emx_cache_info info = {.struct_size = sizeof info};
  OK(emx_cache_get_info(path, &info));
  assert_true(info.kind == EMX_CACHE_KV && info.version == 1 && info.dtype == EMX_BF16 && info.layers == 1 &&
              info.kv_heads == 2 && info.head_dim == 16 && info.page_size == 16 && info.seqs == 1 && info.pages == 2 &&
              info.tokens == 19 && !info.model[0]);
  emx_kv_destroy(b);
  emx_kv_destroy(a);
}

/* ---- what is refused */

/* The file must be refused with this status and word, and the cache be as it was. */
static void refused(emx_kv *kv, const char *name, emx_status want, const char *word) {
  const fingerprint before = fingerprint_of(kv);
  int32_t ids[8] = {41, 42, 43, 44, 45, 46, 47, 48}, n = 49;
  fails(emx_kv_load(kv, name, ids, 8, &n, NULL, NULL), want, word);
  assert_true(fingerprint_same(before, fingerprint_of(kv)));
  for (int i = 0; i < 8; i++) assert_int_equal(ids[i], 41 + i);
  assert_int_equal(n, 49);
}

static void test_damage(void **state) {
  (void)state;
  shape s = small;
  s.G = 1;
  emx_kv *a = cache(s, 8, 4), *b = cache(s, 8, 8);
  int32_t seq, n;
  OK(emx_seq_create(a, &seq));
  OK(append(a, seq, 1, 20));
  OK(emx_kv_save(a, &seq, 1, path, NULL, NULL));
  OK(emx_seq_create(b, &seq));
  OK(append(b, seq, 2, 21));
  const fingerprint before = fingerprint_of(b);
  size_t size;
  uint8_t *good = slurp(path, &size), *bad = malloc(size + 1);
  int32_t ids[4];
  for (size_t at = 0; at < size; at++) { /* one bit of every byte, another one each time */
    memcpy(bad, good, size);
    bad[at] ^= (uint8_t)(1u << (at * 5 + at / 8) % 8);
    spit(other, bad, size);
    emx_status status = emx_kv_load(b, other, ids, 4, &n, NULL, NULL);
    if (status != EMX_ERR_FORMAT && status != EMX_ERR_UNSUPPORTED && status != EMX_ERR_DTYPE && status != EMX_ERR_SHAPE)
      fail_msg("byte %zu of %zu: %s", at, size, emx_status_name(status));
    if (!fingerprint_same(before, fingerprint_of(b))) fail_msg("byte %zu of %zu changes the cache", at, size);
  }
  for (size_t length = 0; length < size; length += length % 64 ? 1 : 13) {
    spit(other, good, length);
    refused(b, other, EMX_ERR_FORMAT, other);
  }
  memcpy(bad, good, size);
  bad[size] = 0;
  spit(other, bad, size + 1);
  refused(b, other, EMX_ERR_FORMAT, "after the last tensor");
  bad[size - 40] ^= 1;
  spit(other, bad, size);
  refused(b, other, EMX_ERR_FORMAT, "checksum");
  OK(emx_kv_load(b, path, ids, 4, &n, NULL, NULL));
  free(bad);
  emxi_free(good);
  emx_kv_destroy(a);
  emx_kv_destroy(b);
}

/* A file of one sequence made by hand, with the right checksum. What a case does not set is right. */
typedef struct crafted {
  const char *kind, *version, *tokens;
  int32_t n, lengths[3];
  int64_t entries;
  int32_t tables[6];
  int64_t pages;
  int32_t described[6];
  int32_t dtype;
  int64_t P, D;
  const char *k_name;
  int64_t checksum;
} crafted;
static void craft(const char *name, const crafted *c) {
  const int64_t n = c->n, described[2] = {1, c->pages}, pool[4] = {c->pages, 2, c->P, c->D};
  const char *const metadata[] = {"kind", c->kind, "version", c->version, "tokens", c->tokens};
  const emx_named_tensor t[] = {
      {"lengths", emx_tensor_view(NULL, EMX_I32, 1, &n)},          {"tables", emx_tensor_view(NULL, EMX_I32, 1, &c->entries)},
      {"described", emx_tensor_view(NULL, EMX_I32, 2, described)}, {c->k_name, emx_tensor_view(NULL, c->dtype, 4, pool)},
      {"layer.0.v", emx_tensor_view(NULL, c->dtype, 4, pool)},     {"checksum", emx_tensor_view(NULL, EMX_I32, 1, &c->checksum)}};
  char *head;
  size_t size;
  const size_t data = (size_t)(2 * c->pages * 2 * c->P * c->D) * emx_dtype_size(c->dtype);
  OK(emxi_checkpoint_head(name, t, 6, metadata, 3, &head, &size));
  uint8_t *all = calloc(1, size + 128 + data), *at = all, digest[EMXI_HASH_SIZE];
#define PUT(p, bytes) (memcpy(at, p, bytes), at += (bytes))
  PUT(head, size);
  PUT(c->lengths, (size_t)n * 4);
  PUT(c->tables, (size_t)c->entries * 4);
  PUT(c->described, (size_t)c->pages * 4);
#undef PUT
  at += data;
  emxi_hash h;
  emxi_hash_init(&h);
  emxi_hash_add(&h, all, (size_t)(at - all));
  emxi_hash_end(&h, digest);
  memcpy(at, digest, (size_t)c->checksum * 4);
  spit(name, all, (size_t)(at - all) + (size_t)c->checksum * 4);
  free(all);
  emxi_free(head);
}

static void test_hostile(void **state) {
  (void)state;
  emx_kv *kv = cache(small, 6, 4);
  int32_t seq, ids[4], n;
  OK(emx_seq_create(kv, &seq));
  OK(append(kv, seq, 2, 20));
  /* two sequences of 20 and 10 tokens that share their first page */
  const crafted good = {"libentmax.kv", "1", "30", 2, {20, 10}, 3, {0, 1, 0}, 2, {16, 4}, EMX_BF16, 16, 16, "layer.0.k", 8};
  craft(other, &good);
  OK(emx_kv_load(kv, other, ids, 4, &n, NULL, NULL));
  assert_true(n == 2 && kv->n_free == 2);
  OK(emx_seq_destroy(kv, ids[0]));
  OK(emx_seq_destroy(kv, ids[1]));
#define CASE(status, word, ...)       \
  do {                                \
    crafted c = good;                 \
    __VA_ARGS__;                      \
    craft(other, &c);                 \
    refused(kv, other, status, word); \
  } while (0)
  CASE(EMX_ERR_FORMAT, "kind", c.kind = "libentmax.model");
  CASE(EMX_ERR_FORMAT, "tensors", c.kind = "libentmax.session"); /* has one tensor more */
  CASE(EMX_ERR_UNSUPPORTED, "version 2", c.version = "2");
  CASE(EMX_ERR_FORMAT, "version", c.version = "one");
  CASE(EMX_ERR_FORMAT, "version", c.version = "01");
  CASE(EMX_ERR_FORMAT, "version", c.version = "99999999999999999999");
  CASE(EMX_ERR_FORMAT, "tokens", c.tokens = "-30");
  CASE(EMX_ERR_FORMAT, "31 tokens", c.tokens = "31");
  CASE(EMX_ERR_FORMAT, "layer.0.k", c.k_name = "layer.1.k");
  CASE(EMX_ERR_FORMAT, "too few pages", c.lengths[0] = -1);
  CASE(EMX_ERR_FORMAT, "too few pages", c.lengths[0] = INT32_MAX);
  CASE(EMX_ERR_FORMAT, "too few pages", c.lengths[1] = 17);
  CASE(EMX_ERR_FORMAT, "sequences have", c.lengths[1] = 0, c.tokens = "20");
  CASE(EMX_ERR_FORMAT, "has the number -1", c.tables[1] = -1);
  CASE(EMX_ERR_FORMAT, "has the number 2", c.tables[1] = 2);
  CASE(EMX_ERR_FORMAT, "has the number 1", c.tables[0] = 1, c.tables[1] = 0);
  CASE(EMX_ERR_FORMAT, "two places", c.tables[1] = 0);
  CASE(EMX_ERR_FORMAT, "two places", c.tables[2] = 1);
  CASE(EMX_ERR_FORMAT, "3 pages", c.pages = 3, c.entries = 4, c.lengths[1] = 10);
  CASE(EMX_ERR_FORMAT, "over 4 pages", c.pages = 4);
  CASE(EMX_ERR_FORMAT, "summaries of 5", c.described[1] = 5); /* more than any sequence sees */
  CASE(EMX_ERR_FORMAT, "summaries of -1", c.described[0] = -1);
  CASE(EMX_ERR_FORMAT, "checksum", c.checksum = 7);
  CASE(EMX_ERR_FORMAT, "impossible shape", c.D = 0);
  CASE(EMX_ERR_DTYPE, "f16, the cache is bf16", c.dtype = EMX_F16);
  CASE(EMX_ERR_DTYPE, "i32, the cache", c.dtype = EMX_I32);
  CASE(EMX_ERR_SHAPE, "32 tokens, the cache's 16", c.P = 32);
  CASE(EMX_ERR_SHAPE, "dimension 24", c.D = 24);
#undef CASE
  /* a key twice in the metadata: the text of the header is patched, its length and the checksum put right */
  craft(other, &good);
  size_t size;
  uint8_t *file = slurp(other, &size);
  char *twice = memmem(file, size, "\"tokens\"", 8);
  assert_non_null(twice);
  memcpy(twice, "\"kind\"  ", 8);
  spit(other, file, size);
  refused(kv, other, EMX_ERR_FORMAT, "duplicate");
  emxi_free(file);
  emx_kv_destroy(kv);
}

static void test_no_room(void **state) {
  (void)state;
  emx_kv *a = cache(small, 24, 8), *b = cache(small, 7, 6);
  int32_t ids[5], seq, n, got[5];
  family(a, ids);
  OK(emx_kv_save(a, ids, 5, path, NULL, NULL)); /* 7 pages */
  OK(emx_seq_create(b, &seq));
  OK(append(b, seq, 9, 1));
  refused(b, path, EMX_ERR_STATE, "7 pages are needed, 6 are free");
  OK(emx_seq_truncate(b, seq, 0));
  fails(emx_kv_load(b, path, got, 4, &n, NULL, NULL), EMX_ERR_INVALID, "5 sequences, there is room for 4");
  OK(emx_seq_create(b, &seq));
  refused(b, path, EMX_ERR_STATE, "5 sequences, the cache can take 4 more");
  OK(emx_seq_destroy(b, seq));
  OK(emx_kv_load(b, path, got, 5, &n, NULL, NULL));
  assert_int_equal(b->n_free, 0);
  /* bad calls */
  fails(emx_kv_save(a, ids, -1, path, NULL, NULL), EMX_ERR_INVALID, "negative");
  fails(emx_kv_save(a, NULL, 1, path, NULL, NULL), EMX_ERR_INVALID, "seqs");
  fails(emx_kv_save(a, ids, 1, NULL, NULL, NULL), EMX_ERR_INVALID, "path");
  fails(emx_kv_save(NULL, ids, 1, path, NULL, NULL), EMX_ERR_INVALID, "kv");
  fails(emx_kv_load(b, path, got, 5, NULL, NULL, NULL), EMX_ERR_INVALID, "n is NULL");
  ids[1] = ids[0];
  fails(emx_kv_save(a, ids, 2, path, NULL, NULL), EMX_ERR_INVALID, "twice");
  ids[1] = 7;
  fails(emx_kv_save(a, ids, 2, path, NULL, NULL), EMX_ERR_STATE, "no sequence 7");
  emx_cache_info info = {.struct_size = sizeof info};
  fails(emx_cache_get_info(folder, &info), EMX_ERR_IO, "directory");
  fails(emx_cache_get_info(NULL, &info), EMX_ERR_INVALID, "path");
  info.struct_size = 4;
  fails(emx_cache_get_info(path, &info), EMX_ERR_INVALID, "struct_size");
  emx_kv_destroy(a);
  emx_kv_destroy(b);
}

/* A file that cannot be written is the old file, and nothing lies beside it. */
static void test_no_disk(void **state) {
  (void)state;
  emx_kv *a = cache(small, 24, 8);
  int32_t ids[5];
  family(a, ids);
  unlink(other);
  OK(emx_kv_save(a, ids, 1, path, NULL, NULL));
  size_t before, after;
  uint8_t *old = slurp(path, &before);
  struct rlimit was, limit;
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
  void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
  for (rlim_t room = 0; room < 9000; room += 2900) { /* in the header, in the pages */
    limit = was;
    limit.rlim_cur = room;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    emx_status status = emx_kv_save(a, ids, 5, path, NULL, NULL);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
    fails(status, EMX_ERR_IO, "nothing was changed");
    uint8_t *now = slurp(path, &after);
    assert_int_equal(before, after);
    assert_memory_equal(old, now, before);
    emxi_free(now);
    assert_int_equal(files(), 1);
  }
  signal(SIGXFSZ, handler);
  emxi_free(old);
  char name[128];
  snprintf(name, sizeof name, "%s/nowhere/a.kv", folder);
  fails(emx_kv_save(a, ids, 5, name, NULL, NULL), EMX_ERR_IO, "No such file");
  snprintf(name, sizeof name, "%s/a.kv/a.kv", folder);
  fails(emx_kv_save(a, ids, 5, name, NULL, NULL), EMX_ERR_IO, "Not a directory");
  fails(emx_kv_save(a, ids, 5, folder, NULL, NULL), EMX_ERR_IO, "no regular file");
  if (geteuid()) { /* root may write anywhere */
    assert_int_equal(chmod(folder, 0500), 0);
    emx_status status = emx_kv_save(a, ids, 5, path, NULL, NULL);
    assert_int_equal(chmod(folder, 0700), 0);
    fails(status, EMX_ERR_IO, "ermission");
  }
  assert_int_equal(files(), 1);
  emx_kv_destroy(a);
}

static void stop(void *user, int64_t done, int64_t total) {
  int64_t *last = user;
  assert_true(done > *last && done <= total);
  *last = done;
  emx_ctx_cancel(ctx);
}
static void watch(void *user, int64_t done, int64_t total) {
  int64_t *last = user;
  assert_true(done > *last && done <= total);
  *last = done == total ? -total : done;
}
static void stop_at_the_end(void *user, int64_t done, int64_t total) {
  (void)user;
  if (done == total) emx_ctx_cancel(ctx);
}
static void test_cancel(void **state) {
  (void)state;
  shape s = small;
  s.dtype = EMX_F32;
  emx_kv *a = cache(s, 400, 8), *b = cache(s, 400, 8); /* 400 pages of 2 KB: more than one buffer */
  int32_t seq, got, n;
  OK(emx_seq_create(a, &seq));
  OK(append(a, seq, 1, 6400));
  OK(append(b, (emx_seq_create(b, &got), got), 2, 20));
  OK(emx_seq_destroy(b, got));
  int64_t seen = 0;
  OK(emx_kv_save(a, &seq, 1, path, watch, &seen));
  assert_int_equal(seen, -2 * 400 * 2048);
  size_t before, after;
  uint8_t *old = slurp(path, &before);
  OK(emx_seq_truncate(a, seq, 6399));
  seen = 0;
  fails(emx_kv_save(a, &seq, 1, path, stop, &seen), EMX_ERR_CANCELLED, "cancelled");
  assert_true(seen > 0 && seen < 2 * 400 * 2048);
  emx_ctx_resume(ctx);
  uint8_t *now = slurp(path, &after);
  assert_int_equal(before, after);
  assert_memory_equal(old, now, before);
  emxi_free(now);
  emxi_free(old);
  assert_int_equal(files(), 1);
  const fingerprint was = fingerprint_of(b);
  seen = 0;
  fails(emx_kv_load(b, path, &got, 1, &n, stop, &seen), EMX_ERR_CANCELLED, "cancelled");
  emx_ctx_resume(ctx);
  assert_true(seen > 0 && fingerprint_same(was, fingerprint_of(b)));
  seen = 0;
  OK(emx_kv_load(b, path, &got, 1, &n, watch, &seen));
  assert_int_equal(seen, -2 * 400 * 2048);
  emx_kv_destroy(b);
  /* after the last byte: the summaries, and what a cache without keys learns from the first */
  s.summaries |= EMX_SUMMARY_SKETCH;
  b = cache(s, 400, 8);
  const fingerprint empty = fingerprint_of(b);
  fails(emx_kv_load(b, path, &got, 1, &n, stop_at_the_end, NULL), EMX_ERR_CANCELLED, "cancelled");
  emx_ctx_resume(ctx);
  assert_true(fingerprint_same(empty, fingerprint_of(b)));
  emx_kv_destroy(a);
  emx_kv_destroy(b);
}

/* Sketches are learned anew: an exact certified decode has the same bits, whatever it reads. */
static void test_sketches(void **state) {
  (void)state;
  static uint8_t before[1 << 14], after[1 << 14];
  shape s = small;
  s.summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_SKETCH | EMX_SUMMARY_RESIDUAL;
  emx_kv *a = cache(s, 40, 4), *b = cache(s, 40, 4);
  int32_t seq, got, n;
  OK(emx_seq_create(a, &seq));
  for (int i = 0; i < 9; i++) OK(append(a, seq, 10 + (uint64_t)(5 * i), 37));
  OK(emx_kv_save(a, &seq, 1, path, NULL, NULL));
  OK(emx_kv_load(b, path, &got, 1, &n, NULL, NULL));
  same_sequence(a, seq, b, got);
  const size_t size = selection(a, seq, EMX_SELECT_CERTIFIED, before);
  assert_int_equal(size, selection(b, got, EMX_SELECT_CERTIFIED, after));
  const size_t reports = size - 4 * sizeof(emx_report), o = reports - 4 * 16 * sizeof(float);
  assert_memory_equal(before + o, after + o, reports - o);
  for (int h = 0; h < 4; h++) {
    emx_report x, y;
    memcpy(&x, before + reports + (size_t)h * sizeof x, sizeof x);
    memcpy(&y, after + reports + (size_t)h * sizeof y, sizeof y);
    assert_true((x.flags & EMX_REPORT_CERTIFIED) && x.flags == y.flags && x.tau == y.tau && x.support == y.support);
  }
  emx_kv_destroy(a);
  emx_kv_destroy(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_hash),    cmocka_unit_test(test_round_trip), cmocka_unit_test(test_round_trip_odd),
      cmocka_unit_test(test_damage),  cmocka_unit_test(test_hostile),    cmocka_unit_test(test_no_room),
      cmocka_unit_test(test_no_disk), cmocka_unit_test(test_cancel),     cmocka_unit_test(test_sketches),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
