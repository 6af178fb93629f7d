#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""libentmax.torch beside the entmax package and torch itself, forward and backward, in one process.

Every round runs every method once, in turn, from alternate ends; slow ones (the entmax package on long rows) in every fourth
round only. Reported are medians over the rounds with their median absolute deviation, and the median of the ratios to
`reference` within a round. Threads of the other library are given time to fall asleep before a measurement. Errors are against
float64: maps and losses on 8 rows, the largest error of a weight (a loss: relative) and the relative L2 error of the gradient;
attention on one head, relative L2 errors of the output and of the three gradients.

  PYTHONPATH=python/src LIBENTMAX_LIBRARY=build python bench/python/torch_speed.py maps | loss | attention
"""
import argparse
import json
import platform
import statistics
import sys
import time

import torch
import libentmax.torch as T

try:
    import entmax as package
except ImportError:
    package = None
F = torch.nn.functional


def bisect(x, alpha, dim=-1):
    """Entmax of float64 rows, differentiable: bisection, then one more exact step on the support for the gradient's sake."""
    if alpha == 1:
        return x.softmax(dim)
    a, b = alpha - 1, 1 / (alpha - 1)
    with torch.no_grad():
        z = a * x
        high = z.amax(dim, keepdim=True)
        low = high - 1
        for _ in range(60):
            middle = (low + high) / 2
            above = (z - middle).clamp(min=0).pow(b).sum(dim, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        y = (z - low).clamp(min=0)
        slope = torch.where(y > 0, y, torch.ones_like(y)).pow(b - 1) * (y > 0)
        slope /= slope.sum(dim, keepdim=True)
    tau = low + (slope * (a * x - z)).sum(dim, keepdim=True)  # d tau = sum(slope d z) / sum(slope)
    return (a * x - tau).clamp(min=0).pow(b)


def l2(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def maps(o):
    torch.manual_seed(o.seed)
    x, d = torch.randn(o.rows, o.n) * o.std, torch.randn(o.rows, o.n)
    methods = {"libentmax entmax15": (T.entmax15, 1.5, True), "torch softmax": (lambda x: x.softmax(-1), 1, True),
               "libentmax softmax": (lambda x: T.entmax(x, 1.0), 1, True)}
    if package:
        methods.update({"entmax entmax15": (package.entmax15, 1.5, False),
                        "entmax entmax_bisect": (package.entmax_bisect, 1.5, False),
                        "entmax entmax15(k=100)": (lambda x: package.entmax15(x, k=100), 1.5, False)})

    def errors(f, alpha):
        some, exact = x[:8].clone().requires_grad_(), x[:8].double().requires_grad_()
        got, want = f(some), bisect(exact, alpha)
        got.backward(d[:8])
        want.backward(d[:8].double())
        return {"err": (got.double() - want).abs().max().item(), "err_grad": l2(some.grad, exact.grad)}
    shape = {"rows": o.rows, "n": o.n, "std": o.std}
    return shape, "torch softmax", {n: (lambda f=f: passes(f, (x,), d), lambda f=f, a=a: errors(f, a), fast)
                                    for n, (f, a, fast) in methods.items()}


def loss(o):
    torch.manual_seed(o.seed)
    x, target = torch.randn(o.rows, o.n) * o.std, torch.randint(0, o.n, (o.rows,))
    methods = {"libentmax Entmax15Loss": (T.Entmax15Loss(), 1.5, True), "torch cross_entropy": (F.cross_entropy, 1, True)}
    if package:
        methods.update({"entmax Entmax15Loss": (package.Entmax15Loss(), 1.5, True)})

    def errors(f, alpha):
        some, exact = x[:8].clone().requires_grad_(), x[:8].double()
        got = f(some, target[:8])
        got.backward()
        p = bisect(exact, alpha)
        entropy = -torch.special.xlogy(p, p).sum(-1) if alpha == 1 else (1 - p.pow(alpha).sum(-1)) / (alpha * (alpha - 1))
        e = F.one_hot(target[:8], o.n)
        want = (entropy + ((p - e) * exact).sum(-1)).mean()
        return {"err": abs(got.item() / want.item() - 1), "err_grad": l2(some.grad, (p - e) / 8)}
    shape = {"rows": o.rows, "n": o.n, "std": o.std}
    return shape, "torch cross_entropy", {n: (lambda f=f: passes(lambda x: f(x, target), (x,), torch.ones(())),
                                              lambda f=f, a=a: errors(f, a), fast) for n, (f, a, fast) in methods.items()}


def attention(o):
    torch.manual_seed(o.seed)
    shape = (1, o.heads, o.length, o.d)
    q, k, v, d_o = (torch.randn(shape) for _ in range(4))
    methods = {"libentmax attention": (lambda *t: T.attention(*t, is_causal=True), 1.5),
               "torch scaled_dot_product_attention": (lambda *t: F.scaled_dot_product_attention(*t, is_causal=True), 1)}

    def errors(f, alpha):
        some = [t[:, :1].clone().requires_grad_() for t in (q, k, v)]
        got = f(*some)
        got.backward(d_o[:, :1])
        exact = [t[0, 0].double().requires_grad_() for t in (q, k, v)]
        scores = exact[0] @ exact[1].T / o.d**0.5
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -1e4)
        want = bisect(scores, alpha) @ exact[2]
        want.backward(d_o[0, 0].double())
        return {"err": l2(got[0, 0], want), "err_grad": max(l2(a.grad[0, 0], b.grad) for a, b in zip(some, exact))}
    shape = {"n": o.length, "h": o.heads, "d": o.d, "causal": True}
    return shape, "torch scaled_dot_product_attention", {
        n: (lambda f=f: passes(f, (q, k, v), d_o), lambda f=f, a=a: errors(f, a), True) for n, (f, a) in methods.items()}


def passes(f, tensors, gradient):
    """Seconds of the forward and of the backward pass."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    start = time.perf_counter()
    out = f(*tensors)
    middle = time.perf_counter()
    out.backward(gradient)
    return middle - start, time.perf_counter() - middle


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("what", choices=("maps", "loss", "attention"))
    ap.add_argument("--rows", type=int, default=1024)
    ap.add_argument("--n", type=int, default=32000)
    ap.add_argument("--std", type=float, default=1.0, help="of the scores of maps and losses")
    ap.add_argument("--length", type=int, default=4096)
    ap.add_argument("--heads", type=int, default=8)
    ap.add_argument("--d", type=int, default=64)
    ap.add_argument("--rounds", type=int, default=9)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--pause", type=float, default=0.3, help="seconds before a measurement")
    o = ap.parse_args()
    torch.set_num_threads(o.threads)
    shape, reference, methods = {"maps": maps, "loss": loss, "attention": attention}[o.what](o)
    errors = {name: error() for name, (_, error, _) in methods.items()}  # and everything has run once
    times = {name: {} for name in methods}  # of each round that it ran in
    for r in range(o.rounds):
        for name in list(methods)[::1 - 2 * (r % 2)]:
            run, _, fast = methods[name]
            if fast or r % 4 == 0:
                time.sleep(o.pause)
                times[name][r] = run()
                print(f"\r{r + 1}/{o.rounds} {name:40}", end="", file=sys.stderr)
    print(file=sys.stderr)
    for name, t in times.items():
        whole = {r: a + b for r, (a, b) in t.items()}
        median = statistics.median(whole.values())
        row = {"what": o.what, "method": name, **shape, "dtype": "f32", "threads": o.threads, "torch": torch.__version__,
               "python": platform.python_version(), "rounds": len(t), "ms": 1e3 * median, "ms_min": 1e3 * min(whole.values()),
               "ms_mad": 1e3 * statistics.median(abs(w - median) for w in whole.values()),
               "ms_forward": 1e3 * statistics.median(a for a, _ in t.values()),
               "ms_backward": 1e3 * statistics.median(b for _, b in t.values()),
               "reference": reference, **errors[name],
               "vs_reference": statistics.median(w / sum(times[reference][r]) for r, w in whole.items())}
        print(json.dumps({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()}))


if __name__ == "__main__":
    main()
