"""Random: the bound that every score must beat."""

from __future__ import annotations

import torch

from .base import Candidates, Policy


class RandomPolicy(Policy):
    """Keeps a random choice, the same for a token each time it is scored.

    Args:
        seed: another seed, another choice.
    """

    name = "random"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def score(self, candidates: Candidates) -> torch.Tensor:
        """A hash of position, lane and layer, in 0 .. 1."""
        lanes = torch.arange(candidates.positions.shape[0], device=candidates.positions.device)[:, None]
        lanes = lanes % candidates.heads + candidates.first_head  # a row, or a rank, must choose as it would alone
        x = candidates.positions * 2654435761 + lanes * 40503 + candidates.layer * 97 + self.seed * 1013904223
        for _ in range(2):  # xorshift-multiply, in 32 bits
            x = x & 0xFFFFFFFF
            x = (x ^ (x >> 16)) * 0x45D9F3B
        return ((x >> 8) & 0xFFFFFF).float() / 2**24
