# SPDX-License-Identifier: Apache-2.0
"""The models of `emx train` as transformers classes: the forward pass of src/model on PyTorch, with gradients."""
from __future__ import annotations

import math
import os
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import _c
from ._attention import alpha_of, attend, check_mask

_LEAST_ALPHA = 1.01  # of a learned alpha, as in src/model/model.h

# Keys of config.json with their defaults, those of emx_model_config_init(); entmax_alpha has none.
_KEYS = {"vocab_size": 256, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
         "num_key_value_heads": 3, "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": True, "hidden_act": "silu", "entmax_alpha": None, "entmax_alpha_learned": False,
         "attn_scale_type": "none", "focal_temperature": 0.4, "focal_learned": False, "position_type": "nape",
         "alibi_num_heads": 3, "alibi_slope_type": "linear", "alibi_slopes": None, "rope_theta": 10000.0, "tokenizer": "byte",
         "task": None}
_NAMES = {"hidden_act": ("silu",), "attn_scale_type": ("none", "ssmax", "asentmax", "focal"),
          "position_type": ("nape", "alibi", "nope", "rope"), "alibi_slope_type": ("linear", "exp", "given")}


class LibentmaxConfig(PretrainedConfig):
    """config.json of a folder that `emx train` wrote; docs/design.md, "Model folder", has the keys."""

    model_type = "libentmax"

    def __init__(self, **kwargs):
        for key, default in _KEYS.items():
            setattr(self, key, kwargs.pop(key, default))
        super().__init__(tie_word_embeddings=self.tie_word_embeddings, **kwargs)

    def check(self) -> None:
        """Raises InvalidError where the keys make no model."""
        alpha = alpha_of(self)
        for key, names in _NAMES.items():
            if getattr(self, key) not in names:
                raise _c.InvalidError(f"config.{key} is {getattr(self, key)!r}; possible: {', '.join(names)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise _c.InvalidError(f"config.num_attention_heads {self.num_attention_heads} is not a multiple of "
                                  f"num_key_value_heads {self.num_key_value_heads}")
        if self.entmax_alpha_learned and not _LEAST_ALPHA < alpha < 2:
            raise _c.InvalidError(f"config.entmax_alpha is {alpha}; a learned alpha starts between {_LEAST_ALPHA} and 2")
        if self.position_type == "nape" and not 0 <= self.alibi_num_heads <= self.num_attention_heads:
            raise _c.InvalidError(f"config.alibi_num_heads is {self.alibi_num_heads} of {self.num_attention_heads} heads")
        if self.alibi_slope_type == "given" and len(self.alibi_slopes or ()) != self.alibi_heads:
            raise _c.InvalidError(f"config.alibi_slopes must be a list of {self.alibi_heads} numbers, one an ALiBi head")
        if self.attn_scale_type != "none" and self.scaled_heads == 0:
            raise _c.InvalidError(f"config.attn_scale_type {self.attn_scale_type} has no head to scale: all have ALiBi")

    @property
    def alibi_heads(self):
        return {"nape": self.alibi_num_heads, "alibi": self.num_attention_heads}.get(self.position_type, 0)

    @property
    def scaled_heads(self):
        """How many heads have theta; they are the last ones."""
        if self.attn_scale_type == "none":
            return 0
        return self.num_attention_heads - (self.alibi_num_heads if self.position_type == "nape" else 0)

    def slopes(self):
        """[H] float32, or None where all are 0."""
        n = self.alibi_heads
        given = {"linear": [1 / (h + 1) for h in range(n)], "exp": [2.0 ** -h for h in range(n)], "given": self.alibi_slopes}
        full = list(given[self.alibi_slope_type][:n] if n else ()) + [0.0] * (self.num_attention_heads - n)
        return torch.tensor(full, dtype=torch.float32) if any(full) else None

    def to_diff_dict(self):
        """With every key that emx asks for, defaults too: emx opens what save_pretrained() writes."""
        out = dict(super().to_diff_dict(), **{key: getattr(self, key) for key in _KEYS})
        return {key: value for key, value in out.items() if value is not None}


