/* SPDX-License-Identifier: Apache-2.0
 * Cache files, streamed page by page in both directions.
 *
 * A safetensors file: metadata kind, version, tokens and, for a session, model; then, in this order,
 *   last       f32 [W], session only: normed state of the last token; [0] if it is not known
 *   lengths    i32 [n] tokens of each sequence
 *   tables     i32 [..] pages of sequence 0, of sequence 1, ...; a page is numbered when it is first met, so shared
 *              pages are stored once
 *   described  i32 [L,M] how many tokens the summaries of each page described; 0: none
 *   layer.I.k, layer.I.v  [M,G,P,D] in the cache's dtype, whatever its layout; rows that no sequence sees are zero
 *   checksum   i32 [8]: BLAKE2b-256 of every byte before it, the header included
 *
 * Summaries are not stored: they are rebuilt from K by the operation that built them, so they have the same bits, and no file can
 * make a decode claim what its keys do not bear out. The pages go into free pages of the pool while the checksum is computed;
 * only when all has been checked are they handed to sequences, so a refused file needs no undoing. */
#define _GNU_SOURCE
#include "cache.h"
#include "base/backend.h"
#include "kv/kv.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { VERSION = 1, BUFFER = 1 << 18 };
static const char *const kind_names[] = {NULL, "libentmax.kv", "libentmax.session"};
/* Tensors before the first layer's, `last` only in sessions. */
static const char *const names[] = {"last", "lengths", "tables", "described"};

/* Everything but K and V. */
typedef struct plan {
  int64_t pages, entries; /* M; of tables */
  int32_t *lengths;       /* [n] */
  int32_t *tables;        /* [entries] */
  int32_t *described;     /* [L,M] */
  int32_t *rows;          /* [M] tokens of a page that some sequence sees */
  int32_t *place;         /* [L,M] physical page */
  int32_t *index;         /* saving: [max_pages] number of a physical page, -1: not met. Loading: [M] its place in a sequence */
  int32_t *mapped;        /* [L] what emxi_sketch.mapped was */
  void *memory;
} plan;

/* n_index: size of index. */
static emx_status plan_create(plan *p, int32_t layers, int32_t seqs, int64_t n_index, const char *path) {
  for (;;) {
    emxi_arena a;
    size_t bytes = 0;
    emxi_arena_init(&a, p->memory, p->memory ? SIZE_MAX / 2 : 0);
    p->lengths = emxi_arena_take(&a, seqs, sizeof(int32_t));
    p->tables = emxi_arena_take(&a, p->entries, sizeof(int32_t));
    p->described = emxi_arena_take(&a, p->pages, (size_t)layers * sizeof(int32_t));
    p->place = emxi_arena_take(&a, p->pages, (size_t)layers * sizeof(int32_t));
    p->rows = emxi_arena_take(&a, p->pages, sizeof(int32_t));
    p->index = emxi_arena_take(&a, n_index, sizeof(int32_t));
    p->mapped = emxi_arena_take(&a, layers, sizeof(int32_t));
    if (p->memory) break;
    bytes = emxi_arena_total(&a);
    if (!(p->memory = emxi_alloc(bytes))) return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", path, bytes);
  }
  return EMX_OK;
}

/* Tokens that the sequence sees in its i-th page. */
static int32_t rows_of(const emx_kv *kv, int64_t length, int64_t i) {
  const int64_t left = length - i * kv->P;
  return (int32_t)(left < kv->P ? left : kv->P);
}
static void see(plan *p, int32_t page, int32_t rows) {
  if (rows > p->rows[page]) p->rows[page] = rows;
}
static size_t page_bytes(const emx_kv *kv) { return (size_t)kv->G * (size_t)kv->P * (size_t)kv->D * emx_dtype_size(kv->dtype); }

/* ---- pages */

typedef struct stream {
  const emxi_cache *c;
  const plan *p;
  emxi_sink *sink; /* one of the two */
  emxi_source *source;
  char *buffer; /* whole pages */
  size_t room;
  int64_t done, total; /* bytes of K and V */
} stream;

