# SPDX-License-Identifier: Apache-2.0
"""Fenchel-Young losses on PyTorch tensors."""
from __future__ import annotations

from ctypes import byref
from math import prod

import torch
from torch import Tensor, nn

from .. import _c
from . import _core

__all__ = ["entmax15_loss", "sparsemax_loss", "entmax_bisect_loss", "sparsemax_bisect_loss", "normmax_bisect_loss",
           "Entmax15Loss", "SparsemaxLoss", "EntmaxBisectLoss", "SparsemaxBisectLoss", "NormmaxBisectLoss"]

# ------------------------------------------------------------------------------------------------------------- operators


def _run(x, target, kind, alpha, ignore_index, **out):
    if target.dtype not in (torch.int64, torch.int32):
        raise _c.DtypeError(f"target has dtype {target.dtype}; classes are int64 or int32")
    if target.dtype == torch.int64:
        limits = torch.iinfo(torch.int32)
        if target.device.type == "cuda":  # nobody waits to look: the library finds what is no class
            target = target.clamp(limits.min, limits.max)
        elif target.numel() and (target.min() < limits.min or target.max() > limits.max):
            raise _c.InvalidError("a target does not fit in int32")
        target = target.to(torch.int32)
    target = _core.readable(target, "target")
    io = _core.fill(_c.make(_c.LossIo, ignore_index=ignore_index), x=x, target=target, **out)
    _core.run(x, _c.lib.emx_entmax_loss, byref(_c.make(_c.EntmaxDesc, kind=kind, alpha=alpha)), byref(io))


def _backward_fake(d_loss, x, target, kind, alpha, ignore_index):
    return x.new_empty(x.shape)


@_core.operator("loss_backward",
                "(Tensor d_loss, Tensor x, Tensor target, int kind, float alpha, int ignore_index) -> Tensor", _backward_fake)
def _rows_backward(d_loss, x, target, kind, alpha, ignore_index):
    """The scores are mapped again: that is cheaper than to keep p - e_target from the forward pass and to scale it."""
    x, d_loss = _core.readable(x, "X"), _core.readable(d_loss, "d_loss")
    dx = _backward_fake(d_loss, x, target, kind, alpha, ignore_index)
    _run(x, target, kind, alpha, ignore_index, loss=torch.empty_like(d_loss), d_loss=d_loss, dx=dx)
    return dx


def _fake(x, target, kind, alpha, ignore_index):
    return x.new_empty((x.shape[0],), dtype=_core.fine(x.dtype))


def _setup(ctx, inputs, output):
    x, target, ctx.kind, ctx.alpha, ctx.ignore_index = inputs
    ctx.save_for_backward(x, target)


def _gradient(ctx, d_loss):
    return _rows_backward(d_loss, *ctx.saved_tensors, ctx.kind, ctx.alpha, ctx.ignore_index), None, None, None, None


@_core.operator("loss", "(Tensor x, Tensor target, int kind, float alpha, int ignore_index) -> Tensor", _fake, _setup, _gradient)
def _rows(x, target, kind, alpha, ignore_index):
    """Losses [R] of scores [R,V] and targets [R]."""
    x = _core.readable(x, "X")
    loss = _fake(x, target, kind, alpha, ignore_index)
    _run(x, target, kind, alpha, ignore_index, loss=loss)
    return loss


# ------------------------------------------------------------------------------------------------------------- functions


def _loss(kind, x, target, alpha, ignore_index=-100):
    _core.no_gradient(alpha, "alpha", "the loss")
    if x.dim() == 0 or target.shape != x.shape[:-1]:
        raise _c.ShapeError(f"X has shape {tuple(x.shape)} and target {tuple(target.shape)}; [..., V] and [...] are needed")
    rows = _rows(x.reshape(prod(x.shape[:-1]), x.shape[-1]), target.reshape(-1), kind, float(alpha), ignore_index)
    return rows.reshape(target.shape)


def entmax_bisect_loss(X: Tensor, target: Tensor, alpha: float | Tensor = 1.5, n_iter: int = 50) -> Tensor:
    """Fenchel-Young loss of entmax, one a row: max_p (p.x + H(p)) - x_target. alpha = 1: cross-entropy in nats.

    X: scores [..., V], float32, float64, float16 or bfloat16; target: int64 or int32 [...], 0 <= target < V, or -100 for rows
    that do not count (loss and gradient 0). alpha: a number, 1 or 1 + 1e-6 to 4. n_iter changes nothing: the threshold is exact.
    Returns losses [...], float64 for float64 scores, else float32, never negative. The gradient by X is p - e_target, with the
    map done again, so that nothing but X is kept for it.
    Errors: DtypeError, ShapeError, InvalidError (a target that is no class, alpha; see synchronize), UnsupportedError (device),
    Cancelled.
    Sources: Blondel, Martins, Niculae 2020, "Learning with Fenchel-Young Losses"; Peters, Niculae, Martins 2019.
    """
    return _loss(_c.MAP_ENTMAX, X, target, alpha)


