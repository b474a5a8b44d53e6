"""Video (after InfiniPot-V, arXiv 2506.15745): patches that no newer frame repeats, and values of large norm."""

from __future__ import annotations

import torch

from .base import Candidates, Policy

TINY = 1e-12


class VideoPolicy(Policy):
    """`(1 - value_weight) * novelty + value_weight * norm of the value`, both from 0 to 1; needs no queries.

    A token is novel if neither the next newer token of its place nor the newest one there resembles it: of a patch that
    stays the same old copies go and the newest stays. The paper takes the cosine of keys; a stored key carries its
    rotation, which differs from frame to frame, so what is compared here is the lengths of the channel pairs that RoPE
    turns, which no rotation changes, and the value.

    Args:
        tokens_per_frame: tokens from one frame's beginning to the next one's, text between them included. Tokens that
            stand a multiple of it apart have the same place. None: a token is compared with a neighbour instead, which
            tells still from busy parts of a picture, but not one frame from the next.
        value_weight: of the values' norms against novelty, 0 to 1.
        lag: the neighbour that is compared where `tokens_per_frame` is None: so many tokens newer.
    """

    name = "video"

    def __init__(self, tokens_per_frame: int | None = None, value_weight: float = 0.25, lag: int = 1):
        for name, number in (("tokens_per_frame", tokens_per_frame), ("lag", lag)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(f"{name}: expected a whole number of at least 1, got {number!r}")
        if not 0 <= value_weight <= 1:
            raise ValueError(f"value_weight: expected 0 to 1, got {value_weight!r}")
        self.tokens_per_frame, self.value_weight, self.lag = tokens_per_frame, value_weight, lag

    def score(self, candidates: Candidates) -> torch.Tensor:
        """Novelty and the value's norm, relative to the lane's average."""
        half = candidates.keys.shape[-1] // 2
        pairs = torch.hypot(candidates.keys[..., :half], candidates.keys[..., half : 2 * half])
        looks = [_scaled(part, candidates.present) for part in (pairs, candidates.values)]
        likeness = torch.zeros(candidates.positions.shape, device=pairs.device)
        for other in self._newer(candidates.positions):
            likeness = torch.maximum(likeness, _likeness(looks, other))
        norms = candidates.values.norm(dim=-1)
        mean = norms.sum(1, keepdim=True) / candidates.present.sum(1, keepdim=True).clamp(min=1)
        norms = (norms / mean.clamp(min=TINY)).clamp(max=2) / 2
        return (1 - self.value_weight) * (1 - likeness) + self.value_weight * norms

    def _newer(self, positions: torch.Tensor) -> list[torch.Tensor]:
        """Numbers `[L, N]` of the newer tokens that each one is compared with, -1 where there is none."""
        number = positions.shape[1]
        index = torch.arange(number, device=positions.device).expand_as(positions)
        if self.tokens_per_frame is None:
            other = (index + self.lag).clamp(max=max(number - 1, 0))
            there = (index + self.lag < number) & (positions.gather(1, other) >= 0)
            return [other.masked_fill(~there, -1)]
        # Absent candidates share a place of their own. Positions rise along a lane, and so they do within a place.
        place = torch.where(positions < 0, self.tokens_per_frame, positions % self.tokens_per_frame)
        place, order = place.sort(dim=1, stable=True)
        last = torch.ones_like(place, dtype=torch.bool)
        last[:, :-1] = place[:, 1:] != place[:, :-1]
        end = torch.where(last, index, number).flip(1).cummin(dim=1).values.flip(1)  # where the place's newest is
        following, newest = order.roll(-1, dims=1), order.gather(1, end)
        unsorted = [
            torch.empty_like(order).scatter_(1, order, other.masked_fill(last, -1)) for other in (following, newest)
        ]
        return [other.masked_fill(positions < 0, -1) for other in unsorted]


def _scaled(x: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """`[L, N, D]` in units of the lane's spread: two unrelated tokens are about 1 apart, squared."""
    here = present[..., None]
    count = present.sum(1).clamp(min=1)[:, None, None]
    mean = (x * here).sum(1, keepdim=True) / count
    variance = ((x - mean).square() * here).sum((1, 2), keepdim=True) / count
    return x / (2 * variance).clamp(min=TINY).sqrt()


def _likeness(looks: list[torch.Tensor], other: torch.Tensor) -> torch.Tensor:
    """1 for equal tokens, 0 for unrelated ones and for those without another."""
    at = other.clamp(min=0)[..., None]
    apart = [(x - x.gather(1, at.expand_as(x))).square().sum(-1).clamp(max=1) for x in looks]
    return (1 - torch.stack(apart).mean(0)).masked_fill(other < 0, 0.0)
