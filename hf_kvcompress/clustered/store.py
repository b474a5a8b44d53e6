"""The sealed pages of one layer of a clustered cache: a `PageStore` whose slabs share pages where that pays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..codecs.base import Packed
from ..pages import PageStore
from .attending import FEW, Shared
from .choice import examine
from .frozen import SharedSlab, collect
from .pool import Move, entries_of
from .residual import plain_bytes
from .search import Pass
from .shared import Sharing

ROLES = ("key", "value")


class _Statistics:
    """Stands for the slab before: what a further slab of the same segment begins with."""

    def __init__(self, slab: SharedSlab):
        self.packed = slab.packed


class SharedRun:
    """How a run of shared pages is attended to: packed where queries are few, else block by block, decoded."""

    def __init__(self, pages: ClusteredPages, slab: SharedSlab, role: str, tokens: int):
        self.pages, self.slab, self.role, self.tokens = pages, slab, role, tokens

    def _decode(self) -> torch.Tensor:
        return self.pages.decode(self.role, self.slab, self.tokens)

    def scores(self, q: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`q @ keys.mT`, `[B, H, M, tokens]`."""
        shared = self._packed(q)
        return q @ self._decode().mT if shared is None else shared.scores(q)

    def _packed(self, rows: torch.Tensor) -> Shared | None:
        shared = Shared(self.pages, self.slab, self.role, self.tokens)
        return shared if rows.shape[2] <= FEW and shared.is_read_packed else None

    def mix(self, p: torch.Tensor, packed: Packed) -> torch.Tensor:
        """`p @ values`, `[B, H, M, D]`."""
        shared = self._packed(p)
        return p @ self._decode() if shared is None else shared.mix(p)


