"""TOVA (arXiv 2401.06104): what the last query attends to, in all heads of a layer together."""

from __future__ import annotations

import torch

from .base import Candidates, Policy


class TOVAPolicy(Policy):
    """Attention of the newest query, averaged over the layer's heads, which keep the same tokens."""

    name = "tova"
    capture = "window"
    window = 1
    shared = True

    def score(self, candidates: Candidates) -> torch.Tensor:
        """One score a row, repeated for its heads."""
        rows = candidates.mean_attention().unflatten(0, (-1, candidates.heads))
        return rows.mean(1, keepdim=True).expand_as(rows).flatten(0, 1)
