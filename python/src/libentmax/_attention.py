# SPDX-License-Identifier: Apache-2.0
"""Dense entmax attention and its gradient on NumPy arrays."""
from __future__ import annotations

from ctypes import byref, c_size_t
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _c
from ._c import Context

LAYOUTS = {"BHND": _c.LAYOUT_BHND, "BNHD": _c.LAYOUT_BNHD}


def layout_code(layout):
    if layout not in LAYOUTS:
        raise _c.InvalidError(f"layout is {layout!r}; 'BHND' and 'BNHD' are possible")
    return LAYOUTS[layout]


def indices(array, name):
    """An int32 array of lengths or page numbers, from any integers."""
    if array is None:
        return None
    array = np.asarray(array)
    if array.dtype.kind not in "iu":
        raise _c.DtypeError(f"{name} has dtype {array.dtype}; it holds integers")
    limits = np.iinfo(np.int32)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise _c.InvalidError(f"{name} has a number that does not fit in int32")
    return np.ascontiguousarray(array, dtype=np.int32)


def head_alphas(alpha):
    """(scalar, None) or (unused, [H] float64)."""
    if np.ndim(alpha) == 0:
        return float(alpha), None
    return 1.5, np.ascontiguousarray(alpha, dtype=np.float64)


def slopes(array):
    return None if array is None else np.ascontiguousarray(array, dtype=np.float32)


def _desc(alpha, causal, scale, window, layout):
    left, right = window
    return _c.make(_c.AttnDesc, flags=_c.ATTN_CAUSAL if causal else 0, alpha=alpha, scale=scale or 0.0,
                   layout=layout_code(layout), window_left=left, window_right=right)


def _run(function, backward, desc, io, ctx):
    ctx = _c.context(ctx)
    size = c_size_t()
    which = _c.PASS_BACKWARD if backward else _c.PASS_FORWARD
    _c.run(ctx, _c.lib.emx_attn_workspace_size, byref(desc), byref(io), which, byref(size))
    workspace = np.empty(size.value, np.uint8)
    _c.run(ctx, function, byref(desc), byref(io), workspace.ctypes.data, size)


def attention(q: ArrayLike, k: ArrayLike, v: ArrayLike, alpha: float | ArrayLike = 1.5, *, causal: bool = False,
              scale: float | None = None, window: tuple[int, int] = (-1, -1), layout: str = "BHND",
              alibi_slopes: ArrayLike | None = None, block_table: ArrayLike | None = None, seqlens_q: ArrayLike | None = None,
              seqlens_k: ArrayLike | None = None, cu_seqlens_q: ArrayLike | None = None, cu_seqlens_k: ArrayLike | None = None,
              return_tau: bool = False, return_support_size: bool = False, ctx: Context | None = None) -> Any:
    """o_i = sum_j p_ij v_j, with p_i the alpha-entmax of the scores scale * (q_i . k_j) + ALiBi.

    padded: q [B,H,S,D], k and v [B,G,N,D] ("BNHD": [B,S,H,D], [B,N,G,D]); seqlens_q, seqlens_k [B] optional.
    packed: q [T,H,D], k and v [T',G,D] with cu_seqlens_q and cu_seqlens_k [B+1].
    paged: k, v pools [M',G,P,D] ("BNHD": [M',P,G,D]) with block_table [B,M] and seqlens_k.
    Query head h reads KV head h / (H/G). k and v: float32, float16, bfloat16 or float64; q the same, or float32 over 16-bit keys.
    alpha: 1 (softmax) or 1 + 1e-6 to 4; a number, or one a head [H]. scale None: 1/sqrt(D). window: keys before and after the
    query's own position, -1: all. causal is bottom-right aligned. alibi_slopes [H] float32: adds -slope * distance.
    Returns o, shape and dtype of q; with return_tau also the threshold, in units of (alpha-1) * score (at a number alpha = 1 the
    log-sum-exp), with return_support_size also the number of nonzero weights (int32), both of q's shape without D.
    Arrays whose last dimension is contiguous are read in place.
    Errors: DtypeError, ShapeError, InvalidError, UnsupportedError, Cancelled.
    Sources: Peters, Niculae, Martins 2019; AdaSplash-2 (one pass over the keys).
    """
    q, k, v = _c.readable(q, "q"), _c.readable(k, "k"), _c.readable(v, "v")
    scalar, alphas = head_alphas(alpha)
    o = np.zeros(q.shape, q.dtype)
    rows = q.shape[:-1]
    threshold = np.zeros(rows, np.float64 if q.dtype == np.float64 else np.float32) if return_tau else None
    support = np.zeros(rows, np.int32) if return_support_size else None
    softmax = alphas is None and scalar == 1.0
    io = _c.fill(_c.make(_c.AttnIo), q=q, k=k, v=v, o=o, support=support, alphas=alphas, alibi_slopes=slopes(alibi_slopes),
                 block_table=indices(block_table, "block_table"), seqlens_q=indices(seqlens_q, "seqlens_q"),
                 seqlens_k=indices(seqlens_k, "seqlens_k"), cu_seqlens_q=indices(cu_seqlens_q, "cu_seqlens_q"),
                 cu_seqlens_k=indices(cu_seqlens_k, "cu_seqlens_k"), **{"lse" if softmax else "tau": threshold})
    _run(_c.lib.emx_attn_forward, False, _desc(scalar, causal, scale, window, layout), io, ctx)
    out = (o,) + ((threshold,) if return_tau else ()) + ((support,) if return_support_size else ())
    return out if len(out) > 1 else o


