"""What a policy is: a score for every token that could be dropped; the highest stay.

A policy sees lanes, one a row and key-value head, and never positions' padding, pages or transformers.

    L lanes (B * Hkv), N candidates of the fullest lane, D head size, M observer queries of a lane (group * queries)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch.nn.functional import avg_pool1d

Capture = Literal["none", "mass", "window"]


def whole(name: str, number: object, odd: bool = False) -> int:
    """`number` if it is a whole one of at least 1, and odd if it must be; else a ValueError that names it."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1 or odd and number % 2 == 0:
        expected = "an odd number of at least 1" if odd else "a whole number of at least 1"
        raise ValueError(f"{name}: expected {expected}, got {number!r}")
    return number


@dataclass(frozen=True)
class Observers:
    """Newest queries of each lane `[L, M, D]`, as the model scales them, and their positions `[L, M]` (-1: none).

    They come one query head of the lane's group behind the other, M / groups each.
    """

    queries: torch.Tensor
    positions: torch.Tensor
    groups: int


class Candidates:
    """The tokens that a policy scores, sorted by position in every lane; what it does not ask for costs nothing.

    Args:
        positions: `[L, N]`, counted from the row's first token, -1 where a lane has fewer. So are all others here.
        heads: Hkv; lane l is head `l % heads` of row `l // heads`.
        keys, values: give `[L, N, D]` float32, zeros where a lane has fewer.
        context: gives the keys `[L, n, D]` and positions `[L, n]` of the exact tokens, which always stay.
        mass: attention that each candidate received so far, `[L, N]`, if the policy captures "mass".
        observers: the newest queries, if it captures "window".
        layer: number of the layer.
        first_head: number in the whole model of the first of these heads, where a rank has a part of them.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        heads: int,
        keys: Callable[[], torch.Tensor],
        values: Callable[[], torch.Tensor],
        context: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        mass: torch.Tensor | None = None,
        observers: Observers | None = None,
        layer: int = 0,
        first_head: int = 0,
    ):
        self.positions, self.heads, self.layer, self.first_head = positions, heads, layer, first_head
        self._keys, self._values, self._context = keys, values, context
        self.mass, self.observers = mass, observers

    @cached_property
    def present(self) -> torch.Tensor:
        """`[L, N]` booleans: there is a candidate."""
        return self.positions >= 0

    @cached_property
    def keys(self) -> torch.Tensor:
        return self._keys()

    @cached_property
    def values(self) -> torch.Tensor:
        return self._values()

    @cached_property
    def context(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[L, n, D]` and positions `[L, n]` of the tokens that are no candidates (sinks and recent window)."""
        return self._context()

    def attention(self) -> torch.Tensor:
        """Attention weights of the observers on the candidates, `[L, M, N]` float32; exact tokens take their share."""
        assert self.observers is not None
        near_keys, near_positions = self.context
        keys = torch.cat([self.keys, near_keys], dim=1)
        at = torch.cat([self.positions, near_positions], dim=1)[:, None]  # [L, 1, N + n]
        scores = self.observers.queries @ keys.mT
        hidden = (at < 0) | (at > self.observers.positions[..., None])
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        return torch.nan_to_num(weights)[..., : self.keys.shape[1]]

    def mean_attention(self) -> torch.Tensor:
        """`attention` averaged over the observers that there are, `[L, N]`."""
        assert self.observers is not None
        count = (self.observers.positions >= 0).sum(1, keepdim=True).clamp(min=1)
        return self.attention().sum(1) / count

    def smooth(self, scores: torch.Tensor, size: int) -> torch.Tensor:
        """Scores `[L, N]` averaged over each candidate's `size` neighbours, itself in the middle, where they exist."""
        kernel = (size, 1, size // 2)
        sums = avg_pool1d((scores * self.present)[:, None], *kernel)[:, 0]
        return sums / avg_pool1d(self.present.to(scores.dtype)[:, None], *kernel)[:, 0].clamp(min=1 / size)


class Policy(ABC):
    """Scores candidates; what stays beyond sinks, the recent window, pins and boundaries is the highest of them.

    Attributes:
        capture: what the attention hands over: the attention mass of every token ("mass"), the newest queries
            ("window") or nothing ("none").
        window: queries kept for "window".
        shared: all heads of a row keep the same tokens.
    """

    name: ClassVar[str]
    capture: ClassVar[Capture] = "none"
    window: int = 0
    shared: bool = False

    @abstractmethod
    def score(self, candidates: Candidates) -> torch.Tensor:
        """Score `[L, N]` of every candidate, the higher the longer it stays; any finite float32."""

    @property
    def needs_queries(self) -> bool:
        """Works only where the attention hands over what it saw: under `enable(model)`."""
        return self.capture != "none"

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"
