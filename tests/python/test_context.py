# SPDX-License-Identifier: Apache-2.0
"""Contexts: threads, forks, Ctrl-C, and a library that is not the right one."""
import asyncio
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

import numpy as np

import libentmax as L
from libentmax import _c

X = np.random.default_rng(1).standard_normal((64, 1000))


def long_call(ctx):
    """One call of a few seconds: equal scores, whose solve touches every score of a row again and again."""
    L.normmax(LONG, 1.3, ctx=ctx)


LONG = np.zeros((3000, 20000), np.float32)


class Contexts(unittest.TestCase):
    def test_threads_and_isa(self):
        ctx = L.Context(threads=3)
        self.assertEqual(ctx.threads, 3)
        self.assertIn(ctx.isa, ("scalar", "avx2", "avx512"))
        np.testing.assert_array_equal(L.entmax(X, ctx=ctx), L.entmax(X, ctx=L.Context(1)))
        with self.assertRaisesRegex(L.InvalidError, "threads"):
            L.Context(threads=-1)

    def test_cancel_until_resumed(self):
        ctx = L.Context(1)
        ctx.cancel()
        with self.assertRaises(L.Cancelled) as caught:
            L.entmax(X, ctx=ctx)
        self.assertEqual(caught.exception.status_name, "EMX_ERR_CANCELLED")
        ctx.resume()
        L.entmax(X, ctx=ctx)

    def test_errors_survive_pickling(self):
        try:
            L.entmax(X, 7.0)
        except L.Error as error:
            again = pickle.loads(pickle.dumps(error))
            self.assertEqual((type(again), str(again), again.status), (type(error), str(error), error.status))

    def test_two_threads_on_one_context(self):
        want, wrong = L.entmax(X), []

        def work():
            for _ in range(50):
                if not np.array_equal(L.entmax(X), want):
                    wrong.append(1)
        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.assertEqual(wrong, [])

    def test_forked_worker(self):
        want = L.entmax(X)  # the default context has its threads now
        held, done = threading.Event(), threading.Event()

        def hold():  # as a thread in a long call does
            with _c.context().lock:
                held.set()
                done.wait()
        threading.Thread(target=hold).start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # a lock that nobody opens
            try:
                os._exit(0 if np.array_equal(L.entmax(X), want) else 3)
            except BaseException:
                os._exit(4)
        done.set()
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
        np.testing.assert_array_equal(L.entmax(X), want)

    def interrupt(self, ctx):
        """Sends SIGINT a little after a long call began, and returns the time that it took to end."""
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        start = time.monotonic()
        try:
            long_call(ctx)
        finally:
            timer.join()
            self.seconds = time.monotonic() - start

    def test_ctrl_c_ends_a_call(self):
        ctx = L.Context(1)
        start = time.monotonic()
        L.normmax(LONG[:100], 1.3, ctx=ctx)
        whole = (time.monotonic() - start) * len(LONG) / 100
        with self.assertRaises(KeyboardInterrupt):
            self.interrupt(ctx)
        self.assertLess(self.seconds, 0.1 + whole / 2)
        np.testing.assert_array_equal(L.entmax(X, ctx=ctx), L.entmax(X))  # the context is not left cancelled

    def test_handler_that_does_not_raise(self):
        seen = []
        old = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        try:
            with self.assertRaises(L.Cancelled):
                self.interrupt(L.Context(1))
        finally:
            signal.signal(signal.SIGINT, old)
        self.assertEqual(seen, [1])

    def test_ignored_sigint(self):
        old = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            L.entmax(X)
        finally:
            signal.signal(signal.SIGINT, old)

    def test_event_loop_keeps_its_signals(self):
        """A signal that arrives while the main thread is in a call reaches the loop that owns the wakeup descriptor."""
        async def main():
            seen = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, seen.set)
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            x = np.zeros((400, 20000), np.float32)
            while timer.is_alive():
                L.entmax(x)
            await asyncio.wait_for(seen.wait(), 5)
        asyncio.run(main())


class Loading(unittest.TestCase):
    def load(self, folder):
        environment = dict(os.environ, LIBENTMAX_LIBRARY=folder)
        return subprocess.run([sys.executable, "-c", "import libentmax"], env=environment, capture_output=True, text=True)

    def test_wrong_libraries(self):
        if (Path(_c.__file__).parent / "_lib").is_dir():
            self.skipTest("the library is bundled")
        self.assertIn("does not exist", self.load("/nowhere/at/all").stderr)
        with tempfile.TemporaryDirectory() as folder:
            self.assertIn("cannot be loaded", self.load(folder).stderr)
            functions = [name for name in _c.CORE if name != "emx_abi_version"]
            for abi, dropped, sentence in ((99, None, "ABI version 99"), (1, functions[-1], f"has no {functions[-1]}")):
                source = "int emx_abi_version(void) { return %d; }\n" % abi
                source += "".join(f"void {f}(void) {{}}\n" for f in functions if f != dropped)
                subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-xc", "-", "-o", folder + "/libentmax.so.1"],
                               input=source, text=True, check=True)
                answer = self.load(folder)
                self.assertIn(sentence, answer.stderr)
                self.assertIn("ImportError", answer.stderr)


if __name__ == "__main__":
    unittest.main()
