# SPDX-License-Identifier: Apache-2.0
"""Maps, gradients and losses against bisection in float64 and central differences."""
import unittest

import numpy as np

import libentmax as L
import reference

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

RNG = np.random.default_rng(5)
ALPHAS = (1.0, 1.2, 1.5, 1.8, 2.0)


class Maps(unittest.TestCase):
    def close(self, a, b, tolerance):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)

    def test_forward_along_every_axis(self):
        x = RNG.standard_normal((3, 17, 4)) * 3
        for alpha in ALPHAS:
            for axis in (0, 1, 2, -1, -2):
                want = reference.entmax(x, alpha, axis)
                self.close(L.entmax(x, alpha, axis), want, 1e-9)  # the reference is exact to about 1e-12, slopes of p amplify it
                for dtype, tolerance in ((np.float32, 2e-6), (np.float16, 1e-3)):  # scores or weights rounded to that dtype
                    y = x.astype(dtype)
                    got = L.entmax(y, alpha, axis)
                    self.assertEqual(got.dtype, dtype)
                    self.close(got, reference.entmax(y, alpha, axis), tolerance)

    def test_named_maps(self):
        x = RNG.standard_normal((6, 40))
        self.close(L.softmax(x), reference.entmax(x, 1.0), 1e-12)
        self.close(L.sparsemax(x), reference.entmax(x, 2.0), 1e-12)
        self.close(L.entmax15(x), reference.entmax(x, 1.5), 1e-9)
        for alpha in (1.3, 2.0, 4.0, 10.0):
            self.close(L.normmax(x, alpha), reference.entmax(x, alpha, kind="normmax"), 1e-7)
        for k in (1, 2.5, 7):
            got = L.budget(x, k)
            self.close(got, reference.entmax(x, 2.0, kind="budget", budget=k), 1e-9)
            self.close(got.sum(-1), k, 1e-9)
        k = np.array([1, 2.5, 7, 40, 0.5, 3])[:, None]
        np.testing.assert_array_equal(L.budget(x, k), np.concatenate([L.budget(x[i:i + 1], k[i, 0]) for i in range(6)]))

    def test_threshold_and_support(self):
        x = RNG.standard_normal((2, 9, 3)) * 2
        p, support, tau = L.entmax(x, 1.5, 1, return_support_size=True, return_tau=True)
        self.assertEqual((support.shape, support.dtype, tau.shape), ((2, 1, 3), np.int32, (2, 1, 3)))
        np.testing.assert_array_equal(support, np.count_nonzero(p, axis=1)[:, None])
        self.close(p, np.maximum(0.5 * x - tau, 0) ** 2, 1e-12)
        self.assertTrue(np.isnan(L.entmax(x, 1.0, return_tau=True)[1]).all())

    def test_alpha_per_row(self):
        x = RNG.standard_normal((2, 3, 8))
        alpha = np.array([1.0, 1.4, 2.0])[:, None]
        got = L.entmax(x, alpha)
        for i in range(3):
            self.close(got[:, i], reference.entmax(x[:, i], alpha[i, 0]), 1e-9)
        turned = L.entmax(np.moveaxis(x, -1, 0), alpha[:, 0], 0)  # broadcasts against [1, 2, 3]
        self.close(np.moveaxis(turned, 0, -1), got, 0)
        with self.assertRaisesRegex(L.ShapeError, "does not broadcast"):
            L.entmax(x, np.ones(5))

    def test_masks(self):
        x = np.array([[0.0, -np.inf, 1.0], [-np.inf] * 3, [0, np.nan, 0]])
        p = L.entmax(x)
        self.assertEqual(p[0, 1], 0)
        self.close(p[1], 0, 0)
        self.assertTrue(np.isnan(p[2]).all())

    def test_layouts(self):
        """What cannot be read in place is copied, and the answer is the same; the caller's array stays as it was."""
        x = RNG.standard_normal((8, 12))
        for y in (x[::2], x[:, ::2], x[::-1], x[:, ::-1], x.T, np.broadcast_to(x[:1], (5, 12)), np.asfortranarray(x)):
            for axis in (0, 1):
                before = y.copy()
                self.close(L.entmax(y, 1.5, axis), reference.entmax(y, 1.5, axis), 1e-9)
                np.testing.assert_array_equal(y, before)
        frozen = x.copy()
        frozen.flags.writeable = False
        self.close(L.entmax(frozen), reference.entmax(x, 1.5), 1e-9)
        for shape in ((0, 4), (2, 0, 3), (1, 1), (4,)):
            self.assertEqual(L.entmax(np.ones(shape)).shape, shape)

    def test_nothing_is_copied(self):
        from libentmax import _c
        x = np.zeros((64, 128), np.float32)
        self.assertTrue(np.shares_memory(_c.readable(x), x))
        self.assertTrue(np.shares_memory(_c.readable(x[:, :64]), x))
        self.assertFalse(np.shares_memory(_c.readable(x.T), x))

    def test_gradients(self):
        x = RNG.standard_normal((3, 7))
        dp = RNG.standard_normal((3, 7))
        for alpha in ALPHAS:
            want = reference.difference(lambda y: (reference.entmax(y, alpha) * dp).sum(), x)
            # Central differences of step 1e-6 leave 1e-12 of truncation and 1e-10 of rounding; 1e-6 where p bends near zero.
            self.close(L.entmax_backward(L.entmax(x, alpha), dp, alpha), want, 1e-6)
        for alpha in (1.5, 2.0):
            want = reference.difference(lambda y: (reference.entmax(y, alpha, kind="normmax") * dp).sum(), x)
            self.close(L.normmax_backward(L.normmax(x, alpha), dp, alpha), want, 1e-5)
        want = reference.difference(lambda y: (reference.entmax(y, 2.0, kind="budget", budget=2) * dp).sum(), x)
        self.close(L.budget_backward(L.budget(x, 2), dp), want, 1e-6)
        np.testing.assert_array_equal(L.sparsemax_backward(L.sparsemax(x), dp), L.entmax_backward(L.sparsemax(x), dp, 2.0))
        np.testing.assert_array_equal(L.entmax15_backward(L.entmax15(x), dp), L.entmax_backward(L.entmax15(x), dp))
        np.testing.assert_array_equal(L.softmax_backward(L.softmax(x), dp), L.entmax_backward(L.softmax(x), dp, 1.0))

    def test_gradient_along_an_axis(self):
        x, dp = RNG.standard_normal((4, 6, 2)), RNG.standard_normal((4, 6, 2))
        before = dp.copy()
        got = L.entmax_backward(L.entmax(x, 1.5, 1), dp, 1.5, 1)
        turned = L.entmax_backward(L.entmax(np.moveaxis(x, 1, -1)), np.moveaxis(dp, 1, -1))
        np.testing.assert_array_equal(np.moveaxis(got, 1, -1), turned)
        np.testing.assert_array_equal(dp, before)

    def test_gradient_of_alpha(self):
        x, dp = RNG.standard_normal((3, 7)), RNG.standard_normal((3, 7))
        alpha = np.array([[1.2], [1.5], [1.9]])
        _, got = L.entmax_backward(L.entmax(x, alpha), dp, alpha, return_d_alpha=True)
        self.assertEqual(got.shape, (3, 1))
        step = 1e-6
        for i in range(3):
            above, below = (reference.row(x[i], alpha[i, 0] + s)[0] for s in (step, -step))
            self.close(got[i, 0], ((above - below) * dp[i]).sum() / (2 * step), 1e-6)

    def test_losses(self):
        x = RNG.standard_normal((2, 3, 9)) * 2
        target = RNG.integers(0, 9, (2, 3))
        target[1, 2] = -100
        for alpha in ALPHAS:
            def loss(y):
                total = 0.0
                for index in np.ndindex(2, 3):
                    if target[index] == -100:
                        continue
                    p = reference.row(y[index], alpha)[0]
                    if alpha == 1.0:
                        entropy = -(p * np.log(p)).sum()
                    else:
                        entropy = (1 - (p ** alpha).sum()) / (alpha * (alpha - 1))
                    total += (p * y[index]).sum() + entropy - y[index][target[index]]
                return total
            got, dx = L.entmax_loss(x, target, alpha, reduction="sum", return_grad=True)
            self.close(got, loss(x), 1e-9)
            self.close(dx, reference.difference(loss, x), 1e-7)
            self.close(L.entmax_loss(x, target, alpha), got / 5, 1e-12)
            rows = L.entmax_loss(x, target, alpha, reduction="none")
            self.assertEqual((rows.shape, rows[1, 2]), ((2, 3), 0))
            self.close(rows.sum(), got, 1e-12)
        self.assertEqual(L.sparsemax_loss(x, target), L.entmax_loss(x, target, 2.0))
        self.assertEqual(L.entmax15_loss(x, target), L.entmax_loss(x, target, 1.5))
        _, dx = L.normmax_loss(x[0], target[0], return_grad=True, reduction="none")
        self.close(dx, L.normmax(x[0]) - np.eye(9)[target[0]], 1e-9)
        self.assertEqual(L.entmax_loss(x[0, 0], 3, ignore_index=3, reduction="sum"), 0)

    @unittest.skipIf(bfloat16 is None, "the ml_dtypes package is not installed: pip install ml_dtypes")
    def test_bfloat16(self):
        x = (RNG.standard_normal((5, 60)) * 2).astype(bfloat16)
        target = np.array([0, 59, 3, -100, 7])
        exact = x.astype(np.float64)
        # Results are those of float64 arithmetic on the same scores, rounded to 8 bits: half a unit is 2^-9 of the value.
        for got, want in ((L.entmax(x), L.entmax(exact)), (L.entmax(x, 1.3, 0), L.entmax(exact, 1.3, 0)),
                          (L.softmax(x), L.softmax(exact)), (L.normmax(x), L.normmax(exact)),
                          (L.budget(x, 3), L.budget(exact, 3)),
                          tuple(L.entmax_loss(y, target, return_grad=True)[1] for y in (x, exact))):
            self.assertEqual(got.dtype, bfloat16)
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=2.0**-8, atol=1e-6)
        p, dp = L.entmax(x), RNG.standard_normal(x.shape).astype(bfloat16)
        want = L.entmax_backward(p.astype(np.float64), dp.astype(np.float64))
        np.testing.assert_allclose(L.entmax_backward(p, dp).astype(np.float64), want, rtol=2.0**-8, atol=1e-6)
        loss = L.entmax_loss(x, target)
        self.assertEqual(loss.dtype, np.float32)
        self.close(loss, L.entmax_loss(exact, target), 1e-5)

    def test_errors(self):
        x = np.zeros((2, 3))
        for call, error, sentence in (
                (lambda: L.entmax(x, 0.5), L.InvalidError, "alpha"),
                (lambda: L.entmax(x, 9), ValueError, "alpha"),
                (lambda: L.entmax(np.zeros((2, 3), int)), L.DtypeError, "int64"),
                (lambda: L.entmax(np.zeros((2, 3), complex)), TypeError, "complex"),
                (lambda: L.entmax(x.astype(">f8")), L.DtypeError, "byte order"),
                (lambda: L.entmax(np.zeros((2, 3), np.int32)), L.DtypeError, ""),
                (lambda: L.entmax(1.0), L.ShapeError, "scalar"),
                (lambda: L.entmax(x, axis=2), ValueError, "axis"),
                (lambda: L.entmax_backward(x, x[:1]), L.ShapeError, "agree"),
                (lambda: L.entmax_backward(x, x.astype(np.float32)), L.DtypeError, ""),
                (lambda: L.budget(x, 7), L.InvalidError, "budget"),
                (lambda: L.entmax_loss(x, np.zeros(3, int)), L.ShapeError, "target"),
                (lambda: L.entmax_loss(x, np.zeros(2)), L.DtypeError, "target"),
                (lambda: L.entmax_loss(x, np.array([0, 3])), L.InvalidError, "3"),
                (lambda: L.entmax_loss(x, np.array([0, 2**40])), L.InvalidError, "int32"),
                (lambda: L.entmax_loss(x, np.zeros(2, int), reduction="max"), L.InvalidError, "reduction")):
            with self.assertRaisesRegex(error, sentence):
                call()


if __name__ == "__main__":
    unittest.main()
