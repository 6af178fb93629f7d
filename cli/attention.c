/* SPDX-License-Identifier: Apache-2.0
 * Options that choose positions and the scale of the queries, and the names of what they choose. */
#include "attention.h"

#include <stdlib.h>
#include <string.h>

enum {
  KEY_POSITION = 1200,
  KEY_ALIBI_HEADS,
  KEY_SLOPES,
  KEY_ROPE_THETA,
  KEY_SCALE,
  KEY_TEMPERATURE,
  KEY_LEARN_TEMPERATURE,
  KEY_LEARN_ALPHA
};
static const struct argp_option option_table[] = {
    {"position", KEY_POSITION, "T", 0,
     "nape (default: some heads with ALiBi, the others without a position), alibi, nope or rope", 0},
    {"alibi-heads", KEY_ALIBI_HEADS, "N", 0, "nape: heads with ALiBi, the first ones (default 3)", 0},
    {"slopes", KEY_SLOPES, "S", 0,
     "Of ALiBi: linear (default: 1, 1/2, 1/3, ...), exp (1, 1/2, 1/4, ...), or numbers X,X,..., one per head", 0},
    {"rope-theta", KEY_ROPE_THETA, "X", 0, "rope: base of the wavelengths (default 10000)", 0},
    {"scale", KEY_SCALE, "T", 0,
     "What multiplies the queries of the heads without ALiBi (of all with alibi): none (default), ssmax, asentmax or focal", 0},
    {"temperature", KEY_TEMPERATURE, "X", 0, "focal: what scores are divided by (default 0.4)", 0},
    {"learn-temperature", KEY_LEARN_TEMPERATURE, NULL, 0,
     "focal: train one temperature per layer and head, from --temperature on", 0},
    {"learn-alpha", KEY_LEARN_ALPHA, NULL, 0, "Train one alpha per layer and head between 1.01 and 2, from --alpha on", 0},
    {0}};

static const char *const positions[] = {"nape", "alibi", "nope", "rope", NULL},
                         *const slopes[] = {"linear", "exp", "given", NULL},
                         *const scales[] = {"none", "ssmax", "asentmax", "focal", NULL};
static const char *name_of(const char *const *names, int32_t i) {
  for (int32_t n = 0; names[n]; n++)
    if (n == i) return names[n];
  return "unknown";
}
const char *cli_position_name(int32_t type) { return name_of(positions, type); }
const char *cli_slope_name(int32_t type) { return name_of(slopes, type); }
const char *cli_scale_name(int32_t type) { return name_of(scales, type); }

static int32_t choice(const struct argp_state *state, const char *option, const char *text, const char *const *names) {
  for (int32_t n = 0; names[n]; n++)
    if (!strcmp(text, names[n])) return n;
  argp_error(state, "%s is '%s', expected one of %s, %s, %s, %s", option, text, names[0], names[1], names[2], names[3]);
  return 0;
}

static void parse_slopes(const struct argp_state *state, char *text, cli_attention *a) {
  emx_model_config *c = a->config;
  a->slopes = true;
  if (!strcmp(text, "linear") || !strcmp(text, "exp")) {
    c->alibi_slope_type = *text == 'l' ? EMX_SLOPE_LINEAR : EMX_SLOPE_EXP;
    return;
  }
  c->alibi_slope_type = EMX_SLOPE_GIVEN;
  a->given = 0;
  for (char *next = text; next;) {
    char *item = next, *comma = strchr(next, ',');
    next = comma ? comma + 1 : NULL;
    if (comma) *comma = 0;
    if (a->given == EMX_MAX_ALIBI_SLOPES) argp_error(state, "--slopes: at most %d numbers", EMX_MAX_ALIBI_SLOPES);
    c->alibi_slopes[a->given++] = cli_real(state, "--slopes", item, 0, 1e6);
  }
}

