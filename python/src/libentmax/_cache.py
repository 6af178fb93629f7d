# SPDX-License-Identifier: Apache-2.0
"""The paged KV cache: sequences, page summaries, selection, decode with reports."""
import os
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_size_t, c_void_p, cast, sizeof
from math import prod
from typing import NamedTuple, Optional

import numpy as np

from . import _c
from ._attention import head_alphas, indices, layout_code, slopes

SUMMARIES = {"minmax": _c.SUMMARY_MINMAX, "moments": _c.SUMMARY_MOMENTS, "sketch": _c.SUMMARY_SKETCH,
             "residual": _c.SUMMARY_RESIDUAL}
SELECTORS = {"all": _c.SELECT_ALL, "topk": _c.SELECT_TOPK, "gaussian": _c.SELECT_GAUSSIAN, "certified": _c.SELECT_CERTIFIED}
SUPPORT_ROOM = 1 << 27  # entries of the lists of a first call
TAU_MODES = {"exact": _c.TAU_EXACT, "corrected": _c.TAU_CORRECTED, "fixed": _c.TAU_FIXED}

# emx_report: one record a query row. flags: bit 0 certified, bit 1 non-finite.
REPORT = np.dtype({"names": [f[0] for f in _c.Report._fields_], "formats": [np.dtype(f[1]) for f in _c.Report._fields_],
                   "offsets": [getattr(_c.Report, f[0]).offset for f in _c.Report._fields_], "itemsize": sizeof(_c.Report)})


class Decoded(NamedTuple):
    """o: shape and dtype of q. reports: [B,H,S] records (emx.h, emx_report). certified: [B,H,S] bool: nothing that has weight
    was left out."""
    o: np.ndarray
    reports: np.ndarray

    @property
    def certified(self):
        return (self.reports["flags"] & _c.REPORT_CERTIFIED) != 0


class Support(NamedTuple):
    """What one head attended to. positions: int32 [n], ascending; weights: float32 [n], those that the output used (at alpha = 1
    all tokens that were read); tau: the threshold, in units of (alpha-1) * score (NaN at alpha = 1)."""
    positions: np.ndarray
    weights: np.ndarray
    tau: float


class DecodedSupport(NamedTuple):
    """Decoded, and support: [B,H,S] object array of Support."""
    o: np.ndarray
    reports: np.ndarray
    support: np.ndarray

    @property
    def certified(self):
        return (self.reports["flags"] & _c.REPORT_CERTIFIED) != 0


class Selection(NamedTuple):
    """pages: [B,H,S,M] int32, logical, ascending, -1 past the end; n_pages: [B,H,S] int32; bound: [B,H,S] float32, of the scores
    left out, times alpha-1."""
    pages: np.ndarray
    n_pages: np.ndarray
    bound: np.ndarray


class Summaries(NamedTuple):
    """Of every page (first axis) and KV head (second). min, max, mean, spread: [M,G,D] float32, None without that summary; spread
    is the root of the mean squared deviation. radius: [M,G], the largest distance of a key to the mean, +inf while the page
    fills. tokens: [M] int32, keys in the page; 0 where the summary of a page is not valid. nonfinite: [M,G] bool, always read."""
    min: Optional[np.ndarray]
    max: Optional[np.ndarray]
    mean: Optional[np.ndarray]
    spread: Optional[np.ndarray]
    radius: Optional[np.ndarray]
    tokens: np.ndarray
    nonfinite: np.ndarray


def _named(table, value, what):
    if value not in table:
        raise _c.InvalidError(f"{what} is {value!r}; possible: {', '.join(table)}")
    return table[value]


def summary_bits(summaries):
    """EMX_SUMMARY_* bits of names, "minmax,moments" or a sequence of them."""
    names = [n for n in summaries.split(",") if n] if isinstance(summaries, str) else summaries
    bits = 0
    for name in names:
        bits |= _named(SUMMARIES, name, "a summary")
    return bits


def select_desc(select="all", *, budget=0, max_bytes=0, max_delta=0.0, tau_mode="exact", **margins):
    """emx_select_desc of a selector's name and its numbers."""
    for name in margins:
        if name not in ("tau_steps", "max_quantile", "safety_margin", "excess_margin"):
            raise _c.InvalidError(f"a selector has no {name}")
    return _c.make(_c.SelectDesc, kind=_named(SELECTORS, select, "select"), budget=budget, max_bytes=max_bytes,
                   max_delta=max_delta, tau_mode=_named(TAU_MODES, tau_mode, "tau_mode"), **margins)


