# SPDX-License-Identifier: Apache-2.0
"""Maps of scores to weights with exact zeros, on PyTorch tensors."""
from __future__ import annotations

from ctypes import byref
from math import prod

import torch
from torch import Tensor, nn

from .. import _c
from . import _core

__all__ = ["entmax", "entmax15", "sparsemax", "entmax_bisect", "sparsemax_bisect", "normmax_bisect", "budget_bisect", "Entmax15",
           "Sparsemax", "EntmaxBisect", "SparsemaxBisect", "NormmaxBisect", "BudgetBisect"]

# ------------------------------------------------------------------------------------------------------------- operators


def _rows_backward_fake(p, dp, alphas, kind, alpha, want_alpha):
    return p.new_empty(p.shape), p.new_empty((p.shape[0] if want_alpha else 0,), dtype=torch.float64)


def _second_setup(ctx, inputs, output):
    p, dp, alphas, ctx.kind, ctx.alpha, ctx.want_alpha = inputs
    ctx.save_for_backward(p, dp, alphas)


def _second_gradient(ctx, h, _):
    """dx = u (dp - m(dp)) with u = p^(2-alpha) where p moves and m(y) = sum u y / sum u: linear in dp, symmetric, and
    d(h . dx) / du = (dp - m(dp)) (h - m(h))."""
    p, dp, alphas = ctx.saved_tensors
    if ctx.kind == _c.MAP_NORMMAX or ctx.want_alpha:
        _core.no_derivative(ctx)
    alpha = ctx.alpha if alphas is None else alphas[:, None].to(p.dtype)
    moves = (p > 0) & (p < 1) if ctx.kind == _c.MAP_BUDGET else p > 0
    safe = torch.where(moves, p, torch.ones_like(p))
    u = torch.where(moves, safe ** (2 - alpha), torch.zeros_like(p))
    total = u.sum(-1, keepdim=True)
    inner = [y - (u * y).sum(-1, keepdim=True) / total for y in (dp, h)]
    d_p = torch.where(moves, (2 - alpha) * safe ** (1 - alpha) * inner[0] * inner[1], torch.zeros_like(p))
    return d_p, _rows_backward(p, h, alphas, ctx.kind, ctx.alpha, False)[0], None, None, None, None


@_core.operator("map_backward",
                "(Tensor p, Tensor dp, Tensor? alphas, int kind, float alpha, bool want_alpha) -> (Tensor, Tensor)",
                _rows_backward_fake, _second_setup, _second_gradient)
def _rows_backward(p, dp, alphas, kind, alpha, want_alpha):
    p, dp = _core.readable(p, "p"), _core.readable(dp, "dp")
    dx, d_alpha = _rows_backward_fake(p, dp, alphas, kind, alpha, want_alpha)
    alphas = None if alphas is None else _core.readable(alphas, "alpha")
    io = _core.fill(_c.make(_c.EntmaxIo), p=p, dp=dp, dx=dx, alpha=alphas, d_alpha=d_alpha if want_alpha else None)
    _core.run(p, _c.lib.emx_entmax_backward, byref(_c.make(_c.EntmaxDesc, kind=kind, alpha=alpha)), byref(io))
    return dx, d_alpha


def _rows_fake(x, alphas, budgets, kind, alpha, budget):
    return x.new_empty(x.shape)


def _rows_setup(ctx, inputs, output):
    _, alphas, _, ctx.kind, ctx.alpha, _ = inputs
    ctx.save_for_backward(output, alphas)


def _rows_gradient(ctx, dp):
    p, alphas = ctx.saved_tensors
    want_alpha = ctx.needs_input_grad[1]
    dx, d_alpha = _rows_backward(p, dp, alphas, ctx.kind, ctx.alpha, want_alpha)
    return dx, d_alpha if want_alpha else None, None, None, None, None


@_core.operator("map", "(Tensor x, Tensor? alphas, Tensor? budgets, int kind, float alpha, float budget) -> Tensor", _rows_fake,
                _rows_setup, _rows_gradient)
