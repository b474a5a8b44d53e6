"""Expected Attention (arXiv 2510.00636): attention that coming queries are likely to pay, judged by the past ones."""

from __future__ import annotations

import torch

from .base import Candidates, Policy, whole


class ExpectedAttentionPolicy(Policy):
    """`softmax(mean(q . k) + var(q . k) / 2) * |v|`: the expectation over normally distributed queries.

    Mean and variance are taken for every query head by itself, over its newest queries as they came. The paper turns
    them on to the next 512 positions first; that made no difference here (docs/decisions.md).

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
        """Expected attention, averaged over the query group, times the norm of the value."""
        observers = candidates.observers
        assert observers is not None
        by_head = (observers.groups, -1)
        logits = (observers.queries @ candidates.keys.mT).unflatten(1, by_head)  # [L, G, n, N]
        asked = (observers.positions >= 0).float().unflatten(1, by_head)[..., None]
        count = asked.sum(2).clamp(min=1)
        mean = (logits * asked).sum(2) / count
        if self.use_covariance:
            mean = mean + ((logits - mean[:, :, None]).square() * asked).sum(2) / count / 2
        weights = mean.masked_fill(~candidates.present[:, None], float("-inf")).softmax(-1)
        return (torch.nan_to_num(weights).mean(1) + self.epsilon) * candidates.values.norm(dim=-1)
