/* SPDX-License-Identifier: Apache-2.0
 * Sketches of keys: what the certified selector reads instead of keys. Derivations are in docs/numerics.md.
 *
 * Keys are seen as y = (k - offset) / weight with one offset and one weight (a power of two) per channel and KV head, fixed when
 * the cache makes its first sketch, so that a channel that is fifty times larger than the others costs the codes nothing.
 *
 *   superpage, 64 positions   4-bit centre c, radius >= |y - c|
 *   group, 16 positions       8-bit centre c, radius >= |y - c|; c = 0 (and its codes are never read) where a centre would
 *                             not pay
 *   key                       residual y - c in two 2-bit planes with one step a group, and bounds of what each leaves over
 *   key, optional             what the two planes leave over, once more in 4 bits
 *
 * Radii and bounds are measured on the codes as they were rounded, and rounded up. A group or superpage that cannot be described
 * (a NaN, an infinity, numbers near the end of their range) has radius +inf: it is always read.
 *
 * Groups are made when a cache page completes, superpages with the page that holds their last position, in whose slot they lie;
 * so sequences that share pages share sketches. Slots are numbered so that the superpages of pages in a row lie in a row. Nothing
 * is ever invalidated: a page gets a new number whenever its groups are made, a superpage remembers the numbers of its pages, and
 * whoever reads compares.
 */
#ifndef EMXI_SKETCH_H
#define EMXI_SKETCH_H

#include <stdint.h>

enum { EMXI_GROUP = 16, EMXI_SUPER = 64 };

/* Values of codes: centre of a group (c - 128) step_c; of a superpage (c - 7.5) step_c; planes (4 h + l - 7.5) step; residual row
 * (c - 7.5) step5. Half a cache line. */
typedef struct emxi_sketch_group {
  float step_c;
  float radius; /* >= |y - centre| of every key */
  float step;
  float error2, error4;    /* >= |y - centre - planes| with the high plane alone (l = 1.5), with both */
  float step5, error5;     /* residual rows: >= |y - centre - planes - row|; without them error5 is error4 */
  uint16_t norm_c, norm_k; /* >= |centre|, >= |k| of every key; bf16 */
} emxi_sketch_group;
typedef struct emxi_sketch_super {
  float step_c, norm_c, radius, norm_k;
} emxi_sketch_super;

/* Device arrays, by KV head, then physical page, then group of the page; D is padded to Dp, a multiple of 16. NULL: no
 * sketches. */
typedef struct emxi_sketch {
  int32_t dp;
  int64_t groups;           /* of a KV head: max_pages * P / 16 */
  emxi_sketch_group *group; /* [G,groups] */
  uint8_t *centre;          /* [G,groups,Dp] */
  uint32_t *high, *low;     /* [G,groups,Dp/16,16]: word w, key t: byte b, bits 2s and 2s+1 are channel 16 w + 4 s + b */
  uint8_t *row;             /* [G,groups,16,Dp/2]: low nibble of byte j is channel j, high nibble channel j + Dp/2; or NULL */
  uint8_t *super;           /* [G,supers,Dp/2] by slot: nibbles as in a row */
  emxi_sketch_super *super_record; /* [G,supers] */
  int64_t supers;                  /* slots of a KV head (emxi_sketch_super_slot): 64/P * super_pitch */
  int64_t super_pitch;
  float *map; /* [G,3,Dp]: offset, weight, 1 / weight */
  /* Host side. */
  uint64_t *number;       /* [max_pages] of the page's groups; 0: none */
  uint64_t *super_number; /* [supers, 64/P] by slot: of the superpage's pages */
  uint64_t last_number;
  int32_t mapped; /* offsets and weights are set */
} emxi_sketch;

#endif
