"""Packed tokens that can be evicted, ragged by lane: a lane is one row's key-value head, and holds tokens of its own.

Tokens stand in lines of a block; a lane has as many lines as its tokens need, so heads with smaller budgets take less
memory. Lines come in the order of their tokens' positions. Every token carries its position and, where a policy wants
it, the attention mass it has received.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from .blocks import Block
from .codecs.base import Codec, Packed
from .lane_reading import LaneReader
from .lane_statistics import LaneStatistics

ROOM = 512  # most tokens of a new open block, where the budget leaves room and as many are held
LINE_COST = 8  # what a further line costs, in tokens


class LanePages(LaneReader):
    """The sealed tokens of one layer that has a policy.

    Args:
        key_codec, value_codec: how keys and values are packed.
        batch, heads: B and H.
        device: where the pages live.
        track_mass: keep each token's attention mass.
        first_position: of a row's first token, for codecs that ask for positions.
    """

    def __init__(
        self,
        key_codec: Codec,
        value_codec: Codec,
        batch: int,
        heads: int,
        device: torch.device,
        track_mass: bool,
        first_position: Callable[[int], int] | None = None,
    ):
        self.first_position = first_position
        self.codecs: dict[str, Codec] = {"key": key_codec, "value": value_codec}
        self.heads, self.device, self.track_mass = heads, device, track_mass
        self.page_size = key_codec.page_size
        self.blocks: list[Block] = []
        self.statistics = LaneStatistics(self.codecs, batch, heads, device)
        self.counts = [0] * batch  # tokens that each row has sealed, evicted ones included
        self.open: list[tuple[Block, int] | None] = [None] * batch  # block being filled, and the row's first line in it
        self.holes = False  # some lines have empty places between their tokens

    # -- writing -------------------------------------------------------------------------------------------------------

    def seal(
        self,
        rows: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: int,
        positions: torch.Tensor,
        mass: torch.Tensor | None,
        room: int,
        query_ms: torch.Tensor | None = None,
        query_moment: torch.Tensor | None = None,
    ) -> None:
        """Pack the first `tokens` of keys and values `[R, H, n, D]`, which stand at `positions` `[R, n]`.

        The rows must have sealed equally many tokens. `mass` `[R, H, tokens]` is what they have received so far, `room`
        the tokens that a lane may yet hold: no more is allocated ahead.
        """
        before = self.counts[rows[0]]
        pair = {"key": keys, "value": values}
        places = self.places([row * self.heads for row in rows], positions)
        self._renew(rows, before, tokens, pair, places, query_ms)
        pair = {role: x[:, :, :tokens] for role, x in pair.items()}
        places, positions = {name: at[..., :tokens] for name, at in places.items()}, positions[:, :tokens]
        self.statistics.learn(rows, before, {role: x[:, :, None] for role, x in pair.items()}, places)
        encoded = self._encode(rows, pair, places, query_moment)
        positions = positions.to(self.device, torch.int32).repeat_interleave(self.heads, 0)
        flat_mass = None if mass is None else mass.flatten(0, 1)
        done = 0
        while done < tokens:
            done += self._write(rows, encoded, positions, flat_mass, done, tokens, room - done)
        for row in rows:
            self.counts[row] = before + tokens

    def admit(
        self,
        row: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        mass: torch.Tensor | None,
        renew: bool,
    ) -> None:
        """Pack a row's tokens `[1, H, T, D]` from another tier, at `positions` `[H, T]`, -1 where a head has none.

        With `renew` they count as sealed here and statistics may be made of them.
        """
        pair = {"key": keys, "value": values}
        lanes = [row * self.heads + head for head in range(self.heads)]
        filled = positions.where(positions >= 0, positions[:, :1])  # where a head has none it repeats its first token
        places = {name: at.movedim(0, 1) for name, at in self.places(lanes, filled).items()}
        if renew:
            self._renew([row], self.counts[row], keys.shape[2], pair, places, None)
            self.counts[row] += keys.shape[2]
        encoded = self._encode([row], pair, places, None)
        block = self.new_block(lanes, self.statistics.rows_of([row]), keys.shape[2])
        block.counts = [keys.shape[2]] * self.heads
        block.packed = encoded
        block.positions.copy_(positions)
        if block.mass is not None and mass is not None:
            block.mass.copy_(mass)
        self.holes |= bool((positions < 0).any())
        self.blocks.append(block)

    def _encode(
        self, rows: Sequence[int], pair: dict[str, torch.Tensor], places: Packed, moment: torch.Tensor | None
    ) -> dict[str, Packed]:
        """Pack keys and values `[R, H, T, D]` with the rows' statistics; the fields come as `[R * H, ...]`."""
        epochs = torch.tensor(self.statistics.rows_of(rows), device=self.device)
        encoded: dict[str, Packed] = {}
        for role, x in pair.items():
            segment = {k: t.unflatten(0, (*x.shape[:2], 1)) for k, t in self.statistics.of(role, epochs).items()}
            if role == "key":
                segment |= places
            packed = self.codecs[role].encode(x.unsqueeze(2), segment, moment if role == "key" else None)
            encoded[role] = {name: t.flatten(0, 2) for name, t in packed.items()}
        return encoded

    def _renew(
        self,
        rows: Sequence[int],
        before: int,
        tokens: int,
        pair: dict[str, torch.Tensor],
        places: Packed,
        query_ms: torch.Tensor | None,
    ) -> None:
        """Make new statistics where it is time to; blocks that the rows were filling get no more tokens then."""
        if not self.statistics.renew(rows, before, tokens, pair, places, query_ms):
            return
        left = {id(at[0]): at[0] for at in (self.open[row] for row in rows) if at is not None}
        for row in rows:
            self.open[row] = None  # lines have one statistic each
        still = {id(at[0]) for at in self.open if at is not None}
        for block in left.values():
            if id(block) not in still:
                block.trim(self.codecs, self.page_size)

    def _write(
        self,
        rows: Sequence[int],
        encoded: dict[str, Packed],
        positions: torch.Tensor,
        mass: torch.Tensor | None,
        start: int,
        end: int,
        room: int,
    ) -> int:
        """Copy packed tokens from number `start` on into the rows' open block; returns how many it took."""
        at = self.open[rows[0]]
        filled = at[0].counts[at[1]] if at is not None else 0
        alike = at is not None and filled < at[0].capacity
        for row in rows:
            own = self.open[row]
            alike &= own is not None and at is not None and own[0] is at[0] and own[0].counts[own[1]] == filled
        if not alike:
            ahead = min(
                room, ROOM, max(self.most_held(rows[0]), self.page_size)
            )  # a short text takes no long one's room
            at, filled = self._add_block(rows, max(end - start, ahead // self.page_size * self.page_size)), 0
        assert at is not None
        block, lines = at[0], self._lines(rows)
        taken = min(end - start, block.capacity - filled)
        index: slice | torch.Tensor = slice(None)
        if len(lines) < len(block.lanes):
            index = torch.tensor(lines, device=self.device)
        block.positions[index, filled : filled + taken] = positions[:, start : start + taken]
        if block.mass is not None:
            block.mass[index, filled : filled + taken] = 0.0 if mass is None else mass[:, start : start + taken]
        for role, packed in encoded.items():
            for name, entry in packed.items():
                field = self.codecs[role].fields[name]
                assert field.tokens is not None
                to, of = slice(filled // field.tokens, (filled + taken) // field.tokens), start // field.tokens
                source = entry.narrow(-1 if field.tokens_last else 1, of, taken // field.tokens)
                target = block.packed[role][name]
                target[(index, ..., to) if field.tokens_last else (index, to)] = source
        for line in lines:
            block.counts[line] += taken
        return taken

    def _lines(self, rows: Sequence[int]) -> list[int]:
        firsts = [at[1] for at in (self.open[row] for row in rows) if at is not None]
        return [first + head for first in firsts for head in range(self.heads)]

    def _add_block(self, rows: Sequence[int], capacity: int) -> tuple[Block, int]:
        """A new open block with a line for every lane of these rows."""
        lanes = [row * self.heads + head for row in rows for head in range(self.heads)]
        block = self.new_block(lanes, self.statistics.rows_of(rows), capacity)
        for number, row in enumerate(rows):
            self.open[row] = (block, number * self.heads)
        self.blocks.append(block)
        return block, 0

    def new_block(self, lanes: list[int], epochs: list[int], capacity: int) -> Block:
        n = len(lanes)
        packed = {
            role: {
                name: torch.zeros(field.stored_shape((n,), capacity), dtype=field.dtype, device=self.device)
                for name, field in codec.fields.items()
                if field.tokens is not None
            }
            for role, codec in self.codecs.items()
        }
        positions = torch.full((n, capacity), -1, dtype=torch.int32, device=self.device)
        mass = torch.zeros(n, capacity, device=self.device) if self.track_mass else None
        return Block(lanes, epochs, [0] * n, capacity, packed, positions, mass)

    # -- rows and tokens -----------------------------------------------------------------------------------------------

    def map_rows(self, rows: torch.Tensor) -> None:
        """Make row i of the store what row `rows[i]` was."""
        order = rows.tolist()
        blocks = []
        for block in self.blocks:
            lines, lanes = [], []
            for row, old in enumerate(order):
                for line, lane in enumerate(block.lanes):
                    if lane // self.heads == old:
                        lines.append(line)
                        lanes.append(row * self.heads + lane % self.heads)
            if lines:
                blocks.append(block.select(lines, lanes))
        self.blocks, self.open = blocks, [None] * len(order)
        self.counts = [self.counts[row] for row in order]
        self.statistics.map_rows(rows)

    def truncate(self, row: int, tokens: int) -> None:
        """Forget what a row sealed from number `tokens` on (of those it ever sealed); nothing of it may be evicted."""
        gone = self.counts[row] - tokens
        for head in range(self.heads):
            left = gone
            for block in reversed(self.blocks):
                for line in reversed(range(len(block.lanes))):
                    if block.lanes[line] == row * self.heads + head and left:
                        taken = min(left, block.counts[line])
                        block.counts[line] -= taken
                        block.positions[line, block.counts[line] :] = -1
                        left -= taken
        self.counts[row] = tokens
        self.blocks = [block for block in self.blocks if any(block.counts)]
        self.open[row] = None

    def tensors(self) -> Iterator[torch.Tensor]:
        for block in self.blocks:
            yield from block.tensors()
        yield from self.statistics.tensors()

    def tokens_in_slabs(self) -> int:
        """Sealed tokens that are held, over all rows, on average over heads."""
        return sum(self.held) // self.heads

    def used_bytes(self) -> int:
        """Bytes of the entries that hold tokens, statistics included; the rest of the tensors is slack."""
        total = 0
        for block in self.blocks:
            own = sum(tensor.nbytes for tensor in block.tensors())
            total += own * sum(block.counts) // (len(block.lanes) * block.capacity)
        return total + sum(t.nbytes for t in self.statistics.tensors())
