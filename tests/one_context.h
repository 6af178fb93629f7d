/* The context of a test program that needs one. */
#ifndef ONE_CONTEXT_H
#define ONE_CONTEXT_H
#include <emx.h>

static emx_ctx *ctx;
static int setup(void **state) {
  (void)state;
  return emx_ctx_create(NULL, &ctx);
}
static int teardown(void **state) {
  (void)state;
  emx_ctx_destroy(ctx);
  return 0;
}
#endif
