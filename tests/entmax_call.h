/* The row mapping with its tensors as arguments. */
#ifndef ENTMAX_CALL_H
#define ENTMAX_CALL_H
#include <emx.h>

static inline emx_status entmax_forward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_tensor *x, const emx_tensor *p,
                                        const emx_tensor *tau, const emx_tensor *support) {
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.x = x, io.p = p, io.tau = tau, io.support = support;
  return emx_entmax_forward(ctx, desc, &io);
}
static inline emx_status entmax_backward(emx_ctx *ctx, const emx_entmax_desc *desc, const emx_tensor *p, const emx_tensor *dp,
                                         const emx_tensor *dx) {
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.p = p, io.dp = dp, io.dx = dx;
  return emx_entmax_backward(ctx, desc, &io);
}
#endif
