# SPDX-License-Identifier: Apache-2.0
"""Maps of scores to weights with exact zeros, their gradients and their losses, on NumPy arrays."""
from __future__ import annotations

from ctypes import byref
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _c
from ._c import Context


def _rows(array, axis, name):
    """The array as [R, N] rows along `axis`, without a copy where the layout allows, and whether it was copied."""
    array = np.asarray(array)
    _c.dtype_code(array, name)
    if array.ndim == 0:
        raise _c.ShapeError(f"{name} is a scalar; rows need an axis")
    moved = np.moveaxis(array, axis, -1)
    n = moved.shape[-1]
    rows = moved.reshape(int(np.prod(moved.shape[:-1])), n)
    if not _c.usable(rows):
        rows = np.array(rows, order="C")
    return rows, moved.shape, not np.may_share_memory(rows, array)


def _back(rows, shape, axis):
    """Rows [R, N] in the shape and axis order of the caller's array."""
    return np.moveaxis(rows.reshape(shape), -1, axis)


def _per_row(rows, shape, axis):
    """Values [R] with the caller's shape, `axis` of length 1."""
    return np.moveaxis(rows.reshape(shape[:-1] + (1,)), -1, axis)


def _numbers(value, name, shape, axis):
    """(scalar, None), or (unused, one number a row [R] f64) for an array that broadcasts against the rows."""
    if np.ndim(value) == 0:
        return float(value), None
    value = np.asarray(value, dtype=np.float64)
    rows = list(shape)
    rows.insert(axis if axis >= 0 else len(shape) + axis, rows.pop())  # back in the caller's order
    rows[axis] = 1
    try:
        full = np.broadcast_to(value, rows)
    except ValueError:
        raise _c.ShapeError(f"{name} has shape {value.shape}, which does not broadcast to {tuple(rows)}") from None
    return 1.5, np.ascontiguousarray(np.moveaxis(full, axis, -1)).reshape(-1)


def _fine(dtype):
    """The dtype of thresholds and losses that goes with scores of `dtype`."""
    return np.float64 if dtype == np.float64 else np.float32


def _forward(kind, x, alpha, axis, return_support_size, return_tau, ctx, budget=1.0):
    rows, shape, copied = _rows(x, axis, "x")
    scalar, alphas = _numbers(alpha, "alpha", shape, axis)
    budget, budgets = _numbers(budget, "budget", shape, axis)
    p = rows if copied else np.empty_like(rows, order="C")
    tau = np.empty(rows.shape[0], _fine(rows.dtype)) if return_tau else None
    support = np.empty(rows.shape[0], np.int32) if return_support_size else None
    io = _c.fill(_c.make(_c.EntmaxIo), x=rows, p=p, tau=tau, support=support, alpha=alphas, budget=budgets)
    desc = _c.make(_c.EntmaxDesc, kind=kind, alpha=scalar, budget=budget)
    _c.run(ctx, _c.lib.emx_entmax_forward, byref(desc), byref(io))
    out = (_back(p, shape, axis),)
    if return_support_size:
        out += (_per_row(support, shape, axis),)
    if return_tau:
        out += (_per_row(tau, shape, axis),)
    return out if len(out) > 1 else out[0]


def _backward(kind, p, dp, alpha, axis, return_d_alpha, ctx):
    weights, shape, _ = _rows(p, axis, "p")
    upstream, dp_shape, copied = _rows(dp, axis, "dp")
    if shape != dp_shape:
        raise _c.ShapeError(f"p has shape {np.shape(p)} and dp {np.shape(dp)}; they must agree")
    scalar, alphas = _numbers(alpha, "alpha", shape, axis)
    dx = upstream if copied and upstream.dtype == weights.dtype else np.empty_like(weights, order="C")
    d_alpha = np.empty(weights.shape[0]) if return_d_alpha else None
    io = _c.fill(_c.make(_c.EntmaxIo), p=weights, dp=upstream, dx=dx, alpha=alphas, d_alpha=d_alpha)
    desc = _c.make(_c.EntmaxDesc, kind=kind, alpha=scalar)
    _c.run(ctx, _c.lib.emx_entmax_backward, byref(desc), byref(io))
    out = _back(dx, shape, axis)
    return (out, _per_row(d_alpha, shape, axis)) if return_d_alpha else out


def entmax(x: ArrayLike, alpha: float | ArrayLike = 1.5, axis: int = -1, *, return_support_size: bool = False,
           return_tau: bool = False, ctx: Context | None = None) -> Any:
    """alpha-entmax along `axis`: p_i = [(alpha-1) x_i - tau]_+ ^ (1/(alpha-1)), with tau such that p sums to one.

    x: scores, any shape, float16, bfloat16, float32 or float64; -inf is masked. Contiguous rows are read in place.
    alpha: 1 (softmax), or 1 + 1e-6 to 4; a number, or an array that broadcasts to x's shape with `axis` of length 1.
    Returns p, shape and dtype of x; with return_support_size also the number of nonzero weights (int32), with return_tau also the
    threshold (float64 for float64, else float32; NaN at alpha = 1), both with x's shape and `axis` of length 1. A fully masked
    row gives zeros, a row with NaN or +inf gives NaN.
    Errors: DtypeError, ShapeError, InvalidError (alpha), Cancelled.
    Source: Peters, Niculae, Martins 2019, "Sparse Sequence-to-Sequence Models".
    """
    return _forward(_c.MAP_ENTMAX, x, alpha, axis, return_support_size, return_tau, ctx)


