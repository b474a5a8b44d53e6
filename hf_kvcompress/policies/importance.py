"""Importance: how large a token's value is, what a trained predictor expects of it, and the attention it received."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from .base import Candidates, Policy
from .learned import LearnedPolicy

PARTS = ("magnitude", "learned", "attention")
DEFAULT = {"magnitude": 0.4, "learned": 0.4, "attention": 0.2}


class ImportancePolicy(Policy):
    """A weighted sum of ranks: of the values' norms, of a trained score and of the attention mass.

    Each part is turned into the token's rank among the candidates of its head, 0 to 1, so that no part's units count.

    Args:
        weights: of "magnitude", "learned" and "attention"; a part that is not named counts nothing.
        predictor: weights that `kvcompress train-policy` wrote. Without them the learned part's weight goes to the
            others, and a warning says so.

    Raises:
        ValueError: unknown parts, negative weights, or none above zero.
    """

    name = "importance"
    capture = "mass"

    def __init__(self, weights: Mapping[str, float] | None = None, predictor: str | Path | None = None):
        given = DEFAULT if weights is None else weights
        for part, weight in given.items():
            if part not in PARTS:
                raise ValueError(f"weights: expected {', '.join(PARTS)}, got {part!r}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0:
                raise ValueError(f"weights[{part!r}]: expected a number of at least 0, got {weight!r}")
        own = {part: float(given.get(part, 0)) for part in PARTS}
        self.predictor = None if predictor is None else LearnedPolicy(predictor)
        if self.predictor is None and own["learned"]:
            message = "importance: no predictor is given, so the other parts share the learned part's weight"
            warnings.warn(message, stacklevel=3)
            own["learned"] = 0.0
        total = sum(own.values())
        if total <= 0:
            raise ValueError(f"weights: expected one above 0 that can be used, got {dict(given)}")
        self.weights = {part: weight / total for part, weight in own.items()}
        self.capture = "mass" if self.weights["attention"] else "none"  # type: ignore[misc, assignment]

    def score(self, candidates: Candidates) -> torch.Tensor:
        """The weighted ranks, 0 to 1."""
        parts = {"magnitude": lambda: candidates.values.norm(dim=-1), "attention": lambda: candidates.mass}
        if self.predictor is not None:
            parts["learned"] = lambda: self.predictor.score(candidates)  # type: ignore[union-attr]
        total = torch.zeros(candidates.positions.shape, device=candidates.positions.device)
        for part, weight in self.weights.items():
            if weight:
                scores = parts[part]()
                assert scores is not None
                total += weight * _ranks(scores, candidates.present)
        return total


def _ranks(scores: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Rank of each score `[L, N]` among those present, 0 for the lowest to 1 for the highest."""
    order = scores.float().masked_fill(~present, float("-inf")).argsort(dim=1, stable=True).argsort(dim=1)
    count = present.sum(1, keepdim=True)
    first = present.shape[1] - count  # what is absent is lowest
    return ((order - first).clamp(min=0) / (count - 1).clamp(min=1)).to(torch.float32)
