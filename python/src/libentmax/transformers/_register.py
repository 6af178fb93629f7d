# SPDX-License-Identifier: Apache-2.0
"""Makes the names known to transformers."""
from __future__ import annotations

import transformers
from transformers.masking_utils import AttentionMaskInterface

from ._attention import entmax_attention, entmax_mask
from ._model import LibentmaxConfig, LibentmaxForCausalLM


def register() -> None:
    """Registers, for this process: the attention and mask functions under "entmax" (attn_implementation="entmax"; alpha is
    config.entmax_alpha, a number or a list of one a query head, and its absence an error), and the classes of model_type
    "libentmax" with AutoConfig and AutoModelForCausalLM. May be called again.
    """
    transformers.AttentionInterface.register("entmax", entmax_attention)
    AttentionMaskInterface.register("entmax", entmax_mask)
    transformers.AutoConfig.register("libentmax", LibentmaxConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(LibentmaxConfig, LibentmaxForCausalLM, exist_ok=True)
