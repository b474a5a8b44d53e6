"""Where a text repeats: fingerprints of short runs of tokens, sampled by their own content (as in winnowing).

A token's signature is 32 signs of projections of its values in the first layer that keeps any. There, values follow
from the token alone, or nearly so, and no rotary embedding is in them. Eight signatures in a row make a fingerprint; of
all fingerprints those divisible by `EVERY` are kept, so all copies of a passage keep the same ones, wherever they are.
One index serves all layers: 8 bytes for 16 tokens of a row. What it finds is a proposal, which is then measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

GRAM = 8
EVERY = 16
_NEIGHBOURHOOD = 64  # tokens around a page whose fingerprints speak for its shift
_OCCURRENCES = 8  # earlier ones of a fingerprint that are looked at
_SEED = 20250309
_MULTIPLIER = 0x9E3779B1
_MASK = 0xFFFFFFFF

Span = tuple[int, int]  # row and number of its first token, sinks counted


@lru_cache(maxsize=16)
def _projection(width: int, device: torch.device) -> torch.Tensor:
    draw = torch.randn(width, 32, generator=torch.Generator().manual_seed(_SEED))
    return draw.to(device)


@lru_cache(maxsize=4)
def _powers() -> torch.Tensor:
    return torch.tensor([pow(_MULTIPLIER, GRAM - 1 - i, 1 << 32) for i in range(GRAM)])


class RepeatIndex:
    """Fingerprints of the tokens that each row has taken in.

    Args:
        batch: rows.
        feeder: number of the layer whose values are looked at.
    """

    def __init__(self, batch: int, feeder: int):
        self.feeder = feeder
        self.found = [torch.empty(0, 2, dtype=torch.int32) for _ in range(batch)]  # a row's fingerprints and positions
        self.tails = [
            torch.empty(0, dtype=torch.int32) for _ in range(batch)
        ]  # the newest signatures, GRAM - 1 at most
        self.seen = [0] * batch
        self.pending: list[tuple[list[int], int, torch.Tensor]] = []
        self._asked: dict[tuple[int, int, int], list[tuple[int, Span]]] = {}

    def note(self, rows: Sequence[int], start: int, values: torch.Tensor) -> None:
        """Take in the values `[len(rows), H, n, D]` of tokens from number `start` on; nothing waits for the device."""
        wide = values.detach().transpose(1, 2).flatten(2).float()
        signs = wide @ _projection(wide.shape[-1], wide.device) >= 0
        weights = 2 ** torch.arange(32, device=wide.device)
        self.pending.append((list(rows), start, ((signs * weights).sum(-1) - 2**31).to(torch.int32)))

    def settle(self) -> None:
        """Work off what was noted; waits for the device."""
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        self._asked.clear()
        for rows, start, signatures in pending:
            for row, own in zip(rows, signatures.cpu(), strict=True):
                self._extend(row, start, own)

    def _extend(self, row: int, start: int, signatures: torch.Tensor) -> None:
        tail = self.tails[row]
        if start < self.seen[row]:  # tokens were taken back
            tail = tail[: max(len(tail) - (self.seen[row] - start), 0)]
            self.found[row] = self.found[row][self.found[row][:, 1] + GRAM <= start].clone()
        run = torch.cat([tail, signatures])
        first = start - len(tail)
        if len(run) >= GRAM:
            prints = (run.long().unfold(0, GRAM, 1) * _powers()).sum(1) & _MASK
            prints = ((prints ^ prints >> 15) * 0x85EBCA6B & _MASK) >> 1
            kept = ((prints >> 8) % EVERY == 0).nonzero()[:, 0]
            new = torch.stack([prints[kept], kept + first], dim=1).to(torch.int32)
            self.found[row] = torch.cat([self.found[row], new])
        self.tails[row], self.seen[row] = run[-(GRAM - 1) :].clone(), start + len(signatures)

    def spans(self, row: int, start: int, end: int, page: int, most: int) -> list[list[Span]]:
        """For every page of the tokens `start .. end` of a row, up to `most` earlier spans, most fingerprints first."""
        self.settle()
        if row >= len(self.found):  # the layers' rows were changed one by one: a missed repeat is no loss
            return [[] for _ in range(start, end, page)]
        key = (row, start, end)
        if key not in self._asked:
            self._asked[key] = self._matches(row, max(start - _NEIGHBOURHOOD, 0), end + _NEIGHBOURHOOD)
        matches = self._asked[key]
        pages: list[list[Span]] = []
        for at in range(start, end, page):
            votes: dict[Span, int] = {}
            for position, (other, begins) in matches:
                if at - _NEIGHBOURHOOD <= position < at + page + _NEIGHBOURHOOD:
                    span = (other, begins + at - position)
                    votes[span] = votes.get(span, 0) + 1
            allowed = [span for span in votes if span[1] >= 0 and (span[0] != row or span[1] + page <= at)]
            # the row's own text first, then the earliest: that one is the least likely to be coded by another
            pages.append(sorted(allowed, key=lambda s: (-votes[s], s[0] != row, s[1]))[:most])
        return pages

    def _matches(self, row: int, start: int, end: int) -> list[tuple[int, Span]]:
        """Positions of this row's fingerprints in a range, each with an earlier or another row's same one."""
        own = self.found[row]
        own = own[(own[:, 1] >= start) & (own[:, 1] < end)]
        result: list[tuple[int, Span]] = []
        if not len(own):
            return result
        for other, table in enumerate(self.found):
            if not len(table):
                continue
            order = table[:, 0].argsort(stable=True)
            prints = table[order, 0].contiguous()
            low = torch.searchsorted(prints, own[:, 0].contiguous()).tolist()
            high = torch.searchsorted(prints, own[:, 0].contiguous(), right=True).tolist()
            places = table[order, 1].tolist()
            for (_, position), first, last in zip(own.tolist(), low, high, strict=True):
                for place in places[first : min(last, first + _OCCURRENCES)]:
                    if other != row or place < position:
                        result.append((position, (other, place)))
        return result

    def map_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was."""
        self.settle()
        self._asked.clear()
        self.found = [self.found[row] for row in rows]
        self.tails = [self.tails[row] for row in rows]
        self.seen = [self.seen[row] for row in rows]

    @property
    def nbytes(self) -> int:
        """Bytes held, shared ones once."""
        tensors = [*self.found, *self.tails, *(entry[2] for entry in self.pending)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