class ClusteredPages(PageStore):
    """Pages that are stored plain, as a reference, or as a difference.

    Args:
        sharing: what the layers share, and the rotation of the keys.
        layer: the layer's number.
        begins: position of a row's first token.
        rest: as for `PageStore`. With segments of one length, those of a sliding window, bases stand in the slab of
            their members, which leaves the window as a whole.
    """

    plain_slabs = False

    def __init__(self, sharing: Sharing, layer: int, begins: Callable[[int], int], *rest: Any):
        super().__init__(*rest)
        self.clusters, self.rotary, self.layer = sharing.clusters, sharing.rotary, layer
        self.begins = begins
        self.local = self.segment_length is not None
        self.index = self.clusters.index_for(layer, len(self.counts))
        self.hashes: dict[str, dict[int, torch.Tensor]] = {role: {} for role in ROLES}  # by slab, `[B, H, P]`
        self.newest: list[torch.Tensor | None] | None = None  # queries of the pass in flight, by row
        self._pass: Pass | None = None

    @property
    def feeds(self) -> bool:
        """This layer's values say where the text repeats."""
        return self.index.feeder == self.layer

    @property
    def shares(self) -> bool:
        """Some pages are not plain."""
        return any(isinstance(slab, SharedSlab) for slab in self.slabs)

    @property
    def moves(self) -> dict[str, Move | None]:
        """What brings a span of each role to another place."""
        return {"key": self._move if self.rotary is not None else None, "value": None}

    def _move(self, pages: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        assert self.rotary is not None
        there = self.rotary.apply(pages, shift[:, None].float())
        scaled = getattr(self.rotary, "scaling", 1.0) != 1.0  # yarn's factor is in the keys already
        return self.rotary.undo(there, shift.new_zeros(1, 1).float()) if scaled else there

    # -- writing -------------------------------------------------------------------------------------------------------

    def note(self, rows: Sequence[int], start: int, values: torch.Tensor) -> None:
        """Show the index the values `[len(rows), H, n, D]` of tokens from number `start` on, sinks counted."""
        if self.feeds:
            self.index.note(rows, start, values)

    def seal(self, rows: Sequence[int], keys: torch.Tensor, values: torch.Tensor, tokens: int, *queries: Any) -> None:
        """Pack as a `PageStore` does, then share what can be shared of the new pages."""
        exact = {"key": keys[:, :, :tokens], "value": values[:, :, :tokens]}
        newest = [own for row in rows if self.newest is not None and (own := self.newest[row]) is not None]
        shown = newest if len(newest) == len(rows) else None
        self._pass = Pass(list(rows), self.counts[rows[0]], tokens, exact, queries[0] if queries else None, shown)
        super().seal(rows, keys, values, tokens, *queries)
        self._pass = None

    def _seal_in(self, slab: Any, before: Any, index: slice | torch.Tensor, low: int, tokens: int, *rest: Any) -> None:
        assert self._pass is not None
        number = next(place for place, own in enumerate(self.slabs) if own is slab)
        if isinstance(slab, SharedSlab):
            self._seal_behind(slab, index, low, tokens, *rest)
        else:
            super()._seal_in(slab, before, index, low, tokens, *rest)
        for row in self._pass.rows:
            self.counts[row] = low + tokens  # later slabs of this pass may refer to these tokens
        examine(self, self._pass, number, low, tokens)

    def _seal_behind(self, slab: SharedSlab, index: slice | torch.Tensor, low: int, tokens: int, *rest: Any) -> None:
        """Pack into room of its own, as a further slab of the segment, and add the pages to the shared ones."""
        assert self._pass is not None
        fresh = self._empty_slab(low, tokens)
        super()._seal_in(fresh, _Statistics(slab), index, low, tokens, *rest)  # type: ignore[arg-type]
        rows = torch.tensor(self._pass.rows, device=self.device)
        for role, codec in self.codecs.items():
            pool, packed = slab.pools[role], fresh.packed(role)
            if low == self.segment_of(low)[0]:
                pool.begin(rows, {name: packed[name][rows] for name in codec.statistics})
            entries = {name: t[rows] for name, t in entries_of(codec, packed, self.page_size).items()}
            pool.add_plain(rows, (low - slab.start) // self.page_size, entries)

    def share(self, number: int) -> SharedSlab:
        """The slab with this number, made a shared one if it is not."""
        slab: Any = self.slabs[number]
        if isinstance(slab, SharedSlab):
            return slab
        filled = [min(max(count - slab.start, 0), slab.capacity) for count in self.counts]
        shared = SharedSlab.of(slab, self.codecs, self.page_size, filled, self.moves, self.first)
        self.slabs[number] = shared  # type: ignore[call-overload]
        return shared

    def make_shared_slab(self, start: int, capacity: int) -> SharedSlab:
        """Add an empty shared slab, for what was saved."""
        empty = self._empty_slab(start, capacity)
        shared = SharedSlab.of(empty, self.codecs, self.page_size, [], self.moves, self.first)
        self.slabs.append(shared)  # type: ignore[arg-type]
        return shared

    def settle(self) -> None:
        """Give back what nothing needs any more."""
        collect(self.slabs, ROLES)

    # -- reading -------------------------------------------------------------------------------------------------------

    def decode(self, role: str, slab: Any, tokens: int) -> torch.Tensor:
        """Read back the first `tokens` tokens of a slab, `[B, H, tokens, D]` float32."""
        return self.decode_from(role, slab, 0, tokens)

    def decode_from(self, role: str, slab: Any, start: int, tokens: int) -> torch.Tensor:
        """Read back the tokens `start .. tokens` of a slab, `start` being the first of a page."""
        if isinstance(slab, SharedSlab):
            return slab.decode(role, self.slabs, tokens, start)
        return super().decode(role, slab, tokens)[:, :, start:]

    def run_of(self, slab: SharedSlab, tokens: int) -> dict[str, Any]:
        """What attention asks for scores and mixed values of a shared slab."""
        return {role: SharedRun(self, slab, role, tokens) for role in ROLES}

    # -- rows and tokens -----------------------------------------------------------------------------------------------

    def map_rows(self, rows: torch.Tensor) -> None:
        shared = {number: slab for number, slab in enumerate(self.slabs) if isinstance(slab, SharedSlab)}
        lost = len(set(rows.tolist())) < len(self.counts)
        self.slabs = [slab for slab in self.slabs if not isinstance(slab, SharedSlab)]
        super().map_rows(rows)
        for number, slab in shared.items():
            self.slabs.insert(number, slab)  # type: ignore[arg-type]
            for pool in slab.pools.values():
                pool.map_rows(rows.to(self.device))
        for table in self.hashes.values():
            table.update({start: own[rows] for start, own in table.items()})
        if self.feeds:
            self.index.map_rows(rows.tolist())
        if lost:
            self.settle()

    def drop_before(self, token: int) -> None:
        super().drop_before(token)
        self._forget_hashes()

    def truncate(self, row: int, tokens: int) -> None:
        super().truncate(row, tokens)
        for slab in self.slabs:
            if isinstance(slab, SharedSlab):
                first = max(tokens - slab.start, 0) // self.page_size
                for pool in slab.pools.values():
                    pool.table[row, :, first:] = -1
        self._forget_hashes()
        if self.shares:
            self.settle()

    def _forget_hashes(self) -> None:
        starts = {slab.start for slab in self.slabs}
        for table in self.hashes.values():
            for start in set(table) - starts:
                del table[start]

    # -- what is there -------------------------------------------------------------------------------------------------

    def shared_pages(self, role: str, slab: Any) -> torch.Tensor:
        """Pages that are stored by another one, `[B, H, P]`."""
        if isinstance(slab, SharedSlab):
            return slab.pools[role].is_shared
        return torch.zeros(len(self.counts), self.heads, slab.capacity // self.page_size, dtype=torch.bool)

    def contents(self) -> dict[str, Any]:
        """Pages by kind, differences by bits, and bytes saved against the plain codec; waits for the device."""
        kinds: dict[str, Any] = {"plain": 0, "references": 0, "differences": 0}
        bits: Counter[int] = Counter()
        saved: dict[str, float] = dict.fromkeys(ROLES, 0.0)
        for slab in self.slabs:
            filled = [min(max(count - slab.start, 0), slab.capacity) // self.page_size for count in self.counts]
            pages = sum(filled) * self.heads
            for role, codec in self.codecs.items():
                if not isinstance(slab, SharedSlab):
                    kinds["plain"] += pages
                    continue
                pool, full = slab.pools[role], plain_bytes(codec, self.page_size)
                members = {number: len(group.shift) for number, group in enumerate(pool.groups)}
                for number, group in enumerate(pool.groups):
                    bits[group.nbits] += members[number]
                kinds["differences"] += sum(members.values())
                kinds["references"] += pages - len(pool.plain_statistics) - sum(members.values())
                kinds["plain"] += len(pool.plain_statistics)
                saved[role] += pages * full - sum(t.nbytes for t in pool.tensors() if t is not pool.owners)
                saved[role] += sum(t.nbytes for t in pool.statistics.values())
        return {**kinds, "bits": dict(bits), "saved_by_role": saved, "saved": sum(saved.values())}

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _bookkeeping(self) -> Iterator[torch.Tensor]:
        for table in self.hashes.values():
            yield from table.values()

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from super().tensors()
        yield from self._bookkeeping()

    @property
    def borrowed_bytes(self) -> int:
        """Bytes that can be reached from here and are another layer's."""
        return 0 if self.feeds else self.index.nbytes

    def used_bytes(self) -> int:
        everything = self.slabs
        self.slabs = [slab for slab in everything if not isinstance(slab, SharedSlab)]
        try:
            total = super().used_bytes()
        finally:
            self.slabs = everything
        total += sum(slab.nbytes for slab in everything if isinstance(slab, SharedSlab))
        return total + sum(t.nbytes for t in self._bookkeeping())
