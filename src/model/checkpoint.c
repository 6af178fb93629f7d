/* SPDX-License-Identifier: Apache-2.0
 * safetensors: 8 bytes of header length (little-endian), a JSON header, the tensors' bytes back to back. Nothing of the header is
 * believed before it has been checked against the size of the file. */
#define _GNU_SOURCE
#include "model.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "tensors are read in place: the format and this code are little-endian"
#endif

#define HEADER_MAX ((uint64_t)100 << 20)
#define METADATA "__metadata__"

static const struct {
  const char *name;
  int32_t dtype;
} dtypes[] = {{"F32", EMX_F32}, {"F16", EMX_F16}, {"BF16", EMX_BF16}, {"F64", EMX_F64}, {"I32", EMX_I32}};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

/* ---- reading */

typedef struct entry {
  const char *name; /* lives in the parsed header */
  emx_tensor tensor;
  uint64_t begin, end;
  int64_t order; /* in the header */
} entry;

typedef struct index_entry {
  const char *name;
  int64_t i;
} index_entry;

struct emx_checkpoint {
  void *map; /* NULL: borrowed memory */
  size_t map_size;
  json_t *header;
  entry *entries;     /* [count], file order */
  index_entry *index; /* [count], by name */
  int64_t count;
};

/* jansson 2.14 writes past its token buffer when it cannot grow it. So memory for what a header of this size usually becomes is
 * asked for first, and given back: a process that is short of memory gets its error here. */
json_t *emxi_json_parse(const char *text, size_t size, json_error_t *e) {
  enum { MOST = 1 << 22, EACH = 64 };
  void *probe = emxi_alloc((size < MOST ? size : MOST) * EACH);
  *e = (json_error_t){.line = -1};
  if (!probe) return NULL;
  emxi_free(probe);
  return json_loadb(text, size, JSON_REJECT_DUPLICATES, e);
}
bool emxi_json_nomem(const json_error_t *e) { return !e->text[0] || json_error_code(e) == json_error_out_of_memory; }

/* Not json_dumps: where that has no memory for a key, it leaves the key out and says that all went well (jansson 2.14). */
char *emxi_json_text(const json_t *value, size_t flags) {
  const size_t size = json_dumpb(value, NULL, 0, flags);
  char *text = size ? emxi_alloc(size + 1) : NULL;
  if (!text) return NULL;
  if (json_dumpb(value, text, size, flags) != size) {
    emxi_free(text);
    return NULL;
  }
  text[size] = 0;
  return text;
}

/* Names in messages: whatever a file says, no control characters reach a terminal. */
static const char *plain(const char *name, char out[96]) {
  size_t i = 0;
  for (; name[i] && i < 95; i++) out[i] = (unsigned char)name[i] < 32 || name[i] == 127 ? '?' : name[i];
  out[i] = 0;
  return out;
}

