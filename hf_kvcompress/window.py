"""The exact tokens of one layer: the first few (sinks) and the recent window, kept in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class ExactWindow:
    """Keys and values in the model's dtype: `sink_length` slots for sinks, then the recent window, ragged by row.

    Args:
        batch, heads, key_dim, value_dim: B, H and the head sizes.
        sink_length: sinks a row keeps at most.
        room: slots of the recent window to begin with; it grows if a longer one must be held.
        dtype, device: as the model has them.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        sink_length: int,
        room: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.sink_length = sink_length
        self.keys = torch.zeros(batch, heads, sink_length + room, key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(batch, heads, sink_length + room, value_dim, dtype=dtype, device=device)
        self.sinks = [0] * batch
        self.recent = [0] * batch

    def _index(self, rows: Sequence[int]) -> slice | torch.Tensor:
        return slice(None) if len(rows) == len(self.recent) else torch.tensor(rows, device=self.keys.device)

    def add_sinks(self, rows: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the next sinks of rows that hold equally many, `[len(rows), H, n, D]`."""
        start, index = self.sinks[rows[0]], self._index(rows)
        where = slice(start, start + keys.shape[2])
        self.keys[index, :, where], self.values[index, :, where] = keys, values
        for row in rows:
            self.sinks[row] += keys.shape[2]

    def recent_of(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The recent tokens of rows that hold equally many, `[len(rows), H, n, D]` each."""
        index = self._index(rows)
        where = slice(self.sink_length, self.sink_length + self.recent[rows[0]])
        return self.keys[index, :, where], self.values[index, :, where]

    def append(self, rows: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write new tokens behind the recent ones of rows that hold equally many."""
        start, index = self.sink_length + self.recent[rows[0]], self._index(rows)
        end = start + keys.shape[2]
        self._reserve(end)
        self.keys[index, :, start:end], self.values[index, :, start:end] = keys, values
        for row in rows:
            self.recent[row] += keys.shape[2]

    def replace(self, rows: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make these the recent tokens of the rows (they may be views of what is there now)."""
        keys, values = keys.clone(), values.clone()
        for row in rows:
            self.recent[row] = 0
        self.append(rows, keys, values)

    def _reserve(self, slots: int) -> None:
        have = self.keys.shape[2]
        if slots <= have:
            return
        more = max(slots, have + have // 2) - have
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, more))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, more))

    def map_rows(self, rows: torch.Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        order = rows.tolist()
        self.sinks = [self.sinks[row] for row in order]
        self.recent = [self.recent[row] for row in order]
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def used_bytes(self) -> int:
        entry = (self.keys[:1, :, :1].numel() + self.values[:1, :, :1].numel()) * self.keys.element_size()
        return entry * (sum(self.sinks) + sum(self.recent))
