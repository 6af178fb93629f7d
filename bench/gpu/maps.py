#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Row maps and losses on one NVIDIA GPU: libentmax.torch beside torch.softmax, cross_entropy and entmax by sorting, interleaved.

    PYTHONPATH=python/src LIBENTMAX_LIBRARY=build python3 bench/gpu/maps.py --out result.jsonl

Scores are normal of deviation `std`. Every method is captured in a CUDA graph that runs it once on each of several inputs in turn, more
than the second-level cache holds; a time is the median over the rounds of a replay divided by the inputs. What is timed:
  forward   weights of scores
  backward  gradient of the scores from the weights and theirs
  loss      loss and its gradient by the scores: ours in one call of the library (emx_entmax_loss), torch's by autograd
  autograd  the same through the module and its backward, as training does it
bytes: each input and output of the operation once, rows of zeros that need no reading included; roof: bytes / time of the rate of a large
copy on the same GPU. rel_err: relative L2 distance of the result from the same map of the same scores in float64 on eight rows.
Needs PyTorch with CUDA and a libentmax built with its CUDA back end. One JSON object a line goes to --out, a table to standard output.
"""
import argparse
import json
import statistics
from ctypes import byref

import torch
from torch.nn import functional as F

import libentmax.torch as T
from libentmax import _c
from libentmax.torch import _core, _maps

SHAPES = ((8192, 512), (4096, 32768), (512, 128256))
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
NAMES = {1.0: "softmax", 1.5: "entmax15", 2.0: "sparsemax", 1.3: "entmax1.3"}


def sorted_entmax15(x):
    """Entmax of alpha = 1.5 by sorting, as packages of PyTorch operators do it: the support is the longest prefix of the sorted row that lies
    above its own threshold."""
    z = (x - x.amax(-1, keepdim=True)).float() / 2
    s = z.sort(-1, descending=True).values
    k = torch.arange(1, x.shape[-1] + 1, device=x.device)
    mean, square = s.cumsum(-1) / k, s.square().cumsum(-1) / k
    tau = mean - ((1 - k * (square - mean.square())) / k).clamp_min(0).sqrt()
    size = (tau <= s).sum(-1, keepdim=True)
    return (z - tau.gather(-1, size - 1)).clamp_min(0).square().to(x.dtype)


def fused_loss(x, target, alpha, loss, dx):
    io = _core.fill(_c.make(_c.LossIo), x=x, target=target, loss=loss, dx=dx)
    _core.run(x, _c.lib.emx_entmax_loss, byref(_c.make(_c.EntmaxDesc, alpha=alpha)), byref(io))
    return dx


def autograd_loss(function, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def methods(x, d, target, target64, with_sort):
    """name: (what runs, bytes it must move)."""
    size = x.numel() * x.element_size()
    rows, n = x.shape
    loss, dx = x.new_empty(rows, dtype=torch.float32), torch.empty_like(x)
    p1 = torch.softmax(x, -1)
    out = {
        ("forward", "torch softmax"): (lambda: torch.softmax(x, -1), 2 * size),
        ("backward", "torch softmax"): (lambda: torch._softmax_backward_data(d, p1, -1, x.dtype), 3 * size),
        ("loss", "torch cross_entropy"): (lambda: autograd_loss(lambda y: F.cross_entropy(y, target64, reduction="sum"), x), 2 * size),
    }
    if with_sort:
        out["forward", "torch sorting entmax15"] = (lambda: sorted_entmax15(x), 2 * size)
    for alpha, name in NAMES.items():
        p = T.entmax(x, alpha)
        out["forward", name] = (lambda alpha=alpha: _maps._rows(x, None, None, _c.MAP_ENTMAX, alpha, 1.0), 2 * size)
        # A dp at a weight of zero is not read.
        out["backward", name] = (lambda alpha=alpha, p=p: _maps._rows_backward(p, d, None, _c.MAP_ENTMAX, alpha, False)[0],
                                 2 * size + int((p != 0).sum()) * x.element_size())
        out["loss", name] = (lambda alpha=alpha: fused_loss(x, target, alpha, loss, dx), 2 * size)
    module = T.Entmax15Loss(reduction="sum")
    out["autograd", "entmax15"] = (lambda: autograd_loss(lambda y: module(y, target64), x), 2 * size)
    return out


def reference(key, x, d, target):
    """What a method gives, in float64 by the CPU's back end, on the first rows."""
    what, name = key
    if name.startswith("torch"):
        return None
    alpha = {v: k for k, v in NAMES.items()}[name]
    x, d, target = x[:8].double().cpu().requires_grad_(), d[:8].double().cpu(), target[:8].cpu()
    if what == "forward":
        return T.entmax(x, alpha).detach()
    if what == "backward":
        return torch.autograd.grad(T.entmax(x, alpha), x, d)[0]
    return torch.autograd.grad(T.entmax_bisect_loss(x, target, alpha).sum(), x)[0]