static emx_status parse_tensor(const char *who, json_t *v, const char *data, uint64_t data_size, entry *e) {
  char name[96];
  plain(e->name, name);
  if (!json_is_object(v)) return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s: not an object", who, name);
  const char *dtype = json_string_value(json_object_get(v, "dtype"));
  if (!dtype) return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s: dtype is missing or not a string", who, name);
  int d = 0;
  while (d < DTYPES && strcmp(dtype, dtypes[d].name)) d++;
  char text[96];
  if (d == DTYPES)
    return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s: dtype %s, expected F32, F16, BF16, F64 or I32", who, name,
                     plain(dtype, text));
  json_t *shape = json_object_get(v, "shape"), *offsets = json_object_get(v, "data_offsets");
  if (!json_is_array(shape)) return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s: shape is missing or not an array", who, name);
  size_t ndim = json_array_size(shape), bytes = emx_dtype_size(dtypes[d].dtype);
  if (ndim > EMX_MAX_DIMS)
    return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s: %zu dimensions, at most %d are possible", who, name, ndim, EMX_MAX_DIMS);
  int64_t dims[EMX_MAX_DIMS];
  size_t extent = bytes; /* empty dimensions left out: strides must not overflow either */
  for (size_t i = 0; i < ndim; i++) {
    json_t *n = json_array_get(shape, i);
    if (!json_is_integer(n) || json_integer_value(n) < 0)
      return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s: dimension %zu is not a non-negative integer", who, name, i);
    dims[i] = json_integer_value(n);
    if (!emxi_mul(extent, dims[i] ? (size_t)dims[i] : 1, &extent) || extent > PTRDIFF_MAX)
      return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s: its shape overflows", who, name);
    if (!dims[i]) bytes = 0;
  }
  if (bytes) bytes = extent;
  json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
  if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end))
    return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s: data_offsets is not a pair of integers", who, name);
  long long b = json_integer_value(begin), f = json_integer_value(end);
  if (b < 0 || f < b || (uint64_t)f > data_size)
    return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s: bytes %lld..%lld are outside of the %llu bytes of data", who, name, b, f,
                     (unsigned long long)data_size);
  if ((uint64_t)(f - b) != bytes)
    return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s: %lld bytes, dtype and shape need %zu", who, name, f - b, bytes);
  e->begin = (uint64_t)b;
  e->end = (uint64_t)f;
  e->tensor = emx_tensor_view(data ? (void *)(data + b) : NULL, dtypes[d].dtype, (int32_t)ndim, dims);
  return EMX_OK;
}

static int by_place(const void *a, const void *b) {
  const entry *x = a, *y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  if (x->end != y->end) return x->end < y->end ? -1 : 1; /* an empty tensor comes before the one that starts there */
  return (x->order > y->order) - (x->order < y->order);
}

static int by_name(const void *a, const void *b) {
  return strcmp(((const index_entry *)a)->name, ((const index_entry *)b)->name);
}

/* Length of the header, from the first 8 bytes of a file of `size`. */
static emx_status header_length(const char *who, const char first[8], uint64_t size, uint64_t *out) {
  uint64_t header_size = 0;
  memcpy(&header_size, first, 8);
  if (header_size > HEADER_MAX)
    return emxi_fail(EMX_ERR_FORMAT, "%s: a header of %llu bytes, at most %llu are allowed: not a safetensors file?", who,
                     (unsigned long long)header_size, (unsigned long long)HEADER_MAX);
  if (header_size > size - 8)
    return emxi_fail(EMX_ERR_FORMAT, "%s: a header of %llu bytes in a file of %llu: truncated?", who,
                     (unsigned long long)header_size, (unsigned long long)size);
  *out = header_size;
  return EMX_OK;
}

