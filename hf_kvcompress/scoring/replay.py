"""What a prompt's attention was called with, so that it can be shown to any number of caches without the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ..attention import kvcompress_attention
from ..layer import CompressedLayer
from .oracle import AttentionCall, FutureAttention, future_attention, watching


class Prompt:
    """A prompt `[1, T]` that the model reads once; what its layers computed can then be shown to any number of caches.

    Its last token is left to the caller: a cache from `into` has seen all the others, as if they had been prefilled
    through it, and has evicted what it wanted to.
    """

    def __init__(self, model: Any, ids: torch.Tensor):
        self.model, self.ids = model, ids.to(model.device)
        self.calls: list[AttentionCall] = []
        with torch.inference_mode(), watching(model, self.calls.append):
            model.base_model(
                input_ids=self.ids[:, :-1], past_key_values=DynamicCache(config=model.config), use_cache=True
            )

    @property
    def last(self) -> torch.Tensor:
        return self.ids[:, -1:]

    @torch.inference_mode()
    def into(self, cache: Any) -> Any:
        """Put all but the last token into an empty cache; returns the cache."""
        for call in self.calls:
            layer = cache.layers[call.layer] if call.layer < len(cache.layers) else None
            if not isinstance(layer, CompressedLayer):
                cache.update(call.key, call.value, call.layer)
            elif layer.is_sliding and layer.config.sliding != "evict":  # its attention tells nobody anything
                cache.update(call.key, call.value, call.layer)
                layer.observe_queries(call.query, call.scaling)
                layer.commit()
            else:
                attend(cache, call)
        return cache

    @torch.inference_mode()
    def future(self, texts: Sequence[torch.Tensor], step: int = 32) -> FutureAttention:
        """Attention that texts `[1, q]` which follow the prompt, each in a way of its own, pay to what comes before."""
        cache = self.into(DynamicCache(config=self.model.config))
        self.model.base_model(input_ids=self.last, past_key_values=cache, use_cache=True)
        return future_attention(self.model, cache, texts, step)


@torch.inference_mode()
def attend(cache: Any, call: AttentionCall) -> torch.Tensor:
    """Put one layer's keys and values into a cache and attend to it: the output `[B, q, Hq, D]`."""
    keys, values = cache.update(call.key, call.value, call.layer)
    return kvcompress_attention(call.module, call.query, keys, values, call.mask, scaling=call.scaling, **call.extras)[
        0
    ]
