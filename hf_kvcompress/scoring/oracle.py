"""The bound above all policies: tokens are scored with the attention that the coming queries really pay.

The text is read once through an uncompressed cache and each token's attention from every later pass is noted;
`OraclePolicy` then scores with what is still to come. It knows the future, so it is a yardstick and no strategy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import DynamicCache, PreTrainedModel

from ..enable import watching
from ..handles import source_of
from ..masks import MaskPlan
from ..policies.base import Candidates, Policy
from ..watching import AttentionCall


class FutureAttention:
    """Attention mass that the tokens of one text received, by layer and by the pass whose queries paid it.

    It is a watcher: `with watching(model, future): ...` notes every pass through an uncompressed cache of one row.
    Passes may also be questions that were asked on copies of a cache; their masses add up.
    """

    def __init__(self) -> None:
        self._passes: dict[int, list[tuple[int, torch.Tensor]]] = {}  # layer -> first query, mass [H, end]
        self._sums: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, call: AttentionCall) -> None:
        plan = source_of(call.mask, "mask")
        if not isinstance(plan, MaskPlan) or call.query.shape[0] != 1:
            raise ValueError("future attention: expected passes of one row under transformers' own causal masks")
        weights = attention_weights(call)  # [Hq, q, n]
        heads = call.key.shape[1]
        mass = weights.unflatten(0, (heads, -1)).sum((1, 2))
        end = plan.start + plan.q_length
        whole = mass.new_zeros(heads, end)
        whole[:, end - mass.shape[1] :] = mass  # a sliding layer holds the newest keys only
        self._passes.setdefault(call.layer, []).append((plan.start, whole))
        self._sums.clear()

    def after(self, layer: int, now: int) -> torch.Tensor:
        """Mass `[H, T]` that tokens of a layer receive from the passes that begin at position `now` or later."""
        if layer not in self._passes:
            raise ValueError(f"layer: expected one of {sorted(self._passes)}, whose attention was watched, got {layer}")
        if (layer, now) not in self._sums:
            passes = self._passes[layer]
            longest = max(mass.shape[1] for _, mass in passes)
            total = passes[0][1].new_zeros(passes[0][1].shape[0], longest)
            for start, mass in passes:
                if start >= now:
                    total[:, : mass.shape[1]] += mass
            self._sums[layer, now] = total
        return self._sums[layer, now]

    def __deepcopy__(self, memo: dict[int, Any]) -> FutureAttention:
        return self  # what was noted does not change: copies of a cache share it

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={sorted(self._passes)})"


def attention_weights(call: AttentionCall, head: int | None = None) -> torch.Tensor:
    """Attention weights `[Hq, q, n]` in float32, as the model takes them; with `head` of that head's queries only."""
    groups = call.query.shape[1] // call.key.shape[1]
    own = slice(None) if head is None else slice(head * groups, (head + 1) * groups)
    keys = (call.key[0] if head is None else call.key[0, head : head + 1]).float().repeat_interleave(groups, 0)
    scores = call.query[0, own].float() @ keys.mT * call.scaling
    softcap, sinks = call.extras.get("softcap"), call.extras.get("s_aux")
    sinks = None if sinks is None else sinks[own]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    assert call.mask is not None
    seen = torch.logical_and(call.mask[0], torch.ones_like(scores[0], dtype=torch.bool))  # [1, q, n]
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)], dim=-1)
    return torch.nan_to_num(scores.softmax(-1))[..., : keys.shape[1]]


@torch.inference_mode()
def future_attention(
    model: PreTrainedModel, cache: DynamicCache, texts: Sequence[torch.Tensor], step: int = 32
) -> FutureAttention:
    """What the tokens in an uncompressed cache, and those that follow, receive from texts that may come next.

    Args:
        cache: of one row; it stays as it is.
        texts: `[1, q]` each, read on a copy of the cache in passes of `step` tokens.
    """
    if not texts or any(text.ndim != 2 or text.shape[0] != 1 for text in texts):
        raise ValueError(f"texts: expected [1, q] tensors, got {[tuple(text.shape) for text in texts]}")
    future = FutureAttention()
    with watching(model, future):
        for text in texts:
            own = copy.deepcopy(cache)
            for chunk in text.to(model.device).split(step, dim=1):
                model.base_model(input_ids=chunk, past_key_values=own, use_cache=True)
    return future


class OraclePolicy(Policy):
    """Keeps what the coming queries attend to most. A bound for tables: it is told the future of one text.

    Args:
        future: what was noted while the text was read uncompressed.
    """

    name: ClassVar[str] = "oracle"

    def __init__(self, future: FutureAttention):
        self.future = future

    def score(self, candidates: Candidates) -> torch.Tensor:
        """Mass from the queries that come after the newest token held."""
        positions = candidates.positions
        near = candidates.context[1]
        now = int(torch.cat([positions.flatten(), near.flatten()]).max()) + 1
        mass = self.future.after(candidates.layer, now).to(positions.device)
        mass = torch.nn.functional.pad(mass, (0, max(now - mass.shape[1], 0)))
        lanes = torch.arange(positions.shape[0], device=positions.device) % candidates.heads
        return mass[lanes].gather(1, positions.clamp(min=0))
