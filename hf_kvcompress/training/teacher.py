"""Teachers: what each token of a real text turned out to be worth to the queries that came later.

"future" reads a passage and stops at several places; a token's worth there is what the next queries see in it. "replay"
(KVzip, arXiv 2505.23416) reads a passage twice; a token's worth is what the second reading sees in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ..enable import watching
from ..shapes import LayerShape
from ..watching import AttentionCall

Target = Literal["mass", "error"]
INTERVAL = 128  # queries that are summed; cuts lie between intervals
HORIZON = 512  # queries after a cut that say what a token is worth
FLOOR = 1e-6  # worth below which tokens do not differ


@dataclass(frozen=True)
class Lesson:
    """One passage in one layer, and what its tokens are worth at each cut.

    keys, values: `[H, T, D]` as the cache stores them.
    cuts: tokens seen at each.
    worth: `[cuts, H, T]`, the logarithm of what the queries after the cut see in a token; junk from the cut on.
    past: `[cuts, H, T]`, attention mass up to the cut: what H2O goes by.
    """

    keys: torch.Tensor
    values: torch.Tensor
    cuts: tuple[int, ...]
    worth: torch.Tensor
    past: torch.Tensor


@dataclass
class Passage:
    """A text `[1, T]` and where to stop: at each cut the queries from there to `ends` are asked."""

    ids: torch.Tensor
    cuts: tuple[int, ...]
    ends: tuple[int, ...]


def future_passage(ids: torch.Tensor) -> Passage:
    """Stops every 256 tokens from 512 on (or from the middle of a shorter text); needs 256 tokens or more."""
    length = ids.shape[1] - ids.shape[1] % INTERVAL
    first = min(4 * INTERVAL, length // 2 // INTERVAL * INTERVAL)
    cuts = tuple(range(first, max(length - HORIZON, first) + 1, 2 * INTERVAL))
    return Passage(ids[:, :length], cuts, tuple(min(cut + HORIZON, length) for cut in cuts))


def replay_passage(ids: torch.Tensor, prefix: int) -> Passage:
    """The first half of the text and then, without the `prefix` of special tokens, the same again."""
    cut = ids.shape[1] // 2 // INTERVAL * INTERVAL
    return Passage(torch.cat([ids[:, :cut], ids[:, prefix:cut]], dim=1), (cut,), (2 * cut - prefix,))


class _Collector:
    """Takes keys, values and what queries see in them out of the attention of some layers, one passage at a time."""

    def __init__(self, layers: Sequence[LayerShape], target: Target):
        self.layers = {shape.layer: shape for shape in layers}
        self.target = target
        self.passage: Passage | None = None
        self.found: dict[int, Lesson] = {}

    def take(self, call: AttentionCall) -> None:
        """A watcher of the model's attention."""
        if call.layer not in self.layers:
            return
        shape, passage, key, value = self.layers[call.layer], self.passage, call.key, call.value
        got = (key.shape[1], key.shape[3], value.shape[3])
        if got != (shape.heads, shape.key_dim, shape.value_dim):
            raise ValueError(f"model: expected keys and values in layer {call.layer} as a cache stores them, got {got}")
        assert passage is not None
        query, key, value = call.query[0].float() * call.scaling, key[0], value[0]
        mass, worth = _intervals(query, key.float(), value.float(), shape.window, self.target, call.extras)
        ends = [math.ceil(end / INTERVAL) for end in passage.ends]
        cuts = [cut // INTERVAL for cut in passage.cuts]
        later = [
            worth[cut:end].sum(0) / (last - first)
            for cut, end, first, last in zip(cuts, ends, passage.cuts, passage.ends, strict=True)
        ]
        self.found[call.layer] = Lesson(
            key.clone(),
            value.clone(),
            passage.cuts,
            (torch.stack(later) + FLOOR).log() / (2 if self.target == "error" else 1),
            torch.stack([mass[:cut].sum(0) for cut in cuts]),
        )


def _intervals(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, target: Target, extras: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass and worth `[intervals, H, T]` of keys `[H, T, D]`, summed over each interval of scaled queries `[Hq, T, D]`.

    Worth is the same mass, or the squared error of the attention's output if the token were not there.
    """
    heads, length, _ = key.shape
    number = math.ceil(length / INTERVAL)
    mass, worth = key.new_zeros(2, number, heads, length)
    at = torch.arange(length, device=key.device)
    squares = value.square().sum(-1)  # [H, T]
    for index in range(number):
        which = slice(index * INTERVAL, min((index + 1) * INTERVAL, length))
        own = at[which, None]
        seen = at[: which.stop] <= own
        if window is not None:
            seen &= at[: which.stop] > own - window
        scores = query[:, which].unflatten(0, (heads, -1)) @ key[:, None, : which.stop].mT  # [H, G, q, n]
        weights = _softmax(scores, seen, extras)
        mass[index, :, : which.stop] = weights.sum((1, 2))
        if target == "mass":
            continue
        weights = weights.flatten(1, 2)  # [H, G * q, n]
        out = weights @ value[:, : which.stop]
        weights = weights.square()
        far = (weights * out.square().sum(-1, keepdim=True)).sum(1) + weights.sum(1) * squares[:, : which.stop]
        near = ((weights.mT @ out) * value[:, : which.stop]).sum(-1)
        worth[index, :, : which.stop] = (far - 2 * near).clamp(min=0)
    return mass, mass if target == "mass" else worth


def _softmax(scores: torch.Tensor, seen: torch.Tensor, extras: Any) -> torch.Tensor:
    """Softmax of `[H, G, q, n]` as the model takes it, with a soft cap and sink logits if it has them."""
    if extras.get("softcap") is not None:
        scores = torch.tanh(scores / extras["softcap"]) * extras["softcap"]
    scores = scores.masked_fill(~seen, -math.inf)
    if extras.get("s_aux") is None:
        return scores.softmax(-1)
    sink = extras["s_aux"].float().view(scores.shape[0], -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


def lessons(
    model: PreTrainedModel, passages: Sequence[Passage], layers: Sequence[LayerShape], target: Target
) -> Iterator[dict[int, Lesson]]:
    """Lessons by layer number, one dictionary a passage.

    Raises:
        ValueError: the model chooses its attention in a way of its own, or a layer's keys are not what a cache stores.
    """
    collector = _Collector(layers, target)
    for passage in passages:
        collector.passage, collector.found = passage, {}
        with watching(model, collector.take), torch.no_grad():
            model.base_model(input_ids=passage.ids.to(model.device), use_cache=False)
        missing = sorted(set(collector.layers) - set(collector.found))
        if missing:
            raise ValueError(f"model: expected attention in layers {missing} through AttentionInterface, got none")
        yield collector.found
