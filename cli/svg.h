/* SPDX-License-Identifier: Apache-2.0
 * Line charts as SVG: the loss of a training, bits per byte against position, error against bytes read. */
#ifndef EMX_CLI_SVG_H
#define EMX_CLI_SVG_H

#include <stdbool.h>

typedef struct svg_series {
  const char *name;
  const double *x, *y; /* [n]; a point that is not finite, or not positive on a logarithmic axis, interrupts the line */
  int n;
  bool dashed, dots;
} svg_series;

typedef struct svg_chart {
  const char *title, *x_label, *y_label;
  bool log_x, log_y;
  const svg_series *series;
  int n;
} svg_chart;

/* CLI_OK, or CLI_ERROR with a message. */
int svg_write(const char *path, const svg_chart *chart);

#endif
