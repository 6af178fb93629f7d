# SPDX-License-Identifier: Apache-2.0
"""Pages of supports: what they hold, byte for byte what `emx inspect` writes for the same run, and what cannot be written."""
import base64
import json
import os
import re
import struct
import subprocess
import tempfile
import unittest
from pathlib import Path

import numpy as np

import libentmax as L

MODELS = Path(__file__).resolve().parents[2] / "models"
PROMPT = "In the beginning God created the heaven and the earth. And the earth was without form, and "


def parts(path):
    """(head, rows) of a page."""
    text = Path(path).read_text(encoding="utf-8")
    head = json.loads(re.search(r'id="head">(.*?)</script>', text, re.S).group(1))
    return head, base64.b64decode(re.search(r'id="rows">(.*?)</script>', text, re.S).group(1))


def lists(rows, count):
    """[(size, flags, tau, delta_bound, positions, weights in 1/65535)], read byte by byte."""
    at, out = 0, []

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = rows[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    for _ in range(count):
        size, kept, flags = varint(), varint(), rows[at]
        tau, delta = struct.unpack_from("<ff", rows, at + 1)
        at += 9
        positions, weights, position = [], [], 0
        for _ in range(kept):
            position += varint()
            positions.append(position)
            weights.append(struct.unpack_from("<H", rows, at)[0])
            at += 2
        out.append((size, flags, tau, delta, positions, weights))
    assert at == len(rows)
    return out


class Plot(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.page = self.folder / "page.html"

    def test_contents(self):
        model = L.load_model(MODELS / "text-entmax")
        made = model.generate(PROMPT, 5, return_support=True, queries=3)
        size = L.plot.generated(self.page, model, PROMPT, made, source="Genesis")
        self.assertEqual(size, self.page.stat().st_size)
        head, rows = parts(self.page)
        self.assertEqual(base64.b64decode(head["bytes"]), PROMPT.encode() + made.text)
        self.assertEqual((head["steps"], head["prompt"], head["tokens"]),
                         ([s.position for s in made.steps], len(PROMPT), len(PROMPT) + 5))
        held = lists(rows, 7 * model.config.num_layers * model.config.num_heads)
        flat = [(s.support[row], s.reports[row]) for s in made.steps for row in np.ndindex(s.support.shape)]
        for (support, report), (n, flags, tau, delta, positions, weights) in zip(flat, held):
            self.assertEqual((n, positions), (support.positions.size, support.positions.tolist()))
            self.assertEqual((flags, tau, delta), (report["flags"], np.float32(support.tau), report["delta_bound"]))
            np.testing.assert_allclose(np.array(weights) / 65535, support.weights, rtol=0, atol=1.01 / 65535)
        text = self.page.read_text(encoding="utf-8")
        self.assertFalse(re.search(r"https?://|<link|src=|@import|url\(", text))  # nothing from elsewhere

    def test_same_as_the_tool(self):
        tool = os.environ.get("EMX")
        if not tool:
            self.skipTest("EMX is not set")
        numbers = "5502 4995 4814 5500 185 2204 5500 1207 1375 5500 2639 185 5500 5505 4995"
        for name, prompt, options in (("text-entmax", PROMPT, ["--keep", "6"]), ("text-softmax", PROMPT * 3, ["--keep", "40"]),
                                      ("retrieval-entmax", numbers, ["--select", "topk", "--budget", "16"])):
            other = self.folder / "tool.html"
            subprocess.run([tool, "inspect", "-m", str(MODELS / name), "-p", prompt, "-n", "4", "--queries", "6", "-o", str(other)] +
                           options, check=True, capture_output=True)
            model = L.load_model(MODELS / name)
            tokens = [int(t) for t in prompt.split()] if model.config.task else prompt
            select = {"select": "topk", "budget": 16} if "topk" in options else {}
            select["summaries"] = "minmax,moments"  # the tool's; with sketches the bounds would be better ones
            made = model.generate(tokens, 4, return_support=True, queries=6, **select)
            L.plot.generated(self.page, model, tokens, made, keep=int(options[1]) if options[0] == "--keep" else 1024)
            ours, theirs = parts(self.page), parts(other)
            self.assertEqual(ours[1], theirs[1])
            for key in ("version", "layers", "heads", "tokens", "prompt", "keep", "steps", "alpha"):
                self.assertEqual(ours[0][key], theirs[0][key])
            self.assertEqual(ours[0].get("bytes"), theirs[0].get("bytes"))

    def test_cache(self):
        rng = np.random.default_rng(1)
        cache, seq = L.KVCache(2, 16, 200), None
        seq = cache.new()
        steps, labels = [], [f"</script>@ROWS@ {i}" for i in range(40)]
        for position in range(40):
            k, v = rng.standard_normal((2, 1, 2, 1, 16)).astype(np.float32)
            q = rng.standard_normal((1, 4, 1, 16)).astype(np.float32)
            layers = [cache.decode(seq, q, k, v, return_support=True), cache.decode(seq, 2 * q, alpha=1.0, return_support=True)]
            steps.append(L.plot.step(position, layers))
        L.plot.write(self.page, steps, labels, model="cache", keep=10)
        head, rows = parts(self.page)
        self.assertEqual((head["labels"], head["layers"], head["heads"]), (labels, 2, 4))
        held = lists(rows, 40 * 8)
        self.assertEqual((held[-1][0], len(held[-1][4]), held[-5][0]), (40, 10, steps[-1].support[0, 3].positions.size))
        heaviest = np.sort(np.argsort(-steps[-1].support[1, 3].weights)[:10])
        self.assertEqual(held[-1][4], heaviest.tolist())

    def test_errors(self):
        support = np.empty((1, 1), object)
        report = np.zeros((1, 1), L._cache.REPORT)

        def write(positions=(0, 3), position=3, tokens="abcd", path=self.page, count=1, **options):
            support[0, 0] = L.Support(np.array(positions), np.full(len(positions), 0.5, np.float32), 0.0)
            return L.plot.write(path, [L.Step(position, support, report)] * count, tokens, **options)

        self.assertGreater(write(), 1000)
        before = self.page.read_bytes()
        for call in (lambda: write(positions=(3, 0)), lambda: write(positions=(0, 4)), lambda: write(position=4), lambda: write(count=0),
                     lambda: write(count=2), lambda: write(keep=0), lambda: L.plot.step(0, [])):
            with self.assertRaises(L.Error):
                call()
        with self.assertRaises(OSError):
            write(path=self.folder / "nowhere" / "page.html")
        with self.assertRaises(OSError):
            write(path=self.folder)
        self.assertEqual(self.page.read_bytes(), before)
        self.assertEqual(os.listdir(self.folder), ["page.html"])  # and nothing half-written beside it


if __name__ == "__main__":
    unittest.main()
