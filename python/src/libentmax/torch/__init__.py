# SPDX-License-Identifier: Apache-2.0
"""libentmax on PyTorch tensors: the names and signatures of the `entmax` package, entmax attention, and the paged KV cache.

    from libentmax.torch import entmax15, sparsemax, entmax_bisect, Entmax15Loss, attention, KVCache

Importing this module needs no torch; using a name of it does. With torch 2.4 or later every function is a registered operator
(torch.ops.libentmax), which torch.compile(fullgraph=True) and torch.export take as one node; with older ones, from 1.13 on, it is
an autograd.Function. The arithmetic is the C library's either way, with as many threads as torch.get_num_threads() says.

Tensors are float32, float64, float16 or bfloat16, computed in float32 or better and rounded once. What lies in rows with a
contiguous last dimension is read in place, anything else (an expanded or transposed tensor) is copied first. The
maps but normmax can be differentiated twice by their scores; other second derivatives are an error. Errors are the exceptions of
libentmax, with the library's sentence.

Tensors are on the CPU or, where the library was built with CUDA, on a GPU (attention there is not tested yet; no float64, alpha
to 2). There work goes to torch's current stream and nothing waits for it; there is one context a device. It is made by the first
call, which must not be inside a captured graph; later calls may. A bad target or alpha in device memory gives NaN in its row or
head, and synchronize() raises it.

What differs from the entmax package: thresholds are exact, so n_iter, k and ensure_sum_one change nothing; alpha is 1 to 4
(normmax: to 1000; there also below 1, where nothing is sparse, and above) and a budget above 0; a target of -100 does not
count; losses of 16-bit scores are float32; an alpha of normmax or a budget that wants a gradient is an error, not ignored.
"""
import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

_HOME = {
    "_maps": ("entmax", "entmax15", "sparsemax", "entmax_bisect", "sparsemax_bisect", "normmax_bisect", "budget_bisect",
              "Entmax15", "Sparsemax", "EntmaxBisect", "SparsemaxBisect", "NormmaxBisect", "BudgetBisect"),
    "_losses": ("entmax15_loss", "sparsemax_loss", "entmax_bisect_loss", "sparsemax_bisect_loss", "normmax_bisect_loss",
                "Entmax15Loss", "SparsemaxLoss", "EntmaxBisectLoss", "SparsemaxBisectLoss", "NormmaxBisectLoss"),
    "_attention": ("attention",),
    "_cache": ("KVCache", "Tables", "Decoded", "DecodedSupport", "Reports", "Selection"),
    "_core": ("synchronize",),
}
_FILES = {name: file for file, names in _HOME.items() for name in names}
__all__ = sorted(_FILES)

if _TYPE_CHECKING:
    from ._attention import *
    from ._cache import *
    from ._core import synchronize as synchronize
    from ._losses import *
    from ._maps import *


def __getattr__(name):
    if name not in _FILES:
        raise AttributeError(f"module 'libentmax.torch' has no attribute '{name}'")
    try:
        value = getattr(_importlib.import_module("." + _FILES[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"libentmax.torch.{name} needs PyTorch, which is not installed: pip install torch, or apt-get install "
                          "python3-torch") from None
    globals()[name] = value
    return value


def __dir__():
    return __all__
