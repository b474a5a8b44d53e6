"""Mean square of the queries that read a layer's keys, which key codecs may weigh channels with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
        batch, _, length, dim = queries.shape
        if length == 1 and min(self.counts) >= ENOUGH:
            return
        squares = queries.detach().float().square().reshape(batch, self.heads, -1, length, dim)
        if kept is None:
            added, counts = squares.sum(dim=(2, 3)), [length] * batch
        else:  # row by row, so that a row sums as it would alone
            rows = (squares[row : row + 1, :, :, k.to(squares.device)] for row, k in enumerate(kept))
            added, counts = torch.cat([row.sum(dim=(2, 3)) for row in rows]), [len(k) for k in kept]
        groups = squares.shape[2]
        self.newest = None
        if length >= FEW and self.keep_newest:
            real = list(queries.detach())
            if kept is not None:
                real = [row[:, k.to(row.device)] for row, k in zip(real, kept, strict=True)]
            self.newest = [row[:, -NEWEST:] for row in real]
        self.sums = added if self.sums is None else self.sums + added
        self.counts = [old + new * groups for old, new in zip(self.counts, counts, strict=True)]

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
