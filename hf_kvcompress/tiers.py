"""Demote before delete: tokens below the line move to a cheaper codec or to host memory, and may come back.

The tail of a layer is a second store of lanes. With a codec of its own its tokens are attended to like all others, in
fewer bits. In host memory they keep their codes; every page there leaves the least and the largest number of each key
channel behind, from which follows a bound on any query's score (Quest, arXiv 2406.10774), and a pass reads the pages
whose bound is highest. Pages that were read compete for a place in the first tier when the layer next evicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .blocks import Block
from .codecs.base import Codec, Packed
from .compaction import compact, gather_block
from .lanes import INSIDE, LINE, LanePages

MOST_BLOCKS = 16  # of a host tier, before they are joined


@dataclass
class Fetched(Block):
    """Pages read from host memory for one pass, a line each; what they receive is credited where they came from."""

    origin: list[tuple[Block, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def note_read(self) -> None:
        """Let the pages compete for a place in the first tier when the layer next evicts."""
        for block, lines, pages in self.origin:
            _bounds(block).hot[lines, pages] = True

    def credit(self, mass: torch.Tensor) -> None:
        first = 0
        for block, lines, pages in self.origin:
            assert block.mass is not None
            own = mass[first : first + len(lines)].to(block.mass.device)
            block.mass.unflatten(1, (-1, own.shape[1]))[lines, pages] += own
            first += len(lines)


@dataclass
class Bounds:
    """Least and largest key of every page of a block `[n, pages, D]`, where queries are, and which were read lately."""

    low: torch.Tensor
    high: torch.Tensor
    hot: torch.Tensor  # [n, pages] booleans, on the host

    def select(self, lines: torch.Tensor) -> Bounds:
        low, high = (x.index_select(0, lines.to(x.device)) for x in (self.low, self.high))
        return Bounds(low, high, self.hot.index_select(0, lines.cpu()))


@dataclass
class HostBlock(Block):
    """Lines in host memory, with the bounds of their pages."""

    bounds: Bounds | None = None

    def select(self, lines: Sequence[int], lanes: list[int]) -> HostBlock:
        index = torch.tensor(lines, dtype=torch.long)
        return HostBlock(**vars(super().select(lines, lanes)), bounds=_bounds(self).select(index))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from super().tensors()
        bounds = _bounds(self)
        yield from (bounds.low, bounds.high, bounds.hot)


def _bounds(block: Block) -> Bounds:
    assert isinstance(block, HostBlock) and block.bounds is not None
    return block.bounds


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
            hot = _bounds(block).hot[line]
            if not bool(hot.all()):
                mine = (table >> LINE == number) & (table >= 0)
                table = table.masked_fill(mine & ~hot[((table & INSIDE) // page).clamp(max=len(hot) - 1)], -1)
            hot.zero_()
        return table

    def demote(self, pages: LanePages, rows: Sequence[int], table: torch.Tensor) -> None:
        """Take in the tokens in `table` `[L, N]` of the first tier, which still holds them."""
        table = _left(table)
        if table.shape[1] == 0:
            return
        if not self.host:
            _pack_into(self.pages, pages, rows, table, renew=True)
            return
        pages.statistics.share_with(self.pages.statistics)  # codes keep their meaning
        block = gather_block(pages, rows, table)
        if block is not None:
            self.pages.blocks.append(self._with_bounds(block.to(self.pages.device)))

    def promote(self, pages: LanePages, rows: Sequence[int], table: torch.Tensor) -> None:
        """Put the tokens in `table` `[L, N]` of this tier into the first one, and take them out here."""
        left = _left(table)
        if left.shape[1] == 0:
            return
        if not self.host:
            _pack_into(pages, self.pages, rows, left, renew=False)
            return
        block = gather_block(self.pages, rows, left)
        if block is not None:
            pages.blocks.append(block.to(pages.device))
        self.forget(left)

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
        self.pages.blocks = [self._with_bounds(block) for block in self.pages.blocks]

    # -- host tier: bounds and reading ---------------------------------------------------------------------------------

    def _with_bounds(self, block: Block) -> HostBlock:
        keys = self.pages.codecs["key"].decode(self.pages.packed(block, "key")).flatten(1, 3)  # [n, capacity, D]
        empty = (block.positions < 0)[..., None]
        page = self.pages.page_size
        low, high = (keys.masked_fill(empty, value).unflatten(1, (-1, page)) for value in (float("inf"), float("-inf")))
        hot = torch.zeros(len(block.lanes), block.capacity // page, dtype=torch.bool)
        low, high = (_outwards(x, sign).to(self.device) for x, sign in ((low.amin(2), -1), (high.amax(2), 1)))
        return HostBlock(**vars(block), bounds=Bounds(low, high, hot))

    def fetch(self, queries: torch.Tensor) -> Fetched | None:
        """The pages of every lane with the highest bound on the scores of `queries` `[L, M, D]`, `fetch_pages` each."""
        if not self.pages.blocks or not self.fetch_pages:
            return None
        scores, lanes, where = [], [], []
        for number, block in enumerate(self.pages.blocks):
            bounds, own = _bounds(block), queries[block.index("lanes").to(queries.device)]
            low, high = bounds.low.float(), bounds.high.float()
            empty = (low > high).any(-1)
            low, high = low.masked_fill(empty[..., None], 0), high.masked_fill(empty[..., None], 0)
            most = own.clamp(min=0) @ high.mT + own.clamp(max=0) @ low.mT  # [n, M, pages]
            scores.append(most.amax(1).masked_fill(empty, float("-inf")).flatten().cpu())
            lines, pages = (x.flatten() for x in torch.meshgrid(*map(torch.arange, empty.shape), indexing="ij"))
            lanes.append(torch.tensor(block.lanes)[lines])
            where.append(torch.stack([torch.full_like(lines, number), lines, pages], dim=1))
        chosen = _best_of_each(torch.cat(scores), torch.cat(lanes), self.fetch_pages)
        return self._read(torch.cat(where)[chosen])

    def _read(self, where: torch.Tensor) -> Fetched | None:
        """Copy pages `(block, line, page)`, sorted by block, to where the model is."""
        page, parts, origin, positions = self.pages.page_size, [], [], []
        lanes: list[int] = []
        epochs: list[int] = []
        for number in where[:, 0].unique().tolist():
            block = self.pages.blocks[number]
            lines, pages = where[where[:, 0] == number, 1:].unbind(1)
            origin.append((block, lines, pages))
            packed = {
                role: _pages_of(codec, block.packed[role], lines, pages, page)
                for role, codec in self.pages.codecs.items()
            }
            lanes += [block.lanes[line] for line in lines.tolist()]
            epochs += [block.epochs[line] for line in lines.tolist()]
            positions.append(block.positions.unflatten(1, (-1, page))[lines, pages])
            parts.append(packed)
        if not parts:
            return None
        packed = {
            role: {name: torch.cat([part[role][name] for part in parts]).to(self.device) for name in parts[0][role]}
            for role in self.pages.codecs
        }
        at = torch.cat(positions).to(self.device)
        return Fetched(lanes, epochs, [page] * len(lanes), page, packed, at, None, origin=origin)

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


def _outwards(bound: torch.Tensor, sign: int) -> torch.Tensor:
    """A float32 bound in bfloat16, rounded away from what it bounds: up for sign 1, down for -1."""
    rounded = bound.to(torch.bfloat16)
    short = (bound - rounded.float()) * sign > 0
    return torch.where(short, torch.nextafter(rounded, torch.full_like(rounded, sign * torch.inf)), rounded)


def _left(table: torch.Tensor) -> torch.Tensor:
    """The entries of every row moved to its front, -1 behind them, as narrow as that allows."""
    present = table >= 0
    order = (~present).to(torch.int8).argsort(dim=1, stable=True)
    return table.gather(1, order)[:, : int(present.sum(1).max()) if len(table) else 0]


def _pack_into(target: LanePages, source: LanePages, rows: Sequence[int], table: torch.Tensor, renew: bool) -> None:
    """Read tokens back and pack them with another store's codec."""
    page, heads = target.page_size, source.heads
    table = torch.nn.functional.pad(table, (0, -table.shape[1] % page), value=-1)
    # A place without a token repeats the first of its lane, which widens no group's range and keeps statistics sane.
    filled = torch.where(table < 0, table[:, :1], table)
    shape = (len(rows), heads)
    keys, values = (source.decode(role, filled).unflatten(0, shape) for role in ("key", "value"))
    positions = source.look_up("positions", table, -1).unflatten(0, shape)
    mass = source.look_up("mass", table, 0.0).unflatten(0, shape) if source.track_mass else None
    for i, row in enumerate(rows):
        own_mass = None if mass is None else mass[i]
        target.admit(row, keys[i : i + 1], values[i : i + 1], positions[i], own_mass, renew)


def _best_of_each(scores: torch.Tensor, groups: torch.Tensor, number: int) -> torch.Tensor:
    """Indices, rising, of the `number` highest finite scores of each group."""
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    own = groups[order]
    rank = torch.arange(len(own)) - torch.searchsorted(own, own)
    return order[(rank < number) & (scores[order] > float("-inf"))].sort().values


def _pages_of(codec: Codec, packed: Packed, lines: torch.Tensor, pages: torch.Tensor, page: int) -> Packed:
    """Single pages of a block as lines of their own, packed as they are."""
    picked = {}
    for name, kind in codec.fields.items():
        if kind.tokens is None:
            continue
        units = page // kind.tokens
        if kind.tokens_last:
            picked[name] = packed[name].unflatten(-1, (-1, units)).movedim(-2, 1)[lines, pages]
        else:
            picked[name] = packed[name].unflatten(1, (-1, units))[lines, pages]
    return picked
