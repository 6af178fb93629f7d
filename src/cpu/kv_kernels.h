/* SPDX-License-Identifier: Apache-2.0
 * Kernels over page summaries, one constant table per ISA (body_kv.inc). */
#ifndef EMXI_KV_KERNELS_H
#define EMXI_KV_KERNELS_H

#include "cpu/table.h"

typedef struct emxi_kv_kernels {
  const char *name;
} emxi_kv_kernels;

#endif