static emx_status stream_create(stream *s, const emxi_cache *c, const plan *p, const char *path) {
  const size_t page = page_bytes(c->kv[0]);
  *s = (stream){.c = c, .p = p, .room = page > BUFFER ? page : BUFFER / page * page};
  s->total = 2 * (int64_t)c->layers * p->pages * (int64_t)page;
  s->buffer = emxi_alloc(s->room);
  return s->buffer ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", path, s->room);
}

/* One page between the pool and its form in the file, [G,P,D]. */
static void move_page(const emx_kv *kv, bool values, int32_t page, int32_t rows, char *file, bool save) {
  const size_t es = emx_dtype_size(kv->dtype), row = (size_t)kv->D * es;
  const bool dense = (values ? kv->v_token : kv->k_token) == kv->D;
  for (int32_t g = 0; g < kv->G; g++, file += (size_t)kv->P * row) {
    if (kv->file && save)
      emxi_kv_file_read(kv, values, page, g, 0, rows, file);
    else if (kv->file)
      emxi_kv_file_write(kv, values, page, g, 0, rows, file);
    for (int32_t t = 0; !kv->file && t < rows; t += dense ? rows : 1) {
      char *pool = (char *)(values ? emxi_kv_v(kv, page, g, t) : emxi_kv_k(kv, page, g, t));
      const size_t size = dense ? (size_t)rows * row : row;
      if (save)
        memcpy(file + (size_t)t * row, pool, size);
      else
        memcpy(pool, file + (size_t)t * row, size);
    }
    if (save) memset(file + (size_t)rows * row, 0, (size_t)(kv->P - rows) * row);
  }
}

static emx_status stream_layers(stream *s) {
  const size_t page = page_bytes(s->c->kv[0]);
  const int64_t most = (int64_t)(s->room / page);
  for (int32_t part = 0; part < 2 * s->c->layers; part++) {
    const emx_kv *kv = s->c->kv[part / 2];
    const int32_t *place = s->p->place + (part / 2) * s->p->pages;
    for (int64_t i = 0, n; i < s->p->pages; i += n) {
      n = s->p->pages - i < most ? s->p->pages - i : most;
      const size_t size = (size_t)n * page;
      if (emxi_cancelled(s->c->ctx)) return emxi_fail(EMX_ERR_CANCELLED, "cancelled");
      if (s->source) EMX_TRY(emxi_source_get(s->source, s->buffer, size));
      EMX_TRY(emxi_kv_file_begin(kv, s->sink ? "save" : "load"));
      for (int64_t j = 0; j < n; j++)
        move_page(kv, part & 1, place[i + j], s->p->rows[i + j], s->buffer + (size_t)j * page, s->sink != NULL);
      EMX_TRY(emxi_kv_file_end(kv, s->sink ? "save" : "load"));
      if (s->sink) EMX_TRY(emxi_sink_put(s->sink, s->buffer, size));
      s->done += (int64_t)size;
      if (s->c->progress) s->c->progress(s->c->user, s->done, s->total);
    }
  }
  return EMX_OK;
}

/* ---- saving */

typedef struct save_job {
  stream s;
  const char *head;
  size_t head_size;
} save_job;

static emx_status write_body(void *arg, emxi_sink *sink) {
  save_job *j = arg;
  const emxi_cache *c = j->s.c;
  const plan *p = j->s.p;
  emxi_hash hash;
  uint8_t digest[EMXI_HASH_SIZE];
  emxi_hash_init(&hash);
  sink->hash = &hash;
  j->s.sink = sink;
  EMX_TRY(emxi_sink_put(sink, j->head, j->head_size));
  if (c->last_known) EMX_TRY(emxi_sink_put(sink, c->last, (size_t)c->width * sizeof *c->last));
  EMX_TRY(emxi_sink_put(sink, p->lengths, (size_t)c->n_seqs * sizeof *p->lengths));
  EMX_TRY(emxi_sink_put(sink, p->tables, (size_t)p->entries * sizeof *p->tables));
  EMX_TRY(emxi_sink_put(sink, p->described, (size_t)(c->layers * p->pages) * sizeof *p->described));
  EMX_TRY(stream_layers(&j->s));
  emxi_hash_end(&hash, digest);
  sink->hash = NULL;
  return emxi_sink_put(sink, digest, sizeof digest);
}

