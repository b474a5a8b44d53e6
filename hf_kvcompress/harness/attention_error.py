"""How far each layer's attention output moves when it reads a compressed prompt, all else being equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from ..enable import watching
from ..scoring.replay import Prompt, attend
from ..watching import AttentionCall


class AttentionProbe:
    """A prompt and the pass after it, recorded once from the uncompressed model.

    Every layer is shown the exact queries, keys and values, so errors of earlier layers do not add up.

    Args:
        prompt: what a cache is shown: all but its last token.
        ids: `[1, q]`, the pass whose outputs are compared; it begins with the prompt's last token.
    """

    @torch.inference_mode()
    def __init__(self, prompt: Prompt, ids: torch.Tensor):
        if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise ValueError(f"ids: expected [1, q] with at least one token, got {tuple(ids.shape)}")
        self.prompt, model = prompt, prompt.model
        cache = prompt.into(DynamicCache(config=model.config))
        self.calls: list[AttentionCall] = []
        with watching(model, self.calls.append):
            model.base_model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
        exact = prompt.into(DynamicCache(config=model.config))
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
