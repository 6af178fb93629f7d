/* SPDX-License-Identifier: Apache-2.0
 * Options that choose positions and the scale of the queries, and the names of what they choose. */
#ifndef EMX_CLI_ATTENTION_H
#define EMX_CLI_ATTENTION_H

#include "cli.h"

/* --position, --alibi-heads, --slopes, --rope-theta, --scale, --temperature, --learn-temperature, --learn-alpha: a child parser.
 * Key range 1200. Set config before parsing; its number of heads is read when all options are known. */
typedef struct cli_attention {
  emx_model_config *config;
  int32_t given;                                     /* numbers in --slopes */
  bool alibi_heads, slopes, rope_theta, temperature; /* set by the user */
} cli_attention;
extern const struct argp cli_attention_argp;

/* As in config.json; "unknown" for other numbers. */
const char *cli_position_name(int32_t type);
const char *cli_slope_name(int32_t type);
const char *cli_scale_name(int32_t type);

/* CLI_ERROR with a message that names the option in which a training's configuration differs from that of its folder. */
int cli_attention_compare(const emx_model_config *was, const emx_model_config *now, const char *folder);

#endif
