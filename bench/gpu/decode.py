#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""One decode step on one NVIDIA GPU: PyTorch's softmax attention (cuDNN, FlashAttention) and libentmax, interleaved in one process.

    python3 bench/gpu/decode.py --lib build/libentmax.so --out result.json

Every method is captured in a CUDA graph that runs it once on each of several data sets in turn, so that nothing stays in the second-level
cache (a set of half a million tokens or more four times); a time is the median over the rounds of one replay divided by the launches, and ms_eager the same without a graph. Softmax is
a different function and the speed to beat; rel_err of ours is the relative L2 distance from float64 attention of the same alpha over all
keys, all heads of the first set, delta the entmax mass of what was not read (mean over heads), delta_bound and certified what the reports say.
bytes: what the reports count, once for the heads of a group where they share it; roof: of the rate of a large copy on the same GPU.
topics:24 are topics shifted by 24 tokens. FILE.safetensors as data: q, k and v of a trained layer, as `emx generate --dump-qkv` or layers.py
writes them (the newest query; ALiBi slopes are ours alone, softmax is the time to stream the same keys and values). Eight ragged sequences have
no counterpart in PyTorch: softmax is there one query over the same keys and values as one sequence, the time to stream them. EntmaxKV runs beside them if it can be imported (rivals.py).
Needs PyTorch with CUDA and a libentmax built with its CUDA back end. One JSON object a line goes to --out, a table to standard output.
"""
import argparse
import ctypes as C
import json
import math
import os
import statistics
import struct
import sys

import rivals
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

PAGE = 16
TOPK, GAUSSIAN, CERTIFIED = 1, 2, 3
KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Tensor(C.Structure):
    _fields_ = [("data", C.c_void_p), ("dtype", C.c_int32), ("device", C.c_int32), ("ndim", C.c_int32), ("index", C.c_int32),
                ("shape", C.c_int64 * 5), ("stride", C.c_int64 * 5)]


class CtxOpts(C.Structure):
    _fields_ = [("size", C.c_uint32), ("device", C.c_int32), ("index", C.c_int32), ("threads", C.c_int32), ("stream", C.c_void_p),
                ("parallel_for", C.c_void_p), ("parallel_user", C.c_void_p)]


class KvOpts(C.Structure):
    _fields_ = [("size", C.c_uint32)] + [(n, C.c_int32) for n in
                "dtype kv_heads head_dim page_size layout summaries max_seqs".split()] + [
                ("max_pages", C.c_int64), ("k_pool", C.POINTER(Tensor)), ("v_pool", C.POINTER(Tensor)), ("file", C.c_char_p)]


class Batch(C.Structure):
    _fields_ = [("size", C.c_uint32), ("batch", C.c_int32), ("seqs", C.c_void_p), ("table", C.POINTER(Tensor)),
                ("lens", C.POINTER(Tensor)), ("max_len", C.c_int64)]


class Select(C.Structure):
    _fields_ = [("size", C.c_uint32), ("kind", C.c_int32), ("tau_mode", C.c_int32), ("tau_steps", C.c_int32), ("budget", C.c_int64),
                ("max_bytes", C.c_int64), ("max_delta", C.c_double), ("max_quantile", C.c_float), ("safety", C.c_float),
                ("excess", C.c_float), ("reserved", C.c_int32)]


class Io(C.Structure):
    _fields_ = [("size", C.c_uint32), ("layout", C.c_int32), ("alpha", C.c_double), ("scale", C.c_float), ("reserved", C.c_int32)] + [
                (n, C.POINTER(Tensor)) for n in "q k_new v_new o slopes pages n_pages bound".split()] + [
                ("reports", C.c_void_p), ("report_stride", C.c_int64), ("alphas", C.POINTER(Tensor))]


class Library:
    DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.int32: 5}

    def __init__(self, path):
        self.lib = C.CDLL(path)
        self.lib.emx_last_error.restype = C.c_char_p
        opts = self.init("emx_ctx_opts", CtxOpts)
        opts.device = 1
        self.ctx = C.c_void_p()
        self.call("emx_ctx_create", C.byref(opts), C.byref(self.ctx))

    def call(self, name, *args):
        status = getattr(self.lib, name)(*args)
        if status:
            raise RuntimeError(f"{name}: {self.lib.emx_last_error().decode()}")

    def init(self, name, kind):
        x = kind()
        getattr(self.lib, name + "_init_sized")(C.byref(x), C.c_size_t(C.sizeof(kind)))
        return x

    def tensor(self, t):
        return Tensor(t.data_ptr(), self.DTYPES[t.dtype], 1, t.dim(), 0, (C.c_int64 * 5)(*t.shape), (C.c_int64 * 5)(*t.stride()))


class Ours:
    """A cache over [M,G,P,D] tensors with a block table, and one decode of it."""

    def __init__(self, lib, k, v, q, slopes, lengths, alpha, scale, select=0, budget=0):
        self.lib, self.keep, self.group = lib, [k, v, q, slopes], q.shape[1] // k.shape[1]
        pages, g, p, d = k.shape
        b, h = q.shape[:2]
        kt, vt = lib.tensor(k), lib.tensor(v)
        opts = lib.init("emx_kv_opts", KvOpts)
        opts.dtype, opts.kv_heads, opts.head_dim, opts.page_size, opts.max_seqs = lib.DTYPES[k.dtype], g, d, p, 1
        opts.max_pages, opts.k_pool, opts.v_pool = pages, C.pointer(kt), C.pointer(vt)
        opts.summaries = {0: 0, TOPK: 1, GAUSSIAN: 2, CERTIFIED: 4}[select]
        self.kv = C.c_void_p()
        lib.call("emx_kv_create", lib.ctx, C.byref(opts), C.byref(self.kv))
        if select:
            every = torch.arange(pages, dtype=torch.int32, device="cuda")
            lib.call("emx_ctx_set_stream", lib.ctx, C.c_void_p(torch.cuda.current_stream().cuda_stream))  # behind what made k
            lib.call("emx_kv_summarize", lib.ctx, self.kv, C.byref(lib.tensor(every)), None)
            torch.cuda.synchronize()
        most = max(lengths)
        columns = (most + p - 1) // p
        table = torch.zeros(b, columns, dtype=torch.int32)
        first = 0
        for i, n in enumerate(lengths):
            used = (n + p - 1) // p
            table[i, :used] = torch.arange(first, first + used, dtype=torch.int32)
            first += used
        self.table, self.lens = table.cuda(), torch.tensor(lengths, dtype=torch.int32).cuda()
        self.o = torch.full(q.shape, math.nan, device="cuda")
        self.reports = torch.zeros(b * h, 64, dtype=torch.uint8, device="cuda")
        self.views = [lib.tensor(t) for t in (q, self.o, self.table, self.lens)]
        self.batch = lib.init("emx_kv_batch", Batch)
        self.batch.batch, self.batch.table, self.batch.lens, self.batch.max_len = (
            b, C.pointer(self.views[2]), C.pointer(self.views[3]), most)
        self.select = lib.init("emx_select_desc", Select)
        self.select.kind, self.select.budget = select, budget
        self.io = lib.init("emx_decode_io", Io)
        self.io.alpha, self.io.scale = alpha, scale
        if slopes is not None:
            self.views.append(lib.tensor(slopes))
            self.io.slopes = C.pointer(self.views[-1])
        self.io.q, self.io.o, self.io.reports = C.pointer(self.views[0]), C.pointer(self.views[1]), self.reports.data_ptr()
        size = C.c_size_t()
        lib.call("emx_decode_workspace_size", lib.ctx, self.kv, C.byref(self.select), C.byref(self.io), C.c_int64(most), C.byref(size))
        self.work = torch.empty(size.value, dtype=torch.uint8, device="cuda")

    def __call__(self):
        lib = self.lib
        lib.call("emx_ctx_set_stream", lib.ctx, C.c_void_p(torch.cuda.current_stream().cuda_stream))
        lib.call("emx_decode", lib.ctx, self.kv, C.byref(self.batch), C.byref(self.select), C.byref(self.io),
                 C.c_void_p(self.work.data_ptr()), C.c_size_t(self.work.numel()))

    def report(self):
        """What the reports of the last call say, summed or averaged over rows."""
        r = self.reports.view(torch.uint8)
        word = lambda at, kind, size: r[:, at:at + size].contiguous().view(kind)[:, 0].double()
        k, v, meta = (word(at, torch.int64, 8) for at in (32, 40, 48))
        shared = lambda x: x.view(-1, self.group).amax(1).sum().item()  # one read for the heads of a group
        whole = r[:, 29] == 0  # EMX_PATH_ALL: every key, whatever selector was asked for
        return {"support_mean": word(16, torch.int32, 4).mean().item(), "tokens_mean": word(20, torch.int32, 4).mean().item(),
                "delta_bound": word(4, torch.float32, 4).max().item(), "certified": (r[:, 31] & 1).double().mean().item(),
                "bytes": k[~whole].sum().item() + shared(k * whole) + v.sum().item() + shared(meta)}

    def pages(self, most):
        """Page lists [B,H,M], -1 past the end."""
        b, h = self.o.shape[:2]
        lists = torch.empty(b, h, 1, (most + PAGE - 1) // PAGE, dtype=torch.int32, device="cuda")
        counts = torch.empty(b, h, 1, dtype=torch.int32, device="cuda")
        self.views += [self.lib.tensor(lists), self.lib.tensor(counts)]
        self.io.pages, self.io.n_pages = C.pointer(self.views[-2]), C.pointer(self.views[-1])
        self.lib.call("emx_select", self.lib.ctx, self.kv, C.byref(self.batch), C.byref(self.select), C.byref(self.io),
                      C.c_void_p(self.work.data_ptr()), C.c_size_t(self.work.numel()))
        torch.cuda.synchronize()
        self.io.pages = self.io.n_pages = None
        return lists[:, :, 0]

    def close(self):
        self.lib.lib.emx_kv_destroy(self.kv)


def tensors_of(path):
    """Those of a safetensors file, but for integers."""
    with open(path, "rb") as f:
        raw = bytearray(f.read())
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    t = {}
    for name, x in json.loads(raw[8:start]).items():
        if x.get("dtype") in KINDS:
            begin, end = x["data_offsets"]
            t[name] = torch.frombuffer(raw, dtype=torch.uint8, count=end - begin, offset=start + begin).clone()
            t[name] = t[name].view(KINDS[x["dtype"]]).view(x["shape"])
    return t


def trained(path):
    """q [1,H,1,D] f32 of the last step, k and v [N,G,D], slopes [H] or None, of a file that emx or layers.py wrote."""
    t = {name: x.cuda() for name, x in tensors_of(path).items()}
    return t["q"][-1][None, :, None].float(), t["k"], t["v"], t.get("alibi_slopes")


def keys(data, n, g, d, gen):
    """[n,g,d] f32"""
    noise = torch.randn(n, g, d, device="cuda", generator=gen)
    if data.startswith("ar:"):
        rho = float(data[3:])
        x = noise * math.sqrt(1 - rho * rho)
        x[0] = noise[0]
        step = 1
        while rho**step > 1e-9 and step < n:
            y = x.clone()
            y[step:] += rho**step * x[:-step]
            x, step = y, 2 * step
        return x
    if data.startswith("topics"):
        shift = int(data[7:] or 0)
        topic = torch.randn((n + shift + 63) // 64, g, d, device="cuda", generator=gen).repeat_interleave(64, 0)[shift:shift + n]
        return 0.9 * topic + 0.45 * noise
    if data.startswith("outlier:"):
        channels, gain = data[8:].split(",")
        noise[:, :, :int(channels)] *= float(gain)
    return noise


def scale_of(data, d):
    """Scores of unit variance, or as asked for."""
    if data.startswith("outlier:"):
        channels, gain = data[8:].split(",")
        return 1 / math.sqrt(d - int(channels) + int(channels) * float(gain) ** 2)
    return (float(data[5:]) if data.startswith("flat:") else 1.0) / math.sqrt(d)


def paged(x, lengths):
    """[sum of lengths, g, d] -> [pages, g, PAGE, d], f16 or, of a file, as they are"""
    out, first = [], 0
    for n in lengths:
        part = x[first:first + n]
        first += n
        pad = -n % PAGE
        if pad:
            part = torch.cat([part, part.new_zeros(pad, *part.shape[1:])])
        part = part.view(-1, PAGE, *part.shape[1:]).transpose(1, 2)
        out.append(part.half() if part.dtype == torch.float32 else part)
    return torch.cat(out).contiguous()


def make_set(data, lengths, hq, g, d, seed):
    """Pages of keys and values, queries, slopes or None."""
    if data.endswith(".safetensors"):
        q, k, v, slopes = trained(data)
        return paged(k, lengths), paged(v, lengths), q, slopes
    gen = torch.Generator(device="cuda").manual_seed(seed)
    total = sum(lengths)
    k = torch.cat([keys(data, n, g, d, gen) for n in lengths])
    kp = paged(k, lengths)
    q = torch.randn(len(lengths), hq, 1, d, device="cuda", generator=gen)
    if data.startswith("topics"):
        first = 0
        for b, n in enumerate(lengths):
            for h in range(hq):
                at = first + int(torch.randint(n, (1,), device="cuda", generator=gen))
                q[b, h, 0] = 0.8 * k[at, h // (hq // g)] + 0.6 * q[b, h, 0]
            first += n
    del k
    vp = paged(torch.randn(total, g, d, device="cuda", generator=gen), lengths)
    return kp, vp, q.half(), None


def exact(kp, vp, q, slopes, lengths, alpha, scale, lists=None):
    """float64 attention [b,hq,d] of alpha 1, 1.5 or 2; and the mean over heads of the mass outside the lists."""
    out, first, dropped = [], 0, []
    b, hq, _, d = q.shape
    g = kp.shape[1]
    for i, n in enumerate(lengths):
        pages = (n + PAGE - 1) // PAGE
        rows = []
        for h in range(hq):
            k = kp[first:first + pages, h // (hq // g)].reshape(-1, d)[:n].double()
            v = vp[first:first + pages, h // (hq // g)].reshape(-1, d)[:n].double()
            s = k @ q[i, h, 0].double() * scale
            if slopes is not None:
                s -= slopes[h].double() * torch.arange(n - 1, -1, -1, device="cuda")
            if alpha == 1:
                p = torch.softmax(s, 0)
            else:
                x = (alpha - 1) * s
                top = x.sort(descending=True).values
                rank = torch.arange(1, n + 1, device="cuda", dtype=torch.float64)
                shift = top[0]
                mean = (top - shift).cumsum(0) / rank
                if alpha == 2:
                    tau = mean - 1 / rank
                else:
                    spread = rank * ((top - shift).square().cumsum(0) / rank - mean * mean)
                    tau = mean - ((1 - spread) / rank).clamp(min=0).sqrt()
                support = int((tau <= top - shift).sum())
                p = (x - shift - tau[support - 1]).clamp(min=0) ** (1 / (alpha - 1))
            rows.append(p @ v)
            if lists is not None:
                read = torch.zeros(pages + 1, dtype=torch.bool, device="cuda")
                read[lists[i, h].long()] = True  # -1: the extra one
                dropped.append(p[~read[:pages].repeat_interleave(PAGE)[:n]].sum().item())
        out.append(torch.stack(rows))
        first += pages
    return torch.stack(out), statistics.mean(dropped) if dropped else 0.0


def capture(calls):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def softmax(kind, k, v, q, scale):
    b, hq, _, d = q.shape
    g = k.shape[1]
    rows = q.view(b, g, hq // g, d)  # the heads of a group are rows of one query

    def call():
        with sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(rows, k, v, scale=scale)

    return call


def copy_rate():
    """Bytes read and written a second by a large copy."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    times = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        y.copy_(x)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * x.numel() / min(times) * 1e-6