def graph_of(run):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def once(graph):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def copy_rate():
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    graph = graph_of(lambda: b.copy_(a))
    return 2 * a.numel() * 4 / statistics.median(once(graph) for _ in range(15)) * 1e-6


def run(rows, n, dtype, std, rounds, roof):
    torch.manual_seed(rows)
    count = max(1, min(6, (192 << 20) // (rows * n * 4)))
    sets = []
    for _ in range(count):
        x = (torch.randn(rows, n, device="cuda") * std).to(DTYPES[dtype])
        target = torch.randint(n, (rows,), device="cuda")
        sets.append((x, torch.randn(rows, n, device="cuda").to(x.dtype), target.int(), target))
    all_methods = [methods(*s, with_sort=rows * n <= 1 << 27) for s in sets]
    graphs, times, errors = {}, {}, {}
    for key in all_methods[0]:
        want = reference(key, *sets[0][:2], sets[0][3])
        got = all_methods[0][key][0]()[:8].double().cpu()
        errors[key] = ((got - want).norm() / want.norm()).item() if want is not None else None
        graphs[key] = graph_of(lambda: [m[key][0]() for m in all_methods])
        times[key] = []
    for r in range(rounds + 2):
        for key, graph in graphs.items():
            ms = once(graph) / count
            if r > 1:
                times[key].append(ms)
    base = {"forward": ("forward", "torch softmax"), "backward": ("backward", "torch softmax"), "loss": ("loss", "torch cross_entropy"),
            "autograd": ("loss", "torch cross_entropy")}
    for key, (_, size) in all_methods[0].items():
        ms = statistics.median(times[key])
        yield {"device": torch.cuda.get_device_name(), "rows": rows, "n": n, "dtype": dtype, "std": std, "what": key[0],
               "method": key[1], "ms": ms, "ms_min": min(times[key]), "ms_mad": statistics.median(abs(t - ms) for t in times[key]),
               "vs_torch": statistics.median(times[base[key[0]]]) / ms, "bytes": size, "gbps": size / ms * 1e-6,
               "roof": size / ms * 1e-6 / roof, "rel_err": errors[key]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="gpu-maps.jsonl")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="f32 and normal scores alone")
    args = parser.parse_args()
    roof = copy_rate()
    print(f"# {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, copy {roof:.0f} GB/s")
    with open(args.out, "w") as out:
        for rows, n in SHAPES:
            for dtype, std in (("f32", 1.0),) if args.quick else (("f32", 1.0), ("bf16", 1.0), ("f32", 3.0), ("f32", 0.02)):
                for row in run(rows, n, dtype, std, args.rounds, roof):
                    out.write(json.dumps(row) + "\n")
                    out.flush()
                    print(f"{row['rows']:5} x {row['n']:6} {row['dtype']:4} std {row['std']:<5}{row['what']:9}{row['method']:24}"
                          f"{row['ms'] * 1e3:9.1f} us  mad {row['ms_mad'] * 1e3:6.1f}  x{row['vs_torch']:6.2f}  {row['gbps']:6.0f} GB/s "
                          f"{row['roof']:5.2f}  err {row['rel_err'] or 0:.1e}", flush=True)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
