/* SPDX-License-Identifier: Apache-2.0
 * What the kinds of emx eval share: models, selectors, and the cells of a generated test. */
#ifndef EMX_CLI_EVAL_H
#define EMX_CLI_EVAL_H

#include "cli.h"
#include "session.h"

enum { EVAL_MAX_MODELS = 4, EVAL_MAX_CELLS = 16 };

/* --len, --samples, --seed of a generated test, a child parser. Key range 1300. */
typedef struct eval_cells {
  int64_t len[EVAL_MAX_CELLS];
  int n_len;       /* 0: the test's default */
  int64_t samples; /* 0: the test's default */
  uint64_t seed;
  const char *set; /* an option that was given; NULL: none */
} eval_cells;
extern const struct argp eval_cells_argp;

/* --ruler, --depth and --show, a child parser. Key range 1320. */
typedef struct eval_ruler_options {
  int tasks[EVAL_MAX_CELLS], n_tasks;
  double depth[EVAL_MAX_CELLS]; /* shares */
  int n_depth;
  bool show;
} eval_ruler_options;
extern const struct argp eval_ruler_argp;

/* --task and --p-write, a child parser. Key range 1340. */
typedef struct eval_task_options {
  emx_task_desc task; /* kind 0: no --task */
  bool p_write;
} eval_task_options;
extern const struct argp eval_task_argp;

typedef struct eval_common {
  emx_ctx *ctx;
  const char *const *models; /* folders */
  int n_models;
  const cli_session *session;
  const cli_select *select;
  const eval_cells *cells;
  const char *svg; /* NULL: no picture */
  bool show;       /* the samples instead */
  bool json;
} eval_common;
/* text: the haystack; NULL: the one built in. */
int eval_ruler(const eval_common *e, const eval_ruler_options *o, const char *text, size_t size);

/* A ladder of lengths for every model. */
int eval_task(const eval_common *e, const eval_task_options *o);

/* What stands for a model in a picture: the last part of its folder. */
const char *eval_model_name(const char *folder);

#endif
