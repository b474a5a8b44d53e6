"""How far each layer's attention output moves when it reads a compressed prompt, all else being equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from ..scoring.oracle import AttentionCall, watching
from ..scoring.replay import Prompt, attend


class AttentionProbe:
    """A prompt and the pass after it, recorded once from the uncompressed model.

    Every layer is shown the exact queries, keys and values, so errors of earlier layers do not add up.

    Args:
        ids: `[1, T]`.
        prompt_length: tokens of the prompt; the others are the pass whose outputs are compared.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, ids: torch.Tensor, prompt_length: int):
        if ids.ndim != 2 or ids.shape[0] != 1 or not 1 <= prompt_length < ids.shape[1]:
            expected = f"1 to {ids.shape[-1] - 1} for ids of shape {tuple(ids.shape)}"
            raise ValueError(f"prompt_length: expected {expected}, got {prompt_length}")
        ids = ids.to(model.device)
        self.prompt = Prompt(model, ids[:, : prompt_length + 1])  # all but its last token is shown to a cache
        cache = self.prompt.into(DynamicCache(config=model.config))
        self.calls: list[AttentionCall] = []
        with watching(model, self.calls.append):
            model.base_model(input_ids=ids[:, prompt_length:], past_key_values=cache, use_cache=True)
        exact = self.prompt.into(DynamicCache(config=model.config))
        self.exact = {call.layer: attend(exact, self._new(call)) for call in self.calls}

    def _new(self, call: AttentionCall) -> AttentionCall:
        """The call with the keys and values of its own pass only, as a cache is given them."""
        q = call.query.shape[2]
        return replace(call, key=call.key[:, :, -q:], value=call.value[:, :, -q:])

    @torch.inference_mode()
    def errors(self, make_cache: Callable[[], Any]) -> dict[int, float]:
        """Relative error of each layer's output: |a - exact| / |exact|."""
        cache = self.prompt.into(make_cache())
        found = {}
        for call in self.calls:
            exact = self.exact[call.layer].float()
            found[call.layer] = ((attend(cache, self._new(call)).float() - exact).norm() / exact.norm()).item()
        return found
