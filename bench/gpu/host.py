#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""CERTIFIED over keys and values in pinned host memory, sketches on the GPU, beside ALL, which reads every key over the bus.

    python3 bench/gpu/host.py --lib build/libentmax.so --n 4194304 --out result.json

Keys and values are made on the GPU, a chunk at a time, and appended to a cache with EMX_KV_MEMORY_HOST; one cache serves all data, since
pinning it takes longest. rel_err is the distance from float64 attention of the first head of every KV head, over the same numbers made once
more. bytes: what the reports count. --n beyond what the GPU's memory holds works: the sketches alone must fit.
"""
import argparse
import ctypes as C
import json
import math
import statistics
import time

import torch

import decode
from decode import CERTIFIED, Batch, Io, Library, Select

CHUNK = 1 << 16


class KvOpts(C.Structure):
    _fields_ = decode.KvOpts._fields_ + [("kv_memory", C.c_int32), ("reserved", C.c_int32)]


def rows(data, at, g, d, seed):
    """Keys and values of CHUNK tokens from `at` on, f16 [1,g,CHUNK,d]."""
    gen = torch.Generator(device="cuda").manual_seed(seed * 1000003 + at)
    k = decode.keys(data, CHUNK, g, d, gen).half().transpose(0, 1).contiguous()
    v = torch.randn(g, CHUNK, d, device="cuda", generator=gen).half()
    return k[None], v[None]


def query(data, n, hq, g, d, seed):
    gen = torch.Generator(device="cuda").manual_seed(seed)
    q = torch.randn(1, hq, 1, d, device="cuda", generator=gen)
    if data.startswith("topics"):  # every query means a key
        for h in range(hq):
            at = int(torch.randint(n, (1,), device="cuda", generator=gen))
            q[0, h, 0] = 0.8 * rows(data, at // CHUNK * CHUNK, g, d, seed)[0][0, h // (hq // g), at % CHUNK] + 0.6 * q[0, h, 0]
    return q.half()


def exact(data, n, q, g, d, seed, scale):
    """float64 attention of alpha = 1.5 of the first head of each KV head: scores of the candidates first, their values next."""
    hq = q.shape[1]
    scores = []
    for at in range(0, n, CHUNK):
        k = rows(data, at, g, d, seed)[0][0].double()
        scores.append(torch.einsum("gnd,gd->gn", k, q[0, ::hq // g, 0].double()) * (scale / 2))
    x = torch.cat(scores, 1)
    low, high = x.amax(1) - 1, x.amax(1)
    for _ in range(80):
        middle = (low + high) / 2
        above = (x - middle[:, None]).clamp(min=0).square().sum(1) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    p = (x - low[:, None]).clamp(min=0).square()
    out = torch.zeros(g, d, dtype=torch.float64, device="cuda")
    for i, at in enumerate(range(0, n, CHUNK)):
        part = p[:, at:at + CHUNK]
        if part.any():
            out += torch.einsum("gn,gnd->gd", part, rows(data, at, g, d, seed)[1][0].double())
    return out


def create(lib, n, g, d, host):
    """A cache with one empty sequence: (kv, sequence, seconds)."""
    opts = lib.init("emx_kv_opts", KvOpts)
    opts.dtype, opts.kv_heads, opts.head_dim, opts.page_size, opts.max_seqs = 2, g, d, 16, 1
    opts.max_pages, opts.summaries, opts.kv_memory = n // 16, 4, 1 if host else 0
    kv, sequence = C.c_void_p(), C.c_int32()
    began = time.time()
    lib.call("emx_kv_create", lib.ctx, C.byref(opts), C.byref(kv))
    created = time.time() - began
    lib.call("emx_seq_create", kv, C.byref(sequence))
    return kv, sequence, created


def run(lib, cache, data, n, hq, g, d, rounds, seed, host):
    kv, sequence, created = cache
    lib.call("emx_seq_truncate", kv, sequence, C.c_int64(0))
    batch = lib.init("emx_kv_batch", Batch)
    batch.batch, batch.seqs = 1, C.cast(C.pointer(sequence), C.c_void_p)
    began = time.time()
    for at in range(0, n, CHUNK):
        k, v = rows(data, at, g, d, seed)
        kt, vt = lib.tensor(k), lib.tensor(v)
        lib.call("emx_kv_append", lib.ctx, kv, C.byref(batch), C.byref(kt), C.byref(vt), None)
        torch.cuda.synchronize()
    appended = time.time() - began
    q, o = query(data, n, hq, g, d, seed), torch.full((1, hq, 1, d), math.nan, device="cuda")
    reports = torch.zeros(hq, 64, dtype=torch.uint8, device="cuda")
    views = [lib.tensor(q), lib.tensor(o)]
    scale = decode.scale_of(data, d)
    want = exact(data, n, q, g, d, seed, scale)
    for name, kind in (("all", 0), ("certified", CERTIFIED)):
        select, io = lib.init("emx_select_desc", Select), lib.init("emx_decode_io", Io)
        select.kind, io.alpha, io.scale = kind, 1.5, scale
        io.q, io.o, io.reports = C.pointer(views[0]), C.pointer(views[1]), reports.data_ptr()
        size = C.c_size_t()
        lib.call("emx_decode_workspace_size", lib.ctx, kv, C.byref(select), C.byref(io), C.c_int64(n), C.byref(size))
        work = torch.empty(size.value, dtype=torch.uint8, device="cuda")
        call = lambda: lib.call("emx_decode", lib.ctx, kv, C.byref(batch), C.byref(select), C.byref(io), C.c_void_p(work.data_ptr()),
                                C.c_size_t(work.numel()))
        times = []
        for i in range(rounds + 1 if kind else min(rounds, 3) + 1):
            ms = decode.timed(call)
            if i:
                times.append(ms)
        torch.cuda.synchronize()
        word = lambda at, what, length: reports[:, at:at + length].contiguous().view(what)[:, 0].double()
        shared = lambda x: x.view(g, -1).amax(1).sum().item()
        k, v, meta = (word(at, torch.int64, 8) for at in (32, 40, 48))
        got = o[0, ::hq // g, 0].double()
        yield {"device": torch.cuda.get_device_name(), "data": data, "n": n, "hq": hq, "hkv": g, "d": d, "dtype": "f16",
               "kv_memory": "host" if host else "device", "gib_kv": 4 * n * g * d / 2**30, "select": name,
               "ms": statistics.median(times), "ms_min": min(times), "ms_mad": statistics.median(abs(t - statistics.median(times)) for t in times),
               "rel_err": ((got - want).norm() / want.norm()).item(), "certified": (reports[:, 31] & 1).double().mean().item(),
               "bytes_kv": (shared(k) if not kind else k.sum().item()) + v.sum().item(), "bytes_sketches": shared(meta),
               "tokens_mean": word(20, torch.int32, 4).mean().item(), "support_mean": word(16, torch.int32, 4).mean().item(),
               "seconds_create": created, "seconds_append": appended, "rounds": len(times), "seed": seed}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lib", default="build/libentmax.so")
    parser.add_argument("--n", type=int, default=1 << 22)
    parser.add_argument("--data", default="iid;topics")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device-too", action="store_true", help="also with K and V on the GPU")
    parser.add_argument("--out", default="gpu-host.json")
    args = parser.parse_args()
    lib = Library(args.lib)
    with open(args.out, "w") as out:
        for host in (True, False) if args.device_too else (True,):
            n = args.n // CHUNK * CHUNK
            cache = create(lib, n, 8, 128, host)
            for data in args.data.split(";"):
                for row in run(lib, cache, data, n, 32, 8, 128, args.rounds, args.seed, host):
                    out.write(json.dumps(row) + "\n")
                    out.flush()
                    print(f"{row['data']:8} n {row['n']} {row['gib_kv']:.0f} GiB in {row['kv_memory']:6} {row['select']:9} {row['ms']:9.3f} ms "
                          f"(mad {row['ms_mad']:.3f})  err {row['rel_err']:.1e}  certified {row['certified']:.2f}  K+V read {row['bytes_kv'] / 1e6:.2f} MB, "
                          f"sketches {row['bytes_sketches'] / 1e6:.0f} MB  read {row['tokens_mean']:.0f} support {row['support_mean']:.0f}  "
                          f"create {row['seconds_create']:.1f} s append {row['seconds_append']:.1f} s", flush=True)
            lib.lib.emx_kv_destroy(cache[0])


if __name__ == "__main__":
    main()
