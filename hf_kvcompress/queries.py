"""Mean square of the queries that read a layer's keys, which key codecs may weigh channels with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK = 1024  # tokens summed at once
FEW, NEWEST = 32, 256  # queries below which a second moment is not worth having, and that it is taken of
ENOUGH = 512  # queries of a row after which single decode steps no longer pay for more


class QueryStatistics:
    """Sums of squared queries by row, key-value head and channel, ragged by row.

    Args:
        batch, heads: B and H.
        keep_newest: hold on to a pass's newest queries until it is committed, for `moment`.
    """

    def __init__(self, batch: int, heads: int, keep_newest: bool):
        self.heads, self.keep_newest = heads, keep_newest
        self.sums: torch.Tensor | None = None  # [B, H, D]
        self.counts = [0] * batch
        self.newest: list[torch.Tensor] | None = None  # of the pass in flight, by row `[Hq, n, D]`

    def observe(self, queries: torch.Tensor, kept: Sequence[torch.Tensor] | None) -> None:
        """Add queries `[B, Hq, q, D]`, of each row only those at `kept[row]` (None: all)."""
        batch, query_heads, length, _ = queries.shape
        if length == 1 and min(self.counts) >= ENOUGH:
            return
        real = list(queries.detach())
        if kept is None:
            added, counts = self._sum_of_squares(queries.detach()), [length] * batch
        else:  # row by row, so that a row sums as it would alone
            real = [row[:, k.to(row.device)] for row, k in zip(real, kept, strict=True)]
            added, counts = torch.cat([self._sum_of_squares(row[None]) for row in real]), [len(k) for k in kept]
        self.newest = [row[:, -NEWEST:] for row in real] if length >= FEW and self.keep_newest else None
        groups = query_heads // self.heads
        self.sums = added if self.sums is None else self.sums + added
        self.counts = [old + new * groups for old, new in zip(self.counts, counts, strict=True)]

    def _sum_of_squares(self, queries: torch.Tensor) -> torch.Tensor:
        """`[b, Hq, n, D]` -> `[b, H, D]`, some tokens at a time: a float copy of a long prompt's queries is large."""
        total = queries.new_zeros(queries.shape[0], self.heads, queries.shape[3], dtype=torch.float32)
        for part in queries.split(BLOCK, dim=2):
            total += part.float().square().unflatten(1, (self.heads, -1)).sum(dim=(2, 3))
        return total

    def mean_square(self, rows: Sequence[int]) -> torch.Tensor | None:
        """Mean square `[len(rows), H, D]`, or None if a row has seen no query."""
        if self.sums is None or not all(self.counts[row] for row in rows):
            return None
        counts = torch.tensor([self.counts[row] for row in rows], device=self.sums.device, dtype=torch.float32)
        return (self.sums if len(rows) == len(self.counts) else self.sums[list(rows)]) / counts[:, None, None]

    def moment(self, rows: Sequence[int]) -> torch.Tensor | None:
        """Second moment `[len(rows), H, D, D]` of the newest queries of the pass in flight, if it has many."""
        if self.newest is None or min(self.newest[row].shape[1] for row in rows) < FEW:
            return None
        own = [self.newest[row].float().unflatten(0, (self.heads, -1)).flatten(1, 2) for row in rows]  # [H, G * n, D]
        return torch.stack([q.mT @ q / q.shape[1] for q in own])

    def map_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was."""
        self.counts = [self.counts[row] for row in rows]
        if self.sums is not None:
            self.sums = self.sums[list(rows)]