static emx_status write_file(const emxi_cache *c, const plan *p, const char *path) {
  const emx_kv *kv = c->kv[0];
  const bool session = c->kind == EMX_CACHE_SESSION;
  const int64_t n = 5 + 2 * (int64_t)c->layers, described[2] = {c->layers, p->pages}, digest = EMXI_HASH_SIZE / 4,
                pages[4] = {p->pages, kv->G, kv->P, kv->D}, width = c->last_known ? c->width : 0, seqs = c->n_seqs;
  emx_named_tensor *t = emxi_alloc((size_t)n * sizeof *t);
  char(*layer)[32] = emxi_alloc((size_t)(2 * c->layers) * sizeof *layer);
  save_job j = {.head = NULL};
  char *head = NULL;
  emx_status status = t && layer ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "%s: no memory for its header", path);
  if (!status) {
    t[0] = (emx_named_tensor){names[0], emx_tensor_view(NULL, EMX_F32, 1, &width)};
    t[1] = (emx_named_tensor){names[1], emx_tensor_view(NULL, EMX_I32, 1, &seqs)};
    t[2] = (emx_named_tensor){names[2], emx_tensor_view(NULL, EMX_I32, 1, &p->entries)};
    t[3] = (emx_named_tensor){names[3], emx_tensor_view(NULL, EMX_I32, 2, described)};
    for (int32_t i = 0; i < 2 * c->layers; i++) {
      snprintf(layer[i], sizeof *layer, "layer.%d.%c", i / 2, i % 2 ? 'v' : 'k');
      t[4 + i] = (emx_named_tensor){layer[i], emx_tensor_view(NULL, kv->dtype, 4, pages)};
    }
    t[n - 1] = (emx_named_tensor){"checksum", emx_tensor_view(NULL, EMX_I32, 1, &digest)};
    int64_t total = 0;
    for (int32_t i = 0; i < c->n_seqs; i++) total += p->lengths[i];
    char version[16], tokens[24];
    snprintf(version, sizeof version, "%d", VERSION);
    snprintf(tokens, sizeof tokens, "%lld", (long long)total);
    const char *const metadata[] = {"kind", kind_names[c->kind], "version", version, "tokens", tokens, "model", c->model};
    const int64_t skip = session ? 0 : 1;
    status = emxi_checkpoint_head(path, t + skip, n - skip, metadata, session ? 4 : 3, &head, &j.head_size);
  }
  emxi_free(layer);
  emxi_free(t);
  if (!status) status = stream_create(&j.s, c, p, path);
  j.head = head;
  if (!status) status = emxi_file_write(path, write_body, &j);
  emxi_free(j.s.buffer);
  emxi_free(head);
  return status;
}

