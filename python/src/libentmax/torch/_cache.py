# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache on tensors: libentmax.KVCache whose arrays are torch's, on the CPU or on a GPU."""
from __future__ import annotations

import ctypes
from ctypes import byref, c_size_t
from typing import Any, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import _c, _cache
from . import _core

__all__ = ["KVCache", "Tables", "Decoded", "DecodedSupport", "Reports", "Selection"]

_MEMORIES = {"device": _c.KV_MEMORY_DEVICE, "host": _c.KV_MEMORY_HOST}
_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_WORDS = {"tau": (torch.float32, 0), "delta_bound": (torch.float32, 1), "mass": (torch.float32, 2),
          "max_unread": (torch.float32, 3), "support": (torch.int32, 4), "tokens": (torch.int32, 5), "pages": (torch.int32, 6),
          "select": (torch.uint8, 28), "path": (torch.uint8, 29), "stopped_by": (torch.uint8, 30), "flags": (torch.uint8, 31),
          "bytes_k": (torch.int64, 4), "bytes_v": (torch.int64, 5), "bytes_meta": (torch.int64, 6)}


def _reference(tensor):
    return None if tensor is None else byref(_core.view(tensor))


class Reports:
    """What each query row did (emx.h, emx_report), where the work ran. reports["support"]: a tensor [B,H,S] of that field, a
    view of `data` [B,H,S,64] uint8, so that nothing waits. names: the fields. numpy(): an array of records; the host waits."""

    names = tuple(_WORDS)

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __getitem__(self, name: str) -> Tensor:
        if name not in _WORDS:
            raise _c.InvalidError(f"a report has no {name!r}; it has {', '.join(_WORDS)}")
        dtype, at = _WORDS[name]
        return self.data.view(dtype)[..., at]

    def numpy(self) -> np.ndarray:
        return self.data.cpu().numpy().view(_cache.REPORT)[..., 0]

    def __repr__(self) -> str:
        return f"Reports(shape={tuple(self.data.shape[:-1])}, device={self.data.device})"


class Decoded(NamedTuple):
    """o: shape and dtype of q. reports: Reports of [B,H,S] rows. certified: [B,H,S] bool: nothing that has weight was left out."""
    o: Tensor
    reports: Reports

    @property
    def certified(self) -> Tensor:
        return (self.reports["flags"] & _c.REPORT_CERTIFIED) != 0


class DecodedSupport(NamedTuple):
    """Decoded, and support: [B,H,S] object array of libentmax.Support."""
    o: Tensor
    reports: Reports
    support: np.ndarray

    @property
    def certified(self) -> Tensor:
        return (self.reports["flags"] & _c.REPORT_CERTIFIED) != 0


class Selection(NamedTuple):
    """pages: [B,H,S,M] int32, logical, ascending, -1 past the end; n_pages: [B,H,S] int32; bound: [B,H,S] float32, of the scores
    left out, times alpha-1."""
    pages: Tensor
    n_pages: Tensor
    bound: Tensor


class Tables(NamedTuple):
    """Sequences that the caller manages, in the place of ids: what a captured graph needs, for ids and their lengths are the
    host's. block_table: [B,M] int32, physical pages 0 .. max_pages-1 of the cache in logical order, -1 absent; seq_lens: [B]
    int32, tokens before the call; both on the cache's device, and yours to advance. max_len: no length exceeds it after a call."""
    block_table: Tensor
    seq_lens: Tensor
    max_len: int


