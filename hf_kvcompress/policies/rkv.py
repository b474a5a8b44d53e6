"""R-KV (arXiv 2505.24133): attention less redundancy, for long decodes that repeat themselves."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from .base import Candidates, Policy, whole


class RKVPolicy(Policy):
    """`weight * attention - (1 - weight) * redundancy` of the keys.

    Redundancy is the mean cosine with the other keys, normalised by a softmax over the candidates as attention is.

    Args:
        weight: lambda of the paper.
        window_size: observer queries.
        kernel_size: neighbours over which attention is pooled, odd.
    """

    name = "rkv"
    capture = "window"

    def __init__(self, weight: float = 0.1, window_size: int = 8, kernel_size: int = 5):
        if not 0 <= weight <= 1:
            raise ValueError(f"weight: expected 0 to 1, got {weight}")
        self.weight, self.window = weight, whole("window_size", window_size)
        self.kernel_size = whole("kernel_size", kernel_size, odd=True)

    def score(self, candidates: Candidates) -> torch.Tensor:
        """Both terms sum to about one over a lane."""
        attention = candidates.smooth(candidates.mean_attention(), self.kernel_size)
        keys = normalize(candidates.keys, dim=-1)
        total = keys.sum(1)  # absent candidates are zeros
        count = candidates.present.sum(1, keepdim=True).clamp(min=2)
        # The mean cosine with all others is one product with their sum.
        redundancy = ((keys @ total[..., None])[..., 0] - 1) / (count - 1)
        redundancy = redundancy.masked_fill(~candidates.present, float("-inf")).softmax(-1)
        return self.weight * attention - (1 - self.weight) * redundancy
