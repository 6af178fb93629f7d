/* SPDX-License-Identifier: Apache-2.0
 * AdamW (Loshchilov & Hutter 2019) with a global-norm clip, linear warm-up and a cosine. Memory-bound: 28 bytes a parameter. */
#include "train.h"

#include <math.h>

enum { SPAN = 16384 };

void emxi_adamw_carve(emxi_adamw *a, emxi_arena *arena, const emx_model_config *c) {
  const int64_t tensors = emxi_param_tensors(c), parameters = emx_model_config_parameters(c);
  int64_t n = 0;
  emxi_param p;
  for (int64_t i = 0; i < tensors; i++) {
    emxi_param_at(c, i, &p);
    n += (p.count + SPAN - 1) / SPAN;
  }
  *a = (emxi_adamw){.n = n,
                    .spans = emxi_arena_take(arena, n, sizeof *a->spans),
                    .sums = emxi_arena_take(arena, n, sizeof *a->sums),
                    .done = emxi_arena_take(arena, n, sizeof *a->done),
                    .m = emxi_arena_take(arena, parameters, sizeof *a->m),
                    .v = emxi_arena_take(arena, parameters, sizeof *a->v)};
  if (!arena->base || arena->overflow) return;
  n = 0;
  for (int64_t i = 0; i < tensors; i++) {
    emxi_param_at(c, i, &p);
    for (int64_t at = 0; at < p.count; at += SPAN)
      a->spans[n++] = (emxi_adamw_span){p.offset + at, p.count - at < SPAN ? p.count - at : SPAN, p.decay};
  }
}

struct norm_job {
  emxi_adamw *a;
  const float *g;
};
EMXI_CLONES static double sum_squares(const float *g, int64_t n) {
  double acc[8] = {0};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) acc[j] += (double)g[i + j] * (double)g[i + j];
  for (int j = 0; i + j < n; j++) acc[j] += (double)g[i + j] * (double)g[i + j];
  return ((acc[0] + acc[4]) + (acc[2] + acc[6])) + ((acc[1] + acc[5]) + (acc[3] + acc[7]));
}
static void norm_task(void *arg, int64_t i, int32_t worker) {
  (void)worker;
  const struct norm_job *job = arg;
  job->a->sums[i] = sum_squares(job->g + job->a->spans[i].offset, job->a->spans[i].count);
}
emx_status emxi_adamw_norm(emx_ctx *ctx, emxi_adamw *a, const float *g, double *norm) {
  struct norm_job job = {a, g};
  EMX_TRY(emxi_parallel(ctx, a->n, norm_task, &job));
  double sum = 0;
  for (int64_t i = 0; i < a->n; i++) sum += a->sums[i];
  *norm = sqrt(sum);
  return EMX_OK;
}

struct update_job {
  emxi_adamw *a;
  const float *g;
  float *w;
  float scale, beta1, beta2, eps, rate, correction2, decay;
};
EMXI_CLONES static void update_span(const struct update_job *job, int64_t at, int64_t n, bool decay) {
  const float *g = job->g + at;
  float *w = job->w + at, *m = job->a->m + at, *v = job->a->v + at;
  const float scale = job->scale, b1 = job->beta1, b2 = job->beta2, c1 = 1 - b1, c2 = 1 - b2, eps = job->eps, rate = job->rate,
              correction2 = job->correction2, keep = decay ? 1 - job->decay : 1;
  EMXI_ELEMENTWISE
  for (int64_t i = 0; i < n; i++) {
    const float gi = g[i] * scale;
    m[i] = b1 * m[i] + c1 * gi;
    v[i] = b2 * v[i] + c2 * (gi * gi);
    w[i] = w[i] * keep - rate * m[i] / (sqrtf(v[i] * correction2) + eps);
  }
}
static void update_task(void *arg, int64_t i, int32_t worker) {
  (void)worker;
  const struct update_job *job = arg;
  const emxi_adamw_span *s = &job->a->spans[i];
  update_span(job, s->offset, s->count, s->decay);
  job->a->done[i] = 1;
}
void emxi_adamw_update(emx_ctx *ctx, emxi_adamw *a, const emx_train_opts *opts, double lr, int64_t step, double grad_scale,
                       const float *g, float *w) {
  struct update_job job = {.a = a,
                           .g = g,
                           .w = w,
                           .scale = (float)grad_scale,
                           .beta1 = (float)opts->beta1,
                           .beta2 = (float)opts->beta2,
                           .eps = (float)opts->eps,
                           .rate = (float)(lr / (1 - pow(opts->beta1, (double)step))),
                           .correction2 = (float)(1 / (1 - pow(opts->beta2, (double)step))),
                           .decay = (float)(lr * opts->weight_decay)};
  for (int64_t i = 0; i < a->n; i++) a->done[i] = 0;
  if (emxi_parallel(ctx, a->n, update_task, &job)) /* cancelled on the way: half an update would be neither state */
    for (int64_t i = 0; i < a->n; i++)
      if (!a->done[i]) update_task(&job, i, 0);
}

double emxi_learning_rate(const emx_train_opts *o, int64_t done) {
  if (done < o->warmup) return o->lr * (double)(done + 1) / (double)o->warmup;
  const double x = (double)(done - o->warmup) / (double)(o->steps - o->warmup);
  return o->min_lr + 0.5 * (o->lr - o->min_lr) * (1 + cos(3.141592653589793 * x));
}
