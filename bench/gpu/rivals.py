# SPDX-License-Identifier: Apache-2.0
"""Rivals of the decode benchmark, each measured through its own public calls if it can be imported, and left out otherwise.

EntmaxKV (https://github.com/deep-spin/entmaxkv, package `entmaxkv` 0.1.0): its paged top-k and its Gaussian-aware selection. Its cache fills
page statistics in a Python loop; here they are computed at once by the same definitions, outside what is timed.
"""
import math

import torch

try:
    import entmaxkv
except ImportError:
    entmaxkv = None


def entmaxkv_cache(k, v, page):
    """A PagedKVCache over [1,G,N,D] with N a multiple of the page."""
    cache = entmaxkv.PagedKVCache(page_size=page)
    pages = k.unflatten(2, (-1, page))
    cache.k_cache, cache.v_cache = k, v
    cache.k_min, cache.k_max, cache.k_mean = pages.amin(3), pages.amax(3), pages.mean(3)
    cache.k_std = torch.cat([p.float().std(3, unbiased=False).clamp(min=1e-6).to(k.dtype) for p in pages.split(4096, 2)], 2)
    return cache


def methods(k, v, q, alpha, scale, page):
    """{name: (call, o)}: call() fills o [1,H,1,D]. k, v: [1,G,N,D] contiguous; q: [1,H,1,D]."""
    if entmaxkv is None or k.shape[2] % page:
        return {}
    n, d = k.shape[2:]
    h = q.shape[1]
    q = (q.float() * (scale * math.sqrt(d))).to(q.dtype)  # it scales by 1/sqrt(D)
    cache = entmaxkv_cache(k, v, page)
    lens = torch.full((1,), n, device=k.device, dtype=torch.int32)
    found = {}
    for percent in (1, 5):
        pages = max(1, n * percent // 100 // page)
        o, size = torch.empty_like(q), torch.full((1,), (pages + 1) * page, device=k.device, dtype=torch.int32)
        found[f"EntmaxKV top-k {percent}%"] = (lambda o=o, size=size, pages=pages: entmaxkv.sparse_attention_decode_paged(
            q=q, kv_cache=cache, k_new=None, v_new=None, out=o, token_budget=pages * page, cache_seqlens=size, q_seqlens=lens,
            alpha=alpha, append_cache=False), o)
    for mode in ("corrected", "exact"):
        o = torch.empty_like(q)
        found[f"EntmaxKV gaussian {mode}"] = (lambda o=o, mode=mode: entmaxkv.sparse_attention_decode_gaussian_aware_entmax(
            q=q, kv_cache=cache, k_new=None, v_new=None, out=o, alpha=alpha, append_cache=False, tau_mode=mode, q_seqlens=lens), o)
    return found
