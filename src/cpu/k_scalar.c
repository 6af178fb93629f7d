/* SPDX-License-Identifier: Apache-2.0
 * The scalar kernel table for f32 scores: the reference, and the fallback on any CPU. */
#include "base/num.h"
#include "cpu/kv_kernels.h"
#include "cpu/table.h"

#define REAL float
#define EMXI_F32
#include "vec_scalar.h"
#include "body.inc"
#include "body_map.inc"
#include "body_kv.inc"

const emxi_table emxi_table_scalar = {KERNEL_TABLE("scalar"), MAP_TABLE, .kv = &kv_kernels};
