# SPDX-License-Identifier: Apache-2.0
"""Dense entmax attention on PyTorch tensors."""
from __future__ import annotations

from ctypes import byref, c_size_t
from typing import Any

import torch
from torch import Tensor

from .. import _c
from .._attention import layout_code
from . import _core

__all__ = ["attention"]

# Entries of a row's support that the forward pass keeps for the backward pass, which finds the others again; 0 at alpha = 1.
_LIST = 64

_OPTIONS = ("Tensor? alphas, Tensor? alibi_slopes, Tensor? seqlens_q, Tensor? seqlens_k, Tensor? cu_seqlens_q, "
            "Tensor? cu_seqlens_k, float alpha, bool causal, float scale, int window_left, int window_right, int layout")

# ------------------------------------------------------------------------------------------------------------- operators


def _run(backward, q, alpha, causal, scale, window_left, window_right, layout, tensors):
    desc = _c.make(_c.AttnDesc, flags=_c.ATTN_CAUSAL if causal else 0, alpha=alpha, scale=scale, layout=layout,
                   window_left=window_left, window_right=window_right)
    io = _core.fill(_c.make(_c.AttnIo), **tensors)
    size = c_size_t()
    which = _c.PASS_BACKWARD if backward else _c.PASS_FORWARD
    _core.run(q, _c.lib.emx_attn_workspace_size, byref(desc), byref(io), which, byref(size))
    workspace = q.new_empty(size.value, dtype=torch.uint8)
    _core.run(q, _c.lib.emx_attn_backward if backward else _c.lib.emx_attn_forward, byref(desc), byref(io), workspace.data_ptr(),
              size)


def _inputs(q, k, v, alphas, alibi_slopes, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k):
    named = dict(q=q, k=k, v=v, alphas=alphas, alibi_slopes=alibi_slopes, seqlens_q=seqlens_q, seqlens_k=seqlens_k,
                 cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    return {name: _core.readable(t, name) for name, t in named.items() if t is not None}


def _threshold(alphas, alpha):
    return "lse" if alphas is None and alpha == 1.0 else "tau"


def _backward_fake(d_o, q, k, v, tau, support, index, alphas, *rest):
    return tuple(t.new_empty(t.shape) for t in (q, k, v)) + (q.new_empty((0,) if alphas is None else alphas.shape,
                                                                        dtype=torch.float64),)


@_core.operator("attention_backward", "(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor tau, Tensor support, Tensor index, "
                f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)", _backward_fake)
def _attention_backward(d_o, q, k, v, tau, support, index, alphas, alibi_slopes, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k,
                        alpha, causal, scale, window_left, window_right, layout):
    tensors = _inputs(q, k, v, alphas, alibi_slopes, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k)
    # Rows past the last packed sequence are left alone by the library.
    d_q, d_k, d_v = (t.new_empty(t.shape) if cu_seqlens_q is None else t.new_zeros(t.shape) for t in (q, k, v))
    d_alpha = q.new_zeros((0,) if alphas is None else alphas.shape, dtype=torch.float64)
    tensors.update(d_o=_core.readable(d_o, "d_o"), d_q=d_q, d_k=d_k, d_v=d_v)
    tensors[_threshold(alphas, alpha)] = tau
    if alphas is not None:
        tensors["d_alpha"] = d_alpha
    if index.shape[-1]:
        tensors.update(support=support, support_index=index)
    _run(True, q, alpha, causal, scale, window_left, window_right, layout, tensors)
    return d_q, d_k, d_v, d_alpha


def _fake(q, k, v, alphas, *rest):
    rows, lists = q.shape[:-1], rest[-1]
    return (q.new_empty(q.shape), q.new_empty(rows, dtype=_core.fine(q.dtype)), q.new_empty(rows, dtype=torch.int32),
            q.new_empty((*rows, lists), dtype=torch.int32))


def _setup(ctx, inputs, output):
    *tensors, alpha, causal, scale, window_left, window_right, layout, _ = inputs
    ctx.numbers = alpha, causal, scale, window_left, window_right, layout
    ctx.save_for_backward(*tensors[:3], *output[1:], *tensors[3:])


def _gradient(ctx, d_o, *_):
    d_q, d_k, d_v, d_alpha = _attention_backward(d_o, *ctx.saved_tensors, *ctx.numbers)
    return (d_q, d_k, d_v, d_alpha if ctx.needs_input_grad[3] else None) + (None,) * 12


@_core.operator("attention", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, int lists) -> (Tensor, Tensor, Tensor, Tensor)", _fake,
                _setup, _gradient)
