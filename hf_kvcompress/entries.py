"""Sealed pages of ragged rows as entries: each is some tokens of one row, and all of them are read in one call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .codecs.base import Packed


@dataclass(frozen=True)
class Entries:
    """E entries of `capacity` tokens at most, packed as `[E, H, 1, ...]`.

    rows, starts, held: of each entry its row, the number of its first sealed token, and the tokens that it holds.
    """

    rows: list[int]
    starts: list[int]
    held: list[int]
    capacity: int
    device: torch.device

    @cached_property
    def row_index(self) -> torch.Tensor:
        """`[E]`."""
        return torch.tensor(self.rows, device=self.device)

    def lanes(self, heads: int) -> torch.Tensor:
        """The lane of each entry and head, `[E * H]`, among the `B * H` of the layer."""
        if heads not in self._lanes:
            self._lanes[heads] = (self.row_index[:, None] * heads + torch.arange(heads, device=self.device)).flatten()
        return self._lanes[heads]

    @cached_property
    def _lanes(self) -> dict[int, torch.Tensor]:
        return {}


@dataclass(frozen=True)
class EntryRun:
    """Entries with what they hold, `[E, H, 1, ...]`."""

    entries: Entries
    keys: Packed
    values: Packed
