#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws rows of bench/gpu/decode.py as SVG, with nothing but Python's library: time against length, and time against error.

    python3 bench/gpu/plot.py bench/results/decode-gpu-h100.jsonl docs/pictures/decode-gpu.svg

Of a second file and later ones only the methods that those before lack, such as EntmaxKV's beside a newer build of ours.
"""
import json
import math
import sys

COLOURS = {"softmax": "#444444", "ours softmax": "#999999", "ours all 1.5": "#1f77b4", "ours all 2": "#17a2b8", "ours gaussian 1.5": "#d62728",
           "ours topk 1% 1.5": "#2ca02c", "ours certified 1.5": "#000000", "EntmaxKV gaussian corrected": "#e377c2",
           "EntmaxKV top-k 5%": "#bcbd22"}
LABELS = {"softmax": "softmax, the faster of cuDNN and FlashAttention", "ours softmax": "softmax, ours", "ours all 1.5": "ALL, alpha 1.5 (exact)",
          "ours all 2": "ALL, alpha 2 (exact)", "ours gaussian 1.5": "GAUSSIAN, alpha 1.5", "ours topk 1% 1.5": "TOPK 1 %, alpha 1.5",
          "ours certified 1.5": "CERTIFIED, alpha 1.5 (exact)", "EntmaxKV gaussian corrected": "EntmaxKV 0.1.0, Gaussian corrected",
          "EntmaxKV top-k 5%": "EntmaxKV 0.1.0, top-k 5 %"}
MARKS = {"iid": "circle", "ar:0.9": "square", "ar:0.99": "diamond", "topics": "triangle", "topics:24": "wedge", "outlier:4,50": "cross", "flat:0.05": "bar"}
WIDTH, HEIGHT, LEFT, TOP = 400, 300, 70, 40


def text(x, y, s, anchor="middle", size=12, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{more}>{s}</text>'


def mark(kind, x, y, colour):
    shape = {"circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "square": "M-3.5 -3.5h7v7h-7z", "diamond": "M0 -5L5 0L0 5L-5 0z",
             "triangle": "M0 -5L5 4H-5z", "wedge": "M0 5L5 -4H-5z", "cross": "M-5 -1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z", "bar": "M-5 -2h10v4h-10z"}[kind]
    return f'<path d="{shape}" transform="translate({x:.1f} {y:.1f})" fill="{colour}"/>'


class Axes:
    """A panel with two logarithmic axes."""

    def __init__(self, x0, y0, title, x_range, y_range, x_label, y_label, x_ticks, y_ticks):
        self.x0, self.y0, self.x_range, self.y_range = x0 + LEFT, y0 + TOP, x_range, y_range
        self.out = [text(self.x0 + WIDTH / 2, y0 + 22, title, size=14, more=' font-weight="bold"')]
        for value, name in x_ticks:
            x = self.x(value)
            self.out += [f'<path d="M{x:.1f} {self.y0}V{self.y0 + HEIGHT}" stroke="#ddd"/>', text(x, self.y0 + HEIGHT + 16, name)]
        for value, name in y_ticks:
            y = self.y(value)
            self.out += [f'<path d="M{self.x0} {y:.1f}H{self.x0 + WIDTH}" stroke="#ddd"/>', text(self.x0 - 6, y + 4, name, "end")]
        self.out += [f'<rect x="{self.x0}" y="{self.y0}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>',
                     text(self.x0 + WIDTH / 2, self.y0 + HEIGHT + 34, x_label),
                     text(0, 0, y_label, more=f' transform="translate({x0 + 18} {self.y0 + HEIGHT / 2}) rotate(-90)"')]

    def at(self, value, limits):
        low, high = (math.log(v) for v in limits)
        return min(max((math.log(value) - low) / (high - low), 0), 1)

    def x(self, value):
        return self.x0 + WIDTH * self.at(value, self.x_range)

    def y(self, value):
        return self.y0 + HEIGHT * (1 - self.at(value, self.y_range))


def main():
    rows = []
    for name in sys.argv[1:-1]:
        have = {r["method"] for r in rows}
        with open(name) as f:
            rows += [r for r in map(json.loads, f) if r["method"] not in have]
    rows = [r for r in rows if r["batch"] == 1]
    fastest = {}
    for r in rows:
        key = (r["data"], r["n"], r["d"])
        if r["method"].startswith("softmax ") and r["ms"] < fastest.get(key, {"ms": math.inf})["ms"]:
            fastest[key] = r
    shown = [m for m in COLOURS if m == "softmax" or any(r["method"] == m for r in rows)]
    kinds = [d for d in MARKS if any(r["data"] == d for r in rows)]
    rows = [r for r in rows if r["method"] in COLOURS] + [dict(r, method="softmax") for r in fastest.values()]
    shapes = sorted({(r["d"], f"{r['hq']}/{r['hkv']} heads, D = {r['d']}") for r in rows})
    lengths = sorted({r["n"] for r in rows})
    times = [(20, "20"), (50, "50"), (100, "100"), (200, "200"), (500, "500"), (1000, "1000"), (2000, "2000")]
    ticks = [(n, f"{n >> 10}K" if n < 1 << 20 else f"{n >> 20}M") for n in lengths]
    errors = [(10.0**e, f"1e{e}" if e else "1") for e in range(-7, 1)]
    height, out = TOP + HEIGHT + 60, []
    for column, (d, name) in enumerate(shapes):
        x0 = column * (LEFT + WIDTH + 20)
        a = Axes(x0, 0, f"Topics, {name}", (lengths[0] * 0.9, lengths[-1] * 1.1), (20, 2000), "tokens", "microseconds", ticks, times)
        out += a.out
        for method, colour in COLOURS.items():
            points = sorted((r["n"], r["ms"] * 1e3) for r in rows if r["d"] == d and r["data"] == "topics" and r["method"] == method)
            if not points:
                continue
            out.append('<path d="M' + "L".join(f"{a.x(n):.1f} {a.y(t):.1f}" for n, t in points) + f'" fill="none" stroke="{colour}" stroke-width="2"/>')
            out += [mark("triangle", a.x(n), a.y(t), colour) for n, t in points]
        a = Axes(x0, height, f"{lengths[-1] >> 20}M tokens, {name}", (1e-7, 3), (100, 4000), "relative error of the output (float64, same alpha)",
                 "microseconds", errors, times[2:] + [(4000, "4000")])
        out += a.out
        for r in rows:
            if r["d"] == d and r["n"] == lengths[-1] and r.get("rel_err") and r["data"] in MARKS:
                out.append(mark(MARKS[r["data"]], a.x(max(r["rel_err"], 1e-7)), a.y(r["ms"] * 1e3), COLOURS[r["method"]]))
        soft = a.y(min(r["ms"] for k, r in fastest.items() if k[1] == lengths[-1] and k[2] == d) * 1e3)
        out.append(f'<path d="M{a.x0} {soft:.1f}h{WIDTH}" stroke="{COLOURS["softmax"]}" stroke-dasharray="6 3" stroke-width="1.5"/>')
    y = 2 * height + 8
    below = y + 18 * ((len(shown) + 1) // 2) + 10
    for i, (method, colour) in enumerate((m, COLOURS[m]) for m in shown):
        x = LEFT + i % 2 * 480
        out += [f'<path d="M{x} {y + 18 * (i // 2)}h22" stroke="{colour}" stroke-width="3"/>', text(x + 30, y + 4 + 18 * (i // 2), LABELS[method], "start")]
    for i, (data, kind) in enumerate((d, MARKS[d]) for d in kinds):
        out += [mark(kind, LEFT + 8 + 130 * i, below, "#222"), text(LEFT + 20 + 130 * i, below + 4, data, "start")]
    width = len(shapes) * (LEFT + WIDTH + 20) + 10
    with open(sys.argv[-1], "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{below + 20}" viewBox="0 0 {width} {below + 20}" font-family="sans-serif" '
                'fill="#222">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(out) + "\n</svg>\n")


if __name__ == "__main__":
    main()
