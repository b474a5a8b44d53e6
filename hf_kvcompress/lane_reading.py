"""Reading tokens that stand in lines of blocks, by number: where they are, what they decode to, what they carry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from .blocks import Block
from .codecs.base import Codec, Packed
from .lane_statistics import LaneStatistics

LINE = 20  # a token's number: that of its line, and in the lowest bits its place there
INSIDE = (1 << LINE) - 1


class LaneReader:
    """What `LanePages` is read by."""

    codecs: dict[str, Codec]
    heads: int
    device: torch.device
    track_mass: bool
    page_size: int
    blocks: list[Block]
    statistics: LaneStatistics
    counts: list[int]  # tokens that each row has sealed, evicted ones included
    holes: bool  # some lines have empty places between their tokens
    first_position: Callable[[int], int] | None

    @property
    def batch(self) -> int:
        return len(self.counts)

    @property
    def held(self) -> list[int]:
        """Tokens of each lane."""
        held = [0] * (self.batch * self.heads)
        for block in self.blocks:
            for lane, count in zip(block.lanes, block.counts, strict=True):
                held[lane] += count
        return held

    def places(self, lanes: Sequence[int], positions: torch.Tensor) -> Packed:
        """`[n, 1, 1, T]` as "at": where tokens at `positions` `[n, T]` of these lanes stand in their rows.

        Empty if the codec of the keys does not ask for it.
        """
        if not self.codecs["key"].wants_positions:
            return {}
        assert self.first_position is not None
        firsts = torch.tensor([self.first_position(lane // self.heads) for lane in lanes], device=positions.device)
        return {"at": (positions - firsts[:, None]).clamp_(min=0)[:, None, None].to(self.device)}

    def packed(self, block: Block, role: str) -> Packed:
        """A block's fields with its lines' statistics, `[n, 1, 1, ...]`, as codecs read them."""
        statistics = self.statistics.of(role, block.index("epochs"))
        packed = {name: t[:, None, None] for name, t in {**block.packed[role], **statistics}.items()}
        if role == "key" and self.codecs[role].wants_positions:
            packed |= self.places(block.lanes, block.positions)
        return packed

    def table(self, rows: Sequence[int]) -> torch.Tensor:
        """Numbers of the rows' tokens, `[len(rows) * H, N]` on the host in the order of positions, -1 where none."""
        lanes = [row * self.heads + head for row in rows for head in range(self.heads)]
        place = {lane: i for i, lane in enumerate(lanes)}
        held = self.held
        table = torch.full((len(lanes), max((held[lane] for lane in lanes), default=0)), -1, dtype=torch.long)
        filled, in_order = [0] * len(lanes), True
        for number, (block, line) in enumerate(self.lines()):
            i, count = place.get(block.lanes[line]), block.counts[line]
            if i is not None and count:
                begin = number << LINE
                table[i, filled[i] : filled[i] + count] = torch.arange(begin, begin + count)
                in_order &= filled[i] == 0
                filled[i] += count
        if in_order and not self.holes:
            return table
        positions = self.look_up("positions", table, -1).cpu()
        empty = positions < 0
        order = torch.where(empty, torch.iinfo(torch.int32).max, positions).argsort(dim=1)
        most = int((~empty).sum(1).max()) if len(table) else 0
        return table.masked_fill(empty, -1).gather(1, order)[:, :most]

    def lines(self) -> Iterator[tuple[Block, int]]:
        """Every line, as its block and its number there."""
        for block in self.blocks:
            for line in range(len(block.lanes)):
                yield block, line

    def flat(self, table: torch.Tensor) -> torch.Tensor:
        """Numbers of tokens -> where they are when all blocks are laid out one behind the other; -1 stays."""
        sizes = torch.tensor([block.capacity for block, _ in self.lines()])
        firsts = sizes.cumsum(0) - sizes
        return torch.where(table < 0, -1, firsts[table.clamp(min=0) >> LINE] + (table & INSIDE))

    def look_up(self, name: str, table: torch.Tensor, absent: float) -> torch.Tensor:
        """`positions` or `mass` of the tokens in a table, `[L, N]`."""
        if not self.blocks:
            return torch.full(table.shape, absent, device=self.device)
        values = torch.cat([getattr(block, name).flatten() for block in self.blocks])
        at = self.flat(table).to(self.device)
        return values[at.clamp(min=0)].masked_fill_(at < 0, absent)

    def decode(self, role: str, table: torch.Tensor) -> torch.Tensor:
        """Read back the tokens in a table, `[L, N, D]` float32, zeros where it has none."""
        out = torch.zeros(*table.shape, self.codecs[role].dim, device=self.device)
        first = 0
        for block in self.blocks:
            last = first + len(block.lanes)
            wanted = ((table >> LINE >= first) & (table >> LINE < last) & (table >= 0)).nonzero(as_tuple=True)
            if len(wanted[0]):
                ids = table[wanted]
                lines, numbers = ((ids >> LINE) - first).unique(return_inverse=True)
                lines = lines.to(self.device)
                packed = {name: t[lines] for name, t in self.packed(block, role).items()}
                decoded = self.codecs[role].decode(packed).flatten(0, 3)  # [lines * capacity, D]
                at = (numbers * block.capacity + (ids & INSIDE)).to(self.device)
                out[wanted[0].to(self.device), wanted[1].to(self.device)] = decoded[at]
            first = last
        return out

    def read_row(self, row: int, start: int, end: int) -> tuple[torch.Tensor, ...]:
        """Read back keys, values and, where tracked, mass of a row's tokens `start .. end` of those it ever sealed.

        None of the tokens sealed since `start` may have been evicted. Each part is `[1, H, end - start, ...]` float32.
        """
        table = self.table([row])
        held = self.held[row * self.heads : (row + 1) * self.heads]
        cut = torch.stack(
            [t[h - (self.counts[row] - start) :][: end - start] for t, h in zip(table, held, strict=True)]
        )
        parts = [self.decode(role, cut)[None] for role in ("key", "value")]
        if self.track_mass:
            parts.append(self.look_up("mass", cut, 0.0)[None, ..., None])
        return tuple(parts)

    def state(self, row: int) -> tuple[int, ...]:
        """Rows with the same state pack the same tokens alike."""
        return self.counts[row], self.statistics.known[row]

    def most_held(self, row: int) -> int:
        """Tokens of the row's fullest lane."""
        return max(self.held[row * self.heads : (row + 1) * self.heads])

    def mean_held(self, row: int) -> int:
        """Tokens of the row's lanes on average, rounded up."""
        return -(-sum(self.held[row * self.heads : (row + 1) * self.heads]) // self.heads)