def softmax(x: ArrayLike, axis: int = -1, *, ctx: Context | None = None) -> np.ndarray:
    """Softmax along `axis`: entmax of alpha = 1."""
    return entmax(x, 1.0, axis, ctx=ctx)


def sparsemax(x: ArrayLike, axis: int = -1, *, return_support_size: bool = False, return_tau: bool = False,
              ctx: Context | None = None) -> Any:
    """Sparsemax along `axis`, the projection onto the simplex (Martins, Astudillo 2016): entmax of alpha = 2."""
    return entmax(x, 2.0, axis, return_support_size=return_support_size, return_tau=return_tau, ctx=ctx)


def entmax15(x: ArrayLike, axis: int = -1, *, return_support_size: bool = False, return_tau: bool = False,
             ctx: Context | None = None) -> Any:
    """entmax of alpha = 1.5 along `axis`."""
    return entmax(x, 1.5, axis, return_support_size=return_support_size, return_tau=return_tau, ctx=ctx)


def normmax(x: ArrayLike, alpha: float | ArrayLike = 2.0, axis: int = -1, *, return_support_size: bool = False,
            return_tau: bool = False, ctx: Context | None = None) -> Any:
    """Normmax along `axis`: the p of the simplex that maximises p.x - |p|_alpha, 1 + 1e-6 <= alpha <= 1000.

    Arguments, results and errors as for entmax; tau is in units of the score.
    Sources: Blondel, Martins, Niculae 2020, "Learning with Fenchel-Young Losses"; Santos, Niculae, McNamee, Martins 2024.
    """
    return _forward(_c.MAP_NORMMAX, x, alpha, axis, return_support_size, return_tau, ctx)


def budget(x: ArrayLike, budget: float | ArrayLike, alpha: float | ArrayLike = 2.0, axis: int = -1, *,
           return_support_size: bool = False, return_tau: bool = False, ctx: Context | None = None) -> Any:
    """Weights of at most one each and `budget` in all: p_i = min(1, [(alpha-1) x_i - tau]_+ ^ (1/(alpha-1))), sum p = budget.

    budget: 0 < budget <= length of `axis`; a number, or an array as alpha may be. 1 + 1e-6 <= alpha <= 4; alpha = 2 is the
    k-subsets relaxation.
    Arguments, results and errors otherwise as for entmax. A row with fewer unmasked scores than the budget gives each weight 1.
    Source: Malaviya, Ferreira, Martins 2018, "Sparse and Constrained Attention for Neural Machine Translation" (upper bounds).
    """
    return _forward(_c.MAP_BUDGET, x, alpha, axis, return_support_size, return_tau, ctx, budget)


def entmax_backward(p: ArrayLike, dp: ArrayLike, alpha: float | ArrayLike = 1.5, axis: int = -1, *, return_d_alpha: bool = False,
                    ctx: Context | None = None) -> Any:
    """Gradient of entmax: J^T dp, from the weights alone.

    p: weights that entmax(x, alpha, axis) gave; dp: gradient of p, shape and dtype of p; alpha as there.
    Returns dx, shape and dtype of p; with return_d_alpha also the gradient of each row's alpha (float64, `axis` of length 1; at
    alpha = 1 the derivative from the right).
    Errors: DtypeError, ShapeError, InvalidError, Cancelled.
    Sources: Peters et al. 2019, prop. 2; Correia, Niculae, Martins 2019, prop. 1 (alpha).
    """
    return _backward(_c.MAP_ENTMAX, p, dp, alpha, axis, return_d_alpha, ctx)


def softmax_backward(p: ArrayLike, dp: ArrayLike, axis: int = -1, *, ctx: Context | None = None) -> np.ndarray:
    """Gradient of softmax; see entmax_backward."""
    return entmax_backward(p, dp, 1.0, axis, ctx=ctx)


def sparsemax_backward(p: ArrayLike, dp: ArrayLike, axis: int = -1, *, ctx: Context | None = None) -> np.ndarray:
    """Gradient of sparsemax; see entmax_backward."""
    return entmax_backward(p, dp, 2.0, axis, ctx=ctx)


def entmax15_backward(p: ArrayLike, dp: ArrayLike, axis: int = -1, *, ctx: Context | None = None) -> np.ndarray:
    """Gradient of entmax15; see entmax_backward."""
    return entmax_backward(p, dp, 1.5, axis, ctx=ctx)


