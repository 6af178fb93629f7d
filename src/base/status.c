/* SPDX-License-Identifier: Apache-2.0
 * Version, status names, the thread-local sentence of detail, memory, the workspace arena, tensor checks. */
#define _GNU_SOURCE
#include "base.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STR_(x) #x
#define STR(x) STR_(x)
const char *emx_version(void) { return STR(EMX_VERSION_MAJOR) "." STR(EMX_VERSION_MINOR) "." STR(EMX_VERSION_PATCH); }
int32_t emx_abi_version(void) { return EMX_ABI_VERSION; }

static _Thread_local char detail[512];

emx_status emxi_fail(emx_status status, const char *format, ...) {
  char text[sizeof detail]; /* an argument may be the previous detail */
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  memcpy(detail, text, sizeof detail);
  return status;
}
const char *emx_last_error(void) { return detail; }

const char *emx_status_name(emx_status status) {
  static const char *const names[] = {
      "EMX_OK",        "EMX_ERR_INVALID",   "EMX_ERR_SHAPE",     "EMX_ERR_DTYPE",   "EMX_ERR_UNSUPPORTED",
      "EMX_ERR_NOMEM", "EMX_ERR_WORKSPACE", "EMX_ERR_IO",        "EMX_ERR_FORMAT",  "EMX_ERR_DEVICE",
      "EMX_ERR_STATE", "EMX_ERR_CANCELLED", "EMX_ERR_NONFINITE", "EMX_ERR_INTERNAL"};
  if (status > 0 || status <= -(int)(sizeof names / sizeof *names)) return "unknown status";
  return names[-status];
}

#define STRUCT_MAX 65536 /* no version will be as large: a struct_size that nobody set must not make us read or write that far */

static uint32_t struct_size(const void *p) {
  uint32_t size;
  memcpy(&size, p, sizeof size);
  return size;
}

emx_status emxi_struct_check(const void *p, size_t first, const char *who, const char *type) {
  if (!p) return emxi_fail(EMX_ERR_INVALID, "%s: the %s is NULL", who, type);
  if (struct_size(p) < first || struct_size(p) > STRUCT_MAX)
    return emxi_fail(EMX_ERR_INVALID, "%s: %s.struct_size is %u, expected %zu or a little more: it is sizeof(%s)", who, type,
                     struct_size(p), first, type);
  return EMX_OK;
}

emx_status emxi_struct_read(const void *p, size_t first, size_t size, void *out, const char *who, const char *type) {
  EMX_TRY(emxi_struct_check(p, first, who, type));
  for (size_t i = size; i < struct_size(p); i++)
    if (((const unsigned char *)p)[i])
      return emxi_fail(EMX_ERR_UNSUPPORTED, "%s: this %s uses fields of a later version than %s", who, type, emx_version());
  emxi_struct_init(out, size, p, struct_size(p));
  return EMX_OK;
}

void emxi_struct_write(void *p, const void *from, size_t size) { emxi_struct_init(p, struct_size(p), from, size); }

void emxi_struct_init(void *p, size_t size, const void *defaults, size_t known) {
  const uint32_t have = (uint32_t)size;
  if (!p || size < sizeof have) return;
  memset(p, 0, size);
  memcpy(p, defaults, size < known ? size : known);
  memcpy(p, &have, sizeof have);
}

/* ---- memory */

static atomic_llong fail_after = -1;
void emxi_alloc_fail_after(int64_t n) { atomic_store(&fail_after, n); }

size_t emxi_physical_memory(void) {
  long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
  if (pages <= 0 || size <= 0) return SIZE_MAX;
  return (size_t)pages * (size_t)size;
}

void *emxi_alloc(size_t size) {
  if (atomic_load_explicit(&fail_after, memory_order_relaxed) >= 0 && atomic_fetch_sub(&fail_after, 1) == 0) {
    atomic_store(&fail_after, -1);
    return NULL;
  }
  if (size > ((size_t)1 << 20) && size > emxi_physical_memory()) return NULL;
  size_t rounded;
  if (!emxi_add(size, EMXI_ALIGN, &rounded)) return NULL;
  return aligned_alloc(EMXI_ALIGN, rounded / EMXI_ALIGN * EMXI_ALIGN);
}
void *emxi_calloc(size_t size) {
  void *p = emxi_alloc(size);
  if (p) memset(p, 0, size);
  return p;
}
void emxi_free(void *p) { free(p); }

/* ---- arena */

void emxi_arena_init(emxi_arena *a, void *base, size_t size) {
  *a = (emxi_arena){0};
  if (!base) return;
  size_t skip = (size_t)(-(uintptr_t)base) % EMXI_ALIGN;
  a->base = (char *)base + skip;
  a->size = size > skip ? size - skip : 0;
}
void *emxi_arena_take(emxi_arena *a, int64_t count, size_t size) {
  size_t bytes, end;
  if (count < 0 || !emxi_mul((size_t)count, size, &bytes) || !emxi_add(bytes, EMXI_ALIGN - 1, &bytes) ||
      !emxi_add(a->used, bytes / EMXI_ALIGN * EMXI_ALIGN, &end)) {
    a->overflow = true;
    return NULL;
  }
  char *p = a->base ? a->base + a->used : NULL;
  a->used = end;
  if (a->base && end > a->size) {
    a->overflow = true;
    return NULL;
  }
  return p;
}
size_t emxi_arena_total(const emxi_arena *a) { return a->overflow ? SIZE_MAX : a->used + EMXI_ALIGN; }
emx_status emxi_arena_check(const emxi_arena *a, const char *who) {
  if (a->overflow)
    return emxi_fail(EMX_ERR_WORKSPACE, "%s: the workspace holds %zu bytes, %zu are needed", who, a->size, a->used + EMXI_ALIGN);
  return EMX_OK;
}

