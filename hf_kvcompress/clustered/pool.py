"""The pages of one role in a slab whose pages are shared: each kind in tensors of exactly its size, and a table.

A page of one row and head is an entry of a group: group 0 holds pages of the plain codec, every further group those of
one number of bits and one distance to the slab of their bases. The table says which entry each page reads; several may
read one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..codecs.base import Codec, Packed
from .residual import decode_page, into_basis

INDEX_BITS = 20
INDEX = (1 << INDEX_BITS) - 1
EMPTY = -1
_SAME = 4096  # pages of a slab of which all pairs are looked at
Move = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # pages `[M, n, D]` and how far `[M]` they are moved


@dataclass
class Members:
    """Pages coded against spans of plain pages of the slab `back` places before.

    base `[m, 3]`: the entries of the two pages that the span lies in, and where in the first one it begins; shift
    `[m]`: tokens from the span to the page; statistics `[m]`: rows of the pool's; packed: residuals, an entry a page.
    """

    nbits: int
    back: int
    base: torch.Tensor
    shift: torch.Tensor
    statistics: torch.Tensor
    packed: Packed = field(default_factory=dict)

    def select(self, index: torch.Tensor) -> Members:
        """Some of the pages."""
        packed = {name: t[index] for name, t in self.packed.items()}
        return Members(self.nbits, self.back, self.base[index], self.shift[index], self.statistics[index], packed)

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.base, self.shift, self.statistics, *self.packed.values())


def narrow(numbers: torch.Tensor) -> torch.Tensor:
    """Whole numbers in 16 bits where they fit."""
    fits = not numbers.numel() or int(numbers.max()) < 1 << 15
    return numbers.to(torch.int16 if fits else torch.int32)


def entries_of(codec: Codec, packed: Packed, page: int) -> Packed:
    """The fields of tokens of a slab, `[B, H, 1, ...]`, page by page: `[B, H, P, ...]`."""
    found = {}
    for name, kind in codec.fields.items():
        if kind.tokens is None:
            continue
        units, tensor = page // kind.tokens, packed[name].squeeze(2)
        if kind.tokens_last:
            found[name] = tensor.unflatten(-1, (-1, units)).movedim(-2, 2)
        else:
            found[name] = tensor.unflatten(2, (-1, units))
    return found


class Pool:
    """One role of a slab.

    Args:
        codec: the plain codec.
        page: tokens of a page.
        statistics: its fields of a whole segment, `[B, H, 1, ...]`.
        shape: B, H and the pages of the slab.
        move: turns keys to where they are read; None where nothing is to be turned.
        first: where the slab's first token stands in its row, for a codec that asks.
    """

    def __init__(
        self,
        codec: Codec,
        page: int,
        statistics: Packed,
        shape: tuple[int, int, int],
        device: torch.device,
        move: Move | None,
        first: int = 0,
    ):
        batch, heads, pages = shape
        self.codec, self.page, self.move, self.device, self.first = codec, page, move, device, first
        self.statistics = {name: t.flatten(0, 2).clone() for name, t in statistics.items()}
        self.owners = narrow(torch.arange(batch * heads, device=device)).view(batch, heads)
        self.table = torch.full((batch, heads, pages), EMPTY, dtype=torch.int32, device=device)
        self.plain: Packed = {}
        self.plain_statistics = torch.empty(0, dtype=torch.int16, device=device)
        #: page number of each plain page, for a codec that asks for positions
        self.plain_pages = torch.empty(0, dtype=torch.int16, device=device) if codec.wants_positions else None
        self.groups: list[Members] = []

    # -- writing -------------------------------------------------------------------------------------------------------

    def begin(self, rows: torch.Tensor, statistics: Packed) -> None:
        """Statistics `[R, H, 1, ...]` of rows that begin the segment only now."""
        if not self.statistics:
            return
        held = len(next(iter(self.statistics.values())))
        new = {name: t.flatten(0, 2) for name, t in statistics.items()}
        self.statistics = {name: torch.cat([t, new[name]]) for name, t in self.statistics.items()}
        own = torch.arange(held, held + len(rows) * self.owners.shape[1], device=self.device)
        owners = self.owners.long()
        owners[rows] = own.view(len(rows), -1)
        self.owners = narrow(owners)

    def add_plain(self, rows: torch.Tensor, first: int, entries: Packed) -> None:
        """Pages from number `first` on of some rows, `[R, H, n, ...]`."""
        shape = next(iter(entries.values())).shape[:3]
        held = len(self.plain_statistics)
        for name, tensor in entries.items():
            new = tensor.flatten(0, 2)
            self.plain[name] = torch.cat([self.plain[name], new]) if name in self.plain else new.clone()
        owners = self.owners[rows][:, :, None].expand(shape).flatten()
        self.plain_statistics = narrow(torch.cat([self.plain_statistics.long(), owners.long()]))
        if self.plain_pages is not None:
            numbers = torch.arange(first, first + shape[2], device=self.device).expand(shape).flatten()
            self.plain_pages = narrow(torch.cat([self.plain_pages.long(), numbers]))
        codes = torch.arange(held, held + shape.numel(), device=self.device, dtype=torch.int32)
        self.table[rows, :, first : first + shape[2]] = codes.view(shape)

    def add_members(self, at: torch.Tensor, new: Members) -> None:
        """Pages at `[row, head, page]` of `at` `[m, 3]`."""
        kinds = [(group.nbits, group.back) for group in self.groups]
        if (new.nbits, new.back) in kinds:
            number = kinds.index((new.nbits, new.back))
            group = self.groups[number]
            held = len(group.shift)
            group.base = torch.cat([group.base, new.base])
            group.shift = torch.cat([group.shift, new.shift])
            group.statistics = torch.cat([group.statistics, new.statistics])
            group.packed = {name: torch.cat([t, new.packed[name]]) for name, t in group.packed.items()}
        else:
            number, held = len(self.groups), 0
            self.groups.append(new)
        codes = torch.arange(held, held + len(new.shift), device=self.device, dtype=torch.int32)
        self.table[tuple(at.unbind(1))] = codes + ((number + 1) << INDEX_BITS)

    # -- reading -------------------------------------------------------------------------------------------------------

    def spread(self, which: torch.Tensor) -> torch.Tensor | None:
        """What the codec divides the channels by, `[m, 1, D]` for these rows of the statistics, if it does."""
        if "spread" not in self.statistics:
            return None
        return self.statistics["spread"][which.long()].float().unsqueeze(1)

    def decode_plain(self, index: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Plain pages `[k, page, D]` float32."""
        which = self.plain_statistics[index].long()
        statistics = {name: t[which] for name, t in self.statistics.items()}
        if self.plain_pages is not None:
            statistics["at"] = self.places(index)
        return self.codec.decode({**{name: t[index] for name, t in self.plain.items()}, **statistics})

    def places(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Where the tokens of plain pages stand in their rows, `[k, page]`, for a codec that asks."""
        assert self.plain_pages is not None
        begins = self.first + self.plain_pages[index].long() * self.page
        return begins[:, None] + torch.arange(self.page, device=self.device)

    def decode(self, pools: Sequence[Pool], own: int, first: int, last: int) -> torch.Tensor:
        """Pages `first .. last` of all rows and heads, `[B, H, pages * page, D]` float32; pools are of all slabs.

        From the first page on nothing waits for the device; from a later one only entries that are read are decoded.
        """
        table = self.table[:, :, first:last].long()
        kinds = (table >> INDEX_BITS).masked_fill(table < 0, EMPTY)
        decoded: dict[int, torch.Tensor] = {}  # the bases of groups, by how far back they are: each slab's once
        parts, places, size = [], torch.zeros_like(table), 0
        for kind in range(len(self.groups) + 1):
            inside, place, used = kinds == kind, table & INDEX, None
            if first:
                used, numbers = place[inside].unique(return_inverse=True)
                place = place.masked_scatter(inside, numbers)
            places = torch.where(inside, place + size, places)
            parts.append(self._entries(kind, pools, own, used, decoded))
            size += len(parts[-1])
        nothing = torch.zeros(1, self.page, self.codec.dim, device=self.device)
        return torch.cat([*parts, nothing])[torch.where(table < 0, size, places)].flatten(2, 3)

    def _entries(
        self,
        kind: int,
        pools: Sequence[Pool],
        own: int,
        used: torch.Tensor | None,
        decoded: dict[int, torch.Tensor],
    ) -> torch.Tensor:
        """Entries of a kind, all or those `used`, `[k, page, D]`; bases that are decoded as a whole go to `decoded`."""
        if kind == 0:
            if not self.plain or (used is not None and not len(used)):
                return torch.empty(0, self.page, self.codec.dim, device=self.device)
            if used is not None:
                return self.decode_plain(used)
            decoded[0] = self.decode_plain()
            return decoded[0]
        group = self.groups[kind - 1]
        bases = pools[own - group.back]
        needed = sum(2 * len(other.shift) for other in self.groups if other.back == group.back)
        if used is None and group.back not in decoded and needed >= len(bases.plain_statistics):
            decoded[group.back] = bases.decode_plain()
        return self._decode_members(group if used is None else group.select(used), bases, decoded.get(group.back))

    def _decode_members(self, group: Members, bases: Pool, plain: torch.Tensor | None) -> torch.Tensor:
        span = bases.span(group.base, group.shift, plain)
        if group.nbits == 0:
            return span
        spread = self.spread(group.statistics)
        return decode_page(group.packed, into_basis(span, spread), spread, group.nbits)

    def span(self, base: torch.Tensor, shift: torch.Tensor, plain: torch.Tensor | None = None) -> torch.Tensor:
        """Spans of plain pages, moved `shift` tokens on: `[m, page, D]`; `plain` are all plain pages, if decoded."""
        which = base[:, :2].flatten().long()
        both = (self.decode_plain(which) if plain is None else plain[which]).unflatten(0, (-1, 2)).flatten(1, 2)
        at = base[:, 2, None].long() + torch.arange(self.page, device=self.device)
        span = both.gather(1, at[..., None].expand(-1, -1, both.shape[2]))
        return span if self.move is None else self.move(span, shift)

    # -- rows and room -------------------------------------------------------------------------------------------------

    def map_rows(self, rows: torch.Tensor) -> None:
        self.table, self.owners = self.table[rows], self.owners[rows]

    def keep_members(self) -> None:
        """Let go of members that no page reads, and of groups that are empty."""
        codes, kept = self.table.flatten(), []
        table = torch.where(self.table >> INDEX_BITS == 0, self.table, EMPTY)
        for number, group in enumerate(self.groups, 1):
            inside = self.table >> INDEX_BITS == number
            used = (codes[inside.flatten()] & INDEX).long().unique()
            if not len(used):
                continue
            kept.append(group if len(used) == len(group.shift) else group.select(used))
            place = torch.searchsorted(used, (self.table & INDEX).long().contiguous())
            table = torch.where(inside, (place + (len(kept) << INDEX_BITS)).to(torch.int32), table)
        self.table, self.groups = table, kept

    @property
    def is_plain(self) -> torch.Tensor:
        """Pages that read the plain codec's entries, `[B, H, P]`."""
        return (self.table >= 0) & (self.table <= INDEX)

    @property
    def is_shared(self) -> torch.Tensor:
        """Pages that are members, or read an entry that another page reads as well, `[B, H, P]`; not the first to."""
        flat = self.table.flatten()
        order = torch.arange(len(flat), device=self.device)
        same = flat[:, None] == flat if len(flat) <= _SAME else None
        if same is None:
            return self.table > INDEX
        first = torch.where(same, order, len(flat)).amin(1) == order
        return (self.table > INDEX) | ((self.table >= 0) & ~first.view(self.table.shape))

    def used_plain(self) -> torch.Tensor:
        """Entries of plain pages that the table reads."""
        return self.table[self.is_plain].long().unique()

    def keep_plain(self, used: torch.Tensor) -> torch.Tensor | None:
        """Let go of plain pages but those `used` (sorted); returns each one's new number, None if all stay."""
        held = len(self.plain_statistics)
        if len(used) == held:
            return None
        self.plain = {name: t[used] for name, t in self.plain.items()}
        self.plain_statistics = self.plain_statistics[used]
        if self.plain_pages is not None:
            self.plain_pages = self.plain_pages[used]
        new = torch.zeros(max(held, 1), dtype=torch.long, device=self.device)
        new[used] = torch.arange(len(used), device=self.device)
        inside = self.is_plain
        self.table = torch.where(inside, new[self.table.clamp(0, held - 1).long()].to(torch.int32), self.table)
        return new

    def keep_statistics(self) -> None:
        """Let go of statistics that no lane and no page needs."""
        if not self.statistics:
            return
        users = [self.owners, self.plain_statistics, *(group.statistics for group in self.groups)]
        used = torch.cat([user.flatten().long() for user in users]).unique()
        if len(used) == len(next(iter(self.statistics.values()))):
            return
        self.statistics = {name: t[used] for name, t in self.statistics.items()}
        self.owners = narrow(torch.searchsorted(used, self.owners.long()))
        self.plain_statistics = narrow(torch.searchsorted(used, self.plain_statistics.long()))
        for group in self.groups:
            group.statistics = narrow(torch.searchsorted(used, group.statistics.long()))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.statistics.values()
        yield from self.plain.values()
        yield from (self.owners, self.table, self.plain_statistics)
        if self.plain_pages is not None:
            yield self.plain_pages
        for group in self.groups:
            yield from group.tensors()
