"""KeyDiff (arXiv 2504.15364): keys that point away from the average key."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from .base import Candidates, Policy


class KeyDiffPolicy(Policy):
    """Keeps the keys least like the mean of all unit keys; needs no queries."""

    name = "keydiff"

    def score(self, candidates: Candidates) -> torch.Tensor:
        """Minus the cosine between a key and the mean of the unit keys, exact tokens included."""
        near, at = candidates.context
        keys, near = normalize(candidates.keys, dim=-1), normalize(near, dim=-1)
        anchor = keys.sum(1) + (near * (at >= 0)[..., None]).sum(1)  # absent candidates are zeros
        return -(keys @ normalize(anchor, dim=-1)[..., None])[..., 0]
