"""What a prompt's attention was called with, so that it can be shown to any number of caches without the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ..attention import kvcompress_attention
from ..enable import watching
from ..layer import CompressedLayer
from ..watching import AttentionCall
from .oracle import FutureAttention, future_attention


class Prompt:
    """A prompt `[1, T]` that the model reads once; what its layers computed can then be shown to any number of caches.

    Its last token is left to the caller: a cache from `into` has seen all the others, as if they had been prefilled
    through it, and has evicted what it wanted to.
    """

    def __init__(self, model: Any, ids: torch.Tensor):
        self.model, self.ids = model, ids.to(model.device)
        self.calls: list[AttentionCall] = []
        cache = DynamicCache(config=model.config)
        with torch.inference_mode(), watching(model, self.calls.append):
            model.base_model(input_ids=self.ids[:, :-1], past_key_values=cache, use_cache=True)
        self.is_whole = _made_of(cache, self.calls)

    @property
    def last(self) -> torch.Tensor:
        return self.ids[:, -1:]

    @torch.inference_mode()
    def into(self, cache: Any) -> Any:
        """Put all but the last token into an empty cache; returns the cache."""
        self._show(cache)
        return cache

    @torch.inference_mode()
    def through(self, make_cache: Callable[[], Any]) -> Any:
        """A new cache that has read all but the last token.

        Where showing it the calls would not be the same as the model's own pass, the model reads the prompt again: it
        keeps more than keys and values, or the cache gives the prompt's own queries other ones than it got.
        """
        cache = make_cache()
        if self.is_whole and self._show(cache):
            return cache
        cache = make_cache()
        self.model.base_model(input_ids=self.ids[:, :-1], past_key_values=cache, use_cache=True)
        return cache

    def _show(self, cache: Any) -> bool:
        """Whether the calls' own queries were given the keys and values as they are. Layers of ours always do that."""
        exact = True
        for call in self.calls:
            layer = cache.layers[call.layer] if call.layer < len(cache.layers) else None
            if not isinstance(layer, CompressedLayer):
                own = cache.update(call.key, call.value, call.layer)
                exact &= all(map(torch.equal, own, (call.key, call.value)))
            elif layer.is_sliding and layer.config.sliding != "evict":  # its attention tells nobody anything
                cache.update(call.key, call.value, call.layer)
                layer.observe_queries(call.query, call.scaling)
                layer.commit()
            else:
                attend(cache, call)
        return exact

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


def _made_of(cache: Any, calls: Sequence[AttentionCall]) -> bool:
    """Whether a cache holds the keys and values of these calls, one call a layer, and nothing else."""
    if [call.layer for call in calls] != list(range(len(cache.layers))):
        return False
    held = [[getattr(layer, name, None) for name in ("keys", "values")] for layer in cache.layers]
    given = [(call.key, call.value) for call in calls]  # of which a sliding layer keeps the end
    return all(
        isinstance(own, torch.Tensor) and torch.equal(own, right[:, :, right.shape[2] - own.shape[2] :])
        for layer, call in zip(held, given, strict=True)
        for own, right in zip(layer, call, strict=True)
    )
