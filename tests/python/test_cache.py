# SPDX-License-Identifier: Apache-2.0
"""The paged cache: decode against a float64 reference, soundness of reports, sequences, files, threads."""
import os
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import numpy as np

import libentmax as L
import reference

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

RNG = np.random.default_rng(3)
H, G, D, N = 4, 2, 32, 300
K = RNG.standard_normal((1, G, N, D)).astype(np.float32)
V = RNG.standard_normal((1, G, N, D)).astype(np.float32)
Q = 3 * RNG.standard_normal((1, H, 1, D)).astype(np.float32)


def filled(**options):
    cache = L.KVCache(G, D, 2048, max_seqs=8, **options)
    seq = cache.new()
    cache.append(seq, K, V)
    return cache, seq


class Cache(unittest.TestCase):
    def close(self, a, b, tolerance):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)

    def test_decode(self):
        cache, seq = filled()
        for alpha in (1.0, 1.5, 2.0, np.array([1.2, 1.5, 1.7, 2.0])):
            o, tau, p = reference.attention(Q[0], K[0], V[0], alpha)
            got = cache.decode(seq, Q, alpha=alpha)
            self.close(got.o[0], o, 1e-5)  # f32 scores of size 10
            self.assertTrue(got.certified.all())
            if np.all(np.greater(alpha, 1)):
                self.close(got.reports["tau"][0], tau, 1e-5)
                self.assertTrue((got.reports["tokens"] == N).all())
                self.assertTrue((abs(got.reports["support"][0] - (p > 0).sum(-1)) <= 1).all())  # one weight may round to zero
        certified = cache.decode(seq, Q, select="certified")
        self.assertTrue(certified.certified.all())
        self.close(certified.o[0], reference.attention(Q[0], K[0], V[0], 1.5)[0], 1e-5)

    @unittest.skipIf(bfloat16 is None, "the ml_dtypes package is not installed: pip install ml_dtypes")
    def test_bfloat16(self):
        cache = L.KVCache(G, D, 2048, dtype="bfloat16")
        half = [a.astype(bfloat16) for a in (K, V)]
        seq, rounded = cache.new(), cache.new()
        cache.append(seq, *half)
        cache.append(rounded, K, V)  # float32 is rounded to nearest, as astype does
        q = Q.astype(bfloat16)
        o = reference.attention(q[0].astype(np.float64), *(a[0].astype(np.float64) for a in half), 1.5)[0]
        for select in ("all", "certified"):
            got = cache.decode(seq, q, select=select)
            self.assertTrue(got.certified.all())
            np.testing.assert_allclose(got.o[0].astype(np.float64), o, rtol=2.0**-8, atol=1e-5)  # rounded to 8 bits, or float32
            np.testing.assert_array_equal(cache.decode(rounded, q, select=select).o, got.o)

    def test_other_selectors_tell_what_they_dropped(self):
        cache, seq = filled()
        o, tau, p = reference.attention(Q[0], K[0], V[0], 1.5)
        for select, options in (("topk", {"budget": 64}), ("gaussian", {}), ("gaussian", {"tau_mode": "fixed"})):
            answer = cache.decode(seq, Q, select=select, **options)
            chosen = cache.select(seq, Q, select=select, **options)
            again = cache.decode(seq, Q, pages=chosen.pages)
            for h in range(H):
                read = np.zeros(N, bool)
                for page in chosen.pages[0, h, 0, :chosen.n_pages[0, h, 0]]:
                    read[16 * page:16 * page + 16] = True
                lost = p[h, 0, ~read].sum()
                for decoded in (answer, again):
                    self.assertGreaterEqual(decoded.reports["delta_bound"][0, h, 0] + 1e-6, lost)
                if again.certified[0, h, 0]:
                    self.close(again.o[0, h], o[h], 1e-5)
            self.assertTrue((chosen.pages[chosen.pages >= 0] < 19).all())

    def test_support(self):
        """The lists are the nonzero weights of the float64 reference over what was read, and they make the output."""
        cache, seq = filled()
        for options in ({}, {"select": "certified"}, {"select": "topk", "budget": 64}, {"select": "gaussian"},
                        {"pages": [[0, 3, 18]] * H}, {"alpha": 1.0}, {"alpha": np.array([1.2, 1.5, 1.0, 2.0])}):
            got = cache.decode(seq, Q, return_support=True, **options)
            np.testing.assert_array_equal(got.o, cache.decode(seq, Q, **options).o)
            self.assertEqual(got.support.shape, (1, H, 1))
            alpha = np.broadcast_to(options.get("alpha", 1.5), H)
            for h in range(H):
                positions, weights, tau = got.support[0, h, 0]
                self.assertTrue((np.diff(positions) > 0).all() and positions.dtype == np.int32)
                self.assertEqual(positions.size, got.reports["support"][0, h, 0])
                self.assertTrue(tau == got.reports["tau"][0, h, 0] or alpha[h] == 1)
                self.close(weights.sum(dtype=np.float64), 1, 1e-5)
                self.close(weights @ V[0, h * G // H, positions], got.o[0, h, 0], 1e-5)
                if got.certified[0, h, 0]:  # dense: the reference's own weights
                    p = reference.attention(Q[0], K[0], V[0], alpha)[2][h, 0]
                    dense = np.zeros(N)
                    dense[positions] = weights
                    self.close(dense, p, 2e-5)
        new_k, new_v = RNG.standard_normal((2, 1, G, 1, D)).astype(np.float32)
        got = cache.decode(seq, Q, new_k, new_v, alpha=1.0, return_support=True)  # the new token is seen, once
        self.assertEqual((got.support[0, 0, 0].positions.tolist(), cache.length(seq)), (list(range(N + 1)), N + 1))
        with mock.patch.object(L._cache, "SUPPORT_ROOM", 8):  # lists that were cut are asked for again, nothing is appended twice
            again = cache.decode(seq, Q, new_k, new_v, alpha=1.0, return_support=True)
            self.assertEqual(again.support[0, 0, 0].positions.tolist(), list(range(N + 2)))
            self.assertEqual(cache.length(seq), N + 2)

    def test_own_pages(self):
        """A list of lists from anywhere, and its report: all pages are certified, one page is not, and its bound is sound."""
        cache, seq = filled()
        o, _, p = reference.attention(Q[0], K[0], V[0], 1.5)
        every = cache.decode(seq, Q, pages=[list(range(19))] * H)
        self.close(every.o[0], o, 1e-5)
        self.assertTrue(every.certified.all())
        one = cache.decode(seq, Q, pages=[[h] for h in range(H)])
        for h in range(H):
            lost = 1 - p[h, 0, 16 * h:16 * h + 16].sum()
            self.assertGreaterEqual(one.reports["delta_bound"][0, h, 0] + 1e-6, lost)
        self.assertTrue((one.reports["pages"] == 1).all())
        for pages in ([[3, 2]] * H, [[1, 1]] * H, [[99]] * H, [["a"]] * H, [[0]] * 3, np.zeros((1, H, 1), int)):
            with self.assertRaises((L.Error, ValueError)):
                cache.decode(seq, Q, pages=pages)

    def test_summaries(self):
        for dtype in ("float32", "float16", "bfloat16"):
            cache, seq = filled(dtype=dtype)
            summaries = cache.summaries(seq)
            tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]  # keys are rounded to it
            np.testing.assert_array_equal(summaries.tokens, [16] * 18 + [12])
            for m in range(19):
                page = K[0, :, 16 * m:16 * m + 16].astype(np.float64)
                self.close(summaries.min[m], page.min(1), tolerance)
                self.close(summaries.max[m], page.max(1), tolerance)
                self.close(summaries.mean[m], page.mean(1), tolerance)
                self.close(summaries.spread[m], page.std(1), tolerance)
                if m < 18:
                    distance = np.linalg.norm(page - page.mean(1, keepdims=True), axis=-1).max(1)
                    self.assertTrue((summaries.radius[m] >= distance * (1 - tolerance)).all())
                    self.assertTrue((summaries.radius[m] <= distance * 1.01 + 0.1).all())
            self.assertTrue(np.isinf(summaries.radius[18]).all())
            self.assertFalse(summaries.nonfinite.any())
        self.assertIsNone(filled(summaries="")[0].summaries(0).min)

    def test_sequences(self):
        cache, seq = filled()
        free = cache.info.free_pages
        child = cache.fork(seq)
        self.assertEqual(cache.info.free_pages, free)
        cache.truncate(child, 100)
        self.assertEqual((cache.length(seq), cache.length(child)), (N, 100))
        np.testing.assert_array_equal(cache.block_table(child), cache.block_table(seq)[:7])
        new_k, new_v = RNG.standard_normal((2, 1, G, 1, D)).astype(np.float32)
        q = Q.copy()
        got = cache.decode(child, q, new_k, new_v)
        k, v = (np.concatenate([a[0, :, :100], b[0]], 1) for a, b in ((K, new_k), (V, new_v)))
        self.close(got.o[0], reference.attention(q[0], k, v, 1.5)[0], 1e-5)
        self.close(cache.decode(seq, q).o[0], reference.attention(q[0], K[0], V[0], 1.5)[0], 1e-5)  # the parent is as it was
        both = cache.decode([seq, child], np.concatenate([q, q]))
        np.testing.assert_array_equal(both.o[1], cache.decode(child, q).o[0])
        cache.append([seq, child], np.concatenate([K, K])[:, :, :5], np.concatenate([V, V])[:, :, :5], n_new=[5, 2])
        self.assertEqual((cache.length(seq), cache.length(child)), (N + 5, 103))
        cache.free(child)
        with self.assertRaises(L.StateError):
            cache.length(child)

    def test_layout_and_query_chunk(self):
        cache = L.KVCache(G, D, 512, layout="BNHD", max_seqs=1)
        seq = cache.new()
        cache.append(seq, np.moveaxis(K, 1, 2), np.moveaxis(V, 1, 2))
        q = 3 * RNG.standard_normal((1, 3, H, D)).astype(np.float32)
        got = cache.decode(seq, q)
        want = reference.attention(np.moveaxis(q[0], 0, 1), K[0], V[0], 1.5, causal=True)[0]
        self.close(np.moveaxis(got.o[0], 0, 1), want, 1e-5)
        self.assertEqual(got.reports.shape, (1, H, 3))

    def test_save_and_load(self):
        cache, seq = filled()
        child = cache.fork(seq)
        cache.truncate(child, 40)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "cache.safetensors")
            cache.save(path, [seq, child])
            other = L.KVCache(G, D, 1024, max_seqs=4)
            ids = other.load(path)
            self.assertEqual([other.length(i) for i in ids], [N, 40])
            np.testing.assert_array_equal(other.decode(ids[0], Q).o, cache.decode(seq, Q).o)
            data = bytearray(path.read_bytes())
            data[-5] ^= 1
            path.write_bytes(data)
            before = other.info.free_pages
            with self.assertRaises(L.FileError):
                other.load(path)
            self.assertEqual(other.info.free_pages, before)
            with self.assertRaises(L.FileError):
                other.load(Path(folder, "none"))

    def test_file(self):
        with tempfile.TemporaryDirectory() as folder:
            cache, seq = filled(file=Path(folder, "kv"))
            np.testing.assert_array_equal(cache.decode(seq, Q).o, filled()[0].decode(0, Q).o)
            self.assertEqual(os.listdir(folder), [])

    def test_threads_and_close(self):
        cache, seq = filled()
        want, wrong = cache.decode(seq, Q, select="topk", budget=64).o, []

        def work():
            mine = cache.fork(seq)
            for i in range(30):
                if not np.array_equal(cache.decode(mine, Q, select="topk", budget=64).o, want):
                    wrong.append(i)
            cache.free(mine)
        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.assertEqual((wrong, cache.info.seqs), ([], 1))
        cache.close()
        cache.close()
        with self.assertRaisesRegex(L.StateError, "closed"):
            cache.decode(seq, Q)

    def test_forked_worker(self):
        cache, seq = filled()
        want = cache.decode(seq, Q).o
        child = os.fork()
        if child == 0:
            try:
                cache.truncate(seq, 10)
                os._exit(0 if cache.length(seq) == 10 and cache.decode(seq, Q).o.shape == want.shape else 3)
            except BaseException:
                os._exit(4)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
        np.testing.assert_array_equal(cache.decode(seq, Q).o, want)

    def test_errors(self):
        cache, seq = filled()
        bare, bare_seq = filled(summaries="")
        small = L.KVCache(G, D, 32, max_seqs=1)
        small_seq = small.new()
        for call, error, sentence in (
                (lambda: L.KVCache(G, D, 64, dtype="float64"), L.DtypeError, "float64"),
                (lambda: L.KVCache(G, D, 64, page_size=17), L.InvalidError, "page_size"),
                (lambda: L.KVCache(G, 7, 64), L.Error, ""),
                (lambda: L.KVCache(G, D, 64, summaries="minimax"), L.InvalidError, "minimax"),
                (lambda: L.KVCache(G, D, 1 << 34), L.OutOfMemoryError, ""),
                (lambda: cache.append(seq, K, V[:, :1]), L.ShapeError, ""),
                (lambda: cache.append(seq, K.astype(float), V.astype(float)), L.DtypeError, ""),
                (lambda: cache.append(77, K, V), L.StateError, ""),
                (lambda: small.append(small_seq, K, V), L.StateError, "page"),
                (lambda: cache.decode(seq, Q[0]), L.ShapeError, "4 dimensions"),
                (lambda: cache.decode(seq, Q, K[:, :, :1]), L.InvalidError, "go together"),
                (lambda: cache.decode(seq, Q, select="best"), L.InvalidError, "best"),
                (lambda: cache.decode(seq, Q, select="topk", quantile=1), L.InvalidError, "quantile"),
                (lambda: cache.decode(seq, Q, pages=[[0]] * H, select="topk"), L.InvalidError, "pages replaces"),
                (lambda: cache.decode([], Q), L.Error, "seqs"),
                (lambda: bare.decode(bare_seq, Q, select="certified"), L.StateError, "")):
            with self.assertRaisesRegex(error, sentence):
                call()
        self.assertEqual((cache.length(seq), small.length(small_seq)), (N, 0))


if __name__ == "__main__":
    unittest.main()
