/* SPDX-License-Identifier: Apache-2.0
 * K and V of a cache in a file (emx_kv_opts.file).
 *
 * The file is K [G,M,P,D], then V, so that neighbouring pages of a head come in one read. It has no name from the moment it
 * exists, so nobody else can open it and nothing is left of it when the process ends, however it ends. Rows go through pread and
 * pwrite, never through a mapping: what is slow or fails does so in a call that can say so. Reads are for the row that is wanted
 * alone (POSIX_FADV_RANDOM), and the kernel is told of rows that will be wanted next, which a device then fetches at the same
 * time.
 *
 * Workers cannot return a status in the middle of a kernel. The first fault is kept, rows that could not be read are zeros, and
 * the call throws its results away at the end. */
#define _GNU_SOURCE
#include "kv/kv.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { CLEAR = 0, CLAIMED = 1, KNOWN = 2 };
enum { BLOCK = 4096 }; /* bytes that a device reads at least */

emx_status emxi_kv_file_open(emx_kv *kv, const char *path, const char *who) {
  emxi_kv_file *f = kv->file;
  struct rlimit limit;
  memcpy(f->path, path, strlen(path) + 1);
  f->values = kv->bytes_kv / 2;
  f->pid = getpid();
  atomic_init(&f->fault, CLEAR);
  if (!getrlimit(RLIMIT_FSIZE, &limit) && limit.rlim_cur != RLIM_INFINITY && (uint64_t)kv->bytes_kv > limit.rlim_cur)
    return emxi_fail(EMX_ERR_IO, "%s: %s would have %lld bytes, this process may make files of %llu (RLIMIT_FSIZE)", who, path,
                     (long long)kv->bytes_kv, (unsigned long long)limit.rlim_cur);
  f->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (f->fd < 0)
    return emxi_fail(EMX_ERR_IO, "%s: %s cannot be made: %s%s", who, path, strerror(errno),
                     errno == EEXIST ? " (a cache makes its own file and never touches another)" : "");
  if (unlink(path) || ftruncate(f->fd, (off_t)kv->bytes_kv)) {
    const int failed = errno;
    close(f->fd);
    return emxi_fail(EMX_ERR_IO, "%s: %s cannot hold a cache of %lld bytes: %s", who, path, (long long)kv->bytes_kv,
                     strerror(failed));
  }
  (void)posix_fadvise(f->fd, 0, 0, POSIX_FADV_RANDOM);
  return EMX_OK;
}

void emxi_kv_file_close(emx_kv *kv) {
  if (kv->file) close(kv->file->fd);
}

emx_status emxi_kv_file_begin(const emx_kv *kv, const char *who) {
  if (!kv->file) return EMX_OK;
  if (kv->file->pid != getpid())
    return emxi_fail(EMX_ERR_STATE, "%s: the cache's file belongs to process %ld; a forked process needs a cache of its own", who,
                     (long)kv->file->pid);
  atomic_store(&kv->file->fault, CLEAR);
  return EMX_OK;
}

emx_status emxi_kv_file_end(const emx_kv *kv, const char *who) {
  const emxi_kv_file *f = kv->file;
  if (!f || atomic_load(&f->fault) == CLEAR) return EMX_OK;
  return emxi_fail(EMX_ERR_IO, "%s: %s: %zu bytes at offset %lld could not be %s: %s", who, f->path, f->fault_bytes,
                   (long long)f->fault_at, f->fault_write ? "written" : "read",
                   f->fault_errno ? strerror(f->fault_errno) : "the file is shorter than it was made");
}

static void keep_fault(emxi_kv_file *f, int error, bool writing, off_t at, size_t bytes) {
  int32_t clear = CLEAR;
  if (!atomic_compare_exchange_strong(&f->fault, &clear, CLAIMED)) return;
  f->fault_errno = error;
  f->fault_write = writing;
  f->fault_at = at;
  f->fault_bytes = bytes;
  atomic_store(&f->fault, KNOWN);
}

static void transfer(emxi_kv_file *f, bool writing, char *data, size_t bytes, off_t at) {
  size_t done = 0;
  int error = 0;
  bool good = atomic_load_explicit(&f->fault, memory_order_relaxed) == CLEAR;
  while (good && done < bytes) {
    const ssize_t n = writing ? pwrite(f->fd, data + done, bytes - done, at + (off_t)done)
                              : pread(f->fd, data + done, bytes - done, at + (off_t)done);
    if (n > 0)
      done += (size_t)n;
    else if (n == 0 || errno != EINTR) {
      error = n ? errno : writing ? ENOSPC : 0;
      good = false;
      keep_fault(f, error, writing, at, bytes);
    }
  }
  if (!good && !writing) memset(data, 0, bytes);
}