/* The pages of all sequences, numbered. */
static void number_pages(const emxi_cache *c, plan *p) {
  const emx_kv *kv = c->kv[0];
  int64_t at = 0, met = 0;
  for (int64_t i = 0; i < kv->max_pages; i++) p->index[i] = -1;
  for (int32_t q = 0; q < c->n_seqs; q++) {
    const int32_t *table = kv->tables + (int64_t)c->seqs[q] * kv->max_pages;
    p->lengths[q] = (int32_t)kv->seqs[c->seqs[q]].length;
    for (int64_t i = 0; i < emxi_kv_pages_of(kv, p->lengths[q]); i++) {
      int32_t *number = &p->index[table[i]];
      if (*number < 0) {
        *number = (int32_t)met++;
        p->place[*number] = table[i];
        p->rows[*number] = 0;
      }
      p->tables[at++] = *number;
      see(p, *number, rows_of(kv, p->lengths[q], i));
    }
  }
  p->pages = met;
  /* A session's sequences have the same length in every layer: page i of the file is page i of the sequence in each. */
  for (int32_t l = 1; l < c->layers; l++)
    memcpy(p->place + l * met, c->kv[l]->tables + (int64_t)c->seqs[l] * c->kv[l]->max_pages, (size_t)met * sizeof *p->place);
  for (int32_t l = 0; l < c->layers; l++)
    for (int64_t i = 0; i < met; i++) {
      const int32_t tokens = c->kv[l]->sum_tokens[p->place[l * met + i]];
      p->described[l * met + i] = tokens <= p->rows[i] ? tokens : 0;
    }
}

emx_status emxi_cache_save(const emxi_cache *c, const char *path) {
  const emx_kv *kv = c->kv[0];
  plan p = {0};
  for (int32_t q = 0; q < c->n_seqs; q++) p.entries += emxi_kv_pages_of(kv, kv->seqs[c->seqs[q]].length);
  p.pages = p.entries < kv->max_pages ? p.entries : kv->max_pages; /* at most */
  emx_status status = plan_create(&p, c->layers, c->n_seqs, kv->max_pages, path);
  if (!status) {
    number_pages(c, &p);
    status = write_file(c, &p, path);
  }
  emxi_free(p.memory);
  return status;
}

/* ---- reading the header */

/* A number of metadata in canonical form; -1: there is none. */
static int64_t metadata_number(const emx_checkpoint *ck, const char *key) {
  const char *text = emx_checkpoint_metadata(ck, key);
  if (!text || *text < '0' || *text > '9' || (*text == '0' && text[1])) return -1;
  char *end;
  errno = 0;
  const long long v = strtoll(text, &end, 10);
  return errno || *end ? -1 : v;
}

/* Tensor *at of the file is `name` with this dtype (0: *dtype takes it) and shape (-1: that place takes it). */
static emx_status expect(const emx_checkpoint *ck, const char *path, int64_t *at, const char *name, int32_t *dtype, int32_t ndim,
                         int64_t *shape) {
  const char *have;
  emx_tensor t;
  EMX_TRY(emx_checkpoint_get(ck, (*at)++, &have, &t));
  if (strcmp(have, name)) return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %lld is not %s", path, (long long)*at - 1, name);
  if (!*dtype) *dtype = t.dtype;
  bool good = t.dtype == *dtype && t.ndim == ndim;
  for (int32_t d = 0; d < ndim && good; d++) {
    if (shape[d] < 0) shape[d] = t.shape[d];
    good = shape[d] == t.shape[d];
  }
  return good ? EMX_OK : emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s does not have the dtype and shape it must have", path, name);
}

