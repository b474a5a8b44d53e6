"""A slab whose pages are shared or coded against each other, with the interface of a plain one where it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..codecs.base import Codec, Packed
from ..pages import Slab
from .pool import Move, Pool, entries_of


class SharedSlab:
    """Room for `capacity` tokens from token number `start` on; takes only what its pages need."""

    def __init__(self, start: int, capacity: int, pools: dict[str, Pool]):
        self.start, self.capacity, self.pools = start, capacity, pools

    @classmethod
    def of(
        cls,
        slab: Slab,
        codecs: Mapping[str, Codec],
        page: int,
        filled: Sequence[int],
        moves: Mapping[str, Move | None],
        before: int = 0,
    ) -> SharedSlab:
        """What a plain slab holds; `filled` are the tokens of each row in it, `before` those that stand before all."""
        pools = {}
        for role, codec in codecs.items():
            packed = slab.packed(role)
            batch, heads = next(iter(packed.values())).shape[:2]
            device = next(iter(packed.values())).device
            statistics = {name: packed[name] for name in codec.statistics}
            shape = (batch, heads, slab.capacity // page)
            pool = pools[role] = Pool(codec, page, statistics, shape, device, moves[role], before + slab.start)
            entries = entries_of(codec, packed, page)
            for tokens in sorted(set(filled) - {0}):
                rows = [row for row, own in enumerate(filled) if own == tokens]
                index = torch.tensor(rows, device=device)
                pool.add_plain(index, 0, {name: t[index][:, :, : tokens // page] for name, t in entries.items()})
        return cls(slab.start, slab.capacity, pools)

    @property
    def end(self) -> int:
        return self.start + self.capacity

    def packed(self, role: str) -> Packed:
        """The statistics of every row and head, `[B, H, 1, ...]`, as a plain slab has them."""
        pool = self.pools[role]
        return {name: t[pool.owners.long()].unsqueeze(2) for name, t in pool.statistics.items()}

    @property
    def keys(self) -> Packed:
        """Every tensor held for keys."""
        return {str(number): t for number, t in enumerate(self.pools["key"].tensors())}

    @property
    def values(self) -> Packed:
        """Every tensor held for values."""
        return {str(number): t for number, t in enumerate(self.pools["value"].tensors())}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for pool in self.pools.values() for t in pool.tensors())

    def decode(self, role: str, slabs: Sequence[object], tokens: int, start: int = 0) -> torch.Tensor:
        """Tokens `start .. tokens`, `[B, H, n, D]` float32, `start` being the first of a page.

        slabs are the store's, this one among them.
        """
        own = next(index for index, slab in enumerate(slabs) if slab is self)
        pools = [slab.pools[role] if isinstance(slab, SharedSlab) else self.pools[role] for slab in slabs]
        page = self.pools[role].page
        return self.pools[role].decode(pools, own, start // page, -(-tokens // page))[:, :, : tokens - start]


def collect(slabs: Sequence[Slab | SharedSlab], roles: Sequence[str]) -> None:
    """Let go of every page that no row reads and that is no base of one; waits for the device."""
    for role in roles:
        pools = {index: slab.pools[role] for index, slab in enumerate(slabs) if isinstance(slab, SharedSlab)}
        used: dict[int, list[torch.Tensor]] = {}
        for index, pool in pools.items():
            pool.keep_members()
            used.setdefault(index, []).append(pool.used_plain())
            for group in pool.groups:
                used.setdefault(index - group.back, []).append(group.base[:, :2].flatten().long())
        new = {index: pool.keep_plain(torch.cat(used[index]).unique()) for index, pool in pools.items()}
        for index, pool in pools.items():
            for group in pool.groups:
                moved = new[index - group.back]
                if moved is not None:
                    base = group.base.long()
                    base[:, :2] = moved[base[:, :2]]
                    group.base = base.to(group.base.dtype)
            pool.keep_statistics()
