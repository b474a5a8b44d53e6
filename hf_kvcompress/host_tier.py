"""Host memory as a tier: what its pages leave on the device, and reading those that a pass is most likely to want."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .blocks import Block
from .codecs.base import Codec, Packed
from .lanes import LanePages


@dataclass
class Fetched(Block):
    """Pages read from host memory for one pass, a line each; what they receive is credited where they came from."""

    origin: list[tuple[Block, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def note_read(self) -> None:
        """Let the pages compete for a place in the first tier when the layer next evicts."""
        for block, lines, pages in self.origin:
            bounds_of(block).hot[lines, pages] = True

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
        return HostBlock(**vars(super().select(lines, lanes)), bounds=bounds_of(self).select(index))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from super().tensors()
        bounds = bounds_of(self)
        yield from (bounds.low, bounds.high, bounds.hot)


def bounds_of(block: Block) -> Bounds:
    assert isinstance(block, HostBlock) and block.bounds is not None
    return block.bounds


def with_bounds(store: LanePages, block: Block, device: torch.device) -> HostBlock:
    """A block in host memory with the bounds of its pages, which are kept on `device`."""
    keys = store.codecs["key"].decode(store.packed(block, "key")).flatten(1, 3)  # [n, capacity, D]
    empty = (block.positions < 0)[..., None]
    page = store.page_size
    low, high = (keys.masked_fill(empty, value).unflatten(1, (-1, page)) for value in (float("inf"), float("-inf")))
    hot = torch.zeros(len(block.lanes), block.capacity // page, dtype=torch.bool)
    low, high = (_outwards(x, sign).to(device) for x, sign in ((low.amin(2), -1), (high.amax(2), 1)))
    return HostBlock(**vars(block), bounds=Bounds(low, high, hot))


def fetch(store: LanePages, queries: torch.Tensor, most: int, device: torch.device) -> Fetched | None:
    """The pages of every lane with the highest bound on the scores of `queries` `[L, M, D]`, `most` of each."""
    if not store.blocks or not most:
        return None
    scores, lanes, where = [], [], []
    for number, block in enumerate(store.blocks):
        bounds, own = bounds_of(block), queries[block.index("lanes").to(queries.device)]
        low, high = bounds.low.float(), bounds.high.float()
        empty = (low > high).any(-1)
        low, high = low.masked_fill(empty[..., None], 0), high.masked_fill(empty[..., None], 0)
        highest = own.clamp(min=0) @ high.mT + own.clamp(max=0) @ low.mT  # [n, M, pages]
        scores.append(highest.amax(1).masked_fill(empty, float("-inf")).flatten().cpu())
        lines, pages = (x.flatten() for x in torch.meshgrid(*map(torch.arange, empty.shape), indexing="ij"))
        lanes.append(torch.tensor(block.lanes)[lines])
        where.append(torch.stack([torch.full_like(lines, number), lines, pages], dim=1))
    chosen = _best_of_each(torch.cat(scores), torch.cat(lanes), most)
    return _read(store, torch.cat(where)[chosen], device)


def _read(store: LanePages, where: torch.Tensor, device: torch.device) -> Fetched | None:
    """Copy pages `(block, line, page)`, sorted by block, to where the model is."""
    page, parts, origin, positions = store.page_size, [], [], []
    lanes: list[int] = []
    epochs: list[int] = []
    for number in where[:, 0].unique().tolist():
        block = store.blocks[number]
        lines, pages = where[where[:, 0] == number, 1:].unbind(1)
        origin.append((block, lines, pages))
        packed = {
            role: _pages_of(codec, block.packed[role], lines, pages, page) for role, codec in store.codecs.items()
        }
        lanes += [block.lanes[line] for line in lines.tolist()]
        epochs += [block.epochs[line] for line in lines.tolist()]
        positions.append(block.positions.unflatten(1, (-1, page))[lines, pages])
        parts.append(packed)
    if not parts:
        return None
    packed = {
        role: {name: torch.cat([part[role][name] for part in parts]).to(device) for name in parts[0][role]}
        for role in store.codecs
    }
    at = torch.cat(positions).to(device)
    return Fetched(lanes, epochs, [page] * len(lanes), page, packed, at, None, origin=origin)


def _outwards(bound: torch.Tensor, sign: int) -> torch.Tensor:
    """A float32 bound in bfloat16, rounded away from what it bounds: up for sign 1, down for -1."""
    rounded = bound.to(torch.bfloat16)
    short = (bound - rounded.float()) * sign > 0
    return torch.where(short, torch.nextafter(rounded, torch.full_like(rounded, sign * torch.inf)), rounded)


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
