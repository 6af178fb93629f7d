# SPDX-License-Identifier: Apache-2.0
"""libentmax in Hugging Face transformers.

    import libentmax.transformers
    libentmax.transformers.register()
    config.entmax_alpha = 1.5
    model = AutoModelForCausalLM.from_config(config, attn_implementation="entmax")
    cache = libentmax.transformers.EntmaxCache(model.config, max_tokens=4096, select="certified")
    model.generate(**inputs, past_key_values=cache)

register() makes "entmax" an attention implementation of every model whose layers take theirs from AttentionInterface, and
AutoConfig and AutoModelForCausalLM open the folders that `emx train` writes (model_type "libentmax"). Importing this module needs
neither transformers nor torch; using a name of it does. Tensors are on the CPU.
"""
import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

_HOME = {
    "_attention": ("entmax_attention", "entmax_mask"),
    "_cache": ("EntmaxCache", "StepReport"),
    "_model": ("LibentmaxConfig", "LibentmaxForCausalLM"),
    "_register": ("register",),
}
_FILES = {name: file for file, names in _HOME.items() for name in names}
__all__ = sorted(_FILES)

if _TYPE_CHECKING:
    from ._attention import entmax_attention, entmax_mask
    from ._cache import EntmaxCache, StepReport
    from ._model import LibentmaxConfig, LibentmaxForCausalLM
    from ._register import register


def __getattr__(name):
    if name not in _FILES:
        raise AttributeError(f"module 'libentmax.transformers' has no attribute '{name}'")
    try:
        value = getattr(_importlib.import_module("." + _FILES[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "torch", "transformers.masking_utils"):
            raise
        if error.name == "transformers.masking_utils":
            raise ImportError("libentmax.transformers needs transformers 4.56 or later; the installed one is older") from None
        raise ImportError(f"libentmax.transformers.{name} needs {error.name}, which is not installed: pip install {error.name}"
                          ) from None
    globals()[name] = value
    return value


def __dir__():
    return __all__
