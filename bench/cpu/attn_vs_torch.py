#!/usr/bin/env python3
"""Dense attention on the CPU, libentmax beside torch.nn.functional.scaled_dot_product_attention, in one process.

Every round runs every method once, in turn; the order of the two libraries alternates. Reported are medians over the rounds with their
median absolute deviation, and the median of the ratios within a round. Threads of the other library are given time to fall asleep before
a measurement. Errors are relative L2 over sampled rows against float64.

  python bench/cpu/attn_vs_torch.py --lib build/libentmax.so --data iid
  python bench/cpu/attn_vs_torch.py --lib build/libentmax.so --data flat:0.05
  python bench/cpu/attn_vs_torch.py --lib build/libentmax.so --data model:models/text-entmax,book.txt,2

model:FOLDER,TEXT[,LAYER] are the queries, keys, values (and ALiBi slopes) of a layer that reads the first N bytes of TEXT. torch gets its
own causal mask, without ALiBi, and keys repeated for every query head before the clock starts: the cheapest form that it has.
"""
import argparse, ctypes as c, json, math, struct, sys, time
from pathlib import Path

import numpy as np

I64x5 = c.c_int64 * 5
F32, F64, I32 = 1, 4, 5
DTYPES = {np.dtype("f4"): F32, np.dtype("f8"): F64, np.dtype("i4"): I32}


class Tensor(c.Structure):
    _fields_ = [("data", c.c_void_p), ("dtype", c.c_int32), ("device", c.c_int32), ("ndim", c.c_int32), ("device_index", c.c_int32),
                ("shape", I64x5), ("stride", I64x5)]


class CtxOpts(c.Structure):
    _fields_ = [("struct_size", c.c_uint32), ("device", c.c_int32), ("device_index", c.c_int32), ("threads", c.c_int32),
                ("stream", c.c_void_p), ("parallel_for", c.c_void_p), ("parallel_user", c.c_void_p)]


class Desc(c.Structure):
    _fields_ = [("struct_size", c.c_uint32), ("flags", c.c_uint32), ("alpha", c.c_double), ("scale", c.c_float), ("layout", c.c_int32),
                ("window_left", c.c_int32), ("window_right", c.c_int32)]


FIELDS = ("q k v o tau support alibi_slopes block_table seqlens_q seqlens_k cu_seqlens_q cu_seqlens_k d_o d_q d_k d_v lse alphas d_alpha "
          "support_index").split()


class Io(c.Structure):
    _fields_ = [("struct_size", c.c_uint32), ("reserved", c.c_uint32)] + [(f, c.POINTER(Tensor)) for f in FIELDS]


