"""Choosing the best of every row of scores, the same whatever stands beside."""

from __future__ import annotations

import torch


def highest(scores: torch.Tensor, number: int) -> torch.Tensor:
    """Booleans like `scores` `[L, N]`: the `number` highest of each row; of equal ones the last."""
    number = min(number, scores.shape[1])
    if number <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(number, dim=1).values[:, -1:]
    above, equal = scores > least, scores == least
    wanted = number - above.sum(1, keepdim=True)
    return above | (equal & (equal.flip(1).cumsum(1).flip(1) <= wanted))
