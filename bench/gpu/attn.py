#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A training step of causal attention on one NVIDIA GPU: PyTorch's softmax attention (cuDNN, FlashAttention) and libentmax, interleaved.

    python3 bench/gpu/attn.py --lib build/libentmax.so --out result.json

Data as in docs/performance.md: `clusters` C (C clusters of 128-token segments; 1: independent numbers) or flat rows (score std 0.05), B*H = 16,
bf16. Every method is captured in a CUDA graph; a time is the median over the rounds of one replay, in ms. Forward alone, and forward with
backward; `lists` is the capacity of the support lists that forward saves for backward (0: none, backward finds the support again).
Softmax is a different function and the speed to beat. rel_err: relative L2 distance from float64 attention, of o and dq over sampled rows,
of dk and dv over one whole head (N up to 8192); sum_err: largest distance of the sum of p at the returned tau from one, over the sample.
density: share of the visible 64 x 64 tiles that have a weight; support: mean number of weights a row; dense: share of rows with a support of
more than 256. Where package `adasplash` (AdaSplash-2, github.com/deep-spin/adasplash) can be imported it runs, too, at its defaults and outside graphs: it
allocates and waits, and its kernels compile and try some fifty variants, for minutes, at the first call of each shape; its sum_err is that
of its output over values of one, in bf16. Needs PyTorch with CUDA and a libentmax built with its CUDA back end. One JSON object a line goes
to --out.
"""
import argparse
import ctypes as C
import json
import math
import statistics

import torch
import torch.nn.functional as F
from decode import Library, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


try:
    import adasplash
except ImportError:
    adasplash = None


class Desc(C.Structure):
    _fields_ = [("size", C.c_uint32), ("flags", C.c_uint32), ("alpha", C.c_double), ("scale", C.c_float), ("layout", C.c_int32),
                ("left", C.c_int32), ("right", C.c_int32)]


class Io(C.Structure):
    _fields_ = [("size", C.c_uint32), ("reserved", C.c_uint32)] + [(n, C.POINTER(Tensor)) for n in (
        "q k v o tau support alibi_slopes block_table seqlens_q seqlens_k cu_seqlens_q cu_seqlens_k d_o d_q d_k d_v lse alphas d_alpha "
        "support_index").split()]


class Entmax:
    """One shape's calls and their tensors."""

    def __init__(self, lib, q, k, v, d_o, alpha, lists, slopes=None):
        self.lib, self.t = lib, dict(q=q, k=k, v=v, d_o=d_o)
        if slopes is not None:
            self.t["alibi_slopes"] = slopes
        rows = q.shape[:3]
        new = lambda like: torch.empty_like(like)
        self.t.update(o=new(q), d_q=new(q), d_k=new(k), d_v=new(v), tau=torch.empty(rows, dtype=torch.float32, device="cuda"),
                      support=torch.empty(rows, dtype=torch.int32, device="cuda"))
        if lists:
            self.t["support_index"] = torch.empty(*rows, lists, dtype=torch.int32, device="cuda")
        self.desc = lib.init("emx_attn_desc", Desc)
        self.desc.alpha = alpha
        bias = ["alibi_slopes"] if slopes is not None else []
        index = bias + ["support_index"] if lists else bias
        self.io = [self.make(["q", "k", "v", "o", "tau", "support"] + index),
                   self.make(["q", "k", "v", "tau", "d_o", "d_q", "d_k", "d_v"] + (["support"] + index if lists else bias))]
        sizes = []
        for p in range(2):
            n = C.c_size_t()
            lib.call("emx_attn_workspace_size", lib.ctx, C.byref(self.desc), C.byref(self.io[p]), p, C.byref(n))
            sizes.append(n.value)
        self.bytes = max(sizes)
        self.work = torch.empty(self.bytes, dtype=torch.uint8, device="cuda")

    def make(self, names):
        io = self.lib.init("emx_attn_io", Io)
        for n in names:
            setattr(io, n, C.pointer(self.lib.tensor(self.t[n])))
        return io

    def run(self, backward):
        lib, work, size = self.lib, C.c_void_p(self.work.data_ptr()), C.c_size_t(self.bytes)
        lib.call("emx_ctx_set_stream", lib.ctx, C.c_void_p(torch.cuda.current_stream().cuda_stream))
        lib.call("emx_attn_forward", lib.ctx, C.byref(self.desc), C.byref(self.io[0]), work, size)
        if backward:
            lib.call("emx_attn_backward", lib.ctx, C.byref(self.desc), C.byref(self.io[1]), work, size)