class Library:
    def __init__(self, path, threads):
        self.lib = lib = c.CDLL(str(Path(path).resolve()))
        lib.emx_last_error.restype = c.c_char_p
        opts = CtxOpts()
        lib.emx_ctx_opts_init_sized(c.byref(opts), c.c_size_t(c.sizeof(opts)))
        opts.threads = threads
        self.ctx = c.c_void_p()
        self.check(lib.emx_ctx_create(c.byref(opts), c.byref(self.ctx)))

    def check(self, status):
        if status:
            sys.exit(f"libentmax: {self.lib.emx_last_error().decode()}")

    def call(self, alpha, backward=False, scale=0.0, **arrays):
        """Returns a function of no arguments that runs the pass once."""
        desc, io = Desc(), Io()
        self.lib.emx_attn_desc_init_sized(c.byref(desc), c.c_size_t(c.sizeof(desc)))
        self.lib.emx_attn_io_init_sized(c.byref(io), c.c_size_t(c.sizeof(io)))
        desc.alpha, desc.scale = alpha, scale
        tensors = []
        for name, a in arrays.items():
            if a is None:
                continue
            t = Tensor(data=a.ctypes.data, dtype=DTYPES[a.dtype], ndim=a.ndim)
            t.shape[: a.ndim] = a.shape
            t.stride[: a.ndim] = [s // a.itemsize for s in a.strides]
            tensors.append(t)
            setattr(io, name, c.pointer(t))
        size = c.c_size_t()
        self.check(self.lib.emx_attn_workspace_size(self.ctx, c.byref(desc), c.byref(io), int(backward), c.byref(size)))
        work = np.zeros(size.value, np.uint8)
        run = self.lib.emx_attn_backward if backward else self.lib.emx_attn_forward

        def go(keep=(desc, io, tensors, arrays, work)):
            self.check(run(self.ctx, c.byref(desc), c.byref(io), c.c_void_p(work.ctypes.data), size))

        go.workspace = size.value
        return go


def safetensors(path):
    with open(path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        header, data = json.loads(f.read(n)), f.read()
    out = {}
    for name, e in header.items():
        if name == "__metadata__":
            continue
        raw = data[e["data_offsets"][0]:e["data_offsets"][1]]
        if e["dtype"] == "BF16":
            a = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            a = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[e["dtype"]]).astype(np.float32)
        out[name] = a.reshape(e["shape"])
    return out


def from_model(lib, folder, text, n, layer):
    """q [1,H,N,D], k, v [1,G,N,D], slopes [H] of one layer of a byte model that reads n bytes."""
    config = json.loads((Path(folder) / "config.json").read_text())
    w = safetensors(Path(folder) / "model.safetensors")
    tokens = np.frombuffer(Path(text).read_bytes()[:n], np.uint8)
    if len(tokens) < n:
        sys.exit(f"{text} has fewer than {n} bytes")
    h, g, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    biased = {"nape": config.get("alibi_num_heads", 0), "alibi": h}.get(config["position_type"], 0)
    linear = config.get("alibi_slope_type", "linear") == "linear"
    slopes = np.array([(1 / (i + 1) if linear else 2.0 ** -i) if i < biased else 0 for i in range(h)], np.float32)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[name]

    x = w["model.embed_tokens.weight"][tokens].astype(np.float32)
    for l in range(config["num_hidden_layers"]):
        p = f"model.layers.{l}."
        a = norm(x, p + "input_layernorm.weight")
        q, k, v = [np.ascontiguousarray((a @ w[f"{p}self_attn.{s}_proj.weight"].T).reshape(n, -1, d).swapaxes(0, 1)[None], np.float32)
                   for s in "qkv"]
        if l == layer:
            return q, k, v, slopes, config["entmax_alpha"]
        o = np.empty_like(q)
        lib.call(config["entmax_alpha"], q=q, k=k, v=v, o=o, alibi_slopes=slopes)()
        x = x + o[0].swapaxes(0, 1).reshape(n, h * d) @ w[p + "self_attn.o_proj.weight"].T
        a = norm(x, p + "post_attention_layernorm.weight")
        gate = a @ w[p + "mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (a @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    sys.exit(f"{folder} has no layer {layer}")


def make(lib, data, n, h, d, seed):
    kind, _, rest = data.partition(":")
    if kind == "model":
        folder, text, *layer = rest.split(",")
        return from_model(lib, folder, text, n, int(layer[0]) if layer else 0)
    rng = np.random.default_rng(seed)
    q, k, v = [rng.standard_normal((1, h, n, d), np.float32) for _ in range(3)]
    if kind == "flat":
        q *= float(rest)
    elif kind != "iid":
        sys.exit(f"unknown data '{data}': iid, flat:STD or model:FOLDER,TEXT[,LAYER]")
    return q, k, v, None, None


def entmax(z, alpha):
    """Weights of one float64 row, by bisection."""
    if alpha == 1:
        e = np.exp(z - z.max())
        return e / e.sum()
    x = (alpha - 1) * (z - z.max())
    lo, hi = -1.0, 0.0
    for _ in range(80):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if (np.maximum(x - mid, 0) ** (1 / (alpha - 1))).sum() >= 1 else (lo, mid)
    return np.maximum(x - lo, 0) ** (1 / (alpha - 1))


def error(o, q, k, v, slopes, alpha, rows):
    """Relative L2 error of o over sampled (head, query) rows."""
    _, h, n, d = q.shape
    group, err, ref = h // k.shape[1], 0.0, 0.0
    for head, i in rows:
        kk, vv = k[0, head // group, : i + 1].astype(np.float64), v[0, head // group, : i + 1].astype(np.float64)
        z = kk @ q[0, head, i].astype(np.float64) / math.sqrt(d)
        if slopes is not None:
            z -= slopes[head] * np.arange(i, -1, -1.0)
        want = entmax(z, alpha) @ vv
        err += ((o[0, head, i] - want) ** 2).sum()
        ref += (want ** 2).sum()
    return math.sqrt(err / ref)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--lib", required=True)
    ap.add_argument("--data", default="iid")
    ap.add_argument("--n", type=int, default=8192)
    ap.add_argument("--heads", type=int, default=8)
    ap.add_argument("--d", type=int, default=64)
    ap.add_argument("--alpha", type=float, default=1.5)
    ap.add_argument("--list", type=int, default=64, help="capacity of the saved support lists; 0: none")
    ap.add_argument("--rounds", type=int, default=9)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--pause", type=float, default=0.3, help="seconds before a measurement")
    ap.add_argument("--no-torch", action="store_true")
    ap.add_argument("--json", action="store_true")
    o = ap.parse_args()
    lib = Library(o.lib, o.threads)
    q, k, v, slopes, _ = make(lib, o.data, o.n, o.heads, o.d, o.seed)
    _, h, n, d = q.shape
    g = k.shape[1]
    rng = np.random.default_rng(o.seed + 1)
    d_o = rng.standard_normal(q.shape, np.float32)
    out, tau, support = np.empty_like(q), np.empty((1, h, n), np.float32), np.empty((1, h, n), np.int32)
    index = np.empty((1, h, n, o.list), np.int32) if o.list else None
    grads = dict(d_q=np.empty_like(q), d_k=np.empty_like(k), d_v=np.empty_like(v))
    shared = dict(q=q, k=k, v=v, tau=tau, alibi_slopes=slopes)
    forward = lib.call(o.alpha, o=out, **shared)
    saving = lib.call(o.alpha, o=out, support=support, support_index=index, **shared)
    backward = lib.call(o.alpha, True, d_o=d_o, support=support if o.list else None, support_index=index, **grads, **shared)

    def both():
        saving()
        backward()

    methods = {"entmax forward": forward, "entmax forward+backward": both}
    if not o.no_torch:
        import torch

        torch.set_num_threads(o.threads)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        tq, tk, tv = torch.from_numpy(q), *[torch.from_numpy(np.repeat(x, h // g, 1)) for x in (k, v)]
        grad = [x.clone().requires_grad_() for x in (tq, tk, tv)]
        t_do = torch.from_numpy(d_o)
        kept = {}

        def torch_forward():
            with torch.no_grad():
                kept["o"] = sdpa(tq, tk, tv, is_causal=True)

        def torch_both():
            for x in grad:
                x.grad = None
            sdpa(*grad, is_causal=True).backward(t_do)

        methods |= {"torch forward": torch_forward, "torch forward+backward": torch_both}
    times = {m: [] for m in methods}
    names = list(methods)
    for r in range(-1, o.rounds):
        for m in names if r % 2 else names[::-1]:
            time.sleep(o.pause)
            start = time.perf_counter()
            methods[m]()
            if r >= 0:
                times[m].append(1e3 * (time.perf_counter() - start))
    saving()
    rows = [(int(rng.integers(h)), int(i)) for i in rng.integers(0, n, 48)]
    rel = {"entmax": error(out, q, k, v, slopes, o.alpha, rows)}
    if not o.no_torch:
        rel["torch"] = error(kept["o"].numpy(), q, k, v, None, 1, rows)
    visible = h * n * (n + 1) / 2
    for m in names:
        t = np.array(times[m])
        base = times.get("torch " + m.split()[1])
        line = {"method": m, "device": "cpu", "data": o.data, "n": n, "h": h, "g": g, "d": d, "dtype": "f32", "threads": o.threads,
                "rounds": o.rounds, "ms": float(np.median(t)), "ms_min": float(t.min()), "ms_mad": float(np.median(abs(t - np.median(t)))),
                "of_torch": float(np.median(t / np.array(base))) if base else None, "rel_err": rel[m.split()[0]]}
        if m.startswith("entmax"):
            line |= {"alpha": o.alpha, "density": float(support.sum()) / visible, "support_mean": float(support.mean()),
                     "list": o.list if "backward" in m else None, "workspace": forward.workspace if m == names[0] else backward.workspace}
        else:
            line |= {"torch": torch.__version__}
        if o.json:
            print(json.dumps(line))
        else:
            ratio = f"{line['of_torch']:6.3f}" if base else "     -"
            print(f"{m:26s} {line['ms']:9.1f} ms (min {line['ms_min']:.1f}, MAD {line['ms_mad']:.1f})  of torch's {ratio}  "
                  f"error {line['rel_err']:.1e}" + (f"  density {line['density']:.4f}" if "density" in line else ""))


main()
