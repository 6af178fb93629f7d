# SPDX-License-Identifier: Apache-2.0
"""Model folders: open and generate."""
import os
from ctypes import POINTER, byref, c_float, c_int32, c_void_p
from typing import NamedTuple

import numpy as np

from . import _c
from ._attention import indices
from ._cache import REPORT, select_desc, summary_bits, supports


class Generated(NamedTuple):
    """tokens: int32, without the prompt. text: their bytes, for a model of text. stats: emx_session_stats of the decode steps
    (rows, certified, support_sum, delta_bound_max, bytes_k, bytes_full, ...)."""
    tokens: np.ndarray
    text: bytes
    stats: dict


class Step(NamedTuple):
    """What a model's heads attended to from one token. position: the token's place in the sequence; support: [L,H] object array
    of Support (positions, weights, tau), L layers of H query heads; reports: [L,H] records."""
    position: int
    support: np.ndarray
    reports: np.ndarray


class GeneratedSupport(NamedTuple):
    """Generated, and steps: a Step for every token that went through the selector, the last ones of the prompt first."""
    tokens: np.ndarray
    text: bytes
    stats: dict
    steps: list


class Model:
    """A model folder (config.json and model.safetensors) in memory. See load_model."""

    def __init__(self, folder, ctx=None):
        self._model = None
        self._ctx = _c.context(ctx)
        handle = c_void_p()
        self._ctx.call(_c.model_lib().emx_model_open, self._ctx.handle, os.fsencode(folder), byref(handle))
        self._model = handle
        self.folder = os.fspath(folder)
        self.config = _c.make(_c.ModelConfig)
        _c.check(_c.model_lib().emx_model_get_config(self._model, byref(self.config)))

    def __del__(self):
        if getattr(self, "_model", None) is not None:
            with self._ctx.lock:
                _c.model_lib().emx_model_close(self._model)

    def generate(self, prompt, n=128, *, select="all", temperature=0.0, top_k=0, top_p=1.0, seed=0, kv_dtype="bfloat16",
                 page_size=16, summaries="minmax,moments,sketch,residual", return_support=False, queries=1, **options):
        """Continues a prompt by n tokens: Generated; with return_support GeneratedSupport, whose steps say what every head
        attended to from the last `queries` tokens of the prompt (which the selector then reads too) and from every token made
        but the last, which is not read. plot.write makes a page of it.

        prompt: str or bytes (their bytes are the tokens of a model of text) or integers [T], T >= 1. temperature 0: greedy.
        select and its options: as for KVCache.decode, for every step after the prompt.
        Errors: InvalidError (an empty prompt, a token out of range), StateError (the selector's summaries are missing),
        OutOfMemoryError, Cancelled. Ctrl-C ends it between two tiles.
        """
        if isinstance(prompt, str):
            prompt = prompt.encode()
        if isinstance(prompt, (bytes, bytearray)):
            if self.config.task:
                raise _c.InvalidError("this model is of a task; its prompts are integers, not text")
            prompt = np.frombuffer(bytes(prompt), np.uint8)
        tokens = indices(prompt, "prompt")
        if tokens.ndim != 1 or tokens.size == 0 or n < 0:
            raise _c.InvalidError(f"a prompt of shape {tokens.shape} and n = {n}; at least one token and n >= 0 are needed")
        if return_support and not 0 <= queries <= tokens.size:
            raise _c.InvalidError(f"queries is {queries}; the prompt has {tokens.size} tokens")
        lib, ctx = _c.model_lib(), self._ctx
        if kv_dtype not in ("float32", "float16", "bfloat16"):
            raise _c.DtypeError(f"kv_dtype is {kv_dtype!r}; 'float32', 'float16' and 'bfloat16' are possible")
        opts = _c.make(_c.SessionOpts, kv_dtype=_c.DTYPES[kv_dtype], page_size=page_size, summaries=summary_bits(summaries),
                       max_sessions=1, max_tokens=tokens.size + n)
        desc = select_desc(select, **options)
        sampling = _c.make(_c.SampleOpts, top_k=top_k, temperature=temperature, top_p=top_p, seed=seed)
        logits = np.empty(self.config.vocab_size, np.float32)
        at = logits.ctypes.data_as(POINTER(c_float))
        session = c_void_p()
        ctx.call(lib.emx_session_create, self._model, byref(opts), byref(session))
        try:
            ctx.call(lib.emx_session_set_select, session, byref(desc))
            steps, watched = [], queries if return_support else 0
            dense = tokens.size - watched
            if dense:
                ctx.call(lib.emx_session_prefill, session, tokens.ctypes.data_as(POINTER(c_int32)), dense, None, at,
                         _c.Progress(), None)
            decode = self._recorder(session, steps, tokens.size + n) if return_support else None
            for position in range(dense, tokens.size):
                decode(position, int(tokens[position]), at)
            made, token = [], c_int32()
            for step in range(n):
                if step and return_support:
                    decode(tokens.size + step - 1, token, at)
                elif step:
                    ctx.call(lib.emx_session_decode, session, token, at)
                _c.check(lib.emx_sample(at, logits.size, byref(sampling), step, byref(token)))
                made.append(token.value)
            stats = _c.make(_c.SessionStats)
            _c.check(lib.emx_session_get_stats(session, byref(stats)))
        finally:
            with ctx.lock:
                lib.emx_session_destroy(session)
        numbers = {name: getattr(stats, name) for name, _ in stats._fields_ if name not in ("struct_size", "paths")}
        text = b"" if self.config.task else bytes(t for t in made if t < 256)
        if return_support:
            return GeneratedSupport(np.array(made, np.int32), text, numbers, steps)
        return Generated(np.array(made, np.int32), text, numbers)

    def _recorder(self, session, steps, room):
        """A function that decodes one token and appends its Step to `steps`."""
        shape = (self.config.num_layers, self.config.num_heads)
        lists = np.empty(shape + (room,), np.int32), np.empty(shape + (room,), np.float32), np.zeros(shape, np.int32)
        reports = np.zeros(shape, REPORT)
        index, weight, count = (a.ctypes.data for a in lists)
        wanted = _c.make(_c.SessionSupport, capacity=room, index=index, weight=weight, count=count, reports=reports.ctypes.data)
        self._ctx.call(_c.model_lib().emx_session_set_support, session, byref(wanted))

        def decode(position, token, logits):
            self._ctx.call(_c.model_lib().emx_session_decode, session, token, logits)
            steps.append(Step(position, supports(lists, reports), reports.copy()))

        return decode


def load_model(folder, *, ctx=None):
    """Opens a model folder, such as those in models/. Weights are float32 in memory.

    Errors: FileError (missing, damaged, a config without entmax_alpha), OutOfMemoryError.
    """
    return Model(folder, ctx)
