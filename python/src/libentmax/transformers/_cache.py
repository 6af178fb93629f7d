# SPDX-License-Identifier: Apache-2.0
"""A transformers Cache over the paged cache: decoding that reads what a selector picks, and reports what it left out."""
from __future__ import annotations

from typing import Any, NamedTuple, Sequence

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import _c
from .._cache import KVCache, select_desc
from ..torch import _core
from ._attention import dense

_STORED = ("EntmaxCache keeps keys and values in pages, which only entmax attention reads; make the model with "
           "attn_implementation='entmax'")


class StepReport(NamedTuple):
    """What decoding one token read and left out, over layers, sequences and query heads.

    length: tokens in the longest sequence, the new one included. rows: layers * B * H. certified: rows of which it is proven that
    nothing with weight was left out. support_mean: tokens with a weight that is not 0. delta_bound_max: sound bound of the mass
    left out, the largest of a row. bytes: of keys, values and summaries read."""
    length: int
    rows: int
    certified: int
    support_mean: float
    delta_bound_max: float
    bytes: int


class _Stored:
    """Stands for the keys (or values) of a layer between update() and attention. Anything but entmax attention that touches it is
    told so: the tensor of all keys does not exist."""

    def __init__(self, layer):
        self._layer = layer

    def layer_of(self):
        return self._layer

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise _c.StateError(_STORED)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise _c.StateError(_STORED)


def _array(tensor):
    """float32 array of a tensor, its own memory where it can be."""
    return tensor.detach().to(torch.float32).numpy()


