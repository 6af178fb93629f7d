/* A user's program on libentmax alone: the header it was compiled with is the library that is loaded, and entmax of a row is
 * right. */
#include <emx.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  char version[32];
  snprintf(version, sizeof version, "%d.%d.%d", EMX_VERSION_MAJOR, EMX_VERSION_MINOR, EMX_VERSION_PATCH);
  if (strcmp(version, emx_version()) || emx_abi_version() != EMX_ABI_VERSION) {
    fprintf(stderr, "header %s (ABI %d), library %s (ABI %d)\n", version, EMX_ABI_VERSION, emx_version(), (int)emx_abi_version());
    return 1;
  }
  /* 1.5-entmax of (0, 0, -9): the first two share the mass, the third has none. */
  double x[3] = {0, 0, -9}, p[3] = {-1, -1, -1};
  const int64_t shape[2] = {1, 3};
  emx_tensor tx = emx_tensor_view(x, EMX_F64, 2, shape), tp = emx_tensor_view(p, EMX_F64, 2, shape);
  emx_entmax_desc desc;
  emx_entmax_desc_init(&desc);
  emx_entmax_io io;
  emx_entmax_io_init(&io);
  io.x = &tx;
  io.p = &tp;
  emx_ctx *ctx;
  if (emx_ctx_create(NULL, &ctx) || emx_entmax_forward(ctx, &desc, &io)) {
    fprintf(stderr, "%s\n", emx_last_error());
    return 1;
  }
  emx_ctx_destroy(ctx);
  if (!(p[0] > .5 - 1e-9 && p[0] < .5 + 1e-9 && p[1] == p[0] && p[2] == 0)) {
    fprintf(stderr, "weights %g %g %g\n", p[0], p[1], p[2]);
    return 1;
  }
  puts("core: right");
  return 0;
}