def _rows(x, alphas, budgets, kind, alpha, budget):
    """Weights [R,N] of scores [R,N]; alphas and budgets: [R] float64, or None and one number for all."""
    x = _core.readable(x, "X")
    p = _rows_fake(x, alphas, budgets, kind, alpha, budget)
    alphas = None if alphas is None else _core.readable(alphas, "alpha")
    budgets = None if budgets is None else _core.readable(budgets, "budget")
    io = _core.fill(_c.make(_c.EntmaxIo), x=x, p=p, alpha=alphas, budget=budgets)
    _core.run(x, _c.lib.emx_entmax_forward, byref(_c.make(_c.EntmaxDesc, kind=kind, alpha=alpha, budget=budget)), byref(io))
    return p

# ------------------------------------------------------------------------------------------------------------- functions


def _per_row(value, name, x, dim):
    """(value, None) of a number; of a tensor that expands to x's shape with `dim` of length 1 (unused, one float64 a row [R])."""
    if not isinstance(value, Tensor):
        return float(value), None
    if value.dim() == 0:
        value = value.to(x.device)  # as torch's own operators take a number
    rows = list(x.shape)
    rows[dim] = 1
    if value.dim() > len(rows) or any(a not in (1, b) for a, b in zip(reversed(value.shape), reversed(rows))):
        raise _c.ShapeError(f"{name} has shape {tuple(value.shape)}, which does not expand to {tuple(rows)}")
    return 1.5, value.to(torch.float64).expand(rows).movedim(dim, -1).reshape(-1)


def _map(kind, x, dim, alpha, budget=1.0):
    if x.dim() == 0:
        raise _c.ShapeError("X is a scalar; rows need a dimension")
    alpha, alphas = _per_row(alpha, "alpha", x, dim)
    budget, budgets = _per_row(budget, "budget", x, dim)
    moved = x.movedim(dim, -1)
    p = _rows(moved.reshape(prod(moved.shape[:-1]), moved.shape[-1]), alphas, budgets, kind, alpha, budget)
    return p.reshape(moved.shape).movedim(-1, dim)


