"""A pass that finds no room changes nothing, wherever the blocks run out."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch

import hf_kvcompress as kvc
from hf_kvcompress.paging.cache import PagedCache
from hf_kvcompress.paging.pool import BlockPool, PoolFullError

from ..conformance.factories import SMALL
from ..conformance.state import FULL, SLIDING, decoded, equal, feed, random_pairs
from ..tiny_model import tiny_llama

BLOCK = 8192


def taken(pool: BlockPool) -> BlockPool:
    """The pool without the blocks of caches that have gone."""
    gc.collect()
    pool.collect()
    return pool


def fill(pool: BlockPool, free: int) -> list[Any]:
    """Take blocks until so many are free."""
    return [pool.take(1) for _ in range(pool.free_blocks - free)]


@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("codec", ["identity", "eqrot3"])
def test_a_later_pass_changes_nothing_at_any_number_of_free_blocks(codec: str, config: Any) -> None:
    pairs, more = random_pairs(3, 150), random_pairs(3, 90, seed=1)
    mask = torch.ones(3, 150, dtype=torch.long)
    mask[1, :70] = 0
    plain = kvc.CompressedCache(config, codec=codec, **SMALL)
    feed(plain, pairs, mask)
    feed(plain, more)
    expected, failed, done = decoded(plain), 0, False
    for free in range(400):
        pool = BlockPool("kv", 1000, BLOCK)
        cache = PagedCache(config, pool=pool, codec=codec, **SMALL)
        feed(cache, pairs, mask)
        fork = cache.fork()
        before, used = decoded(cache), pool.used_blocks
        held = fill(pool, free)
        try:
            feed(cache, more)
        except PoolFullError:
            failed += 1
            assert cache.get_seq_length() == 150 and equal(decoded(cache), before)
            for run in held:
                pool.drop(run)
            assert pool.used_blocks == used
            feed(cache, more)
        else:
            done = True
        assert equal(decoded(cache), expected) and equal(decoded(fork), before)
        if done:
            break
    assert failed > 5 and done


@pytest.mark.parametrize("plain", [True, False], ids=["sdpa", "kvcompress"])
def test_generate_is_right_behind_a_first_pass_that_found_no_room(plain: bool) -> None:
    model = tiny_llama()
    ids = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    pool, failed = BlockPool("kv", 400, BLOCK), 0
    if not plain:
        kvc.enable(model)
    cache = PagedCache(model.config, pool=pool, codec="identity", **SMALL)
    for free in range(400):
        held = fill(pool, free)
        try:
            out = model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
        except PoolFullError:
            failed += 1
            assert cache.get_seq_length() == 0 and taken(pool).used_blocks == len(held)
            continue
        finally:
            for run in held:
                pool.drop(run)
        break
    assert failed > 3
    out = model.generate(out, past_key_values=cache, max_new_tokens=11, do_sample=False)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_reserved_is_what_is_taken(seed: int) -> None:
    """No pass of a random trace asks the pool for a block once it has begun, and none is left over."""
    draw, rows = random.Random(seed), 1 + seed % 3
    pool = BlockPool("kv", 600, BLOCK)
    cache = PagedCache([FULL, SLIDING][seed % 2], pool=pool, codec="int4", **SMALL)
    feed(cache, random_pairs(rows, draw.randrange(1, 90)))
    begin, forks = cache._begin_pass, []

    def closed(*args: Any) -> Any:
        raise AssertionError(f"blocks taken behind the beginning of a pass: {args}")

    def begin_and_close(*args: Any) -> None:
        for name in ("take", "take_rows"):
            pool.__dict__.pop(name, None)
        begin(*args)
        pool.take = pool.take_rows = closed  # type: ignore[method-assign]

    for step in range(7):
        what = draw.choice(["feed", "feed", "fork", "select"])
        if what == "fork":
            forks.append(cache.fork())
        elif what == "select":
            cache.batch_select_indices(torch.tensor([draw.randrange(rows) for _ in range(rows)]))
        else:
            cache._begin_pass = begin_and_close  # type: ignore[method-assign]
            feed(cache, random_pairs(rows, draw.randrange(1, 140), seed=step))
            kvc.CompressedCache.commit(cache)  # without giving back what is left over
            for name in ("take", "take_rows"):
                pool.__dict__.pop(name)
            del cache._begin_pass
            assert not [run for _, store in cache._stores() for run in store.spare if not pool.is_empty(run)]
    cache.reset()
    forks.clear()
    assert taken(pool).used_blocks == 0
