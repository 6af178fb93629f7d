/* SPDX-License-Identifier: Apache-2.0
 * Files of bytes and the windows drawn from them. */
#include "base/num.h"
#include "train.h"

/* FNV-1a, 64 bits: it tells data sets apart, it does not defend against anybody. */
static uint64_t fnv(uint64_t h, const void *data, int64_t n) {
  const uint8_t *p = data;
  for (int64_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
  return h;
}

emx_status emxi_data_create(const uint8_t *const *files, const int64_t *sizes, int64_t n, int32_t vocab, emxi_data *out) {
  if (n < 1 || !files || !sizes) return emxi_fail(EMX_ERR_INVALID, "trainer: no training data (%lld files)", (long long)n);
  emxi_data d = {.n = n, .hash = 0xcbf29ce484222325u};
  for (int64_t i = 0; i < n; i++) {
    if (sizes[i] < 0 || (sizes[i] > 0 && !files[i]))
      return emxi_fail(EMX_ERR_INVALID, "trainer: file %lld of the data has %lld bytes%s", (long long)i, (long long)sizes[i],
                       files[i] ? "" : " at NULL");
    if (__builtin_add_overflow(d.bytes, sizes[i], &d.bytes))
      return emxi_fail(EMX_ERR_INVALID, "trainer: the data's size overflows");
    if (vocab < 256)
      for (int64_t j = 0; j < sizes[i]; j++)
        if (files[i][j] >= vocab)
          return emxi_fail(EMX_ERR_INVALID, "trainer: byte %d at offset %lld of file %lld is not below vocab_size %d",
                           files[i][j], (long long)j, (long long)i, vocab);
    const int64_t size = sizes[i];
    d.hash = fnv(fnv(d.hash, &size, sizeof size), files[i], size);
  }
  size_t bytes;
  if (!emxi_mul((size_t)n, sizeof *d.files + sizeof *d.sizes, &bytes) || !(d.files = emxi_alloc(bytes)))
    return emxi_fail(EMX_ERR_NOMEM, "trainer: no memory for a list of %lld files", (long long)n);
  d.sizes = (int64_t *)(d.files + n);
  for (int64_t i = 0; i < n; i++) {
    d.files[i] = files[i];
    d.sizes[i] = sizes[i];
  }
  *out = d;
  return EMX_OK;
}

void emxi_data_destroy(emxi_data *d) {
  emxi_free(d->files);
  *d = (emxi_data){0};
}

static int64_t windows_of(int64_t size, int64_t length) { return size > length ? size - length : 0; }

int64_t emxi_data_windows(const emxi_data *d, int64_t length) {
  int64_t total = 0;
  for (int64_t i = 0; i < d->n; i++) total += windows_of(d->sizes[i], length);
  return total;
}

const uint8_t *emxi_data_draw(const emxi_data *d, int64_t length, uint64_t seed, int64_t t, int64_t i) {
  uint32_t word[4];
  emxi_philox(seed, (uint64_t)t, (uint64_t)i, word);
  /* high half of a 128-bit product: uniform up to total / 2^64 */
  const uint64_t total = (uint64_t)emxi_data_windows(d, length), random = (uint64_t)word[1] << 32 | word[0];
  const uint64_t hi = random >> 32, lo = random & 0xffffffffu, thi = total >> 32, tlo = total & 0xffffffffu;
  const uint64_t middle = hi * tlo + (lo * tlo >> 32), middle2 = lo * thi + (middle & 0xffffffffu);
  int64_t at = (int64_t)(hi * thi + (middle >> 32) + (middle2 >> 32));
  for (int64_t f = 0;; f++) {
    const int64_t here = windows_of(d->sizes[f], length);
    if (at < here) return d->files[f] + at;
    at -= here;
  }
}