def entmax15_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """entmax_bisect_loss of alpha = 1.5. k is not needed: only scores that may have weight are looked at twice anyway."""
    return _loss(_c.MAP_ENTMAX, X, target, 1.5)


def sparsemax_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """Sparsemax loss (Martins, Astudillo 2016): entmax_bisect_loss of alpha = 2. k as in entmax15_loss."""
    return _loss(_c.MAP_ENTMAX, X, target, 2.0)


def sparsemax_bisect_loss(X: Tensor, target: Tensor, n_iter: int = 50) -> Tensor:
    """The same as sparsemax_loss(X, target)."""
    return _loss(_c.MAP_ENTMAX, X, target, 2.0)


def normmax_bisect_loss(X: Tensor, target: Tensor, alpha: float | Tensor = 2, n_iter: int = 50) -> Tensor:
    """Fenchel-Young loss of normmax, H(p) = 1 - |p|_alpha, 1 + 1e-6 <= alpha <= 1000; otherwise as entmax_bisect_loss."""
    return _loss(_c.MAP_NORMMAX, X, target, alpha)


# --------------------------------------------------------------------------------------------------------------- modules


class _Loss(nn.Module):
    def __init__(self, kind, alpha, ignore_index, reduction) -> None:
        super().__init__()
        if reduction not in ("elementwise_mean", "mean", "sum", "none"):
            raise _c.InvalidError(f"reduction is {reduction!r}; 'elementwise_mean', 'mean' (the same), 'sum' and 'none' are "
                                  "possible")
        self.kind, self.alpha, self.ignore_index, self.reduction = kind, alpha, int(ignore_index), reduction

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        """The loss of X [..., V] and target [...]: a scalar, for "none" [...]. The mean is over rows that are not ignored."""
        loss = _loss(self.kind, X, target, self.alpha, self.ignore_index)
        if self.reduction == "none":
            return loss
        total = loss.sum()
        return total if self.reduction == "sum" else total / (target != self.ignore_index).sum()


class EntmaxBisectLoss(_Loss):
    """entmax_bisect_loss, reduced. Rows whose target is ignore_index, which may be a class or not, have loss and gradient 0.

    reduction: "elementwise_mean" or "mean" (over the rows that are not ignored; NaN if there is none), "sum" or "none".
    """

    def __init__(self, alpha: float | Tensor = 1.5, n_iter: int = 50, ignore_index: int = -100,
                 reduction: str = "elementwise_mean") -> None:
        super().__init__(_c.MAP_ENTMAX, alpha, ignore_index, reduction)


class Entmax15Loss(_Loss):
    """EntmaxBisectLoss of alpha = 1.5; k changes nothing."""

    def __init__(self, k: int | None = 100, ignore_index: int = -100, reduction: str = "elementwise_mean") -> None:
        super().__init__(_c.MAP_ENTMAX, 1.5, ignore_index, reduction)


class SparsemaxLoss(_Loss):
    """EntmaxBisectLoss of alpha = 2; k changes nothing."""

    def __init__(self, k: int | None = None, ignore_index: int = -100, reduction: str = "elementwise_mean") -> None:
        super().__init__(_c.MAP_ENTMAX, 2.0, ignore_index, reduction)


class SparsemaxBisectLoss(_Loss):
    """The same as SparsemaxLoss."""

    def __init__(self, n_iter: int = 50, ignore_index: int = -100, reduction: str = "elementwise_mean") -> None:
        super().__init__(_c.MAP_ENTMAX, 2.0, ignore_index, reduction)


class NormmaxBisectLoss(_Loss):
    """normmax_bisect_loss, reduced; otherwise as EntmaxBisectLoss."""

    def __init__(self, alpha: float | Tensor = 2, n_iter: int = 50, ignore_index: int = -100,
                 reduction: str = "elementwise_mean") -> None:
        super().__init__(_c.MAP_NORMMAX, alpha, ignore_index, reduction)
