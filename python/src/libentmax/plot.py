# SPDX-License-Identifier: Apache-2.0
"""Pages that show what the heads of a model attended to: the page of `emx inspect`, from lists collected in Python.

    model = libentmax.load_model("models/text-entmax")
    made = model.generate(text, 16, select="certified", return_support=True)
    libentmax.plot.generated("page.html", model, text, made, select="certified")

The page is one HTML file that needs nothing else; it zooms from the whole sequence to single tokens.
"""
import base64
import json
import os
import secrets
from pathlib import Path

import numpy as np

from . import _c
from ._model import Step

_TEMPLATE = Path(__file__).with_name("inspect.html")  # describes the format


def step(position, layers):
    """The Step of one token from its decodes: what `position` attended to.

    layers: a DecodedSupport (KVCache.decode(..., return_support=True)) or a list of them, one a layer, all with the same number
    of heads. Of each the first sequence and its last token are taken.
    """
    layers = layers if isinstance(layers, list) else [layers]
    if len({layer.support.shape[1] for layer in layers}) != 1:
        raise _c.ShapeError("layers have different numbers of heads, or there is none")
    support = np.empty((len(layers), layers[0].support.shape[1]), object)
    for index, layer in enumerate(layers):
        support[index] = layer.support[0, :, -1]
    return Step(position, support, np.stack([layer.reports[0, :, -1] for layer in layers]))


def generated(path, model, prompt, made, *, source="a prompt", select="all", keep=1024):
    """Writes the page of model.generate(prompt, ..., return_support=True); `made` is what that returned.

    source, select: what the page says about the prompt and the selector. keep: as for write(). Returns the page's size in bytes.
    """
    prompt = prompt.encode() if isinstance(prompt, str) else prompt
    tokens = np.concatenate([np.array(list(prompt), np.int64), made.tokens])
    if not model.config.task:
        tokens = bytes(tokens.tolist())
    return write(path, made.steps, tokens, prompt=len(prompt), alpha=model.config.entmax_alpha, model=model.folder, source=source,
                 select=select, keep=keep)


def write(path, steps, tokens, *, prompt=None, alpha=1.5, model="", source="", select="all", keep=1024):
    """Writes a page and returns its size in bytes. The file is replaced whole or not at all.

    steps: Steps of ascending position, from step() or Model.generate. tokens: of the whole sequence, str or bytes (a token a
    byte, for models of text), else labels: a sequence of strings or numbers. prompt: how many of them were given (None: all).
    alpha, model, source, select: what the page says. keep: tokens of a list that go into the page, the heaviest ones; sizes count
    all. Errors: InvalidError, ShapeError, OSError.
    """
    steps = list(steps)
    if not steps or keep < 1:
        raise _c.InvalidError(f"{len(steps)} steps and keep = {keep}; at least 1 of each is needed")
    tokens = tokens.encode() if isinstance(tokens, str) else tokens
    positions = [int(s.position) for s in steps]
    if any(b <= a for a, b in zip(positions, positions[1:])) or positions[0] < 0 or positions[-1] >= len(tokens):
        raise _c.InvalidError(f"steps ascend from 0 to below the number of tokens, {len(tokens)}; they are {positions[:20]}")
    layers, heads = steps[0].support.shape
    head = {"version": 1, "model": str(model), "source": str(source), "select": str(select), "alpha": float(alpha),
            "layers": layers, "heads": heads, "tokens": len(tokens), "prompt": len(tokens) if prompt is None else int(prompt),
            "keep": int(keep), "steps": positions}
    if isinstance(tokens, (bytes, bytearray)):
        head["bytes"] = base64.b64encode(tokens).decode()
    else:
        head["labels"] = [str(t) for t in tokens]
    rows = bytearray()
    for s in steps:
        if s.support.shape != (layers, heads):
            raise _c.ShapeError(f"step {s.position} has lists of {s.support.shape}, the first one of {(layers, heads)}")
        for row in np.ndindex(layers, heads):
            rows += _list(s.support[row], s.reports[row], s.position, keep)
    before, rest = _TEMPLATE.read_bytes().split(b"@HEAD@")
    between, after = rest.split(b"@ROWS@")
    text = json.dumps(head, separators=(",", ":")).replace("<", "\\u003c")  # it stands inside of a script element
    return _replace(path, b"".join((before, text.encode(), between, base64.b64encode(rows), after)))


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(128 | value & 127)
        value >>= 7
    out.append(value)
    return out


def _list(support, report, position, keep):
    """One list as bytes."""
    index, weight, tau = (np.asarray(support.positions, np.int64), np.asarray(support.weights, np.float32), support.tau)
    size = index.size
    if index.ndim != 1 or weight.shape != index.shape:
        raise _c.ShapeError(f"a list of {index.shape} positions and {weight.shape} weights")
    if size and (index[0] < 0 or index[-1] > position or (np.diff(index) <= 0).any()):
        raise _c.InvalidError(f"positions of a list ascend from 0 to that of its step, {position}")
    if size > keep:
        least = np.partition(weight, size - keep)[size - keep]
        equal = weight == least  # of those some are taken, evenly from all over the sequence
        room, met = keep - np.count_nonzero(weight > least), np.cumsum(equal)
        taken = (weight > least) | (equal & (met * room // met[-1] != (met - 1) * room // met[-1]))
        index, weight = index[taken], weight[taken]
    level = np.clip(np.floor(weight.astype(np.float64) * 65535 + 0.5), 1, 65535).astype(np.int64)
    step_ = np.diff(index, prepend=0)
    width = sum((step_ >= 1 << bits).astype(np.int64) for bits in (7, 14, 21, 28)) + 1 if index.size else step_
    start = np.cumsum(width + 2) - width - 2
    out = np.zeros(int((width + 2).sum()), np.uint8)
    for byte in range(5):
        here = width > byte
        out[start[here] + byte] = (step_[here] >> 7 * byte & 127) | np.where(width[here] > byte + 1, 128, 0)
    out[start + width] = level & 255
    out[start + width + 1] = level >> 8
    numbers = np.array([tau, report["delta_bound"]], "<f4").tobytes()
    return bytes(_varint(size) + _varint(index.size) + bytes([int(report["flags"])])) + numbers + out.tobytes()


def _replace(path, data):
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return len(data)