/* data may be NULL: tensors without data, for a file that is streamed. */
static emx_status parse(const char *who, const char *header, uint64_t header_size, const char *data, uint64_t data_size,
                        emx_checkpoint *ck) {
  if (!header_size || header[0] != '{') return emxi_fail(EMX_ERR_FORMAT, "%s: the header does not start with '{'", who);
  json_error_t e;
  ck->header = emxi_json_parse(header, (size_t)header_size, &e);
  if (!ck->header) {
    char text[96];
    if (emxi_json_nomem(&e)) return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for its header", who);
    return emxi_fail(EMX_ERR_FORMAT, "%s: header, byte %d: %s", who, e.position, plain(e.text, text));
  }
  json_t *metadata = json_object_get(ck->header, METADATA), *v;
  const char *key;
  if (metadata && !json_is_object(metadata)) return emxi_fail(EMX_ERR_FORMAT, "%s: " METADATA " is not an object", who);
  json_object_foreach(metadata, key, v) {
    char text[96];
    if (!json_is_string(v)) return emxi_fail(EMX_ERR_FORMAT, "%s: " METADATA " %s is not a string", who, plain(key, text));
  }
  size_t n = json_object_size(ck->header) - (metadata ? 1 : 0);
  ck->entries = emxi_calloc(n * sizeof *ck->entries);
  ck->index = emxi_calloc(n * sizeof *ck->index);
  if (!ck->entries || !ck->index)
    return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", who, n * (sizeof *ck->entries + sizeof *ck->index));
  json_object_foreach(ck->header, key, v) {
    if (!strcmp(key, METADATA)) continue;
    entry *t = &ck->entries[ck->count];
    t->name = key;
    t->order = ck->count;
    EMX_TRY(parse_tensor(who, v, data, data_size, t));
    ck->count++;
  }
  qsort(ck->entries, n, sizeof *ck->entries, by_place);
  uint64_t at = 0;
  for (size_t i = 0; i < n; i++) {
    const entry *t = &ck->entries[i];
    char name[96];
    if (t->begin != at)
      return emxi_fail(EMX_ERR_FORMAT, "%s: tensor %s starts at byte %llu of the data, %s %llu", who, plain(t->name, name),
                       (unsigned long long)t->begin, t->begin < at ? "inside of the tensor that ends at" : "after a hole from",
                       (unsigned long long)at);
    at = t->end;
    ck->index[i] = (index_entry){t->name, (int64_t)i};
  }
  if (at != data_size)
    return emxi_fail(EMX_ERR_FORMAT, "%s: %llu bytes after the last tensor", who, (unsigned long long)(data_size - at));
  qsort(ck->index, n, sizeof *ck->index, by_name);
  return EMX_OK;
}

static emx_status open_parts(const char *who, const char *header, uint64_t header_size, const char *data, uint64_t data_size,
                             emx_checkpoint **out) {
  emx_checkpoint *ck = emxi_calloc(sizeof *ck);
  if (!ck) return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", who, sizeof *ck);
  emx_status status = parse(who, header, header_size, data, data_size, ck);
  if (status)
    emx_checkpoint_close(ck);
  else
    *out = ck;
  return status;
}

static emx_status open_bytes(const char *who, const char *data, size_t size, emx_checkpoint **out) {
  uint64_t header_size = 0;
  if (size < 8) return emxi_fail(EMX_ERR_FORMAT, "%s: %zu bytes: too short for a safetensors file", who, size);
  EMX_TRY(header_length(who, data, size, &header_size));
  return open_parts(who, data + 8, header_size, data + 8 + header_size, size - 8 - header_size, out);
}

emx_status emxi_checkpoint_header(emxi_source *source, emx_checkpoint **out) {
  char first[8], *header;
  uint64_t header_size = 0;
  if (source->left < 8)
    return emxi_fail(EMX_ERR_FORMAT, "%s: %llu bytes: too short for a safetensors file", source->path,
                     (unsigned long long)source->left);
  const uint64_t size = source->left;
  EMX_TRY(emxi_source_get(source, first, 8));
  EMX_TRY(header_length(source->path, first, size, &header_size));
  if (!(header = emxi_alloc((size_t)header_size)))
    return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %llu bytes", source->path, (unsigned long long)header_size);
  emx_status status = emxi_source_get(source, header, (size_t)header_size);
  if (!status) status = open_parts(source->path, header, header_size, NULL, source->left, out);
  emxi_free(header);
  return status;
}

emx_status emx_checkpoint_open(const char *path, emx_checkpoint **out) {
  if (!path || !out) return emxi_fail(EMX_ERR_INVALID, "emx_checkpoint_open: %s is NULL", path ? "out" : "path");
  int fd;
  size_t size;
  EMX_TRY(emxi_file_open(path, &fd, &size));
  if (!size) {
    close(fd);
    return emxi_fail(EMX_ERR_FORMAT, "%s: empty file", path);
  }
  void *map = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
  int error = errno;
  close(fd);
  if (map == MAP_FAILED)
    return emxi_fail(error == ENOMEM ? EMX_ERR_NOMEM : EMX_ERR_IO, "%s: cannot map %zu bytes: %s", path, size, strerror(error));
  emx_checkpoint *ck = NULL;
  emx_status status = open_bytes(path, map, size, &ck);
  if (status) {
    munmap(map, size);
    return status;
  }
  ck->map = map;
  ck->map_size = size;
  *out = ck;
  return EMX_OK;
}