def _attention(q, k, v, alphas, alibi_slopes, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k, alpha, causal, scale, window_left,
               window_right, layout, lists):
    """o, tau, support and, of each row, the positions of the first `lists` nonzero weights."""
    tensors = _inputs(q, k, v, alphas, alibi_slopes, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k)
    make = q.new_empty if cu_seqlens_q is None else q.new_zeros
    rows = q.shape[:-1]
    o, tau, support = make(q.shape), make(rows, dtype=_core.fine(q.dtype)), make(rows, dtype=torch.int32)
    index = q.new_zeros((*rows, lists), dtype=torch.int32)  # entries past a row's support are left alone by the library
    tensors.update(o=o, support=support)
    tensors[_threshold(alphas, alpha)] = tau
    if lists:
        tensors["support_index"] = index
    _run(False, q, alpha, causal, scale, window_left, window_right, layout, tensors)
    return o, tau, support, index


# -------------------------------------------------------------------------------------------------------------- function


def _lengths(tensor):
    return None if tensor is None else tensor.to(torch.int32)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False,
              scale: float | None = None, enable_gqa: bool = False, *, alpha: float | Tensor = 1.5,
              window: tuple[int, int] = (-1, -1), layout: str = "BHND", alibi_slopes: Tensor | None = None,
              seqlens_q: Tensor | None = None, seqlens_k: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
              cu_seqlens_k: Tensor | None = None, return_tau: bool = False, return_support_size: bool = False) -> Any:
    """o_i = sum_j p_ij v_j, with p_i the alpha-entmax of the scores scale * (q_i . k_j) + ALiBi.

    The first arguments are those of torch.nn.functional.scaled_dot_product_attention.
    padded: query [B,H,S,D], key and value [B,G,N,D] (layout "BNHD": [B,S,H,D], [B,N,G,D]), or without B; seqlens_q, seqlens_k [B]
    optional, any integers: rows past a length are not read, outputs there are zero.
    packed: query [T,H,D], key and value [T',G,D] with cu_seqlens_q and cu_seqlens_k [B+1].
    H is a multiple of G, and query head h reads KV head h / (H/G), whatever enable_gqa says. key and value: float32, float16,
    bfloat16 or float64; query the same, or float32 over 16-bit keys. D is 16 to 256 (float64: 1 to 256).
    attn_mask must be None and dropout_p 0: NotImplementedError says what to use instead.
    is_causal: query i of S sees keys 0 .. N-S+i, aligned at the bottom right, as in decoding with a cache. torch aligns at the
    top left, which is another thing where S and N differ.
    scale None: 1/sqrt(D). window: keys before and after the query's own position, -1: all.
    alpha: 1 (softmax) or 1 + 1e-6 to 4, to 2 where a gradient is taken; a number, or a tensor of one number a query head [H] or
    one for all, which gets a gradient.
    alibi_slopes [H]: adds -slope * distance; no gradient.
    Returns o, shape and dtype of query; with return_tau also the threshold, in units of (alpha-1) * score (at a number alpha = 1
    the log-sum-exp), float64 for float64, else float32; with return_support_size also the number of nonzero weights (int32); both
    of query's shape without D and without a gradient.
    What is kept for the backward pass: the arguments, tau, and the positions of at most 64 nonzero weights a row.
    Errors: DtypeError, ShapeError, InvalidError, UnsupportedError, Cancelled.
    Sources: Peters, Niculae, Martins 2019; AdaSplash-2 (one pass over the keys).
    """
    if attn_mask is not None:
        raise NotImplementedError("attention takes no attn_mask: use is_causal, window, seqlens_k (padding), cu_seqlens_q and "
                                  "cu_seqlens_k (packed sequences) or alibi_slopes")
    if dropout_p:
        raise NotImplementedError(f"dropout_p is {dropout_p}: dropped weights would no longer be an entmax; pass 0 and drop "
                                  "elements of the output, as torch.nn.functional.dropout does")
    _core.no_gradient(alibi_slopes, "alibi_slopes", "attention")
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    single = query.dim() == 3 and not packed
    if single:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    code = layout_code(layout)
    alphas = None
    if isinstance(alpha, Tensor):
        heads = query.shape[-2 if packed or code == _c.LAYOUT_BNHD else 1]
        if alpha.numel() not in (1, heads):
            raise _c.ShapeError(f"alpha has shape {tuple(alpha.shape)}; one number, or one for each of the {heads} query heads")
        alpha, alphas = 1.5, alpha.to(torch.float64).reshape(-1).expand(heads)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (query, key, value, alphas))
    softmax = alphas is None and float(alpha) == 1.0
    slopes = None if alibi_slopes is None else alibi_slopes.to(torch.float32)
    o, tau, support, _ = _attention(query, key, value, alphas, slopes, _lengths(seqlens_q), _lengths(seqlens_k),
                                    _lengths(cu_seqlens_q), _lengths(cu_seqlens_k), float(alpha), bool(is_causal),
                                    float(scale or 0.0), window[0], window[1], code,
                                    _LIST if differentiable and not softmax else 0)
    out = (o,) + ((tau.detach(),) if return_tau else ()) + ((support,) if return_support_size else ())
    if single:
        out = tuple(t.squeeze(0) for t in out)
    return out if len(out) > 1 else out[0]
