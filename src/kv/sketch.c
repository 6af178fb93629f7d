/* SPDX-License-Identifier: Apache-2.0
 * Where sketches lie and which of them describe what a sequence sees. Host bookkeeping; the codes are made by the back end. */
#include "kv/kv.h"

static void *take(emxi_arena *a, int64_t n0, int64_t n1, int64_t n2, size_t size) {
  int64_t n;
  if (__builtin_mul_overflow(n0, n1, &n) || __builtin_mul_overflow(n, n2, &n)) n = -1;
  return emxi_arena_take(a, n, size);
}

void emxi_sketch_carve(emx_kv *kv, emxi_arena *device, emxi_arena *host) {
  emxi_sketch *s = &kv->sketch;
  *s = (emxi_sketch){0};
  if (!(kv->summaries & EMX_SUMMARY_SKETCH)) return;
  const int64_t M = kv->max_pages, G = kv->G;
  s->dp = (kv->D + 15) / 16 * 16;
  s->groups = M * (kv->P / EMXI_GROUP);
  s->super_pitch = (M + EMXI_SUPER / kv->P - 1) / (EMXI_SUPER / kv->P);
  s->supers = s->super_pitch * (EMXI_SUPER / kv->P);
  s->group = take(device, G, s->groups, 1, sizeof *s->group);
  s->centre = take(device, G, s->groups, s->dp, 1);
  s->high = take(device, G, s->groups, s->dp, sizeof *s->high);
  s->low = take(device, G, s->groups, s->dp, sizeof *s->low);
  if (kv->summaries & EMX_SUMMARY_RESIDUAL) s->row = take(device, G, s->groups, EMXI_GROUP * s->dp / 2, 1);
  s->super = take(device, G, s->supers, s->dp / 2, 1);
  s->super_record = take(device, G, s->supers, 1, sizeof *s->super_record);
  s->map = take(device, G, 3 * s->dp, 1, sizeof(float));
  s->number = take(host, M, 1, 1, sizeof *s->number);
  s->super_number = take(host, s->supers, EMXI_SUPER / kv->P, 1, sizeof *s->super_number);
}

bool emxi_sketch_super_ready(const emx_kv *kv, const int32_t *table, int64_t p, int64_t first_new) {
  const int64_t n = EMXI_SUPER / kv->P;
  if ((p + 1) % n) return false;
  for (int64_t i = p + 1 - n; i < first_new && i <= p; i++) /* a page that the same call writes elsewhere is not what it was */
    if (!emxi_sketch_page_valid(kv, table[i]) || kv->stamp[table[i]] == kv->stamp_now) return false;
  return true;
}

void emxi_sketch_publish(emx_kv *kv, const int32_t *table, int64_t from, int64_t to) {
  const int64_t n = EMXI_SUPER / kv->P;
  emxi_sketch *s = &kv->sketch;
  for (int64_t p = from; p < to; p++) {
    if (!s->number[table[p]]) s->number[table[p]] = ++s->last_number;
    const bool ready = emxi_sketch_super_ready(kv, table, p, from);
    uint64_t *number = s->super_number + emxi_sketch_super_slot(kv, table[p]) * n;
    for (int64_t i = 0; i < n; i++) number[i] = ready ? s->number[table[p + 1 - n + i]] : 0;
  }
}

void emxi_sketch_rebuild(emx_ctx *ctx, emx_kv *kv, int32_t seq) {
  const int32_t *table = kv->tables + (int64_t)seq * kv->max_pages;
  const int64_t n = kv->seqs[seq].length / kv->P;
  if (!kv->sketch.number || ctx->backend->kv_summarize(ctx, kv, table, NULL, n)) return;
  emxi_sketch_publish(kv, table, 0, n);
}
