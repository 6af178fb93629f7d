# SPDX-License-Identifier: Apache-2.0
"""Attention and mask functions as transformers calls them."""
from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from .. import _c
from ..torch import attention

# What other functions of AttentionInterface are given by some models, and entmax attention has no meaning for yet.
_REFUSED = {"sliding_window": "a sliding window", "softcap": "capped scores", "s_aux": "attention sinks",
            "position_bias": "a position bias", "output_attentions": "returning the attention weights"}


def alpha_of(config):
    """config.entmax_alpha: a number, or a tensor [H] of a list. Raises InvalidError where it is missing."""
    alpha = getattr(config, "entmax_alpha", None)
    if alpha is None:
        raise _c.InvalidError("config.entmax_alpha is missing; set it (1 is softmax, 1.5 entmax, up to 4) as the model was or is "
                              "to be trained")
    return torch.tensor(alpha, dtype=torch.float64) if isinstance(alpha, (list, tuple)) else float(alpha)


def check_mask(mask):
    if mask is not None and mask.dim() != 2:
        raise _c.UnsupportedError(f"attention_mask has {mask.dim()} dimensions; entmax attention takes the padding mask [B,N] "
                                  "and is causal by itself")


def _rows(tensor, keep):
    """The rows `keep` of [B,H,S,D] as [T,H,D]."""
    b, heads, s, d = tensor.shape
    return tensor.transpose(1, 2).reshape(b * s, heads, d)[keep]


def _offsets(mask):
    return torch.nn.functional.pad(mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


def dense(query, key, value, mask, alpha, scale, causal, slopes):
    """o [B,S,H,D] of query [B,H,S,D] and key, value [B,G,N,D]. mask: [B,N] bool, False where there is padding, anywhere; its last
    S columns are those of the queries. Tokens of padding are neither read nor counted in distances; their o is zero."""
    if mask is None:
        return attention(query, key, value, is_causal=causal, scale=scale, alpha=alpha, alibi_slopes=slopes).transpose(1, 2)
    b, heads, s, d = query.shape
    if tuple(mask.shape) != (b, key.shape[2]):
        raise _c.ShapeError(f"attention_mask has shape {tuple(mask.shape)}; {(b, key.shape[2])} is expected, a column a key")
    ours = mask[:, mask.shape[1] - s:]
    kept_q, kept_k = (m.reshape(-1).nonzero()[:, 0] for m in (ours, mask))
    o = attention(_rows(query, kept_q), _rows(key, kept_k), _rows(value, kept_k), is_causal=causal, scale=scale, alpha=alpha,
                  alibi_slopes=slopes, cu_seqlens_q=_offsets(ours), cu_seqlens_k=_offsets(mask))
    return query.new_zeros(b * s, heads, d).index_copy(0, kept_q, o).view(b, s, heads, d)


def attend(query, key, value, mask, alpha, scale, causal=True, slopes=None):
    """dense(), or, where key is what EntmaxCache.update() gave, attention over its pages."""
    check_mask(mask)
    layer = getattr(type(key), "layer_of", None)
    if layer is None:
        return dense(query, key, value, mask, alpha, scale, causal, slopes)
    if not causal:
        raise _c.UnsupportedError("EntmaxCache is for causal attention")
    return layer(key).attend(query, mask, alpha, scale, slopes)


def entmax_attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
                     **kwargs: Any) -> tuple[Tensor, None]:
    """(o [B,S,H,D], None) of query [B,H,S,D] and key, value [B,G,N,D]: alpha-entmax attention with alpha = config.entmax_alpha.

    attention_mask: None, or [B,N] of entmax_mask(). Gradients flow to query, key and value (alpha up to 2). Padding is left out,
    and its o is zero.
    Errors: InvalidError (no entmax_alpha), UnsupportedError (dropout, sliding windows, capped scores, sinks, a mask of another
    shape, attention weights wanted, another device than the CPU), ShapeError, DtypeError.
    """
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise _c.UnsupportedError(f"attn_implementation='entmax' does not do {what} ({name}); take another implementation "
                                      "for this model, or turn it off")
    if dropout:
        raise _c.UnsupportedError(f"dropout is {dropout}; with attn_implementation='entmax' it must be 0 "
                                  "(config.attention_dropout)")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal and getattr(module, "is_causal", True):
        # For torch's attention some models say False where the mask has the causality, or where there is one query; our masks are
        # of causal attention alone.
        causal = attention_mask is not None or query.shape[2] == 1
    return attend(query, key, value, attention_mask, alpha_of(getattr(module, "config", None)), scaling, causal), None


def _is_causal(function, b, first, s, offset, n):
    """Whether a mask function of transformers lets queries first .. first+s-1 see just what is not after them, of n keys from
    `offset` on. Functions other than the plain causal one are looked at pair by pair: transformers 4 wraps it for any
    position_ids, packed or not."""
    if function is None or function is causal_mask_function:
        return True
    batch, head = torch.arange(b)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.long)
    keys, rows = offset + torch.arange(n)[None, None, None], max(1, (1 << 22) // (b * n))
    for start in range(first, first + s, rows):
        queries = torch.arange(start, min(start + rows, first + s))[None, None, :, None]
        if not (function(batch, head, queries, keys) == (keys <= queries)).all():
            return False
    return True


def entmax_mask(batch_size: int, q_length: int = 1, kv_length: int = 1, q_offset: int | Tensor = 0, kv_offset: int = 0,
                mask_function: Callable | None = None, attention_mask: Tensor | None = None, cache_position: Tensor | None = None,
                **_: Any) -> Tensor | None:
    """The padding mask [B,N] that entmax_attention takes, or None where there is no padding; causality it has by itself.

    Errors: UnsupportedError (anything but a causal mask with padding: sliding windows, packed sequences, a cache that is longer
    than its tokens), ShapeError.
    """
    first = int(q_offset if cache_position is None else cache_position[0])
    s = q_length if cache_position is None else cache_position.shape[0]
    if not _is_causal(mask_function, batch_size, first, s, kv_offset, kv_length):
        raise _c.UnsupportedError("attn_implementation='entmax' takes causal masks with padding; not sliding windows, not "
                                  "position_ids that begin anew (packed sequences), no mask functions of one's own")
    if first + s != kv_offset + kv_length:
        raise _c.UnsupportedError("attn_implementation='entmax' works with caches that end at the newest token (DynamicCache, "
                                  "EntmaxCache), not with static ones")
    if attention_mask is None:
        return None
    if attention_mask.shape[-1] != kv_length:
        raise _c.ShapeError(f"attention_mask has {attention_mask.shape[-1]} columns for {kv_length} keys")
    return None if attention_mask.all() else attention_mask.to(torch.bool)
