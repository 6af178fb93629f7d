# SPDX-License-Identifier: Apache-2.0
"""libentmax: attention whose weights are exactly zero for irrelevant tokens, on NumPy arrays.

Shape letters: B batch, H query heads, G key/value heads, S query tokens, N keys, D head dimension, P page size, M pages.
Errors are exceptions derived from Error, whose text is the sentence of the C library.
"""
from . import plot
from ._attention import attention, attention_backward
from ._c import (Cancelled, Context, DtypeError, Error, FileError, InvalidError, OutOfMemoryError, ShapeError, StateError,
                 UnsupportedError, library_version)
from ._cache import Decoded, DecodedSupport, KVCache, Selection, Summaries, Support
from ._maps import (budget, budget_backward, entmax, entmax15, entmax15_backward, entmax15_loss, entmax_backward, entmax_loss,
                    normmax, normmax_backward, normmax_loss, softmax, softmax_backward, sparsemax, sparsemax_backward,
                    sparsemax_loss)
from ._model import Generated, GeneratedSupport, Model, Step, load_model

__version__ = library_version
__all__ = [name for name in dir() if not name.startswith("_")]