class _Layer(CacheLayerMixin):
    """One layer of an EntmaxCache."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self, owner, index):
        super().__init__()
        self.owner, self.index = owner, index
        self._begin()

    def _begin(self):
        self.pages, self.seqs, self.length, self.new, self.reports, self.is_initialized = None, [], 0, None, None, False

    def lazy_initialization(self, key_states, value_states=None):
        b, heads, _, d = key_states.shape
        owner = self.owner
        dtype = owner.dtype or str(key_states.dtype).replace("torch.", "")
        self.most = 2 * b  # room for a batch that is repeated; beams need none, they are there from the first call on
        self.pages = KVCache(heads, d, owner.max_tokens * b, dtype=dtype, page_size=owner.page_size, summaries=owner.summaries,
                             max_seqs=self.most, ctx=_core.context(key_states))
        self.seqs = [self.pages.new() for _ in range(b)]
        self.batch_size = b
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Takes [B,G,S,D] keys and values; attend(), which knows the padding, stores them."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise _c.UnsupportedError("EntmaxCache has no gradient; use torch.no_grad(), or use_cache=False where a gradient is "
                                      "wanted")
        if self.new is not None:
            raise _c.StateError(f"{_STORED} (the keys before these were not read; reset() begins anew)")
        if self.is_initialized and key_states.shape[0] != len(self.seqs):
            raise _c.ShapeError(f"{key_states.shape[0]} sequences for a cache that holds {len(self.seqs)}; reset() begins anew")
        if self.length + key_states.shape[2] > self.owner.max_tokens:
            raise _c.StateError(f"{self.length} and {key_states.shape[2]} more tokens for a cache with max_tokens = "
                                f"{self.owner.max_tokens}")
        self.new = key_states, value_states
        stored = _Stored(self)
        return stored, stored

    def attend(self, query, mask, alpha, scale, slopes):
        """o [B,S,H,D] of query [B,H,S,D] over what is stored and the new tokens, which are stored."""
        key, value = self.new
        s = key.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key)
        if mask is not None and tuple(mask.shape) != (len(self.seqs), self.length + s):
            raise _c.ShapeError(f"attention_mask has shape {tuple(mask.shape)}; {(len(self.seqs), self.length + s)} is expected")
        o = self._first(query, mask, alpha, scale, slopes) if self.length == 0 else self._next(query, mask, alpha, scale, slopes)
        self.length += s
        self.new = None
        return o

    def _first(self, query, mask, alpha, scale, slopes):
        key, value = self.new
        o = dense(query, key, value, mask, alpha, scale, True, slopes)
        if mask is None:
            self.pages.append(self.seqs, _array(key), _array(value))
        else:  # the tokens that are none come last, where append() leaves them out
            order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None]
            key, value = (t.gather(2, order.expand(t.shape)) for t in (key, value))
            self.pages.append(self.seqs, _array(key), _array(value), mask.sum(1).numpy())
        return o

    def _next(self, query, mask, alpha, scale, slopes):
        key, value = self.new
        s = key.shape[2]
        have = [self.pages.length(seq) for seq in self.seqs]
        told = [self.length] * len(have) if mask is None else mask[:, :self.length].sum(1).tolist()
        if have != told:
            raise _c.InvalidError(f"the padding mask has {told} tokens of what came before, the cache holds {have}: it must be "
                                  "that of the first call, with more columns")
        if mask is not None and not mask[:, self.length:].all():
            raise _c.UnsupportedError("padding after the first call; EntmaxCache takes it with the first tokens only")
        select, options = (self.owner.select, self.owner.options) if s == 1 else ("all", {})
        if isinstance(alpha, torch.Tensor):
            alpha = alpha.detach().numpy()
        out = self.pages.decode(self.seqs, _array(query), _array(key), _array(value), alpha, select=select, scale=scale,
                                alibi_slopes=None if slopes is None else slopes.numpy(), **options)
        self.reports = out.reports
        if s == 1:
            self.owner.decoded(self)
        return torch.from_numpy(out.o).to(query.dtype).transpose(1, 2)

    def get_seq_length(self, *_):
        return self.length

    def get_mask_sizes(self, query_length):
        """query_length: a number, or the positions [S] (transformers 4)."""
        return self.length + (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_max_length(self):
        return self.owner.max_tokens

    get_max_cache_shape = get_max_length  # transformers 4

    def crop(self, tokens):
        """Removes -tokens tokens; a positive number is the length to keep (transformers 4)."""
        removed = -tokens if tokens <= 0 else max(0, self.length - tokens)
        if removed > self.length:
            raise _c.InvalidError(f"{removed} tokens are to be removed of {self.length}")
        for seq in self.seqs:
            self.pages.truncate(seq, max(0, self.pages.length(seq) - removed))
        self.length -= removed

    def _take(self, rows):
        """Sequence i becomes what rows[i] was."""
        if self.length == 0:
            return
        if len(rows) > self.most:
            raise _c.StateError(f"{len(rows)} sequences for a cache made for {self.most} (twice those of the first call)")
        for row in set(range(len(self.seqs))) - set(rows):
            self.pages.free(self.seqs[row])
        taken, used = [], set()
        for row in rows:
            taken.append(self.pages.fork(self.seqs[row]) if row in used else self.seqs[row])
            used.add(row)
        self.seqs, self.batch_size = taken, len(taken)

    def reorder_cache(self, beam_idx):
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices):
        self._take(torch.arange(len(self.seqs))[indices].tolist())

    def batch_repeat_interleave(self, repeats):
        self._take([row for row in range(len(self.seqs)) for _ in range(repeats)])

    def reset(self):
        if self.pages is not None:
            self.pages.close()
        self._begin()

    def offload(self):
        raise _c.UnsupportedError("EntmaxCache is in main memory as it is; it is not offloaded")

    prefetch = offload


class EntmaxCache(Cache):
    """past_key_values of a model with attn_implementation="entmax", or of a LibentmaxForCausalLM.

    config: the model's. max_tokens: of one sequence, prompt and continuation. select: "all", "topk" (budget=TOKENS), "gaussian",
    "certified" (max_bytes, max_delta), with the options of libentmax.KVCache.decode; it is used for every token after the prompt.
    dtype: of the stored keys and values, "float32", "float16" or "bfloat16"; None: the model's. page_size, summaries: as for
    libentmax.KVCache.

    steps: a StepReport for each decoded token. reports: one array a layer of the last step's records [B,H,1] (emx_report).
    layers[i].pages is the libentmax.KVCache of a layer, layers[i].seqs its sequences.
    Prompts may be padded (attention_mask), on either side; padding is not stored. Beam search, crop and reset work.
    Errors: StateError (more than max_tokens; another attention implementation read it), UnsupportedError (layers that are not
    full attention, padding after the prompt, gradients), InvalidError, ShapeError, DtypeError.
    """

    def __init__(self, config: PretrainedConfig, max_tokens: int, *, select: str = "all", dtype: str | None = None,
                 page_size: int = 16, summaries: str | Sequence[str] = "minmax,moments,sketch,residual", **options: Any) -> None:
        select_desc(select, **options)  # its errors
        if max_tokens < 1:
            raise _c.InvalidError(f"max_tokens is {max_tokens}; at least 1 is needed")
        config = config.get_text_config(decoder=True)
        other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if other:
            raise _c.UnsupportedError("EntmaxCache is for layers of full attention; the model has " + ", ".join(sorted(other)))
        self.max_tokens, self.select, self.options = max_tokens, select, options
        self.dtype, self.page_size, self.summaries = dtype, page_size, summaries
        self.steps: list[StepReport] = []
        super().__init__(layers=[_Layer(self, i) for i in range(config.num_hidden_layers)])

    @property
    def reports(self) -> list[np.ndarray | None]:
        return [layer.reports for layer in self.layers]

    def decoded(self, layer):
        """Called by each layer after a step."""
        if layer.index != len(self.layers) - 1:
            return
        self.steps.append(StepReport(
            length=layer.length + 1, rows=sum(r.size for r in self.reports),
            certified=sum(int(((r["flags"] & _c.REPORT_CERTIFIED) != 0).sum()) for r in self.reports),
            support_mean=float(sum(r["support"].sum() for r in self.reports) / sum(r.size for r in self.reports)),
            delta_bound_max=float(max(r["delta_bound"].max() for r in self.reports)),
            bytes=int(sum(r[name].sum() for r in self.reports for name in ("bytes_k", "bytes_v", "bytes_meta")))))

    def reset(self) -> None:
        super().reset()
        self.steps = []
