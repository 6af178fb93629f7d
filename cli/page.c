/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "page.h"

#include "base/base.h"
#include "model/model.h"

#include <stdlib.h>
#include <string.h>

static const unsigned char template[] = {
#include "inspect_page.inc"
};

/* ---- lists */

static bool grow(page_rows *p, size_t more) {
  if (p->room - p->size >= more) return true;
  const size_t room = p->room + p->room / 2 + more + 65536;
  unsigned char *data = realloc(p->data, room);
  if (!data) return false;
  p->data = data;
  p->room = room;
  return true;
}
static void put_varint(page_rows *p, uint64_t x) {
  for (; x > 127; x >>= 7) p->data[p->size++] = (unsigned char)(128 | (x & 127));
  p->data[p->size++] = (unsigned char)x;
}
static void put_float(page_rows *p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  for (int i = 0; i < 32; i += 8) p->data[p->size++] = (unsigned char)(bits >> i);
}
static int heavier(const void *a, const void *b) {
  const float x = *(const float *)a, y = *(const float *)b;
  return (x < y) - (x > y);
}

int page_add(page_rows *p, const emx_report *report, const int32_t *index, const float *weight, int64_t n) {
  const int64_t kept = n < p->keep ? n : p->keep;
  float least = -1; /* the lightest one kept; how many have that weight, and for how many of those there is room */
  int64_t equals = 0, room = 0, met = 0;
  if (kept < n && kept) {
    if (p->sorted_room < n) {
      float *sorted = realloc(p->sorted, (size_t)n * sizeof *sorted);
      if (!sorted) return cli_nomem((size_t)n * sizeof *sorted, "the page");
      p->sorted = sorted;
      p->sorted_room = n;
    }
    memcpy(p->sorted, weight, (size_t)n * sizeof *weight);
    qsort(p->sorted, (size_t)n, sizeof *weight, heavier);
    least = p->sorted[kept - 1];
    for (int64_t i = kept - 1; i >= 0 && p->sorted[i] == least; i--) room++;
    equals = room;
    for (int64_t i = kept; i < n && p->sorted[i] == least; i++) equals++;
  }
  if (!grow(p, (size_t)kept * 7 + 32)) return cli_nomem(p->size + (size_t)kept * 7, "the page");
  put_varint(p, (uint64_t)n);
  put_varint(p, (uint64_t)kept);
  p->data[p->size++] = report->flags;
  put_float(p, report->tau);
  put_float(p, report->delta_bound);
  int64_t before = 0;
  for (int64_t i = 0; i < n && kept; i++) {
    if (weight[i] < least) continue;
    if (weight[i] == least) { /* evenly from all over the sequence */
      met++;
      if (met * room / equals == (met - 1) * room / equals) continue;
    }
    const double w = round((double)weight[i] * 65535);
    const unsigned level = w < 1 ? 1 : w > 65535 ? 65535 : (unsigned)w;
    put_varint(p, (uint64_t)(index[i] - before));
    p->data[p->size++] = (unsigned char)level;
    p->data[p->size++] = (unsigned char)(level >> 8);
    before = index[i];
  }
  return CLI_OK;
}
void page_free(page_rows *p) {
  free(p->data);
  free(p->sorted);
}

/* ---- the file */

static char *base64(const unsigned char *data, size_t n, size_t *size) {
  static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  char *out = malloc(n / 3 * 4 + 5), *at = out;
  for (size_t i = 0; out && i < n; i += 3) {
    const unsigned left = n - i < 3 ? (unsigned)(n - i) : 3;
    const unsigned x = (unsigned)data[i] << 16 | (left > 1 ? (unsigned)data[i + 1] << 8 : 0) | (left > 2 ? data[i + 2] : 0);
    for (unsigned k = 0; k < 4; k++) *at++ = k <= left ? digits[x >> (18 - 6 * k) & 63] : '=';
  }
  if (out) *size = (size_t)(at - out);
  return out;
}
json_t *page_base64(const unsigned char *data, size_t n) {
  size_t size = 0;
  char *text = base64(data, n, &size);
  json_t *out = text ? json_stringn(text, size) : NULL;
  free(text);
  return out;
}

/* JSON that may stand in a script element: "<" is only ever in strings. */
static char *script_json(json_t *head, size_t *size) {
  char *plain = head ? json_dumps(head, JSON_COMPACT | JSON_ENSURE_ASCII) : NULL, *out = NULL;
  json_decref(head);
  if (!plain) return NULL;
  size_t n = strlen(plain), angles = 0;
  for (size_t i = 0; i < n; i++) angles += plain[i] == '<';
  if ((out = malloc(n + 5 * angles + 1))) {
    char *at = out;
    for (size_t i = 0; i < n; i++) {
      if (plain[i] == '<') {
        memcpy(at, "\\u003c", 6);
        at += 6;
      } else {
        *at++ = plain[i];
      }
    }
    *size = (size_t)(at - out);
  }
  free(plain);
  return out;
}

int page_write(const char *path, json_t *head, const page_rows *rows, size_t *bytes) {
  size_t head_size = 0, rows_size = 0;
  char *json = script_json(head, &head_size), *lists = base64(rows->data, rows->size, &rows_size);
  int code = json && lists ? CLI_OK : cli_nomem(rows->size * 4 / 3, "the page");
  if (!code) {
    const unsigned char *end = template + sizeof template, *first = memmem(template, sizeof template, "@HEAD@", 6),
                        *second = memmem(template, sizeof template, "@ROWS@", 6);
    const emxi_bytes spans[] = {{template, (size_t)(first - template)},
                                {json, head_size},
                                {first + 6, (size_t)(second - first - 6)},
                                {lists, rows_size},
                                {second + 6, (size_t)(end - second - 6)}};
    *bytes = 0;
    for (int i = 0; i < 5; i++) *bytes += spans[i].size;
    code = cli_status(emxi_file_replace(path, spans, 5));
  }
  free(json);
  free(lists);
  return code;
}