def data(n, d, case, heads=16):
    g = torch.Generator(device="cuda").manual_seed(1)
    normal = lambda *s: torch.randn(*s, generator=g, device="cuda")
    if case.startswith("flat"):
        q, k = normal(1, heads, n, d) * float(case.split(":")[1]), normal(1, heads, n, d)
    else:
        c = int(case.split(":")[1])
        a, noise = (0, 1) if c == 1 else (math.sqrt({4: 6, 16: 8}[c] * math.sqrt(d)), 0.5)
        centre = F.normalize(normal(heads, c, d), dim=-1)
        which = torch.randint(c, (heads, (n + 127) // 128), generator=g, device="cuda").repeat_interleave(128, 1)[:, :n]
        add = a * torch.gather(centre, 1, which[..., None].expand(-1, -1, d))[None]
        q, k = normal(1, heads, n, d) * noise + add, normal(1, heads, n, d) * noise + add
    return [x.bfloat16() for x in (q, k, normal(1, heads, n, d), normal(1, heads, n, d))]


def entmax15(z):
    """Rows of z (float64, -inf: masked); tau by bisection to the end, then in closed form."""
    z = z / 2
    hi = z.amax(-1, keepdim=True)
    lo = hi - 1
    for _ in range(60):
        mid = (lo + hi) / 2
        above = ((z - mid).clamp(min=0) ** 2).sum(-1, keepdim=True) > 1
        lo, hi = torch.where(above, mid, lo), torch.where(above, hi, mid)
    return (z - lo).clamp(min=0) ** 2, lo


def check(t, n, d):
    """Errors of sampled rows; of one head's dk and dv where it is small."""
    scale, out = 1 / math.sqrt(d), {}
    h, rows = 5, torch.randint(n, (128,), generator=torch.Generator().manual_seed(2)).cuda()
    if n <= 8192:
        rows = torch.arange(n, device="cuda")
    q, k, v, d_o = (t[x][0, h].double() for x in ("q", "k", "v", "d_o"))
    err = {x: [0.0, 0.0] for x in ("o", "d_q", "d_k", "d_v")}
    dk, dv, sums = torch.zeros_like(k), torch.zeros_like(v), 0.0
    for part in rows.split(1024):
        z = (q[part] @ k.T) * scale
        if "alibi_slopes" in t:
            z -= t["alibi_slopes"][h].double() * (part[:, None] - torch.arange(n, device="cuda")[None]).abs()
        z.masked_fill_(torch.arange(n, device="cuda")[None] > part[:, None], -math.inf)
        p, _ = entmax15(z)
        if "tau" in t:
            sums = max(sums, (((z / 2 - t["tau"][0, h, part].double()[:, None]).clamp(min=0) ** 2).sum(-1) - 1).abs().max().item())
        u, dp = p.sqrt(), d_o[part] @ v.T
        ds = u * (dp - (u * dp).sum(-1, keepdim=True) / u.sum(-1, keepdim=True)) * scale
        for name, want in (("o", p @ v), ("d_q", ds @ k)):
            err[name][0] += (t[name][0, h, part].double() - want).square().sum().item()
            err[name][1] += want.square().sum().item()
        dk += ds.T @ q[part]
        dv += p.T @ d_o[part]
    if n <= 8192:
        for name, want in (("d_k", dk), ("d_v", dv)):
            err[name] = [(t[name][0, h].double() - want).square().sum().item(), want.square().sum().item()]
    for name, (a, b) in err.items():
        out["err_" + name] = math.sqrt(a / b) if b else None
    out["sum_err"] = sums if "tau" in t else None
    return out


def density(e, n, d):
    """Share of visible tiles with a weight, over one head."""
    q, k, tau = e.t["q"][0, 5].float(), e.t["k"][0, 5].float(), e.t["tau"][0, 5]
    active = visible = 0
    for i in range(0, n, 1024):
        before = torch.arange(i, min(i + 1024, n), device="cuda")[:, None] - torch.arange(n, device="cuda")[None]
        z = (q[i:i + 1024] @ k.T) / math.sqrt(d)
        if "alibi_slopes" in e.t:
            z -= e.t["alibi_slopes"][5] * before
        z = (z / 2 > tau[i:i + 1024, None]) & (before >= 0)
        m = n // 64 * 64
        active += z[:, :m].reshape(-1, 64, m // 64, 64).any(3).any(1).sum().item()
        visible += sum((i + x) // 64 + 1 for x in range(0, min(1024, n - i), 64))
    return active / visible


def splash(q, k, v, d_o, backward):
    if not backward:
        with torch.no_grad():
            return adasplash.adasplash2(q, k, v)
    x = [t.detach().requires_grad_() for t in (q, k, v)]
    y = adasplash.adasplash2(*x)
    return y.detach(), *torch.autograd.grad(y, x, d_o)


def rival(q, k, v, d_o, n, d):
    """Errors of AdaSplash-2; raises what it raises."""
    o, d_q, d_k, d_v = splash(q, k, v, d_o, True)
    facts = check(dict(q=q, k=k, v=v, d_o=d_o, o=o, d_q=d_q, d_k=d_k, d_v=d_v), n, d)
    facts["sum_err"] = (splash(q, k, torch.ones_like(v), d_o, False).float() - 1).abs().max().item()
    return facts


class Eager:
    """Called like a graph."""

    def __init__(self, f):
        self.replay = f


def graph_of(f):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        f()
        f()
    stream.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g, stream=stream):
        f()
    return g


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--lib", required=True)
    p.add_argument("--out", default="/dev/null")
    p.add_argument("--n", type=int, nargs="+", default=[8192, 32768])
    p.add_argument("--d", type=int, nargs="+", default=[64, 128])
    p.add_argument("--data", nargs="+", default=["clusters:1", "clusters:4", "clusters:16", "flat:0.05"])
    p.add_argument("--lists", type=int, nargs="+", default=[0, 128])
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--alpha", type=float, default=1.5)
    p.add_argument("--slopes", choices=["none", "alibi", "nape"], default="none",
                   help="of ours: 2^-1 to 2^-8, nape: in half of the heads; softmax has none, for PyTorch would want a mask of n x n")
    p.add_argument("--profile", action="store_true", help="and the time of each kernel")
    o = p.parse_args()
    lib = Library(o.lib)
    slopes = None if o.slopes == "none" else torch.exp2(-1 - 7 * torch.arange(16, device="cuda") / 15)
    if o.slopes == "nape":
        slopes[::2] = 0
    out = open(o.out, "w")
    for n in o.n:
        for d in o.d:
            for case in o.data:
                q, k, v, d_o = data(n, d, case)
                calls, ours = {}, {}

                def softmax(backend, backward):
                    with sdpa_kernel(backend):
                        if not backward:
                            with torch.no_grad():
                                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
                        x = [t.detach().requires_grad_() for t in (q, k, v)]
                        y = F.scaled_dot_product_attention(*x, is_causal=True)
                        return torch.autograd.grad(y, x, d_o)

                for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
                    for b in (False, True):
                        calls[name, b] = lambda backend=backend, b=b: softmax(backend, b)
                for lists in o.lists:
                    ours[lists] = Entmax(lib, q, k, v, d_o, o.alpha, lists, slopes)
                    for b in (False, True):
                        calls[f"entmax lists {lists}", b] = lambda e=ours[lists], b=b: e.run(b)
                graphs = {x: graph_of(f) for x, f in calls.items()}
                theirs = None
                if adasplash and o.alpha == 1.5:
                    try:
                        theirs = rival(q, k, v, d_o, n, d)
                    except Exception as error:  # whatever its kernels do not compile or launch with
                        print(f"    adasplash does not run here: {str(error).splitlines()[0]}", flush=True)
                    else:
                        for b in (False, True):
                            graphs["adasplash", b] = calls["adasplash", b] = Eager(lambda b=b: splash(q, k, v, d_o, b))
                times = {x: [] for x in graphs}
                for round in range(-2, o.rounds):
                    for x, g in graphs.items():
                        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                        start.record()
                        g.replay()
                        end.record()
                        end.synchronize()
                        if round >= 0:
                            times[x].append(start.elapsed_time(end))
                e = ours[o.lists[0]]
                e.run(True)
                torch.cuda.synchronize()
                facts = dict(check(e.t, n, d) if o.alpha == 1.5 else {}, density=density(e, n, d),
                             support=e.t["support"].float().mean().item(), dense=(e.t["support"] > 256).float().mean().item())
                base = {b: statistics.median(times["cudnn", b]) for b in (False, True)}
                for (name, b), ms in times.items():
                    m = statistics.median(ms)
                    row = dict(data=case, n=n, d=d, h=16, dtype="bf16", slopes=o.slopes, method=name, **{"pass": "fwd+bwd" if b else "fwd"}, ms=m,
                               ms_min=min(ms), ms_mad=statistics.median(abs(x - m) for x in ms), vs_cudnn=base[b] / m)
                    if name.startswith("entmax"):
                        row.update(facts, workspace=ours[int(name.split()[-1])].bytes)
                    if name == "adasplash":
                        row.update(theirs)
                    out.write(json.dumps(row) + "\n")
                    print(f"{case:11} n {n:6} d {d:4} {name:16} {row['pass']:8} {m:8.3f} ms (min {min(ms):.3f})  {base[b] / m:5.2f}x", flush=True)
                print("   ", " ".join(f"{x} {y:.3g}" for x, y in facts.items() if y is not None), flush=True)
                if theirs:
                    print("    adasplash", " ".join(f"{x} {y:.3g}" for x, y in theirs.items() if y is not None), flush=True)
                if o.profile:
                    from torch.profiler import ProfilerActivity, profile
                    for lists, e in ours.items():
                        with profile(activities=[ProfilerActivity.CUDA]) as prof:
                            e.run(True)
                            torch.cuda.synchronize()
                        for x in sorted(prof.key_averages(), key=lambda x: -x.device_time_total)[:14]:
                            print(f"      lists {lists} {x.device_time_total / 1e3:8.3f} ms {x.count:3} {x.key[:90]}", flush=True)
                del calls, graphs, ours, e
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
