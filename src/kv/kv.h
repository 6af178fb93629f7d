/* SPDX-License-Identifier: Apache-2.0
 * The paged KV cache and the resolved arguments of its back-end operations.
 *
 * A page's summaries describe its first sum_tokens[page] tokens. The number is 0 when they describe nothing. They are trusted
 * only where that number is the number of tokens a sequence sees in the page, so a truncated, recycled or half-written page is
 * never misjudged: it is read, and its summaries are rebuilt from K before the next token goes in.
 */
#ifndef EMXI_KV_H
#define EMXI_KV_H

#include "base/backend.h"
#include "base/base.h"
#include "kv/sketch.h"

/* Keys or values of a file that are read at a time where no workspace is at hand: a buffer of EMXI_ROWS * D elements. */
#define EMXI_ROWS 16
#define EMXI_ROWS_BYTES (EMXI_ROWS * 256 * sizeof(float))

/* K and V in a file (src/kv/file.c). */
typedef struct emxi_kv_file {
  int fd;
  pid_t pid;      /* whose file it is */
  int64_t values; /* bytes of K, where V begins */
  char *path;     /* what it was called, for messages */
  char *bench;    /* [threads, bench_size] rows of a page of K, then of V, that an append puts together */
  int64_t bench_size;
  atomic_int fault; /* the first fault of a call, see file.c */
  int fault_errno;  /* 0: the file has been cut */
  bool fault_write;
  int64_t fault_at;
  size_t fault_bytes;
} emxi_kv_file;

/* A longer sequence would not fit the int32 positions and lengths of the interface. */
#define EMXI_KV_MAX_LEN ((int64_t)INT32_MAX - 4096)

/* Marks of (page, KV head). */
enum { EMXI_MARK_NONFINITE = 1 };

typedef struct emxi_kv_seq {
  int64_t length;
  int64_t n_pages;
  int64_t mirrored; /* on a GPU: leading entries of the block table that the device's copy has */
  bool used;
} emxi_kv_seq;

struct emx_kv {
  emx_ctx *ctx;
  int32_t dtype, G, D, P, layout, summaries, max_seqs;
  int64_t max_pages;

  /* The pool: element (page, head, token, d) is at page*stride_page + head*stride_head + token*stride_token + d. */
  char *k, *v;
  int64_t k_page, k_head, k_token;
  int64_t v_page, v_head, v_token;
  emxi_kv_file *file; /* or NULL; k and v are NULL with it, and the strides, equal for both, say where elements are in the file */

  /* Summaries in device memory, by page and KV head. */
  void *minmax;       /* [M,G,2,D] cache dtype: minimum, then maximum */
  float *moments;     /* [M,G,moments_ld]: mean [D], m2 [D], radius */
  uint8_t *marks;     /* [M,G] EMXI_MARK_* */
  int64_t moments_ld; /* 2 D + 1, rounded up to a 64-byte line */
  /* On a GPU (src/cuda/kernels.h) minmax is padded, codes stand for the moments, and tails say which pages are described; there
   * are no marks, and sum_tokens is of no use. */
  uint8_t *codes;
  float *tails;
  struct emxi_kv_facts *facts; /* on a GPU: what emx_kv_get_summary has fetched last */
  emxi_sketch sketch;          /* on a GPU: */
  float *sketch_group;
  int8_t *sketch_centre;
  uint8_t *sketch_codes;
  float *sketch_weights;

  /* Host side. */
  int32_t *sum_tokens; /* [M] */
  int32_t *refs;       /* [M] sequences that hold the page */
  int32_t *free_list;  /* [M] stack */
  int64_t n_free;
  uint32_t *stamp, stamp_now;  /* [M] duplicate check */
  emxi_kv_seq *seqs;           /* [max_seqs] */
  int32_t *tables;             /* [max_seqs, max_pages] */
  int32_t *device_tables;      /* on a GPU: [max_seqs, max_pages], what the device knows of `tables` */
  struct emxi_kv_copy *copies; /* [max_seqs] */
  int32_t n_seqs;

  int64_t bytes_kv, bytes_summary;
  void *device_block, *host_block, *pinned_block;
};

/* Copy-on-write of the first `tokens` tokens. */
typedef struct emxi_kv_copy {
  int32_t from, to, tokens;
  int32_t batch; /* which entry of the batch asked for it */
} emxi_kv_copy;

