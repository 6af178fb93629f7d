/* One row through every entry of the mapping. */
#ifndef MAP_CALL_H
#define MAP_CALL_H
#include <emx.h>

typedef struct map_args {
  int32_t kind;
  double alpha, budget;
} map_args;
static inline emx_entmax_desc map_desc(map_args a) {
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  desc.kind = a.kind;
  desc.alpha = a.alpha;
  desc.budget = a.budget;
  return desc;
}
static inline emx_status map_forward(emx_ctx *ctx, map_args a, void *x, void *p, int32_t dtype, int64_t n, double *tau,
                                     int32_t *support) {
  const int64_t shape[2] = {1, n};
  emx_tensor tx = emx_tensor_view(x, dtype, 2, shape), tp = emx_tensor_view(p, dtype, 2, shape),
             tt = emx_tensor_view(tau, EMX_F64, 1, shape), ts = emx_tensor_view(support, EMX_I32, 1, shape);
  emx_entmax_desc desc = map_desc(a);
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.x = &tx, io.p = &tp, io.tau = tau ? &tt : NULL, io.support = support ? &ts : NULL;
  return emx_entmax_forward(ctx, &desc, &io);
}
static inline emx_status map_backward(emx_ctx *ctx, map_args a, void *p, void *dp, void *dx, int32_t dtype, int64_t n,
                                      double *d_alpha) {
  const int64_t shape[2] = {1, n};
  emx_tensor tp = emx_tensor_view(p, dtype, 2, shape), tg = emx_tensor_view(dp, dtype, 2, shape),
             tx = emx_tensor_view(dx, dtype, 2, shape), ta = emx_tensor_view(d_alpha, EMX_F64, 1, shape);
  emx_entmax_desc desc = map_desc(a);
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.p = &tp, io.dp = &tg, io.dx = &tx, io.d_alpha = d_alpha ? &ta : NULL;
  return emx_entmax_backward(ctx, &desc, &io);
}
/* Loss of class `target`, times an upstream gradient of 1. */
static inline emx_status map_loss(emx_ctx *ctx, map_args a, void *x, int32_t target, void *dx, int32_t dtype, int64_t n,
                                  double *loss) {
  const int64_t shape[2] = {1, n};
  emx_tensor tx = emx_tensor_view(x, dtype, 2, shape), td = emx_tensor_view(dx, dtype, 2, shape),
             ty = emx_tensor_view(&target, EMX_I32, 1, shape), tl = emx_tensor_view(loss, EMX_F64, 1, shape);
  emx_entmax_desc desc = map_desc(a);
  emx_loss_io io;
  emx_loss_io_init(&io);
  io.x = &tx, io.target = &ty, io.loss = &tl, io.dx = dx ? &td : NULL;
  return emx_entmax_loss(ctx, &desc, &io);
}
#endif
