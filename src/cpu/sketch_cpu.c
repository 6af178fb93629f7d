/* SPDX-License-Identifier: Apache-2.0
 * Makes key sketches on the CPU. A task owns the records of (range of pages, KV head); K is read back from the pool, so that
 * sketches describe what is stored. */
#include "cpu/sketch_cpu.h"

#include "cpu/sketch_kernels.h"

#include <math.h>
#include <string.h>

const emxi_sketch_kernels *emxi_sketch_choose(const emxi_table *table) {
#if defined(__x86_64__)
  if (table == &emxi_table_avx512) return __builtin_cpu_supports("avx512vnni") ? &emxi_sketch_vnni : &emxi_sketch_avx2;
  if (table == &emxi_table_avx2) return &emxi_sketch_avx2;
#endif
  (void)table;
  return &emxi_sketch_scalar;
}

static float *map_of(const emx_kv *kv, int32_t head) { return kv->sketch.map + (int64_t)head * 3 * kv->sketch.dp; }

/* load_keys for a file. */
static __attribute__((noinline)) void load_file_keys(const emxi_table *k, const emx_kv *kv, int32_t page, int32_t head,
                                                     int32_t from, int32_t n, float *out) {
  _Alignas(64) char rows[EMXI_ROWS_BYTES];
  const size_t row = (size_t)kv->D * emx_dtype_size(kv->dtype);
  for (int32_t t = 0; t < n; t++, out += EMXI_SKETCH_LD) {
    if (t % EMXI_ROWS == 0) emxi_kv_file_read(kv, false, page, head, from + t, n - t < EMXI_ROWS ? n - t : EMXI_ROWS, rows);
    k->load[emxi_slot(kv->dtype)](rows + (size_t)(t % EMXI_ROWS) * row, kv->D, out);
    for (int32_t i = kv->D; i < kv->sketch.dp; i++) out[i] = 0;
  }
}
/* Tokens [from, from + n) of a page as floats, padded with zeros. */
static void load_keys(const emxi_table *k, const emx_kv *kv, int32_t page, int32_t head, int32_t from, int32_t n, float *out) {
  if (kv->file) {
    load_file_keys(k, kv, page, head, from, n, out);
    return;
  }
  for (int32_t t = 0; t < n; t++, out += EMXI_SKETCH_LD) {
    k->load[emxi_slot(kv->dtype)](emxi_kv_k(kv, page, head, from + t), kv->D, out);
    for (int32_t i = kv->D; i < kv->sketch.dp; i++) out[i] = 0;
  }
}

void emxi_sketch_page(const emxi_table *k, const emx_kv *kv, int32_t page, int32_t head) {
  const emxi_sketch *s = &kv->sketch;
  const int64_t per = kv->P / EMXI_GROUP;
  const emxi_sketch_kernels *sk = emxi_sketch_choose(k);
  float keys[EMXI_GROUP * EMXI_SKETCH_LD];
  for (int64_t i = 0; i < per; i++) {
    const int64_t at = (int64_t)head * s->groups + page * per + i;
    const emxi_sketch_out out = {.group = s->group + at,
                                 .centre = s->centre + at * s->dp,
                                 .high = s->high + at * s->dp,
                                 .low = s->low + at * s->dp,
                                 .row = s->row ? s->row + at * EMXI_GROUP * s->dp / 2 : NULL};
    load_keys(k, kv, page, head, (int32_t)i * EMXI_GROUP, EMXI_GROUP, keys);
    sk->encode_group(keys, kv->D, s->dp, map_of(kv, head), &out);
  }
}

void emxi_sketch_superpage(const emxi_table *k, const emx_kv *kv, const int32_t *pages, int32_t head) {
  const emxi_sketch *s = &kv->sketch;
  const int32_t n = EMXI_SUPER / kv->P;
  const int64_t at = (int64_t)head * s->supers + emxi_sketch_super_slot(kv, pages[n - 1]);
  float keys[EMXI_SUPER * EMXI_SKETCH_LD];
  for (int32_t i = 0; i < n; i++) load_keys(k, kv, pages[i], head, 0, kv->P, keys + i * kv->P * EMXI_SKETCH_LD);
  emxi_sketch_choose(k)->encode_super(keys, kv->D, s->dp, map_of(kv, head), s->super + at * (s->dp / 2), s->super_record + at);
}

/* The power of two nearest to x, by its logarithm. */
static float power_of_two(double x) {
  int e = 0;
  if (!(x > 0x1p-60)) return 0x1p-60f;
  frexp(x * 1.41421356, &e);
  return ldexpf(1.0f, e - 1 > 60 ? 60 : e - 1);
}

void emxi_sketch_learn(const emxi_table *k, const emx_kv *kv, const int32_t *pages, int64_t n) {
  const int32_t D = kv->D, dp = kv->sketch.dp;
  if (n > EMXI_LEARN / kv->P) n = EMXI_LEARN / kv->P;
  for (int32_t head = 0; head < kv->G; head++) {
    float *map = map_of(kv, head), key[EMXI_SKETCH_LD];
    double mean[EMXI_SKETCH_LD] = {0}, off[EMXI_SKETCH_LD] = {0}, sorted[EMXI_SKETCH_LD];
    int64_t count = 0;
    for (int pass = 0; pass < 2; pass++) { /* mean, then mean absolute deviation: one odd token weighs little */
      count = 0;
      for (int64_t p = 0; p < n; p++)
        for (int32_t t = 0; t < kv->P; t++) {
          load_keys(k, kv, pages[p], head, t, 1, key);
          bool fine = true;
          for (int32_t i = 0; i < D; i++) fine &= fabsf(key[i]) < 1e30f;
          if (!fine) continue;
          count++;
          for (int32_t i = 0; i < D; i++)
            if (pass == 0)
              mean[i] += (double)key[i];
            else
              off[i] += fabs((double)key[i] - mean[i]);
        }
      for (int32_t i = 0; i < D && count; i++)
        if (pass == 0)
          mean[i] /= (double)count;
        else
          off[i] *= 1.2533141373155 / (double)count; /* of a normal: its spread */
    }
    for (int32_t i = 0; i < D; i++) { /* insertion sort: the median tells what is usual */
      int32_t at = i;
      for (; at > 0 && sorted[at - 1] > off[i]; at--) sorted[at] = sorted[at - 1];
      sorted[at] = off[i];
    }
    /* A weight of its own only for a channel that is far out, an offset only where it is far from zero: what a few keys suggest
     * about the others is noise, and weights that follow noise loosen every bound. Half the deviation, for the largest of a few
     * channels is less far out than the largest of all: the step hardly grows, |q'| halves, and the other channels get finer
     * steps of the 8-bit query. */
    const double usual = sorted[D / 2] > 0 ? sorted[D / 2] : sorted[D - 1] > 0 ? sorted[D - 1] : 1;
    for (int32_t i = 0; i < dp; i++) {
      const bool out = i < D && off[i] > 4 * usual, shifted = i < D && fabs(mean[i]) > 2 * fmax(off[i], usual);
      const float w = power_of_two(out ? 0.5 * off[i] : usual);
      map[i] = shifted ? (float)mean[i] : 0;
      map[dp + i] = w;
      map[2 * dp + i] = 1.0f / w;
    }
  }
}
