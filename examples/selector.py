# SPDX-License-Identifier: Apache-2.0
"""A page selector of your own, judged like the library's: error against bytes read, and what its report can promise.

    python3 examples/selector.py [selector.svg]

A selector is any function from page summaries and a query to page lists. Prints one line a setting; with a file name also
draws it (needs matplotlib). Bytes are those of the report: keys and values, and in all, with summaries and what the
certificate of the page list looked at; what the function of this file read of the summaries is not in them.
"""
import sys

import numpy as np

import libentmax

H, G, D, N, P = 8, 2, 64, 65536, 16  # query heads, KV heads, head dimension, keys, page size
rng = np.random.default_rng(0)
topic = np.repeat(rng.standard_normal((G, N // 256, D)), 256, axis=1)  # stretches of 256 keys have something in common
k = (topic + 0.7 * rng.standard_normal((G, N, D))).astype(np.float32)[None]
v = rng.standard_normal((1, G, N, D)).astype(np.float32)
q = 0.6 * (k[0, np.arange(H) * G // H, rng.integers(0, N, H)] + 0.3 * rng.standard_normal((H, D)))  # each looks for some key
q = q.astype(np.float32)[None, :, None]

cache = libentmax.KVCache(G, D, N, page_size=P, max_seqs=1)
seq = cache.new()
cache.append(seq, k, v)
exact = libentmax.attention(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), 1.5)


# The loop: summaries in, page lists out, a report back.
pages = cache.summaries(seq)


def farthest_reach(head, budget):
    """Pages by the score of their mean plus what the radius allows: Cauchy-Schwarz, so never below a key's true score."""
    g, query = head * G // H, q[0, head, 0]
    reach = np.where(np.isinf(pages.radius[:, g]), np.inf, pages.mean[:, g] @ query + pages.radius[:, g] * np.linalg.norm(query))
    return np.sort(np.argsort(-reach)[:budget // P])


def run(name, setting, decoded):
    r = decoded.reports
    data = (r["bytes_k"] + r["bytes_v"]).mean()
    row = (name, setting, float(data), float(data + r["bytes_meta"].mean()),
           float(np.linalg.norm(decoded.o - exact) / np.linalg.norm(exact)), float(r["delta_bound"].max()),
           int(decoded.certified.sum()))
    print("%-10s %8s  %9.0f bytes of K and V, %9.0f in all  error %.2e  delta_bound %.2e  certified %d of %d" % (row + (H,)))
    return row


budgets = (16, 32, 64, 128, 256, 512, 2048)
rows = [run("all", "", cache.decode(seq, q))]
rows += [run("certified", "", cache.decode(seq, q, select="certified"))]
rows += [run("gaussian", m, cache.decode(seq, q, select="gaussian", excess_margin=m)) for m in (0.0, 0.1, 0.3)]
rows += [run("topk", b, cache.decode(seq, q, select="topk", budget=b)) for b in budgets]
rows += [run("own", b, cache.decode(seq, q, pages=[farthest_reach(h, b) for h in range(H)])) for b in budgets]

if len(sys.argv) > 1:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(11, 4))
    for panel, column, label in ((panels[0], 2, "keys and values"), (panels[1], 3, "keys, values, summaries and certificate")):
        for name in dict.fromkeys(row[0] for row in rows):
            chosen = [row for row in rows if row[0] == name]
            panel.plot([row[column] for row in chosen], [row[4] for row in chosen], "o-" if column == 2 else "o", label=name)
        panel.set(xscale="log", yscale="log", xlabel="bytes read a head: " + label)
    panels[0].set_ylabel("relative error of the output")
    panels[0].legend()
    figure.savefig(sys.argv[1], bbox_inches="tight")
