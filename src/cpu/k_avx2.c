/* SPDX-License-Identifier: Apache-2.0
 * The AVX2 kernel table. Compiled with that ISA's flags; nothing here may run before dispatch.c has checked the CPU. */
#include "base/num.h"
#include "cpu/kv_kernels.h"
#include "cpu/table.h"

#define REAL float
#define EMXI_F32
#include "vec_avx2.h"
#include "body.inc"
#include "body_map.inc"
#include "body_kv.inc"

const emxi_table emxi_table_avx2 = {KERNEL_TABLE("avx2"), MAP_TABLE, .kv = &kv_kernels};
