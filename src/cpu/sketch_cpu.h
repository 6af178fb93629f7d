/* SPDX-License-Identifier: Apache-2.0
 * Making key sketches on the CPU. */
#ifndef EMXI_SKETCH_CPU_H
#define EMXI_SKETCH_CPU_H

#include "cpu/table.h"
#include "kv/kv.h"

#define EMXI_LEARN 1024 /* tokens that offsets and weights are taken from, at most */

/* Offsets and weights of every head from complete pages. */
void emxi_sketch_learn(const emxi_table *k, const emx_kv *kv, const int32_t *pages, int64_t n);
/* The groups of a complete page. */
void emxi_sketch_page(const emxi_table *k, const emx_kv *kv, int32_t page, int32_t head);
/* The superpage of these 64/P complete pages, into the slot of the last. */
void emxi_sketch_superpage(const emxi_table *k, const emx_kv *kv, const int32_t *pages, int32_t head);

#endif
