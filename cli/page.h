/* SPDX-License-Identifier: Apache-2.0
 * The page of `emx inspect`: one self-contained HTML file, python/src/libentmax/inspect.html with the data filled in. That file
 * describes the format; libentmax.plot of the Python package writes the same. */
#ifndef EMX_CLI_PAGE_H
#define EMX_CLI_PAGE_H

#include "cli.h"

/* Lists of all steps, layers and heads in this order. */
typedef struct page_rows {
  int64_t keep; /* tokens of a list that go into the page, the heaviest ones */
  unsigned char *data;
  size_t size, room;
  float *sorted; /* [sorted_room] scratch */
  int64_t sorted_room;
} page_rows;
/* Adds a head's list. CLI_ERROR: no memory. */
int page_add(page_rows *rows, const emx_report *report, const int32_t *index, const float *weight, int64_t n);
void page_free(page_rows *rows);

/* Writes the page, whole or not at all; takes `head`, the JSON of what is not a list. *bytes: of the file. */
int page_write(const char *path, json_t *head, const page_rows *rows, size_t *bytes);
/* n bytes in base64 as a JSON string. NULL: no memory. */
json_t *page_base64(const unsigned char *data, size_t n);

#endif
