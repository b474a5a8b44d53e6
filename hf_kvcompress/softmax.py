"""A softmax over tokens that come in runs, with sums of values beside it (as in flash attention), and its extras."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Extras:
    """What some models add to attention: logit soft-capping, sink logits `[Hq]`, an additive bias `[1, Hq, q, T]`."""

    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    dropout: float = 0.0

    @property
    def beyond_sdpa(self) -> bool:
        return self.softcap is not None or self.sink_logits is not None


class RunningSoftmax:
    """Softmax-weighted sums over runs of tokens that come one after the other, in float32.

    Sums are kept for each basis that a run's `mix` works in, so that a codec's basis is left once and not per run.

    Args:
        highest: `[B, H, M, 1]`, the largest score so far: -inf, or the logit of a token without a value.
        keep_weights: remember every run's weights, for `weights`.
    """

    def __init__(self, highest: torch.Tensor, keep_weights: bool = False):
        self.highest = highest
        self.total = (highest > float("-inf")).to(highest.dtype)
        self.sums: dict[str, torch.Tensor] = {}
        self._kept: list[tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor | None]] | None = (
            [] if keep_weights else None
        )

    def add(
        self,
        run: Any,
        scores: torch.Tensor,
        mix: Transform,
        basis: str,
        dropout: float,
        lanes: torch.Tensor | None = None,
    ) -> None:
        """Add a run with scores `[B, H, M, n]`; `mix(weights)` gives its weighted values `[B, H, M, Dv]`.

        With `lanes` scores are `[lines, 1, M, n]`, line i being of lane `lanes[i]` of the `B * H`.
        """
        shape = self.highest.shape
        highest, top = self.highest.flatten(0, 1), scores.amax(-1, keepdim=True).flatten(0, 1)
        if lanes is None:
            highest = torch.maximum(highest, top)
        else:
            highest = highest.scatter_reduce(0, lanes[:, None, None].expand_as(top), top, "amax")
        highest = highest.view(shape)
        safe = highest.clamp(min=torch.finfo(highest.dtype).min)  # a query that sees nothing yet: -inf - -inf is NaN
        own = safe if lanes is None else safe.flatten(0, 1)[lanes].unsqueeze(1)
        weights = (scores - own).exp_()
        shrink = (self.highest - safe).exp_()
        self.total = self._into(self.total * shrink, weights.sum(-1, keepdim=True), lanes)
        if self._kept is not None:
            self._kept.append((run, weights, own, lanes))
        if dropout:
            weights = torch.nn.functional.dropout(weights, dropout)
        for name in self.sums:
            self.sums[name] *= shrink
        mixed = mix(weights)
        if basis not in self.sums:
            self.sums[basis] = mixed.new_zeros(*shape[:3], mixed.shape[-1])
        self.sums[basis] = self._into(self.sums[basis], mixed, lanes)
        self.highest = highest

    @staticmethod
    def _into(total: torch.Tensor, part: torch.Tensor, lanes: torch.Tensor | None) -> torch.Tensor:
        if lanes is None:
            return total + part
        total.flatten(0, 1).index_add_(0, lanes, part[:, 0])
        return total

    def result(self, finish: Mapping[str, Transform]) -> torch.Tensor:
        """The weighted mean `[B, H, M, Dv]`; `finish` takes the sum in a codec's basis out of it."""
        parts = [finish[basis](total) if basis in finish else total for basis, total in self.sums.items()]
        return sum(parts[1:], parts[0]) / self._divisor()

    def _divisor(self) -> torch.Tensor:
        return self.total.clamp(min=torch.finfo(self.total.dtype).tiny)

    def weights(self) -> Iterator[tuple[Any, torch.Tensor]]:
        """Each run with its attention weights, `[B, H, M, n]` or `[lines, 1, M, n]`; may be overwritten."""
        safe = self.highest.clamp(min=torch.finfo(self.highest.dtype).min)
        for run, weights, then, lanes in self._kept or ():
            now, total = safe, self._divisor()
            if lanes is not None:
                now, total = (x.flatten(0, 1)[lanes].unsqueeze(1) for x in (now, total))
            yield run, weights.mul_((then - now).exp_().div_(total))