/* Append: copies first, then entry b's n[b] new tokens from position length(b) on. Block tables already hold the pages. */
typedef struct emxi_kv_write {
  emx_kv *kv;
  const emx_kv_batch *batch;
  const int32_t *n; /* [B], or NULL: t each. On a GPU in device memory */
  int32_t t;
  int32_t dtype; /* of k and v: the cache's, or f32 */
  const char *k, *v;
  int64_t k_stride[3], v_stride[3]; /* batch, head, token; elements */
  const emxi_kv_copy *copies;
  int32_t n_copies;
} emxi_kv_write;

/* On a GPU: rows [from, from + n) of one of the library's sequences, packed as [G,n,D] in the cache's dtype, device memory. */
typedef struct emxi_kv_read {
  const emx_kv *kv;
  int32_t seq;
  int64_t from, n;
  char *k, *v;
  const char *who;
} emxi_kv_read;

/* Summaries of one page and KV head, brought to the host; tokens 0: there are none. */
typedef struct emxi_kv_facts {
  int32_t tokens;
  float radius;
  char box[2 * 256 * sizeof(float)]; /* minimum [D], maximum [D], cache dtype */
  float moments[2 * 256];            /* mean [D], m2 [D] */
} emxi_kv_facts;

/* On a GPU the caller's block tables, lengths and counts lie where the host cannot look: kernels check them. */
static inline bool emxi_kv_on_device(const emx_kv *kv) { return kv->ctx->device != EMX_DEVICE_CPU; }
/* Block table and length of batch entry b; not for the caller's tables on a GPU. */
static inline const int32_t *emxi_kv_entry(const emx_kv *kv, const emx_kv_batch *batch, int32_t b, int64_t *length) {
  if (batch->seqs) {
    *length = kv->seqs[batch->seqs[b]].length;
    return kv->tables + (int64_t)batch->seqs[b] * kv->max_pages;
  }
  *length = ((const int32_t *)batch->seq_lens->data)[b];
  return (const int32_t *)batch->block_table->data + (int64_t)b * batch->block_table->stride[0];
}

static inline int64_t emxi_kv_pages_of(const emx_kv *kv, int64_t tokens) { return (tokens + kv->P - 1) / kv->P; }
static inline const char *emxi_kv_k(const emx_kv *kv, int32_t page, int32_t head, int64_t token) {
  return kv->k + (size_t)(page * kv->k_page + head * kv->k_head + token * kv->k_token) * emx_dtype_size(kv->dtype);
}
static inline const char *emxi_kv_v(const emx_kv *kv, int32_t page, int32_t head, int64_t token) {
  return kv->v + (size_t)(page * kv->v_page + head * kv->v_head + token * kv->v_token) * emx_dtype_size(kv->dtype);
}
/* ---- in memory or in a file. Makes the file, kv->file and the strides being set; on failure there is none. */
emx_status emxi_kv_file_open(emx_kv *kv, const char *path, const char *who);
void emxi_kv_file_close(emx_kv *kv);
/* Around everything that touches K or V: `begin` refuses a forked process, `end` is the first fault in between, by reads or
 * writes of any worker. Nothing in between fails: after a fault reads give zeros, writes do nothing, and the caller drops its
 * results. */
EMXI_SHARED emx_status emxi_kv_file_begin(const emx_kv *kv, const char *who);
EMXI_SHARED emx_status emxi_kv_file_end(const emx_kv *kv, const char *who);
/* Rows [token, token + n) of (page, head) of K or V, D apart. */
EMXI_SHARED const char *emxi_kv_file_read(const emx_kv *kv, bool values, int32_t page, int32_t head, int64_t token, int64_t n,
                                          char *rows);
EMXI_SHARED void emxi_kv_file_write(const emx_kv *kv, bool values, int32_t page, int32_t head, int64_t token, int64_t n,
                                    const char *rows);
/* Whole pages of a head, [n,P,D]; and word that they will be wanted. */
EMXI_SHARED void emxi_kv_file_pages(const emx_kv *kv, bool values, int32_t head, const int32_t *pages, int64_t n, char *out);
void emxi_kv_file_expect_pages(const emx_kv *kv, bool values, int32_t head, const int32_t *pages, int64_t n);
/* Values of a head at these offsets (elements, as of head 0); at[i]: where the i-th came to lie in rows, which takes 2 n D
 * elements. And word that they will be wanted, and that keys will be. */
