# SPDX-License-Identifier: Apache-2.0
"""libentmax.torch.KVCache: on the CPU, and on a GPU where torch and the library find one; there also on streams, in captured
graphs and at lengths where "certified" takes its ladder. References are float64."""
import unittest

import numpy as np
import torch

import libentmax as L
import libentmax.torch as T
import reference
from libentmax import _c
from libentmax.torch import _core


def devices():
    if not torch.cuda.is_available():
        return ["cpu"], "torch finds no GPU"
    try:
        _core.context(torch.empty(0, device="cuda"))
    except L.Error as error:
        return ["cpu"], str(error)
    return ["cpu", "cuda"], None


DEVICES, REASON = devices()
H, G, D, N = 4, 2, 64, 300
SELECTORS = (("all", {}), ("topk", {"budget": 128}), ("gaussian", {}), ("certified", {}))


def randn(*shape, seed=0, scale=1.0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)


def array(tensor):
    return tensor.detach().cpu().double().numpy()


def filled(device, n=N, dtype=torch.float32, layout="BHND", batch=1, **options):
    """A cache with `batch` sequences, their ids, and k, v [B,G,N,D] as they are stored."""
    cache = T.KVCache(G, D, 2 * batch * (n + 200), device=device, dtype=dtype, layout=layout, max_seqs=8, **options)
    k, v = (randn(batch, G, n, D, seed=s, dtype=dtype, device=device) for s in (1, 2))
    seqs = [cache.new() for _ in range(batch)]
    given = (k, v) if layout == "BHND" else (k.transpose(1, 2), v.transpose(1, 2))
    cache.append(seqs, *given)
    return cache, seqs, k, v