emx_status emx_checkpoint_open_memory(const void *data, size_t size, emx_checkpoint **out) {
  if ((!data && size) || !out) return emxi_fail(EMX_ERR_INVALID, "emx_checkpoint_open_memory: %s is NULL", out ? "data" : "out");
  return open_bytes("safetensors", data, size, out);
}

void emx_checkpoint_close(emx_checkpoint *ck) {
  if (!ck) return;
  if (ck->map) munmap(ck->map, ck->map_size);
  json_decref(ck->header);
  emxi_free(ck->entries);
  emxi_free(ck->index);
  emxi_free(ck);
}

int64_t emx_checkpoint_count(const emx_checkpoint *ck) { return ck ? ck->count : 0; }

emx_status emx_checkpoint_get(const emx_checkpoint *ck, int64_t i, const char **name, emx_tensor *tensor) {
  if (!ck || i < 0 || i >= ck->count)
    return emxi_fail(EMX_ERR_INVALID, "emx_checkpoint_get: no tensor %lld of %lld", (long long)i,
                     (long long)emx_checkpoint_count(ck));
  if (name) *name = ck->entries[i].name;
  if (tensor) *tensor = ck->entries[i].tensor;
  return EMX_OK;
}

int64_t emxi_checkpoint_index(const emx_checkpoint *ck, const char *name) {
  index_entry key = {.name = name};
  const index_entry *found = ck->count ? bsearch(&key, ck->index, (size_t)ck->count, sizeof key, by_name) : NULL;
  return found ? found->i : -1;
}

emx_status emx_checkpoint_find(const emx_checkpoint *ck, const char *name, emx_tensor *tensor) {
  if (!ck || !name || !tensor)
    return emxi_fail(EMX_ERR_INVALID, "emx_checkpoint_find: %s is NULL", !ck ? "ck" : !name ? "name" : "tensor");
  int64_t i = emxi_checkpoint_index(ck, name);
  if (i < 0) return emxi_fail(EMX_ERR_INVALID, "emx_checkpoint_find: no tensor named %.200s", name);
  *tensor = ck->entries[i].tensor;
  return EMX_OK;
}

const char *emx_checkpoint_metadata(const emx_checkpoint *ck, const char *key) {
  return ck && key ? json_string_value(json_object_get(json_object_get(ck->header, METADATA), key)) : NULL;
}

/* ---- writing */

static emx_status check_named(const char *path, const emx_named_tensor *t, int64_t i, size_t *bytes, const char **dtype) {
  if (!t->name) return emxi_fail(EMX_ERR_INVALID, "%s: tensor %lld has no name", path, (long long)i);
  if (!strcmp(t->name, METADATA)) return emxi_fail(EMX_ERR_INVALID, "%s: no tensor can be named " METADATA, path);
  const emx_tensor *x = &t->tensor;
  int d = 0;
  while (d < DTYPES && dtypes[d].dtype != x->dtype) d++;
  if (d == DTYPES)
    return emxi_fail(EMX_ERR_DTYPE, "%s: tensor %s has dtype %d, expected f32, f16, bf16, f64 or i32", path, t->name, x->dtype);
  if (x->ndim < 0 || x->ndim > EMX_MAX_DIMS || x->device != EMX_DEVICE_CPU)
    return emxi_fail(EMX_ERR_SHAPE, "%s: tensor %s has %d dimensions on device kind %d; at most %d on the CPU", path, t->name,
                     x->ndim, x->device, EMX_MAX_DIMS);
  size_t n = emx_dtype_size(x->dtype);
  bool empty = false;
  for (int k = x->ndim - 1; k >= 0; k--) {
    if (x->shape[k] < 0) return emxi_fail(EMX_ERR_SHAPE, "%s: tensor %s has a negative shape", path, t->name);
    if (x->shape[k] > 1 && (size_t)x->stride[k] != n / emx_dtype_size(x->dtype))
      return emxi_fail(EMX_ERR_SHAPE, "%s: tensor %s is not C-contiguous", path, t->name);
    if (!x->shape[k]) empty = true;
    if (!emxi_mul(n, x->shape[k] ? (size_t)x->shape[k] : 1, &n) || n > PTRDIFF_MAX)
      return emxi_fail(EMX_ERR_SHAPE, "%s: tensor %s is too large", path, t->name);
  }
  *bytes = empty ? 0 : n;
  *dtype = dtypes[d].name;
  return EMX_OK;
}

