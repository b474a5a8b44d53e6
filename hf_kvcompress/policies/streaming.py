"""StreamingLLM (arXiv 2309.17453): the first tokens and the newest ones."""

from __future__ import annotations

import torch

from .base import Candidates, Policy


class StreamingPolicy(Policy):
    """The newest stay; the sinks never are candidates. Also known as recency."""

    name = "streaming"
    shared = True

    def score(self, candidates: Candidates) -> torch.Tensor:
        """The position."""
        return candidates.positions.float()
