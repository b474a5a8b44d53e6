"""Demote before delete: tokens below the line move to a cheaper codec or to host memory, and may come back.

The tail of a layer is a second store of lanes. With a codec of its own its tokens are attended to like all others, in
fewer bits. In host memory they keep their codes; every page there leaves the least and the largest number of each key
channel behind, from which follows a bound on any query's score (Quest, arXiv 2406.10774), and a pass reads the pages
whose bound is highest. Pages that were read compete for a place in the first tier when the layer next evicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from .blocks import Block
from .codecs.base import Codec
from .compaction import compact, gather_block
from .exact_copies import ExactCopies
from .host_tier import Fetched, bounds_of, fetch, with_bounds
from .lane_reading import INSIDE, LINE
from .lanes import LanePages

MOST_BLOCKS = 16  # of a host tier, before they are joined


class Tail:
    """A tier of one layer below its first one.

    Args:
        key_codec, value_codec: of the tail.
        batch, heads: B and H.
        device: of the model.
        track_mass: keep each token's attention mass.
        host: the tokens live in host memory and only a few pages of them are read.
        fetch_pages: pages of a lane that a pass reads from host memory.
        first_position: of a row's first token, for codecs that ask for positions.
        beyond: the next tier, for what this one has no room for.
    """

    def __init__(
        self,
        key_codec: Codec,
        value_codec: Codec,
        batch: int,
        heads: int,
        device: torch.device,
        track_mass: bool,
        host: bool,
        fetch_pages: int,
        first_position: Callable[[int], int] | None = None,
        beyond: Tail | None = None,
    ):
        self.device, self.host, self.fetch_pages = device, host, fetch_pages
        at = torch.device("cpu") if host else device
        self.beyond = beyond
        self.settled: list[Block] = []  # what was here when the tier was last held to its budget
        self.pages = LanePages(key_codec, value_codec, batch, heads, at, track_mass, first_position)

    @property
    def heads(self) -> int:
        return self.pages.heads

    # -- moving tokens -------------------------------------------------------------------------------------------------

    def candidates(self, rows: Sequence[int]) -> torch.Tensor:
        """Numbers of the tokens that may come back, `[L, N]`: in host memory those of pages read since last time."""
        table = self.pages.table(rows)
        if not self.host:
            return table
        page = self.pages.page_size
        for number, (block, line) in enumerate(self.pages.lines()):
            if block.lanes[line] // self.heads not in rows:
                continue
            hot = bounds_of(block).hot[line]
            if not bool(hot.all()):
                mine = (table >> LINE == number) & (table >= 0)
                table = table.masked_fill(mine & ~hot[((table & INSIDE) // page).clamp(max=len(hot) - 1)], -1)
            hot.zero_()
        return table

    def demote(
        self, pages: LanePages, rows: Sequence[int], table: torch.Tensor, copies: ExactCopies | None = None
    ) -> None:
        """Take in the tokens in `table` `[L, N]` of the tier above, which still holds them; from `copies` if there."""
        table = _left(table)
        if table.shape[1] == 0:
            return
        if not self.host:
            _pack_into(self.pages, pages, rows, table, True, copies)
            return
        pages.statistics.share_with(self.pages.statistics)  # codes keep their meaning
        block = gather_block(pages, rows, table)
        if block is not None:
            self.pages.blocks.append(with_bounds(self.pages, block.to(self.pages.device), self.device))

    def promote(
        self,
        pages: LanePages,
        rows: Sequence[int],
        table: torch.Tensor,
        copies: ExactCopies | None = None,
        to_first: bool = False,
    ) -> None:
        """Put the tokens in `table` `[L, N]` of this tier into the one above, and take them out here.

        From `copies` where there are any: as they were if they go `to_first`, the first tier.
        """
        if copies is not None and to_first:
            table = self._restore(pages, rows, table, copies)
        left = _left(table)
        if left.shape[1] == 0:
            return
        if not self.host:
            _pack_into(pages, self.pages, rows, left, False, copies)
            return
        block = gather_block(self.pages, rows, left)
        if block is not None:
            pages.blocks.append(block.to(pages.device))
        self.forget(left)

    def _restore(self, pages: LanePages, rows: Sequence[int], table: torch.Tensor, copies: ExactCopies) -> torch.Tensor:
        """Put what `copies` have of the tokens in `table` into the first tier; returns the table without those."""
        found = copies.find(rows, self.pages.look_up("positions", table, -1))
        there = found >= 0
        if not bool(there.any()):
            return table
        mass = self.pages.look_up("mass", table, 0.0) if self.pages.track_mass else None
        block = copies.take(rows, found, mass)
        if block is not None:
            pages.blocks.append(block.to(pages.device))
        return table.masked_fill(there, -1)

    def forget(self, table: torch.Tensor) -> None:
        """Drop the tokens in a table; their places stay empty until blocks are joined."""
        numbers = table[table >= 0]
        for number, (block, line) in enumerate(self.pages.lines()):
            own = numbers[numbers >> LINE == number] & INSIDE
            if len(own):
                block.positions[line, own.to(block.positions.device)] = -1
                self.pages.holes = True

    def settle(self, rows: Sequence[int], table: torch.Tensor, keep: torch.Tensor) -> None:
        """Of the rows' tokens in `table` keep those where `keep` is true; a host tier joins its blocks now and then."""
        if not self.host:
            compact(self.pages, rows, table, keep)
            return
        self.forget(table.masked_fill(keep, -1))
        if len(self.pages.blocks) > MOST_BLOCKS:
            self.join()

    def hold_to(self, rows: Sequence[int], tokens: int) -> None:
        """Drop the oldest of what a lane has in host memory beyond `tokens`."""
        table = self.pages.table(rows)
        beyond = (table >= 0).sum(1, keepdim=True) - tokens
        self.forget(table.masked_fill(torch.arange(table.shape[1]) >= beyond, -1))

    def join(self) -> None:
        """One block out of all, without empty places."""
        rows = range(self.pages.batch)
        table = self.pages.table(rows)
        compact(self.pages, rows, table, table >= 0)
        self.pages.holes = False
        self.pages.blocks = [with_bounds(self.pages, block, self.device) for block in self.pages.blocks]

    def fetch(self, queries: torch.Tensor) -> Fetched | None:
        """The pages of every lane with the highest bound on the scores of `queries` `[L, M, D]`, `fetch_pages` each."""
        return fetch(self.pages, queries, self.fetch_pages, self.device)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def map_rows(self, rows: torch.Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        self.pages.map_rows(rows)
        if self.beyond is not None:
            self.beyond.map_rows(rows)

    def chain(self) -> Iterator[Tail]:
        """This tier and those beyond it."""
        yield self
        if self.beyond is not None:
            yield from self.beyond.chain()

    @property
    def is_settled(self) -> bool:
        """Nothing has come in since the tier was last held to its budget."""
        blocks, seen = self.pages.blocks, self.settled
        return len(blocks) == len(seen) and all(one is other for one, other in zip(blocks, seen, strict=True))

    def held(self) -> list[int]:
        """Tokens of each lane; empty places do not count."""
        return (self.pages.table(range(self.pages.batch)) >= 0).sum(1).tolist()

    def tokens_held(self) -> int:
        """Tokens of all rows, on average over heads; empty places do not count."""
        return sum(int((block.positions >= 0).sum()) for block in self.pages.blocks) // self.heads

    def tensors(self) -> Iterator[torch.Tensor]:
        for tail in self.chain():
            yield from tail.pages.tensors()


def _left(table: torch.Tensor) -> torch.Tensor:
    """The entries of every row moved to its front, -1 behind them, as narrow as that allows."""
    present = table >= 0
    order = (~present).to(torch.int8).argsort(dim=1, stable=True)
    return table.gather(1, order)[:, : int(present.sum(1).max()) if len(table) else 0]


def _pack_into(
    target: LanePages,
    source: LanePages,
    rows: Sequence[int],
    table: torch.Tensor,
    renew: bool,
    copies: ExactCopies | None,
) -> None:
    """Read tokens back, from `copies` where those have them, and pack them with another store's codec."""
    page, heads = target.page_size, source.heads
    table = torch.nn.functional.pad(table, (0, -table.shape[1] % page), value=-1)
    # A place without a token repeats the first of its lane, which widens no group's range and keeps statistics sane.
    filled = torch.where(table < 0, table[:, :1], table)
    shape = (len(rows), heads)
    keys, values = (source.decode(role, filled) for role in ("key", "value"))
    if copies is not None:
        at = source.look_up("positions", filled, -1)
        keys, values = copies.overlay(rows, at, "key", keys), copies.overlay(rows, at, "value", values)
    keys, values = keys.unflatten(0, shape), values.unflatten(0, shape)
    positions = source.look_up("positions", table, -1).unflatten(0, shape)
    mass = source.look_up("mass", table, 0.0).unflatten(0, shape) if source.track_mass else None
    for i, row in enumerate(rows):
        own_mass = None if mass is None else mass[i]
        target.admit(row, keys[i : i + 1], values[i : i + 1], positions[i], own_mass, renew)
