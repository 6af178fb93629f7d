/* SPDX-License-Identifier: Apache-2.0
 * The threshold solver, for f32 and f64 scores. */
#include "cpu/table.h"

#define REAL float
#define TABLE emxi_table
#define FN(name) name
#include "solver.inc"
#undef REAL
#undef TABLE
#undef FN

#define REAL double
#define TABLE emxi_table64
#define FN(name) name##64
#include "solver.inc"