/* Order of writing: wide dtypes first, which aligns every tensor to its dtype without the holes that the format does not have. */
static void by_width(const emx_named_tensor *tensors, int64_t n, emx_named_tensor *out) {
  int64_t used = 0;
  for (size_t width = 8; width; width /= 2)
    for (int64_t i = 0; i < n; i++) {
      const size_t size = emx_dtype_size(tensors[i].tensor.dtype);
      if (size == width || (width == 1 && !size)) out[used++] = tensors[i]; /* an unknown dtype is refused later */
    }
}

/* Names and extents into the header object, one after the other. */
static emx_status describe(const char *path, const emx_named_tensor *tensors, int64_t n, json_t *header) {
  size_t at = 0;
  for (int64_t i = 0; i < n; i++) {
    const emx_named_tensor *t = &tensors[i];
    size_t bytes = 0, end;
    const char *dtype = NULL;
    EMX_TRY(check_named(path, t, i, &bytes, &dtype));
    if (!emxi_add(at, bytes, &end) || end > PTRDIFF_MAX) return emxi_fail(EMX_ERR_SHAPE, "%s: too many bytes", path);
    if (json_object_get(header, t->name)) return emxi_fail(EMX_ERR_INVALID, "%s: two tensors are named %s", path, t->name);
    json_t *shape = json_array();
    int bad = 0;
    for (int d = 0; d < t->tensor.ndim; d++) bad |= json_array_append_new(shape, json_integer(t->tensor.shape[d]));
    json_t *v =
        bad ? (json_decref(shape), NULL)
            : json_pack("{s:s, s:o, s:[I,I]}", "dtype", dtype, "shape", shape, "data_offsets", (json_int_t)at, (json_int_t)end);
    if (json_object_set_new(header, t->name, v)) return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for its header", path);
    at = end;
  }
  return EMX_OK;
}

/* Well-formed UTF-8 (Unicode 15, table 3-7), which is what JSON strings are made of. */
static bool is_utf8(const char *text) {
  for (const unsigned char *s = (const unsigned char *)text; *s;) {
    const unsigned char c = *s++,
                        low = c == 0xe0   ? 0xa0
                              : c == 0xf0 ? 0x90
                                          : 0x80,
                        high = c == 0xed   ? 0x9f
                               : c == 0xf4 ? 0x8f
                                           : 0xbf;
    const int more = c < 0x80 ? 0 : c >= 0xc2 && c <= 0xdf ? 1 : c >= 0xe0 && c <= 0xef ? 2 : c >= 0xf0 && c <= 0xf4 ? 3 : -1;
    if (more < 0 || (more && (*s < low || *s > high))) return false;
    for (int i = 0; i < more; i++)
      if ((*s++ & 0xc0) != 0x80) return false;
  }
  return true;
}