emx_status emxi_alpha_check(double alpha, const char *who) {
  if (alpha == 1.0 || (alpha >= 1.0 + 1e-6 && alpha <= 4.0)) return EMX_OK;
  return emxi_fail(EMX_ERR_INVALID, "%s: alpha is %.9g, expected 1 or 1.000001 to 4", who, alpha);
}

/* ---- tensors */

size_t emx_dtype_size(int32_t dtype) {
  switch (dtype) {
    case EMX_F32:
    case EMX_I32: return 4;
    case EMX_F16:
    case EMX_BF16: return 2;
    case EMX_F64: return 8;
  }
  return 0;
}
const char *emx_dtype_name(int32_t dtype) {
  switch (dtype) {
    case EMX_F32: return "f32";
    case EMX_F16: return "f16";
    case EMX_BF16: return "bf16";
    case EMX_F64: return "f64";
    case EMX_I32: return "i32";
    case EMX_Q8: return "q8";
  }
  return "unknown";
}
bool emxi_is_float(int32_t dtype) { return dtype == EMX_F32 || dtype == EMX_F16 || dtype == EMX_BF16 || dtype == EMX_F64; }

emx_tensor emx_tensor_view(void *data, int32_t dtype, int32_t ndim, const int64_t *shape) {
  emx_tensor t = {.data = data, .dtype = dtype, .device = EMX_DEVICE_CPU, .ndim = ndim};
  if (ndim < 0 || ndim > EMX_MAX_DIMS) return t;
  int64_t stride = 1;
  for (int d = ndim - 1; d >= 0; d--) {
    t.shape[d] = shape[d];
    t.stride[d] = stride;
    if (__builtin_mul_overflow(stride, shape[d] > 0 ? shape[d] : 1, &stride)) t.ndim = -1;
  }
  return t;
}

emx_status emxi_tensor_layout(const emx_ctx *ctx, const emx_tensor *t, int32_t ndim, const char *who, const char *name) {
  if (!t) return emxi_fail(EMX_ERR_INVALID, "%s: %s is NULL", who, name);
  if (t->ndim != ndim) return emxi_fail(EMX_ERR_SHAPE, "%s: %s has %d dimensions, expected %d", who, name, t->ndim, ndim);
  if (!emx_dtype_size(t->dtype)) return emxi_fail(EMX_ERR_DTYPE, "%s: %s has unknown dtype %d", who, name, t->dtype);
  if (t->device != ctx->device)
    return emxi_fail(EMX_ERR_INVALID, "%s: %s is on device kind %d, the context on %d", who, name, t->device, ctx->device);
  if (t->device_index != ctx->device_index)
    return emxi_fail(EMX_ERR_INVALID, "%s: %s is on device %d, the context on device %d", who, name, t->device_index,
                     ctx->device_index);
  size_t span = emx_dtype_size(t->dtype);
  for (int d = 0; d < ndim; d++) {
    if (t->shape[d] < 0)
      return emxi_fail(EMX_ERR_SHAPE, "%s: %s has shape %lld in dimension %d", who, name, (long long)t->shape[d], d);
    if (t->shape[d] > 1) {
      if (t->stride[d] <= 0)
        return emxi_fail(EMX_ERR_SHAPE, "%s: %s has stride %lld in dimension %d, it must be positive", who, name,
                         (long long)t->stride[d], d);
      size_t extent;
      if (!emxi_mul((size_t)t->shape[d] - 1, (size_t)t->stride[d], &extent) ||
          !emxi_mul(extent, emx_dtype_size(t->dtype), &extent) || !emxi_add(span, extent, &span) || span > PTRDIFF_MAX)
        return emxi_fail(EMX_ERR_SHAPE, "%s: %s spans more than the address space", who, name);
    }
  }
  if (ndim > 0 && t->shape[ndim - 1] > 1 && t->stride[ndim - 1] != 1)
    return emxi_fail(EMX_ERR_SHAPE, "%s: the last dimension of %s has stride %lld, it must be contiguous", who, name,
                     (long long)t->stride[ndim - 1]);
  return EMX_OK;
}
emx_status emxi_tensor_check(const emx_ctx *ctx, const emx_tensor *t, int32_t ndim, const char *who, const char *name) {
  EMX_TRY(emxi_tensor_layout(ctx, t, ndim, who, name));
  for (int d = 0; d < ndim; d++)
    if (t->shape[d] == 0) return EMX_OK;
  if (!t->data) return emxi_fail(EMX_ERR_INVALID, "%s: %s has no data", who, name);
  return EMX_OK;
}
emx_status emxi_tensor_expect(const emx_ctx *ctx, const emx_tensor *t, int32_t ndim, const int64_t *shape, const char *who,
                              const char *name) {
  EMX_TRY(emxi_tensor_check(ctx, t, ndim, who, name));
  return emxi_tensor_shape(t, ndim, shape, who, name);
}
emx_status emxi_tensor_shape(const emx_tensor *t, int32_t ndim, const int64_t *shape, const char *who, const char *name) {
  for (int d = 0; d < ndim; d++)
    if (t->shape[d] != shape[d])
      return emxi_fail(EMX_ERR_SHAPE, "%s: %s has %lld in dimension %d, expected %lld", who, name, (long long)t->shape[d], d,
                       (long long)shape[d]);
  return EMX_OK;
}
