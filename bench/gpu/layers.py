#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""q, k and v of every layer of a model that has read a long text, for decode.py: what `emx generate --dump-qkv` writes, made on a GPU.

    python3 bench/gpu/layers.py --lib build/libentmax.so --model models/text-entmax --text FILE --out DIR

The forward pass is src/model's for models without a scale of their own (positions: ALiBi heads and heads without), in float32 but for attention, which is
libentmax's dense attention in bf16; keys and values are rounded to bf16 as a cache has them, q is the last token's. 262,144 bytes take seconds where the
CPU takes minutes. Writes DIR/layer-N.safetensors. Needs PyTorch with CUDA.
"""
import argparse
import json
import os
import struct

import torch
import torch.nn.functional as F
from decode import KINDS, Library, tensors_of

NAMES = {kind: name for name, kind in KINDS.items()}


def layers(config, w, tokens, attend):
    """(q [1,H,D], k, v [N,G,D], slopes [H]) of each layer. attend(q, k, v, slopes): causal, [1,heads,N,D]."""
    heads, groups, d, eps = (config[x] for x in ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"))
    assert config["position_type"] == "nape" and config["alibi_slope_type"] == "linear" and config.get("attn_scale_type", "none") == "none"
    biased = config["alibi_num_heads"]
    slopes = torch.tensor([1 / (h + 1) if h < biased else 0.0 for h in range(heads)], device=tokens.device)
    norm = lambda x, name: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w[name]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (F.linear(h, w[at + f"self_attn.{name}_proj.weight"]).unflatten(-1, (-1, d)) for name in "qkv")
        yield q[-1:], k.bfloat16(), v.bfloat16(), slopes
        a = attend(*(t.bfloat16().transpose(0, 1)[None].contiguous() for t in (q, k, v)), slopes)
        x = x + F.linear(a[0].transpose(0, 1).flatten(1).float(), w[at + "self_attn.o_proj.weight"])
        h = norm(x, at + "post_attention_layernorm.weight")
        h = F.silu(F.linear(h, w[at + "mlp.gate_proj.weight"])) * F.linear(h, w[at + "mlp.up_proj.weight"])
        x = x + F.linear(h, w[at + "mlp.down_proj.weight"])


def write(path, tensors):
    header, data, at = {}, [], 0
    for name, t in tensors.items():
        raw = t.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(data))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lib", default="build/libentmax.so")
    parser.add_argument("--model", default="models/text-entmax")
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    from attn import Entmax
    lib = Library(args.lib)
    with open(os.path.join(args.model, "config.json")) as f:
        config = json.load(f)
    weights = {name: t.float().cuda() for name, t in tensors_of(os.path.join(args.model, "model.safetensors")).items()}
    with open(args.text, "rb") as f:
        tokens = torch.frombuffer(bytearray(f.read()), dtype=torch.uint8).long().cuda()

    def attend(q, k, v, slopes):
        call = Entmax(lib, q, k, v, q, config["entmax_alpha"], 0, slopes)
        call.run(False)
        return call.t["o"]

    os.makedirs(args.out, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    for i, (q, k, v, slopes) in enumerate(layers(config, weights, tokens, attend)):
        write(os.path.join(args.out, f"layer-{i}.safetensors"), {"q": q, "k": k, "v": v, "alibi_slopes": slopes})
        print(f"layer {i}: {k.shape[0]} tokens", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
