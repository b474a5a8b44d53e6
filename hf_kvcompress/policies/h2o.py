"""H2O, the heavy-hitter oracle (arXiv 2306.14048): attention that a token has received from all queries so far."""

from __future__ import annotations

import torch

from .base import Candidates, Policy


class H2OPolicy(Policy):
    """Accumulated attention mass per key-value head, over prefill and decoding."""

    name = "h2o"
    capture = "mass"

    def score(self, candidates: Candidates) -> torch.Tensor:
        """The mass, summed over queries and over the query group."""
        assert candidates.mass is not None
        return candidates.mass
