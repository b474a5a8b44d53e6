"""Lines of packed tokens: the unit that a lane's memory comes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .codecs.base import Codec, Packed


@dataclass
class Block:
    """Lines of `capacity` tokens: `lanes`, `epochs` (rows of the statistics) and `counts` have one entry a line.

    The packed tensors are `[n, ...]` with the fields of tokens only; positions `[n, capacity]` int32, -1 where empty;
    mass `[n, capacity]` float32.
    """

    lanes: list[int]
    epochs: list[int]
    counts: list[int]
    capacity: int
    packed: dict[str, Packed]
    positions: torch.Tensor
    mass: torch.Tensor | None
    _index: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def index(self, name: str) -> torch.Tensor:
        """`lanes` or `epochs` as a tensor where the tokens are."""
        if name not in self._index:
            self._index[name] = torch.tensor(getattr(self, name), device=self.positions.device)
        return self._index[name]

    def credit(self, mass: torch.Tensor) -> None:
        """Add what the tokens received in a pass, `[n, capacity]`."""
        assert self.mass is not None
        self.mass += mass.to(self.mass.device)

    def tensors(self) -> Iterator[torch.Tensor]:
        for packed in self.packed.values():
            yield from packed.values()
        yield self.positions
        if self.mass is not None:
            yield self.mass

    def to(self, device: torch.device) -> Block:
        """The same lines on another device."""
        packed = {role: {k: t.to(device) for k, t in p.items()} for role, p in self.packed.items()}
        mass = None if self.mass is None else self.mass.to(device)
        return Block(self.lanes, self.epochs, self.counts, self.capacity, packed, self.positions.to(device), mass)

    def select(self, lines: Sequence[int], lanes: list[int]) -> Block:
        """Some of the lines, as lines of other lanes."""
        index = torch.tensor(lines, dtype=torch.long, device=self.positions.device)
        packed = {role: {k: t.index_select(0, index) for k, t in p.items()} for role, p in self.packed.items()}
        mass = None if self.mass is None else self.mass.index_select(0, index)
        epochs, counts = ([x[line] for line in lines] for x in (self.epochs, self.counts))
        return Block(lanes, epochs, counts, self.capacity, packed, self.positions.index_select(0, index), mass)

    def trim(self, codecs: Mapping[str, Codec], page: int) -> None:
        """Give back the room behind the tokens of the fullest line."""
        capacity = -(-max(self.counts) // page) * page
        if capacity == self.capacity:
            return
        for role, packed in self.packed.items():
            for name, tensor in packed.items():
                field = codecs[role].fields[name]
                axis, units = -1 if field.tokens_last else 1, capacity // (field.tokens or 1)
                packed[name] = tensor.narrow(axis, 0, units).clone()
        self.capacity, self.positions = capacity, self.positions[:, :capacity].clone()
        if self.mass is not None:
            self.mass = self.mass[:, :capacity].clone()