def attention_backward(d_o: ArrayLike, q: ArrayLike, k: ArrayLike, v: ArrayLike, tau: ArrayLike, alpha: float | ArrayLike = 1.5,
                       *, causal: bool = False, scale: float | None = None, window: tuple[int, int] = (-1, -1),
                       layout: str = "BHND", alibi_slopes: ArrayLike | None = None, seqlens_q: ArrayLike | None = None,
                       seqlens_k: ArrayLike | None = None, cu_seqlens_q: ArrayLike | None = None,
                       cu_seqlens_k: ArrayLike | None = None, return_d_alpha: bool = False, ctx: Context | None = None) -> Any:
    """Gradients (d_q, d_k, d_v) of attention, each with shape and dtype of what it belongs to.

    d_o: gradient of o, shape of q; tau: what attention(..., return_tau=True) gave with the same arguments. 1 <= alpha <= 2, k and
    v contiguous or packed. With return_d_alpha, where alpha is one number a head, also its gradient [H] float64.
    Errors: as for attention.
    """
    q, k, v, d_o = _c.readable(q, "q"), _c.readable(k, "k"), _c.readable(v, "v"), _c.readable(d_o, "d_o")
    scalar, alphas = head_alphas(alpha)
    softmax = alphas is None and scalar == 1.0
    if return_d_alpha and alphas is None:
        raise _c.InvalidError("return_d_alpha needs alpha as one number a head")
    d_alpha = np.zeros(alphas.shape) if return_d_alpha else None
    d_q, d_k, d_v = (np.zeros(a.shape, a.dtype) for a in (q, k, v))
    io = _c.fill(_c.make(_c.AttnIo), q=q, k=k, v=v, d_o=d_o, d_q=d_q, d_k=d_k, d_v=d_v, alphas=alphas, d_alpha=d_alpha,
                 alibi_slopes=slopes(alibi_slopes), seqlens_q=indices(seqlens_q, "seqlens_q"),
                 seqlens_k=indices(seqlens_k, "seqlens_k"), cu_seqlens_q=indices(cu_seqlens_q, "cu_seqlens_q"),
                 cu_seqlens_k=indices(cu_seqlens_k, "cu_seqlens_k"), **{"lse" if softmax else "tau": _c.readable(tau, "tau")})
    _run(_c.lib.emx_attn_backward, True, _desc(scalar, causal, scale, window, layout), io, ctx)
    return (d_q, d_k, d_v, d_alpha) if return_d_alpha else (d_q, d_k, d_v)
