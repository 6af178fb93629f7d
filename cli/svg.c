/* SPDX-License-Identifier: Apache-2.0 */
#include "svg.h"

#include "cli.h"

#include <errno.h>
#include <string.h>

enum { WIDTH = 860, HEIGHT = 480, LEFT = 74, RIGHT = 210, TOP = 46, BOTTOM = 56 };

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

static void draw(FILE *f, const svg_chart *c) {
  const double w = WIDTH - LEFT - RIGHT, h = HEIGHT - TOP - BOTTOM;
  axis x = {NAN, NAN, c->log_x}, y = {NAN, NAN, c->log_y};
  for (int i = 0; i < c->n; i++) {
    widen(&x, c->series[i].x, &y, c->series[i].y, c->series[i].n);
    widen(&y, c->series[i].y, &x, c->series[i].x, c->series[i].n);
  }
  settle(&x);
  settle(&y);
  fprintf(f,
          "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" "
          "font-size=\"12\" fill=\"#222\">\n<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n",
          WIDTH, HEIGHT, WIDTH, HEIGHT, WIDTH, HEIGHT);
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
    const char *colour = colours[i % (int)(sizeof colours / sizeof *colours)],
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
  fputs("</svg>\n", f);
}

int svg_write(const char *path, const svg_chart *chart) {
  FILE *f = fopen(path, "w");
  if (!f) return cli_fail("cannot write %s: %s", path, strerror(errno));
  draw(f, chart);
  int bad = ferror(f);
  if (fclose(f) || bad) return cli_fail("cannot write %s: %s", path, strerror(errno));
  return CLI_OK;
}
