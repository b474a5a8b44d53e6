"""Statistics of packed tokens by lane and epoch.

An epoch begins when four times as many tokens have been sealed as its predecessor's statistics knew, so a lane has four
at most. Tokens of one epoch can be gathered together, in whatever line they stand, without touching their codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from .codecs.base import Codec, Packed

ENOUGH = 2048  # tokens after which statistics are no longer made anew
GROWTH = 4


class LaneStatistics:
    """The codecs' statistics of every lane and epoch, a row each, and what they remember of all tokens so far.

    Args:
        codecs: of keys and values.
        batch, heads: B and H.
        device: where the pages live.
    """

    def __init__(self, codecs: Mapping[str, Codec], batch: int, heads: int, device: torch.device):
        self.codecs, self.heads, self.device = codecs, heads, device
        self.tables: dict[str, Packed] = {"key": {}, "value": {}}  # each `[rows, ...]`
        self.histories: dict[str, Packed] = {"key": {}, "value": {}}  # each `[B, H, 1, ...]`
        self.known = [0] * batch  # tokens that the statistics of a row's epoch were made of
        self.epoch = [0] * batch  # row of the tables that the row's first head is at; its other heads follow

    def of(self, role: str, epochs: torch.Tensor) -> Packed:
        """The statistics in these rows of the tables."""
        return {name: t[epochs] for name, t in self.tables[role].items()}

    def rows_of(self, rows: Sequence[int]) -> list[int]:
        """Rows of the tables at which the lanes of these rows are now."""
        return [self.epoch[row] + head for row in rows for head in range(self.heads)]

    def renew(
        self,
        rows: Sequence[int],
        before: int,
        tokens: int,
        pair: Mapping[str, torch.Tensor],
        places: Packed,
        query_ms: torch.Tensor | None,
    ) -> bool:
        """Begin an epoch of rows that sealed `before` tokens and are at the same epoch, if it is time to.

        pair: keys and values at hand, `[R, H, T, D]`, `tokens` of which are about to be sealed.
        places: where they stand, if the codec of the keys asks for it.
        """
        known = self.known[rows[0]]
        if before and (known >= ENOUGH or before + tokens < GROWTH * known):
            return False
        first = 0
        for role, x in pair.items():
            ms = query_ms[:, :, None] if query_ms is not None and role == "key" else None
            history = self._history(role, rows, before) | (places if role == "key" else {})
            made = self.codecs[role].begin_segment(x.unsqueeze(2), ms, history)
            table = self.tables[role]
            for name, statistic in made.items():
                flat = statistic.flatten(0, 2)
                first = len(table[name]) if name in table else 0
                table[name] = torch.cat([table[name], flat]) if name in table else flat
        for number, row in enumerate(rows):
            self.epoch[row] = first + number * self.heads if any(self.tables.values()) else 0
            self.known[row] = before + tokens
        return True

    def learn(self, rows: Sequence[int], before: int, pair: Mapping[str, torch.Tensor], places: Packed) -> None:
        """Let the codecs remember keys and values `[R, H, 1, T, D]` that the rows are about to seal."""
        for role, x in pair.items():
            kept = self.histories[role]
            history = self._history(role, rows, before) | (places if role == "key" else {})
            for name, learned in self.codecs[role].learn(history, x).items():
                if name not in kept:
                    kept[name] = learned.new_zeros(len(self.known), *learned.shape[1:])
                kept[name][torch.tensor(rows, device=self.device)] = learned

    def _history(self, role: str, rows: Sequence[int], before: int) -> Packed:
        index = torch.tensor(rows, device=self.device)
        return {name: t[index] for name, t in self.histories[role].items()} if before else {}

    def share_with(self, other: LaneStatistics) -> None:
        """Let another store look up its tokens in the same tables."""
        for role, table in self.tables.items():
            other.tables[role] = {name: t.to(other.device) for name, t in table.items()}

    def map_rows(self, rows: torch.Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        order = rows.tolist()
        self.known, self.epoch = ([x[row] for row in order] for x in (self.known, self.epoch))
        for history in self.histories.values():
            history.update({name: t.index_select(0, rows.to(self.device)) for name, t in history.items()})

    def tensors(self) -> Iterator[torch.Tensor]:
        for group in (self.tables, self.histories):
            for packed in group.values():
                yield from packed.values()
