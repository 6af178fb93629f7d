/* SPDX-License-Identifier: Apache-2.0
 * safetensors: 8 bytes of header length (little-endian), a JSON header, the tensors' bytes back to back. Nothing of the header is
 * believed before it has been checked against the size of the file. */
#define _GNU_SOURCE
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
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

/* ---- files */

char *emxi_path_join(const char *folder, const char *name) {
  size_t n = strlen(folder), size = n + strlen(name) + 2;
  char *path = emxi_alloc(size);
  if (path) snprintf(path, size, "%s%s%s", folder, n && folder[n - 1] == '/' ? "" : "/", name);
  return path;
}

/* A regular file for reading; O_NONBLOCK so that a FIFO cannot hang the caller. */
static emx_status open_file(const char *path, int *out, size_t *size) {
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return emxi_fail(EMX_ERR_IO, "%s: %s", path, strerror(errno));
  struct stat st;
  emx_status status = EMX_OK;
  if (fstat(fd, &st))
    status = emxi_fail(EMX_ERR_IO, "%s: %s", path, strerror(errno));
  else if (S_ISDIR(st.st_mode))
    status = emxi_fail(EMX_ERR_IO, "%s: is a directory", path);
  else if (!S_ISREG(st.st_mode))
    status = emxi_fail(EMX_ERR_IO, "%s: not a regular file", path);
  if (status) {
    close(fd);
    return status;
  }
  *out = fd;
  *size = (size_t)st.st_size;
  return EMX_OK;
}

emx_status emxi_file_read(const char *path, size_t max, char **data, size_t *size) {
  int fd;
  size_t n, done = 0;
  EMX_TRY(open_file(path, &fd, &n));
  emx_status status = EMX_OK;
  char *text = NULL;
  if (n > max)
    status = emxi_fail(EMX_ERR_FORMAT, "%s: %zu bytes, at most %zu are expected", path, n, max);
  else if (!(text = emxi_alloc(n)))
    status = emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", path, n);
  while (!status && done < n) {
    ssize_t got = read(fd, text + done, n - done);
    if (got > 0)
      done += (size_t)got;
    else if (!got)
      status = emxi_fail(EMX_ERR_IO, "%s: ends after %zu of %zu bytes", path, done, n);
    else if (errno != EINTR)
      status = emxi_fail(EMX_ERR_IO, "%s: %s", path, strerror(errno));
  }
  close(fd);
  if (status) {
    emxi_free(text);
    return status;
  }
  *data = text;
  *size = n;
  return EMX_OK;
}

static int write_all(int fd, const char *data, size_t size) {
  while (size) {
    ssize_t n = write(fd, data, size < ((size_t)1 << 30) ? size : (size_t)1 << 30);
    if (n < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    data += n;
    size -= (size_t)n;
  }
  return 0;
}

/* What a rename onto `path` may replace: nothing, or a regular file. A link is followed, so that it stays a link; a device, a pipe or a
 * folder is left alone. *target is the caller's to free. */
static emx_status replaceable(const char *path, char **target) {
  struct stat st;
  if (lstat(path, &st)) {
    if (errno != ENOENT) return emxi_fail(EMX_ERR_IO, "%s: %s", path, strerror(errno));
  } else if (S_ISLNK(st.st_mode)) {
    *target = realpath(path, NULL);
    if (!*target) return emxi_fail(EMX_ERR_IO, "%s: a link to nothing that could be written: %s", path, strerror(errno));
    if (!stat(*target, &st) && S_ISREG(st.st_mode)) return EMX_OK;
    free(*target);
    return emxi_fail(EMX_ERR_IO, "%s: a link to something that is no regular file; it is left alone", path);
  } else if (!S_ISREG(st.st_mode)) {
    return emxi_fail(EMX_ERR_IO, "%s: no regular file; it is left alone", path);
  }
  *target = strdup(path);
  return *target ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "%s: no memory for a path", path);
}

