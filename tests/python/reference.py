# SPDX-License-Identifier: Apache-2.0
"""float64 references in plain NumPy: bisection on tau to interval collapse, written without a look at the C code."""
import numpy as np


def bisect(weights, total, low, high):
    """tau with sum(weights(tau)) = total, weights falling in tau; then the weights."""
    while True:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            return low, weights(low)
        if weights(middle).sum() >= total:
            low = middle
        else:
            high = middle


def row(x, alpha, kind="entmax", budget=1.0):
    """(p, tau) of one row of float64 scores."""
    x = np.asarray(x, dtype=np.float64)
    if kind == "entmax" and alpha == 1.0:
        e = np.exp(x - x.max())
        return e / e.sum(), np.nan
    power = 1.0 / (alpha - 1.0)
    if kind == "normmax":  # w = [x - tau]_+^power with sum w^alpha = 1
        tau, mass = bisect(lambda t: np.maximum(x - t, 0) ** (power * alpha), 1.0, x.max() - 1.0, x.max())
        w = np.maximum(x - tau, 0) ** power
        return w / w.sum(), tau
    z = (alpha - 1.0) * x
    if kind == "budget":
        tau, p = bisect(lambda t: np.minimum(1.0, np.maximum(z - t, 0) ** power), budget, z.min() - 1.0, z.max())
        return p, tau
    tau, p = bisect(lambda t: np.maximum(z - t, 0) ** power, 1.0, z.max() - 1.0, z.max())
    return p / p.sum(), tau


def entmax(x, alpha, axis=-1, **how):
    """`row` along an axis."""
    return np.apply_along_axis(lambda r: row(r, alpha, **how)[0], axis, np.asarray(x, np.float64))


def difference(f, x, step=1e-6):
    """Gradient of a scalar function of a float64 array by central differences."""
    x = np.array(x, dtype=np.float64)
    out = np.empty_like(x)
    for index in np.ndindex(x.shape):
        old = x[index]
        x[index] = old + step
        above = f(x)
        x[index] = old - step
        out[index] = (above - f(x)) / (2 * step)
        x[index] = old
    return out


def attention(q, k, v, alpha, causal=False, scale=None, slopes=None):
    """(o, tau, p) of [H,S,D] queries over [G,N,D] keys in float64; alpha is one number or one a head."""
    q, k, v = (np.asarray(a, dtype=np.float64) for a in (q, k, v))
    heads, s, d = q.shape
    n = k.shape[1]
    alpha = np.broadcast_to(alpha, heads)
    p, tau = np.zeros((heads, s, n)), np.zeros((heads, s))
    for h in range(heads):
        for i in range(s):
            at = i + n - s
            x = k[h * k.shape[0] // heads] @ q[h, i] * (scale or d ** -0.5)
            if slopes is not None:
                x = x - slopes[h] * np.abs(at - np.arange(n))
            seen = at + 1 if causal else n
            p[h, i, :seen], tau[h, i] = row(x[:seen], alpha[h])
    o = np.stack([p[h] @ v[h * k.shape[0] // heads] for h in range(heads)])
    return o, tau, p
