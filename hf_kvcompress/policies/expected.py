"""Expected Attention (arXiv 2510.00636): attention that coming queries are likely to pay, judged by the past ones."""

from __future__ import annotations

import torch

from .base import Candidates, Policy, whole


class ExpectedAttentionPolicy(Policy):
    """`softmax(mean(q . k) + var(q . k) / 2) * |v|`: the expectation over normally distributed queries.

    The paper averages the queries' moments over the rotations of the next 512 positions, for which it needs queries
    before RoPE. Here the moments are those of the newest queries as they came, so any model's rotation will do.

    Args:
        n_queries: newest queries that the moments are taken of.
        epsilon: added to the attention before it is weighed with the values' norms.
        use_covariance: False keeps the first moment only.
    """

    name = "expected"
    capture = "window"

    def __init__(self, n_queries: int = 64, epsilon: float = 0.0, use_covariance: bool = True):
        self.window = whole("n_queries", n_queries)
        self.epsilon, self.use_covariance = epsilon, use_covariance

    def score(self, candidates: Candidates) -> torch.Tensor:
        """Expected attention times the norm of the value."""
        assert candidates.observers is not None
        logits = candidates.observers.queries @ candidates.keys.mT
        asked = (candidates.observers.positions >= 0).float()[..., None]  # [L, M, 1]
        count = asked.sum(1).clamp(min=1)
        mean = (logits * asked).sum(1) / count
        if self.use_covariance:
            mean = mean + ((logits - mean[:, None]).square() * asked).sum(1) / count / 2
        weights = mean.masked_fill(~candidates.present, float("-inf")).softmax(-1)
        return (torch.nan_to_num(weights) + self.epsilon) * candidates.values.norm(dim=-1)
