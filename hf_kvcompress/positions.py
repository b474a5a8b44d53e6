"""Where each stored token stands: the index that transformers' masks use, padding counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Positions:
    """Positions of the kept tokens of each row, in the order of their slots.

    As long as every row is one unbroken run (the usual case: no padding, or padding on the left) a row needs one
    number on the host; a row with holes switches the whole object to an int32 tensor `[B, slots]`.
    """

    def __init__(self, batch: int):
        self.counts = [0] * batch
        self.offsets = [0] * batch
        self.table: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        return len(self.counts)

    @property
    def uniform(self) -> bool:
        """All rows are alike, without holes: slot s stands at `offsets[0] + s`."""
        return (
            self.table is None
            and self.counts.count(self.counts[0]) == self.batch
            and self.offsets.count(self.offsets[0]) == self.batch
        )

    def append(self, start: int, kept: Sequence[torch.Tensor] | None, length: int) -> None:
        """Note `length` new tokens at `start`, or of each row only those at `start + kept[row]` (sorted)."""
        if kept is None and self.table is None:
            for row, count in enumerate(self.counts):
                if count == 0:
                    self.offsets[row] = start
            if all(offset + count == start for offset, count in zip(self.offsets, self.counts, strict=True)):
                self.counts = [count + length for count in self.counts]
                return
        chosen = [torch.arange(length)] * self.batch if kept is None else [k.cpu() for k in kept]
        if self.table is None and all(self._continues(row, start, k) for row, k in enumerate(chosen)):
            for row, k in enumerate(chosen):
                if len(k) and self.counts[row] == 0:
                    self.offsets[row] = start + int(k[0])
        else:
            self._append_to_table(start, chosen)
        self.counts = [count + len(k) for count, k in zip(self.counts, chosen, strict=True)]

    def _continues(self, row: int, start: int, kept: torch.Tensor) -> bool:
        if len(kept) == 0:
            return True
        unbroken = int(kept[-1] - kept[0]) + 1 == len(kept)
        return unbroken and (self.counts[row] == 0 or start + int(kept[0]) == self.offsets[row] + self.counts[row])

    def _append_to_table(self, start: int, chosen: Sequence[torch.Tensor]) -> None:
        need = max(count + len(k) for count, k in zip(self.counts, chosen, strict=True))
        table = torch.full((self.batch, max(need + need // 4, 64)), -1, dtype=torch.int32)
        if self.table is None:
            for row, (count, offset) in enumerate(zip(self.counts, self.offsets, strict=True)):
                table[row, :count] = torch.arange(offset, offset + count)
        elif self.table.shape[1] >= need:
            table = self.table
        else:
            table[:, : self.table.shape[1]] = self.table
        for row, k in enumerate(chosen):
            table[row, self.counts[row] : self.counts[row] + len(k)] = start + k
        self.table = table

    def of_slots(self, start: int, end: int, device: torch.device) -> torch.Tensor:
        """Positions of the slots `start .. end`, `[B, end - start]` (`[1, ...]` if rows are alike), -1 where empty."""
        if self.uniform:
            first = self.offsets[0]
            return torch.arange(first + start, first + end, device=device)[None]
        slots = torch.arange(start, end)
        counts = torch.tensor(self.counts)[:, None]
        if self.table is None:
            positions = slots + torch.tensor(self.offsets)[:, None]
        else:
            positions = torch.nn.functional.pad(self.table, (0, max(end - self.table.shape[1], 0)))[:, start:end].long()
        return positions.masked_fill(slots >= counts, -1).to(device)

    def of_row(self, row: int, start: int, end: int) -> torch.Tensor:
        """Positions of a row's slots `start .. end`, on the host; all of them must hold tokens."""
        if self.table is None:
            return torch.arange(self.offsets[row] + start, self.offsets[row] + end)
        return self.table[row, start:end].long()

    def count_before(self, row: int, position: int) -> int:
        """Tokens of a row that stand before `position`."""
        if self.table is None:
            return min(max(position - self.offsets[row], 0), self.counts[row])
        return int((self.table[row, : self.counts[row]] < position).sum())

    def truncate(self, counts: Sequence[int]) -> None:
        self.counts = list(counts)

    def map_rows(self, rows: Sequence[int]) -> None:
        self.counts = [self.counts[row] for row in rows]
        self.offsets = [self.offsets[row] for row in rows]
        if self.table is not None:
            self.table = self.table[list(rows)]
