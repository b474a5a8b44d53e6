"""Attention to shared pages without reading them back, for few queries on a CPU.

Plain pages are gathered packed, lane by lane, and used by their codec as those of a plain slab are. A difference is
used in two parts: its span, whose keys stay where they are while the queries are turned back by the shift, and its
residual, in the basis that it is coded in. So no page is turned or rotated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..codecs.base import Packed
from ..ops.delta import BITS as DELTA_BITS
from ..ops.hadamard import rotation_matrix
from .pool import EMPTY, INDEX, INDEX_BITS, Members, Pool
from .residual import decode_residual

if TYPE_CHECKING:
    from .frozen import SharedSlab
    from .store import ClusteredPages

FEW = 16  # query rows of a lane up to which this is the faster way
_OWNERS = 2  # statistics in one lane that are worth a run of their own


@dataclass
class Reads:
    """Pages of one group that are read, one a lane and place: `lane`, `page` and `entry` `[n]`."""

    group: Members
    lane: torch.Tensor
    page: torch.Tensor
    entry: torch.Tensor


class Shared:
    """One role of a shared slab, and what its pages refer to.

    Args:
        pages, slab: whose pages these are.
        role: "key" or "value".
        tokens: the first ones of the slab that are read.
    """

    def __init__(self, pages: ClusteredPages, slab: SharedSlab, role: str, tokens: int):
        self.pages, self.role, self.tokens = pages, role, tokens
        self.pool: Pool = slab.pools[role]
        self.own = next(number for number, one in enumerate(pages.slabs) if one is slab)
        self.table = self.pool.table[:, :, : -(-tokens // self.pool.page)].flatten(0, 1).long()  # [L, P]

    @property
    def is_read_packed(self) -> bool:
        """Reading packed pages is possible here, and worth it."""
        return self.table.device.type == "cpu" and not any(g.nbits in DELTA_BITS for g in self.pool.groups)

    # -- scores --------------------------------------------------------------------------------------------------------

    def scores(self, q: torch.Tensor) -> torch.Tensor:
        """`[B, H, M, tokens]`; where a lane has no page anything may stand."""
        batch, heads, rows, dim = q.shape
        flat, page = q.flatten(0, 1), self.pool.page
        out = q.new_zeros(len(flat), self.table.shape[1], rows, page)
        for packed, chosen in self._plain_runs():
            own = self.pool.codec.scores(q, packed).flatten(0, 1).unflatten(2, (-1, page)).transpose(1, 2)
            out[chosen] = own[chosen]
        lane, place, entry = self._odd_pages()
        if len(lane):
            out[lane, place] = _line_scores(self.pool, entry, flat[lane])
        for reads in self._members():
            out[reads.lane, reads.page] = self._member_scores(reads, flat)
        return out.transpose(1, 2).flatten(2).unflatten(0, (batch, heads))[..., : self.tokens]

    def _member_scores(self, reads: Reads, flat: torch.Tensor) -> torch.Tensor:
        """`[n, M, page]`."""
        group, base = self._of_entries(reads)
        turned = _turn_back(self.pages, flat, reads.lane, group.shift) if self.role == "key" else flat[reads.lane]
        bases = self._bases(group)
        both = torch.cat([_line_scores(bases, base[:, i], turned) for i in (0, 1)], dim=2)
        at = base[:, 2, None] + torch.arange(self.pool.page, device=flat.device)
        found = both.gather(2, at[:, None].expand(-1, both.shape[1], -1))
        if group.nbits == 0:
            return found
        spread = self.pool.spread(group.statistics)  # [n, 1, D]
        q = flat[reads.lane] if spread is None else flat[reads.lane] * spread
        return found + (q @ rotation_matrix(q.shape[-1], q.device)) @ self._residual(group).mT

    # -- values --------------------------------------------------------------------------------------------------------

    def mix(self, p: torch.Tensor) -> torch.Tensor:
        """`[B, H, M, D]`, of weights `[B, H, M, tokens]`."""
        batch, heads, rows, _ = p.shape
        page, codec = self.pool.page, self.pool.codec
        wide = torch.nn.functional.pad(p, (0, self.table.shape[1] * page - self.tokens))
        pages = wide.flatten(0, 1).unflatten(2, (-1, page)).transpose(1, 2)  # [L, P, M, page]
        coded = p.new_zeros(batch * heads, rows, codec.dim)
        left = torch.zeros_like(coded)
        for packed, chosen in self._plain_runs():
            own = (pages * chosen[..., None, None]).transpose(1, 2).flatten(2)
            coded += codec.mix(own.unflatten(0, (batch, heads)), packed).flatten(0, 1)
        lane, place, entry = self._odd_pages()
        if len(lane):
            coded.index_add_(0, lane, _line_mix(self.pool, entry, pages[lane, place]))
        for reads in self._members():
            group, base = self._of_entries(reads)
            own, bases = pages[reads.lane, reads.page], self._bases(group)  # [n, M, page]
            both = own.new_zeros(*own.shape[:2], 2 * page)
            at = base[:, 2, None] + torch.arange(page, device=p.device)
            both.scatter_(2, at[:, None].expand(-1, rows, -1), own)
            for i, half in enumerate(both.split(page, dim=2)):
                coded.index_add_(0, reads.lane, _line_mix(bases, base[:, i], half))
            if group.nbits:
                spread = self.pool.spread(group.statistics)
                mixed = own @ self._residual(group)
                left.index_add_(0, reads.lane, mixed if spread is None else self._unrotated(mixed) * spread)
        out = codec.finish(coded.unflatten(0, (batch, heads)))
        if not self.pool.groups:
            return out
        left = left if "spread" in self.pool.statistics else self._unrotated(left)
        return out + left.unflatten(0, (batch, heads))

    def _unrotated(self, x: torch.Tensor) -> torch.Tensor:
        return x @ rotation_matrix(x.shape[-1], x.device).mT

    # -- which pages ---------------------------------------------------------------------------------------------------

    def _plain_runs(self) -> Iterator[tuple[Packed, torch.Tensor]]:
        """All lanes packed as `[B, H, 1, ...]` with one statistic each, and the pages `[L, P]` that it is right for."""
        if not len(self.pool.plain_statistics):
            return
        left, owners = (self.table >= 0) & (self.table <= INDEX), self._owners()
        index = self.table.masked_fill(~left, 0)
        fields = self._gathered(index)
        for _ in range(_OWNERS):
            if not bool(left.any()):
                return
            first = left.int().argmax(1, keepdim=True)
            chosen = left & (owners == owners.gather(1, first)) if self.pool.statistics else left
            which = owners.gather(1, first)[:, 0]
            statistics = {
                name: t[which].unflatten(0, self.pool.owners.shape).unsqueeze(2)
                for name, t in self.pool.statistics.items()
            }
            yield {**fields, **statistics}, chosen
            left = left & ~chosen

    def _owners(self) -> torch.Tensor:
        """Row of the statistics of each plain page, `[L, P]`."""
        plain = (self.table >= 0) & (self.table <= INDEX)
        return self.pool.plain_statistics.long()[self.table.masked_fill(~plain, 0)]

    def _gathered(self, index: torch.Tensor) -> Packed:
        """The fields of tokens of the plain pages `[L, P]`, lane by lane, `[B, H, 1, ...]`."""
        shape, found, flat = self.pool.owners.shape, {}, index.flatten()
        in_order = torch.equal(flat, torch.arange(len(self.pool.plain_statistics)))  # as in a slab of bases
        for name, tensor in self.pool.plain.items():
            # [L, P, units, ...] or [L, P, ..., units]
            own = (tensor if in_order else tensor.index_select(0, flat)).unflatten(0, index.shape)
            last = self.pool.codec.fields[name].tokens_last
            own = own.movedim(1, -2).flatten(-2) if last else own.flatten(1, 2)
            found[name] = own.unflatten(0, shape).unsqueeze(2)
        if self.pool.plain_pages is not None:
            at = self.pool.places(flat).view(len(index), -1)
            found["at"] = at.unflatten(0, shape).unsqueeze(2)
        return found

    def _odd_pages(self) -> tuple[torch.Tensor, ...]:
        """Lane, place and entry of plain pages with a statistic that no run of their lane had."""
        left, owners = (self.table >= 0) & (self.table <= INDEX), self._owners_or_none()
        if owners is None:
            return (self.table.new_empty(0),) * 3
        for _ in range(_OWNERS):
            first = left.int().argmax(1, keepdim=True)
            left = left & (owners != owners.gather(1, first))
        lane, place = left.nonzero(as_tuple=True)
        return lane, place, self.table[lane, place]

    def _owners_or_none(self) -> torch.Tensor | None:
        return self._owners() if self.pool.statistics and len(self.pool.plain_statistics) else None

    def _members(self) -> Iterator[Reads]:
        kinds = self.table >> INDEX_BITS
        for number, group in enumerate(self.pool.groups, 1):
            lane, page = ((kinds == number) & (self.table != EMPTY)).nonzero(as_tuple=True)
            if len(lane):
                yield Reads(group, lane, page, self.table[lane, page] & INDEX)

    def _of_entries(self, reads: Reads) -> tuple[Members, torch.Tensor]:
        """The members read, in the order of the reads, and their bases `[n, 3]`."""
        group = reads.group.select(reads.entry)
        return group, group.base.long()

    def _bases(self, group: Members) -> Pool:
        slab = self.pages.slabs[self.own - group.back]
        return slab.pools[self.role]  # type: ignore[attr-defined]

    def _residual(self, group: Members) -> torch.Tensor:
        """`[n, page, D]` in the basis of the residuals."""
        shape = (len(group.shift), self.pool.page, self.pool.codec.dim)
        return decode_residual(group.packed, torch.zeros(1, 1, 1).expand(shape), group.nbits)


def _lines(pool: Pool, entries: torch.Tensor) -> Packed:
    """Plain pages as lines of their own, `[n, 1, 1, ...]`."""
    which = pool.plain_statistics[entries].long()
    packed = {name: t.index_select(0, entries) for name, t in pool.plain.items()}
    packed |= {name: t.index_select(0, which) for name, t in pool.statistics.items()}
    if pool.plain_pages is not None:
        packed["at"] = pool.places(entries)
    return {name: t[:, None, None] for name, t in packed.items()}


def _line_scores(pool: Pool, entries: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Scores `[n, M, page]` of queries `[n, M, D]`, each with its own page."""
    return pool.codec.scores(q.unsqueeze(1), _lines(pool, entries))[:, 0]


def _line_mix(pool: Pool, entries: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """`[n, M, D]`, in the codec's basis, of weights `[n, M, page]`, each with its own page."""
    return pool.codec.mix(p.unsqueeze(1), _lines(pool, entries))[:, 0]


def _turn_back(pages: ClusteredPages, flat: torch.Tensor, lane: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Queries `[n, M, D]` of these lanes, turned back by `shift` `[n]`: what a span scores before it is moved."""
    rotary = pages.rotary
    if rotary is None:
        return flat[lane]
    pairs, which = torch.stack([lane, shift.long()], dim=1).unique(dim=0, return_inverse=True)
    there = rotary.undo(flat[pairs[:, 0]].contiguous(), pairs[:, 1, None].float())
    if getattr(rotary, "scaling", 1.0) != 1.0:  # yarn's factor is in the keys already
        there = rotary.apply(there, pairs.new_zeros(1, 1).float())
    return there[which]