static emx_status replace(const char *path, const emxi_bytes *spans, int64_t n) {
  static atomic_uint serial; /* two threads of this process may save at the same time */
  size_t size = strlen(path) + 64;
  char *temporary = emxi_alloc(size);
  if (!temporary) return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", path, size);
  int fd = -1;
  /* Names left behind by a crashed process with our id, or planted by somebody, are stepped over, never written through. */
  for (int attempt = 0; attempt < 100 && fd < 0 && (!attempt || errno == EEXIST); attempt++) {
    snprintf(temporary, size, "%s.%ld-%u.tmp", path, (long)getpid(), atomic_fetch_add(&serial, 1));
    fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0666);
  }
  if (fd < 0) {
    emx_status status = emxi_fail(EMX_ERR_IO, "%s: %s", temporary, strerror(errno));
    emxi_free(temporary);
    return status;
  }
  int error = 0;
  for (int64_t i = 0; i < n && !error; i++) error = write_all(fd, spans[i].data, spans[i].size);
  if (!error && fsync(fd)) error = errno;
  if (close(fd) && !error) error = errno;
  if (!error && rename(temporary, path)) error = errno;
  emx_status status = EMX_OK;
  if (error) {
    unlink(temporary);
    status = emxi_fail(EMX_ERR_IO, "%s: %s; nothing was changed", path, strerror(error));
  } else { /* The new name survives a power cut where the file system can promise that; the file itself is in place either way. */
    char *slash = strrchr(temporary, '/');
    if (slash) slash[slash == temporary] = 0;
    fd = open(slash ? temporary : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
      fsync(fd);
      close(fd);
    }
  }
  emxi_free(temporary);
  return status;
}

emx_status emxi_file_replace(const char *path, const emxi_bytes *spans, int64_t n) {
  char *target = NULL;
  EMX_TRY(replaceable(path, &target));
  emx_status status = replace(target, spans, n);
  free(target);
  return status;
}

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
  e->tensor = emx_tensor_view((void *)(data + b), dtypes[d].dtype, (int32_t)ndim, dims);
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