static emx_status read_info(const emx_checkpoint *ck, const char *path, emx_cache_info *info, int64_t *width, int64_t *entries) {
  const char *kind = emx_checkpoint_metadata(ck, "kind");
  *info = (emx_cache_info){.struct_size = sizeof *info};
  for (int32_t k = EMX_CACHE_KV; k <= EMX_CACHE_SESSION; k++)
    if (kind && !strcmp(kind, kind_names[k])) info->kind = k;
  if (!info->kind) return emxi_fail(EMX_ERR_FORMAT, "%s: not a cache file: its metadata have no kind that is known", path);
  const int64_t version = metadata_number(ck, "version");
  if (version < 1 || version > INT32_MAX) return emxi_fail(EMX_ERR_FORMAT, "%s: its version is not a number", path);
  if (version != VERSION)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: a cache file of version %lld, this library reads version %d", path,
                     (long long)version, VERSION);
  info->version = (int32_t)version;
  info->tokens = metadata_number(ck, "tokens");
  if (info->tokens < 0) return emxi_fail(EMX_ERR_FORMAT, "%s: its number of tokens is missing", path);
  const bool session = info->kind == EMX_CACHE_SESSION;
  const int64_t others = session ? 5 : 4, layers = (emx_checkpoint_count(ck) - others) / 2;
  if (layers < 1 || emx_checkpoint_count(ck) != others + 2 * layers || layers > INT32_MAX / 2 || (!session && layers != 1))
    return emxi_fail(EMX_ERR_FORMAT, "%s: %lld tensors are not those of a cache", path, (long long)emx_checkpoint_count(ck));
  info->layers = (int32_t)layers;
  if (session) {
    const char *model = emx_checkpoint_metadata(ck, "model");
    if (!model || strlen(model) != sizeof info->model - 1)
      return emxi_fail(EMX_ERR_FORMAT, "%s: it does not name its model", path);
    memcpy(info->model, model, sizeof info->model);
  }
  int64_t at = 0, seqs = -1, described[2] = {layers, -1}, pages[4] = {-1, -1, -1, -1}, digest = EMXI_HASH_SIZE / 4;
  int32_t f32 = EMX_F32, i32 = EMX_I32;
  *width = *entries = -1;
  if (session) EMX_TRY(expect(ck, path, &at, names[0], &f32, 1, width));
  EMX_TRY(expect(ck, path, &at, names[1], &i32, 1, &seqs));
  EMX_TRY(expect(ck, path, &at, names[2], &i32, 1, entries));
  EMX_TRY(expect(ck, path, &at, names[3], &i32, 2, described));
  pages[0] = described[1];
  for (int32_t i = 0; i < 2 * info->layers; i++) {
    char name[32];
    snprintf(name, sizeof name, "layer.%d.%c", i / 2, i % 2 ? 'v' : 'k');
    EMX_TRY(expect(ck, path, &at, name, &info->dtype, 4, pages));
  }
  EMX_TRY(expect(ck, path, &at, "checksum", &i32, 1, &digest));
  if (seqs > INT32_MAX || (session && seqs != 1) || pages[0] > INT32_MAX || *entries < pages[0])
    return emxi_fail(EMX_ERR_FORMAT, "%s: %lld sequences over %lld pages", path, (long long)seqs, (long long)pages[0]);
  for (int d = 1; d < 4; d++)
    if (pages[d] < 1 || pages[d] > INT32_MAX) return emxi_fail(EMX_ERR_FORMAT, "%s: pages of an impossible shape", path);
  info->seqs = (int32_t)seqs;
  info->pages = pages[0];
  info->kv_heads = (int32_t)pages[1];
  info->page_size = (int32_t)pages[2];
  info->head_dim = (int32_t)pages[3];
  return EMX_OK;
}

static emx_status open_source(const char *path, emxi_source *source) {
  size_t size;
  *source = (emxi_source){.path = path};
  EMX_TRY(emxi_file_open(path, &source->fd, &size));
  source->left = size;
  return EMX_OK;
}

emx_status emx_cache_get_info(const char *path, emx_cache_info *info) {
  if (!path) return emxi_fail(EMX_ERR_INVALID, "emx_cache_get_info: path is NULL");
  EMXI_CHECK_STRUCT(info, emx_cache_info);
  emxi_source source;
  emx_checkpoint *ck = NULL;
  emx_cache_info read;
  int64_t width, entries;
  EMX_TRY(open_source(path, &source));
  emx_status status = emxi_checkpoint_header(&source, &ck);
  if (!status) status = read_info(ck, path, &read, &width, &entries);
  emx_checkpoint_close(ck);
  close(source.fd);
  if (status) return status;
  emxi_struct_write(info, &read, sizeof read);
  return EMX_OK;
}

/* ---- loading */

