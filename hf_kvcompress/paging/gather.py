"""Reading rows of unequal length through the block table: all entries of a layer are brought together in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..codecs.base import Packed
from ..entries import Entries, EntryRun
from .pool import BlockPool, GrowingPool, Run

if TYPE_CHECKING:
    from .pages import PagedSlab, PagedStore, Place


class Gatherer:
    """What is read of one store, as long as nothing is sealed there."""

    def __init__(self, store: PagedStore):
        self.key = key_of(store)
        self.groups: list[tuple[Entries, list[tuple[int, PagedSlab]], torch.Tensor | None]] = []
        found: dict[int, list[tuple[int, PagedSlab]]] = {}
        for slab in store.slabs:
            own = [(row, slab) for row, count in enumerate(store.counts) if count > slab.start]
            found.setdefault(slab.capacity, []).extend(own)
        for capacity, pairs in found.items():
            if pairs:
                rows, slabs = zip(*pairs, strict=True)
                held = [min(store.counts[row] - slab.start, capacity) for row, slab in pairs]
                entries = Entries([*rows], [slab.start for slab in slabs], held, capacity, store.device)
                runs = [slab.table[row] for row, slab in pairs]
                self.groups.append((entries, pairs, block_index(store.pool, runs)))

    def runs(self, store: PagedStore) -> list[EntryRun]:
        """The entries with what they hold."""
        found = []
        for entries, pairs, index in self.groups:
            reader = _Reader(store.pool, [slab.table[row] for row, slab in pairs], index)
            packed: dict[str, Packed] = {}
            for role, places in pairs[0][1].places.items():
                packed[role] = {name: reader.field(place) for name, place in places.items()}
                for name in pairs[0][1].statistics[role]:
                    packed[role][name] = torch.stack([slab.statistics[role][name][row] for row, slab in pairs])
            found.append(EntryRun(entries, packed["key"], packed["value"]))
        return found


def key_of(store: PagedStore) -> tuple[object, ...]:
    """What a `Gatherer` depends on."""
    return (store.version, store.pool.moves, *store.counts, *map(id, store.slabs))


def block_index(pool: BlockPool, runs: Sequence[Run]) -> torch.Tensor | None:
    """Numbers of the blocks of runs that are equally long, `[len(runs), count]`; None where each has its own memory."""
    if isinstance(pool, GrowingPool):
        return None
    first = torch.tensor([run.first for run in runs])[:, None]
    return (first + torch.arange(runs[0].count)).to(pool.device)


class _Reader:
    """Copies fields of entries out of a pool: alone where they fill blocks, else with all of the entry."""

    def __init__(self, pool: BlockPool, runs: Sequence[Run], index: torch.Tensor | None):
        self.pool, self.runs, self.index = pool, runs, index

    def field(self, place: Place) -> torch.Tensor:
        """A field of all entries, `[E, H, 1, ...]`."""
        size = self.pool.block_bytes
        if self.index is None or place.start % size or place.nbytes % size:
            part = self._whole[:, place.start : place.start + place.nbytes]
        else:
            part = self._blocks(self.index[:, place.start // size : (place.start + place.nbytes) // size])
        return part.view(place.dtype).view(len(self.runs), *place.shape)

    @cached_property
    def _whole(self) -> torch.Tensor:
        if self.index is None:
            return torch.stack([self.pool.bytes_of(run) for run in self.runs])
        return self._blocks(self.index)

    def _blocks(self, index: torch.Tensor) -> torch.Tensor:
        words = self.pool.memory.view(torch.int64) if self.pool.block_bytes % 8 == 0 else self.pool.memory
        picked = words.view(self.pool.blocks, -1).index_select(0, index.flatten())
        return picked.view(len(self.runs), -1).view(torch.uint8)
