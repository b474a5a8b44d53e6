"""Block pools: exact contents, no leak and no double use under any order of operations, refusals with the numbers."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_kvcompress.paging.manager import MemoryManager
from hf_kvcompress.paging.pool import MB, BlockPool, GrowingPool, PoolFullError
from hf_kvcompress.paging.tables import BlockTable

BLOCK = 16


class PoolMachine(RuleBasedStateMachine):
    """Random traces against a model that copies everything: each table is a list of byte strings."""

    @initialize(blocks=st.integers(4, 24), growing=st.booleans())
    def start(self, blocks: int, growing: bool) -> None:
        self.growing = growing
        self.pool = GrowingPool("test", BLOCK) if growing else BlockPool("test", blocks, BLOCK)
        self.tables: list[BlockTable] = []
        self.model: list[list[bytes]] = []

    def _table(self, data: st.DataObject, filled: bool = False) -> int:
        choices = [i for i, own in enumerate(self.model) if own or not filled]
        return data.draw(st.sampled_from(choices))

    @rule()
    def new(self) -> None:
        self.tables.append(BlockTable(self.pool))
        self.model.append([])

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(1, 4), byte=st.integers(0, 255))
    def append(self, data: st.DataObject, count: int, byte: int) -> None:
        i, free = self._table(data), self.pool.free_blocks
        if not self.growing and free < count:
            with pytest.raises(PoolFullError, match=f"{count} blocks of 16 bytes wanted, {free} of"):
                self.tables[i].append(count)
            return
        entry = self.tables[i].append(count)  # room that is in pieces is made one
        self.tables[i].write(entry).fill_(byte)
        self.model[i].append(bytes([byte]) * count * BLOCK)

    @rule(rows=st.integers(1, 3), count=st.integers(1, 3))
    def append_rows(self, rows: int, count: int) -> None:
        free = self.pool.free_blocks
        if not self.growing and free < rows * count:
            with pytest.raises(PoolFullError):
                self.pool.take_rows(rows, count)
            assert self.pool.free_blocks == free  # none or all
            return
        self.tables.append(BlockTable(self.pool, self.pool.take_rows(rows, count)))
        self.model.append([bytes(count * BLOCK)] * rows)

    @precondition(lambda self: any(self.model))
    @rule(data=st.data(), byte=st.integers(0, 255), at=st.integers(0, BLOCK - 1))
    def write(self, data: st.DataObject, byte: int, at: int) -> None:
        i = self._table(data, filled=True)
        entry = data.draw(st.integers(0, len(self.model[i]) - 1))
        run = self.tables[i][entry]
        shared = run.holders > 1
        if shared and not self.growing and self.pool.free_blocks < run.count:
            with pytest.raises(PoolFullError):
                self.tables[i].write(entry)
            return
        self.tables[i].write(entry)[at] = byte
        assert (self.tables[i][entry] is run) == (not shared)
        changed = bytearray(self.model[i][entry])
        changed[at] = byte
        self.model[i][entry] = bytes(changed)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        i, used = self._table(data), self.pool.used_blocks
        self.tables.append(self.tables[i].fork())
        self.model.append(list(self.model[i]))
        assert self.pool.used_blocks == used

    @precondition(lambda self: any(self.model))
    @rule(data=st.data())
    def share_one(self, data: st.DataObject) -> None:
        i, j = self._table(data, filled=True), self._table(data)
        self.tables[j].share(self.tables[i][0])
        self.model[j].append(self.model[i][0])

    @precondition(lambda self: any(self.model))
    @rule(data=st.data())
    def pop(self, data: st.DataObject) -> None:
        i = self._table(data, filled=True)
        entry = data.draw(st.integers(0, len(self.model[i]) - 1))
        self.tables[i].pop(entry)
        self.model[i].pop(entry)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), explicitly=st.booleans())
    def free(self, data: st.DataObject, explicitly: bool) -> None:
        i = self._table(data)
        if explicitly:
            self.tables[i].clear()
        del self.tables[i], self.model[i]

    @rule()
    def defragment(self) -> None:
        self.pool.defragment()
        assert self.pool.fragmentation == 0

    @invariant()
    def contents_are_kept_and_blocks_accounted_for(self) -> None:
        if not hasattr(self, "pool"):
            return
        runs = {id(run): run for table in self.tables for run in table}
        self.pool.collect()
        blocks = [run.first + i for run in runs.values() for i in range(run.count)]
        assert len(blocks) == len(set(blocks)) == self.pool.used_blocks
        for run in runs.values():
            assert run.holders == sum(own is run for table in self.tables for own in table)
        for table, model in zip(self.tables, self.model, strict=True):
            assert [bytes(table.read(i).tolist()) for i in range(len(table))] == model
        assert 0 <= self.pool.fragmentation <= 1

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.tables.clear()
            assert self.pool.used_blocks == 0


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_fragmentation_and_utilization_are_what_they_say() -> None:
    pool = BlockPool("kv", 8, BLOCK)
    tables = [BlockTable(pool) for _ in range(8)]
    for number, table in enumerate(tables):
        table.append()
        table.write(0).fill_(number)
    assert (pool.utilization, pool.fragmentation) == (1.0, 0.0)
    for number in (1, 3, 5):
        tables[number].clear()
    assert pool.utilization == 5 / 8 and pool.fragmentation == pytest.approx(2 / 3)
    assert pool.defragment() == 4  # number 0 is in its place
    assert pool.fragmentation == 0 and [int(tables[i].read(0)[0]) for i in (0, 2, 4, 6, 7)] == [0, 2, 4, 6, 7]
    whole = BlockTable(pool)
    whole.append(3)
    assert whole.blocks == [5, 6, 7] and pool.defragment() == 0


def test_the_memory_is_taken_at_once() -> None:
    pool = BlockPool("kv", 64, 4096)
    memory = pool.memory.data_ptr()
    table = BlockTable(pool)
    for _ in range(64):
        table.append()
    assert pool.memory.data_ptr() == memory and pool.memory.nbytes == pool.nbytes == 64 * 4096
    assert all(memory <= table.read(i).data_ptr() < memory + pool.nbytes for i in range(64))


def test_threads_never_get_the_same_block() -> None:
    pool = BlockPool("kv", 200, 8)
    failures = []

    def work(number: int) -> None:
        for _ in range(150):
            table = BlockTable(pool)
            for _ in range(3):
                table.append(2)
            fork = table.fork()
            for entry in range(3):
                table.write(entry).fill_(number)
            if any(not bool((table.read(entry) == number).all()) for entry in range(3)):
                failures.append(number)
            table.clear()
            fork.clear()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and pool.used_blocks == 0


# -- memory manager ----------------------------------------------------------------------------------------------------


def test_pools_never_exceed_the_memory() -> None:
    manager = MemoryManager(total_gpu_memory_gb=0.1, reserved_memory_gb=0.05, device="cpu")
    pool = manager.allocate_pool("kv", size_gb=0.03, block_size_mb=0.5)
    assert pool.block_bytes == MB // 2 and pool.blocks == int(0.03 * 2**30) // (MB // 2)
    with pytest.raises(
        ValueError, match=r"size_gb: expected at most 0\.0\d+ GB \(0.1 in all, 0.05 reserved, pools: kv"
    ):
        manager.allocate_pool("more", size_gb=0.03, block_size_mb=0.5)
    manager.allocate_pool("rest", size_gb=0.01, block_size_mb=1)
    stats = manager.stats()
    assert stats["available"] + stats["reserved"] + sum(p["nbytes"] for p in stats["pools"].values()) == stats["total"]
    manager.free_pool("kv")
    assert manager.allocate_pool("kv", size_gb=0.03, block_size_mb=1).utilization == 0
    table = BlockTable(manager.pools["kv"])
    table.append(2)
    table.append()
    table.pop(0)
    assert manager.defragment("kv") == manager.defragment(manager.pools["kv"]) + 1 == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("kv", 0.01), "name: expected one that no pool has"),
        (("x", 0), "size_gb: expected a number above 0"),
        (("x", 0.01, -1), "block_size_mb: expected a number above 0"),
        (("x", 0.01, 100), "block_size_mb: expected at most the pool's 10.24 MB"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: tuple, message: str) -> None:
    manager = MemoryManager(total_gpu_memory_gb=0.1, device="cpu")
    manager.allocate_pool("kv", 0.01, 1)
    with pytest.raises(ValueError, match=message):
        manager.allocate_pool(*arguments)


def test_the_whole_device_is_the_default() -> None:
    manager = MemoryManager(device="cpu")
    assert manager.total > 2**30
    with pytest.raises(ValueError, match="reserved_memory_gb: expected 0 up to below"):
        MemoryManager(1, 2, "cpu")
    with pytest.raises(ValueError, match="name: expected one of no pools"):
        manager.free_pool("kv")
    with pytest.raises(ValueError, match="blocks: expected a whole number"):
        BlockPool("kv", 0, 8)
    with pytest.raises(ValueError, match="count: expected at least 1 block"):
        BlockPool("kv", 4, 8).take(0)
    assert torch.device("cpu") == manager.device