def entmax(X: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """alpha-entmax along `dim`: p_i = [(alpha-1) x_i - tau]_+ ^ (1/(alpha-1)), with tau such that p sums to one.

    X: scores, any shape, float32, float64, float16 or bfloat16; -inf is masked. Rows along the last dimension are read in place.
    alpha: 1 (softmax), or 1 + 1e-6 to 4; a number, or a tensor that expands to X's shape with `dim` of length 1, which gets a
    gradient.
    Returns p, shape and dtype of X, contiguous along `dim`. A fully masked row gives zeros, a row with NaN or +inf gives NaN.
    Errors: DtypeError, ShapeError, InvalidError (alpha), UnsupportedError (device), Cancelled; IndexError (dim).
    Sources: Peters, Niculae, Martins 2019, "Sparse Sequence-to-Sequence Models"; Correia, Niculae, Martins 2019 (gradient of
    alpha).
    """
    return _map(_c.MAP_ENTMAX, X, dim, alpha)


def entmax15(X: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    """entmax of alpha = 1.5 along `dim`. k is not needed: only scores that may have weight are looked at twice anyway."""
    return _map(_c.MAP_ENTMAX, X, dim, 1.5)


def sparsemax(X: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    """Sparsemax along `dim`, the projection onto the simplex (Martins, Astudillo 2016): entmax of alpha = 2. k as in entmax15."""
    return _map(_c.MAP_ENTMAX, X, dim, 2.0)


def entmax_bisect(X: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, n_iter: int = 50, ensure_sum_one: bool = True) -> Tensor:
    """The same as entmax(X, alpha, dim), under the name and with the arguments of the entmax package.

    n_iter and ensure_sum_one change nothing: the threshold is exact, and p sums to one.
    """
    return _map(_c.MAP_ENTMAX, X, dim, alpha)


def sparsemax_bisect(X: Tensor, dim: int = -1, n_iter: int = 50, ensure_sum_one: bool = True) -> Tensor:
    """The same as sparsemax(X, dim); n_iter and ensure_sum_one as in entmax_bisect."""
    return _map(_c.MAP_ENTMAX, X, dim, 2.0)


def normmax_bisect(X: Tensor, alpha: float | Tensor = 2, dim: int = -1, n_iter: int = 50) -> Tensor:
    """Normmax along `dim`: the p of the simplex that maximises p.x - |p|_alpha, 1 + 1e-6 <= alpha <= 1000.

    Arguments, result and errors as for entmax, but alpha gets no gradient (UnsupportedError where it wants one). n_iter changes
    nothing.
    Sources: Blondel, Martins, Niculae 2020, "Learning with Fenchel-Young Losses"; Santos, Niculae, McNamee, Martins 2024.
    """
    _core.no_gradient(alpha, "alpha", "normmax_bisect")
    return _map(_c.MAP_NORMMAX, X, dim, alpha)


def budget_bisect(X: Tensor, budget: float | Tensor = 2, dim: int = -1, n_iter: int = 50) -> Tensor:
    """Weights of at most one each and `budget` in all: p_i = min(1, [x_i - tau]_+), sum p = budget.

    budget: 0 < budget <= length of `dim`; a number, or a tensor as alpha may be, without a gradient. A row with fewer unmasked
    scores than that gives each weight 1.
    Arguments, result and errors otherwise as for entmax. n_iter changes nothing.
    Source: Malaviya, Ferreira, Martins 2018, "Sparse and Constrained Attention for Neural Machine Translation" (upper bounds).
    """
    _core.no_gradient(budget, "budget", "budget_bisect")
    return _map(_c.MAP_BUDGET, X, dim, 2.0, budget)


# --------------------------------------------------------------------------------------------------------------- modules


class Entmax15(nn.Module):
    """entmax15(X, dim, k) as a module."""

    def __init__(self, dim: int = -1, k: int | None = None) -> None:
        super().__init__()
        self.dim, self.k = dim, k

    def forward(self, X: Tensor) -> Tensor:
        return entmax15(X, self.dim, self.k)


class Sparsemax(nn.Module):
    """sparsemax(X, dim, k) as a module."""

    def __init__(self, dim: int = -1, k: int | None = None) -> None:
        super().__init__()
        self.dim, self.k = dim, k

    def forward(self, X: Tensor) -> Tensor:
        return sparsemax(X, self.dim, self.k)


class EntmaxBisect(nn.Module):
    """entmax_bisect(X, alpha, dim, n_iter) as a module. An alpha that is an nn.Parameter is one of the module's."""

    def __init__(self, alpha: float | Tensor = 1.5, dim: int = -1, n_iter: int = 50) -> None:
        super().__init__()
        self.alpha, self.dim, self.n_iter = alpha, dim, n_iter

    def forward(self, X: Tensor) -> Tensor:
        return entmax_bisect(X, self.alpha, self.dim, self.n_iter)


class SparsemaxBisect(nn.Module):
    """sparsemax_bisect(X, dim, n_iter) as a module."""

    def __init__(self, dim: int = -1, n_iter: int | None = None) -> None:
        super().__init__()
        self.dim, self.n_iter = dim, n_iter

    def forward(self, X: Tensor) -> Tensor:
        return sparsemax_bisect(X, self.dim, self.n_iter)


class NormmaxBisect(nn.Module):
    """normmax_bisect(X, alpha, dim, n_iter) as a module."""

    def __init__(self, alpha: float | Tensor = 2, dim: int = -1, n_iter: int = 50) -> None:
        super().__init__()
        self.alpha, self.dim, self.n_iter = alpha, dim, n_iter

    def forward(self, X: Tensor) -> Tensor:
        return normmax_bisect(X, self.alpha, self.dim, self.n_iter)


class BudgetBisect(nn.Module):
    """budget_bisect(X, budget, dim, n_iter) as a module."""

    def __init__(self, budget: float | Tensor = 2, dim: int = -1, n_iter: int = 50) -> None:
        super().__init__()
        self.budget, self.dim, self.n_iter = budget, dim, n_iter

    def forward(self, X: Tensor) -> Tensor:
        return budget_bisect(X, self.budget, self.dim, self.n_iter)
