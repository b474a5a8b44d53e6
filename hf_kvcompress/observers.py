"""The newest queries of every row, for policies that score tokens with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .policies.base import Observers


class QueryWindow:
    """A ring of each row's newest queries, in the model's dtype and scaled as the model scales them.

    Args:
        size: queries kept.
        heads: key-value heads.
    """

    def __init__(self, size: int, heads: int, batch: int):
        self.size, self.heads = size, heads
        self.queries: torch.Tensor | None = None  # [B, Hq, size, D]
        self.positions = torch.full((batch, size), -1)
        self.seen = [0] * batch

    def observe(self, queries: torch.Tensor, scaling: float, start: int, kept: Sequence[torch.Tensor] | None) -> None:
        """Add queries `[B, Hq, q, D]` that stand from `start` on, of each row only those at `kept[row]` (None: all)."""
        batch, heads, length, dim = queries.shape
        if self.queries is None:
            self.queries = queries.new_zeros(batch, heads, self.size, dim)
        if kept is None and len(set(self.seen)) == 1:
            self._add(slice(None), 0, queries, scaling, torch.arange(start, start + length))
        else:
            for row in range(batch):
                own = torch.arange(length) if kept is None else kept[row].cpu()
                chosen = queries[row : row + 1, :, own.to(queries.device)]
                self._add(slice(row, row + 1), row, chosen, scaling, start + own)
        self.seen = [seen + (length if kept is None else len(kept[row])) for row, seen in enumerate(self.seen)]

    def _add(self, rows: slice, row: int, queries: torch.Tensor, scaling: float, at: torch.Tensor) -> None:
        assert self.queries is not None
        number = min(len(at), self.size)
        if number == 0:
            return
        first = self.seen[row] + len(at) - number
        places = torch.arange(first, first + number) % self.size
        self.positions[rows, places] = at[-number:]
        newest = queries[:, :, -number:].detach() * scaling
        self.queries[rows, :, places.to(queries.device)] = newest.to(self.queries.dtype)

    def of(self, rows: Sequence[int]) -> Observers:
        """What the rows' lanes hold: queries `[L, G * size, D]` float32."""
        assert self.queries is not None
        own = self.queries[list(rows)].float().unflatten(1, (self.heads, -1))  # [R, H, G, size, D]
        positions = self.positions[list(rows)].to(own.device)
        at = positions[:, None, None].expand(own.shape[:4])
        return Observers(own.flatten(2, 3).flatten(0, 1), at.flatten(2, 3).flatten(0, 1), own.shape[2])

    def map_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was."""
        self.positions = self.positions[list(rows)]
        self.seen = [self.seen[row] for row in rows]
        if self.queries is not None:
            self.queries = self.queries[list(rows)]
