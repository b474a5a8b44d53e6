"""The sequences that run: one paged cache with a row for each, aligned at their ends."""

from __future__ import annotations

from typing import Any

import torch

from ..snapshots import Snapshot
from .cache import PagedCache
from .joining import holding, join, lengths, select
from .resident import Resident
from .room import Room
from .sequences import EngineStats, Sequence


class Batch:
    """Rows that come and go.

    Args:
        config: the model's.
        room: says what rows take in the pool.
        resident: prefixes that are held beside the rows.
        stats: where peaks are noted.
    """

    def __init__(self, config: Any, room: Room, resident: Resident, stats: EngineStats):
        self.config, self.room, self.resident, self.stats = config, room, resident, stats
        self.sequences: list[Sequence] = []
        self.cache: PagedCache | None = None

    def add(self, sequences: list[Sequence], cache: PagedCache) -> None:
        """Take in sequences with a cache that has a row of each, which must not be used any more."""
        self.cache = cache if self.cache is None else join([self.cache, cache], self.config)
        self.sequences += sequences
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
        counts = torch.tensor(lengths(self.cache))[:, None]
        longest = int(counts.max())
        mask = (torch.arange(longest + 1) >= longest - counts).long()
        return {"attention_mask": mask, "position_ids": counts}

    def step_need(self) -> int:
        """Blocks that one step may take: new entries, copies of entries that are shared, and empty ones."""
        if self.cache is None:
            return 0
        counts = lengths(self.cache)
        sealing = [row for row, count in enumerate(counts) if self.room.seals(count + 1)]
        if not sealing:
            return 0
        total = self.room.empties if len(self.sequences) > 1 else 0
        total += sum(self.room.blocks(counts[row] + 1) - self.room.blocks(counts[row]) for row in sealing)
        for _, layer in holding(self.cache):
            assert layer.storage is not None
            pages = layer.storage.pages
            for slab in getattr(pages, "slabs", []):
                for row in sealing:
                    if slab.start <= pages.counts[row] < slab.end and slab.table[row].holders > 1:
                        total += slab.table[row].count
        return total

    def note_peak(self) -> None:
        """Note what is held now, and what a padded batch without compression would hold, if it is the most so far.

        Rows only grow until one comes or goes: it is enough to look then.
        """
        if self.cache is None:
            return
        assert self.cache.pool is not None
        windows = len(self.sequences) + len(self.resident)
        held = self.cache.pool.used_blocks * self.cache.pool.block_bytes + windows * self.room.window_bytes
        if held > self.stats.peak_bytes:
            counts = lengths(self.cache)
            self.stats.peak_bytes = held
            self.stats.peak_dense_bytes = len(counts) * max(counts) * self.room.token_bytes
