"""The tokens of the pass in flight."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .host_tier import Fetched
from .observation import Observation


@dataclass
class Chunk:
    """The tokens of the pass in flight, exact, with padding: keys, values `[B, H, q, D]` from position `start` on."""

    keys: torch.Tensor
    values: torch.Tensor
    start: int
    kept: list[torch.Tensor] | None
    read: set[str] = field(default_factory=set)
    queries: list[torch.Tensor] = field(default_factory=list)  # of every layer that reads these keys, if wanted
    scaling: float = 1.0  # what the model multiplies them with
    observed: Observation | None = None
    fetched: list[tuple[int, Fetched]] = field(default_factory=list)  # host pages, and the query behind their readers
    attended: bool = False
    watched: bool = False  # the attention at work shows all of the pass's queries

    def of(self, role: str) -> torch.Tensor:
        return self.keys if role == "key" else self.values

    def crop(self, tokens: int) -> bool:
        """Take back the newest `tokens`, which nothing has been done with yet; False if none are left."""
        left = self.keys.shape[2] - tokens
        if left <= 0:
            return False
        if self.observed is not None:
            self.observed = self.observed.without_newest(tokens)
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
        if self.kept is not None:
            self.kept = [own[own < left] for own in self.kept]
        self.queries = [queries[:, :, :left] for queries in self.queries]
        self.fetched = [(stop, pages) for stop, pages in self.fetched if stop <= left]
        return True
