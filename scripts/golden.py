#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes cli/golden_data.inc, the values that `emx selftest` compares with: python3 scripts/golden.py >cli/golden_data.inc

Computed with 50 decimal digits from the definitions (bisection for the threshold), and shares no code with the library. The inputs are
small multiples of powers of two from a linear congruential generator (cli/golden.c has the same), so that f32, f16 and bf16 hold them
exactly and every q.k is exact in float: what the library gets wrong is its own error.
"""
from decimal import Decimal, getcontext

getcontext().prec = 50


def numbers(seed, n, scale):
    """n multiples of scale / 256 in [-scale/2, scale/2)."""
    x, out = seed, []
    for _ in range(n):
        x = (x * 1664525 + 1013904223) % 2**32
        out.append(Decimal((x >> 24) - 128) * Decimal(scale) / 256)
    return out


def entmax(s, alpha):
    """(weights, tau, support) of a row of scores; alpha = 1 is softmax, which has no threshold: tau is the log of the sum."""
    top = max(s)
    if alpha == 1:
        e = [(x - top).exp() for x in s]
        return [x / sum(e) for x in e], sum(e).ln() + top, len(s)
    a = alpha - 1
    b = 1 / a

    def weights(tau):
        return [(a * x - tau) ** b if a * x > tau else Decimal(0) for x in s]

    low, high = a * top - 1, a * top  # one weight is at least 1 at `low`, all are 0 at `high`
    for _ in range(160):
        middle = (low + high) / 2
        if sum(weights(middle)) > 1:
            low = middle
        else:
            high = middle
    p = weights(low)
    return p, low, sum(x > 0 for x in p)


def attend(q, keys, values, alpha, scale, slope, position):
    s = [scale * sum(x * y for x, y in zip(q, k)) - slope * abs(position - j) for j, k in enumerate(keys)]
    p, tau, support = entmax(s, alpha)
    return [sum(w * v[d] for w, v in zip(p, values)) for d in range(len(q))], p, tau, support


def rows(x, width):
    return [x[i : i + width] for i in range(0, len(x), width)]


def emit(name, numbers):
    lines, line = [], " " * 7
    for x in numbers:
        text = " " + (repr(float(x)) if isinstance(x, Decimal) else str(x)) + ","
        if len(line + text) > 130:
            lines.append(line)
            line = " " * 7
        line += text
    print(f"    .{name} = {{\n" + "\n".join(lines + [line[:-1]]) + "},")


D = 16
HALF = Decimal(1) / 2
print("/* Written by scripts/golden.py. */")

# rows of the mapping
p, tau, support = [], [], []
for i, alpha in enumerate([1, Decimal("1.25"), Decimal("1.5"), 2, 4]):
    row = entmax(numbers(11 + i, 37, 8), Decimal(alpha))
    p += row[0]
    tau.append(row[1])
    support.append(row[2])
emit("map_p", p)
emit("map_tau", tau)
emit("map_support", support)

# dense attention, causal, two query heads over one KV head, ALiBi slopes 1/2 and 1/4
q, k, v = (numbers(21, 2 * 3 * D, 8), numbers(22, 37 * D, 1), numbers(23, 37 * D, 1))
q, k, v = rows(q, D), rows(k, D), rows(v, D)
o, tau, support = [], [], []
for alpha in [1, Decimal("1.5"), 2]:
    for head in range(2):
        for i in range(3):
            seen = 37 - 3 + i + 1
            r = attend(q[head * 3 + i], k[:seen], v[:seen], Decimal(alpha), Decimal(1) / 4, HALF / (head + 1), 37 - 3 + i)
            o += r[0]
            tau.append(r[2])
            support.append(r[3])
emit("attn_o", o)
emit("attn_tau", tau)
emit("attn_support", support)

# decode of one token over 200 keys in pages of 16; key 77 is a quarter of head 0's query, so that one page has it all
q, k, v = (numbers(31, 2 * D, 8), numbers(32, 200 * D, 1), numbers(33, 200 * D, 1))
q, k, v = rows(q, D), rows(k, D), rows(v, D)
k[77] = [x / 4 for x in q[0]]
o, tau, support, mass = [], [], [], []
for alpha in [1, Decimal("1.5")]:
    for head in range(2):
        r = attend(q[head], k, v, Decimal(alpha), HALF, 0, 199)
        o += r[0]
        tau.append(r[2])
        support.append(r[3])
        mass += [sum(page) for page in rows(r[1], 16)]
emit("decode_o", o)
emit("decode_tau", tau)
emit("decode_support", support)
emit("decode_mass", mass)