static off_t offset_of(const emx_kv *kv, bool values, int64_t element) {
  return (off_t)((values ? kv->file->values : 0) + element * (int64_t)emx_dtype_size(kv->dtype));
}
static int64_t element_of(const emx_kv *kv, int32_t page, int32_t head, int64_t token) {
  return page * kv->k_page + head * kv->k_head + token * kv->k_token;
}

const char *emxi_kv_file_read(const emx_kv *kv, bool values, int32_t page, int32_t head, int64_t token, int64_t n, char *rows) {
  transfer(kv->file, false, rows, (size_t)(n * kv->D) * emx_dtype_size(kv->dtype),
           offset_of(kv, values, element_of(kv, page, head, token)));
  return rows;
}

void emxi_kv_file_write(const emx_kv *kv, bool values, int32_t page, int32_t head, int64_t token, int64_t n, const char *rows) {
  transfer(kv->file, true, (char *)rows, (size_t)(n * kv->D) * emx_dtype_size(kv->dtype),
           offset_of(kv, values, element_of(kv, page, head, token)));
}

/* How many of the pages follow each other in the file. */
static int64_t neighbours(const int32_t *pages, int64_t n) {
  int64_t run = 1;
  while (run < n && pages[run] == pages[0] + run) run++;
  return run;
}
void emxi_kv_file_pages(const emx_kv *kv, bool values, int32_t head, const int32_t *pages, int64_t n, char *out) {
  const size_t bytes = (size_t)kv->k_page * emx_dtype_size(kv->dtype);
  for (int64_t i = 0, run; i < n; i += run) {
    run = neighbours(pages + i, n - i);
    transfer(kv->file, false, out + (size_t)i * bytes, (size_t)run * bytes,
             offset_of(kv, values, element_of(kv, pages[i], head, 0)));
  }
}
void emxi_kv_file_expect_pages(const emx_kv *kv, bool values, int32_t head, const int32_t *pages, int64_t n) {
  const size_t bytes = (size_t)kv->k_page * emx_dtype_size(kv->dtype);
  for (int64_t i = 0, run; i < n; i += run) {
    run = neighbours(pages + i, n - i);
    (void)posix_fadvise(kv->file->fd, offset_of(kv, values, element_of(kv, pages[i], head, 0)), (off_t)((size_t)run * bytes),
                        POSIX_FADV_WILLNEED);
  }
}

/* How many of the values come in one read: ascending, gaps smaller than what a device reads at least, at most half of it gaps. */
static int64_t run_of(const emx_kv *kv, const int64_t *offset, int64_t n) {
  const int64_t near = BLOCK / (int64_t)emx_dtype_size(kv->dtype);
  int64_t run = 1;
  while (run < n && offset[run] > offset[run - 1] && offset[run] - offset[run - 1] - kv->D < near &&
         offset[run] - offset[0] + kv->D <= 2 * (run + 1) * kv->D)
    run++;
  return run;
}
void emxi_kv_file_values(const emx_kv *kv, int32_t head, const int64_t *offset, int64_t n, char *rows, int64_t *at) {
  const size_t es = emx_dtype_size(kv->dtype);
  for (int64_t i = 0, used = 0, run; i < n; i += run) {
    run = run_of(kv, offset + i, n - i);
    const int64_t span = offset[i + run - 1] - offset[i] + kv->D;
    transfer(kv->file, false, rows + (size_t)used * es, (size_t)span * es, offset_of(kv, true, head * kv->k_head + offset[i]));
    for (int64_t j = i; j < i + run; j++) at[j] = used + offset[j] - offset[i];
    used += span;
  }
}

/* Advice only: what it does not bring is read later. */
void emxi_kv_file_expect_values(const emx_kv *kv, int32_t head, const int64_t *offset, int64_t n) {
  for (int64_t i = 0, run; i < n; i += run) {
    run = run_of(kv, offset + i, n - i);
    const int64_t span = offset[i + run - 1] - offset[i] + kv->D;
    (void)posix_fadvise(kv->file->fd, offset_of(kv, true, head * kv->k_head + offset[i]),
                        (off_t)((size_t)span * emx_dtype_size(kv->dtype)), POSIX_FADV_WILLNEED);
  }
}
void emxi_kv_file_expect_keys(const emx_kv *kv, int32_t page, int32_t head, int64_t token, int64_t n) {
  (void)posix_fadvise(kv->file->fd, offset_of(kv, false, element_of(kv, page, head, token)),
                      (off_t)((size_t)(n * kv->D) * emx_dtype_size(kv->dtype)), POSIX_FADV_WILLNEED);
}