emx_status emxi_checkpoint_head(const char *path, const emx_named_tensor *tensors, int64_t n, const char *const *metadata,
                                int64_t n_metadata, char **out, size_t *size) {
  for (int64_t i = 0; i < n; i++)
    if (tensors[i].name && !is_utf8(tensors[i].name))
      return emxi_fail(EMX_ERR_INVALID, "%s: the name of tensor %lld is not UTF-8", path, (long long)i);
  json_t *header = json_object(), *strings = json_object();
  char *text = NULL;
  emx_status status = header && strings ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "%s: no memory for its header", path);
  for (int64_t i = 0; i < n_metadata && !status; i++) {
    const char *key = metadata[2 * i], *value = metadata[2 * i + 1];
    if (!key || !value || !is_utf8(key) || !is_utf8(value) || json_object_get(strings, key))
      status = emxi_fail(EMX_ERR_INVALID, "%s: metadata pair %lld is NULL, not UTF-8 or repeats a key", path, (long long)i);
    else if (json_object_set_new(strings, key, json_string(value)))
      status = emxi_fail(EMX_ERR_NOMEM, "%s: no memory for its header", path);
  }
  if (!status && n_metadata && json_object_set(header, METADATA, strings))
    status = emxi_fail(EMX_ERR_NOMEM, "%s: no memory for its header", path);
  if (!status) status = describe(path, tensors, n, header);
  if (!status && !(text = emxi_json_text(header, JSON_COMPACT)))
    status = emxi_fail(EMX_ERR_NOMEM, "%s: no memory for its header", path);
  json_decref(strings);
  json_decref(header);
  if (status) return status;
  /* spaces up to the next multiple of 64 bytes, where the data starts */
  const size_t length = strlen(text), total = (8 + length + EMXI_ALIGN - 1) / EMXI_ALIGN * EMXI_ALIGN;
  const uint64_t header_size = total - 8;
  char *head = NULL;
  if (header_size > HEADER_MAX)
    status = emxi_fail(EMX_ERR_INVALID, "%s: a header of %llu bytes is more than readers accept", path,
                       (unsigned long long)header_size);
  else if (!(head = emxi_alloc(total)))
    status = emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", path, total);
  else {
    memcpy(head, &header_size, 8);
    memcpy(head + 8, text, length);
    memset(head + 8 + length, ' ', total - 8 - length);
    *out = head;
    *size = total;
  }
  emxi_free(text);
  return status;
}

emx_status emx_checkpoint_write(const char *path, const emx_named_tensor *tensors, int64_t n, const char *const *metadata,
                                int64_t n_metadata) {
  if (!path || (n && !tensors) || n < 0 || (n_metadata && !metadata) || n_metadata < 0)
    return emxi_fail(EMX_ERR_INVALID, "emx_checkpoint_write: a NULL argument or a negative count");
  size_t each = sizeof(emxi_bytes) + sizeof(emx_named_tensor), bytes;
  if (!emxi_mul((size_t)n + 1, each, &bytes)) return emxi_fail(EMX_ERR_INVALID, "%s: too many tensors", path);
  emx_named_tensor *order = emxi_alloc(bytes);
  if (!order) return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", path, bytes);
  emxi_bytes *spans = (emxi_bytes *)(order + n);
  char *head = NULL;
  by_width(tensors, n, order);
  emx_status status = emxi_checkpoint_head(path, order, n, metadata, n_metadata, &head, &spans[0].size);
  spans[0].data = head;
  for (int64_t i = 0; i < n && !status; i++) {
    const emx_tensor *x = &order[i].tensor;
    size_t size = emx_dtype_size(x->dtype);
    for (int d = 0; d < x->ndim; d++) size *= (size_t)x->shape[d];
    if (size && !x->data) status = emxi_fail(EMX_ERR_INVALID, "%s: tensor %s has no data", path, order[i].name);
    spans[i + 1] = (emxi_bytes){x->data, size};
  }
  if (!status) status = emxi_file_replace(path, spans, n + 1);
  emxi_free(head);
  emxi_free(order);
  return status;
}