static emx_status parse(const char *who, const char *data, size_t size, emx_checkpoint *ck) {
  if (size < 8) return emxi_fail(EMX_ERR_FORMAT, "%s: %zu bytes: too short for a safetensors file", who, size);
  uint64_t header_size;
  memcpy(&header_size, data, 8);
  if (header_size > HEADER_MAX)
    return emxi_fail(EMX_ERR_FORMAT, "%s: a header of %llu bytes, at most %llu are allowed: not a safetensors file?", who,
                     (unsigned long long)header_size, (unsigned long long)HEADER_MAX);
  if (header_size > size - 8)
    return emxi_fail(EMX_ERR_FORMAT, "%s: a header of %llu bytes in a file of %zu: truncated?", who,
                     (unsigned long long)header_size, size);
  if (!header_size || data[8] != '{') return emxi_fail(EMX_ERR_FORMAT, "%s: the header does not start with '{'", who);
  json_error_t e;
  ck->header = json_loadb(data + 8, (size_t)header_size, JSON_REJECT_DUPLICATES, &e);
  if (!ck->header) {
    char text[96];
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
  const uint64_t data_size = size - 8 - header_size;
  json_object_foreach(ck->header, key, v) {
    if (!strcmp(key, METADATA)) continue;
    entry *t = &ck->entries[ck->count];
    t->name = key;
    t->order = ck->count;
    EMX_TRY(parse_tensor(who, v, data + 8 + header_size, data_size, t));
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

static emx_status open_bytes(const char *who, void *map, const void *data, size_t size, emx_checkpoint **out) {
  emx_checkpoint *ck = emxi_calloc(sizeof *ck);
  emx_status status;
  if (!ck) {
    if (map) munmap(map, size);
    return emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", who, sizeof *ck);
  }
  ck->map = map;
  ck->map_size = size;
  status = parse(who, data, size, ck);
  if (status)
    emx_checkpoint_close(ck);
  else
    *out = ck;
  return status;
}

emx_status emx_checkpoint_open(const char *path, emx_checkpoint **out) {
  if (!path || !out) return emxi_fail(EMX_ERR_INVALID, "emx_checkpoint_open: %s is NULL", path ? "out" : "path");
  int fd;
  size_t size;
  EMX_TRY(open_file(path, &fd, &size));
  if (!size) {
    close(fd);
    return emxi_fail(EMX_ERR_FORMAT, "%s: empty file", path);
  }
  void *map = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
  int error = errno;
  close(fd);
  if (map == MAP_FAILED) return emxi_fail(EMX_ERR_IO, "%s: cannot map %zu bytes: %s", path, size, strerror(error));
  return open_bytes(path, map, map, size, out);
}

emx_status emx_checkpoint_open_memory(const void *data, size_t size, emx_checkpoint **out) {
  if ((!data && size) || !out) return emxi_fail(EMX_ERR_INVALID, "emx_checkpoint_open_memory: %s is NULL", out ? "data" : "out");
  return open_bytes("safetensors", NULL, data, size, out);
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
  if (!empty && !x->data) return emxi_fail(EMX_ERR_INVALID, "%s: tensor %s has no data", path, t->name);
  *dtype = dtypes[d].name;
  return EMX_OK;
}

/* Fills the header object and, behind spans[0..1], one span a tensor. Wide dtypes come first: without holes, which the format
 * does not have, that is what aligns every tensor to its dtype. */
static emx_status layout(const char *path, const emx_named_tensor *tensors, int64_t n, json_t *header, emxi_bytes *spans) {
  size_t at = 0;
  int64_t used = 0;
  for (size_t width = 8; width >= 2; width /= 2)
    for (int64_t i = 0; i < n; i++) {
      const emx_named_tensor *t = &tensors[i];
      size_t bytes = 0, end;
      const char *dtype = NULL;
      EMX_TRY(check_named(path, t, i, &bytes, &dtype));
      if (emx_dtype_size(t->tensor.dtype) != width) continue;
      if (!emxi_add(at, bytes, &end) || end > PTRDIFF_MAX) return emxi_fail(EMX_ERR_SHAPE, "%s: too many bytes", path);
      if (json_object_get(header, t->name)) return emxi_fail(EMX_ERR_INVALID, "%s: two tensors are named %s", path, t->name);
      json_t *shape = json_array();
      int bad = 0;
      for (int d = 0; d < t->tensor.ndim; d++) bad |= json_array_append_new(shape, json_integer(t->tensor.shape[d]));
      json_t *v =
          json_pack("{s:s, s:o, s:[I,I]}", "dtype", dtype, "shape", shape, "data_offsets", (json_int_t)at, (json_int_t)end);
      if (bad || json_object_set_new(header, t->name, v))
        return emxi_fail(EMX_ERR_INVALID, "%s: the name of tensor %lld is not UTF-8, or no memory", path, (long long)i);
      spans[2 + used++] = (emxi_bytes){t->tensor.data, bytes};
      at = end;
    }
  return EMX_OK;
}

emx_status emx_checkpoint_write(const char *path, const emx_named_tensor *tensors, int64_t n, const char *const *metadata,
                                int64_t n_metadata) {
  if (!path || (n && !tensors) || n < 0 || (n_metadata && !metadata) || n_metadata < 0)
    return emxi_fail(EMX_ERR_INVALID, "emx_checkpoint_write: a NULL argument or a negative count");
  size_t bytes;
  if (!emxi_mul((size_t)n + 2, sizeof(emxi_bytes), &bytes)) return emxi_fail(EMX_ERR_INVALID, "%s: too many tensors", path);
  json_t *header = json_object(), *strings = json_object();
  emxi_bytes *spans = emxi_calloc(bytes);
  char *text = NULL, *padded = NULL;
  emx_status status = header && strings && spans ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "%s: no memory for its header", path);
  for (int64_t i = 0; i < n_metadata && !status; i++) {
    const char *key = metadata[2 * i], *value = metadata[2 * i + 1];
    if (!key || !value || json_object_get(strings, key) || json_object_set_new(strings, key, json_string(value)))
      status = emxi_fail(EMX_ERR_INVALID, "%s: metadata pair %lld is NULL, not UTF-8 or repeats a key", path, (long long)i);
  }
  if (!status && n_metadata && json_object_set(header, METADATA, strings))
    status = emxi_fail(EMX_ERR_NOMEM, "%s: no memory for its header", path);
  if (!status) status = layout(path, tensors, n, header, spans);
  if (!status && !(text = json_dumps(header, JSON_COMPACT)))
    status = emxi_fail(EMX_ERR_NOMEM, "%s: no memory for its header", path);
  if (!status) { /* spaces up to the next multiple of 64 bytes, where the data starts */
    size_t length = strlen(text);
    uint64_t header_size = (8 + length + EMXI_ALIGN - 1) / EMXI_ALIGN * EMXI_ALIGN - 8;
    if (header_size > HEADER_MAX)
      status = emxi_fail(EMX_ERR_INVALID, "%s: a header of %llu bytes is more than readers accept", path,
                         (unsigned long long)header_size);
    else if (!(padded = emxi_alloc((size_t)header_size)))
      status = emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %llu bytes", path, (unsigned long long)header_size);
    else {
      memcpy(padded, text, length);
      memset(padded + length, ' ', (size_t)header_size - length);
      spans[0] = (emxi_bytes){&header_size, sizeof header_size};
      spans[1] = (emxi_bytes){padded, (size_t)header_size};
      status = emxi_file_replace(path, spans, n + 2);
    }
  }
  emxi_free(padded);
  free(text);
  emxi_free(spans);
  json_decref(strings);
  json_decref(header);
  return status;
}
