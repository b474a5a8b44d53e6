"""Sealed pages in blocks of a pool: a slab is an entry of blocks for every row, shared until somebody writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..codecs.base import Codec, Packed
from ..entries import EntryRun
from ..pages import PageStore, Slab
from .gather import Gatherer, key_of
from .pool import BlockPool, PoolFullError, Run
from .tables import BlockTable

ENTRY_LENGTH = 64  # tokens of an entry at most: what a row wastes, or copies of a shared one, is less
ALIGN = 64  # bytes that fields of a row begin at multiples of


@dataclass(frozen=True)
class Place:
    """Where a field is in a row's entry: bytes from `start` on, a tensor of `shape` and `dtype`."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def layout(codecs: dict[str, Codec], heads: int, capacity: int) -> tuple[dict[str, dict[str, Place]], int]:
    """Where the fields of tokens are in one row's entry of a slab, and the bytes of the entry."""
    places: dict[str, dict[str, Place]] = {}
    at = 0
    for role, codec in codecs.items():
        places[role] = {}
        for name, field in codec.fields.items():
            if field.tokens is not None:
                place = Place(at, field.stored_shape((heads, 1), capacity), field.dtype)
                places[role][name] = place
                at += -(-place.nbytes // ALIGN) * ALIGN
    return places, at


class PagedSlab(Slab):
    """A slab whose tokens are in blocks, an entry of the table for every row; statistics are tensors of their own.

    `keys` and `values` are views of the blocks where the rows lie evenly, as those of a new batch, of one row, or of
    one row held many times do. Else they are gathered, whenever they are asked for.
    """

    def __init__(self, start: int, capacity: int, table: BlockTable, codecs: dict[str, Codec], heads: int, rows: int):
        self.start, self.capacity, self.table, self.codecs, self.heads = start, capacity, table, codecs, heads
        self.places, _ = layout(codecs, heads, capacity)
        self.statistics: dict[str, Packed] = {
            role: {
                name: torch.zeros((rows, heads, 1, *codec.fields[name].shape), dtype=codec.fields[name].dtype)
                for name in codec.statistics
            }
            for role, codec in codecs.items()
        }
        self._views: dict[str, Packed] = {}
        self._moves = -1

    @property
    def keys(self) -> Packed:  # type: ignore[override]
        return self.packed("key")

    @property
    def values(self) -> Packed:  # type: ignore[override]
        return self.packed("value")

    def packed(self, role: str) -> Packed:
        """All fields `[B, H, 1, ...]`."""
        if self._moves != self.table.pool.moves:
            self.renew()
        if role not in self._views:
            even = self.stride() is not None
            fields = {name: self._joined(place, even) for name, place in self.places[role].items()}
            found = {**fields, **self.statistics[role]}
            if not even:
                return found
            self._views[role] = found
        return self._views[role]

    def renew(self) -> None:
        """Forget views: the table has changed or the blocks have moved."""
        self._views, self._moves = {}, self.table.pool.moves

    def row(self, row: int, place: Place) -> torch.Tensor:
        """A field of one row, `[H, 1, ...]`, as it is in the blocks."""
        data = self.table.read(row)[place.start : place.start + place.nbytes]
        return data.view(place.dtype).view(place.shape)

    def stride(self) -> int | None:
        """Bytes from each row's entry to the next one's, if that is the same for all of them."""
        pool, runs = self.table.pool, list(self.table)
        if len(runs) == 1:
            return 0
        first = pool.bytes_of(runs[0])
        starts = [pool.bytes_of(run) for run in runs]
        if len({own.untyped_storage().data_ptr() for own in starts}) > 1:
            return None
        at = [own.storage_offset() for own in starts]
        step = at[1] - at[0]
        even = step >= 0 and all(b - a == step for a, b in zip(at, at[1:], strict=False))
        return int(step) if even and first.numel() else None

    def _joined(self, place: Place, even: bool) -> torch.Tensor:
        rows = len(self.table)
        if not even:
            return torch.stack([self.row(row, place) for row in range(rows)])
        first, step = self.row(0, place), self.stride() or 0
        strides = (step // place.dtype.itemsize, *first.stride())
        return first.as_strided((rows, *place.shape), strides)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": {}, "_moves": -1}  # views are of this table's blocks

    def storages_held(self) -> dict[Any, int]:
        """What `tensor_bytes` counts."""
        own = [t.untyped_storage() for packed in self.statistics.values() for t in packed.values()]
        return {**self.table.storages_held(), **{("statistics", s.data_ptr()): s.nbytes() for s in own}}


class PagedStore(PageStore):
    """A `PageStore` whose slabs are in a pool. Rows that are copied share their blocks until one of them seals.

    Args:
        pool: where the blocks are from.
        rest: as for `PageStore`.
    """

    plain_slabs = True
    gathers = True
    slabs: list[PagedSlab]  # type: ignore[assignment]

    def __init__(self, pool: BlockPool, *rest: Any):
        super().__init__(*rest)
        self.pool = pool
        self.version = 0  # goes up when a table changes
        self._gatherer: Gatherer | None = None
        self.spare = BlockTable(pool)  # taken before a pass begins
        self.undo: Callable[[], None] | None = None  # of what the pass in flight has changed, if it finds no room
        self._sealing: Sequence[int] = range(len(self.counts))

    @classmethod
    def of(cls, store: PageStore, pool: BlockPool) -> PagedStore:
        """An empty store like an empty one."""
        rest = (store.codecs["key"], store.codecs["value"], len(store.counts), store.heads, store.device)
        made = cls(pool, *rest, store.segment_length)
        made.__dict__.update({name: value for name, value in vars(store).items() if name not in ("slabs", "codecs")})
        return made

    def _add_slab(self, start: int, tokens: int) -> None:
        # All rows of all caches cut at the same tokens, so that they can be joined.
        self.make_slab(start, min(ENTRY_LENGTH, self.segment_of(start)[1] - start))

    def make_slab(self, start: int, capacity: int) -> None:
        """Add an empty slab of `capacity` tokens from token number `start` on, with blocks for rows that seal."""
        count = self.pool.blocks_for(layout(self.codecs, self.heads, capacity)[1])
        rows = set(self._sealing) & set(range(len(self.counts)))
        own = iter(self._take_rows(len(rows), count))
        runs = [next(own) if row in rows else self.pool.hold_empty(count) for row in range(len(self.counts))]
        table = BlockTable(self.pool, runs)
        slab = PagedSlab(start, capacity, table, self.codecs, self.heads, len(self.counts))
        for packed in slab.statistics.values():
            packed.update({name: t.to(self.device) for name, t in packed.items()})
        self.slabs.append(slab)
        self.version += 1

    def _take_rows(self, rows: int, count: int) -> list[Run]:
        found: list[Run] = []
        while len(found) < rows and (run := self.spare.hand_over(count)) is not None:
            found.append(run)
        return found + self.pool.take_rows(rows - len(found), count) if len(found) < rows else found

    def reserve(self, runs: Mapping[int, int], empties: Iterable[int]) -> None:
        """Take so many runs of each number of blocks now. Raises PoolFullError, and takes none, without the room."""
        made = [run for count, number in runs.items() if number for run in self.pool.take_rows(number, count)]
        made += [self.pool.hold_empty(count) for count in empties]
        self.spare = BlockTable(self.pool, made)

    # -- reading -------------------------------------------------------------------------------------------------------

    def entries(self) -> list[EntryRun] | None:
        """All that the rows hold, read through the block table; None where slabs are read as they lie."""
        if any(codec.wants_positions for codec in self.codecs.values()):
            return None
        if self._gatherer is None or self._gatherer.key != key_of(self):
            self._gatherer = Gatherer(self)
        return self._gatherer.runs(self)

    # -- writing -------------------------------------------------------------------------------------------------------

    def seal(self, rows: Sequence[int], *tokens: Any, **more: Any) -> None:
        """Pack tokens behind what the rows hold; other rows get no blocks for it."""
        self._sealing = rows
        try:
            super().seal(rows, *tokens, **more)
            if all(map(self.pool.is_empty, self.spare)):  # nothing more will be sealed in this pass
                self.spare.clear()
        except PoolFullError:
            if self.undo is not None:
                self.undo()
            raise
        finally:
            self._sealing = range(len(self.counts))

    def _seal_in(
        self, slab: Slab, before: Slab | None, index: slice | torch.Tensor, low: int, tokens: int, *rest: Any
    ) -> None:
        """Pack into rows' own blocks: what others hold as well is copied first."""
        assert isinstance(slab, PagedSlab)
        rows = range(len(self.counts)) if isinstance(index, slice) else index.tolist()
        self._own(slab, rows)
        if slab.stride() is not None:
            super()._seal_in(slab, before, index, low, tokens, *rest)
            return
        gathered = Slab(slab.start, slab.capacity, slab.packed("key"), slab.packed("value"))
        super()._seal_in(gathered, before, index, low, tokens, *rest)
        for role, places in slab.places.items():
            for name, place in places.items():
                for row in rows:
                    slab.row(row, place).copy_(gathered.packed(role)[name][row])

    def _own(self, slab: PagedSlab, rows: Sequence[int]) -> None:
        """Give rows blocks that nobody else holds."""
        held = list(slab.table)
        for row in rows:
            slab.table.write(row, self.spare)
        if any(now is not before for now, before in zip(slab.table, held, strict=True)):
            slab.renew()
            self.version += 1

    def write(self, slab: Slab, role: str, name: str, unit: int, data: torch.Tensor) -> None:
        """Copy packed entries `data` of a field into a slab, from entry number `unit` on."""
        assert isinstance(slab, PagedSlab)
        self._own(slab, range(len(self.counts)))
        last = self.codecs[role].fields[name].tokens_last
        for row, own in enumerate(data):
            part = slab.row(row, slab.places[role][name])
            axis = part.dim() - 1 if last else 2
            part.narrow(axis, unit, own.shape[axis]).copy_(own)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def map_rows(self, rows: torch.Tensor) -> None:
        """Make row i of the store what row `rows[i]` was: blocks are shared, not copied."""
        order, index = rows.tolist(), rows.to(self.device)
        self.counts = [self.counts[row] for row in order]
        self._sealing = range(len(order))
        self.version += 1
        self._gatherer = None  # it would hold what goes now
        for slab in self.slabs:
            slab.table.map(order)
            for packed in slab.statistics.values():
                packed.update({name: t.index_select(0, index) for name, t in packed.items()})
            slab.renew()
        for history in self.histories.values():
            history.update({name: t.index_select(0, index) for name, t in history.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "spare": BlockTable(self.pool), "undo": None, "_gatherer": None}  # are of one pass

    def drop_before(self, token: int) -> None:
        """Give back the slabs that end at or before token number `token`."""
        if self.slabs and self.slabs[0].end <= token:
            self._gatherer = None
        super().drop_before(token)

    def truncate(self, row: int, tokens: int) -> None:
        """Forget a row's tokens from number `tokens` on (a multiple of the page size)."""
        self._gatherer = None
        super().truncate(row, tokens)

    def tensors(self) -> Iterator[torch.Tensor]:
        """The slabs, which count themselves, and the histories."""
        yield from self.slabs  # type: ignore[misc]
        for history in self.histories.values():
            yield from history.values()
