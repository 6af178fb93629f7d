/* Any bytes as a cache file, loaded next to a sequence that is there: refused with everything as it was, or a cache that keeps
 * its promises: page counts, copy-on-write, a decode, the same file when it is saved again.
 * The first byte chooses. Bit 0: a session of two layers, else one cache. Bit 1: the rest describes a file that is well-formed up
 * to what it says of sequences and pages. Otherwise the rest is a header's length (two bytes), the header and the data. Bit 2:
 * the right checksum is put behind, without which nothing would get far. */
#define _GNU_SOURCE
#include "fuzz/fuzz.h"

#include "base/num.h"
#include "cache_help.h"
#include "model/cache.h"

#include <sys/mman.h>
#include <unistd.h>

enum { LAYERS = 2, G = 1, P = 16, D = 16, PAGES = 6, SEQS = 5, W = 4, ROOM = 1 << 17 };
static const char identity[] = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

static emx_ctx *ctx;

static void append(emx_kv *kv, int32_t seq, int64_t n, uint64_t seed) {
  float k[G * 40 * D];
  emxi_normals(seed, 0, k, G * n * D);
  emx_tensor t = emx_tensor_view(k, EMX_F32, 4, (int64_t[]){1, G, n, D});
  emx_kv_batch b;
  emx_kv_batch_init(&b);
  b.batch = 1;
  b.seqs = &seq;
  const int64_t free_pages = kv->n_free;
  emx_status status = emx_kv_append(ctx, kv, &b, &t, &t, NULL);
  FUZZ_CHECK(!status || (status == EMX_ERR_STATE && free_pages <= 1), "append: %s", emx_last_error());
}

static void decode(const emx_kv *kv, int32_t seq) {
  static char work[1 << 18];
  float q[G * D], o[G * D];
  emxi_normals(1, 1, q, G * D);
  emx_tensor tq = emx_tensor_view(q, EMX_F32, 4, (int64_t[]){1, G, 1, D}),
             to = emx_tensor_view(o, EMX_F32, 4, (int64_t[]){1, G, 1, D});
  emx_report report;
  emx_select_desc select;
  emx_select_desc_init(&select);
  select.kind = EMX_SELECT_TOPK;
  select.budget = 16;
  emx_decode_io io;
  emx_decode_io_init(&io);
  io.alpha = 1.5;
  io.q = &tq;
  io.o = &to;
  io.reports = &report;
  emx_kv_batch b;
  emx_kv_batch_init(&b);
  b.batch = 1;
  b.seqs = &seq;
  size_t bytes;
  FUZZ_CHECK(!emx_decode_workspace_size(ctx, kv, &select, &io, PAGES * P, &bytes) && bytes <= sizeof work, "%zu bytes", bytes);
  FUZZ_CHECK(!emx_decode(ctx, (emx_kv *)kv, &b, &select, &io, work, bytes), "%s", emx_last_error());
}

/* Reference counts are those of the tables, free pages those that nobody holds, lengths fit their tables. */
static void check(const emx_kv *kv) {
  int32_t held[PAGES] = {0}, seqs = 0;
  for (int32_t s = 0; s < SEQS; s++) {
    if (!kv->seqs[s].used) continue;
    seqs++;
    FUZZ_CHECK(kv->seqs[s].n_pages == emxi_kv_pages_of(kv, kv->seqs[s].length), "%d pages", (int)kv->seqs[s].n_pages);
    for (int64_t i = 0; i < kv->seqs[s].n_pages; i++) {
      const int32_t page = kv->tables[s * PAGES + i];
      FUZZ_CHECK(page >= 0 && page < PAGES, "page %d", page);
      held[page]++;
    }
    decode(kv, s);
  }
  int64_t free_pages = 0;
  for (int p = 0; p < PAGES; p++) {
    FUZZ_CHECK(kv->refs[p] == held[p], "page %d: %d references, %d holders", p, kv->refs[p], held[p]);
    free_pages += !held[p];
  }
  FUZZ_CHECK(free_pages == kv->n_free && seqs == kv->n_seqs, "%d free pages, %d sequences", (int)kv->n_free, kv->n_seqs);
}