def normmax_backward(p: ArrayLike, dp: ArrayLike, alpha: float | ArrayLike = 2.0, axis: int = -1, *,
                     ctx: Context | None = None) -> np.ndarray:
    """Gradient of normmax; see entmax_backward."""
    return _backward(_c.MAP_NORMMAX, p, dp, alpha, axis, False, ctx)


def budget_backward(p: ArrayLike, dp: ArrayLike, alpha: float | ArrayLike = 2.0, axis: int = -1, *,
                    ctx: Context | None = None) -> np.ndarray:
    """Gradient of budget: only weights strictly between 0 and 1 move; see entmax_backward."""
    return _backward(_c.MAP_BUDGET, p, dp, alpha, axis, False, ctx)


_REDUCTIONS = {"none": _c.REDUCE_NONE, "sum": _c.REDUCE_SUM, "mean": _c.REDUCE_MEAN}


def _loss(kind, x, target, alpha, ignore_index, reduction, return_grad, ctx):
    if reduction not in _REDUCTIONS:
        raise _c.InvalidError(f"reduction is {reduction!r}; 'none', 'sum' and 'mean' are possible")
    rows, shape, _ = _rows(x, -1, "x")
    target = np.asarray(target)
    if target.shape != shape[:-1]:
        raise _c.ShapeError(f"target has shape {target.shape}; x of shape {shape} needs {shape[:-1]}")
    if target.dtype.kind not in "iu":
        raise _c.DtypeError(f"target has dtype {target.dtype}; classes are integers")
    if target.dtype != np.int32:
        limits = np.iinfo(np.int32)
        if target.size and (target.min() < limits.min or target.max() > limits.max):
            raise _c.InvalidError("a target does not fit in int32")
        target = target.astype(np.int32)
    loss = np.empty(rows.shape[0], _fine(rows.dtype))
    total = np.empty(1, loss.dtype) if reduction != "none" else None
    dx = np.empty_like(rows, order="C") if return_grad else None
    io = _c.fill(_c.make(_c.LossIo, ignore_index=ignore_index, reduction=_REDUCTIONS[reduction]), x=rows,
                 target=np.ascontiguousarray(target.reshape(-1)), loss=loss, total=total, dx=dx)
    _c.run(ctx, _c.lib.emx_entmax_loss, byref(_c.make(_c.EntmaxDesc, kind=kind, alpha=alpha)), byref(io))
    out = loss.reshape(shape[:-1]) if total is None else total[0]
    return (out, dx.reshape(shape)) if return_grad else out


def entmax_loss(x: ArrayLike, target: ArrayLike, alpha: float = 1.5, *, ignore_index: int = -100, reduction: str = "mean",
                return_grad: bool = False, ctx: Context | None = None) -> Any:
    """Fenchel-Young loss of entmax: max_p (p.x + H(p)) - x_target. alpha = 1 is cross-entropy in nats, 2 the sparsemax loss.

    x: scores [..., V], float16, bfloat16, float32 or float64; target: integers [...], 0 <= target < V or ignore_index (loss and
    gradient 0). reduction: "none" gives losses [...], "sum" their sum, "mean" that over the rows that are not ignored (NaN if
    there is none); float64 for float64 scores, else float32.
    With return_grad also the gradient of the result (of each row's loss for "none") by x, shape and dtype of x: p - e_target.
    Errors: DtypeError, ShapeError, InvalidError (a target that is no class, alpha, reduction), Cancelled.
    Sources: Blondel, Martins, Niculae 2020; Peters, Niculae, Martins 2019.
    """
    return _loss(_c.MAP_ENTMAX, x, target, float(alpha), ignore_index, reduction, return_grad, ctx)


def sparsemax_loss(x: ArrayLike, target: ArrayLike, *, ignore_index: int = -100, reduction: str = "mean",
                   return_grad: bool = False, ctx: Context | None = None) -> Any:
    """Sparsemax loss (Martins, Astudillo 2016): entmax_loss of alpha = 2."""
    return entmax_loss(x, target, 2.0, ignore_index=ignore_index, reduction=reduction, return_grad=return_grad, ctx=ctx)


def entmax15_loss(x: ArrayLike, target: ArrayLike, *, ignore_index: int = -100, reduction: str = "mean",
                  return_grad: bool = False, ctx: Context | None = None) -> Any:
    """entmax_loss of alpha = 1.5."""
    return entmax_loss(x, target, 1.5, ignore_index=ignore_index, reduction=reduction, return_grad=return_grad, ctx=ctx)


def normmax_loss(x: ArrayLike, target: ArrayLike, alpha: float = 2.0, *, ignore_index: int = -100, reduction: str = "mean",
                 return_grad: bool = False, ctx: Context | None = None) -> Any:
    """Fenchel-Young loss of normmax, H(p) = 1 - |p|_alpha; arguments as for entmax_loss."""
    return _loss(_c.MAP_NORMMAX, x, target, float(alpha), ignore_index, reduction, return_grad, ctx)
