"""Caches in one pool: equal to caches of their own, sharing blocks until one writes, and no block is ever lost."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import hf_kvcompress as kvc
from hf_kvcompress.paging.cache import PagedCache
from hf_kvcompress.paging.manager import MemoryManager
from hf_kvcompress.paging.pages import PagedStore
from hf_kvcompress.paging.pool import BlockPool, PoolFullError

from ..conformance.factories import SMALL
from ..conformance.state import FULL, SLIDING, decoded, equal, feed, feed_in_parts, random_pairs
from ..tiny_model import tiny_llama

BLOCK = 2048


def _pool(blocks: int = 2000) -> BlockPool:
    return BlockPool("kv", blocks, BLOCK)


@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("codec", ["identity", "fp8", "kivi2", "turbo3", "eqrot4"])
def test_pages_in_blocks_hold_what_pages_hold(codec: str, config: Any) -> None:
    pool = _pool()
    pairs = random_pairs(3, 700)
    plain, paged = (
        kvc.CompressedCache(config, codec=codec, **SMALL),
        PagedCache(config, pool=pool, codec=codec, **SMALL),
    )
    mask = torch.ones(3, 700, dtype=torch.long)
    mask[1, :90] = 0
    for cache in (plain, paged):
        feed_in_parts(cache, pairs, [640, 30] + [1] * 30, mask)
    assert equal(decoded(plain), decoded(paged))
    assert all(isinstance(layer.storage.pages, PagedStore) for layer in paged.layers)
    assert paged.stats()["compressed_pages"] == plain.stats()["compressed_pages"]
    assert pool.used_blocks * BLOCK < paged.nbytes < pool.nbytes
    by_layer = sum(layer.bytes_held for layer in paged.stats().layers)  # they may share an empty entry
    assert 0 <= by_layer - paged.nbytes <= 40 * BLOCK
    pool.memory.random_(0, 1)  # the pages are really there
    assert not equal(decoded(plain), decoded(paged))


def test_rows_and_forks_share_until_one_writes() -> None:
    pool, pairs = _pool(), random_pairs(1, 300)
    cache = PagedCache(FULL, pool=pool, codec="int4", **SMALL)
    feed(cache, pairs)
    cache.commit()
    used = pool.used_blocks
    cache.batch_repeat_interleave(8)
    assert pool.used_blocks == used
    forks = [cache.fork() for _ in range(3)]
    assert pool.used_blocks == used and cache.nbytes == forks[0].nbytes
    before = decoded(cache)
    feed(forks[0], random_pairs(8, 3, seed=1))  # into the window: nothing is sealed
    assert pool.used_blocks == used
    feed(forks[0], random_pairs(8, 40, seed=1))
    forks[0].commit()  # seals into the last slab of each layer, for each row
    grown = pool.used_blocks
    assert used < grown <= 9 * used
    assert equal(decoded(cache), before) and equal(decoded(forks[1]), before)
    one = PagedCache(FULL, pool=pool, codec="int4", **SMALL)
    feed(one, [(keys.repeat_interleave(8, 0), values.repeat_interleave(8, 0)) for keys, values in pairs])
    for size in (3, 40):
        feed(one, random_pairs(8, size, seed=1))
    assert equal(decoded(one), decoded(forks[0]))
    forks.clear()
    del one
    assert pool.used_blocks == used
    cache.reset()
    assert pool.used_blocks == 0


def test_beams_and_samples_share_the_prompt() -> None:
    model = tiny_llama(eos_token_id=None).requires_grad_(False)
    ids = torch.randint(0, 256, (1, 400))
    with kvc.enable(model):
        for options in ({"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 3}):
            pool = _pool()
            cache = PagedCache(model.config, pool=pool, codec="identity", **SMALL)
            expected = model.generate(ids, max_new_tokens=24, do_sample=False, **options)
            got = model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False, **options)
            assert torch.equal(got, expected)
            alone = PagedCache(model.config, pool=_pool(), codec="identity", **SMALL)
            model(ids, past_key_values=alone)
            assert pool.used_blocks < 2.5 * alone.layers[0].storage.pages.pool.used_blocks  # not four times


def test_defragmentation_moves_pages_of_living_caches() -> None:
    pool = _pool(1000)
    caches = [PagedCache(FULL, pool=pool, codec="int4", **SMALL) for _ in range(6)]
    for seed, cache in enumerate(caches):
        feed(cache, random_pairs(2, 200, seed=seed))
    expected = [decoded(cache) for cache in caches]
    for number in (0, 2, 4):
        caches[number].reset()
    assert pool.fragmentation > 0 and pool.defragment() > 0 and pool.fragmentation == 0
    for number in (1, 3, 5):
        assert equal(decoded(caches[number]), expected[number])
        feed(caches[number], random_pairs(2, 60, seed=9))


def test_a_full_pool_is_told_with_the_numbers() -> None:
    manager = MemoryManager(total_gpu_memory_gb=0.01, device="cpu")
    pool = manager.allocate_pool("kv", 0.0004, block_size_mb=0.01)
    cache = PagedCache(FULL, pool=pool, codec="identity", **SMALL)
    with pytest.raises(PoolFullError, match=r"pool 'kv': \d+ blocks of 10,485 bytes wanted, \d+ of 40 free"):
        feed_in_parts(cache, random_pairs(2, 2000), [500] * 4)
        cache.commit()
    del cache
    gc.collect()  # the error's traceback
    assert pool.utilization == 0


def test_files_and_copies(tmp_path: Path) -> None:
    pool = _pool()
    cache = PagedCache(FULL, pool=pool, codec="eqrot3", **SMALL)
    feed(cache, random_pairs(2, 900))
    cache.save(tmp_path / "cache")
    loaded = PagedCache.load(tmp_path / "cache", FULL, pool=pool)
    plain = kvc.CompressedCache.load(tmp_path / "cache", FULL)
    other = copy.deepcopy(loaded)
    for each in (cache, loaded, plain, other):
        feed(each, random_pairs(2, 70, seed=3))
    assert equal(decoded(cache), decoded(loaded)) and equal(decoded(cache), decoded(plain))
    assert equal(decoded(cache), decoded(other))


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="policy: expected none: pages of which tokens go cannot be shared, got 'h2o'"):
        PagedCache(FULL, policy="h2o", budget=100)


class CacheMachine(RuleBasedStateMachine):
    """Random traces of several caches in a small pool, each beside a plain cache of its own."""

    @initialize(codec=st.sampled_from(["identity", "kivi2", "eqrot3"]), sliding=st.booleans())
    def start(self, codec: str, sliding: bool) -> None:
        self.config, self.codec, self.pool = SLIDING if sliding else FULL, codec, BlockPool("kv", 600, 4096)
        self.caches: list[tuple[PagedCache, Any]] = []
        self.seed = 0

    @rule(rows=st.integers(1, 2))
    def new(self, rows: int) -> None:
        if len(self.caches) < 4:
            made = {"codec": self.codec, **SMALL}
            pair = PagedCache(self.config, pool=self.pool, **made), kvc.CompressedCache(self.config, **made)
            self._feed(pair, rows, 20)
            self.caches.append(pair)

    def _feed(self, pair: tuple[Any, Any], rows: int, tokens: int) -> None:
        self.seed += 1
        for cache in pair:
            feed(cache, random_pairs(rows, tokens, seed=self.seed))

    def _pair(self, data: st.DataObject) -> tuple[PagedCache, Any]:
        return self.caches[data.draw(st.integers(0, len(self.caches) - 1))]

    @precondition(lambda self: self.caches)
    @rule(data=st.data(), tokens=st.sampled_from([1, 9, 40, 130]))
    def write(self, data: st.DataObject, tokens: int) -> None:
        pair = self._pair(data)
        self._feed(pair, pair[1].layers[0].storage.batch, tokens)

    @precondition(lambda self: 0 < len(self.caches) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        paged, plain = self._pair(data)
        paged.commit()
        used = self.pool.used_blocks
        self.caches.append((paged.fork(), copy.deepcopy(plain)))
        assert self.pool.used_blocks == used

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        pair = self._pair(data)
        batch = pair[1].layers[0].storage.batch
        rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3))
        for cache in pair:
            cache.batch_select_indices(torch.tensor(rows))

    @precondition(lambda self: self.caches and self.config is FULL)
    @rule(data=st.data(), part=st.floats(0, 0.9))
    def crop(self, data: st.DataObject, part: float) -> None:
        pair = self._pair(data)
        tokens = int(part * pair[1].get_seq_length())
        for cache in pair:
            cache.crop(-tokens)

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.caches.remove(self._pair(data))

    @rule()
    def defragment(self) -> None:
        self.pool.defragment()

    @invariant()
    def caches_are_equal_and_blocks_accounted_for(self) -> None:
        if not hasattr(self, "caches"):
            return
        for paged, plain in self.caches:
            assert equal(decoded(paged), decoded(plain))
        tables = [
            slab.table for paged, _ in self.caches for layer in paged.layers for slab in layer.storage.pages.slabs
        ]
        runs = {id(run): run for table in tables for run in table}
        assert sum(run.count for run in runs.values()) == self.pool.used_blocks
        assert all(run.holders == sum(own is run for table in tables for own in table) for run in runs.values())

    def teardown(self) -> None:
        if hasattr(self, "caches"):
            self.caches.clear()
            assert self.pool.used_blocks == 0


TestCaches = CacheMachine.TestCase
TestCaches.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)
