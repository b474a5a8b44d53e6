"""The exact tokens of one layer: the first few (sinks) and the recent window, kept in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Parts = tuple[torch.Tensor, ...]  # keys, values and, where it is tracked, attention mass


class ExactWindow:
    """Keys and values in the model's dtype: `sink_length` slots for sinks, then the recent window, ragged by row.

    Args:
        batch, heads, key_dim, value_dim: B, H and the head sizes.
        sink_length: sinks a row keeps at most.
        room: slots of the recent window to begin with; it grows if a longer one must be held.
        dtype, device: as the model has them.
        track_mass: keep each token's attention mass `[B, H, slots, 1]` as well, in float32.
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
        track_mass: bool = False,
    ):
        self.sink_length = sink_length
        kinds = [(key_dim, dtype), (value_dim, dtype)] + [(1, torch.float32)] * track_mass
        shape = (batch, heads, sink_length + room)
        self.parts = tuple(torch.zeros(*shape, dim, dtype=kind, device=device) for dim, kind in kinds)
        self.sinks = [0] * batch
        self.recent = [0] * batch

    @property
    def keys(self) -> torch.Tensor:
        return self.parts[0]

    @property
    def values(self) -> torch.Tensor:
        return self.parts[1]

    @property
    def mass(self) -> torch.Tensor | None:
        """`[B, H, slots]`, if it is tracked."""
        return self.parts[2][..., 0] if len(self.parts) > 2 else None

    def _index(self, rows: Sequence[int]) -> slice | torch.Tensor:
        return slice(None) if len(rows) == len(self.recent) else torch.tensor(rows, device=self.keys.device)

    def _write(self, rows: Sequence[int], start: int, tokens: Parts) -> None:
        index, where = self._index(rows), slice(start, start + tokens[0].shape[2])
        for part, new in zip(self.parts, tokens, strict=True):
            part[index, :, where] = new

    def add_sinks(self, rows: Sequence[int], tokens: Parts) -> None:
        """Write the next sinks of rows that hold equally many, each part `[len(rows), H, n, ...]`."""
        self._write(rows, self.sinks[rows[0]], tokens)
        for row in rows:
            self.sinks[row] += tokens[0].shape[2]

    def recent_of(self, rows: Sequence[int]) -> Parts:
        """The recent tokens of rows that hold equally many, each part `[len(rows), H, n, ...]`."""
        index = self._index(rows)
        where = slice(self.sink_length, self.sink_length + self.recent[rows[0]])
        return tuple(part[index, :, where] for part in self.parts)

    def append(self, rows: Sequence[int], tokens: Parts) -> None:
        """Write new tokens behind the recent ones of rows that hold equally many."""
        start, number = self.sink_length + self.recent[rows[0]], tokens[0].shape[2]
        self._reserve(start + number)
        self._write(rows, start, tokens)
        for row in rows:
            self.recent[row] += number

    def append_one(self, rows: Sequence[int], tokens: Parts) -> None:
        """Write a new token `[B, H, 1, ...]` behind the recent ones of rows that may hold unequally many."""
        slots = [self.sink_length + self.recent[row] for row in rows]
        self._reserve(max(slots) + 1)
        device = self.keys.device
        index, where = torch.tensor(rows, device=device), torch.tensor(slots, device=device)
        for part, new in zip(self.parts, tokens, strict=True):
            part[index, :, where] = new[index, :, 0]
        for row in rows:
            self.recent[row] += 1

    def replace(self, rows: Sequence[int], tokens: Parts) -> None:
        """Make these the recent tokens of the rows (they may be views of what is there now)."""
        tokens = tuple(part.clone() for part in tokens)
        for row in rows:
            self.recent[row] = 0
        self.append(rows, tokens)

    def _reserve(self, slots: int) -> None:
        have = self.keys.shape[2]
        if slots > have:
            more = max(slots, have + have // 2) - have
            self.parts = tuple(torch.nn.functional.pad(part, (0, 0, 0, more)) for part in self.parts)

    def map_rows(self, rows: torch.Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        order = rows.tolist()
        self.sinks = [self.sinks[row] for row in order]
        self.recent = [self.recent[row] for row in order]
        rows = rows.to(self.keys.device)
        self.parts = tuple(part.index_select(0, rows) for part in self.parts)

    def used_bytes(self) -> int:
        entry = sum(part[:1, :, :1].numel() * part.element_size() for part in self.parts)
        return entry * (sum(self.sinks) + sum(self.recent))