/* The file is one for these caches, and they have room for it. */
static emx_status match(const emxi_cache *c, const emx_cache_info *info, int64_t width, const char *path) {
  const emx_kv *kv = c->kv[0];
  if (info->kind != c->kind)
    return emxi_fail(EMX_ERR_FORMAT, "%s: it is a %s file, expected %s", path, kind_names[info->kind], kind_names[c->kind]);
  if (c->model && strcmp(info->model, c->model))
    return emxi_fail(EMX_ERR_INVALID, "%s: it belongs to another model (%.12s..., this one is %.12s...)", path, info->model,
                     c->model);
  if (info->dtype != kv->dtype)
    return emxi_fail(EMX_ERR_DTYPE, "%s: its keys are %s, the cache is %s", path, emx_dtype_name(info->dtype),
                     emx_dtype_name(kv->dtype));
  if (info->page_size != kv->P)
    return emxi_fail(EMX_ERR_SHAPE, "%s: its pages hold %d tokens, the cache's %d", path, info->page_size, kv->P);
  if (info->layers != c->layers || info->kv_heads != kv->G || info->head_dim != kv->D || (c->model && width && width != c->width))
    return emxi_fail(EMX_ERR_SHAPE, "%s: %d layers of %d heads of dimension %d, the cache has %d of %d of %d", path, info->layers,
                     info->kv_heads, info->head_dim, c->layers, kv->G, kv->D);
  if (c->kind == EMX_CACHE_KV && info->seqs > c->n_seqs)
    return emxi_fail(EMX_ERR_INVALID, "%s: %d sequences, there is room for %d ids", path, info->seqs, c->n_seqs);
  if (c->kind == EMX_CACHE_KV && info->seqs > kv->max_seqs - kv->n_seqs)
    return emxi_fail(EMX_ERR_STATE, "%s: %d sequences, the cache can take %d more (max_seqs)", path, info->seqs,
                     kv->max_seqs - kv->n_seqs);
  if (c->kind == EMX_CACHE_SESSION && info->tokens > c->max_tokens)
    return emxi_fail(EMX_ERR_STATE, "%s: %lld tokens are more than the %lld of max_tokens", path, (long long)info->tokens,
                     (long long)c->max_tokens);
  for (int32_t l = 0; l < c->layers; l++)
    if (info->pages > c->kv[l]->n_free)
      return emxi_fail(EMX_ERR_STATE, "%s: %lld pages are needed, %lld are free", path, (long long)info->pages,
                       (long long)c->kv[l]->n_free);
  return EMX_OK;
}

/* Lengths and tables agree with each other, every page is numbered when it is first met, and a shared one has the same place in
 * all its sequences. Fills rows. */
static emx_status check_plan(const emxi_cache *c, const emx_cache_info *info, plan *p, const char *path) {
  const emx_kv *kv = c->kv[0];
  int64_t at = 0, met = 0, tokens = 0;
  for (int32_t q = 0; q < info->seqs; q++) {
    const int32_t length = p->lengths[q];
    if (length < 0 || length > EMXI_KV_MAX_LEN || emxi_kv_pages_of(kv, length) > p->entries - at)
      return emxi_fail(EMX_ERR_FORMAT, "%s: sequence %d of %d tokens has too few pages", path, q, length);
    tokens += length;
    for (int64_t i = 0; i < emxi_kv_pages_of(kv, length); i++) {
      const int32_t number = p->tables[at++];
      if (number < 0 || number > met || number >= p->pages)
        return emxi_fail(EMX_ERR_FORMAT, "%s: page %lld of sequence %d has the number %d", path, (long long)i, q, number);
      if (number == met) {
        p->index[met] = (int32_t)i;
        p->rows[met++] = 0;
      } else if (p->index[number] != i)
        return emxi_fail(EMX_ERR_FORMAT, "%s: page number %d is at two places of its sequences", path, number);
      see(p, number, rows_of(kv, length, i));
    }
  }
  if (at != p->entries || met != p->pages || tokens != info->tokens)
    return emxi_fail(EMX_ERR_FORMAT, "%s: %lld pages and %lld tokens, the sequences have %lld and %lld", path,
                     (long long)p->pages, (long long)info->tokens, (long long)met, (long long)tokens);
  for (int32_t l = 0; l < c->layers; l++)
    for (int64_t i = 0; i < p->pages; i++)
      if (p->described[l * p->pages + i] < 0 || p->described[l * p->pages + i] > p->rows[i])
        return emxi_fail(EMX_ERR_FORMAT, "%s: summaries of %d tokens of page %lld", path, p->described[l * p->pages + i],
                         (long long)i);
  return EMX_OK;
}