class Cache(unittest.TestCase):
    def close(self, got, want, tolerance):
        np.testing.assert_allclose(array(got), want, rtol=0, atol=tolerance)

    def test_decode(self):
        for device in DEVICES:
            for layout in ("BHND", "BNHD"):
                for dtype, unit in ((torch.float32, 0), (torch.float16, 2 ** -10), (torch.bfloat16, 2 ** -7)):
                    cache, seqs, k, v = filled(device, dtype=dtype, layout=layout, batch=2)
                    q = randn(2, H, 1, D, seed=3, scale=2, dtype=dtype, device=device)
                    for alpha in (1.0, 1.5, torch.tensor([1.2, 1.0, 1.7, 2.0], device=device), [1.5, 2.0, 1.3, 1.6]):
                        got = cache.decode(seqs, q if layout == "BHND" else q.transpose(1, 2), alpha=alpha)
                        alpha = array(torch.as_tensor(alpha))
                        self.assertEqual((got.o.dtype, got.o.device), (q.dtype, q.device))
                        o = got.o if layout == "BHND" else got.o.transpose(1, 2)
                        self.assertEqual(o.shape, q.shape)
                        self.assertTrue(bool(got.certified.all()) and got.certified.shape == (2, H, 1))
                        for b in range(2):
                            want, tau, _ = reference.attention(array(q)[b], array(k)[b], array(v)[b], alpha)
                            self.close(o[b], want, 2e-5 + unit * np.abs(want).max())  # f32 scores, one rounding of o
                            sparse = np.broadcast_to(alpha, H) > 1
                            self.close(got.reports["tau"][b].cpu()[torch.from_numpy(sparse)], tau[sparse], 1e-4)
                        self.assertTrue((array(got.reports["tokens"]) == N).all())

    def test_queries_and_slopes(self):
        for device in DEVICES:
            cache, (seq,), k, v = filled(device)
            q = randn(1, H, 3, D, seed=4, device=device)
            slopes = torch.tensor([0.5, 0.25, 0.0, 0.01], device=device)
            want, _, _ = reference.attention(array(q)[0], array(k)[0], array(v)[0], 1.5, causal=True, slopes=array(slopes))
            self.close(cache.decode(seq, q, alibi_slopes=slopes).o[0], want, 2e-5)
            want, _, _ = reference.attention(array(q)[0], array(k)[0], array(v)[0], 2.0, causal=True, scale=0.3)
            self.close(cache.decode(seq, q, alpha=2, scale=0.3).o[0], want, 2e-5)

    def test_appended_in_the_call(self):
        for device in DEVICES:
            cache, (seq,), k, v = filled(device)
            q, kn, vn = randn(1, H, 1, D, seed=5, device=device), *(randn(1, G, 1, D, seed=s, device=device) for s in (6, 7))
            got = cache.decode(seq, q, kn, vn)
            self.assertEqual(cache.length(seq), N + 1)
            k, v = (np.concatenate([array(a), array(b)], 2)[0] for a, b in ((k, kn), (v, vn)))
            want, _, _ = reference.attention(array(q)[0], k, v, 1.5)
            self.close(got.o[0], want, 2e-5)

    def test_selectors(self):
        """What a report claims against the truth, and that the pages of select() give decode's answer."""
        for device in DEVICES:
            for layout in ("BHND", "BNHD"):
                cache, (seq,), k, v = filled(device, dtype=torch.float16, layout=layout)
                q = randn(1, H, 1, D, seed=8, scale=3, dtype=torch.float16, device=device)
                want, _, p = reference.attention(array(q)[0], array(k)[0], array(v)[0], 1.5)
                given = q if layout == "BHND" else q.transpose(1, 2)
                for select, options in SELECTORS:
                    got = cache.decode(seq, given, select=select, **options)
                    o = got.o if layout == "BHND" else got.o.transpose(1, 2)
                    sure = array(got.certified).astype(bool)[0, :, 0]
                    if select in ("all", "certified"):
                        self.assertTrue(sure.all())
                    self.close(o[0][torch.from_numpy(sure)], want[sure], 2e-3)  # one rounding to f16 of values up to 4
                    if select == "all" or (select == "certified" and device != "cpu"):
                        continue
                    pages, n_pages, bound = cache.select(seq, given, select=select, **options)
                    self.assertEqual(pages.shape[:3], (1, H, 1))
                    for h in range(H):
                        listed = pages[0, h, 0].cpu()
                        n = int(n_pages[0, h, 0])
                        self.assertTrue((listed[:n] >= 0).all() and (listed[n:] == -1).all())
                        read = np.isin(np.arange(N) // 16, listed[:n].numpy())
                        lost = p[h, 0][~read].sum()
                        self.assertLessEqual(lost, float(got.reports["delta_bound"][0, h, 0]) + 1e-9)
                    again = cache.decode(seq, given, pages=pages)
                    self.assertTrue(torch.allclose(again.o, got.o, atol=2e-3))
                lists = [list(range(h + 1)) for h in range(H)]
                mine = cache.decode(seq, given, pages=lists)
                self.assertEqual(mine.reports["pages"].flatten().tolist(), [1, 2, 3, 4])

    def test_reports(self):
        for device in DEVICES:
            cache, (seq,), _, _ = filled(device)
            reports = cache.decode(seq, randn(1, H, 1, D, device=device), select="topk", budget=64).reports
            records = reports.numpy()
            self.assertEqual(records.shape, (1, H, 1))
            self.assertEqual(set(T.Reports.names) | {"reserved"}, set(records.dtype.names))
            for name in T.Reports.names:
                np.testing.assert_array_equal(reports[name].cpu().numpy(), records[name])
                self.assertEqual(reports[name].device.type, device)
            with self.assertRaisesRegex(L.InvalidError, "support"):
                reports["suport"]
            self.assertIn("(1, 4, 1)", repr(reports))

    def test_sequences(self):
        for device in DEVICES:
            cache, (seq,), k, v = filled(device)
            child = cache.fork(seq)
            cache.truncate(child, 150)
            cache.append(child, k[:, :, :20], v[:, :, :20])
            q = randn(1, H, 1, D, seed=9, device=device)
            kk, vv = (np.concatenate([array(t)[0, :, :150], array(t)[0, :, :20]], 1) for t in (k, v))
            self.close(cache.decode(child, q).o[0], reference.attention(array(q)[0], kk, vv, 1.5)[0], 2e-5)
            both = cache.decode(torch.tensor([seq, child]), torch.cat([q, q]))
            self.close(both.o[0], reference.attention(array(q)[0], array(k)[0], array(v)[0], 1.5)[0], 2e-5)
            cache.free(child)
            empty = cache.new()
            self.assertTrue((cache.decode(empty, q).o == 0).all())
            with self.assertRaisesRegex(L.StateError, "pages"):
                cache.append(empty, *(torch.zeros(1, G, 5000, D, device=device) for _ in "kv"))
            self.assertEqual(cache.length(empty), 0)

    def test_copy(self):
        """Between devices, page sizes and layouts, and with NumPy's cache: the same bits, decoded to the same answer."""
        for source in DEVICES:
            for target in DEVICES:
                for dtype in (torch.float32, torch.bfloat16):
                    cache, (seq,), k, v = filled(source, dtype=dtype)
                    other = T.KVCache(G, D, 1024, device=target, dtype=torch.bfloat16, page_size=32, layout="BNHD")
                    there = cache.copy(seq, other)
                    self.assertEqual((cache.length(seq), other.length(there)), (N, N))
                    q = randn(1, 1, H, D, seed=3, device=target)
                    k, v = (array(t.to(torch.bfloat16))[0] for t in (k, v))
                    for select in ("all", "certified"):
                        got = other.decode(there, q, select=select)
                        self.close(got.o[0].transpose(0, 1), reference.attention(array(q)[0].swapaxes(0, 1), k, v, 1.5)[0], 2e-5)
                    if target == "cuda":
                        continue
                    back = T.KVCache(G, D, 1024, device=source, dtype=torch.bfloat16)
                    for turn in (back, L.KVCache(G, D, 1024, dtype="bfloat16")):
                        self.assertEqual(turn.length(other.copy(there, turn)), N)
        cache, (seq,), _, _ = filled("cpu")
        with self.assertRaisesRegex(L.StateError, "pages"):
            cache.copy(seq, T.KVCache(G, D, 100, max_seqs=1))
        with self.assertRaisesRegex(L.ShapeError, "heads"):
            cache.copy(seq, T.KVCache(G + 1, D, 1000))
        with self.assertRaisesRegex(L.InvalidError, "no KVCache but Tensor"):
            cache.copy(seq, torch.zeros(1))
        closed = T.KVCache(G, D, 1000)
        closed.close()
        with self.assertRaisesRegex(L.StateError, "closed"):
            cache.copy(seq, closed)

    def test_tables(self):
        """The caller's tables, ragged, are sequences like the library's."""
        for device in DEVICES:
            cache = T.KVCache(G, D, 1024, device=device, max_seqs=1)
            other, seqs, k, v = filled(device, n=200, batch=2)
            table = torch.randperm(cache.max_pages, generator=torch.Generator().manual_seed(1))[:40].reshape(2, 20)
            tables = T.Tables(table.to(device, torch.int32), torch.zeros(2, dtype=torch.int32, device=device), 320)
            cache.append(tables, k, v, torch.tensor([200, 133], device=device))
            tables.seq_lens.add_(torch.tensor([200, 133], dtype=torch.int32, device=device))
            other.truncate(seqs[1], 133)
            q = randn(2, H, 1, D, seed=10, device=device)
            for select, options in SELECTORS:
                a, b = cache.decode(tables, q, select=select, **options), other.decode(seqs, q, select=select, **options)
                np.testing.assert_allclose(array(a.o), array(b.o), atol=1e-6)
                self.assertTrue(torch.equal(a.reports["support"], b.reports["support"]))

    def test_pools(self):
        """Keys that are in memory already, as one contiguous tensor: decoded in place, and selected from once described."""
        for device in DEVICES:
            k, v = (randn(G, 320, D, seed=s, dtype=torch.float16, device=device) for s in (1, 2))
            pools = tuple(t.view(G, 20, 16, D).transpose(0, 1) for t in (k, v))
            cache = T.KVCache(G, D, device=device, dtype=torch.float16, pools=pools)
            self.assertEqual(cache.max_pages, 20)
            tables = T.Tables(torch.arange(20, dtype=torch.int32, device=device)[None],
                              torch.tensor([317], dtype=torch.int32, device=device), 320)
            q = randn(1, H, 1, D, seed=3, scale=3, device=device)
            want, _, p = reference.attention(array(q)[0], array(k)[:, :317], array(v)[:, :317], 1.5)
            self.close(cache.decode(tables, q).o[0], want, 2e-5)
            blind = cache.decode(tables, q, select="topk", budget=64)
            self.assertTrue((blind.reports["pages"] == 20).all())  # nothing is known: everything is read
            cache.summarize(range(19))
            got = cache.decode(tables, q, select="topk", budget=64)
            self.assertTrue((got.reports["pages"] == 4).all())
            pages = cache.select(tables, q, budget=64).pages.cpu()
            lost = np.array([1 - p[h, 0][np.isin(np.arange(317) // 16, pages[0, h, 0])].sum() for h in range(H)])
            self.assertTrue((array(got.reports["delta_bound"])[0, :, 0] >= lost - 1e-6).all())

    def test_summaries(self):
        for device in DEVICES:
            cache, (seq,), k, _ = filled(device)
            s = cache.summaries(seq)
            pages = array(k)[0, :, :288].reshape(G, 18, 16, D).transpose(1, 0, 2, 3)  # [M,G,P,D]
            self.assertEqual(s.tokens[:18].tolist(), [16] * 18)
            np.testing.assert_array_equal(array(s.min)[:18], pages.min(2))
            np.testing.assert_array_equal(array(s.max)[:18], pages.max(2))
            step = 0 if device == "cpu" else np.abs(pages.mean(2)).max() / 127  # 8-bit codes
            self.close(s.mean[:18], pages.mean(2), step / 2 + 1e-5)
            self.close(s.spread[:18], pages.std(2), (0 if device == "cpu" else pages.std(2).max() / 255) + 1e-5)
            far = np.sqrt(((pages - array(s.mean)[:18, :, None]) ** 2).sum(-1)).max(-1)
            self.assertTrue((array(s.radius)[:18] >= far * (1 - 1e-6)).all())

    def test_refusals(self):
        q = torch.zeros(1, H, 1, D)
        for device in DEVICES:
            cache, (seq,), k, v = filled(device)
            here = q.to(device)
            with self.assertRaisesRegex(L.InvalidError, "no tensor but ndarray"):
                cache.decode(seq, q.numpy())
            with self.assertRaisesRegex(L.ShapeError, "4 dimensions"):
                cache.decode(seq, here[0])
            with self.assertRaisesRegex(L.DtypeError, "complex"):
                cache.decode(seq, here.to(torch.complex64))
            with self.assertRaisesRegex(L.UnsupportedError, "gradient"):
                cache.decode(seq, here.clone().requires_grad_())
            with torch.no_grad():
                cache.decode(seq, here.clone().requires_grad_())
            with self.assertRaisesRegex(L.InvalidError, "together"):
                cache.decode(seq, here, k[:, :, :1])
            with self.assertRaisesRegex(L.InvalidError, "no budgt"):
                cache.decode(seq, here, select="topk", budgt=3)
            with self.assertRaisesRegex(L.DtypeError, "torch.int32"):
                cache.decode(T.Tables(torch.zeros(1, 2, device=device), torch.zeros(1, device=device), 1), here)
            with self.assertRaisesRegex(L.InvalidError, "max_tokens"):
                T.KVCache(G, D, device=device)
            with self.assertRaisesRegex(L.DtypeError, "float64"):
                T.KVCache(G, D, 100, device=device, dtype=torch.float64)
            with self.assertRaisesRegex(L.InvalidError, "kv_memory is 'disk'; possible: device, host"):
                T.KVCache(G, D, 100, device=device, kv_memory="disk")
            with self.assertRaisesRegex(L.InvalidError, "kv_memory and k_pool"):
                pool = torch.zeros(2, G, 16, D, device=device)
                T.KVCache(G, D, device=device, pools=(pool, pool), kv_memory="host")
            cache.close()
            with self.assertRaisesRegex(L.StateError, "closed"):
                cache.decode(seq, here)
            self.assertEqual(repr(cache), "KVCache(closed)")
        with self.assertRaisesRegex(L.UnsupportedError, "meta"):
            T.KVCache(G, D, 100, device="meta")

    def test_repr(self):
        for device in DEVICES:
            cache, _, _, _ = filled(device, summaries="minmax")
            where = "cuda:0" if device == "cuda" else "cpu"
            self.assertEqual(repr(cache), f"KVCache(2 heads of 64, float32, BHND, on {where}: 1 sequences, 19 of 70 pages of 16 in "
                                          "use, 1.1 MiB, summaries minmax 0.1 MiB)")

    def test_like_arrays(self):
        """On the CPU the results are those of libentmax.KVCache, supports included."""
        cache, (seq,), k, v = filled("cpu")
        plain = L.KVCache(G, D, 1024)
        same = plain.new()
        plain.append(same, k.numpy(), v.numpy())
        q = randn(1, H, 1, D, seed=11, scale=2)
        for select, options in SELECTORS:
            a = cache.decode(seq, q, select=select, return_support=True, **options)
            b = plain.decode(same, q.numpy(), select=select, return_support=True, **options)
            np.testing.assert_array_equal(a.o.numpy(), b.o)
            for x, y in zip(a.support.flat, b.support.flat):
                np.testing.assert_array_equal(x.positions, y.positions)
                np.testing.assert_array_equal(x.weights, y.weights)
            np.testing.assert_array_equal(a.certified.numpy(), b.certified)
        self.assertRegex(repr(plain), "^KVCache.2 heads of 64, float32, BHND, on the CPU: 1 seq")


@unittest.skipIf(REASON, REASON)
class OnGpu(unittest.TestCase):
    STEPS = 64

    def growing(self, select, options, n, layout="BHND"):
        """STEPS outputs and reports of a decode that appends, eagerly and by one captured graph."""
        outs = []
        for captured in (False, True):
            cache = T.KVCache(G, D, 2 * (n + self.STEPS) + 64, device="cuda", dtype=torch.float16, layout=layout, max_seqs=1)
            columns = -(-(n + self.STEPS) // 16)
            table = torch.arange(2 * columns - 1, -1, -1, dtype=torch.int32, device="cuda").view(2, columns)
            tables = T.Tables(table, torch.zeros(2, dtype=torch.int32, device="cuda"), n + self.STEPS)
            k, v = (randn(2, G, n, D, seed=s, dtype=torch.float16, device="cuda") for s in (1, 2))
            counts = torch.tensor([n, n // 2 + 3], dtype=torch.int32, device="cuda")
            turn = (lambda t: t) if layout == "BHND" else (lambda t: t.transpose(1, 2))
            cache.append(tables, turn(k), turn(v), counts)
            tables.seq_lens.add_(counts)
            q, kn, vn = (torch.zeros(2, h, 1, D, dtype=torch.float16, device="cuda") for h in (H, G, G))
            new = randn(self.STEPS, 3, 2, H, 1, D, seed=3, dtype=torch.float16, device="cuda")

            def feed(i):
                q.copy_(new[i, 0])
                kn.copy_(new[i, 1, :, :G])
                vn.copy_(new[i, 2, :, :G])

            def step():
                got = cache.decode(tables, turn(q), turn(kn), turn(vn), select=select, **options)
                tables.seq_lens.add_(1)
                return got.o, got.reports.data
            feed(0)
            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    held = step()
            steps = []
            for i in range(self.STEPS):
                feed(i)
                if captured:
                    graph.replay()
                    steps.append([t.clone() for t in held])
                else:
                    steps.append(step())
            T.synchronize()
            self.assertEqual(tables.seq_lens.tolist(), [n + self.STEPS, n // 2 + 3 + self.STEPS])
            outs.append([T.Decoded(o, T.Reports(r)) for o, r in steps])
            if captured:
                graph.replay()  # one token more than max_len: found out, nothing overwritten
                with self.assertRaisesRegex(L.InvalidError, "max_len"):
                    T.synchronize()
        return outs

    def test_graph(self):
        for layout in ("BHND", "BNHD"):
            for select, options in SELECTORS:
                for eager, replayed in zip(*self.growing(select, options, 500, layout)):
                    self.assertTrue(torch.isfinite(eager.o).all())
                    self.assertTrue(torch.equal(eager.o, replayed.o) and torch.equal(eager.reports.data, replayed.reports.data))

    def test_certified_in_a_graph(self):
        """Long enough for the ladder. What it reads depends on timing, the answer only in the last bit of f16."""
        for eager, replayed in zip(*self.growing("certified", {}, 110000)):
            torch.testing.assert_close(eager.o, replayed.o, rtol=2 ** -10, atol=1e-5)
            self.assertTrue(eager.certified.all() and replayed.certified.all())
            self.assertTrue((replayed.reports["path"] == _c.PATH_LADDER).all())
            self.assertTrue((replayed.reports["tokens"][0] < 55000).all())
            self.assertTrue(torch.equal(eager.reports["support"], replayed.reports["support"]))

    def test_certified_is_all(self):
        cache = T.KVCache(G, D, 120000, device="cuda", dtype=torch.bfloat16)
        seq = cache.new()
        k, v = (torch.randn(1, G, 120000, D, dtype=torch.bfloat16, device="cuda") for _ in "kv")
        for at in range(0, 120000, 30000):
            cache.append(seq, k[:, :, at:at + 30000], v[:, :, at:at + 30000])
        q = torch.randn(1, H, 1, D, device="cuda")
        a, b = cache.decode(seq, q), cache.decode(seq, q, select="certified")
        torch.testing.assert_close(a.o, b.o, rtol=0, atol=1e-5)
        self.assertTrue((b.reports["path"] == _c.PATH_LADDER).all() and b.certified.all())
        want, _, _ = reference.attention(array(q)[0], array(k)[0], array(v)[0], 1.5)
        np.testing.assert_allclose(array(b.o)[0], want, atol=2e-5)

    def test_host_memory(self):
        """Keys and values in pinned host memory: the bits of a cache on the device; of the ladder, up to the order of a sum."""
        here = T.KVCache(G, D, 120000, device="cuda", dtype=torch.float16)
        there = T.KVCache(G, D, 120000, device="cuda", dtype=torch.float16, kv_memory="host")
        k, v = (torch.randn(1, G, 110000, D, dtype=torch.float16, device="cuda") for _ in "kv")
        q = torch.randn(1, H, 1, D, device="cuda")
        seqs = [cache.new() for cache in (here, there)]
        for cache, seq in zip((here, there), seqs):
            cache.append(seq, k, v)
        for select, options in SELECTORS:
            a, b = (cache.decode(seq, q, select=select, **options) for cache, seq in zip((here, there), seqs))
            torch.testing.assert_close(a.o, b.o, rtol=0, atol=1e-6 if select == "certified" else 0)
            self.assertTrue(torch.equal(a.reports["support"], b.reports["support"]))
        self.assertTrue((b.reports["path"] == _c.PATH_LADDER).all() and b.certified.all())
        self.assertIn("host memory", repr(there))
        self.assertNotIn("host memory", repr(here))

    def test_streams(self):
        """Two caches on two streams, in step with torch's own work there."""
        caches = [filled("cuda", n=5000) for _ in range(2)]
        q = torch.randn(1, H, 1, D, device="cuda")
        want = caches[0][0].decode(caches[0][1], q * 3, select="gaussian").o
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        outs = [[], []]
        for _ in range(20):
            for (cache, seqs, _, _), stream, out in zip(caches, streams, outs):
                with torch.cuda.stream(stream):
                    out.append(cache.decode(seqs, q + q + q, select="gaussian").o * 2)
        torch.cuda.synchronize()
        for out in outs:
            for o in out:
                torch.testing.assert_close(o, want * 2, rtol=0, atol=1e-5)

    def test_faults(self):
        cache, _, _, _ = filled("cuda")
        q = torch.zeros(1, H, 1, D, device="cuda")
        bad = T.Tables(torch.full((1, 4), 1 << 20, dtype=torch.int32, device="cuda"),
                       torch.tensor([60], dtype=torch.int32, device="cuda"), 64)
        cache.decode(bad, q)
        with self.assertRaisesRegex(L.InvalidError, r"block_table\[0\]\[\d\] = 1048576"):
            T.synchronize()
        T.synchronize()

    def test_refusals(self):
        cache, (seq,), k, v = filled("cuda")
        q = torch.zeros(1, H, 1, D, device="cuda")
        with self.assertRaisesRegex(L.InvalidError, "q is on cpu, the cache on cuda:0"):
            cache.decode(seq, q.cpu())
        with self.assertRaisesRegex(L.UnsupportedError, "return_support"):
            cache.decode(seq, q, return_support=True)
        with self.assertRaisesRegex(L.UnsupportedError, "emx_decode"):
            cache.select(seq, q, select="certified")
        with self.assertRaisesRegex(L.UnsupportedError, "n_new"):
            cache.append(seq, k, v, [3])
        with self.assertRaisesRegex(L.UnsupportedError, "residual"):
            T.KVCache(G, D, 100, device="cuda", summaries="sketch,residual")
        with self.assertRaisesRegex(L.UnsupportedError, "file"):
            T.KVCache(G, D, 100, device="cuda", file="x")
        with self.assertRaises(L.UnsupportedError):
            cache.save("x", [seq])
        with self.assertRaisesRegex(L.OutOfMemoryError, "bytes of device memory are needed"):
            T.KVCache(64, 256, 1 << 28, device="cuda")
        with self.assertRaisesRegex(L.InvalidError, "libentmax.torch"):
            L.KVCache(G, D, 100).append(0, k, v)
        graph = torch.cuda.CUDAGraph()
        with self.assertRaisesRegex(L.UnsupportedError, "block_table"):
            with torch.cuda.graph(graph):
                cache.decode(seq, q)
        self.assertTrue(torch.isfinite(cache.decode(seq, q).o).all())


if __name__ == "__main__":
    unittest.main()
