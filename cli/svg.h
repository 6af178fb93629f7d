/* SPDX-License-Identifier: Apache-2.0
 * Pictures as SVG. Line charts: the loss of a training, bits per byte against position, error against bytes read. Heat maps:
 * tests by length and depth. */
#ifndef EMX_CLI_SVG_H
#define EMX_CLI_SVG_H

#include <stdbool.h>

typedef struct svg_series {
  const char *name;
  const double *x, *y; /* [n]; a point that is not finite, or not positive on a logarithmic axis, interrupts the line */
  int n;
  bool dashed, dots;
  int colour; /* 0: that of its place; else its number, from 1 */
} svg_series;

typedef struct svg_chart {
  const char *title, *x_label, *y_label;
  bool log_x, log_y;
  const svg_series *series;
  int n;
} svg_chart;

/* CLI_OK, or CLI_ERROR with a message: the file is replaced whole or not at all. */
int svg_write(const char *path, const svg_chart *chart);
/* Several below one another. */
int svg_write_charts(const char *path, const svg_chart *charts, int n);

/* Shares as tables side by side: white at a row's floor and below it, blue at 1 and above, the number in the cell. */
typedef struct svg_heat {
  const char *title, *x_label;
  const char *const *panels, *const *rows, *const *columns; /* names */
  int n_panels, n_rows, n_columns;
  const double *values; /* [panels, rows, columns] */
  const double *floor;  /* [rows] */
} svg_heat;
int svg_write_heat(const char *path, const svg_heat *heat);

#endif