static emx_status read_body(const emxi_cache *c, const emx_cache_info *info, plan *p, float *last, int64_t width,
                            emxi_source *source, stream *s) {
  uint8_t digest[EMXI_HASH_SIZE], want[EMXI_HASH_SIZE];
  EMX_TRY(emxi_source_get(source, last, (size_t)width * sizeof *last));
  EMX_TRY(emxi_source_get(source, p->lengths, (size_t)info->seqs * sizeof *p->lengths));
  EMX_TRY(emxi_source_get(source, p->tables, (size_t)p->entries * sizeof *p->tables));
  EMX_TRY(emxi_source_get(source, p->described, (size_t)(c->layers * p->pages) * sizeof *p->described));
  EMX_TRY(check_plan(c, info, p, source->path));
  for (int32_t l = 0; l < c->layers; l++)
    for (int64_t i = 0; i < p->pages; i++) p->place[l * p->pages + i] = emxi_kv_next_page(c->kv[l], i);
  s->source = source;
  EMX_TRY(stream_layers(s));
  emxi_hash_end(source->hash, digest);
  source->hash = NULL;
  EMX_TRY(emxi_source_get(source, want, sizeof want));
  if (memcmp(digest, want, sizeof want))
    return emxi_fail(EMX_ERR_FORMAT, "%s: the checksum does not fit: the file is damaged", source->path);
  /* A cache without keys learns from these how to sketch keys: if nothing comes of them, it has learned nothing. */
  emx_status status = EMX_OK;
  for (int32_t l = 0; l < c->layers; l++) p->mapped[l] = c->kv[l]->sketch.mapped;
  for (int32_t l = 0; l < c->layers && !status; l++)
    status = c->ctx->backend->kv_summarize(c->ctx, c->kv[l], p->place + l * p->pages, p->described + l * p->pages, p->pages);
  for (int32_t l = 0; l < c->layers && status; l++) c->kv[l]->sketch.mapped = p->mapped[l];
  return status;
}

static emx_status load(emxi_cache *c, emxi_source *source, emx_checkpoint *ck) {
  emx_cache_info info;
  plan p = {0};
  stream s = {.room = 0};
  int64_t width;
  EMX_TRY(read_info(ck, source->path, &info, &width, &p.entries));
  width = width < 0 ? 0 : width;
  EMX_TRY(match(c, &info, width, source->path));
  p.pages = info.pages;
  float *last = emxi_alloc((size_t)width * sizeof *last);
  emx_status status = last ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %lld numbers", source->path, (long long)width);
  if (!status) status = plan_create(&p, c->layers, info.seqs, p.pages, source->path);
  if (!status) status = stream_create(&s, c, &p, source->path);
  if (!status) status = read_body(c, &info, &p, last, width, source, &s);
  if (!status) {
    if (c->kind == EMX_CACHE_KV)
      for (int32_t q = 0; q < info.seqs; q++) c->seqs[q] = -1;
    for (int32_t l = 0; l < c->layers; l++)
      emxi_kv_adopt(c->kv[l],
                    &(emxi_kv_image){.pages = p.pages,
                                     .described = p.described + l * p.pages,
                                     .seqs = info.seqs,
                                     .lengths = p.lengths,
                                     .tables = p.tables},
                    c->kind == EMX_CACHE_KV ? c->seqs : c->seqs + l);
    for (int32_t l = 0; l < c->layers; l++)
      for (int32_t q = 0; q < info.seqs; q++)
        emxi_sketch_rebuild(c->ctx, c->kv[l], c->kind == EMX_CACHE_KV ? c->seqs[q] : c->seqs[l]);
    c->n_seqs = info.seqs;
    c->length = info.tokens;
    c->last_known = width > 0;
    if (width) memcpy(c->last, last, (size_t)width * sizeof *last);
  }
  emxi_free(s.buffer);
  emxi_free(p.memory);
  emxi_free(last);
  return status;
}