def number(x):
    return math.nan if x is None else x


def timed(call):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def run(lib, data, lengths, hq, g, d, sets, rounds, seed, profile, roof):
    scale = scale_of(data, d)
    bytes_k = sum(lengths) * g * d * 2
    problems = [make_set(data, lengths, hq, g, d, seed + i) for i in range(sets)]
    methods, ours, alphas, answers, wants = {}, {}, {}, {}, {}
    for name, alpha, select in (("ours softmax", 1.0, 0), ("ours all 1.5", 1.5, 0), ("ours all 2", 2.0, 0), ("ours gaussian 1.5", 1.5, GAUSSIAN),
                                ("ours topk 1% 1.5", 1.5, TOPK), ("ours certified 1.5", 1.5, CERTIFIED)):
        ours[name] = methods[name] = [Ours(lib, *p, lengths, alpha, scale, select, max(lengths) // 100) for p in problems]
        alphas[name] = alpha
    # PyTorch has no paged decode: contiguous copies
    flat = [tuple(t.transpose(0, 1).reshape(1, g, -1, d)[:, :, :sum(lengths)].contiguous() for t in p[:2]) for p in problems]
    for name, kind in (("softmax cuDNN", SDPBackend.CUDNN_ATTENTION), ("softmax FlashAttention", SDPBackend.FLASH_ATTENTION)):
        methods[name] = [softmax(kind, *f, p[2][:1].to(f[0].dtype), scale) for f, p in zip(flat, problems)]
    if len(lengths) == 1 and not data.endswith(".safetensors"):
        for f, p in zip(flat, problems):
            for name, (call, o) in rivals.methods(*f, p[2], 1.5, scale, PAGE).items():
                methods.setdefault(name, []).append(call)
                answers.setdefault(name, o)
    again = max(1, 4 // sets)  # a long set is larger than the cache by itself; one launch a graph would be timed with cold code
    graphs, uncaptured = {}, {}
    for name, calls in list(methods.items()):
        try:
            for call in calls:
                call()
            torch.cuda.synchronize()
        except Exception as error:  # a rival that cannot do this case
            print(f"# {name}: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
            continue
        try:
            graphs[name] = capture(calls * again).replay
        except Exception as error:
            if name not in answers:
                raise
            print(f"# {name}: not in a graph: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
            graphs[name], uncaptured[name] = (lambda calls=calls: [call() for call in calls * again]), True
    times, eager = {name: [] for name in graphs}, {name: [] for name in graphs}
    for i in range(rounds + 3):
        for name, graph in graphs.items():
            ms = timed(graph) / (sets * again)
            if i >= 3:
                times[name].append(ms)
    for i in range(7):
        for name in graphs:
            ms = timed(lambda: [call() for call in methods[name]]) / sets
            if i >= 2:
                eager[name].append(ms)
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            for name in graphs:
                if name.startswith("ours"):
                    graphs[name]()
                    torch.cuda.synchronize()
        for event in prof.key_averages():
            if event.device_time_total:
                print(f"#   {event.device_time_total / event.count:9.1f} us x{event.count:<3} {event.key[:100]}")
    base = min((statistics.median(t) for n, t in times.items() if n.startswith("softmax")), default=None)
    for name, t in times.items():
        ms = statistics.median(t)
        row = {"device": torch.cuda.get_device_name(), "data": os.path.basename(data), "n": max(lengths), "batch": len(lengths), "tokens": sum(lengths),
               "hq": hq, "hkv": g, "d": d, "dtype": "bf16" if problems[0][0].dtype == torch.bfloat16 else "f16", "page": PAGE, "method": name, "ms": ms, "ms_min": min(t),
               "ms_mad": statistics.median(abs(x - ms) for x in t), "ms_eager": statistics.median(eager[name]),
               "vs_softmax": base / ms if base else None, "bytes": 2 * bytes_k, "sets": sets, "rounds": rounds, "seed": seed,
               "graph": name not in uncaptured}
        if name in ours:
            first = ours[name][0]
            first()
            torch.cuda.synchronize()
            row.update(first.report())
            lists = first.pages(max(lengths)) if first.select.kind in (TOPK, GAUSSIAN) else None
            if lists is not None or alphas[name] not in wants:
                wants[alphas[name]], row["delta"] = exact(*problems[0], lengths, alphas[name], scale, lists)
            want = wants[alphas[name]]
            row.setdefault("delta", 0.0)
            if first.select.kind == CERTIFIED:
                row["delta"] = None  # it keeps no lists: delta_bound and rel_err tell
            row["rel_err"] = ((first.o[:, :, 0].double() - want).norm() / want.norm()).item()
        elif name in answers:
            answers[name].zero_()
            methods[name][0]()
            want = wants[1.5]  # ours came before
            row["bytes"] = None  # it does not say
            row["rel_err"] = ((answers[name][:, :, 0].double() - want).norm() / want.norm()).item()
        row["gbps"] = row["bytes"] / ms * 1e-6 if row["bytes"] else None
        row["roof"] = row["gbps"] / roof if row["bytes"] else None
        yield row
    for caches in ours.values():
        for cache in caches:
            cache.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lib", default="build/libentmax.so")
    parser.add_argument("--out", default="gpu-decode.json")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", help="these data alone, separated by semicolons, and no batch but with --batch")
    parser.add_argument("--batch", action="store_true", help="eight ragged sequences and nothing else")
    parser.add_argument("--profile", action="store_true", help="print what each kernel takes")
    parser.add_argument("--quick", action="store_true", help="iid and flat, 32K and 1M, no batch")
    args = parser.parse_args()
    lib = Library(args.lib)
    roof = copy_rate()
    print(f"# {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, copy {roof:.0f} GB/s")
    cases = []
    kinds = ("iid", "flat:0.05") if args.quick else ("iid", "ar:0.9", "ar:0.99", "topics", "topics:24", "outlier:4,50", "flat:0.05")
    kinds = args.data.split(";") if args.data else kinds
    ragged = [131072 - 65536 * i // 7 for i in range(8)]
    for data in [x for x in kinds if x.endswith(".safetensors")]:
        q, k, _, _ = trained(data)
        cases.append((data, [k.shape[0]], q.shape[1], *k.shape[1:], 1))
    kinds = [x for x in kinds if not x.endswith(".safetensors")]
    for lengths, sets in (([1 << 20], 1), ([32768], 8), (ragged, 1), ([131072], 4), ([1 << 19], 1)):
        if (args.batch or args.quick or args.data) and args.batch != (len(lengths) > 1):
            continue
        if args.quick and lengths[0] in (131072, 1 << 19):
            continue
        for data in kinds if args.batch or len(lengths) == 1 else ("iid", "topics"):
            cases += [(data, lengths, 8, 8, 64, sets), (data, lengths, 32, 8, 128, sets)]
    with open(args.out, "w") as out:
        for case in cases:
            try:
                for row in run(lib, *case, args.rounds, args.seed, args.profile, roof):
                    out.write(json.dumps(row) + "\n")
                    out.flush()
                    print(f"{row['data']:12} n {row['n']:8} x{row['batch']} {row['hq']}/{row['hkv']} D{row['d']:<4}{row['method']:23}"
                          f"{row['ms'] * 1e3:9.1f} us (eager {row['ms_eager'] * 1e3:7.1f})  mad {row['ms_mad'] * 1e3:5.1f}"
                          f"  x{row['vs_softmax'] or 0:6.2f}  {row['gbps'] or 0:6.0f} GB/s  err {row.get('rel_err', math.nan):.1e}"
                          f"  delta {number(row.get('delta')):.1e} <= {row.get('delta_bound', math.nan):.1e}"
                          f"  read {row.get('tokens_mean') or 0:.0f} support {row.get('support_mean') or 0:.0f}", flush=True)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                print(f"# {case[0]} {case[1][0]} {case[2]}/{case[3]}: {str(error).splitlines()[0]}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
