# SPDX-License-Identifier: Apache-2.0
"""Maps, losses and attention of libentmax.torch on a GPU: against the CPU, in float64 by finite differences or by the dense formula,
on torch's streams, compiled and in captured graphs. Skipped where torch or the library finds no GPU."""
import unittest

import torch
from torch.autograd import gradcheck

import libentmax as L
import libentmax.torch as T
from libentmax.torch import _core

F64 = torch.float64


def why_not():
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    try:
        _core.context(torch.empty(0, device="cuda"))
    except L.Error as error:
        return str(error)
    return None


REASON = why_not()


def randn(*shape, scale=1.0, grad=False, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(*shape, dtype=F64) * scale).to(dtype).cuda().requires_grad_(grad)


def captured(step):
    """A graph of step, which ran before on another stream, and what step returned in it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    return graph, got


@unittest.skipIf(REASON, REASON)
class Maps(unittest.TestCase):
    def close(self, a, b):
        """Within 1e-6, and one rounding of 16-bit results."""
        unit = {torch.float16: 2 ** -10, torch.bfloat16: 2 ** -7}.get(a.dtype, 0)
        self.assertTrue(a.is_cuda)
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=unit, atol=1e-6, equal_nan=True)

    def test_like_the_cpu(self):
        for dtype in (torch.float32, F64, torch.float16, torch.bfloat16):
            for shape in ((3, 17, 4), (4, 5000)):
                x = randn(*shape, scale=2, dtype=dtype, grad=True)
                y = x.detach().cpu().requires_grad_()
                d = torch.randn(shape, dtype=F64).to(dtype)
                for dim in range(-1, len(shape) - 1):
                    alpha = torch.linspace(1, 2.2, shape[0], dtype=F64).reshape(-1, *[1] * (len(shape) - 1))
                    for f in (T.entmax15, T.sparsemax, lambda x, dim: T.entmax(x, 1.0, dim), lambda x, dim: T.entmax(x, 1.3, dim),
                              lambda x, dim: T.normmax_bisect(x, 1.7, dim), lambda x, dim: T.budget_bisect(x, 1.5, dim),
                              lambda x, dim: T.entmax(x, alpha.to(x.device), dim) if dim else T.entmax15(x, dim)):
                        p, q = f(x, dim=dim), f(y, dim=dim)
                        self.close(p, q)
                        a, = torch.autograd.grad(p, x, d.cuda())
                        b, = torch.autograd.grad(q, y, d)
                        # A gradient from weights that were rounded otherwise: by a unit of p^(1/2).
                        slack = 2e-5 if dtype in (torch.float32, F64) else 0.1
                        torch.testing.assert_close(a.cpu(), b, rtol=slack, atol=slack)

    def test_gradients(self):
        x = randn(4, 6, dtype=F64, grad=True)
        alpha = torch.tensor([[1.2], [1.5], [1.9], [2.6]], dtype=F64, device="cuda", requires_grad=True)
        for function in (T.entmax15, T.sparsemax, lambda x: T.entmax(x, 1.0), lambda x: T.entmax(x, 1.75, 0), T.normmax_bisect):
            self.assertTrue(gradcheck(function, (x,)))
        self.assertTrue(gradcheck(T.entmax_bisect, (x, alpha)))
        self.assertTrue(torch.autograd.gradgradcheck(T.entmax15, (x,)))
        wide = randn(2, 1300, dtype=F64, grad=True, scale=2)
        self.assertTrue(gradcheck(lambda x: T.entmax15(x).square().sum(-1), (wide,)))

    def test_alpha(self):
        """A number on the CPU is taken as one; a parameter gets its gradient."""
        x = randn(3, 40)
        self.assertTrue(torch.equal(T.entmax(x, torch.tensor(1.3)), T.entmax(x, torch.tensor(1.3).cuda())))
        alpha = torch.nn.Parameter(torch.tensor(1.4, device="cuda"))
        T.EntmaxBisect(alpha)(x).square().sum().backward()
        other = torch.tensor(1.4, requires_grad=True)
        T.entmax(x.cpu(), other).square().sum().backward()
        torch.testing.assert_close(alpha.grad.cpu(), other.grad)

    def test_layouts(self):
        x = randn(8, 12)
        for y in (x[::2], x[:, ::2], x.t(), x[:1].expand(5, 12), x[:, 1:6], x[0]):
            self.close(T.entmax15(y), T.entmax15(y.cpu()))
        for shape in ((0, 4), (2, 0, 3), (1, 1)):
            y = torch.ones(shape, requires_grad=True, device="cuda")
            T.entmax15(y).sum().backward()
            self.assertEqual(y.grad.shape, y.shape)

    def test_refusals(self):
        x = randn(2, 6)
        for call, error, sentence in ((lambda: T.budget_bisect(x, 7), L.InvalidError, "budget"),
                                      (lambda: T.entmax(x, torch.tensor([[1.5], [2.0]])), L.InvalidError, "alpha is on device"),
                                      (lambda: T.entmax(x, 0.5), L.InvalidError, "alpha")):
            with self.assertRaisesRegex(error, sentence):
                call()
        p = T.entmax(x, torch.tensor([[1.5], [9.0]], device="cuda"))
        with self.assertRaisesRegex(L.InvalidError, "alpha of row 1"):
            T.synchronize()
        self.assertTrue(p[1].isnan().all() and p[0].isfinite().all())
        T.synchronize("cpu")


@unittest.skipIf(REASON, REASON)
class Losses(unittest.TestCase):
    def test_like_the_cpu(self):
        for v in (9, 700, 33000):
            x = randn(12, v, scale=2, grad=True)
            y = x.detach().cpu().requires_grad_()
            target = torch.arange(12) * 31 % v
            target[3] = -100
            for module in (T.Entmax15Loss(), T.SparsemaxLoss(reduction="sum"), T.EntmaxBisectLoss(1.0), T.EntmaxBisectLoss(1.8),
                           T.NormmaxBisectLoss()):
                for kind in (torch.int64, torch.int32):
                    a, b = module(x, target.to(kind).cuda()), module(y, target)
                    torch.testing.assert_close(a.cpu(), b, rtol=2e-6, atol=1e-6)
                    a, = torch.autograd.grad(a, x)
                    b, = torch.autograd.grad(b, y)
                    torch.testing.assert_close(a.cpu(), b, rtol=0, atol=2e-6)
            want = torch.nn.functional.cross_entropy(x.detach(), target.cuda())
            torch.testing.assert_close(T.EntmaxBisectLoss(1.0)(x, target.cuda()).detach(), want, rtol=2e-6, atol=1e-6)

    def test_targets(self):
        x = randn(3, 5)
        for bad in (5, -1, 2 ** 40):
            loss = T.entmax15_loss(x, torch.tensor([0, bad, 4], device="cuda"))
            with self.assertRaisesRegex(L.InvalidError, "target of row 1"):
                T.synchronize()
            self.assertEqual(loss.isnan().tolist(), [False, True, False])
        self.assertTrue(gradcheck(lambda x: T.entmax15_loss(x, torch.tensor([0, 2, 4], device="cuda")), (x.double().requires_grad_(),)))


def dense(q, k, v, alpha, slopes=None, causal=True):
    """Attention in float64 through the whole matrix; its gradients are torch's own. [B,H,S,D], [B,G,N,D]."""
    q, k, v = (t.detach().cpu().double().requires_grad_() for t in (q, k, v))
    group, s, n = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    far = torch.arange(s)[:, None] + n - s - torch.arange(n)
    z = q @ k.repeat_interleave(group, 1).mT / q.shape[-1] ** 0.5
    if slopes is not None:
        z = z - slopes.cpu().double()[:, None, None] * far.abs()
    if causal:
        z = z.masked_fill(far < 0, -1e9)
    return T.entmax(z, alpha) @ v.repeat_interleave(group, 1), (q, k, v)