emx_status emxi_cache_load(emxi_cache *c, const char *path) {
  emxi_source source;
  emxi_hash hash;
  emx_checkpoint *ck = NULL;
  EMX_TRY(open_source(path, &source));
  emxi_hash_init(&hash);
  source.hash = &hash;
  emx_status status = emxi_checkpoint_header(&source, &ck);
  if (!status) status = load(c, &source, ck);
  emx_checkpoint_close(ck);
  close(source.fd);
  return status;
}

/* ---- emx_kv_save, emx_kv_load */

static emx_status check_kv(const emx_kv *kv, const int32_t *seqs, int32_t n, const char *path, const char *who) {
  if (!kv || !path || n < 0 || (n && !seqs))
    return emxi_fail(EMX_ERR_INVALID, "%s: %s", who,
                     !kv     ? "kv is NULL"
                     : !path ? "path is NULL"
                     : n < 0 ? "n is negative"
                             : "seqs is NULL");
  if (kv->ctx->device != EMX_DEVICE_CPU)
    return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: caches of a GPU are not saved in this version; keep this one on the CPU", who);
  return EMX_OK;
}

static emx_status save_kv(const emx_kv *kv, const int32_t *seqs, int32_t n, const char *path, emx_progress_fn progress,
                          void *user) {
  for (int32_t i = 0; i < n; i++) {
    int64_t length;
    EMX_TRY(emx_seq_length(kv, seqs[i], &length));
    for (int32_t j = 0; j < i; j++)
      if (seqs[j] == seqs[i]) return emxi_fail(EMX_ERR_INVALID, "emx_kv_save: sequence %d is listed twice", seqs[i]);
  }
  emx_kv *one = (emx_kv *)kv; /* neither these nor the ids are written to */
  emxi_cache c = {.kind = EMX_CACHE_KV,
                  .ctx = kv->ctx,
                  .kv = &one,
                  .layers = 1,
                  .n_seqs = n,
                  .seqs = (int32_t *)seqs,
                  .progress = progress,
                  .user = user};
  return emxi_cache_save(&c, path);
}
emx_status emx_kv_save(const emx_kv *kv, const int32_t *seqs, int32_t n, const char *path, emx_progress_fn progress, void *user) {
  EMX_TRY(check_kv(kv, seqs, n, path, "emx_kv_save"));
  EMXI_LOCKED(kv->ctx, save_kv(kv, seqs, n, path, progress, user));
}

static emx_status load_kv(emx_kv *kv, const char *path, int32_t *seqs, int32_t room, int32_t *n, emx_progress_fn progress,
                          void *user) {
  emxi_cache c = {.kind = EMX_CACHE_KV,
                  .ctx = kv->ctx,
                  .kv = &kv,
                  .layers = 1,
                  .n_seqs = room,
                  .seqs = seqs,
                  .progress = progress,
                  .user = user};
  EMX_TRY(emxi_cache_load(&c, path));
  *n = c.n_seqs;
  return EMX_OK;
}
emx_status emx_kv_load(emx_kv *kv, const char *path, int32_t *seqs, int32_t room, int32_t *n, emx_progress_fn progress,
                       void *user) {
  EMX_TRY(check_kv(kv, seqs, room, path, "emx_kv_load"));
  if (!n) return emxi_fail(EMX_ERR_INVALID, "emx_kv_load: n is NULL");
  EMXI_LOCKED(kv->ctx, load_kv(kv, path, seqs, room, n, progress, user));
}