void emxi_kv_file_values(const emx_kv *kv, int32_t head, const int64_t *offset, int64_t n, char *rows, int64_t *at);
void emxi_kv_file_expect_values(const emx_kv *kv, int32_t head, const int64_t *offset, int64_t n);
void emxi_kv_file_expect_keys(const emx_kv *kv, int32_t page, int32_t head, int64_t token, int64_t n);
/* Keys [token, token + n) of (page, head), kv->k_token elements apart: where they lie, or read into rows (n * D elements). */
static inline const char *emxi_kv_keys(const emx_kv *kv, int32_t page, int32_t head, int64_t token, int64_t n, char *rows) {
  return kv->file ? emxi_kv_file_read(kv, false, page, head, token, n, rows) : emxi_kv_k(kv, page, head, token);
}

/* Minimum of (page, head); the maximum follows D elements later. */
static inline char *emxi_kv_minmax(const emx_kv *kv, int32_t page, int32_t head) {
  return (char *)kv->minmax + (size_t)(((int64_t)page * kv->G + head) * 2 * kv->D) * emx_dtype_size(kv->dtype);
}
/* mean [D], m2 [D], radius. */
static inline float *emxi_kv_moments(const emx_kv *kv, int32_t page, int32_t head) {
  return kv->moments + ((int64_t)page * kv->G + head) * kv->moments_ld;
}
static inline uint8_t *emxi_kv_mark(const emx_kv *kv, int32_t page, int32_t head) {
  return kv->marks + (int64_t)page * kv->G + head;
}

/* Sketches (src/kv/sketch.c). Carves the arrays, or counts them. */
void emxi_sketch_carve(emx_kv *kv, emxi_arena *device, emxi_arena *host);
/* Whether the superpage that ends in logical page p of a table is complete once the pages from `first_new` on are. */
bool emxi_sketch_super_ready(const emx_kv *kv, const int32_t *table, int64_t p, int64_t first_new);
/* Pages [from, to) of the table, complete, have new sketches; and so have the superpages that end in them. */
void emxi_sketch_publish(emx_kv *kv, const int32_t *table, int64_t from, int64_t to);
/* The sketches of a sequence that has been loaded, in the order of its pages; without them (cancelled) every key is read. */
EMXI_SHARED void emxi_sketch_rebuild(emx_ctx *ctx, emx_kv *kv, int32_t seq);
static inline bool emxi_sketch_page_valid(const emx_kv *kv, int32_t page) {
  return kv->sum_tokens[page] == kv->P && kv->sketch.number[page];
}
/* Slot of the superpage that ends in a page. */
static inline int64_t emxi_sketch_super_slot(const emx_kv *kv, int32_t last) {
  const uint32_t n = (uint32_t)(EMXI_SUPER / kv->P), page = (uint32_t)last; /* n is a power of two */
  return (int64_t)(page & (n - 1)) * kv->sketch.super_pitch + (int64_t)(page >> __builtin_ctz(n));
}
/* The record in the slot of the superpage's last page describes just these pages. */
static inline bool emxi_sketch_super_valid(const emx_kv *kv, const int32_t *pages) {
  const int32_t n = EMXI_SUPER / kv->P;
  const uint64_t *number = kv->sketch.super_number + emxi_sketch_super_slot(kv, pages[n - 1]) * n;
  bool valid = true;
  for (int32_t i = 0; i < n; i++) /* no branches: they would wait for memory one by one */
    valid &= (kv->sum_tokens[pages[i]] == kv->P) & (number[i] != 0) & (kv->sketch.number[pages[i]] == number[i]);
  return valid;
}

/* Everything about the batch is in range: sequences exist and are distinct, tables are wide enough for `extra` more tokens each
 * (n may be NULL: extra for all), every page index that would be touched lies in the pool. */
emx_status emxi_kv_check_batch(const emx_kv *kv, const emx_kv_batch *batch, const int32_t *n, int64_t extra, const char *who);
/* emx_kv_append with the layout of k_new and v_new named. The context's lock is held. */
emx_status emxi_kv_append(emx_ctx *ctx, emx_kv *kv, const emx_kv_batch *batch, const emx_tensor *k_new, const emx_tensor *v_new,
                          const int32_t *n, int32_t layout, const char *who);
/* On a GPU, for an append of n tokens over the sequence's row of device_tables, which a graph may hold: the pages that it takes,
 * in this table, and what is shared copied. emxi_kv_advance says that the tokens are there; emxi_kv_truncate to the present
 * length takes the pages back. */