/* After all options: what the choice leaves without effect is refused, and the fields that it fixes are set. */
static void finish(const struct argp_state *state, const cli_attention *a) {
  emx_model_config *c = a->config;
  const char *position = cli_position_name(c->position_type);
  if (a->alibi_heads && c->position_type != EMX_POSITION_NAPE)
    argp_error(state, "--alibi-heads has no effect with --position %s", position);
  if (c->position_type != EMX_POSITION_NAPE) c->alibi_num_heads = c->position_type == EMX_POSITION_ALIBI ? c->num_heads : 0;
  if (a->slopes && !c->alibi_num_heads) argp_error(state, "--slopes has no effect without a head with ALiBi");
  if (c->alibi_slope_type == EMX_SLOPE_GIVEN && a->given != c->alibi_num_heads)
    argp_error(state, "--slopes has %d numbers, there are %d heads with ALiBi", a->given, c->alibi_num_heads);
  if (a->rope_theta && c->position_type != EMX_POSITION_ROPE)
    argp_error(state, "--rope-theta has no effect with --position %s", position);
  if ((a->temperature || c->focal_learned) && c->attn_scale_type != EMX_ATTN_SCALE_FOCAL)
    argp_error(state, "--%stemperature has no effect with --scale %s", a->temperature ? "" : "learn-",
               cli_scale_name(c->attn_scale_type));
  if (c->alpha_learned && !(c->entmax_alpha > 1.01 && c->entmax_alpha < 2))
    argp_error(state, "--alpha is %g: with --learn-alpha it starts between 1.01 and 2, both excluded", c->entmax_alpha);
}

static error_t parse(int key, char *arg, struct argp_state *state) {
  cli_attention *a = state->input;
  emx_model_config *c = a->config;
  switch (key) {
    case KEY_POSITION: c->position_type = choice(state, "--position", arg, positions); return 0;
    case KEY_ALIBI_HEADS:
      c->alibi_num_heads = (int32_t)cli_int(state, "--alibi-heads", arg, 0, 4096);
      a->alibi_heads = true;
      return 0;
    case KEY_SLOPES: parse_slopes(state, arg, a); return 0;
    case KEY_ROPE_THETA:
      c->rope_theta = cli_real(state, "--rope-theta", arg, 1, 1e12);
      a->rope_theta = true;
      return 0;
    case KEY_SCALE: c->attn_scale_type = choice(state, "--scale", arg, scales); return 0;
    case KEY_TEMPERATURE:
      c->focal_temperature = cli_real(state, "--temperature", arg, 1e-3, 1e3);
      a->temperature = true;
      return 0;
    case KEY_LEARN_TEMPERATURE: c->focal_learned = 1; return 0;
    case KEY_LEARN_ALPHA: c->alpha_learned = 1; return 0;
    case ARGP_KEY_END: finish(state, a); return 0;
  }
  return ARGP_ERR_UNKNOWN;
}
const struct argp cli_attention_argp = {.options = option_table, .parser = parse};

int cli_attention_compare(const emx_model_config *was, const emx_model_config *now, const char *folder) {
  const struct {
    const char *option, *was, *now;
  } names[] = {{"--position", cli_position_name(was->position_type), cli_position_name(now->position_type)},
               {"--slopes", cli_slope_name(was->alibi_slope_type), cli_slope_name(now->alibi_slope_type)},
               {"--scale", cli_scale_name(was->attn_scale_type), cli_scale_name(now->attn_scale_type)}};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (strcmp(names[i].was, names[i].now))
      return cli_fail("%s is %s, the model in %s has %s", names[i].option, names[i].now, folder, names[i].was);
  const struct {
    const char *option;
    double was, now;
  } numbers[] = {{"--alibi-heads", was->alibi_num_heads, now->alibi_num_heads},
                 {"--learn-alpha", was->alpha_learned, now->alpha_learned},
                 {"--rope-theta", was->rope_theta, now->rope_theta},
                 {"--temperature", was->focal_temperature, now->focal_temperature},
                 {"--learn-temperature", was->focal_learned, now->focal_learned}};
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
    if (numbers[i].was != numbers[i].now)
      return cli_fail("%s is %g, the model in %s has %g", numbers[i].option, numbers[i].now, folder, numbers[i].was);
  for (int32_t h = 0; now->alibi_slope_type == EMX_SLOPE_GIVEN && h < now->alibi_num_heads; h++)
    if (was->alibi_slopes[h] != now->alibi_slopes[h])
      return cli_fail("--slopes has %g for head %d, the model in %s has %g", now->alibi_slopes[h], h, folder,
                      was->alibi_slopes[h]);
  return CLI_OK;
}
