/* SPDX-License-Identifier: Apache-2.0
 * Files: read whole or streamed, written to a temporary name and renamed. */
#define _GNU_SOURCE
#include "model.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

char *emxi_path_join(const char *folder, const char *name) {
  size_t n = strlen(folder), size = n + strlen(name) + 2;
  char *path = emxi_alloc(size);
  if (path) snprintf(path, size, "%s%s%s", folder, n && folder[n - 1] == '/' ? "" : "/", name);
  return path;
}

/* A regular file for reading; O_NONBLOCK so that a FIFO cannot hang the caller. */
emx_status emxi_file_open(const char *path, int *out, size_t *size) {
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

emx_status emxi_source_get(emxi_source *s, void *out, size_t size) {
  if (size > s->left) return emxi_fail(EMX_ERR_FORMAT, "%s: %zu bytes are missing at its end", s->path, size - (size_t)s->left);
  for (char *p = out; size;) {
    ssize_t n = read(s->fd, p, size < ((size_t)1 << 30) ? size : (size_t)1 << 30);
    if (n > 0) {
      if (s->hash) emxi_hash_add(s->hash, p, (size_t)n);
      p += n;
      size -= (size_t)n;
      s->left -= (uint64_t)n;
    } else if (!n)
      return emxi_fail(EMX_ERR_IO, "%s: became shorter while it was read", s->path);
    else if (errno != EINTR)
      return emxi_fail(EMX_ERR_IO, "%s: %s", s->path, strerror(errno));
  }
  return EMX_OK;
}

emx_status emxi_sink_put(emxi_sink *s, const void *data, size_t size) {
  for (const char *p = data; size;) {
    ssize_t n = write(s->fd, p, size < ((size_t)1 << 30) ? size : (size_t)1 << 30);
    if (n >= 0) {
      if (s->hash) emxi_hash_add(s->hash, p, (size_t)n);
      p += n;
      size -= (size_t)n;
    } else if (errno != EINTR)
      return emxi_fail(EMX_ERR_IO, "%s: %s; nothing was changed", s->path, strerror(errno));
  }
  return EMX_OK;
}

emx_status emxi_file_read(const char *path, size_t max, char **data, size_t *size) {
  int fd;
  size_t n;
  EMX_TRY(emxi_file_open(path, &fd, &n));
  emx_status status = EMX_OK;
  char *text = NULL;
  if (n > max)
    status = emxi_fail(EMX_ERR_FORMAT, "%s: %zu bytes, at most %zu are expected", path, n, max);
  else if (!(text = emxi_alloc(n)))
    status = emxi_fail(EMX_ERR_NOMEM, "%s: no memory for %zu bytes", path, n);
  if (!status) status = emxi_source_get(&(emxi_source){.path = path, .fd = fd, .left = n}, text, n);
  close(fd);
  if (status) {
    emxi_free(text);
    return status;
  }
  *data = text;
  *size = n;
  return EMX_OK;
}

/* What a rename onto `path` may replace: nothing, or a regular file. A link is followed, so that it stays a link; a device, a
 * pipe or a folder is left alone. *target is the caller's to free. */
static emx_status replaceable(const char *path, char **target) {
  struct stat st;
  if (lstat(path, &st)) {
    if (errno != ENOENT) return emxi_fail(EMX_ERR_IO, "%s: %s", path, strerror(errno));
  } else if (S_ISLNK(st.st_mode)) {
    *target = realpath(path, NULL);
    if (!*target)
      return emxi_fail(errno == ENOMEM ? EMX_ERR_NOMEM : EMX_ERR_IO, "%s: a link to nothing that could be written: %s", path,
                       strerror(errno));
    if (!stat(*target, &st) && S_ISREG(st.st_mode)) return EMX_OK;
    free(*target);
    return emxi_fail(EMX_ERR_IO, "%s: a link to something that is no regular file; it is left alone", path);
  } else if (!S_ISREG(st.st_mode)) {
    return emxi_fail(EMX_ERR_IO, "%s: no regular file; it is left alone", path);
  }
  *target = strdup(path);
  return *target ? EMX_OK : emxi_fail(EMX_ERR_NOMEM, "%s: no memory for a path", path);
}

static emx_status replace(const char *path, emxi_write_fn write_body, void *arg) {
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
  emxi_sink sink = {.path = path, .fd = fd};
  emx_status status = write_body(arg, &sink);
  int error = 0;
  if (!status && fsync(fd)) error = errno;
  if (close(fd) && !error) error = errno;
  if (!status && !error && rename(temporary, path)) error = errno;
  if (!status && error) status = emxi_fail(EMX_ERR_IO, "%s: %s; nothing was changed", path, strerror(error));
  if (status) {
    unlink(temporary);
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

emx_status emxi_file_write(const char *path, emxi_write_fn write_body, void *arg) {
  char *target = NULL;
  EMX_TRY(replaceable(path, &target));
  emx_status status = replace(target, write_body, arg);
  free(target);
  return status;
}

typedef struct span_list {
  const emxi_bytes *spans;
  int64_t n;
} span_list;
static emx_status write_spans(void *arg, emxi_sink *sink) {
  const span_list *list = arg;
  for (int64_t i = 0; i < list->n; i++) EMX_TRY(emxi_sink_put(sink, list->spans[i].data, list->spans[i].size));
  return EMX_OK;
}
emx_status emxi_file_replace(const char *path, const emxi_bytes *spans, int64_t n) {
  return emxi_file_write(path, write_spans, &(span_list){spans, n});
}
