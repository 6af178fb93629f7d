/* Contexts of a test program whose results must not depend on threads. */
#ifndef TWO_CONTEXTS_H
#define TWO_CONTEXTS_H
#include <emx.h>

static emx_ctx *one, *two; /* 1 and 2 workers */
static emx_ctx *context(int32_t threads) {
  emx_ctx_opts opts;
  emx_ctx *ctx;
  emx_ctx_opts_init(&opts);
  opts.threads = threads;
  return emx_ctx_create(&opts, &ctx) ? NULL : ctx;
}
static int setup(void **state) {
  (void)state;
  one = context(1);
  two = context(2);
  return one && two ? 0 : -1;
}
static int teardown(void **state) {
  (void)state;
  emx_ctx_destroy(one);
  emx_ctx_destroy(two);
  return 0;
}
#endif
