"""What the first level held of tokens that moved down: copies in host memory, so that who comes back loses nothing.

A copy is the very codes of the first level; its statistics are shared with that level, which never forgets any. Each
round that moves tokens down adds a block; the oldest blocks go when the limit is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from .blocks import Block
from .codecs.base import Codec
from .compaction import gather_block
from .lane_reading import INSIDE, LINE
from .lanes import LanePages

HOST = torch.device("cpu")
#: bytes of one layer under `keep_exact="auto"`, where the model is not in host memory itself
AUTO_BYTES = 8 * 2**20
_NO_POSITION = torch.iinfo(torch.int32).max


class ExactCopies:
    """Copies of one layer, ragged by lane.

    Args:
        codecs: of the first level; they pack every token by itself.
        batch, heads: B and H.
        limit: bytes that the copies may take.
        track_mass: tokens carry their attention mass.
        first_position: as for `LanePages`.
    """

    def __init__(
        self,
        codecs: Mapping[str, Codec],
        batch: int,
        heads: int,
        limit: int,
        track_mass: bool,
        first_position: Callable[[int], int] | None,
    ):
        self.limit = limit
        self.pages = LanePages(codecs["key"], codecs["value"], batch, heads, HOST, track_mass, first_position)
        self.pages.holes = True  # tokens that have come back leave places empty

    # -- taking copies -------------------------------------------------------------------------------------------------

    def keep(self, pages: LanePages, rows: Sequence[int], table: torch.Tensor, scores: torch.Tensor) -> None:
        """Copy the tokens in `table` `[L, N]` (-1: none) of the first level, those with the highest `scores` `[L, N]`
        where not all have room; the oldest copies make room for them."""
        most = self.limit // self._bytes_of_a_page() // (self.pages.batch * self.pages.heads) * self.pages.page_size
        scores = scores.masked_fill(table < 0, -torch.inf)
        if most < table.shape[1]:
            best = scores.topk(most, dim=1).indices
            chosen = torch.zeros_like(table, dtype=torch.bool).scatter_(1, best, True)
            table = table.masked_fill(~chosen, -1)
        if not bool((table >= 0).any()):
            return
        pages.statistics.share_with(self.pages.statistics)
        block = gather_block(pages, rows, table)
        if block is not None:
            self.pages.blocks.append(block.to(HOST))
            self._hold_to_limit()

    def _bytes_of_a_page(self) -> int:
        page = self.pages.page_size
        bits = sum(f.bits_per_token(1) for c in self.pages.codecs.values() for f in c.fields.values() if f.tokens)
        return int(page * (bits / 8 + 4 * (1 + self.pages.track_mass)))  # and positions, mass

    def _hold_to_limit(self) -> None:
        """Let go of blocks that are empty, then of the oldest."""
        blocks = [block for block in self.pages.blocks if bool((block.positions >= 0).any())]
        sizes = [sum(tensor.nbytes for tensor in block.tensors()) for block in blocks]
        while sum(sizes) > self.limit:
            blocks, sizes = blocks[1:], sizes[1:]
        self.pages.blocks = blocks

    # -- giving them back ----------------------------------------------------------------------------------------------

    def find(self, rows: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
        """Numbers of the copies of the rows' tokens at `positions` `[L, N]` (-1: none), -1 where there is none."""
        table, wanted = self.pages.table(rows), positions.cpu().to(torch.int32).contiguous()
        if table.shape[1] == 0:
            return torch.full(wanted.shape, -1, dtype=torch.long)
        held = self.pages.look_up("positions", table, -1)
        held = held.masked_fill(held < 0, _NO_POSITION).to(torch.int32).contiguous()  # sorted, the empty ones last
        place = torch.searchsorted(held, wanted).clamp(max=held.shape[1] - 1)
        same = (held.gather(1, place) == wanted) & (wanted >= 0)
        return table.gather(1, place).masked_fill(~same, -1)

    def take(self, rows: Sequence[int], table: torch.Tensor, mass: torch.Tensor | None) -> Block | None:
        """A block of the copies in `table` `[L, N]`, which are let go of; each with the `mass` `[L, N]` it has now."""
        if mass is not None:
            for block, line, inside, which in self._lines_of(table):
                assert block.mass is not None
                block.mass[line, inside] = mass.cpu()[which]
        found = gather_block(self.pages, rows, table)
        for block, line, inside, _ in self._lines_of(table):
            block.positions[line, inside] = -1
        self._hold_to_limit()
        return found

    def _lines_of(self, table: torch.Tensor) -> Iterator[tuple[Block, int, torch.Tensor, torch.Tensor]]:
        """Every line with tokens in a table: block, number there, the tokens' places, and where the table has them."""
        for number, (block, line) in enumerate(self.pages.lines()):
            which = (table >= 0) & (table >> LINE == number)
            if bool(which.any()):
                yield block, line, table[which] & INSIDE, which

    def overlay(self, rows: Sequence[int], positions: torch.Tensor, role: str, read: torch.Tensor) -> torch.Tensor:
        """What lower levels `read` of tokens at `positions` `[L, N]`, `[L, N, D]`, with copies in place of theirs."""
        found = self.find(rows, positions)
        if not bool((found >= 0).any()):
            return read
        copies = self.pages.decode(role, found).to(read.device)
        return torch.where((found >= 0)[..., None].to(read.device), copies, read)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def map_rows(self, rows: torch.Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        self.pages.map_rows(rows)
        self._hold_to_limit()

    @property
    def tokens(self) -> int:
        """Copies of all rows, on average over heads."""
        return sum(int((block.positions >= 0).sum()) for block in self.pages.blocks) // self.pages.heads

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.pages.tensors()
