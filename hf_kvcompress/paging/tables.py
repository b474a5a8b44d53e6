"""Tables of the blocks that somebody holds.

A table has entries; an entry is a run of neighbouring blocks. Tables that were forked share entries until one writes.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch

from .pool import BlockPool, Run


class BlockTable:
    """Entries of blocks that one holder has, shared with the tables forked from it until one writes.

    The blocks are given back with the table: by `clear`, or when nothing refers to it any more.
    """

    def __init__(self, pool: BlockPool, runs: Sequence[Run] = ()):
        self.pool, self._runs = pool, list(runs)
        # The finaliser must know the runs, not the table.
        self._finalizer = weakref.finalize(self, pool._orphans.extend, self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __getitem__(self, entry: int) -> Run:
        return self._runs[entry]

    @property
    def blocks(self) -> list[int]:
        """Numbers of all blocks, entry by entry."""
        return [run.first + i for run in self._runs for i in range(run.count)]

    def append(self, count: int = 1) -> int:
        """Add an entry of `count` new blocks; returns its number."""
        self._runs.append(self.pool.take(count))
        return len(self._runs) - 1

    def share(self, run: Run) -> int:
        """Add an entry that another table holds as well; returns its number."""
        self._runs.append(self.pool.hold(run))
        return len(self._runs) - 1

    def map(self, entries: Sequence[int]) -> None:
        """Make entry i what entry `entries[i]` was."""
        new = [self.pool.hold(self._runs[entry]) for entry in entries]
        self.clear()
        self._runs += new

    def storages_held(self) -> dict[Hashable, int]:
        """Bytes of each run; of memory of its own, all that stays for its sake."""
        held: dict[Hashable, int] = {}
        for run in self._runs:
            if run.memory is not None:
                storage = run.memory.untyped_storage()
                held[str(run.memory.device), storage.data_ptr()] = storage.nbytes()
            else:
                held[id(self.pool), run.first] = run.count * self.pool.block_bytes
        return held

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockTable:
        return self.fork()

    def __getstate__(self) -> dict[str, Any]:
        order = {id(run): number for number, run in enumerate(self._runs)}  # a run that is held twice is written once
        return {
            "pool": self.pool,
            "memory": [self.pool.bytes_of(run).cpu() for i, run in enumerate(self._runs) if order[id(run)] == i],
            "entries": [order[id(run)] for run in self._runs],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["pool"])  # type: ignore[misc]
        memory, entries = state["memory"], state["entries"]
        if memory and len({len(own) for own in memory}) == 1:
            runs = self.pool.take_rows(len(memory), len(memory[0]) // self.pool.block_bytes)
        else:
            runs = [self.pool.take(len(own) // self.pool.block_bytes) for own in memory]
        places = {entry: run for entry, run in zip(sorted(set(entries)), runs, strict=True)}
        for run, own in zip(runs, memory, strict=True):
            self.pool.bytes_of(run).copy_(own)
        self._runs += [self.pool.hold(places[entry]) for entry in entries]
        for run in runs:
            self.pool.drop(run)

    def pop(self, entry: int = -1) -> None:
        """Give an entry back."""
        self.pool.drop(self._runs.pop(entry))

    def clear(self) -> None:
        """Give all entries back."""
        while self._runs:
            self.pop()

    def fork(self) -> BlockTable:
        """A table of the same entries; nothing is copied until one of both writes."""
        return BlockTable(self.pool, [self.pool.hold(run) for run in self._runs])

    def read(self, entry: int) -> torch.Tensor:
        """Memory of an entry, `[bytes]` uint8; not to be written to."""
        return self.pool.bytes_of(self._runs[entry])

    def hand_over(self, count: int) -> Run | None:
        """An entry of `count` blocks for another table, which it belongs to from now on; None without one."""
        for entry, run in enumerate(self._runs):
            if run.count == count and run.holders == 1:
                return self._runs.pop(entry)
        return None

    def write(self, entry: int, spare: BlockTable | None = None) -> torch.Tensor:
        """Memory of an entry that is this table's alone; copied first if it was shared, into `spare` blocks if any."""
        self.pool.collect()
        run = self._runs[entry]
        if run.holders > 1:
            own = (spare.hand_over(run.count) if spare is not None else None) or self.pool.take(run.count)
            self.pool.bytes_of(own).copy_(self.pool.bytes_of(run))
            self._runs[entry] = own
            self.pool.drop(run)
            run = own
        return self.pool.bytes_of(run)
