/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "svg.h"

#include "cli.h"

#include "model/model.h"

#include <stdlib.h>
#include <string.h>

enum { PLOT = 576, HEIGHT = 480, LEFT = 74, RIGHT = 210, TOP = 46, BOTTOM = 56, LETTER = 7 /* about the width of one */ };

/* Dark enough for white, told apart without red and green. */
static const char *const colours[] = {"#0b6fb8", "#d1570a", "#0a8f6a", "#8a3fa0", "#b08600", "#555555"};

typedef struct axis {
  double lo, hi;
  bool log;
} axis;

static bool usable(const axis *a, double v) { return isfinite(v) && (!a->log || v > 0); }
static double place(const axis *a, double v) {
  double lo = a->log ? log10(a->lo) : a->lo, hi = a->log ? log10(a->hi) : a->hi, u = a->log ? log10(v) : v;
  return (u - lo) / (hi - lo);
}

static void widen(axis *a, const double *v, const axis *other, const double *w, int n) {
  for (int i = 0; i < n; i++)
    if (usable(a, v[i]) && usable(other, w[i])) {
      if (!(a->lo <= v[i])) a->lo = v[i];
      if (!(a->hi >= v[i])) a->hi = v[i];
    }
}
static void settle(axis *a) {
  if (!(a->lo <= a->hi)) a->lo = a->log ? 1 : 0, a->hi = a->log ? 10 : 1;
  if (a->log) {
    a->lo /= 1.15;
    a->hi *= 1.15;
  } else {
    double pad = a->hi > a->lo ? 0.04 * (a->hi - a->lo) : 0.5;
    a->lo = a->lo >= 0 && a->lo - pad < 0 ? 0 : a->lo - pad;
    a->hi += pad;
  }
}

/* Round numbers inside the axis, at most 16. */
static int ticks(const axis *a, double *out) {
  int n = 0;
  if (a->log) {
    const double decades = log10(a->hi / a->lo);
    static const double steps[] = {1, 2, 5};
    for (int e = (int)floor(log10(a->lo)); e <= (int)ceil(log10(a->hi)) && n<16; e += decades> 14 ? 3 : 1)
      for (int s = 0; s < (decades < 2.5 ? 3 : 1) && n < 16; s++) {
        double v = steps[s] * pow(10, e);
        if (v >= a->lo && v <= a->hi) out[n++] = v;
      }
    return n;
  }
  double raw = (a->hi - a->lo) / 6, unit = pow(10, floor(log10(raw))),
         step = raw / unit < 1.5   ? unit
                : raw / unit < 3.5 ? 2 * unit
                : raw / unit < 7.5 ? 5 * unit
                                   : 10 * unit;
  for (double v = ceil(a->lo / step) * step; v <= a->hi + 1e-9 * step && n < 16; v += step)
    out[n++] = fabs(v) < 1e-9 * step ? 0 : v;
  return n;
}

static void text(FILE *f, double x, double y, const char *anchor, const char *style, const char *s) {
  fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\"%s>", x, y, anchor, style);
  for (; *s; s++) switch (*s) {
      case '<': fputs("&lt;", f); break;
      case '>': fputs("&gt;", f); break;
      case '&': fputs("&amp;", f); break;
      default: fputc(*s, f);
    }
  fputs("</text>\n", f);
}

static void begin(FILE *f, int width, int height) {
  fprintf(f,
          "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" "
          "font-size=\"12\" fill=\"#222\">\n<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n",
          width, height, width, height, width, height);
}

static void draw(FILE *f, const svg_chart *c) {
  const double w = PLOT, h = HEIGHT - TOP - BOTTOM;
  axis x = {NAN, NAN, c->log_x}, y = {NAN, NAN, c->log_y};
  for (int i = 0; i < c->n; i++) {
    widen(&x, c->series[i].x, &y, c->series[i].y, c->series[i].n);
    widen(&y, c->series[i].y, &x, c->series[i].x, c->series[i].n);
  }
  settle(&x);
  settle(&y);
  text(f, LEFT, 26, "start", " font-size=\"15\" font-weight=\"bold\"", c->title);
  double at[16];
  char label[32];
  int n = ticks(&x, at);
  for (int i = 0; i < n; i++) {
    double px = LEFT + w * place(&x, at[i]);
    fprintf(f, "<path d=\"M%.1f %dV%.1f\" stroke=\"#ddd\"/>\n", px, TOP, TOP + h);
    snprintf(label, sizeof label, "%.6g", at[i]);
    text(f, px, TOP + h + 18, "middle", "", label);
  }
  n = ticks(&y, at);
  for (int i = 0; i < n; i++) {
    double py = TOP + h * (1 - place(&y, at[i]));
    fprintf(f, "<path d=\"M%d %.1fH%.1f\" stroke=\"#ddd\"/>\n", LEFT, py, LEFT + w);
    snprintf(label, sizeof label, "%.6g", at[i]);
    text(f, LEFT - 8, py + 4, "end", "", label);
  }
  fprintf(f, "<rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%.1f\" fill=\"none\" stroke=\"#888\"/>\n", LEFT, TOP, w, h);
  text(f, LEFT + w / 2, HEIGHT - 14, "middle", "", c->x_label);
  fprintf(f, "<g transform=\"translate(18 %.1f) rotate(-90)\">", TOP + h / 2);
  text(f, 0, 0, "middle", "", c->y_label);
  fputs("</g>\n", f);
  for (int i = 0; i < c->n; i++) {
    const svg_series *s = &c->series[i];
    const char *colour = colours[(s->colour ? s->colour - 1 : i) % (int)(sizeof colours / sizeof *colours)],
               *dash = s->dashed ? " stroke-dasharray=\"6 4\"" : "";
    bool pen = false;
    fprintf(f, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"1.8\"%s d=\"", colour, dash);
    for (int j = 0; j < s->n; j++) {
      if (!usable(&x, s->x[j]) || !usable(&y, s->y[j])) {
        pen = false;
        continue;
      }
      fprintf(f, "%c%.1f %.1f", pen ? 'L' : 'M', LEFT + w * place(&x, s->x[j]), TOP + h * (1 - place(&y, s->y[j])));
      pen = true;
    }
    fputs("\"/>\n", f);
    for (int j = 0; s->dots && j < s->n; j++)
      if (usable(&x, s->x[j]) && usable(&y, s->y[j]))
        fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.2\" fill=\"%s\"/>\n", LEFT + w * place(&x, s->x[j]),
                TOP + h * (1 - place(&y, s->y[j])), colour);
    double ly = TOP + 14 + 20 * i;
    fprintf(f, "<path d=\"M%.1f %.1fh24\" stroke=\"%s\" stroke-width=\"1.8\"%s/>\n", LEFT + w + 12, ly - 4, colour, dash);
    if (s->dots) fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.2\" fill=\"%s\"/>\n", LEFT + w + 24, ly - 4, colour);
    text(f, LEFT + w + 42, ly, "start", "", s->name);
  }
}