/* A file whose sequences, tables and counts come from the input; data fills the rest. Returns its size without the checksum. */
static size_t build(fuzz_input *in, bool session, uint8_t *out) {
  const int32_t layers = session ? LAYERS : 1;
  int32_t lengths[4], tables[16], described[LAYERS * 8], met = 0;
  int64_t n = session ? 1 : fuzz_u8(in) % 4, entries = 0, total = 0, at = 0, width = fuzz_u8(in) % 2 * W;
  const uint8_t odd = fuzz_u8(in); /* which rule is broken, if one is */
  for (int64_t i = 0; i < n; i++) {
    lengths[i] = odd == 1 ? (int32_t)fuzz_u32(in) : fuzz_u8(in) % 60;
    total += lengths[i];
    for (int64_t j = 0; j < ((int64_t)lengths[i] + P - 1) / P && entries < 16; j++) {
      const uint8_t which = fuzz_u8(in); /* a new page, or one of before */
      tables[entries] = odd == 2 ? (int8_t)which : which & 1 && met ? (which >> 1) % (met + 1) : met;
      if (tables[entries++] == met) met++;
    }
  }
  int64_t pages = met + (odd == 3), tensors = 0, digest = 8, shape[4] = {pages, G, P, D}, two[2] = {layers, pages};
  if (pages > 8) pages = shape[0] = two[1] = 8;
  for (int64_t i = 0; i < layers * pages; i++) described[i] = odd == 4 ? (int8_t)fuzz_u8(in) % 20 : 0;
  if (odd != 4) /* tokens that some sequence sees */
    for (int64_t i = 0, e = 0; i < n; i++)
      for (int64_t j = 0; j < ((int64_t)lengths[i] + P - 1) / P && e < entries; j++, e++) {
        const int64_t seen = lengths[i] - j * P < P ? lengths[i] - j * P : P;
        for (int32_t l = 0; l < layers; l++)
          if (tables[e] >= 0 && tables[e] < pages) described[l * pages + tables[e]] = (int32_t)seen;
      }
  emx_named_tensor t[5 + 2 * LAYERS];
  static const char *const kv_names[] = {"layer.0.k", "layer.0.v", "layer.1.k", "layer.1.v"};
  char text[24];
  snprintf(text, sizeof text, "%lld", (long long)total + (odd == 5));
  const char *const metadata[] = {"kind",    session ? "libentmax.session" : "libentmax.kv",
                                  "version", odd == 6 ? "2" : "1",
                                  "tokens",  text,
                                  "model",   odd == 7 ? identity + 1 : identity};
  if (session) t[tensors++] = (emx_named_tensor){"last", emx_tensor_view(NULL, EMX_F32, 1, &width)};
  t[tensors++] = (emx_named_tensor){"lengths", emx_tensor_view(NULL, EMX_I32, 1, &n)};
  t[tensors++] = (emx_named_tensor){"tables", emx_tensor_view(NULL, EMX_I32, 1, &entries)};
  t[tensors++] = (emx_named_tensor){"described", emx_tensor_view(NULL, EMX_I32, 2, two)};
  for (int i = 0; i < 2 * layers; i++) t[tensors++] = (emx_named_tensor){kv_names[i], emx_tensor_view(NULL, EMX_BF16, 4, shape)};
  t[tensors++] = (emx_named_tensor){"checksum", emx_tensor_view(NULL, EMX_I32, 1, &digest)};
  char *head;
  size_t size;
  FUZZ_CHECK(!emxi_checkpoint_head("fuzz", t, tensors, metadata, session ? 4 : 3, &head, &size), "%s", emx_last_error());
  memcpy(out, head, size);
  emxi_free(head);
  at = (int64_t)size;
#define PUT(p, bytes) (memcpy(out + at, p, (size_t)(bytes)), at += (int64_t)(bytes))
  if (session) PUT(((float[W]){1, 2, 3, 4}), width * 4);
  PUT(lengths, n * 4);
  PUT(tables, entries * 4);
  PUT(described, layers * pages * 4);
#undef PUT
  for (int64_t i = 0; i < 2 * layers * pages * G * P * D * 2; i++) out[at++] = i % 2 ? 0x3f : fuzz_u8(in);
  return (size_t)at;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static uint8_t file[ROOM];
  static int fd = -1;
  static char path[64];
  if (!ctx) {
    emx_ctx_opts opts;
    emx_ctx_opts_init(&opts);
    opts.threads = 1;
    FUZZ_CHECK(!emx_ctx_create(&opts, &ctx), "%s", emx_last_error());
    FUZZ_CHECK((fd = memfd_create("cache", MFD_CLOEXEC)) >= 0, "no file in memory");
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  }
  fuzz_input in = {data, size};
  const uint8_t flags = fuzz_u8(&in);
  const bool session = flags & 1;
  size_t n;
  if (flags & 2) {
    n = build(&in, session, file);
  } else {
    const uint64_t header = fuzz_u16(&in);
    if (in.left > ROOM - 64) return 0;
    memcpy(file, &header, 8);
    if (in.left) memcpy(file + 8, in.data, in.left);
    n = 8 + in.left;
  }
  if (flags & 4) {
    emxi_hash hash;
    emxi_hash_init(&hash);
    emxi_hash_add(&hash, file, n);
    emxi_hash_end(&hash, file + n);
    n += EMXI_HASH_SIZE;
  }
  FUZZ_CHECK(!ftruncate(fd, 0) && pwrite(fd, file, n, 0) == (ssize_t)n, "cannot write");

  emx_kv_opts o;
  emx_kv_opts_init(&o);
  o.kv_heads = G;
  o.head_dim = D;
  o.page_size = P;
  o.summaries = EMX_SUMMARY_MINMAX | EMX_SUMMARY_MOMENTS;
  o.max_seqs = SEQS;
  o.max_pages = PAGES;
  emx_kv *kv[LAYERS];
  int32_t there[LAYERS], seqs[4] = {91, 92, 93, 94}, before[4], got = 95;
  fingerprint was[LAYERS];
  for (int l = 0; l < LAYERS; l++) {
    FUZZ_CHECK(!emx_kv_create(ctx, &o, &kv[l]) && !emx_seq_create(kv[l], &there[l]), "%s", emx_last_error());
    append(kv[l], there[l], 18, (uint64_t)l);
    if (session) FUZZ_CHECK(!emx_seq_create(kv[l], &seqs[l]), "%s", emx_last_error());
    was[l] = fingerprint_of(kv[l]);
  }
  memcpy(before, seqs, sizeof seqs);
  float last[W] = {7, 7, 7, 7};
  emxi_cache c = {.kind = EMX_CACHE_SESSION,
                  .ctx = ctx,
                  .kv = kv,
                  .layers = LAYERS,
                  .n_seqs = 1,
                  .seqs = seqs,
                  .model = identity,
                  .width = W,
                  .max_tokens = 64,
                  .last = last};
  const emx_status status = session ? emxi_cache_load(&c, path) : emx_kv_load(kv[0], path, seqs, 4, &got, NULL, NULL);
  if (status) {
    FUZZ_CHECK(status >= EMX_ERR_STATE && *emx_last_error(), "status %d: %s", status, emx_last_error());
    for (int l = 0; l < LAYERS; l++) FUZZ_CHECK(fingerprint_same(was[l], fingerprint_of(kv[l])), "layer %d has changed", l);
    FUZZ_CHECK(!memcmp(before, seqs, sizeof seqs) && got == 95 && last[0] == 7 && !c.length, "results of a failure");
  } else {
    const int32_t layers = session ? LAYERS : 1;
    for (int32_t l = 0; l < layers; l++) check(kv[l]);
    /* What was loaded is saved, loaded into an empty cache and saved again: the two files are the same. */
    emx_kv *other;
    o.layout = EMX_LAYOUT_BNHD;
    o.max_pages = PAGES;
    FUZZ_CHECK(!emx_kv_create(ctx, &o, &other), "%s", emx_last_error());
    for (int32_t l = 0; l < layers; l++) {
      char name[64];
      size_t sizes[2];
      char *text[2];
      int32_t again[4], n_seqs = session ? 1 : got;
      const int32_t *ids = session ? &seqs[l] : seqs;
      char folder[32];
      FUZZ_CHECK(folder_create(folder), "no folder");
      snprintf(name, sizeof name, "%s/a", folder);
      for (int i = 0; i < 2; i++) {
        FUZZ_CHECK(!emx_kv_save(i ? other : kv[l], i ? again : ids, n_seqs, name, NULL, NULL), "%s", emx_last_error());
        FUZZ_CHECK(!emxi_file_read(name, ROOM, &text[i], &sizes[i]), "%s", emx_last_error());
        if (!i) FUZZ_CHECK(!emx_kv_load(other, name, again, 4, &n_seqs, NULL, NULL), "%s", emx_last_error());
      }
      FUZZ_CHECK(sizes[0] == sizes[1] && !memcmp(text[0], text[1], sizes[0]), "another file");
      for (int i = 0; i < 2; i++) emxi_free(text[i]);
      for (int32_t i = 0; i < n_seqs; i++) FUZZ_CHECK(!emx_seq_destroy(other, again[i]), "%s", emx_last_error());
      remove(name);
      rmdir(folder);
    }
    emx_kv_destroy(other);
    for (int32_t l = 0; l < layers; l++) { /* life goes on */
      for (int32_t i = 0; i < (session ? 1 : got); i++) append(kv[l], session ? seqs[l] : seqs[i], 3, 9);
      check(kv[l]);
      for (int32_t i = 0; i < (session ? 1 : got); i++)
        FUZZ_CHECK(!emx_seq_destroy(kv[l], session ? seqs[l] : seqs[i]), "%s", emx_last_error());
      check(kv[l]);
      FUZZ_CHECK(kv[l]->n_free == PAGES - 2, "%d free pages", (int)kv[l]->n_free);
    }
  }
  for (int l = 0; l < LAYERS; l++) emx_kv_destroy(kv[l]);
  return 0;
}