class KVCache(_cache.KVCache):
    """Keys and values of one layer in pages, and sequences over them, on tensors.

    The methods and arguments of libentmax.KVCache, with tensors of `device` in and out (None: torch's default device).
    kv_heads G, head_dim D (16..256). max_tokens: how many the pool holds. dtype: torch.float32, float16 or bfloat16 (None: torch's
    default). summaries: None: all that the device has, "minmax,moments,sketch" and on the CPU "residual". pools: (k, v), your own
    memory instead of the library's, taken as it is: 4-D tensors of `dtype` with any strides, [pages,G,P,D], with layout "BNHD"
    [pages,P,G,D]; max_tokens may then be None. Pages that were written there already are described by summarize(). A contiguous
    [G,N,D] tensor is the pool k.view(G, N // P, P, D).transpose(0, 1).
    kv_memory: "host" puts keys and values of a GPU's cache into pinned memory of the host, which the GPU reads over the bus, for
    contexts longer than its memory holds: "certified" then fetches the few keys and values that its sketches leave, the other
    selectors all they read. The same answers. Creation pins the whole pool, 0.4 s a GiB.

    On a GPU all work goes to torch's current stream and nothing waits for it; memory comes from torch, but for the cache's own.
    append() and decode() work inside torch.cuda.graph where the sequences are Tables: the graph reads seq_lens, so it may be
    replayed while they grow. Faults that only the GPU can see, such as a page number out of range, are raised by
    libentmax.torch.synchronize(). Make the cache, and call each method once, before the capture.

    Not on a GPU (UnsupportedError): file, return_support, save and load (copy() to a cache on the CPU first, and from one),
    n_new with ids, select() of "certified" (decode() takes it). There is no gradient.
    Errors: as those of libentmax.KVCache; InvalidError where a tensor is on another device.
    Source: EntmaxKV (selectors), and ours (certified).
    """

    def __init__(self, kv_heads: int, head_dim: int, max_tokens: int | None = None, *,
                 device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, page_size: int = 16,
                 summaries: str | Sequence[str] | None = None, max_seqs: int = 64, layout: str = "BHND",
                 pools: tuple[Tensor, Tensor] | None = None, file: str | None = None, kv_memory: str = "device") -> None:
        self._kv = None
        some = torch.empty(0) if device is None else torch.empty(0, device=device)
        self.device = some.device
        self.dtype = dtype or torch.get_default_dtype()
        if self.dtype not in _NAMES:
            raise _c.DtypeError(f"a cache of {self.dtype} is not possible; torch.float32, float16 and bfloat16 are")
        ctx = _core.context(some)
        if summaries is None:
            summaries = "minmax,moments,sketch,residual" if ctx.on_cpu else "minmax,moments,sketch"
        fields = {"kv_memory": _cache._named(_MEMORIES, kv_memory, "kv_memory")}
        if pools is not None:
            for tensor, name in zip(pools, ("k", "v")):
                if self._here(tensor, f"the pool of {name}").dtype != self.dtype:
                    raise _c.DtypeError(f"the pool of {name} is {tensor.dtype}, the cache {self.dtype}")
            fields |= {f"{name}_pool": ctypes.pointer(_core.view(tensor)) for tensor, name in zip(pools, ("k", "v"))}
            fields["max_pages"] = pools[0].shape[0]
            if max_tokens is None:
                max_tokens = max(1, pools[0].shape[0] * page_size)
        if max_tokens is None:
            raise _c.InvalidError("max_tokens is None; it may be where pools are given")
        self._pools = pools  # the library borrows them
        self._kv_memory = kv_memory
        self._open(ctx, kv_heads, head_dim, max_tokens, dtype=_NAMES[self.dtype], page_size=page_size, summaries=summaries,
                   max_seqs=max_seqs, layout=layout, file=file, **fields)

    def _enter(self):
        if not self._ctx.on_cpu:
            _c.check(_c.lib.emx_ctx_set_stream(self._ctx.handle, torch.cuda.current_stream(self.device).cuda_stream))

    def _place(self):
        return str(self.device) if self._kv_memory == "device" else f"{self.device}, keys and values in host memory"

    # ----------------------------------------------------------------------------------------------------------- tensors

    def _here(self, tensor, name):
        """The tensor, if it is one of the cache's device."""
        if not isinstance(tensor, Tensor):
            raise _c.InvalidError(f"{name} is no tensor but {type(tensor).__name__}; libentmax.KVCache takes NumPy arrays")
        if tensor.device != self.device:
            raise _c.InvalidError(f"{name} is on {tensor.device}, the cache on {self.device}")
        return tensor

    def _readable(self, tensor, name):
        tensor = _core.readable(self._here(tensor, name), name)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise _c.UnsupportedError(f"{name} requires a gradient, which a cache does not have; use torch.no_grad() or "
                                      f"{name}.detach()")
        return tensor

    def _integers(self, value, name):
        """int32 tensor here, of a tensor here or of numbers of the host (which are copied: not in a captured graph)."""
        if value is None:
            return None
        if not isinstance(value, Tensor):
            return torch.from_numpy(_cache.indices(value, name)).to(self.device)
        if value.dtype not in (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8):
            raise _c.DtypeError(f"{name} has dtype {value.dtype}; it holds integers")
        return self._here(value, name).to(torch.int32).contiguous()

    def _numbers(self, value, name, dtype):
        if not isinstance(value, Tensor):
            return torch.as_tensor(value, dtype=dtype, device=self.device)
        return self._here(value, name).detach().to(dtype).contiguous()

    # --------------------------------------------------------------------------------------------------------- sequences

    def _batch(self, seqs):
        if not isinstance(seqs, Tables):
            return super()._batch(seqs.cpu().numpy() if isinstance(seqs, Tensor) else seqs)
        table, lengths = self._here(seqs.block_table, "block_table"), self._here(seqs.seq_lens, "seq_lens")
        if table.dtype != torch.int32 or lengths.dtype != torch.int32:
            raise _c.DtypeError(f"block_table and seq_lens are {table.dtype} and {lengths.dtype}; both must be torch.int32")
        if table.ndim != 2 or not _core.in_place(table) or not _core.in_place(lengths):
            raise _c.ShapeError("block_table must be [B,M] and seq_lens [B], with contiguous rows")
        batch = _c.make(_c.KvBatch, batch=table.shape[0], max_len=seqs.max_len)
        return _c.fill(batch, block_table=_core.view(table), seq_lens=_core.view(lengths))

    def _longest(self, batch, new_tokens):
        return batch.max_len if batch.block_table else super()._longest(batch, new_tokens)

    @property
    def max_pages(self) -> int:
        """Pages of the pool."""
        return self.info.max_pages

    def append(self, seqs: Any, k: Tensor, v: Tensor, n_new: Any = None) -> None:
        """Appends k, v [B,G,T,D] ("BNHD": [B,T,G,D]) of the cache's dtype or float32 to sequences `seqs`: [B] ids, one id (B = 1),
        or Tables, whose seq_lens stay as they are.

        n_new [B]: how many of the T tokens each sequence gets; None: all. Atomic: on an error no sequence has changed.
        Errors: StateError (not enough free pages), ShapeError, DtypeError, InvalidError, UnsupportedError.
        """
        k, v, n = self._readable(k, "k"), self._readable(v, "v"), self._integers(n_new, "n_new")
        self._call(_c.lib.emx_kv_append, byref(self._batch(seqs)), *map(_reference, (k, v, n)), ctx_first=True)

    def summarize(self, pages: Any, tokens: Any = None) -> None:
        """Describes physical pages [n] that somebody else wrote into the caller's pools, in the order of a sequence; tokens [n]:
        how many each holds, None: all are full, 0: unknown from now on."""
        pages, tokens = self._integers(pages, "pages"), self._integers(tokens, "tokens")
        self._call(_c.lib.emx_kv_summarize, _reference(pages), _reference(tokens), ctx_first=True)

    def summaries(self, seq: int) -> _cache.Summaries:
        """Summaries of a sequence's pages, as tensors on the CPU in logical order: libentmax.Summaries. On a GPU this waits;
        complete pages alone are described, by the 8-bit codes of means and spreads that the device reads."""
        return _cache.Summaries(*(None if x is None else torch.from_numpy(x) for x in super().summaries(seq)))

    # ------------------------------------------------------------------------------------------------- selection, decode

    def _run(self, function, batch, desc, io, new_tokens):
        with self._ctx.lock:
            size = c_size_t()
            self._call(_c.lib.emx_decode_workspace_size, byref(desc), byref(io), self._longest(batch, new_tokens), byref(size),
                       ctx_first=True)
            workspace = torch.empty(size.value, dtype=torch.uint8, device=self.device)
            self._call(function, byref(batch), byref(desc), byref(io), workspace.data_ptr(), size, ctx_first=True)

    def _fill(self, q, alpha, scale, alibi_slopes, **tensors):
        """(emx_decode_io, what must live as long)."""
        alphas = None
        if isinstance(alpha, Tensor) and alpha.ndim or not isinstance(alpha, Tensor) and np.ndim(alpha):
            alphas, alpha = self._numbers(alpha, "alpha", torch.float64), 1.5
        if alibi_slopes is not None:
            alibi_slopes = self._numbers(alibi_slopes, "alibi_slopes", torch.float32)
        io = _c.make(_c.DecodeIo, layout=_cache.layout_code(self.layout), alpha=float(alpha), scale=scale or 0.0)
        tensors.update(q=q, alphas=alphas, alibi_slopes=alibi_slopes)
        return _core.fill(io, **tensors), tensors

    def _query(self, q):
        q = self._readable(q, "q")
        if q.ndim != 4:
            raise _c.ShapeError(f"q has shape {tuple(q.shape)}; 4 dimensions are expected, in the cache's layout {self.layout}")
        b, second, third, _ = q.shape
        return q, ((b, second, third) if self.layout == "BHND" else (b, third, second))

    def _new(self, shape, dtype):
        return torch.empty(shape, dtype=dtype, device=self.device)

    def select(self, seqs: Any, q: Tensor, alpha: Any = 1.5, *, select: str = "topk", scale: float | None = None,
               alibi_slopes: Any = None, **options: Any) -> Selection:
        """The pages that a selector would read, and a bound of what it leaves out: Selection. Arguments as for decode.

        Errors: StateError (the cache lacks the selector's summaries), UnsupportedError, InvalidError, ShapeError, DtypeError.
        """
        q, rows = self._query(q)
        batch = self._batch(seqs)
        m = max(1, -(-self._longest(batch, 0) // self.page_size))
        pages, n_pages = self._new(rows + (m,), torch.int32), self._new(rows, torch.int32)
        bound = self._new(rows, torch.float32)
        io, held = self._fill(q, alpha, scale, alibi_slopes, pages=pages, n_pages=n_pages, bound=bound)
        self._run(_c.lib.emx_select, batch, _cache.select_desc(select, **options), io, 0)
        past = torch.arange(m, device=self.device) >= n_pages[..., None]
        return Selection(pages.masked_fill_(past, -1), n_pages, bound)

    def decode(self, seqs: Any, q: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None, alpha: Any = 1.5, *,
               select: str = "all", pages: Any = None, scale: float | None = None, alibi_slopes: Any = None,
               return_support: bool = False, **options: Any) -> Decoded | DecodedSupport:
        """Attention of the newest tokens over the cache: Decoded(o, reports).

        Arguments and selectors as for libentmax.KVCache.decode; seqs may be Tables. q [B,H,S,D] ("BNHD": [B,S,H,D]), float32,
        float16 or bfloat16, S = 1 unless select is "all"; k_new, v_new: appended first. return_support: on the CPU.
        Errors: StateError, UnsupportedError, InvalidError, ShapeError, DtypeError, Cancelled; a failed call has appended nothing.
        """
        if (k_new is None) != (v_new is None):
            raise _c.InvalidError("k_new and v_new go together")
        if return_support and not self._ctx.on_cpu:
            raise _c.UnsupportedError("return_support is for caches on the CPU; reports['support'] has the counts on a GPU, too")
        q, rows = self._query(q)
        batch = self._batch(seqs)
        n_pages = None
        if pages is None:
            desc = _cache.select_desc(select, **options)
        else:
            if options or select != "all":
                raise _c.InvalidError("pages replaces a selector: select and its options cannot be given with it")
            desc = _c.make(_c.SelectDesc, kind=_c.SELECT_PAGES)
            pages, n_pages = self._lists(pages, rows)
        new = {} if k_new is None else {"k_new": self._readable(k_new, "k_new"), "v_new": self._readable(v_new, "v_new")}
        o, data = self._new(q.shape, q.dtype), self._new(rows + (64,), torch.uint8)
        io, held = self._fill(q, alpha, scale, alibi_slopes, o=o, pages=pages, n_pages=n_pages, **new)
        io.reports = data.data_ptr()
        added = rows[2] if new else 0
        reports = Reports(data)
        if not return_support:
            self._run(_c.lib.emx_decode, batch, desc, io, added)
            return Decoded(o, reports)
        lists = self._run_supports(batch, desc, io, rows, added)
        return DecodedSupport(o, reports, _cache.supports(lists, reports.numpy()))

    def _lists(self, pages, rows):
        if not isinstance(pages, Tensor):
            pages = self._page_lists([p.cpu() if isinstance(p, Tensor) else p for p in pages], rows)[0]
        pages = self._integers(pages, "pages")
        if pages.ndim != 4 or tuple(pages.shape[:3]) != rows:
            raise _c.ShapeError(f"pages has shape {tuple(pages.shape)}; {rows + ('M',)} is expected")
        return pages, (pages >= 0).to(torch.int32).cumprod(-1).sum(-1, dtype=torch.int32)