static void draw_heat(FILE *f, const svg_heat *h) {
  enum { CELL_W = 58, CELL_H = 24, NAMES = 130, GAP = 26, HEAD = 74, FOOT = 50 };
  int panel = CELL_W * h->n_columns;
  for (int p = 0; p < h->n_panels; p++)
    if (LETTER * (int)strlen(h->panels[p]) > panel) panel = LETTER * (int)strlen(h->panels[p]);
  panel += GAP;
  const int width = NAMES + panel * h->n_panels, height = HEAD + CELL_H * h->n_rows + FOOT,
            title = 24 + (LETTER + 2) * (int)strlen(h->title);
  begin(f, width < title ? title : width, height);
  text(f, 12, 26, "start", " font-size=\"15\" font-weight=\"bold\"", h->title);
  for (int r = 0; r < h->n_rows; r++) text(f, NAMES - 8, HEAD + CELL_H * (r + 0.5) + 4, "end", "", h->rows[r]);
  for (int p = 0; p < h->n_panels; p++) {
    const int left = NAMES + panel * p;
    text(f, left, HEAD - 12, "start", " font-weight=\"bold\"", h->panels[p]);
    for (int c = 0; c < h->n_columns; c++)
      text(f, left + CELL_W * (c + 0.5), HEAD + CELL_H * h->n_rows + 16, "middle", "", h->columns[c]);
    for (int r = 0; r < h->n_rows; r++)
      for (int c = 0; c < h->n_columns; c++) {
        const double v = h->values[(p * h->n_rows + r) * h->n_columns + c], raw = (v - h->floor[r]) / (1 - h->floor[r]),
                     u = raw < 0   ? 0
                         : raw < 1 ? raw
                                   : 1;
        char label[16];
        /* from white to the first colour of the line charts */
        fprintf(f, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"rgb(%.0f,%.0f,%.0f)\" stroke=\"#ccc\"/>\n",
                left + CELL_W * c, HEAD + CELL_H * r, CELL_W, CELL_H, 255 - 244 * u, 255 - 144 * u, 255 - 71 * u);
        snprintf(label, sizeof label, "%.0f", 100 * v);
        text(f, left + CELL_W * (c + 0.5), HEAD + CELL_H * (r + 0.5) + 4, "middle", u > 0.55 ? " fill=\"white\"" : "", label);
      }
  }
  text(f, NAMES, height - 12, "start", "", h->x_label);
  fputs("</svg>\n", f);
}

/* A picture is drawn in memory, so that a full disk leaves the one of before. */
typedef struct canvas {
  char *data;
  size_t size;
} canvas;
static int finish(FILE *f, canvas *c, const char *path) {
  const int bad = ferror(f);
  int code;
  if (fclose(f) || bad) {
    code = cli_nomem(c->size, "a picture");
  } else {
    const emxi_bytes all = {c->data, c->size};
    code = cli_status(emxi_file_replace(path, &all, 1));
  }
  free(c->data);
  return code;
}
int svg_write_charts(const char *path, const svg_chart *charts, int n) {
  canvas c = {0};
  FILE *f = open_memstream(&c.data, &c.size);
  if (!f) return cli_nomem(BUFSIZ, "a picture");
  size_t longest = 0; /* name in a legend */
  for (int i = 0; i < n; i++)
    for (int j = 0; j < charts[i].n; j++)
      if (strlen(charts[i].series[j].name) > longest) longest = strlen(charts[i].series[j].name);
  const int legend = 50 + LETTER * (int)longest;
  begin(f, LEFT + PLOT + (legend > RIGHT ? legend : RIGHT), n * HEIGHT);
  for (int i = 0; i < n; i++) {
    fprintf(f, "<g transform=\"translate(0 %d)\">\n", i * HEIGHT);
    draw(f, &charts[i]);
    fputs("</g>\n", f);
  }
  fputs("</svg>\n", f);
  return finish(f, &c, path);
}
int svg_write(const char *path, const svg_chart *chart) { return svg_write_charts(path, chart, 1); }
int svg_write_heat(const char *path, const svg_heat *heat) {
  canvas c = {0};
  FILE *f = open_memstream(&c.data, &c.size);
  if (!f) return cli_nomem(BUFSIZ, "a picture");
  draw_heat(f, heat);
  return finish(f, &c, path);
}
