"""The sequences that run: one paged cache with a row for each, aligned at their ends."""

from __future__ import annotations

from typing import Any

import torch

from ..snapshots import Snapshot
from .cache import PagedCache
from .joining import holding, join, lengths, select
from .room import Room
from .sequences import EngineStats, Sequence


class Batch:
    """Rows that come and go.

    Args:
        config: the model's.
        room: says what rows take in the pool.
        stats: where peaks are noted.
    """

    def __init__(self, config: Any, room: Room, stats: EngineStats):
        self.config, self.room, self.stats = config, room, stats
        self.sequences: list[Sequence] = []
        self.cache: PagedCache | None = None

    def add(self, sequence: Sequence, cache: PagedCache) -> None:
        """Take in a sequence with its cache, which must not be used any more."""
        self.cache = cache if self.cache is None else join([self.cache, cache], self.config)
        self.sequences.append(sequence)
        self.note_peak()

    def keep(self, rows: list[int]) -> None:
        """Keep these rows and let go of the others' blocks."""
        if len(rows) == len(self.sequences):
            return
        self.note_peak()
        self.sequences = [self.sequences[row] for row in rows]
        if not rows:
            self.cache = None
        elif self.cache is not None:
            select(self.cache, rows)

    def drop_last(self, offload: bool) -> Sequence:
        """Take out the row that came last, with its pages in host memory if it is to be offloaded."""
        assert self.cache is not None
        row, sequence = len(self.sequences) - 1, self.sequences[-1]
        if offload:
            own = self.cache.fork()
            select(own, [row])
            state = own.snapshot(copy=False)
            tensors = {name: tensor.to("cpu", copy=True) for name, tensor in state.tensors.items()}
            sequence.offloaded = Snapshot(state.layers, tensors)
        self.keep(list(range(row)))
        return sequence

    def inputs(self) -> dict[str, torch.Tensor]:
        """Mask and positions of one more token for every row."""
        assert self.cache is not None
        counts = lengths(self.cache)
        longest = max(counts)
        mask = [[0] * (longest - count) + [1] * (count + 1) for count in counts]
        return {"attention_mask": torch.tensor(mask), "position_ids": torch.tensor(counts)[:, None]}

    def step_need(self) -> int:
        """Blocks that one step may take: new entries, copies of entries that are shared, and empty ones."""
        if self.cache is None:
            return 0
        total = self.room.empties if len(self.sequences) > 1 else 0
        counts = lengths(self.cache)
        for count in counts:
            total += self.room.blocks(count + 1) - self.room.blocks(count)
        sealing = [self.room.seals(count + 1) for count in counts]
        for _, layer in holding(self.cache):
            assert layer.storage is not None
            pages = layer.storage.pages
            for slab in getattr(pages, "slabs", []):
                for row, run in enumerate(slab.table):
                    if sealing[row] and run.holders > 1 and slab.start <= pages.counts[row] < slab.end:
                        total += run.count
        return total

    def note_peak(self) -> None:
        """Note what is held now, and what a padded batch without compression would hold, if it is the most so far.

        Rows only grow until one comes or goes: it is enough to look then.
        """
        if self.cache is None:
            return
        held = self.cache.nbytes
        if held > self.stats.peak_bytes:
            counts = lengths(self.cache)
            self.stats.peak_bytes = held
            self.stats.peak_dense_bytes = len(counts) * max(counts) * self.room.token_bytes
