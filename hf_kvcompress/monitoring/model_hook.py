"""Seeing the queries of a model that runs under plain sdpa: the same attention by another name, for a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..watching import show

NAME, PLAIN = "kvcompress-monitor", "sdpa"
_watched: dict[int, list[Any]] = {}  # id of a config -> the config, and how many watch it


def _shown_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    show(module, query, key, value, attention_mask, scaling, kwargs)
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return found


@contextmanager
def queries_shown(model: PreTrainedModel) -> Iterator[bool]:
    """Let whoever looks on see the model's sdpa attention; it computes what it did. False if it runs under another."""
    AttentionInterface.register(NAME, _shown_sdpa)  # not on import: that changes nothing but our own name
    AttentionMaskInterface.register(NAME, sdpa_mask)
    modules = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m._can_set_attn_implementation()]
    configs = {id(m.config): m.config for m in modules if m.config._attn_implementation_internal in (PLAIN, NAME)}
    for key, config in configs.items():
        config._attn_implementation_internal = NAME
        _watched.setdefault(key, [config, 0])[1] += 1
    try:
        yield bool(configs)
    finally:
        for key, config in configs.items():
            _watched[key][1] -= 1
            if _watched[key][1] == 0:
                del _watched[key]
                if config._attn_implementation_internal == NAME:
                    config._attn_implementation_internal = PLAIN
