# SPDX-License-Identifier: Apache-2.0
"""Dense attention and its gradients against float64 references."""
import unittest

import numpy as np

import libentmax as L
import reference

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

RNG = np.random.default_rng(11)


def qkv(heads=4, kv_heads=2, s=9, n=14, d=16, dtype=np.float64):
    return (2 * RNG.standard_normal((1, heads, s, d)).astype(dtype), RNG.standard_normal((1, kv_heads, n, d)).astype(dtype),
            RNG.standard_normal((1, kv_heads, n, d)).astype(dtype))


class Attention(unittest.TestCase):
    def close(self, a, b, tolerance):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)

    def test_forward(self):
        for alpha in (1.0, 1.5, 2.0, 3.0):
            for causal in (False, True):
                q, k, v = qkv()
                slopes = np.array([0, 0.5, 0.25, 1], np.float32)
                o, tau, p = reference.attention(q[0], k[0], v[0], alpha, causal, slopes=slopes)
                # float32 scores are wrong by 1e-6; above alpha = 2 the slope of p grows without bound near zero.
                for dtype, tolerance in ((np.float64, 1e-8), (np.float32, 2e-4 if alpha > 2 else 5e-6)):
                    got, t, count = L.attention(q.astype(dtype), k.astype(dtype), v.astype(dtype), alpha, causal=causal,
                                                alibi_slopes=slopes, return_tau=True, return_support_size=True)
                    self.assertEqual((got.dtype, t.dtype, count.dtype), (dtype, dtype, np.int32))
                    self.close(got[0], o, tolerance)
                    if alpha > 1:
                        self.close(t[0], tau, tolerance)
                    if dtype == np.float64:
                        np.testing.assert_array_equal(count[0], (p > 0).sum(-1))

    def test_log_sum_exp(self):
        q, k, v = qkv(heads=2)
        scores = np.einsum("hsd,hnd->hsn", q[0], k[0]) / 4
        _, lse = L.attention(q, k, v, 1.0, return_tau=True)
        self.close(lse[0], np.log(np.exp(scores).sum(-1)), 1e-10)

    def test_layouts_and_strides(self):
        q, k, v = qkv(dtype=np.float32)
        want = L.attention(q, k, v, causal=True, scale=0.3)
        self.close(want[0], reference.attention(q[0], k[0], v[0], 1.5, True, 0.3)[0], 5e-6)
        turned = [np.moveaxis(a, 1, 2) for a in (q, k, v)]  # views: read in place
        np.testing.assert_array_equal(np.moveaxis(L.attention(*turned, causal=True, scale=0.3, layout="BNHD"), 2, 1), want)
        fortran = [np.asfortranarray(a) for a in (q, k, v)]  # copied
        np.testing.assert_array_equal(L.attention(*fortran, causal=True, scale=0.3), want)

    def test_head_alphas(self):
        q, k, v = qkv()
        alphas = [1.0, 1.3, 1.5, 2.0]
        self.close(L.attention(q, k, v, alphas)[0], reference.attention(q[0], k[0], v[0], alphas)[0], 1e-8)

    def test_packed_padded_paged(self):
        q, k, v = qkv(s=10, n=10, dtype=np.float32)
        cu = [0, 4, 10]
        pq, pk, pv = (np.ascontiguousarray(np.moveaxis(a[0], 0, 1)) for a in (q, k, v))
        got = L.attention(pq, pk, pv, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
        for a, b in zip(cu, cu[1:]):
            want = L.attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], causal=True)
            self.close(np.moveaxis(got[a:b], 0, 1), want[0], 2e-6)
        padded = L.attention(q[:, :, :4], k, v, seqlens_k=[7])
        self.close(padded, L.attention(q[:, :, :4], k[:, :, :7], v[:, :, :7]), 2e-6)
        q, k, v = qkv(s=1, n=40, dtype=np.float32)
        pools = [np.zeros((5, 2, 16, 16), np.float32) for _ in range(2)]
        table = [[3, 0, 4]]
        for pool, a in zip(pools, (k, v)):
            for logical, page in enumerate(table[0]):
                part = a[0, :, 16 * logical:16 * logical + 16]
                pool[page, :, :part.shape[1]] = part
        self.close(L.attention(q, *pools, block_table=table, seqlens_k=[40]), L.attention(q, k, v), 2e-6)

    def test_gradients(self):
        q, k, v = qkv(heads=2, kv_heads=1, s=3, n=5)
        d_o = RNG.standard_normal(q.shape)
        for alpha in (1.0, 1.5, 2.0, np.array([1.3, 1.7])):
            _, tau = L.attention(q, k, v, alpha, causal=True, return_tau=True)
            got = L.attention_backward(d_o, q, k, v, tau, alpha, causal=True)
            for place, gradient in enumerate(got):
                def value(x):
                    arrays = [q[0], k[0], v[0]]
                    arrays[place] = x
                    return (reference.attention(*arrays, alpha, True)[0] * d_o[0]).sum()
                # Central differences: 1e-10 of rounding over 2e-6, and entmax bends where a weight reaches zero.
                self.close(gradient[0], reference.difference(value, (q, k, v)[place][0]), 1e-6)
        *_, d_alpha = L.attention_backward(d_o, q, k, v, tau, alpha, causal=True, return_d_alpha=True)
        want = reference.difference(lambda a: (reference.attention(q[0], k[0], v[0], a, True)[0] * d_o[0]).sum(), alpha)
        self.close(d_alpha, want, 1e-6)

    @unittest.skipIf(bfloat16 is None, "the ml_dtypes package is not installed: pip install ml_dtypes")
    def test_bfloat16(self):
        half = [a.astype(bfloat16) for a in qkv()]
        exact = [a.astype(np.float64) for a in half]
        d_o = RNG.standard_normal(half[0].shape).astype(bfloat16)
        want, tau = L.attention(*exact, causal=True, return_tau=True)
        for q in (half[0], half[0].astype(np.float32)):
            got, t = L.attention(q, *half[1:], causal=True, return_tau=True)
            self.assertEqual((got.dtype, t.dtype), (q.dtype, np.float32))
            # A result of 8 bits is off by 2^-9 of itself, float32 sums by 1e-5.
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=2.0**-8, atol=1e-5)
            gradients = L.attention_backward(d_o.astype(q.dtype), q, *half[1:], t, causal=True)
            for a, b in zip(gradients, L.attention_backward(d_o.astype(np.float64), *exact, tau, causal=True)):
                np.testing.assert_allclose(a.astype(np.float64), b, rtol=2.0**-8, atol=1e-4)

    def test_errors(self):
        q, k, v = qkv()
        for call, error, sentence in (
                (lambda: L.attention(q, k, v[:, :, :-1]), L.ShapeError, "v"),
                (lambda: L.attention(q, k.astype(np.float32), v), L.DtypeError, ""),
                (lambda: L.attention(q.astype(int), k, v), L.DtypeError, "q has dtype int64"),
                (lambda: L.attention(q, k, v, 0.9), L.InvalidError, "alpha"),
                (lambda: L.attention(q, k, v, [1.5, 2.0]), L.ShapeError, "alphas"),
                (lambda: L.attention(q, k, v, layout="NBHD"), L.InvalidError, "layout"),
                (lambda: L.attention(q, k, v, seqlens_k=[1.0]), L.DtypeError, "seqlens_k"),
                (lambda: L.attention(q, k, v, cu_seqlens_q=[0, 3]), L.InvalidError, "go together"),
                (lambda: L.attention_backward(q, q, k, v, q[..., 0], 3.0), L.UnsupportedError, "alpha"),
                (lambda: L.attention_backward(q, q, k, v, q[..., 0], return_d_alpha=True), L.InvalidError, "one number a head")):
            with self.assertRaisesRegex(error, sentence):
                call()


if __name__ == "__main__":
    unittest.main()
