# SPDX-License-Identifier: Apache-2.0
"""Generation from a shipped model: the same tokens with a selector that certifies itself, and as `emx generate` gives."""
import os
import subprocess
import unittest
from pathlib import Path

import numpy as np

import libentmax as L

FOLDER = Path(__file__).resolve().parents[2] / "models" / "text-entmax"
PROMPT = "In the beginning "


class Generate(unittest.TestCase):
    def test_tokens(self):
        model = L.load_model(FOLDER)
        dense = model.generate(PROMPT, 24)
        certified = model.generate(PROMPT.encode(), 24, select="certified")
        self.assertEqual(certified.text, dense.text)
        self.assertEqual((certified.stats["certified"], certified.stats["tokens"]), (certified.stats["rows"], 23))
        self.assertGreater(certified.stats["rows"], 0)
        self.assertEqual(bytes(model.generate(list(PROMPT.encode()), 24).tokens.tolist()), dense.text)
        warm = [model.generate(PROMPT, 16, temperature=1.0, seed=s).text for s in (1, 1, 2)]
        self.assertEqual(warm[0], warm[1])
        self.assertNotEqual(warm[0], warm[2])
        tool = os.environ.get("EMX")
        if tool:
            said = subprocess.run([tool, "generate", "-m", str(FOLDER), "-p", PROMPT, "-n", "24", "--temp", "0"], check=True,
                                  capture_output=True).stdout
            self.assertIn(dense.text, said)

    def test_support(self):
        """Steps for the last tokens of the prompt and all that are read after it; the text is the same as without."""
        model = L.load_model(FOLDER)
        plain = model.generate(PROMPT, 6)
        got = model.generate(PROMPT, 6, return_support=True, queries=3)
        self.assertEqual(got.text, plain.text)
        n = len(PROMPT)
        self.assertEqual([s.position for s in got.steps], list(range(n - 3, n + 5)))
        layers, heads = model.config.num_layers, model.config.num_heads
        for step in got.steps:
            self.assertEqual(step.support.shape, (layers, heads))
            for (l, h), support in np.ndenumerate(step.support):
                self.assertEqual(support.positions.size, step.reports["support"][l, h])
                self.assertTrue((np.diff(support.positions) > 0).all() and support.positions[-1] <= step.position)
                self.assertAlmostEqual(float(support.weights.sum()), 1, delta=1e-5)
        self.assertEqual(len(model.generate(PROMPT, 0, return_support=True, queries=n).steps), n)  # nothing is prefilled
        self.assertEqual(model.generate(PROMPT, 6, return_support=True, queries=0).steps[0].position, n)

    def test_errors(self):
        model = L.load_model(FOLDER)
        for call, error in ((lambda: L.load_model("/nowhere"), L.FileError), (lambda: model.generate(""), L.InvalidError),
                            (lambda: model.generate([300]), L.InvalidError), (lambda: model.generate([1.5]), L.DtypeError),
                            (lambda: model.generate("a", return_support=True, queries=2), L.InvalidError),
                            (lambda: model.generate("a", select="best"), L.InvalidError),
                            (lambda: model.generate("a", summaries="", select="certified"), L.StateError)):
            with self.assertRaises(error):
                call()


if __name__ == "__main__":
    unittest.main()