EMXI_SHARED emx_status emxi_kv_prepare(emx_ctx *ctx, emx_kv *kv, int32_t seq, int32_t n);
static inline void emxi_kv_advance(emx_kv *kv, int32_t seq, int32_t n) { kv->seqs[seq].length += n; }
/* Shape and dtype of new tokens; *t their number. */
emx_status emxi_kv_check_new(const emx_ctx *ctx, const emx_kv *kv, int32_t batch, const emx_tensor *k_new,
                             const emx_tensor *v_new, int32_t layout, const char *who, int32_t *t);
/* What a cache file brings: sequences over the next free pages, whose contents and summaries are in place. */
typedef struct emxi_kv_image {
  int64_t pages;            /* at most n_free */
  const int32_t *described; /* [pages] tokens that the summaries of each describe */
  int32_t seqs;
  const int32_t *lengths; /* [seqs] */
  const int32_t *tables;  /* pages of the first sequence, of the second, ...: numbers below `pages`, each used at least once */
} emxi_kv_image;
/* The i-th page that will be handed out, i < n_free: where page i of an image belongs. */
static inline int32_t emxi_kv_next_page(const emx_kv *kv, int64_t i) { return kv->free_list[kv->n_free - 1 - i]; }
/* seqs [image->seqs]: empty sequences, or -1, which becomes a new one; there must be room for those. */
EMXI_SHARED void emxi_kv_adopt(emx_kv *kv, const emxi_kv_image *image, int32_t *seqs);
/* emx_seq_truncate without checks. */
void emxi_kv_truncate(emx_kv *kv, int32_t seq, int64_t length);

/* A selection or a decode, resolved: every pointer has been checked. The batch is as it is after the append, except that the
 * caller's own lengths need `added` more. */
typedef struct emxi_decode {
  const emx_kv *kv;
  const emx_kv_batch *batch;
  int32_t added;
  bool select_only;
  int32_t B, H, S;
  emx_select_desc select;
  int32_t asked; /* the selector of the reports: the caller's, where CERTIFIED runs as ALL */
  bool per_head; /* alphas is or will be set: heads with and without a threshold may come together */
  double alpha;
  const double *alphas; /* [H] or NULL: `alpha` for all; emxi_decode_alpha() */
  float scale;
  int64_t max_len; /* longest sequence of the batch: sizes the workspace */
  const char *q;
  int32_t q_dtype, o_dtype;
  int64_t q_stride[3], o_stride[3]; /* batch, head, token */
  char *o;
  const float *slopes; /* [H] or NULL */
  int32_t *pages;      /* element (b,h,s,i) */
  int64_t pages_stride[4], pages_width;
  int32_t *n_pages;
  int64_t n_pages_stride[3];
  float *bound;
  int64_t bound_stride[3];
  char *reports;
  int64_t report_stride;
  int32_t *support_count; /* NULL: no supports are wanted */
  int32_t *support_index;
  float *support_weight;
  int64_t support_width, count_stride[3], index_stride[3], weight_stride[3]; /* batch, head, token */
} emxi_decode;

static inline double emxi_decode_alpha(const emxi_decode *d, int32_t h) { return d->alphas ? d->alphas[h] : d->alpha; }
static inline const int32_t *emxi_decode_entry(const emxi_decode *d, int32_t b, int64_t *length) {
  const int32_t *table = emxi_kv_entry(d->kv, d->batch, b, length);
  if (!d->batch->seqs) *length += d->added;
  return table;
}

/* Selector, query and scalars: what sizes the workspace. Leaves max_len to the caller. */
emx_status emxi_decode_shape(emx_ctx *ctx, const emx_kv *kv, const emx_select_desc *select, const emx_decode_io *io,
                             const char *who, emxi_decode *out);
/* The above, and every tensor of the call. */
emx_status emxi_decode_resolve(emx_ctx *ctx, const emx_kv *kv, const emx_select_desc *select, const emx_decode_io *io,
                               bool select_only, const char *who, emxi_decode *out);
/* The batch against the resolved shapes, max_len, the contents of the caller's page lists. `after`: tokens that an append will
 * add to each sequence first. */
emx_status emxi_decode_bind(emxi_decode *d, const emx_kv_batch *batch, int32_t after, const char *who);
emx_status emxi_decode_workspace(emx_ctx *ctx, const emxi_decode *d, size_t *bytes);
emx_status emxi_decode_arena(emx_ctx *ctx, const emxi_decode *d, void *workspace, size_t bytes, const char *who,
                             emxi_arena *arena);

#endif