@unittest.skipIf(REASON, REASON)
class Attention(unittest.TestCase):
    def inputs(self, dtype=torch.float32, s=200, n=200, d=32, heads=4, kv_heads=2):
        return [randn(2, h, rows, d, scale=1.5, grad=True, dtype=dtype, seed=seed)
                for seed, (h, rows) in enumerate(((heads, s), (kv_heads, n), (kv_heads, n)))]

    def near(self, got, want, dtype):
        """Relative L2: f32 sums of a few hundred terms; 16 bits: results, weights and gradients are rounded to 8 or 11 bits."""
        limit = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        self.assertTrue(got.is_cuda)
        error = (got.detach().cpu().double() - want.detach()).norm() / want.detach().norm()
        self.assertLess(error.item(), limit)

    def test_against_the_dense_formula(self):
        slopes = torch.tensor([0, 0.5, 0.25, 1], device="cuda")
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for alpha in (1.0, 1.5, 2.0, 1.3):
                for s, n, d, bias in ((200, 200, 64, None), (65, 300, 80, slopes), (1, 77, 32, slopes)):
                    q, k, v = self.inputs(dtype, s, n, d)
                    d_o = randn(*q.shape, dtype=dtype, seed=9)
                    o = T.attention(q, k, v, is_causal=True, alpha=alpha, alibi_slopes=bias)
                    self.assertEqual(o.dtype, dtype)
                    want, exact = dense(q, k, v, alpha, bias)
                    self.near(o, want, dtype)
                    got = torch.autograd.grad(o, (q, k, v), d_o)
                    for a, b in zip(got, torch.autograd.grad(want, exact, d_o.cpu().double())):
                        if b.norm() > 0:
                            self.near(a, b, dtype)

    def test_gradient_of_alpha(self):
        q, k, v = self.inputs(s=60, n=60)
        alpha = torch.tensor([1.2, 1.5, 1.7, 1.9], device="cuda", requires_grad=True)
        d_o = randn(*q.shape, seed=9)
        T.attention(q, k, v, is_causal=True, alpha=alpha).backward(d_o)
        parts = [t.detach().cpu().double() for t in (q, k, v)]
        other = alpha.detach().cpu().double().requires_grad_()
        T.attention(*parts, is_causal=True, alpha=other).backward(d_o.cpu().double())
        torch.testing.assert_close(alpha.grad.cpu().double(), other.grad, rtol=1e-3, atol=1e-3)

    def test_packed(self):
        q, k, v = (randn(150, h, 32, grad=True, seed=h) for h in (4, 2, 2))
        cu = torch.tensor([0, 40, 41, 130], device="cuda")
        o = T.attention(q, k, v, is_causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
        d_o = randn(*o.shape, seed=9)
        got = torch.autograd.grad(o, (q, k, v), d_o)
        cpu = [t.detach().cpu().double().requires_grad_() for t in (q, k, v)]
        want = T.attention(*cpu, is_causal=True, cu_seqlens_q=cu.cpu(), cu_seqlens_k=cu.cpu())
        self.near(o, want, torch.float32)
        self.assertEqual(o[130:].abs().sum().item(), 0)
        for a, b in zip(got, torch.autograd.grad(want, cpu, d_o.cpu().double())):
            self.near(a, b, torch.float32)

    def test_autocast_dtypes(self):
        """What layers under autocast hand over: 16-bit keys with 16-bit or f32 queries."""
        layer = torch.nn.Linear(64, 3 * 64, device="cuda")
        x = randn(2, 100, 64)
        with torch.autocast("cuda", torch.bfloat16):
            q, k, v = layer(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
            o = T.attention(q, k, v, is_causal=True)
        self.assertEqual(o.dtype, torch.bfloat16)
        o.float().square().sum().backward()
        self.assertTrue(layer.weight.grad.isfinite().all())
        mixed = T.attention(q.detach().float(), k, v, is_causal=True)
        self.assertEqual(mixed.dtype, torch.float32)
        self.near(mixed, dense(q, k, v, 1.5)[0], torch.bfloat16)

    def test_one_sequence_takes_the_kernels_of_two(self):
        """A dimension of one element has any stride; it is no reason for slower kernels."""
        def kernels(batch, heads):
            q, k, v = (randn(batch, heads, 512, 64, grad=True, dtype=torch.bfloat16, seed=s) for s in range(3))
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                T.attention(q, k, v, is_causal=True).sum().backward()
                torch.cuda.synchronize()
            return {event.key for event in profile.key_averages() if "emxi_cuda_attn" in event.key}

        want = kernels(2, 4)
        self.assertTrue(want)
        for batch, heads in ((1, 4), (2, 1), (1, 1)):
            self.assertEqual(kernels(batch, heads), want)

    def test_captured_graph_and_stream(self):
        q, k, v = self.inputs(torch.bfloat16)

        def step():
            return torch.autograd.grad(T.attention(q * 1, k, v, is_causal=True).float().square().sum(), (q, k, v))
        graph, got = captured(step)
        for seed in range(3):
            with torch.no_grad():
                q.copy_(randn(*q.shape, seed=20 + seed))
            graph.replay()
            for a, b in zip(got, step()):
                self.assertTrue(torch.equal(a, b))

    def test_compiled(self):
        q, k, v = self.inputs(torch.bfloat16)

        def f(q, k, v):
            return T.attention(q * 2, k, v, is_causal=True).float().square().sum()
        want = torch.autograd.grad(f(q, k, v), (q, k, v))
        for mode in ("default", "reduce-overhead"):
            compiled = torch.compile(f, fullgraph=True, mode=mode)
            for _ in range(3):
                got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
            for a, b in zip(got, want):
                self.near(a, b.cpu().double(), torch.bfloat16)

    def test_refusals(self):
        q, k, v = self.inputs()
        for call, sentence in ((lambda: T.attention(q.double(), k.double(), v.double()), "f64 runs on the CPU"),
                               (lambda: T.attention(q, k, v, alpha=3.0), "up to 4")):
            with self.assertRaisesRegex(L.UnsupportedError, sentence):
                call()


@unittest.skipIf(REASON, REASON)
class Streams(unittest.TestCase):
    def test_current_stream(self):
        """Work is ordered with what torch enqueues on the same stream, and nothing waits for another one."""
        side = torch.cuda.Stream()
        for _ in range(20):
            with torch.cuda.stream(side):
                x = torch.zeros(64, 50000, device="cuda")
                for i in range(5):
                    x = x + i  # the map would see less if it ran before these
                x[:, 7] += 100
                p = T.entmax15(x)
                total = p.sum()
            side.synchronize()
            self.assertEqual((total.item(), p[:, 7].min().item()), (64, 1))

    def test_no_wait(self):
        x = randn(64, 4096, grad=True)
        target = torch.zeros(64, dtype=torch.int64, device="cuda")
        T.Entmax15Loss()(x, target)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            T.Entmax15Loss()(x, target).backward()
            T.entmax15(x).square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_captured_graph(self):
        x, target = randn(16, 3000, grad=True), torch.arange(16, device="cuda")

        def step():
            x.grad = None
            loss = T.Entmax15Loss()(x, target) + T.entmax15(x).square().mean()
            loss.backward()
            return loss
        graph, loss = captured(step)
        grad = x.grad
        for seed in range(1, 4):
            with torch.no_grad():
                x.copy_(randn(16, 3000, seed=seed, scale=seed))
            graph.replay()
            got = loss.item(), grad.clone()
            want = step()
            self.assertEqual(got[0], want.item())
            self.assertTrue(torch.equal(got[1], x.grad))

    def test_compiled(self):
        x, target = randn(6, 2000, grad=True), torch.arange(6, device="cuda")

        def f(x):
            return T.entmax15(x * 2).square().sum() + T.Entmax15Loss()(x + 1, target)
        want = f(x)
        a, = torch.autograd.grad(want, x)
        for mode in ("default", "reduce-overhead"):
            compiled = torch.compile(f, fullgraph=True, mode=mode)
            for _ in range(3):
                got = compiled(x)
                b, = torch.autograd.grad(got, x)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(b, a)


if __name__ == "__main__":
    unittest.main()
