/* One context per kernel table, for laws that hold for each. */
#ifndef TABLE_CONTEXTS_H
#define TABLE_CONTEXTS_H
#include <emx.h>
#include <stdlib.h>

#include "cpu/table.h"

static emx_ctx *contexts[4];
static int n_contexts;
static emx_status open_contexts(void) {
  emx_status status = EMX_OK;
  for (; !status && emxi_table_available(n_contexts); n_contexts += !status) {
    setenv("EMX_ISA", emxi_table_available(n_contexts)->name, 1);
    status = emx_ctx_create(NULL, &contexts[n_contexts]);
  }
  unsetenv("EMX_ISA");
  return status;
}
static void close_contexts(void) {
  for (int i = 0; i < n_contexts; i++) emx_ctx_destroy(contexts[i]);
}
#endif