def supports(lists, reports):
    """Object array of Support from (index [...,C], weight [...,C], count [...]) and the reports of the same rows."""
    index, weight, count = lists
    out = np.empty(count.shape, object)
    for row in np.ndindex(count.shape):
        n = count[row]
        out[row] = Support(index[row][:n].copy(), weight[row][:n].copy(), float(reports["tau"][row]))
    return out


class KVCache:
    """Keys and values of one layer in pages, and sequences over them.

    kv_heads G, head_dim D (16..256). max_tokens: how many the pool holds, whatever number of the at most max_seqs sequences they
    are spread over; pages of page_size 16, 32 or 64. dtype: "float32", "float16" or "bfloat16". summaries: of "minmax",
    "moments", "sketch", "residual"; what selectors read ("topk": minmax, "gaussian": moments, "certified": sketch). layout: of k,
    v, q and o, "BHND" ([B,H,S,D], [B,G,T,D]) or "BNHD". file: a name that does not exist yet; keys and values go there, not into
    memory.

    Calls of several threads run one after the other. A forked child has its own copy (not with a file: UnsupportedError or
    StateError there). Methods raise StateError for an unknown sequence and after close().
    Source: EntmaxKV (selectors), and ours (certified).
    """

    def __init__(self, kv_heads, head_dim, max_tokens, *, dtype="float32", page_size=16,
                 summaries="minmax,moments,sketch,residual", max_seqs=64, layout="BHND", file=None, ctx=None):
        self._kv = None
        self._open(_c.context(ctx), kv_heads, head_dim, max_tokens, dtype=dtype, page_size=page_size, summaries=summaries,
                   max_seqs=max_seqs, layout=layout, file=file)

    def _open(self, ctx, kv_heads, head_dim, max_tokens, *, dtype, page_size, summaries, max_seqs, layout, file, **fields):
        """fields: of emx_kv_opts, in the place of what the arguments say."""
        self._ctx = ctx
        if dtype not in ("float32", "float16", "bfloat16"):
            raise _c.DtypeError(f"a cache of {dtype!r} is not possible; 'float32', 'float16' and 'bfloat16' are")
        if page_size not in (16, 32, 64) or max_tokens < 1 or max_seqs < 1:
            raise _c.InvalidError(f"page_size {page_size} (16, 32 or 64), max_tokens {max_tokens} and max_seqs {max_seqs} "
                                  "(at least 1)")
        self.layout = layout
        fields.setdefault("max_pages", -(-max_tokens // page_size) + max_seqs - 1)
        opts = _c.make(_c.KvOpts, dtype=_c.DTYPES[dtype], kv_heads=kv_heads, head_dim=head_dim, page_size=page_size,
                       layout=layout_code(layout), summaries=summary_bits(summaries), max_seqs=max_seqs,
                       file=None if file is None else os.fsencode(file), **fields)
        handle = c_void_p()
        with ctx.lock:
            self._enter()
            ctx.call(_c.lib.emx_kv_create, ctx.handle, byref(opts), byref(handle))
        self._kv = handle
        info = self.info
        self.kv_heads, self.head_dim, self.page_size = info.kv_heads, info.head_dim, info.page_size
        self._dtype, self._summaries, self._file = info.dtype, info.summaries, file

    def __repr__(self):
        if self._kv is None:
            return f"{type(self).__name__}(closed)"
        info = self.info
        dtype = next(name for name, code in _c.DTYPES.items() if code == info.dtype)
        kinds = ",".join(name for name, bit in SUMMARIES.items() if info.summaries & bit)
        return (f"{type(self).__name__}({info.kv_heads} heads of {info.head_dim}, {dtype}, {self.layout}, on {self._place()}: "
                f"{info.seqs} sequences, {info.max_pages - info.free_pages} of {info.max_pages} pages of {info.page_size} in use, "
                f"{info.bytes_kv / 2**20:.1f} MiB, summaries {kinds or 'none'} {info.bytes_summary / 2**20:.1f} MiB)")

    def _place(self):
        """Where keys and values are."""
        return "the CPU" if self._file is None else f"the CPU, in {os.fspath(self._file)!r}"

    def close(self):
        """Frees the cache now; later calls raise StateError."""
        with self._ctx.lock:
            if self._kv is not None:
                _c.lib.emx_kv_destroy(self._kv)
                self._kv = None

    def __del__(self):
        if getattr(self, "_kv", None) is not None:
            self.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _enter(self):
        """Before each call, with the context's lock: where a GPU's work goes."""

    def _call(self, function, *args, ctx_first=False):
        """The handle is looked at under the context's lock, so that close() in another thread is an error and not a crash."""
        with self._ctx.lock:
            if self._kv is None:
                raise _c.StateError("the cache is closed")
            self._enter()
            self._ctx.call(function, *((self._ctx.handle, self._kv) if ctx_first else (self._kv,)), *args)

    @property
    def info(self):
        """emx_kv_info: free_pages, bytes_kv, bytes_summary, seqs, ..."""
        info = _c.make(_c.KvInfo)
        self._call(_c.lib.emx_kv_get_info, byref(info))
        return info

    # ------------------------------------------------------------------------------------------------------ sequences

    def new(self):
        """A new empty sequence's id."""
        seq = c_int32()
        self._call(_c.lib.emx_seq_create, byref(seq))
        return seq.value

    def fork(self, seq):
        """The id of a sequence with the same tokens; pages are shared until one of the two writes into them."""
        child = c_int32()
        self._call(_c.lib.emx_seq_fork, seq, byref(child))
        return child.value

    def copy(self, seq, to):
        """The id of a new sequence of the cache `to` with the tokens of `seq`, wherever the two caches live: in memory, in a file,
        on a GPU (libentmax.torch.KVCache). Both have the same heads and head_dim; page_size, layout and summaries are each cache's
        own. Keys and values are the same bits; those of a float32 cache are rounded where `to` is narrower. Waits for both.

        Errors: ShapeError, DtypeError, StateError (not enough free pages or sequences), OutOfMemoryError; `to` is then as it was.
        """
        if not isinstance(to, KVCache):
            raise _c.InvalidError(f"`to` is no KVCache but {type(to).__name__}")
        copy = c_int32()
        first, second = sorted((self._ctx, to._ctx), key=id)  # two threads that copy both ways wait, and do not deadlock
        with first.lock, second.lock:
            if to._kv is None:
                raise _c.StateError("the cache to copy to is closed")
            to._enter()
            self._call(_c.lib.emx_seq_copy, seq, to._kv, byref(copy))
        return copy.value

    def truncate(self, seq, length):
        """Keeps the first `length` tokens."""
        self._call(_c.lib.emx_seq_truncate, seq, length)

    def free(self, seq):
        """Ends a sequence."""
        self._call(_c.lib.emx_seq_destroy, seq)

    def length(self, seq):
        """Tokens of a sequence."""
        length = c_int64()
        self._call(_c.lib.emx_seq_length, seq, byref(length))
        return length.value

    def block_table(self, seq):
        """The sequence's physical pages in logical order, int32 [M]."""
        pages, n = POINTER(c_int32)(), c_int64()
        with self._ctx.lock:
            self._call(_c.lib.emx_seq_block_table, seq, byref(pages), byref(n))
            return np.array(pages[:n.value], dtype=np.int32)

    def _batch(self, seqs):
        ids = indices(np.atleast_1d(np.asarray(seqs)), "seqs")
        if ids.ndim != 1 or ids.size == 0:
            raise _c.ShapeError(f"seqs has shape {ids.shape}; it is an id or a list of ids")
        batch = _c.make(_c.KvBatch, batch=ids.size, seqs=ids.ctypes.data_as(POINTER(c_int32)))
        batch.owner = ids
        return batch

    def append(self, seqs, k, v, n_new=None):
        """Appends k, v [B,G,T,D] ("BNHD": [B,T,G,D]) of the cache's dtype or float32 to sequences `seqs` [B] (or one id, B = 1).

        n_new [B]: how many of the T tokens each sequence gets; None: all. Atomic: on an error no sequence has changed.
        Errors: StateError (not enough free pages; the sentence has the number), ShapeError, DtypeError.
        """
        io = _c.view(_c.readable(k, "k")), _c.view(_c.readable(v, "v")), _c.view(indices(n_new, "n_new"))
        self._call(_c.lib.emx_kv_append, byref(self._batch(seqs)), *(None if t is None else byref(t) for t in io), ctx_first=True)

    # ------------------------------------------------------------------------------------------------ selection, decode

    def _io(self, q, alpha, scale, alibi_slopes, **tensors):
        scalar, alphas = head_alphas(alpha)
        io = _c.make(_c.DecodeIo, layout=layout_code(self.layout), alpha=scalar, scale=scale or 0.0)
        return _c.fill(io, q=q, alphas=alphas, alibi_slopes=slopes(alibi_slopes), **tensors)

    def _query(self, q):
        q = _c.readable(q, "q")
        if q.ndim != 4:
            raise _c.ShapeError(f"q has shape {q.shape}; 4 dimensions are expected, in the cache's layout {self.layout}")
        b, second, third, _ = q.shape
        return q, ((b, second, third) if self.layout == "BHND" else (b, third, second))

    def _longest(self, batch, new_tokens):
        return max(self.length(seq) for seq in batch.owner.tolist()) + new_tokens

    def _run(self, function, batch, desc, io, new_tokens):
        with self._ctx.lock:
            size = c_size_t()
            self._call(_c.lib.emx_decode_workspace_size, byref(desc), byref(io), self._longest(batch, new_tokens), byref(size),
                       ctx_first=True)
            workspace = np.empty(size.value, np.uint8)
            self._call(function, byref(batch), byref(desc), byref(io), workspace.ctypes.data, size, ctx_first=True)

    def select(self, seqs, q, alpha=1.5, *, select="topk", scale=None, alibi_slopes=None, **options):
        """The pages that a selector would read, and a bound of what it leaves out: Selection.

        Arguments as for decode.
        Errors: StateError (the cache lacks the selector's summaries), UnsupportedError, InvalidError, ShapeError, DtypeError.
        """
        q, rows = self._query(q)
        batch = self._batch(seqs)
        m = max(1, -(-self._longest(batch, 0) // self.page_size))
        pages, n_pages, bound = np.full(rows + (m,), -1, np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        io = self._io(q, alpha, scale, alibi_slopes, pages=pages, n_pages=n_pages, bound=bound)
        self._run(_c.lib.emx_select, batch, select_desc(select, **options), io, 0)
        for row in np.ndindex(rows):
            pages[row][n_pages[row]:] = -1
        return Selection(pages, n_pages, bound)

    def decode(self, seqs, q, k_new=None, v_new=None, alpha=1.5, *, select="all", pages=None, scale=None, alibi_slopes=None,
               return_support=False, **options):
        """Attention of the newest tokens over the cache: Decoded(o, reports); with return_support
        DecodedSupport(o, reports, support), where support[b, h, s] lists the tokens that made o and their weights.

        seqs: one id or [B]; q [B,H,S,D] ("BNHD": [B,S,H,D]), float32, float16 or bfloat16, S = 1 unless select is "all".
        k_new, v_new: appended first, as by append(). alpha: 1 or up to 4, a number or one a head [H]. alibi_slopes [H].
        select: "all", "topk" (budget=TOKENS), "gaussian" (tau_mode "exact", "corrected", "fixed"; max_quantile, safety_margin,
        excess_margin, tau_steps), "certified" (max_bytes, max_delta). Or pages: the logical pages to read, from anywhere: int32
        [B,H,S,M], ascending, -1 past the end, or for B = S = 1 a list of H lists. Every report says what was dropped: delta_bound
        is a sound bound of the mass of all tokens that were not read, for a caller's pages as for a selector's.
        Errors: StateError, UnsupportedError, InvalidError, ShapeError, DtypeError, Cancelled; a failed call has appended nothing.
        """
        if (k_new is None) != (v_new is None):
            raise _c.InvalidError("k_new and v_new go together")
        q, rows = self._query(q)
        batch = self._batch(seqs)
        n_pages = None
        if pages is None:
            desc = select_desc(select, **options)
        else:
            if options or select != "all":
                raise _c.InvalidError("pages replaces a selector: select and its options cannot be given with it")
            desc = _c.make(_c.SelectDesc, kind=_c.SELECT_PAGES)
            pages, n_pages = self._page_lists(pages, rows)
        o, reports = np.empty(q.shape, q.dtype), np.zeros(rows, REPORT)
        io = self._io(q, alpha, scale, alibi_slopes, o=o, pages=pages, n_pages=n_pages,
                      k_new=None if k_new is None else _c.readable(k_new, "k_new"),
                      v_new=None if v_new is None else _c.readable(v_new, "v_new"))
        io.reports = reports.ctypes.data
        new_tokens = 0 if k_new is None else rows[2]
        if not return_support:
            self._run(_c.lib.emx_decode, batch, desc, io, new_tokens)
            return Decoded(o, reports)
        lists = self._run_supports(batch, desc, io, rows, new_tokens)
        return DecodedSupport(o, reports, supports(lists, reports))

    def _run_supports(self, batch, desc, io, rows, new_tokens):
        """emx_decode with the lists of supports()."""
        # Room for whole sequences is only touched where lists are written; a batch whose room would be absurd starts with less.
        room = min(self._longest(batch, new_tokens), max(1, SUPPORT_ROOM // max(1, prod(rows))))
        lists = self._support_lists(io, rows, room)
        self._run(_c.lib.emx_decode, batch, desc, io, new_tokens)
        if lists[2].size and lists[2].max() > room:  # the same answer once more, the new tokens being there
            lists = self._support_lists(io, rows, int(lists[2].max()))
            io.k_new = io.v_new = None
            self._run(_c.lib.emx_decode, batch, desc, io, 0)
        return lists

    @staticmethod
    def _support_lists(io, rows, room):
        lists = np.empty(rows + (room,), np.int32), np.empty(rows + (room,), np.float32), np.zeros(rows, np.int32)
        _c.fill(io, **dict(zip(("support_index", "support_weight", "support_count"), lists)))
        return lists

    @staticmethod
    def _page_lists(pages, rows):
        if not isinstance(pages, np.ndarray):
            lists = [np.asarray(p, dtype=np.int64).reshape(-1) for p in pages]
            if rows != (1, len(lists), 1):
                raise _c.ShapeError(f"{len(lists)} lists of pages; q has rows {rows}, and lists are one a head of one token")
            longest = max([1] + [p.size for p in lists])
            pages = np.full(rows + (longest,), -1, np.int64)
            for head, p in enumerate(lists):
                pages[0, head, 0, :p.size] = p
        pages = indices(pages, "pages")
        if pages.ndim != 4 or pages.shape[:3] != rows:
            raise _c.ShapeError(f"pages has shape {pages.shape}; {rows + ('M',)} is expected")
        absent = pages < 0
        n_pages = np.where(absent.any(-1), absent.argmax(-1), pages.shape[3]).astype(np.int32)
        return pages, n_pages

    # ------------------------------------------------------------------------------------------------------- summaries

    def summaries(self, seq):
        """Summaries of a sequence's pages, as copies in logical order: Summaries. What a selector of your own looks at."""
        table = self.block_table(seq)
        shape = (table.size, self.kv_heads)
        full = shape + (self.head_dim,)
        box = self._summaries & _c.SUMMARY_MINMAX
        moments = self._summaries & _c.SUMMARY_MOMENTS
        low, high = (np.zeros(full, np.float32) if box else None for _ in range(2))
        mean, spread = (np.zeros(full, np.float32) if moments else None for _ in range(2))
        radius = np.full(shape, np.inf, np.float32) if moments else None
        tokens, nonfinite = np.zeros(table.size, np.int32), np.zeros(shape, bool)
        summary = _c.make(_c.KvSummary)
        for m, page in enumerate(table.tolist()):
            for g in range(self.kv_heads):
                with self._ctx.lock:  # pointers hold until the page changes
                    self._call(_c.lib.emx_kv_get_summary, page, g, byref(summary))
                    nonfinite[m, g] = summary.nonfinite
                    if not summary.valid:
                        continue
                    tokens[m] = summary.tokens
                    if box:
                        low[m, g], high[m, g] = self._elements(summary.min), self._elements(summary.max)
                    if moments:
                        mean[m, g] = summary.mean[:self.head_dim]
                        spread[m, g] = np.sqrt(np.asarray(summary.m2[:self.head_dim]) / max(1, summary.tokens))
                        radius[m, g] = summary.radius
        return Summaries(low, high, mean, spread, radius, tokens, nonfinite)

    def _elements(self, address):
        """D numbers of the cache's dtype as float32."""
        if self._dtype == _c.F32:
            return cast(address, POINTER(c_float))[:self.head_dim]
        bits = np.array(cast(address, POINTER(_c.c_uint16))[:self.head_dim], dtype=np.uint16)
        if self._dtype == _c.F16:
            return bits.view(np.float16)
        return (bits.astype(np.uint32) << 16).view(np.float32)

    # ----------------------------------------------------------------------------------------------------------- files

    def save(self, path, seqs):
        """Writes sequences to a file with a checksum; an existing file is replaced whole or not at all.

        Errors: FileError, StateError.
        """
        batch = self._batch(seqs)
        self._call(_c.model_lib().emx_kv_save, batch.seqs, batch.batch, os.fsencode(path), _c.Progress(), None)

    def load(self, path):
        """Adds the sequences of a file to this cache and returns their ids, in the order of the save.

        Errors: FileError (damaged, not a cache), ShapeError, DtypeError, StateError (too few free pages); nothing has changed
        then.
        """
        ids, n = (c_int32 * 4096)(), c_int32()
        self._call(_c.model_lib().emx_kv_load, os.fsencode(path), ids, len(ids), byref(n), _c.Progress(), None)
        return list(ids[:n.value])