class _Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def _linear(inputs, outputs, std=0.02, bias=None):
    """std of the normal weights that training starts with, and the value of every bias; None: it has none."""
    linear = nn.Linear(inputs, outputs, bias=bias is not None)
    linear.start_std, linear.start_bias = std, bias
    return linear


def _residual_std(config):
    """Of a projection onto the residual stream, whose variance then does not depend on the depth (Radford et al. 2019)."""
    return 0.02 / (2 * config.num_hidden_layers) ** 0.5


class _Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        width, d, scaled = config.hidden_size, config.head_dim, config.scaled_heads
        self.q_proj = _linear(width, config.num_attention_heads * d)
        self.k_proj = _linear(width, config.num_key_value_heads * d)
        self.v_proj = _linear(width, config.num_key_value_heads * d)
        self.o_proj = _linear(config.num_attention_heads * d, width, _residual_std(config))
        if config.attn_scale_type == "asentmax":  # softplus(bias) = 0.05: theta starts as 1.05 everywhere
            self.beta_proj = _linear(width, scaled, 0.0, math.log(math.expm1(0.05)))
            self.gamma_proj = _linear(width, scaled, 0.0, 0.0)
        elif config.attn_scale_type == "ssmax":
            self.ssmax_scale = nn.Parameter(torch.empty(scaled))
        elif config.attn_scale_type == "focal" and config.focal_learned:
            self.focal_log_temperature = nn.Parameter(torch.empty(scaled))
        if config.entmax_alpha_learned:
            self.entmax_alpha_logit = nn.Parameter(torch.empty(config.num_attention_heads))

    def start(self):
        """The values that training begins with, of what is in no linear layer (docs/math.md, "Scale and positions")."""
        config = self.config
        if config.attn_scale_type == "ssmax":  # theta is 1 at the end of a training sequence
            nn.init.constant_(self.ssmax_scale, 1 / math.log(1 + config.max_position_embeddings))
        elif config.attn_scale_type == "focal" and config.focal_learned:
            nn.init.constant_(self.focal_log_temperature, math.log(config.focal_temperature))
        if config.entmax_alpha_learned:
            nn.init.constant_(self.entmax_alpha_logit, math.log((config.entmax_alpha - 1) / (2 - config.entmax_alpha)))

    def theta(self, x, positions):
        """[B or 1,S or 1,E] float64, what queries of the last E heads are multiplied by."""
        config = self.config
        if config.attn_scale_type == "focal":
            if config.focal_learned:
                return torch.exp(-self.focal_log_temperature.double())[None, None]
            return torch.tensor(1 / config.focal_temperature, dtype=torch.float64).expand(1, 1, config.scaled_heads)
        log = torch.log(positions.double() + 2)[..., None]
        if config.attn_scale_type == "ssmax":
            return self.ssmax_scale.double() * log
        b = F.linear(x, self.beta_proj.weight).double() + self.beta_proj.bias.double()
        c = F.linear(x, self.gamma_proj.weight).double() + self.gamma_proj.bias.double()
        return 1 + F.softplus(b) * torch.exp(2 * torch.tanh(c) * torch.log(log))

    def turned(self, x, positions):
        """RoPE of [B,heads,S,D]: pairs of i and i + D/2."""
        half = self.config.head_dim // 2
        frequency = self.config.rope_theta ** (torch.arange(half, dtype=torch.float64) / -half)
        angle = (positions.double()[..., None] * frequency)[:, None]
        cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)

    def alpha(self):
        if not self.config.entmax_alpha_learned:
            return alpha_of(self.config)
        return 1 + torch.sigmoid(self.entmax_alpha_logit.double()).clamp(min=_LEAST_ALPHA - 1)

    def forward(self, x, positions, mask, cache):
        config = self.config
        b, s, _ = x.shape
        q, k, v = (project(x).view(b, s, -1, config.head_dim).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        if config.position_type == "rope":
            q, k = self.turned(q, positions), self.turned(k, positions)
        if config.scaled_heads:
            plain = config.num_attention_heads - config.scaled_heads
            theta = self.theta(x, positions).to(q.dtype).transpose(1, 2)[..., None]
            q = torch.cat((q[:, :plain], q[:, plain:] * theta), 1)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        o = attend(q, k, v, mask, self.alpha(), None, True, config.slopes())
        return self.o_proj(o.reshape(b, s, -1))


class _Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, _residual_std(config))

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config, layer)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _Mlp(config)

    def forward(self, x, positions, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), positions, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = _Norm(config.hidden_size, config.rms_norm_eps)


class LibentmaxForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of `emx train`, with gradients. from_pretrained(folder) computes in float32 like emx, whatever the file holds,
    unless dtype= says otherwise; emx and libentmax.load_model open what save_pretrained(folder) writes.

    Tokens are bytes where config.vocab_size is 256 (config.tokenizer "byte"), else those of a synthetic task; there is no
    tokenizer class. generate() works with a DynamicCache (every step dense) and with EntmaxCache.
    Errors: InvalidError (no entmax_alpha, a configuration that makes no model), FileError (tensors missing or too many).
    """

    config_class = LibentmaxConfig
    base_model_prefix = "model"
    _no_split_modules = ["_Block"]

    def __init__(self, config):
        config.check()
        super().__init__(config)
        self.model = _Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else _linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.start_std)
            if module.bias is not None:
                nn.init.constant_(module.bias, module.start_bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, _Norm):
            nn.init.ones_(module.weight)
        elif isinstance(module, _Attention):
            module.start()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = cls._read(pretrained_model_name_or_path, args, dict(kwargs, output_loading_info=True))
        wrong = [f"{key} is missing" for key in sorted(info["missing_keys"])]
        wrong += [f"config.json implies no tensor named {key}" for key in sorted(info["unexpected_keys"])]
        if wrong:
            raise _c.FileError(f"{pretrained_model_name_or_path}: {wrong[0]}" +
                               (f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""))
        return (model, info) if wants_info else model

    @classmethod
    def _read(cls, folder, args, kwargs):
        """transformers 4 does not open a safetensors file that does not say it is PyTorch's: its tensors are handed over."""
        path = os.path.join(folder, "model.safetensors") if folder is not None and "state_dict" not in kwargs else ""
        if os.path.isfile(path):
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") is None:
                    kwargs["state_dict"] = {name: file.get_tensor(name) for name in file.keys()}
                    kwargs.setdefault("config", LibentmaxConfig.from_pretrained(folder))
                    folder = None
        return super().from_pretrained(folder, *args, **kwargs)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                use_cache: bool | None = None, output_attentions: bool | None = None, output_hidden_states: bool | None = None,
                return_dict: bool | None = None, logits_to_keep: int | Tensor = 0,
                **kwargs: Any) -> CausalLMOutputWithPast | tuple:
        """CausalLMOutputWithPast of input_ids [B,S] or inputs_embeds [B,S,W]: logits [B,S,V], loss where there are labels [B,S]
        (shifted here; -100 is left out). attention_mask: padding [B,N], N counting what the cache holds. Positions, where they
        are not given, count the tokens that are not padding."""
        if output_attentions:
            raise _c.UnsupportedError("the weights of attention are not kept; output_attentions must be False")
        if (input_ids is None) == (inputs_embeds is None):
            raise _c.InvalidError("either input_ids or inputs_embeds is needed, not both")
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        check_mask(attention_mask)
        mask = None if attention_mask is None or attention_mask.all() else attention_mask.to(torch.bool)
        s = x.shape[1]
        if position_ids is None:
            every = torch.arange(before + s)[None] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
            position_ids = every[:, before:]
        states = []
        for block in self.model.layers:
            states.append(x)
            x = block(x, position_ids, mask, past_key_values)
        x = self.model.norm(x)
        states.append(x)
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        logits = F.linear(x[:, logits_to_keep], (self.lm_head or self.model.embed_tokens).weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values,
                                     hidden_states=tuple(states) if output_hidden_states else None)
        return out.to_tuple() if return_dict is False else out
