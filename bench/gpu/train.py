#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of a training step on one NVIDIA GPU: a small decoder with libentmax.torch.attention and with PyTorch's softmax attention.

    LIBENTMAX_LIBRARY=build python3 bench/gpu/train.py --out rows.jsonl

The model has the shape of models/text-entmax (byte vocabulary, 4 layers, width 192, 6 query heads over 3 KV heads of 32, gated layers of 512)
or, with --shape 64 or 128, four times its width with heads of that size. The same weights and bytes for every method; bf16 autocast, AdamW,
one step is forward, backward and the optimizer. Positions are embeddings added to those of the bytes, so that softmax runs its fastest kernel
(ALiBi would cost it that) and equal bytes are different keys. Methods in turn in every round; a time is one step between events. A row:
tokens/s (median), the fastest and slowest round, the loss after the rounds, peak memory. Weights are not trained to anything, so attention is as spread as it is at initialisation: that is entmax's worst case,
and --gain multiplies queries to look at sharper rows.
"""
import argparse
import json
import statistics

import torch
import torch.nn.functional as F
from torch import nn

import libentmax.torch as T


def softmax(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def entmax(q, k, v):
    return T.attention(q, k, v, is_causal=True)


class Layer(nn.Module):
    def __init__(self, width, heads, kv_heads, d, ffn, gain):
        super().__init__()
        self.shape, self.gain = (heads, kv_heads, kv_heads), gain
        self.d, self.norm, self.norm2 = d, nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * d, bias=False)
        self.out = nn.Linear(heads * d, width, bias=False)
        self.gate, self.down = nn.Linear(width, 2 * ffn, bias=False), nn.Linear(ffn, width, bias=False)

    def forward(self, x, attend):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (-1, self.d)).transpose(1, 2).split(self.shape, 1)
        x = x + self.out(attend(q * self.gain, k, v).transpose(1, 2).flatten(2))
        a, b = self.gate(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(a) * b)


class Model(nn.Module):
    def __init__(self, n, width, layers, *shape):
        super().__init__()
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(n, width)
        self.layers = nn.ModuleList(Layer(width, *shape) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens, attend):
        x = self.embed(tokens[:, :-1]) + self.position.weight
        for layer in self.layers:
            x = layer(x, attend)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), tokens[:, 1:].flatten())


class Run:
    def __init__(self, attend, shape, tokens):
        torch.manual_seed(1)
        self.attend, self.tokens, self.ms = attend, tokens, []
        self.model = Model(tokens.shape[1] - 1, *shape).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, keep):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = self.model(self.tokens, self.attend)
        loss.backward()
        self.optimizer.step()
        end.record()
        end.synchronize()
        if keep:
            self.ms.append(start.elapsed_time(end))
        self.loss = loss.detach()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="/dev/null")
    p.add_argument("--n", type=int, nargs="+", default=[8192, 32768])
    p.add_argument("--tokens", type=int, default=32768, help="of a step")
    p.add_argument("--shape", type=int, nargs="+", default=[32, 64], help="head dim")
    p.add_argument("--gain", type=float, nargs="+", default=[1.0, 8.0])
    p.add_argument("--rounds", type=int, default=9)
    o = p.parse_args()
    out = open(o.out, "w")
    for d in o.shape:
        for n in o.n:
            for gain in o.gain:
                shape = (192, 4, 6, 3, 32, 512, gain) if d == 32 else (768, 4, 768 // d, 768 // d // 2, d, 2048, gain)
                torch.manual_seed(0)
                tokens = torch.randint(256, (max(1, o.tokens // n), n + 1), device="cuda")
                runs = {"softmax": Run(softmax, shape, tokens), "entmax": Run(entmax, shape, tokens)}
                peak = {}
                for round in range(-3, o.rounds):
                    for name, run in runs.items():
                        torch.cuda.reset_peak_memory_stats()
                        run.step(round >= 0)
                        peak[name] = torch.cuda.max_memory_allocated()
                T.synchronize()
                base = statistics.median(runs["softmax"].ms)
                for name, run in runs.items():
                    ms, count = statistics.median(run.ms), tokens[:, 1:].numel()
                    row = dict(method=name, n=n, batch=tokens.shape[0], d=d, heads=shape[2], kv_heads=shape[3], layers=shape[1], width=shape[0],
                               gain=gain, ms=ms, ms_min=min(run.ms), ms_max=max(run.ms), tok_per_s=1e3 * count / ms, vs_softmax=base / ms,
                               loss=run.loss.item(), peak_bytes=peak[name])
                    out.write(json.dumps(row) + "\n")
                    out.flush()
                    print(f"D {d:3} n {n:6} gain {gain:4} {name:8} {ms:8.2f} ms ({min(run.ms):.2f}-{max(run.ms):.2f}) "
                          f"{row['tok_per_s']:10.0f} tokens/s  {base / ms:5.2f}x  {peak[name] / 2**30:.2f} GiB", flush=True)
                del runs
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
