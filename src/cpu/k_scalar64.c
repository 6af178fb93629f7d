/* SPDX-License-Identifier: Apache-2.0
 * The same kernels over double: f64 mapping and attention, for gradient checks. */
#include "base/num.h"
#include "cpu/table.h"

#define REAL double
#include "vec_scalar.h"
#include "body.inc"
#include "body_map.inc"

const emxi_table64 emxi_table_scalar64 = {KERNEL_TABLE("scalar64"), MAP_TABLE};
