"""A pool of memory blocks of one size, given out in runs of neighbours, with reference counts."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Hashable
from typing import Any

import torch

from ..config import expect

MB, GB = 2**20, 2**30


class PoolFullError(MemoryError):
    """A pool has no room for the blocks that were asked for."""


class Run:
    """`count` neighbouring blocks from number `first` on, held by `holders` tables."""

    __slots__ = ("__weakref__", "count", "first", "holders", "memory")

    def __init__(self, first: int, count: int, memory: torch.Tensor | None = None):
        self.first, self.count, self.holders = first, count, 1
        self.memory = memory  # of its own, in a pool that grows


class BlockPool:
    """Memory for `blocks` blocks, all of it taken now.

    Args:
        name: for messages.
        blocks, block_bytes: number and size of the blocks.
        device: where they are.
    """

    def __init__(self, name: str, blocks: int, block_bytes: int, device: torch.device | str = "cpu"):
        for argument, value in (("blocks", blocks), ("block_bytes", block_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise expect(argument, "a whole number of at least 1", value)
        self.name, self.blocks, self.block_bytes, self.device = name, blocks, block_bytes, torch.device(device)
        # Written, so that an operating system that gives memory out lazily gives it now.
        self.memory = torch.empty(blocks * block_bytes, dtype=torch.uint8, device=self.device).zero_()
        self.moves = 0  # goes up when blocks move: views of before are no longer true
        self._taken = bytearray(blocks)  # 1 for a block in use
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()
        self._empty: weakref.WeakValueDictionary[int, Run] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()
        self._orphans: deque[Run] = (
            deque()
        )  # of tables that are gone: a finaliser may run amid anything, so it only notes

    # -- what is there -------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def used_blocks(self) -> int:
        self.collect()
        return self._taken.count(1)

    @property
    def free_blocks(self) -> int:
        return self.blocks - self.used_blocks

    @property
    def utilization(self) -> float:
        """Part of the blocks that is in use, 0 to 1."""
        return self.used_blocks / self.blocks

    @property
    def fragmentation(self) -> float:
        """Part of the free blocks that is outside of the longest free run: 0 when all are neighbours or none is."""
        with self._lock:
            free = self.free_blocks
            longest = max(map(len, bytes(self._taken).split(b"\1")))
        return 1 - longest / free if free else 0.0

    def blocks_for(self, nbytes: int) -> int:
        """Blocks that hold so many bytes."""
        return -(-nbytes // self.block_bytes)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, {self.used_blocks} of {self.blocks} blocks of "
            f"{self.block_bytes / MB:g} MB used, on {self.device})"
        )

    # -- taking and giving back ----------------------------------------------------------------------------------------

    def take(self, count: int) -> Run:
        """A run of `count` neighbouring free blocks; moves others together if only that makes room.

        Raises PoolFullError, with the numbers, if fewer are free.
        """
        if count < 1:
            raise expect("count", "at least 1 block", count)
        with self._lock:
            self._check_room(count)
            first = self._taken.find(bytes(count))
            if first < 0:
                self.defragment()
                first = self._taken.find(bytes(count))
            self._mark(first, count, 1)
            run = Run(first, count)
            self._runs.add(run)
            return run

    def _check_room(self, count: int) -> None:
        if self.free_blocks < count:
            raise PoolFullError(
                f"pool {self.name!r}: {count} blocks of {self.block_bytes:,} bytes wanted, {self.free_blocks} of "
                f"{self.blocks} free"
            )

    def take_rows(self, rows: int, count: int) -> list[Run]:
        """`rows` runs of `count` blocks each, zeroed, one behind the other if there is such a place.

        Raises PoolFullError, and takes none, if not all of them are free.
        """
        with self._lock:
            self._check_room(rows * count)
            first = self._taken.find(bytes(rows * count))
            if first < 0:
                runs = [self.take(count) for _ in range(rows)]
            else:
                self._mark(first, rows * count, 1)
                runs = [Run(first + row * count, count) for row in range(rows)]
                self._runs.update(runs)
        for run in runs:
            self.bytes_of(run).zero_()
        return runs

    def hold_empty(self, count: int) -> Run:
        """A run of `count` blocks that stands where a row has nothing; all who want one of that size share it."""
        with self._lock:
            self.collect()
            run = self._empty.get(count)
            if run is not None and run.holders:
                return self.hold(run)
            self._empty[count] = run = self.take_rows(1, count)[0]
            return run

    def is_empty(self, run: Run) -> bool:
        """Whether it is the run that stands where rows have nothing."""
        return self._empty.get(run.count) is run

    def hold(self, run: Run) -> Run:
        """Count one more holder of a run."""
        with self._lock:
            run.holders += 1
        return run

    def drop(self, run: Run) -> None:
        """Count one holder less; the last one frees the blocks."""
        with self._lock:
            run.holders -= 1
            if run.holders == 0:
                self._runs.discard(run)
                self._mark(run.first, run.count, 0)

    def collect(self) -> None:
        """Give back what tables held that are gone."""
        with self._lock:
            while self._orphans:
                self.drop(self._orphans.popleft())

    def _mark(self, first: int, count: int, taken: int) -> None:
        self._taken[first : first + count] = bytes([taken]) * count

    def bytes_of(self, run: Run) -> torch.Tensor:
        """The run's memory, `[count * block_bytes]` uint8; true until `moves` goes up."""
        return self.memory[run.first * self.block_bytes : (run.first + run.count) * self.block_bytes]

    def defragment(self) -> int:
        """Move all runs to the front, in order; tables follow. Returns how many blocks moved."""
        moved = end = 0
        with self._lock:
            self.collect()
            for run in sorted(self._runs, key=lambda run: run.first):
                if run.first != end:
                    data = self.bytes_of(run).clone()  # old and new place may overlap
                    self._mark(run.first, run.count, 0)
                    run.first = end
                    self._mark(end, run.count, 1)
                    self.bytes_of(run).copy_(data)
                    moved += run.count
                end += run.count
            self.moves += moved > 0
        return moved

    def storages_held(self) -> dict[Hashable, int]:
        """Nothing: what a cache holds of a pool are the blocks in its tables."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockPool:
        return self  # copies of a cache share the pool

    def __reduce__(self) -> tuple[Any, ...]:
        return GrowingPool, (self.name, self.block_bytes, self.device)  # another process has no such memory


class GrowingPool(BlockPool):
    """A private pool that takes memory as blocks are wanted and gives it back with them; it is never full."""

    def __init__(self, name: str, block_bytes: int, device: torch.device | str = "cpu"):
        super().__init__(name, 1, block_bytes, device)
        self.memory = self.memory[:0].clone()
        self.blocks, self._next = 0, 0

    @property
    def used_blocks(self) -> int:
        self.collect()
        return self.blocks

    def take(self, count: int) -> Run:
        """`count` new blocks."""
        return self.take_rows(1, count)[0]

    def take_rows(self, rows: int, count: int) -> list[Run]:
        """`rows` runs of `count` blocks, in one piece of memory that goes with the last of them."""
        if count < 1:
            raise expect("count", "at least 1 block", count)
        memory = torch.zeros(rows, count * self.block_bytes, dtype=torch.uint8, device=self.device)
        with self._lock:
            self.collect()
            first = self._next
            self._next, self.blocks = first + rows * count, self.blocks + rows * count
        return [Run(first + row * count, count, own) for row, own in enumerate(memory)]

    def _mark(self, first: int, count: int, taken: int) -> None:
        self.blocks -= count

    @property
    def utilization(self) -> float:
        return 1.0 if self.blocks else 0.0

    @property
    def fragmentation(self) -> float:
        return 0.0

    def bytes_of(self, run: Run) -> torch.Tensor:
        assert run.memory is not None
        return run.memory

    def defragment(self) -> int:
        """Nothing to do: a run has memory of its own."""
        return 0
